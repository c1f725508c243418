// A matrix product in which a row's result does not depend on the other rows.
//
//   out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]
//
// The depth is cut into blocks of kDepth words (a float, or a pair of bfloat16: tile.h). A block is summed in one
// chain, k ascending, and the sums of the blocks are added in ascending order, whatever the number of rows, the tile
// and the thread: a row's result has the same bits alone and in any batch. A weight is used in place; kPanel of its
// rows are transposed a block at a time into the L1 cache, for all rows of x: for one row that is most of the work, for
// a hundred a few percent. Few rows are multiplied with squares transposed in registers, which are not stored. The
// weight is read in short runs of many rows, too short for the hardware to read ahead, so what comes next is fetched
// here. The decoder, which multiplies by the same weights again and again, has them transposed once.
#include <type_traits>

#include "kernels.h"
#include "parts.h"
#include "threads.h"
#include "tile.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kDepth = 128;             // words of a block
constexpr int64_t kRows = 128;              // rows of a task; their sums are 32 KiB
constexpr int64_t kParallelWork = 1 << 19;  // multiplications; below, starting threads costs more
constexpr int64_t kWidenRows = 8;           // from as many on, widening the weight pays
constexpr int64_t kAhead = 128;             // words from what few rows use to what is fetched meanwhile

// Without instructions for pairs of bfloat16, each product would take them apart. Few rows (kFewRows) and many
// (kWidenRows) are multiplied in float instead, with factors widened once (few rows: as the weight is read): the same
// chain of sums, the odd number of a pair first.
template <class T>
constexpr bool kWidens = kIsTakenApart<Word<T>>;

// At most as many rows are few: more are faster by the block. AMX sums bfloat16 in another order.
#if defined(IBTPO_AMX)
template <class T>
constexpr int64_t kFewRows = std::is_same_v<T, float> ? 32 : 0;
#else
template <class T>
constexpr int64_t kFewRows = kWidth >= 8 ? 32 : 0;
#endif
constexpr int kGroupRows = 8;                  // of few rows: those whose sums are in registers at a time
constexpr int kGroups = kWidth == 16 ? 4 : 1;  // that a square is kept for; on AVX2, it is transposed for each

struct Widened {
  float *x, *weight;  // [kRows, 2 kDepth], [2 kDepth, kPanel], or few rows whole; null if nothing is widened
};

INLINE OddEven pairs_at(const Pair* p) { return take_apart(*reinterpret_cast<const IVecAt*>(p)); }

INLINE void widen_rows(float* to, int64_t to_stride, const Pair* from, int64_t stride, int64_t rows, int64_t words) {
  for (int64_t m = 0; m < rows; ++m, to += to_stride, from += stride)
    for_each(
        words,
        [&](int64_t k) {
          const OddEven pairs = pairs_at(from + k);
          store(to + 2 * k, zip_low(pairs.odd, pairs.even));
          store(to + 2 * k + kWidth, zip_high(pairs.odd, pairs.even));
        },
        [&](int64_t k) { to[2 * k] = to_float(from[k].odd), to[2 * k + 1] = to_float(from[k].even); });
}

INLINE void widen_weight(float* to, const Pair* from, int64_t words) {
  for (int64_t k = 0; k < words; ++k, to += 2 * kPanel, from += kPanel)
    for (int64_t n = 0; n < kPanel; n += kWidth) {
      const OddEven pairs = pairs_at(from + n);
      store(to + n, pairs.odd);
      store(to + kPanel + n, pairs.even);
    }
}

// Adds x b to the sums, b a block of the weight. Before each few rows, `fetch` is called with a share of the panel's
// columns, whose next block it fetches: memory is read while products are computed.
template <Into Mode, class W, class Fetch>
INLINE void add_block(float* sums, int64_t rows, int64_t wide, StridedOf<W> x, const W* b, int64_t depth,
                      const Fetch& fetch) {
  constexpr int64_t kAtOnce = 2 * kTileRows<W>;
  for (int64_t m = 0; m < rows; m += kAtOnce) {
    const int64_t end = least(m + kAtOnce, rows);
    fetch(kPanel * m / rows, kPanel * end / rows);
    product<Mode>(sums + m * kPanel, kPanel, end - m, wide, {x.a + m * x.row, x.row, x.col}, b, kPanel, depth);
  }
}

// acc + x w, of a row's word and the words of several columns.
INLINE Vec add_word(Vec acc, const float* x, Vec w, const float*) { return mul_add(acc, splat(*x), w); }
INLINE Vec add_word(Vec acc, const Pair* x, Vec w, const Pair*) {
  return mul_add(acc, broadcast(x), to_pairs((IVec)w));
}
INLINE Vec add_word(Vec acc, const float* x, Vec w, const Pair*) {
  const OddEven pairs = take_apart((IVec)w);
  return mul_add(mul_add(acc, splat(x[0]), pairs.odd), splat(x[1]), pairs.even);
}

