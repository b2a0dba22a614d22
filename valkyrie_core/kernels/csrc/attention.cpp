// Causal attention in bf16 with fp32 sums, forward and backward, a block of queries against a block
// of keys at a time (Dao 2023, arXiv 2307.08691): the T x T matrix never exists.
//
//   S = scale Q K^T      P = softmax(S) over the keys that are seen      Y = P V
//   dV = P^T dY      dP = dY V^T      dS = P (dP - rowsum(dY Y))      dQ = scale dS K      dK = scale dS^T Q
//
// The forward pass keeps log(sum(exp(S))) per query, from which the backward pass makes P again.
// Backward, a block holds keys as rows (S^T), so that P^T and dS^T are left factors as they lie.
//
// Query t sees key s <= t of the same segment. q and y are [B, T, N, H], k and v [B, T, K, H]; N is a
// multiple of K. Work is cut into units by shape alone, never by the number of threads, and what
// several units add to is summed in a fixed order: the bits depend on nothing else.

#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "tiles.h"

namespace {

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

constexpr int kBlock = 64;    // queries of a block, and keys
constexpr int kUnits = 16;    // at least so many units of work, however few the heads
constexpr float kUnseen = -1e30f;  // finite: a block may hold no key that a query sees

struct View {  // a [B, T, N, H] tensor of bf16, its last dimension dense
  uint16_t* data;
  int64_t b, t, n;
  uint16_t* row(int64_t ib, int64_t it, int64_t in) const {
    return data + ib * b + it * t + in * n;
  }
};

struct Problem {
  View q, k, v, y;
  float* lse;              // [B, N, T]
  const int32_t* segment;  // [B, T], or null where there is but one
  int64_t B, T, N, K;
  int H, width;  // of a head, and that with zeros up to a multiple of 32
  int parts;     // units that share a head
  float scale;

  int64_t blocks() const { return (T + kBlock - 1) / kBlock; }
  int rows(int64_t block) const {  // tokens of a block that exist
    const int64_t left = T - block * kBlock;
    return int(left < kBlock ? left : kBlock);
  }
};

// A block of tokens of one head, zeros where there are none.
void read_block(const Problem& p, const View& from, int64_t b, int64_t n, int64_t block,
                uint16_t* out) {
  const int rows = p.rows(block);
  for (int r = 0; r < kBlock; r++) {
    const int have = r < rows ? p.H : 0;
    if (have) memcpy(out + r * p.width, from.row(b, block * kBlock + r, n), have * sizeof *out);
    if (have < p.width) memset(out + r * p.width + have, 0, (p.width - have) * sizeof *out);
  }
}

void write_row(const float* from, int H, float factor, uint16_t* out) {
  int h = 0;
  for (; h + kLanes <= H; h += kLanes) store<kLanes>(out + h, load<kLanes>(from + h) * factor);
  for (; h < H; h++) out[h] = to_bf16(from[h] * factor);
}

// What has to be masked between a block of queries and one of keys that is not later.
enum class Sight { kNone, kSome, kAll };

struct Segments {
  const int32_t* of_token;  // of one sequence, or null
  int64_t T;

  // Padding is a segment of its own, below 0, and sees itself alone: it matters on the diagonal.
  void range(int64_t block, int32_t* low, int32_t* high, bool* padded) const {
    const int64_t start = block * kBlock, stop = start + kBlock < T ? start + kBlock : T;
    *low = INT32_MAX, *high = -1, *padded = false;
    for (int64_t t = start; t < stop; t++) {
      const int32_t s = of_token[t];
      if (s < 0) {
        *padded = true;
        continue;
      }
      *low = s < *low ? s : *low;
      *high = s > *high ? s : *high;
    }
  }

  Sight sight(int64_t queries, int64_t keys) const {
    if (!of_token) return queries == keys ? Sight::kSome : Sight::kAll;
    int32_t low_q, high_q, low_k, high_k;
    bool padded_q, padded_k;
    range(queries, &low_q, &high_q, &padded_q);
    range(keys, &low_k, &high_k, &padded_k);
    if (queries == keys) return Sight::kSome;
    if (low_q > high_k || low_k > high_q) return Sight::kNone;
    const bool same = low_q == high_q && low_k == high_k && low_q == low_k;
    return same && !padded_q && !padded_k ? Sight::kAll : Sight::kSome;
  }

