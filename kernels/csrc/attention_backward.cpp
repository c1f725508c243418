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
// Every sum has one order, whatever the number of threads, and nobody waits for anybody.
#include "tree_pack.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kTasks = 32;          // wanted when one tree is big: what many cores share evenly
constexpr int64_t kTaskWork = 1 << 12;  // block pairs x heads of a group x head size: no task needs to be smaller

// The chunks, and where the spills of each key block begin.
class Chunks {
 public:
  INLINE_MEMBER explicit Chunks(const Layout& lay)
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

// Head-major copies of keys and values, and of their gradients.
struct Keys {
  INLINE_MEMBER Keys(const Layout& lay, int64_t num_spills)
      : spill_size(num_spills * kBlock * lay.padded),
        k(lay.at(lay.shape.num_kv_heads, 0)),
        k_columns(lay.at(lay.shape.num_kv_heads, 0)),
        v_columns(lay.at(lay.shape.num_kv_heads, 0)),
        dk(lay.at(lay.shape.num_kv_heads, 0)),
        dv(lay.at(lay.shape.num_kv_heads, 0)),
        dk_spill(spill_size * lay.shape.num_kv_heads),
        dv_spill(spill_size * lay.shape.num_kv_heads) {}

  INLINE_MEMBER void pack(const Layout& lay, const TreeBackward& p) const {
    lay.pack(k, p.k, lay.shape.num_kv_heads);
    lay.pack_columns(k_columns, p.k, lay.shape.num_kv_heads);
    lay.pack_columns(v_columns, p.v, lay.shape.num_kv_heads);
  }

  const int64_t spill_size;  // of one head
  const Scratch<float> k, k_columns, v_columns, dk, dv, dk_spill, dv_spill;
};

// The tasks of one thread. The queries of a chunk are taken in tiles that fit into the L2 cache.
class Worker {
 public:
  INLINE_MEMBER Worker(const Layout& lay, const TreeBackward& p, const Chunks& chunks, const Keys& keys)
      : lay_(lay),
        args_(p),
        chunks_(chunks),
        keys_(keys),
        size_(kBlock * lay.padded),
        tile_(most(2, kTileSize / (lay.group * lay.padded))),
        q_(tile_ * lay.group * size_),
        d_out_(tile_ * lay.group * size_),
        dq_(tile_ * lay.group * size_),
        delta_(tile_ * lay.group * kBlock),
        lse_(tile_ * lay.group * kBlock),
        p_(kBlock * kBlock),
        ds_(kBlock * kBlock) {}

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
      for (int64_t i = most(j, begin_); i < least(end, blocks.seen_until(j)); ++i) add_pair(i, j);
    }
    for (int64_t i = begin_; i < end; ++i)
      for (int64_t g = 0; g < lay_.group; ++g) unpack_queries(i, g);
  }

  INLINE_MEMBER void pack_queries(int64_t i, int64_t g) {
    const int64_t h = kv_head_ * lay_.group + g, heads = lay_.shape.num_heads, dim = lay_.shape.head_dim;
    const int64_t from = lay_.token(heads, h, i), rows = lay_.blocks[i].size, row = slot(i, g) * kBlock;
    pack_rows(q_ + slot(i, g) * size_, lay_.padded, args_.q + from, heads * dim, rows, kBlock, dim, 1.0f);
    pack_rows(d_out_ + slot(i, g) * size_, lay_.padded, args_.d_out + from, heads * dim, rows, kBlock, dim, 1.0f);
    std::memset(dq_ + slot(i, g) * size_, 0, sizeof(float) * size_);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t at = from + t * heads * dim;
      delta_[row + t] = dot(args_.d_out + at, args_.out + at, dim);
      lse_[row + t] = args_.lse[h * lay_.shape.num_tokens + lay_.blocks[i].begin + t];
    }
  }

  INLINE_MEMBER void unpack_queries(int64_t i, int64_t g) {
    const float* from = dq_ + slot(i, g) * size_;
    for (int64_t t = 0; t < lay_.blocks[i].size; ++t)
      lay_.unpack_row(args_.dq, from + t * lay_.padded, lay_.shape.num_heads, kv_head_ * lay_.group + g, i, t,
                      lay_.shape.scale);
  }

  // dK and dV of key block j: the result if the chunk has its queries, else the chunk's spill.
  INLINE_MEMBER void choose_target(int64_t chunk, int64_t j) {
    const bool own = j >= chunks_.begin[chunk];
    const int64_t spill = kv_head_ * keys_.spill_size + (chunks_.spill[j] + chunk - chunks_.chunk_of[j] - 1) * size_;
    dk_ = own ? keys_.dk + lay_.at(kv_head_, j) : keys_.dk_spill + spill;
    dv_ = own ? keys_.dv + lay_.at(kv_head_, j) : keys_.dv_spill + spill;
    if (j < begin_ && begin_ > chunks_.begin[chunk]) return;  // an earlier tile has begun the sums
    std::memset(dk_, 0, sizeof(float) * size_);
    std::memset(dv_, 0, sizeof(float) * size_);
  }

  // Key block j against query block i of a group of heads: adds to dQ of i, and to dK and dV of j.
  INLINE_MEMBER void add_pair(int64_t i, int64_t j) {
    const Runs keys = lay_.blocks.key_runs(i, j), queries = lay_.blocks.query_runs(i, keys);
    const int64_t padded = lay_.padded, key = lay_.at(kv_head_, j);
    const bool all = lay_.blocks.sees_all(i, j);
    for (int64_t g = 0; g < lay_.group; ++g) {
      const float *q = q_ + slot(i, g) * size_, *d_out = d_out_ + slot(i, g) * size_;
      for (const Run& run : queries) {
        const int64_t rows = run.end - run.begin, cols = run.to - run.from, at = run.begin * kBlock + run.from;
        multiply<Into::kStore>(p_ + at, kBlock, rows, cols, {q + run.begin * padded, padded, 1},
                               keys_.k_columns + key + run.from, kBlock, padded);
        multiply<Into::kStore>(ds_ + at, kBlock, rows, cols, {d_out + run.begin * padded, padded, 1},
                               keys_.v_columns + key + run.from, kBlock, padded);
        for (int64_t r = run.begin; r < run.end; ++r)
          all ? weigh<true>(run, r, g, i, j) : weigh<false>(run, r, g, i, j);
        multiply<Into::kAdd>(dq_ + slot(i, g) * size_ + run.begin * padded, padded, rows, padded, {ds_ + at, kBlock, 1},
                             keys_.k + key + run.from * padded, padded, cols);
      }
      for (const Run& run : keys) {
        const int64_t rows = run.end - run.begin, depth = run.to - run.from, at = run.from * kBlock + run.begin;
        multiply<Into::kAdd>(dv_ + run.begin * padded, padded, rows, padded, {p_ + at, 1, kBlock},
                             d_out + run.from * padded, padded, depth);
        multiply<Into::kAdd>(dk_ + run.begin * padded, padded, rows, padded, {ds_ + at, 1, kBlock},
                             q + run.from * padded, padded, depth);
      }
    }
  }

  // Row r of both squares, columns [run.from, run.to): from q k and dO v to p and dS.
  template <bool All>
  INLINE_MEMBER void weigh(const Run& run, int64_t r, int64_t g, int64_t i, int64_t j) {
    const float lse = lse_[slot(i, g) * kBlock + r], delta = delta_[slot(i, g) * kBlock + r];
    const float scale = lay_.shape.scale;
    const int64_t from = run.from, to = run.to;  // local: a store might change a member, for all the compiler knows
    float *const p = p_ + r * kBlock, *const ds = ds_ + r * kBlock;
    const auto visible = lay_.blocks.visible_to(lay_.blocks[i].begin + r, j);
    for (int64_t c = from; c < to; c += kWidth) {
      Vec weight = exp(load(p + c) * scale - lse);
      if (!All) weight = visible(c) ? weight : Vec{};
      store(p + c, weight);
      store(ds + c, weight * (load(ds + c) - delta));
    }
  }

  INLINE_MEMBER int64_t slot(int64_t i, int64_t g) const { return (i - begin_) * lay_.group + g; }

  const Layout& lay_;
  const TreeBackward& args_;
  const Chunks& chunks_;
  const Keys& keys_;
  const int64_t size_, tile_;
  const Scratch<float> q_, d_out_, dq_, delta_, lse_, p_, ds_;
  int64_t kv_head_ = 0, begin_ = 0;  // of the tile
  float *dk_ = nullptr, *dv_ = nullptr;
};

