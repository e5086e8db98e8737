// The CUDA driver's kernels, run on the host (cuda_on_host/cuda_runtime.h), against the CPU driver:
// same memory afterwards, bit for bit, canaries between the tensors included; same reductions.
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>

#include "check.h"
#include "cuda/adam.cu"
#include "cuda/importance.cu"
#include "cuda/path.cu"
#include "cuda/penalty.cu"
#include "cuda/projection.cu"
#include "cuda/reduce.cu"
#include "cuda/sgd.cu"
#include "cuda/sliced.cu"

using namespace clext;
using namespace clext::test;

namespace {

constexpr int64_t kRows = 11;   // more than a thread loads together
constexpr size_t kCanary = 64;  // bytes before and after each tensor; keeps the alignment

// Sizes below, at and above a vector, a tile and a chunk.
const std::vector<int64_t> kSizes = {
    1, 0, 7, 8, 255, 2048, 4099, kCudaChunkSize, 5, 16, 2 * kCudaChunkSize + 4096 + 9};

template <class T>
constexpr StorageType kStorageType = std::is_same_v<T, float>      ? StorageType::Float32
                                     : std::is_same_v<T, double>   ? StorageType::Float64
                                     : std::is_same_v<T, BFloat16> ? StorageType::BFloat16
                                                                   : StorageType::Float16;
template <class T>
constexpr StorageType kStorageType<Compact<T>> = kStorageType<T>;
template <class T>
constexpr bool kIsCompact = !std::is_same_v<T, parameter_t<T>>;

// All tensors of all lists of one op in one allocation, each `shift` elements off alignment.
template <class Op, class T>
struct Case {
  using G = cuda::Geometry<Op, T>;

  std::vector<uint4> storage;
  std::vector<typename G::A> scalars;  // two of each tensor, for functors that take them
  TensorLists lists{kStorageType<T>, G::kLists, {}, {}, {}, {}, kIsCompact<T>};
  int64_t row_count;
  double scale;  // a power of two: what is added up is exact

  Case(const std::vector<int64_t>& sizes, int64_t shift, int64_t rows = kRows, double scale_ = 0)
      : row_count(rows), scale(scale_) {
    lists.sizes = sizes;
    std::vector<size_t> offsets;
    size_t used = 0;
    lay_out(offsets, used, shift, typename G::Indices{});
    storage.resize(used / sizeof(uint4) + 1);
    char* base = reinterpret_cast<char*>(storage.data());
    std::memset(base, 0x5a, storage.size() * sizeof(uint4));
    for (const size_t offset : offsets) lists.pointers.push_back(base + offset);
    fill(typename G::Indices{});
    if (G::kHasRows) lists.row_strides = sizes;
    if (kHasScalars<Op>) add_scalars();
  }

  void add_scalars() {
    for (int64_t t = 0; t < lists.tensor_count(); ++t) {
      scalars.push_back(typename G::A(0.25 + 0.125 * t));
      scalars.push_back(typename G::A(1.5 - 0.125 * t));
    }
    for (int64_t t = 0; t < lists.tensor_count(); ++t) lists.pointers.push_back(&scalars[2 * t]);
  }

  template <int... K>
  void lay_out(std::vector<size_t>& offsets, size_t& used, int64_t shift,
               std::integer_sequence<int, K...>) {
    const auto one_list = [&](size_t element_bytes, int64_t rows) {
      for (const int64_t size : lists.sizes) {
        offsets.push_back(used + kCanary + static_cast<size_t>(shift) * element_bytes);
        used = offsets.back() + static_cast<size_t>(rows * size) * element_bytes;
        used = (used + 2 * kCanary) / kCanary * kCanary;
      }
    };
    (one_list(sizeof(typename G::template Element<K>), G::template kIsRows<K> ? row_count : 1),
     ...);
  }

  template <int... K>
  void fill(std::integer_sequence<int, K...>) {
    (fill_list<K>(), ...);
  }

