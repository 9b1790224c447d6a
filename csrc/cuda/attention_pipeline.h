// How decode brings keys and values into shared memory: what lies where in it, and how a warp
// fetches its tiles ahead of their use and turns them by the shifts of their pages.
#pragma once

#include "cuda/attention_pages.h"
#include "cuda/attention_tile.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "vico/rotary.h"

namespace vico {

using shared::Visible;

struct DecodeArgs {
  AttentionArgs a;
  float* partial;   // [rows, H, runs, d]: weighted sums of values
  float2* state;    // [rows, H, runs]: maximum (base 2) and total
  int32_t* totals;  // [S, X]: logical keys
  int runs, row_tiles;
  int groups, per_group;  // of query heads that share a KV head and a table
  int sink_tokens, window;
  float scale;   // to base 2
  bool aligned;  // K and V rows stand at multiples of 16 bytes
  bool pairs;    // see RowTile
};

// Where a key's rows of channels start; any valid place where the key is not read.
template <typename T>
struct RowAt {
  const T *k, *v;
};

template <typename T, int kHead>
struct Plan {
  using Work = Fold<T, kHead>;
  static constexpr bool kWide = sizeof(T) == 4;
  // As many warps and stages as stay below 99 KiB a block, what the smallest device of each
  // generation has.
  static constexpr int kWarps = kWide ? (kHead <= 64    ? 4
                                         : kHead <= 128 ? 2
                                                        : 1)
                                      : (kHead <= 128 ? 4 : 2);
  static constexpr int kStages = kWide || kHead == 256 ? 2 : kHead == 128 ? 3 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocks = kHead <= 64 && !kWide ? 3 : 2;  // a multiprocessor, by registers
  static constexpr int kRowBytes = kHead * static_cast<int>(sizeof(T));
  static constexpr int kTileBytes = kTileKeys * kRowBytes;

  static constexpr int kPipeline = kWarps * kStages * 2 * kTileBytes;
  static constexpr int kRowsAt = kPipeline + Work::kBlockBytes;
  static constexpr int kEntriesAt = kRowsAt + kWarps * kTileKeys * sizeof(RowAt<T>);
  static constexpr int kWarpAt = kEntriesAt + kWarps * kStages * kTileKeys * 4;
  static constexpr int kCursorsAt = kWarpAt + kWarps * Work::kWarpBytes;
  static constexpr int kSumsAt = kCursorsAt + (kWarps + 1) * sizeof(Cursor);
  static constexpr int kShared = kSumsAt + kWarps * 4;

  static constexpr int kResults = kWarps * Work::kRows * (Work::kSumRow * 4 + 8);
  static_assert(kResults <= kPipeline, "the results take the pipeline's place");
  static_assert(kShared <= 99 * 1024, "");
};

// 16 bytes of elements that may stand anywhere.
__device__ __forceinline__ uint4 gather_16(const float* from) {
  const uint32_t* x = reinterpret_cast<const uint32_t*>(from);
  return make_uint4(x[0], x[1], x[2], x[3]);
}
template <typename T>
__device__ __forceinline__ uint4 gather_16(const T* from) {
  const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
  const auto two = [&](int i) { return x[i] | static_cast<uint32_t>(x[i + 1]) << 16; };
  return make_uint4(two(0), two(2), two(4), two(6));
}

// Lanes take the chunks of a tile one after the other, a pair of chunks at least per row: an odd
// number of eights of channels is filled up with zeros for the tensor cores.
struct Lanes {
  int chunks;  // of a row
  int key, chunk, key_step, chunk_step;

