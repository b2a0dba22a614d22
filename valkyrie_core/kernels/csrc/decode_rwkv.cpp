// One token through RWKV-7's time mix and channel mix (nn/rwkv.py says what they are), norm and
// residual included, for up to 8 rows.
//
// Time mix, in three phases with a barrier between:
//   rows of r, k, v and of the low-rank maps' first factors       shared among threads by row
//   per head: second factors, WKV-7, group norm, bonus, gate      shared by head
//   rows of the output matrix, plus x                             shared by row

#include "decode.h"

using namespace decode;

namespace {

constexpr float kDecayScale = 0.60653065971263342f;  // exp(-1/2)
constexpr float kGroupNormEps = 64e-5f;

struct TimeMix {
  int32_t dim, heads, head_dim, layer_has_residual, is_signed;
  Norm norm;
  const float* mix[6];  // x_r, x_w, x_k, x_v, x_a, x_g, padded to whole groups
  Matrix receptance, key, value, output;
  // the second factors hold every head padded to whole groups of rows
  Matrix w1, a1, v1, g1, w2, a2, v2, g2;
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *gain, *bias;  // [D]
};

struct ChannelMix {
  int32_t dim, hidden;
  Norm norm;
  const float* mix;
  Matrix key, value;
};

enum Mixed { kR, kW, kK, kV, kA, kG, kMixed };

// Memory that all threads share.
struct TimeMixShared {
  Rows r, k, v, w, a, mixed_v, g;
  Source z;
  TimeMixShared(const TimeMix& m, Scratch& s, int B)
      : r(s, B, m.dim), k(s, B, m.dim), v(s, B, m.dim), w(s, B, m.w1.rows), a(s, B, m.a1.rows),
        mixed_v(s, B, m.v1.rows), g(s, B, m.g1.rows), z(s, B, m.dim) {}
};

struct HeadBuffers {
  float *w, *kk, *b, *k, *v, *y, *wr, *part;
  HeadBuffers(Scratch& s, int64_t H)
      : w(s.take<float>(H)), kk(s.take<float>(H)), b(s.take<float>(H)), k(s.take<float>(H)),
        v(s.take<float>(H)), y(s.take<float>(H)), wr(s.take<float>(H)), part(s.take<float>(512)) {}
};

// Memory of one thread.
struct TimeMixOwn {
  Rows normed;
  Source r, w, k, v, a, g;
  Source w_in, a_in, v_in, g_in;
  Rows decay, rate, residual, gate;
  HeadBuffers head;
  int16_t* z_rounded;
  TimeMixOwn(const TimeMix& m, Scratch& s, int B)
      : normed(s, B, m.dim), r(s, B, m.dim), w(s, B, m.dim), k(s, B, m.dim), v(s, B, m.dim),
        a(s, B, m.dim), g(s, B, m.dim), w_in(s, B, m.w1.rows), a_in(s, B, m.a1.rows),
        v_in(s, B, m.v1.rows), g_in(s, B, m.g1.rows), decay(s, B, m.head_dim),
        rate(s, B, m.head_dim), residual(s, B, m.head_dim), gate(s, B, m.head_dim),
        head(s, m.head_dim), z_rounded(s.take<int16_t>(B * padded(m.dim))) {}
};

// x + (last - x) * mix, for one row padded to whole groups
inline void blend(const float* x, const float* last, const float* mix, int64_t D, float* out) {
  const int64_t whole = D / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec<kLanes> now = load<kLanes>(x + i);
    store<kLanes>(out + i, now + (load<kLanes>(last + i) - now) * load<kLanes>(mix + i));
  }
  for (int64_t i = whole; i < padded(D); i++)
    out[i] = i < D ? x[i] + (last[i] - x[i]) * mix[i] : 0.f;
}

template <int W>
inline float head_dot(const float* x, const float* y, int64_t H) {
  Vec<W> sum_{};
  for (int64_t i = 0; i < H; i += W) sum_ += load<W>(x + i) * load<W>(y + i);
  return sum<W>(sum_);
}

