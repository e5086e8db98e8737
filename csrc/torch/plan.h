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
#include <variant>
#include <vector>

#include "math/step.h"
#include "torch/check.h"

namespace clext {

struct StepArguments {
  std::variant<at::Tensor, double> lr;
  double weight_decay;
  bool maximize;
  double strength;
  double decay;
  bool proximal;
  bool clear_grad;
  std::optional<at::Tensor> grad_scale;
  std::optional<at::Tensor> found_inf;
  std::optional<at::Tensor> clip;
};

struct SgdArguments : StepArguments {
  double momentum;
  double dampening;
  bool nesterov;
};

struct AdamArguments : StepArguments {
  double beta1;
  double beta2;
  double eps;
  bool decoupled;
};

class ParameterPlan {
 public:
  using State = std::map<std::string, std::vector<at::Tensor>>;

  // `names`: one per parameter, for messages. `state`: lists as long as `params`, each entry laid
  // out like its parameter; float32, or float64 for float64 parameters; "anchor" and "importance"
  // may be bfloat16 instead of float32. `steps`: for the fused optimizer steps that count, one
  // 0-dim tensor of the state's dtype per parameter; else empty.
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

  // Once a task, with the ops' full checks.
  void consolidate_importance_(const std::vector<at::Tensor>& estimate, double gamma);
  at::Tensor consolidate_all_anchors_(const std::vector<at::Tensor>& estimate, double gamma);
  void consolidate_path_integral_(double xi, bool clamp_total);
  void consolidate_riemannian_walk_(double mix);

  // Fused optimizer steps (plan_step.cpp), protected as far as the state has lists for it; return
  // the penalty's value before the step, if there is one. Parameters without gradient are left out.
  std::optional<at::Tensor> sgd_step_(const SgdArguments& arguments);
  std::optional<at::Tensor> adam_step_(const AdamArguments& arguments);

 private:
  // Which parameters take part: all, those that have a gradient, those that have one or can get
  // one, or those that the last pull was added to.
  enum class Part { All, WithGradient, Trainable, Pulled };

  // A parameter that takes part, and where its elements were when the launch was made.
  struct Active {
    at::TensorImpl* parameter;
    const void* data;
    void** gradient;  // where the launch keeps the pointer to its gradient, if the op has gradients
    size_t geometry;  // the first of its sizes, which its strides follow, in Launch::geometry
    size_t dim;
  };

  // An entry of the state and the memory that it is in; another place there is not noticed.
  struct Place {
    const at::TensorImpl* tensor;
    const c10::StorageImpl* storage;
    const void* data;
    bool written;
  };

  struct Launch {
    Part part;
    const std::vector<ListKind>* lists = nullptr;  // those of the op; none: to be made anew
    Prepared prepared = {};
    c10::DispatchKeySet keys = {};  // of a normal tensor on this device
    bool writes_parameters = false;
    bool writes_gradients = false;
    std::vector<size_t> chosen = {};    // the parameters that take part
    std::vector<size_t> left_out = {};  // those that may come to have a gradient
    std::vector<Active> active = {};
    std::vector<int64_t> geometry = {};
    std::vector<Place> places = {};
  };

  // plan_launch.cpp
  bool prepare(Launch& launch, const char* op, const std::vector<ListKind>& lists);
  bool is_current(const Launch& launch) const;
  void choose(Launch& launch) const;
  std::vector<at::Tensor> gradients(const Launch& launch) const;
  void remember(Launch& launch, const std::vector<ListArgument>& arguments) const;
  bool takes_part(const at::Tensor& param, Part part) const;
  const std::vector<at::Tensor>& entries(const char* op, const std::string& list) const;

  template <class Op, class... N>
  at::Tensor call(Launch& launch, N... numbers);
  void check_pulled(const char* op) const;

  // plan_step.cpp
  template <class Op, class... Advance>
  std::optional<at::Tensor> step(const Op& op, const Advance&... advance);
  template <class Op>
  void advance(const Op& op);

  // The launch that counts the steps and leaves the coefficients for the launch that makes them.
  struct Counter {
    Prepared prepared;
    at::Tensor coefficients;
  };
  static Counter make_counter(const Prepared& step);

  std::vector<std::string> names_;
  std::vector<at::Tensor> params_;
  State state_;
  std::vector<at::Tensor> steps_;
  bool is_short_ = false;
  bool keeps_ = false;
  Protection protection_ = Protection::None;
  Launch penalty_{Part::All};
  Launch pull_{Part::Trainable};
  Launch path_{Part::Pulled};
  Launch walk_{Part::Pulled};
  Launch score_{Part::All};
  Launch step_{Part::WithGradient};
  Counter counter_;
};

}  // namespace clext
