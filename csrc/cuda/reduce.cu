// The second pass of a reduction: one block folds the partial results of all chunks.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/block_reduce.cuh"
#include "cuda/launch_kernel.cuh"
#include "cuda/pair_tiles.h"
#include "launch.h"
#include "math/pairs.h"

namespace clext {
namespace cuda {

static constexpr int kReduceThreads = 512;

// Thread t takes partial results t, t + 512, ... in ascending order, then the block folds its
// threads: the order depends on nothing but `count`.
template <Reduction R, class Out>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials_kernel(const double* partials, int64_t count, Out* out) {
  double result = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kReduceThreads) {
    result = fold<R>(result, partials[i]);
  }
  result = block_reduce<R, kReduceThreads>(result);
  if (threadIdx.x == 0) *out = static_cast<Out>(result);
}

template <Reduction R, class Out>
void launch_reduce(const double* partials, int64_t count, void* out, void* stream) {
  Out* typed_out = static_cast<Out*>(out);
  launch_kernel(&reduce_partials_kernel<R, Out>, 1, kReduceThreads,
                static_cast<cudaStream_t>(stream), "reduce_partials_cuda", partials, count,
                typed_out);
}

// One block for each pair (i, j), whose partial results are `pairs` apart.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_pairs_kernel(const double* partials, int64_t count, int64_t values, double* out) {
  const int64_t pair = blockIdx.x;
  const int64_t pairs = pair_count(values);
  double result = 0;
#pragma unroll 8
  for (int64_t i = pair + pairs * threadIdx.x; i < count; i += pairs * kReduceThreads) {
    result += partials[i];
  }
  result = block_reduce<Reduction::Sum, kReduceThreads>(result);
  if (threadIdx.x == 0) {
    int64_t row = 0;
    while (pair_index(row + 1, 0) <= pair) ++row;
    const int64_t column = pair - pair_index(row, 0);
    out[row * values + column] = result;
    out[column * values + row] = result;
  }
}

}  // namespace cuda

int64_t pair_partials_cuda(int64_t values) { return cuda::pair_partials(values); }

void reduce_pairs_cuda(const double* partials, int64_t count, int64_t values, double* out,
                       void* stream) {
  cuda::launch_kernel(&cuda::reduce_pairs_kernel, pair_count(values), cuda::kReduceThreads,
                      static_cast<cudaStream_t>(stream), "reduce_pairs_cuda", partials, count,
                      values, out);
}

void reduce_partials_cuda(const double* partials, int64_t count, Reduction reduction, void* out,
                          StorageType type, void* stream) {
  const bool is_double = type == StorageType::Float64;
  if (reduction == Reduction::None || (!is_double && type != StorageType::Float32)) {
    throw std::invalid_argument(
        "clext: reduce_partials_cuda takes Sum or Max and writes float32 or float64");
  }
  if (reduction == Reduction::Sum) {
    is_double ? cuda::launch_reduce<Reduction::Sum, double>(partials, count, out, stream)
              : cuda::launch_reduce<Reduction::Sum, float>(partials, count, out, stream);
  } else {
    is_double ? cuda::launch_reduce<Reduction::Max, double>(partials, count, out, stream)
              : cuda::launch_reduce<Reduction::Max, float>(partials, count, out, stream);
  }
}

}  // namespace clext
