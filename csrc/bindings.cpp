// The Python module clext._C. The ops themselves are registered with torch's dispatcher (ops.cpp).
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "cpu/instruction_set.h"
#include "plan.h"

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

// Binds a step. Python's lock is handed over while a long one runs; for a short one that would cost
// more than the step itself.
template <class Result, class... Arguments>
auto step(Result (clext::ParameterPlan::*method)(Arguments...)) {
  return [method](clext::ParameterPlan& plan, Arguments... arguments) {
    std::optional<py::gil_scoped_release> release;
    if (!plan.is_short()) release.emplace();
    return (plan.*method)(arguments...);
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of clext; use clext.ops and clext.methods.";
  m.def("build_info", &build_info);

  using clext::ParameterPlan;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ParameterPlan>(m, "ParameterPlan")
      .def(py::init<std::vector<std::string>, std::vector<at::Tensor>, ParameterPlan::State>(),
           py::arg("names"), py::arg("params"), py::arg("state"))
      .def("quadratic_penalty", step(&ParameterPlan::quadratic_penalty))
      .def("add_quadratic_penalty_grad_", step(&ParameterPlan::add_quadratic_penalty_grad_),
           py::arg("strength"))
      .def("accumulate_path_integral_", step(&ParameterPlan::accumulate_path_integral_),
           py::arg("strength"))
      .def("riemannian_walk_step_", step(&ParameterPlan::riemannian_walk_step_),
           py::arg("strength"), py::arg("decay"))
      .def("accumulate_riemannian_walk_score_",
           step(&ParameterPlan::accumulate_riemannian_walk_score_), py::arg("eps"))
      .def("consolidate_importance_", &ParameterPlan::consolidate_importance_, py::arg("estimate"),
           py::arg("gamma"), no_gil)
      .def("consolidate_all_anchors_", &ParameterPlan::consolidate_all_anchors_,
           py::arg("estimate"), py::arg("gamma"), no_gil)
      .def("consolidate_path_integral_", &ParameterPlan::consolidate_path_integral_, py::arg("xi"),
           no_gil)
      .def("consolidate_riemannian_walk_", &ParameterPlan::consolidate_riemannian_walk_,
           py::arg("mix"), no_gil);
}
