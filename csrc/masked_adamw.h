// What masm::masked_adamw_ requires of its arguments on every device. The kernels check the
// values in segments and mask: on the host that would mean waiting for the GPU.
#pragma once
#include "contract.h"

namespace masm {

inline void check_masked_adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                               const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                               const std::vector<Tensor>& penalties, const Tensor& steps, const Tensor& mask,
                               const Tensor& segments, const Tensor& hyper, const std::optional<Tensor>& grad_scale,
                               const std::optional<Tensor>& found_inf) {
  const char* op = "masked_adamw_";
  const int64_t T = int64_t(params.size());
  check_dims(op, "mask", mask, 1, "B");
  const int64_t B = mask.size(0);
  const auto check_length = [&](const char* name, const std::vector<Tensor>& list, bool may_be_empty = false) {
    MASM_REQUIRE(int64_t(list.size()) == T || (may_be_empty && list.empty()), "masm::", op, ": expected ", T,
                 " tensors in ", name, ", one a parameter, got ", list.size());
  };
  check_length("grads", grads), check_length("exp_avgs", exp_avgs), check_length("exp_avg_sqs", exp_avg_sqs);
  check_length("penalties", penalties, true);
  // Called for hundreds of parameters a step: names are formatted only for an error.
  for (int64_t i = 0; i < T; ++i) {
    const auto& p = params[i];
    const auto entry = [i](const char* name) { return name + ("[" + std::to_string(i) + "]"); };
    const auto type = p.scalar_type(), wide = accumulate_type(type);
    const bool on_device = p.is_cpu() == mask.is_cpu() && p.get_device_index() == mask.get_device_index();
    if (!is_float(type) || !p.is_contiguous() || !on_device) {
      check_float(op, entry("params"), p);
      check_contiguous(op, entry("params"), p);
      check_device(op, entry("params"), p, "mask", mask);
    }
    const auto like = [&](const char* name, const Tensor& t, ScalarType wanted) {
      bool ok = t.scalar_type() == wanted && t.dim() == p.dim() && t.is_contiguous() && t.is_cpu() == p.is_cpu() &&
                t.get_device_index() == p.get_device_index();
      for (int64_t d = 0; ok && d < p.dim(); ++d) ok = t.size(d) == p.size(d);
      if (!ok) check_operand(op, entry(name), t, "mask", mask, wanted, sizes_of(p));
    };
    like("grads", grads[i], type);
    like("exp_avgs", exp_avgs[i], wide);
    like("exp_avg_sqs", exp_avg_sqs[i], wide);
    if (!penalties.empty() && penalties[i].numel() > 0) like("penalties", penalties[i], wide);
  }
  check_operand(op, "mask", mask, "mask", mask, ScalarType::Float, {B});
  check_operand(op, "steps", steps, "mask", mask, ScalarType::Long, {B});
  check_dims(op, "segments", segments, 2, "S, 4");
  check_operand(op, "segments", segments, "mask", mask, ScalarType::Long, {segments.size(0), 4});
  check_operand(op, "hyper", hyper, "mask", mask, ScalarType::Double, {T, 5});
  if (grad_scale) check_operand(op, "grad_scale", *grad_scale, "mask", mask, ScalarType::Float, {1});
  if (found_inf) check_operand(op, "found_inf", *found_inf, "mask", mask, ScalarType::Float, {1});
}

}  // namespace masm
