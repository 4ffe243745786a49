// Registration of the CUDA ops for calls of a few rows. Not public: masm_ext/kernels/small_batch.py calls them, on
// matrices whose rows are contiguous. They write into tensors that they are given.
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

void check_sizes(const char* op, const cuda::SmallSizes& sizes, int64_t most_directions) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 16;  // indices of rows and columns are int32
  STD_TORCH_CHECK(sizes.layers >= 1 && sizes.layers <= cuda::kSmallLayers && sizes.M <= cuda::kSmallRows &&
                      sizes.N <= most && sizes.D <= most && sizes.R <= most_directions,
                  "masm::", op, ": serves up to ", cuda::kSmallLayers, " layers, ", cuda::kSmallRows, " rows and ",
                  most_directions, " directions, got ", sizes.layers, ", ", sizes.M, " and ", sizes.R);
}

void check_type(const char* op, ScalarType type, ScalarType factor) {
  STD_TORCH_CHECK((type == ScalarType::Float || is_half(type)) && (factor == type || factor == ScalarType::Float),
                  "masm::", op, ": float32, bfloat16 or float16, with factors of the same or float32");
}

// The row stride of a matrix; of a single row it means nothing and may be anything.
int64_t row_of(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

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
  check_sizes(op, call.sizes, cuda::kSmallRank);
  check_rows(op, "x", x, M, D, type, x, false);
  for (size_t j = 0; j < J; ++j) {
    check_rows(op, "weight", weight[j], N, D, type, x, false);
    STD_TORCH_CHECK(row_of(weight[j]) == row_of(weight[0]), "masm::stream_linear: weights must have one row stride");
    check_rows(op, "u", u[j], R, N, factor, x, true);
    check_rows(op, "v", v[j], R, D, factor, x, true);
    check_rows(op, "y", y[j], M, N, type, x, true);
    check_vector(op, "s", s[j], R, factor, x);
    if (!bias.empty()) check_vector(op, "bias", bias[j], N, type, x);
    call.layer[j] = {x.const_data_ptr(),     weight[j].const_data_ptr(),
                     u[j].const_data_ptr(),  s[j].const_data_ptr(),
                     v[j].const_data_ptr(),  bias.empty() ? nullptr : bias[j].const_data_ptr(),
                     y[j].mutable_data_ptr()};
  }
  check_rows(op, "p", p, M, layers * R, ScalarType::Float, x, false);
  call.p = static_cast<float*>(p.mutable_data_ptr()), call.p_row = row_of(p);
  call.x_row = row_of(x), call.weight_row = row_of(weight[0]);
  call.type = dtype_of(x), call.factor_type = dtype_of(s[0]);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaError_t status = cuda::stream_linear(call, stream_of(x));
  STD_TORCH_CHECK(status == cudaSuccess, "masm::stream_linear: ", cudaGetErrorString(status));
}

void stream_product(List z, List b, const Tensor& p) {
  const char* op = "stream_product";
  const size_t J = z.size();
  STD_TORCH_CHECK(J >= 1 && b.size() == J && z[0].dim() == 2 && b[0].dim() == 2,
                  "masm::stream_product: expected lists with one matrix a layer");
  const ScalarType type = z[0].scalar_type(), factor = b[0].scalar_type();
  cuda::StreamCall call{};
  call.sizes = {int64_t(J), z[0].size(0), 0, z[0].size(1), b[0].size(0)};
  const auto [layers, M, N, D, R] = call.sizes;
  check_type(op, type, factor);
  check_sizes(op, call.sizes, cuda::kGradientRank);
  for (size_t j = 0; j < J; ++j) {
    check_rows(op, "z", z[j], M, D, type, z[0], false);
    STD_TORCH_CHECK(row_of(z[j]) == row_of(z[0]), "masm::stream_product: matrices must have one row stride");
    check_rows(op, "b", b[j], R, D, factor, z[0], true);
    call.layer[j].x = z[j].const_data_ptr(), call.layer[j].v = b[j].const_data_ptr();
  }
  check_rows(op, "p", p, M, layers * R, ScalarType::Float, z[0], false);
  call.only_p = true, call.p = static_cast<float*>(p.mutable_data_ptr()), call.p_row = row_of(p);
  call.x_row = row_of(z[0]), call.type = dtype_of(z[0]), call.factor_type = dtype_of(b[0]);
  torch::stable::accelerator::DeviceGuard guard(z[0].get_device_index());
  const cudaError_t status = cuda::stream_linear(call, stream_of(z[0]));
  STD_TORCH_CHECK(status == cudaSuccess, "masm::stream_product: ", cudaGetErrorString(status));
}

