// The interface of kbit's native CPU code: matrices, their inputs, and products of the two.
//
// Shapes: a matrix is [N, K] (output rows, input columns), an input is T tokens of K values, a
// product is y [T, N]. All values at the boundary are fp32. Nothing here starts threads or locks:
// any number of threads may call `multiply` on disjoint row ranges of one matrix and one input.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kbit {

// Raised with every change of the C ABI, its enums and structs: Python asks for it, because a library
// that an older checkout built stays where it is.
constexpr int32_t kAbi = 5;

// How a matrix is stored. The numbers are part of the C ABI.
enum Storage : int32_t {
  kInt = 0,       // value = (code - 2^(bits-1)) * scale
  kUint = 1,      // value = (code - zero) * scale
  kCodebook = 2,  // value = codebook[code] * scale (+ mean)
  kFp32 = 3,      // plain matrices: `codes` points to N*K values, row by row
  kFp16 = 4,
  kBf16 = 5,
};

enum ScaleType : int32_t { kScaleFp32 = 0, kScaleFp16 = 1, kScaleBf16 = 2, kScaleDouble = 3 };

// float: weights dequantized in registers, fp32 sums. int8: inputs rounded to 8 bits a block, integer
// dot products; where 16 bits cost no more (codebooks of more than 16 entries, many tokens without
// an instruction for bytes) inputs and weights have 16; many tokens with AMX: both are bf16. int16:
// 16 bits everywhere; its error is some 100 times smaller than int8's. bf16: int16, but of up to 6 bits
// int8's bf16 where that takes it, a prompt's attention in bf16, and for integers of 5 bits 8 with a
// scale for every 8 columns or fewer (a single token) or every 16 (from 5 tokens on).
// Plain matrices always use float.
enum Arithmetic : int32_t { kFloat = 0, kInt8 = 1, kInt16 = 2, kBf16Prompt = 3 };

// kAvxVnni: AVX2 and its products of bytes. kAmx: as kAvx512, but for many tokens.
enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAmx = 4, kNeon = 5 };

// The fastest instruction set of this machine, and whether `isa` can run here.
Isa best_isa();
bool isa_available(Isa isa);
// Whether AVX-512 multiplies bf16 here (Sapphire Rapids, Zen 4 and later).
bool has_avx512_bf16();

// A matrix as it lies in a checkpoint: pointers into memory-mapped parts, nothing owned. The layout
// of `codes` is that of kbit_kernels/packing.py. Unused pointers are null.
struct Tensor {
  int64_t rows, cols;
  int32_t storage;     // Storage
  int32_t bits;        // 2..8 (plain matrices: ignored)
  int32_t block;       // weights of a row that share a scale; 0: the whole row
  int32_t scale_type;  // ScaleType of scales; of means too, unless kScaleDouble
  int32_t mean_type;   // ScaleType of means
  int32_t n_outliers;
  const void* codes;                // [N, ceil(K/32) * 4 * bits] bytes
  const void* scales;               // [N, G]
  const uint8_t* zeros;             // [N, G], kUint
  const void* means;                // [N, G] or null
  const float* codebook;            // [2^bits], kCodebook
  const float* scale_absmax;        // [ceil(N*G/256)], kScaleDouble
  const float* scale_offset;        // [1], kScaleDouble
  const float* scale_codebook;      // [256], kScaleDouble
  const int32_t* outlier_columns;   // [J] ascending
  const uint16_t* outliers;         // [N, J] fp16
};

struct Kernels;  // one instruction set's functions (kernels.h)
class Input;

// A tensor checked and made ready to multiply: small tables, no copy of the weights. The tensor's
// parts must outlive it. Immutable, shared freely between threads.
class Matrix {
 public:
  // Throws std::invalid_argument with one plain sentence if the tensor is malformed or `isa` is not
  // available here.
  explicit Matrix(const Tensor& tensor, Isa isa = best_isa());
  ~Matrix();
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  int64_t rows() const { return tensor.rows; }
  int64_t cols() const { return tensor.cols; }
  bool plain() const { return tensor.storage >= kFp32; }
  // Bytes that a product with one token reads of the weights.
  int64_t bytes() const;
  // Whether an Input made for `other` may be multiplied with this matrix too (then q, k and v, or
  // gate and up, share one).
  bool same_input(const Matrix& other) const;

