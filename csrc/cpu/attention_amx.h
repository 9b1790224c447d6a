// A group of bf16 query rows against a range of logical keys, on AMX tiles.
//
// Scores come out transposed, keys x rows: K tiles are read as they are stored and the softmax has
// the rows in the lanes. Weights are rounded to bf16 and transposed in registers for the weighted
// sum. Of 32 columns of V the even ones lie first, then the odd ones (two rows become pairs without
// a shuffle); the sums are put in order once, at the end. Bound by the tile products at many rows,
// by memory at few.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_rows.h"

namespace vico {
namespace VICO_ISA {

constexpr int kAmxKeys = 128;  // of a tile of keys: sums of 32 x d are read and written once each
constexpr int kFewKeys = 64;  // of a tile for up to eight rows: V in pairs stays in the first cache
constexpr int kAmxRows = 256;  // of a group: K and V of a tile are made ready once for so many
constexpr int kAmxStep = 32;   // keys of two tiles of scores, or of one of weights

// Memory is asked for the next tile in each phase of this one, a few lines at a time: many at once
// would stand before what the phase itself reads.

inline int tile_width(int rows_left) { return rows_left > 16 ? 32 : 16; }
inline int tile_rows(int rows) {
  return rows / 32 * 32 + (rows % 32 == 0 ? 0 : tile_width(rows % 32));
}

// Memory of one thread; sizes in floats, which hold two bf16.
struct TileScratch {
  float* o;       // [kAmxRows, columns], columns of 32 in the order above
  float* q;       // block by block [depth / 2][width] pairs
  float* scores;  // [kAmxKeys][32]
  float* p;       // [32][kAmxKeys] bf16
  float* k;       // [kAmxKeys][depth] bf16, where keys can't be read in place
  float* v;       // [kAmxKeys / 2][columns] pairs
  float* rows;    // [3, kAmxRows]
  float* angles;  // [kAngleFloats]

