// The backward of attention over packed trees:
//
//   dV_j = sum_i p_ij dO_i,   dS_ij = p_ij (dO_i v_j - delta_i),   delta_i = dO_i out_i
//   dQ_i = scale sum_j dS_ij k_j,   dK_j = scale sum_i dS_ij q_i
//
// One pass, so scores are computed once. Query blocks are cut into *chunks* of about equal work, whose number depends
// on the trees alone; a task is a chunk and a key/value head. It walks over the key blocks that its queries see:
//
//        keys       chunk 0   1   2   3          dQ of its queries is the task's own.
//   chunk 0  ##                                  dK and dV of a key block of its own queries (##) go to the result,
//   chunk 1  xx     ##                           those of an earlier key block (xx) to a *spill*, a copy that no other
//   chunk 2  xx     xx      ##                   task writes. When all tasks are done, a key block's spills are added
//   chunk 3  xx             xx  ##               to the result in ascending order of chunks.
//
// Every sum has one order, whatever the number of threads, and no task waits for another. With bfloat16, p and dS are
// rounded for the products they enter; all sums are float.
#include "tree_pack.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kTasks = 32;          // tasks wanted for a big tree: enough for many cores to share evenly
constexpr int64_t kTaskWork = 1 << 12;  // block pairs x heads of a group x head size: no task needs to be smaller

// The chunks, and where the spills of each key block begin.
class Chunks {
 public:
  template <class T>
  INLINE_MEMBER explicit Chunks(const Layout<T>& lay)
      : begin(lay.blocks.count + 1), chunk_of(lay.blocks.count), spill(lay.blocks.count + 1) {
    const Blocks& blocks = lay.blocks;
    const Scratch<int64_t> pairs(blocks.count + 1);  // of query blocks before this one
    count_pairs(blocks, pairs);
    const int64_t total = pairs[blocks.count];
    const int64_t wanted = least(total * lay.group * lay.shape.head_dim / kTaskWork,
                                 (kTasks + lay.shape.num_kv_heads - 1) / lay.shape.num_kv_heads);
    for (int64_t i = 0, last = -1; i < blocks.count; ++i) {
      const int64_t slot = pairs[i] * most(wanted, 1) / total;
      if (slot != last) begin[count++] = i;
      last = slot;
      chunk_of[i] = count - 1;
    }
    begin[count] = blocks.count;
    spill[0] = 0;
    for (int64_t j = 0; j < blocks.count; ++j)
      spill[j + 1] = spill[j] + chunk_of[blocks.seen_until(j) - 1] - chunk_of[j];
  }

  int64_t count = 0;
  const Scratch<int64_t> begin, chunk_of, spill;

 private:
  static INLINE_MEMBER void count_pairs(const Blocks& blocks, int64_t* pairs) {
    std::memset(pairs, 0, sizeof(int64_t) * (blocks.count + 1));
    for (int64_t j = 0; j < blocks.count; ++j) {
      ++pairs[j];
      --pairs[blocks.seen_until(j)];
    }
    for (int64_t i = 0, seen = 0, sum = 0; i <= blocks.count; ++i) {
      seen += pairs[i];
      pairs[i] = sum;
      sum += seen;
    }
  }
};

// Packed keys and values, and their gradients in float: for each key/value head a block for each key block or spill.
template <class T>
struct Keys {
  INLINE_MEMBER Keys(const Layout<T>& lay, const Chunks& chunks)
      : head_words(lay.blocks.count * lay.block_words),
        head_size(lay.blocks.count * kBlock * lay.padded),
        head_spill(chunks.spill[lay.blocks.count] * kBlock * lay.padded),
        k_rows(lay.shape.num_kv_heads * head_words),
        k_columns(lay.shape.num_kv_heads * head_words),
        v_columns(lay.shape.num_kv_heads * head_words),
        dk(lay.shape.num_kv_heads * head_size),
        dv(lay.shape.num_kv_heads * head_size),
        dk_spill(lay.shape.num_kv_heads * head_spill),
        dv_spill(lay.shape.num_kv_heads * head_spill) {}

