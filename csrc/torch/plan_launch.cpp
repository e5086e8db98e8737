// ParameterPlan's launches: made once, with every check, and compared with the parameters at each
// call.
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>

#include "torch/plan.h"

namespace clext {

namespace {

// As at::Tensor::grad(), which also asks each time whether the tensor is a leaf.
const at::Tensor& gradient_of(const at::TensorImpl& param) { return param.grad(); }

// Whether an index means the same place in memory as it did when the launch was checked.
bool same_geometry(const at::TensorImpl& tensor, const int64_t* known, size_t dim) {
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  if (sizes.size() != dim) return false;
  for (size_t d = 0; d < dim; ++d) {
    if (sizes[d] != known[d]) return false;
    if (strides[d] != known[dim + d] && sizes[d] > 1) return false;
  }
  return true;
}

// The same in every number: what is usual, and quick to tell.
inline bool identical_geometry(const at::TensorImpl& tensor, const int64_t* known, size_t dim) {
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  if (sizes.size() != dim) return false;
  int64_t difference = 0;
  for (size_t d = 0; d < dim; ++d) {
    difference |= (sizes[d] ^ known[d]) | (strides[d] ^ known[dim + d]);
  }
  return difference == 0;
}

// As const_data_ptr() or mutable_data_ptr() of a strided tensor that has a storage.
inline void* data_of(const at::TensorImpl& tensor, Access access) {
  c10::StorageImpl* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  void* data =
      access == Access::Read ? const_cast<void*>(storage->data()) : storage->mutable_data();
  if (tensor.numel() == 0) return nullptr;
  return static_cast<char*>(data) +
         tensor.storage_offset() * static_cast<int64_t>(tensor.dtype().itemsize());
}

}  // namespace

bool ParameterPlan::takes_part(const at::Tensor& param, Missing missing) const {
  if (missing == Missing::Irrelevant) return true;
  if (gradient_of(*param.unsafeGetTensorImpl()).defined()) return true;
  return missing == Missing::Created && param.requires_grad();
}

// Fills the launch's tables of parameters, all but the pointers.
void ParameterPlan::choose_active(Launch& launch) const {
  launch.chosen.clear();
  launch.active.clear();
  launch.left_out.clear();
  launch.geometry.clear();
  if (launch.missing == Missing::Kept) {
    launch.chosen = penalty_grad_.chosen;
  } else {
    for (size_t i = 0; i < params_.size(); ++i) {
      (takes_part(params_[i], launch.missing) ? launch.chosen : launch.left_out).push_back(i);
    }
  }
  for (const size_t i : launch.chosen) {
    const at::Tensor& param = params_[i];
    launch.active.push_back({param.unsafeGetTensorImpl(), nullptr, nullptr, nullptr, nullptr,
                             nullptr, launch.geometry.size(), static_cast<uint32_t>(param.dim()),
                             param.scalar_type()});
    for (const at::IntArrayRef numbers : {param.sizes(), param.strides()}) {
      launch.geometry.insert(launch.geometry.end(), numbers.begin(), numbers.end());
    }
  }
}

// After the check: where the launch keeps each parameter's pointers, and where its state is.
void ParameterPlan::remember(Launch& launch, const std::vector<Source>& sources,
                             const std::vector<ListArgument>& arguments) const {
  launch.state.clear();
  launch.memory.clear();
  std::map<const c10::StorageImpl*, size_t> memory_of;
  for (size_t a = 0; a < sources.size(); ++a) {
    const ListArgument& argument = arguments[a];
    const bool written = argument.access != Access::Read;
    if (sources[a].kind == Source::kParameter) launch.parameter_access = argument.access;
    if (sources[a].kind == Source::kGradient) launch.gradient_access = argument.access;
    for (size_t k = 0; k < launch.active.size(); ++k) {
      Active& active = launch.active[k];
      if (sources[a].kind == Source::kState || sources[a].kind == Source::kStep) {
        const at::Tensor& tensor = argument.tensors[k];
        const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
        launch.state.push_back({tensor.unsafeGetTensorImpl(), storage});
        const auto [known, is_new] = memory_of.try_emplace(storage, launch.memory.size());
        if (is_new) launch.memory.push_back({tensor.storage(), storage->data(), false});
        launch.memory[known->second].written |= written;
        continue;
      }
      const auto [group_index, index] = launch.prepared.positions[k];
      TensorLists& group = launch.prepared.groups[group_index];
      void** pointer = &group.pointers[a * group.sizes.size() + index];
      if (sources[a].kind == Source::kParameter) {
        active.parameter_pointer = pointer;
      } else {
        active.gradient_pointer = pointer;
        active.gradient = argument.tensors[k].unsafeGetTensorImpl();
      }
    }
  }
}

void ParameterPlan::rebuild(const char* op_name, Launch& launch, const std::vector<Source>& sources,
                            const std::vector<ListKind>& kinds) {
  launch.valid = false;
  choose_active(launch);
  std::vector<std::string> names;
  std::vector<at::Tensor> params, grads;
  bool writes_grads = false;
  for (size_t a = 0; a < sources.size(); ++a) {
    writes_grads |= sources[a].kind == Source::kGradient && kinds[a].access != Access::Read;
  }
  for (const size_t i : launch.chosen) {
    const at::Tensor& param = params_[i];
    names.push_back(names_[i]);
    params.push_back(param);
    const bool create = launch.missing == Missing::Created && !param.grad().defined();
    if (create) {
      grads.push_back(at::zeros_like(param.detach()));
    } else {
      // Autograd may leave the lazy negative of another tensor, which cannot be written in place.
      grads.push_back(writes_grads ? param.grad().resolve_neg() : param.grad());
    }
  }

  std::vector<std::vector<at::Tensor>> tensors(sources.size());
  std::vector<ListArgument> arguments;
  size_t layout = 0;
  for (size_t a = 0; a < sources.size(); ++a) {
    if (sources[a].kind == Source::kParameter) layout = a;
    if (sources[a].kind == Source::kParameter || sources[a].kind == Source::kGradient) {
      tensors[a] = sources[a].kind == Source::kParameter ? params : grads;
    } else {
      const std::vector<at::Tensor>& all = tensors_of(op_name, sources[a]);
      for (const size_t i : launch.chosen) tensors[a].push_back(all[i]);
    }
    arguments.push_back({sources[a].name, tensors[a], kinds[a].storage, kinds[a].access});
  }
  launch.prepared = check_lists(op_name, arguments, layout, names);
  if (writes_grads) {
    for (size_t k = 0; k < grads.size(); ++k) params[k].mutable_grad() = grads[k];
  }
  const c10::DispatchKeySet keys = params_[0].key_set();
  launch.keys = params_[0].is_inference() ? c10::DispatchKeySet() : keys;
  remember(launch, sources, arguments);
  // A gradient that had to be copied for this launch is stale at the next one.
  launch.valid = launch.prepared.copies.empty();
}

void ParameterPlan::prefetch(const Active& active) {
  constexpr int kLine = 64;
  for (const at::TensorImpl* tensor : {active.parameter, active.gradient}) {
    const char* begin = reinterpret_cast<const char*>(tensor);
    __builtin_prefetch(begin);
    __builtin_prefetch(begin + kLine);
    __builtin_prefetch(begin + 2 * kLine);
  }
  __builtin_prefetch(active.parameter_storage);
  __builtin_prefetch(active.gradient_storage);
}

// Brings the pointers of gradients up to date; false if only a new check can tell whether
// everything still fits. An address alone does not tell: memory is used again for other shapes.
bool ParameterPlan::refresh(Launch& launch) const {
  if (launch.missing == Missing::Kept && launch.chosen != penalty_grad_.chosen) return false;
  for (const size_t i : launch.left_out) {
    if (takes_part(params_[i], launch.missing)) return false;
  }
  for (const StateMemory& memory : launch.memory) {
    c10::StorageImpl* storage = memory.storage.unsafeGetStorageImpl();
    const void* data = memory.written ? storage->mutable_data() : storage->data();
    if (data != memory.data) return false;
  }
  bool moved = false;
  for (const StateCell& cell : launch.state) {
    moved |= cell.tensor->unsafe_storage().unsafeGetStorageImpl() != cell.storage;
  }
  if (moved) return false;
  if (launch.active.empty()) return true;
  const at::Device device = *launch.prepared.device;
  const auto fits = [&](at::TensorImpl& tensor, const Active& active, Access access) {
    const int64_t* known = launch.geometry.data() + active.geometry;
    if (tensor.device() != device || tensor.dtype() != active.dtype || !tensor.unsafe_storage()) {
      return false;
    }
    // Equal keys: strided, and made in the same mode.
    if (tensor.key_set() == launch.keys && identical_geometry(tensor, known, active.dim)) {
      return true;
    }
    return tensor.layout() == at::kStrided && holds_its_elements(tensor) &&
           same_geometry(tensor, known, active.dim) &&
           (access == Access::Read || !tensor.is_inference() || c10::InferenceMode::is_enabled());
  };
  const size_t count = launch.active.size();
  for (size_t k = 0; k < count; ++k) {
    prefetch(launch.active[std::min(k + kPrefetchDistance, count - 1)]);
    Active& active = launch.active[k];
    if (active.parameter_pointer != nullptr) {
      if (!fits(*active.parameter, active, launch.parameter_access)) return false;
      void* pointer = data_of(*active.parameter, launch.parameter_access);
      if (pointer != *active.parameter_pointer) return false;
    }
    active.parameter_storage = active.parameter->unsafe_storage().unsafeGetStorageImpl();
    if (active.gradient_pointer != nullptr) {
      const at::Tensor& gradient = gradient_of(*active.parameter);
      if (!gradient.defined()) return false;
      active.gradient = gradient.unsafeGetTensorImpl();
      if (!fits(*active.gradient, active, launch.gradient_access)) return false;
      active.gradient_storage = active.gradient->unsafe_storage().unsafeGetStorageImpl();
      *active.gradient_pointer = data_of(*active.gradient, launch.gradient_access);
    }
  }
  return true;
}

}  // namespace clext
