// The second pass of a reduction: one block folds the partial results of all chunks.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/block_reduce.cuh"
#include "cuda/launch_kernel.cuh"
#include "launch.h"

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

}  // namespace cuda

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
