// The small ops between the matrix products: norms, rotary embedding, gate. Each row is summed in one fixed order,
// whatever the batch.
//
// T is what activations and weights are stored as, float or bfloat16; see parts.h.
#include "kernels.h"
#include "parts.h"
#include "simd.h"
#include "threads.h"

namespace ibtpo::IBTPO_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 17;  // elements; below, starting threads costs more than it saves

template <class T>
INLINE float inverse_rms(const T* x, int64_t size, float eps) {
  Vec sum{};
  for_parts(size, [&](int64_t i, auto n) {
    const Vec v = load(x + i, n);
    sum += v * v;
  });
  return 1.0f / __builtin_sqrtf(reduce_add(sum) / (float)size + eps);
}

template <class T>
INLINE void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
  const float factor = inverse_rms(x, size, eps);
  for_parts(size,
            [&](int64_t i, auto n) { store(out + i, rounded<T>(load(x + i, n) * factor) * load(weight + i, n), n); });
}

// out = (x1 cos - x2 sin, x2 cos + x1 sin); out may be x.
template <class T>
INLINE void rotate_row(const T* x, const float* cos, const float* sin, T* out, int64_t half, float direction) {
  for_parts(half, [&](int64_t i, auto n) {
    const Vec x1 = load(x + i, n), x2 = load(x + half + i, n), c = load(cos + i, n), s = load(sin + i, n) * direction;
    store(out + i, x1 * c - x2 * s, n);
    store(out + half + i, x2 * c + x1 * s, n);
  });
}

INLINE Vec sigmoid(Vec x) { return x < -88.0f ? Vec{} : 1.0f / (1.0f + exp(-x)); }  // exp ends at 88

template <class T>
void rope(const T* x, const float* cos, const float* sin, T* out, int64_t num_tokens, int64_t num_heads,
          int64_t head_dim, float direction) {
  const int64_t half = head_dim / 2;
  spread_ranges(num_tokens, num_tokens * num_heads * head_dim > kParallelWork, [&](int64_t begin, int64_t stop) {
    for (int64_t t = begin; t < stop; ++t)
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t at = (t * num_heads + h) * head_dim;
        rotate_row(x + at, cos + t * half, sin + t * half, out + at, half, direction);
      }
  });
}

// With a residual, total = x + residual is written, and normed.
template <class T>
void norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t num_rows, int64_t size, float eps) {
  spread_ranges(num_rows, num_rows * size > kParallelWork, [&](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r) {
      const T *x_r = x + r * size, *residual_r = residual + r * size;
      if (residual != nullptr) {
        T* total_r = total + r * size;
        for_parts(size, [&](int64_t i, auto n) { store(total_r + i, load(x_r + i, n) + load(residual_r + i, n), n); });
        x_r = total_r;
      }
      norm_row(x_r, weight, out + r * size, size, eps);
    }
  });
}

// With n = x f, f = 1 / rms: dx = f (w dO - n mean(w dO n)) [+ d_total], dw = sum over rows of dO round(n). The rows
// are cut into a fixed number of parts for dw, added in order, so that the result does not depend on the number of
// threads.
template <class T>
void norm_backward(const T* x, const T* weight, const T* d_out, T* dx, T* d_weight, int64_t num_rows, int64_t size,
                   float eps, const T* d_total) {
  constexpr int64_t kParts = 16;
  const Scratch<float> partial(kParts * size);
#pragma omp parallel for if (num_rows * size > kParallelWork)
  for (int64_t part = 0; part < kParts; ++part) {
    float* sum = partial + part * size;
    std::memset(sum, 0, sizeof(float) * size);
    for (int64_t r = part * num_rows / kParts; r < (part + 1) * num_rows / kParts; ++r) {
      const T *x_r = x + r * size, *d_r = d_out + r * size;
      const float f = inverse_rms(x_r, size, eps);
      Vec products{};
      for_parts(size,
                [&](int64_t i, auto n) { products += load(weight + i, n) * load(d_r + i, n) * load(x_r + i, n); });
      const float mean = reduce_add(products) * f / (float)size;
      for_parts(size, [&](int64_t i, auto n) {
        const Vec d = load(d_r + i, n), xh = load(x_r + i, n) * f;
        store(sum + i, load(sum + i, n) + d * rounded<T>(xh), n);
        Vec result = (load(weight + i, n) * d - xh * mean) * f;
        if (d_total != nullptr) result += load(d_total + r * size + i, n);
        store(dx + r * size + i, result, n);
      });
    }
  }
  for (int64_t part = 1; part < kParts; ++part)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[part * size + i];
  for_parts(size, [&](int64_t i, auto n) { store(d_weight + i, load((const float*)partial + i, n), n); });
}

