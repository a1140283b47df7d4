// Products with many tokens by AMX. Instructions are written out, because gcc 12 takes stores that
// only they read for dead ones. Included in the namespace of AVX-512, which does all the rest.

constexpr int kAmxTokens = 16;

// A panel of 32 rows is dequantized a stretch of columns at a time, and multiplied with all tokens.
constexpr int kStretch = 1024;

// Columns of a stretch: all of a row's are about as long.
static int64_t stretch_of(int64_t cols) {
  const int64_t count = (cols + kStretch - 1) / kStretch;
  return (cols + count * 64 - 1) / (count * 64) * 64;
}

// int16: weights and inputs are two signed bytes, 256 * upper + lower, with one scale a row (or token)
// and stretch. Three integer products; that of the lower bytes is less than what rounding costs.
struct AmxDigits {
  alignas(64) uint32_t weights[2][kStretch / 4][kTileRows];  // upper and lower bytes of four columns
  alignas(64) int8_t staged[2][kTileRows][kStretch];
  alignas(64) float scales[kTileRows];
  alignas(64) int32_t sums[2][16][kTileRows];

  // Where bytes PART of 32-bit numbers lie after they were packed to 16 bits, four vectors of them in
  // two: packing goes by 128-bit lanes.
  template <int PART>
  struct Packed {
    alignas(64) uint8_t at[64];
    constexpr Packed() : at() {
      for (int i = 0; i < 64; ++i) {
        at[i] = static_cast<uint8_t>(i / 32 * 64 + i % 16 / 4 * 16 + i % 32 / 16 * 8 + i % 4 * 2 + PART);
      }
    }
  };

  // The digits of `columns` values, a multiple of 64, and their scale: NaN if a value is not finite.
  static float split(const float* values, int columns, int8_t* upper, int8_t* lower) {
    __m512i peaks = _mm512_setzero_si512();
    for (int i = 0; i < columns; i += 16) {
      const __m512i size = _mm512_and_si512(_mm512_loadu_si512(values + i), _mm512_set1_epi32(0x7fffffff));
      peaks = _mm512_max_epu32(peaks, size);
    }
    const uint32_t pattern = _mm512_reduce_max_epu32(peaks);
    float peak;
    std::memcpy(&peak, &pattern, sizeof peak);
    const bool finite = pattern < 0x7f800000;
    const V::F factor = V::set1(finite && peak > 1e-30f ? kDigitInputs / peak : 0);
    for (int i = 0; i < columns; i += 64) {
      const auto packed = [&](int at) {
        const float* from = values + i + at;
        return _mm512_packs_epi32(V::round(V::mul(V::load(from), factor)), V::round(V::mul(V::load(from + 16), factor)));
      };
      const __m512i a = packed(0), b = packed(32), half = _mm512_set1_epi16(128);
      const __m512i low = _mm512_permutex2var_epi8(a, V::constant<Packed<0>>(), b);
      const __m512i high = _mm512_permutex2var_epi8(_mm512_add_epi16(a, half), V::constant<Packed<1>>(),
                                                    _mm512_add_epi16(b, half));
      _mm512_storeu_si512(upper + i, high);
      _mm512_storeu_si512(lower + i, low);
    }
    return finite ? peak / kDigitInputs : __builtin_nanf("");
  }

  static void load(const Input& in, int64_t token, int64_t column, int columns, const float* values) {
    int8_t* out = static_cast<int8_t*>(in.values) + 2 * token * in.padded + column;
    in.scales[token * in.blocks + column / stretch_of(in.matrix->cols())] = split(values, columns, out, out + in.padded);
  }