  INLINE_MEMBER void pack(const Layout<T>& lay, const TreeBackward<T>& p) const {
    const int64_t heads = lay.shape.num_kv_heads;
#pragma omp for collapse(2)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t b = 0; b < lay.blocks.count; ++b) {
        const int64_t at = h * head_words + b * lay.block_words;
        lay.pack_rows(k_rows + at, p.k, heads, h, b);
        lay.pack_columns(k_columns + at, p.k, heads, h, b);
        lay.pack_columns(v_columns + at, p.v, heads, h, b);
      }
  }

  const int64_t head_words, head_size, head_spill;
  const Scratch<Word<T>> k_rows, k_columns, v_columns;
  const Scratch<float> dk, dv, dk_spill, dv_spill;
};

// Stores two neighbouring rows of p or dS in place in a square of scores, as words along the rows: the depth of dV, dK.
INLINE void keep(float* at, Vec even, Vec odd, float) {
  store(at, even);
  store(at + kBlock, odd);
}
INLINE void keep(float* at, Vec even, Vec odd, bf16) {
  *reinterpret_cast<IVecAt*>(at) = (IVec)(round_bits(even) | round_bits(odd) << 16);
}

template <class T>
INLINE float row_dot(const T* a, const T* b, int64_t size) {
  Vec lanes{};
  float tail = 0.0f;
  for_each(
      size, [&](int64_t i) { lanes += load(a + i) * load(b + i); },
      [&](int64_t i) { tail += to_float(a[i]) * to_float(b[i]); });
  return reduce_add(lanes) + tail;
}

// The tasks of one thread. The queries of a chunk are taken in tiles that fit into the L2 cache.
template <class T>
class Worker {
 public:
  INLINE_MEMBER Worker(const Layout<T>& lay, const TreeBackward<T>& p, const Chunks& chunks, const Keys<T>& keys)
      : lay_(lay),
        args_(p),
        chunks_(chunks),
        keys_(keys),
        size_(kBlock * lay.padded),
        tile_(most(2, kTileSize / (lay.group * lay.padded))),
        q_(tile_ * lay.group * lay.block_words),
        d_out_(tile_ * lay.group * lay.block_words),
        dq_(tile_ * lay.group * size_),
        delta_(tile_ * lay.group * kBlock),
        lse_(tile_ * lay.group * kBlock),
        p_(kBlock * kBlock),
        ds_(kBlock * kBlock),
        ds_rows_(kBlock * kBlock) {}

  INLINE_MEMBER void run(int64_t chunk, int64_t kv_head) {
    kv_head_ = kv_head;
    const int64_t stop = chunks_.begin[chunk + 1];
    for (begin_ = chunks_.begin[chunk]; begin_ < stop; begin_ += tile_) run_tile(chunk, least(stop, begin_ + tile_));
  }

 private:
  static constexpr int64_t kTileSize = 1024;  // blocks x heads of a group x head size: three arrays of 128 KiB

  INLINE_MEMBER void run_tile(int64_t chunk, int64_t end) {
    const Blocks& blocks = lay_.blocks;
    for (int64_t i = begin_; i < end; ++i)
      for (int64_t g = 0; g < lay_.group; ++g) pack_queries(i, g);
    for (int64_t j = blocks[begin_].first; j < end; j = j < begin_ ? blocks.next_key(begin_, j) : j + 1) {
      if (j < begin_ && !blocks.sees(begin_, j)) continue;
      choose_target(chunk, j);
      for (int64_t i = most(j, begin_); i < least(end, blocks.seen_until(j)); ++i) {
        const Runs keys = blocks.key_runs(i, j), queries = blocks.query_runs(i, keys);
        for (int64_t g = 0; g < lay_.group; ++g) add_pair(i, j, g, keys, queries);
      }
    }
    for (int64_t i = begin_; i < end; ++i)
      for (int64_t g = 0; g < lay_.group; ++g) unpack_queries(i, g);
  }

  INLINE_MEMBER void pack_queries(int64_t i, int64_t g) {
    const int64_t heads = lay_.shape.num_heads, dim = lay_.shape.head_dim, h = head(g);
    lay_.pack_rows(q_ + slot(i, g) * lay_.block_words, args_.q, heads, h, i);
    lay_.pack_rows(d_out_ + slot(i, g) * lay_.block_words, args_.d_out, heads, h, i);
    std::memset(dq_ + slot(i, g) * size_, 0, sizeof(float) * size_);
    for (int64_t t = 0; t < lay_.blocks[i].size; ++t) {
      const int64_t at = lay_.token(heads, h, i) + t * heads * dim, row = slot(i, g) * kBlock + t;
      delta_[row] = row_dot(args_.d_out + at, args_.out + at, dim);
      lse_[row] = args_.lse[h * lay_.shape.num_tokens + lay_.blocks[i].begin + t];
    }
  }

