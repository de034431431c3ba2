// The blocks that attention is computed in: tiles of rows in shared memory, fragments of them in registers, their products.
//
// A tile holds rows of W columns, each row an odd number of 16-byte chunks long: eight rows then lie in different banks, one
// below the other. A warp multiplies 16 MT rows of its own with all rows of a tile. Accumulators of 8 columns have four numbers
// a lane: rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
#pragma once

#include "attention.h"
#include "launch.h"
#include "warp.h"

namespace ditscale::cuda {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int SMALLEST_LIMIT = 99 * 1024;  // shared memory of a block on sm_86, 89 and 120; other architectures give more
constexpr float LOG2E = 1.4426950408889634f;

template <class T, int W>
struct Tile {
  static constexpr int CHUNKS = W / LANES<T>, STRIDE = (CHUNKS | 1) * 16, PASS = THREADS / CHUNKS;
};

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x) % 32;
}
__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x) / 32;
}

// The first row of a sample and the number of its rows: all of its own, or its part of a packed batch.
struct Place {
  int64_t first;
  int rows;
};
__device__ __forceinline__ Place place_of(const int32_t* cu, int64_t b, int64_t rows) {
  if (cu == nullptr) return {0, static_cast<int>(rows)};
  const int all = static_cast<int>(rows);
  int first = cu[b] < 0 ? 0 : cu[b], last = cu[b + 1];
  first = first < all ? first : all;
  last = last < first ? first : last < all ? last : all;
  return {first, last - first};
}
// How many keys of a sample count.
__device__ __forceinline__ int counted(const int32_t* lengths, int64_t b, int rows) {
  if (lengths == nullptr) return rows;
  const int n = lengths[b];
  return n < 0 ? 0 : n < rows ? n : rows;
}

template <class T>
__device__ __forceinline__ T* head_of(const Heads& v, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(v.data) + b * v.b + h * v.h + row * v.t;
}

// Starts the copies of rows [0, count) to a tile of ROWS rows; zeros below them and beyond column K. A thread keeps to one
// column of chunks and goes down the rows.
template <class T, int W, int ROWS>
__device__ __forceinline__ void copy_rows(char* tile, const T* rows, int64_t stride, int count, int K) {
  using L = Tile<T, W>;
  const int row = static_cast<int>(threadIdx.x) / L::CHUNKS, chunk = static_cast<int>(threadIdx.x) % L::CHUNKS;
  if (row >= L::PASS) return;
  const bool inside = chunk * LANES<T> < K;
  const T* from = rows + row * stride + chunk * LANES<T>;
  char* to = tile + row * L::STRIDE + chunk * 16;
#pragma unroll
  for (int r = 0; r < ROWS; r += L::PASS) {
    if (r + L::PASS <= ROWS || row + r < ROWS) copy_16(to + r * L::STRIDE, from, inside && row + r < count);
    from += L::PASS * stride;
  }
}

// A left factor: 16 rows of two chunks, as `multiply` takes it.
template <class T>
struct Left {
  uint32_t r[4];
  __device__ __forceinline__ void set(const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = a[i];
  }
};
template <>
struct Left<float> {
  uint32_t high[4], low[4];
  __device__ __forceinline__ void set(const uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = to_tf32(__uint_as_float(a[i]));
      low[i] = to_tf32(__uint_as_float(a[i]) - __uint_as_float(high[i]));
    }
  }
};
template <class T>
__device__ __forceinline__ void multiply_left(float (&d)[4], const Left<T>& a, const uint32_t* b) {
  multiply<T>(d, a.r, b);
}
__device__ __forceinline__ void multiply_left(float (&d)[4], const Left<float>& a, const uint32_t* b) {
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    high[i] = to_tf32(__uint_as_float(b[i]));
    low[i] = to_tf32(__uint_as_float(b[i]) - __uint_as_float(high[i]));
  }
  float part[4] = {0.f, 0.f, 0.f, 0.f};
  multiply_tf32(part, a.low, high);
  multiply_tf32(part, a.high, low);
  multiply_tf32(part, a.high, high);
  // Tensor cores cut off what does not fit a sum: long ones are made here, where additions round to the nearest.
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += part[i];
}

