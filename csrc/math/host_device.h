// MASM_HOST_DEVICE: a function that both a CPU and a CUDA kernel call.
#pragma once

#if defined(__CUDACC__)
#define MASM_HOST_DEVICE __host__ __device__
#else
#define MASM_HOST_DEVICE
#endif
