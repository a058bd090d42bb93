/* The backward pass of the scan: the states of a chunk are computed again from the one saved before it. */
#ifndef MONAI_MAMBA_BACKWARD_H
#define MONAI_MAMBA_BACKWARD_H

#include "rows.h"

/* In every quarter of four lanes: (a0 + a2, b0 + b2, a1 + a3, b1 + b3), and then (a0 + a2, a1 + a3, b0 + b2, ...). */
#if MM_LANES == 4
INLINE vf sum_pairs(vf a, vf b) { return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE vf sum_quarters(vf a, vf b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
#elif MM_LANES == 8
INLINE vf sum_pairs(vf a, vf b) {
    return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
INLINE vf sum_quarters(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
#else
INLINE vf sum_pairs(vf a, vf b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
INLINE vf sum_quarters(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#endif

/* Sums over the lanes of four vectors, from what sum_quarters made of them. */
INLINE v4 lane_sums(vf quarters) {
    const v4_unaligned *parts = (const v4_unaligned *)&quarters;
    v4 sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return sum;
}

INLINE v4 lane_sums_of_four(const float *p) {
    return lane_sums(sum_quarters(sum_pairs(load(p), load(p + LANES)), sum_pairs(load(p + 2 * LANES), load(p + 3 * LANES))));
}

/* From the gradients of A, D and bias that a block keeps to what was lost of them, see `add_up`. */
static int64_t lost_sums(int64_t padded) { return (padded + 2) * MM_BLOCK; }

enum { COUNT = 4 }; /* states of one sweep: what leaves all that belongs to them in registers */

typedef struct {
    float step[TILE], drive[TILE], slope[TILE]; /* delta, delta * u, derivative of the softplus */
    float grad[TILE];                           /* gradient of the output before the gate */
    float y[TILE], gate[TILE];                  /* output before the gate, derivative by the gate */
    float from_B[TILE], from_A[TILE];           /* sums over the states: grad_h B, and of the decay */
    float u[TILE];                              /* input, where it cannot be read where it lies */
    float trail[2 * TILE * COUNT];              /* of the states of a sweep: state before every step, and decay */
    int64_t position[2][MM_CHUNK];
    float rest[] __attribute__((aligned(64)));
} backward_scratch;

/* Sums for the gradients of B and C in a chunk, the lanes not yet added up: for two states together (N / 2, 64, LANES), in
 * every quarter of four lanes B, B, C, C; for a single state B (64, LANES), then C. */
static int64_t backward_sums_floats(int64_t padded) { return MM_CHUNK * LANES * (padded == 1 ? 2 : padded / 2); }

/* Beside what blocks keep: the state (N, 16), tiles of B and C (64, N), sums. */
static size_t scan_backward_scratch(const mm_scan_job *job, const mm_partials *partials) {
    int64_t N = mm_padded_states(job->d_state), kept = partials->kept ? 0 : partials->kept_of_item;
    return sizeof(backward_scratch) + (size_t)(kept + N * MM_BLOCK + 2 * MM_CHUNK * N + backward_sums_floats(N)) * sizeof(float);
}

/* Work on one block of channels in one chunk; bases are null where there is nothing. */
typedef struct {
    const mm_scan_job *job;
    int64_t b, g, channel, count, steps;
    const int64_t *position;
    row_set u, delta, z, grad_y, grad_u, grad_delta, grad_z;
    int accumulate; /* add to what is in grad_u */
} backward_work;

static backward_work begin_backward(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, int64_t steps,
                                    const int64_t *position, int accumulate, backward_scratch *s) {
    int64_t rest = job->channels - channel, count = rest < MM_BLOCK ? rest : MM_BLOCK;
    backward_work w = {.job = job, .b = b, .g = g, .channel = channel, .count = count, .steps = steps,
                       .position = position, .accumulate = accumulate};
    w.u = rows_to_read(&job->u, b, g, channel, count, steps, position, s->u);
    w.delta = rows_to_read(&job->delta, b, g, channel, count, steps, position, s->step);
    w.grad_y = rows_to_read(&job->grad_y, b, g, channel, count, steps, position, s->grad);
    w.grad_u = rows_to_write(&job->grad_u, b, g, channel, count, position, s->from_A);
    w.grad_delta = rows_to_write(&job->grad_delta, b, g, channel, count, position, s->slope);
    if (job->z.data) {
        w.z = rows_to_read(&job->z, b, g, channel, count, steps, position, s->gate);
        w.grad_z = rows_to_write(&job->grad_z, b, g, channel, count, position, s->y);
    }
    return w;
}

static void end_backward(const backward_work *w, const backward_scratch *s) {
    const mm_scan_job *job = w->job;
    finish_rows(&job->grad_u, w->b, w->g, w->channel, w->count, w->steps, w->position, s->from_A);
    finish_rows(&job->grad_delta, w->b, w->g, w->channel, w->count, w->steps, w->position, s->slope);
    if (job->z.data) finish_rows(&job->grad_z, w->b, w->g, w->channel, w->count, w->steps, w->position, s->y);
}

static look_ahead backward_rows_ahead(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel,
                                      const int64_t *position) {
    look_ahead a = {.count = 5};
    const mm_view *views[] = {&job->u, &job->delta, &job->grad_y, &job->grad_u, &job->grad_delta, &job->z, &job->grad_z};
    if (job->z.data) a.count = 7;
    for (int i = 0; i < a.count; i++) a.rows[i] = rows_in_memory(views[i], b, g, channel, position);
    return a;
}

/* ---- several states ---- */

/* Some states of one vector of channels: forward over the chunk to know the states, then back. */
INLINE void retreat_states(const int with_y, const int bounded, const int is_first, int64_t steps, int64_t stride,
                           const float *rates, const float *state, float *grad_h, float *grad_A, int64_t to_lost, const float *B,
                           const float *C, float *sums, const look_ahead *ahead, int from, int to, int64_t lane,
                           backward_scratch *s) {
    const exp2_constants k = exp2_setup();
    vf h[COUNT], rate[COUNT];
    UNROLL for (int n = 0; n < COUNT; n++) {
        h[n] = load(state + n * MM_BLOCK);
        rate[n] = load(rates + n * MM_BLOCK);
    }
    for (int64_t t = 0; t < steps; t++) {
        int64_t at = t * MM_BLOCK + lane;
        float *before = s->trail + t * 2 * COUNT * LANES, *decays = before + COUNT * LANES;
        vf d = load(s->step + at), x = load(s->drive + at), y = {0};
        UNROLL for (int n = 0; n < COUNT; n++) {
            vf exponent = d * rate[n];
            vf decay = bounded ? exp2_bounded(&k, exponent) : exp2_any(&k, exponent);
            store(before + n * LANES, h[n]);
            store(decays + n * LANES, decay);
            h[n] = decay * h[n] + x * B[t * stride + n];
            if (with_y) y += h[n] * C[t * stride + n];
        }
        if (with_y) store(s->y + at, load(s->y + at) + y);
    }
    vf gh[COUNT], gA[COUNT]; /* gA: of this chunk */
    UNROLL for (int n = 0; n < COUNT; n++) {
        gh[n] = load(grad_h + n * MM_BLOCK);
        gA[n] = splat(0.0f);
    }
    for (int64_t t = steps - 1; t >= 0; t--) {
        int64_t at = t * MM_BLOCK + lane;
        const float *before = s->trail + t * 2 * COUNT * LANES, *decays = before + COUNT * LANES;
        vf d = load(s->step + at), x = load(s->drive + at), gy = load(s->grad + at);
        vf from_B = is_first ? splat(0.0f) : load(s->from_B + at), from_A = is_first ? splat(0.0f) : load(s->from_A + at);
        vf to_B[COUNT], to_C[COUNT];
        for (int i = from; i < to; i++) __builtin_prefetch(row_at(&ahead->rows[i], t), 0, 2);
        UNROLL for (int n = 0; n < COUNT; n++) { /* h: the state after step t, then the one before it */
            vf g = gy * C[t * stride + n] + gh[n];
            to_B[n] = g * x;
            to_C[n] = gy * h[n];
            from_B += g * B[t * stride + n];
            gh[n] = g * load(decays + n * LANES);
            h[n] = load(before + n * LANES);
            vf gd = gh[n] * h[n]; /* of the exponent delta * A */
            from_A += gd * rate[n];
            gA[n] += gd * d;
            if (n & 1) { /* early, to free registers */
                float *sum = sums + (n / 2 * MM_CHUNK + t) * LANES;
                store(sum, load(sum) + sum_quarters(sum_pairs(to_B[n - 1], to_B[n]), sum_pairs(to_C[n - 1], to_C[n])));
            }
        }
        store(s->from_B + at, from_B);
        store(s->from_A + at, from_A);
    }
    UNROLL for (int n = 0; n < COUNT; n++) {
        store(grad_h + n * MM_BLOCK, gh[n]);
        add_up(grad_A + n * MM_BLOCK, to_lost, gA[n]);
    }
}

/* The tiles that the sweeps need. Returns the largest step size. The last group may run over the end, see
 * forward_prologue. */
INLINE float backward_prologue(const int softplus, const int gated, const backward_work *w, const float *D,
                               const float *bias, backward_scratch *s) {
    const int count = GROUP;
    const exp2_constants k = exp2_setup();
    vf largest = {0};
    for (int64_t t = 0; t < w->steps; t += GROUP_STEPS) {
        int64_t at = t * MM_BLOCK;
        vf x[GROUP], grad[GROUP], d[GROUP];
        EACH x[i] = load_unaligned(row_at(&w->u, t + GROUP_ROW(i)) + GROUP_LANE(i));
        EACH d[i] = load_unaligned(row_at(&w->delta, t + GROUP_ROW(i)) + GROUP_LANE(i)) + load(bias + GROUP_LANE(i));
        EACH grad[i] = load_unaligned(row_at(&w->grad_y, t + GROUP_ROW(i)) + GROUP_LANE(i));
        if (softplus) {
            vf slope[GROUP];
            softplus_and_slope_many(GROUP, &k, d, slope);
            EACH store(s->slope + at + i * LANES, slope[i]);
        }
        if (gated) {
            vf gate[GROUP], open[GROUP];
            EACH gate[i] = load_unaligned(row_at(&w->z, t + GROUP_ROW(i)) + GROUP_LANE(i));
            sigmoid_many(GROUP, &k, gate, open);
            EACH store(s->gate + at + i * LANES, grad[i] * (open[i] * (gate[i] * (1.0f - open[i]) + 1.0f)));
            EACH grad[i] *= gate[i] * open[i];
            EACH store(s->y + at + i * LANES, x[i] * load(D + GROUP_LANE(i)));
        }
        if (!EXP2_NEEDS_NO_BOUND) EACH largest = larger(magnitude(d[i]), largest);
        EACH store(s->step + at + i * LANES, d[i]);
        EACH store(s->drive + at + i * LANES, d[i] * x[i]);
        EACH store(s->grad + at + i * LANES, grad[i]);
    }
    return largest_lane(largest);
}

/* Gradients of the sequences from the sums of all sweeps, and what they add to those of D and of the bias. */
INLINE void backward_epilogue(const int softplus_, const int gated, const backward_work *w, const float *D,
                              float *grad_D, float *grad_bias, backward_scratch *s) {
    vf sum_bias[VECTORS], sum_D[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) sum_bias[v] = sum_D[v] = splat(0.0f);
    row_set sums = w->accumulate ? rows_to_read(&w->job->grad_u, w->b, w->g, w->channel, w->count, w->steps, w->position, s->trail)
                                 : rows_of_tile(s->trail);
    for (int64_t t = 0; t < w->steps; t++) {
        const float *u = row_at(&w->u, t), *sum = row_at(&sums, t);
        float *grad_u = row_at(&w->grad_u, t), *grad_delta = row_at(&w->grad_delta, t);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t at = t * MM_BLOCK + v * LANES;
            vf x = load_unaligned(u + v * LANES), grad = load(s->grad + at), from_B = load(s->from_B + at);
            vf gd = x * from_B + load(s->from_A + at) * LN2, gu = load(s->step + at) * from_B + load(D + v * LANES) * grad;
            if (w->accumulate) gu += load_unaligned(sum + v * LANES);
            if (softplus_) gd *= load(s->slope + at);
            sum_D[v] += grad * x;
            sum_bias[v] += gd;
            store_unaligned(grad_u + v * LANES, gu);
            store_unaligned(grad_delta + v * LANES, gd);
            if (gated) store_unaligned(row_at(&w->grad_z, t) + v * LANES, load(s->gate + at) * load(s->y + at));
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        add_up(grad_bias + v * LANES, lost_sums(mm_padded_states(w->job->d_state)), sum_bias[v]);
        add_up(grad_D + v * LANES, lost_sums(mm_padded_states(w->job->d_state)), sum_D[v]);
    }
}

/* All states of a block over a chunk; the rows that come next are asked for along the way. */
INLINE void backward_sweeps(const int with_y, const int bounded, int64_t steps, int64_t N, const float *rates,
                            const float *state, float *grad_h, float *grad_A, const float *B, const float *C, float *sums,
                            const look_ahead *ahead, backward_scratch *s) {
    int asked = 0, share = (int)mm_ceil(ahead->count, N / COUNT * VECTORS);
    for (int64_t n = 0; n < N; n += COUNT)
        for (int64_t lane = 0; lane < MM_BLOCK; lane += LANES) {
            int64_t at = n * MM_BLOCK + lane;
            float *sum = sums + n / 2 * MM_CHUNK * LANES;
            int next = asked + share < ahead->count ? asked + share : ahead->count;
            if (n == 0)
                retreat_states(with_y, bounded, 1, steps, N, rates + at, state + at, grad_h + at, grad_A + at, lost_sums(N), B + n, C + n,
                               sum, ahead, asked, next, lane, s);
            else
                retreat_states(with_y, bounded, 0, steps, N, rates + at, state + at, grad_h + at, grad_A + at, lost_sums(N), B + n, C + n,
                               sum, ahead, asked, next, lane, s);
            asked = next;
        }
}

/* ---- one state: forward and back over the chunk, with nothing but the states between ---- */

/* What the way back needs: step sizes, their slopes, decays, decayed states, and behind a gate the
 * gradient before it. The last group may run over the end, see forward_prologue. */
INLINE void advance_single_state(const int softplus_, const int gated, const backward_work *w, const float *B, const float *C,
                                 const float *D, const float *bias, const float *rates, const float *state,
                                 backward_scratch *s) {
    const int count = GROUP;
    const exp2_constants k = exp2_setup();
    vf h[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) h[v] = load(state + v * LANES);
    for (int64_t t = 0; t < w->steps; t += GROUP_STEPS) {
        int64_t at = t * MM_BLOCK;
        vf x[GROUP], d[GROUP], decay[GROUP];
        EACH x[i] = load_unaligned(row_at(&w->u, t + GROUP_ROW(i)) + GROUP_LANE(i));
        EACH d[i] = load_unaligned(row_at(&w->delta, t + GROUP_ROW(i)) + GROUP_LANE(i)) + load(bias + GROUP_LANE(i));
        if (softplus_) {
            vf slope[GROUP];
            softplus_and_slope_many(GROUP, &k, d, slope);
            EACH store(s->slope + at + i * LANES, slope[i]);
        }
        EACH decay[i] = d[i] * load(rates + GROUP_LANE(i));
        exp2_many_any(GROUP, &k, decay);
        EACH store(s->step + at + i * LANES, d[i]);
        EACH store(s->trail + at + i * LANES, decay[i]);
        EACH d[i] *= x[i];
        EACH {
            vf *state_of_lane = h + GROUP_LANE(i) / LANES, decayed = decay[i] * *state_of_lane;
            store(s->trail + TILE + at + i * LANES, decayed);
            d[i] = *state_of_lane = d[i] * B[t + GROUP_ROW(i)] + decayed;
        }
        if (gated) {
            vf gate[GROUP], open[GROUP], grad[GROUP];
            EACH gate[i] = load_unaligned(row_at(&w->z, t + GROUP_ROW(i)) + GROUP_LANE(i));
            EACH grad[i] = load_unaligned(row_at(&w->grad_y, t + GROUP_ROW(i)) + GROUP_LANE(i));
            sigmoid_many(GROUP, &k, gate, open);
            EACH store(s->grad + at + i * LANES, grad[i] * (gate[i] * open[i]));
            EACH d[i] = d[i] * C[t + GROUP_ROW(i)] + x[i] * load(D + GROUP_LANE(i));
            EACH if (t + GROUP_ROW(i) < w->steps)
                store_unaligned(row_at(&w->grad_z, t + GROUP_ROW(i)) + GROUP_LANE(i),
                                grad[i] * d[i] * (open[i] * (gate[i] * (1.0f - open[i]) + 1.0f)));
        }
    }
}

INLINE void retreat_single_state(const int softplus_, const int gated, const backward_work *w, const float *B,
                                 const float *C, const float *D, const float *rates, float *grad_h, float *grad_A,
                                 float *grad_D, float *grad_bias, float *sum_B, float *sum_C, const look_ahead *ahead,
                                 backward_scratch *s) {
    for (int64_t lane = 0; lane < MM_BLOCK; lane += LANES) {
        vf rate = load(rates + lane), skip = load(D + lane);
        vf gh = load(grad_h + lane), gA = {0}, gD = {0}, g_bias = {0};
        row_set sums = w->grad_u;
        if (w->accumulate)
            sums = rows_to_read(&w->job->grad_u, w->b, w->g, w->channel, w->count, w->steps, w->position, s->from_B);
        for (int64_t t = w->steps - 1; t >= 0; t--) {
            int64_t at = t * MM_BLOCK + lane;
            UNROLL for (int i = 0; i < 5 + 2 * gated; i++) __builtin_prefetch(row_at(&ahead->rows[i], t), 0, 2);
            vf x = load_unaligned(row_at(&w->u, t) + lane), d = load(s->step + at), decayed = load(s->trail + TILE + at);
            vf gy = gated ? load(s->grad + at) : load_unaligned(row_at(&w->grad_y, t) + lane);
            vf g = gy * C[t] + gh, drive = d * x, gd = g * decayed, from_B = g * B[t];
            store(sum_B + t * LANES, load(sum_B + t * LANES) + g * drive);
            store(sum_C + t * LANES, load(sum_C + t * LANES) + gy * (drive * B[t] + decayed));
            gD += gy * x;
            gA += gd * d;
            gh = g * load(s->trail + at);
            vf gu = d * from_B + skip * gy, g_delta = x * from_B + gd * rate * LN2;
            if (w->accumulate) gu += load_unaligned(row_at(&sums, t) + lane);
            if (softplus_) g_delta *= load(s->slope + at);
            g_bias += g_delta;
            store_unaligned(row_at(&w->grad_u, t) + lane, gu);
            store_unaligned(row_at(&w->grad_delta, t) + lane, g_delta);
        }
        store(grad_h + lane, gh);
        add_up(grad_A + lane, lost_sums(1), gA);
        add_up(grad_D + lane, lost_sums(1), gD);
        add_up(grad_bias + lane, lost_sums(1), g_bias);
    }
}

/* ---- a sequence ---- */

/* A block of channels in a chunk, with everything `mm_backward_block` speaks of in `kept`. */
INLINE void backward_block(const int softplus_, const int gated, const backward_work *w, int64_t N, float *kept,
                           float *state, const float *B, const float *C, float *sums, const look_ahead *ahead,
                           backward_scratch *s) {
    float *rates = kept, *grad_h = rates + N * MM_BLOCK, *D = grad_h + N * MM_BLOCK, *bias = D + MM_BLOCK;
    float *fastest = bias + MM_BLOCK, *grad_A = fastest + MM_BLOCK, *grad_D = grad_A + N * MM_BLOCK, *grad_bias = grad_D + MM_BLOCK;
    if (N == 1) {
        advance_single_state(softplus_, gated, w, B, C, D, bias, rates, state, s);
        retreat_single_state(softplus_, gated, w, B, C, D, rates, grad_h, grad_A, grad_D, grad_bias, sums,
                             sums + MM_CHUNK * LANES, ahead, s);
        return;
    }
    float largest = backward_prologue(softplus_, gated, w, D, bias, s);
    if (!EXP2_NEEDS_NO_BOUND && largest * fastest[0] <= EXP2_LIMIT)
        backward_sweeps(gated, 1, w->steps, N, rates, state, grad_h, grad_A, B, C, sums, ahead, s);
    else
        backward_sweeps(gated, 0, w->steps, N, rates, state, grad_h, grad_A, B, C, sums, ahead, s);
    backward_epilogue(softplus_, gated, w, D, grad_D, grad_bias, s);
}

static void backward_block_of(const backward_work *w, int64_t N, float *kept, float *state, const float *B,
                              const float *C, float *sums, const look_ahead *ahead, backward_scratch *s) {
    if (w->job->softplus) {
        if (w->z.base)
            backward_block(1, 1, w, N, kept, state, B, C, sums, ahead, s);
        else
            backward_block(1, 0, w, N, kept, state, B, C, sums, ahead, s);
    } else {
        if (w->z.base)
            backward_block(0, 1, w, N, kept, state, B, C, sums, ahead, s);
        else
            backward_block(0, 0, w, N, kept, state, B, C, sums, ahead, s);
    }
}

/* Where the sums of B and C of a share go: rows of the gradients themselves, in the order of the route, or rows in the order
 * of time that are added to them at the end of the stage. */
typedef struct {
    float *B, *C;
    int64_t stride; /* between rows */
    int in_time;    /* the order of the rows */
    int add;        /* to what is there */
} sums_target;

INLINE void put(float *to, const float *from, int64_t count, int add) {
    if (add)
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    else
        memcpy(to, from, (size_t)count * sizeof(float));
}

/* Adds up the lanes of a chunk's sums, and writes their rows, of which the first is number `first` of the order of time. */
static void write_sums(const sums_target *to, int64_t first, int64_t steps, const int64_t *position, int64_t d_state, int64_t N,
                       const float *sums) {
    float row_B[MM_MAX_STATE], row_C[MM_MAX_STATE];
    if (N == 1) {
        for (int64_t t = 0; t < steps; t += 4) {
            v4 B = lane_sums_of_four(sums + t * LANES), C = lane_sums_of_four(sums + (MM_CHUNK + t) * LANES);
            for (int64_t i = 0; i < 4 && t + i < steps; i++) {
                int64_t at = (to->in_time ? first + t + i : position[t + i]) * to->stride;
                to->B[at] = to->add ? to->B[at] + B[i] : B[i];
                to->C[at] = to->add ? to->C[at] + C[i] : C[i];
            }
        }
        return;
    }
    for (int64_t t = 0; t < steps; t++) {
        int64_t at = (to->in_time ? first + t : position[t]) * to->stride;
        float *to_B = to->B + at, *to_C = to->C + at;
        int there = d_state == N && !to->add;
        float *B = there ? to_B : row_B, *C = there ? to_C : row_C;
        for (int64_t n = 0; n < N; n += 4) {
            const float *from = sums + (n / 2 * MM_CHUNK + t) * LANES;
            v4 low = lane_sums(load(from)), high = lane_sums(load(from + MM_CHUNK * LANES));
            *(v4_unaligned *)(B + n) = SHUFFLE_4(low, high, 0, 1, 4, 5);
            *(v4_unaligned *)(C + n) = SHUFFLE_4(low, high, 2, 3, 6, 7);
        }
        if (there) continue;
        put(to_B, row_B, d_state, to->add);
        put(to_C, row_C, d_state, to->add);
    }
}

/* Some blocks of a group over the chunks of a stage, with what they keep from chunk to chunk. */
typedef struct {
    const mm_scan_job *job;
    int64_t b, g, begin, own; /* own: number of blocks, from block `begin` on */
    float *kept;
    sums_target to;
} backward_share;

static backward_share backward_share_of(const mm_scan_job *job, const mm_partials *partials, const mm_stage *stage, int64_t b,
                                        int64_t g, int64_t part, float *kept) {
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), N = job->d_state;
    int64_t begin = blocks * part / partials->parts, end = blocks * (part + 1) / partials->parts;
    backward_share x = {job, b, g, begin, end - begin, kept, {.add = part > 0}};
    if (!part || partials->in_order) {
        int64_t first = (b * job->length * job->groups + g) * N;
        x.to.B = job->grad_B + first, x.to.C = job->grad_C + first, x.to.stride = job->groups * N;
    } else {
        int64_t groups = job->merge ? 1 : job->groups, slot = (part - 1) * partials->batches + b - stage->batch;
        int64_t first = (slot * groups + (job->merge ? 0 : g)) * partials->chunks * MM_CHUNK * N;
        x.to = (sums_target){partials->B + first, partials->C + first, N, 1, 0};
    }
    return x;
}

static void begin_backward_share(const backward_share *x) {
    const mm_scan_job *job = x->job;
    int64_t N = mm_padded_states(job->d_state), per_block = mm_backward_block(N), tile = N * MM_BLOCK;
    memset(x->kept, 0, (size_t)(x->own * per_block) * sizeof(float));
    for (int64_t i = 0; i < x->own; i++) {
        float *rates = x->kept + i * per_block, *D = rates + 2 * tile, *bias = D + MM_BLOCK;
        int64_t channel = (x->begin + i) * MM_BLOCK, row = x->g * job->channels + channel;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->A + row * job->d_state, count, job->d_state, N, rates);
        scale_rates(rates, N * MM_BLOCK);
        vector_in(job->D ? job->D + row : NULL, count, D);
        vector_in(job->delta_bias ? job->delta_bias + row : NULL, count, bias);
        bias[MM_BLOCK] = fastest_rate(rates, N);
    }
}

static void backward_chunk(const backward_share *x, int64_t chunk, const mm_stage *stage, const int64_t *position,
                           int accumulate, const look_ahead *following, backward_scratch *s) {
    const mm_scan_job *job = x->job;
    int64_t N = mm_padded_states(job->d_state), rest = job->length - chunk * MM_CHUNK, steps = rest < MM_CHUNK ? rest : MM_CHUNK;
    int64_t per_block = mm_backward_block(N), tile = N * MM_BLOCK;
    float *state = s->rest, *sums = state + tile, *B = sums + backward_sums_floats(N), *C = B + MM_CHUNK * N;
    matrix_tile(&job->B, x->b, x->g, position, steps, job->d_state, N, B);
    matrix_tile(&job->C, x->b, x->g, position, steps, job->d_state, N, C);
    memset(sums, 0, (size_t)backward_sums_floats(N) * sizeof(float));
    for (int64_t i = 0; i < x->own; i++) {
        int64_t channel = (x->begin + i) * MM_BLOCK;
        backward_work w = begin_backward(job, x->b, x->g, channel, steps, position, accumulate, s);
        if (chunk)
            transpose_in(state_rows(job, x->b, x->g, chunk, channel), w.count, job->d_state, N, state);
        else
            memset(state, 0, (size_t)tile * sizeof(float));
        look_ahead ahead = *following;
        if (i + 1 < x->own) ahead = backward_rows_ahead(job, x->b, x->g, channel + MM_BLOCK, position);
        backward_block_of(&w, N, x->kept + i * per_block, state, B, C, sums, &ahead, s);
        end_backward(&w, s);
    }
    write_sums(&x->to, (chunk - stage->begin) * MM_CHUNK, steps, position, job->d_state, N, sums);
}

static void end_backward_share(const backward_share *x, const mm_partials *partials, const mm_stage *stage, backward_scratch *s) {
    const mm_scan_job *job = x->job;
    int64_t N = mm_padded_states(job->d_state), per_block = mm_backward_block(N), tile = N * MM_BLOCK;
    int64_t rows = job->groups * job->channels, add = partials->in_order && x->b > 0;
    float *to_A = job->grad_A, *to_D = job->grad_D, *to_bias = job->grad_delta_bias;
    if (x->b > 0 && !partials->in_order) {
        int64_t slot = x->b - (stage->batch ? stage->batch : 1);
        to_A = partials->A + slot * rows * job->d_state, to_D = partials->D + slot * rows, to_bias = partials->bias + slot * rows;
    }
    for (int64_t i = 0; i < x->own; i++) {
        const float *grad_A = x->kept + i * per_block + 2 * tile + 3 * MM_BLOCK, *grad_D = grad_A + tile;
        int64_t channel = (x->begin + i) * MM_BLOCK, at = x->g * job->channels + channel;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_out(s->trail, count, job->d_state, grad_A);
        put(to_A + at * job->d_state, s->trail, count * job->d_state, (int)add);
        if (job->D) put(to_D + at, grad_D, count, (int)add);
        if (job->delta_bias) put(to_bias + at, grad_D + MM_BLOCK, count, (int)add);
    }
}

/* Items: as in scan_forward, for the batches, the merged group and the chunks of the stage. Shares side by side, chunk by chunk,
 * from the last to the first; see forward_sequence. */
static void scan_backward(const mm_scan_job *job, const mm_partials *partials, int64_t number, int64_t item, void *scratch) {
    backward_scratch *s = scratch;
    const mm_stage stage = mm_stage_of(job, partials, number);
    int64_t first, count, b = stage.batch + bundle_of(job, partials, item, &first, &count);
    int64_t N = mm_padded_states(job->d_state), chunks = mm_ceil(job->length, MM_CHUNK);
    backward_share shares[MM_BUNDLE];
    float *kept = partials->kept ? partials->kept + item * partials->kept_of_item
                                 : s->rest + N * MM_BLOCK + backward_sums_floats(N) + 2 * MM_CHUNK * N;
    if (b >= stage.batch + stage.batches) return;
    for (int64_t i = 0; i < count; i++) {
        int64_t g = job->merge ? stage.group : (first + i) / partials->parts;
        shares[i] = backward_share_of(job, partials, &stage, b, g, (first + i) % partials->parts, kept);
        if (stage.end == chunks) begin_backward_share(&shares[i]);
        kept += shares[i].own * mm_backward_block(N);
    }
    route_positions(job, stage.group, (stage.end - 1) * MM_CHUNK, MM_CHUNK, s->position[(stage.end - 1) & 1]);
    for (int64_t chunk = stage.end - 1; chunk >= stage.begin; chunk--) {
        int64_t *position = s->position[chunk & 1], *following = s->position[~chunk & 1];
        route_positions(job, stage.group, chunk ? (chunk - 1) * MM_CHUNK : 0, MM_CHUNK, following);
        for (int64_t i = 0; i < count; i++) {
            const backward_share *next = &shares[i + 1 < count ? i + 1 : 0];
            look_ahead ahead = backward_rows_ahead(job, b, next->g, next->begin * MM_BLOCK, i + 1 < count ? position : following);
            backward_chunk(&shares[i], chunk, &stage, position, stage.group > 0, &ahead, s);
        }
    }
    if (!stage.begin)
        for (int64_t i = 0; i < count; i++) end_backward_share(&shares[i], partials, &stage, s);
}

/* Adds what the items of a stage have left, parts and batches in their order. */
static void scan_backward_sums(const mm_scan_job *job, const mm_partials *partials, int64_t number) {
    const mm_stage stage = mm_stage_of(job, partials, number);
    int64_t N = job->d_state, groups = job->merge ? 1 : job->groups, rows = job->groups * job->channels;
    int64_t steps = partials->chunks * MM_CHUNK, last = stage.end * MM_CHUNK < job->length ? stage.end * MM_CHUNK : job->length;
    if (partials->in_order) return;
    for (int64_t part = 1; part < partials->parts; part++)
        for (int64_t b = 0; b < stage.batches; b++)
            for (int64_t first = stage.begin * MM_CHUNK; first < last; first += MM_CHUNK) {
                int64_t position[MM_CHUNK], count = last - first < MM_CHUNK ? last - first : MM_CHUNK;
                route_positions(job, stage.group, first, count, position);
                for (int64_t g = 0; g < groups; g++) {
                    int64_t slot = (((part - 1) * partials->batches + b) * groups + g) * steps + first - stage.begin * MM_CHUNK;
                    for (int64_t t = 0; t < count; t++) {
                        int64_t row = ((stage.batch + b) * job->length + position[t]) * job->groups + g + stage.group;
                        put(job->grad_B + row * N, partials->B + (slot + t) * N, N, 1);
                        put(job->grad_C + row * N, partials->C + (slot + t) * N, N, 1);
                    }
                }
            }
    if (stage.begin || (job->merge && stage.group < job->groups - 1)) return;
    for (int64_t b = stage.batch ? 0 : 1, slot = 0; b < stage.batches; b++, slot++) {
        put(job->grad_A, partials->A + slot * rows * N, rows * N, 1);
        if (job->D) put(job->grad_D, partials->D + slot * rows, rows, 1);
        if (job->delta_bias) put(job->grad_delta_bias, partials->bias + slot * rows, rows, 1);
    }
}

#endif
