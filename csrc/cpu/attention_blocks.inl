// Attention in blocks of queries and keys, written once for every instruction set. Mathematics: docs/attention.md.
//
// Lanes are queries. Scores are held transposed, [key, query], so that maxima, sums and exponentials of a row never cross
// lanes, a head width of 72 costs 72 and keys and values are read as single numbers from wherever they are stored.
#include "attention_blocks.h"
#include "lanes.h"

namespace ditscale::cpu {
namespace {

// Rows of numbers are a whole number of these wide: vectors of 16 hand their last half to vectors of 8.
#if defined(__AVX2__)
typedef v8 vpart;
#else
typedef vf vpart;
#endif
constexpr int64_t PART = lanes_of<vpart>;

DS_INLINE int64_t padded(int64_t K) {
  return (K + PART - 1) / PART * PART;
}

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xFFFF;  // the unmasked intrinsics start from an undefined register, which GCC warns of
#endif

// The greater of two; the second where either is NaN.
DS_INLINE vf greater(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(ALL, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return pick(a > b, a, b);
#endif
}

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

template <int N>
struct count_t {
  static constexpr int value = N;
};

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

// acc[m][n] += sum over r < R of a[m * am + r * ar] * b[r * br + n], n counted in vectors.
template <int AR, class V, int M, int N>
DS_INLINE void multiply(
    V (&acc)[M][N], const float* a, int64_t am, int64_t ar, const float* b, int64_t br, int64_t R) {
  if (AR) ar = AR;
  for (int64_t r = 0; r < R; ++r) {
    V x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) x[n] = get_at<V>(b + n * lanes_of<V>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float y = a[m * am];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += x[n] * y;
    }
    a += ar;
    b += br;
  }
}

constexpr float LOG2_E = 1.44269504088896341f;

// What a row's scores are measured from, made of the greatest, and the exponent of two that is left of a score. With
// multiply-add the product is not rounded, and what the greatest was rounded by is in every weight of the row and in their
// sum; without, the difference is taken first, so that the rounding of the product is one of a small number.
DS_INLINE vf origin(vf greatest) {
#if defined(__FMA__)
  return greatest * splat(LOG2_E);
#else
  return greatest;
#endif
}
DS_INLINE vf exponent(vf score, vf from) {
#if defined(__FMA__)
  return score * splat(LOG2_E) - from;
#else
  return (score - from) * splat(LOG2_E);
#endif
}
// The exponent by which weights measured from `old` become weights measured from `next`.
DS_INLINE vf change(vf old, vf next) {
#if defined(__FMA__)
  return old - next;
#else
  return (old - next) * splat(LOG2_E);
#endif
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
DS_INLINE void add_bias(vf (&acc)[M][N], const float* bias) {
  if (bias == nullptr) return;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] += splat(bias[m]);
  }
}

// Scores of `keys` keys against the query block: s[key][query] = k[key] . qt[:, query] + bias[key]; their maxima join `top`.
__attribute__((noinline)) void scores(
    Rows k, const float* qt, const float* bias, int64_t keys, int64_t vectors, int64_t K, float* s, float* top, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
    ahead.some();
    multiply<1>(acc, k.data + row * k.step, k.step, 1, qt + v * W, QUERIES, K);
    add_bias(acc, bias == nullptr ? nullptr : bias + row);
    for (int n = 0; n < N; ++n) {
      float* t = top + (v + n) * W;
      vf most = get_at<vf>(t);
      for (int m = 0; m < M; ++m) {
        put_at(s + (row + m) * QUERIES + (v + n) * W, acc[m][n]);
        most = greater(acc[m][n], most);
      }
      put_at(t, most);
    }
  });
}

// The same scores made weights at once: p = 2^exponent(s, from) * weight.
__attribute__((noinline)) void weights(
    Rows k, const float* qt, const float* bias, int64_t keys, int64_t vectors, int64_t K, const float* from,
    const float* weight, float* p, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
    ahead.some();
    multiply<1>(acc, k.data + row * k.step, k.step, 1, qt + v * W, QUERIES, K);
    add_bias(acc, bias == nullptr ? nullptr : bias + row);
    for (int n = 0; n < N; ++n) {
      const vf t = get_at<vf>(from + (v + n) * W), w = get_at<vf>(weight + (v + n) * W);
      for (int m = 0; m < M; ++m) {
        put_at(p + (row + m) * QUERIES + (v + n) * W, exp2_of(exponent(acc[m][n], t)) * w);
      }
    }
  });
}

