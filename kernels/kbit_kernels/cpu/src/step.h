// What one forward call over one block of tokens works with.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "layers.h"
#include "pool.h"
#include "product.h"

namespace kbit {

// Memory that only grows and is not zeroed: pages that are never used are never taken. It begins
// with a cache line, since vectors and tiles that straddle two are stored at half the speed.
class Buffer {
 public:
  float* room(int64_t floats) {
    if (floats > size_) {
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_.get();
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

struct Token {
  int32_t id;
  int64_t sequence, position;
};

// Consecutive tokens of one sequence in a block.
struct Run {
  int64_t sequence, first, count;
};

// A layer ready to run.
struct Layer {
  LayerSpec spec;
  Product qkv, out, up, down;
  int64_t group, padded;  // query heads per key/value head; head_dim rounded up to 16
};

// One thread's own memory.
struct Worker {
  Inputs inputs;
  Buffer h, x, gate, q, state, scratch, slopes;
  std::vector<int64_t> low, high, position, starts;
};

// A block of tokens under way. `solo`: so few tokens that every thread prepares all of them for
// itself (residual, norms, inputs), which costs less than waiting for each other; else each prepares
// its share of the tokens and all wait.
struct Block {
  std::vector<Token> tokens;
  std::vector<Run> runs;
  std::vector<int64_t> selected;  // tokens whose logits are wanted
  bool solo = true, single = true;  // single: one token a sequence
  const CacheSpec* cache = nullptr;
  Buffer qkv, attention, delta_attention, delta_mlp, up, projected, partials, h;
  int64_t qkv_stride = 0, attention_stride = 0, up_stride = 0, delta_stride = 0;
  std::unique_ptr<std::atomic<int64_t>[]> next;  // by layer: the next tile of a prompt's attention

  int64_t count() const { return static_cast<int64_t>(tokens.size()); }
};

constexpr int64_t kTileRows = 96;  // queries of a tile of a prompt's attention

// Attention (attention.cpp). All threads call these with the q, k, v of all tokens computed.
class AttentionPass {
 public:
  // selected: sums are wanted of the block's selected tokens only. inputs: where a prompt's sums are prepared
  // for the product that follows, all columns of a head by themselves; or null.
  AttentionPass(const Layer& layer, int64_t index, bool selected, const Inputs* inputs, Block* block, Worker* worker,
                const LayerKernels& kernels, Pool* pool, int thread)
      : layer_(layer), spec_(layer.spec), index_(index), selected_(selected), inputs_(inputs), block_(*block),
        worker_(*worker), kernels_(kernels), pool_(*pool), thread_(thread) {}

  // Writes keys and values to the cache and computes this thread's part of the sums.
  void run();
  // The concatenated heads of token t, all threads' parts together (in x); after a barrier.
  const float* collect(int64_t t, float* x);

  // Floats of `partials` that a block of single tokens needs.
  static int64_t partials(const Layer& layer, int64_t tokens, int threads) {
    return (tokens * layer.spec.kv_heads + threads) * slot_floats(layer);
  }
  // Makes room for any call with this layer.
  static void reserve(const Layer& layer, Worker* worker);

 private:
  static int64_t slot_floats(const Layer& layer) { return layer.group * (layer.padded + 2); }
  float* head(int64_t t, const HeadsSpec& heads, int64_t h) {
    return block_.qkv.get() + t * block_.qkv_stride + heads.base + h * heads.stride;
  }
  void turn(float* x, const NormSpec& norm, int64_t position);
  void write(const Token& token, int64_t t, int64_t g, float* key);
  const void* cached(void* const* base, int64_t sequence, int64_t g, int64_t width);
  void plan_parts();
  void run_single();
  void run_tiles();
  Product::Range wanted(Product::Range tokens) const;
  void tile(const Run& run, int64_t g, Product::Range tokens);
  int64_t lowest(int64_t position) const {
    return spec_.window > 0 && position >= spec_.window ? position - spec_.window + 1 : 0;
  }

  const Layer& layer_;
  const LayerSpec& spec_;
  const int64_t index_;
  const bool selected_;
  const Inputs* const inputs_;
  Block& block_;
  Worker& worker_;
  const LayerKernels& kernels_;
  Pool& pool_;
  const int thread_;
};

}  // namespace kbit
