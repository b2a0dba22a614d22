// WKV-7 on a CPU, forward and backward, one head after the other with its state in L1.
//
//   S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T        y_t = S_t r_t        w = exp(log_decay)
//
// Inside, the state is kept as [key][value] (the transpose of what the caller sees), so that every
// update runs over whole vectors of values with one key's scalars broadcast:
//
//   row_j <- w_j row_j + b_j sa + k_j v       sa = sum_j a_j row_j (before)       y = sum_j r_j row_j
//
// The backward pass reads the state saved at every kCheckpoint-th token, makes the states of that
// stretch again, and walks it backwards: memory grows by H / kCheckpoint floats per input element.
//
// Vectors are the compiler's own vector type; it splits them to what the machine has. Tensors are
// [B, T, N, H], contiguous, each in fp32 or bf16; states are [B, N, H, H] as [value][key] in fp32.
// flags[b, t]: 0 an ordinary token, 1 the first of a document, 2 padding.
//
// One library holds one head width: -DHEAD_DIM=64, a multiple of 4.

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kCheckpoint = 32;
enum Flag : uint8_t { kToken = 0, kFresh = 1, kPadding = 2 };

struct Row {  // where a [B, T, N, H] tensor lies, and in which of the two types
  char* data;
  int bf16;
};

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  typedef int index __attribute__((vector_size(W * sizeof(int))));
};

inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <int H>
inline void read(const Row& row, size_t at, float* out) {
  if (row.bf16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(row.data) + at;
    for (int i = 0; i < H; i++) out[i] = from_bf16(p[i]);
  } else {
    memcpy(out, reinterpret_cast<const float*>(row.data) + at, H * sizeof(float));
  }
}

template <int H>
inline void write(const Row& row, size_t at, const float* in) {
  if (row.bf16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(row.data) + at;
    for (int i = 0; i < H; i++) p[i] = to_bf16(in[i]);
  } else {
    memcpy(reinterpret_cast<float*>(row.data) + at, in, H * sizeof(float));
  }
}

// exp on [-1, 0]: Taylor around -1/2 to the 9th power, relative error below 1e-8
template <int H>
inline void decay(const float* log_decay, float* w) {
  constexpr float c[10] = {1.f,        1.f,         1.f / 2,    1.f / 6,     1.f / 24,
                           1.f / 120,  1.f / 720,   1.f / 5040, 1.f / 40320, 1.f / 362880};
  for (int i = 0; i < H; i++) {
    float x = log_decay[i] + 0.5f, p = c[9];
    for (int n = 8; n >= 0; n--) p = p * x + c[n];
    w[i] = p * 0.60653065971263342f;
  }
}

template <int H>
inline void transpose(const float* in, float* out) {
  for (int i = 0; i < H; i++)
    for (int j = 0; j < H; j++) out[j * H + i] = in[i * H + j];
}

// The widest vector that divides a head, and how many of them a head is.
template <int H>
struct Shape {
  static constexpr int W = H % 16 == 0 ? 16 : (H % 8 == 0 ? 8 : 4);
  static constexpr int Q = H / W;
  typedef typename Vector<W>::type V;
};

template <int W>
inline typename Vector<W>::type load(const float* p) {
  return *reinterpret_cast<const typename Vector<W>::type*>(p);
}

template <int W>
inline void store(float* p, typename Vector<W>::type x) {
  *reinterpret_cast<typename Vector<W>::type*>(p) = x;
}

// Lane j of the result is the sum of all lanes of the j-th of W vectors: halve by pairwise adds.
template <int W, int N>
struct Fold {
  typedef typename Vector<W>::type V;
  static inline V run(const float* p) {
    return add_pairs(Fold<W, N / 2>::run(p), Fold<W, N / 2>::run(p + N / 2 * W));
  }
  static inline V add_pairs(V x, V y) {
#if defined(__clang__)
    V even, odd;
    for (int i = 0; i < W / 2; i++) {
      even[i] = x[2 * i], odd[i] = x[2 * i + 1];
      even[i + W / 2] = y[2 * i], odd[i + W / 2] = y[2 * i + 1];
    }
    return even + odd;
#else
    typename Vector<W>::index even, odd;
    for (int i = 0; i < W; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, odd);
#endif
  }
};
template <int W>
struct Fold<W, 1> {
  static inline typename Vector<W>::type run(const float* p) { return load<W>(p); }
};

