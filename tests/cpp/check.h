// Checks for tests that need nothing but a C++ compiler: a failed check prints where and what, and
// the program ends with 1.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace clext::test {

inline int failures = 0;
inline int checks = 0;

inline void check(bool holds, const char* what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  ++checks;
  if (holds) return;
  // One broken formula fails in a loop of thousands; the first few say all there is to say.
  if (++failures <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
}

// Equal up to `tolerance` times the magnitude (at least 1); NaN equals NaN.
inline void check_near(double actual, double expected, double tolerance, const char* what,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const bool near = std::isnan(expected)
                        ? std::isnan(actual)
                        : actual == expected || std::abs(actual - expected) <=
                                                    tolerance * std::fmax(1, std::abs(expected));
  if (!near && failures < 20) std::printf("  got %.17g, expected %.17g\n", actual, expected);
  check(near, what, file, line);
}

inline std::vector<double> normal_values(size_t count, unsigned seed, double scale = 1) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<double> values(count);
  for (double& value : values) value = normal(generator);
  return values;
}

template <class To>
std::vector<To> cast_to(const std::vector<double>& values) {
  return std::vector<To>(values.begin(), values.end());
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return checks > 0 && failures == 0 ? 0 : 1;
}

}  // namespace clext::test
