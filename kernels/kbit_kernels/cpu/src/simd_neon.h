// NEON, which every aarch64 has, and its dot products of bytes where the compiler may use them: 32 codes
// at a time. What takes no time is simd_portable.h's. See there for what V must have.

struct V : portable::V {
  static constexpr bool kCompact = kCompactBuild;

  struct C { uint8x16_t v[2]; };
  typedef int16x8_t H;

  static F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
  static I round(F a) { return (I)vcvtnq_s32_f32((float32x4_t)a); }
  template <int TYPE>
  static F load_as(const void* base, int64_t index, int n, int64_t total) {
    if (TYPE == kScaleFp32 || n < kFloats) return portable::V::load_as<TYPE>(base, index, n, total);
    const uint16x4_t bits = vld1_u16(static_cast<const uint16_t*>(base) + index);
    if (TYPE == kScaleFp16) return (F)vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return (F)vshlq_n_u32(vmovl_u16(bits), 16);
  }

  // Bits [0, BITS) of each byte, moved up by LOW.
  template <int BITS, int LOW>
  static uint8x16_t field(uint8x16_t a) {
    return vshlq_n_u8(vandq_u8(a, vdupq_n_u8((1 << BITS) - 1)), LOW);
  }
  // The shifts, to the right, that bring out the fields of a plane whose SIZE bytes a unit are repeated.
  template <int SIZE>
  struct Shifts {
    int8_t at[32];
    constexpr Shifts() : at() {
      for (int i = 0; i < 32; ++i) at[i] = static_cast<int8_t>(-(i / SIZE) * (SIZE / 4));
    }
  };
  template <int SIZE>
  static int8x16_t shifts(int n) {
    static constexpr Shifts<SIZE> kShifts;
    return vld1q_s8(kShifts.at + 16 * n);
  }
  template <int BITS, bool TAIL>
  static C unpack(const uint8_t* const* planes, int64_t unit) {
    C c = {{vdupq_n_u8(0), vdupq_n_u8(0)}};
    int plane = 0;
    if constexpr (BITS == 8) {
      const uint8_t* p = planes[plane] + unit * 32;
      return {{vld1q_u8(p), vld1q_u8(p + 16)}};
    }
    if constexpr (BITS & 4) {
      const uint8x16_t a = vld1q_u8(planes[plane++] + unit * 16);
      c = {{field<4, BITS & 3>(a), vshlq_n_u8(vshrq_n_u8(a, 4), BITS & 3)}};
    }
    if constexpr (BITS & 2) {
      const uint8x8_t half = vld1_u8(planes[plane++] + unit * 8);
      const uint8x16_t a = vcombine_u8(half, half);
      for (int n = 0; n < 2; ++n) c.v[n] = vorrq_u8(c.v[n], field<2, BITS & 1>(vshlq_u8(a, shifts<8>(n))));
    }
    if constexpr (BITS & 1) {
      uint32_t word;
      std::memcpy(&word, planes[plane] + unit * 4, 4);
      const uint8x16_t a = vreinterpretq_u8_u32(vdupq_n_u32(word));
      for (int n = 0; n < 2; ++n) c.v[n] = vorrq_u8(c.v[n], field<1, 0>(vshlq_u8(a, shifts<4>(n))));
    }
    return c;
  }

