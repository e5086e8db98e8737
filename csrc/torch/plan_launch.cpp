// ParameterPlan's launches: made once, with every check, and compared with the tensors at each
// call.
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <string_view>

#include "torch/plan.h"

namespace clext {

namespace {

constexpr std::string_view kParameters = "params";
constexpr std::string_view kGradients = "grads";

const ListKind* gradient_list(const std::vector<ListKind>& lists) {
  for (const ListKind& list : lists) {
    if (list.name == kGradients) return &list;
  }
  return nullptr;
}

// Memory that is shared until it is written (copy on write) gets another address when it is.
inline void* memory_of(c10::StorageImpl& storage, bool written) {
  return written ? storage.mutable_data() : const_cast<void*>(storage.data());
}

// As const_data_ptr() or mutable_data_ptr() of a strided tensor.
inline void* data_of(const at::TensorImpl& tensor, bool written) {
  void* memory = memory_of(*tensor.unsafe_storage().unsafeGetStorageImpl(), written);
  if (tensor.numel() == 0) return nullptr;
  return static_cast<char*>(memory) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

// Whether an index means the same place in memory as in the parameter that was checked.
inline bool same_geometry(const at::TensorImpl& tensor, const int64_t* known, size_t dim) {
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  if (sizes.size() != dim) return false;
  for (size_t d = 0; d < dim; ++d) {
    if (sizes[d] != known[d] || (strides[d] != known[dim + d] && sizes[d] > 1)) return false;
  }
  return true;
}

}  // namespace

// Brings the launch up to date; true if it was made anew.
bool ParameterPlan::prepare(Launch& launch, const char* op, const std::vector<ListKind>& lists) {
  if (launch.lists == &lists && is_current(launch)) return false;
  launch.lists = nullptr;
  const ListKind* gradient = gradient_list(lists);
  launch.writes_gradients = gradient != nullptr && gradient->access != Access::Read;
  choose(launch);
  std::vector<at::Tensor> grads;
  if (gradient != nullptr) grads = gradients(launch);
  std::vector<std::vector<at::Tensor>> tensors(lists.size());
  std::vector<ListArgument> arguments;
  for (size_t a = 0; a < lists.size(); ++a) {
    if (lists[a].name == kGradients) {
      tensors[a] = grads;
    } else {
      const auto& all = lists[a].name == kParameters ? params_ : entries(op, lists[a].name);
      for (const size_t i : launch.chosen) tensors[a].push_back(all[i]);
    }
    arguments.push_back({lists[a], tensors[a]});
  }
  std::vector<std::string> names;
  for (const size_t i : launch.chosen) names.push_back(names_[i]);
  launch.prepared = check_lists(op, arguments, names);
  if (launch.writes_gradients) {
    for (size_t k = 0; k < grads.size(); ++k) params_[launch.chosen[k]].mutable_grad() = grads[k];
  }
  remember(launch, arguments);
  // A gradient that had to be copied for this launch is stale at the next one, and tensors made in
  // inference mode may be written in some modes only.
  if (launch.prepared.copies.empty() && !params_[0].is_inference()) launch.lists = &lists;
  return true;
}

bool ParameterPlan::takes_part(const at::Tensor& param, Part part) const {
  if (part == Part::All || param.unsafeGetTensorImpl()->grad().defined()) return true;
  return part == Part::Trainable && param.requires_grad();
}

void ParameterPlan::choose(Launch& launch) const {
  launch.chosen.clear();
  launch.left_out.clear();
  if (launch.part == Part::Pulled) {
    launch.chosen = pull_.chosen;
    return;
  }
  for (size_t i = 0; i < params_.size(); ++i) {
    (takes_part(params_[i], launch.part) ? launch.chosen : launch.left_out).push_back(i);
  }
}

// Those of the chosen parameters; new ones are theirs when everything has been checked.
std::vector<at::Tensor> ParameterPlan::gradients(const Launch& launch) const {
  std::vector<at::Tensor> grads;
  for (const size_t i : launch.chosen) {
    const at::Tensor& grad = params_[i].grad();
    if (!grad.defined()) {
      grads.push_back(at::zeros_like(params_[i].detach()));
    } else {
      // Autograd may leave the lazy negative of another tensor, which cannot be written in place.
      grads.push_back(launch.writes_gradients ? grad.resolve_neg() : grad);
    }
  }
  return grads;
}

// After the check: where everything is, for comparison.
void ParameterPlan::remember(Launch& launch, const std::vector<ListArgument>& arguments) const {
  launch.keys = params_[0].key_set();
  launch.active.clear();
  launch.geometry.clear();
  launch.places.clear();
  for (const size_t i : launch.chosen) {
    const at::Tensor& param = params_[i];
    launch.active.push_back({param.unsafeGetTensorImpl(), nullptr, nullptr, launch.geometry.size(),
                             static_cast<size_t>(param.dim())});
    for (const at::IntArrayRef numbers : {param.sizes(), param.strides()}) {
      launch.geometry.insert(launch.geometry.end(), numbers.begin(), numbers.end());
    }
  }
  for (size_t a = 0; a < arguments.size(); ++a) {
    const bool written = arguments[a].access != Access::Read;
    if (arguments[a].name == kParameters) launch.writes_parameters = written;
    for (size_t k = 0; k < launch.active.size(); ++k) {
      const auto [group_index, index] = launch.prepared.positions[k];
      TensorLists& group = launch.prepared.groups[group_index];
      void** pointer = &group.pointers[a * group.sizes.size() + index];
      if (arguments[a].name == kParameters) {
        launch.active[k].data = *pointer;
      } else if (arguments[a].name == kGradients) {
        launch.active[k].gradient = pointer;
      } else {
        const at::TensorImpl* tensor = arguments[a].tensors[k].unsafeGetTensorImpl();
        c10::StorageImpl* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
        launch.places.push_back({tensor, storage, memory_of(*storage, written), written});
      }
    }
  }
}

// Whether the launch still fits, its pointers to gradients up to date; if not, only a new check can
// tell what does. An address alone does not: memory is used again for other shapes.
bool ParameterPlan::is_current(const Launch& launch) const {
  if (launch.part == Part::Pulled && launch.chosen != pull_.chosen) return false;
  for (const size_t i : launch.left_out) {
    if (takes_part(params_[i], launch.part)) return false;
  }
  const auto fits = [&](const at::TensorImpl& tensor, const Active& active) {
    return tensor.key_set() == launch.keys && tensor.dtype() == active.parameter->dtype() &&
           same_geometry(tensor, launch.geometry.data() + active.geometry, active.dim);
  };
  for (const Active& active : launch.active) {
    if (!fits(*active.parameter, active) ||
        data_of(*active.parameter, launch.writes_parameters) != active.data) {
      return false;
    }
    if (active.gradient == nullptr) continue;
    const at::Tensor& gradient = active.parameter->grad();
    if (!gradient.defined() || !fits(*gradient.unsafeGetTensorImpl(), active)) return false;
    *active.gradient = data_of(*gradient.unsafeGetTensorImpl(), launch.writes_gradients);
  }
  for (const Place& place : launch.places) {
    c10::StorageImpl* storage = place.tensor->unsafe_storage().unsafeGetStorageImpl();
    if (storage != place.storage || memory_of(*storage, place.written) != place.data) return false;
  }
  return true;
}

}  // namespace clext
