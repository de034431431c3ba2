// The adaLN family on the CPU: checks, allocation and the split over threads; the arithmetic is in adaln_rows.inl.
#include "../common/tensors.h"
#include "adaln_rows.h"

#include <memory>

namespace ditscale::cpu {
namespace {

// Tasks a call is cut into at most: enough for any core count, few enough that partial sums stay small.
constexpr int64_t TASKS = 128;

// Outputs beyond this are written past the caches: they would be gone from them before anybody reads.
constexpr int64_t STREAM_BYTES = int64_t{1} << 62;

struct Scratch {
  std::unique_ptr<float[]> data;
  int64_t size = 0;
  float* get(int64_t n) {
    if (n > size) {
      data.reset(new float[n]);
      size = n;
    }
    return data.get();
  }
};
thread_local Scratch scratch_of_thread;

Strided strided(const Tensor& t) {
  const int64_t dims = t.dim();
  return {t.const_data_ptr(), dims >= 2 ? t.stride(0) : 0, dims == 3 ? t.stride(1) : 0};
}

const AdalnKernels& kernels_for(const Tensor& x) {
  return adaln_table().by_storage[static_cast<int>(storage_of(x, "x"))];
}

// Rows that one thread should at least get, so that small calls do not pay for waking the others.
int64_t grain(int64_t D) {
  const int64_t rows = 16384 / (D > 0 ? D : 1);
  return rows > 1 ? rows : 1;
}

// Runs `rows_fn(begin, end, sums, scratch)` over the chunks of every segment, then adds the chunks of a segment in order and
// stores sum k of segment s at out[k] + s * D.
template <class F>
void reduce_rows(
    const AdalnKernels& k, Mode mode, const Shape& s, int64_t sums, int64_t element_size, Storage storage,
    const Tensor& like, void* const* out, const F& rows_fn) {
  const int64_t D = s.D;
  if (mode == Mode::per_token) {
    torch::stable::parallel_for(0, s.B * s.T, grain(D), [&](int64_t begin, int64_t end) {
      rows_fn(begin, end, nullptr, scratch_of_thread.get(7 * D));
    });
    return;
  }
  const Cut cut = cut_rows(mode, s.B, s.T, sums * 32 / element_size, TASKS);
  const int64_t size = bytes_of(storage);
  const bool direct = cut.chunks == 1;
  std::optional<Tensor> held;
  float* partial = nullptr;
  if (!direct) {
    held = allocate({cut.segments * cut.chunks, sums, D}, aoti_torch_dtype_float32(), like);
    partial = static_cast<float*>(held->mutable_data_ptr());
  }
  const int64_t per_task = cut.chunk > 0 ? cut.chunk : 1;
  torch::stable::parallel_for(
      0, cut.segments * cut.chunks, (grain(D) + per_task - 1) / per_task, [&](int64_t begin, int64_t end) {
        float* scratch = scratch_of_thread.get(7 * D);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t segment = task / cut.chunks, first = (task % cut.chunks) * cut.chunk;
          const int64_t last = first + cut.chunk < cut.rows ? first + cut.chunk : cut.rows;
          float* mine = direct ? scratch + 4 * D : partial + task * sums * D;
          rows_fn(segment * cut.rows + first, segment * cut.rows + last, mine, scratch);
          if (!direct) continue;
          for (int64_t i = 0; i < sums; ++i) {
            k.add_chunks(mine + i * D, 1, 0, D, static_cast<int>(storage), static_cast<char*>(out[i]) + segment * D * size);
          }
        }
      });
  if (direct) return;
  torch::stable::parallel_for(0, cut.segments * sums, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t segment = job / sums, i = job % sums;
      k.add_chunks(
          partial + (segment * cut.chunks * sums + i) * D,
          cut.chunks,
          sums * D,
          D,
          static_cast<int>(storage),
          static_cast<char*>(out[i]) + segment * D * size);
    }
  });
}

Tensor like_modulation(const Tensor& m, Mode mode, const Shape& s) {
  switch (mode) {
    case Mode::shared:
      return allocate({s.D}, dtype_of(m), m);
    case Mode::per_sample:
      return allocate({s.B, s.D}, dtype_of(m), m);
    default:
      return allocate({s.B, s.T, s.D}, dtype_of(m), m);
  }
}

Tensor stats_for(const Tensor& x, const Shape& s, bool save) {
  return save ? allocate({2, s.B, s.T}, aoti_torch_dtype_float32(), x) : allocate({0}, aoti_torch_dtype_float32(), x);
}

void check_modulation(const Tensor& a, const Tensor& b, Mode mode, const Shape& s, const char* name) {
  STD_TORCH_CHECK(mode_of(a, s, name) == mode && dtype_of(a) == dtype_of(b), name, ": expected the shape and dtype of scale");
}

