// Tile shapes of the kernels: one place, read by the kernels and by tilemask_tile().
#pragma once

#include "tilemask.h"

struct TileShape {
  int block_m, block_n;  // query rows and key columns
  int warps;
  int row_tiles;  // a warp's blocks of 16 rows; of 16 columns for dK and dV
  int across;     // warps that share those and divide the other side
};

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int MOST_SHARED = 99 * 1024;  // bytes of a block on sm_86, sm_89 and sm_120
constexpr int RESERVED_SHARED = 1024;   // by the driver, of every block
constexpr int DECODE_ROWS = 16;         // up to so many query rows run in decode tiles

// Chosen by counting registers and shared memory; no GPU has measured them yet.
constexpr TileShape forward_tile(int width) {
  if (width <= 64) return {128, 64, 4, 2, 1};
  if (width <= 128) return {128, 32, 4, 2, 1};
  return {64, 64, 4, 1, 1};
}

// Instead of it at width 256, on GPUs of whose multiprocessors one holds a block of this and not
// two of that (sm_80): see forward_rows().
constexpr TileShape wide_forward_tile(int width) {
  return width <= 128 ? forward_tile(width) : TileShape{128, 64, 8, 1, 1};
}

constexpr TileShape decode_tile(int width) {
  if (width <= 128) return {DECODE_ROWS, 128, 4, 1, 4};
  return {DECODE_ROWS, 64, 4, 1, 4};
}

// general: with options, which take registers; the tile is the same.
constexpr TileShape dq_tile(int width, bool general = false) {
  if (width <= 64) return {128, 32, 4, 2, 1};
  if (width <= 128) return general ? TileShape{128, 32, 8, 1, 1} : TileShape{128, 32, 4, 2, 1};
  return {64, 16, 4, 1, 1};
}

constexpr TileShape dkv_tile(int width, bool general = false) {
  if (width <= 64) return general ? TileShape{32, 128, 8, 1, 1} : TileShape{32, 128, 4, 2, 1};
  if (width <= 128) return {32, 64, 4, 2, 2};
  return {32, 32, 4, 1, 2};
}

// dQ, dK and dV at once. Only on GPUs with room for it: see dqkv_workspace().
constexpr TileShape dqkv_tile(int width) {
  if (width <= 64) return {32, 128, 4, 2, 1};
  if (width <= 128) return {64, 128, 8, 2, 2};
  return {64, 64, 8, 1, 2};
}
