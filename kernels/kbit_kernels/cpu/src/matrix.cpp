// Checks, tables and memory: everything that is not a kernel.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kbit.h"
#include "kernels.h"

namespace kbit {

const Kernels* kernels_of(Isa isa) {
  switch (isa) {
    case kPortable: return portable_kernels;
    case kAvx2: return avx2_kernels;
    case kAvxVnni: return avxvnni_kernels;
    case kAvx512: return avx512_kernels;
    case kAmx: return amx_kernels;
    case kNeon: return neon_kernels;
  }
  return nullptr;
}

namespace {

void require(bool good, const std::string& sentence) {
  if (!good) throw std::invalid_argument(sentence);
}

// The factor t up to `limit` / max |value| for which round(value * t) / t is closest to the values.
float best_factor(const float* values, int count, int limit) {
  float peak = 0;
  for (int i = 0; i < count; ++i) peak = std::max(peak, std::fabs(values[i]));
  if (peak == 0) return 1;
  double least = HUGE_VAL, best = limit / peak;
  for (int step = 0; step <= limit; ++step) {
    const double factor = (limit - step * 0.25) / peak;
    double error = 0;
    for (int i = 0; i < count; ++i) {
      const double miss = std::nearbyint(values[i] * factor) / factor - values[i];
      error += miss * miss;
    }
    if (error < least) least = error, best = factor;
  }
  return static_cast<float>(best);
}

void xor_chain(const uint8_t* table, uint8_t* chain) {
  for (int i = 0; i < 256; ++i) {
    chain[i] = i % 128 < 16 ? table[i] : static_cast<uint8_t>(table[i] ^ table[i - 16]);
  }
}

std::unique_ptr<Matrix::Tables> make_tables(const float* codebook, int bits) {
  auto tables = std::make_unique<Matrix::Tables>();
  const int count = 1 << bits;
  for (int i = 0; i < 256; ++i) tables->values[i] = codebook[i % count];
  const float narrow = best_factor(codebook, count, kNarrowLimit);
  const float slim = best_factor(codebook, count, slim_limit(bits));
  const float wide = best_factor(codebook, count, kWideWeights);
  tables->narrow_scale = 1 / narrow;
  tables->slim_scale = 1 / slim;
  tables->wide_scale = 1 / wide;
  for (int i = 0; i < 64; ++i) {
    tables->narrow[i] = static_cast<int8_t>(std::nearbyint(tables->values[i] * narrow));
    tables->slim[i] = static_cast<int8_t>(std::nearbyint(tables->values[i] * slim));
  }
  for (int i = 0; i < 256; ++i) {
    const auto value = static_cast<uint16_t>(
        static_cast<int16_t>(std::nearbyint(tables->values[i] * wide)));
    tables->wide[0][i] = static_cast<uint8_t>(value);
    tables->wide[1][i] = static_cast<uint8_t>(value >> 8);
    uint32_t pattern;
    std::memcpy(&pattern, &tables->values[i], sizeof pattern);
    for (int byte = 0; byte < 4; ++byte) {
      tables->bytes[byte][i] = static_cast<uint8_t>(pattern >> (8 * byte));
    }
  }
  for (int byte = 0; byte < 2; ++byte) xor_chain(tables->wide[byte], tables->wide_xor[byte]);
  for (int byte = 0; byte < 4; ++byte) xor_chain(tables->bytes[byte], tables->bytes_xor[byte]);
  return tables;
}

// Hundreds of matrices of a model share a few codebooks; so they share tables, which then stay in
// the cache. Tables live as long as the process.
const Matrix::Tables* shared_tables(const float* codebook, int bits) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::vector<float>, std::unique_ptr<Matrix::Tables>>;
  std::lock_guard<std::mutex> lock(mutex);
  auto& entry = known[std::vector<float>(codebook, codebook + (1 << bits))];
  if (!entry) entry = make_tables(codebook, bits);
  return entry.get();
}

bool half_ok(int32_t type) { return type >= kScaleFp32 && type <= kScaleBf16; }

#if defined(__linux__) && defined(__x86_64__)
// Whether the processor has AMX, and the system lets this process have its registers: they must be
// asked for once.
bool amx_granted() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr uint32_t kWanted = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kWanted) != kWanted) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#else
bool amx_granted() { return false; }
#endif

