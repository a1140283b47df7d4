// Products with many tokens: a tile of rows is unpacked once, with rows as lanes, and multiplied
// with all tokens, a few at a time in registers.

constexpr int kTileRows = V::kTileVectors * V::kFloats;
constexpr int kTileTokens = 5;  // from so many on, a tile is faster than products of 4 and fewer
constexpr int kSumsTokens = V::kSums ? 16 : 0;  // from so many on, what a tile's sums save is more than they cost

template <int WIDTH>
using Element = std::conditional_t<WIDTH == 8, uint8_t, std::conditional_t<WIDTH == 16, int16_t, float>>;

// Recoded weights of `columns` columns of a row from `column` (a multiple of 64) on, unscaled.
// Columns of the last unit beyond K hold code 0, those of a missing unit anything finite.
// SLIM: of a codebook's Tables::slim.
template <int WIDTH, bool LUT, int BITS, bool SLIM = false>
static void decode_row(const Matrix& m, int64_t row, int64_t column, int columns, Element<WIDTH>* out) {
  using G = Gemv<WIDTH, LUT, BITS, false, 1, 1>;
  const auto recode = [&] {
    if constexpr (SLIM) return typename G::Recode(m.tables, true);
    else return typename G::Recode(m.tables);
  }();
  const int64_t units = (m.tensor.cols + 31) / 32;
  const uint8_t* planes[3];
  planes_of<BITS>(static_cast<const uint8_t*>(m.tensor.codes) + row * units * 4 * BITS, units, planes);
  int plane = 0;
  for (int width = 8; width >= 1; width /= 2) {  // asks for these columns of the next tile's row
    if (!(BITS & width)) continue;
    const uint8_t* const next = planes[plane++] + kTileRows * units * 4 * BITS + column * width / 8;
    for (int i = 0; i < columns * width / 8; i += 64) __builtin_prefetch(next + i, 0, 2);
  }
  const auto put = [&](const typename V::C& c, int at) {
    if constexpr (WIDTH == 8) {
      const auto w = recode(c);
      std::memcpy(out + at, &w, sizeof w);
    } else if constexpr (WIDTH == 16) {
      typename V::H w[G::kWords];
      recode(c, w);
      std::memcpy(out + at, w, sizeof w);
    } else {
      V::F w[G::kParts];
      recode(c, w);
      std::memcpy(out + at, w, sizeof w);
    }
  };
  const int count = (columns + 31) / 32;
  int unit = 0;
  for (; unit + V::kCodes / 32 <= count; unit += V::kCodes / 32) {
    put(V::template unpack<BITS, false>(planes, column / 32 + unit), unit * 32);
  }
  if (unit < count) put(V::template unpack<BITS, true>(planes, column / 32 + unit), unit * 32);
}

// Scales and means on unscaled floats, rounded as the reference rounds.
static void scale_row(const Matrix& m, int64_t row, int64_t column, int columns, float* values) {
  const Tensor& t = m.tensor;
  const int block = t.block ? t.block : 1 << 30;
  const float half = t.storage == kUint ? static_cast<float>(1 << (t.bits - 1)) : 0;
  const int first = static_cast<int>(column / block);
  const int groups = static_cast<int>((column + columns - 1) / block) - first + 1;
  alignas(64) float scales[kMostBlocks + V::kFloats], means[V::kFloats];
  group_scales(m, row, first, groups, scales);
  for (int at = 0, group = first; at < columns; ++group) {
    const int stop = static_cast<int>(least<int64_t>(columns, (group + int64_t{1}) * block - column));
    const int64_t index = row * m.groups + group;
    const V::F scale = V::set1(scales[group - first]);
    if (t.zeros == nullptr && t.means == nullptr) {
      for (; at < stop; at += V::kFloats) V::store(values + at, V::mul(V::load(values + at), scale));
      continue;
    }
    const V::F zero = V::set1(t.zeros ? half - t.zeros[index] : 0);
    V::F mean = V::zero();
    if (t.means) {
      V::store(means, load_any(t.mean_type, t.means, index, 1, t.rows * m.groups));
      mean = V::set1(means[0]);
    }
    for (; at < stop; at += V::kFloats) {  // blocks are whole vectors; the end of a row has room
      V::F v = V::load(values + at);
      if (t.zeros) v = V::add(v, zero);
      v = V::mul(v, scale);
      V::store(values + at, t.means ? V::add(v, mean) : v);
    }
  }
}

