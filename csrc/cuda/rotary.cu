// RMS or layer norm of the rows of heads, their weight and rotary position embedding: forward, in place too, and backward.
// Mathematics: docs/attention.md.
//
// The fast kernels give a row to a power of two of lanes. A thread holds N pairs of numbers that are turned with each other, as
// two accesses of 16 bytes (of 8 where half a row is no multiple of 16: 36 numbers of 16 bits): N numbers of either half, or 2 N
// neighbours where pairs are neighbours or nothing is turned. It takes several heads of one token at a time, so that angles are
// read once for them and all loads of a step are in flight together. The `any` kernels take every other width and alignment.
#include "device.h"
#include "launch.h"
#include "rotary.h"

namespace ditscale::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int HEADS_FORWARD = 4, HEADS_BACKWARD = 2;  // of a token, that a thread takes at a time
constexpr int64_t MOST_CHUNKS = 1024;                 // blocks of a backward pass with a weight: several for each multiprocessor
constexpr int WIDEST_ROW = 512;                       // of the fast kernels: 32 lanes of 16 numbers

// Divisions of 64 bits cost a hundred instructions, and nearly every count fits in 32.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if ((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 == 0) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  return a / b;
}

template <class T>
__device__ __forceinline__ T* row_at(const HeadView& v, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(v.data) + b * v.b + h * v.h + t * v.t;
}

// Sums each value over neighbouring lanes, a power of two of them, always in the same order; every lane gets them.
template <int COUNT>
__device__ __forceinline__ void lane_sum(float (&value)[COUNT], int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) value[i] += __shfl_xor_sync(0xFFFFFFFFu, value[i], mask);
  }
}

// What a thread has of a row: 2 N numbers, element 2 i and 2 i + 1 the ones that are turned with each other.
template <class T, int N, bool HALVES>
struct Part {
  int64_t first[2];  // columns at which the two accesses begin
  bool has[2];

  __device__ __forceinline__ Part(int lane, int64_t K) {
    const int64_t pair = static_cast<int64_t>(lane) * N;
    first[0] = HALVES ? pair : 2 * pair;
    first[1] = HALVES ? K / 2 + pair : 2 * pair + N;
    has[0] = HALVES ? pair < K / 2 : first[0] < K;
    has[1] = HALVES ? has[0] : first[1] < K;
  }
  // Element i of a thread: which of the accesses, and where in it.
  static __device__ __forceinline__ constexpr int access(int i) {
    return HALVES ? i % 2 : i / N;
  }
  static __device__ __forceinline__ constexpr int place(int i) {
    return HALVES ? i / 2 : i % N;
  }
  __device__ __forceinline__ void read(const T* row, bool valid, Pack<T, N> (&to)[2]) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      to[s] = Pack<T, N>{};
      if (valid && has[s]) to[s] = fetch<T, N>(row + first[s]);
    }
  }
  static __device__ __forceinline__ void widened(const Pack<T, N> (&from)[2], float (&to)[2 * N]) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) to[i] = from[access(i)][place(i)];
  }
  __device__ __forceinline__ void write(T* row, const float (&from)[2 * N]) const {
    float out[2][N];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) out[access(i)][place(i)] = from[i];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (has[s]) put<T, N>(row + first[s], out[s]);
    }
  }
  // Weights as they belong to the elements; 1 where there are none.
  __device__ __forceinline__ void weights(const float* weight, float (&to)[2 * N]) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      float part[N];
#pragma unroll
      for (int j = 0; j < N; ++j) part[j] = 1.f;
      if (weight != nullptr && has[s]) widened_from(weight + first[s], part);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        if (access(i) == s) to[i] = part[place(i)];
      }
    }
  }
};

// N angles' cosines or sines from pair `pair` on; zeros beyond the half. Half a row is a multiple of four numbers.
template <int N>
__device__ __forceinline__ void angles(const float* row, int64_t pair, int64_t half, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    Pack<float, 4> p{};
    if (pair + i < half) p = fetch<float, 4>(row + pair + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = p[j];
  }
}

