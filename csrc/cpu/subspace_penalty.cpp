// masm::subspace_penalty on the CPU: one thread computes a layer, so results do not depend on the thread count. It
// reads the weight in blocks of rows that stay in cache, where half precision is widened.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../contract.h"
#include "dense.h"
#include "rows.h"

namespace masm::cpu {
namespace {

template <class A>
struct Layer {
  const void* weight;  // [N, D]
  const A *u, *s, *v, *s0;
  double weight_norm2;
  const int64_t* offsets;  // [K + 1]
  int64_t K, N, D, R;
  A *du, *dv, *ds;  // of orthogonality; those of spectral lie P elements further. Null if they are not needed.
  int64_t P;
  double orthogonality, spectral;
};

// out [n, R] = x^T, x [R, n]
template <class A>
void transpose(const A* x, int64_t R, int64_t n, A* out) {
  constexpr int64_t kTile = 16;
  for (int64_t i0 = 0; i0 < n; i0 += kTile)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = i0; i < std::min(n, i0 + kTile); ++i) out[i * R + r] = x[r * n + i];
}

template <class A>
double dot(const A* a, const A* b, int64_t n) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) sums[j] += double(a[i + j]) * double(b[i + j]);
  for (; i < n; ++i) sums[0] += double(a[i]) * double(b[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// x x^T for x [R, n], in float64: the losses depend on the small difference from the identity.
template <class A>
std::vector<double> gram(const A* x, int64_t R, int64_t n) {
  const auto& kernel = kernels().f64;
  const Buffer<double> wide(R * n), packed(kernel.packed_size(R, n));
  std::copy_n(x, R * n, wide.get());
  kernel.pack_dot(wide.get(), R, n, packed.get());
  std::vector<double> out(R * R);
  if (R > 0) kernel.dot(wide.get(), R, n, packed.get(), R, out.data());
  return out;
}

// The products with the weight: v W^T and u W and, for the gradients, those times W and W^T.
template <class A>
struct Products {
  std::vector<A> wv, uw, vww, uwww;  // [N, R], [R, D], [R, D], [N, R]: those over N are kept transposed
};

template <class T, class A>
Products<A> multiply(const Layer<A>& layer) {
  const auto& kernel = kernels_of<A>();
  const int64_t N = layer.N, D = layer.D, R = layer.R, step = block_rows(D * int64_t(sizeof(A)));
  const bool gradients = layer.du != nullptr;
  const T* weight = static_cast<const T*>(layer.weight);
  const Rows<T, A> rows(step, D);
  const Buffer<A> ut(N * R), packed(kernel.packed_size(R, D)), scratch(kernel.scratch_size(step, R));
  Products<A> p{std::vector<A>(N * R), std::vector<A>(R * D), {}, {}};
  transpose(layer.u, R, N, ut.get());
  kernel.pack_dot(layer.v, R, D, packed.get());
  if (gradients) p.vww.resize(R * D), p.uwww.resize(N * R);
  for (int64_t n = 0; n < N && R > 0; n += step) {
    const int64_t live = std::min(step, N - n);
    const A* w = rows.read(weight, n, live);
    kernel.dot(w, live, D, packed.get(), R, p.wv.data() + n * R);
    kernel.outer(ut.get() + n * R, live, R, w, D, p.uw.data(), scratch.get());
    if (gradients) kernel.outer(p.wv.data() + n * R, live, R, w, D, p.vww.data(), scratch.get());
  }
  if (!gradients) return p;
  kernel.pack_dot(p.uw.data(), R, D, packed.get());
  for (int64_t n = 0; n < N && R > 0; n += step) {
    const int64_t live = std::min(step, N - n);
    kernel.dot(rows.read(weight, n, live), live, D, packed.get(), R, p.uwww.data() + n * R);
  }
  return p;
}

// The two gradients of one factor x [R, n] (u, or v), P elements apart: out = mix x + scale * part, with the row
// factors scale [R]; parts [R, n].
template <class A>
void factor_gradients(const A* x, int64_t R, int64_t n, const std::vector<A> (&mix)[2],
                      const std::vector<A> (&scale)[2], const A* const (&part)[2], A* out, int64_t P) {
  const auto& kernel = kernels_of<A>();
  const Buffer<A> packed(kernel.packed_size(R, n)), scratch(kernel.scratch_size(R, R));
  kernel.pack_add(x, R, n, packed.get());
  for (int loss = 0; loss < 2; ++loss, out += P) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = 0; i < n; ++i) out[r * n + i] = scale[loss][r] * part[loss][r * n + i];
    kernel.add(mix[loss].data(), R, R, packed.get(), n, nullptr, true, false, out, scratch.get());
  }
}

