/* The arithmetic of the selective scan and the causal convolution, compiled once per instruction set.
 *
 * Vectors run across channels; a work item scans 16 channels over the whole sequence in chunks of 64 steps. Each chunk
 * is brought into float32 tiles (type conversion, strides, routes and the ragged last channels end there), so the
 * inner loops see dense data in the first-level cache only. Nothing depends on the number of threads.
 *
 * Written with the vector extensions of GCC and Clang; the few intrinsics have a portable twin.
 */
#include "scan.h"

#include <math.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef MM_LANES
#if defined(__AVX512F__)
#define MM_LANES 16
#elif defined(__AVX__)
#define MM_LANES 8
#else
#define MM_LANES 4
#endif
#endif

#ifndef MM_VARIANT
#define MM_VARIANT baseline
#endif
#define MM_JOIN_(a, b) a##b
#define MM_JOIN(a, b) MM_JOIN_(a, b)
#define MM_TEXT_(a) #a
#define MM_TEXT(a) MM_TEXT_(a)

enum { LANES = MM_LANES, VECTORS = MM_BLOCK / MM_LANES, TILE = MM_CHUNK * MM_BLOCK };

/* States of one forward sweep: as many as leave the state, the decay rates and the constants in registers. */
#if MM_LANES == 16 || defined(__aarch64__)
#define SWEEP 8
#else
#define SWEEP 4
#endif

