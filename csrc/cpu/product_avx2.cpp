#include "product_tiles.inl"

namespace ditscale::cpu {
extern const ProductKernels product_avx2 = product_kernels();
}
