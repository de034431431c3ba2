#include "rotary_rows.inl"

namespace ditscale::cpu {
extern const RotaryTable rotary_avx2 = {{kernels<float>(), kernels<bf16>(), kernels<f16>()}};
}
