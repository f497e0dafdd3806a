/* Inner products of n vectors about their mean, float32 and float64: columns.gram of mpiclip/columns.py.

   The rows are centred and scaled a strip of columns at a time that stays in the second-level cache. The products of SIDE
   rows with SIDE rows are summed in registers, in a LINE of sums for each pair. Of float32 rows all this is float at
   first: what is taken off is the mean but for rounding, the same for all rows; products are fused, and no more than
   32 + FLUSH sums follow one another before they go on in double: that is right to 1e-5 ‖z_i‖ ‖z_j‖, in practice to
   1e-7. Where a difference of two rows is so short beside them that this would not do, or numbers are too large or too
   small for it, all is done again in double. Equal rows have equal entries either way, and the order of all sums depends
   on the shape alone.

   A kernel returns 0, or DECLINED before anything is written, as in ops.c. */

#ifndef REAL
#include <math.h>
#include <string.h>
#include <tgmath.h>

#include "columns.h"

enum {
    SIDE = 4,
    STRIP = 2048,                   /* bytes of a row in a strip */
    FLUSH = 4,                      /* strips whose products are added before the sums go on in double */
    CELL = SIDE * SIDE * LINE,      /* bytes of the sums of SIDE times SIDE products */
};

/* ‖z_i − z_j‖² / (‖z_i‖² + ‖z_j‖²) from which on float products will do, and the mean square of numbers for which their
   squares are no float. */
static const double CLOSE = 1e-2, SMALLEST = 0x1p-90, LARGEST = 0x1p90;

/* Whether a Gram matrix (b + 1, b + 1) from float products is right for what is computed of it: distances of two rows,
   and of a row and the −ȳ that was taken off, its norm. */
static int is_right(const double *G, size b, size d, const double *centre)
{
    size side = b + 1;
    for (size i = 0; i < b; i++) {
        double g_ii = G[i * side + i], g_bb = G[b * side + b], norm = g_ii + 2 * G[i * side + b] + g_bb;
        if (!(g_ii >= SMALLEST * d && g_ii <= LARGEST))
            return 0;
        if (centre[i] != 0 && norm != 0 && norm < CLOSE * (g_ii + g_bb))
            return 0;
        for (size j = 0; j < i; j++) {
            double sum = g_ii + G[j * side + j], square = sum - 2 * G[i * side + j];
            if (square != 0 && square < CLOSE * sum)
                return 0;
        }
    }
    return 1;
}

#define REAL float
#define PRODUCT float
#define SUFFIX f32
#include "gram.c"
#undef PRODUCT
#undef SUFFIX
#define PRODUCT double
#define SUFFIX f32_f64
#include "gram.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "gram.c"

/* scale and centre (b,) are float64, out (b + 1, b + 1) is the launcher's. */
int column_gram(const array *X, const array *E, const array *scale, const array *centre, const array *out)
{
    sources s;
    if (!sources_of(X, E, &s) || scale->ndim != 1 || scale->shape[0] != s.b || centre->ndim != 1
        || centre->shape[0] != s.b)
        return DECLINED;
    if (X->dtype->number == FLOAT64)
        return gram_f64(&s, scale->data, centre->data, out->data);
    if (gram_f32(&s, scale->data, centre->data, out->data))
        return DECLINED;
    return is_right(out->data, s.b, s.d, centre->data) ? 0 : gram_f32_f64(&s, scale->data, centre->data, out->data);
}

#else                               /* once for each REAL and PRODUCT */

#define COLUMNS (STRIP / (size)sizeof(PRODUCT))
#define LANES_ (LINE / (size)sizeof(PRODUCT))

/* The n columns from c on of z_j = s_j y_j − c_j ȳ, with zeros up to COLUMNS, a LINE of each of SIDE rows after the other:
   z (groups, COLUMNS / LANES_, SIDE, LANES_). with_mean (b + 1, LANES_) += the products of these and of ȳ with ȳ. */
CPU_GENERATIONS static void NAME(centred)(const sources *m, const double *scale, const double *centre, size c, size n,
                                          PRODUCT *restrict z, PRODUCT *restrict with_mean)
{
    PRODUCT mean[STRIP / sizeof(PRODUCT)];
    memset(mean, 0, sizeof mean);
    for (size j = 0; j < m->n; j += 2) {                /* two at a time, the last one perhaps with 0 times itself */
        const REAL *restrict row = (const REAL *)source(m, j) + c;
        const REAL *restrict next = (const REAL *)source(m, smaller(j + 1, m->n - 1)) + c;
        PRODUCT s = scale[j], t = j + 1 < m->n ? scale[j + 1] : 0;
#pragma omp simd
        for (size l = 0; l < n; l++)
            mean[l] = fma(t, next[l], fma(s, row[l], mean[l]));
    }
    for (size l = 0; l < COLUMNS; l++)
        mean[l] /= m->n;
    for (size j = 0; j < m->b; j++) {
        const REAL *restrict row = (const REAL *)source(m, j) + c;
        PRODUCT *restrict to = z + j / SIDE * SIDE * COLUMNS + j % SIDE * LANES_;
        PRODUCT s = scale[j], part = centre[j], sum[LINE / sizeof(PRODUCT)] = {0};
        size k = 0;
        for (; k + LANES_ <= n; k += LANES_, to += SIDE * LANES_) {
#pragma omp simd
            for (size l = 0; l < LANES_; l++) {
                to[l] = fma(s, row[k + l], -part * mean[k + l]);
                sum[l] = fma(to[l], mean[k + l], sum[l]);
            }
        }
        for (; k < COLUMNS; k += LANES_, to += SIDE * LANES_)
            for (size l = 0; l < LANES_; l++) {
                to[l] = k + l < n ? fma(s, row[k + l], -part * mean[k + l]) : 0;
                sum[l] = fma(to[l], mean[k + l], sum[l]);
            }
#pragma omp simd
        for (size l = 0; l < LANES_; l++)
            with_mean[j * LANES_ + l] += sum[l];
    }
    PRODUCT sum[LINE / sizeof(PRODUCT)] = {0};
    for (size k = 0; k < COLUMNS; k += LANES_)
#pragma omp simd
        for (size l = 0; l < LANES_; l++)
            sum[l] = fma(mean[k + l], mean[k + l], sum[l]);
#pragma omp simd
    for (size l = 0; l < LANES_; l++)
        with_mean[m->b * LANES_ + l] += sum[l];
}

