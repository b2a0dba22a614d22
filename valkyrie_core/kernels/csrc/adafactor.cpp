// One update of Adafactor for a matrix that is stored in bf16, in three passes over its gradient.
//
//   v_ij = r_i c_j / mean(r)       r, c: running means of the rows and columns of g^2
//   u    = g / sqrt(v)             divided by max(1, rms(u) / d)
//   p   <- p (1 - decay) - alpha u alpha: the rate times the larger of rms(p) and a least scale
//
// Arithmetic is fp32. The result is rounded up or down at random; what is drawn for an element
// follows from two seeds and its place. Sums go row by row, or over blocks of rows in their order:
// the bits do not depend on the number of threads.

#include <cmath>

#include "vector.h"

namespace {

constexpr int64_t kBlock = 64;  // rows whose columns are summed by one thread
constexpr int kParts = 16;      // partial sums of a row

inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// an integer hash with little bias (Wellons, "lowbias32")
inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// bf16 is the upper half of fp32: adding less than 2^16 carries by chance
inline uint16_t rounded(float x, uint32_t place, uint32_t seed, uint32_t second) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + (mixed(mixed(place ^ seed) ^ second) >> 16)) >> 16);
}

struct Sums {
  double p, g;
};

// Adds a row's squares to the sums of its block's columns; returns those of the row.
Sums square_row(const uint16_t* p, const uint16_t* g, float* columns, int64_t C) {
  float of_p[kParts] = {}, of_g[kParts] = {};
  int64_t j = 0;
  for (; j + kParts <= C; j += kParts)
    for (int k = 0; k < kParts; k++) {
      const float x = widened(p[j + k]), y = widened(g[j + k]), square = y * y;
      of_p[k] += x * x;
      of_g[k] += square;
      columns[j + k] += square;
    }
  Sums total = {};
  for (; j < C; j++) {
    const float x = widened(p[j]), y = widened(g[j]);
    total.p += x * x;
    total.g += y * y;
    columns[j] += y * y;
  }
  for (int k = 0; k < kParts; k++) total.p += of_p[k], total.g += of_g[k];
  return total;
}

inline float slope(float row, float column, float least) {
  const float v = row * column;
  return 1.f / std::sqrt(v > least ? v : least);
}

double square_updates(const uint16_t* g, float row, const float* columns, float least, int64_t C) {
  float parts[kParts] = {};
  double total = 0;
  int64_t j = 0;
  for (; j + kParts <= C; j += kParts)
    for (int k = 0; k < kParts; k++) {
      const float u = widened(g[j + k]) * slope(row, columns[j + k], least);
      parts[k] += u * u;
    }
  for (; j < C; j++) {
    const float u = widened(g[j]) * slope(row, columns[j], least);
    total += u * u;
  }
  for (int k = 0; k < kParts; k++) total += parts[k];
  return total;
}

void update_row(uint16_t* p, const uint16_t* g, float row, const float* columns, float least,
                float keep, float rate, int64_t C, uint32_t place, uint32_t seed, uint32_t second) {
  for (int64_t j = 0; j < C; j++) {
    const float u = widened(g[j]) * slope(row, columns[j], least);
    p[j] = rounded(widened(p[j]) * keep - rate * u, place + static_cast<uint32_t>(j), seed, second);
  }
}

}  // namespace

extern "C" {

// rows of scratch that `adafactor` needs, each of C floats; besides, 2 R doubles
int64_t adafactor_blocks(int64_t R) { return (R + kBlock - 1) / kBlock; }

void adafactor(uint16_t* p, const uint16_t* g, float* row_var, float* column_var, float* scratch,
               double* of_rows, int64_t R, int64_t C, double rate, double share, double epsilon,
               double least_scale, double d, double decay, uint32_t seed, uint32_t second,
               int threads) {
  const int64_t blocks = adafactor_blocks(R);
  double* of_p = of_rows + R;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    float* columns = scratch + b * C;
    memset(columns, 0, C * sizeof(float));
    const int64_t stop = (b + 1) * kBlock < R ? (b + 1) * kBlock : R;
    for (int64_t i = b * kBlock; i < stop; i++) {
      const Sums sums = square_row(p + i * C, g + i * C, columns, C);
      of_p[i] = sums.p;
      of_rows[i] = sums.g;
    }
  }
  double square_p = 0, mean_row = 0;
  for (int64_t i = 0; i < R; i++) {
    square_p += of_p[i];
    row_var[i] += static_cast<float>(share) * (static_cast<float>(of_rows[i] / C) - row_var[i]);
    mean_row += row_var[i];
  }
  mean_row /= R;
  for (int64_t b = 1; b < blocks; b++)
    for (int64_t j = 0; j < C; j++) scratch[j] += scratch[b * C + j];
  for (int64_t j = 0; j < C; j++)
    column_var[j] += static_cast<float>(share) * (scratch[j] / R - column_var[j]);
  const float part = 1. / (mean_row > epsilon ? mean_row : epsilon);
  const float least = epsilon * epsilon;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < R; i++)
    of_rows[i] = square_updates(g + i * C, row_var[i] * part, column_var, least, C);
  double square_u = 0;
  for (int64_t i = 0; i < R; i++) square_u += of_rows[i];
  const double count = static_cast<double>(R) * C, rms = std::sqrt(square_u / count) / d;
  const double size = std::sqrt(square_p / count);
  const double step = rate * (size > least_scale ? size : least_scale) / (rms > 1 ? rms : 1);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < R; i++)
    update_row(p + i * C, g + i * C, row_var[i] * part, column_var, least, 1. - decay, step, C,
               static_cast<uint32_t>(i * C), seed, second);
}

// the sum of squares of bf16 numbers
double sum_of_squares(const uint16_t* x, int64_t count, double* of_rows, int threads) {
  constexpr int64_t piece = 1 << 14;
  const int64_t pieces = (count + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < pieces; b++) {
    const int64_t stop = (b + 1) * piece < count ? (b + 1) * piece : count;
    float parts[kParts] = {};
    double total = 0;
    int64_t i = b * piece;
    for (; i + kParts <= stop; i += kParts)
      for (int k = 0; k < kParts; k++) parts[k] += widened(x[i + k]) * widened(x[i + k]);
    for (; i < stop; i++) total += widened(x[i]) * widened(x[i]);
    for (int k = 0; k < kParts; k++) total += parts[k];
    of_rows[b] = total;
  }
  double total = 0;
  for (int64_t b = 0; b < pieces; b++) total += of_rows[b];
  return total;
}
}
