// Products with one token, in blocks of 64 columns and more: one row after the other, so that memory
// is read in order. As many rows as a vector has lanes share the work before and after their loops.

constexpr int kSpan = kMostBlocks;  // blocks whose scales are worked out at a time

// Scales of rows, times those of the inputs if these are integers.
struct RowScales {
  const Matrix& m;
  Meaning meant;
  bool direct;   // a scale a step and nothing else: the offsets are the scales times one number
  float factor;  // of all sums in the end
  RowScales(const Matrix& matrix, const Meaning& meaning) : m(matrix), meant(meaning) {
    const Tensor& t = m.tensor;
    direct = m.step == t.block && t.scale_type != kScaleDouble && !t.zeros && !t.means;
    factor = direct ? meant.factor : 1;
  }

  // Blocks [first, first + count) of `rows` rows from n on; what the offsets add is added to `sums`.
  template <bool INTEGERS>
  void load(const Input& in, int64_t n, int rows, int64_t first, int count,
            float (*scales)[kSpan + V::kFloats], V::F* sums) const {
    if (!direct) return general<INTEGERS>(in, n, rows, first, count, scales, sums);
    switch (m.tensor.scale_type) {
      case kScaleFp16: return simple<INTEGERS, kScaleFp16>(in, n, rows, first, count, scales, sums);
      case kScaleBf16: return simple<INTEGERS, kScaleBf16>(in, n, rows, first, count, scales, sums);
      default: return simple<INTEGERS, kScaleFp32>(in, n, rows, first, count, scales, sums);
    }
  }

 private:
  template <bool INTEGERS, int TYPE>
  __attribute__((noinline)) void simple(const Input& in, int64_t n, int rows, int64_t first, int count,
                                        float (*scales)[kSpan + V::kFloats], V::F* sums) const {
    // copies, because stores of scales may alias the matrix
    const int64_t groups = m.groups, total = m.tensor.rows * groups;
    const void* const base = m.tensor.scales;
    const V::F center = V::set1(meant.center);
    for (int b = 0; b < count; b += V::kFloats) {
      const int here = least(V::kFloats, count - b);
      const V::F factor = V::load(in.scales + first + b);
      const V::F offset = meant.offset ? V::mul(center, V::load(in.sums + first + b)) : V::zero();
      int64_t index = n * groups + first + b;
      for (int r = 0; r < rows; ++r, index += groups) {
        const V::F s = V::load_as<TYPE>(base, index, here, total);
        sums[r] = V::fma(s, offset, sums[r]);
        V::store(scales[r] + b, INTEGERS ? V::mul(s, factor) : s);
      }
    }
  }

  template <bool INTEGERS>
  __attribute__((noinline)) void general(const Input& in, int64_t n, int rows, int64_t first, int count,
                                         float (*scales)[kSpan + V::kFloats], V::F* sums) const {
    alignas(64) float offsets[kSpan + V::kFloats];
    for (int r = 0; r < rows; ++r) {
      row_scales(m, n + r, static_cast<int>(first), count, meant, scales[r], offsets);
      for (int b = 0; b < count; b += V::kFloats) {
        const int here = least(V::kFloats, count - b);
        const V::F s = V::load_part(scales[r] + b, here);
        if (meant.offset) {
          sums[r] = V::fma(V::load_part(offsets + b, here), V::load(in.sums + first + b), sums[r]);
        }
        V::store(scales[r] + b, INTEGERS ? V::mul(s, V::load(in.scales + first + b)) : s);
      }
    }
  }
};

// WIDTH: bits of an input value: 8, 16, or 32 for floats.
template <int WIDTH, bool LUT, int BITS>
struct Single {
  static constexpr bool kDigits = WIDTH == 16 && !LUT && V::digits(BITS);
  static constexpr bool kBytes = WIDTH == 8 || kDigits;
  static constexpr bool kFine = WIDTH == 8 && !LUT && V::fine(BITS);
  static constexpr int kChunk = kBytes ? chunk_of(V::order(BITS)) : kStep;  // columns of one step
  static constexpr int kChunkBlocks = kChunk / kStep;
  static constexpr int kVectors = kStep / V::kCodes;
  static constexpr int kLongRow = 32;  // in blocks
  using Recode = std::conditional_t<
      kBytes, typename V::template Narrow<BITS, LUT && kBytes && BITS <= 4>,
      std::conditional_t<WIDTH == 16, typename V::template Wide<BITS, LUT>,
                         typename V::template Floats<BITS, LUT>>>;

