// What the kernels of this folder share: storage conversions, 16-byte accesses and sums over a block. Plain CUDA, and with
// DITSCALE_HOST_SHIM plain C++ (host_shim.h), so that tests run the same source without a GPU.
#pragma once

#ifdef DITSCALE_HOST_SHIM
#include "host_shim.h"
#define DS_LAUNCH_SHARED(kernel, grid, block, shared, stream, ...) \
  ::ditscale::shim::launch(grid, block, shared, [=] { kernel(__VA_ARGS__); })
#else
#include <cuda_runtime_api.h>
#define DS_LAUNCH_SHARED(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
#define DS_LAUNCH(kernel, grid, block, stream, ...) DS_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

#include "../common/adaln_args.h"

#include <type_traits>

namespace ditscale::cuda {

// The shared memory that a launch asks for, on a 16-byte boundary.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef DITSCALE_HOST_SHIM
  return shim::dynamic_shared();
#else
  extern __shared__ uint4 bytes[];
  return reinterpret_cast<char*>(bytes);
#endif
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float a) {
  return a;
}
__device__ __forceinline__ float widen(bf16 a) {
  return __uint_as_float(static_cast<uint32_t>(a.bits) << 16);
}

#ifdef DITSCALE_HOST_SHIM
inline float widen(f16 a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16, exponent = (a.bits >> 10) & 31u, fraction = a.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | (fraction << 13));
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                        : __uint_as_float(((exponent + 112) << 23) | (fraction << 13));
  return sign ? -magnitude : magnitude;
}
inline void narrow(float a, bf16* out) {
  const uint32_t u = __float_as_uint(a);
  out->bits = static_cast<uint16_t>(a != a ? (u >> 16) | 0x40u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
inline void narrow(float a, f16* out) {
  const uint32_t u = __float_as_uint(a);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const float magnitude = std::fabs(a);
  if (a != a) {
    out->bits = sign | 0x7E00u;
  } else if (magnitude >= 65520.f) {
    out->bits = sign | 0x7C00u;
  } else if (magnitude < 0x1p-14f) {
    out->bits = static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  } else {
    const uint32_t m = u & 0x7FFFFFFFu;
    out->bits = static_cast<uint16_t>(sign | ((m - 0x38000000u + 0xFFFu + ((m >> 13) & 1u)) >> 13));
  }
}
#else
__device__ __forceinline__ float widen(f16 a) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a.bits));
  return f;
}
__device__ __forceinline__ void narrow(float a, bf16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(a));
}
__device__ __forceinline__ void narrow(float a, f16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(a));
}
#endif
__device__ __forceinline__ void narrow(float a, float* out) {
  *out = a;
}

// Elements of a 16-byte access.
template <class T>
constexpr int LANES = 16 / static_cast<int>(sizeof(T));

#ifdef DITSCALE_HOST_SHIM
template <class T>
uint32_t pack(float low, float high) {
  T l, h;
  narrow(low, &l);
  narrow(high, &h);
  return l.bits | static_cast<uint32_t>(h.bits) << 16;
}
#else
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif

// N neighbouring elements as they are stored, read and written in one access: of 16 bytes (LANES<T>), 8, or one element. Two of
// 16 bits keep to their word until they are widened: taken apart when they are read they would fill twice the registers, and
// a thread would wait for each load before it asks for the next.
template <class T, int N>
struct Pack {
  static constexpr int WORDS = (N * static_cast<int>(sizeof(T)) + 3) / 4;
  uint32_t word[WORDS];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xFFFF0000u);
    } else {
      return widen(T{static_cast<uint16_t>(i % 2 == 0 ? word[i / 2] : word[i / 2] >> 16)});
    }
  }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> packed(const float (&value)[N]) {
  Pack<T, N> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) out.word[i] = __float_as_uint(value[i]);
  } else if constexpr (N == 1) {
    T one;
    narrow(value[0], &one);
    out.word[0] = one.bits;
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out.word[i] = pack<T>(value[2 * i], value[2 * i + 1]);
  }
  return out;
}

