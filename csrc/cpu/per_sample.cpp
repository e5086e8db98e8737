// Products of whole matrices take a multiply-add in one instruction, as in any BLAS; their bits are
// compared with nothing else.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "cpu/per_sample.h"

#include "math/importance.h"

namespace clext {

template void per_sample_sum_cpu(const PerSampleProducts<float>&, const AccumulateSum&, float*,
                                 int);
template void per_sample_sum_cpu(const PerSampleProducts<double>&, const AccumulateSum&, double*,
                                 int);
template void per_sample_sum_cpu(const PerSampleProducts<float>&, const AccumulateSquare&, float*,
                                 int);
template void per_sample_sum_cpu(const PerSampleProducts<double>&, const AccumulateSquare&, double*,
                                 int);
template void per_sample_sum_cpu(const PerSampleProducts<float>&, const AccumulateAbs&, float*,
                                 int);
template void per_sample_sum_cpu(const PerSampleProducts<double>&, const AccumulateAbs&, double*,
                                 int);

}  // namespace clext