  static int depth(int d) { return (d + 31) / 32 * 32; }
  static int columns(int d) { return (d + 15) / 16 * 16; }
  static int64_t floats(int d) {
    return int64_t{columns(d)} * (kAmxRows + kAmxKeys / 2) +
           int64_t{depth(d)} / 2 * (kAmxRows + kAmxKeys) + kAmxKeys * (32 + 16) + 3 * kAmxRows +
           kAngleFloats + 16;
  }
  explicit TileScratch(float* memory, int d) {
    auto* at =
        reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
    const auto take = [&at](int64_t floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    o = take(int64_t{kAmxRows} * columns(d));
    q = take(int64_t{kAmxRows} * depth(d) / 2);
    scores = take(kAmxKeys * 32);
    p = take(kAmxKeys * 16);
    k = take(int64_t{kAmxKeys} * depth(d) / 2);
    v = take(int64_t{kAmxKeys} / 2 * columns(d));
    rows = take(3 * kAmxRows);
    angles = take(kAngleFloats);
  }
  RowState state() const { return {rows, rows + kAmxRows, rows + 2 * kAmxRows}; }
};

// The lanes of a row of d that lie in [at, at + 32).
VICO_INLINE __mmask32 lanes_from(int at, int d) {
  return d - at >= 32 ? ~__mmask32{0} : (__mmask32{1} << (d - at)) - 1;
}

inline void pack_tile_queries(const BFloat16* q, int64_t q_token, int64_t q_head, const Work& w,
                              float* packed) {
  const int depth = TileScratch::depth(w.d);
  auto* out = reinterpret_cast<uint32_t*>(packed);
  for (int first = 0, width; first < w.rows; first += width, out += width * (depth / 2)) {
    width = tile_width(w.rows - first);
    for (int part = 0; part < width; part += 16)
      for (int at = 0; at < depth; at += 32) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t row = first + part + i;
          r[i] = _mm512_setzero_si512();
          if (row >= w.rows) continue;
          const int64_t n = w.row0 + row;
          r[i] = _mm512_maskz_loadu_epi16(lanes_from(at, w.d),
                                          q + n / w.share * q_token + n % w.share * q_head + at);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (at / 2 + i) * width + part, r[i]);
      }
  }
}

// Where the K tiles of 16 keys are.
struct TileKeys {
  const void* at[kAmxKeys / 16];
  int64_t stride[kAmxKeys / 16];  // bytes from key to key
};

// Keys that lie evenly in memory are read there; others are copied, rotated where their page has
// moved, or zeros beyond the last one.
template <typename Source>
void stage_keys(const Located<BFloat16, kAmxKeys>& from, int64_t k_at, Source& source,
                const TileScratch& m, TileKeys* to) {
  const int d = source.head_dim(), depth = TileScratch::depth(d);
  auto* copies = reinterpret_cast<BFloat16*>(m.k);
  const int keys = (from.n + kAmxStep - 1) / kAmxStep * kAmxStep;
  for (int first = 0; first < keys; first += 16) {
    const int last = first + 15;
    if (d == depth && last < from.n && from.entry[first] == from.entry[last] &&
        !source.moved(from.entry[first])) {
      to->at[first / 16] = from.k[first] + k_at;
      to->stride[first / 16] = (from.k[first + 1] - from.k[first]) * int64_t{sizeof(BFloat16)};
      continue;
    }
    to->at[first / 16] = copies + first * depth;
    to->stride[first / 16] = depth * int64_t{sizeof(BFloat16)};
    for (int j = first; j <= last; ++j) {
      BFloat16* out = copies + j * depth;
      const BFloat16* key = j < from.n ? from.k[j] + k_at : nullptr;
      alignas(64) float turned[kMaxHeadDim];
      alignas(64) BFloat16 rounded[kMaxHeadDim];
      if (key != nullptr && source.moved(from.entry[j])) {
        source.key(key, from.entry[j], turned);
        store_row(turned, rounded, d);
        key = rounded;
      }
      for (int at = 0; at < depth; at += 32) {
        const __mmask32 lanes = key == nullptr ? 0 : lanes_from(at, d);
        _mm512_store_si512(out + at, _mm512_maskz_loadu_epi16(lanes, key + at));
      }
    }
  }
}

// Values of two keys in pairs, 32 columns at a time: even ones, then odd ones. A last 16 are in
// order.
VICO_INLINE void pair_columns(__m512i a, __m512i b, uint32_t* out) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  _mm512_store_si512(out, _mm512_mask_blend_epi16(kOdd, a, _mm512_slli_epi32(b, 16)));
  _mm512_store_si512(out + 16, _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(a, 16), b));
}
VICO_INLINE void pair_values(const BFloat16* first, const BFloat16* second, int d, uint32_t* out) {
  int at = 0;
  for (; at + 32 <= d; at += 32)
    pair_columns(_mm512_loadu_si512(first + at), _mm512_loadu_si512(second + at), out + at);
  if (at == d) return;
  const __mmask32 lanes = lanes_from(at, d);
  if (at + 16 < d)
    return pair_columns(_mm512_maskz_loadu_epi16(lanes, first + at),
                        _mm512_maskz_loadu_epi16(lanes, second + at), out + at);
  const auto half = static_cast<__mmask16>(lanes);
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(half, first + at));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(half, second + at));
  _mm512_store_si512(out + at, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}

