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
#include <memory>
#include <type_traits>

#include "simd.h"

namespace ultramem {
namespace {

// Entries between a row's prefetch and its use: covers the latency of memory (docs/kernels.md).
constexpr int64_t kAhead = 8;
// Below about this many elements a second thread costs more than it brings.
constexpr int64_t kGrainElements = 8192;

int64_t grain_of(int64_t elements_per_unit) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_unit));
}

// Remembers an entry found out of range by any thread.
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

// The forward's entries in the order of their bags: rows and scores of entries begins[b] up to
// begins[b + 1] are those of bag b.
template <typename A>
struct Bagged {
  Bagged(int64_t num_bags, int64_t num_entries, int64_t num_cores)
      : begins(std::make_unique_for_overwrite<int64_t[]>(num_bags + 1)),
        rows(std::make_unique_for_overwrite<int64_t[]>(num_entries)),
        scores(std::make_unique_for_overwrite<A[]>(num_entries * num_cores)),
        size(num_entries) {
    begins[num_bags] = num_entries;
  }

  std::unique_ptr<int64_t[]> begins;
  std::unique_ptr<int64_t[]> rows;
  std::unique_ptr<A[]> scores;
  int64_t size;
};

// Checks the ids and sorts each group's entries by projector (stable counting sort). Group g holds
// entries offsets[g] .. offsets[g + 1], or K each if offsets is null; a null `projectors_M` means
// projector 0 throughout.
template <typename A>
Bagged<A> arrange(
    int64_t R, const int64_t* rows_M, const int64_t* offsets_G1, const int64_t* projectors_M,
    const A* scores_Mh, int64_t h, int64_t G, int64_t K, int64_t E, int64_t M, BadEntry* bad) {
  Bagged<A> bagged(G * E, M, h);
  at::parallel_for(0, G, grain_of(4 * K), [&](int64_t first, int64_t last) {
    auto next_E = std::make_unique_for_overwrite<int64_t[]>(E + 1);
    for (int64_t group = first; group < last; ++group) {
      const int64_t begin = offsets_G1 ? offsets_G1[group] : group * K;
      const int64_t end = offsets_G1 ? offsets_G1[group + 1] : begin + K;
      if (begin < 0 || begin > end || end > M) {
        bad->report(M + group);
        return;
      }
      std::fill_n(next_E.get(), E + 1, int64_t{0});
      for (int64_t entry = begin; entry < end; ++entry) {
        const int64_t projector = projectors_M ? projectors_M[entry] : 0;
        if (rows_M[entry] < 0 || rows_M[entry] >= R || projector < 0 || projector >= E) {
          bad->report(entry);
          return;
        }
        ++next_E[projector + 1];
      }
      next_E[0] = begin;
      for (int64_t p = 0; p < E; ++p) {
        bagged.begins[group * E + p] = next_E[p];
        next_E[p + 1] += next_E[p];
      }
      for (int64_t entry = begin; entry < end; ++entry) {
        const int64_t target = next_E[projectors_M ? projectors_M[entry] : 0]++;
        bagged.rows[target] = rows_M[entry];
        std::copy_n(scores_Mh + entry * h, h, bagged.scores.get() + target * h);
      }
    }
  });
  return bagged;
}

// One bag on N vectors of columns starting at `column` of core `core`, summed in registers.
template <int N, typename T, typename A>
inline void pool_tile(
    const T* values_RV, int64_t V, const Bagged<A>& bagged, int64_t begin, int64_t end, int64_t h,
    int64_t core, int64_t column, T* out_V) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  Vector<A> sums[N] = {};
  for (int64_t j = begin; j < end; ++j) {
    const int64_t ahead = std::min(j + kAhead, bagged.size - 1);
    prefetch(values_RV + bagged.rows[ahead] * V + column, N * lanes * sizeof(T));
    const T* row = values_RV + bagged.rows[j] * V + column;
    const A score = bagged.scores[j * h + core];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      sums[i] += score * load(row + i * lanes);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    store(out_V + column + i * lanes, sums[i]);
  }
}

// One bag on columns first..last, tile by tile within each core's columns.
template <typename T, typename A>
inline void pool_bag(
    const T* values_RV, int64_t V, const Bagged<A>& bagged, int64_t begin, int64_t end, int64_t h,
    int64_t first, int64_t last, T* out_V) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t width_C = V / h;
  for (int64_t column = first; column < last;) {
    const int64_t core = column / width_C;
    const int64_t core_end = std::min(last, (core + 1) * width_C);
    for (; column + kWide * lanes <= core_end; column += kWide * lanes) {
      pool_tile<kWide>(values_RV, V, bagged, begin, end, h, core, column, out_V);
    }
    for (; column + lanes <= core_end; column += lanes) {
      pool_tile<1>(values_RV, V, bagged, begin, end, h, core, column, out_V);
    }
    for (; column < core_end; ++column) {
      A sum = 0;
      for (int64_t j = begin; j < end; ++j) {
        sum += bagged.scores[j * h + core] * widen(values_RV[bagged.rows[j] * V + column]);
      }
      narrow(sum, out_V + column);
    }
  }
}

