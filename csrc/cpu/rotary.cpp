// Normalisation of queries or keys and their rotation on the CPU: checks, allocation and the split over threads.
#include "adaln_rows.h"
#include "rotary_rows.h"
#include "scratch.h"

namespace ditscale::cpu {
namespace {

const RotaryTable& rotary_table() {
  static const RotaryTable& chosen = []() -> const RotaryTable& {
#if defined(__x86_64__)
    if (std::strcmp(adaln_table().isa, "avx512") == 0) return rotary_avx512;
    if (std::strcmp(adaln_table().isa, "avx2") == 0) return rotary_avx2;
#endif
    return rotary_portable;
  }();
  return chosen;
}

thread_local Scratch scratch_of_thread;

// Tokens that one thread should at least get, and chunks of tokens that the sums of the weight's gradient are cut into.
constexpr int64_t NUMBERS_A_THREAD = 16384, CHUNKS = 64;

HeadView view_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor allocate_heads(const Tensor& like) {
  const Tensor rows = allocate({like.size(0), like.size(2), like.size(1), like.size(3)}, dtype_of(like), like);
  return torch::stable::transpose(rows, 1, 2);
}

const float* vector_of(const std::optional<Tensor>& t, int64_t n, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == n, name, ": expected ", n,
      " float32 numbers, contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

RotaryArgs args_of(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    double eps, int64_t norm, bool interleaved) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [B, H, T, K]");
  RotaryArgs a{};
  a.H = x.size(1);
  a.T = x.size(2);
  a.K = x.size(3);
  a.x = view_of(x);
  a.weight = vector_of(weight, a.K, "weight");
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

int64_t grain(const RotaryArgs& a) {
  const int64_t width = a.H * a.K > 0 ? a.H * a.K : 1;
  return NUMBERS_A_THREAD / width + 1;
}

Tensor qk_norm_rope_fwd(
    Tensor x_in, std::optional<Tensor> weight, std::optional<Tensor> cos, std::optional<Tensor> sin, double eps, int64_t norm,
    bool interleaved) {
  const Tensor x = inner_dense(x_in);
  RotaryArgs a = args_of(x, weight, cos, sin, eps, norm, interleaved);
  Tensor out = allocate_heads(x);
  a.out = view_of(out);
  const RotaryKernels& kernels = rotary_table().by_storage[static_cast<int>(storage_of(x, "x"))];
  torch::stable::parallel_for(0, x.size(0) * a.T, grain(a), [&](int64_t begin, int64_t end) {
    kernels.forward(a, begin, end, scratch_of_thread.get(ROTARY_SCRATCH * a.K));
  });
  return out;
}

// dweight is [0] where there is no weight.
std::tuple<Tensor, Tensor> qk_norm_rope_bwd(
    Tensor dout_in, Tensor x_in, std::optional<Tensor> weight, std::optional<Tensor> cos, std::optional<Tensor> sin,
    double eps, int64_t norm, bool interleaved) {
  const Tensor x = inner_dense(x_in), dout = inner_dense(dout_in);
  RotaryArgs a = args_of(x, weight, cos, sin, eps, norm, interleaved);
  STD_TORCH_CHECK(
      dout.dim() == 4 && dout.size(0) == x.size(0) && dout.size(1) == a.H && dout.size(2) == a.T && dout.size(3) == a.K &&
          dtype_of(dout) == dtype_of(x),
      "dout: expected the shape and dtype of x");
  a.dout = view_of(dout);
  Tensor dx = allocate_heads(x);
  a.out = view_of(dx);
  const bool sums = a.weight != nullptr;
  Tensor dweight = allocate({sums ? a.K : 0}, aoti_torch_dtype_float32(), x);
  const RotaryKernels& kernels = rotary_table().by_storage[static_cast<int>(storage_of(x, "x"))];
  const int64_t tokens = x.size(0) * a.T;
  if (!sums) {
    torch::stable::parallel_for(0, tokens, grain(a), [&](int64_t begin, int64_t end) {
      kernels.backward(a, begin, end, nullptr, scratch_of_thread.get(ROTARY_SCRATCH * a.K));
    });
    return {dx, dweight};
  }
  // The cut into chunks follows from the shape alone, so the sums have the same bits for any number of threads.
  int64_t chunk = (tokens + CHUNKS - 1) / CHUNKS;
  if (chunk < 8) chunk = 8;
  const int64_t chunks = (tokens + chunk - 1) / chunk;
  const Tensor partial = allocate({chunks, a.K}, aoti_torch_dtype_float32(), x);
  float* sum = static_cast<float*>(partial.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, grain(a) / chunk + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = (i + 1) * chunk < tokens ? (i + 1) * chunk : tokens;
      kernels.backward(a, i * chunk, last, sum + i * a.K, scratch_of_thread.get(ROTARY_SCRATCH * a.K));
    }
  });
  float* total = static_cast<float*>(dweight.mutable_data_ptr());
  for (int64_t i = 0; i < a.K; ++i) {
    double acc = 0.0;
    for (int64_t c = 0; c < chunks; ++c) acc += sum[c * a.K + i];
    total[i] = static_cast<float>(acc);
  }
  return {dx, dweight};
}

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  using namespace ditscale::cpu;
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}
