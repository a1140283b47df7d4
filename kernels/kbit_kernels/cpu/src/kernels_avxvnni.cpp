#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && __has_include(<avxvnniintrin.h>)  // the assembler knows it too
// As in kernels_avx2.cpp: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
namespace kbit {
namespace avxvnni {
constexpr bool kVnni = true;
#include "simd_avx2.h"
#include "prepare.inl"
#include "gemv.inl"
#include "single.inl"
#include "dispatch.inl"
#include "tile.inl"
#include "quantize.inl"
}  // namespace avxvnni
#if defined(__clang__)
#pragma clang attribute pop
#endif

const Kernels* const avxvnni_kernels = &avxvnni::kKernels;

}  // namespace kbit
#else
namespace kbit {
const Kernels* const avxvnni_kernels = nullptr;
}  // namespace kbit
#endif
