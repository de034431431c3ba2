// Products of matrices in tiles of registers.
#pragma once

#include "lanes.h"

namespace ditscale::cpu {
namespace {

// Rows of a register tile beside N vectors: enough independent sums to hide the latency of a multiply-add, and so many for
// every load that the loads do not hold it up.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors > 3 ? 6 : vectors > 1 ? 8 : 16;
#elif defined(__AVX2__)
  return vectors == 2 ? 6 : 8;
#else
  return vectors == 2 ? 4 : 8;
#endif
}
#if defined(__AVX512F__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

// body(count_t<height>, ...) `times` times, for tiles of one height under each other.
template <int M, int N, class F>
DS_INLINE int64_t for_height(int height, int64_t times, int64_t row, int64_t v, const F& body) {
  if constexpr (M > 1) {
    if (height < M) return for_height<M - 1, N>(height, times, row, v, body);
  }
  for (; times > 0; --times, row += M) body(count_t<M>{}, count_t<N>{}, row, v);
  return row;
}
template <int M, int N, class F>
DS_INLINE void for_rest(int64_t m, int64_t rows, int64_t v, const F& body) {
  if constexpr (M > 0) {
    for (; m + M <= rows; m += M) body(count_t<M>{}, count_t<N>{}, m, v);
    for_rest<M / 2, N>(m, rows, v, body);
  }
}

// Cuts rows x vectors into register tiles: body(count_t<M>, count_t<N>, first row, first vector).
template <int N, class F>
DS_INLINE void for_tiles(int64_t rows, int64_t first, int64_t vectors, const F& body) {
  if constexpr (N > 0) {
    constexpr int M = tile_rows(N);
    int64_t v = first;
    for (; v + N <= vectors; v += N) {
      if constexpr (N == TILE_VECTORS) {
        // Of nearly one height: a last tile of a row or two would cost as much as a whole one.
        const int64_t tiles = (rows + M - 1) / M, low = tiles > 0 ? rows / tiles : 0, higher = rows - low * tiles;
        const int64_t row = for_height<M, N>((int)low + 1, higher, 0, v, body);
        for_height<M, N>((int)low, tiles - higher, row, v, body);
      } else {
        for_rest<M, N>(0, rows, v, body);
      }
    }
    for_tiles<N - 1>(rows, v, vectors, body);
  }
}

// M rows of N vectors, in registers.
template <class V, int M, int N>
struct Tile {
  V at[M][N];

  DS_INLINE Tile() {
    each<M>([&](auto m) { each<N>([&](auto n) { at[m][n] = V{}; }); });
  }

  // at[m][n] += sum over r < R of a[m * am + r * ar] * b[r * br + n], n counted in vectors. AR: ar where it is known.
  template <int AR>
  DS_INLINE void add_product(const float* a, int64_t am, int64_t ar, const float* b, int64_t br, int64_t R) {
    if (AR) ar = AR;
    // A multiply-add starts every half cycle; of short loops the branch and the counters would take their places.
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
      V x[N];
      each<N>([&](auto n) { x[n] = get_at<V>(b + n * lanes_of<V>); });
      each<M>([&](auto m) {
        const float y = a[m * am];
        each<N>([&](auto n) { at[m][n] += x[n] * y; });
      });
      a += ar;
      b += br;
    }
  }
};

}  // namespace
}  // namespace ditscale::cpu