template <int H>
struct Token {  // one token's rows, widened to fp32
  alignas(64) float r[H], w[H], k[H], v[H], a[H], b[H];
};

struct Problem {
  Row r, log_decay, k, v, a, b;
  const uint8_t* flags;
  int64_t B, T, N;
};

template <int H>
inline void read_token(const Problem& p, size_t at, Token<H>& x) {
  alignas(64) float g[H];
  read<H>(p.r, at, x.r);
  read<H>(p.log_decay, at, g);
  read<H>(p.k, at, x.k);
  read<H>(p.v, at, x.v);
  read<H>(p.a, at, x.a);
  read<H>(p.b, at, x.b);
  decay<H>(g, x.w);
}

// S a, what the delta rule reads before it writes.
template <int H>
inline void look_up(const float* S, const float* a, float* sa_out) {
  constexpr int W = Shape<H>::W, Q = Shape<H>::Q;
  typename Shape<H>::V sa[Q] = {};
  for (int j = 0; j < H; j++)
    for (int q = 0; q < Q; q++) sa[q] += a[j] * load<W>(S + j * H + q * W);
  for (int q = 0; q < Q; q++) store<W>(sa_out + q * W, sa[q]);
}

// S <- the state after this token; y = S r. `sa` comes in as S a of this token and leaves as that
// of the next one, whose a is looked up in the same pass over the state.
template <int H>
inline void step(const Token<H>& x, const float* next_a, float* S, float* sa_row, float* y_row) {
  constexpr int W = Shape<H>::W, Q = Shape<H>::Q;
  typedef typename Shape<H>::V V;
  V sa[Q], next[Q], y[Q], v[Q];
  for (int q = 0; q < Q; q++) {
    next[q] = y[q] = V{};
    sa[q] = load<W>(sa_row + q * W);
    v[q] = load<W>(x.v + q * W);
  }
  for (int j = 0; j < H; j++)
    for (int q = 0; q < Q; q++) {
      float* at = S + j * H + q * W;
      const V s = x.w[j] * load<W>(at) + x.k[j] * v[q] + x.b[j] * sa[q];
      store<W>(at, s);
      y[q] += x.r[j] * s;
      next[q] += next_a[j] * s;
    }
  for (int q = 0; q < Q; q++) {
    store<W>(sa_row + q * W, next[q]);
    store<W>(y_row + q * W, y[q]);
  }
}

// The state after a token from the one before it, where S a is known.
template <int H>
inline void advance(const Token<H>& x, const float* sa_row, const float* before, float* after) {
  constexpr int W = Shape<H>::W, Q = Shape<H>::Q;
  typename Shape<H>::V sa[Q], v[Q];
  for (int q = 0; q < Q; q++) sa[q] = load<W>(sa_row + q * W), v[q] = load<W>(x.v + q * W);
  for (int j = 0; j < H; j++)
    for (int q = 0; q < Q; q++) {
      const int at = j * H + q * W;
      store<W>(after + at, x.w[j] * load<W>(before + at) + x.k[j] * v[q] + x.b[j] * sa[q]);
    }
}