// Mean and reciprocal deviation of ROWS rows from what the lanes hold of them; 0 and 1 without a norm.
template <int ROWS, int N, class P>
__device__ __forceinline__ void row_norms(
    const RotaryArgs& a, const P& part, const float (&x)[ROWS][2 * N], int lanes, float (&mean)[ROWS], float (&rstd)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    mean[r] = 0.f;
    rstd[r] = 1.f;
  }
  if (a.norm == static_cast<int>(HeadNorm::none)) return;
  const float n = static_cast<float>(a.K);
  float total[ROWS];
  // What the first sum leaves of the mean corrects it, so that a constant row is centred to zeros.
#pragma unroll 1
  for (int pass = 0; a.norm == static_cast<int>(HeadNorm::layer) && pass < 2; ++pass) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      total[r] = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) total[r] += part.has[P::access(i)] ? x[r][i] - mean[r] : 0.f;
    }
    lane_sum<ROWS>(total, lanes);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] += total[r] / n;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    total[r] = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const float c = part.has[P::access(i)] ? x[r][i] - mean[r] : 0.f;
      total[r] += c * c;
    }
  }
  lane_sum<ROWS>(total, lanes);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) rstd[r] = 1.0f / sqrtf(total[r] / n + a.eps);
}

// Which token and heads a step of a group of lanes is about. Steps count tokens first, then a token's heads by ROWS.
template <int ROWS>
struct Step {
  int64_t b, t, h;
  int rows;  // 0: nothing left

  __device__ __forceinline__ Step(const RotaryArgs& a, int64_t step, int64_t steps) {
    const int64_t of_token = (a.H + ROWS - 1) / ROWS, token = divide(step, of_token);
    b = divide(token, a.T);
    t = token - b * a.T;
    h = (step - token * of_token) * ROWS;
    const int64_t left = step < steps ? a.H - h : 0;
    rows = static_cast<int>(left < ROWS ? left : ROWS);
  }
};

template <class T, int N, bool HALVES>
__global__ void __launch_bounds__(THREADS) rotary_forward(RotaryArgs a, int64_t steps, int lanes) {
  constexpr int ROWS = HEADS_FORWARD;
  using P = Part<T, N, HALVES>;
  const int groups = THREADS / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const Step<ROWS> step(a, static_cast<int64_t>(blockIdx.x) * groups + static_cast<int>(threadIdx.x) / lanes, steps);
  const P part(lane, a.K);
  Pack<T, N> loaded[ROWS][2];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) part.read(row_at<const T>(a.x, step.b, step.h + r, step.t), r < step.rows, loaded[r]);
  float x[ROWS][2 * N], mean[ROWS], rstd[ROWS], weight[2 * N], c[N], s[N];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) P::widened(loaded[r], x[r]);
  part.weights(a.weight, weight);
  if (a.cos != nullptr) {
    const int64_t at = step.b * a.table_b + step.t * a.table_t, pair = static_cast<int64_t>(lane) * N;
    const int64_t half = step.rows > 0 ? a.K / 2 : 0;
    angles<N>(a.cos + at, pair, half, c);
    angles<N>(a.sin + at, pair, half, s);
  }
  row_norms<ROWS, N>(a, part, x, lanes, mean, rstd);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (r >= step.rows) break;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[r][i] = (x[r][i] - mean[r]) * rstd[r] * weight[i];
    if (a.cos != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float first = x[r][2 * i], second = x[r][2 * i + 1];
        x[r][2 * i] = first * c[i] - second * s[i];
        x[r][2 * i + 1] = second * c[i] + first * s[i];
      }
    }
    part.write(row_at<T>(a.out, step.b, step.h + r, step.t), x[r]);
  }
}

