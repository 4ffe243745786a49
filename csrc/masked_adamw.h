// What masm::masked_adamw_ asks of its arguments on every device. (What segments and mask hold is looked at by the
// kernels: a host would have to wait for it.)
#pragma once
#include "checks.h"

namespace masm {

inline void check_masked_adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                               const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                               const Tensor& steps, const Tensor& mask, const Tensor& segments, const Tensor& hyper,
                               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(
      grads.size() == params.size() && exp_avgs.size() == params.size() && exp_avg_sqs.size() == params.size(),
      "masm::masked_adamw_: params, grads, exp_avgs and exp_avg_sqs must have one length, got ", params.size(), ", ",
      grads.size(), ", ", exp_avgs.size(), ", ", exp_avg_sqs.size());
  const auto device = mask.get_device_index();  // -1 on the CPU
  const auto check_device = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.get_device_index() == device, "masm::masked_adamw_: ", name,
                    " lies on another device than mask; all tensors must be on one");
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const auto &p = params[i], &g = grads[i], &m = exp_avgs[i], &v = exp_avg_sqs[i];
    const auto type = p.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || is_half(type),
                    "masm::masked_adamw_: parameter ", i, " must be floating point");
    STD_TORCH_CHECK(p.is_contiguous() && g.is_contiguous() && m.is_contiguous() && v.is_contiguous(),
                    "masm::masked_adamw_: tensors of parameter ", i, " must be contiguous");
    STD_TORCH_CHECK(
        g.scalar_type() == type && m.scalar_type() == accumulate_type(type) && v.scalar_type() == accumulate_type(type),
        "masm::masked_adamw_: parameter ", i,
        ": the gradient must have its dtype, the moments float32 (float64 for float64)");
    const int64_t n = p.numel();
    STD_TORCH_CHECK(g.numel() == n && m.numel() == n && v.numel() == n, "masm::masked_adamw_: parameter ", i, " has ",
                    n, " elements, its gradient ", g.numel());
    for (const auto* t : {&p, &g, &m, &v}) check_device("a tensor of a parameter", *t);
  }
  const int64_t B = mask.numel();
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Float && mask.is_contiguous(),
                  "masm::masked_adamw_: mask must be float32 [B]");
  STD_TORCH_CHECK(steps.scalar_type() == ScalarType::Long && steps.numel() == B && steps.is_contiguous(),
                  "masm::masked_adamw_: steps must be int64 [B] = [", B, "], got ", shape_of(steps));
  STD_TORCH_CHECK(segments.dim() == 2 && segments.size(1) == 4 && segments.scalar_type() == ScalarType::Long &&
                      segments.is_contiguous(),
                  "masm::masked_adamw_: segments must be int64 [S, 4], got ", shape_of(segments));
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(0) == int64_t(params.size()) && hyper.size(1) == 5 &&
                      hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(),
                  "masm::masked_adamw_: hyper must be float64 [T, 5] = [", params.size(), ", 5], got ",
                  shape_of(hyper));
  check_device("steps", steps), check_device("segments", segments), check_device("hyper", hyper);
  const auto check_scalar = [&](const char* name, const std::optional<Tensor>& t) {
    if (!t) return;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1, "masm::masked_adamw_: ", name,
                    " must be one float32 element, got ", shape_of(*t));
    check_device(name, *t);
  };
  check_scalar("grad_scale", grad_scale), check_scalar("found_inf", found_inf);
}

}  // namespace masm
