// SCP's sliced projections (Kolouri et al. 2020, Sliced Cramer Preservation, ICLR).
#pragma once

#include "math/element.h"

namespace clext {

// sum_l (xi_l . j)^2 over L slices is the quadratic form j^T (Xi^T Xi) j, so that the cost does not
// depend on L. j is the element's column of the Jacobian: one value per model output.
struct SlicedImportance {
  static constexpr const char* name = "sliced_importance_";
  using lists = Lists<UpdateState, ReadRows>;
  static constexpr const char* names[] = {"acc", "jacobian"};
  static constexpr Reduction reduction = Reduction::None;

  const void* gram;  // [outputs, outputs] in the accumulate type, on the device of the lists
  int64_t outputs;
  double scale;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& acc, Rows<A> jacobian) const {
    const auto* row = static_cast<const typename ScalarOf<A>::type*>(gram);
    A form = A(0);
    // The matrix is symmetric: what lies below its diagonal counts twice.
    for (int64_t k = 0; k < outputs; ++k, row += outputs) {
      A below = A(0);
      for (int64_t m = 0; m < k; ++m) below += row[m] * jacobian[m];
      const A value = jacobian[k];
      form += value * (below + below + row[k] * value);
    }
    // The form is a sum of squares; rounding must not make it negative.
    acc += A(scale) * positive_part(form);
  }
};

}  // namespace clext
