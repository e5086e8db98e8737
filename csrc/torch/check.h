// Tensors in, pointers out: the one place where arguments of the ops are checked.
// A message names the op, the argument with its index, what came and what was expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "math/element.h"
#include "tensor_lists.h"

namespace clext {

// What an op does with one of its lists, and what the list is called.
struct ListKind {
  const char* name;
  Storage storage;
  Access access;
};

struct ListArgument : ListKind {
  at::TensorList tensors;
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

// Checks that all lists have equal length and that entry i of each fits entry i of the list that
// gives shape and strides: `params`, or else the first one without rows. `parameter_names` (may be
// empty) make messages say which parameter is meant. Throws ValueError (TypeError for dtypes and
// sparse tensors) and changes nothing.
Prepared check_lists(const char* op, const std::vector<ListArgument>& arguments,
                     const std::vector<std::string>& parameter_names = {});

template <class Op, size_t... K>
std::vector<ListKind> make_lists(bool clears, std::index_sequence<K...>) {
  const auto kind = [clears](size_t k, Storage storage, Access access) -> ListKind {
    // They are written by the launch that counts the steps.
    if (storage == Storage::Scalars) return {"steps", storage, Access::Update};
    if (access == Access::ReadAndClear && !clears) access = Access::Read;
    return {Op::names[k], storage, access};
  };
  return {kind(K, ListAt<K, typename Op::lists>::type::storage,
               ListAt<K, typename Op::lists>::type::access)...};
}

// The lists that a functor declares.
template <class Op>
const std::vector<ListKind>& lists_of(bool clears = false) {
  static_assert(std::size(Op::names) >= static_cast<size_t>(kElementLists<Op>));
  constexpr std::make_index_sequence<Op::lists::count> kIndices = {};
  static const std::vector<ListKind> kept = make_lists<Op>(false, kIndices);
  static const std::vector<ListKind> cleared = make_lists<Op>(true, kIndices);
  return clears ? cleared : kept;
}

template <class Op>
using ListsFor = std::array<at::TensorList, static_cast<size_t>(Op::lists::count)>;

template <class Op>
Prepared check_lists(const ListsFor<Op>& tensors) {
  std::vector<ListArgument> arguments;
  for (const ListKind& list : lists_of<Op>()) {
    arguments.push_back({list, tensors[arguments.size()]});
  }
  return check_lists(Op::name, arguments);
}

// Same shape is given; true where the same index means the same place in memory as well.
bool same_layout(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef expected_strides);

void check_number(const char* op, const Number& number, double value);

// The numbers that a functor declares.
template <class Op, class... N>
void check_numbers(N... values) {
  if constexpr (sizeof...(N) > 0) {
    static_assert(std::size(Op::numbers) == sizeof...(N));
    const Number* number = Op::numbers;
    (check_number(Op::name, *number++, values), ...);
  }
}

}  // namespace clext
