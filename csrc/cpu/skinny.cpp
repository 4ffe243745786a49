// Chooses the kernels of skinny_kernels.cpp that this CPU can run.
#include "skinny.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace masm::cpu {

extern const Kernels baseline;
#if defined(MASM_X86_KERNELS)
extern const Kernels x86_64_v3, x86_64_v4, avx512_bf16;

namespace {
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("movbe");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    struct Choice {
      const Kernels* kernels;
      bool usable;
    };
    const Choice choices[] = {
#if defined(MASM_X86_KERNELS)
        {&avx512_bf16, has_bf16()},
        {&x86_64_v4, has_v4()},
        {&x86_64_v3, has_v3()},
#endif
        {&baseline, true}};
    const char* wanted = std::getenv("MASM_CPU_ISA");
    for (const Choice& choice : choices) {
      if (!wanted || !*wanted) {
        if (choice.usable) return *choice.kernels;
      } else if (std::strcmp(wanted, choice.kernels->name) == 0) {
        STD_TORCH_CHECK(choice.usable, "masm: MASM_CPU_ISA=", wanted, ", but this CPU lacks it");
        return *choice.kernels;
      }
    }
    STD_TORCH_CHECK(false, "masm: MASM_CPU_ISA=", wanted, " is unknown; expected baseline",
#if defined(MASM_X86_KERNELS)
                    ", x86_64_v3, x86_64_v4 or avx512_bf16"
#else
                    " (the only kernels of this build)"
#endif
    );
  }();
  return chosen;
}

}  // namespace masm::cpu