static void plain_row(const Matrix& m, int64_t row, int64_t column, int columns, float* out) {
  const Tensor& t = m.tensor;
  const int32_t type = t.storage == kFp32 ? kScaleFp32 : t.storage == kFp16 ? kScaleFp16 : kScaleBf16;
  for (int i = 0; i < columns; i += V::kFloats) {
    V::store(out + i, load_any(type, t.codes, row * t.cols + column + i,
                               least(V::kFloats, columns - i), t.rows * t.cols));
  }
}

template <int WIDTH>
using Decode = void (*)(const Matrix&, int64_t, int64_t, int, Element<WIDTH>*);

template <int WIDTH, bool LUT>
static Decode<WIDTH> decode_of(int bits) {
  if constexpr (WIDTH == 8 && LUT) {
    return bits == 2 ? decode_row<8, true, 2> : bits == 3 ? decode_row<8, true, 3> : decode_row<8, true, 4>;
  } else {
    switch (bits) {
      case 2: return decode_row<WIDTH, LUT, 2>;
      case 3: return decode_row<WIDTH, LUT, 3>;
      case 4: return decode_row<WIDTH, LUT, 4>;
      case 5: return decode_row<WIDTH, LUT, 5>;
      case 6: return decode_row<WIDTH, LUT, 6>;
      case 7: return decode_row<WIDTH, LUT, 7>;
      default: return decode_row<WIDTH, LUT, 8>;
    }
  }
}

template <int WIDTH>
static Decode<WIDTH> decode_of(const Matrix& m, bool summed = false) {
  if constexpr (WIDTH == 8 && V::kSums) {
    if (summed && m.tensor.storage == kCodebook) return m.tensor.bits == 2 ? decode_row<8, true, 2, true> : decode_row<8, true, 3, true>;
  }
  if constexpr (WIDTH == 32) {
    if (m.plain()) return plain_row;
  }
  return m.tensor.storage == kCodebook ? decode_of<WIDTH, true>(m.tensor.bits)
                                       : decode_of<WIDTH, false>(m.tensor.bits);
}

// How a tile's products are made: of blocks, of pieces of blocks (Input::pieces), or of sums of weights and
// inputs (Input::summed). The latter need half the multiplications (S. Winograd, A new algorithm for inner
// products, 1968): w0 x0 + w2 x2 = (x0 + w2)(x2 + w0) - x0 x2 - w0 w2, and what is subtracted belongs to a
// token or a row alone. All of it holds modulo 2^32; the limits of inputs see to it that w + x fits their bits.
enum Way { kOfBlocks, kOfPieces, kOfSums };

template <int WIDTH>
struct Tile {
  using E = Element<WIDTH>;
  using X = std::conditional_t<WIDTH == 8, int8_t, E>;
  static constexpr int kWord = 32 / WIDTH;  // elements of a 32-bit lane
  static constexpr int kV = V::kTileVectors;
  static constexpr int kColumns = V::tile_columns(WIDTH);
  static constexpr int kTogether = V::tokens(WIDTH);

  alignas(64) E weights[kColumns * kTileRows];  // [columns / kWord][kTileRows][kWord]
  alignas(64) float scale[kColumns / 16][kTileRows], offset[kColumns / 16][kTileRows];
  alignas(64) uint32_t minus_cross[WIDTH != 32 && V::kSums ? kColumns / 16 : 1][kTileRows];  // of blocks of weights, see Way
  alignas(64) E staged[kTileRows][kColumns];
  int32_t center;  // common_center, for pieces; else it is in Input::begins

  void transpose(int columns) {
    const auto* in = reinterpret_cast<const uint32_t*>(staged);
    auto* out = reinterpret_cast<uint32_t*>(weights);
    for (int word = 0; word < columns / kWord; word += V::kFloats) {
      for (int r = 0; r < kTileRows; r += V::kFloats) {
        V::transpose(in + r * (kColumns / kWord) + word, kColumns / kWord, out + word * kTileRows + r, kTileRows);
      }
    }
  }

