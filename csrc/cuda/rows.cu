// The elementwise kernels of the family, gated residual and bias + GELU, and the sum over chunks that all backward passes end
// with. Threads own columns and walk down the rows of a chunk, so that gate and bias are read once.
#include "adaln.h"
#include "device.h"
#include "launch.h"

namespace ditscale::cuda {
namespace {

constexpr int THREADS = 128;

// Which columns and rows a thread has: blocks run over columns first, then over chunks of rows.
struct Part {
  int64_t d, part, row, end;
};
template <int N>
__device__ __forceinline__ Part part_of(int64_t segment_rows, int64_t chunk, int64_t chunks, int64_t column_blocks) {
  const int64_t part = blockIdx.x / column_blocks, segment = part / chunks, first = (part % chunks) * chunk;
  const int64_t last = first + chunk < segment_rows ? first + chunk : segment_rows;
  return {
      ((blockIdx.x % column_blocks) * blockDim.x + threadIdx.x) * N, part, segment * segment_rows + first,
      segment * segment_rows + last};
}

template <class T, int N, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) residual_kernel(
    ResidualArgs a, int64_t segment_rows, int64_t chunk, int64_t chunks, int64_t column_blocks, float* partial) {
  const Part p = part_of<N>(segment_rows, chunk, chunks, column_blocks);
  if (p.d >= a.D) return;
  int64_t b = p.row / a.T, t = p.row % a.T;
  float gate[N], sum[N] = {0.f};
  modulation_at(a.gate, a.modulation, b, t, p.d, gate);
#pragma unroll 4
  for (int64_t row = p.row; row < p.end; ++row) {
    if (a.per_token && row != p.row) modulation_at(a.gate, a.modulation, b, t, p.d, gate);
    const Pack<T, N> x = fetch<T, N>(row_of<T>(a.x, b, t) + p.d), branch = fetch<T, N>(row_of<T>(a.branch, b, t) + p.d);
    float out[N], dgate[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if constexpr (BACKWARD) {
        dgate[j] = x[j] * branch[j];
        out[j] = x[j] * gate[j];
        sum[j] += dgate[j];
      } else {
        out[j] = x[j] + gate[j] * branch[j];
      }
    }
    put<T, N>(static_cast<T*>(a.out) + row * a.D + p.d, out);
    if constexpr (BACKWARD) {
      if (a.per_token) put_any<N>(a.dgate, a.modulation, row * a.D + p.d, dgate);
    }
    if (++t == a.T) {
      t = 0;
      ++b;
    }
  }
  if constexpr (BACKWARD) {
    if (a.per_token) return;
    const int64_t at = p.part * a.D + p.d;
    if constexpr (N > 1) {
      if (partial == nullptr) return put_any<N>(a.dgate, a.modulation, at, sum);
    }
    put_any<N>(partial, 0, at, sum);
  }
}

// gelu(z) = z * sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3): the tanh form, since (1 + tanh(v / 2)) / 2 = sigmoid(v).
constexpr float GELU_A = 1.59576912160573071f, GELU_B = 0.044715f;

// gelu(z), or its derivative. sigmoid(v) and 1 - sigmoid(v) both come from exp(-|v|), so that the smaller one is not what a
// subtraction leaves. Beyond 20 they are 0 and 1 in float32: the clamp keeps z^3 from overflowing.
template <bool SLOPE>
__device__ __forceinline__ float gelu_at(float z) {
  const float q = z > 20.f ? 20.f : (z < -20.f ? -20.f : z);
  const float v = q * (GELU_A + GELU_A * GELU_B * q * q);
  const float e = expf(-fabsf(v)), large = 1.0f / (1.0f + e), small = e * large;
  const float gate = v > 0.f ? large : small;
  if constexpr (SLOPE) return gate + q * (large * small) * (GELU_A + 3.0f * GELU_A * GELU_B * q * q);
  return (z > q ? z : q) * gate;
}

template <class T, int N, bool BACKWARD>
__global__ void __launch_bounds__(THREADS)
    gelu_kernel(GeluArgs a, int64_t rows, int64_t chunk, int64_t chunks, int64_t column_blocks, float* partial) {
  const Part p = part_of<N>(rows, chunk, chunks, column_blocks);
  if (p.d >= a.D) return;
  const Strided bias_view{a.bias, 0, 0};
  float bias[N], sum[N] = {0.f};
  modulation_at(bias_view, a.modulation, 0, 0, p.d, bias);
#pragma unroll 2
  for (int64_t row = p.row; row < p.end; ++row) {
    const Pack<T, N> x = fetch<T, N>(static_cast<const T*>(a.x) + row * a.x_stride + p.d);
    Pack<T, N> dy{};
    if constexpr (BACKWARD) dy = fetch<T, N>(static_cast<const T*>(a.dy) + row * a.dy_stride + p.d);
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float z = x[j] + bias[j];
      if constexpr (BACKWARD) {
        out[j] = dy[j] * gelu_at<true>(z);
        sum[j] += out[j];
      } else {
        out[j] = gelu_at<false>(z);
      }
    }
    put<T, N>(static_cast<T*>(a.out) + row * a.D + p.d, out);
  }
  if constexpr (BACKWARD) put_any<N>(partial, 0, p.part * a.D + p.d, sum);
}

struct Outputs {
  void* out[3];
};

