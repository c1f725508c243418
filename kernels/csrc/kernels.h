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

struct Decode {
  const float *q, *k_pages, *v_pages;                  // [B, Hq, D], [num_pages, page_size, Hkv, D] x 2
  const int32_t *page_table, *rows, *lengths, *items;  // [R, P], [B], [B], [I, 4]
  float* out;                                          // [B, Hq, D]
  int64_t num_queries, num_heads, num_kv_heads, head_dim;
  int64_t num_pages, page_size, num_rows, table_width, num_items;
  float scale;
};

struct RopeAppend {
  const float *q, *k, *v;            // [T, Hq, D], [T, Hkv, D] x 2; a token's rows lie q_stride, ... floats apart
  const float *cos, *sin;            // [T, D/2]
  const float *q_weight, *k_weight;  // [D], or null: no norm
  float *q_out, *k_pages, *v_pages;  // [T, Hq, D], [num_slots, Hkv, D] x 2
  const int64_t* slots;              // [T], -1: not kept
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, q_stride, k_stride, v_stride, num_slots;
  float eps;
};

struct Linear {
  const float *x, *weight, *bias;  // [M, K] with rows x_stride apart, [N, K], [N] or null
  float* out;                      // [M, N] with rows out_stride apart
  int64_t num_rows, num_cols, depth, x_stride, out_stride;
  bool add;  // to what is in `out`
};

struct Sample {
  const float* logits;                     // [B, V]
  const int64_t* keys;                     // [B, 2]
  const double *temperature, *top_p;       // [B]
  const int64_t* top_k;                    // [B]
  int64_t* token;                          // [B]
  float *logprob, *logprob_raw, *entropy;  // [B]
  int64_t num_rows, vocabulary;
};

// Functions returning int64_t give -1, or the index of the first query, token or row that is in error.
struct Kernels {
  const char* isa;
  void (*tree_forward)(const TreeShape&, const TreeForward&);
  void (*tree_backward)(const TreeShape&, const TreeBackward&);
  int64_t (*tree_decode)(const Decode&);
  int64_t (*rope_append)(const RopeAppend&);
  void (*rope)(const float* x, const float* cos, const float* sin, float* out, int64_t num_tokens, int64_t num_heads,
               int64_t head_dim, float direction);  // direction -1: the inverse rotation, which is the backward
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t num_rows, int64_t size, float eps);
  void (*rms_norm_backward)(const float* x, const float* weight, const float* d_out, float* dx, float* d_weight,
                            int64_t num_rows, int64_t size, float eps);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t num_rows, int64_t size, int64_t gate_stride,
                   int64_t up_stride);
  void (*silu_mul_backward)(const float* gate, const float* up, const float* d_out, float* d_gate, float* d_up,
                            int64_t count);
  void (*row_stats)(const float* z, float* stats, int64_t num_rows, int64_t size);  // stats [3, num_rows]
  void (*logit_grad)(float* z, const float* stats, const float* grad_rows, const float* grad_entropy, int64_t num_rows,
                     int64_t size);
  int64_t (*sample)(const Sample&);
  void (*linear)(const Linear&);
};

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
