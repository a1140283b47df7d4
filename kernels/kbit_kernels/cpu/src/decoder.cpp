// All layers of a block of tokens in one call.
//
// A step of one token meets at five barriers a layer: after q, k, v; attention; o; gate and up; down.
// What lies between (residual, norms, rounding of inputs) every thread does for itself.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "step.h"

namespace kbit {
namespace {

constexpr int64_t kSoloTokens = 1;           // see Block::solo
constexpr int64_t kSlicedTokens = 16, kSlice = 4 * kGrain;  // see State::activated
constexpr int64_t kBlockBytes = 64 << 20;    // of activations; weights are unpacked once a block
constexpr int64_t kLeastBlock = 64, kMostBlock = 512;

void require(bool good, const char* sentence) {
  if (!good) throw std::invalid_argument(sentence);
}

const LayerKernels* layers_of(Isa isa, Arithmetic arithmetic) {
  switch (isa) {
    case kAmx:
      if (arithmetic == kFloat) return avx512_layers;
      return arithmetic == kInt16 ? amx_layers : amx_bf16_layers;
    case kAvx512:
      if (arithmetic == kFloat) return avx512_layers;
      if (arithmetic == kInt16 || !avx512_bf16_layers || !has_avx512_bf16()) return avx512_int16_layers;
      return avx512_bf16_layers;
    case kAvxVnni:
    case kAvx2: return arithmetic == kFloat ? avx2_layers : avx2_int16_layers;
    case kNeon: return neon_layers;
    default: return portable_layers;
  }
}

}  // namespace

struct Decoder::State {
  explicit State(const DecoderSpec& decoder);
  void forward(const CacheSpec& cache, const int32_t* tokens, const int32_t* counts,
               const int64_t* lengths, bool all_logits, float* logits);

  DecoderSpec spec;
  const LayerKernels* kernels;
  std::vector<std::unique_ptr<Matrix>> matrices;
  Slots slots;
  Product embedding_projection, output_projection, head;
  std::vector<Layer> layers;
  Pool pool;
  Inputs shared;
  std::vector<Worker> workers;
  Block block;
  int64_t block_tokens;
  int64_t shaped[2] = {-1, -1}, shaped_own[2] = {-1, -1};  // tokens, by solo