__global__ void __launch_bounds__(THREADS) add_chunks_kernel(
    const float* partial, int64_t chunks, int64_t sums, int64_t D, int64_t column_blocks, int storage, Outputs to) {
  const int64_t job = blockIdx.x / column_blocks, segment = job / sums, i = job % sums;
  const int64_t d = (blockIdx.x % column_blocks) * blockDim.x + threadIdx.x;
  if (d >= D) return;
  const float* from = partial + (segment * chunks * sums + i) * D + d;
  double total = 0.0;  // thousands of chunks add no error of their own, and there are few of these additions
#pragma unroll 4
  for (int64_t c = 0; c < chunks; ++c) total += from[c * sums * D];
  store_any(i == 0 ? to.out[0] : (i == 1 ? to.out[1] : to.out[2]), storage, segment * D + d, static_cast<float>(total));
}

int64_t column_blocks(int64_t D, int N) {
  return (D + THREADS * N - 1) / (THREADS * N);
}

// How a pass without sums over tokens is cut: chunks of a sample, short enough to fill the device.
Cut short_cut(int64_t segments, int64_t rows) {
  const int64_t chunk = rows < 8 ? (rows > 0 ? rows : 1) : 8;
  return {segments, rows, chunk, (rows + chunk - 1) / chunk};
}

template <class T, int N, bool BACKWARD>
void residual_with(const ResidualArgs& a, const Cut& cut, float* partial, void* stream) {
  const int64_t blocks = column_blocks(a.D, N);
  const dim3 grid(static_cast<unsigned>(cut.segments * cut.chunks * blocks)), block(THREADS);
  DS_LAUNCH((residual_kernel<T, N, BACKWARD>), grid, block, stream, a, cut.rows, cut.chunk, cut.chunks, blocks, partial);
}
template <class T>
bool residual_is_fast(const ResidualArgs& a) {
  constexpr int64_t N = LANES<T>;
  return a.D % N == 0 && aligned(a.x.data) && aligned(a.branch.data) && aligned(a.out) && a.x.b % N == 0 && a.x.t % N == 0 &&
      a.branch.b % N == 0 && a.branch.t % N == 0;
}
template <class T, bool BACKWARD>
void residual_as(const ResidualArgs& a, const Cut& cut, float* partial, void* stream) {
  if (residual_is_fast<T>(a)) {
    residual_with<T, LANES<T>, BACKWARD>(a, cut, partial, stream);
  } else {
    residual_with<T, 1, BACKWARD>(a, cut, partial, stream);
  }
}

template <class T, int N, bool BACKWARD>
void gelu_with(const GeluArgs& a, const Cut& cut, float* partial, void* stream) {
  const int64_t blocks = column_blocks(a.D, N);
  const dim3 grid(static_cast<unsigned>(cut.chunks * blocks)), block(THREADS);
  DS_LAUNCH((gelu_kernel<T, N, BACKWARD>), grid, block, stream, a, cut.rows, cut.chunk, cut.chunks, blocks, partial);
}
template <class T, bool BACKWARD>
void gelu_as(const GeluArgs& a, const Cut& cut, float* partial, void* stream) {
  constexpr int64_t N = LANES<T>;
  const bool fit = a.D % N == 0 && aligned(a.x) && aligned(a.out) && a.x_stride % N == 0 &&
      (!BACKWARD || (aligned(a.dy) && a.dy_stride % N == 0));
  if (fit) {
    gelu_with<T, LANES<T>, BACKWARD>(a, cut, partial, stream);
  } else {
    gelu_with<T, 1, BACKWARD>(a, cut, partial, stream);
  }
}

}  // namespace

const char* launch_residual(const ResidualArgs& a, Storage storage, const Shape& s, void* stream) {
  if (s.B * s.T == 0) return nullptr;
  DS_BY_STORAGE(storage, (residual_as<T, false>(a, short_cut(s.B, s.T), nullptr, stream)));
  return launch_error();
}

bool residual_is_direct(const ResidualArgs& a, Storage storage) {
  bool fast = false;
  DS_BY_STORAGE(storage, (fast = residual_is_fast<T>(a)));
  return fast;
}

const char* launch_residual_backward(
    const ResidualArgs& a, Storage storage, const Shape& s, const Cut& cut, float* partial, void* stream) {
  if (s.B * s.T == 0) return nullptr;
  DS_BY_STORAGE(storage, (residual_as<T, true>(a, a.per_token ? short_cut(s.B, s.T) : cut, partial, stream)));
  return launch_error();
}

const char* launch_gelu(const GeluArgs& a, Storage storage, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  DS_BY_STORAGE(storage, (gelu_as<T, false>(a, short_cut(1, rows), nullptr, stream)));
  return launch_error();
}

const char* launch_gelu_backward(
    const GeluArgs& a, Storage storage, int64_t rows, const Cut& cut, float* partial, void* stream) {
  if (rows == 0) return nullptr;
  DS_BY_STORAGE(storage, (gelu_as<T, true>(a, cut, partial, stream)));
  return launch_error();
}

const char* launch_add_chunks(
    const float* partial, const Cut& cut, int64_t sums, int64_t D, Storage storage, void* const* out, void* stream) {
  if (cut.segments == 0) return nullptr;
  Outputs to{};
  for (int64_t i = 0; i < sums; ++i) to.out[i] = out[i];
  // No rows: the sums are zero, and there is nothing to read.
  const int64_t chunks = cut.rows == 0 ? 0 : cut.chunks, blocks = column_blocks(D, 1);
  const dim3 grid(static_cast<unsigned>(cut.segments * sums * blocks)), block(THREADS);
  DS_LAUNCH(add_chunks_kernel, grid, block, stream, partial, chunks, sums, D, blocks, static_cast<int>(storage), to);
  return launch_error();
}

}  // namespace ditscale::cuda
