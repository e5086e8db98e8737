#include "math/path.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const AccumulatePathIntegral&, double*, void*);
template void apply_cuda(const TensorLists&, const RiemannianWalkStep&, double*, void*);
template void apply_cuda(const TensorLists&, const AccumulateRiemannianWalkScore&, double*, void*);
template void apply_cuda(const TensorLists&, const ConsolidatePathIntegral&, double*, void*);
template void apply_cuda(const TensorLists&, const MergeRiemannianWalkScore&, double*, void*);
template void apply_cuda(const TensorLists&, const Maximum&, double*, void*);
template void apply_cuda(const TensorLists&, const ConsolidateRiemannianWalk&, double*, void*);

}  // namespace clext
