// Attention of one new token per sequence over its cached keys and values, fp32, CPU.
//
// Letters: B sequences, A cached heads, G query heads that share a cached one, C positions, K head
// width, a multiple of 16. One task per (sequence, cached head): its keys stream past once, then
// its values, whatever G is.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 64;  // values that stay in L1 for all query heads
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
inline void store(Vector v, float* p) { *reinterpret_cast<UnalignedVector*>(p) = v; }

inline float sum_lanes(Vector v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  const Half a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter b =
      __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// exp of numbers at most 0; relative error about 2e-7 (Cephes' polynomial).
inline Vector exponential(Vector x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector lowest = Vector{} - 87.0f;
  x = x > lowest ? x : lowest;
  const Vector shifted = x * 1.44269504f + kRound;
  const Vector n = shifted - kRound;
  const Vector f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// Scores to exponentials, in place; returns their sum. Padded up to a multiple of 16 by -inf.
float soften(float* scores, int64_t padded) {
  float highest = scores[0];
  for (int64_t c = 1; c < padded; ++c) highest = std::max(highest, scores[c]);
  Vector total{};
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Vector e = exponential(load(scores + c) - highest);
    store(e, scores + c);
    total += e;
  }
  return sum_lanes(total);
}

}  // namespace

extern "C" {

// queries (B, A, G, K), keys and values with strides over B, A, C -> out (B, A, G, K).
void ultramem_attend(const float* queries, const float* keys, const float* values,
                     int64_t batch_stride, int64_t head_stride, int64_t position_stride,
                     int64_t batch, int64_t heads, int64_t group, int64_t positions, int64_t width,
                     float factor, float* out) {
  const int64_t padded = (positions + kLanes - 1) / kLanes * kLanes;
  at::parallel_for(0, batch * heads, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scores(group * padded);
    for (int64_t task = first; task < last; ++task) {
      const int64_t offset = task / heads * batch_stride + task % heads * head_stride;
      const float* query = queries + task * group * width;
      float* result = out + task * group * width;
      for (int64_t g = 0; g < group; ++g)
        std::fill(scores.begin() + g * padded + positions, scores.begin() + (g + 1) * padded,
                  -INFINITY);
      for (int64_t c = 0; c < positions; ++c) {
        const float* key = keys + offset + c * position_stride;
        for (int64_t k = 0; k < width; k += kLanes)
          __builtin_prefetch(key + 16 * position_stride + k);
        for (int64_t g = 0; g < group; ++g) {
          Vector sum{};
          for (int64_t k = 0; k < width; k += kLanes)
            sum += load(key + k) * load(query + g * width + k);
          scores[g * padded + c] = factor * sum_lanes(sum);
        }
      }
      std::fill(result, result + group * width, 0.0f);
      std::vector<float> totals(group);
      for (int64_t g = 0; g < group; ++g) totals[g] = soften(scores.data() + g * padded, padded);
      for (int64_t begin = 0; begin < positions; begin += kChunk) {
        const int64_t end = std::min(positions, begin + kChunk);
        for (int64_t g = 0; g < group; ++g)
          for (int64_t k = 0; k < width; k += 4 * kLanes) {
            const int64_t vectors = std::min<int64_t>(4, (width - k) / kLanes);
            Vector sums[4];
            for (int64_t j = 0; j < vectors; ++j)
              sums[j] = load(result + g * width + k + j * kLanes);
            for (int64_t c = begin; c < end; ++c) {
              const float* value = values + offset + c * position_stride + k;
              const float weight = scores[g * padded + c];
              for (int64_t j = 0; j < vectors; ++j) sums[j] += weight * load(value + j * kLanes);
            }
            for (int64_t j = 0; j < vectors; ++j)
              store(sums[j], result + g * width + k + j * kLanes);
          }
      }
      for (int64_t i = 0; i < group * width; ++i) result[i] /= totals[i / width];
    }
  });
}

}  // extern "C"
