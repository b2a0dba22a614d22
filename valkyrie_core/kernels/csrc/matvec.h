// Products of a matrix with a few vectors: what decoding a token is made of.
//
// A matrix lies in groups of 16 rows, inside a group column after column, so that it is read as one
// stream and a column of a group meets one number of the vector: no sums across lanes, and no
// number of columns is special. In bf16 and int8 two columns stand side by side:
//
//   fp32  [groups][columns][16]        bf16, int8  [groups][pairs of columns][16][2]
//
// Missing rows and columns are zeros. int8 is the precision of the weights alone, one scale per
// row; the vector is rounded to 15 bits, one scale per vector. Sums run in fp32, those of int8 in
// int32 over stretches too short to overflow.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace matvec {

constexpr int kGroup = 16;
constexpr int kBatch = 8;  // at most so many vectors
constexpr int kParts = kGroup / kLanes;
constexpr int kAhead = 4096;  // bytes: further than the processor looks ahead by itself
enum Kind : int32_t { kFloat = 0, kBf16 = 1, kInt8 = 2 };

struct Matrix {
  const void* data;
  const float* scale;  // of every row; int8 only
  int32_t rows, columns, kind;
};

// Up to kBatch vectors; the row stride is a multiple of 16 and what lies past the end is zero.
struct Input {
  float* x;
  int16_t* rounded;  // null until `round_input` has filled it
  int64_t stride;
  float scale[kBatch];
};

inline int64_t padded(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }
inline int groups(const Matrix& m) { return (m.rows + kGroup - 1) / kGroup; }

struct Share {
  int begin, end;
};

inline void ahead(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kAhead);
}

// The part of `count` things that falls to a thread.
inline Share share(int count, int thread, int threads) {
  return {int(int64_t(count) * thread / threads), int(int64_t(count) * (thread + 1) / threads)};
}

// Vectors as 15-bit integers and a scale; what is not finite makes the scale NaN.
inline void round_input(Input& in, int16_t* rounded, int B) {
  constexpr int W = kLanes;
  typedef typename Vectors<W>::I I;
  typedef int16_t I16 __attribute__((vector_size(W * 2), aligned(2), may_alias));
  in.rounded = rounded;
  for (int b = 0; b < B; b++) {
    const float* x = in.x + b * in.stride;
    int16_t* out = rounded + b * in.stride;
    Vec<W> top{}, bad{};
    for (int64_t i = 0; i < in.stride; i += W) {
      const Vec<W> v = load<W>(x + i), size = select<W>(v < 0, -v, v);
      top = select<W>(size > top, size, top);
      bad += v * 0.f;
    }
    const float most = largest<W>(top);
    in.scale[b] = most / 16383.f + sum<W>(bad);
    const float inverse = most > 0 ? 16383.f / most : 0.f;
    for (int64_t i = 0; i < in.stride; i += W) {
      // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
      const Vec<W> shifted = load<W>(x + i) * inverse + 12582912.f;
      const I whole = (I)shifted - 0x4b400000;
      *reinterpret_cast<I16*>(out + i) = __builtin_convertvector(whole, I16);
    }
  }
}

// One group of rows times NB vectors. `Chains` sums run side by side, or each would wait for the
// last addition.
template <int NB>
struct Sums {
  static constexpr int Chains = NB * kParts >= 8 ? 1 : (NB * kParts >= 4 ? 2 : 4);
  Vec<kLanes> sum[Chains][NB][kParts];
  inline void clear() { memset(this, 0, sizeof *this); }
  inline void write(float* y) const {
    for (int b = 0; b < NB; b++)
      for (int p = 0; p < kParts; p++) {
        Vec<kLanes> total = sum[0][b][p];
        for (int c = 1; c < Chains; c++) total += sum[c][b][p];
        store<kLanes>(y + b * kGroup + p * kLanes, total);
      }
  }
};

