// The CPU driver of sample_products.h. A tile of a sample's product, a few features by one or two
// vectors of gradients, is summed over all rows in registers; its function is added to the tile's
// sums and the product itself is never written. Features are read where they are, so that a
// convolution's windows are not copied either.
//
// Same bits whatever the number of threads: a thread takes some tiles, for all samples in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/pack.h"
#include "cpu/sample_products.h"
#include "cpu/threads.h"
#include "math/element.h"

namespace clext {
namespace cpu {

// Below this many multiply-adds a parallel region costs more than it saves.
static constexpr int64_t kSerialProducts = 256 * 1024;

// Bytes of gradients that are copied at a time, which then stay in a core's second-level cache.
static constexpr int64_t kCopyBytes = 512 * 1024;

// Vectors of gradients in a tile, and features: as many sums as there are registers for.
static constexpr int kTileVectors = 2;
template <class Unit>
static constexpr int kTileFeatures = 2 * Unit::kTile;

// The gradients of some samples: whole vectors of entries, row by row.
template <class A>
struct VectorRows {
  const A* first;
  int64_t sample_stride;
  int64_t group_stride;
  const int64_t* rows;
};

// Which part of a group's matrix a tile is.
struct ProductTile {
  int64_t group;
  int64_t feature;
  int64_t feature_count;
  int64_t entry;
  int64_t entry_count;
};

// How the matrices of all groups are cut into tiles, of nearly equal numbers of features.
class ProductTiles {
 public:
  ProductTiles(int64_t groups, int64_t features, int64_t entries, int64_t feature_limit,
               int64_t entry_limit)
      : features_(features),
        entries_(entries),
        entry_limit_(entry_limit),
        feature_tiles_((features + feature_limit - 1) / feature_limit),
        entry_tiles_((entries + entry_limit - 1) / entry_limit),
        count_(groups * feature_tiles_ * entry_tiles_) {}

  int64_t count() const { return count_; }

  CLEXT_HOST_DEVICE ProductTile operator[](int64_t k) const {
    const int64_t f = k % feature_tiles_;
    const int64_t e = k / feature_tiles_ % entry_tiles_;
    const int64_t feature = f * features_ / feature_tiles_;
    const int64_t entry = e * entry_limit_;
    return {k / feature_tiles_ / entry_tiles_, feature,
            (f + 1) * features_ / feature_tiles_ - feature, entry,
            std::min(entry_limit_, entries_ - entry)};
  }

