// MASM_HOST_DEVICE marks functions that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define MASM_HOST_DEVICE __host__ __device__
#else
#define MASM_HOST_DEVICE
#endif