  // Lanes of keys s, s+1, ... that query t sees, or of queries t, t+1, ... that see key s.
  template <bool kOfKeys>
  typename Vectors<kLanes>::I seen(int64_t t, int64_t s) const {
    typedef typename Vectors<kLanes>::I I;
    I lane, own;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    const int64_t moving = kOfKeys ? s : t, fixed = kOfKeys ? t : s;
    const I far = lane + int32_t(moving - fixed);
    I mask = kOfKeys ? far <= 0 : far >= 0;
    if (!of_token) return mask;
    if (fixed >= T) return I{};
    if (moving + kLanes <= T)
      own = *reinterpret_cast<const I*>(of_token + moving);
    else
      for (int i = 0; i < kLanes; i++) own[i] = moving + i < T ? of_token[moving + i] : INT32_MIN;
    return mask & (own == of_token[fixed]);
  }
};

float* floats(char*& memory, int64_t count) {
  float* found = reinterpret_cast<float*>(memory);
  memory += (count * sizeof(float) + 63) / 64 * 64;
  return found;
}

uint16_t* halves(char*& memory, int64_t count) {
  return reinterpret_cast<uint16_t*>(floats(memory, (count + 1) / 2));
}

uint32_t* words(char*& memory, int64_t count) {
  return reinterpret_cast<uint32_t*>(floats(memory, count));
}

int64_t forward_bytes(int64_t blocks, int width) {
  const int64_t block = kBlock * width * 4;
  return blocks * block + 3 * block + kBlock * kBlock * 6 + 16 * 64;
}

// One row of a block: exponentials over S, their sum added, and the row of Y so far rescaled.
void softmax_row(const Problem& p, const Segments& segments, Sight sight, int64_t t, int64_t s,
                 float* S, uint16_t* P, float* Y, float* most, float* total) {
  constexpr int W = kLanes;
  Vec<W> top = splat<W>(*most);
  for (int c = 0; c < kBlock; c += W) {
    Vec<W> x = load<W>(S + c) * p.scale;
    if (sight == Sight::kSome) x = select<W>(segments.seen<true>(t, s + c), x, splat<W>(kUnseen));
    store<W>(S + c, x);
    top = select<W>(x > top, x, top);
  }
  const float now = largest<W>(top);
  Vec<W> sum_P = {};
  for (int c = 0; c < kBlock; c += W) {
    const Vec<W> x = exp<W>(load<W>(S + c) - now);
    sum_P += x;
    store<W>(P + c, x);
  }
  if (now != *most) {
    const float fade = exp<1>(splat<1>(*most - now))[0];
    *total *= fade;
    for (int h = 0; h < p.width; h += W) store<W>(Y + h, load<W>(Y + h) * fade);
  }
  *total += sum<W>(sum_P);
  *most = now;
}

void forward_unit(const Problem& p, int64_t b, int64_t n, int part, const Multiplier& multiply,
                  char* memory) {
  const int64_t blocks = p.blocks(), size = kBlock * p.width / 2, head = n * p.K / p.N;
  uint32_t* keys = words(memory, blocks * size);
  uint32_t* values = words(memory, blocks * size);
  uint16_t* Q = halves(memory, kBlock * p.width);
  float* Y = floats(memory, kBlock * p.width);
  float* S = floats(memory, kBlock * kBlock);
  uint16_t* P = halves(memory, kBlock * kBlock);
  const Segments segments{p.segment ? p.segment + b * p.T : nullptr, p.T};
  for (int64_t j = 0; j < blocks; j++) {
    read_block(p, p.k, b, head, j, Q);
    pack_columns(Q, p.width, kBlock, p.width, keys + j * size);
    read_block(p, p.v, b, head, j, Q);
    pack_rows(Q, p.width, kBlock, p.width, values + j * size);
  }
  for (int64_t i = part; i < blocks; i += p.parts) {
    float most[kBlock], total[kBlock] = {};
    for (float& x : most) x = kUnseen;
    memset(Y, 0, kBlock * p.width * sizeof *Y);
    read_block(p, p.q, b, n, i, Q);
    const int rows = p.rows(i);
    for (int64_t j = 0; j <= i; j++) {
      const Sight sight = segments.sight(i, j);
      if (sight == Sight::kNone) continue;
      multiply.run(kBlock, kBlock, p.width, Q, p.width, keys + j * size, S, kBlock, false);
      for (int r = 0; r < kBlock; r++)
        softmax_row(p, segments, sight, i * kBlock + r, j * kBlock, S + r * kBlock, P + r * kBlock,
                    Y + r * p.width, most + r, total + r);
      multiply.run(kBlock, p.width, kBlock, P, kBlock, values + j * size, Y, p.width, true);
    }
    for (int r = 0; r < rows; r++) {
      const int64_t t = i * kBlock + r;
      write_row(Y + r * p.width, p.H, 1.f / total[r], p.y.row(b, t, n));
      p.lse[(b * p.N + n) * p.T + t] = most[r] + std::log(total[r]);
    }
  }
}

struct Gradients {
  View dy, dq, dk, dv;
  float* turned;  // [parts, B, N, blocks, width, kBlock]: dQ^T before the parts are summed
};

int64_t backward_bytes(int64_t blocks, int width) {
  const int64_t block = kBlock * width * 4;
  return blocks * (4 * block + 2 * kBlock * 4) + 4 * block + kBlock * kBlock * 14 + 32 * 64;
}

// One head's queries and their gradients, packed both ways, with what softmax needs.
struct Queries {
  uint32_t *q_columns, *q_rows, *dy_columns, *dy_rows;
  float *lse, *delta;