// S' = S diag(w) - (S kk) b^T + v k^T and y = S' r for one head, S as [value][key]. Both products
// with S come from one reading of it: S' r = S (w r) - (S kk) (b r) + v (k r).
template <int W>
inline void wkv(int64_t H, const float* in, float* out, const float* r, const HeadBuffers& h) {
  const float br = head_dot<W>(h.b, r, H), kr = head_dot<W>(h.k, r, H);
  for (int64_t j = 0; j < H; j += W) store<W>(h.wr + j, load<W>(h.w + j) * load<W>(r + j));
  float* part_kk = h.part;
  float* part_r = h.part + W * W;
  for (int64_t i0 = 0; i0 < H; i0 += W) {
    for (int i = 0; i < W; i++) {
      const float* row = in + (i0 + i) * H;
      Vec<W> kk{}, wr{};
      for (int64_t j = 0; j < H; j += W) {
        const Vec<W> s = load<W>(row + j);
        kk += s * load<W>(h.kk + j);
        wr += s * load<W>(h.wr + j);
      }
      store<W>(part_kk + i * W, kk);
      store<W>(part_r + i * W, wr);
    }
    const Vec<W> removed = -fold<W>(part_kk);
    store<W>(h.y + i0, fold<W>(part_r) + removed * br + load<W>(h.v + i0) * kr);
    alignas(64) float take[W];
    store<W>(take, removed);
    for (int i = 0; i < W; i++) {
      const float* row = in + (i0 + i) * H;
      float* next = out + (i0 + i) * H;
      const Vec<W> a = splat<W>(take[i]), v = splat<W>(h.v[i0 + i]);
      for (int64_t j = 0; j < H; j += W)
        store<W>(next + j, load<W>(row + j) * load<W>(h.w + j) + a * load<W>(h.b + j) +
                               v * load<W>(h.k + j));
    }
  }
}

// One head of one row, from the raw r, k, v and the second factors' products to the gated output.
template <int W>
inline void head(const TimeMix& m, int n, const float* r, const float* k, const float* v,
                 const float* v_first, const float* decay, const float* rate_in,
                 const float* residual, const float* gate, const float* in, float* out,
                 const HeadBuffers& h, float* z) {
  const int64_t H = m.head_dim, at = n * H;
  Vec<W> squares{};
  for (int64_t j = 0; j < H; j += W) {
    const Vec<W> w = sigmoid<W>(load<W>(m.w0 + at + j) + load<W>(decay + j));
    store<W>(h.w + j, exp<W>(w * -kDecayScale));
    const Vec<W> kk = load<W>(k + j) * load<W>(m.k_k + at + j);
    store<W>(h.kk + j, kk);
    squares += kk * kk;
    Vec<W> value = load<W>(v + j);
    if (v_first) {
      const Vec<W> share_ = sigmoid<W>(load<W>(m.v0 + at + j) + load<W>(residual + j));
      value += (load<W>(v_first + j) - value) * share_;
    }
    store<W>(h.v + j, value);
  }
  const float length = std::sqrt(sum<W>(squares));
  const float inverse = 1.f / (length > 1e-12f ? length : 1e-12f);
  for (int64_t j = 0; j < H; j += W) {
    const Vec<W> rate = sigmoid<W>(load<W>(m.a0 + at + j) + load<W>(rate_in + j));
    const Vec<W> kk = load<W>(h.kk + j) * inverse;
    store<W>(h.kk + j, kk);
    store<W>(h.b + j, m.is_signed ? kk * rate * (1.f + load<W>(h.w + j)) : kk * rate);
    store<W>(h.k + j, load<W>(k + j) * (1.f + (rate - 1.f) * load<W>(m.k_a + at + j)));
  }
  wkv<W>(H, in, out, r, h);
  Vec<W> mean{}, bonus{}, variance{};
  for (int64_t j = 0; j < H; j += W) {
    mean += load<W>(h.y + j);
    bonus += load<W>(r + j) * load<W>(h.k + j) * load<W>(m.r_k + at + j);
  }
  const float middle = sum<W>(mean) / H, extra = sum<W>(bonus);
  for (int64_t j = 0; j < H; j += W) {
    const Vec<W> y = load<W>(h.y + j) - middle;
    variance += y * y;
  }
  const float scale = 1.f / std::sqrt(sum<W>(variance) / H + kGroupNormEps);
  for (int64_t j = 0; j < H; j += W) {
    const Vec<W> y = (load<W>(h.y + j) - middle) * scale * load<W>(m.gain + at + j) +
                     load<W>(m.bias + at + j) + load<W>(h.v + j) * extra;
    store<W>(z + j, y * load<W>(gate + j));
  }
}

struct Job {
  const Matrix* matrix;
  const Source* source;
  const Rows* out;
};

