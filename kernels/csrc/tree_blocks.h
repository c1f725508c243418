// Packed trees cut into blocks of kBlock tokens, and what a block of queries sees of a block of keys.
//
// Query i sees key j <=> j <= i < end[j]. With `high` the largest end of key block j:
//
//   the query blocks that see j      all of [j, high / kBlock rounded up): queries before `high` see the key it ends
//   skip                             high <= begin of i: no query of i lies below a key of j, nor below a key of the
//                                    blocks up to `high`, which are in the same subtrees
//   no mask                          min(end of j) >= end of i, j < i: all of i lies below every key of j
//   mask                             otherwise, and only the squares of kStrip x kStrip that hold a visible pair:
//
//        keys of j                   A key strip is seen by a contiguous range of queries: [its begin, its largest
//       +----+----+----+----+        end). A query strip sees a contiguous range of key strips up to holes, which the
//       | ## |    |    |    |  i = j mask fills with zeros. Strips with equal ranges are one run: a pair without a
//       | ## | ## |    |    |        mask is one run of all its rows.
//       |    |    | ## |    |  <- another branch begins: the first two strips of keys are not below it
//       |    |    | ## | ## |
//       +----+----+----+----+
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ibtpo::IBTPO_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kStrip = kWidth > 8 ? kWidth : 8;
constexpr int64_t kStrips = kBlock / kStrip;

// Tokens [begin, begin + size). In head-major scratch a block is rows [begin, begin + kBlock).
struct Block {
  int64_t begin, size;
  int64_t first;               // the block in which the tree of token `begin` begins: nothing before it is visible
  int64_t min_end, max_end;    // min_end is 0 where there is padding, which must be masked
  int64_t strip_end[kStrips];  // max_end of each strip, 0 where there is no token
};

// Rows [begin, end) of a product that share the column range [from, to).
struct Run {
  int64_t begin, end, from, to;
};

struct Runs {
  Run run[kStrips];
  int64_t count = 0;

  INLINE_MEMBER void add(const Run& next) {
    if (next.from >= next.to || next.begin >= next.end) return;
    Run& last = run[count - (count > 0)];
    if (count > 0 && last.end == next.begin && last.from == next.from && last.to == next.to)
      last.end = next.end;
    else
      run[count++] = next;
  }
  INLINE_MEMBER const Run* begin() const { return run; }
  INLINE_MEMBER const Run* end() const { return run + count; }
};

class Blocks {
 public:
  INLINE_MEMBER Blocks(const int32_t* end, int64_t num_tokens)
      : count((num_tokens + kBlock - 1) / kBlock), num_rows(count * kBlock), block_(count), end_(num_rows) {
    int64_t root = 0, tree_end = 0;
    for (int64_t b = 0; b < count; ++b) {
      Block& block = block_[b];
      block = {b * kBlock, least(kBlock, num_tokens - b * kBlock), 0, num_tokens, 0, {}};
      for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t t = block.begin + r, end_t = r < block.size ? end[t] : 0;
        if (r < block.size && t >= tree_end) root = t, tree_end = end_t;
        if (r == 0) block.first = root / kBlock;
        end_[t] = (int32_t)end_t;
        block.min_end = least(block.min_end, end_t);
        block.max_end = most(block.max_end, end_t);
        block.strip_end[r / kStrip] = most(block.strip_end[r / kStrip], end_t);
      }
    }
  }

  INLINE_MEMBER const Block& operator[](int64_t b) const { return block_[b]; }

  INLINE_MEMBER bool sees(int64_t query, int64_t key) const { return block_[key].max_end > block_[query].begin; }
  INLINE_MEMBER bool sees_all(int64_t query, int64_t key) const {
    return key < query && block_[key].min_end >= block_[query].begin + block_[query].size;
  }

  // One past the last query block that sees key block j.
  INLINE_MEMBER int64_t seen_until(int64_t j) const { return (block_[j].max_end + kBlock - 1) / kBlock; }

  // The key block to try after j, whether or not query block i sees j.
  INLINE_MEMBER int64_t next_key(int64_t i, int64_t j) const {
    return sees(i, j) ? j + 1 : most(j + 1, block_[j].max_end / kBlock);
  }

  // For each strip of keys of block j, the queries of block i that see one of them.
  INLINE_MEMBER Runs key_runs(int64_t i, int64_t j) const {
    Runs runs;
    for (int64_t s = 0; s < kStrips; ++s) {
      const int64_t from = i == j ? s * kStrip : 0;
      runs.add({s * kStrip, (s + 1) * kStrip, from, least(block_[i].size, block_[j].strip_end[s] - block_[i].begin)});
    }
    return runs;
  }

  // For each strip of queries of block i, the key strips of block j that hold a visible key.
  INLINE_MEMBER Runs query_runs(int64_t i, const Runs& key_runs) const {
    Runs runs;
    for (int64_t begin = 0; begin < block_[i].size; begin += kStrip) {
      int64_t from = kBlock, to = 0;
      for (const Run& keys : key_runs) {
        if (keys.from > begin || keys.to <= begin) continue;
        from = least(from, keys.begin);
        to = most(to, keys.end);
      }
      runs.add({begin, least(block_[i].size, begin + kStrip), from, to});
    }
    return runs;
  }

  // A function of c: the mask of keys c .. c + kWidth - 1 of block j that token `query` sees.
  INLINE_MEMBER auto visible_to(int64_t query, int64_t j) const {
    const int32_t *const ends = end_ + j * kBlock, i = (int32_t)query, last = i - (int32_t)block_[j].begin;
    return [=](int64_t c) { return (iota() + (int32_t)c <= last) & (load(ends + c) > i); };
  }

  const int64_t count, num_rows;

 private:
  const Scratch<Block> block_;
  const Scratch<int32_t> end_;
};

}  // namespace ibtpo::IBTPO_ISA
