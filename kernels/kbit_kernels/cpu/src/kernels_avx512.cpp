#include <cstdint>
#include <cstring>
#include <type_traits>

#include "amx_tiles.h"
#include "kernels.h"

#if defined(__x86_64__)
// Only what follows may use these instructions; standard headers stand above, so that no function
// of theirs that the linker shares with other files does.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")
#endif
#include "simd_avx512.h"

namespace kbit {
namespace avx512 {
#include "prepare.inl"
#include "gemv.inl"
#include "single.inl"
#include "dispatch.inl"
#include "tile.inl"
#include "quantize.inl"
#if defined(KBIT_AMX)
#include "amx.inl"
#endif
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#endif

const Kernels* const avx512_kernels = &avx512::kKernels;
#if defined(KBIT_AMX)
const Kernels* const amx_kernels = &avx512::kAmxKernels;
#else
const Kernels* const amx_kernels = nullptr;
#endif

}  // namespace kbit
#else
namespace kbit {
const Kernels* const avx512_kernels = nullptr;
const Kernels* const amx_kernels = nullptr;
}  // namespace kbit
#endif
