// The adaLN family over rows, written once for every instruction set. Mathematics: docs/kernels.md.
#include "adaln_backward.h"
#include "adaln_forward.h"
#include "adaln_gelu.h"
#include "adaln_residual.h"

namespace ditscale::cpu {
namespace {

// Whole lines of a chunk at a time: chunks may lie a page apart, where every one of them is in the same place of the caches.
void add_chunks(const float* partial, int64_t chunks, int64_t step, int64_t D, int storage, void* out) {
  for_vectors<4>(D, [&](auto v, int64_t d0, int64_t n) {
    vd total[v.count];  // float64: thousands of chunks add no error of their own
    each<v.count>([&](auto u) { total[u] = vd{}; });
    for (int64_t c = 0; c < chunks; ++c) {
      each<v.count>([&](auto u) {
        total[u] += __builtin_convertvector(v.get(partial + c * step + d0 + u * W, n), vd);
      });
    }
    each<v.count>([&](auto u) {
      put_modulation(out, storage, d0 + u * W, __builtin_convertvector(total[u], vf), v.whole, n);
    });
  });
}

template <class T>
constexpr AdalnKernels kernels() {
  return {forward<T>, backward<T>, residual<T>, residual_backward<T>, gelu<T>, gelu_backward<T>, add_chunks};
}

}  // namespace
}  // namespace ditscale::cpu
