// RWKV-7's time mix between its matrices: the WKV-7 recurrence with what surrounds it, one pass each
// way over the tokens of a head. Before the recurrence:
//
//   log_decay = -c sigmoid(w0 + decay)       rate = sigmoid(a0 + rate row)       c = exp(-1/2)
//   v' = v + (v_first - v) sigmoid(v0 + share)                 (left out in the first layer)
//   kk = u / |u|, u = k k_k       k' = k (1 + (rate - 1) k_a)       a = -kk       b = kk rate
//   b = kk rate (1 + decay)                                            (of signed eigenvalues)
//
// and after it, with x the group norm of y without its weights:
//
//   z = (x weight + bias + (sum over the head of r k' r_k) v') gate
//
// Rows are [B, T, D] with D = N H, fp32 or bf16 alike; vectors are [D] in fp32. Nothing in between is
// kept but y: the backward pass makes the rest again. Gradients of vectors come as one sum per row of
// the batch, so that bits don't depend on the number of threads.

#include <cmath>

#include "wkv7.h"

namespace {

constexpr float kDecayScale = 0.60653065971263342f;
constexpr float kTiny = 1e-12f;  // the smallest length that a key is divided by

enum { kW0, kA0, kV0, kKK, kKA, kRK, kWeight, kBias, kVectors };

template <typename E>
struct Rows {
  const E *r, *k, *v, *decay, *rate, *share, *v_first, *gate;  // no share in the first layer
};

template <typename E>
struct TimeMix {
  struct More {  // what the read-out adds to gradients
    alignas(64) float r[H], k[H], v[H];
  };
  Rows<E> in;
  const float* vectors[kVectors];  // from this head's first channel on
  float eps;
  bool is_signed;
  E *z, *y;  // y is null where no gradients are wanted
  const E *dz;
  E *to[8];  // as Rows
  alignas(64) float sums[kVectors][H];

  V vector(int which, int q) const { return load<W>(vectors[which] + q); }
  V rate(size_t at, int q) const {
    return sigmoid<W>(vector(kA0, q) + load<W>(in.rate + at + q));
  }
  V share(size_t at, int q) const {
    return sigmoid<W>(vector(kV0, q) + load<W>(in.share + at + q));
  }

  // u = k k_k, and 1 / |u|
  float direction(size_t at, float* u) const {
    for (int q = 0; q < H; q += W) store<W>(u + q, load<W>(in.k + at + q) * vector(kKK, q));
    return 1.f / std::fmax(std::sqrt(dot(u, u)), kTiny);
  }

  void token(size_t at, Token& x) const {
    alignas(64) float u[H], g[H];
    const float inverse = direction(at, u);
    for (int q = 0; q < H; q += W) {
      const V k = load<W>(in.k + at + q), kk = load<W>(u + q) * inverse, speed = rate(at, q);
      V v = load<W>(in.v + at + q);
      if (in.share) v += (load<W>(in.v_first + at + q) - v) * share(at, q);
      store<W>(g + q, -kDecayScale * sigmoid<W>(vector(kW0, q) + load<W>(in.decay + at + q)));
      store<W>(x.r + q, load<W>(in.r + at + q));
      store<W>(x.k + q, k + k * (speed - 1.f) * vector(kKA, q));
      store<W>(x.v + q, v);
      store<W>(x.a + q, -kk);
      store<W>(x.b + q, kk * speed);
    }
    ::decay(g, x.w);
    if (is_signed)
      for (int q = 0; q < H; q += W) store<W>(x.b + q, load<W>(x.b + q) * (1.f + load<W>(x.w + q)));
  }

  void fetch(size_t at) const {
    for (int q = 0; q < H; q += W)
      for (const E* row : {in.r, in.k, in.v, in.decay, in.rate, in.gate})
        __builtin_prefetch(row + at + q, 0, 3);
  }

  struct Moments {
    float mean, inverse;
  };

  template <typename Y>
  Moments moments(const Y* row) const {
    V total = {}, squares = {};
    for (int q = 0; q < H; q += W) total += load<W>(row + q);
    const float mean = sum<W>(total) / float(H);
    for (int q = 0; q < H; q += W) {
      const V apart = load<W>(row + q) - mean;
      squares += apart * apart;
    }
    return {mean, 1.f / std::sqrt(sum<W>(squares) / float(H) + eps)};
  }

  float bonus(const Token& x) const {
    V total = {};
    for (int q = 0; q < H; q += W) total += load<W>(x.r + q) * load<W>(x.k + q) * vector(kRK, q);
    return sum<W>(total);
  }

