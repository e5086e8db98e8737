// Tensors in, pointers out: the one place where arguments of the ops are checked.
// A message names the op, the argument with its index, what came and what was expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "math/element.h"
#include "tensor_lists.h"

namespace clext {

// One list argument of an op, as its schema names it.
struct ListArgument {
  const char* name;
  at::TensorList tensors;
  Storage storage;
  Access access;
};

// Checked arguments, ready to launch. Tensors are grouped by storage type, in their own order.
struct Prepared {
  struct Position {
    size_t group;
    size_t index;
  };

  std::vector<TensorLists> groups;
  std::vector<Position> positions;   // [tensor] where its pointers are
  std::vector<at::Tensor> copies;    // read-only arguments that had to be laid out anew
  std::optional<at::Device> device;  // none where the lists are empty
  at::ScalarType state_dtype = at::kFloat;

  int64_t chunk_count() const {
    int64_t total = 0;
    for (const TensorLists& group : groups) total += static_cast<int64_t>(group.chunks.size());
    return total;
  }
};

// Whether the memory of `tensor` holds its elements: not so for a lazy negation (autograd makes
// some), a zero without memory, or a wrapper such as FakeTensor or DTensor.
bool holds_its_elements(const at::TensorImpl& tensor);

// Checks that all lists have equal length and that entry i of each fits entry i of `layout`, the
// list that gives shape and strides. `parameter_names` (may be empty) make messages say which
// parameter is meant. Throws ValueError (TypeError for dtypes and sparse tensors) and changes
// nothing.
Prepared check_lists(const char* op, const std::vector<ListArgument>& arguments, size_t layout,
                     const std::vector<std::string>& parameter_names = {});

// What a functor does with each of its lists.
struct ListKind {
  Storage storage;
  Access access;
};

template <class... L>
std::vector<ListKind> kinds_of(Lists<L...>) {
  return {ListKind{L::storage, L::access}...};
}

// The same for the lists that a functor declares; `names` are the schema's.
template <class Op, size_t... K>
std::vector<ListArgument> arguments_of(
    const std::array<std::pair<const char*, at::TensorList>, Op::lists::count>& lists,
    std::index_sequence<K...>) {
  return {ListArgument{lists[K].first, lists[K].second,
                       ListAt<K, typename Op::lists>::type::storage,
                       ListAt<K, typename Op::lists>::type::access}...};
}

template <class Op>
Prepared check_lists(
    const char* op,
    const std::array<std::pair<const char*, at::TensorList>, Op::lists::count>& lists,
    size_t layout, const std::vector<std::string>& parameter_names = {}) {
  return check_lists(op, arguments_of<Op>(lists, std::make_index_sequence<Op::lists::count>{}),
                     layout, parameter_names);
}

// Same shape is given; true where the same index means the same place in memory as well.
bool same_layout(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef expected_strides);

// Scalars: finite, and not below (or, if `positive`, above) zero.
void check_scalar(const char* op, const char* name, double value, bool positive = false);
// Scalars in [0, 1].
void check_fraction(const char* op, const char* name, double value);

}  // namespace clext
