// Several decode steps in one call; see `DecodeStep.run` of ibtpo_kernels/decoder.py.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace ibtpo {

struct DecodeRun {
  int64_t steps = 0, rows = 0;
  int64_t failed = -1;                              // error of the step after these, as `Kernels::decoder_step` gives
  std::vector<std::pair<int64_t, int64_t>> events;  // (place among the branches chosen, code)
  std::vector<int64_t> paged;                       // places that were given the pages of `spare`, in its order
};

// What a run may do before it has to end.
struct RunLimits {
  int64_t most_steps, most_ended;
  const int32_t* spare;  // [num_spare] pages
  int64_t num_spare;
};

// The branches that still run.
class Running {
 public:
  Running(const int64_t* chosen, int64_t count, const PlanItem* items, int64_t num_items)
      : branches(chosen, chosen + count), places(count), items(items, items + num_items) {
    std::iota(places.begin(), places.end(), 0);
  }

  int64_t size() const { return static_cast<int64_t>(branches.size()); }

  // Removes branches whose code is not 0, also from the plan's items; what the other queries read does not change.
  void drop(const std::vector<int64_t>& code) {
    std::vector<int32_t> before(branches.size() + 1, 0);  // how many of the first t stay
    for (int64_t t = 0; t < size(); ++t) {
      before[t + 1] = before[t] + (code[t] == 0);
      if (code[t] != 0) continue;
      branches[before[t]] = branches[t];
      places[before[t]] = places[t];
    }
    for (PlanItem& item : items) {
      item.query_begin = before[item.query_begin];
      item.query_end = before[item.query_end];
    }
    const auto empty = [](const PlanItem& item) { return item.query_begin == item.query_end; };
    items.erase(std::remove_if(items.begin(), items.end(), empty), items.end());
    branches.resize(before.back());
    places.resize(before.back());
  }

  std::vector<int64_t> branches, places;
  std::vector<PlanItem> items;
};

inline DecodeRun run_steps(const Kernels& kernels, const Decoder& decoder, DecoderRows rows, const Branches& branches,
                           Running running, const RunLimits& limits) {
  DecodeRun run;
  std::vector<int64_t> code(running.size());
  int64_t ended = 0;
  bool lacks_page = false;
  while (running.size() > 0 && run.steps < limits.most_steps && ended <= limits.most_ended && !lacks_page) {
    rows.num_rows = running.size();
    rows.items = reinterpret_cast<const int32_t*>(running.items.data());
    rows.num_items = static_cast<int64_t>(running.items.size());
    run.failed = kernels.decoder_step(decoder, rows, branches, running.branches.data(), code.data());
    if (run.failed >= 0) break;
    ++run.steps;
    run.rows += running.size();
    const int64_t ended_before = ended;
    for (int64_t t = 0; t < running.size(); ++t) {
      const int64_t branch = running.branches[t], given = static_cast<int64_t>(run.paged.size());
      if (code[t] == kLacksPage && given < limits.num_spare) {
        rows.page_table[branch * rows.table_width + (branches.length[branch] - 1) / rows.page_size] =
            limits.spare[given];
        run.paged.push_back(running.places[t]);
        code[t] = 0;
      }
      if (code[t] == 0) continue;
      run.events.emplace_back(running.places[t], code[t]);
      lacks_page |= code[t] == kLacksPage;
      ended += code[t] != kLacksPage;
    }
    if (ended > ended_before) running.drop(code);
  }
  return run;
}

}  // namespace ibtpo
