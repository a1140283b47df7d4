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

static inline int log2_of(int power) { return __builtin_ctz(static_cast<unsigned>(power)); }

// Rounds one block of a token to integers.
template <class X>
static void load_block(const Input& input, const float* x, int step, X* out, float* scale,
                       float* sum) {
  V::F peaks = V::zero(), poison = V::zero();
  for (int i = 0; i < step; i += V::kFloats) {
    const V::F v = V::load(x + i);
    peaks = V::max(V::abs(v), peaks);
    poison = V::fma(v, V::zero(), poison);  // NaN if any value is NaN or infinite
  }
  const float bad = V::sum(poison), peak = V::peak(peaks);
  const bool round = bad == 0 && peak > 1e-30f;  // below, 1 / peak may overflow
  const V::F factor = V::set1(round ? static_cast<float>(input.limit) / peak : 0);
  V::I total = V::izero();
  for (int i = 0; i < step; i += V::kFloats) {
    const V::I rounded = round ? V::round(V::mul(V::load(x + i), factor)) : V::izero();
    total = V::iadd(total, rounded);
    if constexpr (sizeof(X) == 1) V::store8(out + i, rounded);
    else V::store16(out + i, rounded);
  }
  *scale = round ? peak / static_cast<float>(input.limit) : bad;
  *sum = *scale * static_cast<float>(V::isum(total));
}

static void load(const Input& input, const float* x, int64_t stride, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;
  const Tensor& t = input.matrix->tensor;
  const int step = input.matrix->step;
  alignas(64) float staged[kColumns];
  for (int64_t token = begin; token < end; ++token) {
    int outlier = 0;
    const size_t block_bytes = sizeof(float) * static_cast<size_t>(input.blocks);
    std::memset(input.scales + token * input.blocks, 0, block_bytes);
    std::memset(input.sums + token * input.blocks, 0, block_bytes);
    for (int64_t col = 0; col < input.padded; col += kColumns) {
      const int64_t padded = least(kColumns, input.padded - col);
      const int64_t count = least(padded, t.cols - col);
      std::memcpy(staged, x + token * stride + col, sizeof(float) * static_cast<size_t>(count));
      std::memset(staged + count, 0, sizeof(float) * static_cast<size_t>(padded - count));
      for (; outlier < t.n_outliers && t.outlier_columns[outlier] < col + count; ++outlier) {
        float& value = staged[t.outlier_columns[outlier] - col];
        input.outliers[token * t.n_outliers + outlier] = value;
        value = 0;
      }
      for (int64_t i = 0; i < padded; i += step) {
        const int64_t at = token * input.padded + col + i;
        const int64_t block = token * input.blocks + (col + i) / step;
        if (input.width == 8) {
          load_block(input, staged + i, step, static_cast<int8_t*>(input.values) + at,
                     input.scales + block, input.sums + block);
        } else if (input.width == 16) {
          load_block(input, staged + i, step, static_cast<int16_t*>(input.values) + at,
                     input.scales + block, input.sums + block);
        } else {
          V::F total = V::zero();
          for (int j = 0; j < step; j += V::kFloats) {
            const V::F v = V::load(staged + i + j);
            V::store(static_cast<float*>(input.values) + at + j, v);
            total = V::add(total, v);
          }
          input.sums[block] = V::sum(total);
        }
      }
    }
  }
}

// How the integers or floats that a recoder makes of codes become weights:
// weight = (made + center - zero) * factor * scale + mean.
struct Meaning {
  float factor, center;
  bool offset;  // whether anything is added to made * factor * scale
};

static inline Meaning meaning(int width, const Matrix& m) {
  const Tensor& t = m.tensor;
  float factor = 1, center = 0;
  if (t.storage == kCodebook) {
    if (width == 8) factor = m.tables->narrow_scale, center = -V::kBias8;
    if (width == 16) factor = m.tables->wide_scale;
  } else {
    const int half = 1 << (t.bits - 1);
    center = static_cast<float>(width == 8 ? V::center8(t.bits) : width == 16 ? 0 : half);
    if (t.storage == kInt) center -= static_cast<float>(half);
  }
  return {factor, center, center != 0 || t.zeros != nullptr || t.means != nullptr};
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

static inline void repeat(float* values, int count, int first, int shift) {
  // block i takes the value of its group; backwards, because groups come before their blocks
  for (int i = count - 1; i >= 0; --i) values[i] = values[((first + i) >> shift) - (first >> shift)];
}

// Scales and offsets of blocks [first, first + count) of `step` columns of a row, where
// made * scale + offset is the weight. Arrays have room for a vector more.
static inline void row_scales(const Matrix& m, int64_t row, int first, int count,
                              const Meaning& meaning, float* scale, float* offset) {
  const Tensor& t = m.tensor;
  const int shift = t.block == 0 ? 31 : log2_of(t.block / m.step);
  const int group = first >> shift, groups = ((first + count - 1) >> shift) - group + 1;
  const int64_t base = row * m.groups + group, total = t.rows * m.groups;
  group_scales(m, row, group, groups, scale);
  for (int i = 0; i < groups; i += V::kFloats) {
    const V::F s = V::mul(V::load(scale + i), V::set1(meaning.factor));
    if (meaning.offset) {
      V::store(offset + i, offsets_of(m, base + i, least(V::kFloats, groups - i), total, meaning, s));
    }
    V::store(scale + i, s);
  }
  if (shift) {
    repeat(scale, count, first, shift);
    if (meaning.offset) repeat(offset, count, first, shift);
  }
}

// Start of each plane of a packed row.
template <int BITS>
static inline void planes_of(const uint8_t* row, int64_t units, const uint8_t* (&planes)[3]) {
  int plane = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if (!(BITS & width)) continue;
    planes[plane++] = row;
    row += units * 4 * width;
  }
}
