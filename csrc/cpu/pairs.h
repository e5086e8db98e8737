// The chunk loop of functors with a result for each pair of an element's values
// (Reduction::Pairs): a block of elements is read from memory once, into the second-level cache;
// from there each tile of a few rows by a few rows gives all its pairs, whose sums stay in
// registers meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

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

// A block and the one after it stay in the second-level cache, whatever the number of rows; sums
// are long enough in registers, and short enough for float32.
static constexpr int64_t kPairBlockValues = 32 * 1024;
static constexpr int64_t kMaxPairBlock = 2048;

CLEXT_HOST_DEVICE int64_t pair_block(int64_t row_count) {
  const int64_t lanes = kPairBlockValues / row_count / kLanes;
  return std::min(std::max<int64_t>(lanes, 1) * kLanes, kMaxPairBlock);
}

// Elements of a cache line.
template <class A>
static constexpr int64_t kLine = kPackBytes / static_cast<int64_t>(sizeof(A));

// Lanes of a pair's sum in float64: the upper half of the others has been folded onto the lower.
static constexpr int64_t kSumLanes = kLanes / 2;

struct alignas(kPackBytes) CacheLine {
  char bytes[kPackBytes];
};

// What a thread needs beside the lists: the lanes of every pair, a block of the list beside the
// rows in the type it is computed in, and the last elements of all, filled up to whole lanes.
template <class A>
class PairScratch {
 public:
  template <class Op>
  explicit PairScratch(const Op& op)
      : rest_size_((op.outputs + 1) * kLanes),
        sum_count_(pair_count(op.outputs + 1) * kSumLanes),
        lines_(new CacheLine[static_cast<size_t>(lines<A>(kMaxPairBlock + rest_size_) +
                                                 lines<double>(sum_count_))]) {}

  A* last() const { return reinterpret_cast<A*>(lines_.get()); }
  A* rest() const { return last() + kMaxPairBlock; }
  double* sums() const { return reinterpret_cast<double*>(rest() + rest_size_); }
  int64_t sum_count() const { return sum_count_; }

 private:
  template <class N>
  static int64_t lines(int64_t numbers) {
    return numbers * static_cast<int64_t>(sizeof(N)) / kPackBytes;
  }

  int64_t rest_size_;
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

// Rows of the next block that are fetched while a tile computes. Into the second-level cache, where
// they wait for the tiles in between.
template <class A>
struct RowsAhead {
  const A* rows;
  int64_t row_stride;
  int64_t count;

  CLEXT_HOST_DEVICE void fetch(int64_t i) const {
    for (int64_t k = 0; k < count; ++k) __builtin_prefetch(rows + k * row_stride + i, 0, 2);
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
CLEXT_HOST_DEVICE void add_pair_tile(const Op& op, const PairBlock<A>& block, int64_t first_row,
                                     int64_t first_column, const RowsAhead<A>& ahead) {
  const A* left[R];
  const A* right[C];
  for (int r = 0; r < R; ++r) left[r] = block.row(first_row + r);
  for (int c = 0; c < C; ++c) right[c] = block.row(first_column + c);
  alignas(kPackBytes) A lanes[R][C][kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += P::kSize) {
    P sums[R][C];
    for (int64_t i = lane; i < block.size; i += kLanes) {
      if (lane % kLine<A> == 0) ahead.fetch(i);
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
CLEXT_HOST_DEVICE void add_pair_tile_of(const Op& op, const PairBlock<A>& block, int64_t rows,
                                        int64_t first_row, int64_t first_column,
                                        const RowsAhead<A>& ahead) {
  if constexpr (R > 0) {
    if (rows < R) {
      add_pair_tile_of<P, R - 1, Tile>(op, block, rows, first_row, first_column, ahead);
    } else if (first_row == first_column) {
      add_pair_tile<P, R, R, true>(op, block, first_row, first_column, ahead);
    } else {
      add_pair_tile<P, R, Tile, false>(op, block, first_row, first_column, ahead);
    }
  }
}

// All pairs of a block; its tiles share the rows of the next block among them. Rows are taken
// kTile at a time, and one more at the end where it would be left alone. A single tile goes through
// the rows in order, which the processor foresees: it reads faster than it can be told to fetch.
template <class Unit, class Op, class A>
CLEXT_HOST_DEVICE void add_pair_tiles(const Op& op, const PairBlock<A>& block,
                                      const RowsAhead<A>& ahead) {
  constexpr int kTile = Unit::kTile;
  const int64_t panels = std::max<int64_t>(1, (block.row_count + kTile - 2) / kTile);
  const int64_t tiles = pair_count(panels);
  const int64_t fetched = tiles > 1 ? ahead.count : 0;
  int64_t begin = 0;
  for (int64_t tile = 0, i = 0; i < panels; ++i) {
    const int64_t left = block.row_count - i * kTile;
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t end = ++tile * fetched / tiles;
      const RowsAhead<A> share = {ahead.rows + begin * ahead.row_stride, ahead.row_stride,
                                  end - begin};
      add_pair_tile_of<Pack<A, Unit::kBytes>, kTile + 1, kTile>(
          op, block, i + 1 < panels ? kTile : left, i * kTile, j * kTile, share);
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
  constexpr bool in_place = std::is_same_v<typename Last::Element, A>;
  const auto copy_last = [&](A* to, int64_t start, int64_t size) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = Last::load(at[1], 0, start + i);
  };
  const int64_t row_count = op.outputs + 1;
  const int64_t whole = n / kLanes * kLanes;
  const int64_t block_size = pair_block(row_count);
  std::fill_n(scratch.sums(), scratch.sum_count(), 0.0);
  for (int64_t start = 0; start < whole; start += block_size) {
    const int64_t size = std::min(block_size, whole - start);
    const int64_t next = start + block_size;
    const A* last = in_place ? reinterpret_cast<const A*>(at[1]) + start : scratch.last();
    if constexpr (!in_place) copy_last(scratch.last(), start, size);
    add_pair_tiles<Unit>(
        op, PairBlock<A>{rows + start, row_stride, last, row_count, size, scratch.sums()},
        RowsAhead<A>{rows + next, row_stride, next < whole ? op.outputs : 0});
  }
  if (whole < n) {
    A* rest = scratch.rest();
    A* last = rest + op.outputs * kLanes;
    stage_rows(rest, kLanes, rows + whole, row_stride, op.outputs, n - whole, kLanes);
    copy_last(last, whole, n - whole);
    std::fill(last + (n - whole), last + kLanes, A(0));
    add_pair_tiles<Unit>(op, PairBlock<A>{rest, kLanes, last, row_count, kLanes, scratch.sums()},
                         {});
  }
  for (int64_t pair = 0; pair * kSumLanes < scratch.sum_count(); ++pair) {
    partials[pair] = fold_lanes<Reduction::Sum, kSumLanes>(scratch.sums() + pair * kSumLanes);
  }
}

}  // namespace cpu
}  // namespace clext
