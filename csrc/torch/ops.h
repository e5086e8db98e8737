// An op: from the arguments of a call to what it leaves behind. The lists, their names and the
// ranges of numbers are the functor's; ops.cpp registers them all with torch's dispatcher.
#pragma once

#include <string_view>

#include "torch/run.h"

namespace clext {

// Custom in-place ops have to tell autograd themselves that a tensor has changed.
template <class Op>
void mark_changed(const ListsFor<Op>& tensors) {
  size_t k = 0;
  for (const ListKind& list : lists_of<Op>()) {
    const at::TensorList entries = tensors[k++];
    if (list.access == Access::Read) continue;
    for (const at::Tensor& tensor : entries) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// The whole of an op whose functor needs nothing but numbers.
template <class Op, class... N>
at::Tensor apply(const ListsFor<Op>& tensors, N... numbers) {
  check_numbers<Op>(numbers...);
  at::Tensor result = run(check_lists<Op>(tensors), Op{numbers...});
  mark_changed<Op>(tensors);
  return result;
}

// Ops whose functors need more; the others of this kind are in ops.cpp alone.
void consolidate_path_integral_(at::TensorList importances, at::TensorList anchors,
                                at::TensorList path, at::TensorList params, double xi,
                                bool clamp_total);
void consolidate_riemannian_walk_(at::TensorList importances, at::TensorList anchors,
                                  at::TensorList score, at::TensorList task_score,
                                  at::TensorList fisher, at::TensorList params, double mix);
at::Tensor gradient_gram(at::TensorList rows, at::TensorList grads);
void project_gradient_(at::TensorList grads, at::TensorList rows, const at::Tensor& weights);
at::Tensor per_sample_sum(const at::Tensor& features, const at::Tensor& grads,
                          std::string_view function);

}  // namespace clext