  // The bytes of a table of 2^BITS, of 16 at least.
  template <int BITS>
  static uint8x16_t look_up(const uint8_t* table, uint8x16_t c) {
    if constexpr (BITS <= 4) return vqtbl1q_u8(vld1q_u8(table), c);
    if constexpr (BITS == 5) return vqtbl2q_u8({{vld1q_u8(table), vld1q_u8(table + 16)}}, c);
    uint8x16_t found = vdupq_n_u8(0);
    for (int at = 0; at < 1 << BITS; at += 64) {
      const uint8_t* p = table + at;
      const uint8x16x4_t part = {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
      found = vqtbx4q_u8(found, part, vsubq_u8(c, vdupq_n_u8(static_cast<uint8_t>(at))));
    }
    return found;
  }

  template <int BITS, bool LUT>
  struct Narrow {
    uint8x16_t table;
    explicit Narrow(const Matrix::Tables* t)
        : table(LUT ? vld1q_u8(reinterpret_cast<const uint8_t*>(t->narrow)) : vdupq_n_u8(center8(BITS))) {}
    C operator()(C c) const {
      for (uint8x16_t& v : c.v) v = LUT ? vqtbl1q_u8(table, v) : vsubq_u8(v, table);
      return c;
    }
  };
  // Sums of 4 neighbours: [columns 0..3, 4..7, 8..11, 12..15].
  static int32x4_t fours(uint8x16_t w, const int8_t* x) {
    const int8x16_t a = vreinterpretq_s8_u8(w), b = vld1q_s8(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdupq_n_s32(0), a, b);
#else
    return vpaddlq_s16(vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
#endif
  }
  template <int BITS, bool LUT>
  static I dot8(I acc, const C& w, const int8_t* x) {
    return acc + (I)vpaddq_s32(fours(w.v[0], x), fours(w.v[1], x + 16));
  }
  template <int BITS, bool LUT, bool DIGITS, class Recode>
  static I dots(const Recode& recode, const uint8_t* const* planes, int64_t unit, const int8_t* x,
                const int8_t*) {
    const I dot = dot8<BITS, LUT>(izero(), recode(unpack<BITS, false>(planes, unit)), x);
    return dot8<BITS, LUT>(dot, recode(unpack<BITS, false>(planes, unit + 1)), x + 32);
  }

  template <int BITS, bool LUT>
  struct Wide {
    const Matrix::Tables* t;
    explicit Wide(const Matrix::Tables* tables) : t(tables) {}
    void operator()(const C& c, H (&out)[4]) const {
      for (int n = 0; n < 2; ++n) {
        uint8x16_t low = c.v[n], high = vdupq_n_u8(0);
        if constexpr (LUT) low = look_up<BITS>(t->wide[0], c.v[n]), high = look_up<BITS>(t->wide[1], c.v[n]);
        out[2 * n] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
        out[2 * n + 1] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
      }
    }
  };
  static I pairs16(int16x8_t a, int16x8_t b) {
    return (I)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
  }
  static I dot16(I acc, H w, const int16_t* x) { return acc + pairs16(w, vld1q_s16(x)); }
  static I tile16(I acc, I w, I x) { return acc + pairs16((int16x8_t)w, (int16x8_t)x); }

  template <int BITS, bool LUT>
  struct Floats {
    const Matrix::Tables* t;
    explicit Floats(const Matrix::Tables* tables) : t(tables) {}
    void operator()(const C& c, F (&out)[8]) const {
      for (int n = 0; n < 2; ++n) {
        uint8x16_t bytes[4] = {c.v[n], vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
        if constexpr (LUT) {
          for (int b = 0; b < 4; ++b) bytes[b] = look_up<BITS>(t->bytes[b], c.v[n]);
        }
        const uint16x8_t low[2] = {vreinterpretq_u16_u8(vzip1q_u8(bytes[0], bytes[1])),
                                   vreinterpretq_u16_u8(vzip2q_u8(bytes[0], bytes[1]))};
        const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(bytes[2], bytes[3])),
                                    vreinterpretq_u16_u8(vzip2q_u8(bytes[2], bytes[3]))};
        for (int i = 0; i < 4; ++i) {
          const uint16x8_t word = i % 2 ? vzip2q_u16(low[i / 2], high[i / 2]) : vzip1q_u16(low[i / 2], high[i / 2]);
          const int32x4_t code = vsubq_s32(vreinterpretq_s32_u16(word), vdupq_n_s32(1 << (BITS - 1)));
          out[4 * n + i] = LUT ? (F)word : (F)vcvtq_f32_s32(code);
        }
      }
    }
  };
};
