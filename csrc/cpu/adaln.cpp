// The adaLN family on the CPU: the split over threads and the sums over chunks; the arithmetic is in adaln_rows.inl.
#include "../common/adaln_bindings.h"
#include "adaln_rows.h"
#include "isa.h"
#include "past_caches.h"
#include "scratch.h"

namespace ditscale::cpu {
namespace {

// Tasks a call is cut into at most: enough for any core count, few enough that partial sums stay small.
constexpr int64_t TASKS = 128;

thread_local Scratch scratch_of_thread;

constexpr int64_t SUMS = 3;  // rows of D floats of scratch, behind the kernel's, for sums that need no partials

// Rows that are added one by one. A longer chunk is a sum of such sums: thousands of additions to one float32 lose four times
// as much as PyTorch's sums do.
constexpr int64_t ROWS_A_SUM = 64;

constexpr int64_t COLUMNS = 256;  // of a piece of the sum over chunks

// Calls of this many numbers leave the caches, and with them their partial sums: chunks of 16 rows add 8 % to what a backward
// pass moves, and 8 samples of 256 rows took 1.13 times as long with them as with chunks of 64.
constexpr int64_t LARGE = 1 << 20;

int64_t least_rows(const Sums& s) {
  const int64_t bounding = s.count * 32 / s.element_size;  // the memory of the partial sums, to an eighth of x
  return s.shape.B * s.shape.T * s.shape.D >= LARGE && bounding < ROWS_A_SUM ? ROWS_A_SUM : bounding;
}

// `tensors` [B, T, D] are read and written.
bool streams(int64_t tensors, const Shape& s, Storage storage, std::initializer_list<const void*> results) {
  const int64_t row = s.D * bytes_of(storage);
  return goes_past_caches(tensors * s.B * s.T * row, row, 64, results);
}

const AdalnKernels& kernels_for(Storage storage) {
  return DS_BY_ISA(adaln).by_storage[static_cast<int>(storage)];
}

// Rows that one thread should at least get, so that small calls do not pay for waking the others.
int64_t grain(int64_t D) {
  const int64_t rows = 16384 / (D > 0 ? D : 1);
  return rows > 1 ? rows : 1;
}

template <class F>
void for_rows(int64_t rows, int64_t D, const F& f) {
  torch::stable::parallel_for(
      0, rows, grain(D), [&](int64_t begin, int64_t end) { f(begin, end, scratch_of_thread.get(KERNEL_ROWS * D)); });
}

// Runs f(begin, end, sums, scratch) over the chunks of every segment, then adds the chunks of a segment in their order.
template <class F>
void reduce_rows(const AdalnKernels& k, const Sums& s, const F& f) {
  const int64_t D = s.shape.D, count = s.count;
  if (s.mode == Mode::per_token) {
    for_rows(s.shape.B * s.shape.T, D, [&](int64_t begin, int64_t end, float* scratch) { f(begin, end, nullptr, scratch); });
    return;
  }
  const int storage = static_cast<int>(s.storage);
  const auto place = [&](int64_t i, int64_t segment) {
    return static_cast<char*>(s.out[i]) + segment * D * bytes_of(s.storage);
  };
  const Cut cut = cut_rows(s.mode, s.shape.B, s.shape.T, least_rows(s), TASKS);
  const bool direct = cut.chunks == 1;
  std::optional<Tensor> held;
  float* partial = nullptr;
  if (!direct) {
    held = allocate({cut.segments * cut.chunks, count, D}, aoti_torch_dtype_float32(), s.like);
    partial = static_cast<float*>(held->mutable_data_ptr());
  }
  const int64_t tasks_a_thread = (grain(D) + cut.chunk - 1) / cut.chunk;
  torch::stable::parallel_for(0, cut.segments * cut.chunks, tasks_a_thread, [&](int64_t begin, int64_t end) {
    float* scratch = scratch_of_thread.get((KERNEL_ROWS + 2 * SUMS) * D);
    float* few = scratch + (KERNEL_ROWS + SUMS) * D;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t segment = task / cut.chunks, first = (task % cut.chunks) * cut.chunk;
      const int64_t last = first + cut.chunk < cut.rows ? first + cut.chunk : cut.rows;
      float* sums = direct ? scratch + KERNEL_ROWS * D : partial + task * count * D;
      const auto add_rows = [&](int64_t from, int64_t to, float* into) {
        std::memset(into, 0, sizeof(float) * count * D);
        f(segment * cut.rows + from, segment * cut.rows + to, into, scratch);
      };
      add_rows(first, last - first > ROWS_A_SUM ? first + ROWS_A_SUM : last, sums);
      for (int64_t row = first + ROWS_A_SUM; row < last; row += ROWS_A_SUM) {
        add_rows(row, last - row > ROWS_A_SUM ? row + ROWS_A_SUM : last, few);
        for (int64_t i = 0; i < count * D; ++i) sums[i] += few[i];
      }
      for (int64_t i = 0; direct && i < count; ++i) k.add_chunks(sums + i * D, 1, 0, D, storage, place(i, segment));
    }
  });
  if (direct) return;
  // Every column is a sum of its own, so one vector, as that of a bias, is work for several threads.
  const int64_t pieces = (D + COLUMNS - 1) / COLUMNS, pieces_a_thread = 16384 / (COLUMNS * cut.chunks) + 1;
  torch::stable::parallel_for(0, cut.segments * count * pieces, pieces_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t segment = job / pieces / count, i = job / pieces % count, first = job % pieces * COLUMNS;
      const int64_t columns = D - first < COLUMNS ? D - first : COLUMNS;
      k.add_chunks(
          partial + (segment * cut.chunks * count + i) * D + first, cut.chunks, count * D, columns, storage,
          place(i, segment) + first * bytes_of(s.storage));
    }
  });
}

