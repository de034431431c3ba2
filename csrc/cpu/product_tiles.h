// Products of float32 matrices, as plain functions of each instruction set: how operands are packed and blocks multiplied.
#pragma once

#include <cstdint>

namespace ditscale::cpu {

// One operand: `lanes` of its rows (left) or columns (right), which become the rows or columns of the result, and `depth`
// numbers of each, along which products are summed. Steps in numbers, of any size.
struct Operand {
  const float* data;
  int64_t lane, step;  // from one lane to the next, from one number of a lane to the next
};

// Columns that one thread packs at a time: they share the lines that they are read from.
constexpr int64_t PACKED_COLUMNS = 64;

struct ProductKernels {
  // A register tile: rows and columns of the result. Packed, `rows` lanes of the left operand lie side by side, a strip
  // [depth][rows], and `columns` of the right one, a panel [depth][columns]; lanes that are missing in the last are zeros.
  int64_t rows, columns;
  void (*pack_left)(Operand from, int64_t lanes, int64_t depth, float* strips);
  void (*pack_right)(Operand from, int64_t lanes, int64_t depth, float* panels);
  // out[row * step + column] = (first ? 0 : out) + left . right + (bias, if any): [rows, columns] of the result from strips and
  // panels.
  void (*multiply)(
      const float* strips, int64_t rows, const float* panels, int64_t columns, int64_t depth, const float* bias, bool first,
      float* out, int64_t step);
  // out = x . w + (bias, if any) of few rows, nothing packed: where numbers of a row of x and of a column of w lie side by side, and
  // where the columns of w do.
  void (*few_by_dots)(
      Operand x, int64_t rows, Operand w, int64_t columns, int64_t depth, const float* bias, float* out, int64_t step);
  void (*few_by_lines)(
      Operand x, int64_t rows, Operand w, int64_t columns, int64_t depth, const float* bias, float* out, int64_t step);
};

extern const ProductKernels product_portable;
#if defined(__x86_64__)
extern const ProductKernels product_avx2;
extern const ProductKernels product_avx512;
#endif

}  // namespace ditscale::cpu
