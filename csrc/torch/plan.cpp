#include "torch/plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>

#include <utility>

#include "math/path.h"
#include "math/penalty.h"
#include "torch/ops.h"
#include "torch/run.h"

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
                    "' is on ", device,
                    ", expected a device that this build has kernels for; use "
                    "clext.reference.ReferencePlan there");
  std::vector<ListArgument> lists = {{"params", params_, Storage::Parameter, Access::Read}};
  for (const auto& [name, tensors] : state_) {
    lists.push_back({name.c_str(), tensors, Storage::State, Access::Update});
  }
  if (!steps_.empty()) lists.push_back({"steps", steps_, Storage::Scalars, Access::Update});
  check_lists("ParameterPlan", lists, 0, names_);
  int64_t elements = 0;
  for (const at::Tensor& param : params_) elements += param.numel();
  is_short_ = device.is_cpu() && elements <= kShortElements;
}

const std::vector<at::Tensor>& ParameterPlan::state(const char* op_name, const char* name) const {
  const auto found = state_.find(name);
  TORCH_CHECK_VALUE(found != state_.end(), "ParameterPlan.", op_name, ": state has no list '", name,
                    "'; pass it to the constructor");
  return found->second;
}

const std::vector<at::Tensor>& ParameterPlan::tensors_of(const char* op_name,
                                                         const Source& source) const {
  if (source.kind == Source::kState) return state(op_name, source.state);
  TORCH_CHECK_VALUE(!steps_.empty(), "ParameterPlan.", op_name,
                    ": there are no steps; pass them to the constructor");
  return steps_;
}

template <class Op>
at::Tensor ParameterPlan::call(const char* op_name, Launch& launch,
                               const std::vector<Source>& sources, const Op& op) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!launch.valid || !refresh(launch)) {
    rebuild(op_name, launch, sources, kinds_of(typename Op::lists{}));
  }
  at::Tensor result = run(launch.prepared, op);
  if (launch.gradient_access != Access::Read) {
    // As after every in-place op of torch: a graph may have saved the gradient (create_graph=True).
    for (const Active& active : launch.active) active.gradient->bump_version();
  }
  return result;
}

at::Tensor ParameterPlan::quadratic_penalty() {
  static const std::vector<Source> sources = {{Source::kParameter, "params"},
                                              {Source::kState, "anchors", "anchor"},
                                              {Source::kState, "importances", "importance"}};
  return call("quadratic_penalty", penalty_, sources, QuadraticPenalty{});
}

at::Tensor ParameterPlan::add_quadratic_penalty_grad_(double strength) {
  constexpr const char* kName = "add_quadratic_penalty_grad_";
  static const std::vector<Source> sources = {{Source::kGradient, "grads"},
                                              {Source::kParameter, "params"},
                                              {Source::kState, "anchors", "anchor"},
                                              {Source::kState, "importances", "importance"}};
  static const std::vector<Source> keeping = {{Source::kGradient, "grads"},
                                              {Source::kParameter, "params"},
                                              {Source::kState, "anchors", "anchor"},
                                              {Source::kState, "importances", "importance"},
                                              {Source::kState, "task_gradient", "task_gradient"},
                                              {Source::kState, "step_start", "step_start"}};
  check_scalar(kName, "strength", strength);
  if (state_.count("task_gradient") == 0) {
    return call(kName, penalty_grad_, sources, AddQuadraticPenaltyGrad<false>{strength});
  }
  return call(kName, penalty_grad_, keeping, AddQuadraticPenaltyGrad<true>{strength});
}

void ParameterPlan::check_kept(const char* op_name) const {
  TORCH_CHECK(penalty_grad_.valid, "ParameterPlan.", op_name,
              ": nothing has been kept of this step, expected add_quadratic_penalty_grad_ first");
}

void ParameterPlan::accumulate_path_integral_() {
  constexpr const char* kName = "accumulate_path_integral_";
  static const std::vector<Source> sources = {{Source::kState, "path", "path"},
                                              {Source::kParameter, "params"},
                                              {Source::kState, "starts", "step_start"},
                                              {Source::kState, "task_grads", "task_gradient"}};
  check_kept(kName);
  call(kName, path_, sources, AccumulatePathIntegral{});
}

void ParameterPlan::riemannian_walk_step_(double decay) {
  constexpr const char* kName = "riemannian_walk_step_";
  static const std::vector<Source> sources = {{Source::kState, "path", "path"},
                                              {Source::kState, "fisher", "fisher"},
                                              {Source::kParameter, "params"},
                                              {Source::kState, "starts", "step_start"},
                                              {Source::kState, "task_grads", "task_gradient"}};
  check_fraction(kName, "decay", decay);
  check_kept(kName);
  call(kName, walk_, sources, RiemannianWalkStep{decay});
}

void ParameterPlan::accumulate_riemannian_walk_score_(double eps) {
  static const std::vector<Source> sources = {{Source::kState, "task_score", "task_score"},
                                              {Source::kState, "path", "path"},
                                              {Source::kState, "interval_start", "interval_start"},
                                              {Source::kState, "fisher", "fisher"},
                                              {Source::kParameter, "params"}};
  check_scalar("accumulate_riemannian_walk_score_", "eps", eps, /*positive=*/true);
  call("accumulate_riemannian_walk_score_", score_, sources, AccumulateRiemannianWalkScore{eps});
}

// Once a task: the dispatcher ops' own functions, with their full checks.

void ParameterPlan::consolidate_importance_(const std::vector<at::Tensor>& estimate, double gamma) {
  constexpr const char* kName = "consolidate_importance_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_importance_(state(kName, "importance"), state(kName, "anchor"), estimate,
                                 params_, gamma);
}

at::Tensor ParameterPlan::consolidate_all_anchors_(const std::vector<at::Tensor>& estimate,
                                                   double gamma) {
  constexpr const char* kName = "consolidate_all_anchors_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  return clext::consolidate_all_anchors_(state(kName, "importance"), state(kName, "anchor"),
                                         estimate, params_, gamma);
}

void ParameterPlan::consolidate_path_integral_(double xi, bool clamp_total) {
  constexpr const char* kName = "consolidate_path_integral_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_path_integral_(state(kName, "importance"), state(kName, "anchor"),
                                    state(kName, "path"), params_, xi, clamp_total);
}

void ParameterPlan::consolidate_riemannian_walk_(double mix) {
  constexpr const char* kName = "consolidate_riemannian_walk_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_riemannian_walk_(state(kName, "importance"), state(kName, "anchor"),
                                      state(kName, "score"), state(kName, "task_score"),
                                      state(kName, "fisher"), params_, mix);
}

}  // namespace clext
