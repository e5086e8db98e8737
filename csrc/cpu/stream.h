// How the CPU driver finds, loads and stores an element of a list.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "math/element.h"
#include "math/storage.h"

namespace clext {
namespace cpu {

static constexpr size_t kMaxLists = 10;
using ChunkPointers = std::array<char*, kMaxLists>;

// List k of an op, for storage type T: its element type, its load and its store.
template <class L, class T>
struct Stream {
  using A = accumulate_t<T>;
  using Element = element_t<L, T>;

  static CLEXT_HOST_DEVICE A load(const char* base, int64_t, int64_t i) {
    if constexpr (L::access == Access::Write) return A(0);
    return A(to_accumulate(reinterpret_cast<const Element*>(base)[i]));
  }

  static CLEXT_HOST_DEVICE void store(char* base, int64_t i, const A& value) {
    if constexpr (L::access == Access::Write || L::access == Access::Update) {
      reinterpret_cast<Element*>(base)[i] = from_accumulate<Element>(value);
    }
  }
};

template <class T>
struct Stream<ReadRows, T> {
  using A = accumulate_t<T>;
  using Element = A;

  static CLEXT_HOST_DEVICE Rows<A> load(const char* base, int64_t row_stride, int64_t i) {
    return {reinterpret_cast<const A*>(base) + i, row_stride};
  }

  static CLEXT_HOST_DEVICE void store(char*, int64_t, const Rows<A>&) {}
};

template <class T>
struct Stream<WriteRows, T> {
  using A = accumulate_t<T>;
  using Element = A;

  static CLEXT_HOST_DEVICE MutableRows<A> load(char* base, int64_t row_stride, int64_t i) {
    return {reinterpret_cast<A*>(base) + i, row_stride};
  }

  static CLEXT_HOST_DEVICE void store(char*, int64_t, const MutableRows<A>&) {}
};

}  // namespace cpu
}  // namespace clext
