// A prompt's attention in products of 16-bit integers. Included after layers.inl, for AVX2 and AVX-512.
//
// Queries and keys are rounded to integers whose vectors are at most kLongest long, so that no product of
// two, nor any part of its sum, leaves 32 bits (Cauchy and Schwarz). Weights of one row and chunk add up
// to kTotal at most, and values are kValue at most: neither do their sums. Queries and keys have a scale
// each, values one a chunk, weights one a row and chunk. What this doesn't fit (NaN, infinity, a value far
// above the others) is computed in fp32, a chunk at a time.

#if KBIT_LANES == 16
static inline Vec root(Vec x) { return (Vec)_mm512_sqrt_ps((__m512)x); }
static inline IVec rounded(Vec x) { return (IVec)_mm512_cvtps_epi32((__m512)x); }
static inline Vec to_float(IVec x) { return (Vec)_mm512_cvtepi32_ps((__m512i)x); }
// The lower 16 bits of each, a's below b's.
static inline IVec pairs_of(IVec a, IVec b) {
  return (IVec)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)a, _mm512_slli_epi32((__m512i)b, 16));
}
// All of a's, then all of b's.
static inline IVec narrowed(IVec a, IVec b) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return (IVec)_mm512_permutexvar_epi64(order, _mm512_packs_epi32((__m512i)a, (__m512i)b));
}
// sum + a's products with b, of the two integers in each lane. (With the intrinsic gcc 12 copies sums.)
static inline void add_products(IVec a, IVec b, IVec* sum) {
  asm("vpdpwssd %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
}
#else
static inline Vec root(Vec x) { return (Vec)_mm256_sqrt_ps((__m256)x); }
static inline IVec rounded(Vec x) { return (IVec)_mm256_cvtps_epi32((__m256)x); }
static inline Vec to_float(IVec x) { return (Vec)_mm256_cvtepi32_ps((__m256i)x); }
static inline IVec pairs_of(IVec a, IVec b) {
  return (IVec)_mm256_blend_epi16((__m256i)a, _mm256_slli_epi32((__m256i)b, 16), 0xaa);
}
static inline IVec narrowed(IVec a, IVec b) {
  return (IVec)_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a, (__m256i)b), 0xd8);
}
static inline void add_products(IVec a, IVec b, IVec* sum) {
  *sum += (IVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#endif
static inline IVec lanes_of(const void* p) {
  IVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct Int16Attend {
  static constexpr int kRows = kLanes == 16 ? 8 : 4, kWide = 2 * kLanes;  // of sums that fit the registers
  static constexpr float kLongest = 32500, kWeight = 32500, kTotal = 260000, kValue = 8190;  // with room to round
  static constexpr float kTiny = 1e-30f;  // no divisions by 0
  static constexpr float kUneven = 64;    // times the mean: 7 of 13 bits are left, as in bf16

  // Two rows of keys or values in a lane: pairs of dimensions by keys, and pairs of keys by dimensions.
  alignas(64) int32_t keys[kMostWidth / 2][kKeyChunk];
  alignas(64) int32_t values[kKeyChunk / 2][kMostWidth];
  alignas(64) int16_t q[kMostRows][kMostWidth], weights[kMostRows][kKeyChunk];
  // What an integer stands for.
  alignas(64) float q_unit[kMostRows], weight_unit[kMostRows], key_unit[kKeyChunk];
  float value_unit;
  float totals[kMostRows];  // of a chunk's weights

  static void put_row(Vec a, Vec b, float times, int16_t* out) {
    const IVec both = narrowed(rounded(a * splat(times)), rounded(b * splat(times)));
    std::memcpy(out, &both, sizeof both);
  }

  void load_queries(const Attend& job) {
    for (int64_t row = 0; row < job.rows; ++row) {
      const float* from = job.q + row * job.padded;
      const float length = std::sqrt(reduce(from, job.head_dim, [](Vec x) { return x * x; }));
      const float times = kLongest / (length > kTiny ? length : kTiny);
      q_unit[row] = length / kLongest;
      int64_t d = 0;
      for (; d + kWide <= job.head_dim; d += kWide) put_row(load(from + d), load(from + d + kLanes), times, q[row] + d);
      if (d == job.head_dim) continue;
      float rest[kWide] = {};
      std::memcpy(rest, from + d, static_cast<size_t>(job.head_dim - d) * sizeof(float));
      put_row(load(rest), load(rest + kLanes), times, q[row] + d);
    }
  }

  // Keys of the chunk up to `end`, zeros behind them, whose memory may hold anything. Whether all are finite.
  template <class E>
  bool load_keys(const Attend& job, int64_t end, const E* from) {
    const auto at = [&](int64_t key, int64_t d) {
      return load(from + (key / kKeyBlock * job.head_dim + d) * kKeyBlock + key % kKeyBlock);
    };
    if (end == kKeyChunk) return put_keys(job.head_dim, at);
    return put_keys(job.head_dim, [&](int64_t key, int64_t d) {
      return (Vec)((IVec)at(key, d) & (lane_numbers() < static_cast<int32_t>(end - key)));
    });
  }

  // at(key, d): dimension d of kLanes keys.
  template <class F>
  bool put_keys(int64_t head_dim, F at) {
    constexpr int kVecs = static_cast<int>(kKeyChunk) / kLanes;
    Vec squares[kVecs] = {}, all = {}, times[kVecs];
    for (int64_t d = 0; d < head_dim; ++d) {
      KBIT_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        const Vec k = at(v * kLanes, d);
        squares[v] = fma(k, k, squares[v]);
      }
    }
    KBIT_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const Vec length = root(squares[v]);
      all += squares[v];
      times[v] = splat(kLongest) / max(length, splat(kTiny));
      store(key_unit + v * kLanes, length * splat(1 / kLongest));
    }
    if (!(add_lanes(all) < HUGE_VALF)) return false;
    for (int64_t d = 0; d < head_dim; d += 2) {
      KBIT_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        const IVec a = rounded(at(v * kLanes, d) * times[v]);
        const IVec b = d + 1 < head_dim ? rounded(at(v * kLanes, d + 1) * times[v]) : IVec{};
        const IVec pairs = pairs_of(a, b);
        std::memcpy(&keys[d / 2][v * kLanes], &pairs, sizeof pairs);
      }
    }
    return true;
  }

  // The same of values; false too if one is so much larger than most that little would be left of these.
  template <class E>
  bool load_values(const Attend& job, int64_t end, const E* from) {
    const IVec magnitude = IVec{} + 0x7fffffff;
    Vec most = {}, all = {};
    for (int64_t i = 0; i < end * job.padded; i += kLanes) {
      const Vec v = (Vec)((IVec)load(from + i) & magnitude);
      most = max(v, most);
      all += v;
    }
    const float largest = max_lanes(most), total = add_lanes(all);  // which is NaN if any is: a maximum may not be
    if (!(total < HUGE_VALF) || largest * static_cast<float>(end * job.padded) > kUneven * total) return false;
    const float times = kValue / (largest > kTiny ? largest : kTiny);
    value_unit = largest / kValue;
    for (int64_t j = 0; j < up_to_half(end); j += 2) {
      for (int64_t d = 0; d < job.padded; d += kLanes) {
        const IVec a = j < end ? rounded(load(from + j * job.padded + d) * splat(times)) : IVec{};
        const IVec b = j + 1 < end ? rounded(load(from + (j + 1) * job.padded + d) * splat(times)) : IVec{};
        const IVec pairs = pairs_of(a, b);
        std::memcpy(&values[j / 2][d], &pairs, sizeof pairs);
      }
    }
    return true;
  }

  // sums = kRows rows of a times kWide columns of b.
  static inline __attribute__((always_inline)) void multiply(const int16_t* a, int64_t a_stride, const int32_t* b,
                                                             int64_t b_stride, int64_t pairs, IVec (&sums)[kRows][2]) {
    KBIT_UNROLL
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = IVec{};
    for (int64_t pair = 0; pair < pairs; ++pair, b += b_stride) {
      const IVec left = lanes_of(b), right = lanes_of(b + kLanes);
      KBIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int32_t both;
        std::memcpy(&both, a + r * a_stride + 2 * pair, sizeof both);
        const IVec times = IVec{} + both;
        add_products(left, times, &sums[r][0]);
        add_products(right, times, &sums[r][1]);
      }
    }
  }

  // f(row, end) for every kRows rows, of which some see keys of the chunk below `end`, in halves.
  template <class F>
  static void each_rows(const Attend& job, int64_t chunk, F f) {
    for (int64_t group = 0; group < job.rows; group += kGroup) {
      const int64_t end = seen_of(job, group, chunk);
      for (int64_t row = group; end > 0 && row < std::min(group + kGroup, job.rows); row += kRows) f(row, end);
    }
  }

  // Of rows beyond the last one scores are stored too, and never read: `scratch` goes on with other things.
  void score(const Attend& job, int64_t chunk) {
    each_rows(job, chunk, [&](int64_t row, int64_t end) {
      for (int64_t key = 0; key < end; key += kWide) {
        IVec sums[kRows][2];
        multiply(q[row], kMostWidth, keys[0] + key, kKeyChunk, (job.head_dim + 1) / 2, sums);
        float* out = job.scratch + row * kKeyChunk + key;
        const Vec left = load(key_unit + key), right = load(key_unit + key + kLanes);
        KBIT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Vec unit = splat(q_unit[row + r]);
          store(out + r * kKeyChunk, to_float(sums[r][0]) * (left * unit));
          store(out + r * kKeyChunk + kLanes, to_float(sums[r][1]) * (right * unit));
        }
      }
    });
  }

  // Scores to weights, in place and as integers; zeros for rows that see nothing of the chunk.
  void soften(const Attend& job, int64_t chunk) {
    std::memset(totals, 0, sizeof totals);
    soften_all<rough_exp>(job, chunk, [&](int64_t row, int64_t j, Vec v, Vec w) {
      store(job.scratch + row * kKeyChunk + j, v);
      store(job.scratch + row * kKeyChunk + j + kLanes, w);
    }, totals);
    for (int64_t row = 0; row < job.rows; ++row) {
      const float* exact = job.scratch + row * kKeyChunk;
      if (totals[row] == 0) {
        weight_unit[row] = 0;
        std::memset(weights[row], 0, sizeof weights[row]);
        continue;
      }
      Vec most = load(exact);
      for (int64_t j = kLanes; j < kKeyChunk; j += kLanes) most = max(load(exact + j), most);
      const float of_peak = max_lanes(most) * (1 / kWeight), of_total = totals[row] * (1 / kTotal);
      const float larger = of_peak > of_total ? of_peak : of_total;
      const float unit = larger > kTiny ? larger : kTiny;
      weight_unit[row] = unit * value_unit;
      for (int64_t j = 0; j < kKeyChunk; j += kWide) {
        put_row(load(exact + j), load(exact + j + kLanes), 1 / unit, weights[row] + j);
      }
    }
  }

  void weigh(const Attend& job, int64_t chunk) {
    each_rows(job, chunk, [&](int64_t row, int64_t end) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, job.rows - row));
      for (int64_t d = 0; d < job.padded; d += kWide) {
        IVec sums[kRows][2];
        multiply(weights[row], kKeyChunk, values[0] + d, kMostWidth, end / 2, sums);
        float* out = job.sum + row * job.padded + d;
        const bool wide = d + kLanes < job.padded;
        KBIT_UNROLL
        for (int r = 0; r < kRows; ++r, out += job.padded) {
          if (r >= rows) break;
          const Vec unit = splat(weight_unit[row + r]);
          store(out, fma(to_float(sums[r][0]), unit, load(out)));
          if (wide) store(out + kLanes, fma(to_float(sums[r][1]), unit, load(out + kLanes)));
        }
      }
    });
  }

  template <class E>
  void run(const Attend& job) {
    int64_t most = 0;
    for (int64_t row = 0; row < job.rows; ++row) most = std::max(most, job.high[row]);
    load_queries(job);
    each_chunk<E>(job, [&](const E* k, const E* v, int64_t chunk) {
      const int64_t end = std::min(most - chunk, kKeyChunk);
      // a hidden value, whose weight is 0, must not make a sum NaN
      if (!load_keys(job, end, k) || !load_values(job, end, v)) return attend_chunk<rough_exp>(job, k, v, chunk);
      score(job, chunk);
      soften(job, chunk);
      weigh(job, chunk);
    });
  }
};

static void attend_int16(const Attend& job) {
  if (!is_tile(job)) return attend<rough_exp>(job);
  Int16Attend integers;
  if (job.type == kCacheFp16) integers.template run<Half>(job);
  else integers.template run<float>(job);
}

static const LayerKernels kInt16Layers = {norm,   add,       scale,       rough_activate, softcap,
                                          rotate, store_key, store_value, attend_int16};
