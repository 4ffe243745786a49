#include "masked_adamw.cuh"

#include "entry.h"

using namespace masm::cuda;

// addresses: int64 [T, 6] rows (param, grad, exp_avg, exp_avg_sq, penalty or 0, numel), types [T]; `upload`: the
// parameters lie in "device memory" instead of the launch's arguments.
extern "C" const char* masked_adamw(const int64_t* addresses, const int64_t* types, int64_t T, const int64_t* segments,
                                    int64_t S, const double* hyper, const float* mask, int64_t* steps, int64_t B,
                                    const float* grad_scale, const float* found_inf, double* stats, float* found,
                                    int64_t upload, int64_t blocks, int64_t threads, int64_t seed) {
  return guarded([&] {
    std::vector<AdamWParameter> parameters(T);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t* row = addresses + 6 * t;
      parameters[t] = {reinterpret_cast<void*>(row[0]),
                       reinterpret_cast<void*>(row[1]),
                       reinterpret_cast<void*>(row[2]),
                       reinterpret_cast<void*>(row[3]),
                       reinterpret_cast<void*>(row[4]),
                       row[5],
                       uint64_t(types[t])};
    }
    std::vector<AdamWWork> work(S);
    if (S > 0) std::memset(static_cast<void*>(work.data()), 0xff, S * sizeof(AdamWWork));  // as new memory on a GPU
    std::vector<int64_t> first(B, -1);
    std::vector<int32_t> flags(blocks, -1);
    const AdamWTables tables{T,
                             S,
                             B,
                             reinterpret_cast<const AdamWSegment*>(segments),
                             hyper,
                             mask,
                             steps,
                             grad_scale,
                             found_inf,
                             stats,
                             found,
                             work.data(),
                             first.data(),
                             flags.data()};
    std::vector<AdamWParameter> uploaded(T);
    if (T > 0) std::memset(static_cast<void*>(uploaded.data()), 0xff, T * sizeof(AdamWParameter));
    auto list = std::make_unique<AdamWList>();
    if (upload) {
      for (int64_t t = 0; t < T; t += kAdamWInline) {
        const int count = int(std::min<int64_t>(kAdamWInline, T - t));
        std::copy_n(parameters.begin() + t, count, list->at);
        emulation::launch(unsigned(seed), upload_parameters_kernel, 1, 64, 0, *list, uploaded.data() + t, count);
      }
    } else {
      std::copy(parameters.begin(), parameters.end(), list->at);
    }
    emulation::launch_cooperative(unsigned(seed), masked_adamw_kernel, unsigned(blocks), unsigned(threads), 0, tables,
                                  *list, upload ? uploaded.data() : nullptr);
  });
}
