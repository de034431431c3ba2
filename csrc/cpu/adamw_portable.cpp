#include "adamw_rows.inl"

namespace ditscale::cpu {
extern const AdamwKernels adamw_portable = adamw_kernels();
}
