// The checks of masm::update_masks_ and its operands as raw pointers, for every device.
#pragma once
#include <cstdint>

#include "contract.h"
#include "math/update_masks.h"

namespace masm {

inline MaskTable mask_table(const Tensor& sums, const Tensor& counts, const Tensor& masks, const Tensor& live,
                            const Tensor& counters, const Tensor& history, const Tensor& history_steps,
                            const Tensor& stats, const Tensor& found, const Tensor& owned, const MaskPolicy& p) {
  const char* op = "update_masks_";
  check_dims(op, "sums", sums, 3, "2, L, K");
  check_dims(op, "history", history, 4, "H, L, K, 4");
  check_dims(op, "stats", stats, 2, "B, 2");
  const int64_t L = sums.size(1), K = sums.size(2), n = L * K, rows = history.size(0), B = stats.size(0);
  const auto check = [&](const char* name, const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) {
    check_operand(op, name, t, "sums", sums, type, shape);
  };
  check("sums", sums, ScalarType::Double, {2, L, K});
  check("counts", counts, ScalarType::Long, {2, L, K});
  check("masks", masks, ScalarType::Float, {2, L, K});
  check("live", live, ScalarType::Bool, {L, K});
  check("counters", counters, ScalarType::Long, {2});
  check("history", history, ScalarType::Double, {rows, L, K, 4});
  check("history_steps", history_steps, ScalarType::Long, {rows});
  check("stats", stats, ScalarType::Double, {B, 2});
  check("found", found, ScalarType::Float, {1});
  check("owned", owned, ScalarType::Bool, {L, K});
  MASM_REQUIRE(B >= n, "masm::", op, ": expected stats of L * K = ", n, " rows or more, got ", B);
  MASM_REQUIRE(rows >= 1, "masm::", op, ": expected history of one row or more, got none");
  MASM_REQUIRE(p.interval >= 1, "masm::", op, ": expected an interval of 1 or more, got ", p.interval);
  MASM_REQUIRE(p.keep >= 0 && p.keep <= L && p.least >= 0 && p.least <= L, "masm::", op,
               ": expected keep and least between 0 and L = ", L, ", got ", p.keep, " and ", p.least);
  double* const sum = static_cast<double*>(sums.mutable_data_ptr());
  int64_t* const count = static_cast<int64_t*>(counts.mutable_data_ptr());
  float* const mask = static_cast<float*>(masks.mutable_data_ptr());
  int64_t* const counter = static_cast<int64_t*>(counters.mutable_data_ptr());
  return {.L = L,
          .K = K,
          .rows = rows,
          .signal = sum,
          .power = sum + n,
          .idle = count,
          .probing = count + n,
          .selected = mask,
          .in_force = mask + n,
          .live = static_cast<bool*>(live.mutable_data_ptr()),
          .step = counter,
          .selections = counter + 1,
          .history = static_cast<double*>(history.mutable_data_ptr()),
          .history_steps = static_cast<int64_t*>(history_steps.mutable_data_ptr()),
          .stats = static_cast<const double*>(stats.const_data_ptr()),
          .found = static_cast<const float*>(found.const_data_ptr()),
          .owned = static_cast<const bool*>(owned.const_data_ptr())};
}

}  // namespace masm