 private:
  void add_layer(const LayerSpec& layer);
  void prepare();
  void run(int thread, float* logits);
  void embed(int thread, float* h, float* x, Inputs* inputs, Product::Range mine);
  Product::Range gate_rows(const Layer& layer, int thread, int64_t count) const {
    const Product::Range mine = share(layer.spec.inner, count < kSlicedTokens ? kGrain : kColumnGrain, thread, pool.threads());
    return {layer.spec.gate_base + mine.first, layer.spec.gate_base + mine.second};
  }
  // Rows that `activated` takes at once of `count` tokens, at most.
  int64_t slice(int64_t count) const {
    return count < kSlicedTokens ? (block.up_stride / kGrain / pool.threads() + 2) * kGrain : kSlice;
  }
  // Whether the inputs of out or down are prepared where they are computed, before they go to memory.
  bool direct_out(const Layer& layer, const Inputs& inputs) const {
    return !block.single && block.count() >= kSlicedTokens && layer.spec.head_dim % kColumnGrain == 0 &&
           layer.out.loads_columns(inputs);
  }
  bool direct_down(const Layer& layer, const Inputs& inputs, int64_t count) const {
    return count >= kSlicedTokens && layer.down.loads_columns(inputs) && !layer.down.shares_inputs(layer.up);
  }
  void activated(const Layer& layer, int thread, const Inputs& inputs, int64_t count);
  void attention_residual(const Layer& layer, float* h, float* x, int64_t at);
  void layer_residual(const Layer& layer, float* h, float* x, int64_t at);
  void finish(int thread, float* h, float* x, Inputs* inputs, Product::Range chosen, float* logits);
  // Where the result is: in y, or x itself where there is no norm.
  const float* norm(const NormSpec& norm, const float* x, float* y) const {
    if (norm.kind == kNoNorm) return x;
    kernels->norm(norm, x, y);
    return y;
  }
  void loaded() { if (!block.solo) pool.barrier(); }
};

Decoder::State::State(const DecoderSpec& decoder)
    : spec(decoder),
      pool(decoder.threads, true),
      workers(static_cast<size_t>(pool.threads())) {
  const Isa isa = spec.isa < 0 ? best_isa() : static_cast<Isa>(spec.isa);
  require(isa_available(isa), "this machine does not have the instruction set asked for");
  kernels = layers_of(isa, static_cast<Arithmetic>(spec.arithmetic));
  require(kernels != nullptr, "the native library was built without this instruction set");
  for (int32_t i = 0; i < spec.n_tensors; ++i) {
    matrices.push_back(std::make_unique<Matrix>(spec.tensors[i], isa));
  }
  const auto product = [&](const ProductSpec& part, bool own) {
    return Product(part, matrices, pool.threads(), &slots, own);
  };
  embedding_projection = product(spec.embedding_projection, false);
  output_projection = product(spec.output_projection, true);
  head = product(spec.head, true);
  const Matrix& embedding = *matrices.at(static_cast<size_t>(spec.embedding));
  require(embedding.rows() == spec.vocabulary && embedding.cols() == spec.embedding_size,
          "the embedding's shape is not the decoder's");
  require(embedding_projection ? embedding_projection.cols() == spec.embedding_size &&
                                     embedding_projection.rows() == spec.hidden
                               : spec.embedding_size == spec.hidden,
          "the embedding does not lead to the hidden size");
  require(head.rows() == spec.vocabulary, "the head's rows are not the vocabulary");
  require(output_projection ? output_projection.cols() == spec.hidden &&
                                  output_projection.rows() == head.cols()
                            : head.cols() == spec.hidden,
          "the head does not fit the hidden size");
  require(spec.positions < 0 || matrices.at(static_cast<size_t>(spec.positions))->cols() == spec.hidden,
          "the positions do not fit the hidden size");
  layers.reserve(static_cast<size_t>(spec.n_layers));
  for (int32_t i = 0; i < spec.n_layers; ++i) add_layer(spec.layers[i]);
  block.next = std::make_unique<std::atomic<int64_t>[]>(layers.size());
  int64_t per_token = 3 * spec.hidden;
  for (const Layer& layer : layers) {
    block.qkv_stride = std::max(block.qkv_stride, layer.qkv.rows());
    block.attention_stride = std::max(block.attention_stride, layer.out.cols());
    block.up_stride = std::max<int64_t>(block.up_stride, layer.spec.inner);
  }
  block.delta_stride = spec.hidden;
  for (int64_t* stride : {&block.qkv_stride, &block.attention_stride, &block.up_stride, &block.delta_stride}) {
    *stride = (*stride + 15) / 16 * 16;
    if (*stride % 1024 == 0) *stride += 16;  // else the tokens of a tile meet in one set of the cache
  }
  per_token += block.qkv_stride + block.attention_stride + 2 * block.up_stride;
  block_tokens = std::clamp(kBlockBytes / (4 * per_token), kLeastBlock, kMostBlock);
  shared = slots.make();
  for (Worker& worker : workers) {
    worker.inputs = slots.make();
    worker.h.room(kSoloTokens * spec.hidden);
    int64_t widest = std::max(spec.hidden, spec.embedding_size);
    widest = std::max(widest, block.attention_stride);
    worker.x.room(widest);
    for (const Layer& layer : layers) AttentionPass::reserve(layer, &worker);
  }
}

void Decoder::State::add_layer(const LayerSpec& layer) {
  const int threads = pool.threads();
  const bool last = layers.size() + 1 == static_cast<size_t>(spec.n_layers);  // for selected tokens, see run
  require(layer.heads > 0 && layer.kv_heads > 0 && layer.heads % layer.kv_heads == 0,
          "query heads are no multiple of key/value heads");
  Layer made{layer, Product(layer.qkv, matrices, threads, &slots),
             Product(layer.out, matrices, threads, &slots, last), Product(layer.up, matrices, threads, &slots, last),
             Product(layer.down, matrices, threads, &slots, last), layer.heads / layer.kv_heads,
             (layer.head_dim + 15) / 16 * 16};
  const auto within = [&](const HeadsSpec& part, int64_t heads) {
    return part.base >= 0 && part.stride >= 0 &&
           part.base + (heads - 1) * part.stride + layer.head_dim <= made.qkv.rows();
  };
  require(made.qkv.cols() == spec.hidden && within(layer.q, layer.heads) &&
              within(layer.k, layer.kv_heads) && within(layer.v, layer.kv_heads),
          "q, k, v do not fit the heads");
  require(2 * layer.rotary_half <= layer.head_dim, "rotary positions are wider than a head");
  require(made.out.cols() == static_cast<int64_t>(layer.heads) * layer.head_dim &&
              made.out.rows() == spec.hidden,
          "the attention's output does not fit");
  require(made.up.cols() == spec.hidden && made.down.cols() == layer.inner &&
              made.down.rows() == spec.hidden && layer.gate_base + layer.inner <= made.up.rows() &&
              layer.up_base + layer.inner <= made.up.rows(),
          "the MLP's matrices do not fit each other");
  layers.push_back(std::move(made));
}

void Decoder::State::forward(const CacheSpec& cache, const int32_t* tokens, const int32_t* counts,
                             const int64_t* lengths, bool all_logits, float* logits) {
  block.cache = &cache;
  block.tokens.clear();
  block.runs.clear();
  block.selected.clear();
  const auto flush = [&] {
    if (block.tokens.empty()) return;
    prepare();
    pool.run([&](int thread) { run(thread, logits); });
    logits += static_cast<int64_t>(block.selected.size()) * spec.vocabulary;
    block.tokens.clear();
    block.runs.clear();
    block.selected.clear();
  };
  const int64_t total = std::accumulate(counts, counts + cache.batch, int64_t{0});
  const int64_t blocks = std::max<int64_t>(1, (total + block_tokens - 1) / block_tokens);
  const int64_t size = (total + blocks - 1) / blocks;  // a short last block would cost as much
  for (int64_t b = 0; b < cache.batch; ++b) {
    for (int32_t i = 0; i < counts[b]; ++i) {
      const int64_t at = block.count();
      if (i == 0 || at == 0) block.runs.push_back({b, at, 0});
      ++block.runs.back().count;
      block.tokens.push_back({*tokens++, b, lengths[b] + i});
      if (all_logits || i + 1 == counts[b]) block.selected.push_back(at);
      if (block.count() == size) flush();
    }
  }
  flush();
}

void Decoder::State::prepare() {
  const int64_t count = block.count(), threads = pool.threads();
  block.solo = count <= kSoloTokens;
  block.single = std::all_of(block.runs.begin(), block.runs.end(),
                             [](const Run& run) { return run.count == 1; });
  for (size_t i = 0; i < layers.size(); ++i) block.next[i].store(0, std::memory_order_relaxed);
  block.qkv.room(count * block.qkv_stride);
  block.attention.room(count * block.attention_stride);
  block.up.room(count * block.up_stride);
  block.delta_attention.room(count * block.delta_stride);
  block.delta_mlp.room(count * block.delta_stride);
  block.h.room(count * spec.hidden);
  const auto selected = static_cast<int64_t>(block.selected.size());
  const int64_t gate = std::max(count * slice(count), selected * slice(selected));
  for (Worker& worker : workers) worker.gate.room(2 * gate);
  if (block.single) {
    int64_t floats = 0;
    for (const Layer& layer : layers) {
      floats = std::max(floats, AttentionPass::partials(layer, count, pool.threads()));
    }
    block.partials.room(floats);
  }
  if (output_projection) block.projected.room(selected * head.cols());
  const auto arithmetic = static_cast<Arithmetic>(spec.arithmetic);
  for (int64_t i = 0; i < (block.solo ? threads : 1); ++i) {
    Inputs* inputs = block.solo ? &workers[static_cast<size_t>(i)].inputs : &shared;
    if (shaped[block.solo] != count) slots.shape(inputs, arithmetic, count);
    if (selected != 0 && shaped_own[block.solo] != selected) {
      slots.shape_own(inputs, arithmetic, selected);
    }
  }
  shaped[block.solo] = count;
  if (selected != 0) shaped_own[block.solo] = selected;
}

void Decoder::State::run(int thread, float* logits) {
  Worker& worker = workers[static_cast<size_t>(thread)];
  Inputs* inputs = block.solo ? &worker.inputs : &shared;
  float *h = (block.solo ? worker.h : block.h).get(), *x = worker.x.get();
  const auto selected = static_cast<int64_t>(block.selected.size());
  const int64_t hidden = spec.hidden;
  const auto share_of = [&](int64_t count) {
    return block.solo ? Product::Range{0, count} : share(count, 1, thread, pool.threads());
  };
  const auto mine = share_of(block.count()), chosen = share_of(selected);
  embed(thread, h, x, inputs, mine);
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const bool last = l + 1 == layers.size();
    for (int64_t t = mine.first; t < mine.second; ++t) {
      if (l > 0) layer_residual(layers[l - 1], h + t * hidden, x, t);
      layer.qkv.load(inputs, norm(layer.spec.attention_in, h + t * hidden, x), t);
    }
    loaded();
    layer.qkv.multiply(*inputs, thread, block.qkv.get(), block.qkv_stride, *kernels);
    layer.out.prefetch(layer.out.range(thread));
    pool.barrier();

    const int64_t rest = last ? selected : block.count();  // tokens of what follows the attention
    const bool rounded = !last && direct_out(layer, *inputs);
    AttentionPass attention(layer, static_cast<int64_t>(l), last, rounded ? inputs : nullptr, &block, &worker, *kernels,
                            &pool, thread);
    attention.run();
    pool.barrier();
    if (last && selected == 0) return;
    // what follows the last layer's keys and values is computed for the tokens that the head will read
    const auto rows = last ? chosen : mine;
    const auto token = [&](int64_t at) { return last ? block.selected[static_cast<size_t>(at)] : at; };
    if (!rounded) {
      for (int64_t at = rows.first; at < rows.second; ++at) layer.out.load(inputs, attention.collect(token(at), x), at);
      loaded();
    }
    layer.out.multiply(*inputs, thread, block.delta_attention.get(), block.delta_stride, *kernels);
    layer.up.prefetch(gate_rows(layer, thread, rest));
    pool.barrier();

    for (int64_t at = rows.first; at < rows.second; ++at) {
      float* const row = h + token(at) * hidden;
      if (!layer.spec.parallel) attention_residual(layer, row, x, at);
      layer.up.load(inputs, norm(layer.spec.mlp_in, row, x), at);
    }
    loaded();
    activated(layer, thread, *inputs, rest);
    layer.down.prefetch(layer.down.range(thread));
    pool.barrier();

    if (!direct_down(layer, *inputs, rest)) {
      for (int64_t at = rows.first; at < rows.second; ++at) {
        layer.down.load(inputs, block.up.get() + at * block.up_stride, at);
      }
      loaded();
    }
    layer.down.multiply(*inputs, thread, block.delta_mlp.get(), block.delta_stride, *kernels);
    const Product& next = last ? head : layers[l + 1].qkv;
    next.prefetch(next.range(thread));
    pool.barrier();
  }
  if (selected != 0) finish(thread, h, x, inputs, chosen, logits);
}

