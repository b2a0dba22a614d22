// RWKV's token shift: M mixtures of every token with the one before it, in one pass.
//
//   y_m = x + (before(x) - x) * mix_m
//
// source[b, t] says where `before` lies: a place in row b, -1 for the last token of the window
// before (`last`), -2 for nothing (zeros). The places whose source is t follow t directly, one after
// the other; those whose source is -1 stand at the beginning of a row.
//
// Tensors are [B, T, D], D a multiple of 4; x is fp32 or bf16, mixtures are fp32 or bf16; mix is fp32.

#include "vector.h"

namespace {

constexpr int64_t kBlock = 64;  // tokens whose sum is made on its own: bits don't depend on threads
constexpr int kMost = 6;        // mixtures

template <typename X>
struct Window {
  const X *x, *last;
  const int32_t* source;
  const float* mix;  // [M, D]
  int64_t B, T, D;

  // the token before (b, t), or null where there is none
  const X* before(int64_t b, int64_t t) const {
    const int32_t from = source[b * T + t];
    if (from == -2) return nullptr;
    return from == -1 ? last + b * D : x + (b * T + from) * D;
  }
};

template <int W, int M, typename X, typename Y>
void mix_token(const Window<X>& w, int64_t b, int64_t t, Y* const* out) {
  const int64_t at = (b * w.T + t) * w.D;
  const X* before = w.before(b, t);
  for (int64_t d = 0; d < w.D; d += W) {
    const Vec<W> x = load<W>(w.x + at + d);
    const Vec<W> step = (before ? load<W>(before + d) : Vec<W>{}) - x;
    for (int m = 0; m < M; m++)
      store<W>(out[m] + at + d, x + step * load<W>(w.mix + m * w.D + d));
  }
}

template <int W, int M, typename X, typename Y>
void forward(const Window<X>& w, Y* const* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < w.B * w.T; token++)
    mix_token<W, M>(w, token / w.T, token % w.T, out);
}

// Adds sum_m dy_m mix_m of one token to `to`.
template <int W, int M, typename Y>
inline Vec<W> passed_back(const Y* const* dy, const float* mix, int64_t D, int64_t at, int64_t d) {
  Vec<W> total = {};
  for (int m = 0; m < M; m++) total += load<W>(dy[m] + at + d) * load<W>(mix + m * D + d);
  return total;
}

template <int W, int M, typename X, typename Y>
void backward_token(const Window<X>& w, int64_t b, int64_t t, const Y* const* dy, X* dx,
                    float* d_mix) {
  const int64_t at = (b * w.T + t) * w.D;
  const X* before = w.before(b, t);
  const int32_t* source = w.source + b * w.T;
  int64_t heirs = t + 1;  // the tokens that this one is before: up to here
  while (heirs < w.T && source[heirs] == t) heirs++;
  for (int64_t d = 0; d < w.D; d += W) {
    const Vec<W> x = load<W>(w.x + at + d);
    const Vec<W> step = (before ? load<W>(before + d) : Vec<W>{}) - x;
    Vec<W> total = {};
    for (int m = 0; m < M; m++) {
      const Vec<W> g = load<W>(dy[m] + at + d);
      float* sum = d_mix + m * w.D + d;
      total += g - g * load<W>(w.mix + m * w.D + d);
      store<W>(sum, load<W>(sum) + g * step);
    }
    for (int64_t heir = t + 1; heir < heirs; heir++)
      total += passed_back<W, M>(dy, w.mix, w.D, at + (heir - t) * w.D, d);
    store<W>(dx + at + d, total);
  }
}

