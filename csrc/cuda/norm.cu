// LayerNorm / RMS norm with modulation, with or without a gated residual in front: forward and backward. Mathematics and
// reduction scheme: docs/kernels.md.
//
// The fast kernels give every thread one 16-byte vector of columns, a block as many threads as a row has vectors, and walk
// down the rows of a chunk ROWS at a time: modulation is read once a chunk, all loads of a step are in flight together, and
// sums over tokens stay in registers. The `any` kernels take every other width, alignment and per-token modulation.
#include "adaln.h"
#include "device.h"
#include "launch.h"

namespace ditscale::cuda {
namespace {

// Threads of a fast block: enough for 3072 float32 or 4096 half columns, few enough to leave the registers they use.
template <class T>
constexpr int FAST_THREADS = sizeof(T) == 4 ? 768 : 512;
constexpr int ANY_THREADS = 256;

// What the second pass finds left of the mean corrects it, so that a constant row is centred to zeros.
__device__ __forceinline__ void finish_moments(
    float sum, float squares, int64_t D, float eps, bool rms, float* mean, float* rstd) {
  const float n = static_cast<float>(D), shift = rms ? 0.f : sum / n;
  const float variance = squares / n - shift * shift;
  *mean += shift;
  *rstd = 1.0f / sqrtf((variance < 0.f ? 0.f : variance) + eps);
}

// Mean and deviation of ROWS rows held as packs: the sums, then the centred squares, over registers. A buffer is written again
// only behind the barrier of the other one: without means there is one sum, and `turn` alternates between the two.
template <class T, int N, int ROWS>
__device__ __forceinline__ void row_moments(
    const Pack<T, N> (&x)[ROWS], bool active, int64_t D, float eps, bool rms, float (*buffer)[2 * ROWS * 32], int64_t turn,
    float (&mean)[ROWS], float (&rstd)[ROWS]) {
  float total[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) mean[i] = 0.f;
  if (!rms) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      total[i] = 0.f;
#pragma unroll
      for (int j = 0; j < N; ++j) total[i] += active ? x[i][j] : 0.f;
    }
    block_sum<ROWS>(total, buffer[0]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) mean[i] = total[i] / static_cast<float>(D);
  }
  float centred[2 * ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    centred[2 * i] = centred[2 * i + 1] = 0.f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = active ? x[i][j] - mean[i] : 0.f;
      centred[2 * i] += c;
      centred[2 * i + 1] += c * c;
    }
  }
  block_sum<2 * ROWS>(centred, buffer[rms ? turn % 2 : 1]);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) finish_moments(centred[2 * i], centred[2 * i + 1], D, eps, rms, &mean[i], &rstd[i]);
}

template <class T, bool BRANCH>
__global__ void __launch_bounds__(FAST_THREADS<T>) forward_fast(ForwardArgs a, int64_t chunk, int64_t chunks) {
  constexpr int N = LANES<T>, ROWS = 4;
  __shared__ float buffer[2][2 * ROWS * 32];
  const int64_t b = blockIdx.x / chunks, first = (blockIdx.x % chunks) * chunk;
  const int64_t last = first + chunk < a.T ? first + chunk : a.T;
  const int64_t d = static_cast<int64_t>(threadIdx.x) * N;
  const bool active = d < a.D;
  float factor[N] = {0.f}, shift[N] = {0.f}, gate[BRANCH ? N : 1] = {0.f};
  if (active) {
    modulation_at(a.scale, a.modulation, b, 0, d, factor);
    modulation_at(a.shift, a.modulation, b, 0, d, shift);
    if constexpr (BRANCH) modulation_at(a.gate, a.modulation, b, 0, d, gate);
#pragma unroll
    for (int j = 0; j < N; ++j) factor[j] += a.scale_base;
  }
  for (int64_t t0 = first; t0 < last; t0 += ROWS) {
    Pack<T, N> x[ROWS], branch[BRANCH ? ROWS : 1];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      x[i] = Pack<T, N>{};
      if (active && t0 + i < last) x[i] = fetch<T, N>(row_of<T>(a.x, b, t0 + i) + d);
      if constexpr (BRANCH) {
        branch[i] = Pack<T, N>{};
        if (active && t0 + i < last) branch[i] = fetch<T, N>(row_of<T>(a.branch, b, t0 + i) + d);
      }
    }
    if constexpr (BRANCH) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        float sum[N];
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = x[i][j] + gate[j] * branch[i][j];
        x[i] = packed<T, N>(sum);  // the norm sees what is stored
        if (active && t0 + i < last) store(static_cast<T*>(a.x_new) + (b * a.T + t0 + i) * a.D + d, x[i]);
      }
    }
    float mean[ROWS], rstd[ROWS];
    row_moments<T, N, ROWS>(x, active, a.D, a.eps, a.rms, buffer, (t0 - first) / ROWS, mean, rstd);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (t0 + i >= last) break;
      const int64_t row = b * a.T + t0 + i;
      float y[N];
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] = (x[i][j] - mean[i]) * rstd[i] * factor[j] + shift[j];
      if (active) put<T, N>(static_cast<T*>(a.y) + row * a.D + d, y);
      if (a.rstd != nullptr && threadIdx.x == 0) {
        a.mean[row] = mean[i];
        a.rstd[row] = rstd[i];
      }
    }
  }
}

