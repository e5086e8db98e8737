#include "math/adam.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const AdvanceAdam&, double*, int);
template void apply_cpu(const TensorLists&, const AdamStep<Protection::None>&, double*, int);
template void apply_cpu(const TensorLists&, const AdamStep<Protection::Pull>&, double*, int);
template void apply_cpu(const TensorLists&, const AdamStep<Protection::Path>&, double*, int);
template void apply_cpu(const TensorLists&, const AdamStep<Protection::Walk>&, double*, int);

}  // namespace clext
