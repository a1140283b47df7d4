#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "layers.h"

namespace kbit {
namespace portable_layer {
#define KBIT_LANES 4
#include "vec.h"
#include "layers.inl"
}  // namespace portable_layer

const LayerKernels* const portable_layers = &portable_layer::kLayers;

}  // namespace kbit