  Tensor tensor;
  Isa isa;
  const Kernels* kernels;
  int32_t step;    // columns that share a scale inside the kernels: min(block, 64), 64 for a row
  int32_t groups;  // G
  struct Tables;   // lookup tables of the codebook, by arithmetic
  const Tables* tables;
};

// The activations of T tokens, prepared for one arithmetic and for matrices of the same_input.
// Reused from step to step: memory grows to the largest T seen and stays.
class Input {
 public:
  Input() = default;
  ~Input();
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  // Room for `tokens` tokens of `matrix`. One thread; before `load`.
  void shape(const Matrix& matrix, Arithmetic arithmetic, int64_t tokens);
  // Prepares tokens [begin, end) from x[token * stride]. Threads may share the tokens; for a single
  // token it costs about as much as a norm, so that a thread may as well fill an Input of its own
  // instead of waiting at a barrier. NaN and infinity pass on to the products.
  void load(const float* x, int64_t stride, int64_t begin, int64_t end);
  // Columns [column, column + count) of a token from x[0, count): multiples of 64, but for the last columns, whose x
  // has zeros up to one.
  bool loads_columns() const {
    return matrix->tensor.n_outliers == 0 && (together > 1 || (panels && !digits));
  }
  void load_columns(const float* x, int64_t token, int64_t column, int64_t count);

  // Where a token's columns and blocks begin; the next 64 columns, and the next block, come `together` times that later.
  int64_t values_of(int64_t token) const { return (token / together * padded * together) + token % together * 64; }
  int64_t blocks_of(int64_t token) const { return (token / together * blocks * together) + token % together; }
  // The same of outlier columns.
  int64_t outliers_of(int64_t token) const {
    return (token / outlier_together * outlier_room * outlier_together) + token % outlier_together * 64;
  }

  const Matrix* matrix = nullptr;
  Arithmetic arithmetic = kFloat;
  int64_t tokens = 0;
  int64_t padded = 0;          // K rounded up to 64, or to more; the padding is zero
  int32_t width = 0;           // bits of a value: 32 (kFloat), 8, or 16 (see kInt8)
  int32_t limit = 0;           // the largest magnitude of an integer value
  int32_t order = 0;           // of bytes; see order_of
  bool digits = false;         // 16-bit values of a single token, or of panels, as two planes of bytes, the upper first
  bool fine = false;           // a single token's bytes have a scale for each lane of a product, in `lanes`
  bool pieces = false;         // tokens' bytes have a scale for each piece of a block, in `lanes`
  bool summed = false;         // tokens' integers are for products of sums (see Way in tile.inl)
  // As many tokens as a tile is multiplied with at once lie together, 64 columns of each after the other: products read
  // memory in order, and what computes few columns of many tokens writes to few places. Others lie one by one.
  int64_t together = 1;
  bool panels = false;         // for AMX: bf16, or two planes of bytes a token; see amx.inl
  void* values = nullptr;      // [T / together, padded / 64, together, 64] float, int8_t, 16 bits or two bytes
  int64_t blocks = 0;          // padded / step, and zeros up to whole vectors
  float* scales = nullptr;     // [T / together, blocks, together], integers only; 1 where there are `lanes`
  float* lanes = nullptr;      // fine: a vector for each vector of sums of a row; pieces: kPieces for each of `scales`
  float* sums = nullptr;       // as `scales`, of the values as they were rounded
  int32_t* begins = nullptr;   // as `scales`, what sums of integers begin with (see Tile)
  float* outliers = nullptr;   // [T / outlier_together, outlier_room / 64, outlier_together, 64]: the values of the outlier
                               // columns, which are 0 above
  int64_t outlier_together = 1, outlier_room = 0;

 private:
  void* memory_ = nullptr;
  size_t capacity_ = 0;
};

// y[t * stride + n] = sum_k input[t, k] * matrix[n, k], for all tokens and rows [begin, end). Any
// range works; multiples of 32 are fastest. Overwrites y.
void multiply(const Matrix& matrix, const Input& input, float* y, int64_t stride, int64_t begin,
              int64_t end);

// Asks for what `multiply` will read first of rows [begin, end), so that it does not start cold.
void prefetch(const Matrix& matrix, int64_t begin, int64_t end);

// out[(n - begin) * stride + k] = the weight as the reference computes it, rows [begin, end); an
// embedding is a row of it.
void dequantize(const Matrix& matrix, float* out, int64_t stride, int64_t begin, int64_t end);

}  // namespace kbit
