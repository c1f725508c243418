// Attention of B queries, each against its own path of a paged cache.
//
//   out_b = sum_j softmax_j(scale q_b k_j) v_j   over slots j < lengths[b] of path rows[b].
//
// A task is a block of neighbouring queries and a range of key/value heads. Head after head, it walks the plan's items;
// a page that several of its queries share is read and its keys are transposed once for all of them. On AVX2 a query's
// own pages are read all heads at once instead. Each query's state (m, l, acc) is updated page by page in depth order:
// its sums never depend on which other queries share the page.
//
// In bf16 both products take bf16 numbers (tile.h), for which the weights p are rounded; scores, state and sums are
// float.
#include <type_traits>

#include "kernels.h"
#include "threads.h"
#include "tile.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kRows = 64;       // query rows (queries x group) of a task, at most
constexpr int64_t kUsualPage = 16;  // slots of a page, nearly always
constexpr int64_t kPages = 4;       // pages whose scores are computed together
constexpr int64_t kFewRows = 4;     // up to so many rows add values, and prefetch the next ones, a page at a time
constexpr float kMinimum = -1e30f;  // "no maximum yet": finite, so that -inf - m stays -inf

// A maximum that grows by less than this is kept: weights up to e^8 are harmless, rescaling is not free.
constexpr float kSlack = 8.0f;

struct Item {
  int32_t query_begin, query_end, page_begin, page_end;
};

// Neighbouring queries [begin, end) on the same pages, from table column `column` on.
template <class T>
struct Run {
  int64_t begin, end, column, longest;  // longest: the greatest length among them
  const T* values[kPages];              // this head's first value in each page
};

// What is read next: a head's keys and values in a query's pages from a table column on.
struct Ahead {
  int64_t query, column, head;
};

template <class T>
class Task {
  using Step = Word<T>;
  static constexpr int64_t kStep = kPerWord<T>;
  static constexpr bool kPairs = kStep == 2;

 public:
  INLINE_MEMBER Task(const Decode<T>& p, int64_t head_begin, int64_t head_end, int64_t begin, int64_t end)
      : p_(p),
        head_begin_(head_begin),
        head_end_(head_end),
        begin_(begin),
        end_(end),
        group_(p.num_heads / p.num_kv_heads),
        padded_(round_up(p.head_dim, kWidth)),
        page_(round_up(p.page_size, kWidth)),
        rows_((end - begin) * group_),
        states_((head_end - head_begin) * rows_),
        q_(states_ * padded_),
        acc_(states_ * padded_),
        max_(states_),
        sum_(states_),
        keys_(padded_ * kPages * page_),
        values_(kPages * p.page_size * padded_ / kStep),
        scores_(most(rows_ * kPages, states_) * page_),
        weights_(kPairs ? most(rows_ * kPages, states_) * page_ : 0) {}

  // Returns -1, or the first query found whose page is missing.
  INLINE_MEMBER int64_t run() {
    [[maybe_unused]] const RegistersFor<T> registers(most_rows());
    start();
    const Item* items = reinterpret_cast<const Item*>(p_.items);
    for (int64_t i = 0; i < p_.num_items; ++i) {
      const Item& item = items[i];
      if (item.query_end <= begin_ || item.query_begin >= end_) continue;
      const Item& next = items[least(i + 1, p_.num_items - 1)];
      const int64_t begin = most(begin_, item.query_begin), end = least(end_, item.query_end);
      const int64_t failed =
          walk(begin, end, item.page_begin, item.page_end, Ahead{next.query_begin, next.page_begin, head_begin_});
      if (failed >= 0) return failed;
    }
    finish();
    return -1;
  }

 private:
  // Rows of the largest product.
  INLINE_MEMBER int64_t most_rows() const {
    const Item* items = reinterpret_cast<const Item*>(p_.items);
    int64_t queries = 1;
    for (int64_t i = 0; i < p_.num_items; ++i)
      queries = most(queries, least(end_, items[i].query_end) - most(begin_, items[i].query_begin));
    return queries * group_;
  }