struct Cpu {
  static void forward(ForwardArgs a, Storage storage, Mode, const Shape& s, const Tensor&) {
    const AdalnKernels& k = kernels_for(storage);
    a.stream = streams(a.branch.data != nullptr ? 4 : 2, s, storage, {a.y, a.x_new});
    for_rows(s.B * s.T, s.D, [&](int64_t b, int64_t e, float* scratch) { k.forward(a, b, e, scratch); });
  }
  static void backward(BackwardArgs a, Storage storage, const Sums& sums) {
    const AdalnKernels& k = kernels_for(storage);
    const int64_t tensors = 3 + (a.branch.data != nullptr ? 2 : 0) + (a.dresidual.data != nullptr ? 1 : 0);
    a.stream = streams(tensors, sums.shape, storage, {a.dx, a.dbranch});
    reduce_rows(k, sums, [&](int64_t b, int64_t e, float* out, float* scratch) { k.backward(a, b, e, out, scratch); });
  }
  static void residual(ResidualArgs a, Storage storage, const Shape& s, const Tensor&) {
    const AdalnKernels& k = kernels_for(storage);
    a.stream = streams(3, s, storage, {a.out});
    for_rows(s.B * s.T, s.D, [&](int64_t b, int64_t e, float* scratch) { k.residual(a, b, e, scratch); });
  }
  static void residual_backward(ResidualArgs a, Storage storage, const Sums& sums) {
    const AdalnKernels& k = kernels_for(storage);
    a.stream = streams(3, sums.shape, storage, {a.out});
    reduce_rows(
        k, sums, [&](int64_t b, int64_t e, float* out, float* scratch) { k.residual_backward(a, b, e, out, scratch); });
  }
  static void gelu(const GeluArgs& a, Storage storage, int64_t rows, const Tensor&) {
    const AdalnKernels& k = kernels_for(storage);
    for_rows(rows, a.D, [&](int64_t b, int64_t e, float* scratch) { k.gelu(a, b, e, scratch); });
  }
  static void gelu_backward(const GeluArgs& a, Storage storage, const Sums& sums) {
    const AdalnKernels& k = kernels_for(storage);
    reduce_rows(
        k, sums, [&](int64_t b, int64_t e, float* out, float* scratch) { k.gelu_backward(a, b, e, out, scratch); });
  }
};

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  ditscale::Adaln<ditscale::cpu::Cpu>::register_in(m);
}