  Queries(int64_t blocks, int64_t size, char*& memory)
      : q_columns(words(memory, blocks * size)), q_rows(words(memory, blocks * size)),
        dy_columns(words(memory, blocks * size)), dy_rows(words(memory, blocks * size)),
        lse(floats(memory, blocks * kBlock)), delta(floats(memory, blocks * kBlock)) {}

  void pack(const Problem& p, const Gradients& g, int64_t b, int64_t n, uint16_t* y, uint16_t* dy) {
    constexpr int W = kLanes;
    const int64_t size = kBlock * p.width / 2;
    for (int64_t i = 0; i < p.blocks(); i++) {
      read_block(p, p.q, b, n, i, y);
      pack_columns(y, p.width, kBlock, p.width, q_columns + i * size);
      pack_rows(y, p.width, kBlock, p.width, q_rows + i * size);
      read_block(p, p.y, b, n, i, y);
      read_block(p, g.dy, b, n, i, dy);
      pack_columns(dy, p.width, kBlock, p.width, dy_columns + i * size);
      pack_rows(dy, p.width, kBlock, p.width, dy_rows + i * size);
      for (int r = 0; r < kBlock; r++) {
        const int64_t t = i * kBlock + r;
        // a query that does not exist: its probabilities are exp(-1e30) = 0
        lse[t] = t < p.T ? p.lse[(b * p.N + n) * p.T + t] : -kUnseen;
        Vec<W> total = {};
        for (int at = r * p.width; at < (r + 1) * p.width; at += W)
          total += load<W>(y + at) * load<W>(dy + at);
        delta[t] = sum<W>(total);
      }
    }
  }
};

struct Scratch {  // of one pair of blocks
  uint16_t *K, *V, *KT, *PT, *dST;
  uint32_t *dS_words, *K_words;
  float *ST, *dPT;
  Scratch(int width, char*& memory)
      : K(halves(memory, kBlock * width)), V(halves(memory, kBlock * width)),
        KT(halves(memory, kBlock * width)), PT(halves(memory, kBlock * kBlock)),
        dST(halves(memory, kBlock * kBlock)), dS_words(words(memory, kBlock * kBlock / 2)),
        K_words(words(memory, kBlock * width / 2)),
        ST(floats(memory, kBlock * kBlock)), dPT(floats(memory, kBlock * kBlock)) {}
};

// P^T and dS^T of a block, keys as rows.
void probabilities(const Problem& p, const Segments& segments, Sight sight, int64_t t, int64_t s,
                   const float* lse, const float* delta, const Scratch& m) {
  constexpr int W = kLanes;
  for (int r = 0; r < kBlock; r++)
    for (int c = 0; c < kBlock; c += W) {
      const int at = r * kBlock + c;
      Vec<W> P = exp<W>(load<W>(m.ST + at) * p.scale - load<W>(lse + c));
      if (sight == Sight::kSome)
        P = select<W>(segments.seen<false>(t + c, s + r), P, Vec<W>{});
      store<W>(m.PT + at, P);
      store<W>(m.dST + at, P * (load<W>(m.dPT + at) - load<W>(delta + c)) * p.scale);
    }
}

// A unit is every parts-th block of keys of one key head, with all queries of all heads it serves.
void backward_unit(const Problem& p, const Gradients& g, int64_t b, int64_t head, int part,
                   const Multiplier& multiply, char* memory) {
  const int64_t blocks = p.blocks(), size = kBlock * p.width / 2, area = kBlock * p.width;
  Queries queries(blocks, size, memory);
  float* dK = floats(memory, blocks * area);
  float* dV = floats(memory, blocks * area);
  const Scratch m(p.width, memory);
  const Segments segments{p.segment ? p.segment + b * p.T : nullptr, p.T};
  memset(dK, 0, blocks * area * sizeof *dK);
  memset(dV, 0, blocks * area * sizeof *dV);
  const int64_t group = p.N / p.K;
  for (int64_t n = head * group; n < (head + 1) * group; n++) {
    queries.pack(p, g, b, n, m.K, m.V);
    float* turned = g.turned + ((part * p.B + b) * p.N + n) * blocks * area;
    memset(turned, 0, blocks * area * sizeof *turned);
    for (int64_t j = part; j < blocks; j += p.parts) {
      read_block(p, p.k, b, head, j, m.K);
      read_block(p, p.v, b, head, j, m.V);
      pack_columns(m.K, p.width, kBlock, p.width, m.K_words);
      unpack_columns(m.K_words, kBlock, p.width, m.KT);
      for (int64_t i = j; i < blocks; i++) {
        const Sight sight = segments.sight(i, j);
        if (sight == Sight::kNone) continue;
        const int64_t at = i * size;
        multiply.run(kBlock, kBlock, p.width, m.K, p.width, queries.q_columns + at, m.ST, kBlock,
                     false);
        multiply.run(kBlock, kBlock, p.width, m.V, p.width, queries.dy_columns + at, m.dPT, kBlock,
                     false);
        probabilities(p, segments, sight, i * kBlock, j * kBlock, queries.lse + i * kBlock,
                      queries.delta + i * kBlock, m);
        pack_rows(m.dST, kBlock, kBlock, kBlock, m.dS_words);
        multiply.run(kBlock, p.width, kBlock, m.PT, kBlock, queries.dy_rows + at, dV + j * area,
                     p.width, true);
        multiply.run(kBlock, p.width, kBlock, m.dST, kBlock, queries.q_rows + at, dK + j * area,
                     p.width, true);
        multiply.run(p.width, kBlock, kBlock, m.KT, kBlock, m.dS_words, turned + i * area, kBlock,
                     true);
      }
    }
  }
  for (int64_t j = part; j < blocks; j += p.parts)
    for (int r = 0; r < p.rows(j); r++) {
      uint16_t *dk = g.dk.row(b, j * kBlock + r, head), *dv = g.dv.row(b, j * kBlock + r, head);
      write_row(dK + j * area + r * p.width, p.H, 1.f, dk);
      write_row(dV + j * area + r * p.width, p.H, 1.f, dv);
    }
}

// dQ of one block: the parts summed in order, into the first of them, and turned.
void write_dq(const Problem& p, const Gradients& g, int64_t b, int64_t n, int64_t block,
              float* memory) {
  constexpr int W = kLanes;
  const int64_t area = kBlock * p.width, step = p.B * p.N * p.blocks() * area;
  float* total = g.turned + ((b * p.N + n) * p.blocks() + block) * area;
  for (int part = 1; part < p.parts; part++)
    for (int64_t at = 0; at < area; at += W)
      store<W>(total + at, load<W>(total + at) + load<W>(total + part * step + at));
  for (int h = 0; h < p.width; h += W)
    for (int r = 0; r < kBlock; r += W)
      transpose_words(reinterpret_cast<const uint32_t*>(total + h * kBlock + r), kBlock,
                      reinterpret_cast<uint32_t*>(memory + r * p.width + h), p.width);
  for (int r = 0; r < p.rows(block); r++)
    write_row(memory + r * p.width, p.H, 1.f, g.dq.row(b, block * kBlock + r, n));
}

View view(void* data, const int64_t* strides) {
  return View{static_cast<uint16_t*>(data), strides[0], strides[1], strides[2]};
}

Problem problem(void* const* tensors, const int64_t* strides, float* lse, const int32_t* segment,
                const int64_t* sizes) {
  const int H = int(sizes[4]);
  const int64_t heads = sizes[0] * sizes[3];
  return Problem{view(tensors[0], strides), view(tensors[1], strides + 3),
                 view(tensors[2], strides + 6), view(tensors[3], strides + 9), lse, segment,
                 sizes[0], sizes[1], sizes[2], sizes[3], H, (H + 31) / 32 * 32,
                 int((kUnits + heads - 1) / heads), 1.f / std::sqrt(float(H))};
}

}  // namespace

