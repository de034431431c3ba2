// x + gate * branch, forward and backward.
#pragma once

#include "adaln_modulation.h"

namespace ditscale::cpu {
namespace {

// out = x + gate * branch; BACKWARD, where x is dout: out = gate * x, and x * branch is added up over tokens.
template <class T, int ROWS, bool BACKWARD, bool STREAM>
DS_INLINE void residual_rows(
    const ResidualArgs& a, int64_t r, int64_t b, int64_t t, const float* gate, float* sums) {
  const int64_t D = a.D;
  T* out = (T*)a.out + r * D;
  const T *x[ROWS], *branch[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    x[i] = row_of<T>(a.x, b, t + i);
    branch[i] = row_of<T>(a.branch, b, t + i);
  }
  for_vectors<LINE<T>>(D, [&](auto v, int64_t d0, int64_t n) {
    constexpr int U = v.count;
    vf s[U]{};
    for (int i = 0; i < ROWS; ++i) {
      for (int u = 0; u < U; ++u) {
        const int64_t d = d0 + u * W;
        const vf value = v.get(x[i] + d, n), other = v.get(branch[i] + d, n), g = v.get(gate + d, n);
        v.template put<STREAM>(out + i * D + d, BACKWARD ? value * g : value + g * other, n);
        if constexpr (BACKWARD) s[u] += value * other;
      }
    }
    for (int u = 0; BACKWARD && u < U; ++u) {
      const int64_t d = d0 + u * W;
      if (sums != nullptr) {
        v.template put<false>(sums + d, v.get(sums + d, n) + s[u], n);
      } else {
        put_modulation(a.dgate, a.modulation, r * D + d, s[u], v.whole, n);
      }
    }
  });
}

template <class T, bool BACKWARD, bool STREAM>
void residual_as(const ResidualArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  Modulation gate{a.gate, a.modulation, a.D, 0.f, scratch};
  for (int64_t r = begin; r < end;) {
    // Without sums to share, row after row: one stream of memory each is what the processor foresees best.
    const int64_t b = r / a.T, t = r % a.T, rows = block_rows(a.T, t, r, end, BACKWARD && !a.per_token);
    const float* g = gate(b, t);
    if (rows == BLOCK) {
      residual_rows<T, BLOCK, BACKWARD, STREAM>(a, r, b, t, g, sums);
    } else {
      residual_rows<T, 1, BACKWARD, STREAM>(a, r, b, t, g, sums);
    }
    r += rows;
  }
  if (STREAM) end_stream();
}

template <class T>
void residual(const ResidualArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.stream) return residual_as<T, false, true>(a, begin, end, nullptr, scratch);
  residual_as<T, false, false>(a, begin, end, nullptr, scratch);
}
template <class T>
void residual_backward(const ResidualArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  if (a.stream) return residual_as<T, true, true>(a, begin, end, sums, scratch);
  residual_as<T, true, false>(a, begin, end, sums, scratch);
}

}  // namespace
}  // namespace ditscale::cpu