// One row a block, any width; what a thread reads again from memory is what it wrote itself.
template <class T, int N>
__global__ void __launch_bounds__(ANY_THREADS) forward_any(ForwardArgs a) {
  __shared__ float buffer[2][64];
  const int64_t row = blockIdx.x, b = row / a.T, t = row % a.T;
  const int64_t start = static_cast<int64_t>(threadIdx.x) * N, step = static_cast<int64_t>(blockDim.x) * N;
  const T* x = row_of<T>(a.x, b, t);
  float total[1] = {0.f};
  if (a.branch.data != nullptr) {
    const T* branch = row_of<T>(a.branch, b, t);
    T* x_new = static_cast<T*>(a.x_new) + row * a.D;
    for (int64_t d = start; d < a.D; d += step) {
      const Pack<T, N> p = fetch<T, N>(x + d), q = fetch<T, N>(branch + d);
      float gate[N], sum[N];
      modulation_at(a.gate, a.modulation, b, t, d, gate);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = p[j] + gate[j] * q[j];
      put<T, N>(x_new + d, sum);
    }
    x = x_new;
  }
  float mean = 0.f;
  if (!a.rms) {
    for (int64_t d = start; d < a.D; d += step) {
      const Pack<T, N> p = fetch<T, N>(x + d);
#pragma unroll
      for (int j = 0; j < N; ++j) total[0] += p[j];
    }
    block_sum<1>(total, buffer[0]);
    mean = total[0] / static_cast<float>(a.D);
  }
  float rstd, centred[2] = {0.f, 0.f};
  for (int64_t d = start; d < a.D; d += step) {
    const Pack<T, N> p = fetch<T, N>(x + d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = p[j] - mean;
      centred[0] += c;
      centred[1] += c * c;
    }
  }
  block_sum<2>(centred, buffer[1]);
  finish_moments(centred[0], centred[1], a.D, a.eps, a.rms, &mean, &rstd);
  if (a.rstd != nullptr && threadIdx.x == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  T* out = static_cast<T*>(a.y) + row * a.D;
  for (int64_t d = start; d < a.D; d += step) {
    const Pack<T, N> p = fetch<T, N>(x + d);
    float scale[N], shift[N], y[N];
    modulation_at(a.scale, a.modulation, b, t, d, scale);
    modulation_at(a.shift, a.modulation, b, t, d, shift);
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = (p[j] - mean) * rstd * (a.scale_base + scale[j]) + shift[j];
    put<T, N>(out + d, y);
  }
}

template <class T, bool BRANCH>
__global__ void __launch_bounds__(FAST_THREADS<T>)
    backward_fast(BackwardArgs a, int64_t segment_rows, int64_t chunk, int64_t chunks, float* partial) {
  constexpr int N = LANES<T>, SUMS = BRANCH ? 3 : 2;
  constexpr int ROWS = BRANCH ? 1 : 2;  // what fits the registers of a block of FAST_THREADS without a spill
  __shared__ float buffer[2][2 * ROWS * 32];
  __shared__ float pair_buffer[2][2 * ROWS * 32];
  const int64_t segment = blockIdx.x / chunks, first = (blockIdx.x % chunks) * chunk;
  const int64_t last = first + chunk < segment_rows ? first + chunk : segment_rows;
  const int64_t d = static_cast<int64_t>(threadIdx.x) * N;
  const bool active = d < a.D;
  int64_t row = segment * segment_rows + first, b = row / a.T, t = row % a.T;
  float factor[N] = {0.f}, gate[BRANCH ? N : 1] = {0.f}, s0[N] = {0.f}, s1[N] = {0.f}, s2[BRANCH ? N : 1] = {0.f};
  if (active) {  // a segment has one modulation, so any of its samples will do
    modulation_at(a.scale, a.modulation, b, 0, d, factor);
    if constexpr (BRANCH) modulation_at(a.gate, a.modulation, b, 0, d, gate);
#pragma unroll
    for (int j = 0; j < N; ++j) factor[j] += a.scale_base;
  }
  const int64_t end = segment * segment_rows + last;
  for (int parity = 0; row < end; row += ROWS, parity ^= 1) {
    Pack<T, N> x[ROWS], dy[ROWS], residual[BRANCH ? ROWS : 1], branch[BRANCH ? ROWS : 1];
    float mean[ROWS], rstd[ROWS], pair[2 * ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const bool mine = active && row + i < end;
      x[i] = dy[i] = Pack<T, N>{};
      if (mine) {
        x[i] = fetch<T, N>(row_of<T>(a.x, b, t) + d);
        dy[i] = fetch<T, N>(row_of<T>(a.dy, b, t) + d);
      }
      if constexpr (BRANCH) {
        residual[i] = branch[i] = Pack<T, N>{};
        if (mine) {
          branch[i] = fetch<T, N>(row_of<T>(a.branch, b, t) + d);
          if (a.dresidual.data != nullptr) residual[i] = fetch<T, N>(row_of<T>(a.dresidual, b, t) + d);
        }
      }
      if (a.rstd != nullptr) {
        mean[i] = row + i < end && !a.rms ? a.mean[row + i] : 0.f;
        rstd[i] = row + i < end ? a.rstd[row + i] : 0.f;
      }
      if (++t == a.T) {
        t = 0;
        ++b;
      }
    }
    // Registers hold no more rows, and blocks are few, for each keeps sums: the next rows come nearer while these are summed.
    int64_t next_b = b, next_t = t;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (active && row + ROWS + i < end) {
        ask_for(row_of<T>(a.x, next_b, next_t) + d);
        ask_for(row_of<T>(a.dy, next_b, next_t) + d);
        if constexpr (BRANCH) {
          ask_for(row_of<T>(a.branch, next_b, next_t) + d);
          if (a.dresidual.data != nullptr) ask_for(row_of<T>(a.dresidual, next_b, next_t) + d);
        }
      }
      if (++next_t == a.T) {
        next_t = 0;
        ++next_b;
      }
    }
    if (a.rstd == nullptr) row_moments<T, N, ROWS>(x, active, a.D, a.eps, a.rms, buffer, 1, mean, rstd);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      pair[2 * i] = pair[2 * i + 1] = 0.f;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = dy[i][j] * factor[j];
        pair[2 * i] += g;
        pair[2 * i + 1] += active ? g * ((x[i][j] - mean[i]) * rstd[i]) : 0.f;
      }
    }
    block_sum<2 * ROWS>(pair, pair_buffer[parity]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (row + i >= end) break;
      const float c1 = a.rms ? 0.f : pair[2 * i] / static_cast<float>(a.D), c2 = pair[2 * i + 1] / static_cast<float>(a.D);
      float dx[N], dbranch[BRANCH ? N : 1];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float grad = dy[i][j], normed = (x[i][j] - mean[i]) * rstd[i];
        dx[j] = rstd[i] * (grad * factor[j] - c1 - normed * c2);
        s0[j] += grad;
        s1[j] += grad * normed;
        if constexpr (BRANCH) {
          dx[j] += residual[i][j];
          dbranch[j] = dx[j] * gate[j];
          s2[j] += dx[j] * branch[i][j];
        }
      }
      if (!active) continue;
      put<T, N>(static_cast<T*>(a.dx) + (row + i) * a.D + d, dx);
      if constexpr (BRANCH) put<T, N>(static_cast<T*>(a.dbranch) + (row + i) * a.D + d, dbranch);
    }
  }
  if (!active) return;
  if (partial == nullptr) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * a.D + d;
    put_any<N>(a.dshift, a.modulation, at, s0);
    put_any<N>(a.dscale, a.modulation, at, s1);
    if constexpr (BRANCH) put_any<N>(a.dgate, a.modulation, at, s2);
    return;
  }
  const int64_t at = static_cast<int64_t>(blockIdx.x) * SUMS * a.D + d;
  put_any<N>(partial, 0, at, s0);
  put_any<N>(partial, 0, at + a.D, s1);
  if constexpr (BRANCH) put_any<N>(partial, 0, at + 2 * a.D, s2);
}