  __device__ __forceinline__ Lanes(int there, int lane)
      : chunks((there + 1) / 2 * 2),
        key(lane / chunks),
        chunk(lane % chunks),
        key_step(kWarp / chunks),
        chunk_step(kWarp % chunks) {}
};

// One warp's share of a run: fetches its keys' tiles in order, some ahead of their use. kWhole:
// rows have kHead channels and stand at multiples of 16 bytes.
template <typename T, int kHead, bool kWhole>
struct Pipeline {
  using P = Plan<T, kHead>;
  const DecodeArgs& p;
  const int32_t* table;
  Visible visible;
  Rule rule;
  int keys, low;   // logical keys; the first beside the sinks that some row sees
  int from, to;    // places
  const T *k, *v;  // of page 0, the first slot, this KV head
  int lane;
  char* tiles;     // [kStages, 2, kTileBytes]
  RowAt<T>* rows;  // [kTileKeys]
  int* entries;    // [kStages, kTileKeys]: table entries, -1 where there is no key
  Cursor opening, seam;
  Lanes lanes;  // not if kWhole
  Walker walker;

  __device__ __forceinline__ char* tile(int stage, int which) const {
    return tiles + (2 * stage + which) * P::kTileBytes;
  }

  // Starts the copies of tile number n of the share.
  __device__ __forceinline__ void fetch(int n, int stage) {
    const AttentionArgs& a = p.a;
    const int place = from + n * kTileKeys;
    if (place >= to) return;
    if (n == 0)
      walker.open(a, table, opening, lane);
    else if (place == visible.sinks && visible.hidden > 0)
      walker.open(a, table, seam, lane);
    const int j = visible.key_at(place) + lane % kTileKeys;
    const bool wanted = j < keys && (j < rule.sink_tokens || j >= low);
    int page, offset, entry;
    walker.locate(a, table, j, wanted, lane, &page, &offset, &entry);
    const unsigned read = __ballot_sync(kAllLanes, page >= 0);  // of each key a bit
    __syncwarp();  // the rows of the tile before have been read
    if (lane < kTileKeys) {
      RowAt<T> at{k, v};
      if (page >= 0)
        at = {k + (page * a.k_page + offset * a.k_slot), v + (page * a.v_page + offset * a.v_slot)};
      rows[lane] = at;
      entries[stage * kTileKeys + lane] = page >= 0 ? entry : -1;
    }
    __syncwarp();
    if constexpr (kWhole)
      copy_whole(stage, read);
    else if (p.aligned)
      copy_tile(stage, read, [](char* to, const T* from, bool there) {
        ptx::copy_async_16(to, from, there ? kChunk : 0);
      });
    else
      copy_tile(stage, read, [](char* to, const T* from, bool there) {
        *reinterpret_cast<uint4*>(to) = there ? gather_16(from) : make_uint4(0, 0, 0, 0);
      });
  }

  // Each lane has one column of chunks. Which chunk of its row a lane's place is changes by bits
  // that are known here (chunk_at), so that an address takes an addition.
  __device__ __forceinline__ void copy_whole(int stage, unsigned read) const {
    constexpr int kChunks = P::kRowBytes / kChunk, kRows = kWarp / kChunks;
    constexpr int kTogether = 4;  // places that are read before the first copy
    static_assert(kChunks <= kWarp && kTileKeys % (kRows * kTogether) == 0, "");
    const int first = lane / kChunks, chunk = lane % kChunks;
    const int at_chunk = (chunk ^ first) * kChunk, channel = chunk * (kChunk / sizeof(T));
    char* const row = tile(stage, 0) + first * P::kRowBytes;
    read = read >> first << 4;  // 16, the bytes of a copy, or 0
#pragma unroll
    for (int from = 0; from < kTileKeys; from += kRows * kTogether) {
      RowAt<T> at[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) at[j] = rows[from + j * kRows + first];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int key = from + j * kRows;
        char* const to = row + (at_chunk ^ (key % 8 * kChunk)) + key * P::kRowBytes;
        const int bytes = static_cast<int>(read >> key & kChunk);
        ptx::copy_async_16(to, at[j].k + channel, bytes);
        ptx::copy_async_16(to + P::kTileBytes, at[j].v + channel, bytes);
      }
    }
  }

