// Products with many tokens by AMX: tiles of 16 tokens by 64 columns times 64 columns by 16 rows.
// The weights are those of Tile<8> as signed bytes; inputs of 16 bits are two planes of bytes and
// two products. Instructions are written out, because gcc 12 takes stores that only they read for
// dead ones. Included in the namespace of AVX-512, which does all the rest.

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

constexpr int kAmxTokens = 16;

template <bool DIGITS>
struct Amx {
  alignas(64) int32_t sums[2][16][16];
  Tile<8> tile;

  // Registers: 0 weights, 1 and 2 inputs (DIGITS: upper and lower), 3 and 4 their sums.
  void block(const int8_t* x, int64_t x_stride, int64_t digit, const uint8_t* weights) {
    asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(weights), "r"(int64_t{kTileRows * 4}) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm1\n\ttilezero %%tmm3\n\ttdpbssd %%tmm0, %%tmm1, %%tmm3\n\t"
                 "tilestored %%tmm3, (%2,%3,1)"
                 ::"r"(x), "r"(x_stride), "r"(&sums[0][0][0]), "r"(int64_t{64}) : "memory");
    if (!DIGITS) return;
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
        V::I dot = _mm512_load_si512(sums[0][t]);
        if (DIGITS) dot = V::iadd(V::times256(dot), _mm512_load_si512(sums[1][t]));
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

static void multiply_amx(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                         int64_t end) {
  const bool bytes = in.width == 8 || in.digits;
  if (in.tokens < kAmxTokens || m.step != kStep || !bytes) {
    return kKernels.multiply(m, in, y, stride, begin, end);
  }
  if (in.digits) return Amx<true>().run(m, in, y, stride, begin, end);
  Amx<false>().run(m, in, y, stride, begin, end);
}

static constexpr Kernels kAmxKernels = {load, multiply_amx, dequantize, block_ranges, encode, order, digits,
                                        kAmxTokens, kTileTokens, V::kByteBits, V::kByteCodebooks};
