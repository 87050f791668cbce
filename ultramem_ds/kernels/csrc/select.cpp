// Two-stage selection of a memory layer's slots for few tokens, fp32, CPU: candidates of each side,
// their exact scores, the best pairs of their grid. One task per (token, head); torch needs about
// forty calls for the same, which cost more than the work when decoding.
//
// Letters: T tokens, H heads, n keys per side, r rank, h cores, m top-m, G queries of a token,
// d kdim. Side 0 is rows, side 1 columns.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4)));

float dot(const float* a, const float* b, int64_t size) {
  Vector sums{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    sums += *reinterpret_cast<const UnalignedVector*>(a + i) *
            *reinterpret_cast<const UnalignedVector*>(b + i);
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

// The m largest of `size` numbers, best first; of equal ones the first comes first.
void top(const float* values, int64_t size, int64_t m, float* best, int64_t* index) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = values[i];
    if (count == m && !(value > best[m - 1])) continue;
    int64_t place = count < m ? count++ : m - 1;
    for (; place > 0 && value > best[place - 1]; --place) {
      best[place] = best[place - 1];
      index[place] = index[place - 1];
    }
    best[place] = value;
    index[place] = i;
  }
}

}  // namespace

extern "C" {

// search: candidate scores (2, T, H, n) with the given strides. queries (T, G, d); groups (2, H, r)
// says which of a token's queries meets a key; keys (2, H, n, r, d). cores (h, H, r, r), or null
// where a pair's score is the sum of its row's and its column's. -> slots (T, H, m), row * n + col,
// and scores (T, H, m, h), best first.
void ultramem_select(const float* search, int64_t side_stride, int64_t token_stride,
                     int64_t head_stride, const float* queries, const int64_t* groups,
                     const float* keys, const float* cores, int64_t tokens, int64_t heads,
                     int64_t num_keys, int64_t rank, int64_t width, int64_t num_queries, int64_t m,
                     int64_t num_cores, int64_t* slots, float* scores) {
  at::parallel_for(0, tokens * heads, 1, [&](int64_t first, int64_t last) {
    std::vector<float> best(m), exact(2 * m * rank), turned(rank), grid(m * m), total(rank * rank);
    std::vector<int64_t> candidates(2 * m), pairs(m);
    for (int64_t task = first; task < last; ++task) {
      const int64_t t = task / heads, head = task % heads;
      for (int64_t side = 0; side < 2; ++side) {
        const float* ranked = search + side * side_stride + t * token_stride + head * head_stride;
        int64_t* chosen = candidates.data() + side * m;
        top(ranked, num_keys, m, best.data(), chosen);
        const float* side_keys = keys + (side * heads + head) * num_keys * rank * width;
        const int64_t* group = groups + (side * heads + head) * rank;
        for (int64_t c = 0; c < m; ++c) {
          const float* key = side_keys + chosen[c] * rank * width;
          if (c + 1 < m)
            for (int64_t i = 0; i < rank * width; i += kLanes)
              __builtin_prefetch(side_keys + chosen[c + 1] * rank * width + i);
          for (int64_t a = 0; a < rank; ++a)
            exact[(side * m + c) * rank + a] =
                dot(key + a * width, queries + (t * num_queries + group[a]) * width, width);
        }
      }
      const float *rows = exact.data(), *cols = exact.data() + m * rank;
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t core = 0; cores && core < num_cores; ++core)
        for (int64_t i = 0; i < rank * rank; ++i)
          total[i] += cores[(core * heads + head) * rank * rank + i];
      const auto pair_score = [&](const float* core, int64_t row, int64_t col) {
        if (!cores) return rows[row] + cols[col];
        float score = 0;
        for (int64_t a = 0; a < rank; ++a)
          for (int64_t b = 0; b < rank; ++b)
            score += rows[row * rank + a] * core[a * rank + b] * cols[col * rank + b];
        return score;
      };
      for (int64_t i = 0; i < m * m; ++i) grid[i] = pair_score(total.data(), i / m, i % m);
      top(grid.data(), m * m, m, best.data(), pairs.data());
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = pairs[i] / m, col = pairs[i] % m;
        slots[task * m + i] = candidates[row] * num_keys + candidates[m + col];
        for (int64_t core = 0; core < num_cores; ++core)
          scores[(task * m + i) * num_cores + core] =
              pair_score(cores ? cores + (core * heads + head) * rank * rank : nullptr, row, col);
      }
    }
  });
}

}  // extern "C"