  template <typename Copy>
  __device__ __forceinline__ void copy_tile(int stage, unsigned read, Copy&& copy) const {
    constexpr int kElements = kChunk / sizeof(T);
    constexpr int kTogether = P::kWide ? 2 : 4;  // places that are read before the first copy
    const int there = p.a.head_dim / kElements;
    int key = lanes.key, chunk = lanes.chunk;
    for (int i = 0; i < lanes.chunks / 2; i += kTogether) {
      RowAt<T> at[kTogether];
      int keys[kTogether], at_chunk[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        keys[j] = key;
        at_chunk[j] = chunk;
        at[j] = rows[i + j < lanes.chunks / 2 ? key : 0];
        key += lanes.key_step;
        chunk += lanes.chunk_step;
        if (chunk >= lanes.chunks) {
          chunk -= lanes.chunks;
          ++key;
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (i + j >= lanes.chunks / 2) break;
        const bool here = (read >> keys[j] & 1) != 0 && at_chunk[j] < there;
        const int channel = here ? at_chunk[j] * kElements : 0;
        copy(chunk_at<T, kHead>(tile(stage, 0), keys[j], at_chunk[j]), at[j].k + channel, here);
        copy(chunk_at<T, kHead>(tile(stage, 1), keys[j], at_chunk[j]), at[j].v + channel, here);
      }
    }
  }

  // Turns the stage's keys by the shifts of their pages, two channels and their partners a lane.
  __device__ __forceinline__ void turn(int stage, const int32_t* shifts) const {
    const AttentionArgs& a = p.a;
    constexpr int kPairs = kHead <= 128 ? 1 : kHead / 128;
    constexpr int kElements = kChunk / sizeof(T);
    const int half = a.head_dim / 2;
    int t = 0, h = 0, w = 0;
    if (lane < kTileKeys) {
      const int entry = entries[stage * kTileKeys + lane];
      if (entry >= 0) {
        const int32_t* at = shifts + entry * a.shift_entry;
        t = at[0];
        h = at[a.shift_axis];
        w = at[2 * a.shift_axis];
      }
    }
    int now_t = 0, now_h = 0, now_w = 0;
    float sine[kPairs][2], cosine[kPairs][2];
#pragma unroll 1
    for (int key = 0; key < kTileKeys; ++key) {
      const int key_t = __shfl_sync(kAllLanes, t, key), key_h = __shfl_sync(kAllLanes, h, key),
                key_w = __shfl_sync(kAllLanes, w, key);
      if ((key_t | key_h | key_w) == 0) continue;  // as they were written, or not there
      const bool moved = key_t != now_t || key_h != now_h || key_w != now_w;
      now_t = key_t, now_h = key_h, now_w = key_w;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const int f = 2 * (lane + kWarp * n);
        if (f >= half) continue;
        T* const low =
            reinterpret_cast<T*>(chunk_at<T, kHead>(tile(stage, 0), key, f / kElements)) +
            f % kElements;
        T* const high =
            reinterpret_cast<T*>(chunk_at<T, kHead>(tile(stage, 0), key, (f + half) / kElements)) +
            (f + half) % kElements;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (moved) {
            const int axis = shared::rotary_axis(f + i, a.t_section, a.h_section);
            const double shift = axis == 0 ? key_t : axis == 1 ? key_h : key_w;
            shared::sincos_turns(
                shift * (static_cast<double>(a.inv_freq[f + i]) * shared::kInvTwoPi), &sine[n][i],
                &cosine[n][i]);
          }
          float x, y;
          shared::rotate_pair(to_float(low[i]), to_float(high[i]), cosine[n][i], sine[n][i], &x,
                              &y);
          low[i] = from_float<T>(x);
          high[i] = from_float<T>(y);
        }
      }
    }
    __syncwarp();
  }
};

}  // namespace vico
