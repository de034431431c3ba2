// Normalisation over a head and rotation of its rows, as plain functions of each instruction set.
#pragma once

#include "attention_blocks.h"

namespace ditscale::cpu {

enum class HeadNorm : int { none = 0, rms = 1, layer = 2 };

struct RotaryArgs {
  int64_t H, T, K;
  HeadView x, out, dout;        // backward: out is dx
  const float *weight;          // [K], or null
  const float *cos, *sin;       // rows of K / 2, or null
  int64_t table_b, table_t;     // elements from sample to sample and token to token in the tables
  float eps;
  int norm;                     // HeadNorm
  bool interleaved;             // pairs are (2 i, 2 i + 1), else (i, i + K / 2)
};

constexpr int64_t ROTARY_SCRATCH = 7;  // times K floats

// Tokens [begin, end) of the flattened batch (b * T + t), all heads.
struct RotaryKernels {
  void (*forward)(const RotaryArgs&, int64_t begin, int64_t end, float* scratch);
  // Sets dweight [K] to the sum over those rows (null: not asked for).
  void (*backward)(const RotaryArgs&, int64_t begin, int64_t end, float* dweight, float* scratch);
};

struct RotaryTable {
  RotaryKernels by_storage[3];
};

extern const RotaryTable rotary_portable;
#if defined(__x86_64__)
extern const RotaryTable rotary_avx2;
extern const RotaryTable rotary_avx512;
#endif

}  // namespace ditscale::cpu
