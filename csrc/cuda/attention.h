// What the attention kernels take, as plain data, and their launchers. Meaning of every field: kernels/attn/shapes.py;
// mathematics and tiling: docs/attention.md.
#pragma once

#include "../common/adaln_args.h"

namespace ditscale::cuda {

// A [B, H, T, K] view with dense rows: elements from sample to sample (0 in a packed batch), head to head, row to row. The
// data, the distances and K are multiples of 16 bytes.
struct Heads {
  void* data;
  int64_t b, h, t;
};

struct AttentionArgs {
  int64_t samples, H, H_kv, T, S, K;  // samples: the batch, or the sequences of a packed one
  int64_t max_q, max_k;               // longest sequences, for the grid
  Heads q, k, v, out, dout, dq, dk, dv;
  const float* key_bias;              // null: none
  int64_t bias_b, bias_h, bias_s;
  float* dkey_bias;                   // [B, H, S], null where not asked for
  float *origin, *factor, *delta;     // [B, H, T] each; origin null where statistics are not kept
  const int32_t *lengths, *cu_q, *cu_k;
  float scale;
};

constexpr int64_t WIDEST_HEAD = 128;
constexpr int64_t FEWEST_ROWS = 64;  // of a block

// Each returns null, or what the launch failed with. Backward: the gradient of queries and delta, then that of keys and values.
const char* launch_attention_forward(const AttentionArgs& a, Storage storage, void* stream);
const char* launch_attention_backward(const AttentionArgs& a, Storage storage, void* stream);

// The kernels of one storage, each compiled in a unit of its own.
template <class T>
struct AttentionOf {
  static void forward(const AttentionArgs& a, void* stream);
  static void backward(const AttentionArgs& a, void* stream);
};

}  // namespace ditscale::cuda
