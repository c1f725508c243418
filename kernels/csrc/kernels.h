// The compiled kernels, as one table of function pointers per instruction set.
//
// Every source that includes simd.h is compiled once per instruction set, each time into its own namespace
// (IBTPO_ISA); module.cpp picks one table when the module is loaded. Those sources must not instantiate templates of
// the standard library: the linker would keep one copy for all, perhaps one with instructions that this CPU lacks.
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

template <class T>  // float or bf16
struct TreeForward {
  const T *q, *k, *v;  // [N, Hq, D], [N, Hkv, D] x 2; D is even if T is bf16
  const int32_t* end;  // [N]
  T* out;              // [N, Hq, D]
  float* lse;          // [Hq, N]
};

template <class T>
struct TreeBackward {
  const T *q, *k, *v, *out;
  const float* lse;
  const T* d_out;
  const int32_t* end;
  T *dq, *dk, *dv;
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

// Columns [first_col, first_col + num_cols) of rows [first_row, first_row + num_rows) of hidden weight^T; see
// logits.cpp.
struct LogitTile {
  void* u;  // [num_rows, num_cols], float or, if `half`, bfloat16
  int64_t num_rows, num_cols, first_row, first_col;
  float inv_temperature, softcap;  // softcap 0: none
  bool half;
};

struct LogitEdges {
  const int64_t *rows, *targets;  // [count], indices into all rows and all columns
  int64_t count;
};

constexpr int64_t kPanel = 64;  // columns of a product that are computed together

template <class T>  // float or bf16; K and x_stride are even if T is bf16
struct Linear {
  const T *x, *weight, *bias;  // [M, K] with rows x_stride apart, [N, K], [N] or null
  T* out;                      // [M, N] with rows out_stride apart
  int64_t num_rows, num_cols, depth, x_stride, out_stride;
  bool add;             // to what is in `out`
  bool packed = false;  // weight is [ceil(N / kPanel), K, kPanel], zeros beyond N; K in words of tile.h
};

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
  const int64_t *rows = nullptr, *given = nullptr;  // [B], or null: rows of the logits, tokens given instead of drawn
};

// The ops between the matrix products, for activations and weights stored as T.
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

// The structs from here to `Branches` are filled by ibtpo_kernels/decoder.py, field by field as 64-bit integers.

struct DecoderLayer {  // weights [out, in], packed as in Linear; biases and the norms of single heads may be null
  const float *attention_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias;
  const float *mlp_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
};

struct Decoder {
  int64_t num_layers, hidden, inner, num_heads, num_kv_heads, head_dim, vocabulary, num_positions;
  const float *embedding, *norm, *head;  // [V, H], [H], [V, H] packed
  const float *cos, *sin;                // [num_positions, D/2]
  const float* eps;                      // [1]
  const DecoderLayer* layers;            // [num_layers]
};

// A page pool and T rows to run over it; row rows[t] of the page table holds the pages of row t's path.
struct DecoderRows {
  int64_t num_pages, page_size, table_rows, table_width, num_rows, num_items;
  float *k_pages, *v_pages;             // [num_layers, num_pages, page_size, Hkv, D]
  int32_t* page_table;                  // [R, P]
  const int32_t* items;                 // [I, 4]
  const int32_t *rows, *lengths;        // [T], lengths = pos + 1
  const int64_t *tokens, *pos, *slots;  // [T]; slots as in RopeAppend
  float* out;                           // [T, H], hidden states after the final norm
};

// Running branches as a structure of arrays; a step chooses B of them by index. See ibtpo_engine/slots.py.
struct Branches {
  int64_t num_stops, width;
  const int32_t *start, *limit, *before;     // [S]: depth of the first sampled token, depth to end at, token before it
  int32_t* length;                           // [S]: depth of the next token
  const int64_t *stream, *stops;             // [S], [S, num_stops]
  const float *temperature, *top_p, *min_p;  // [S]
  const int32_t* top_k;                      // [S]
  int32_t* tokens;                           // [S, width]: what was sampled, with its
  float *logprob, *logprob_raw, *entropy;    // [S, width]
};

constexpr int64_t kLacksPage = 3;  // code of a branch that continues but has no page for its next token yet

// Functions returning int64_t give -1, or the index of the first query, token or row in error.
struct Kernels {
  const char* isa;
  void (*tree_forward)(const TreeShape&, const TreeForward<float>&);
  void (*tree_backward)(const TreeShape&, const TreeBackward<float>&);
  void (*tree_forward_bf16)(const TreeShape&, const TreeForward<bf16>&);
  void (*tree_backward_bf16)(const TreeShape&, const TreeBackward<bf16>&);
  int64_t (*tree_decode)(const Decode<float>&);
  int64_t (*tree_decode_bf16)(const Decode<bf16>&);  // even head sizes and page sizes only
  const Pointwise<float>& f32;
  const Pointwise<bf16>& half;
  void (*logit_stats)(const LogitTile&, const LogitEdges&, float* stats, int64_t total_rows, float* chosen);
  void (*logit_finish)(float* stats, int64_t total_rows, const LogitEdges&, float* chosen);
  void (*logit_grad)(const LogitTile&, const LogitEdges&, const float* stats, int64_t total_rows,
                     const float* grad_rows, const float* grad_entropy, const float* grads);
  int64_t (*sample)(const Sample&);
  void (*linear)(const Linear<float>&);
  void (*linear_bf16)(const Linear<bf16>&);
  int64_t (*decoder_forward)(const Decoder&, const DecoderRows&);
  // Runs the last token of each branch chosen [B] and samples the next. code [B]: 0 goes on, 1 stop token, 2 length, or
  // kLacksPage. An error T + t: row t has no distribution; nothing is recorded.
  int64_t (*decoder_step)(const Decoder&, DecoderRows, const Branches&, const int64_t* chosen, int64_t* code);
  // A step of num_rows rows follows soon: wakes the threads it will use.
  void (*decoder_announce)(const Decoder&, int64_t num_rows);
};

namespace v4amx {
extern const Kernels kernels;
}
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
