// Runs every product over buffers that end right before a page that may not be touched, through the
// C ABI, and holds the results to a plain loop over the dequantized weights. Linked with the
// installed library, or with sources under sanitizers. Argument: take every n-th case only.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "guarded.h"
#include "kbit.h"
#include "pool.h"

struct Error {
  char text[256];
};
extern "C" {
int32_t kbit_isa_available(int32_t isa);
int32_t kbit_multiply_sums(int32_t on);
kbit::Pool* kbit_pool_new(int32_t threads, Error* error);
void kbit_pool_free(kbit::Pool* pool);
kbit::Matrix* kbit_matrix_new(const kbit::Tensor* tensor, int32_t isa, Error* error);
void kbit_matrix_free(kbit::Matrix* matrix);
int32_t kbit_linear(const kbit::Matrix* matrix, kbit::Pool* pool, int32_t arithmetic, const float* x,
                    int64_t tokens, const float* bias, float* y, Error* error);
void kbit_dequantize(const kbit::Matrix* matrix, kbit::Pool* pool, float* out);
int32_t kbit_block_ranges(kbit::Pool* pool, int32_t isa, const void* w, int32_t type, int64_t rows,
                          int64_t cols, int64_t block, const int32_t* outlier_columns,
                          int64_t n_outliers, float* low, float* high);
void kbit_encode(kbit::Pool* pool, int32_t isa, const void* w, int32_t type, int64_t rows,
                 int64_t cols, int64_t block, const int32_t* outlier_columns, int64_t n_outliers,
                 int32_t bits, const float* scales, const uint8_t* zeros, float center,
                 const float* midpoints, uint8_t* codes);
}

namespace {

// fp16, bf16 or fp32 patterns of numbers from 0.25 to 1.
void fill_scales(void* at, size_t count, int type) {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = next();
    if (type == kbit::kScaleFp32) static_cast<float*>(at)[i] = 0.25f + (bits >> 8) / 22369622.0f;
    else if (type == kbit::kScaleFp16) static_cast<uint16_t*>(at)[i] = static_cast<uint16_t>(0x3400 + bits % 0x800);
    else if (type == kbit::kScaleBf16) static_cast<uint16_t*>(at)[i] = static_cast<uint16_t>(0x3e80 + bits % 0x100);
    else static_cast<uint8_t*>(at)[i] = static_cast<uint8_t>(bits >> 24);
  }
}

Guarded codes, scales, zeros, means, codebook, absmax, offset, columns, outliers, inputs, outputs, weights, expected;
float scale_codebook[256];

struct Case {
  int isa, storage, bits, block;
  int64_t rows, cols, tokens;
};

