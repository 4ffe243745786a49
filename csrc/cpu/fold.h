#pragma once
#include <torch/csrc/stable/tensor.h>

namespace masm::cpu {

// weight + u^T diag(s) v, in the dtype of weight; see masm::fold.
torch::stable::Tensor fold(const torch::stable::Tensor& weight, const torch::stable::Tensor& u,
                           const torch::stable::Tensor& s, const torch::stable::Tensor& v);

}  // namespace masm::cpu
