#include <vector>

#include "cpu/multi_tensor.h"
#include "math/pairs.h"

namespace clext {

void reduce_partials_cpu(const double* partials, int64_t count, Reduction reduction, void* out,
                         StorageType type) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total = reduction == Reduction::Max ? maximum(total, partials[i]) : total + partials[i];
  }
  if (type == StorageType::Float64) {
    *static_cast<double*>(out) = total;
  } else {
    *static_cast<float*>(out) = static_cast<float>(total);
  }
}

int64_t pair_partials_cpu(int64_t values) { return pair_count(values); }

void reduce_pairs_cpu(const double* partials, int64_t count, int64_t values, double* out) {
  const int64_t pairs = pair_count(values);
  std::vector<double> totals(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < count / pairs; ++i, partials += pairs) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      totals[static_cast<size_t>(pair)] += partials[pair];
    }
  }
  for (int64_t i = 0; i < values; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      out[i * values + j] = out[j * values + i] = totals[static_cast<size_t>(pair_index(i, j))];
    }
  }
}

}  // namespace clext
