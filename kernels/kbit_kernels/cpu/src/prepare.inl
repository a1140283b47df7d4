// Inputs, scales and rows of weights. Included in an instruction set's namespace, after its V.

// No templates of the standard library are called here: the linker keeps one copy of each, which
// might be one for an instruction set that the machine lacks.
template <class T>
static inline T least(T a, T b) { return b < a ? b : a; }

// n <= kFloats values from `index` on of an array of `total` of a ScaleType.
static inline V::F load_any(int32_t type, const void* base, int64_t index, int n, int64_t total) {
  if (type == kScaleFp16) return V::load_as<kScaleFp16>(base, index, n, total);
  if (type == kScaleBf16) return V::load_as<kScaleBf16>(base, index, n, total);
  return V::load_as<kScaleFp32>(base, index, n, total);
}

// Columns of a chunk of an order of bytes.
static constexpr int chunk_of(int order) { return order ? V::kCodes << order : kStep; }

static inline int log2_of(int power) { return __builtin_ctz(static_cast<unsigned>(power)); }

// How the integers or floats that a recoder makes of codes become weights:
// weight = (made + center - zero) * factor * scale + mean.
struct Meaning {
  float factor, center;
  bool offset;  // whether anything is added to made * factor * scale
};

// summed: see Input.
static inline Meaning meaning(int width, const Matrix& m, bool summed = false) {
  const Tensor& t = m.tensor;
  float factor = 1, center = 0;
  if (t.storage == kCodebook) {
    if (width == 8) {
      factor = V::slim(t.bits) || summed ? m.tables->slim_scale : m.tables->narrow_scale;
      center = static_cast<float>(-V::bias8(t.bits));
    }
    if (width == 16) factor = m.tables->wide_scale;
  } else {
    const int half = t.bits > 0 ? 1 << (t.bits - 1) : 0;  // floats have none
    center = static_cast<float>(width == 8 ? V::center8(t.bits) : width == 16 ? 0 : half);
    if (t.storage == kInt) center -= static_cast<float>(half);
  }
  return {factor, center, center != 0 || t.zeros != nullptr || t.means != nullptr};
}

// What sums of a tile add to every integer weight; 0 where `offset` differs from block to block.
static inline int32_t common_center(int width, const Matrix& m) {
  if (m.tensor.zeros != nullptr || m.tensor.means != nullptr) return 0;
  return static_cast<int32_t>(meaning(width, m).center);
}

// By how much bytes of a tile exceed the weights that sums are made of.
static inline int sums_bias(const Tensor& t) { return t.storage == kCodebook ? 128 : 1 << (t.bits - 1); }

// Rounds one block of a token to integers. center: common_center.
template <int STEP, class X>
static inline void load_block(const Input& input, const float* x, int32_t center, X* out, int64_t block) {
  constexpr int kVectors = STEP / V::kFloats;
  V::F values[kVectors];
  V::I peaks = V::izero();
  KBIT_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    values[i] = V::load(x + i * V::kFloats);
    peaks = V::larger(peaks, V::magnitude(values[i]));
  }
  const int32_t bits = V::largest(peaks);  // magnitudes are ordered as their bits are: infinity and NaN come last
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const int bias = sizeof(X) == 1 && V::kSums && input.summed ? sums_bias(input.matrix->tensor) : 0;
  if (bits >= 0x7f800000 || peak <= 1e-30f) {  // below, 1 / peak may overflow
    for (int i = 0; i < STEP; i += V::kFloats) {
      if constexpr (sizeof(X) == 1) V::store8(out + i, bias ? V::summand8(V::izero(), bias) : V::izero());
      else V::store16(out + i, V::izero());
    }
    input.scales[block] = input.sums[block] = bits >= 0x7f800000 ? __builtin_nanf("") : 0;
    input.begins[block] = 0;
    return;
  }
  const float limit = static_cast<float>(input.limit), scale = peak / limit;
  const V::F factor = V::set1(limit / peak);
  V::I total = V::izero(), crossed = V::izero();
  KBIT_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const V::I rounded = V::round(V::mul(values[i], factor));
    total = V::iadd(total, rounded);
    if constexpr (sizeof(X) == 2) {
      if constexpr (V::kSums) crossed = V::cross16(crossed, rounded);
      V::store16(out + i * V::kFloats, rounded);
    } else if (V::kSums && input.summed) {
      crossed = V::cross8(crossed, rounded);
      V::store8(out + i * V::kFloats, V::summand8(rounded, bias));
    } else {
      V::store8(out + i * V::kFloats, rounded);
    }
  }
  const int32_t sum = V::isum(total);
  input.scales[block] = scale;
  input.sums[block] = scale * static_cast<float>(sum);
  uint32_t begin = static_cast<uint32_t>(center * sum);
  if (V::kSums && input.summed) begin += static_cast<uint32_t>(bias * sum) - static_cast<uint32_t>(V::isum(crossed));
  input.begins[block] = static_cast<int32_t>(begin);
}

