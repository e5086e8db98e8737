// Importance estimates: sums of gradients, squared or absolute ones, and how a task's estimate
// joins the old ones. EWC (Kirkpatrick et al. 2017, arXiv:1612.00796), MAS (Aljundi et al. 2018,
// arXiv:1711.09601).
#pragma once

#include "math/element.h"

namespace clext {

// Of per-sample sums alone: not an op.
struct AccumulateSum {
  using lists = Lists<UpdateState, ReadParameter>;
  static constexpr Reduction reduction = Reduction::None;

  double scale;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& acc, const A& grad) const {
    acc += A(scale) * grad;
  }
};

struct AccumulateSquare {
  static constexpr const char* name = "accumulate_square_";
  using lists = Lists<UpdateState, ReadParameter>;
  static constexpr const char* names[] = {"acc", "grads"};
  static constexpr Number numbers[] = {{"scale", Number::NotNegative}};
  static constexpr Reduction reduction = Reduction::None;

  double scale;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& acc, const A& grad) const {
    acc += A(scale) * grad * grad;
  }
};

struct AccumulateAbs {
  static constexpr const char* name = "accumulate_abs_";
  using lists = Lists<UpdateState, ReadParameter>;
  static constexpr const char* names[] = {"acc", "grads"};
  static constexpr Number numbers[] = {{"scale", Number::NotNegative}};
  static constexpr Reduction reduction = Reduction::None;

  double scale;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& acc, const A& grad) const {
    acc += A(scale) * absolute(grad);
  }
};

struct ConsolidateImportance {
  static constexpr const char* name = "consolidate_importance_";
  using lists = Lists<UpdateConsolidated, WriteConsolidated, ReadState, ReadParameter>;
  static constexpr const char* names[] = {"importances", "anchors", "estimate", "params"};
  static constexpr Number numbers[] = {{"gamma", Number::Fraction}};
  static constexpr Reduction reduction = Reduction::None;

  double gamma;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& importance, A& anchor, A estimate, A param) const {
    importance = A(gamma) * importance + estimate;
    anchor = param;
  }
};

// Keeps  sum_k F_k (theta - theta_k)^2  of all tasks k exactly, as one quadratic
// A (theta - B/A)^2 + constant: A = sum F_k is the importance, B/A = sum F_k theta_k / A the
// anchor. Returns the element's share of the constant's increase.
struct ConsolidateAllAnchors {
  static constexpr const char* name = "consolidate_all_anchors_";
  using lists = Lists<UpdateConsolidated, UpdateConsolidated, ReadState, ReadParameter>;
  static constexpr const char* names[] = {"importances", "anchors", "estimate", "params"};
  static constexpr Number numbers[] = {{"gamma", Number::Fraction}};
  static constexpr Reduction reduction = Reduction::Sum;

  double gamma;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(A& importance, A& anchor, A estimate, A param) const {
    const A old_importance = A(gamma) * importance;
    const A difference = param - anchor;
    importance = old_importance + estimate;
    // Where no task has asked for anything the anchor is free: take the newest parameter.
    const A weight = importance > A(0) ? estimate / importance : A(1);
    anchor += weight * difference;
    return old_importance * weight * difference * difference;
  }
};

}  // namespace clext
