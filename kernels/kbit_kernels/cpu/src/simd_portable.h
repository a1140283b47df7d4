// Portable vectors: plain loops over small arrays, which compilers turn into SSE2 or NEON.
//
// The three simd_*.h files define the same struct V, and the kernels are written once against it:
//   F, I, C, H    kFloats fp32; kFloats int32; kCodes bytes; 2 * kFloats int16
//   unpack        one C of codes in natural order from the planes of a row; TAIL: only the first
//                 32 of them exist in memory
//   narrow        codes -> 8-bit weights, center8 or bias8 beside their value, and dot8 with int8
//   wide          codes -> 16-bit weights, and dot16 with int16
//   floats        codes -> fp32 weights without their scale
//   tile16, tile8 sums of 32-bit lanes += 2 columns (tile8: 4) of vectors of rows times a token's
//   tile_sums     with kSums (see Way in tile.inl): sums of the vectors of a tile += (w + next_x) (next_w + x), in lanes
//                 of 16 bits or, where weights are unsigned and have `bias` too much, of 8: there the second factor
//                 is unsigned, and 128 too much, which `summand8` sees to when x is rounded
//   cross_weights, cross16, cross8: sums += what such products have too much of weights, or of rounded x
//   dots          one token: the products of a chunk of codes, recoded; `digits`: of inputs in two
//                 bytes, `fine`: of bytes with a scale for every lane of dot8 (which then sums 4);
//                 chunk_scales spreads its blocks' scales over the lanes; sums of kFloats F
// A lane of dot8 sums kCodes / kFloats neighbouring columns, a lane of dot16 sums 2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace kbit {
namespace portable {

struct V : NoSums {
  static constexpr int kFloats = 4, kCodes = 32;
  static constexpr int kTileVectors = 2;
  static constexpr int tokens(int) { return 4; }
  static constexpr int tile_columns(int width) { return width == 32 ? 256 : 512; }
  static constexpr int kByteBits = 0;  // bits of codes that tile8 takes
  static constexpr int kByteCodebookBits = 0;
  // Whether add_pair8, on what pair8 makes, sums pairs in 16 bits, which hold those of pair_words words.
  static constexpr bool kPairSums = false;
  static constexpr int pair_words(int, bool) { return 1; }
  static constexpr bool kCompact = true;  // fewer, slower variants of a kernel: less to compile

  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  struct C { uint8_t v[32]; };
  struct H { int16_t v[8]; };

