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

/* Adds the sums over the lanes of four vectors, from what sum_quarters made of them, to four numbers. */
INLINE void add_lane_sums(vf quarters, float *sums) {
    const v4_unaligned *parts = (const v4_unaligned *)&quarters;
    v4 sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    *(v4_unaligned *)sums += sum;
}

INLINE float lane_sum(vf x) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

typedef struct {
    float step[TILE], drive[TILE], slope[TILE]; /* delta, delta * u, derivative of the softplus */
    float grad[TILE];                           /* gradient of the output before the gate */
    float y[TILE], gate[TILE];                  /* output before the gate, derivative by the gate */
    float from_B[TILE], from_A[TILE];           /* sums over the states: grad_h B, and of the decay */
    float u[TILE];                              /* input, where it cannot be read where it lies */
    float trail[2 * TILE * 4];                  /* of four states: decayed state and decay at every step */
    int64_t position[2][MM_CHUNK];
    float rest[] __attribute__((aligned(64)));
} backward_scratch;

/* Of a block: rates, gradient of the state and of A (N, 16); D, bias, their gradients, [0]: the largest rate (16). */
static size_t backward_block_floats(int64_t padded) { return (size_t)((5 + 3 * padded) * MM_BLOCK); }

static size_t scan_backward_scratch(const mm_scan_job *job, const mm_partials *partials) {
    int64_t N = mm_padded_states(job->d_state);
    int64_t blocks = mm_ceil(mm_ceil(job->channels, MM_BLOCK), partials->parts);
    /* beside the blocks: the state (N, 16), the tiles of B and C and their gradients (64, N), or (64, LANES) if N is 1 */
    int64_t sums = 2 * MM_CHUNK * (N == 1 ? LANES : N);
    return sizeof(backward_scratch) +
           ((size_t)blocks * backward_block_floats(N) + (size_t)(N * MM_BLOCK + 2 * MM_CHUNK * N + sums)) * sizeof(float);
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

/* `count` states of one vector of channels: forward over the chunk to know the states, then back. */
INLINE void retreat_states(const int with_y, const int bounded, const int is_first, int64_t steps, int64_t stride,
                           const float *rates, float *state, float *grad_h, float *grad_A, const float *B,
                           const float *C, float *sum_B, float *sum_C, const look_ahead *ahead, int from, int to,
                           int64_t lane, backward_scratch *s) {
    enum { COUNT = 4 };
    const exp2_constants k = exp2_setup();
    vf h[COUNT], rate[COUNT];
    float *trail = s->trail;
    UNROLL for (int n = 0; n < COUNT; n++) {
        h[n] = load(state + n * MM_BLOCK);
        rate[n] = load(rates + n * MM_BLOCK);
    }
    for (int64_t t = 0; t < steps; t++) {
        int64_t at = t * MM_BLOCK + lane;
        vf d = load(s->step + at), x = load(s->drive + at), y = {0};
        UNROLL for (int n = 0; n < COUNT; n++) {
            vf exponent = d * rate[n];
            vf decay = bounded ? exp2_bounded(&k, exponent) : exp2_any(&k, exponent);
            vf decayed = decay * h[n];
            h[n] = x * B[t * stride + n] + decayed;
            store(trail + (t * 2 * COUNT + n) * LANES, decayed);
            store(trail + (t * 2 * COUNT + COUNT + n) * LANES, decay);
            if (with_y) y += h[n] * C[t * stride + n];
        }
        if (with_y) store(s->y + at, load(s->y + at) + y);
    }
    vf gh[COUNT], gA[COUNT];
    UNROLL for (int n = 0; n < COUNT; n++) {
        gh[n] = load(grad_h + n * MM_BLOCK);
        gA[n] = load(grad_A + n * MM_BLOCK);
    }
    for (int64_t t = steps - 1; t >= 0; t--) {
        int64_t at = t * MM_BLOCK + lane;
        vf d = load(s->step + at), x = load(s->drive + at), gy = load(s->grad + at);
        vf from_B = is_first ? splat(0.0f) : load(s->from_B + at), from_A = is_first ? splat(0.0f) : load(s->from_A + at);
        vf to_B[COUNT], to_C[COUNT], pairs_B[COUNT / 2], pairs_C[COUNT / 2];
        for (int i = from; i < to; i++) __builtin_prefetch(row_at(&ahead->rows[i], t), 0, 2);
        UNROLL for (int n = 0; n < COUNT; n++) {
            float Bn = B[t * stride + n];
            vf decayed = load(trail + (t * 2 * COUNT + n) * LANES);
            vf g = gy * C[t * stride + n] + gh[n];
            to_B[n] = g * x;
            to_C[n] = gy * (x * Bn + decayed);
            from_B += g * Bn;
            vf gd = g * decayed; /* of the exponent delta * A */
            from_A += gd * rate[n];
            gA[n] += gd * d;
            gh[n] = g * load(trail + (t * 2 * COUNT + COUNT + n) * LANES);
            if (n & 1) { /* early, to free registers */
                pairs_B[n / 2] = sum_pairs(to_B[n - 1], to_B[n]);
                pairs_C[n / 2] = sum_pairs(to_C[n - 1], to_C[n]);
            }
        }
        store(s->from_B + at, from_B);
        store(s->from_A + at, from_A);
        add_lane_sums(sum_quarters(pairs_B[0], pairs_B[1]), sum_B + t * stride);
        add_lane_sums(sum_quarters(pairs_C[0], pairs_C[1]), sum_C + t * stride);
    }
    UNROLL for (int n = 0; n < COUNT; n++) {
        store(grad_h + n * MM_BLOCK, gh[n]);
        store(grad_A + n * MM_BLOCK, gA[n]);
    }
}

/* The tiles that the sweeps need, and the sum for the gradient of D. Returns the largest step size. */
INLINE float backward_prologue(const int softplus, const int gated, const backward_work *w, const float *D,
                               const float *bias, float *grad_D, backward_scratch *s) {
    const int count = VECTORS;
    const exp2_constants k = exp2_setup();
    vf sum_D[VECTORS], largest = {0};
    EACH sum_D[i] = load(grad_D + i * LANES);
    for (int64_t t = 0; t < w->steps; t++) {
        const float *u = row_at(&w->u, t), *delta = row_at(&w->delta, t), *gy = row_at(&w->grad_y, t);
        int64_t at = t * MM_BLOCK;
        vf x[VECTORS], grad[VECTORS], d[VECTORS];
        EACH x[i] = load_unaligned(u + i * LANES);
        EACH d[i] = load_unaligned(delta + i * LANES) + load(bias + i * LANES);
        EACH grad[i] = load_unaligned(gy + i * LANES);
        if (softplus) {
            vf slope[VECTORS];
            softplus_and_slope_many(VECTORS, &k, d, slope);
            EACH store(s->slope + at + i * LANES, slope[i]);
        }
        if (gated) {
            vf gate[VECTORS], open[VECTORS];
            EACH gate[i] = load_unaligned(row_at(&w->z, t) + i * LANES);
            sigmoid_many(VECTORS, &k, gate, open);
            EACH store(s->gate + at + i * LANES, grad[i] * (open[i] * (gate[i] * (1.0f - open[i]) + 1.0f)));
            EACH grad[i] *= gate[i] * open[i];
            EACH store(s->y + at + i * LANES, x[i] * load(D + i * LANES));
        }
        if (!EXP2_NEEDS_NO_BOUND) EACH largest = at_least(magnitude(d[i]), largest);
        EACH sum_D[i] += grad[i] * x[i];
        EACH store(s->step + at + i * LANES, d[i]);
        EACH store(s->drive + at + i * LANES, d[i] * x[i]);
        EACH store(s->grad + at + i * LANES, grad[i]);
    }
    EACH store(grad_D + i * LANES, sum_D[i]);
    return largest_lane(largest);
}

INLINE void backward_epilogue(const int softplus_, const int gated, const backward_work *w, const float *D,
                              float *grad_bias, backward_scratch *s) {
    vf sum_bias[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) sum_bias[v] = load(grad_bias + v * LANES);
    row_set sums = w->accumulate ? rows_to_read(&w->job->grad_u, w->b, w->g, w->channel, w->count, w->steps, w->position, s->trail)
                                 : rows_of_tile(s->trail);
    for (int64_t t = 0; t < w->steps; t++) {
        const float *u = row_at(&w->u, t), *sum = row_at(&sums, t);
        float *grad_u = row_at(&w->grad_u, t), *grad_delta = row_at(&w->grad_delta, t);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t at = t * MM_BLOCK + v * LANES;
            vf from_B = load(s->from_B + at), gd = load_unaligned(u + v * LANES) * from_B + load(s->from_A + at) * LN2;
            vf gu = load(s->step + at) * from_B + load(D + v * LANES) * load(s->grad + at);
            if (w->accumulate) gu += load_unaligned(sum + v * LANES);
            if (softplus_) gd *= load(s->slope + at);
            sum_bias[v] += gd;
            store_unaligned(grad_u + v * LANES, gu);
            store_unaligned(grad_delta + v * LANES, gd);
            if (gated) store_unaligned(row_at(&w->grad_z, t) + v * LANES, load(s->gate + at) * load(s->y + at));
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) store(grad_bias + v * LANES, sum_bias[v]);
}

INLINE void backward_sweeps(const int with_y, const int bounded, int64_t steps, int64_t N, const float *rates,
                            float *state, float *grad_h, float *grad_A, const float *B, const float *C, float *sum_B,
                            float *sum_C, const look_ahead *ahead, backward_scratch *s) {
    int asked = 0, share = (int)mm_ceil(ahead->count, N / 4 * VECTORS);
    for (int64_t n = 0; n < N; n += 4)
        for (int64_t lane = 0; lane < MM_BLOCK; lane += LANES) {
            int64_t at = n * MM_BLOCK + lane;
            int next = asked + share < ahead->count ? asked + share : ahead->count;
            if (n == 0)
                retreat_states(with_y, bounded, 1, steps, N, rates + at, state + at, grad_h + at, grad_A + at, B + n, C + n,
                               sum_B + n, sum_C + n, ahead, asked, next, lane, s);
            else
                retreat_states(with_y, bounded, 0, steps, N, rates + at, state + at, grad_h + at, grad_A + at, B + n, C + n,
                               sum_B + n, sum_C + n, ahead, asked, next, lane, s);
            asked = next;
        }
}

/* ---- one state: forward and back over the chunk, with nothing but the states between ---- */

INLINE void retreat_single_state(const int softplus_, const int gated, const backward_work *w, const float *B,
                                 const float *C, const float *D, const float *bias, const float *rates, float *state,
                                 float *grad_h, float *grad_A, float *grad_D, float *grad_bias, float *sum_B,
                                 float *sum_C, const look_ahead *ahead, backward_scratch *s) {
    const exp2_constants k = exp2_setup();
    for (int64_t lane = 0; lane < MM_BLOCK; lane += LANES) {
        vf h = load(state + lane), rate = load(rates + lane), skip = load(D + lane), shift = load(bias + lane);
        for (int64_t t = 0; t < w->steps; t++) {
            int64_t at = t * MM_BLOCK + lane;
            vf x = load_unaligned(row_at(&w->u, t) + lane), slope, d = load_unaligned(row_at(&w->delta, t) + lane) + shift;
            if (softplus_) {
                softplus_and_slope_many(1, &k, &d, &slope);
                store(s->slope + at, slope);
            }
            vf decay = exp2_any(&k, d * rate), decayed = decay * h;
            h = d * x * B[t] + decayed;
            store(s->step + at, d);
            store(s->trail + at, decay);
            store(s->trail + TILE + at, decayed);
            if (gated) {
                vf gate = load_unaligned(row_at(&w->z, t) + lane), open;
                sigmoid_many(1, &k, &gate, &open);
                vf grad = load_unaligned(row_at(&w->grad_y, t) + lane), y = h * C[t] + x * skip;
                store(s->grad + at, grad * (gate * open));
                store_unaligned(row_at(&w->grad_z, t) + lane, grad * y * (open * (gate * (1.0f - open) + 1.0f)));
            }
        }
        vf gh = load(grad_h + lane), gA = load(grad_A + lane), gD = load(grad_D + lane), g_bias = load(grad_bias + lane);
        row_set sums = w->grad_u;
        if (w->accumulate)
            sums = rows_to_read(&w->job->grad_u, w->b, w->g, w->channel, w->count, w->steps, w->position, s->from_B);
        for (int64_t t = w->steps - 1; t >= 0; t--) {
            int64_t at = t * MM_BLOCK + lane;
            for (int i = 0; i < ahead->count; i++) __builtin_prefetch(row_at(&ahead->rows[i], t), 0, 2);
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
        store(grad_A + lane, gA);
        store(grad_D + lane, gD);
        store(grad_bias + lane, g_bias);
    }
}

/* ---- a sequence ---- */

/* A block of channels in a chunk, with everything `backward_block_floats` speaks of in `kept`. */
INLINE void backward_block(const int softplus_, const int gated, const backward_work *w, int64_t N, float *kept,
                           float *state, const float *B, const float *C, float *sum_B, float *sum_C,
                           const look_ahead *ahead, backward_scratch *s) {
    float *rates = kept, *grad_h = rates + N * MM_BLOCK, *grad_A = grad_h + N * MM_BLOCK, *D = grad_A + N * MM_BLOCK;
    float *bias = D + MM_BLOCK, *grad_D = bias + MM_BLOCK, *grad_bias = grad_D + MM_BLOCK, *fastest = grad_bias + MM_BLOCK;
    if (N == 1) {
        retreat_single_state(softplus_, gated, w, B, C, D, bias, rates, state, grad_h, grad_A, grad_D, grad_bias, sum_B,
                             sum_C, ahead, s);
        return;
    }
    float largest = backward_prologue(softplus_, gated, w, D, bias, grad_D, s);
    if (!EXP2_NEEDS_NO_BOUND && largest * fastest[0] <= EXP2_LIMIT)
        backward_sweeps(gated, 1, w->steps, N, rates, state, grad_h, grad_A, B, C, sum_B, sum_C, ahead, s);
    else
        backward_sweeps(gated, 0, w->steps, N, rates, state, grad_h, grad_A, B, C, sum_B, sum_C, ahead, s);
    backward_epilogue(softplus_, gated, w, D, grad_bias, s);
}

static void backward_block_of(const backward_work *w, int64_t N, float *kept, float *state, const float *B,
                              const float *C, float *sum_B, float *sum_C, const look_ahead *ahead, backward_scratch *s) {
    if (w->job->softplus) {
        if (w->z.base)
            backward_block(1, 1, w, N, kept, state, B, C, sum_B, sum_C, ahead, s);
        else
            backward_block(1, 0, w, N, kept, state, B, C, sum_B, sum_C, ahead, s);
    } else {
        if (w->z.base)
            backward_block(0, 1, w, N, kept, state, B, C, sum_B, sum_C, ahead, s);
        else
            backward_block(0, 0, w, N, kept, state, B, C, sum_B, sum_C, ahead, s);
    }
}

static void backward_sequence(const mm_scan_job *job, const mm_partials *partials, int64_t b, int64_t g, int64_t part,
                              int accumulate, backward_scratch *s) {
    int64_t L = job->length, N = mm_padded_states(job->d_state), chunks = mm_ceil(L, MM_CHUNK);
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), lanes = N == 1 ? LANES : N;
    int64_t begin = blocks * part / partials->parts, end = blocks * (part + 1) / partials->parts, own = end - begin;
    size_t per_block = backward_block_floats(N), tile = (size_t)N * MM_BLOCK;
    float *state = s->rest, *sum_B = state + tile, *sum_C = sum_B + MM_CHUNK * lanes, *B = sum_C + MM_CHUNK * lanes;
    float *C = B + MM_CHUNK * N, *kept = C + MM_CHUNK * N;
    int64_t matrix = job->batch * L * job->groups * job->d_state;
    float *to_B = part ? partials->B + (part - 1) * matrix : job->grad_B;
    float *to_C = part ? partials->C + (part - 1) * matrix : job->grad_C;
    memset(kept, 0, (size_t)own * per_block * sizeof(float));
    for (int64_t i = 0; i < own; i++) {
        float *rates = kept + (size_t)i * per_block, *D = rates + 3 * tile, *bias = D + MM_BLOCK;
        int64_t channel = (begin + i) * MM_BLOCK, row = g * job->channels + channel;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->A + row * job->d_state, count, job->d_state, N, rates);
        scale_rates(rates, N * MM_BLOCK);
        vector_in(job->D ? job->D + row : NULL, count, D);
        vector_in(job->delta_bias ? job->delta_bias + row : NULL, count, bias);
        bias[3 * MM_BLOCK] = fastest_rate(rates, N);
    }
    route_positions(job, g, (chunks - 1) * MM_CHUNK, MM_CHUNK, s->position[(chunks - 1) & 1]);
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        int64_t first = chunk * MM_CHUNK, steps = L - first < MM_CHUNK ? L - first : MM_CHUNK;
        const int64_t *position = s->position[chunk & 1];
        int64_t *following = s->position[~chunk & 1];
        matrix_tile(&job->B, b, g, position, steps, job->d_state, N, B);
        matrix_tile(&job->C, b, g, position, steps, job->d_state, N, C);
        memset(sum_B, 0, (size_t)(2 * MM_CHUNK * lanes) * sizeof(float));
        route_positions(job, g, chunk ? first - MM_CHUNK : first, MM_CHUNK, following);
        for (int64_t i = 0; i < own; i++) {
            int64_t channel = (begin + i) * MM_BLOCK;
            backward_work w = begin_backward(job, b, g, channel, steps, position, accumulate, s);
            look_ahead ahead = i + 1 < own ? backward_rows_ahead(job, b, g, channel + MM_BLOCK, position)
                                           : backward_rows_ahead(job, b, g, begin * MM_BLOCK, following);
            if (chunk)
                transpose_in(state_rows(job, b, g, chunk, channel), w.count, job->d_state, N, state);
            else
                memset(state, 0, tile * sizeof(float));
            backward_block_of(&w, N, kept + (size_t)i * per_block, state, B, C, sum_B, sum_C, &ahead, s);
            end_backward(&w, s);
        }
        for (int64_t t = 0; t < steps; t++) {
            int64_t at = ((b * L + position[t]) * job->groups + g) * job->d_state;
            if (N == 1) {
                to_B[at] = lane_sum(load(sum_B + t * LANES));
                to_C[at] = lane_sum(load(sum_C + t * LANES));
            } else {
                memcpy(to_B + at, sum_B + t * N, (size_t)job->d_state * sizeof(float));
                memcpy(to_C + at, sum_C + t * N, (size_t)job->d_state * sizeof(float));
            }
        }
    }
    for (int64_t i = 0; i < own; i++) {
        const float *grad_A = kept + (size_t)i * per_block + 2 * tile, *grad_D = grad_A + tile + 2 * MM_BLOCK;
        int64_t channel = (begin + i) * MM_BLOCK;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        int64_t at = (b * job->groups + g) * job->channels + channel;
        transpose_out(partials->A + at * job->d_state, count, job->d_state, grad_A);
        memcpy(partials->D + at, grad_D, (size_t)count * sizeof(float));
        memcpy(partials->bias + at, grad_D + MM_BLOCK, (size_t)count * sizeof(float));
    }
}

/* Items: (batch, part), all routes in turn, if the groups are merged; else (batch, group, part). */
static void scan_backward(const mm_scan_job *job, const mm_partials *partials, int64_t item, void *scratch) {
    int64_t part = item % partials->parts;
    item /= partials->parts;
    int64_t g = job->merge ? 0 : item % job->groups, b = item / (job->merge ? 1 : job->groups);
    for (int64_t last = job->merge ? job->groups : g + 1, first = g; g < last; g++)
        backward_sequence(job, partials, b, g, part, g > first, scratch);
}

#endif
