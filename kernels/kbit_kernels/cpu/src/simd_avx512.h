// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Sapphire Rapids, Zen 4 and later): 64 codes at a time.
// See simd_portable.h for what V must have.
#pragma once

#include <immintrin.h>
#include <utility>

#include "kernels.h"

namespace kbit {
namespace avx512 {

struct V {
  static constexpr int kFloats = 16, kCodes = 64;
  static constexpr int kTileVectors = 2;
  static constexpr int tokens(int width) { return width == 32 ? 8 : 6; }
  static constexpr int tile_columns(int width) { return width == 32 ? 256 : width == 16 ? 640 : 1024; }
  static constexpr int kByteBits = 8;
  static constexpr int kByteCodebookBits = 4;
  static constexpr bool kPairSums = false;
  static constexpr int pair_words(int, bool) { return 1; }
  static constexpr bool kCompact = kCompactBuild;

  typedef __m512 F;
  typedef __m512i I;
  typedef __m512i C;
  typedef __m512i H;

  static F set1(float a) { return _mm512_set1_ps(a); }
  static F zero() { return _mm512_setzero_ps(); }
  static I iset1(int32_t a) { return _mm512_set1_epi32(a); }
  static I izero() { return _mm512_setzero_si512(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  // Lane i: p[(phase + i) >> shift]; a vector of p is read.
  static F spread(const float* p, int phase, int shift) {
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I from = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(phase)), _mm_cvtsi32_si128(shift));
    return _mm512_permutexvar_ps(from, load(p));
  }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  template <int APART>
  static F swap(F a) { return _mm512_permute_ps(a, APART == 1 ? 0xb1 : 0x4e); }
  static void store_fourth(float* p, F a) {
    const I from = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_permutexvar_ps(from, a)));
  }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // a, and `step` more where v is above the bound.
  static I add_above(I a, int32_t step, F v, F bound) {
    return _mm512_mask_add_epi32(a, _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), a, iset1(step));
  }
  static F gather(const float* p, I at) { return _mm512_i32gather_ps(at, p, 4); }
  static void store_codes(uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float peak(F a) { return _mm512_reduce_max_ps(a); }
  static I magnitude(F a) { return _mm512_castps_si512(_mm512_abs_ps(a)); }
  static I larger(I a, I b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(I a) { return _mm512_reduce_max_epi32(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static int32_t isum(I a) {  // modulo 2^32, which the compiler's own is not
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static I round(F a) { return _mm512_cvtps_epi32(a); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static void store8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void store16(int16_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
  }

  static F load_words(const int16_t* p) {
    return to_float(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }

  template <int TYPE>
  static F load_as(const void* base, int64_t index, int n, int64_t) {
    if (TYPE == kScaleFp32) {
      const float* p = static_cast<const float*>(base) + index;
      return n == 16 ? load(p) : load_part(p, n);
    }
    const uint16_t* p = static_cast<const uint16_t*>(base) + index;
    const __m256i raw = n == 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                : _mm256_maskz_loadu_epi16(first(n), p);
    if (TYPE == kScaleFp16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static F load_bytes(const uint8_t* base, int64_t index, int n, int64_t) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), base + index)));
  }

  struct Spread { __m512i at; };
  static Spread spread(int step, int columns) {
    alignas(64) int32_t at[16];
    for (int lane = 0; lane < 16; ++lane) at[lane] = lane * columns / step;
    return {_mm512_load_si512(at)};
  }
  static F spread(const float* p, const Spread& s) {
    return _mm512_permutexvar_ps(s.at, _mm512_castps128_ps512(_mm_loadu_ps(p)));
  }

  // Byte j of qword q of the result is the 8 bits from bit `at` on of the same qword.
  template <int WIDTH, int LOW>
  struct Shifts {
    alignas(64) uint8_t at[64];
    constexpr Shifts() : at() {
      for (int i = 0; i < 64; ++i) {
        const int q = i / 8, j = i % 8, code = i % 32;
        const int bit = WIDTH == 4   ? 8 * j + 4 * (q / 2 % 2)
                        : WIDTH == 2 ? 8 * j + 2 * (q % 4)
                                     : 32 * (q / 4) + 8 * (code % 4) + code / 4;
        at[i] = static_cast<uint8_t>((bit - LOW) & 63);
      }
    }
  };
  template <class T>
  static constexpr T kConstant{};
  template <class T>
  static __m512i constant() { return _mm512_load_si512(&kConstant<T>); }

  // The fields of a plane at bit LOW of each byte; the other bits are anything.
  template <int WIDTH, int LOW, bool TAIL>
  static C field(const uint8_t* plane, int64_t unit) {
    const uint8_t* p = plane + unit * 4 * WIDTH;
    if constexpr (WIDTH == 8) {
      if (TAIL) return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      return _mm512_loadu_si512(p);
    } else {
      __m512i v;
      if constexpr (WIDTH == 4) {
        const __m256i raw =
            TAIL ? _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
                 : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        v = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), _mm512_castsi256_si512(raw));
      } else if constexpr (WIDTH == 2) {
        const __m128i raw = TAIL ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))
                                 : _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        v = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), _mm512_castsi128_si512(raw));
      } else {
        uint64_t raw = 0;
        __builtin_memcpy(&raw, p, TAIL ? 4 : 8);
        v = _mm512_set1_epi64(static_cast<int64_t>(raw));
      }
      return _mm512_multishift_epi64_epi8(constant<Shifts<WIDTH, LOW>>(), v);
    }
  }
  // a where the bits of `mask` are 0, b where they are 1.
  static C select(C a, C b, int mask) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), b, a, 0xca);
  }
  // Bits above the code are anything: tables repeat, and `clean` is for arithmetic on codes.
  template <int BITS, bool TAIL>
  static C unpack(const uint8_t* const* planes, int64_t unit) {
    constexpr bool kFour = BITS & 4, kTwo = BITS & 2, kOne = BITS & 1;
    C c = field<BITS == 8 ? 8 : kFour ? 4 : 2, kFour ? BITS & 3 : BITS & 1, TAIL>(planes[0], unit);
    if constexpr (kFour && kTwo) {
      c = select(c, field<2, kOne, TAIL>(planes[1], unit), kOne ? 7 : 3);
    }
    if constexpr (kOne && BITS > 1) {
      c = select(c, field<1, 0, TAIL>(planes[kFour && kTwo ? 2 : 1], unit), 1);
    }
    return c;
  }
  template <int BITS>
  static C clean(C c) {
    return BITS == 8 ? c : _mm512_and_si512(c, _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1)));
  }

  static constexpr int center8(int) { return 0; }
  static constexpr bool slim(int) { return false; }
  static constexpr int bias8(int) { return 128; }  // tables hold value + 128, because vpdpbusd takes unsigned bytes
  // Which code byte i of an index names in FIELD of a chunk; see `indices`.
  template <int BITS, int FIELD>
  struct FieldCodes {
    alignas(64) uint8_t at[64];
    constexpr FieldCodes() : at() {
      for (int i = 0; i < 64; ++i) {
        const int low = (FIELD + 4) % 6;
        at[i] = static_cast<uint8_t>(BITS == 2 ? i >> 2 * FIELD & 3
                                               : (i >> (FIELD < 2 ? 2 * FIELD : 2 * FIELD - 2) & 3) * 2 + (i >> low & 1));
      }
    }
  };
  template <int BITS, bool LUT>
  struct Narrow {
    // Look-ups take 6 bits: with fewer than 4 a table for every field finds its code in an index
    // that several share, and integers are looked up too.
    static constexpr int kFields = BITS < 4 ? BITS + 1 : 0;
    __m512i table, fields[kFields + 1];
    explicit Narrow(const Matrix::Tables* t, bool slim = false) {
      if (LUT) table = _mm512_xor_si512(_mm512_load_si512(slim ? t->slim : t->narrow), _mm512_set1_epi8(-128));
      else table = constant<FieldCodes<2, 0>>();
      if constexpr (!LUT && BITS == 3) {
        table = _mm512_and_si512(_mm512_set1_epi64(0x0706050403020100), _mm512_set1_epi8(7));
      }
      if constexpr (BITS < 4) set_fields(std::make_integer_sequence<int, kFields>());
    }
    template <int... FIELDS>
    void set_fields(std::integer_sequence<int, FIELDS...>) {
      ((fields[FIELDS] = _mm512_permutexvar_epi8(constant<FieldCodes<BITS, FIELDS>>(), table)), ...);
    }
    C operator()(C c) const { return LUT || BITS < 4 ? _mm512_permutexvar_epi8(c, table) : clean<BITS>(c); }
  };
  template <int BITS, bool LUT>
  static I dot8(I acc, C w, const int8_t* x) {
    return _mm512_dpbusd_epi32(acc, w, _mm512_loadu_si512(x));
  }

  // Products with one token take as many codes at once as fill a vector of the 2-bit plane, or of the
  // 4-bit plane where there is none (see order_of): planes beside it are brought to its order. With 3
  // bits it is a vector of the 1-bit plane.
  static constexpr int order(int bits) { return bits == 8 ? 0 : bits == 3 ? 3 : bits & 2 ? 2 : 1; }
  static constexpr bool digits(int) { return true; }
  static constexpr bool fine(int bits) { return bits == 5; }
  template <int SIZE, int FIELD>
  struct BitShifts {  // of the 1-bit plane, whose 4 bytes a unit are repeated SIZE / 4 times
    alignas(64) uint8_t at[64];
    constexpr BitShifts() : at() {
      for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(8 * (i % 4) + SIZE / 4 * FIELD + i % SIZE / 4);
    }
  };
  template <int SIZE, int FIELD>
  static C bits_of(C ones) {
    return _mm512_multishift_epi64_epi8(constant<BitShifts<SIZE, FIELD>>(), ones);
  }
  // The 4-bit plane: (a vector, or the first and the last 8 bytes of 8 units), the 2-bit and the 1-bit plane.
  struct Chunk { C four[2], two, one; };
  template <int BITS>
  static Chunk chunk(const uint8_t* const* planes, int64_t unit) {
    Chunk v = {{izero(), izero()}, izero(), izero()};
    int plane = 0;
    if constexpr (BITS & 4) {
      const uint8_t* p = planes[plane++] + unit * 16;
      v.four[0] = _mm512_loadu_si512(p);
      if constexpr (BITS & 2) {
        const __m512i a = v.four[0], b = _mm512_loadu_si512(p + 64);
        v.four[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
        v.four[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
      }
    }
    if constexpr (BITS & 2) v.two = _mm512_loadu_si512(planes[plane++] + unit * 8);
    if constexpr (BITS & 1) {
      const uint8_t* p = planes[plane] + unit * 4;
      if constexpr (BITS & 2) {
        v.one = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                         _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
      } else {
        v.one = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                         _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
      }
    }
    return v;
  }
  // Bytes shifted left by LEFT (right where it is negative); what crosses into a byte is left there.
  template <int LEFT>
  static C shift(C v) {
    if constexpr (LEFT == 0) return v;
    return LEFT > 0 ? _mm512_slli_epi16(v, LEFT > 0 ? LEFT : 0) : _mm512_srli_epi16(v, LEFT < 0 ? -LEFT : 0);
  }
  template <int BITS, int FIELD>
  static C dense_field(const Chunk& v) {
    constexpr int kOne = BITS & 1, kSize = BITS & 2 ? 8 : 16;
    C c;
    if constexpr (BITS & 2) {
      c = shift<kOne - 2 * FIELD>(v.two);
      if constexpr (BITS & 4) {
        constexpr int kHalf = FIELD / 2;
        c = select(shift<kOne + 2 - 4 * kHalf>(v.four[FIELD % 2]), c, kOne ? 7 : 3);
      }
    } else {
      c = shift<kOne - 4 * FIELD>(v.four[0]);
    }
    if constexpr (kOne) c = select(c, bits_of<kSize, FIELD>(v.one), 1);
    return c;
  }
  // The indices of a chunk of 3-bit codes: of the first and the last 4 columns of fields 0 and 1
  // (2 + 2 bits of their codes, then 1 + 1), and of fields 2 and 3 (1 + 1 and 2 + 2).
  static void indices(const uint8_t* const* planes, int64_t unit, C (&out)[2][2]) {
    const __m512i a = _mm512_loadu_si512(planes[0] + unit * 8), b = _mm512_loadu_si512(planes[0] + unit * 8 + 64);
    const __m512i ones = _mm512_loadu_si512(planes[1] + unit * 4);
    KBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const __m512i dwords = _mm512_add_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), _mm512_set1_epi32(half));
      const C two = _mm512_permutex2var_epi32(a, dwords, b);
      // bits 4, 5, 0, 1 are bits 0, 2, 4, 6 (in the second half 1, 3, 5, 7) of ones
      const C one = _mm512_gf2p8affine_epi64_epi8(ones, _mm512_set1_epi64(half ? 0x2080000002080000 : 0x1040000001040000), 0);
      out[half][0] = select(two, one, 0x30);
      out[half][1] = select(shift<-2>(two), one, 3);
    }
  }
  // Sums of a chunk, block after block over the lanes. DIGITS: of 256 x + low.
  template <int BITS, bool LUT, bool DIGITS, class Recode>
  static I dots(const Recode& recode, const uint8_t* const* planes, int64_t unit, const int8_t* x,
                const int8_t* low) {
    I dot = izero(), dot_low = izero();
    const auto add = [&](C w, int v) {
      dot = dot8<BITS, LUT>(dot, w, x + 64 * v);
      if (DIGITS) dot_low = dot8<BITS, LUT>(dot_low, w, low + 64 * v);
    };
    if constexpr (order(BITS) == 0) {
      add(recode(unpack<BITS, false>(planes, unit)), 0);
    } else if constexpr (BITS == 2) {
      const C two = _mm512_loadu_si512(planes[0] + unit * 8);
      KBIT_UNROLL
      for (int f = 0; f < 3; ++f) add(_mm512_permutexvar_epi8(two, recode.fields[f]), f);
      add(_mm512_permutexvar_epi8(shift<-6>(two), recode.fields[0]), 3);
    } else if constexpr (BITS == 3) {
      C index[2][2];
      indices(planes, unit, index);
      KBIT_UNROLL
      for (int v = 0; v < 8; ++v) add(_mm512_permutexvar_epi8(index[v % 2][v / 4], recode.fields[v / 2]), v);
    } else {
      const Chunk v = chunk<BITS>(planes, unit);
      add(recode(dense_field<BITS, 0>(v)), 0);
      add(recode(dense_field<BITS, 1>(v)), 1);
      if constexpr (order(BITS) == 2) {
        add(recode(dense_field<BITS, 2>(v)), 2);
        add(recode(dense_field<BITS, 3>(v)), 3);
      }
    }
    return DIGITS ? iadd(dot_low, times256(dot)) : dot;
  }
  static I times256(I a) { return _mm512_slli_epi32(a, 8); }
  template <int BLOCKS>
  static F chunk_scales(const float* p) {
    if constexpr (BLOCKS == 1) return set1(*p);
    if constexpr (BLOCKS == 8) {
      return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                   _mm512_castps256_ps512(_mm256_loadu_ps(p)));
    }
    if constexpr (BLOCKS == 2) {
      const __m128 pair = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                   _mm512_castps128_ps512(pair));
    }
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm512_castps128_ps512(_mm_loadu_ps(p)));
  }
  // The sum of each of 16 vectors.
  static F sums(const F (&a)[16]) {
    F b[8], c[4], d[2];
    KBIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      b[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    }
    KBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512d p = _mm512_castps_pd(b[2 * i]), q = _mm512_castps_pd(b[2 * i + 1]);
      c[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    KBIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      d[i] = add(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    }
    return add(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
  }

  // table[code], bytes.
  template <int BITS>
  static C look_up(const uint8_t* table, C c) {
    const C a = _mm512_load_si512(table);
    if constexpr (BITS <= 6) {
      return _mm512_permutexvar_epi8(c, a);
    } else {
      const C low = _mm512_permutex2var_epi8(a, c, _mm512_load_si512(table + 64));
      if constexpr (BITS == 7) return low;
      const C high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), c,
                                              _mm512_load_si512(table + 192));
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), low, high);
    }
  }
  // Orders of bytes in which unpacking bytes to words, or to 32 bits, restores the natural one.
  struct WordOrder {
    alignas(64) uint8_t at[64];
    constexpr WordOrder() : at() {
      for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i % 16 / 8 * 32 + i / 16 * 8 + i % 8);
    }
  };
  struct FloatOrder {
    alignas(64) uint8_t at[64];
    constexpr FloatOrder() : at() {
      for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(i % 16 / 4 * 16 + i / 16 * 4 + i % 4);
    }
  };

  template <int BITS, bool LUT>
  struct Wide {
    const Matrix::Tables* t;
    explicit Wide(const Matrix::Tables* tables) : t(tables) {}
    void operator()(C c, H (&out)[2]) const {
      if constexpr (LUT) {
        c = _mm512_permutexvar_epi8(constant<WordOrder>(), c);
        const C low = look_up<BITS>(t->wide[0], c), high = look_up<BITS>(t->wide[1], c);
        out[0] = _mm512_unpacklo_epi8(low, high);
        out[1] = _mm512_unpackhi_epi8(low, high);
      } else {
        c = clean<BITS>(c);
        out[0] = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(c));
        out[1] = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(c, 1));
      }
    }
  };
  static I dot16(I acc, H w, const int16_t* x) {
    return _mm512_dpwssd_epi32(acc, w, _mm512_loadu_si512(x));
  }

  // Byte 16 * PART + lane at the low byte of each 32-bit lane.
  template <int PART>
  struct Quarter {
    alignas(64) uint8_t at[64];
    constexpr Quarter() : at() {
      for (int i = 0; i < 64; ++i) at[i] = static_cast<uint8_t>(16 * PART + i / 4);
    }
  };
  template <int BITS, bool LUT>
  struct Floats {
    const Matrix::Tables* t;
    explicit Floats(const Matrix::Tables* tables) : t(tables) {}
    template <int PART>
    F part(C c) const {
      if constexpr (LUT) {
        const __m512i index = _mm512_permutexvar_epi8(constant<Quarter<PART>>(), c);
        if (BITS <= 4) return _mm512_permutexvar_ps(index, load(t->values));
        return _mm512_permutex2var_ps(load(t->values), index, load(t->values + 16));
      } else {  // the code in the mantissa of 2^23: no conversion
        const __m512i magic = _mm512_set1_epi32(0x4b000000);
        const __m512i bits = _mm512_mask_permutexvar_epi8(magic, 0x1111111111111111, constant<Quarter<PART>>(), c);
        return _mm512_sub_ps(_mm512_castsi512_ps(bits), set1(8388608.0f + (1 << (BITS - 1))));
      }
    }
    void operator()(C c, F (&out)[4]) const {
      if constexpr (LUT && BITS > 5) {
        c = _mm512_permutexvar_epi8(constant<FloatOrder>(), c);
        const C b0 = look_up<BITS>(t->bytes[0], c), b1 = look_up<BITS>(t->bytes[1], c);
        const C b2 = look_up<BITS>(t->bytes[2], c), b3 = look_up<BITS>(t->bytes[3], c);
        const C l01 = _mm512_unpacklo_epi8(b0, b1), h01 = _mm512_unpackhi_epi8(b0, b1);
        const C l23 = _mm512_unpacklo_epi8(b2, b3), h23 = _mm512_unpackhi_epi8(b2, b3);
        out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(l01, l23));
        out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(l01, l23));
        out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(h01, h23));
        out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(h01, h23));
      } else {
        if constexpr (!LUT) c = clean<BITS>(c);
        out[0] = part<0>(c), out[1] = part<1>(c), out[2] = part<2>(c), out[3] = part<3>(c);
      }
    }
  };

  static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    __m512i a[16], b[16];
    KBIT_UNROLL
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_stride);
    KBIT_UNROLL
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    KBIT_UNROLL
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    KBIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      // a[i], a[4+i], a[8+i], a[12+i]: column 4L+i of their four rows in 128-bit lane L
      const __m512i p = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), q = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
      const __m512i r = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), s = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
      _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(p, q, 0x88));
      _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(p, q, 0xdd));
      _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(r, s, 0x88));
      _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(r, s, 0xdd));
    }
  }

  static __m512i broadcast(const void* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
  }
  // As intrinsics, gcc copies a sum before each product.
  static I tile16(I acc, I w, I x) {
    asm("vpdpwssd %[x], %[w], %[acc]" : [acc] "+v"(acc) : [w] "v"(w), [x] "v"(x));
    return acc;
  }
  static constexpr bool kSums = true;
  typedef int32_t Word __attribute__((aligned(1), may_alias));
  // Both vectors of a tile at once, and where x is broadcast: with an order and registers of its own choice gcc spills.