template <typename T, typename A>
int64_t pool(
    const T* values_RV, int64_t R, int64_t V, const int64_t* rows_M, const int64_t* offsets_G1,
    const int64_t* projectors_M, const A* scores_Mh, int64_t h, int64_t G, int64_t K, int64_t E,
    int64_t M, T* out_BV) {
  BadEntry bad;
  const Bagged<A> bagged =
      arrange(R, rows_M, offsets_G1, projectors_M, scores_Mh, h, G, K, E, M, &bad);
  if (bad.entry() >= 0) {
    return bad.entry();
  }
  // Few bags: cut their columns too, so that every thread has something to read.
  const int64_t num_bags = G * E;
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t parts = num_bags >= wanted ? 1 : std::min(h, wanted);
  const int64_t width = (V + parts - 1) / parts;
  const int64_t grain = grain_of(M * width / std::max<int64_t>(1, num_bags));
  at::parallel_for(0, num_bags * parts, grain, [&](int64_t first_unit, int64_t last_unit) {
    const int64_t start = bagged.begins[first_unit / parts];
    for (int64_t j = start; j < std::min(start + kAhead, M); ++j) {
      prefetch(values_RV + bagged.rows[j] * V, V * sizeof(T));
    }
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t bag = unit / parts;
      const int64_t first = unit % parts * width;
      pool_bag<T, A>(
          values_RV, V, bagged, bagged.begins[bag], bagged.begins[bag + 1], h, first,
          std::min(V, first + width), out_BV + bag * V);
    }
  });
  return -1;
}

// Where an entry of the backward reads and writes: its row, its bag's gradient, its row's gradient.
template <typename T, typename A>
struct BackwardEntry {
  const T* row_V;
  const T* grad_V;
  A* grad_row_V;
};

// N vectors of columns from `column` on: grad_row += score * grad where the table wants a gradient;
// returns row . grad.
template <bool kTable, int N, typename T, typename A>
inline A backward_tile(
    const BackwardEntry<T, A>& entry, const BackwardEntry<T, A>& next, int64_t column, A score) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  prefetch(next.row_V + column, N * lanes * sizeof(T));
  prefetch(next.grad_V + column, N * lanes * sizeof(T));
  if constexpr (kTable) {
    prefetch(next.grad_row_V + column, N * lanes * sizeof(A));
  }
  Vector<A> dots[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const Vector<A> grad = load(entry.grad_V + column + i * lanes);
    dots[i] = grad * load(entry.row_V + column + i * lanes);
    if constexpr (kTable) {
      A* target = entry.grad_row_V + column + i * lanes;
      store(target, load(target) + score * grad);
    }
  }
#pragma GCC unroll 4
  for (int i = 1; i < N; ++i) {
    dots[0] += dots[i];
  }
  return sum_of_lanes<A>(dots[0]);
}

// Scores may be null where the table wants no gradient.
template <bool kTable, typename T, typename A>
inline void backward_entry(
    const BackwardEntry<T, A>& entry, const BackwardEntry<T, A>& next, const A* score_h,
    A* grad_score_h, int64_t h, int64_t width_C) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t core = 0; core < h; ++core) {
    const A score = kTable ? score_h[core] : A{};
    const int64_t end = (core + 1) * width_C;
    int64_t column = core * width_C;
    A dot = 0;
    for (; column + kWide * lanes <= end; column += kWide * lanes) {
      dot += backward_tile<kTable, kWide>(entry, next, column, score);
    }
    for (; column + lanes <= end; column += lanes) {
      dot += backward_tile<kTable, 1>(entry, next, column, score);
    }
    for (; column < end; ++column) {
      const A grad = widen(entry.grad_V[column]);
      dot += grad * widen(entry.row_V[column]);
      if constexpr (kTable) entry.grad_row_V[column] += score * grad;
    }
    grad_score_h[core] = dot;
  }
}

// Dot products of every entry's row with its bag's gradient, by core: the scores' gradients.
template <typename T, typename A>
int64_t entry_dots(
    const T* values_RV, int64_t R, int64_t V, const int64_t* rows_M, const int64_t* bags_M,
    int64_t h, int64_t M, const T* grad_BV, int64_t B, A* dots_Mh) {
  BadEntry bad;
  auto in_range = [&](int64_t m) {
    return rows_M[m] >= 0 && rows_M[m] < R && bags_M[m] >= 0 && bags_M[m] < B;
  };
  auto entry_at = [&](int64_t m) {
    return BackwardEntry<T, A>{values_RV + rows_M[m] * V, grad_BV + bags_M[m] * V, nullptr};
  };
  at::parallel_for(0, M, grain_of(V), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      if (!in_range(m)) {
        bad.report(m);
        return;
      }
      const int64_t ahead = std::min(m + kAhead, M - 1);
      backward_entry<false>(
          entry_at(m), entry_at(in_range(ahead) ? ahead : m), static_cast<const A*>(nullptr),
          dots_Mh + m * h, h, V / h);
    }
  });
  return bad.entry();
}

