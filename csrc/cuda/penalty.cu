#include "math/penalty.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const QuadraticPenalty&, double*, void*);
template void apply_cuda(const TensorLists&, const QuadraticPenaltyBackward&, double*, void*);
template void apply_cuda(const TensorLists&, const AddQuadraticPenaltyGrad<false>&, double*, void*);
template void apply_cuda(const TensorLists&, const AddQuadraticPenaltyGrad<true>&, double*, void*);

}  // namespace clext