template <class X>
static inline void load_block(const Input& input, const float* x, int step, int32_t center, X* out, int64_t block) {
  if (step == 64) load_block<64>(input, x, center, out, block);
  else if (step == 32) load_block<32>(input, x, center, out, block);
  else load_block<16>(input, x, center, out, block);
}

// Rounds one block of a token to bytes with a scale for each lane of a product, which sums 4 columns of
// each of its vectors: vectors of x that are `apart` from each other share theirs (0: none do).
static void load_lanes(const Input& input, const float* x, int apart, int8_t* out, int64_t block, float* lanes) {
  const V::F limit = V::set1(kNarrowLimit), least_peak = V::set1(1e-30f);  // below, limit / peak may overflow
  V::F total = V::zero();
  for (int i = 0; i < kStep / V::kFloats; ++i) {
    if (apart && i & apart) continue;
    const V::F a = V::load(x + i * V::kFloats), b = V::load(x + (i + apart) * V::kFloats);
    V::F peak = V::max(V::abs(a), V::abs(b));
    peak = V::max(peak, V::swap<1>(peak));
    peak = V::max(peak, V::max(V::swap<2>(peak), least_peak));
    V::F poison = V::fma(a, V::zero(), V::mul(b, V::zero()));  // NaN if any value is NaN or infinite
    poison = V::add(poison, V::swap<1>(poison));
    poison = V::add(poison, V::swap<2>(poison));
    const V::F factor = V::div(limit, peak), scale = V::fma(peak, V::set1(1.0f / kNarrowLimit), poison);
    const V::I p = V::round(V::mul(a, factor)), q = V::round(V::mul(b, factor));
    V::store8(out + i * V::kFloats, p);
    V::store8(out + (i + apart) * V::kFloats, q);
    V::store_fourth(lanes, scale);
    lanes += V::kFloats / 4;
    total = V::fma(V::to_float(apart ? V::iadd(p, q) : p), scale, total);
  }
  input.scales[block] = 1;
  input.sums[block] = V::sum(total);
}

// Rounds one block of a token to bytes with a scale for each of its pieces.
static void load_pieces(const Input& input, const float* x, int8_t* out, int64_t block) {
  constexpr int kApart = 4 * kPieces / V::kFloats;  // vectors between those of the same pieces
  V::F total = V::zero();
  for (int first = 0; first < kApart; ++first) {
    V::F peak = V::set1(1e-30f), poison = V::zero();  // below, limit / peak may overflow
    for (int i = first; i < kStep / V::kFloats; i += kApart) {
      const V::F v = V::load(x + i * V::kFloats);
      peak = V::max(V::abs(v), peak);
      poison = V::fma(v, V::zero(), poison);  // NaN if any value is NaN or infinite
    }
    peak = V::max(peak, V::swap<1>(peak));
    peak = V::max(peak, V::swap<2>(peak));
    poison = V::add(poison, V::swap<1>(poison));
    poison = V::add(poison, V::swap<2>(poison));
    const V::F factor = V::div(V::set1(kNarrowLimit), peak);
    const V::F scale = V::fma(peak, V::set1(1.0f / kNarrowLimit), poison);
    V::I rounded = V::izero();
    for (int i = first; i < kStep / V::kFloats; i += kApart) {
      const V::I v = V::round(V::mul(V::load(x + i * V::kFloats), factor));
      V::store8(out + i * V::kFloats, v);
      rounded = V::iadd(rounded, v);
    }
    V::store_fourth(input.lanes + block * kPieces + first * V::kFloats / 4, scale);
    total = V::fma(V::to_float(rounded), scale, total);
  }
  input.sums[block] = V::sum(total);
}

