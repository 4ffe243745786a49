// Runs a CUDA kernel's source on the CPU: threads one after another, in an order that a seed shuffles. This subset
// serves kernels without barriers or shared memory; a result that depends on the order is a race.
#pragma once
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {
inline dim3 thread_idx, block_idx, block_dim, grid_dim;

template <class Kernel, class... Args>
void launch(unsigned seed, Kernel kernel, dim3 grid, dim3 block, Args... args) {
  grid_dim = grid, block_dim = block;
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z * block.x * block.y * block.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (uint64_t i : order) {
    thread_idx = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y % block.z)};
    i /= uint64_t(block.x) * block.y * block.z;
    block_idx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    kernel(args...);
  }
}
}  // namespace emulation

#define threadIdx (emulation::thread_idx)
#define blockIdx (emulation::block_idx)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)
