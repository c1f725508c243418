// Attention over packed trees: query i sees key j <=> j <= i < end[j].
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i k_j
//   dV_j = sum_i p_ij dO_i,   dS_ij = p_ij (dO_i v_j - delta_i),   delta_i = dO_i out_i
//   dQ_i = scale sum_j dS_ij k_j,   dK_j = scale sum_i dS_ij q_i
//
// Tokens are cut into blocks of at most kBlock. Key block j against query block i, j <= i:
//
//   skip     max(end of j) <= begin of i       nothing of i lies below any key of j
//   no mask  min(end of j) >= end of i, j < i  all of i lies below every key of j
//   mask     otherwise
//
// Blocks start afresh at every *stand*, a run of whole trees with at least kStand tokens; nothing is visible across
// stands, so the backward of one (key/value head, stand) writes gradients that no other thread writes. All sums run
// over blocks in ascending order: forward and backward are deterministic for any number of threads.
#include "kernels.h"
#include "tile.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kStand = 256;
constexpr float kMinimum = -1e30f;  // "no maximum yet": finite, so that -inf - m stays -inf

// A maximum that grows by less than this is kept: weights up to e^8 are harmless, rescaling is not free.
constexpr float kSlack = 8.0f;

constexpr int64_t kParallelWork = 1 << 15;  // tokens x heads x head size; below, starting threads costs more

// Tokens [begin, begin + size). In head-major scratch they are rows [kBlock * index, kBlock * index + kBlock).
struct Block {
  int64_t begin, size, min_end, max_end, stand_begin, stand_end;  // stand: blocks [stand_begin, stand_end)
};

INLINE int64_t max_blocks(int64_t num_tokens) { return num_tokens / kBlock + num_tokens / kStand + 2; }

INLINE int64_t cut_blocks(const int32_t* end, int64_t num_tokens, Block* blocks) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < num_tokens;) {
    int64_t stop = begin;
    while (stop < num_tokens && stop - begin < kStand) {  // `stop` is a root: move past its tree
      int64_t tree_end = end[stop];
      for (; stop < tree_end; ++stop) tree_end = most(tree_end, end[stop]);
    }
    const int64_t first = count;
    for (int64_t i = begin; i < stop; i += kBlock) {
      Block& block = blocks[count++];
      block = {i, least(kBlock, stop - i), num_tokens, 0, first, 0};
      for (int64_t t = i; t < i + block.size; ++t) {
        block.min_end = least(block.min_end, end[t]);
        block.max_end = most(block.max_end, end[t]);
      }
      if (block.size < kBlock) block.min_end = 0;  // its padding must be masked
    }
    for (int64_t i = first; i < count; ++i) blocks[i].stand_end = count;
    begin = stop;
  }
  return count;
}

INLINE bool sees(const Block& query, const Block& key) { return key.max_end > query.begin; }
INLINE bool sees_all(const Block& query, const Block& key) {
  return key.min_end >= query.begin + query.size && key.begin < query.begin;
}

// Sizes, the blocks, and each padded row's subtree end (0 for padding: visible to nobody).
class Layout {
 public:
  INLINE_MEMBER Layout(const TreeShape& shape, const int32_t* end)
      : shape(shape),
        group(shape.num_heads / shape.num_kv_heads),
        padded(round_up(shape.head_dim, kWidth)),
        blocks(max_blocks(shape.num_tokens)),
        num_blocks(cut_blocks(end, shape.num_tokens, blocks)),
        num_rows(num_blocks * kBlock),
        ends(num_rows) {
    for (int64_t b = 0; b < num_blocks; ++b)
      for (int64_t t = 0; t < kBlock; ++t) ends[b * kBlock + t] = t < blocks[b].size ? end[blocks[b].begin + t] : 0;
    parallel = num_blocks * kBlock * shape.num_heads * shape.head_dim > kParallelWork;
  }

  // Packing shares its loop among the threads of the region it is called in; nobody waits, the caller has the barrier.

