/* Arrays in memory and tiles of float32: types, strides, routes and the ragged last channels end here. */
#ifndef MONAI_MAMBA_ROWS_H
#define MONAI_MAMBA_ROWS_H

#include "vectors.h"

/* ---- types: rows of at most 16 elements to and from float32 ---- */

INLINE size_t size_of(int64_t dtype) { return dtype == MM_FLOAT32 ? 4 : 2; }

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu, bits;
    float value;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else { /* zero and subnormal numbers: mantissa * 2^-24 */
        value = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (bits < 0x38800000u) { /* subnormal: let the float adder round to a multiple of 2^-24 */
        float scaled;
        memcpy(&scaled, &bits, 4);
        scaled += 0.5f;
        memcpy(&bits, &scaled, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u); /* nearest, ties to even */
    return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}

static void row_to_float(float *restrict to, const void *from, int64_t dtype, int64_t count) {
    if (dtype == MM_FLOAT32) {
        memcpy(to, from, (size_t)count * 4);
    } else if (dtype == MM_BFLOAT16) {
        const uint16_t *source = from;
        uint32_t bits;
        for (int64_t i = 0; i < count; i++) {
            bits = (uint32_t)source[i] << 16;
            memcpy(to + i, &bits, 4);
        }
    } else {
        const uint16_t *source = from;
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + i))));
#endif
        for (; i < count; i++) to[i] = half_to_float(source[i]);
    }
}

