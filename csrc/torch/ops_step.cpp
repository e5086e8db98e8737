// The ops of the fused optimizer steps: arguments as their schemas (ops.cpp) have them.
#include <ATen/ops/zeros.h>

#include <string_view>

#include "torch/fused_step.h"
#include "torch/ops.h"
#include "torch/versions.h"

namespace clext {

namespace {

using NamedLists = std::vector<std::pair<std::string_view, at::TensorList>>;

// Checks the lists that take part; `given` holds every list of the op by its name.
Prepared check_step(const char* op, const std::vector<StepList>& lists, const NamedLists& given) {
  std::vector<ListArgument> arguments;
  for (const StepList& list : lists) {
    for (const auto& [name, tensors] : given) {
      if (name == list.name) {
        arguments.push_back({list.name, tensors, list.kind.storage, list.kind.access});
      }
    }
  }
  return check_lists(op, arguments, 0);
}

at::Tensor value_or_zero(at::Tensor value, const Prepared& prepared) {
  if (value.defined()) return value;
  return at::zeros({}, at::TensorOptions()
                           .dtype(prepared.state_dtype)
                           .device(prepared.device.value_or(at::Device(at::kCPU))));
}

}  // namespace

at::Tensor sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::TensorList steps, at::TensorList path, at::TensorList fisher,
                     at::TensorList anchors, at::TensorList importances, const at::Tensor& lr,
                     double momentum, double dampening, double weight_decay, bool nesterov,
                     bool maximize, double strength, double decay, bool proximal, bool clear_grad,
                     const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf,
                     const std::optional<at::Tensor>& clip) {
  constexpr const char* kName = "sgd_step_";
  const SgdArguments arguments{{lr, weight_decay, maximize, strength, decay, proximal, clear_grad,
                                grad_scale, found_inf, clip},
                               momentum,
                               dampening,
                               nesterov};
  check_arguments(kName, arguments);
  const bool counts = momentum != 0;
  TORCH_CHECK_VALUE(counts || (momentum_buffers.empty() && steps.empty()), kName,
                    ": momentum_buffers has ", momentum_buffers.size(), " and steps ", steps.size(),
                    " tensors, expected none of either since momentum is 0");
  const Protection protection =
      protection_of(kName, !anchors.empty(), !importances.empty(), !path.empty(), !fisher.empty());
  Prepared prepared = check_step(kName, sgd_lists(protection, counts, clear_grad),
                                 {{"params", params},
                                  {"grads", grads},
                                  {"momentum_buffers", momentum_buffers},
                                  {"steps", steps},
                                  {"path", path},
                                  {"fisher", fisher},
                                  {"anchors", anchors},
                                  {"importances", importances}});
  check_devices(kName, arguments, prepared.device);
  Counter counter = counts ? make_counter(prepared) : Counter{};
  const at::Tensor value = run_sgd(prepared, counter, protection, arguments);
  mark_changed({params, momentum_buffers, steps, path, fisher});
  if (clear_grad) mark_changed({grads});
  return value_or_zero(value, prepared);
}

at::Tensor adam_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList path,
                      at::TensorList fisher, at::TensorList anchors, at::TensorList importances,
                      const at::Tensor& lr, double beta1, double beta2, double eps,
                      double weight_decay, bool decoupled, bool maximize, double strength,
                      double decay, bool proximal, bool clear_grad,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf,
                      const std::optional<at::Tensor>& clip) {
  constexpr const char* kName = "adam_step_";
  const AdamArguments arguments{{lr, weight_decay, maximize, strength, decay, proximal, clear_grad,
                                 grad_scale, found_inf, clip},
                                beta1,
                                beta2,
                                eps,
                                decoupled};
  check_arguments(kName, arguments);
  const Protection protection =
      protection_of(kName, !anchors.empty(), !importances.empty(), !path.empty(), !fisher.empty());
  Prepared prepared = check_step(kName, adam_lists(protection, clear_grad),
                                 {{"params", params},
                                  {"grads", grads},
                                  {"exp_avgs", exp_avgs},
                                  {"exp_avg_sqs", exp_avg_sqs},
                                  {"steps", steps},
                                  {"path", path},
                                  {"fisher", fisher},
                                  {"anchors", anchors},
                                  {"importances", importances}});
  check_devices(kName, arguments, prepared.device);
  Counter counter = make_counter(prepared);
  const at::Tensor value = run_adam(prepared, counter, protection, arguments);
  mark_changed({params, exp_avgs, exp_avg_sqs, steps, path, fisher});
  if (clear_grad) mark_changed({grads});
  return value_or_zero(value, prepared);
}

}  // namespace clext
