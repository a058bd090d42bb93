/* The forward pass of the scan. */
#ifndef MONAI_MAMBA_FORWARD_H
#define MONAI_MAMBA_FORWARD_H

#include "rows.h"

/* A work item scans some blocks of channels side by side, chunk by chunk: neighbouring blocks share the tiles of B and
 * C, the lines of the cache and the pages of memory. So do shares of several groups, one after the other in each chunk. */
typedef struct {
    float step[TILE], drive[TILE], y[TILE], gate[TILE]; /* delta, delta * u, output, silu(z) */
    int64_t position[2][MM_CHUNK];
    float rest[] __attribute__((aligned(64))); /* tiles of B and C (64, N), then what every block keeps */
} forward_scratch;

/* What a block keeps from chunk to chunk: D, bias, [0]: the largest decay rate, decay rates (N, 16), state (N, 16). */
static size_t block_floats(int64_t padded) { return (size_t)((3 + 2 * padded) * MM_BLOCK); }

static size_t scan_forward_scratch(const mm_scan_job *job, const mm_partials *partials) {
    int64_t N = mm_padded_states(job->d_state);
    int64_t blocks = partials->bundle * mm_ceil(mm_ceil(job->channels, MM_BLOCK), partials->parts);
    return sizeof(forward_scratch) + ((size_t)blocks * block_floats(N) + (size_t)(2 * MM_CHUNK * N)) * sizeof(float);
}

/* Some blocks of a group over the whole sequence, with what they keep from chunk to chunk. */
typedef struct {
    const mm_scan_job *job;
    int64_t b, g, begin, own; /* own: number of blocks, from block `begin` on */
    float *kept;
} forward_share;

/* Work on one block of channels in one chunk. */
typedef struct {
    const mm_scan_job *job;
    int64_t b, g, channel, count, steps;
    const int64_t *position;
    row_set u, delta, z, y; /* z.base is null without a gate */
    int accumulate;         /* add to what is in y */
} block_work;

static block_work begin_block(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, int64_t steps,
                              const int64_t *position, int accumulate, forward_scratch *s) {
    int64_t rest = job->channels - channel, count = rest < MM_BLOCK ? rest : MM_BLOCK;
    block_work w = {job, b, g, channel, count, steps, position, {0}, {0}, {0}, {0}, accumulate};
    w.u = rows_to_read(&job->u, b, g, channel, count, steps, position, s->drive);
    w.delta = rows_to_read(&job->delta, b, g, channel, count, steps, position, s->step);
    if (job->z.data) w.z = rows_to_read(&job->z, b, g, channel, count, steps, position, s->gate);
    w.y = rows_to_write(&job->y, b, g, channel, count, position, s->y);
    if (accumulate) rows_to_read(&job->y, b, g, channel, count, steps, position, s->y);
    return w;
}

static void end_block(const block_work *w, const forward_scratch *s) {
    finish_rows(&w->job->y, w->b, w->g, w->channel, w->count, w->steps, w->position, s->y);
}

static look_ahead rows_ahead(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, const int64_t *position) {
    look_ahead a = {{rows_in_memory(&job->u, b, g, channel, position), rows_in_memory(&job->delta, b, g, channel, position)}, 2};
    if (job->z.data) a.rows[a.count++] = rows_in_memory(&job->z, b, g, channel, position);
    a.rows[a.count++] = rows_in_memory(&job->y, b, g, channel, position);
    return a;
}

/* ---- several states: step sizes of a chunk first, then sweeps over some of the states each ---- */

/* delta, delta * u, silu(z) and D * u, plus what is in y already, of a chunk. Returns the largest step size. The last
 * group may run over the end, where positions repeat the last step. */