  INLINE_MEMBER void start() {
    for (int64_t r = 0; r < states_; ++r) {
      if constexpr (kPairs)
        std::memcpy(q_ + r * padded_, query(r), sizeof(T) * p_.head_dim);
      else
        pack_rows(q_ + r * padded_, padded_, query(r), p_.head_dim, 1, 1, p_.head_dim, p_.scale);
      max_[r] = kMinimum;
      sum_[r] = Vec{};
    }
    std::memset(acc_, 0, sizeof(float) * states_ * padded_);
  }

  INLINE_MEMBER void finish() {
    for (int64_t r = 0; r < states_; ++r) {
      const float sum = reduce_add(sum_[r]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      T* out = p_.out + (query(r) - p_.q);
      const float* acc = acc_ + r * padded_;
      for_each(
          p_.head_dim, [&](int64_t d) { store(out + d, load(acc + d) * inverse); },
          [&](int64_t d) { put(out + d, acc[d] * inverse); });
    }
  }

  // The query of state r; states are ordered by key/value head, query, and head within the group.
  INLINE_MEMBER const T* query(int64_t r) const {
    const int64_t kv_head = head_begin_ + r / rows_, b = begin_ + r % rows_ / group_;
    return p_.q + (b * p_.num_heads + kv_head * group_ + r % group_) * p_.head_dim;
  }

  // The first state of query b under the current head.
  INLINE_MEMBER int64_t state(int64_t b) const { return (head_ - head_begin_) * rows_ + (b - begin_) * group_; }

  // How many slots of table column `column` query b sees.
  INLINE_MEMBER int64_t visible(int64_t b, int64_t column) const {
    return most(0, least(p_.page_size, p_.lengths[b] - column * p_.page_size));
  }

  // Pages [page_begin, page_end) for queries [begin, end), in runs of queries that are long enough to see them. `next`:
  // the pages after these, to be prefetched.
  INLINE_MEMBER int64_t walk(int64_t begin, int64_t end, int64_t page_begin, int64_t page_end, Ahead next) {
    for (int64_t column = page_begin; column < page_end; column += kPages) {
      const int64_t count = least(kPages, page_end - column);
      const bool more = column + count < page_end && visible(begin, column + count) > 0;
      bool any = false;
      for (int64_t b = begin; b < end;) {
        if (visible(b, column) == 0) {
          ++b;
          continue;
        }
        int64_t stop = b + 1;
        while (stop < end && visible(stop, column) > 0) ++stop;
        if (stop == b + 1 && goes_alone()) {
          const int64_t failed = attend_alone(b, column, column + count, more ? Ahead{b, column + count, 0} : next);
          if (failed >= 0) return failed;
          any = true;
          b = stop;
          continue;
        }
        for (head_ = head_begin_; head_ < head_end_; ++head_) {
          Ahead ahead = more ? Ahead{begin, column + count, head_begin_} : next;
          if (head_ + 1 < head_end_) ahead = {b, column, head_ + 1};
          const int64_t failed = attend(b, stop, column, count, ahead);
          if (failed >= 0) return failed;
        }
        head_ = head_begin_;
        any = true;
        b = stop;
      }
      if (!any) break;
    }
    return -1;
  }

  // Queries [begin, end), all of which see the first of pages [column, column + count).
  INLINE_MEMBER int64_t attend(int64_t begin, int64_t end, int64_t column, int64_t count, Ahead ahead) {
    const int64_t kv_stride = p_.num_kv_heads * p_.head_dim, ld = kPages * page_;
    Run<T> run{begin, end, column, 0, {}};
    for (int64_t b = begin; b < end; ++b) run.longest = most(run.longest, p_.lengths[b]);
    count = least(count, (run.longest - column * p_.page_size + p_.page_size - 1) / p_.page_size);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = page_begin(begin, column + c, head_);
      if (first < 0) return begin;
      pack_words_transposed(keys_ + c * page_, ld, p_.k_pages + first, kv_stride, p_.page_size, p_.head_dim);
      run.values[c] = p_.v_pages + first;
      prefetch(run.values[c], p_.page_size);
      foresee(ahead, c, p_.k_pages);
    }
    const Step* q = reinterpret_cast<const Step*>(q_ + state(begin) * padded_);
    const int64_t rows = (end - begin) * group_;
    product<Into::kStore>(scores_, ld, rows, count * page_, {q, padded_ / kStep, 1}, (const Step*)keys_, ld,
                          (p_.head_dim + kStep - 1) / kStep);
    const bool few = rows <= kFewRows;
    int64_t taken = 0;  // of this run's pages, acc holds [0, taken)
    for (int64_t c = 0; c < count; ++c) {
      taken = page_ == kUsualPage ? weigh<kUsualPage / kWidth>(run, taken, c) : weigh<0>(run, taken, c);
      if (!few) foresee(ahead, c, p_.v_pages);
    }
    if (!few) accumulate(run, taken, count);
    for (int64_t c = 0; few && c < count; ++c) {
      if (c >= taken) accumulate(run, c, c + 1);
      foresee(ahead, c, p_.v_pages);
    }
    for (int64_t c = count; c < kPages; ++c) foresee(ahead, c, p_.k_pages), foresee(ahead, c, p_.v_pages);
    return -1;
  }

