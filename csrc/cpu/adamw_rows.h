// The step of AdamW, as plain functions of each instruction set.
#pragma once

#include <cstdint>

namespace ditscale::cpu {

struct AdamwArgs {
  float *weight, *first, *second, *average;  // `average` may be null
  const float* gradient;
  float clip;                        // what the gradient is multiplied by first
  float keep;                        // 1 - learning rate * weight decay
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float rate;                        // learning rate / (1 - beta1^step)
  float correction;                  // 1 / sqrt(1 - beta2^step)
  float eps;
  float decay, share;                // of the average; share = 1 - decay
};

struct AdamwKernels {
  void (*step)(const AdamwArgs& a, int64_t begin, int64_t end);
};

extern const AdamwKernels adamw_portable;
#if defined(__x86_64__)
extern const AdamwKernels adamw_avx2;
extern const AdamwKernels adamw_avx512;
#endif

}  // namespace ditscale::cpu
