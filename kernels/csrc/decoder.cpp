// A whole decoder in one call: rows of a page pool in, hidden states or sampled tokens out.
//
//   x = embedding[token];   x += o(attend(rope(norm_h(q n)), rope(norm_h(k n)), v n)),   n = norm(x)
//                           x += down(silu(gate n) * up n),                              n = norm(x)
//
// The kernels are those that Python calls one by one; this saves the calls, most of the time of a small model's step.
// The rows are cut into parts, which threads take one by one (team.h): through all layers if rows do not see each
// other, else from writing one layer's keys up to writing the next one's. Within a part, kernels start no threads: a
// product of some microseconds is not worth one; only attention over rows too few to split may. Every kernel gives a
// row the same bits in any batch, so a result depends neither on threads nor on other rows.
#include "kernels.h"
#include "simd.h"
#include "team.h"
#include "threads.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kThreadWork = 1 << 20;  // operations a thread should have
constexpr int64_t kThreadRows = 4;        // rows it should have at least: each thread reads every weight
constexpr int64_t kThreadParts = 4;       // most parts a thread, if rows do not see each other
constexpr int64_t kPartRows = 16;         // a thread has several parts only if each has this many rows
constexpr int64_t kCachedRows = 64;       // rows of a part if rows see each other: its activations fit a cache

struct Item {
  int32_t query_begin, query_end, page_begin, page_end;
};

