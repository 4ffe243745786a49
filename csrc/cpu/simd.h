// One source, several instruction sets, chosen at run time, for loops that are no kernels of skinny_kernels.cpp:
//   MASM_SIMD void f(...)        the compiler makes the versions and picks one (plain loops; no templates);
//   MASM_TARGET_V3 / _V4         on a version of one's own, picked by instruction_set() (where the best loop differs).
#pragma once
#include <cstring>

#include "skinny.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MASM_TARGETS 1
#define MASM_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define MASM_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#else
#define MASM_TARGETS 0
#endif

// Sanitizers are not ready yet when the resolvers of target_clones run: their builds get the plain version.
#if MASM_TARGETS && defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MASM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MASM_SIMD
#endif

// A body shared by versions for several targets must be inlined into each, or it would be compiled for the plain one.
#define MASM_INLINE inline __attribute__((always_inline))

namespace masm::cpu {

enum class InstructionSet { base, v3, v4 };  // x86-64 levels: v3 has AVX2 and FMA, v4 AVX-512

// That of the skinny kernels (MASM_CPU_ISA forces one).
inline InstructionSet instruction_set() {
  const char* name = kernels().name;
  if (std::strcmp(name, "x86_64_v3") == 0) return InstructionSet::v3;
  if (std::strcmp(name, "x86_64_v4") == 0 || std::strcmp(name, "avx512_bf16") == 0) return InstructionSet::v4;
  return InstructionSet::base;
}

}  // namespace masm::cpu
