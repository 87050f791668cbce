// Two-stage selection of a memory layer's slots, fp32, CPU: candidates of each side, their exact
// scores, the best pairs of their grid; and the way back from the pairs' scores to queries, keys and
// cores. torch needs about forty calls for the way out, and scores of (T, H, n, r) or sorts of all
// (token, candidate) pairs for the way back; here only selected pairs are touched.
//
// Letters: T tokens, H heads, n keys per side, r rank, h cores, m top-m, G queries of a token,
// d kdim. Side 0 is rows, side 1 columns.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace ultramem {
namespace {

constexpr int64_t kLanes = VectorOf<float>::lanes;

float dot(const float* a, const float* b, int64_t size) {
  Vector<float> sums{}, others{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    sums += load(a + i) * load(b + i);
    others += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i + kLanes <= size; i += kLanes) sums += load(a + i) * load(b + i);
  float lanes[kLanes];
  store(lanes, sums + others);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  float total = lanes[0];
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

// y += factor * x
inline void add_scaled(float factor, const float* x, int64_t size, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(y + i, load(y + i) + factor * load(x + i));
  for (; i < size; ++i) y[i] += factor * x[i];
}

// Bit j: values[j] > threshold, of 16.
inline uint32_t above(const float* values, float threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(threshold), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane)
    bits |= static_cast<uint32_t>(values[lane] > threshold) << lane;
  return bits;
#endif
}

// Room for the numbers among which the best are.
struct Scratch {
  explicit Scratch(int64_t size)
      : values(size + 16), sorted(size), places(size + 16), order(size) {}
  std::vector<float> values, sorted;
  std::vector<int32_t> places, order;
};

// See `top`.
void top_by_insertion(const float* values, int64_t size, int64_t m, float* best, int64_t* index) {
  const auto insert = [&](int64_t i, int64_t place) {
    const float value = values[i];
    for (; place > 0 && value > best[place - 1]; --place) {
      best[place] = best[place - 1];
      index[place] = index[place - 1];
    }
    best[place] = value;
    index[place] = i;
  };
  for (int64_t i = 0; i < m; ++i) insert(i, i);
  int64_t i = m;
  for (; i + kLanes <= size; i += kLanes)
    for (uint32_t bits = above(values + i, best[m - 1]); bits; bits &= bits - 1) {
      const int64_t found = i + __builtin_ctz(bits);
      if (values[found] > best[m - 1]) insert(found, m - 1);
    }
  for (; i < size; ++i)
    if (values[i] > best[m - 1]) insert(i, m - 1);
}

#if defined(__AVX512F__)
// What `top` does, without a branch that depends on the numbers. They are dealt to 16 * kGroups
// groups, at least m; the m-th largest of the groups' maxima is a bound that at least m numbers
// reach, and few more. Those are kept, and each one's place is the number of kept ones that come
// before it. Returns false, having done nothing, where fewer than m reach it: some are NaN.
template <int kGroups>
bool top_by_bound(const float* values, int64_t size, int64_t m, Scratch& scratch, float* best,
                  int64_t* index) {
  const auto lanes_of = [](int64_t left) {
    return static_cast<__mmask16>(left < 16 ? (1u << std::max<int64_t>(left, 0)) - 1 : 0xffffu);
  };
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most[kGroups];
  for (int g = 0; g < kGroups; ++g) most[g] = least;
  for (int64_t i = 0; i < size; i += 16 * kGroups)
    for (int g = 0; g < kGroups; ++g) {
      const int64_t from = i + 16 * g;
      const __m512 block = _mm512_mask_loadu_ps(least, lanes_of(size - from), values + from);
      most[g] = _mm512_max_ps(most[g], block);
    }
  alignas(64) float maxima[16 * kGroups];
  for (int g = 0; g < kGroups; ++g) _mm512_store_ps(maxima + 16 * g, most[g]);
  __m128 lowest = _mm_set_ss(std::numeric_limits<float>::infinity());
  for (int i = 0; i < 16 * kGroups; ++i) {
    const __m512 one = _mm512_set1_ps(maxima[i]);
    int larger = 0;
    for (int g = 0; g < kGroups; ++g)
      larger += __builtin_popcount(_mm512_cmp_ps_mask(most[g], one, _CMP_GT_OQ));
    lowest = _mm_mask_min_ss(lowest, larger < m, lowest, _mm_load_ss(maxima + i));
  }
  const __m512 bound = _mm512_broadcastss_ps(lowest);
  float* kept = scratch.values.data();
  int32_t* places = scratch.places.data();
  int64_t count = 0;
  __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < size; i += 16, here = _mm512_add_epi32(here, _mm512_set1_epi32(16))) {
    const __mmask16 inside = lanes_of(size - i);
    const __m512 block = _mm512_maskz_loadu_ps(inside, values + i);
    const __mmask16 reach = _mm512_mask_cmp_ps_mask(inside, block, bound, _CMP_GE_OQ);
    _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(reach, block));
    _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(reach, here));
    count += __builtin_popcount(reach);
  }
  if (count < m) return false;
  for (int64_t i = 0; i < count; ++i) {
    const __m512 one = _mm512_set1_ps(kept[i]);
    int64_t before = 0;
    for (int64_t j = 0; j < count; j += 16) {
      const __m512 block = _mm512_loadu_ps(kept + j);
      const __mmask16 inside = lanes_of(count - j), earlier = lanes_of(i - j);
      before += __builtin_popcount(_mm512_mask_cmp_ps_mask(inside, block, one, _CMP_GT_OQ) |
                                   _mm512_mask_cmp_ps_mask(earlier, block, one, _CMP_EQ_OQ));
    }
    scratch.sorted[before] = kept[i];
    scratch.order[before] = places[i];
  }
  std::copy_n(scratch.sorted.data(), m, best);
  std::copy_n(scratch.order.data(), m, index);
  return true;
}
#endif

