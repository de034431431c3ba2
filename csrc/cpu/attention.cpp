// Attention on the CPU: checks, allocation and the split over threads; the arithmetic is in attention_blocks.inl.
#include "attention_blocks.h"
#include "isa.h"
#include "scratch.h"

namespace ditscale::cpu {
namespace {

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

// What a call has besides its tensors of numbers.
struct Options {
  const std::optional<Tensor>&key_bias, &lengths, &cu_q, &cu_k;
  double scale;
};

const int32_t* integers(const std::optional<Tensor>& t, int64_t count, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(
      t->dim() == 1 && (count < 0 ? t->size(0) > 0 : t->size(0) == count) && t->scalar_type() == ScalarType::Int &&
          t->is_contiguous(),
      name, ": expected int32, contiguous, one a sample (of packed sequences one more than there are)");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

// The longest sequence; the ends must rise from 0 to at most `rows`.
int64_t longest(const int32_t* cu, int64_t sequences, int64_t rows, const char* name) {
  int64_t most = 0;
  bool right = cu[0] == 0 && cu[sequences] <= rows;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = int64_t{cu[i + 1]} - cu[i];
    right = right && length >= 0;
    if (length > most) most = length;
  }
  STD_TORCH_CHECK(right, name, ": expected positions that start at 0 and never fall, at most ", rows);
  return most;
}

// Everything that does not depend on how q, k and v lie in memory.
void set_options(AttentionArgs& a, const Options& o) {
  a.scale = static_cast<float>(o.scale);
  a.sequences = a.B;
  a.most_queries = a.T;
  a.most_keys = a.S;
  if (o.key_bias.has_value()) {
    const Tensor& bias = *o.key_bias;
    STD_TORCH_CHECK(
        bias.dim() == 3 && bias.size(0) == a.B && bias.size(1) == a.H && bias.size(2) == a.S &&
            bias.scalar_type() == ScalarType::Float,
        "key_bias: expected [B, H, S] float32");
    a.key_bias = static_cast<const float*>(bias.const_data_ptr());
    a.bias_b = bias.stride(0);
    a.bias_h = bias.stride(1);
    a.bias_s = bias.stride(2);
  }
  a.lengths = integers(o.lengths, a.B, "lengths");
  for (int64_t b = 0; a.lengths != nullptr && b < a.B; ++b) {
    STD_TORCH_CHECK(a.lengths[b] >= 0 && a.lengths[b] <= a.S, "lengths: expected 0 to ", a.S, ", got ", a.lengths[b]);
  }
  a.cu_q = integers(o.cu_q, -1, "cu_q");
  if (a.cu_q == nullptr) return;
  STD_TORCH_CHECK(a.B == 1 && a.lengths == nullptr, "cu_q: expected one sample of packed sequences, and no lengths");
  a.sequences = o.cu_q->size(0) - 1;
  a.cu_k = integers(o.cu_k, a.sequences + 1, "cu_k");
  STD_TORCH_CHECK(a.cu_k != nullptr, "cu_k: expected together with cu_q");
  a.most_queries = longest(a.cu_q, a.sequences, a.T, "cu_q");
  a.most_keys = longest(a.cu_k, a.sequences, a.S, "cu_k");
}

AttentionArgs args_of(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
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
  STD_TORCH_CHECK(a.H_kv > 0 ? a.H > 0 && a.H % a.H_kv == 0 : a.H == 0, "k: expected a number of heads that divides that of q");
  a.q = input(q);
  a.k = input(k);
  a.v = input(v);
  set_options(a, options);
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

AttentionArgs args_of(const Tensor& qkv, const Options& options) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected [B, T, 3, H, K]");
  AttentionArgs a{};
  a.B = qkv.size(0);
  a.T = a.S = qkv.size(1);
  a.H = a.H_kv = qkv.size(3);
  a.K = qkv.size(4);
  view_qkv(qkv, const_cast<void*>(qkv.const_data_ptr()), &a.q, &a.k, &a.v);
  set_options(a, options);
  return a;
}

void point_stats(AttentionArgs& a, const Tensor& stats) {
  const int64_t rows = a.B * a.H * a.T;
  STD_TORCH_CHECK(stats.numel() == 2 * rows && stats.is_contiguous(), "stats: expected [2, B, H, T], contiguous");
  a.row_origin = static_cast<float*>(stats.mutable_data_ptr());
  a.row_weight = a.row_origin + rows;
}

// The head behind `head`, of `heads` a sequence, where the thread has more to do.
Next after(int64_t head, int64_t heads, bool more) {
  if (!more) return {-1, 0, false};
  return {(head + 1) / heads, (head + 1) % heads, (head + 1) % heads == 0};
}

// Zeroes the rows [begin, end) of every head of a sample: those that belong to no sequence, and no key counts for.
void zero_rows(const HeadView& view, int64_t b, int64_t heads, int64_t begin, int64_t end, size_t row_bytes, size_t size) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = begin; t < end; ++t) {
      std::memset(static_cast<char*>(view.data) + (b * view.b + h * view.h + t * view.t) * size, 0, row_bytes);
    }
  }
}