#if defined(__x86_64__)
bool has_f16c() {  // not all compilers' __builtin_cpu_supports know it
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
bool has_vectors_of(int bit) {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << bit) != 0;
}
bool has_avx_vnni() { return has_vectors_of(4); }
bool is_amd() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}
#else
bool has_vectors_of(int) { return false; }
bool is_amd() { return false; }
#endif

}  // namespace

const bool kPastSecondLevel = is_amd();
bool multiply_sums = is_amd();

bool has_avx512_bf16() { return isa_available(kAvx512) && has_vectors_of(5); }

bool isa_available(Isa isa) {
  if (kernels_of(isa) == nullptr) return false;
  if (isa == kAmx) {
    static const bool granted = isa_available(kAvx512) && amx_granted();
    return granted;
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  }
  if (isa == kAvxVnni) return isa_available(kAvx2) && has_avx_vnni();
  if (isa == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("gfni") &&
           isa_available(kAvx2);
  }
#endif
  return isa == kPortable || isa == kNeon;
}

Isa best_isa() {
  for (Isa isa : {kAmx, kAvx512, kAvxVnni, kAvx2, kNeon}) {
    if (isa_available(isa)) return isa;
  }
  return kPortable;
}

Matrix::Matrix(const Tensor& source, Isa wanted)
    : tensor(source), isa(wanted), kernels(kernels_of(wanted)), step(kStep), groups(1), tables(nullptr) {
  const Tensor& t = tensor;
  require(isa_available(isa), "this machine does not have the instruction set asked for");
  require(t.rows > 0 && t.cols > 0, "a matrix needs at least one row and one column");
  require(t.storage >= kInt && t.storage <= kBf16, "unknown storage of a matrix");
  require(t.codes != nullptr, "a matrix has no codes");
  if (plain()) return;
  require(t.bits >= 2 && t.bits <= 8, "a matrix's width is not 2 to 8 bits");
  require(t.block == 0 || (t.block >= 16 && (t.block & (t.block - 1)) == 0),
          "a matrix's block is neither a power of two from 16 nor a row");
  require(t.scales != nullptr, "a matrix has no scales");
  require(t.scale_type == kScaleDouble || half_ok(t.scale_type), "unknown type of scales");
  require(t.scale_type != kScaleDouble ||
              (t.scale_absmax != nullptr && t.scale_offset != nullptr && t.scale_codebook != nullptr),
          "double-quantized scales lack their absmax, offset or codebook");
  require(t.means == nullptr || half_ok(t.mean_type), "unknown type of means");
  require((t.storage == kUint) == (t.zeros != nullptr), "zero points do not fit the storage");
  require((t.storage == kCodebook) == (t.codebook != nullptr), "the codebook does not fit the storage");
  require(t.n_outliers == 0 || (t.outlier_columns != nullptr && t.outliers != nullptr),
          "outlier columns lack their values");
  for (int i = 0; i < t.n_outliers; ++i) {
    const int previous = i ? t.outlier_columns[i - 1] : -1;
    require(t.outlier_columns[i] > previous && t.outlier_columns[i] < t.cols,
            "outlier columns do not ascend within the matrix");
  }
  if (t.block != 0) {
    step = std::min<int32_t>(t.block, kStep);
    groups = static_cast<int32_t>((t.cols + t.block - 1) / t.block);
  }
  if (t.storage == kCodebook) tables = shared_tables(t.codebook, t.bits);
}

Matrix::~Matrix() = default;

int64_t Matrix::bytes() const {
  const Tensor& t = tensor;
  if (plain()) return t.rows * t.cols * (t.storage == kFp32 ? 4 : 2);
  const int64_t per_scale = t.scale_type == kScaleDouble ? 1 : t.scale_type == kScaleFp32 ? 4 : 2;
  const int64_t per_mean = t.means == nullptr ? 0 : t.mean_type == kScaleFp32 ? 4 : 2;
  const int64_t per_group = per_scale + per_mean + (t.zeros ? 1 : 0);
  return t.rows * ((t.cols + 31) / 32 * 4 * t.bits + groups * per_group + t.n_outliers * 2);
}

