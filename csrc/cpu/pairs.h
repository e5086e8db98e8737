// The chunk loop of functors with a result for each pair of an element's values
// (Reduction::Pairs): the rows and the list beside them are read once, a block at a time, into the
// nearest caches; there each tile of a few rows by a few rows gives all its pairs, whose sums stay
// in registers meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "cpu/stream.h"
#include "math/element.h"
#include "math/pairs.h"
#include "math/storage.h"

namespace clext {
namespace cpu {

// Elements of a block: two stages of 17 rows stay near, and sums are long enough in registers.
static constexpr int64_t kPairBlock = 512;

// Between the rows of a stage: at a power of two they would meet in the same few places of a cache.
static constexpr int64_t kStageStride = kPairBlock + kLanes;

// Lanes of a pair's sum in float64: the upper half of the others has been folded onto the lower.
static constexpr int64_t kSumLanes = kLanes / 2;

struct alignas(kPackBytes) CacheLine {
  char bytes[kPackBytes];
};

// What a thread needs beside the lists: two blocks of every row, and the lanes of every pair.
template <class A>
class PairScratch {
 public:
  template <class Op>
  explicit PairScratch(const Op& op)
      : stage_size_((op.outputs + 1) * kStageStride),
        sum_count_(pair_count(op.outputs + 1) * kSumLanes),
        lines_(new CacheLine[static_cast<size_t>(lines<A>(2 * stage_size_) +
                                                 lines<double>(sum_count_))]) {}

  A* stage(int64_t block) const {
    return reinterpret_cast<A*>(lines_.get()) + block % 2 * stage_size_;
  }
  double* sums() const {
    return reinterpret_cast<double*>(lines_.get() + lines<A>(2 * stage_size_));
  }
  int64_t sum_count() const { return sum_count_; }

 private:
  template <class N>
  static int64_t lines(int64_t numbers) {
    return numbers * static_cast<int64_t>(sizeof(N)) / kPackBytes;
  }

  int64_t stage_size_;
  int64_t sum_count_;
  std::unique_ptr<CacheLine[]> lines_;
};

struct NoScratch {
  template <class Op>
  explicit NoScratch(const Op&) {}
};

// A block of elements: row k begins at rows + k * row_stride, the last one at `last`.
template <class A>
struct PairBlock {
  const A* rows;
  int64_t row_stride;
  const A* last;
  int64_t row_count;  // with the last
  int64_t size;       // whole lanes
  double* sums;

  CLEXT_HOST_DEVICE const A* row(int64_t k) const {
    return k + 1 < row_count ? rows + k * row_stride : last;
  }
};

// Rows of the next block, which are copied to its stage while a tile computes: memory works on
// while the sums are formed. The rows that will be copied after these are fetched meanwhile, since
// the processor does not foresee where a row goes on.
template <class A>
struct RowsAhead {
  const A* from;
  const A* after;
  int64_t row_stride;
  A* to;
  int64_t count;