typedef float vf __attribute__((vector_size(MM_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(MM_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(MM_LANES * 4)));
typedef float vf_aligned __attribute__((vector_size(MM_LANES * 4), may_alias));
typedef float vf_unaligned __attribute__((vector_size(MM_LANES * 4), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vf load(const float *p) { return *(const vf_aligned *)p; }
INLINE vf load_unaligned(const float *p) { return *(const vf_unaligned *)p; }
INLINE void store(float *p, vf x) { *(vf_aligned *)p = x; }
INLINE void store_unaligned(float *p, vf x) { *(vf_unaligned *)p = x; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* max(bound, x) and min(bound, x) that let a NaN in x through, which is what the SSE and AVX instructions do when x is
 * the second operand. */
#if defined(__AVX512F__) && MM_LANES == 16
INLINE vf at_least(vf bound, vf x) { return (vf)_mm512_max_ps((__m512)bound, (__m512)x); }
INLINE vf at_most(vf bound, vf x) { return (vf)_mm512_min_ps((__m512)bound, (__m512)x); }
#elif defined(__AVX__) && MM_LANES == 8
INLINE vf at_least(vf bound, vf x) { return (vf)_mm256_max_ps((__m256)bound, (__m256)x); }
INLINE vf at_most(vf bound, vf x) { return (vf)_mm256_min_ps((__m256)bound, (__m256)x); }
#elif defined(__SSE2__) && MM_LANES == 4
INLINE vf at_least(vf bound, vf x) { return (vf)_mm_max_ps((__m128)bound, (__m128)x); }
INLINE vf at_most(vf bound, vf x) { return (vf)_mm_min_ps((__m128)bound, (__m128)x); }
#elif defined(__ARM_NEON) && defined(__aarch64__) && MM_LANES == 4
INLINE vf at_least(vf bound, vf x) { return (vf)vmaxq_f32((float32x4_t)bound, (float32x4_t)x); }
INLINE vf at_most(vf bound, vf x) { return (vf)vminq_f32((float32x4_t)bound, (float32x4_t)x); }
#else
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf at_least(vf bound, vf x) { return choose(bound > x, bound, x); }
INLINE vf at_most(vf bound, vf x) { return choose(bound < x, bound, x); }
#endif

INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

/* 2^f on [-1/2, 1/2]: minimax of the relative error with the value 1 at 0 held, so that decays near 1, which act over
 * thousands of steps, carry no bias. Error 9.2e-8. Read through `volatile`, the constants stay in registers. */
typedef struct {
    vf magic, c[5];
} exp2_constants;

static const float EXP2_CONSTANTS[6] = {
    12582912.0f, /* 1.5 * 2^23 */
    6.931470036506653e-1f, 2.4022242426872253e-1f, 5.550733581185341e-2f, 9.671512991189957e-3f, 1.326472731307149e-3f,
};

INLINE exp2_constants exp2_setup(void) {
    const volatile float *from = EXP2_CONSTANTS;
    exp2_constants k = {splat(from[0]), {splat(from[1]), splat(from[2]), splat(from[3]), splat(from[4]), splat(from[5])}};
    return k;
}

INLINE vf exp2_fraction(const exp2_constants *k, vf f) {
    vf p = f * k->c[4] + k->c[3];
    p = p * f + k->c[2];
    p = p * f + k->c[1];
    p = p * f + k->c[0];
    return p * f + 1.0f;
}

/* 2^x for |x| <= EXP2_LIMIT; for every x: 0 or 2^-126 far below, infinity above 128, NaN for NaN. */
#define EXP2_LIMIT 126.0f
#if defined(__AVX512DQ__) && MM_LANES == 16
/* The remainder after rounding to the nearest integer, and scaling by that integer, are instructions here. */
INLINE vf exp2_bounded(const exp2_constants *k, vf x) {
    vf f = (vf)_mm512_reduce_ps((__m512)x, 8);
    return (vf)_mm512_scalef_ps((__m512)exp2_fraction(k, f), (__m512)(x - f));
}
INLINE vf exp2_any(const exp2_constants *k, vf x) { return exp2_bounded(k, x); }
#else
/* Rounding by adding 1.5 * 2^23 leaves the integer in the low bits of the sum. */
INLINE vf exp2_bounded(const exp2_constants *k, vf x) {
    vf t = x + k->magic;
    vf p = exp2_fraction(k, x - (t - k->magic));
    return (vf)((vu)p + ((vu)t << 23));
}
INLINE vf exp2_any(const exp2_constants *k, vf x) {
    return exp2_bounded(k, at_most(splat(128.0f), at_least(splat(-126.0f), x)));
}
#endif

/* log(1 + e) for e in [0, 1] as a series of atanh, exact to rounding also for tiny e. */
INLINE vf log1p_(vf e) {
    vf s = e / (e + 2.0f), q = s * s;
    vf q2 = q * q;
    vf p = (q * 2.817833371e-1f + 2.796060302e-1f) * q2 + (q * 4.002491026e-1f + 6.666631468e-1f);
    return (p * q + 2.0f) * s;
}

INLINE vf softplus(const exp2_constants *k, vf x) {
    vf e = exp2_bounded(k, at_least(splat(-EXP2_LIMIT), magnitude(x) * -LOG2E));
    return at_least(splat(0.0f), x) + log1p_(e);
}
INLINE vf sigmoid(const exp2_constants *k, vf x) { return 1.0f / (exp2_any(k, x * -LOG2E) + 1.0f); }

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

/* A row of 16 channels as float32: the data itself where it can be read as it is, else a converted, padded copy. */
INLINE const float *channel_row(const char *source, int64_t dtype, int64_t count, float *buffer) {
    if (dtype == MM_FLOAT32 && count == MM_BLOCK) return (const float *)source;
    row_to_float(buffer, source, dtype, count);
    return buffer;
}

INLINE void store_row(char *target, int64_t dtype, int64_t count, const float *row) {
    if (dtype == MM_FLOAT32 && count == MM_BLOCK) {
        for (int v = 0; v < VECTORS; v++) store_unaligned((float *)target + v * LANES, load(row + v * LANES));
    } else {
        row_from_float(target, row, dtype, count);
    }
}

/* ---- tiles ---- */

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

/* Matrix rows (B or C) of a chunk as (steps, padded states). */
static void matrix_tile(const mm_view *m, int64_t b, int64_t g, const int64_t *position, int64_t steps, int64_t d_state,
                        int64_t padded, float *tile) {
    for (int64_t t = 0; t < steps; t++) {
        const char *row = element(m, b, position[t], g, 0);
        if (d_state == 1 && m->dtype == MM_FLOAT32)
            memcpy(tile + t, row, sizeof(float));
        else
            row_to_float(tile + t * padded, row, m->dtype, d_state);
        for (int64_t n = d_state; n < padded; n++) tile[t * padded + n] = 0.0f;
    }
}

/* (channels, N) rows as (padded N, 16), times a factor; what is padded is 0. A NaN becomes the plain one, because
 * exp2_ shifts the payload of a NaN into the exponent. */
static void transpose_in(const float *rows, int64_t count, int64_t d_state, int64_t padded, float factor, float *tile) {
    memset(tile, 0, (size_t)padded * MM_BLOCK * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < d_state; n++) {
            float value = rows[i * d_state + n] * factor;
            tile[n * MM_BLOCK + i] = value == value ? value : NAN;
        }
}

static void transpose_out(float *rows, int64_t count, int64_t d_state, const float *tile) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < d_state; n++) rows[i * d_state + n] = tile[n * MM_BLOCK + i];
}

static void vector_in(const float *row, int64_t count, float *tile) {
    memset(tile, 0, MM_BLOCK * sizeof(float));
    if (row) memcpy(tile, row, (size_t)count * sizeof(float));
}

static float largest_magnitude(const float *values, int64_t count) {
    float result = 0.0f;
    for (int64_t i = 0; i < count; i++) result = fabsf(values[i]) > result ? fabsf(values[i]) : result;
    return result;
}

static float *state_rows(const mm_scan_job *job, int64_t b, int64_t g, int64_t chunk, int64_t channel) {
    int64_t chunks = mm_ceil(job->length, MM_CHUNK), N = job->d_state;
    return job->states + ((b * chunks + chunk) * job->groups * job->channels + g * job->channels + channel) * N;
}

/* ---- forward ---- */

/* A work item scans some blocks of channels side by side, chunk by chunk: neighbouring blocks share the tiles of B and
 * C, the lines of the cache and the pages of memory. */
typedef struct {
    float step[TILE], drive[TILE], y[TILE]; /* delta, delta * u, output */
    float row[2 * MM_BLOCK];
    int64_t position[2][MM_CHUNK];
    float rest[] __attribute__((aligned(64))); /* block_state of every block; B and C tiles (64, N) */
} forward_scratch;

typedef struct {
    float D[MM_BLOCK], bias[MM_BLOCK];
    float fastest[MM_BLOCK];                /* [0]: largest decay rate */
    float rates[] __attribute__((aligned(64))); /* (N, 16), then the state (N, 16) */
} block_state;

static size_t block_state_floats(int64_t padded) { return (size_t)(3 * MM_BLOCK + 2 * padded * MM_BLOCK); }

static size_t scan_forward_scratch(const mm_scan_job *job, int64_t parts) {
    int64_t N = mm_padded_states(job->d_state), blocks = mm_ceil(mm_ceil(job->channels, MM_BLOCK), parts);
    return sizeof(forward_scratch) + ((size_t)blocks * block_state_floats(N) + (size_t)(2 * MM_CHUNK * N)) * sizeof(float);
}

/* `count` states of one vector of channels over a chunk; y is added to. */
INLINE void advance_states(const int count, const int bounded, int64_t steps, int64_t stride, const float *rates, float *state,
                           const float *step, const float *drive, const float *B, const float *C, float *y) {
    const exp2_constants k = exp2_setup();
    vf h[8], rate[8];
    UNROLL for (int n = 0; n < count; n++) {
        h[n] = load(state + n * MM_BLOCK);
        rate[n] = load(rates + n * MM_BLOCK);
    }
    for (int64_t t = 0; t < steps; t++) {
        vf d = load(step + t * MM_BLOCK), x = load(drive + t * MM_BLOCK);
        vf even = load(y + t * MM_BLOCK), odd = {0};
        const float *Bt = B + t * stride, *Ct = C + t * stride;
        UNROLL for (int n = 0; n < count; n++) {
            vf exponent = d * rate[n];
            h[n] = (bounded ? exp2_bounded(&k, exponent) : exp2_any(&k, exponent)) * h[n] + x * Bt[n];
            if (n & 1)
                odd += h[n] * Ct[n];
            else
                even += h[n] * Ct[n];
        }
        store(y + t * MM_BLOCK, count > 1 ? even + odd : even);
    }
    UNROLL for (int n = 0; n < count; n++) store(state + n * MM_BLOCK, h[n]);
}

/* delta, delta * u and D * u of a chunk. Returns the largest step size. */
INLINE float forward_prologue(const int softplus_, const mm_scan_job *job, int64_t b, int64_t g, int64_t channel,
                              int64_t count, int64_t steps, const int64_t *position, const block_state *block,
                              forward_scratch *s) {
    const exp2_constants k = exp2_setup();
    vf largest = {0};
    memset(s->row, 0, sizeof s->row);
    /* Two loops: the first is bound by memory, the second by the latency of the softplus, which short bodies hide. */
    for (int64_t t = 0; t < steps; t++) {
        const float *u = channel_row(element(&job->u, b, position[t], g, channel), job->u.dtype, count, s->row);
        const float *delta = channel_row(element(&job->delta, b, position[t], g, channel), job->delta.dtype, count,
                                         s->row + MM_BLOCK);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vf x = load_unaligned(u + v * LANES);
            store(s->drive + t * MM_BLOCK + v * LANES, x);
            store(s->y + t * MM_BLOCK + v * LANES, x * load(block->D + v * LANES));
            store(s->step + t * MM_BLOCK + v * LANES,
                  load_unaligned(delta + v * LANES) + load(block->bias + v * LANES));
        }
    }
    for (int64_t at = 0; at < steps * MM_BLOCK; at += LANES) {
        vf d = load(s->step + at);
        if (softplus_) {
            d = softplus(&k, d);
            store(s->step + at, d);
        }
        largest = at_least(largest, magnitude(d));
        store(s->drive + at, load(s->drive + at) * d);
    }
    float result = 0.0f;
    for (int i = 0; i < LANES; i++) result = largest[i] > result ? largest[i] : result;
    return result;
}

INLINE void prefetch_rows(const mm_view *m, int64_t b, int64_t g, int64_t channel, const int64_t *position,
                          int64_t count) {
    for (int64_t t = 0; t < count; t++) __builtin_prefetch(element(m, b, position[t], g, channel));
}

/* All states of a block over a chunk. The rows that come next are asked for in small portions between the sweeps. */
INLINE void forward_sweeps(const int bounded, const mm_scan_job *job, int64_t b, int64_t g, int64_t steps, int64_t N,
                           block_state *block, const float *B, const float *C, int64_t next_channel,
                           const int64_t *next, forward_scratch *s) {
    float *state = block->rates + N * MM_BLOCK;
    int64_t portion = N == 1 ? MM_CHUNK : mm_ceil(MM_CHUNK, (N / 4) * VECTORS), asked = 0;
    for (int64_t n = 0; n < N;) {
        int64_t wide = SWEEP == 8 && n + 8 <= N, some = wide ? 2 * portion : portion;
        for (int v = 0; v < VECTORS; v++) {
            if (asked + some > MM_CHUNK) some = MM_CHUNK - asked;
            prefetch_rows(&job->u, b, g, next_channel, next + asked, some);
            prefetch_rows(&job->delta, b, g, next_channel, next + asked, some);
            if (job->z.data) prefetch_rows(&job->z, b, g, next_channel, next + asked, some);
            asked += some;
            const float *rate = block->rates + n * MM_BLOCK + v * LANES;
            float *h = state + n * MM_BLOCK + v * LANES, *y = s->y + v * LANES;
            const float *step = s->step + v * LANES, *drive = s->drive + v * LANES;
            if (N == 1)
                advance_states(1, bounded, steps, 1, rate, h, step, drive, B, C, y);
            else if (SWEEP == 8 && wide)
                advance_states(SWEEP, bounded, steps, N, rate, h, step, drive, B + n, C + n, y);
            else
                advance_states(4, bounded, steps, N, rate, h, step, drive, B + n, C + n, y);
        }
        n += wide ? 8 : 4;
    }
}

INLINE void forward_epilogue(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, int64_t count,
                             int64_t steps, const int64_t *position, int accumulate, forward_scratch *s) {
    const exp2_constants k = exp2_setup();
    for (int64_t t = 0; t < steps; t++) {
        float *y = s->y + t * MM_BLOCK;
        if (job->z.data) {
            const float *z = channel_row(element(&job->z, b, position[t], g, channel), job->z.dtype, count, s->row);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                vf gate = load_unaligned(z + v * LANES);
                store(y + v * LANES, load(y + v * LANES) * (gate * sigmoid(&k, gate)));
            }
        }
        char *target = element(&job->y, b, position[t], g, channel);
        if (accumulate) {
            const float *sum = channel_row(target, job->y.dtype, count, s->row);
            UNROLL for (int v = 0; v < VECTORS; v++)
                store(y + v * LANES, load(y + v * LANES) + load_unaligned(sum + v * LANES));
        }
        store_row(target, job->y.dtype, count, y);
    }
}

static void forward_sequence(const mm_scan_job *job, int64_t b, int64_t g, int64_t begin, int64_t end, int accumulate,
                             forward_scratch *s) {
    int64_t L = job->length, N = mm_padded_states(job->d_state), chunks = mm_ceil(L, MM_CHUNK), own = end - begin;
    size_t per_block = block_state_floats(N);
    float *B = s->rest + (size_t)own * per_block, *C = B + MM_CHUNK * N;
    for (int64_t i = 0; i < own; i++) {
        block_state *block = (block_state *)(s->rest + (size_t)i * per_block);
        int64_t channel = (begin + i) * MM_BLOCK, first_channel = g * job->channels + channel;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->A + first_channel * job->d_state, count, job->d_state, N, LOG2E, block->rates);
        memset(block->rates + N * MM_BLOCK, 0, (size_t)N * MM_BLOCK * sizeof(float));
        vector_in(job->D ? job->D + first_channel : NULL, count, block->D);
        vector_in(job->delta_bias ? job->delta_bias + first_channel : NULL, count, block->bias);
        block->fastest[0] = largest_magnitude(block->rates, N * MM_BLOCK);
    }
    route_positions(job, g, 0, MM_CHUNK, s->position[0]);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t first = chunk * MM_CHUNK, steps = L - first < MM_CHUNK ? L - first : MM_CHUNK;
        const int64_t *position = s->position[chunk & 1];
        int64_t *following = s->position[~chunk & 1];
        matrix_tile(&job->B, b, g, position, steps, job->d_state, N, B);
        matrix_tile(&job->C, b, g, position, steps, job->d_state, N, C);
        route_positions(job, g, first + MM_CHUNK, MM_CHUNK, following);
        for (int64_t i = 0; i < own; i++) {
            block_state *block = (block_state *)(s->rest + (size_t)i * per_block);
            int64_t channel = (begin + i) * MM_BLOCK;
            int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
            const int64_t *next = i + 1 < own ? position : following;
            int64_t next_channel = i + 1 < own ? channel + MM_BLOCK : begin * MM_BLOCK;
            if (job->states)
                transpose_out(state_rows(job, b, g, chunk, channel), count, job->d_state, block->rates + N * MM_BLOCK);
            float largest = job->softplus ? forward_prologue(1, job, b, g, channel, count, steps, position, block, s)
                                          : forward_prologue(0, job, b, g, channel, count, steps, position, block, s);
            if (largest * block->fastest[0] <= EXP2_LIMIT)
                forward_sweeps(1, job, b, g, steps, N, block, B, C, next_channel, next, s);
            else
                forward_sweeps(0, job, b, g, steps, N, block, B, C, next_channel, next, s);
            forward_epilogue(job, b, g, channel, count, steps, position, accumulate, s);
        }
    }
}

