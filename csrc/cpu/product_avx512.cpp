#include "product_tiles.inl"

namespace ditscale::cpu {
extern const ProductKernels product_avx512 = product_kernels();
}
