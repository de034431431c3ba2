// The adaLN family over rows, written once for every instruction set. Mathematics: docs/kernels.md.
#include "adaln_rows.h"
#include "vec.h"

namespace ditscale::cpu {
namespace {

template <class T>
DS_INLINE const T* row_of(const Strided& v, int64_t b, int64_t t) {
  return (const T*)v.data + b * v.b + t * v.t;
}

// What lies some lines ahead in a row that is read from memory: a processor foresees a row's next lines by itself, but not across
// the border of a page, nor so many at once. An address beyond the last row does no harm. Half a KiB is 5 (two threads) to 25 %
// (one) slower on an EPYC, 3 KiB the same; on a Xeon 1 and 4 KiB are no worse than half.
constexpr int AHEAD = 2048;  // bytes
DS_INLINE void prefetch(const void* p) {
  __builtin_prefetch((const char*)p + AHEAD);
}

// A row of modulation as float32, `plus` added: where it is stored, or worked out into `scratch`.
template <class T>
DS_INLINE const float* widen(const T* p, int64_t D, float plus, float* scratch) {
  for_row(D, [&](auto whole, int64_t d, int64_t n) {
    put<whole.value>(scratch + d, get<whole.value>(p + d, n) + splat(plus), n);
  });
  return scratch;
}
DS_INLINE const float* modulation_row(
    const Strided& m, int storage, int64_t b, int64_t t, int64_t D, float plus, float* scratch) {
  if (storage == 1) return widen(row_of<bf16>(m, b, t), D, plus, scratch);
  if (storage == 2) return widen(row_of<f16>(m, b, t), D, plus, scratch);
  const float* row = row_of<float>(m, b, t);
  return plus == 0.f ? row : widen(row, D, plus, scratch);
}

// The float32 rows of a call's modulation, made again only where the sample (or, per token, the row) changes.
struct Modulation {
  const Strided& view;
  int storage;
  int64_t D;
  float plus;
  float* scratch;
  const void* at = nullptr;
  const float* row = nullptr;
  DS_INLINE const float* operator()(int64_t b, int64_t t) {
    const int64_t size = storage == 0 ? 4 : 2;
    const void* want = (const char*)view.data + (b * view.b + t * view.t) * size;
    if (want != at) {
      at = want;
      row = modulation_row(view, storage, b, t, D, plus, scratch);
    }
    return row;
  }
};

struct Moments {
  float mean, rstd;
};

template <bool, class A, class B>
struct type_if {
  typedef A type;
};
template <class A, class B>
struct type_if<false, A, B> {
  typedef B type;
};

DS_INLINE float inverse_root(float a) {
  return 1.0f / __builtin_sqrtf(a);
}

constexpr int LANES = 4;  // independent sums, so that additions do not wait for one another

struct Centred {
  float sum, squares;
};

template <class T>
DS_INLINE Centred row_centred(const T* x, int64_t D, float about) {
  vf acc[LANES] = {}, rest[LANES] = {};
  const vf m = splat(about);
  int64_t d = 0;
  for (; d + LANES * W <= D; d += LANES * W) {
    for (int k = 0; k < LANES; ++k) {
      const vf a = load(x + d + k * W) - m;
      rest[k] += a;
      acc[k] += a * a;
    }
  }
  for (; d < D; d += W) {
    const vf a = (d + W <= D ? load(x + d) : load_part(x + d, D - d, about)) - m;
    rest[0] += a;
    acc[0] += a * a;
  }
  return {sum((rest[0] + rest[1]) + (rest[2] + rest[3])), sum((acc[0] + acc[1]) + (acc[2] + acc[3]))};
}

// The mean of a row's first sixteen numbers, exact where they are equal; of all where there are fewer.
template <class T>
DS_INLINE float mean_of_head(const T* x, int64_t D) {
  if (D < 16) {
    float total = 0.f;
    for (int64_t d = 0; d < D; d += W) total += sum(d + W <= D ? load(x + d) : load_part(x + d, D - d, 0.f));
    return total / (float)D;
  }
  vf total{};
  for (int64_t d = 0; d < 16; d += W) total += load(x + d);
  return sum(total) / 16.f;
}

// One pass: sums of x - k and its square, k near the mean. Var = E[(x - k)^2] - (mean - k)^2 loses no digit while the second
// term is small beside the first; where it is not, a second pass about the mean found by the first.
template <class T>
DS_INLINE Moments moments_from(Centred c, float about, const T* x, int64_t D, float eps, bool rms) {
  const float n = (float)D;
  if (rms) return {0.f, inverse_root(c.squares / n + eps)};
  float shift = c.sum / n;
  if (shift * shift > 0.2f * (c.squares / n)) {
    about += shift;
    c = row_centred(x, D, about);
    shift = c.sum / n;
  }
  const float variance = c.squares / n - shift * shift;
  return {about + shift, inverse_root((variance > 0.f || variance != variance ? variance : 0.f) + eps)};
}
template <class T>
DS_INLINE Moments moments(const T* x, int64_t D, float eps, bool rms) {
  const float about = rms ? 0.f : mean_of_head(x, D);
  return moments_from(row_centred(x, D, about), about, x, D, eps, rms);
}

// Rows that are worked on together: they share what is read of the modulation, and of the sums over tokens.
constexpr int BLOCK = 4;

// How many of the rows from `r` on are one block: BLOCK where as many of the same sample are left and `together` allows it, or 1.
DS_INLINE int64_t block_rows(int64_t T, int64_t t, int64_t r, int64_t end, bool together) {
  const int64_t rows = T - t < end - r ? T - t : end - r;
  return together && rows >= BLOCK ? BLOCK : 1;
}

template <class T, int ROWS, bool BRANCH>
DS_INLINE void forward_rows(
    const ForwardArgs& a, int64_t r, int64_t b, int64_t t, const float* shift, const float* factor, const float* gate,
    float* scratch) {
  const int64_t D = a.D;
  constexpr bool COPY = sizeof(T) != sizeof(float);  // half rows are converted once for all passes
  typename type_if<COPY, const float*, const T*>::type x[ROWS];
  vf mean[ROWS], rstd[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    const T* from = row_of<T>(a.x, b, t + i);
    T* x_new = (T*)a.x_new + (r + i) * D;
    if constexpr (COPY || BRANCH) {
      const T* branch = BRANCH ? row_of<T>(a.branch, b, t + i) : nullptr;
      float* to = scratch + i * D;
      for_vectors<LINE<T>>(D, [&](auto v, int64_t d0, int64_t n) {
        for (int u = 0; u < v.count; ++u) {
          const int64_t d = d0 + u * W;
          vf value = v.get(from + d, n);
          if constexpr (BRANCH) {
            // What is normalised is what is stored, and what the backward pass reads again.
            value = v.put_back(x_new + d, value + v.get(gate + d, n) * v.get(branch + d, n), n);
          }
          if constexpr (COPY) v.template put<false>(to + d, value, n);
        }
      });
      if constexpr (COPY) x[i] = to;
    }
    if constexpr (!COPY) x[i] = BRANCH ? x_new : from;
    const Moments m = moments(x[i], D, a.eps, a.rms);
    if (a.rstd != nullptr) {
      a.mean[r + i] = m.mean;
      a.rstd[r + i] = m.rstd;
    }
    mean[i] = splat(m.mean);
    rstd[i] = splat(m.rstd);
  }
  T* y = (T*)a.y + r * D;
  for_vectors<LINE<T>>(D, [&](auto v, int64_t d0, int64_t n) {
    for (int i = 0; i < ROWS; ++i) {
      for (int u = 0; u < v.count; ++u) {
        const int64_t d = d0 + u * W;
        const vf normed = (v.get(x[i] + d, n) - mean[i]) * rstd[i];
        v.template put<false>(y + i * D + d, normed * v.get(factor + d, n) + v.get(shift + d, n), n);
      }
    }
  });
}

template <class T, bool BRANCH>
void forward_blocks(const ForwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = a.D;
  Modulation shift{a.shift, a.modulation, D, 0.f, scratch};
  Modulation factor{a.scale, a.modulation, D, a.scale_base, scratch + D};
  Modulation gate{a.gate, a.modulation, D, 0.f, scratch + 2 * D};
  const bool together = !a.per_token && D <= 2048;
  for (int64_t r = begin; r < end;) {
    const int64_t b = r / a.T, t = r % a.T, rows = block_rows(a.T, t, r, end, together);
    const float *s = shift(b, t), *f = factor(b, t), *g = BRANCH ? gate(b, t) : nullptr;
    if (rows == BLOCK) {
      forward_rows<T, BLOCK, BRANCH>(a, r, b, t, s, f, g, scratch + 3 * D);
    } else {
      forward_rows<T, 1, BRANCH>(a, r, b, t, s, f, g, scratch + 3 * D);
    }
    r += rows;
  }
}

// The same past the caches (`streams` in adaln.cpp says when): while a row's result is written, the next row is read and its
// moments are made, so that there is at any time something to fetch and something to store, each in one place after another.
// Rows are whole lines, and there is at least one.
template <class T, bool BRANCH>
void forward_stream(const ForwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = a.D;
  Modulation shifts{a.shift, a.modulation, D, 0.f, scratch};
  Modulation factors{a.scale, a.modulation, D, a.scale_base, scratch + D};
  Modulation gates{a.gate, a.modulation, D, 0.f, scratch + 2 * D};
  constexpr bool COPY = BRANCH || sizeof(T) != sizeof(float);  // what is normalised lies in scratch, as float32
  typedef typename type_if<COPY, const float*, const T*>::type Normed;
  Normed now = nullptr;  // the row before, which is written
  vf mean{}, rstd{};
  const float *shift = nullptr, *factor = nullptr;
  for (int64_t r = begin; r <= end; ++r) {
    const bool reads = r < end, writes = r > begin;
    const int64_t b = (reads ? r : r - 1) / a.T, t = (reads ? r : r - 1) % a.T;
    const T *x = row_of<T>(a.x, b, t), *branch = BRANCH ? row_of<T>(a.branch, b, t) : nullptr;
    const float* gate = BRANCH ? gates(b, t) : nullptr;
    float* copy = scratch + (3 + (r & 1)) * D;
    const auto summed = [&](int64_t d) {
      vf v = load(x + d);
      if constexpr (BRANCH) v += load(gate + d) * load(branch + d);
      return v;
    };
    float about = 0.f;
    if (!a.rms && reads) {  // mean_of_head
      vf head{};
      for (int64_t d = 0; d < 16; d += W) head += value_of(bits_of(summed(d), x), x);
      about = sum(head) / 16.f;
    }
    const vf m = splat(about);
    vf acc[LANES] = {}, rest[LANES] = {};
    T *x_new = (T*)a.x_new + r * D, *y = (T*)a.y + (r - 1) * D;
    const auto step = [&](auto count, int64_t d0) {
      constexpr int U = count.count;
      if (reads) {
        for (int u = 0; u < U; ++u) {
          const int64_t d = d0 + u * W;
          const int lane = U == LANES ? u : 0;  // as in row_centred
          if (u % LINE<T> == 0) {
            prefetch(x + d);
            if constexpr (BRANCH) prefetch(branch + d);
          }
          vf v = summed(d);
          if constexpr (BRANCH) {
            const auto bits = bits_of(v, x);
            stream_bits(x_new + d, bits);
            v = value_of(bits, x);
          }
          if constexpr (COPY) store(copy + d, v);
          rest[lane] += v - m;
          acc[lane] += (v - m) * (v - m);
        }
      }
      if (writes) {
        for (int u = 0; u < U; ++u) {
          const int64_t d = d0 + u * W;
          stream(y + d, (load(now + d) - mean) * rstd * load(factor + d) + load(shift + d));
        }
      }
    };
    int64_t d = 0;
    for (; d + LANES * W <= D; d += LANES * W) step(vectors_t<LANES>{}, d);
    for (; d < D; d += LINE<T> * W) step(vectors_t<LINE<T>>{}, d);
    if (!reads) break;
    if constexpr (COPY) {
      now = copy;
    } else {
      now = x;
    }
    const Centred c{sum((rest[0] + rest[1]) + (rest[2] + rest[3])), sum((acc[0] + acc[1]) + (acc[2] + acc[3]))};
    const Moments found = moments_from(c, about, now, D, a.eps, a.rms);
    if (a.rstd != nullptr) {
      a.mean[r] = found.mean;
      a.rstd[r] = found.rstd;
    }
    mean = splat(found.mean);
    rstd = splat(found.rstd);
    shift = shifts(b, t);
    factor = factors(b, t);
  }
  end_stream();
}

template <class T>
void forward(const ForwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const bool branch = a.branch.data != nullptr;
  if (branch && a.stream) return forward_stream<T, true>(a, begin, end, scratch);
  if (branch) return forward_blocks<T, true>(a, begin, end, scratch);
  if (a.stream) return forward_stream<T, false>(a, begin, end, scratch);
  forward_blocks<T, false>(a, begin, end, scratch);
}

DS_INLINE void put_modulation(void* p, int storage, int64_t i, vf v, bool whole, int64_t n) {
  const auto to = [&](auto* q) { whole ? store(q + i, v) : store_part(q + i, v, n); };
  if (storage == 0) {
    to((float*)p);
  } else if (storage == 1) {
    to((bf16*)p);
  } else {
    to((f16*)p);
  }
}

// One row's two means of the norm's backward pass, g = dy * factor: mean(g) and mean(g * normalised).
template <class T>
DS_INLINE void backward_means(
    const T* x, const T* dy, const float* factor, Moments m, int64_t D, bool rms, float* c1, float* c2) {
  vf a1[LANES] = {}, a2[LANES] = {};
  const vf mean = splat(m.mean);
  int64_t d = 0;
  for (; d + LANES * W <= D; d += LANES * W) {
    for (int k = 0; k < LANES; ++k) {
      const vf g = load(dy + d + k * W) * load(factor + d + k * W);
      a1[k] += g;
      a2[k] += g * (load(x + d + k * W) - mean);
    }
  }
  for (; d < D; d += W) {
    const bool whole = d + W <= D;
    const int64_t n = D - d;
    const vf g = whole ? load(dy + d) * load(factor + d) : load_part(dy + d, n, 0.f) * load_part(factor + d, n, 0.f);
    a1[0] += g;
    a2[0] += g * ((whole ? load(x + d) : load_part(x + d, n, m.mean)) - mean);
  }
  *c1 = rms ? 0.f : sum((a1[0] + a1[1]) + (a1[2] + a1[3])) / (float)D;
  *c2 = m.rstd * (sum((a2[0] + a2[1]) + (a2[2] + a2[3])) / (float)D);
}

// The rows that a block of the backward pass reads, and what is known of them.
template <class T>
struct BackwardRows {
  const T *x[BLOCK], *dy[BLOCK], *residual[BLOCK], *branch[BLOCK];
  Moments m[BLOCK];
  float c1[BLOCK], c2[BLOCK];
};

template <class T, int ROWS, bool BRANCH, bool RESIDUAL>
DS_INLINE void backward_rows(
    const BackwardArgs& a, int64_t r, const BackwardRows<T>& in, const float* factor, const float* gate, float* sums) {
  const int64_t D = a.D;
  T* dx = (T*)a.dx + r * D;
  T* dbranch = (T*)a.dbranch + r * D;
  vf mean[ROWS], rstd[ROWS], c1[ROWS], c2[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    mean[i] = splat(in.m[i].mean);
    rstd[i] = splat(in.m[i].rstd);
    c1[i] = splat(in.m[i].rstd * in.c1[i]);
    c2[i] = splat(in.m[i].rstd * in.c2[i]);
  }
  for_row(D, [&](auto whole, int64_t d, int64_t n) {
    constexpr bool w = whole.value;
    vf s0{}, s1{}, s2{};
    for (int i = 0; i < ROWS; ++i) {
      const vf grad = get<w>(in.dy[i] + d, n), normed = (get<w>(in.x[i] + d, n) - mean[i]) * rstd[i];
      vf out = (grad * get<w>(factor + d, n)) * rstd[i] - c1[i] - normed * c2[i];
      if constexpr (RESIDUAL) out += get<w>(in.residual[i] + d, n);
      put<w>(dx + i * D + d, out, n);
      s0 += grad;
      s1 += grad * normed;
      if constexpr (BRANCH) {
        s2 += out * get<w>(in.branch[i] + d, n);
        put<w>(dbranch + i * D + d, out * get<w>(gate + d, n), n);
      }
    }
    if (sums != nullptr) {
      put<w>(sums + d, get<w>(sums + d, n) + s0, n);
      put<w>(sums + D + d, get<w>(sums + D + d, n) + s1, n);
      if constexpr (BRANCH) put<w>(sums + 2 * D + d, get<w>(sums + 2 * D + d, n) + s2, n);
    } else {  // per token, so ROWS is 1: the row's own products are the gradients
      put_modulation(a.dshift, a.modulation, r * D + d, s0, w, n);
      put_modulation(a.dscale, a.modulation, r * D + d, s1, w, n);
      if constexpr (BRANCH) put_modulation(a.dgate, a.modulation, r * D + d, s2, w, n);
    }
  });
}

template <class T, bool BRANCH, bool RESIDUAL>
void backward_blocks(const BackwardArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t D = a.D;
  Modulation scale{a.scale, a.modulation, D, a.scale_base, scratch}, gate{a.gate, a.modulation, D, 0.f, scratch + D};
  for (int64_t r = begin; r < end;) {
    const int64_t b = r / a.T, t = r % a.T, rows = block_rows(a.T, t, r, end, !a.per_token);
    const float *factor = scale(b, t), *g = BRANCH ? gate(b, t) : nullptr;
    BackwardRows<T> in;
    for (int64_t i = 0; i < rows; ++i) {
      in.x[i] = row_of<T>(a.x, b, t + i);
      in.dy[i] = row_of<T>(a.dy, b, t + i);
      in.residual[i] = RESIDUAL ? row_of<T>(a.dresidual, b, t + i) : nullptr;
      in.branch[i] = BRANCH ? row_of<T>(a.branch, b, t + i) : nullptr;
      in.m[i] = a.rstd != nullptr ? Moments{a.rms ? 0.f : a.mean[r + i], a.rstd[r + i]}
                                  : moments(in.x[i], D, a.eps, a.rms);
      backward_means(in.x[i], in.dy[i], factor, in.m[i], D, a.rms, &in.c1[i], &in.c2[i]);
    }
    if (rows == BLOCK) {
      backward_rows<T, BLOCK, BRANCH, RESIDUAL>(a, r, in, factor, g, sums);
    } else {
      backward_rows<T, 1, BRANCH, RESIDUAL>(a, r, in, factor, g, sums);
    }
    r += rows;
  }
}

// What the backward pass knows of a row before it writes its gradients.
template <class T>
struct BackwardRow {
  const T *x, *dy;
  const float* factor;
  Moments m;
  float c1, c2;
};

// The same past the caches: while a row's gradients are written, the next row's two means are made. As in forward_stream, one row
// at a time: with two or four, which share what is read of sums and modulation, memory is read in so many places at once that
// it came 8 (D = 1152) to 35 % (D = 384) slower.
template <class T, bool BRANCH, bool RESIDUAL>
void backward_stream(const BackwardArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t D = a.D;
  Modulation scales[2] = {
      {a.scale, a.modulation, D, a.scale_base, scratch}, {a.scale, a.modulation, D, a.scale_base, scratch + D}};
  Modulation gates{a.gate, a.modulation, D, 0.f, scratch + 2 * D};
  int64_t sample = begin / a.T;  // two factors are alive where rows have one each, or at the border of two samples
  int turn = 0;
  const auto row = [&](int64_t r) {
    const int64_t b = r / a.T, t = r % a.T;
    if (a.per_token || b != sample) turn ^= 1;
    sample = b;
    BackwardRow<T> row{row_of<T>(a.x, b, t), row_of<T>(a.dy, b, t), scales[turn](b, t), {}, 0.f, 0.f};
    row.m = a.rstd != nullptr ? Moments{a.rms ? 0.f : a.mean[r], a.rstd[r]} : moments(row.x, D, a.eps, a.rms);
    return row;
  };
  BackwardRow<T> now = row(begin);
  backward_means(now.x, now.dy, now.factor, now.m, D, a.rms, &now.c1, &now.c2);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / a.T, t = r % a.T;
    const bool more = r + 1 < end;
    BackwardRow<T> next = more ? row(r + 1) : now;
    const T* residual = RESIDUAL ? row_of<T>(a.dresidual, b, t) : nullptr;
    const T* branch = BRANCH ? row_of<T>(a.branch, b, t) : nullptr;
    const float* gate = BRANCH ? gates(b, t) : nullptr;
    T *dx = (T*)a.dx + r * D, *dbranch = (T*)a.dbranch + r * D;
    const vf mean = splat(now.m.mean), rstd = splat(now.m.rstd), next_mean = splat(next.m.mean);
    const vf c1 = splat(now.m.rstd * now.c1), c2 = splat(now.m.rstd * now.c2);
    vf a1[LANES] = {}, a2[LANES] = {};
    const auto step = [&](auto count, int64_t d0) {
      constexpr int U = count.count;
      for (int u = 0; more && u < U; ++u) {
        const int64_t d = d0 + u * W;
        const int lane = U == LANES ? u : 0;  // as in backward_means
        if (u % LINE<T> == 0) {
          prefetch(next.dy + d);
          prefetch(next.x + d);
        }
        const vf g = load(next.dy + d) * load(next.factor + d);
        a1[lane] += g;
        a2[lane] += g * (load(next.x + d) - next_mean);
      }
      vf out[U];
      for (int u = 0; u < U; ++u) {
        const int64_t d = d0 + u * W;
        if (u % LINE<T> == 0) {
          if constexpr (RESIDUAL) prefetch(residual + d);
          if constexpr (BRANCH) prefetch(branch + d);
        }
        const vf grad = load(now.dy + d), normed = (load(now.x + d) - mean) * rstd;
        out[u] = (grad * load(now.factor + d)) * rstd - c1 - normed * c2;
        if constexpr (RESIDUAL) out[u] += load(residual + d);
        stream(dx + d, out[u]);
        const vf dscale = grad * normed, dgate = BRANCH ? out[u] * load(branch + d) : vf{};
        if (sums != nullptr) {
          store(sums + d, load(sums + d) + grad);
          store(sums + D + d, load(sums + D + d) + dscale);
          if constexpr (BRANCH) store(sums + 2 * D + d, load(sums + 2 * D + d) + dgate);
        } else {
          put_modulation(a.dshift, a.modulation, r * D + d, grad, true, W);
          put_modulation(a.dscale, a.modulation, r * D + d, dscale, true, W);
          if constexpr (BRANCH) put_modulation(a.dgate, a.modulation, r * D + d, dgate, true, W);
        }
      }
      for (int u = 0; BRANCH && u < U; ++u) {
        const int64_t d = d0 + u * W;
        stream(dbranch + d, out[u] * load(gate + d));
      }
    };
    int64_t d = 0;
    for (; d + LANES * W <= D; d += LANES * W) step(vectors_t<LANES>{}, d);
    for (; d < D; d += LINE<T> * W) step(vectors_t<LINE<T>>{}, d);
    next.c1 = a.rms ? 0.f : sum((a1[0] + a1[1]) + (a1[2] + a1[3])) / (float)D;
    next.c2 = next.m.rstd * (sum((a2[0] + a2[1]) + (a2[2] + a2[3])) / (float)D);
    now = next;
  }
  end_stream();
}

template <class T>
void backward(const BackwardArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const bool branch = a.branch.data != nullptr, residual = a.dresidual.data != nullptr;
  if (a.stream) {
    if (branch && residual) return backward_stream<T, true, true>(a, begin, end, sums, scratch);
    if (branch) return backward_stream<T, true, false>(a, begin, end, sums, scratch);
    return backward_stream<T, false, false>(a, begin, end, sums, scratch);
  }
  if (branch && residual) return backward_blocks<T, true, true>(a, begin, end, sums, scratch);
  if (branch) return backward_blocks<T, true, false>(a, begin, end, sums, scratch);
  backward_blocks<T, false, false>(a, begin, end, sums, scratch);
}

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

// e^x for |x| < 87: x = k ln 2 + r, |r| <= ln 2 / 2, polynomial of degree 6. Relative error below 2 ulp.
DS_INLINE vf exp_of(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * splat(1.44269504088896341f) + magic;
  const vf k = shifted - magic;
  vf r = x - k * splat(0.693359375f);
  r = r - k * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  const vf e = p * r * r + r + splat(1.0f);
  return e * (vf)(((vi)shifted - (vi)magic + 127) << 23);
}

// gelu(z) = z * sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3): the tanh form, since (1 + tanh(v / 2)) / 2 = sigmoid(v).
constexpr float GELU_A = 1.59576912160573071f, GELU_B = 0.044715f;

// q is z inside +-9.98, where e^-v is a normal number; beyond, sigmoid is 1 in float32, or below 2e-38.
struct Gelu {
  vf z, q, square, e;  // e = e^-v
  DS_INLINE vf value() const {
    return greater(q, z) / (splat(1.f) + e);
  }
  // sigmoid + q sigmoid (1 - sigmoid) dv/dq. 1 - sigmoid is e sigmoid: a subtraction would leave its rounding.
  DS_INLINE vf slope() const {
    const vf s = splat(1.f) / (splat(1.f) + e);
    return s + (q * s) * (e * s) * (splat(GELU_A) + splat(3.0f * GELU_A * GELU_B) * square);
  }
};

DS_INLINE Gelu gelu_of(vf z) {
  const vf q = lesser(splat(9.98f), greater(splat(-9.98f), z)), square = q * q;
  return {z, q, square, exp_of(q * (splat(-GELU_A) - splat(GELU_A * GELU_B) * square))};
}

template <class T>
void gelu(const GeluArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = a.D;
  const Strided view{a.bias, 0, 0};
  const float* bias = modulation_row(view, a.modulation, 0, 0, D, 0.f, scratch);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x + r * a.x_stride;
    T* y = (T*)a.out + r * D;
    for_vectors<LINE<T>>(D, [&](auto v, int64_t d0, int64_t n) {
      prefetch(x + d0);
      each<v.count>([&](auto u) {
        const int64_t d = d0 + u * W;
        v.template put<false>(y + d, gelu_of(v.get(x + d, n) + v.get(bias + d, n)).value(), n);
      });
    });
  }
}

