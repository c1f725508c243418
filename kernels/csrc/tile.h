// C += A B on small dense blocks, the one matrix product behind every kernel here.
#pragma once

#include "simd.h"

namespace ibtpo::IBTPO_ISA {

// Two bf16 numbers next to each other along the depth. A product of bf16 matrices takes both at once: A's rows are
// bf16 arrays read as pairs, B is packed so that a row holds the pairs of two of its rows.
struct Pair {
  bf16 even, odd;
};

// kWidth pairs taken apart, as float.
struct OddEven {
  Vec odd, even;
};
INLINE OddEven take_apart(IVec bits) { return {(Vec)(bits & -65536), (Vec)(bits << 16)}; }

// A factor of a product: kWidth numbers or kWidth pairs.
#if defined(__AVX512BF16__)
struct Pairs {
  IVec bits;
};
INLINE Pairs to_pairs(IVec bits) { return {bits}; }
#else
using Pairs = OddEven;
INLINE Pairs to_pairs(IVec bits) { return take_apart(bits); }
#endif

INLINE Vec factor(const float* p) { return load(p); }
INLINE Pairs factor(const Pair* p) { return to_pairs(*reinterpret_cast<const IVecAt*>(p)); }
INLINE Vec broadcast(const float* p) { return splat(*p); }
INLINE Pairs broadcast(const Pair* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return to_pairs(isplat(bits));
}

// acc + a b, for pairs acc + a_odd b_odd + a_even b_even, each product added with one rounding. AVX512_BF16 has one
// instruction for this; it takes subnormals for zero, otherwise the bits are the same.
INLINE Vec mul_add(Vec acc, Vec a, Vec b) { return acc + a * b; }
INLINE Vec mul_add(Vec acc, const Pairs& a, const Pairs& b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a.bits, (__m512bh)b.bits);
#else
  acc += a.odd * b.odd;
  return acc + a.even * b.even;
#endif
}

// Whether a factor takes two registers: pairs do where no instruction multiplies them.
template <class T>
constexpr bool kIsTakenApart = sizeof(decltype(factor((const T*)nullptr))) > sizeof(Vec);

// Rows of C held in registers, of two vectors each: with 32 registers 8, with the 16 of AVX 6, or 4 where a factor
// takes two registers.
template <class T>
constexpr int kTileRows = kWidth == 16                       ? 8
                          : kWidth == 8 && !kIsTakenApart<T> ? 6
                                                             : 4;

// A's element (m, k) is a[m * row + k * col], so a transposed A costs nothing. T is float or Pair.
template <class T>
struct StridedOf {
  const T* a;
  int64_t row, col;
};
using Strided = StridedOf<float>;

// B in parts of `part` rows, each somewhere in memory, its rows `ld` apart; a plain matrix is one part.
template <class T>
struct PartsOf {
  const T* const* parts;
  int64_t ld, part;
};
using Parts = PartsOf<float>;

// How the product goes into C. In all three modes an element has one accumulator and k ascends, so its value does not
// depend on the shape of the tile it is computed in.
enum class Into {
  kStore,  // C = A B
  kAdd,    // C = C + (A B): a sum over many blocks is a sum of block sums, which rounds less than one long chain
  kChain,  // C = ((C + a_0 b_0) + a_1 b_1) ...: the same bits however the depth is cut into calls
};

