#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "layers.h"

namespace kbit {
#if defined(__aarch64__)
namespace neon_layer {
#define KBIT_LANES 4
#define KBIT_NEON
#include "vec.h"
#include "layers.inl"
}  // namespace neon_layer

const LayerKernels* const neon_layers = &neon_layer::kLayers;
#else
const LayerKernels* const neon_layers = nullptr;
#endif
}  // namespace kbit