  // Unpacks the tile of rows [first, first + rows) and columns [column, column + columns).
  void fill(const Matrix& m, Decode<WIDTH> decode, const Meaning& meant, int64_t first, int rows,
            int64_t column, int columns) {
    alignas(64) float s[kColumns / 16 + 16], o[kColumns / 16 + 16];
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t row = first + least(r, rows - 1);
      decode(m, row, column, columns, staged[r]);
      if constexpr (WIDTH == 32) {
        if (!m.plain()) scale_row(m, row, column, columns, staged[r]);
      } else {
        const int blocks = (columns + m.step - 1) / m.step;
        row_scales(m, row, static_cast<int>(column / m.step), blocks, meant, s, o);
        for (int b = 0; b < blocks; ++b) {
          scale[b][r] = s[b];
          if (m.tensor.zeros || m.tensor.means) offset[b][r] = o[b];
        }
      }
    }
    transpose((columns + V::kFloats * kWord - 1) / (V::kFloats * kWord) * (V::kFloats * kWord));
  }

  void cross_weights(int columns, const Matrix& m) {
    const int step = m.step;
    const E bias = static_cast<E>(sums_bias(m.tensor));
    for (int b = 0; b * step < columns; ++b) {
      for (int r = 0; r < kTileRows; r += V::kFloats) {
        V::I sum = V::izero();
        for (int k = b * step; k < (b + 1) * step; k += 2 * kWord) {
          V::I w[2];
          std::memcpy(&w[0], weights + k * kTileRows + r * kWord, sizeof w[0]);
          std::memcpy(&w[1], weights + (k + kWord) * kTileRows + r * kWord, sizeof w[1]);
          sum = V::cross_weights(sum, w[0], w[1], bias);
        }
        std::memcpy(minus_cross[b] + r, &sum, sizeof sum);
      }
      for (uint32_t& sum : minus_cross[b]) sum = -sum;
    }
  }

  // Outlier columns [column, column + columns) as a tile of floats.
  void fill_outliers(const Matrix& m, int64_t first, int rows, int column, int columns) {
    const Tensor& t = m.tensor;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = (first + least(r, rows - 1)) * t.n_outliers + column;
      for (int j = 0; j < columns; j += V::kFloats) {
        const V::F w = V::load_as<kScaleFp16>(t.outliers, at + j, least(V::kFloats, columns - j),
                                              t.rows * t.n_outliers);
        std::memcpy(staged[r] + j, &w, sizeof w);
      }
    }
    transpose((columns + V::kFloats - 1) / V::kFloats * V::kFloats);
  }

  // What follows takes weights from the tile at a column on, and x as it lies from that column on, see Input::together.

  // sums[t][v] = f(sums[t][v], rows of vector v, token t's values) at the word of column k.
  template <int T, class F>
  static inline __attribute__((always_inline)) void at_word(const E* weights, const X* x, int k, V::I (&sums)[T][kV],
                                                            F f) {
    V::I lanes[kV];
    KBIT_UNROLL
    for (int v = 0; v < kV; ++v) {
      std::memcpy(&lanes[v], weights + k * kTileRows + v * V::kFloats * kWord, sizeof lanes[v]);
    }
    KBIT_UNROLL
    for (int t = 0; t < T; ++t) {
      const V::I word = V::broadcast(x + t * kStep + k);
      KBIT_UNROLL
      for (int v = 0; v < kV; ++v) sums[t][v] = f(sums[t][v], lanes[v], word);
    }
  }

  // dot += `columns` columns times T tokens. pairs: of so many words, pairs of products are summed in 16 bits
  // before they are in 32.
  template <int T>
  static inline __attribute__((always_inline)) void dots(const E* weights, const X* x, int columns, int pairs,
                                                         V::I (&dot)[T][kV]) {
    if constexpr (WIDTH == 16) {
      for (int k = 0; k < columns; k += kWord) at_word<T>(weights, x, k, dot, V::tile16);
    } else if (V::kPairSums && pairs > 1) {
      for (int k = 0; k < columns; k += pairs * kWord) {
        V::I sums[T][kV];
        at_word<T>(weights, x, k, sums, [](V::I, V::I w, V::I word) { return V::pair8(w, word); });
        for (int i = 1; i < pairs; ++i) at_word<T>(weights, x, k + i * kWord, sums, V::add_pair8);
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) dot[t][v] = V::iadd(dot[t][v], V::widen_pairs(sums[t][v]));
        }
      }
    } else {
      for (int k = 0; k < columns; k += kWord) at_word<T>(weights, x, k, dot, V::tile8);
    }
  }

  // dot += `columns` columns times T tokens, as products of sums.
  template <int T>
  static inline __attribute__((always_inline)) void dots_of_sums(const E* weights, const X* x, int columns,
                                                                 V::I (&dot)[T][kV]) {
    for (int k = 0; k < columns; k += 2 * kWord) {
      V::I first[kV], second[kV];
      KBIT_UNROLL
      for (int v = 0; v < kV; ++v) {
        std::memcpy(&first[v], weights + k * kTileRows + v * V::kFloats * kWord, sizeof first[v]);
        std::memcpy(&second[v], weights + (k + kWord) * kTileRows + v * V::kFloats * kWord, sizeof second[v]);
      }
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) V::tile_sums(dot[t], first, second, x + t * kStep + k);
    }
  }

  // dot = the columns of piece p of a block, times T tokens.
  template <int T>
  static inline __attribute__((always_inline)) void piece(const E* weights, const X* x, int p, V::I (&dot)[T][kV]) {
    const int k = p * kWord;
    if constexpr (V::kPairSums) {  // 16 bits hold them all
      at_word<T>(weights, x, k, dot, [](V::I, V::I w, V::I word) { return V::pair8(w, word); });
      for (int i = 16; i < kStep; i += 16) at_word<T>(weights, x, k + i, dot, V::add_pair8);
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) {
        KBIT_UNROLL
        for (int v = 0; v < kV; ++v) dot[t][v] = V::widen_pairs(dot[t][v]);
      }
    } else {
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) {
        KBIT_UNROLL
        for (int v = 0; v < kV; ++v) dot[t][v] = V::izero();
      }
      KBIT_UNROLL
      for (int i = 0; i < kStep; i += 16) at_word<T>(weights, x, k + i, dot, V::tile8);
    }
  }

  // y += the tile times tokens [token, token + T), which lie together, x from its tile's first column on, in block `block`.
  // OFFSETS: what is added to a weight differs from block to block; else it is in what the sums begin with.
  template <int T, bool OFFSETS, Way WAY>
  void product(const Input& in, const X* x, int64_t token, int64_t block, int columns, float* y, int64_t stride,
               int rows, bool fresh) const {
    V::F acc[T][kV];
    KBIT_UNROLL
    for (int t = 0; t < T; ++t) {
      KBIT_UNROLL
      for (int v = 0; v < kV; ++v) {
        const int count = least(V::kFloats, rows - v * V::kFloats);
        const float* from = y + (token + t) * stride + v * V::kFloats;
        acc[t][v] = fresh || count <= 0     ? V::zero()
                    : count == V::kFloats ? V::load(from)
                                          : V::load_part(from, count);
      }
    }
    constexpr int64_t kChunk = kTogether * kStep;  // of 64 columns
    x += token % kTogether * kStep;
    if constexpr (WAY == kOfPieces) {
      int64_t first = in.blocks_of(token) + block * kTogether;
      for (int b = 0; b * kStep < columns; ++b, x += kChunk, first += kTogether) {
        V::F sums[T][kV];
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          const float begin = static_cast<float>(center) * in.sums[first + t];
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) sums[t][v] = V::set1(begin);
        }
        for (int p = 0; p < kPieces; ++p) {
          V::I dot[T][kV];
          piece<T>(weights + b * kStep * kTileRows, x, p, dot);
          KBIT_UNROLL
          for (int t = 0; t < T; ++t) {
            const V::F s = V::set1(in.lanes[(first + t) * kPieces + p]);
            KBIT_UNROLL
            for (int v = 0; v < kV; ++v) sums[t][v] = V::fma(V::to_float(dot[t][v]), s, sums[t][v]);
          }
        }
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          const V::F sum = OFFSETS ? V::set1(in.sums[first + t]) : V::zero();
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) {
            acc[t][v] = V::fma(sums[t][v], V::load(scale[b] + v * V::kFloats), acc[t][v]);
            if constexpr (OFFSETS) acc[t][v] = V::fma(V::load(offset[b] + v * V::kFloats), sum, acc[t][v]);
          }
        }
      }
    } else if constexpr (WIDTH == 32) {
      const E* w = weights;
      for (int first = 0; first < columns; first += kStep, x += kChunk) {
        const int count = least(kStep, columns - first);
        for (int k = 0; k < count; ++k, w += kTileRows) {
          V::F lanes[kV];
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) lanes[v] = V::load(w + v * V::kFloats);
          KBIT_UNROLL
          for (int t = 0; t < T; ++t) {
            const V::F value = V::set1(x[t * kStep + k]);
            KBIT_UNROLL
            for (int v = 0; v < kV; ++v) acc[t][v] = V::fma(lanes[v], value, acc[t][v]);
          }
        }
      }
    } else {
      const int step = in.matrix->step;
      int64_t first = in.blocks_of(token) + block * kTogether;
      const E* w = weights;
      const Tensor& tensor = in.matrix->tensor;
      const int pairs = least(V::pair_words(tensor.bits, tensor.storage == kCodebook), step / kWord);
      for (int b = 0; b * step < columns; ++b, first += kTogether, w += step * kTileRows) {
        const X* const at = x + b * step / kStep * kChunk + b * step % kStep;
        V::I dot[T][kV];
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          const V::I begin = V::broadcast(in.begins + first + t);
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) {
            V::I rest = V::izero();
            if constexpr (WAY == kOfSums) std::memcpy(&rest, minus_cross[b] + v * V::kFloats, sizeof rest);
            dot[t][v] = V::iadd(begin, rest);
          }
        }
        if constexpr (WAY == kOfSums) dots_of_sums<T>(w, at, step, dot);
        else dots<T>(w, at, step, pairs, dot);
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          const V::F s = V::set1(in.scales[first + t]);
          const V::F sum = OFFSETS ? V::set1(in.sums[first + t]) : V::zero();
          KBIT_UNROLL
          for (int v = 0; v < kV; ++v) {
            const V::F both = V::mul(V::load(scale[b] + v * V::kFloats), s);
            acc[t][v] = V::fma(V::to_float(dot[t][v]), both, acc[t][v]);
            if constexpr (OFFSETS) acc[t][v] = V::fma(V::load(offset[b] + v * V::kFloats), sum, acc[t][v]);
          }
        }
      }
    }
    KBIT_UNROLL
    for (int t = 0; t < T; ++t) {
      KBIT_UNROLL
      for (int v = 0; v < kV; ++v) {
        const int count = least(V::kFloats, rows - v * V::kFloats);
        float* to = y + (token + t) * stride + v * V::kFloats;
        if (count == V::kFloats) V::store(to, acc[t][v]);
        else if (count > 0) V::store_part(to, acc[t][v], count);
      }
    }
  }

  template <int T, bool OFFSETS, Way WAY = kOfBlocks>
  void products(const Input& in, const X* x, int64_t padded, int64_t block, int columns, float* y, int64_t stride,
                int rows, bool fresh, int64_t token) const {
    for (; token + T <= in.tokens; token += T) {
      product<T, OFFSETS, WAY>(in, x + token / kTogether * kTogether * padded, token, block, columns, y, stride, rows, fresh);
    }
    if constexpr (T > 1) {
      products<T == 6 ? 4 : T / 2, OFFSETS, WAY>(in, x, padded, block, columns, y, stride, rows, fresh, token);
    }
  }

  template <Way WAY>
  static auto products_of(bool offsets) {
    return offsets ? &Tile::template products<kTogether, true, WAY> : &Tile::template products<kTogether, false, WAY>;
  }

  static void run(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                  int64_t end) {
    Tile tile;
    const Decode<WIDTH> decode = decode_of<WIDTH>(m, in.summed);
    const Meaning meant = meaning(WIDTH, m, in.summed);
    if constexpr (WIDTH == 8) tile.center = common_center(WIDTH, m);
    const bool offsets = WIDTH != 32 && (m.tensor.zeros || m.tensor.means);
    auto products = products_of<kOfBlocks>(offsets);
    if constexpr (WIDTH == 8 && V::fine(5)) {
      if (in.pieces) products = products_of<kOfPieces>(offsets);
    }
    if constexpr (WIDTH != 32 && V::kSums) {
      if (in.summed) products = products_of<kOfSums>(offsets);
    }
    const int64_t cols = m.tensor.cols;
    const int64_t stretches = (cols + kColumns - 1) / kColumns;  // of about the same size
    const int64_t most = ((cols + stretches - 1) / stretches + kStep - 1) / kStep * kStep;
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int rows = static_cast<int>(least<int64_t>(kTileRows, end - n));
      for (int64_t column = 0; column < cols; column += most) {
        const int columns = static_cast<int>(least<int64_t>(most, cols - column));
        tile.fill(m, decode, meant, n, rows, column, columns);
        if constexpr (WIDTH != 32 && V::kSums) {
          if (in.summed) tile.cross_weights(columns, m);
        }
        (tile.*products)(in, static_cast<const X*>(in.values) + column * kTogether, in.padded, column / m.step, columns,
                         y + n, stride, rows, column == 0, 0);
      }
      if constexpr (WIDTH == 32) add_outliers(tile, m, in, y + n, stride, n, rows);
    }
    if constexpr (WIDTH != 32) add_outliers(m, in, y, stride, begin, end);
  }

  static void add_outliers(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                           int64_t end) {
    if (m.tensor.n_outliers == 0) return;
    Tile<32> floats;
    for (int64_t n = begin; n < end; n += kTileRows) {
      const int rows = static_cast<int>(least<int64_t>(kTileRows, end - n));
      add_outliers(floats, m, in, y + n, stride, n, rows);
    }
  }

  static void add_outliers(Tile<32>& tile, const Matrix& m, const Input& in, float* y,
                           int64_t stride, int64_t first, int rows) {
    for (int j = 0; j < m.tensor.n_outliers; j += Tile<32>::kColumns) {
      const int columns = least(Tile<32>::kColumns, m.tensor.n_outliers - j);
      tile.fill_outliers(m, first, rows, j, columns);
      tile.template products<Tile<32>::kTogether, false>(in, in.outliers + j * Tile<32>::kTogether, in.outlier_room, 0, columns,
                                                      y, stride, rows, false, 0);
    }
  }
};