// The m largest of `size` numbers, best first; of equal ones the first comes first.
void top(const float* values, int64_t size, int64_t m, Scratch& scratch, float* best,
         int64_t* index) {
#if defined(__AVX512F__)
  if (m <= 8 && top_by_bound<1>(values, size, m, scratch, best, index)) return;
  if (m > 8 && m <= 16 && top_by_bound<2>(values, size, m, scratch, best, index)) return;
  if (m > 16 && m <= 32 && top_by_bound<4>(values, size, m, scratch, best, index)) return;
#endif
  top_by_insertion(values, size, m, best, index);
}

}  // namespace
}  // namespace ultramem

using namespace ultramem;

extern "C" {

// search: candidate scores (2, T, H, n) with the given strides. queries (T, G, d); groups (2, H, r)
// says which of a token's queries meets a key; keys (2, H, n, r, d). cores (h, H, r, r), or null
// where a pair's score is the sum of its row's and its column's. -> slots (T, H, m), row * n + col,
// scores (T, H, m, h), best first, and unless null the pairs' row and column scores (2, T, H, m, r),
// the columns' `factor_stride` numbers behind the rows'.
void ultramem_select(const float* search, int64_t side_stride, int64_t token_stride,
                     int64_t head_stride, const float* queries, const int64_t* groups,
                     const float* keys, const float* cores, int64_t tokens, int64_t heads,
                     int64_t num_keys, int64_t rank, int64_t width, int64_t num_queries, int64_t m,
                     int64_t num_cores, int64_t factor_stride, int64_t* slots, float* scores,
                     float* factors) {
  at::parallel_for(0, tokens * heads, 1, [&](int64_t first, int64_t last) {
    std::vector<float> best(m), exact(2 * m * rank), turned(rank), flipped(rank * m), grid(m * m);
    std::vector<float> total(rank * rank);
    std::vector<int64_t> candidates(2 * m), pairs(m);
    Scratch scratch(std::max(num_keys, m * m));
    for (int64_t task = first; task < last; ++task) {
      const int64_t t = task / heads, head = task % heads;
      const auto key = [&](int64_t side, int64_t c) {
        return keys + ((side * heads + head) * num_keys + candidates[side * m + c]) * rank * width;
      };
      for (int64_t side = 0; side < 2; ++side) {
        const float* ranked = search + side * side_stride + t * token_stride + head * head_stride;
        top(ranked, num_keys, m, scratch, best.data(), candidates.data() + side * m);
        for (int64_t c = 0; c < m; ++c) prefetch(key(side, c), rank * width * sizeof(float));
      }
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t* group = groups + (side * heads + head) * rank;
        for (int64_t c = 0; c < m; ++c)
          for (int64_t a = 0; a < rank; ++a)
            exact[(side * m + c) * rank + a] = dot(
                key(side, c) + a * width, queries + (t * num_queries + group[a]) * width, width);
      }
      const float *rows = exact.data(), *cols = exact.data() + m * rank;
      if (cores) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t core = 0; core < num_cores; ++core)
          for (int64_t i = 0; i < rank * rank; ++i)
            total[i] += cores[(core * heads + head) * rank * rank + i];
        for (int64_t col = 0; col < m; ++col)
          for (int64_t b = 0; b < rank; ++b) flipped[b * m + col] = cols[col * rank + b];
        std::fill(grid.begin(), grid.end(), 0.0f);
        for (int64_t row = 0; row < m; ++row)
          for (int64_t b = 0; b < rank; ++b) {
            float factor = 0;
            for (int64_t a = 0; a < rank; ++a) factor += rows[row * rank + a] * total[a * rank + b];
            add_scaled(factor, flipped.data() + b * m, m, grid.data() + row * m);
          }
      } else {
        for (int64_t i = 0; i < m * m; ++i) grid[i] = rows[i / m] + cols[i % m];
      }
      top(grid.data(), m * m, m, scratch, best.data(), pairs.data());
      for (int64_t i = 0; i < m; ++i) {
        const float *row = rows + pairs[i] / m * rank, *col = cols + pairs[i] % m * rank;
        const int64_t entry = task * m + i;
        slots[entry] = candidates[pairs[i] / m] * num_keys + candidates[m + pairs[i] % m];
        for (int64_t core = 0; core < num_cores; ++core) {
          float score = cores ? 0 : *row + *col;
          const int64_t offset = (core * heads + head) * rank * rank;
          for (int64_t a = 0; cores && a < rank; ++a)
            for (int64_t b = 0; b < rank; ++b)
              score += row[a] * cores[offset + a * rank + b] * col[b];
          scores[entry * num_cores + core] = score;
        }
        for (int64_t a = 0; factors && a < rank; ++a) {
          factors[entry * rank + a] = row[a];
          factors[factor_stride + entry * rank + a] = col[a];
        }
      }
    }
  });
}

