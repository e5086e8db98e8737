#include "torch/plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>

#include <utility>

#include "math/importance.h"
#include "math/path.h"
#include "math/penalty.h"
#include "torch/ops.h"

namespace clext {

namespace {

// A step over this many parameters takes about 10 us.
constexpr int64_t kShortElements = 32 * 1024;

bool has_kernels(at::Device device) {
#if defined(CLEXT_WITH_CUDA)
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

}  // namespace

ParameterPlan::ParameterPlan(std::vector<std::string> names, std::vector<at::Tensor> params,
                             State state, std::vector<at::Tensor> steps)
    : names_(std::move(names)),
      params_(std::move(params)),
      state_(std::move(state)),
      steps_(std::move(steps)) {
  TORCH_CHECK_VALUE(!params_.empty(),
                    "ParameterPlan: params is empty, expected at least one tensor");
  TORCH_CHECK_VALUE(names_.size() == params_.size(), "ParameterPlan: names has ", names_.size(),
                    " entries, expected ", params_.size(), " (as many as params)");
  const at::Device device = params_[0].device();
  TORCH_CHECK_VALUE(has_kernels(device), "ParameterPlan: params[0] of parameter '", names_[0],
                    "' is on ", device, ", expected a device that this build has kernels for");
  std::vector<ListArgument> lists = {{{"params", Storage::Parameter, Access::Read}, params_}};
  for (const auto& [name, tensors] : state_) {
    const bool consolidated = name == "anchor" || name == "importance";
    const Storage storage = consolidated ? Storage::Consolidated : Storage::State;
    lists.push_back({{name.c_str(), storage, Access::Update}, tensors});
  }
  if (!steps_.empty()) lists.push_back({{"steps", Storage::Scalars, Access::Update}, steps_});
  check_lists("ParameterPlan", lists, names_);
  int64_t elements = 0;
  for (const at::Tensor& param : params_) elements += param.numel();
  is_short_ = device.is_cpu() && elements <= kShortElements;
  const auto has = [&](const char* name) { return state_.count(name) != 0; };
  keeps_ = has("task_gradient");
  protection_ = has("fisher")   ? Protection::Walk
                : has("path")   ? Protection::Path
                : has("anchor") ? Protection::Pull
                                : Protection::None;
}

// What an op calls `list` is found here: a list of the state, or the steps.
const std::vector<at::Tensor>& ParameterPlan::entries(const char* op,
                                                      const std::string& list) const {
  static const std::map<std::string, std::string> keys = {
      {"anchors", "anchor"},        {"importances", "importance"},
      {"starts", "step_start"},     {"task_grads", "task_gradient"},
      {"exp_avgs", "exp_avg"},      {"momentum_buffers", "momentum_buffer"},
      {"exp_avg_sqs", "exp_avg_sq"}};
  if (list == "steps") {
    TORCH_CHECK_VALUE(!steps_.empty(), "ParameterPlan.", op,
                      ": there are no steps; pass them to the constructor");
    return steps_;
  }
  const auto key = keys.find(list);
  const auto found = state_.find(key == keys.end() ? list : key->second);
  TORCH_CHECK_VALUE(found != state_.end(), "ParameterPlan.", op, ": state has no list '",
                    key == keys.end() ? list : key->second, "'; pass it to the constructor");
  return found->second;
}

template <class Op, class... N>
at::Tensor ParameterPlan::call(Launch& launch, N... numbers) {
  check_numbers<Op>(numbers...);
  const at::AutoDispatchBelowADInplaceOrView guard;
  prepare(launch, Op::name, lists_of<Op>());
  at::Tensor result = run(launch.prepared, Op{numbers...});
  if (launch.writes_gradients) {
    // As after every in-place op of torch: a graph may have saved the gradient (create_graph=True).
    for (const Active& active : launch.active) {
      active.parameter->grad().unsafeGetTensorImpl()->bump_version();
    }
  }
  return result;
}

at::Tensor ParameterPlan::quadratic_penalty() { return call<QuadraticPenalty>(penalty_); }

at::Tensor ParameterPlan::add_quadratic_penalty_grad_(double strength) {
  return keeps_ ? call<AddQuadraticPenaltyGrad<true>>(pull_, strength)
                : call<AddQuadraticPenaltyGrad<false>>(pull_, strength);
}

void ParameterPlan::check_pulled(const char* op) const {
  TORCH_CHECK(pull_.lists != nullptr, "ParameterPlan.", op,
              ": nothing has been kept of this step, expected add_quadratic_penalty_grad_ first");
}

void ParameterPlan::accumulate_path_integral_() {
  check_pulled(AccumulatePathIntegral::name);
  call<AccumulatePathIntegral>(path_);
}

void ParameterPlan::riemannian_walk_step_(double decay) {
  check_pulled(RiemannianWalkStep::name);
  call<RiemannianWalkStep>(walk_, decay);
}

void ParameterPlan::accumulate_riemannian_walk_score_(double eps) {
  call<AccumulateRiemannianWalkScore>(score_, eps);
}

void ParameterPlan::consolidate_importance_(const std::vector<at::Tensor>& estimate, double gamma) {
  using Op = ConsolidateImportance;
  const at::AutoDispatchBelowADInplaceOrView guard;
  apply<Op>({entries(Op::name, "importances"), entries(Op::name, "anchors"), estimate, params_},
            gamma);
}

at::Tensor ParameterPlan::consolidate_all_anchors_(const std::vector<at::Tensor>& estimate,
                                                   double gamma) {
  using Op = ConsolidateAllAnchors;
  const at::AutoDispatchBelowADInplaceOrView guard;
  return apply<Op>(
      {entries(Op::name, "importances"), entries(Op::name, "anchors"), estimate, params_}, gamma);
}

void ParameterPlan::consolidate_path_integral_(double xi, bool clamp_total) {
  const char* op = ConsolidatePathIntegral::name;
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_path_integral_(entries(op, "importances"), entries(op, "anchors"),
                                    entries(op, "path"), params_, xi, clamp_total);
}

void ParameterPlan::consolidate_riemannian_walk_(double mix) {
  const char* op = RiemannianWalkEnd::name;
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_riemannian_walk_(entries(op, "importances"), entries(op, "anchors"),
                                      entries(op, "score"), entries(op, "task_score"),
                                      entries(op, "fisher"), params_, mix);
}

}  // namespace clext