bool run(const Case& c, kbit::Pool* pool) {
  const size_t rows = static_cast<size_t>(c.rows), cols = static_cast<size_t>(c.cols);
  const size_t n = rows * cols, tokens = static_cast<size_t>(c.tokens);
  kbit::Tensor t{};
  t.rows = c.rows, t.cols = c.cols, t.storage = c.storage, t.bits = c.bits, t.block = c.block;
  if (c.storage >= kbit::kFp32) {
    const int type = c.storage - kbit::kFp32;
    void* at = type == 0 ? static_cast<void*>(codes.last<float>(n)) : codes.last<uint16_t>(n);
    fill_scales(at, n, type);
    t.codes = at;
  } else {
    const size_t bytes = rows * ((cols + 31) / 32) * 4 * static_cast<size_t>(c.bits);
    uint8_t* packed = codes.last<uint8_t>(bytes);
    for (size_t i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(next() >> 24);
    t.codes = packed;
    const size_t block = c.block ? static_cast<size_t>(c.block) : cols;
    const size_t groups = rows * ((cols + block - 1) / block);
    t.scale_type = static_cast<int>(next(4)), t.mean_type = static_cast<int>(next(3));
    t.scales = t.scale_type == kbit::kScaleFp32     ? static_cast<void*>(scales.last<float>(groups))
               : t.scale_type == kbit::kScaleDouble ? static_cast<void*>(scales.last<uint8_t>(groups))
                                                    : scales.last<uint16_t>(groups);
    fill_scales(const_cast<void*>(t.scales), groups, t.scale_type);
    if (t.scale_type == kbit::kScaleDouble) {
      const size_t count = (groups + 255) / 256;
      float* absmaxes = absmax.last<float>(count);
      for (size_t i = 0; i < count; ++i) absmaxes[i] = 1;
      *offset.last<float>(1) = 1.5f;
      t.scale_absmax = absmaxes, t.scale_offset = offset.last<float>(1), t.scale_codebook = scale_codebook;
    }
    if (c.storage == kbit::kUint) {
      uint8_t* at = zeros.last<uint8_t>(groups);
      for (size_t i = 0; i < groups; ++i) at[i] = static_cast<uint8_t>(next(1u << c.bits));
      t.zeros = at;
    } else if (next(3) == 0) {
      void* at = t.mean_type == kbit::kScaleFp32 ? static_cast<void*>(means.last<float>(groups))
                                                 : means.last<uint16_t>(groups);
      fill_scales(at, groups, t.mean_type);
      t.means = at;
    }
    if (c.storage == kbit::kCodebook) {
      float* at = codebook.last<float>(size_t{1} << c.bits);
      for (int i = 0; i < 1 << c.bits; ++i) at[i] = 2.0f * static_cast<float>(i) / static_cast<float>((1 << c.bits) - 1) - 1;
      t.codebook = at;
    }
    if (next(3) == 0) {
      const size_t count = 1 + next(static_cast<uint32_t>(cols > 40 ? 40 : cols));
      int32_t* at = columns.last<int32_t>(count);
      for (size_t j = 0; j < count; ++j) at[j] = static_cast<int32_t>(cols - count + j);
      uint16_t* kept = outliers.last<uint16_t>(rows * count);
      fill_scales(kept, rows * count, kbit::kScaleFp16);
      t.outlier_columns = at, t.outliers = kept, t.n_outliers = static_cast<int32_t>(count);
    }
  }
  Error error{};
  kbit::Matrix* matrix = kbit_matrix_new(&t, c.isa, &error);
  if (matrix == nullptr) return std::printf("refused: %s\n", error.text), false;
  float* w = weights.last<float>(n);
  kbit_dequantize(matrix, pool, w);
  bool good = true;
  if (c.isa != kbit::kPortable) {  // which the tests in Python hold to the reference
    float* plain = expected.last<float>(n);
    kbit::Matrix* portable = kbit_matrix_new(&t, kbit::kPortable, &error);
    kbit_dequantize(portable, pool, plain);
    kbit_matrix_free(portable);
    good = std::memcmp(w, plain, n * sizeof(float)) == 0;
  }
  float* x = inputs.last<float>(tokens * cols);
  for (size_t i = 0; i < tokens * cols; ++i) x[i] = uniform();
  float* y = outputs.last<float>(tokens * rows);
  for (int kind = 0; kind < 5; ++kind) {
    const int arithmetic = kind < 3 ? kind : kind == 3 ? kbit::kInt16 : kbit::kInt8;
    if (kind > 2 && (c.isa != kbit::kAvx512 || c.tokens < 16)) continue;  // no products of sums there
    kbit_multiply_sums(kind > 2);
    const double tolerance = arithmetic == 0 ? 1e-5 : arithmetic == 1 ? 1e-2 : 3e-4;
    std::memset(y, 0xff, tokens * rows * sizeof(float));  // NaN
    kbit_linear(matrix, pool, arithmetic, x, c.tokens, nullptr, y, &error);
    for (size_t m = 0; m < tokens; ++m) {
      for (size_t r = 0; r < rows; ++r) {
        double sum = 0, size = 0;
        for (size_t k = 0; k < cols; ++k) {
          sum += static_cast<double>(x[m * cols + k]) * w[r * cols + k];
          size += std::fabs(static_cast<double>(x[m * cols + k])) * (1 << (c.storage < kbit::kCodebook ? c.bits : 1));
        }
        good = good && std::fabs(y[m * rows + r] - sum) <= tolerance * (size + 1);
      }
    }
  }
  kbit_matrix_free(matrix);
  if (good && c.storage < kbit::kFp32) {  // and back to codes
    const int type = static_cast<int>(next(3));
    void* from = type == 0 ? static_cast<void*>(weights.last<float>(n)) : weights.last<uint16_t>(n);
    fill_scales(from, n, type);
    const int64_t block = c.block ? c.block : c.cols;
    const size_t groups = rows * static_cast<size_t>((c.cols + block - 1) / block);
    float* low = absmax.last<float>(groups);
    float* high = scales.last<float>(groups);
    good = kbit_block_ranges(pool, c.isa, from, type, c.rows, c.cols, block, t.outlier_columns,
                             t.n_outliers, low, high) == 1;
    for (size_t i = 0; i < groups; ++i) {
      good = good && low[i] == 0 && high[i] >= 0 && high[i] <= 1;
      if (high[i] == 0) high[i] = 1;
    }
    const size_t bytes = rows * ((cols + 31) / 32) * 4 * static_cast<size_t>(c.bits);
    float* midpoints = codebook.last<float>((size_t{1} << c.bits) - 1);
    for (int i = 0; i < (1 << c.bits) - 1; ++i) midpoints[i] = static_cast<float>(i) / 256;
    if (c.storage != kbit::kCodebook) midpoints = nullptr;
    uint8_t* made = codes.last<uint8_t>(bytes);
    uint8_t* plain = expected.last<uint8_t>(bytes);
    for (const auto& [isa, out] : {std::pair{c.isa, made}, std::pair{int{kbit::kPortable}, plain}}) {
      kbit_encode(pool, isa, from, type, c.rows, c.cols, block, t.outlier_columns, t.n_outliers, c.bits, high,
                  t.zeros, 0, midpoints, out);
    }
    good = good && std::memcmp(made, plain, bytes) == 0;
  }
  if (!good) {
    std::printf("wrong: isa %d storage %d bits %d block %d, %ld x %ld, %ld tokens\n", c.isa, c.storage,
                c.bits, c.block, static_cast<long>(c.rows), static_cast<long>(c.cols), static_cast<long>(c.tokens));
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const long every = argc > 1 ? std::atol(argv[1]) : 1;
  for (int i = 0; i < 256; ++i) scale_codebook[i] = static_cast<float>(i) / 256 - 0.5f;
  Error error{};
  kbit::Pool* pool = kbit_pool_new(2, &error);
  long index = 0, cases = 0, wrong = 0;
  for (int isa = 0; isa <= kbit::kNeon; ++isa) {
    if (!kbit_isa_available(isa)) continue;
    for (int storage = 0; storage < 6; ++storage) {
      for (int bits = 2; bits <= 8; ++bits) {
        for (int block : {16, 32, 64, 256, 0}) {
          if (storage >= 3 && (bits != 2 || block != 0)) continue;
          for (int64_t cols : {1, 31, 64, 97, 160, 545}) {
            for (int64_t rows : {1, 5, 33}) {
              for (int64_t tokens : {1, 2, 3, 6, 17}) {
                // a prime step meets all values of every loop in turn
                if (index++ % every != 0) continue;
                ++cases;
                wrong += !run({isa, storage, bits, block, rows, cols, tokens}, pool);
              }
            }
          }
        }
      }
    }
  }
  kbit_pool_free(pool);
  std::printf("%ld cases, %ld wrong\n", cases, wrong);
  return wrong != 0;
}
