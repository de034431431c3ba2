// Packing and multiplying in register tiles.
//
// A tile reads a strip and a panel line by line and keeps its sums in registers; a panel stays in the first cache while all
// strips of a block, which stay in the second, pass by it. What a tile will need next is asked for while it runs: the lines of
// the result that it adds to, and its share of the next panel.
#include "product_tiles.h"
#include "register_tiles.h"

namespace ditscale::cpu {
namespace {

constexpr int COLUMNS = TILE_VECTORS * W, ROWS = tile_rows(TILE_VECTORS);
constexpr int TOGETHER = 4;  // numbers of a lane, and lanes, that are turned at a time

// Four rows of four become four columns. (A compiler's own shuffles have one name in Clang and another in GCC before 12.)
DS_INLINE void turn(v4 (&r)[TOGETHER]) {
#if defined(__AVX2__)
  __m128 a = (__m128)r[0], b = (__m128)r[1], c = (__m128)r[2], d = (__m128)r[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  r[0] = (v4)a;
  r[1] = (v4)b;
  r[2] = (v4)c;
  r[3] = (v4)d;
#else
  for (int i = 0; i < TOGETHER; ++i) {
    for (int j = 0; j < i; ++j) {
      const float other = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = other;
    }
  }
#endif
}

// Lanes side by side in memory: whole lines of G packs at a time, from the pack `done` on; returns the first that is left.
template <int L, int G>
DS_INLINE int64_t pack_rows(Operand from, int64_t done, int64_t packs, int64_t depth, float* to) {
  constexpr int64_t AHEAD = 8;
  for (; done + G <= packs; done += G) {
    const float* row = from.data + done * L;
    float* out = to + done * L * depth;
    for (int64_t k = 0; k < depth; ++k, row += from.step, out += L) {
      for (int i = 0; i < G * L; i += 16) __builtin_prefetch(row + AHEAD * from.step + i);
      each<G>([&](auto g) { __builtin_memcpy(out + g * L * depth, row + g * L, L * sizeof(float)); });
    }
  }
  return done;
}

// Four numbers of each of four lanes, or of two.
DS_INLINE void pack_square(const float* from, int64_t lane, float* to, int L) {
  v4 r[TOGETHER];
  each<TOGETHER>([&](auto i) { r[i] = get_at<v4>(from + i * lane); });
  turn(r);
  each<TOGETHER>([&](auto i) { put_at(to + i * L, r[i]); });
}
DS_INLINE void pack_pair(const float* from, int64_t lane, float* to, int L) {
#if defined(__AVX2__)
  const __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + lane);
  const __m128 low = _mm_unpacklo_ps(a, b), high = _mm_unpackhi_ps(a, b);
  _mm_storel_pi((__m64*)to, low);
  _mm_storeh_pi((__m64*)(to + L), low);
  _mm_storel_pi((__m64*)(to + 2 * L), high);
  _mm_storeh_pi((__m64*)(to + 3 * L), high);
#else
  for (int i = 0; i < TOGETHER; ++i) {
    to[i * L] = from[i];
    to[i * L + 1] = from[lane + i];
  }
#endif
}

// A lane's numbers side by side in memory: a whole line of each lane before the next, for lanes are often so far apart that lines
// of all of them do not fit the first cache together.
template <int L>
DS_INLINE void pack_turned(Operand from, int64_t depth, float* to) {
  static_assert(L % 2 == 0);
  constexpr int LINE = 16, AHEAD = 32;
  int64_t k = 0;
  const auto squares = [&](auto numbers) {
    for (int first = 0; first + TOGETHER <= L; first += TOGETHER) {
      const float* row = from.data + first * from.lane + k;
      if (numbers == LINE) each<TOGETHER>([&](auto i) { __builtin_prefetch(row + i * from.lane + AHEAD); });
      each<numbers / TOGETHER>([&](auto q) {
        pack_square(row + q * TOGETHER, from.lane, to + (k + q * TOGETHER) * L + first, L);
      });
    }
    if constexpr (L % TOGETHER != 0) {
      constexpr int first = L / TOGETHER * TOGETHER;
      const float* row = from.data + first * from.lane + k;
      if (numbers == LINE) each<2>([&](auto i) { __builtin_prefetch(row + i * from.lane + AHEAD); });
      each<numbers / TOGETHER>([&](auto q) {
        pack_pair(row + q * TOGETHER, from.lane, to + (k + q * TOGETHER) * L + first, L);
      });
    }
    k += numbers;
  };
  while (k + LINE <= depth) squares(count_t<LINE>{});
  while (k + TOGETHER <= depth) squares(count_t<TOGETHER>{});
  for (; k < depth; ++k) {
    for (int i = 0; i < L; ++i) to[k * L + i] = from.data[i * from.lane + k];
  }
}

template <int L>
void pack(Operand from, int64_t lanes, int64_t depth, float* to) {
  int64_t done = 0;
  if (from.lane == 1) {
    done = pack_rows<L, L == ROWS ? 16 : PACKED_COLUMNS / L>(from, done, lanes / L, depth, to);
    done = pack_rows<L, 1>(from, done, lanes / L, depth, to);
  }
  for (; done * L < lanes; ++done) {
    const Operand rest{from.data + done * L * from.lane, from.lane, from.step};
    const int64_t here = lanes - done * L < L ? lanes - done * L : L;
    float* out = to + done * L * depth;
    if (here == L && rest.step == 1) {
      pack_turned<L>(rest, depth, out);
      continue;
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < here; ++i) out[k * L + i] = rest.data[i * rest.lane + k * rest.step];
      for (int64_t i = here; i < L; ++i) out[k * L + i] = 0.f;
    }
  }
}

// A whole tile of V vectors, added to what is there unless it is the first.
template <int V>
DS_INLINE void add_tile(
    const float* strip, const float* panel, int64_t depth, const float* bias, bool first, float* out, int64_t step) {
  each<ROWS>([&](auto m) {
    each<(V * W + 15) / 16>([&](auto i) { __builtin_prefetch(out + m * step + 16 * i, 1); });
  });
  Tile<vf, ROWS, V> tile;
  tile.template add_product<ROWS>(strip, 1, ROWS, panel, COLUMNS, depth);
  if (!first) {
    each<ROWS>([&](auto m) { each<V>([&](auto n) { tile.at[m][n] += get_at<vf>(out + m * step + n * W); }); });
  }
  if (bias != nullptr) {
    each<V>([&](auto n) {
      const vf b = get_at<vf>(bias + n * W);
      each<ROWS>([&](auto m) { tile.at[m][n] += b; });
    });
  }
  each<ROWS>([&](auto m) { each<V>([&](auto n) { put_at(out + m * step + n * W, tile.at[m][n]); }); });
}

// The last rows or columns: a whole tile, of which a part is kept.
template <int V>
DS_CALLED void add_part(
    const float* strip, int64_t rows, const float* panel, int64_t columns, int64_t depth, const float* bias, bool first,
    float* out, int64_t step) {
  float whole[ROWS * V * W];
  add_tile<V>(strip, panel, depth, nullptr, true, whole, V * W);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      float* to = out + m * step + n;
      const float sum = whole[m * V * W + n] + (first ? 0.f : *to);
      *to = bias != nullptr ? sum + bias[n] : sum;
    }
  }
}

