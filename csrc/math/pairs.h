// How the results of Reduction::Pairs are numbered: those of a symmetric matrix, its lower triangle
// row by row.
#pragma once

#include "math/element.h"

namespace clext {

CLEXT_HOST_DEVICE constexpr int64_t pair_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

CLEXT_HOST_DEVICE constexpr int64_t pair_count(int64_t values) { return pair_index(values, 0); }

}  // namespace clext
