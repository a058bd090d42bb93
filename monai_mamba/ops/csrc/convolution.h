/* The causal depthwise convolution, forward and backward. */
#ifndef MONAI_MAMBA_CONVOLUTION_H
#define MONAI_MAMBA_CONVOLUTION_H

#include "rows.h"

enum { CONV_STEPS = 32 }; /* steps of one tile of the forward pass, whose rows stay in the caches near the core */

typedef struct {
    const float *in[MM_MAX_TAPS - 1 + CONV_STEPS]; /* rows of the tile and the ones before it, oldest first */
    float *out[CONV_STEPS];
    /* weights (taps, C), bias (C), zeros (C); converted rows, inputs (taps - 1 + CONV_STEPS, C), outputs (CONV_STEPS, C) */
    float rest[] __attribute__((aligned(64)));
} conv_scratch_forward;

enum { CONV_REACH = MM_CHUNK + MM_MAX_TAPS + GROUP }; /* steps of a chunk, those behind that it has an effect on, and a group */

typedef struct {
    const float *x[CONV_REACH + MM_MAX_TAPS], *grad_y[CONV_REACH]; /* rows, from taps - 1 steps before and from the first on */
    float grad[CONV_REACH * MM_BLOCK] __attribute__((aligned(64))), out[TILE], zero[MM_BLOCK]; /* grad: before the SiLU */
    float converted_x[(CONV_REACH + MM_MAX_TAPS) * MM_BLOCK], converted_grad_y[CONV_REACH * MM_BLOCK];
    /* of every block: weights (taps, 16) and bias, their gradients, and what rounding took from these, see `add_up` */
    float rest[] __attribute__((aligned(64)));
} conv_scratch_backward;

static size_t conv_block_floats(int64_t taps) { return (size_t)(3 * (taps + 1) * MM_BLOCK); }

/* bundle: blocks that a work item of the backward pass takes side by side */
static size_t conv_scratch(const mm_conv_job *job, int64_t bundle) {
    size_t padded = (size_t)mm_ceil(job->channels, MM_BLOCK) * MM_BLOCK;
    size_t rows = (size_t)job->taps + 2 + (size_t)job->taps - 1 + 2 * CONV_STEPS;
    size_t forward = sizeof(conv_scratch_forward) + rows * padded * sizeof(float);
    size_t backward = sizeof(conv_scratch_backward) + (size_t)bundle * conv_block_floats(job->taps) * sizeof(float);
    return forward > backward ? forward : backward;
}

/* Four taps of one vector of channels over the steps of a tile, four at a time; inputs stay in registers. */
INLINE void convolve_four(const int with_silu, const int streamed, int64_t steps, int64_t c, int64_t padded, const float *const *in,
                          float *const *out, const float *weight, const float *bias) {
    const int count = 4; /* steps done together */
    const exp2_constants e = exp2_setup();
    vf w[4], x[7], b = load_unaligned(bias + c);
    UNROLL for (int k = 0; k < 4; k++) w[k] = load_unaligned(weight + k * padded + c);
    UNROLL for (int k = 0; k < 3; k++) x[k] = load_unaligned(in[k] + c);
    for (int64_t t = 0; t < steps; t += count) {
        vf y[4];
        EACH x[3 + i] = load_unaligned(in[t + 3 + i] + c);
        EACH y[i] = b + x[i] * w[0];
        EACH y[i] += x[i + 1] * w[1];
        EACH y[i] += x[i + 2] * w[2];
        EACH y[i] += x[i + 3] * w[3];
        if (with_silu) silu_many(count, &e, y);
        if (streamed)
            EACH stream(out[t + i] + c, y[i]);
        else
            EACH store_unaligned(out[t + i] + c, y[i]);
        UNROLL for (int k = 0; k < 3; k++) x[k] = x[4 + k];
    }
}

INLINE void convolve_any(int64_t taps, int64_t with_silu, int64_t steps, int64_t c, int64_t padded, const float *const *in,
                         float *const *out, const float *weight, const float *bias) {
    const exp2_constants e = exp2_setup();
    for (int64_t t = 0; t < steps; t++) {
        vf y = load_unaligned(bias + c);
        for (int64_t k = 0; k < taps; k++) y += load_unaligned(in[t + k] + c) * load_unaligned(weight + k * padded + c);
        if (with_silu) silu_many(1, &e, &y);
        store_unaligned(out[t] + c, y);
    }
}

