#include <c10/util/Exception.h>

#include <cmath>

#include "torch/check.h"

namespace clext {

void check_number(const char* op, const Number& number, double value) {
  if (number.range == Number::Fraction) {
    TORCH_CHECK_VALUE(value >= 0 && value <= 1, op, ": ", number.name, " is ", value,
                      ", expected a number in [0, 1]");
    return;
  }
  const bool positive = number.range == Number::Positive;
  TORCH_CHECK_VALUE(std::isfinite(value) && (positive ? value > 0 : value >= 0), op, ": ",
                    number.name, " is ", value, ", expected a finite number ",
                    positive ? "> 0" : ">= 0");
}

}  // namespace clext