// Where a block's scales lie among the lanes', and which of its vectors share them.
struct Lanes {
  static constexpr int kBlocks = chunk_of(V::order(5)) / kStep;  // of a chunk
  int64_t chunked;  // blocks that lie in chunks
  explicit Lanes(const Tensor& t) : chunked((t.cols + 31) / 32 / (2 * kBlocks) * kBlocks) {}
  int64_t at(int64_t block) const {
    if (block < chunked) return block * V::kFloats / kBlocks;
    return (chunked / kBlocks + block - chunked) * V::kFloats;
  }
  int apart(int64_t block) const {
    if (block < chunked && V::order(5)) return piece_of(V::order(5)) / V::kFloats;
    return V::kCodes < kStep ? V::kCodes / V::kFloats : 0;
  }
};

// Brings `units` units of columns from natural order to that of the input's bytes.
static inline void arrange(int order, const int8_t* in, int64_t units, int8_t* out) {
  const int size = piece_of(order), unit_count = chunk_of(order) / 32;
  int64_t unit = 0;
  for (; order != 0 && unit + unit_count <= units; unit += unit_count) {
    int8_t* chunk = out + unit * 32;
    for (int u = 0; u < unit_count; ++u) {
      for (int field = 0; field < 32 / size; ++field) {
        int8_t* to = chunk + field * V::kCodes + u * size;
        if (size == 16) std::memcpy(to, in + (unit + u) * 32 + field * 16, 16);
        else if (size == 8) std::memcpy(to, in + (unit + u) * 32 + field * 8, 8);
        else std::memcpy(to, in + (unit + u) * 32 + field * 4, 4);
      }
    }
  }
  std::memcpy(out + unit * 32, in + unit * 32, static_cast<size_t>(units - unit) * 32);
}

// Two bytes for each of n values: 256 * high + low, both with their sign.
static inline void split_digits(const int16_t* values, int n, int8_t* high, int8_t* low) {
  const V::F down = V::set1(0.00390625f), up = V::set1(-256.0f);
  const V::F tie = V::set1(0.0009765625f);  // 128 is 1 * 256 - 128: both digits stay in 8 bits
  for (int i = 0; i < n; i += V::kFloats) {
    const V::F value = V::load_words(values + i);
    const V::F digit = V::to_float(V::round(V::fma(value, down, tie)));
    V::store8(high + i, V::round(digit));
    V::store8(low + i, V::round(V::fma(digit, up, value)));
  }
}

// Columns [column, column + padded) of a token's x, zeros beyond the last, without the values of
// outlier columns, which go to the input's own; in `room` where x itself won't do. outlier: how many
// of these columns lie before `column`.
static inline const float* stage(const Input& input, const float* x, int64_t token, int64_t column,
                                 int64_t padded, int& outlier, float* room) {
  const Tensor& t = input.matrix->tensor;
  const int64_t count = least(padded, t.cols - column);
  const auto outlies = [&] { return outlier < t.n_outliers && t.outlier_columns[outlier] < column + count; };
  if (count == padded && !outlies()) return x + column;
  std::memcpy(room, x + column, sizeof(float) * static_cast<size_t>(count));
  std::memset(room + count, 0, sizeof(float) * static_cast<size_t>(padded - count));
  for (; outlies(); ++outlier) {
    float& value = room[t.outlier_columns[outlier] - column];
    input.outliers[input.outliers_of(token) + outlier / kStep * kStep * input.outlier_together + outlier % kStep] = value;
    value = 0;
  }
  return room;
}

