// From checked arguments to a launch: picks the device, the stream and the number of threads, and
// turns partial results into a 0-dim tensor. Shared by the ops and by ParameterPlan.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>

#include <optional>

#if defined(CLEXT_WITH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

#include "check.h"
#include "launch.h"

namespace clext {

#if defined(CLEXT_WITH_CUDA)
template <class Op>
void run_cuda(const Prepared& prepared, const Op& op, at::Tensor& result) {
  const c10::DeviceGuard guard(*prepared.device);
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto options = at::TensorOptions().device(*prepared.device);
  at::Tensor partials;
  double* next = nullptr;
  if constexpr (Op::reduction != Reduction::None) {
    partials = at::empty({prepared.chunk_count()}, options.dtype(at::kDouble));
    next = partials.mutable_data_ptr<double>();
    result = at::empty({}, options.dtype(result.scalar_type()));
  }
  for (const TensorLists& group : prepared.groups) {
    apply_cuda(group, op, next, stream);
    if (next != nullptr) next += group.chunks.size();
  }
  if constexpr (Op::reduction != Reduction::None) {
    const bool is_double = result.scalar_type() == at::kDouble;
    reduce_partials_cuda(partials.const_data_ptr<double>(), prepared.chunk_count(), Op::reduction,
                         result.mutable_data_ptr(),
                         is_double ? StorageType::Float64 : StorageType::Float32, stream);
  }
}
#endif

template <class Op>
void run_cpu(const Prepared& prepared, const Op& op, at::Tensor& result) {
  // Inside a parallel region of somebody else's there are no threads to take.
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  c10::SmallVector<double, 512> partials;
  if constexpr (Op::reduction != Reduction::None) {
    partials.resize(static_cast<size_t>(prepared.chunk_count()));
  }
  double* next = partials.data();
  for (const TensorLists& group : prepared.groups) {
    apply_cpu(group, op, next, threads);
    if constexpr (Op::reduction != Reduction::None) next += group.chunks.size();
  }
  if constexpr (Op::reduction != Reduction::None) {
    const bool is_double = result.scalar_type() == at::kDouble;
    reduce_partials_cpu(partials.data(), prepared.chunk_count(), Op::reduction,
                        result.mutable_data_ptr(),
                        is_double ? StorageType::Float64 : StorageType::Float32);
  }
}

// Runs `op` over the lists. With a reduction the result is a 0-dim tensor on their device, of
// `dtype` or else of the state's dtype; without one it is undefined.
template <class Op>
at::Tensor run(const Prepared& prepared, const Op& op,
               std::optional<at::ScalarType> dtype = std::nullopt) {
  at::Tensor result;
  if constexpr (Op::reduction != Reduction::None) {
    // Past the dispatcher, which costs more than the arithmetic of a small model.
    result = at::detail::empty_cpu({}, dtype.value_or(prepared.state_dtype));
  }
#if defined(CLEXT_WITH_CUDA)
  if (prepared.device && prepared.device->is_cuda()) {
    run_cuda(prepared, op, result);
    return result;
  }
#endif
  run_cpu(prepared, op, result);
  return result;
}

}  // namespace clext