template <int NB>
inline void product(const float* w, int columns, const float* x, int64_t stride, float* y) {
  typedef Sums<NB> S;
  S s;
  s.clear();
  const auto column = [&](int c, int j) {
    ahead(w + int64_t(j) * kGroup);
    for (int p = 0; p < kParts; p++) {
      const Vec<kLanes> rows = load<kLanes>(w + int64_t(j) * kGroup + p * kLanes);
      for (int b = 0; b < NB; b++) s.sum[c][b][p] += rows * x[b * stride + j];
    }
  };
  int j = 0;
  for (; j + S::Chains <= columns; j += S::Chains)
    for (int c = 0; c < S::Chains; c++) column(c, j + c);
  for (; j < columns; j++) column(0, j);
  s.write(y);
}

template <int NB>
inline void product(const uint16_t* w, int columns, const float* x, int64_t stride, float* y) {
  typedef typename Vectors<kLanes>::U U;
  typedef Sums<NB> S;
  S s;
  s.clear();
  const int pairs = (columns + 1) / 2;
  // a lane holds a pair: bf16 is the upper half of a float, so a shift and a mask widen both
  const auto pair = [&](int c, int j) {
    ahead(w + int64_t(j) * kGroup * 2);
    for (int p = 0; p < kParts; p++) {
      const U both = *reinterpret_cast<const U*>(w + (int64_t(j) * kGroup + p * kLanes) * 2);
      const U even = both << 16, odd = both & 0xffff0000u;
      for (int b = 0; b < NB; b++) {
        const float* at = x + b * stride + 2 * j;
        s.sum[c][b][p] += (Vec<kLanes>)even * at[0];
        s.sum[c][b][p] += (Vec<kLanes>)odd * at[1];
      }
    }
  };
  int j = 0;
  for (; j + S::Chains <= pairs; j += S::Chains)
    for (int c = 0; c < S::Chains; c++) pair(c, j + c);
  for (; j < pairs; j++) pair(0, j);
  s.write(y);
}

// Sums of products of pairs of int16, as wide as there is an instruction for it.
#if defined(__AVX512BW__)
struct Integers {
  static constexpr int Parts = 1;
  __m512i sum;
  inline void clear() { sum = _mm512_setzero_si512(); }
  static inline __m512i widen(const int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  inline void add(__m512i w, int32_t x) {
#if defined(__AVX512VNNI__)
    sum = _mm512_dpwssd_epi32(sum, w, _mm512_set1_epi32(x));
#else
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, _mm512_set1_epi32(x)));
#endif
  }
  inline void drain(float* y) const {
    store<16>(y, load<16>(y) + (Vec<16>)_mm512_cvtepi32_ps(sum));
  }
};
#elif defined(__AVX2__)
struct Integers {
  static constexpr int Parts = 2;
  __m256i sum;
  inline void clear() { sum = _mm256_setzero_si256(); }
  static inline __m256i widen(const int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  inline void add(__m256i w, int32_t x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, _mm256_set1_epi32(x)));
  }
  inline void drain(float* y) const {
    store<8>(y, load<8>(y) + (Vec<8>)_mm256_cvtepi32_ps(sum));
  }
};
#else
struct Integers {
  static constexpr int Parts = kParts;
  typedef typename Vectors<kLanes>::I I;
  typedef int16_t Pairs __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
  typedef int8_t Bytes __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));
  I sum;
  inline void clear() { sum = I{}; }
  static inline I widen(const int8_t* w) {
    const Pairs pairs = __builtin_convertvector(*reinterpret_cast<const Bytes*>(w), Pairs);
    return (I)pairs;
  }
  inline void add(I w, int32_t x) {
    // the halves of a lane, with their signs
    sum += ((w << 16) >> 16) * int32_t(int16_t(x)) + (w >> 16) * (x >> 16);
  }
  inline void drain(float* y) const {
    store<kLanes>(y, load<kLanes>(y) + __builtin_convertvector(sum, Vec<kLanes>));
  }
};
#endif

