// One row, or a few, times a matrix of 4-bit weights. Compiled by int4_rows.py.
//
// int4_product multiplies the row as it is: a code becomes a float in a register. int4_rows rounds the row to eight bits
// first, so that codes and activations meet as integers and floats come in only once for each group: vpdpbusd multiplies
// 64 unsigned bytes by 64 signed ones and adds the products in fours (AVX-512), vpmaddubsw 32 by 32 in twos (AVX2). What
// is left is reading the weights.

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/floats.h"

namespace {

constexpr int64_t kBlock = 64;  // rows of W that lie together, see int4.py
constexpr int64_t kHalf = kBlock / 2;
constexpr int64_t kAtOnce = 4;  // columns that one vpdpbusd adds up

// Two bfloat16 to 32 bits, the scale below.
float scale_of(int32_t pair) { return wide(bfloat16{static_cast<uint16_t>(pair)}); }
float zero_of(int32_t pair) { return wide(bfloat16{static_cast<uint16_t>(static_cast<uint32_t>(pair) >> 16)}); }

// A row x as it is, and its sums over the groups.
struct Floats {
  std::vector<float> values, sums;
};

// y = x Wᵀ for one row and a block of 64 rows of W, in loops that any compiler turns into vectors.
void product_block(const uint8_t* codes, const int32_t* pairs, int64_t stride, const Floats& row, int64_t group,
                   float* y) {
  float total[kBlock] = {};
  const float* x = row.values.data();
  for (size_t g = 0; g < row.sums.size(); ++g, pairs += stride) {
    float sum[kBlock] = {};
    for (int64_t i = 0; i < group; ++i, ++x, codes += kHalf) {
      for (int64_t n = 0; n < kHalf; ++n) {
        sum[n] += *x * static_cast<float>(codes[n] & 15);
        sum[n + kHalf] += *x * static_cast<float>(codes[n] >> 4);
      }
    }
    for (int64_t n = 0; n < kBlock; ++n) {  // a weight is (code - 8) * scale + zero
      total[n] += scale_of(pairs[n]) * (sum[n] - 8 * row.sums[g]) + zero_of(pairs[n]) * row.sums[g];
    }
  }
  std::copy(total, total + kBlock, y);
}

#if X86
// Scales and zeros of eight rows.
struct Eight {
  __m256 scale, zero;
};
__attribute__((target("avx2,fma"), always_inline)) inline Eight eight_pairs(const int32_t* pairs) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(_mm256_and_si256(both, upper))};
}

// The same with eight floats to a register, and all 64 sums of a group in registers.
__attribute__((target("avx2,fma")))
void product_block_avx2(const uint8_t* codes, const int32_t* pairs, int64_t stride, const Floats& row, int64_t group,
                        float* y) {
  const __m256i low = _mm256_set1_epi32(15);
  __m256 total[8];
  for (auto& part : total) part = _mm256_setzero_ps();
  const float* x = row.values.data();
  for (size_t g = 0; g < row.sums.size(); ++g, pairs += stride) {
    const __m256 start = _mm256_set1_ps(-8 * row.sums[g]);
    __m256 sum[8];
    for (auto& part : sum) part = start;
    for (int64_t i = 0; i < group; ++i, ++x, codes += kHalf) {
      const __m256 input = _mm256_set1_ps(*x);
      for (int part = 0; part < 4; ++part) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * part));
        const __m256i both = _mm256_cvtepu8_epi32(eight);
        sum[part] = _mm256_fmadd_ps(input, _mm256_cvtepi32_ps(_mm256_and_si256(both, low)), sum[part]);
        sum[part + 4] = _mm256_fmadd_ps(input, _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)), sum[part + 4]);
      }
    }
    const __m256 shift = _mm256_set1_ps(row.sums[g]);
    for (int part = 0; part < 8; ++part) {
      const auto [scale, zero] = eight_pairs(pairs + 8 * part);
      total[part] = _mm256_fmadd_ps(zero, shift, _mm256_fmadd_ps(scale, sum[part], total[part]));
    }
  }
  for (int part = 0; part < 8; ++part) _mm256_storeu_ps(y + 8 * part, total[part]);
}
#endif

// Two loads bring four columns of a block. Bytes in this order bring the four codes of a row together: rows 0 to 15, and
// 16 to 31. (In the upper half of each byte, rows 32 to 47 and 48 to 63.)
struct Order {
  alignas(64) uint8_t bytes[2][64];
};
constexpr Order make_order() {
  Order order{};
  for (int half = 0; half < 2; ++half) {
    for (int byte = 0; byte < 64; ++byte) {
      order.bytes[half][byte] = static_cast<uint8_t>(byte % 4 * 32 + byte / 4 + 16 * half);
    }
  }
  return order;
}
constexpr Order kOrder = make_order();

