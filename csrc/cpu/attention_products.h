// What attention multiplies, a block of queries and one of keys at a time.
//
// Lanes are queries. Scores are held transposed, [key, query], so that maxima, sums and exponentials of a row never cross
// lanes, a head width of 72 costs 72 and keys and values are read as single numbers from wherever they are stored.
#pragma once

#include "attention_blocks.h"
#include "attention_rows.h"
#include "register_tiles.h"

namespace ditscale::cpu {
namespace {

// 2^x for x <= 0, relative error below 1e-7; 0 for -infinity and where the result is below the smallest normal number
// (AVX-512: gradual underflow). NaN stays NaN. The polynomial is the minimax one of 2^r on [-1/2, 1/2] with p(0) = 1.
DS_INLINE vf exp2_of(vf x) {
#if defined(__AVX512F__)
  // What is left after rounding to the nearest integer; of an infinity nothing.
  const vf r = (vf)_mm512_maskz_reduce_ps(ALL, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf k = x - r;
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = greater(splat(-127.f), x);
  const vf shifted = x + magic, k = shifted - magic, r = x - k;
#endif
  vf p = splat(1.5353362e-4f);
  p = p * r + splat(1.3398875e-3f);
  p = p * r + splat(9.6184369e-3f);
  p = p * r + splat(5.5503324e-2f);
  p = p * r + splat(2.4022648e-1f);
  p = p * r + splat(6.9314718e-1f);
  p = p * r + splat(1.f);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(ALL, (__m512)p, (__m512)k);
#else
  // Multiplied, not added to the exponent: integer arithmetic on a NaN could make a number of it.
  return p * (vf)(((vi)shifted - (vi)magic + 127) << 23);
#endif
}

constexpr float LOG2_E = 1.44269504088896341f;

// The exponent of two that is left of a score, measured from the greatest of its row. The difference is taken first: it is exact
// where it matters, and neither a score of 1e9 nor a bias of the least float32, as masks have it, overflows or drowns in the
// rounding of a product.
DS_INLINE vf exponent(vf score, vf from) {
  return (score - from) * splat(LOG2_E);
}

// Rows that the next head will read, brought near while this one's arithmetic runs: some with every register tile.
struct Ahead {
  struct Part {
    const char* at;
    int64_t step, rows;
  } part[5];
  int parts = 0;
  int64_t row_bytes = 0, share = 0, total = 0;

  DS_INLINE void add(const void* at, int64_t step, int64_t rows) {
    if (rows <= 0) return;
    part[parts++] = {(const char*)at, step, rows};
    total += rows;
  }
  DS_INLINE void some() {
    for (int64_t i = 0; i < share && parts > 0; ++i) {
      Part& p = part[parts - 1];
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(p.at + byte, 0, 2);
      p.at += p.step;
      if (--p.rows == 0) --parts;
    }
  }
};

template <int M, int N>
DS_INLINE void add_bias(Tile<vf, M, N>& tile, const float* bias) {
  if (bias == nullptr) return;
  each<M>([&](auto m) { each<N>([&](auto n) { tile.at[m][n] += splat(bias[m]); }); });
}

// Scores of `keys` keys against the query block: s[key][query] = k[key] . qt[:, query] + bias[key]; their maxima join `top`.
__attribute__((noinline)) void scores(
    Rows k, const float* qt, const float* bias, int64_t keys, int64_t vectors, int64_t K, float* s, float* top, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto rows, auto columns, int64_t row, int64_t v) {
    Tile<vf, rows, columns> tile;
    ahead.some();
    tile.template add_product<1>(k.data + row * k.step, k.step, 1, qt + v * W, QUERIES, K);
    add_bias(tile, bias == nullptr ? nullptr : bias + row);
    each<columns>([&](auto n) {
      float* t = top + (v + n) * W;
      vf most = get_at<vf>(t);
      each<rows>([&](auto m) {
        put_at(s + (row + m) * QUERIES + (v + n) * W, tile.at[m][n]);
        most = greater(tile.at[m][n], most);
      });
      put_at(t, most);
    });
  });
}

// The same scores made weights at once: p = 2^exponent(s, from) * weight.
__attribute__((noinline)) void weights(
    Rows k, const float* qt, const float* bias, int64_t keys, int64_t vectors, int64_t K, const float* from,
    const float* weight, float* p, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto rows, auto columns, int64_t row, int64_t v) {
    Tile<vf, rows, columns> tile;
    ahead.some();
    tile.template add_product<1>(k.data + row * k.step, k.step, 1, qt + v * W, QUERIES, K);
    add_bias(tile, bias == nullptr ? nullptr : bias + row);
    each<columns>([&](auto n) {
      const vf t = get_at<vf>(from + (v + n) * W), w = get_at<vf>(weight + (v + n) * W);
      each<rows>([&](auto m) {
        put_at(p + (row + m) * QUERIES + (v + n) * W, exp2_of(exponent(tile.at[m][n], t)) * w);
      });
    });
  });
}

