// Products of bfloat16 matrices on AMX, Intel's matrix registers: the product of tile.h, where IBTPO_AMX is defined.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds the product of 16 rows of A and 16 columns of B, over
// a step of at most 16 pairs of the depth, to 16 x 16 sums of C: it sums the even products of the step in one chain,
// the odd ones in another, and adds both to C. How a depth is cut into steps therefore affects the result:
//
//     registers  0-3 C | 4 A, 5 B of a step of 16 pairs | 6 A, 7 B of a step of 8 pairs
//
// A depth is cut from the front into steps of 16 pairs; the remainder is one step of 8 or 16, padded with zeros.
// An element depends neither on other rows and columns nor on zeros appended to a step: it has the same bits in any
// batch, and a chain cut between two parts has those of an uncut one.
//
// Whole tiles are read in place; partial tiles and a transposed A are copied through a buffer of one tile.
#pragma once

#include "simd.h"

namespace ibtpo::IBTPO_ISA {

constexpr int64_t kTile = 16;    // rows of a tile, columns of C and B, and pairs of a whole step
constexpr int64_t kFewRows = 4;  // at most so many rows are not worth a tile

// Sets the shapes of the registers until the end of the scope; every thread that multiplies needs one. `height`: most
// rows of a product, cut to a whole tile; an instruction's time grows with the rows of A.
class MatrixRegisters {
 public:
  INLINE_MEMBER explicit MatrixRegisters(int64_t height = kTile) {
    const auto h = (uint8_t)least(height, kTile);
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 32, 64}, {h, h, h, h, h, 16, h, 8}};
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  INLINE_MEMBER ~MatrixRegisters() { asm volatile("tilerelease"); }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

// Inline assembly, since GCC's intrinsics do not say that they read memory.
template <int Register>
INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Register) : "memory");
}
template <int Register>
INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Register) : "memory");
}
template <int Register>
INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int C, int A, int B>
INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Calls f(constant n) for n = 0 .. Count - 1: register numbers are part of an instruction.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <int Count, class F>
INLINE void unrolled(F f) {
  if constexpr (Count > 0) f(Number<0>{});
  if constexpr (Count > 1) f(Number<1>{});
  if constexpr (Count > 2) f(Number<2>{});
  if constexpr (Count > 3) f(Number<3>{});
}

struct alignas(64) TileBuffer {
  Vec row[kTile];
};

// The words at p[i * stride], i < count, zeros beyond.
INLINE Vec gather_words(const Pair* p, int64_t count, int64_t stride) {
  Vec x{};
  if (stride == 1) {
    std::memcpy(&x, p, sizeof(Pair) * count);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      float word;
      std::memcpy(&word, p + i * stride, sizeof word);
      x[i] = word;
    }
  }
  return x;
}

// Copies rows [m, m + rows) and pairs [k, k + pairs) of A into a buffer, padding the pairs to a tile with zeros.
INLINE void copy_a(TileBuffer& to, const StridedOf<Pair>& a, int64_t m, int64_t k, int64_t rows, int64_t pairs) {
  const Pair* from = a.a + m * a.row + k * a.col;
  if (a.row == 1 && a.col != 1) {  // transposed: a pair's rows lie side by side
    for (int64_t i = 0; i < kTile; ++i)
      to.row[i] =
          i < pairs ? (rows == kTile ? load((const float*)(from + i * a.col)) : gather_words(from + i * a.col, rows, 1))
                    : Vec{};
    transpose(to.row);
  } else {
    for (int64_t i = 0; i < rows; ++i) to.row[i] = gather_words(from + i * a.row, pairs, a.col);
  }
}

// One step of the depth for the Tiles columns of C from `column` on. A and B: registers with room for `room` pairs.
template <int A, int B, int64_t Room, int Tiles>
INLINE void add_step(const StridedOf<Pair>& a, int64_t m, int64_t k, int64_t rows, int64_t pairs, const Pair* b,
                     int64_t ldb, TileBuffer& buffer) {
  if (rows == kTile && pairs == Room && a.col == 1) {
    load_tile<A>(a.a + m * a.row + k, a.row * (int64_t)sizeof(Pair));
  } else {
    copy_a(buffer, a, m, k, rows, pairs);
    load_tile<A>(&buffer, sizeof(Vec));
  }
  unrolled<Tiles>([&](auto n) {
    const Pair* from = b + n.value * kTile;
    if (pairs == Room) {
      load_tile<B>(from, ldb * (int64_t)sizeof(Pair));
    } else {
      for (int64_t i = 0; i < Room; ++i) buffer.row[i] = i < pairs ? load((const float*)(from + i * ldb)) : Vec{};
      load_tile<B>(&buffer, sizeof(Vec));
    }
    multiply_tiles<n.value, A, B>();
  });
}

