// Vectors of float32 in the compiler's own notation (GCC and Clang), as wide as the unit's flags allow, and their loads
// and stores from float32, bfloat16 and float16. Each instruction set is a translation unit of its own that includes this
// header inside its own namespace, and nothing of the standard library: an inline function compiled with AVX-512 could
// otherwise be the one copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ditscale::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef double vd __attribute__((vector_size(8 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef vf vf_at __attribute__((aligned(4), may_alias));
typedef vh vh_at __attribute__((aligned(2), may_alias));

#define DS_INLINE inline __attribute__((always_inline))
#define DS_CALLED inline __attribute__((noinline))

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DS_INLINE vf splat(float a) {
  return a - vf{};  // the compiler knows that this is a; of vf{} + a it does not, for a may be -0
}

// a where mask is all ones, else b.
DS_INLINE vf pick(vi mask, vf a, vf b) {
  return mask ? a : b;
}

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xFFFF;  // the unmasked intrinsics start from an undefined register, which GCC warns of
#endif

// The greater or lesser of two; the second where either is NaN.
DS_INLINE vf greater(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(ALL, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return pick(a > b, a, b);
#endif
}
DS_INLINE vf lesser(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(ALL, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return pick(a < b, a, b);
#endif
}

// 16-bit words as 32-bit ones and back: what the compiler makes of __builtin_convertvector takes each word on its own.
#if defined(__AVX512F__)
DS_INLINE vu widen_words(vh h) {
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
}
DS_INLINE vh narrow_words(vu u) {
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
}
#elif defined(__AVX2__)
DS_INLINE vu widen_words(vh h) {
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
}
DS_INLINE vh narrow_words(vu u) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
#else
DS_INLINE vu widen_words(vh h) {
  return __builtin_convertvector(h, vu);
}
DS_INLINE vh narrow_words(vu u) {
  return __builtin_convertvector(u, vh);
}
#endif

DS_INLINE vf bf16_to_float(vh h) {
  return (vf)(widen_words(h) << 16);
}

// Round to nearest, ties to even; any NaN is PyTorch's (the rounding carry could make it an infinity).
DS_INLINE vh float_to_bf16(vf a) {
  const vu u = (vu)a;
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return narrow_words(a != a ? vu{} + 0x7FC0u : rounded);
}

#if defined(__AVX512F__)
DS_INLINE vf f16_to_float(vh h) {
  return (vf)_mm512_cvtph_ps((__m256i)h);
}
DS_INLINE vh float_to_f16(vf a) {
  return (vh)_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
DS_INLINE vf f16_to_float(vh h) {
  return (vf)_mm256_cvtph_ps((__m128i)h);
}
DS_INLINE vh float_to_f16(vf a) {
  return (vh)_mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Without the instruction: exponents are moved by multiplying with powers of two, which also makes subnormals right.
DS_INLINE vf f16_to_float(vh h) {
  const vu bits = widen_words(h);
  const vu sign = (bits & 0x8000u) << 16, body = (bits & 0x7FFFu) << 13;
  const vf magnitude = (vf)body * splat(0x1p112f);
  const vu special = (vu)(body >= (vu{} + 0x0F800000u));  // infinity and NaN keep the full exponent
  return (vf)(sign | (special & (body | 0x7F800000u)) | (~special & (vu)magnitude));
}
DS_INLINE vh float_to_f16(vf a) {
  const vu u = (vu)a, sign = (u >> 16) & 0x8000u, mag = u & 0x7FFFFFFFu;
  // Normal results: round the mantissa to 10 bits, rebias. Subnormal ones: adding 0.5 lets the adder round them.
  const vu normal = (mag - 0x38000000u + 0xFFFu + ((mag >> 13) & 1u)) >> 13;
  const vu small = (vu)((vf)mag + splat(0.5f)) - 0x3F000000u;
  const vu is_small = (vu)(mag < (vu{} + 0x38800000u));
  const vu is_large = (vu)(mag >= (vu{} + 0x477FF000u));  // rounds to 65536 or more
  const vu is_nan = (vu)(mag > (vu{} + 0x7F800000u));
  vu out = (is_small & small) | (~is_small & normal);
  out = (is_large & (vu{} + 0x7C00u)) | (~is_large & out);
  out = (is_nan & (((mag >> 13) & 0x3FFu) | 0x7E00u)) | (~is_nan & out);
  return narrow_words(out | sign);
}
#endif

// A number as memory holds it, and back.
DS_INLINE vf bits_of(vf a, const float*) {
  return a;
}
DS_INLINE vh bits_of(vf a, const bf16*) {
  return float_to_bf16(a);
}
DS_INLINE vh bits_of(vf a, const f16*) {
  return float_to_f16(a);
}
DS_INLINE vf value_of(vf bits, const float*) {
  return bits;
}
DS_INLINE vf value_of(vh bits, const bf16*) {
  return bf16_to_float(bits);
}
DS_INLINE vf value_of(vh bits, const f16*) {
  return f16_to_float(bits);
}
DS_INLINE void store_bits(void* p, vf bits) {
  *(vf_at*)p = bits;
}
DS_INLINE void store_bits(void* p, vh bits) {
  *(vh_at*)p = bits;
}

DS_INLINE vf load(const float* p) {
  return *(const vf_at*)p;
}
template <class T>
DS_INLINE vf load(const T* p) {
  return value_of(*(const vh_at*)p, p);
}
template <class T>
DS_INLINE void store(T* p, vf a) {
  store_bits(p, bits_of(a, p));
}

// Vectors of a cache line.
template <class T>
constexpr int LINE = 64 / (int)sizeof(T) / W;

// Stores that go past the caches, so that a line is not read before it is overwritten: to addresses that are multiples of the
// vector, the whole of a line one after another, and `end_stream` before another thread may read.
#if defined(__AVX512F__)
DS_INLINE void stream_bits(void* p, vf bits) {
  _mm512_stream_ps((float*)p, (__m512)bits);
}
DS_INLINE void stream_bits(void* p, vh bits) {
  _mm256_stream_si256((__m256i*)p, (__m256i)bits);
}
DS_INLINE void end_stream() {
  _mm_sfence();
}
#elif defined(__AVX2__)
DS_INLINE void stream_bits(void* p, vf bits) {
  _mm256_stream_ps((float*)p, (__m256)bits);
}
DS_INLINE void stream_bits(void* p, vh bits) {
  _mm_stream_si128((__m128i*)p, (__m128i)bits);
}
DS_INLINE void end_stream() {
  _mm_sfence();
}
#else
template <class BITS>
DS_INLINE void stream_bits(void* p, BITS bits) {
  store_bits(p, bits);
}
DS_INLINE void end_stream() {}
#endif
template <class T>
DS_INLINE void stream(T* p, vf a) {
  stream_bits(p, bits_of(a, p));
}
// Bytes of which there is a multiple of 16, to an address that is a multiple of the largest of 16, 32 and 64 that divides them.
DS_INLINE void stream_bytes(void* to, const void* from, int64_t bytes) {
#if defined(__AVX2__)
  char* p = (char*)to;
  const char* q = (const char*)from;
#if defined(__AVX512F__)
  if (bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)(p + i), _mm512_loadu_si512(q + i));
    return;
  }
#endif
  if (bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32) _mm256_stream_si256((__m256i*)(p + i), _mm256_loadu_si256((const __m256i*)(q + i)));
    return;
  }
  for (int64_t i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i*)(p + i), _mm_loadu_si128((const __m128i*)(q + i)));
#else
  __builtin_memcpy(to, from, (unsigned long)bytes);
#endif
}