#define KBIT_TILE_SUMS(ADD, PRODUCT)                                                                          \
  asm("vpbroadcastd %[x], %%zmm28\n\tvpbroadcastd %[next_x], %%zmm29\n\t"                                    \
      ADD " %%zmm28, %[next_w0], %%zmm30\n\t" ADD " %%zmm29, %[w0], %%zmm31\n\t"                             \
      PRODUCT " %%zmm31, %%zmm30, %[acc0]\n\t"                                                               \
      ADD " %%zmm28, %[next_w1], %%zmm30\n\t" ADD " %%zmm29, %[w1], %%zmm31\n\t"                             \
      PRODUCT " %%zmm31, %%zmm30, %[acc1]"                                                                    \
      : [acc0] "+v"(acc[0]), [acc1] "+v"(acc[1])                                                              \
      : [w0] "v"(w[0]), [w1] "v"(w[1]), [next_w0] "v"(next_w[0]), [next_w1] "v"(next_w[1]),                   \
        [x] "m"(reinterpret_cast<const Word*>(x)[0]), [next_x] "m"(reinterpret_cast<const Word*>(x)[1])       \
      : "xmm28", "xmm29", "xmm30", "xmm31")
  static void tile_sums(I (&acc)[kTileVectors], const I (&w)[kTileVectors], const I (&next_w)[kTileVectors],
                        const int16_t* x) {
    KBIT_TILE_SUMS("vpaddw", "vpdpwssd");
  }
  static void tile_sums(I (&acc)[kTileVectors], const I (&w)[kTileVectors], const I (&next_w)[kTileVectors],
                        const int8_t* x) {
    KBIT_TILE_SUMS("vpaddb", "vpdpbusd");
  }
