// Runs a CUDA kernel's source on the CPU. A block's threads are fibers that switch only at barriers and warp
// operations. One warp, drawn from a seed, runs ahead of all others until it has to wait for them, then another; the
// order inside a warp is drawn too. A result that depends on the seed is a race; threads that wait at different
// barriers, a thread that ended before a grid barrier, or lanes that a warp operation names and that have ended, are
// errors. Blocks run one after another in a shuffled order, or (launch_cooperative) all at once. Shared memory starts
// as NaN.
//
// What it cannot see: races between two barriers in which both orders give the same result here (a thread is never
// interrupted between them), and anything about time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t size() const { return uint64_t(x) * y * z; }
  constexpr dim3 at(uint64_t i) const { return {unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)}; }
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// bfloat16 and float16 as cuda_bf16.h and cuda_fp16.h have them: rounded to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    bits = uint16_t(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
struct __half {
  _Float16 value;
  __half() = default;
  __half(float f) : value(_Float16(f)) {}
  operator float() const { return float(value); }
};

namespace emulation {

enum class Wait { none, warp, block, grid };

struct Fiber {
  ucontext_t context;
  dim3 thread;
  unsigned index = 0;  // in its block
  Wait wait = Wait::none;
  uint32_t lanes = 0;          // of a warp operation
  std::source_location at;     // where it waits
  const void* slot = nullptr;  // what it shows to the others of its warp or block
  size_t shared_seen = 0;      // shared arrays declared so far
  bool ended = false;
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<std::pair<std::unique_ptr<unsigned char[]>, size_t>> shared;  // of their exact sizes: ASan sees the ends
  std::unique_ptr<unsigned char[]> dynamic;
};

struct Grid {
  dim3 blocks, threads;
  bool all_at_once = false;
  std::mt19937 random;
  std::function<void()> body;
  std::vector<Block> running;
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  ucontext_t scheduler;
  std::string error;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
#endif
};
inline Grid* grid = nullptr;

constexpr size_t kStack = 256 << 10;
inline unsigned char* stack(size_t i) {  // kept: a launch has thousands of fibers
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= i) stacks.emplace_back(new unsigned char[kStack]);
  return stacks[i].get();
}

inline void to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(grid->fiber->ended ? nullptr : &fake, grid->scheduler_stack, grid->scheduler_size);
#endif
  swapcontext(&grid->fiber->context, &grid->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &grid->scheduler_stack, &grid->scheduler_size);
#endif
}

inline void to_fiber(Fiber& fiber) {
  grid->fiber = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.context.uc_stack.ss_sp, fiber.context.uc_stack.ss_size);
#endif
  swapcontext(&grid->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &grid->scheduler_stack, &grid->scheduler_size);
#endif
  try {
    grid->body();
  } catch (const std::exception& e) {
    if (grid->error.empty()) grid->error = e.what();
  }
  grid->fiber->ended = true;
  to_scheduler();
}

inline std::string place(const std::source_location& at) {
  return std::string(at.file_name()) + ":" + std::to_string(at.line());
}

inline void wait_for(Wait what, const std::source_location& at, const void* slot = nullptr, uint32_t lanes = ~0u) {
  Fiber& self = *grid->fiber;
  self.wait = what, self.at = at, self.slot = slot, self.lanes = lanes;
  to_scheduler();
}

