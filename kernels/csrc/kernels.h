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
  const double* min_p = nullptr;  // [B], or null: off
};

// The structs from here to `Branches` are filled by ibtpo_kernels/decoder.py, field by field as 64-bit integers.

struct DecoderLayer {  // weights [out, in]; biases and the norms of single heads may be null
  const float *attention_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias;
  const float *mlp_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
};

struct Decoder {
  int64_t num_layers, hidden, inner, num_heads, num_kv_heads, head_dim, vocabulary, num_positions;
  const float *embedding, *norm, *head;  // [V, H], [H], [V, H]
  const float *cos, *sin;                // [num_positions, D/2]
  const float* eps;                      // [1]
  const DecoderLayer* layers;            // [num_layers]
};

// A page pool, and T rows to run over it: tokens of paths whose pages lie in row rows[t] of the page table.
struct DecoderRows {
  int64_t num_pages, page_size, table_rows, table_width, num_rows, num_items;
  float *k_pages, *v_pages;             // [num_layers, num_pages, page_size, Hkv, D]
  const int32_t *page_table, *items;    // [R, P], [I, 4]
  const int32_t *rows, *lengths;        // [T], lengths = pos + 1
  const int64_t *tokens, *pos, *slots;  // [T]; slots as in RopeAppend
  float* out;                           // [T, H], hidden states after the final norm
};

// Running branches as a structure of arrays, of which a step names B by index; see ibtpo_engine/slots.py.
struct Branches {
  int64_t num_stops, width;
  const int32_t *start, *limit;              // [S]: depth of the first sampled token, and the depth to end at
  int32_t* length;                           // [S]: depth of the next token
  const int64_t *stream, *stops;             // [S], [S, num_stops]
  const float *temperature, *top_p, *min_p;  // [S]
  const int32_t* top_k;                      // [S]
  int32_t* tokens;                           // [S, width]: what was sampled, and of it
  float *logprob, *logprob_raw, *entropy;    // [S, width]
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
  int64_t (*decoder_forward)(const Decoder&, const DecoderRows&);
  // One token for each of the branches chosen [B], whose last one is run first. code [B]: 0 goes on, 1 stop token,
  // 2 length, 3 goes on to a depth that has no page yet. An error T + t: row t has no distribution; nothing is
  // recorded.
  int64_t (*decoder_step)(const Decoder&, DecoderRows, const Branches&, const int64_t* chosen, int64_t* code);
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