// Rows [m, m + rows) of Tiles * 16 columns of C from `column` on.
template <Into Mode, int Tiles>
INLINE void tile_row(float* c, int64_t ldc, int64_t rows, const StridedOf<Pair>& a, int64_t m, const PartsOf<Pair>& b,
                     int64_t column, int64_t depth) {
  TileBuffer buffer;
  unrolled<Tiles>([&](auto n) {
    if (Mode != Into::kChain) {
      zero_tile<n.value>();
    } else if (rows == kTile) {
      load_tile<n.value>(c + n.value * kTile, ldc * sizeof(float));
    } else {
      for (int64_t i = 0; i < rows; ++i) buffer.row[i] = load(c + i * ldc + n.value * kTile);
      load_tile<n.value>(&buffer, sizeof(Vec));
    }
  });
  const Pair* const* part = b.parts;
  for (int64_t begin = 0; begin < depth; begin += b.part, ++part) {
    const int64_t end = least(depth, begin + b.part);
    const Pair* b_k = *part + column;
    for (int64_t k = begin; k < end; k += kTile, b_k += kTile * b.ld) {
      const int64_t pairs = least(kTile, end - k);
      if (pairs <= kTile / 2)
        add_step<6, 7, kTile / 2, Tiles>(a, m, k, rows, pairs, b_k, b.ld, buffer);
      else
        add_step<4, 5, kTile, Tiles>(a, m, k, rows, pairs, b_k, b.ld, buffer);
    }
  }
  unrolled<Tiles>([&](auto n) {
    float* to = c + n.value * kTile;
    if (Mode != Into::kAdd && rows == kTile) {
      store_tile<n.value>(to, ldc * sizeof(float));
      return;
    }
    store_tile<n.value>(&buffer, sizeof(Vec));
    for (int64_t i = 0; i < rows; ++i) {
      float* at = to + i * ldc;
      store(at, Mode == Into::kAdd ? load(at) + buffer.row[i] : buffer.row[i]);
    }
  });
}

// The same bits as the tiles, computed with vectors: for a few rows, loading and storing tiles takes longer than
// multiplying. (Tiles take numbers below 1e-38 for zero; this does not.)
template <int Rows, int Vecs, Into Mode>
INLINE void few_rows(float* c, int64_t ldc, const StridedOf<Pair>& a, const PartsOf<Pair>& b, int64_t column,
                     int64_t depth) {
  const auto even = [](IVec words) { return (Vec)(words << 16); };
  const auto odd = [](IVec words) { return (Vec)(words & -65536); };
  Vec acc[Rows][Vecs];
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Vecs; ++n) acc[m][n] = Mode == Into::kChain ? load(c + m * ldc + n * kWidth) : Vec{};
  const Pair* const* part = b.parts;
  for (int64_t begin = 0; begin < depth; begin += b.part, ++part)
    for (int64_t step = begin, end = least(depth, begin + b.part); step < end; step += kTile) {
      Vec evens[Rows][Vecs] = {}, odds[Rows][Vecs] = {};
      for (int64_t k = step; k < least(end, step + kTile); ++k) {
        const Pair* b_k = *part + (k - begin) * b.ld + column;
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          int32_t word;
          std::memcpy(&word, a.a + m * a.row + k * a.col, sizeof word);
          const Vec a_even = even(isplat(word)), a_odd = odd(isplat(word));
#pragma GCC unroll 4
          for (int n = 0; n < Vecs; ++n) {
            const IVec words = load((const int32_t*)(b_k + n * kWidth));
            evens[m][n] += a_even * even(words);
            odds[m][n] += a_odd * odd(words);
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < Vecs; ++n) acc[m][n] += evens[m][n] + odds[m][n];
    }
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Vecs; ++n) {
      float* at = c + m * ldc + n * kWidth;
      store(at, Mode == Into::kAdd ? load(at) + acc[m][n] : acc[m][n]);
    }
}

template <int Rows, Into Mode>
INLINE void few_rows_panel(float* c, int64_t ldc, int64_t cols, const StridedOf<Pair>& a, const PartsOf<Pair>& b,
                           int64_t depth) {
  int64_t n = 0;
  for (; n + 4 * kWidth <= cols; n += 4 * kWidth) few_rows<Rows, 4, Mode>(c + n, ldc, a, b, n, depth);
  for (; n < cols; n += kWidth) few_rows<Rows, 1, Mode>(c + n, ldc, a, b, n, depth);
}

template <Into Mode>
static void product(float* c, int64_t ldc, int64_t rows, int64_t cols, StridedOf<Pair> a, PartsOf<Pair> b,
                    int64_t depth) {
  if (rows <= kFewRows) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2)
      few_rows_panel<2, Mode>(c + m * ldc, ldc, cols, {a.a + m * a.row, a.row, a.col}, b, depth);
    if (m < rows) few_rows_panel<1, Mode>(c + m * ldc, ldc, cols, {a.a + m * a.row, a.row, a.col}, b, depth);
    return;
  }
  for (int64_t m = 0; m < rows; m += kTile) {
    const int64_t count = least(kTile, rows - m);
    float* c_m = c + m * ldc;
    int64_t n = 0;
    for (; n + 4 * kTile <= cols; n += 4 * kTile) tile_row<Mode, 4>(c_m + n, ldc, count, a, m, b, n, depth);
    if (n + 2 * kTile <= cols) {
      tile_row<Mode, 2>(c_m + n, ldc, count, a, m, b, n, depth);
      n += 2 * kTile;
    }
    if (n < cols) tile_row<Mode, 1>(c_m + n, ldc, count, a, m, b, n, depth);
  }
}

}  // namespace ibtpo::IBTPO_ISA