 private:
  int64_t features_;
  int64_t entries_;
  int64_t entry_limit_;
  int64_t feature_tiles_;
  int64_t entry_tiles_;
  int64_t count_;
};

// Adds F features by V vectors of one sample, of whose last vector `last` entries count.
template <class P, int F, int V, class Op, class A>
CLEXT_HOST_DEVICE void add_product(const Op& op, const A* features, const int64_t* entries,
                                   const std::vector<int64_t>& feature_rows, const A* grads,
                                   const int64_t* grad_rows, int64_t last, A* sums,
                                   int64_t sum_stride) {
  const A* feature[F];
  for (int f = 0; f < F; ++f) feature[f] = features + entries[f];
  P product[F][V];
  for (size_t r = 0; r < feature_rows.size(); ++r) {
    P grad[V];
    for (int v = 0; v < V; ++v) grad[v].load(grads + grad_rows[r] + v * P::kSize, P::kSize);
    for (int f = 0; f < F; ++f) {
      const A value = feature[f][feature_rows[r]];
      for (int v = 0; v < V; ++v) product[f][v] += value * grad[v];
    }
  }
  for (int f = 0; f < F; ++f) {
    for (int v = 0; v < V; ++v) {
      const int64_t count = v + 1 < V ? P::kSize : last;
      A* to = sums + f * sum_stride + v * P::kSize;
      P sum;
      sum.load(to, count);
      op(sum, product[f][v]);
      sum.store(to, count);
    }
  }
}

// Adds a tile of one sample: as many features and vectors as it has, F and V at most.
template <class P, int F, int V, class Op, class A>
CLEXT_HOST_DEVICE void add_product_tile(const Op& op, const ProductTile& tile, const A* features,
                                        const int64_t* entries,
                                        const std::vector<int64_t>& feature_rows, const A* grads,
                                        const int64_t* grad_rows, A* sums, int64_t sum_stride) {
  if constexpr (F > 0) {
    if (tile.feature_count < F) {
      add_product_tile<P, F - 1, V>(op, tile, features, entries, feature_rows, grads, grad_rows,
                                    sums, sum_stride);
    } else if (tile.entry_count <= (V - 1) * P::kSize) {
      if constexpr (V > 1) {
        add_product_tile<P, F, V - 1>(op, tile, features, entries, feature_rows, grads, grad_rows,
                                      sums, sum_stride);
      }
    } else {
      add_product<P, F, V>(op, features, entries, feature_rows, grads, grad_rows,
                           tile.entry_count - (V - 1) * P::kSize, sums, sum_stride);
    }
  }
}

// The work on samples `begin` to `end`, whose gradients are `grads`.
template <class Op, class A>
struct ProductSums {
  const PerSampleProducts<A>& products;
  const Op& op;
  A* sums;
  VectorRows<A> grads;
  int64_t begin;
  int64_t end;
};

// Does the `part`-th of `parts` equal parts of all tiles.
template <class Unit, class Op, class A>
CLEXT_HOST_DEVICE void add_product_tiles(const ProductSums<Op, A>& work, int64_t part,
                                         int64_t parts) {
  using P = Pack<A, Unit::kBytes>;
  constexpr int kFeatures = kTileFeatures<Unit>;
  const PerSampleOperand<A>& features = work.products.features;
  const auto feature_count = static_cast<int64_t>(features.entries.size());
  const auto entry_count = static_cast<int64_t>(work.products.grads.entries.size());
  const ProductTiles tiles(work.products.groups, feature_count, entry_count, kFeatures,
                           kTileVectors * P::kSize);
  const Op op = work.op;
  for (int64_t sample = work.begin; sample < work.end; ++sample) {
    const A* sample_grads = work.grads.first + (sample - work.begin) * work.grads.sample_stride;
    for (int64_t k = tiles.count() * part / parts; k < tiles.count() * (part + 1) / parts; ++k) {
      const ProductTile tile = tiles[k];
      A* sums = work.sums + (tile.group * feature_count + tile.feature) * entry_count + tile.entry;
      add_product_tile<P, kFeatures, kTileVectors>(
          op, tile, features.group(sample, tile.group), features.entries.data() + tile.feature,
          features.rows, sample_grads + tile.group * work.grads.group_stride + tile.entry,
          work.grads.rows, sums, entry_count);
    }
  }
}

// The same for each instruction set. Everything above is force-inlined into these.
template <class Op, class A>
void add_product_tiles_baseline(const ProductSums<Op, A>& work, int64_t part, int64_t parts) {
  add_product_tiles<VectorUnit<InstructionSet::Baseline>>(work, part, parts);
}

#if defined(CLEXT_X86_DISPATCH)
template <class Op, class A>
CLEXT_TARGET_AVX2 void add_product_tiles_avx2(const ProductSums<Op, A>& work, int64_t part,
                                              int64_t parts) {
  add_product_tiles<VectorUnit<InstructionSet::Avx2>>(work, part, parts);
}

template <class Op, class A>
CLEXT_TARGET_AVX512 void add_product_tiles_avx512(const ProductSums<Op, A>& work, int64_t part,
                                                  int64_t parts) {
  add_product_tiles<VectorUnit<InstructionSet::Avx512>>(work, part, parts);
}
#endif

template <class Op, class A>
auto select_add_product_tiles() {
#if defined(CLEXT_X86_DISPATCH)
  return for_instruction_set(&add_product_tiles_baseline<Op, A>, &add_product_tiles_avx2<Op, A>,
                             &add_product_tiles_avx512<Op, A>);
#else
  return &add_product_tiles_baseline<Op, A>;
#endif
}

// Copies of gradients, a few samples at a time, with the entries of a row in whole vectors.
template <class A>
class CopiedRows {
 public:
  explicit CopiedRows(const PerSampleProducts<A>& products)
      : grads_(products.grads),
        groups_(products.groups),
        row_count_(static_cast<int64_t>(grads_.rows.size())),
        width_(static_cast<int64_t>(whole_lines(grads_.entries.size()))),
        size_(std::clamp<int64_t>(kCopyBytes / sample_bytes(), 1,
                                  std::max<int64_t>(products.samples, 1))),
        rows_(grads_.rows.size()),
        copy_(static_cast<size_t>(size_ * groups_ * row_count_ * width_)) {
    for (int64_t r = 0; r < row_count_; ++r) rows_[static_cast<size_t>(r)] = r * width_;
  }

