// ParameterPlan's fused optimizer steps: the checks of their arguments, and two launches, one that
// counts the steps of each tensor and one that makes them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <type_traits>

#include "math/adam.h"
#include "math/sgd.h"
#include "torch/plan.h"
#include "torch/run.h"

namespace clext {

namespace {

// Coefficients of one tensor: two, in the state's dtype.
constexpr int64_t kCoefficients = 2;
constexpr int64_t kCoefficientBytes = kCoefficients * static_cast<int64_t>(sizeof(double));

void check_beta(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value < 1, op, ": ", name, " is ", value,
                    ", expected a number in [0, 1)");
}

// A number that lies where the parameters are, or nothing.
void check_option(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                  at::Device device, bool may_be_double) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->defined() && tensor->numel() == 1, op, ": ", name, " has shape ",
                    tensor->sizes(), ", expected one element");
  const at::ScalarType dtype = tensor->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || (may_be_double && dtype == at::kDouble), op, ": ", name,
                   " has dtype ", c10::getDtypeNames(dtype).first, ", expected float32",
                   may_be_double ? " or float64" : "");
  TORCH_CHECK_VALUE(tensor->device() == device, op, ": ", name, " is on ", tensor->device(),
                    ", expected ", device, " (the device of params)");
}

// A rate on the host is read here; on another device it stays there: looking at it would stall the
// stream.
DeviceScalar rate_of(const char* op, const StepArguments& arguments, at::Device device) {
  DeviceScalar rate;
  if (const at::Tensor* tensor = std::get_if<at::Tensor>(&arguments.lr)) {
    const bool on_host = tensor->is_cpu();
    check_option(op, "lr", *tensor, on_host ? tensor->device() : device, /*may_be_double=*/true);
    if (on_host) {
      rate.value = tensor->item<double>();
    } else {
      rate = {tensor->const_data_ptr(), tensor->scalar_type() == at::kDouble, 0};
    }
  } else {
    rate.value = std::get<double>(arguments.lr);
  }
  check_number(op, {"lr", Number::NotNegative}, rate.value);
  return rate;
}

StepOptions options_of(const char* op, const StepArguments& arguments, at::Device device,
                       bool decoupled) {
  check_number(op, {"weight_decay", Number::NotNegative}, arguments.weight_decay);
  check_number(op, {"strength", Number::NotNegative}, arguments.strength);
  check_number(op, {"decay", Number::Fraction}, arguments.decay);
  check_option(op, "grad_scale", arguments.grad_scale, device, /*may_be_double=*/false);
  check_option(op, "found_inf", arguments.found_inf, device, /*may_be_double=*/false);
  check_option(op, "clip", arguments.clip, device, /*may_be_double=*/true);
  StepOptions options;
  options.lr = rate_of(op, arguments, device);
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

}  // namespace

// Takes the last list of `step` to be `steps`.
ParameterPlan::Counter ParameterPlan::make_counter(const Prepared& step) {
  Counter counter;
  counter.prepared.device = step.device;
  for (const TensorLists& group : step.groups) {
    const std::vector<int64_t> sizes(group.sizes.size(), 1);
    const auto steps = group.pointers.end() - group.tensor_count();
    TensorLists one{group.type, 2, sizes, {steps, group.pointers.end()}, sizes, {}};
    one.pointers.resize(2 * sizes.size());
    one.chunks = make_chunks(sizes, 1);
    counter.prepared.groups.push_back(std::move(one));
  }
  return counter;
}

// Counts the steps and lets the last list of the step's functor point to what came of it.
template <class Op>
void ParameterPlan::advance(const Op& op) {
  Prepared& step = step_.prepared;
  if (!step.device) return;
  // On a GPU a new buffer each time: a captured graph keeps the one that it was captured with.
  if (!counter_.coefficients.defined() || step.device->is_cuda()) {
    const auto count = static_cast<int64_t>(step.positions.size());
    counter_.coefficients = at::empty({count, kCoefficients},
                                      at::TensorOptions().device(*step.device).dtype(at::kDouble));
    char* next = static_cast<char*>(counter_.coefficients.mutable_data_ptr());
    for (size_t g = 0; g < step.groups.size(); ++g) {
      TensorLists& to = step.groups[g];
      TensorLists& from = counter_.prepared.groups[g];
      const size_t tensors = to.sizes.size();
      for (size_t i = 0; i < tensors; ++i, next += kCoefficientBytes) {
        from.pointers[tensors + i] = next;
        to.pointers[static_cast<size_t>(to.list_count - 1) * tensors + i] = next;
      }
    }
  }
  run(counter_.prepared, op);
}

template <class Op, class... Advance>
std::optional<at::Tensor> ParameterPlan::step(const Op& op, const Advance&... advances) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const bool is_new = prepare(step_, Op::name, lists_of<Op>(op.clear));
  if constexpr (sizeof...(Advance) > 0) {
    if (is_new) counter_ = make_counter(step_.prepared);
    (advance(advances), ...);
  }
  const at::Tensor value = run(step_.prepared, op);
  for (const Active& active : step_.active) {
    active.parameter->bump_version();
    if (op.clear) active.parameter->grad().unsafeGetTensorImpl()->bump_version();
  }
  if (!value.defined()) return std::nullopt;
  // Without any gradient nothing was launched, on whatever device.
  if (step_.active.empty()) return at::zeros({}, value.options().device(params_[0].device()));
  return value;
}

std::optional<at::Tensor> ParameterPlan::sgd_step_(const SgdArguments& arguments) {
  constexpr const char* kName = "sgd_step_";
  const double momentum = arguments.momentum;
  check_number(kName, {"momentum", Number::NotNegative}, momentum);
  TORCH_CHECK_VALUE(std::isfinite(arguments.dampening), kName, ": dampening is ",
                    arguments.dampening, ", expected a finite number");
  const StepOptions options = options_of(kName, arguments, params_[0].device(), false);
  return with_protection(protection_, [&](auto level) {
    if (momentum == 0) return step(SgdStep<level, false>{{options}});
    return step(SgdStep<level, true>{{options}, momentum, arguments.nesterov},
                AdvanceSgd{options.found_inf, momentum, arguments.dampening});
  });
}

std::optional<at::Tensor> ParameterPlan::adam_step_(const AdamArguments& arguments) {
  constexpr const char* kName = "adam_step_";
  check_beta(kName, "beta1", arguments.beta1);
  check_beta(kName, "beta2", arguments.beta2);
  check_number(kName, {"eps", Number::NotNegative}, arguments.eps);
  const StepOptions options =
      options_of(kName, arguments, params_[0].device(), arguments.decoupled);
  return with_protection(protection_, [&](auto level) {
    return step(AdamStep<level>{{options}, arguments.beta1, arguments.beta2, arguments.eps},
                AdvanceAdam{options.lr, options.found_inf, std::log(arguments.beta1),
                            std::log(arguments.beta2)});
  });
}

}  // namespace clext
