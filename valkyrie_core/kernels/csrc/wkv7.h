// WKV-7 on a CPU, forward and backward, one head after the other with its state in L1.
//
//   S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t        w = exp(log_decay)
//
// Forward, the state is kept as [key][value], so that sums over keys need no sum over lanes:
//
//   row_j <- w_j row_j + b_j sa + k_j v       sa = sum_j a_j row_j (before)       y = sum_j r_j row_j
//
// Backward, it is kept as [value][key], since five gradients of six are sums over values. With D the
// gradient of the state that a token leaves, P the state it found, and G = D + dy r^T:
//
//   dk = G^T v    db = G^T sa    dv = G k    dsa = G b    dw = sum over values of G * P
//   dr = S^T dy   da = P^T dsa   D <- G diag(w) + dsa a^T
//
// G and S are never formed: what r, k and b add to the sums over D and P are products of rows. The
// backward pass reads the state saved at every kCheckpoint-th token, makes the states of that
// stretch again, and walks it backwards: memory grows by H / kCheckpoint floats per input element.
//
// Where a token's rows come from and where its results go is said by an Io, so that what surrounds
// the recurrence can be done while its rows are at hand: plain tensors in wkv7.cpp, the whole time mix
// in time_mix.cpp. Tensors are [B, T, N, H], contiguous; states are [B, N, H, H] as [value][key] in
// fp32. flags[b, t]: 0 an ordinary token, 1 the first of a document, 2 padding.
//
// One library holds one head width: -DHEAD_DIM=64, a multiple of 4.

#pragma once

#include <cstdlib>
#include <initializer_list>

#include "vector.h"

