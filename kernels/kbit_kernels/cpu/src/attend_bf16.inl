// A prompt's attention in products of bf16, by tiles (AMX) or by vectors (AVX512_BF16). Instructions are
// written out for the reason given in amx.inl. Included after layers.inl, with vectors of 16 lanes.

// c[16][32] = a times b over `steps` times 32 columns of a, or, with `more`, is added to. a: rows of bf16;
// b: pairs of its rows in a lane. kParts 2: every number is the sum of two; what these leave out, and the
// product of both lower parts, is some 2^-16 of the product.
#if defined(KBIT_AMX)
template <int PARTS>
struct TileProduct {
  static constexpr int kParts = PARTS;

  // Registers: 0 and 1 sums, 2 and 3 a, 4 to 7 b.
  static void product(const uint16_t* upper, const uint16_t* lower, int64_t a_stride, const uint32_t* b_upper,
                      const uint32_t* b_lower, int64_t b_stride, int64_t steps, float* c, int64_t c_stride,
                      bool more = false) {
    if (more) {
      asm volatile("tileloadd (%0,%1,1), %%tmm0\n\ttileloadd 64(%0,%1,1), %%tmm1"
                   ::"r"(c), "r"(4 * c_stride) : "memory");
    } else {
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" :::);
    }
    for (int64_t i = 0; i < steps; ++i) {
      if constexpr (PARTS == 1) {
        asm volatile("tileloadd (%0,%1,1), %%tmm2\n\ttileloadd (%2,%3,1), %%tmm4\n\t"
                     "tdpbf16ps %%tmm4, %%tmm2, %%tmm0\n\ttileloadd 64(%2,%3,1), %%tmm5\n\t"
                     "tdpbf16ps %%tmm5, %%tmm2, %%tmm1"
                     ::"r"(upper + 32 * i), "r"(2 * a_stride), "r"(b_upper + 16 * i * b_stride), "r"(4 * b_stride)
                     : "memory");
        continue;
      }
      asm volatile("tileloadd (%0,%2,1), %%tmm2\n\ttileloadd (%3,%5,1), %%tmm4\n\t"
                   "tdpbf16ps %%tmm4, %%tmm2, %%tmm0\n\ttileloadd 64(%3,%5,1), %%tmm5\n\t"
                   "tdpbf16ps %%tmm5, %%tmm2, %%tmm1\n\ttileloadd (%1,%2,1), %%tmm3\n\t"
                   "tdpbf16ps %%tmm4, %%tmm3, %%tmm0\n\ttdpbf16ps %%tmm5, %%tmm3, %%tmm1\n\t"
                   "tileloadd (%4,%5,1), %%tmm6\n\ttdpbf16ps %%tmm6, %%tmm2, %%tmm0\n\t"
                   "tileloadd 64(%4,%5,1), %%tmm7\n\ttdpbf16ps %%tmm7, %%tmm2, %%tmm1"
                   ::"r"(upper + 32 * i), "r"(lower + 32 * i), "r"(2 * a_stride), "r"(b_upper + 16 * i * b_stride),
                   "r"(b_lower + 16 * i * b_stride), "r"(4 * b_stride) : "memory");
    }
    asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, 64(%0,%1,1)"
                 ::"r"(c), "r"(4 * c_stride) : "memory");
  }
};
#endif

struct DotProduct {
  static constexpr int kParts = 1;

  static void product(const uint16_t* a, const uint16_t*, int64_t a_stride, const uint32_t* b, const uint32_t*,
                      int64_t b_stride, int64_t steps, float* c, int64_t c_stride, bool more = false) {
    constexpr int kRows = 8;  // whose sums and one row of b fit the registers
    for (int64_t row = 0; row < 16; row += kRows, a += kRows * a_stride, c += kRows * c_stride) {
      Vec sums[kRows][2];
      KBIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = more ? load(c + r * c_stride) : Vec{};
        sums[r][1] = more ? load(c + r * c_stride + 16) : Vec{};
      }
      for (int64_t pair = 0; pair < 16 * steps; ++pair) {
        const __m512i left = _mm512_loadu_si512(b + pair * b_stride), right = _mm512_loadu_si512(b + pair * b_stride + 16);
        KBIT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          uint32_t both;
          std::memcpy(&both, a + r * a_stride + 2 * pair, sizeof both);
          const __m512i times = _mm512_set1_epi32(static_cast<int32_t>(both));
          asm("vdpbf16ps %2, %1, %0" : "+v"(sums[r][0]) : "v"(left), "v"(times));
          asm("vdpbf16ps %2, %1, %0" : "+v"(sums[r][1]) : "v"(right), "v"(times));
        }
      }
      KBIT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        store(c + r * c_stride, sums[r][0]);
        store(c + r * c_stride + 16, sums[r][1]);
      }
    }
  }
};

