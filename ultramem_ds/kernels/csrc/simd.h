// Vectors of the accumulation type, loads that widen the table's type, stores that narrow to it.
//
// GCC/Clang vector extensions: the compiler splits a 64-byte vector where registers are smaller.
#pragma once

#include <cstdint>
#include <cstring>

namespace ultramem {

constexpr int64_t kVectorBytes = 64;  // one cache line, one AVX-512 register
// Vectors a loop keeps in registers at once. A larger tile issues its prefetches in larger bursts,
// which stall (16 against 4: 1.15 times slower in fp32, 1.5 in bf16).
constexpr int kWide = 4;

struct bfloat16 {
  uint16_t bits;
};

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(A);
};
template <typename A>
using Vector = typename VectorOf<A>::type;
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));  // of Vector<float>
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));  // of as many bfloat16

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

template <typename A>
inline Vector<A> load(const A* source) {
  Vector<A> loaded;
  std::memcpy(&loaded, source, sizeof(loaded));
  return loaded;
}

inline Vector<float> load(const bfloat16* source) {
  HalfBits half;
  std::memcpy(&half, source, sizeof(half));
  const Bits bits = __builtin_convertvector(half, Bits) << 16;
  Vector<float> loaded;
  std::memcpy(&loaded, &bits, sizeof(loaded));
  return loaded;
}

template <typename A>
inline void store(A* target, Vector<A> x) {
  std::memcpy(target, &x, sizeof(x));
}

inline void store(bfloat16* target, Vector<float> x) {  // as narrow(), on all lanes at once
  Bits bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits chosen = x != x ? Bits{} + 0x7fc0 : rounded;
  const HalfBits half = __builtin_convertvector(chosen, HalfBits);
  std::memcpy(target, &half, sizeof(half));
}

template <typename A>
inline A sum_of_lanes(Vector<A> x) {
  A sum = 0;
  for (int64_t lane = 0; lane < VectorOf<A>::lanes; ++lane) {
    sum += x[lane];
  }
  return sum;
}

// Into the second-level cache: it has far more outstanding misses than the first (1.4 times faster).
inline void prefetch(const void* start, int64_t bytes) {
  const char* line = static_cast<const char*>(start);
  for (int64_t offset = 0; offset < bytes; offset += kVectorBytes) {
    __builtin_prefetch(line + offset, /*rw=*/0, /*locality=*/2);
  }
}

}  // namespace ultramem
