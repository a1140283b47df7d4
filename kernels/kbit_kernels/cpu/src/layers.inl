// Norms, activations, rotary positions and attention. Included inside the namespace of an
// instruction set, after vec.h.

// -O2 alone leaves loops over accumulators rolled, and the accumulators in memory.
#if defined(__clang__)
#define KBIT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KBIT_UNROLL _Pragma("GCC unroll 16")
#endif

// f on n floats, vector by vector; the tail goes through a padded copy.
template <class F>
static inline void map(const float* x, const float* y, float* out, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(x + i), load(y + i)));
  if (i < n) {
    float a[kLanes] = {}, b[kLanes] = {};
    const size_t rest = static_cast<size_t>(n - i) * sizeof(float);
    std::memcpy(a, x + i, rest);
    std::memcpy(b, y + i, rest);
    store(a, f(load(a), load(b)));
    std::memcpy(out + i, a, rest);
  }
}

template <class F>
static inline float reduce(const float* x, int64_t n, F f) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    KBIT_UNROLL
    for (int u = 0; u < 4; ++u) sums[u] += f(load(x + i + u * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] += f(load(x + i));
  float total = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += f(splat(x[i]))[0];
  return total;
}

static void norm(const NormSpec& spec, const float* x, float* y) {
  const int64_t n = spec.size;
  const float count = static_cast<float>(n);
  float mean = 0;
  if (spec.kind == kLayerNorm) mean = reduce(x, n, [](Vec v) { return v; }) / count;
  const Vec m = splat(mean);
  const float square = reduce(x, n, [m](Vec v) { return (v - m) * (v - m); }) / count;
  const Vec factor = splat(1.0f / std::sqrt(square + spec.eps));
  if (spec.weight) {
    map(x, spec.weight, y, n, [=](Vec v, Vec w) { return (v - m) * factor * w; });
  } else {
    map(x, x, y, n, [=](Vec v, Vec) { return (v - m) * factor; });
  }
  if (spec.bias) map(y, spec.bias, y, n, [](Vec v, Vec b) { return v + b; });
}

static void add(float* y, const float* x, int64_t n) {
  map(y, x, y, n, [](Vec a, Vec b) { return a + b; });
}

static void scale(const float* x, float factor, float* y, int64_t n) {
  map(x, x, y, n, [=](Vec v, Vec) { return v * splat(factor); });
}

static inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(-x)); }
static inline Vec gelu(Vec x) { return splat(0.5f) * x * erfc(x * splat(-0.70710678f)); }
static inline Vec gelu_tanh(Vec x) {
  const Vec inner = splat(0.79788456f) * (x + splat(0.044715f) * x * x * x);
  return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}
// x < 0 rather than a maximum, so that NaN stays
static inline Vec relu(Vec x) { return x < Vec{} ? Vec{} : x; }

template <class F>
static inline void gated(const float* gate, const float* up, float* out, int64_t n, F f) {
  if (up) {
    map(gate, up, out, n, [f](Vec g, Vec u) { return f(g) * u; });
  } else {
    map(gate, gate, out, n, [f](Vec g, Vec) { return f(g); });
  }
}

// silu to 2^-12, for what is then rounded; NaN stays NaN.
static inline Vec rough_silu(Vec x) {
  const Vec low = splat(-88.0f), y = x < low ? low : x;
  const Vec below = splat(1.0f) + rough_exp(-y);
#if KBIT_LANES == 16
  return x * (Vec)_mm512_rcp14_ps((__m512)below);
#else
  return x / below;
#endif
}

static void activate(int32_t kind, const float* gate, const float* up, float* out, int64_t n) {
  switch (kind) {
    case kSilu: return gated(gate, up, out, n, [](Vec x) { return silu(x); });
    case kGelu: return gated(gate, up, out, n, [](Vec x) { return gelu(x); });
    case kGeluTanh: return gated(gate, up, out, n, [](Vec x) { return gelu_tanh(x); });
    default: return gated(gate, up, out, n, [](Vec x) { return relu(x); });
  }
}

