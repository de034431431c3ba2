// The operators of the adaLN family for one device: checks, allocation and the plain data that its kernels take.
//
// `Device` launches: forward, residual, gelu (rows in, rows out) and backward, residual_backward, gelu_backward, which also
// fill the gradients of the modulation as `Sums` says.
#pragma once

#include "tensors.h"

namespace ditscale {

// Where the sums over tokens go: `count` tensors, each [segments, D] stored as `storage`.
struct Sums {
  Mode mode;
  Shape shape;
  int64_t count;
  Storage storage;
  int64_t element_size;  // of x: partial sums may take an eighth of its memory
  const Tensor& like;
  void* out[3];
};

inline Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

inline Strided strided_modulation(const Tensor& m, Mode mode) {
  return {m.const_data_ptr(), mode == Mode::shared ? 0 : m.stride(0), mode == Mode::per_token ? m.stride(1) : 0};
}

// A dense tensor of the shape and dtype of t, which has one to three dimensions.
inline Tensor allocate_like(const Tensor& t) {
  switch (t.dim()) {
    case 1:
      return allocate({t.size(0)}, dtype_of(t), t);
    case 2:
      return allocate({t.size(0), t.size(1)}, dtype_of(t), t);
    default:
      return allocate({t.size(0), t.size(1), t.size(2)}, dtype_of(t), t);
  }
}

inline Tensor allocate_stats(const Tensor& x, const Shape& s) {
  return allocate({2, s.B, s.T}, aoti_torch_dtype_float32(), x);
}

inline void check_modulation(
    const Tensor& m, const Tensor& scale, Mode mode, const Tensor& x, const Shape& s, const char* name) {
  STD_TORCH_CHECK(
      mode_of(m, x, s, name) == mode && m.dim() == scale.dim() && dtype_of(m) == dtype_of(scale), name,
      ": expected the shape and dtype of scale");
}

// Mean and reciprocal deviation of every row, [B * T] each, or nowhere.
struct Stats {
  float* mean;
  float* rstd;
};

inline Stats stats_of(const Tensor& stats, const Shape& s) {
  STD_TORCH_CHECK(
      stats.scalar_type() == ScalarType::Float && stats.numel() == 2 * s.B * s.T && stats.is_contiguous(),
      "stats: expected float32 [2, B, T], contiguous");
  float* data = static_cast<float*>(stats.mutable_data_ptr());
  return {data, data + s.B * s.T};
}

// x [..., F] seen as rows: dense rows at any one distance, or a copy.
struct RowsOf {
  Tensor t;
  int64_t rows, width, stride;
};

inline RowsOf rows_of(const Tensor& t) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, "x: expected one to three dimensions");
  const int64_t width = t.size(dims - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) rows *= t.size(d);
  if (dims <= 2) {
    const Tensor dense = inner_dense(t);
    return {dense, rows, width, dims == 2 ? dense.stride(0) : width};
  }
  return {t.is_contiguous() ? t : torch::stable::contiguous(t), rows, width, width};
}

template <class Device>
struct Adaln {
  static ForwardArgs forward_args(
      const Tensor& x, const Tensor& shift, const Tensor& scale, double eps, double scale_base, bool rms, Mode mode,
      const Shape& s, const Tensor& y, const Stats& stats) {
    ForwardArgs a{};
    a.T = s.T;
    a.D = s.D;
    a.x = strided(x);
    a.shift = strided_modulation(shift, mode);
    a.scale = strided_modulation(scale, mode);
    a.modulation = static_cast<int>(storage_of(scale, "scale"));
    a.eps = static_cast<float>(eps);
    a.scale_base = static_cast<float>(scale_base);
    a.rms = rms;
    a.per_token = mode == Mode::per_token;
    a.y = y.mutable_data_ptr();
    a.mean = stats.mean;
    a.rstd = stats.rstd;
    return a;
  }

