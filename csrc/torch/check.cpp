#include "torch/check.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <string_view>
#include <utility>

namespace clext {

namespace {

std::optional<StorageType> storage_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return StorageType::Float32;
    case at::kDouble:
      return StorageType::Float64;
    case at::kBFloat16:
      return StorageType::BFloat16;
    case at::kHalf:
      return StorageType::Float16;
    default:
      return std::nullopt;
  }
}

at::ScalarType state_dtype(at::ScalarType parameter) {
  return parameter == at::kDouble ? at::kDouble : at::kFloat;
}

// As Python writes it: float32, not Float.
std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// Everything a message needs to say where it happened.
class Context {
 public:
  Context(const char* op, const std::vector<ListArgument>& arguments, size_t layout,
          const std::vector<std::string>& names)
      : op_(op), arguments_(arguments), layout_(layout), names_(names) {}

  std::string entry(size_t argument, size_t i) const {
    std::string text = std::string(arguments_[argument].name) + "[" + std::to_string(i) + "]";
    if (i < names_.size()) text += " of parameter '" + names_[i] + "'";
    return text;
  }

  std::string at(size_t argument, size_t i) const {
    return std::string(op_) + ": " + entry(argument, i);
  }

  std::string expected_from(size_t i) const {
    return std::string(" (") + arguments_[layout_].name + "[" + std::to_string(i) + "])";
  }

  const char* op() const { return op_; }

 private:
  const char* op_;
  const std::vector<ListArgument>& arguments_;
  size_t layout_;
  const std::vector<std::string>& names_;
};

// The list that gives shapes and strides.
size_t layout_of(const std::vector<ListArgument>& arguments) {
  const auto is_params = [](const auto& a) { return std::string_view(a.name) == "params"; };
  const auto has_no_rows = [](const auto& a) { return a.storage != Storage::Rows; };
  auto found = std::find_if(arguments.begin(), arguments.end(), is_params);
  if (found == arguments.end()) {
    found = std::find_if(arguments.begin(), arguments.end(), has_no_rows);
  }
  return static_cast<size_t>(found - arguments.begin());
}

void check_lengths(const Context& where, const std::vector<ListArgument>& arguments,
                   size_t layout) {
  const size_t expected = arguments[layout].tensors.size();
  for (const ListArgument& argument : arguments) {
    TORCH_CHECK_VALUE(argument.tensors.size() == expected, where.op(), ": ", argument.name, " has ",
                      argument.tensors.size(), " tensors, expected ", expected, " (as many as ",
                      arguments[layout].name, ")");
  }
}

// The dtype that decides the storage type of entry i: the parameter's, or the gradient's where the
// op has no parameters, else the state's.
at::ScalarType leading_dtype(const Context& where, const std::vector<ListArgument>& arguments,
                             size_t layout, size_t i) {
  const auto is_parameter = [&](size_t a) { return arguments[a].storage == Storage::Parameter; };
  size_t leading = layout;
  for (size_t a = 0; a < arguments.size() && !is_parameter(leading); ++a) {
    if (is_parameter(a)) leading = a;
  }
  const at::Tensor& tensor = arguments[leading].tensors[i];
  TORCH_CHECK_VALUE(tensor.defined(), where.at(leading, i), " is undefined, expected a tensor");
  const at::ScalarType dtype = tensor.scalar_type();
  const bool is_state = arguments[leading].storage != Storage::Parameter;
  const bool known = is_state ? dtype == state_dtype(dtype) : storage_type(dtype).has_value();
  TORCH_CHECK_TYPE(known, where.at(leading, i), " has dtype ", name_of(dtype), ", expected ",
                   is_state ? "float32 or float64" : "float32, float64, bfloat16 or float16");
  return dtype;
}

void check_shape(const Context& where, size_t a, size_t i, at::IntArrayRef sizes,
                 at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(sizes == expected, where.at(a, i), " has shape ", sizes, ", expected ",
                    expected, where.expected_from(i));
}

// Wrappers and zeros without memory have no pointer to give.
bool has_memory(const at::TensorImpl& tensor) {
  const c10::DispatchKeySet without({c10::DispatchKey::Python, c10::DispatchKey::ZeroTensor});
  return !tensor.key_set().has_any(without) && tensor.has_storage();
}

// What entry i of each list is made of.
struct Dtypes {
  at::ScalarType leading;
  at::ScalarType consolidated;  // anchors and importances: the state's, or bfloat16
};

Dtypes dtypes_of(const Context& where, const std::vector<ListArgument>& arguments, size_t layout,
                 size_t i) {
  const at::ScalarType leading = leading_dtype(where, arguments, layout, i);
  const auto is_consolidated = [](const auto& a) { return a.storage == Storage::Consolidated; };
  const auto first = std::find_if(arguments.begin(), arguments.end(), is_consolidated);
  const bool is_compact = first != arguments.end() && leading != at::kDouble &&
                          first->tensors[i].defined() &&
                          first->tensors[i].scalar_type() == at::kBFloat16;
  return {leading, is_compact ? at::kBFloat16 : state_dtype(leading)};
}

