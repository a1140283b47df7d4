// Rounding to nearest. Loops over the 32 weights of a unit have constant counts, so that compilers
// turn them into vectors; every operation rounds as numpy's does, so that codes are the reference's.

// Columns [column, column + 32) of a row as fp32, zeros beyond K and in outlier columns.
static inline void stage_unit(const Weights& w, int64_t row, int64_t column, float* out) {
  const int count = static_cast<int>(least<int64_t>(32, w.cols - column));
  for (int i = 0; i < 32; i += V::kFloats) {
    const int here = count - i < 0 ? 0 : least(V::kFloats, count - i);
    const V::F v = here == 0 ? V::zero()
                             : load_any(w.type, w.values, row * w.cols + column + i, here, w.rows * w.cols);
    V::store(out + i, v);
  }
  for (const int32_t* at = w.outlier_columns + w.first_outlier[column / 32];
       at < w.outlier_columns + w.first_outlier[column / 32 + 1]; ++at) {
    out[*at - column] = 0;
  }
}

// Least and largest weight of each block, 0 included; false if a weight is NaN or infinite.
static bool block_ranges(const Weights& w, float* low, float* high, int64_t begin, int64_t end) {
  const int64_t groups = (w.cols + w.block - 1) / w.block;
  V::F poison = V::zero();
  alignas(64) float v[32];
  for (int64_t row = begin; row < end; ++row) {
    float* lows = low + row * groups;
    float* highs = high + row * groups;
    for (int64_t g = 0; g < groups; ++g) lows[g] = highs[g] = 0;
    for (int64_t column = 0; column < w.cols; column += 32) {
      stage_unit(w, row, column, v);
      for (int half = 0; half < 32; half += 16) {
        V::F most = V::zero(), negative = V::zero();
        for (int i = half; i < half + 16; i += V::kFloats) {
          const V::F value = V::load(v + i);
          poison = V::fma(value, V::zero(), poison);
          most = V::max(value, most);
          negative = V::max(V::mul(value, V::set1(-1)), negative);
        }
        const int64_t g = (column + half) / w.block;
        if (g >= groups) continue;
        const float a = V::peak(most), b = -V::peak(negative);
        if (a > highs[g]) highs[g] = a;
        if (b < lows[g]) lows[g] = b;
      }
    }
  }
  return V::sum(poison) == 0;
}

// The planes of one unit from its codes.
template <int WIDTH>
static inline void pack_plane(const uint8_t* codes, int low, uint8_t* out) {
  constexpr int kBytes = 4 * WIDTH, kMask = (1 << WIDTH) - 1;
  uint8_t bytes[kBytes] = {};
  KBIT_UNROLL
  for (int field = 0; field < 8 / WIDTH; ++field) {
    for (int i = 0; i < kBytes; ++i) {
      bytes[i] = static_cast<uint8_t>(bytes[i] | ((codes[field * kBytes + i] >> low) & kMask) << (field * WIDTH));
    }
  }
  std::memcpy(out, bytes, kBytes);
}

static inline void pack_unit(const uint8_t* codes, int bits, int64_t unit, int64_t units, uint8_t* row) {
  int low = bits;
  if (bits & 8) low -= 8, pack_plane<8>(codes, low, row + unit * 32), row += units * 32;
  if (bits & 4) low -= 4, pack_plane<4>(codes, low, row + unit * 16), row += units * 16;
  if (bits & 2) low -= 2, pack_plane<2>(codes, low, row + unit * 8), row += units * 8;
  if (bits & 1) low -= 1, pack_plane<1>(codes, low, row + unit * 4);
}

static void encode(const Weights& w, const Rounding& how, uint8_t* codes, int64_t begin, int64_t end) {
  const int64_t units = (w.cols + 31) / 32, groups = (w.cols + w.block - 1) / w.block;
  const int count = 1 << how.bits;
  const float top = static_cast<float>(count - 1);
  alignas(64) float v[32];
  alignas(64) uint8_t code[32];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t unit = 0; unit < units; ++unit) {
      stage_unit(w, row, unit * 32, v);
      float zero[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t group = least((unit * 32 + half * 16) / w.block, groups - 1);
        const float scale = how.scales[row * groups + group];
        float* part = v + half * 16;
        if (scale == 0) for (int i = 0; i < 16; ++i) part[i] = 0;
        else for (int i = 0; i < 16; ++i) part[i] /= scale;
        zero[half] = how.zeros ? static_cast<float>(how.zeros[row * groups + group]) : how.center;
      }
      if (how.midpoints == nullptr) {
        for (int half = 0; half < 2; ++half) {
          for (int i = 16 * half; i < 16 * half + 16; ++i) {
            float value = v[i] > 1000.0f ? 1000.0f : v[i];
            value = value < -1000.0f ? -1000.0f : value;
            value = (value + 12582912.0f) - 12582912.0f + zero[half];  // 1.5 * 2^23: to nearest even
            value = value < 0 ? 0 : value;
            code[i] = static_cast<uint8_t>(static_cast<int32_t>(value > top ? top : value));
          }
        }
      } else if (how.bits <= 4) {
        int32_t below[32] = {};
        for (int m = 0; m < count - 1; ++m) {
          const float midpoint = how.midpoints[m];
          for (int i = 0; i < 32; ++i) below[i] += v[i] > midpoint;
        }
        for (int i = 0; i < 32; ++i) code[i] = static_cast<uint8_t>(below[i]);
      } else {
        int32_t below[32] = {};
        for (int step = count / 2; step > 0; step /= 2) {  // 32 searches in step hide their latency
          for (int i = 0; i < 32; ++i) below[i] += v[i] > how.midpoints[below[i] + step - 1] ? step : 0;
        }
        for (int i = 0; i < 32; ++i) code[i] = static_cast<uint8_t>(below[i]);
      }
      if (unit == units - 1) {
        for (int64_t i = w.cols - unit * 32; i < 32; ++i) code[i] = 0;
      }
      pack_unit(code, how.bits, unit, units, codes + row * units * 4 * how.bits);
    }
  }
}

static int32_t order(int32_t bits) { return V::order(bits); }
static bool digits(int32_t bits) { return V::digits(bits); }

static constexpr Kernels kKernels = {load, multiply, dequantize, block_ranges, encode, order, digits, 0,
                                     kTileTokens, V::kByteBits, V::kByteCodebookBits};