  // Uniform in (-1, 1), state in (0, 1) as importances are; the same whatever the layout.
  template <int K>
  void fill_list() {
    using E = typename G::template Element<K>;
    constexpr Storage kStorage = G::template List<K>::storage;
    constexpr bool kIsState = kStorage == Storage::State || kStorage == Storage::Consolidated;
    uint64_t random = K + 1;
    for (int64_t t = 0; t < lists.tensor_count(); ++t) {
      const int64_t rows = G::template kIsRows<K> ? row_count : 1;
      E* to = static_cast<E*>(lists.pointer(K, t));
      for (int64_t i = 0; i < rows * lists.sizes[static_cast<size_t>(t)]; ++i) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        double value = static_cast<double>(static_cast<int64_t>(random)) * 0x1p-63;
        if (scale > 0) value = std::trunc(value * scale) / scale;
        to[i] = from_accumulate<E>(static_cast<typename G::A>(kIsState ? std::abs(value) : value));
      }
    }
  }
};

template <class Op, class T>
std::vector<double> run_cuda(Case<Op, T>& c, const Op& op) {
  c.lists.chunks = make_chunks(c.lists.sizes, kCudaChunkSize);
  std::vector<double> partials(c.lists.chunks.size());
  apply_cuda(c.lists, op, partials.data(), nullptr);
  return partials;
}

template <class Op, class T>
void compare_with_cpu(const Op& op, const std::vector<int64_t>& sizes, int64_t shift) {
  Case<Op, T> on_cuda(sizes, shift);
  Case<Op, T> on_cpu(sizes, shift);
  const std::vector<double> partials = run_cuda(on_cuda, op);
  on_cpu.lists.chunks = make_chunks(sizes, kCpuChunkSize);
  std::vector<double> cpu_partials(on_cpu.lists.chunks.size());
  apply_cpu(on_cpu.lists, op, cpu_partials.data(), 1);
  check(std::memcmp(on_cuda.storage.data(), on_cpu.storage.data(),
                    on_cpu.storage.size() * sizeof(uint4)) == 0,
        "the same memory as the CPU driver leaves");
  if (Op::reduction == Reduction::None) return;

  typename Case<Op, T>::G::A result = -1, expected = -2;
  const StorageType type =
      sizeof(result) == sizeof(double) ? StorageType::Float64 : StorageType::Float32;
  reduce_partials_cuda(partials.data(), static_cast<int64_t>(partials.size()), Op::reduction,
                       &result, type, nullptr);
  reduce_partials_cpu(cpu_partials.data(), static_cast<int64_t>(cpu_partials.size()), Op::reduction,
                      &expected, type);
  check_near(result, expected, std::is_same_v<T, double> ? 1e-14 : 1e-5, "the same reduction");

  Case<Op, T> shifted(sizes, shift + 1);
  check(run_cuda(shifted, op) == partials, "alignment does not change a bit of the result");
}

template <class Op, class... T>
void compare_in_types(const Op& op) {
  for (const int64_t shift : {0, 1}) (compare_with_cpu<Op, T>(op, kSizes, shift), ...);
  (compare_with_cpu<Op, T>(op, {}, 0), ...);
  (compare_with_cpu<Op, T>(op, {0, 0}, 0), ...);
}

template <class Op>
void compare(const Op& op) {
  compare_in_types<Op, float, double, BFloat16, Float16>(op);
  if constexpr (kHasList<Storage::Consolidated, Op>) {
    compare_in_types<Op, Compact<float>, Compact<BFloat16>, Compact<Float16>>(op);
  }
}

