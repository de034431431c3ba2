#include "attention_blocks.inl"

namespace ditscale::cpu {
extern const AttentionTable attention_avx2 = {{kernels<float>(), kernels<bf16>(), kernels<f16>()}};
}
