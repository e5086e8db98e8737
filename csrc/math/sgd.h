// Stochastic gradient descent with momentum, as torch.optim.SGD has it.
#pragma once

#include "math/step.h"

namespace clext {

// Counts the steps of each tensor and finds the coefficients of the momentum: the first gradient
// enters the buffer whole.
struct AdvanceSgd {
  using lists = Lists<UpdateState, WriteRows>;
  static constexpr Reduction reduction = Reduction::None;

  const float* found_inf;
  double momentum;
  double dampening;
  bool skipped = false;

  CLEXT_HOST_DEVICE void prepare() { skipped = is_found(found_inf); }
  CLEXT_HOST_DEVICE bool skip() const { return skipped; }

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& step, MutableRows<A> coefficients) const {
    const bool is_first = step == A(0);
    step += A(1);
    coefficients[0] = is_first ? A(0) : A(momentum);
    coefficients[1] = is_first ? A(1) : A(1 - dampening);
  }
};

template <Protection P, bool Momentum>
struct SgdStep;

template <Protection P>
struct SgdStep<P, false> : FusedStep<P> {
  static constexpr const char* name = "sgd_step_";
  using lists = joined_t<Lists<UpdateParameter, ReadAndClearParameter>, protection_lists_t<P>>;
  static constexpr const char* names[] = {"params",      "grads", "anchors",
                                          "importances", "path",  "fisher"};

  template <class T, class A, class... S>
  CLEXT_HOST_DEVICE A operator()(StorageTag<T> tag, A& param, A grad, S&... protection) const {
    A direction = A(this->clipped_factor) * grad;
    const A value = this->add_pull(direction, param, protection...);
    direction += A(this->grad_weight) * param;
    this->move(tag, param, A(this->keep) * param - A(this->rate) * direction,
               A(this->grad_factor) * grad, protection...);
    return value;
  }
};

template <Protection P>
struct SgdStep<P, true> : FusedStep<P> {
  static constexpr const char* name = "sgd_step_";
  using lists = joined_t<Lists<UpdateParameter, ReadAndClearParameter, UpdateState>,
                         protection_lists_t<P>, Lists<ReadScalars>>;
  static constexpr const char* names[] = {
      "params", "grads", "momentum_buffers", "anchors", "importances", "path", "fisher"};

  double momentum;
  bool nesterov;
  double momentum_now = 0;
  double gain = 0;

  template <class A>
  CLEXT_HOST_DEVICE void prepare_tensor(const A* coefficients) {
    momentum_now = coefficients[0];
    gain = coefficients[1];
  }

  template <class T, class A, class... S>
  CLEXT_HOST_DEVICE A operator()(StorageTag<T> tag, A& param, A grad, A& buffer,
                                 S&... protection) const {
    A total = A(this->clipped_factor) * grad;
    const A value = this->add_pull(total, param, protection...);
    total += A(this->grad_weight) * param;
    buffer = A(momentum_now) * buffer + A(gain) * total;
    const A ahead = total + A(momentum) * buffer;
    const A direction = nesterov ? ahead : buffer;
    this->move(tag, param, A(this->keep) * param - A(this->rate) * direction,
               A(this->grad_factor) * grad, protection...);
    return value;
  }
};

}  // namespace clext