  void output(size_t at, const Token& x, const float* row) const {
    const Moments m = moments(row);
    const float extra = bonus(x);
    for (int q = 0; q < H; q += W) {
      const V value = load<W>(row + q), normed = (value - m.mean) * m.inverse;
      const V inner = normed * vector(kWeight, q) + vector(kBias, q) + extra * load<W>(x.v + q);
      store<W>(z + at + q, inner * load<W>(in.gate + at + q));
      if (y) store<W>(y + at + q, value);
    }
  }

  void padding(size_t at) const {  // the recurrence passes it by, the read-out does not
    alignas(64) const float nothing[H] = {};
    Token x;
    token(at, x);
    output(at, x, nothing);
  }

  void add(int which, int q, V value) {
    store<W>(sums[which] + q, load<W>(sums[which] + q) + value);
  }

  // Back through the read-out: the gradient of y, and what r, k' and v' get here.
  void gradient(size_t at, const Token& x, float* dy, More& more) {
    const Moments m = moments(y + at);
    const float extra = bonus(x);
    V total = {}, along = {}, d_bonus = {};
    for (int q = 0; q < H; q += W) {
      const V normed = (load<W>(y + at + q) - m.mean) * m.inverse, v = load<W>(x.v + q);
      const V weight = vector(kWeight, q), dz_row = load<W>(dz + at + q);
      const V inner = normed * weight + vector(kBias, q) + extra * v;
      const V d_inner = dz_row * load<W>(in.gate + at + q), d_normed = d_inner * weight;
      store<W>(to[7] + at + q, dz_row * inner);
      store<W>(more.v + q, d_inner * extra);
      store<W>(dy + q, d_normed);
      add(kWeight, q, d_inner * normed);
      add(kBias, q, d_inner);
      total += d_normed;
      along += d_normed * normed;
      d_bonus += d_inner * v;
    }
    const float mean_d = sum<W>(total) / float(H), mean_along = sum<W>(along) / float(H);
    const float d_extra = sum<W>(d_bonus);
    for (int q = 0; q < H; q += W) {
      const V normed = (load<W>(y + at + q) - m.mean) * m.inverse;
      const V r = load<W>(x.r + q), k = load<W>(x.k + q), r_k = d_extra * vector(kRK, q);
      store<W>(dy + q, (load<W>(dy + q) - mean_d - normed * mean_along) * m.inverse);
      store<W>(more.r + q, r_k * k);
      store<W>(more.k + q, r_k * r);
      add(kRK, q, d_extra * r * k);
    }
  }

  // Back through what stands before the recurrence.
  void gradients(size_t at, const Token& x, const Sums& d, const float* dv_row, const More& more) {
    alignas(64) float u[H], d_kk[H], dk_own[H];
    const float inverse = direction(at, u);
    for (int q = 0; q < H; q += W) {
      const V k = load<W>(in.k + at + q), speed = rate(at, q), k_a = vector(kKA, q);
      const V db = load<W>(d.b + q), dk = load<W>(d.k + q) + load<W>(more.k + q);
      const V kk = -load<W>(x.a + q), decay = load<W>(x.w + q);
      const V reach = is_signed ? 1.f + decay : splat<W>(1.f);
      const V d_log = load<W>(d.w + q) + (is_signed ? db * kk * speed * decay : splat<W>(0.f));
      const V d_rate = (db * kk * reach + dk * k * k_a) * speed * (1.f - speed);
      // c sigmoid is -log_decay, which is not kept
      const V fast = sigmoid<W>(vector(kW0, q) + load<W>(in.decay + at + q));
      const V d_decay = d_log * -kDecayScale * fast * (1.f - fast);
      store<W>(d_kk + q, db * speed * reach - load<W>(d.a + q));
      store<W>(dk_own + q, dk + dk * (speed - 1.f) * k_a);
      store<W>(to[0] + at + q, load<W>(d.r + q) + load<W>(more.r + q));
      store<W>(to[3] + at + q, d_decay);
      store<W>(to[4] + at + q, d_rate);
      add(kW0, q, d_decay);
      add(kA0, q, d_rate);
      add(kKA, q, dk * k * (speed - 1.f));
      values_back(at, q, load<W>(dv_row + q) + load<W>(more.v + q));
    }
    // through u / |u|: what lies along kk is lost; a key shorter than kTiny is divided by kTiny
    const float along = inverse < 1.f / kTiny ? inverse * inverse * dot(d_kk, u) : 0.f;
    for (int q = 0; q < H; q += W) {
      const V d_u = (load<W>(d_kk + q) - load<W>(u + q) * along) * inverse;
      store<W>(to[1] + at + q, d_u * vector(kKK, q) + load<W>(dk_own + q));
      add(kKK, q, d_u * load<W>(in.k + at + q));
    }
  }