/* Items: (batch, part), all routes in turn, if the groups are merged; else (batch, group, part). */
static void scan_forward(const mm_scan_job *job, int64_t parts, int64_t item, void *scratch) {
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), part = item % parts;
    int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    item /= parts;
    if (job->merge) {
        for (int64_t g = 0; g < job->groups; g++) forward_sequence(job, item, g, begin, end, g > 0, scratch);
    } else {
        forward_sequence(job, item / job->groups, item % job->groups, begin, end, 0, scratch);
    }
}

/* ---- backward ---- */

/* __builtin_shufflevector is in Clang, but in GCC only from version 12 on. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

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

/* Adds the sums over the lanes of eight vectors to eight numbers, from what sum_quarters made of four and four. */
INLINE void add_lane_sums_8(vf low, vf high, float *sums) {
#if MM_LANES == 4
    store_unaligned(sums, load_unaligned(sums) + low);
    store_unaligned(sums + 4, load_unaligned(sums + 4) + high);
#elif MM_LANES == 8
    vf all = SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
    store_unaligned(sums, load_unaligned(sums) + all);
#else
    union {
        vf whole;
        v8 half[2];
    } all = {SHUFFLE(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
             SHUFFLE(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)};
    *(v8_unaligned *)sums += all.half[0] + all.half[1];
#endif
}

INLINE void add_lane_sums_2(vf a, vf b, float *sums) {
    vf pair = sum_pairs(a, b), both = sum_quarters(pair, pair);
    for (int i = 0; i < LANES; i += 4) {
        sums[0] += both[i];
        sums[1] += both[i + 1];
    }
}

typedef struct {
    float step[TILE], drive[TILE], slope[TILE]; /* delta, delta * u, derivative of the softplus */
    float u[TILE], grad[TILE];                  /* input, gradient of the output before the gate */
    float y[TILE], gate[TILE];                  /* output before the gate, derivative by the gate */
    float from_B[TILE], from_A[TILE];           /* sums over the states: grad_h B, and of the decay */
    float D[MM_BLOCK], bias[MM_BLOCK], row[4 * MM_BLOCK];
    float trail[MM_CHUNK * 8 * LANES]; /* of four states: decayed state and decay at every step */
    int64_t position[MM_CHUNK];
    float rest[] __attribute__((aligned(64)));
} backward_scratch;

static size_t scan_backward_scratch(const mm_scan_job *job, const mm_partials *partials) {
    int64_t N = mm_padded_states(job->d_state);
    int64_t blocks = mm_ceil(mm_ceil(job->channels, MM_BLOCK), partials->parts);
    /* per block: rates, grad_h, grad_A (N, 16), grad_D and grad_bias (16), fastest rate; then the state (N, 16), the
     * tiles of B and C and the lane sums of both */
    return sizeof(backward_scratch) +
           (size_t)(blocks * ((3 * N + 2) * MM_BLOCK + 1) + N * MM_BLOCK + 4 * MM_CHUNK * N) * sizeof(float);
}

/* `count` states of one vector of channels: forward over the chunk to know the states, then back. */
INLINE void retreat_states(const int count, const int with_y, const int bounded, int64_t steps, int64_t stride, const float *rates,
                           float *state, float *grad_h, float *grad_A, const float *B, const float *C, float *sums,
                           backward_scratch *s, int64_t lane) {
    const exp2_constants k = exp2_setup();
    vf h[8], rate[8];
    float *trail = s->trail;
    UNROLL for (int n = 0; n < count; n++) {
        h[n] = load(state + n * MM_BLOCK);
        rate[n] = load(rates + n * MM_BLOCK);
    }
    for (int64_t t = 0; t < steps; t++) {
        int64_t at = t * MM_BLOCK + lane;
        vf d = load(s->step + at), x = load(s->drive + at), y = {0};
        UNROLL for (int n = 0; n < count; n++) {
            vf exponent = d * rate[n];
            vf decay = bounded ? exp2_bounded(&k, exponent) : exp2_any(&k, exponent);
            vf decayed = decay * h[n];
            h[n] = x * B[t * stride + n] + decayed;
            store(trail + (t * 2 * count + n) * LANES, decayed);
            store(trail + (t * 2 * count + count + n) * LANES, decay);
            if (with_y) y += h[n] * C[t * stride + n];
        }
        if (with_y) store(s->y + at, load(s->y + at) + y);
    }
    vf gh[4], gA[4];
    UNROLL for (int n = 0; n < count; n++) {
        gh[n] = load(grad_h + n * MM_BLOCK);
        gA[n] = load(grad_A + n * MM_BLOCK);
    }
    for (int64_t t = steps - 1; t >= 0; t--) {
        int64_t at = t * MM_BLOCK + lane;
        vf d = load(s->step + at), x = load(s->drive + at), gy = load(s->grad + at);
        vf from_B = {0}, from_A = {0}, to_B[4], to_C[4], pairs_B[2], pairs_C[2];
        UNROLL for (int n = 0; n < count; n++) {
            float Bn = B[t * stride + n];
            vf decayed = load(trail + (t * 2 * count + n) * LANES);
            vf g = gy * C[t * stride + n] + gh[n];
            to_B[n] = g * x;
            to_C[n] = gy * (x * Bn + decayed);
            from_B += g * Bn;
            vf gd = g * decayed; /* of the exponent delta * A */
            from_A += gd * rate[n];
            gA[n] += gd * d;
            gh[n] = g * load(trail + (t * 2 * count + count + n) * LANES);
            if (n & 1) { /* early, to free registers */
                pairs_B[n / 2] = sum_pairs(to_B[n - 1], to_B[n]);
                pairs_C[n / 2] = sum_pairs(to_C[n - 1], to_C[n]);
            }
        }
        store(s->from_B + at, load(s->from_B + at) + from_B);
        store(s->from_A + at, load(s->from_A + at) + from_A);
        if (count == 1)
            add_lane_sums_2(to_B[0], to_C[0], sums + t * 2);
        else
            add_lane_sums_8(sum_quarters(pairs_B[0], pairs_B[1]), sum_quarters(pairs_C[0], pairs_C[1]), sums + t * 8);
    }
    UNROLL for (int n = 0; n < count; n++) {
        store(grad_h + n * MM_BLOCK, gh[n]);
        store(grad_A + n * MM_BLOCK, gA[n]);
    }
}

/* Returns the largest step size. */
static float backward_prologue(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, int64_t count,
                               int64_t steps, float *grad_D, backward_scratch *s) {
    const exp2_constants k = exp2_setup();
    vf sum_D[VECTORS], largest[VECTORS] = {{0}};
    memset(s->row, 0, sizeof s->row);
    UNROLL for (int v = 0; v < VECTORS; v++) sum_D[v] = load(grad_D + v * LANES);
    for (int64_t t = 0; t < steps; t++) {
        int64_t p = s->position[t];
        const float *u = channel_row(element(&job->u, b, p, g, channel), job->u.dtype, count, s->row);
        const float *delta =
            channel_row(element(&job->delta, b, p, g, channel), job->delta.dtype, count, s->row + MM_BLOCK);
        const float *gy =
            channel_row(element(&job->grad_y, b, p, g, channel), job->grad_y.dtype, count, s->row + 2 * MM_BLOCK);
        const float *z = NULL;
        if (job->z.data)
            z = channel_row(element(&job->z, b, p, g, channel), job->z.dtype, count, s->row + 3 * MM_BLOCK);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t at = t * MM_BLOCK + v * LANES;
            vf x = load_unaligned(u + v * LANES), grad = load_unaligned(gy + v * LANES);
            vf d = load_unaligned(delta + v * LANES) + load(s->bias + v * LANES);
            if (job->softplus) {
                store(s->slope + at, sigmoid(&k, d));
                d = softplus(&k, d);
            }
            if (z) {
                vf gate = load_unaligned(z + v * LANES), open = sigmoid(&k, gate);
                store(s->gate + at, grad * (open * (gate * (1.0f - open) + 1.0f)));
                grad *= gate * open;
                store(s->y + at, x * load(s->D + v * LANES));
            }
            largest[v] = at_least(largest[v], magnitude(d));
            sum_D[v] += grad * x;
            store(s->u + at, x);
            store(s->step + at, d);
            store(s->drive + at, d * x);
            store(s->grad + at, grad);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) store(grad_D + v * LANES, sum_D[v]);
    float result = 0.0f;
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < LANES; i++) result = largest[v][i] > result ? largest[v][i] : result;
    return result;
}