// All strips by one panel, of which V vectors hold the columns: the last panel may have lanes that are missing.
template <int V>
DS_CALLED void multiply_panel(
    const float* strips, int64_t rows, const float* panel, int64_t columns, int64_t depth, const float* bias, bool first,
    float* out, int64_t step) {
  const int64_t count = (rows + ROWS - 1) / ROWS, lines = (depth * COLUMNS / 16 + count - 1) / count;
  const float* next = panel + COLUMNS * depth;  // behind the last panel nothing is read, only asked for
  for (int64_t m = 0; m < rows; m += ROWS) {
    for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
    if (rows - m >= ROWS && columns == V * W) {
      add_tile<V>(strips + m * depth, panel, depth, bias, first, out + m * step, step);
    } else {
      const int64_t height = rows - m < ROWS ? rows - m : ROWS;
      add_part<V>(strips + m * depth, height, panel, columns, depth, bias, first, out + m * step, step);
    }
  }
}

template <int V = TILE_VECTORS>
DS_INLINE auto panel_of(int64_t columns) {
  if constexpr (V > 1) {
    if (columns <= (V - 1) * W) return panel_of<V - 1>(columns);
  }
  return &multiply_panel<V>;
}

void multiply(
    const float* strips, int64_t rows, const float* panels, int64_t columns, int64_t depth, const float* bias, bool first,
    float* out, int64_t step) {
  for (int64_t n = 0; n < columns; n += COLUMNS) {
    const int64_t width = columns - n < COLUMNS ? columns - n : COLUMNS;
    panel_of(width)(
        strips, rows, panels + n * depth, width, depth, bias == nullptr ? nullptr : bias + n, first, out + n, step);
  }
}

// Few rows, whose time is that of reading the right operand: once, from where it lies. While some of it is worked on, what lies
// ahead is asked for.
constexpr int FEW_ROWS = 4;       // that are worked on together
constexpr int FEW_COLUMNS = 4;    // of a group of dot products
constexpr int64_t DOT = 384 * W;  // numbers of a sum, which is one of W until its end

