/* u_i += σ z_i, z_i ~ N(0, I), from the words of Philox4x32-10 by Box and Muller: noise.add_noise, float32 and float64.

   mpiclip/noise.py says which number comes from which word, and what each step does. As there, every operation is
   rounded by itself, in the same order, and none is the library's: the same bytes on every CPU, for any number of
   threads. */

#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tgmath.h>

#include "array.h"
#include "kernels.h"

enum {
    ABREAST = 16,                     /* blocks of a tile: noise.normals */
    BLOCKS = 256,                   /* blocks whose words are made at a time: they stay in the first-level cache */
    SHARE = 1 << 13,                /* a row's numbers are dealt out to the threads by so many … */
    FEW = 1 << 13,                  /* … if there are more than these: a number takes about 2 ns */
    DECLINED = 1,
};

typedef struct {
    uint64_t key, stream;
} key;

typedef uint32_t words[4][BLOCKS] __attribute__((aligned(64)));      /* words[k][b]: word k of block b */

#define ROUNDS 10
#define MULTIPLIER_0 UINT64_C(0xD2511F53)
#define MULTIPLIER_1 UINT64_C(0xCD9E8D57)
#define KEY_0(key, round) ((uint32_t)(key) + (uint32_t)(round) * 0x9E3779B9u)
#define KEY_1(key, round) ((uint32_t)((key) >> 32) + (uint32_t)(round) * 0xBB67AE85u)

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

/* Compilers do not see that the products below need one instruction. Each of WIDTH 64-bit lanes has a block's word in its
   lower half, and rubbish in the upper half, which no product sees. Of a pair of vectors, the first has the even blocks
   and the second the odd ones: put together, their words lie in order. PAIRS of them, because a product takes time: as
   many as the registers hold. */
