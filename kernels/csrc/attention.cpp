// Attention over packed trees, forward: query i sees key j <=> j <= i < end[j].
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i k_j
//
// A block of queries of one head walks over the key blocks that it sees, in ascending order, with a softmax that is
// rescaled as its maximum grows. Blocks are independent of each other: the result does not depend on threads.
#include "tree_pack.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr float kMinimum = -1e30f;  // "no maximum yet": finite, so that -inf - m stays -inf

// A maximum that grows by less than this is kept: weights up to e^8 are harmless, rescaling is not free.
constexpr float kSlack = 8.0f;

// One query block of one head: queries packed, and per row the maximum m, the sum l and the output not yet divided.
class QueryBlock {
 public:
  INLINE_MEMBER explicit QueryBlock(const Layout& lay)
      : lay_(lay), q_(kBlock * lay.padded), acc_(kBlock * lay.padded), s_(kBlock * kBlock) {}

  INLINE_MEMBER void run(const TreeForward& p, const float* keys, const float* values, int64_t h, int64_t i) {
    const Block& block = lay_.blocks[i];
    const int64_t padded = lay_.padded, heads = lay_.shape.num_heads, dim = lay_.shape.head_dim;
    pack_rows(q_, padded, p.q + lay_.token(heads, h, i), heads * dim, block.size, block.size, dim, 1.0f);
    std::memset(acc_, 0, sizeof(float) * block.size * padded);
    for (int64_t r = 0; r < block.size; ++r) {
      m_[r] = kMinimum;
      l_[r] = Vec{};
    }
    for (int64_t j = block.first; j <= i; j = lay_.blocks.next_key(i, j))
      if (lay_.blocks.sees(i, j)) add_keys(keys + j * kBlock * padded, values + j * kBlock * padded, i, j);
    for (int64_t r = 0; r < block.size; ++r) {
      const float sum = reduce_add(l_[r]);
      lay_.unpack_row(p.out, acc_ + r * padded, heads, h, i, r, 1.0f / sum);
      p.lse[h * lay_.shape.num_tokens + block.begin + r] = m_[r] + __builtin_logf(sum);
    }
  }

 private:
  INLINE_MEMBER void add_keys(const float* keys, const float* values, int64_t i, int64_t j) {
    const bool all = lay_.blocks.sees_all(i, j);
    for (const Run& run : lay_.blocks.query_runs(i, lay_.blocks.key_runs(i, j))) {
      const int64_t padded = lay_.padded, rows = run.end - run.begin, cols = run.to - run.from;
      float* s = s_ + run.begin * kBlock + run.from;
      multiply<Into::kStore>(s, kBlock, rows, cols, {q_ + run.begin * padded, padded, 1}, keys + run.from, kBlock,
                             padded);
      for (int64_t r = run.begin; r < run.end; ++r) all ? weigh<true>(run, r, i, j) : weigh<false>(run, r, i, j);
      multiply<Into::kAdd>(acc_ + run.begin * padded, padded, rows, padded, {s, kBlock, 1}, values + run.from * padded,
                           padded, cols);
    }
  }

  // Row r of the scores, columns [run.from, run.to): from q k to exp(s - m). What the loops need is local: a store
  // might change a member, for all that the compiler knows.
  template <bool All>
  INLINE_MEMBER void weigh(const Run& run, int64_t r, int64_t i, int64_t j) {
    float* const s = s_ + r * kBlock;
    const int64_t from = run.from, to = run.to;
    const float scale = lay_.shape.scale;
    const auto visible = lay_.blocks.visible_to(lay_.blocks[i].begin + r, j);
    float m = m_[r];
    Vec highest = splat(kMinimum), l = l_[r];
    for (int64_t c = from; c < to; c += kWidth) {
      Vec x = load(s + c) * scale;
      if (!All) x = visible(c) ? x : splat(-__builtin_inff());
      store(s + c, x);
      highest = max(x, highest);
    }
    const float block_max = reduce_max(highest);
    if (block_max > m + kSlack) {
      const float factor = exp(m - block_max);
      scale_row(acc_ + r * lay_.padded, lay_.padded, factor);
      l *= factor;
      m_[r] = m = block_max;
    }
    for (int64_t c = from; c < to; c += kWidth) {
      const Vec weight = exp(load(s + c) - m);
      l += weight;
      store(s + c, weight);
    }
    l_[r] = l;
  }

  const Layout& lay_;
  const Scratch<float> q_, acc_, s_;
  float m_[kBlock];
  Vec l_[kBlock];
};

}  // namespace

void tree_forward(const TreeShape& shape, const TreeForward& p) {
  const Layout lay(shape, p.end);
  const int64_t key_size = lay.at(shape.num_kv_heads, 0);
  const Scratch<float> keys(key_size), values(key_size);
#pragma omp parallel if (lay.parallel)
  {
    lay.pack_columns(keys, p.k, shape.num_kv_heads);
    lay.pack(values, p.v, shape.num_kv_heads);
    QueryBlock block(lay);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = lay.blocks.count - 1; i >= 0; --i)  // the last block of a tree sees most: begin there
      for (int64_t h = 0; h < shape.num_heads; ++h) {
        const int64_t key = lay.at(h / lay.group, 0);
        block.run(p, keys + key, values + key, h, i);
      }
  }
}

}  // namespace ibtpo::IBTPO_ISA
