// Python bindings: addresses and sizes in, only error positions out.
//
// Arrays arrive as addresses (Tensor.data_ptr()), after ibtpo_kernels/cpu.py has checked shapes, dtypes and strides: an
// address costs a tenth of nanobind's DLPack exchange, which matters in a decode step of a small model. Work that can
// take long releases the GIL.
#include <nanobind/nanobind.h>

#if defined(IBTPO_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode_run.h"
#include "direct.h"
#include "kernels.h"
#include "plan.h"
#include "work.h"

namespace nb = nanobind;
using namespace ibtpo;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#if defined(IBTPO_AMX)
// Whether the CPU has AMX for bfloat16 and Linux grants this process its registers, which this requests.
bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBits) != kBits) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// The built instruction sets that this CPU runs, best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(IBTPO_X86)
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_v4 && __builtin_cpu_supports("avx512bf16");
#if defined(IBTPO_AMX)
  if (has_bf16 && has_amx()) found.push_back(&v4amx::kernels);
#endif
  if (has_bf16) found.push_back(&v4bf16::kernels);
  if (has_v4) found.push_back(&v4::kernels);
  if (has_v3) found.push_back(&v3::kernels);
#if defined(IBTPO_EMULATE_AVX512)
  if (!has_v4) found.push_back(&v4::kernels);  // emulated: it runs on any CPU, slowly
#endif
#endif
  found.push_back(&baseline::kernels);
  return found;
}

// One value a row: the caller's array, or copies of a single value.
template <class T>
struct Column {
  Column(uintptr_t address, T all, int64_t count)
      : copies(address == 0 ? count : 0, all), data(address == 0 ? copies.data() : at<T>(address)) {}
  const std::vector<T> copies;
  const T* const data;
};

template <class T>
TreeForward<T> tree_forward_args(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t end, uintptr_t out, uintptr_t lse) {
  return {at<T>(q), at<T>(k), at<T>(v), at<int32_t>(end), at<T>(out), at<float>(lse)};
}

template <class T>
TreeBackward<T> tree_backward_args(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t d_out,
                                   uintptr_t end, uintptr_t dq, uintptr_t dk, uintptr_t dv) {
  return {at<T>(q),     at<T>(k),         at<T>(v),  at<T>(out), at<float>(lse),
          at<T>(d_out), at<int32_t>(end), at<T>(dq), at<T>(dk),  at<T>(dv)};
}

const Kernels* active = &baseline::kernels;

}  // namespace

const Kernels& ibtpo::current() { return *active; }

