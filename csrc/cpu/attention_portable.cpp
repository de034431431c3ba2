#include "attention_blocks.inl"

namespace ditscale::cpu {
extern const AttentionTable attention_portable = {{kernels<float>(), kernels<bf16>(), kernels<f16>()}};
}
