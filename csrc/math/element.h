// The vocabulary of element formulas: what a functor in this folder says about itself, so that one
// driver per device (cpu/multi_tensor.h, cuda/multi_tensor.cuh) can run it over lists of tensors.
//
// A functor declares
//   static constexpr const char* name         the op's, in its schema and its messages
//   using lists = Lists<...>;                 one entry per argument of operator(), in schema order
//   static constexpr const char* names[]      of the lists, as many as there are or more
//   static constexpr Number numbers[]         optional: its first members, in this order, by name
//                                             and range
//   static constexpr Reduction reduction      what becomes of the values that operator() returns
//   operator()(...)                           the formula for one element, in the accumulate type A
//   void prepare()                            optional: read device-side scalars once per thread
//   void prepare_tensor(const A*)             with a Scalars list: take the tensor's values
//   bool skip() const                         optional, after prepare(): leave everything as it is
//   bool clear                                with a ReadAndClear list: whether to clear it
//   static constexpr bool Op::* mode          optional: a member worth a loop for each value
//   static constexpr bool rounds              optional: operator() takes a StorageTag first
//   static constexpr bool row_by_row          with a Rows list: operator() takes one row's value
//                                             and its weight, and is called for each row in turn
//   const double* weights                     with row_by_row: those of weight 0 are not read
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
  Parameter,     // parameters and gradients: float, double, bfloat16 or float16
  State,         // path integrals, averages, estimates: float (double for double parameters)
  Consolidated,  // anchors and importances: as State, or bfloat16 (not for double parameters)
  Rows,          // several state values per element, one row per model output (a Jacobian)
  Scalars,       // a few state values per tensor; not an argument of operator(), always last, and
                 // the only list without a place in `names`: it is called steps
};

enum class Access {
  Read,
  Write,   // the old value is not loaded
  Update,  // loaded, changed, stored
  // Loaded; once the element is done, the driver sets it to zero if the functor's `clear` says so.
  ReadAndClear,
};

enum class Reduction {
  None,
  Sum,
  Max,
  // operator()(a, b), summed over all elements for each pair of an element's values: those of the
  // Rows list, then that of the one list which follows.
  Pairs,
};

template <Storage S, Access A>
struct List {
  static constexpr Storage storage = S;
  static constexpr Access access = A;
};

using ReadParameter = List<Storage::Parameter, Access::Read>;
using WriteParameter = List<Storage::Parameter, Access::Write>;
using UpdateParameter = List<Storage::Parameter, Access::Update>;
using ReadAndClearParameter = List<Storage::Parameter, Access::ReadAndClear>;
using ReadState = List<Storage::State, Access::Read>;
using WriteState = List<Storage::State, Access::Write>;
using UpdateState = List<Storage::State, Access::Update>;
using ReadConsolidated = List<Storage::Consolidated, Access::Read>;
using WriteConsolidated = List<Storage::Consolidated, Access::Write>;
using UpdateConsolidated = List<Storage::Consolidated, Access::Update>;
using ReadRows = List<Storage::Rows, Access::Read>;
using WriteRows = List<Storage::Rows, Access::Write>;
using ReadScalars = List<Storage::Scalars, Access::Read>;

template <class... L>
struct Lists {
  static constexpr int count = sizeof...(L);
};

// A number that an op is called with, always finite.
struct Number {
  const char* name;
  enum Range { NotNegative, Positive, Fraction } range;
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

// Whether one of the lists is stored so.
template <Storage S, class L>
struct AnyList;
template <Storage S, class... L>
struct AnyList<S, Lists<L...>> : std::bool_constant<((L::storage == S) || ...)> {};
template <Storage S, class Op>
static constexpr bool kHasList = AnyList<S, typename Op::lists>::value;

// The lists of several `Lists`, one after the other.
template <class... L>
struct Joined;
template <class... L>
struct Joined<Lists<L...>> {
  using type = Lists<L...>;
};
template <class... L, class... M, class... Rest>
struct Joined<Lists<L...>, Lists<M...>, Rest...> : Joined<Lists<L..., M...>, Rest...> {};
template <class... L>
using joined_t = typename Joined<L...>::type;

// Whether a functor has a Scalars list, and how many lists its operator() sees.
template <class Op>
static constexpr bool kHasScalars =
    ListAt<Op::lists::count - 1, typename Op::lists>::type::storage == Storage::Scalars;
template <class Op>
static constexpr int kElementLists = Op::lists::count - (kHasScalars<Op> ? 1 : 0);

// One element of a Rows list: value k is `first[k * stride]`.
template <class A>
struct Rows {
  const A* first;
  int64_t stride;

  CLEXT_HOST_DEVICE A operator[](int64_t k) const { return first[k * stride]; }
};

template <class A>
struct MutableRows {
  A* first;
  int64_t stride;

  CLEXT_HOST_DEVICE A& operator[](int64_t k) const { return first[k * stride]; }
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

template <class Op, class = void>
struct HasSkip : std::false_type {};
template <class Op>
struct HasSkip<Op, std::void_t<decltype(std::declval<const Op&>().skip())>> : std::true_type {};

template <class Op>
CLEXT_HOST_DEVICE bool is_skipped(const Op& op) {
  if constexpr (HasSkip<Op>::value) {
    return op.skip();
  } else {
    return false;
  }
}

template <class Op, class = void>
struct RowByRow : std::false_type {};
template <class Op>
struct RowByRow<Op, std::void_t<decltype(Op::row_by_row)>> : std::bool_constant<Op::row_by_row> {};

template <class Op, class = void>
struct HasMode : std::false_type {};
template <class Op>
struct HasMode<Op, std::void_t<decltype(Op::mode)>> : std::bool_constant<Op::mode != nullptr> {};

// Tells a functor the storage type of the parameters: its formula needs what will be stored.
template <class T>
struct StorageTag {};

template <class Op, class = void>
struct Rounds : std::false_type {};
template <class Op>
struct Rounds<Op, std::void_t<decltype(Op::rounds)>> : std::bool_constant<Op::rounds> {};

// The formula of one element, for parameters that are stored in T.
template <class T, class Op, class... V>
CLEXT_HOST_DEVICE auto evaluate(const Op& op, V&&... values) {
  if constexpr (Rounds<Op>::value) {
    return op(StorageTag<T>{}, values...);
  } else {
    return op(values...);
  }
}

// These keep NaN: a broken value must show, not turn into zero.
template <class A>
CLEXT_HOST_DEVICE A maximum(A a, A b) {
  return (a > b || a != a) ? a : b;
}

// Neither NaN nor infinity.
template <class A>
CLEXT_HOST_DEVICE bool is_finite(A a) {
  return a - a == A(0);
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
