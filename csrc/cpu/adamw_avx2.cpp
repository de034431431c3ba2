#include "adamw_rows.inl"

namespace ditscale::cpu {
extern const AdamwKernels adamw_avx2 = adamw_kernels();
}
