// The op of sample_products.h: checks, offsets and launch. Its schema is in ops.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <string_view>
#include <utility>
#include <vector>

#include "cpu/sample_products.h"
#include "math/importance.h"
#include "torch/ops.h"

namespace clext {

namespace {

// Before its entries, an operand has samples and groups.
constexpr int64_t kFirstEntryDim = 2;

// What is summed of each entry of a sample's product.
constexpr std::string_view kSquare = "square";
constexpr std::string_view kAbsolute = "absolute";
constexpr std::string_view kIdentity = "identity";

void check_per_sample(const at::Tensor& features, const at::Tensor& grads,
                      std::string_view function) {
  TORCH_CHECK_VALUE(function == kSquare || function == kAbsolute || function == kIdentity,
                    "per_sample_sum: function is '", function, "', expected '", kSquare, "', '",
                    kAbsolute, "' or '", kIdentity, "'");
  TORCH_CHECK_VALUE(grads.dim() > kFirstEntryDim, "per_sample_sum: grads has shape ", grads.sizes(),
                    ", expected [samples, groups, outputs, *rows]");
  for (const auto& [name, entry] : {std::pair{"features", features}, std::pair{"grads", grads}}) {
    TORCH_CHECK_TYPE(entry.scalar_type() == at::kFloat || entry.scalar_type() == at::kDouble,
                     "per_sample_sum: ", name, " has dtype ",
                     c10::getDtypeNames(entry.scalar_type()).first,
                     ", expected float32 or float64");
    TORCH_CHECK_TYPE(entry.layout() == at::kStrided, "per_sample_sum: ", name, " has layout ",
                     entry.layout(), ", expected a dense tensor");
  }
  TORCH_CHECK_TYPE(features.scalar_type() == grads.scalar_type(), "per_sample_sum: features has ",
                   "dtype ", c10::getDtypeNames(features.scalar_type()).first, ", expected ",
                   c10::getDtypeNames(grads.scalar_type()).first, " (that of grads)");
  TORCH_CHECK_VALUE(features.device() == grads.device(), "per_sample_sum: features is on ",
                    features.device(), ", expected ", grads.device(), " (the device of grads)");
  const at::IntArrayRef rows = grads.sizes().slice(kFirstEntryDim + 1);
  const auto row_dims = static_cast<int64_t>(rows.size());
  const bool fits =
      features.dim() >= kFirstEntryDim + row_dims &&
      features.sizes().slice(0, kFirstEntryDim) == grads.sizes().slice(0, kFirstEntryDim) &&
      features.sizes().slice(features.dim() - row_dims) == rows;
  TORCH_CHECK_VALUE(fits, "per_sample_sum: features has shape ", features.sizes(),
                    ", expected [samples, groups, *inputs, *rows] with the samples, groups and ",
                    "rows of grads, which has shape ", grads.sizes());
}

// Where the elements of dimensions `begin` to `end` are, in their order.
std::vector<int64_t> offsets(const at::Tensor& tensor, int64_t begin, int64_t end) {
  std::vector<int64_t> found = {0};
  for (int64_t dim = begin; dim < end; ++dim) {
    std::vector<int64_t> next;
    next.reserve(found.size() * static_cast<size_t>(tensor.size(dim)));
    for (const int64_t start : found) {
      for (int64_t i = 0; i < tensor.size(dim); ++i) next.push_back(start + i * tensor.stride(dim));
    }
    found = std::move(next);
  }
  return found;
}

template <class A>
PerSampleOperand<A> operand(const at::Tensor& tensor, int64_t row_dims) {
  const int64_t rows = tensor.dim() - row_dims;
  return {tensor.const_data_ptr<A>(), tensor.stride(0), tensor.stride(1),
          offsets(tensor, kFirstEntryDim, rows), offsets(tensor, rows, tensor.dim())};
}

// Whether the vectors had better run along the features: what has no whole vectors is copied.
template <class A>
bool change_places(const PerSampleOperand<A>& features, const PerSampleOperand<A>& grads) {
  if (grads.has_whole_vectors()) return false;
  return features.has_whole_vectors() || features.entries.size() < grads.entries.size();
}

template <class A>
at::Tensor run_per_sample(const at::Tensor& features, const at::Tensor& grads,
                          std::string_view function) {
  const int64_t row_dims = grads.dim() - kFirstEntryDim - 1;
  PerSampleProducts<A> products = {grads.size(0), grads.size(1), operand<A>(features, row_dims),
                                   operand<A>(grads, row_dims)};
  const bool changed = change_places(products.features, products.grads);
  if (changed) std::swap(products.features, products.grads);
  at::Tensor sums =
      at::empty({products.groups, static_cast<int64_t>(products.features.entries.size()),
                 static_cast<int64_t>(products.grads.entries.size())},
                grads.options());
  // Inside a parallel region of somebody else's there are no threads to take.
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  A* to = sums.mutable_data_ptr<A>();
  if (function == kSquare) {
    per_sample_sum_cpu(products, AccumulateSquare{1}, to, threads);
  } else if (function == kAbsolute) {
    per_sample_sum_cpu(products, AccumulateAbs{1}, to, threads);
  } else {
    per_sample_sum_cpu(products, AccumulateSum{1}, to, threads);
  }
  return changed ? sums.transpose(1, 2).contiguous() : sums;
}

}  // namespace

at::Tensor per_sample_sum(const at::Tensor& features, const at::Tensor& grads,
                          std::string_view function) {
  check_per_sample(features, grads, function);
  return grads.scalar_type() == at::kDouble ? run_per_sample<double>(features, grads, function)
                                            : run_per_sample<float>(features, grads, function);
}

}  // namespace clext
