// Types of elements, as the torch-free interface names them.
#pragma once
#include <cstdint>

namespace masm::cuda {

enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

}  // namespace masm::cuda