// Fills what a.out sees; returns the statistics.
Tensor run_forward(AttentionArgs& a, const Tensor& like, bool save_stats) {
  const AttentionKernels& kernels = DS_BY_ISA(attention).by_storage[static_cast<int>(storage_of(like, "q"))];
  Tensor stats = save_stats ? allocate({2, a.B, a.H, a.T}, aoti_torch_dtype_float32(), like)
                            : allocate({0}, aoti_torch_dtype_float32(), like);
  if (save_stats) point_stats(a, stats);
  const int64_t blocks = (a.most_queries + QUERIES - 1) / QUERIES, rows = a.most_queries < QUERIES ? a.most_queries : QUERIES;
  torch::stable::parallel_for(
      0, a.sequences * a.H * blocks, grain(4 * rows * a.most_keys * a.K), [&](int64_t begin, int64_t end) {
        float* scratch = scratch_of_thread.get(kernels.forward_scratch(a));
        for (int64_t i = begin; i < end;) {  // head by head
          const int64_t head = i / blocks, first = i - head * blocks, left = end - head * blocks;
          const int64_t last = left < blocks ? left : blocks;
          kernels.forward(a, head / a.H, head % a.H, first, last, after(head, a.H, left > blocks), scratch);
          i = head * blocks + last;
        }
      });
  if (a.cu_q != nullptr) {
    const int64_t last = a.cu_q[a.sequences], size = static_cast<int64_t>(like.element_size());
    zero_rows(a.out, 0, a.H, last, a.T, size * a.K, size);
    for (int64_t row = 0; save_stats && row < 2 * a.H; ++row) {
      std::memset(a.row_origin + row * a.T + last, 0, sizeof(float) * (a.T - last));
    }
  }
  return stats;
}

