// A few rows times the transpose of a weight matrix, y = x Wᵀ. Compiled and called by rows.py.
//
// For one row there is one multiplication for each weight, so the time is that of reading W: the work is to read it in
// order, on all threads, without waiting for sums. `strip` below is all there is: eight rows of W go through one row of x
// together, each with as many sums as a vector has lanes, which are added up once at the end. What is loaded of x serves
// all eight, and they never wait for one another. Sums are float32, whatever W is in.

#include <algorithm>
#include <cstring>
#include <vector>

#include "floats.h"

namespace {

constexpr int kStrip = 8;                     // rows of W: all sums, and one of x, fit into registers
constexpr int64_t kWeightsAThread = 1 << 15;  // fewer are not worth waking a thread for

#define INLINE __attribute__((always_inline)) inline

template <typename number, int L>
struct Vector {
  typedef number type __attribute__((vector_size(sizeof(number) * L)));
};
template <int L>
using lanes = typename Vector<float, L>::type;

template <int L>
INLINE lanes<L> load(const float* place) {
  lanes<L> found;
  std::memcpy(&found, place, sizeof found);
  return found;
}

template <int L>
INLINE lanes<L> load(const bfloat16* place) {  // the upper halves of floats
  typename Vector<uint16_t, L>::type bits;
  std::memcpy(&bits, place, sizeof bits);
  const auto shifted = __builtin_convertvector(bits, typename Vector<uint32_t, L>::type) << 16;
  lanes<L> found;
  std::memcpy(&found, &shifted, sizeof found);
  return found;
}

template <int L>
INLINE float total(const lanes<L>& sums) {  // halves on each other, until four are left
  if constexpr (L == 4) {
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  } else {
    lanes<L / 2> halves[2];
    std::memcpy(halves, &sums, sizeof sums);
    return total<L / 2>(halves[0] + halves[1]);
  }
}

// Numbers to be read several times, widened once.
INLINE const float* once(const float* place, int64_t, std::vector<float>*) { return place; }
INLINE const float* once(const bfloat16* place, int64_t count, std::vector<float>* wider) {
  wider->resize(count);
  for (int64_t i = 0; i < count; ++i) (*wider)[i] = wide(place[i]);
  return wider->data();
}

// R rows of W, one behind the other, times one row of x.
template <int L, int R, typename stored, typename weight>
INLINE void strip(const stored* w, const float* x, weight* y, int64_t columns) {
  lanes<L> sums[R] = {};
  int64_t i = 0;
  for (; i + L <= columns; i += L) {
    const lanes<L> some = load<L>(x + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] += load<L>(w + r * columns + i) * some;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float sum = total<L>(sums[r]);
    for (int64_t rest = i; rest < columns; ++rest) sum += wide(w[r * columns + rest]) * x[rest];
    store(sum, y + r);
  }
}

// W (out, columns) times each of n rows x. A strip of W serves all rows of x while it is in the nearest cache.
template <typename weight>
struct Product {
  const weight* w;
  const float* x;
  weight* y;
  int64_t n, columns, out;

  template <int L>
  INLINE void rows(int64_t first, int64_t last) const {
    int64_t row = first;
    std::vector<float> wider;
    for (; row + kStrip <= last; row += kStrip) {
      if (n == 1) {
        strip<L, kStrip>(w + row * columns, x, y + row, columns);
        continue;
      }
      const float* some = once(w + row * columns, kStrip * columns, &wider);
      for (int64_t i = 0; i < n; ++i) strip<L, kStrip>(some, x + i * columns, y + i * out + row, columns);
    }
    for (; row < last; ++row) {
      for (int64_t i = 0; i < n; ++i) strip<L, 1>(w + row * columns, x + i * columns, y + i * out + row, columns);
    }
  }
};

// The same loops, compiled for the vectors that a processor may have.
template <typename weight>
void as_it_is(const Product<weight>& product, int64_t first, int64_t last) {
  product.template rows<4>(first, last);
}
#if defined(__x86_64__)
template <typename weight>
__attribute__((target("avx2,fma"))) void avx2(const Product<weight>& product, int64_t first, int64_t last) {
  product.template rows<8>(first, last);
}
template <typename weight>
__attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))) void avx512(
    const Product<weight>& product, int64_t first, int64_t last) {
  product.template rows<16>(first, last);
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
