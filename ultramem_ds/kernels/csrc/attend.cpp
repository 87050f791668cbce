// Attention of one new token per sequence over its cached keys and values, fp32, CPU.
//
// Letters: B sequences, A cached heads, G query heads that share a cached one, C positions, K head
// width, a multiple of 16. One task per (sequence, cached head): its keys stream past once, then
// its values, whatever G is. Query heads are taken four at a time, so that what is loaded of a key
// or value serves four products, and sums stay in registers.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace ultramem {
namespace {

constexpr int64_t kLanes = VectorOf<float>::lanes;
constexpr int64_t kChunk = 64;  // positions whose keys or values stay in L1 for all query heads
constexpr int kTile = 16;       // products in flight, one per lane of their sums
using Floats = Vector<float>;
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

// Keeps what has been loaded in its register: GCC would load it again for every product.
inline void pin(Floats& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#else
  (void)v;
#endif
}

// The sum over the lanes of each of sixteen vectors, in their order.
inline Floats sums_of_lanes(const Floats (&v)[kTile]) {
  Floats eighths[8], quarters[4], halves[2];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    eighths[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const Floats a = eighths[2 * i], b = eighths[2 * i + 1];
    quarters[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i) {
    const Floats a = quarters[2 * i], b = quarters[2 * i + 1];
    halves[i] =
        __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
        __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return __builtin_shufflevector(halves[0], halves[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22,
                                 24, 26, 28, 30) +
         __builtin_shufflevector(halves[0], halves[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23,
                                 25, 27, 29, 31);
}

// exp of numbers at most 0; relative error about 2e-7 (Cephes' polynomial).
inline Floats exponential(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats lowest = Floats{} - 87.0f;
  x = x > lowest ? x : lowest;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// Scores to exponentials, in place; returns their sum. Padded up to a multiple of 16 by -inf.
float soften(float* scores, int64_t padded) {
  Floats tops = load(scores);
  for (int64_t c = kLanes; c < padded; c += kLanes) {
    const Floats next = load(scores + c);
    tops = next > tops ? next : tops;
  }
  float highest = tops[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) highest = std::max(highest, tops[lane]);
  Floats totals{};
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats e = exponential(load(scores + c) - highest);
    store(scores + c, e);
    totals += e;
  }
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += totals[lane];
  return total;
}

// One sequence and cached head: rows of K floats, a constant number of floats apart.
struct Cached {
  const float* rows;
  int64_t stride, positions, width;

  const float* row(int64_t c) const { return rows + std::min(c, positions - 1) * stride; }
};

// Scores of some query heads for positions [begin, end), rounded up to whole tiles.
template <int kHeads>
void score(const Cached& keys, const float* query, int64_t begin, int64_t end, float factor,
           float* scores, int64_t padded) {
  constexpr int kKeys = kTile / kHeads;
  constexpr int kTogether = kHeads == 1 ? 1 : kKeys;  // a lone head's keys come one after another
  for (int64_t c = begin; c < end; c += kKeys) {
    Floats products[kTile];
#pragma GCC unroll 16
    for (int first = 0; first < kKeys; first += kTogether) {
      Floats sums[kHeads][kTogether] = {};
      const float* rows[kTogether];
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) rows[j] = keys.row(c + first + j);
      for (int64_t k = 0; k < keys.width; k += kLanes) {
        Floats key[kTogether];
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) {
          key[j] = load(rows[j] + k);
          pin(key[j]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; ++g) {
          Floats q = load(query + g * keys.width + k);
          pin(q);
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j) sums[g][j] += q * key[j];
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; ++g)
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) products[g * kKeys + first + j] = sums[g][j];
    }
    const Floats totals = factor * sums_of_lanes(products);
    for (int g = 0; g < kHeads; ++g)
      std::memcpy(scores + g * padded + c, reinterpret_cast<const float*>(&totals) + g * kKeys,
                  kKeys * sizeof(float));
  }
}

// Add the weighted values of positions [begin, end) to some query heads' results, from column k on.
template <int kHeads, int kVectors>
void pool(const Cached& values, const float* weights, int64_t padded, int64_t begin, int64_t end,
          int64_t k, float* result) {
  Floats sums[kHeads][kVectors];
#pragma GCC unroll 16
  for (int g = 0; g < kHeads; ++g)
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      sums[g][j] = load(result + g * values.width + k + j * kLanes);
  for (int64_t c = begin; c < end; ++c) {
    const float* row = values.rows + c * values.stride + k;
    Floats value[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      value[j] = load(row + j * kLanes);
      pin(value[j]);
    }
#pragma GCC unroll 16
    for (int g = 0; g < kHeads; ++g) {
      Floats weight = Floats{} + weights[g * padded + c];
      pin(weight);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[g][j] += weight * value[j];
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < kHeads; ++g)
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      store(result + g * values.width + k + j * kLanes, sums[g][j]);
}

template <int kHeads>
void pool_all(const Cached& values, const float* weights, int64_t padded, int64_t begin,
              int64_t end, float* result) {
  int64_t k = 0;
  for (; k + 4 * kLanes <= values.width; k += 4 * kLanes)
    pool<kHeads, 4>(values, weights, padded, begin, end, k, result);
  for (; k < values.width; k += kLanes)
    pool<kHeads, 1>(values, weights, padded, begin, end, k, result);
}

// Calls body with a constant, 4 or 1, and the first of as many query heads.
template <typename Body>
void for_heads(int64_t group, const Body& body) {
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) body(std::integral_constant<int, 4>(), g);
  for (; g < group; ++g) body(std::integral_constant<int, 1>(), g);
}

}  // namespace
}  // namespace ultramem

using namespace ultramem;

extern "C" {

// queries (B, A, G, K), keys and values with strides over B, A, C -> out (B, A, G, K).
void ultramem_attend(const float* queries, const float* keys, const float* values,
                     int64_t batch_stride, int64_t head_stride, int64_t position_stride,
                     int64_t batch, int64_t heads, int64_t group, int64_t positions, int64_t width,
                     float factor, float* out) {
  const int64_t padded = (positions + kLanes - 1) / kLanes * kLanes;
  at::parallel_for(0, batch * heads, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scores(group * padded), totals(group);
    for (int64_t task = first; task < last; ++task) {
      const int64_t offset = task / heads * batch_stride + task % heads * head_stride;
      const Cached key_rows{keys + offset, position_stride, positions, width};
      const Cached value_rows{values + offset, position_stride, positions, width};
      const float* query = queries + task * group * width;
      float* result = out + task * group * width;
      for (int64_t begin = 0; begin < positions; begin += kChunk) {
        const int64_t end = std::min(positions, begin + kChunk);
        for_heads(group, [&](auto count, int64_t g) {
          score<decltype(count)::value>(key_rows, query + g * width, begin, end, factor,
                                        scores.data() + g * padded, padded);
        });
      }
      for (int64_t g = 0; g < group; ++g) {
        float* row = scores.data() + g * padded;
        std::fill(row + positions, row + padded, -INFINITY);
        totals[g] = soften(row, padded);
      }
      std::fill(result, result + group * width, 0.0f);
      for (int64_t begin = 0; begin < positions; begin += kChunk) {
        const int64_t end = std::min(positions, begin + kChunk);
        for_heads(group, [&](auto count, int64_t g) {
          pool_all<decltype(count)::value>(value_rows, scores.data() + g * padded, padded, begin,
                                           end, result + g * width);
        });
      }
      for (int64_t i = 0; i < group * width; ++i) result[i] /= totals[i / width];
    }
  });
}

}  // extern "C"
