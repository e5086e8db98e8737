#include "math/projection.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const GradientGram&, double*, int);
template void apply_cpu(const TensorLists&, const ProjectGradient&, double*, int);

}  // namespace clext
