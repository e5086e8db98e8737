// Sums over samples of products: every remainder of a tile, overlapping entries, both layouts of
// the gradients, and the same bits for any number of threads.
#include <cmath>

#include "check.h"
#include "cpu/sample_products.h"
#include "math/importance.h"

using namespace clext;
using namespace clext::test;

namespace {

constexpr int64_t kSamples = 3;
constexpr int64_t kGroups = 2;

std::vector<int64_t> steps(int64_t count, int64_t stride) {
  std::vector<int64_t> found(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) found[static_cast<size_t>(i)] = i * stride;
  return found;
}

template <class A>
PerSampleOperand<A> operand(const std::vector<A>& values, int64_t entries, int64_t entry_stride,
                            int64_t rows, int64_t row_stride) {
  const auto matrix = static_cast<int64_t>(values.size()) / kSamples / kGroups;
  return {values.data(), kGroups * matrix, matrix, steps(entries, entry_stride),
          steps(rows, row_stride)};
}

template <class Op, class A>
std::vector<A> run(const PerSampleProducts<A>& products, const Op& op, int threads) {
  std::vector<A> sums(static_cast<size_t>(kGroups) * products.features.entries.size() *
                      products.grads.entries.size());
  per_sample_sum_cpu(products, op, sums.data(), threads);
  return sums;
}

template <class A>
double product(const PerSampleProducts<A>& products, int64_t sample, int64_t group, size_t n,
               size_t m) {
  double total = 0;
  for (size_t r = 0; r < products.grads.rows.size(); ++r) {
    const PerSampleOperand<A>&f = products.features, &g = products.grads;
    total += static_cast<double>(f.group(sample, group)[f.entries[n] + f.rows[r]]) *
             static_cast<double>(g.group(sample, group)[g.entries[m] + g.rows[r]]);
  }
  return total;
}

template <class A>
void sums_are_those_of_single_samples(const PerSampleProducts<A>& products, double tolerance) {
  const std::vector<A> plain = run(products, AccumulateSum{1}, 1);
  const std::vector<A> squares = run(products, AccumulateSquare{1}, 1);
  const std::vector<A> magnitudes = run(products, AccumulateAbs{1}, 1);
  check(run(products, AccumulateSquare{1}, 5) == squares, "the same bits on five threads");
  size_t at = 0;
  for (int64_t group = 0; group < kGroups; ++group) {
    for (size_t n = 0; n < products.features.entries.size(); ++n) {
      for (size_t m = 0; m < products.grads.entries.size(); ++m, ++at) {
        double sum = 0, square = 0, magnitude = 0;
        for (int64_t sample = 0; sample < kSamples; ++sample) {
          const double value = product(products, sample, group, n, m);
          sum += value;
          square += value * value;
          magnitude += std::abs(value);
        }
        check_near(static_cast<double>(plain[at]), sum, tolerance, "sum");
        check_near(static_cast<double>(squares[at]), square, tolerance, "sum of squares");
        check_near(static_cast<double>(magnitudes[at]), magnitude, tolerance, "sum of magnitudes");
      }
    }
  }
}

template <class A>
void check_sizes(int64_t features, int64_t grads, int64_t rows, double tolerance) {
  const auto count = [](int64_t matrix) {
    return static_cast<size_t>(kSamples * kGroups * matrix);
  };
  const auto left = cast_to<A>(normal_values(count(features * rows), 1));
  const auto right = cast_to<A>(normal_values(count(grads * rows), 2));
  const auto apart = operand<A>(left, features, rows, rows, 1);
  // The gradients once with neighbouring entries, once with neighbouring rows.
  for (const auto& g :
       {operand<A>(right, grads, 1, rows, grads), operand<A>(right, grads, rows, rows, 1)}) {
    sums_are_those_of_single_samples<A>({kSamples, kGroups, apart, g}, tolerance);
    if (rows == 0) continue;
    // Windows: entry n at row r is where entry n + 1 is at row r - 1.
    const auto windows = operand<A>(left, std::min<int64_t>(features, 2), 1, rows, 1);
    if (features > 1) {
      sums_are_those_of_single_samples<A>({kSamples, kGroups, windows, g}, tolerance);
    }
  }
}

}  // namespace

int main() {
  for (const int64_t features : {0, 1, 2, 5, 6, 7, 8, 9, 13, 17}) {
    for (const int64_t grads : {0, 1, 3, 4, 7, 8, 9, 16, 17, 32, 35}) {
      for (const int64_t rows : {0, 1, 2, 17}) {
        check_sizes<float>(features, grads, rows, 2e-5);
        check_sizes<double>(features, grads, rows, 1e-13);
      }
    }
  }
  // Enough for threads.
  check_sizes<float>(40, 70, 200, 2e-4);
  check_sizes<double>(40, 70, 200, 1e-12);
  return report("per_sample");
}
