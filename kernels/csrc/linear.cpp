// A matrix product whose rows do not know of each other.
//
//   out[m, n] = sum_k x[m, k] weight[n, k] + bias[n]
//
// The depth is cut into blocks of kDepth words (a float, or a pair of bfloat16: tile.h). A block is summed in one
// chain, k ascending, and the sums of the blocks are added in ascending order. That is all of it, whatever the number
// of rows, the tile an element is computed in and the thread that does it: a row's result has the same bits alone and
// in any batch. A weight is used where it lies; kPanel of its rows are transposed a block at a time, into the L1 cache,
// for as many rows of x as there are: for one row that is most of the work, for a hundred it is a few percent. The
// decoder, which multiplies the same weights again and again, has them transposed once instead.
#include "kernels.h"
#include "parts.h"
#include "threads.h"
#include "tile.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kDepth = 128;             // words of a block
constexpr int64_t kRows = 128;              // rows of a task; their sums are 32 KiB
constexpr int64_t kParallelWork = 1 << 19;  // multiplications; below, starting threads costs more

// Columns [column, column + cols) of rows [row, row + rows).
template <class T>
INLINE void panel(const Linear<T>& p, int64_t row, int64_t rows, int64_t column, int64_t cols, Word<T>* block,
                  float* sums) {
  constexpr int64_t kWord = kPerWord<T>;
  const int64_t depth = p.depth / kWord, stride = p.x_stride / kWord, wide = round_up(cols, kWidth);
  const auto* x = reinterpret_cast<const Word<T>*>(p.x + row * p.x_stride);
  int64_t k = 0;
  do {  // once for a depth of 0, to clear the sums
    const int64_t words = least(kDepth, depth - k);
    const Word<T>* b = block;
    if (p.packed)
      b = reinterpret_cast<const Word<T>*>(p.weight) + column * depth + k * kPanel;
    else
      pack_words_transposed(block, kPanel, p.weight + column * p.depth + k * kWord, p.depth, cols, words * kWord);
    if (k == 0)
      product<Into::kStore>(sums, kPanel, rows, wide, {x, stride, 1}, b, kPanel, words);
    else
      product<Into::kAdd>(sums, kPanel, rows, wide, {x + k, stride, 1}, b, kPanel, words);
    k += kDepth;
  } while (k < depth);
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
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / panels * kRows, column = i % panels * kPanel;
      panel(p, row, least(kRows, p.num_rows - row), column, least(kPanel, p.num_cols - column), block, sums);
    }
  });
}

}  // namespace

void linear(const Linear<float>& p) { multiply(p); }
void linear_bf16(const Linear<bf16>& p) { multiply(p); }

}  // namespace ibtpo::IBTPO_ISA
