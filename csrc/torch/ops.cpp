// Every op of clext: schema, checks, launch. The formulas are in math/, one functor per op.
#include "torch/ops.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "math/importance.h"
#include "math/path.h"
#include "math/penalty.h"
#include "math/sliced.h"
#include "torch/run.h"
#include "torch/versions.h"

namespace clext {

at::Tensor quadratic_penalty(at::TensorList params, at::TensorList anchors,
                             at::TensorList importances) {
  const auto prepared = check_lists<QuadraticPenalty>(
      "quadratic_penalty",
      {{{"params", params}, {"anchors", anchors}, {"importances", importances}}}, 0);
  return run(prepared, QuadraticPenalty{});
}

std::vector<at::Tensor> quadratic_penalty_backward(const at::Tensor& grad, at::TensorList params,
                                                   at::TensorList anchors,
                                                   at::TensorList importances) {
  TORCH_CHECK_VALUE(grad.dim() == 0, "quadratic_penalty_backward: grad has shape ", grad.sizes(),
                    ", expected a 0-dim tensor");
  std::vector<at::Tensor> grads;
  for (const at::Tensor& param : params) grads.push_back(at::empty_like(param));
  const auto prepared = check_lists<QuadraticPenaltyBackward>(
      "quadratic_penalty_backward",
      {{{"grads", grads}, {"params", params}, {"anchors", anchors}, {"importances", importances}}},
      1);
  TORCH_CHECK_VALUE(!prepared.device || grad.device() == *prepared.device,
                    "quadratic_penalty_backward: grad is on ", grad.device(), ", expected ",
                    *prepared.device);
  const at::Tensor grad_output = grad.to(at::kDouble);
  run(prepared, QuadraticPenaltyBackward{grad_output.const_data_ptr<double>()});
  return grads;
}

at::Tensor add_quadratic_penalty_grad_(at::TensorList grads, at::TensorList params,
                                       at::TensorList anchors, at::TensorList importances,
                                       double strength) {
  check_scalar("add_quadratic_penalty_grad_", "strength", strength);
  const auto prepared = check_lists<AddQuadraticPenaltyGrad<false>>(
      "add_quadratic_penalty_grad_",
      {{{"grads", grads}, {"params", params}, {"anchors", anchors}, {"importances", importances}}},
      1);
  at::Tensor value = run(prepared, AddQuadraticPenaltyGrad<false>{strength});
  mark_changed({grads});
  return value;
}

void accumulate_path_integral_(at::TensorList path, at::TensorList params, at::TensorList starts,
                               at::TensorList task_grads) {
  const auto prepared = check_lists<AccumulatePathIntegral>(
      "accumulate_path_integral_",
      {{{"path", path}, {"params", params}, {"starts", starts}, {"task_grads", task_grads}}}, 1);
  run(prepared, AccumulatePathIntegral{});
  mark_changed({path});
}

void riemannian_walk_step_(at::TensorList path, at::TensorList fisher, at::TensorList params,
                           at::TensorList starts, at::TensorList task_grads, double decay) {
  check_fraction("riemannian_walk_step_", "decay", decay);
  const auto prepared = check_lists<RiemannianWalkStep>("riemannian_walk_step_",
                                                        {{{"path", path},
                                                          {"fisher", fisher},
                                                          {"params", params},
                                                          {"starts", starts},
                                                          {"task_grads", task_grads}}},
                                                        2);
  run(prepared, RiemannianWalkStep{decay});
  mark_changed({path, fisher});
}

void accumulate_riemannian_walk_score_(at::TensorList task_score, at::TensorList path,
                                       at::TensorList interval_start, at::TensorList fisher,
                                       at::TensorList params, double eps) {
  check_scalar("accumulate_riemannian_walk_score_", "eps", eps, /*positive=*/true);
  const auto prepared =
      check_lists<AccumulateRiemannianWalkScore>("accumulate_riemannian_walk_score_",
                                                 {{{"task_score", task_score},
                                                   {"path", path},
                                                   {"interval_start", interval_start},
                                                   {"fisher", fisher},
                                                   {"params", params}}},
                                                 4);
  run(prepared, AccumulateRiemannianWalkScore{eps});
  mark_changed({task_score, path, interval_start});
}

void accumulate_square_(at::TensorList acc, at::TensorList grads, double scale) {
  check_scalar("accumulate_square_", "scale", scale);
  const auto prepared =
      check_lists<AccumulateSquare>("accumulate_square_", {{{"acc", acc}, {"grads", grads}}}, 0);
  run(prepared, AccumulateSquare{scale});
  mark_changed({acc});
}

void accumulate_abs_(at::TensorList acc, at::TensorList grads, double scale) {
  check_scalar("accumulate_abs_", "scale", scale);
  const auto prepared =
      check_lists<AccumulateAbs>("accumulate_abs_", {{{"acc", acc}, {"grads", grads}}}, 0);
  run(prepared, AccumulateAbs{scale});
  mark_changed({acc});
}

void sliced_importance_(at::TensorList acc, at::TensorList jacobian, const at::Tensor& slices,
                        double scale) {
  check_scalar("sliced_importance_", "scale", scale);
  TORCH_CHECK_VALUE(slices.dim() == 2, "sliced_importance_: slices has shape ", slices.sizes(),
                    ", expected [slices, outputs]");
  const auto prepared = check_lists<SlicedImportance>("sliced_importance_",
                                                      {{{"acc", acc}, {"jacobian", jacobian}}}, 0);
  const int64_t outputs = slices.size(1);
  for (size_t i = 0; i < jacobian.size(); ++i) {
    TORCH_CHECK_VALUE(jacobian[i].size(0) == outputs, "sliced_importance_: jacobian[", i, "] has ",
                      jacobian[i].size(0), " rows, expected ", outputs, " (the columns of slices)");
  }
  TORCH_CHECK_VALUE(!prepared.device || slices.device() == *prepared.device,
                    "sliced_importance_: slices is on ", slices.device(), ", expected ",
                    *prepared.device);
  TORCH_CHECK_VALUE(prepared.groups.size() <= 1,
                    "sliced_importance_: acc mixes float32 and float64, expected one dtype");
  // In float64, which no matmul precision setting and no autocast touches: the kernel reads raw
  // numbers of the state's dtype.
  const at::Tensor directions = slices.detach().to(at::kDouble);
  const at::Tensor gram = at::mm(directions.t(), directions).to(prepared.state_dtype).contiguous();
  run(prepared, SlicedImportance{gram.const_data_ptr(), outputs, scale});
  mark_changed({acc});
}

void consolidate_importance_(at::TensorList importances, at::TensorList anchors,
                             at::TensorList estimate, at::TensorList params, double gamma) {
  check_fraction("consolidate_importance_", "gamma", gamma);
  const auto prepared = check_lists<ConsolidateImportance>("consolidate_importance_",
                                                           {{{"importances", importances},
                                                             {"anchors", anchors},
                                                             {"estimate", estimate},
                                                             {"params", params}}},
                                                           3);
  run(prepared, ConsolidateImportance{gamma});
  mark_changed({importances, anchors});
}

at::Tensor consolidate_all_anchors_(at::TensorList importances, at::TensorList anchors,
                                    at::TensorList estimate, at::TensorList params, double gamma) {
  check_fraction("consolidate_all_anchors_", "gamma", gamma);
  const auto prepared = check_lists<ConsolidateAllAnchors>("consolidate_all_anchors_",
                                                           {{{"importances", importances},
                                                             {"anchors", anchors},
                                                             {"estimate", estimate},
                                                             {"params", params}}},
                                                           3);
  at::Tensor constant = run(prepared, ConsolidateAllAnchors{gamma});
  mark_changed({importances, anchors});
  return constant;
}

void consolidate_path_integral_(at::TensorList importances, at::TensorList anchors,
                                at::TensorList path, at::TensorList params, double xi,
                                bool clamp_total) {
  check_scalar("consolidate_path_integral_", "xi", xi, /*positive=*/true);
  const auto prepared = check_lists<ConsolidatePathIntegral>(
      "consolidate_path_integral_",
      {{{"importances", importances}, {"anchors", anchors}, {"path", path}, {"params", params}}},
      3);
  run(prepared, ConsolidatePathIntegral{xi, clamp_total});
  mark_changed({importances, anchors, path});
}

void consolidate_riemannian_walk_(at::TensorList importances, at::TensorList anchors,
                                  at::TensorList score, at::TensorList task_score,
                                  at::TensorList fisher, at::TensorList params, double mix) {
  constexpr const char* kName = "consolidate_riemannian_walk_";
  check_fraction(kName, "mix", mix);
  // The lists of all passes together, before the first one changes anything.
  check_lists(kName,
              {{"importances", importances, Storage::State, Access::Write},
               {"anchors", anchors, Storage::State, Access::Write},
               {"score", score, Storage::State, Access::Update},
               {"task_score", task_score, Storage::State, Access::Update},
               {"fisher", fisher, Storage::State, Access::Read},
               {"params", params, Storage::Parameter, Access::Read}},
              5);
  // A maximum does not mind the order, so any dense layout will do.
  std::vector<at::Tensor> dense_fisher;
  for (const at::Tensor& tensor : fisher) {
    dense_fisher.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
  }
  const auto consolidate = check_lists<ConsolidateRiemannianWalk>(kName,
                                                                  {{{"importances", importances},
                                                                    {"anchors", anchors},
                                                                    {"fisher", fisher},
                                                                    {"score", score},
                                                                    {"params", params}}},
                                                                  4);
  const auto merge = check_lists<MergeRiemannianWalkScore>(
      kName, {{{"score", score}, {"task_score", task_score}}}, 0);
  const auto maximum = check_lists<Maximum>(kName, {{{"fisher", dense_fisher}}}, 0);
  const at::Tensor max_score = run(merge, MergeRiemannianWalkScore{mix}, at::kDouble);
  const at::Tensor max_fisher = run(maximum, Maximum{}, at::kDouble);
  run(consolidate, ConsolidateRiemannianWalk{max_fisher.const_data_ptr<double>(),
                                             max_score.const_data_ptr<double>()});
  mark_changed({importances, anchors, score, task_score});
}

}  // namespace clext

