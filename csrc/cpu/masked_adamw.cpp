// masm::masked_adamw_ on the CPU: the first sweep sums the squares of the gradients and finds non-finite
// ones, the second updates.
#include "../masked_adamw.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../math/adamw.h"
#include "dense.h"
#include "rows.h"

// target_clones compiles a loop once per instruction set and selects at run time; it does not apply to templates. Its
// resolvers run before a sanitizer is initialised, so sanitizer builds use the plain version.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MASM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MASM_SIMD
#endif

namespace masm::cpu {
namespace {

// Elements of a task. Sums are formed per task and added in task order, so they do not depend on the thread count.
constexpr int64_t kTaskElements = 16384;

struct Task {
  int64_t tensor, begin, end, block;
};

struct Parameter {
  ScalarType type;
  int64_t numel;
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  const void* penalty;  // or null
};

// The constants of a step. The powers of the betas are recomputed only if they differ from the previous task's.
class StepCache {
 public:
  template <class F>
  const AdamWStep<F>& get(const double* hyper, double mask, double t) {
    const std::array<double, 7> key{hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], mask, t};
    if (key != key_ || !known_) {
      const auto [lr, beta1, beta2, eps, weight_decay, m, n] = key;
      narrow_ = adamw_step<float>(lr, beta1, beta2, eps, weight_decay, m, n);
      wide_ = adamw_step<double>(lr, beta1, beta2, eps, weight_decay, m, n);
      key_ = key, known_ = true;
    }
    if constexpr (std::is_same_v<F, double>)
      return wide_;
    else
      return narrow_;
  }

 private:
  std::array<double, 7> key_{};
  bool known_ = false;
  AdamWStep<float> narrow_;
  AdamWStep<double> wide_;
};

// Half-precision elements that are widened, updated and rounded at a time.
constexpr int64_t kRun = 512;

// The two sweeps over n elements, one body for both types. Sums in float64: squares of small gradients would underflow.
// The largest magnitude shows a non-finite element as well as a square that overflows.
#define MASM_INSPECT(F, I, SIGN_OFF)                                                                              \
  MASM_SIMD void inspect(const F* g, F inverse_scale, int64_t n, double* power, F* largest) {                     \
    double sum = 0;                                                                                               \
    I most = 0;                                                                                                   \
    _Pragma("omp simd reduction(+ : sum) reduction(max : most)") for (int64_t i = 0; i < n; ++i) {                \
      const F value = g[i] * inverse_scale;                                                                       \
      const I bits = std::bit_cast<I>(value) & SIGN_OFF; /* ordered like the magnitudes, infinity and NaN last */ \
      most = bits > most ? bits : most;                                                                           \
      sum += double(value) * double(value);                                                                       \
    }                                                                                                             \
    *power += sum;                                                                                                \
    *largest = std::bit_cast<F>(std::max(most, std::bit_cast<I>(*largest)));                                      \
  }

// signal: <g, m before the step>. Two functions: a test for the penalty inside the loop would slow the other case.
#define MASM_UPDATE(F, NAME, PENALTY)                                                          \
  MASM_SIMD void NAME(const AdamWStep<F>& step, F inverse_scale, F* p, const F* g, F* m, F* v, \
                      [[maybe_unused]] const F* e, int64_t n, double* signal) {                \
    const AdamWStep<F> c = step;                                                               \
    double sum = 0;                                                                            \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) {                   \
      const F gi = g[i] * inverse_scale;                                                       \
      F pi = p[i], mi = m[i], vi = v[i];                                                       \
      sum += double(gi) * double(mi);                                                          \
      adamw_element(c, gi, PENALTY, pi, mi, vi);                                               \
      p[i] = pi, m[i] = mi, v[i] = vi;                                                         \
    }                                                                                          \
    *signal += sum;                                                                            \
  }

