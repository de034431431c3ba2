// Launchers of the adaLN kernels. `partial` holds cut.segments * cut.chunks * sums * D floats; null where a segment is one chunk
// and the kernel writes its sums to dshift, dscale and dgate at once: the norms' without `row_stats`, the residual's where it
// "is direct". Each returns null, or what the launch failed with.
#pragma once

#include "../common/adaln_args.h"

namespace ditscale::cuda {

const char* launch_forward(const ForwardArgs& a, Storage storage, const Shape& s, bool per_token, void* stream);
// `row_stats`: [B * T, 4] floats, needed where `backward_needs_row_stats` says so.
bool backward_needs_row_stats(const BackwardArgs& a, Storage storage);
const char* launch_backward(
    const BackwardArgs& a, Storage storage, const Shape& s, const Cut& cut, float* partial, float* row_stats, void* stream);
const char* launch_residual(const ResidualArgs& a, Storage storage, const Shape& s, void* stream);
bool residual_is_direct(const ResidualArgs& a, Storage storage);
const char* launch_residual_backward(
    const ResidualArgs& a, Storage storage, const Shape& s, const Cut& cut, float* partial, void* stream);
const char* launch_gelu(const GeluArgs& a, Storage storage, int64_t rows, void* stream);
const char* launch_gelu_backward(
    const GeluArgs& a, Storage storage, int64_t rows, const Cut& cut, float* partial, void* stream);
// out[i] of segment s = the chunks' partial sums i, added in order and stored as `storage`.
const char* launch_add_chunks(
    const float* partial, const Cut& cut, int64_t sums, int64_t D, Storage storage, void* const* out, void* stream);

}  // namespace ditscale::cuda
