// The CPU driver: runs one functor of csrc/math over lists of tensors.
//
// It owns everything that a formula should not know: chunks, threads, vectorisation, conversion of
// storage types and the fixed-order reduction. A family file (penalty.cpp, path.cpp, ...) only
// instantiates apply_cpu for its functors.
//
// Same bits whatever the number of threads: a chunk is computed by one thread, its partial result
// is stored at the chunk's index, and partial results are folded in index order. Within a chunk
// the order of additions is written out below and does not depend on the vector width either.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/instruction_set.h"
#include "cpu/lanes.h"
#include "cpu/pairs.h"
#include "cpu/rows.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "launch.h"
#include "math/element.h"
#include "math/storage.h"
#include "storage_dispatch.h"
#include "tensor_lists.h"

namespace clext {
namespace cpu {

// Below this many elements a parallel region costs more than it saves.
static constexpr int64_t kSerialElements = 32 * 1024;

// How many chunks ahead the first line of a tensor is fetched.
static constexpr int64_t kPrefetchDistance = 4;

// One element: load every list, apply the formula, store what it may have changed. The values
// are locals, so after inlining they live in registers.
template <class Op, class T, size_t... K>
CLEXT_HOST_DEVICE auto apply_element(const Op& op, const ChunkPointers& at, int64_t row_stride,
                                     int64_t i, std::index_sequence<K...>) {
  auto run = [&](auto... value) __attribute__((always_inline)) {
    if constexpr (Op::reduction == Reduction::None) {
      evaluate<parameter_t<T>>(op, value...);
      (Stream<typename ListAt<K, typename Op::lists>::type, T>::store(at[K], i, value), ...);
    } else {
      const auto result = evaluate<parameter_t<T>>(op, value...);
      (Stream<typename ListAt<K, typename Op::lists>::type, T>::store(at[K], i, value), ...);
      return result;
    }
  };
  return run(
      Stream<typename ListAt<K, typename Op::lists>::type, T>::load(at[K], row_stride, i)...);
}

template <class Op, size_t... K>
constexpr bool clears_any_list(std::index_sequence<K...>) {
  return ((ListAt<K, typename Op::lists>::type::access == Access::ReadAndClear) || ...);
}

// Sets the lists that ask for it to zero, while their elements are still in the nearest cache.
template <class Op, class T, size_t... K>
CLEXT_HOST_DEVICE void clear_elements(const Op& op, const ChunkPointers& at, int64_t start,
                                      int64_t n, std::index_sequence<K...> indices) {
  if constexpr (clears_any_list<Op>(indices)) {
    if (!op.clear) return;
    const auto clear = [&](auto list, char* base) __attribute__((always_inline)) {
      using L = decltype(list);
      using Element = typename Stream<L, T>::Element;
      if constexpr (L::access == Access::ReadAndClear) {
        memset(reinterpret_cast<Element*>(base) + start, 0,
               static_cast<size_t>(n) * sizeof(Element));
      }
    };
    (clear(typename ListAt<K, typename Op::lists>::type{}, at[K]), ...);
  }
}

// `op` is a copy that no store to the lists can change: what it holds is constant in the loops.
template <class Op, class T>
CLEXT_HOST_DEVICE double apply_loop(const Op op, const ChunkPointers& at, int64_t row_stride,
                                    int64_t n) {
  constexpr auto kLists = std::make_index_sequence<kElementLists<Op>>{};
  if constexpr (kRowsList<Op> >= 0) {
    if (apply_packs<Op, accumulate_t<T>>(op, at, row_stride, n)) return 0;
  }
  if constexpr (Op::reduction == Reduction::None) {
    // Without anything to clear the chunk is one block.
    const int64_t block = clears_any_list<Op>(kLists) ? kBlockSize : n;
    for (int64_t start = 0; start < n; start += block) {
      const int64_t end = std::min(start + block, n);
#pragma omp simd
      for (int64_t i = start; i < end; ++i) apply_element<Op, T>(op, at, row_stride, i, kLists);
      clear_elements<Op, T>(op, at, start, end - start, kLists);
    }
    return 0;
  } else {
    alignas(64) accumulate_t<T> results[kBlockSize];
    double total = 0;
    for (int64_t start = 0; start < n; start += kBlockSize) {
      const int64_t size = std::min(kBlockSize, n - start);
      const int64_t padded = pad_block<Op::reduction>(results, size);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        results[i] = apply_element<Op, T>(op, at, row_stride, start + i, kLists);
      }
      clear_elements<Op, T>(op, at, start, size, kLists);
      total = fold<Op::reduction>(total, fold_block<Op::reduction>(results, padded));
    }
    return total;
  }
}

template <class Op, class T>
CLEXT_HOST_DEVICE double apply_chunk(const Op& op, const ChunkPointers& at, int64_t row_stride,
                                     int64_t n) {
  if constexpr (RowByRow<Op>::value) {
    apply_row_by_row<Op, T>(op, at, row_stride, n);
    return 0;
  } else if constexpr (HasMode<Op>::value) {
    Op in_mode = op;
    in_mode.*Op::mode = true;
    if (op.*Op::mode) return apply_loop<Op, T>(in_mode, at, row_stride, n);
    in_mode.*Op::mode = false;
    return apply_loop<Op, T>(in_mode, at, row_stride, n);
  } else {
    return apply_loop<Op, T>(op, at, row_stride, n);
  }
}

template <class Op, class T, size_t... K>
CLEXT_HOST_DEVICE ChunkPointers pointers_of(const TensorLists& lists, const Chunk& chunk,
                                            std::index_sequence<K...>) {
  return {(static_cast<char*>(lists.pointer(K, chunk.tensor)) +
           chunk.offset *
               static_cast<int64_t>(sizeof(
                   typename Stream<typename ListAt<K, typename Op::lists>::type, T>::Element)))...};
}

// The functor as the elements of one tensor need it.
template <class Op, class T>
CLEXT_HOST_DEVICE Op for_tensor(const Op& op, const TensorLists& lists, int64_t tensor) {
  Op result = op;
  if constexpr (kHasScalars<Op>) {
    const void* scalars = lists.pointer(Op::lists::count - 1, tensor);
    result.prepare_tensor(static_cast<const accumulate_t<T>*>(scalars));
  }
  return result;
}

// Many small tensors lie all over memory, where the processor cannot foresee the next one.
template <size_t... K>
CLEXT_HOST_DEVICE void prefetch(const TensorLists& lists, int64_t chunk,
                                std::index_sequence<K...>) {
  const Chunk& next = lists.chunks[static_cast<size_t>(chunk)];
  if (next.offset == 0) (__builtin_prefetch(lists.pointer(K, next.tensor)), ...);
}

// What a thread needs beside the lists.
template <class Op, class T>
using scratch_t =
    std::conditional_t<Op::reduction == Reduction::Pairs, PairScratch<accumulate_t<T>>, NoScratch>;

template <InstructionSet Set, class Op, class T>
CLEXT_HOST_DEVICE void apply_chunks(const TensorLists& lists, const Op& op, double* partials,
                                    int64_t begin, int64_t end) {
  constexpr auto kLists = std::make_index_sequence<kElementLists<Op>>{};
  const scratch_t<Op, T> scratch(op);
  const auto last = static_cast<int64_t>(lists.chunks.size()) - 1;
  for (int64_t c = begin; c < end; ++c) {
    prefetch(lists, std::min(c + kPrefetchDistance, last), kLists);
    const Chunk& chunk = lists.chunks[static_cast<size_t>(c)];
    const int64_t row_stride =
        lists.row_strides.empty() ? 0 : lists.row_strides[static_cast<size_t>(chunk.tensor)];
    const ChunkPointers at = pointers_of<Op, T>(lists, chunk, kLists);
    if constexpr (Op::reduction == Reduction::Pairs) {
      apply_pairs<VectorUnit<Set>, Op, T>(op, at, row_stride, chunk.size, scratch,
                                          partials + c * pair_count(op.outputs + 1));
    } else {
      const double partial = apply_chunk<Op, T>(for_tensor<Op, T>(op, lists, chunk.tensor), at,
                                                row_stride, chunk.size);
      if constexpr (Op::reduction != Reduction::None) partials[c] = partial;
    }
  }
}

// The same loop for each instruction set. Everything above is force-inlined into these.
template <class Op, class T>
void apply_chunks_baseline(const TensorLists& lists, const Op& op, double* partials, int64_t begin,
                           int64_t end) {
  apply_chunks<InstructionSet::Baseline, Op, T>(lists, op, partials, begin, end);
}

#if defined(CLEXT_X86_DISPATCH)
template <class Op, class T>
CLEXT_TARGET_AVX2 void apply_chunks_avx2(const TensorLists& lists, const Op& op, double* partials,
                                         int64_t begin, int64_t end) {
  apply_chunks<InstructionSet::Avx2, Op, T>(lists, op, partials, begin, end);
}

template <class Op, class T>
CLEXT_TARGET_AVX512 void apply_chunks_avx512(const TensorLists& lists, const Op& op,
                                             double* partials, int64_t begin, int64_t end) {
  apply_chunks<InstructionSet::Avx512, Op, T>(lists, op, partials, begin, end);
}
#endif

template <class Op, class T>
auto select_apply_chunks() {
#if defined(CLEXT_X86_DISPATCH)
  return for_instruction_set(&apply_chunks_baseline<Op, T>, &apply_chunks_avx2<Op, T>,
                             &apply_chunks_avx512<Op, T>);
#else
  return &apply_chunks_baseline<Op, T>;
#endif
}

template <class Op, class T>
void apply(const TensorLists& lists, Op op, double* partials, int threads) {
  static_assert(Op::lists::count <= kMaxLists, "a functor has 1 to 10 lists");
  prepare(op);
  if (is_skipped(op)) {
    if constexpr (Op::reduction != Reduction::None) {
      std::fill_n(partials, lists.chunks.size(), 0.0);
    }
    return;
  }
  const auto apply_range = select_apply_chunks<Op, T>();
  const auto count = static_cast<int64_t>(lists.chunks.size());
  if (threads > 1 && lists.element_count() > kSerialElements) {
    in_parallel(count, threads, [&](int64_t c) { apply_range(lists, op, partials, c, c + 1); });
  } else {
    apply_range(lists, op, partials, 0, count);
  }
}

}  // namespace cpu

template <class Op>
void apply_cpu(const TensorLists& lists, const Op& op, double* partials, int threads) {
  with_storage<Op>(lists, [&](auto storage) {
    cpu::apply<Op, decltype(storage)>(lists, op, partials, threads);
  });
}

}  // namespace clext