inline void first_phase(const TimeMix& m, const TimeMixOwn& own, const TimeMixShared& all, int B,
                        int thread, int threads) {
  const Job jobs[] = {{&m.receptance, &own.r, &all.r}, {&m.key, &own.k, &all.k},
                      {&m.value, &own.v, &all.v},      {&m.w1, &own.w, &all.w},
                      {&m.a1, &own.a, &all.a},         {&m.g1, &own.g, &all.g},
                      {&m.v1, &own.v, &all.mixed_v}};
  int count = 0, before = 0;
  for (const Job& job : jobs) count += matvec::groups(*job.matrix);
  const Share mine = share(count, thread, threads);
  for (const Job& job : jobs) {
    const int size = matvec::groups(*job.matrix);
    const Share part = {mine.begin > before ? mine.begin - before : 0,
                        mine.end - before < size ? mine.end - before : size};
    if (part.begin < part.end)
      matvec::multiply(*job.matrix, part, job.source->input(*job.matrix, B), B, job.out->x,
                       job.out->stride);
    before += size;
  }
}

// The activations between two factors: tanh for the decay, sigmoid for the gate.
inline void between_factors(const TimeMixOwn& own, const TimeMixShared& all, int B) {
  constexpr int W = kLanes;
  const auto each = [](const Rows& from, const Rows& to, int B, auto&& change) {
    for (int64_t i = 0; i < B * from.stride; i += W)
      store<W>(to.x + i, change(load<W>(from.x + i)));
  };
  each(all.w, own.w_in, B, [](Vec<W> x) { return sigmoid<W>(2.f * x) * 2.f - 1.f; });
  each(all.a, own.a_in, B, [](Vec<W> x) { return x; });
  each(all.mixed_v, own.v_in, B, [](Vec<W> x) { return x; });
  each(all.g, own.g_in, B, [](Vec<W> x) { return sigmoid<W>(x); });
}

template <int W>
inline void second_phase(const TimeMix& m, const TimeMixOwn& own, const TimeMixShared& all, int B,
                         Share heads, const float* v_first, const float* wkv_in, float* wkv_out) {
  const int64_t H = m.head_dim;
  const int per_head = int(padded(H) / kGroup);
  const Input w = own.w_in.input(m.w2, B), a = own.a_in.input(m.a2, B);
  const Input v = own.v_in.input(m.v2, B), g = own.g_in.input(m.g2, B);
  for (int n = heads.begin; n < heads.end; n++) {
    const auto factor = [&](const Matrix& matrix, const Input& in, const Rows& out) {
      // the head's groups, written from the start of `out`
      const Share part = {n * per_head, (n + 1) * per_head};
      matvec::multiply(matrix, part, in, B, out.x - int64_t(part.begin) * kGroup, out.stride);
    };
    factor(m.w2, w, own.decay);
    factor(m.a2, a, own.rate);
    factor(m.g2, g, own.gate);
    if (v_first) factor(m.v2, v, own.residual);
    for (int b = 0; b < B; b++) {
      const int64_t state = (int64_t(b) * m.heads + n) * H * H;
      head<W>(m, n, all.r[b] + n * H, all.k[b] + n * H, all.v[b] + n * H,
              v_first ? v_first + int64_t(b) * m.dim + n * H : nullptr, own.decay[b], own.rate[b],
              own.residual[b], own.gate[b], wkv_in + state, wkv_out + state, own.head,
              all.z[b] + n * H);
    }
  }
}

struct ChannelMixShared {
  Source hidden;
  ChannelMixShared(const ChannelMix& m, Scratch& s, int B) : hidden(s, B, m.hidden) {}
};

struct ChannelMixOwn {
  Rows normed;
  Source mixed;
  int16_t* rounded;
  ChannelMixOwn(const ChannelMix& m, Scratch& s, int B)
      : normed(s, B, m.dim), mixed(s, B, m.dim), rounded(s.take<int16_t>(B * padded(m.hidden))) {}
};

}  // namespace

