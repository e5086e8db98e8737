// What the fused optimizer steps have in common: the step of an optimizer (sgd.h, adam.h), with the
// pull to the anchor before it and the method's path integral after it, while the parameter, its
// gradient and its movement are in registers. SI (Zenke et al. 2017, arXiv:1703.04200), RWalk
// (Chaudhry et al. 2018, arXiv:1801.10112).
#pragma once

#include <cmath>

#include "math/device_scalar.h"
#include "math/element.h"
#include "math/path.h"
#include "math/storage.h"

namespace clext {

// What a method has asked of the step; each level includes those before it.
enum class Protection {
  None,
  Pull,  // the penalty's gradient (or its proximal form) and value: anchor, importance
  Path,  // and the path integral of the task's gradient
  Walk,  // and the moving average of its square
};

namespace detail {

template <Protection P>
struct ProtectionLists {
  using type = Lists<>;
};
template <>
struct ProtectionLists<Protection::Pull> {
  using type = Lists<ReadConsolidated, ReadConsolidated>;
};
template <>
struct ProtectionLists<Protection::Path> {
  using type = Lists<ReadConsolidated, ReadConsolidated, UpdateState>;
};
template <>
struct ProtectionLists<Protection::Walk> {
  using type = Lists<ReadConsolidated, ReadConsolidated, UpdateState, UpdateState>;
};

}  // namespace detail

// anchor, importance, path, fisher: as many as the protection needs.
template <Protection P>
using protection_lists_t = typename detail::ProtectionLists<P>::type;

// Steps are skipped as a whole where a GradScaler found a gradient that is not finite.
CLEXT_HOST_DEVICE bool is_found(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

struct StepOptions {
  DeviceScalar lr;
  const float* grad_scale = nullptr;  // gradients are this many times too large; null: they are not
  const float* found_inf = nullptr;
  // Of the task's gradient, where it moves the parameter: what its movement is measured with is the
  // gradient as it was before clipping.
  DeviceScalar clip = {nullptr, false, 1};
  double weight_decay = 0;
  bool decoupled = false;  // weight decay beside the gradient (AdamW), not in it
  bool maximize = false;
  double strength = 0;
  double decay = 0;  // of the moving average of the squared gradient
  bool proximal = false;
  bool clear = false;  // the gradients, when they have been used
};

template <Protection P>
struct FusedStep : StepOptions {
  static constexpr bool rounds = true;
  static constexpr Reduction reduction =
      P == Protection::None ? Reduction::None : Reduction::Sum;  // of the penalty's value

  // A division less for most steps.
  static constexpr bool StepOptions::* mode =
      P == Protection::None ? nullptr : &StepOptions::proximal;

  // Coefficients of the formula, ready after prepare().
  double rate = 0;
  double grad_factor = 1;
  double clipped_factor = 1;
  double keep = 1;         // the share of the parameter that decoupled weight decay leaves
  double grad_weight = 0;  // what other weight decay adds to the gradient, times the parameter
  double pull = 0;
  double prox = 0;
  bool skipped = false;

  CLEXT_HOST_DEVICE void prepare() {
    skipped = is_found(found_inf);
    rate = lr.read();
    grad_factor = maximize ? -1.0 : 1.0;
    if (grad_scale != nullptr) grad_factor /= static_cast<double>(*grad_scale);
    clipped_factor = grad_factor * clip.read();
    keep = decoupled ? 1 - rate * weight_decay : 1;
    grad_weight = decoupled ? 0 : weight_decay;
    pull = proximal ? 0 : 2 * strength;
    prox = 2 * rate * strength;
  }

  CLEXT_HOST_DEVICE bool skip() const { return skipped; }

 protected:
  // Adds the penalty's gradient to `grad` and returns the penalty's value.
  template <class A>
  CLEXT_HOST_DEVICE A add_pull(A&, A) const {
    return A(0);
  }

  template <class A, class... S>
  CLEXT_HOST_DEVICE A add_pull(A& grad, A param, A anchor, A importance, const S&...) const {
    const A difference = param - anchor;
    const A tension = importance * difference;
    grad += A(pull) * tension;
    return A(strength) * tension * difference;
  }

  // Lets the parameter go to `target`; `task_grad` is the task's gradient, not clipped.
  template <class T, class A>
  CLEXT_HOST_DEVICE void move(StorageTag<T>, A& param, A target, A) const {
    param = target;
  }

  template <class T, class A>
  CLEXT_HOST_DEVICE void move(StorageTag<T>, A& param, A target, A, A anchor, A importance) const {
    param = pulled(target, anchor, importance);
  }

  // What the path integral counts is the movement that is stored: in bfloat16 most of a small step
  // is rounded away.
  template <class T, class A>
  CLEXT_HOST_DEVICE void move(StorageTag<T>, A& param, A target, A task_grad, A anchor,
                              A importance, A& path) const {
    const A stored = to_accumulate(from_accumulate<T>(pulled(target, anchor, importance)));
    path -= path_change(task_grad, stored - param);
    param = stored;
  }

  template <class T, class A>
  CLEXT_HOST_DEVICE void move(StorageTag<T> tag, A& param, A target, A task_grad, A anchor,
                              A importance, A& path, A& fisher) const {
    const A before = param;
    move(tag, param, target, task_grad, anchor, importance, path);
    fisher = average_square(fisher, task_grad, param - before, A(decay));
  }

 private:
  // The proximal step solves for the pull at its end, so that no importance is too large for it.
  template <class A>
  CLEXT_HOST_DEVICE A pulled(A target, A anchor, A importance) const {
    if (!proximal) return target;
    const A weight = A(prox) * importance;
    return (target + weight * anchor) / (A(1) + weight);
  }
};

}  // namespace clext