static void multiply(const Matrix& m, const Input& in, float* y, int64_t stride, int64_t begin,
                     int64_t end) {
  if (in.tokens >= kTileTokens) {
    if (in.width == 32) return Tile<32>::run(m, in, y, stride, begin, end);
    if (in.width == 16) return Tile<16>::run(m, in, y, stride, begin, end);
    if constexpr (V::kByteBits > 0) return Tile<8>::run(m, in, y, stride, begin, end);
  }
  for (int64_t token = 0; token < in.tokens;) {
    const int tokens = static_cast<int>(least<int64_t>(V::kCompact ? 1 : 4, in.tokens - token));
    gemv_of(m, in, tokens)(m, in, token, tokens, y, stride, begin, end);
    token += tokens;
  }
}

static void dequantize(const Matrix& m, float* out, int64_t stride, int64_t begin, int64_t end) {
  constexpr int kColumns = 256;
  const Tensor& t = m.tensor;
  const Decode<32> decode = decode_of<32>(m);
  alignas(64) float values[kColumns + 64];
  for (int64_t row = begin; row < end; ++row, out += stride) {
    for (int64_t column = 0; column < t.cols; column += kColumns) {
      const int columns = static_cast<int>(least<int64_t>(kColumns, t.cols - column));
      decode(m, row, column, columns, values);
      if (!m.plain()) scale_row(m, row, column, columns, values);
      std::memcpy(out + column, values, sizeof(float) * static_cast<size_t>(columns));
    }
    for (int j = 0; j < t.n_outliers; ++j) {
      V::store_part(out + t.outlier_columns[j],
                    V::load_as<kScaleFp16>(t.outliers, row * t.n_outliers + j, 1, t.rows * t.n_outliers), 1);
    }
  }
}
