#include "math/projection.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const GradientGram&, double*, void*);
template void apply_cuda(const TensorLists&, const ProjectGradient&, double*, void*);

}  // namespace clext
