// Rows of float or bfloat16, a vector at a time: read as float, computed as float, rounded when they are stored.
#pragma once

#include "simd.h"

namespace ibtpo::IBTPO_ISA {

// x as it reads back after being stored as T.
template <class T>
INLINE Vec rounded(Vec x) {
  if constexpr (sizeof(T) == 4) return x;
  return (Vec)(round_bits(x) << 16);
}

// How much of a vector a step uses: all of it, or the first `count` elements, the others being zero.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
INLINE Vec load(const T* p, Part part) {
  T padded[kWidth] = {};
  for (int64_t i = 0; i < part.count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class T>
INLINE void store(T* p, Vec x, Whole) {
  store(p, x);
}
template <class T>
INLINE void store(T* p, Vec x, Part part) {
  T padded[kWidth];
  store(padded, x);
  for (int64_t i = 0; i < part.count; ++i) p[i] = padded[i];
}

// Calls f(offset, Whole or Part) along [0, size).
template <class F>
INLINE void for_parts(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) f(i, Whole{});
  if (i < size) f(i, Part{size - i});
}

}  // namespace ibtpo::IBTPO_ISA
