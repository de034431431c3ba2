// RMS or layer norm over the width of a head, its weight, and rotary position embedding, one row at a time and once for every
// instruction set. Mathematics: docs/attention.md.
#include "lanes.h"
#include "rotary_rows.h"

namespace ditscale::cpu {
namespace {

constexpr int64_t ROWS_AHEAD = 16;

template <class T>
DS_INLINE const float* widen(const T* from, int64_t n, float* room) {
  if constexpr (sizeof(T) == 4) return (const float*)from;
  for_row(n, [&](auto whole, int64_t i, int64_t m) { put<whole.value>(room + i, get<whole.value>(from + i, m), m); });
  return room;
}
template <class T>
DS_INLINE void narrow(const float* from, int64_t n, T* to) {
  if ((const void*)from == (const void*)to) return;
  for_row(n, [&](auto whole, int64_t i, int64_t m) { put<whole.value>(to + i, get<whole.value>(from + i, m), m); });
}
// Where a row is worked on before `deliver` brings it to its place.
template <class T>
DS_INLINE float* place(T* to, float* room, bool stream) {
  if constexpr (sizeof(T) == 4) return stream ? room : (float*)to;
  return room;
}
template <class T>
DS_INLINE void deliver(const float* from, int64_t n, T* to, float* room, bool stream) {
  if (!stream) return narrow(from, n, to);
  if constexpr (sizeof(T) == 4) {
    stream_bytes(to, from, n * 4);
  } else {
    narrow(from, n, (T*)room);
    stream_bytes(to, room, n * (int64_t)sizeof(T));
  }
}

// Pairs (2 i, 2 i + 1) laid out as (i, i + K / 2), and back: the norm does not care, and the rotation knows one layout only.
DS_INLINE const float* part_pairs(const float* from, int64_t K, float* to) {
  for (int64_t i = 0; i < K / 2; ++i) {
    to[i] = from[2 * i];
    to[K / 2 + i] = from[2 * i + 1];
  }
  return to;
}
DS_INLINE void join_pairs(const float* from, int64_t K, float* to) {
  for (int64_t i = 0; i < K / 2; ++i) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[K / 2 + i];
  }
}

// Asks for a row some rows before it is worked on. The heads of a token lie together, but from token to token the others of
// q, k and v are stepped over, and what the processor fetches by itself starts anew there.
template <class T>
DS_INLINE void prefetch_row(const T* p, int64_t K) {
  for (int64_t byte = 0; byte < K * (int64_t)sizeof(T); byte += 64) __builtin_prefetch((const char*)p + byte);
}
DS_INLINE int64_t tokens_ahead(int64_t H) {
  return 1 + ROWS_AHEAD / (H > 0 ? H : 1);
}

struct RowNorm {
  float mean, rstd;
};

// The row is taken in the pieces that the rotation takes it in, so that they stay in registers.
template <bool TURN>
DS_INLINE RowNorm row_norm(const float* x, int64_t K, int norm, float eps) {
  if (norm == (int)HeadNorm::none) return {0.f, 1.f};
  const auto for_pieces = [&](const auto& body) {
    for_span(TURN ? K / 2 : K, [&](auto v, int64_t i) {
      body(get_at<decltype(v)>(x + i));
      if constexpr (TURN) body(get_at<decltype(v)>(x + K / 2 + i));
    });
  };
  float mean = 0.f;
  // What the first sum leaves of the mean corrects it, so that a constant row is centred to zeros.
  for (int pass = 0; norm == (int)HeadNorm::layer && pass < 2; ++pass) {
    Total total;
    for_pieces([&](auto piece) { total.add(piece - mean); });
    mean += total.get() / (float)K;
  }
  Total squares;
  for_pieces([&](auto piece) {
    const auto centred = piece - mean;
    squares.add(centred * centred);
  });
  return {mean, 1.f / __builtin_sqrtf(squares.get() / (float)K + eps)};
}

template <int64_t WIDTH, bool WEIGHT, bool TURN, class T>
DS_INLINE void forward_rows(const RotaryArgs a, int64_t begin, int64_t end, float* scratch) {
  const int64_t K = WIDTH > 0 ? WIDTH : a.K, half = K / 2, ahead = tokens_ahead(a.H);
  const int64_t room = rotary_room(K);
  float *x_room = scratch, *y_room = scratch + room, *x_parts = scratch + 2 * room, *w_parts = scratch + 3 * room;
  const bool pairs = TURN && a.interleaved;
  const float* w = WEIGHT && pairs ? part_pairs(a.weight, K, w_parts) : a.weight;
  int64_t b = begin / a.T, t = begin % a.T;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t angles = b * a.table_b + t * a.table_t;
    for (int64_t h = 0; h < a.H; ++h) {
      const T* stored = (const T*)a.x.data + b * a.x.b + h * a.x.h + t * a.x.t;
      prefetch_row(stored + ahead * a.x.t, K);
      const float* x = widen(stored, K, x_room);
      if (pairs) x = part_pairs(x, K, x_parts);
      T* to = (T*)a.out.data + b * a.out.b + h * a.out.h + t * a.out.t;
      float *row = place(to, y_room, a.stream), *y = pairs ? x_parts : row;  // a pair is read before it is written
      const RowNorm m = row_norm<TURN>(x, K, a.norm, a.eps);
      const auto normed = [&](auto v, int64_t i) {
        typedef decltype(v) V;
        V n = (get_at<V>(x + i) - m.mean) * m.rstd;
        if constexpr (WEIGHT) n *= get_at<V>(w + i);
        return n;
      };
      if constexpr (TURN) {
        for_span(half, [&](auto v, int64_t i) {
          typedef decltype(v) V;
          const V first = normed(v, i), second = normed(v, half + i);
          const V c = get_at<V>(a.cos + angles + i), s = get_at<V>(a.sin + angles + i);
          put_at(y + i, first * c - second * s);
          put_at(y + half + i, second * c + first * s);
        });
      } else {
        for_span(K, [&](auto v, int64_t i) { put_at(y + i, normed(v, i)); });
      }
      if (pairs) join_pairs(y, K, row);
      deliver(row, K, to, x_room, a.stream);
    }
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
  if (a.stream) end_stream();
}

// One row's gradient through the rotation and the norm by its mean square, the usual case: there is no mean to wait for, so both
// sums are made in one pass and neither waits for the other.
template <bool WEIGHT>
DS_INLINE void backward_rms(
    const float* x, const float* dy, const float* cos, const float* sin, const float* w, int64_t K, float eps, float* dx,
    float* sums) {
  const int64_t half = K / 2;
  Total squares, along;  // of the row, and of its product with the gradient
  for_span(half, [&](auto v, int64_t i) {
    typedef decltype(v) V;
    const V first = get_at<V>(dy + i), second = get_at<V>(dy + half + i), c = get_at<V>(cos + i), s = get_at<V>(sin + i);
    const V g[2] = {first * c + second * s, second * c - first * s};
    for (int part = 0; part < 2; ++part) {
      const int64_t at = part * half + i;
      const V a = get_at<V>(x + at);
      squares.add(a * a);
      if constexpr (WEIGHT) {
        along.add(g[part] * get_at<V>(w + at) * a);
      } else {
        along.add(g[part] * a);
      }
      put_at(dx + at, g[part]);
    }
  });
  const float rstd = 1.f / __builtin_sqrtf(squares.get() / (float)K + eps), share = rstd * (along.get() / (float)K);
  for_span(half, [&](auto v, int64_t i) {
    typedef decltype(v) V;
    for (int part = 0; part < 2; ++part) {
      const int64_t at = part * half + i;
      const V n = get_at<V>(x + at) * rstd;
      V g = get_at<V>(dx + at);
      if constexpr (WEIGHT) {
        put_at(sums + at, get_at<V>(sums + at) + g * n);
        g *= get_at<V>(w + at);
      }
      put_at(dx + at, (g - n * share) * rstd);
    }
  });
}

// Rows that are added one after the other before their sum joins the others': thousands in turn would cost the last digits.
constexpr int64_t ROWS_A_SUM = 64;

template <int64_t WIDTH, bool WEIGHT, bool TURN, class T>
DS_INLINE void backward_rows(const RotaryArgs a, int64_t begin, int64_t end, float* dweight, float* scratch) {
  const int64_t K = WIDTH > 0 ? WIDTH : a.K, half = K / 2, ahead = tokens_ahead(a.H);
  const int64_t room = rotary_room(K);
  float *x_room = scratch, *dy_room = scratch + room, *dx_room = scratch + 2 * room;
  float *x_parts = scratch + 3 * room, *dy_parts = scratch + 4 * room, *w_parts = scratch + 5 * room;
  float *sums = scratch + 6 * room, *total = scratch + 7 * room;
  const bool pairs = TURN && a.interleaved;
  const float* w = WEIGHT && pairs ? part_pairs(a.weight, K, w_parts) : a.weight;
  if constexpr (WEIGHT) {
    __builtin_memset(sums, 0, sizeof(float) * K);
    __builtin_memset(total, 0, sizeof(float) * K);
  }
  int64_t b = begin / a.T, t = begin % a.T, summed = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t angles = b * a.table_b + t * a.table_t;
    for (int64_t h = 0; h < a.H; ++h) {
      const T* x_stored = (const T*)a.x.data + b * a.x.b + h * a.x.h + t * a.x.t;
      const T* dy_stored = (const T*)a.dout.data + b * a.dout.b + h * a.dout.h + t * a.dout.t;
      prefetch_row(x_stored + ahead * a.x.t, K);
      prefetch_row(dy_stored + ahead * a.dout.t, K);
      const float* x = widen(x_stored, K, x_room);
      const float* dy = widen(dy_stored, K, dy_room);
      if (pairs) {
        x = part_pairs(x, K, x_parts);
        dy = part_pairs(dy, K, dy_parts);
      }
      T* to = (T*)a.out.data + b * a.out.b + h * a.out.h + t * a.out.t;
      float *row = place(to, dx_room, a.stream), *dx = pairs ? dy_parts : row;
      if (TURN && a.norm == (int)HeadNorm::rms) {
        backward_rms<WEIGHT>(x, dy, a.cos + angles, a.sin + angles, w, K, a.eps, dx, sums);
      } else {
        const RowNorm m = row_norm<TURN>(x, K, a.norm, a.eps);
        Total mean, along;  // of the normalised row's gradient, and of its product with the row
        const auto take = [&](auto v, int64_t i, auto g) {
          typedef decltype(v) V;
          const V n = (get_at<V>(x + i) - m.mean) * m.rstd;
          if constexpr (WEIGHT) {
            put_at(sums + i, get_at<V>(sums + i) + g * n);
            g *= get_at<V>(w + i);
          }
          mean.add(g);
          along.add(g * n);
          put_at(dx + i, g);
        };
        const auto give = [&](int64_t from, int64_t n, float c1, float c2) {
          for_span(n, [&](auto v, int64_t i) {
            typedef decltype(v) V;
            const V normed = (get_at<V>(x + from + i) - m.mean) * m.rstd;
            put_at(dx + from + i, (get_at<V>(dx + from + i) - c1 - normed * c2) * m.rstd);
          });
        };
        if constexpr (TURN) {
          for_span(half, [&](auto v, int64_t i) {
            typedef decltype(v) V;
            const V first = get_at<V>(dy + i), second = get_at<V>(dy + half + i);
            const V c = get_at<V>(a.cos + angles + i), s = get_at<V>(a.sin + angles + i);
            take(v, i, V(first * c + second * s));
            take(v, half + i, V(second * c - first * s));
          });
        } else {
          for_span(K, [&](auto v, int64_t i) { take(v, i, get_at<decltype(v)>(dy + i)); });
        }
        if (a.norm != (int)HeadNorm::none) {
          const float c1 = a.norm == (int)HeadNorm::layer ? mean.get() / (float)K : 0.f, c2 = along.get() / (float)K;
          if constexpr (TURN) {  // the vectors that were stored are loaded again as they are
            give(0, half, c1, c2);
            give(half, half, c1, c2);
          } else {
            give(0, K, c1, c2);
          }
        }
      }
      if (pairs) join_pairs(dx, K, row);
      deliver(row, K, to, x_room, a.stream);
    }
    if constexpr (WEIGHT) {
      summed += a.H;
      if (summed >= ROWS_A_SUM || r + 1 == end) {
        for_span(K, [&](auto v, int64_t i) {
          typedef decltype(v) V;
          put_at(total + i, get_at<V>(total + i) + get_at<V>(sums + i));
        });
        __builtin_memset(sums, 0, sizeof(float) * K);
        summed = 0;
      }
    }
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
  if (a.stream) end_stream();
  if constexpr (WEIGHT) {
    if (pairs) {
      join_pairs(total, K, dweight);
    } else {
      __builtin_memcpy(dweight, total, sizeof(float) * K);
    }
  }
}

template <auto V>
struct constant_t {
  static constexpr auto value = V;
};

// run(width, weighted, turned): the usual widths are the compiler's to know, which then unrolls a row and keeps it in registers.
template <class F>
DS_INLINE void for_kind(const RotaryArgs& a, const F& run) {
  const auto for_width = [&](auto weighted) {
    if (a.cos == nullptr) return run(constant_t<int64_t{0}>{}, weighted, constant_t<false>{});
    if (a.K == 64) return run(constant_t<int64_t{64}>{}, weighted, constant_t<true>{});
    if (a.K == 72) return run(constant_t<int64_t{72}>{}, weighted, constant_t<true>{});
    return run(constant_t<int64_t{0}>{}, weighted, constant_t<true>{});
  };
  if (a.weight != nullptr) return for_width(constant_t<true>{});
  return for_width(constant_t<false>{});
}

template <class T>
void forward(const RotaryArgs& a, int64_t begin, int64_t end, float* scratch) {
  for_kind(a, [&](auto width, auto weighted, auto turned) {
    forward_rows<width.value, weighted.value, turned.value, T>(a, begin, end, scratch);
  });
}

template <class T>
void backward(const RotaryArgs& a, int64_t begin, int64_t end, float* dweight, float* scratch) {
  for_kind(a, [&](auto width, auto weighted, auto turned) {
    backward_rows<width.value, weighted.value, turned.value, T>(a, begin, end, dweight, scratch);
  });
}

template <class T>
constexpr RotaryKernels kernels() {
  return {forward<T>, backward<T>};
}

}  // namespace
}  // namespace ditscale::cpu