  void fill(const Matrix& m, int64_t first, int rows, int64_t column, int columns) {
    const Decode<32> decode = decode_of<32>(m);
    alignas(64) float values[kStretch + 64];
    const int whole = (columns + 63) / 64 * 64;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = first + least(r, rows - 1);
      decode(m, row, column, columns, values);
      scale_row(m, row, column, columns, values);
      for (int i = columns; i < whole; ++i) values[i] = 0;
      scales[r] = split(values, whole, staged[0][r], staged[1][r]);
    }
    for (int digit = 0; digit < 2; ++digit) {
      const auto* in = reinterpret_cast<const uint32_t*>(staged[digit]);
      for (int word = 0; word < whole / 4; word += 16) {
        for (int r = 0; r < kTileRows; r += 16) {
          V::transpose(in + r * (kStretch / 4) + word, kStretch / 4, weights[digit][word] + r, kTileRows);
        }
      }
    }
  }

  // Registers: 0 and 1 sums of 16 tokens by 32 rows of upper times upper bytes, 2 and 3 of upper times
  // lower ones and the other way round; 4 and 5 inputs, 6 and 7 (and 5 again) weights. A sum waits for
  // the one before it: those that two products add to take turns.
  void multiply(const int8_t* x, int64_t x_stride, int columns) {
    const int64_t lines = kTileRows * 4, low = x_stride / 2;
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" :::);
    for (int column = 0; column < columns; column += 64) {
      asm volatile("tileloadd (%0,%2,1), %%tmm4\n\ttileloadd (%1,%2,1), %%tmm5\n\t"
                   "tileloadd (%3,%5,1), %%tmm6\n\ttdpbssd %%tmm6, %%tmm5, %%tmm2\n\t"
                   "tileloadd 64(%3,%5,1), %%tmm7\n\ttdpbssd %%tmm7, %%tmm5, %%tmm3\n\t"
                   "tdpbssd %%tmm6, %%tmm4, %%tmm0\n\t"
                   "tileloadd (%4,%5,1), %%tmm6\n\ttdpbssd %%tmm6, %%tmm4, %%tmm2\n\t"
                   "tileloadd 64(%4,%5,1), %%tmm5\n\ttdpbssd %%tmm5, %%tmm4, %%tmm3\n\t"
                   "tdpbssd %%tmm7, %%tmm4, %%tmm1"
                   ::"r"(x + column), "r"(x + low + column), "r"(x_stride), "r"(weights[0][column / 4]),
                   "r"(weights[1][column / 4]), "r"(lines) : "memory");
    }
    asm volatile("tilestored %%tmm0, (%0,%2,1)\n\ttilestored %%tmm1, 64(%0,%2,1)\n\t"
                 "tilestored %%tmm2, (%1,%2,1)\n\ttilestored %%tmm3, 64(%1,%2,1)"
                 ::"r"(sums[0]), "r"(sums[1]), "r"(lines) : "memory");
  }

  void products(const Input& in, int64_t column, int columns, float* y, int64_t stride, int rows) {
    const int64_t stretch = column / stretch_of(in.matrix->cols());
    for (int64_t token = 0; token < in.tokens; token += 16) {
      multiply(static_cast<const int8_t*>(in.values) + 2 * token * in.padded + column, 2 * in.padded, columns);
      for (int64_t t = 0; t < least<int64_t>(16, in.tokens - token); ++t) {
        const V::F input_scale = V::set1(256 * in.scales[(token + t) * in.blocks + stretch]);
        for (int v = 0; v < rows; v += 16) {
          float* const to = y + (token + t) * stride + v;
          const V::F upper = V::to_float(_mm512_load_si512(sums[0][t] + v));
          const V::F cross = V::to_float(_mm512_load_si512(sums[1][t] + v));
          const V::F sum = V::mul(V::fma(upper, V::set1(256), cross), input_scale);
          const int count = least(16, rows - v);
          V::store_part(to, V::fma(sum, V::load(scales + v), column ? V::load_part(to, count) : V::zero()), count);
        }
      }
    }
  }
};

// int8: products of bf16, which round less than 8 bits a block do, and whose sums need no scaling: the
// weights have their scales already. 32 tokens at a time.
struct AmxBf16 {
  alignas(64) uint32_t weights[kStretch / 2][kTileRows];  // two columns each
  alignas(64) uint8_t staged[kTileRows][kStretch];
  alignas(64) uint32_t codes[kStretch / 4][kTileRows];  // of four columns
  alignas(64) float scale[kStretch / 16][kTileRows], offset[kStretch / 16][kTileRows];
  alignas(64) float spare[32][kTileRows];  // sums that do not fill whole tiles of y