// This thread's share of block.up = activation(gate) * up of `count` tokens, or of down's input where it takes
// columns; of many tokens a slice of rows at a time, so that gate and up are still in the cache when they are activated.
void Decoder::State::activated(const Layer& layer, int thread, const Inputs& inputs, int64_t count) {
  const Product::Range mine = gate_rows(layer, thread, count);
  const int64_t between = layer.spec.up_base - layer.spec.gate_base, size = slice(count);
  float *gate = workers[static_cast<size_t>(thread)].gate.get(), *up = layer.spec.gated ? gate + count * size : nullptr;
  const bool direct = direct_down(layer, inputs, count);
  for (int64_t first = mine.first; first < mine.second; first += size) {
    const int64_t rows = std::min(size, mine.second - first);
    alignas(64) float part[kSlice + 64] = {};  // with the zeros that follow a row
    layer.up.multiply(inputs, {first, first + rows}, gate, size, *kernels);
    if (up != nullptr) layer.up.multiply(inputs, {first + between, first + between + rows}, up, size, *kernels);
    const int64_t column = first - layer.spec.gate_base;
    for (int64_t t = 0; t < count; ++t) {
      float* const out = direct ? part : block.up.get() + t * block.up_stride + column;
      kernels->activate(layer.spec.activation, gate + t * size, up == nullptr ? nullptr : up + t * size, out, rows);
      if (direct) layer.down.load_columns(inputs, part, t, column, rows);
    }
  }
}

