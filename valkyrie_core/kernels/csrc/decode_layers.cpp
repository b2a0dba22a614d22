// One token through embedding, attention, SwiGLU and head (nn/model.py, nn/attention.py and
// nn/ffn.py say what they are), norm and residual included, for up to 8 rows.

#include "decode.h"

using namespace decode;

namespace {

struct Embedding {
  int32_t dim, vocab;
  Norm norm;
  const float* table;  // [V, D]
};

struct Head {
  int32_t dim;
  Norm norm;
  Matrix matrix;
};

struct SwiGLU {
  int32_t dim, hidden;
  Norm norm;
  Matrix gate, up, down;
};

struct Attention {
  int32_t dim, heads, kv_heads, head_dim, turned;  // numbers of a head that rotate, an even number
  float norm_eps;
  Norm norm;
  Matrix query, key, value, output;
  const float *query_norm, *key_norm;  // [H]
  const float* frequency;              // [turned / 2]
  float turn_scale;                    // what queries and keys are multiplied by where they turn
  int32_t window, sinks;               // 0: no window
  const float* slopes;                 // [heads], or null: distance is no penalty
};

// Keys and values [B, K, room, H] in fp32 or bf16; `length` places are filled, one more is written.
struct Cache {
  void *k, *v;
  const int64_t *segment, *position;  // [B, room], this token's included
  int64_t length, room;
  int32_t bf16;
};

struct SwiGLUShared {
  Source hidden;
  SwiGLUShared(const SwiGLU& m, Scratch& s, int B) : hidden(s, B, m.hidden) {}
};

struct SwiGLUOwn {
  Source normed;
  Rows up;
  int16_t* rounded;
  SwiGLUOwn(const SwiGLU& m, Scratch& s, int B)
      : normed(s, B, m.dim), up(s, B, m.hidden), rounded(s.take<int16_t>(B * padded(m.hidden))) {}
};

struct AttentionShared {
  Rows q, k, v;
  Source y;
  AttentionShared(const Attention& m, Scratch& s, int B)
      : q(s, B, m.dim), k(s, B, m.kv_heads * m.head_dim), v(s, B, m.kv_heads * m.head_dim),
        y(s, B, m.dim) {}
};

struct AttentionOwn {
  Source normed;
  int16_t* rounded;
  float *q, *sink_q, *k, *scores, *part;
  AttentionOwn(const Attention& m, Scratch& s, int B, int64_t length)
      : normed(s, B, m.dim), rounded(s.take<int16_t>(B * padded(m.dim))),
        q(s.take<float>(m.head_dim)), sink_q(s.take<float>(m.head_dim)),
        k(s.take<float>(m.head_dim)),
        scores(s.take<float>(padded(length + 1))), part(s.take<float>(256)) {}
};

// RMS norm of a head, then rotation of pairs (i, i + turned / 2) by position * frequency.
template <int W>
inline void norm_and_turn(const Attention& m, const float* x, const float* weight, float position,
                          float* out) {
  const int64_t H = m.head_dim;
  Vec<W> squares{};
  for (int64_t i = 0; i < H; i += W) squares += load<W>(x + i) * load<W>(x + i);
  const float scale = 1.f / std::sqrt(sum<W>(squares) / H + m.norm_eps);
  for (int64_t i = 0; i < H; i += W)
    store<W>(out + i, load<W>(x + i) * scale * load<W>(weight + i));
  const int half = m.turned / 2;
  for (int i = 0; i < half; i++) {
    const float angle = position * m.frequency[i];
    const float cosine = std::cos(angle) * m.turn_scale, sine = std::sin(angle) * m.turn_scale;
    const float first = out[i], second = out[i + half];
    out[i] = first * cosine - second * sine;
    out[i + half] = first * sine + second * cosine;
  }
}

// scores[s] = q . k[s] for s < count, W keys at a time.
template <int W, typename T>
inline void score(const float* q, const T* k, int64_t count, int64_t H, float* part, float* scores) {
  int64_t s = 0;
  for (; s + W <= count; s += W) {
    for (int i = 0; i < W; i++) {
      Vec<W> sum_{};
      for (int64_t j = 0; j < H; j += W) sum_ += load<W>(q + j) * load<W>(k + (s + i) * H + j);
      store<W>(part + i * W, sum_);
    }
    store<W>(scores + s, fold<W>(part));
  }
  for (; s < count; s++) {
    Vec<W> sum_{};
    for (int64_t j = 0; j < H; j += W) sum_ += load<W>(q + j) * load<W>(k + s * H + j);
    scores[s] = sum<W>(sum_);
  }
}

// One query head of one row. The cache holds the keys before this one; its own comes apart, since
// another thread may be the one that writes it there.
template <int W, typename T>
inline void attend(const Attention& m, const Cache& cache, int b, int n, const AttentionShared& all,
                   const AttentionOwn& own, float position) {
  const int64_t H = m.head_dim, groups = m.heads / m.kv_heads, kv = n / groups;
  const int64_t place = (int64_t(b) * m.kv_heads + kv) * cache.room * H, past = cache.length;
  T* keys = static_cast<T*>(cache.k) + place;
  T* values = static_cast<T*>(cache.v) + place;
  const float* v = all.v[b] + kv * H;
  norm_and_turn<W>(m, all.q[b] + n * H, m.query_norm, position, own.q);
  norm_and_turn<W>(m, all.k[b] + kv * H, m.key_norm, position, own.k);
  if (n % groups == 0)
    for (int64_t i = 0; i < H; i++) put(keys + past * H + i, own.k[i]), put(values + past * H + i, v[i]);
  float* scores = own.scores;
  score<W>(own.q, keys, past, H, own.part, scores);
  score<W>(own.q, own.k, 1, H, own.part, scores + past);
  const int64_t* segment = cache.segment + int64_t(b) * cache.room;
  const int64_t* at = cache.position + int64_t(b) * cache.room;
  const float scale = 1.f / std::sqrt(float(H)), slope = m.slopes ? m.slopes[n] : 0.f;
  // a sink that is far away is seen as if it were just before the window
  const int64_t now = at[past], near = m.window + m.sinks - 1;
  const bool far = m.window > 0 && now > near;
  if (far) norm_and_turn<W>(m, all.q[b] + n * H, m.query_norm, float(near), own.sink_q);
  float most = scores[past] * scale;
  for (int64_t s = 0; s < past; s++) {
    const bool sink = far && at[s] < m.sinks;
    const bool seen = segment[s] == segment[past] &&
                      (m.window == 0 || now - at[s] < m.window || at[s] < m.sinks);
    if (sink && seen) score<W>(own.sink_q, keys + s * H, 1, H, own.part, scores + s);
    const float distance = float((sink ? near : now) - at[s]);
    scores[s] = seen ? scores[s] * scale - slope * distance : -INFINITY;
    most = scores[s] > most ? scores[s] : most;
  }
  scores[past] *= scale;
  for (int64_t s = past + 1; s < padded(past + 1); s++) scores[s] = -INFINITY;
  Vec<kLanes> total_{};
  for (int64_t s = 0; s < padded(past + 1); s += kLanes) {
    const Vec<kLanes> p = exp<kLanes>(load<kLanes>(scores + s) - most);
    store<kLanes>(scores + s, p);
    total_ += p;
  }
  const float inverse = 1.f / sum<kLanes>(total_);
  float* y = all.y[b] + n * H;
  for (int64_t j = 0; j < H; j += W) store<W>(y + j, load<W>(v + j) * scores[past]);
  for (int64_t s = 0; s < past; s++) {
    if (scores[s] == 0.f) continue;
    for (int64_t j = 0; j < H; j += W)
      store<W>(y + j, load<W>(y + j) + load<W>(values + s * H + j) * scores[s]);
  }
  for (int64_t j = 0; j < H; j += W) store<W>(y + j, load<W>(y + j) * inverse);
}

}  // namespace

