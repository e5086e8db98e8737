// Chunks, and the CPU driver on raw memory: every storage type, odd sizes, tails, several tensors,
// rows, and the same bits for any number of threads.
#include <algorithm>
#include <cstdlib>

#include "check.h"
#include "launch.h"
#include "math/importance.h"
#include "math/pairs.h"
#include "math/path.h"
#include "math/penalty.h"
#include "math/projection.h"
#include "math/sliced.h"
#include "math/storage.h"

using namespace clext;
using namespace clext::test;

namespace {

void chunks_cover_every_element_once() {
  const std::vector<int64_t> sizes = {0, 1, 9, 10, 11, 0, 25};
  constexpr int64_t kChunk = 10;
  std::vector<int64_t> next(sizes.size(), 0);
  int64_t last_tensor = 0;
  for (const Chunk& chunk : make_chunks(sizes, kChunk)) {
    check(chunk.tensor >= last_tensor, "chunks follow the order of the tensors");
    last_tensor = chunk.tensor;
    check(chunk.offset == next[static_cast<size_t>(chunk.tensor)], "chunks leave no gap");
    check(chunk.size > 0 && chunk.size <= kChunk, "a chunk is neither empty nor too large");
    next[static_cast<size_t>(chunk.tensor)] += chunk.size;
  }
  check(next == sizes, "chunks cover every tensor");
  check(make_chunks({}, kChunk).empty() && make_chunks({0, 0}, kChunk).empty(), "nothing to do");
  check(make_chunks({int64_t(3) << 32}, int64_t(1) << 31).size() == 6, "sizes beyond 32 bits");
}

template <class T>
StorageType storage_type();
template <>
StorageType storage_type<float>() {
  return StorageType::Float32;
}
template <>
StorageType storage_type<double>() {
  return StorageType::Float64;
}
template <>
StorageType storage_type<BFloat16>() {
  return StorageType::BFloat16;
}
template <>
StorageType storage_type<Float16>() {
  return StorageType::Float16;
}

const std::vector<int64_t> kSizes = {1, 0, 7, 1023, 1024, 1025, 2 * kCpuChunkSize + 3, 16};

// One list: a vector per tensor, filled with values that T can hold.
template <class T>
using Tensors = std::vector<std::vector<T>>;

template <class T>
Tensors<T> make_tensors(unsigned seed, bool positive = false) {
  Tensors<T> tensors;
  for (const int64_t size : kSizes) {
    std::vector<T> tensor;
    for (const double value : normal_values(static_cast<size_t>(size), seed++)) {
      const double signed_value = positive ? std::abs(value) : value;
      tensor.push_back(from_accumulate<T>(static_cast<accumulate_t<T>>(signed_value)));
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

TensorLists launch_of(StorageType type, const std::vector<std::vector<void*>>& lists) {
  TensorLists launch{type, static_cast<int>(lists.size()), kSizes, {}, {}, {}};
  for (const auto& list : lists) {
    launch.pointers.insert(launch.pointers.end(), list.begin(), list.end());
  }
  launch.chunks = make_chunks(kSizes, kCpuChunkSize);
  return launch;
}

template <class T>
std::vector<void*> pointers(Tensors<T>& tensors) {
  std::vector<void*> result;
  for (auto& tensor : tensors) result.push_back(tensor.data());
  return result;
}

template <class A>
double reduce(const std::vector<double>& partials, Reduction reduction, StorageType type) {
  A result;
  reduce_partials_cpu(partials.data(), static_cast<int64_t>(partials.size()), reduction, &result,
                      type);
  return static_cast<double>(result);
}

// A value and a gradient, the gradient stored in T, anchors and importances in C: Update, Read, all
// storages, Sum.
template <class T, class C = accumulate_t<T>>
void penalty_and_gradient(double value_tolerance, double grad_tolerance) {
  using A = accumulate_t<T>;
  constexpr StorageType kStateType =
      std::is_same_v<A, double> ? StorageType::Float64 : StorageType::Float32;
  auto params = make_tensors<T>(1);
  auto anchors = make_tensors<C>(2);
  auto importances = make_tensors<C>(3, true);
  const auto grads_before = make_tensors<T>(4);
  Tensors<T> first_grads;
  std::vector<double> first_partials;
  for (const int threads : {1, 2, 3, 8}) {
    auto grads = grads_before;
    TensorLists lists = launch_of(storage_type<T>(), {pointers(grads), pointers(params),
                                                      pointers(anchors), pointers(importances)});
    lists.compact = !std::is_same_v<C, A>;
    std::vector<double> partials(lists.chunks.size(), -1);
    apply_cpu(lists, AddQuadraticPenaltyGrad<false>{0.5}, partials.data(), threads);
    if (threads == 1) {
      first_grads = grads;
      first_partials = partials;
    }
    check(partials == first_partials, "the value does not depend on the number of threads");
    double expected = 0;
    for (size_t t = 0; t < params.size(); ++t) {
      check(grads[t].empty() || std::memcmp(grads[t].data(), first_grads[t].data(),
                                            grads[t].size() * sizeof(T)) == 0,
            "the gradient does not depend on the number of threads");
      for (size_t i = 0; i < params[t].size(); ++i) {
        const double importance = to_accumulate(importances[t][i]);
        const double difference =
            double(to_accumulate(params[t][i])) - double(to_accumulate(anchors[t][i]));
        expected += 0.5 * importance * difference * difference;
        check_near(to_accumulate(grads[t][i]),
                   to_accumulate(grads_before[t][i]) + importance * difference, grad_tolerance,
                   "gradient");
      }
    }
    check_near(reduce<A>(partials, Reduction::Sum, kStateType), expected, value_tolerance, "value");
  }
}

void maximum_over_all_tensors() {
  auto values = make_tensors<float>(5, true);
  values.back().back() = 100;
  const TensorLists lists = launch_of(StorageType::Float32, {pointers(values)});
  std::vector<double> partials(lists.chunks.size());
  apply_cpu(lists, Maximum{}, partials.data(), 2);
  check(reduce<float>(partials, Reduction::Max, StorageType::Float32) == 100, "maximum");
  values[3][5] = NAN;
  apply_cpu(lists, Maximum{}, partials.data(), 2);
  check(std::isnan(reduce<float>(partials, Reduction::Max, StorageType::Float32)),
        "a NaN anywhere is the maximum");
  check(reduce<double>({}, Reduction::Max, StorageType::Float64) == 0, "maximum of nothing");
  check(reduce<double>({}, Reduction::Sum, StorageType::Float64) == 0, "sum of nothing");
}

// A Jacobian with several rows per tensor, whose rows are further apart than a tensor is long: few
// rows, several packs of which fit in the cache; many; and more than the driver copies.
void rows(int64_t outputs) {
  constexpr double kScale = 0.5;
  const auto at = [outputs](int64_t k, int64_t m) { return static_cast<size_t>(k * outputs + m); };
  auto acc = make_tensors<float>(6, true);
  const auto before = acc;
  // Diagonally dominant: a sum of squares, as the op's matrix is.
  std::vector<float> gram(static_cast<size_t>(outputs * outputs));
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t m = 0; m < outputs; ++m) {
      gram[at(k, m)] = k == m ? 1 : 0.5f / static_cast<float>(outputs * (1 + std::abs(k - m)));
    }
  }
  Tensors<float> jacobian;
  TensorLists lists = launch_of(StorageType::Float32, {pointers(acc)});
  for (const int64_t size : kSizes) {
    const int64_t stride = std::min<int64_t>(size, 2000) + 5;  // may overlap: they are only read
    lists.row_strides.push_back(stride);
    jacobian.push_back(cast_to<float>(
        normal_values(static_cast<size_t>(outputs * stride + size), static_cast<unsigned>(size))));
  }
  for (void* pointer : pointers(jacobian)) lists.pointers.push_back(pointer);
  lists.list_count = 2;
  apply_cpu(lists, SlicedImportance{gram.data(), outputs, kScale}, nullptr, 2);
  for (size_t t = 0; t < acc.size(); ++t) {
    const auto value = [&](int64_t row, size_t i) {
      return static_cast<double>(jacobian[t][static_cast<size_t>(row * lists.row_strides[t]) + i]);
    };
    const size_t step = outputs > 100 ? 97 : 1;
    for (size_t i = 0; i < acc[t].size(); i += step) {
      double expected = before[t][i];
      for (int64_t k = 0; k < outputs; ++k) {
        double projected = 0;
        for (int64_t m = 0; m < outputs; ++m) projected += gram[at(k, m)] * value(m, i);
        expected += kScale * value(k, i) * projected;
      }
      check_near(acc[t][i], expected, 1e-4 * (1 + expected), "quadratic form of the rows");
    }
  }
}

// Rows that are further apart than a tensor is long, as many as `count`; shared by both ops below.
Tensors<float> make_rows(TensorLists& lists, int64_t count) {
  Tensors<float> rows;
  for (const int64_t size : kSizes) {
    lists.row_strides.push_back(size + 5);
    rows.push_back(cast_to<float>(
        normal_values(static_cast<size_t>((count + 1) * (size + 5)), static_cast<unsigned>(size))));
  }
  return rows;
}

// All tiles: one that is not full, full ones, one row more than full ones, many.
template <class T>
void products_of_rows(int64_t count) {
  TensorLists lists = launch_of(storage_type<T>(), {});
  auto rows = make_rows(lists, count);
  auto grads = make_tensors<T>(11);
  for (void* pointer : pointers(rows)) lists.pointers.push_back(pointer);
  for (void* pointer : pointers(grads)) lists.pointers.push_back(pointer);
  lists.list_count = 2;
  const int64_t values = count + 1;
  const size_t cells = static_cast<size_t>(values * values);
  std::vector<double> first, expected(cells), magnitude(cells);
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<double> partials(lists.chunks.size() *
                                 static_cast<size_t>(pair_partials_cpu(values)));
    std::vector<double> gram(cells, -1);
    apply_cpu(lists, GradientGram{count}, partials.data(), threads);
    reduce_pairs_cpu(partials.data(), static_cast<int64_t>(partials.size()), values, gram.data());
    if (threads == 1) first = gram;
    check(gram == first, "products do not depend on the number of threads");
  }
  for (size_t t = 0; t < rows.size(); ++t) {
    for (int64_t e = 0; e < kSizes[t]; ++e) {
      const auto value = [&](int64_t k) {
        return k < count
                   ? static_cast<double>(rows[t][static_cast<size_t>(k * lists.row_strides[t] + e)])
                   : static_cast<double>(to_accumulate(grads[t][static_cast<size_t>(e)]));
      };
      for (int64_t i = 0; i < values; ++i) {
        for (int64_t j = 0; j < values; ++j) {
          const double product = value(i) * value(j);
          expected[static_cast<size_t>(i * values + j)] += product;
          magnitude[static_cast<size_t>(i * values + j)] += std::abs(product);
        }
      }
    }
  }
  for (size_t cell = 0; cell < cells; ++cell) {
    check_near(first[cell] / magnitude[cell], expected[cell] / magnitude[cell], 1e-6, "product");
  }
}

template <class T>
void rows_are_added_with_weights(const std::vector<double>& weights) {
  const auto count = static_cast<int64_t>(weights.size());
  auto grads = make_tensors<T>(12);
  const auto before = grads;
  TensorLists lists = launch_of(storage_type<T>(), {pointers(grads)});
  auto rows = make_rows(lists, count);
  for (size_t t = 0; t < rows.size(); ++t) {
    for (int64_t k = 0; k < count; ++k) {  // nobody looks at a row without weight
      if (weights[static_cast<size_t>(k)] == 0) {
        std::fill_n(rows[t].begin() + k * lists.row_strides[t], kSizes[t], NAN);
      }
    }
  }
  for (void* pointer : pointers(rows)) lists.pointers.push_back(pointer);
  lists.list_count = 2;
  apply_cpu(lists, ProjectGradient{weights.data(), count}, nullptr, 2);
  for (size_t t = 0; t < rows.size(); ++t) {
    for (size_t e = 0; e < grads[t].size(); ++e) {
      float sum = to_accumulate(before[t][e]);
      for (int64_t k = 0; k < count; ++k) {
        const double weight = weights[static_cast<size_t>(k)];
        const size_t place = static_cast<size_t>(k * lists.row_strides[t]) + e;
        if (weight != 0) sum += static_cast<float>(weight) * rows[t][place];
      }
      const float expected = to_accumulate(from_accumulate<T>(sum));
      check_near(to_accumulate(grads[t][e]), expected, 0, "projected gradient");
    }
  }
}

// Write lists are not read: rubbish in them must not matter.
void written_lists_are_not_read() {
  auto importance = make_tensors<float>(7, true);
  auto anchor = make_tensors<float>(8);
  for (auto& tensor : anchor) std::fill(tensor.begin(), tensor.end(), NAN);
  auto estimate = make_tensors<float>(9, true);
  auto params = make_tensors<float>(10);
  const auto before = importance;
  const TensorLists lists = launch_of(StorageType::Float32, {pointers(importance), pointers(anchor),
                                                             pointers(estimate), pointers(params)});
  apply_cpu(lists, ConsolidateImportance{0.5}, nullptr, 2);
  for (size_t t = 0; t < params.size(); ++t) {
    check(anchor[t] == params[t], "the anchor is the parameter");
    for (size_t i = 0; i < params[t].size(); ++i) {
      check_near(importance[t][i], 0.5 * before[t][i] + estimate[t][i], 1e-6, "decayed sum");
    }
  }
}

// Computed in float, rounded once. 1.5 * (1 + 3 * 2^-7) lies in the middle of two numbers of
// bfloat16: rounded down, it would not get up again by 2^-9.
void consolidation_rounds_once() {
  std::vector<BFloat16> importance = {from_accumulate<BFloat16>(1 + 0x3p-7f)};
  std::vector<BFloat16> anchor = {from_accumulate<BFloat16>(7)};
  std::vector<float> estimate = {0x1p-9f};
  std::vector<float> param = {1 + 0x1p-8f + 0x1p-20f};
  TensorLists lists{StorageType::Float32, 4, {1}, {}, {}, {{0, 0, 1}}, true};
  lists.pointers = {importance.data(), anchor.data(), estimate.data(), param.data()};
  apply_cpu(lists, ConsolidateImportance{1.5}, nullptr, 1);
  const float exact = 1.5f * (1 + 0x3p-7f) + 0x1p-9f;
  check(importance[0].bits == from_accumulate<BFloat16>(exact).bits, "importance rounded once");
  const float twice = to_accumulate(from_accumulate<BFloat16>(1.5f * (1 + 0x3p-7f))) + 0x1p-9f;
  check(importance[0].bits != from_accumulate<BFloat16>(twice).bits, "which makes a difference");
  check(to_accumulate(anchor[0]) == 1 + 0x1p-7f, "the anchor is the parameter, rounded");
}

}  // namespace

int main() {
  chunks_cover_every_element_once();
  penalty_and_gradient<float>(1e-5, 1e-5);
  penalty_and_gradient<double>(1e-12, 1e-14);
  penalty_and_gradient<BFloat16>(1e-5, 8e-3);
  penalty_and_gradient<Float16>(1e-5, 1e-3);
  penalty_and_gradient<float, BFloat16>(1e-5, 1e-5);
  penalty_and_gradient<BFloat16, BFloat16>(1e-5, 8e-3);
  penalty_and_gradient<Float16, BFloat16>(1e-5, 1e-3);
  consolidation_rounds_once();
  maximum_over_all_tensors();
  for (const int64_t outputs : {1, 3, 10, 300}) rows(outputs);
  for (const int64_t count : {0, 1, 2, 3, 4, 5, 8, 11, 16}) products_of_rows<float>(count);
  products_of_rows<BFloat16>(6);
  rows_are_added_with_weights<float>({0.5, 0, -1.25});
  rows_are_added_with_weights<BFloat16>({0, 2});
  rows_are_added_with_weights<float>({NAN, 1});
  rows_are_added_with_weights<float>({0, 0});
  written_lists_are_not_read();
  return report("cpu_driver");
}
