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
  x = greater(splat(-1000.f), x);
  const vf k = (vf)_mm512_maskz_roundscale_ps(ALL, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = greater(splat(-127.f), x);
  const vf shifted = x + magic, k = shifted - magic;
#endif
  const vf r = x - k;
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

// Rows of a register tile beside N vectors: enough independent sums to hide the latency of a multiply-add.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors > 2 ? 4 : vectors == 2 ? 8 : 16;
#else
  return vectors == 2 ? 4 : 8;
#endif
}
#if defined(__AVX512F__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

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
    int64_t v = first;
    for (; v + N <= vectors; v += N) for_rest<tile_rows(N), N>(0, rows, v, body);
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

struct Rows {
  float* data;
  int64_t step;
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
    Rows k, const float* qt, const float* bias, int64_t keys, int64_t vectors, int64_t K, float* s, float* top) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
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
    const float* weight, float* p) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
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
    Rows value, const float* dot, int64_t keys, int64_t vectors, int64_t K, const float* p, const float* delta, float* ds) {
  for_tiles<TILE_VECTORS>(keys, 0, vectors, [&](auto m_count, auto n_count, int64_t row, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
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

// out[d][query] = out * factor[query] + sum over keys of rows[key][d] * p[key][query]; without a factor, set.
__attribute__((noinline)) void weighted_sums(
    Rows rows, const float* p, int64_t keys, int64_t vectors, int64_t K, const float* factor, float* out) {
  for_tiles<TILE_VECTORS>(K, 0, vectors, [&](auto m_count, auto n_count, int64_t d, int64_t v) {
    constexpr int M = decltype(m_count)::value, N = decltype(n_count)::value;
    vf acc[M][N] = {};
    if (factor != nullptr) {
      for (int n = 0; n < N; ++n) {
        const vf f = get_at<vf>(factor + (v + n) * W);
        for (int m = 0; m < M; ++m) acc[m][n] = get_at<vf>(out + (d + m) * QUERIES + (v + n) * W) * f;
      }
    }
    multiply<0>(acc, rows.data + d, 1, rows.step, p + v * W, QUERIES, keys);
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
    if (!fresh) {
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N_; ++n) acc[m][n] = get_at<V>(to + m * out.step + n * lanes_of<V>);
      }
    }
    multiply<1>(acc, p + key * QUERIES, QUERIES, 1, rows.data + d, rows.step, queries);
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

// Rows as float32, a whole number of parts wide: where they are stored, or converted into `room`.
template <class T>
DS_INLINE Rows read_rows(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K, float* room) {
  const int64_t width = padded(K);
  const T* from = row_at<T>(view, b, h, t);
  if constexpr (is_float<T>) {
    if (width == K) return {(float*)from, view.t};
  }
  for (int64_t i = 0; i < count; ++i) {
    float* to = room + i * width;
    for_row(K, [&](auto whole, int64_t d, int64_t n) {
      put<whole.value>(to + d, get<whole.value>(from + i * view.t + d, n), n);
    });
    for (int64_t d = K; d < width; ++d) to[d] = 0.f;
  }
  return {room, width};
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

inline int64_t forward_scratch(const AttentionArgs& a) {
  const int64_t width = padded(a.K) + 16;
  return width * (4 * QUERIES + 2 * KEYS) + KEYS * QUERIES + 5 * QUERIES + 256;
}

template <class T>
void forward(const AttentionArgs& a, int64_t n, int64_t h, int64_t block, float* scratch) {
  const int64_t K = a.K, width = padded(K), h_kv = h / (a.H / a.H_kv);
  const Span span = a.span(n);
  const int64_t b = span.b;
  const int64_t first = block * QUERIES;
  if (first >= span.queries) return;
  const int64_t q0 = span.first_query + first, queries = least(QUERIES, span.queries - first);
  const int64_t vectors = (queries + W - 1) / W, lanes = vectors * W;
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

  to_columns(read_rows<T>(a.q, b, h, q0, queries, K, q_room), queries, lanes, width, a.scale, qt);
  const float none = -__builtin_inff();
  for (int64_t i = 0; i < lanes; i += W) {
    put_at(top + i, splat(none));
    put_at(from + i, splat(none));
    put_at(sum + i, vf{});
  }
  for (int64_t k0 = 0; k0 < span.keys; k0 += KEYS) {
    const int64_t keys = least(KEYS, span.keys - k0), at = span.first_key + k0;
    scores(
        read_rows<T>(a.k, b, h_kv, at, keys, K, k_room), qt, biases(a, b, h, at, keys, bias_room), keys, vectors, K, s, top);
    for (int64_t i = 0; i < lanes; i += W) {
      // A row without a score above -infinity keeps weights of zero instead of 2^(infinity - infinity).
      const vf most = get_at<vf>(top + i), next = pick(most == splat(none), vf{}, origin(most));
      put_at(factor + i, exp2_of(change(get_at<vf>(from + i), next)));
      put_at(from + i, next);
    }
    soften(s, keys, vectors, from, factor, sum);
    weighted_sums(
        read_rows<T>(a.v, b, h_kv, at, keys, K, v_room), s, keys, vectors, K, k0 > 0 ? factor : nullptr, ot);
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

inline int64_t backward_scratch(const AttentionArgs& a) {
  const int64_t width = padded(a.K) + 16;
  return width * (7 * QUERIES + 2 * KEYS) + 2 * KEYS * QUERIES + 5 * QUERIES + 256;
}

template <class T>
void backward(
    const AttentionArgs& a, int64_t n, int64_t h_kv, int64_t begin, int64_t end, float* dk_sum, float* dv_sum, int64_t row,
    float* bias_sum, float* scratch) {
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
  bool fresh = true;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = h_kv * group + item / blocks, offset = (item % blocks) * QUERIES;
    if (offset >= span.queries) continue;
    const int64_t q0 = span.first_query + offset, queries = least(QUERIES, span.queries - offset);
    const int64_t vectors = (queries + W - 1) / W, lanes = vectors * W;
    const Rows q = read_rows<T>(a.q, b, h, q0, queries, K, q_room);
    const Rows dout = read_rows<T>(a.dout, b, h, q0, queries, K, do_room);
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
      const int64_t keys = least(KEYS, span.keys - k0), at = span.first_key + k0;
      const Rows k = read_rows<T>(a.k, b, h_kv, at, keys, K, k_room);
      weights(k, qt, biases(a, b, h, at, keys, bias_room), keys, vectors, K, from, weight, p);
      score_gradients(
          read_rows<T>(a.v, b, h_kv, at, keys, K, v_room), dot, keys, vectors, K, p, delta, ds);
      if (bias_sum != nullptr) {
        bias_sums(ds, keys, queries, 1.f / a.scale, bias_sum + item / blocks * a.most_keys + k0);
      }
      weighted_sums(k, ds, keys, vectors, K, k0 > 0 ? one : nullptr, dqt);
      key_sums(p, dout, keys, queries, width, fresh, {dv_sum + k0 * row, row});
      key_sums(ds, q, keys, queries, width, fresh, {dk_sum + k0 * row, row});
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
      __builtin_memset(dk_sum + i * row, 0, sizeof(float) * width);
      __builtin_memset(dv_sum + i * row, 0, sizeof(float) * width);
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
