// What surrounds the WKV-7 recurrence inside RWKV-7's time mix, elementwise and per head.
//
// prepare, before the recurrence:
//   log_decay = -c sigmoid(w0 + dw)       rate = sigmoid(a0 + da)       c = exp(-1/2)
//   v' = v + (v_first - v) sigmoid(v0 + dv)                    (left out in the first layer)
//   kk = u / |u| per head, u = k k_k      k' = k (1 + (rate - 1) k_a)      a = -kk      b = kk rate
// read_out, after it:
//   z = (norm(y) g + h + (sum over the head of r k' r_k) v') gate        norm: per head, no weights
//
// Tensors are [B, T, D] with D = N H, fp32 or bf16 alike but for log_decay, which is always fp32;
// vectors are [D] in fp32. Gradients of vectors come as one sum per block of tokens, so that bits
// don't depend on the number of threads.

#include "vector.h"

#include <cmath>

namespace {

constexpr int64_t kBlock = 64;
constexpr float kDecayScale = 0.60653065971263342f;
constexpr float kTiny = 1e-12f;  // the smallest length a key is divided by
constexpr int kWidest = 1024;    // the widest head

struct Sizes {
  int64_t tokens, D, H;
  int threads;
};

template <typename E>
struct Prepare {
  const E *k, *v, *dw, *da, *dv, *v_first;  // dv and v_first are null in the first layer
  const float *w0, *a0, *v0, *k_k, *k_a;
};

template <typename E>
struct Prepared {
  float* log_decay;
  E *k, *v, *a, *b;  // v is null in the first layer: nothing changes it
};

template <int W>
inline float dot(const float* x, const float* y, int64_t H) {
  Vec<W> total = {};
  for (int64_t i = 0; i < H; i += W) total += load<W>(x + i) * load<W>(y + i);
  return sum<W>(total);
}

// u = k k_k of a head, and 1 / |u|
template <int W, typename E>
inline float key_direction(const Prepare<E>& p, int64_t at, int64_t d, int64_t H, float* u) {
  for (int64_t i = 0; i < H; i += W)
    store<W>(u + i, load<W>(p.k + at + i) * load<W>(p.k_k + d + i));
  return 1.f / std::fmax(std::sqrt(dot<W>(u, u, H)), kTiny);
}

template <int W, typename E>
void prepare_head(const Prepare<E>& p, const Prepared<E>& out, int64_t at, int64_t d, int64_t H) {
  alignas(64) float u[kWidest];
  const float inverse = key_direction<W>(p, at, d, H, u);
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> k = load<W>(p.k + at + i), kk = load<W>(u + i) * inverse;
    const Vec<W> rate = sigmoid<W>(load<W>(p.a0 + d + i) + load<W>(p.da + at + i));
    const Vec<W> speed = sigmoid<W>(load<W>(p.w0 + d + i) + load<W>(p.dw + at + i));
    store<W>(out.log_decay + at + i, -kDecayScale * speed);
    store<W>(out.k + at + i, k + k * (rate - 1.f) * load<W>(p.k_a + d + i));
    store<W>(out.a + at + i, -kk);
    store<W>(out.b + at + i, kk * rate);
    if (!p.dv) continue;
    const Vec<W> v = load<W>(p.v + at + i);
    const Vec<W> share = sigmoid<W>(load<W>(p.v0 + d + i) + load<W>(p.dv + at + i));
    store<W>(out.v + at + i, v + (load<W>(p.v_first + at + i) - v) * share);
  }
}

template <typename E>
struct PrepareGradients {
  const float* log_decay;  // as prepared
  const float* d_log_decay;
  const E *d_k, *d_v, *d_a, *d_b;             // of the recurrence
  const E *d_k_read, *d_v_read;               // of the read-out, to be added
  E *to_k, *to_v, *to_dw, *to_da, *to_dv, *to_v_first;
};

enum { kW0, kA0, kV0, kKK, kKA, kPrepareVectors };

template <int W>
inline void add(float* to, Vec<W> x) {
  store<W>(to, load<W>(to) + x);
}