static inline void rough_activate(int32_t kind, const float* gate, const float* up, float* out, int64_t n) {
  if (kind != kSilu) return activate(kind, gate, up, out, n);
  gated(gate, up, out, n, [](Vec x) { return rough_silu(x); });
}

static void softcap(float* x, int64_t n, float cap) {
  const Vec c = splat(cap), inverse = splat(1.0f / cap);
  map(x, x, x, n, [=](Vec v, Vec) { return c * tanh(v * inverse); });
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t e = 0;
  for (; e + kLanes <= half; e += kLanes) {
    const Vec a = load(x + e), b = load(x + e + half), c = load(cos + e), s = load(sin + e);
    store(x + e, a * c - b * s);
    store(x + e + half, b * c + a * s);
  }
  for (; e < half; ++e) {
    const float a = x[e], b = x[e + half];
    x[e] = a * cos[e] - b * sin[e];
    x[e + half] = b * cos[e] + a * sin[e];
  }
}

template <class E>
static inline void put_value(const float* v, int64_t count, E* out) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(out + d, load(v + d));
  for (; d < count; ++d) put(out + d, v[d]);
}

template <class E>
static void put_key(const float* k, int64_t head_dim, E* keys, int64_t position) {
  E* out = keys + position / kKeyBlock * kKeyBlock * head_dim + position % kKeyBlock;
  E part[kLanes];
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, head_dim - d);
    put_value(k + d, count, part);
    for (int64_t i = 0; i < count; ++i) out[(d + i) * kKeyBlock] = part[i];
  }
}

static void store_key(const float* k, int64_t head_dim, int32_t type, void* keys, int64_t position) {
  if (type == kCacheFp16) put_key(k, head_dim, static_cast<Half*>(keys), position);
  else put_key(k, head_dim, static_cast<float*>(keys), position);
}

static void store_value(const float* v, int64_t head_dim, int64_t padded, int32_t type, void* values,
                        int64_t position) {
  if (type == kCacheFp16) put_value(v, head_dim, static_cast<Half*>(values) + position * padded);
  else put_value(v, head_dim, static_cast<float*>(values) + position * padded);
}

using Range = std::pair<int64_t, int64_t>;

constexpr int kBlockVecs = static_cast<int>(kKeyBlock) / kLanes;
constexpr int kChunkBlocks = static_cast<int>(kKeyChunk / kKeyBlock);

constexpr int blocks_at_once(int rows) {
  const int fit = kRegisters / (rows * kBlockVecs);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// scores[r][0..64) = q[r] . keys, for ROWS queries and one chunk of keys. ahead: what is needed next,
// asked for meanwhile, or null.
template <class E, int ROWS>
static inline void scores(const float* q, int64_t stride, const E* keys, int64_t head_dim, const E* ahead,
                          float* out) {
  constexpr int kBlocks = blocks_at_once(ROWS);
  for (int first = 0; first < kChunkBlocks; first += kBlocks) {
    const E* at = keys + first * kKeyBlock * head_dim;
    Vec sums[ROWS][kBlocks][kBlockVecs] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      KBIT_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        if (ahead != nullptr) __builtin_prefetch(ahead + ((first + b) * head_dim + d) * kKeyBlock);
        KBIT_UNROLL
        for (int v = 0; v < kBlockVecs; ++v) {
          const Vec k = load(at + (b * head_dim + d) * kKeyBlock + v * kLanes);
          KBIT_UNROLL
          for (int r = 0; r < ROWS; ++r) sums[r][b][v] = fma(splat(q[r * stride + d]), k, sums[r][b][v]);
        }
      }
    }
    KBIT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      KBIT_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        KBIT_UNROLL
        for (int v = 0; v < kBlockVecs; ++v) {
          store(out + r * kKeyChunk + (first + b) * kKeyBlock + v * kLanes, sums[r][b][v]);
        }
      }
    }
  }
}

