// Vectors of fp32 in the compiler's own notation, as wide as the instruction set that this is
// compiled for. Included inside a namespace of its own per instruction set, after KBIT_LANES (and
// KBIT_F16C where the instruction set converts fp16, or KBIT_NEON) are defined.

constexpr int kLanes = KBIT_LANES;
constexpr int kRegisters = kLanes == 16 ? 16 : 8;  // accumulators of a kernel

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
static inline Vec splat(float x) { return x - Vec{}; }
static inline IVec lane_numbers() {
  IVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec fma(Vec a, Vec b, Vec c) {
#if KBIT_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif KBIT_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(KBIT_NEON)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

#if KBIT_LANES == 16
static inline float add_lanes(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float max_lanes(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#elif KBIT_LANES == 8
template <class F>
static inline float fold(Vec v, F f) {
  const __m128 four = f(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = f(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(f(two, _mm_movehdup_ps(two)));
}
static inline float add_lanes(Vec v) {
  return fold(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
static inline float max_lanes(Vec v) {
  return fold(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
static inline float add_lanes(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
static inline float max_lanes(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
#endif

// An fp16 number, its bits; not arithmetic.
struct Half {
  uint16_t bits;
};

#if defined(KBIT_F16C)
static inline Vec load(const Half* p) {
#if KBIT_LANES == 16
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
static inline void put(Half* p, float x) {
  p->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(Half* p, Vec v) {
#if KBIT_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#elif defined(KBIT_NEON)
static inline Vec load(const Half* p) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
static inline void store(Half* p, Vec v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
static inline void put(Half* p, float x) {
  p->bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}
#else
static inline float widen(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16, rest = half.bits & 0x7fff;
  uint32_t pattern;
  float value;
  if (rest >= 0x7c00) {
    pattern = 0x7f800000 | rest << 13;
  } else if (rest >= 0x400) {
    pattern = (rest << 13) + (112u << 23);
  } else {  // subnormal: an integer times 2^-24
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&pattern, &value, 4);
  }
  pattern |= sign;
  std::memcpy(&value, &pattern, 4);
  return value;
}
static inline Vec load(const Half* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}
// Round to nearest even, as the instruction does.
static inline void put(Half* p, float x) {
  uint32_t pattern;
  std::memcpy(&pattern, &x, 4);
  const uint32_t sign = pattern >> 16 & 0x8000, rest = pattern & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to 65520 or more
    half = 0x7c00;
  } else if (rest >= 0x38800000) {
    half = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
  } else {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}
static inline void store(Half* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) put(p + i, v[i]);
}
#endif
static inline void put(float* p, float x) { *p = x; }

// Whether any lane of a is larger than b's.
static inline bool any_larger(Vec a, Vec b) {
#if KBIT_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(KBIT_F16C)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  const auto larger = a > b;
  for (int i = 0; i < kLanes; ++i) {
    if (larger[i]) return true;
  }
  return false;
#endif
}

// e^x to 2 ulp, 0 below -87.3, about 2^127 above 88.3; NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec low = splat(-87.3f), high = splat(88.3f);
  const auto tiny = x < low;
  x = x > high ? high : x;
  x = tiny ? low : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + splat(1.0f);
  const IVec power = (((IVec)shifted - (IVec)magic) + 127) << 23;
  const Vec y = p * (Vec)power;
  return tiny ? Vec{} : y;
}

// e^x to 2^-13, beside what is rounded; 0 below -87.3, x at most 88; NaN stays NaN.
static inline Vec rough_exp(Vec x) {
  const Vec power = x * splat(1.44269504f), shifted = power + splat(12582912.0f);  // as in exp
  const Vec r = power - (shifted - splat(12582912.0f));
  Vec p = fma(splat(0.0551716685f), r, splat(0.2426111251f));  // 2^r, the least relative error on [-0.5, 0.5]
  p = fma(p, r, splat(0.6932609677f));
  p = fma(p, r, splat(0.9999280572f));
  const Vec y = p * (Vec)(((IVec)shifted + 127) << 23);
  return x < splat(-87.3f) ? Vec{} : y;
}

// tanh with an error of 1e-7; exact limits.
static inline Vec tanh(Vec x) {
  return splat(1.0f) - splat(2.0f) / (exp(splat(2.0f) * x) + splat(1.0f));
}

// erfc to 1.2e-7 relative: the Chebyshev fit of Numerical Recipes, section 6.2.
static inline Vec erfc(Vec x) {
  const Vec z = x < Vec{} ? -x : x;
  const Vec t = splat(1.0f) / (splat(1.0f) + splat(0.5f) * z);
  Vec p = splat(0.17087277f);
  p = fma(p, t, splat(-0.82215223f));
  p = fma(p, t, splat(1.48851587f));
  p = fma(p, t, splat(-1.13520398f));
  p = fma(p, t, splat(0.27886807f));
  p = fma(p, t, splat(-0.18628806f));
  p = fma(p, t, splat(0.09678418f));
  p = fma(p, t, splat(0.37409196f));
  p = fma(p, t, splat(1.00002368f));
  p = fma(p, t, splat(-1.26551223f));
  const Vec y = t * exp(p - z * z);
  return x < Vec{} ? splat(2.0f) - y : y;
}