void check_dtype(const Context& where, const ListArgument& argument, size_t a, size_t i,
                 const Dtypes& dtypes) {
  const bool is_parameter = argument.storage == Storage::Parameter;
  const at::ScalarType expected = is_parameter ? dtypes.leading
                                  : argument.storage == Storage::Consolidated
                                      ? dtypes.consolidated
                                      : state_dtype(dtypes.leading);
  const at::ScalarType found = argument.tensors[i].scalar_type();
  TORCH_CHECK_TYPE(found == expected, where.at(a, i), " has dtype ", name_of(found), ", expected ",
                   name_of(expected),
                   is_parameter ? ""
                                : " (state is float64 for float64 parameters, else float32; then "
                                  "anchors and importances may both be bfloat16)");
}

void check_tensor(const Context& where, const std::vector<ListArgument>& arguments, size_t a,
                  size_t i, const Dtypes& dtypes, const at::Tensor& reference, at::Device device) {
  const ListArgument& argument = arguments[a];
  const at::Tensor& tensor = argument.tensors[i];
  TORCH_CHECK_VALUE(tensor.defined(), where.at(a, i), " is undefined, expected a tensor");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, where.at(a, i), " has layout ", tensor.layout(),
                   ", expected a dense (strided) tensor; build layers such as "
                   "Embedding with sparse=False");
  TORCH_CHECK_TYPE(has_memory(*tensor.unsafeGetTensorImpl()), where.at(a, i),
                   " has no memory of its own (a FakeTensor, a DTensor or another wrapper, or a "
                   "zero that was never written down), expected a plain tensor");
  TORCH_CHECK_VALUE(argument.access == Access::Read || !tensor.is_neg(), where.at(a, i),
                    " is the lazy negative of its memory, expected a plain tensor since it is "
                    "written in place; call resolve_neg()");
  TORCH_CHECK_VALUE(tensor.device() == device, where.at(a, i), " is on ", tensor.device(),
                    ", expected ", device, " (all tensors of one call share a device)");
  // Torch refuses to count the change of such a tensor, but only after it has been made.
  TORCH_CHECK_VALUE(
      argument.access == Access::Read || !tensor.is_inference() || c10::InferenceMode::is_enabled(),
      where.at(a, i),
      " was made in torch.inference_mode(), expected a normal tensor since it is "
      "written outside of it; clone() it here");
  check_dtype(where, argument, a, i, dtypes);
  if (argument.storage == Storage::Rows) {
    TORCH_CHECK_VALUE(tensor.dim() == reference.dim() + 1, where.at(a, i), " has shape ",
                      tensor.sizes(), ", expected one row per output of shape ", reference.sizes(),
                      where.expected_from(i));
    check_shape(where, a, i, tensor.sizes().slice(1), reference.sizes());
  } else if (argument.storage == Storage::Scalars) {
    TORCH_CHECK_VALUE(tensor.dim() == 0, where.at(a, i), " has shape ", tensor.sizes(),
                      ", expected a 0-dim tensor");
  } else {
    check_shape(where, a, i, tensor.sizes(), reference.sizes());
  }
}

// The tensor itself where it is laid out like `reference`; a copy that is where it may be copied.
at::Tensor lay_out(const Context& where, const ListArgument& argument, size_t a, size_t i,
                   const at::Tensor& reference, std::vector<at::Tensor>& copies) {
  const at::Tensor& tensor = argument.tensors[i];
  if (argument.storage == Storage::Scalars) return tensor;
  const bool rows = argument.storage == Storage::Rows;
  const at::IntArrayRef strides = rows ? tensor.strides().slice(1) : tensor.strides();
  if (!tensor.is_neg() && same_layout(reference.sizes(), strides, reference.strides())) {
    return tensor;
  }
  TORCH_CHECK_VALUE(argument.access == Access::Read, where.at(a, i), " has strides ",
                    tensor.strides(), ", expected ", reference.strides(), where.expected_from(i),
                    "; it is written in place, so create it with torch.empty_like");
  std::vector<int64_t> laid_out = reference.strides().vec();
  if (rows) laid_out.insert(laid_out.begin(), reference.numel());
  copies.push_back(
      at::empty_strided(tensor.sizes(), laid_out, tensor.options()).copy_(tensor.detach()));
  return copies.back();
}

struct Extent {
  const char* begin;
  const char* end;
  size_t argument;
  size_t index;
};

Extent extent_of(const at::Tensor& tensor, size_t argument, size_t index) {
  // Rows may lie apart; between first and last element is all that matters here.
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size()), argument, index};
}

