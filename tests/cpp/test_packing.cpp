// How the CUDA driver packs tensors into launches and divides a chunk among threads: the same
// functions that the kernels call, walked through on the host.
#include "cuda/packing.h"

#include <memory>
#include <stdexcept>

#include "check.h"
#include "cuda/geometry.h"
#include "math/adam.h"
#include "math/importance.h"
#include "math/path.h"
#include "math/penalty.h"
#include "math/sliced.h"

using namespace clext;
using namespace clext::cuda;
using namespace clext::test;

namespace {

static_assert(LaunchTable<4>::kCapacity > 500, "most models must fit in one launch");
static_assert(LaunchTable<9>::kCapacity > 300, "and so must they for the widest step");
static_assert(LaunchTable<7>::kCapacity > 350, "most models must fit in one launch");

TensorLists make_lists(std::vector<int64_t> sizes, int list_count, int64_t chunk_size) {
  TensorLists lists{StorageType::Float32, list_count, std::move(sizes), {}, {}, {}};
  for (int64_t i = 0; i < list_count * lists.tensor_count(); ++i) {
    lists.pointers.push_back(reinterpret_cast<void*>(64 + 16 * i));
    if (i < lists.tensor_count()) lists.row_strides.push_back(1000 + i);
  }
  lists.chunks = make_chunks(lists.sizes, chunk_size);
  return lists;
}

// Block b of a launch that begins at chunk `first` must find chunk `first + b`, with its pointers.
template <int ListCount>
void check_launch(const TensorLists& lists, int64_t first, int64_t next,
                  const LaunchTable<ListCount>& table) {
  check(table.count > 0 && table.count <= LaunchTable<ListCount>::kCapacity, "table size");
  for (int64_t c = first; c < next; ++c) {
    const auto block = static_cast<int32_t>(c - first);
    const int index = find_entry(table, block);
    const TableEntry<ListCount>& entry = table.entries[index];
    const ChunkRange range = chunk_range(entry, block - table.first_blocks[index]);
    const Chunk& chunk = lists.chunks[static_cast<size_t>(c)];
    check(range.begin == chunk.offset && range.size == chunk.size, "block b runs chunk first + b");
    check(entry.row_stride == 1000 + chunk.tensor, "row stride");
    for (int list = 0; list < ListCount; ++list) {
      check(entry.pointers[list] == lists.pointer(list, chunk.tensor), "pointer of the tensor");
    }
  }
}

template <int ListCount>
int64_t count_launches(const TensorLists& lists) {
  const auto table = std::make_unique<LaunchTable<ListCount>>();
  int64_t launches = 0;
  for (int64_t first = 0; first < static_cast<int64_t>(lists.chunks.size()); ++launches) {
    const int64_t next = pack(lists, first, *table);
    check(next > first, "a launch does something");
    if (next <= first) return -1;
    check_launch(lists, first, next, *table);
    first = next;
  }
  return launches;
}

void every_chunk_has_its_block() {
  std::mt19937_64 generator(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<int64_t> sizes(generator() % 40);
    // Sizes around multiples of the chunk size, and every third tensor empty.
    for (int64_t& size : sizes) {
      const auto near = static_cast<int64_t>(generator() % 5 * 16 + generator() % 3);
      size = generator() % 3 == 0 ? 0 : near;
    }
    const int64_t launches = count_launches<4>(make_lists(sizes, 4, 16));
    check(launches <= 1, "a small model is one launch");
  }
}

void more_tensors_than_a_launch_holds() {
  constexpr int kCapacity = LaunchTable<8>::kCapacity;
  for (const int64_t count : {kCapacity - 1, kCapacity, kCapacity + 1, 3 * kCapacity + 5}) {
    std::vector<int64_t> sizes(static_cast<size_t>(count));
    for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = 1 + static_cast<int64_t>(i % 40);
    check(count_launches<8>(make_lists(sizes, 8, 16)) == (count + kCapacity - 1) / kCapacity,
          "no more launches than needed");
  }
}

void sizes_beyond_32_bits() {
  const int64_t huge = (int64_t{5} << 32) + 3;
  check(count_launches<1>(make_lists({7, huge, 9}, 1, int64_t{1} << 24)) == 1, "one launch");
}

void nothing_to_do() {
  check(count_launches<4>(make_lists({}, 4, 16)) == 0, "no tensor, no launch");
  check(count_launches<4>(make_lists({0, 0}, 4, 16)) == 0, "empty tensors, no launch");
}

void other_chunks_are_refused() {
  for (int fault = 0; fault < 3; ++fault) {
    TensorLists lists = make_lists({40, 40}, 1, 16);
    if (fault == 0) lists.chunks.pop_back();
    if (fault == 1) lists.chunks[2].size = 7;
    if (fault == 2) lists.chunks.erase(lists.chunks.begin());
    bool refused = false;
    try {
      count_launches<1>(lists);
    } catch (const std::logic_error&) {
      refused = true;
    }
    check(refused, "chunks that make_chunks does not make");
  }
}

// The loops of apply_kernel, with marks instead of loads and stores.
template <class Op, class T>
void every_element_has_one_thread() {
  using G = Geometry<Op, T>;
  std::vector<int64_t> sizes = {1, G::kWidth, G::kTile, kCudaChunkSize};
  for (const int64_t size : {int64_t{G::kWidth}, G::kVectorStride, G::kTile, 2 * G::kTile}) {
    for (const int64_t near : {size - 1, size + 1, size + G::kWidth + 1}) sizes.push_back(near);
  }
  for (const int64_t size : sizes) {
    std::vector<int> visits(static_cast<size_t>(size), 0);
    const auto visit = [&](int64_t first, int count) {
      check(first >= 0 && first + count <= size, "inside the chunk");
      check(first % G::kWidth == 0, "a vector starts at a multiple of its width");
      for (int i = 0; i < count; ++i) ++visits[static_cast<size_t>(first + i)];
    };
    const int64_t whole_tiles = size / G::kTile;
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int v = 0; v < G::kVectors; ++v) {
        for (int64_t tile = 0; tile < whole_tiles; ++tile) {
          visit(G::first_element(tile, v, thread), G::kWidth);
        }
        const int64_t first = G::first_element(whole_tiles, v, thread);
        const int left = G::elements_left(size, first);
        if (left > 0) visit(first, left);
      }
    }
    check(visits == std::vector<int>(static_cast<size_t>(size), 1), "each element exactly once");
  }
}

