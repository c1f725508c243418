// The small ops between the matrix products: norms, rotary embedding, gate. Each row is summed in one fixed order,
// whatever the batch.
#include "kernels.h"
#include "simd.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 17;  // floats; below, starting threads costs more than it saves

INLINE float inverse_rms(const float* x, int64_t size, float eps) {
  return 1.0f / __builtin_sqrtf(dot(x, x, size) / (float)size + eps);
}

INLINE void norm_row(const float* x, const float* weight, float* out, int64_t size, float eps) {
  const float factor = inverse_rms(x, size, eps);
  for_each(
      size, [&](int64_t i) { store(out + i, load(x + i) * factor * load(weight + i)); },
      [&](int64_t i) { out[i] = x[i] * factor * weight[i]; });
}

// out = (x1 cos - x2 sin, x2 cos + x1 sin); out may be x.
INLINE void rotate_row(const float* x, const float* cos, const float* sin, float* out, int64_t half, float direction) {
  for_each(
      half,
      [&](int64_t i) {
        const Vec x1 = load(x + i), x2 = load(x + half + i), c = load(cos + i), s = load(sin + i) * direction;
        store(out + i, x1 * c - x2 * s);
        store(out + half + i, x2 * c + x1 * s);
      },
      [&](int64_t i) {
        const float x1 = x[i], x2 = x[half + i], c = cos[i], s = sin[i] * direction;
        out[i] = x1 * c - x2 * s;
        out[half + i] = x2 * c + x1 * s;
      });
}

INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }
INLINE float sigmoid(float x) { return sigmoid(splat(x))[0]; }

}  // namespace

void rope(const float* x, const float* cos, const float* sin, float* out, int64_t num_tokens, int64_t num_heads,
          int64_t head_dim, float direction) {
  const int64_t half = head_dim / 2;
#pragma omp parallel for if (num_tokens * num_heads * head_dim > kParallelWork)
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t at = (t * num_heads + h) * head_dim;
      rotate_row(x + at, cos + t * half, sin + t * half, out + at, half, direction);
    }
}

void rms_norm(const float* x, const float* weight, float* out, int64_t num_rows, int64_t size, float eps) {
#pragma omp parallel for if (num_rows * size > kParallelWork)
  for (int64_t r = 0; r < num_rows; ++r) norm_row(x + r * size, weight, out + r * size, size, eps);
}

// With n = x f, f = 1 / rms: dx = f (w dO - n mean(w dO n)), dw = sum over rows of dO n. The rows are cut into a fixed
// number of parts for dw, added in order, so that the result does not depend on the number of threads.
void rms_norm_backward(const float* x, const float* weight, const float* d_out, float* dx, float* d_weight,
                       int64_t num_rows, int64_t size, float eps) {
  constexpr int64_t kParts = 16;
  const Scratch<float> partial(kParts * size);
#pragma omp parallel for if (num_rows * size > kParallelWork)
  for (int64_t part = 0; part < kParts; ++part) {
    float* sum = partial + part * size;
    std::memset(sum, 0, sizeof(float) * size);
    for (int64_t r = part * num_rows / kParts; r < (part + 1) * num_rows / kParts; ++r) {
      const float *x_r = x + r * size, *d_r = d_out + r * size;
      float* dx_r = dx + r * size;
      const float f = inverse_rms(x_r, size, eps);
      for_each(
          size, [&](int64_t i) { store(dx_r + i, load(weight + i) * load(d_r + i)); },
          [&](int64_t i) { dx_r[i] = weight[i] * d_r[i]; });
      const float mean = dot(dx_r, x_r, size) * f / (float)size;
      for_each(
          size,
          [&](int64_t i) {
            const Vec n = load(x_r + i) * f;
            store(sum + i, load(sum + i) + load(d_r + i) * n);
            store(dx_r + i, (load(dx_r + i) - n * mean) * f);
          },
          [&](int64_t i) {
            const float n = x_r[i] * f;
            sum[i] += d_r[i] * n;
            dx_r[i] = (dx_r[i] - n * mean) * f;
          });
    }
  }
  std::memset(d_weight, 0, sizeof(float) * size);
  for (int64_t part = 0; part < kParts; ++part)
    for (int64_t i = 0; i < size; ++i) d_weight[i] += partial[part * size + i];
}

void silu_mul(const float* gate, const float* up, float* out, int64_t num_rows, int64_t size, int64_t gate_stride,
              int64_t up_stride) {
#pragma omp parallel for if (num_rows * size > kParallelWork)
  for (int64_t r = 0; r < num_rows; ++r) {
    const float *g = gate + r * gate_stride, *u = up + r * up_stride;
    float* o = out + r * size;
    for_each(
        size, [&](int64_t i) { store(o + i, load(g + i) * sigmoid(load(g + i)) * load(u + i)); },
        [&](int64_t i) { o[i] = g[i] * sigmoid(g[i]) * u[i]; });
  }
}

// d silu(g) / dg = s (1 + g (1 - s)), s = sigmoid(g).
void silu_mul_backward(const float* gate, const float* up, const float* d_out, float* d_gate, float* d_up,
                       int64_t count) {
  constexpr int64_t kChunk = 4096;
#pragma omp parallel for if (count > kParallelWork)
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const float *g = gate + begin, *u = up + begin, *d = d_out + begin;
    float *dg = d_gate + begin, *du = d_up + begin;
    for_each(
        least(kChunk, count - begin),
        [&](int64_t i) {
          const Vec x = load(g + i), s = sigmoid(x), grad = load(d + i);
          store(dg + i, grad * load(u + i) * s * (1.0f + x * (1.0f - s)));
          store(du + i, grad * x * s);
        },
        [&](int64_t i) {
          const float s = sigmoid(g[i]);
          dg[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
          du[i] = d[i] * g[i] * s;
        });
  }
}

int64_t rope_append(const RopeAppend& p) {
  const int64_t half = p.head_dim / 2, row = p.num_kv_heads * p.head_dim;
  for (int64_t t = 0; t < p.num_tokens; ++t)
    if (p.slots[t] < -1 || p.slots[t] >= p.num_slots) return t;  // before anything is written
#pragma omp parallel for if (p.num_tokens * (p.num_heads + 2 * p.num_kv_heads) * p.head_dim > kParallelWork)
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const float *cos = p.cos + t * half, *sin = p.sin + t * half;
    const auto place = [&](const float* x, const float* weight, float* out) {
      if (weight != nullptr) norm_row(x, weight, out, p.head_dim, p.eps);
      rotate_row(weight != nullptr ? out : x, cos, sin, out, half, 1.0f);
    };
    for (int64_t h = 0; h < p.num_heads; ++h)
      place(p.q + t * p.q_stride + h * p.head_dim, p.q_weight, p.q_out + (t * p.num_heads + h) * p.head_dim);
    if (p.slots[t] < 0) continue;
    for (int64_t h = 0; h < p.num_kv_heads; ++h)
      place(p.k + t * p.k_stride + h * p.head_dim, p.k_weight, p.k_pages + p.slots[t] * row + h * p.head_dim);
    std::memcpy(p.v_pages + p.slots[t] * row, p.v + t * p.v_stride, sizeof(float) * row);
  }
  return -1;
}

}  // namespace ibtpo::IBTPO_ISA
