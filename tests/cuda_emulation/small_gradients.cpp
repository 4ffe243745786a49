#include "small_gradients.cuh"

#include "entry.h"

using namespace masm::cuda;

// dy, mask: addresses, one a layer, 0 for no mask; others null where there is none. sizes: layers, M, N, D, R; rows:
// those of dy, x, p and q.
extern "C" const char* small_gradients(const int64_t* dy, const int64_t* mask, const int64_t* sizes, const void* x,
                                       const void* s, const float* p, const float* q, void* du, void* dv, void* ds,
                                       void* dbias, const int64_t* rows, const int32_t* subspace, int64_t type,
                                       int64_t factor_type, int64_t seed) {
  return guarded([&] {
    SmallGradientsCall call{};
    call.sizes = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    for (int64_t j = 0; j < sizes[0]; ++j)
      call.dy[j] = reinterpret_cast<void*>(dy[j]), call.mask[j] = reinterpret_cast<void*>(mask[j]);
    call.x = x, call.s = s, call.p = p, call.q = q;
    call.du = du, call.dv = dv, call.ds = ds, call.dbias = dbias;
    call.dy_row = rows[0], call.x_row = rows[1], call.p_row = rows[2], call.q_row = rows[3];
    std::copy_n(subspace, call.sizes.R, call.subspace);
    call.type = DType(type), call.factor_type = DType(factor_type);
    start_small_gradients(call, [&](auto kernel, dim3 grid, int threads, const auto& arguments) {
      emulation::launch(unsigned(seed), kernel, grid, unsigned(threads), 0, arguments);
    });
  });
}