// Gradients of the scores: ds = p * (v[key] . dot[:, query] - delta).
__attribute__((noinline)) void score_gradients(
    Rows value, const float* dot, int64_t keys, int64_t vectors, int64_t K, const float* p, const float* delta, float* ds,
    Ahead& ahead) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
    ahead.some();
    multiply<1>(acc, value.data + row * value.step, value.step, 1, dot + v * W, QUERIES, K);
    for (int n = 0; n < N; ++n) {
      const vf d = get_at<vf>(delta + (v + n) * W);
      for (int m = 0; m < M; ++m) {
        const int64_t at = (row + m) * QUERIES + (v + n) * W;
        put_at(ds + at, get_at<vf>(p + at) * (acc[m][n] - d));
      }
    }
  });
}

// out[d][query] = out * factor[query] + sum over keys of rows[key][d] * p[key][query]; without a factor, set. A block's sum is
// made by itself: of thousands of keys the roundings are then those of a sum of sums.
__attribute__((noinline)) void weighted_sums(
    Rows rows, const float* p, int64_t keys, int64_t vectors, int64_t K, const float* factor, float* out, Ahead& ahead) {
  for_tiles<TILE_VECTORS>(K, 0, vectors, [&](auto m_count, auto n_count, int64_t d, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
    ahead.some();
    multiply<0>(acc, rows.data + d, 1, rows.step, p + v * W, QUERIES, keys);
    if (factor != nullptr) {
      for (int n = 0; n < N; ++n) {
        const vf f = get_at<vf>(factor + (v + n) * W);
        for (int m = 0; m < M; ++m) acc[m][n] += get_at<vf>(out + (d + m) * QUERIES + (v + n) * W) * f;
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) put_at(out + (d + m) * QUERIES + (v + n) * W, acc[m][n]);
    }
  });
}

// out[key][d] (+)= sum over queries of p[key][query] * rows[query][d].
template <class V, int N>
DS_INLINE void key_sums_in(
    const float* p, Rows rows, int64_t keys, int64_t queries, int64_t first, int64_t end, bool fresh, Rows out) {
  for_tiles<N>(keys, 0, (end - first) / lanes_of<V>, [&](auto m_count, auto n_count, int64_t key, int64_t v) {
    constexpr int M = decltype(m_count)::value, N_ = decltype(n_count)::value;
    const int64_t d = first + v * lanes_of<V>;
    V acc[M][N_] = {};
    float* to = out.data + key * out.step + d;
    multiply<1>(acc, p + key * QUERIES, QUERIES, 1, rows.data + d, rows.step, queries);
    if (!fresh) {
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N_; ++n) acc[m][n] += get_at<V>(to + m * out.step + n * lanes_of<V>);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N_; ++n) put_at(to + m * out.step + n * lanes_of<V>, acc[m][n]);
    }
  });
}
__attribute__((noinline)) void key_sums(
    const float* p, Rows rows, int64_t keys, int64_t queries, int64_t width, bool fresh, Rows out) {
  const int64_t whole = width / W * W;
  key_sums_in<vf, TILE_VECTORS>(p, rows, keys, queries, 0, whole, fresh, out);
  if constexpr (PART < W) key_sums_in<vpart, 1>(p, rows, keys, queries, whole, width, fresh, out);
}