/* Items: (batch, segment of the sequence), in tiles of some steps and all channels. */
static void conv_forward(const mm_conv_job *job, int64_t item, void *scratch) {
    int64_t segments = mm_ceil(job->length, MM_CONV_SEGMENT), b = item / segments;
    int64_t first = item % segments * MM_CONV_SEGMENT, taps = job->taps, before = taps - 1, channels = job->channels;
    int64_t last = first + MM_CONV_SEGMENT < job->length ? first + MM_CONV_SEGMENT : job->length;
    int64_t padded = mm_ceil(channels, MM_BLOCK) * MM_BLOCK;
    conv_scratch_forward *s = scratch;
    float *weight = s->rest, *bias = weight + taps * padded, *zero = bias + padded, *converted = zero + padded;
    float *results = converted + (before + CONV_STEPS) * padded;
    int direct = job->x.dtype == MM_FLOAT32 && job->y.dtype == MM_FLOAT32 && channels >= LANES;
    int streamed = direct && is_streamed(&job->y, job->batch, job->length, channels);
    int64_t width = direct ? channels : padded;
    memset(weight, 0, (size_t)(converted - weight) * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t k = 0; k < taps; k++) weight[k * padded + c] = job->weight[c * taps + k];
        if (job->bias) bias[c] = job->bias[c];
    }
    if (!direct) memset(converted, 0, (size_t)((before + CONV_STEPS) * padded) * sizeof(float));
    for (int64_t begin = first; begin < last; begin += CONV_STEPS) {
        int64_t steps = last - begin < CONV_STEPS ? last - begin : CONV_STEPS;
        for (int64_t t = 0; t < before + steps; t++) {
            int64_t l = begin - before + t;
            s->in[t] = direct ? (const float *)element(&job->x, b, l, 0, 0) : converted + t * padded;
            if (l < 0)
                s->in[t] = zero;
            else if (!direct)
                row_to_float(converted + t * padded, element(&job->x, b, l, 0, 0), job->x.dtype, channels);
        }
        for (int64_t t = 0; t < steps; t++)
            s->out[t] = direct ? (float *)element(&job->y, b, begin + t, 0, 0) : results + t * padded;
        for (int64_t at = 0; at < width; at += LANES) {
            int64_t c = at + LANES <= width ? at : width - LANES; /* the last vector may overlap the one before it */
            if (taps != 4 || steps % 4)
                convolve_any(taps, job->silu, steps, c, padded, s->in, s->out, weight, bias);
            else if (job->silu)
                streamed ? convolve_four(1, 1, steps, c, padded, s->in, s->out, weight, bias)
                         : convolve_four(1, 0, steps, c, padded, s->in, s->out, weight, bias);
            else
                streamed ? convolve_four(0, 1, steps, c, padded, s->in, s->out, weight, bias)
                         : convolve_four(0, 0, steps, c, padded, s->in, s->out, weight, bias);
        }
        if (!direct)
            for (int64_t t = 0; t < steps; t++)
                row_from_float(element(&job->y, b, begin + t, 0, 0), s->out[t], job->y.dtype, channels);
    }
    if (streamed) end_of_streams();
}

/* A row of 16 channels: where it lies if it is plain, zero outside of the sequence, else converted. */
INLINE const float *conv_row(const mm_view *v, int64_t b, int64_t l, int64_t length, int64_t channel, int64_t filled,
                             const float *zero, float *converted) {
    if (l < 0 || l >= length) return zero;
    const char *row = element(v, b, l, 0, channel);
    if (is_plain(v, filled)) return (const float *)row;
    memset(converted, 0, MM_BLOCK * sizeof(float));
    row_to_float(converted, row, v->dtype, filled);
    return converted;
}

static look_ahead conv_rows_ahead(const mm_conv_job *job, int64_t b, int64_t first, int64_t block) {
    look_ahead a = {.count = 3};
    const mm_view *views[] = {&job->x, &job->grad_y, &job->grad_x};
    for (int i = 0; i < a.count; i++) {
        a.rows[i] = rows_in_memory(views[i], b, 0, block * MM_BLOCK, IN_ORDER);
        a.rows[i].base += first * a.rows[i].stride;
    }
    return a;
}