// The last n < W numbers of a row; the lanes beyond hold `fill`.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
DS_INLINE vf filled(vf a, __mmask16 lanes, float fill) {
  return fill == 0.f ? a : (vf)_mm512_mask_blend_ps(lanes, (__m512)splat(fill), (__m512)a);
}
DS_INLINE vf load_part(const float* p, int64_t n, float fill) {
  const __mmask16 lanes = (__mmask16)((1u << n) - 1u);
  return filled((vf)_mm512_maskz_loadu_ps(lanes, p), lanes, fill);
}
DS_INLINE void store_part(float* p, vf a, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)a);
}
DS_INLINE vf load_part(const bf16* p, int64_t n, float fill) {
  const __mmask16 lanes = (__mmask16)((1u << n) - 1u);
  return filled(bf16_to_float((vh)_mm256_maskz_loadu_epi16(lanes, p)), lanes, fill);
}
DS_INLINE void store_part(bf16* p, vf a, int64_t n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), (__m256i)float_to_bf16(a));
}
DS_INLINE vf load_part(const f16* p, int64_t n, float fill) {
  const __mmask16 lanes = (__mmask16)((1u << n) - 1u);
  return filled(f16_to_float((vh)_mm256_maskz_loadu_epi16(lanes, p)), lanes, fill);
}
DS_INLINE void store_part(f16* p, vf a, int64_t n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), (__m256i)float_to_f16(a));
}
#else
// Called: once a row at most, and a copy at every place doubles the time of the compile.
template <class T>
DS_CALLED vf load_part(const T* p, int64_t n, float fill) {
  T lane[W];
  for (int64_t i = 0; i < W; ++i) lane[i] = i < n ? p[i] : T{};
  vf a = load(lane);
  for (int64_t i = n; i < W; ++i) a[i] = fill;
  return a;
}
template <class T>
DS_CALLED void store_part(T* p, vf a, int64_t n) {
  T lane[W];
  store(lane, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}
#endif

template <int N>
struct count_t {
  static constexpr int value = N;
  constexpr operator int() const {
    return N;
  }
};

// body(count_t<0>{}) to body(count_t<N - 1>{}), for arrays that are to be registers: one that a loop counts through, or that is
// set to `= {}`, GCC keeps in memory, even where it unrolls the loop in the end.
template <int N, class F>
DS_INLINE void each(const F& body) {
  if constexpr (N > 0) {
    each<N - 1>(body);
    body(count_t<N - 1>{});
  }
}

// `load<true>` and `store<true>` are whole vectors, `<false>` the rest of a row, so that one body serves both.
template <bool WHOLE, class T>
DS_INLINE vf get(const T* p, int64_t n, float fill = 0.f) {
  if constexpr (WHOLE) return load(p);
  return load_part(p, n, fill);
}
template <bool WHOLE, class T>
DS_INLINE void put(T* p, vf a, int64_t n) {
  if constexpr (WHOLE) {
    store(p, a);
  } else {
    store_part(p, a, n);
  }
}

#if defined(__AVX512F__)
DS_INLINE float sum(vf a) {
  return _mm512_reduce_add_ps((__m512)a);
}
#elif defined(__AVX2__)
DS_INLINE float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
DS_INLINE float sum(vf a) {
  float lane[W];
  *(vf_at*)lane = a;
  for (int step = W / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}
#endif

template <bool B>
struct whole_t {
  static constexpr bool value = B;
};

// body(whole_t<true>, d, W) over the whole vectors of a row, then body(whole_t<false>, d, rest).
template <class F>
DS_INLINE void for_row(int64_t D, const F& body) {
  int64_t d = 0;
  for (; d + W <= D; d += W) body(whole_t<true>{}, d, (int64_t)W);
  if (d < D) body(whole_t<false>{}, d, D - d);
}

// N whole vectors, or for 0 the rest of a row that is less than one.
template <int N>
struct vectors_t {
  static constexpr int count = N > 0 ? N : 1;
  static constexpr bool whole = N > 0;
  template <class T>
  static DS_INLINE vf get(const T* p, int64_t n) {
    return cpu::get<whole>(p, n);
  }
  // `STREAM`: past the caches where this is a line of its own.
  template <bool STREAM, class T>
  static DS_INLINE void put(T* p, vf a, int64_t n) {
    if constexpr (STREAM && N == LINE<T>) {
      stream(p, a);
    } else {
      cpu::put<whole>(p, a, n);
    }
  }
  // Stores a; returns it as a load from there will.
  template <class T>
  static DS_INLINE vf put_back(T* p, vf a, int64_t n) {
    const auto bits = bits_of(a, p);
    if constexpr (whole) {
      store_bits(p, bits);
    } else {
      store_part(p, a, n);
    }
    return value_of(bits, p);
  }
};

// body(vectors_t<U>{}, d, n) over a row, U vectors at a time, then one at a time, then the rest of n < W.
template <int U, class F>
DS_INLINE void for_vectors(int64_t D, const F& body) {
  int64_t d = 0;
  for (; d + U * W <= D; d += U * W) body(vectors_t<U>{}, d, (int64_t)W);
  if constexpr (U > 1) {
    for (; d + W <= D; d += W) body(vectors_t<1>{}, d, (int64_t)W);
  }
  if (d < D) body(vectors_t<0>{}, d, D - d);
}

}  // namespace
}  // namespace ditscale::cpu
