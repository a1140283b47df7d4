// What a decoder needs beside products, one table of functions per instruction set.
#pragma once

#include "plan.h"

namespace kbit {

// Attention of `rows` queries that share keys and values. Row r sees keys [low[r], high[r]).
struct Attend {
  int64_t rows, head_dim, padded;  // padded: head_dim rounded up to 16
  const float* q;                  // [rows][padded]
  const int64_t *low, *high, *position;
  const float* slopes;  // [rows] or null: score -= slope * (position - key)
  float scale, softcap;  // softcap 0: none
  int32_t type;         // CacheType
  const void *keys, *values;
  float *peak, *total, *sum;  // out: [rows], [rows], [rows][padded]; the answer is sum / total
  float* scratch;             // attend_scratch floats
};

inline int64_t attend_scratch(int64_t rows, int64_t padded) {
  return rows * kKeyChunk + 2 * kKeyChunk * padded;
}

struct LayerKernels {
  void (*norm)(const NormSpec& norm, const float* x, float* y);  // y may be x
  void (*add)(float* y, const float* x, int64_t n);              // y += x
  void (*scale)(const float* x, float factor, float* y, int64_t n);  // y = factor * x
  // out = activation(gate) * up; up may be null, out may be gate
  void (*activate)(int32_t kind, const float* gate, const float* up, float* out, int64_t n);
  void (*softcap)(float* x, int64_t n, float cap);
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  void (*store_key)(const float* k, int64_t head_dim, int32_t type, void* keys, int64_t position);
  void (*store_value)(const float* v, int64_t head_dim, int64_t padded, int32_t type, void* values,
                      int64_t position);
  void (*attend)(const Attend& job);
};

// Null where the compiler or the target cannot build them.
extern const LayerKernels* const portable_layers;
extern const LayerKernels* const avx2_layers;
extern const LayerKernels* const neon_layers;
extern const LayerKernels* const avx512_layers;
// These round: for arithmetics that do so too. avx512_bf16_layers: where has_avx512_bf16 says so.
extern const LayerKernels* const avx2_int16_layers;
extern const LayerKernels* const avx512_int16_layers;
extern const LayerKernels* const avx512_bf16_layers;
extern const LayerKernels* const amx_layers;
extern const LayerKernels* const amx_bf16_layers;

}  // namespace kbit