template <int W, typename E>
void prepare_back_head(const Prepare<E>& p, const PrepareGradients<E>& g, int64_t at, int64_t d,
                       int64_t D, int64_t H, float* sums) {
  alignas(64) float u[kWidest], d_kk[kWidest];
  const float inverse = key_direction<W>(p, at, d, H, u);
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> k = load<W>(p.k + at + i), kk = load<W>(u + i) * inverse;
    const Vec<W> rate = sigmoid<W>(load<W>(p.a0 + d + i) + load<W>(p.da + at + i));
    const Vec<W> db = load<W>(g.d_b + at + i);
    const Vec<W> dk = load<W>(g.d_k + at + i) + load<W>(g.d_k_read + at + i);
    const Vec<W> k_a = load<W>(p.k_a + d + i);
    store<W>(d_kk + i, db * rate - load<W>(g.d_a + at + i));
    const Vec<W> d_rate = (db * kk + dk * k * k_a) * rate * (1.f - rate);
    store<W>(g.to_da + at + i, d_rate);
    add<W>(sums + kA0 * D + d + i, d_rate);
    add<W>(sums + kKA * D + d + i, dk * k * (rate - 1.f));
    // sigmoid(w0 + dw) is -log_decay / c
    const Vec<W> log_decay = load<W>(g.log_decay + at + i);
    const Vec<W> d_w =
        load<W>(g.d_log_decay + at + i) * log_decay * (1.f + log_decay * (1.f / kDecayScale));
    store<W>(g.to_dw + at + i, d_w);
    add<W>(sums + kW0 * D + d + i, d_w);
    const Vec<W> dv = load<W>(g.d_v + at + i) + load<W>(g.d_v_read + at + i);
    if (!p.dv) {
      store<W>(g.to_v + at + i, dv);
      continue;
    }
    const Vec<W> share = sigmoid<W>(load<W>(p.v0 + d + i) + load<W>(p.dv + at + i));
    const Vec<W> apart = load<W>(p.v_first + at + i) - load<W>(p.v + at + i);
    const Vec<W> d_share = dv * apart * share * (1.f - share);
    store<W>(g.to_v + at + i, dv - dv * share);
    store<W>(g.to_v_first + at + i, dv * share);
    store<W>(g.to_dv + at + i, d_share);
    add<W>(sums + kV0 * D + d + i, d_share);
  }
  // through u / |u|: what lies along kk is lost; a key shorter than kTiny is divided by kTiny
  const float along = inverse < 1.f / kTiny ? inverse * dot<W>(d_kk, u, H) : 0.f;
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> k = load<W>(p.k + at + i);
    const Vec<W> rate = sigmoid<W>(load<W>(p.a0 + d + i) + load<W>(p.da + at + i));
    const Vec<W> dk = load<W>(g.d_k + at + i) + load<W>(g.d_k_read + at + i);
    const Vec<W> d_u = (load<W>(d_kk + i) - load<W>(u + i) * (inverse * along)) * inverse;
    add<W>(sums + kKK * D + d + i, d_u * k);
    store<W>(g.to_k + at + i,
             d_u * load<W>(p.k_k + d + i) + dk + dk * (rate - 1.f) * load<W>(p.k_a + d + i));
  }
}

template <typename E>
struct ReadOut {
  const E *y, *r, *k, *v, *gate;
  const float *weight, *bias, *r_k;
  float eps;
};

// The mean of a head, and 1 / its standard deviation.
template <int W, typename E>
inline void moments(const E* y, int64_t H, float eps, float& mean, float& inverse) {
  Vec<W> total = {}, squares = {};
  for (int64_t i = 0; i < H; i += W) total += load<W>(y + i);
  mean = sum<W>(total) / float(H);
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> x = load<W>(y + i) - mean;
    squares += x * x;
  }
  inverse = 1.f / std::sqrt(sum<W>(squares) / float(H) + eps);
}

template <int W, typename E>
inline float bonus(const ReadOut<E>& p, int64_t at, int64_t d, int64_t H) {
  Vec<W> total = {};
  for (int64_t i = 0; i < H; i += W)
    total += load<W>(p.r + at + i) * load<W>(p.k + at + i) * load<W>(p.r_k + d + i);
  return sum<W>(total);
}

template <int W, typename E>
void read_out_head(const ReadOut<E>& p, E* z, int64_t at, int64_t d, int64_t H) {
  float mean, inverse;
  moments<W>(p.y + at, H, p.eps, mean, inverse);
  const float extra = bonus<W>(p, at, d, H);
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> normed = (load<W>(p.y + at + i) - mean) * inverse;
    const Vec<W> inner = normed * load<W>(p.weight + d + i) + load<W>(p.bias + d + i) +
                         extra * load<W>(p.v + at + i);
    store<W>(z + at + i, inner * load<W>(p.gate + at + i));
  }
}

template <typename E>
struct ReadOutGradients {
  const E* dz;
  E *to_y, *to_r, *to_k, *to_v, *to_gate;
};

enum { kWeight, kBias, kRK, kReadOutVectors };