  static __m512i rounded(V::F a, V::F b) {
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(b), "v"(a));
    return both;
  }

  static void load(const Input& in, int64_t token, int64_t column, int columns, const float* values) {
    uint16_t* out = static_cast<uint16_t*>(in.values) + token * in.padded + column;
    for (int i = 0; i < columns; i += 32) _mm512_storeu_si512(out + i, rounded(V::load(values + i), V::load(values + i + 16)));
  }

  // How a code in the low byte of a lane becomes a number; bytes above are anything.
  enum Kind { kTable16, kTable32, kInteger, kTable256 };
  template <Kind KIND>
  static V::F value(__m512i code, const float* table) {
    const __m512i byte = _mm512_and_si512(code, _mm512_set1_epi32(255));
    if (KIND == kTable16) return _mm512_permutexvar_ps(code, V::load(table));
    if (KIND == kTable32) return _mm512_permutex2var_ps(V::load(table), code, V::load(table + 16));
    if (KIND == kTable256) return _mm512_i32gather_ps(byte, table, 4);
    return _mm512_cvtepi32_ps(byte);
  }

  // Lane i: a's and b's.
  static __m512i pair(V::F a, V::F b) {
    struct Turns {
      alignas(64) uint16_t at[32];
      constexpr Turns() : at() {
        for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
      }
    };
    return _mm512_permutexvar_epi16(V::constant<Turns>(), rounded(a, b));
  }

  template <Kind KIND>
  void expand(int step, int columns, const float* table) {
    for (int column = 0; column < columns; column += 4) {
      const int block = column / step;
      KBIT_UNROLL
      for (int r = 0; r < kTileRows; r += 16) {
        const __m512i four = _mm512_load_si512(codes[column / 4] + r);
        const V::F s = V::load(scale[block] + r), o = V::load(offset[block] + r);
        const auto weight = [&](__m512i code) { return V::fma(value<KIND>(code, table), s, o); };
        _mm512_store_si512(weights[column / 2] + r, pair(weight(four), weight(_mm512_srli_epi32(four, 8))));
        _mm512_store_si512(weights[column / 2 + 1] + r,
                           pair(weight(_mm512_srli_epi32(four, 16)), weight(_mm512_srli_epi32(four, 24))));
      }
    }
  }

  void fill(const Matrix& m, int64_t first, int rows, int64_t column, int columns) {
    const Tensor& t = m.tensor;
    const Decode<8> decode = decode_of<8, false>(t.bits);
    const int whole = (columns + 31) / 32 * 32, blocks = (columns + m.step - 1) / m.step;
    const float center = t.storage == kInt ? -static_cast<float>(1 << (t.bits - 1)) : 0;
    const Meaning meant{1, center, center != 0 || t.zeros != nullptr || t.means != nullptr};
    alignas(64) float s[kStretch / 16 + 16], o[kStretch / 16 + 16];
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = first + least(r, rows - 1);
      decode(m, row, column, columns, staged[r]);
      row_scales(m, row, static_cast<int>(column / m.step), blocks, meant, s, o);
      for (int b = 0; b * m.step < whole; ++b) {  // codes beyond a row are anything
        scale[b][r] = b < blocks ? s[b] : 0;
        offset[b][r] = b < blocks && meant.offset ? o[b] : 0;
      }
    }
    const auto* in = reinterpret_cast<const uint32_t*>(staged);
    for (int word = 0; word < whole / 4; word += 16) {
      for (int r = 0; r < kTileRows; r += 16) {
        V::transpose(in + r * (kStretch / 4) + word, kStretch / 4, codes[word] + r, kTileRows);
      }
    }
    if (t.storage != kCodebook) expand<kInteger>(m.step, whole, nullptr);
    else if (t.bits <= 4) expand<kTable16>(m.step, whole, m.tables->values);
    else if (t.bits == 5) expand<kTable32>(m.step, whole, m.tables->values);
    else expand<kTable256>(m.step, whole, m.tables->values);
  }

  // Registers: 0 to 3 sums of 16 * T tokens by 32 rows, 4 and 5 inputs, 6 and 7 weights.
  template <int T>
  void multiply(const uint16_t* x, int64_t x_stride, int columns, const float* from, int64_t from_stride,
                float* to, int64_t to_stride) const {
    const int64_t lines = kTileRows * 4, x_bytes = x_stride * 2, second = 16 * x_stride;
    if (from == nullptr) {
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" :::);
    } else {
      asm volatile("tileloadd (%0,%1,1), %%tmm0\n\ttileloadd 64(%0,%1,1), %%tmm1"
                   ::"r"(from), "r"(from_stride * 4) : "memory");
      if (T == 2) {
        asm volatile("tileloadd (%0,%1,1), %%tmm2\n\ttileloadd 64(%0,%1,1), %%tmm3"
                     ::"r"(from + 16 * from_stride), "r"(from_stride * 4) : "memory");
      }
    }
    for (int column = 0; column < columns; column += 32) {
      asm volatile("tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%2,%3,1), %%tmm6\n\t"
                   "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttileloadd 64(%2,%3,1), %%tmm7\n\t"
                   "tdpbf16ps %%tmm7, %%tmm4, %%tmm1"
                   ::"r"(x + column), "r"(x_bytes), "r"(weights[column / 2]), "r"(lines) : "memory");
      if (T == 2) {
        asm volatile("tileloadd (%0,%1,1), %%tmm5\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
                     "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(x + second + column), "r"(x_bytes) : "memory");
      }
    }
    asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, 64(%0,%1,1)"
                 ::"r"(to), "r"(to_stride * 4) : "memory");
    if (T == 2) {
      asm volatile("tilestored %%tmm2, (%0,%1,1)\n\ttilestored %%tmm3, 64(%0,%1,1)"
                   ::"r"(to + 16 * to_stride), "r"(to_stride * 4) : "memory");
    }
  }

  // y (+)= tokens [token, token + 16 * T), as many as there are, times the panel's `rows` rows.
  template <int T>
  void product(const Input& in, int64_t token, int64_t column, int columns, float* y, int64_t stride,
               int rows) {
    const int here = static_cast<int>(least<int64_t>(16 * T, in.tokens - token));
    const uint16_t* x = static_cast<const uint16_t*>(in.values) + token * in.padded + column;
    if (here == 16 * T && rows == kTileRows) {
      return multiply<T>(x, in.padded, columns, column ? y : nullptr, stride, y, stride);
    }
    for (int t = 0; column && t < here; ++t) std::memcpy(spare[t], y + t * stride, sizeof(float) * static_cast<size_t>(rows));
    multiply<T>(x, in.padded, columns, column ? spare[0] : nullptr, kTileRows, spare[0], kTileRows);
    for (int t = 0; t < here; ++t) std::memcpy(y + t * stride, spare[t], sizeof(float) * static_cast<size_t>(rows));
  }

  void products(const Input& in, int64_t column, int columns, float* y, int64_t stride, int rows) {
    int64_t token = 0;
    for (; token + 16 < in.tokens; token += 32) {
      product<2>(in, token, column, columns, y + token * stride, stride, rows);
    }
    if (token < in.tokens) product<1>(in, token, column, columns, y + token * stride, stride, rows);
  }
};

