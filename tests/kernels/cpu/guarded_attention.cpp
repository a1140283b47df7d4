// Attention and silu of every instruction set over buffers that end right before a page that may not
// be touched, tile loads and stores among the accesses, held to plain loops in doubles. Linked with
// the sources of the layers; the installed library says what the machine has.
#include <algorithm>
#include <cmath>
#include <vector>

#include "guarded.h"
#include "layers.h"

extern "C" int32_t kbit_isa_available(int32_t isa);
extern "C" int32_t kbit_has_avx512_bf16();

namespace {

constexpr int64_t kCapacity = 3 * kbit::kKeyChunk;

Guarded queries, lows, highs, positions, slopes, keys, values, peaks, totals, sums, scratch;

float half_value(uint16_t bits) {  // of a normal number
  return std::ldexp((bits & 0x8000 ? -1.0f : 1.0f) * static_cast<float>(1024 + (bits & 0x3ff)), (bits >> 10 & 31) - 25);
}

// `count` numbers of a cache at `at`, those for which `loud(i)` 256 times as large, those for which `poisoned(i)`
// NaN or far too large; returns them as floats.
template <class F, class G>
std::vector<float> fill(Guarded* buffer, int32_t type, size_t count, const void** at, F loud, G poisoned) {
  std::vector<float> result(count);
  if (type == kbit::kCacheFp16) {
    uint16_t* to = buffer->last<uint16_t>(count);
    for (size_t i = 0; i < count; ++i) {
      to[i] = static_cast<uint16_t>((loud(i) ? 0x5400 : 0x3400) + next(0x800) + 0x8000 * next(2));
      result[i] = half_value(to[i]);
      if (poisoned(i)) to[i] = i % 2 ? 0x7e00 : 0x7bff, result[i] = std::nanf("");
    }
    *at = to;
  } else {
    float* to = buffer->last<float>(count);
    for (size_t i = 0; i < count; ++i) {
      result[i] = to[i] = (loud(i) ? 256 : 1) * uniform();
      if (poisoned(i)) to[i] = i % 2 ? std::nanf("") : 1e30f, result[i] = std::nanf("");
    }
    *at = to;
  }
  return result;
}

bool run(const kbit::LayerKernels& kernels, int64_t rows, int64_t head_dim, int32_t type, double tolerance) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  const auto n = static_cast<size_t>(rows), width = static_cast<size_t>(padded);
  kbit::Attend job{};
  job.rows = rows, job.head_dim = head_dim, job.padded = padded, job.type = type;
  job.scale = 1 / std::sqrt(static_cast<float>(head_dim)), job.softcap = next(2) ? 2.0f : 0.0f;
  float* q = queries.last<float>(n * width);
  for (size_t i = 0; i < n * width; ++i) q[i] = uniform();
  int64_t *low = lows.last<int64_t>(n), *high = highs.last<int64_t>(n), *position = positions.last<int64_t>(n);
  float* slope = slopes.last<float>(n);
  const bool alike = next(2), every = next(2);
  for (size_t r = 0; r < n; ++r) {  // some see nothing
    low[r] = alike && r ? low[0] : every ? 0 : next(kCapacity);
    high[r] = alike && r ? high[0] : every ? kCapacity : std::min<int64_t>(kCapacity, low[r] + next(kCapacity));
    position[r] = std::max<int64_t>(high[r] - 1, 0);
    slope[r] = 0.01f * static_cast<float>(r % 8);
  }
  job.q = q, job.low = low, job.high = high, job.position = position, job.slopes = next(2) ? slope : nullptr;
  // A value that only some rows see must not cost the others' precision.
  const int64_t large = next(4) ? -1 : next(kCapacity);
  // Memory behind the last key that is seen holds anything, and sometimes so does a key that some rows see.
  const int64_t end = *std::max_element(high, high + n), bad = next(4) ? -1 : next(kCapacity);
  const auto poisoned = [&](int64_t position) { return position >= end || position == bad; };
  const std::vector<float> k = fill(
      &keys, type, static_cast<size_t>(kCapacity * head_dim), &job.keys, [](size_t) { return false; },
      [&](size_t i) {
        const auto at = static_cast<int64_t>(i), block = kbit::kKeyBlock * head_dim;
        return poisoned(at / block * kbit::kKeyBlock + at % kbit::kKeyBlock);
      });
  const std::vector<float> v = fill(
      &values, type, static_cast<size_t>(kCapacity * padded), &job.values,
      [&](size_t i) { return static_cast<int64_t>(i) / padded == large; },
      [&](size_t i) { return poisoned(static_cast<int64_t>(i) / padded); });
  job.peak = peaks.last<float>(n), job.total = totals.last<float>(n), job.sum = sums.last<float>(n * width);
  job.scratch = scratch.last<float>(static_cast<size_t>(kbit::attend_scratch(rows, padded)));
  kernels.attend(job);

  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> weight(kCapacity);
    double peak = -HUGE_VAL, total = 0;
    for (int64_t j = low[r]; j < high[r]; ++j) {
      double score = 0;
      for (int64_t d = 0; d < head_dim; ++d) {
        const int64_t at = j / kbit::kKeyBlock * kbit::kKeyBlock * head_dim + d * kbit::kKeyBlock + j % kbit::kKeyBlock;
        score += static_cast<double>(q[r * padded + d]) * k[static_cast<size_t>(at)];
      }
      score *= job.scale;
      if (job.softcap != 0) score = job.softcap * std::tanh(score / job.softcap);
      if (job.slopes) score -= static_cast<double>(slope[r]) * static_cast<double>(position[r] - j);
      weight[static_cast<size_t>(j)] = score;
      peak = std::max(peak, score);
    }
    for (int64_t j = low[r]; j < high[r]; ++j) total += weight[static_cast<size_t>(j)] = std::exp(weight[static_cast<size_t>(j)] - peak);
    if (low[r] >= high[r]) worst = std::max(worst, std::fabs(static_cast<double>(job.total[r])));
    if (low[r] <= bad && bad < high[r]) {  // NaN or infinite, or so large that its weight is all
      bool told = false;
      for (int64_t d = 0; d < head_dim; ++d) told = told || !(std::fabs(job.sum[r * padded + d] / job.total[r]) < 100);
      if (!told) worst = HUGE_VAL;
      continue;
    }
    for (int64_t d = 0; d < head_dim && low[r] < high[r]; ++d) {
      double sum = 0;
      for (int64_t j = low[r]; j < high[r]; ++j) sum += weight[static_cast<size_t>(j)] * v[static_cast<size_t>(j * padded + d)];
      const double size = low[r] <= large && large < high[r] ? 256 : 1;
      const double error = std::fabs(job.sum[r * padded + d] / job.total[r] - sum / total) / size;
      worst = error <= worst ? worst : error;  // NaN counts
    }
  }
  if (worst <= tolerance) return true;
  std::printf("wrong by %g: %ld queries of %ld, type %d\n", worst, static_cast<long>(rows), static_cast<long>(head_dim), type);
  return false;
}

