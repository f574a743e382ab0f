// One row, or a few, times a matrix of 4-bit weights, with the row rounded to eight bits. Compiled by int4_rows.py.
//
// Why this is fast: vpdpbusd multiplies 64 unsigned bytes by 64 signed ones and adds the products in fours, so codes and
// activations meet as they are, and floats come in only once for each group. What is left is reading the weights.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kBlock = 64;  // rows of W that lie together, see int4.py
constexpr int64_t kAtOnce = 4;  // columns that one vpdpbusd adds up

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

template <typename scalar_t>
void round_row(const scalar_t* x, int64_t group, Rounded& row) {
  for (size_t g = 0; g < row.scales.size(); ++g, x += group) {
    float largest = 0, sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      const float value = static_cast<float>(x[i]);
      largest = std::max(largest, std::abs(value));
      sum += value;
    }
    // NaN and infinities come out as NaN by way of the sum; the codes only have to be valid integers.
    const float steps = largest > 0 && std::isfinite(sum) ? 127 / largest : 0;
    int32_t code_sum = 0;
    for (int64_t i = 0; i < group; ++i) {
      const int32_t code = steps > 0 ? static_cast<int32_t>(std::nearbyint(static_cast<float>(x[i]) * steps)) : 0;
      row.codes[g * group + i] = static_cast<int8_t>(code);
      code_sum += code;
    }
    row.scales[g] = largest / 127;
    row.sums[g] = sum;
    row.code_sums[g] = code_sum;
  }
}

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

template <typename scalar_t>
at::Tensor multiply(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& pairs, int64_t group) {
  const int64_t rows = x.size(0), columns = x.size(1), out = packed.size(0), groups = columns / group;
  at::Tensor y = at::empty({rows, out}, x.options());
  std::vector<Rounded> rounded(rows);
  for (int64_t n = 0; n < rows; ++n) {
    rounded[n].codes.resize(columns);
    rounded[n].scales.resize(groups);
    rounded[n].sums.resize(groups);
    rounded[n].code_sums.resize(groups);
    round_row(x.const_data_ptr<scalar_t>() + n * columns, group, rounded[n]);
  }
  const uint8_t* codes = packed.const_data_ptr<uint8_t>();
  const int32_t* scales = reinterpret_cast<const int32_t*>(pairs.const_data_ptr());
  scalar_t* result = y.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, out / kBlock, 1, [&](int64_t begin, int64_t end) {
    float sums[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t n = 0; n < rows; ++n) {
        multiply_block(codes + block * kBlock * columns / 2, scales + block * kBlock, out, rounded[n], group, sums);
        std::copy(sums, sums + kBlock, result + n * out + block * kBlock);
      }
    }
  });
  return y;
}

at::Tensor int4_rows(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& pairs, int64_t group) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && packed.is_contiguous() && pairs.is_contiguous(),
              "int4_rows: expected contiguous tensors, x of two dimensions");
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kByte && packed.size(0) % kBlock == 0 &&
                  2 * packed.size(1) == x.size(1),
              "int4_rows: packed: got ", packed.sizes(), " ", packed.scalar_type(), ", expected uint8 (out, ",
              x.size(1) / 2, ") with a multiple of ", kBlock, " rows");
  TORCH_CHECK(group > 0 && group % kAtOnce == 0 && x.size(1) % group == 0, "int4_rows: group: got ", group,
              ", expected a divisor of ", x.size(1), " and a multiple of ", kAtOnce);
  TORCH_CHECK(pairs.scalar_type() == at::kBFloat16 && pairs.dim() == 3 && pairs.size(0) == x.size(1) / group &&
                  pairs.size(1) == packed.size(0) && pairs.size(2) == 2,
              "int4_rows: pairs: got ", pairs.sizes(), " ", pairs.scalar_type(), ", expected bfloat16 (",
              x.size(1) / group, ", ", packed.size(0), ", 2)");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "int4_rows: x: got ",
              x.scalar_type(), ", expected float32 or bfloat16");
  return x.scalar_type() == at::kFloat ? multiply<float>(x, packed, pairs, group)
                                       : multiply<at::BFloat16>(x, packed, pairs, group);
}

bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

TORCH_LIBRARY(dslib, library) {
  library.def("int4_rows(Tensor x, Tensor packed, Tensor pairs, int group) -> Tensor");
  library.def("int4_rows_supported() -> bool", &supported);
}

TORCH_LIBRARY_IMPL(dslib, CPU, library) {
  library.impl("int4_rows", &int4_rows);
}