// One row a block: dx, dbranch, per-token gradients of the modulation, and what the sums over columns need of the row.
template <class T, int N>
__global__ void __launch_bounds__(ANY_THREADS) backward_any_rows(BackwardArgs a, float* row_stats) {
  __shared__ float buffer[2][64];
  __shared__ float pair_buffer[64];
  const int64_t row = blockIdx.x, b = row / a.T, t = row % a.T;
  const int64_t start = static_cast<int64_t>(threadIdx.x) * N, step = static_cast<int64_t>(blockDim.x) * N;
  const T *x = row_of<T>(a.x, b, t), *dy = row_of<T>(a.dy, b, t);
  float mean = 0.f, rstd;
  if (a.rstd != nullptr) {
    mean = a.rms ? 0.f : a.mean[row];
    rstd = a.rstd[row];
  } else {
    float total[1] = {0.f};
    if (!a.rms) {
      for (int64_t d = start; d < a.D; d += step) {
        const Pack<T, N> p = fetch<T, N>(x + d);
#pragma unroll
        for (int j = 0; j < N; ++j) total[0] += p[j];
      }
      block_sum<1>(total, buffer[0]);
      mean = total[0] / static_cast<float>(a.D);
    }
    float centred[2] = {0.f, 0.f};
    for (int64_t d = start; d < a.D; d += step) {
      const Pack<T, N> p = fetch<T, N>(x + d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float c = p[j] - mean;
        centred[0] += c;
        centred[1] += c * c;
      }
    }
    block_sum<2>(centred, buffer[1]);
    finish_moments(centred[0], centred[1], a.D, a.eps, a.rms, &mean, &rstd);
  }
  float pair[2] = {0.f, 0.f};
  for (int64_t d = start; d < a.D; d += step) {
    const Pack<T, N> p = fetch<T, N>(x + d), q = fetch<T, N>(dy + d);
    float scale[N];
    modulation_at(a.scale, a.modulation, b, t, d, scale);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = q[j] * (a.scale_base + scale[j]);
      pair[0] += g;
      pair[1] += g * ((p[j] - mean) * rstd);
    }
  }
  block_sum<2>(pair, pair_buffer);
  const float c1 = a.rms ? 0.f : pair[0] / static_cast<float>(a.D), c2 = pair[1] / static_cast<float>(a.D);
  if (row_stats != nullptr && threadIdx.x == 0) {
    row_stats[4 * row] = mean;
    row_stats[4 * row + 1] = rstd;
    row_stats[4 * row + 2] = c1;
    row_stats[4 * row + 3] = c2;
  }
  const T* residual = a.dresidual.data != nullptr ? row_of<T>(a.dresidual, b, t) : nullptr;
  const T* branch = a.branch.data != nullptr ? row_of<T>(a.branch, b, t) : nullptr;
  for (int64_t d = start; d < a.D; d += step) {
    const Pack<T, N> p = fetch<T, N>(x + d), q = fetch<T, N>(dy + d);
    Pack<T, N> res{}, br{};
    if (residual != nullptr) res = fetch<T, N>(residual + d);
    if (branch != nullptr && a.per_token) br = fetch<T, N>(branch + d);
    float scale[N], gate[N] = {0.f}, dx[N], dbranch[N], dshift[N], dscale[N], dgate[N];
    modulation_at(a.scale, a.modulation, b, t, d, scale);
    if (branch != nullptr) modulation_at(a.gate, a.modulation, b, t, d, gate);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float grad = q[j], normed = (p[j] - mean) * rstd;
      dx[j] = rstd * (grad * (a.scale_base + scale[j]) - c1 - normed * c2) + res[j];
      dbranch[j] = dx[j] * gate[j];
      dshift[j] = grad;
      dscale[j] = grad * normed;
      dgate[j] = dx[j] * br[j];
    }
    const int64_t at = row * a.D + d;
    put<T, N>(static_cast<T*>(a.dx) + at, dx);
    if (branch != nullptr) put<T, N>(static_cast<T*>(a.dbranch) + at, dbranch);
    if (!a.per_token) continue;
    put_any<N>(a.dshift, a.modulation, at, dshift);
    put_any<N>(a.dscale, a.modulation, at, dscale);
    if (branch != nullptr) put_any<N>(a.dgate, a.modulation, at, dgate);
  }
}

