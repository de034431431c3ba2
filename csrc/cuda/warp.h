// What the threads of a warp do together from sm_80 on: fragments of matrices from shared memory, products of 16 rows with 8
// columns, copies to shared memory that run beside the arithmetic. Fragments are counted in chunks of 16 bytes along the
// summed dimension (8 elements of 16 bits, 4 of 32): an instruction takes two chunks, at the end of an odd number one.
//
// float32 is multiplied in three products of TF32: a number is the sum of its rounding to 11 digits and that of the rest, and
// only the product of the two rests, 2^-22 of the whole, is left out.
#pragma once

#include "device.h"

#ifdef DITSCALE_HOST_SHIM
#include "host_warp.h"
#endif

namespace ditscale::cuda {

#ifdef DITSCALE_HOST_SHIM

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  shim::load_matrices<4>(r, row, false);
}
inline void load_matrices(uint32_t (&r)[2], const void* row) {
  shim::load_matrices<2>(r, row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  shim::load_matrices<4>(r, row, true);
}
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  shim::load_matrices<2>(r, row, true);
}
inline void copy_16(void* to, const void* from, bool valid) {
  shim::begin_copy(to, from, valid);
}
inline void commit_copies() {
  shim::commit_copies();
}
template <int LEFT>
void wait_copies() {
  shim::wait_copies(LEFT);
}
template <class V>
V load_shared(const V* p) {
  shim::note_read(p, sizeof(V));
  return *p;
}
template <class V>
void store_shared(V* p, V value) {
  shim::note_write(p, sizeof(V));
  *p = value;
}
template <class T>
double half_element(uint32_t r, int e) {
  return widen(T{static_cast<uint16_t>(e == 0 ? r : r >> 16)});
}
inline double tf32_element(uint32_t r, int) {
  return __uint_as_float(r & 0xFFFFE000u);
}
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  shim::product<16, 2>(d, a, b, half_element<T>);
}
template <class T>
void multiply_half(float (&d)[4], const uint32_t (&a)[2], const uint32_t* b) {
  shim::product<8, 2>(d, a, b, half_element<T>);
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  shim::product<8, 1>(d, a, b, tf32_element);
}
inline uint32_t to_tf32(float a) {
  return (__float_as_uint(a) + 0x1000u) & 0xFFFFE000u;
}
inline float exp2_fast(float a) {
  return std::exp2(a);
}
inline float log2_fast(float a) {
  return std::log2(a);
}
inline float fused(float a, float b, float c) {
  return std::fma(a, b, c);
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Lane l gives the address of row l % 8 of matrix l / 8; a matrix is eight rows of 16 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)) : "memory");
}
// 16 bytes past the registers; zeros instead, and nothing is read, where they are not valid.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
template <class V>
__device__ __forceinline__ V load_shared(const V* p) {
  return *p;
}
template <class V>
__device__ __forceinline__ void store_shared(V* p, V value) {
  *p = value;
}
// clang-format off
#define DS_MULTIPLY(T, type)                                                                                           \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
        "{%0, %1, %2, %3};"                                                                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                           \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_half<T>(float (&d)[4], const uint32_t (&a)[2], const uint32_t* b) {         \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "                \
        "{%0, %1, %2, %3};"                                                                                            \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));                                                                            \
  }
// clang-format on
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b);
template <class T>
__device__ __forceinline__ void multiply_half(float (&d)[4], const uint32_t (&a)[2], const uint32_t* b);
DS_MULTIPLY(bf16, "bf16")
DS_MULTIPLY(f16, "f16")
#undef DS_MULTIPLY
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t to_tf32(float a) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(a));
  return r;
}
__device__ __forceinline__ float exp2_fast(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
__device__ __forceinline__ float log2_fast(float a) {
  return __log2f(a);
}
__device__ __forceinline__ float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}

#endif

}  // namespace ditscale::cuda
