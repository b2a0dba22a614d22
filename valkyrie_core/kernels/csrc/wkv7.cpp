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
// Tensors are [B, T, N, H], contiguous, each in fp32 or bf16; states are [B, N, H, H] as
// [value][key] in fp32. flags[b, t]: 0 an ordinary token, 1 the first of a document, 2 padding.
//
// One library holds one head width: -DHEAD_DIM=64, a multiple of 4.

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

struct Problem {
  Row r, log_decay, k, v, a, b;
  const uint8_t* flags;
  int64_t B, T, N;
};

// Where one head of one batch row lies.
struct Place {
  int64_t batch, stretches;
  size_t stride, start;
  Place(const Problem& p, int64_t head)
      : batch(head / p.N),
        stretches((p.T + kCheckpoint - 1) / kCheckpoint),
        stride(size_t(p.N) * H),
        start(size_t(batch) * p.T * stride + size_t(head % p.N) * H) {}
  size_t at(int64_t t) const { return start + t * stride; }
};

inline uint8_t flag(const Problem& p, const Place& place, int64_t t) {
  return p.flags ? p.flags[place.batch * p.T + t] : uint8_t(kToken);
}

inline void read_token(const Problem& p, size_t at, Token& x) {
  alignas(64) float g[H];
  read(p.r, at, x.r);
  read(p.log_decay, at, g);
  read(p.k, at, x.k);
  read(p.v, at, x.v);
  read(p.a, at, x.a);
  read(p.b, at, x.b);
  decay(g, x.w);
}

inline void fetch_token(const Problem& p, size_t at) {
  for (int q = 0; q < H; q += W)
    for (const Row* row : {&p.r, &p.log_decay, &p.k, &p.v, &p.a, &p.b}) fetch<0>(*row, at + q);
}

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

void forward_head(const Problem& p, int64_t head, const float* state, const Row& y, float* final,
                  float* sa, float* checkpoints) {
  const Place place(p, head);
  alignas(64) float S[H * H], sa_row[H] = {}, y_row[H], nothing[H] = {};
  Token tokens[2];
  const auto skip = [&](int64_t from) {  // to the next token that is no padding
    while (from < p.T && flag(p, place, from) == kPadding) from++;
    return from;
  };
  if (state)
    transpose<H, W>(state + head * H * H, S);
  else
    memset(S, 0, sizeof S);
  int64_t next = skip(0);
  if (next < p.T) {
    read_token(p, place.at(next), tokens[0]);
    if (flag(p, place, next) != kFresh) look_up(S, tokens[0].a, sa_row);
  }
  int which = 0;
  for (int64_t t = 0; t < p.T; t++) {
    const size_t at = place.at(t);
    if (checkpoints && t % kCheckpoint == 0)
      memcpy(checkpoints + (head * place.stretches + t / kCheckpoint) * H * H, S, sizeof S);
    if (flag(p, place, t) == kPadding) {
      if (sa) clear(sa + at);
      write(y, at, nothing);
      continue;
    }
    if (sa) copy(sa_row, sa + at);
    if (flag(p, place, t) == kFresh) memset(S, 0, sizeof S);
    next = skip(t + 1);
    if (next + 2 < p.T) fetch_token(p, place.at(next + 2));
    for (int q = 0; q < H && t + 1 < p.T; q += W) fetch<1>(y, place.at(t + 1) + q);
    const Token& x = tokens[which];
    Token& ahead = tokens[which ^= 1];
    if (next < p.T)
      read_token(p, place.at(next), ahead);
    else
      clear(ahead.a);
    step(x, ahead.a, S, sa_row, y_row);
    // a fresh document finds nothing
    if (next < p.T && flag(p, place, next) == kFresh) clear(sa_row);
    write(y, at, y_row);
  }
  transpose<H, W>(S, final + head * H * H);
}

// From here on states are [value][key], and a slice is W rows of one: the rows of a state need
// nothing of each other but the sums over values, so that a stretch is walked slice by slice and the
// states of a slice that are made again stay near.

struct Outputs {
  Row r, log_decay, k, v, a, b;
};

struct Sums {  // over values, per key
  alignas(64) float k[H], b[H], w[H], r[H], a[H];
};

