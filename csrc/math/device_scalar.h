// Numbers of a launch that may lie on the device.
#pragma once

#include "math/element.h"

namespace clext {

// A number that is known on the host, or else lies on the device and stays there.
struct DeviceScalar {
  const void* location = nullptr;
  bool is_double = false;
  double value = 0;

  CLEXT_HOST_DEVICE double read() const {
    if (location == nullptr) return value;
    return is_double ? *static_cast<const double*>(location)
                     : static_cast<double>(*static_cast<const float*>(location));
  }
};

}  // namespace clext