TORCH_LIBRARY(clext, m) {
  // Shape functions and autograd formulas live there.
  m.set_python_module("clext.ops.torch_library");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("quadratic_penalty(Tensor[] params, Tensor[] anchors, Tensor[] importances) -> Tensor",
        tags);
  m.def(
      "quadratic_penalty_backward(Tensor grad, Tensor[] params, Tensor[] anchors, "
      "Tensor[] importances) -> Tensor[]",
      tags);
  m.def(
      "add_quadratic_penalty_grad_(Tensor(a!)[] grads, Tensor[] params, Tensor[] anchors, "
      "Tensor[] importances, float strength) -> Tensor",
      tags);
  m.def(
      "accumulate_path_integral_(Tensor(a!)[] path, Tensor[] params, Tensor[] starts, "
      "Tensor[] task_grads) -> ()",
      tags);
  m.def(
      "riemannian_walk_step_(Tensor(a!)[] path, Tensor(b!)[] fisher, Tensor[] params, "
      "Tensor[] starts, Tensor[] task_grads, float decay) -> ()",
      tags);
  m.def(
      "accumulate_riemannian_walk_score_(Tensor(a!)[] task_score, Tensor(b!)[] path, "
      "Tensor(c!)[] interval_start, Tensor[] fisher, Tensor[] params, float eps) -> ()",
      tags);
  m.def("accumulate_square_(Tensor(a!)[] acc, Tensor[] grads, float scale) -> ()", tags);
  m.def("accumulate_abs_(Tensor(a!)[] acc, Tensor[] grads, float scale) -> ()", tags);
  m.def("sliced_importance_(Tensor(a!)[] acc, Tensor[] jacobian, Tensor slices, float scale) -> ()",
        tags);
  m.def("per_sample_sum(Tensor features, Tensor grads, *, str function='square') -> Tensor", tags);
  m.def("gradient_gram(Tensor[] rows, Tensor[] grads) -> Tensor", tags);
  m.def("project_gradient_(Tensor(a!)[] grads, Tensor[] rows, Tensor weights) -> ()", tags);
  m.def(
      "consolidate_importance_(Tensor(a!)[] importances, Tensor(b!)[] anchors, "
      "Tensor[] estimate, Tensor[] params, float gamma) -> ()",
      tags);
  m.def(
      "consolidate_all_anchors_(Tensor(a!)[] importances, Tensor(b!)[] anchors, "
      "Tensor[] estimate, Tensor[] params, float gamma) -> Tensor",
      tags);
  m.def(
      "consolidate_path_integral_(Tensor(a!)[] importances, Tensor(b!)[] anchors, "
      "Tensor(c!)[] path, Tensor[] params, float xi, *, bool clamp_total=False) -> ()",
      tags);
  m.def(
      "consolidate_riemannian_walk_(Tensor(a!)[] importances, Tensor(b!)[] anchors, "
      "Tensor(c!)[] score, Tensor(d!)[] task_score, Tensor[] fisher, Tensor[] params, "
      "float mix) -> ()",
      tags);
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, "
      "Tensor(d!)[] steps, Tensor(e!)[] path, Tensor(f!)[] fisher, Tensor[] anchors, "
      "Tensor[] importances, *, Tensor lr, float momentum=0, float dampening=0, "
      "float weight_decay=0, bool nesterov=False, bool maximize=False, float strength=0, "
      "float decay=0, bool proximal=False, bool clear_grad=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, Tensor? clip=None) -> Tensor",
      tags);
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] path, Tensor(g!)[] fisher, "
      "Tensor[] anchors, Tensor[] importances, *, Tensor lr, float beta1, float beta2, float eps, "
      "float weight_decay=0, bool decoupled=False, bool maximize=False, float strength=0, "
      "float decay=0, bool proximal=False, bool clear_grad=False, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, Tensor? clip=None) -> Tensor",
      tags);
}

