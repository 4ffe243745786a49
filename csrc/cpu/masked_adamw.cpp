// masm::masked_adamw_ on the CPU: one sweep that looks for non-finite gradients, one that updates and sums.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../math/adamw.h"
#include "dense.h"

namespace masm::cpu {
namespace {

// Elements a task owns. Sums are formed per task and added in task order: independent of the number of threads.
constexpr int64_t kTaskElements = 16384;

struct Task {
  int64_t tensor, begin, end, block;
};

template <class P, class F>
void update(const AdamWStep<F>& c, F inverse_scale, P* p, const P* g, F* m, F* v, int64_t begin, int64_t end,
            double* sums) {
  double bias2 = 0, grad2 = 0;
  for (int64_t i = begin; i < end; ++i) {
    const F gi = F(g[i]) * inverse_scale;
    F pi = F(p[i]), mi = m[i], vi = v[i];
    adamw_element(c, gi, pi, mi, vi);
    p[i] = P(pi), m[i] = mi, v[i] = vi;
    bias2 += double(mi) * double(mi);
    grad2 += double(gi) * double(gi);
  }
  sums[0] = bias2, sums[1] = grad2;
}

// Also false where the square would overflow the second moment: an infinite moment would stop its element for good.
template <class P, class F>
bool finite(const P* g, F inverse_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const F value = F(g[i]) * inverse_scale;
    if (!std::isfinite(value * value)) return false;
  }
  return true;
}

void check_scalar(const char* name, const std::optional<Tensor>& t) {
  STD_TORCH_CHECK(!t || (t->scalar_type() == ScalarType::Float && t->numel() == 1 && t->is_cpu()),
                  "masm::masked_adamw_: ", name, " must be one float32 element on the CPU");
}

// Two segments that overlap would be updated twice, at the same time.
void check_disjoint(std::vector<Task> segments) {
  std::sort(segments.begin(), segments.end(), [](const Task& a, const Task& b) {
    return std::tie(a.tensor, a.begin, a.end) < std::tie(b.tensor, b.begin, b.end);
  });
  for (size_t i = 1; i < segments.size(); ++i)
    STD_TORCH_CHECK(segments[i].tensor != segments[i - 1].tensor || segments[i].begin >= segments[i - 1].end,
                    "masm::masked_adamw_: segments of tensor ", segments[i].tensor, " overlap at element ",
                    segments[i].begin);
}

void check_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& m,
                 const std::vector<Tensor>& v) {
  STD_TORCH_CHECK(grads.size() == params.size() && m.size() == params.size() && v.size() == params.size(),
                  "masm::masked_adamw_: params, grads, exp_avgs and exp_avg_sqs must have one length, got ",
                  params.size(), ", ", grads.size(), ", ", m.size(), ", ", v.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto type = params[i].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || is_half(type),
                    "masm::masked_adamw_: parameter ", i, " must be floating point");
    STD_TORCH_CHECK(
        params[i].is_contiguous() && grads[i].is_contiguous() && m[i].is_contiguous() && v[i].is_contiguous(),
        "masm::masked_adamw_: tensors of parameter ", i, " must be contiguous");
    STD_TORCH_CHECK(grads[i].scalar_type() == type && m[i].scalar_type() == accumulate_type(type) &&
                        v[i].scalar_type() == accumulate_type(type),
                    "masm::masked_adamw_: parameter ", i,
                    ": the gradient must have its dtype, the moments float32 (float64 for float64)");
    const int64_t n = params[i].numel();
    STD_TORCH_CHECK(grads[i].numel() == n && m[i].numel() == n && v[i].numel() == n, "masm::masked_adamw_: parameter ",
                    i, " has ", n, " elements, its gradient ", grads[i].numel());
  }
}

