// Several neighbouring elements as one number, so that a formula with loops of its own (over the
// rows of a Jacobian) is computed for a whole vector register at a time. The same operations in the
// same order as for a single element, hence the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/element.h"

namespace clext {
namespace cpu {

static constexpr int64_t kPackBytes = 64;

template <class T, int64_t Bytes = kPackBytes>
struct Pack {
  // Split by the compiler where the registers are narrower.
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr int64_t kSize = Bytes / static_cast<int64_t>(sizeof(T));

  Vector vector;

  CLEXT_HOST_DEVICE Pack() : vector{} {}
  CLEXT_HOST_DEVICE explicit Pack(double value) : vector(Vector{} + static_cast<T>(value)) {}

  CLEXT_HOST_DEVICE void load(const T* from, int64_t count) {
    if (count == kSize) {
      memcpy(&vector, from, Bytes);
    } else {
      memcpy(&vector, from, static_cast<size_t>(count) * sizeof(T));
    }
  }

  CLEXT_HOST_DEVICE void store(T* to, int64_t count) const {
    if (count == kSize) {
      memcpy(to, &vector, Bytes);
    } else {
      memcpy(to, &vector, static_cast<size_t>(count) * sizeof(T));
    }
  }

  CLEXT_HOST_DEVICE Pack& operator+=(const Pack& other) {
    vector += other.vector;
    return *this;
  }
};

// By reference throughout: such wide values are passed in other ways by other instruction sets.

template <class T, int64_t Bytes>
CLEXT_HOST_DEVICE Pack<T, Bytes> operator+(const Pack<T, Bytes>& a, const Pack<T, Bytes>& b) {
  Pack<T, Bytes> result;
  result.vector = a.vector + b.vector;
  return result;
}

template <class T, int64_t Bytes>
CLEXT_HOST_DEVICE Pack<T, Bytes> operator*(const Pack<T, Bytes>& a, const Pack<T, Bytes>& b) {
  Pack<T, Bytes> result;
  result.vector = a.vector * b.vector;
  return result;
}

template <class T, int64_t Bytes>
CLEXT_HOST_DEVICE Pack<T, Bytes> operator*(T a, const Pack<T, Bytes>& b) {
  Pack<T, Bytes> result;
  result.vector = a * b.vector;
  return result;
}

template <class T, int64_t Bytes>
CLEXT_HOST_DEVICE Pack<T, Bytes> absolute(const Pack<T, Bytes>& a) {
  Pack<T, Bytes> result;
  result.vector = a.vector < T(0) ? -a.vector : a.vector;
  return result;
}

template <class T, int64_t Bytes>
CLEXT_HOST_DEVICE Pack<T, Bytes> positive_part(const Pack<T, Bytes>& a) {
  Pack<T, Bytes> result;
  result.vector = a.vector < T(0) ? typename Pack<T, Bytes>::Vector{} : a.vector;
  return result;
}

}  // namespace cpu

template <class T, int64_t Bytes>
struct ScalarOf<cpu::Pack<T, Bytes>> {
  using type = T;
};

}  // namespace clext
