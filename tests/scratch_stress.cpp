// Nested arrays of any size from two threads at once: each on a cache line, none within another, kept from one time to
// the next. Run by test_kernels_team.py.
#include <cstdio>
#include <cstring>
#include <thread>

#include "scratch.h"

namespace {

constexpr int64_t kSizes[] = {0, 1, 63, 64, 65, 4096, 100000, 1 << 18, 1 << 19, 1 << 21};
constexpr int kNumSizes = sizeof kSizes / sizeof *kSizes;

bool nest(int depth, uint64_t seed) {
  if (depth == 0) return true;
  const int64_t size = kSizes[seed % kNumSizes];
  auto* array = static_cast<char*>(ibtpo::take_scratch(size));
  std::memset(array, depth, size);
  bool right = reinterpret_cast<uintptr_t>(array) % 64 == 0;
  for (uint64_t i = 1; i <= 2; ++i) right = nest(depth - 1, seed * 31 + i * 7) && right;
  for (int64_t i = 0; i < size; ++i) right = right && array[i] == depth;
  ibtpo::give_scratch(array);
  return right;
}

bool is_kept() {
  void *first = ibtpo::take_scratch(1000), *second = ibtpo::take_scratch(1000);
  ibtpo::give_scratch(second);
  ibtpo::give_scratch(first);
  void* again = ibtpo::take_scratch(500000);
  ibtpo::give_scratch(again);
  return first != second && again == first;
}

bool run(uint64_t seed) {
  bool right = is_kept();
  for (uint64_t i = 0; i < 20; ++i) right = nest(6, seed + i) && right;
  return right && is_kept();
}

}  // namespace

int main() {
  bool also = false;
  std::thread other([&] { also = run(1); });
  const bool right = run(2);
  other.join();
  std::puts(right && also ? "right" : "WRONG");
  return right && also ? 0 : 1;
}
