#include "math/sgd.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const AdvanceSgd&, double*, void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::None, false>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Pull, false>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Path, false>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Walk, false>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::None, true>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Pull, true>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Path, true>&, double*,
                         void*);
template void apply_cuda(const TensorLists&, const SgdStep<Protection::Walk, true>&, double*,
                         void*);

}  // namespace clext
