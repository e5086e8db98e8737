// ParameterPlan: the parameters of a model and a method's state, held as handles in C++.
//
// Why: a training step calls the same ops with the same lists again and again. Passing hundreds of
// tensors from Python and checking them each time costs more than the arithmetic of a small model.
// The plan checks everything once, reads `.grad` in C++ at each call and keeps the launch (pointers
// and chunks) while the pointers stay the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "torch/check.h"
#include "torch/fused_step.h"

namespace clext {

class ParameterPlan {
 public:
  using State = std::map<std::string, std::vector<at::Tensor>>;

  // `names`: one per parameter, for messages. `state`: lists as long as `params`, each entry laid
  // out like its parameter; float32, or float64 for float64 parameters. `steps`: for the fused
  // optimizer steps that count, one 0-dim tensor of the state's dtype per parameter; else empty.
  ParameterPlan(std::vector<std::string> names, std::vector<at::Tensor> params, State state,
                std::vector<at::Tensor> steps = {});
  // Launches point into their own tables.
  ParameterPlan(const ParameterPlan&) = delete;
  ParameterPlan& operator=(const ParameterPlan&) = delete;

  // Whether a step takes microseconds: few parameters, on the CPU.
  bool is_short() const { return is_short_; }

  // The value alone, without autograd; strength not included.
  at::Tensor quadratic_penalty();
  // Creates `.grad` where there is none. Frozen parameters without gradient are left out. A state
  // with the lists "task_gradient" and "step_start" keeps there, in the same pass, the gradients as
  // they were before the pull, and the parameters.
  at::Tensor add_quadratic_penalty_grad_(double strength);
  // What those lists and the parameters as they are now add to the path, for the parameters that
  // the last pull was added to: `.grad` is not looked at.
  void accumulate_path_integral_();
  void riemannian_walk_step_(double decay);
  void accumulate_riemannian_walk_score_(double eps);

  void consolidate_importance_(const std::vector<at::Tensor>& estimate, double gamma);
  at::Tensor consolidate_all_anchors_(const std::vector<at::Tensor>& estimate, double gamma);
  void consolidate_path_integral_(double xi, bool clamp_total);
  void consolidate_riemannian_walk_(double mix);

  // Fused optimizer steps (plan_step.cpp), protected as far as the state has lists for it; return
  // the penalty's value before the step, if there is one. Parameters without gradient are left out.
  std::optional<at::Tensor> sgd_step_(const SgdArguments& arguments);
  std::optional<at::Tensor> adam_step_(const AdamArguments& arguments);

 private:
  // Where an op finds a list: the parameters, their gradients, a list of the state, or the steps.
  struct Source {
    enum Kind { kParameter, kGradient, kState, kStep } kind;
    const char* name;
    const char* state = nullptr;
  };

  // A parameter that takes part, as it was when the launch was checked, and where the launch keeps
  // its pointers. Each call compares all of them, so the record is small and holds no tensors.
  struct Active {
    at::TensorImpl* parameter;
    at::TensorImpl* gradient;  // of this call; read only where the op has a list of gradients
    c10::StorageImpl* parameter_storage;
    c10::StorageImpl* gradient_storage;
    void** parameter_pointer;  // null where the op has no such list
    void** gradient_pointer;
    size_t geometry;  // its place in Launch::geometry
    uint32_t dim;
    at::ScalarType dtype;
  };

  // State stays where it is unless somebody gives a tensor other memory (`.data = ...`); another
  // place in the same memory is not noticed.
  struct StateCell {
    const at::TensorImpl* tensor;  // kept alive by the plan's state
    const c10::StorageImpl* storage;
  };

  // The memory behind the state: state tensors usually share it, one buffer for a whole list.
  struct StateMemory {
    c10::Storage storage;  // held, so that the launch's pointers are valid whatever happens
    const void* data;      // moves with share_memory_() or a resized storage
    bool written;
  };

  // What happens to a parameter that has no gradient. Kept: those of the last pull take part.
  enum class Missing { Irrelevant, LeftOut, Created, Kept };

  struct Launch {
    Missing missing;
    bool valid = false;
    Prepared prepared = {};
    c10::DispatchKeySet keys = {};  // of a normal tensor on this device
    Access parameter_access = Access::Read;
    Access gradient_access = Access::Read;
    std::vector<size_t> chosen = {};     // the parameters that take part
    std::vector<Active> active = {};     // each of them
    std::vector<size_t> left_out = {};   // the others
    std::vector<int64_t> geometry = {};  // sizes, then strides, of each active parameter
    std::vector<StateCell> state = {};
    std::vector<StateMemory> memory = {};
  };

  template <class Op>
  at::Tensor call(const char* op_name, Launch& launch, const std::vector<Source>& sources,
                  const Op& op);
  void rebuild(const char* op_name, Launch& launch, const std::vector<Source>& sources,
               const std::vector<ListKind>& kinds);
  void check_kept(const char* op_name) const;
  void choose_active(Launch& launch) const;
  void remember(Launch& launch, const std::vector<Source>& sources,
                const std::vector<ListArgument>& arguments) const;
  bool refresh(Launch& launch) const;
  static constexpr size_t kPrefetchDistance = 8;
  static void prefetch(const Active& active);
  bool takes_part(const at::Tensor& param, Missing missing) const;
  const std::vector<at::Tensor>& state(const char* op_name, const char* name) const;
  const std::vector<at::Tensor>& tensors_of(const char* op_name, const Source& source) const;

  template <class F>
  void prepare_step(const char* op_name, int variant, const F& lists);
  Protection protection(const char* op_name);
  std::optional<at::Tensor> finish_step(at::Tensor value, bool clear_grad) const;

  std::vector<std::string> names_;
  std::vector<at::Tensor> params_;
  State state_;
  std::vector<at::Tensor> steps_;
  bool is_short_ = false;
  Launch penalty_{Missing::Irrelevant};
  Launch penalty_grad_{Missing::Created};
  Launch path_{Missing::Kept};
  Launch walk_{Missing::Kept};
  Launch score_{Missing::Irrelevant};
  Launch step_{Missing::LeftOut};
  int step_variant_ = 0;
  Counter counter_;
  std::optional<Protection> protection_;
};

}  // namespace clext
