// What every binding needs of torch, through the stable ABI only: allocation, views and checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>

namespace ditscale {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How a buffer stores its numbers. Arithmetic is float32 whatever the storage.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2 };

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

inline int64_t bytes_of(Storage s) {
  return s == Storage::f32 ? 4 : 2;
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

// A contiguous uninitialised tensor on the device of `like`.
inline Tensor allocate(std::initializer_list<int64_t> sizes, int32_t dtype, const Tensor& like) {
  int64_t size[4], stride[4], dims = 0, run = 1;
  for (int64_t s : sizes) size[dims++] = s;
  for (int64_t d = dims - 1; d >= 0; --d) {
    stride[d] = run;
    run *= size[d] > 1 ? size[d] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, dtype, device_type, device_index, &handle));
  Tensor out(handle);
  if (poisoned() && device_type == aoti_torch_device_type_cpu()) {
    std::memset(out.mutable_data_ptr(), 0xFF, static_cast<size_t>(out.numel()) * out.element_size());
  }
  return out;
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// The kernels walk the last dimension with stride 1; anything else is copied first.
inline Tensor inner_dense(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A [B, T, D] tensor, or a modulation seen as one: elements from sample to sample and from token to token.
struct View {
  const void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
  Storage storage = Storage::f32;
};

inline View view_of(const Tensor& t, const char* name) {
  const int64_t dims = t.dim();
  return {t.const_data_ptr(), dims >= 2 ? t.stride(0) : 0, dims == 3 ? t.stride(1) : 0, storage_of(t, name)};
}

struct Shape {
  int64_t B, T, D;
};

inline Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [B, T, D], got ", x.dim(), " dimensions");
  return {x.size(0), x.size(1), x.size(2)};
}

inline void check_like(const Tensor& t, const Tensor& x, const Shape& s, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 3 && t.size(0) == s.B && t.size(1) == s.T && t.size(2) == s.D && dtype_of(t) == dtype_of(x),
      name,
      ": expected the shape and dtype of x");
}

// Which rows share a modulation: all (tensor [D]), those of a sample ([B, D]), none ([B, T, D]).
enum class Mode : int { shared = 1, per_sample = 2, per_token = 3 };

inline Mode mode_of(const Tensor& m, const Shape& s, const char* name) {
  const int64_t dims = m.dim();
  const bool right = (dims == 1 && m.size(0) == s.D) || (dims == 2 && m.size(0) == s.B && m.size(1) == s.D) ||
      (dims == 3 && m.size(0) == s.B && m.size(1) == s.T && m.size(2) == s.D);
  STD_TORCH_CHECK(right, name, ": expected [D], [B, D] or [B, T, D]");
  return static_cast<Mode>(dims);
}

// Gradients of shared modulation are sums over the rows of a segment: a sample, or the whole batch. The rows of a segment
// are cut in chunks, one partial sum each, added in the order of the chunks. The cut follows from the shape alone, never
// from the number of threads, so that the same call gives the same bits on every machine load.
struct Cut {
  int64_t segments, rows, chunk, chunks;
};

inline Cut cut_rows(Mode mode, int64_t B, int64_t T, int64_t min_rows, int64_t tasks) {
  const int64_t segments = mode == Mode::shared ? 1 : B;
  const int64_t rows = mode == Mode::shared ? B * T : T;
  int64_t chunk = (B * T + tasks - 1) / tasks;
  if (chunk < min_rows) chunk = min_rows;
  int64_t chunks = rows / chunk;  // floor: no chunk below min_rows, which bounds the memory of the partial sums
  if (chunks < 1) chunks = 1;
  chunk = (rows + chunks - 1) / chunks;  // even chunks: 256 rows in 3 are 86, 86, 84
  if (chunk < 1) chunk = 1;
  return {segments, rows, chunk, rows > 0 ? (rows + chunk - 1) / chunk : 1};
}

}  // namespace ditscale
