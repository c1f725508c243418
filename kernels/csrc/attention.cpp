// Attention over packed trees, forward: query i sees key j <=> j <= i < end[j].
//
//   out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i k_j
//
// A block of queries of one head walks over the key blocks that it sees, in ascending order, with an online softmax.
// Blocks are independent of each other, so the result does not depend on threads.
// With bfloat16, weights are rounded for the product with v but not for their own sum; all sums are float.
#include "tree_pack.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr float kMinimum = -1e30f;  // "no maximum yet": finite, so that -inf - m stays -inf

// A maximum that grows by less than this is kept: weights up to e^8 are harmless, rescaling is not free.
constexpr float kSlack = 8.0f;

// One query block of one head: per row the maximum m, the sum l, and the output not yet divided by it.
template <class T>
class QueryBlock {
 public:
  INLINE_MEMBER QueryBlock(const Layout<T>& lay, const TreeForward<T>& p)
      : lay_(lay), args_(p), acc_(kBlock * lay.padded), s_(kBlock * kBlock) {}

  INLINE_MEMBER void run(const Word<T>* keys, const Word<T>* values, int64_t h, int64_t i) {
    const Block& block = lay_.blocks[i];
    std::memset(acc_, 0, sizeof(float) * block.size * lay_.padded);
    for (int64_t r = 0; r < block.size; ++r) {
      m_[r] = kMinimum;
      l_[r] = Vec{};
    }
    for (int64_t j = block.first; j <= i; j = lay_.blocks.next_key(i, j))
      if (lay_.blocks.sees(i, j)) add_keys(keys + j * lay_.block_words, values + j * lay_.block_words, h, i, j);
    for (int64_t r = 0; r < block.size; ++r) {
      const float sum = reduce_add(l_[r]);
      lay_.unpack_row(args_.out, acc_ + r * lay_.padded, lay_.shape.num_heads, h, i, r, 1.0f / sum);
      args_.lse[h * lay_.shape.num_tokens + block.begin + r] = m_[r] + __builtin_logf(sum);
    }
  }

 private:
  INLINE_MEMBER void add_keys(const Word<T>* keys, const Word<T>* values, int64_t h, int64_t i, int64_t j) {
    const bool all = lay_.blocks.sees_all(i, j);
    for (const Run& run : lay_.blocks.query_runs(i, lay_.blocks.key_runs(i, j))) {
      const int64_t padded = lay_.padded, rows = run.end - run.begin, cols = run.to - run.from;
      float* s = s_ + run.begin * kBlock;
      product<Into::kStore>(s, kBlock, rows, cols, lay_.left(args_.q, lay_.shape.num_heads, h, i, run.begin),
                            keys + run.from, kBlock, lay_.depth);
      for (int64_t r = run.begin; r < run.end; ++r) all ? weigh<true>(run, r, i, j) : weigh<false>(run, r, i, j);
      product<Into::kAdd>(acc_ + run.begin * padded, padded, rows, padded,
                          {reinterpret_cast<const Word<T>*>(s), kBlock, 1}, values + run.from / kPerWord<T> * padded,
                          padded, cols / kPerWord<T>);
    }
  }

  // Turns row r of the scores, keys [run.from, run.to) stored from column 0 on, from q k into exp(s - m) of type T, in
  // place. Members are copied to locals, since for all the compiler knows a store might change them.
  template <bool All>
  INLINE_MEMBER void weigh(const Run& run, int64_t r, int64_t i, int64_t j) {
    float* const s = s_ + r * kBlock;
    const int64_t from = run.from, cols = run.to - run.from;
    const float scale = lay_.shape.scale;
    const auto visible = lay_.blocks.visible_to(lay_.blocks[i].begin + r, j);
    float m = m_[r];
    Vec highest = splat(kMinimum), l = l_[r];
    for (int64_t c = 0; c < cols; c += kWidth) {
      Vec x = load(s + c) * scale;
      if (!All) x = visible(from + c) ? x : splat(-__builtin_inff());
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
    for (int64_t c = 0; c < cols; c += kWidth) {
      const Vec weight = exp(load(s + c) - m);
      l += weight;
      store(reinterpret_cast<T*>(s) + c, weight);
    }
    l_[r] = l;
  }

  const Layout<T>& lay_;
  const TreeForward<T>& args_;
  const Scratch<float> acc_, s_;
  float m_[kBlock];
  Vec l_[kBlock];
};

template <class T>
INLINE void forward(const TreeShape& shape, const TreeForward<T>& p) {
  const Layout<T> lay(shape, p.end);
  const int64_t kv_heads = shape.num_kv_heads, head_words = lay.blocks.count * lay.block_words;
  const Scratch<Word<T>> keys(kv_heads * head_words), values(kv_heads * head_words);
#pragma omp parallel if (lay.parallel)
  {
#pragma omp for collapse(2)
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t b = 0; b < lay.blocks.count; ++b) {
        lay.pack_columns(keys + h * head_words + b * lay.block_words, p.k, kv_heads, h, b);
        lay.pack_rows(values + h * head_words + b * lay.block_words, p.v, kv_heads, h, b);
      }
    [[maybe_unused]] const RegistersFor<T> registers;
    QueryBlock<T> block(lay, p);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t i = lay.blocks.count - 1; i >= 0; --i)  // largest first: the last block of a tree sees most
      for (int64_t h = 0; h < shape.num_heads; ++h)
        block.run(keys + h / lay.group * head_words, values + h / lay.group * head_words, h, i);
  }
}

}  // namespace

void tree_forward(const TreeShape& shape, const TreeForward<float>& p) { forward(shape, p); }
void tree_forward_bf16(const TreeShape& shape, const TreeForward<bf16>& p) { forward(shape, p); }

}  // namespace ibtpo::IBTPO_ISA
