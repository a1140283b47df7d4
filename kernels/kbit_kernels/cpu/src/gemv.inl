// Products with few tokens: R rows by T tokens at a time, each code unpacked once and used T times.

// The share of the columns that are kept at 16 bits.
static inline float outlier_sum(const Matrix& m, const Input& in, int64_t token, int64_t row) {
  const Tensor& t = m.tensor;
  V::F acc = V::zero();
  for (int j = 0; j < t.n_outliers; j += V::kFloats) {
    const int n = least(V::kFloats, t.n_outliers - j);
    const V::F w = V::load_as<kScaleFp16>(t.outliers, row * t.n_outliers + j, n, t.rows * t.n_outliers);
    acc = V::fma(w, V::load_part(in.outliers + in.outliers_of(token) + j, n), acc);
  }
  return V::sum(acc);
}

constexpr int kSegment = 2048;  // columns whose scales are worked out at a time
constexpr int kBlocks = kSegment / 16 + 2 * V::kFloats;

// For R rows from n on (the last one again beyond `end`): scales of `count` blocks from `first` on,
// times those of the inputs if these are integers, and the offsets' share of the products.
template <bool INTEGERS, int R, int T>
static __attribute__((noinline)) void scale_rows(const Matrix& m, const Input& in, const int64_t* tokens,
                                                 int64_t n, int64_t end, int first, int count,
                                                 const Meaning& meant, float* scales, V::F* extra) {
  const Tensor& tensor = m.tensor;
  const bool direct = m.step == tensor.block && tensor.scale_type != kScaleDouble;
  const V::F factor = V::set1(meant.factor);
  const int64_t total = tensor.rows * m.groups;
  alignas(64) float scale[kBlocks], offset[kBlocks];
  for (int r = 0; r < R; ++r) {
    const int64_t row = least(n + r, end - 1), base = row * m.groups + first;
    if (!direct) row_scales(m, row, first, count, meant, scale, offset);
    float* out = scales + r * (INTEGERS ? T : 1) * kBlocks;
    int b = 0;
    for (; b < count; b += V::kFloats) {
      const int here = least(V::kFloats, count - b);
      V::F s, o;
      if (direct) {  // zero beyond `count`
        s = V::mul(load_any(tensor.scale_type, tensor.scales, base + b, here, total), factor);
        if (meant.offset) o = offsets_of(m, base + b, here, total, meant, s);
      } else {
        s = V::load_part(scale + b, here);
        if (meant.offset) o = V::load_part(offset + b, here);
      }
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) {
        const int64_t block = tokens[t] * in.blocks + first + b;
        if (meant.offset) extra[r * T + t] = V::fma(o, V::load(in.sums + block), extra[r * T + t]);
        if (INTEGERS) V::store(out + t * kBlocks + b, V::mul(s, V::load(in.scales + block)));
        else if (t == 0) V::store(out + b, s);
      }
    }
    // blocks beyond the row's last, which kernels may read and multiply with zeros
    for (int t = 0; t < (INTEGERS ? T : 1); ++t) V::store(out + t * kBlocks + b, V::zero());
  }
}

// Sums of the lanes, with all that is added to them, to y.
template <int R, int T>
static __attribute__((noinline)) void finish_rows(const Matrix& m, const Input& in, const int64_t* tokens,
                                                  int count, const V::F* acc, float* y,
                                                  int64_t stride, int64_t n, int64_t end) {
  for (int t = 0; t < count; ++t) {
    for (int r = 0; r < R && n + r < end; ++r) {
      float value = V::sum(acc[r * T + t]);
      if (m.tensor.n_outliers) value += outlier_sum(m, in, tokens[t], n + r);
      y[tokens[t] * stride + n + r] = value;
    }
  }
}

// Asks for `bytes` from `at` on, as far as they lie before `end`.
static inline __attribute__((always_inline)) void prefetch(const void* at, int64_t bytes, const void* end) {
  const char* p = static_cast<const char*>(at);
  const char* const last = least(p + bytes, static_cast<const char*>(end));
  for (; p < last; p += 64) __builtin_prefetch(p);
}

static inline __attribute__((always_inline)) void prefetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// The scales of a tensor as bytes.
struct ScaleBytes {
  int64_t row;
  const char *begin, *end;
  explicit ScaleBytes(const Matrix& m) {
    const Tensor& t = m.tensor;
    row = m.groups * (t.scale_type == kScaleFp32 ? 4 : t.scale_type == kScaleDouble ? 1 : 2);
    begin = static_cast<const char*>(t.scales), end = begin + t.rows * row;
  }
};