static void row_from_float(void *to, const float *restrict from, int64_t dtype, int64_t count) {
    if (dtype == MM_FLOAT32) {
        memcpy(to, from, (size_t)count * 4);
    } else if (dtype == MM_BFLOAT16) {
        uint16_t *target = to;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            target[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
        }
    } else {
        uint16_t *target = to;
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128((__m128i *)(target + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
        for (; i < count; i++) target[i] = float_to_half(from[i]);
    }
}

INLINE char *element(const mm_view *v, int64_t batch, int64_t step, int64_t group, int64_t last) {
    int64_t offset = batch * v->batch + step * v->step + group * v->group + last;
    return (char *)v->data + offset * (int64_t)size_of(v->dtype);
}

/* Rows of 16 channels as float32, one for each step of a chunk. */
typedef struct {
    char *base;
    int64_t stride; /* bytes */
    const int64_t *position;
} row_set;

INLINE float *row_at(const row_set *r, int64_t t) { return (float *)(r->base + r->position[t] * r->stride); }

INLINE int is_plain(const mm_view *v, int64_t count) { return v->dtype == MM_FLOAT32 && count == MM_BLOCK; }

/* Whether a result of (batch, length, width) is large and its rows are whole lines, see `stream`. */
INLINE int is_streamed(const mm_view *v, int64_t batch, int64_t length, int64_t width) {
    int64_t of_line = (int64_t)((uintptr_t)v->data % 64) | (v->batch | v->step | v->group | width) % 16;
    return CAN_STREAM && v->dtype == MM_FLOAT32 && of_line == 0 && batch * length * width >= MM_STREAMED;
}

/* Where the rows lie in memory, in their own type. */
INLINE row_set rows_in_memory(const mm_view *v, int64_t b, int64_t g, int64_t channel, const int64_t *position) {
    row_set r = {element(v, b, 0, g, channel), v->step * (int64_t)size_of(v->dtype), position};
    return r;
}

/* Rows that will be read or written soon. */
typedef struct {
    row_set rows[7];
    int count;
} look_ahead;

static const int64_t IN_ORDER[MM_CHUNK] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
};

INLINE row_set rows_of_tile(float *tile) {
    row_set r = {(char *)tile, MM_BLOCK * sizeof(float), IN_ORDER};
    return r;
}

static void fill_tile(const row_set *r, int64_t dtype, int64_t count, int64_t steps, float *tile) {
    memset(tile, 0, TILE * sizeof(float)); /* also past the end, where nothing may stand that is not a number */
    for (int64_t t = 0; t < steps; t++) {
        row_to_float(tile + t * MM_BLOCK, row_at(r, t), dtype, count);
    }
}

static void empty_tile(const row_set *r, int64_t dtype, int64_t count, int64_t steps, const float *tile) {
    for (int64_t t = 0; t < steps; t++) row_from_float(row_at(r, t), tile + t * MM_BLOCK, dtype, count);
}

/* Rows to read: the memory itself where it holds 16 float32, else a converted, padded copy in the tile. */
INLINE row_set rows_to_read(const mm_view *v, int64_t b, int64_t g, int64_t channel, int64_t count, int64_t steps,
                            const int64_t *position, float *tile) {
    row_set r = rows_in_memory(v, b, g, channel, position);
    if (is_plain(v, count)) return r;
    fill_tile(&r, v->dtype, count, steps, tile);
    return rows_of_tile(tile);
}

/* Rows to write, which finish_rows then brings to where they belong. */
INLINE row_set rows_to_write(const mm_view *v, int64_t b, int64_t g, int64_t channel, int64_t count,
                             const int64_t *position, float *tile) {
    return is_plain(v, count) ? rows_in_memory(v, b, g, channel, position) : rows_of_tile(tile);
}

INLINE void finish_rows(const mm_view *v, int64_t b, int64_t g, int64_t channel, int64_t count, int64_t steps,
                        const int64_t *position, const float *tile) {
    if (is_plain(v, count)) return;
    row_set r = rows_in_memory(v, b, g, channel, position);
    empty_tile(&r, v->dtype, count, steps, tile);
}

/* ---- tiles ---- */

/* Vectors of four rows, two, or one, done together; `GROUP_ROW` and `GROUP_LANE` tell where vector i lies. */
enum { GROUP = 4, GROUP_STEPS = GROUP * LANES / MM_BLOCK };
#define GROUP_ROW(i) ((i) * LANES / MM_BLOCK)
#define GROUP_LANE(i) ((i) * LANES % MM_BLOCK)

/* Positions in memory of the steps of a chunk. Steps past the end repeat the last one, for prefetching. */
static void route_positions(const mm_scan_job *job, int64_t group, int64_t first, int64_t count, int64_t *position) {
    int64_t route = job->merge ? job->routes[group] : job->routes[0];
    int64_t last = job->length - 1, reversed = route == MM_ROW_REVERSED || route == MM_COLUMN_REVERSED;
    for (int64_t t = 0; t < count; t++) {
        int64_t step = first + t < last ? first + t : last;
        if (reversed) step = last - step;
        if (route == MM_COLUMN || route == MM_COLUMN_REVERSED) {
            int64_t column = step / job->height;
            step = (step - column * job->height) * job->width + column;
        }
        position[t] = step;
    }
}

/* Batch of a work item (within its stage), and its bundle of shares. */
static int64_t bundle_of(const mm_scan_job *job, const mm_partials *partials, int64_t item, int64_t *first, int64_t *count) {
    int64_t shares = mm_shares(job, partials), bundles = mm_ceil(shares, partials->bundle);
    *first = shares * (item % bundles) / bundles;
    *count = shares * (item % bundles + 1) / bundles - *first;
    return item / bundles;
}

/* Matrix rows (B or C) of a chunk as (steps, padded states). */
static void matrix_tile(const mm_view *m, int64_t b, int64_t g, const int64_t *position, int64_t steps, int64_t d_state,
                        int64_t padded, float *tile) {
    const char *base = element(m, b, 0, g, 0);
    int64_t stride = m->step * (int64_t)size_of(m->dtype);
    for (int64_t t = 0; t < steps; t++, tile += padded) {
        const char *row = base + position[t] * stride;
        if (m->dtype == MM_FLOAT32 && d_state == 1) {
            memcpy(tile, row, sizeof(float));
        } else if (m->dtype == MM_FLOAT32 && d_state == padded) {
            for (int64_t n = 0; n < padded; n += 4) memcpy(tile + n, row + n * sizeof(float), 4 * sizeof(float));
        } else {
            row_to_float(tile, row, m->dtype, d_state);
            for (int64_t n = d_state; n < padded; n++) tile[n] = 0.0f;
        }
    }
}

/* 4 x 4 numbers from rows `from` apart to rows `to` apart, transposed. */
INLINE void transpose_4(const float *source, int64_t from, float *target, int64_t to) {
    v4 a = *(const v4_unaligned *)source, b = *(const v4_unaligned *)(source + from);
    v4 c = *(const v4_unaligned *)(source + 2 * from), d = *(const v4_unaligned *)(source + 3 * from);
    v4 ab = SHUFFLE_4(a, b, 0, 4, 1, 5), ab_high = SHUFFLE_4(a, b, 2, 6, 3, 7);
    v4 cd = SHUFFLE_4(c, d, 0, 4, 1, 5), cd_high = SHUFFLE_4(c, d, 2, 6, 3, 7);
    *(v4_unaligned *)target = SHUFFLE_4(ab, cd, 0, 1, 4, 5);
    *(v4_unaligned *)(target + to) = SHUFFLE_4(ab, cd, 2, 3, 6, 7);
    *(v4_unaligned *)(target + 2 * to) = SHUFFLE_4(ab_high, cd_high, 0, 1, 4, 5);
    *(v4_unaligned *)(target + 3 * to) = SHUFFLE_4(ab_high, cd_high, 2, 3, 6, 7);
}

/* (channels, N) rows as (padded N, 16); what is padded is 0. */
static void transpose_in(const float *rows, int64_t count, int64_t d_state, int64_t padded, float *tile) {
    int64_t i = 0, whole = d_state / 4 * 4;
    if (count < MM_BLOCK || d_state < padded) memset(tile, 0, (size_t)padded * MM_BLOCK * sizeof(float));
    for (; i + 4 <= count; i += 4) {
        for (int64_t n = 0; n < whole; n += 4)
            transpose_4(rows + i * d_state + n, d_state, tile + n * MM_BLOCK + i, MM_BLOCK);
        for (int64_t k = i; k < i + 4; k++)
            for (int64_t n = whole; n < d_state; n++) tile[n * MM_BLOCK + k] = rows[k * d_state + n];
    }
    for (; i < count; i++)
        for (int64_t n = 0; n < d_state; n++) tile[n * MM_BLOCK + i] = rows[i * d_state + n];
}

static void transpose_out(float *rows, int64_t count, int64_t d_state, const float *tile) {
    int64_t i = 0, whole = d_state / 4 * 4;
    for (; i + 4 <= count; i += 4) {
        for (int64_t n = 0; n < whole; n += 4)
            transpose_4(tile + n * MM_BLOCK + i, MM_BLOCK, rows + i * d_state + n, d_state);
        for (int64_t k = i; k < i + 4; k++)
            for (int64_t n = whole; n < d_state; n++) rows[k * d_state + n] = tile[n * MM_BLOCK + k];
    }
    for (; i < count; i++)
        for (int64_t n = 0; n < d_state; n++) rows[i * d_state + n] = tile[n * MM_BLOCK + i];
}

/* Decay rates for exp2 instead of exp. A NaN becomes the plain one, because exp2_bounded shifts the payload of a NaN
 * into the exponent. */
static void scale_rates(float *rates, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float rate = rates[i] * LOG2E;
        rates[i] = rate == rate ? rate : NAN;
    }
}

static void vector_in(const float *row, int64_t count, float *tile) {
    memset(tile, 0, MM_BLOCK * sizeof(float));
    if (row) memcpy(tile, row, (size_t)count * sizeof(float));
}

/* Largest decay rate of a tile (N, 16), or 0 where nobody asks for it. NaN is passed over. */
static float fastest_rate(const float *rates, int64_t N) {
    vf largest = {0};
    if (EXP2_NEEDS_NO_BOUND) return 0.0f;
    for (int64_t i = 0; i < N * MM_BLOCK; i += LANES) largest = larger(magnitude(load(rates + i)), largest);
    return largest_lane(largest);
}

/* The saved states before a chunk; there are none before the first, where the state is zero. */
static float *state_rows(const mm_scan_job *job, int64_t b, int64_t g, int64_t chunk, int64_t channel) {
    int64_t saved = mm_ceil(job->length, MM_CHUNK) - 1, N = job->d_state;
    return job->states + ((b * saved + chunk - 1) * job->groups * job->channels + g * job->channels + channel) * N;
}

#endif