extern "C" {

// Norm of a row of the table per token, into x [B, D]. Returns 1 where a token is out of range.
int embed(const Embedding* m, const int64_t* tokens, float* x, float* scratch, int B) {
  for (int b = 0; b < B; b++)
    if (tokens[b] < 0 || tokens[b] >= m->vocab) return 1;
  for (int b = 0; b < B; b++) {
    normalize(m->norm, m->table + tokens[b] * m->dim, m->dim, scratch);
    memcpy(x + int64_t(b) * m->dim, scratch, m->dim * sizeof(float));
  }
  return 0;
}

int64_t head_scratch(const Head* m, int B, int threads) {
  Scratch scratch(nullptr);
  for (int t = 0; t < threads; t++) Source(scratch, B, m->dim);
  return scratch.used;
}

// Pointers: x [B, D]; logits [B, V].
void head(const void* step, void* const* pointers, void* memory, int B, int threads) {
  const Head* m = static_cast<const Head*>(step);
  const float* x = static_cast<const float*>(pointers[0]);
  float* logits = static_cast<float*>(pointers[1]);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(memory);
    for (int t = 0; t < this_thread(); t++) Source(scratch, B, m->dim);
    const Source normed(scratch, B, m->dim);
    for (int b = 0; b < B; b++) normalize(m->norm, x + int64_t(b) * m->dim, m->dim, normed[b]);
    const Share part = share(matvec::groups(m->matrix), this_thread(), all_threads());
    matvec::multiply_into(m->matrix, part, normed.input(m->matrix, B), B, nullptr, logits);
  }
}

int64_t swiglu_scratch(const SwiGLU* m, int B, int threads) {
  Scratch scratch(nullptr);
  SwiGLUShared all(*m, scratch, B);
  for (int t = 0; t < threads; t++) SwiGLUOwn own(*m, scratch, B);
  return scratch.used;
}

