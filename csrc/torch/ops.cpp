// Every op of clext: schema, checks, launch. The formulas are in math/, one functor per op.
#include "torch/ops.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <string>

#include "math/importance.h"
#include "math/path.h"
#include "math/penalty.h"
#include "math/projection.h"
#include "math/sliced.h"

namespace clext {

void consolidate_path_integral_(at::TensorList importances, at::TensorList anchors,
                                at::TensorList path, at::TensorList params, double xi,
                                bool clamp_total) {
  using Op = ConsolidatePathIntegral;
  check_numbers<Op>(xi);
  const ListsFor<Op> lists = {importances, anchors, path, params};
  run(check_lists<Op>(lists), Op{xi, clamp_total});
  mark_changed<Op>(lists);
}

void consolidate_riemannian_walk_(at::TensorList importances, at::TensorList anchors,
                                  at::TensorList score, at::TensorList task_score,
                                  at::TensorList fisher, at::TensorList params, double mix) {
  check_numbers<RiemannianWalkEnd>(mix);
  // The lists of all passes together, before the first one changes anything.
  const ListsFor<RiemannianWalkEnd> lists = {importances, anchors, score,
                                             task_score,  fisher,  params};
  check_lists<RiemannianWalkEnd>(lists);
  // A maximum does not mind the order, so any dense layout will do.
  std::vector<at::Tensor> dense_fisher;
  for (const at::Tensor& tensor : fisher) {
    dense_fisher.push_back(tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous());
  }
  const auto merge = check_lists<MergeRiemannianWalkScore>({score, task_score});
  const auto maximum = check_lists<Maximum>({dense_fisher});
  const auto consolidate =
      check_lists<ConsolidateRiemannianWalk>({importances, anchors, fisher, score, params});
  const at::Tensor max_score = run(merge, MergeRiemannianWalkScore{mix}, at::kDouble);
  const at::Tensor max_fisher = run(maximum, Maximum{}, at::kDouble);
  run(consolidate, ConsolidateRiemannianWalk{max_fisher.const_data_ptr<double>(),
                                             max_score.const_data_ptr<double>()});
  mark_changed<RiemannianWalkEnd>(lists);
}

namespace {

std::vector<at::Tensor> quadratic_penalty_backward(const at::Tensor& grad, at::TensorList params,
                                                   at::TensorList anchors,
                                                   at::TensorList importances) {
  using Op = QuadraticPenaltyBackward;
  TORCH_CHECK_VALUE(grad.dim() == 0, Op::name, ": grad has shape ", grad.sizes(),
                    ", expected a 0-dim tensor");
  std::vector<at::Tensor> grads;
  for (const at::Tensor& param : params) grads.push_back(at::empty_like(param));
  const Prepared prepared = check_lists<Op>({grads, params, anchors, importances});
  TORCH_CHECK_VALUE(!prepared.device || grad.device() == *prepared.device, Op::name,
                    ": grad is on ", grad.device(), ", expected ", *prepared.device);
  const at::Tensor grad_output = grad.to(at::kDouble);
  run(prepared, Op{grad_output.const_data_ptr<double>()});
  return grads;
}

void sliced_importance_(at::TensorList acc, at::TensorList jacobian, const at::Tensor& slices,
                        double scale) {
  using Op = SlicedImportance;
  check_number(Op::name, {"scale", Number::NotNegative}, scale);
  TORCH_CHECK_VALUE(slices.dim() == 2, Op::name, ": slices has shape ", slices.sizes(),
                    ", expected [slices, outputs]");
  const Prepared prepared = check_lists<Op>({acc, jacobian});
  const int64_t outputs = slices.size(1);
  for (size_t i = 0; i < jacobian.size(); ++i) {
    TORCH_CHECK_VALUE(jacobian[i].size(0) == outputs, Op::name, ": jacobian[", i, "] has ",
                      jacobian[i].size(0), " rows, expected ", outputs, " (the columns of slices)");
  }
  TORCH_CHECK_VALUE(!prepared.device || slices.device() == *prepared.device, Op::name,
                    ": slices is on ", slices.device(), ", expected ", *prepared.device);
  TORCH_CHECK_VALUE(prepared.groups.size() <= 1, Op::name,
                    ": acc mixes float32 and float64, expected one dtype");
  // In float64, which no matmul precision setting and no autocast touches: the kernel reads raw
  // numbers of the state's dtype.
  const at::Tensor directions = slices.detach().to(at::kDouble);
  const at::Tensor gram = at::mm(directions.t(), directions).to(prepared.state_dtype).contiguous();
  run(prepared, Op{gram.const_data_ptr(), outputs, scale});
  mark_changed<Op>({acc, jacobian});
}

// ------------------------------------------------------------------------------- registration

// The lists of a functor, as a schema has them.
template <class Op>
std::string schema_of_lists() {
  std::string schema;
  char alias = 'a';
  for (const ListKind& list : lists_of<Op>()) {
    if (!schema.empty()) schema += ", ";
    schema += "Tensor";
    if (list.access != Access::Read) schema += std::string("(") + alias++ + "!)";
    schema += std::string("[] ") + list.name;
  }
  return schema;
}

// The functions find the device themselves, so both dispatch keys get the same one.
template <class F>
void define(torch::Library& m, const std::string& schema, F function) {
  m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  const std::string name = schema.substr(0, schema.find('('));
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, function));
#if defined(CLEXT_WITH_CUDA)
  m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CUDA, function));