// d_mix is [blocks of all rows, M, D]: one sum per block of tokens.
template <int W, int M, typename X, typename Y>
void backward(const Window<X>& w, const Y* const* dy, X* dx, X* d_last, float* d_mix,
              int threads) {
  const int64_t blocks = (w.T + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < w.B * blocks; block++) {
    const int64_t b = block / blocks, start = block % blocks * kBlock;
    float* sums = d_mix + block * M * w.D;
    memset(sums, 0, size_t(M) * w.D * sizeof(float));
    for (int64_t t = start; t < start + kBlock && t < w.T; t++)
      backward_token<W, M>(w, b, t, dy, dx, sums);
    if (start) continue;
    int64_t heirs = 0;
    while (heirs < w.T && w.source[b * w.T + heirs] == -1) heirs++;
    for (int64_t d = 0; d < w.D; d += W) {
      Vec<W> total = {};
      for (int64_t heir = 0; heir < heirs; heir++)
        total += passed_back<W, M>(dy, w.mix, w.D, (b * w.T + heir) * w.D, d);
      store<W>(d_last + b * w.D + d, total);
    }
  }
}

// Calls `job` with the widest vector that divides D, and with the number of mixtures.
template <int W = kLanes, typename Job>
void dispatch(int64_t D, int M, const Job& job) {
  if constexpr (W > 4)
    if (D % W) return dispatch<W / 2>(D, M, job);
  M == 1 ? job.template run<W, 1>() : job.template run<W, kMost>();
}

template <typename X, typename Y>
struct Forward {
  Window<X> w;
  Y* const* out;
  int threads;
  template <int W, int M>
  void run() const {
    forward<W, M>(w, out, threads);
  }
};

template <typename X, typename Y>
struct Backward {
  Window<X> w;
  const Y* const* dy;
  X *dx, *d_last;
  float* d_mix;
  int threads;
  template <int W, int M>
  void run() const {
    backward<W, M>(w, dy, dx, d_last, d_mix, threads);
  }
};

struct Call {
  const void *x, *last;
  const int32_t* source;
  const float* mix;
  int64_t B, T, D;
  template <typename X>
  Window<X> window() const {
    return {static_cast<const X*>(x), static_cast<const X*>(last), source, mix, B, T, D};
  }
};

}  // namespace

extern "C" {

int64_t shift_mix_block() { return kBlock; }

// M is 1 or 6
void shift_mix_forward(const void* x, int x_bf16, const void* last, const int32_t* source,
                       const float* mix, void* const* out, int out_bf16, int M, int64_t B,
                       int64_t T, int64_t D, int threads) {
  const Call call{x, last, source, mix, B, T, D};
  typedef uint16_t H;
  if (x_bf16)
    dispatch(D, M, Forward<H, H>{call.window<H>(), reinterpret_cast<H* const*>(out), threads});
  else if (out_bf16)
    dispatch(D, M, Forward<float, H>{call.window<float>(), reinterpret_cast<H* const*>(out),
                                     threads});
  else
    dispatch(D, M, Forward<float, float>{call.window<float>(),
                                         reinterpret_cast<float* const*>(out), threads});
}

void shift_mix_backward(const void* x, int x_bf16, const void* last, const int32_t* source,
                        const float* mix, const void* const* dy, int dy_bf16, void* dx,
                        void* d_last, float* d_mix, int M, int64_t B, int64_t T, int64_t D,
                        int threads) {
  const Call call{x, last, source, mix, B, T, D};
  typedef uint16_t H;
  if (x_bf16)
    dispatch(D, M, Backward<H, H>{call.window<H>(), reinterpret_cast<const H* const*>(dy),
                                  static_cast<H*>(dx), static_cast<H*>(d_last), d_mix, threads});
  else if (dy_bf16)
    dispatch(D, M, Backward<float, H>{call.window<float>(), reinterpret_cast<const H* const*>(dy),
                                      static_cast<float*>(dx), static_cast<float*>(d_last), d_mix,
                                      threads});
  else
    dispatch(D, M,
             Backward<float, float>{call.window<float>(),
                                    reinterpret_cast<const float* const*>(dy),
                                    static_cast<float*>(dx), static_cast<float*>(d_last), d_mix,
                                    threads});
}
}
