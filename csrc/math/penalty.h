// The quadratic penalty  sum_i Omega_i (theta_i - theta*_i)^2  and its gradient.
#pragma once

#include "math/element.h"

namespace clext {

struct QuadraticPenalty {
  static constexpr const char* name = "quadratic_penalty";
  using lists = Lists<ReadParameter, ReadConsolidated, ReadConsolidated>;
  static constexpr const char* names[] = {"params", "anchors", "importances"};
  static constexpr Reduction reduction = Reduction::Sum;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A param, A anchor, A importance) const {
    const A difference = param - anchor;
    return importance * difference * difference;
  }
};

struct QuadraticPenaltyBackward {
  static constexpr const char* name = "quadratic_penalty_backward";
  using lists = Lists<WriteParameter, ReadParameter, ReadConsolidated, ReadConsolidated>;
  static constexpr const char* names[] = {"grads", "params", "anchors", "importances"};
  static constexpr Reduction reduction = Reduction::None;

  // The incoming gradient stays on the device: reading it on the host would stall the stream.
  const double* grad_output;
  double factor = 0;

  CLEXT_HOST_DEVICE void prepare() { factor = 2 * *grad_output; }

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& grad, A param, A anchor, A importance) const {
    grad = A(factor) * importance * (param - anchor);
  }
};

// Value and gradient in one pass: every list is read once, the gradient is written once. With
// `Keeps` it leaves the gradient of the task alone and the parameter as they are before the step,
// for the path integral of the step that follows.
template <bool Keeps>
struct AddQuadraticPenaltyGrad {
  static constexpr const char* name = "add_quadratic_penalty_grad_";
  using lists = joined_t<Lists<UpdateParameter, ReadParameter, ReadConsolidated, ReadConsolidated>,
                         std::conditional_t<Keeps, Lists<WriteState, WriteState>, Lists<>>>;
  static constexpr const char* names[] = {"grads",       "params",     "anchors",
                                          "importances", "task_grads", "starts"};
  static constexpr Number numbers[] = {{"strength", Number::NotNegative}};
  static constexpr Reduction reduction = Reduction::Sum;

  double strength;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A& grad, A param, A anchor, A importance) const {
    const A difference = param - anchor;
    const A pull = A(strength) * importance * difference;
    grad += A(2) * pull;
    return pull * difference;
  }

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A& grad, A param, A anchor, A importance, A& task_grad,
                                 A& start) const {
    task_grad = grad;
    start = param;
    return (*this)(grad, param, anchor, importance);
  }
};

}  // namespace clext