  // Whether a query that shares a page with no other takes `attend_alone`. On AVX-512 it was not measured; AMX would
  // sum pairs in another order.
  INLINE_MEMBER bool goes_alone() const {
    return kWidth == 8 && (group_ == 1 || group_ == 2 || group_ == 4) && padded_ == p_.head_dim;
  }

  // Query b in pages [column, end), which it shares with no other: all heads of a few slots before the next slots, so
  // that memory is read in order. The sums are those of `attend`, to the bit.
  INLINE_MEMBER int64_t attend_alone(int64_t b, int64_t column, int64_t end, Ahead ahead) {
    for (; column < end && visible(b, column) > 0; ++column) {
      const int64_t first = page_begin(b, column, head_begin_), seen = visible(b, column);
      if (first < 0) return b;
      const bool more = column + 1 < end && visible(b, column + 1) > 0;
      const Ahead then = more ? Ahead{b, column + 1, 0} : ahead;
      const int64_t next = visible(then.query, then.column) > 0 ? page_begin(then.query, then.column, head_begin_) : -1;
      const auto attend_page = [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        score_alone<kGroup>(b, first, seen);
        weigh_alone(b, seen);
        add_alone<kGroup>(b, first, next, seen);
      };
      if (group_ == 1)
        attend_page(std::integral_constant<int, 1>());
      else if (group_ == 2)
        attend_page(std::integral_constant<int, 2>());
      else
        attend_page(std::integral_constant<int, 4>());
    }
    return -1;
  }

