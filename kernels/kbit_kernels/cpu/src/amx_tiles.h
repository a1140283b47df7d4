// How the tile registers of AMX are shaped here: 16 rows of 64 bytes, all of them.
#pragma once

#include <cstdint>

// Where there is gcc's or clang's header, the assembler knows the instructions too.
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>)
#define KBIT_AMX
#endif
#if __has_include(<avx512bf16intrin.h>)
#define KBIT_BF16
#endif

namespace kbit {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace kbit
