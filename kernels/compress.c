/* Compressed messages, of mpiclip/compressors.py: codes of 1 to 9 bits side by side in rows of bytes, code j in the bits
   j · bits … (j+1) · bits − 1, the lowest first; and a few values with their indices. float32 and float64.

   What is added to one vector v (d,) is added row after row: the bytes do not depend on the threads.

   A kernel returns 0, or DECLINED before anything is written: for arrays that it does not know or that do not fit, and
   for an index out of place. The NumPy definition then answers. */

#ifndef REAL
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "array.h"
#include "kernels.h"

enum {
    UINT8 = 2, UINT16 = 4, INT32 = 5,               /* NPY_UBYTE, NPY_USHORT, NPY_INT */
    COLUMNS = 2048,                                 /* a piece of v that stays in the first-level cache; 8 divides it */
    DECLINED = 1,
};

#define ALWAYS static inline __attribute__((always_inline))

/* f(…, bits) with bits known to the compiler, so that the shifts of 8 codes, `bits` bytes, are constants. */
#define WITH_BITS(bits, f, ...) \
    switch (bits) { \
    case 1: f(__VA_ARGS__, 1); break; case 2: f(__VA_ARGS__, 2); break; case 3: f(__VA_ARGS__, 3); break; \
    case 4: f(__VA_ARGS__, 4); break; case 5: f(__VA_ARGS__, 5); break; case 6: f(__VA_ARGS__, 6); break; \
    case 7: f(__VA_ARGS__, 7); break; case 8: f(__VA_ARGS__, 8); break; case 9: f(__VA_ARGS__, 9); break; \
    }

/* Code l of those that begin at `row`. The second byte is read only where the code reaches into it. */
ALWAYS unsigned code_at(const uint8_t *row, size l, int bits)
{
    size first = l * bits / 8;
    int shift = (int)(l * bits % 8);
    unsigned two = row[first];
    if (shift + bits > 8)
        two |= (unsigned)row[first + 1] << 8;
    return two >> shift & ((1u << bits) - 1);
}

ALWAYS void pack_row(const uint16_t *codes, uint8_t *row, size n, int bits)
{
    for (size j = 0; j < n; j += 8) {               /* 8 codes are `bits` bytes */
        unsigned __int128 word = 0;
        size some = smaller(8, n - j);
        if (some == 8)
            for (int l = 0; l < 8; l++)
                word |= (unsigned __int128)codes[j + l] << bits * l;
        else
            for (int l = 0; l < some; l++)
                word |= (unsigned __int128)codes[j + l] << bits * l;
        for (size b = 0; b < (some * bits + 7) / 8; b++, word >>= 8)
            *row++ = (uint8_t)word;
    }
}

/* The number's bits: its sign, EXPONENT bits, FRACTION bits. */
#define REAL float
#define WORD int32_t
#define EXPONENT 8
#define FRACTION 23
#define SUFFIX f32
#include "compress.c"
#undef REAL
#undef WORD
#undef EXPONENT
#undef FRACTION
#undef SUFFIX
#define REAL double
#define WORD int64_t
#define EXPONENT 11
#define FRACTION 52
#define SUFFIX f64
#include "compress.c"

/* Whether it is (m, ⌈bits d/8⌉) bytes whose rows are dense, but may lie apart. */
static int is_bytes(const array *rows, size m, int bits, size d)
{
    return rows->type == ndarray && rows->dtype->number == UINT8 && rows->ndim == 2 && rows->shape[0] == m
        && rows->shape[1] == (bits * d + 7) / 8 && rows->strides[0] >= 0 && (d <= 1 || rows->strides[1] == 1);
}

/* rows_i = the codes_i side by side: compressors.pack */
int pack(const array *codes, int bits, const array *rows)
{
    if (bits < 1 || bits > 9 || !is_dense(codes, READABLE) || codes->dtype->number != UINT16 || codes->ndim != 2
        || !is_bytes(rows, codes->shape[0], bits, codes->shape[1]) || (rows->flags & WRITABLE) != WRITABLE)
        return DECLINED;
    size m = codes->shape[0], d = codes->shape[1], bytes = rows->shape[1];
    const uint16_t *code = codes->data;
    uint8_t *row = rows->data;
#pragma omp parallel for schedule(static) if (m * d > SMALL)
    for (size i = 0; i < m; i++)
        WITH_BITS(bits, pack_row, code + i * d, row + i * bytes, d)
    return 0;
}

