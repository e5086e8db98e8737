// Folding the results of a block of elements, in an order that does not depend on the vector width.
#pragma once

#include <cstdint>
#include <limits>

#include "math/element.h"

namespace clext {
namespace cpu {

// The reduction works on blocks that fit in the first-level cache: element results are written to a
// block, then folded over `kLanes` independent sums that any vector width divides.
static constexpr int64_t kBlockSize = 1024;
static constexpr int64_t kLanes = 16;

template <Reduction R, class A>
CLEXT_HOST_DEVICE A fold(A a, A b) {
  if constexpr (R == Reduction::Max) return maximum(a, b);
  return a + b;
}

// Folds the upper half of the lanes onto the lower half until one is left. The widths are constants
// so that the lanes stay in registers.
template <Reduction R, int64_t Width, class A>
CLEXT_HOST_DEVICE A fold_lanes(const A* lanes) {
  if constexpr (Width == 1) {
    return lanes[0];
  } else {
    A half[Width / 2];
    for (int64_t lane = 0; lane < Width / 2; ++lane) {
      half[lane] = fold<R>(lanes[lane], lanes[lane + Width / 2]);
    }
    return fold_lanes<R, Width / 2>(half);
  }
}

// What changes nothing when it is folded into a lane; lanes begin at zero.
template <Reduction R, class A>
static constexpr A kIdentity = R == Reduction::Max ? -std::numeric_limits<A>::infinity() : A(0);

CLEXT_HOST_DEVICE int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The number of element results in a block of n, filled up with identities to whole lanes.
template <Reduction R, class A>
CLEXT_HOST_DEVICE int64_t pad_block(A* results, int64_t n) {
  const int64_t padded = whole_lanes(n);
  for (int64_t lane = 1; lane <= kLanes; ++lane) results[padded - lane] = kIdentity<R, A>;
  return padded;
}

// Folds a block of element results: element i goes to lane i % kLanes, lanes are folded
// as a tree at the end.
template <Reduction R, class A>
CLEXT_HOST_DEVICE double fold_block(const A* results, int64_t padded) {
  A lanes[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = fold<R>(lanes[lane], results[i + lane]);
    }
  }
  return static_cast<double>(fold_lanes<R, kLanes>(lanes));
}

}  // namespace cpu
}  // namespace clext
