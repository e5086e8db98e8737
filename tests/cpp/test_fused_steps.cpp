// The fused optimizer steps of csrc/math against their formulas, written out in double, for every
// protection and all combinations of options.
#include <limits>

#include "check.h"
#include "math/adam.h"
#include "math/sgd.h"

using namespace clext;
using namespace clext::test;

namespace {

constexpr double kLr = 0.05;
constexpr float kScale = 3;
constexpr float kClip = 0.25f;

template <class A>
constexpr double kTolerance = std::is_same_v<A, float> ? 2e-6 : 1e-13;

// All numbers of one element, exact in A so that formula and expectation start from the same.
template <class A>
struct Element {
  A param, grad, anchor, path;   // any sign
  A first;                       // Adam's first average, or SGD's momentum buffer
  A importance, fisher, second;  // not negative
};

template <class A>
std::vector<Element<A>> elements() {
  constexpr size_t kCount = 100;
  const std::vector<A> v = cast_to<A>(normal_values(8 * kCount, 11));
  std::vector<Element<A>> result;
  for (size_t i = 0; i < v.size(); i += 8) {
    result.push_back({v[i], v[i + 1], v[i + 2], v[i + 3], v[i + 4], std::abs(v[i + 5]),
                      std::abs(v[i + 6]), std::abs(v[i + 7])});
  }
  return result;
}

StepOptions options_of(unsigned bits) {
  StepOptions options;
  options.lr.value = kLr;
  options.strength = 0.7;
  options.decay = 0.9;
  if (bits & 1) options.weight_decay = 0.1;
  options.decoupled = bits & 2;
  options.maximize = bits & 4;
  options.proximal = bits & 8;
  if (bits & 16) options.grad_scale = &kScale;
  if (bits & 32) options.clip = {&kClip, false};
  return options;
}
constexpr unsigned kAllOptions = 64;

// The part of a step before the optimizer: the two gradients, and the penalty.
struct Gradients {
  double task, total, value;  // `task` is not clipped
};

template <class A>
Gradients gradients_of(const Element<A>& e, const StepOptions& o, Protection level) {
  const double task = (o.maximize ? -1 : 1) * double(e.grad) / (o.grad_scale ? kScale : 1);
  const bool is_protected = level != Protection::None;
  const double distance = double(e.param) - e.anchor;
  const double pull = is_protected && !o.proximal ? 2 * o.strength * e.importance * distance : 0;
  return {task, o.clip.read() * task + pull + (o.decoupled ? 0 : o.weight_decay * e.param),
          is_protected ? o.strength * e.importance * distance * distance : 0};
}

// The part after it: `moved` is what the optimizer makes of the parameter.
template <class A>
void check_end(const Element<A>& before, const Element<A>& after, const StepOptions& o,
               Protection level, const Gradients& g, double moved) {
  if (level != Protection::None && o.proximal) {
    const double weight = 2 * kLr * o.strength * before.importance;
    moved = (moved + weight * before.anchor) / (1 + weight);
  }
  check_near(after.param, moved, kTolerance<A>, "parameter");
  const bool has_path = level == Protection::Path || level == Protection::Walk;
  const double path = before.path - (has_path ? g.task * (moved - before.param) : 0);
  check_near(after.path, path, 4 * kTolerance<A>, "path integral");
  const double fisher =
      level == Protection::Walk ? 0.9 * before.fisher + (1 - 0.9) * g.task * g.task : before.fisher;
  check_near(after.fisher, fisher, 16 * kTolerance<A>, "average of squared gradients");
}

// Applies a functor with the lists that its protection has.
template <Protection P, class T, class Op, class A, class... Own>
A apply(const Op& op, Element<A>& e, Own&... own) {
  const StorageTag<T> tag;
  if constexpr (P == Protection::None) return op(tag, e.param, e.grad, own...);
  if constexpr (P == Protection::Pull) {
    return op(tag, e.param, e.grad, own..., e.anchor, e.importance);
  }
  if constexpr (P == Protection::Path) {
    return op(tag, e.param, e.grad, own..., e.anchor, e.importance, e.path);
  }
  if constexpr (P == Protection::Walk) {
    return op(tag, e.param, e.grad, own..., e.anchor, e.importance, e.path, e.fisher);
  }
}

template <Protection P, class A>
void adam(unsigned bits, double steps_before) {
  const double beta1 = 0.9, beta2 = 0.99, eps = 1e-3;
  const StepOptions o = options_of(bits);
  A step = A(steps_before);
  A coefficients[2];
  AdvanceAdam advance{o.lr, nullptr, std::log(beta1), std::log(beta2)};
  prepare(advance);
  advance(step, MutableRows<A>{coefficients, 1});
  check(step == A(steps_before + 1), "the step is counted");
  AdamStep<P> op{{o}, beta1, beta2, eps};
  prepare(op);
  op.prepare_tensor(coefficients);
  const double bias1 = 1 - std::pow(beta1, steps_before + 1);
  const double bias2 = 1 - std::pow(beta2, steps_before + 1);
  for (const Element<A>& before : elements<A>()) {
    Element<A> e = before;
    const A value = apply<P, A>(op, e, e.first, e.second);
    const Gradients g = gradients_of(before, o, P);
    check_near(value, g.value, kTolerance<A>, "penalty");
    const double m = beta1 * before.first + (1 - beta1) * g.total;
    const double v = beta2 * before.second + (1 - beta2) * g.total * g.total;
    check_near(e.first, m, kTolerance<A>, "first average");
    check_near(e.second, v, kTolerance<A>, "second average");
    const double base = before.param * (o.decoupled ? 1 - kLr * o.weight_decay : 1);
    check_end(before, e, o, P, g, base - kLr * m / bias1 / (std::sqrt(v / bias2) + eps));
  }
}

template <Protection P, class A>
void plain_sgd(unsigned bits) {
  const StepOptions o = options_of(bits);
  SgdStep<P, false> op{{o}};
  prepare(op);
  for (const Element<A>& before : elements<A>()) {
    Element<A> e = before;
    const A value = apply<P, A>(op, e);
    const Gradients g = gradients_of(before, o, P);
    check_near(value, g.value, kTolerance<A>, "penalty");
    const double base = before.param * (o.decoupled ? 1 - kLr * o.weight_decay : 1);
    check_end(before, e, o, P, g, base - kLr * g.total);
  }
}

template <Protection P, class A>
void momentum_sgd(unsigned bits, double steps_before, bool nesterov) {
  const double momentum = 0.8, dampening = 0.25;
  const StepOptions o = options_of(bits);
  A step = A(steps_before);
  A coefficients[2];
  AdvanceSgd advance{nullptr, momentum, dampening};
  prepare(advance);
  advance(step, MutableRows<A>{coefficients, 1});
  check(step == A(steps_before + 1), "the step is counted");
  SgdStep<P, true> op{{o}, momentum, nesterov};
  prepare(op);
  op.prepare_tensor(coefficients);
  for (const Element<A>& before : elements<A>()) {
    Element<A> e = before;
    apply<P, A>(op, e, e.first);
    const Gradients g = gradients_of(before, o, P);
    const double buffer =
        steps_before == 0 ? g.total : momentum * before.first + (1 - dampening) * g.total;
    check_near(e.first, buffer, kTolerance<A>, "momentum");
    const double base = before.param * (o.decoupled ? 1 - kLr * o.weight_decay : 1);
    check_end(before, e, o, P, g, base - kLr * (nesterov ? g.total + momentum * buffer : buffer));
  }
}

template <Protection P, class A>
void all_steps() {
  for (unsigned bits = 0; bits < kAllOptions; ++bits) {
    plain_sgd<P, A>(bits);
    for (const double steps_before : {0.0, 1.0, 1000.0}) {
      adam<P, A>(bits, steps_before);
      momentum_sgd<P, A>(bits, steps_before, bits % 2 == 0);
    }
  }
}

template <class A>
void all_protections() {
  all_steps<Protection::None, A>();
  all_steps<Protection::Pull, A>();
  all_steps<Protection::Path, A>();
  all_steps<Protection::Walk, A>();
}

// The proximal step is a weighted mean, however large the importance.
void proximal_is_stable() {
  StepOptions o = options_of(8);
  o.strength = 1e10;
  SgdStep<Protection::Pull, false> op{{o}};
  prepare(op);
  Element<float> e{5, 1, -2, 0, 0, 3, 0, 0};
  apply<Protection::Pull, float>(op, e);
  check_near(e.param, -2, 1e-6, "an important parameter goes to its anchor");
}

}  // namespace

int main() {
  all_protections<float>();
  all_protections<double>();
  proximal_is_stable();
  return report("fused_steps");
}
