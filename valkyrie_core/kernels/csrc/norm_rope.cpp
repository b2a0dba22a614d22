// RMS norm of every head, then rotary positions, forward and backward in one pass over memory.
//
//   n = w x / sqrt(mean(x^2) + eps)      y = (n1 cos - n2 sin, n1 sin + n2 cos, rest)
//
// x is [B, T, N, H] with its last dimension dense, fp32 or bf16; y, dy and dx likewise. cos and sin
// are [B, T, H / 2] in fp32, or null for no positions. Inside, everything is fp32. The gradient of w is
// summed over blocks of kTokens and those in order: the number of threads changes no bit.

#include <cmath>

#include "vector.h"

namespace {

constexpr int kTokens = 32, kWidest = 1024;  // tokens of a block; the widest head

struct View {
  char* data;
  int bf16;
  int64_t b, t, n;
};

struct Problem {
  View x, y;
  const float *weight, *cos, *sin;
  int64_t B, T, N;
  int H;
  float eps;
  int64_t blocks() const { return (B * T + kTokens - 1) / kTokens; }
};

inline int whole(int H) { return (H + kLanes - 1) / kLanes * kLanes; }

template <typename T>
inline void read_as(const T* from, int H, float* out) {
  int h = 0;
  for (; h + kLanes <= H; h += kLanes) store<kLanes>(out + h, load<kLanes>(from + h));
  for (; h < H; h++) out[h] = get(from + h);
  for (; h < whole(H); h++) out[h] = 0.f;
}

template <typename T>
inline void write_as(const float* from, int H, T* out) {
  int h = 0;
  for (; h + kLanes <= H; h += kLanes) store<kLanes>(out + h, load<kLanes>(from + h));
  for (; h < H; h++) put(out + h, from[h]);
}

inline void read(const View& from, int64_t at, int H, float* out) {
  if (from.bf16)
    read_as(reinterpret_cast<const uint16_t*>(from.data) + at, H, out);
  else
    read_as(reinterpret_cast<const float*>(from.data) + at, H, out);
}

inline void write(const View& to, int64_t at, int H, const float* from) {
  if (to.bf16)
    write_as(from, H, reinterpret_cast<uint16_t*>(to.data) + at);
  else
    write_as(from, H, reinterpret_cast<float*>(to.data) + at);
}

inline float dot(const float* x, const float* y, int H) {
  Vec<kLanes> total = {};
  for (int h = 0; h < H; h += kLanes) total += load<kLanes>(x + h) * load<kLanes>(y + h);
  return sum<kLanes>(total);
}

// by the angle, or with `sign` -1 back by it
inline void turn(float* x, const float* cos, const float* sin, int half, float sign) {
  float *first = x, *second = x + half;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec<kLanes> a = load<kLanes>(first + i), b = load<kLanes>(second + i);
    const Vec<kLanes> c = load<kLanes>(cos + i), s = load<kLanes>(sin + i) * sign;
    store<kLanes>(first + i, a * c - b * s);
    store<kLanes>(second + i, a * s + b * c);
  }
  for (; i < half; i++) {
    const float a = first[i], b = second[i], s = sin[i] * sign;
    first[i] = a * cos[i] - b * s;
    second[i] = a * s + b * cos[i];
  }
}

inline int64_t place(const View& v, int64_t token, int64_t n, const Problem& p) {
  return token / p.T * v.b + token % p.T * v.t + n * v.n;
}

void forward_token(const Problem& p, int64_t token, const float* weight) {
  alignas(64) float x[kWidest];
  const int half = p.H / 2;
  for (int64_t n = 0; n < p.N; n++) {
    read(p.x, place(p.x, token, n, p), p.H, x);
    const float scale = 1.f / std::sqrt(dot(x, x, p.H) / p.H + p.eps);
    for (int h = 0; h < p.H; h += kLanes)
      store<kLanes>(x + h, load<kLanes>(x + h) * scale * load<kLanes>(weight + h));
    if (p.cos) turn(x, p.cos + token * half, p.sin + token * half, half, 1.f);
    write(p.y, place(p.y, token, n, p), p.H, x);
  }
}