// Pointers: x [B, D]; new x.
void swiglu(const void* step, void* const* pointers, void* memory, int B, int threads) {
  constexpr int W = kLanes;
  const SwiGLU& m = *static_cast<const SwiGLU*>(step);
  const float* x = static_cast<const float*>(pointers[0]);
  float* x_out = static_cast<float*>(pointers[1]);
  Scratch shared(memory);
  const SwiGLUShared all(m, shared, B);
#pragma omp parallel num_threads(threads)
  {
    const int thread = this_thread(), team = all_threads();
    Scratch scratch = shared;
    for (int t = 0; t < thread; t++) SwiGLUOwn skipped(m, scratch, B);
    const SwiGLUOwn own(m, scratch, B);
    for (int b = 0; b < B; b++) normalize(m.norm, x + int64_t(b) * m.dim, m.dim, own.normed[b]);
    const Share mine = share(matvec::groups(m.gate), thread, team);
    const Input in = own.normed.input(m.gate, B);
    matvec::multiply(m.gate, mine, in, B, all.hidden.x, all.hidden.stride);
    matvec::multiply(m.up, mine, in, B, own.up.x, own.up.stride);
    for (int b = 0; b < B; b++)
      for (int64_t i = int64_t(mine.begin) * kGroup; i < int64_t(mine.end) * kGroup; i += W) {
        const Vec<W> gate = load<W>(all.hidden[b] + i);
        store<W>(all.hidden[b] + i, gate * sigmoid<W>(gate) * load<W>(own.up[b] + i));
      }
#pragma omp barrier
    Source hidden = all.hidden;
    hidden.rounded = own.rounded;
    const Share part = share(matvec::groups(m.down), thread, team);
    matvec::multiply_into(m.down, part, hidden.input(m.down, B), B, x, x_out);
  }
}

int64_t attention_scratch(const Attention* m, int64_t length, int B, int threads) {
  Scratch scratch(nullptr);
  AttentionShared all(*m, scratch, B);
  for (int t = 0; t < threads; t++) AttentionOwn own(*m, scratch, B, length);
  return scratch.used;
}

// Pointers: x [B, D], the cache, positions [B] in int64; new x. Writes the token's key and value
// into the cache's next place.
void attention(const void* step, void* const* pointers, void* memory, int B, int threads) {
  const Attention& m = *static_cast<const Attention*>(step);
  const float* x = static_cast<const float*>(pointers[0]);
  const Cache* cache = static_cast<const Cache*>(pointers[1]);
  const int64_t* position = static_cast<const int64_t*>(pointers[2]);
  float* x_out = static_cast<float*>(pointers[3]);
  Scratch shared(memory);
  const AttentionShared all(m, shared, B);
#pragma omp parallel num_threads(threads)
  {
    const int thread = this_thread(), team = all_threads();
    Scratch scratch = shared;
    for (int t = 0; t < thread; t++) AttentionOwn skipped(m, scratch, B, cache->length);
    const AttentionOwn own(m, scratch, B, cache->length);
    for (int b = 0; b < B; b++) normalize(m.norm, x + int64_t(b) * m.dim, m.dim, own.normed[b]);
    const Input in = own.normed.input(m.query, B);
    const auto project = [&](const Matrix& matrix, const Rows& out) {
      matvec::multiply(matrix, share(matvec::groups(matrix), thread, team), in, B, out.x, out.stride);
    };
    project(m.query, all.q);
    project(m.key, all.k);
    project(m.value, all.v);
#pragma omp barrier
    const Share items = share(B * m.heads, thread, team);
    with_head_lanes(m.head_dim, [&](auto lanes) {
      for (int item = items.begin; item < items.end; item++) {
        const int b = item / m.heads, n = item % m.heads;
        const float at = float(position[b]);
        if (cache->bf16)
          attend<lanes.value, uint16_t>(m, *cache, b, n, all, own, at);
        else
          attend<lanes.value, float>(m, *cache, b, n, all, own, at);
      }
    });
    if (thread == 0)
      for (int b = 0; b < B; b++)
        for (int64_t i = m.dim; i < all.y.stride; i++) all.y[b][i] = 0;
#pragma omp barrier
    Source y = all.y;
    y.rounded = own.rounded;
    const Share part = share(matvec::groups(m.output), thread, team);
    matvec::multiply_into(m.output, part, y.input(m.output, B), B, x, x_out);
  }
}

struct Call {
  Step step;
  const void* of;
  void* pointers[8];
};

// One step after the other, all of the same rows and in the same memory.
void run(const Call* calls, int count, void* memory, int B, int threads) {
  for (int i = 0; i < count; i++) calls[i].step(calls[i].of, calls[i].pointers, memory, B, threads);
}
}
