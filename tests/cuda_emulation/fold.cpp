// The kernel of csrc/cuda/fold.cuh, run on the CPU: reads N, D, R, seed and the operands as raw float32, writes the
// result.
// clang-format off
#include "emulate.h"  // first: it supplies what nvcc would
#include "fold.cuh"
// clang-format on

#include <cstdio>

int main() {
  int64_t head[4];
  if (std::fread(head, sizeof(int64_t), 4, stdin) != 4) return 2;
  const auto [N, D, R, seed] = head;
  auto read = [](int64_t n) {
    std::vector<float> values(n);
    if (std::fread(values.data(), sizeof(float), n, stdin) != size_t(n)) std::exit(2);
    return values;
  };
  // exact sizes: an access past the end is an error of the address sanitizer
  const auto weight = read(N * D), u = read(R * N), s = read(R), v = read(R * D);
  std::vector<float> out(N * D, __builtin_nanf(""));
  // a grid smaller than N rows exercises the stride over rows
  const dim3 grid{unsigned((D + 31) / 32), unsigned(std::min<int64_t>(N, 3)), 1};
  emulation::launch(unsigned(seed), masm::cuda::fold_kernel<float, float, float>, grid, dim3{32}, out.data(),
                    weight.data(), u.data(), s.data(), v.data(), N, D, R);
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
}
