// The ops that take tensors; see direct.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "kernels.h"

namespace ibtpo {

const Kernels& current();                  // the kernels in use; module.cpp
void define_direct(nanobind::module_& m);  // the submodule `direct`

// Rows of keys and values to copy to slots of row_size bytes; slot -1 skips the row.
struct Append {
  const char *k, *v;  // rows lie k_stride, v_stride bytes apart
  char *k_pages, *v_pages;
  const int64_t* slots;
  int64_t count, row_size, k_stride, v_stride, num_slots;
};

// Returns -1, or the first row with a bad slot, in which case nothing is written.
int64_t append(const Append&);

}  // namespace ibtpo