template <class T>
void gelu_backward(const GeluArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t D = a.D;
  const Strided view{a.bias, 0, 0};
  const float* bias = modulation_row(view, a.modulation, 0, 0, D, 0.f, scratch);
  for (int64_t r = begin; r < end; ++r) {
    const T *x = (const T*)a.x + r * a.x_stride, *dy = (const T*)a.dy + r * a.dy_stride;
    T* dx = (T*)a.out + r * D;
    for_vectors<LINE<T>>(D, [&](auto v, int64_t d0, int64_t n) {
      prefetch(x + d0);
      prefetch(dy + d0);
      each<v.count>([&](auto u) {
        const int64_t d = d0 + u * W;
        const vf grad = v.get(dy + d, n) * gelu_of(v.get(x + d, n) + v.get(bias + d, n)).slope();
        v.template put<false>(dx + d, grad, n);
        v.template put<false>(sums + d, v.get(sums + d, n) + grad, n);
      });
    });
  }
}

// Whole lines of a chunk at a time: chunks may lie a page apart, where every one of them is in the same place of the caches.
void add_chunks(const float* partial, int64_t chunks, int64_t step, int64_t D, int storage, void* out) {
  for_vectors<4>(D, [&](auto v, int64_t d0, int64_t n) {
    vd total[v.count];  // float64: thousands of chunks add no error of their own
    each<v.count>([&](auto u) { total[u] = vd{}; });
    for (int64_t c = 0; c < chunks; ++c) {
      each<v.count>([&](auto u) {
        total[u] += __builtin_convertvector(v.get(partial + c * step + d0 + u * W, n), vd);
      });
    }
    each<v.count>([&](auto u) {
      put_modulation(out, storage, d0 + u * W, __builtin_convertvector(total[u], vf), v.whole, n);
    });
  });
}

template <class T>
constexpr AdalnKernels kernels() {
  return {forward<T>, backward<T>, residual<T>, residual_backward<T>, gelu<T>, gelu_backward<T>, add_chunks};
}

}  // namespace
}  // namespace ditscale::cpu
