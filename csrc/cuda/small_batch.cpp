// Registration of the CUDA op for the forward pass of a few rows. Not public: masm_ext/kernels/small_batch.py calls it,
// on matrices whose rows are contiguous. It writes into tensors that it is given.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../checks.h"
#include "launch.h"
#include "tensors.h"

namespace masm {
namespace {

using List = std::vector<Tensor>;

// [rows, columns] of one dtype on the device of `like`; rows contiguous, or (whole) the matrix.
void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType type,
                const Tensor& like, bool whole) {
  check_matrix(op, name, t, rows, columns);
  STD_TORCH_CHECK(t.scalar_type() == type && t.get_device_index() == like.get_device_index(), "masm::", op, ": ", name,
                  " has another dtype or device than the call");
  STD_TORCH_CHECK(t.numel() == 0 || ((columns == 1 || t.stride(1) == 1) && (!whole || t.is_contiguous())), "masm::", op,
                  ": ", name, " must be contiguous", whole ? "" : " along its rows");
}

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == type &&
                      t.get_device_index() == like.get_device_index(),
                  "masm::", op, ": expected ", name, " of ", n,
                  " elements, contiguous, of the dtype and device of the ", "call, got ", shape_of(t));
}

void check_sizes(const char* op, const cuda::SmallSizes& sizes) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 16;  // indices of rows and columns are int32
  STD_TORCH_CHECK(sizes.layers >= 1 && sizes.layers <= cuda::kSmallLayers && sizes.M <= cuda::kSmallRows &&
                      sizes.N <= most && sizes.D <= most && sizes.R <= cuda::kSmallRank,
                  "masm::", op, ": serves up to ", cuda::kSmallLayers, " layers, ", cuda::kSmallRows, " rows and ",
                  cuda::kSmallRank, " directions, got ", sizes.layers, ", ", sizes.M, " and ", sizes.R);
}

void check_type(const char* op, ScalarType type, ScalarType factor) {
  STD_TORCH_CHECK(is_half(type) && (factor == type || factor == ScalarType::Float), "masm::", op,
                  ": bfloat16 or float16, with factors of the same or float32");
}

// The row stride of a matrix; of a single row it means nothing and may be anything.
int64_t row_of(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

// Rows start at multiples of 16 bytes.
void check_aligned(const char* op, const Tensor& t) {
  const int64_t size = t.element_size();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && row_of(t) * size % 16 == 0 &&
                      t.size(1) * size % 16 == 0,
                  "masm::", op, ": rows of x, weight and v must start at multiples of 16 bytes");
}

void stream_linear(const Tensor& x, List weight, List u, List s, List v, List bias, List y, const Tensor& p) {
  const char* op = "stream_linear";
  const size_t J = weight.size();
  STD_TORCH_CHECK(J >= 1 && u.size() == J && s.size() == J && v.size() == J && y.size() == J &&
                      (bias.empty() || bias.size() == J) && x.dim() == 2 && weight[0].dim() == 2 && s[0].dim() == 1,
                  "masm::stream_linear: expected a matrix x and lists with one tensor a layer");
  const ScalarType type = x.scalar_type(), factor = s[0].scalar_type();
  cuda::StreamCall call{};
  call.sizes = {int64_t(J), x.size(0), weight[0].size(0), x.size(1), s[0].size(0)};
  const auto [layers, M, N, D, R] = call.sizes;
  check_type(op, type, factor);
  check_sizes(op, call.sizes);
  check_rows(op, "x", x, M, D, type, x, false);
  check_aligned(op, x);
  for (size_t j = 0; j < J; ++j) {
    check_rows(op, "weight", weight[j], N, D, type, x, false);
    STD_TORCH_CHECK(row_of(weight[j]) == row_of(weight[0]), "masm::stream_linear: weights must have one row stride");
    check_rows(op, "u", u[j], R, N, factor, x, true);
    check_rows(op, "v", v[j], R, D, factor, x, true);
    check_rows(op, "y", y[j], M, N, type, x, true);
    check_vector(op, "s", s[j], R, factor, x);
    check_aligned(op, weight[j]);
    check_aligned(op, v[j]);
    if (!bias.empty()) check_vector(op, "bias", bias[j], N, type, x);
    call.layer[j] = {weight[j].const_data_ptr(), u[j].const_data_ptr(),
                     s[j].const_data_ptr(),      v[j].const_data_ptr(),
                     bias.empty() ? nullptr : bias[j].const_data_ptr(), y[j].mutable_data_ptr()};
  }
  check_rows(op, "p", p, M, layers * R, ScalarType::Float, x, false);
  call.x = x.const_data_ptr();
  call.p = static_cast<float*>(p.mutable_data_ptr()), call.p_row = row_of(p);
  call.x_row = row_of(x), call.weight_row = row_of(weight[0]);
  call.type = dtype_of(x), call.factor_type = dtype_of(s[0]);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaError_t status = cuda::stream_linear(call, stream_of(x));
  STD_TORCH_CHECK(status == cudaSuccess, "masm::stream_linear: ", cudaGetErrorString(status));
}

}  // namespace
}  // namespace masm

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // J layers: x [M, D], weight J x [N, D], u J x [R, N], s J x [R], v J x [R, D], bias J x [N] or none
  // -> y J x [M, N], p [M, J R] = x v^T
  m.def(
      "stream_linear(Tensor x, Tensor[] weight, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] bias, Tensor(a!)[] y, "
      "Tensor(b!) p) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) { m.impl("stream_linear", TORCH_BOX(&masm::stream_linear)); }
