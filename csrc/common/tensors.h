// What every binding needs of torch, through the stable ABI only: allocation, views and checks.
#pragma once

#include "adaln_args.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Turns what a function of the C shim returns into an exception; torch 2.10 and 2.11 have it under another name.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define DS_SHIM_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DS_SHIM_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ditscale {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
      return Storage::f32;
  }
}

// DITSCALE_POISON=1 fills what is allocated with all-ones bytes, NaN in every storage: an element that a kernel forgets
// to write then shows. Only the test suite sets it.
inline bool poisoned() {
  static const bool on = [] {
    const char* value = std::getenv("DITSCALE_POISON");
    return value != nullptr && value[0] == '1';
  }();
  return on;
}

// glibc maps a block of this size anew whenever it is asked for and gives it back when it is freed: every page of 4 KiB is then
// taken from the system and zeroed at its first touch: layer norm of 75 MB took 41 ms, in pages of 2 MiB, of which there are 512
// times fewer, 12. Smaller blocks come from the heap, where this made things slower. A hint: nothing is lost where it is refused.
constexpr size_t MAPPED_FROM = 32 << 20, LARGE_PAGE = 2 << 20;

inline void ask_for_large_pages(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < MAPPED_FROM) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / LARGE_PAGE * LARGE_PAGE;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor on the device of `like`.
inline Tensor allocate_strided(int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  DS_SHIM_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  DS_SHIM_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  DS_SHIM_CHECK(
      aoti_torch_empty_strided(dims, size, stride, dtype, device_type, device_index, &handle));
  Tensor out(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    const size_t bytes = static_cast<size_t>(out.numel()) * out.element_size();
    ask_for_large_pages(out.mutable_data_ptr(), bytes);
    if (poisoned()) std::memset(out.mutable_data_ptr(), 0xFF, bytes);
  }
  return out;
}
inline Tensor allocate(std::initializer_list<int64_t> sizes, int32_t dtype, const Tensor& like) {
  int64_t size[5], stride[5], dims = 0, run = 1;
  for (int64_t s : sizes) size[dims++] = s;
  for (int64_t d = dims - 1; d >= 0; --d) {
    stride[d] = run;
    run *= size[d] > 1 ? size[d] : 1;
  }
  return allocate_strided(dims, size, stride, dtype, like);
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  DS_SHIM_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// [B, H, T, K] over memory laid out [B, T, H, K]: what the next projection reads as [B, T, H * K] without a copy. Not a view of
// another tensor: such a result of a function of ours could not be written in place.
inline Tensor allocate_heads(int64_t B, int64_t H, int64_t T, int64_t K, const Tensor& like) {
  const auto some = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t size[] = {B, H, T, K}, row = some(H) * some(K), stride[] = {some(T) * row, some(K), row, 1};
  return allocate_strided(4, size, stride, dtype_of(like), like);
}
inline Tensor allocate_heads(const Tensor& like) {
  return allocate_heads(like.size(0), like.size(1), like.size(2), like.size(3), like);
}

// The kernels walk the last dimension with stride 1; anything else is copied first.
inline Tensor inner_dense(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected [B, T, D] with D >= 1");
  return {x.size(0), x.size(1), x.size(2)};
}

// Torch picks the kernel by the device of any one argument: the others must be there too.
inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  int32_t type = 0, index = 0, type_x = 0, index_x = 0;
  DS_SHIM_CHECK(aoti_torch_get_device_type(t.get(), &type));
  DS_SHIM_CHECK(aoti_torch_get_device_index(t.get(), &index));
  DS_SHIM_CHECK(aoti_torch_get_device_type(x.get(), &type_x));
  DS_SHIM_CHECK(aoti_torch_get_device_index(x.get(), &index_x));
  STD_TORCH_CHECK(type == type_x && index == index_x, name, ": expected a tensor on the device of x");
}

inline void check_like(const Tensor& t, const Tensor& x, const Shape& s, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == s.B && t.size(1) == s.T && t.size(2) == s.D && dtype_of(t) == dtype_of(x),
      name,
      ": expected the shape and dtype of x");
  check_device(t, x, name);
}

// [B, 1, D] is [B, D] with a dimension that some models keep.
inline Mode mode_of(const Tensor& m, const Tensor& x, const Shape& s, const char* name) {
  const int64_t dims = m.dim();
  const bool wide = dims >= 1 && dims <= 3 && m.size(dims - 1) == s.D && (dims == 1 || m.size(0) == s.B);
  STD_TORCH_CHECK(
      wide && (dims < 3 || m.size(1) == s.T || m.size(1) == 1), name, ": expected [D], [B, D] or [B, T, D]");
  check_device(m, x, name);
  if (dims == 1) return Mode::shared;
  return dims == 3 && m.size(1) == s.T ? Mode::per_token : Mode::per_sample;
}

}  // namespace ditscale
