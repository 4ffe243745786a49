// One element of the masked AdamW update, shared by the CPU and CUDA kernels. Order of operations: torch.optim.AdamW
// (Loshchilov & Hutter 2019, arXiv 1711.05101), so that an unmasked step without a penalty agrees with it to rounding.
#pragma once
#include <cmath>

#include "host_device.h"

namespace masm {

template <class F>
struct AdamWStep {  // the constants of a step
  F decay;          // 1 - mask * lr * weight_decay
  F rate;           // mask * lr, of the penalty's gradient
  F one_minus_beta1;
  F beta2, one_minus_beta2;
  F sqrt_correction2;  // sqrt(1 - beta2^t)
  F step_size;         // mask * lr / (1 - beta1^t)
  F eps;
  double signal_scale;  // 1 / (1 - beta1^(t - 1)); 0 at t = 1: no first moment yet
};

template <class F>
MASM_HOST_DEVICE inline AdamWStep<F> adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay,
                                                double mask, double t) {
  AdamWStep<F> c;
  c.decay = F(1 - mask * lr * weight_decay);
  c.rate = F(mask * lr);
  c.one_minus_beta1 = F(1 - beta1);
  c.beta2 = F(beta2);
  c.one_minus_beta2 = F(1 - beta2);
  c.sqrt_correction2 = F(std::sqrt(1 - std::pow(beta2, t)));
  c.step_size = F(mask * lr / (1 - std::pow(beta1, t)));
  c.eps = F(eps);
  c.signal_scale = t > 1 ? 1 / (1 - std::pow(beta1, t - 1)) : 0;
  return c;
}

template <class F>
MASM_HOST_DEVICE inline AdamWStep<F> narrowed(const AdamWStep<double>& c) {
  return {F(c.decay),     F(c.rate), F(c.one_minus_beta1), F(c.beta2), F(c.one_minus_beta2), F(c.sqrt_correction2),
          F(c.step_size), F(c.eps),  c.signal_scale};
}

template <class F>
MASM_HOST_DEVICE inline void adamw_element(const AdamWStep<F>& c, F g, F penalty, F& p, F& m, F& v) {
  p = p * c.decay - c.rate * penalty;
  m = m + c.one_minus_beta1 * (g - m);
  v = v * c.beta2 + c.one_minus_beta2 * g * g;
  p = p - c.step_size * m / (std::sqrt(v) / c.sqrt_correction2 + c.eps);
}

}  // namespace masm
