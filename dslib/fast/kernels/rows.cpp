// A few rows times the transpose of a weight matrix, y = x Wᵀ. Compiled and called by rows.py.
//
// For one row there is one multiplication for each weight, so the time is that of reading W: the work is to read it in
// order, on all threads, without waiting for sums. Sums are float32, whatever W is in, and in plain loops, which a
// compiler turns into the vectors of the processor; a reader may hold them against `dot` below, which is all there is.

#include <algorithm>
#include <vector>

#include "floats.h"

namespace {

constexpr int64_t kLanes = 32;                // sums that are added to in turn: enough to never wait for one
constexpr int64_t kWeightsAThread = 1 << 15;  // fewer are not worth waking a thread for

#define INLINE __attribute__((always_inline)) inline

template <typename weight>
INLINE float dot(const weight* w, const float* x, int64_t columns) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += wide(w[i + lane]) * x[i + lane];
  }
  for (int64_t lane = 0; i + lane < columns; ++lane) sums[lane] += wide(w[i + lane]) * x[i + lane];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

// W (out, columns) times each of n rows x. One row of W serves all rows of x while it is in the nearest cache.
template <typename weight>
struct Product {
  const weight* w;
  const float* x;
  weight* y;
  int64_t n, columns, out;

  INLINE void rows(int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row) {
      for (int64_t i = 0; i < n; ++i) store(dot(w + row * columns, x + i * columns, columns), y + i * out + row);
    }
  }
};

// The same loops, compiled for the vectors that a processor may have.
template <typename weight>
void as_it_is(const Product<weight>& product, int64_t first, int64_t last) {
  product.rows(first, last);
}
#if defined(__x86_64__)
template <typename weight>
__attribute__((target("avx2,fma"))) void avx2(const Product<weight>& product, int64_t first, int64_t last) {
  product.rows(first, last);
}
template <typename weight>
__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) void avx512(
    const Product<weight>& product, int64_t first, int64_t last) {
  product.rows(first, last);
}
#endif

// kind: 0 is what the caller gets by default, the widest vectors there are; 1 and 2 are for tests, plain and AVX2.
template <typename weight>
auto loops(int64_t kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kind == 0 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return avx512<weight>;
  if (kind != 1 && has_avx2) return avx2<weight>;
#endif
  return as_it_is<weight>;
}

template <typename weight>
void multiply(const weight* x, const weight* w, weight* y, int64_t n, int64_t columns, int64_t out, int64_t kind) {
  std::vector<float> values(n * columns);
  for (int64_t i = 0; i < n * columns; ++i) values[i] = wide(x[i]);
  const Product<weight> product{w, values.data(), y, n, columns, out};
  const auto some = loops<weight>(kind);
  const int64_t at_once = std::max<int64_t>(1, kWeightsAThread / std::max<int64_t>(1, columns));
  const int64_t parts = (out + at_once - 1) / at_once;
#pragma omp parallel for schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; ++part) some(product, part * at_once, std::min(out, (part + 1) * at_once));
}

}  // namespace

extern "C" {
void rows_float32(const float* x, const float* w, float* y, int64_t n, int64_t columns, int64_t out, int64_t kind) {
  multiply(x, w, y, n, columns, out, kind);
}
void rows_bfloat16(const void* x, const void* w, void* y, int64_t n, int64_t columns, int64_t out, int64_t kind) {
  multiply(static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(w), static_cast<bfloat16*>(y), n, columns, out,
           kind);
}
}