namespace {

bool input_panels(const Matrix& matrix, Arithmetic arithmetic, int64_t tokens) {
  const int64_t from = matrix.kernels->amx_tokens;
  return arithmetic != kFloat && !matrix.plain() && from != 0 && tokens >= from;
}

// Whether panels are of integers: bf16 adds more than 2 percent to the error of 7 bits (results/arithmetic-*.json).
bool panel_digits(const Matrix& matrix, Arithmetic arithmetic) {
  return arithmetic == kInt16 || (arithmetic == kBf16Prompt && matrix.tensor.bits > 6);
}

bool input_fine(const Matrix& matrix, Arithmetic arithmetic, int64_t tokens) {
  const bool rounds = arithmetic == kInt8 || arithmetic == kBf16Prompt;
  return rounds && tokens == 1 && matrix.step == kStep && matrix.tensor.storage < kCodebook &&
         matrix.kernels->fine(matrix.tensor.bits);
}

bool input_pieces(const Matrix& matrix, Arithmetic arithmetic, int64_t tokens) {
  const bool rounds = arithmetic == kInt8 || arithmetic == kBf16Prompt;
  return rounds && tokens >= matrix.kernels->tile_tokens && !input_panels(matrix, arithmetic, tokens) &&
         matrix.step == kStep && matrix.tensor.storage < kCodebook && matrix.kernels->fine(matrix.tensor.bits);
}

// The inputs' bits, and the largest magnitude that integers may have.
int32_t input_width(const Matrix& matrix, Arithmetic arithmetic, int64_t tokens) {
  if (arithmetic == kFloat || matrix.plain()) return 32;
  if (input_panels(matrix, arithmetic, tokens)) return 16;
  if (input_fine(matrix, arithmetic, tokens) || input_pieces(matrix, arithmetic, tokens)) return 8;
  const bool large = matrix.tensor.storage == kCodebook && (1 << matrix.tensor.bits) > kNarrowEntries;
  const Kernels& kernels = *matrix.kernels;
  const bool bytes = matrix.tensor.bits <= (matrix.tensor.storage == kCodebook ? kernels.byte_codebook_bits
                                                                               : kernels.byte_bits);
  return arithmetic == kInt16 || arithmetic == kBf16Prompt || large || (tokens >= kernels.tile_tokens && !bytes) ? 16 : 8;
}

// How inputs lie: see Input and order_of.
struct Layout {
  int32_t order;
  bool digits;
};
Layout layout_of(const Matrix& matrix, int32_t width, int64_t tokens) {
  const Kernels& kernels = *matrix.kernels;
  if (matrix.plain() || matrix.step < kStep || width == 32 || tokens > 1) return {0, false};
  const bool digits = width == 16 && matrix.tensor.storage != kCodebook && kernels.digits(matrix.tensor.bits);
  return {width == 8 || digits ? kernels.order(matrix.tensor.bits) : 0, digits};
}

// Whether products of sums may be made: of bytes where weights leave inputs 7 bits.
bool input_summed(const Matrix& matrix, const Input& input) {
  const int64_t from = matrix.kernels->sums_tokens;
  if (!multiply_sums || from == 0 || input.tokens < from || input.panels || input.pieces) return false;
  return input.width == 16 || (input.width == 8 && matrix.tensor.bits <= (matrix.tensor.storage == kCodebook ? 3 : 4));
}

int32_t input_limit(const Matrix& matrix, const Input& input) {
  const Tensor& t = matrix.tensor;
  if (input.width == 8) {
    if (!input.summed) return kNarrowLimit;
    return kNarrowLimit - (t.storage == kCodebook ? slim_limit(t.bits) : 1 << (t.bits - 1));
  }
  return input.digits ? kDigitInputs : t.storage == kCodebook ? kWideInputs : kWordInputs;
}

}  // namespace

bool Matrix::same_input(const Matrix& other) const {
  const Tensor &a = tensor, &b = other.tensor;
  return a.cols == b.cols && isa == other.isa && a.storage == b.storage && a.bits == b.bits && step == other.step &&
         (a.means != nullptr) == (b.means != nullptr) && a.n_outliers == b.n_outliers &&
         std::equal(a.outlier_columns, a.outlier_columns + a.n_outliers, b.outlier_columns);
}

Input::~Input() { std::free(memory_); }

