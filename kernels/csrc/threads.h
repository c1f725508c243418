// What the kernels ask of OpenMP; without it there is one thread.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace ibtpo::IBTPO_ISA {

#ifdef _OPENMP
INLINE int64_t max_threads() { return omp_get_max_threads(); }  // of a parallel region that is opened here
INLINE void set_threads(int64_t count) { omp_set_num_threads((int)count); }
INLINE int64_t team_size() { return omp_get_num_threads(); }  // of the region that this runs in
INLINE int64_t thread_index() { return omp_get_thread_num(); }
#else
INLINE int64_t max_threads() { return 1; }
INLINE void set_threads(int64_t) {}
INLINE int64_t team_size() { return 1; }
INLINE int64_t thread_index() { return 0; }
#endif

// Calls f(i) for each i in [0, count), on several threads if `parallel`. If not, no region is opened, since even one of
// one thread costs time.
template <class F>
INLINE void spread(int64_t count, bool parallel, const F& f) {
  if (parallel) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) f(i);
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

// The same with a range for each thread: f(begin, end).
template <class F>
INLINE void spread_ranges(int64_t count, bool parallel, const F& f) {
  if (parallel) {
#pragma omp parallel
    f(count * thread_index() / team_size(), count * (thread_index() + 1) / team_size());
  } else {
    f(0, count);
  }
}

}  // namespace ibtpo::IBTPO_ISA