namespace {

// The functions find the device themselves, so both dispatch keys get the same ones.
void register_kernels(torch::Library& m) {
  m.impl("quadratic_penalty", TORCH_FN(clext::quadratic_penalty));
  m.impl("quadratic_penalty_backward", TORCH_FN(clext::quadratic_penalty_backward));
  m.impl("add_quadratic_penalty_grad_", TORCH_FN(clext::add_quadratic_penalty_grad_));
  m.impl("accumulate_path_integral_", TORCH_FN(clext::accumulate_path_integral_));
  m.impl("riemannian_walk_step_", TORCH_FN(clext::riemannian_walk_step_));
  m.impl("accumulate_riemannian_walk_score_", TORCH_FN(clext::accumulate_riemannian_walk_score_));
  m.impl("accumulate_square_", TORCH_FN(clext::accumulate_square_));
  m.impl("accumulate_abs_", TORCH_FN(clext::accumulate_abs_));
  m.impl("sliced_importance_", TORCH_FN(clext::sliced_importance_));
  m.impl("gradient_gram", TORCH_FN(clext::gradient_gram));
  m.impl("project_gradient_", TORCH_FN(clext::project_gradient_));
  m.impl("consolidate_importance_", TORCH_FN(clext::consolidate_importance_));
  m.impl("consolidate_all_anchors_", TORCH_FN(clext::consolidate_all_anchors_));
  m.impl("consolidate_path_integral_", TORCH_FN(clext::consolidate_path_integral_));
  m.impl("consolidate_riemannian_walk_", TORCH_FN(clext::consolidate_riemannian_walk_));
  m.impl("sgd_step_", TORCH_FN(clext::sgd_step_));
  m.impl("adam_step_", TORCH_FN(clext::adam_step_));
}

}  // namespace

TORCH_LIBRARY_IMPL(clext, CPU, m) {
  register_kernels(m);
  // On a GPU the matrix products of torch's own library serve best, as the reference takes them.
  m.impl("per_sample_sum", TORCH_FN(clext::per_sample_sum));
}

#if defined(CLEXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(clext, CUDA, m) { register_kernels(m); }
#endif
