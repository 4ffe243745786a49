// Torch-free interface of the CUDA kernels: raw pointers, sizes, a stream. Includes only the CUDA runtime's header.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../math/update_masks.h"
#include "dtype.h"
#include "masked_adamw.h"
#include "small_batch.h"

namespace masm::cuda {

// The number of thread blocks of masked_adamw that are resident at once on the current device. Reads S and B.
cudaError_t masked_adamw_blocks(const AdamWTables& tables, int32_t* blocks);

// One step over T parameters, in a host array. Sizes of the tables: masked_adamw.h. `uploaded`: device memory for T
// parameters, or null if T <= kAdamWInline.
cudaError_t masked_adamw(const AdamWParameter* parameters, const AdamWTables& tables, AdamWParameter* uploaded,
                         int32_t blocks, cudaStream_t stream);

// The forward pass of up to 64 rows; see small_batch.h.
cudaError_t stream_linear(const StreamCall& call, cudaStream_t stream);

// masm::update_masks_: adds the sums of a step to the learning state and sets the masks of the next step.
cudaError_t update_masks(const MaskTable& table, const MaskPolicy& policy, cudaStream_t stream);

}  // namespace masm::cuda
