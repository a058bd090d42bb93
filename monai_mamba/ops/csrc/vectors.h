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
#define UNROLL _Pragma("GCC unroll 16")

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
#define EXP2_NEEDS_NO_BOUND 1
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
#define EXP2_NEEDS_NO_BOUND 0
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
/* The softplus and its derivative, the sigmoid, out of one exponential. */
INLINE vf softplus_and_slope(const exp2_constants *k, vf x, vf *slope) {
    vf e = exp2_bounded(k, at_least(splat(-EXP2_LIMIT), magnitude(x) * -LOG2E)), r = 1.0f / (e + 1.0f);
    *slope = choose(x < 0.0f, e * r, r);
    return at_least(splat(0.0f), x) + log1p_(e);
}
INLINE vf sigmoid(const exp2_constants *k, vf x) { return 1.0f / (exp2_any(k, x * -LOG2E) + 1.0f); }
INLINE vf silu(const exp2_constants *k, vf x) { return x / (exp2_any(k, x * -LOG2E) + 1.0f); }

#endif
