// What the fused steps of decoding share: norms, scratch memory, the threads of one call.
//
// A step reads x [B, D] and writes x + sub-layer(norm(x)). One parallel region does all of it, with
// barriers between phases; what is cheap every thread makes for itself rather than wait for another.

#pragma once

#include <cmath>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "matvec.h"

namespace decode {

using matvec::Input;
using matvec::kGroup;
using matvec::Matrix;
using matvec::padded;
using matvec::share;
using matvec::Share;

inline int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int all_threads() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// One step of a token. What the pointers are, every step says; `memory` is for the step alone.
typedef void (*Step)(const void* step, void* const* pointers, void* memory, int B, int threads);

struct Norm {
  const float *weight, *bias;  // padded to whole groups; bias is null for an RMS norm
  float eps;
};

// Hands out memory that the caller owns. From nowhere, it counts how much that would be.
struct Scratch {
  char* base;
  int64_t used = 0;
  explicit Scratch(void* memory) : base(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
};

// B vectors of `width` numbers, each padded to whole groups.
struct Rows {
  float* x;
  int64_t stride;
  Rows(Scratch& scratch, int B, int64_t width)
      : x(scratch.take<float>(B * padded(width))), stride(padded(width)) {}
  float* operator[](int b) const { return x + b * stride; }
};

// Rows that a matrix reads; the integers are only filled in for an int8 matrix.
struct Source : Rows {
  int16_t* rounded;
  Source(Scratch& scratch, int B, int64_t width)
      : Rows(scratch, B, width), rounded(scratch.take<int16_t>(B * padded(width))) {}
  Input input(const Matrix& m, int B) const {
    Input in{x, nullptr, stride, {}};
    if (m.kind == matvec::kInt8) matvec::round_input(in, rounded, B);
    return in;
  }
};

inline float total(const float* x, int64_t n) {  // n: whole groups
  Vec<kLanes> sum_{};
  for (int64_t i = 0; i < n; i += kLanes) sum_ += load<kLanes>(x + i);
  return sum<kLanes>(sum_);
}

inline float dot(const float* x, const float* y, int64_t n) {  // n: whole groups
  Vec<kLanes> sum_{};
  for (int64_t i = 0; i < n; i += kLanes) sum_ += load<kLanes>(x + i) * load<kLanes>(y + i);
  return sum<kLanes>(sum_);
}

// The norm of D numbers, padded to whole groups with zeros.
inline void normalize(const Norm& norm, const float* x, int64_t D, float* out) {
  const int64_t width = padded(D);
  memcpy(out, x, D * sizeof(float));
  for (int64_t i = D; i < width; i++) out[i] = 0;
  if (norm.bias) {
    const float mean = total(out, width) / D;
    for (int64_t i = 0; i < D; i++) out[i] -= mean;
  }
  const float scale = 1.f / std::sqrt(dot(out, out, width) / D + norm.eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec<kLanes> y = load<kLanes>(out + i) * scale * load<kLanes>(norm.weight + i);
    store<kLanes>(out + i, norm.bias ? y + load<kLanes>(norm.bias + i) : y);
  }
}

// The widest vector that divides a head of H numbers, a multiple of 4: calls body<W>().
template <typename Body>
inline void with_head_lanes(int64_t H, Body&& body) {
  if constexpr (kLanes >= 16)
    if (H % 16 == 0) return body(std::integral_constant<int, 16>());
  if constexpr (kLanes >= 8)
    if (H % 8 == 0) return body(std::integral_constant<int, 8>());
  body(std::integral_constant<int, 4>());
}

}  // namespace decode
