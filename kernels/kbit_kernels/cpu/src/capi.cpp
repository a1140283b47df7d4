// The C ABI: what Python calls through ctypes. Errors come back as a sentence in `error`.
#include <atomic>
#include <cstdio>
#include <exception>
#include <vector>

#include "kbit.h"
#include "kernels.h"
#include "pool.h"

#define KBIT_API extern "C" __attribute__((visibility("default")))

namespace {

struct Error {
  char text[256];
};

template <class F>
auto guarded(Error* error, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& problem) {
    std::snprintf(error->text, sizeof error->text, "%s", problem.what());
    return decltype(f())();
  }
}

// The first outlier of each unit of 32 columns, and their number.
std::vector<int32_t> first_outliers(const int32_t* columns, int64_t count, int64_t cols) {
  std::vector<int32_t> first;
  int32_t at = 0;
  for (int64_t column = 0; column < cols; column += 32) {
    while (at < count && columns[at] < column) ++at;
    first.push_back(at);
  }
  first.push_back(static_cast<int32_t>(count));
  return first;
}

}  // namespace

KBIT_API int32_t kbit_abi() { return kbit::kAbi; }
KBIT_API int32_t kbit_best_isa() { return kbit::best_isa(); }
KBIT_API int32_t kbit_isa_available(int32_t isa) {
  return kbit::isa_available(static_cast<kbit::Isa>(isa));
}
KBIT_API int32_t kbit_has_avx512_bf16() { return kbit::has_avx512_bf16(); }
// For tests: inputs shaped from now on multiply sums, or don't. Whether they did before.
KBIT_API int32_t kbit_multiply_sums(int32_t on) {
  const bool before = kbit::multiply_sums;
  kbit::multiply_sums = on != 0;
  return before;
}
KBIT_API int64_t kbit_tensor_bytes() { return sizeof(kbit::Tensor); }

KBIT_API kbit::Pool* kbit_pool_new(int32_t threads, Error* error) {
  return guarded(error, [&] { return new kbit::Pool(threads); });
}
KBIT_API void kbit_pool_free(kbit::Pool* pool) { delete pool; }

KBIT_API kbit::Matrix* kbit_matrix_new(const kbit::Tensor* tensor, int32_t isa, Error* error) {
  return guarded(error, [&] { return new kbit::Matrix(*tensor, static_cast<kbit::Isa>(isa)); });
}
KBIT_API void kbit_matrix_free(kbit::Matrix* matrix) { delete matrix; }

// y [T, N] = x [T, K] times the matrix, plus bias [N] unless null. 1 if it went well.
KBIT_API int32_t kbit_linear(const kbit::Matrix* matrix, kbit::Pool* pool, int32_t arithmetic,
                             const float* x, int64_t tokens, const float* bias, float* y,
                             Error* error) {
  return guarded(error, [&] {
    kbit::Input input;
    input.shape(*matrix, static_cast<kbit::Arithmetic>(arithmetic), tokens);
    pool->run([&](int thread) {
      const auto mine = kbit::share(tokens, 1, thread, pool->threads());
      input.load(x, matrix->cols(), mine.first, mine.second);
      pool->barrier();
      const auto rows = kbit::share(matrix->rows(), 32, thread, pool->threads());
      kbit::multiply(*matrix, input, y, matrix->rows(), rows.first, rows.second);
      if (bias == nullptr) return;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = rows.first; n < rows.second; ++n) y[t * matrix->rows() + n] += bias[n];
      }
    });
    return 1;
  });
}

