// Products of one input with several matrices, rows shared out to threads once at load.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "layers.h"

namespace kbit {

constexpr int64_t kGrain = 32;  // rows that a thread takes at once
constexpr int64_t kColumnGrain = 64;  // columns that are prepared by themselves

// Inputs that products fill, by slot: one set for all threads together, or one a thread.
using Inputs = std::vector<std::unique_ptr<Input>>;

// The slots of a decoder: one per kind of input, as products one after the other can share.
class Slots {
 public:
  // The slot for inputs of `matrix`; `own`: one that no other product uses.
  int find(const Matrix& matrix, bool own);
  // Room for `tokens` tokens in every slot but those of their own.
  void shape(Inputs* inputs, Arithmetic arithmetic, int64_t tokens) const;
  void shape_own(Inputs* inputs, Arithmetic arithmetic, int64_t tokens) const;
  Inputs make() const;

 private:
  struct Slot {
    const Matrix* matrix;
    bool own;
  };
  std::vector<Slot> slots_;
};

class Product {
 public:
  using Range = std::pair<int64_t, int64_t>;

  Product() = default;
  Product(const ProductSpec& spec, const std::vector<std::unique_ptr<Matrix>>& matrices, int threads,
          Slots* slots, bool own = false);
  explicit operator bool() const { return !matrices_.empty(); }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t bytes() const;

  // Prepares token `at` from x [cols].
  void load(Inputs* inputs, const float* x, int64_t at) const;
  // Whether columns can be prepared by themselves, in multiples of kColumnGrain.
  bool loads_columns(const Inputs& inputs) const;
  bool shares_inputs(const Product& other) const;
  void load_columns(const Inputs& inputs, const float* x, int64_t at, int64_t column, int64_t count) const;
  // A thread's share of the outputs.
  Range range(int thread) const { return ranges_[static_cast<size_t>(thread)]; }
  // Outputs `range` of all tokens that the inputs are shaped for, into y[t * stride]; y is the first's.
  void multiply(const Inputs& inputs, Range range, float* y, int64_t stride, const LayerKernels& kernels) const;
  // A thread's share of them into y[t * stride]; y is output 0's.
  void multiply(const Inputs& inputs, int thread, float* y, int64_t stride, const LayerKernels& kernels) const {
    multiply(inputs, range(thread), y + range(thread).first, stride, kernels);
  }
  // Asks for the weights that outputs `range` take first.
  void prefetch(Range range) const;

 private:
  // f(number of a matrix, its rows [begin, end), their first output) of the matrices of outputs `range`.
  template <class F>
  void each(Range range, F f) const;

  std::vector<const Matrix*> matrices_;
  std::vector<int> slots_, distinct_;
  std::vector<Range> ranges_;
  const float* bias_ = nullptr;
  int64_t rows_ = 0, cols_ = 0;
};

}  // namespace kbit
