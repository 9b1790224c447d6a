// The instructions of csrc/cuda/ptx.h in plain C++, by the PTX manual (ISA 9.0: cp.async 9.7.9.25,
// ldmatrix 9.7.15.5.15, mma.m16n8k16 9.7.15.5.8).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define VICO_DYNAMIC_SHARED(name) uint4* const name = (uint4*)emulator::shared_memory

namespace vico {
namespace ptx {

inline void copy_async_16(void* to, const void* from, int bytes) {
  emulator::copy_later(to, from, bytes);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}

template <typename T>
void keep(T*&) {}

inline void prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }

template <bool kTransposed>
void exchange_matrices(uint32_t (&to)[4], const void* row) {
  emulator::check_shared(row, 16);
  emulator::note_access(row, 16, false);
  emulator::exchange(
      [](emulator::Lane*(&lanes)[32]) EMULATOR_UNWATCHED {
        for (int lane = 0; lane < 32; ++lane) {
          uint32_t found[4];
          for (int m = 0; m < 4; ++m)
            for (int i = 0; i < 2; ++i) {
              const int along = lane / 4, across = 2 * (lane % 4) + i;
              const int r = kTransposed ? across : along, c = kTransposed ? along : across;
              const uint16_t* row;
              std::memcpy(&row, lanes[8 * m + r]->in, sizeof(row));
              found[m] = i == 0 ? row[c] : found[m] | static_cast<uint32_t>(row[c]) << 16;
            }
          std::memcpy(lanes[lane]->out, found, sizeof(found));
        }
      },
      kTransposed ? "ldmatrix.trans" : "ldmatrix", &row, sizeof(row), to, sizeof(to));
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { exchange_matrices<false>(to, row); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  exchange_matrices<true>(to, row);
}

struct Fragments {
  uint32_t a[4], b[2];
  float sum[4];
};

inline float widened(__half x) { return __half2float(x); }
inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
float element(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T x;
  std::memcpy(&x, &bits, sizeof(x));
  return widened(x);
}

// The manual's figures say for each lane which elements it holds; here the other way round: who
// holds the element at (row, column).
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
  emulator::exchange(
      [](emulator::Lane*(&lanes)[32]) {
        static Fragments of[32];
        for (int i = 0; i < 32; ++i) std::memcpy(&of[i], lanes[i]->in, sizeof(Fragments));
        for (int row = 0; row < 16; ++row)
          for (int column = 0; column < 8; ++column) {
            float& out = of[row % 8 * 4 + column / 2].sum[row / 8 * 2 + column % 2];
            for (int k = 0; k < 16; ++k) {
              const Fragments& left = of[row % 8 * 4 + k % 8 / 2];
              const Fragments& right = of[column * 4 + k % 8 / 2];
              out += element<T>(left.a[row / 8 + k / 8 * 2], k % 2) *
                     element<T>(right.b[k / 8], k % 2);
            }
          }
        for (int i = 0; i < 32; ++i) std::memcpy(lanes[i]->out, of[i].sum, sizeof(of[i].sum));
      },
      "mma", &in, sizeof(in), sum, sizeof(sum));
}

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // ftz; NaN stays
}

}  // namespace ptx
}  // namespace vico
