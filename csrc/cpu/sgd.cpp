#include "math/sgd.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const AdvanceSgd&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::None, false>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Pull, false>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Path, false>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Walk, false>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::None, true>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Pull, true>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Path, true>&, double*, int);
template void apply_cpu(const TensorLists&, const SgdStep<Protection::Walk, true>&, double*, int);

}  // namespace clext