// scores[key][row] of a block of 16 * NV rows; q is [depth / 2][16 * NV] pairs.
template <int NV>
void score_tiles(const float* q, const TileKeys& keys, int steps, int depth, float* scores,
                 Ahead* ahead) {
  constexpr int kWidth = 16 * NV, kRow = kWidth * sizeof(float);
  tiles_read_memory();
  for (int step = 0; step < steps; ++step, scores += kAmxStep * kWidth) {
    const char* k0 = static_cast<const char*>(keys.at[2 * step]);
    const char* k1 = static_cast<const char*>(keys.at[2 * step + 1]);
    const int64_t stride0 = keys.stride[2 * step], stride1 = keys.stride[2 * step + 1];
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (NV == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int at = 0; at < depth; at += 32) {
      const float* queries = q + at / 2 * kWidth;
      ahead->ask();
      _tile_loadd(4, k0 + at * 2, stride0);
      _tile_loadd(6, queries, kRow);
      _tile_loadd(5, k1 + at * 2, stride1);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (NV == 2) {
        _tile_loadd(7, queries + 16, kRow);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, scores, kRow);
    _tile_stored(1, scores + 16 * kWidth, kRow);
    if constexpr (NV == 2) {
      _tile_stored(2, scores + 16, kRow);
      _tile_stored(3, scores + 16 * kWidth + 16, kRow);
    }
  }
}

// Scores to weights exp(score - top), rounded to bf16, as p[row][key].
template <int NV, bool NARROW, bool MASKED>
void soften_tiles(float* s, int steps, float scale, const RowMask* mask, const RowState& state,
                  uint16_t* p, Ahead* ahead) {
  constexpr int kWidth = 16 * NV;
  constexpr float kLog2E = 1.44269504088896341f;
  const int keys = steps * kAmxStep;
  const __m512 lowest = _mm512_set1_ps(kNegInf), factor = _mm512_set1_ps(scale);
  for (int v = 0; v < NV; ++v, s += 16, p += 16 * kAmxKeys) {
    const __m512 before = _mm512_loadu_ps(state.top + v * 16);
    __m512 tops[4] = {before, before, before, before};
    if constexpr (MASKED) {
      const __m512i first = _mm512_load_si512(mask->first + v * 16);
      const __m512i last = _mm512_load_si512(mask->last + v * 16);
      for (int j = 0; j < keys; ++j) {
        const __m512i key = _mm512_set1_epi32(j);
        __mmask16 seen = _mm512_cmpge_epi32_mask(last, key);
        if (j >= mask->sinks) seen &= _mm512_cmple_epi32_mask(first, key);
        const __m512 x = _mm512_mask_mul_ps(lowest, seen, _mm512_load_ps(s + j * kWidth), factor);
        _mm512_store_ps(s + j * kWidth, x);
        tops[j % 4] = _mm512_max_ps(x, tops[j % 4]);  // NaN leaves it
      }
    } else {
      for (int j = 0; j < keys; j += 4) {
        ahead->ask();
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512 x = _mm512_mul_ps(_mm512_load_ps(s + (j + i) * kWidth), factor);
          _mm512_store_ps(s + (j + i) * kWidth, x);
          tops[i] = _mm512_max_ps(x, tops[i]);
        }
      }
    }
    const __m512 top =
        _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    _mm512_storeu_ps(state.top + v * 16, top);
    // -inf - -inf where a row has seen nothing yet
    const __m512 base =
        _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, lowest, _CMP_EQ_OQ), _mm512_setzero_ps());
    // The difference first: a product rounded on its own would leave large scores a residue that
    // is another one in each tile.
    const auto weight = [&](const float* at) {
      const __m512 x = _mm512_sub_ps(_mm512_load_ps(at), base);
      return exp2_nonpositive(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)));
    };
    __m512 sums[2] = {};
    for (int step = 0; step < steps; ++step) {
      ahead->ask();
      ahead->ask();
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const float* at = s + (step * kAmxStep + 2 * i) * kWidth;
        const __m512 x0 = weight(at), x1 = weight(at + kWidth);
        sums[0] = _mm512_add_ps(sums[0], x0);
        sums[1] = _mm512_add_ps(sums[1], x1);
        r[i] = round_pair(x0, x1);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(p + i * kAmxKeys + step * kAmxStep, r[i]);
    }
    const __m512 rescale =
        exp2_nonpositive(_mm512_mul_ps(_mm512_sub_ps(before, base), _mm512_set1_ps(kLog2E)));
    const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(state.sum + v * 16), rescale,
                                       _mm512_add_ps(sums[0], sums[1]));
    _mm512_storeu_ps(state.sum + v * 16, sum);
    _mm512_storeu_ps(state.rescale + v * 16, rescale);
  }
}

inline void rescale_rows(int rows, int columns, const float* rescale, float* o) {
  for (int r = 0; r < rows; ++r) {
    if (rescale[r] == 1.0f) continue;
    const __m512 factor = _mm512_set1_ps(rescale[r]);
    for (int at = 0; at < columns; at += 16) {
      float* sums = o + int64_t{r} * columns + at;
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), factor));
    }
  }
}

