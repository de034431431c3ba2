// Products of float32 matrices on the CPU, for linear layers: the split over blocks and threads; packing and arithmetic are in
// product_tiles.inl.
#include "../common/tensors.h"
#include "isa.h"
#include "product_tiles.h"
#include "scratch.h"

#include <array>

namespace ditscale::cpu {
namespace {

thread_local Scratch scratch_of_thread, packed_of_thread;

// A sum over more numbers is one of several: a panel then fits the first cache (16 columns) or the second (64), and no rounding is
// carried through thousands of additions. Rows of a block: 288 KiB of strips, of the 512 and more that a second cache has.
constexpr int64_t DEPTH = 384, SHORT_DEPTH = 64, BLOCK = 192;
// Of the right operand so many numbers are packed at a time (32 MiB), or as many as a depth has.
constexpr int64_t PACKED = 8 << 20;

// With fewer multiply-adds than this, or rows and columns of the result, packing costs more than it gives: the product is
// PyTorch's.
constexpr int64_t SMALLEST = 6 << 20, FEWEST_ROWS = 128, FEWEST_COLUMNS = 32;

// Few rows by a large right operand take as long as reading it, and a large result of short sums as long as writing it: of these
// PyTorch's products take longer, however few multiply-adds they are.
constexpr int64_t FEW = 48, LARGE = 1 << 17, NUMBERS_A_THREAD = 1 << 15;

int64_t parts_of(int64_t n, int64_t longest) {
  return (n + longest - 1) / longest;
}

// [begin, end) of n, the i-th of `parts` of nearly one size.
struct Range {
  int64_t begin, end;
};
Range part_of(int64_t n, int64_t i, int64_t parts) {
  return {n * i / parts, n * (i + 1) / parts};
}

// out [M, N] = left [M, K] right [K, N] + bias. The order of every sum follows from the shape alone, so results have the same bits
// for any number of threads.
void multiply(Operand left, int64_t M, Operand right, int64_t N, int64_t K, const float* bias, float* out) {
  const ProductKernels& k = DS_BY_ISA(product);
  // Of few rows or columns, which come here only by name, PyTorch's sums are made in lanes: shorter ones keep up with their error.
  const int64_t longest = M <= FEW || N < FEWEST_COLUMNS ? SHORT_DEPTH : DEPTH;
  const int64_t depth = parts_of(parts_of(K, parts_of(K, longest)), 8) * 8, sums = parts_of(K, depth);
  const int64_t down = parts_of(M, k.rows), across = parts_of(N, k.columns), stride = across * k.columns;
  const int64_t together = PACKED / (stride * depth) > 1 ? PACKED / (stride * depth) : 1;
  float* const panels = packed_of_thread.get((sums < together ? sums : together) * depth * stride);
  const int64_t threads = torch::stable::get_num_threads();
  // Threads share the rows; where there are few, the columns too.
  const int64_t row_parts = threads < parts_of(down, 4) ? threads : parts_of(down, 4);
  const int64_t column_parts = threads / row_parts < across ? threads / row_parts : across;
  const int64_t group = parts_of(PACKED_COLUMNS, k.columns), groups = parts_of(across, group);  // of panels
  for (int64_t from = 0; from < sums; from += together) {
    const int64_t to = from + together < sums ? from + together : sums;
    const auto deep = [&](int64_t sum) { return K - sum * depth < depth ? K - sum * depth : depth; };
    const auto panels_of = [&](int64_t sum) { return panels + (sum - from) * depth * stride; };
    torch::stable::parallel_for(0, (to - from) * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sum = from + task / groups, column = task % groups * group * k.columns;
        const int64_t columns = N - column < group * k.columns ? N - column : group * k.columns;
        const Operand part{right.data + column * right.lane + sum * depth * right.step, right.lane, right.step};
        k.pack_right(part, columns, deep(sum), panels_of(sum) + column * deep(sum));
      }
    });
    torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Range rows = part_of(down, task / column_parts, row_parts);
        const Range columns = part_of(across, task % column_parts, column_parts);
        const int64_t column = columns.begin * k.columns;
        const int64_t width = (columns.end * k.columns < N ? columns.end * k.columns : N) - column;
        const int64_t blocks = parts_of((rows.end - rows.begin) * k.rows, BLOCK);
        float* strips = scratch_of_thread.get((BLOCK + k.rows) * depth);
        for (int64_t sum = from; sum < to; ++sum) {
          for (int64_t i = 0; i < blocks; ++i) {
            const Range block = part_of(rows.end - rows.begin, i, blocks);
            const int64_t row = (rows.begin + block.begin) * k.rows, end_row = (rows.begin + block.end) * k.rows;
            const int64_t height = (end_row < M ? end_row : M) - row;
            k.pack_left({left.data + row * left.lane + sum * depth * left.step, left.lane, left.step}, height, deep(sum), strips);
            k.multiply(
                strips, height, panels_of(sum) + column * deep(sum), width, deep(sum),
                bias != nullptr && sum + 1 == sums ? bias + column : nullptr, sum == 0, out + row * N + column, N);
          }
        }
      }
    });
  }
}

