// Memory for the length of a scope, from a stack that each thread keeps.
//
// Kernels of microseconds ask for a dozen small arrays each. From malloc they cost more than they hold: it searches,
// splits and merges, gives pages back to the system and takes them anew. What a thread keeps here is warm in its
// caches.
#pragma once

#include <cstdint>

namespace ibtpo {

// `bytes` bytes on a cache-line boundary, not initialised. Give them back on the same thread, the last taken first.
void* take_scratch(int64_t bytes);
void give_scratch(void* memory);

}  // namespace ibtpo
