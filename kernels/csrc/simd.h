// The widest vectors of the instruction set, and the few functions on them that the kernels need.
//
// GCC and Clang vector extensions: +, *, comparisons and ?: work element by element. Everything is always inlined, so
// this file defines no symbols (see kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "scratch.h"

#ifndef IBTPO_ISA
#define IBTPO_ISA baseline
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace ibtpo::IBTPO_ISA {

// IBTPO_EMULATE_AVX512 runs the shapes of AVX-512 on any CPU: the compiler splits the vectors.
#if defined(__AVX512F__) || defined(IBTPO_EMULATE_AVX512)
#define IBTPO_WIDTH 16
constexpr int kWidth = 16;
#elif defined(__AVX__)
#define IBTPO_WIDTH 8
constexpr int kWidth = 8;
#else
#define IBTPO_WIDTH 4
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef float VecAt __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));  // unaligned
typedef int32_t IVecAt __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfAt __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));  // bf16 bits

INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
INLINE IVec load(const int32_t* p) { return *reinterpret_cast<const IVecAt*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAt*>(p) = x; }
INLINE Vec splat(float x) { return x - Vec{}; }
INLINE IVec isplat(int32_t x) { return x - IVec{}; }
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Keeps a product from being contracted into a fused multiply-add: it is rounded as it would be in memory.
INLINE Vec rounded_product(Vec x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// ---- bfloat16 ----

INLINE UVec load_bits(const bf16* p) { return __builtin_convertvector(*reinterpret_cast<const HalfAt*>(p), UVec); }
INLINE Vec load(const bf16* p) { return (Vec)(load_bits(p) << 16); }

// The nearest bf16, ties to even, in the lower half of each lane; NaN stays NaN.
INLINE UVec round_bits(Vec x) {
  const UVec bits = (UVec)x, rounded = (bits + ((bits >> 16 & 1u) + 0x7fffu)) >> 16;
  return x == x ? rounded : (bits >> 16 | 0x40u);
}
INLINE void store(bf16* p, Vec x) { *reinterpret_cast<HalfAt*>(p) = __builtin_convertvector(round_bits(x), HalfAt); }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { p->bits = static_cast<uint16_t>(round_bits(splat(x))[0]); }

// The lane indices 0 .. kWidth-1.
INLINE IVec iota() {
  IVec x;
  for (int i = 0; i < kWidth; ++i) x[i] = i;
  return x;
}

// x with its lanes rotated by `by`, which a reduction over all lanes halves step by step.
template <int By>
INLINE Vec rotate(Vec x) {
#if IBTPO_WIDTH == 16
  return __builtin_shufflevector(x, x, By % 16, (By + 1) % 16, (By + 2) % 16, (By + 3) % 16, (By + 4) % 16,
                                 (By + 5) % 16, (By + 6) % 16, (By + 7) % 16, (By + 8) % 16, (By + 9) % 16,
                                 (By + 10) % 16, (By + 11) % 16, (By + 12) % 16, (By + 13) % 16, (By + 14) % 16,
                                 (By + 15) % 16);
#elif IBTPO_WIDTH == 8
  return __builtin_shufflevector(x, x, By % 8, (By + 1) % 8, (By + 2) % 8, (By + 3) % 8, (By + 4) % 8, (By + 5) % 8,
                                 (By + 6) % 8, (By + 7) % 8);
#else
  return __builtin_shufflevector(x, x, By % 4, (By + 1) % 4, (By + 2) % 4, (By + 3) % 4);
#endif
}

INLINE float reduce_max(Vec x) {
  if constexpr (kWidth > 8) x = max(x, rotate<8>(x));
  if constexpr (kWidth > 4) x = max(x, rotate<4>(x));
  x = max(x, rotate<2>(x));
  return max(x, rotate<1>(x))[0];
}

INLINE float reduce_add(Vec x) {
  if constexpr (kWidth > 8) x += rotate<8>(x);
  if constexpr (kWidth > 4) x += rotate<4>(x);
  x += rotate<2>(x);
  return (x + rotate<1>(x))[0];
}

// Interleave the low (high) halves of a and b: a0 b0 a1 b1 ...
INLINE Vec zip_low(Vec a, Vec b) {
#if IBTPO_WIDTH == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif IBTPO_WIDTH == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

INLINE Vec zip_high(Vec a, Vec b) {
#if IBTPO_WIDTH == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif IBTPO_WIDTH == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Transpose a kWidth x kWidth square: log2(kWidth) rounds of one perfect shuffle. On AVX only slow instructions cross
// the two halves of a vector, so there the halves are transposed first and exchanged last.
INLINE void transpose(Vec (&x)[kWidth]) {
#if IBTPO_WIDTH == 8
  Vec y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = __builtin_shufflevector(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[i + 2 * j + 1] = __builtin_shufflevector(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec low = x[i], high = x[i + 4];
    x[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
    Vec y[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + kWidth / 2]);
      y[2 * i + 1] = zip_high(x[i], x[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
#endif
}

// e^x to about 1 ulp for x <= 88; below -87 it is 0, NaN stays NaN. x = n ln2 + r, |r| <= ln2 / 2, and e^r by the
// polynomial of Cephes' expf; adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits.
INLINE Vec exp(Vec x) {
  constexpr float kMagic = 12582912.0f;
  const auto underflow = x < -87.0f;
  x = underflow ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec t = x * 1.44269504088896341f + kMagic;
  const Vec n = t - kMagic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Vec scaled = (Vec)((IVec)y + ((IVec)t << 23));
  return underflow ? Vec{} : scaled;
}

INLINE float exp(float x) { return exp(splat(x))[0]; }

INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f(offset) for whole vectors of [0, size), then rest(offset) for each remaining element.
template <class Whole, class Rest>
INLINE void for_each(int64_t size, Whole whole, Rest rest) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) whole(i);
  for (; i < size; ++i) rest(i);
}

INLINE float dot(const float* a, const float* b, int64_t size) {
  Vec lanes{};
  float tail = 0.0f;
  for_each(size, [&](int64_t i) { lanes += load(a + i) * load(b + i); }, [&](int64_t i) { tail += a[i] * b[i]; });
  return reduce_add(lanes) + tail;
}

// An uninitialised array on a cache-line boundary, freed at the end of its scope.
template <class T>
class Scratch {
 public:
  INLINE_MEMBER explicit Scratch(int64_t count) : data_(static_cast<T*>(take_scratch(count * sizeof(T)))) {}
  INLINE_MEMBER ~Scratch() { give_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  INLINE_MEMBER operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace ibtpo::IBTPO_ISA