  INLINE_MEMBER void unpack_queries(int64_t i, int64_t g) {
    const float* from = dq_ + slot(i, g) * size_;
    for (int64_t t = 0; t < lay_.blocks[i].size; ++t)
      lay_.unpack_row(args_.dq, from + t * lay_.padded, lay_.shape.num_heads, head(g), i, t, lay_.shape.scale);
  }

  // dK and dV of key block j: the result if the chunk has its queries, else the chunk's spill.
  INLINE_MEMBER void choose_target(int64_t chunk, int64_t j) {
    const bool own = j >= chunks_.begin[chunk];
    const int64_t block = kv_head_ * keys_.head_size + j * size_;
    const int64_t spill = kv_head_ * keys_.head_spill + (chunks_.spill[j] + chunk - chunks_.chunk_of[j] - 1) * size_;
    dk_ = own ? keys_.dk + block : keys_.dk_spill + spill;
    dv_ = own ? keys_.dv + block : keys_.dv_spill + spill;
    if (j < begin_ && begin_ > chunks_.begin[chunk]) return;  // an earlier tile has begun the sums
    std::memset(dk_, 0, sizeof(float) * size_);
    std::memset(dv_, 0, sizeof(float) * size_);
  }

  // Key block j against query block i of head g of the group: adds to dQ of i, and to dK and dV of j.
  INLINE_MEMBER void add_pair(int64_t i, int64_t j, int64_t g, const Runs& keys, const Runs& queries) {
    constexpr int64_t kWord = kPerWord<T>;
    const int64_t padded = lay_.padded, heads = lay_.shape.num_heads;
    const int64_t key = kv_head_ * keys_.head_words + j * lay_.block_words;
    const bool all = lay_.blocks.sees_all(i, j);
    const T* const ds_rows = kWord == 1 ? reinterpret_cast<T*>(static_cast<float*>(ds_)) : ds_rows_;
    for (const Run& run : queries) {
      const int64_t rows = run.end - run.begin, cols = run.to - run.from, at = run.begin * kBlock + run.from;
      product<Into::kStore>(p_ + at, kBlock, rows, cols, lay_.left(args_.q, heads, head(g), i, run.begin),
                            keys_.k_columns + key + run.from, kBlock, lay_.depth);
      product<Into::kStore>(ds_ + at, kBlock, rows, cols, lay_.left(args_.d_out, heads, head(g), i, run.begin),
                            keys_.v_columns + key + run.from, kBlock, lay_.depth);
      for (int64_t r = run.begin; r < run.end; r += 2)
        all ? weigh<true>(run, r, g, i, j) : weigh<false>(run, r, g, i, j);
      product<Into::kAdd>(dq_ + slot(i, g) * size_ + run.begin * padded, padded, rows, padded,
                          {reinterpret_cast<const Word<T>*>(ds_rows + at), kBlock / kWord, 1},
                          keys_.k_rows + key + run.from / kWord * padded, padded, cols / kWord);
    }
    for (const Run& run : keys) {
      const int64_t rows = run.end - run.begin, depth = (run.to - run.from + kWord - 1) / kWord;
      const int64_t at = run.from * kBlock + run.begin;
      const int64_t query = slot(i, g) * lay_.block_words + run.from / kWord * padded;
      product<Into::kAdd>(dv_ + run.begin * padded, padded, rows, padded,
                          {reinterpret_cast<const Word<T>*>(p_ + at), 1, kWord * kBlock}, d_out_ + query, padded,
                          depth);
      product<Into::kAdd>(dk_ + run.begin * padded, padded, rows, padded,
                          {reinterpret_cast<const Word<T>*>(ds_ + at), 1, kWord * kBlock}, q_ + query, padded, depth);
    }
  }

