// The native executor's part of the C ABI.
#include <cstdio>
#include <exception>

#include "plan.h"

#define KBIT_API extern "C" __attribute__((visibility("default")))

namespace {

struct Error {
  char text[256];
};

}  // namespace

// Sizes that Python compares with its own idea of the structs.
KBIT_API int64_t kbit_decoder_sizes() {
  return static_cast<int64_t>(sizeof(kbit::DecoderSpec)) << 32 |
         static_cast<int64_t>(sizeof(kbit::LayerSpec)) << 16 | static_cast<int64_t>(sizeof(kbit::CacheSpec));
}

KBIT_API kbit::Decoder* kbit_decoder_new(const kbit::DecoderSpec* spec, Error* error) {
  try {
    return new kbit::Decoder(*spec);
  } catch (const std::exception& problem) {
    std::snprintf(error->text, sizeof error->text, "%s", problem.what());
    return nullptr;
  }
}

KBIT_API void kbit_decoder_free(kbit::Decoder* decoder) { delete decoder; }

KBIT_API int64_t kbit_decoder_bytes(const kbit::Decoder* decoder) { return decoder->bytes(); }

// 1 if it went well; otherwise nothing is known of the cache beyond the old lengths.
KBIT_API int32_t kbit_decoder_forward(kbit::Decoder* decoder, const kbit::CacheSpec* cache,
                                      const int32_t* tokens, const int32_t* counts,
                                      const int64_t* lengths, int32_t all_logits, float* logits,
                                      Error* error) {
  try {
    decoder->forward(*cache, tokens, counts, lengths, all_logits != 0, logits);
    return 1;
  } catch (const std::exception& problem) {
    std::snprintf(error->text, sizeof error->text, "%s", problem.what());
    return 0;
  }
}