#define PHILOX(generation, WIDTH, PAIRS, PRODUCT)                                                                      \
    __attribute__((noinline, target(#generation)))                                                                     \
    static void philox_##generation(key key, uint64_t first, size blocks, words words)                                 \
    {                                                                                                                  \
        typedef uint64_t lanes __attribute__((vector_size(8 * WIDTH), may_alias));                                     \
        const lanes zero = {0}, m0 = zero + MULTIPLIER_0, m1 = zero + MULTIPLIER_1, low = zero + 0xFFFFFFFF;           \
        lanes k0[ROUNDS], k1[ROUNDS], even;                                                                            \
        for (int round = 0; round < ROUNDS; round++) {                                                                 \
            k0[round] = zero + KEY_0(key.key, round);                                                                  \
            k1[round] = zero + KEY_1(key.key, round);                                                                  \
        }                                                                                                              \
        for (int l = 0; l < WIDTH; l++)                                                                                \
            even[l] = first + 2 * l;                                                                                   \
        for (size b = 0; b < blocks; b += 2 * WIDTH * PAIRS) {                                                         \
            lanes x0[2 * PAIRS], x1[2 * PAIRS], x2[2 * PAIRS], x3[2 * PAIRS];                                          \
            for (int h = 0; h < 2 * PAIRS; h++) {                                                                      \
                x0[h] = even + (uint64_t)(b + h / 2 * 2 * WIDTH + h % 2);                                              \
                x1[h] = x0[h] >> 32;                                                                                   \
                x2[h] = zero + key.stream;                                                                             \
                x3[h] = x2[h] >> 32;                                                                                   \
            }                                                                                                          \
            for (int round = 0; round < ROUNDS; round++)                                                               \
                for (int h = 0; h < 2 * PAIRS; h++) {                                                                  \
                    lanes product0 = PRODUCT(x0[h], m0), product1 = PRODUCT(x2[h], m1);                                \
                    x0[h] = (product1 >> 32) ^ x1[h] ^ k0[round];                                                      \
                    x1[h] = product1;                                                                                  \
                    x2[h] = (product0 >> 32) ^ x3[h] ^ k1[round];                                                      \
                    x3[h] = product0;                                                                                  \
                }                                                                                                      \
            for (int h = 0; h < 2 * PAIRS; h += 2) {                                                                   \
                *(lanes *)(words[0] + b + h * WIDTH) = (x0[h] & low) | x0[h + 1] << 32;                                \
                *(lanes *)(words[1] + b + h * WIDTH) = (x1[h] & low) | x1[h + 1] << 32;                                \
                *(lanes *)(words[2] + b + h * WIDTH) = (x2[h] & low) | x2[h + 1] << 32;                                \
                *(lanes *)(words[3] + b + h * WIDTH) = (x3[h] & low) | x3[h + 1] << 32;                                \
            }                                                                                                          \
        }                                                                                                              \
    }
#define PRODUCT_OF_4(a, b) (lanes)_mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define PRODUCT_OF_8(a, b) (lanes)_mm512_mul_epu32((__m512i)(a), (__m512i)(b))
PHILOX(avx2, 4, 1, PRODUCT_OF_4)
PHILOX(avx512f, 8, 2, PRODUCT_OF_8)
#define CPU_HAS(generation) __builtin_cpu_supports(#generation)
#else
#define CPU_HAS(generation) 0
#define philox_avx2 philox_any
#define philox_avx512f philox_any
#endif

static void philox_any(key key, uint64_t first, size blocks, words words)
{
    for (size b = 0; b < blocks; b++) {
        uint64_t block = first + b;
        uint32_t x0 = block, x1 = block >> 32, x2 = key.stream, x3 = key.stream >> 32;
        for (int round = 0; round < ROUNDS; round++) {
            uint64_t product0 = MULTIPLIER_0 * x0, product1 = MULTIPLIER_1 * x2;
            x0 = (uint32_t)(product1 >> 32) ^ x1 ^ KEY_0(key.key, round);
            x1 = product1;
            x2 = (uint32_t)(product0 >> 32) ^ x3 ^ KEY_1(key.key, round);
            x3 = product0;
        }
        words[0][b] = x0, words[1][b] = x1, words[2][b] = x2, words[3][b] = x3;
    }
}

/* The words of the blocks first, first + 1, …: noise.philox. `blocks` is a multiple of ABREAST, and at most BLOCKS; rubbish
   may stand behind them. */
static void philox(key key, uint64_t first, size blocks, words words)
{
    (CPU_HAS(avx512f) ? philox_avx512f : CPU_HAS(avx2) ? philox_avx2 : philox_any)(key, first, blocks, words);
}

#define REAL float
#define SUFFIX f32
#include "noise.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#define FLOAT64_WORDS
#include "noise.c"

/* noise.add_noise. The rows of u may lie apart. */
int add_noise(const array *u, double sigma, const array *keys)
{
    enum { WRITEABLE = 0x400, UINT64 = sizeof(long) == 8 ? 8 : 10 };            /* NPY_ULONG, NPY_ULONGLONG */
    if (!is_rows(u) || !(u->flags & WRITEABLE) || !is_dense(keys, READABLE) || keys->dtype->number != UINT64
        || keys->ndim != 2 || keys->shape[0] != u->shape[0] || keys->shape[1] != 2)
        return DECLINED;
    return BY_DTYPE(u, add_noise, u->data, u->strides[0], sigma, keys->data, u->shape[0], u->shape[1]);
}

#else                               /* once for each REAL */

#ifdef FLOAT64_WORDS
#define BITS uint64_t
#define ONE 0x3ff0000000000000u
#define ROOT_HALF 0x3fe6a09e667f3bcdu                               /* the bits of 1 and of √½ */
#define DIGITS 52
#define ARTANH(z)                                                                                                      \
    (-4 + z * (-1.333333333333346891 + z * (-0.7999999999882868197 + z * (-0.5714285748494334316                       \
     + z * (-0.4444439712744691994 + z * (-0.3636712971548059124 + z * (-0.3062807199545550071                         \
     + z * -0.2959220866843280578)))))))
#define SINE(z)                                                                                                        \
    (0.785398163397448307 + z * (-0.08074551218828053021 + z * (0.002490394570188736251                                \
     + z * (-3.657620415845622561e-5 + z * (3.13361621662911219e-7 + z * (-1.757149293657193549e-9                     \
     + z * 6.877100654849404748e-12))))))
#define COSINE(z)                                                                                                      \
    (1 + z * (-0.3084251375340424524 + z * (0.01585434424381541089 + z * (-0.0003259918869266875356                    \
     + z * (3.590860445885782251e-6 + z * (-2.461136382632163455e-8 + z * (1.150049702111891894e-10                    \
     + z * -3.857761956444445984e-13)))))))
#else
#define BITS uint32_t
#define ONE 0x3f800000u
#define ROOT_HALF 0x3f3504f3u
#define DIGITS 23
#define ARTANH(z) (-4 + z * (-1.3333355283f + z * (-0.7995507404f + z * -0.59743722584f)))
#define SINE(z) (0.78539816085f + z * (-0.080745432529f + z * (0.0024900010244f + z * -3.595045229e-5f)))
#define COSINE(z)                                                                                                      \
    (1 + z * (-0.30842513489f + z * (0.015854323912f + z * (-0.00032593650041f + z * 3.5287616102e-6f))))
#endif

static inline BITS NAME(bits)(REAL x)
{
    BITS bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline REAL NAME(real)(BITS bits)
{
    REAL x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* noise.box_muller: u_0 += σ z_0, u_1 += σ z_1. swap is zero or not, flip the bit of a sign or none. */
static inline __attribute__((always_inline)) void NAME(add_pair)(REAL f, REAL t, BITS swap, BITS flip, REAL sigma,
                                                                 REAL *u_0, REAL *u_1)
{
    const BITS digits = ((BITS)1 << DIGITS) - 1, bias = ONE >> DIGITS;
    BITS above = NAME(bits)(f < 0 ? 1 + f : f) - ROOT_HALF + ONE;           /* e is its exponent */
    REAL m = NAME(real)((above & digits) + ROOT_HALF);
    REAL e = NAME(real)(NAME(bits)((REAL)(digits + 1)) + (above >> DIGITS)) - (REAL)(digits + 1 + bias);
    REAL h = e == 0 ? f : m - 1, s = h / (2 + h), z = s * s;
    REAL r = sqrt(e * (REAL)-1.3862943611198906 + s * ARTANH(z));
    z = t * t;
    REAL y = r * (t * SINE(z)), x = NAME(real)(NAME(bits)(r * COSINE(z)) ^ flip);
    *u_0 += sigma * (swap ? y : x);
    *u_1 += sigma * (swap ? x : y);
}

/* The numbers of some tiles, from their words: noise.pair32, noise.pair64. */
CPU_GENERATIONS static void NAME(add_tiles)(REAL *u, REAL sigma, const uint32_t *words, size tiles)
{
    for (size tile = 0; tile < tiles; tile++, words += ABREAST) {
#ifdef FLOAT64_WORDS
        const uint32_t *p = words, *q = p + BLOCKS, *r = q + BLOCKS, *s = r + BLOCKS;
#pragma omp simd
        for (int l = 0; l < ABREAST; l++) {
            REAL below = ((int32_t)(q[l] >> 1) + 0.5) * 0x1p-31, within = ((int32_t)(s[l] >> 2) + 0.5) * 0x1p-30;
            NAME(add_pair)(((int32_t)p[l] + below) * 0x1p-32, ((int32_t)r[l] + within) * 0x1p-31, s[l] & 1,
                           (BITS)(s[l] & 2) << 62, sigma, u + l, u + ABREAST + l);
        }
        u += 2 * ABREAST;
#else
        for (int k = 0; k < 4; k += 2, u += 2 * ABREAST) {
            const uint32_t *p = words + k * BLOCKS, *q = p + BLOCKS;
#pragma omp simd
            for (int l = 0; l < ABREAST; l++) {
                REAL below = ((REAL)(int32_t)(q[l] & 63) + 0.5f) * 0x1p-6f;
                NAME(add_pair)(((REAL)(int32_t)p[l] + below) * 0x1p-32f, ((REAL)((int32_t)q[l] >> 8) + 0.5f) * 0x1p-23f,
                               q[l] & 64, (q[l] & 128) << 24, sigma, u + l, u + ABREAST + l);
            }
        }
#endif
    }
}

/* The numbers first … first + n − 1 of a row, at u; `first` begins a tile. */
static void NAME(add_share)(REAL *u, REAL sigma, key key, size first, size n)
{
    enum { EACH = 16 / sizeof(REAL), TILE = EACH * ABREAST };                 /* numbers of a block, and of a tile */
    words words;
    for (size j = 0; j < n; j += EACH * BLOCKS) {
        size now = smaller(n - j, EACH * BLOCKS), tiles = now / TILE, rest = now % TILE;
        philox(key, (first + j) / EACH, (tiles + (rest > 0)) * ABREAST, words);
        NAME(add_tiles)(u + j, sigma, words[0], tiles);
        if (rest) {
            REAL last[TILE] = {0};
            memcpy(last, u + j + tiles * TILE, rest * sizeof(REAL));
            NAME(add_tiles)(last, sigma, words[0] + tiles * ABREAST, 1);
            memcpy(u + j + tiles * TILE, last, rest * sizeof(REAL));
        }
    }
}

static int NAME(add_noise)(char *u, size stride, double sigma, const key *keys, size w, size d)
{
    REAL scale = sigma;
    if (!(scale >= 0 && isfinite(scale)))
        return DECLINED;
    size shares = scale > 0 ? (d + SHARE - 1) / SHARE : 0;
#pragma omp parallel for schedule(static) if (w * d > FEW)
    for (size n = 0; n < w * shares; n++) {
        size i = n / shares, first = n % shares * SHARE;
        NAME(add_share)((REAL *)(u + i * stride) + first, scale, keys[i], first, smaller(SHARE, d - first));
    }
    return 0;
}

#undef BITS
#undef ONE
#undef ROOT_HALF
#undef DIGITS
#undef ARTANH
#undef SINE
#undef COSINE
#endif
