// SCP's sliced projections (Kolouri et al. 2020, Sliced Cramer Preservation, ICLR).
#pragma once

#include "math/element.h"

namespace clext {

// sum_l (xi_l . j)^2 over L slices is the quadratic form j^T (Xi^T Xi) j, so that the cost does not
// depend on L. j is the element's column of the Jacobian: one value per model output.
struct SlicedImportance {
  using lists = Lists<UpdateState, ReadRows>;
  static constexpr Reduction reduction = Reduction::None;

  const void* gram;  // [outputs, outputs] in the accumulate type, on the device of the lists
  int64_t outputs;
  double scale;

  template <class A>
  CLEXT_HOST_DEVICE void operator()(A& acc, Rows<A> jacobian) const {
    const A* row = static_cast<const A*>(gram);
    A form = A(0);
    for (int64_t k = 0; k < outputs; ++k, row += outputs) {
      A projected = A(0);
      for (int64_t m = 0; m < outputs; ++m) projected += row[m] * jacobian[m];
      form += jacobian[k] * projected;
    }
    // The form is a sum of squares; rounding must not make it negative.
    acc += A(scale) * positive_part(form);
  }
};

}  // namespace clext