INLINE float forward_prologue(const int softplus, const int gated, const int accumulate, const block_work *w,
                              const float *D, const float *bias, forward_scratch *s) {
    const int count = GROUP;
    const exp2_constants k = exp2_setup();
    vf largest = {0};
    for (int64_t t = 0; t < w->steps; t += GROUP_STEPS) {
        float *step = s->step + t * MM_BLOCK, *drive = s->drive + t * MM_BLOCK, *y = s->y + t * MM_BLOCK;
        vf x[GROUP], d[GROUP], sum[GROUP];
        EACH x[i] = load_unaligned(row_at(&w->u, t + GROUP_ROW(i)) + GROUP_LANE(i));
        EACH d[i] = load_unaligned(row_at(&w->delta, t + GROUP_ROW(i)) + GROUP_LANE(i)) + load(bias + GROUP_LANE(i));
        EACH sum[i] = x[i] * load(D + GROUP_LANE(i));
        if (softplus) softplus_many(GROUP, &k, d);
        if (accumulate) EACH sum[i] += load_unaligned(row_at(&w->y, t + GROUP_ROW(i)) + GROUP_LANE(i));
        if (!EXP2_NEEDS_NO_BOUND) EACH largest = larger(magnitude(d[i]), largest);
        EACH store(step + i * LANES, d[i]);
        EACH store(drive + i * LANES, d[i] * x[i]);
        EACH store(y + i * LANES, sum[i]);
        if (gated) {
            vf gate[GROUP];
            EACH gate[i] = load_unaligned(row_at(&w->z, t + GROUP_ROW(i)) + GROUP_LANE(i));
            silu_many(GROUP, &k, gate);
            EACH store(s->gate + t * MM_BLOCK + i * LANES, gate[i]);
        }
    }
    return largest_lane(largest);
}

static float forward_prologue_of(const block_work *w, const float *D, const float *bias, forward_scratch *s) {
    if (w->job->softplus) {
        if (w->z.base) return forward_prologue(1, 1, 0, w, D, bias, s);
        return w->accumulate ? forward_prologue(1, 0, 1, w, D, bias, s) : forward_prologue(1, 0, 0, w, D, bias, s);
    }
    if (w->z.base) return forward_prologue(0, 1, 0, w, D, bias, s);
    return w->accumulate ? forward_prologue(0, 0, 1, w, D, bias, s) : forward_prologue(0, 0, 0, w, D, bias, s);
}

/* What all sweeps of a chunk share; the pointers are those of the first lane. */
typedef struct {
    int64_t steps, stride; /* stride: of B and C */
    const float *step, *drive, *gate;
    float *y;
} sweep;

/* `count` states of one vector of channels over a chunk; y is added to. The last sweep multiplies by the gate and puts
 * the result where it belongs. */
INLINE void advance_states(const int count, const int bounded, const int gated, const sweep *w, const float *rates,
                           float *state, const float *B, const float *C, const row_set *out, const look_ahead *ahead,
                           int from, int to) {
    const exp2_constants k = exp2_setup();
    vf h[16];
    UNROLL for (int n = 0; n < count; n++) h[n] = load(state + n * MM_BLOCK);
    for (int64_t t = 0; t < w->steps; t++) {
        vf d = load(w->step + t * MM_BLOCK), x = load(w->drive + t * MM_BLOCK);
        vf before = load(w->y + t * MM_BLOCK), sums[2];
        const float *Bt = B + t * w->stride, *Ct = C + t * w->stride;
        for (int i = from; i < to; i++) __builtin_prefetch(row_at(&ahead->rows[i], t), 0, 2);
        UNROLL for (int n = 0; n < count; n++) {
            vf exponent = d * load(rates + n * MM_BLOCK);
            h[n] = (bounded ? exp2_bounded(&k, exponent) : exp2_any(&k, exponent)) * h[n] + x * Bt[n];
            if (n < 2)
                sums[n] = h[n] * Ct[n];
            else
                sums[n & 1] += h[n] * Ct[n];
        }
        vf sum = before + (sums[0] + sums[1]); /* in this order: hundreds of states round seldom at the size of their sum */
        if (gated) sum *= load(w->gate + t * MM_BLOCK);
        store_unaligned(row_at(out, t), sum);
    }
    UNROLL for (int n = 0; n < count; n++) store(state + n * MM_BLOCK, h[n]);
}

INLINE void advance_some(const int bounded, int64_t count, int gated, const sweep *w, const float *rates, float *state,
                         const float *B, const float *C, const row_set *out, const look_ahead *ahead, int from, int to) {
    if (SWEEP == 16 && count == 16) {
        if (gated)
            advance_states(SWEEP, bounded, 1, w, rates, state, B, C, out, ahead, from, to);
        else
            advance_states(SWEEP, bounded, 0, w, rates, state, B, C, out, ahead, from, to);
    } else if (SWEEP >= 8 && count == 8) {
        if (gated)
            advance_states(8, bounded, 1, w, rates, state, B, C, out, ahead, from, to);
        else
            advance_states(8, bounded, 0, w, rates, state, B, C, out, ahead, from, to);
    } else {
        if (gated)
            advance_states(4, bounded, 1, w, rates, state, B, C, out, ahead, from, to);
        else
            advance_states(4, bounded, 0, w, rates, state, B, C, out, ahead, from, to);
    }
}

