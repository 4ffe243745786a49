// Torch-free interface of the CUDA kernels: raw pointers, sizes, a stream. Includes only the CUDA runtime's header.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../math/update_masks.h"
#include "dtype.h"
#include "masked_adamw.h"
#include "small_batch.h"

namespace masm::cuda {

// How many thread blocks masked_adamw runs with on the current device: all at once. `tables`: S and B are read.
cudaError_t masked_adamw_blocks(const AdamWTables& tables, int32_t* blocks);

// One step over T parameters [T] on the host. `work` and `flags` of the tables have as many elements as
// masked_adamw.h says; `uploaded`: device memory for T parameters, or null where kAdamWInline hold them.
cudaError_t masked_adamw(const AdamWParameter* parameters, const AdamWTables& tables, AdamWParameter* uploaded,
                         int32_t blocks, cudaStream_t stream);

// The forward pass of a few rows; see small_batch.h.
cudaError_t stream_linear(const StreamCall& call, cudaStream_t stream);

// masm::update_masks_: a step into the learning state, and the masks of the next.
cudaError_t update_masks(const MaskTable& table, const MaskPolicy& policy, cudaStream_t stream);

}  // namespace masm::cuda