struct Stretch {  // what the backward pass holds of kCheckpoint tokens
  Token x[kCheckpoint];
  Sums sums[kCheckpoint];
  alignas(64) float sa[kCheckpoint][H], dy[kCheckpoint][H], dv[kCheckpoint][H], wr[kCheckpoint][H];
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
inline void step_back(Stretch& m, int64_t i, int first, const float* P, float* D) {
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
void slice_back(Stretch& m, int64_t n, int first, float* D, const Outputs& out, size_t at,
                size_t stride) {
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
    for (const Row* row : {&out.r, &out.log_decay, &out.k, &out.v, &out.a, &out.b})
      fetch<1>(*row, at + i * stride + first);
    if (m.kind[i] == kPadding) continue;
    step_back(m, i, first, found[i], D);
    if (m.kind[i] == kFresh)
      for (int q = 0; q < W * H; q += W) store<W>(D + q, V{});
  }
}

// Of one token, the gradients from its sums, completed by what the products of rows add.
inline void write_gradients(Stretch& m, int64_t i, size_t at, const Outputs& out) {
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
  write(out.r, at, sums.r);
  write(out.log_decay, at, sums.w);
  write(out.k, at, sums.k);
  write(out.v, at, m.dv[i]);
  write(out.a, at, sums.a);
  write(out.b, at, sums.b);
}

inline void read_stretch(const Problem& p, const Place& place, int64_t t0, int64_t n,
                         const float* sa, const Row& dy, Stretch& m) {
  for (int64_t i = 0; i < n; i++) {
    const size_t at = place.at(t0 + i);
    m.kind[i] = flag(p, place, t0 + i);
    if (m.kind[i] == kPadding) continue;
    Token& x = m.x[i];
    read_token(p, at, x);
    read(dy, at, m.dy[i]);
    copy(sa + at, m.sa[i]);
    for (int q = 0; q < H; q += W) store<W>(m.wr[i] + q, load<W>(x.w + q) * load<W>(x.r + q));
    m.r_k[i] = dot(x.r, x.k), m.r_b[i] = dot(x.r, x.b);
    for (float* sum : {m.sums[i].k, m.sums[i].b, m.sums[i].w, m.sums[i].r, m.sums[i].a}) clear(sum);
  }
}

void backward_head(const Problem& p, int64_t head, const float* sa, const float* checkpoints,
                   const Row& dy, const float* d_final, const Outputs& out, float* d_state,
                   Stretch& m) {
  const Place place(p, head);
  alignas(64) float D[H * H], nothing[H] = {};
  const Row rows[] = {out.r, out.log_decay, out.k, out.v, out.a, out.b};
  memcpy(D, d_final + head * H * H, sizeof D);
  for (int64_t c = place.stretches - 1; c >= 0; c--) {
    const int64_t t0 = c * kCheckpoint, n = p.T - t0 < kCheckpoint ? p.T - t0 : kCheckpoint;
    transpose<H, W>(checkpoints + (head * place.stretches + c) * H * H, m.start);
    read_stretch(p, place, t0, n, sa, dy, m);
    for (int first = 0; first < H; first += W)
      slice_back(m, n, first, D + first * H, out, place.at(t0), place.stride);
    for (int64_t i = 0; i < n; i++) {
      const size_t at = place.at(t0 + i);
      if (m.kind[i] != kPadding)
        write_gradients(m, i, at, out);
      else
        for (const Row& row : rows) write(row, at, nothing);
    }
  }
  memcpy(d_state + head * H * H, D, sizeof D);
}

}  // namespace

extern "C" {

int wkv7_checkpoint() { return kCheckpoint; }

void wkv7_forward(void* const* inputs, const int* bf16, const uint8_t* flags, const float* state,
                  void* y, int y_bf16, float* final, float* sa, float* checkpoints, int64_t B,
                  int64_t T, int64_t N, int threads) {
  const auto row = [&](int i) { return Row{static_cast<char*>(inputs[i]), bf16[i]}; };
  const Problem p{row(0), row(1), row(2), row(3), row(4), row(5), flags, B, T, N};
  const Row out{static_cast<char*>(y), y_bf16};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < B * N; head++)
    forward_head(p, head, state, out, final, sa, checkpoints);
}

// returns 0, or 1 where memory ran out
int wkv7_backward(void* const* inputs, const int* bf16, const uint8_t* flags, const float* sa,
                  const float* checkpoints, void* dy, int dy_bf16, const float* d_final,
                  void* const* grads, float* d_state, int64_t B, int64_t T, int64_t N,
                  int threads) {
  const auto row = [&](void* const* from, int i) {
    return Row{static_cast<char*>(from[i]), bf16[i]};
  };
  const Problem p{row(inputs, 0), row(inputs, 1), row(inputs, 2), row(inputs, 3),
                  row(inputs, 4), row(inputs, 5), flags, B, T, N};
  const Outputs out{row(grads, 0), row(grads, 1), row(grads, 2),
                    row(grads, 3), row(grads, 4), row(grads, 5)};
  const Row d_out{static_cast<char*>(dy), dy_bf16};
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(Stretch))) {
#pragma omp atomic write
      failed = 1;
      memory = nullptr;
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < B * N; head++)
      if (memory)
        backward_head(p, head, sa, checkpoints, d_out, d_final, out, d_state,
                      *static_cast<Stretch*>(memory));
    free(memory);
  }
  return failed;
}
}