/* All states of a block over a chunk. The rows that come next are asked for along the way. */
INLINE void forward_sweeps(const int bounded, const block_work *w, int64_t N, const float *rates, float *state,
                           const float *B, const float *C, const look_ahead *ahead, forward_scratch *s) {
    int asked = 0, share = (int)mm_ceil(ahead->count, mm_ceil(N, SWEEP) * VECTORS);
    row_set tile = rows_of_tile(s->y);
    for (int64_t n = 0, count; n < N; n += count) {
        count = SWEEP == 16 && N - n >= 16 ? 16 : SWEEP >= 8 && N - n >= 8 ? 8 : 4;
        int is_last = n + count == N;
        for (int v = 0; v < MM_BLOCK; v += LANES) {
            int next = asked + share < ahead->count ? asked + share : ahead->count;
            row_set out = is_last ? w->y : tile;
            out.base += v * sizeof(float);
            sweep lanes = {w->steps, N, s->step + v, s->drive + v, s->gate + v, s->y + v};
            advance_some(bounded, count, is_last && w->z.base, &lanes, rates + n * MM_BLOCK + v,
                         state + n * MM_BLOCK + v, B + n, C + n, &out, ahead, asked, next);
            asked = next;
        }
    }
}

static void begin_states(const forward_share *x) {
    const mm_scan_job *job = x->job;
    int64_t N = mm_padded_states(job->d_state);
    for (int64_t i = 0; i < x->own; i++) {
        float *D = x->kept + (size_t)i * block_floats(N), *bias = D + MM_BLOCK, *fastest = bias + MM_BLOCK;
        float *rates = fastest + MM_BLOCK, *state = rates + N * MM_BLOCK;
        int64_t channel = (x->begin + i) * MM_BLOCK, row = x->g * job->channels + channel;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->A + row * job->d_state, count, job->d_state, N, rates);
        scale_rates(rates, N * MM_BLOCK);
        memset(state, 0, (size_t)N * MM_BLOCK * sizeof(float));
        vector_in(job->D ? job->D + row : NULL, count, D);
        vector_in(job->delta_bias ? job->delta_bias + row : NULL, count, bias);
        fastest[0] = fastest_rate(rates, N);
    }
}

static void forward_states(const forward_share *x, int64_t chunk, int64_t steps, const int64_t *position, int accumulate,
                           const look_ahead *following, forward_scratch *s) {
    const mm_scan_job *job = x->job;
    int64_t N = mm_padded_states(job->d_state);
    float *B = s->rest, *C = B + MM_CHUNK * N;
    matrix_tile(&job->B, x->b, x->g, position, steps, job->d_state, N, B);
    matrix_tile(&job->C, x->b, x->g, position, steps, job->d_state, N, C);
    for (int64_t i = 0; i < x->own; i++) {
        float *D = x->kept + (size_t)i * block_floats(N), *bias = D + MM_BLOCK, *fastest = bias + MM_BLOCK;
        float *rates = fastest + MM_BLOCK, *state = rates + N * MM_BLOCK;
        int64_t channel = (x->begin + i) * MM_BLOCK;
        block_work w = begin_block(job, x->b, x->g, channel, steps, position, accumulate, s);
        if (job->states && chunk)
            transpose_out(state_rows(job, x->b, x->g, chunk, channel), w.count, job->d_state, state);
        float largest = forward_prologue_of(&w, D, bias, s);
        look_ahead ahead = *following;
        if (i + 1 < x->own) ahead = rows_ahead(job, x->b, x->g, channel + MM_BLOCK, position);
        if (!EXP2_NEEDS_NO_BOUND && largest * fastest[0] <= EXP2_LIMIT)
            forward_sweeps(1, &w, N, rates, state, B, C, &ahead, s);
        else
            forward_sweeps(0, &w, N, rates, state, B, C, &ahead, s);
        end_block(&w, s);
    }
}

/* ---- one state: everything in one pass, some blocks at a time ---- */

enum { STEPS_AHEAD = 8, WIDEST = VECTORS > 2 ? 2 : 4 }; /* WIDEST: blocks at a time */
enum { WRITE, ADD, STREAM }; /* what is done with y, see `stream` */