template <class T, class A>
void penalize(Layer<A>& layer) {
  const int64_t N = layer.N, D = layer.D, R = layer.R;
  const Products<A> p = multiply<T, A>(layer);
  const std::vector<double> gram_u = gram(layer.u, R, N), gram_v = gram(layer.v, R, D);

  const double tiny = double(std::numeric_limits<A>::min());
  const double inverse_norm2 = 1 / std::max(layer.weight_norm2, tiny);
  const double s02 = dot(layer.s0, layer.s0, R);
  const double base = layer.weight_norm2 + s02, base_or_tiny = std::max(base, tiny);
  const double sigma2 = base / double(std::max<int64_t>(1, std::min(N, D)));  // the mean square of W's spectrum

  double between = 0, inside = 0, artifact = 0, cross = 0, drift = 0;
  std::vector<double> overlap(R), moved(R), drift_slope(R);  // u_r W v_r; d change / d s; d drift / d s
  for (int64_t r = 0; r < R; ++r) overlap[r] = dot(p.uw.data() + r * D, layer.v + r * D, D);
  std::vector<int64_t> member(R);
  for (int64_t k = 0; k < layer.K; ++k) {
    const int64_t begin = layer.offsets[k], end = layer.offsets[k + 1];
    double distance2 = 0;
    for (int64_t r = begin; r < end; ++r) {
      const double change = double(layer.s[r]) - double(layer.s0[r]);
      distance2 += change * change, member[r] = k;
    }
    const double inverse = 1 / std::max(sigma2 * double(end - begin), tiny);
    drift += distance2 * inverse;
    for (int64_t r = begin; r < end; ++r) drift_slope[r] = 2 * (double(layer.s[r]) - double(layer.s0[r])) * inverse;
  }
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) {
      const double a = gram_u[i * R + j], b = gram_v[i * R + j], one = i == j;
      if (member[i] == member[j])
        inside += (a - one) * (a - one) + (b - one) * (b - one);
      else
        between += (a * a + b * b) / 2;
      moved[i] += double(layer.s[j]) * a * b;
    }
    cross += double(layer.s[i]) * overlap[i];
    artifact += double(layer.s[i]) * moved[i];
    moved[i] = 2 * (overlap[i] + moved[i]);
  }
  const double interference = dot(p.wv.data(), p.wv.data(), N * R) + dot(p.uw.data(), p.uw.data(), R * D);
  layer.orthogonality = between + inside + interference * inverse_norm2;
  const double change = (2 * cross + artifact - s02) / base_or_tiny;
  layer.spectral = change * change + drift;
  if (layer.du == nullptr) return;

  const double slope = 2 * change / base_or_tiny;  // d spectral / d (||What||^2 - ||W||^2)
  std::vector<A> scale[2] = {std::vector<A>(R, A(2 * inverse_norm2)), std::vector<A>(R)};
  for (int64_t r = 0; r < R; ++r) {
    scale[1][r] = A(2 * slope * double(layer.s[r]));
    layer.ds[r] = A(0);
    layer.ds[layer.P + r] = A(slope * moved[r] + drift_slope[r]);
  }
  const auto mix = [&](const std::vector<double>& own, const std::vector<double>& other, std::vector<A>(&out)[2]) {
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) {
        const double a = own[i * R + j];
        out[0].push_back(A(member[i] == member[j] ? 4 * (a - (i == j)) : 2 * a));
        out[1].push_back(A(2 * slope * double(layer.s[i]) * double(layer.s[j]) * other[i * R + j]));
      }
  };
  std::vector<A> mix_u[2], mix_v[2];
  mix(gram_u, gram_v, mix_u), mix(gram_v, gram_u, mix_v);
  const Buffer<A> uwww(R * N), wv(R * N);
  transpose(p.uwww.data(), N, R, uwww.get());
  transpose(p.wv.data(), N, R, wv.get());
  factor_gradients<A>(layer.u, R, N, mix_u, scale, {uwww.get(), wv.get()}, layer.du, layer.P);
  factor_gradients<A>(layer.v, R, D, mix_v, scale, {p.vww.data(), p.uw.data()}, layer.dv, layer.P);
}

void check_subspace_penalty(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                            const std::vector<Tensor>& s, const std::vector<Tensor>& v, const std::vector<Tensor>& s0,
                            const std::vector<Tensor>& norm2, const std::vector<int64_t>& offsets,
                            const std::vector<int64_t>& subspaces) {
  const int64_t L = int64_t(weights.size());
  MASM_REQUIRE(L > 0, "masm::subspace_penalty: expected at least one layer, got none");
  const auto check_length = [&](const char* name, size_t n) {
    MASM_REQUIRE(int64_t(n) == L, "masm::subspace_penalty: expected ", L, " entries in ", name, ", one a layer, got ",
                 n);
  };
  check_length("u", u.size()), check_length("s", s.size()), check_length("v", v.size());
  check_length("s0", s0.size()), check_length("weight_norm2", norm2.size());
  check_length("subspaces", subspaces.size());
  int64_t expected = 0;
  for (const int64_t K : subspaces) expected = K >= 1 && expected >= 0 ? expected + K + 1 : -1;
  MASM_REQUIRE(expected == int64_t(offsets.size()), "masm::subspace_penalty: expected K + 1 offsets for each of the ",
               "subspaces ", list_of(subspaces), ", got ", offsets.size(), " offsets");
  auto next = offsets.begin();
  for (int64_t i = 0; i < L; ++i) {
    const std::string layer = "subspace_penalty: layer " + std::to_string(i);
    check_factors(layer, weights[i], u[i], s[i], v[i]);
    check_offsets(layer, std::vector<int64_t>(next, next + subspaces[i] + 1), s[i].size(0));
    next += subspaces[i] + 1;
    check_shape(layer, "s0", s0[i], {s[i].size(0)});
    check_dtype(layer, "s0", s0[i], s[i].scalar_type());
    MASM_REQUIRE(norm2[i].numel() == 1, "masm::", layer, ": expected weight_norm2 of one element, got ",
                 shape_of(norm2[i]));
    check_dtype(layer, "weight_norm2", norm2[i], s[i].scalar_type());
    check_dtype(layer, "u", u[i], u[0].scalar_type());
    check_device(layer, "s0", s0[i], "weight", weights[i]);
    check_device(layer, "weight_norm2", norm2[i], "weight", weights[i]);
    check_device(layer, "weight", weights[i], "that of layer 0", weights[0]);
  }
}

