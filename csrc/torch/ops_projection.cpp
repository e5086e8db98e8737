// The ops of csrc/math/projection.h: checks and launch. Their schemas are in ops.cpp.
#include "math/projection.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include "torch/ops.h"

namespace clext {

namespace {

// A matrix of all products has to stay small beside the gradients.
constexpr int64_t kMaxGramRows = 1024;
// On a GPU, whose shared memory has no room for a warp's elements of many more.
constexpr int64_t kMaxGramRowsOfKernel = 64;

void check_row_count(const char* op, at::TensorList rows, int64_t expected, const char* why) {
  for (size_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK_VALUE(rows[i].size(0) == expected, op, ": rows[", i, "] has ", rows[i].size(0),
                      " rows, expected ", expected, " (", why, ")");
  }
}

// The same by a matrix product for each tensor, in float64.
at::Tensor gram_by_products(at::TensorList rows, at::TensorList grads, int64_t count) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor gram = at::zeros({count + 1, count + 1}, rows[0].options().dtype(at::kDouble));
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t size = grads[i].numel();
    const at::Tensor all = at::cat({rows[i].reshape({count, size}).to(at::kDouble),
                                    grads[i].reshape({1, size}).to(at::kDouble)});
    gram.addmm_(all, all.t());
  }
  return gram.triu().add_(gram.triu(1).t());
}

}  // namespace

at::Tensor gradient_gram(at::TensorList rows, at::TensorList grads) {
  const Prepared prepared = check_lists<GradientGram>({rows, grads});
  const int64_t count = rows.empty() ? 0 : rows[0].size(0);
  check_row_count("gradient_gram", rows, count, "as many as rows[0]");
  TORCH_CHECK_VALUE(count <= kMaxGramRows, "gradient_gram: rows[0] has ", count,
                    " rows, expected at most ", kMaxGramRows);
  if (count > kMaxGramRowsOfKernel && rows[0].is_cuda()) {
    return gram_by_products(rows, grads, count);
  }
  return run(prepared, GradientGram{count}, at::kDouble);
}

void project_gradient_(at::TensorList grads, at::TensorList rows, const at::Tensor& weights) {
  TORCH_CHECK_VALUE(weights.dim() == 1, "project_gradient_: weights has shape ", weights.sizes(),
                    ", expected [rows]");
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kDouble, "project_gradient_: weights has dtype ",
                   c10::getDtypeNames(weights.scalar_type()).first, ", expected float64");
  const Prepared prepared = check_lists<ProjectGradient>({grads, rows});
  check_row_count("project_gradient_", rows, weights.size(0), "the elements of weights");
  TORCH_CHECK_VALUE(!prepared.device || weights.device() == *prepared.device,
                    "project_gradient_: weights is on ", weights.device(), ", expected ",
                    *prepared.device);
  const at::Tensor numbers = weights.contiguous();
  run(prepared, ProjectGradient{numbers.const_data_ptr<double>(), weights.size(0)});
  mark_changed<ProjectGradient>({grads, rows});
}

}  // namespace clext