template <class Op>
void every_element_has_one_thread_in_all_types() {
  every_element_has_one_thread<Op, float>();
  every_element_has_one_thread<Op, double>();
  every_element_has_one_thread<Op, BFloat16>();
  every_element_has_one_thread<Op, Float16>();
}

// What the kernels' speed rests on: 16 bytes of the narrowest type per access.
static_assert(Geometry<QuadraticPenalty, float>::kWidth == 4);
static_assert(Geometry<QuadraticPenalty, double>::kWidth == 2);
static_assert(Geometry<QuadraticPenalty, BFloat16>::kWidth == 8);
static_assert(Geometry<Maximum, float>::kWidth == 4 && Geometry<Maximum, float>::kVectors == 4);
static_assert(Geometry<AddQuadraticPenaltyGrad<false>, float>::kVectors == 2);
static_assert(Geometry<RiemannianWalkStep, float>::kVectors == 1);
static_assert(Geometry<SlicedImportance, float>::kWidth == 1);
static_assert(Geometry<AdamStep<Protection::None>, float>::kVectors == 2);
static_assert(Geometry<AdamStep<Protection::Walk>, BFloat16>::kVectors == 1);
// A step's coefficients take registers; without them three blocks share a multiprocessor.
static_assert(Geometry<AdamStep<Protection::None>, float>::kBlocks == 2);
static_assert(Geometry<RiemannianWalkStep, BFloat16>::kBlocks == 3);

}  // namespace

int main() {
  every_chunk_has_its_block();
  more_tensors_than_a_launch_holds();
  sizes_beyond_32_bits();
  nothing_to_do();
  other_chunks_are_refused();
  every_element_has_one_thread_in_all_types<QuadraticPenalty>();
  every_element_has_one_thread_in_all_types<AddQuadraticPenaltyGrad<false>>();
  every_element_has_one_thread_in_all_types<AccumulateSquare>();
  every_element_has_one_thread_in_all_types<RiemannianWalkStep>();
  every_element_has_one_thread_in_all_types<ConsolidateRiemannianWalk>();
  every_element_has_one_thread_in_all_types<AdamStep<Protection::None>>();
  every_element_has_one_thread_in_all_types<AdamStep<Protection::Walk>>();
  every_element_has_one_thread<Maximum, float>();
  every_element_has_one_thread<Maximum, double>();
  every_element_has_one_thread<SlicedImportance, float>();
  every_element_has_one_thread<SlicedImportance, double>();
  return report("packing");
}
