#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace clext {
namespace cuda {

// Queues a kernel on `stream`; `what` names it if that fails. Takes the arguments by reference:
// <<<>>> would copy a table of 32 KB once more, and would not return the error.
template <class... P>
void launch_kernel(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
                   const char* what, P&... arguments) {
  void* pointers[] = {&arguments...};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so not once more by whoever looks next
  throw std::runtime_error(std::string("clext: a CUDA kernel was not launched (") + what +
                           "): " + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace clext
