// One token a row: invert the cumulative distribution, in vocabulary order, at the row's own random number.
//
//   w_v = exp((z_v - max z) / temperature) for kept v, else 0;   token = min { t : sum_{v <= t} w_v > u sum_v w_v }
//
// with all sums in double, and the log-prob and entropy of the full softmax at temperature 1. If a token is given
// instead of drawn, its log-probs have the bits that they would have had it been drawn.
#include "kernels.h"
#include "parts.h"
#include "simd.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int kDoubles = kWidth / 2;
constexpr int64_t kChunk = 256;   // weights in one step of the cumulative sum
constexpr double kLowest = -1e4;  // stands in for -inf, whose product with its exp, 0, would be NaN
constexpr int64_t kParallelWork = 1 << 15;

typedef double DVec __attribute__((vector_size(8 * kDoubles)));
typedef int64_t LVec __attribute__((vector_size(8 * kDoubles)));

INLINE DVec dsplat(double x) { return x - DVec{}; }
INLINE DVec* vectors(double* x) { return reinterpret_cast<DVec*>(x); }

INLINE double reduce_add(DVec x) {
  double sum = 0.0;
  for (int i = 0; i < kDoubles; ++i) sum += x[i];
  return sum;
}

// e^x for x <= 0, to about 1 ulp: as `exp` of simd.h with the Taylor series to x^13.
INLINE DVec exp(DVec x) {
  constexpr double kMagic = 6755399441055744.0;
  const auto underflow = x < -708.0;
  x = underflow ? dsplat(-708.0) : x;
  const DVec t = x * 1.4426950408889634 + kMagic;
  const DVec n = t - kMagic;
  const DVec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  DVec y = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * (r * r) + r + 1.0;
  const DVec scaled = (DVec)((LVec)y + ((LVec)t << 52));
  return underflow ? DVec{} : scaled;
}

// A double in [0, 1) from Philox4x32-10 (Salmon et al., 2011): key = stream, counter = (position, 0).
INLINE double uniform(int64_t stream, int64_t position) {
  uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)stream, k1 = (uint32_t)(stream >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return ((double)(c0 >> 5) * 67108864.0 + (double)(c1 >> 6)) * (1.0 / 9007199254740992.0);
}

// The largest logit and its first index; the index is -1 if the row holds NaN or +inf, or only -inf.
struct Highest {
  float value;
  int64_t index;
};

INLINE Highest highest(const float* z, int64_t size) {
  const float inf = __builtin_inff();
  Vec lanes = splat(-inf);
  IVec good = isplat(-1);
  float value = -inf;
  bool fine = true;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec x = load(z + i);
    lanes = max(lanes, x);
    good &= x < inf;
  }
  for (; i < size; ++i) {
    value = z[i] > value ? z[i] : value;
    fine &= z[i] < inf;
  }
  for (int lane = 0; lane < kWidth; ++lane) fine &= good[lane] != 0;
  const float top = reduce_max(lanes);
  value = top > value ? top : value;
  if (!fine || value == -inf) return {value, -1};
  int64_t index = 0;
  while (z[index] != value) ++index;
  return {value, index};
}

struct RawStats {
  double log_sum, entropy;
};

// x = z - max, padded with -inf to whole vectors; statistics of softmax(x).
INLINE RawStats shift(const float* z, double top, int64_t size, double* x, int64_t padded) {
  for (int64_t i = 0; i < size; ++i) x[i] = z[i] - top;
  for (int64_t i = size; i < padded; ++i) x[i] = -__builtin_inf();
  DVec sum{}, weighted{};
  for (int64_t i = 0; i < padded / kDoubles; ++i) {
    const DVec v = vectors(x)[i] < kLowest ? dsplat(kLowest) : vectors(x)[i], e = exp(v);
    sum += e;
    weighted += e * v;
  }
  const double total = reduce_add(sum), log_sum = __builtin_log(total);
  return {log_sum, log_sum - reduce_add(weighted) / total};
}

// A heap of token ids, most likely on top, lowest id first among equals.
class Heap {
 public:
  INLINE_MEMBER Heap(const float* z, int32_t* ids, int64_t size) : z_(z), ids_(ids), size_(size) {
    for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i);
  }
  INLINE_MEMBER int32_t pop() {
    const int32_t top = ids_[0];
    ids_[0] = ids_[--size_];
    sink(0);
    return top;
  }
  INLINE_MEMBER int64_t size() const { return size_; }

 private:
  INLINE_MEMBER bool before(int32_t a, int32_t b) const { return z_[a] != z_[b] ? z_[a] > z_[b] : a < b; }
  INLINE_MEMBER void sink(int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < size_; i = child) {
      if (child + 1 < size_ && before(ids_[child + 1], ids_[child])) ++child;
      if (!before(ids_[child], ids_[i])) return;
      const int32_t id = ids_[i];
      ids_[i] = ids_[child];
      ids_[child] = id;
    }
  }

  const float* z_;
  int32_t* ids_;
  int64_t size_;
};

INLINE double total_of(double* w, int64_t padded) {
  DVec sum{};
  for (int64_t i = 0; i < padded / kDoubles; ++i) sum += vectors(w)[i];
  return reduce_add(sum);
}

