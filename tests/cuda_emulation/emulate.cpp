// Kernels that show what the emulation sees. `fault` puts a mistake into them.
#include "device.cuh"
#include "entry.h"

using namespace masm::cuda;

enum Fault {
  none,
  no_barrier,
  one_thread_waits,
  lane_ended,
  past_shared,
  past_global,
  unwritten_shared,
  no_grid_barrier,
  not_cooperative,
  ended_before_the_grid_barrier,
  scratch_used_again
};

// out[block] = the sum of one row of x.
__global__ void row_sum(const float* x, float* out, int n, Fault fault) {
  MASM_SHARED(float, part, 32);
  const float* row = x + int64_t(blockIdx.x) * n;
  float sum = 0;
  for (int i = threadIdx.x; i < n + (fault == past_global); i += blockDim.x) sum += row[i];
  if (fault == lane_ended && threadIdx.x == 37) return;
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(kAllLanes, sum, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32 + (fault == past_shared ? 32 : 0)] = sum;
  if (fault == one_thread_waits && threadIdx.x == 0)
    __syncthreads();
  else if (fault != no_barrier)
    __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32 + (fault == unwritten_shared); ++warp) total += part[warp];
    out[blockIdx.x] = total;
  }
}

// out[block] = two sums of the block through the same scratch, one after the other, as one number.
__global__ void two_sums(float* out, Fault fault) {
  MASM_SHARED(float, scratch, 32);
  float sums[2];
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = float(i + 1);
    __syncthreads();
    sums[i] = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sums[i] += scratch[warp];
    if (fault != scratch_used_again) __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = 100 * sums[0] + sums[1];
}

// out[block] = the sum of what all blocks wrote.
__global__ void grid_sum(float* written, float* out, Fault fault) {
  if (fault == ended_before_the_grid_barrier && blockIdx.x == 1) return;
  if (threadIdx.x == 0) written[blockIdx.x] = float(blockIdx.x + 1);
  if (fault != no_grid_barrier) grid_barrier();
  float* all = dynamic_shared<float>();
  if (threadIdx.x < gridDim.x) all[threadIdx.x] = written[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += all[block];
  const uint32_t odd = __ballot_sync(kAllLanes, threadIdx.x % 2);
  if (threadIdx.x == 0) out[blockIdx.x] = odd == 0xaaaaaaaau ? sum : -1;
}

extern "C" const char* row_sum_of(const float* x, float* out, int64_t rows, int64_t n, int64_t threads, int64_t fault,
                                  int64_t seed) {
  return guarded([&] {
    emulation::launch(unsigned(seed), row_sum, unsigned(rows), unsigned(threads), 0, x, out, int(n), Fault(fault));
  });
}
extern "C" const char* grid_sum_of(float* written, float* out, int64_t blocks, int64_t fault, int64_t seed) {
  return guarded([&] {
    if (fault == not_cooperative)
      return emulation::launch(unsigned(seed), grid_sum, unsigned(blocks), 64, blocks * sizeof(float), written, out,
                               Fault(fault));
    emulation::launch_cooperative(unsigned(seed), grid_sum, unsigned(blocks), 64, blocks * sizeof(float), written, out,
                                  Fault(fault));
  });
}
extern "C" const char* two_sums_of(float* out, int64_t blocks, int64_t threads, int64_t fault, int64_t seed) {
  return guarded(
      [&] { emulation::launch(unsigned(seed), two_sums, unsigned(blocks), unsigned(threads), 0, out, Fault(fault)); });
}
// out = x rounded, as bfloat16 and as float16, and read back.
extern "C" const char* rounded(const float* x, float* bf16, float* fp16, int64_t n) {
  return guarded([&] {
    for (int64_t i = 0; i < n; ++i) bf16[i] = float(bf16_t(x[i])), fp16[i] = float(half_t(x[i]));
  });
}
