// Head-major copies of [N, heads, D] arrays, in the two forms in which a matrix product reads them.
#pragma once

#include "tile.h"
#include "tree_blocks.h"

namespace ibtpo::IBTPO_ISA {

// Packing shares its loop among the threads of the region it is called in; nobody waits, the caller has the barrier.
class Layout {
 public:
  INLINE_MEMBER Layout(const TreeShape& shape, const int32_t* end)
      : shape(shape),
        group(shape.num_heads / shape.num_kv_heads),
        padded(round_up(shape.head_dim, kWidth)),
        blocks(end, shape.num_tokens) {
    parallel = blocks.num_rows * shape.num_heads * shape.head_dim > kParallelWork;
  }

  // [heads, rows, padded], zero where there is no token or no dimension.
  INLINE_MEMBER void pack(float* to, const float* from, int64_t heads) const {
#pragma omp for collapse(2) nowait
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < blocks.count; ++b)
        pack_rows(to + at(h, b), padded, from + token(heads, h, b), heads * shape.head_dim, blocks[b].size, kBlock,
                  shape.head_dim, 1.0f);
  }

  // [heads, blocks, padded, kBlock]: each block transposed.
  INLINE_MEMBER void pack_columns(float* to, const float* from, int64_t heads) const {
    static_assert(kBlock % kWidth == 0);
#pragma omp for collapse(2) nowait
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < blocks.count; ++b) {
        if (blocks[b].size < kBlock) std::memset(to + at(h, b), 0, sizeof(float) * padded * kBlock);
        pack_transposed(to + at(h, b), kBlock, from + token(heads, h, b), heads * shape.head_dim, blocks[b].size,
                        shape.head_dim);
      }
  }

  // Row t of block b of head h, from head-major rows to the caller's array.
  INLINE_MEMBER void unpack_row(float* to, const float* row, int64_t heads, int64_t h, int64_t b, int64_t t,
                                float factor) const {
    to += token(heads, h, b) + t * heads * shape.head_dim;
    for (int64_t d = 0; d < shape.head_dim; ++d) to[d] = factor * row[d];
  }

  // Where block b of head h begins in a head-major copy, and in an [N, heads, D] array.
  INLINE_MEMBER int64_t at(int64_t h, int64_t b) const { return (h * blocks.num_rows + b * kBlock) * padded; }
  INLINE_MEMBER int64_t token(int64_t heads, int64_t h, int64_t b) const {
    return (blocks[b].begin * heads + h) * shape.head_dim;
  }

  const TreeShape& shape;
  const int64_t group, padded;
  const Blocks blocks;
  bool parallel;

 private:
  static constexpr int64_t kParallelWork = 1 << 15;  // tokens x heads x head size; below, starting threads costs more
};

}  // namespace ibtpo::IBTPO_ISA
