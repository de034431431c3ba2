#include "attention_blocks.inl"

namespace ditscale::cpu {
extern const AttentionTable attention_avx512 = {{kernels<float>(), kernels<bf16>(), kernels<f16>()}};
}