bool by_dots(Operand x, Operand w) {
  return x.step == 1 && w.step == 1;
}

// The same of few rows, where numbers of each of them and of each column lie side by side, or the columns do.
void multiply_few(Operand x, int64_t M, Operand w, int64_t N, int64_t K, const float* bias, float* out) {
  const ProductKernels& k = DS_BY_ISA(product);
  const bool dots = by_dots(x, w);
  const int64_t group = 64, least = NUMBERS_A_THREAD / (group * K) + 1;  // of columns: whole lines, and whole panels
  torch::stable::parallel_for(0, parts_of(N, group), least, [&](int64_t begin, int64_t end) {
    const int64_t n = begin * group, columns = (end * group < N ? end * group : N) - n;
    const float* b = bias == nullptr ? nullptr : bias + n;
    (dots ? k.few_by_dots : k.few_by_lines)(x, M, {w.data + n * w.lane, w.lane, w.step}, columns, K, b, out + n, N);
  });
}

Tensor by_torch(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  DS_SHIM_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

const float* floats_of(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  check_device(t, x, name);
  return static_cast<const float*>(t.const_data_ptr());
}

// x [M, K], weight [N, K] of any strides, bias [N]: x weight^T + bias, a new [M, N].
Tensor product(Tensor x, Tensor weight, std::optional<Tensor> bias, bool always) {
  STD_TORCH_CHECK(
      x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x, weight: expected [M, K] and [N, K]");
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1);
  const float *left = floats_of(x, x, "x"), *right = floats_of(weight, x, "weight"), *added = nullptr;
  std::optional<Tensor> dense;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, "bias: expected [N]");
    dense = inner_dense(*bias);
    added = floats_of(*dense, x, "bias");
  }
  const Operand rows{left, x.stride(0), x.stride(1)}, columns{right, weight.stride(0), weight.stride(1)};
  const bool few = M <= FEW && N * K >= LARGE && (by_dots(rows, columns) || columns.lane == 1);
  const bool shallow = K > 1 && K <= FEW && M * N >= LARGE;
  const bool small = !few && ((M * N * K < SMALLEST && !shallow) || M < FEWEST_ROWS || N < FEWEST_COLUMNS);
  // Other products of a vector are PyTorch's in any case: it adds them up in several lanes, with a third of the error.
  if ((M < 2 && !few) || N < 2 || K == 0 || (small && !always)) return by_torch(x, weight, bias);
  Tensor out = allocate({M, N}, aoti_torch_dtype_float32(), x);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  if (few) {
    multiply_few(rows, M, columns, N, K, added, to);
  } else {
    multiply(rows, M, columns, N, K, added, to);
  }
  return out;
}

}  // namespace
}  // namespace ditscale::cpu

STABLE_TORCH_LIBRARY_IMPL(ditscale, CPU, m) {
  m.impl("product", TORCH_BOX(&ditscale::cpu::product));
}
