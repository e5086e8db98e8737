// Every element formula of csrc/math against the formula of its paper, written out in double.
#include <limits>

#include "check.h"
#include "math/importance.h"
#include "math/path.h"
#include "math/penalty.h"
#include "math/sliced.h"

using namespace clext;
using namespace clext::test;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class A>
constexpr double kTolerance = std::is_same_v<A, float> ? 1e-5 : 1e-13;

// Random arguments, exact in A, so that formula and expectation start from the same numbers.
template <class A>
struct Sample {
  A param, anchor, grad, path, start;            // any sign
  A importance, estimate, fisher, score, other;  // not negative
};

template <class A>
std::vector<Sample<A>> samples() {
  constexpr size_t kCount = 500;
  const std::vector<A> v = cast_to<A>(normal_values(10 * kCount, 7));
  std::vector<Sample<A>> result;
  for (size_t i = 0; i < 10 * kCount; i += 10) {
    result.push_back({v[i], v[i + 1], v[i + 2], v[i + 3], v[i + 4], std::abs(v[i + 5]),
                      std::abs(v[i + 6]), std::abs(v[i + 7]), std::abs(v[i + 8]),
                      std::abs(v[i + 9])});
  }
  return result;
}

template <class A>
void penalty() {
  const double strength = 0.75;
  const double grad_output = -1.5;
  QuadraticPenaltyBackward backward{&grad_output};
  prepare(backward);
  for (const Sample<A>& s : samples<A>()) {
    const double difference = double(s.param) - s.anchor;
    const double value = s.importance * difference * difference;
    check_near(QuadraticPenalty{}(s.param, s.anchor, s.importance), value, kTolerance<A>,
               "penalty");
    A grad = A(99);
    backward(grad, s.param, s.anchor, s.importance);
    check_near(grad, grad_output * 2 * s.importance * difference, kTolerance<A>, "its gradient");
    grad = s.grad;
    const A added = AddQuadraticPenaltyGrad<false>{strength}(grad, s.param, s.anchor, s.importance);
    check_near(added, strength * value, kTolerance<A>, "value with strength");
    check_near(grad, s.grad + 2 * strength * s.importance * difference, kTolerance<A>,
               "added grad");
    A kept = s.grad;
    A task_grad = A(99);
    A start = A(99);
    AddQuadraticPenaltyGrad<true>{strength}(kept, s.param, s.anchor, s.importance, task_grad,
                                            start);
    check(kept == grad && task_grad == s.grad && start == s.param, "what is kept before the pull");
  }
}

template <class A>
void path_steps() {
  const double decay = 0.9;
  for (const Sample<A>& s : samples<A>()) {
    const double credit = s.path - double(s.grad) * (double(s.param) - s.start);
    const double fisher = decay * s.fisher + (1 - decay) * double(s.grad) * s.grad;
    A path = s.path;
    AccumulatePathIntegral{}(path, s.param, s.start, s.grad);
    check_near(path, credit, 4 * kTolerance<A>, "SI path");
    path = s.path;
    A average = s.fisher;
    RiemannianWalkStep{decay}(path, average, s.param, s.start, s.grad);
    check_near(path, credit, 4 * kTolerance<A>, "RWalk path");
    check_near(average, fisher, 4 * kTolerance<A>, "RWalk Fisher average");
  }
}

// The gradients of a step that was skipped, and of one without any.
template <class A>
void path_of_skipped_steps() {
  const A inf = std::numeric_limits<A>::infinity();
  for (const A grad : {inf, -inf, inf - inf, A(0)}) {
    A path = 3, fisher = 5;
    RiemannianWalkStep{0.9}(path, fisher, A(2), A(2), grad);
    check(path == 3, "a parameter that stayed earns nothing");
    check(fisher == (grad == 0 ? A(0.9) * 5 : A(5)), "and its gradient is not averaged in");
    RiemannianWalkStep{0.9}(path, fisher, A(2.5), A(2), grad);
    check(is_finite(path) == (grad == 0), "a parameter that moved shows the gradient");
    check(is_finite(fisher) == (grad == 0), "so does its average");
    check(grad != 0 || path == 3, "no gradient, no credit");
  }
}

template <class A>
void path_scores() {
  const double eps = 1e-3;
  const double xi = 0.1;
  for (const Sample<A>& s : samples<A>()) {
    const double distance = double(s.param) - s.anchor;
    const double decrease = s.path > 0 ? double(s.path) : 0.0;
    A score = s.score;
    A path = s.path;
    A start = s.anchor;
    AccumulateRiemannianWalkScore{eps}(score, path, start, s.fisher, s.param);
    check_near(score, s.score + decrease / (s.fisher * distance * distance / 2 + eps),
               10 * kTolerance<A>, "RWalk score");
    check(path == 0 && start == s.param, "RWalk starts a new interval");
    A importance = s.importance;
    A anchor = s.anchor;
    path = s.path;
    ConsolidatePathIntegral{xi}(importance, anchor, path, s.param);
    check_near(importance, s.importance + decrease / (distance * distance + xi), kTolerance<A>,
               "SI importance");
    check(path == 0 && anchor == s.param, "SI starts a new task");
    importance = s.importance;
    anchor = s.anchor;
    path = s.path;
    ConsolidatePathIntegral{xi, true}(importance, anchor, path, s.param);
    const double total = s.importance + double(s.path) / (distance * distance + xi);
    check_near(importance, total > 0 ? total : 0.0, 10 * kTolerance<A>, "SI total importance");
  }
}