  void values_back(size_t at, int q, V dv) {
    if (!in.share) {
      store<W>(to[2] + at + q, dv);
      return;
    }
    const V part = share(at, q);
    const V apart = load<W>(in.v_first + at + q) - load<W>(in.v + at + q);
    const V d_share = dv * apart * part * (1.f - part);
    store<W>(to[2] + at + q, dv - dv * part);
    store<W>(to[6] + at + q, dv * part);
    store<W>(to[5] + at + q, d_share);
    add(kV0, q, d_share);
  }

  void fetch_back(size_t at) const {
    for (int i : {0, 1, 2, 3, 4}) __builtin_prefetch(to[i] + at, 1, 3);
  }

  void padding_back(size_t at) {
    alignas(64) float dy[H];
    Token x;
    More more;
    const Sums nothing = {};
    token(at, x);
    gradient(at, x, dy, more);
    gradients(at, x, nothing, nothing.r, more);
  }
};

struct Call {
  void *const *rows, *const *vectors;
  float eps;
  bool is_signed;
  int64_t D;

  template <typename E>
  TimeMix<E> head(int64_t first_channel) const {
    TimeMix<E> io = {};
    const auto row = [&](int i) { return static_cast<const E*>(rows[i]); };
    io.in = {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
    for (int i = 0; i < kVectors; i++)
      io.vectors[i] = vectors[i] ? static_cast<const float*>(vectors[i]) + first_channel : nullptr;
    io.eps = eps;
    io.is_signed = is_signed;
    return io;
  }
};

template <typename E>
void forward(const Call& call, const uint8_t* flags, const float* state, void* z, void* y,
             float* final, float* sa, float* checkpoints, int64_t B, int64_t T, int64_t N,
             int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < B * N; head++) {
    TimeMix<E> io = call.head<E>(head % N * H);
    io.z = static_cast<E*>(z), io.y = static_cast<E*>(y);
    forward_head(io, Place(head, T, N, flags), state, final, sa, checkpoints);
  }
}

template <typename E>
int backward(const Call& call, const uint8_t* flags, void* y, const void* dz, const float* sa,
             const float* checkpoints, const float* d_final, void* const* to, float* sums,
             float* d_state, int64_t B, int64_t T, int64_t N, int threads) {
  typedef TimeMix<E> Io;
  return over_heads_back<Io>(B * N, threads, [&](int64_t head, Stretch<Io>& m) {
    Io io = call.head<E>(head % N * H);
    io.y = static_cast<E*>(y), io.dz = static_cast<const E*>(dz);
    for (int i = 0; i < 8; i++) io.to[i] = static_cast<E*>(to[i]);
    backward_head(io, Place(head, T, N, flags), sa, checkpoints, d_final, d_state, m);
    for (int i = 0; i < kVectors; i++)
      copy(io.sums[i], sums + (head / N * kVectors + i) * N * H + head % N * H);
  });
}

}  // namespace

extern "C" {

// rows: r, k, v, decay, rate, share, v_first, gate; vectors: w0, a0, v0, k_k, k_a, r_k, weight, bias.
// y, sa and checkpoints are null where no gradients are wanted.
void time_mix_forward(void* const* rows, void* const* vectors, float eps, int is_signed, int bf16,
                      const uint8_t* flags, const float* state, void* z, void* y, float* final,
                      float* sa, float* checkpoints, int64_t B, int64_t T, int64_t N,
                      int threads) {
  const Call call{rows, vectors, eps, bool(is_signed), N * H};
  (bf16 ? forward<uint16_t> : forward<float>)(call, flags, state, z, y, final, sa, checkpoints, B,
                                              T, N, threads);
}

// to: the gradients of rows; sums: those of vectors, [B, 8, D]. Returns 1 where memory ran out.
int time_mix_backward(void* const* rows, void* const* vectors, float eps, int is_signed, int bf16,
                      const uint8_t* flags, void* y, const void* dz, const float* sa,
                      const float* checkpoints, const float* d_final, void* const* to, float* sums,
                      float* d_state, int64_t B, int64_t T, int64_t N, int threads) {
  const Call call{rows, vectors, eps, bool(is_signed), N * H};
  return (bf16 ? backward<uint16_t> : backward<float>)(call, flags, y, dz, sa, checkpoints, d_final,
                                                       to, sums, d_state, B, T, N, threads);
}
}