INLINE void conv_backward_chunk(const int known_taps, const mm_conv_job *job, int64_t b, int64_t channel, int64_t filled,
                                int64_t first, int64_t steps, const look_ahead *next, float *kept, conv_scratch_backward *s) {
    const int count = GROUP;
    const int64_t taps = known_taps ? known_taps : job->taps, ahead = taps - 1, L = job->length, reach = steps + ahead;
    const int64_t to_lost = (taps + 1) * MM_BLOCK;
    const exp2_constants e = exp2_setup();
    float *weight = kept, *bias = weight + taps * MM_BLOCK, *grad_weight = bias + MM_BLOCK, *grad_bias = grad_weight + taps * MM_BLOCK;
    for (int64_t t = 0; t < reach + GROUP_STEPS; t++)
        s->grad_y[t] = conv_row(&job->grad_y, b, first + t, L, channel, filled, s->zero, s->converted_grad_y + t * MM_BLOCK);
    for (int64_t t = 0; t < reach + ahead + GROUP_STEPS; t++)
        s->x[t] = conv_row(&job->x, b, first - ahead + t, L, channel, filled, s->zero, s->converted_x + t * MM_BLOCK);
    for (int64_t t = 0; t < reach; t += GROUP_STEPS) {
        vf grad[GROUP];
        EACH grad[i] = load_unaligned(s->grad_y[t + GROUP_ROW(i)] + GROUP_LANE(i));
        if (job->silu) {
            vf y[GROUP], open[GROUP];
            EACH y[i] = load(bias + GROUP_LANE(i));
            UNROLL for (int64_t k = 0; k < taps; k++)
                EACH y[i] += load_unaligned(s->x[t + GROUP_ROW(i) + k] + GROUP_LANE(i)) * load(weight + k * MM_BLOCK + GROUP_LANE(i));
            sigmoid_many(GROUP, &e, y, open);
            EACH grad[i] *= open[i] * (y[i] * (1.0f - open[i]) + 1.0f);
        }
        EACH store(s->grad + t * MM_BLOCK + i * LANES, grad[i]);
    }
    for (int64_t t = L - first; t < reach; t++) memset(s->grad + t * MM_BLOCK, 0, MM_BLOCK * sizeof(float)); /* NaN else */
    row_set target = rows_in_memory(&job->grad_x, b, 0, channel, IN_ORDER);
    target.base += first * target.stride;
    row_set out = is_plain(&job->grad_x, filled) ? target : rows_of_tile(s->out);
    for (int64_t t = 0; t < steps; t++) {
        for (int i = 0; i < next->count; i++) __builtin_prefetch(row_at(&next->rows[i], t), 0, 2);
        for (int v = 0; v < VECTORS; v++) {
            vf sum = {0};
            UNROLL for (int64_t k = 0; k < taps; k++)
                sum += load(s->grad + (t + ahead - k) * MM_BLOCK + v * LANES) * load(weight + k * MM_BLOCK + v * LANES);
            store_unaligned(row_at(&out, t) + v * LANES, sum);
        }
    }
    if (!is_plain(&job->grad_x, filled)) empty_tile(&target, job->grad_x.dtype, filled, steps, s->out);
    for (int v = 0; v < MM_BLOCK; v += LANES) {
        vf sum = {0};
        for (int64_t t = 0; t < steps; t++) sum += load(s->grad + t * MM_BLOCK + v);
        add_up(grad_bias + v, to_lost, sum);
        for (int64_t k = 0; k < taps; k += 4) {
            const int count = 4; /* sums side by side; beyond the last tap they are not kept */
            vf sums[4] = {{0}};
            for (int64_t t = 0; t < steps; t++) {
                vf grad = load(s->grad + t * MM_BLOCK + v);
                EACH sums[i] += grad * load_unaligned(s->x[t + (k + i < taps ? k + i : k)] + v);
            }
            EACH if (k + i < taps) add_up(grad_weight + (k + i) * MM_BLOCK + v, to_lost, sums[i]);
        }
    }
}

/* Items: (batch, bundle of blocks of 16 channels), chunk by chunk, so that rows of memory are gone through once. */
static void conv_backward(const mm_conv_job *job, const mm_partials *partials, int64_t item, void *scratch) {
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), bundles = mm_ceil(blocks, partials->bundle), taps = job->taps;
    int64_t b = item / bundles, begin = blocks * (item % bundles) / bundles, end = blocks * (item % bundles + 1) / bundles;
    size_t per_block = conv_block_floats(taps);
    conv_scratch_backward *s = scratch;
    memset(s->zero, 0, sizeof s->zero);
    memset(s->rest, 0, (size_t)(end - begin) * per_block * sizeof(float));
    for (int64_t i = begin; i < end; i++) {
        float *weight = s->rest + (size_t)(i - begin) * per_block;
        int64_t channel = i * MM_BLOCK, filled = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->weight + channel * taps, filled, taps, taps, weight);
        vector_in(job->bias ? job->bias + channel : NULL, filled, weight + taps * MM_BLOCK);
    }
    for (int64_t first = 0; first < job->length; first += MM_CHUNK)
        for (int64_t i = begin; i < end; i++) {
            float *kept = s->rest + (size_t)(i - begin) * per_block;
            int64_t channel = i * MM_BLOCK, filled = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
            int64_t steps = job->length - first < MM_CHUNK ? job->length - first : MM_CHUNK;
            look_ahead next = conv_rows_ahead(job, b, i + 1 < end ? first : first + MM_CHUNK, i + 1 < end ? i + 1 : begin);
            if (taps == 4)
                conv_backward_chunk(4, job, b, channel, filled, first, steps, &next, kept, s);
            else
                conv_backward_chunk(0, job, b, channel, filled, first, steps, &next, kept, s);
        }
    for (int64_t i = begin; i < end; i++) {
        const float *grad_weight = s->rest + (size_t)(i - begin) * per_block + (taps + 1) * MM_BLOCK;
        int64_t channel = i * MM_BLOCK, filled = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_out(partials->A + (b * job->channels + channel) * taps, filled, taps, grad_weight);
        memcpy(partials->bias + b * job->channels + channel, grad_weight + taps * MM_BLOCK, (size_t)filled * sizeof(float));
    }
}

#endif
