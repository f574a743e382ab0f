// Numbers as tensors hold them, and as loops compute with them: always in float32.

#pragma once

#include <cstdint>
#include <cstring>

struct bfloat16 {  // the upper half of a float
  uint16_t bits;
};

inline float wide(float value) { return value; }
inline float wide(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

inline void store(float value, float* place) { *place = value; }
inline void store(float value, bfloat16* place) {  // to the nearest, a tie to the even one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  place->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
