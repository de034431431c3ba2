// The row kernels of the adaLN family as plain functions: what the bindings call, and what each instruction set provides.
#pragma once

#include "../common/adaln_args.h"

namespace ditscale::cpu {

constexpr int64_t KERNEL_ROWS = 7;

// All take rows [begin, end) of the flattened batch (row = b * T + t) and KERNEL_ROWS * D floats of scratch. The backward ones
// add into float32 sums over those rows (dshift, then dscale, then dgate, D each), null where there are none to make.
struct AdalnKernels {
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const BackwardArgs&, int64_t begin, int64_t end, float* sums, float* scratch);
  void (*residual)(const ResidualArgs&, int64_t begin, int64_t end, float* scratch);
  void (*residual_backward)(const ResidualArgs&, int64_t begin, int64_t end, float* sums, float* scratch);
  void (*gelu)(const GeluArgs&, int64_t begin, int64_t end, float* scratch);
  void (*gelu_backward)(const GeluArgs&, int64_t begin, int64_t end, float* sums, float* scratch);
  // out[d] = sum over chunks of partial[chunk * step + d], stored as `storage`.
  void (*add_chunks)(const float* partial, int64_t chunks, int64_t step, int64_t D, int storage, void* out);
};

// By Storage of x: float32, bfloat16, float16.
struct AdalnTable {
  AdalnKernels by_storage[3];
};

extern const AdalnTable adaln_portable;
#if defined(__x86_64__)
extern const AdalnTable adaln_avx2;
extern const AdalnTable adaln_avx512;
#endif

}  // namespace ditscale::cpu
