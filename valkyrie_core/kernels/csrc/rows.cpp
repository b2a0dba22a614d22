// Rows of tokens to rows of experts and back, fp32 or bf16; inside, everything is fp32.
//
// places[r][k] says where row r lies among the entries for its slot k, below 0: nowhere. No two are
// the same, so that every entry is written once and rows can be shared among threads.

#include <type_traits>

#include "vector.h"

namespace {

struct Sizes {
  int64_t R, K, D;
  int threads;
};

template <typename Each, typename One>
inline void over(int64_t D, const Each& each, const One& one) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) each(i);
  for (; i < D; i++) one(i);
}

// out[places[r][k]] = x[r]
template <typename T>
void spread(const T* x, const int64_t* places, T* out, Sizes s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t r = 0; r < s.R; r++)
    for (int64_t k = 0; k < s.K; k++) {
      const int64_t m = places[r * s.K + k];
      if (m >= 0) memcpy(out + m * s.D, x + r * s.D, s.D * sizeof(T));
    }
}

// out[r] = sum over k of weights[r][k] * y[places[r][k]]; without weights, of y alone
template <typename T>
void gather(const T* y, const float* weights, const int64_t* places, T* out, Sizes s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t r = 0; r < s.R; r++) {
    const int64_t* place = places + r * s.K;
    const float* weight = weights ? weights + r * s.K : nullptr;
    const auto lanes = [&](auto width, int64_t i) {
      constexpr int W = decltype(width)::value;
      Vec<W> sum_{};
      for (int64_t k = 0; k < s.K; k++)
        if (place[k] >= 0) {
          const Vec<W> value = load<W>(y + place[k] * s.D + i);
          sum_ += weight ? value * weight[k] : value;
        }
      store<W>(out + r * s.D + i, sum_);
    };
    over(
        s.D, [&](int64_t i) { lanes(std::integral_constant<int, kLanes>(), i); },
        [&](int64_t i) { lanes(std::integral_constant<int, 1>(), i); });
  }
}

// dy[places[r][k]] = weights[r][k] * d[r] and dw[r][k] = y[places[r][k]] . d[r]
template <typename T>
void gather_backward(const T* y, const float* weights, const int64_t* places, const T* d, T* dy,
                     float* dw, Sizes s) {
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t r = 0; r < s.R; r++)
    for (int64_t k = 0; k < s.K; k++) {
      const int64_t m = places[r * s.K + k];
      if (m < 0) {
        dw[r * s.K + k] = 0;
        continue;
      }
      const float weight = weights[r * s.K + k];
      const T *from = d + r * s.D, *value = y + m * s.D;
      T* to = dy + m * s.D;
      Vec<kLanes> sums{};
      float rest = 0;
      over(
          s.D,
          [&](int64_t i) {
            const Vec<kLanes> v = load<kLanes>(from + i);
            sums += v * load<kLanes>(value + i);
            store<kLanes>(to + i, v * weight);
          },
          [&](int64_t i) {
            rest += get(from + i) * get(value + i);
            put(to + i, get(from + i) * weight);
          });
      dw[r * s.K + k] = sum<kLanes>(sums) + rest;
    }
}

template <typename T>
T* at(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

extern "C" {

void rows_spread(void* x, const int64_t* places, void* out, int bf16, int64_t R, int64_t K,
                 int64_t D, int threads) {
  const Sizes s{R, K, D, threads};
  if (bf16)
    spread(at<uint16_t>(x), places, at<uint16_t>(out), s);
  else
    spread(at<float>(x), places, at<float>(out), s);
}

void rows_gather(void* y, const float* weights, const int64_t* places, void* out, int bf16,
                 int64_t R, int64_t K, int64_t D, int threads) {
  const Sizes s{R, K, D, threads};
  if (bf16)
    gather(at<uint16_t>(y), weights, places, at<uint16_t>(out), s);
  else
    gather(at<float>(y), weights, places, at<float>(out), s);
}

void rows_gather_backward(void* y, const float* weights, const int64_t* places, void* d, void* dy,
                          float* dw, int bf16, int64_t R, int64_t K, int64_t D, int threads) {
  const Sizes s{R, K, D, threads};
  if (bf16)
    gather_backward(at<uint16_t>(y), weights, places, at<uint16_t>(d), at<uint16_t>(dy), dw, s);
  else
    gather_backward(at<float>(y), weights, places, at<float>(d), at<float>(dy), dw, s);
}
}