extern "C" {

// Whether the processor and the system have a matrix unit for us.
int attention_has_amx() { return amx_is_granted(); }

// Bytes of scratch memory for a thread, and floats for all of dQ before its parts are summed.
void attention_memory(const int64_t* sizes, int64_t* forward, int64_t* backward, int64_t* shared) {
  void* const nothing[4] = {};
  const int64_t strides[12] = {};
  const Problem p = problem(nothing, strides, nullptr, nullptr, sizes);
  *forward = forward_bytes(p.blocks(), p.width);
  *backward = backward_bytes(p.blocks(), p.width);
  *shared = p.parts * p.B * p.N * p.blocks() * p.width * kBlock;
}

// tensors: q, k, v, y; strides: of their B, T and heads; sizes: B, T, N, K, H
void attention_forward(void* const* tensors, const int64_t* strides, float* lse,
                       const int32_t* segment, const int64_t* sizes, char* memory, int amx,
                       int threads) {
  const Problem p = problem(tensors, strides, lse, segment, sizes);
  const int64_t bytes = forward_bytes(p.blocks(), p.width);
#pragma omp parallel num_threads(threads)
  {
    const Multiplier multiply(amx);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p.B * p.N * p.parts; unit++) {
      const int64_t head = unit / p.parts;
      forward_unit(p, head / p.N, head % p.N, int(unit % p.parts), multiply,
                   memory + thread_number() * bytes);
    }
  }
}

// tensors: q, k, v, y, dy, dq, dk, dv
void attention_backward(void* const* tensors, const int64_t* strides, float* lse,
                        const int32_t* segment, const int64_t* sizes, char* memory, float* shared,
                        int amx, int threads) {
  const Problem p = problem(tensors, strides, lse, segment, sizes);
  const Gradients g{view(tensors[4], strides + 12), view(tensors[5], strides + 15),
                    view(tensors[6], strides + 18), view(tensors[7], strides + 21), shared};
  const int64_t bytes = backward_bytes(p.blocks(), p.width);
#pragma omp parallel num_threads(threads)
  {
    const Multiplier multiply(amx);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p.B * p.K * p.parts; unit++) {
      const int64_t head = unit / p.parts;
      backward_unit(p, g, head / p.K, head % p.K, int(unit % p.parts), multiply,
                    memory + thread_number() * bytes);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.B * p.N * p.blocks(); i++) {
      const int64_t head = i / p.blocks();
      write_dq(p, g, head / p.N, head % p.N, i % p.blocks(),
               reinterpret_cast<float*>(memory + thread_number() * bytes));
    }
  }
}
}
