// Backward, without atomics: one kernel makes the gradient of queries (and delta, the sum of out * dout of each row), walking
// over keys; a second makes those of keys and values, walking over the queries of every head that looks at them. Both compute
// the weights again from the statistics.
#pragma once

#include "attention_tiles.h"

namespace ditscale::cuda {
namespace {

// Rows of the tiles that are walked over, and which of a warp's own 16 rows stay in registers: what leaves no spill. Five
// accumulators leave no room for more rows.
template <class T, int W, int BN_, bool HELD_, bool ALL_HELD>
struct BackwardShape {
  static constexpr int ROWS = WARPS * 16, BN = BN_, STRIDE = Tile<T, W>::STRIDE;
  static constexpr bool HELD = HELD_, SECOND_HELD = ALL_HELD, APART = W < 128;
  // Two pairs of tiles, and the two of the block's own rows, which on their way to registers pass through the second pair.
  static constexpr int OWN = (ALL_HELD ? 2 : 4) * BN * STRIDE, BOTH = OWN + 2 * ROWS * STRIDE;
  static constexpr int SHARED = BOTH > 4 * BN * STRIDE ? BOTH : 4 * BN * STRIDE;
};
template <class T, int W>
using QueriesShape = BackwardShape<T, W, sizeof(T) == 2 ? 64 : W < 128 ? 32 : 16, sizeof(T) == 2, sizeof(T) == 2>;
template <class T, int W>
using KeysShape = BackwardShape<T, W, W < 128 && sizeof(T) == 2 ? 32 : 16, sizeof(T) == 2, sizeof(T) == 2 && W < 96>;

// The statistics of the queries of a tile, by kind. They have memory of their own where a block of sm_86, 89 and 120 has so much;
// else each stands behind its query's row, in the chunk that parts rows.
template <class T, int W>
struct QueryStats {
  using F = KeysShape<T, W>;
  using L = Tile<T, W>;
  static constexpr int KINDS = sizeof(T) == 4 ? 3 : 2;  // float32: the sum of weights stands apart from the greatest score
  static constexpr int BYTES = 2 * KINDS * F::BN * static_cast<int>(sizeof(float));
  static constexpr bool BEHIND_ROWS = F::SHARED + BYTES > SMALLEST_LIMIT;
  static_assert(!BEHIND_ROWS || L::CHUNKS % 2 == 0, "a chunk between rows");
  static constexpr int SHARED = F::SHARED + (BEHIND_ROWS ? 0 : BYTES);  // dynamic and not
  char* shared;
  __device__ __forceinline__ float* at(int stage, int kind, int query) const {
    if constexpr (BEHIND_ROWS) {
      return reinterpret_cast<float*>(shared + (stage * 2 * F::BN + query) * L::STRIDE + L::CHUNKS * 16) + kind;
    } else {
      __shared__ float stats[2][KINDS][F::BN];
      return &stats[stage][kind][query];
    }
  }
};

template <class T>
__device__ __forceinline__ float dot_16_bytes(const T* a, const T* b) {
  const Pack<T, LANES<T>> x = fetch<T, LANES<T>>(a), y = fetch<T, LANES<T>>(b);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < LANES<T>; ++i) sum += x[i] * y[i];
  return sum;
}

template <class T, int W>
__global__ void __launch_bounds__(THREADS) attention_dq(AttentionArgs a, int blocks) {
  using F = QueriesShape<T, W>;
  using L = Tile<T, W>;
  constexpr int BN = F::BN;
  char* const shared = dynamic_shared();
  const int64_t h = blockIdx.x / blocks % a.H, b = blockIdx.x / blocks / a.H, h_kv = h / (a.H / a.H_kv);
  const int begin = static_cast<int>(blockIdx.x % blocks) * F::ROWS;
  const Place queries = place_of(a.cu_q, b, a.T), owned = place_of(a.cu_k, b, a.S);
  if (begin >= queries.rows) return;
  const int K = static_cast<int>(a.K), rows = queries.rows - begin, keys = counted(a.lengths, b, owned.rows);
  const int64_t row = queries.first + begin, stats = (a.cu_q == nullptr ? b * a.H + h : h) * a.T + row;
  const T* const k = head_of<const T>(a.k, b, h_kv, owned.first);
  const T* const v = head_of<const T>(a.v, b, h_kv, owned.first);
  const float* const bias =
      a.key_bias == nullptr ? nullptr : a.key_bias + b * a.bias_b + h * a.bias_h + owned.first * a.bias_s;
  const auto fetch_tiles = [&](int start, int stage) {
    char* const to = shared + stage * 2 * BN * L::STRIDE;
    copy_rows<T, W, BN>(to, k + start * a.k.t, a.k.t, keys - start, K);
    copy_rows<T, W, BN>(to + BN * L::STRIDE, v + start * a.v.t, a.v.t, keys - start, K);
  };

  char* const q_tile = shared + F::OWN;
  char* const dout_tile = q_tile + F::ROWS * L::STRIDE;
  const int warp_row = warp_id() * 16;
  const bool busy = warp_row < rows;
  const T* const dout = head_of<const T>(a.dout, b, h, row);
  copy_rows<T, W, F::ROWS>(q_tile, head_of<const T>(a.q, b, h, row), a.q.t, rows, K);
  copy_rows<T, W, F::ROWS>(dout_tile, dout, a.dout.t, rows, K);
  fetch_tiles(0, 0);
  commit_copies();

  // While they come: the four lanes of a row sum every fourth chunk of it, then each other's sums.
  float delta[2], origin[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + half * 8 + lane_id() / 4;
    float sum = 0.f;
    if (r < rows) {
      const T *x = dout + r * a.dout.t, *y = head_of<const T>(a.out, b, h, row + r);
      for (int c = lane_id() % 4 * LANES<T>; c < K; c += 4 * LANES<T>) sum += dot_16_bytes(x + c, y + c);
    }
    delta[half] = quad_sum(sum);
    origin[half] = r < rows ? a.origin[stats + r] : 0.f;
    factor[half] = sizeof(T) == 4 && r < rows ? a.factor[stats + r] : 1.f;
    if (r < rows && lane_id() % 4 == 0) a.delta[stats + r] = delta[half];
  }
  wait_copies<0>();
  __syncthreads();
  Rows<T, W, 1, F::HELD> q, dout_rows;
  q.take(q_tile + warp_row * L::STRIDE);
  dout_rows.take(dout_tile + warp_row * L::STRIDE);

  const Units u = units_of(a);
  float dq[1][W / 8][4];
  clear(dq);
  for (int start = 0, stage = 0; start < keys; start += BN, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    if (start + BN < keys) {
      fetch_tiles(start + BN, stage ^ 1);
      commit_copies();
    }
    if (!busy) continue;
    const char* const k_tile = shared + stage * 2 * BN * L::STRIDE;
    float s[1][BN / 8][4], dp[1][BN / 8][4];
    multiply_rows(s, q, k_tile);
    finish_scores(s, u, bias == nullptr ? nullptr : bias + start * a.bias_s, a.bias_s, keys - start);
    multiply_rows(dp, dout_rows, k_tile + BN * L::STRIDE);
#pragma unroll
    for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float p = exp2_fast(fused(s[0][n][i], u.factor, -origin[i / 2]));
        if (sizeof(T) == 4) p *= factor[i / 2];
        s[0][n][i] = p * (dp[0][n][i] - delta[i / 2]);
      }
    }
    add_weighted<T, W>(dq, s, k_tile);
  }

  __syncthreads();
  if (!busy) return;
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dq[0][n][i] *= a.scale;
  }
  put_rows<T, W, 1>(head_of<T>(a.dq, b, h, row + warp_row), a.dq.t, rows - warp_row, K, dq, shared + warp_row * L::STRIDE);
}

