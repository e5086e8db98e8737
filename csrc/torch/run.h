// From checked arguments to a launch: picks the device, the stream and the number of threads, and
// turns partial results into a tensor. Shared by the ops and by ParameterPlan.
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

#include "launch.h"
#include "torch/check.h"

namespace clext {

// What a reduction gives: a matrix of all pairs, or else a number.
template <class Op>
c10::SmallVector<int64_t, 2> result_shape(const Op& op) {
  if constexpr (Op::reduction == Reduction::Pairs) return {op.outputs + 1, op.outputs + 1};
  return {};
}

#if defined(CLEXT_WITH_CUDA)
template <class Op>
int64_t partials_per_chunk_cuda(const Op& op) {
  if constexpr (Op::reduction == Reduction::Pairs) return pair_partials_cuda(op.outputs + 1);
  return 1;
}

template <class Op>
void run_cuda(const Prepared& prepared, const Op& op, at::Tensor& result) {
  const c10::DeviceGuard guard(*prepared.device);
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto options = at::TensorOptions().device(*prepared.device);
  const int64_t per_chunk = partials_per_chunk_cuda(op);
  const int64_t count = prepared.chunk_count() * per_chunk;
  at::Tensor partials;
  double* next = nullptr;
  if constexpr (Op::reduction != Reduction::None) {
    partials = at::empty({count}, options.dtype(at::kDouble));
    next = partials.mutable_data_ptr<double>();
    result = at::empty(result_shape(op), options.dtype(result.scalar_type()));
  }
  for (const TensorLists& group : prepared.groups) {
    apply_cuda(group, op, next, stream);
    if (next != nullptr) next += static_cast<int64_t>(group.chunks.size()) * per_chunk;
  }
  if constexpr (Op::reduction == Reduction::Pairs) {
    reduce_pairs_cuda(partials.const_data_ptr<double>(), count, op.outputs + 1,
                      result.mutable_data_ptr<double>(), stream);
  } else if constexpr (Op::reduction != Reduction::None) {
    const bool is_double = result.scalar_type() == at::kDouble;
    reduce_partials_cuda(partials.const_data_ptr<double>(), count, Op::reduction,
                         result.mutable_data_ptr(),
                         is_double ? StorageType::Float64 : StorageType::Float32, stream);
  }
}
#endif

template <class Op>
int64_t partials_per_chunk_cpu(const Op& op) {
  if constexpr (Op::reduction == Reduction::Pairs) return pair_partials_cpu(op.outputs + 1);
  return 1;
}

template <class Op>
void run_cpu(const Prepared& prepared, const Op& op, at::Tensor& result) {
  // Inside a parallel region of somebody else's there are no threads to take.
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t per_chunk = partials_per_chunk_cpu(op);
  const int64_t count = prepared.chunk_count() * per_chunk;
  c10::SmallVector<double, 512> partials;
  if constexpr (Op::reduction != Reduction::None) partials.resize(static_cast<size_t>(count));
  double* next = partials.data();
  for (const TensorLists& group : prepared.groups) {
    apply_cpu(group, op, next, threads);
    if constexpr (Op::reduction != Reduction::None) {
      next += static_cast<int64_t>(group.chunks.size()) * per_chunk;
    }
  }
  if constexpr (Op::reduction == Reduction::Pairs) {
    reduce_pairs_cpu(partials.data(), count, op.outputs + 1, result.mutable_data_ptr<double>());
  } else if constexpr (Op::reduction != Reduction::None) {
    const bool is_double = result.scalar_type() == at::kDouble;
    reduce_partials_cpu(partials.data(), count, Op::reduction, result.mutable_data_ptr(),
                        is_double ? StorageType::Float64 : StorageType::Float32);
  }
}

// Runs `op` over the lists. With a reduction the result is a tensor on their device, 0-dim or (of
// pairs) a float64 matrix, of `dtype` or else of the state's dtype; without one it is undefined.
template <class Op>
at::Tensor run(const Prepared& prepared, const Op& op,
               std::optional<at::ScalarType> dtype = std::nullopt) {
  at::Tensor result;
  if constexpr (Op::reduction != Reduction::None) {
    // Past the dispatcher, which costs more than the arithmetic of a small model.
    result = at::detail::empty_cpu(result_shape(op), dtype.value_or(prepared.state_dtype));
  }
#if defined(CLEXT_WITH_CUDA)
  if (prepared.device && prepared.device->is_cuda()) {
    run_cuda(prepared, op, result);
    return result;
  }
#else
  // A plan whose parameters were moved away after it was made.
  TORCH_CHECK_VALUE(!prepared.device || prepared.device->is_cpu(), "clext: the tensors are on ",
                    *prepared.device, ", which this build of clext has no kernels for");
#endif
  run_cpu(prepared, op, result);
  return result;
}

}  // namespace clext
