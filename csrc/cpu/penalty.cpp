#include "math/penalty.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const QuadraticPenalty&, double*, int);
template void apply_cpu(const TensorLists&, const QuadraticPenaltyBackward&, double*, int);
template void apply_cpu(const TensorLists&, const AddQuadraticPenaltyGrad<false>&, double*, int);
template void apply_cpu(const TensorLists&, const AddQuadraticPenaltyGrad<true>&, double*, int);

}  // namespace clext
