// Path integrals: SI (Zenke et al. 2017, arXiv:1703.04200) and RWalk (Chaudhry et al. 2018,
// arXiv:1801.10112).
#pragma once

#include "math/element.h"

namespace clext {

// What a step takes from the path integral: path_i -= g_i (theta_i(t+1) - theta_i(t)) is the loss
// decrease that parameter i is credited with, g the gradient of the task's loss alone. A parameter
// that stayed earns nothing: a step that a GradScaler has skipped leaves infinite gradients, and
// infinity times zero is not a number.
template <class A>
CLEXT_HOST_DEVICE A path_change(A task_grad, A movement) {
  const A change = task_grad * movement;
  return movement == A(0) ? A(0) : change;
}

// The moving average of the squared gradient; the gradient of a skipped step has no part in it.
template <class A>
CLEXT_HOST_DEVICE A average_square(A average, A task_grad, A movement, A decay) {
  const A next = decay * average + (A(1) - decay) * task_grad * task_grad;
  return movement == A(0) && !is_finite(next) ? average : next;
}

// SI's step, from the parameter and the task's gradient as they were before it.
struct AccumulatePathIntegral {
  static constexpr const char* name = "accumulate_path_integral_";
  using lists = Lists<UpdateState, ReadParameter, ReadState, ReadState>;
  static constexpr const char* names[] = {"path", "params", "starts", "task_grads"};
  static constexpr Reduction reduction = Reduction::None;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& path, A param, A start, A task_grad) const {
    path -= path_change(task_grad, param - start);
  }
};

// SI's step and, from the same gradient, RWalk's moving average of the squared gradient.
struct RiemannianWalkStep {
  static constexpr const char* name = "riemannian_walk_step_";
  using lists = Lists<UpdateState, UpdateState, ReadParameter, ReadState, ReadState>;
  static constexpr const char* names[] = {"path", "fisher", "params", "starts", "task_grads"};
  static constexpr Number numbers[] = {{"decay", Number::Fraction}};
  static constexpr Reduction reduction = Reduction::None;

  double decay;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& path, A& fisher, A param, A start, A task_grad) const {
    const A movement = param - start;
    path -= path_change(task_grad, movement);
    fisher = average_square(fisher, task_grad, movement, A(decay));
  }
};

// The end of an interval: loss decrease per distance travelled, measured in the KL divergence
// F d^2 / 2 that the step caused.
struct AccumulateRiemannianWalkScore {
  static constexpr const char* name = "accumulate_riemannian_walk_score_";
  using lists = Lists<UpdateState, UpdateState, UpdateState, ReadState, ReadParameter>;
  static constexpr const char* names[] = {"task_score", "path", "interval_start", "fisher",
                                          "params"};
  static constexpr Number numbers[] = {{"eps", Number::Positive}};
  static constexpr Reduction reduction = Reduction::None;

  double eps;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& task_score, A& path, A& interval_start, A fisher,
                                    A param) const {
    const A distance = param - interval_start;
    task_score += positive_part(path) / (A(0.5) * fisher * distance * distance + A(eps));
    path = A(0);
    interval_start = param;
  }
};

// SI's end of a task. The anchor still holds theta at the start of the task.
struct ConsolidatePathIntegral {
  static constexpr const char* name = "consolidate_path_integral_";
  using lists = Lists<UpdateConsolidated, UpdateConsolidated, UpdateState, ReadParameter>;
  static constexpr const char* names[] = {"importances", "anchors", "path", "params"};
  static constexpr Number numbers[] = {{"xi", Number::Positive}};
  static constexpr Reduction reduction = Reduction::None;

  double xi;
  // What stays at least zero: each task's share, or the sum, from which a task may then take away.
  bool clamp_total = false;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& importance, A& anchor, A& path, A param) const {
    const A distance = param - anchor;
    const A share = (clamp_total ? path : positive_part(path)) / (distance * distance + A(xi));
    importance = clamp_total ? positive_part(importance + share) : importance + share;
    anchor = param;
    path = A(0);
  }
};

// RWalk's end of a task: the lists of its three passes together.
struct RiemannianWalkEnd {
  static constexpr const char* name = "consolidate_riemannian_walk_";
  using lists = Lists<WriteConsolidated, WriteConsolidated, UpdateState, UpdateState, ReadState,
                      ReadParameter>;
  static constexpr const char* names[] = {"importances", "anchors", "score",
                                          "task_score",  "fisher",  "params"};
  static constexpr Number numbers[] = {{"mix", Number::Fraction}};
};

// First pass: merge the scores and find their maximum.
struct MergeRiemannianWalkScore {
  static constexpr const char* name = RiemannianWalkEnd::name;
  using lists = Lists<UpdateState, UpdateState>;
  static constexpr const char* names[] = {"score", "task_score"};
  static constexpr Reduction reduction = Reduction::Max;

  double mix;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A& score, A& task_score) const {
    score = (A(1) - A(mix)) * score + A(mix) * task_score;
    task_score = A(0);
    return score;
  }
};

struct Maximum {
  static constexpr const char* name = RiemannianWalkEnd::name;
  using lists = Lists<ReadState>;
  static constexpr const char* names[] = {"fisher"};
  static constexpr Reduction reduction = Reduction::Max;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A value) const {
    return value;
  }
};

// Last pass: Fisher and score, each scaled to [0, 1], add up.
struct ConsolidateRiemannianWalk {
  static constexpr const char* name = RiemannianWalkEnd::name;
  using lists = Lists<WriteConsolidated, WriteConsolidated, ReadState, ReadState, ReadParameter>;
  static constexpr const char* names[] = {"importances", "anchors", "fisher", "score", "params"};
  static constexpr Reduction reduction = Reduction::None;

  // Results of the first pass; they stay on the device, like every reduction.
  const double* max_fisher;
  const double* max_score;
  double fisher_scale = 0;
  double score_scale = 0;

  CLEXT_HOST_DEVICE void prepare() {
    fisher_scale = *max_fisher;
    score_scale = *max_score;
  }

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& importance, A& anchor, A fisher, A score, A param) const {
    importance = normalised(fisher, A(fisher_scale)) + normalised(score, A(score_scale));
    anchor = param;
  }

 private:
  // A maximum of zero means that nothing was learned: no importance, rather than 0 / 0.
  template <class A>
  CLEXT_HOST_DEVICE static A normalised(A value, A scale) {
    return scale == A(0) ? A(0) : value / scale;
  }
};

}  // namespace clext
