// One token through a mixture of experts (nn/moe says what it is), norm and residual included, for up
// to 8 rows: only the experts that a row meets are read.

#include <algorithm>
#include <limits>

#include "decode.h"

using namespace decode;

namespace {

enum Gate : int32_t { kSoftmax = 0, kSigmoid = 1, kTopP = 2 };

struct MoE {
  int32_t dim, hidden, experts, slots;
  int32_t gate, normalized;    // whether the weights are scaled to sum to 1 ...
  float scale;                 // ... and what they are multiplied by then
  float mass;                  // top-p's
  int32_t groups, top_groups;  // 0: all experts are one group
  int32_t shared_hidden;       // 0: there is no shared expert
  Norm norm;
  const float* router;      // [E][padded D]
  const float* confidence;  // [padded D], or null
  const float* bias;        // [E]
  const Matrix *gates, *ups, *downs;  // [E]
  Matrix shared_gate, shared_up, shared_down;
};

// A row at one of its experts.
struct Entry {
  int row;
  float weight;
  const Matrix *gate, *up, *down;
  float* hidden;  // padded to whole groups
};

int64_t widest(const MoE& m) { return padded(std::max(m.hidden, m.shared_hidden)); }
int entries(const MoE& m) { return m.slots + (m.shared_hidden ? 1 : 0); }

struct Shared {
  float* hidden;  // of every entry
  Shared(const MoE& m, Scratch& s, int B)
      : hidden(s.take<float>(B * entries(m) * widest(m))) {}
};

struct Own {
  Source normed;
  float *affinity, *ranked, *worth;
  int32_t* order;
  Entry* all;
  float* up;
  int16_t* rounded;  // of one entry's hidden layer
  Input* in;         // that of every entry
  Own(const MoE& m, Scratch& s, int B)
      : normed(s, B, m.dim), affinity(s.take<float>(padded(m.experts))),
        ranked(s.take<float>(m.experts)), worth(s.take<float>(m.experts)),
        order(s.take<int32_t>(m.experts)), all(s.take<Entry>(B * entries(m))),
        up(s.take<float>(widest(m))), rounded(s.take<int16_t>(B * entries(m) * widest(m))),
        in(s.take<Input>(B * entries(m))) {}
};

// Ids by falling value, of equal ones the first first. NaN stands behind everything.
inline void sort_ids(const float* value, int count, int32_t* ids) {
  for (int i = 0; i < count; i++) ids[i] = i;
  std::sort(ids, ids + count, [value](int32_t a, int32_t b) {
    const bool a_is = value[a] == value[a], b_is = value[b] == value[b];
    if (a_is != b_is) return a_is;
    if (a_is && value[a] != value[b]) return value[a] > value[b];
    return a < b;
  });
}

// Affinities of one row, and what its experts are ranked by.
inline void rank(const MoE& m, const float* x, const Own& own) {
  const int E = m.experts;
  const int64_t width = padded(m.dim);
  const float sure =
      m.confidence ? 2.f / (1.f + std::exp(-dot(x, m.confidence, width))) : 1.f;
  float most = -INFINITY;
  for (int e = 0; e < E; e++) {
    own.affinity[e] = sure * dot(x, m.router + e * width, width);
    most = std::max(most, own.affinity[e]);
  }
  if (m.gate == kSigmoid) {
    for (int e = 0; e < E; e++) own.affinity[e] = 1.f / (1.f + std::exp(-own.affinity[e]));
  } else {
    float sum_ = 0;
    for (int e = 0; e < E; e++) sum_ += own.affinity[e] = std::exp(own.affinity[e] - most);
    for (int e = 0; e < E; e++) own.affinity[e] /= sum_;
  }
  for (int e = 0; e < E; e++) own.ranked[e] = own.affinity[e] + m.bias[e];
  if (!m.groups) return;
  // a group is worth its two best experts; those of others are not open
  const int J = E / m.groups;
  for (int g = 0; g < m.groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int j = 0; j < J; j++) {
      const float value = own.ranked[g * J + j];
      if (value > first) {
        second = first;
        first = value;
      } else {
        second = std::max(second, value);
      }
    }
    own.worth[g] = J > 1 ? first + second : first;
  }
  sort_ids(own.worth, m.groups, own.order);
  for (int place = m.top_groups; place < m.groups; place++)
    for (int j = 0; j < J; j++) own.ranked[own.order[place] * J + j] = -INFINITY;
}