// The scores of a block become weights 2^exponent(s, from), and their sums join those so far, shrunk by `factor`.
DS_INLINE void soften(float* s, int64_t keys, int64_t vectors, const float* from, const float* factor, float* sum) {
  constexpr int N = 2, SUMS = 4;
  int64_t v = 0;
  const auto strip = [&](auto n_count, int64_t at) {
    constexpr int M = decltype(n_count)::value;
    vf t[M], total[SUMS][M] = {};  // one sum over all keys would gather twice the rounding
    for (int n = 0; n < M; ++n) t[n] = get_at<vf>(from + at + n * W);
    float* row = s + at;
    const auto take = [&](int part) {
      for (int n = 0; n < M; ++n) {
        const vf p = exp2_of(exponent(get_at<vf>(row + n * W), t[n]));
        put_at(row + n * W, p);
        total[part][n] += p;
      }
      row += QUERIES;
    };
    int64_t key = 0;
    for (; key + SUMS <= keys; key += SUMS) {
#pragma GCC unroll 4
      for (int part = 0; part < SUMS; ++part) take(part);
    }
    for (; key < keys; ++key) take(0);
    for (int n = 0; n < M; ++n) {
      const int64_t i = at + n * W;
      const vf block = (total[0][n] + total[1][n]) + (total[2][n] + total[3][n]);
      put_at(sum + i, get_at<vf>(sum + i) * get_at<vf>(factor + i) + block);
    }
  };
  for (; v + N <= vectors; v += N) strip(count_t<N>{}, v * W);
  for (; v < vectors; ++v) strip(count_t<1>{}, v * W);
}

#if defined(__AVX2__)
// Eight rows of eight become eight columns.
DS_INLINE void transpose(v8 (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xEE);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
constexpr int TILE = 8;
typedef v8 vtile;
#else
constexpr int TILE = 4;
typedef vf vtile;
DS_INLINE void transpose(vtile (&r)[TILE]) {
  vtile t[TILE];
  for (int i = 0; i < TILE; ++i) {
    for (int j = 0; j < TILE; ++j) t[i][j] = r[j][i];
  }
  for (int i = 0; i < TILE; ++i) r[i] = t[i];
}
#endif

// columns[d][query] = rows[query][d] * factor; the queries that fill up the last vector are zero.
DS_INLINE void to_columns(Rows rows, int64_t queries, int64_t lanes, int64_t width, float factor, float* columns) {
  for (int64_t q = 0; q < lanes; q += TILE) {
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) {
        tile[i] = q + i < queries ? get_at<vtile>(rows.data + (q + i) * rows.step + d) * factor : vtile{};
      }
      transpose(tile);
      for (int i = 0; i < TILE; ++i) put_at(columns + (d + i) * QUERIES + q, tile[i]);
    }
  }
}

// rows[query][d] = columns[d][query] * factor[query].
DS_INLINE void to_rows(const float* columns, int64_t queries, int64_t width, const float* factor, Rows rows) {
  for (int64_t q = 0; q < queries; q += TILE) {
    const vtile f = get_at<vtile>(factor + q);
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) tile[i] = get_at<vtile>(columns + (d + i) * QUERIES + q) * f;
      transpose(tile);
      for (int i = 0; i < TILE && q + i < queries; ++i) put_at(rows.data + (q + i) * rows.step + d, tile[i]);
    }
  }
}

// out[query] = columns[:, query] . rows[query], added up in the order of the scores' gradients: where a query has one key
// they cancel to the bit.
DS_INLINE void products(
    const float* columns, Rows rows, int64_t queries, int64_t lanes, int64_t width, float* out) {
  for (int64_t q = 0; q < lanes; q += TILE) {
    vtile total{};
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) {
        tile[i] = q + i < queries ? get_at<vtile>(rows.data + (q + i) * rows.step + d) : vtile{};
      }
      transpose(tile);
      for (int i = 0; i < TILE; ++i) total += tile[i] * get_at<vtile>(columns + (d + i) * QUERIES + q);
    }
    put_at(out + q, total);
  }
}

template <class T>
DS_INLINE T* row_at(const HeadView& view, int64_t b, int64_t h, int64_t t) {
  return (T*)view.data + b * view.b + h * view.h + t * view.t;
}

template <class T>
constexpr bool is_float = sizeof(T) == 4;

// One row as float32; what fills it up to a whole number of parts is zero.
template <class T>
DS_INLINE void copy_row(const T* from, int64_t K, float* to) {
  for_row(K, [&](auto whole, int64_t d, int64_t n) { put<whole.value>(to + d, get<whole.value>(from + d, n), n); });
  for (int64_t d = K; d < padded(K); ++d) to[d] = 0.f;
}

