#include "math/importance.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const AccumulateSquare&, double*, void*);
template void apply_cuda(const TensorLists&, const AccumulateAbs&, double*, void*);
template void apply_cuda(const TensorLists&, const ConsolidateImportance&, double*, void*);
template void apply_cuda(const TensorLists&, const ConsolidateAllAnchors&, double*, void*);

}  // namespace clext
