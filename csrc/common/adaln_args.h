// What a call of the adaLN family is made of, as plain data: the bindings fill it in, the kernels of a device read it.
#pragma once

#include <cstdint>

namespace ditscale {

// How a buffer stores its numbers. Arithmetic is float32 whatever the storage.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2 };

static inline int64_t bytes_of(Storage s) {
  return s == Storage::f32 ? 4 : 2;
}

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
  bool per_token;                  // every row has a modulation of its own
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

// Which rows share a modulation: all (tensor [D]), those of a sample ([B, D]), none ([B, T, D]).
enum class Mode : int { shared = 1, per_sample = 2, per_token = 3 };

struct Shape {
  int64_t B, T, D;
};

// Gradients of shared modulation are sums over the rows of a segment: a sample, or the whole batch. The rows of a segment
// are cut in chunks, one partial sum each, added in the order of the chunks. The cut follows from the shape alone, never
// from the number of threads, so that the same call gives the same bits on every machine load.
struct Cut {
  int64_t segments, rows, chunk, chunks;
};

static inline Cut cut_rows(Mode mode, int64_t B, int64_t T, int64_t min_rows, int64_t tasks) {
  const int64_t segments = mode == Mode::shared ? 1 : B;
  const int64_t rows = mode == Mode::shared ? B * T : T;
  int64_t chunk = (B * T + tasks - 1) / tasks;
  if (chunk < min_rows) chunk = min_rows;
  int64_t chunks = rows / chunk;  // floor: no chunk below min_rows, which bounds the memory of the partial sums
  if (chunks < 1) chunks = 1;
  chunk = (rows + chunks - 1) / chunks;  // even chunks: 256 rows in 3 are 86, 86, 84
  if (chunk < 1) chunk = 1;
  return {segments, rows, chunk, rows > 0 ? (rows + chunk - 1) / chunk : 1};
}

}  // namespace ditscale
