// What the kernels of the adaLN family share: strided rows, modulation as float32, rows worked on together.
#pragma once

#include "adaln_rows.h"
#include "vec.h"

namespace ditscale::cpu {
namespace {

template <class T>
DS_INLINE const T* row_of(const Strided& v, int64_t b, int64_t t) {
  return (const T*)v.data + b * v.b + t * v.t;
}

// What lies some lines ahead in a row that is read from memory: a processor foresees a row's next lines by itself, but not across
// the border of a page, nor so many at once. An address beyond the last row does no harm. Half a KiB is 5 (two threads) to 25 %
// (one) slower on an EPYC, 3 KiB the same; on a Xeon 1 and 4 KiB are no worse than half.
constexpr int AHEAD = 2048;  // bytes
DS_INLINE void prefetch(const void* p) {
  __builtin_prefetch((const char*)p + AHEAD);
}

// A row of modulation as float32, `plus` added: where it is stored, or worked out into `scratch`.
template <class T>
DS_INLINE const float* widen(const T* p, int64_t D, float plus, float* scratch) {
  for_row(D, [&](auto whole, int64_t d, int64_t n) {
    put<whole.value>(scratch + d, get<whole.value>(p + d, n) + splat(plus), n);
  });
  return scratch;
}
DS_INLINE const float* modulation_row(
    const Strided& m, int storage, int64_t b, int64_t t, int64_t D, float plus, float* scratch) {
  if (storage == 1) return widen(row_of<bf16>(m, b, t), D, plus, scratch);
  if (storage == 2) return widen(row_of<f16>(m, b, t), D, plus, scratch);
  const float* row = row_of<float>(m, b, t);
  return plus == 0.f ? row : widen(row, D, plus, scratch);
}

// The float32 rows of a call's modulation, made again only where the sample (or, per token, the row) changes.
struct Modulation {
  const Strided& view;
  int storage;
  int64_t D;
  float plus;
  float* scratch;
  const void* at = nullptr;
  const float* row = nullptr;
  DS_INLINE const float* operator()(int64_t b, int64_t t) {
    const int64_t size = storage == 0 ? 4 : 2;
    const void* want = (const char*)view.data + (b * view.b + t * view.t) * size;
    if (want != at) {
      at = want;
      row = modulation_row(view, storage, b, t, D, plus, scratch);
    }
    return row;
  }
};

DS_INLINE void put_modulation(void* p, int storage, int64_t i, vf v, bool whole, int64_t n) {
  const auto to = [&](auto* q) { whole ? store(q + i, v) : store_part(q + i, v, n); };
  if (storage == 0) {
    to((float*)p);
  } else if (storage == 1) {
    to((bf16*)p);
  } else {
    to((f16*)p);
  }
}

// Rows that are worked on together: they share what is read of the modulation, and of the sums over tokens.
constexpr int BLOCK = 4;

// How many of the rows from `r` on are one block: BLOCK where as many of the same sample are left and `together` allows it, or 1.
DS_INLINE int64_t block_rows(int64_t T, int64_t t, int64_t r, int64_t end, bool together) {
  const int64_t rows = T - t < end - r ? T - t : end - r;
  return together && rows >= BLOCK ? BLOCK : 1;
}

}  // namespace
}  // namespace ditscale::cpu