// silu of -100 to 100, infinity and NaN, with and without a factor.
bool activate(const kbit::LayerKernels& kernels, bool gated, double tolerance) {
  constexpr int64_t kCount = 403;
  float *gate = queries.last<float>(kCount), *up = keys.last<float>(kCount), *out = sums.last<float>(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    gate[i] = static_cast<float>(i) / 2 - 100;
    up[i] = uniform();
  }
  gate[401] = HUGE_VALF, gate[402] = std::nanf("");
  kernels.activate(kbit::kSilu, gate, gated ? up : nullptr, out, kCount);
  const double factor = gated ? up[401] : 1;
  bool good = std::isnan(out[402]) && out[401] == factor * HUGE_VAL;
  for (int64_t i = 0; i < 401; ++i) {
    const double x = gate[i], expected = x / (1 + std::exp(-x)) * (gated ? up[i] : 1);
    good = good && std::fabs(out[i] - expected) <= tolerance * std::fabs(expected) + 1e-30;
  }
  if (!good) std::printf("wrong: silu to %g\n", tolerance);
  return good;
}

}  // namespace

int main() {
  const struct {
    kbit::Isa isa;
    const kbit::LayerKernels* kernels;
    double tolerance, silu;
  } sets[] = {{kbit::kPortable, kbit::portable_layers, 1e-5, 1e-6},
              {kbit::kAvx2, kbit::avx2_layers, 1e-5, 1e-6},
              {kbit::kAvx2, kbit::avx2_int16_layers, 4e-4, 0x1p-12},
              {kbit::kAvx512, kbit::avx512_layers, 1e-5, 1e-6},
              {kbit::kAvx512, kbit::avx512_int16_layers, 4e-4, 0x1p-12},
              {kbit::kAvx512, kbit::avx512_bf16_layers, 4e-3, 0x1p-12},
              {kbit::kAmx, kbit::amx_layers, 1e-4, 1e-6},
              {kbit::kAmx, kbit::amx_bf16_layers, 4e-3, 0x1p-12},
              {kbit::kNeon, kbit::neon_layers, 1e-5, 1e-6}};
  long cases = 0, wrong = 0;
  for (const auto& set : sets) {
    if (!kbit_isa_available(set.isa)) continue;
    if (set.kernels == kbit::avx512_bf16_layers && !kbit_has_avx512_bf16()) continue;
    for (bool gated : {false, true}) {
      ++cases;
      wrong += !activate(*set.kernels, gated, set.silu);
    }
    for (int64_t head_dim : {2, 16, 40, 64, 80, 128, 256, 264}) {
      for (int64_t rows : {1, 3, 4, 9, 16, 17, 31, 96}) {
        for (int32_t type : {kbit::kCacheFp32, kbit::kCacheFp16}) {
          ++cases;
          wrong += !run(*set.kernels, rows, head_dim, type, set.tolerance);
        }
      }
    }
  }
  std::printf("%ld cases, %ld wrong\n", cases, wrong);
  return wrong != 0;
}