std::tuple<Tensor, Tensor, Tensor> subspace_penalty(std::vector<Tensor> weights, std::vector<Tensor> u,
                                                    std::vector<Tensor> s, std::vector<Tensor> v,
                                                    std::vector<Tensor> s0, std::vector<Tensor> weight_norm2,
                                                    std::vector<int64_t> offsets, std::vector<int64_t> subspaces,
                                                    bool need_gradients) {
  check_subspace_penalty(weights, u, s, v, s0, weight_norm2, offsets, subspaces);
  const int64_t L = int64_t(weights.size());
  const auto acc = accumulate_type(u[0].scalar_type());
  int64_t P = 0;
  for (int64_t i = 0; i < L; ++i) {
    weights[i] = torch::stable::contiguous(weights[i]);
    for (auto* list : {&u, &s, &v, &s0, &weight_norm2}) (*list)[i] = as_type((*list)[i], acc);
    if (need_gradients) P += u[i].numel() + v[i].numel() + s[i].numel();
  }
  Tensor orthogonality = torch::stable::new_empty(u[0], {}, acc), spectral = torch::stable::new_empty(u[0], {}, acc);
  Tensor gradients = torch::stable::new_empty(u[0], {2, P}, acc);
  // Largest layers first: the next free thread takes one.
  std::vector<int64_t> order(L);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return weights[a].numel() * s[a].numel() > weights[b].numel() * s[b].numel();
  });
  const auto run = [&](auto accumulate) {
    using A = decltype(accumulate);
    std::vector<Layer<A>> layers(L);
    A* out[3];  // destinations of the gradients of the next layer's u, v and s
    out[0] = static_cast<A*>(gradients.mutable_data_ptr()), out[1] = out[0], out[2] = out[0];
    for (int64_t i = 0; i < L; ++i) out[1] += u[i].numel(), out[2] += u[i].numel() + v[i].numel();
    int64_t next = 0;
    for (int64_t i = 0; i < L; ++i) {
      Layer<A>& layer = layers[i];
      layer.weight = weights[i].const_data_ptr();
      layer.u = static_cast<const A*>(u[i].const_data_ptr()), layer.s = static_cast<const A*>(s[i].const_data_ptr());
      layer.v = static_cast<const A*>(v[i].const_data_ptr()), layer.s0 = static_cast<const A*>(s0[i].const_data_ptr());
      layer.weight_norm2 = double(*static_cast<const A*>(weight_norm2[i].const_data_ptr()));
      layer.offsets = offsets.data() + next, layer.K = subspaces[i], next += subspaces[i] + 1;
      layer.N = weights[i].size(0), layer.D = weights[i].size(1), layer.R = s[i].size(0), layer.P = P;
      layer.du = layer.dv = layer.ds = nullptr;
      if (need_gradients) layer.du = out[0], layer.dv = out[1], layer.ds = out[2];
      out[0] += u[i].numel(), out[1] += v[i].numel(), out[2] += s[i].numel();
    }
    std::atomic<int64_t> taken{0};
    const int64_t threads = std::min<int64_t>(L, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = taken++) < L;) {
        Layer<A>& layer = layers[order[i]];
        if constexpr (std::is_same_v<A, double>) {
          penalize<double>(layer);
        } else {
          switch (weights[order[i]].scalar_type()) {
            case ScalarType::Float:
              penalize<float>(layer);
              break;
            case ScalarType::BFloat16:
              penalize<BF16>(layer);
              break;
            default:
              penalize<FP16>(layer);
          }
        }
      }
    });
    double total[2] = {};
    for (const Layer<A>& layer : layers) total[0] += layer.orthogonality, total[1] += layer.spectral;
    *static_cast<A*>(orthogonality.mutable_data_ptr()) = A(total[0]);
    *static_cast<A*>(spectral.mutable_data_ptr()) = A(total[1]);
  };
  acc == ScalarType::Double ? run(double{}) : run(float{});
  return {orthogonality, spectral, gradients};
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("subspace_penalty", TORCH_BOX(&masm::cpu::subspace_penalty)); }
