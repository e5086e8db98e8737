// Custom in-place ops have to tell autograd themselves that a tensor has changed.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace clext {

inline void mark_changed(std::initializer_list<at::TensorList> lists) {
  for (const at::TensorList list : lists) {
    for (const at::Tensor& tensor : list) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace clext
