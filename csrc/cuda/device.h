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

// N neighbouring elements as they are stored, read and written in one access: of 16 bytes (LANES<T>), 8, or one element.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <int BYTES>
struct RawOf {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <class T, int N>
using Raw = typename RawOf<N * static_cast<int>(sizeof(T))>::type;

// Wide accesses fault on a GPU where they are not aligned; the host would not notice.
__device__ __forceinline__ void note_access([[maybe_unused]] const void* p, [[maybe_unused]] int bytes) {
#ifdef DITSCALE_HOST_SHIM
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) ++shim::counts.misaligned;
#endif
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> fetch(const T* p) {
  note_access(p, N * static_cast<int>(sizeof(T)));
  if constexpr (N == 1) {
    return {{*p}};
  } else {
    union {
      Raw<T, N> raw;
      Pack<T, N> pack;
    } u;
    u.raw = *reinterpret_cast<const Raw<T, N>*>(p);
    return u.pack;
  }
}

template <class T, int N>
__device__ __forceinline__ void put(T* p, const float (&value)[N]) {
  note_access(p, N * static_cast<int>(sizeof(T)));
  if constexpr (N == 1) {
    narrow(value[0], p);
  } else {
    union {
      Raw<T, N> raw;
      Pack<T, N> pack;
    } u;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(value[i], &u.pack.v[i]);
    *reinterpret_cast<Raw<T, N>*>(p) = u.raw;
  }
}

// Modulation is stored as any of the three; it is read once for many rows, so element by element costs nothing.
__device__ __forceinline__ float modulation_at(const Strided& m, int storage, int64_t b, int64_t t, int64_t d) {
  const int64_t at = b * m.b + t * m.t + d;
  if (storage == 0) return static_cast<const float*>(m.data)[at];
  if (storage == 1) return widen(static_cast<const bf16*>(m.data)[at]);
  return widen(static_cast<const f16*>(m.data)[at]);
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

// N neighbouring ones, of an address that 16-byte accesses fit: in as few of them as hold the numbers.
template <int N>
__device__ __forceinline__ void put_any(void* p, int storage, int64_t at, const float (&value)[N]) {
  if (storage == 1) {
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
