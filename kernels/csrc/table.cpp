// This instruction set's entry in the table of kernels.
#include "kernels.h"

namespace ibtpo::IBTPO_ISA {

#define STRING(x) #x
#define NAME(x) STRING(x)

void tree_forward(const TreeShape&, const TreeForward&);
void tree_backward(const TreeShape&, const TreeBackward&);
int64_t tree_decode(const Decode<float>&);
int64_t tree_decode_bf16(const Decode<bf16>&);
void row_stats(const float*, float*, int64_t, int64_t);
void logit_grad(float*, const float*, const float*, const float*, int64_t, int64_t);
int64_t sample(const Sample&);

extern const Pointwise<float> pointwise_f32;
extern const Pointwise<bf16> pointwise_bf16;

extern const Kernels kernels = {
    NAME(IBTPO_ISA), tree_forward,   tree_backward, tree_decode, tree_decode_bf16,
    pointwise_f32,   pointwise_bf16, row_stats,     logit_grad,  sample,
};

}  // namespace ibtpo::IBTPO_ISA
