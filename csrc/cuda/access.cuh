// Moving neighbouring elements between memory and the registers of one thread, with conversion
// between their storage type and the accumulate type.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "cuda/geometry.h"
#include "math/storage.h"

namespace clext {
namespace cuda {

// How the elements of one vector are moved.
enum class Path {
  Vector,   // in 16-byte pieces
  Element,  // one by one: a tensor that does not start at a multiple of 16 bytes
  Partial,  // one by one, and only as many as are left: the end of a chunk
};

template <Path P, class E, int Width, class A>
__device__ __forceinline__ void load(const E* from, int left, A (&values)[Width]) {
  if constexpr (P == Path::Vector) {
    constexpr int kPieces = static_cast<int>(sizeof(E)) * Width / kVectorBytes;
    uint4 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const uint4*>(from)[i];
    E elements[Width];
    static_assert(sizeof(elements) == sizeof(pieces), "vectors must be whole 16-byte pieces");
    memcpy(elements, pieces, sizeof(elements));
#pragma unroll
    for (int i = 0; i < Width; ++i) values[i] = to_accumulate(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[i] = P == Path::Element || i < left ? to_accumulate(from[i]) : A(0);
    }
  }
}

template <Path P, class E, int Width, class A>
__device__ __forceinline__ void store(E* to, int left, const A (&values)[Width]) {
  if constexpr (P == Path::Vector) {
    constexpr int kPieces = static_cast<int>(sizeof(E)) * Width / kVectorBytes;
    E elements[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) elements[i] = from_accumulate<E>(values[i]);
    uint4 pieces[kPieces];
    memcpy(pieces, elements, sizeof(elements));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(to)[i] = pieces[i];
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if (P == Path::Element || i < left) to[i] = from_accumulate<E>(values[i]);
    }
  }
}

}  // namespace cuda
}  // namespace clext