template <int W, typename E>
void read_out_back_head(const ReadOut<E>& p, const ReadOutGradients<E>& g, int64_t at, int64_t d,
                        int64_t D, int64_t H, float* sums) {
  float mean, inverse;
  moments<W>(p.y + at, H, p.eps, mean, inverse);
  const float extra = bonus<W>(p, at, d, H);
  Vec<W> total = {}, along = {}, d_bonus = {};
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> normed = (load<W>(p.y + at + i) - mean) * inverse, v = load<W>(p.v + at + i);
    const Vec<W> weight = load<W>(p.weight + d + i), dz = load<W>(g.dz + at + i);
    const Vec<W> inner = normed * weight + load<W>(p.bias + d + i) + extra * v;
    const Vec<W> d_inner = dz * load<W>(p.gate + at + i), d_normed = d_inner * weight;
    store<W>(g.to_gate + at + i, dz * inner);
    store<W>(g.to_v + at + i, d_inner * extra);
    add<W>(sums + kWeight * D + d + i, d_inner * normed);
    add<W>(sums + kBias * D + d + i, d_inner);
    total += d_normed;
    along += d_normed * normed;
    d_bonus += d_inner * v;
  }
  const float mean_d = sum<W>(total) / float(H), mean_along = sum<W>(along) / float(H);
  const float d_extra = sum<W>(d_bonus);
  for (int64_t i = 0; i < H; i += W) {
    const Vec<W> normed = (load<W>(p.y + at + i) - mean) * inverse;
    const Vec<W> d_normed =
        load<W>(g.dz + at + i) * load<W>(p.gate + at + i) * load<W>(p.weight + d + i);
    store<W>(g.to_y + at + i, (d_normed - mean_d - normed * mean_along) * inverse);
    const Vec<W> r = load<W>(p.r + at + i), k = load<W>(p.k + at + i);
    const Vec<W> r_k = d_extra * load<W>(p.r_k + d + i);
    store<W>(g.to_r + at + i, r_k * k);
    store<W>(g.to_k + at + i, r_k * r);
    add<W>(sums + kRK * D + d + i, d_extra * r * k);
  }
}

// Every head of every token; `sums` is [blocks, vectors, D], cleared here, or null.
template <typename Each>
void over_heads(const Sizes& s, float* sums, int vectors, const Each& each) {
  const int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float* own = sums ? sums + block * vectors * s.D : nullptr;
    if (own) memset(own, 0, size_t(vectors) * s.D * sizeof(float));
    for (int64_t t = block * kBlock; t < (block + 1) * kBlock && t < s.tokens; t++)
      for (int64_t d = 0; d < s.D; d += s.H) each(t * s.D + d, d, own);
  }
}

// Calls `job` with the widest vector that divides a head.
template <int W = kLanes, typename Job>
void dispatch(int64_t H, const Job& job) {
  if constexpr (W > 4)
    if (H % W) return dispatch<W / 2>(H, job);
  job.template run<W>();
}

template <typename E>
struct PrepareJob {
  Sizes s;
  Prepare<E> in;
  Prepared<E> out;
  template <int W>
  void run() const {
    over_heads(s, nullptr, 0,
               [&](int64_t at, int64_t d, float*) { prepare_head<W>(in, out, at, d, s.H); });
  }
};

template <typename E>
struct PrepareBackJob {
  Sizes s;
  Prepare<E> in;
  PrepareGradients<E> g;
  const E* d_r_more;
  E* d_r;  // gets d_r_more added
  float* sums;
  template <int W>
  void run() const {
    over_heads(s, sums, kPrepareVectors, [&](int64_t at, int64_t d, float* own) {
      prepare_back_head<W>(in, g, at, d, s.D, s.H, own);
      for (int64_t i = at; i < at + s.H; i += W)
        store<W>(d_r + i, load<W>(d_r + i) + load<W>(d_r_more + i));
    });
  }
};

template <typename E>
struct ReadOutJob {
  Sizes s;
  ReadOut<E> in;
  E* z;
  template <int W>
  void run() const {
    over_heads(s, nullptr, 0,
               [&](int64_t at, int64_t d, float*) { read_out_head<W>(in, z, at, d, s.H); });
  }
};

template <typename E>
struct ReadOutBackJob {
  Sizes s;
  ReadOut<E> in;
  ReadOutGradients<E> g;
  float* sums;
  template <int W>
  void run() const {
    over_heads(s, sums, kReadOutVectors, [&](int64_t at, int64_t d, float* own) {
      read_out_back_head<W>(in, g, at, d, s.D, s.H, own);
    });
  }
};

struct Pointers {
  void* const* p;
  template <typename T>
  T* at(int i) const {
    return static_cast<T*>(p[i]);
  }
};

