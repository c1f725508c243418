// The two passes over a tile of logits that linear_logprob and policy_head make between their matrix products.
//
// The tile u [rows, cols] is a piece of hidden weight^T, in float32 or bfloat16, and a logit is
//
//     z = cap tanh(u / cap) / temperature,   without a cap z = u / temperature
//
//     stats   carried along a row from tile to tile: m = max z, s = sum exp(z - m), w = sum exp(z - m) (z - m)
//     finish  (m, s, w) -> (m, l, H): l = log s, entropy H = l - w / s
//     grad    dz = sum_e g_e [target_e = v] - p G - h p (log p + H),   u becomes du = dz (1 - tanh^2) / temperature
//
// A row is summed from left to right, in segments or, if it is short, number by number; edges are added in the order
// given. Neither depends on the number of threads.
#include "kernels.h"
#include "simd.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 17;  // logits; below, starting threads costs more than it saves
constexpr int64_t kShort = 64;              // most logits of a row for which several rows take a lane each
constexpr int64_t kSegment = 1024;          // logits of a row summed together: 4 KiB, read twice from the L1 cache
constexpr float kLowest = -1e30f;           // stands in for -inf, whose product with probability 0 would be NaN
constexpr float kInfinity = __builtin_inff();

typedef uint16_t Bits __attribute__((vector_size(2 * kWidth)));
typedef uint16_t BitsAt __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint32_t Word __attribute__((vector_size(4 * kWidth)));

INLINE Vec read(const float* p) { return load(p); }
INLINE Vec read(const uint16_t* p) {  // bfloat16
  const Bits bits = *reinterpret_cast<const BitsAt*>(p);
  return (Vec)(__builtin_convertvector(bits, Word) << 16);
}

INLINE void write(float* p, Vec x) { store(p, x); }
INLINE void write(uint16_t* p, Vec x) {  // rounded to nearest, ties to even; NaN stays NaN
  const Word w = (Word)x, rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Word quiet = (w >> 16) | 0x40u;
  *reinterpret_cast<BitsAt*>(p) = __builtin_convertvector(x == x ? rounded : quiet, Bits);
}

// The first `count` of a vector's elements; the others read as zero and are not written.
template <class T>
INLINE Vec read_part(const T* p, int64_t count) {
  T padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return read(padded);
}

template <class T>
INLINE void write_part(T* p, Vec x, int64_t count) {
  T padded[kWidth];
  write(padded, x);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// To about 2 ulp: the polynomial of Cephes' tanhf near zero, where 1 - 2 / (e^2x + 1) would cancel.
INLINE Vec tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x, square = x * x;
  Vec y = square * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  y = y * square * x + x;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < 0.625f ? y : (x < 0.0f ? -far : far);
}

// From u to z, and du/dz; `Capped` is known at compile time because most heads have no cap.
template <bool Capped>
struct Shape {
  float cap, inv_cap, scale;
  INLINE_MEMBER explicit Shape(const LogitTile& tile)
      : cap(tile.softcap * tile.inv_temperature),
        inv_cap(Capped ? 1.0f / tile.softcap : 0.0f),
        scale(tile.inv_temperature) {}
  INLINE_MEMBER Vec logit(Vec u, Vec& slope) const {
    if constexpr (Capped) {
      const Vec t = tanh(u * inv_cap);
      slope = (1.0f - t * t) * scale;
      return t * cap;
    }
    slope = splat(scale);
    return u * scale;
  }
  INLINE_MEMBER Vec logit(Vec u) const {
    Vec unused;
    return logit(u, unused);
  }
};

// z of u [0, size), size <= kSegment, padded with -inf to whole vectors; returns their maximum.
template <class T, class S>
INLINE float segment_logits(const T* u, int64_t size, const S& shape, float* z) {
  Vec highest = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec x = shape.logit(read(u + i));
    store(z + i, x);
    highest = max(highest, x);
  }
  if (i < size) {
    store(z + i, shape.logit(read_part(u + i, size - i)));
    for (int64_t pad = size; pad < i + kWidth; ++pad) z[pad] = -kInfinity;
    highest = max(highest, load(z + i));
  }
  return reduce_max(highest);
}

