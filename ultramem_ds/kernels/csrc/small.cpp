// Small parts of a memory layer, each a handful of torch calls over large temporaries otherwise:
// the causal depthwise convolution of the query, and the map from virtual slots to rows. CPU.
//
// Letters: B sequences, S tokens each, D hidden, k taps (the last is the token itself), n keys per
// side, N rows of the table.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kRowsPerTask = 8;
constexpr int64_t kColumns = 64;

// How many tokens before s its taps see: they stop at the first token of a document (starts may be
// null) and at the beginning of the inputs, `before` tokens ahead of the sequence.
int64_t reach_of(const bool* starts, int64_t s, int64_t taps, int64_t before) {
  int64_t reach = 0;
  while (reach + 1 < taps && reach < s + before) {
    if (starts && s - reach >= 0 && starts[s - reach]) break;
    ++reach;
  }
  return reach;
}

}  // namespace

extern "C" {

// x (B, S, D), state (B, k - 1, D) or null, starts (B, S) or null, weight (k, D) -> out (B, S, D).
void ultramem_conv(const float* x, const float* state, const bool* starts, const float* weight,
                   int64_t batch, int64_t seq_len, int64_t width, int64_t taps, float* out) {
  at::parallel_for(0, batch * seq_len, kRowsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / seq_len, s = row % seq_len;
      const int64_t reach =
          reach_of(starts ? starts + b * seq_len : nullptr, s, taps, state ? taps - 1 : 0);
      float* y = out + row * width;
      const float *own = x + row * width, *last_tap = weight + (taps - 1) * width;
      for (int64_t i = 0; i < width; ++i) y[i] = own[i] * last_tap[i];
      for (int64_t back = reach; back >= 1; --back) {
        const float* tap = weight + (taps - 1 - back) * width;
        const float* past = back <= s ? own - back * width
                                      : state + (b * (taps - 1) + taps - 1 + s - back) * width;
        for (int64_t i = 0; i < width; ++i) y[i] += past[i] * tap[i];
      }
    }
  });
}

// The way back where there is no state: grad (B, S, D) of out -> gradients of x and the weight.
void ultramem_conv_backward(const float* grad, const float* x, const bool* starts,
                            const float* weight, int64_t batch, int64_t seq_len, int64_t width,
                            int64_t taps, float* grad_x, float* grad_weight) {
  const auto starts_of = [&](int64_t b) { return starts ? starts + b * seq_len : nullptr; };
  at::parallel_for(0, batch * seq_len, kRowsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / seq_len, s = row % seq_len;
      float* sums = grad_x + row * width;
      const float *own = grad + row * width, *last_tap = weight + (taps - 1) * width;
      for (int64_t i = 0; i < width; ++i) sums[i] = own[i] * last_tap[i];
      for (int64_t ahead = 1; ahead < taps && s + ahead < seq_len; ++ahead) {
        if (starts && starts_of(b)[s + ahead]) break;
        const float* tap = weight + (taps - 1 - ahead) * width;
        for (int64_t i = 0; i < width; ++i) sums[i] += own[ahead * width + i] * tap[i];
      }
    }
  });
  at::parallel_for(0, (width + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = std::min(width, last * kColumns);
    for (int64_t tap = 0; tap < taps; ++tap)
      std::fill(grad_weight + tap * width + begin, grad_weight + tap * width + end, 0.0f);
    for (int64_t row = 0; row < batch * seq_len; ++row) {
      const int64_t b = row / seq_len, s = row % seq_len;
      const int64_t reach = reach_of(starts_of(b), s, taps, 0);
      for (int64_t back = 0; back <= reach; ++back) {
        const float *g = grad + row * width, *past = x + (row - back) * width;
        float* sums = grad_weight + (taps - 1 - back) * width;
        for (int64_t i = begin; i < end; ++i) sums[i] += g[i] * past[i];
      }
    }
  });
}

// Slots in [0, n * n) through a Feistel network whose round functions are `tables` (rounds, n).
void ultramem_shuffle(const int64_t* slots, int64_t count, const int64_t* tables, int64_t rounds,
                      int64_t n, int64_t* permuted) {
  at::parallel_for(0, count, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      int64_t left = slots[i] / n, right = slots[i] % n;
      for (int64_t round = 0; round < rounds; ++round) {
        const int64_t sum = left + tables[round * n + right];
        left = right;
        right = sum < n ? sum : sum - n;
      }
      permuted[i] = left * n + right;
    }
  });
}

// Permuted slots -> rows (slot % N) and projectors (slot / N).
void ultramem_split(const int64_t* slots, int64_t count, int64_t num_rows, int64_t* rows,
                    int64_t* projectors) {
  at::parallel_for(0, count, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      projectors[i] = slots[i] / num_rows;
      rows[i] = slots[i] - projectors[i] * num_rows;
    }
  });
}

}  // extern "C"