void small_gradients(List dy, const Tensor& x, const Tensor& s, std::optional<Tensor> p, std::optional<Tensor> q,
                     List mask, std::vector<int64_t> offsets, std::optional<Tensor> du, std::optional<Tensor> dv,
                     std::optional<Tensor> ds, std::optional<Tensor> dbias) {
  const char* op = "small_gradients";
  const int64_t J = int64_t(dy.size());
  STD_TORCH_CHECK(J >= 1 && dy[0].dim() == 2 && x.dim() == 2 && s.dim() == 1 && s.size(0) % J == 0 &&
                      (mask.empty() || int64_t(mask.size()) == J),
                  "masm::small_gradients: expected matrices dy and x, s [layers R] and one mask a layer, or none");
  const ScalarType type = dy[0].scalar_type(), factor = s.scalar_type();
  cuda::SmallGradientsCall call{};
  call.sizes = {J, dy[0].size(0), dy[0].size(1), x.size(1), s.size(0) / J};
  const int64_t M = call.sizes.M, N = call.sizes.N, D = call.sizes.D, R = call.sizes.R;
  check_type(op, type, factor);
  check_sizes(op, call.sizes, cuda::kGradientRank / J);
  check_offsets(op, offsets, R);
  STD_TORCH_CHECK((p || (!du && !ds)) && (q || (!dv && !ds)),
                  "masm::small_gradients: du needs p, dv needs q, ds needs both");
  if (dv) check_rows(op, "x", x, M, D, type, dy[0], false);
  check_vector(op, "s", s, J * R, factor, dy[0]);
  const int64_t K = int64_t(offsets.size()) - 1;
  for (int64_t j = 0; j < J; ++j) {
    check_rows(op, "dy", dy[j], M, N, type, dy[0], false);
    STD_TORCH_CHECK(row_of(dy[j]) == row_of(dy[0]), "masm::small_gradients: all dy must have one row stride");
    call.dy[j] = dy[j].const_data_ptr();
    if (mask.empty()) continue;
    check_vector(op, "mask", mask[j], K, ScalarType::Bool, dy[0]);
    call.mask[j] = mask[j].const_data_ptr();
  }
  for (int64_t k = 0; k < K; ++k)
    for (int64_t r = offsets[k]; r < offsets[k + 1]; ++r) call.subspace[r] = int32_t(k);

  auto product = [&](const char* name, const std::optional<Tensor>& t, const float*& at, int64_t& row) {
    if (!t) return;
    check_rows(op, name, *t, M, J * R, ScalarType::Float, dy[0], false);
    at = static_cast<const float*>(t->const_data_ptr()), row = row_of(*t);
  };
  product("p", p, call.p, call.p_row);
  product("q", q, call.q, call.q_row);
  auto matrix = [&](const char* name, const std::optional<Tensor>& t, int64_t columns, void*& at) {
    if (!t) return;
    check_rows(op, name, *t, J * R, columns, factor, dy[0], true);
    at = t->mutable_data_ptr();
  };
  matrix("du", du, N, call.du);
  matrix("dv", dv, D, call.dv);
  auto vector = [&](const char* name, const std::optional<Tensor>& t, int64_t n, ScalarType of, void*& at) {
    if (!t) return;
    check_vector(op, name, *t, n, of, dy[0]);
    at = t->mutable_data_ptr();
  };
  vector("ds", ds, J * R, factor, call.ds);
  vector("dbias", dbias, J * N, type, call.dbias);
  call.x = x.const_data_ptr(), call.s = s.const_data_ptr();
  call.dy_row = row_of(dy[0]), call.x_row = row_of(x);
  call.type = dtype_of(dy[0]), call.factor_type = dtype_of(s);
  torch::stable::accelerator::DeviceGuard guard(dy[0].get_device_index());
  const cudaError_t status = cuda::small_gradients(call, stream_of(dy[0]));
  STD_TORCH_CHECK(status == cudaSuccess, "masm::small_gradients: ", cudaGetErrorString(status));
}

}  // namespace
}  // namespace masm

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // J layers: x [M, D], weight J x [N, D], u J x [R, N], s J x [R], v J x [R, D], bias J x [N] or none
  // -> y J x [M, N], p [M, J R] = x v^T
  m.def(
      "stream_linear(Tensor x, Tensor[] weight, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] bias, Tensor(a!)[] y, "
      "Tensor(b!) p) -> ()");
  // z J x [M, W], b J x [R, W] -> p [M, J R], columns of each z b^T
  m.def("stream_product(Tensor[] z, Tensor[] b, Tensor(a!) p) -> ()");
  // dy J x [M, N], x [M, D], s [J R], p and q [M, J R], mask bool J x [K] or none
  // -> du [J R, N], dv [J R, D], ds [J R], dbias [J N], those that are given
  m.def(
      "small_gradients(Tensor[] dy, Tensor x, Tensor s, Tensor? p, Tensor? q, Tensor[] mask, int[] offsets, "
      "Tensor(a!)? du, Tensor(b!)? dv, Tensor(c!)? ds, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) {
  m.impl("stream_linear", TORCH_BOX(&masm::stream_linear));
  m.impl("stream_product", TORCH_BOX(&masm::stream_product));
  m.impl("small_gradients", TORCH_BOX(&masm::small_gradients));
}
