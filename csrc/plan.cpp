#include "plan.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <utility>

#include "math/path.h"
#include "math/penalty.h"
#include "ops.h"
#include "run.h"

namespace clext {

namespace {

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

bool ParameterPlan::Geometry::fits(const at::Tensor& tensor) const {
  if (tensor.scalar_type() != dtype || tensor.dim() != static_cast<int64_t>(sizes.size())) {
    return false;
  }
  const at::IntArrayRef tensor_sizes = tensor.sizes();
  const at::IntArrayRef tensor_strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (tensor_sizes[d] != sizes[d]) return false;
    if (tensor_strides[d] != strides[d] && sizes[d] > 1) return false;
  }
  return true;
}

bool ParameterPlan::takes_part(const at::Tensor& param, Missing missing) const {
  if (missing == Missing::Irrelevant || param.grad().defined()) return true;
  return missing == Missing::Created && param.requires_grad();
}

void ParameterPlan::rebuild(const char* op_name, Launch& launch, const std::vector<Source>& sources,
                            const std::vector<ListKind>& kinds) {
  launch.valid = false;
  launch.cells.clear();
  launch.state.clear();
  launch.active.clear();
  launch.left_out.clear();
  launch.geometry.clear();
  std::vector<std::string> names;
  std::vector<at::Tensor> params, grads;
  for (size_t i = 0; i < params_.size(); ++i) {
    const at::Tensor& param = params_[i];
    if (!takes_part(param, launch.missing)) {
      launch.left_out.push_back(i);
      continue;
    }
    launch.active.push_back(i);
    launch.geometry.push_back(
        {at::DimVector(param.sizes()), at::DimVector(param.strides()), param.scalar_type()});
    names.push_back(names_[i]);
    params.push_back(param);
    const bool create = launch.missing == Missing::Created && !param.grad().defined();
    grads.push_back(create ? at::zeros_like(param.detach()) : param.grad());
  }

  std::vector<std::vector<at::Tensor>> tensors(sources.size());
  std::vector<ListArgument> arguments;
  size_t layout = 0;
  for (size_t a = 0; a < sources.size(); ++a) {
    if (sources[a].kind == Source::kParameter) layout = a;
    if (sources[a].kind == Source::kParameter || sources[a].kind == Source::kGradient) {
      tensors[a] = sources[a].kind == Source::kParameter ? params : grads;
    } else {
      const std::vector<at::Tensor>& all = tensors_of(op_name, sources[a]);
      for (const size_t i : launch.active) tensors[a].push_back(all[i]);
    }
    arguments.push_back({sources[a].name, tensors[a], kinds[a].storage, kinds[a].access});
  }
  launch.prepared = check_lists(op_name, arguments, layout, names);
  if (launch.missing == Missing::Created) {
    for (size_t k = 0; k < grads.size(); ++k) params[k].mutable_grad() = grads[k];
  }

  for (size_t a = 0; a < sources.size(); ++a) {
    for (size_t k = 0; k < launch.active.size(); ++k) {
      const size_t i = launch.active[k];
      if (sources[a].kind == Source::kState || sources[a].kind == Source::kStep) {
        const at::Tensor& tensor = tensors_of(op_name, sources[a])[i];
        launch.state.push_back({&tensor, tensor.storage()});
        continue;
      }
      const auto [group, index] = launch.prepared.positions[k];
      const size_t tensor_count = launch.prepared.groups[group].sizes.size();
      launch.cells.push_back(
          {i, k, sources[a].kind, arguments[a].access, group, a * tensor_count + index});
    }
  }
  // A gradient that had to be copied for this launch is stale at the next one.
  launch.valid = launch.prepared.copies.empty();
}

// Brings the pointers of gradients up to date; false if only a new check can tell whether
// everything still fits. An address alone does not tell: memory is used again for other shapes.
bool ParameterPlan::refresh(Launch& launch) const {
  for (const size_t i : launch.left_out) {
    if (takes_part(params_[i], launch.missing)) return false;
  }
  for (const StateCell& cell : launch.state) {
    const c10::Storage& storage = cell.tensor->unsafeGetTensorImpl()->unsafe_storage();
    if (storage.unsafeGetStorageImpl() != cell.storage.unsafeGetStorageImpl()) return false;
  }
  for (const Cell& cell : launch.cells) {
    const at::Tensor& param = params_[cell.parameter];
    const at::Tensor& tensor = cell.kind == Source::kGradient ? param.grad() : param;
    if (!tensor.defined() || tensor.layout() != at::kStrided ||
        tensor.device() != *launch.prepared.device || !launch.geometry[cell.active].fits(tensor)) {
      return false;
    }
    void* pointer = cell.access == Access::Read ? const_cast<void*>(tensor.const_data_ptr())
                                                : tensor.mutable_data_ptr();
    void*& known = launch.prepared.groups[cell.group].pointers[cell.position];
    if (pointer == known) continue;
    if (cell.kind == Source::kParameter) return false;
    known = pointer;
  }
  return true;
}

template <class Op>
at::Tensor ParameterPlan::call(const char* op_name, Launch& launch,
                               const std::vector<Source>& sources, const Op& op) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!launch.valid || !refresh(launch)) {
    rebuild(op_name, launch, sources, kinds_of(typename Op::lists{}));
  }
  at::Tensor result = run(launch.prepared, op);
  if (launch.missing == Missing::Created) {
    // As after every in-place op of torch: a graph may have saved the gradient (create_graph=True).
    for (const size_t i : launch.active) {
      params_[i].grad().unsafeGetTensorImpl()->bump_version();
    }
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
  static const std::vector<Source> sources = {{Source::kGradient, "grads"},
                                              {Source::kParameter, "params"},
                                              {Source::kState, "anchors", "anchor"},
                                              {Source::kState, "importances", "importance"}};
  check_scalar("add_quadratic_penalty_grad_", "strength", strength);
  return call("add_quadratic_penalty_grad_", penalty_grad_, sources,
              AddQuadraticPenaltyGrad{strength});
}