  // [heads, rows, padded], rows of a head contiguous, zero where there is no token or no dimension.
  INLINE_MEMBER void pack(float* to, const float* from, int64_t heads, float factor) const {
#pragma omp for collapse(2) nowait
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < num_blocks; ++b)
        pack_rows(to + (h * num_rows + b * kBlock) * padded, padded, token(from, heads, h, b), heads * shape.head_dim,
                  blocks[b].size, kBlock, shape.head_dim, factor);
  }

  // [heads, blocks, padded, kBlock]: each block transposed.
  INLINE_MEMBER void pack_columns(float* to, const float* from, int64_t heads) const {
    static_assert(kBlock % kWidth == 0);
#pragma omp for collapse(2) nowait
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < num_blocks; ++b) {
        float* square = to + (h * num_rows + b * kBlock) * padded;
        if (blocks[b].size < kBlock) std::memset(square, 0, sizeof(float) * padded * kBlock);
        pack_transposed(square, kBlock, token(from, heads, h, b), heads * shape.head_dim, blocks[b].size,
                        shape.head_dim);
      }
  }

  INLINE_MEMBER void unpack(float* to, const float* from, int64_t heads, float factor) const {
#pragma omp for collapse(2) nowait
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < num_blocks; ++b)
        for (int64_t t = 0; t < blocks[b].size; ++t) {
          float* row = to + ((blocks[b].begin + t) * heads + h) * shape.head_dim;
          const float* packed = from + (h * num_rows + b * kBlock + t) * padded;
          for (int64_t d = 0; d < shape.head_dim; ++d) row[d] = factor * packed[d];
        }
  }

  // Scores of query block i against key block j, [kBlock, kBlock]: -inf where i does not see j.
  INLINE_MEMBER void mask(float* s, int64_t i, int64_t j) const {
    if (sees_all(blocks[i], blocks[j])) return;
    for (int64_t r = 0; r < blocks[i].size; ++r) {
      const auto query = (int32_t)(blocks[i].begin + r);
      for (int64_t c = 0; c < kBlock; c += kWidth) {
        const IVec key = iota() + (int32_t)(blocks[j].begin + c);
        const IVec visible = (key <= query) & (load(ends + j * kBlock + c) > query);
        store(s + r * kBlock + c, visible ? load(s + r * kBlock + c) : splat(-__builtin_inff()));
      }
    }
  }

  const TreeShape& shape;
  const int64_t group, padded;
  const Scratch<Block> blocks;
  const int64_t num_blocks, num_rows;
  const Scratch<int32_t> ends;
  bool parallel;

 private:
  INLINE_MEMBER const float* token(const float* from, int64_t heads, int64_t h, int64_t b) const {
    return from + (blocks[b].begin * heads + h) * shape.head_dim;
  }
};

// One query block of one head over its key blocks: online softmax with state (m, l, acc).
INLINE void forward_block(const Layout& lay, const TreeForward& p, const float* keys, const float* values, int64_t h,
                          int64_t i, float* q, float* acc, float* s) {
  const Block& query = lay.blocks[i];
  const int64_t padded = lay.padded, rows = query.size, heads = lay.shape.num_heads, dim = lay.shape.head_dim;
  float m[kBlock];
  Vec l[kBlock];
  pack_rows(q, padded, p.q + (query.begin * heads + h) * dim, heads * dim, rows, rows, dim, lay.shape.scale);
  std::memset(acc, 0, sizeof(float) * rows * padded);
  for (int64_t r = 0; r < rows; ++r) {
    m[r] = kMinimum;
    l[r] = Vec{};
  }
  for (int64_t j = query.stand_begin; j <= i; ++j) {
    if (!sees(query, lay.blocks[j])) continue;
    multiply<Into::kStore>(s, kBlock, rows, kBlock, {q, padded, 1}, keys + j * kBlock * padded, kBlock, padded);
    lay.mask(s, i, j);
    for (int64_t r = 0; r < rows; ++r) {
      float* s_r = s + r * kBlock;
      Vec highest = load(s_r);
      for (int64_t c = kWidth; c < kBlock; c += kWidth) highest = max(highest, load(s_r + c));
      const float block_max = reduce_max(highest);
      if (block_max > m[r] + kSlack) {
        const float factor = exp(m[r] - block_max);
        scale_row(acc + r * padded, padded, factor);
        l[r] *= factor;
        m[r] = block_max;
      }
      for (int64_t c = 0; c < kBlock; c += kWidth) {
        const Vec weight = exp(load(s_r + c) - m[r]);
        l[r] += weight;
        store(s_r + c, weight);
      }
    }
    multiply<Into::kAdd>(acc, padded, rows, padded, {s, kBlock, 1}, values + j * kBlock * padded, padded, kBlock);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = reduce_add(l[r]);
    float* out = p.out + ((query.begin + r) * heads + h) * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = acc[r * padded + d] / sum;
    p.lse[h * lay.shape.num_tokens + query.begin + r] = m[r] + __builtin_logf(sum);
  }
}

// Head-major copies of what the backward reads and writes.
struct BackwardScratch {
  INLINE_MEMBER explicit BackwardScratch(const Layout& lay)
      : query_size(lay.shape.num_heads * lay.num_rows * lay.padded),
        key_size(lay.shape.num_kv_heads * lay.num_rows * lay.padded),
        q(query_size),
        d_out(query_size),
        dq(query_size),
        delta(lay.shape.num_heads * lay.num_rows),
        lse(lay.shape.num_heads * lay.num_rows),
        k(key_size),
        k_columns(key_size),
        v_columns(key_size),
        dk(key_size),
        dv(key_size) {}

  const int64_t query_size, key_size;
  const Scratch<float> q, d_out, dq, delta, lse;
  const Scratch<float> k, k_columns, v_columns, dk, dv;
};

