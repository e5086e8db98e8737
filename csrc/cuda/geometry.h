// Which thread works on which elements. Plain C++, tested on the host.
//
// A block walks over its chunk in tiles; in a tile each thread has `kVectors` vectors of `kWidth`
// neighbouring elements, a block's width apart. The mapping is the same whether a vector is moved
// in 16-byte pieces or element by element (unaligned tensors, the end of a chunk), so alignment
// never changes the order of additions, and with it the bits of a result.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "math/element.h"
#include "math/storage.h"
#include "tensor_lists.h"

namespace clext {
namespace cuda {

static constexpr int kThreads = 256;
static constexpr int kVectorBytes = 16;  // the widest access of one thread on all architectures

// Loads in flight per thread, and the blocks that must fit on a multiprocessor: together nearly
// 100 KB in flight, a few times latency x bandwidth of an H200, within 80 registers a thread.
// Without the minimum ptxas aims at full occupancy instead and sinks loads behind the first
// arithmetic, which starves small models: they give a multiprocessor little more than one block.
static constexpr int kBytesInFlight = 128;
static constexpr int kMaxVectors = 4;
static constexpr int kBlocksPerMultiprocessor = 3;
static constexpr int kFewerBlocks = 2;  // with up to 128 registers a thread
static constexpr int kMaxValueRegisters = 56;
static constexpr size_t kMaxCoefficientBytes = 64;

template <class Op, class T>
struct Geometry {
  using A = accumulate_t<T>;
  static constexpr int kLists = Op::lists::count;
  static constexpr int kElementLists = clext::kElementLists<Op>;  // all but Scalars, which is last
  using Indices = std::make_integer_sequence<int, kElementLists>;

  template <int K>
  using List = typename ListAt<K, typename Op::lists>::type;
  template <int K>
  using Element = element_t<List<K>, T>;
  template <int K>
  static constexpr bool kIsRows = List<K>::storage == Storage::Rows;
  template <int K>
  static constexpr bool kIsLoaded = !kIsRows<K> && List<K>::access != Access::Write;
  template <int K>
  static constexpr bool kIsStored =
      !kIsRows<K> && (List<K>::access == Access::Write || List<K>::access == Access::Update);
  template <int K>
  static constexpr bool kIsCleared = List<K>::access == Access::ReadAndClear;

 private:
  template <int... K>
  static constexpr int smallest_bytes(std::integer_sequence<int, K...>) {
    return std::min({static_cast<int>(sizeof(Element<K>))...});
  }
  template <int... K>
  static constexpr int loaded_bytes(std::integer_sequence<int, K...>) {
    return ((kIsLoaded<K> ? static_cast<int>(sizeof(Element<K>)) : 0) + ...);
  }
  template <int... K>
  static constexpr int loaded_lists(std::integer_sequence<int, K...>) {
    return ((kIsLoaded<K> ? 1 : 0) + ...);
  }
  // Double formulas need two registers per value, and long divisions more: half as much for them.
  static constexpr int kBudget = std::is_same_v<A, double> ? kBytesInFlight / 2 : kBytesInFlight;
  static constexpr int choose_vectors(int bytes_per_vector) {
    int vectors = 1;
    while (vectors < kMaxVectors && 2 * vectors * bytes_per_vector <= kBudget) vectors *= 2;
    return vectors;
  }
  static constexpr int choose_rows(int bytes_per_row) {
    return std::max(1, kBudget / 2 / bytes_per_row);
  }

 public:
  static constexpr bool kHasRows = kHasList<Storage::Rows, Op>;
  static constexpr bool kIsRowByRow = RowByRow<Op>::value;
  // One 16-byte access of the smallest type, several of a wider one. A functor that wants all rows
  // of an element gets single elements: it reads many values of each, next to its neighbour's.
  static constexpr int kWidth =
      kHasRows && !kIsRowByRow ? 1 : kVectorBytes / smallest_bytes(Indices{});
  static constexpr int kVectors = kHasRows ? 1 : choose_vectors(kWidth * loaded_bytes(Indices{}));
  // Rows whose loads are in flight together, where they are taken one by one. With their weights,
  // which are double, they need more registers than other lists.
  static constexpr int kRowsAtOnce = choose_rows(kWidth * static_cast<int>(sizeof(A)));
  static constexpr int64_t kVectorStride = int64_t{kThreads} * kWidth;
  static constexpr int64_t kTile = kVectorStride * kVectors;
  // The values of a thread, and the coefficients that a functor brings along: where they leave too
  // few registers for the rest, fewer blocks share a multiprocessor.
  static constexpr int kValueRegisters =
      kVectors * kWidth * loaded_lists(Indices{}) * static_cast<int>(sizeof(A) / sizeof(float));
  static constexpr bool kNeedsRegisters = kValueRegisters > kMaxValueRegisters ||
                                          sizeof(Op) > kMaxCoefficientBytes;
  static constexpr int kBlocks = kNeedsRegisters ? kFewerBlocks : kBlocksPerMultiprocessor;

  static_assert(kLists >= 1 && kLists <= 10, "a functor has 1 to 10 lists");
  static_assert(kCudaChunkSize % kTile == 0, "only a tensor's last chunk may end inside a tile");

  // First element, within the chunk, of a thread's vector.
  CLEXT_HOST_DEVICE static constexpr int64_t first_element(int64_t tile, int vector, int thread) {
    return tile * kTile + vector * kVectorStride + int64_t{thread} * kWidth;
  }

  // How many elements of a vector at `first` lie inside a chunk of `size` elements.
  CLEXT_HOST_DEVICE static constexpr int elements_left(int64_t size, int64_t first) {
    const int64_t left = size - first;
    return left <= 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
  }
};

}  // namespace cuda
}  // namespace clext
