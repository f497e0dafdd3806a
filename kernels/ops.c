/* The vector operations of mpiclip/ops.py, row by row on u (w, d), float32 and float64.

   Sums of squares are accumulated in double, in LANES interleaved sums for each chunk of a row and then chunk after
   chunk: an order that depends on d alone, so that the bytes do not depend on the threads or the CPU's generation.

   A kernel returns 0, or DECLINED before anything is written: for arrays that it does not know or that do not fit, and
   for a negative or NaN τ. The NumPy definition then answers. */

#ifndef REAL
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

#include "array.h"
#include "kernels.h"

enum {
    COLUMNS = 2048,                 /* row_sum: a piece of out that stays in the first-level cache */
    DECLINED = 1,
};

const void *ndarray, *none;

static inline void *data(const array *a)
{
    return a == none ? NULL : a->data;
}

/* What becomes of a row whose norm is known. */
typedef struct {
    double tau;
    const double *taus;             /* a threshold for each row instead, or NULL */
    double alpha, beta, scale;
} constants;

#define REAL float
#define SUFFIX f32
#include "ops.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "ops.c"

/* m is None but in momentum_step, v is None in clip, and c too in norms. */
static int clip_rows(const array *u, const array *m, const array *v, const array *c, constants k, const array *taus,
                     const array *norms)
{
    if (!is_float(u, READABLE) || u->ndim < 1 || u->ndim > 2)
        return DECLINED;
    int number = u->dtype->number, rows = u->ndim - 1;
    const array *changed[] = {m, v, c};
    for (int i = 0; i < 3; i++)
        if (changed[i] != none && (changed[i] == changed[(i + 1) % 3] || !fits(changed[i], WRITABLE, number, u, u->ndim)))
            return DECLINED;
    if ((taus != none && !fits(taus, READABLE, FLOAT64, u, rows))
        || (norms != none && !fits(norms, WRITABLE, FLOAT64, u, rows)))
        return DECLINED;
    k.taus = data(taus);
    return BY_DTYPE(u, clip_rows, u->data, data(m), data(v), data(c), k, data(norms), rows ? u->shape[0] : 1,
                    u->shape[rows]);
}

/* out_i = ‖u_i‖: ops.norms */
int norms(const array *u, const array *out)
{
    return clip_rows(u, none, none, none, (constants){0}, none, out);
}

/* out_i = u_i min(1, τ_i/‖u_i‖), norms_i = ‖u_i‖: ops.clip. τ_i is taus[i], or tau where taus is None. */
int clip(const array *u, const array *out, double tau, const array *taus, const array *norms)
{
    return clip_rows(u, none, none, out, (constants){.tau = tau}, taus, norms);
}

/* c_i = clip_τ(u_i − v_i), v_i += c_i, norms_i = ‖u_i − v_i‖: ops.clip_step */
int clip_step(const array *u, const array *v, const array *c, double tau, const array *taus, const array *norms)
{
    return v == none ? DECLINED : clip_rows(u, none, v, c, (constants){.tau = tau, .scale = 1}, taus, norms);
}

/* c_i = β (u_i − v_i)/(α + ‖u_i − v_i‖), v_i += c_i, norms_i = ‖u_i − v_i‖: ops.normalize_step */
int normalize_step(const array *u, const array *v, const array *c, double alpha, double beta, const array *norms)
{
    if (v == none || !(alpha > 0))
        return DECLINED;
    return clip_rows(u, none, v, c, (constants){.tau = beta, .alpha = alpha, .scale = 1}, none, norms);
}

/* m_i = (1 − β) m_i + β u_i, c_i = clip_τ(m_i − v_i), v_i += scale c_i, norms_i = ‖m_i − v_i‖: ops.momentum_step */
int momentum_step(const array *u, const array *m, const array *v, const array *c, double tau, const array *taus,
                  double beta, double scale, const array *norms)
{
    constants k = {.tau = tau, .beta = beta, .scale = scale};
    return m == none ? DECLINED : clip_rows(u, m, v, c, k, taus, norms);
}

/* f_i = min(1, τ/norms_i), or τ/norms_i, e_i = f_i u_i + λ min(1, f_i) x_i, m_i = μ m_i + e_i,
   out_i = x_i − η m_i − origin: ops.local_step. m and origin may be None. */