INLINE void pack_backward(const Layout& lay, const TreeBackward& p, const BackwardScratch& to) {
  const int64_t heads = lay.shape.num_heads, dim = lay.shape.head_dim;
  lay.pack(to.q, p.q, heads, lay.shape.scale);
  lay.pack(to.d_out, p.d_out, heads, 1.0f);
  lay.pack(to.k, p.k, lay.shape.num_kv_heads, 1.0f);
  lay.pack_columns(to.k_columns, p.k, lay.shape.num_kv_heads);
  lay.pack_columns(to.v_columns, p.v, lay.shape.num_kv_heads);
#pragma omp for collapse(2) nowait
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t b = 0; b < lay.num_blocks; ++b) {
      const int64_t first = h * lay.num_rows + b * kBlock;
      std::memset(to.dq + first * lay.padded, 0, sizeof(float) * kBlock * lay.padded);
      for (int64_t t = 0; t < lay.blocks[b].size; ++t) {
        const int64_t token = lay.blocks[b].begin + t, at = (token * heads + h) * dim;
        to.delta[first + t] = dot(p.d_out + at, p.out + at, dim);
        to.lse[first + t] = p.lse[h * lay.shape.num_tokens + token];
      }
    }
}

// Key block j against query block i of head h: adds to dQ of i, and to dK and dV of j.
INLINE void backward_pair(const Layout& lay, const BackwardScratch& x, int64_t h, int64_t i, int64_t j, float* p,
                          float* ds) {
  const int64_t padded = lay.padded, rows = lay.blocks[i].size;
  const int64_t query = h * lay.num_rows + i * kBlock, key = (h / lay.group) * lay.num_rows + j * kBlock;
  multiply<Into::kStore>(p, kBlock, rows, kBlock, {x.q + query * padded, padded, 1}, x.k_columns + key * padded, kBlock,
                         padded);
  lay.mask(p, i, j);
  multiply<Into::kStore>(ds, kBlock, rows, kBlock, {x.d_out + query * padded, padded, 1}, x.v_columns + key * padded,
                         kBlock, padded);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < kBlock; c += kWidth) {
      const int64_t at = r * kBlock + c;
      const Vec weight = exp(load(p + at) - x.lse[query + r]);
      store(p + at, weight);
      store(ds + at, weight * (load(ds + at) - x.delta[query + r]));
    }
  multiply<Into::kAdd>(x.dv + key * padded, padded, kBlock, padded, {p, 1, kBlock}, x.d_out + query * padded, padded,
                       rows);
  multiply<Into::kAdd>(x.dk + key * padded, padded, kBlock, padded, {ds, 1, kBlock}, x.q + query * padded, padded,
                       rows);
  multiply<Into::kAdd>(x.dq + query * padded, padded, rows, padded, {ds, kBlock, 1}, x.k + key * padded, padded,
                       kBlock);
}

}  // namespace

void tree_forward(const TreeShape& shape, const TreeForward& p) {
  const Layout lay(shape, p.end);
  const int64_t key_size = shape.num_kv_heads * lay.num_rows * lay.padded;
  const Scratch<float> keys(key_size), values(key_size);
#pragma omp parallel if (lay.parallel)
  {
    lay.pack_columns(keys, p.k, shape.num_kv_heads);
    lay.pack(values, p.v, shape.num_kv_heads, 1.0f);
    const Scratch<float> q(kBlock * lay.padded), acc(kBlock * lay.padded), s(kBlock * kBlock);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = lay.num_blocks - 1; i >= 0; --i)  // the last block of a tree sees most: begin there
      for (int64_t h = 0; h < shape.num_heads; ++h) {
        const int64_t key = (h / lay.group) * lay.num_rows * lay.padded;
        forward_block(lay, p, keys + key, values + key, h, i, q, acc, s);
      }
  }
}

void tree_backward(const TreeShape& shape, const TreeBackward& p) {
  const Layout lay(shape, p.end);
  const BackwardScratch scratch(lay);
#pragma omp parallel if (lay.parallel)
  {
    pack_backward(lay, p, scratch);
    const Scratch<float> probability(kBlock * kBlock), ds(kBlock * kBlock);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = 0; h < shape.num_kv_heads; ++h)
      for (int64_t stand = 0; stand < lay.num_blocks; ++stand) {
        if (lay.blocks[stand].stand_begin != stand) continue;
        const int64_t stop = lay.blocks[stand].stand_end;
        for (int64_t j = stand; j < stop; ++j) {
          const int64_t key = (h * lay.num_rows + j * kBlock) * lay.padded;
          std::memset(scratch.dk + key, 0, sizeof(float) * kBlock * lay.padded);
          std::memset(scratch.dv + key, 0, sizeof(float) * kBlock * lay.padded);
          for (int64_t i = j; i < stop && sees(lay.blocks[i], lay.blocks[j]); ++i)  // the queries [j, max(end))
            for (int64_t g = 0; g < lay.group; ++g)
              backward_pair(lay, scratch, h * lay.group + g, i, j, probability, ds);
        }
      }
    lay.unpack(p.dq, scratch.dq, shape.num_heads, shape.scale);
    lay.unpack(p.dk, scratch.dk, shape.num_kv_heads, 1.0f);
    lay.unpack(p.dv, scratch.dv, shape.num_kv_heads, 1.0f);
  }
}

}  // namespace ibtpo::IBTPO_ISA
