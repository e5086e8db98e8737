// The kernel of functors with a result for each pair of an element's values (Reduction::Pairs): the
// rows of a chunk pass through shared memory once, a few elements at a time, and each warp forms
// all pairs of its tiles from there (pair_tiles.h).
//
// The order of additions is fixed: a lane takes its elements in ascending order, the lanes are
// folded as a tree, and the results of one stage are added to those before it by the same lane.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block_reduce.cuh"
#include "cuda/chunk_view.cuh"
#include "cuda/pair_tiles.h"

namespace clext {
namespace cuda {

// All rows of `size` elements from element `start` of the chunk on; the last row is the list
// beside them.
template <class Op, class T, class A>
__device__ __forceinline__ void stage_rows(const Op& op, const ChunkView<Op, T>& chunk, A* stage,
                                           int width, int64_t start, int size) {
  const int thread = static_cast<int>(threadIdx.x);
  const A* rows = chunk.template at<0>(start);
  for (int64_t k = 0; k < op.outputs; ++k) {
#pragma unroll 4
    for (int i = thread; i < size; i += kThreads) stage[k * width + i] = rows[i];
    rows += chunk.row_stride;
  }
  const auto* last = chunk.template at<1>(start);
#pragma unroll 4
  for (int i = thread; i < size; i += kThreads) {
    stage[op.outputs * width + i] = to_accumulate(last[i]);
  }
}

// Folds `Count` sums over the lanes of a warp: in each step a lane keeps one half of its sums and
// gives the other half away. Lane l is left with the whole of sum l / (32 / 16), in sums[0].
template <int Count, class A>
__device__ __forceinline__ void fold_sums(A (&sums)[kPairTile * kPairTile], int lane) {
  constexpr int kDistance = Count;
  if constexpr (Count > 1) {
    constexpr int kHalf = Count / 2;
    const bool upper = (lane & kDistance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A given = upper ? sums[i] : sums[i + kHalf];
      const A kept = upper ? sums[i + kHalf] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kFullWarp, given, kDistance);
    }
    fold_sums<kHalf>(sums, lane);
  } else {
    sums[0] += __shfl_xor_sync(kFullWarp, sums[0], kDistance);
  }
}

// The pairs of one tile over the elements first, first + step, ... of the stage. Rows beyond the
// last are those before it once more: nobody takes their results.
template <class Op, class A>
__device__ __forceinline__ void sum_tile(const Op& op, const A* stage, int width, int size,
                                         int first_row, int first_column, int first, int step,
                                         A (&sums)[kPairTile * kPairTile]) {
  const int last = static_cast<int>(op.outputs);
  const A* rows[kPairTile];
  const A* columns[kPairTile];
#pragma unroll
  for (int i = 0; i < kPairTile; ++i) {
    rows[i] = stage + (first_row + i < last ? first_row + i : last) * width;
    columns[i] = stage + (first_column + i < last ? first_column + i : last) * width;
  }
#pragma unroll 2
  for (int element = first; element < size; element += step) {
    A left[kPairTile];
    A right[kPairTile];
#pragma unroll
    for (int i = 0; i < kPairTile; ++i) {
      left[i] = rows[i][element];
      right[i] = columns[i][element];
    }
#pragma unroll
    for (int i = 0; i < kPairTile * kPairTile; ++i) {
      sums[i] += op(left[i / kPairTile], right[i % kPairTile]);
    }
  }
}

// All tiles of one stage; `partials` are the chunk's.
template <class Op, class A>
__device__ __forceinline__ void add_stage(const Op& op, const A* stage, int width, int size,
                                          bool is_first, double* partials) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int values = static_cast<int>(op.outputs) + 1;
  const int tiles = static_cast<int>(pair_tiles(values));
  const int slices = static_cast<int>(pair_slices(values));
  int row = 0;
  int column = 0;
  int passed = 0;  // tiles before the one at (row, column)
  for (int item = warp; item < tiles * slices; item += kPairWarps) {
    const int slice = item / tiles;
    for (; passed < item % tiles; ++passed) {
      column = column < row ? column + 1 : 0;
      if (column == 0) ++row;
    }
    A sums[kPairTile * kPairTile] = {};
    sum_tile(op, stage, width, size, row * kPairTile, column * kPairTile, slice * kWarp + lane,
             slices * kWarp, sums);
    fold_sums<kPairTile * kPairTile>(sums, lane);
    const int pair = lane / 2;
    const int i = row * kPairTile + pair / kPairTile;
    const int j = column * kPairTile + pair % kPairTile;
    if (lane % 2 == 0 && i < values && j <= i) {
      double* to = partials + slice * pair_count(values) + pair_index(i, j);
      *to = is_first ? static_cast<double>(sums[0]) : *to + static_cast<double>(sums[0]);
    }
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    pairs_kernel(const __grid_constant__ LaunchTable<Op::lists::count> table, Op op,
                 double* partials) {
  using G = Geometry<Op, T>;
  using A = accumulate_t<T>;
  static_assert(G::kLists == 2 && G::template kIsRows<0> && G::template kIsLoaded<1>);
  static_assert(kWarp == kPairWarp && kPairTile * kPairTile * 2 == kWarp);
  __shared__ A stage[kPairStageBytes / sizeof(A)];
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int64_t values = op.outputs + 1;
  ChunkView<Op, T> chunk;
  chunk.init(table, block, typename G::Indices{});
  const int width = pair_width(values, static_cast<int>(sizeof(A)));
  double* results = partials + block * pair_partials(values);
#pragma unroll 1
  for (int64_t start = 0; start < chunk.size; start += width) {
    const int64_t left = chunk.size - start;
    const int size = left < width ? static_cast<int>(left) : width;
    stage_rows(op, chunk, stage, width, start, size);
    __syncthreads();
    add_stage(op, stage, width, size, start == 0, results);
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace clext