// Rows [begin, end), which one thread runs; only `x` and `q` are kept from one layer to the next.
class Part {
 public:
  INLINE_MEMBER Part(const Decoder& d, const DecoderRows& r, float* q, int64_t begin, int64_t end,
                     int64_t attention_threads)
      : d_(d),
        r_(r),
        attention_threads_(attention_threads),
        begin_(begin),
        count_(end - begin),
        q_size_(d.num_heads * d.head_dim),
        kv_size_(d.num_kv_heads * d.head_dim),
        x_(r.out + begin * d.hidden),
        q_(q + begin * q_size_),
        normed_(count_ * d.hidden),
        qkv_(count_ * (q_size_ + 2 * kv_size_)),
        attended_(count_ * q_size_),
        gate_(count_ * d.inner),
        up_(count_ * d.inner),
        cos_(count_ * d.head_dim / 2),
        sin_(count_ * d.head_dim / 2),
        items_(r.num_items) {
    const int64_t half = d.head_dim / 2;
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t pos = r.pos[begin + t];
      std::memcpy(cos_ + t * half, d.cos + pos * half, sizeof(float) * half);
      std::memcpy(sin_ + t * half, d.sin + pos * half, sizeof(float) * half);
    }
    for (int64_t i = 0; i < r.num_items; ++i) {
      const Item& item = reinterpret_cast<const Item*>(r.items)[i];
      if (item.query_end <= begin || item.query_begin >= end) continue;
      items_[num_items_++] = {(int32_t)(most(item.query_begin, begin) - begin),
                              (int32_t)(least(item.query_end, end) - begin), item.page_begin, item.page_end};
    }
  }

  // Runs up to the attention of layer l in [0, num_layers]: attention and MLP of layer l - 1, then l's queries, keys
  // and values, which are written to the pages. Returns -1, or a row whose page is missing.
  INLINE_MEMBER int64_t advance(int64_t l) {
    int64_t failed = -1;
    if (l == 0)
      embed();
    else
      failed = rest(d_.layers[l - 1], l - 1);
    if (l < d_.num_layers)
      project(d_.layers[l], l);
    else
      norm(x_, d_.norm, x_);
    return failed;
  }

  INLINE_MEMBER void logits(float* out) const {
    product(x_, d_.hidden, d_.head, nullptr, out, d_.vocabulary, d_.vocabulary, false);
  }

 private:
  INLINE_MEMBER void embed() {
    for (int64_t t = 0; t < count_; ++t)
      std::memcpy(x_ + t * d_.hidden, d_.embedding + r_.tokens[begin_ + t] * d_.hidden, sizeof(float) * d_.hidden);
  }

  INLINE_MEMBER float* pages(float* all, int64_t layer) const {
    return all + layer * r_.num_pages * r_.page_size * kv_size_;
  }

  INLINE_MEMBER void project(const DecoderLayer& w, int64_t layer) {
    const int64_t row = q_size_ + 2 * kv_size_;
    float *q = qkv_, *k = q + q_size_, *v = k + kv_size_;
    norm(x_, w.attention_norm, normed_);
    product(normed_, d_.hidden, w.q, w.q_bias, q, q_size_, row, false);
    product(normed_, d_.hidden, w.k, w.k_bias, k, kv_size_, row, false);
    product(normed_, d_.hidden, w.v, w.v_bias, v, kv_size_, row, false);
    kernels.f32.rope_append({q,
                             k,
                             v,
                             cos_,
                             sin_,
                             w.q_norm,
                             w.k_norm,
                             q_,
                             pages(r_.k_pages, layer),
                             pages(r_.v_pages, layer),
                             r_.slots + begin_,
                             count_,
                             d_.num_heads,
                             d_.num_kv_heads,
                             d_.head_dim,
                             row,
                             row,
                             row,
                             r_.num_pages * r_.page_size,
                             *d_.eps});
  }

  INLINE_MEMBER int64_t rest(const DecoderLayer& w, int64_t layer) {
    const auto scale = (float)(1.0 / __builtin_sqrt((double)d_.head_dim));  // the same bits as Python's
    set_threads(attention_threads_);
    const int64_t failed = kernels.tree_decode(
        {q_, pages(r_.k_pages, layer), pages(r_.v_pages, layer), r_.page_table, r_.rows + begin_, r_.lengths + begin_,
         reinterpret_cast<const int32_t*>(static_cast<Item*>(items_)), attended_, count_, d_.num_heads, d_.num_kv_heads,
         d_.head_dim, r_.num_pages, r_.page_size, r_.table_rows, r_.table_width, num_items_, scale});
    set_threads(1);
    product(attended_, q_size_, w.o, w.o_bias, x_, d_.hidden, d_.hidden, true);
    mlp(w);
    return failed < 0 ? -1 : begin_ + failed;
  }

  INLINE_MEMBER void mlp(const DecoderLayer& w) {
    norm(x_, w.mlp_norm, normed_);
    product(normed_, d_.hidden, w.gate, w.gate_bias, gate_, d_.inner, d_.inner, false);
    product(normed_, d_.hidden, w.up, w.up_bias, up_, d_.inner, d_.inner, false);
    kernels.f32.silu_mul(gate_, up_, gate_, count_, d_.inner, d_.inner, d_.inner);
    product(gate_, d_.inner, w.down, w.down_bias, x_, d_.hidden, d_.hidden, true);
  }

  INLINE_MEMBER void norm(const float* x, const float* weight, float* out) const {
    kernels.f32.rms_norm(x, weight, out, count_, d_.hidden, *d_.eps);
  }

  INLINE_MEMBER void product(const float* x, int64_t depth, const float* weight, const float* bias, float* out,
                             int64_t num_cols, int64_t out_stride, bool add) const {
    kernels.linear({x, weight, bias, out, count_, num_cols, depth, depth, out_stride, add, true});
  }

  const Decoder& d_;
  const DecoderRows& r_;
  const int64_t attention_threads_;
  const int64_t begin_, count_, q_size_, kv_size_;
  float *const x_, *const q_;
  const Scratch<float> normed_, qkv_, attended_, gate_, up_, cos_, sin_;
  const Scratch<Item> items_;
  int64_t num_items_ = 0;
};

// The first row that must not be run; -1 if there is none.
INLINE int64_t first_bad(const Decoder& d, const DecoderRows& r) {
  for (int64_t t = 0; t < r.num_rows; ++t)
    if (r.tokens[t] < 0 || r.tokens[t] >= d.vocabulary || r.pos[t] < 0 || r.pos[t] >= d.num_positions ||
        r.slots[t] < -1 || r.slots[t] >= r.num_pages * r.page_size)
      return t;
  return -1;
}

