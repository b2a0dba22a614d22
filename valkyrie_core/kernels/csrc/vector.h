// Vectors of floats as wide as the machine has them, and what every kernel does with them.
//
// The compiler's own vector type is used throughout: one source serves AVX-512, AVX2, NEON and SSE.
// kLanes is how many floats a vector holds, kRegisters how many vectors the machine keeps at hand.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

template <int W>
struct Vectors {
  typedef float F __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint32_t U __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef uint16_t U16 __attribute__((vector_size(W * 2), aligned(2), may_alias));
  typedef int8_t I8 __attribute__((vector_size(W), aligned(1), may_alias));
};
template <int W>
using Vec = typename Vectors<W>::F;

template <int W>
inline Vec<W> load(const float* p) {
  return *reinterpret_cast<const Vec<W>*>(p);
}

template <int W>
inline void store(float* p, Vec<W> x) {
  *reinterpret_cast<Vec<W>*>(p) = x;
}

template <int W>
inline Vec<W> splat(float x) {
  return x - Vec<W>{};
}

// Keeps a broadcast in a register where the compiler would read it from memory at every use: loads
// are what a loop over a state runs out of first.
template <typename T>
inline void in_register(T& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// bf16 is the upper half of a float
template <int W>
inline Vec<W> load(const uint16_t* p) {
  typedef typename Vectors<W>::U U;
  const auto half = *reinterpret_cast<const typename Vectors<W>::U16*>(p);
  const U bits = __builtin_convertvector(half, U) << 16;
  return (Vec<W>)bits;
}

// to nearest, ties to even; NaN stays NaN
template <int W>
inline void store(uint16_t* p, Vec<W> x) {
#if defined(__AVX512BF16__)
  if constexpr (W == 16) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &half, sizeof half);
    return;
  }
#endif
  typedef typename Vectors<W>::U U;
  typedef typename Vectors<W>::I I;
  const U bits = (U)x;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const I is_nan = x != x;
  const U kept = (U)is_nan;
  const U out = (kept & ((bits >> 16) | 0x40)) | (~kept & rounded);
  *reinterpret_cast<typename Vectors<W>::U16*>(p) =
      __builtin_convertvector(out, typename Vectors<W>::U16);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return from_bf16(*p); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) { *p = to_bf16(x); }

template <int W>
inline Vec<W> select(typename Vectors<W>::I mask, Vec<W> yes, Vec<W> no) {
  typedef typename Vectors<W>::I I;
  const I bits = (mask & (I)yes) | (~mask & (I)no);
  return (Vec<W>)bits;
}

// The sum of all lanes: halves are added until one lane is left.
template <int W>
inline float sum(Vec<W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    typedef Vec<W / 2> Half;
    Half halves[2];
    memcpy(halves, &x, sizeof x);
    return sum<W / 2>(halves[0] + halves[1]);
  }
}

template <int W>
inline float largest(Vec<W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    typedef Vec<W / 2> Half;
    Half halves[2];
    memcpy(halves, &x, sizeof x);
    return largest<W / 2>(select<W / 2>(halves[0] > halves[1], halves[0], halves[1]));
  }
}

// Lane l of the result is lane from[l] of x and y laid end to end.
template <int W>
inline Vec<W> shuffle(Vec<W> x, Vec<W> y, typename Vectors<W>::I from) {
#if defined(__clang__)
  Vec<W> out;
  for (int l = 0; l < W; l++) out[l] = from[l] < W ? x[from[l]] : y[from[l] - W];
  return out;
#else
  return __builtin_shuffle(x, y, from);
#endif
}

// One round of sums of pairs D lanes apart: of a pair of rows, the first keeps the lower lanes and the
// second the upper ones. (D is a constant, or the compiler would shuffle by numbers from memory.)
template <int W, int D>
inline void fold_round(Vec<W>* rows) {
  typename Vectors<W>::I own, other;
  for (int l = 0; l < W; l++) {
    own[l] = l & D ? l + W : l;
    other[l] = l & D ? l - D + W : l + D;
  }
  for (int i = 0; i < D; i++)
    rows[i] = shuffle<W>(rows[i], rows[i + D], own) + shuffle<W>(rows[i], rows[i + D], other);
  if constexpr (D > 1) fold_round<W, D / 2>(rows);
}

// Lane j of the result is the sum of all lanes of the j-th of W vectors.
template <int W>
inline Vec<W> fold(const float* p) {
  Vec<W> rows[W];
  for (int i = 0; i < W; i++) rows[i] = load<W>(p + i * W);
  if constexpr (W > 1) fold_round<W, W / 2>(rows);
  return rows[0];
}

template <int W, int D>
inline void transpose_round(Vec<W>* rows) {
  typename Vectors<W>::I upper, lower;
  for (int l = 0; l < W; l++) {
    upper[l] = l & D ? l - D + W : l;
    lower[l] = l & D ? l + W : l + D;
  }
  for (int i = 0; i < W; i++)
    if (!(i & D)) {
      const Vec<W> x = rows[i], y = rows[i + D];
      rows[i] = shuffle<W>(x, y, upper);
      rows[i + D] = shuffle<W>(x, y, lower);
    }
  if constexpr (2 * D < W) transpose_round<W, 2 * D>(rows);
}

// out[j][i] = in[i][j] of a square of side H, in tiles of W: log2(W) rounds of exchanges of pairs.
template <int H, int W>
inline void transpose(const float* in, float* out) {
  for (int i0 = 0; i0 < H; i0 += W)
    for (int j0 = 0; j0 < H; j0 += W) {
      Vec<W> rows[W];
      for (int i = 0; i < W; i++) rows[i] = load<W>(in + (i0 + i) * H + j0);
      transpose_round<W, 1>(rows);
      for (int j = 0; j < W; j++) store<W>(out + (j0 + j) * H + i0, rows[j]);
    }
}

// exp with a relative error below 2e-7; 0 below -87, saturates at exp(88). Cephes' reduction by
// powers of two and a polynomial of degree 6 on [-ln(2)/2, ln(2)/2].
template <int W>
inline Vec<W> exp(Vec<W> x) {
  typedef typename Vectors<W>::I I;
  const Vec<W> low = splat<W>(-87.f), high = splat<W>(88.f);
  const I under = x < low;
  x = select<W>(under, low, select<W>(x > high, high, x));
  // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
  const Vec<W> shifted = x * 1.44269504088896341f + 12582912.f;
  const Vec<W> n = shifted - 12582912.f;
  const Vec<W> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<W> p = splat<W>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const I power = ((I)shifted << 23) + 0x3f800000;
  const Vec<W> y = p * (Vec<W>)power;
  return select<W>(under, Vec<W>{}, y);
}

template <int W>
inline Vec<W> sigmoid(Vec<W> x) {
  return 1.f / (1.f + exp<W>(-x));
}
