#include "adaln_rows.inl"

namespace ditscale::cpu {
extern const AdalnTable adaln_avx512 = {{kernels<float>(), kernels<bf16>(), kernels<f16>()}};
}
