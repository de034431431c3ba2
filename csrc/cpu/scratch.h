// Memory that a thread keeps between calls.
#pragma once

#include "../common/tensors.h"

#include <memory>

namespace ditscale::cpu {

struct Scratch {
  std::unique_ptr<float[]> data;
  int64_t size = 0;
  float* get(int64_t n) {
    if (n > size) {
      data.reset(new float[n]);
      size = n;
      if (poisoned()) std::memset(data.get(), 0xFF, sizeof(float) * static_cast<size_t>(n));
    }
    return data.get();
  }
};

}  // namespace ditscale::cpu
