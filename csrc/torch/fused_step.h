// The fused optimizer steps as the ops (ops_step.cpp) and ParameterPlan (plan_step.cpp) share them:
// arguments and their checks, the lists of each step, and its two launches.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <variant>
#include <vector>

#include "math/step.h"
#include "torch/check.h"

namespace clext {

// Named as in the schemas (ops.cpp).
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

// Everything that can be told without the lists.
void check_arguments(const char* op, const SgdArguments& arguments);
void check_arguments(const char* op, const AdamArguments& arguments);
// That lr and the other numbers of one element are where the lists are (none: the lists are empty).
void check_devices(const char* op, const StepArguments& arguments,
                   std::optional<at::Device> device);

// The level of protection that the lists which are given make up.
Protection protection_of(const char* op, bool anchors, bool importances, bool path, bool fisher);

// One list of a step: its name in the schema, and in the state of a ParameterPlan (null for
// parameters, gradients and steps).
struct StepList {
  const char* name;
  const char* state;
  ListKind kind;
};

// The lists of a step, parameters first, as the functor wants them; the last one of a step that
// counts is `steps`, whose place the coefficients take in the launch.
std::vector<StepList> sgd_lists(Protection protection, bool momentum, bool clear_grad);
std::vector<StepList> adam_lists(Protection protection, bool clear_grad);

// The launch that counts the steps and leaves the coefficients for the launch that makes them.
struct Counter {
  Prepared advance;
  at::Tensor coefficients;
};

// Takes the last list of `step` to be `steps`.
Counter make_counter(const Prepared& step);

// Launches the step over checked lists; returns the penalty's value (undefined without protection).
at::Tensor run_sgd(Prepared& step, Counter& counter, Protection protection,
                   const SgdArguments& arguments);
at::Tensor run_adam(Prepared& step, Counter& counter, Protection protection,
                    const AdamArguments& arguments);

}  // namespace clext