  // Scores of a page, a row [page_] for each head: keys are transposed in registers and used at once. The page's values
  // are prefetched.
  template <int Group>
  INLINE_MEMBER void score_alone(int64_t b, int64_t first, int64_t seen) {
    const int64_t heads = head_end_ - head_begin_, own = (b - begin_) * group_;
    const int64_t words = p_.head_dim / kStep, kv_stride = p_.num_kv_heads * p_.head_dim;
    for (int64_t j = 0; j < seen; j += kWidth)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t slot = first + j * kv_stride + h * p_.head_dim;
        prefetch(p_.v_pages + slot, least(kWidth, p_.page_size - j));
        const Step* q = reinterpret_cast<const Step*>(q_ + (h * rows_ + own) * padded_);
        Vec score[Group] = {};
        for (int64_t d = 0; d < words; d += kWidth) {
          Vec square[kWidth];
          load_transposed(square, reinterpret_cast<const float*>(p_.k_pages + slot) + d, kv_stride / kStep,
                          p_.page_size - j, words - d);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kWidth; ++i) {
            if (d + i >= words) break;
#pragma GCC unroll 4
            for (int m = 0; m < Group; ++m)
              score[m] = mul_add(score[m], broadcast(q + m * words + d + i), as_factor(square[i], q));
          }
        }
        for (int m = 0; m < Group; ++m) store(scores_ + (h * Group + m) * page_ + j, score[m]);
      }
  }

  INLINE_MEMBER void weigh_alone(int64_t b, int64_t seen) {
    const int64_t heads = head_end_ - head_begin_, own = (b - begin_) * group_;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t m = 0; m < group_; ++m) {
        const int64_t at = (h * group_ + m) * page_;
        bf16* weights = kPairs ? weights_ + at : nullptr;
        if (page_ == kUsualPage)
          weigh_row<kUsualPage / kWidth>(scores_ + at, weights, seen, h * rows_ + own + m, [] {});
        else
          weigh_row<0>(scores_ + at, weights, seen, h * rows_ + own + m, [] {});
      }
  }

  // acc += weights * values of a page. The next page's keys are prefetched.
  template <int Group>
  INLINE_MEMBER void add_alone(int64_t b, int64_t first, int64_t next, int64_t seen) {
    constexpr int64_t kTogether = 4;  // slots
    const int64_t heads = head_end_ - head_begin_, own = (b - begin_) * group_;
    const int64_t kv_stride = p_.num_kv_heads * p_.head_dim;
    for (int64_t j = 0; j < seen; j += kTogether)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t slot = j * kv_stride + h * p_.head_dim;
        if (next >= 0) prefetch(p_.k_pages + next + slot, least(kTogether, p_.page_size - j));
        const int64_t at = h * Group * page_ + j;
        const auto add = [&](auto count) {
          add_slots<Group>(acc_ + (h * rows_ + own) * padded_, p_.v_pages + first + slot, at, count);
        };
        if (j + kTogether <= seen)
          add(std::integral_constant<int64_t, kTogether>());
        else
          add(seen - j);
      }
  }

  // The same for `count` slots of one head; `at`: where their weights begin.
  template <int Group, class Count>
  INLINE_MEMBER void add_slots(float* acc, const T* values, int64_t at, Count count) const {
    const int64_t kv_stride = p_.num_kv_heads * p_.head_dim;
    const Step* weights;
    if constexpr (kPairs)
      weights = reinterpret_cast<const Step*>(weights_ + at);
    else
      weights = scores_ + at;
    for (int64_t d = 0; d < padded_; d += kWidth) {
      Vec sum[Group];
#pragma GCC unroll 4
      for (int m = 0; m < Group; ++m) sum[m] = load(acc + m * padded_ + d);
      for (int64_t j = 0; j < count; j += kStep) {
        const T* value = values + j * kv_stride + d;
        const auto v = slots_factor(value, j + 1 < count ? value + kv_stride : nullptr);
#pragma GCC unroll 4
        for (int m = 0; m < Group; ++m) sum[m] = mul_add(sum[m], broadcast(weights + (m * page_ + j) / kStep), v);
      }
#pragma GCC unroll 4
      for (int m = 0; m < Group; ++m) store(acc + m * padded_ + d, sum[m]);
    }
  }

  INLINE_MEMBER static Vec as_factor(Vec x, const float*) { return x; }
  INLINE_MEMBER static Pairs as_factor(Vec x, const Pair*) { return to_pairs((IVec)x); }
  INLINE_MEMBER static Vec slots_factor(const float* value, const float*) { return load(value); }
  INLINE_MEMBER static Pairs slots_factor(const bf16* value, const bf16* next) {
    return to_pairs((IVec)(load_bits(value) | (next != nullptr ? load_bits(next) : UVec{}) << 16));
  }

  // Offset in floats of a head's first slot in the page of query b at a table column; -1 if there is no such page.
  INLINE_MEMBER int64_t page_begin(int64_t b, int64_t column, int64_t head) const {
    const int64_t page = p_.page_table[p_.rows[b] * p_.table_width + column];
    if (page < 0 || page >= p_.num_pages) return -1;
    return (page * p_.page_size * p_.num_kv_heads + head) * p_.head_dim;
  }

  // Prefetch into L2 what is read next, of the page `c` columns further: only this head's part, since the pages of all
  // heads would not fit, and little at a time, since a processor stalls when too many fetches are in flight.
  INLINE_MEMBER void foresee(const Ahead& ahead, int64_t c, const T* pages) const {
    const int64_t column = ahead.column + c, slots = visible(ahead.query, column);
    const int64_t first = slots > 0 ? page_begin(ahead.query, column, ahead.head) : -1;
    if (first < 0) return;
    prefetch(pages + first, slots);
  }

  // Into L2; into L1 is slower. A head's slots lie Hkv * D apart, a pattern that hardware does not prefetch.
  INLINE_MEMBER void prefetch(const T* slot, int64_t slots) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = 0; j < slots; ++j, slot += p_.num_kv_heads * p_.head_dim)
      for (int64_t d = 0; d < p_.head_dim; d += kLine) __builtin_prefetch(slot + d, 0, 2);
  }

  // Turns scores of the run's page c into weights exp(score - m). Before a row's m grows, acc takes in the pages before
  // c, weighted with the old m. Returns how many pages acc then holds. Vecs: vectors in a page, 0 if known only at run
  // time.
  template <int Vecs>
  INLINE_MEMBER int64_t weigh(const Run<T>& run, int64_t taken, int64_t c) {
    const int64_t ld = kPages * page_, group = group_;
    float* scores = scores_ + c * page_;
    int64_t row = state(run.begin);
    bf16* weights = kPairs ? weights_ + c * page_ : nullptr;
    for (int64_t b = run.begin; b < run.end; ++b) {
      const int64_t seen = visible(b, run.column + c);
      for (int64_t g = 0; g < group; ++g, scores += ld, weights += kPairs ? ld : 0)
        weigh_row<Vecs>(scores, weights, seen, row++, [&] {
          accumulate(run, taken, c);
          taken = c;
        });
    }
    return taken;
  }

  // The same for one row, of which `seen` scores count; `catch_up` is called before its m grows.
  template <int Vecs, class CatchUp>
  INLINE_MEMBER void weigh_row(float* scores, bf16* weights, int64_t seen, int64_t state, const CatchUp& catch_up) {
    const int64_t width = Vecs > 0 ? Vecs * kWidth : page_;
    if constexpr (kPairs)
      for (int64_t j = 0; j < width; j += kWidth) store(scores + j, load(scores + j) * p_.scale);
    if (seen < width)
      for (int64_t j = 0; j < width; j += kWidth)
        store(scores + j, iota() + (int32_t)j < (int32_t)seen ? load(scores + j) : splat(-__builtin_inff()));
    Vec highest = load(scores);
    for (int64_t j = kWidth; j < width; j += kWidth) highest = max(highest, load(scores + j));
    const float page_max = reduce_max(highest);
    if (__builtin_expect(page_max > max_[state] + kSlack, 0)) {
      catch_up();
      const float factor = exp(max_[state] - page_max);
      scale_row(acc_ + state * padded_, padded_, factor);
      sum_[state] *= factor;
      max_[state] = page_max;
    }
    const float m = max_[state];
    Vec sum = sum_[state];
    for (int64_t j = 0; j < width; j += kWidth) {
      const Vec weight = exp(load(scores + j) - m);
      sum += weight;
      if constexpr (kPairs)
        store(weights + j, weight);
      else
        store(scores + j, weight);
    }
    sum_[state] = sum;
  }

  // acc += weights * values over pages [from, to) of the run. Slots beyond every query's length are never read: they
  // may hold NaN. The sum has the same bits wherever it is cut (Into::kChain).
  INLINE_MEMBER void accumulate(const Run<T>& run, int64_t from, int64_t to) {
    const int64_t together = page_ == p_.page_size ? to - from : 1;  // pages whose weights lie next to each other
    const int64_t rows = (run.end - run.begin) * group_, ld = kPages * page_;
    float* acc = acc_ + state(run.begin) * padded_;
    for (int64_t c = from; c < to; c += together) {
      const int64_t depth = least(together * p_.page_size, run.longest - (run.column + c) * p_.page_size);
      const Step* parts[kPages];
      const int64_t ld_values = gather(run, c, together, depth, parts);
      const void* weights = kPairs ? (const void*)(weights_ + c * page_) : scores_ + c * page_;
      product<Into::kChain>(acc, padded_, rows, padded_,
                            StridedOf<Step>{static_cast<const Step*>(weights), ld / kStep, 1},
                            PartsOf<Step>{parts, ld_values, p_.page_size / kStep}, (depth + kStep - 1) / kStep);
    }
  }

  // Where the values of `count` pages of the run begin, of which `depth` slots are used; returns the stride of a step.
  // They are read in place, except for bf16 and head sizes that are no whole number of vectors, which are copied.
  INLINE_MEMBER int64_t gather(const Run<T>& run, int64_t c, int64_t count, int64_t depth, const Step** parts) const {
    const int64_t kv_stride = p_.num_kv_heads * p_.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slots = least(p_.page_size, depth - i * p_.page_size);
      Step* copy = values_ + i * p_.page_size / kStep * padded_;
      parts[i] = copy;
      if constexpr (kPairs)
        pack_pairs(copy, padded_, run.values[c + i], kv_stride, slots, p_.head_dim);
      else if (padded_ != p_.head_dim)
        pack_rows(copy, padded_, run.values[c + i], kv_stride, slots, slots, p_.head_dim, 1.0f);
      else
        parts[i] = run.values[c + i];
    }
    return kPairs || padded_ != p_.head_dim ? padded_ : kv_stride;
  }

  const Decode<T>& p_;
  const int64_t head_begin_, head_end_, begin_, end_, group_, padded_, page_, rows_, states_;
  int64_t head_ = head_begin_;  // the key/value head being worked on
  const Scratch<T> q_;          // of float: scaled
  const Scratch<float> acc_, max_;
  const Scratch<Vec> sum_;
  const Scratch<Step> keys_, values_;
  const Scratch<float> scores_;  // if T is float, overwritten by the weights
  const Scratch<bf16> weights_;  // if T is bf16
};

