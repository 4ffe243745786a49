// GFLOP/s of the skinny kernels on one core, data in cache or not, without PyTorch around them. From the root:
//   mkdir -p build
//   g++ -std=c++20 -O3 -march=x86-64-v4 -mavx512bf16 -ffp-contract=fast -fno-strict-aliasing -DMASM_ISA=avx512_bf16
//     -Icsrc/cpu benchmarks/speed/skinny_kernels.cpp csrc/cpu/skinny_kernels.cpp -o build/skinny && build/skinny
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "skinny.h"

using namespace masm::cpu;
namespace masm::cpu {
extern const Kernels MASM_ISA;
}

template <class F>
double seconds(F f) {
  double best = 1e9;
  for (int i = 0; i < 15; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

template <class S>
void measure(const char* name, const Skinny<S, float>& kernel, S one) {
  constexpr int64_t kRows = 96;
  constexpr int64_t kShapes[][3] = {
      {2056, 1024, 16}, {2056, 1024, 64}, {4112, 384, 16}, {4112, 1536, 16}, {528, 4096, 16}};
  for (const auto& [M, L, R] : kShapes) {
    std::vector<S> x(M * L, one);
    std::vector<float> b(R * L, 1.f), c(M * R, 1.f), sums(R * L), packed(kernel.packed_size(R, L)),
        scratch(kernel.scratch_size(kRows, R));
    const auto rate = [&, M = M, L = L, R = R](auto pass) {
      const double time = seconds([&] {
        for (int64_t m = 0; m < M; m += kRows) pass(m, std::min(kRows, M - m));
      });
      return 2.0 * double(M * L * R) / time / 1e9;
    };
    kernel.pack_dot(b.data(), R, L, packed.data());
    const double dot =
        rate([&, L = L, R = R](int64_t m, int64_t n) { kernel.dot(&x[m * L], n, L, packed.data(), R, &c[m * R]); });
    kernel.pack_add(b.data(), R, L, packed.data());
    std::fill(c.begin(), c.end(), 1e-3f);
    const auto add = [&, L = L, R = R](bool accumulate) {
      return rate([&, L, R](int64_t m, int64_t n) {
        kernel.add(&c[m * R], n, R, packed.data(), L, nullptr, accumulate, false, &x[m * L], scratch.data());
      });
    };
    const double write = add(false), accumulate = add(true);
    const double outer = rate([&, L = L, R = R](int64_t m, int64_t n) {
      kernel.outer(&c[m * R], n, R, &x[m * L], L, sums.data(), scratch.data());
    });
    std::printf("%s M %ld L %ld R %ld: dot %.0f, add %.0f, add to y %.0f, outer %.0f GFLOP/s\n", name, long(M), long(L),
                long(R), dot, write, accumulate, outer);
  }
}

int main() {
  measure<float>("float32", MASM_ISA.f32, 1.f);
  if (MASM_ISA.bf16) measure<BF16>("bfloat16", *MASM_ISA.bf16, BF16{0x3f80});
}
