// The flat work list of a decode step on a GPU; the spec is ibtpo_kernels/gpu/work.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace ibtpo {

struct WorkInput {
  const PlanItem* items;
  const int32_t* lengths;  // [B]
  int64_t num_items, num_queries, width, page_size, split_pages, group, narrow, wide;
};

struct WorkItem {
  int32_t query_begin, num_queries, split, open;
};

struct WorkList {
  std::vector<WorkItem> items;
  std::vector<int32_t> first_slot;  // [B + 1]
  bool has_wide = false;
};

// The plan's items in whole splits, the closed ones first; fills in `first_slot`.
inline std::vector<WorkItem> whole_splits(const WorkInput& in, std::vector<int32_t>& first_slot) {
  const int64_t split_tokens = in.split_pages * in.page_size;
  std::vector<WorkItem> closed, tails;
  for (int64_t i = 0; i < in.num_items; ++i) {
    const PlanItem item = in.items[i];
    const int32_t size = item.query_end - item.query_begin;
    const auto low = static_cast<int32_t>(item.page_begin / in.split_pages);
    auto high = static_cast<int32_t>(item.page_end / in.split_pages);
    if (item.page_end == in.width) {
      const int64_t longest = *std::max_element(in.lengths + item.query_begin, in.lengths + item.query_end);
      high = std::max(static_cast<int32_t>((longest + split_tokens - 1) / split_tokens) - 1, low);
      tails.push_back({item.query_begin, size, high, 1});
      for (int32_t b = item.query_begin; b < item.query_end; ++b) first_slot[b + 1] = high + 1;
    }
    for (int32_t split = low; split < high; ++split) closed.push_back({item.query_begin, size, split, 0});
  }
  for (int64_t b = 0; b < in.num_queries; ++b) first_slot[b + 1] += first_slot[b];
  closed.insert(closed.end(), tails.begin(), tails.end());
  return closed;
}

inline WorkList work_list(const WorkInput& in) {
  WorkList work;
  work.first_slot.assign(in.num_queries + 1, 0);
  const int64_t split_tokens = in.split_pages * in.page_size;
  const auto height = [&](int64_t queries) { return queries * in.group > in.narrow ? in.wide : in.narrow; };
  std::vector<int64_t> cost;
  for (const WorkItem& item : whole_splits(in, work.first_slot)) {
    const auto queries = static_cast<int32_t>(std::max<int64_t>(height(item.num_queries) / in.group, 1));  // of a tile
    for (int32_t done = 0; done < item.num_queries; done += queries) {
      const WorkItem tile{item.query_begin + done, std::min(queries, item.num_queries - done), item.split, item.open};
      const int64_t keys = in.lengths[tile.query_begin] - tile.split * split_tokens;
      cost.push_back(height(tile.num_queries) * std::clamp<int64_t>(keys, 0, split_tokens));
      work.has_wide |= tile.num_queries * in.group > in.narrow;
      work.items.push_back(tile);
    }
  }
  std::vector<int32_t> order(cost.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return cost[a] > cost[b]; });
  std::vector<WorkItem> sorted;
  sorted.reserve(order.size());
  for (const int32_t i : order) sorted.push_back(work.items[i]);
  work.items.swap(sorted);
  return work;
}

}  // namespace ibtpo