void Decoder::State::embed(int thread, float* h, float* x, Inputs* inputs, Product::Range mine) {
  const Matrix& embedding = *matrices[static_cast<size_t>(spec.embedding)];
  for (int64_t t = mine.first; t < mine.second; ++t) {
    const int64_t id = block.tokens[static_cast<size_t>(t)].id;
    float* row = embedding_projection ? x : h + t * spec.hidden;
    dequantize(embedding, row, 0, id, id + 1);
    if (spec.embedding_scale != 1) {
      for (int64_t d = 0; d < spec.embedding_size; ++d) row[d] *= spec.embedding_scale;
    }
    if (embedding_projection) embedding_projection.load(inputs, row, t);
  }
  if (embedding_projection) {
    loaded();
    embedding_projection.multiply(*inputs, thread, block.delta_attention.get(), block.delta_stride, *kernels);
    pool.barrier();
  }
  for (int64_t t = mine.first; t < mine.second; ++t) {
    float* row = h + t * spec.hidden;
    if (embedding_projection) {
      std::memcpy(row, block.delta_attention.get() + t * block.delta_stride,
                  static_cast<size_t>(spec.hidden) * sizeof(float));
    }
    if (spec.positions >= 0) {
      const int64_t at = block.tokens[static_cast<size_t>(t)].position + spec.position_offset;
      dequantize(*matrices[static_cast<size_t>(spec.positions)], x, 0, at, at + 1);
      kernels->add(row, x, spec.hidden);
    }
    norm(spec.embedding_norm, row, row);
  }
}