// 16 MT rows of a tile as left factors: in registers, or read again from shared memory at every use.
template <class T, int W, int MT, bool HELD>
struct Rows;
template <class T, int W, int MT>
struct Rows<T, W, MT, false> {
  using L = Tile<T, W>;
  const char* p;
  __device__ __forceinline__ void take(const char* first) {
    p = first + lane_id() % 16 * L::STRIDE + lane_id() / 16 * 16;
  }
  __device__ __forceinline__ void get(int m, int step, uint32_t (&a)[4]) const {
    load_matrices(a, p + m * 16 * L::STRIDE + step * 32);
  }
  __device__ __forceinline__ void get_last(int m, uint32_t (&a)[2]) const {
    load_matrices(a, p + m * 16 * L::STRIDE + (L::CHUNKS - 1) * 16);
  }
};
template <class T, int W, int MT>
struct Rows<T, W, MT, true> {
  static constexpr int STEPS = Tile<T, W>::CHUNKS / 2;
  uint32_t r[MT][STEPS][4], last[MT][2];
  __device__ __forceinline__ void take(const char* first) {
    Rows<T, W, MT, false> rows;
    rows.take(first);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) rows.get(m, s, r[m][s]);
      if constexpr (Tile<T, W>::CHUNKS % 2 == 1) rows.get_last(m, last[m]);
    }
  }
  __device__ __forceinline__ void get(int m, int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = r[m][step][i];
  }
  __device__ __forceinline__ void get_last(int m, uint32_t (&a)[2]) const {
    a[0] = last[m][0];
    a[1] = last[m][1];
  }
};

template <int MT, int N>
__device__ __forceinline__ void clear(float (&s)[MT][N][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.f;
  }
}

// s = the products of the warp's rows with the 8 N rows of a tile, summed over W columns in steps of two chunks.
template <class T, int W, int MT, int N, bool HELD>
__device__ __forceinline__ void multiply_rows(float (&s)[MT][N][4], const Rows<T, W, MT, HELD>& left, const char* tile) {
  using L = Tile<T, W>;
  clear(s);
  const int lane = lane_id();
  const char* pair = tile + (lane % 8 + lane / 16 * 8) * L::STRIDE + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < L::CHUNKS / 2; ++step) {
    Left<T> a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      uint32_t raw[4];
      left.get(m, step, raw);
      a[m].set(raw);
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrices(b, pair + n * 8 * L::STRIDE + step * 32);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply_left(s[m][n], a[m], b);
        multiply_left(s[m][n + 1], a[m], b + 2);
      }
    }
  }
  if constexpr (L::CHUNKS % 2 == 1) {  // 72 columns: four steps of 16 and one of 8
    uint32_t a[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) left.get_last(m, a[m]);
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      uint32_t b[4];
      load_matrices(b, tile + (n * 8 + lane) * L::STRIDE + (L::CHUNKS - 1) * 16);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_half<T>(s[m][n + i], a[m], b + i);
      }
    }
  }
}

// o += the 8 N rows of a tile, weighted by w as it stands in accumulators and rounded to the storage: what two neighbouring
// accumulators hold of a row is what a left factor of 16 (float32: one, of 8) columns wants of it.
template <class T, int W, bool APART = true, int MT, int N>
__device__ __forceinline__ void add_weighted(float (&o)[MT][W / 8][4], const float (&w)[MT][N][4], const char* tile) {
  using L = Tile<T, W>;
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const char* pair = tile + lane % 16 * L::STRIDE + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pack<T>(w[m][2 * k + i / 2][i % 2 * 2], w[m][2 * k + i / 2][i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int n = 0; n + 1 < L::CHUNKS; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, pair + k * 16 * L::STRIDE + n * 16);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply<T>(o[m][n], a[m], b);
          multiply<T>(o[m][n + 1], a[m], b + 2);
        }
      }
      if constexpr (L::CHUNKS % 2 == 1) {
        uint32_t b[2];
        load_matrices_transposed(b, tile + (k * 16 + lane % 16) * L::STRIDE + (L::CHUNKS - 1) * 16);
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply<T>(o[m][L::CHUNKS - 1], a[m], b);
      }
    }
  } else {
    // Summed rows 2 t and 2 t + 1 of the tile stand where the instruction has t and t + 4: a sum knows no order. A tile is
    // summed by itself before it is added, so that an accumulator is rounded once a tile.
    const float* pair = reinterpret_cast<const float*>(tile + lane % 4 * 2 * L::STRIDE) + lane / 4;
    Left<float> a[MT][N];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const uint32_t raw[4] = {
            __float_as_uint(w[m][k][0]), __float_as_uint(w[m][k][2]), __float_as_uint(w[m][k][1]),
            __float_as_uint(w[m][k][3])};
        a[m][k].set(raw);
      }
    }
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      float part[MT][1][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[m][0][i] = APART ? 0.f : o[m][n][i];
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float* at = pair + k * 8 * (L::STRIDE / 4) + n * 8;
        const uint32_t b[2] = {
            __float_as_uint(load_shared(at)), __float_as_uint(load_shared(at + L::STRIDE / 4))};
#pragma unroll
        for (int m = 0; m < MT; ++m) multiply_left(part[m][0], a[m][k], b);
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = APART ? o[m][n][i] + part[m][0][i] : part[m][0][i];
      }
    }
  }
}

