// Memory that a thread keeps between calls.
#pragma once

#include "../common/tensors.h"

#include <memory>

namespace ditscale::cpu {

// On a cache line's boundary: a vector of 16 floats at any other address is two loads.
struct Scratch {
  static constexpr int64_t LINE = 16;
  std::unique_ptr<float[]> data;
  float* aligned = nullptr;
  int64_t size = 0;
  float* get(int64_t n) {
    if (n > size) {
      data.reset(new float[n + LINE]);
      const auto past = reinterpret_cast<uintptr_t>(data.get()) / sizeof(float) % LINE;
      aligned = data.get() + (LINE - past) % LINE;
      size = n;
      if (poisoned()) std::memset(aligned, 0xFF, sizeof(float) * static_cast<size_t>(n));
    }
    return aligned;
  }
};

}  // namespace ditscale::cpu
