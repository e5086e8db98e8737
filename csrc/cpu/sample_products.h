// Sums over samples of a function of each single sample's gradient, for a layer whose gradient is a
// product of two matrices: what goes in, times the gradient of what comes out, summed over rows
// (tokens, or the positions of a convolution's kernel). No torch here; ops_per_sample.cpp makes
// these descriptions from tensors.
#pragma once

#include <cstdint>
#include <vector>

namespace clext {

// One of the two: entry e at row r of a sample's group is at `entries[e] + rows[r]` from the
// group's first. Entries may overlap, as the windows of a convolution do.
template <class A>
struct PerSampleOperand {
  const A* first;
  int64_t sample_stride;
  int64_t group_stride;
  std::vector<int64_t> entries;
  std::vector<int64_t> rows;

  const A* group(int64_t sample, int64_t group) const {
    return first + sample * sample_stride + group * group_stride;
  }

  // Whether neighbouring entries are next to each other and fill cache lines, hence any vectors.
  bool has_whole_vectors() const {
    if (entries.size() % kLineEntries != 0) return false;
    for (size_t e = 0; e < entries.size(); ++e) {
      if (entries[e] != static_cast<int64_t>(e)) return false;
    }
    return true;
  }

  static constexpr size_t kLineEntries = 64 / sizeof(A);
};

// The vectors run along the entries of `grads`. Those are copied where they do not lie so; the two
// may change places.
template <class A>
struct PerSampleProducts {
  int64_t samples;
  int64_t groups;
  PerSampleOperand<A> features;
  PerSampleOperand<A> grads;
};

// For each group, entry n of the features and entry m of the gradients, sums[group][n][m] becomes
// the sum over samples s of op's function of the product: the sum over rows r of
// features[s][n][r] * grads[s][m][r]. `op` is AccumulateSum, AccumulateSquare or AccumulateAbs. The
// result does not depend on `threads`.
template <class Op, class A>
void per_sample_sum_cpu(const PerSampleProducts<A>& products, const Op& op, A* sums, int threads);

}  // namespace clext
