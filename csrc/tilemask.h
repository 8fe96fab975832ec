/* tilemask: masked attention on NVIDIA GPUs, as a plain C library.
 *
 * One struct per call, filled by the caller and passed by pointer. What returns int returns 0, or a
 * code of tilemask_error_text(): negative ones are CUDA errors (-cudaError_t), positive ones are
 * below. Nothing is allocated and nothing waits: work goes to the caller's stream, and memory that
 * a call needs beside its results is asked for first: tilemask_*_workspace return bytes.
 *
 * Tensors are in device memory. dtype is that of q, k, v, out and of their gradients. Strides and
 * steps are in elements, 0 where a dimension repeats. A NULL pointer means: not given.
 */
#ifndef TILEMASK_H
#define TILEMASK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TILEMASK_API __attribute__((visibility("default")))
#define TILEMASK_ABI 3 /* grows with every change of a struct or a function */

enum { TILEMASK_FLOAT16 = 1, TILEMASK_BFLOAT16 = 2, TILEMASK_FLOAT32 = 3 }; /* 3: bias, sums only */

enum {
  TILEMASK_OK = 0,
  TILEMASK_WRONG_ABI = 1,    /* size or abi of a struct are another version's */
  TILEMASK_WRONG_DTYPE = 2,  /* not one that this call computes */
  TILEMASK_WRONG_SIZE = 3,   /* a length, width or count is out of range */
  TILEMASK_NO_WORKSPACE = 4, /* workspace is NULL or too small */
  TILEMASK_WRONG_TILE = 5,   /* lists are missing, or were made for another tile */
  TILEMASK_NO_KERNEL = 6,    /* the library has no code for this GPU */
};

enum {
  TILEMASK_FORWARD = 0,
  TILEMASK_DECODE = 1,
  TILEMASK_DQ = 2,
  TILEMASK_DKV = 3,
  TILEMASK_DQKV = 4, /* dQ, dK and dV in one pass */
};

/* [B, heads, length, width], last stride 1 */
typedef struct TilemaskTensor {
  void* data;
  int64_t batch, head, row; /* strides */
} TilemaskTensor;

/* What every call starts with. */
typedef struct TilemaskHead {
  uint32_t size; /* sizeof of the whole struct */
  uint32_t abi;  /* TILEMASK_ABI */
  int32_t device;
  int32_t dtype;
  void* stream; /* cudaStream_t */
} TilemaskHead;

/* A row sees the columns lo <= j < hi of its interval that its words and key words let through.
 * Affine: lo = max(start, i + left), hi = min(end, i + right) for rows q_start <= i < q_end.
 * Words: bit 2a + t of word l is column 128 * group + 8a + 2l + t; words and keys start at
 * multiples of 16 bytes. */
typedef struct TilemaskMask {
  const int32_t* batch_bounds; /* [B, 6]: start end left right q_start q_end, instead of bounds */
  const int32_t* lo;           /* [B|1, H|1, Lq], with hi: explicit intervals */
  const int32_t* hi;
  const int32_t* live;   /* [B|1, H|1, Lq], 1 for rows that see anything: with words or keys */
  const uint32_t* words; /* [B1|1, B2|1, H|1, groups, Lq|1, 4]; for dK, dV: by column, see below */
  const uint32_t* keys;  /* [B|1, groups, 4] */
  int64_t interval_batch, interval_head; /* steps of lo and hi */
  int64_t live_batch, live_head;
  int64_t words_outer, words_inner, words_head, words_group, words_line;
  int64_t keys_batch;
  int32_t bounds[6];
  int32_t words_split; /* B2 where B = B1 * B2 are two batch dimensions; at least 1 */
  int32_t reserved;
} TilemaskMask;

/* The blocks that a row block visits: tilemask_lists() makes them. counts NULL: an affine mask
 * without words, whose blocks follow from its bounds. For one pass a column block has pairs
 * instead: a row block, those with partial tiles first, and the next larger column block that
 * visits it, -1 if none does. */
typedef struct TilemaskLists {
  const int32_t* counts;    /* [B|1, H|1, blocks, 2]: partial, full */
  const int32_t* blocks;    /* [B|1, H|1, blocks, 2, blocks across]; for one pass [.., across, 2] */
  int64_t batch, head;      /* heads of counts from one batch, and one head, to the next */
  int32_t block_m, block_n; /* the tile they were made for */
} TilemaskLists;

/* scores = scale * q . k -> softcap -> + bias, + ALiBi -> mask -> softmax with sink -> dropout */
typedef struct TilemaskScore {
  const void* bias; /* [B1|1, B2|1, H|1, Lq|1, Lk|1] */
  int64_t bias_outer, bias_inner, bias_head, bias_row, bias_col;
  const float* slopes; /* ALiBi, [B|1, H] */
  int64_t slopes_batch;
  const float* sinks;  /* [H] */
  const int64_t* seed; /* of dropout, [1], in device memory */
  int32_t bias_dtype;
  int32_t bias_split; /* as words_split */
  float softcap;      /* 0: none */
  float keep_factor;  /* of what dropout keeps */
  uint32_t threshold; /* of 65536: 16 random bits below it are dropped */
  int32_t reserved;
} TilemaskScore;

typedef struct TilemaskSizes {
  int32_t batch, heads, kv_heads;
  int32_t len_q, len_k;
  int32_t width, width_v; /* 1 to 256 */
  float scale;
} TilemaskSizes;