template <class A>
void riemannian_walk_consolidation() {
  const double mix = 0.25;
  const double max_fisher = 4;
  const double max_score = 3;
  ConsolidateRiemannianWalk consolidate{&max_fisher, &max_score};
  prepare(consolidate);
  for (const Sample<A>& s : samples<A>()) {
    A score = s.score;
    A task_score = s.other;
    const A merged = MergeRiemannianWalkScore{mix}(score, task_score);
    check_near(score, 0.75 * s.score + 0.25 * s.other, kTolerance<A>, "merged score");
    check(merged == score && task_score == 0, "merged score is returned, the task's is cleared");
    check(Maximum{}(s.fisher) == s.fisher, "maximum sees the value");
    A importance = A(99);
    A anchor = A(99);
    consolidate(importance, anchor, s.fisher, s.score, s.param);
    check_near(importance, s.fisher / max_fisher + s.score / max_score, kTolerance<A>,
               "RWalk importance");
    check(anchor == s.param, "RWalk anchor");
  }
  const double zero = 0;
  ConsolidateRiemannianWalk nothing_learned{&zero, &zero};
  prepare(nothing_learned);
  A importance = A(99);
  A anchor = A(0);
  nothing_learned(importance, anchor, A(0), A(0), A(1));
  check(importance == 0, "a maximum of zero gives no importance, not NaN");
}

template <class A>
void importance() {
  const double scale = 0.125;
  const double gamma = 0.5;
  for (const Sample<A>& s : samples<A>()) {
    A acc = s.importance;
    AccumulateSum{scale}(acc, s.grad);
    check_near(acc, s.importance + scale * s.grad, kTolerance<A>, "sum");
    acc = s.importance;
    AccumulateSquare{scale}(acc, s.grad);
    check_near(acc, s.importance + scale * s.grad * s.grad, kTolerance<A>, "square");
    acc = s.importance;
    AccumulateAbs{scale}(acc, s.grad);
    check_near(acc, s.importance + scale * std::abs(s.grad), kTolerance<A>, "absolute value");
    A merged = s.importance;
    A anchor = s.anchor;
    ConsolidateImportance{gamma}(merged, anchor, s.estimate, s.param);
    check_near(merged, gamma * s.importance + s.estimate, kTolerance<A>, "decayed sum");
    check(anchor == s.param, "the anchor is the parameter");
  }
}

// Two tasks' penalties, at any point, are the merged penalty plus the constant.
template <class A>
void all_anchors() {
  const double gamma = 0.5;
  for (const Sample<A>& s : samples<A>()) {
    A merged = s.importance;
    A anchor = s.anchor;
    const A constant = ConsolidateAllAnchors{gamma}(merged, anchor, s.estimate, s.param);
    const double point = s.grad;
    const double expected = gamma * s.importance * (point - s.anchor) * (point - s.anchor) +
                            s.estimate * (point - s.param) * (point - s.param);
    const double actual = merged * (point - anchor) * (point - anchor) + constant;
    check_near(actual, expected, 10 * kTolerance<A>, "sum of two quadratics");
  }
  A merged = A(0);
  A anchor = A(5);
  const A constant = ConsolidateAllAnchors{gamma}(merged, anchor, A(0), A(2));
  check(merged == 0 && anchor == 2 && constant == 0, "no importance: the anchor moves freely");
}

template <class A>
void sliced() {
  constexpr int64_t kOutputs = 4;
  constexpr int64_t kSlices = 6;
  constexpr int64_t kElements = 25;
  const std::vector<A> slices = cast_to<A>(normal_values(kSlices * kOutputs, 3));
  const std::vector<A> jacobian = cast_to<A>(normal_values(kOutputs * kElements, 4));
  std::vector<A> gram(kOutputs * kOutputs);
  for (int64_t k = 0; k < kOutputs; ++k) {
    for (int64_t m = 0; m < kOutputs; ++m) {
      double sum = 0;
      for (int64_t l = 0; l < kSlices; ++l) {
        sum += double(slices[l * kOutputs + k]) * slices[l * kOutputs + m];
      }
      gram[k * kOutputs + m] = A(sum);
    }
  }
  for (int64_t i = 0; i < kElements; ++i) {
    double expected = 0.5;
    for (int64_t l = 0; l < kSlices; ++l) {
      double projected = 0;
      for (int64_t k = 0; k < kOutputs; ++k) {
        projected += double(slices[l * kOutputs + k]) * jacobian[k * kElements + i];
      }
      expected += 0.25 * projected * projected;
    }
    A acc = A(0.5);
    SlicedImportance{gram.data(), kOutputs, 0.25}(acc, Rows<A>{&jacobian[i], kElements});
    check_near(acc, expected, 10 * kTolerance<A>, "sum over slices of squared projections");
  }
}

template <class A>
void helpers() {
  const A nan = A(kNan);
  check(maximum(A(1), A(2)) == 2 && maximum(A(2), A(1)) == 2, "maximum");
  check(std::isnan(maximum(nan, A(1))) && std::isnan(maximum(A(1), nan)), "maximum keeps NaN");
  check(positive_part(A(-1)) == 0 && positive_part(A(3)) == 3, "positive part");
  check(std::isnan(positive_part(nan)), "positive part keeps NaN");
  check(absolute(A(-2)) == 2 && absolute(A(2)) == 2 && std::isnan(absolute(nan)), "absolute value");
}

template <class A>
void all_formulas() {
  penalty<A>();
  path_steps<A>();
  path_of_skipped_steps<A>();
  path_scores<A>();
  riemannian_walk_consolidation<A>();
  importance<A>();
  all_anchors<A>();
  sliced<A>();
  helpers<A>();
}

}  // namespace

int main() {
  all_formulas<float>();
  all_formulas<double>();
  return report("formulas");
}