// The Gram matrix of the rows by both drivers, and the same bits off alignment.
template <class T>
std::vector<double> gram_of(int64_t rows, const std::vector<int64_t>& sizes, int64_t shift,
                            bool on_cuda, double scale) {
  const GradientGram op{rows};
  const int64_t values = rows + 1;
  std::vector<double> gram(static_cast<size_t>(values * values), -1);
  Case<GradientGram, T> c(sizes, shift, rows, scale);
  const std::vector<uint4> before = c.storage;
  c.lists.chunks = make_chunks(sizes, on_cuda ? kCudaChunkSize : kCpuChunkSize);
  const int64_t per_chunk = on_cuda ? pair_partials_cuda(values) : pair_partials_cpu(values);
  std::vector<double> partials(c.lists.chunks.size() * static_cast<size_t>(per_chunk), NAN);
  const auto count = static_cast<int64_t>(partials.size());
  if (on_cuda) {
    apply_cuda(c.lists, op, partials.data(), nullptr);
    reduce_pairs_cuda(partials.data(), count, values, gram.data(), nullptr);
  } else {
    apply_cpu(c.lists, op, partials.data(), 1);
    reduce_pairs_cpu(partials.data(), count, values, gram.data());
  }
  check(std::memcmp(before.data(), c.storage.data(), before.size() * sizeof(uint4)) == 0,
        "what is only read stays as it is");
  return gram;
}

template <class T>
void compare_gram(int64_t rows, const std::vector<int64_t>& sizes) {
  const std::vector<double> on_cuda = gram_of<T>(rows, sizes, 0, true, 0);
  const std::vector<double> on_cpu = gram_of<T>(rows, sizes, 0, false, 0);
  double largest = 0;
  for (const double value : on_cpu) largest = std::fmax(largest, std::abs(value));
  const double tolerance = std::is_same_v<T, double> ? 1e-14 : 1e-6;
  for (size_t i = 0; i < on_cpu.size(); ++i) {
    check_near(on_cuda[i] / largest, on_cpu[i] / largest, tolerance, "the CPU driver's products");
  }
  check(gram_of<T>(rows, sizes, 1, true, 0) == on_cuda, "alignment changes no bit of a product");
  check(gram_of<T>(rows, sizes, 0, true, 4) == gram_of<T>(rows, sizes, 0, false, 4),
        "the CPU driver's bits where all sums are exact");
}

void compare_grams() {
  for (const int64_t rows : {0, 1, 3, 4, 8}) {
    compare_gram<float>(rows, {1, 0, 4099, kCudaChunkSize + 77});
    compare_gram<BFloat16>(rows, {1, 0, 4099});
    compare_gram<Float16>(rows, {7, 300});
    compare_gram<double>(rows, {255, kCudaChunkSize + 5});
  }
  compare_gram<float>(16, {1031, 3});
  compare_gram<double>(33, {77});
  compare_gram<float>(3, {});
  compare_gram<float>(3, {0, 0});
}

void more_tensors_than_a_launch_holds() {
  const int launches = cuda_on_host::launches;
  const std::vector<int64_t> sizes(cuda::LaunchTable<4>::kCapacity + 10, 5);
  compare_with_cpu<AddQuadraticPenaltyGrad<false>, float>({0.3}, sizes, 0);
  check(cuda_on_host::launches == launches + 2 + 1 + 2, "two launches, a reduction, two launches");
}

void a_maximum_keeps_nan() {
  Case<Maximum, float> c({kCudaChunkSize + 77, 12}, 0);
  static_cast<float*>(c.lists.pointer(0, 0))[kCudaChunkSize + 5] =
      std::numeric_limits<float>::quiet_NaN();
  const std::vector<double> partials = run_cuda(c, Maximum{});
  float result = 0;
  reduce_partials_cuda(partials.data(), static_cast<int64_t>(partials.size()), Reduction::Max,
                       &result, StorageType::Float32, nullptr);
  check(std::isnan(result), "NaN in any chunk is the result");
}

void partials_are_folded_in_all_counts() {
  for (const int64_t count : {0, 1, 31, 511, 512, 513, 5000}) {
    std::vector<double> partials(static_cast<size_t>(count));
    for (size_t i = 0; i < partials.size(); ++i) partials[i] = static_cast<double>(i % 700);
    double expected = 0, largest = 0;
    for (const double p : partials) expected += p, largest = std::fmax(largest, p);
    double sum = -1, maximum = -1;
    reduce_partials_cuda(partials.data(), count, Reduction::Sum, &sum, StorageType::Float64,
                         nullptr);
    reduce_partials_cuda(partials.data(), count, Reduction::Max, &maximum, StorageType::Float64,
                         nullptr);
    check(sum == expected && maximum == largest, "sum and maximum of the partial results");
  }
}