static void backward_epilogue(const mm_scan_job *job, int64_t b, int64_t g, int64_t channel, int64_t count,
                              int64_t steps, int accumulate, float *grad_bias, backward_scratch *s) {
    float out[MM_BLOCK] __attribute__((aligned(64)));
    vf sum_bias[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) sum_bias[v] = load(grad_bias + v * LANES);
    memset(s->row, 0, sizeof s->row);
    for (int64_t t = 0; t < steps; t++) {
        int64_t p = s->position[t];
        char *target = element(&job->grad_u, b, p, g, channel);
        const float *sum = accumulate ? channel_row(target, job->grad_u.dtype, count, s->row) : NULL;
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t at = t * MM_BLOCK + v * LANES;
            vf gu = load(s->step + at) * load(s->from_B + at) + load(s->D + v * LANES) * load(s->grad + at);
            store(out + v * LANES, sum ? gu + load_unaligned(sum + v * LANES) : gu);
        }
        store_row(target, job->grad_u.dtype, count, out);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t at = t * MM_BLOCK + v * LANES;
            vf gd = load(s->u + at) * load(s->from_B + at) + load(s->from_A + at) * LN2;
            if (job->softplus) gd *= load(s->slope + at);
            sum_bias[v] += gd;
            store(out + v * LANES, gd);
        }
        store_row(element(&job->grad_delta, b, p, g, channel), job->grad_delta.dtype, count, out);
        if (job->z.data) {
            UNROLL for (int v = 0; v < VECTORS; v++) {
                int64_t at = t * MM_BLOCK + v * LANES;
                store(out + v * LANES, load(s->gate + at) * load(s->y + at));
            }
            store_row(element(&job->grad_z, b, p, g, channel), job->grad_z.dtype, count, out);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) store(grad_bias + v * LANES, sum_bias[v]);
}

