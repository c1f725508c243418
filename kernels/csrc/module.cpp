// Python bindings: addresses and sizes in, nothing out but error positions.
//
// Arrays arrive as addresses (Tensor.data_ptr()): ibtpo_kernels/cpu.py has checked shapes, dtypes and strides, and an
// address costs a tenth of a DLPack exchange, which a decode step of a small model would notice. Work that can be long
// releases the GIL.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "direct.h"
#include "kernels.h"
#include "plan.h"

namespace nb = nanobind;
using namespace ibtpo;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& choose() {
#if defined(IBTPO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return v4::kernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return v3::kernels;
#endif
  return baseline::kernels;
}

// One value a row: the caller's array, or copies of a single value.
template <class T>
struct Column {
  Column(uintptr_t address, T all, int64_t count)
      : copies(address == 0 ? count : 0, all), data(address == 0 ? copies.data() : at<T>(address)) {}
  const std::vector<T> copies;
  const T* const data;
};

const Kernels* active = &baseline::kernels;

}  // namespace

const Kernels& ibtpo::current() { return *active; }

NB_MODULE(_cpu, m) {
  active = &choose();
  using Address = uintptr_t;
  const auto release = nb::call_guard<nb::gil_scoped_release>();

  define_direct(m);

  m.def("isa", [] { return active->isa; });

  m.def("use_isa", [](const char* name) {  // for tests: run the kernels of a lesser instruction set
    const Kernels* chosen = nullptr;
#if defined(IBTPO_X86)
    if (!strcmp(name, "v4") && &choose() == &v4::kernels) chosen = &v4::kernels;
    if (!strcmp(name, "v3") && &choose() != &baseline::kernels) chosen = &v3::kernels;
#endif
    if (!strcmp(name, "baseline")) chosen = &baseline::kernels;
    if (chosen != nullptr) active = chosen;
    return chosen != nullptr;
  });

  m.def(
      "tree_forward",
      [](Address q, Address k, Address v, Address end, Address out, Address lse, int64_t num_tokens, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, float scale) {
        active->tree_forward(
            {num_tokens, num_heads, num_kv_heads, head_dim, scale},
            {at<float>(q), at<float>(k), at<float>(v), at<int32_t>(end), at<float>(out), at<float>(lse)});
      },
      release);

  m.def(
      "tree_backward",
      [](Address q, Address k, Address v, Address out, Address lse, Address d_out, Address end, Address dq, Address dk,
         Address dv, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale) {
        active->tree_backward({num_tokens, num_heads, num_kv_heads, head_dim, scale},
                              {at<float>(q), at<float>(k), at<float>(v), at<float>(out), at<float>(lse),
                               at<float>(d_out), at<int32_t>(end), at<float>(dq), at<float>(dk), at<float>(dv)});
      },
      release);

  m.def(
      "tree_decode",
      [](Address q, Address k_pages, Address v_pages, Address page_table, Address rows, Address lengths, Address items,
         Address out, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_pages,
         int64_t page_size, int64_t num_rows, int64_t table_width, int64_t num_items, float scale) {
        return active->tree_decode({at<float>(q), at<float>(k_pages), at<float>(v_pages), at<int32_t>(page_table),
                                    at<int32_t>(rows), at<int32_t>(lengths), at<int32_t>(items), at<float>(out),
                                    num_queries, num_heads, num_kv_heads, head_dim, num_pages, page_size, num_rows,
                                    table_width, num_items, scale});
      },
      release);

  // Sizes and strides in bytes.
  m.def("append_kv", [](Address k, Address v, Address k_pages, Address v_pages, Address slots, int64_t count,
                        int64_t row_size, int64_t k_stride, int64_t v_stride, int64_t num_slots) {
    return append({at<char>(k), at<char>(v), at<char>(k_pages), at<char>(v_pages), at<int64_t>(slots), count, row_size,
                   k_stride, v_stride, num_slots});
  });

  m.def("rope_append",
        [](Address q, Address k, Address v, Address cos, Address sin, Address q_weight, Address k_weight, Address q_out,
           Address k_pages, Address v_pages, Address slots, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
           int64_t head_dim, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t num_slots, float eps) {
          return active->rope_append({at<float>(q),
                                      at<float>(k),
                                      at<float>(v),
                                      at<float>(cos),
                                      at<float>(sin),
                                      at<float>(q_weight),
                                      at<float>(k_weight),
                                      at<float>(q_out),
                                      at<float>(k_pages),
                                      at<float>(v_pages),
                                      at<int64_t>(slots),
                                      num_tokens,
                                      num_heads,
                                      num_kv_heads,
                                      head_dim,
                                      q_stride,
                                      k_stride,
                                      v_stride,
                                      num_slots,
                                      eps});
        });

  m.def("rope", [](Address x, Address cos, Address sin, Address out, int64_t num_tokens, int64_t num_heads,
                   int64_t head_dim, float direction) {
    active->rope(at<float>(x), at<float>(cos), at<float>(sin), at<float>(out), num_tokens, num_heads, head_dim,
                 direction);
  });

  m.def("rms_norm", [](Address x, Address weight, Address out, int64_t num_rows, int64_t size, float eps) {
    active->rms_norm(at<float>(x), at<float>(weight), at<float>(out), num_rows, size, eps);
  });

  m.def("rms_norm_backward", [](Address x, Address weight, Address d_out, Address dx, Address d_weight,
                                int64_t num_rows, int64_t size, float eps) {
    active->rms_norm_backward(at<float>(x), at<float>(weight), at<float>(d_out), at<float>(dx), at<float>(d_weight),
                              num_rows, size, eps);
  });

  m.def("silu_mul", [](Address gate, Address up, Address out, int64_t num_rows, int64_t size, int64_t gate_stride,
                       int64_t up_stride) {
    active->silu_mul(at<float>(gate), at<float>(up), at<float>(out), num_rows, size, gate_stride, up_stride);
  });

  m.def("silu_mul_backward", [](Address gate, Address up, Address d_out, Address d_gate, Address d_up, int64_t count) {
    active->silu_mul_backward(at<float>(gate), at<float>(up), at<float>(d_out), at<float>(d_gate), at<float>(d_up),
                              count);
  });

  m.def(
      "row_stats",
      [](Address z, Address stats, int64_t num_rows, int64_t size) {
        active->row_stats(at<float>(z), at<float>(stats), num_rows, size);
      },
      release);

  m.def(
      "logit_grad",
      [](Address z, Address stats, Address grad_rows, Address grad_entropy, int64_t num_rows, int64_t size) {
        active->logit_grad(at<float>(z), at<float>(stats), at<float>(grad_rows), at<float>(grad_entropy), num_rows,
                           size);
      },
      release);

  m.def(
      "linear",
      [](Address x, Address weight, Address bias, Address out, int64_t num_rows, int64_t num_cols, int64_t depth,
         int64_t x_stride) {
        active->linear({at<float>(x), at<float>(weight), at<float>(bias), at<float>(out), num_rows, num_cols, depth,
                        x_stride, num_cols, false});
      },
      release);

  // Addresses of structs of kernels.h.
  m.def(
      "decoder_forward",
      [](Address decoder, Address rows) {
        return active->decoder_forward(*at<Decoder>(decoder), *at<DecoderRows>(rows));
      },
      release);

  m.def(
      "decoder_step",
      [](Address decoder, Address pool, Address branches, Address chosen, int64_t count, Address items,
         int64_t num_items, Address code) {
        DecoderRows rows = *at<DecoderRows>(pool);
        rows.num_rows = count;
        rows.items = at<int32_t>(items);
        rows.num_items = num_items;
        return active->decoder_step(*at<Decoder>(decoder), rows, *at<Branches>(branches), at<int64_t>(chosen),
                                    at<int64_t>(code));
      },
      release);

  // temperature, top_p, top_k, min_p: the address of one value a row, or 0 and one value for all.
  m.def(
      "sample",
      [](Address logits, Address keys, Address temperature, Address top_p, Address top_k, Address min_p,
         double temperature_all, double top_p_all, int64_t top_k_all, double min_p_all, Address token, Address logprob,
         Address logprob_raw, Address entropy, int64_t num_rows, int64_t vocabulary) {
        const Column<double> temperatures(temperature, temperature_all, num_rows), masses(top_p, top_p_all, num_rows),
            floors(min_p, min_p_all, num_rows);
        const Column<int64_t> counts(top_k, top_k_all, num_rows);
        return active->sample({at<float>(logits), at<int64_t>(keys), temperatures.data, masses.data, counts.data,
                               at<int64_t>(token), at<float>(logprob), at<float>(logprob_raw), at<float>(entropy),
                               num_rows, vocabulary, floors.data});
      },
      release);

  // Writes at most 2 B items of four int32 to `items` and returns how many, or -1 - b where query b is out of range.
  // state: the address of int32 [3, R] (see PlanState), or 0: compare every page.
  m.def(
      "plan_decode",
      [](Address page_table, Address rows, Address lengths, Address items, Address state, int64_t num_rows,
         int64_t width, int64_t num_queries, int64_t page_size) -> int64_t {
        const PlanInput p{
            at<int32_t>(page_table), at<int32_t>(rows), at<int32_t>(lengths), num_rows, width, num_queries, page_size};
        for (int64_t b = 0; b < num_queries; ++b)
          if (p.rows[b] < 0 || p.rows[b] >= num_rows || p.lengths[b] < 0 || p.lengths[b] > width * page_size)
            return -1 - b;
        const PlanState known{at<int32_t>(state), at<int32_t>(state) + num_rows, at<int32_t>(state) + 2 * num_rows};
        const std::vector<PlanItem> found = plan_items(p, state == 0 ? nullptr : &known);
        std::copy(found.begin(), found.end(), at<PlanItem>(items));
        return static_cast<int64_t>(found.size());
      });
}