/* lanes (SIDE, SIDE, LANES_) += the products of SIDE rows a and SIDE rows b, each (COLUMNS / LANES_, SIDE, LANES_) */
CPU_GENERATIONS static void NAME(add_products)(const PRODUCT *restrict a, const PRODUCT *restrict b,
                                               PRODUCT *restrict lanes)
{
    PRODUCT sum[SIDE][SIDE][LINE / sizeof(PRODUCT)];
    memset(sum, 0, sizeof sum);
    for (size c = 0; c < SIDE * COLUMNS; c += SIDE * LANES_)
#pragma GCC unroll 4
        for (int i = 0; i < SIDE; i++)
#pragma GCC unroll 4
            for (int j = 0; j < SIDE; j++)
#pragma omp simd
                for (size l = 0; l < LANES_; l++)
                    sum[i][j][l] = fma(a[c + i * LANES_ + l], b[c + j * LANES_ + l], sum[i][j][l]);
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
#pragma omp simd
            for (size l = 0; l < LANES_; l++)
                lanes[(i * SIDE + j) * LANES_ + l] += sum[i][j][l];
}

/* sums += lanes; lanes = 0 */
CPU_GENERATIONS static void NAME(flush)(PRODUCT *restrict lanes, double *restrict sums, size n)
{
#pragma omp simd
    for (size l = 0; l < n; l++) {
        sums[l] += lanes[l];
        lanes[l] = 0;
    }
}

static int NAME(gram)(const sources *m, const double *scale, const double *centre, double *out)
{
    size side = m->b + 1, groups = (m->b + SIDE - 1) / SIDE, cell = CELL / sizeof(PRODUCT);
    size n_products = groups * (groups + 1) / 2 * cell, n_lanes = n_products + side * LANES_;
    size strip = groups * SIDE * COLUMNS;
    size length = part_length(m->d, FLUSH * COLUMNS), parts = (m->d + length - 1) / length;
    size threads = m->b * m->d > SMALL ? smaller(most_threads(), parts) : 1;
    size each = (strip + n_lanes) * sizeof(PRODUCT) + n_lanes * sizeof(double);
    char *room = lines(threads * each);
    double *sums = calloc(parts * side * side + 1, sizeof *sums);
    int failed = !room || !sums;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && !failed)
    for (size part = 0; part < (failed ? 0 : parts); part++) {
        PRODUCT *z = (PRODUCT *)(room + thread_number() * each), *lanes = z + strip;
        double *totals = (double *)(lanes + n_lanes);
        memset(z, 0, each);
        size end = smaller((part + 1) * length, m->d);
        for (size c = part * length, strips = 1; c < end; c += COLUMNS, strips++) {
            NAME(centred)(m, scale, centre, c, smaller(COLUMNS, m->d - c), z, lanes + n_products);
            for (size g = 0; g < groups; g += 2)        /* two at a time: what they meet comes from the first level */
                for (size h = 0; h < smaller(g + 2, groups); h++)
                    for (size i = h > g ? h : g; i < smaller(g + 2, groups); i++)
                        NAME(add_products)(z + i * SIDE * COLUMNS, z + h * SIDE * COLUMNS,
                                           lanes + (i * (i + 1) / 2 + h) * cell);
            if (strips % FLUSH == 0 || c + COLUMNS >= end)
                NAME(flush)(lanes, totals, n_lanes);
        }
        for (size i = 0; i < side; i++)
            for (size j = 0; j <= i; j++) {
                const double *lane = i == m->b ? totals + n_products + j * LANES_ : totals
                    + (i / SIDE * (i / SIDE + 1) / 2 + j / SIDE) * cell + (i % SIDE * SIDE + j % SIDE) * LANES_;
                for (size l = 0; l < LANES_; l++)
                    sums[(part * side + i) * side + j] += lane[l];
            }
    }
    for (size i = 0; i < (failed ? 0 : side); i++)
        for (size j = 0; j <= i; j++) {
            double sum = 0;
            for (size part = 0; part < parts; part++)
                sum += sums[(part * side + i) * side + j];
            out[i * side + j] = out[j * side + i] = sum;
        }
    free(room);
    free(sums);
    return failed ? DECLINED : 0;
}

#undef COLUMNS
#undef LANES_
#endif