// A row x in eight bits, group by group: x is about scale * codes. The sums are those of x before rounding.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
  std::vector<int32_t> code_sums;
};

template <typename number>
void round_row(const number* x, int64_t group, Rounded& row) {
  for (size_t g = 0; g < row.scales.size(); ++g, x += group) {
    float largest = 0, sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      const float value = wide(x[i]);
      largest = std::max(largest, std::abs(value));
      sum += value;
    }
    // NaN and infinities come out as NaN by way of the sum; the codes only have to be valid integers.
    const float steps = largest > 0 && std::isfinite(sum) ? 127 / largest : 0;
    int32_t code_sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      const int32_t code = steps > 0 ? static_cast<int32_t>(std::nearbyint(wide(x[i]) * steps)) : 0;
      row.codes[g * group + i] = static_cast<int8_t>(code);
      code_sum += code;
    }
    row.scales[g] = largest / 127;
    row.sums[g] = sum;
    row.code_sums[g] = code_sum;
  }
}

#if X86
// y = x Wᵀ for one row and a block of 64 rows of W. A byte of `codes` holds rows i and i + 32 of one column.
__attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vnni")))
void multiply_block(const uint8_t* codes, const int32_t* pairs, int64_t stride, const Rounded& row, int64_t group,
                    float* y) {
  const __m512i first = _mm512_load_si512(kOrder.bytes[0]), second = _mm512_load_si512(kOrder.bytes[1]);
  const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const int8_t* x = row.codes.data();
  for (size_t g = 0; g < row.scales.size(); ++g, pairs += stride) {
    // A weight is (code - 8) * scale + zero, and the 8 is taken off for the whole group beforehand.
    const __m512i start = _mm512_set1_epi32(-8 * row.code_sums[g]);
    __m512i sum[4] = {start, start, start, start};
    for (int64_t i = 0; i < group; i += kAtOnce, x += kAtOnce, codes += kAtOnce * kBlock / 2) {
      const __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
      const __m512i near = _mm512_permutex2var_epi8(a, first, b), far = _mm512_permutex2var_epi8(a, second, b);
      int32_t four;
      std::memcpy(&four, x, sizeof four);
      const __m512i inputs = _mm512_set1_epi32(four);
      sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_and_si512(near, low), inputs);
      sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_and_si512(far, low), inputs);
      sum[2] = _mm512_dpbusd_epi32(sum[2], _mm512_and_si512(_mm512_srli_epi16(near, 4), low), inputs);
      sum[3] = _mm512_dpbusd_epi32(sum[3], _mm512_and_si512(_mm512_srli_epi16(far, 4), low), inputs);
    }
    const __m512 step = _mm512_set1_ps(row.scales[g]), shift = _mm512_set1_ps(row.sums[g]);
    for (int part = 0; part < 4; ++part) {
      // Two bfloat16 to 32 bits, the scale below. A bfloat16 is the upper half of a float.
      const __m512i pair = _mm512_loadu_si512(pairs + 16 * part);
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      const __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
      total[part] = _mm512_fmadd_ps(zero, shift, total[part]);
      total[part] = _mm512_fmadd_ps(_mm512_mul_ps(scale, step), _mm512_cvtepi32_ps(sum[part]), total[part]);
    }
  }
  for (int part = 0; part < 4; ++part) {
    _mm512_storeu_ps(y + 16 * part, total[part]);
  }
}