// One column a thread down the rows of a chunk.
template <class T>
__global__ void __launch_bounds__(ANY_THREADS) backward_any_columns(
    BackwardArgs a, int64_t segment_rows, int64_t chunk, int64_t chunks, int64_t column_blocks, const float* row_stats,
    float* partial) {
  const int64_t part = blockIdx.x / column_blocks;
  const int64_t d = (blockIdx.x % column_blocks) * blockDim.x + threadIdx.x;
  if (d >= a.D) return;
  const int64_t segment = part / chunks, first = (part % chunks) * chunk;
  const int64_t last = first + chunk < segment_rows ? first + chunk : segment_rows;
  int64_t row = segment * segment_rows + first, b = row / a.T, t = row % a.T;
  float scale[1], s0 = 0.f, s1 = 0.f, s2 = 0.f;
  modulation_at(a.scale, a.modulation, b, 0, d, scale);
  const float factor = a.scale_base + scale[0];
  for (const int64_t end = segment * segment_rows + last; row < end; ++row) {
    const float* st = row_stats + 4 * row;
    const float grad = widen(row_of<T>(a.dy, b, t)[d]), normed = (widen(row_of<T>(a.x, b, t)[d]) - st[0]) * st[1];
    s0 += grad;
    s1 += grad * normed;
    if (a.branch.data != nullptr) {
      float dx = st[1] * (grad * factor - st[2] - normed * st[3]);
      if (a.dresidual.data != nullptr) dx += widen(row_of<T>(a.dresidual, b, t)[d]);
      s2 += dx * widen(row_of<T>(a.branch, b, t)[d]);
    }
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
  const int64_t sums = a.branch.data != nullptr ? 3 : 2;
  float* out = partial + part * sums * a.D + d;
  out[0] = s0;
  out[a.D] = s1;
  if (a.branch.data != nullptr) out[2 * a.D] = s2;
}

// 16-byte accesses need the width, every row and every base address to be multiples of them.
template <class T>
bool vectors_fit(int64_t D, std::initializer_list<Strided> views, std::initializer_list<const void*> dense) {
  constexpr int64_t N = LANES<T>;
  bool fit = D % N == 0;
  for (const Strided& v : views) fit = fit && (v.data == nullptr || (aligned(v.data) && v.b % N == 0 && v.t % N == 0));
  for (const void* p : dense) fit = fit && (p == nullptr || aligned(p));
  return fit;
}
template <class T>
bool vectors_fit(const ForwardArgs& a) {
  return vectors_fit<T>(a.D, {a.x, a.branch}, {a.x_new, a.y});
}
template <class T>
bool vectors_fit(const BackwardArgs& a) {
  return vectors_fit<T>(a.D, {a.x, a.dy, a.dresidual, a.branch}, {a.dx, a.dbranch});
}
template <class T>
bool width_fits(int64_t D) {
  return D <= FAST_THREADS<T> * LANES<T>;
}
unsigned row_threads(int64_t vectors) {
  return static_cast<unsigned>((vectors + 31) / 32 * 32);
}

template <class T>
void forward_as(const ForwardArgs& a, const Shape& s, bool per_token, void* stream) {
  const bool fit = vectors_fit<T>(a);
  if (fit && !per_token && width_fits<T>(a.D)) {
    // Short chunks fill the device; modulation is read again for each, from the L2 cache.
    const int64_t chunk = s.T < 8 ? s.T : 8, chunks = (s.T + chunk - 1) / chunk;
    const dim3 grid(static_cast<unsigned>(s.B * chunks)), block(row_threads(a.D / LANES<T>));
    if (a.branch.data != nullptr) {
      DS_LAUNCH((forward_fast<T, true>), grid, block, stream, a, chunk, chunks);
    } else {
      DS_LAUNCH((forward_fast<T, false>), grid, block, stream, a, chunk, chunks);
    }
    return;
  }
  const dim3 grid(static_cast<unsigned>(s.B * s.T)), block(ANY_THREADS);
  if (fit) {
    DS_LAUNCH((forward_any<T, LANES<T>>), grid, block, stream, a);
  } else {
    DS_LAUNCH((forward_any<T, 1>), grid, block, stream, a);
  }
}

template <class T>
bool backward_is_fast(const BackwardArgs& a) {
  return !a.per_token && vectors_fit<T>(a) && width_fits<T>(a.D);
}

template <class T>
void backward_as(const BackwardArgs& a, const Shape& s, const Cut& cut, float* partial, float* row_stats, void* stream) {
  const int64_t parts = cut.segments * cut.chunks;
  if (backward_is_fast<T>(a)) {
    const dim3 grid(static_cast<unsigned>(parts)), block(row_threads(a.D / LANES<T>));
    if (a.branch.data != nullptr) {
      DS_LAUNCH((backward_fast<T, true>), grid, block, stream, a, cut.rows, cut.chunk, cut.chunks, partial);
    } else {
      DS_LAUNCH((backward_fast<T, false>), grid, block, stream, a, cut.rows, cut.chunk, cut.chunks, partial);
    }
    return;
  }
  const dim3 rows(static_cast<unsigned>(s.B * s.T)), block(ANY_THREADS);
  if (vectors_fit<T>(a)) {
    DS_LAUNCH((backward_any_rows<T, LANES<T>>), rows, block, stream, a, row_stats);
  } else {
    DS_LAUNCH((backward_any_rows<T, 1>), rows, block, stream, a, row_stats);
  }
  if (a.per_token) return;
  const int64_t column_blocks = (a.D + ANY_THREADS - 1) / ANY_THREADS;
  const dim3 columns(static_cast<unsigned>(parts * column_blocks));
  DS_LAUNCH(
      (backward_any_columns<T>), columns, block, stream, a, cut.rows, cut.chunk, cut.chunks, column_blocks, row_stats, partial);
}

}  // namespace

const char* launch_forward(const ForwardArgs& a, Storage storage, const Shape& s, bool per_token, void* stream) {
  if (s.B * s.T == 0) return nullptr;
  DS_BY_STORAGE(storage, (forward_as<T>(a, s, per_token, stream)));
  return launch_error();
}

bool backward_needs_row_stats(const BackwardArgs& a, Storage storage) {
  bool fast = false;
  DS_BY_STORAGE(storage, (fast = backward_is_fast<T>(a)));
  return !fast && !a.per_token;
}

const char* launch_backward(
    const BackwardArgs& a, Storage storage, const Shape& s, const Cut& cut, float* partial, float* row_stats, void* stream) {
  if (s.B * s.T == 0) return nullptr;
  DS_BY_STORAGE(storage, (backward_as<T>(a, s, cut, partial, row_stats, stream)));
  return launch_error();
}

}  // namespace ditscale::cuda
