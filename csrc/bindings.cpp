// The Python module clext._C. The ops themselves are registered with torch's dispatcher (ops.cpp).
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of clext; use clext.ops and clext.methods.";
  m.def("build_info", &build_info);

  using clext::ParameterPlan;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<ParameterPlan>(m, "ParameterPlan")
      .def(py::init<std::vector<std::string>, std::vector<at::Tensor>, ParameterPlan::State>(),
           py::arg("names"), py::arg("params"), py::arg("state"))
      .def("quadratic_penalty", &ParameterPlan::quadratic_penalty, no_gil)
      .def("add_quadratic_penalty_grad_", &ParameterPlan::add_quadratic_penalty_grad_,
           py::arg("strength"), no_gil)
      .def("accumulate_path_integral_", &ParameterPlan::accumulate_path_integral_,
           py::arg("strength"), no_gil)
      .def("riemannian_walk_step_", &ParameterPlan::riemannian_walk_step_, py::arg("strength"),
           py::arg("decay"), no_gil)
      .def("accumulate_riemannian_walk_score_", &ParameterPlan::accumulate_riemannian_walk_score_,
           py::arg("eps"), no_gil)
      .def("consolidate_importance_", &ParameterPlan::consolidate_importance_, py::arg("estimate"),
           py::arg("gamma"), no_gil)
      .def("consolidate_all_anchors_", &ParameterPlan::consolidate_all_anchors_,
           py::arg("estimate"), py::arg("gamma"), no_gil)
      .def("consolidate_path_integral_", &ParameterPlan::consolidate_path_integral_, py::arg("xi"),
           no_gil)
      .def("consolidate_riemannian_walk_", &ParameterPlan::consolidate_riemannian_walk_,
           py::arg("mix"), no_gil);
}
