// The WKV-7 recurrence over plain tensors: see wkv7.h.
//
// Inputs and outputs are [B, T, N, H], contiguous, each in fp32 or bf16.

#include "wkv7.h"

namespace {

struct Problem {
  Row r, log_decay, k, v, a, b;
};

struct Plain {
  struct More {};
  const Problem& in;
  Row y;        // forward
  Row dy;       // backward
  Problem out;  // backward

  void token(size_t at, Token& x) const {
    alignas(64) float g[H];
    read(in.r, at, x.r);
    read(in.log_decay, at, g);
    read(in.k, at, x.k);
    read(in.v, at, x.v);
    read(in.a, at, x.a);
    read(in.b, at, x.b);
    decay(g, x.w);
  }

  void fetch(size_t at) const {
    for (int q = 0; q < H; q += W)
      for (const Row* row : {&in.r, &in.log_decay, &in.k, &in.v, &in.a, &in.b})
        ::fetch<0>(*row, at + q);
  }

  void output(size_t at, const Token&, const float* row) const { write(y, at, row); }

  void padding(size_t at) const {
    alignas(64) const float nothing[H] = {};
    write(y, at, nothing);
  }

  void gradient(size_t at, const Token&, float* row, More&) const { read(dy, at, row); }

  void gradients(size_t at, const Token&, const Sums& sums, const float* dv, const More&) const {
    write(out.r, at, sums.r);
    write(out.log_decay, at, sums.w);
    write(out.k, at, sums.k);
    write(out.v, at, dv);
    write(out.a, at, sums.a);
    write(out.b, at, sums.b);
  }

  void fetch_back(size_t at) const {
    for (const Row* row : {&out.r, &out.log_decay, &out.k, &out.v, &out.a, &out.b})
      ::fetch<1>(*row, at);
  }

  void padding_back(size_t at) const {
    alignas(64) const float nothing[H] = {};
    for (const Row* row : {&out.r, &out.log_decay, &out.k, &out.v, &out.a, &out.b})
      write(*row, at, nothing);
  }
};

Problem problem(void* const* tensors, const int* bf16) {
  const auto row = [&](int i) { return Row{static_cast<char*>(tensors[i]), bf16[i]}; };
  return {row(0), row(1), row(2), row(3), row(4), row(5)};
}

}  // namespace

extern "C" {

int wkv7_checkpoint() { return kCheckpoint; }

void wkv7_forward(void* const* inputs, const int* bf16, const uint8_t* flags, const float* state,
                  void* y, int y_bf16, float* final, float* sa, float* checkpoints, int64_t B,
                  int64_t T, int64_t N, int threads) {
  const Problem in = problem(inputs, bf16);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < B * N; head++) {
    Plain io{in, {static_cast<char*>(y), y_bf16}, {}, {}};
    forward_head(io, Place(head, T, N, flags), state, final, sa, checkpoints);
  }
}

// returns 0, or 1 where memory ran out
int wkv7_backward(void* const* inputs, const int* bf16, const uint8_t* flags, const float* sa,
                  const float* checkpoints, void* dy, int dy_bf16, const float* d_final,
                  void* const* grads, float* d_state, int64_t B, int64_t T, int64_t N,
                  int threads) {
  const Problem in = problem(inputs, bf16);
  return over_heads_back<Plain>(B * N, threads, [&](int64_t head, Stretch<Plain>& m) {
    Plain io{in, {}, {static_cast<char*>(dy), dy_bf16}, problem(grads, bf16)};
    backward_head(io, Place(head, T, N, flags), sa, checkpoints, d_final, d_state, m);
  });
}
}