typedef struct TilemaskForward {
  TilemaskHead head;
  TilemaskTensor q, k, v, out;
  float* lse;      /* [B, H, Lq], written */
  float* rest;     /* [B, H, Lq], written, or NULL: what float32 lse cannot hold */
  int32_t* visits; /* [B * H, row blocks, column blocks, 2] or NULL: counted up per visit */
  void* workspace;
  int64_t workspace_size; /* bytes */
  TilemaskMask mask;
  TilemaskLists lists;
  TilemaskScore score;
  TilemaskSizes sizes;
  int32_t folded; /* 1: rows are query heads that share a key head, all at row 0 of the mask */
  int32_t reserved;
} TilemaskForward;

/* Gradients. Calls without options take one pass where the GPU has room for it, and a workspace, of
 * which dQ in float32 is the most; others take one for dQ and one for dK and dV, and no workspace.
 * Lists: for one pass those of column blocks, for the tile of TILEMASK_DQKV; for two those of
 * TILEMASK_DQ, and of column blocks for TILEMASK_DKV. The workspace's size does not depend on them.
 * Visits are counted by the kernels that run. */
typedef struct TilemaskBackward {
  TilemaskHead head;
  TilemaskTensor q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  const float* rest; /* as forward wrote them */
  const float* dlse; /* [B, H, Lq] or NULL */
  float* delta;      /* [B, H, Lq], written: rowsum(dout * out) - dlse */
  int32_t* visits_dq;
  int32_t* visits_dkv;
  int32_t* visits_dqkv;
  void* workspace;
  int64_t workspace_size;       /* bytes */
  TilemaskMask mask;            /* for dQ */
  TilemaskMask mask_transposed; /* for dK and dV: words [.., groups of rows|1, Lk, 4], by column */
  TilemaskLists lists;          /* of row blocks, for dQ */
  TilemaskLists lists_transposed; /* of column blocks */
  TilemaskScore score;
  TilemaskSizes sizes;
} TilemaskBackward;

/* Sums of weight * p, or of weight * ds where dout is given, over what the result has not. */
typedef struct TilemaskSums {
  TilemaskHead head;
  TilemaskTensor q, k, v, dout;
  const float* lse;
  const float* rest;
  const float* delta; /* with dout */
  void* sums;         /* [B1|1, B2|1, H|1, Lq|1, Lk|1], contiguous, written */
  void* workspace;
  int64_t workspace_size;
  TilemaskMask mask;
  TilemaskScore score;
  TilemaskSizes sizes;
  int32_t outer, inner;           /* B1 * B2 = B */
  int32_t outer_kept, inner_kept; /* of them in the result: all or 1 */
  int32_t heads_kept, rows_kept, cols_kept;
  int32_t sums_dtype;
  float weight;
  int32_t reserved;
} TilemaskSums;

/* bool [B1, B2, H, rows, Lk] -> words [B1, B2, H, groups, all_rows, 4], rows from first_row on */
typedef struct TilemaskPack {
  TilemaskHead head; /* dtype is not read */
  const uint8_t* bits;
  int64_t bits_outer, bits_inner, bits_head, bits_row, bits_col; /* strides */
  uint32_t* words;
  int32_t outer, inner, heads, rows, len_k, first_row, all_rows;
  int32_t reserved;
} TilemaskPack;

/* words [planes, groups, lines, 4] -> [planes, groups_out, len_k, 4], rows packed by column */
typedef struct TilemaskTranspose {
  TilemaskHead head;
  const uint32_t* words;
  uint32_t* transposed;
  int32_t planes, groups, lines, len_k, groups_out;
  int32_t reserved;
} TilemaskTranspose;

/* Which rows see anything, and the lists of tiles: block_m from 16 to 128 rows, block_n 16, 32, 64
 * or 128 columns. */
typedef struct TilemaskLower {
  TilemaskHead head;
  TilemaskMask mask;
  int32_t* live;        /* [batch, heads, Lq], written by tilemask_live */
  uint8_t* classes;     /* [batch, heads, row blocks, column blocks], scratch of tilemask_lists */
  int32_t* counts;      /* [batch, heads, blocks, 2], written by tilemask_lists */
  int32_t* blocks;      /* [batch, heads, blocks, 2, blocks across] */
  int32_t batch, heads; /* B|1, H|1: over which the mask differs */
  int32_t len_q, len_k;
  int32_t block_m, block_n;
  int32_t transposed; /* 1: blocks are column blocks; 2: the same in pairs, for one pass */
  int32_t reserved;
} TilemaskLower;

TILEMASK_API int tilemask_abi(void);
TILEMASK_API const char* tilemask_error_text(int code);
/* 0 if the GPU can run the library, else an error code. */
TILEMASK_API int tilemask_check_device(int device);

/* The tile (rows, columns) of a kernel, TILEMASK_FORWARD to TILEMASK_DQKV, on a GPU. width: the
 * larger of D and Dv. */
TILEMASK_API int tilemask_tile(int kernel, int width, int device, int32_t tile[2]);

TILEMASK_API int64_t tilemask_forward_workspace(const TilemaskForward*);
TILEMASK_API int tilemask_forward(const TilemaskForward*);
TILEMASK_API int64_t tilemask_backward_workspace(const TilemaskBackward*);
TILEMASK_API int tilemask_backward(const TilemaskBackward*);
TILEMASK_API int64_t tilemask_sums_workspace(const TilemaskSums*);
TILEMASK_API int tilemask_sums(const TilemaskSums*);
TILEMASK_API int tilemask_pack(const TilemaskPack*);
TILEMASK_API int tilemask_transpose(const TilemaskTranspose*);
TILEMASK_API int tilemask_live(const TilemaskLower*);
TILEMASK_API int tilemask_lists(const TilemaskLower*);

#ifdef __cplusplus
}
#endif
#endif
