// Which queries of a decode step share which pages; the spec is ibtpo_kernels/plan.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ibtpo {

struct PlanInput {
  const int32_t *page_table, *rows, *lengths;  // [R, P], [B], [B]
  int64_t num_rows, width, num_queries, page_size;
};

struct PlanItem {
  int32_t query_begin, query_end, page_begin, page_end;
};

// State of each table row, kept between plans so that a plan compares pages only where something changed. next[r] is
// the row that last followed row r, previous[r] the one that last preceded it. Where both agree, shared[r] tells how
// many leading columns r and next[r] have in common: n if they differ in column n, -1 - n if column n was not there to
// be compared.
struct PlanState {
  int32_t *next, *previous, *shared;  // [R] each; next and previous are -1 for a row whose pages were replaced
};

// The first column in [from, limit) in which two rows do not have the same page, or limit.
inline int64_t first_difference(const int32_t* ours, const int32_t* theirs, int64_t from, int64_t limit) {
  constexpr int64_t kStep = 32;  // columns compared without a branch, so that the loop is vectorized
  for (; from + kStep <= limit; from += kStep) {
    int32_t differ = 0;
    for (int64_t i = 0; i < kStep; ++i) differ |= (ours[from + i] ^ theirs[from + i]) | (ours[from + i] & INT32_MIN);
    if (differ != 0) break;
  }
  while (from < limit && ours[from] == theirs[from] && ours[from] >= 0) ++from;
  return from;
}

// Leading columns of the page table that queries b and b + 1 share; `state` may be null.
inline int32_t shared_columns(const PlanInput& p, const PlanState* state, int64_t b) {
  const int32_t row = p.rows[b], next = p.rows[b + 1];
  if (row == next) return static_cast<int32_t>(p.width);
  const int64_t shorter = std::min(p.lengths[b], p.lengths[b + 1]);
  const int64_t limit = std::min((shorter + p.page_size - 1) / p.page_size, p.width);
  int64_t from = 0;
  if (state != nullptr && state->next[row] == next && state->previous[next] == row) {
    const int32_t known = state->shared[row];
    from = known >= 0 ? known : -1 - known;
    if (known >= 0 || from >= limit) return static_cast<int32_t>(std::min(from, limit));
  }
  const int32_t *ours = p.page_table + int64_t{row} * p.width, *theirs = p.page_table + int64_t{next} * p.width;
  const auto found = static_cast<int32_t>(first_difference(ours, theirs, from, limit));
  if (state != nullptr) {
    const bool differ = found < limit && ours[found] >= 0 && theirs[found] >= 0;
    state->next[row] = next;
    state->previous[next] = row;
    state->shared[row] = differ ? found : -1 - found;
  }
  return found;
}

// The intervals of the longest-common-prefix array, found with one stack in O(B): swept from the last query to the
// first, so that reversing what was emitted gives depth-first order.
inline std::vector<PlanItem> plan_items(const PlanInput& p, const PlanState* state) {
  struct Open {
    int32_t end, depth;  // queries [current, end) share columns [0, depth)
  };
  const auto width = static_cast<int32_t>(p.width);
  std::vector<PlanItem> items;
  std::vector<Open> stack{{static_cast<int32_t>(p.num_queries), 0}};
  items.reserve(2 * p.num_queries);
  int32_t deeper = 0;  // columns shared with the query after this one
  for (auto b = static_cast<int32_t>(p.num_queries) - 1; b >= 0; --b) {
    const int32_t shallower = b > 0 ? shared_columns(p, state, b - 1) : 0;  // columns shared with the query before
    const int32_t own = std::max(deeper, shallower);
    if (own < width) items.push_back({b, b + 1, own, width});
    int32_t end = b + 1;
    while (stack.back().depth > shallower) {
      const Open group = stack.back();
      stack.pop_back();
      items.push_back({b, group.end, std::max(shallower, stack.back().depth), group.depth});
      end = group.end;
    }
    if (stack.back().depth < shallower) stack.push_back({end, shallower});
    deeper = shallower;
  }
  std::reverse(items.begin(), items.end());
  return items;
}

}  // namespace ibtpo
