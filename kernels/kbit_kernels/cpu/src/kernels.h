// What the instruction sets share: their function table, and the lookup tables of a codebook.
#pragma once

#include "kbit.h"

// On loops whose count is a constant and whose arrays shall be registers.
#define KBIT_UNROLL _Pragma("GCC unroll 16")

namespace kbit {

// A matrix to be quantized, and how its weights divided by scales [N, G] become codes.
struct Weights {
  const void* values;  // [N, K] of a ScaleType
  int32_t type;
  int64_t rows, cols, block;  // block: K for a row
  const int32_t* outlier_columns;
  const int32_t* first_outlier;  // [U + 1]: the first outlier of each unit of 32 columns
};
struct Rounding {
  int32_t bits;
  const float* scales;
  const uint8_t* zeros;    // [N, G], or null: `center` is added to every rounded weight
  float center;
  const float* midpoints;  // [2^bits - 1] between codebook entries, or null for integers
};

struct Kernels {
  void (*load)(const Input& input, const float* x, int64_t stride, int64_t begin, int64_t end);
  void (*load_columns)(const Input& input, const float* x, int64_t token, int64_t column, int64_t count);
  void (*multiply)(const Matrix& matrix, const Input& input, float* y, int64_t stride,
                   int64_t begin, int64_t end);
  void (*dequantize)(const Matrix& matrix, float* out, int64_t stride, int64_t begin, int64_t end);
  bool (*block_ranges)(const Weights& w, float* low, float* high, int64_t begin, int64_t end);
  void (*encode)(const Weights& w, const Rounding& how, uint8_t* codes, int64_t begin, int64_t end);
  // For a single token: the order of bytes (see order_of), and whether inputs of 16 bits lie as two
  // planes of bytes, the upper and the lower digits, for a matrix of integers.
  int32_t (*order)(int32_t bits);
  bool (*digits)(int32_t bits);
  // Whether integers of that width take 8-bit inputs with a scale a lane (many tokens: a piece) also for
  // kBf16Prompt: they add less than 2 percent to the weights' own error there
  // (results/arithmetic-*.json).
  bool (*fine)(int32_t bits);
  int64_t (*tokens_at_once)(int32_t width);  // that a tile is multiplied with
  int64_t sums_tokens;  // from so many on (0: never) tiles may multiply sums (Input::summed)
  int64_t amx_tokens;  // from so many on (0: never) rounded inputs are Input::panels
  // From this many tokens on, `multiply` unpacks tiles of rows. They take 8-bit inputs with integer
  // weights of up to `byte_bits` bits and with codebooks of up to `byte_codebook_bits`, else 16-bit ones.
  int64_t tile_tokens;
  int32_t byte_bits;
  int32_t byte_codebook_bits;
};

// Null where the compiler or the target cannot build them.
extern const Kernels* const portable_kernels;
extern const Kernels* const avx2_kernels;
extern const Kernels* const avxvnni_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const amx_kernels;
extern const Kernels* const neon_kernels;
const Kernels* kernels_of(Isa isa);

// Bounds on integer weights and inputs: the products of 64 columns fit in 31 bits.
constexpr int kNarrowLimit = 127;     // int8 weights and inputs
// Of codebooks of 2 and 3 bits where pairs of products, of unsigned weights, are summed in 16 bits (two
// of 2 bits, one of 3), or where weights are added to inputs in 8.
constexpr int slim_limit(int bits) { return bits == 2 ? 31 : 47; }
constexpr int kWideWeights = 4095;    // int16 codebook values ...
constexpr int kWideInputs = 8191;     // ... times int16 inputs
constexpr int kWordInputs = 32767 - 255;  // times codes; so that a code may be added
constexpr int kDigitInputs = 127 * 257;  // inputs in two bytes, each with its sign
constexpr int kNarrowEntries = 16;    // larger codebooks take 16-bit values and inputs

// Fewer, slower variants of each kernel: for builds under sanitizers, which take long.
#ifdef KBIT_COMPACT
constexpr bool kCompactBuild = true;
#else
constexpr bool kCompactBuild = false;
#endif

constexpr int kStep = 64;  // columns of one step of a kernel; inputs are padded to it
constexpr int kPieces = 4;  // of a block of 64 columns: piece p has columns 4p to 4p + 3 of every 16

// The part of a V (see simd_portable.h) that cannot multiply sums: names for code that is never reached.
struct NoSums {
  static constexpr bool kSums = false;
  template <class... A>
  static inline __attribute__((always_inline)) void tile_sums(const A&...) {}
  template <class I, class... A>
  static inline __attribute__((always_inline)) I cross_weights(I acc, A...) { return acc; }
  template <class I>
  static inline __attribute__((always_inline)) I cross16(I acc, I) { return acc; }
  template <class I>
  static inline __attribute__((always_inline)) I cross8(I acc, I) { return acc; }
  template <class I>
  static inline __attribute__((always_inline)) I summand8(I x, int) { return x; }
};

// How far ahead codes and scales are asked for, in bytes. Processors see neither stream coming in
// time: a row is short, and a page ends after 4 KB. Scales matter as much as codes, since a row
// waits for them.
constexpr int64_t kCodesAhead = 2048, kScalesAhead = 1024;
// Whether a single token's codes are better asked for past the second-level cache: measured on AMD's
// Zen 5, where decoding is 1.1 times as fast; two steps, the first into that cache, on Intel's Xeon.
extern const bool kPastSecondLevel;

// Whether tiles multiply sums where they can: on AMD's processors, which add on four vector
// pipes and multiply on two. Intel's add 512 bits on the two that multiply. Tests try both.
extern bool multiply_sums;

// In which order the bytes of a single token's inputs lie, so that the fields of a whole vector of a
// plane meet theirs: 0 natural, 1 and 2 as fields of 4 and 2 bits come out of it, 3 as both halves of
// the latter. A vector of a plane is a chunk of columns; field f of unit u (32 columns) of a chunk
// then stands at piece u of vector f. What is left at the end of a row has natural order.
constexpr int order_of(int bits) { return bits == 4 ? 1 : bits < 4 ? 2 : 0; }
constexpr int piece_of(int order) { return 32 >> order; }  // columns of a field of a unit

// A codebook as the kernels look it up; entry i repeats at i + 2^bits, so that bits above the code
// need no mask. `xor` tables serve byte shuffles of 16 entries: entry (j, i) holds
// table[16j+i] ^ table[16(j-1)+i], except that chains start anew at 0 and 128; looking up a code
// then is the xor of the shuffles j = 0 .. code/16, the later ones yielding 0.
struct Matrix::Tables {
  alignas(64) float values[256];
  alignas(64) int8_t narrow[64];        // up to 16 entries: value ~ narrow * narrow_scale
  alignas(64) int8_t slim[64];          // up to 8 entries, within slim_limit
  alignas(64) uint8_t wide[2][256];     // bytes, low first, of int16: value ~ wide * wide_scale
  alignas(64) uint8_t wide_xor[2][256];
  alignas(64) uint8_t bytes[4][256];    // bytes, low first, of `values`
  alignas(64) uint8_t bytes_xor[4][256];
  float narrow_scale, slim_scale, wide_scale;
};

}  // namespace kbit
