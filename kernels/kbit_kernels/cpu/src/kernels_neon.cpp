#include <cstring>
#include <type_traits>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "simd_portable.h"

namespace kbit {
#if defined(__aarch64__)
namespace neon {
#include "simd_neon.h"
#include "prepare.inl"
#include "gemv.inl"
#include "single.inl"
#include "dispatch.inl"
#include "tile.inl"
#include "quantize.inl"
}  // namespace neon

const Kernels* const neon_kernels = &neon::kKernels;
#else
const Kernels* const neon_kernels = nullptr;
#endif
}  // namespace kbit
