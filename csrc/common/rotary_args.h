// What a call of QK-norm + RoPE is made of, as plain data: the bindings fill it in, the kernels of a device read it.
#pragma once

#include <cstdint>

namespace ditscale {

enum class HeadNorm : int { none = 0, rms = 1, layer = 2 };

// A [B, H, T, K] view with dense rows: elements from sample to sample, head to head and token to token.
struct HeadView {
  void* data;
  int64_t b, h, t;
};

struct RotaryArgs {
  int64_t H, T, K;
  HeadView x, out, dout;        // backward: out is dx. In place: out is x
  const float *weight;          // [K], or null
  const float *cos, *sin;       // rows of K / 2, or null
  int64_t table_b, table_t;     // elements from sample to sample and token to token in the tables
  float eps;
  int norm;                     // HeadNorm
  bool interleaved;             // pairs are (2 i, 2 i + 1), else (i, i + K / 2)
  bool stream;                  // write past the caches: what is read and written is larger than them
};

}  // namespace ditscale