// For benchmarks: products of one input with `count` matrices of one shape, back to back, and a sum
// over memory as fast as all threads can read it.
KBIT_API int32_t kbit_linear_each(const kbit::Matrix* const* matrices, int64_t count,
                                  kbit::Pool* pool, int32_t arithmetic, const float* x,
                                  int64_t tokens, float* y, Error* error) {
  return guarded(error, [&] {
    const kbit::Matrix& first = *matrices[0];
    kbit::Input input;
    input.shape(first, static_cast<kbit::Arithmetic>(arithmetic), tokens);
    pool->run([&](int thread) {
      const auto mine = kbit::share(tokens, 1, thread, pool->threads());
      const auto rows = kbit::share(first.rows(), 32, thread, pool->threads());
      for (int64_t i = 0; i < count; ++i) {
        input.load(x, first.cols(), mine.first, mine.second);
        pool->barrier();
        kbit::multiply(*matrices[i], input, y, first.rows(), rows.first, rows.second);
        pool->barrier();
      }
    });
    return 1;
  });
}

KBIT_API uint64_t kbit_read(kbit::Pool* pool, const uint64_t* data, int64_t words) {
  std::atomic<uint64_t> total{0};
  pool->run([&](int thread) {
    const auto mine = kbit::share(words, 64, thread, pool->threads());
    // in vectors: one by one, numbers are summed up slower than some memory is read
    typedef uint64_t Pair __attribute__((vector_size(16), aligned(8)));
    Pair sums[4] = {};
    for (int64_t i = mine.first; i + 8 <= mine.second; i += 8) {
      KBIT_UNROLL
      for (int part = 0; part < 4; ++part) sums[part] += *reinterpret_cast<const Pair*>(data + i + 2 * part);
    }
    for (const Pair& sum : sums) total += sum[0] + sum[1];
  });
  return total;
}

// out [N, K]: the weights.
KBIT_API void kbit_dequantize(const kbit::Matrix* matrix, kbit::Pool* pool, float* out) {
  pool->run([&](int thread) {
    const auto rows = kbit::share(matrix->rows(), 1, thread, pool->threads());
    kbit::dequantize(*matrix, out + rows.first * matrix->cols(), matrix->cols(), rows.first, rows.second);
  });
}

// Least and largest weight (0 included) of every block of w [N, K]; 0 if a weight is not finite.
// outlier_columns [n_outliers] count as zeros.
KBIT_API int32_t kbit_block_ranges(kbit::Pool* pool, int32_t isa, const void* w, int32_t type,
                                   int64_t rows, int64_t cols, int64_t block,
                                   const int32_t* outlier_columns, int64_t n_outliers, float* low,
                                   float* high) {
  const std::vector<int32_t> first = first_outliers(outlier_columns, n_outliers, cols);
  const kbit::Weights weights{w, type, rows, cols, block, outlier_columns, first.data()};
  std::atomic<int32_t> finite{1};
  pool->run([&](int thread) {
    const auto mine = kbit::share(rows, 1, thread, pool->threads());
    const auto* kernels = kbit::kernels_of(static_cast<kbit::Isa>(isa));
    if (!kernels->block_ranges(weights, low, high, mine.first, mine.second)) finite = 0;
  });
  return finite;
}

// codes [N, ceil(K/32) * 4 * bits] of w [N, K] for scales [N, G]; see Rounding.
KBIT_API void kbit_encode(kbit::Pool* pool, int32_t isa, const void* w, int32_t type, int64_t rows,
                          int64_t cols, int64_t block, const int32_t* outlier_columns,
                          int64_t n_outliers, int32_t bits, const float* scales,
                          const uint8_t* zeros, float center, const float* midpoints,
                          uint8_t* codes) {
  const std::vector<int32_t> first = first_outliers(outlier_columns, n_outliers, cols);
  const kbit::Weights weights{w, type, rows, cols, block, outlier_columns, first.data()};
  const kbit::Rounding how{bits, scales, zeros, center, midpoints};
  pool->run([&](int thread) {
    const auto mine = kbit::share(rows, 1, thread, pool->threads());
    kbit::kernels_of(static_cast<kbit::Isa>(isa))->encode(weights, how, codes, mine.first, mine.second);
  });
}