template <class T>
DS_INLINE Rows copy_rows(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K, float* room) {
  const T* from = row_at<T>(view, b, h, t);
  for (int64_t i = 0; i < count; ++i) copy_row(from + i * view.t, K, room + i * padded(K));
  return {room, padded(K)};
}

// Rows as float32, a whole number of parts wide: where they are stored, or converted into `room`.
template <class T>
DS_INLINE Rows read_rows(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K, float* room) {
  if constexpr (is_float<T>) {
    if (padded(K) == K) return {row_at<float>(view, b, h, t), view.t};
  }
  return copy_rows<T>(view, b, h, t, count, K, room);
}

// Where rows of results can be made: in place, or in `room`, from which write_rows then stores them.
template <class T>
DS_INLINE Rows rows_for(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t K, float* room) {
  if constexpr (is_float<T>) {
    if (padded(K) == K) return {(float*)row_at<T>(view, b, h, t), view.t};
  }
  return {room, padded(K)};
}
template <class T>
DS_INLINE void write_rows(Rows rows, const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K) {
  T* to = row_at<T>(view, b, h, t);
  if ((void*)rows.data == (void*)to) return;
  for (int64_t i = 0; i < count; ++i) {
    for_row(K, [&](auto whole, int64_t d, int64_t n) {
      put<whole.value>(to + i * view.t + d, get<whole.value>(rows.data + i * rows.step + d, n), n);
    });
  }
}

// Hands out consecutive pieces of a thread's scratch.
struct Arena {
  float* at;
  DS_INLINE float* take(int64_t n) {
    float* here = at;
    at += (n + 15) / 16 * 16;
    return here;
  }
};

DS_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The biases of `count` keys from position s on, in a row; null where the call has none.
DS_INLINE const float* biases(const AttentionArgs& a, int64_t b, int64_t h, int64_t s, int64_t count, float* room) {
  if (a.key_bias == nullptr) return nullptr;
  const float* from = a.key_bias + b * a.bias_b + h * a.bias_h + s * a.bias_s;
  if (a.bias_s == 1) return from;
  for (int64_t i = 0; i < count; ++i) room[i] = from[i * a.bias_s];
  return room;
}

// sums[key] += sum over queries of ds[key][query] * factor.
DS_INLINE void bias_sums(const float* ds, int64_t keys, int64_t queries, float factor, float* sums) {
  for (int64_t key = 0; key < keys; ++key) {
    Total total;
    for_span(queries, [&](auto v, int64_t i) { total.add(get_at<decltype(v)>(ds + key * QUERIES + i)); });
    sums[key] += total.get() * factor;
  }
}

// Keys or values of a sequence as rows of float32. Where several blocks of queries will read them, they are converted and put
// behind each other once: as they are stored, in a projection of q, k and v, every row is on a page of its own.
template <class T>
struct KeyRows {
  const HeadView& view;
  int64_t b, h, first, K;
  float* kept;  // all rows, or null
  float* room;  // those of a block

  DS_INLINE void keep(int64_t rows) {
    const int64_t width = padded(K);
    const T* from = row_at<T>(view, b, h, first);
    for (int64_t i = 0; i < rows; ++i) copy_row(from + i * view.t, K, kept + i * width);
  }
  DS_INLINE Rows block(int64_t at, int64_t count) {
    if (kept != nullptr) return {kept + at * padded(K), padded(K)};
    return read_rows<T>(view, b, h, first + at, count, K, room);
  }
};

// Keys up to this number of floats, and values alike, are kept: 4 MiB each, from where they are read in order.
constexpr int64_t KEPT = 1 << 20;

// Bytes that are called for early: more would push out what the arithmetic is using.
constexpr int64_t AHEAD = 1 << 19;

DS_INLINE int64_t kept_room(const AttentionArgs& a) {
  const int64_t rows = a.most_keys * padded(a.K);
  return a.most_queries > QUERIES && rows <= KEPT ? rows : 0;
}

inline int64_t forward_scratch(const AttentionArgs& a) {
  const int64_t width = padded(a.K) + 16;
  return width * (4 * QUERIES + 2 * KEYS) + KEYS * QUERIES + 5 * QUERIES + 256 + 2 * kept_room(a);
}

