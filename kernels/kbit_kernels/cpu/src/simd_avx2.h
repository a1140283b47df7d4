// AVX2 with FMA and F16C: 32 codes at a time. See simd_portable.h for what V must have. Included in
// the namespace of an instruction set, which has kVnni: whether there are AVX-VNNI's products of bytes.

struct V : NoSums {
  static constexpr int kFloats = 8, kCodes = 32;
  static constexpr int kTileVectors = 2;
  static constexpr int tokens(int width) { return width == 8 && kPairSums ? 4 : 6; }
  static constexpr int tile_columns(int width) { return width == 32 ? 256 : width == 16 ? 768 : 1024; }
  static constexpr int kByteBits = kVnni ? 8 : 6;  // of more, pairs of products overflow vpmaddubsw's 16 bits
  static constexpr int kByteCodebookBits = kVnni ? 4 : 3;
  static constexpr bool kPairSums = !kVnni;
  // How many pairs of products of codes, or of values of a slim codebook, 16 bits hold.
  static constexpr int pair_words(int bits, bool codebook) {
    if (codebook) return bits == 2 ? 2 : 1;
    return bits >= 7 ? 1 : bits == 6 ? 2 : bits == 5 ? 4 : 8;
  }
  static constexpr bool kCompact = kCompactBuild;

  typedef __m256 F;
  typedef __m256i I;
  typedef __m256i C;
  typedef __m256i H;

