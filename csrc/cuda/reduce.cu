// The second pass of a reduction: one block folds the partial results of all chunks.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/block_reduce.cuh"
#include "cuda/check.cuh"
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

template <Reduction R>
void launch_reduce(const double* partials, int64_t count, void* out, StorageType type,
                   cudaStream_t stream) {
  if (type == StorageType::Float64) {
    reduce_partials_kernel<R>
        <<<1, kReduceThreads, 0, stream>>>(partials, count, static_cast<double*>(out));
  } else if (type == StorageType::Float32) {
    reduce_partials_kernel<R>
        <<<1, kReduceThreads, 0, stream>>>(partials, count, static_cast<float*>(out));
  } else {
    throw std::invalid_argument("clext: reduce_partials_cuda writes float32 or float64");
  }
  check(cudaGetLastError(), "reduce_partials_cuda");
}

}  // namespace cuda

void reduce_partials_cuda(const double* partials, int64_t count, Reduction reduction, void* out,
                          StorageType type, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (reduction) {
    case Reduction::Sum:
      return cuda::launch_reduce<Reduction::Sum>(partials, count, out, type, cuda_stream);
    case Reduction::Max:
      return cuda::launch_reduce<Reduction::Max>(partials, count, out, type, cuda_stream);
    case Reduction::None:
      break;
  }
  throw std::invalid_argument("clext: reduce_partials_cuda needs a reduction");
}

}  // namespace clext