  static F set1(float a) { return F{a, a, a, a}; }
  static F zero() { return set1(0); }
  static I iset1(int32_t a) { return I{a, a, a, a}; }
  static I izero() { return I{0, 0, 0, 0}; }
  static F load(const float* p) { F a; std::memcpy(&a, p, sizeof a); return a; }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  // Lane i: p[(phase + i) >> shift]; a vector of p is read.
  static F spread(const float* p, int phase, int shift) {
    F a;
    for (int i = 0; i < kFloats; ++i) a[i] = p[(phase + i) >> shift];
    return a;
  }
  static F load_part(const float* p, int n) {
    F a = zero();
    std::memcpy(&a, p, sizeof(float) * static_cast<size_t>(n));
    return a;
  }
  static void store_part(float* p, F a, int n) {
    std::memcpy(p, &a, sizeof(float) * static_cast<size_t>(n));
  }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  template <int APART>  // lane i: lane i ^ APART, 1 or 2
  static F swap(F a) { return APART == 1 ? F{a[1], a[0], a[3], a[2]} : F{a[2], a[3], a[0], a[1]}; }
  static void store_fourth(float* p, F a) { *p = a[0]; }  // every fourth lane
  static F min(F a, F b) { return a < b ? a : b; }
  // a, and `step` more where v is above the bound.
  static I add_above(I a, int32_t step, F v, F bound) { return a + ((v > bound) & iset1(step)); }
  static F gather(const float* p, I at) { return F{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}; }
  static void store_codes(uint8_t* p, I a) { for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(a[i]); }
  static F abs(F a) { for (int i = 0; i < 4; ++i) a[i] = std::fabs(a[i]); return a; }
  static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static float peak(F a) { return std::fmax(std::fmax(a[0], a[1]), std::fmax(a[2], a[3])); }
  static I magnitude(F a) { return reinterpret_cast<I>(a) & 0x7fffffff; }  // the bits of |a|
  static I larger(I a, I b) { return a > b ? a : b; }
  static int32_t largest(I a) {
    for (int i = 1; i < 4; ++i) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
  }
  static F to_float(I a) { return __builtin_convertvector(a, F); }
  static int32_t isum(I a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static I round(F a) {  // below 2^22
    const F big = set1(12582912.0f);  // 1.5 * 2^23, beside which no fractions are left
    return __builtin_convertvector(a + big - big, I);
  }
  static I iadd(I a, I b) { return a + b; }
  static void store8(int8_t* p, I a) { for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(a[i]); }
  static void store16(int16_t* p, I a) { for (int i = 0; i < 4; ++i) p[i] = static_cast<int16_t>(a[i]); }

  static F load_words(const int16_t* p) {
    F a;
    for (int i = 0; i < 4; ++i) a[i] = p[i];
    return a;
  }
  static float half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t pattern;
    if (rest >= 0x7c00) {
      pattern = 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
      pattern = (rest << 13) + ((127 - 15) << 23);
    } else {  // zero or subnormal: exact as an integer times 2^-24
      const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
      std::memcpy(&pattern, &value, sizeof pattern);
    }
    pattern |= sign;
    float value;
    std::memcpy(&value, &pattern, sizeof value);
    return value;
  }
  // n <= kFloats values from `index` on of an array of `total`; the rest 0.
  template <int TYPE>
  static F load_as(const void* base, int64_t index, int n, int64_t) {
    F a = zero();
    if (TYPE == kScaleFp32) return load_part(static_cast<const float*>(base) + index, n);
    const auto* p = static_cast<const uint16_t*>(base) + index;
    for (int i = 0; i < n; ++i) {
      const uint32_t pattern = static_cast<uint32_t>(p[i]) << 16;
      float wide;
      std::memcpy(&wide, &pattern, sizeof wide);
      a[i] = TYPE == kScaleFp16 ? half(p[i]) : wide;
    }
    return a;
  }
  static F load_bytes(const uint8_t* base, int64_t index, int n, int64_t) {
    F a = zero();
    for (int i = 0; i < n; ++i) a[i] = base[index + i];
    return a;
  }

  // The scale of each lane, from scales of `step` columns, where a lane holds `columns` columns.
  struct Spread { int at[4]; };
  static Spread spread(int step, int columns) {
    return {{0, columns / step, 2 * columns / step, 3 * columns / step}};
  }
  static F spread(const float* p, const Spread& s) {
    return F{p[s.at[0]], p[s.at[1]], p[s.at[2]], p[s.at[3]]};
  }

  // not inlined: hundreds of kernels use them, and calls are the least of this path's cost
  template <int BITS, bool TAIL>
  static __attribute__((noinline)) C unpack(const uint8_t* const* planes, int64_t unit) {
    C c{};
    int low = BITS, plane = 0;
    for (int width = 8; width >= 1; width /= 2) {
      if (!(BITS & width)) continue;
      low -= width;
      const uint8_t* p = planes[plane++] + unit * 4 * width;
      for (int field = 0; field < 8 / width; ++field) {
        for (int i = 0; i < 4 * width; ++i) {
          c.v[field * 4 * width + i] |=
              static_cast<uint8_t>(((p[i] >> (field * width)) & ((1 << width) - 1)) << low);
        }
      }
    }
    return c;
  }

