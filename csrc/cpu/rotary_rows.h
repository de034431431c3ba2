// Normalisation over a head and rotation of its rows, as plain functions of each instruction set.
#pragma once

#include "../common/rotary_args.h"

namespace ditscale::cpu {

// Floats of scratch: eight rows, each from a cache line's start.
constexpr int64_t rotary_room(int64_t K) {
  return (K + 15) / 16 * 16;
}
constexpr int64_t rotary_scratch(int64_t K) {
  return 8 * rotary_room(K);
}

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
