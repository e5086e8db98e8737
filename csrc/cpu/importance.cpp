#include "math/importance.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const AccumulateSquare&, double*, int);
template void apply_cpu(const TensorLists&, const AccumulateAbs&, double*, int);
template void apply_cpu(const TensorLists&, const ConsolidateImportance&, double*, int);
template void apply_cpu(const TensorLists&, const ConsolidateAllAnchors&, double*, int);

}  // namespace clext
