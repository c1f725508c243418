// This instruction set's entry in the table of kernels.
#include "kernels.h"

namespace ibtpo::IBTPO_ISA {

#define STRING(x) #x
#define NAME(x) STRING(x)

void tree_forward(const TreeShape&, const TreeForward<float>&);
void tree_backward(const TreeShape&, const TreeBackward<float>&);
void tree_forward_bf16(const TreeShape&, const TreeForward<bf16>&);
void tree_backward_bf16(const TreeShape&, const TreeBackward<bf16>&);
int64_t tree_decode(const Decode<float>&);
int64_t tree_decode_bf16(const Decode<bf16>&);
void logit_stats(const LogitTile&, const LogitEdges&, float*, int64_t, float*);
void logit_finish(float*, int64_t, const LogitEdges&, float*);
void logit_grad(const LogitTile&, const LogitEdges&, const float*, int64_t, const float*, const float*, const float*);
int64_t sample(const Sample&);
void linear(const Linear<float>&);
void linear_bf16(const Linear<bf16>&);
int64_t decoder_forward(const Decoder&, const DecoderRows&);
int64_t decoder_step(const Decoder&, DecoderRows, const Branches&, const int64_t*, int64_t*);
void decoder_announce(const Decoder&, int64_t);

extern const Pointwise<float> pointwise_f32;
extern const Pointwise<bf16> pointwise_bf16;

extern const Kernels kernels = {
    NAME(IBTPO_ISA),  tree_forward,  tree_backward,  tree_forward_bf16, tree_backward_bf16, tree_decode,
    tree_decode_bf16, pointwise_f32, pointwise_bf16, logit_stats,       logit_finish,       logit_grad,
    sample,           linear,        linear_bf16,    decoder_forward,   decoder_step,       decoder_announce,
};

}  // namespace ibtpo::IBTPO_ISA
