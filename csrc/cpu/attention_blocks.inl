// Attention in blocks of queries and keys, written once for every instruction set. Mathematics: docs/attention.md.
#include "attention_products.h"

namespace ditscale::cpu {
namespace {

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
        const vf most = get_at<vf>(top + i), to = pick(most == splat(none), vf{}, most);
        // One that has no weight yet has nothing to bring over, and its origin may lie below the new one.
        const vf over = exp2_of(exponent(get_at<vf>(from + i), to));
        put_at(factor + i, pick(get_at<vf>(sum + i) == vf{}, vf{}, over));
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
        bias_sums(ds, keys, queries, 1.f / a.scale, bias_sum + item / blocks * a.S + k0);
      }
      weighted_sums(k, ds, keys, vectors, K, k0 > 0 ? one : nullptr, dqt, ahead);
      key_sums(p, dout, keys, queries, width, fresh, {dv_sum.data + k0 * dv_sum.step, dv_sum.step});
      key_sums(ds, q, keys, queries, width, fresh, {dk_sum.data + k0 * dk_sum.step, dk_sum.step});
    }
    if (span.keys == 0) __builtin_memset(dqt, 0, sizeof(float) * width * QUERIES);
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