  static BackwardArgs backward_args(
      const Tensor& dy, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& stats, double eps,
      double scale_base, bool rms, Mode mode, const Shape& s, const Tensor& dx, const Tensor& dshift,
      const Tensor& dscale) {
    BackwardArgs a{};
    a.T = s.T;
    a.D = s.D;
    a.dy = strided(dy);
    a.x = strided(x);
    a.scale = strided_modulation(scale, mode);
    a.modulation = static_cast<int>(storage_of(scale, "scale"));
    if (stats.has_value()) {
      const Stats st = stats_of(*stats, s);
      a.mean = st.mean;
      a.rstd = st.rstd;
    }
    a.eps = static_cast<float>(eps);
    a.scale_base = static_cast<float>(scale_base);
    a.rms = rms;
    a.per_token = mode == Mode::per_token;
    a.dx = dx.mutable_data_ptr();
    a.dshift = dshift.mutable_data_ptr();
    a.dscale = dscale.mutable_data_ptr();
    return a;
  }

  // y, with the statistics written to `stats` where it is given.
  static Tensor normalise(
      const Tensor& x_in, const Tensor& shift_in, const Tensor& scale_in, double eps, double scale_base, bool rms,
      const Shape& s, const Stats& stats) {
    const Tensor x = inner_dense(x_in), shift = inner_dense(shift_in), scale = inner_dense(scale_in);
    const Mode mode = mode_of(scale, x, s, "scale");
    check_modulation(shift, scale, mode, x, s, "shift");
    Tensor y = allocate_like(x);
    const ForwardArgs a = forward_args(x, shift, scale, eps, scale_base, rms, mode, s, y, stats);
    Device::forward(a, storage_of(x, "x"), mode, s, x);
    return y;
  }

  static std::tuple<Tensor, Tensor> layernorm_modulate_fwd(
      Tensor x, Tensor shift, Tensor scale, double eps, double scale_base, bool rms) {
    const Shape s = shape_of(x);
    const Tensor stats = allocate_stats(x, s);
    return {normalise(x, shift, scale, eps, scale_base, rms, s, stats_of(stats, s)), stats};
  }

  static Tensor layernorm_modulate_infer(Tensor x, Tensor shift, Tensor scale, double eps, double scale_base, bool rms) {
    return normalise(x, shift, scale, eps, scale_base, rms, shape_of(x), {nullptr, nullptr});
  }

  static std::tuple<Tensor, Tensor, Tensor> layernorm_modulate_bwd(
      Tensor dy_in, Tensor x_in, Tensor scale_in, std::optional<Tensor> stats, double eps, double scale_base, bool rms) {
    const Shape s = shape_of(x_in);
    const Tensor dy = inner_dense(dy_in), x = inner_dense(x_in), scale = inner_dense(scale_in);
    check_like(dy, x, s, "dy");
    const Mode mode = mode_of(scale, x, s, "scale");
    Tensor dx = allocate_like(x);
    Tensor dshift = allocate_like(scale), dscale = allocate_like(scale);
    const BackwardArgs a = backward_args(dy, x, scale, stats, eps, scale_base, rms, mode, s, dx, dshift, dscale);
    const Sums sums{mode, s, 2, storage_of(scale, "scale"), bytes_of(storage_of(x, "x")), x, {a.dshift, a.dscale, nullptr}};
    Device::backward(a, storage_of(x, "x"), sums);
    return {dx, dshift, dscale};
  }

