/* The causal depthwise convolution, forward and backward. */
#ifndef MONAI_MAMBA_CONVOLUTION_H
#define MONAI_MAMBA_CONVOLUTION_H

#include "rows.h"

enum { CONV_STEPS = 16 }; /* steps of one tile of the forward pass, whose rows stay in the first-level cache */

typedef struct {
    const float *in[MM_MAX_TAPS - 1 + CONV_STEPS]; /* rows of the tile and the ones before it, oldest first */
    float *out[CONV_STEPS];
    /* weights (taps, C), bias (C), zeros (C); converted rows, inputs (taps - 1 + CONV_STEPS, C), outputs (CONV_STEPS, C) */
    float rest[] __attribute__((aligned(64)));
} conv_scratch_forward;

typedef struct {
    float weight[MM_MAX_TAPS * MM_BLOCK], bias[MM_BLOCK], grad_weight[MM_MAX_TAPS * MM_BLOCK], grad_bias[MM_BLOCK];
    float x[(MM_CHUNK + 2 * MM_MAX_TAPS) * MM_BLOCK], grad[(MM_CHUNK + MM_MAX_TAPS) * MM_BLOCK], out[TILE];
} conv_scratch_backward;

static size_t conv_scratch(const mm_conv_job *job) {
    size_t padded = (size_t)mm_ceil(job->channels, MM_BLOCK) * MM_BLOCK;
    size_t rows = (size_t)job->taps + 2 + (size_t)job->taps - 1 + 2 * CONV_STEPS;
    size_t forward = sizeof(conv_scratch_forward) + rows * padded * sizeof(float);
    return forward > sizeof(conv_scratch_backward) ? forward : sizeof(conv_scratch_backward);
}

/* Four taps of one vector of channels over the steps of a tile, four at a time; inputs stay in registers. */
INLINE void convolve_four(const int with_silu, int64_t steps, int64_t c, int64_t padded, const float *const *in,
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
                convolve_four(1, steps, c, padded, s->in, s->out, weight, bias);
            else
                convolve_four(0, steps, c, padded, s->in, s->out, weight, bias);
        }
        if (!direct)
            for (int64_t t = 0; t < steps; t++)
                row_from_float(element(&job->y, b, begin + t, 0, 0), s->out[t], job->y.dtype, channels);
    }
}

INLINE void conv_backward_chunk(const int known_taps, const mm_conv_job *job, int64_t b, int64_t channel, int64_t count,
                                int64_t first, int64_t steps, conv_scratch_backward *s) {
    int64_t taps = known_taps ? known_taps : job->taps, ahead = taps - 1, L = job->length;
    const exp2_constants e = exp2_setup();
    for (int64_t t = 0; t < steps + 2 * ahead; t++) { /* x from first - ahead */
        int64_t l = first - ahead + t;
        memset(s->x + t * MM_BLOCK, 0, MM_BLOCK * sizeof(float));
        if (l >= 0 && l < L) row_to_float(s->x + t * MM_BLOCK, element(&job->x, b, l, 0, channel), job->x.dtype, count);
    }
    for (int64_t t = 0; t < steps + ahead; t++) { /* gradient before the SiLU, from first */
        int64_t l = first + t;
        memset(s->grad + t * MM_BLOCK, 0, MM_BLOCK * sizeof(float));
        if (l >= L) continue;
        row_to_float(s->grad + t * MM_BLOCK, element(&job->grad_y, b, l, 0, channel), job->grad_y.dtype, count);
        if (!job->silu) continue;
        for (int v = 0; v < VECTORS; v++) {
            vf y = load(s->bias + v * LANES);
            UNROLL for (int64_t k = 0; k < taps; k++)
                y += load(s->x + (t + k) * MM_BLOCK + v * LANES) * load(s->weight + k * MM_BLOCK + v * LANES);
            vf open;
            sigmoid_many(1, &e, &y, &open);
            float *grad = s->grad + t * MM_BLOCK + v * LANES;
            store(grad, load(grad) * (open * (y * (1.0f - open) + 1.0f)));
        }
    }
    row_set target = rows_in_memory(&job->grad_x, b, 0, channel, IN_ORDER);
    target.base += first * target.stride;
    row_set out = is_plain(&job->grad_x, count) ? target : rows_of_tile(s->out);
    for (int64_t t = 0; t < steps; t++) {
        for (int v = 0; v < VECTORS; v++) {
            vf sum = {0};
            UNROLL for (int64_t k = 0; k < taps; k++)
                sum += load(s->grad + (t + ahead - k) * MM_BLOCK + v * LANES) * load(s->weight + k * MM_BLOCK + v * LANES);
            store_unaligned(row_at(&out, t) + v * LANES, sum);
        }
    }
    if (!is_plain(&job->grad_x, count)) empty_tile(&target, job->grad_x.dtype, count, steps, s->out);
    for (int v = 0; v < VECTORS; v++) {
        for (int64_t k = 0; k < taps; k++) {
            vf sum = {0};
            for (int64_t t = 0; t < steps; t++)
                sum += load(s->grad + t * MM_BLOCK + v * LANES) * load(s->x + (t + k) * MM_BLOCK + v * LANES);
            float *total = s->grad_weight + k * MM_BLOCK + v * LANES;
            store(total, load(total) + sum);
        }
        vf sum = {0};
        for (int64_t t = 0; t < steps; t++) sum += load(s->grad + t * MM_BLOCK + v * LANES);
        store(s->grad_bias + v * LANES, load(s->grad_bias + v * LANES) + sum);
    }
}

/* Items: (batch, block of 16 channels). */
static void conv_backward(const mm_conv_job *job, const mm_partials *partials, int64_t item, void *scratch) {
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), b = item / blocks, channel = item % blocks * MM_BLOCK;
    int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK, taps = job->taps;
    conv_scratch_backward *s = scratch;
    memset(s->grad_weight, 0, sizeof s->grad_weight);
    memset(s->grad_bias, 0, sizeof s->grad_bias);
    transpose_in(job->weight + channel * taps, count, taps, taps, s->weight);
    vector_in(job->bias ? job->bias + channel : NULL, count, s->bias);
    for (int64_t first = 0; first < job->length; first += MM_CHUNK) {
        int64_t steps = job->length - first < MM_CHUNK ? job->length - first : MM_CHUNK;
        if (taps == 4)
            conv_backward_chunk(4, job, b, channel, count, first, steps, s);
        else
            conv_backward_chunk(0, job, b, channel, count, first, steps, s);
    }
    transpose_out(partials->A + (b * job->channels + channel) * taps, count, taps, s->grad_weight);
    memcpy(partials->bias + b * job->channels + channel, s->grad_bias, (size_t)count * sizeof(float));
}

#endif