  CLEXT_HOST_DEVICE void copy(int64_t i) const {
    for (int64_t k = 0; k < count; ++k) {
      Pack<A, kLanes* static_cast<int64_t>(sizeof(A))> values;
      values.load(from + k * row_stride + i, kLanes);
      values.store(to + k * kStageStride + i, kLanes);
      __builtin_prefetch(after + k * row_stride + i);
    }
  }
};

// Adds the lanes of one pair to its sums.
template <class A>
CLEXT_HOST_DEVICE void add_lanes(double* sums, const A* lanes) {
#pragma omp simd
  for (int64_t k = 0; k < kSumLanes; ++k) {
    sums[k] += static_cast<double>(lanes[k] + lanes[k + kSumLanes]);
  }
}

// Adds the pairs of R rows with C rows. On the diagonal these are the same, and each pair counts
// once.
template <class P, int R, int C, bool Diagonal, class Op, class A>
CLEXT_HOST_DEVICE void add_tile(const Op& op, const PairBlock<A>& block, int64_t first_row,
                                int64_t first_column, const RowsAhead<A>& ahead) {
  const A* left[R];
  const A* right[C];
  for (int r = 0; r < R; ++r) left[r] = block.row(first_row + r);
  for (int c = 0; c < C; ++c) right[c] = block.row(first_column + c);
  alignas(kPackBytes) A lanes[R][C][kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += P::kSize) {
    P sums[R][C];
    for (int64_t i = lane; i < block.size; i += kLanes) {
      if (lane == 0) ahead.copy(i);
      P columns[C];
      for (int c = 0; c < C; ++c) columns[c].load(right[c] + i, P::kSize);
      for (int r = 0; r < R; ++r) {
        P row = columns[Diagonal ? r : 0];
        if (!Diagonal) row.load(left[r] + i, P::kSize);
        for (int c = 0; c < (Diagonal ? r + 1 : C); ++c) sums[r][c] += op(row, columns[c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < (Diagonal ? r + 1 : C); ++c)
        sums[r][c].store(lanes[r][c] + lane, P::kSize);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < (Diagonal ? r + 1 : C); ++c) {
      add_lanes(block.sums + pair_index(first_row + r, first_column + c) * kSumLanes, lanes[r][c]);
    }
  }
}

// The same for `rows` rows, R at most.
template <class P, int R, int Tile, class Op, class A>
CLEXT_HOST_DEVICE void add_tile_of(const Op& op, const PairBlock<A>& block, int64_t rows,
                                   int64_t first_row, int64_t first_column,
                                   const RowsAhead<A>& ahead) {
  if constexpr (R > 0) {
    if (rows < R) {
      add_tile_of<P, R - 1, Tile>(op, block, rows, first_row, first_column, ahead);
    } else if (first_row == first_column) {
      add_tile<P, R, R, true>(op, block, first_row, first_column, ahead);
    } else {
      add_tile<P, R, Tile, false>(op, block, first_row, first_column, ahead);
    }
  }
}

// All pairs of a block; its tiles share the rows of the next block among them. Rows are taken
// kTile at a time, and one more at the end where it would be left alone.
template <class Unit, class Op, class A>
CLEXT_HOST_DEVICE void add_tiles(const Op& op, const PairBlock<A>& block,
                                 const RowsAhead<A>& ahead) {
  constexpr int kTile = Unit::kTile;
  const int64_t panels = std::max<int64_t>(1, (block.row_count + kTile - 2) / kTile);
  const int64_t tiles = pair_count(panels);
  int64_t begin = 0;
  for (int64_t tile = 0, i = 0; i < panels; ++i) {
    const int64_t left = block.row_count - i * kTile;
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t end = ++tile * ahead.count / tiles;
      const A* after = end < ahead.count ? ahead.from + end * ahead.row_stride : ahead.after;
      const RowsAhead<A> share = {ahead.from + begin * ahead.row_stride, after, ahead.row_stride,
                                  ahead.to + begin * kStageStride, end - begin};
      add_tile_of<Pack<A, Unit::kBytes>, kTile + 1, kTile>(op, block, i + 1 < panels ? kTile : left,
                                                           i * kTile, j * kTile, share);
      begin = end;
    }
  }
}

// Adds up the pairs of one chunk.
template <class Unit, class Op, class T>
CLEXT_HOST_DEVICE void apply_pairs(const Op& op, const ChunkPointers& at, int64_t row_stride,
                                   int64_t n, const PairScratch<accumulate_t<T>>& scratch,
                                   double* partials) {
  static_assert(Op::lists::count == 2 && kRowsList<Op> == 0);
  using A = accumulate_t<T>;
  using Last = Stream<typename ListAt<1, typename Op::lists>::type, T>;
  const A* rows = reinterpret_cast<const A*>(at[0]);
  const bool in_place = op.outputs <= Unit::kTile;  // a single tile, which reads a row once
  PairBlock<A> block = {nullptr, 0, nullptr, op.outputs + 1, 0, scratch.sums()};
  std::fill_n(block.sums, scratch.sum_count(), 0.0);
  bool staged = false;
  for (int64_t b = 0, start = 0; start < n; ++b, start += kPairBlock) {
    const int64_t size = std::min(kPairBlock, n - start);
    A* stage = scratch.stage(b);
    block.size = whole_lanes(size);
    if (!staged && !(in_place && size == block.size)) {
      stage_rows(stage, kStageStride, rows + start, row_stride, op.outputs, size, block.size);
      staged = true;
    }
    block.rows = staged ? stage : rows + start;
    block.row_stride = staged ? kStageStride : row_stride;
    A* last = stage + op.outputs * kStageStride;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) last[i] = Last::load(at[1], 0, start + i);
    std::fill(last + size, last + block.size, A(0));
    block.last = last;
    staged = !in_place && n - start >= 2 * kPairBlock;  // the next block, if it is a whole one
    add_tiles<Unit>(op, block,
                    RowsAhead<A>{rows + start + kPairBlock, rows + start + 2 * kPairBlock,
                                 row_stride, scratch.stage(b + 1), staged ? op.outputs : 0});
  }
  for (int64_t pair = 0; pair * kSumLanes < scratch.sum_count(); ++pair) {
    partials[pair] = fold_lanes<Reduction::Sum, kSumLanes>(block.sums + pair * kSumLanes);
  }
}

}  // namespace cpu
}  // namespace clext
