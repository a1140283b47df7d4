// Products with many tokens by AMX. Instructions are written out, because gcc 12 takes stores that
// only they read for dead ones. Included in the namespace of AVX-512, which does all the rest.

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kAmxTokens = 16;

// int16: integer products of 16 tokens by 64 columns with 64 columns by 16 rows, one block at a time,
// whose sums are then scaled. The weights are those of Tile<8> as signed bytes, the inputs two planes
// of bytes.
struct AmxDigits {
  alignas(64) int32_t sums[2][16][16];
  Tile<8> tile;

  // Registers: 0 weights, 1 and 2 inputs (upper and lower bytes), 3 and 4 their sums.
  void block(const int8_t* x, int64_t x_stride, int64_t digit, const uint8_t* weights) {
    asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(weights), "r"(int64_t{kTileRows * 4}) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm1\n\ttilezero %%tmm3\n\ttdpbssd %%tmm0, %%tmm1, %%tmm3\n\t"
                 "tilestored %%tmm3, (%2,%3,1)"
                 ::"r"(x), "r"(x_stride), "r"(&sums[0][0][0]), "r"(int64_t{64}) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm2\n\ttilezero %%tmm4\n\ttdpbssd %%tmm0, %%tmm2, %%tmm4\n\t"
                 "tilestored %%tmm4, (%2,%3,1)"
                 ::"r"(x + digit), "r"(x_stride), "r"(&sums[1][0][0]), "r"(int64_t{64}) : "memory");
  }

  // y (+)= 16 rows of the tile from 16 * v on times tokens [token, token + 16), as many as there are.
  void product(const Matrix& m, const Input& in, const Meaning& meant, int64_t token, int v,
               int64_t column, int columns, int rows, float* y, int64_t stride) {
    const int here = static_cast<int>(least<int64_t>(16, in.tokens - token));
    const int64_t digit = in.tokens * in.padded, first = token * in.blocks + column / m.step;
    const int8_t* x = static_cast<const int8_t*>(in.values) + token * in.padded + column;
    V::F acc[16];
    KBIT_UNROLL
    for (int t = 0; t < 16; ++t) {
      acc[t] = column && t < here ? V::load_part(y + t * stride, rows) : V::zero();
    }
    for (int b = 0; b * kStep < columns; ++b) {
      block(x + b * kStep, in.padded, digit, tile.weights + b * kStep * kTileRows + v * 64);
      const V::F scale = V::load(tile.scale[b] + v * 16);
      const float* input_scales = in.scales + first + b;
      KBIT_UNROLL
      for (int t = 0; t < 16; ++t) {  // scales beyond `here` are those of the last token
        const V::I dot = V::iadd(V::times256(_mm512_load_si512(sums[0][t])), _mm512_load_si512(sums[1][t]));
        const V::F both = V::mul(scale, V::set1(input_scales[(t < here ? t : here - 1) * in.blocks]));
        acc[t] = V::fma(V::to_float(dot), both, acc[t]);
      }
      if (!meant.offset) continue;
      const V::F offset = V::load(tile.offset[b] + v * 16);
      const float* input_sums = in.sums + first + b;
      KBIT_UNROLL
      for (int t = 0; t < 16; ++t) {
        acc[t] = V::fma(offset, V::set1(input_sums[(t < here ? t : here - 1) * in.blocks]), acc[t]);
      }
    }
    KBIT_UNROLL
    for (int t = 0; t < 16; ++t) {
      if (t < here) V::store_part(y + t * stride, acc[t], rows);
    }
  }

  void run(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin, int64_t end) {
    const int shift = m.tensor.storage == kCodebook ? V::kBias8 : 1 << (m.tensor.bits - 1);
    Meaning meant = meaning(8, m);
    meant.center += static_cast<float>(shift);
    meant.offset = meant.center != 0 || m.tensor.zeros != nullptr || m.tensor.means != nullptr;
    const Decode<8> decode = decode_of<8>(m);
    const V::C down = _mm512_set1_epi8(static_cast<char>(shift));
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int rows = static_cast<int>(least<int64_t>(kTileRows, end - n));
      for (int64_t column = 0; column < m.tensor.cols; column += Tile<8>::kColumns) {
        const int columns = static_cast<int>(least<int64_t>(Tile<8>::kColumns, m.tensor.cols - column));
        tile.fill(m, decode, meant, n, rows, column, columns);
        uint8_t* w = tile.weights;
        for (int i = 0; i < (columns + 63) / 64 * 64 * kTileRows; i += 64) {
          _mm512_store_si512(w + i, _mm512_sub_epi8(_mm512_load_si512(w + i), down));
        }
        for (int64_t token = 0; token < in.tokens; token += 16) {
          for (int v = 0; 16 * v < rows; ++v) {
            product(m, in, meant, token, v, column, columns, least(16, rows - 16 * v),
                    y + token * stride + n + 16 * v, stride);
          }
        }
      }
    }
    asm volatile("tilerelease");
    Tile<8>::add_outliers(m, in, y, stride, begin, end);
  }
};