// M x N dot products: rows of the left operand and columns of the right one, each in one piece.
template <int M, int N>
DS_INLINE void dots(
    const float* x, int64_t x_lane, const float* w, int64_t w_lane, int64_t depth, const float* bias, float* out, int64_t step) {
  constexpr int64_t NEAR = 4096, AHEAD = 512;
  const int64_t ahead = N * w_lane < NEAR ? N * w_lane : AHEAD;  // the next group, or the same columns further on
  float total[M][N] = {};
  for (int64_t from = 0; from < depth; from += DOT) {
    const int64_t to = depth - from < DOT ? depth : from + DOT;
    vf sums[M][N] = {};
    int64_t k = from;
    for (; k + W <= to; k += W) {
      vf right[N];
      each<N>([&](auto n) {
        __builtin_prefetch(w + n * w_lane + k + ahead);
        right[n] = get_at<vf>(w + n * w_lane + k);
      });
      each<M>([&](auto m) {
        const vf left = get_at<vf>(x + m * x_lane + k);
        each<N>([&](auto n) { sums[m][n] += left * right[n]; });
      });
    }
    each<M>([&](auto m) {
      each<N>([&](auto n) {
        float rest = sum(sums[m][n]);
        for (int64_t i = k; i < to; ++i) rest += x[m * x_lane + i] * w[n * w_lane + i];
        total[m][n] += rest;
      });
    });
  }
  each<M>([&](auto m) { each<N>([&](auto n) { out[m * step + n] = total[m][n] + (bias != nullptr ? bias[n] : 0.f); }); });
}

// M rows by V vectors of columns that lie side by side.
template <int M, int V>
DS_INLINE void lines(Operand x, const float* w, int64_t w_step, int64_t depth, bool first, float* out, int64_t step) {
  constexpr int64_t AHEAD = 32;
  vf sums[M][V] = {};
  for (int64_t k = 0; k < depth; ++k, w += w_step) {
    vf right[V];
    each<(V * W + 15) / 16>([&](auto i) { __builtin_prefetch(w + AHEAD * w_step + 16 * i); });
    each<V>([&](auto v) { right[v] = get_at<vf>(w + v * W); });
    each<M>([&](auto m) {
      const float left = x.data[m * x.lane + k * x.step];
      each<V>([&](auto v) { sums[m][v] += right[v] * left; });
    });
  }
  each<M>([&](auto m) {
    each<V>([&](auto v) {
      float* to = out + m * step + v * W;
      put_at(to, first ? sums[m][v] : get_at<vf>(to) + sums[m][v]);
    });
  });
}

// body(count_t<M>, first row) for all rows, M at a time and the rest one by one.
template <int M, class F>
DS_INLINE void for_few(int64_t rows, const F& body) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) body(count_t<M>{}, m);
  for (; m < rows; ++m) body(count_t<1>{}, m);
}

void few_by_dots(Operand x, int64_t rows, Operand w, int64_t columns, int64_t depth, const float* bias, float* out, int64_t step) {
  for_few<FEW_COLUMNS>(columns, [&](auto N, int64_t n) {
    for_few<(W < 16 ? 2 : FEW_ROWS)>(rows, [&](auto M, int64_t m) {
      const float* b = bias == nullptr ? nullptr : bias + n;
      dots<M, N>(x.data + m * x.lane, x.lane, w.data + n * w.lane, w.lane, depth, b, out + m * step + n, step);
    });
  });
}

void few_by_lines(Operand x, int64_t rows, Operand w, int64_t columns, int64_t depth, const float* bias, float* out, int64_t step) {
  constexpr int64_t PIECE = 32;  // numbers of a sum: PyTorch adds up few rows in lanes, which errs less than one long sum
  for (int64_t k = 0; k < depth; k += PIECE) {
    const int64_t piece = depth - k < PIECE ? depth - k : PIECE;
    int64_t n = 0;
    const auto panel = [&](auto V) {
      for_few<FEW_ROWS>(rows, [&](auto M, int64_t m) {
        const Operand from{x.data + m * x.lane + k * x.step, x.lane, x.step};
        lines<M, V>(from, w.data + n + k * w.step, w.step, piece, k == 0, out + m * step + n, step);
      });
      n += V * W;
    };
    while (n + COLUMNS <= columns) panel(count_t<TILE_VECTORS>{});
    while (n + W <= columns) panel(count_t<1>{});
    for (; n < columns; ++n) {
      for (int64_t m = 0; m < rows; ++m) {
        float total = 0.f;
        for (int64_t i = k; i < k + piece; ++i) total += x.data[m * x.lane + i * x.step] * w.data[n + i * w.step];
        out[m * step + n] = k == 0 ? total : out[m * step + n] + total;
      }
    }
  }
  for (int64_t m = 0; bias != nullptr && m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) out[m * step + n] += bias[n];
  }
}

constexpr ProductKernels product_kernels() {
  return {ROWS, COLUMNS, pack<ROWS>, pack<COLUMNS>, multiply, few_by_dots, few_by_lines};
}

}  // namespace
}  // namespace ditscale::cpu
