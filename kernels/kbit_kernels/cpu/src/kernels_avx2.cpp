#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
// Only what follows may use these instructions; standard headers stand above, so that no function
// of theirs that the linker shares with other files does.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
namespace kbit {
namespace avx2 {
constexpr bool kVnni = false;
#include "simd_avx2.h"
#include "prepare.inl"
#include "gemv.inl"
#include "single.inl"
#include "dispatch.inl"
#include "tile.inl"
#include "quantize.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#endif

const Kernels* const avx2_kernels = &avx2::kKernels;

}  // namespace kbit
#else
namespace kbit {
const Kernels* const avx2_kernels = nullptr;
}  // namespace kbit
#endif