  static constexpr int center8(int bits) { return 1 << (bits - 1); }
  static constexpr bool slim(int) { return false; }  // whether a codebook's bytes are Tables::slim
  static constexpr int bias8(int) { return 0; }
  template <int BITS, bool LUT>
  struct Narrow {
    const int8_t* table;
    explicit Narrow(const Matrix::Tables* t) : table(LUT ? t->narrow : nullptr) {}
    __attribute__((noinline)) C operator()(C c) const {
      for (uint8_t& v : c.v) {
        v = static_cast<uint8_t>(LUT ? table[v] : v - center8(BITS));
      }
      return c;
    }
  };
  template <int BITS, bool LUT>
  static I dot8(I acc, const C& w, const int8_t* x) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 8 * lane; i < 8 * lane + 8; ++i) acc[lane] += static_cast<int8_t>(w.v[i]) * x[i];
    }
    return acc;
  }

  // Products with one token: as those with more.
  static constexpr int order(int) { return 0; }
  static constexpr bool digits(int) { return false; }
  static constexpr bool fine(int) { return false; }
  template <int BITS, bool LUT, bool DIGITS, class Recode>
  static I dots(const Recode& recode, const uint8_t* const* planes, int64_t unit, const int8_t* x,
                const int8_t*) {
    const I dot = dot8<BITS, LUT>(izero(), recode(unpack<BITS, false>(planes, unit)), x);
    return dot8<BITS, LUT>(dot, recode(unpack<BITS, false>(planes, unit + 1)), x + 32);
  }
  static I times256(I a) { return a * 256; }
  template <int BLOCKS>
  static F chunk_scales(const float* p) { return set1(*p); }
  static F sums(const F (&a)[4]) { return F{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}; }

  template <int BITS, bool LUT>
  struct Wide {
    const Matrix::Tables* t;
    explicit Wide(const Matrix::Tables* tables) : t(tables) {}
    __attribute__((noinline)) void operator()(const C& c, H (&out)[4]) const {
      for (int i = 0; i < 32; ++i) {
        const int code = c.v[i];
        out[i / 8].v[i % 8] = static_cast<int16_t>(
            LUT ? t->wide[0][code] | t->wide[1][code] << 8 : code);
      }
    }
  };
  static I dot16(I acc, const H& w, const int16_t* x) {
    for (int lane = 0; lane < 4; ++lane) {
      acc[lane] += w.v[2 * lane] * x[2 * lane] + w.v[2 * lane + 1] * x[2 * lane + 1];
    }
    return acc;
  }

  template <int BITS, bool LUT>
  struct Floats {
    const float* values;
    explicit Floats(const Matrix::Tables* t) : values(LUT ? t->values : nullptr) {}
    __attribute__((noinline)) void operator()(const C& c, F (&out)[8]) const {
      for (int i = 0; i < 32; ++i) {
        out[i / 4][i % 4] = LUT ? values[c.v[i]] : static_cast<float>(c.v[i] - (1 << (BITS - 1)));
      }
    }
  };

  // Tiles: out[i][j] = in[j][i] of kFloats x kFloats 32-bit words.
  static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) out[i * out_stride + j] = in[j * in_stride + i];
    }
  }
  static I broadcast(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return I{word, word, word, word};
  }
  static I tile8(I acc, I, I) { return acc; }  // kByteBits is 0
  static I pair8(I, I) { return izero(); }
  static I add_pair8(I acc, I, I) { return acc; }
  static I widen_pairs(I a) { return a; }
  static I tile16(I acc, I w, I x) {
    int16_t a[8], b[8];
    std::memcpy(a, &w, sizeof a);
    std::memcpy(b, &x, sizeof b);
    for (int lane = 0; lane < 4; ++lane) acc[lane] += a[2 * lane] * b[2 * lane] + a[2 * lane + 1] * b[2 * lane + 1];
    return acc;
  }
};

}  // namespace portable
}  // namespace kbit