// The same with 32 bytes to a register. Sums of products fit 16 bits for sixteen columns (15 * 127 * 16 < 2^15).
__attribute__((target("avx2,fma")))
void multiply_block_avx2(const uint8_t* codes, const int32_t* pairs, int64_t stride, const Rounded& row, int64_t group,
                         float* y) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256 total[8];
  for (auto& part : total) part = _mm256_setzero_ps();
  const int8_t* x = row.codes.data();
  for (size_t g = 0; g < row.scales.size(); ++g, pairs += stride) {
    const __m256i start = _mm256_set1_epi32(-8 * row.code_sums[g]);
    __m256i sum[8];
    for (auto& part : sum) part = start;
    for (int64_t first = 0; first < group; first += 16) {
      __m256i few[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int64_t i = first; i < std::min(first + 16, group); i += 2, x += 2, codes += kBlock) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + kHalf));
        int16_t two;
        std::memcpy(&two, x, sizeof two);
        const __m256i inputs = _mm256_set1_epi16(two);
        const __m256i a_low = _mm256_and_si256(a, low), a_high = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
        const __m256i b_low = _mm256_and_si256(b, low), b_high = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
        few[0] = _mm256_add_epi16(few[0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a_low, b_low), inputs));
        few[1] = _mm256_add_epi16(few[1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a_low, b_low), inputs));
        few[2] = _mm256_add_epi16(few[2], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a_high, b_high), inputs));
        few[3] = _mm256_add_epi16(few[3], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a_high, b_high), inputs));
      }
      for (int part = 0; part < 4; ++part) {  // unpacking took rows 0 to 7 and 16 to 23 together, 8 to 15 and 24 to 31
        const int at = part / 2 * 4 + part % 2;
        sum[at] = _mm256_add_epi32(sum[at], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(few[part])));
        sum[at + 2] = _mm256_add_epi32(sum[at + 2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(few[part], 1)));
      }
    }
    const __m256 step = _mm256_set1_ps(row.scales[g]), shift = _mm256_set1_ps(row.sums[g]);
    for (int part = 0; part < 8; ++part) {
      const auto [scale, zero] = eight_pairs(pairs + 8 * part);
      total[part] = _mm256_fmadd_ps(zero, shift, total[part]);
      total[part] = _mm256_fmadd_ps(_mm256_mul_ps(scale, step), _mm256_cvtepi32_ps(sum[part]), total[part]);
    }
  }
  for (int part = 0; part < 8; ++part) _mm256_storeu_ps(y + 8 * part, total[part]);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool supported() { return has_avx512() || has_avx2(); }
#else
bool supported() { return false; }
#endif

// Rows x (n, columns) times W: codes of (out, columns / 2) bytes, and a scale and a zero for each group and row of W.
template <typename number>
struct Call {
  const number* x;
  const uint8_t* codes;
  const int32_t* pairs;
  number* y;
  int64_t n, columns, out, group;
};

// Every row times every block of W, blocks spread over the threads. `block` multiplies one row by one block.
template <typename number, typename Row, typename Block>
void all_blocks(const Call<number>& call, const std::vector<Row>& rows, Block block) {
#pragma omp parallel for schedule(static) if (call.out > kBlock)
  for (int64_t first = 0; first < call.out; first += kBlock) {
    float sums[kBlock];
    for (int64_t n = 0; n < call.n; ++n) {
      block(call.codes + first / 2 * call.columns, call.pairs + first, call.out, rows[n], call.group, sums);
      for (int64_t i = 0; i < kBlock; ++i) store(sums[i], call.y + n * call.out + first + i);
    }
  }
}

// `portable`: by the loops that run on any processor, for tests on one that has better.
template <typename number>
void product(const Call<number>& call, bool portable) {
  std::vector<Floats> rows(call.n);
  const number* from = call.x;
  for (auto& row : rows) {
    for (int64_t i = 0; i < call.columns; ++i) row.values.push_back(wide(*from++));
    for (int64_t at = 0; at < call.columns; at += call.group) {
      row.sums.push_back(std::accumulate(row.values.begin() + at, row.values.begin() + at + call.group, 0.0f));
    }
  }
#if X86
  if (has_avx2() && !portable) return all_blocks(call, rows, product_block_avx2);
#endif
  all_blocks(call, rows, product_block);
}

template <typename number>
void rounded_product(const Call<number>& call) {
#if X86
  const int64_t groups = call.columns / call.group;
  std::vector<Rounded> rows(call.n);
  for (int64_t n = 0; n < call.n; ++n) {
    rows[n].codes.resize(call.columns);
    rows[n].scales.resize(groups);
    rows[n].sums.resize(groups);
    rows[n].code_sums.resize(groups);
    round_row(call.x + n * call.columns, call.group, rows[n]);
  }
  all_blocks(call, rows, has_avx512() ? multiply_block : multiply_block_avx2);
#endif
}

template <typename number>
void either(const Call<number>& call, int64_t how) {
  how == 2 ? rounded_product(call) : product(call, how == 1);
}

}  // namespace

// how: 0 rows as they are, 1 the same by the loops for any processor, 2 rows in eight bits.
#define FUNCTION(name, number)                                                                                     \
  void name(const void* x, const void* codes, const void* pairs, void* y, int64_t n, int64_t columns, int64_t out, \
            int64_t group, int64_t how) {                                                                          \
    either(Call<number>{static_cast<const number*>(x), static_cast<const uint8_t*>(codes),                         \
                        static_cast<const int32_t*>(pairs), static_cast<number*>(y), n, columns, out, group},      \
           how);                                                                                                   \
  }

extern "C" {
FUNCTION(int4_float32, float)
FUNCTION(int4_bfloat16, bfloat16)
int64_t int4_rounds() { return supported(); }
}
