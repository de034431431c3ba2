// Attention on CUDA: checks, memory and the launches. Schemas and what each argument means: kernels/attn/shapes.py.
#include "attention.h"
#include "on_device.h"
#ifdef DITSCALE_HOST_SHIM
#include "host_shim.h"
#endif

namespace ditscale::cuda {
namespace {

using Optional = std::optional<Tensor>;
namespace stable = torch::stable;

int64_t whole_chunks(int64_t K) {
  return (K + 7) / 8 * 8;
}

// [B, H, T, K] as the kernels read it, in accesses of 16 bytes: as it is where K is a multiple of 8 and every row begins on
// such a boundary, as the parts of a projection do; else a copy, with columns of zeros up to a multiple of 8.
Tensor readable(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size()), K = t.size(3);
  bool fits = K % 8 == 0 && t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) fits = fits && t.stride(d) * size % 16 == 0;
  if (fits || t.numel() == 0) return t;
  Tensor copy = allocate({t.size(0), t.size(1), t.size(2), whole_chunks(K)}, dtype_of(t), t);
  if (K % 8 != 0) stable::zero_(copy);
  Tensor part = stable::narrow(copy, 3, 0, K);
  stable::copy_(part, t);
  return copy;
}

Heads heads_of(const Tensor& t, void* data, bool packed) {
  return {data, packed ? 0 : t.stride(0), t.stride(1), t.stride(2)};
}
// The kernels only read through the views of inputs.
Heads input(const Tensor& t, bool packed) {
  return heads_of(t, const_cast<void*>(t.const_data_ptr()), packed);
}

// A result [B, H, T, K] that the kernels can write: itself, or columns to copy from.
struct Result {
  Tensor wanted;
  Tensor written;
  Heads heads(bool packed) {
    return heads_of(written, written.mutable_data_ptr(), packed);
  }
  void finish() {
    const int64_t K = wanted.size(3);
    if (written.size(3) != K) stable::copy_(wanted, stable::narrow(written, 3, 0, K));
  }
};

// Rows of packed batches that belong to no sequence are written by no block: they are zero from the start.
Result result(Tensor wanted, bool packed) {
  if (packed) stable::zero_(wanted);
  const int64_t K = wanted.size(3);
  if (K % 8 == 0) return {wanted, wanted};
  Tensor wide = allocate({wanted.size(0), wanted.size(1), wanted.size(2), whole_chunks(K)}, dtype_of(wanted), wanted);
  if (packed) stable::zero_(wide);
  return {wanted, wide};
}

Tensor allocate_float32(bool wanted, std::initializer_list<int64_t> sizes, const Tensor& like, bool packed) {
  Tensor t = wanted ? allocate(sizes, aoti_torch_dtype_float32(), like) : allocate({0}, aoti_torch_dtype_float32(), like);
  if (wanted && packed) stable::zero_(t);
  return t;
}

const int32_t* integers(const Optional& t, int64_t count, const Tensor& like, const char* name) {
  if (!t.has_value()) return nullptr;
  check_device(*t, like, name);
  STD_TORCH_CHECK(
      t->dim() == 1 && t->size(0) == count && t->scalar_type() == ScalarType::Int && t->is_contiguous(), name,
      ": expected int32, contiguous, one a sample (of packed sequences one more than there are)");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

// What a call has besides its tensors of numbers.
struct Options {
  const Optional &key_bias, &lengths, &cu_q, &cu_k;
  int64_t max_q, max_k;
  double scale;
  bool packed() const {
    return cu_q.has_value();
  }
};

void check_rows(const Tensor& t, const Tensor& like, int64_t B, int64_t H, int64_t T, int64_t K, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == B && t.size(1) == H && t.size(2) == T && t.size(3) == K && dtype_of(t) == dtype_of(like),
      name, ": expected [", B, ", ", H, ", ", T, ", ", K, "] of the dtype of q");
  check_device(t, like, name);
}

