// silu(gate) * up and its gradients, elementwise, fp32 or bf16; inside, everything is fp32.

#include "vector.h"

namespace {

constexpr int64_t kPiece = 4096;  // elements at a time, a multiple of any vector

template <typename T, int W>
inline void forward_lanes(const T* gate, const T* up, T* y) {
  const Vec<W> g = load<W>(gate);
  store<W>(y, g * sigmoid<W>(g) * load<W>(up));
}

// d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g)
template <typename T, int W>
inline void backward_lanes(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up) {
  const Vec<W> g = load<W>(gate), d = load<W>(dy), s = sigmoid<W>(g), silu = g * s;
  store<W>(d_gate, d * load<W>(up) * (s + silu * (1.f - s)));
  store<W>(d_up, d * silu);
}

template <typename Each, typename One>
void over(int64_t count, int threads, const Each& each, const One& one) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t stop = start + kPiece < count ? start + kPiece : count;
    int64_t i = start;
    for (; i + kLanes <= stop; i += kLanes) each(i);
    for (; i < stop; i++) one(i);
  }
}

template <typename T>
void forward(const T* gate, const T* up, T* y, int64_t count, int threads) {
  over(
      count, threads, [=](int64_t i) { forward_lanes<T, kLanes>(gate + i, up + i, y + i); },
      [=](int64_t i) { forward_lanes<T, 1>(gate + i, up + i, y + i); });
}

template <typename T>
void backward(const T* gate, const T* up, const T* dy, T* d_gate, T* d_up, int64_t count,
              int threads) {
  over(
      count, threads,
      [=](int64_t i) {
        backward_lanes<T, kLanes>(gate + i, up + i, dy + i, d_gate + i, d_up + i);
      },
      [=](int64_t i) { backward_lanes<T, 1>(gate + i, up + i, dy + i, d_gate + i, d_up + i); });
}

template <typename T>
T* at(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

extern "C" {

void silu_times_forward(void* gate, void* up, void* y, int bf16, int64_t count, int threads) {
  if (bf16)
    forward(at<uint16_t>(gate), at<uint16_t>(up), at<uint16_t>(y), count, threads);
  else
    forward(at<float>(gate), at<float>(up), at<float>(y), count, threads);
}

void silu_times_backward(void* gate, void* up, void* dy, void* d_gate, void* d_up, int bf16,
                         int64_t count, int threads) {
  if (bf16)
    backward(at<uint16_t>(gate), at<uint16_t>(up), at<uint16_t>(dy), at<uint16_t>(d_gate),
             at<uint16_t>(d_up), count, threads);
  else
    backward(at<float>(gate), at<float>(up), at<float>(dy), at<float>(d_gate), at<float>(d_up),
             count, threads);
}
}