void Input::shape(const Matrix& for_matrix, Arithmetic wanted, int64_t count) {
  matrix = &for_matrix;
  arithmetic = for_matrix.plain() ? kFloat : wanted;
  tokens = count;
  width = input_width(for_matrix, arithmetic, count);
  panels = input_panels(for_matrix, arithmetic, count);
  const bool tiled = count >= for_matrix.kernels->tile_tokens;
  together = tiled && !panels ? for_matrix.kernels->tokens_at_once(width) : 1;
  outlier_together = tiled ? for_matrix.kernels->tokens_at_once(32) : 1;
  outlier_room = (for_matrix.tensor.n_outliers + kStep - 1) / kStep * kStep;
  const Layout layout = layout_of(for_matrix, width, count);
  order = layout.order, digits = panels ? panel_digits(for_matrix, arithmetic) : layout.digits;
  fine = input_fine(for_matrix, arithmetic, count);
  pieces = input_pieces(for_matrix, arithmetic, count);
  summed = input_summed(for_matrix, *this);
  limit = input_limit(for_matrix, *this);
  padded = (for_matrix.cols() + kStep - 1) / kStep * kStep;
  if (panels && padded % 2048 == 0) padded += kStep;  // else 16 tokens meet in one set of the cache
  const auto rounded = [](int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); };
  blocks = (padded / for_matrix.step + 4 + 15) / 16 * 16;
  const auto whole = [count](int64_t of) { return (count + of - 1) / of * of; };
  // AMX reads 16 tokens at a time
  const int64_t room = for_matrix.isa == kAmx && count > 1 && together == 1 ? whole(16) : whole(together);
  const size_t values_bytes = rounded(room * padded * (width / 8));
  const size_t block_bytes = rounded(whole(together) * blocks * 4);
  const size_t outlier_bytes = rounded(whole(outlier_together) * outlier_room * 4);
  const size_t lane_bytes = fine ? 16 * block_bytes : pieces ? kPieces * block_bytes : 0;
  const size_t bytes = values_bytes + 3 * block_bytes + lane_bytes + outlier_bytes;
  if (bytes > capacity_) {
    std::free(memory_);
    memory_ = std::aligned_alloc(64, bytes);
    capacity_ = memory_ ? bytes : 0;
    if (!memory_) throw std::bad_alloc();
  }
  char* at = static_cast<char*>(memory_);
  values = at;
  scales = reinterpret_cast<float*>(at + values_bytes);
  sums = reinterpret_cast<float*>(at + values_bytes + block_bytes);
  begins = reinterpret_cast<int32_t*>(at + values_bytes + 2 * block_bytes);
  lanes = reinterpret_cast<float*>(at + values_bytes + 3 * block_bytes);
  outliers = reinterpret_cast<float*>(at + values_bytes + 3 * block_bytes + lane_bytes);
}

void Input::load(const float* x, int64_t stride, int64_t begin, int64_t end) {
  matrix->kernels->load(*this, x, stride, begin, end);
}

void Input::load_columns(const float* x, int64_t token, int64_t column, int64_t count) {
  matrix->kernels->load_columns(*this, x, token, column, count);
}

void multiply(const Matrix& matrix, const Input& input, float* y, int64_t stride, int64_t begin,
              int64_t end) {
  if (begin < end && input.tokens > 0) {
    matrix.kernels->multiply(matrix, input, y, stride, begin, end);
  }
}

void prefetch(const Matrix& matrix, int64_t begin, int64_t end) {
  const Tensor& t = matrix.tensor;
  const auto ask = [](const void* base, int64_t from, int64_t to, int64_t most) {
    const char* at = static_cast<const char*>(base);
    for (int64_t i = from; i < std::min(to, from + most); i += 64) __builtin_prefetch(at + i);
  };
  const int64_t row = matrix.plain() ? t.cols * (t.storage == kFp32 ? 4 : 2) : (t.cols + 31) / 32 * 4 * t.bits;
  ask(t.codes, begin * row, end * row, kCodesAhead);
  if (matrix.plain()) return;
  const int64_t scales = matrix.groups * (t.scale_type == kScaleFp32 ? 4 : t.scale_type == kScaleDouble ? 1 : 2);
  ask(t.scales, begin * scales, end * scales, kScalesAhead);
}

void dequantize(const Matrix& matrix, float* out, int64_t stride, int64_t begin, int64_t end) {
  matrix.kernels->dequantize(matrix, out, stride, begin, end);
}

}  // namespace kbit
