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

}  // namespace ibtpo::IBTPO_ISA
