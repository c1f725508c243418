// A matrix product whose rows do not know of each other.
//
//   out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]
//
// A sum has kWidth lanes; lane i takes k = i, i + kWidth, ... in ascending order, and the lanes are added as a fixed
// tree at the end. That is all of it, whatever the number of rows, the tile an element is computed in and the thread
// that does it: a row's result has the same bits alone and in any batch. Both operands are read along k, as they lie
// in memory, so a weight needs no packed copy, and one row costs one pass over the weight.
#include "kernels.h"
#include "simd.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int kCols = 4;                    // columns whose lanes are added together at the end of a tile
constexpr int kRows = kWidth > 8 ? 6 : 3;   // rows of a tile: with kCols columns, all the registers
constexpr int64_t kBlockRows = 48;          // rows of x that stay in cache while the weight passes by
constexpr int64_t kPanel = 64;              // columns of a task
constexpr int64_t kParallelWork = 1 << 19;  // multiplications; below, starting threads costs more
typedef float Quad __attribute__((vector_size(16)));

// (sum a, sum b, sum c, sum d): within each group of four lanes first, then over the groups.
INLINE Quad add_lanes(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__) || defined(IBTPO_EMULATE_AVX512)
  const auto low = [](Vec u, Vec v) {
    return __builtin_shufflevector(u, v, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  };
  const auto high = [](Vec u, Vec v) {
    return __builtin_shufflevector(u, v, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const auto even = [](Vec u, Vec v) {
    return __builtin_shufflevector(u, v, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto odd = [](Vec u, Vec v) {
    return __builtin_shufflevector(u, v, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
#elif defined(__AVX__)
  const auto low = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 0, 8, 1, 9, 4, 12, 5, 13); };
  const auto high = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 2, 10, 3, 11, 6, 14, 7, 15); };
  const auto even = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 0, 1, 8, 9, 4, 5, 12, 13); };
  const auto odd = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 2, 3, 10, 11, 6, 7, 14, 15); };
#else
  const auto low = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 0, 4, 1, 5); };
  const auto high = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 2, 6, 3, 7); };
  const auto even = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 0, 1, 4, 5); };
  const auto odd = [](Vec u, Vec v) { return __builtin_shufflevector(u, v, 2, 3, 6, 7); };
#endif
  const Vec ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
  const Vec abcd = even(ab, cd) + odd(ab, cd);
#if defined(__AVX512F__) || defined(IBTPO_EMULATE_AVX512)
  return (__builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 8, 9, 10, 11)) +
         (__builtin_shufflevector(abcd, abcd, 4, 5, 6, 7) + __builtin_shufflevector(abcd, abcd, 12, 13, 14, 15));
#elif defined(__AVX__)
  return __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
#else
  return abcd;
#endif
}

// The first `count` < kWidth of a vector, zero beyond.
INLINE Vec load_part(const float* p, int64_t count) {
  Vec x{};
  std::memcpy(&x, p, sizeof(float) * count);
  return x;
}

INLINE Quad load_quad(const float* from) {
  Quad x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Bias, what is there already, and the store, for columns column .. column + 4 of a row as far as they exist.
INLINE void finish(const Linear& p, int64_t m, int64_t column, Quad sum) {
  float* out = p.out + m * p.out_stride + column;
  if (__builtin_expect(column + kCols <= p.num_cols, 1)) {
    if (p.bias != nullptr) sum += load_quad(p.bias + column);
    if (p.add) sum += load_quad(out);
    std::memcpy(out, &sum, sizeof sum);
  } else {
    for (int64_t j = 0; column + j < p.num_cols; ++j) {
      const float value = p.bias != nullptr ? sum[j] + p.bias[column + j] : sum[j];
      out[j] = p.add ? value + out[j] : value;
    }
  }
}

// Rows m .. m + Rows of columns n .. n + Quads * kCols; columns past the last repeat it and are thrown away.
template <int Rows, int Quads>
INLINE void tile(const Linear& p, int64_t m, int64_t n) {
  constexpr int kColumns = Quads * kCols;
  const float *x[Rows], *w[kColumns];
  for (int i = 0; i < Rows; ++i) x[i] = p.x + (m + i) * p.x_stride;
  for (int j = 0; j < kColumns; ++j) w[j] = p.weight + least(n + j, p.num_cols - 1) * p.depth;
  Vec acc[Rows][kColumns] = {};
  const auto step = [&](auto fetch) {
    Vec x_k[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) x_k[i] = fetch(x[i]);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const Vec w_k = fetch(w[j]);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) acc[i][j] += x_k[i] * w_k;
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= p.depth; k += kWidth) step([k](const float* from) { return load(from + k); });
  const int64_t left = p.depth - k;
  if (left > 0) step([k, left](const float* from) { return load_part(from + k, left); });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < Quads; ++q) {
      const Vec* a = acc[i] + q * kCols;
      finish(p, m + i, n + q * kCols, add_lanes(a[0], a[1], a[2], a[3]));
    }
}

template <int Rows, int Quads>
static void panel(const Linear& p, int64_t m, int64_t n, int64_t n_end) {
  for (; n < n_end; n += Quads * kCols) tile<Rows, Quads>(p, m, n);
}

}  // namespace

void linear(const Linear& p) {
  const bool parallel = p.num_rows * p.num_cols * p.depth > kParallelWork;
#pragma omp parallel for collapse(2) if (parallel)
  for (int64_t first = 0; first < p.num_rows; first += kBlockRows)
    for (int64_t begin = 0; begin < p.num_cols; begin += kPanel) {
      const int64_t end = least(p.num_cols, begin + kPanel), last = least(p.num_rows, first + kBlockRows);
      int64_t m = first;
      for (int64_t n = begin; n < end; n += kCols)
        for (m = first; m + kRows <= last; m += kRows) tile<kRows, 1>(p, m, n);
      if (kRows > 3 && m + 3 <= last) {
        panel<3, 1>(p, m, begin, end);
        m += 3;
      }
      if (m + 2 <= last) {
        panel<2, 1>(p, m, begin, end);
        m += 2;
      }
      if (m < last) panel<1, 2>(p, m, begin, end);
    }
}

}  // namespace ibtpo::IBTPO_ISA
