// Threads that share the parts of a job, without waiting for threads that have no part.
//
// An OpenMP parallel region ends when its last thread has arrived, even one with nothing left to do; if another process
// has that thread's core, a step of some hundred microseconds takes milliseconds. Here the caller and its helpers take
// parts one by one, and the caller waits only for parts that a helper has begun.
#pragma once

#include <cstdint>

namespace ibtpo {

// Calls work(context, part) once for each part in [0, parts), on at most `threads` threads, this one included; returns
// when all are done. A concurrent caller on another thread does its parts alone. A helper without work polls for more
// for a moment, then sleeps.
void share_out(int64_t parts, int64_t threads, void (*work)(void* context, int64_t part), void* context);

// Announces a job: sleeping helpers wake up and look for it while the caller still prepares it.
void rouse();

}  // namespace ibtpo
