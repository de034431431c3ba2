#include "product_tiles.inl"

namespace ditscale::cpu {
extern const ProductKernels product_portable = product_kernels();
}