template <int H>
void forward_head(const Problem& p, int64_t head, const float* state, const Row& y, float* final,
                  float* sa, float* checkpoints) {
  const int64_t b = head / p.N, stretches = (p.T + kCheckpoint - 1) / kCheckpoint;
  const size_t stride = size_t(p.N) * H, start = size_t(b) * p.T * stride + size_t(head % p.N) * H;
  const auto flag = [&](int64_t t) { return p.flags ? p.flags[b * p.T + t] : uint8_t(kToken); };
  alignas(64) float S[H * H], sa_row[H] = {}, y_row[H], nothing[H] = {};
  Token<H> tokens[2];
  int64_t t = 0, next = 0;  // the token at hand, and the one after it that is no padding
  const auto skip = [&](int64_t from) {
    while (from < p.T && flag(from) == kPadding) from++;
    return from;
  };
  if (state)
    transpose<H>(state + head * H * H, S);
  else
    memset(S, 0, sizeof S);
  next = skip(0);
  if (next < p.T) {
    read_token<H>(p, start + next * stride, tokens[0]);
    if (flag(next) != kFresh) look_up<H>(S, tokens[0].a, sa_row);
  }
  for (int which = 0; t < p.T; t++) {
    const size_t at = start + t * stride;
    if (checkpoints && t % kCheckpoint == 0)
      memcpy(checkpoints + (head * stretches + t / kCheckpoint) * H * H, S, sizeof S);
    if (flag(t) == kPadding) {
      if (sa) memset(sa + at, 0, sizeof nothing);
      write<H>(y, at, nothing);
      continue;
    }
    if (sa) memcpy(sa + at, sa_row, sizeof sa_row);
    if (flag(t) == kFresh) memset(S, 0, sizeof S);
    next = skip(t + 1);
    const Token<H>& x = tokens[which];
    Token<H>& ahead = tokens[which ^= 1];
    if (next < p.T)
      read_token<H>(p, start + next * stride, ahead);
    else
      memset(ahead.a, 0, sizeof ahead.a);
    step<H>(x, ahead.a, S, sa_row, y_row);
    // a fresh document finds nothing
    if (next < p.T && flag(next) == kFresh) memset(sa_row, 0, sizeof sa_row);
    write<H>(y, at, y_row);
  }
  transpose<H>(S, final + head * H * H);
}

template <int H>
struct Gradients {  // one token's, in fp32; partial sums before the lanes are folded
  static constexpr int W = Shape<H>::W;
  alignas(64) float r[H * W], w[H * W], k[H * W], a[H * W], b[H * W], v[H];
};

// One token backwards: D is d loss / d S after the token, on return before it.
template <int H>
inline void step_back(const Token<H>& x, const float* before, const float* after, const float* sa_row,
                      const float* dy_row, float* D, Gradients<H>& d) {
  constexpr int W = Shape<H>::W, Q = Shape<H>::Q;
  typedef typename Shape<H>::V V;
  V v[Q], sa[Q], dy[Q], dv[Q], dsa[Q];
  for (int q = 0; q < Q; q++) {
    v[q] = load<W>(x.v + q * W);
    sa[q] = load<W>(sa_row + q * W);
    dy[q] = load<W>(dy_row + q * W);
    dv[q] = dsa[q] = V{};
  }
  for (int j = 0; j < H; j++) {
    V dr = {}, dk = {}, db = {}, dw = {};
    for (int q = 0; q < Q; q++) {
      const int at = j * H + q * W;
      V g = load<W>(D + at) + x.r[j] * dy[q];
      store<W>(D + at, g);
      dr += load<W>(after + at) * dy[q];
      dk += g * v[q];
      db += g * sa[q];
      dw += g * load<W>(before + at);
      dv[q] += x.k[j] * g;
      dsa[q] += x.b[j] * g;
    }
    store<W>(d.r + j * W, dr);
    store<W>(d.k + j * W, dk);
    store<W>(d.b + j * W, db);
    store<W>(d.w + j * W, dw);
  }
  for (int j = 0; j < H; j++) {
    V da = {};
    for (int q = 0; q < Q; q++) {
      const int at = j * H + q * W;
      da += load<W>(before + at) * dsa[q];
      store<W>(D + at, x.w[j] * load<W>(D + at) + x.a[j] * dsa[q]);
    }
    store<W>(d.a + j * W, da);
  }
  for (int q = 0; q < Q; q++) store<W>(d.v + q * W, dv[q]);
}

template <int H>
inline void fold(const float* partial, float* sums) {
  constexpr int W = Shape<H>::W;
  for (int j = 0; j < H; j += W) store<W>(sums + j, Fold<W, W>::run(partial + j * W));
}

struct Outputs {
  Row r, log_decay, k, v, a, b;
};

template <int H>
inline void write_gradients(const Outputs& out, size_t at, const Token<H>& x, const Gradients<H>& d) {
  alignas(64) float row[H];
  fold<H>(d.r, row);
  write<H>(out.r, at, row);
  fold<H>(d.w, row);
  for (int j = 0; j < H; j++) row[j] *= x.w[j];
  write<H>(out.log_decay, at, row);
  fold<H>(d.k, row);
  write<H>(out.k, at, row);
  fold<H>(d.a, row);
  write<H>(out.a, at, row);
  fold<H>(d.b, row);
  write<H>(out.b, at, row);
  write<H>(out.v, at, d.v);
}

