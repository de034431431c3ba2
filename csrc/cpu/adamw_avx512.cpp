#include "adamw_rows.inl"

namespace ditscale::cpu {
extern const AdamwKernels adamw_avx512 = adamw_kernels();
}
