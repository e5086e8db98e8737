#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace clext {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so not once more by whoever looks next
  throw std::runtime_error(std::string("clext: a CUDA kernel was not launched (") + what +
                           "): " + cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace clext
