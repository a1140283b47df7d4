// Which product a matrix takes, by how it is stored and by the number of tokens.

using Product = void (*)(const Matrix&, const Input&, int64_t, int, float*, int64_t, int64_t, int64_t);

template <int WIDTH, bool LUT, int BITS, bool FINE>
static Product gemv_of(int tokens) {
  if constexpr (WIDTH == 8 && LUT && (1 << BITS) > kNarrowEntries) {
    return nullptr;  // such matrices take 16-bit inputs
  } else if constexpr (V::kCompact) {
    return Gemv<WIDTH, LUT, BITS, FINE, 1, 1>::run;
  } else {
    if constexpr (FINE) {
      if (tokens == 1) return Gemv<WIDTH, LUT, BITS, FINE, 4, 1>::run;
    }
    if (tokens <= 2) return Gemv<WIDTH, LUT, BITS, FINE, 2, 2>::run;
    return Gemv<WIDTH, LUT, BITS, FINE, 1, 4>::run;
  }
}

// single: the input is one token's.
template <int WIDTH, bool LUT, int BITS>
static Product gemv_of(bool fine, int tokens, bool single) {
  if constexpr (!(WIDTH == 8 && LUT && (1 << BITS) > kNarrowEntries)) {
    if (!fine && single) return Single<WIDTH, LUT, BITS>::run;
  }
  if (fine || V::kCompact) return gemv_of<WIDTH, LUT, BITS, true>(tokens);
  return gemv_of<WIDTH, LUT, BITS, V::kCompact>(tokens);
}

template <int WIDTH, bool LUT>
static Product gemv_of(int bits, bool fine, int tokens, bool single) {
  switch (bits) {
    case 2: return gemv_of<WIDTH, LUT, 2>(fine, tokens, single);
    case 3: return gemv_of<WIDTH, LUT, 3>(fine, tokens, single);
    case 4: return gemv_of<WIDTH, LUT, 4>(fine, tokens, single);
    case 5: return gemv_of<WIDTH, LUT, 5>(fine, tokens, single);
    case 6: return gemv_of<WIDTH, LUT, 6>(fine, tokens, single);
    case 7: return gemv_of<WIDTH, LUT, 7>(fine, tokens, single);
    default: return gemv_of<WIDTH, LUT, 8>(fine, tokens, single);
  }
}

template <int WIDTH>
static Product gemv_of(const Matrix& m, int tokens, bool single) {
  const bool fine = m.step < kStep;
  return m.tensor.storage == kCodebook ? gemv_of<WIDTH, true>(m.tensor.bits, fine, tokens, single)
                                       : gemv_of<WIDTH, false>(m.tensor.bits, fine, tokens, single);
}

template <int TYPE>
static Product plain_gemv_of(int tokens) {
  return tokens == 1 ? plain_gemv<TYPE, 4, 1> : plain_gemv<TYPE, 2, 4>;
}

static Product gemv_of(const Matrix& m, const Input& in, int tokens) {
  if (m.tensor.storage == kFp32) return plain_gemv_of<kScaleFp32>(tokens);
  if (m.tensor.storage == kFp16) return plain_gemv_of<kScaleFp16>(tokens);
  if (m.tensor.storage == kBf16) return plain_gemv_of<kScaleBf16>(tokens);
  const bool single = in.tokens == 1;
  if (in.width == 8) return gemv_of<8>(m, tokens, single);
  if (in.width == 16) return gemv_of<16>(m, tokens, single);
  return gemv_of<32>(m, tokens, single);
}