// Fills what a.dq, a.dk and a.dv see, and returns the gradient of the biases. The cut into pieces follows from the shape, never
// from the number of threads.
Tensor run_backward(AttentionArgs& a, const Tensor& stats, const Tensor& like, bool bias_grad) {
  const Storage storage = storage_of(like, "q");
  const AttentionKernels& kernels = DS_BY_ISA(attention).by_storage[static_cast<int>(storage)];
  point_stats(a, stats);
  const int64_t heads = a.sequences * a.H_kv, width = kernels.row_width(a.K), sums = a.most_keys * width;
  const int64_t group = a.H_kv > 0 ? a.H / a.H_kv : 0, items = group * ((a.most_queries + QUERIES - 1) / QUERIES);
  int64_t pieces = heads > 0 ? (PIECES + heads - 1) / heads : 1;
  if (pieces > items / BLOCKS_A_PIECE) pieces = items / BLOCKS_A_PIECE;
  if (pieces < 1) pieces = 1;
  const int64_t per_piece = (items + pieces - 1) / pieces;
  // One block of queries makes the sums at once, so they can be made where they are wanted; several would add to rows that lie
  // a page apart.
  const bool direct = kernels.direct && width == a.K && items == 1;
  const size_t size = like.element_size(), row_bytes = size * static_cast<size_t>(a.K);
  std::optional<Tensor> held, held_bias;
  float *partial = nullptr, *bias_sums = nullptr;
  if (pieces > 1) {
    held = allocate({heads, pieces, 2, sums}, aoti_torch_dtype_float32(), like);
    partial = static_cast<float*>(held->mutable_data_ptr());
  }
  Tensor dbias = bias_grad ? allocate({a.B, a.H, a.S}, aoti_torch_dtype_float32(), like)
                           : allocate({0}, aoti_torch_dtype_float32(), like);
  if (bias_grad) {
    STD_TORCH_CHECK(a.scale != 0.f, "scale: expected another number than 0 for gradients of key_bias");
    // Packed sequences share rows of all keys: each has some to itself.
    held_bias = allocate({a.B * a.H_kv, pieces, group, a.S}, aoti_torch_dtype_float32(), like);
    bias_sums = static_cast<float*>(held_bias->mutable_data_ptr());
    std::memset(bias_sums, 0, sizeof(float) * static_cast<size_t>(held_bias->numel()));
  }
  const auto bias_rows = [&](int64_t n, int64_t h, int64_t piece) {
    const Span span = a.span(n);
    return bias_sums + ((span.b * a.H_kv + h) * pieces + piece) * group * a.S + span.first_key;
  };
  const int64_t flops =
      10 * (a.most_queries < per_piece * QUERIES ? a.most_queries : per_piece * QUERIES) * a.most_keys * a.K;
  torch::stable::parallel_for(0, heads * pieces, grain(flops), [&](int64_t begin, int64_t end) {
    const int64_t work = (kernels.backward_scratch(a) + Scratch::LINE - 1) / Scratch::LINE * Scratch::LINE;
    float* scratch = scratch_of_thread.get(work + (pieces > 1 || direct ? 0 : 2 * sums));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / pieces, n = head / a.H_kv, h = head % a.H_kv;
      const int64_t first = i % pieces * per_piece, last = first + per_piece < items ? first + per_piece : items;
      float* bias_sum = bias_grad ? bias_rows(n, h, i % pieces) : nullptr;
      const bool more = i + 1 < end && (i + 1) % pieces == 0;
      Next next = after(head, a.H_kv, more);
      next.h *= group;
      if (direct) {
        const Span span = a.span(n);
        const auto at = [&](const HeadView& v) -> Rows {
          return {static_cast<float*>(v.data) + span.b * v.b + h * v.h + span.first_key * v.t, v.t};
        };
        kernels.backward(a, n, h, first, last, at(a.dk), at(a.dv), bias_sum, next, scratch);
        for (HeadView v : {a.dk, a.dv}) {
          v.data = static_cast<float*>(v.data) + h * v.h;
          zero_rows(v, span.b, 1, span.first_key + span.keys, span.first_key + span.owned, row_bytes, size);
        }
        continue;
      }
      float* dk_sum = pieces > 1 ? partial + i * 2 * sums : scratch + work;
      kernels.backward(a, n, h, first, last, {dk_sum, width}, {dk_sum + sums, width}, bias_sum, next, scratch);
      if (pieces == 1) kernels.store_sums(a, n, h, dk_sum, dk_sum + sums, 1, 0);
    }
  });
  if (pieces > 1) {
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* dk_sum = partial + i * pieces * 2 * sums;
        kernels.store_sums(a, i / a.H_kv, i % a.H_kv, dk_sum, dk_sum + sums, pieces, 2 * sums);
      }
    });
  }
  if (a.cu_q != nullptr) {
    zero_rows(a.dq, 0, a.H, a.cu_q[a.sequences], a.T, row_bytes, size);
    for (const HeadView* v : {&a.dk, &a.dv}) zero_rows(*v, 0, a.H_kv, a.cu_k[a.sequences], a.S, row_bytes, size);
  }
  if (bias_grad) {
    float* to = static_cast<float*>(dbias.mutable_data_ptr());
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(dbias.numel()));
    for (int64_t head = 0; head < heads; ++head) {
      const Span span = a.span(head / a.H_kv);
      for (int64_t g = 0; g < group; ++g) {
        float* row = to + (span.b * a.H + head % a.H_kv * group + g) * a.S + span.first_key;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const float* from = bias_rows(head / a.H_kv, head % a.H_kv, piece) + g * a.S;
          for (int64_t s = 0; s < span.keys; ++s) row[s] += from[s];
        }
      }
    }
  }
  return dbias;
}

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention_fwd(
    Tensor q_in, Tensor k_in, Tensor v_in, Optional key_bias, Optional lengths, Optional cu_q, Optional cu_k, int64_t, int64_t,
    double scale, bool save_stats) {
  const Tensor q = inner_dense(q_in), k = inner_dense(k_in), v = inner_dense(v_in);
  AttentionArgs a = args_of(q, k, v, {key_bias, lengths, cu_q, cu_k, scale});
  Tensor out = allocate_heads(a.B, a.H, a.T, a.K, q);
  a.out = view_of(out, out.mutable_data_ptr());
  return {out, run_forward(a, q, save_stats)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor dout_in, Tensor q_in, Tensor k_in, Tensor v_in, Tensor out_in, Tensor stats, Optional key_bias, Optional lengths,
    Optional cu_q, Optional cu_k, int64_t, int64_t, double scale, bool bias_grad) {
  const Tensor q = inner_dense(q_in), k = inner_dense(k_in), v = inner_dense(v_in);
  const Tensor dout = inner_dense(dout_in), out = inner_dense(out_in);
  AttentionArgs a = args_of(q, k, v, {key_bias, lengths, cu_q, cu_k, scale});
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
  return {dq, dk, dv, run_backward(a, stats, q, bias_grad)};
}

// The heads of out [B, T, H * K].
HeadView heads_of(const Tensor& out, const AttentionArgs& a, void* data, const Tensor& like) {
  STD_TORCH_CHECK(
      out.dim() == 3 && out.size(0) == a.B && out.size(1) == a.T && out.size(2) == a.H * a.K &&
          dtype_of(out) == dtype_of(like),
      "dout, out: expected [B, T, H * K] of the dtype of qkv");
  return {data, out.stride(0), a.K, out.stride(1)};
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(
    Tensor qkv_in, Optional key_bias, Optional lengths, Optional cu, int64_t, double scale, bool save_stats) {
  const Tensor qkv = inner_dense(qkv_in);
  AttentionArgs a = args_of(qkv, {key_bias, lengths, cu, cu, scale});
  Tensor out = allocate({a.B, a.T, a.H * a.K}, dtype_of(qkv), qkv);
  a.out = heads_of(out, a, out.mutable_data_ptr(), qkv);
  return {out, run_forward(a, qkv, save_stats)};
}

std::tuple<Tensor, Tensor> attention_qkv_bwd(
    Tensor dout_in, Tensor qkv_in, Tensor out_in, Tensor stats, Optional key_bias, Optional lengths, Optional cu, int64_t,
    double scale, bool bias_grad) {
  const Tensor qkv = inner_dense(qkv_in), dout = inner_dense(dout_in), out = inner_dense(out_in);
  AttentionArgs a = args_of(qkv, {key_bias, lengths, cu, cu, scale});
  a.dout = heads_of(dout, a, const_cast<void*>(dout.const_data_ptr()), qkv);
  a.out = heads_of(out, a, const_cast<void*>(out.const_data_ptr()), qkv);
  Tensor dqkv = allocate({a.B, a.T, 3, a.H, a.K}, dtype_of(qkv), qkv);
  view_qkv(dqkv, dqkv.mutable_data_ptr(), &a.dq, &a.dk, &a.dv);
  return {dqkv, run_backward(a, stats, qkv, bias_grad)};
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
