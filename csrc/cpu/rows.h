// The chunk loop of functors that read a list of rows (a Jacobian): a pack of elements at a time,
// from a copy in the first-level cache. The rows of an element lie far apart, often by a power of
// two, where a cache holds only a few of them; each is copied once and then read many times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/lanes.h"
#include "cpu/pack.h"
#include "cpu/stream.h"
#include "math/element.h"
#include "math/storage.h"

namespace clext {
namespace cpu {

static constexpr int64_t kStageBytes = 16 * 1024;
static constexpr int64_t kMaxStagedPacks = 16;

template <class Op, size_t... K>
constexpr int rows_list(std::index_sequence<K...>) {
  int found = -1;
  ((ListAt<K, typename Op::lists>::type::storage == Storage::Rows &&
            ListAt<K, typename Op::lists>::type::access == Access::Read
        ? found = static_cast<int>(K)
        : 0),
   ...);
  return found;
}

// Which list of the functor holds rows to read; -1 for none.
template <class Op>
static constexpr int kRowsList = rows_list<Op>(std::make_index_sequence<Op::lists::count>{});

// `size` elements of each row, padded with zeros to `padded`.
template <class A>
CLEXT_HOST_DEVICE void stage_rows(A* stage, int64_t width, const A* rows, int64_t row_stride,
                                  int64_t row_count, int64_t size, int64_t padded) {
  for (int64_t row = 0; row < row_count; ++row, stage += width, rows += row_stride) {
    memcpy(stage, rows, static_cast<size_t>(size) * sizeof(A));
    std::fill(stage + size, stage + padded, A(0));
  }
}

// More streams than the processor follows by itself: the next block is fetched during this one.
template <class A>
CLEXT_HOST_DEVICE void prefetch_rows(const A* at, int64_t row_stride, int64_t row_count) {
  for (int64_t row = 0; row < row_count; ++row, at += row_stride) __builtin_prefetch(at);
}

template <class Op, class A, class Pointers, size_t... K>
CLEXT_HOST_DEVICE void apply_pack(const Op& op, const Pointers& at, const Rows<Pack<A>>& rows,
                                  int64_t start, int64_t count, std::index_sequence<K...>) {
  const auto load = [&](auto list) __attribute__((always_inline)) {
    constexpr size_t kList = decltype(list)::value;
    if constexpr (kList == kRowsList<Op>) {
      return rows;
    } else {
      Pack<A> pack;
      pack.load(reinterpret_cast<const A*>(at[kList]) + start, count);
      return pack;
    }
  };
  const auto store = [&](auto list, const auto& value) __attribute__((always_inline)) {
    using L = typename ListAt<decltype(list)::value, typename Op::lists>::type;
    if constexpr (L::storage == Storage::State && L::access != Access::Read) {
      value.store(reinterpret_cast<A*>(at[decltype(list)::value]) + start, count);
    }
  };
  const auto run = [&](auto&&... value) __attribute__((always_inline)) {
    op(value...);
    (store(std::integral_constant<size_t, K>{}, value), ...);
  };
  run(load(std::integral_constant<size_t, K>{})...);
}

// False, with nothing done, where there are too many rows for the stage.
template <class Op, class A, class Pointers>
CLEXT_HOST_DEVICE bool apply_packs(const Op& op, const Pointers& at, int64_t row_stride,
                                   int64_t n) {
  static_assert(Op::reduction == Reduction::None);
  constexpr auto kLists = std::make_index_sequence<Op::lists::count>{};
  const int64_t row_count = op.outputs;
  const int64_t packs =
      std::min(kMaxStagedPacks, kStageBytes / kPackBytes / std::max<int64_t>(row_count, 1));
  if (packs == 0) return false;
  alignas(kPackBytes) A stage[kStageBytes / sizeof(A)];
  const int64_t block = packs * Pack<A>::kSize;
  const A* rows = reinterpret_cast<const A*>(at[kRowsList<Op>]);
  for (int64_t start = 0; start < n; start += block) {
    const int64_t size = std::min(block, n - start);
    stage_rows(stage, block, rows + start, row_stride, row_count, size, block);
    for (int64_t i = 0; i < size; i += Pack<A>::kSize) {
      prefetch_rows(rows + start + block + i, row_stride, row_count);
      const Rows<Pack<A>> column = {reinterpret_cast<const Pack<A>*>(stage + i), packs};
      apply_pack<Op, A>(op, at, column, start + i, std::min(Pack<A>::kSize, size - i), kLists);
    }
  }
  return true;
}

// Elements of a block that takes the rows one by one: the longer the pieces of a row, the better
// the processor foresees them. The second-level cache holds the block meanwhile.
static constexpr int64_t kRowBlock = 16 * 1024;

template <class Op, class A>
CLEXT_HOST_DEVICE void add_row(const Op& op, A* values, const A* row, int64_t size, double weight) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) op(values[i], row[i], weight);
}

// Functors that take the rows one by one (row_by_row), lists: what it updates, and the rows. Each
// row is read in one go for a block of elements.
template <class Op, class T>
CLEXT_HOST_DEVICE void apply_row_by_row(const Op& op, const ChunkPointers& at, int64_t row_stride,
                                        int64_t n) {
  static_assert(Op::lists::count == 2 && kRowsList<Op> == 1 && Op::reduction == Reduction::None);
  using Values = Stream<typename ListAt<0, typename Op::lists>::type, T>;
  using A = accumulate_t<T>;
  constexpr bool in_place = std::is_same_v<typename Values::Element, A>;
  alignas(kPackBytes) A converted[in_place ? 1 : kRowBlock];
  for (int64_t start = 0; start < n; start += kRowBlock) {
    const int64_t size = std::min(kRowBlock, n - start);
    A* values = in_place ? reinterpret_cast<A*>(at[0]) + start : converted;
    if constexpr (!in_place) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) values[i] = Values::load(at[0], 0, start + i);
    }
    const A* row = reinterpret_cast<const A*>(at[1]) + start;
    for (int64_t k = 0; k < op.outputs; ++k, row += row_stride) {
      if (op.weights[k] != 0) add_row(op, values, row, size, op.weights[k]);
    }
    if constexpr (!in_place) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) Values::store(at[0], start + i, values[i]);
    }
  }
}

}  // namespace cpu
}  // namespace clext
