#include "attention_backward.h"
#include "attention_forward.h"

namespace ditscale::cuda {

extern template struct AttentionOf<float>;
extern template struct AttentionOf<bf16>;
extern template struct AttentionOf<f16>;

const char* launch_attention_forward(const AttentionArgs& a, Storage storage, void* stream) {
  DS_BY_STORAGE(storage, AttentionOf<T>::forward(a, stream));
  return launch_error();
}

const char* launch_attention_backward(const AttentionArgs& a, Storage storage, void* stream) {
  DS_BY_STORAGE(storage, AttentionOf<T>::backward(a, stream));
  return launch_error();
}

#ifndef DITSCALE_HOST_SHIM
// Shared memory that launches ask for beside what kernels declare: compiled kernels do not tell of it. The ahead-of-time table
// reads it out of the library's file (bench/sass.py), from a section of its own.
struct AskedShared {
  char kernel[32], arguments[28];
  int32_t bytes;
};
#define DS_ASKED(T, W)                                                 \
  {"attention_forward", #T ", " #W, ForwardShape<T, W>::SHARED},       \
      {"attention_dq", #T ", " #W, QueriesShape<T, W>::SHARED},        \
      {"attention_dkv", #T ", " #W, KeysShape<T, W>::SHARED}
extern const AskedShared asked_shared[];
__attribute__((used, section(".ditscale.shared"))) const AskedShared asked_shared[] = {
    DS_ASKED(bf16, 64), DS_ASKED(bf16, 72), DS_ASKED(bf16, 80), DS_ASKED(bf16, 96),   DS_ASKED(bf16, 128),
    DS_ASKED(f16, 64),  DS_ASKED(f16, 72),  DS_ASKED(f16, 80),  DS_ASKED(f16, 96),    DS_ASKED(f16, 128),
    DS_ASKED(float, 80), DS_ASKED(float, 128),
};
#undef DS_ASKED
#endif

}  // namespace ditscale::cuda
