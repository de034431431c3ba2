// The device and stream of a call, for bindings. The same files make the emulated operators that tests run on the host
// (DITSCALE_HOST_SHIM): then tensors are CPU tensors, and there is neither.
#pragma once

#include "../common/tensors.h"

#ifndef DITSCALE_HOST_SHIM
#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>
#endif

namespace ditscale::cuda {

#ifdef DITSCALE_HOST_SHIM
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
// The C shim's accessor of the stream stands in libtorch_cuda. Linking to it would keep this library from loading beside a
// torch without CUDA, so it is looked up where torch has loaded it.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
inline CurrentStream current_stream() {
  static const CurrentStream found = []() -> CurrentStream {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      if (library != nullptr) symbol = dlsym(library, name);
    }
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  STD_TORCH_CHECK(found != nullptr, "ditscale: this torch has no CUDA");
  return found;
}

// Makes the tensor's device current and knows the stream that torch runs on there.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    DS_SHIM_CHECK(current_stream()(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "ditscale: CUDA launch failed: ", error);
}

}  // namespace ditscale::cuda

// Registers implementations where this build has them: `DS_IMPLEMENT(m) { m.impl(...); }`.
#ifdef DITSCALE_HOST_SHIM
#define DS_IMPLEMENT(m) STABLE_TORCH_LIBRARY_IMPL(ditscale_emulated, CPU, m)
#else
#define DS_IMPLEMENT(m) STABLE_TORCH_LIBRARY_IMPL(ditscale, CUDA, m)
#endif
