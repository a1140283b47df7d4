// Attention over the cache: who computes what. The arithmetic is in layers.inl.
//
// One token a sequence: the chunks of keys of all sequences and key/value heads lie in one line that
// is cut into equal parts, one a thread; what a thread found for a head (largest score, total, sum)
// goes to a slot of its own, and `collect` joins the slots. Prompts: keys and values are written
// first, then threads fetch tiles of queries one by one.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "step.h"

namespace kbit {

void AttentionPass::reserve(const Layer& layer, Worker* worker) {
  const int64_t rows = std::max(kTileRows, layer.group);
  worker->q.room(rows * layer.padded);
  worker->state.room(rows * (layer.padded + 2));
  worker->scratch.room(attend_scratch(rows, layer.padded));
  worker->slopes.room(rows);
  for (auto* numbers : {&worker->low, &worker->high, &worker->position}) {
    numbers->resize(std::max(numbers->size(), static_cast<size_t>(rows)));
  }
}

void AttentionPass::run() {
  if (block_.single) run_single();
  else run_tiles();
}

void AttentionPass::turn(float* x, const NormSpec& norm, int64_t position) {
  if (norm.kind != kNoNorm) kernels_.norm(norm, x, x);
  if (spec_.rotary < 0) return;
  const int64_t at = position * spec_.rotary_half;
  kernels_.rotate(x, block_.cache->cos[spec_.rotary] + at, block_.cache->sin[spec_.rotary] + at,
                  spec_.rotary_half);
}

const void* AttentionPass::cached(void* const* base, int64_t sequence, int64_t g, int64_t width) {
  const CacheSpec& cache = *block_.cache;
  const int64_t bytes = cache.type == kCacheFp16 ? 2 : 4;
  const int64_t offset = (sequence * spec_.kv_heads + g) * cache.capacity * width * bytes;
  return static_cast<const char*>(base[index_]) + offset;
}

void AttentionPass::write(const Token& token, int64_t t, int64_t g, float* key) {
  const CacheSpec& cache = *block_.cache;
  turn(key, spec_.k_norm, token.position);
  kernels_.store_key(key, spec_.head_dim, cache.type,
                     const_cast<void*>(cached(cache.keys, token.sequence, g, spec_.head_dim)),
                     token.position);
  kernels_.store_value(head(t, spec_.v, g), spec_.head_dim, layer_.padded, cache.type,
                       const_cast<void*>(cached(cache.values, token.sequence, g, layer_.padded)),
                       token.position);
}

void AttentionPass::plan_parts() {
  worker_.starts.clear();
  int64_t total = 0;
  for (const Token& token : block_.tokens) {
    const int64_t first = lowest(token.position) / kKeyChunk, last = token.position / kKeyChunk + 1;
    for (int64_t g = 0; g < spec_.kv_heads; ++g) {
      worker_.starts.push_back(total);
      total += last - first;
    }
  }
  worker_.starts.push_back(total);
}

void AttentionPass::run_single() {
  plan_parts();
  const auto& starts = worker_.starts;
  const int64_t total = starts.back(), threads = pool_.threads();
  const int64_t begin = total * thread_ / threads, end = total * (thread_ + 1) / threads;
  auto unit = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
  float* q = worker_.q.get();
  for (; begin < end && starts[static_cast<size_t>(unit)] < end; ++unit) {
    const int64_t t = unit / spec_.kv_heads, g = unit % spec_.kv_heads;
    const Token& token = block_.tokens[static_cast<size_t>(t)];
    const int64_t low = lowest(token.position), high = token.position + 1;
    const int64_t base = low / kKeyChunk - starts[static_cast<size_t>(unit)];
    const int64_t first = std::max(begin, starts[static_cast<size_t>(unit)]);
    const int64_t last = std::min(end, starts[static_cast<size_t>(unit) + 1]);
    if (last == starts[static_cast<size_t>(unit) + 1]) {  // the part with the new key
      std::memcpy(q, head(t, spec_.k, g), static_cast<size_t>(spec_.head_dim) * 4);
      write(token, t, g, q);
    }
    for (int64_t r = 0; r < layer_.group; ++r) {
      float* row = q + r * layer_.padded;
      std::memcpy(row, head(t, spec_.q, g * layer_.group + r), static_cast<size_t>(spec_.head_dim) * 4);
      turn(row, spec_.q_norm, token.position);
      worker_.low[static_cast<size_t>(r)] = std::max(low, (base + first) * kKeyChunk);
      worker_.high[static_cast<size_t>(r)] = std::min(high, (base + last) * kKeyChunk);
      worker_.position[static_cast<size_t>(r)] = token.position;
    }
    float* slot = block_.partials.get() + (unit + thread_) * slot_floats(layer_);
    const CacheSpec& cache = *block_.cache;
    kernels_.attend({layer_.group, spec_.head_dim, layer_.padded, q, worker_.low.data(),
                     worker_.high.data(), worker_.position.data(),
                     spec_.slopes ? spec_.slopes + g * layer_.group : nullptr, spec_.scale, spec_.softcap, cache.type,
                     cached(cache.keys, token.sequence, g, spec_.head_dim),
                     cached(cache.values, token.sequence, g, layer_.padded), slot, slot + layer_.group,
                     slot + 2 * layer_.group, worker_.scratch.get()});
  }
}

const float* AttentionPass::collect(int64_t t, float* x) {
  if (!block_.single) return block_.attention.get() + t * block_.attention_stride;
  const int64_t width = spec_.heads * static_cast<int64_t>(spec_.head_dim);
  const auto& starts = worker_.starts;
  const int64_t total = starts.back(), threads = pool_.threads();
  std::memset(x, 0, static_cast<size_t>(width) * 4);
  for (int64_t g = 0; g < spec_.kv_heads; ++g) {
    const int64_t unit = t * spec_.kv_heads + g;
    const int64_t begin = starts[static_cast<size_t>(unit)], end = starts[static_cast<size_t>(unit) + 1];
    int64_t first = begin * threads / total, last = first;
    while (total * (first + 1) / threads <= begin) ++first;
    for (last = first; last + 1 < threads && total * (last + 1) / threads < end;) ++last;
    for (int64_t r = 0; r < layer_.group; ++r) {
      float* out = x + (g * layer_.group + r) * spec_.head_dim;
      const auto slot = [&](int64_t thread) {
        return block_.partials.get() + (unit + thread) * slot_floats(layer_);
      };
      float peak = slot(first)[r];
      for (int64_t thread = first + 1; thread <= last; ++thread) {
        peak = slot(thread)[r] > peak ? slot(thread)[r] : peak;
      }
      float sum = 0;
      for (int64_t thread = first; thread <= last; ++thread) {
        sum += slot(thread)[layer_.group + r] * (first == last ? 1 : std::exp(slot(thread)[r] - peak));
      }
      for (int64_t thread = first; thread <= last; ++thread) {
        const float factor = (first == last ? 1 : std::exp(slot(thread)[r] - peak)) / sum;
        const float* from = slot(thread) + 2 * layer_.group + r * layer_.padded;
        for (int64_t d = 0; d < spec_.head_dim; ++d) out[d] += from[d] * factor;
      }
    }
  }
  return x;
}

void AttentionPass::run_tiles() {
  const auto mine = share(block_.count(), 1, thread_, pool_.threads());
  for (int64_t t = mine.first; t < mine.second; ++t) {
    const Token& token = block_.tokens[static_cast<size_t>(t)];
    for (int64_t h = 0; h < spec_.heads; ++h) turn(head(t, spec_.q, h), spec_.q_norm, token.position);
    for (int64_t g = 0; g < spec_.kv_heads; ++g) write(token, t, g, head(t, spec_.k, g));
  }
  pool_.barrier();
  const int64_t step = std::max<int64_t>(1, kTileRows / layer_.group);
  // the last tiles of a run see most keys: with them first, threads end at about the same time
  int64_t unit = 0, next = block_.next[static_cast<size_t>(index_)].fetch_add(1);
  for (const Run& run : block_.runs) {
    for (int64_t first = (run.count - 1) / step * step; first >= 0; first -= step) {
      for (int64_t g = 0; g < spec_.kv_heads; ++g, ++unit) {
        if (unit != next) continue;
        tile(run, g, wanted({run.first + first, run.first + std::min(first + step, run.count)}));
        next = block_.next[static_cast<size_t>(index_)].fetch_add(1);
      }
    }
  }
}

// The tokens from the first to the last whose sums are wanted.
Product::Range AttentionPass::wanted(Product::Range tokens) const {
  if (!selected_) return tokens;
  const auto& all = block_.selected;
  const auto first = std::lower_bound(all.begin(), all.end(), tokens.first);
  const auto last = std::lower_bound(first, all.end(), tokens.second);
  return first == last ? Product::Range{} : Product::Range{*first, *(last - 1) + 1};
}

void AttentionPass::tile(const Run& run, int64_t g, Product::Range tokens) {
  const int64_t first = tokens.first, rows = (tokens.second - first) * layer_.group;
  if (rows == 0) return;
  float *q = worker_.q.get(), *slopes = worker_.slopes.get();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = first + row / layer_.group, h = g * layer_.group + row % layer_.group;
    const int64_t position = block_.tokens[static_cast<size_t>(t)].position;
    std::memcpy(q + row * layer_.padded, head(t, spec_.q, h), static_cast<size_t>(spec_.head_dim) * 4);
    worker_.low[static_cast<size_t>(row)] = lowest(position);
    worker_.high[static_cast<size_t>(row)] = position + 1;
    worker_.position[static_cast<size_t>(row)] = position;
    if (spec_.slopes) slopes[row] = spec_.slopes[h];
  }
  const CacheSpec& cache = *block_.cache;
  float *peak = worker_.state.get(), *total = peak + rows, *sum = total + rows;
  kernels_.attend({rows, spec_.head_dim, layer_.padded, q, worker_.low.data(), worker_.high.data(),
                   worker_.position.data(), spec_.slopes ? slopes : nullptr, spec_.scale, spec_.softcap, cache.type,
                   cached(cache.keys, run.sequence, g, spec_.head_dim),
                   cached(cache.values, run.sequence, g, layer_.padded), peak, total, sum,
                   worker_.scratch.get()});
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = first + row / layer_.group, h = g * layer_.group + row % layer_.group;
    float* const out = inputs_ ? sum + row * layer_.padded
                               : block_.attention.get() + t * block_.attention_stride + h * spec_.head_dim;
    kernels_.scale(sum + row * layer_.padded, 1 / total[row], out, spec_.head_dim);
    if (inputs_) layer_.out.load_columns(*inputs_, out, t, h * spec_.head_dim, spec_.head_dim);
  }
}

}  // namespace kbit
