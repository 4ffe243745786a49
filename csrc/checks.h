// Shape, dtype and device checks of the ops, shared by every device: they say what arrived and what was expected.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace masm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

// The type in which the low-rank path is computed and P is kept.
inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, "masm::", op, ": expected ", name,
                  " of shape [", rows, ", ", cols, "], got ", shape_of(t));
}

// weight [N, D], u [R, N], s [R], v [R, D]: shapes, one dtype for the factors, one device.
inline void check_factors(const char* op, const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v) {
  STD_TORCH_CHECK(weight.dim() == 2, "masm::", op, ": expected weight of shape [N, D], got ", shape_of(weight));
  STD_TORCH_CHECK(s.dim() == 1, "masm::", op, ": expected s of shape [R], got ", shape_of(s));
  const int64_t R = s.size(0);
  check_matrix(op, "u", u, R, weight.size(0));
  check_matrix(op, "v", v, R, weight.size(1));
  const auto w = weight.scalar_type(), f = u.scalar_type();
  STD_TORCH_CHECK(w == ScalarType::Float || w == ScalarType::Double || is_half(w), "masm::", op,
                  ": weight must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(s.scalar_type() == f && v.scalar_type() == f, "masm::", op, ": u, s and v must have one dtype");
  STD_TORCH_CHECK(f == w || (is_half(w) && f == ScalarType::Float), "masm::", op,
                  ": u, s, v must have the dtype of weight, or float32 beside a half-precision weight");
  STD_TORCH_CHECK(u.get_device_index() == weight.get_device_index() &&
                      s.get_device_index() == weight.get_device_index() &&
                      v.get_device_index() == weight.get_device_index(),
                  "masm::", op, ": weight, u, s and v must be on one device");
}

inline void check_offsets(const char* op, const std::vector<int64_t>& offsets, int64_t R) {
  bool ok = offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == R;
  for (size_t i = 1; ok && i < offsets.size(); ++i) ok = offsets[i] >= offsets[i - 1];
  STD_TORCH_CHECK(ok, "masm::", op, ": offsets must rise from 0 to R = ", R, ", with one entry more than subspaces");
}

}  // namespace masm
