// bfloat16 and float16: every value, and rounding against arithmetic in double.
#include "math/storage.h"

#include <cmath>
#include <limits>

#include "check.h"

using namespace clext;
using namespace clext::test;

namespace {

// The value of a binary format with `mantissa` explicit bits, by its definition.
double decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

// Round to nearest, ties to even, to a format with `mantissa_bits` and the given exponent range.
double round_to_format(double value, int mantissa_bits, int min_exponent, double overflow) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), min_exponent);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  const double rounded = std::nearbyint(value / unit) * unit;  // default mode: ties to even
  return std::abs(rounded) >= overflow ? std::copysign(INFINITY, value) : rounded;
}

template <class Half>
void every_value_survives(int exponent_bits, int mantissa_bits) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const float value = to_accumulate(half);
    const double expected = decode(half.bits, exponent_bits, mantissa_bits);
    const Half back = from_accumulate<Half>(value);
    if (std::isnan(expected)) {
      check(std::isnan(value), "NaN is read as NaN");
      check(std::isnan(to_accumulate(back)), "NaN is written as NaN");
    } else {
      check(value == expected && std::signbit(value) == std::signbit(expected), "value as defined");
      check(back.bits == half.bits, "value survives a round trip");
    }
  }
}

// Values between neighbours: just below, at and just above the middle, where rounding turns.
template <class Half>
void rounds_to_nearest_even(int mantissa_bits, int min_exponent, double overflow) {
  const auto check_value = [&](float value) {
    const double expected = round_to_format(value, mantissa_bits, min_exponent, overflow);
    const float actual = to_accumulate(from_accumulate<Half>(value));
    check(actual == expected && std::signbit(actual) == std::signbit(value),
          "nearest, ties to even");
  };
  for (int bits = 0; bits < 0xffff; ++bits) {
    const float low = to_accumulate(Half{static_cast<uint16_t>(bits)});
    const float high = to_accumulate(Half{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(low)) continue;
    const float end = std::isfinite(high) ? high : std::copysign(static_cast<float>(overflow), low);
    if (!std::isfinite(end)) continue;
    const float middle = low / 2 + end / 2;
    check_value(middle);
    check_value(std::nextafter(middle, -INFINITY));
    check_value(std::nextafter(middle, INFINITY));
  }
  std::mt19937 generator(1);
  for (int i = 0; i < 200000; ++i) {
    const float value = detail::float_of(static_cast<uint32_t>(generator()));
    if (std::isfinite(value)) check_value(value);
  }
}

void special_values() {
  check(from_accumulate<Float16>(65519.996f).bits == 0x7bff, "largest float16");
  check(from_accumulate<Float16>(65520.0f).bits == 0x7c00, "float16 overflows to infinity");
  check(from_accumulate<Float16>(-INFINITY).bits == 0xfc00, "-infinity in float16");
  check(from_accumulate<Float16>(-0.0f).bits == 0x8000, "-0 in float16");
  check(from_accumulate<Float16>(0x1p-25f).bits == 0, "half the smallest float16 is even: 0");
  check(from_accumulate<BFloat16>(3.4e38f).bits == 0x7f80, "bfloat16 overflows to infinity");
  check(from_accumulate<BFloat16>(-0.0f).bits == 0x8000, "-0 in bfloat16");
  const float nan_with_low_payload = detail::float_of(0x7f800001u);
  check(from_accumulate<BFloat16>(nan_with_low_payload).bits == 0x7fc0,
        "NaN is not cut to infinity");
}

void plain_types_pass_through() {
  check(to_accumulate(1.1f) == 1.1f && from_accumulate<float>(1.1f) == 1.1f, "float");
  check(to_accumulate(1.1) == 1.1 && from_accumulate<double>(1.1) == 1.1, "double");
  check(std::is_same_v<accumulate_t<double>, double>, "double accumulates in double");
  check(std::is_same_v<accumulate_t<Float16>, float>, "float16 accumulates in float");
}

}  // namespace

int main() {
  every_value_survives<BFloat16>(8, 7);
  every_value_survives<Float16>(5, 10);
  rounds_to_nearest_even<BFloat16>(7, -126, 0x1p128);
  rounds_to_nearest_even<Float16>(10, -14, 0x1p16);
  special_values();
  plain_types_pass_through();
  return report("storage");
}