#undef KBIT_TILE_SUMS
  static I cross_weights(I acc, I w, I next_w, int16_t) { return tile16(acc, w, next_w); }
  static I cross_weights(I acc, I w, I next_w, uint8_t bias) {
    const I down = _mm512_set1_epi8(static_cast<char>(-bias)), half = _mm512_set1_epi8(-128);
    return tile8(acc, _mm512_xor_si512(_mm512_add_epi8(next_w, down), half), _mm512_add_epi8(w, down));
  }
  static I cross16(I acc, I x) {
    return _mm512_add_epi32(acc, _mm512_maskz_mullo_epi32(0x3333, x, _mm512_shuffle_epi32(x, _MM_PERM_BADC)));
  }
  static I cross8(I acc, I x) {
    const I next = _mm512_shuffle_i32x4(x, x, 0xb1);
    return _mm512_add_epi32(acc, _mm512_maskz_mullo_epi32(0x0f0f, _mm512_add_epi32(x, iset1(128)), next));
  }
  static I summand8(I x, int bias) {
    return _mm512_add_epi32(x, _mm512_mask_blend_epi32(0x0f0f, iset1(-bias), iset1(128 - bias)));
  }
  static I tile8(I acc, I w, I x) {
    asm("vpdpbusd %[x], %[w], %[acc]" : [acc] "+v"(acc) : [w] "v"(w), [x] "v"(x));
    return acc;
  }
  static I pair8(I, I) { return izero(); }
  static I add_pair8(I acc, I, I) { return acc; }
  static I widen_pairs(I a) { return a; }
};

}  // namespace avx512
}  // namespace kbit
