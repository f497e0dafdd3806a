/* The vector operations of mpiclip/ops.py, row by row on u (w, d), float32 and float64.

   Sums of squares are accumulated in double, in LANES interleaved sums for each chunk of a row and then chunk after
   chunk: an order that depends on d alone, so that the bytes do not depend on the threads or the CPU's generation.

   A kernel returns 0, or DECLINED before anything is written: for arrays that it does not know or that do not fit, and
   for a negative or NaN τ. The NumPy definition then answers. */

#ifndef REAL
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#include "array.h"
#include "kernels.h"

enum {
    LANES = 32,                     /* enough independent sums to hide the latency of an addition */
    LONG_ROW = 4 * CHUNK,           /* from here on the threads share a row; shorter rows are dealt out whole */
    COLUMNS = 2048,                 /* row_sum: a piece of out that stays in the first-level cache */
    DECLINED = 1,
};

const void *ndarray, *none;

static inline double sum_of(double *lane)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

#define REAL float
#define SUFFIX f32
#include "ops.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "ops.c"

/* v is NULL in clip, and c too in norms. */
static int clip_rows(const array *u, const array *v, const array *c, double tau, const array *taus, const array *norms)
{
    if (!is_float(u, READABLE) || u->ndim < 1 || u->ndim > 2)
        return DECLINED;
    int number = u->dtype->number, rows = u->ndim - 1;
    if ((v && (v == c || !fits(v, WRITABLE, number, u, u->ndim))) || (c && !fits(c, WRITABLE, number, u, u->ndim))
        || (taus != none && !fits(taus, READABLE, FLOAT64, u, rows))
        || (norms != none && !fits(norms, WRITABLE, FLOAT64, u, rows)))
        return DECLINED;
    return BY_DTYPE(u, clip_rows, u->data, v ? v->data : NULL, c ? c->data : NULL, tau,
                    taus == none ? NULL : taus->data, norms == none ? NULL : norms->data,
                    rows ? u->shape[0] : 1, u->shape[rows]);
}

/* out_i = ‖u_i‖: ops.norms */
int norms(const array *u, const array *out)
{
    return clip_rows(u, NULL, NULL, 0, none, out);
}

/* out_i = u_i min(1, τ_i/‖u_i‖), norms_i = ‖u_i‖: ops.clip. τ_i is taus[i], or tau where taus is None. */
int clip(const array *u, const array *out, double tau, const array *taus, const array *norms)
{
    return clip_rows(u, NULL, out, tau, taus, norms);
}

/* c_i = clip_τ(u_i − v_i), v_i += c_i, norms_i = ‖u_i − v_i‖: ops.clip_step */
int clip_step(const array *u, const array *v, const array *c, double tau, const array *taus, const array *norms)
{
    return clip_rows(u, v, c, tau, taus, norms);
}

/* v += mean, x −= γ v: ops.apply */
int apply(const array *x, const array *v, const array *mean, double gamma)
{
    if (!is_float(x, WRITABLE) || x == v || !fits(v, WRITABLE, x->dtype->number, x, x->ndim)
        || !fits(mean, READABLE, x->dtype->number, x, x->ndim))
        return DECLINED;
    BY_DTYPE(x, apply, x->data, v->data, mean->data, gamma, elements(x));
    return 0;
}

/* out = scale Σ_i u_i, i = 0, 1, …: ops.row_sum */
int row_sum(const array *u, const array *out, double scale)
{
    if (!is_rows(u) || !is_dense(out, WRITABLE) || out->dtype->number != u->dtype->number || out->ndim != 1
        || out->shape[0] != u->shape[1])
        return DECLINED;
    BY_DTYPE(u, row_sum, u->data, out->data, scale, u->shape[0], u->shape[1], u->strides[0]);
    return 0;
}

#else                               /* once for each REAL */

/* Σ_j u_j² */
CPU_GENERATIONS static double NAME(squares)(const REAL *u, size n)
{
    double lane[LANES] = {0};
    size j = 0;
    for (; j + LANES <= n; j += LANES) {
        fetch_ahead(u + j, LANES * sizeof(REAL));
        for (int l = 0; l < LANES; l++) {
            double e = u[j + l];
            lane[l] += e * e;
        }
    }
    for (int l = 0; j < n; j++, l++)
        lane[l] += (double)u[j] * u[j];
    return sum_of(lane);
}

/* Σ_j (u_j − v_j)² */
CPU_GENERATIONS static double NAME(squares_of_difference)(const REAL *u, const REAL *v, size n)
{
    double lane[LANES] = {0};
    size j = 0;
    for (; j + LANES <= n; j += LANES) {
        fetch_ahead(u + j, LANES * sizeof(REAL));
        fetch_ahead(v + j, LANES * sizeof(REAL));
        for (int l = 0; l < LANES; l++) {
            double e = (REAL)(u[j + l] - v[j + l]);
            lane[l] += e * e;
        }
    }
    for (int l = 0; j < n; j++, l++) {
        double e = (REAL)(u[j] - v[j]);
        lane[l] += e * e;
    }
    return sum_of(lane);
}