/* The nearest powers of two as codes, and the exponents they count from: compressors.power_codes */
int power_codes(const array *u, const array *r, const array *codes, const array *bases)
{
    if (!is_float(u, READABLE) || u->ndim != 2 || !fits(r, READABLE, u->dtype->number, u, 2)
        || !fits(codes, WRITABLE, UINT16, u, 2) || !fits(bases, WRITABLE, INT32, u, 1))
        return DECLINED;
    BY_DTYPE(u, power_codes, u->data, r->data, codes->data, bases->data, u->shape[0], u->shape[1]);
    return 0;
}

/* The nearest of the levels 0 … 2^(bits−1) − 1, with a sign: compressors.level_codes */
int level_codes(const array *u, const array *r, const array *scales, int bits, const array *codes)
{
    if (bits < 2 || bits > 9 || !is_float(u, READABLE) || u->ndim != 2 || !fits(r, READABLE, u->dtype->number, u, 2)
        || !fits(scales, READABLE, FLOAT64, u, 1) || !fits(codes, WRITABLE, UINT16, u, 2))
        return DECLINED;
    BY_DTYPE(u, level_codes, u->data, r->data, scales->data, bits, codes->data, u->shape[0], u->shape[1]);
    return 0;
}

/* Whether v is (m, d), or (d,): one vector for all rows. */
static int is_sum(const array *v, size m)
{
    return is_float(v, WRITABLE) && (v->ndim == 1 || (v->ndim == 2 && v->shape[0] == m));
}

/* v_i[j] += tables_i[code j of rows_i]: compressors.add_codes */
int add_codes(const array *v, const array *rows, int bits, const array *tables)
{
    if (bits < 1 || bits > 9 || !is_dense(tables, READABLE) || tables->ndim != 2 || tables->shape[1] != 1 << bits
        || !is_sum(v, tables->shape[0]) || tables->dtype->number != v->dtype->number)
        return DECLINED;
    size m = tables->shape[0], d = v->shape[v->ndim - 1];
    if (!is_bytes(rows, m, bits, d))
        return DECLINED;
    BY_DTYPE(v, add_codes, v->data, rows->data, tables->data, m, d, rows->strides[0], v->ndim == 1, bits);
    return 0;
}

/* v_i[indices_i] += values_i: compressors.add_sparse */
int add_sparse(const array *v, const array *indices, const array *values)
{
    if (!is_dense(indices, READABLE) || indices->dtype->number != INT32 || indices->ndim != 2
        || !is_sum(v, indices->shape[0]) || !fits(values, READABLE, v->dtype->number, indices, 2))
        return DECLINED;
    size m = indices->shape[0], k = indices->shape[1], d = v->shape[v->ndim - 1];
    const int32_t *index = indices->data;
    for (size j = 0; j < m * k; j++)
        if (index[j] < 0 || index[j] >= d)
            return DECLINED;
    BY_DTYPE(v, add_sparse, v->data, index, values->data, m, k, v->ndim == 1 ? 0 : d);
    return 0;
}

#else                               /* once for each REAL */

/* The exponent field of the power of two that |u| becomes. */
ALWAYS WORD NAME(power)(REAL u, REAL r, WORD *sign)
{
    const WORD largest = ((WORD)1 << EXPONENT) - 2;             /* nothing is rounded up to infinity */
    WORD bits;
    memcpy(&bits, &u, sizeof bits);
    *sign = bits < 0;
    WORD magnitude = bits & (sizeof bits == 4 ? INT32_MAX : (WORD)INT64_MAX);
    WORD exponent = (magnitude + (WORD)(r * ((WORD)1 << FRACTION))) >> FRACTION;
    return exponent < largest ? exponent : largest;
}

