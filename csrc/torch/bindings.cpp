// The Python module clext._C. The ops themselves are registered with torch's dispatcher (ops.cpp).
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/instruction_set.h"
#include "torch/plan.h"

namespace py = pybind11;

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = CLEXT_TORCH_VERSION;
  info["compiler"] = compiler();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cpu_path"] = clext::instruction_set_name();
  return info;
}

// The tensors of a Python list. Left to itself, pybind11 refuses the call and prints all that came.
std::vector<at::Tensor> tensors_of(const std::string& name, const py::object& list) {
  TORCH_CHECK_TYPE(py::isinstance<py::sequence>(list), name, " is of type ",
                   Py_TYPE(list.ptr())->tp_name, ", expected a list of tensors");
  std::vector<at::Tensor> tensors;
  for (const py::handle entry : list) {
    TORCH_CHECK_TYPE(THPVariable_Check(entry.ptr()), name, "[", tensors.size(), "] is of type ",
                     Py_TYPE(entry.ptr())->tp_name, ", expected a tensor");
    tensors.push_back(THPVariable_Unpack(entry.ptr()));
  }
  return tensors;
}

std::unique_ptr<clext::ParameterPlan> make_plan(std::vector<std::string> names,
                                                const py::object& params,
                                                const std::map<std::string, py::object>& state,
                                                const py::object& steps) {
  clext::ParameterPlan::State lists;
  for (const auto& [key, list] : state) lists[key] = tensors_of("ParameterPlan: " + key, list);
  return std::make_unique<clext::ParameterPlan>(
      std::move(names), tensors_of("ParameterPlan: params", params), std::move(lists),
      tensors_of("ParameterPlan: steps", steps));
}

// Hands over Python's lock while a long step runs; for a short one that would cost more than the
// step itself.
class WithoutLock {
 public:
  explicit WithoutLock(const clext::ParameterPlan& plan) {
    if (!plan.is_short()) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

// Binds a step.
template <class Result, class... Arguments>
auto step(Result (clext::ParameterPlan::*method)(Arguments...)) {
  return [method](clext::ParameterPlan& plan, Arguments... arguments) {
    const WithoutLock unlocked(plan);
    return (plan.*method)(arguments...);
  };
}

// Binds the end of a task, which takes an estimate.
template <class Result>
auto merge(Result (clext::ParameterPlan::*method)(const std::vector<at::Tensor>&, double),
           const char* name) {
  return [method, name](clext::ParameterPlan& plan, const py::object& estimate, double gamma) {
    const auto tensors = tensors_of(std::string(name) + ": estimate", estimate);
    const py::gil_scoped_release unlocked;
    return (plan.*method)(tensors, gamma);
  };
}

// Keyword arguments of Python, in the order of the binding below.

std::optional<at::Tensor> sgd_step_(clext::ParameterPlan& plan,
                                    const std::variant<at::Tensor, double>& lr, double momentum,
                                    double dampening, double weight_decay, bool nesterov,
                                    bool maximize, double strength, double decay, bool proximal,
                                    bool clear_grad, const std::optional<at::Tensor>& grad_scale,
                                    const std::optional<at::Tensor>& found_inf,
                                    const std::optional<at::Tensor>& clip) {
  const WithoutLock unlocked(plan);
  return plan.sgd_step_({{lr, weight_decay, maximize, strength, decay, proximal, clear_grad,
                          grad_scale, found_inf, clip},
                         momentum,
                         dampening,
                         nesterov});
}

std::optional<at::Tensor> adam_step_(clext::ParameterPlan& plan,
                                     const std::variant<at::Tensor, double>& lr, double beta1,
                                     double beta2, double eps, double weight_decay, bool decoupled,
                                     bool maximize, double strength, double decay, bool proximal,
                                     bool clear_grad, const std::optional<at::Tensor>& grad_scale,
                                     const std::optional<at::Tensor>& found_inf,
                                     const std::optional<at::Tensor>& clip) {
  const WithoutLock unlocked(plan);
  return plan.adam_step_({{lr, weight_decay, maximize, strength, decay, proximal, clear_grad,
                           grad_scale, found_inf, clip},
                          beta1,
                          beta2,
                          eps,
                          decoupled});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of clext; use clext.ops and clext.methods.";
  m.def("build_info", &build_info);

  using clext::ParameterPlan;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ParameterPlan>(m, "ParameterPlan")
      .def(py::init(&make_plan), py::arg("names"), py::arg("params"), py::arg("state"),
           py::arg("steps") = py::tuple())
      .def("quadratic_penalty", step(&ParameterPlan::quadratic_penalty))
      .def("add_quadratic_penalty_grad_", step(&ParameterPlan::add_quadratic_penalty_grad_),
           py::arg("strength"))
      .def("accumulate_path_integral_", step(&ParameterPlan::accumulate_path_integral_))
      .def("riemannian_walk_step_", step(&ParameterPlan::riemannian_walk_step_), py::arg("decay"))
      .def("accumulate_riemannian_walk_score_",
           step(&ParameterPlan::accumulate_riemannian_walk_score_), py::arg("eps"))
      .def("consolidate_importance_",
           merge(&ParameterPlan::consolidate_importance_, "consolidate_importance_"),
           py::arg("estimate"), py::arg("gamma"))
      .def("consolidate_all_anchors_",
           merge(&ParameterPlan::consolidate_all_anchors_, "consolidate_all_anchors_"),
           py::arg("estimate"), py::arg("gamma"))
      .def("consolidate_path_integral_", &ParameterPlan::consolidate_path_integral_, py::arg("xi"),
           py::arg("clamp_total") = false, no_gil)
      .def("consolidate_riemannian_walk_", &ParameterPlan::consolidate_riemannian_walk_,
           py::arg("mix"), no_gil)
      .def("sgd_step_", &sgd_step_, py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
           py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), py::arg("strength"),
           py::arg("decay"), py::arg("proximal"), py::arg("clear_grad"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("clip"))
      .def("adam_step_", &adam_step_, py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
           py::arg("eps"), py::arg("weight_decay"), py::arg("decoupled"), py::arg("maximize"),
           py::arg("strength"), py::arg("decay"), py::arg("proximal"), py::arg("clear_grad"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip"));
}
