// QK-norm + RoPE on CUDA: memory for the partial sums of the weight's gradient, and the launches.
#include "../common/rotary_bindings.h"
#include "adaln.h"
#include "on_device.h"
#include "rotary.h"

namespace ditscale::cuda {
namespace {

struct CudaRotary {
  static void forward(const RotaryArgs& a, Storage storage, const Tensor& x) {
    const OnDevice on(x);
    check_launch(launch_rotary_forward(a, storage, x.size(0), on.stream));
  }

  static void backward(const RotaryArgs& a, Storage storage, const Tensor& x, float* dweight) {
    const OnDevice on(x);
    const int64_t B = x.size(0);
    if (dweight == nullptr) {
      check_launch(launch_rotary_backward(a, storage, B, nullptr, on.stream));
      return;
    }
    const int64_t rows = B * a.H * a.T, parts = rows > 0 ? rotary_partials(a, storage, B) : 0;
    const Tensor held = allocate({parts, a.K}, aoti_torch_dtype_float32(), x);
    float* partial = static_cast<float*>(held.mutable_data_ptr());
    check_launch(launch_rotary_backward(a, storage, B, partial, on.stream));
    void* const out[3] = {dweight, nullptr, nullptr};
    check_launch(launch_add_chunks(partial, {1, rows, 0, parts}, 1, a.K, Storage::f32, out, on.stream));
  }
};

}  // namespace
}  // namespace ditscale::cuda

DS_IMPLEMENT(m) {
  ditscale::Rotary<ditscale::cuda::CudaRotary>::register_in(m);
}