CPU_GENERATIONS static WORD NAME(highest_power)(const REAL *u, const REAL *r, size n)
{
    WORD highest = 0, sign;
    for (size j = 0; j < n; j++) {
        WORD exponent = NAME(power)(u[j], r[j], &sign);
        highest = exponent > highest ? exponent : highest;
    }
    return highest;
}

CPU_GENERATIONS static void NAME(powers)(const REAL *u, const REAL *r, WORD base, uint16_t *codes, size n)
{
    for (size j = 0; j < n; j++) {
        WORD sign, code = NAME(power)(u[j], r[j], &sign) - base;
        codes[j] = (uint16_t)((code > 0 ? code : 0) | sign << 8);
    }
}

static void NAME(power_codes)(const REAL *u, const REAL *r, uint16_t *codes, int32_t *bases, size m, size d)
{
#pragma omp parallel for schedule(static) if (m * d > SMALL)
    for (size i = 0; i < m; i++) {
        WORD base = NAME(highest_power)(u + i * d, r + i * d, d) - 255;
        bases[i] = base > 0 ? (int32_t)base : 0;
        NAME(powers)(u + i * d, r + i * d, bases[i], codes + i * d, d);
    }
}

CPU_GENERATIONS static void NAME(levels)(const REAL *u, const REAL *r, double scale, int bits, uint16_t *codes, size n)
{
    const int highest = (1 << (bits - 1)) - 1;
    for (size j = 0; j < n; j++) {
        double level = fabs((double)u[j]) * scale;
        int below = (int)level, code = below + (r[j] < level - below);
        code = code < highest ? code : highest;     /* |u_j| may exceed ‖u‖ by its rounding */
        codes[j] = (uint16_t)(code | (signbit(u[j]) != 0) << (bits - 1));
    }
}

static void NAME(level_codes)(const REAL *u, const REAL *r, const double *scales, int bits, uint16_t *codes, size m,
                              size d)
{
#pragma omp parallel for schedule(static) if (m * d > SMALL)
    for (size i = 0; i < m; i++)
        NAME(levels)(u + i * d, r + i * d, scales[i], bits, codes + i * d, d);
}

/* n codes that begin at `row`, which begins with a whole byte */
ALWAYS void NAME(add_piece)(REAL *v, const uint8_t *row, const REAL *table, size n, int bits)
{
    size j = 0;
    for (; j + 8 <= n; j += 8, row += bits)
        for (int l = 0; l < 8; l++)
            v[j + l] += table[code_at(row, l, bits)];
    for (size l = 0; j < n; j++, l++)
        v[j] += table[code_at(row, l, bits)];
}

/* Not to be inlined: a compiler does not clone the body of a parallel region for the constants. */
static __attribute__((noinline)) void NAME(add_block)(REAL *v, const uint8_t *row, const REAL *table, size n, int bits)
{
    WITH_BITS(bits, NAME(add_piece), v, row, table, n)
}

/* Pieces of v are dealt out; to each one, row after row is added. together: v is one vector for all rows. */
static void NAME(add_codes)(REAL *v, const uint8_t *rows, const REAL *tables, size m, size d, size stride, int together,
                            int bits)
{
    size pieces = (d + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static) if (m * d > SMALL)
    for (size p = 0; p < pieces; p++)
        for (size i = 0; i < m; i++) {
            size start = p * COLUMNS;
            NAME(add_block)(v + (together ? 0 : i * d) + start, rows + i * stride + start / 8 * bits,
                            tables + (i << bits), smaller(COLUMNS, d - start), bits);
        }
}

/* pitch: elements from one row of v to the next; 0: v is one vector for all rows */
static void NAME(add_sparse)(REAL *v, const int32_t *index, const REAL *values, size m, size k, size pitch)
{
#pragma omp parallel for schedule(static) if (pitch && m * k > SMALL)
    for (size i = 0; i < m; i++)
        for (size j = 0; j < k; j++)
            v[i * pitch + index[i * k + j]] += values[i * k + j];
}

#endif
