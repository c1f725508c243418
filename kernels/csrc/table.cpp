// This instruction set's entry in the table of kernels.
#include "kernels.h"

namespace ibtpo::IBTPO_ISA {

#define STRING(x) #x
#define NAME(x) STRING(x)

void tree_forward(const TreeShape&, const TreeForward&);
void tree_backward(const TreeShape&, const TreeBackward&);
int64_t tree_decode(const Decode&);
int64_t rope_append(const RopeAppend&);
void rope(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, float);
void rms_norm(const float*, const float*, float*, int64_t, int64_t, float);
void rms_norm_backward(const float*, const float*, const float*, float*, float*, int64_t, int64_t, float);
void silu_mul(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t);
void silu_mul_backward(const float*, const float*, const float*, float*, float*, int64_t);
void row_stats(const float*, float*, int64_t, int64_t);
void logit_grad(float*, const float*, const float*, const float*, int64_t, int64_t);
int64_t sample(const Sample&);
void linear(const Linear&);
int64_t decoder_forward(const Decoder&, const DecoderRows&);
int64_t decoder_step(const Decoder&, DecoderRows, const Branches&, const int64_t*, int64_t*);

extern const Kernels kernels = {
    NAME(IBTPO_ISA),   tree_forward, tree_backward,     tree_decode, rope_append, rope,   rms_norm,
    rms_norm_backward, silu_mul,     silu_mul_backward, row_stats,   logit_grad,  sample, linear,
    decoder_forward,   decoder_step,
};

}  // namespace ibtpo::IBTPO_ISA