INLINE int64_t threads_for(const Decoder& d, int64_t num_rows, int64_t available) {
  const int64_t q_size = d.num_heads * d.head_dim, kv_size = d.num_kv_heads * d.head_dim;
  const int64_t layer = d.hidden * (2 * q_size + 2 * kv_size + 3 * d.inner);
  const int64_t work = 2 * num_rows * (d.num_layers * layer + d.hidden * d.vocabulary);
  return most(1, least(available, least(work / kThreadWork, num_rows / kThreadRows)));
}

// Calls run(begin, end) once for each part of the rows; `failed` becomes what one of them returned, or stays -1.
template <class Run>
struct Shared {
  const Run& run;
  int64_t num_rows, parts, failed;

  INLINE_MEMBER void operator()(int64_t i) {
    const int64_t result = run(i * num_rows / parts, (i + 1) * num_rows / parts);
    if (result >= 0) __atomic_store_n(&failed, result, __ATOMIC_RELAXED);
  }
};

template <class Run>
INLINE int64_t share_rows(int64_t num_rows, int64_t parts, int64_t threads, const Run& run) {
  const int64_t available = max_threads();
  Shared<Run> shared{run, num_rows, parts, -1};
  const auto call = [](void* context, int64_t part) {
    set_threads(1);  // within a part kernels start no threads
    (*static_cast<Shared<Run>*>(context))(part);
  };
  share_out(parts, threads, call, &shared);
  set_threads(available);
  return shared.failed;
}

// Rows that may see each other's keys: no part attends in a layer before all parts have written its keys.
INLINE int64_t run_together(const Decoder& d, const DecoderRows& r) {
  const int64_t available = max_threads(), threads = threads_for(d, r.num_rows, available);
  const int64_t parts = most(threads, (r.num_rows + kCachedRows - 1) / kCachedRows);
  const Scratch<float> q(r.num_rows * d.num_heads * d.head_dim);
  int64_t failed = -1;
  for (int64_t l = 0; l <= d.num_layers && failed < 0; ++l)
    failed = share_rows(r.num_rows, parts, threads, [&](int64_t begin, int64_t end) {
      return Part(d, r, q, begin, end, threads == 1 ? available : 1).advance(l);
    });
  return failed;
}

// Rows that do not see each other: each part runs through all layers. then(part, begin, end) is called when its hidden
// states are done, and returns -1 or the error.
template <class Then>
INLINE int64_t run_apart(const Decoder& d, const DecoderRows& r, const Then& then) {
  const int64_t available = max_threads(), threads = threads_for(d, r.num_rows, available);
  const int64_t each = threads == 1 ? 1 : least(kThreadParts, most(1, r.num_rows / (threads * kPartRows)));
  const Scratch<float> q(r.num_rows * d.num_heads * d.head_dim);
  return share_rows(r.num_rows, threads * each, threads, [&](int64_t begin, int64_t end) {
    Part part(d, r, q, begin, end, threads == 1 ? available : 1);
    int64_t failed = -1;
    for (int64_t l = 0; l <= d.num_layers && failed < 0; ++l) failed = part.advance(l);
    return failed < 0 ? then(part, begin, end) : failed;
  });
}

// The last token of each chosen branch as a row, with what sampling the next one needs.
struct Chosen {
  INLINE_MEMBER Chosen(const DecoderRows& r, const Branches& b, const int64_t* chosen)
      : tokens(r.num_rows), pos(r.num_rows), slots(r.num_rows), rows(r.num_rows), lengths(r.num_rows) {
    for (int64_t t = 0; t < r.num_rows; ++t) {
      const int64_t s = chosen[t], at = b.length[s] - 1;
      const int64_t page = at < r.table_width * r.page_size ? r.page_table[s * r.table_width + at / r.page_size] : -1;
      const bool begins = at < b.start[s];  // nothing sampled yet: rerun the token before, whose key is there
      tokens[t] = begins ? b.before[s] : b.tokens[s * b.width + at - b.start[s]];
      pos[t] = at;
      slots[t] = page < 0 ? -2 : begins ? -1 : page * r.page_size + at % r.page_size;
      rows[t] = (int32_t)s;
      lengths[t] = (int32_t)at + 1;
    }
  }
  const Scratch<int64_t> tokens, pos, slots;
  const Scratch<int32_t> rows, lengths;
};