template <class T>
static int64_t decode(const Decode<T>& p) {
  int64_t visible = 0, unique = 0;  // (query, slot) pairs; the same with shared slots counted once
  for (int64_t b = 0; b < p.num_queries; ++b) {
    if (p.rows[b] < 0 || p.rows[b] >= p.num_rows || p.lengths[b] > p.table_width * p.page_size) return b;
    visible += most(0, p.lengths[b]);
  }
  for (int64_t i = 0; i < p.num_items; ++i) {
    const Item& item = reinterpret_cast<const Item*>(p.items)[i];
    if (item.query_begin < 0 || item.query_end > p.num_queries || item.page_begin < 0 ||
        item.page_end > p.table_width || item.query_begin >= item.query_end)
      return p.num_queries + i;
    unique += most(0, least(p.lengths[item.query_begin], item.page_end * p.page_size) - item.page_begin * p.page_size);
  }
  // Where little is shared, cut by queries, so that a page is read whole, all heads at once; else keep queries that
  // share together and cut by heads. The result has the same bits either way.
  const int64_t group = p.num_heads / p.num_kv_heads, sharing = visible / most(1, unique);
  const int64_t block = most(1, least(kRows / group, 4 * most(1, sharing)));
  const int64_t blocks = (p.num_queries + block - 1) / block;
  const int64_t parts = least(p.num_kv_heads, (2 * max_threads() + blocks - 1) / most(1, blocks));
  const bool parallel = visible * p.num_heads * p.head_dim > 1 << 19;  // below, starting threads costs more
  int64_t failed = -1;
  spread(blocks * parts, parallel, [&](int64_t i) __attribute__((noinline)) {
    const int64_t block_begin = i / parts * block, part = i % parts;
    const int64_t head = part * p.num_kv_heads / parts, stop = (part + 1) * p.num_kv_heads / parts;
    const int64_t result = Task<T>(p, head, stop, block_begin, least(p.num_queries, block_begin + block)).run();
    if (result >= 0) __atomic_store_n(&failed, result, __ATOMIC_RELAXED);
  });
  return failed;
}

}  // namespace

int64_t tree_decode(const Decode<float>& p) { return decode(p); }
int64_t tree_decode_bf16(const Decode<bf16>& p) { return decode(p); }

}  // namespace ibtpo::IBTPO_ISA