// grad (T, H, m, h) of the scores; the others as above. -> gradients of the factors (2, T, H, m, r),
// the queries, keys and cores (none where cores is null), all written in full.
//
// Tokens give the queries' gradients; then the pairs are sorted by key, and each key's gradient is
// summed by one thread, pairs in order of tokens: the result does not depend on the threads.
void ultramem_select_backward(const float* grad, const float* factors, const int64_t* slots,
                              const float* queries, const int64_t* groups, const float* keys,
                              const float* cores, int64_t tokens, int64_t heads, int64_t num_keys,
                              int64_t rank, int64_t width, int64_t num_queries, int64_t m,
                              int64_t num_cores, float* grad_factors, float* grad_queries,
                              float* grad_keys, float* grad_cores) {
  constexpr int64_t kChunk = 64;  // tokens whose share of the cores' gradient is summed together
  const int64_t chunks = (tokens + kChunk - 1) / kChunk, matrix = rank * rank;
  const int64_t cores_size = num_cores * heads * matrix, entries = tokens * heads * m;
  std::vector<double> partial(cores ? chunks * cores_size : 0, 0.0);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first * kChunk; t < std::min(tokens, last * kChunk); ++t) {
      float* grad_query = grad_queries + t * num_queries * width;
      std::fill(grad_query, grad_query + num_queries * width, 0.0f);
      for (int64_t task = t * heads; task < (t + 1) * heads; ++task) {
        const int64_t head = task % heads;
        for (int64_t entry = task * m; entry < (task + 1) * m; ++entry) {
          const float *row = factors + entry * rank, *col = factors + (entries + entry) * rank;
          float *grad_row = grad_factors + entry * rank, *grad_col = grad_row + entries * rank;
          for (int64_t a = 0; a < rank; ++a) grad_row[a] = grad_col[a] = cores ? 0 : grad[entry];
          for (int64_t core = 0; cores && core < num_cores; ++core) {
            const float g = grad[entry * num_cores + core];
            const int64_t offset = (core * heads + head) * matrix;
            double* sums = partial.data() + t / kChunk * cores_size + offset;
            for (int64_t a = 0; a < rank; ++a)
              for (int64_t b = 0; b < rank; ++b) {
                const float weight = g * cores[offset + a * rank + b];
                grad_row[a] += weight * col[b];
                grad_col[b] += weight * row[a];
                sums[a * rank + b] += g * row[a] * col[b];
              }
          }
          const int64_t ids[2] = {slots[entry] / num_keys, slots[entry] % num_keys};
          for (int64_t side = 0; side < 2; ++side) {
            const int64_t* group = groups + (side * heads + head) * rank;
            const float* key = keys + ((side * heads + head) * num_keys + ids[side]) * rank * width;
            const float* weights = side ? grad_col : grad_row;
            for (int64_t a = 0; a < rank; ++a)
              add_scaled(weights[a], key + a * width, width, grad_query + group[a] * width);
          }
        }
      }
    }
  });
  for (int64_t i = 0; cores && i < cores_size; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * cores_size + i];
    grad_cores[i] = static_cast<float>(sum);
  }
  // Per (side, head): ends of each key's run, and the entries (t, i) as t * m + i in order of keys.
  std::vector<int64_t> ends(2 * heads * (num_keys + 1), 0), order(2 * entries);
  const auto key_of = [&](int64_t side, int64_t head, int64_t place) {
    const int64_t slot = slots[(place / m * heads + head) * m + place % m];
    return side ? slot % num_keys : slot / num_keys;
  };
  at::parallel_for(0, 2 * heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t list = first; list < last; ++list) {
      int64_t* end = ends.data() + list * (num_keys + 1);
      for (int64_t place = 0; place < tokens * m; ++place)
        ++end[key_of(list / heads, list % heads, place) + 1];
      for (int64_t key = 0; key < num_keys; ++key) end[key + 1] += end[key];
      for (int64_t place = 0; place < tokens * m; ++place)  // end[key] moves from begin to end
        order[list * tokens * m + end[key_of(list / heads, list % heads, place)]++] = place;
    }
  });
  at::parallel_for(0, 2 * heads * num_keys, 16, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t list = k / num_keys, key = k % num_keys, side = list / heads;
      const int64_t head = list % heads, *end = ends.data() + list * (num_keys + 1);
      const int64_t *group = groups + list * rank, *places = order.data() + list * tokens * m;
      float* sums = grad_keys + k * rank * width;
      std::fill(sums, sums + rank * width, 0.0f);
      for (int64_t i = key ? end[key - 1] : 0; i < end[key]; ++i) {
        const int64_t t = places[i] / m, entry = (t * heads + head) * m + places[i] % m;
        const float* weights = grad_factors + (side * entries + entry) * rank;
        for (int64_t a = 0; a < rank; ++a)
          add_scaled(weights[a], queries + (t * num_queries + group[a]) * width, width,
                     sums + a * width);
      }
    }
  });
}

}  // extern "C"
