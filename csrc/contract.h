// What the ops require of their arguments: masm_ext/contract.py in C++, word by word (tests/ops/test_contract.py
// compares the errors).
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace masm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// As STD_TORCH_CHECK without the source location: Python's checks report none.
#define MASM_REQUIRE(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]]   \
      masm::fail(__VA_ARGS__);       \
  } while (0)

inline bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

inline bool is_float(ScalarType t) { return t == ScalarType::Float || t == ScalarType::Double || is_half(t); }

// The type in which the low-rank path is computed and P is kept.
inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

// "[1, 2]", as Python prints a list.
template <class List>
std::string list_of(const List& values) {
  std::ostringstream out;
  const char* separator = "[";
  for (const auto value : values) out << separator << value, separator = ", ";
  return (values.size() ? out.str() : "[") + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline std::string shape_of(const Tensor& t) { return list_of(sizes_of(t)); }

inline std::string strides_of(const Tensor& t) {
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < t.dim(); ++i) strides.push_back(t.stride(i));
  return list_of(strides);
}

inline std::string dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline void check_shape(const std::string& op, const std::string& name, const Tensor& t,
                        const std::vector<int64_t>& shape) {
  MASM_REQUIRE(sizes_of(t) == shape, "masm::", op, ": expected ", name, " of shape ", list_of(shape), ", got ",
               shape_of(t));
}

// `letters`: the dimensions by name, as in "N, D".
inline void check_dims(const std::string& op, const char* name, const Tensor& t, int64_t dims, const char* letters) {
  MASM_REQUIRE(t.dim() == dims, "masm::", op, ": expected ", name, " of shape [", letters, "], got ", shape_of(t));
}

inline void check_last(const std::string& op, const char* name, const Tensor& t, int64_t last) {
  MASM_REQUIRE(t.dim() >= 1 && t.size(-1) == last, "masm::", op, ": expected ", name, " of shape [..., ", last,
               "], got ", shape_of(t));
}

inline void check_dtype(const std::string& op, const std::string& name, const Tensor& t, ScalarType allowed) {
  MASM_REQUIRE(t.scalar_type() == allowed, "masm::", op, ": expected ", name, " of dtype ", dtype_name(allowed),
               ", got ", dtype_name(t.scalar_type()));
}

inline void check_float(const std::string& op, const std::string& name, const Tensor& t) {
  MASM_REQUIRE(is_float(t.scalar_type()), "masm::", op, ": expected ", name,
               " of dtype float32 or float64 or bfloat16 or float16, got ", dtype_name(t.scalar_type()));
}

inline void check_device(const std::string& op, const std::string& name, const Tensor& t, const char* like_name,
                         const Tensor& like) {
  MASM_REQUIRE(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), "masm::", op, ": ", name,
               " is on ", device_name(t), ", ", like_name, " on ", device_name(like),
               "; all tensors must be on one device");
}

inline void check_contiguous(const std::string& op, const std::string& name, const Tensor& t) {
  MASM_REQUIRE(t.is_contiguous(), "masm::", op, ": ", name, " must be contiguous, got strides ", strides_of(t));
}

// A contiguous tensor of one shape and dtype, on the device of `like`.
inline void check_operand(const std::string& op, const std::string& name, const Tensor& t, const char* like_name,
                          const Tensor& like, ScalarType type, const std::vector<int64_t>& shape) {
  check_shape(op, name, t, shape);
  check_dtype(op, name, t, type);
  check_contiguous(op, name, t);
  check_device(op, name, t, like_name, like);
}

// weight [N, D], u [R, N], s [R], v [R, D]; the factors in the dtype of weight, or float32 beside half precision.
inline void check_factors(const std::string& op, const Tensor& weight, const Tensor& u, const Tensor& s,
                          const Tensor& v) {
  check_dims(op, "weight", weight, 2, "N, D");
  check_dims(op, "s", s, 1, "R");
  const int64_t R = s.size(0);
  check_shape(op, "u", u, {R, weight.size(0)});
  check_shape(op, "v", v, {R, weight.size(1)});
  check_float(op, "weight", weight);
  const auto w = weight.scalar_type(), f = u.scalar_type(), wide = accumulate_type(w);
  MASM_REQUIRE(f == w || f == wide, "masm::", op, ": expected u of dtype ", dtype_name(w),
               w == wide ? "" : " or " + dtype_name(wide), ", got ", dtype_name(f));
  check_dtype(op, "s", s, f);
  check_dtype(op, "v", v, f);
  check_device(op, "u", u, "weight", weight);
  check_device(op, "s", s, "weight", weight);
  check_device(op, "v", v, "weight", weight);
}

// Rows of activations [..., last], in the dtype and on the device of weight.
inline void check_rows(const std::string& op, const char* name, const Tensor& t, int64_t last, const Tensor& weight) {
  check_last(op, name, t, last);
  check_dtype(op, name, t, weight.scalar_type());
  check_device(op, name, t, "weight", weight);
}

inline void check_offsets(const std::string& op, const std::vector<int64_t>& offsets, int64_t R) {
  bool ok = offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == R;
  for (size_t i = 1; ok && i < offsets.size(); ++i) ok = offsets[i] >= offsets[i - 1];
  MASM_REQUIRE(ok, "masm::", op, ": expected K + 1 offsets that rise from 0 to R = ", R, ", got ", list_of(offsets));
}

// bool [K], one entry a subspace.
inline void check_mask(const std::string& op, const std::optional<Tensor>& mask, const std::vector<int64_t>& offsets,
                       const Tensor& weight) {
  if (!mask) return;
  check_shape(op, "mask", *mask, {int64_t(offsets.size()) - 1});
  check_dtype(op, "mask", *mask, ScalarType::Bool);
  check_device(op, "mask", *mask, "weight", weight);
}

inline void check_bias(const std::string& op, const std::optional<Tensor>& bias, const Tensor& weight) {
  if (!bias) return;
  check_shape(op, "bias", *bias, {weight.size(0)});
  check_dtype(op, "bias", *bias, weight.scalar_type());
  check_device(op, "bias", *bias, "weight", weight);
}

}  // namespace masm