MASM_INSPECT(float, int32_t, 0x7fffffff)
MASM_INSPECT(double, int64_t, 0x7fffffffffffffff)
MASM_UPDATE(float, update_plain, 0.0f)
MASM_UPDATE(double, update_plain, 0.0)
MASM_UPDATE(float, update_penalized, e[i])
MASM_UPDATE(double, update_penalized, e[i])

// Adds ||g||^2 to `power`. False if an element is not finite or its square overflows the second moment: an infinite
// moment would stop its element for good.
template <class P, class F>
bool inspect_task(const P* g, F inverse_scale, int64_t n, double* power) {
  F largest = 0;
  if constexpr (std::is_same_v<P, F>) {
    inspect(g, inverse_scale, n, power, &largest);
  } else {
    F wide[kRun];
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t live = std::min(kRun, n - i);
      widen(g + i, wide, live);
      inspect(wide, inverse_scale, live, power, &largest);
    }
  }
  return std::isfinite(largest * largest);
}

template <class P, class F>
void update_task(const AdamWStep<F>& c, F inverse_scale, P* p, const P* g, F* m, F* v, const F* penalty, int64_t n,
                 double* signal) {
  void (*update)(const AdamWStep<F>&, F, F*, const F*, F*, F*, const F*, int64_t, double*) = update_plain;
  if (penalty != nullptr) update = update_penalized;
  if constexpr (std::is_same_v<P, F>) {
    update(c, inverse_scale, p, g, m, v, penalty, n, signal);
  } else {
    F wide_p[kRun], wide_g[kRun];
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t live = std::min(kRun, n - i);
      widen(p + i, wide_p, live), widen(g + i, wide_g, live);
      update(c, inverse_scale, wide_p, wide_g, m + i, v + i, penalty ? penalty + i : nullptr, live, signal);
      narrow(wide_p, p + i, live);
    }
  }
}

// Two segments that overlap would be updated twice, at the same time.
void check_disjoint(const std::vector<Task>& segments) {
  const auto before = [](const Task& a, const Task& b) {
    return std::tie(a.tensor, a.begin, a.end) < std::tie(b.tensor, b.begin, b.end);
  };
  const auto check = [](const std::vector<Task>& sorted) {
    for (size_t i = 1; i < sorted.size(); ++i)
      STD_TORCH_CHECK(sorted[i].tensor != sorted[i - 1].tensor || sorted[i].begin >= sorted[i - 1].end,
                      "masm::masked_adamw_: segments of tensor ", sorted[i].tensor, " overlap at element ",
                      sorted[i].begin);
  };
  if (std::is_sorted(segments.begin(), segments.end(), before)) return check(segments);  // the order of MaskedAdamW
  std::vector<Task> sorted = segments;
  std::sort(sorted.begin(), sorted.end(), before);
  check(sorted);
}

