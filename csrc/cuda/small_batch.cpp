// Registration of the CUDA op for the forward pass of up to 64 rows. Internal to masm_ext/kernels/small_batch.py, which
// passes matrices with contiguous rows and the tensors to write.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

#include "../contract.h"
#include "launch.h"
#include "tensors.h"

namespace masm {
namespace {

// [rows, columns] of one dtype on the device of `like`; rows contiguous, or (whole) the matrix.
void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType type,
                const Tensor& like, bool whole) {
  check_shape(op, name, t, {rows, columns});
  MASM_REQUIRE(t.scalar_type() == type && t.get_device_index() == like.get_device_index(), "masm::", op, ": ", name,
               " has another dtype or device than the call");
  MASM_REQUIRE(t.numel() == 0 || ((columns == 1 || t.stride(1) == 1) && (!whole || t.is_contiguous())), "masm::", op,
               ": ", name, " must be contiguous", whole ? "" : " along its rows");
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, ScalarType type, const Tensor& like) {
  MASM_REQUIRE(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == type &&
                   t.get_device_index() == like.get_device_index(),
               "masm::", op, ": expected ", name, " of ", n, " elements, contiguous, of the dtype and device of the ",
               "call, got ", shape_of(t));
}

// The row stride of a matrix; arbitrary for a single row.
int64_t row_of(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// Rows start at multiples of 16 bytes.
void check_aligned(const char* op, const Tensor& t) {
  const int64_t size = t.element_size();
  MASM_REQUIRE(t.numel() == 0 || (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 &&
                                  row_of(t) * size % 16 == 0 && t.size(1) * size % 16 == 0),
               "masm::", op, ": rows of x, weight and v must start at multiples of 16 bytes");
}

void stream_linear(const Tensor& x, const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v,
                   std::optional<Tensor> bias, const Tensor& y, const Tensor& p) {
  const char* op = "stream_linear";
  MASM_REQUIRE(x.dim() == 2 && weight.dim() == 2 && s.dim() == 1, "masm::stream_linear: expected matrices");
  const int64_t M = x.size(0), N = weight.size(0), D = x.size(1), R = s.size(0);
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 16;  // indices of rows and columns are int32
  MASM_REQUIRE(M <= cuda::kSmallRows && N <= most && D <= most && R <= cuda::kSmallRank,
               "masm::stream_linear: serves up to ", cuda::kSmallRows, " rows and ", cuda::kSmallRank,
               " directions, got ", M, " and ", R);
  const ScalarType type = x.scalar_type(), factor = s.scalar_type();
  MASM_REQUIRE(is_half(type) && (factor == type || factor == ScalarType::Float),
               "masm::stream_linear: bfloat16 or float16, with factors of the same or float32");
  check_rows(op, "x", x, M, D, type, x, false);
  check_rows(op, "weight", weight, N, D, type, x, false);
  check_rows(op, "u", u, R, N, factor, x, true);
  check_rows(op, "v", v, R, D, factor, x, true);
  check_rows(op, "y", y, M, N, type, x, true);
  check_rows(op, "p", p, M, R, ScalarType::Float, x, true);
  check_vector(op, "s", s, R, factor, x);
  if (bias) check_vector(op, "bias", *bias, N, type, x);
  for (const Tensor& t : {x, weight, v}) check_aligned(op, t);
  cuda::StreamCall call{};
  call.M = M, call.N = N, call.D = D, call.R = R;
  call.x = x.const_data_ptr(), call.weight = weight.const_data_ptr(), call.y = y.mutable_data_ptr();
  call.u = u.const_data_ptr(), call.s = s.const_data_ptr(), call.v = v.const_data_ptr();
  call.bias = bias ? bias->const_data_ptr() : nullptr, call.p = static_cast<float*>(p.mutable_data_ptr());
  call.x_row = row_of(x), call.weight_row = row_of(weight);
  call.type = dtype_of(x), call.factor_type = dtype_of(s);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaError_t status = cuda::stream_linear(call, stream_of(x));
  MASM_REQUIRE(status == cudaSuccess, "masm::stream_linear: ", cudaGetErrorString(status));
}

}  // namespace
}  // namespace masm

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // x [M, D], weight [N, D], u [R, N], s [R], v [R, D], bias [N] -> y [M, N], p [M, R] = x v^T
  m.def(
      "stream_linear(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor? bias, Tensor(a!) y, "
      "Tensor(b!) p) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) { m.impl("stream_linear", TORCH_BOX(&masm::stream_linear)); }