INLINE void backward_sweeps(const int bounded, const mm_scan_job *job, int64_t steps, int64_t N, const float *rates,
                            float *state, float *grad_h, float *grad_A, const float *B, const float *C, float *sums,
                            backward_scratch *s) {
    for (int64_t n = 0; n < N; n += 4)
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = n * MM_BLOCK + v * LANES, lane = v * LANES;
            const float *rate = rates + at;
            float *h = state + at, *gh = grad_h + at, *gA = grad_A + at, *sum = sums + n * 2 * MM_CHUNK;
            if (N == 1 && job->z.data)
                retreat_states(1, 1, bounded, steps, 1, rate, h, gh, gA, B, C, sum, s, lane);
            else if (N == 1)
                retreat_states(1, 0, bounded, steps, 1, rate, h, gh, gA, B, C, sum, s, lane);
            else if (job->z.data)
                retreat_states(4, 1, bounded, steps, N, rate, h, gh, gA, B + n, C + n, sum, s, lane);
            else
                retreat_states(4, 0, bounded, steps, N, rate, h, gh, gA, B + n, C + n, sum, s, lane);
        }
}

static void backward_sequence(const mm_scan_job *job, const mm_partials *partials, int64_t b, int64_t g, int64_t part,
                              backward_scratch *s) {
    int64_t L = job->length, N = mm_padded_states(job->d_state), chunks = mm_ceil(L, MM_CHUNK);
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK);
    int64_t begin = blocks * part / partials->parts, end = blocks * (part + 1) / partials->parts, own = end - begin;
    int64_t tile = N * MM_BLOCK, per_sweep = N == 1 ? 1 : 4;
    float *rates = s->rest, *grad_h = rates + own * tile, *grad_A = grad_h + own * tile, *state = grad_A + own * tile;
    float *grad_D = state + tile, *grad_bias = grad_D + own * MM_BLOCK, *B = grad_bias + own * MM_BLOCK;
    float *C = B + MM_CHUNK * N, *sums = C + MM_CHUNK * N, *fastest = sums + 2 * MM_CHUNK * N;
    int64_t matrix = job->batch * L * job->groups * job->d_state;
    float *sum_B = part ? partials->B + (part - 1) * matrix : job->grad_B;
    float *sum_C = part ? partials->C + (part - 1) * matrix : job->grad_C;
    memset(grad_h, 0, (size_t)(2 * own * tile) * sizeof(float));
    memset(grad_D, 0, (size_t)(2 * own * MM_BLOCK) * sizeof(float));
    for (int64_t k = 0; k < own; k++) {
        int64_t channel = (begin + k) * MM_BLOCK;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        transpose_in(job->A + (g * job->channels + channel) * job->d_state, count, job->d_state, N, LOG2E,
                     rates + k * tile);
        fastest[k] = largest_magnitude(rates + k * tile, tile);
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        int64_t first = chunk * MM_CHUNK, steps = L - first < MM_CHUNK ? L - first : MM_CHUNK;
        route_positions(job, g, first, steps, s->position);
        matrix_tile(&job->B, b, g, s->position, steps, job->d_state, N, B);
        matrix_tile(&job->C, b, g, s->position, steps, job->d_state, N, C);
        memset(sums, 0, (size_t)(2 * MM_CHUNK * N) * sizeof(float));
        for (int64_t k = 0; k < own; k++) {
            int64_t channel = (begin + k) * MM_BLOCK, first_channel = g * job->channels + channel;
            int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
            vector_in(job->D ? job->D + first_channel : NULL, count, s->D);
            vector_in(job->delta_bias ? job->delta_bias + first_channel : NULL, count, s->bias);
            float largest = backward_prologue(job, b, g, channel, count, steps, grad_D + k * MM_BLOCK, s);
            transpose_in(state_rows(job, b, g, chunk, channel), count, job->d_state, N, 1.0f, state);
            memset(s->from_B, 0, sizeof s->from_B);
            memset(s->from_A, 0, sizeof s->from_A);
            if (largest * fastest[k] <= EXP2_LIMIT)
                backward_sweeps(1, job, steps, N, rates + k * tile, state, grad_h + k * tile, grad_A + k * tile, B, C,
                                sums, s);
            else
                backward_sweeps(0, job, steps, N, rates + k * tile, state, grad_h + k * tile, grad_A + k * tile, B, C,
                                sums, s);
            backward_epilogue(job, b, g, channel, count, steps, job->merge && g > 0, grad_bias + k * MM_BLOCK, s);
        }
        for (int64_t t = 0; t < steps; t++) {
            int64_t at = ((b * L + s->position[t]) * job->groups + g) * job->d_state;
            for (int64_t n = 0; n < job->d_state; n++) {
                const float *sum = sums + (n / per_sweep * MM_CHUNK + t) * 2 * per_sweep + n % per_sweep;
                sum_B[at + n] = sum[0];
                sum_C[at + n] = sum[per_sweep];
            }
        }
    }
    for (int64_t k = 0; k < own; k++) {
        int64_t channel = (begin + k) * MM_BLOCK;
        int64_t count = job->channels - channel < MM_BLOCK ? job->channels - channel : MM_BLOCK;
        int64_t at = (b * job->groups + g) * job->channels + channel;
        transpose_out(partials->A + at * job->d_state, count, job->d_state, grad_A + k * tile);
        memcpy(partials->D + at, grad_D + k * MM_BLOCK, (size_t)count * sizeof(float));
        memcpy(partials->bias + at, grad_bias + k * MM_BLOCK, (size_t)count * sizeof(float));
    }
}