  static Tensor gate_residual_fwd(Tensor x_in, Tensor branch_in, Tensor gate_in) {
    const Shape s = shape_of(x_in);
    const Tensor x = inner_dense(x_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
    check_like(branch, x, s, "branch");
    const Mode mode = mode_of(gate, x, s, "gate");
    Tensor out = allocate_like(x);
    ResidualArgs a{};
    a.T = s.T;
    a.D = s.D;
    a.x = strided(x);
    a.branch = strided(branch);
    a.gate = strided_modulation(gate, mode);
    a.modulation = static_cast<int>(storage_of(gate, "gate"));
    a.per_token = mode == Mode::per_token;
    a.out = out.mutable_data_ptr();
    Device::residual(a, storage_of(x, "x"), s, x);
    return out;
  }

  static std::tuple<Tensor, Tensor> gate_residual_bwd(Tensor dout_in, Tensor branch_in, Tensor gate_in) {
    const Shape s = shape_of(dout_in);
    const Tensor dout = inner_dense(dout_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
    check_like(branch, dout, s, "branch");
    const Mode mode = mode_of(gate, dout, s, "gate");
    Tensor dbranch = allocate_like(branch), dgate = allocate_like(gate);
    ResidualArgs a{};
    a.T = s.T;
    a.D = s.D;
    a.x = strided(dout);
    a.branch = strided(branch);
    a.gate = strided_modulation(gate, mode);
    a.modulation = static_cast<int>(storage_of(gate, "gate"));
    a.per_token = mode == Mode::per_token;
    a.out = dbranch.mutable_data_ptr();
    a.dgate = dgate.mutable_data_ptr();
    const Storage storage = storage_of(dout, "dout");
    const Sums sums{mode, s, 1, storage_of(gate, "gate"), bytes_of(storage), dout, {a.dgate, nullptr, nullptr}};
    Device::residual_backward(a, storage, sums);
    return {dbranch, dgate};
  }

  static std::tuple<Tensor, Tensor> add_and_normalise(
      const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in, const Tensor& shift_in, const Tensor& scale_in,
      double eps, double scale_base, bool rms, const Shape& s, const Stats& stats) {
    const Tensor x = inner_dense(x_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
    const Tensor shift = inner_dense(shift_in), scale = inner_dense(scale_in);
    check_like(branch, x, s, "branch");
    const Mode mode = mode_of(scale, x, s, "scale");
    check_modulation(shift, scale, mode, x, s, "shift");
    check_modulation(gate, scale, mode, x, s, "gate");
    Tensor x_new = allocate_like(x), y = allocate_like(x);
    ForwardArgs a = forward_args(x, shift, scale, eps, scale_base, rms, mode, s, y, stats);
    a.branch = strided(branch);
    a.gate = strided_modulation(gate, mode);
    a.x_new = x_new.mutable_data_ptr();
    Device::forward(a, storage_of(x, "x"), mode, s, x);
    return {x_new, y};
  }

  static std::tuple<Tensor, Tensor, Tensor> gate_residual_layernorm_modulate_fwd(
      Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, double eps, double scale_base, bool rms) {
    const Shape s = shape_of(x);
    const Tensor stats = allocate_stats(x, s);
    const auto [x_new, y] = add_and_normalise(x, branch, gate, shift, scale, eps, scale_base, rms, s, stats_of(stats, s));
    return {x_new, y, stats};
  }

  static std::tuple<Tensor, Tensor> gate_residual_layernorm_modulate_infer(
      Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, double eps, double scale_base, bool rms) {
    return add_and_normalise(x, branch, gate, shift, scale, eps, scale_base, rms, shape_of(x), {nullptr, nullptr});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_layernorm_modulate_bwd(
      Tensor dy_in, std::optional<Tensor> dx_new_in, Tensor x_new_in, Tensor branch_in, Tensor gate_in, Tensor scale_in,
      std::optional<Tensor> stats, double eps, double scale_base, bool rms) {
    const Shape s = shape_of(x_new_in);
    const Tensor dy = inner_dense(dy_in), x_new = inner_dense(x_new_in), branch = inner_dense(branch_in);
    const Tensor gate = inner_dense(gate_in), scale = inner_dense(scale_in);
    check_like(dy, x_new, s, "dy");
    check_like(branch, x_new, s, "branch");
    const Mode mode = mode_of(scale, x_new, s, "scale");
    check_modulation(gate, scale, mode, x_new, s, "gate");
    Tensor dx = allocate_like(x_new);
    Tensor dbranch = allocate_like(x_new), dgate = allocate_like(scale);
    Tensor dshift = allocate_like(scale), dscale = allocate_like(scale);
    BackwardArgs a = backward_args(dy, x_new, scale, stats, eps, scale_base, rms, mode, s, dx, dshift, dscale);
    std::optional<Tensor> dx_new;  // keeps a copy alive where the gradient had to be made dense
    if (dx_new_in.has_value()) {
      dx_new = inner_dense(*dx_new_in);
      check_like(*dx_new, x_new, s, "dx_new");
      a.dresidual = strided(*dx_new);
    }
    a.branch = strided(branch);
    a.gate = strided_modulation(gate, mode);
    a.dbranch = dbranch.mutable_data_ptr();
    a.dgate = dgate.mutable_data_ptr();
    const Storage storage = storage_of(x_new, "x_new");
    const Sums sums{mode, s, 3, storage_of(scale, "scale"), bytes_of(storage), x_new, {a.dshift, a.dscale, a.dgate}};
    Device::backward(a, storage, sums);
    return {dx, dbranch, dgate, dshift, dscale};
  }

  static Tensor bias_gelu_fwd(Tensor x_in, Tensor bias_in) {
    const RowsOf x = rows_of(x_in);
    const Tensor bias = inner_dense(bias_in);
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.width, "bias: expected [F]");
    check_device(bias, x.t, "bias");
    Tensor y = allocate_like(x_in);
    GeluArgs a{};
    a.D = x.width;
    a.x = x.t.const_data_ptr();
    a.x_stride = x.stride;
    a.bias = bias.const_data_ptr();
    a.modulation = static_cast<int>(storage_of(bias, "bias"));
    a.out = y.mutable_data_ptr();
    Device::gelu(a, storage_of(x.t, "x"), x.rows, x.t);
    return y;
  }

  static std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy_in, Tensor x_in, Tensor bias_in) {
    const RowsOf x = rows_of(x_in), dy = rows_of(dy_in);
    const Tensor bias = inner_dense(bias_in);
    STD_TORCH_CHECK(
        dy.rows == x.rows && dy.width == x.width && dtype_of(dy_in) == dtype_of(x_in),
        "dy: expected the shape and dtype of x");
    check_device(dy.t, x.t, "dy");
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.width, "bias: expected [F]");
    check_device(bias, x.t, "bias");
    Tensor dx = allocate_like(x_in), dbias = allocate_like(bias);
    GeluArgs a{};
    a.D = x.width;
    a.x = x.t.const_data_ptr();
    a.x_stride = x.stride;
    a.dy = dy.t.const_data_ptr();
    a.dy_stride = dy.stride;
    a.bias = bias.const_data_ptr();
    a.modulation = static_cast<int>(storage_of(bias, "bias"));
    a.out = dx.mutable_data_ptr();
    const Storage storage = storage_of(x.t, "x");
    const Sums sums{
        Mode::shared, {1, x.rows, x.width}, 1, storage_of(bias, "bias"), bytes_of(storage), x.t,
        {dbias.mutable_data_ptr(), nullptr, nullptr}};
    Device::gelu_backward(a, storage, sums);
    return {dx, dbias};
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("layernorm_modulate_fwd", TORCH_BOX(&layernorm_modulate_fwd));
    m.impl("layernorm_modulate_infer", TORCH_BOX(&layernorm_modulate_infer));
    m.impl("layernorm_modulate_bwd", TORCH_BOX(&layernorm_modulate_bwd));
    m.impl("gate_residual_fwd", TORCH_BOX(&gate_residual_fwd));
    m.impl("gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
    m.impl("gate_residual_layernorm_modulate_fwd", TORCH_BOX(&gate_residual_layernorm_modulate_fwd));
    m.impl("gate_residual_layernorm_modulate_infer", TORCH_BOX(&gate_residual_layernorm_modulate_infer));
    m.impl("gate_residual_layernorm_modulate_bwd", TORCH_BOX(&gate_residual_layernorm_modulate_bwd));
    m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
    m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
  }
};

}  // namespace ditscale