  // Codes are asked into the second level, which has room for more on the way, and from there into the
  // first; or at once into the first, past the second, which has better use for its room.
  static constexpr int64_t kAhead = 2 * kCodesAhead, kNear = 1024, kPast = 3 * kCodesAhead;

  // Asks for the next `bytes` of the codes; once a step, since a burst fills the queue to memory and
  // then holds up the loads behind it.
  static inline __attribute__((always_inline)) void ask(const uint8_t*& ahead, int bytes, bool past) {
    if (past) {
      KBIT_UNROLL
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 0);
    } else {
      KBIT_UNROLL
      for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(ahead + i, 0, 2);
        __builtin_prefetch(ahead + i - kAhead + kNear, 0, 3);
      }
    }
    ahead += bytes;
  }

  // The products of one block in natural order, summed up lane by lane, times its scale.
  template <bool TAIL>
  static inline __attribute__((always_inline)) V::F block(
      const Recode& recode, const uint8_t* const (&planes)[3], int64_t at, const Input& in,
      float scale, const float*& lanes, V::F acc) {
    constexpr int kCount = TAIL && kVectors > 1 ? kVectors / 2 : kVectors;
    V::I dot = V::izero(), high = V::izero();
    V::F part[2] = {V::zero(), V::zero()};
    KBIT_UNROLL
    for (int v = 0; v < kCount; ++v) {
      const int64_t from = at * kStep + v * V::kCodes;
      const auto c = V::template unpack<BITS, TAIL && kVectors == 1>(planes, from / 32);
      if constexpr (kBytes) {
        const auto w = recode(c);
        const int8_t* x = static_cast<const int8_t*>(in.values) + from;
        dot = V::template dot8<BITS, LUT>(dot, w, kDigits ? x + in.padded : x);
        if (kDigits) high = V::template dot8<BITS, LUT>(high, w, x);
      } else if constexpr (WIDTH == 16) {
        constexpr int kWords = V::kCodes / (2 * V::kFloats);
        typename V::H w[kWords];
        recode(c, w);
        KBIT_UNROLL
        for (int h = 0; h < kWords; ++h) {
          dot = V::dot16(dot, w[h], static_cast<const int16_t*>(in.values) + from + h * 2 * V::kFloats);
        }
      } else {
        constexpr int kParts = V::kCodes / V::kFloats;
        V::F w[kParts];
        recode(c, w);
        KBIT_UNROLL
        for (int p = 0; p < kParts; ++p) {
          const V::F x = V::load(static_cast<const float*>(in.values) + from + p * V::kFloats);
          part[p % 2] = V::fma(w[p], x, part[p % 2]);
        }
      }
    }
    if constexpr (kDigits) dot = V::iadd(dot, V::times256(high));
    const V::F value = WIDTH == 32 ? V::add(part[0], part[1]) : of_lanes(dot, lanes);
    return V::fma(value, V::set1(scale), acc);
  }

  // Sums times the scales of their inputs, if these have one a lane.
  static inline __attribute__((always_inline)) V::F of_lanes(V::I dot, const float*& lanes) {
    const V::F value = V::to_float(dot);
    if constexpr (!kFine) return value;
    lanes += V::kFloats;
    return V::mul(value, V::load(lanes - V::kFloats));
  }

  // Blocks of a row: `count` from `first` on, of which `whole` have all their columns.
  struct Span {
    int64_t first;
    int whole, count;
  };

  // The products of `rows` rows from `row` on, added to sums. A function of its own, because what
  // `run` keeps beside it would take the registers.
  static __attribute__((noinline)) void multiply(const Recode& recode_of, const uint8_t* row,
                                                 int64_t units, int rows, const Span& span, const Input& in,
                                                 const float (*scales)[kSpan + V::kFloats],
                                                 const uint8_t* codes_end, V::F* sums) {
    const Recode recode = recode_of;
    const int64_t first = span.first, row_bytes = units * 4 * BITS;
    const int whole = span.whole, chunked = kBytes ? whole / kChunkBlocks * kChunkBlocks : 0;
    const bool tail = whole < span.count;
    int64_t offsets[3];
    plane_offsets<BITS>(units, offsets);
    const int8_t* const first_x = static_cast<const int8_t*>(in.values) + first * kStep;
    const int64_t low = kDigits ? in.padded : 0;
    const float* const first_lanes = kFine ? in.lanes + first / kChunkBlocks * V::kFloats : nullptr;
    const bool past = kPastSecondLevel;
    for (int r = 0; r < rows; ++r, row += row_bytes) {
      const uint8_t* const planes[3] = {row + offsets[0], row + offsets[1], row + offsets[2]};
      const float* const scale = scales[r];
      const uint8_t* ahead = row + first * (kStep * BITS / 8) + (past ? kPast : kAhead);
      if (ahead >= codes_end) ahead = row;
      V::F acc = sums[r];
      const float* lanes = first_lanes;
      int b = 0;
      if constexpr (kBytes) {
        const int8_t* x = first_x;
        for (; b < chunked; b += kChunkBlocks, x += kChunk) {
          ask(ahead, kChunk * BITS / 8, past);
          const V::I dot = V::template dots<BITS, LUT, kDigits>(recode, planes, (first + b) * 2, x, x + low);
          acc = V::fma(of_lanes(dot, lanes), V::template chunk_scales<kChunkBlocks>(scale + b), acc);
        }
      }
      for (; b < whole; ++b) {
        ask(ahead, kStep * BITS / 8, past);
        acc = block<false>(recode, planes, first + b, in, scale[b], lanes, acc);
      }
      if (tail) acc = block<true>(recode, planes, first + b, in, scale[b], lanes, acc);
      sums[r] = acc;
    }
  }

  static void run(const Matrix& m, const Input& in, int64_t, int, float* y, int64_t, int64_t begin,
                  int64_t end) {
    const Tensor& t = m.tensor;
    const int64_t units = (t.cols + 31) / 32, row_bytes = units * 4 * BITS, steps = (units + 1) / 2;
    const RowScales scale_rows(m, meaning(kDigits ? 8 : WIDTH, m));
    const ScaleBytes scale_bytes(m);
    const Recode recode(m.tables);
    const uint8_t* const codes = static_cast<const uint8_t*>(t.codes);
    const uint8_t* const codes_end = codes + end * row_bytes;
    // Nothing is asked for while scales are worked out, so few long rows at a time.
    const int batch = steps < kLongRow ? V::kFloats : 4;
    alignas(64) float scales[V::kFloats][kSpan + V::kFloats];
    for (int64_t n = begin; n < end; n += V::kFloats) {
      const int rows = static_cast<int>(least<int64_t>(V::kFloats, end - n));
      alignas(64) V::F sums[V::kFloats];
      KBIT_UNROLL
      for (int r = 0; r < V::kFloats; ++r) sums[r] = V::zero();
      for (int r = 0; r < rows; r += batch) {
        const int here = least(batch, rows - r);
        prefetch(scale_bytes.begin + (n + r) * scale_bytes.row + kScalesAhead, here * scale_bytes.row,
                 scale_bytes.end);
        for (int64_t first = 0; first < steps; first += kSpan) {
          const int count = static_cast<int>(least<int64_t>(kSpan, steps - first));
          const Span span = {first, static_cast<int>(least<int64_t>(count, units / 2 - first)), count};
          scale_rows.load<WIDTH != 32>(in, n + r, here, first, count, scales, sums + r);
          multiply(recode, codes + (n + r) * row_bytes, units, here, span, in, scales, codes_end, sums + r);
        }
      }
      const V::F made = V::mul(V::sums(sums), V::set1(scale_rows.factor));
      if (rows == V::kFloats) V::store(y + n, made);
      else V::store_part(y + n, made, rows);
    }
    if (t.n_outliers == 0) return;
    for (int64_t n = begin; n < end; ++n) y[n] += outlier_sum(m, in, 0, n);
  }
};