/* c = factor u; c may be u */
CPU_GENERATIONS static void NAME(scale)(const REAL *u, REAL factor, REAL *c, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++)
        c[j] = factor * u[j];
}

/* c = factor (u − v), v += c; c may be u */
CPU_GENERATIONS static void NAME(step)(const REAL *u, REAL *v, REAL factor, REAL *c, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL e = factor * (u[j] - v[j]);
        c[j] = e;
        v[j] += e;
    }
}

/* min(1, τ/‖u‖), rounded towards zero; NaN for a norm that is not finite: ops.clip_factor */
static REAL NAME(clip_factor)(double norm, double tau)
{
    if (!isfinite(norm))
        return NAN;
    if (!(norm > tau))
        return 1;
    double exact = tau / norm;
    REAL factor = exact;
    return factor > exact ? nextafter(factor, (REAL)0) : factor;
}

/* The first pass over a piece of a row, and the second. */
static double NAME(measure)(const REAL *u, const REAL *v, size n)
{
    return v ? NAME(squares_of_difference)(u, v, n) : NAME(squares)(u, n);
}

static void NAME(shorten)(const REAL *u, REAL *v, REAL factor, REAL *c, size n)
{
    if (v && !isnan(factor))
        NAME(step)(u, v, factor, c, n);
    else if (factor != 1)
        NAME(scale)(u, factor, c, n);
    else if (c != u)
        memcpy(c, u, n * sizeof(REAL));
}

/* clip_rows above; v, c, taus and norms may be NULL. */
static int NAME(clip_rows)(const REAL *u, REAL *v, REAL *c, double tau, const double *taus, double *norms, size w,
                           size d)
{
    if (!(tau >= 0))
        return DECLINED;
    for (size i = 0; taus && i < w; i++)
        if (!(taus[i] >= 0))
            return DECLINED;

    if (d < LONG_ROW) {
#pragma omp parallel for schedule(static) if (w * d > SMALL)
        for (size i = 0; i < w; i++) {
            REAL *v_i = v ? v + i * d : NULL;
            double norm = sqrt(NAME(measure)(u + i * d, v_i, d));
            if (norms)
                norms[i] = norm;
            if (c)
                NAME(shorten)(u + i * d, v_i, NAME(clip_factor)(norm, taus ? taus[i] : tau), c + i * d, d);
        }
        return 0;
    }

    size chunks = (d + CHUNK - 1) / CHUNK;
    double *sums = malloc(2 * chunks * sizeof *sums);   /* of this row, and of the last, which others may still read */
    if (!sums)
        return DECLINED;
#pragma omp parallel
    {
        size first = chunks * thread_number() / thread_count(), last = chunks * (thread_number() + 1) / thread_count();
        for (size i = 0; i < w; i++) {
            const REAL *u_i = u + i * d;
            REAL *v_i = v ? v + i * d : NULL;
            double *part = sums + i % 2 * chunks, sum = 0;
            for (size k = first; k < last; k++)
                part[k] = NAME(measure)(u_i + k * CHUNK, v ? v_i + k * CHUNK : NULL, smaller(CHUNK, d - k * CHUNK));
#pragma omp barrier
            for (size k = 0; k < chunks; k++)
                sum += part[k];
            double norm = sqrt(sum);
            if (norms && first == 0 && last > 0)
                norms[i] = norm;
            if (c) {
                REAL factor = NAME(clip_factor)(norm, taus ? taus[i] : tau);
                for (size k = last; k-- > first;)       /* backwards: the cache holds what the first pass read last */
                    NAME(shorten)(u_i + k * CHUNK, v ? v_i + k * CHUNK : NULL, factor, c + i * d + k * CHUNK,
                                  smaller(CHUNK, d - k * CHUNK));
            }
        }
    }
    free(sums);
    return 0;
}

CPU_GENERATIONS static void NAME(apply_block)(REAL *x, REAL *v, const REAL *mean, REAL gamma, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        v[j] += mean[j];
        x[j] -= gamma * v[j];
    }
}

static void NAME(apply)(REAL *x, REAL *v, const REAL *mean, double gamma, size n)
{
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (size k = 0; k < n; k += CHUNK)
        NAME(apply_block)(x + k, v + k, mean + k, gamma, smaller(CHUNK, n - k));
}

/* n columns of w rows that lie `pitch` elements apart */
CPU_GENERATIONS static void NAME(row_sum_block)(const REAL *u, REAL *out, REAL scale, size w, size pitch, size n)
{
    memset(out, 0, n * sizeof(REAL));
    for (size i = 0; i < w; i++)
#pragma omp simd
        for (size j = 0; j < n; j++)
            out[j] += u[i * pitch + j];
#pragma omp simd
    for (size j = 0; j < n; j++)
        out[j] *= scale;
}

static void NAME(row_sum)(const REAL *u, REAL *out, double scale, size w, size d, size stride)
{
#pragma omp parallel for schedule(static) if (w * d > SMALL)
    for (size k = 0; k < d; k += COLUMNS)
        NAME(row_sum_block)(u + k, out + k, scale, w, stride / (size)sizeof(REAL), smaller(COLUMNS, d - k));
}

#endif
