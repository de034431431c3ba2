// (gate * branch +) residual, norm and modulation, backward.
#pragma once

#include "adaln_modulation.h"
#include "adaln_moments.h"

namespace ditscale::cpu {
namespace {

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

}  // namespace
}  // namespace ditscale::cpu