// Adds the logits u [0, size) of one row to its m, s, w.
template <class T, class S>
INLINE void stats_row(const T* u, int64_t size, const S& shape, float& m, float& s, float& w) {
  alignas(64) float z[kSegment];
  for (int64_t begin = 0; begin < size; begin += kSegment) {
    const int64_t count = least(kSegment, size - begin);
    const float highest = segment_logits(u + begin, count, shape, z), top = highest > m ? highest : m;
    const float gap = m == top ? 0.0f : m - top, shift = gap < kLowest ? kLowest : gap;
    const float shrink = s == 0.0f ? 0.0f : exp(shift), centre = top == -kInfinity ? 0.0f : top;
    Vec sum{}, weighted{};
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec x = max(splat(kLowest), load(z + i) - centre), e = exp(x);  // in this order, NaN stays NaN
      sum += e;
      weighted += e * x;
    }
    w = shrink * (w + shift * s) + reduce_add(weighted);
    s = shrink * s + reduce_add(sum);
    m = top;
  }
}

// The same for `rows` <= kWidth contiguous rows of `size` <= kShort logits, a lane a row: there are no reductions over
// lanes, which would take longer than all else. m, s and w are arrays.
template <class T, class S>
INLINE void stats_short_rows(const T* u, int64_t rows, int64_t size, const S& shape, float* m, float* s, float* w) {
  Vec z[kShort], square[kWidth];
  for (int64_t j = 0; j < size; j += kWidth) {
    const int64_t count = least(kWidth, size - j);
    for (int64_t i = 0; i < kWidth; ++i) {
      const T* at = u + i * size + j;
      square[i] = i >= rows ? Vec{} : count == kWidth ? read(at) : read_part(at, count);
    }
    transpose(square);
    for (int64_t i = 0; i < count; ++i) z[j + i] = shape.logit(square[i]);
  }
  const Vec before = read_part(m, rows), s_before = read_part(s, rows), w_before = read_part(w, rows);
  Vec top = before;
  for (int64_t j = 0; j < size; ++j) top = max(top, z[j]);
  const Vec gap = before == top ? Vec{} : before - top, shift = max(splat(kLowest), gap);
  const Vec shrink = s_before == 0.0f ? Vec{} : exp(shift), centre = top == -kInfinity ? Vec{} : top;
  Vec sum{}, weighted{};
  for (int64_t j = 0; j < size; ++j) {
    const Vec x = max(splat(kLowest), z[j] - centre), e = exp(x);  // in this order, NaN stays NaN
    sum += e;
    weighted += e * x;
  }
  write_part(m, top, rows);
  write_part(s, shrink * s_before + sum, rows);
  write_part(w, shrink * (w_before + shift * s_before) + weighted, rows);
}

template <class T, class S>
INLINE void grad_row(T* u, int64_t size, const S& shape, float m, float l, float entropy, float grad_row, float h) {
  const float offset = h * entropy + grad_row;
  const auto du = [&](Vec x) {
    Vec slope;
    const Vec z = rounded_product(shape.logit(x, slope));  // the same bits as when m was found
    const Vec log_p = max(splat(kLowest), z - m - l);
    return -exp(log_p) * (log_p * h + offset) * slope;
  };
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) write(u + i, du(read(u + i)));
  if (i < size) write_part(u + i, du(read_part(u + i, size - i)), size - i);
}

// Calls f(edge, its offset in the tile) for the edges that point into the tile.
template <class F>
INLINE void for_edges(const LogitTile& tile, const LogitEdges& edges, F f) {
  for (int64_t e = 0; e < edges.count; ++e) {
    const int64_t row = edges.rows[e] - tile.first_row, col = edges.targets[e] - tile.first_col;
    if (row >= 0 && row < tile.num_rows && col >= 0 && col < tile.num_cols) f(e, row * tile.num_cols + col);
  }
}