void ParameterPlan::accumulate_path_integral_(double strength) {
  static const std::vector<Source> sources = {
      {Source::kState, "path", "path"},      {Source::kState, "previous", "previous"},
      {Source::kParameter, "params"},        {Source::kGradient, "grads"},
      {Source::kState, "anchors", "anchor"}, {Source::kState, "importances", "importance"}};
  check_scalar("accumulate_path_integral_", "strength", strength);
  call("accumulate_path_integral_", path_, sources, AccumulatePathIntegral{strength});
}

void ParameterPlan::riemannian_walk_step_(double strength, double decay) {
  static const std::vector<Source> sources = {{Source::kState, "path", "path"},
                                              {Source::kState, "previous", "previous"},
                                              {Source::kState, "fisher", "fisher"},
                                              {Source::kParameter, "params"},
                                              {Source::kGradient, "grads"},
                                              {Source::kState, "anchors", "anchor"},
                                              {Source::kState, "importances", "importance"}};
  check_scalar("riemannian_walk_step_", "strength", strength);
  check_fraction("riemannian_walk_step_", "decay", decay);
  call("riemannian_walk_step_", walk_, sources, RiemannianWalkStep{strength, decay});
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

void ParameterPlan::consolidate_path_integral_(double xi) {
  constexpr const char* kName = "consolidate_path_integral_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_path_integral_(state(kName, "importance"), state(kName, "anchor"),
                                    state(kName, "path"), params_, xi);
}

void ParameterPlan::consolidate_riemannian_walk_(double mix) {
  constexpr const char* kName = "consolidate_riemannian_walk_";
  const at::AutoDispatchBelowADInplaceOrView guard;
  clext::consolidate_riemannian_walk_(state(kName, "importance"), state(kName, "anchor"),
                                      state(kName, "score"), state(kName, "task_score"),
                                      state(kName, "fisher"), params_, mix);
}

}  // namespace clext
