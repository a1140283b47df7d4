#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "amx_tiles.h"
#include "layers.h"

#if defined(__x86_64__)
#include <immintrin.h>
// As in kernels_avx512.cpp: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
#endif

namespace kbit {
namespace avx512_layer {
#define KBIT_LANES 16
#define KBIT_F16C
#include "vec.h"
#include "layers.inl"
#include "attend_int16.inl"
#if defined(KBIT_BF16)
#include "attend_bf16.inl"
#endif
}  // namespace avx512_layer
}  // namespace kbit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const kbit::LayerKernels* const kbit::avx512_layers = &kbit::avx512_layer::kLayers;
const kbit::LayerKernels* const kbit::avx512_int16_layers = &kbit::avx512_layer::kInt16Layers;
#if defined(KBIT_BF16)
const kbit::LayerKernels* const kbit::avx512_bf16_layers = &kbit::avx512_layer::kBf16Layers;
#else
const kbit::LayerKernels* const kbit::avx512_bf16_layers = nullptr;
#endif
#if defined(KBIT_AMX)
const kbit::LayerKernels* const kbit::amx_layers = &kbit::avx512_layer::kAmxLayers;
const kbit::LayerKernels* const kbit::amx_bf16_layers = &kbit::avx512_layer::kAmxBf16Layers;
#else
const kbit::LayerKernels* const kbit::amx_layers = nullptr;
const kbit::LayerKernels* const kbit::amx_bf16_layers = nullptr;
#endif
#else
const kbit::LayerKernels* const kbit::avx512_layers = nullptr;
const kbit::LayerKernels* const kbit::avx512_int16_layers = nullptr;
const kbit::LayerKernels* const kbit::avx512_bf16_layers = nullptr;
const kbit::LayerKernels* const kbit::amx_layers = nullptr;
const kbit::LayerKernels* const kbit::amx_bf16_layers = nullptr;
#endif
