// Forward: a block has 64 MT queries of a head and walks over its keys, which arrive one tile ahead of the arithmetic.
#pragma once

#include "attention_tiles.h"

namespace ditscale::cuda {
namespace {

// Fragments of 16 queries a warp (MT), keys a tile (BN), and whether queries stay in registers: what leaves no spill.
template <class T, int W>
struct ForwardShape {
  static constexpr int MT = sizeof(T) == 2 ? 2 : 1;
  static constexpr int BN = sizeof(T) == 2 && W <= 64 ? 64 : 32;
  static constexpr bool HELD = sizeof(T) == 2 && W <= 80;
  static constexpr int ROWS = WARPS * 16 * MT;
  // Two tiles each of keys and values; queries that go to registers pass through the second pair.
  static constexpr int SHARED = (HELD ? (ROWS > 2 * BN ? 2 * BN + ROWS : 4 * BN) : 4 * BN + ROWS) * Tile<T, W>::STRIDE;
};

template <class T, int W>
__global__ void __launch_bounds__(THREADS) attention_forward(AttentionArgs a, int blocks) {
  using F = ForwardShape<T, W>;
  using L = Tile<T, W>;
  constexpr int MT = F::MT, BN = F::BN;
  char* const shared = dynamic_shared();
  const int64_t h = blockIdx.x / blocks % a.H, b = blockIdx.x / blocks / a.H, h_kv = h / (a.H / a.H_kv);
  const int begin = static_cast<int>(blockIdx.x % blocks) * F::ROWS;
  const Place queries = place_of(a.cu_q, b, a.T), owned = place_of(a.cu_k, b, a.S);
  if (begin >= queries.rows) return;
  const int K = static_cast<int>(a.K), rows = queries.rows - begin, keys = counted(a.lengths, b, owned.rows);
  const int64_t row = queries.first + begin;
  const T* const k = head_of<const T>(a.k, b, h_kv, owned.first);
  const T* const v = head_of<const T>(a.v, b, h_kv, owned.first);
  const float* const bias =
      a.key_bias == nullptr ? nullptr : a.key_bias + b * a.bias_b + h * a.bias_h + owned.first * a.bias_s;
  const auto fetch_tiles = [&](int start, int stage) {
    char* const to = shared + stage * 2 * BN * L::STRIDE;
    copy_rows<T, W, BN>(to, k + start * a.k.t, a.k.t, keys - start, K);
    copy_rows<T, W, BN>(to + BN * L::STRIDE, v + start * a.v.t, a.v.t, keys - start, K);
  };

  char* const q_tile = shared + (F::HELD ? 2 : 4) * BN * L::STRIDE;
  const int warp_row = warp_id() * 16 * MT;
  const bool busy = warp_row < rows;
  copy_rows<T, W, F::ROWS>(q_tile, head_of<const T>(a.q, b, h, row), a.q.t, rows, K);
  fetch_tiles(0, 0);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  Rows<T, W, MT, F::HELD> q;
  q.take(q_tile + warp_row * L::STRIDE);

  const Units u = units_of(a);
  float o[MT][W / 8][4], top[MT][2], sum[MT][2];
  clear(o);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    top[m][0] = top[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.f;
  }
  for (int start = 0, stage = 0; start < keys; start += BN, stage ^= 1) {
    wait_copies<0>();
    __syncthreads();  // this tile is there, and nobody reads the other one any more
    if (start + BN < keys) {
      fetch_tiles(start + BN, stage ^ 1);
      commit_copies();
    }
    if (!busy) continue;
    const char* const k_tile = shared + stage * 2 * BN * L::STRIDE;
    float s[MT][BN / 8][4];
    multiply_rows(s, q, k_tile);
    finish_scores(s, u, bias == nullptr ? nullptr : bias + start * a.bias_s, a.bias_s, keys - start);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < BN / 8; ++n) most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        // Kept as rounded after the factor: what earlier weights were measured from is what they are brought over from.
        most = fmaxf(top[m][half], quad_max(most) * u.factor);
        // A row that has met no key with a weight measures from zero: its weights are 2^-infinity.
        const float origin = most == -INFINITY ? 0.f : most;
        const float shrink = exp2_fast(top[m][half] - origin);
        top[m][half] = most;
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_fast(fused(s[m][n][i], u.factor, -origin));
            total += s[m][n][i];
          }
        }
        sum[m][half] = sum[m][half] * shrink + total;
#pragma unroll
        for (int n = 0; n < W / 8; ++n) {
          o[m][n][2 * half] *= shrink;
          o[m][n][2 * half + 1] *= shrink;
        }
      }
    }
    add_weighted<T, W>(o, s, k_tile + BN * L::STRIDE);
  }

  __syncthreads();  // the tiles become the staging area of the output
  if (!busy) return;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[m][half]);
      const float factor = total == 0.f ? 0.f : 1.f / total;  // no key with a weight: zeros
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        o[m][n][2 * half] *= factor;
        o[m][n][2 * half + 1] *= factor;
      }
      const int r = warp_row + m * 16 + half * 8 + lane_id() / 4;
      if (a.origin != nullptr && lane_id() % 4 == 0 && r < rows) {
        const int64_t at = (a.cu_q == nullptr ? b * a.H + h : h) * a.T + row + r;
        // float32 keeps the sum apart from the greatest score: their logarithm has fewer digits than both.
        a.origin[at] = total == 0.f ? 0.f : sizeof(T) == 4 ? top[m][half] : top[m][half] + log2_fast(total);
        a.factor[at] = total == 0.f ? 0.f : sizeof(T) == 4 ? factor : 1.f;
      }
    }
  }
  put_rows<T, W, MT>(
      head_of<T>(a.out, b, h, row + warp_row), a.out.t, rows - warp_row, K, o, shared + warp_row * L::STRIDE);
}

}  // namespace
}  // namespace ditscale::cuda