template <int Rows, int Vecs, Into Mode, class T>
INLINE void tile(float* c, int64_t ldc, StridedOf<T> a, PartsOf<T> b, int64_t column, int64_t depth) {
  using Factor = decltype(factor((const T*)nullptr));
  Vec acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < Vecs; ++n) acc[m][n] = Mode == Into::kChain ? load(c + m * ldc + n * kWidth) : Vec{};
  const T* const* part = b.parts;
  for (int64_t begin = 0; begin < depth; begin += b.part, ++part) {
    const T* b_k = *part + column;
    const int64_t end = least(depth, begin + b.part);
    for (int64_t k = begin; k < end; ++k, b_k += b.ld) {
      Factor b_kn[Vecs];
#pragma GCC unroll 4
      for (int n = 0; n < Vecs; ++n) b_kn[n] = factor(b_k + n * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        const Factor a_mk = broadcast(a.a + m * a.row + k * a.col);
#pragma GCC unroll 4
        for (int n = 0; n < Vecs; ++n) acc[m][n] = mul_add(acc[m][n], a_mk, b_kn[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < Vecs; ++n) {
      float* at = c + m * ldc + n * kWidth;
      store(at, Mode == Into::kAdd ? load(at) + acc[m][n] : acc[m][n]);
    }
}

template <int Rows, Into Mode, class T>
INLINE void row_panel(float* c, int64_t ldc, int64_t cols, StridedOf<T> a, PartsOf<T> b, int64_t depth) {
  constexpr int kVecs = Rows >= 4 ? 2 : 4;  // few rows: more columns at once hide the latency of FMAs
  int64_t n = 0;
  for (; n + kVecs * kWidth <= cols; n += kVecs * kWidth) tile<Rows, kVecs, Mode>(c + n, ldc, a, b, n, depth);
  for (; n < cols; n += kWidth) tile<Rows, 1, Mode>(c + n, ldc, a, b, n, depth);
}

template <Into Mode, class T>
INLINE void row_panels(float* c, int64_t ldc, int64_t rows, int64_t cols, StridedOf<T> a, PartsOf<T> b, int64_t depth) {
  int64_t m = 0;
  const auto at = [&](int64_t row) { return StridedOf<T>{a.a + row * a.row, a.row, a.col}; };
  constexpr int kMost = kTileRows<T>;
  for (; m + kMost <= rows; m += kMost) row_panel<kMost, Mode>(c + m * ldc, ldc, cols, at(m), b, depth);
  if constexpr (kMost > 4)
    for (; m + 4 <= rows; m += 4) row_panel<4, Mode>(c + m * ldc, ldc, cols, at(m), b, depth);
  for (; m + 2 <= rows; m += 2) row_panel<2, Mode>(c + m * ldc, ldc, cols, at(m), b, depth);
  for (; m < rows; ++m) row_panel<1, Mode>(c + m * ldc, ldc, cols, at(m), b, depth);
}

// C[rows, cols] from A[rows, depth] and B[depth, cols]; cols is a multiple of kWidth.
template <Into Mode>
static void product(float* c, int64_t ldc, int64_t rows, int64_t cols, Strided a, Parts b, int64_t depth) {
  row_panels<Mode>(c, ldc, rows, cols, a, b, depth);
}

}  // namespace ibtpo::IBTPO_ISA

// The same of bf16 matrices; strides and the depth count pairs, C is float.
#if defined(IBTPO_AMX)
#include "amx.h"
#else
namespace ibtpo::IBTPO_ISA {

struct MatrixRegisters {
  INLINE_MEMBER explicit MatrixRegisters(int64_t = 0) {}
};

template <Into Mode>
static void product(float* c, int64_t ldc, int64_t rows, int64_t cols, StridedOf<Pair> a, PartsOf<Pair> b,
                    int64_t depth) {
  row_panels<Mode>(c, ldc, rows, cols, a, b, depth);
}

}  // namespace ibtpo::IBTPO_ISA
#endif

namespace ibtpo::IBTPO_ISA {

// The word in which a matrix of T is read along the depth of a product: a number, or a pair of bf16.
template <class T>
struct WordOf;
template <>
struct WordOf<float> {
  using Type = float;
  struct Registers {
    INLINE_MEMBER explicit Registers(int64_t = 0) {}
  };
};
template <>
struct WordOf<bf16> {
  using Type = Pair;
  using Registers = MatrixRegisters;
};
template <class T>
using Word = typename WordOf<T>::Type;
template <class T>
constexpr int64_t kPerWord = sizeof(Word<T>) / sizeof(T);

// A thread holds one of these while it multiplies matrices of T.
template <class T>
using RegistersFor = typename WordOf<T>::Registers;

template <Into Mode, class W>
INLINE void product(float* c, int64_t ldc, int64_t rows, int64_t cols, StridedOf<W> a, const W* b, int64_t ldb,
                    int64_t depth) {
  product<Mode>(c, ldc, rows, cols, a, PartsOf<W>{&b, ldb, depth}, depth);
}

// square[d][j] = from[j, d] for j < rows, d < cols, both at most kWidth or cut to it; zero beyond.
INLINE void load_transposed(Vec (&square)[kWidth], const float* from, int64_t ld_from, int64_t rows, int64_t cols) {
  if (rows >= kWidth && cols >= kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = load(from + i * ld_from);
  } else {
    for (int i = 0; i < kWidth; ++i) {
      square[i] = Vec{};
      if (i < rows) std::memcpy(&square[i], from + i * ld_from, sizeof(float) * least(kWidth, cols));
    }
  }
  transpose(square);
}

// to[d, j] = from[j, d] for j < rows, d < cols; columns of `to` from `rows` up to the next multiple of kWidth become
// zero, and so do rows from `cols` up to the next multiple.
INLINE void pack_transposed(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < rows; j += kWidth)
    for (int64_t d = 0; d < cols; d += kWidth) {
      Vec square[kWidth];
      load_transposed(square, from + j * ld_from + d, ld_from, rows - j, cols - d);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * ld_to + j, square[i]);
    }
}

// B's pairs from a matrix whose columns are its depth: to[d / 2, j] = (from[j, d], from[j, d + 1]) for j < rows and
// even d < cols; zeros beyond, as in pack_transposed. A pair moves like a float.
INLINE void pack_pairs_transposed(Pair* to, int64_t ld_to, const bf16* from, int64_t ld_from, int64_t rows,
                                  int64_t cols) {
  pack_transposed(reinterpret_cast<float*>(to), ld_to, reinterpret_cast<const float*>(from), ld_from / 2, rows,
                  cols / 2);
}

INLINE void pack_words_transposed(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t rows,
                                  int64_t cols) {
  pack_transposed(to, ld_to, from, ld_from, rows, cols);
}
INLINE void pack_words_transposed(Pair* to, int64_t ld_to, const bf16* from, int64_t ld_from, int64_t rows,
                                  int64_t cols) {
  pack_pairs_transposed(to, ld_to, from, ld_from, rows, cols);
}

// B's pairs from a matrix whose rows are its depth: to[j / 2, d] = (from[j, d], from[j + 1, d]) for even j < rows;
// zeros for d from `cols` to `padded` and in place of row `rows`, if that is odd.
INLINE void pack_pairs(Pair* to, int64_t padded, const bf16* from, int64_t ld_from, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < rows; j += 2, to += padded) {
    const bf16 *even = from + j * ld_from, *odd = even + ld_from;
    const bool both = j + 1 < rows;
    for_each(
        cols,
        [&](int64_t d) {
          const UVec bits = load_bits(even + d) | (both ? load_bits(odd + d) : UVec{}) << 16;
          *reinterpret_cast<IVecAt*>(to + d) = (IVec)bits;
        },
        [&](int64_t d) { to[d] = {even[d], both ? odd[d] : bf16{}}; });
    for (int64_t d = cols; d < padded; ++d) to[d] = {};
  }
}

// to[j, 0 .. padded) = factor * from[j, 0 .. cols), zero beyond cols; rows from `rows` to `padded_rows` become zero.
INLINE void pack_rows(float* to, int64_t padded, const float* from, int64_t ld_from, int64_t rows, int64_t padded_rows,
                      int64_t cols, float factor) {
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t d = 0; d < cols; ++d) to[j * padded + d] = factor * from[j * ld_from + d];
    for (int64_t d = cols; d < padded; ++d) to[j * padded + d] = 0.0f;
  }
  std::memset(to + rows * padded, 0, sizeof(float) * padded * (padded_rows - rows));
}

INLINE void scale_row(float* row, int64_t padded, float factor) {
  for (int64_t d = 0; d < padded; d += kWidth) store(row + d, load(row + d) * factor);
}

}  // namespace ibtpo::IBTPO_ISA