// sum[r] += weights[r][j] * values[j], j in [begin, end). ahead: as in `scores`.
template <class E, int ROWS, int VECS>
static inline void weigh_part(const float* weights, const E* values, int64_t padded, int64_t begin,
                              int64_t end, const E* ahead, float* sum) {
  Vec sums[ROWS][VECS];
  KBIT_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    KBIT_UNROLL
    for (int v = 0; v < VECS; ++v) sums[r][v] = load(sum + r * padded + v * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    KBIT_UNROLL
    for (int v = 0; v < VECS; ++v) {
      if (ahead != nullptr) __builtin_prefetch(ahead + j * padded + v * kLanes);
      const Vec value = load(values + j * padded + v * kLanes);
      KBIT_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        sums[r][v] = fma(splat(weights[r * kKeyChunk + j]), value, sums[r][v]);
      }
    }
  }
  KBIT_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    KBIT_UNROLL
    for (int v = 0; v < VECS; ++v) store(sum + r * padded + v * kLanes, sums[r][v]);
  }
}

template <class E, int ROWS>
static inline void weigh(const float* weights, const E* values, int64_t padded, int64_t begin,
                         int64_t end, const E* ahead, float* sum) {
  constexpr int kVecs = kRegisters / ROWS >= 4 ? 4 : kRegisters / ROWS >= 2 ? 2 : 1;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= padded; d += kVecs * kLanes) {
    weigh_part<E, ROWS, kVecs>(weights, values + d, padded, begin, end, ahead ? ahead + d : nullptr, sum + d);
  }
  for (; d < padded; d += kLanes) {
    weigh_part<E, ROWS, 1>(weights, values + d, padded, begin, end, ahead ? ahead + d : nullptr, sum + d);
  }
}

// f<R>(row) over all rows, four at a time and then the rest.
#define KBIT_BY_ROWS(rows, call)              \
  for (int64_t row = 0; row < (rows);) {      \
    const int64_t left = (rows) - row;        \
    if (left >= 4) { call(4); row += 4; }     \
    else if (left == 3) { call(3); row += 3; } \
    else if (left == 2) { call(2); row += 2; } \
    else { call(1); row += 1; }               \
  }

// What weights are relative to, the largest score, is kept until one is so much larger (e^8 is far from
// an overflow): else every second chunk of few has a new one, and all sums are scaled.
constexpr float kPeakRoom = 8;

// By what scores are still to be multiplied.
static inline float score_factor(const Attend& job) { return job.softcap != 0 || job.slopes ? 1 : job.scale; }

// Keys of a chunk up to the b-th, in halves: hidden keys behind them need no work.
static inline int64_t up_to_half(int64_t b) {
  constexpr int64_t kHalf = kKeyChunk / 2;
  return (b + kHalf - 1) / kHalf * kHalf;
}

// What a prompt's attention in products of 16 bits takes: so many queries, for heads so wide.
constexpr int64_t kGroup = 16, kMostRows = 96, kMostWidth = 256;
static inline bool is_tile(const Attend& job) {
  return job.rows >= kGroup && job.rows <= kMostRows && job.head_dim <= kMostWidth;
}

// Keys of a chunk that some of the kGroup rows from `row` on see, in halves.
static inline int64_t seen_of(const Attend& job, int64_t row, int64_t chunk) {
  int64_t most = chunk;
  for (int64_t r = row; r < std::min(row + kGroup, job.rows); ++r) most = std::max(most, job.high[r]);
  return up_to_half(std::min(most - chunk, kKeyChunk));
}

