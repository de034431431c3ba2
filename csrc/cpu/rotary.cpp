// Normalisation of queries or keys and their rotation on the CPU: the split over threads.
#include "../common/rotary_bindings.h"
#include "isa.h"
#include "past_caches.h"
#include "rotary_rows.h"
#include "scratch.h"

namespace ditscale::cpu {
namespace {

thread_local Scratch scratch_of_thread;

// Tokens that one thread should at least get, and chunks of tokens that the sums of the weight's gradient are cut into.
constexpr int64_t NUMBERS_A_THREAD = 16384, CHUNKS = 64;

int64_t grain(const RotaryArgs& a) {
  const int64_t width = a.H * a.K > 0 ? a.H * a.K : 1;
  return NUMBERS_A_THREAD / width + 1;
}

const RotaryKernels& kernels_of(Storage storage) {
  return DS_BY_ISA(rotary).by_storage[static_cast<int>(storage)];
}

// `tensors` of the shape of x are read and written. In place every line is in the cache already.
bool streams(int64_t tensors, const RotaryArgs& a, Storage storage, const Tensor& x) {
  const int64_t row = a.K * bytes_of(storage);
  return a.out.data != a.x.data && goes_past_caches(tensors * x.size(0) * a.T * a.H * row, row, 16, {a.out.data});
}

struct Cpu {
  static void forward(RotaryArgs a, Storage storage, const Tensor& x) {
    a.stream = streams(2, a, storage, x);
    const RotaryKernels& kernels = kernels_of(storage);
    torch::stable::parallel_for(0, x.size(0) * a.T, grain(a), [&](int64_t begin, int64_t end) {
      kernels.forward(a, begin, end, scratch_of_thread.get(rotary_scratch(a.K)));
    });
  }

  static void backward(RotaryArgs a, Storage storage, const Tensor& x, float* dweight) {
    a.stream = streams(3, a, storage, x);
    const RotaryKernels& kernels = kernels_of(storage);
    const int64_t tokens = x.size(0) * a.T;
    if (dweight == nullptr) {
      torch::stable::parallel_for(0, tokens, grain(a), [&](int64_t begin, int64_t end) {
        kernels.backward(a, begin, end, nullptr, scratch_of_thread.get(rotary_scratch(a.K)));
      });
      return;
    }
    // The cut into chunks follows from the shape alone, so the sums have the same bits for any number of threads.
    int64_t chunk = (tokens + CHUNKS - 1) / CHUNKS;
    if (chunk < 8) chunk = 8;
    const int64_t chunks = (tokens + chunk - 1) / chunk;
    const Tensor partial = allocate({chunks, a.K}, aoti_torch_dtype_float32(), x);
    float* sum = static_cast<float*>(partial.mutable_data_ptr());
    torch::stable::parallel_for(0, chunks, grain(a) / chunk + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t last = (i + 1) * chunk < tokens ? (i + 1) * chunk : tokens;
        kernels.backward(a, i * chunk, last, sum + i * a.K, scratch_of_thread.get(rotary_scratch(a.K)));
      }
    });
    for (int64_t i = 0; i < a.K; ++i) {
      double acc = 0.0;
      for (int64_t c = 0; c < chunks; ++c) acc += sum[c * a.K + i];
      dweight[i] = static_cast<float>(acc);
    }
  }
};

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  ditscale::Rotary<ditscale::cpu::Cpu>::register_in(m);
}
