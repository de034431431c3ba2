// Vectors of several widths over float32 in memory, beside the one width of vec.h.
#pragma once

#include "vec.h"

namespace ditscale::cpu {
namespace {

typedef float v1 __attribute__((vector_size(4)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));

template <class V>
struct in_memory {
  typedef V type __attribute__((aligned(4), may_alias));
};
template <class V>
DS_INLINE V get_at(const float* p) {
  return *(const typename in_memory<V>::type*)p;
}
template <class V>
DS_INLINE void put_at(float* p, V a) {
  *(typename in_memory<V>::type*)p = a;
}
template <class V>
constexpr int lanes_of = sizeof(V) / 4;

// body(V{}, i) over [0, n) in the widest vectors that fit: whole registers first, single numbers last.
template <class F>
DS_INLINE void for_span(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(vf{}, i);
  if constexpr (W > 8) {
    for (; i + 8 <= n; i += 8) body(v8{}, i);
  }
  if constexpr (W > 4) {
    for (; i + 4 <= n; i += 4) body(v4{}, i);
  }
  for (; i < n; ++i) body(v1{}, i);
}

// A sum over a row in vectors of every width, each kept apart until the end.
struct Total {
  vf whole{};
#if defined(__AVX512F__)
  v8 eight{};
#endif
  v4 four{};
  float one = 0.f;

  template <class V>
  DS_INLINE void add(V a) {
    if constexpr (lanes_of<V> == W) {
      whole += a;
#if defined(__AVX512F__)
    } else if constexpr (lanes_of<V> == 8) {
      eight += a;
#endif
    } else if constexpr (lanes_of<V> == 4) {
      four += a;
    } else {
      one += a[0];
    }
  }

  DS_INLINE float get() const {
#if defined(__AVX512F__)
    const v8 half = eight + (v8)_mm512_castps512_ps256((__m512)whole) + (v8)_mm512_extractf32x8_ps((__m512)whole, 1);
    const v4 quarter = four + (v4)_mm256_castps256_ps128((__m256)half) + (v4)_mm256_extractf128_ps((__m256)half, 1);
#elif defined(__AVX2__)
    const v4 quarter = four + (v4)_mm256_castps256_ps128((__m256)whole) + (v4)_mm256_extractf128_ps((__m256)whole, 1);
#else
    const v4 quarter = four + (v4)whole;
#endif
    return ((quarter[0] + quarter[2]) + (quarter[1] + quarter[3])) + one;
  }
};

}  // namespace
}  // namespace ditscale::cpu
