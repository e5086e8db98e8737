// A chunk as a block of threads sees it: where its elements are, and how they are moved.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>
#include <utility>

#include "cuda/access.cuh"
#include "cuda/geometry.h"
#include "cuda/packing.h"
#include "math/element.h"
#include "math/storage.h"

namespace clext {
namespace cuda {

// One chunk, as seen by one block.
template <class Op, class T>
struct ChunkView {
  using G = Geometry<Op, T>;

  void* pointers[G::kElementLists];  // at the first element of the chunk
  const void* scalars;               // of the tensor, where the functor has such a list
  int64_t size;
  int64_t row_stride;

  template <int K>
  __device__ __forceinline__ typename G::template Element<K>* at(int64_t element) const {
    return static_cast<typename G::template Element<K>*>(pointers[K]) + element;
  }

  template <Path P, int K, int Width>
  __device__ __forceinline__ void load_list(int64_t first, int left,
                                            accumulate_t<T> (&values)[Width]) const {
    if constexpr (G::template kIsLoaded<K>) load<P>(at<K>(first), left, values);
  }

  template <Path P, int K, int Width>
  __device__ __forceinline__ void store_list(int64_t first, int left,
                                             const accumulate_t<T> (&values)[Width]) const {
    if constexpr (G::template kIsStored<K>) store<P>(at<K>(first), left, values);
  }

  template <Path P, int K>
  __device__ __forceinline__ void clear_list(int64_t first, int left, const Op& op) const {
    if constexpr (G::template kIsCleared<K>) {
      const accumulate_t<T> zeros[G::kWidth] = {};
      if (op.clear) store<P>(at<K>(first), left, zeros);
    }
  }

  template <int... K>
  __device__ __forceinline__ void init(const LaunchTable<G::kLists>& table, int32_t block,
                                       std::integer_sequence<int, K...>) {
    const int index = find_entry(table, block);
    const TableEntry<G::kLists>& entry = table.entries[index];
    const ChunkRange range = chunk_range(entry, block - table.first_blocks[index]);
    size = range.size;
    row_stride = entry.row_stride;
    ((pointers[K] = entry.pointers[K]), ...);
    ((pointers[K] = at<K>(range.begin)), ...);
    if constexpr (kHasScalars<Op>) scalars = entry.pointers[G::kElementLists];
  }

  __device__ __forceinline__ bool is_aligned() const {
    uintptr_t bits = 0;
#pragma unroll
    for (int k = 0; k < G::kElementLists; ++k) bits |= reinterpret_cast<uintptr_t>(pointers[k]);
    if constexpr (G::kHasRows) bits |= static_cast<uintptr_t>(row_stride) * sizeof(accumulate_t<T>);
    return bits % kVectorBytes == 0;
  }
};

// Argument K of the functor for one element: a register, or a view of the element's rows.
template <int K, class Op, class T, int Width>
__device__ __forceinline__ decltype(auto) argument(
    const ChunkView<Op, T>& chunk, int64_t element,
    accumulate_t<T> (&values)[Geometry<Op, T>::kElementLists][Width], int i) {
  using L = typename Geometry<Op, T>::template List<K>;
  if constexpr (std::is_same_v<L, WriteRows>) {
    return MutableRows<accumulate_t<T>>{chunk.template at<K>(element), chunk.row_stride};
  } else if constexpr (std::is_same_v<L, ReadRows>) {
    return Rows<accumulate_t<T>>{chunk.template at<K>(element), chunk.row_stride};
  } else {
    return (values[K][i]);
  }
}

}  // namespace cuda
}  // namespace clext
