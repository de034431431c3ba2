// The row kernels of the adaLN family as plain functions: what the bindings call, and what each instruction set provides.
#pragma once

#include <cstdint>

namespace ditscale::cpu {

// A [B, T, D] view with dense rows: elements from sample to sample and token to token.
struct Strided {
  const void* data;
  int64_t b, t;
};

struct ForwardArgs {
  int64_t T, D;
  Strided x, branch;               // branch.data null: no gated residual in front
  Strided gate, shift, scale;      // all stored as `modulation`
  int modulation;                  // Storage of gate, shift and scale
  float eps, scale_base;           // y = normalised * (scale_base + scale) + shift
  bool rms;
  void* x_new;                     // dense [B, T, D], null without branch
  void* y;                         // dense
  float* mean;                     // null: statistics are not kept
  float* rstd;
  bool stream;                     // write past the caches: the outputs are larger than them
};

struct BackwardArgs {
  int64_t T, D;
  Strided dy, dresidual;           // dresidual.data null: no other gradient reaches x
  Strided x, branch;               // x is x_new where there is a branch
  Strided gate, scale;
  int modulation;
  const float* mean;               // null: computed again from x
  const float* rstd;
  float eps, scale_base;
  bool rms;
  bool per_token;                  // dshift, dscale, dgate are written row by row, stored as `modulation`
  void* dx;                        // dense
  void* dbranch;                   // dense, null without branch
  void *dshift, *dscale, *dgate;   // dense, only per token
  bool stream;
};

struct ResidualArgs {
  int64_t T, D;
  Strided x, branch, gate;         // x is dout in the backward pass
  int modulation;
  bool per_token;
  void* out;                       // x + gate * branch; backward: dbranch
  void* dgate;                     // only per token
  bool stream;
};

struct GeluArgs {
  int64_t D;
  const void *x, *dy, *bias;       // x, dy: rows `stride` apart
  int64_t x_stride, dy_stride;
  int modulation;                  // Storage of bias
  void* out;                       // y; backward: dx
  bool stream;
};

// All take rows [begin, end) of the flattened batch (row = b * T + t) and 4 * D floats of scratch. The backward ones add into
// float32 sums over those rows (dshift, then dscale, then dgate, D each), null where there are none to make.
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
  const char* isa;
};

extern const AdalnTable adaln_portable;
#if defined(__x86_64__)
extern const AdalnTable adaln_avx2;
extern const AdalnTable adaln_avx512;
#endif

// The best this processor has, chosen once. DITSCALE_CPU_ISA=portable|avx2|avx512 asks for less.
const AdalnTable& adaln_table();

}  // namespace ditscale::cpu
