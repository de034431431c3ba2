// Grids and shared memory of the attention kernels of one storage; each unit that includes this compiles them for its own.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace ditscale::cuda {
namespace {

// Calls f with the narrowest width that kernels are compiled for and that holds K columns. Widths for which a head of a common
// model (64, 72, 80, 96, 128) pays for no column that it does not have; float32 has two.
template <class T, class F>
void with_width(int64_t K, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (K <= 80) return f(std::integral_constant<int, 80>());
  } else {
    if (K <= 64) return f(std::integral_constant<int, 64>());
    if (K <= 72) return f(std::integral_constant<int, 72>());
    if (K <= 80) return f(std::integral_constant<int, 80>());
    if (K <= 96) return f(std::integral_constant<int, 96>());
  }
  f(std::integral_constant<int, 128>());
}

template <class Kernel>
void launch(Kernel kernel, int64_t longest, int rows, int64_t heads, int shared, const AttentionArgs& a, void* stream) {
  const int64_t blocks = (longest + rows - 1) / rows;
  if (blocks * heads * a.samples == 0) return;
  const dim3 grid(static_cast<unsigned>(blocks * heads * a.samples)), block(THREADS);
#ifndef DITSCALE_HOST_SHIM
  if (shared > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
#endif
  DS_LAUNCH_SHARED(kernel, grid, block, shared, stream, a, static_cast<int>(blocks));
}

}  // namespace

template <class T>
void AttentionOf<T>::forward(const AttentionArgs& a, void* stream) {
  with_width<T>(a.K, [&](auto width) {
    constexpr int W = width.value;
    using F = ForwardShape<T, W>;
    static_assert(F::SHARED <= SMALLEST_LIMIT);
    launch(attention_forward<T, W>, a.max_q, F::ROWS, a.H, F::SHARED, a, stream);
  });
}

template <class T>
void AttentionOf<T>::backward(const AttentionArgs& a, void* stream) {
  with_width<T>(a.K, [&](auto width) {
    constexpr int W = width.value;
    using Q = QueriesShape<T, W>;
    using S = QueryStats<T, W>;
    static_assert(Q::SHARED <= SMALLEST_LIMIT && S::SHARED <= SMALLEST_LIMIT);
    launch(attention_dq<T, W>, a.max_q, Q::ROWS, a.H, Q::SHARED, a, stream);
    launch(attention_dkv<T, W>, a.max_k, S::F::ROWS, a.H_kv, S::F::SHARED, a, stream);
  });
}

}  // namespace ditscale::cuda
