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

// Leading columns of the page table that queries b and b + 1 share.
inline int32_t shared_columns(const PlanInput& p, int64_t b) {
  const int64_t row = p.rows[b], next = p.rows[b + 1];
  if (row == next) return static_cast<int32_t>(p.width);
  const int64_t shorter = std::min(p.lengths[b], p.lengths[b + 1]);
  const int64_t limit = std::min((shorter + p.page_size - 1) / p.page_size, p.width);
  const int32_t *ours = p.page_table + row * p.width, *theirs = p.page_table + next * p.width;
  int64_t column = 0;
  while (column < limit && ours[column] == theirs[column] && ours[column] >= 0) ++column;
  return static_cast<int32_t>(column);
}

// The intervals of the longest-common-prefix array, found with one stack in O(B): swept from the last query to the
// first, so that reversing what was emitted gives depth-first order.
inline std::vector<PlanItem> plan_items(const PlanInput& p) {
  struct Open {
    int32_t end, depth;  // queries [current, end) share columns [0, depth)
  };
  const auto width = static_cast<int32_t>(p.width);
  std::vector<PlanItem> items;
  std::vector<Open> stack{{static_cast<int32_t>(p.num_queries), 0}};
  items.reserve(2 * p.num_queries);
  int32_t deeper = 0;  // columns shared with the query after this one
  for (auto b = static_cast<int32_t>(p.num_queries) - 1; b >= 0; --b) {
    const int32_t shallower = b > 0 ? shared_columns(p, b - 1) : 0;  // columns shared with the query before
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