INLINE void single_state(const int vectors, const int softplus, const int gated, const int to_y,
                         const block_work *w, const float *B, const float *C, const float *D, const float *bias,
                         const float *rates, float *state, const look_ahead *ahead) {
    const exp2_constants k = exp2_setup();
    const int count = vectors < GROUP ? vectors : GROUP;
    vf h[WIDEST * VECTORS];
    UNROLL for (int v = 0; v < vectors; v++) h[v] = load(state + v * LANES);
    const look_ahead here = {{w->u, w->delta, gated ? w->z : w->y, w->y}, 3 + gated};
    for (int64_t t = 0; t < w->steps; t++) {
        const float *u = row_at(&w->u, t), *delta = row_at(&w->delta, t), *z = gated ? row_at(&w->z, t) : NULL;
        float *out = row_at(&w->y, t);
        int64_t then = t + STEPS_AHEAD;
        const look_ahead *from = then < w->steps ? &here : ahead;
        if (then >= w->steps) then -= w->steps;
        UNROLL for (int i = 0; i < 2 + gated + (to_y != STREAM); i++) {
            const char *soon = (const char *)row_at(&from->rows[i], then);
            UNROLL for (int at = 0; at < vectors * LANES * 4; at += 64) __builtin_prefetch(soon + at);
        }
        for (int group = 0; group < vectors; group += count) {
            const int first = group * LANES;
            vf x[MANY], d[MANY], a[MANY], y[MANY];
            EACH x[i] = load_unaligned(u + first + i * LANES);
            EACH d[i] = load_unaligned(delta + first + i * LANES) + load(bias + first + i * LANES);
            if (softplus) softplus_many(count, &k, d);
            EACH a[i] = d[i] * load(rates + first + i * LANES);
            exp2_many_any(count, &k, a);
            EACH y[i] = x[i] * load(D + first + i * LANES);
            if (to_y == ADD) EACH y[i] += load_unaligned(out + first + i * LANES);
            EACH h[group + i] = a[i] * h[group + i] + d[i] * x[i] * B[t];
            EACH y[i] += h[group + i] * C[t];
            if (gated) {
                EACH a[i] = load_unaligned(z + first + i * LANES);
                silu_many(count, &k, a);
                EACH y[i] *= a[i];
            }
            if (to_y == STREAM)
                EACH stream(out + first + i * LANES, y[i]);
            else
                EACH store_unaligned(out + first + i * LANES, y[i]);
        }
    }
    UNROLL for (int v = 0; v < vectors; v++) store(state + v * LANES, h[v]);
}

INLINE void single_state_to(const int to_y, const int vectors, const block_work *w, const float *B, const float *C,
                            const float *D, const float *bias, const float *rates, float *state, const look_ahead *ahead) {
    if (w->job->softplus && w->z.base)
        single_state(vectors, 1, 1, to_y, w, B, C, D, bias, rates, state, ahead);
    else if (w->job->softplus)
        single_state(vectors, 1, 0, to_y, w, B, C, D, bias, rates, state, ahead);
    else if (w->z.base)
        single_state(vectors, 0, 1, to_y, w, B, C, D, bias, rates, state, ahead);
    else
        single_state(vectors, 0, 0, to_y, w, B, C, D, bias, rates, state, ahead);
}

static int y_is_streamed(const block_work *w) {
    const mm_scan_job *job = w->job;
    return !job->merge && is_plain(&job->y, w->count) && is_streamed(&job->y, job->batch, job->length, job->groups * job->channels);
}

INLINE void single_state_of(const int vectors, const block_work *w, const float *B, const float *C, const float *D,
                            const float *bias, const float *rates, float *state, const look_ahead *ahead) {
    if (w->accumulate)
        single_state_to(ADD, vectors, w, B, C, D, bias, rates, state, ahead);
    else if (CAN_STREAM && y_is_streamed(w))
        single_state_to(STREAM, vectors, w, B, C, D, bias, rates, state, ahead);
    else
        single_state_to(WRITE, vectors, w, B, C, D, bias, rates, state, ahead);
}

static int64_t filled_channels(const forward_share *x) {
    int64_t end = (x->begin + x->own) * MM_BLOCK;
    return (end < x->job->channels ? end : x->job->channels) - x->begin * MM_BLOCK;
}

static void begin_single_state(const forward_share *x) {
    const mm_scan_job *job = x->job;
    int64_t own = x->own * MM_BLOCK, row = x->g * job->channels + x->begin * MM_BLOCK, filled = filled_channels(x);
    float *D = x->kept, *bias = D + own, *rates = bias + own; /* then the state */
    memset(D, 0, (size_t)(4 * own) * sizeof(float));
    if (job->D) memcpy(D, job->D + row, (size_t)filled * sizeof(float));
    if (job->delta_bias) memcpy(bias, job->delta_bias + row, (size_t)filled * sizeof(float));
    memcpy(rates, job->A + row, (size_t)filled * sizeof(float));
    scale_rates(rates, filled);
}

