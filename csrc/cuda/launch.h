// Host helpers of the launchers.
#pragma once

#include "device.h"

#include <initializer_list>

#define DS_BY_STORAGE(storage, statement)   \
  do {                                      \
    if ((storage) == Storage::f32) {        \
      using T = float;                      \
      statement;                            \
    } else if ((storage) == Storage::bf16) { \
      using T = bf16;                       \
      statement;                            \
    } else {                                \
      using T = f16;                        \
      statement;                            \
    }                                       \
  } while (false)

namespace ditscale::cuda {

inline bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

inline const char* launch_error() {
#ifdef DITSCALE_HOST_SHIM
  return nullptr;
#else
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace ditscale::cuda