// The rows of one head that the kernels read: keys and values where they are another head's, queries, and more.
template <class T>
DS_INLINE void look_ahead(Ahead& ahead, const AttentionArgs& a, Next next, int64_t h_kv, bool backward, int64_t calls) {
  if (next.n < 0) return;
  const Span span = a.span(next.n);
  const int64_t kv = next.h / (a.H / a.H_kv);
  const auto add = [&](const HeadView& v, int64_t h, int64_t first, int64_t rows) {
    ahead.add(row_at<T>(v, span.b, h, first), v.t * (int64_t)sizeof(T), rows);
  };
  if (backward) {
    add(a.out, next.h, span.first_query, span.queries);
    add(a.dout, next.h, span.first_query, span.queries);
  }
  if (kv != h_kv || next.other) {
    add(a.v, kv, span.first_key, span.keys);
    add(a.k, kv, span.first_key, span.keys);
  }
  add(a.q, next.h, span.first_query, span.queries);
  ahead.row_bytes = a.K * (int64_t)sizeof(T);
  if (ahead.total * ahead.row_bytes > AHEAD) {  // the rows that are needed first, of each part alike
    for (int i = 0; i < ahead.parts; ++i) {
      ahead.part[i].rows = ahead.part[i].rows * AHEAD / (ahead.total * ahead.row_bytes) + 1;
    }
    ahead.total = AHEAD / ahead.row_bytes;
  }
  ahead.share = ahead.total / (calls > 0 ? calls : 1) + 1;
}

template <class T>
void forward(const AttentionArgs& a, int64_t n, int64_t h, int64_t begin, int64_t end, Next next, float* scratch) {
  const int64_t K = a.K, width = padded(K), h_kv = h / (a.H / a.H_kv);
  const Span span = a.span(n);
  const int64_t b = span.b;
  Arena arena{scratch};
  float* qt = arena.take(width * QUERIES);
  float* ot = arena.take(width * QUERIES);
  float* s = arena.take(KEYS * QUERIES);
  float* q_room = arena.take(width * QUERIES);
  float* out_room = arena.take(width * QUERIES);
  float* k_room = arena.take(width * KEYS);
  float* v_room = arena.take(width * KEYS);
  float *top = arena.take(QUERIES), *sum = arena.take(QUERIES), *factor = arena.take(QUERIES), *from = arena.take(QUERIES);
  float* bias_room = arena.take(KEYS);
  const int64_t kept = end - begin > 1 ? kept_room(a) : 0;
  KeyRows<T> k{a.k, b, h_kv, span.first_key, K, kept > 0 ? arena.take(kept) : nullptr, k_room};
  KeyRows<T> v{a.v, b, h_kv, span.first_key, K, kept > 0 ? arena.take(kept) : nullptr, v_room};
  if (kept > 0) {
    k.keep(span.keys);
    v.keep(span.keys);
  }
  Ahead ahead;
  const int64_t tiles = KEYS / tile_rows(TILE_VECTORS) + K / tile_rows(TILE_VECTORS);
  look_ahead<T>(ahead, a, next, h_kv, false, (end - begin) * (span.keys / KEYS + 1) * tiles);

  const float none = -__builtin_inff();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * QUERIES;
    if (first >= span.queries) return;
    const int64_t q0 = span.first_query + first, queries = least(QUERIES, span.queries - first);
    const int64_t vectors = (queries + W - 1) / W, lanes = vectors * W;
    to_columns(read_rows<T>(a.q, b, h, q0, queries, K, q_room), queries, lanes, width, a.scale, qt);
    for (int64_t i = 0; i < lanes; i += W) {
      put_at(top + i, splat(none));
      put_at(from + i, splat(none));
      put_at(sum + i, vf{});
    }
    for (int64_t k0 = 0; k0 < span.keys; k0 += KEYS) {
      const int64_t keys = least(KEYS, span.keys - k0);
      const float* bias = biases(a, b, h, span.first_key + k0, keys, bias_room);
      scores(k.block(k0, keys), qt, bias, keys, vectors, K, s, top, ahead);
      for (int64_t i = 0; i < lanes; i += W) {
        // A row without a score above -infinity keeps weights of zero instead of 2^(infinity - infinity).
        const vf most = get_at<vf>(top + i), to = pick(most == splat(none), vf{}, origin(most));
        put_at(factor + i, exp2_of(change(get_at<vf>(from + i), to)));
        put_at(from + i, to);
      }
      soften(s, keys, vectors, from, factor, sum);
      weighted_sums(v.block(k0, keys), s, keys, vectors, K, k0 > 0 ? factor : nullptr, ot, ahead);
    }
    for (int64_t i = 0; i < lanes; i += W) {
      const vf total = get_at<vf>(sum + i), last = get_at<vf>(from + i);
      put_at(sum + i, pick(total == vf{}, vf{}, splat(1.f) / total));
      put_at(from + i, pick(last == splat(none), vf{}, last));
    }
    if (span.keys == 0) __builtin_memset(ot, 0, sizeof(float) * width * QUERIES);
    // The rows that pad the width are never written by weighted_sums.
    for (int64_t d = K; d < width; ++d) __builtin_memset(ot + d * QUERIES, 0, sizeof(float) * QUERIES);
    const Rows out = rows_for<T>(a.out, b, h, q0, K, out_room);
    to_rows(ot, queries, width, sum, out);
    write_rows<T>(out, a.out, b, h, q0, queries, K);
    if (a.row_origin != nullptr) {
      const int64_t at = (b * a.H + h) * a.T + q0;
      for (int64_t i = 0; i < queries; ++i) {
        a.row_origin[at + i] = from[i];
        a.row_weight[at + i] = sum[i];
      }
    }
  }
}