template <class PRODUCT>
struct Bf16Attend {
  static constexpr int PARTS = PRODUCT::kParts;
  // Upper and lower parts, two rows of keys or values in a lane: pairs of dimensions by keys, and
  // pairs of keys by dimensions.
  alignas(64) uint32_t keys[PARTS][kMostWidth / 2][kKeyChunk];
  alignas(64) uint32_t values[PARTS][kKeyChunk / 2][kMostWidth];
  alignas(64) uint16_t q[PARTS][kMostRows][kMostWidth], weights[PARTS][kMostRows][kKeyChunk];
  alignas(64) float part[16][32];

  struct Parts {
    __m512i upper, lower;  // in the upper halves of lanes
  };
  static Parts split(Vec x) {
    const __m512i mask = _mm512_set1_epi32(-65536);
    const __m512i upper = _mm512_and_si512(_mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)), mask);
    return {upper, _mm512_castps_si512(_mm512_sub_ps((__m512)x, _mm512_castsi512_ps(upper)))};
  }
  static constexpr int kLower = PARTS - 1;  // where lower parts lie; upper ones at 0
  // Lane i: a's and b's.
  static void put_pairs(Vec a, Vec b, uint32_t* upper, uint32_t* lower) {
    const auto pair = [](__m512i low, __m512i high) {
      return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
    };
    const Parts x = split(a), y = split(b);
    _mm512_store_si512(upper, pair(x.upper, y.upper));
    if (PARTS == 2) _mm512_store_si512(lower, pair(x.lower, y.lower));
  }
  // All of a's, then all of b's.
  static void put_row(Vec a, Vec b, uint16_t* upper, uint16_t* lower) {
    if constexpr (PARTS == 1) {
      __m512i both;
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(b), "v"(a));
      return _mm512_store_si512(upper, both);
    }
    alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(kOdd);
    const Parts x = split(a), y = split(b);
    _mm512_store_si512(upper, _mm512_permutex2var_epi16(x.upper, odd, y.upper));
    if (PARTS == 2) _mm512_store_si512(lower, _mm512_permutex2var_epi16(x.lower, odd, y.lower));
  }
  static Vec first(const float* p, int64_t count) {  // zeros beyond `count` floats
    const auto lanes = static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
    return (Vec)_mm512_maskz_loadu_ps(lanes, p);
  }

  void load_queries(const Attend& job) {
    const int64_t width = (job.head_dim + 31) / 32 * 32;
    for (int64_t row = 0; row < job.rows; ++row) {
      const float* from = job.q + row * job.padded;
      for (int64_t d = 0; d < width; d += 32) {
        put_row(first(from + d, job.head_dim - d), first(from + d + 16, job.head_dim - d - 16), q[0][row] + d,
                q[kLower][row] + d);
      }
    }
  }

  template <class E>
  void score(const Attend& job, int64_t chunk, const E* from) {
    const int64_t pairs = (job.head_dim + 31) / 32 * 16, block = job.head_dim * kKeyBlock;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t d = 2 * pair;
      for (int64_t b = 0; b < kKeyChunk / kKeyBlock; ++b) {
        const E* at = from + b * block + d * kKeyBlock;
        put_pairs(d < job.head_dim ? load(at) : Vec{}, d + 1 < job.head_dim ? load(at + kKeyBlock) : Vec{},
                  keys[0][pair] + b * kKeyBlock, keys[kLower][pair] + b * kKeyBlock);
      }
    }
    for (int64_t row = 0; row < job.rows; row += kGroup) {
      const int64_t end = seen_of(job, row, chunk);
      for (int64_t key = 0; key < end; key += 32) {
        PRODUCT::product(q[0][row], q[kLower][row], kMostWidth, keys[0][0] + key, keys[kLower][0] + key, kKeyChunk, pairs / 16,
                job.scratch + row * kKeyChunk + key, kKeyChunk);
      }
    }
  }

  // Whether all values are finite: a hidden one, whose weight is 0, must not make a sum NaN.
  template <class E>
  bool load_values(const Attend& job, const E* from) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t j = 0; j < kKeyChunk; j += 2) {
      for (int64_t d = 0; d < job.padded; d += 16) {
        const Vec a = load(from + j * job.padded + d), b = load(from + (j + 1) * job.padded + d);
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)a, magnitude));
        largest = _mm512_max_epu32(largest, _mm512_and_si512((__m512i)b, magnitude));
        put_pairs(a, b, values[0][j / 2] + d, values[kLower][j / 2] + d);
      }
    }
    return _mm512_reduce_max_epu32(largest) < 0x7f800000;
  }

  // Scores to weights; zeros for rows that see nothing of the chunk.
  void soften(const Attend& job, int64_t chunk) {
    for (int64_t row = 0; row < job.rows; ++row) {
      if (std::max(job.low[row], chunk) < std::min(job.high[row], chunk + kKeyChunk)) continue;
      for (auto& part : weights) std::memset(part[row], 0, sizeof part[row]);
    }
    soften_all<PARTS == 1 ? rough_exp : exp>(job, chunk, [&](int64_t row, int64_t j, Vec v, Vec w) {
      put_row(v, w, weights[0][row] + j, weights[kLower][row] + j);
    });
  }

  void weigh(const Attend& job, int64_t chunk) {
    for (int64_t row = 0; row < job.rows; row += kGroup) {
      const int64_t steps = seen_of(job, row, chunk) / 32;
      if (steps == 0) continue;
      for (int64_t d = 0; d < job.padded; d += 32) {
        float* sum = job.sum + row * job.padded + d;
        const bool whole = row + 16 <= job.rows && d + 32 <= job.padded;
        PRODUCT::product(weights[0][row], weights[kLower][row], kKeyChunk, values[0][0] + d, values[kLower][0] + d, kMostWidth,
                steps, whole ? sum : part[0], whole ? job.padded : 32, whole);
        for (int64_t r = 0; !whole && r < std::min<int64_t>(16, job.rows - row); ++r) {
          add(sum + r * job.padded, part[r], std::min<int64_t>(32, job.padded - d));
        }
      }
    }
  }

  template <class E>
  void run(const Attend& job) {
    load_queries(job);
    each_chunk<E>(job, [&](const E* k, const E* v, int64_t chunk) {
      score(job, chunk, k);
      if (load_values(job, v)) {
        soften(job, chunk);
        weigh(job, chunk);
      } else {
        weigh_all<E>(job, v, chunk, soften_all<exp>(job, chunk), nullptr);
      }
    });
  }
};

template <class PRODUCT>
static void attend_bf16(const Attend& job) {
  if (!is_tile(job)) return attend(job);
  Bf16Attend<PRODUCT> parts;
  if (job.type == kCacheFp16) parts.template run<Half>(job);
  else parts.template run<float>(job);
}

static const LayerKernels kBf16Layers = {norm,   add,       scale,       rough_activate,         softcap,
                                         rotate, store_key, store_value, attend_bf16<DotProduct>};

#if defined(KBIT_AMX)
template <int PARTS>
static void attend_amx(const Attend& job) {
  const TileShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  attend_bf16<TileProduct<PARTS>>(job);
  asm volatile("tilerelease");
}

static const LayerKernels kAmxLayers = {norm,   add,       scale,       activate,     softcap,
                                        rotate, store_key, store_value, attend_amx<2>};
static const LayerKernels kAmxBf16Layers = {norm,   add,       scale,       rough_activate, softcap,
                                            rotate, store_key, store_value, attend_amx<1>};
#endif
