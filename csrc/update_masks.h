// The checks of masm::update_masks_ and its operands as raw pointers, for every device.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "checks.h"
#include "math/update_masks.h"

namespace masm {

inline void check_operand(const Tensor& like, const char* name, const Tensor& t, ScalarType type, const char* type_name,
                          std::initializer_list<int64_t> sizes) {
  bool ok = t.scalar_type() == type && t.is_contiguous() && t.dim() == int64_t(sizes.size());
  std::ostringstream wanted;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    ok = ok && t.size(i) == size;
    wanted << (i++ ? ", " : "") << size;
  }
  STD_TORCH_CHECK(ok, "masm::update_masks_: expected ", name, " ", type_name, " [", wanted.str(), "], contiguous, got ",
                  shape_of(t));
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
                  "masm::update_masks_: ", name, " and sums must be on one device");
}

inline MaskTable mask_table(const Tensor& sums, const Tensor& counts, const Tensor& masks, const Tensor& live,
                            const Tensor& counters, const Tensor& history, const Tensor& history_steps,
                            const Tensor& stats, const Tensor& found, const Tensor& owned, const MaskPolicy& p) {
  STD_TORCH_CHECK(sums.dim() == 3 && history.dim() == 4 && stats.dim() == 2,
                  "masm::update_masks_: expected sums [3, L, K], history [H, L, K, 4] and stats [B, 2], got ",
                  shape_of(sums), ", ", shape_of(history), " and ", shape_of(stats));
  const int64_t L = sums.size(1), K = sums.size(2), n = L * K, rows = history.size(0), B = stats.size(0);
  check_operand(sums, "sums", sums, ScalarType::Double, "float64", {3, L, K});
  check_operand(sums, "counts", counts, ScalarType::Long, "int64", {3, L, K});
  check_operand(sums, "masks", masks, ScalarType::Float, "float32", {2, L, K});
  check_operand(sums, "live", live, ScalarType::Bool, "bool", {L, K});
  check_operand(sums, "counters", counters, ScalarType::Long, "int64", {2});
  check_operand(sums, "history", history, ScalarType::Double, "float64", {rows, L, K, 4});
  check_operand(sums, "history_steps", history_steps, ScalarType::Long, "int64", {rows});
  check_operand(sums, "stats", stats, ScalarType::Double, "float64", {B, 2});
  check_operand(sums, "found", found, ScalarType::Float, "float32", {1});
  check_operand(sums, "owned", owned, ScalarType::Bool, "bool", {L, K});
  STD_TORCH_CHECK(B >= n, "masm::update_masks_: stats has ", B, " rows, fewer than L * K = ", n);
  STD_TORCH_CHECK(rows >= 1, "masm::update_masks_: history must have at least one row");
  STD_TORCH_CHECK(p.interval >= 1, "masm::update_masks_: interval must be at least 1, got ", p.interval);
  STD_TORCH_CHECK(p.keep >= 0 && p.keep <= L && p.least >= 0 && p.least <= L,
                  "masm::update_masks_: keep and least must lie between 0 and L = ", L, ", got ", p.keep, " and ",
                  p.least);
  double* const sum = static_cast<double*>(sums.mutable_data_ptr());
  int64_t* const count = static_cast<int64_t*>(counts.mutable_data_ptr());
  float* const mask = static_cast<float*>(masks.mutable_data_ptr());
  int64_t* const counter = static_cast<int64_t*>(counters.mutable_data_ptr());
  return {.L = L,
          .K = K,
          .rows = rows,
          .grad2 = sum,
          .bias2 = sum + n,
          .second = sum + 2 * n,
          .updates = count,
          .idle = count + n,
          .probing = count + 2 * n,
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