// Scores of a row that sees keys [a, b) of a chunk: hides the other keys, and brings the row's peak, its
// total and its sums to what they are beside these scores.
static inline void raise_peak(const Attend& job, int64_t row, int64_t chunk, int64_t a, int64_t b) {
  float* s = job.scratch + row * kKeyChunk;
  const int64_t stop = up_to_half(b);
  if (job.softcap != 0 || job.slopes) {
    scale(s, job.scale, s, stop);
    if (job.softcap != 0) softcap(s + a, b - a, job.softcap);
    const float slope = job.slopes ? job.slopes[row] : 0;
    for (int64_t j = a; job.slopes && j < b; ++j) s[j] -= slope * static_cast<float>(job.position[row] - chunk - j);
  }
  if (a > 0 || b < stop) {
    for (int64_t j = 0; j < stop; j += kLanes) {
      const IVec key = lane_numbers() + static_cast<int32_t>(j);
      const auto hidden = (key < static_cast<int32_t>(a)) | (key >= static_cast<int32_t>(b));
      store(s + j, hidden ? splat(-HUGE_VALF) : load(s + j));
    }
  }
  Vec peaks = load(s);
  for (int64_t j = kLanes; j < stop; j += kLanes) peaks = max(load(s + j), peaks);
  const float before = job.peak[row];
  peaks = peaks * splat(score_factor(job));
  if (!any_larger(peaks, splat(before + kPeakRoom))) return;
  const float here = max_lanes(peaks);
  job.peak[row] = here;
  // before the first keys sum and total are 0, and the factor is 0
  const float factor = exp(splat(before) - splat(here))[0];
  job.total[row] *= factor;
  float* sum = job.sum + row * job.padded;
  for (int64_t d = 0; d < job.padded; d += kLanes) store(sum + d, load(sum + d) * factor);
}

// Scores of a chunk to weights, 0 where a key is hidden, through put(row, key, v, w) with two vectors of
// a row that sees any; EXP: e to a number. Whether every row sees every key. Peaks are found for all
// rows first: a weight that waits for its own holds up those of the rows behind it.
template <Vec (*EXP)(Vec), class Put>
static inline bool soften_all(const Attend& job, int64_t chunk, Put put, float* totals = nullptr) {
  bool full = true;
  const auto seen = [&](int64_t row) {
    return Range{std::max<int64_t>(job.low[row] - chunk, 0), std::min<int64_t>(job.high[row] - chunk, kKeyChunk)};
  };
  for (int64_t row = 0; row < job.rows; ++row) {
    const Range keys = seen(row);
    if (keys.first < keys.second) raise_peak(job, row, chunk, keys.first, keys.second);
    full = full && keys.first == 0 && keys.second == kKeyChunk;
  }
  const Vec times = splat(score_factor(job));
  for (int64_t row = 0; row < job.rows; ++row) {
    const Range keys = seen(row);
    if (keys.first >= keys.second) continue;
    const float* s = job.scratch + row * kKeyChunk;
    const Vec shift = splat(-job.peak[row]);
    Vec total = Vec{};
    const int64_t stop = up_to_half(keys.second);
    for (int64_t j = stop; j < kKeyChunk; j += 2 * kLanes) put(row, j, Vec{}, Vec{});
    for (int64_t j = 0; j < stop; j += 2 * kLanes) {
      const Vec v = EXP(fma(load(s + j), times, shift)), w = EXP(fma(load(s + j + kLanes), times, shift));
      put(row, j, v, w);
      total += v + w;
    }
    const float here = add_lanes(total);
    job.total[row] += here;
    if (totals != nullptr) totals[row] = here;
  }
  return full;
}

// The same in place of the scores.
template <Vec (*EXP)(Vec)>
static bool soften_all(const Attend& job, int64_t chunk) {
  return soften_all<EXP>(job, chunk, [&](int64_t row, int64_t j, Vec v, Vec w) {
    store(job.scratch + row * kKeyChunk + j, v);
    store(job.scratch + row * kKeyChunk + j + kLanes, w);
  });
}

