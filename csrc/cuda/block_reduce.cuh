// Folding the values of a block, always in the same order.
#pragma once

#include "math/element.h"

namespace clext {
namespace cuda {

static constexpr int kWarp = 32;
static constexpr unsigned kFullWarp = 0xffffffffu;

// Zero is neutral for both: what is maximised here (importances, scores) is never negative.
template <Reduction R, class A>
__device__ __forceinline__ A fold(A a, A b) {
  if constexpr (R == Reduction::Max) {
    return maximum(a, b);
  } else {
    return a + b;
  }
}

template <Reduction R, int Lanes>
__device__ __forceinline__ double fold_lanes(double value) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) {
    value = fold<R>(value, __shfl_down_sync(kFullWarp, value, distance));
  }
  return value;
}

// Folds one value per thread; the result is thread 0's. Every thread of the block must call it, and
// only once per kernel: nothing guards the shared memory against a second call.
template <Reduction R, int Threads>
__device__ __forceinline__ double block_reduce(double value) {
  constexpr int kWarps = Threads / kWarp;
  static_assert(Threads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0,
                "a block is a power of two of whole warps, and one warp can fold their results");
  __shared__ double warp_results[kWarps];
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned warp = threadIdx.x / kWarp;

  value = fold_lanes<R, kWarp>(value);
  if (lane == 0) warp_results[warp] = value;
  __syncthreads();
  if (warp == 0) value = fold_lanes<R, kWarps>(lane < kWarps ? warp_results[lane] : 0.0);
  return value;
}

}  // namespace cuda
}  // namespace clext
