// Lookup, weighting and pooling of table rows, their backward, and a row-sparse Adam, for CPU.
//
// Letters: G groups (tokens or bags), K entries per token, M entries, E projectors, B = G * E bags,
// R rows, V value width, h cores, C = V / h columns of a core, U distinct rows.
//
// A C interface without tensors: it compiles in seconds and binds to no more of torch than its
// thread pool. All arrays are contiguous; ids are int64. T is the table's type (fp32, bf16, fp64),
// A the accumulation type (fp32, fp32, fp64). Nothing here depends on the number of threads: a
// bag is summed in the order of its entries, a row's gradient in the order of the sorted entries.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kCacheLine = 64;
// Rows are fetched this many bytes ahead of their use: enough to cover the latency of memory,
// few enough for a core's outstanding misses (docs/kernels.md has the sweep).
#ifndef ULTRAMEM_PREFETCH_BYTES
#define ULTRAMEM_PREFETCH_BYTES 4096
#endif
constexpr int64_t kPrefetchBytes = ULTRAMEM_PREFETCH_BYTES;
// Below about this many elements a second thread costs more than it brings.
constexpr int64_t kGrainElements = 8192;

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, bfloat16* out) {  // round to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline void prefetch(const void* start, int64_t bytes) {
  const char* line = static_cast<const char*>(start);
  for (int64_t offset = 0; offset < bytes; offset += kCacheLine) {
    __builtin_prefetch(line + offset, /*rw=*/0, /*locality=*/3);
  }
}

inline int64_t rows_ahead(int64_t row_bytes) {
  return std::max<int64_t>(1, kPrefetchBytes / std::max<int64_t>(1, row_bytes));
}

// Remembers the first entry found out of range by any thread.
class BadEntry {
 public:
  void report(int64_t entry) {
    int64_t none = -1;
    entry_.compare_exchange_strong(none, entry);
  }
  int64_t entry() const { return entry_.load(); }

 private:
  std::atomic<int64_t> entry_{-1};
};

// out[c] += score * row[c] for columns first..last, each core's score on its own columns.
template <typename T, typename A>
inline void accumulate(
    A* out, const T* row, const A* score_h, int64_t width_C, int64_t first, int64_t last) {
  for (int64_t column = first; column < last;) {
    const int64_t core = column / width_C;
    const int64_t end = std::min(last, (core + 1) * width_C);
    const A score = score_h[core];
#pragma omp simd
    for (int64_t c = column; c < end; ++c) {
      out[c - first] += score * widen(row[c]);
    }
    column = end;
  }
}

// Forward. Group g holds entries offsets[g] .. offsets[g + 1] (K each if offsets is null) and E
// bags; entry e goes to bag projectors[e] of its group (0 if projectors is null).
template <typename T, typename A>
int64_t pool(
    const T* values_RV, int64_t R, int64_t V, const int64_t* rows_M, const int64_t* offsets_G1,
    const int64_t* projectors_M, const A* scores_Mh, int64_t h, int64_t G, int64_t K, int64_t E,
    int64_t M, T* out_BV) {
  const int64_t width_C = V / h;
  // Few groups: cut their columns too, so that every thread has something to read.
  const int64_t wanted = 2 * at::get_num_threads();
  const int64_t parts =
      G >= wanted ? 1 : std::clamp<int64_t>(wanted / std::max<int64_t>(1, G), 1, (V + 63) / 64);
  const int64_t part_width = (V + parts - 1) / parts;
  const int64_t unit_elements = std::max<int64_t>(1, M / std::max<int64_t>(1, G) * part_width);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / unit_elements);
  const int64_t ahead = rows_ahead(part_width * static_cast<int64_t>(sizeof(T)));
  BadEntry bad;
  at::parallel_for(0, G * parts, grain, [&](int64_t first_unit, int64_t last_unit) {
    std::vector<A> sums;  // only a type that is not its own accumulator needs them
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t group = unit / parts;
      const int64_t first = unit % parts * part_width;
      const int64_t last = std::min(V, first + part_width);
      const int64_t width = std::max<int64_t>(0, last - first);
      const int64_t begin = offsets_G1 ? offsets_G1[group] : group * K;
      const int64_t end = offsets_G1 ? offsets_G1[group + 1] : begin + K;
      if (begin < 0 || begin > end || end > M) {
        bad.report(M + group);
        return;
      }
      T* out_EV = out_BV + group * E * V;
      A* sum_EV;
      int64_t stride;
      if constexpr (std::is_same_v<T, A>) {
        sum_EV = out_EV + first;
        stride = V;
        for (int64_t p = 0; p < E; ++p) {
          std::fill_n(sum_EV + p * stride, width, A(0));
        }
      } else {
        sums.assign(E * width, A(0));
        sum_EV = sums.data();
        stride = width;
      }
      for (int64_t entry = begin; entry < end; ++entry) {
        if (entry + ahead < M) {
          prefetch(values_RV + rows_M[entry + ahead] * V + first, width * sizeof(T));
        }
        const int64_t row = rows_M[entry];
        const int64_t projector = projectors_M ? projectors_M[entry] : 0;
        if (row < 0 || row >= R || projector < 0 || projector >= E) {
          bad.report(entry);
          return;
        }
        accumulate(
            sum_EV + projector * stride, values_RV + row * V, scores_Mh + entry * h, width_C, first,
            last);
      }
      if constexpr (!std::is_same_v<T, A>) {
        for (int64_t p = 0; p < E; ++p) {
          const A* sum = sum_EV + p * stride;
          T* out = out_EV + p * V + first;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) {
            narrow(sum[c], out + c);
          }
        }
      }
    }
  });
  return bad.entry();
}

