#include "torch/fused_step.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <type_traits>

#include "math/adam.h"
#include "math/sgd.h"
#include "torch/run.h"

namespace clext {

namespace {

// Coefficients of one tensor: two, in the state's dtype.
constexpr int64_t kCoefficients = 2;
constexpr int64_t kCoefficientBytes = kCoefficients * static_cast<int64_t>(sizeof(double));

void check_finite(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": ", name, " is ", value,
                    ", expected a finite number");
}

void check_beta(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value < 1, op, ": ", name, " is ", value,
                    ", expected a number in [0, 1)");
}

bool is_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
}

void check_number(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                  bool may_be_double = false) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->defined() && tensor->numel() == 1, op, ": ", name, " has shape ",
                    tensor->sizes(), ", expected one element");
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat || (may_be_double && is_float(*tensor)), op,
                   ": ", name, " has dtype ", c10::getDtypeNames(tensor->scalar_type()).first,
                   ", expected float32", may_be_double ? " or float64" : "");
}

const at::Tensor* tensor_of(const StepArguments& arguments) {
  return std::get_if<at::Tensor>(&arguments.lr);
}

DeviceScalar read_rate(const StepArguments& arguments) {
  const at::Tensor* tensor = tensor_of(arguments);
  if (tensor == nullptr) return {nullptr, false, std::get<double>(arguments.lr)};
  if (tensor->is_cpu()) return {nullptr, false, tensor->item<double>()};
  return {tensor->const_data_ptr(), tensor->scalar_type() == at::kDouble, 0};
}

void check_rate(const char* op, const StepArguments& arguments) {
  if (const at::Tensor* tensor = tensor_of(arguments)) {
    TORCH_CHECK_VALUE(tensor->dim() == 0, op, ": lr has shape ", tensor->sizes(),
                      ", expected a 0-dim tensor");
    TORCH_CHECK_TYPE(is_float(*tensor), op, ": lr has dtype ",
                     c10::getDtypeNames(tensor->scalar_type()).first,
                     ", expected float32 or float64");
  }
  // A rate on another device stays there: looking at it would stall the stream.
  check_scalar(op, "lr", read_rate(arguments).value);
}

void check_common(const char* op, const StepArguments& arguments) {
  check_rate(op, arguments);
  check_scalar(op, "weight_decay", arguments.weight_decay);
  check_scalar(op, "strength", arguments.strength);
  check_fraction(op, "decay", arguments.decay);
  check_number(op, "grad_scale", arguments.grad_scale);
  check_number(op, "found_inf", arguments.found_inf);
  check_number(op, "clip", arguments.clip, /*may_be_double=*/true);
}

StepOptions options_of(const StepArguments& arguments, bool decoupled) {
  StepOptions options;
  options.lr = read_rate(arguments);
  if (arguments.grad_scale) options.grad_scale = arguments.grad_scale->const_data_ptr<float>();
  if (arguments.found_inf) options.found_inf = arguments.found_inf->const_data_ptr<float>();
  if (arguments.clip) {
    options.clip = {arguments.clip->const_data_ptr(), arguments.clip->scalar_type() == at::kDouble};
  }
  options.weight_decay = arguments.weight_decay;
  options.decoupled = decoupled;
  options.maximize = arguments.maximize;
  options.strength = arguments.strength;
  options.decay = arguments.decay;
  options.proximal = arguments.proximal;
  options.clear = arguments.clear_grad;
  return options;
}

// Calls `function` with the protection as a compile-time constant.
template <class F>
auto with_protection(Protection protection, const F& function) {
  switch (protection) {
    case Protection::Pull:
      return function(std::integral_constant<Protection, Protection::Pull>{});
    case Protection::Path:
      return function(std::integral_constant<Protection, Protection::Path>{});
    case Protection::Walk:
      return function(std::integral_constant<Protection, Protection::Walk>{});
    case Protection::None:
      break;
  }
  return function(std::integral_constant<Protection, Protection::None>{});
}

// `own`: the names of the optimizer's lists after params and grads.
template <class Op>
std::vector<StepList> lists_of(Protection protection, bool clear_grad,
                               std::vector<std::pair<const char*, const char*>> own) {
  std::vector<std::pair<const char*, const char*>> names = {{"params", nullptr},
                                                            {"grads", nullptr}};
  names.insert(names.end(), own.begin(), own.end());
  if (protection >= Protection::Pull) {
    names.push_back({"anchors", "anchor"});
    names.push_back({"importances", "importance"});
  }
  if (protection >= Protection::Path) names.push_back({"path", "path"});
  if (protection == Protection::Walk) names.push_back({"fisher", "fisher"});
  if (kHasScalars<Op>) names.push_back({"steps", nullptr});

  const std::vector<ListKind> kinds = kinds_of(typename Op::lists{});
  TORCH_INTERNAL_ASSERT(kinds.size() == names.size());
  std::vector<StepList> lists;
  for (size_t a = 0; a < names.size(); ++a) {
    ListKind kind = kinds[a];
    if (kind.access == Access::ReadAndClear && !clear_grad) kind.access = Access::Read;
    if (kind.storage == Storage::Scalars) kind.access = Access::Update;  // by the counter
    lists.push_back({names[a].first, names[a].second, kind});
  }
  return lists;
}

