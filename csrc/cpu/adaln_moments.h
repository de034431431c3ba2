// Mean and inverse deviation of a row in one pass.
#pragma once

#include "vec.h"

namespace ditscale::cpu {
namespace {

struct Moments {
  float mean, rstd;
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

}  // namespace
}  // namespace ditscale::cpu
