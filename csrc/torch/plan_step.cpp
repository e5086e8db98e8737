// ParameterPlan's fused optimizer steps.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "torch/plan.h"

namespace clext {

// Brings the launch up to date. `variant` tells apart what may change from one call to the next.
template <class F>
void ParameterPlan::prepare_step(const char* op_name, int variant, const F& lists) {
  if (step_.valid && variant == step_variant_ && refresh(step_)) return;
  std::vector<Source> sources;
  std::vector<ListKind> kinds;
  for (const StepList& list : lists()) {
    const bool is_steps = list.kind.storage == Storage::Scalars;
    const auto kind = list.state != nullptr ? Source::kState
                      : is_steps            ? Source::kStep
                      : sources.empty()     ? Source::kParameter
                                            : Source::kGradient;
    sources.push_back({kind, list.name, list.state});
    kinds.push_back(list.kind);
  }
  rebuild(op_name, step_, sources, kinds);
  step_variant_ = variant;
  counter_ = sources.back().kind == Source::kStep ? make_counter(step_.prepared) : Counter{};
}

Protection ParameterPlan::protection(const char* op_name) {
  if (!protection_) {
    const auto has = [&](const char* name) { return state_.count(name) != 0; };
    protection_ =
        protection_of(op_name, has("anchor"), has("importance"), has("path"), has("fisher"));
  }
  return *protection_;
}

std::optional<at::Tensor> ParameterPlan::finish_step(at::Tensor value, bool clear_grad) const {
  for (const Active& active : step_.active) {
    active.parameter->bump_version();
    if (clear_grad) active.gradient->bump_version();
  }
  if (!value.defined()) return std::nullopt;
  // Without any gradient nothing was launched, on whatever device.
  if (step_.active.empty()) return at::zeros({}, value.options().device(params_[0].device()));
  return value;
}

std::optional<at::Tensor> ParameterPlan::sgd_step_(const SgdArguments& arguments) {
  constexpr const char* kName = "sgd_step_";
  check_arguments(kName, arguments);
  check_devices(kName, arguments, params_[0].device());
  const Protection level = protection(kName);
  const bool momentum = arguments.momentum != 0;
  const at::AutoDispatchBelowADInplaceOrView guard;
  prepare_step(kName, (momentum ? 2 : 0) + (arguments.clear_grad ? 1 : 0),
               [&] { return sgd_lists(level, momentum, arguments.clear_grad); });
  return finish_step(run_sgd(step_.prepared, counter_, level, arguments), arguments.clear_grad);
}

std::optional<at::Tensor> ParameterPlan::adam_step_(const AdamArguments& arguments) {
  constexpr const char* kName = "adam_step_";
  check_arguments(kName, arguments);
  check_devices(kName, arguments, params_[0].device());
  const Protection level = protection(kName);
  const at::AutoDispatchBelowADInplaceOrView guard;
  prepare_step(kName, 4 + (arguments.clear_grad ? 1 : 0),
               [&] { return adam_lists(level, arguments.clear_grad); });
  return finish_step(run_adam(step_.prepared, counter_, level, arguments), arguments.clear_grad);
}

}  // namespace clext