// Opens every barrier at which all threads that it is for have arrived. False if there is none.
inline bool open_barriers() {
  bool opened = false;
  auto open = [&](std::vector<Fiber*>& waiting) {
    for (Fiber* f : waiting) {
      if (f->at.line() != waiting[0]->at.line() || f->at.column() != waiting[0]->at.column() ||
          std::strcmp(f->at.file_name(), waiting[0]->at.file_name()) != 0)
        throw std::runtime_error("threads meet at different barriers: " + place(f->at) + " and " +
                                 place(waiting[0]->at));
      f->wait = Wait::none;
    }
    opened |= !waiting.empty();
  };
  std::vector<Fiber*> all;
  bool whole_grid = true, any_ended = false, any_at_grid = false;
  for (Block& block : grid->running) {
    auto& fibers = block.fibers;
    std::vector<Fiber*> waiting;
    bool whole_block = true;
    for (Fiber& f : fibers) {
      if (f.wait == Wait::grid && !grid->all_at_once)
        throw std::runtime_error("a grid barrier in a launch that is not cooperative: " + place(f.at));
      any_ended |= f.ended, any_at_grid |= f.wait == Wait::grid;
      if (f.ended) continue;
      whole_block &= f.wait == Wait::block;
      whole_grid &= f.wait == Wait::grid;
      waiting.push_back(&f), all.push_back(&f);
    }
    if (whole_block) open(waiting);
    for (size_t warp = 0; warp < fibers.size(); warp += 32) {
      const size_t end = std::min(warp + 32, fibers.size());
      for (size_t i = warp; i < end; ++i) {
        if (fibers[i].ended || fibers[i].wait != Wait::warp) continue;
        const uint32_t lanes = fibers[i].lanes;
        std::vector<Fiber*> named;
        bool there = true;
        for (size_t j = warp; j < warp + 32; ++j) {
          if (!(lanes >> (j - warp) & 1)) continue;
          if (j >= end || fibers[j].ended)
            throw std::runtime_error("a warp operation names a lane that has ended or never was: " +
                                     place(fibers[i].at));
          there &= fibers[j].wait == Wait::warp && fibers[j].lanes == lanes;
          named.push_back(&fibers[j]);
        }
        if (there) open(named);
      }
    }
  }
  if (any_at_grid && any_ended) throw std::runtime_error("a thread waits at a grid barrier, another has ended");
  if (whole_grid) open(all);
  return opened;
}

inline void run(std::vector<dim3> blocks, size_t dynamic_bytes) {
  const size_t threads = grid->threads.size();
  grid->running = std::vector<Block>(blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = grid->running[b];
    block.index = blocks[b];
    block.dynamic.reset(new unsigned char[dynamic_bytes]);
    std::memset(block.dynamic.get(), 0xff, dynamic_bytes);
    block.fibers = std::vector<Fiber>(threads);
    for (size_t t = 0; t < threads; ++t) {
      Fiber& f = block.fibers[t];
      f.index = unsigned(t), f.thread = grid->threads.at(t);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stack(b * threads + t), f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
  }
  std::vector<std::pair<Block*, Fiber*>> ready;
  const void* favoured = nullptr;  // the first fiber of the warp that runs ahead of all others as far as it can
  auto warp_of = [](const std::pair<Block*, Fiber*>& at) { return &at.first->fibers[at.second->index / 32 * 32]; };
  while (grid->error.empty()) {
    const bool opened = open_barriers();
    ready.clear();
    bool ended = true;
    for (Block& block : grid->running)
      for (Fiber& f : block.fibers) {
        ended &= f.ended;
        if (!f.ended && f.wait == Wait::none) ready.push_back({&block, &f});
      }
    if (ended) break;
    if (ready.empty() && !opened) throw std::runtime_error("deadlock: threads wait at different barriers");
    std::shuffle(ready.begin(), ready.end(), grid->random);
    const auto others = [&](const auto& at) { return warp_of(at) != favoured; };
    if (!ready.empty() && std::all_of(ready.begin(), ready.end(), others)) favoured = warp_of(ready[0]);
    ready.erase(std::remove_if(ready.begin(), ready.end(), others), ready.end());
    for (auto [block, fiber] : ready) {  // each runs to its next barrier
      grid->block = block;
      to_fiber(*fiber);
      if (!grid->error.empty()) break;
    }
  }
  if (!grid->error.empty()) throw std::runtime_error(grid->error);
}

template <bool all_at_once, class Kernel, class... Arguments>
void launch_blocks(unsigned seed, Kernel kernel, dim3 blocks, dim3 threads, size_t dynamic_bytes,
                   const Arguments&... arguments) {
  Grid own;
  grid = &own;
  own.blocks = blocks, own.threads = threads, own.all_at_once = all_at_once, own.random.seed(seed);
  own.body = [&] { kernel(arguments...); };
  std::vector<dim3> order(blocks.size());
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = blocks.at(i);
  std::shuffle(order.begin(), order.end(), own.random);
  if (all_at_once)
    run(order, dynamic_bytes);
  else
    for (dim3 block : order) run({block}, dynamic_bytes);
  grid = nullptr;
}
template <class Kernel, class... Arguments>
void launch(unsigned seed, Kernel kernel, dim3 blocks, dim3 threads, size_t dynamic_bytes, const Arguments&... rest) {
  launch_blocks<false>(seed, kernel, blocks, threads, dynamic_bytes, rest...);
}
template <class Kernel, class... Arguments>
void launch_cooperative(unsigned seed, Kernel kernel, dim3 blocks, dim3 threads, size_t dynamic_bytes,
                        const Arguments&... rest) {
  launch_blocks<true>(seed, kernel, blocks, threads, dynamic_bytes, rest...);
}

// The shared array that the running thread declares next: the same for all threads of its block.
template <class T>
T* shared(size_t n) {
  auto& arrays = grid->block->shared;
  const size_t i = grid->fiber->shared_seen++, bytes = n * sizeof(T);
  if (i == arrays.size()) {
    arrays.emplace_back(new unsigned char[bytes], bytes);
    std::memset(arrays[i].first.get(), 0xff, bytes);
  }
  if (arrays[i].second != bytes) throw std::runtime_error("threads declare different shared arrays");
  return reinterpret_cast<T*>(arrays[i].first.get());
}

// Each lane shows `value`; when all have, each looks: look(lane) is what that lane shows.
template <class T, class Look>
auto exchange(const T& value, uint32_t lanes, const std::source_location& at, Look look) {
  const T shown = value;
  wait_for(Wait::warp, at, &shown, lanes);
  Fiber* warp = &grid->block->fibers[grid->fiber->index / 32 * 32];
  auto result = look([&](unsigned lane) -> const T& {
    if (!(lanes >> lane & 1)) throw std::runtime_error("a lane reads one that is not named: " + place(at));
    return *static_cast<const T*>(warp[lane].slot);
  });
  wait_for(Wait::warp, at, &shown, lanes);
  return result;
}

inline unsigned lane() { return grid->fiber->index % 32; }

}  // namespace emulation