  // How many samples there is room for.
  int64_t size() const { return size_; }

  VectorRows<A> copy(int64_t begin, int64_t end, int parts) {
    const int64_t matrices = (end - begin) * groups_;
    in_parallel(parts, parts, [&](int64_t part) {
      for (int64_t k = matrices * part / parts; k < matrices * (part + 1) / parts; ++k) {
        copy_matrix(grads_.group(begin + k / groups_, k % groups_),
                    copy_.data() + k * row_count_ * width_);
      }
    });
    return {copy_.data(), groups_ * row_count_ * width_, row_count_ * width_, rows_.data()};
  }

 private:
  // So many rows stay in the first-level cache until each of their entries has been there.
  static constexpr int64_t kRows = 16;

  static size_t whole_lines(size_t entries) {
    constexpr size_t kLine = PerSampleOperand<A>::kLineEntries;
    return (entries + kLine - 1) / kLine * kLine;
  }

  int64_t sample_bytes() const {
    return std::max<int64_t>(groups_ * row_count_ * width_, 1) * static_cast<int64_t>(sizeof(A));
  }

  void copy_matrix(const A* from, A* to) const {
    for (int64_t start = 0; start < row_count_; start += kRows, to += kRows * width_) {
      const int64_t* rows = grads_.rows.data() + start;
      const int64_t count = std::min(kRows, row_count_ - start);
      for (size_t e = 0; e < grads_.entries.size(); ++e) {
        const A* entry = from + grads_.entries[e];
        for (int64_t r = 0; r < count; ++r)
          to[r * width_ + static_cast<int64_t>(e)] = entry[rows[r]];
      }
    }
  }

  const PerSampleOperand<A>& grads_;
  int64_t groups_;
  int64_t row_count_;
  int64_t width_;
  int64_t size_;
  std::vector<int64_t> rows_;
  std::vector<A> copy_;  // zero beyond the entries
};

}  // namespace cpu

template <class Op, class A>
void per_sample_sum_cpu(const PerSampleProducts<A>& products, const Op& op, A* sums, int threads) {
  const PerSampleOperand<A>& grads = products.grads;
  const auto entries =
      static_cast<int64_t>(products.features.entries.size() * grads.entries.size());
  std::fill_n(sums, products.groups * entries, A(0));
  const int64_t work =
      products.samples * products.groups * entries * static_cast<int64_t>(grads.rows.size());
  const int parts = work > cpu::kSerialProducts ? threads : 1;
  const auto add_product_tiles = cpu::select_add_product_tiles<Op, A>();
  const auto add = [&](const cpu::VectorRows<A>& rows, int64_t begin, int64_t end) {
    const cpu::ProductSums<Op, A> part_of = {products, op, sums, rows, begin, end};
    cpu::in_parallel(parts, parts, [&](int64_t part) { add_product_tiles(part_of, part, parts); });
  };
  if (grads.has_whole_vectors()) {
    add({grads.first, grads.sample_stride, grads.group_stride, grads.rows.data()}, 0,
        products.samples);
    return;
  }
  cpu::CopiedRows<A> copies(products);
  for (int64_t begin = 0; begin < products.samples; begin += copies.size()) {
    const int64_t end = std::min(begin + copies.size(), products.samples);
    add(copies.copy(begin, end, parts), begin, end);
  }
}

}  // namespace clext