// A block walks over the steps of its chunk; what its threads summed of the weight's gradient is added up at the end, lanes
// first, then warps.
template <class T, int N, bool HALVES>
__global__ void __launch_bounds__(THREADS)
    rotary_backward(RotaryArgs a, int64_t steps, int64_t chunk, int lanes, float* partial) {
  constexpr int ROWS = HEADS_BACKWARD;
  using P = Part<T, N, HALVES>;
  __shared__ float buffer[THREADS / 32][WIDEST_ROW];
  const int groups = THREADS / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const P part(lane, a.K);
  float weight[2 * N], dweight[2 * N];
  part.weights(a.weight, weight);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) dweight[i] = 0.f;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t last = first + chunk < steps ? first + chunk : steps;
  for (int64_t start = first; start < last; start += groups) {
    const Step<ROWS> step(a, start + static_cast<int>(threadIdx.x) / lanes, last);
    Pack<T, N> loaded[2][ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      part.read(row_at<const T>(a.x, step.b, step.h + r, step.t), r < step.rows, loaded[0][r]);
      part.read(row_at<const T>(a.dout, step.b, step.h + r, step.t), r < step.rows, loaded[1][r]);
    }
    float x[ROWS][2 * N], g[ROWS][2 * N], mean[ROWS], rstd[ROWS], sums[2 * ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      P::widened(loaded[0][r], x[r]);
      P::widened(loaded[1][r], g[r]);
    }
    row_norms<ROWS, N>(a, part, x, lanes, mean, rstd);
    if (a.cos != nullptr) {
      const int64_t at = step.b * a.table_b + step.t * a.table_t, pair = static_cast<int64_t>(lane) * N;
      const int64_t half = step.rows > 0 ? a.K / 2 : 0;
      float c[N], s[N];
      angles<N>(a.cos + at, pair, half, c);
      angles<N>(a.sin + at, pair, half, s);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d1 = g[r][2 * i], d2 = g[r][2 * i + 1];
          g[r][2 * i] = d1 * c[i] + d2 * s[i];
          g[r][2 * i + 1] = d2 * c[i] - d1 * s[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[2 * r] = sums[2 * r + 1] = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        // Zeros where there is no number: of rows that are not there, 0 / sqrt(eps) would be NaN at eps = 0.
        x[r][i] = r < step.rows && part.has[P::access(i)] ? (x[r][i] - mean[r]) * rstd[r] : 0.f;
        dweight[i] += g[r][i] * x[r][i];
        g[r][i] *= weight[i];
        sums[2 * r] += g[r][i];
        sums[2 * r + 1] += g[r][i] * x[r][i];
      }
    }
    if (a.norm != static_cast<int>(HeadNorm::none)) {
      lane_sum<2 * ROWS>(sums, lanes);
      const float n = static_cast<float>(a.K);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float c1 = a.norm == static_cast<int>(HeadNorm::layer) ? sums[2 * r] / n : 0.f, c2 = sums[2 * r + 1] / n;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) g[r][i] = (g[r][i] - c1 - x[r][i] * c2) * rstd[r];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (r < step.rows) part.write(row_at<T>(a.out, step.b, step.h + r, step.t), g[r]);
    }
  }
  if (partial == nullptr) return;
  for (int mask = lanes; mask < 32; mask *= 2) {  // over the groups of a warp
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) dweight[i] += __shfl_xor_sync(0xFFFFFFFFu, dweight[i], mask);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (static_cast<int>(threadIdx.x) % 32 < lanes) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (part.has[P::access(i)]) buffer[warp][part.first[P::access(i)] + P::place(i)] = dweight[i];
    }
  }
  __syncthreads();
  for (int64_t d = threadIdx.x; d < a.K; d += THREADS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) total += buffer[w][d];
    partial[static_cast<int64_t>(blockIdx.x) * a.K + d] = total;
  }
}

// A pair of numbers of a row, any width: its columns, the second of which an odd row may lack.
struct Pair {
  int64_t first, second;
  bool both;
};
__device__ __forceinline__ Pair pair_of(const RotaryArgs& a, int64_t p) {
  if (a.cos != nullptr && a.interleaved) return {2 * p, 2 * p + 1, true};
  const int64_t half = a.K - a.K / 2;
  return {p, half + p, p < a.K / 2};
}