int local_step(const array *x, const array *u, const array *norms, double tau, double eta, int normalize, double lambda,
               const array *m, double mu, const array *origin, const array *out)
{
    if (!is_float(x, READABLE) || x->ndim < 1 || x->ndim > 2)
        return DECLINED;
    int number = x->dtype->number, rows = x->ndim - 1;
    if (!fits(u, READABLE, number, x, x->ndim) || !fits(out, WRITABLE, number, x, x->ndim)
        || !fits(norms, READABLE, FLOAT64, x, rows)
        || (m != none && (m == x || m == u || m == out || !fits(m, WRITABLE, number, x, x->ndim)))
        || (origin != none && (!is_dense(origin, READABLE) || origin->dtype->number != number || origin->ndim != 1
                               || origin->shape[0] != x->shape[rows])))
        return DECLINED;
    return BY_DTYPE(x, local_step, x->data, u->data, norms->data, tau, eta, normalize, lambda, data(m), mu, data(origin),
                    out->data, rows ? x->shape[0] : 1, x->shape[rows]);
}

/* v += scale mean, x −= γ v: ops.apply */
int apply(const array *x, const array *v, const array *mean, double gamma, double scale)
{
    if (!is_float(x, WRITABLE) || x == v || !fits(v, WRITABLE, x->dtype->number, x, x->ndim)
        || !fits(mean, READABLE, x->dtype->number, x, x->ndim))
        return DECLINED;
    BY_DTYPE(x, apply, x->data, v->data, mean->data, gamma, scale, elements(x));
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

/* Σ_j (m_j − v_j)², m = keep m + take u; v may be NULL */
CPU_GENERATIONS static double NAME(squares_of_momentum)(const REAL *u, const REAL *m, const REAL *v, REAL keep,
                                                        REAL take, size n)
{
    double lane[LANES] = {0};
    size j = 0;
    for (; j + LANES <= n; j += LANES) {
        fetch_ahead(u + j, LANES * sizeof(REAL));
        fetch_ahead(m + j, LANES * sizeof(REAL));
        if (v)
            fetch_ahead(v + j, LANES * sizeof(REAL));
        for (int l = 0; l < LANES; l++) {
            double e = (REAL)(keep * m[j + l] + take * u[j + l] - (v ? v[j + l] : 0));
            lane[l] += e * e;
        }
    }
    for (int l = 0; j < n; j++, l++) {
        double e = (REAL)(keep * m[j] + take * u[j] - (v ? v[j] : 0));
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

/* m = keep m + take u, c = factor (m − v), v += scale c; c may be u */
CPU_GENERATIONS static void NAME(momentum_step)(const REAL *u, REAL *m, REAL *v, REAL keep, REAL take, REAL factor,
                                                REAL scale, REAL *c, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL e = keep * m[j] + take * u[j];
        m[j] = e;
        e = factor * (e - v[j]);
        c[j] = e;
        v[j] += scale * e;
    }
}

/* The same without v: c = factor m */
CPU_GENERATIONS static void NAME(momentum)(const REAL *u, REAL *m, REAL keep, REAL take, REAL factor, REAL *c, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL e = keep * m[j] + take * u[j];
        m[j] = e;
        c[j] = factor * e;
    }
}

/* min(1, τ/‖u‖), or with α > 0 τ/(α + ‖u‖), rounded towards zero; NaN for a norm that is not finite: ops.clip_factor,
   ops.normalize_step */
REAL NAME(factor)(double norm, double tau, double alpha)
{
    if (!isfinite(norm))
        return NAN;
    if (alpha == 0 && !(norm > tau))
        return 1;
    double exact = tau / (alpha + norm);
    REAL factor = exact;
    return factor > exact ? nextafter(factor, (REAL)0) : factor;
}

/* τ/ν rounded towards zero, at most the largest number; 0 for ν = 0: ops.local_step */
static REAL NAME(quotient)(double tau, double norm)
{
    const double largest = sizeof(REAL) == sizeof(float) ? FLT_MAX : DBL_MAX;
    double exact = norm > 0 ? tau / norm : 0;
    REAL factor = exact < largest ? exact : largest;
    return factor > exact ? nextafter(factor, (REAL)0) : factor;
}

/* The first pass over a piece of a row, and the second. */
static double NAME(measure)(const REAL *u, const REAL *m, const REAL *v, double beta, size n)
{
    return m ? NAME(squares_of_momentum)(u, m, v, 1 - beta, beta, n)
         : v ? NAME(squares_of_difference)(u, v, n) : NAME(squares)(u, n);
}

static void NAME(shorten)(const REAL *u, REAL *m, REAL *v, REAL factor, const constants *k, REAL *c, size n)
{
    if (m && v && !isnan(factor))
        NAME(momentum_step)(u, m, v, 1 - k->beta, k->beta, factor, k->scale, c, n);
    else if (m && !isnan(factor))
        NAME(momentum)(u, m, 1 - k->beta, k->beta, factor, c, n);
    else if (v && !isnan(factor))
        NAME(step)(u, v, factor, c, n);
    else if (factor != 1)
        NAME(scale)(u, factor, c, n);
    else if (c != u)
        memcpy(c, u, n * sizeof(REAL));
}

/* clip_rows above; m, v, c and norms may be NULL. */
static int NAME(clip_rows)(const REAL *u, REAL *m, REAL *v, REAL *c, constants k, double *norms, size w, size d)
{
    if (!(k.tau >= 0))
        return DECLINED;
    for (size i = 0; k.taus && i < w; i++)
        if (!(k.taus[i] >= 0))
            return DECLINED;

    if (d < LONG_ROW) {
#pragma omp parallel for schedule(static) if (w * d > SMALL)
        for (size i = 0; i < w; i++) {
            REAL *m_i = m ? m + i * d : NULL, *v_i = v ? v + i * d : NULL;
            double norm = sqrt(NAME(measure)(u + i * d, m_i, v_i, k.beta, d));
            if (norms)
                norms[i] = norm;
            if (c)
                NAME(shorten)(u + i * d, m_i, v_i, NAME(factor)(norm, k.taus ? k.taus[i] : k.tau, k.alpha), &k,
                              c + i * d, d);
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
            double *part = sums + i % 2 * chunks, sum = 0;
            for (size p = first; p < last; p++) {
                size at = i * d + p * CHUNK;
                part[p] = NAME(measure)(u + at, m ? m + at : NULL, v ? v + at : NULL, k.beta,
                                        smaller(CHUNK, d - p * CHUNK));
            }
#pragma omp barrier
            for (size p = 0; p < chunks; p++)
                sum += part[p];
            double norm = sqrt(sum);
            if (norms && first == 0 && last > 0)
                norms[i] = norm;
            if (c) {
                REAL factor = NAME(factor)(norm, k.taus ? k.taus[i] : k.tau, k.alpha);
                for (size p = last; p-- > first;) {     /* backwards: the cache holds what the first pass read last */
                    size at = i * d + p * CHUNK;
                    NAME(shorten)(u + at, m ? m + at : NULL, v ? v + at : NULL, factor, &k, c + at,
                                  smaller(CHUNK, d - p * CHUNK));
                }
            }
        }
    }
    free(sums);
    return 0;
}

/* e = f u + shrink x, m = mu m + e, out = x − eta m − origin; out may be x or u, m and origin may be NULL */
CPU_GENERATIONS static void NAME(local_step_block)(const REAL *x, const REAL *u, REAL *m, const REAL *origin, REAL *out,
                                                   REAL f, REAL shrink, REAL mu, REAL eta, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        REAL e = f * u[j];
        if (shrink != 0)
            e += shrink * x[j];
        if (m)
            e = m[j] = mu * m[j] + e;
        e = x[j] - eta * e;
        out[j] = origin ? e - origin[j] : e;
    }
}

