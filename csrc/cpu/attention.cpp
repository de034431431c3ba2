// Attention on the CPU: checks, allocation and the split over threads; the arithmetic is in attention_blocks.inl.
#include "attention_blocks.h"
#include "adaln_rows.h"
#include "scratch.h"

namespace ditscale::cpu {
namespace {

const AttentionTable& attention_table() {
  static const AttentionTable& chosen = []() -> const AttentionTable& {
#if defined(__x86_64__)
    if (std::strcmp(adaln_table().isa, "avx512") == 0) return attention_avx512;
    if (std::strcmp(adaln_table().isa, "avx2") == 0) return attention_avx2;
#endif
    return attention_portable;
  }();
  return chosen;
}

thread_local Scratch scratch_of_thread;

// Pieces of the backward pass that a call is cut into where it has fewer heads: each makes its own sums for dk and dv.
constexpr int64_t PIECES = 32, BLOCKS_A_PIECE = 4;
constexpr int64_t FLOPS_A_THREAD = 2'000'000;  // below this, waking another thread costs more than it saves

// Tasks of this many FLOPs that one thread should at least get.
int64_t grain(int64_t flops) {
  return flops >= FLOPS_A_THREAD ? 1 : FLOPS_A_THREAD / (flops > 0 ? flops : 1) + 1;
}

HeadView view_of(const Tensor& t, void* data) {
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}
// The kernels only read through the views of inputs.
HeadView input(const Tensor& t) {
  return view_of(t, const_cast<void*>(t.const_data_ptr()));
}

// [B, H, T, K] over memory laid out [B, T, H, K]: what the next projection reads as [B, T, H * K] without a copy.
Tensor allocate_heads(int64_t B, int64_t H, int64_t T, int64_t K, const Tensor& like) {
  const Tensor rows = allocate({B, T, H, K}, dtype_of(like), like);
  return torch::stable::transpose(rows, 1, 2);
}

void check_lengths(AttentionArgs& a, const std::optional<Tensor>& lengths) {
  if (!lengths.has_value()) return;
  STD_TORCH_CHECK(
      lengths->dim() == 1 && lengths->size(0) == a.B && lengths->scalar_type() == ScalarType::Long &&
          lengths->is_contiguous(),
      "lengths: expected [B] int64, contiguous");
  a.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t b = 0; b < a.B; ++b) {
    STD_TORCH_CHECK(a.lengths[b] >= 0 && a.lengths[b] <= a.S, "lengths: expected 0 to ", a.S, ", got ", a.lengths[b]);
  }
}

AttentionArgs args_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& lengths, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected [B, H, T, K]");
  AttentionArgs a{};
  a.B = q.size(0);
  a.H = q.size(1);
  a.T = q.size(2);
  a.K = q.size(3);
  a.H_kv = k.size(1);
  a.S = k.size(2);
  for (const Tensor* t : {&k, &v}) {
    STD_TORCH_CHECK(
        t->size(0) == a.B && t->size(1) == a.H_kv && t->size(2) == a.S && t->size(3) == a.K && dtype_of(*t) == dtype_of(q),
        "k, v: expected [B, H_kv, S, K] to go with q, of its dtype");
  }
  STD_TORCH_CHECK(a.H_kv > 0 ? a.H % a.H_kv == 0 : a.H == 0, "k: expected a number of heads that divides that of q");
  a.scale = static_cast<float>(scale);
  a.q = input(q);
  a.k = input(k);
  a.v = input(v);
  check_lengths(a, lengths);
  return a;
}

// The three views of a [B, T, 3, H, K].
void view_qkv(const Tensor& t, void* data, HeadView* q, HeadView* k, HeadView* v) {
  const int64_t step = t.stride(2) * static_cast<int64_t>(t.element_size());
  HeadView* const views[] = {q, k, v};
  for (int64_t i = 0; i < 3; ++i) {
    *views[i] = {static_cast<char*>(data) + i * step, t.stride(0), t.stride(3), t.stride(1)};
  }
}

AttentionArgs args_of(const Tensor& qkv, const std::optional<Tensor>& lengths, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected [B, T, 3, H, K]");
  AttentionArgs a{};
  a.B = qkv.size(0);
  a.T = a.S = qkv.size(1);
  a.H = a.H_kv = qkv.size(3);
  a.K = qkv.size(4);
  a.scale = static_cast<float>(scale);
  view_qkv(qkv, const_cast<void*>(qkv.const_data_ptr()), &a.q, &a.k, &a.v);
  check_lengths(a, lengths);
  return a;
}