// One row a warp, one number an access. Rows of heads of a token lie beside each other; a thread reads its pairs again from
// memory, which nobody else writes.
template <class T, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) rotary_any(RotaryArgs a, int64_t rows, int64_t chunk, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + static_cast<int>(threadIdx.x) / 32;
  const int64_t begin = warp * chunk, end = begin + chunk < rows ? begin + chunk : rows, pairs = a.K - a.K / 2;
  const float n = static_cast<float>(a.K);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = divide(row, a.H), h = row - token * a.H, b = divide(token, a.T), t = token - b * a.T;
    const T* x = row_at<const T>(a.x, b, h, t);
    float mean = 0.f, rstd = 1.f, total[1];
#pragma unroll 1
    for (int pass = 0; a.norm == static_cast<int>(HeadNorm::layer) && pass < 2; ++pass) {  // as in row_norms
      total[0] = 0.f;
      for (int64_t d = lane; d < a.K; d += 32) total[0] += widen(x[d]) - mean;
      lane_sum<1>(total, 32);
      mean += total[0] / n;
    }
    if (a.norm != static_cast<int>(HeadNorm::none)) {
      total[0] = 0.f;
      for (int64_t d = lane; d < a.K; d += 32) {
        const float c = widen(x[d]) - mean;
        total[0] += c * c;
      }
      lane_sum<1>(total, 32);
      rstd = 1.0f / sqrtf(total[0] / n + a.eps);
    }
    const int64_t at = b * a.table_b + t * a.table_t;
    T* out = row_at<T>(a.out, b, h, t);
    if constexpr (BACKWARD) {
      const T* dout = row_at<const T>(a.dout, b, h, t);
      // The gradient of the scaled row, and the normalised row.
      const auto gradients = [&](int64_t p, const Pair& c, float (&g)[2], float (&normed)[2]) {
        const float d1 = widen(dout[c.first]), d2 = c.both ? widen(dout[c.second]) : 0.f;
        const float cosine = a.cos != nullptr ? a.cos[at + p] : 1.f, sine = a.cos != nullptr ? a.sin[at + p] : 0.f;
        g[0] = d1 * cosine + d2 * sine;
        g[1] = d2 * cosine - d1 * sine;
        normed[0] = (widen(x[c.first]) - mean) * rstd;
        normed[1] = c.both ? (widen(x[c.second]) - mean) * rstd : 0.f;
      };
      const auto weigh = [&](const Pair& c, float (&g)[2]) {
        if (a.weight == nullptr) return;
        g[0] *= a.weight[c.first];
        if (c.both) g[1] *= a.weight[c.second];
      };
      float sums[2] = {0.f, 0.f};
      for (int64_t p = lane; p < pairs; p += 32) {
        const Pair c = pair_of(a, p);
        float g[2], normed[2];
        gradients(p, c, g, normed);
        if (partial != nullptr) {  // a thread adds to columns of its own, one row after the other
          float* sum = partial + warp * a.K;
          sum[c.first] = (row > begin ? sum[c.first] : 0.f) + g[0] * normed[0];
          if (c.both) sum[c.second] = (row > begin ? sum[c.second] : 0.f) + g[1] * normed[1];
        }
        weigh(c, g);
        sums[0] += g[0] + g[1];
        sums[1] += g[0] * normed[0] + g[1] * normed[1];
      }
      lane_sum<2>(sums, 32);
      const float c1 = a.norm == static_cast<int>(HeadNorm::layer) ? sums[0] / n : 0.f;
      const float c2 = a.norm != static_cast<int>(HeadNorm::none) ? sums[1] / n : 0.f;
      for (int64_t p = lane; p < pairs; p += 32) {
        const Pair c = pair_of(a, p);
        float g[2], normed[2];
        gradients(p, c, g, normed);
        weigh(c, g);
        narrow((g[0] - c1 - normed[0] * c2) * rstd, out + c.first);
        if (c.both) narrow((g[1] - c1 - normed[1] * c2) * rstd, out + c.second);
      }
    } else {
#pragma unroll 1  // loads do not pass stores that may alias: unrolled it holds more registers, no more accesses in flight
      for (int64_t p = lane; p < pairs; p += 32) {
        const Pair c = pair_of(a, p);
        float first = (widen(x[c.first]) - mean) * rstd, second = c.both ? (widen(x[c.second]) - mean) * rstd : 0.f;
        if (a.weight != nullptr) {
          first *= a.weight[c.first];
          if (c.both) second *= a.weight[c.second];
        }
        if (a.cos != nullptr) {
          const float cosine = a.cos[at + p], sine = a.sin[at + p], turned = first * cosine - second * sine;
          second = second * cosine + first * sine;
          first = turned;
        }
        narrow(first, out + c.first);
        if (c.both) narrow(second, out + c.second);
      }
    }
  }
}

// How a call is laid over the device.
struct Plan {
  int numbers;         // N of the fast kernels; 0: any
  bool halves;
  int lanes;           // of a row
  int64_t steps;       // of all groups together; rows where N is 0
  int64_t chunk, blocks;
};

bool fits(const HeadView& v, int64_t numbers, int64_t size) {
  const int64_t bytes = numbers * size;
  return reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(bytes) == 0 && v.b % numbers == 0 &&
      v.h % numbers == 0 && v.t % numbers == 0;
}

