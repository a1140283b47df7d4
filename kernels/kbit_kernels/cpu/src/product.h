// Products of one input with several matrices, rows shared out to threads once at load.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "layers.h"

namespace kbit {

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
  // Two parts of the outputs, `size` long each, of which a thread gets the same share.
  void pair_up(int64_t first, int64_t second, int64_t size);

  explicit operator bool() const { return !matrices_.empty(); }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t bytes() const;

  // Prepares token `at` from x [cols].
  void load(Inputs* inputs, const float* x, int64_t at) const;
  // This thread's outputs of all tokens that the inputs are shaped for, into y[t * stride].
  void multiply(const Inputs& inputs, int thread, float* y, int64_t stride,
                const LayerKernels& kernels) const;
  // Asks for the weights that this thread will multiply with first.
  void prefetch(int thread) const;
  // Outputs of a thread: ranges that no other thread writes.
  const std::vector<Range>& ranges(int thread) const { return ranges_[static_cast<size_t>(thread)]; }

 private:
  struct Piece {
    const Matrix* matrix;
    int slot;
    int64_t offset, begin, end;  // rows of the matrix; its row 0 is output `offset`
  };
  void cut();

  std::vector<const Matrix*> matrices_;
  std::vector<int> slots_, distinct_;
  std::vector<std::vector<Range>> ranges_;
  std::vector<std::vector<Piece>> pieces_;
  const float* bias_ = nullptr;
  int64_t rows_ = 0, cols_ = 0;
};

}  // namespace kbit