template <int NB>
inline void product(const int8_t* w, int columns, const int16_t* x, int64_t stride, float* y) {
  constexpr int Parts = Integers::Parts, Width = kGroup / Parts;
  constexpr int Chains = NB * Parts >= 8 ? 1 : (NB * Parts >= 4 ? 2 : 4);
  // a pair adds at most 2 * 127 * 16383: 515 of them stay below 2^31
  constexpr int kStretch = 512 * Chains;
  memset(y, 0, NB * kGroup * sizeof(float));
  const int pairs = (columns + 1) / 2;
  for (int begin = 0; begin < pairs; begin += kStretch) {
    const int end = begin + kStretch < pairs ? begin + kStretch : pairs;
    Integers sums[Chains][NB][Parts];
    for (auto& chain : sums)
      for (auto& vector : chain)
        for (auto& part : vector) part.clear();
    const auto pair = [&](int c, int j) {
      ahead(w + int64_t(j) * kGroup * 2);
      for (int p = 0; p < Parts; p++) {
        const auto rows = Integers::widen(w + (int64_t(j) * kGroup + p * Width) * 2);
        for (int b = 0; b < NB; b++) {
          int32_t both;
          memcpy(&both, x + b * stride + 2 * j, sizeof both);
          sums[c][b][p].add(rows, both);
        }
      }
    };
    int j = begin;
    for (; j + Chains <= end; j += Chains)
      for (int c = 0; c < Chains; c++) pair(c, j + c);
    for (; j < end; j++) pair(0, j);
    for (int c = 0; c < Chains; c++)
      for (int b = 0; b < NB; b++)
        for (int p = 0; p < Parts; p++) sums[c][b][p].drain(y + b * kGroup + p * Width);
  }
}

// Rows of one group times NB of the vectors, from vector `first` on: y is [NB][16].
template <int NB>
inline void rows(const Matrix& m, int group, const Input& in, int first, float* y) {
  const int64_t paired = int64_t(group) * ((m.columns + 1) / 2) * 2 * kGroup;
  if (m.kind == kFloat) {
    const float* w = static_cast<const float*>(m.data) + int64_t(group) * m.columns * kGroup;
    product<NB>(w, m.columns, in.x + first * in.stride, in.stride, y);
  } else if (m.kind == kBf16) {
    const uint16_t* w = static_cast<const uint16_t*>(m.data) + paired;
    product<NB>(w, m.columns, in.x + first * in.stride, in.stride, y);
  } else {
    const int8_t* w = static_cast<const int8_t*>(m.data) + paired;
    product<NB>(w, m.columns, in.rounded + first * in.stride, in.stride, y);
    for (int b = 0; b < NB; b++)
      for (int i = 0; i < kGroup; i += kLanes) {
        const Vec<kLanes> scale = load<kLanes>(m.scale + group * kGroup + i);
        float* at = y + b * kGroup + i;
        store<kLanes>(at, load<kLanes>(at) * scale * in.scale[first + b]);
      }
  }
}

// The same for all B vectors: the group is read from memory once and then from the cache.
inline void rows(const Matrix& m, int group, const Input& in, int B, float* y) {
  int b = 0;
  for (; b + 4 <= B; b += 4) rows<4>(m, group, in, b, y + b * kGroup);
  for (; b + 2 <= B; b += 2) rows<2>(m, group, in, b, y + b * kGroup);
  if (b < B) rows<1>(m, group, in, b, y + b * kGroup);
}

// A share of the groups, into out[b][row]; `out` has room for whole groups.
inline void multiply(const Matrix& m, Share part, const Input& in, int B, float* out,
                     int64_t stride) {
  alignas(64) float y[kBatch * kGroup];
  for (int group = part.begin; group < part.end; group++) {
    rows(m, group, in, B, y);
    for (int b = 0; b < B; b++)
      memcpy(out + b * stride + group * kGroup, y + b * kGroup, kGroup * sizeof(float));
  }
}

// The same, into rows of exactly m.rows numbers, with `plus` (of the same shape, or null) added.
inline void multiply_into(const Matrix& m, Share part, const Input& in, int B, const float* plus,
                          float* out) {
  alignas(64) float y[kBatch * kGroup];
  for (int group = part.begin; group < part.end; group++) {
    rows(m, group, in, B, y);
    const int begin = group * kGroup;
    const int count = m.rows - begin < kGroup ? m.rows - begin : kGroup;
    for (int b = 0; b < B; b++) {
      const int64_t at = int64_t(b) * m.rows + begin;
      for (int i = 0; i < count; i++)
        out[at + i] = y[b * kGroup + i] + (plus ? plus[at + i] : 0.f);
    }
  }
}

}  // namespace matvec
