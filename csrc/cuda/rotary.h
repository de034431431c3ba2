// Launchers of QK-norm + RoPE. Each returns null, or what the launch failed with.
#pragma once

#include "../common/adaln_args.h"
#include "../common/rotary_args.h"

namespace ditscale::cuda {

const char* launch_rotary_forward(const RotaryArgs& a, Storage storage, int64_t B, void* stream);

// Rows of partial sums of the weight's gradient that a backward pass makes, K floats each: from shapes, strides and alignment.
int64_t rotary_partials(const RotaryArgs& a, Storage storage, int64_t B);
// `partial` null: no gradient of the weight.
const char* launch_rotary_backward(const RotaryArgs& a, Storage storage, int64_t B, float* partial, void* stream);

}  // namespace ditscale::cuda
