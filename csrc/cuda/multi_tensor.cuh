// The CUDA driver: runs one functor of csrc/math over lists of tensors.
//
// It owns everything that a formula should not know: launches (packing.h), which thread works on
// which elements (geometry.h, chunk_view.cuh), 16-byte accesses, tails and conversions
// (access.cuh), and the fixed-order reduction (block_reduce.cuh; pairs.cuh for pairs of rows). A
// family file (penalty.cu, path.cu, ...) only instantiates apply_cuda for its functors.
//
// Same bits every time: a block computes one chunk, a thread adds up its elements in ascending
// order, block_reduce folds the threads as a fixed tree, and the result is stored at the chunk's
// index. No atomics; the order depends neither on the packing nor on the alignment of a tensor.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/access.cuh"
#include "cuda/block_reduce.cuh"
#include "cuda/chunk_view.cuh"
#include "cuda/geometry.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/packing.h"
#include "cuda/pairs.cuh"
#include "launch.h"
#include "math/element.h"
#include "math/storage.h"
#include "storage_dispatch.h"
#include "tensor_lists.h"

namespace clext {
namespace cuda {

static_assert(CUDART_VERSION >= 12010, "clext needs CUDA 12.1 or newer (32 KB kernel parameters)");

// The rows of a vector of elements, for functors that take them one by one: the loads of some rows
// together, those of weight 0 left out by predicate.
template <Path P, class Op, class T>
__device__ __forceinline__ void apply_rows(const Op& op, const ChunkView<Op, T>& chunk,
                                           int64_t first, int left,
                                           accumulate_t<T> (&values)[Geometry<Op, T>::kWidth]) {
  using G = Geometry<Op, T>;
  static_assert(G::kElementLists == 2 && G::template kIsStored<0> && G::template kIsRows<1>);
  const auto* rows = chunk.template at<1>(first);
#pragma unroll 1
  for (int64_t start = 0; start < op.outputs; start += G::kRowsAtOnce) {
    double weights[G::kRowsAtOnce];
    accumulate_t<T> entries[G::kRowsAtOnce][G::kWidth];
#pragma unroll
    for (int r = 0; r < G::kRowsAtOnce; ++r) {
      const int64_t last = op.outputs - 1;
      const double weight = op.weights[start + r < last ? start + r : last];
      weights[r] = start + r <= last ? weight : 0;
    }
#pragma unroll
    for (int r = 0; r < G::kRowsAtOnce; ++r) {
      if (weights[r] != 0) load<P>(rows + (start + r) * chunk.row_stride, left, entries[r]);
    }
#pragma unroll
    for (int r = 0; r < G::kRowsAtOnce; ++r) {
#pragma unroll
      for (int i = 0; i < G::kWidth; ++i) {
        const bool taken = weights[r] != 0 && (P != Path::Partial || i < left);
        if (taken) op(values[i], entries[r][i], weights[r]);
      }
    }
  }
}

// A thread's `Vectors` vectors from element `first` on: all loads, then all arithmetic, then all
// stores, so that the loads are in flight together.
template <Path P, int Vectors, class Op, class T, int... K>
__device__ __forceinline__ void process(const Op& op, const ChunkView<Op, T>& chunk, int64_t first,
                                        int left, accumulate_t<T>& result,
                                        std::integer_sequence<int, K...>) {
  using G = Geometry<Op, T>;
  accumulate_t<T> values[Vectors][G::kElementLists][G::kWidth];
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    (chunk.template load_list<P, K>(first + v * G::kVectorStride, left, values[v][K]), ...);
  }
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    if constexpr (G::kIsRowByRow) {
      apply_rows<P>(op, chunk, first + v * G::kVectorStride, left, values[v][0]);
    } else {
#pragma unroll
      for (int i = 0; i < G::kWidth; ++i) {
        if (P == Path::Partial && i >= left) continue;
        const int64_t element = first + v * G::kVectorStride + i;
        if constexpr (Op::reduction == Reduction::None) {
          evaluate<parameter_t<T>>(op, argument<K>(chunk, element, values[v], i)...);
        } else {
          result = fold<Op::reduction>(
              result, evaluate<parameter_t<T>>(op, argument<K>(chunk, element, values[v], i)...));
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    (chunk.template store_list<P, K>(first + v * G::kVectorStride, left, values[v][K]), ...);
    (chunk.template clear_list<P, K>(first + v * G::kVectorStride, left, op), ...);
  }
}

template <Path P, class Op, class T>
__device__ __forceinline__ void process_tiles(const Op& op, const ChunkView<Op, T>& chunk,
                                              int64_t whole_tiles, int thread,
                                              accumulate_t<T>& result) {
  using G = Geometry<Op, T>;
#pragma unroll 1
  for (int64_t tile = 0; tile < whole_tiles; ++tile) {
    process<P, G::kVectors>(op, chunk, G::first_element(tile, 0, thread), G::kWidth, result,
                            typename G::Indices{});
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads, Geometry<Op, T>::kBlocks)
    apply_kernel(const __grid_constant__ LaunchTable<Op::lists::count> table, Op op,
                 double* partials) {
  using G = Geometry<Op, T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t block = static_cast<int32_t>(blockIdx.x);

  prepare(op);
  if (is_skipped(op)) {
    if (Op::reduction != Reduction::None && thread == 0) partials[block] = 0;
    return;
  }
  ChunkView<Op, T> chunk;
  chunk.init(table, block, typename G::Indices{});
  if constexpr (kHasScalars<Op>) {
    op.prepare_tensor(static_cast<const accumulate_t<T>*>(chunk.scalars));
  }
  const int64_t whole_tiles = chunk.size / G::kTile;
  accumulate_t<T> result = 0;
  if constexpr (G::kWidth == 1) {
    process_tiles<Path::Element>(op, chunk, whole_tiles, thread, result);
  } else if (chunk.is_aligned()) {
    process_tiles<Path::Vector>(op, chunk, whole_tiles, thread, result);
  } else {
    process_tiles<Path::Element>(op, chunk, whole_tiles, thread, result);
  }
#pragma unroll 1
  for (int v = 0; v < G::kVectors; ++v) {
    const int64_t first = G::first_element(whole_tiles, v, thread);
    const int left = G::elements_left(chunk.size, first);
    if (left > 0) {
      process<Path::Partial, 1>(op, chunk, first, left, result, typename G::Indices{});
    }
  }

  if constexpr (Op::reduction != Reduction::None) {
    const double total = block_reduce<Op::reduction, kThreads>(static_cast<double>(result));
    if (thread == 0) partials[block] = total;
  }
}

template <class Op, class T>
constexpr auto kernel_of() {
  if constexpr (Op::reduction == Reduction::Pairs) {
    return &pairs_kernel<Op, T>;
  } else {
    return &apply_kernel<Op, T>;
  }
}

template <class Op, class T>
void launch(const TensorLists& lists, Op op, double* partials, cudaStream_t stream,
            const char* name) {
  using Table = LaunchTable<Op::lists::count>;
  static_assert(sizeof(Table) + sizeof(Op) + sizeof(double*) + 16 <= kParameterBytes,
                "table, functor and pointer must fit in the kernel parameters");
  static_assert(std::is_trivially_copyable_v<Op>, "a functor is copied to the device as bytes");
  if (lists.list_count != Op::lists::count ||
      (Geometry<Op, T>::kHasRows && lists.row_strides.size() != lists.sizes.size())) {
    throw std::logic_error(std::string("clext: the lists do not fit the functor of ") + name);
  }
  int64_t per_chunk = 1;
  if constexpr (Op::reduction == Reduction::Pairs) per_chunk = pair_partials(op.outputs + 1);
  Table table;  // 32 KB of which only the entries in use are written
  const auto chunk_count = static_cast<int64_t>(lists.chunks.size());
  for (int64_t first = 0; first < chunk_count;) {
    const int64_t next = pack(lists, first, table);
    double* results = Op::reduction == Reduction::None ? nullptr : partials + first * per_chunk;
    launch_kernel(kernel_of<Op, T>(), next - first, kThreads, stream, name, table, op, results);
    first = next;
  }
}

}  // namespace cuda

template <class Op>
void apply_cuda(const TensorLists& lists, const Op& op, double* partials, void* stream) {
  const char* name = __PRETTY_FUNCTION__;
  with_storage<Op>(lists, [&](auto storage) {
    using T = decltype(storage);
    // A functor over state alone sees only the accumulate type: no kernel per storage type.
    using Seen = std::conditional_t<kHasList<Storage::Parameter, Op>, T, accumulate_t<T>>;
    cuda::launch<Op, Seen>(lists, op, partials, static_cast<cudaStream_t>(stream), name);
  });
}

}  // namespace clext
