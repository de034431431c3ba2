// Clipping, AdamW and the weights' moving average in one pass: five numbers read and four written a weight, where passes of their own
// read seven and write five.
#include "adamw_rows.h"
#include "vec.h"

namespace ditscale::cpu {
namespace {

DS_INLINE vf root(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps(ALL, (__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

// Of the way between two numbers a share. From the nearer end, as PyTorch: a share of 1 gives the end itself.
DS_INLINE vf between(vf from, vf to, float share, float rest) {
  return share < 0.5f ? from + share * (to - from) : to - rest * (to - from);
}

// A number is the same wherever it stands: the rest of a row takes the steps of whole vectors.
void adamw_step(const AdamwArgs& a, int64_t begin, int64_t end) {
  for_row(end - begin, [&](auto whole, int64_t i, int64_t n) {
    constexpr bool WHOLE = decltype(whole)::value;
    i += begin;
    const vf gradient = get<WHOLE>(a.gradient + i, n) * a.clip;
    vf first = get<WHOLE>(a.first + i, n), second = get<WHOLE>(a.second + i, n), weight = get<WHOLE>(a.weight + i, n);
    first = between(first, gradient, a.rest1, a.beta1);
    second = a.beta2 * second + a.rest2 * gradient * gradient;
    weight = a.keep * weight - a.rate * (first / (root(second) * a.correction + a.eps));
    put<WHOLE>(a.first + i, first, n);
    put<WHOLE>(a.second + i, second, n);
    put<WHOLE>(a.weight + i, weight, n);
    if (a.average == nullptr) return;
    const vf average = get<WHOLE>(a.average + i, n);
    put<WHOLE>(a.average + i, between(average, weight, a.share, a.decay), n);
  });
}

constexpr AdamwKernels adamw_kernels() {
  return {adamw_step};
}

}  // namespace
}  // namespace ditscale::cpu
