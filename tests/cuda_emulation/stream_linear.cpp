#include "stream_linear.cuh"

#include "entry.h"

using namespace masm::cuda;

// addresses: int64 [layers, 6], rows (weight, u, s, v, bias, y), 0 for none; sizes: layers, M, N, D, R.
// p_first: P in a launch of its own, whatever v's size.
extern "C" const char* stream_linear(const int64_t* addresses, const int64_t* sizes, const void* x, float* p,
                                     int64_t x_row, int64_t weight_row, int64_t p_row, int64_t type,
                                     int64_t factor_type, int64_t processors, int64_t p_first, int64_t seed) {
  return guarded([&] {
    StreamCall call{};
    call.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    for (int64_t j = 0; j < sizes[0]; ++j) {
      void* at[6];
      for (int i = 0; i < 6; ++i) at[i] = reinterpret_cast<void*>(addresses[6 * j + i]);
      call.layer[j] = {at[0], at[1], at[2], at[3], at[4], at[5]};
    }
    call.x = x, call.p = p;
    call.x_row = x_row, call.weight_row = weight_row, call.p_row = p_row;
    call.type = DType(type), call.factor_type = DType(factor_type);
    auto launch = [&](auto kernel, dim3 grid, int threads, const auto& arguments, bool) {
      emulation::launch(unsigned(seed), kernel, grid, unsigned(threads), 0, arguments);
    };
    start_stream(call, {processors, p_first ? 0 : int64_t(1) << 40}, launch);
  });
}