/* Items: (batch, part), all routes in turn, if the groups are merged; else (batch, group, part). */
static void scan_backward(const mm_scan_job *job, const mm_partials *partials, int64_t item, void *scratch) {
    int64_t part = item % partials->parts;
    item /= partials->parts;
    if (job->merge) {
        for (int64_t g = 0; g < job->groups; g++) backward_sequence(job, partials, item, g, part, scratch);
    } else {
        backward_sequence(job, partials, item / job->groups, item % job->groups, part, scratch);
    }
}

/* ---- causal depthwise convolution ---- */

typedef struct {
    const float *row[MM_MAX_TAPS]; /* inputs of the current output, oldest first */
    float rest[] __attribute__((aligned(64))); /* weights (taps, C), bias (C), ring of rows (taps, C), output (C), 0 (C) */
} conv_scratch_forward;

typedef struct {
    float weight[MM_MAX_TAPS * MM_BLOCK], bias[MM_BLOCK], grad_weight[MM_MAX_TAPS * MM_BLOCK], grad_bias[MM_BLOCK];
    float x[(MM_CHUNK + 2 * MM_MAX_TAPS) * MM_BLOCK], grad[(MM_CHUNK + MM_MAX_TAPS) * MM_BLOCK], out[MM_BLOCK];
} conv_scratch_backward;

