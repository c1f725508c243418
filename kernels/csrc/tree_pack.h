// Operands of the matrix products of tree attention, from [N, heads, D] arrays of float or bfloat16.
//
// A factor is read in words along the depth of a product: one float, or a pair of bfloat16 numbers (tile.h). The left
// factor is read in place, its rows heads * D apart. The right one is a block packed in one of two forms:
//
//   columns  [D, kBlock]       each token is a column; for products over D:  q k^T, dO v^T
//   rows     [kBlock, padded]  each token is a row; for sums over tokens:    p v, dS k, p^T dO, dS^T q
//
// With bfloat16 the first index counts pairs: half as many rows.
#pragma once

#include "tile.h"
#include "tree_blocks.h"

namespace ibtpo::IBTPO_ISA {

INLINE void rows_of(float* to, const float* from, int64_t ld, int64_t tokens, int64_t dim, int64_t padded) {
  pack_rows(to, padded, from, ld, tokens, tokens, dim, 1.0f);
}
INLINE void rows_of(Pair* to, const bf16* from, int64_t ld, int64_t tokens, int64_t dim, int64_t padded) {
  pack_pairs(to, padded, from, ld, tokens, dim);
}

template <class T>
class Layout {
 public:
  INLINE_MEMBER Layout(const TreeShape& shape, const int32_t* end)
      : shape(shape),
        group(shape.num_heads / shape.num_kv_heads),
        padded(round_up(shape.head_dim, kWidth)),
        depth((shape.head_dim + kPerWord<T> - 1) / kPerWord<T>),
        block_words(kBlock * round_up(depth, kWidth)),
        blocks(end, shape.num_tokens) {
    parallel = shape.num_tokens * shape.num_heads * shape.head_dim > kParallelWork;
  }

  // Block b of head h of an array, as the left factor of a product over D; `row` is its first row.
  INLINE_MEMBER StridedOf<Word<T>> left(const T* array, int64_t heads, int64_t h, int64_t b, int64_t row) const {
    const T* from = array + token(heads, h, b) + row * heads * shape.head_dim;
    return {reinterpret_cast<const Word<T>*>(from), heads * shape.head_dim / kPerWord<T>, 1};
  }

  INLINE_MEMBER void pack_columns(Word<T>* to, const T* array, int64_t heads, int64_t h, int64_t b) const {
    if (blocks[b].size < kBlock) std::memset((void*)to, 0, sizeof(Word<T>) * block_words);
    pack_words_transposed(to, kBlock, array + token(heads, h, b), heads * shape.head_dim, blocks[b].size,
                          shape.head_dim);
  }

  INLINE_MEMBER void pack_rows(Word<T>* to, const T* array, int64_t heads, int64_t h, int64_t b) const {
    if (blocks[b].size < kBlock) std::memset((void*)to, 0, sizeof(Word<T>) * block_words);
    rows_of(to, array + token(heads, h, b), heads * shape.head_dim, blocks[b].size, shape.head_dim, padded);
  }

  // Row t of block b of head h of an array = factor * row.
  INLINE_MEMBER void unpack_row(T* array, const float* row, int64_t heads, int64_t h, int64_t b, int64_t t,
                                float factor) const {
    T* to = array + token(heads, h, b) + t * heads * shape.head_dim;
    for_each(
        shape.head_dim, [&](int64_t d) { store(to + d, factor * load(row + d)); },
        [&](int64_t d) { put(to + d, factor * row[d]); });
  }

  // Where block b of head h begins in an [N, heads, D] array.
  INLINE_MEMBER int64_t token(int64_t heads, int64_t h, int64_t b) const {
    return (blocks[b].begin * heads + h) * shape.head_dim;
  }

  const TreeShape& shape;
  const int64_t group;        // query heads a key/value head
  const int64_t padded;       // D rounded up to whole vectors
  const int64_t depth;        // words of D
  const int64_t block_words;  // of a packed block in the larger form, columns
  const Blocks blocks;
  bool parallel;

 private:
  static constexpr int64_t kParallelWork = 1 << 15;  // tokens x heads x head size; below, starting threads costs more
};

}  // namespace ibtpo::IBTPO_ISA