// One entry's way back: grad_score_h[i] = row . grad on core i's columns; and, with a table
// gradient, grad_row += score * grad (= on the first entry of a row that is not yet written).
enum class Table { kNone, kAdd, kWrite };

template <Table kTable, typename T, typename A>
inline void entry_backward(
    const T* row_V, const T* grad_V, const A* score_h, A* grad_row_V, A* grad_score_h, int64_t h,
    int64_t width_C) {
  for (int64_t core = 0; core < h; ++core) {
    const int64_t first = core * width_C;
    const int64_t last = first + width_C;
    const A score = score_h[core];
    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = first; c < last; ++c) {
      const A grad = widen(grad_V[c]);
      dot += grad * widen(row_V[c]);
      if constexpr (kTable == Table::kAdd) {
        grad_row_V[c] += score * grad;
      } else if constexpr (kTable == Table::kWrite) {
        grad_row_V[c] = score * grad;
      }
    }
    grad_score_h[core] = dot;
  }
}

// Gradients of the scores alone, entries in their own order.
template <typename T, typename A>
int64_t score_backward(
    const T* values_RV, int64_t R, int64_t V, const int64_t* rows_M, const int64_t* bags_M,
    const A* scores_Mh, int64_t h, int64_t M, const T* grad_BV, int64_t B, A* grad_scores_Mh) {
  const int64_t row_bytes = V * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = rows_ahead(row_bytes);
  BadEntry bad;
  at::parallel_for(
      0, M, std::max<int64_t>(1, kGrainElements / V), [&](int64_t first, int64_t last) {
        for (int64_t entry = first; entry < last; ++entry) {
          if (entry + ahead < M) {
            prefetch(values_RV + rows_M[entry + ahead] * V, row_bytes);
          }
          const int64_t row = rows_M[entry];
          const int64_t bag = bags_M[entry];
          if (row < 0 || row >= R || bag < 0 || bag >= B) {
            bad.report(entry);
            return;
          }
          entry_backward<Table::kNone, T, A>(
              values_RV + row * V, grad_BV + bag * V, scores_Mh + entry * h, nullptr,
              grad_scores_Mh + entry * h, h, V / h);
        }
      });
  return bad.entry();
}

// Gradients of table and scores in one pass over the entries sorted by row. Sorted entry j is
// entry order[j]; its row's gradient is row slots[j] of grad_rows. A row's entries are adjacent
// and belong to one thread. `overwrite`: the first entry of a row writes instead of adding.
template <typename T, typename A>
int64_t row_backward(
    const T* values_RV, int64_t R, int64_t V, const int64_t* sorted_M, const int64_t* slots_M,
    const int64_t* order_M, const int64_t* bags_M, const A* scores_Mh, int64_t h, int64_t M,
    const T* grad_BV, int64_t B, A* grad_rows_V, bool overwrite, A* grad_scores_Mh) {
  if (M > 0 && (sorted_M[0] < 0 || sorted_M[M - 1] >= R)) {
    return sorted_M[0] < 0 ? order_M[0] : order_M[M - 1];
  }
  BadEntry bad;
  const int64_t row_bytes = V * static_cast<int64_t>(sizeof(T));
  const int64_t grad_bytes = V * static_cast<int64_t>(sizeof(A));
  const int64_t ahead = rows_ahead(row_bytes);
  auto continues = [&](int64_t j) { return j > 0 && j < M && sorted_M[j] == sorted_M[j - 1]; };
  at::parallel_for(
      0, M, std::max<int64_t>(1, kGrainElements / V), [&](int64_t first, int64_t last) {
        while (first < last && continues(first)) {
          ++first;  // the thread before this one finishes that row
        }
        for (int64_t j = first; j < last || (j > first && continues(j)); ++j) {
          if (j + ahead < M) {
            prefetch(values_RV + sorted_M[j + ahead] * V, row_bytes);
            prefetch(grad_BV + bags_M[order_M[j + ahead]] * V, row_bytes);
            prefetch(grad_rows_V + slots_M[j + ahead] * V, grad_bytes);
          }
          const int64_t entry = order_M[j];
          if (bags_M[entry] < 0 || bags_M[entry] >= B) {
            bad.report(entry);
            return;
          }
          const T* row = values_RV + sorted_M[j] * V;
          const T* grad = grad_BV + bags_M[entry] * V;
          A* grad_row = grad_rows_V + slots_M[j] * V;
          const A* score = scores_Mh + entry * h;
          A* grad_score = grad_scores_Mh + entry * h;
          if (overwrite && !continues(j)) {
            entry_backward<Table::kWrite>(row, grad, score, grad_row, grad_score, h, V / h);
          } else {
            entry_backward<Table::kAdd>(row, grad, score, grad_row, grad_score, h, V / h);
          }
        }
      });
  return bad.entry();
}