// Writes 16 MT rows of accumulators to global memory in accesses of 16 bytes, through the warp's own rows of shared memory.
// Only the first `count` rows and K columns.
template <class T, int W, int MT>
__device__ __forceinline__ void put_rows(
    T* rows, int64_t stride, int count, int K, const float (&o)[MT][W / 8][4], char* staging) {
  using L = Tile<T, W>;
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        char* to = staging + (m * 16 + half * 8 + lane / 4) * L::STRIDE + (n * 8 + lane % 4 * 2) * static_cast<int>(sizeof(T));
        if constexpr (sizeof(T) == 2) {
          store_shared(reinterpret_cast<uint32_t*>(to), pack<T>(o[m][n][2 * half], o[m][n][2 * half + 1]));
        } else {
          store_shared(reinterpret_cast<float*>(to), o[m][n][2 * half]);
          store_shared(reinterpret_cast<float*>(to) + 1, o[m][n][2 * half + 1]);
        }
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < MT * 16 * L::CHUNKS; i += 32) {
    const int row = i / L::CHUNKS, chunk = i % L::CHUNKS;
    if (row >= count || chunk * LANES<T> >= K) continue;
    *reinterpret_cast<uint4*>(rows + row * stride + chunk * LANES<T>) =
        load_shared(reinterpret_cast<const uint4*>(staging + row * L::STRIDE + chunk * 16));
  }
  __syncwarp();
}

// The sum over the four lanes that share a row, the same in each.
__device__ __forceinline__ float quad_sum(float a) {
  a += __shfl_xor_sync(0xFFFFFFFFu, a, 1);
  return a + __shfl_xor_sync(0xFFFFFFFFu, a, 2);
}
__device__ __forceinline__ float quad_max(float a) {
  a = fmaxf(a, __shfl_xor_sync(0xFFFFFFFFu, a, 1));
  return fmaxf(a, __shfl_xor_sync(0xFFFFFFFFu, a, 2));
}

// Scores in units of log 2 are `factor * s`: scaled before the softmax where the scale is not positive, which turns the order
// around (or, at zero, makes nothing of a masked score), and where a bias is added; else inside it.
struct Units {
  float before, factor;
  bool scaled;
};
__device__ __forceinline__ Units units_of(const AttentionArgs& a) {
  const float c = a.scale * LOG2E;
  const bool scaled = a.key_bias != nullptr || !(a.scale > 0.f);
  return {c, scaled ? 1.f : c, scaled};
}

// Scores of queries by keys (keys across): units, bias, and no weight for the keys that do not count.
template <int MT, int N>
__device__ __forceinline__ void finish_scores(
    float (&s)[MT][N][4], const Units& u, const float* bias, int64_t bias_stride, int left) {
  const int column = lane_id() % 4 * 2;
  if (u.scaled) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = n * 8 + column + i;
        const float add = bias != nullptr && key < left ? bias[key * bias_stride] * LOG2E : 0.f;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          s[m][n][i] = fused(s[m][n][i], u.before, add);
          s[m][n][i + 2] = fused(s[m][n][i + 2], u.before, add);
        }
      }
    }
  }
  if (left < N * 8) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (n * 8 + column + i < left) continue;
#pragma unroll
        for (int m = 0; m < MT; ++m) s[m][n][i] = s[m][n][i + 2] = -INFINITY;
      }
    }
  }
}

}  // namespace
}  // namespace ditscale::cuda