/* local_step above; m and origin may be NULL. The threads share a row or whole rows, as in clip_rows, but backwards: the
   cache holds what the norms were last taken of. */
static int NAME(local_step)(const REAL *x, const REAL *u, const double *norms, double tau, double eta, int normalize,
                            double lambda, REAL *m, double mu, const REAL *origin, REAL *out, size w, size d)
{
    if (!(tau >= 0))
        return DECLINED;
    int shared = d >= LONG_ROW;
    size piece = shared ? CHUNK : d, pieces = shared ? (d + CHUNK - 1) / CHUNK : 1;
#pragma omp parallel if (w * d > SMALL)
    {
        size all = shared ? pieces : w, first = all * thread_number() / thread_count(),
             last = all * (thread_number() + 1) / thread_count();
        for (size i = shared ? w : last; i-- > (shared ? 0 : first);) {
            REAL f = normalize && isfinite(norms[i]) ? NAME(quotient)(tau, norms[i]) : NAME(factor)(norms[i], tau, 0);
            REAL shrink = (REAL)lambda * (f > 1 ? 1 : f), *m_i = m && !isnan(f) ? m + i * d : NULL;
            for (size p = shared ? last : 1; p-- > (shared ? first : 0);) {
                size skip = p * piece, at = i * d + skip;
                NAME(local_step_block)(x + at, u + at, m_i ? m_i + skip : NULL, origin ? origin + skip : NULL, out + at,
                                       f, shrink, mu, eta, smaller(piece, d - skip));
            }
        }
    }
    return 0;
}

CPU_GENERATIONS static void NAME(apply_block)(REAL *x, REAL *v, const REAL *mean, REAL gamma, REAL scale, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        v[j] += scale * mean[j];
        x[j] -= gamma * v[j];
    }
}

static void NAME(apply)(REAL *x, REAL *v, const REAL *mean, double gamma, double scale, size n)
{
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (size k = 0; k < n; k += CHUNK)
        NAME(apply_block)(x + k, v + k, mean + k, gamma, scale, smaller(CHUNK, n - k));
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