template <class T, int W>
__global__ void __launch_bounds__(THREADS) attention_dkv(AttentionArgs a, int blocks) {
  using F = KeysShape<T, W>;
  using L = Tile<T, W>;
  constexpr int BN = F::BN;
  constexpr bool FACTOR = sizeof(T) == 4;
  static_assert(BN <= THREADS, "a thread for the statistics of each query");
  char* const shared = dynamic_shared();
  const QueryStats<T, W> stats{shared};
  const int64_t h = blockIdx.x / blocks % a.H_kv, b = blockIdx.x / blocks / a.H_kv;
  const int begin = static_cast<int>(blockIdx.x % blocks) * F::ROWS;
  const Place queries = place_of(a.cu_q, b, a.T), owned = place_of(a.cu_k, b, a.S);
  if (begin >= owned.rows) return;
  const int K = static_cast<int>(a.K), group = static_cast<int>(a.H / a.H_kv);
  const int rows = owned.rows - begin, count = counted(a.lengths, b, owned.rows) - begin;
  const int64_t row = owned.first + begin;
  const int tiles = count > 0 && group > 0 ? (queries.rows + BN - 1) / BN : 0;  // of one head
  const auto stats_of = [&](int64_t head) { return (a.cu_q == nullptr ? b * a.H + head : head) * a.T + queries.first; };
  const auto fetch_tiles = [&](int tile, int stage) {
    const int64_t head = h * group + tile / tiles;
    const int start = tile % tiles * BN, left = queries.rows - start;
    char* const to = shared + stage * 2 * BN * L::STRIDE;
    copy_rows<T, W, BN>(to, head_of<const T>(a.q, b, head, queries.first + start), a.q.t, left, K);
    copy_rows<T, W, BN>(to + BN * L::STRIDE, head_of<const T>(a.dout, b, head, queries.first + start), a.dout.t, left, K);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= BN) return;
    const int64_t at = stats_of(head) + start + i;
    // From an origin of infinity the weights of queries that do not exist are zero.
    store_shared(stats.at(stage, 0, i), i < left ? a.origin[at] : INFINITY);
    store_shared(stats.at(stage, 1, i), i < left ? a.delta[at] : 0.f);
    if constexpr (FACTOR) store_shared(stats.at(stage, 2, i), i < left ? a.factor[at] : 0.f);
  };

  char* const k_tile = shared + F::OWN;
  char* const v_tile = k_tile + F::ROWS * L::STRIDE;
  const int warp_row = warp_id() * 16;
  const bool busy = warp_row < count;
  copy_rows<T, W, F::ROWS>(k_tile, head_of<const T>(a.k, b, h, row), a.k.t, count, K);
  copy_rows<T, W, F::ROWS>(v_tile, head_of<const T>(a.v, b, h, row), a.v.t, count, K);
  if (tiles > 0) fetch_tiles(0, 0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  Rows<T, W, 1, F::HELD> k;
  Rows<T, W, 1, F::SECOND_HELD> v;
  k.take(k_tile + warp_row * L::STRIDE);
  v.take(v_tile + warp_row * L::STRIDE);

  const Units u = units_of(a);
  float dk[1][W / 8][4], dv[1][W / 8][4], dbias[2] = {0.f, 0.f}, bias[2] = {0.f, 0.f};
  clear(dk);
  clear(dv);
  for (int tile = 0, stage = 0; tile < tiles * group; ++tile, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < tiles * group) {
      fetch_tiles(tile + 1, stage ^ 1);
      commit_copies();
    }
    if (!busy) continue;
    const int64_t head = h * group + tile / tiles;
    if (a.key_bias != nullptr && tile % tiles == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + half * 8 + lane_id() / 4;
        bias[half] = r < count ? a.key_bias[b * a.bias_b + head * a.bias_h + (row + r) * a.bias_s] * LOG2E : 0.f;
      }
    }
    const char* const q_tile = shared + stage * 2 * BN * L::STRIDE;
    float s[1][BN / 8][4], dp[1][BN / 8][4];
    multiply_rows(s, k, q_tile);