template <class T>
void gate(const T* gate, const T* up, T* out, int64_t num_rows, int64_t size, int64_t gate_stride, int64_t up_stride) {
  spread_ranges(num_rows, num_rows * size > kParallelWork, [&](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r) {
      const T *g = gate + r * gate_stride, *u = up + r * up_stride;
      T* o = out + r * size;
      for_parts(size, [&](int64_t i, auto n) {
        const Vec x = load(g + i, n);
        store(o + i, rounded<T>(x * sigmoid(x)) * load(u + i, n), n);
      });
    }
  });
}

// d silu(g) / dg = s (1 + g (1 - s)), s = sigmoid(g).
template <class T>
void gate_backward(const T* gate, const T* up, const T* d_out, T* d_gate, T* d_up, int64_t count) {
  constexpr int64_t kChunk = 4096;
#pragma omp parallel for if (count > kParallelWork)
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const T *g = gate + begin, *u = up + begin, *d = d_out + begin;
    T *dg = d_gate + begin, *du = d_up + begin;
    for_parts(least(kChunk, count - begin), [&](int64_t i, auto n) {
      const Vec x = load(g + i, n), s = sigmoid(x), grad = load(d + i, n);
      store(dg + i, grad * load(u + i, n) * s * (1.0f + x * (1.0f - s)), n);
      store(du + i, grad * rounded<T>(x * s), n);
    });
  }
}

template <class T>
int64_t rope_append(const RopeAppendOf<T>& p) {
  const int64_t half = p.head_dim / 2, row = p.num_kv_heads * p.head_dim;
  for (int64_t t = 0; t < p.num_tokens; ++t)
    if (p.slots[t] < -1 || p.slots[t] >= p.num_slots) return t;  // before anything is written
  const auto range = [&](int64_t begin, int64_t stop) {
    for (int64_t t = begin; t < stop; ++t) {
      const float *cos = p.cos + t * half, *sin = p.sin + t * half;
      const auto place = [&](const T* x, const T* weight, T* out) {
        if (weight != nullptr) norm_row(x, weight, out, p.head_dim, p.eps);
        rotate_row(weight != nullptr ? out : x, cos, sin, out, half, 1.0f);
      };
      for (int64_t h = 0; h < p.num_heads; ++h)
        place(p.q + t * p.q_stride + h * p.head_dim, p.q_weight, p.q_out + (t * p.num_heads + h) * p.head_dim);
      if (p.slots[t] < 0) continue;
      for (int64_t h = 0; h < p.num_kv_heads; ++h)
        place(p.k + t * p.k_stride + h * p.head_dim, p.k_weight, p.k_pages + p.slots[t] * row + h * p.head_dim);
      std::memcpy(p.v_pages + p.slots[t] * row, p.v + t * p.v_stride, sizeof(T) * row);
    }
  };
  const int64_t size = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim;
  spread_ranges(p.num_tokens, p.num_tokens * size > kParallelWork, range);
  return -1;
}

template <class T>
void plain_norm(const T* x, const T* weight, T* out, int64_t num_rows, int64_t size, float eps) {
  norm<T>(x, nullptr, weight, out, nullptr, num_rows, size, eps);
}

template <class T>
constexpr Pointwise<T> pointwise() {
  return {rope_append<T>, rope<T>, plain_norm<T>, norm<T>, norm_backward<T>, gate<T>, gate_backward<T>};
}

}  // namespace

extern const Pointwise<float> pointwise_f32 = pointwise<float>();
extern const Pointwise<bf16> pointwise_bf16 = pointwise<bf16>();

}  // namespace ibtpo::IBTPO_ISA