template <class E>
static void weigh_all(const Attend& job, const E* values, int64_t chunk, bool full, const E* ahead) {
  const float* s = job.scratch;
  if (full) {
#define KBIT_WEIGH(R) \
  weigh<E, R>(s + row * kKeyChunk, values, job.padded, 0, kKeyChunk, row == 0 ? ahead : nullptr, job.sum + row * job.padded)
    KBIT_BY_ROWS(job.rows, KBIT_WEIGH)
#undef KBIT_WEIGH
    return;
  }
  // Keys that only some rows see: rows in runs of equal limits, so that no row reads a value that
  // it must not see (0 * NaN is NaN).
  for (int64_t row = 0, next; row < job.rows; row = next) {
    const int64_t low = job.low[row], high = job.high[row];
    for (next = row + 1; next < job.rows && job.low[next] == low && job.high[next] == high;) ++next;
    const int64_t a = std::max<int64_t>(low - chunk, 0), b = std::min<int64_t>(high - chunk, kKeyChunk);
    if (a >= b) continue;
    const int64_t start = row;
    const float* weights = s + start * kKeyChunk;
    float* sum = job.sum + start * job.padded;
    const int64_t rows = next - start;
    {
#define KBIT_WEIGH(R) \
  weigh<E, R>(weights + row * kKeyChunk, values, job.padded, a, b, nullptr, sum + row * job.padded)
      KBIT_BY_ROWS(rows, KBIT_WEIGH)
#undef KBIT_WEIGH
    }
  }
}

template <Vec (*EXP)(Vec), class E>
static void attend_chunk(const Attend& job, const E* keys, const E* values, int64_t chunk) {
#define KBIT_SCORES(R) \
  scores<E, R>(job.q + row * job.padded, job.padded, keys, job.head_dim, row == 0 ? values : nullptr, \
               job.scratch + row * kKeyChunk)
  KBIT_BY_ROWS(job.rows, KBIT_SCORES)
#undef KBIT_SCORES
  weigh_all(job, values, chunk, soften_all<EXP>(job, chunk), keys + kKeyChunk * job.head_dim);
}

// f(keys, values, chunk) of every chunk that a row sees, after peaks, totals and sums were cleared.
template <class E, class F>
static inline void each_chunk(const Attend& job, F f) {
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t row = 0; row < job.rows; ++row) {
    job.peak[row] = -HUGE_VALF;
    job.total[row] = 0;
    if (job.low[row] >= job.high[row]) continue;
    begin = std::min(begin, job.low[row]);
    end = std::max(end, job.high[row]);
  }
  std::memset(job.sum, 0, static_cast<size_t>(job.rows * job.padded) * sizeof(float));
  for (int64_t chunk = begin / kKeyChunk * kKeyChunk; chunk < end; chunk += kKeyChunk) {
    f(static_cast<const E*>(job.keys) + chunk * job.head_dim,
      static_cast<const E*>(job.values) + chunk * job.padded, chunk);
  }
}

template <Vec (*EXP)(Vec), class E>
static void attend_all(const Attend& job) {
  const bool widen = sizeof(E) != sizeof(float) && job.rows > 8;
  each_chunk<E>(job, [&](const E* keys, const E* values, int64_t chunk) {
    if (!widen) return attend_chunk<EXP>(job, keys, values, chunk);
    float* wide_keys = job.scratch + job.rows * kKeyChunk;
    float* wide_values = wide_keys + kKeyChunk * job.padded;
    for (int64_t i = 0; i < kKeyChunk * job.head_dim; i += kLanes) store(wide_keys + i, load(keys + i));
    for (int64_t i = 0; i < kKeyChunk * job.padded; i += kLanes) store(wide_values + i, load(values + i));
    attend_chunk<EXP>(job, static_cast<const float*>(wide_keys), static_cast<const float*>(wide_values), chunk);
  });
}

// EXP: e to a number.
template <Vec (*EXP)(Vec) = exp>
static void attend(const Attend& job) {
  if (job.type == kCacheFp16) attend_all<EXP, Half>(job);
  else attend_all<EXP, float>(job);
}

#undef KBIT_BY_ROWS

static const LayerKernels kLayers = {norm,   add,       scale,       activate, softcap,
                                     rotate, store_key, store_value, attend<>};