// Statistics of a forward call: two rows of [B * T], or none.
struct Stats {
  float* mean;
  float* rstd;
};
Stats stats_of(const Tensor& stats, const Shape& s) {
  if (stats.numel() == 0) return {nullptr, nullptr};
  STD_TORCH_CHECK(stats.numel() == 2 * s.B * s.T && stats.is_contiguous(), "stats: expected [2, B, T], contiguous");
  float* data = static_cast<float*>(stats.mutable_data_ptr());
  return {data, data + s.B * s.T};
}

void run_forward(
    const Tensor& x, const Tensor* branch, const Tensor* gate, const Tensor& shift, const Tensor& scale, double eps,
    double scale_base, bool rms, const Shape& s, void* x_new, void* y, const Tensor& stats) {
  ForwardArgs a{};
  a.T = s.T;
  a.D = s.D;
  a.x = strided(x);
  if (branch != nullptr) {
    a.branch = strided(*branch);
    a.gate = strided(*gate);
  }
  a.shift = strided(shift);
  a.scale = strided(scale);
  a.modulation = static_cast<int>(storage_of(scale, "scale"));
  a.eps = static_cast<float>(eps);
  a.scale_base = static_cast<float>(scale_base);
  a.rms = rms;
  a.x_new = x_new;
  a.y = y;
  const Stats st = stats_of(stats, s);
  a.mean = st.mean;
  a.rstd = st.rstd;
  a.stream = s.B * s.T * s.D * static_cast<int64_t>(x.element_size()) > STREAM_BYTES;
  const AdalnKernels& k = kernels_for(x);
  torch::stable::parallel_for(0, s.B * s.T, grain(s.D), [&](int64_t begin, int64_t end) {
    k.forward(a, begin, end, scratch_of_thread.get(4 * s.D));
  });
}