// Gradients of the scores: ds = p * (v[key] . dot[:, query] - delta).
__attribute__((noinline)) void score_gradients(
    Rows value, const float* dot, int64_t keys, int64_t vectors, int64_t K, const float* p, const float* delta, float* ds,
    Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto rows, auto columns, int64_t row, int64_t v) {
    Tile<vf, rows, columns> tile;
    ahead.some();
    tile.template add_product<1>(value.data + row * value.step, value.step, 1, dot + v * W, QUERIES, K);
    each<columns>([&](auto n) {
      const vf d = get_at<vf>(delta + (v + n) * W);
      each<rows>([&](auto m) {
        const int64_t at = (row + m) * QUERIES + (v + n) * W;
        put_at(ds + at, get_at<vf>(p + at) * (tile.at[m][n] - d));
      });
    });
  });
}

// out[d][query] = out * factor[query] + sum over keys of values[key][d] * p[key][query]; without a factor, set. A block's sum is
// made by itself: of thousands of keys the roundings are then those of a sum of sums.
__attribute__((noinline)) void weighted_sums(
    Rows values, const float* p, int64_t keys, int64_t vectors, int64_t K, const float* factor, float* out, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(K, 0, vectors, [&](auto rows, auto columns, int64_t d, int64_t v) {
    Tile<vf, rows, columns> tile;
    ahead.some();
    tile.template add_product<0>(values.data + d, 1, values.step, p + v * W, QUERIES, keys);
    float* to = out + d * QUERIES + v * W;
    if (factor != nullptr) {
      each<columns>([&](auto n) {
        const vf f = get_at<vf>(factor + (v + n) * W);
        each<rows>([&](auto m) { tile.at[m][n] += get_at<vf>(to + m * QUERIES + n * W) * f; });
      });
    }
    each<rows>([&](auto m) { each<columns>([&](auto n) { put_at(to + m * QUERIES + n * W, tile.at[m][n]); }); });
  });
}

// out[key][d] (+)= sum over queries of p[key][query] * rows[query][d], for the vectors V of columns first to end.
template <class V, int N>
DS_INLINE void key_sums_in(
    const float* p, Rows values, int64_t keys, int64_t queries, int64_t first, int64_t end, bool fresh, Rows out) {
  for_tiles<N>(keys, 0, (end - first) / lanes_of<V>, [&](auto rows, auto columns, int64_t key, int64_t v) {
    const int64_t d = first + v * lanes_of<V>;
    Tile<V, rows, columns> tile;
    tile.template add_product<1>(p + key * QUERIES, QUERIES, 1, values.data + d, values.step, queries);
    float* to = out.data + key * out.step + d;
    const int64_t step = out.step;
    if (!fresh) {
      each<rows>([&](auto m) {
        each<columns>([&](auto n) { tile.at[m][n] += get_at<V>(to + m * step + n * lanes_of<V>); });
      });
    }
    each<rows>([&](auto m) {
      each<columns>([&](auto n) { put_at(to + m * step + n * lanes_of<V>, tile.at[m][n]); });
    });
  });
}
__attribute__((noinline)) void key_sums(
    const float* p, Rows values, int64_t keys, int64_t queries, int64_t width, bool fresh, Rows out) {
  const int64_t whole = width / W * W;
  key_sums_in<vf, TILE_VECTORS>(p, values, keys, queries, 0, whole, fresh, out);
  if constexpr (PART < W) key_sums_in<vpart, 1>(p, values, keys, queries, whole, width, fresh, out);
}

// The scores of a block become weights 2^exponent(s, from), and their sums join those so far, shrunk by `factor`.
DS_INLINE void soften(float* s, int64_t keys, int64_t vectors, const float* from, const float* factor, float* sum) {
  constexpr int N = 2, SUMS = 4;  // one sum over all keys would gather twice the rounding
  int64_t v = 0;
  const auto strip = [&](auto columns, int64_t at) {
    Tile<vf, SUMS, columns> total;
    vf t[columns];
    each<columns>([&](auto n) { t[n] = get_at<vf>(from + at + n * W); });
    float* row = s + at;
    const auto take = [&](auto part) {
      each<columns>([&](auto n) {
        const vf p = exp2_of(exponent(get_at<vf>(row + n * W), t[n]));
        put_at(row + n * W, p);
        total.at[part][n] += p;
      });
      row += QUERIES;
    };
    int64_t key = 0;
    for (; key + SUMS <= keys; key += SUMS) each<SUMS>(take);
    for (; key < keys; ++key) take(count_t<0>{});
    each<columns>([&](auto n) {
      const int64_t i = at + n * W;
      const vf block = (total.at[0][n] + total.at[1][n]) + (total.at[2][n] + total.at[3][n]);
      put_at(sum + i, get_at<vf>(sum + i) * get_at<vf>(factor + i) + block);
    });
  };
  for (; v + N <= vectors; v += N) strip(count_t<N>{}, v * W);
  for (; v < vectors; ++v) strip(count_t<1>{}, v * W);
}

}  // namespace
}  // namespace ditscale::cpu
