// The compiled kernels, as one table of function pointers per instruction set.
//
// Every source that includes simd.h is compiled once per instruction set, each time into its own namespace
// (IBTPO_ISA); module.cpp picks one table when the module is loaded. Those sources must not instantiate templates of
// the standard library: the linker would keep one copy for all, perhaps the one with instructions this CPU lacks.
//
// Letters: N packed tokens, B queries, Hq/Hkv heads, D head size, V vocabulary. All arrays are dense and row-major
// unless a stride is given; strides count floats.
#pragma once

#include <cstdint>

namespace ibtpo {

// bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

struct TreeShape {
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  float scale;
};

struct TreeForward {
  const float *q, *k, *v;  // [N, Hq, D], [N, Hkv, D] x 2
  const int32_t* end;      // [N]
  float *out, *lse;        // [N, Hq, D], [Hq, N]
};

struct TreeBackward {
  const float *q, *k, *v, *out, *lse, *d_out;
  const int32_t* end;
  float *dq, *dk, *dv;
};

template <class T>  // float or bf16
struct Decode {
  const T *q, *k_pages, *v_pages;                      // [B, Hq, D], [num_pages, page_size, Hkv, D] x 2
  const int32_t *page_table, *rows, *lengths, *items;  // [R, P], [B], [B], [I, 4]
  T* out;                                              // [B, Hq, D]
  int64_t num_queries, num_heads, num_kv_heads, head_dim;
  int64_t num_pages, page_size, num_rows, table_width, num_items;
  float scale;
};

template <class T>
struct RopeAppendOf {
  const T *q, *k, *v;            // [T, Hq, D], [T, Hkv, D] x 2; a token's rows lie q_stride, ... elements apart
  const float *cos, *sin;        // [T, D/2]
  const T *q_weight, *k_weight;  // [D], or null: no norm
  T *q_out, *k_pages, *v_pages;  // [T, Hq, D], [num_slots, Hkv, D] x 2
  const int64_t* slots;          // [T], -1: not kept
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, q_stride, k_stride, v_stride, num_slots;
  float eps;
};
using RopeAppend = RopeAppendOf<float>;

struct Sample {
  const float* logits;                     // [B, V], or null and `half_logits`
  const int64_t* keys;                     // [B, 2]
  const double *temperature, *top_p;       // [B]
  const int64_t* top_k;                    // [B]
  int64_t* token;                          // [B]
  float *logprob, *logprob_raw, *entropy;  // [B]
  int64_t num_rows, vocabulary;
  const double* min_p = nullptr;  // [B], or null: off
  const bf16* half_logits = nullptr;
};

// What stands between the matrix products, for activations and weights stored as T.
template <class T>
struct Pointwise {
  using Element = T;
  int64_t (*rope_append)(const RopeAppendOf<T>&);
  void (*rope)(const T* x, const float* cos, const float* sin, T* out, int64_t num_tokens, int64_t num_heads,
               int64_t head_dim, float direction);  // direction -1: the inverse rotation, which is the backward
  void (*rms_norm)(const T* x, const T* weight, T* out, int64_t num_rows, int64_t size, float eps);
  void (*add_rms_norm)(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t num_rows, int64_t size,
                       float eps);  // total = x + residual, out = rms_norm(total)
  void (*rms_norm_backward)(const T* x, const T* weight, const T* d_out, T* dx, T* d_weight, int64_t num_rows,
                            int64_t size, float eps, const T* d_total);  // d_total, or null, is added to dx
  void (*silu_mul)(const T* gate, const T* up, T* out, int64_t num_rows, int64_t size, int64_t gate_stride,
                   int64_t up_stride);
  void (*silu_mul_backward)(const T* gate, const T* up, const T* d_out, T* d_gate, T* d_up, int64_t count);
};

// Functions returning int64_t give -1, or the index of the first query, token or row that is in error.
struct Kernels {
  const char* isa;
  void (*tree_forward)(const TreeShape&, const TreeForward&);
  void (*tree_backward)(const TreeShape&, const TreeBackward&);
  int64_t (*tree_decode)(const Decode<float>&);
  int64_t (*tree_decode_bf16)(const Decode<bf16>&);  // even head sizes and page sizes only
  const Pointwise<float>& f32;
  const Pointwise<bf16>& half;
  void (*row_stats)(const float* z, float* stats, int64_t num_rows, int64_t size);  // stats [3, num_rows]
  void (*logit_grad)(float* z, const float* stats, const float* grad_rows, const float* grad_entropy, int64_t num_rows,
                     int64_t size);
  int64_t (*sample)(const Sample&);
};

namespace v4bf16 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

}  // namespace ibtpo