void point_stats(AttentionArgs& a, const Tensor& stats) {
  const int64_t rows = a.B * a.H * a.T;
  STD_TORCH_CHECK(stats.numel() == 2 * rows && stats.is_contiguous(), "stats: expected [2, B, H, T], contiguous");
  a.row_origin = static_cast<float*>(stats.mutable_data_ptr());
  a.row_weight = a.row_origin + rows;
}

// Fills what a.out sees; returns the statistics.
Tensor run_forward(AttentionArgs& a, const Tensor& like, bool save_stats) {
  const AttentionKernels& kernels = attention_table().by_storage[static_cast<int>(storage_of(like, "q"))];
  Tensor stats = save_stats ? allocate({2, a.B, a.H, a.T}, aoti_torch_dtype_float32(), like)
                            : allocate({0}, aoti_torch_dtype_float32(), like);
  if (save_stats) point_stats(a, stats);
  const int64_t blocks = (a.T + QUERIES - 1) / QUERIES, rows = a.T < QUERIES ? a.T : QUERIES;
  torch::stable::parallel_for(
      0, a.B * a.H * blocks, grain(4 * rows * a.S * a.K), [&](int64_t begin, int64_t end) {
        float* scratch = scratch_of_thread.get(kernels.forward_scratch(a));
        for (int64_t i = begin; i < end; ++i) {
          kernels.forward(a, i / blocks / a.H, i / blocks % a.H, i % blocks, scratch);
        }
      });
  return stats;
}

void zero_rows(const HeadView& view, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t K) {
  for (int64_t t = begin; t < end; ++t) {
    std::memset(static_cast<float*>(view.data) + b * view.b + h * view.h + t * view.t, 0, sizeof(float) * K);
  }
}

// Fills what a.dq, a.dk and a.dv see. The cut into pieces follows from the shape, never from the number of threads.
void run_backward(AttentionArgs& a, const Tensor& stats, const Tensor& like) {
  const Storage storage = storage_of(like, "q");
  const AttentionKernels& kernels = attention_table().by_storage[static_cast<int>(storage)];
  point_stats(a, stats);
  const int64_t heads = a.B * a.H_kv, width = kernels.row_width(a.K), sums = a.S * width;
  const int64_t items = a.H_kv > 0 ? a.H / a.H_kv * ((a.T + QUERIES - 1) / QUERIES) : 0;
  int64_t pieces = heads > 0 ? (PIECES + heads - 1) / heads : 1;
  if (pieces > items / BLOCKS_A_PIECE) pieces = items / BLOCKS_A_PIECE;
  if (pieces < 1) pieces = 1;
  const int64_t per_piece = (items + pieces - 1) / pieces;
  const bool direct = kernels.direct && width == a.K && pieces == 1;
  std::optional<Tensor> held;
  float* partial = nullptr;
  if (pieces > 1) {
    held = allocate({heads, pieces, 2, sums}, aoti_torch_dtype_float32(), like);
    partial = static_cast<float*>(held->mutable_data_ptr());
  }
  const int64_t flops = 10 * (a.T < per_piece * QUERIES ? a.T : per_piece * QUERIES) * a.S * a.K;
  torch::stable::parallel_for(0, heads * pieces, grain(flops), [&](int64_t begin, int64_t end) {
    const int64_t work = kernels.backward_scratch(a);
    float* scratch = scratch_of_thread.get(work + 2 * sums);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / pieces, b = head / a.H_kv, h = head % a.H_kv;
      const int64_t first = i % pieces * per_piece, last = first + per_piece < items ? first + per_piece : items;
      if (direct) {
        const auto at = [&](const HeadView& v) { return static_cast<float*>(v.data) + b * v.b + h * v.h; };
        kernels.backward(a, b, h, first, last, at(a.dk), at(a.dv), a.dk.t, scratch);
        const int64_t keys = a.span(b).keys;
        zero_rows(a.dk, b, h, keys, a.S, a.K);
        zero_rows(a.dv, b, h, keys, a.S, a.K);
        continue;
      }
      float* dk_sum = pieces > 1 ? partial + i * 2 * sums : scratch + work;
      kernels.backward(a, b, h, first, last, dk_sum, dk_sum + sums, width, scratch);
      if (pieces == 1) kernels.store_sums(a, b, h, dk_sum, dk_sum + sums, 1, 0);
    }
  });
  if (pieces == 1) return;
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* dk_sum = partial + i * pieces * 2 * sums;
      kernels.store_sums(a, i / a.H_kv, i % a.H_kv, dk_sum, dk_sum + sums, pieces, 2 * sums);
    }
  });
}