// Prepares `count` columns, whole blocks, of a token from `column` on. bytes, words: where rounded values go that are
// still to be arranged, or null.
static inline void load_blocks(const Input& input, const Lanes& places, int32_t center, const float* x, int64_t token,
                               int64_t column, int64_t count, int8_t* bytes, int16_t* words) {
  const int step = input.matrix->step;
  const int64_t first = input.values_of(token);
  int64_t block = input.blocks_of(token) + (column >> log2_of(step)) * input.together;
  for (int64_t i = 0; i < count; i += step, block += input.together) {
    const int64_t at = first + (column + i) / kStep * kStep * input.together + (column + i) % kStep;
    if (input.width == 8) {
      int8_t* const out = bytes != nullptr ? bytes + i : static_cast<int8_t*>(input.values) + at;
      if (input.fine) load_lanes(input, x + i, places.apart(block), out, block, input.lanes + places.at(block));
      else if (input.pieces) load_pieces(input, x + i, out, block);
      else load_block(input, x + i, step, center, out, block);
    } else if (input.width == 16) {
      int16_t* const out = words != nullptr ? words + i : static_cast<int16_t*>(input.values) + at;
      load_block(input, x + i, step, center, out, block);
    } else {
      float* const out = static_cast<float*>(input.values) + at;
      V::F total = V::zero();
      for (int j = 0; j < step; j += V::kFloats) {
        const V::F v = V::load(x + i + j);
        V::store(out + j, v);
        total = V::add(total, v);
      }
      input.sums[block] = V::sum(total);
    }
  }
}

static inline int32_t input_center(const Input& input) {
  return input.width == 32 ? 0 : common_center(input.width, *input.matrix);
}

static void load(const Input& input, const float* x, int64_t stride, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;  // whole chunks
  const Tensor& t = input.matrix->tensor;
  const Lanes places(t);
  const int32_t center = input_center(input);
  alignas(64) float room[kColumns];
  alignas(64) int8_t bytes[2][kColumns];
  alignas(64) int16_t words[kColumns];
  for (int64_t token = begin; token < end; ++token) {
    int outlier = 0;
    if (input.together == 1) {
      const size_t block_bytes = sizeof(float) * static_cast<size_t>(input.blocks);
      std::memset(input.scales + token * input.blocks, 0, block_bytes);
      std::memset(input.sums + token * input.blocks, 0, block_bytes);
    }
    for (int64_t col = 0; col < input.padded; col += kColumns) {
      const int64_t padded = least(kColumns, input.padded - col);
      const float* staged = stage(input, x + token * stride, token, col, padded, outlier, room);
      load_blocks(input, places, center, staged, token, col, padded,
                  input.order ? bytes[0] : nullptr, input.digits ? words : nullptr);
      // only the units that a row has are in chunks; padding beyond them is natural
      if (input.digits) split_digits(words, static_cast<int>(padded), bytes[0], bytes[1]);
      if (input.digits || input.order) {
        const int64_t units = least((t.cols - col + 31) / 32, padded / 32);
        for (int digit = 0; digit <= (input.digits ? 1 : 0); ++digit) {
          int8_t* out = static_cast<int8_t*>(input.values) + (digit * input.tokens + token) * input.padded + col;
          arrange(input.order, bytes[digit], units, out);
          std::memcpy(out + units * 32, bytes[digit] + units * 32, static_cast<size_t>(padded - units * 32));
        }
      }
    }
  }
}

static void load_columns(const Input& input, const float* x, int64_t token, int64_t column, int64_t count) {
  const int64_t end = column + count;
  const int64_t whole = (end == input.matrix->cols() ? (end + kStep - 1) / kStep * kStep : end) - column;
  load_blocks(input, Lanes(input.matrix->tensor), input_center(input), x, token, column, whole, nullptr, nullptr);
}