extern "C" {

// Bytes of scratch that a step needs.
int64_t time_mix_scratch(const TimeMix* m, int B, int threads) {
  Scratch scratch(nullptr);
  TimeMixShared all(*m, scratch, B);
  for (int t = 0; t < threads; t++) TimeMixOwn own(*m, scratch, B);
  return scratch.used;
}

// Pointers, all to contiguous fp32: x, last, wkv, v_first; new x, last, wkv, v_first. All but wkv
// [B, N, H, H] are [B, D]. v_first is null in the first RWKV-7 layer, which leaves its values in the
// new one; that is null in all others.
void time_mix(const void* step, void* const* pointers, void* memory, int B, int threads) {
  const float *x = static_cast<const float*>(pointers[0]),
              *last = static_cast<const float*>(pointers[1]),
              *wkv_in = static_cast<const float*>(pointers[2]),
              *v_first = static_cast<const float*>(pointers[3]);
  float *x_out = static_cast<float*>(pointers[4]), *last_out = static_cast<float*>(pointers[5]),
        *wkv_out = static_cast<float*>(pointers[6]), *v_out = static_cast<float*>(pointers[7]);
  const TimeMix& m = *static_cast<const TimeMix*>(step);
  const int64_t D = m.dim;
  Scratch shared(memory);
  const TimeMixShared all(m, shared, B);
  if (!m.layer_has_residual) v_first = nullptr;
#pragma omp parallel num_threads(threads)
  {
    const int thread = this_thread(), team = all_threads();
    Scratch scratch = shared;
    for (int t = 0; t < thread; t++) TimeMixOwn skipped(m, scratch, B);
    const TimeMixOwn own(m, scratch, B);
    const Source* sources[kMixed] = {&own.r, &own.w, &own.k, &own.v, &own.a, &own.g};
    for (int b = 0; b < B; b++) {
      normalize(m.norm, x + b * D, D, own.normed[b]);
      for (int i = 0; i < kMixed; i++)
        blend(own.normed[b], last + b * D, m.mix[i], D, (*sources[i])[b]);
    }
    if (thread == 0)
      for (int b = 0; b < B; b++) memcpy(last_out + b * D, own.normed[b], D * sizeof(float));
    first_phase(m, own, all, B, thread, team);
#pragma omp barrier
    between_factors(own, all, B);
    const Share heads = share(m.heads, thread, team);
    if (v_out)
      for (int b = 0; b < B; b++)
        memcpy(v_out + b * D + heads.begin * m.head_dim, all.v[b] + heads.begin * m.head_dim,
               size_t(heads.end - heads.begin) * m.head_dim * sizeof(float));
    with_head_lanes(m.head_dim, [&](auto lanes) {
      second_phase<lanes.value>(m, own, all, B, heads, v_first, wkv_in, wkv_out);
    });
    if (thread == 0)
      for (int b = 0; b < B; b++)
        for (int64_t i = D; i < all.z.stride; i++) all.z[b][i] = 0;
#pragma omp barrier
    Source z = all.z;
    z.rounded = own.z_rounded;
    const Share part = share(matvec::groups(m.output), thread, team);
    matvec::multiply_into(m.output, part, z.input(m.output, B), B, x, x_out);
  }
}

int64_t channel_mix_scratch(const ChannelMix* m, int B, int threads) {
  Scratch scratch(nullptr);
  ChannelMixShared all(*m, scratch, B);
  for (int t = 0; t < threads; t++) ChannelMixOwn own(*m, scratch, B);
  return scratch.used;
}

// Pointers, all to contiguous fp32 [B, D]: x, last; new x, last.
void channel_mix(const void* step, void* const* pointers, void* memory, int B, int threads) {
  constexpr int W = kLanes;
  const float *x = static_cast<const float*>(pointers[0]),
              *last = static_cast<const float*>(pointers[1]);
  float *x_out = static_cast<float*>(pointers[2]), *last_out = static_cast<float*>(pointers[3]);
  const ChannelMix& m = *static_cast<const ChannelMix*>(step);
  const int64_t D = m.dim;
  Scratch shared(memory);
  const ChannelMixShared all(m, shared, B);
#pragma omp parallel num_threads(threads)
  {
    const int thread = this_thread(), team = all_threads();
    Scratch scratch = shared;
    for (int t = 0; t < thread; t++) ChannelMixOwn skipped(m, scratch, B);
    const ChannelMixOwn own(m, scratch, B);
    for (int b = 0; b < B; b++) {
      normalize(m.norm, x + b * D, D, own.normed[b]);
      blend(own.normed[b], last + b * D, m.mix, D, own.mixed[b]);
    }
    if (thread == 0)
      for (int b = 0; b < B; b++) memcpy(last_out + b * D, own.normed[b], D * sizeof(float));
    const Share mine = share(matvec::groups(m.key), thread, team);
    matvec::multiply(m.key, mine, own.mixed.input(m.key, B), B, all.hidden.x, all.hidden.stride);
    for (int b = 0; b < B; b++)
      for (int64_t i = int64_t(mine.begin) * kGroup; i < int64_t(mine.end) * kGroup; i += W) {
        const Vec<W> h = load<W>(all.hidden[b] + i);
        // as relu does, NaN stays NaN
        store<W>(all.hidden[b] + i, select<W>(h < 0.f, Vec<W>{}, h * h));
      }
#pragma omp barrier
    Source hidden = all.hidden;
    hidden.rounded = own.rounded;
    const Share part = share(matvec::groups(m.value), thread, team);
    matvec::multiply_into(m.value, part, hidden.input(m.value, B), B, x, x_out);
  }
}
}
