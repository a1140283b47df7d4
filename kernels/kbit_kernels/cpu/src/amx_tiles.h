// How the tile registers of AMX are shaped here: 16 rows of 64 bytes, all of them.
#pragma once

#include <cstdint>

namespace kbit {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace kbit