std::tuple<Tensor, Tensor> attention_fwd(
    Tensor q_in, Tensor k_in, Tensor v_in, std::optional<Tensor> lengths, double scale, bool save_stats) {
  const Tensor q = inner_dense(q_in), k = inner_dense(k_in), v = inner_dense(v_in);
  AttentionArgs a = args_of(q, k, v, lengths, scale);
  Tensor out = allocate_heads(a.B, a.H, a.T, a.K, q);
  a.out = view_of(out, out.mutable_data_ptr());
  return {out, run_forward(a, q, save_stats)};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    Tensor dout_in, Tensor q_in, Tensor k_in, Tensor v_in, Tensor out_in, Tensor stats, std::optional<Tensor> lengths,
    double scale) {
  const Tensor q = inner_dense(q_in), k = inner_dense(k_in), v = inner_dense(v_in);
  const Tensor dout = inner_dense(dout_in), out = inner_dense(out_in);
  AttentionArgs a = args_of(q, k, v, lengths, scale);
  for (const Tensor* t : {&dout, &out}) {
    STD_TORCH_CHECK(
        t->dim() == 4 && t->size(0) == a.B && t->size(1) == a.H && t->size(2) == a.T && t->size(3) == a.K &&
            dtype_of(*t) == dtype_of(q),
        "dout, out: expected the shape and dtype of q");
  }
  a.dout = input(dout);
  a.out = input(out);
  Tensor dq = allocate_heads(a.B, a.H, a.T, a.K, q), dk = allocate_heads(a.B, a.H_kv, a.S, a.K, q);
  Tensor dv = allocate_heads(a.B, a.H_kv, a.S, a.K, q);
  a.dq = view_of(dq, dq.mutable_data_ptr());
  a.dk = view_of(dk, dk.mutable_data_ptr());
  a.dv = view_of(dv, dv.mutable_data_ptr());
  run_backward(a, stats, q);
  return {dq, dk, dv};
}

// The heads of out [B, T, H * K].
HeadView heads_of(const Tensor& out, const AttentionArgs& a, void* data, const Tensor& like) {
  STD_TORCH_CHECK(
      out.dim() == 3 && out.size(0) == a.B && out.size(1) == a.T && out.size(2) == a.H * a.K &&
          dtype_of(out) == dtype_of(like),
      "dout, out: expected [B, T, H * K] of the dtype of qkv");
  return {data, out.stride(0), a.K, out.stride(1)};
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(Tensor qkv_in, std::optional<Tensor> lengths, double scale, bool save_stats) {
  const Tensor qkv = inner_dense(qkv_in);
  AttentionArgs a = args_of(qkv, lengths, scale);
  Tensor out = allocate({a.B, a.T, a.H * a.K}, dtype_of(qkv), qkv);
  a.out = heads_of(out, a, out.mutable_data_ptr(), qkv);
  return {out, run_forward(a, qkv, save_stats)};
}

Tensor attention_qkv_bwd(
    Tensor dout_in, Tensor qkv_in, Tensor out_in, Tensor stats, std::optional<Tensor> lengths, double scale) {
  const Tensor qkv = inner_dense(qkv_in), dout = inner_dense(dout_in), out = inner_dense(out_in);
  AttentionArgs a = args_of(qkv, lengths, scale);
  a.dout = heads_of(dout, a, const_cast<void*>(dout.const_data_ptr()), qkv);
  a.out = heads_of(out, a, const_cast<void*>(out.const_data_ptr()), qkv);
  Tensor dqkv = allocate({a.B, a.T, 3, a.H, a.K}, dtype_of(qkv), qkv);
  view_qkv(dqkv, dqkv.mutable_data_ptr(), &a.dq, &a.dk, &a.dv);
  run_backward(a, stats, qkv);
  return dqkv;
}

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  using namespace ditscale::cpu;
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("attention_qkv_fwd", TORCH_BOX(&attention_qkv_fwd));
  m.impl("attention_qkv_bwd", TORCH_BOX(&attention_qkv_bwd));
}