Plan plan_of(const RotaryArgs& a, Storage storage, int64_t B, bool backward) {
  const int64_t size = bytes_of(storage), widest = 16 / size, half = a.K / 2;
  const bool turn = a.cos != nullptr;
  Plan p{0, turn && !a.interleaved, 32, B * a.T * a.H, 1, 0};
  // Angles are read four at a time.
  const bool tables = !turn || (a.K % 8 == 0 && aligned(a.cos) && aligned(a.sin));
  for (int64_t n = widest; tables && n >= 4 && p.numbers == 0; n /= 2) {
    if (!p.halves && n != widest) break;  // narrower accesses are compiled for halves only
    const bool whole = p.halves ? half % n == 0 : a.K % n == 0;
    const bool views = fits(a.x, n, size) && fits(a.out, n, size) && (!backward || fits(a.dout, n, size));
    if (whole && views && a.K <= 64 * n) p.numbers = static_cast<int>(n);
  }
  int64_t groups = THREADS / 32;
  if (p.numbers != 0) {
    p.lanes = 1;
    while (p.lanes * 2 * p.numbers < a.K) p.lanes *= 2;
    const int64_t heads = backward ? HEADS_BACKWARD : HEADS_FORWARD;
    p.steps = B * a.T * ((a.H + heads - 1) / heads);
    groups = THREADS / p.lanes;
  }
  p.chunk = groups;  // a step for each group
  if (p.steps == 0) return p;
  if (backward && a.weight != nullptr) {
    const int64_t blocks = (p.steps + groups - 1) / groups, most = blocks < MOST_CHUNKS ? blocks : MOST_CHUNKS;
    p.chunk = (blocks + most - 1) / most * groups;
  }
  p.blocks = (p.steps + p.chunk - 1) / p.chunk;
  return p;
}

template <class T, int N, bool HALVES>
void fast(const RotaryArgs& a, const Plan& p, bool backward, float* partial, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.blocks)), block(THREADS);
  if (backward) {
    DS_LAUNCH((rotary_backward<T, N, HALVES>), grid, block, stream, a, p.steps, p.chunk, p.lanes, partial);
  } else {
    DS_LAUNCH((rotary_forward<T, N, HALVES>), grid, block, stream, a, p.steps, p.lanes);
  }
}

template <class T>
void rotary_as(const RotaryArgs& a, const Plan& p, bool backward, float* partial, void* stream) {
  if (p.numbers == LANES<T> && p.halves) {
    fast<T, LANES<T>, true>(a, p, backward, partial, stream);
  } else if (p.numbers == LANES<T>) {
    fast<T, LANES<T>, false>(a, p, backward, partial, stream);
  } else if (p.numbers == 4) {
    fast<T, 4, true>(a, p, backward, partial, stream);
  } else {
    const dim3 grid(static_cast<unsigned>(p.blocks)), block(THREADS);
    const int64_t chunk = p.chunk / (THREADS / 32);
    if (backward) {
      DS_LAUNCH((rotary_any<T, true>), grid, block, stream, a, p.steps, chunk, partial);
    } else {
      DS_LAUNCH((rotary_any<T, false>), grid, block, stream, a, p.steps, chunk, partial);
    }
  }
}

}  // namespace

const char* launch_rotary_forward(const RotaryArgs& a, Storage storage, int64_t B, void* stream) {
  const Plan p = plan_of(a, storage, B, false);
  if (p.steps == 0) return nullptr;
  DS_BY_STORAGE(storage, (rotary_as<T>(a, p, false, nullptr, stream)));
  return launch_error();
}

int64_t rotary_partials(const RotaryArgs& a, Storage storage, int64_t B) {
  const Plan p = plan_of(a, storage, B, true);
  if (p.numbers != 0) return p.blocks;
  const int64_t chunk = p.chunk / (THREADS / 32);  // rows of a warp, each of which has sums of its own
  return (p.steps + chunk - 1) / chunk;
}

const char* launch_rotary_backward(const RotaryArgs& a, Storage storage, int64_t B, float* partial, void* stream) {
  const Plan p = plan_of(a, storage, B, true);
  if (p.steps == 0) return nullptr;
  DS_BY_STORAGE(storage, (rotary_as<T>(a, p, true, partial, stream)));
  return launch_error();
}

}  // namespace ditscale::cuda