// Everything but the data of inputs and results.
AttentionArgs args_of(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q, k, v: expected [B, H, T, K]");
  AttentionArgs a{};
  const int64_t B = q.size(0);
  a.H = q.size(1);
  a.T = q.size(2);
  a.H_kv = k.size(1);
  a.S = k.size(2);
  a.K = whole_chunks(q.size(3));
  check_rows(k, q, B, a.H_kv, a.S, q.size(3), "k");
  check_rows(v, q, B, a.H_kv, a.S, q.size(3), "v");
  STD_TORCH_CHECK(a.H_kv > 0 ? a.H > 0 && a.H % a.H_kv == 0 : a.H == 0, "k: expected a number of heads that divides that of q");
  STD_TORCH_CHECK(a.K <= WIDEST_HEAD, "q: expected heads of at most ", WIDEST_HEAD, " columns, got ", q.size(3));
  STD_TORCH_CHECK(a.T < INT32_MAX && a.S < INT32_MAX, "q, k: expected fewer than 2^31 rows");
  a.samples = B;
  a.max_q = a.T;
  a.max_k = a.S;
  a.scale = static_cast<float>(o.scale);
  a.lengths = integers(o.lengths, B, q, "lengths");
  if (o.packed()) {
    STD_TORCH_CHECK(B == 1 && a.lengths == nullptr, "cu_q: expected one sample of packed sequences, and no lengths");
    STD_TORCH_CHECK(o.cu_q->dim() == 1 && o.cu_q->size(0) > 0, "cu_q: expected one number more than there are sequences");
    a.samples = o.cu_q->size(0) - 1;
    a.cu_q = integers(o.cu_q, a.samples + 1, q, "cu_q");
    a.cu_k = integers(o.cu_k, a.samples + 1, q, "cu_k");
    STD_TORCH_CHECK(a.cu_k != nullptr, "cu_k: expected together with cu_q");
    a.max_q = o.max_q < a.T ? o.max_q : a.T;
    a.max_k = o.max_k < a.S ? o.max_k : a.S;
  }
  // A grid has 31 bits. Without a bound every packed sequence gets blocks as if it were as long as all together.
  const int64_t longest = a.max_q > a.max_k ? a.max_q : a.max_k, heads = a.H > a.H_kv ? a.H : a.H_kv;
  STD_TORCH_CHECK(
      (longest + FEWEST_ROWS - 1) / FEWEST_ROWS * heads * a.samples <= INT32_MAX,
      "q, k: too many blocks of rows for one launch; of packed sequences give the longest (max_seqlen)");
  if (o.key_bias.has_value()) {
    const Tensor& bias = *o.key_bias;
    STD_TORCH_CHECK(
        bias.dim() == 3 && bias.size(0) == B && bias.size(1) == a.H && bias.size(2) == a.S &&
            bias.scalar_type() == ScalarType::Float,
        "key_bias: expected [B, H, S] float32");
    check_device(bias, q, "key_bias");
    a.key_bias = static_cast<const float*>(bias.const_data_ptr());
    a.bias_b = o.packed() ? 0 : bias.stride(0);
    a.bias_h = bias.stride(1);
    a.bias_s = bias.stride(2);
  }
  return a;
}

void point_stats(AttentionArgs& a, const Tensor& stats, int64_t rows) {
  STD_TORCH_CHECK(stats.numel() == 2 * rows && stats.is_contiguous(), "stats: expected [2, B, H, T], contiguous");
  a.origin = static_cast<float*>(stats.mutable_data_ptr());
  a.factor = a.origin + rows;
}

// Fills out; returns the statistics.
Tensor run_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, Tensor out_in, const Options& o, bool save_stats) {
  AttentionArgs a = args_of(q_in, k_in, v_in, o);
  const OnDevice on(q_in);
  const bool packed = o.packed();
  const int64_t B = q_in.size(0);
  Tensor stats = allocate_float32(save_stats, {2, B, a.H, a.T}, q_in, packed);
  if (save_stats) point_stats(a, stats, B * a.H * a.T);
  const Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in);
  Result out = result(out_in, packed);
  a.q = input(q, packed);
  a.k = input(k, packed);
  a.v = input(v, packed);
  a.out = out.heads(packed);
  check_launch(launch_attention_forward(a, storage_of(q, "q"), on.stream));
  out.finish();
  return stats;
}

// Fills the gradients of q, k and v; returns that of the biases.
Tensor run_backward(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
    const Tensor& stats, Tensor (&grads)[3], const Options& o, bool bias_grad) {
  AttentionArgs a = args_of(q_in, k_in, v_in, o);
  const OnDevice on(q_in);
  const bool packed = o.packed();
  const int64_t B = q_in.size(0);
  check_rows(dout_in, q_in, B, a.H, a.T, q_in.size(3), "dout");
  check_rows(out_in, q_in, B, a.H, a.T, q_in.size(3), "out");
  point_stats(a, stats, B * a.H * a.T);
  const Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in), dout = readable(dout_in), out = readable(out_in);
  Result dq = result(grads[0], packed), dk = result(grads[1], packed), dv = result(grads[2], packed);
  Tensor delta = allocate({B, a.H, a.T}, aoti_torch_dtype_float32(), q);
  Tensor dkey_bias = allocate_float32(bias_grad, {B, a.H, a.S}, q, true);  // of keys that count no sum is written
  a.q = input(q, packed);
  a.k = input(k, packed);
  a.v = input(v, packed);
  a.dout = input(dout, packed);
  a.out = input(out, packed);
  a.dq = dq.heads(packed);
  a.dk = dk.heads(packed);
  a.dv = dv.heads(packed);
  a.delta = static_cast<float*>(delta.mutable_data_ptr());
  a.dkey_bias = bias_grad ? static_cast<float*>(dkey_bias.mutable_data_ptr()) : nullptr;
  check_launch(launch_attention_backward(a, storage_of(q, "q"), on.stream));
  for (Result* r : {&dq, &dk, &dv}) r->finish();
  return dkey_bias;
}