std::tuple<Tensor, Tensor> layernorm_modulate_fwd(
    Tensor x_in, Tensor shift_in, Tensor scale_in, double eps, double scale_base, bool rms, bool save_stats) {
  const Shape s = shape_of(x_in);
  const Tensor x = inner_dense(x_in), shift = inner_dense(shift_in), scale = inner_dense(scale_in);
  const Mode mode = mode_of(scale, s, "scale");
  check_modulation(shift, scale, mode, s, "shift");
  Tensor y = allocate({s.B, s.T, s.D}, dtype_of(x), x), stats = stats_for(x, s, save_stats);
  run_forward(x, nullptr, nullptr, shift, scale, eps, scale_base, rms, s, nullptr, y.mutable_data_ptr(), stats);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> layernorm_modulate_bwd(
    Tensor dy_in, Tensor x_in, Tensor scale_in, Tensor stats, double eps, double scale_base, bool rms) {
  const Shape s = shape_of(x_in);
  const Tensor dy = inner_dense(dy_in), x = inner_dense(x_in), scale = inner_dense(scale_in);
  check_like(dy, x, s, "dy");
  const Mode mode = mode_of(scale, s, "scale");
  Tensor dx = allocate({s.B, s.T, s.D}, dtype_of(x), x);
  Tensor dshift = like_modulation(scale, mode, s), dscale = like_modulation(scale, mode, s);
  const Storage storage = storage_of(scale, "scale");
  BackwardArgs a{};
  a.T = s.T;
  a.D = s.D;
  a.dy = strided(dy);
  a.x = strided(x);
  a.scale = strided(scale);
  a.modulation = static_cast<int>(storage);
  const Stats st = stats_of(stats, s);
  a.mean = st.mean;
  a.rstd = st.rstd;
  a.eps = static_cast<float>(eps);
  a.scale_base = static_cast<float>(scale_base);
  a.rms = rms;
  a.per_token = mode == Mode::per_token;
  a.dx = dx.mutable_data_ptr();
  a.dshift = dshift.mutable_data_ptr();
  a.dscale = dscale.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(x);
  void* out[] = {a.dshift, a.dscale};
  reduce_rows(
      k, mode, s, 2, x.element_size(), storage, x, out, [&](int64_t begin, int64_t end, float* sums, float* scratch) {
        k.backward(a, begin, end, sums, scratch);
      });
  return {dx, dshift, dscale};
}

Tensor gate_residual_fwd(Tensor x_in, Tensor branch_in, Tensor gate_in) {
  const Shape s = shape_of(x_in);
  const Tensor x = inner_dense(x_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
  check_like(branch, x, s, "branch");
  mode_of(gate, s, "gate");
  Tensor out = allocate({s.B, s.T, s.D}, dtype_of(x), x);
  ResidualArgs a{};
  a.T = s.T;
  a.D = s.D;
  a.x = strided(x);
  a.branch = strided(branch);
  a.gate = strided(gate);
  a.modulation = static_cast<int>(storage_of(gate, "gate"));
  a.out = out.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(x);
  torch::stable::parallel_for(0, s.B * s.T, grain(s.D), [&](int64_t begin, int64_t end) {
    k.residual(a, begin, end, scratch_of_thread.get(4 * s.D));
  });
  return out;
}

std::tuple<Tensor, Tensor> gate_residual_bwd(Tensor dout_in, Tensor branch_in, Tensor gate_in) {
  const Shape s = shape_of(dout_in);
  const Tensor dout = inner_dense(dout_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
  check_like(branch, dout, s, "branch");
  const Mode mode = mode_of(gate, s, "gate");
  Tensor dbranch = allocate({s.B, s.T, s.D}, dtype_of(branch), branch), dgate = like_modulation(gate, mode, s);
  const Storage storage = storage_of(gate, "gate");
  ResidualArgs a{};
  a.T = s.T;
  a.D = s.D;
  a.x = strided(dout);
  a.branch = strided(branch);
  a.gate = strided(gate);
  a.modulation = static_cast<int>(storage);
  a.per_token = mode == Mode::per_token;
  a.out = dbranch.mutable_data_ptr();
  a.dgate = dgate.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(dout);
  void* out[] = {a.dgate};
  reduce_rows(
      k, mode, s, 1, dout.element_size(), storage, dout, out,
      [&](int64_t begin, int64_t end, float* sums, float* scratch) { k.residual_backward(a, begin, end, sums, scratch); });
  return {dbranch, dgate};
}

std::tuple<Tensor, Tensor, Tensor> gate_residual_layernorm_modulate_fwd(
    Tensor x_in, Tensor branch_in, Tensor gate_in, Tensor shift_in, Tensor scale_in, double eps, double scale_base,
    bool rms, bool save_stats) {
  const Shape s = shape_of(x_in);
  const Tensor x = inner_dense(x_in), branch = inner_dense(branch_in), gate = inner_dense(gate_in);
  const Tensor shift = inner_dense(shift_in), scale = inner_dense(scale_in);
  check_like(branch, x, s, "branch");
  const Mode mode = mode_of(scale, s, "scale");
  check_modulation(shift, scale, mode, s, "shift");
  check_modulation(gate, scale, mode, s, "gate");
  Tensor x_new = allocate({s.B, s.T, s.D}, dtype_of(x), x), y = allocate({s.B, s.T, s.D}, dtype_of(x), x);
  Tensor stats = stats_for(x, s, save_stats);
  run_forward(
      x, &branch, &gate, shift, scale, eps, scale_base, rms, s, x_new.mutable_data_ptr(), y.mutable_data_ptr(), stats);
  return {x_new, y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_layernorm_modulate_bwd(
    Tensor dy_in, std::optional<Tensor> dx_new_in, Tensor x_new_in, Tensor branch_in, Tensor gate_in, Tensor scale_in,
    Tensor stats, double eps, double scale_base, bool rms) {
  const Shape s = shape_of(x_new_in);
  const Tensor dy = inner_dense(dy_in), x_new = inner_dense(x_new_in), branch = inner_dense(branch_in);
  const Tensor gate = inner_dense(gate_in), scale = inner_dense(scale_in);
  check_like(dy, x_new, s, "dy");
  check_like(branch, x_new, s, "branch");
  const Mode mode = mode_of(scale, s, "scale");
  check_modulation(gate, scale, mode, s, "gate");
  std::optional<Tensor> dx_new;
  if (dx_new_in.has_value()) {
    dx_new = inner_dense(*dx_new_in);
    check_like(*dx_new, x_new, s, "dx_new");
  }
  Tensor dx = allocate({s.B, s.T, s.D}, dtype_of(x_new), x_new), dbranch = allocate({s.B, s.T, s.D}, dtype_of(x_new), x_new);
  Tensor dshift = like_modulation(scale, mode, s), dscale = like_modulation(scale, mode, s);
  Tensor dgate = like_modulation(scale, mode, s);
  const Storage storage = storage_of(scale, "scale");
  BackwardArgs a{};
  a.T = s.T;
  a.D = s.D;
  a.dy = strided(dy);
  if (dx_new.has_value()) a.dresidual = strided(*dx_new);
  a.x = strided(x_new);
  a.branch = strided(branch);
  a.gate = strided(gate);
  a.scale = strided(scale);
  a.modulation = static_cast<int>(storage);
  const Stats st = stats_of(stats, s);
  a.mean = st.mean;
  a.rstd = st.rstd;
  a.eps = static_cast<float>(eps);
  a.scale_base = static_cast<float>(scale_base);
  a.rms = rms;
  a.per_token = mode == Mode::per_token;
  a.dx = dx.mutable_data_ptr();
  a.dbranch = dbranch.mutable_data_ptr();
  a.dshift = dshift.mutable_data_ptr();
  a.dscale = dscale.mutable_data_ptr();
  a.dgate = dgate.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(x_new);
  void* out[] = {a.dshift, a.dscale, a.dgate};
  reduce_rows(
      k, mode, s, 3, x_new.element_size(), storage, x_new, out,
      [&](int64_t begin, int64_t end, float* sums, float* scratch) { k.backward(a, begin, end, sums, scratch); });
  return {dx, dbranch, dgate, dshift, dscale};
}

// x [..., F] seen as rows: dense rows at any one distance, or a copy.
struct RowsOf {
  Tensor t;
  int64_t rows, width, stride;
};
RowsOf rows_of(const Tensor& t) {
  const int64_t dims = t.dim(), width = t.size(dims - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) rows *= t.size(d);
  if (dims <= 2) {
    const Tensor dense = inner_dense(t);
    return {dense, rows, width, dims == 2 ? dense.stride(0) : width};
  }
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return {dense, rows, width, width};
}

Tensor allocate_like(const Tensor& t) {
  switch (t.dim()) {
    case 1:
      return allocate({t.size(0)}, dtype_of(t), t);
    case 2:
      return allocate({t.size(0), t.size(1)}, dtype_of(t), t);
    default:
      return allocate({t.size(0), t.size(1), t.size(2)}, dtype_of(t), t);
  }
}

Tensor bias_gelu_fwd(Tensor x_in, Tensor bias_in) {
  STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.dim() <= 3, "x: expected one to three dimensions");
  const RowsOf x = rows_of(x_in);
  const Tensor bias = inner_dense(bias_in);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.width, "bias: expected [F]");
  Tensor y = allocate_like(x_in);
  GeluArgs a{};
  a.D = x.width;
  a.x = x.t.const_data_ptr();
  a.x_stride = x.stride;
  a.bias = bias.const_data_ptr();
  a.modulation = static_cast<int>(storage_of(bias, "bias"));
  a.out = y.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(x.t);
  torch::stable::parallel_for(0, x.rows, grain(x.width), [&](int64_t begin, int64_t end) {
    k.gelu(a, begin, end, scratch_of_thread.get(4 * x.width));
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy_in, Tensor x_in, Tensor bias_in) {
  const RowsOf x = rows_of(x_in), dy = rows_of(dy_in);
  const Tensor bias = inner_dense(bias_in);
  STD_TORCH_CHECK(dy.rows == x.rows && dy.width == x.width && dtype_of(dy_in) == dtype_of(x_in), "dy: expected the shape and dtype of x");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.width, "bias: expected [F]");
  Tensor dx = allocate_like(x_in), dbias = allocate_like(bias);
  const Storage storage = storage_of(bias, "bias");
  GeluArgs a{};
  a.D = x.width;
  a.x = x.t.const_data_ptr();
  a.x_stride = x.stride;
  a.dy = dy.t.const_data_ptr();
  a.dy_stride = dy.stride;
  a.bias = bias.const_data_ptr();
  a.modulation = static_cast<int>(storage);
  a.out = dx.mutable_data_ptr();
  const AdalnKernels& k = kernels_for(x.t);
  void* out[] = {dbias.mutable_data_ptr()};
  const Shape s{1, x.rows, x.width};
  reduce_rows(
      k, Mode::shared, s, 1, x.t.element_size(), storage, x.t, out,
      [&](int64_t begin, int64_t end, float* sums, float* scratch) { k.gelu_backward(a, begin, end, sums, scratch); });
  return {dx, dbias};
}

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  using namespace ditscale::cpu;
  m.impl("layernorm_modulate_fwd", TORCH_BOX(&layernorm_modulate_fwd));
  m.impl("layernorm_modulate_bwd", TORCH_BOX(&layernorm_modulate_bwd));
  m.impl("gate_residual_fwd", TORCH_BOX(&gate_residual_fwd));
  m.impl("gate_residual_bwd", TORCH_BOX(&gate_residual_bwd));
  m.impl("gate_residual_layernorm_modulate_fwd", TORCH_BOX(&gate_residual_layernorm_modulate_fwd));
  m.impl("gate_residual_layernorm_modulate_bwd", TORCH_BOX(&gate_residual_layernorm_modulate_bwd));
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

extern "C" __attribute__((visibility("default"))) const char* ditscale_cpu_isa() {
  return ditscale::cpu::adaln_table().isa;
}
