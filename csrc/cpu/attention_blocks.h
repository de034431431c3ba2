// The attention kernels of each instruction set as plain functions, and what a call of them is made of.
#pragma once

#include "../common/adaln_args.h"
#include "../common/rotary_args.h"

namespace ditscale::cpu {

// One sequence of queries and its keys, as positions along T and S of sample b. `owned` keys belong to it, the first `keys` of
// them count.
struct Span {
  int64_t b, first_query, queries, first_key, keys, owned;
};

struct AttentionArgs {
  int64_t B, H, H_kv, T, S, K;     // H queries' heads share H_kv keys' heads, H / H_kv each
  int64_t sequences, most_queries, most_keys;  // sequences: B, or those packed into the one sample
  float scale;
  HeadView q, k, v, out;
  float *row_origin, *row_weight;  // [B, H, T]: what the scores of a row are measured from, and 1 / sum of weights; or null
  const float* key_bias;           // added to the scores of a key; null: nothing
  int64_t bias_b, bias_h, bias_s;
  const int32_t* lengths;          // [B]: keys that count; null: all
  const int32_t *cu_q, *cu_k;      // [sequences + 1]; null: not packed
  HeadView dout, dq, dk, dv;       // backward only

  Span span(int64_t n) const {
    if (cu_q != nullptr) {
      const int64_t keys = cu_k[n + 1] - cu_k[n];
      return {0, cu_q[n], cu_q[n + 1] - cu_q[n], cu_k[n], keys, keys};
    }
    return {n, 0, T, 0, lengths == nullptr ? S : lengths[n], S};
  }
};

constexpr int64_t QUERIES = 64;    // of a block: as many lanes as the widest vectors have in four registers
constexpr int64_t KEYS = 64;       // of a block: scores and their gradients of a block, 32 KiB, stay in the level-1 cache

// Rows of float32.
struct Rows {
  float* data;
  int64_t step;
};

// The head that the same thread turns to next, whose rows it can call for early; none where n < 0. `other`: of another sequence.
struct Next {
  int64_t n, h;
  bool other;
};

struct AttentionKernels {
  int64_t (*forward_scratch)(const AttentionArgs&);   // floats
  int64_t (*backward_scratch)(const AttentionArgs&);
  // The output rows of the query blocks [begin, end) of one head of one sequence.
  void (*forward)(const AttentionArgs&, int64_t n, int64_t h, int64_t begin, int64_t end, Next, float* scratch);
  // The query blocks [begin, end) of one sequence and one head of keys, counted over its heads of queries, most_queries each:
  // writes their dq, and their sums for the keys that count into dk_sum and dv_sum, row_width(K) numbers each. Adds the
  // gradients of the biases to bias_sum, a row for each of these heads, S numbers apart, null where nobody asks.
  void (*backward)(
      const AttentionArgs&, int64_t n, int64_t h_kv, int64_t begin, int64_t end, Rows dk_sum, Rows dv_sum, float* bias_sum,
      Next, float* scratch);
  // dk and dv of one head, all keys that the sequence owns, from `chunks` such sums with dense rows, `step` floats apart.
  void (*store_sums)(
      const AttentionArgs&, int64_t n, int64_t h_kv, const float* dk_sum, const float* dv_sum, int64_t chunks, int64_t step);
  int64_t (*row_width)(int64_t K);
  bool direct;                     // storage is float32: where K is a whole row_width, sums can be made in the gradient itself
};

struct AttentionTable {
  AttentionKernels by_storage[3];
};

extern const AttentionTable attention_portable;
#if defined(__x86_64__)
extern const AttentionTable attention_avx2;
extern const AttentionTable attention_avx512;
#endif

}  // namespace ditscale::cpu
