/* The arithmetic of the selective scan and the causal convolution, compiled once per instruction set.
 *
 * Vectors run across channels; a work item scans blocks of 16 channels over the whole sequence in chunks of 64 steps.
 * Rows that are 16 float32 are read and written where they lie, all others go through float32 tiles. Nothing depends on
 * the number of threads.
 *
 *   vectors.h  vectors, exponential, softplus      forward.h, backward.h  the scans
 *   rows.h     types, strides, routes, tiles       convolution.h          the causal convolution
 */
#include "backward.h"
#include "convolution.h"
#include "forward.h"

/* ---- what the machine can do, for the benchmark ---- */

/* Runs the arithmetic of kind 0: exp2, 1: multiply-add, 2: state updates of the forward pass, 3: softplus and state
 * update of a single state, on data in registers and the first-level cache. A round does 64 x 16 operations (kinds 0 and
 * 3), 64 x 16 x 8 (kind 1) or 64 x 16 x 16 (kind 2). The result depends on all of them. */
static double probe(int64_t kind, int64_t rounds) {
    static const volatile float half = 0.5f; /* keeps the compiler from computing anything beforehand */
    float step[TILE] __attribute__((aligned(64))), drive[TILE] __attribute__((aligned(64)));
    float y[TILE] __attribute__((aligned(64))), B[16 * MM_CHUNK], C[16 * MM_CHUNK];
    float rates[16 * MM_BLOCK] __attribute__((aligned(64))), state[16 * MM_BLOCK] __attribute__((aligned(64)));
    for (int i = 0; i < TILE; i++) step[i] = 0.002f * half * (float)(i % 97), drive[i] = 0.01f * (float)(i % 89), y[i] = 0.0f;
    for (int i = 0; i < 16 * MM_CHUNK; i++) B[i] = half / (float)(1 + i % 7), C[i] = half / (float)(1 + i % 5);
    for (int i = 0; i < 16 * MM_BLOCK; i++) rates[i] = -half * (float)(1 + i / MM_BLOCK), state[i] = 0.0f;
    const exp2_constants k = exp2_setup();
    vf sum[8];
    for (int i = 0; i < 8; i++) sum[i] = splat((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        if (kind == 0) {
            const int count = GROUP;
            for (int t = 0; t < TILE; t += GROUP * LANES) {
                vf x[GROUP];
                EACH x[i] = load(step + t + i * LANES);
                exp2_many_any(GROUP, &k, x);
                EACH sum[i] += x[i];
            }
        } else if (kind == 1) {
            for (int t = 0; t < TILE; t += LANES) {
                vf x = load(step + t);
                UNROLL for (int i = 0; i < 8; i++) sum[i] = sum[i] * x + x;
            }
        } else if (kind == 2) {
            for (int v = 0; v < MM_BLOCK; v += LANES)
                for (int n = 0; n < 16; n += SWEEP) {
                    sweep lanes = {MM_CHUNK, 16, step + v, drive + v, y, y + v};
                    row_set out = rows_of_tile(y + v);
                    advance_states(SWEEP, !EXP2_NEEDS_NO_BOUND, 0, &lanes, rates + n * MM_BLOCK + v, state + n * MM_BLOCK + v, B + n, C + n,
                                   &out, NULL, 0, 0);
                }
        } else {
            const int count = GROUP;
            vf h[GROUP] = {{0}};
            for (int t = 0; t < TILE; t += GROUP * LANES) {
                vf d[GROUP], a[GROUP], x[GROUP];
                EACH d[i] = load(step + t + i * LANES);
                EACH x[i] = load(drive + t + i * LANES);
                softplus_many(GROUP, &k, d);
                EACH a[i] = d[i] * load(rates + i * LANES);
                exp2_many_any(GROUP, &k, a);
                EACH h[i] = a[i] * h[i] + d[i] * x[i] * B[t / MM_BLOCK];
                EACH store(y + t + i * LANES, h[i] * C[t / MM_BLOCK] + x[i]);
            }
            EACH sum[i] += h[i];
        }
    }
    for (int i = 1; i < 8; i++) sum[0] += sum[i];
    return (double)sum[0][0] + (double)y[0];
}

const mm_kernels MM_JOIN(mm_kernels_, MM_VARIANT) = {
    .name = MM_TEXT(MM_VARIANT),
    .lanes = LANES,
    .scan_forward_scratch = scan_forward_scratch,
    .scan_forward = scan_forward,
    .scan_backward_scratch = scan_backward_scratch,
    .scan_backward = scan_backward,
    .scan_backward_sums = scan_backward_sums,
    .conv_scratch = conv_scratch,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .probe = probe,
};
