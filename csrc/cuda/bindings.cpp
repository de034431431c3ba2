// The adaLN family on CUDA: memory for partial sums, the stream and the launches. The same file makes the emulated operators
// that tests run on the host (DITSCALE_HOST_SHIM): then tensors are CPU tensors in a namespace of their own.
#include "../common/adaln_bindings.h"
#include "adaln.h"

#ifndef DITSCALE_HOST_SHIM
#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>
#endif

namespace ditscale::cuda {
namespace {

// Tasks a backward pass is cut into at most: several blocks for each multiprocessor of the largest device.
constexpr int64_t TASKS = 1024;

#ifdef DITSCALE_HOST_SHIM
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
// The C shim's accessor of the stream stands in libtorch_cuda. Linking to it would keep this file from loading beside a torch
// without CUDA, so it is looked up where torch has loaded it.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream current_stream() {
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
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "ditscale: CUDA launch failed: ", error);
}

// `launch(cut, partial, stream)`, then the sums over chunks where there are any to make.
template <class F>
void with_sums(const Sums& s, const F& launch) {
  const OnDevice on(s.like);
  const Cut cut = cut_rows(s.mode, s.shape.B, s.shape.T, s.count * 32 / s.element_size, TASKS);
  if (s.mode == Mode::per_token) {
    check_launch(launch(cut, nullptr, on.stream));
    return;
  }
  const Tensor held = allocate({cut.segments * cut.chunks, s.count, s.shape.D}, aoti_torch_dtype_float32(), s.like);
  float* partial = static_cast<float*>(held.mutable_data_ptr());
  check_launch(launch(cut, partial, on.stream));
  check_launch(launch_add_chunks(partial, cut, s.count, s.shape.D, s.storage, s.out, on.stream));
}

struct Cuda {
  static void forward(const ForwardArgs& a, Storage storage, Mode mode, const Shape& s, const Tensor& like) {
    const OnDevice on(like);
    check_launch(launch_forward(a, storage, s, mode == Mode::per_token, on.stream));
  }
  static void backward(const BackwardArgs& a, Storage storage, const Sums& sums) {
    const Shape& s = sums.shape;
    std::optional<Tensor> held;
    float* row_stats = nullptr;
    if (backward_needs_row_stats(a, storage)) {
      held = allocate({s.B * s.T, 4}, aoti_torch_dtype_float32(), sums.like);
      row_stats = static_cast<float*>(held->mutable_data_ptr());
    }
    with_sums(sums, [&](const Cut& cut, float* partial, void* stream) {
      return launch_backward(a, storage, s, cut, partial, row_stats, stream);
    });
  }
  static void residual(const ResidualArgs& a, Storage storage, const Shape& s, const Tensor& like) {
    const OnDevice on(like);
    check_launch(launch_residual(a, storage, s, on.stream));
  }
  static void residual_backward(const ResidualArgs& a, Storage storage, const Sums& sums) {
    with_sums(sums, [&](const Cut& cut, float* partial, void* stream) {
      return launch_residual_backward(a, storage, sums.shape, cut, partial, stream);
    });
  }
  static void gelu(const GeluArgs& a, Storage storage, int64_t rows, const Tensor& like) {
    const OnDevice on(like);
    check_launch(launch_gelu(a, storage, rows, on.stream));
  }
  static void gelu_backward(const GeluArgs& a, Storage storage, const Sums& sums) {
    with_sums(sums, [&](const Cut& cut, float* partial, void* stream) {
      return launch_gelu_backward(a, storage, sums.shape.T, cut, partial, stream);
    });
  }
};

}  // namespace
}  // namespace ditscale::cuda

#ifdef DITSCALE_HOST_SHIM
STABLE_TORCH_LIBRARY_IMPL(ditscale_emulated, CPU, m) {
  ditscale::Adaln<ditscale::cuda::Cuda>::register_in(m);
}
#else
STABLE_TORCH_LIBRARY_IMPL(ditscale, CUDA, m) {
  ditscale::Adaln<ditscale::cuda::Cuda>::register_in(m);
}
#endif