// Counts the steps and lets the functor's last list point to what came of it.
template <class Op>
void advance(Prepared& step, Counter& counter, const Op& op) {
  if (!step.device) return;
  // On a GPU a new buffer each time: a captured graph keeps the one that it was captured with.
  if (!counter.coefficients.defined() || step.device->is_cuda()) {
    const auto count = static_cast<int64_t>(step.positions.size());
    counter.coefficients = at::empty({count, kCoefficients},
                                     at::TensorOptions().device(*step.device).dtype(at::kDouble));
    char* next = static_cast<char*>(counter.coefficients.mutable_data_ptr());
    for (size_t g = 0; g < step.groups.size(); ++g) {
      TensorLists& to = step.groups[g];
      TensorLists& from = counter.advance.groups[g];
      const size_t tensors = to.sizes.size();
      for (size_t i = 0; i < tensors; ++i, next += kCoefficientBytes) {
        from.pointers[tensors + i] = next;
        to.pointers[static_cast<size_t>(to.list_count - 1) * tensors + i] = next;
      }
    }
  }
  run(counter.advance, op);
}

}  // namespace

void check_arguments(const char* op, const SgdArguments& arguments) {
  check_common(op, arguments);
  check_scalar(op, "momentum", arguments.momentum);
  check_finite(op, "dampening", arguments.dampening);
}

void check_arguments(const char* op, const AdamArguments& arguments) {
  check_common(op, arguments);
  check_beta(op, "beta1", arguments.beta1);
  check_beta(op, "beta2", arguments.beta2);
  check_scalar(op, "eps", arguments.eps);
}

void check_devices(const char* op, const StepArguments& arguments,
                   std::optional<at::Device> device) {
  if (!device) return;
  const auto check = [&](const char* name, const at::Tensor& tensor, const char* otherwise) {
    TORCH_CHECK_VALUE(tensor.device() == *device, op, ": ", name, " is on ", tensor.device(),
                      ", expected ", *device, otherwise, " (the device of params)");
  };
  const at::Tensor* rate = tensor_of(arguments);
  if (rate != nullptr && !rate->is_cpu()) check("lr", *rate, " or cpu");
  if (arguments.grad_scale) check("grad_scale", *arguments.grad_scale, "");
  if (arguments.found_inf) check("found_inf", *arguments.found_inf, "");
  if (arguments.clip) check("clip", *arguments.clip, "");
}

Protection protection_of(const char* op, bool anchors, bool importances, bool path, bool fisher) {
  const auto check = [&](bool given, const char* name, bool needed, const char* other) {
    TORCH_CHECK_VALUE(!given || needed, op, ": ", name, " without ", other,
                      ", expected none of them, anchors and importances, these and path, or these "
                      "and fisher as well");
  };
  check(anchors, "anchors", importances, "importances");
  check(importances, "importances", anchors, "anchors");
  check(path, "path", anchors, "anchors and importances");
  check(fisher, "fisher", path, "path");
  if (fisher) return Protection::Walk;
  if (path) return Protection::Path;
  return anchors ? Protection::Pull : Protection::None;
}

std::vector<StepList> sgd_lists(Protection protection, bool momentum, bool clear_grad) {
  return with_protection(protection, [&](auto level) {
    if (momentum) {
      return lists_of<SgdStep<level, true>>(protection, clear_grad,
                                            {{"momentum_buffers", "momentum_buffer"}});
    }
    return lists_of<SgdStep<level, false>>(protection, clear_grad, {});
  });
}

std::vector<StepList> adam_lists(Protection protection, bool clear_grad) {
  return with_protection(protection, [&](auto level) {
    return lists_of<AdamStep<level>>(protection, clear_grad,
                                     {{"exp_avgs", "exp_avg"}, {"exp_avg_sqs", "exp_avg_sq"}});
  });
}

Counter make_counter(const Prepared& step) {
  Counter counter;
  counter.advance.device = step.device;
  for (const TensorLists& group : step.groups) {
    const auto tensors = group.tensor_count();
    const std::vector<int64_t> sizes(group.sizes.size(), 1);
    const auto steps = group.pointers.end() - tensors;
    TensorLists one{group.type, 2, sizes, {steps, group.pointers.end()}, sizes, {}};
    one.pointers.resize(2 * sizes.size());
    one.chunks = make_chunks(sizes, 1);
    counter.advance.groups.push_back(std::move(one));
  }
  return counter;
}

at::Tensor run_sgd(Prepared& step, Counter& counter, Protection protection,
                   const SgdArguments& arguments) {
  const StepOptions options = options_of(arguments, /*decoupled=*/false);
  if (arguments.momentum == 0) {
    return with_protection(protection,
                           [&](auto level) { return run(step, SgdStep<level, false>{{options}}); });
  }
  advance(step, counter, AdvanceSgd{options.found_inf, arguments.momentum, arguments.dampening});
  return with_protection(protection, [&](auto level) {
    return run(step, SgdStep<level, true>{{options}, arguments.momentum, arguments.nesterov});
  });
}

at::Tensor run_adam(Prepared& step, Counter& counter, Protection protection,
                    const AdamArguments& arguments) {
  const StepOptions options = options_of(arguments, arguments.decoupled);
  advance(step, counter,
          AdvanceAdam{options.lr, options.found_inf, std::log(arguments.beta1),
                      std::log(arguments.beta2)});
  return with_protection(protection, [&](auto level) {
    return run(step, AdamStep<level>{{options}, arguments.beta1, arguments.beta2, arguments.eps});
  });
}

}  // namespace clext