// What was drawn for each row.
struct Drawn {
  INLINE_MEMBER Drawn(const Branches& b, const int64_t* chosen, int64_t num_rows)
      : keys(2 * num_rows),
        top_k(num_rows),
        token(num_rows),
        temperature(num_rows),
        top_p(num_rows),
        min_p(num_rows),
        logprob(num_rows),
        logprob_raw(num_rows),
        entropy(num_rows) {
    for (int64_t t = 0; t < num_rows; ++t) {
      const int64_t s = chosen[t];
      keys[2 * t] = b.stream[s];
      keys[2 * t + 1] = b.length[s];
      temperature[t] = b.temperature[s];
      top_p[t] = b.top_p[s];
      min_p[t] = b.min_p[s];
      top_k[t] = b.top_k[s];
    }
  }

  // Rows [begin, end) from their logits; returns -1 or the first row that has no distribution.
  INLINE_MEMBER int64_t sample(const float* logits, int64_t begin, int64_t end, int64_t vocabulary) const {
    Sample s{};
    s.logits = logits;
    s.keys = keys + 2 * begin;
    s.temperature = temperature + begin;
    s.top_p = top_p + begin;
    s.min_p = min_p + begin;
    s.top_k = top_k + begin;
    s.token = token + begin;
    s.logprob = logprob + begin;
    s.logprob_raw = logprob_raw + begin;
    s.entropy = entropy + begin;
    s.num_rows = end - begin;
    s.vocabulary = vocabulary;
    const int64_t failed = kernels.sample(s);
    return failed < 0 ? -1 : begin + failed;
  }

  const Scratch<int64_t> keys, top_k, token;
  const Scratch<double> temperature, top_p, min_p;
  const Scratch<float> logprob, logprob_raw, entropy;
};

// Appends row t's token to branch s; returns the branch's code.
INLINE int64_t record(const Branches& b, const DecoderRows& r, const Drawn& drawn, int64_t t, int64_t s) {
  const int64_t at = s * b.width + b.length[s] - b.start[s], token = drawn.token[t];
  b.tokens[at] = (int32_t)token;
  b.logprob[at] = drawn.logprob[t];
  b.logprob_raw[at] = drawn.logprob_raw[t];
  b.entropy[at] = drawn.entropy[t];
  const int64_t last = b.length[s]++;
  for (int64_t i = 0; i < b.num_stops; ++i)
    if (b.stops[s * b.num_stops + i] == token) return 1;
  if (b.length[s] >= b.limit[s]) return 2;
  return r.page_table[s * r.table_width + last / r.page_size] < 0 ? kLacksPage : 0;
}

}  // namespace

int64_t decoder_forward(const Decoder& d, const DecoderRows& r) {
  const int64_t bad = first_bad(d, r);
  return bad >= 0 ? bad : run_together(d, r);
}

int64_t decoder_step(const Decoder& d, DecoderRows r, const Branches& b, const int64_t* chosen, int64_t* code) {
  const Chosen rows(r, b, chosen);
  const Drawn drawn(b, chosen, r.num_rows);
  const Scratch<float> hidden(r.num_rows * d.hidden), logits(r.num_rows * d.vocabulary);
  r.tokens = rows.tokens;
  r.pos = rows.pos;
  r.slots = rows.slots;
  r.rows = rows.rows;
  r.lengths = rows.lengths;
  r.out = hidden;
  int64_t failed = first_bad(d, r);
  if (failed >= 0) return failed;
  failed = run_apart(d, r, [&](const Part& part, int64_t begin, int64_t end) {
    float* z = logits + begin * d.vocabulary;
    part.logits(z);
    const int64_t bad = drawn.sample(z, begin, end, d.vocabulary);
    return bad < 0 ? -1 : r.num_rows + bad;
  });
  if (failed >= 0) return failed;
  for (int64_t t = 0; t < r.num_rows; ++t) code[t] = record(b, r, drawn, t, chosen[t]);
  return -1;
}

void decoder_announce(const Decoder& d, int64_t num_rows) {
  if (threads_for(d, num_rows, max_threads()) > 1) rouse();
}

}  // namespace ibtpo::IBTPO_ISA
