// Memory for the length of a scope, from a stack that each thread keeps.
//
// A kernel of some microseconds needs a dozen small arrays. malloc is slow for these: it searches, splits and merges
// blocks, and returns pages to the system only to take them again. The stack also stays warm in the thread's caches.
#pragma once

#include <cstdint>

namespace ibtpo {

// `bytes` bytes on a cache-line boundary, not initialised. Give them back on the same thread, the last taken first.
void* take_scratch(int64_t bytes);
void give_scratch(void* memory);

}  // namespace ibtpo