#pragma unroll
    for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = n * 8 + lane_id() % 4 * 2 + i % 2;
        const float score = u.scaled ? fused(s[0][n][i], u.before, bias[i / 2]) : s[0][n][i];
        s[0][n][i] = exp2_fast(fused(score, u.factor, -load_shared(stats.at(stage, 0, query))));
        if constexpr (FACTOR) s[0][n][i] *= load_shared(stats.at(stage, 2, query));
      }
    }
    add_weighted<T, W, F::APART>(dv, s, q_tile + BN * L::STRIDE);
    multiply_rows(dp, v, q_tile + BN * L::STRIDE);
#pragma unroll
    for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = n * 8 + lane_id() % 4 * 2 + i % 2;
        s[0][n][i] *= dp[0][n][i] - load_shared(stats.at(stage, 1, query));
        dbias[i / 2] += s[0][n][i];
      }
    }
    add_weighted<T, W, F::APART>(dk, s, q_tile);
    if (a.dkey_bias != nullptr && tile % tiles == tiles - 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_row + half * 8 + lane_id() / 4;
        const float total = quad_sum(dbias[half]);
        dbias[half] = 0.f;
        if (r < count && lane_id() % 4 == 0) a.dkey_bias[(a.cu_k == nullptr ? b * a.H + head : head) * a.S + row + r] = total;
      }
    }
  }

  __syncthreads();
  // Keys that do not count were zeros to the products, which gave them weights: their gradients are zero.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool counts = warp_row + i / 2 * 8 + lane_id() / 4 < count;
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      dk[0][n][i] = counts ? dk[0][n][i] * a.scale : 0.f;
      dv[0][n][i] = counts ? dv[0][n][i] : 0.f;
    }
  }
  if (warp_row >= rows) return;
  char* const staging = shared + warp_row * L::STRIDE;
  put_rows<T, W, 1>(head_of<T>(a.dk, b, h, row + warp_row), a.dk.t, rows - warp_row, K, dk, staging);
  put_rows<T, W, 1>(head_of<T>(a.dv, b, h, row + warp_row), a.dv.t, rows - warp_row, K, dv, staging);
}

}  // namespace
}  // namespace ditscale::cuda