// WIDTH: bits of an input value: 8, 16, or 32 for floats. FINE: blocks below 64 columns.
template <int WIDTH, bool LUT, int BITS, bool FINE, int R, int T>
struct Gemv {
  using X = std::conditional_t<WIDTH == 8, int8_t, std::conditional_t<WIDTH == 16, int16_t, float>>;
  using Recode = std::conditional_t<
      WIDTH == 8, typename V::template Narrow<BITS, LUT && WIDTH == 8 && BITS <= 4>,
      std::conditional_t<WIDTH == 16, typename V::template Wide<BITS, LUT>,
                         typename V::template Floats<BITS, LUT>>>;
  static constexpr int kVectors = kStep / V::kCodes;             // of codes in a step
  static constexpr int kWords = V::kCodes / (2 * V::kFloats);    // H in a C
  static constexpr int kParts = V::kCodes / V::kFloats;          // F in a C
  static constexpr int kScales = WIDTH == 32 ? 1 : T;            // scale arrays of a row

  // One step of 64 columns; TAIL: only the first 32 of them exist.
  template <bool TAIL>
  static inline __attribute__((always_inline)) void step(
      const Recode& recode, const uint8_t* const (&planes)[R][3], int64_t unit, const X* const (&x)[T],
      int64_t column, const float (&scales)[R][kScales][kBlocks], int at, int shift,
      const V::Spread& spread, V::F (&acc)[R][T]) {
    constexpr int kCount = TAIL && kVectors > 1 ? kVectors / 2 : kVectors;
    KBIT_UNROLL
    for (int r = 0; r < R; ++r) {
      V::I dot[T];
      V::F part[T][2];
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) dot[t] = V::izero(), part[t][0] = part[t][1] = V::zero();
      KBIT_UNROLL
      for (int v = 0; v < kCount; ++v) {
        const int first = v * V::kCodes;
        const auto c = V::template unpack<BITS, TAIL && kVectors == 1>(planes[r], unit + first / 32);
        if constexpr (WIDTH == 8) {
          const auto w = recode(c);
          KBIT_UNROLL
          for (int t = 0; t < T; ++t) {
            const V::I d = V::template dot8<BITS, LUT>(FINE ? V::izero() : dot[t], w, x[t] + column + first);
            if constexpr (FINE) {
              const float* s = scales[r][t] + ((at + first) >> shift);
              acc[r][t] = V::fma(V::to_float(d), V::spread(s, spread), acc[r][t]);
            } else {
              dot[t] = d;
            }
          }
        } else if constexpr (WIDTH == 16) {
          typename V::H w[kWords];
          recode(c, w);
          KBIT_UNROLL
          for (int h = 0; h < kWords; ++h) {
            const int from = first + h * 2 * V::kFloats;
            KBIT_UNROLL
            for (int t = 0; t < T; ++t) {
              const V::I d = V::dot16(FINE ? V::izero() : dot[t], w[h], x[t] + column + from);
              if constexpr (FINE) {
                const float* s = scales[r][t] + ((at + from) >> shift);
                acc[r][t] = V::fma(V::to_float(d), V::spread(s, spread), acc[r][t]);
              } else {
                dot[t] = d;
              }
            }
          }
        } else {
          V::F w[kParts];
          recode(c, w);
          KBIT_UNROLL
          for (int p = 0; p < kParts; ++p) {
            const int from = first + p * V::kFloats;
            KBIT_UNROLL
            for (int t = 0; t < T; ++t) {
              const V::F v32 = V::load(x[t] + column + from);
              if constexpr (FINE) {
                const V::F s = V::set1(scales[r][0][(at + from) >> shift]);
                acc[r][t] = V::fma(V::mul(w[p], v32), s, acc[r][t]);
              } else {
                part[t][p % 2] = V::fma(w[p], v32, part[t][p % 2]);
              }
            }
          }
        }
      }
      if constexpr (!FINE) {
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) {
          const V::F s = V::set1(scales[r][WIDTH == 32 ? 0 : t][at >> 6]);
          const V::F value = WIDTH == 32 ? V::add(part[t][0], part[t][1]) : V::to_float(dot[t]);
          acc[r][t] = V::fma(value, s, acc[r][t]);
        }
      }
    }
  }

  static void run(const Matrix& m, const Input& in, int64_t token, int tokens, float* y,
                  int64_t stride, int64_t begin, int64_t end) {
    const Tensor& tensor = m.tensor;
    const int64_t units = (tensor.cols + 31) / 32, row_bytes = units * 4 * BITS;
    const int shift = FINE ? log2_of(m.step) : 6;
    const V::Spread spread = V::spread(FINE ? m.step : kStep, WIDTH == 16 ? 2 : V::kCodes / V::kFloats);
    const Meaning meant = meaning(WIDTH, m);
    const Recode recode(m.tables);
    const ScaleBytes scale_bytes(m);
    const uint8_t* const codes = static_cast<const uint8_t*>(tensor.codes);
    const uint8_t* const codes_end = codes + tensor.rows * row_bytes;
    const X* x[T];
    int64_t of[T];
    for (int t = 0; t < T; ++t) {
      of[t] = token + least(t, tokens - 1);
      x[t] = static_cast<const X*>(in.values) + of[t] * in.padded;
    }
    for (int64_t n = begin; n < end; n += R) {
      const uint8_t* planes[R][3];
      alignas(64) V::F extra[R][T];
      prefetch(codes + n * row_bytes + kCodesAhead, R * row_bytes, codes_end);
      prefetch(scale_bytes.begin + n * scale_bytes.row + kScalesAhead, R * scale_bytes.row, scale_bytes.end);
      V::F acc[R][T];
      KBIT_UNROLL
      for (int r = 0; r < R; ++r) {
        const int64_t row = least(n + r, end - 1);
        planes_of<BITS>(codes + row * row_bytes, units, planes[r]);
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) acc[r][t] = extra[r][t] = V::zero();
      }
      for (int64_t column = 0; column < tensor.cols; column += kSegment) {
        const int columns = static_cast<int>(least<int64_t>(kSegment, tensor.cols - column));
        const int first = static_cast<int>(column >> shift), count = ((columns - 1) >> shift) + 1;
        alignas(64) float scales[R][kScales][kBlocks];
        scale_rows<WIDTH != 32, R, T>(m, in, of, n, end, first, count, meant, scales[0][0], extra[0]);
        const int there = (columns + 31) / 32 * 32;
        const int64_t unit = column / 32;
        int at = 0;
        for (; at + 32 < there; at += kStep) {
          step<false>(recode, planes, unit + at / 32, x, column + at, scales, at, shift, spread, acc);
        }
        if (at < there) {
          step<true>(recode, planes, unit + at / 32, x, column + at, scales, at, shift, spread, acc);
        }
      }
      KBIT_UNROLL
      for (int r = 0; r < R; ++r) {
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) extra[r][t] = V::add(extra[r][t], acc[r][t]);
      }
      finish_rows<R, T>(m, in, of, tokens, extra[0], y, stride, n, end);
    }
  }
};

