// The bridge between the torch side (ops.cpp, plan.cpp) and the kernels. One template per device:
// cpu/*.cpp and cuda/*.cu instantiate it for every functor of csrc/math.
#pragma once

#include <cstdint>

#include "math/element.h"
#include "tensor_lists.h"

namespace clext {

// Runs `op` on every element. For an op with a reduction, partials[c] receives the result of chunk
// c, with Reduction::Pairs pair_partials_*() of them; otherwise `partials` is not used and may be
// null. The result does not depend on `threads`.
template <class Op>
void apply_cpu(const TensorLists& lists, const Op& op, double* partials, int threads);

// The same on a GPU: `partials` is device memory, `stream` a cudaStream_t. Asynchronous; no host
// synchronisation, so that a launch can be captured in a CUDA graph.
template <class Op>
void apply_cuda(const TensorLists& lists, const Op& op, double* partials, void* stream);

// Folds `count` partial results in a fixed order into out[0], a Float32 or Float64 as `type` says;
// 0 for an empty range.
void reduce_partials_cpu(const double* partials, int64_t count, Reduction reduction, void* out,
                         StorageType type);
void reduce_partials_cuda(const double* partials, int64_t count, Reduction reduction, void* out,
                          StorageType type, void* stream);

// How many partial results a chunk leaves with Reduction::Pairs, where an element has `values`
// numbers: one for each pair, or several such sets.
int64_t pair_partials_cpu(int64_t values);
int64_t pair_partials_cuda(int64_t values);

// Adds up `count` partial results of chunks one after the other, for each pair in a fixed order, as
// a symmetric matrix out[values, values].
void reduce_pairs_cpu(const double* partials, int64_t count, int64_t values, double* out);
void reduce_pairs_cuda(const double* partials, int64_t count, int64_t values, double* out,
                       void* stream);

}  // namespace clext
