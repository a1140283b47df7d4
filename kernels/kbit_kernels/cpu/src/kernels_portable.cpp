#include <type_traits>

#include "simd_portable.h"

namespace kbit {
namespace portable {
#include "prepare.inl"
#include "gemv.inl"
#include "single.inl"
#include "dispatch.inl"
#include "tile.inl"
#include "quantize.inl"
}  // namespace portable

const Kernels* const portable_kernels = &portable::kKernels;

}  // namespace kbit