namespace {

constexpr int H = HEAD_DIM;
constexpr int kCheckpoint = 32;  // tokens between two saved states
enum Flag : uint8_t { kToken = 0, kFresh = 1, kPadding = 2 };

// the widest vector that divides a head, and how many of them a head is
constexpr int kFit = H % 16 == 0 ? 16 : (H % 8 == 0 ? 8 : 4);
constexpr int W = kFit < kLanes ? kFit : kLanes;
constexpr int Q = H / W;
// how many of them are worked on at once: what the registers hold with all sums beside them
constexpr int kRoom = kRegisters == 32 ? 4 : 2;
constexpr int K = Q % kRoom == 0 ? kRoom : (Q % 2 == 0 ? 2 : (Q % 3 == 0 ? 3 : 1));
typedef Vec<W> V;

struct Row {  // where a [B, T, N, H] tensor lies, and in which of the two types
  char* data;
  int bf16;
};

// Rows are copied and cleared by whole vectors and not by memcpy: what is written in other widths
// than it is read again waits until it has left the store buffer.
template <typename In, typename Out>
inline void copy(const In* in, Out* out) {
  for (int q = 0; q < H; q += W) store<W>(out + q, load<W>(in + q));
}

inline void clear(float* out) {
  for (int q = 0; q < H; q += W) store<W>(out + q, V{});
}

inline void read(const Row& row, size_t at, float* out) {
  if (row.bf16)
    copy(reinterpret_cast<const uint16_t*>(row.data) + at, out);
  else
    copy(reinterpret_cast<const float*>(row.data) + at, out);
}

inline void write(const Row& row, size_t at, const float* in) {
  if (row.bf16)
    copy(in, reinterpret_cast<uint16_t*>(row.data) + at);
  else
    copy(in, reinterpret_cast<float*>(row.data) + at);
}

// A head's tokens lie N * H apart, too far for the processor to guess what comes next: it is asked
// for before it is needed, W elements at a time.
template <int writing>
inline void fetch(const Row& row, size_t at) {
  __builtin_prefetch(row.data + at * (row.bf16 ? 2 : 4), writing, 3);
}

// exp on [-1, 0]: Taylor around -1/2 to the 9th power, relative error below 1e-8
inline void decay(const float* log_decay, float* w) {
  constexpr float c[10] = {1.f,        1.f,         1.f / 2,    1.f / 6,     1.f / 24,
                           1.f / 120,  1.f / 720,   1.f / 5040, 1.f / 40320, 1.f / 362880};
  for (int q = 0; q < H; q += W) {
    const V x = load<W>(log_decay + q) + 0.5f;
    V p = splat<W>(c[9]);
    for (int n = 8; n >= 0; n--) p = p * x + c[n];
    store<W>(w + q, p * 0.60653065971263342f);
  }
}

struct Token {  // one token's rows, widened to fp32
  alignas(64) float r[H], w[H], k[H], v[H], a[H], b[H];
};

// Where one head of one batch row lies.
struct Place {
  int64_t head, batch, T, stretches;
  size_t stride, start;
  const uint8_t* flags;  // of this row, or null
  Place(int64_t head, int64_t T, int64_t N, const uint8_t* all_flags)
      : head(head),
        batch(head / N),
        T(T),
        stretches((T + kCheckpoint - 1) / kCheckpoint),
        stride(size_t(N) * H),
        start(size_t(batch) * T * stride + size_t(head % N) * H),
        flags(all_flags ? all_flags + batch * T : nullptr) {}
  size_t at(int64_t t) const { return start + t * stride; }
  uint8_t flag(int64_t t) const { return flags ? flags[t] : uint8_t(kToken); }
};

// S a, what the delta rule reads before it writes.
inline void look_up(const float* S, const float* a, float* sa_out) {
  V sa[Q] = {};
  for (int j = 0; j < H; j++)
    for (int q = 0; q < Q; q++) sa[q] += a[j] * load<W>(S + j * H + q * W);
  for (int q = 0; q < Q; q++) store<W>(sa_out + q * W, sa[q]);
}

// S <- the state after this token; y = S r. `sa` comes in as S a of this token and leaves as that
// of the next one, whose a is looked up in the same pass over the state.
inline void step(const Token& x, const float* next_a, float* S, float* sa_row, float* y_row) {
  for (int slice = 0; slice < H; slice += K * W) {
    V sa[K], next[K], y[K], v[K];
    for (int q = 0; q < K; q++) {
      next[q] = y[q] = V{};
      sa[q] = load<W>(sa_row + slice + q * W);
      v[q] = load<W>(x.v + slice + q * W);
    }
    for (int j = 0; j < H; j++) {
      V w = splat<W>(x.w[j]), k = splat<W>(x.k[j]), b = splat<W>(x.b[j]), r = splat<W>(x.r[j]),
        a = splat<W>(next_a[j]);
      in_register(w), in_register(k), in_register(b), in_register(r), in_register(a);
      for (int q = 0; q < K; q++) {
        float* at = S + j * H + slice + q * W;
        const V s = w * load<W>(at) + (k * v[q] + b * sa[q]);
        store<W>(at, s);
        y[q] += r * s;
        next[q] += a * s;
      }
    }
    for (int q = 0; q < K; q++) {
      store<W>(sa_row + slice + q * W, next[q]);
      store<W>(y_row + slice + q * W, y[q]);
    }
  }
}

// An Io gives and takes, besides `token` (a token's rows) and `fetch` (asks for them early):
// `output` of a token that was read, and `padding`, all that is to be done for a token that is none.
template <class Io>
void forward_head(Io& io, const Place& place, const float* state, float* final, float* sa,
                  float* checkpoints) {
  alignas(64) float S[H * H], sa_row[H] = {}, y_row[H];
  Token tokens[2];
  const auto skip = [&](int64_t from) {  // to the next token that is no padding
    while (from < place.T && place.flag(from) == kPadding) from++;
    return from;
  };
  if (state)
    transpose<H, W>(state + place.head * H * H, S);
  else
    memset(S, 0, sizeof S);
  int64_t next = skip(0);
  if (next < place.T) {
    io.token(place.at(next), tokens[0]);
    if (place.flag(next) != kFresh) look_up(S, tokens[0].a, sa_row);
  }
  int which = 0;
  for (int64_t t = 0; t < place.T; t++) {
    const size_t at = place.at(t);
    if (checkpoints && t % kCheckpoint == 0)
      memcpy(checkpoints + (place.head * place.stretches + t / kCheckpoint) * H * H, S, sizeof S);
    if (place.flag(t) == kPadding) {
      if (sa) clear(sa + at);
      io.padding(at);
      continue;
    }
    if (sa) copy(sa_row, sa + at);
    if (place.flag(t) == kFresh) memset(S, 0, sizeof S);
    next = skip(t + 1);
    if (next + 2 < place.T) io.fetch(place.at(next + 2));
    const Token& x = tokens[which];
    Token& ahead = tokens[which ^= 1];
    if (next < place.T)
      io.token(place.at(next), ahead);
    else
      clear(ahead.a);
    step(x, ahead.a, S, sa_row, y_row);
    // a fresh document finds nothing
    if (next < place.T && place.flag(next) == kFresh) clear(sa_row);
    io.output(at, x, y_row);
  }
  transpose<H, W>(S, final + place.head * H * H);
}

// From here on states are [value][key], and a slice is W rows of one: the rows of a state need
// nothing of each other but the sums over values, so that a stretch is walked slice by slice and the
// states of a slice that are made again stay near.

struct Sums {  // over values, per key
  alignas(64) float k[H], b[H], w[H], r[H], a[H];
};

template <class Io>
struct Stretch {  // what the backward pass holds of kCheckpoint tokens
  Token x[kCheckpoint];
  Sums sums[kCheckpoint];
  alignas(64) float sa[kCheckpoint][H], dy[kCheckpoint][H], dv[kCheckpoint][H], wr[kCheckpoint][H];
  typename Io::More more[kCheckpoint];
  float r_k[kCheckpoint], r_b[kCheckpoint];
  uint8_t kind[kCheckpoint];
  alignas(64) float start[H * H], remade[kCheckpoint][W * H];  // the first state; a slice's states
};

// A slice of the state after a token from the one before it, where S a is known; in place or not.
inline void advance(const Token& x, const float* sa, int first, const float* before, float* after) {
  for (int slice = 0; slice < H; slice += K * W) {
    V w[K], k[K], b[K];
    for (int q = 0; q < K; q++) {
      w[q] = load<W>(x.w + slice + q * W);
      k[q] = load<W>(x.k + slice + q * W);
      b[q] = load<W>(x.b + slice + q * W);
    }
    for (int i = 0; i < W; i++) {
      V v = splat<W>(x.v[first + i]), s = splat<W>(sa[first + i]);
      in_register(v), in_register(s);
      for (int q = 0; q < K; q++) {
        const int at = i * H + slice + q * W;
        store<W>(after + at, w[q] * load<W>(before + at) + (v * k[q] + s * b[q]));
      }
    }
  }
}

// Adds what a slice of D and P has to the sums over values, and gives its sums over keys.
inline void gather(const Token& x, int first, const float* D, const float* P, const float* sa,
                   const float* dy, Sums& sums, float* dv, float* dsa) {
  alignas(64) float dv_lanes[W * W], dsa_lanes[W * W];
  for (int slice = 0; slice < H; slice += K * W) {
    V sum_k[K], sum_b[K], sum_w[K], sum_r[K];
    for (int q = 0; q < K; q++) {
      sum_k[q] = load<W>(sums.k + slice + q * W);
      sum_b[q] = load<W>(sums.b + slice + q * W);
      sum_w[q] = load<W>(sums.w + slice + q * W);
      sum_r[q] = load<W>(sums.r + slice + q * W);
    }
    for (int i = 0; i < W; i++) {
      const int row = i * H + slice;
      V v = splat<W>(x.v[first + i]), s = splat<W>(sa[first + i]), d = splat<W>(dy[first + i]);
      in_register(v), in_register(s), in_register(d);
      V along_k = {}, along_b = {};
      for (int q = 0; q < K; q++) {
        const V g = load<W>(D + row + q * W), found = load<W>(P + row + q * W);
        sum_k[q] += v * g;
        sum_b[q] += s * g;
        sum_w[q] += g * found;
        sum_r[q] += d * found;
        along_k += load<W>(x.k + slice + q * W) * g;
        along_b += load<W>(x.b + slice + q * W) * g;
      }
      if (slice) along_k += load<W>(dv_lanes + i * W), along_b += load<W>(dsa_lanes + i * W);
      store<W>(dv_lanes + i * W, along_k);
      store<W>(dsa_lanes + i * W, along_b);
    }
    for (int q = 0; q < K; q++) {
      store<W>(sums.k + slice + q * W, sum_k[q]);
      store<W>(sums.b + slice + q * W, sum_b[q]);
      store<W>(sums.w + slice + q * W, sum_w[q]);
      store<W>(sums.r + slice + q * W, sum_r[q]);
    }
  }
  store<W>(dv, fold<W>(dv_lanes));
  store<W>(dsa, fold<W>(dsa_lanes));
}

// The slice of D becomes the gradient of the state before the token; adds to da.
inline void spread(const Token& x, const float* wr, int first, float* D, const float* P,
                   const float* dy, const float* dsa, Sums& sums) {
  for (int slice = 0; slice < H; slice += K * W) {
    V w[K], a[K], w_r[K], sum_a[K];
    for (int q = 0; q < K; q++) {
      w[q] = load<W>(x.w + slice + q * W);
      a[q] = load<W>(x.a + slice + q * W);
      w_r[q] = load<W>(wr + slice + q * W);
      sum_a[q] = load<W>(sums.a + slice + q * W);
    }
    for (int i = 0; i < W; i++) {
      V d = splat<W>(dy[first + i]), s = splat<W>(dsa[i]);
      in_register(d), in_register(s);
      for (int q = 0; q < K; q++) {
        const int at = i * H + slice + q * W;
        sum_a[q] += s * load<W>(P + at);
        store<W>(D + at, w[q] * load<W>(D + at) + (d * w_r[q] + s * a[q]));
      }
    }
    for (int q = 0; q < K; q++) store<W>(sums.a + slice + q * W, sum_a[q]);
  }
}

inline float dot(const float* x, const float* y) {
  V total = {};
  for (int q = 0; q < H; q += W) total += load<W>(x + q) * load<W>(y + q);
  return sum<W>(total);
}

// One slice of one token backwards: D is d loss / d S after the token, on return before it.
template <class Io>
inline void step_back(Stretch<Io>& m, int64_t i, int first, const float* P, float* D) {
  alignas(64) float dsa[W];
  float* dv = m.dv[i] + first;
  const V d = load<W>(m.dy[i] + first);
  gather(m.x[i], first, D, P, m.sa[i], m.dy[i], m.sums[i], dv, dsa);
  store<W>(dv, load<W>(dv) + d * m.r_k[i]);
  store<W>(dsa, load<W>(dsa) + d * m.r_b[i]);
  spread(m.x[i], m.wr[i], first, D, P, m.dy[i], dsa, m.sums[i]);
}

// One slice through the n tokens of a stretch: makes its states again, and walks them backwards.
// Meanwhile it asks for the places that the stretch will write, from `at` on.
template <class Io>
void slice_back(Io& io, Stretch<Io>& m, int64_t n, int first, float* D, size_t at, size_t stride) {
  alignas(64) static const float nothing[W * H] = {};
  const float* found[kCheckpoint + 1] = {m.start + first * H};
  for (int64_t i = 0; i < n; i++) {
    if (m.kind[i] == kFresh) found[i] = nothing;
    found[i + 1] = found[i];
    if (m.kind[i] == kPadding || i + 1 == n) continue;
    advance(m.x[i], m.sa[i], first, found[i], m.remade[i]);
    found[i + 1] = m.remade[i];
  }
  for (int64_t i = n - 1; i >= 0; i--) {
    io.fetch_back(at + i * stride + first);
    if (m.kind[i] == kPadding) continue;
    step_back(m, i, first, found[i], D);
    if (m.kind[i] == kFresh)
      for (int q = 0; q < W * H; q += W) store<W>(D + q, V{});
  }
}

// The sums of a token become the gradients of its rows: of r, decay's logarithm, k, a and b.
template <class Io>
inline void complete(Stretch<Io>& m, int64_t i) {
  const Token& x = m.x[i];
  Sums& sums = m.sums[i];
  const float dy_v = dot(m.dy[i], x.v), dy_sa = dot(m.dy[i], m.sa[i]);
  for (int q = 0; q < H; q += W) {
    const V r = load<W>(x.r + q), w = load<W>(x.w + q), read = load<W>(sums.r + q);
    store<W>(sums.k + q, load<W>(sums.k + q) + r * dy_v);
    store<W>(sums.b + q, load<W>(sums.b + q) + r * dy_sa);
    store<W>(sums.w + q, (load<W>(sums.w + q) + r * read) * w);
    store<W>(sums.r + q, w * read + (load<W>(x.k + q) * dy_v + load<W>(x.b + q) * dy_sa));
  }
}

template <class Io>
void read_stretch(Io& io, const Place& place, int64_t t0, int64_t n, const float* sa,
                  Stretch<Io>& m) {
  for (int64_t i = 0; i < n; i++) {
    const size_t at = place.at(t0 + i);
    m.kind[i] = place.flag(t0 + i);
    if (m.kind[i] == kPadding) continue;
    Token& x = m.x[i];
    io.token(at, x);
    io.gradient(at, x, m.dy[i], m.more[i]);
    copy(sa + at, m.sa[i]);
    for (int q = 0; q < H; q += W) store<W>(m.wr[i] + q, load<W>(x.w + q) * load<W>(x.r + q));
    m.r_k[i] = dot(x.r, x.k), m.r_b[i] = dot(x.r, x.b);
    for (float* sum : {m.sums[i].k, m.sums[i].b, m.sums[i].w, m.sums[i].r, m.sums[i].a}) clear(sum);
  }
}

// Backwards an Io gives `gradient`, that of y, and takes the gradients of a token (`gradients`) with
// what it kept of it in `more`; `fetch_back` asks for where they go, `padding_back` does all there is
// to do for padding.
template <class Io>
void backward_head(Io& io, const Place& place, const float* sa, const float* checkpoints,
                   const float* d_final, float* d_state, Stretch<Io>& m) {
  alignas(64) float D[H * H];
  memcpy(D, d_final + place.head * H * H, sizeof D);
  for (int64_t c = place.stretches - 1; c >= 0; c--) {
    const int64_t t0 = c * kCheckpoint, left = place.T - t0;
    const int64_t n = left < kCheckpoint ? left : kCheckpoint;
    transpose<H, W>(checkpoints + (place.head * place.stretches + c) * H * H, m.start);
    read_stretch(io, place, t0, n, sa, m);
    for (int first = 0; first < H; first += W)
      slice_back(io, m, n, first, D + first * H, place.at(t0), place.stride);
    for (int64_t i = 0; i < n; i++) {
      const size_t at = place.at(t0 + i);
      if (m.kind[i] == kPadding) {
        io.padding_back(at);
        continue;
      }
      complete(m, i);
      io.gradients(at, m.x[i], m.sums[i], m.dv[i], m.more[i]);
    }
  }
  memcpy(d_state + place.head * H * H, D, sizeof D);
}

// Runs `job(head, stretch)` for every head, each thread with a Stretch of its own; 1 where there is
// no memory for one, else 0.
template <class Io, typename Job>
int over_heads_back(int64_t heads, int threads, const Job& job) {
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(Stretch<Io>))) {
#pragma omp atomic write
      failed = 1;
      memory = nullptr;
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < heads; head++)
      if (memory) job(head, *static_cast<Stretch<Io>*>(memory));
    free(memory);
  }
  return failed;
}

}  // namespace
