#include "math/adam.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const AdvanceAdam&, double*, void*);
template void apply_cuda(const TensorLists&, const AdamStep<Protection::None>&, double*, void*);
template void apply_cuda(const TensorLists&, const AdamStep<Protection::Pull>&, double*, void*);
template void apply_cuda(const TensorLists&, const AdamStep<Protection::Path>&, double*, void*);
template void apply_cuda(const TensorLists&, const AdamStep<Protection::Walk>&, double*, void*);

}  // namespace clext
