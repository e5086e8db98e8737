// How the warps of a block share the pairs of a chunk's rows. Plain C++, tested on the host.
//
// A warp works on a tile of kPairTile rows by kPairTile rows, its lanes on the elements. Where
// there are fewer tiles than warps, several warps share a tile, each with a slice of the elements
// and a set of partial results of its own.
#pragma once

#include <cstdint>

#include "cuda/geometry.h"
#include "math/pairs.h"

namespace clext {
namespace cuda {

static constexpr int kPairTile = 4;
static constexpr int kPairWarp = 32;
static constexpr int kPairWarps = kThreads / kPairWarp;
static constexpr int kPairStageBytes = 32 * 1024;  // of shared memory
static constexpr int kMaxPairWidth = 1024;

CLEXT_HOST_DEVICE constexpr int64_t pair_tiles(int64_t values) {
  return pair_count((values + kPairTile - 1) / kPairTile);
}

CLEXT_HOST_DEVICE constexpr int64_t pair_slices(int64_t values) {
  const int64_t slices = kPairWarps / pair_tiles(values);
  return slices < 1 ? 1 : slices;
}

// Partial results of a chunk.
CLEXT_HOST_DEVICE constexpr int64_t pair_partials(int64_t values) {
  return pair_slices(values) * pair_count(values);
}

// Elements that are staged at a time: as many as fit, whole warps where there is room for one.
CLEXT_HOST_DEVICE constexpr int pair_width(int64_t values, int bytes) {
  const int64_t fitting = kPairStageBytes / (values * bytes);
  const int64_t width = fitting < kPairWarp ? fitting : fitting / kPairWarp * kPairWarp;
  return static_cast<int>(width < kMaxPairWidth ? width : kMaxPairWidth);
}

}  // namespace cuda
}  // namespace clext
