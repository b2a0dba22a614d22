// Products of small bf16 matrices into fp32, on the matrix unit where the processor has one (AMX).
//
// A is [M, K] of bf16, row by row. B is packed: panels of kPanel columns, each [K / 2, kPanel] of
// words that hold two bf16 which are neighbours along K, the earlier one in the lower half. C is
// [M, N] of fp32. M, N and K are multiples of 32; what is missing is filled with zeros.

#pragma once

#include "vector.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int kPanel = 32;

typedef Vectors<kLanes>::U Words;

// Two more terms of a sum in every lane: both halves of `a` times both halves of the words of `b`.
inline Vec<kLanes> add_pair(Vec<kLanes> total, uint32_t a, Words b) {
#if defined(__AVX512BF16__)
  const __m512i left = _mm512_set1_epi32(int(a)), right = (__m512i)b;
  return (Vec<kLanes>)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)right);
#else
  const Words low = b << 16, high = b & 0xffff0000u;
  total += from_bf16(uint16_t(a)) * (Vec<kLanes>)low;
  return total + from_bf16(uint16_t(a >> 16)) * (Vec<kLanes>)high;
#endif
}

// R rows times two vectors of columns, the sums in registers.
template <int R>
inline void vector_block(int K, const uint16_t* A, int lda, const uint32_t* B, float* C, int ldc,
                         bool add) {
  constexpr int W = kLanes;
  Vec<W> sums[R][2];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 2; c++) sums[r][c] = add ? load<W>(C + r * ldc + c * W) : Vec<W>{};
  for (int k = 0; k < K; k += 2) {
    const uint32_t* words = B + k / 2 * kPanel;
    const Words first = *reinterpret_cast<const Words*>(words);
    const Words second = *reinterpret_cast<const Words*>(words + W);
    for (int r = 0; r < R; r++) {
      uint32_t a;
      memcpy(&a, A + r * lda + k, sizeof a);
      sums[r][0] = add_pair(sums[r][0], a, first);
      sums[r][1] = add_pair(sums[r][1], a, second);
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 2; c++) store<W>(C + r * ldc + c * W, sums[r][c]);
}