// AdamW on the rows listed (distinct, in range: the caller has them from a backward).
template <typename T, typename A>
void row_adam(
    const int64_t* rows_U, int64_t U, int64_t V, const A* grad_UV, T* values_RV, A* exp_avg_RV,
    A* exp_avg_sq_RV, double grad_scale, double step_size, double root_correction, double decay,
    double beta1, double beta2, double eps) {
  const int64_t ahead = rows_ahead(V * static_cast<int64_t>(sizeof(A)));
  const A scale = grad_scale, b1 = beta1, b2 = beta2, c1 = 1 - beta1, c2 = 1 - beta2;
  const A rate = step_size, correction = root_correction, keep = decay, epsilon = eps;
  at::parallel_for(0, U, std::max<int64_t>(1, kGrainElements / V), [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      if (u + ahead < U) {
        const int64_t next = rows_U[u + ahead] * V;
        prefetch(values_RV + next, V * sizeof(T));
        prefetch(exp_avg_RV + next, V * sizeof(A));
        prefetch(exp_avg_sq_RV + next, V * sizeof(A));
      }
      const A* grad_V = grad_UV + u * V;
      T* value_V = values_RV + rows_U[u] * V;
      A* avg_V = exp_avg_RV + rows_U[u] * V;
      A* avg_sq_V = exp_avg_sq_RV + rows_U[u] * V;
#pragma omp simd
      for (int64_t c = 0; c < V; ++c) {
        const A grad = scale * grad_V[c];
        const A avg = b1 * avg_V[c] + c1 * grad;
        const A avg_sq = b2 * avg_sq_V[c] + c2 * grad * grad;
        avg_V[c] = avg;
        avg_sq_V[c] = avg_sq;
        narrow(keep * widen(value_V[c]) - rate * avg / (std::sqrt(avg_sq) / correction + epsilon),
               value_V + c);
      }
    }
  });
}

// Calls f(T{}, A{}) for a dtype code of cpu.py.
template <typename F>
auto dispatch(int32_t dtype, const F& f) {
  switch (dtype) {
    case 0:
      return f(float{}, float{});
    case 1:
      return f(bfloat16{}, float{});
    default:
      return f(double{}, double{});
  }
}

}  // namespace

extern "C" {

// Each returns -1, or the index of an entry whose row or bag is out of range, or M + the index of a
// group whose offsets are.

int64_t ultramem_pool(
    int32_t dtype, const void* values, int64_t R, int64_t V, const int64_t* rows,
    const int64_t* offsets, const int64_t* projectors, const void* scores, int64_t h, int64_t G,
    int64_t K, int64_t E, int64_t M, void* out) {
  return dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return pool<T, A>(
        static_cast<const T*>(values), R, V, rows, offsets, projectors,
        static_cast<const A*>(scores), h, G, K, E, M, static_cast<T*>(out));
  });
}

int64_t ultramem_score_backward(
    int32_t dtype, const void* values, int64_t R, int64_t V, const int64_t* rows,
    const int64_t* bags, const void* scores, int64_t h, int64_t M, const void* grad,
    int64_t B, void* grad_scores) {
  return dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return score_backward<T, A>(
        static_cast<const T*>(values), R, V, rows, bags, static_cast<const A*>(scores), h, M,
        static_cast<const T*>(grad), B, static_cast<A*>(grad_scores));
  });
}

int64_t ultramem_row_backward(
    int32_t dtype, const void* values, int64_t R, int64_t V, const int64_t* sorted,
    const int64_t* slots, const int64_t* order, const int64_t* bags, const void* scores, int64_t h,
    int64_t M, const void* grad, int64_t B, void* grad_rows, int32_t overwrite,
    void* grad_scores) {
  return dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return row_backward<T, A>(
        static_cast<const T*>(values), R, V, sorted, slots, order, bags,
        static_cast<const A*>(scores), h, M, static_cast<const T*>(grad), B,
        static_cast<A*>(grad_rows), overwrite != 0, static_cast<A*>(grad_scores));
  });
}

void ultramem_row_adam(
    int32_t dtype, const int64_t* rows, int64_t U, int64_t V, const void* grad, void* values,
    void* exp_avg, void* exp_avg_sq, double grad_scale, double step_size, double root_correction,
    double decay, double beta1, double beta2, double eps) {
  dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    row_adam<T, A>(
        rows, U, V, static_cast<const A*>(grad), static_cast<T*>(values),
        static_cast<A*>(exp_avg), static_cast<A*>(exp_avg_sq), grad_scale, step_size,
        root_correction, decay, beta1, beta2, eps);
  });
}

}  // extern "C"
