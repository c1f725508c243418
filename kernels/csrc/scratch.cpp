// See scratch.h. Compiled once, without an instruction set of its own.
#include "scratch.h"

#include <cstdlib>

namespace ibtpo {
namespace {

constexpr int64_t kLine = 64;

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kKept = 0;  // every array from malloc, so that an overrun is detected
#else
constexpr int64_t kKept = 1 << 20;  // bytes a thread keeps; arrays that do not fit come from malloc
#endif

char* allocate(int64_t bytes) {
  auto* memory = static_cast<char*>(std::aligned_alloc(kLine, bytes));
  if (memory == nullptr) std::abort();
  return memory;
}

struct Stack {
  ~Stack() { std::free(base); }
  char *base = nullptr, *top = nullptr;
};

thread_local Stack stack;

}  // namespace

void* take_scratch(int64_t bytes) {
  bytes = (bytes + kLine) / kLine * kLine;  // never 0
  if (stack.base == nullptr && kKept > 0) stack.base = stack.top = allocate(kKept);
  if (bytes > stack.base + kKept - stack.top) return allocate(bytes);
  char* const memory = stack.top;
  stack.top += bytes;
  return memory;
}

void give_scratch(void* memory) {
  auto* const at = static_cast<char*>(memory);
  if (at >= stack.base && at < stack.base + kKept)
    stack.top = at;
  else
    std::free(at);
}

}  // namespace ibtpo