#endif
}

// An op that takes the functor's lists and `rest`, and returns nothing.
template <class Op, class F>
void define(torch::Library& m, const std::string& rest, F function) {
  define(m, std::string(Op::name) + "(" + schema_of_lists<Op>() + rest + ") -> ()", function);
}

template <size_t, class T>
using Each = T;

template <class Op, class = void>
constexpr size_t kNumbers = 0;
template <class Op>
constexpr size_t kNumbers<Op, std::void_t<decltype(Op::numbers)>> = std::size(Op::numbers);

// An op whose functor says everything: `apply` with as many arguments as it has lists and numbers.
template <class Op, class L = std::make_index_sequence<static_cast<size_t>(Op::lists::count)>,
          class N = std::make_index_sequence<kNumbers<Op>>>
struct Whole;
template <class Op, size_t... L, size_t... N>
struct Whole<Op, std::index_sequence<L...>, std::index_sequence<N...>> {
  static constexpr bool kReturns = Op::reduction != Reduction::None;

  static std::conditional_t<kReturns, at::Tensor, void> call(Each<L, at::TensorList>... lists,
                                                             Each<N, double>... numbers) {
    if constexpr (kReturns) {
      return apply<Op>({lists...}, numbers...);
    } else {
      apply<Op>({lists...}, numbers...);
    }
  }

  static void define(torch::Library& m) {
    std::string schema = std::string(Op::name) + "(" + schema_of_lists<Op>();
    ((schema += std::string(", float ") + Op::numbers[N].name), ...);
    clext::define(m, schema + (kReturns ? ") -> Tensor" : ") -> ()"), TORCH_FN(call));
  }
};

}  // namespace
}  // namespace clext

TORCH_LIBRARY(clext, m) {
  using namespace clext;
  // Shape functions and autograd formulas live there.
  m.set_python_module("clext.ops.torch_library");
  Whole<QuadraticPenalty>::define(m);
  define(m,
         "quadratic_penalty_backward(Tensor grad, Tensor[] params, Tensor[] anchors, "
         "Tensor[] importances) -> Tensor[]",
         TORCH_FN(quadratic_penalty_backward));
  Whole<AddQuadraticPenaltyGrad<false>>::define(m);
  Whole<AccumulatePathIntegral>::define(m);
  Whole<RiemannianWalkStep>::define(m);
  Whole<AccumulateRiemannianWalkScore>::define(m);
  Whole<AccumulateSquare>::define(m);
  Whole<AccumulateAbs>::define(m);
  define<SlicedImportance>(m, ", Tensor slices, float scale", TORCH_FN(sliced_importance_));
  define(m, "gradient_gram(Tensor[] rows, Tensor[] grads) -> Tensor", TORCH_FN(gradient_gram));
  define<ProjectGradient>(m, ", Tensor weights", TORCH_FN(project_gradient_));
  Whole<ConsolidateImportance>::define(m);
  Whole<ConsolidateAllAnchors>::define(m);
  define<ConsolidatePathIntegral>(m, ", float xi, *, bool clamp_total=False",
                                  TORCH_FN(consolidate_path_integral_));
  define<RiemannianWalkEnd>(m, ", float mix", TORCH_FN(consolidate_riemannian_walk_));
  // On a GPU the matrix products of torch's own library serve best, as the reference takes them.
  m.def("per_sample_sum(Tensor features, Tensor grads, *, str function='square') -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.impl("per_sample_sum", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(per_sample_sum)));
}