NB_MODULE(_cpu, m) {
  active = runnable().front();
  using Address = uintptr_t;
  const auto release = nb::call_guard<nb::gil_scoped_release>();

  define_direct(m);

  m.def("isa", [] { return active->isa; });
  m.attr("panel") = kPanel;

  m.def("use_isa", [](const char* name) {  // for tests: run the kernels of a lesser instruction set
    for (const Kernels* kernels : runnable())
      if (!strcmp(name, kernels->isa)) {
        active = kernels;
        return true;
      }
    return false;
  });

  m.def(
      "tree_forward",
      [](Address q, Address k, Address v, Address end, Address out, Address lse, int64_t num_tokens, int64_t num_heads,
         int64_t num_kv_heads, int64_t head_dim, float scale, bool is_bf16) {
        const TreeShape shape{num_tokens, num_heads, num_kv_heads, head_dim, scale};
        if (is_bf16)
          active->tree_forward_bf16(shape, tree_forward_args<bf16>(q, k, v, end, out, lse));
        else
          active->tree_forward(shape, tree_forward_args<float>(q, k, v, end, out, lse));
      },
      release);

  m.def(
      "tree_backward",
      [](Address q, Address k, Address v, Address out, Address lse, Address d_out, Address end, Address dq, Address dk,
         Address dv, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
         bool is_bf16) {
        const TreeShape shape{num_tokens, num_heads, num_kv_heads, head_dim, scale};
        if (is_bf16)
          active->tree_backward_bf16(shape, tree_backward_args<bf16>(q, k, v, out, lse, d_out, end, dq, dk, dv));
        else
          active->tree_backward(shape, tree_backward_args<float>(q, k, v, out, lse, d_out, end, dq, dk, dv));
      },
      release);

  m.def(
      "tree_decode",
      [](Address q, Address k_pages, Address v_pages, Address page_table, Address rows, Address lengths, Address items,
         Address out, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_pages,
         int64_t page_size, int64_t num_rows, int64_t table_width, int64_t num_items, float scale, bool is_bf16) {
        const auto run = [&](auto type, auto kernel) {
          using T = decltype(type);
          return kernel(Decode<T>{at<T>(q), at<T>(k_pages), at<T>(v_pages), at<int32_t>(page_table), at<int32_t>(rows),
                                  at<int32_t>(lengths), at<int32_t>(items), at<T>(out), num_queries, num_heads,
                                  num_kv_heads, head_dim, num_pages, page_size, num_rows, table_width, num_items,
                                  scale});
        };
        return is_bf16 ? run(bf16{}, active->tree_decode_bf16) : run(0.0f, active->tree_decode);
      },
      release);

  // Sizes and strides in bytes.
  m.def("append_kv", [](Address k, Address v, Address k_pages, Address v_pages, Address slots, int64_t count,
                        int64_t row_size, int64_t k_stride, int64_t v_stride, int64_t num_slots) {
    return append({at<char>(k), at<char>(v), at<char>(k_pages), at<char>(v_pages), at<int64_t>(slots), count, row_size,
                   k_stride, v_stride, num_slots});
  });

  // From here to silu_mul_backward: `half` says that activations and weights are bfloat16, otherwise float.
  m.def("rope_append", [](Address q, Address k, Address v, Address cos, Address sin, Address q_weight, Address k_weight,
                          Address q_out, Address k_pages, Address v_pages, Address slots, int64_t num_tokens,
                          int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t q_stride, int64_t k_stride,
                          int64_t v_stride, int64_t num_slots, float eps, bool half) {
    return by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      return ops.rope_append({at<T>(q),           at<T>(k),        at<T>(v),     at<float>(cos), at<float>(sin),
                              at<T>(q_weight),    at<T>(k_weight), at<T>(q_out), at<T>(k_pages), at<T>(v_pages),
                              at<int64_t>(slots), num_tokens,      num_heads,    num_kv_heads,   head_dim,
                              q_stride,           k_stride,        v_stride,     num_slots,      eps});
    });
  });

  m.def("rope", [](Address x, Address cos, Address sin, Address out, int64_t num_tokens, int64_t num_heads,
                   int64_t head_dim, float direction, bool half) {
    by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      ops.rope(at<T>(x), at<float>(cos), at<float>(sin), at<T>(out), num_tokens, num_heads, head_dim, direction);
    });
  });

  m.def("rms_norm", [](Address x, Address weight, Address out, int64_t num_rows, int64_t size, float eps, bool half) {
    by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      ops.rms_norm(at<T>(x), at<T>(weight), at<T>(out), num_rows, size, eps);
    });
  });

  m.def("add_rms_norm", [](Address x, Address residual, Address weight, Address out, Address total, int64_t num_rows,
                           int64_t size, float eps, bool half) {
    by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      ops.add_rms_norm(at<T>(x), at<T>(residual), at<T>(weight), at<T>(out), at<T>(total), num_rows, size, eps);
    });
  });

  // d_total 0: there is none.
  m.def("rms_norm_backward", [](Address x, Address weight, Address d_out, Address dx, Address d_weight,
                                int64_t num_rows, int64_t size, float eps, Address d_total, bool half) {
    by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      ops.rms_norm_backward(at<T>(x), at<T>(weight), at<T>(d_out), at<T>(dx), at<T>(d_weight), num_rows, size, eps,
                            at<T>(d_total));
    });
  });

  m.def("silu_mul", [](Address gate, Address up, Address out, int64_t num_rows, int64_t size, int64_t gate_stride,
                       int64_t up_stride, bool half) {
    by_element(half, [&](const auto& ops, auto element) {
      using T = decltype(element);
      ops.silu_mul(at<T>(gate), at<T>(up), at<T>(out), num_rows, size, gate_stride, up_stride);
    });
  });

  m.def("silu_mul_backward",
        [](Address gate, Address up, Address d_out, Address d_gate, Address d_up, int64_t count, bool half) {
          by_element(half, [&](const auto& ops, auto element) {
            using T = decltype(element);
            ops.silu_mul_backward(at<T>(gate), at<T>(up), at<T>(d_out), at<T>(d_gate), at<T>(d_up), count);
          });
        });

  m.def(
      "logit_stats",
      [](Address u, int64_t num_rows, int64_t num_cols, int64_t first_row, int64_t first_col, float inv_temperature,
         float softcap, bool half, Address rows, Address targets, int64_t num_edges, Address stats, int64_t total_rows,
         Address chosen) {
        active->logit_stats({at<void>(u), num_rows, num_cols, first_row, first_col, inv_temperature, softcap, half},
                            {at<int64_t>(rows), at<int64_t>(targets), num_edges}, at<float>(stats), total_rows,
                            at<float>(chosen));
      },
      release);

  m.def(
      "logit_finish",
      [](Address stats, int64_t total_rows, Address rows, Address targets, int64_t num_edges, Address chosen) {
        active->logit_finish(at<float>(stats), total_rows, {at<int64_t>(rows), at<int64_t>(targets), num_edges},
                             at<float>(chosen));
      },
      release);

  m.def(
      "logit_grad",
      [](Address u, int64_t num_rows, int64_t num_cols, int64_t first_row, int64_t first_col, float inv_temperature,
         float softcap, bool half, Address rows, Address targets, int64_t num_edges, Address stats, int64_t total_rows,
         Address grad_rows, Address grad_entropy, Address grads) {
        active->logit_grad({at<void>(u), num_rows, num_cols, first_row, first_col, inv_temperature, softcap, half},
                           {at<int64_t>(rows), at<int64_t>(targets), num_edges}, at<float>(stats), total_rows,
                           at<float>(grad_rows), at<float>(grad_entropy), at<float>(grads));
      },
      release);

  m.def(
      "linear",
      [](Address x, Address weight, Address bias, Address out, int64_t num_rows, int64_t num_cols, int64_t depth,
         int64_t x_stride, bool is_bf16) {
        const auto run = [&](auto type, auto kernel) {
          using T = decltype(type);
          kernel(Linear<T>{at<T>(x), at<T>(weight), at<T>(bias), at<T>(out), num_rows, num_cols, depth, x_stride,
                           num_cols, false});
        };
        is_bf16 ? run(bf16{}, active->linear_bf16) : run(0.0f, active->linear);
      },
      release);

  // Addresses of structs of kernels.h.
  m.def(
      "decoder_forward",
      [](Address decoder, Address rows) {
        return active->decoder_forward(*at<Decoder>(decoder), *at<DecoderRows>(rows));
      },
      release);

  // Returns (steps, rows, [(place, code), ...], [place, ...]) as in DecodeRun, or the error of the first step; an error
  // in a later step ends the run, and the next call meets it again.
  m.def("decoder_steps",
        [](Address decoder, Address pool, Address branches, Address chosen, int64_t count, Address items,
           int64_t num_items, int64_t most_steps, int64_t most_ended, Address spare, int64_t num_spare) -> nb::object {
          DecodeRun run;
          {
            const nb::gil_scoped_release released;
            run = run_steps(*active, *at<Decoder>(decoder), *at<DecoderRows>(pool), *at<Branches>(branches),
                            {at<int64_t>(chosen), count, at<PlanItem>(items), num_items},
                            {most_steps, most_ended, at<int32_t>(spare), num_spare});
          }
          if (run.steps == 0) return nb::cast(run.failed);
          nb::list events, paged;
          for (const auto& [place, code] : run.events) events.append(nb::make_tuple(place, code));
          for (const int64_t place : run.paged) paged.append(place);
          return nb::make_tuple(run.steps, run.rows, events, paged);
        });

  m.def("decoder_announce",
        [](Address decoder, int64_t num_rows) { active->decoder_announce(*at<Decoder>(decoder), num_rows); });

  // temperature, top_p, top_k, min_p: the address of one value a row, or 0 and one value for all.
  m.def(
      "sample",
      [](Address logits, Address keys, Address temperature, Address top_p, Address top_k, Address min_p,
         double temperature_all, double top_p_all, int64_t top_k_all, double min_p_all, Address token, Address logprob,
         Address logprob_raw, Address entropy, int64_t num_rows, int64_t vocabulary, bool half) {
        const Column<double> temperatures(temperature, temperature_all, num_rows), masses(top_p, top_p_all, num_rows),
            floors(min_p, min_p_all, num_rows);
        const Column<int64_t> counts(top_k, top_k_all, num_rows);
        return active->sample({half ? nullptr : at<float>(logits), at<int64_t>(keys), temperatures.data, masses.data,
                               counts.data, at<int64_t>(token), at<float>(logprob), at<float>(logprob_raw),
                               at<float>(entropy), num_rows, vocabulary, floors.data,
                               half ? at<bf16>(logits) : nullptr});
      },
      release);

  // The log-probs that `sample`, without filters, would report had it drawn token given[e] from row rows[e] of the
  // logits; token: [E], overwritten.
  m.def(
      "sampled_logprob",
      [](Address logits, Address rows, Address given, double temperature, Address token, Address logprob,
         Address logprob_raw, Address entropy, int64_t num_edges, int64_t vocabulary, bool half) {
        const Column<double> temperatures(0, temperature, num_edges), masses(0, 1.0, num_edges);
        const Column<int64_t> counts(0, 0, num_edges);
        return active->sample({half ? nullptr : at<float>(logits), nullptr, temperatures.data, masses.data, counts.data,
                               at<int64_t>(token), at<float>(logprob), at<float>(logprob_raw), at<float>(entropy),
                               num_edges, vocabulary, nullptr, half ? at<bf16>(logits) : nullptr, at<int64_t>(rows),
                               at<int64_t>(given)});
      },
      release);

  // The first token whose subtree extends past that of an ancestor; -1 if there is none.
  m.def("first_crossing", [](Address end, int64_t num_tokens) -> int64_t {
    std::vector<int32_t> above;
    for (int64_t i = 0; i < num_tokens; ++i) {
      const int32_t stop = at<int32_t>(end)[i];
      while (!above.empty() && above.back() <= i) above.pop_back();
      if (!above.empty() && stop > above.back()) return i;
      above.push_back(stop);
    }
    return -1;
  });

  // Writes at most 2 B items of four int32 to `items` and returns how many, or -1 - b where query b is out of range.
  // state: the address of int32 [3, R] (see PlanState), or 0 to compare every page.
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

  // The work of a plan as (bytes of its items, bytes of first_slot, has_wide).
  m.def("decode_work", [](Address items, Address lengths, int64_t num_items, int64_t num_queries, int64_t width,
                          int64_t page_size, int64_t split_pages, int64_t group, int64_t narrow, int64_t wide) {
    const WorkList work = work_list({at<PlanItem>(items), at<int32_t>(lengths), num_items, num_queries, width,
                                     page_size, split_pages, group, narrow, wide});
    return nb::make_tuple(nb::bytes(work.items.data(), work.items.size() * sizeof(WorkItem)),
                          nb::bytes(work.first_slot.data(), work.first_slot.size() * sizeof(int32_t)), work.has_wide);
  });
}