static size_t conv_scratch(const mm_conv_job *job) {
    size_t padded = (size_t)mm_ceil(job->channels, MM_BLOCK) * MM_BLOCK;
    size_t forward = sizeof(conv_scratch_forward) + (size_t)(2 * job->taps + 3) * padded * sizeof(float);
    return forward > sizeof(conv_scratch_backward) ? forward : sizeof(conv_scratch_backward);
}

INLINE void convolve_row(const int known_taps, int64_t taps, int64_t silu, int64_t begin, int64_t end, int64_t padded,
                         const float *const *row, const float *weight, const float *bias, float *out) {
    if (known_taps) taps = known_taps;
    const exp2_constants e = exp2_setup();
    for (int64_t c = begin; c < end; c += LANES) {
        vf y = load(bias + c);
        UNROLL for (int64_t k = 0; k < taps; k++) y += load_unaligned(row[k] + c) * load(weight + k * padded + c);
        store_unaligned(out + c, silu ? y * sigmoid(&e, y) : y);
    }
}

/* Items: (batch, segment of the sequence). Rows are written from left to right, as they lie in memory. */
static void conv_forward(const mm_conv_job *job, int64_t item, void *scratch) {
    int64_t segments = mm_ceil(job->length, MM_CONV_SEGMENT), b = item / segments;
    int64_t first = item % segments * MM_CONV_SEGMENT, taps = job->taps, channels = job->channels;
    int64_t last = first + MM_CONV_SEGMENT < job->length ? first + MM_CONV_SEGMENT : job->length;
    int64_t padded = mm_ceil(channels, MM_BLOCK) * MM_BLOCK, whole = channels / LANES * LANES;
    conv_scratch_forward *s = scratch;
    float *weight = s->rest, *bias = weight + taps * padded, *ring = bias + padded, *out = ring + taps * padded;
    float *zero = out + padded;
    int direct = job->x.dtype == MM_FLOAT32 && job->y.dtype == MM_FLOAT32;
    memset(weight, 0, (size_t)((2 * taps + 3) * padded) * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t k = 0; k < taps; k++) weight[k * padded + c] = job->weight[c * taps + k];
        if (job->bias) bias[c] = job->bias[c];
    }
    for (int64_t l = first - taps + 1; l < last; l++) {
        for (int64_t k = 0; k + 1 < taps; k++) s->row[k] = s->row[k + 1];
        if (l < 0) {
            s->row[taps - 1] = zero;
        } else if (direct && whole == channels) {
            s->row[taps - 1] = (const float *)element(&job->x, b, l, 0, 0);
        } else {
            float *slot = ring + l % taps * padded;
            row_to_float(slot, element(&job->x, b, l, 0, 0), job->x.dtype, channels);
            s->row[taps - 1] = slot;
        }
        if (l < first) continue;
        char *target = element(&job->y, b, l, 0, 0);
        float *y = direct && whole == channels ? (float *)target : out;
        if (taps == 4)
            convolve_row(4, taps, job->silu, 0, channels, padded, s->row, weight, bias, y);
        else
            convolve_row(0, taps, job->silu, 0, channels, padded, s->row, weight, bias, y);
        if (y == out) row_from_float(target, out, job->y.dtype, channels);
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
            vf open = sigmoid(&e, y);
            float *grad = s->grad + t * MM_BLOCK + v * LANES;
            store(grad, load(grad) * (open * (y * (1.0f - open) + 1.0f)));
        }
    }
    for (int64_t t = 0; t < steps; t++) {
        for (int v = 0; v < VECTORS; v++) {
            vf sum = {0};
            UNROLL for (int64_t k = 0; k < taps; k++)
                sum += load(s->grad + (t + ahead - k) * MM_BLOCK + v * LANES) * load(s->weight + k * MM_BLOCK + v * LANES);
            store(s->out + v * LANES, sum);
        }
        store_row(element(&job->grad_x, b, first + t, 0, channel), job->grad_x.dtype, count, s->out);
    }
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
    transpose_in(job->weight + channel * taps, count, taps, taps, 1.0f, s->weight);
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