template <class Panel>
static void run_amx(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin, int64_t end) {
  Panel panel;
  const int64_t stretch = stretch_of(m.cols());
  const TileShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  // a stretch of the inputs stays in the cache for all rows
  for (int64_t column = 0; column < m.cols(); column += stretch) {
    const int columns = static_cast<int>(least(stretch, m.cols() - column));
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int rows = static_cast<int>(least<int64_t>(kTileRows, end - n));
      panel.fill(m, n, rows, column, columns);
      panel.products(in, column, columns, y + n, stride, rows);
    }
  }
  asm volatile("tilerelease");
  Tile<32>::add_outliers(m, in, y, stride, begin, end);
}

static void load_amx(const Input& in, const float* x, int64_t stride, int64_t begin, int64_t end) {
  if (!in.panels) return load(in, x, stride, begin, end);
  const int64_t cols = in.matrix->cols(), stretch = stretch_of(cols);
  alignas(64) float room[kStretch];
  for (int64_t token = begin; token < end; ++token) {
    int outlier = 0;
    for (int64_t column = 0; column < cols; column += stretch) {
      const int columns = static_cast<int>((least(stretch, cols - column) + 63) / 64 * 64);
      const float* staged = stage(in, x + token * stride, token, column, columns, outlier, room);
      (in.digits ? AmxDigits::load : AmxBf16::load)(in, token, column, columns, staged);
    }
  }
}

static void load_columns_amx(const Input& in, const float* x, int64_t token, int64_t column, int64_t count) {
  if (!in.panels) return load_columns(in, x, token, column, count);
  const int64_t end = column + count, whole = end == in.matrix->cols() ? (end + 63) / 64 * 64 : end;
  AmxBf16::load(in, token, column, static_cast<int>(whole - column), x);
}

static void multiply_amx(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                         int64_t end) {
  if (!in.panels) kKernels.multiply(m, in, y, stride, begin, end);
  else if (in.digits) run_amx<AmxDigits>(m, in, y, stride, begin, end);
  else run_amx<AmxBf16>(m, in, y, stride, begin, end);
}

static constexpr Kernels kAmxKernels = {load_amx, load_columns_amx, multiply_amx, dequantize, block_ranges, encode, order, digits, fine, tokens_at_once,
                                        kSumsTokens, kAmxTokens, kTileTokens, V::kByteBits, V::kByteCodebookBits};