#define threadIdx (emulation::grid->fiber->thread)
#define blockIdx (emulation::grid->block->index)
#define blockDim (emulation::grid->threads)
#define gridDim (emulation::grid->blocks)
#define MASM_SHARED(T, name, n) T* const name = emulation::shared<T>(n)

using Place = std::source_location;

inline void __syncthreads(Place at = Place::current()) { emulation::wait_for(emulation::Wait::block, at); }
inline void __syncwarp(uint32_t lanes = ~0u, Place at = Place::current()) {
  emulation::wait_for(emulation::Wait::warp, at, nullptr, lanes);
}
inline void emulated_grid_barrier(Place at = Place::current()) { emulation::wait_for(emulation::Wait::grid, at); }
inline int __syncthreads_or(int value, Place at = Place::current()) {
  emulation::wait_for(emulation::Wait::block, at, &value);
  int any = 0;
  for (const auto& f : emulation::grid->block->fibers) any |= f.ended ? 0 : *static_cast<const int*>(f.slot) != 0;
  emulation::wait_for(emulation::Wait::block, at, &value);
  return any;
}
template <class T>
T __shfl_xor_sync(uint32_t lanes, T value, int mask, Place at = Place::current()) {
  return emulation::exchange(value, lanes, at, [&](auto shown) { return shown(emulation::lane() ^ mask); });
}
template <class T>
T __shfl_down_sync(uint32_t lanes, T value, unsigned by, Place at = Place::current()) {
  const unsigned from = emulation::lane() + by;
  return emulation::exchange(value, lanes, at, [&](auto shown) { return shown(from < 32 ? from : from - by); });
}
template <class T>
T __shfl_sync(uint32_t lanes, T value, int from, Place at = Place::current()) {
  return emulation::exchange(value, lanes, at, [&](auto shown) { return shown(unsigned(from) % 32); });
}
inline uint32_t __ballot_sync(uint32_t lanes, int value, Place at = Place::current()) {
  return emulation::exchange(value, lanes, at, [&](auto shown) {
    uint32_t bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (lanes >> lane & 1) bits |= uint32_t(shown(lane) != 0) << lane;
    return bits;
  });
}
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <class T>
T atomicMax(T* p, T value) {
  const T before = *p;
  *p = std::max(before, value);
  return before;
}
[[noreturn]] inline void __trap() { throw std::runtime_error("__trap"); }
inline void __threadfence() {}
