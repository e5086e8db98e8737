// From the storage types of a launch to the type that its kernel was compiled for.
#pragma once

#include <type_traits>

#include "math/element.h"
#include "math/storage.h"
#include "tensor_lists.h"

namespace clext {

// Calls `run` with an object of the storage type T: float, double, BFloat16, Float16, or Compact of
// one where the functor has lists that may be so.
template <class Op, class F>
void with_storage(const TensorLists& lists, const F& run) {
  const auto with_state = [&](auto parameter) {
    using T = decltype(parameter);
    if constexpr (kHasList<Storage::Consolidated, Op> && !std::is_same_v<T, double>) {
      if (lists.compact) return run(Compact<T>{});
    }
    run(parameter);
  };
  switch (lists.type) {
    case StorageType::Float32:
      return with_state(float{});
    case StorageType::Float64:
      return with_state(double{});
    case StorageType::BFloat16:
      return with_state(BFloat16{});
    case StorageType::Float16:
      return with_state(Float16{});
  }
}

}  // namespace clext
