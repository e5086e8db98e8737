#include "cpu/multi_tensor.h"

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

}  // namespace clext