// int8: products of bf16, which round less than 8 bits a block do, and whose sums need no scaling on
// the way: the weights have their scales already. A panel of 32 rows is dequantized a stretch of
// columns at a time and multiplied with 32 tokens at a time.
struct AmxPanel {
  static constexpr int kColumns = 1024;
  alignas(64) uint32_t weights[kColumns / 2][kTileRows];  // two columns each
  alignas(64) uint16_t staged[kTileRows][kColumns];
  alignas(64) float spare[32][kTileRows];  // sums that do not fill whole tiles of y

  static __m512i rounded(const float* p) {
    __m512i both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(V::load(p + 16)), "v"(V::load(p)));
    return both;
  }

  void fill(const Matrix& m, Decode<32> decode, int64_t first, int rows, int64_t column, int columns) {
    alignas(64) float values[kColumns + 64];
    const int whole = (columns + 31) / 32 * 32;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = first + least(r, rows - 1);
      decode(m, row, column, columns, values);
      scale_row(m, row, column, columns, values);
      for (int i = columns; i < whole; ++i) values[i] = 0;
      for (int i = 0; i < whole; i += 32) _mm512_store_si512(staged[r] + i, rounded(values + i));
    }
    const auto* in = reinterpret_cast<const uint32_t*>(staged);
    for (int pair = 0; pair < whole / 2; pair += 16) {
      for (int r = 0; r < kTileRows; r += 16) {
        V::transpose(in + r * (kColumns / 2) + pair, kColumns / 2, weights[pair] + r, kTileRows);
      }
    }
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

  void run(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin, int64_t end) {
    const Decode<32> decode = decode_of<32>(m);
    const int64_t cols = m.tensor.cols, stretches = (cols + kColumns - 1) / kColumns;
    const int64_t stretch = (cols + stretches * 64 - 1) / (stretches * 64) * 64;  // all about as long
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int rows = static_cast<int>(least<int64_t>(kTileRows, end - n));
      for (int64_t column = 0; column < cols; column += stretch) {
        const int columns = static_cast<int>(least(stretch, cols - column));
        fill(m, decode, n, rows, column, columns);
        int64_t token = 0;
        for (; token + 16 < in.tokens; token += 32) {
          product<2>(in, token, column, columns, y + token * stride + n, stride, rows);
        }
        if (token < in.tokens) product<1>(in, token, column, columns, y + token * stride + n, stride, rows);
      }
    }
    asm volatile("tilerelease");
    Tile<32>::add_outliers(m, in, y, stride, begin, end);
  }
};

static void load_amx(const Input& in, const float* x, int64_t stride, int64_t begin, int64_t end) {
  if (!in.bf16) return load(in, x, stride, begin, end);
  const Tensor& t = in.matrix->tensor;
  alignas(64) float staged[kStep];
  for (int64_t token = begin; token < end; ++token) {
    int outlier = 0;
    for (int64_t column = 0; column < in.padded; column += kStep) {
      const float* from = x + token * stride + column;
      const int64_t count = column < t.cols ? least<int64_t>(kStep, t.cols - column) : 0;
      const auto outlies = [&] { return outlier < t.n_outliers && t.outlier_columns[outlier] < column + count; };
      if (count < kStep || outlies()) {
        std::memcpy(staged, from, sizeof(float) * static_cast<size_t>(count));
        std::memset(staged + count, 0, sizeof(float) * static_cast<size_t>(kStep - count));
        from = staged;
      }
      for (; outlies(); ++outlier) {
        float& value = staged[t.outlier_columns[outlier] - column];
        in.outliers[token * t.n_outliers + outlier] = value;
        value = 0;
      }
      uint16_t* out = static_cast<uint16_t*>(in.values) + token * in.padded + column;
      _mm512_storeu_si512(out, AmxPanel::rounded(from));
      _mm512_storeu_si512(out + 32, AmxPanel::rounded(from + 32));
    }
  }
}

static void multiply_amx(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                         int64_t end) {
  if (in.bf16) AmxPanel().run(m, in, y, stride, begin, end);
  else if (in.tokens >= kAmxTokens && in.digits) AmxDigits().run(m, in, y, stride, begin, end);
  else kKernels.multiply(m, in, y, stride, begin, end);
}

static constexpr Kernels kAmxKernels = {load_amx, multiply_amx, dequantize, block_ranges, encode, order, digits,
                                        kAmxTokens, kTileTokens, V::kByteBits, V::kByteCodebooks};
