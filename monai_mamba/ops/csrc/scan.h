/* Interface between library.c (arguments, threads, choice of variant) and kernels.c (arithmetic, once per variant).
 *
 * A job covers both operators: the selective scan over `groups` groups of `channels` channels, and the scan of a map
 * along `groups` routes, where every group reads the same `u` and the outputs of all groups are summed in place.
 */
#ifndef MONAI_MAMBA_SCAN_H
#define MONAI_MAMBA_SCAN_H

#include <stddef.h>
#include <stdint.h>

#define MM_ABI 2
#define MM_CHUNK 64     /* steps between two saved states, and of one tile */
#define MM_BLOCK 16     /* channels of one tile, in every variant */
#define MM_MAX_STATE 256
#define MM_BUNDLE 32    /* most shares of channels that are scanned side by side */
#define MM_MAX_ROUTES 16
#define MM_MAX_TAPS 64

enum { MM_FLOAT32 = 0, MM_BFLOAT16 = 1, MM_FLOAT16 = 2 };
enum { MM_ROW = 0, MM_COLUMN = 1, MM_ROW_REVERSED = 2, MM_COLUMN_REVERSED = 3 };
enum { MM_OK = 0, MM_BAD_ARGUMENT = 1, MM_NO_MEMORY = 2, MM_NO_VARIANT = 3 };

/* A (batch, step, group, channel or state) view; the last axis is dense, strides count elements. */
typedef struct {
    void *data;
    int64_t batch, step, group;
    int64_t dtype;
} mm_view;

typedef struct {
    int64_t batch, length, groups, channels, d_state; /* channels of one group */
    int64_t height, width;                            /* of the map; height * width == length */
    int64_t softplus;
    int64_t merge; /* 1: all groups read the same u and their outputs are summed (routes of a map) */
    int64_t routes[MM_MAX_ROUTES]; /* one per group if merge, else routes[0] for all */
    mm_view u, delta, B, C, z, y;  /* z.data may be null; y is read by nobody in the backward pass */
    const float *A;                /* (groups, channels, d_state) */
    const float *D, *delta_bias;   /* (groups, channels), may be null */
    float *states; /* before every chunk but the first: (batch, chunks - 1, groups, channels, d_state), may be null */
    /* backward only */
    mm_view grad_y, grad_u, grad_delta, grad_z;
    float *grad_A, *grad_D, *grad_delta_bias; /* shapes of A, D, delta_bias */
    float *grad_B, *grad_C;                   /* (batch, length, groups, d_state) */
} mm_scan_job;

typedef struct {
    int64_t batch, length, channels, taps;
    int64_t silu;
    mm_view x, y; /* group strides unused */
    const float *weight, *bias; /* (channels, taps), (channels) or null */
    mm_view grad_y, grad_x;
    float *grad_weight, *grad_bias; /* shapes of weight and bias */
} mm_conv_job;

/* How a pass is dealt out. A share is one part of the channels of one group. */
typedef struct {
    int64_t parts;  /* channel blocks of a group are dealt out to this many parts */
    int64_t bundle; /* a work item scans up to this many shares side by side */
    /* The backward pass adds up over parts and batches, in their order. It goes in stages, so that what waits to be added is
     * little however large the job is: some batches, of merged groups one, and some chunks, the last ones first. */
    int64_t batches, chunks; /* of a stage */
    int in_order;            /* items come one after the other and add to the gradients themselves */
    float *B, *C;            /* else sums of all parts but the first: (parts - 1, batches, groups, 64 chunks, d_state) */
    float *A, *D, *bias;     /* and of all batches but the first: slots x (groups, channels, ...) */
    float *kept;             /* what items keep from stage to stage; null if their chunks are all in one */
    int64_t kept_of_item;    /* floats */
} mm_partials;

typedef struct {
    int64_t batch, batches; /* first one, and how many */
    int64_t group;          /* of merged groups */
    int64_t begin, end;     /* chunks */
} mm_stage;

/* One variant of the arithmetic. Functions with `item` do one work item and need `scratch` bytes, 64-byte aligned. */
typedef struct {
    const char *name;
    int64_t lanes;
    size_t (*scan_forward_scratch)(const mm_scan_job *, const mm_partials *);
    void (*scan_forward)(const mm_scan_job *, const mm_partials *, int64_t item, void *scratch);
    size_t (*scan_backward_scratch)(const mm_scan_job *, const mm_partials *);
    void (*scan_backward)(const mm_scan_job *, const mm_partials *, int64_t stage, int64_t item, void *scratch);
    void (*scan_backward_sums)(const mm_scan_job *, const mm_partials *, int64_t stage); /* when all its items are done */
    size_t (*conv_scratch)(const mm_conv_job *, int64_t bundle);
    void (*conv_forward)(const mm_conv_job *, int64_t item, void *scratch);
    void (*conv_backward)(const mm_conv_job *, const mm_partials *, int64_t item, void *scratch);
    double (*probe)(int64_t kind, int64_t rounds); /* see kernels.c */
} mm_kernels;

static inline int64_t mm_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* States are padded to whole vectors of four, except a single one, which has its own path. */
static inline int64_t mm_padded_states(int64_t n) { return n == 1 ? 1 : mm_ceil(n, 4) * 4; }

/* Numbers of a block of channels in the backward pass: rates, gradient of the state (N, 16); D, bias, [0]: the largest rate
 * (16); gradients of A (N, 16), D and bias (16); and as much again that rounding took from these. */
static inline int64_t mm_backward_block(int64_t padded) { return (7 + 4 * padded) * MM_BLOCK; }

/* Shares of a batch item that are independent of each other. */
static inline int64_t mm_shares(const mm_scan_job *job, const mm_partials *p) { return p->parts * (job->merge ? 1 : job->groups); }

static inline int64_t mm_num_stages(const mm_scan_job *job, const mm_partials *p) {
    return mm_ceil(job->batch, p->batches) * (job->merge ? job->groups : 1) * mm_ceil(mm_ceil(job->length, MM_CHUNK), p->chunks);
}

static inline mm_stage mm_stage_of(const mm_scan_job *job, const mm_partials *p, int64_t stage) {
    int64_t chunks = mm_ceil(job->length, MM_CHUNK), segments = mm_ceil(chunks, p->chunks);
    int64_t groups = job->merge ? job->groups : 1, batch = stage / (segments * groups) * p->batches;
    int64_t begin = (segments - 1 - stage % segments) * p->chunks;
    mm_stage s = {batch, job->batch - batch < p->batches ? job->batch - batch : p->batches, stage / segments % groups, begin,
                  begin + p->chunks < chunks ? begin + p->chunks : chunks};
    return s;
}

/* Elements from which on a result is written past the caches: 8 MB. */
#define MM_STREAMED (2 << 20)

/* Steps of one work item of the forward convolution. */
#define MM_CONV_SEGMENT 256

#endif