// sums = x weight^T for at most Groups * Rows rows of x, widened if need be: squares of the weight are transposed in
// registers and used at once, along the whole depth of a few columns, so that memory is read in runs as long as there
// are. Several groups of rows find a square in the L1 cache.
template <int Rows, int Groups, class X, class W>
static __attribute__((noinline)) void few_rows(float* sums, int64_t rows, const X* x, int64_t stride, const W* weight,
                                               int64_t depth, int64_t cols) {
  constexpr int kVecs = Rows <= 4 ? 2 : 1;  // chains enough to keep the multipliers busy
  constexpr int64_t kFloats = std::is_same_v<W, Pair> && std::is_same_v<X, float> ? 2 : 1;  // of a word
  const X* row[Groups][Rows];
  for (int m = 0; m < Groups * Rows; ++m)  // missing rows repeat the last
    row[m / Rows][m % Rows] = x + least(m, rows - 1) * stride;
  for (int64_t n = 0; n < cols; n += kVecs * kWidth) {
    Vec total[Groups][kVecs][Rows] = {};
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += kDepth) {
      Vec acc[Groups][kVecs][Rows] = {};
      const auto add = [&](int64_t k, auto count) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          const int64_t column = n + v * kWidth;
          Vec square[kWidth];
          load_transposed(square, reinterpret_cast<const float*>(weight + column * depth + k), depth, cols - column,
                          count);
          {  // the same columns further on, or the next ones
            const int64_t to = k + kAhead, next = to < depth ? to : kVecs * kWidth * depth + to - depth;
            const W* ahead = weight + column * depth + next;
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) __builtin_prefetch(ahead + i * depth, 0, 2);
          }
          const auto multiply = [&](Vec(&sum)[Rows], const X* const(&x_row)[Rows]) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) {
              if (i >= count) break;
#pragma GCC unroll 8
              for (int m = 0; m < Rows; ++m) sum[m] = add_word(sum[m], x_row[m] + (k + i) * kFloats, square[i], weight);
            }
          };
          if constexpr (Groups == 1) {
            multiply(acc[0][v], row[0]);
          } else {
            asm volatile("" : "+m"(square));  // in memory from here on
#pragma GCC unroll 1
            for (int g = 0; g < Groups; ++g) {
              Vec sum[Rows];
#pragma GCC unroll 8
              for (int m = 0; m < Rows; ++m) sum[m] = acc[g][v][m];
              multiply(sum, row[g]);
#pragma GCC unroll 8
              for (int m = 0; m < Rows; ++m) acc[g][v][m] = sum[m];
            }
          }
        }
      };
      const int64_t end = least(depth, begin + kDepth);
      int64_t k = begin;
      for (; k + kWidth <= end; k += kWidth) add(k, std::integral_constant<int64_t, kWidth>());
      if (k < end) add(k, end - k);
      for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) total[g][v][m] = begin == 0 ? acc[g][v][m] : total[g][v][m] + acc[g][v][m];
    }
    for (int m = 0; m < Groups * Rows && m < rows; ++m)
      for (int v = 0; v < kVecs && n + v * kWidth < cols; ++v)
        store(sums + m * kPanel + n + v * kWidth, total[m / Rows][v][m % Rows]);
  }
}

template <class X, class W>
INLINE void few_rows(float* sums, int64_t rows, const X* x, int64_t stride, const W* weight, int64_t depth,
                     int64_t cols) {
  constexpr int kTwo = kGroups == 1 ? 1 : 2, kThree = kGroups == 1 ? 1 : 3;
  while (rows > 0) {
    int64_t now = least(rows, kGroups * kGroupRows);
    if (now > kGroupRows && now % kGroupRows <= 2) now -= now % kGroupRows;  // a group would cost more
    if (now == 1)
      few_rows<1, 1>(sums, now, x, stride, weight, depth, cols);
    else if (now == 2)
      few_rows<2, 1>(sums, now, x, stride, weight, depth, cols);
    else if (now <= 4)
      few_rows<4, 1>(sums, now, x, stride, weight, depth, cols);
    else if (now <= kGroupRows)
      few_rows<kGroupRows, 1>(sums, now, x, stride, weight, depth, cols);
    else if (now <= 2 * kGroupRows)
      few_rows<kGroupRows, kTwo>(sums, now, x, stride, weight, depth, cols);
    else if (now <= 3 * kGroupRows)
      few_rows<kGroupRows, kThree>(sums, now, x, stride, weight, depth, cols);
    else
      few_rows<kGroupRows, kGroups>(sums, now, x, stride, weight, depth, cols);
    rows -= now, sums += now * kPanel, x += now * stride;
  }
}