// A step in every way that changes which lists are stored.
template <class Op>
void compare_step(Op op) {
  const float scale = 4, fine = 0, found = 1;
  op.lr.value = 0.1;
  op.weight_decay = 0.1;
  op.strength = 0.7;
  op.decay = 0.9;
  compare_in_types<Op, float, double, BFloat16>(op);
  op.clear = true;
  op.grad_scale = &scale;
  op.found_inf = &fine;
  op.clip = {&scale, false};
  op.proximal = true;
  op.decoupled = true;
  compare_in_types<Op, float, BFloat16>(op);
  if constexpr (kHasList<Storage::Consolidated, Op>) {
    compare_in_types<Op, Compact<float>, Compact<BFloat16>>(op);
  }
  op.found_inf = &found;
  compare_in_types<Op, float>(op);
}

template <Protection P>
void compare_steps() {
  compare_step(SgdStep<P, false>{});
  compare_step(SgdStep<P, true>{{}, 0.9, true});
  compare_step(AdamStep<P>{{}, 0.9, 0.99, 1e-3});
}

}  // namespace

int main() {
  const double scalar = 0.75, fisher_max = 2.5, score_max = 3.5;
  compare(QuadraticPenalty{});
  compare(QuadraticPenaltyBackward{&scalar});
  compare(AddQuadraticPenaltyGrad<false>{0.3});
  compare(AddQuadraticPenaltyGrad<true>{0.3});
  compare(AccumulatePathIntegral{});
  compare(RiemannianWalkStep{0.9});
  compare(AccumulateRiemannianWalkScore{1e-3});
  compare(ConsolidatePathIntegral{0.1});
  compare(ConsolidatePathIntegral{0.1, true});
  compare(MergeRiemannianWalkScore{0.5});
  compare(ConsolidateRiemannianWalk{&fisher_max, &score_max});
  compare(AccumulateSquare{0.5});
  compare(AccumulateAbs{0.5});
  compare(ConsolidateImportance{0.9});
  compare(ConsolidateAllAnchors{0.9});
  compare_in_types<Maximum, float, double>(Maximum{});
  double gram[kRows * kRows];
  float gram_float[kRows * kRows];
  for (int64_t i = 0; i < kRows * kRows; ++i) {
    gram[i] = 1.0 / static_cast<double>(1 + std::abs(i / kRows - i % kRows));
    gram_float[i] = static_cast<float>(gram[i]);
  }
  compare_in_types<SlicedImportance, float>(SlicedImportance{gram_float, kRows, 0.5});
  compare_in_types<SlicedImportance, double>(SlicedImportance{gram, kRows, 0.5});
  const double weights[kRows] = {0.5, 0, -1.25, 0, 0, 2, 0, 0.1, 0, 0.3}, zeros[kRows] = {};
  for (const int64_t rows : {int64_t{1}, int64_t{4}, int64_t{8}, kRows}) {
    compare(ProjectGradient{weights, rows});
    compare(ProjectGradient{zeros, rows});
  }
  compare_grams();
  compare_in_types<AdvanceSgd, float, double>({nullptr, 0.9, 0.5});
  compare_in_types<AdvanceAdam, float, double>({{nullptr, false, 0.1}, nullptr, -0.1, -0.01});
  compare_steps<Protection::None>();
  compare_steps<Protection::Pull>();
  compare_steps<Protection::Path>();
  compare_steps<Protection::Walk>();
  more_tensors_than_a_launch_holds();
  a_maximum_keeps_nan();
  partials_are_folded_in_all_counts();
  return report("cuda_driver");
}
