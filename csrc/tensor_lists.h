// What a kernel launch knows about its tensors: raw pointers, sizes and how they are cut into
// chunks. No torch here; check.h makes it from tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace clext {

enum class StorageType : uint8_t { Float32, Float64, BFloat16, Float16 };

// A piece of one tensor. Chunks are the unit of work and of reduction: each leaves one partial
// result, and partial results are added in the order of the chunks, whoever computed them.
struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t size;
};

struct TensorLists {
  StorageType type;  // storage type of parameters and gradients; all tensors of a launch share it
  int list_count;
  std::vector<int64_t> sizes;        // [tensor] elements
  std::vector<void*> pointers;       // [list][tensor]
  std::vector<int64_t> row_strides;  // [tensor] elements between rows of a Rows list, else empty
  std::vector<Chunk> chunks;
  bool compact = false;  // anchors and importances are bfloat16

  int64_t tensor_count() const { return static_cast<int64_t>(sizes.size()); }

  void* pointer(int list, int64_t tensor) const {
    return pointers[static_cast<size_t>(list * tensor_count() + tensor)];
  }

  int64_t element_count() const {
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    return total;
  }
};

// Chunk sizes are part of a result's bits: partial sums are per chunk.
// CPU, 32 K elements: the streams of the widest op stay in a core's second-level cache, and a
// vision transformer has enough chunks for any number of threads. CUDA, 8 K: a block computes one
// chunk, and the course's perceptron still has more chunks than an H200 has multiprocessors.
static constexpr int64_t kCpuChunkSize = 32 * 1024;
static constexpr int64_t kCudaChunkSize = 8 * 1024;

inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& sizes, int64_t chunk_size) {
  std::vector<Chunk> chunks;
  for (size_t tensor = 0; tensor < sizes.size(); ++tensor) {
    for (int64_t offset = 0; offset < sizes[tensor]; offset += chunk_size) {
      chunks.push_back(
          {static_cast<int64_t>(tensor), offset, std::min(chunk_size, sizes[tensor] - offset)});
    }
  }
  return chunks;
}

}  // namespace clext