/* ---- what the machine can do, for the benchmark ---- */

/* Runs the arithmetic of kind 0: exp2, 1: multiply-add, 2: state updates of the forward pass, on data in registers and
 * the first-level cache. A round does 64 x 16 (kind 0), 64 x 16 x 8 (kind 1) or 64 x 16 x 4 (kind 2) operations. The
 * result depends on all of them. */
static double probe(int64_t kind, int64_t rounds) {
    float step[TILE] __attribute__((aligned(64))), drive[TILE] __attribute__((aligned(64)));
    float y[TILE] __attribute__((aligned(64))), B[4 * MM_CHUNK], C[4 * MM_CHUNK];
    float rates[8 * MM_BLOCK] __attribute__((aligned(64))), state[8 * MM_BLOCK] __attribute__((aligned(64)));
    for (int i = 0; i < TILE; i++) step[i] = 0.001f * (float)(i % 97), drive[i] = 0.01f * (float)(i % 89), y[i] = 0.0f;
    for (int i = 0; i < 4 * MM_CHUNK; i++) B[i] = 0.1f, C[i] = 0.2f;
    for (int i = 0; i < 8 * MM_BLOCK; i++) rates[i] = -0.5f, state[i] = 0.0f;
    const exp2_constants k = exp2_setup();
    vf sum[8];
    for (int i = 0; i < 8; i++) sum[i] = splat((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        if (kind == 0) {
            for (int t = 0; t < TILE; t += 4 * LANES)
                UNROLL for (int i = 0; i < 4; i++) sum[i] += exp2_bounded(&k, load(step + t + i * LANES));
        } else if (kind == 1) {
            for (int t = 0; t < TILE; t += LANES) {
                vf x = load(step + t);
                UNROLL for (int i = 0; i < 8; i++) sum[i] = sum[i] * x + x;
            }
        } else {
            for (int v = 0; v < VECTORS; v++)
                advance_states(4, 1, MM_CHUNK, 4, rates + v * LANES, state + v * LANES, step + v * LANES,
                               drive + v * LANES, B, C, y + v * LANES);
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
    .conv_scratch = conv_scratch,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .probe = probe,
};
