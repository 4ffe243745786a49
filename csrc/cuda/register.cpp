// CUDA registration through the stable ABI. Plain C++ (no nvcc): checks, then calls the torch-free launchers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../contract.h"
#include "../masked_adamw.h"
#include "../update_masks.h"
#include "launch.h"
#include "tensors.h"

namespace masm {
namespace {

void update_masks_(const Tensor& sums, const Tensor& counts, const Tensor& masks, const Tensor& live,
                   const Tensor& counters, const Tensor& history, const Tensor& history_steps, const Tensor& stats,
                   const Tensor& found, const Tensor& owned, double decay, int64_t warmup, int64_t interval,
                   double hysteresis, int64_t keep, double threshold, int64_t least, int64_t probe_interval,
                   int64_t probe_steps, bool select) {
  const MaskPolicy p{decay, warmup, interval, hysteresis, keep, threshold, least, probe_interval, probe_steps, select};
  const MaskTable t = mask_table(sums, counts, masks, live, counters, history, history_steps, stats, found, owned, p);
  torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  const cudaError_t status = cuda::update_masks(t, p, stream_of(sums));
  MASM_REQUIRE(status == cudaSuccess, "masm::update_masks_: ", cudaGetErrorString(status));
}

// One launch; with more than kAdamWInline parameters, a few small ones before it. Nothing waits for the GPU.
std::tuple<Tensor, Tensor> masked_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                                         std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                                         std::vector<Tensor> penalties, Tensor steps, const Tensor& mask,
                                         const Tensor& segments, const Tensor& hyper, std::optional<Tensor> grad_scale,
                                         std::optional<Tensor> found_inf) {
  check_masked_adamw(params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale,
                     found_inf);
  torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  const int64_t T = int64_t(params.size()), S = segments.size(0), B = mask.numel();
  std::vector<cuda::AdamWParameter> list(T);
  for (int64_t t = 0; t < T; ++t)
    list[t] = {params[t].mutable_data_ptr(),
               grads[t].const_data_ptr(),
               exp_avgs[t].mutable_data_ptr(),
               exp_avg_sqs[t].mutable_data_ptr(),
               penalties.empty() || penalties[t].numel() == 0 ? nullptr : penalties[t].const_data_ptr(),
               params[t].numel(),
               uint64_t(dtype_of(params[t]))};
  const auto scalar = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  Tensor stats = torch::stable::new_empty(hyper, {B, 2}), found = torch::stable::new_empty(mask, {1});
  cuda::AdamWTables tables{T,
                           S,
                           B,
                           static_cast<const cuda::AdamWSegment*>(segments.const_data_ptr()),
                           static_cast<const double*>(hyper.const_data_ptr()),
                           static_cast<const float*>(mask.const_data_ptr()),
                           static_cast<int64_t*>(steps.mutable_data_ptr()),
                           scalar(grad_scale),
                           scalar(found_inf),
                           static_cast<double*>(stats.mutable_data_ptr()),
                           static_cast<float*>(found.mutable_data_ptr()),
                           nullptr,
                           nullptr,
                           nullptr};
  int32_t blocks = 0;
  cudaError_t status = cuda::masked_adamw_blocks(tables, &blocks);
  MASM_REQUIRE(status == cudaSuccess, "masm::masked_adamw_: ", cudaGetErrorString(status));
  // one allocation, in units of 8 bytes: work, first, flags and the parameters that do not fit in the arguments
  const int64_t work = S * int64_t(sizeof(cuda::AdamWWork) / 8), flags = (blocks + 1) / 2;
  const int64_t uploaded = T > cuda::kAdamWInline ? T * int64_t(sizeof(cuda::AdamWParameter) / 8) : 0;
  Tensor workspace = torch::stable::new_empty(steps, {work + B + flags + uploaded});
  int64_t* memory = static_cast<int64_t*>(workspace.mutable_data_ptr());
  tables.work = reinterpret_cast<cuda::AdamWWork*>(memory);
  tables.first = memory + work;
  tables.flags = reinterpret_cast<int32_t*>(memory + work + B);
  auto* list_on_device = uploaded ? reinterpret_cast<cuda::AdamWParameter*>(memory + work + B + flags) : nullptr;
  status = cuda::masked_adamw(list.data(), tables, list_on_device, blocks, stream_of(mask));
  MASM_REQUIRE(status == cudaSuccess, "masm::masked_adamw_: ", cudaGetErrorString(status));
  return {stats, found};
}

}  // namespace
}  // namespace masm

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) { m.impl("update_masks_", TORCH_BOX(&masm::update_masks_)); }

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) { m.impl("masked_adamw_", TORCH_BOX(&masm::masked_adamw_)); }
