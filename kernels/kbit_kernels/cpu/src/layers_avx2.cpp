#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "layers.h"

#if defined(__x86_64__)
#include <immintrin.h>
// As in kernels_avx2.cpp: only what follows may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace kbit {
namespace avx2_layer {
#define KBIT_LANES 8
#define KBIT_F16C
#include "vec.h"
#include "layers.inl"
#include "attend_int16.inl"
}  // namespace avx2_layer
}  // namespace kbit

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const kbit::LayerKernels* const kbit::avx2_layers = &kbit::avx2_layer::kLayers;
const kbit::LayerKernels* const kbit::avx2_int16_layers = &kbit::avx2_layer::kInt16Layers;
#else
const kbit::LayerKernels* const kbit::avx2_layers = nullptr;
const kbit::LayerKernels* const kbit::avx2_int16_layers = nullptr;
#endif