std::tuple<Tensor, Tensor> masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                                         std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                                         std::vector<Tensor> penalties, Tensor steps, const Tensor& mask,
                                         const Tensor& segments, const Tensor& hyper, std::optional<Tensor> grad_scale,
                                         std::optional<Tensor> found_inf) {
  check_masked_adamw(params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale,
                     found_inf);
  const int64_t B = mask.numel(), S = segments.size(0);
  const float* mask_data = static_cast<const float*>(mask.const_data_ptr());
  const int64_t* segment_data = static_cast<const int64_t*>(segments.const_data_ptr());
  const double* hyper_data = static_cast<const double*>(hyper.const_data_ptr());

  for (int64_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(mask_data[b] >= 0 && mask_data[b] <= 1, "masm::masked_adamw_: mask[", b, "] is ", mask_data[b],
                    ", expected a value in [0, 1]");
  const double inverse_scale =
      grad_scale ? 1.0 / double(*static_cast<const float*>(grad_scale->const_data_ptr())) : 1.0;

  std::vector<Parameter> list(params.size());  // each read of a Tensor is a call into libtorch
  for (size_t i = 0; i < params.size(); ++i)
    list[i] = {params[i].scalar_type(),
               params[i].numel(),
               params[i].mutable_data_ptr(),
               grads[i].const_data_ptr(),
               exp_avgs[i].mutable_data_ptr(),
               exp_avg_sqs[i].mutable_data_ptr(),
               penalties.empty() || penalties[i].numel() == 0 ? nullptr : penalties[i].const_data_ptr()};
  std::vector<Task> tasks, segment_list;
  segment_list.reserve(S), tasks.reserve(S);
  std::vector<char> live(B, 0);
  for (int64_t i = 0; i < S; ++i) {
    const auto [tensor, begin, end, block] =
        Task{segment_data[4 * i], segment_data[4 * i + 1], segment_data[4 * i + 2], segment_data[4 * i + 3]};
    STD_TORCH_CHECK(tensor >= 0 && tensor < int64_t(list.size()) && block >= 0 && block < B && begin >= 0 &&
                        begin <= end && end <= list[tensor].numel,
                    "masm::masked_adamw_: segment ", i, " (", tensor, ", ", begin, ", ", end, ", ", block,
                    ") lies outside its tensor or the blocks");
    segment_list.push_back({tensor, begin, end, block});
    if (mask_data[block] == 0) continue;
    live[block] = 1;
    for (int64_t b = begin; b < end; b += kTaskElements)
      tasks.push_back({tensor, b, std::min(end, b + kTaskElements), block});
  }

  check_disjoint(segment_list);

  Tensor stats = torch::stable::new_zeros(hyper, {B, 2});
  Tensor found = torch::stable::new_zeros(mask, {1});
  float* found_data = static_cast<float*>(found.mutable_data_ptr());
  std::vector<char> bad(tasks.size(), 0);
  std::vector<double> sums(2 * tasks.size(), 0.0);
  const int64_t count = int64_t(tasks.size());
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0) *found_data = 1;
  if (*found_data == 0) {
    torch::stable::parallel_for(0, count, 4, [&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t)
        dispatch_rows(list[tasks[t].tensor].type, [&](auto type, auto, auto accumulate, const auto&) {
          using P = decltype(type);
          using F = decltype(accumulate);
          const Task& task = tasks[t];
          const P* g = static_cast<const P*>(list[task.tensor].grad) + task.begin;
          bad[t] = !inspect_task<P, F>(g, F(inverse_scale), task.end - task.begin, &sums[2 * t + 1]);
        });
    });
    if (std::any_of(bad.begin(), bad.end(), [](char b) { return b != 0; })) *found_data = 1;
  }
  if (*found_data != 0) return {stats, found};  // nothing is written

  int64_t* step_data = static_cast<int64_t*>(steps.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b) step_data[b] += live[b];
  torch::stable::parallel_for(0, count, 4, [&](int64_t t0, int64_t t1) {
    StepCache cache;
    for (int64_t t = t0; t < t1; ++t) {
      const Task& task = tasks[t];
      const Parameter& own = list[task.tensor];
      dispatch_rows(own.type, [&](auto type, auto, auto accumulate, const auto&) {
        using P = decltype(type);
        using F = decltype(accumulate);
        const auto& c =
            cache.get<F>(hyper_data + 5 * task.tensor, mask_data[task.block], double(step_data[task.block]));
        update_task<P, F>(c, F(inverse_scale), static_cast<P*>(own.param) + task.begin,
                          static_cast<const P*>(own.grad) + task.begin, static_cast<F*>(own.exp_avg) + task.begin,
                          static_cast<F*>(own.exp_avg_sq) + task.begin,
                          own.penalty ? static_cast<const F*>(own.penalty) + task.begin : nullptr,
                          task.end - task.begin, &sums[2 * t]);
        // before the first step there is no first moment: the block has no statistics yet
        sums[2 * t] *= c.signal_scale;
        if (c.signal_scale == 0) sums[2 * t + 1] = 0;
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
