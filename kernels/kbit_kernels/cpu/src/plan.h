// A decoder as the native executor runs it: structs that Python fills once at load, and the class
// that runs them. What is computed stands at the head of kbit/models/base.py.
#pragma once

#include <cstdint>
#include <memory>

#include "kbit.h"

namespace kbit {

enum NormKind : int32_t { kNoNorm = 0, kRmsNorm = 1, kLayerNorm = 2 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
enum CacheType : int32_t { kCacheFp32 = 0, kCacheFp16 = 1 };

struct NormSpec {
  int32_t kind, size;
  float eps;
  const float* weight;  // [size], the offset added; null: ones
  const float* bias;    // [size] or null
};

// Matrices (by number) that share an input; their outputs follow each other.
struct ProductSpec {
  int32_t count;  // 0: no product
  int32_t matrices[3];
  const float* bias;  // of all outputs, or null
};

// Outputs of the q, k, v product that are head h of one of them: from base + h * stride.
struct HeadsSpec {
  int64_t base, stride;
};

struct LayerSpec {
  NormSpec attention_in, attention_out, attention_after, mlp_in, mlp_out, mlp_after, q_norm, k_norm;
  ProductSpec qkv, out, up, down;
  HeadsSpec q, k, v;
  int32_t heads, kv_heads, head_dim;
  int32_t rotary, rotary_half;  // number of the cache's table (-1: none), and entries of its rows
  int32_t window;               // 0: none
  int32_t activation, gated, parallel;
  int64_t inner, gate_base, up_base;  // where gate and up lie in the outputs of `up`
  float scale, softcap;               // softcap 0: none
  const float* slopes;                // ALiBi, [heads] or null
};

struct DecoderSpec {
  int64_t vocabulary, hidden, embedding_size, position_offset;
  int32_t n_layers, n_tensors;
  const LayerSpec* layers;
  const Tensor* tensors;
  int32_t embedding, positions;  // numbers of matrices; positions -1: none
  ProductSpec embedding_projection, output_projection, head;
  NormSpec embedding_norm, final_norm;
  float embedding_scale, logit_softcap;
  int32_t threads, arithmetic, isa;  // isa -1: the best
};

// Keys of one sequence and key/value head lie in blocks of 16 positions, [capacity/16][head_dim][16];
// values lie [capacity][head_dim rounded up to 16]. Both [batch][kv_heads] of that, layer by layer.
// So scores of 16 keys come from vertical sums, and neither kind is ever transposed.
constexpr int64_t kKeyBlock = 16;
constexpr int64_t kKeyChunk = 64;  // capacities are multiples of it

struct CacheSpec {
  int64_t batch, capacity;
  int32_t type;  // CacheType
  void* const* keys;
  void* const* values;
  const float* const* cos;  // by rotary table: [capacity][half]
  const float* const* sin;
};

// Runs a decoder on a pool of its own. One call at a time.
class Decoder {
 public:
  // Keeps pointers into `spec`'s arrays, tensors, weights and biases: all of it must outlive the
  // decoder. Throws std::invalid_argument if shapes do not fit together.
  explicit Decoder(const DecoderSpec& spec);
  ~Decoder();

  // Appends counts[b] tokens to sequence b, which holds lengths[b]. logits: [selected][vocabulary]
  // in the order of the sequences, of every token or of the last one of each sequence that has any.
  // The caller has checked tokens and lengths.
  void forward(const CacheSpec& cache, const int32_t* tokens, const int32_t* counts,
               const int64_t* lengths, bool all_logits, float* logits);

  int threads() const;
  // Bytes of weights that one decode step reads.
  int64_t bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kbit
