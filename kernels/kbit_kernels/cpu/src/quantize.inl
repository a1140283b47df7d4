// Rounding to nearest, a unit of 32 weights at a time. Every operation rounds as numpy's does, so that
// codes are the reference's.

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

// Blocks are powers of two or whole rows: column >> shift is a column's block, before the last one's end.
static int block_shift(const Weights& w) { return w.block & (w.block - 1) ? 62 : log2_of(static_cast<int>(w.block)); }

// Least and largest weight of each block, 0 included; false if a weight is NaN or infinite.
static bool block_ranges(const Weights& w, float* low, float* high, int64_t begin, int64_t end) {
  const int64_t groups = (w.cols + w.block - 1) / w.block;
  const int shift = block_shift(w);
  V::F poison = V::zero();
  alignas(64) float v[32];
  for (int64_t row = begin; row < end; ++row) {
    V::F most = V::zero(), negative = V::zero();
    for (int64_t column = 0; column < w.cols; column += 16) {
      if (column % 32 == 0) stage_unit(w, row, column, v);
      for (int i = 0; i < 16; i += V::kFloats) {
        const V::F value = V::load(v + column % 32 + i);
        poison = V::fma(value, V::zero(), poison);
        most = V::max(value, most);
        negative = V::max(V::mul(value, V::set1(-1)), negative);
      }
      const int64_t g = column >> shift;
      if (column + 16 < w.cols && (column + 16) >> shift == g) continue;
      low[row * groups + g] = -V::peak(negative), high[row * groups + g] = V::peak(most);
      most = negative = V::zero();
    }
  }
  return V::sum(poison) == 0;
}

// The plane of a unit that holds bits [low, low + WIDTH) of its codes.
template <int WIDTH>
static inline void pack_plane(const uint8_t* codes, int low, uint8_t* out) {
  using Word = std::conditional_t<WIDTH == 1, uint32_t, uint64_t>;
  constexpr int kBytes = 4 * WIDTH, kWord = sizeof(Word);
  constexpr Word kMask = ~Word{0} / 255 * ((1 << WIDTH) - 1);  // in every byte
  KBIT_UNROLL
  for (int i = 0; i < kBytes; i += kWord) {
    Word packed = 0;
    KBIT_UNROLL
    for (int field = 0; field < 8 / WIDTH; ++field) {
      Word word;
      std::memcpy(&word, codes + field * kBytes + i, kWord);
      packed |= (word >> low & kMask) << (field * WIDTH);
    }
    std::memcpy(out + i, &packed, kWord);
  }
}

static inline void pack_unit(const uint8_t* codes, int bits, int64_t unit, int64_t units, uint8_t* row) {
  int low = bits;
  if (bits & 8) low -= 8, pack_plane<8>(codes, low, row + unit * 32), row += units * 32;
  if (bits & 4) low -= 4, pack_plane<4>(codes, low, row + unit * 16), row += units * 16;
  if (bits & 2) low -= 2, pack_plane<2>(codes, low, row + unit * 8), row += units * 8;
  if (bits & 1) low -= 1, pack_plane<1>(codes, low, row + unit * 4);
}

constexpr int kUnitVectors = 32 / V::kFloats;

// How many midpoints lie below each of a unit's weights. 32 searches in step hide their latency.
static inline void count_below(const Rounding& how, const V::F (&v)[kUnitVectors], V::I (&code)[kUnitVectors]) {
  for (V::I& c : code) c = V::izero();
  if (how.bits <= 4) {
    for (int m = 0; m < (1 << how.bits) - 1; ++m) {
      KBIT_UNROLL
      for (int i = 0; i < kUnitVectors; ++i) code[i] = V::add_above(code[i], 1, v[i], V::set1(how.midpoints[m]));
    }
    return;
  }
  for (int step = 1 << (how.bits - 1); step > 0; step /= 2) {
    KBIT_UNROLL
    for (int i = 0; i < kUnitVectors; ++i) {
      code[i] = V::add_above(code[i], step, v[i], V::gather(how.midpoints + step - 1, code[i]));
    }
  }
}

static void encode(const Weights& w, const Rounding& how, uint8_t* codes, int64_t begin, int64_t end) {
  const int64_t units = (w.cols + 31) / 32, groups = (w.cols + w.block - 1) / w.block;
  const int shift = block_shift(w);
  const float top = static_cast<float>((1 << how.bits) - 1);
  alignas(64) float staged[32];
  alignas(64) uint8_t bytes[32];
  V::F v[kUnitVectors];
  V::I code[kUnitVectors];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t unit = 0; unit < units; ++unit) {
      stage_unit(w, row, unit * 32, staged);
      KBIT_UNROLL
      for (int i = 0; i < kUnitVectors; ++i) {
        const int at = i * V::kFloats;
        const int64_t group = row * groups + least((unit * 32 + at) >> shift, groups - 1);
        const float scale = how.scales[group];
        v[i] = scale == 0 ? V::zero() : V::div(V::load(staged + at), V::set1(scale));
        if (how.midpoints) continue;
        const float zero = how.zeros ? static_cast<float>(how.zeros[group]) : how.center;
        const V::F inside = V::min(V::max(v[i], V::set1(-zero)), V::set1(top - zero));  // integers, so before rounding
        code[i] = V::iadd(V::round(inside), V::iset1(static_cast<int32_t>(zero)));
      }
      if (how.midpoints) count_below(how, v, code);
      KBIT_UNROLL
      for (int i = 0; i < kUnitVectors; ++i) V::store_codes(bytes + i * V::kFloats, code[i]);
      if (unit == units - 1) {
        for (int64_t i = w.cols - unit * 32; i < 32; ++i) bytes[i] = 0;
      }
      pack_unit(bytes, how.bits, unit, units, codes + row * units * 4 * how.bits);
    }
  }
}

static int32_t order(int32_t bits) { return V::order(bits); }
static bool digits(int32_t bits) { return V::digits(bits); }
static bool fine(int32_t bits) { return V::fine(bits); }
static int64_t tokens_at_once(int32_t width) { return V::tokens(width); }

static constexpr Kernels kKernels = {load, load_columns, multiply, dequantize, block_ranges, encode, order, digits, fine, tokens_at_once, kSumsTokens, 0,
                                     kTileTokens, V::kByteBits, V::kByteCodebookBits};
