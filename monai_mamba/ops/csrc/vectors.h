/* Vectors of MM_LANES floats, and the functions of them that the kernels need. Written with the vector extensions of GCC
 * and Clang; the few intrinsics have a portable twin.
 */
#ifndef MONAI_MAMBA_VECTORS_H
#define MONAI_MAMBA_VECTORS_H

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

/* States of one forward sweep: as many as leave the states and the constants in registers. */
#if MM_LANES == 16 && defined(__AVX512F__)
#define SWEEP 16
#elif MM_LANES == 16 || defined(__aarch64__)
#define SWEEP 8
#else
#define SWEEP 4
#endif

typedef float vf __attribute__((vector_size(MM_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(MM_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(MM_LANES * 4)));
typedef float vf_aligned __attribute__((vector_size(MM_LANES * 4), may_alias));
typedef float vf_unaligned __attribute__((vector_size(MM_LANES * 4), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef float v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) /* which passes over the pragma of GCC; a count that is not constant is not worth a warning */
#define UNROLL _Pragma("clang loop unroll(full)")
#pragma clang diagnostic ignored "-Wpass-failed"
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* __builtin_shufflevector is in Clang, but in GCC only from version 12 on. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_4 SHUFFLE
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#define SHUFFLE_4(a, b, ...) __builtin_shuffle(a, b, (v4i){__VA_ARGS__})
#endif

INLINE vf load(const float *p) { return *(const vf_aligned *)p; }
INLINE vf load_unaligned(const float *p) { return *(const vf_unaligned *)p; }
INLINE void store(float *p, vf x) { *(vf_aligned *)p = x; }
INLINE void store_unaligned(float *p, vf x) { *(vf_unaligned *)p = x; }

/* For large results, which nobody reads before they have left the caches: whole lines go to memory without being read
 * first. Vectors shorter than a line would go in pieces. `end_of_streams` comes before others are told of the result. */
#if defined(__AVX512F__) && MM_LANES == 16
#define CAN_STREAM 1
INLINE void stream(float *p, vf x) { _mm512_stream_ps(p, (__m512)x); }
INLINE void end_of_streams(void) { _mm_sfence(); }
#else
#define CAN_STREAM 0
INLINE void stream(float *p, vf x) { store_unaligned(p, x); }
INLINE void end_of_streams(void) {}
#endif

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

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
INLINE vf at_least(vf bound, vf x) { return choose(bound > x, bound, x); }
INLINE vf at_most(vf bound, vf x) { return choose(bound < x, bound, x); }
#endif

/* The larger one lane by lane; a NaN in x is passed over, which the maximum of NEON above does not do. */
#if defined(__ARM_NEON) && defined(__aarch64__) && MM_LANES == 4
INLINE vf larger(vf x, vf largest) { return (vf)vmaxnmq_f32((float32x4_t)x, (float32x4_t)largest); }
#else
INLINE vf larger(vf x, vf largest) { return at_least(x, largest); }
#endif

/* Adds to a sum over the whole sequence, which keeps in the vector `to_lost` further on what rounding has taken from it. */
INLINE void add_up(float *sum, int64_t to_lost, vf x) {
    vf before = load(sum), y = x - load(sum + to_lost), after = before + y;
    store(sum, after);
    store(sum + to_lost, after - before - y);
}

INLINE float largest_lane(vf x) {
    float result = 0.0f;
    for (int i = 0; i < LANES; i++) result = x[i] > result ? x[i] : result;
    return result;
}

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

/* Functions of `count` vectors do one operation on all of them before the next: a processor waits less for the results
 * of one chain of operations when others stand between. */
#define EACH UNROLL for (int i = 0; i < count; i++)
enum { MANY = 8 };

INLINE void exp2_fractions(const int count, const exp2_constants *k, const vf *f, vf *p) {
    EACH p[i] = f[i] * k->c[4] + k->c[3];
    EACH p[i] = p[i] * f[i] + k->c[2];
    EACH p[i] = p[i] * f[i] + k->c[1];
    EACH p[i] = p[i] * f[i] + k->c[0];
    EACH p[i] = p[i] * f[i] + 1.0f;
}

/* 2^x for |x| <= EXP2_LIMIT, and for every x: 0 or 2^-126 far below, infinity above 128, NaN for NaN. */
#define EXP2_LIMIT 126.0f
#if defined(__AVX512DQ__) && MM_LANES == 16
/* The remainder after rounding to the nearest integer, and scaling by that integer, are instructions here. */
INLINE void exp2_many_any(const int count, const exp2_constants *k, vf *x) {
    vf f[MANY], p[MANY];
    EACH f[i] = (vf)_mm512_reduce_ps((__m512)x[i], 8);
    EACH x[i] -= f[i];
    exp2_fractions(count, k, f, p);
    EACH x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
}
INLINE void exp2_many_bounded(const int count, const exp2_constants *k, vf *x) {
    vf n[MANY], f[MANY], p[MANY];
    EACH n[i] = (vf)_mm512_roundscale_ps((__m512)x[i], 8);
    EACH f[i] = x[i] - n[i];
    exp2_fractions(count, k, f, p);
    EACH x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
}
#define EXP2_NEEDS_NO_BOUND 1
#else
/* Rounding by adding 1.5 * 2^23 leaves the integer in the low bits of the sum. */
INLINE void exp2_many_bounded(const int count, const exp2_constants *k, vf *x) {
    vf t[MANY], f[MANY], p[MANY];
    EACH t[i] = x[i] + k->magic;
    EACH f[i] = x[i] - (t[i] - k->magic);
    exp2_fractions(count, k, f, p);
    EACH x[i] = (vf)((vu)p[i] + ((vu)t[i] << 23));
}
INLINE void exp2_many_any(const int count, const exp2_constants *k, vf *x) {
    EACH x[i] = at_most(splat(128.0f), at_least(splat(-126.0f), x[i]));
    exp2_many_bounded(count, k, x);
}
#define EXP2_NEEDS_NO_BOUND 0
#endif

INLINE vf exp2_bounded(const exp2_constants *k, vf x) {
    exp2_many_bounded(1, k, &x);
    return x;
}
INLINE vf exp2_any(const exp2_constants *k, vf x) {
    exp2_many_any(1, k, &x);
    return x;
}

/* log(1 + e) for e in [0, 1] as a series of atanh, exact to rounding also for tiny e. */
INLINE void log1p_many(const int count, vf *e) {
    vf s[MANY], q[MANY], q2[MANY], p[MANY];
    EACH s[i] = e[i] / (e[i] + 2.0f);
    EACH q[i] = s[i] * s[i];
    EACH q2[i] = q[i] * q[i];
    EACH p[i] = q[i] * 4.002491026e-1f + 6.666631468e-1f;
    EACH e[i] = q[i] * 2.817833371e-1f + 2.796060302e-1f;
    EACH p[i] = e[i] * q2[i] + p[i];
    EACH p[i] = p[i] * q[i] + 2.0f;
    EACH e[i] = p[i] * s[i];
}

INLINE void softplus_many(const int count, const exp2_constants *k, vf *x) {
    vf e[MANY];
    EACH e[i] = at_least(splat(-EXP2_LIMIT), magnitude(x[i]) * -LOG2E);
    exp2_many_bounded(count, k, e);
    log1p_many(count, e);
    EACH x[i] = at_least(splat(0.0f), x[i]) + e[i];
}

/* The softplus and its derivative, the sigmoid, out of one exponential. */
INLINE void softplus_and_slope_many(const int count, const exp2_constants *k, vf *x, vf *slope) {
    vf e[MANY], r[MANY];
    EACH e[i] = at_least(splat(-EXP2_LIMIT), magnitude(x[i]) * -LOG2E);
    exp2_many_bounded(count, k, e);
    EACH r[i] = 1.0f / (e[i] + 1.0f);
    EACH slope[i] = choose(x[i] < 0.0f, e[i] * r[i], r[i]);
    log1p_many(count, e);
    EACH x[i] = at_least(splat(0.0f), x[i]) + e[i];
}

INLINE void sigmoid_many(const int count, const exp2_constants *k, const vf *x, vf *y) {
    EACH y[i] = x[i] * -LOG2E;
    exp2_many_any(count, k, y);
    EACH y[i] = 1.0f / (y[i] + 1.0f);
}

INLINE void silu_many(const int count, const exp2_constants *k, vf *x) {
    vf e[MANY];
    EACH e[i] = x[i] * -LOG2E;
    exp2_many_any(count, k, e);
    EACH x[i] = x[i] / (e[i] + 1.0f);
}

#endif