// The experts of one row and their weights; returns how many.
inline int choose(const MoE& m, int row, const Own& own, Entry* out) {
  sort_ids(own.ranked, m.experts, own.order);
  int count = 0;
  float before = 0;
  for (int k = 0; k < m.slots; k++) {
    const int e = own.order[k];
    // a row that is not finite is not, whoever computes it
    const bool open = own.ranked[e] != -INFINITY && !(before >= m.mass);
    const float weight = own.affinity[e];
    before += weight;
    if (m.gate == kTopP && k > 0 && !open) continue;
    out[count++] = {row, weight, m.gates + e, m.ups + e, m.downs + e, nullptr};
  }
  if (m.normalized) {
    float sum_ = 0;
    for (int i = 0; i < count; i++) sum_ += out[i].weight;
    // 0 where all of them underflowed; NaN stays NaN
    sum_ = std::max(sum_, std::numeric_limits<float>::min());
    for (int i = 0; i < count; i++) out[i].weight *= m.scale / sum_;
  } else {
    for (int i = 0; i < count; i++) out[i].weight *= m.scale;
  }
  return count;
}

// One row of what a matrix reads.
inline Input row_of(const Input& in, int b) {
  Input one{in.x + b * in.stride, in.rounded ? in.rounded + b * in.stride : nullptr, in.stride, {}};
  one.scale[0] = in.scale[b];
  return one;
}

}  // namespace

extern "C" {

int64_t moe_scratch(const MoE* m, int B, int threads) {
  Scratch scratch(nullptr);
  Shared all(*m, scratch, B);
  for (int t = 0; t < threads; t++) Own own(*m, scratch, B);
  return scratch.used;
}

// Pointers: x [B, D]; new x.
void moe(const void* step, void* const* pointers, void* memory, int B, int threads) {
  constexpr int W = kLanes;
  const MoE& m = *static_cast<const MoE*>(step);
  const float* x = static_cast<const float*>(pointers[0]);
  float* x_out = static_cast<float*>(pointers[1]);
  Scratch shared(memory);
  const Shared all(m, shared, B);
#pragma omp parallel num_threads(threads)
  {
    const int thread = this_thread(), team = all_threads();
    Scratch scratch = shared;
    for (int t = 0; t < thread; t++) Own skipped(m, scratch, B);
    const Own own(m, scratch, B);
    // every thread routes for itself: it costs less than waiting for another
    int count = 0;
    for (int b = 0; b < B; b++) {
      normalize(m.norm, x + int64_t(b) * m.dim, m.dim, own.normed[b]);
      rank(m, own.normed[b], own);
      count += choose(m, b, own, own.all + count);
      if (m.shared_hidden)
        own.all[count++] = {b, 1.f, &m.shared_gate, &m.shared_up, &m.shared_down, nullptr};
    }
    const Input in = own.normed.input(m.gates[0], B);
    for (int i = 0; i < count; i++) {
      Entry& entry = own.all[i];
      entry.hidden = all.hidden + i * widest(m);
      const Input one = row_of(in, entry.row);
      const Share mine = share(matvec::groups(*entry.gate), thread, team);
      matvec::multiply(*entry.gate, mine, one, 1, entry.hidden, widest(m));
      matvec::multiply(*entry.up, mine, one, 1, own.up, widest(m));
      for (int64_t j = int64_t(mine.begin) * kGroup; j < int64_t(mine.end) * kGroup; j += W) {
        const Vec<W> gate = load<W>(entry.hidden + j);
        store<W>(entry.hidden + j, gate * sigmoid<W>(gate) * load<W>(own.up + j));
      }
    }
#pragma omp barrier
    for (int i = 0; i < count; i++) {
      const Entry& entry = own.all[i];
      const int64_t width = padded(entry.down->columns);
      own.in[i] = Input{entry.hidden, nullptr, width, {}};
      if (entry.down->kind == matvec::kInt8)
        matvec::round_input(own.in[i], own.rounded + i * widest(m), 1);
    }
    const Share part = share(matvec::groups(m.downs[0]), thread, team);
    for (int group = part.begin; group < part.end; group++) {
      const int begin = group * kGroup, end = std::min(begin + kGroup, int(m.dim));
      for (int b = 0; b < B; b++)
        memcpy(x_out + int64_t(b) * m.dim + begin, x + int64_t(b) * m.dim + begin,
               (end - begin) * sizeof(float));
      for (int i = 0; i < count; i++) {
        const Entry& entry = own.all[i];
        alignas(64) float y[kGroup];
        matvec::rows<1>(*entry.down, group, own.in[i], 0, y);
        float* out = x_out + int64_t(entry.row) * m.dim;
        for (int d = begin; d < end; d++) out[d] += entry.weight * y[d - begin];
      }
    }
  }
}
}
