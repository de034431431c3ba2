#include "attention.h"
#include "launch.h"

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

}  // namespace ditscale::cuda
