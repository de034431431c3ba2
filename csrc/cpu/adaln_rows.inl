// The adaLN family over rows, written once for every instruction set. Mathematics: docs/kernels.md.
#include "adaln_rows.h"
#include "vec.h"

namespace ditscale::cpu {
namespace {

template <class T>
DS_INLINE const T* row_of(const Strided& v, int64_t b, int64_t t) {
  return (const T*)v.data + b * v.b + t * v.t;
}

// A row of modulation as float32: where it is stored, or converted into `scratch`.
template <class T>
DS_INLINE const float* widen(const T* p, int64_t D, float* scratch) {
  for_row(D, [&](auto whole, int64_t d, int64_t n) { put<whole.value>(scratch + d, get<whole.value>(p + d, n), n); });
  return scratch;
}
DS_INLINE const float* modulation_row(const Strided& m, int storage, int64_t b, int64_t t, int64_t D, float* scratch) {
  if (storage == 0) return row_of<float>(m, b, t);
  if (storage == 1) return widen(row_of<bf16>(m, b, t), D, scratch);
  return widen(row_of<f16>(m, b, t), D, scratch);
}

// The float32 rows of a call's modulation, fetched again only where the sample (or, per token, the row) changes.
struct Modulation {
  const Strided& view;
  int storage;
  int64_t D;
  float* scratch;
  const void* at = nullptr;
  const float* row = nullptr;
  DS_INLINE const float* operator()(int64_t b, int64_t t) {
    const int64_t size = storage == 0 ? 4 : 2;
    const void* want = (const char*)view.data + (b * view.b + t * view.t) * size;
    if (want != at) {
      at = want;
      row = modulation_row(view, storage, b, t, D, scratch);
    }
    return row;
  }
};

struct Moments {
  float mean, rstd;
};

DS_INLINE float inverse_root(float a) {
  return 1.0f / __builtin_sqrtf(a);
}

constexpr int LANES = 4;  // independent sums, so that additions do not wait for one another

template <class T>
DS_INLINE float row_sum(const T* x, int64_t D) {
  vf acc[LANES] = {};
  int64_t d = 0;
  for (; d + LANES * W <= D; d += LANES * W) {
    for (int k = 0; k < LANES; ++k) acc[k] += load(x + d + k * W);
  }
  for (; d + W <= D; d += W) acc[0] += load(x + d);
  if (d < D) acc[1] += load_part(x + d, D - d, 0.f);
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

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

// Two passes over a row that the first one brings into the level-1 cache, exact where a one-pass formula cancels; what the
// second one finds left of the mean corrects it, so that a constant row is centred to zeros.
template <class T>
DS_INLINE Moments moments(const T* x, int64_t D, float eps, bool rms) {
  const float n = (float)D, about = rms ? 0.f : row_sum(x, D) / n;
  const Centred c = row_centred(x, D, about);
  if (rms) return {0.f, inverse_root(c.squares / n + eps)};
  const float shift = c.sum / n, variance = c.squares / n - shift * shift;
  return {about + shift, inverse_root((variance > 0.f || variance != variance ? variance : 0.f) + eps)};
}

template <class T>
void forward(const ForwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (begin >= end) return;
  const int64_t D = a.D;
  Modulation shift{a.shift, a.modulation, D, scratch}, scale{a.scale, a.modulation, D, scratch + D};
  Modulation gate{a.gate, a.modulation, D, scratch + 2 * D};
  const vf base = splat(a.scale_base);
  int64_t b = begin / a.T, t = begin % a.T;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row_of<T>(a.x, b, t);
    if (a.branch.data != nullptr) {
      const T* branch = row_of<T>(a.branch, b, t);
      const float* g = gate(b, t);
      T* out = (T*)a.x_new + r * D;
      for_row(D, [&](auto whole, int64_t d, int64_t n) {
        constexpr bool w = whole.value;
        put<w>(out + d, get<w>(x + d, n) + get<w>(g + d, n) * get<w>(branch + d, n), n);
      });
      x = out;
    }
    const Moments m = moments(x, D, a.eps, a.rms);
    if (a.rstd != nullptr) {
      a.mean[r] = m.mean;
      a.rstd[r] = m.rstd;
    }
    const float *sh = shift(b, t), *sc = scale(b, t);
    T* y = (T*)a.y + r * D;
    const vf mean = splat(m.mean), rstd = splat(m.rstd);
    for_row(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool w = whole.value;
      const vf normed = (get<w>(x + d, n) - mean) * rstd;
      put<w>(y + d, normed * (base + get<w>(sc + d, n)) + get<w>(sh + d, n), n);
    });
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
}

template <class M>
DS_INLINE void put_any(M* p, int64_t, vf v, bool whole, int64_t n) {
  if (whole) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}
DS_INLINE void put_modulation(void* p, int storage, int64_t i, vf v, bool whole, int64_t n) {
  if (storage == 0) {
    put_any((float*)p + i, 0, v, whole, n);
  } else if (storage == 1) {
    put_any((bf16*)p + i, 0, v, whole, n);
  } else {
    put_any((f16*)p + i, 0, v, whole, n);
  }
}

// One row's two means of the norm's backward pass, g = dy * (base + scale): mean(g) and mean(g * normalised).
template <class T>
DS_INLINE void backward_means(
    const T* x, const T* dy, const float* sc, float base, Moments m, int64_t D, bool rms, float* c1, float* c2) {
  vf a1[2] = {}, a2[2] = {};
  const vf mean = splat(m.mean), rstd = splat(m.rstd), one = splat(base);
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    for (int k = 0; k < 2; ++k) {
      const vf g = load(dy + d + k * W) * (one + load(sc + d + k * W));
      a1[k] += g;
      a2[k] += g * ((load(x + d + k * W) - mean) * rstd);
    }
  }
  for (; d < D; d += W) {
    const bool whole = d + W <= D;
    const int64_t n = D - d;
    const vf g = (whole ? load(dy + d) : load_part(dy + d, n, 0.f)) *
        (one + (whole ? load(sc + d) : load_part(sc + d, n, 0.f)));
    a1[0] += g;
    a2[0] += g * (((whole ? load(x + d) : load_part(x + d, n, m.mean)) - mean) * rstd);
  }
  *c1 = rms ? 0.f : sum(a1[0] + a1[1]) / (float)D;
  *c2 = sum(a2[0] + a2[1]) / (float)D;
}

// ROWS rows at once, so that the sums over tokens are read and written once for all of them.
template <class T, int ROWS, bool BRANCH, bool RESIDUAL>
DS_INLINE void backward_rows(
    const BackwardArgs& a, int64_t r, const T* const* x, const T* const* dy, const T* const* residual,
    const T* const* branch, const Moments* m, const float* c1, const float* c2, const float* sc, const float* gate,
    float* sums) {
  const int64_t D = a.D;
  const vf base = splat(a.scale_base);
  T* dx = (T*)a.dx + r * D;
  T* dbranch = (T*)a.dbranch + r * D;
  for_row(D, [&](auto whole, int64_t d, int64_t n) {
    constexpr bool w = whole.value;
    const vf factor = base + get<w>(sc + d, n);
    vf s0{}, s1{}, s2{};
    for (int i = 0; i < ROWS; ++i) {
      const vf grad = get<w>(dy[i] + d, n);
      const vf normed = (get<w>(x[i] + d, n) - splat(m[i].mean)) * splat(m[i].rstd);
      vf out = splat(m[i].rstd) * (grad * factor - splat(c1[i]) - normed * splat(c2[i]));
      if constexpr (RESIDUAL) out += get<w>(residual[i] + d, n);
      put<w>(dx + i * D + d, out, n);
      s0 += grad;
      s1 += grad * normed;
      if constexpr (BRANCH) {
        const vf value = get<w>(branch[i] + d, n);
        put<w>(dbranch + i * D + d, out * get<w>(gate + d, n), n);
        s2 += out * value;
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
void backward_as(const BackwardArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  constexpr int BLOCK = 4;
  const int64_t D = a.D;
  Modulation scale{a.scale, a.modulation, D, scratch}, gate{a.gate, a.modulation, D, scratch + D};
  int64_t r = begin;
  while (r < end) {
    const int64_t b = r / a.T, t = r % a.T;
    // Rows of one block share their modulation: they stay within a sample.
    int64_t rows = a.per_token ? 1 : a.T - t;
    if (rows > end - r) rows = end - r;
    rows = rows >= BLOCK ? BLOCK : 1;
    const float *sc = scale(b, t), *g = BRANCH ? gate(b, t) : nullptr;
    const T *x[BLOCK], *dy[BLOCK], *residual[BLOCK], *branch[BLOCK];
    Moments m[BLOCK];
    float c1[BLOCK], c2[BLOCK];
    for (int64_t i = 0; i < rows; ++i) {
      x[i] = row_of<T>(a.x, b, t + i);
      dy[i] = row_of<T>(a.dy, b, t + i);
      if constexpr (RESIDUAL) residual[i] = row_of<T>(a.dresidual, b, t + i);
      if constexpr (BRANCH) branch[i] = row_of<T>(a.branch, b, t + i);
      m[i] = a.rstd != nullptr ? Moments{a.rms ? 0.f : a.mean[r + i], a.rstd[r + i]} : moments(x[i], D, a.eps, a.rms);
      backward_means(x[i], dy[i], sc, a.scale_base, m[i], D, a.rms, &c1[i], &c2[i]);
    }
    if (rows == BLOCK) {
      backward_rows<T, BLOCK, BRANCH, RESIDUAL>(a, r, x, dy, residual, branch, m, c1, c2, sc, g, sums);
    } else {
      backward_rows<T, 1, BRANCH, RESIDUAL>(a, r, x, dy, residual, branch, m, c1, c2, sc, g, sums);
    }
    r += rows;
  }
}

template <class T>
void backward(const BackwardArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const bool branch = a.branch.data != nullptr, residual = a.dresidual.data != nullptr;
  if (branch && residual) {
    backward_as<T, true, true>(a, begin, end, sums, scratch);
  } else if (branch) {
    backward_as<T, true, false>(a, begin, end, sums, scratch);
  } else {
    backward_as<T, false, false>(a, begin, end, sums, scratch);
  }
}

template <class T>
void residual(const ResidualArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (begin >= end) return;
  const int64_t D = a.D;
  Modulation gate{a.gate, a.modulation, D, scratch};
  int64_t b = begin / a.T, t = begin % a.T;
  for (int64_t r = begin; r < end; ++r) {
    const T *x = row_of<T>(a.x, b, t), *branch = row_of<T>(a.branch, b, t);
    const float* g = gate(b, t);
    T* out = (T*)a.out + r * D;
    for_row(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool w = whole.value;
      put<w>(out + d, get<w>(x + d, n) + get<w>(g + d, n) * get<w>(branch + d, n), n);
    });
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
}

template <class T>
void residual_backward(const ResidualArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t D = a.D;
  Modulation gate{a.gate, a.modulation, D, scratch};
  if (begin >= end) return;
  int64_t b = begin / a.T, t = begin % a.T;
  for (int64_t r = begin; r < end; ++r) {
    const T *dout = row_of<T>(a.x, b, t), *branch = row_of<T>(a.branch, b, t);
    const float* g = gate(b, t);
    T* dbranch = (T*)a.out + r * D;
    for_row(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool w = whole.value;
      const vf grad = get<w>(dout + d, n);
      const vf dgate = grad * get<w>(branch + d, n);
      put<w>(dbranch + d, grad * get<w>(g + d, n), n);
      if (sums != nullptr) {
        put<w>(sums + d, get<w>(sums + d, n) + dgate, n);
      } else {
        put_modulation(a.dgate, a.modulation, r * D + d, dgate, w, n);
      }
    });
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
}

// exp by powers of two: x = k ln 2 + r, |r| <= ln 2 / 2, polynomial of degree 6. Inputs are clamped to where the result is a
// normal number; NaN passes. Relative error below 2 ulp.
DS_INLINE vf exp_of(vf x) {
  const vf lo = splat(-87.0f), hi = splat(88.0f);
  vf c = pick(x < lo, lo, x);
  c = pick(c > hi, hi, c);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = c * splat(1.44269504088896341f) + magic;
  const vf k = shifted - magic;
  vf r = c - k * splat(0.693359375f);
  r = r - k * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  const vf e = p * r * r + r + splat(1.0f);
  const vi bits = ((vi)shifted - (vi)magic) << 23;
  return (vf)((vi)e + bits);
}

// gelu(z) = z * sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3): the tanh form, since (1 + tanh(v / 2)) / 2 = sigmoid(v).
constexpr float GELU_A = 1.59576912160573071f, GELU_B = 0.044715f;

// sigmoid(v) and 1 - sigmoid(v), both from exp(-|v|), so that the smaller one is not what a subtraction leaves: its
// rounding would come back multiplied by the slope of v.
struct Gelu {
  vf z;     // q is z inside [-20, 20], beyond which sigmoid is 0 or 1 in float32: z^3 cannot overflow
  vf q, s, rest;
  DS_INLINE vf value() const {
    return pick(z > q, z, q) * s;
  }
  DS_INLINE vf slope() const {
    return s + q * (s * rest) * (splat(GELU_A) + splat(3.0f * GELU_A * GELU_B) * q * q);
  }
};

DS_INLINE Gelu gelu_of(vf z) {
  const vf hi = splat(20.f), lo = splat(-20.f), one = splat(1.f);
  const vf q = pick(z > hi, hi, pick(z < lo, lo, z));
  const vf v = q * (splat(GELU_A) + splat(GELU_A * GELU_B) * q * q);
  const vf minus = pick(v > vf{}, -v, v);  // -|v|
  const vf e = pick(minus < splat(-87.f), vf{}, exp_of(minus));
  const vf large = one / (one + e), small = e * large;
  const vi positive = v > vf{};
  return {z, q, pick(positive, large, small), pick(positive, small, large)};
}

template <class T>
void gelu(const GeluArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = a.D;
  const Strided view{a.bias, 0, 0};
  const float* bias = modulation_row(view, a.modulation, 0, 0, D, scratch);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = (const T*)a.x + r * a.x_stride;
    T* y = (T*)a.out + r * D;
    for_row(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool w = whole.value;
      const vf z = get<w>(x + d, n) + get<w>(bias + d, n);
      put<w>(y + d, gelu_of(z).value(), n);
    });
  }
}

template <class T>
void gelu_backward(const GeluArgs& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const int64_t D = a.D;
  const Strided view{a.bias, 0, 0};
  const float* bias = modulation_row(view, a.modulation, 0, 0, D, scratch);
  for (int64_t r = begin; r < end; ++r) {
    const T *x = (const T*)a.x + r * a.x_stride, *dy = (const T*)a.dy + r * a.dy_stride;
    T* dx = (T*)a.out + r * D;
    for_row(D, [&](auto whole, int64_t d, int64_t n) {
      constexpr bool w = whole.value;
      const vf z = get<w>(x + d, n) + get<w>(bias + d, n);
      const vf grad = get<w>(dy + d, n) * gelu_of(z).slope();
      put<w>(dx + d, grad, n);
      put<w>(sums + d, get<w>(sums + d, n) + grad, n);
    });
  }
}

void add_chunks(const float* partial, int64_t chunks, int64_t step, int64_t D, int storage, void* out) {
  for_row(D, [&](auto whole, int64_t d, int64_t n) {
    constexpr bool w = whole.value;
    vd total{};  // float64: thousands of chunks add no error of their own
    for (int64_t c = 0; c < chunks; ++c) total += __builtin_convertvector(get<w>(partial + c * step + d, n), vd);
    put_modulation(out, storage, d, __builtin_convertvector(total, vf), w, n);
  });
}

template <class T>
constexpr AdalnKernels kernels() {
  return {forward<T>, backward<T>, residual<T>, residual_backward<T>, gelu<T>, gelu_backward<T>, add_chunks};
}

}  // namespace
}  // namespace ditscale::cpu