// h = attention_after(h + attention_out(a)), a in row `at`; x is scratch
void Decoder::State::attention_residual(const Layer& layer, float* h, float* x, int64_t at) {
  kernels->add(h, norm(layer.spec.attention_out, block.delta_attention.get() + at * block.delta_stride, x), spec.hidden);
  norm(layer.spec.attention_after, h, h);
}

// h = mlp_after(h + mlp_out(m)), or h + attention_out(a) + mlp_out(m)
void Decoder::State::layer_residual(const Layer& layer, float* h, float* x, int64_t at) {
  if (layer.spec.parallel) {
    kernels->add(h, norm(layer.spec.attention_out, block.delta_attention.get() + at * block.delta_stride, x), spec.hidden);
  }
  kernels->add(h, norm(layer.spec.mlp_out, block.delta_mlp.get() + at * block.delta_stride, x), spec.hidden);
  if (!layer.spec.parallel) norm(layer.spec.mlp_after, h, h);
}

void Decoder::State::finish(int thread, float* h, float* x, Inputs* inputs, Product::Range chosen,
                            float* logits) {
  const Product& first = output_projection ? output_projection : head;
  for (int64_t s = chosen.first; s < chosen.second; ++s) {
    float* row = h + block.selected[static_cast<size_t>(s)] * spec.hidden;
    if (!layers.empty()) layer_residual(layers.back(), row, x, s);
    first.load(inputs, norm(spec.final_norm, row, x), s);
  }
  loaded();
  if (output_projection) {
    output_projection.multiply(*inputs, thread, block.projected.get(), head.cols(), *kernels);
    pool.barrier();
    for (int64_t s = chosen.first; s < chosen.second; ++s) {
      head.load(inputs, block.projected.get() + s * head.cols(), s);
    }
    loaded();
  }
  head.multiply(*inputs, thread, logits, spec.vocabulary, *kernels);
  if (spec.logit_softcap == 0) return;
  const Product::Range part = head.range(thread);
  const auto selected = static_cast<int64_t>(block.selected.size());
  for (int64_t s = 0; s < selected; ++s) {
    kernels->softcap(logits + s * spec.vocabulary + part.first, part.second - part.first,
                     spec.logit_softcap);
  }
}

Decoder::Decoder(const DecoderSpec& spec) : state_(std::make_unique<State>(spec)) {}
Decoder::~Decoder() = default;

void Decoder::forward(const CacheSpec& cache, const int32_t* tokens, const int32_t* counts,
                      const int64_t* lengths, bool all_logits, float* logits) {
  state_->forward(cache, tokens, counts, lengths, all_logits, logits);
}

int Decoder::threads() const { return state_->pool.threads(); }

int64_t Decoder::bytes() const {
  int64_t total = state_->head.bytes() + state_->output_projection.bytes() +
                  state_->embedding_projection.bytes();
  for (const Layer& layer : state_->layers) {
    total += layer.qkv.bytes() + layer.out.bytes() + layer.up.bytes() + layer.down.bytes();
  }
  return total;
}

}  // namespace kbit
