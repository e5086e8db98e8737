// How numbers lie in memory, and the type in which formulas compute with them.
// bfloat16 and float16 are converted by integer arithmetic without branches, so that the same lines
// vectorise for any instruction set and compile for the device.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/element.h"

namespace clext {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

namespace detail {

CLEXT_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CLEXT_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace detail

// Parameters in T whose anchors and importances are in bfloat16, half of what they take otherwise.
template <class T>
struct Compact {};

// The accumulate type A of a storage type T; state is stored in A as well.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
struct Accumulate<Compact<T>> : Accumulate<T> {};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

// How a list is stored.
template <Storage S, class T>
struct Stored {
  using type = std::conditional_t<S == Storage::Parameter, T, accumulate_t<T>>;
};
template <Storage S, class T>
struct Stored<S, Compact<T>> : Stored<S, T> {};
template <class T>
struct Stored<Storage::Consolidated, Compact<T>> {
  using type = BFloat16;
};
template <class L, class T>
using element_t = typename Stored<L::storage, T>::type;
template <class T>
using parameter_t = typename Stored<Storage::Parameter, T>::type;

CLEXT_HOST_DEVICE float to_accumulate(float value) { return value; }
CLEXT_HOST_DEVICE double to_accumulate(double value) { return value; }

CLEXT_HOST_DEVICE float to_accumulate(BFloat16 value) {
  return detail::float_of(static_cast<uint32_t>(value.bits) << 16);
}

CLEXT_HOST_DEVICE float to_accumulate(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu);
  // Shifted into place the exponent is 112 too small; a multiplication repairs it and normalises
  // subnormal numbers on the way.
  const float scaled = detail::float_of(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity and NaN
  const uint32_t finite = detail::bits_of(scaled);
  return detail::float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <class T>
CLEXT_HOST_DEVICE T from_accumulate(accumulate_t<T> value) {
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
CLEXT_HOST_DEVICE BFloat16 from_accumulate<BFloat16>(float value) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
CLEXT_HOST_DEVICE Float16 from_accumulate<Float16>(float value) {
  const uint32_t bits = detail::bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent by -112 and round away the 13 lowest mantissa bits.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results (below 2^-14): adding 0.5 lets the adder round at bit 2^-24.
  const uint32_t subnormal = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and more round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return Float16{static_cast<uint16_t>(sign | result)};
}

}  // namespace clext
