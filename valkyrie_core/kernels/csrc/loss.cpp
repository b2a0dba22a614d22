// Cross-entropy of rows of logits, which become their own gradient where they lie.
//
//   nats = log(sum exp(x)) - x[target]        d nats / d x = softmax(x) - onehot(target)
//
// Logits are [R, V], contiguous, fp32 or bf16; inside, everything is fp32. A row is one thread's work
// from end to end, so the bits do not depend on the number of threads.

#include <cmath>

#include "vector.h"

namespace {

template <typename T>
float largest_of(const T* x, int64_t V) {
  constexpr int W = kLanes;
  Vec<W> most = splat<W>(-INFINITY);
  int64_t i = 0;
  for (; i + W <= V; i += W) {
    const Vec<W> piece = load<W>(x + i);
    most = select<W>(piece > most, piece, most);
  }
  float found = largest<W>(most);
  for (; i < V; i++) found = get(x + i) > found ? get(x + i) : found;
  return found;
}

// The exponentials are made twice: cheaper than a second array of V floats.
template <typename T>
float sum_of_exp(const T* x, int64_t V, float shift) {
  constexpr int W = kLanes;
  Vec<W> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= V; i += 2 * W)
    for (int j = 0; j < 2; j++) sums[j] += exp<W>(load<W>(x + i + j * W) - shift);
  float total = sum<W>(sums[0] + sums[1]);
  for (; i < V; i++) total += exp<1>(splat<1>(get(x + i) - shift))[0];
  return total;
}

template <typename T>
float row(T* x, int64_t V, int64_t target) {
  constexpr int W = kLanes;
  const float most = largest_of(x, V), total = sum_of_exp(x, V, most);
  const float of_target = get(x + target), part = 1.f / total;
  int64_t i = 0;
  for (; i + W <= V; i += W) store<W>(x + i, exp<W>(load<W>(x + i) - most) * part);
  for (; i < V; i++) put(x + i, exp<1>(splat<1>(get(x + i) - most))[0] * part);
  // in fp32: rounding the probability first would lose what it lacks to one
  put(x + target, exp<1>(splat<1>(of_target - most))[0] * part - 1.f);
  return std::log(total) + (most - of_target);
}

template <typename T>
void rows(T* logits, const int64_t* targets, float* nats, int64_t R, int64_t V, int64_t ignored,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < R; r++) {
    if (targets[r] == ignored) {
      nats[r] = 0.f;
      memset(logits + r * V, 0, V * sizeof(T));
    } else {
      nats[r] = row(logits + r * V, V, targets[r]);
    }
  }
}

}  // namespace

// returns 0, or 1 where a target is no column: then nothing is written
extern "C" int cross_entropy(void* logits, int bf16, const int64_t* targets, float* nats, int64_t R,
                             int64_t V, int64_t ignored, int threads) {
  for (int64_t r = 0; r < R; r++)
    if (targets[r] != ignored && (targets[r] < 0 || targets[r] >= V)) return 1;
  if (bf16)
    rows(static_cast<uint16_t*>(logits), targets, nats, R, V, ignored, threads);
  else
    rows(static_cast<float*>(logits), targets, nats, R, V, ignored, threads);
  return 0;
}