template <typename E>
Prepare<E> prepare_inputs(const Pointers& x, const Pointers& v) {
  return {x.at<E>(0),     x.at<E>(1),     x.at<E>(2),     x.at<E>(3),     x.at<E>(4), x.at<E>(5),
          v.at<float>(0), v.at<float>(1), v.at<float>(2), v.at<float>(3), v.at<float>(4)};
}

template <typename E>
ReadOut<E> read_out_inputs(const Pointers& x, const Pointers& v, float eps) {
  return {x.at<E>(0),     x.at<E>(1),     x.at<E>(2),     x.at<E>(3), x.at<E>(4),
          v.at<float>(0), v.at<float>(1), v.at<float>(2), eps};
}

template <typename E>
void prepare(const Sizes& s, Pointers x, Pointers v, Pointers out) {
  dispatch(s.H, PrepareJob<E>{s, prepare_inputs<E>(x, v),
                              {out.at<float>(0), out.at<E>(1), out.at<E>(2), out.at<E>(3),
                               out.at<E>(4)}});
}

template <typename E>
void prepare_back(const Sizes& s, Pointers x, Pointers v, Pointers g, Pointers to, float* sums) {
  dispatch(s.H, PrepareBackJob<E>{s, prepare_inputs<E>(x, v),
                                  {g.at<float>(0), g.at<float>(1), g.at<E>(2), g.at<E>(3),
                                   g.at<E>(4), g.at<E>(5), g.at<E>(6), g.at<E>(7), to.at<E>(0),
                                   to.at<E>(1), to.at<E>(2), to.at<E>(3), to.at<E>(4),
                                   to.at<E>(5)},
                                  g.at<E>(8), to.at<E>(6), sums});
}

template <typename E>
void read_out(const Sizes& s, Pointers x, Pointers v, float eps, void* z) {
  dispatch(s.H, ReadOutJob<E>{s, read_out_inputs<E>(x, v, eps), static_cast<E*>(z)});
}

template <typename E>
void read_out_back(const Sizes& s, Pointers x, Pointers v, float eps, const void* dz, Pointers to,
                   float* sums) {
  dispatch(s.H, ReadOutBackJob<E>{s, read_out_inputs<E>(x, v, eps),
                                  {static_cast<const E*>(dz), to.at<E>(0), to.at<E>(1),
                                   to.at<E>(2), to.at<E>(3), to.at<E>(4)},
                                  sums});
}

}  // namespace

extern "C" {

int64_t time_mix_block() { return kBlock; }
int64_t time_mix_widest() { return kWidest; }

// x: k, v, dw, da, dv, v_first; v: w0, a0, v0, k_k, k_a; out: log_decay, k, v, a, b
void time_mix_prepare(void* const* x, void* const* v, void* const* out, int bf16, int64_t tokens,
                      int64_t D, int64_t H, int threads) {
  const Sizes s{tokens, D, H, threads};
  bf16 ? prepare<uint16_t>(s, {x}, {v}, {out}) : prepare<float>(s, {x}, {v}, {out});
}

// g: log_decay and the gradients of log_decay, k, v, a, b by the recurrence, of k, v, r by the
// read-out; to: k, v, dw, da, dv, v_first, r (which holds the recurrence's share already); sums:
// [blocks, 5, D] of the vectors
void time_mix_prepare_back(void* const* x, void* const* v, void* const* g, void* const* to,
                           float* sums, int bf16, int64_t tokens, int64_t D, int64_t H,
                           int threads) {
  const Sizes s{tokens, D, H, threads};
  bf16 ? prepare_back<uint16_t>(s, {x}, {v}, {g}, {to}, sums)
       : prepare_back<float>(s, {x}, {v}, {g}, {to}, sums);
}

// x: y, r, k, v, gate; v: weight, bias, r_k
void time_mix_read_out(void* const* x, void* const* v, float eps, void* z, int bf16,
                       int64_t tokens, int64_t D, int64_t H, int threads) {
  const Sizes s{tokens, D, H, threads};
  bf16 ? read_out<uint16_t>(s, {x}, {v}, eps, z) : read_out<float>(s, {x}, {v}, eps, z);
}

// to: y, r, k, v, gate; sums: [blocks, 3, D] of the vectors
void time_mix_read_out_back(void* const* x, void* const* v, float eps, const void* dz,
                            void* const* to, float* sums, int bf16, int64_t tokens, int64_t D,
                            int64_t H, int threads) {
  const Sizes s{tokens, D, H, threads};
  bf16 ? read_out_back<uint16_t>(s, {x}, {v}, eps, dz, {to}, sums)
       : read_out_back<float>(s, {x}, {v}, eps, dz, {to}, sums);
}
}