template <int H>
void backward_head(const Problem& p, int64_t head, const float* sa, const float* checkpoints,
                   const Row& dy, const float* d_final, const Outputs& out, float* d_state,
                   float* states) {
  const int64_t b = head / p.N, stretches = (p.T + kCheckpoint - 1) / kCheckpoint;
  const size_t stride = size_t(p.N) * H, start = size_t(b) * p.T * stride + size_t(head % p.N) * H;
  const auto flag = [&](int64_t t) { return p.flags ? p.flags[b * p.T + t] : uint8_t(kToken); };
  alignas(64) float D[H * H], nothing[H * H] = {}, dy_row[H];
  const Row rows[] = {out.r, out.log_decay, out.k, out.v, out.a, out.b};
  Token<H> x;
  Gradients<H> d;
  transpose<H>(d_final + head * H * H, D);
  for (int64_t c = stretches - 1; c >= 0; c--) {
    const int64_t t0 = c * kCheckpoint, n = p.T - t0 < kCheckpoint ? p.T - t0 : kCheckpoint;
    // states[i] is the state that token t0 + i finds, states[i + 1] the one it leaves
    memcpy(states, checkpoints + (head * stretches + c) * H * H, sizeof D);
    for (int64_t i = 0; i < n; i++) {
      const size_t at = start + (t0 + i) * stride;
      const float* found = states + i * H * H;
      float* left = states + (i + 1) * H * H;
      if (flag(t0 + i) == kPadding) {
        memcpy(left, found, sizeof D);
        continue;
      }
      read_token<H>(p, at, x);
      advance<H>(x, sa + at, flag(t0 + i) == kFresh ? nothing : found, left);
    }
    for (int64_t i = n - 1; i >= 0; i--) {
      const size_t at = start + (t0 + i) * stride;
      if (flag(t0 + i) == kPadding) {
        for (const Row& row : rows) write<H>(row, at, nothing);
        continue;
      }
      read_token<H>(p, at, x);
      read<H>(dy, at, dy_row);
      const float* found = states + i * H * H;
      const bool fresh = flag(t0 + i) == kFresh;
      step_back<H>(x, fresh ? nothing : found, found + H * H, sa + at, dy_row, D, d);
      write_gradients<H>(out, at, x, d);
      if (fresh) memset(D, 0, sizeof D);
    }
  }
  transpose<H>(D, d_state + head * H * H);
}

template <int H>
void forward_all(const Problem& p, const float* state, const Row& y, float* final, float* sa,
                 float* checkpoints, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < p.B * p.N; head++)
    forward_head<H>(p, head, state, y, final, sa, checkpoints);
}

template <int H>
int backward_all(const Problem& p, const float* sa, const float* checkpoints, const Row& dy,
                 const float* d_final, const Outputs& out, float* d_state, int threads) {
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    void* memory = nullptr;
    const size_t bytes = size_t(kCheckpoint + 1) * H * H * sizeof(float);
    if (posix_memalign(&memory, 64, bytes)) {
#pragma omp atomic write
      failed = 1;
      memory = nullptr;
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < p.B * p.N; head++)
      if (memory)
        backward_head<H>(p, head, sa, checkpoints, dy, d_final, out, d_state,
                         static_cast<float*>(memory));
    free(memory);
  }
  return failed;
}

}  // namespace

extern "C" {

int wkv7_checkpoint() { return kCheckpoint; }

void wkv7_forward(void* const* inputs, const int* bf16, const uint8_t* flags, const float* state,
                  void* y, int y_bf16, float* final, float* sa, float* checkpoints, int64_t B,
                  int64_t T, int64_t N, int threads) {
  const auto row = [&](int i) { return Row{static_cast<char*>(inputs[i]), bf16[i]}; };
  const Problem p{row(0), row(1), row(2), row(3), row(4), row(5), flags, B, T, N};
  forward_all<HEAD_DIM>(p, state, Row{static_cast<char*>(y), y_bf16}, final, sa, checkpoints,
                        threads);
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
  return backward_all<HEAD_DIM>(p, sa, checkpoints, Row{static_cast<char*>(dy), dy_bf16}, d_final,
                                out, d_state, threads);
}
}
