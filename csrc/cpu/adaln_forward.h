// (gate * branch +) residual, norm and modulation, forward.
#pragma once

#include "adaln_modulation.h"
#include "adaln_moments.h"

namespace ditscale::cpu {
namespace {

template <bool, class A, class B>
struct type_if {
  typedef A type;
};
template <class A, class B>
struct type_if<false, A, B> {
  typedef B type;
};

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

}  // namespace
}  // namespace ditscale::cpu