// fp32 values of groups [first, first + count) of a row; up to kFloats - 1 more are overwritten.
static inline void group_scales(const Matrix& m, int64_t row, int first, int count, float* out) {
  const Tensor& t = m.tensor;
  const int64_t base = row * m.groups + first, total = t.rows * m.groups;
  if (t.scale_type == kScaleDouble) {
    const auto* codes = static_cast<const uint8_t*>(t.scales) + base;
    for (int i = 0; i < count; ++i) {
      // two roundings, as the reference has them
      const float product = t.scale_codebook[codes[i]] * t.scale_absmax[(base + i) / 256];
      out[i] = product + t.scale_offset[0];
    }
    return;
  }
  for (int i = 0; i < count; i += V::kFloats) {
    V::store(out + i, load_any(t.scale_type, t.scales, base + i, least(V::kFloats, count - i), total));
  }
}

// Offsets of n groups from `index` on, whose scales are s.
static inline V::F offsets_of(const Matrix& m, int64_t index, int n, int64_t total,
                              const Meaning& meaning, V::F s) {
  V::F center = V::set1(meaning.center);
  if (m.tensor.zeros) {
    center = V::add(center, V::mul(V::set1(-1), V::load_bytes(m.tensor.zeros, index, n, total)));
  }
  const V::F offset = V::mul(s, center);
  if (m.tensor.means == nullptr) return offset;
  return V::add(offset, load_any(m.tensor.mean_type, m.tensor.means, index, n, total));
}

// Block i of `count`, of which the first is block `first` of its row, takes the value of its group;
// values begins with the first block's, and has room for a vector more, as `out` has.
static inline void repeat(const float* values, int count, int64_t first, int shift, float* out) {
  for (int64_t i = 0; i < count; i += V::kFloats) {
    const int64_t group = (first + i) >> shift;
    const int phase = static_cast<int>(first + i - (group << shift));
    V::store(out + i, V::spread(values + (group - (first >> shift)), phase, shift));
  }
}

constexpr int kMostBlocks = 256;  // that row_scales may be asked for

// Scales and offsets of blocks [first, first + count) of `step` columns of a row, where
// made * scale + offset is the weight. Arrays have room for a vector more.
static inline void row_scales(const Matrix& m, int64_t row, int first, int count,
                              const Meaning& meaning, float* scale, float* offset) {
  const Tensor& t = m.tensor;
  const int shift = t.block == 0 ? 31 : log2_of(t.block / m.step);
  const int group = first >> shift, groups = ((first + count - 1) >> shift) - group + 1;
  const int64_t base = row * m.groups + group, total = t.rows * m.groups;
  alignas(64) float group_scale[kMostBlocks + V::kFloats], group_offset[kMostBlocks + V::kFloats];
  float* const s = shift ? group_scale : scale;
  float* const o = shift ? group_offset : offset;
  group_scales(m, row, group, groups, s);
  for (int i = 0; i < groups; i += V::kFloats) {
    const V::F made = V::mul(V::load(s + i), V::set1(meaning.factor));
    if (meaning.offset) {
      V::store(o + i, offsets_of(m, base + i, least(V::kFloats, groups - i), total, meaning, made));
    }
    V::store(s + i, made);
  }
  if (shift == 0) return;
  repeat(s, count, first, shift, scale);
  if (meaning.offset) repeat(o, count, first, shift, offset);
}

// Where the planes of a packed row start, in bytes.
template <int BITS>
static inline void plane_offsets(int64_t units, int64_t (&offsets)[3]) {
  int plane = 0;
  int64_t at = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if (!(BITS & width)) continue;
    offsets[plane++] = at;
    at += units * 4 * width;
  }
  while (plane < 3) offsets[plane++] = 0;
}

template <int BITS>
static inline void planes_of(const uint8_t* row, int64_t units, const uint8_t* (&planes)[3]) {
  int64_t offsets[3];
  plane_offsets<BITS>(units, offsets);
  for (int plane = 0; plane < 3; ++plane) planes[plane] = row + offsets[plane];
}
