// The vocabulary of element formulas: what a functor in this folder says about itself, so that one
// driver per device (cpu/multi_tensor.h, cuda/multi_tensor.cuh) can run it over lists of tensors.
//
// A functor declares
//   using lists = Lists<...>;                 one entry per argument of operator(), in schema order
//   static constexpr Reduction reduction;     what becomes of the values that operator() returns
//   operator()(...)                           the formula for one element, in the accumulate type A
//   void prepare()                            optional: read device-side scalars once per thread
// and never loops, loads or stores by itself. Nothing here includes torch or CUDA headers.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define CLEXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Forced inlining lets the same formula be compiled for several instruction sets: it takes the
// target of the function that it is inlined into (see cpu/instruction_set.h).
#define CLEXT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace clext {

enum class Storage {
  Parameter,  // parameters and gradients: float, double, bfloat16 or float16
  State,      // importances, anchors, path integrals: float (double for double parameters)
  Rows,       // several state values per element, one row per model output (a Jacobian)
};

enum class Access {
  Read,
  Write,   // the old value is not loaded
  Update,  // loaded, changed, stored
};

enum class Reduction { None, Sum, Max };

template <Storage S, Access A>
struct List {
  static constexpr Storage storage = S;
  static constexpr Access access = A;
};

using ReadParameter = List<Storage::Parameter, Access::Read>;
using WriteParameter = List<Storage::Parameter, Access::Write>;
using UpdateParameter = List<Storage::Parameter, Access::Update>;
using ReadState = List<Storage::State, Access::Read>;
using WriteState = List<Storage::State, Access::Write>;
using UpdateState = List<Storage::State, Access::Update>;
using ReadRows = List<Storage::Rows, Access::Read>;

template <class... L>
struct Lists {
  static constexpr int count = sizeof...(L);
};

// Element i of list k, for code that walks over the lists at compile time.
template <int K, class L>
struct ListAt;
template <int K, class First, class... Rest>
struct ListAt<K, Lists<First, Rest...>> : ListAt<K - 1, Lists<Rest...>> {};
template <class First, class... Rest>
struct ListAt<0, Lists<First, Rest...>> {
  using type = First;
};

// One element of a Rows list: value k is `first[k * stride]`.
template <class A>
struct Rows {
  const A* first;
  int64_t stride;

  CLEXT_HOST_DEVICE A operator[](int64_t k) const { return first[k * stride]; }
};

// The type of one element's number, where A may stand for several of them.
template <class A>
struct ScalarOf {
  using type = A;
};

template <class Op, class = void>
struct HasPrepare : std::false_type {};
template <class Op>
struct HasPrepare<Op, std::void_t<decltype(std::declval<Op&>().prepare())>> : std::true_type {};

template <class Op>
CLEXT_HOST_DEVICE void prepare(Op& op) {
  if constexpr (HasPrepare<Op>::value) op.prepare();
}

// Both keep NaN: a broken value must show, not turn into zero.
template <class A>
CLEXT_HOST_DEVICE A maximum(A a, A b) {
  return (a > b || a != a) ? a : b;
}

template <class A>
CLEXT_HOST_DEVICE A positive_part(A a) {
  return a < A(0) ? A(0) : a;
}

template <class A>
CLEXT_HOST_DEVICE A absolute(A a) {
  return a < A(0) ? -a : a;
}

}  // namespace clext