// The same for plain matrices.
template <int TYPE, int R, int T>
static void plain_gemv(const Matrix& m, const Input& in, int64_t token, int tokens, float* y,
                       int64_t stride, int64_t begin, int64_t end) {
  const int64_t cols = m.tensor.cols, total = m.tensor.rows * cols;
  const float* x[T];
  KBIT_UNROLL
  for (int t = 0; t < T; ++t) {
    x[t] = static_cast<const float*>(in.values) + (token + least(t, tokens - 1)) * in.padded;
  }
  for (int64_t n = begin; n < end; n += R) {
    int64_t row[R];
    V::F acc[R][T];
    KBIT_UNROLL
    for (int r = 0; r < R; ++r) {
      row[r] = least(n + r, end - 1) * cols;
      KBIT_UNROLL
      for (int t = 0; t < T; ++t) acc[r][t] = V::zero();
    }
    for (int64_t k = 0; k < cols; k += V::kFloats) {
      const int count = static_cast<int>(least<int64_t>(V::kFloats, cols - k));
      KBIT_UNROLL
      for (int r = 0; r < R; ++r) {
        const V::F w = V::load_as<TYPE>(m.tensor.codes, row[r] + k, count, total);
        KBIT_UNROLL
        for (int t = 0; t < T; ++t) acc[r][t] = V::fma(w, V::load(x[t] + k), acc[r][t]);
      }
    }
    KBIT_UNROLL
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < R && n + r < end; ++r) y[(token + t) * stride + n + r] = V::sum(acc[r][t]);
    }
  }
}