// dn = dy turned back; dw += dn x / rms; dx = (w dn - x mean(w dn x) / rms^2) / rms
void backward_token(const Problem& p, const View& dx, int64_t token, const float* weight,
                    float* d_weight) {
  alignas(64) float x[kWidest], g[kWidest];
  const int half = p.H / 2;
  for (int64_t n = 0; n < p.N; n++) {
    read(p.x, place(p.x, token, n, p), p.H, x);
    read(p.y, place(p.y, token, n, p), p.H, g);
    if (p.cos) turn(g, p.cos + token * half, p.sin + token * half, half, -1.f);
    const float scale = 1.f / std::sqrt(dot(x, x, p.H) / p.H + p.eps);
    for (int h = 0; h < p.H; h += kLanes) {
      const Vec<kLanes> dn = load<kLanes>(g + h), xs = load<kLanes>(x + h) * scale;
      store<kLanes>(d_weight + h, load<kLanes>(d_weight + h) + dn * xs);
      store<kLanes>(x + h, xs);
      store<kLanes>(g + h, dn * load<kLanes>(weight + h));
    }
    const float mean = dot(g, x, p.H) / p.H;
    for (int h = 0; h < p.H; h += kLanes)
      store<kLanes>(g + h, (load<kLanes>(g + h) - load<kLanes>(x + h) * mean) * scale);
    write(dx, place(dx, token, n, p), p.H, g);
  }
}

View view(void* data, int bf16, const int64_t* strides) {
  return View{static_cast<char*>(data), bf16, strides[0], strides[1], strides[2]};
}

int64_t last_of(const Problem& p, int64_t block) {
  const int64_t stop = (block + 1) * kTokens;
  return stop < p.B * p.T ? stop : p.B * p.T;
}

}  // namespace

extern "C" {

int64_t norm_rope_blocks(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// tensors: x, y; sizes: B, T, N, H
void norm_rope_forward(void* const* tensors, const int* bf16, const int64_t* strides,
                       const float* weight, const float* cos, const float* sin,
                       const int64_t* sizes, float eps, int threads) {
  const Problem p{view(tensors[0], bf16[0], strides), view(tensors[1], bf16[1], strides + 3),
                  weight, cos, sin, sizes[0], sizes[1], sizes[2], int(sizes[3]), eps};
  alignas(64) float padded[kWidest];
  read_as(weight, p.H, padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < p.blocks(); block++)
    for (int64_t token = block * kTokens; token < last_of(p, block); token++)
      forward_token(p, token, padded);
}

// tensors: x, dy, dx; d_weights: [blocks, H up to a multiple of 16], to be summed in order
void norm_rope_backward(void* const* tensors, const int* bf16, const int64_t* strides,
                        const float* weight, const float* cos, const float* sin, float* d_weights,
                        int64_t step, const int64_t* sizes, float eps, int threads) {
  const Problem p{view(tensors[0], bf16[0], strides), view(tensors[1], bf16[1], strides + 3),
                  weight, cos, sin, sizes[0], sizes[1], sizes[2], int(sizes[3]), eps};
  const View dx = view(tensors[2], bf16[2], strides + 6);
  alignas(64) float padded[kWidest];
  read_as(weight, p.H, padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < p.blocks(); block++) {
    float* d_weight = d_weights + block * step;
    memset(d_weight, 0, step * sizeof *d_weight);
    for (int64_t token = block * kTokens; token < last_of(p, block); token++)
      backward_token(p, dx, token, padded, d_weight);
  }
  for (int64_t block = 1; block < p.blocks(); block++)
    for (int h = 0; h < p.H; h++) d_weights[h] += d_weights[block * step + h];
}
}
