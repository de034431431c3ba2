// What the bindings of QK-norm + RoPE do on every device: checks, views and memory for results.
#pragma once

#include "rotary_args.h"
#include "tensors.h"

namespace ditscale {

inline HeadView view_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

inline const float* vector_of(const std::optional<Tensor>& t, int64_t n, const Tensor& x, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == n, name, ": expected ", n,
      " float32 numbers, contiguous");
  check_device(*t, x, name);
  return static_cast<const float*>(t->const_data_ptr());
}

// All but the results. The rows of x are dense.
inline RotaryArgs rotary_args(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    double eps, int64_t norm, bool interleaved) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [B, H, T, K]");
  RotaryArgs a{};
  a.H = x.size(1);
  a.T = x.size(2);
  a.K = x.size(3);
  a.x = view_of(x);
  a.weight = vector_of(weight, a.K, x, "weight");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither");
  if (cos.has_value()) {
    const int64_t half = a.K / 2;
    STD_TORCH_CHECK(a.K % 2 == 0, "x: expected an even head width to rotate");
    for (const std::optional<Tensor>* t : {&cos, &sin}) {
      const Tensor& table = **t;
      const int64_t dims = table.dim();
      STD_TORCH_CHECK(
          table.scalar_type() == ScalarType::Float && table.is_contiguous() && (dims == 2 || dims == 3) &&
              table.size(dims - 1) == half && table.size(dims - 2) == a.T && (dims == 2 || table.size(0) == x.size(0)) &&
              dims == cos->dim(),
          "cos, sin: expected [T, K / 2] or [B, T, K / 2] float32, contiguous");
      check_device(table, x, "cos, sin");
    }
    a.cos = static_cast<const float*>(cos->const_data_ptr());
    a.sin = static_cast<const float*>(sin->const_data_ptr());
    a.table_t = half;
    a.table_b = cos->dim() == 3 ? a.T * half : 0;
  }
  STD_TORCH_CHECK(norm >= 0 && norm <= 2, "norm: expected 0 (none), 1 (rms) or 2 (layer)");
  a.norm = static_cast<int>(norm);
  a.eps = static_cast<float>(eps);
  a.interleaved = interleaved;
  return a;
}

inline void check_heads(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) &&
          t.size(3) == x.size(3) && dtype_of(t) == dtype_of(x),
      name, ": expected the shape and dtype of x");
  check_device(t, x, name);
}

// The operators on a device, which has `forward(args, storage, x)` and `backward(args, storage, x, dweight)`, dweight null where
// there is no weight: [K] float32 to write.
template <class Device>
struct Rotary {
  using Optional = std::optional<Tensor>;

  static Tensor qk_norm_rope_fwd(
      Tensor x_in, Optional weight, Optional cos, Optional sin, double eps, int64_t norm, bool interleaved) {
    const Tensor x = inner_dense(x_in);
    RotaryArgs a = rotary_args(x, weight, cos, sin, eps, norm, interleaved);
    Tensor out = allocate_heads(x);
    a.out = view_of(out);
    if (out.numel() > 0) Device::forward(a, storage_of(x, "x"), x);
    return out;
  }

  // Every row is read whole before it is written.
  static void qk_norm_rope_(
      Tensor x, Optional weight, Optional cos, Optional sin, double eps, int64_t norm, bool interleaved) {
    RotaryArgs a = rotary_args(x, weight, cos, sin, eps, norm, interleaved);
    STD_TORCH_CHECK(a.K <= 1 || x.stride(3) == 1, "x: expected dense rows to write in place");
    a.out = a.x;
    if (x.numel() > 0) Device::forward(a, storage_of(x, "x"), x);
  }

  // dweight is [0] where there is no weight.
  static std::tuple<Tensor, Tensor> qk_norm_rope_bwd(
      Tensor dout_in, Tensor x_in, Optional weight, Optional cos, Optional sin, double eps, int64_t norm, bool interleaved) {
    const Tensor x = inner_dense(x_in), dout = inner_dense(dout_in);
    RotaryArgs a = rotary_args(x, weight, cos, sin, eps, norm, interleaved);
    check_heads(dout, x, "dout");
    a.dout = view_of(dout);
    Tensor dx = allocate_heads(x);
    a.out = view_of(dx);
    const bool sums = a.weight != nullptr;
    Tensor dweight = allocate({sums ? a.K : 0}, aoti_torch_dtype_float32(), x);
    Device::backward(a, storage_of(x, "x"), x, sums ? static_cast<float*>(dweight.mutable_data_ptr()) : nullptr);
    return {dx, dweight};
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
    m.impl("qk_norm_rope_", TORCH_BOX(&qk_norm_rope_));
    m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
  }
};

}  // namespace ditscale