// Wide accesses fault on a GPU where they are not aligned; the host would not notice.
__device__ __forceinline__ void note_access([[maybe_unused]] const void* p, [[maybe_unused]] int bytes) {
#ifdef DITSCALE_HOST_SHIM
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) ++shim::counts.misaligned;
#endif
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> fetch(const T* p) {
  note_access(p, N * static_cast<int>(sizeof(T)));
  if constexpr (N == 1 && sizeof(T) == 4) {
    return {{__float_as_uint(*p)}};
  } else if constexpr (N == 1) {
    return {{p->bits}};
  } else if constexpr (Pack<T, N>::WORDS == 2) {
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    return {{raw.x, raw.y}};
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
}

// By instructions of their own: the compiler may take an assignment apart again, and did, into stores of 4 bytes.
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& from) {
  note_access(p, N * static_cast<int>(sizeof(T)));
  if constexpr (N == 1 && sizeof(T) == 4) {
    *p = __uint_as_float(from.word[0]);
  } else if constexpr (N == 1) {
    p->bits = static_cast<uint16_t>(from.word[0]);
  } else if constexpr (Pack<T, N>::WORDS == 2) {
    __stwb(reinterpret_cast<uint2*>(p), uint2{from.word[0], from.word[1]});
  } else {
    __stwb(reinterpret_cast<uint4*>(p), uint4{from.word[0], from.word[1], from.word[2], from.word[3]});
  }
}
template <class T, int N>
__device__ __forceinline__ void put(T* p, const float (&value)[N]) {
  store(p, packed<T, N>(value));
}

// Asks for what is read later: from memory to the L2, past the registers.
__device__ __forceinline__ void ask_for([[maybe_unused]] const void* p) {
#ifndef DITSCALE_HOST_SHIM
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// N neighbouring elements widened, of any address: in as few accesses as it fits.
template <class T, int N>
__device__ __forceinline__ void widened_from(const T* p, float (&to)[N]) {
  constexpr int WIDE = N < LANES<T> ? N : LANES<T>;
  if (WIDE > 1 && reinterpret_cast<uintptr_t>(p) % (WIDE * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += WIDE) {
      const Pack<T, WIDE> part = fetch<T, WIDE>(p + i);
#pragma unroll
      for (int j = 0; j < WIDE; ++j) to[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(p[i]);
  }
}

// Modulation is stored as any of the three. One branch for all N numbers: with one for each every load waits for the one before.
template <int N>
__device__ __forceinline__ void modulation_at(
    const Strided& m, int storage, int64_t b, int64_t t, int64_t d, float (&to)[N]) {
  const int64_t at = b * m.b + t * m.t + d;
  if (storage == 0) {
    widened_from(static_cast<const float*>(m.data) + at, to);
  } else if (storage == 1) {
    widened_from(static_cast<const bf16*>(m.data) + at, to);
  } else {
    widened_from(static_cast<const f16*>(m.data) + at, to);
  }
}
__device__ __forceinline__ void store_any(void* p, int storage, int64_t at, float value) {
  if (storage == 0) {
    static_cast<float*>(p)[at] = value;
  } else if (storage == 1) {
    narrow(value, static_cast<bf16*>(p) + at);
  } else {
    narrow(value, static_cast<f16*>(p) + at);
  }
}

// N neighbouring ones, more than one of an address that 16-byte accesses fit: in as few of them as hold the numbers.
template <int N>
__device__ __forceinline__ void put_any(void* p, int storage, int64_t at, const float (&value)[N]) {
  if constexpr (N == 1) {
    store_any(p, storage, at, value[0]);
  } else if (storage == 1) {
    put<bf16, N>(static_cast<bf16*>(p) + at, value);
  } else if (storage == 2) {
    put<f16, N>(static_cast<f16*>(p) + at, value);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float part[4] = {value[i], value[i + 1], value[i + 2], value[i + 3]};
      put<float, 4>(static_cast<float*>(p) + at + i, part);
    }
  }
}

template <class T>
__device__ __forceinline__ const T* row_of(const Strided& v, int64_t b, int64_t t) {
  return static_cast<const T*>(v.data) + b * v.b + t * v.t;
}

// Sums each of K values over the block; every thread gets them, always added in the same order. `buffer` is K * 32 floats of
// shared memory that no thread still reads: callers alternate between two.
template <int K>
__device__ __forceinline__ void block_sum(float (&value)[K], float* buffer) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value[k] += __shfl_xor_sync(0xFFFFFFFFu, value[k], mask);
  }
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (lane == 0) buffer[k * 32 + warp] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += buffer[k * 32 + w];
    value[k] = total;
  }
}

}  // namespace ditscale::cuda