  // Rows r and r + 1 of both squares, columns [run.from, run.to): from q k and dO v to p and dS, zero in a row past the
  // last query. Members are copied to locals, since for all the compiler knows a store might change them.
  template <bool All>
  INLINE_MEMBER void weigh(const Run& run, int64_t r, int64_t g, int64_t i, int64_t j) {
    const int64_t from = run.from, to = run.to, row = slot(i, g) * kBlock + r;
    const bool both = r + 1 < run.end;
    const float scale = lay_.shape.scale, lse[2] = {lse_[row], lse_[row + 1]},
                delta[2] = {delta_[row], delta_[row + 1]};
    const auto visible = lay_.blocks.visible_to(lay_.blocks[i].begin + r, j);
    const auto visible_odd = lay_.blocks.visible_to(lay_.blocks[i].begin + r + 1, j);
    float *const p = p_ + r * kBlock, *const ds = ds_ + r * kBlock;
    T* const ds_rows = ds_rows_ + r * kBlock;
    for (int64_t c = from; c < to; c += kWidth) {
      Vec even = exp(load(p + c) * scale - lse[0]), odd = exp(load(p + kBlock + c) * scale - lse[1]);
      if (!All) even = visible(c) ? even : Vec{};
      if (!All) odd = visible_odd(c) ? odd : Vec{};
      Vec d_even = even * (load(ds + c) - delta[0]), d_odd = odd * (load(ds + kBlock + c) - delta[1]);
      if (!both) odd = d_odd = Vec{};
      keep(p + c, even, odd, T{});
      keep(ds + c, d_even, d_odd, T{});
      if constexpr (kPerWord<T> > 1) {
        store(ds_rows + c, d_even);
        store(ds_rows + kBlock + c, d_odd);
      }
    }
  }

  INLINE_MEMBER int64_t head(int64_t g) const { return kv_head_ * lay_.group + g; }
  INLINE_MEMBER int64_t slot(int64_t i, int64_t g) const { return (i - begin_) * lay_.group + g; }

  const Layout<T>& lay_;
  const TreeBackward<T>& args_;
  const Chunks& chunks_;
  const Keys<T>& keys_;
  const int64_t size_, tile_;
  const Scratch<Word<T>> q_, d_out_;
  const Scratch<float> dq_, delta_, lse_, p_, ds_;
  const Scratch<T> ds_rows_;         // dS once more, as words along the columns, the depth of dQ; unused if T is float
  int64_t kv_head_ = 0, begin_ = 0;  // of the tile
  float *dk_ = nullptr, *dv_ = nullptr;
};

// [N, Hkv, D] from the result and the spills of each key block.
template <class T>
INLINE void unpack_keys(const Layout<T>& lay, const Chunks& chunks, const Keys<T>& keys, T* to, float* sums,
                        const float* spills, float factor) {
  const int64_t size = kBlock * lay.padded;
#pragma omp for collapse(2) nowait
  for (int64_t h = 0; h < lay.shape.num_kv_heads; ++h)
    for (int64_t j = 0; j < lay.blocks.count; ++j) {
      float* sum = sums + h * keys.head_size + j * size;
      for (int64_t s = chunks.spill[j]; s < chunks.spill[j + 1]; ++s) {
        const float* spill = spills + h * keys.head_spill + s * size;
        for (int64_t d = 0; d < size; d += kWidth) store(sum + d, load(sum + d) + load(spill + d));
      }
      for (int64_t t = 0; t < lay.blocks[j].size; ++t)
        lay.unpack_row(to, sum + t * lay.padded, lay.shape.num_kv_heads, h, j, t, factor);
    }
}

template <class T>
INLINE void backward(const TreeShape& shape, const TreeBackward<T>& p) {
  if (shape.num_tokens == 0) return;
  const Layout<T> lay(shape, p.end);
  const Chunks chunks(lay);
  const Keys<T> keys(lay, chunks);
#pragma omp parallel if (lay.parallel)
  {
    keys.pack(lay, p);
    [[maybe_unused]] const RegistersFor<T> registers;
    Worker<T> worker(lay, p, chunks, keys);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t chunk = chunks.count - 1; chunk >= 0; --chunk)
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) worker.run(chunk, h);
    unpack_keys(lay, chunks, keys, p.dk, keys.dk, keys.dk_spill, shape.scale);
    unpack_keys(lay, chunks, keys, p.dv, keys.dv, keys.dv_spill, 1.0f);
  }
}

}  // namespace

void tree_backward(const TreeShape& shape, const TreeBackward<float>& p) { backward(shape, p); }
void tree_backward_bf16(const TreeShape& shape, const TreeBackward<bf16>& p) { backward(shape, p); }

}  // namespace ibtpo::IBTPO_ISA