std::tuple<Tensor, Tensor> attention_fwd(
    Tensor q, Tensor k, Tensor v, Optional key_bias, Optional lengths, Optional cu_q, Optional cu_k, int64_t max_q,
    int64_t max_k, double scale, bool save_stats) {
  STD_TORCH_CHECK(q.dim() == 4, "q: expected [B, H, T, K]");
  Tensor out = allocate_heads(q);
  Tensor stats = run_forward(q, k, v, out, {key_bias, lengths, cu_q, cu_k, max_q, max_k, scale}, save_stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Optional key_bias, Optional lengths, Optional cu_q,
    Optional cu_k, int64_t max_q, int64_t max_k, double scale, bool bias_grad) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected [B, H, T, K]");
  Tensor grads[3] = {allocate_heads(q), allocate_heads(k), allocate_heads(v)};
  Tensor dkey_bias = run_backward(
      dout, q, k, v, out, stats, grads, {key_bias, lengths, cu_q, cu_k, max_q, max_k, scale}, bias_grad);
  return {grads[0], grads[1], grads[2], dkey_bias};
}

// The three [B, H, T, K] of a [B, T, 3, H, K].
Tensor part_of(const Tensor& qkv, int64_t i) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected [B, T, 3, H, K]");
  return stable::transpose(stable::select(qkv, 2, i), 1, 2);
}
// The [B, H, T, K] of a [B, T, H * K].
Tensor heads_in(const Tensor& rows, const Tensor& qkv) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.size(2) == qkv.size(3) * qkv.size(4), "dout, out: expected [B, T, H * K]");
  const Tensor dense = rows.is_contiguous() ? rows : stable::contiguous(rows);
  const int64_t sizes[] = {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  return stable::transpose(stable::view(dense, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 4)), 1, 2);
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(
    Tensor qkv, Optional key_bias, Optional lengths, Optional cu, int64_t max_seqlen, double scale, bool save_stats) {
  const Tensor q = part_of(qkv, 0);
  Tensor out = allocate({qkv.size(0), qkv.size(1), qkv.size(3) * qkv.size(4)}, dtype_of(qkv), qkv);
  Tensor stats = run_forward(
      q, part_of(qkv, 1), part_of(qkv, 2), heads_in(out, qkv), {key_bias, lengths, cu, cu, max_seqlen, max_seqlen, scale},
      save_stats);
  return {out, stats};
}

std::tuple<Tensor, Tensor> attention_qkv_bwd(
    Tensor dout, Tensor qkv, Tensor out, Tensor stats, Optional key_bias, Optional lengths, Optional cu, int64_t max_seqlen,
    double scale, bool bias_grad) {
  Tensor dqkv = allocate({qkv.size(0), qkv.size(1), 3, qkv.size(3), qkv.size(4)}, dtype_of(qkv), qkv);
  Tensor grads[3] = {part_of(dqkv, 0), part_of(dqkv, 1), part_of(dqkv, 2)};
  Tensor dkey_bias = run_backward(
      heads_in(dout, qkv), part_of(qkv, 0), part_of(qkv, 1), part_of(qkv, 2), heads_in(out, qkv), stats, grads,
      {key_bias, lengths, cu, cu, max_seqlen, max_seqlen, scale}, bias_grad);
  return {dqkv, dkey_bias};
}

}  // namespace
}  // namespace ditscale::cuda

DS_IMPLEMENT(m) {
  using namespace ditscale::cuda;
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("attention_qkv_fwd", TORCH_BOX(&attention_qkv_fwd));
  m.impl("attention_qkv_bwd", TORCH_BOX(&attention_qkv_bwd));
}

#ifdef DITSCALE_HOST_SHIM
// For tests: what was counted since the last call (races, bank conflicts, addresses not aligned, multiply-adds of matrix
// instructions), and whether warps run from the last to the first from now on.
extern "C" __attribute__((visibility("default"))) void ditscale_shim_counts(int64_t* out, bool backwards) {
  namespace shim = ditscale::shim;
  out[0] = shim::counts.races;
  out[1] = shim::counts.conflicts;
  out[2] = shim::counts.misaligned;
  out[3] = shim::counts.multiply_adds;
  shim::counts = {};
  shim::backwards = backwards;
}
#endif
