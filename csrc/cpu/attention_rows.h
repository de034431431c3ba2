// Rows of queries, keys and values as the kernels read and write them: float32, transposed where lanes are to be queries.
#pragma once

#include "attention_blocks.h"
#include "lanes.h"

namespace ditscale::cpu {
namespace {

// Rows of numbers are a whole number of these wide: vectors of 16 hand their last half to vectors of 8.
#if defined(__AVX2__)
typedef v8 vpart;
#else
typedef vf vpart;
#endif
constexpr int64_t PART = lanes_of<vpart>;

DS_INLINE int64_t padded(int64_t K) {
  return (K + PART - 1) / PART * PART;
}

#if defined(__AVX2__)
// Eight rows of eight become eight columns.
DS_INLINE void transpose(v8 (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xEE);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
constexpr int TILE = 8;
typedef v8 vtile;
#else
constexpr int TILE = 4;
typedef vf vtile;
DS_INLINE void transpose(vtile (&r)[TILE]) {
  vtile t[TILE];
  for (int i = 0; i < TILE; ++i) {
    for (int j = 0; j < TILE; ++j) t[i][j] = r[j][i];
  }
  for (int i = 0; i < TILE; ++i) r[i] = t[i];
}
#endif

// columns[d][query] = rows[query][d] * factor; the queries that fill up the last vector are zero.
DS_INLINE void to_columns(Rows rows, int64_t queries, int64_t lanes, int64_t width, float factor, float* columns) {
  for (int64_t q = 0; q < lanes; q += TILE) {
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) {
        tile[i] = q + i < queries ? get_at<vtile>(rows.data + (q + i) * rows.step + d) * factor : vtile{};
      }
      transpose(tile);
      for (int i = 0; i < TILE; ++i) put_at(columns + (d + i) * QUERIES + q, tile[i]);
    }
  }
}

// rows[query][d] = columns[d][query] * factor[query].
DS_INLINE void to_rows(const float* columns, int64_t queries, int64_t width, const float* factor, Rows rows) {
  for (int64_t q = 0; q < queries; q += TILE) {
    const vtile f = get_at<vtile>(factor + q);
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) tile[i] = get_at<vtile>(columns + (d + i) * QUERIES + q) * f;
      transpose(tile);
      for (int i = 0; i < TILE && q + i < queries; ++i) put_at(rows.data + (q + i) * rows.step + d, tile[i]);
    }
  }
}

// out[query] = columns[:, query] . rows[query], added up in the order of the scores' gradients: where a query has one key
// they cancel to the bit.
DS_INLINE void products(
    const float* columns, Rows rows, int64_t queries, int64_t lanes, int64_t width, float* out) {
  for (int64_t q = 0; q < lanes; q += TILE) {
    vtile total{};
    for (int64_t d = 0; d < width; d += TILE) {
      vtile tile[TILE];
      for (int i = 0; i < TILE; ++i) {
        tile[i] = q + i < queries ? get_at<vtile>(rows.data + (q + i) * rows.step + d) : vtile{};
      }
      transpose(tile);
      for (int i = 0; i < TILE; ++i) total += tile[i] * get_at<vtile>(columns + (d + i) * QUERIES + q);
    }
    put_at(out + q, total);
  }
}

template <class T>
DS_INLINE T* row_at(const HeadView& view, int64_t b, int64_t h, int64_t t) {
  return (T*)view.data + b * view.b + h * view.h + t * view.t;
}

template <class T>
constexpr bool is_float = sizeof(T) == 4;

// One row as float32; what fills it up to a whole number of parts is zero.
template <class T>
DS_INLINE void copy_row(const T* from, int64_t K, float* to) {
  for_row(K, [&](auto whole, int64_t d, int64_t n) { put<whole.value>(to + d, get<whole.value>(from + d, n), n); });
  for (int64_t d = K; d < padded(K); ++d) to[d] = 0.f;
}

template <class T>
DS_INLINE Rows copy_rows(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K, float* room) {
  const T* from = row_at<T>(view, b, h, t);
  for (int64_t i = 0; i < count; ++i) copy_row(from + i * view.t, K, room + i * padded(K));
  return {room, padded(K)};
}

// Rows as float32, a whole number of parts wide: where they are stored, or converted into `room`.
template <class T>
DS_INLINE Rows read_rows(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K, float* room) {
  if constexpr (is_float<T>) {
    if (padded(K) == K) return {row_at<float>(view, b, h, t), view.t};
  }
  return copy_rows<T>(view, b, h, t, count, K, room);
}

// Where rows of results can be made: in place, or in `room`, from which write_rows then stores them.
template <class T>
DS_INLINE Rows rows_for(const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t K, float* room) {
  if constexpr (is_float<T>) {
    if (padded(K) == K) return {(float*)row_at<T>(view, b, h, t), view.t};
  }
  return {room, padded(K)};
}
template <class T>
DS_INLINE void write_rows(Rows rows, const HeadView& view, int64_t b, int64_t h, int64_t t, int64_t count, int64_t K) {
  T* to = row_at<T>(view, b, h, t);
  if ((void*)rows.data == (void*)to) return;
  for (int64_t i = 0; i < count; ++i) {
    for_row(K, [&](auto whole, int64_t d, int64_t n) {
      put<whole.value>(to + i * view.t + d, get<whole.value>(rows.data + i * rows.step + d, n), n);
    });
  }
}

// Keys or values of a sequence as rows of float32. Where several blocks of queries will read them, they are converted and put
// behind each other once: as they are stored, in a projection of q, k and v, every row is on a page of its own.
template <class T>
struct KeyRows {
  const HeadView& view;
  int64_t b, h, first, K;
  float* kept;  // all rows, or null
  float* room;  // those of a block

  DS_INLINE void keep(int64_t rows) {
    const int64_t width = padded(K);
    const T* from = row_at<T>(view, b, h, first);
    for (int64_t i = 0; i < rows; ++i) copy_row(from + i * view.t, K, kept + i * width);
  }
  DS_INLINE Rows block(int64_t at, int64_t count) {
    if (kept != nullptr) return {kept + at * padded(K), padded(K)};
    return read_rows<T>(view, b, h, first + at, count, K, room);
  }
};

}  // namespace
}  // namespace ditscale::cpu