std::tuple<Tensor, Tensor> masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                                         std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, Tensor steps,
                                         const Tensor& mask, const Tensor& segments, const Tensor& hyper,
                                         std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  check_lists(params, grads, exp_avgs, exp_avg_sqs);
  const int64_t B = mask.numel(), S = segments.dim() == 2 ? segments.size(0) : -1;
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Float && mask.is_contiguous(),
                  "masm::masked_adamw_: mask must be float32 [B]");
  STD_TORCH_CHECK(steps.scalar_type() == ScalarType::Long && steps.numel() == B && steps.is_contiguous(),
                  "masm::masked_adamw_: steps must be int64 [B] = [", B, "], got ", shape_of(steps));
  STD_TORCH_CHECK(
      S >= 0 && segments.size(1) == 4 && segments.scalar_type() == ScalarType::Long && segments.is_contiguous(),
      "masm::masked_adamw_: segments must be int64 [S, 4], got ", shape_of(segments));
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(0) == int64_t(params.size()) && hyper.size(1) == 5 &&
                      hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(),
                  "masm::masked_adamw_: hyper must be float64 [T, 5] = [", params.size(), ", 5], got ",
                  shape_of(hyper));
  const float* mask_data = static_cast<const float*>(mask.const_data_ptr());
  const int64_t* segment_data = static_cast<const int64_t*>(segments.const_data_ptr());
  const double* hyper_data = static_cast<const double*>(hyper.const_data_ptr());

  check_scalar("grad_scale", grad_scale);
  check_scalar("found_inf", found_inf);
  for (int64_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(mask_data[b] >= 0 && mask_data[b] <= 1, "masm::masked_adamw_: mask[", b, "] is ", mask_data[b],
                    ", expected a value in [0, 1]");
  const double inverse_scale =
      grad_scale ? 1.0 / double(*static_cast<const float*>(grad_scale->const_data_ptr())) : 1.0;

  std::vector<Task> tasks, segment_list;
  std::vector<char> live(B, 0);
  for (int64_t i = 0; i < S; ++i) {
    const auto [tensor, begin, end, block] =
        Task{segment_data[4 * i], segment_data[4 * i + 1], segment_data[4 * i + 2], segment_data[4 * i + 3]};
    STD_TORCH_CHECK(tensor >= 0 && tensor < int64_t(params.size()) && block >= 0 && block < B && begin >= 0 &&
                        begin <= end && end <= params[tensor].numel(),
                    "masm::masked_adamw_: segment ", i, " (", tensor, ", ", begin, ", ", end, ", ", block,
                    ") lies outside its tensor or the blocks");
    segment_list.push_back({tensor, begin, end, block});
    if (mask_data[block] == 0) continue;
    live[block] = 1;
    for (int64_t b = begin; b < end; b += kTaskElements)
      tasks.push_back({tensor, b, std::min(end, b + kTaskElements), block});
  }

  check_disjoint(std::move(segment_list));

  Tensor stats = torch::stable::new_zeros(hyper, {B, 2});
  Tensor found = torch::stable::new_zeros(mask, {1});
  float* found_data = static_cast<float*>(found.mutable_data_ptr());
  std::vector<char> bad(tasks.size(), 0);
  const int64_t count = int64_t(tasks.size());
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0) *found_data = 1;
  if (*found_data == 0) {
    torch::stable::parallel_for(0, count, 4, [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t)
        dispatch(grads[tasks[t].tensor].scalar_type(), [&](auto type, auto accumulate) {
          using P = decltype(type);
          using F = decltype(accumulate);
          const P* g = static_cast<const P*>(grads[tasks[t].tensor].const_data_ptr());
          bad[t] = !finite<P, F>(g, F(inverse_scale), tasks[t].begin, tasks[t].end);
        });
    });
    if (std::any_of(bad.begin(), bad.end(), [](char b) { return b != 0; })) *found_data = 1;
  }
  if (*found_data != 0) return {stats, found};  // nothing is written

  int64_t* step_data = static_cast<int64_t*>(steps.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b) step_data[b] += live[b];
  std::vector<double> sums(2 * tasks.size());
  torch::stable::parallel_for(0, count, 4, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const Task& task = tasks[t];
      dispatch(params[task.tensor].scalar_type(), [&](auto type, auto accumulate) {
        using P = decltype(type);
        using F = decltype(accumulate);
        const double* h = hyper_data + 5 * task.tensor;
        const auto c =
            adamw_step<F>(h[0], h[1], h[2], h[3], h[4], mask_data[task.block], double(step_data[task.block]));
        update<P, F>(c, F(inverse_scale), static_cast<P*>(params[task.tensor].mutable_data_ptr()),
                     static_cast<const P*>(grads[task.tensor].const_data_ptr()),
                     static_cast<F*>(exp_avgs[task.tensor].mutable_data_ptr()),
                     static_cast<F*>(exp_avg_sqs[task.tensor].mutable_data_ptr()), task.begin, task.end, &sums[2 * t]);
      });
    }
  });
  double* stats_data = static_cast<double*>(stats.mutable_data_ptr());
  for (int64_t t = 0; t < count; ++t)
    for (int j = 0; j < 2; ++j) stats_data[2 * tasks[t].block + j] += sums[2 * t + j];
  return {stats, found};
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("masked_adamw_", TORCH_BOX(&masm::cpu::masked_adamw_)); }