// Gradients of table and scores in one pass over the entries sorted by row. Sorted entry j is
// entry order[j]. A row's entries are adjacent and belong to one thread.
template <typename T, typename A>
int64_t backward(
    const T* values_RV, int64_t R, int64_t V, const int64_t* sorted_M, const int64_t* order_M,
    const int64_t* bags_M, const A* scores_Mh, int64_t h, int64_t M, const T* grad_BV, int64_t B,
    A* grad_values_RV, A* grad_scores_Mh) {
  if (M > 0 && (sorted_M[0] < 0 || sorted_M[M - 1] >= R)) {
    return sorted_M[0] < 0 ? order_M[0] : order_M[M - 1];
  }
  BadEntry bad;
  auto in_range = [&](int64_t j) { return bags_M[order_M[j]] >= 0 && bags_M[order_M[j]] < B; };
  auto entry_at = [&](int64_t j) {
    return BackwardEntry<T, A>{
        values_RV + sorted_M[j] * V, grad_BV + bags_M[order_M[j]] * V,
        grad_values_RV + sorted_M[j] * V};
  };
  auto continues = [&](int64_t j) { return j > 0 && j < M && sorted_M[j] == sorted_M[j - 1]; };
  at::parallel_for(0, M, grain_of(V), [&](int64_t first, int64_t last) {
    while (first < last && continues(first)) {
      ++first;  // the thread before this one finishes that row
    }
    for (int64_t j = first; j < last || (j > first && continues(j)); ++j) {
      const int64_t m = order_M[j];
      if (!in_range(j)) {
        bad.report(m);
        return;
      }
      const int64_t ahead = std::min(j + kAhead, M - 1);
      backward_entry<true>(
          entry_at(j), entry_at(in_range(ahead) ? ahead : j), scores_Mh + m * h,
          grad_scores_Mh + m * h, h, V / h);
    }
  });
  return bad.entry();
}

// AdamW on the rows listed (distinct and in range: the caller has checked them).
template <typename T, typename A>
void row_adam(
    const int64_t* rows_U, int64_t U, int64_t V, const A* grad_UV, T* values_RV, A* exp_avg_RV,
    A* exp_avg_sq_RV, A grad_scale, A step_size, A root_correction, A decay, A beta1, A beta2,
    A eps) {
  at::parallel_for(0, U, grain_of(V), [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t next = rows_U[std::min(u + kAhead, U - 1)] * V;
      prefetch(values_RV + next, V * sizeof(T));
      prefetch(exp_avg_RV + next, V * sizeof(A));
      prefetch(exp_avg_sq_RV + next, V * sizeof(A));
      const A* grad_V = grad_UV + u * V;
      T* value_V = values_RV + rows_U[u] * V;
      A* avg_V = exp_avg_RV + rows_U[u] * V;
      A* avg_sq_V = exp_avg_sq_RV + rows_U[u] * V;
#pragma omp simd
      for (int64_t c = 0; c < V; ++c) {
        const A grad = grad_scale * grad_V[c];
        const A avg = beta1 * avg_V[c] + (1 - beta1) * grad;
        const A avg_sq = beta2 * avg_sq_V[c] + (1 - beta2) * grad * grad;
        avg_V[c] = avg;
        avg_sq_V[c] = avg_sq;
        const A update = step_size * avg / (std::sqrt(avg_sq) / root_correction + eps);
        narrow(decay * widen(value_V[c]) - update, value_V + c);
      }
    }
  });
}

// Calls f(T{}, A{}) for a dtype code of native.py.
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
}  // namespace ultramem

using namespace ultramem;

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

int64_t ultramem_entry_dots(
    int32_t dtype, const void* values, int64_t R, int64_t V, const int64_t* rows,
    const int64_t* bags, int64_t h, int64_t M, const void* grad, int64_t B, void* dots) {
  return dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return entry_dots<T, A>(
        static_cast<const T*>(values), R, V, rows, bags, h, M, static_cast<const T*>(grad), B,
        static_cast<A*>(dots));
  });
}

int64_t ultramem_backward(
    int32_t dtype, const void* values, int64_t R, int64_t V, const int64_t* sorted,
    const int64_t* order, const int64_t* bags, const void* scores, int64_t h, int64_t M,
    const void* grad, int64_t B, void* grad_values, void* grad_scores) {
  return dispatch(dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    return backward<T, A>(
        static_cast<const T*>(values), R, V, sorted, order, bags, static_cast<const A*>(scores), h,
        M, static_cast<const T*>(grad), B, static_cast<A*>(grad_values),
        static_cast<A*>(grad_scores));
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
        static_cast<A*>(exp_avg), static_cast<A*>(exp_avg_sq), static_cast<A>(grad_scale),
        static_cast<A>(step_size), static_cast<A>(root_correction), static_cast<A>(decay),
        static_cast<A>(beta1), static_cast<A>(beta2), static_cast<A>(eps));
  });
}

}  // extern "C"