template <class T, bool Capped>
void stats_tile(const LogitTile& tile, const LogitEdges& edges, float* stats, int64_t total_rows, float* chosen) {
  const Shape<Capped> shape(tile);
  const T* u = static_cast<const T*>(tile.u);
  const int64_t step = tile.num_cols <= kShort ? kWidth : 1;
#pragma omp parallel for if (tile.num_rows * tile.num_cols > kParallelWork)
  for (int64_t r = 0; r < tile.num_rows; r += step) {
    const int64_t rows = least(step, tile.num_rows - r);
    float *m = stats + tile.first_row + r, *s = m + total_rows, *w = s + total_rows;
    if (tile.first_col == 0)
      for (int64_t i = 0; i < rows; ++i) m[i] = -kInfinity, s[i] = 0.0f, w[i] = 0.0f;
    if (step > 1)
      stats_short_rows(u + r * tile.num_cols, rows, tile.num_cols, shape, m, s, w);
    else
      stats_row(u + r * tile.num_cols, tile.num_cols, shape, *m, *s, *w);
  }
  for_edges(tile, edges, [&](int64_t e, int64_t at) { chosen[e] = shape.logit(read_part(u + at, 1))[0]; });
}

template <class T, bool Capped>
void grad_tile(const LogitTile& tile, const LogitEdges& edges, const float* stats, int64_t total_rows,
               const float* grad_rows, const float* grad_entropy, const float* grads) {
  const Shape<Capped> shape(tile);
  T* u = static_cast<T*>(tile.u);
  const Scratch<float> own(edges.count);  // what each edge adds, computed before u is overwritten
  for_edges(tile, edges, [&](int64_t e, int64_t at) {
    Vec slope;
    shape.logit(read_part(u + at, 1), slope);
    own[e] = grads[e] * slope[0];
  });
#pragma omp parallel for if (tile.num_rows * tile.num_cols > kParallelWork)
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    const int64_t row = tile.first_row + r;
    const float* at = stats + row;
    grad_row(u + r * tile.num_cols, tile.num_cols, shape, at[0], at[total_rows], at[2 * total_rows], grad_rows[row],
             grad_entropy[row]);
  }
  for_edges(tile, edges, [&](int64_t e, int64_t at) { write_part(u + at, read_part(u + at, 1) + own[e], 1); });
}

}  // namespace

void logit_stats(const LogitTile& tile, const LogitEdges& edges, float* stats, int64_t total_rows, float* chosen) {
  const bool capped = tile.softcap > 0.0f;
  const auto pass = tile.half ? (capped ? stats_tile<uint16_t, true> : stats_tile<uint16_t, false>)
                              : (capped ? stats_tile<float, true> : stats_tile<float, false>);
  pass(tile, edges, stats, total_rows, chosen);
}

void logit_finish(float* stats, int64_t total_rows, const LogitEdges& edges, float* chosen) {
  for (int64_t r = 0; r < total_rows; ++r) {
    const float s = stats[total_rows + r], l = __builtin_logf(s);
    stats[total_rows + r] = l;
    stats[2 * total_rows + r] = l - stats[2 * total_rows + r] / s;
  }
  for (int64_t e = 0; e < edges.count; ++e)
    chosen[e] = (chosen[e] - stats[edges.rows[e]]) - stats[total_rows + edges.rows[e]];
}

void logit_grad(const LogitTile& tile, const LogitEdges& edges, const float* stats, int64_t total_rows,
                const float* grad_rows, const float* grad_entropy, const float* grads) {
  const bool capped = tile.softcap > 0.0f;
  const auto pass = tile.half ? (capped ? grad_tile<uint16_t, true> : grad_tile<uint16_t, false>)
                              : (capped ? grad_tile<float, true> : grad_tile<float, false>);
  pass(tile, edges, stats, total_rows, grad_rows, grad_entropy, grads);
}

}  // namespace ibtpo::IBTPO_ISA
