// MASM_SIMD void f(...): the compiler makes a version for each instruction set and picks one at run time. For plain
// loops over memory; register tiles are in skinny_kernels.cpp. Does not apply to templates.
#pragma once
#include <cstdint>  // defines __GLIBC__

// Sanitizers are not ready yet when the resolvers of target_clones run: their builds get the plain version.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MASM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MASM_SIMD
#endif
