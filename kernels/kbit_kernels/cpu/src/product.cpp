#include "product.h"

#include <algorithm>
#include <stdexcept>

#include "pool.h"

namespace kbit {

int Slots::find(const Matrix& matrix, bool own) {
  for (size_t i = 0; !own && i < slots_.size(); ++i) {
    if (!slots_[i].own && slots_[i].matrix->same_input(matrix)) return static_cast<int>(i);
  }
  slots_.push_back({&matrix, own});
  return static_cast<int>(slots_.size()) - 1;
}

void Slots::shape(Inputs* inputs, Arithmetic arithmetic, int64_t tokens) const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].own) (*inputs)[i]->shape(*slots_[i].matrix, arithmetic, tokens);
  }
}

void Slots::shape_own(Inputs* inputs, Arithmetic arithmetic, int64_t tokens) const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].own) (*inputs)[i]->shape(*slots_[i].matrix, arithmetic, tokens);
  }
}

Inputs Slots::make() const {
  Inputs inputs(slots_.size());
  for (auto& input : inputs) input = std::make_unique<Input>();
  return inputs;
}

Product::Product(const ProductSpec& spec, const std::vector<std::unique_ptr<Matrix>>& matrices,
                 int threads, Slots* slots, bool own)
    : bias_(spec.bias) {
  std::vector<double> costs;  // of each grain, in bytes
  for (int i = 0; i < spec.count; ++i) {
    const Matrix& matrix = *matrices.at(static_cast<size_t>(spec.matrices[i]));
    if (i > 0 && matrix.cols() != cols_) {
      throw std::invalid_argument("matrices with a common input differ in their columns");
    }
    cols_ = matrix.cols();
    rows_ += matrix.rows();
    matrices_.push_back(&matrix);
    const auto same = std::find_if(matrices_.begin(), matrices_.end(), [&](const Matrix* known) {
      return known == &matrix || known->same_input(matrix);
    });
    const size_t place = static_cast<size_t>(same - matrices_.begin());
    slots_.push_back(place < slots_.size() ? slots_[place] : slots->find(matrix, own));
    if (std::find(distinct_.begin(), distinct_.end(), slots_.back()) == distinct_.end()) {
      distinct_.push_back(slots_.back());
    }
    const auto grains = static_cast<size_t>((rows_ + kGrain - 1) / kGrain);
    const double cost = static_cast<double>(matrix.bytes()) / static_cast<double>(matrix.rows());
    costs.resize(std::max(grains, costs.size()), cost);
  }
  double total = 0, done = 0;
  for (double cost : costs) total += cost;
  int64_t begin = 0;
  size_t grain = 0;
  for (int thread = 0; thread < threads; ++thread) {
    while (grain < costs.size() && done + costs[grain] / 2 <= total * (thread + 1) / threads) {
      done += costs[grain++];
    }
    const bool last = thread + 1 == threads;
    const int64_t end = last ? rows_ : std::min<int64_t>(static_cast<int64_t>(grain) * kGrain, rows_);
    ranges_.emplace_back(begin, end);
    begin = end;
  }
}

template <class F>
void Product::each(Range range, F f) const {
  int64_t offset = 0;
  for (size_t i = 0; i < matrices_.size(); ++i) {
    const int64_t begin = std::max(range.first, offset) - offset;
    const int64_t end = std::min(range.second - offset, matrices_[i]->rows());
    if (begin < end) f(i, begin, end, offset + begin);
    offset += matrices_[i]->rows();
  }
}

int64_t Product::bytes() const {
  int64_t total = 0;
  for (const Matrix* matrix : matrices_) total += matrix->bytes();
  return total;
}

void Product::load(Inputs* inputs, const float* x, int64_t at) const {
  for (int slot : distinct_) (*inputs)[static_cast<size_t>(slot)]->load(x, 0, at, at + 1);
}

bool Product::loads_columns(const Inputs& inputs) const {
  return std::all_of(distinct_.begin(), distinct_.end(),
                     [&](int slot) { return inputs[static_cast<size_t>(slot)]->loads_columns(); });
}

bool Product::shares_inputs(const Product& other) const {
  const auto& used = other.distinct_;
  return std::any_of(distinct_.begin(), distinct_.end(),
                     [&](int slot) { return std::find(used.begin(), used.end(), slot) != used.end(); });
}

void Product::load_columns(const Inputs& inputs, const float* x, int64_t at, int64_t column, int64_t count) const {
  for (int slot : distinct_) inputs[static_cast<size_t>(slot)]->load_columns(x, at, column, count);
}

void Product::multiply(const Inputs& inputs, Range range, float* y, int64_t stride,
                       const LayerKernels& kernels) const {
  each(range, [&](size_t i, int64_t begin, int64_t end, int64_t output) {
    const Input& input = *inputs[static_cast<size_t>(slots_[i])];
    float* const first = y + output - range.first;
    kbit::multiply(*matrices_[i], input, first - begin, stride, begin, end);
    for (int64_t t = 0; bias_ != nullptr && t < input.tokens; ++t) {
      kernels.add(first + t * stride, bias_ + output, end - begin);
    }
  });
}

void Product::prefetch(Range range) const {
  each(range, [&](size_t i, int64_t begin, int64_t end, int64_t) { kbit::prefetch(*matrices_[i], begin, end); });
}

}  // namespace kbit
