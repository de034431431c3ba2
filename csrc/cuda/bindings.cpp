// The adaLN family on CUDA: memory for partial sums, and the launches.
#include "../common/adaln_bindings.h"
#include "adaln.h"
#include "on_device.h"

namespace ditscale::cuda {
namespace {

// Tasks a backward pass is cut into at most: several blocks for each multiprocessor of the largest device.
constexpr int64_t TASKS = 1024;

// `launch(cut, partial, stream)`, then the sums over chunks where there are any to make. `direct`: the kernel can write the sums
// of segments of one chunk where they belong.
template <class F>
void with_sums(const Sums& s, bool direct, const F& launch) {
  const OnDevice on(s.like);
  const Cut cut = cut_rows(s.mode, s.shape.B, s.shape.T, s.count * 32 / s.element_size, TASKS);
  if (s.mode == Mode::per_token || (direct && cut.chunks == 1 && s.shape.B * s.shape.T > 0)) {
    check_launch(launch(cut, nullptr, on.stream));
    return;
  }
  const Tensor held = allocate({cut.segments * cut.chunks, s.count, s.shape.D}, aoti_torch_dtype_float32(), s.like);
  float* partial = static_cast<float*>(held.mutable_data_ptr());
  check_launch(launch(cut, partial, on.stream));
  check_launch(launch_add_chunks(partial, cut, s.count, s.shape.D, s.storage, s.out, on.stream));
}

// The kernels of the norm take a block a row at most, and a grid has 31 bits.
void check_rows(const Shape& s) {
  STD_TORCH_CHECK(s.B * s.T <= INT32_MAX, "x: expected fewer than 2^31 rows, got ", s.B * s.T);
}

struct Cuda {
  static void forward(const ForwardArgs& a, Storage storage, Mode mode, const Shape& s, const Tensor& like) {
    check_rows(s);
    const OnDevice on(like);
    check_launch(launch_forward(a, storage, s, mode == Mode::per_token, on.stream));
  }
  static void backward(const BackwardArgs& a, Storage storage, const Sums& sums) {
    const Shape& s = sums.shape;
    check_rows(s);
    std::optional<Tensor> held;
    float* row_stats = nullptr;
    if (backward_needs_row_stats(a, storage)) {
      held = allocate({s.B * s.T, 4}, aoti_torch_dtype_float32(), sums.like);
      row_stats = static_cast<float*>(held->mutable_data_ptr());
    }
    with_sums(sums, row_stats == nullptr, [&](const Cut& cut, float* partial, void* stream) {
      return launch_backward(a, storage, s, cut, partial, row_stats, stream);
    });
  }
  static void residual(const ResidualArgs& a, Storage storage, const Shape& s, const Tensor& like) {
    const OnDevice on(like);
    check_launch(launch_residual(a, storage, s, on.stream));
  }
  static void residual_backward(const ResidualArgs& a, Storage storage, const Sums& sums) {
    with_sums(sums, residual_is_direct(a, storage), [&](const Cut& cut, float* partial, void* stream) {
      return launch_residual_backward(a, storage, sums.shape, cut, partial, stream);
    });
  }
  static void gelu(const GeluArgs& a, Storage storage, int64_t rows, const Tensor& like) {
    const OnDevice on(like);
    check_launch(launch_gelu(a, storage, rows, on.stream));
  }
  static void gelu_backward(const GeluArgs& a, Storage storage, const Sums& sums) {
    with_sums(sums, false, [&](const Cut& cut, float* partial, void* stream) {
      return launch_gelu_backward(a, storage, sums.shape.T, cut, partial, stream);
    });
  }
};

}  // namespace
}  // namespace ditscale::cuda

DS_IMPLEMENT(m) {
  ditscale::Adaln<ditscale::cuda::Cuda>::register_in(m);
}