// sums = x weight^T, each block of the weight transposed once for all rows.
template <class T>
INLINE void many_rows(float* sums, int64_t rows, const Word<T>* x, int64_t stride, const Linear<T>& p, int64_t column,
                      int64_t cols, Word<T>* block, const Widened& widened) {
  constexpr int64_t kWord = kPerWord<T>, kLine = 64 / sizeof(T);
  const int64_t depth = p.depth / kWord, wide = round_up(cols, kWidth);
  int64_t k = 0;
  do {  // once for a depth of 0, to clear the sums
    const int64_t words = least(kDepth, depth - k);
    const Word<T>* b = block;
    if (p.packed)
      b = reinterpret_cast<const Word<T>*>(p.weight) + column * depth + k * kPanel;
    else
      pack_words_transposed(block, kPanel, p.weight + column * p.depth + k * kWord, p.depth, cols, words * kWord);
    const bool ends = k + kDepth >= depth;
    const T* next = p.weight + (ends ? (column + kPanel) * p.depth : column * p.depth + (k + kDepth) * kWord);
    const auto fetch = [&](int64_t begin, int64_t end) {
      for (int64_t n = p.packed ? end : begin; n < end; ++n)
        for (int64_t i = 0; i < kDepth * kWord; i += kLine) __builtin_prefetch(next + n * p.depth + i, 0, 2);
    };
    const auto add = [&](auto into) {
      constexpr Into kInto = decltype(into)::value;
      if constexpr (kWidens<T>)
        if (widened.x != nullptr) {
          widen_rows(widened.x, 2 * kDepth, x + k, stride, rows, words);
          widen_weight(widened.weight, b, words);
          return add_block<kInto, float>(sums, rows, wide, {widened.x, 2 * kDepth, 1}, widened.weight, 2 * words,
                                         fetch);
        }
      add_block<kInto, Word<T>>(sums, rows, wide, {x + k, stride, 1}, b, words, fetch);
    };
    if (k == 0)
      add(std::integral_constant<Into, Into::kStore>());
    else
      add(std::integral_constant<Into, Into::kAdd>());
    k += kDepth;
  } while (k < depth);
}

template <class T>
INLINE bool is_few(const Linear<T>& p) {
  return !p.packed && p.num_rows <= kFewRows<T>;
}

// Columns [column, column + cols) of rows [row, row + rows).
template <class T>
INLINE void panel(const Linear<T>& p, int64_t row, int64_t rows, int64_t column, int64_t cols, Word<T>* block,
                  float* sums, const Widened& widened) {
  const int64_t stride = p.x_stride / kPerWord<T>;
  const auto* x = reinterpret_cast<const Word<T>*>(p.x + row * p.x_stride);
  if (is_few(p)) {
    const auto* weight = reinterpret_cast<const Word<T>*>(p.weight + column * p.depth);
    if constexpr (kWidens<T>)
      few_rows(sums, rows, widened.x, p.depth, weight, p.depth / kPerWord<T>, cols);
    else
      few_rows(sums, rows, x, stride, weight, p.depth / kPerWord<T>, cols);
  } else {
    many_rows(sums, rows, x, stride, p, column, cols, block, widened);
  }
  const T* bias = p.bias == nullptr ? nullptr : p.bias + column;
  for (int64_t m = 0; m < rows; ++m) {
    const float* sum = sums + m * kPanel;
    T* out = p.out + (row + m) * p.out_stride + column;
    for_parts(cols, [&](int64_t n, auto part) {
      Vec y = load(sum + n);
      if (bias != nullptr) y += load(bias + n, part);
      if (p.add) y += load(out + n, part);
      store(out + n, y, part);
    });
  }
}

template <class T>
static void multiply(const Linear<T>& p) {
  const bool parallel = p.num_rows * p.num_cols * p.depth > kParallelWork;
  const int64_t blocks = (p.num_rows + kRows - 1) / kRows, panels = (p.num_cols + kPanel - 1) / kPanel;
  spread_ranges(blocks * panels, parallel, [&](int64_t begin, int64_t end) __attribute__((noinline)) {
    [[maybe_unused]] const RegistersFor<T> registers;
    const Scratch<Word<T>> block(p.packed ? 0 : kPanel * round_up(least(kDepth, p.depth), kWidth));
    const Scratch<float> sums(kPanel * least(kRows, p.num_rows));
    const bool few = kWidens<T> && is_few(p), widens = kWidens<T> && !few && p.num_rows >= kWidenRows;
    const Scratch<float> wide_x(few ? p.depth * p.num_rows : widens ? 2 * kDepth * least(kRows, p.num_rows) : 0);
    const Scratch<float> wide_weight(widens ? 2 * kDepth * kPanel : 0);
    const Widened widened = few || widens ? Widened{wide_x, wide_weight} : Widened{};
    if constexpr (kWidens<T>)
      if (few) widen_rows(wide_x, p.depth, reinterpret_cast<const Pair*>(p.x), p.x_stride / 2, p.num_rows, p.depth / 2);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / panels * kRows, column = i % panels * kPanel;
      panel(p, row, least(kRows, p.num_rows - row), column, least(kPanel, p.num_cols - column), block, sums, widened);
    }
  });
}

}  // namespace

void linear(const Linear<float>& p) { multiply(p); }
void linear_bf16(const Linear<bf16>& p) { multiply(p); }

}  // namespace ibtpo::IBTPO_ISA
