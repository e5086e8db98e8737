#include "math/sliced.h"

#include "cuda/multi_tensor.cuh"

namespace clext {

template void apply_cuda(const TensorLists&, const SlicedImportance&, double*, void*);

}  // namespace clext