inline int64_t backward_scratch(const AttentionArgs& a) {
  const int64_t width = padded(a.K) + 16;
  return width * (7 * QUERIES + 2 * KEYS) + 2 * KEYS * QUERIES + 5 * QUERIES + 256 + 2 * kept_room(a);
}

template <class T>
void backward(
    const AttentionArgs& a, int64_t n, int64_t h_kv, int64_t begin, int64_t end, Rows dk_sum, Rows dv_sum, float* bias_sum,
    Next next, float* scratch) {
  const int64_t K = a.K, width = padded(K), group = a.H / a.H_kv;
  const Span span = a.span(n);
  const int64_t b = span.b, blocks = (a.most_queries + QUERIES - 1) / QUERIES;
  Arena arena{scratch};
  float* qt = arena.take(width * QUERIES);
  float* dot = arena.take(width * QUERIES);
  float* dqt = arena.take(width * QUERIES);
  float* p = arena.take(KEYS * QUERIES);
  float* ds = arena.take(KEYS * QUERIES);
  float* q_room = arena.take(width * QUERIES);
  float* do_room = arena.take(width * QUERIES);
  float* o_room = arena.take(width * QUERIES);
  float* dq_room = arena.take(width * QUERIES);
  float* k_room = arena.take(width * KEYS);
  float* v_room = arena.take(width * KEYS);
  float *from = arena.take(QUERIES), *weight = arena.take(QUERIES), *delta = arena.take(QUERIES), *one = arena.take(QUERIES);
  float* bias_room = arena.take(KEYS);
  for (int64_t i = 0; i < QUERIES; ++i) one[i] = 1.f;
  const int64_t kept = end - begin > 1 ? kept_room(a) : 0;
  KeyRows<T> keys_of{a.k, b, h_kv, span.first_key, K, kept > 0 ? arena.take(kept) : nullptr, k_room};
  KeyRows<T> values_of{a.v, b, h_kv, span.first_key, K, kept > 0 ? arena.take(kept) : nullptr, v_room};
  if (kept > 0) {
    keys_of.keep(span.keys);
    values_of.keep(span.keys);
  }
  Ahead ahead;
  const int64_t tiles = 2 * KEYS / tile_rows(TILE_VECTORS) + K / tile_rows(TILE_VECTORS);
  look_ahead<T>(ahead, a, next, h_kv, true, (end - begin) * (span.keys / KEYS + 1) * tiles);

  bool fresh = true;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = h_kv * group + item / blocks, offset = (item % blocks) * QUERIES;
    if (offset >= span.queries) continue;
    const int64_t q0 = span.first_query + offset, queries = least(QUERIES, span.queries - offset);
    const int64_t vectors = (queries + W - 1) / W, lanes = vectors * W;
    // Read again and again, and where they are stored every row is on a page of its own.
    const Rows q = copy_rows<T>(a.q, b, h, q0, queries, K, q_room);
    const Rows dout = copy_rows<T>(a.dout, b, h, q0, queries, K, do_room);
    const Rows out = read_rows<T>(a.out, b, h, q0, queries, K, o_room);
    // The factor of the scores goes into dout's copy, from which the gradients of the scores are made: so it is in all.
    to_columns(q, queries, lanes, width, a.scale, qt);
    to_columns(dout, queries, lanes, width, a.scale, dot);
    products(dot, out, queries, lanes, width, delta);
    const int64_t stats = (b * a.H + h) * a.T + q0;
    for (int64_t i = 0; i < lanes; ++i) {
      from[i] = i < queries ? a.row_origin[stats + i] : 0.f;
      weight[i] = i < queries ? a.row_weight[stats + i] : 0.f;
    }
    for (int64_t k0 = 0; k0 < span.keys; k0 += KEYS) {
      const int64_t keys = least(KEYS, span.keys - k0);
      const Rows k = keys_of.block(k0, keys), v = values_of.block(k0, keys);
      const float* bias = biases(a, b, h, span.first_key + k0, keys, bias_room);
      weights(k, qt, bias, keys, vectors, K, from, weight, p, ahead);
      score_gradients(v, dot, keys, vectors, K, p, delta, ds, ahead);
      if (bias_sum != nullptr) {
        bias_sums(ds, keys, queries, 1.f / a.scale, bias_sum + item / blocks * a.most_keys + k0);
      }
      weighted_sums(k, ds, keys, vectors, K, k0 > 0 ? one : nullptr, dqt, ahead);
      key_sums(p, dout, keys, queries, width, fresh, {dv_sum.data + k0 * dv_sum.step, dv_sum.step});
      key_sums(ds, q, keys, queries, width, fresh, {dk_sum.data + k0 * dk_sum.step, dk_sum.step});
    }
    if (span.keys == 0) __builtin_memset(dqt, 0, sizeof(float) * width * QUERIES);
    for (int64_t d = K; d < width; ++d) __builtin_memset(dqt + d * QUERIES, 0, sizeof(float) * QUERIES);
    const Rows dq = rows_for<T>(a.dq, b, h, q0, K, dq_room);
    to_rows(dqt, queries, width, one, dq);
    write_rows<T>(dq, a.dq, b, h, q0, queries, K);
    fresh = false;
  }
  if (fresh) {  // no query looked at these keys
    for (int64_t i = 0; i < span.keys; ++i) {
      __builtin_memset(dk_sum.data + i * dk_sum.step, 0, sizeof(float) * width);
      __builtin_memset(dv_sum.data + i * dv_sum.step, 0, sizeof(float) * width);
    }
  }
}

template <class T>
void store_sums(
    const AttentionArgs& a, int64_t n, int64_t h_kv, const float* dk_sum, const float* dv_sum, int64_t chunks, int64_t step) {
  const int64_t K = a.K, width = padded(K);
  const Span span = a.span(n);
  for (int64_t i = 0; i < span.owned; ++i) {
    T* dk = row_at<T>(a.dk, span.b, h_kv, span.first_key + i);
    T* dv = row_at<T>(a.dv, span.b, h_kv, span.first_key + i);
    for_row(K, [&](auto whole, int64_t d, int64_t count) {
      vf k_total{}, v_total{};
      for (int64_t c = 0; i < span.keys && c < chunks; ++c) {
        k_total += get<whole.value>(dk_sum + c * step + i * width + d, count);
        v_total += get<whole.value>(dv_sum + c * step + i * width + d, count);
      }
      put<whole.value>(dk + d, k_total, count);
      put<whole.value>(dv + d, v_total, count);
    });
  }
}

template <class T>
constexpr AttentionKernels kernels() {
  return {forward_scratch, backward_scratch, forward<T>, backward<T>, store_sums<T>, padded, is_float<T>};
}

}  // namespace
}  // namespace ditscale::cpu
