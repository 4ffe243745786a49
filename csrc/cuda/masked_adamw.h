// The operands of the kernel of masm::masked_adamw_.
#pragma once
#include <cstdint>

#include "../math/adamw.h"
#include "dtype.h"

namespace masm::cuda {

struct AdamWParameter {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  const void* penalty;  // or null
  int64_t numel : 62;
  uint64_t type : 2;  // DType
};

struct AdamWSegment {
  int64_t tensor, begin, end, block;
};

// Results for a segment, kept between the sweeps.
struct AdamWWork {
  double signal, power;
  AdamWStep<double> step;
};

struct AdamWTables {
  int64_t T, S, B;
  const AdamWSegment* segments;         // [S]
  const double* hyper;                  // [T, 5]: lr, beta1, beta2, eps, weight_decay
  const float* mask;                    // [B]
  int64_t* steps;                       // [B]
  const float *grad_scale, *found_inf;  // one element each, or null
  double* stats;                        // [B, 2]
  float* found;  // [1]: 0, 1 (a gradient was not finite) or 2 (segments or mask are not valid); if not 0 nothing else
                 // was written
  AdamWWork* work;  // [S]
  int64_t* first;   // [B]: the first segment of each block, if sorted; S if it has none
  int32_t* flags;   // [thread blocks]
};

static_assert(sizeof(AdamWParameter) == 48);

// Parameters that fit in the launch arguments (32,764 bytes); if there are more, all go to device memory.
constexpr int kAdamWInline = 640;

struct AdamWList {
  AdamWParameter at[kAdamWInline];
};

}  // namespace masm::cuda