static void forward_single_state(const forward_share *x, int64_t chunk, int64_t steps, const int64_t *position,
                                 int accumulate, const look_ahead *following, forward_scratch *s) {
    const mm_scan_job *job = x->job;
    int64_t own = x->own * MM_BLOCK, first_channel = x->begin * MM_BLOCK, filled = filled_channels(x);
    float *B = s->rest, *C = B + MM_CHUNK, *D = x->kept, *bias = D + own, *rates = bias + own, *state = rates + own;
    int wide = job->u.dtype == MM_FLOAT32 && job->delta.dtype == MM_FLOAT32 && job->y.dtype == MM_FLOAT32 &&
               (!job->z.data || job->z.dtype == MM_FLOAT32);
    matrix_tile(&job->B, x->b, x->g, position, steps, 1, 1, B);
    matrix_tile(&job->C, x->b, x->g, position, steps, 1, 1, C);
    if (job->states && chunk)
        memcpy(state_rows(job, x->b, x->g, chunk, first_channel), state, (size_t)filled * sizeof(float));
    for (int64_t i = 0, together; i < own; i += together) {
        int64_t most = !wide ? 1 : (filled - i) / MM_BLOCK;
        together = (WIDEST == 4 && most >= 4 ? 4 : most >= 2 ? 2 : 1) * MM_BLOCK;
        block_work w = begin_block(job, x->b, x->g, first_channel + i, steps, position, accumulate, s);
        look_ahead ahead = *following;
        if (i + together < own) ahead = rows_ahead(job, x->b, x->g, first_channel + i + together, position);
        if (WIDEST == 4 && together == 4 * MM_BLOCK)
            single_state_of(WIDEST * VECTORS, &w, B, C, D + i, bias + i, rates + i, state + i, &ahead);
        else if (together == 2 * MM_BLOCK)
            single_state_of(2 * VECTORS, &w, B, C, D + i, bias + i, rates + i, state + i, &ahead);
        else
            single_state_of(VECTORS, &w, B, C, D + i, bias + i, rates + i, state + i, &ahead);
        end_block(&w, s);
    }
}

/* ---- a sequence ---- */

/* Some shares side by side, chunk by chunk. They are counted within `group` if the groups are merged, else through all
 * parts of the first group, the second, ... */
static void forward_sequence(const mm_scan_job *job, const mm_partials *partials, int64_t b, int64_t group, int64_t first,
                             int64_t count, int accumulate, forward_scratch *s) {
    int64_t L = job->length, N = mm_padded_states(job->d_state), blocks = mm_ceil(job->channels, MM_BLOCK);
    int64_t parts = partials->parts;
    forward_share shares[MM_BUNDLE];
    float *kept = s->rest + 2 * MM_CHUNK * N;
    for (int64_t i = 0; i < count; i++) {
        int64_t g = job->merge ? group : (first + i) / parts, part = (first + i) % parts, begin = blocks * part / parts;
        shares[i] = (forward_share){job, b, g, begin, blocks * (part + 1) / parts - begin, kept};
        kept += (size_t)shares[i].own * block_floats(N);
        N == 1 ? begin_single_state(&shares[i]) : begin_states(&shares[i]);
    }
    route_positions(job, group, 0, MM_CHUNK, s->position[0]);
    for (int64_t chunk = 0; chunk * MM_CHUNK < L; chunk++) {
        int64_t rest = L - chunk * MM_CHUNK, steps = rest < MM_CHUNK ? rest : MM_CHUNK;
        int64_t *position = s->position[chunk & 1], *following = s->position[~chunk & 1];
        route_positions(job, group, (chunk + 1) * MM_CHUNK, MM_CHUNK, following);
        for (int64_t i = 0; i < count; i++) {
            const forward_share *next = &shares[i + 1 < count ? i + 1 : 0];
            look_ahead ahead = rows_ahead(job, b, next->g, next->begin * MM_BLOCK, i + 1 < count ? position : following);
            if (N == 1)
                forward_single_state(&shares[i], chunk, steps, position, accumulate, &ahead, s);
            else
                forward_states(&shares[i], chunk, steps, position, accumulate, &ahead, s);
        }
    }
}

/* Items: (batch, bundle of shares); all routes in turn, if the groups are merged. */
static void scan_forward(const mm_scan_job *job, const mm_partials *partials, int64_t item, void *scratch) {
    int64_t first, count, b = bundle_of(job, partials, item, &first, &count);
    for (int64_t g = 0; g < (job->merge ? job->groups : 1); g++)
        forward_sequence(job, partials, b, g, first, count, g > 0, scratch);
    end_of_streams();
}

#endif