  static F set1(float a) { return _mm256_set1_ps(a); }
  static F zero() { return _mm256_setzero_ps(); }
  static I iset1(int32_t a) { return _mm256_set1_epi32(a); }
  static I izero() { return _mm256_setzero_si256(); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  // Lane i: p[(phase + i) >> shift]; a vector of p is read.
  static F spread(const float* p, int phase, int shift) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I from = _mm256_srl_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(phase)), _mm_cvtsi32_si128(shift));
    return _mm256_permutevar8x32_ps(load(p), from);
  }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_part(float* p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  template <int APART>
  static F swap(F a) { return _mm256_permute_ps(a, APART == 1 ? 0xb1 : 0x4e); }
  static void store_fourth(float* p, F a) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p),
                  _mm_unpacklo_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
  }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  // a, and `step` more where v is above the bound.
  static I add_above(I a, int32_t step, F v, F bound) {
    const I above = _mm256_castps_si256(_mm256_cmp_ps(v, bound, _CMP_GT_OQ));
    return _mm256_add_epi32(a, _mm256_and_si256(above, iset1(step)));
  }
  static F gather(const float* p, I at) { return _mm256_i32gather_ps(p, at, 4); }
  static void store_codes(uint8_t* p, I a) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words(a), izero128()));
  }
  static F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float peak(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  static I magnitude(F a) { return _mm256_castps_si256(abs(a)); }
  static I larger(I a, I b) { return _mm256_max_epi32(a, b); }
  static int32_t largest(I a) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static int32_t isum(I a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static I round(F a) { return _mm256_cvtps_epi32(a); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static __m128i words(I a) {
    return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  }
  static void store8(int8_t* p, I a) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words(a), izero128()));
  }
  static void store16(int16_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words(a)); }
  static __m128i izero128() { return _mm_setzero_si128(); }

  static F load_words(const int16_t* p) {
    return to_float(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  template <int TYPE>
  static F load_as(const void* base, int64_t index, int n, int64_t total) {
    if (TYPE == kScaleFp32) {
      const float* p = static_cast<const float*>(base) + index;
      return n == 8 ? load(p) : load_part(p, n);
    }
    const uint16_t* p = static_cast<const uint16_t*>(base) + index;
    __m128i raw;
    if (index + 8 <= total) {  // there is no load of some words; but the array goes on
      raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
      alignas(16) uint16_t part[8] = {};
      for (int i = 0; i < n; ++i) part[i] = p[i];
      raw = _mm_load_si128(reinterpret_cast<const __m128i*>(part));
    }
    const F value = TYPE == kScaleFp16
                        ? _mm256_cvtph_ps(raw)
                        : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    return n == 8 ? value : _mm256_and_ps(value, _mm256_castsi256_ps(first(n)));
  }
  static F load_bytes(const uint8_t* base, int64_t index, int n, int64_t) {
    alignas(8) uint8_t part[8] = {};
    for (int i = 0; i < n; ++i) part[i] = base[index + i];
    return bytes(part);
  }
  static F bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  struct Spread { __m256i at; };
  static Spread spread(int step, int columns) {
    alignas(32) int32_t at[8];
    for (int lane = 0; lane < 8; ++lane) at[lane] = lane * columns / step;
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(at))};
  }
  static F spread(const float* p, const Spread& s) {
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), s.at);
  }

  template <int WIDTH, int LOW>
  static C field(const uint8_t* plane, int64_t unit) {
    const uint8_t* p = plane + unit * 4 * WIDTH;
    __m256i v;
    if constexpr (WIDTH == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (WIDTH == 4) {
      v = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                            _mm256_setr_epi64x(0, 0, 4, 4));
    } else if constexpr (WIDTH == 2) {
      int64_t raw;
      __builtin_memcpy(&raw, p, 8);
      v = _mm256_srlv_epi64(_mm256_set1_epi64x(raw), _mm256_setr_epi64x(0, 2, 4, 6));
    } else {
      int32_t raw;
      __builtin_memcpy(&raw, p, 4);
      v = _mm256_srlv_epi32(_mm256_set1_epi32(raw), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    v = _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>((1 << WIDTH) - 1)));
    return LOW ? _mm256_slli_epi16(v, LOW) : v;
  }
  template <int BITS, bool TAIL>
  static C unpack(const uint8_t* const* planes, int64_t unit) {
    constexpr bool kFour = BITS & 4, kTwo = BITS & 2, kOne = BITS & 1;
    C c = field<BITS == 8 ? 8 : kFour ? 4 : 2, kFour ? BITS & 3 : BITS & 1>(planes[0], unit);
    if constexpr (kFour && kTwo) c = _mm256_or_si256(c, field<2, kOne>(planes[1], unit));
    if constexpr (kOne && BITS > 1) c = _mm256_or_si256(c, field<1, 0>(planes[kFour && kTwo ? 2 : 1], unit));
    return c;
  }

  static __m256i table16(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
  }
  static constexpr int center8(int bits) { return bits == 8 && !kVnni ? 128 : 0; }
  // Products take unsigned bytes: tables hold values with a bias, or are split into sign and magnitude.
  static constexpr bool slim(int bits) { return !kVnni && bits < 4; }
  static constexpr int bias8(int bits) { return kVnni ? 128 : slim(bits) ? slim_limit(bits) + 1 : 0; }
  template <int BITS, bool LUT>
  static constexpr bool kSigned = !kVnni && (BITS == 8 || (LUT && !slim(BITS)));
  template <int BITS, bool LUT>
  struct Narrow {
    // swapped: at an index whose third bit is the code's lowest
    __m256i table, swapped;
    explicit Narrow(const Matrix::Tables* t) : table(izero()), swapped(izero()) {
      if (LUT) table = _mm256_add_epi8(table16(slim(BITS) ? t->slim : t->narrow), _mm256_set1_epi8(static_cast<char>(bias8(BITS))));
      if constexpr (BITS == 3) {
        swapped = _mm256_set1_epi64x(0x0705030106040200);
        if (LUT) swapped = _mm256_shuffle_epi8(table, swapped);
      }
    }
    C operator()(C c) const {
      if (LUT) return _mm256_shuffle_epi8(table, c);
      return BITS == 8 && !kVnni ? _mm256_xor_si256(c, _mm256_set1_epi8(-128)) : c;
    }
  };
  template <int BITS, bool LUT>
  static I dot8(I acc, C w, const int8_t* x) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if (kVnni) return tile8(acc, w, v);
    // unsigned times signed bytes: codes up to 7 bits are unsigned and fit; others give their sign away
    if (kSigned<BITS, LUT>) {
      v = _mm256_sign_epi8(v, w);
      w = _mm256_abs_epi8(w);
    }
    const __m256i pairs = _mm256_maddubs_epi16(w, v);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // Products with one token; see simd_avx512.h. Sums of pairs stay in 16 bits as long as they fit.
  static constexpr int order(int bits) { return order_of(bits); }
  static constexpr bool digits(int bits) { return kVnni || bits < 8; }  // 8: pairs of products overflow
  static constexpr bool fine(int bits) { return bits == 5; }
  template <int BITS, int FIELD>
  static C dense_field(C v) {
    const C c = FIELD ? _mm256_srli_epi16(v, BITS * FIELD) : v;
    return _mm256_and_si256(c, _mm256_set1_epi8((1 << BITS) - 1));
  }
  // The four fields of 3-bit codes, each in the lower half of a byte: the 2 bits of `two`, and above
  // them the one of `one`, 4 bytes a unit, twice, the upper copy one bit further.
  static void indices(C two, C one, C (&out)[4]) {
    const C twos = _mm256_set1_epi8(0x33), ones = _mm256_set1_epi8(0x44);
    out[0] = _mm256_or_si256(_mm256_and_si256(two, twos), _mm256_and_si256(_mm256_slli_epi16(one, 2), ones));
    out[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(two, 2), twos), _mm256_and_si256(one, ones));
    out[2] = _mm256_srli_epi16(out[0], 4), out[3] = _mm256_srli_epi16(out[1], 4);
  }
  template <int BITS, bool LUT>
  static I pairs(C w, const int8_t* x) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if (kSigned<BITS, LUT>) {  // see dot8
      v = _mm256_sign_epi8(v, w);
      w = _mm256_abs_epi8(w);
    }
    return _mm256_maddubs_epi16(w, v);
  }
  template <int BITS, bool LUT, bool DIGITS, class Recode>
  static I dots(const Recode& recode, const uint8_t* const* planes, int64_t unit, const int8_t* x,
                const int8_t* low) {
    constexpr int kVectors = order(BITS) == 2 ? 4 : 2;
    constexpr int kFit = LUT && !slim(BITS) ? 1 : pair_words(BITS, LUT) < 4 ? pair_words(BITS, LUT) : 4;
    C w[kVectors];
    if constexpr (order(BITS) == 0) {
      w[0] = recode(unpack<BITS, false>(planes, unit)), w[1] = recode(unpack<BITS, false>(planes, unit + 1));
    } else {
      const C v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes[0] + unit * (BITS == 4 ? 16 : 8)));
      if constexpr (BITS == 3) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[1] + unit * 4));
        const C twice = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(raw), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
        indices(v, _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 1, 0, 1, 0, 1, 0, 1)), w);
        KBIT_UNROLL
        for (int i = 0; i < 4; ++i) w[i] = _mm256_shuffle_epi8(recode.swapped, w[i]);
      } else {
        w[0] = recode(dense_field<BITS, 0>(v)), w[1] = recode(dense_field<BITS, 1>(v));
        if constexpr (kVectors == 4) w[2] = recode(dense_field<BITS, 2>(v)), w[3] = recode(dense_field<BITS, 3>(v));
      }
    }
    I dot = pair_sums<BITS, LUT, kFit>(w, x);
    return DIGITS ? iadd(times256(dot), pair_sums<BITS, LUT, kFit>(w, low)) : dot;
  }
  template <int BITS, bool LUT, int FIT, int VECTORS>
  static I pair_sums(const C (&w)[VECTORS], const int8_t* x) {
    I total = izero();
    if constexpr (kVnni) {
      KBIT_UNROLL
      for (int i = 0; i < VECTORS; ++i) total = dot8<BITS, LUT>(total, w[i], x + 32 * i);
      return total;
    }
    KBIT_UNROLL
    for (int i = 0; i < VECTORS; i += FIT) {
      I sum = pairs<BITS, LUT>(w[i], x + 32 * i);
      for (int j = i + 1; j < i + FIT && j < VECTORS; ++j) {
        sum = _mm256_add_epi16(sum, pairs<BITS, LUT>(w[j], x + 32 * j));
      }
      const I wide = widen_pairs(sum);
      total = i ? iadd(total, wide) : wide;
    }
    return total;
  }
  static I times256(I a) { return _mm256_slli_epi32(a, 8); }
  template <int BLOCKS>
  static F chunk_scales(const float* p) {
    if constexpr (BLOCKS == 1) return set1(*p);
    return _mm256_insertf128_ps(set1(p[0]), _mm_set1_ps(p[1]), 1);
  }
  // The sum of each of 8 vectors.
  static F sums(const F (&a)[8]) {
    const F p = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const F q = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return add(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31));
  }

  // Looks codes up in BYTES tables of bytes; see Matrix::Tables.
  template <int BITS, int BYTES>
  static void look_up(const uint8_t (&chain)[BYTES][256], C c, C (&out)[BYTES]) {
    constexpr int kTables = BITS <= 4 ? 1 : BITS >= 7 ? 8 : 1 << (BITS - 4);
    KBIT_UNROLL
    for (int b = 0; b < BYTES; ++b) out[b] = _mm256_shuffle_epi8(table16(chain[b]), c);
    C index = c;
    KBIT_UNROLL
    for (int j = 1; j < kTables; ++j) {
      index = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
      KBIT_UNROLL
      for (int b = 0; b < BYTES; ++b) {
        out[b] = _mm256_xor_si256(out[b], _mm256_shuffle_epi8(table16(chain[b] + 16 * j), index));
      }
    }
    if constexpr (BITS == 8) {
      C high[BYTES];
      index = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
      KBIT_UNROLL
      for (int b = 0; b < BYTES; ++b) high[b] = _mm256_shuffle_epi8(table16(chain[b] + 128), index);
      KBIT_UNROLL
      for (int j = 9; j < 16; ++j) {
        index = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
        KBIT_UNROLL
        for (int b = 0; b < BYTES; ++b) {
          high[b] = _mm256_xor_si256(high[b], _mm256_shuffle_epi8(table16(chain[b] + 16 * j), index));
        }
      }
      KBIT_UNROLL
      for (int b = 0; b < BYTES; ++b) out[b] = _mm256_blendv_epi8(out[b], high[b], c);
    }
  }

  template <int BITS, bool LUT>
  struct Wide {
    const Matrix::Tables* t;
    explicit Wide(const Matrix::Tables* tables) : t(tables) {}
    void operator()(C c, H (&out)[2]) const {
      c = _mm256_permute4x64_epi64(c, 0xd8);  // unpacking interleaves the halves
      if constexpr (LUT) {
        C bytes[2];
        look_up<BITS, 2>(t->wide_xor, c, bytes);
        out[0] = _mm256_unpacklo_epi8(bytes[0], bytes[1]);
        out[1] = _mm256_unpackhi_epi8(bytes[0], bytes[1]);
      } else {
        out[0] = _mm256_unpacklo_epi8(c, izero());
        out[1] = _mm256_unpackhi_epi8(c, izero());
      }
    }
  };
  static I dot16(I acc, H w, const int16_t* x) {
    return tile16(acc, w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  template <int BITS, bool LUT>
  struct Floats {
    const Matrix::Tables* t;
    explicit Floats(const Matrix::Tables* tables) : t(tables) {}
    void operator()(C c, F (&out)[4]) const {
      if constexpr (LUT && BITS > 3 && BITS < 7) {
        c = _mm256_permutevar8x32_epi32(c, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        C b[4];
        look_up<BITS, 4>(t->bytes_xor, c, b);
        const C l01 = _mm256_unpacklo_epi8(b[0], b[1]), h01 = _mm256_unpackhi_epi8(b[0], b[1]);
        const C l23 = _mm256_unpacklo_epi8(b[2], b[3]), h23 = _mm256_unpackhi_epi8(b[2], b[3]);
        out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(l01, l23));
        out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(l01, l23));
        out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(h01, h23));
        out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(h01, h23));
      } else {
        if (!LUT) c = _mm256_sub_epi8(c, _mm256_set1_epi8(static_cast<char>(1 << (BITS - 1))));
        const __m128i low = _mm256_castsi256_si128(c), high = _mm256_extracti128_si256(c, 1);
        out[0] = part(low), out[1] = part(_mm_unpackhi_epi64(low, low));
        out[2] = part(high), out[3] = part(_mm_unpackhi_epi64(high, high));
      }
    }
    F part(__m128i c) const {
      if constexpr (!LUT) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c));
      const __m256i index = _mm256_cvtepu8_epi32(c);
      if constexpr (BITS <= 3) return _mm256_permutevar8x32_ps(load(t->values), index);
      return _mm256_i32gather_ps(t->values, index, 4);
    }
  };

  static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    __m256i a[8], b[8];
    KBIT_UNROLL
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * in_stride));
    KBIT_UNROLL
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    KBIT_UNROLL
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    KBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride),
                          _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 + i) * out_stride),
                          _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
  }

  static I broadcast(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  // As intrinsics, gcc computes all products first and then spills sums, or copies them: twice as slow.
  static I tile16(I acc, I w, I x) {
    if constexpr (kVnni) {
      asm("%{vex%} vpdpwssd %[x], %[w], %[acc]" : [acc] "+x"(acc) : [w] "x"(w), [x] "x"(x));
      return acc;
    }
    I products;
    asm("vpmaddwd %[x], %[w], %[products]\n\tvpaddd %[products], %[acc], %[acc]"
        : [acc] "+x"(acc), [products] "=&x"(products)
        : [w] "x"(w), [x] "x"(x));
    return acc;
  }
  static I tile8(I acc, I w, I x) {
    if constexpr (kVnni) {
      asm("%{vex%} vpdpbusd %[x], %[w], %[acc]" : [acc] "+x"(acc) : [w] "x"(w), [x] "x"(x));
      return acc;
    }
    I products;
    asm("vpmaddubsw %[x], %[w], %[products]\n\tvpmaddwd %[ones], %[products], %[products]\n\t"
        "vpaddd %[products], %[acc], %[acc]"
        : [acc] "+x"(acc), [products] "=&x"(products)
        : [w] "x"(w), [x] "x"(x), [ones] "x"(_mm256_set1_epi16(1)));
    return acc;
  }
  static I pair8(I w, I x) { return _mm256_maddubs_epi16(w, x); }
  static I add_pair8(I acc, I w, I x) {
    I products;
    asm("vpmaddubsw %[x], %[w], %[products]\n\tvpaddw %[products], %[acc], %[acc]"
        : [acc] "+x"(acc), [products] "=&x"(products)
        : [w] "x"(w), [x] "x"(x));
    return acc;
  }
  static I widen_pairs(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
};