// o[row] = o[row] * rescale[row] + p[row] . v for a block of 16 * NV rows.
template <int NV>
void weigh_tiles(const uint16_t* p, const float* v, int steps, int columns, const float* rescale,
                 float* o, Ahead* ahead) {
  rescale_rows(16 * NV, columns, rescale, o);
  tiles_read_memory();
  const int row = columns * int{sizeof(float)};
  constexpr int kP = kAmxKeys * sizeof(uint16_t);
  for (int at = 0; at < columns; at += 32) {
    const bool two = at + 16 < columns;
    float *o0 = o + at, *o1 = o + 16 * columns + at;
    _tile_loadd(0, o0, row);
    if (two) _tile_loadd(1, o0 + 16, row);
    if constexpr (NV == 2) {
      _tile_loadd(2, o1, row);
      if (two) _tile_loadd(3, o1 + 16, row);
    }
    for (int step = 0; step < steps; ++step) {
      const float* values = v + step * (kAmxStep / 2) * columns + at;
      ahead->ask();
      _tile_loadd(4, p + step * kAmxStep, kP);
      _tile_loadd(6, values, row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (NV == 2) {
        _tile_loadd(5, p + 16 * kAmxKeys + step * kAmxStep, kP);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (two) {
        _tile_loadd(7, values + 16, row);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (NV == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, o0, row);
    if (two) _tile_stored(1, o0 + 16, row);
    if constexpr (NV == 2) {
      _tile_stored(2, o1, row);
      if (two) _tile_stored(3, o1 + 16, row);
    }
  }
}

// The same for eight rows, on the narrow tiles.
inline void weigh_few(const uint16_t* p, const float* v, int steps, int columns,
                      const float* rescale, float* o, Ahead* ahead) {
  rescale_rows(8, columns, rescale, o);
  tiles_read_memory();
  const int row = columns * int{sizeof(float)};
  constexpr int kP = kAmxKeys * sizeof(uint16_t);
  for (int at = 0; at < columns; at += 32) {
    const bool two = at + 16 < columns;
    _tile_loadd(2, o + at, row);
    if (two) _tile_loadd(3, o + at + 16, row);
    for (int step = 0; step < steps; ++step) {
      const float* values = v + step * (kAmxStep / 2) * columns + at;
      ahead->ask();
      _tile_loadd(7, p + step * kAmxStep, kP);
      _tile_loadd(4, values, row);
      _tile_dpbf16ps(2, 7, 4);
      if (two) {
        _tile_loadd(5, values + 16, row);
        _tile_dpbf16ps(3, 7, 5);
      }
    }
    _tile_stored(2, o + at, row);
    if (two) _tile_stored(3, o + at + 16, row);
  }
}

// Rows of sums [columns] to [d] in place, columns in order.
inline void order_columns(float* o, int rows, int d) {
  const int columns = TileScratch::columns(d);
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int r = 0; r < rows; ++r) {
    const float* from = o + int64_t{r} * columns;
    float* to = o + int64_t{r} * d;  // never beyond what has been read, and padding: see columns()
    int at = 0;
    for (; at + 32 <= columns; at += 32) {
      const __m512 even = _mm512_loadu_ps(from + at), odd = _mm512_loadu_ps(from + at + 16);
      _mm512_storeu_ps(to + at, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(to + at + 16, _mm512_permutex2var_ps(even, high, odd));
    }
    if (at < columns) _mm512_storeu_ps(to + at, _mm512_loadu_ps(from + at));
  }
}

// All of it, for `units` KV heads whose rows lie one after another in m.q (packed), m.o and the
// state; afterwards m.o is [units * padded rows, d]. Source as attend() has it, and
// moved(entry): whether a page's keys must be rotated.
template <typename Source>
void attend_tiles(const Work& w, int units, Source& source, const TileScratch& m) {
  const int padded = tile_rows(w.rows), d = w.d;
  const bool few = w.rows <= 8;
  TileSession::configure(few);
  const int depth = TileScratch::depth(d), columns = TileScratch::columns(d);
  const RowState all = m.state();
  std::fill_n(all.top, units * padded, kNegInf);
  std::fill_n(all.sum, units * padded, 0.0f);
  std::fill_n(m.o, int64_t{units} * padded * columns, 0.0f);
  using Tile = Located<BFloat16, kAmxKeys>;
  TileKeys keys;
  RowMask mask;
  auto* p = reinterpret_cast<uint16_t*>(m.p);
  const auto* zeros = reinterpret_cast<const BFloat16*>(zero_row());

  const auto block = [&](auto nv, int64_t first, int n, int row, int rows, const float* q, float* o,
                         const RowState& state, Upcoming<BFloat16, kAmxKeys>& upcoming) {
    Ahead &ahead_k = upcoming.k, &ahead_v = upcoming.v;
    constexpr bool kFew = decltype(nv)::value == 0;
    constexpr int NV = kFew ? 1 : decltype(nv)::value;
    const Seen seen = look(w, first, n, kAmxStep, row, rows, 16 * NV, &mask);
    if (seen == Seen::kNothing) return;
    const int steps = (n + kAmxStep - 1) / kAmxStep;
    ahead_k.pace(steps * (depth / 32));
    score_tiles<NV>(q, keys, steps, depth, m.scores, &ahead_k);
    ahead_v.pace(2 * (kAmxStep / 4 + 2) * steps);  // half of it, of 16 rows
    if (seen == Seen::kSome)
      soften_tiles<NV, kFew, true>(m.scores, steps, w.scale, &mask, state, p, &ahead_v);
    else
      soften_tiles<NV, kFew, false>(m.scores, steps, w.scale, nullptr, state, p, &ahead_v);
    const auto weigh = kFew ? weigh_few : weigh_tiles<NV>;
    ahead_v.pace(steps * ((columns + 31) / 32));
    weigh(p, m.v, steps, columns, state.rescale, o, &ahead_v);
  };

  const auto process = [&](const Tile& now, const Tile* next) {
    const int count = (now.n + kAmxStep - 1) / kAmxStep * kAmxStep;
    for (int u = 0; u < units; ++u) {
      const int64_t k_at = u * source.k_unit, v_at = u * source.v_unit;
      stage_keys(now, k_at, source, m, &keys);
      Upcoming<BFloat16, kAmxKeys> upcoming(next, u, units, source);
      upcoming.k.pace(count / 2 * 8 / 5);  // five eighths of it
      auto* pairs = reinterpret_cast<uint32_t*>(m.v);
      int j = 0;
      for (; j + 2 <= now.n; j += 2, pairs += columns) {
        upcoming.k.ask();
        pair_values(now.v[j] + v_at, now.v[j + 1] + v_at, d, pairs);
      }
      for (; j < count; j += 2, pairs += columns)
        pair_values(j < now.n ? now.v[j] + v_at : zeros, zeros, d, pairs);
      const float* q = m.q + int64_t{u} * padded * depth / 2;
      for (int row = 0, width; row < w.rows; row += width, q += width * (depth / 2)) {
        width = tile_width(w.rows - row);
        const int rows = std::min(width, w.rows - row);
        const int64_t at = int64_t{u} * padded + row;
        const RowState state = all.from(static_cast<int>(at));
        if (width == 32)
          block(std::integral_constant<int, 2>{}, now.first, now.n, row, rows, q,
                m.o + at * columns, state, upcoming);
        else if (few)
          block(std::integral_constant<int, 0>{}, now.first, now.n, row, rows, q,
                m.o + at * columns, state, upcoming);
        else
          block(std::integral_constant<int, 1>{}, now.first, now.n, row, rows, q,
                m.o + at * columns, state, upcoming);
      }
    }
  };
  walk_tiles<BFloat16, kAmxKeys>(w, few ? kFewKeys : kAmxKeys, source, process);
  order_columns(m.o, units * padded, d);
}

// The engine for bf16; see OnVectors.
struct OnTiles {
  using Session = TileSession;
  static constexpr int kMost = kAmxRows, kKeys = kAmxKeys;
  static int padded(int rows) { return tile_rows(rows); }
  static int64_t floats(int d) { return TileScratch::floats(d); }

  TileScratch m;
  OnTiles(float* memory, int d, bool) : m(memory, d) {}
  void pack(const BFloat16* q, int64_t q_token, int64_t q_head, const Work& w, int64_t at) const {
    pack_tile_queries(q, q_token, q_head, w, m.q + at * (TileScratch::depth(w.d) / 2));
  }
  template <typename Source>
  void run(const Work& w, int units, Source& source) const {
    attend_tiles(w, units, source, m);
  }
};

}  // namespace VICO_ISA
}  // namespace vico
