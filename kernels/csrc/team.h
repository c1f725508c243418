// Threads that share parts of one job, and for which nobody has to wait.
//
// A parallel region of OpenMP ends when its last thread has come by, even one that found nothing to do; where another
// process has the core, that is some milliseconds for a step of some hundred microseconds. Here parts go to whoever
// asks for them, the caller too: it is held up by a helper only while that one is in the middle of a part.
#pragma once

#include <cstdint>

namespace ibtpo {

// Calls work(context, part) once for each part in [0, parts), on at most `threads` threads, of which this is one;
// returns when all are done. A second caller at the same time, from another thread, does its parts alone. A helper that
// ran out of work keeps looking for more for a moment, then sleeps.
void share_out(int64_t parts, int64_t threads, void (*work)(void* context, int64_t part), void* context);

// A job comes in a moment: helpers that sleep wake up and look for it, while the caller still prepares it.
void rouse();

}  // namespace ibtpo
