#include "math/sliced.h"

#include "cpu/multi_tensor.h"

namespace clext {

template void apply_cpu(const TensorLists&, const SlicedImportance&, double*, int);

}  // namespace clext
