// Bias and GELU in its tanh form, forward and backward.
#pragma once

#include "adaln_modulation.h"

namespace ditscale::cpu {
namespace {

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

}  // namespace
}  // namespace ditscale::cpu
