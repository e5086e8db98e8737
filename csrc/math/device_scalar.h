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

// A factor that lies on the device; 1 where there is none.
struct DeviceFactor {
  const void* location = nullptr;
  bool is_double = false;

  CLEXT_HOST_DEVICE double read() const { return DeviceScalar{location, is_double, 1}.read(); }
};

// What the task's gradient was multiplied with (a clipping coefficient, say). Zero has left nothing
// of it, and neither has infinity: such a step teaches nothing.
struct TaskScale {
  DeviceFactor scale;
  double inverse = 1;

  CLEXT_HOST_DEVICE void prepare() {
    const double number = scale.read();
    inverse = number == 0 ? 0 : 1 / number;
  }

  CLEXT_HOST_DEVICE bool is_lost() const { return inverse == 0; }
};

}  // namespace clext
