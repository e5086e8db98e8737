// How the tensors of one call are packed into kernel launches. Plain C++, tested on the host.
//
// A launch carries its table by value, as a kernel parameter: nothing is allocated or copied, so a
// launch can be captured in a CUDA graph, and the first instruction of a block already sees it.
// The table has one entry per tensor, not per chunk: a block finds its tensor by bisection, so
// chunks may be small enough to fill a large GPU with a small model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "math/element.h"
#include "tensor_lists.h"

namespace clext {
namespace cuda {

// Bytes of kernel parameters from CUDA 12.1 and sm_70 on (4 KB before), less what a launch needs
// beside its table: the functor, the pointer to the partial results and padding.
static constexpr size_t kParameterBytes = 32764;
static constexpr size_t kFunctorBytes = 256;
static constexpr size_t kTableBytes = (kParameterBytes - kFunctorBytes) / 16 * 16;

// One tensor of each list, cut into chunks of `chunk_size` elements; the last may be shorter.
template <int ListCount>
struct TableEntry {
  void* pointers[ListCount];
  int64_t size;
  int64_t chunk_size;
  int64_t row_stride;  // of the Rows list, if the functor has one
};

template <int ListCount>
struct LaunchTable {
  static constexpr int kCapacity =
      static_cast<int>((kTableBytes - 16) / (sizeof(TableEntry<ListCount>) + sizeof(int32_t)));

  TableEntry<ListCount> entries[kCapacity];
  // Block b works on the last entry whose first block is not beyond b. Kept apart from the entries
  // so that a bisection stays within few cache lines. 32 bits: the limit of a grid.
  int32_t first_blocks[kCapacity];
  int32_t count;
};

static_assert(sizeof(LaunchTable<1>) <= kTableBytes && sizeof(LaunchTable<4>) <= kTableBytes &&
                  sizeof(LaunchTable<9>) <= kTableBytes && sizeof(LaunchTable<10>) <= kTableBytes,
              "a launch table must fit in the kernel parameters");

// The entry of a block.
template <int ListCount>
CLEXT_HOST_DEVICE int find_entry(const LaunchTable<ListCount>& table, int32_t block) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_blocks[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct ChunkRange {
  int64_t begin;
  int64_t size;
};

// The elements of chunk number `chunk` of a tensor.
template <int ListCount>
CLEXT_HOST_DEVICE ChunkRange chunk_range(const TableEntry<ListCount>& entry, int64_t chunk) {
  const int64_t begin = chunk * entry.chunk_size;
  const int64_t left = entry.size - begin;
  return {begin, left < entry.chunk_size ? left : entry.chunk_size};
}

// The chunk after the last one of the tensor that begins at chunk `first`. Chunks between the two
// are taken on trust: looking at each would cost the host more than the launch.
inline int64_t end_of_tensor(const TensorLists& lists, int64_t first) {
  const Chunk& begin = lists.chunks[static_cast<size_t>(first)];
  const int64_t size = lists.sizes[static_cast<size_t>(begin.tensor)];
  const int64_t last = begin.size > 0 ? first + (size - 1) / begin.size : first;
  if (begin.offset == 0 && last < static_cast<int64_t>(lists.chunks.size())) {
    const Chunk& end = lists.chunks[static_cast<size_t>(last)];
    if (end.tensor == begin.tensor && end.offset == (last - first) * begin.size &&
        end.offset + end.size == size) {
      return last + 1;
    }
  }
  throw std::logic_error("clext: chunk " + std::to_string(first) + " was not made by make_chunks");
}

// Fills `table` with the tensors from chunk `first` on, as many as fit, and returns the first chunk
// that is left for the next launch. Block b of the launch works on chunk `first + b`, so that the
// place of a partial result does not depend on the packing.
template <int ListCount>
int64_t pack(const TensorLists& lists, int64_t first, LaunchTable<ListCount>& table) {
  const auto chunk_count = static_cast<int64_t>(lists.chunks.size());
  int64_t next = first;
  table.count = 0;
  while (next < chunk_count && table.count < LaunchTable<ListCount>::kCapacity) {
    const Chunk& chunk = lists.chunks[static_cast<size_t>(next)];
    const auto tensor = static_cast<size_t>(chunk.tensor);
    TableEntry<ListCount>& entry = table.entries[table.count];
    for (int list = 0; list < ListCount; ++list) {
      entry.pointers[list] = lists.pointer(list, chunk.tensor);
    }
    entry.size = lists.sizes[tensor];
    entry.chunk_size = chunk.size;
    entry.row_stride = lists.row_strides.empty() ? 0 : lists.row_strides[tensor];
    table.first_blocks[table.count++] = static_cast<int32_t>(next - first);
    next = end_of_tensor(lists, next);
  }
  return next;
}

}  // namespace cuda
}  // namespace clext
