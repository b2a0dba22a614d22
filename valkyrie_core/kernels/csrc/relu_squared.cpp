// relu(x)^2 and its gradient, elementwise, fp32 or bf16.

#include "vector.h"

namespace {

constexpr int64_t kPiece = 4096;  // elements at a time, a multiple of any vector

template <typename T, int W>
inline Vec<W> relu(const T* x) {
  const Vec<W> value = load<W>(x);
  // NaN is passed on: it is not below zero
  return select<W>(value < Vec<W>{}, Vec<W>{}, value);
}

template <typename T, int W>
inline void forward_lanes(const T* x, T* y) {
  const Vec<W> positive = relu<T, W>(x);
  store<W>(y, positive * positive);
}

template <typename T, int W>
inline void backward_lanes(const T* x, const T* dy, T* dx) {
  store<W>(dx, 2.f * relu<T, W>(x) * load<W>(dy));
}

template <typename T>
void forward(const T* x, T* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t stop = start + kPiece < count ? start + kPiece : count;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) forward_lanes<T, kLanes>(x + i, y + i);
    for (; i < stop; i++) forward_lanes<T, 1>(x + i, y + i);
  }
}

template <typename T>
void backward(const T* x, const T* dy, T* dx, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t stop = start + kPiece < count ? start + kPiece : count;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) backward_lanes<T, kLanes>(x + i, dy + i, dx + i);
    for (; i < stop; i++) backward_lanes<T, 1>(x + i, dy + i, dx + i);
  }
}

}  // namespace

extern "C" {

void relu_squared_forward(const void* x, void* y, int bf16, int64_t count, int threads) {
  typedef uint16_t H;
  if (bf16)
    forward(static_cast<const H*>(x), static_cast<H*>(y), count, threads);
  else
    forward(static_cast<const float*>(x), static_cast<float*>(y), count, threads);
}

void relu_squared_backward(const void* x, const void* dy, void* dx, int bf16, int64_t count,
                           int threads) {
  typedef uint16_t H;
  if (bf16)
    backward(static_cast<const H*>(x), static_cast<const H*>(dy), static_cast<H*>(dx), count,
             threads);
  else
    backward(static_cast<const float*>(x), static_cast<const float*>(dy), static_cast<float*>(dx),
             count, threads);
}
}
