// Adam (Kingma and Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov and Hutter 2019,
// arXiv:1711.05101).
#pragma once

#include "math/step.h"

namespace clext {

// Counts the steps of each tensor and corrects for the averages' start at zero. In double, and once
// a tensor: 1 - beta^t would lose half its digits in float.
struct AdvanceAdam {
  using lists = Lists<UpdateState, WriteRows>;
  static constexpr Reduction reduction = Reduction::None;

  DeviceScalar lr;
  const float* found_inf;
  double log_beta1;
  double log_beta2;
  double rate = 0;
  bool skipped = false;

  CLEXT_HOST_DEVICE void prepare() {
    skipped = is_found(found_inf);
    rate = lr.read();
  }
  CLEXT_HOST_DEVICE bool skip() const { return skipped; }

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& step, MutableRows<A> coefficients) const {
    step += A(1);
    const double t = static_cast<double>(step);
    coefficients[0] = A(rate / -std::expm1(t * log_beta1));
    coefficients[1] = A(1 / std::sqrt(-std::expm1(t * log_beta2)));
  }
};

template <Protection P>
struct AdamStep : FusedStep<P> {
  static constexpr const char* name = "adam_step_";
  using lists = joined_t<Lists<UpdateParameter, ReadAndClearParameter, UpdateState, UpdateState>,
                         protection_lists_t<P>, Lists<ReadScalars>>;
  static constexpr const char* names[] = {"params",  "grads",       "exp_avgs", "exp_avg_sqs",
                                          "anchors", "importances", "path",     "fisher"};

  double beta1;
  double beta2;
  double eps;
  double step_size = 0;
  double correction = 0;  // of the root of the second average

  template <class A>
  CLEXT_HOST_DEVICE void prepare_tensor(const A* coefficients) {
    step_size = coefficients[0];
    correction = coefficients[1];
  }

  template <class T, class A, class... S>
  CLEXT_HOST_DEVICE A operator()(StorageTag<T> tag, A& param, A grad, A& exp_avg, A& exp_avg_sq,
                                 S&... protection) const {
    A total = A(this->clipped_factor) * grad;
    const A value = this->add_pull(total, param, protection...);
    total += A(this->grad_weight) * param;
    // Not the average plus a share of the difference, in which a small gradient could be lost.
    exp_avg = A(beta1) * exp_avg + A(1 - beta1) * total;
    exp_avg_sq = A(beta2) * exp_avg_sq + A(1 - beta2) * total * total;
    const A denominator = std::sqrt(exp_avg_sq) * A(correction) + A(eps);
    const A target = A(this->keep) * param - A(step_size) * exp_avg / denominator;
    this->move(tag, param, target, A(this->grad_factor) * grad, protection...);
    return value;
  }
};

}  // namespace clext