// [N, Hkv, D] from the result and the spills of each key block.
INLINE void unpack_keys(const Layout& lay, const Chunks& chunks, float* to, float* own, const float* spills,
                        int64_t spill_size, float factor) {
  const int64_t size = kBlock * lay.padded;
#pragma omp for collapse(2) nowait
  for (int64_t h = 0; h < lay.shape.num_kv_heads; ++h)
    for (int64_t j = 0; j < lay.blocks.count; ++j) {
      float* sum = own + lay.at(h, j);
      for (int64_t s = chunks.spill[j]; s < chunks.spill[j + 1]; ++s) {
        const float* spill = spills + h * spill_size + s * size;
        for (int64_t d = 0; d < size; d += kWidth) store(sum + d, load(sum + d) + load(spill + d));
      }
      for (int64_t t = 0; t < lay.blocks[j].size; ++t)
        lay.unpack_row(to, sum + t * lay.padded, lay.shape.num_kv_heads, h, j, t, factor);
    }
}

}  // namespace

void tree_backward(const TreeShape& shape, const TreeBackward& p) {
  if (shape.num_tokens == 0) return;
  const Layout lay(shape, p.end);
  const Chunks chunks(lay);
  const Keys keys(lay, chunks.spill[lay.blocks.count]);
#pragma omp parallel if (lay.parallel)
  {
    keys.pack(lay, p);
    Worker worker(lay, p, chunks, keys);
#pragma omp barrier
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t chunk = chunks.count - 1; chunk >= 0; --chunk)
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) worker.run(chunk, h);
    unpack_keys(lay, chunks, p.dk, keys.dk, keys.dk_spill, keys.spill_size, shape.scale);
    unpack_keys(lay, chunks, p.dv, keys.dv, keys.dv_spill, keys.spill_size, 1.0f);
  }
}

}  // namespace ibtpo::IBTPO_ISA