// A tensor that is written must not share memory with any other: the result would depend on the
// order of the threads, or (a saved copy that aliases the live parameter) silently be nothing.
void check_overlap(const Context& where, const std::vector<ListArgument>& arguments) {
  const auto is_written = [&](size_t a) { return arguments[a].access != Access::Read; };
  bool any_written = false;
  for (size_t a = 0; a < arguments.size(); ++a) any_written |= is_written(a);
  if (!any_written) return;

  std::vector<Extent> extents;
  for (size_t a = 0; a < arguments.size(); ++a) {
    for (size_t i = 0; i < arguments[a].tensors.size(); ++i) {
      const at::Tensor& tensor = arguments[a].tensors[i];
      if (tensor.numel() > 0) extents.push_back(extent_of(tensor, a, i));
    }
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
  const Extent* furthest = nullptr;          // of all before this one
  const Extent* furthest_written = nullptr;  // of those that are written
  for (const Extent& extent : extents) {
    const bool written = is_written(extent.argument);
    const Extent* other = written ? furthest : furthest_written;
    TORCH_CHECK_VALUE(other == nullptr || other->end <= extent.begin,
                      where.at(extent.argument, extent.index), " shares memory with ",
                      other == nullptr ? "" : where.entry(other->argument, other->index),
                      "; one of them is written in place, so give it memory of its own (clone)");
    if (furthest == nullptr || extent.end > furthest->end) furthest = &extent;
    if (written && (furthest_written == nullptr || extent.end > furthest_written->end)) {
      furthest_written = &extent;
    }
  }
}

void* pointer_of(const at::Tensor& tensor, Access access) {
  return access == Access::Read ? const_cast<void*>(tensor.const_data_ptr())
                                : tensor.mutable_data_ptr();
}

// Every condition on the arguments; returns the dtypes of each entry.
std::vector<Dtypes> check_all(const Context& where, const std::vector<ListArgument>& arguments,
                              size_t layout) {
  const at::TensorList references = arguments[layout].tensors;
  std::vector<Dtypes> dtypes;
  for (size_t i = 0; i < references.size(); ++i) {
    dtypes.push_back(dtypes_of(where, arguments, layout, i));
    const at::Tensor& reference = references[i];
    TORCH_CHECK_VALUE(reference.defined(), where.at(layout, i), " is undefined, expected a tensor");
    const at::Device device = references[0].device();
    check_tensor(where, arguments, layout, i, dtypes[i], reference, device);
    TORCH_CHECK_VALUE(reference.is_non_overlapping_and_dense(), where.at(layout, i), " of shape ",
                      reference.sizes(), " has strides ", reference.strides(),
                      ", expected a dense tensor without overlap; make it contiguous()");
    for (size_t a = 0; a < arguments.size(); ++a) {
      if (a != layout) check_tensor(where, arguments, a, i, dtypes[i], reference, device);
    }
  }
  check_overlap(where, arguments);
  return dtypes;
}

// Sorts the tensors by storage type and cuts them into chunks; pointers are still missing.
void make_groups(Prepared& prepared, at::TensorList references, const std::vector<Dtypes>& dtypes,
                 size_t list_count) {
  std::map<std::pair<StorageType, bool>, size_t> group_of;
  for (size_t i = 0; i < references.size(); ++i) {
    const StorageType type = *storage_type(dtypes[i].leading);
    const bool compact = dtypes[i].consolidated == at::kBFloat16;
    const auto [found, is_new] = group_of.try_emplace({type, compact}, prepared.groups.size());
    if (is_new) {
      prepared.groups.push_back({type, static_cast<int>(list_count), {}, {}, {}, {}, compact});
    }
    TensorLists& group = prepared.groups[found->second];
    prepared.positions.push_back({found->second, group.sizes.size()});
    group.sizes.push_back(references[i].numel());
    if (dtypes[i].leading == at::kDouble) prepared.state_dtype = at::kDouble;
  }
  const int64_t chunk_size = prepared.device->is_cuda() ? kCudaChunkSize : kCpuChunkSize;
  for (TensorLists& group : prepared.groups) {
    group.pointers.resize(list_count * group.sizes.size());
    group.chunks = make_chunks(group.sizes, chunk_size);
  }
}

}  // namespace

bool same_layout(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef expected_strides) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != expected_strides[d]) return false;
  }
  return true;
}

Prepared check_lists(const char* op, const std::vector<ListArgument>& arguments,
                     const std::vector<std::string>& parameter_names) {
  const size_t layout = layout_of(arguments);
  const Context where(op, arguments, layout, parameter_names);
  check_lengths(where, arguments, layout);
  const at::TensorList references = arguments[layout].tensors;
  Prepared prepared;
  if (references.empty()) return prepared;
  const std::vector<Dtypes> dtypes = check_all(where, arguments, layout);
  prepared.device = references[0].device();
  make_groups(prepared, references, dtypes, arguments.size());
  for (size_t a = 0; a < arguments.size(); ++a) {
    for (size_t i = 0; i < references.size(); ++i) {
      const at::Tensor tensor = lay_out(where, arguments[a], a, i, references[i], prepared.copies);
      const auto [group_index, index] = prepared.positions[i];
      TensorLists& group = prepared.groups[group_index];
      group.pointers[a * group.sizes.size() + index] = pointer_of(tensor, arguments[a].access);
      if (arguments[a].storage == Storage::Rows) {
        group.row_strides.resize(group.sizes.size());
        group.row_strides[index] = tensor.stride(0);
      }
    }
  }
  return prepared;
}

}  // namespace clext
