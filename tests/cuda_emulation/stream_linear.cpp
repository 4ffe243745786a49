#include "stream_linear.cuh"

#include "entry.h"

using namespace masm::cuda;

// sizes: M, N, D, R, x_row, weight_row. p_first: P in a launch of its own, whatever v's size.
extern "C" const char* stream_linear(const int64_t* sizes, const void* x, const void* weight, const void* u,
                                     const void* s, const void* v, const void* bias, void* y, float* p, int64_t type,
                                     int64_t factor_type, int64_t processors, int64_t p_first, int64_t seed) {
  return guarded([&] {
    const StreamCall call{sizes[0], sizes[1], sizes[2], sizes[3], x,        weight,   u,           s,
                          v,        bias,     y,        p,        sizes[4], sizes[5], DType(type), DType(factor_type)};
    auto launch = [&](auto kernel, unsigned blocks, int threads, const auto& arguments) {
      emulation::launch(unsigned(seed), kernel, dim3(blocks), unsigned(threads), 0, arguments);
    };
    start_stream(call, processors, p_first ? 0 : int64_t(1) << 40, launch);
  });
}
