// What keeps a step from undoing past tasks: the products of their gradients with the current one,
// and the gradient without its part that conflicts with them. GEM (Lopez-Paz and Ranzato 2017,
// arXiv:1706.08840), A-GEM (Chaudhry et al. 2019, arXiv:1812.00420).
#pragma once

#include "math/element.h"

namespace clext {

// The products of the K past gradients (rows) and the current one, of each with each.
struct GradientGram {
  static constexpr const char* name = "gradient_gram";
  using lists = Lists<ReadRows, ReadParameter>;
  static constexpr const char* names[] = {"rows", "grads"};
  static constexpr Reduction reduction = Reduction::Pairs;

  int64_t outputs;

  template <class A>
  CLEXT_HOST_DEVICE A operator()(const A& left, const A& right) const {
    return left * right;
  }
};

// The dual solution times the past gradients, added to the current one. Most tasks do not conflict
// with a step: their weights are zero, and their gradients are not looked at.
struct ProjectGradient {
  static constexpr const char* name = "project_gradient_";
  using lists = Lists<UpdateParameter, ReadRows>;
  static constexpr const char* names[] = {"grads", "rows"};
  static constexpr Reduction reduction = Reduction::None;
  static constexpr bool row_by_row = true;

  // On the device: reading them on the host would stall the stream.
  const double* weights;
  int64_t outputs;
  bool skipped = false;

  // Without a way out before the end: the weights are read side by side, not one after the other.
  CLEXT_HOST_DEVICE void prepare() {
    skipped = true;
    for (int64_t k = 0; k < outputs; ++k) skipped = skipped & (weights[k] == 0);
  }

  CLEXT_HOST_DEVICE bool skip() const { return skipped; }

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& grad, A row, double weight) const {
    grad += A(weight) * row;
  }
};

}  // namespace clext