#if defined(HAVE_AMX)
// Two by two tiles of 16 x 16 sums.
inline void amx_block(int K, const uint16_t* A, int lda, const uint32_t* B, float* C, int ldc,
                      bool add) {
  // the compiler does not know that tiles are loaded from memory
  asm volatile("" ::: "memory");
  float* below = C + 16 * ldc;
  if (add) {
    _tile_loadd(0, C, ldc * 4);
    _tile_loadd(1, C + 16, ldc * 4);
    _tile_loadd(2, below, ldc * 4);
    _tile_loadd(3, below + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < K; k += 32) {
    const uint32_t* words = B + k / 2 * kPanel;
    _tile_loadd(4, A + k, lda * 2);
    _tile_loadd(5, A + 16 * lda + k, lda * 2);
    _tile_loadd(6, words, kPanel * 4);
    _tile_loadd(7, words + 16, kPanel * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, ldc * 4);
  _tile_stored(1, C + 16, ldc * 4);
  _tile_stored(2, below, ldc * 4);
  _tile_stored(3, below + 16, ldc * 4);
}
#endif

// The system gives the matrix unit's registers to a process that asks for them.
inline bool amx_is_granted() {
#if defined(HAVE_AMX)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// A thread's hold on the matrix unit, where it is to be used: eight tiles of 16 rows of 64 bytes.
class Multiplier {
 public:
  explicit Multiplier(bool amx) : amx_(amx) {
#if defined(HAVE_AMX)
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    asm volatile("" ::: "memory");
    if (amx_) _tile_loadconfig(&shapes);
#endif
  }
  ~Multiplier() {
#if defined(HAVE_AMX)
    if (amx_) _tile_release();
#endif
  }
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;

  // C = A B, or C += A B
  void run(int M, int N, int K, const uint16_t* A, int lda, const uint32_t* B, float* C, int ldc,
           bool add) const {
    constexpr int R = kRegisters == 32 ? 8 : 4;
    for (int n = 0; n < N; n += kPanel) {
      const uint32_t* panel = B + n / 2 * K;
      for (int m = 0; m < M; m += 32) {
        const uint16_t* rows = A + m * lda;
        float* out = C + m * ldc + n;
#if defined(HAVE_AMX)
        if (amx_) {
          amx_block(K, rows, lda, panel, out, ldc, add);
          continue;
        }
#endif
        for (int c = 0; c < kPanel; c += 2 * kLanes)
          for (int r = 0; r < 32; r += R)
            vector_block<R>(K, rows + r * lda, lda, panel + c, out + r * ldc + c, ldc, add);
      }
    }
  }

 private:
  const bool amx_;
};

// out[j][i] = in[i][j] for a square of kLanes words: log2(kLanes) rounds of exchanges of pairs.
inline void transpose_words(const uint32_t* in, int ldi, uint32_t* out, int ldo) {
  constexpr int W = kLanes;
#if defined(__clang__)
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) out[j * ldo + i] = in[i * ldi + j];
#else
  Words rows[W];
  for (int i = 0; i < W; i++) memcpy(&rows[i], in + i * ldi, sizeof rows[i]);
  for (int d = 1; d < W; d *= 2) {
    Words upper, lower;
    for (int l = 0; l < W; l++) {
      upper[l] = l & d ? l - d + W : l;
      lower[l] = l & d ? l + W : l + d;
    }
    for (int i = 0; i < W; i++)
      if (!(i & d)) {
        const Words x = rows[i], y = rows[i + d];
        rows[i] = __builtin_shuffle(x, y, upper);
        rows[i + d] = __builtin_shuffle(x, y, lower);
      }
  }
  for (int j = 0; j < W; j++) memcpy(out + j * ldo, &rows[j], sizeof rows[j]);
#endif
}

// Packs [K, N] of bf16, row by row: neighbours along K are neighbouring rows.
inline void pack_rows(const uint16_t* in, int ldi, int K, int N, uint32_t* out) {
  typedef Vectors<kLanes>::U16 Halves;
  for (int n = 0; n < N; n += kPanel)
    for (int k = 0; k < K; k += 2) {
      uint32_t* words = out + n / 2 * K + k / 2 * kPanel;
      const uint16_t* rows = in + k * ldi + n;
      for (int i = 0; i < kPanel; i += kLanes) {
        const auto low = *reinterpret_cast<const Halves*>(rows + i);
        const auto high = *reinterpret_cast<const Halves*>(rows + ldi + i);
        *reinterpret_cast<Words*>(words + i) = __builtin_convertvector(low, Words) |
                                               __builtin_convertvector(high, Words) << 16;
      }
    }
}

// Packs the transpose of [N, K] of bf16, row by row: neighbours along K lie side by side.
inline void pack_columns(const uint16_t* in, int ldi, int N, int K, uint32_t* out) {
  for (int n = 0; n < N; n += kLanes)
    for (int k = 0; k < K; k += 2 * kLanes) {
      const uint16_t* square = in + n * ldi + k;
      uint32_t* words = out + n / kPanel * kPanel / 2 * K + k / 2 * kPanel + n % kPanel;
      transpose_words(reinterpret_cast<const uint32_t*>(square), ldi / 2, words, kPanel);
    }
}

// From such a packing of [N, K]: its transpose [K, N], row by row.
inline void unpack_columns(const uint32_t* in, int N, int K, uint16_t* out) {
  typedef Vectors<kLanes>::U16 Halves;
  for (int n = 0; n < N; n += kLanes)
    for (int k = 0; k < K; k += 2) {
      const uint32_t* words = in + n / kPanel * kPanel / 2 * K + k / 2 * kPanel + n % kPanel;
      const Words pairs = *reinterpret_cast<const Words*>(words);
      *reinterpret_cast<Halves*>(out + k * N + n) = __builtin_convertvector(pairs & 0xffff, Halves);
      *reinterpret_cast<Halves*>(out + (k + 1) * N + n) = __builtin_convertvector(pairs >> 16, Halves);
    }
}
