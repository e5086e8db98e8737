#include "math/path.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const AccumulatePathIntegral&, double*, int);
template void apply_cpu(const TensorLists&, const RiemannianWalkStep&, double*, int);
template void apply_cpu(const TensorLists&, const AccumulateRiemannianWalkScore&, double*, int);
template void apply_cpu(const TensorLists&, const ConsolidatePathIntegral&, double*, int);
template void apply_cpu(const TensorLists&, const MergeRiemannianWalkScore&, double*, int);
template void apply_cpu(const TensorLists&, const Maximum&, double*, int);
template void apply_cpu(const TensorLists&, const ConsolidateRiemannianWalk&, double*, int);

}  // namespace clext
