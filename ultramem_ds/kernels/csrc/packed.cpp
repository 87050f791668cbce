// Products of few rows with many weights, as decoding has them: y = x W^T, fp32, CPU.
//
// Letters: M rows of x, K inner, N outputs, Q = ceil(N / 32) panels, X groups (experts).
//
// The weights are repacked once into panels of 32 outputs, (Q, K, 32): a panel streams from memory
// in order, and every element of x meets two vectors of weights. Up to 14 rows at a time keep their
// 28 sums in registers, so that from about 10 rows on the arithmetic units set the pace and below
// that the memory does. Tasks of a few panels are handed out dynamically: a busy core takes fewer.
// The result of a row depends neither on the number of threads nor on the other rows.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "simd.h"

namespace ultramem {
namespace {

constexpr int kLanes = VectorOf<float>::lanes;
constexpr int kVectors = 2;
constexpr int64_t kPanel = kLanes * kVectors;
constexpr int64_t kMaxRows = 14;       // 28 sums, 2 weights and a broadcast: 31 of 32 registers
constexpr int64_t kInnerBlock = 1024;  // 128 KiB of a panel: it stays in L2 for all rows
constexpr int64_t kPrefetchFloats = 1024;
constexpr int64_t kTasksPerThread = 12;

// y[i, :32] (+)= sum over k of x[i, k] * panel[k, :32] for `rows` rows.
template <int rows>
void multiply(const float* x, int64_t x_stride, const float* panel, int64_t inner, float* y,
              int64_t y_stride, bool first) {
  Vector<float> sums[rows][kVectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = first ? Vector<float>{} : load(y + i * y_stride + j * kLanes);
  for (int64_t k = 0; k < inner; ++k) {
    const float* weights = panel + k * kPanel;
    const Vector<float> low = load(weights), high = load(weights + kLanes);
    __builtin_prefetch(weights + kPrefetchFloats);
    __builtin_prefetch(weights + kPrefetchFloats + kLanes);
    for (int i = 0; i < rows; ++i) {
      const float factor = x[i * x_stride + k];
      sums[i][0] += factor * low;
      sums[i][1] += factor * high;
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kVectors; ++j) store(y + i * y_stride + j * kLanes, sums[i][j]);
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
constexpr Multiply kMultiply[kMaxRows + 1] = {
    nullptr,      multiply<1>,  multiply<2>,  multiply<3>,  multiply<4>,
    multiply<5>,  multiply<6>,  multiply<7>,  multiply<8>,  multiply<9>,
    multiply<10>, multiply<11>, multiply<12>, multiply<13>, multiply<14>};

// One panel with `rows` rows, cut into near-equal runs of at most kMaxRows.
void multiply_panel(const float* x, int64_t rows, const float* panel, int64_t inner, float* y,
                    int64_t y_stride) {
  const int64_t runs = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t k = 0; k < inner; k += kInnerBlock) {
    const int64_t width = std::min(kInnerBlock, inner - k);
    for (int64_t run = 0, row = 0; run < runs; ++run) {
      const int64_t count = rows / runs + (run < rows % runs);
      kMultiply[count](x + row * inner + k, inner, panel + k * kPanel, width, y + row * y_stride,
                       y_stride, k == 0);
      row += count;
    }
  }
}

}  // namespace
}  // namespace ultramem

using namespace ultramem;

extern "C" {

// weights (N, K) -> packed (Q, K, 32); outputs past N are zero.
void ultramem_pack(const float* weights, int64_t outputs, int64_t inner, float* packed) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q)
      for (int64_t k = 0; k < inner; ++k)
        for (int64_t j = 0; j < kPanel; ++j) {
          const int64_t n = q * kPanel + j;
          packed[(q * inner + k) * kPanel + j] = n < outputs ? weights[n * inner + k] : 0.0f;
        }
  });
}

// Rows ends[g - 1] .. ends[g] of x (M, K) with group g of packed (X, Q, K, 32) -> y (M, 32 Q).
// Groups without rows are not read.
void ultramem_grouped_linear(const float* x, const float* packed, const int64_t* ends,
                             int64_t groups, int64_t panels, int64_t inner, float* y) {
  const int64_t y_stride = panels * kPanel;
  const int64_t wanted = at::get_num_threads() * kTasksPerThread;
  const int64_t per_task = std::max<int64_t>(1, panels / wanted);
  const int64_t tasks_per_group = (panels + per_task - 1) / per_task;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < groups * tasks_per_group;) {
      const int64_t g = task / tasks_per_group;
      const int64_t begin = g ? ends[g - 1] : 0, rows = ends[g] - begin;
      const int64_t first = task % tasks_per_group * per_task;
      if (rows == 0) continue;
      for (int64_t q = first; q < std::min(panels, first + per_task); ++q)
        multiply_panel(x + begin * inner, rows, packed + (g * panels + q) * inner * kPanel, inner,
                       y + begin * y_stride + q * kPanel, y_stride);
    }
  });
}

}  // extern "C"