// Keeps the weights of the top_k likeliest tokens and, of these, of the shortest prefix with mass top_p; zeroes others.
INLINE void keep(const float* z, double* w, int64_t size, int64_t padded, int64_t top_k, double top_p) {
  const bool all = top_k == 0 || top_k >= size;
  const int64_t limit = all ? size : top_k;
  const Scratch<int32_t> ids(size), kept(limit);
  const Scratch<double> weights(limit);
  // Together, tokens lighter than `floor` weigh less than (1 - top_p) of the total: no prefix needs them.
  const double total = all ? total_of(w, padded) : 0.0;
  const double floor = all ? (1.0 - top_p) * total / (double)size * 0.999 : 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    ids[count] = (int32_t)i;
    count += w[i] >= floor;
  }
  Heap heap(z, ids, count);
  int64_t num_kept = 0;
  double mass = 0.0;
  while (num_kept < limit && heap.size() > 0 && !(all && num_kept > 0 && mass >= top_p * total)) {
    kept[num_kept] = heap.pop();
    weights[num_kept] = w[kept[num_kept]];
    mass += weights[num_kept++];
  }
  std::memset(w, 0, sizeof(double) * padded);
  double before = 0.0;
  for (int64_t i = 0; i < num_kept; ++i) {
    if (!all && top_p < 1.0 && i > 0 && before >= top_p * mass) break;
    w[kept[i]] = weights[i];
    before += weights[i];
  }
}

struct Draw {
  int64_t token;
  double share;  // probability among the kept
};

// The sum of all weights, and of each chunk.
INLINE double sum_chunks(const double* w, int64_t padded, double* sums) {
  double total = 0.0;
  for (int64_t c = 0; c < (padded + kChunk - 1) / kChunk; ++c) {
    sums[c] = total_of(const_cast<double*>(w) + c * kChunk, least(kChunk, padded - c * kChunk));
    total += sums[c];
  }
  return total;
}

// Whole chunks are skipped by their sums; within the chunk the weights are added one by one.
INLINE Draw draw(const double* w, int64_t padded, double u, double* sums) {
  const int64_t chunks = (padded + kChunk - 1) / kChunk;
  const double total = sum_chunks(w, padded, sums);
  const double target = u * total;
  double cumulative = 0.0;
  int64_t token = -1;
  for (int64_t c = 0; c < chunks && token < 0; ++c) {
    double inside = cumulative;
    if (cumulative + sums[c] > target)
      for (int64_t i = c * kChunk; i < least(padded, (c + 1) * kChunk) && token < 0; ++i)
        if ((inside += w[i]) > target) token = i;
    cumulative += sums[c];
  }
  if (token < 0)  // by rounding, no sum exceeded u * total: take the last token that can be drawn
    for (token = padded - 1; w[token] == 0.0;) --token;
  return {token, w[token] / total};
}

// The logits of output r; bfloat16 ones are widened into `row`.
INLINE const float* logits_of(const Sample& p, int64_t r, float* row) {
  if (p.rows != nullptr) r = p.rows[r];
  if (p.half_logits == nullptr) return p.logits + r * p.vocabulary;
  const bf16* z = p.half_logits + r * p.vocabulary;
  for_parts(p.vocabulary, [&](int64_t i, auto n) { store(row + i, load(z + i, n), n); });
  return row;
}

INLINE bool sample_row(const Sample& p, int64_t r, float* row, double* x, double* w, double* sums, int64_t padded) {
  const float* z = logits_of(p, r, row);
  const Highest top = highest(z, p.vocabulary);
  if (top.index < 0) return false;
  const RawStats raw = shift(z, top.value, p.vocabulary, x, padded);
  const int64_t given = p.given == nullptr ? -1 : p.given[r];
  Draw chosen{top.index, 1.0};
  double too_small = 0.0;  // the log of a share that is 0 in double
  if (p.temperature[r] > 0.0) {
    const double temperature = p.temperature[r];
    for (int64_t i = 0; i < padded / kDoubles; ++i) vectors(w)[i] = exp(vectors(x)[i] / temperature);
    const bool cut_k = p.top_k[r] > 0 && p.top_k[r] < p.vocabulary;
    for (int64_t i = p.vocabulary; i < padded; ++i) w[i] = 0.0;
    if (cut_k || p.top_p[r] < 1.0) keep(z, w, p.vocabulary, padded, p.top_k[r], p.top_p[r]);
    if (p.min_p != nullptr && p.min_p[r] > 0.0) {
      const double floor = temperature * __builtin_log(p.min_p[r]);
      for (int64_t i = 0; i < padded / kDoubles; ++i) vectors(w)[i] = vectors(x)[i] < floor ? DVec{} : vectors(w)[i];
    }
    if (given >= 0) {
      const double sum = sum_chunks(w, padded, sums);
      chosen = {given, w[given] / sum};
      if (chosen.share == 0.0) too_small = x[given] / temperature - __builtin_log(sum);
    } else {
      chosen = draw(w, padded, uniform(p.keys[2 * r], p.keys[2 * r + 1]), sums);
    }
  }
  p.token[r] = chosen.token;
  p.logprob[r] = (float)(too_small < 0.0 ? too_small : __builtin_log(chosen.share));
  p.logprob_raw[r] = (float)(((double)z[chosen.token] - top.value) - raw.log_sum);
  p.entropy[r] = (float)raw.entropy;
  return true;
}

}  // namespace

int64_t sample(const Sample& p) {
  const int64_t padded = round_up(p.vocabulary, kWidth);
  int64_t failed = p.num_rows;
#pragma omp parallel if (p.num_rows * p.vocabulary > kParallelWork)
  {
    const Scratch<float> row(p.half_logits == nullptr ? 0 : p.vocabulary);
    const Scratch<double> x(padded), w(padded), sums(padded / kChunk + 1);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < p.num_rows; ++r)
      if (!sample_row(p, r, row, x, w, sums, padded)) {
#pragma omp critical(ibtpo_sample)
        failed = least(failed, r);
      }
  }
  return failed == p.num_rows ? -1 : failed;
}

}  // namespace ibtpo::IBTPO_ISA
