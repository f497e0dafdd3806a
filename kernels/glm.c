/* Linear and logistic regression: loss and gradient of all of a rank's workers, in one pass over their rows.

       z_r = a_rᵀ x_i                                                     for the rows r of worker i
       f_i = Σ_r ℓ(z_r, b_r) / denominator_i      + λ r(x_i)
       g_i = Σ_r ℓ'(z_r, b_r) a_r / denominator_i + λ r'(x_i)

       linear      ℓ = ½ (z − b)²             ℓ' = z − b
       logistic    ℓ = log(1 + exp(−b z))     ℓ' = −b / (1 + exp(b z))       b = ±1
       l2          r = ½ ‖x‖²                 r' = x
       nonconvex   r = Σ x_j² / (1 + x_j²)    r'_j = 2 x_j / (1 + x_j²)²

   Where rows are clipped, ℓ'(z_r, b_r) counts min(1, C / (|ℓ'(z_r, b_r)| ‖a_r‖)) times: the norm of row r's gradient is
   at most C.

   NumPy definition: mpiclip.problems._linear_model.linear_model.

   Sparse rows are read twice: for z, and for the sum. Over all rows both go column by column, where a copy of the rows
   sorted so is at hand: no addition waits for the store of the one before it, as it does when two rows have the same
   column, and columns are long where rows are short. A batch goes row by row.

   A worker's rows are cut into parts by a rule that looks at this worker alone. Threads share out the parts, each part
   has its own sum, and the sums are added in the order of the rows: the bytes do not depend on the threads. */

#ifndef REAL
/* Fused multiply-add where the CPU has it; -std=c11 alone rounds every product. */
#pragma GCC optimize("fp-contract=fast")

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))     /* into its caller's CPU_GENERATIONS */

#if __GNUC__ >= 12 && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
/* With fused multiply-add, but without 512-bit vectors, for which many CPUs slow their clock down: most of the time goes
   into loops over sparse rows, which are not vectorised. */
#undef CPU_GENERATIONS
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "arch=x86-64-v3")))
#endif

enum { LINEAR, LOGISTIC };              /* as in kernels/cpu.py */
enum { NONE, L2, NONCONVEX };
enum {
    BLOCK = 256,                        /* most rows from whose margins ℓ' is computed in one vectorised loop */
    CACHED = 1 << 18,                   /* bytes of dense rows that a block may have: they are read twice */
    MOST_PARTS = 64,                    /* of a worker */
    PART = 4096,                        /* rows of a part that goes by columns, as in problems/_linear_model.py */
    DECLINED = 1,
};
enum { INT32 = 5, INT64 = sizeof(long) == 8 ? 7 : 9 };      /* NPY_INT; NPY_LONG or NPY_LONGLONG */

typedef struct {
    const void *values;                 /* dense (m, d), or those of CSR; NULL: CSR, and all are one */
    const int32_t *indices;             /* CSR */
    const int64_t *indptr;              /* CSR; NULL: dense */
    const uint16_t *column_rows;        /* the same by columns (Rows.by_column); NULL: there is no such copy */
    const void *column_values;          /* NULL: all are one */
    const int64_t *column_starts;
    const uint8_t *column_absent;       /* whether the column's list is of the rows that do not have it */
    const void *labels;                 /* (m,) */
    const void *lengths;                /* ‖a_r‖ (m,); NULL: no row is clipped */
    const int64_t *rows;                /* a batch's rows, worker after worker; NULL: all rows */
    size d;
    int link;
} samples;

/* How many parts `count` rows of about `length` numbers make: a part's sum of d numbers is cheap beside its rows. */
static size parts_of(const samples *a, size count, size length)
{
    if (a->column_rows)
        return count > PART ? (count + PART - 1) / PART : 1;
    size d = a->d, rows = 16 * d / length > BLOCK ? 16 * d / length : BLOCK, parts = (count + rows - 1) / rows;
    return parts < 1 ? 1 : smaller(parts, MOST_PARTS);
}

static const double LOG2_E = 1.44269504088896340736;
static const double INVERSE_FACTORIAL[] = {
    1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800,
    1. / 479001600, 1. / 6227020800,
};

#define REAL double
#define SUFFIX f64
#define BITS int64_t
#define MANTISSA 52
#define BIAS 1023
#define LOWEST -708.0                   /* exp counts as 0 below: its numbers are no longer normal there */
#define LN2_HIGH 0x1.62e42feep-1        /* ln 2 in two parts; k LN2_HIGH is exact */
#define LN2_LOW 0x1.a39ef35793c76p-33
#define EXP_TERMS 13                    /* terms of the series: they reach the last bit */
#define ARTANH_TERMS 16
#include "glm.c"
#undef REAL
#undef SUFFIX
#undef BITS
#undef MANTISSA
#undef BIAS
#undef LOWEST
#undef LN2_HIGH
#undef LN2_LOW
#undef EXP_TERMS
#undef ARTANH_TERMS
#define REAL float
#define SUFFIX f32
#define BITS int32_t
#define MANTISSA 23
#define BIAS 127
#define LOWEST -87.0f
#define LN2_HIGH 0x1.62e3p-1f
#define LN2_LOW 0x1.2fefa4p-17f
#define EXP_TERMS 7
#define ARTANH_TERMS 7
#include "glm.c"

/* Whether `offsets` are w + 1 places that ascend from 0 and end at `last` or before. */
static int ascend(const array *offsets, size w, size last)
{
    const int64_t *at = offsets->data;
    if (!is_dense(offsets, READABLE) || offsets->dtype->number != INT64 || offsets->ndim != 1
        || offsets->shape[0] != w + 1 || at[0] != 0 || at[w] > last)
        return 0;
    for (size i = 0; i < w; i++)
        if (at[i] > at[i + 1])
            return 0;
    return 1;
}

/* A batch: rows of the data. */
static int are_rows(const array *rows, size m)
{
    if (!is_dense(rows, READABLE) || rows->dtype->number != INT64 || rows->ndim != 1)
        return 0;
    for (size k = 0; k < rows->shape[0]; k++)
        if (((const int64_t *)rows->data)[k] < 0 || ((const int64_t *)rows->data)[k] >= m)
            return 0;
    return 1;
}

/* values: dense (m, d), or those of CSR, or None for a CSR of ones; indices, indptr: None if dense. A CSR is what
   mpiclip.data has checked, and the four named column_… are Rows.by_column of it. lengths: Rows.lengths, or None: no
   row is clipped. rows: None, or a batch's. loss: an array to fill, or None. */
int linear_model(const array *values, const array *indices, const array *indptr, const array *column_rows,
                 const array *column_values, const array *column_starts, const array *column_absent,
                 const array *labels, const array *lengths, const array *rows, const array *offsets,
                 const array *denominators, const array *owned, const array *x, const array *grad, const array *loss,
                 int link, int regularizer, double lam, double clip, size features)
{
    if (!is_float(x, READABLE) || x->ndim < 1 || x->ndim > 2 || !is_float(grad, WRITABLE) || grad->ndim != 2
        || !is_float(labels, READABLE) || labels->ndim != 1)
        return DECLINED;
    const int number = x->dtype->number;
    const size d = x->shape[x->ndim - 1], m = labels->shape[0], w = grad->shape[0];
    const size shape[] = { w, d, m, d };
    const array like_grad = { .shape = shape }, like_values = { .shape = shape + 2 };
    const size last = rows == none ? m : rows->ndim == 1 ? rows->shape[0] : 0;
    const int sparse = indptr != none;
    if (labels->dtype->number != number || !fits(grad, WRITABLE, number, &like_grad, 2)
        || (lengths != none && !fits(lengths, READABLE, number, labels, 1))
        || (x->ndim == 2 && x->shape[0] != w)
        || (!sparse && !fits(values, READABLE, number, &like_values, 2))
        || (sparse && (!is_dense(indices, READABLE) || indices->dtype->number != INT32 || !is_dense(indptr, READABLE)
                       || indptr->dtype->number != INT64 || indptr->ndim != 1 || indptr->shape[0] != m + 1
                       || (values != none && !fits(values, READABLE, number, indices, 1))))
        || (rows != none && !are_rows(rows, m)) || !ascend(offsets, w, last) || !ascend(owned, w, m)
        || !fits(denominators, READABLE, FLOAT64, &like_grad, 1)
        || (loss != none && !fits(loss, WRITABLE, FLOAT64, &like_grad, 1)))
        return DECLINED;

    const samples a = {
        values == none ? NULL : values->data, sparse ? indices->data : NULL, sparse ? indptr->data : NULL,
        column_rows == none ? NULL : column_rows->data, column_values == none ? NULL : column_values->data,
        column_rows == none ? NULL : column_starts->data, column_rows == none ? NULL : column_absent->data,
        labels->data, lengths == none ? NULL : lengths->data, rows == none ? NULL : rows->data, d, link,
    };
    const size length = sparse && m ? a.indptr[m] / m + 1 : d;
#define RUN(suffix) \
    run_##suffix((call_##suffix){ \
        .a = &a, .offsets = offsets->data, .owned = owned->data, .denominators = denominators->data, .x = x->data, \
        .w = w, .x_step = x->ndim == 2 ? d : 0, .features = features, .regularizer = regularizer, .lam = lam, \
        .clip = clip, .grad = grad->data, .loss = loss == none ? NULL : loss->data }, length)
    return number == FLOAT32 ? RUN(f32) : RUN(f64);
}

#else

/* exp(z) for z ≤ 0: 2^k exp(r) with r = z − k ln 2, |r| ≤ ½ ln 2. NaN stays NaN. */
INLINE REAL NAME(exp_negative)(REAL z)
{
    const REAL magic = (REAL)((BITS)3 << (MANTISSA - 1));           /* added, it leaves k in the lowest bits */
    union { REAL real; BITS bits; } k = { z * (REAL)LOG2_E + magic }, power;
    power.bits = (k.bits + BIAS) * ((BITS)1 << MANTISSA);
    k.real -= magic;
    REAL r = z - k.real * LN2_HIGH - k.real * LN2_LOW, sum = 0;
#pragma GCC unroll 16
    for (int n = EXP_TERMS; n >= 0; n--)
        sum = sum * r + (REAL)INVERSE_FACTORIAL[n];
    return z < LOWEST ? 0 : sum * power.real;
}

/* log(1 + e) for 0 ≤ e ≤ 1: 2 artanh(s), s = e / (2 + e) ≤ 1/3. */
INLINE REAL NAME(log_1p)(REAL e)
{
    REAL s = e / (2 + e), square = s * s, sum = 0;
#pragma GCC unroll 16
    for (int n = ARTANH_TERMS; n > 0; n--)
        sum = (sum + 1 / (REAL)(2 * n + 1)) * square;
    return 2 * (s + s * sum);
}

/* z becomes scale ℓ'(z, b); returns Σ ℓ, or 0 where it is not wanted. */
INLINE double NAME(linear)(REAL *restrict z, const REAL *restrict b, size n, REAL scale, int loss)
{
    double sum = 0;
    for (size j = 0; j < n; j++)
        z[j] -= b[j];
    if (loss) {
#pragma omp simd reduction(+ : sum)
        for (size j = 0; j < n; j++)
            sum += 0.5 * z[j] * z[j];
    }
    for (size j = 0; j < n; j++)
        z[j] *= scale;
    return sum;
}

INLINE double NAME(logistic)(REAL *restrict z, const REAL *restrict b, size n, REAL scale, int loss)
{
    double sum = 0;
    REAL e[BLOCK];
    for (size j = 0; j < n; j++) {
        z[j] *= b[j];
        e[j] = NAME(exp_negative)(z[j] > 0 ? -z[j] : z[j]);
    }
    if (loss) {
#pragma omp simd reduction(+ : sum)
        for (size j = 0; j < n; j++)
            sum += NAME(log_1p)(e[j]) + (z[j] > 0 ? 0 : -z[j]);
    }
    for (size j = 0; j < n; j++)
        z[j] = -b[j] * scale * (z[j] > 0 ? e[j] : 1) / (1 + e[j]);
    return sum;
}

/* z, which is scale ℓ', times min(1, longest / (|z| ‖a_r‖)). What is infinite becomes NaN. */
INLINE void NAME(shrink)(REAL *restrict z, const REAL *restrict lengths, size n, REAL longest)
{
    for (size j = 0; j < n; j++) {
        REAL norm = (z[j] < 0 ? -z[j] : z[j]) * lengths[j];
        z[j] *= longest / (norm > longest ? norm : longest);
    }
}

/* Rows of CSR are read by fours, because an addition waits for the one before it, and not vectorised, because many CPUs
   gather slower than they load. `all`: the rows are neighbours, so that k runs on from one to the next. */
INLINE void NAME(sparse_margins)(const samples *a, const int64_t *row, size n, const REAL *restrict x, REAL *restrict z,
                                 int all, int ones)
{
#define TERM(l) ((ones ? 1 : v[l]) * x[k[l]])
    const int64_t *indptr = a->indptr;
    const int32_t *indices = a->indices, *k = indices + indptr[row[0]];
    for (size j = 0; j < n; j++) {
        REAL s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        const int32_t *end = indices + (all ? indptr[row[0] + j + 1] : indptr[row[j] + 1]);
        if (!all)
            k = indices + indptr[row[j]];
        const REAL *v = ones ? NULL : (const REAL *)a->values + (k - indices);
        for (; end - k >= 4; k += 4, v += ones ? 0 : 4)
            s0 += TERM(0), s1 += TERM(1), s2 += TERM(2), s3 += TERM(3);
        if ((end - k) & 2) {
            s0 += TERM(0), s1 += TERM(1);
            k += 2, v += ones ? 0 : 2;
        }
        if (k < end)
            s2 += TERM(0), k++;
        z[j] = (s0 + s1) + (s2 + s3);
    }
#undef TERM
}

INLINE void NAME(sparse_sum)(const samples *a, const int64_t *row, size n, const REAL *restrict t, REAL *restrict g,
                             int all, int ones)
{
#define ADD(l) g[k[l]] += t_j * (ones ? 1 : v[l])
    const int64_t *indptr = a->indptr;
    const int32_t *indices = a->indices, *k = indices + indptr[row[0]];
    for (size j = 0; j < n; j++) {
        const REAL t_j = t[j];
        const int32_t *end = indices + (all ? indptr[row[0] + j + 1] : indptr[row[j] + 1]);
        if (!all)
            k = indices + indptr[row[j]];
        const REAL *v = ones ? NULL : (const REAL *)a->values + (k - indices);
        for (; end - k >= 4; k += 4, v += ones ? 0 : 4)
            ADD(0), ADD(1), ADD(2), ADD(3);
        if ((end - k) & 2) {
            ADD(0), ADD(1);
            k += 2, v += ones ? 0 : 2;
        }
        if (k < end)
            ADD(0), k++;
    }
#undef ADD
}

/* Dense rows go by fours: x, or g, is read once for four of them. */
INLINE void NAME(dense_margins)(const samples *a, const int64_t *row, size n, const REAL *restrict x, REAL *restrict z)
{
    const REAL *values = a->values;
    const size d = a->d;
    size j = 0;
    for (; j + 4 <= n; j += 4) {
        const REAL *a0 = values + row[j] * d, *a1 = values + row[j + 1] * d, *a2 = values + row[j + 2] * d,
                   *a3 = values + row[j + 3] * d;
        REAL s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (size k = 0; k < d; k++) {
            s0 += a0[k] * x[k];
            s1 += a1[k] * x[k];
            s2 += a2[k] * x[k];
            s3 += a3[k] * x[k];
        }
        z[j] = s0, z[j + 1] = s1, z[j + 2] = s2, z[j + 3] = s3;
    }
    for (; j < n; j++) {
        const REAL *a0 = values + row[j] * d;
        REAL sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size k = 0; k < d; k++)
            sum += a0[k] * x[k];
        z[j] = sum;
    }
}

INLINE void NAME(dense_sum)(const samples *a, const int64_t *row, size n, const REAL *restrict t, REAL *restrict g)
{
    const REAL *values = a->values;
    const size d = a->d;
    size j = 0;
    for (; j + 4 <= n; j += 4) {
        const REAL *a0 = values + row[j] * d, *a1 = values + row[j + 1] * d, *a2 = values + row[j + 2] * d,
                   *a3 = values + row[j + 3] * d;
        REAL t0 = t[j], t1 = t[j + 1], t2 = t[j + 2], t3 = t[j + 3];
#pragma omp simd
        for (size k = 0; k < d; k++)
            g[k] += (t0 * a0[k] + t1 * a1[k]) + (t2 * a2[k] + t3 * a3[k]);
    }
    for (; j < n; j++) {
        const REAL *a0 = values + row[j] * d;
#pragma omp simd
        for (size k = 0; k < d; k++)
            g[k] += t[j] * a0[k];
    }
}

/* Sparse loops are compiled four times over, without a test in them. */
#define BY_KIND(function, ...) \
    (a->rows ? a->values ? function(__VA_ARGS__, 0, 0) : function(__VA_ARGS__, 0, 1) \
             : a->values ? function(__VA_ARGS__, 1, 0) : function(__VA_ARGS__, 1, 1))

/* g = Σ scale ℓ'(a_rᵀ x, b_r) a_r over the places first … last − 1 in the list of rows, none longer than
   `longest` where rows are clipped; returns Σ ℓ, if wanted. */
CPU_GENERATIONS static double NAME(part)(const samples *a, size first, size last, const REAL *x, REAL scale,
                                         REAL longest, REAL *g, int loss)
{
    const REAL *labels = a->labels, *lengths = a->lengths;
    int64_t row[BLOCK];
    REAL z[BLOCK], b[BLOCK];
    double sum = 0;
    size block = BLOCK;
    if (!a->indptr)                     /* a multiple of 4 rows that are still in the cache when they are read again */
        while (block > 4 && block * a->d * (size)sizeof(REAL) > CACHED)
            block /= 2;
    memset(g, 0, a->d * sizeof(REAL));
    for (; first < last; first += block) {
        size n = smaller(block, last - first);
        for (size j = 0; j < n; j++)
            row[j] = a->rows ? a->rows[first + j] : first + j;
        for (size j = 0; a->rows && j < n; j++)
            b[j] = labels[row[j]];

        if (a->indptr)
            BY_KIND(NAME(sparse_margins), a, row, n, x, z);
        else
            NAME(dense_margins)(a, row, n, x, z);
        const REAL *b_j = a->rows ? b : labels + first;
        sum += a->link == LOGISTIC ? NAME(logistic)(z, b_j, n, scale, loss) : NAME(linear)(z, b_j, n, scale, loss);
        if (lengths) {
            for (size j = 0; a->rows && j < n; j++)
                b[j] = lengths[row[j]];
            NAME(shrink)(z, a->rows ? b : lengths + first, n, longest);
        }
        if (a->indptr)
            BY_KIND(NAME(sparse_sum), a, row, n, z, g);
        else
            NAME(dense_sum)(a, row, n, z, g);
    }
    return sum;
}

/* The same for all rows of part q, of which there are n from row `begin` on, by columns. */
CPU_GENERATIONS static double NAME(part_by_columns)(const samples *a, size q, size begin, size n, const REAL *x,
                                                    REAL scale, REAL longest, REAL *g, int loss)
{
    const REAL *labels = (const REAL *)a->labels + begin;
    const int64_t *start = a->column_starts + q * a->d;
    const uint16_t *row = a->column_rows;
    const REAL *values = a->column_values;
    const uint8_t *absent = a->column_absent + q * a->d;
    REAL z[PART], most = 0, total = 0;      /* most: z of a row that has all columns that are lists of absent rows */
    double sum = 0;
    for (size j = 0; j < a->d; j++)
        most += absent[j] ? x[j] : 0;
    for (size r = 0; r < n; r++)
        z[r] = most;
    for (size j = 0; j < a->d; j++) {
        const REAL x_j = absent[j] ? -x[j] : x[j];
        const int64_t end = start[j + 1];
        if (values) {
#pragma GCC unroll 8
            for (int64_t k = start[j]; k < end; k++)
                z[row[k]] += x_j * values[k];
        } else {
#pragma GCC unroll 8
            for (int64_t k = start[j]; k < end; k++)
                z[row[k]] += x_j;
        }
    }
    for (size first = 0; first < n; first += BLOCK) {
        size count = smaller(BLOCK, n - first);
        sum += a->link == LOGISTIC ? NAME(logistic)(z + first, labels + first, count, scale, loss)
                                   : NAME(linear)(z + first, labels + first, count, scale, loss);
    }
    if (a->lengths)
        NAME(shrink)(z, (const REAL *)a->lengths + begin, n, longest);
#pragma omp simd reduction(+ : total)
    for (size r = 0; r < n; r++)
        total += z[r];
#define TERM(l) ((values ? values[k + l] : 1) * z[row[k + l]])
    for (size j = 0; j < a->d; j++) {
        REAL s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        int64_t k = start[j];
        for (; k + 4 <= start[j + 1]; k += 4)
            s0 += TERM(0), s1 += TERM(1), s2 += TERM(2), s3 += TERM(3);
        for (; k < start[j + 1]; k++)
            s0 += TERM(0);
        g[j] = (s0 + s1) + (s2 + s3);
        if (absent[j])
            g[j] = total - g[j];
    }
#undef TERM
    return sum;
}

CPU_GENERATIONS static void NAME(add)(REAL *restrict g, const REAL *restrict sum, size d)
{
    for (size k = 0; k < d; k++)
        g[k] += sum[k];
}

/* g += λ r'(x); returns λ r(x). */
CPU_GENERATIONS static double NAME(regularize)(int regularizer, double lam, const REAL *restrict x, size n,
                                               REAL *restrict g)
{
    const REAL factor = lam;
    double sum = 0;
    if (regularizer == L2) {
#pragma omp simd reduction(+ : sum)
        for (size k = 0; k < n; k++) {
            g[k] += factor * x[k];
            sum += 0.5 * x[k] * x[k];
        }
    } else if (regularizer == NONCONVEX) {
#pragma omp simd reduction(+ : sum)
        for (size k = 0; k < n; k++) {
            REAL q = 1 / (1 + x[k] * x[k]);
            double square = (double)x[k] * x[k];
            g[k] += factor * 2 * x[k] * q * q;
            sum += square / (1 + square);
        }
    }
    return lam * sum;
}

/* One call, and its plan: worker i's parts are first[i] … first[i+1] − 1, and part q is of[q]'s. A worker's first part
   is summed in its row of grad, the others in sums. */
typedef struct {
    const samples *a;
    const int64_t *offsets;             /* worker i has the places offsets[i] … offsets[i+1] − 1 of the rows */
    const int64_t *owned;               /* it has a regularizer if it owns rows of the data: owned[i] < owned[i+1] */
    const double *denominators;
    const REAL *x;                      /* worker i's point is x + i x_step */
    size w, x_step, features;           /* so many coordinates, the first ones, are regularised */
    int regularizer;
    double lam, clip;
    REAL *grad;                         /* (w, d) */
    double *loss;                       /* (w,) or NULL */
    size *first, *of;
    REAL *sums;
    double *losses;
} NAME(call);

static void NAME(add_up)(const NAME(call) *c, size q)
{
    size i = c->of[q], k = q - c->first[i], parts = c->first[i + 1] - c->first[i];
    size begin = c->offsets[i], count = c->offsets[i + 1] - begin, d = c->a->d;
    size first = begin + count * k / parts, last = begin + count * (k + 1) / parts;
    const REAL *x = c->x + i * c->x_step, scale = 1 / c->denominators[i], longest = c->clip / c->denominators[i];
    REAL *g = k ? c->sums + (q - i - 1) * d : c->grad + i * d;
    c->losses[q] = c->a->column_rows
        ? NAME(part_by_columns)(c->a, q, first, last - first, x, scale, longest, g, c->loss != NULL)
        : NAME(part)(c->a, first, last, x, scale, longest, g, c->loss != NULL);
}

static void NAME(finish)(const NAME(call) *c, size i)
{
    size d = c->a->d;
    REAL *g = c->grad + i * d;
    double loss = c->losses[c->first[i]];
    for (size q = c->first[i] + 1; q < c->first[i + 1]; q++) {
        NAME(add)(g, c->sums + (q - i - 1) * d, d);
        loss += c->losses[q];
    }
    if (c->offsets[i] < c->offsets[i + 1])
        loss /= c->denominators[i];
    if (c->owned[i] < c->owned[i + 1])
        loss += NAME(regularize)(c->regularizer, c->lam, c->x + i * c->x_step, c->features, g);
    if (c->loss)
        c->loss[i] = loss;
}

/* length: numbers in a row, about. */
static int NAME(run)(NAME(call) c, size length)
{
    size w = c.w, d = c.a->d, parts = 0;
    c.first = malloc((w + 1) * sizeof *c.first);
    if (!c.first)
        return DECLINED;
    for (size i = 0; i < w; i++) {
        c.first[i] = parts;
        parts += parts_of(c.a, c.offsets[i + 1] - c.offsets[i], length);
    }
    c.first[w] = parts;
    c.of = malloc(parts * sizeof *c.of + 1);
    c.losses = malloc(parts * sizeof *c.losses + 1);
    c.sums = malloc((parts - w) * d * sizeof *c.sums + 1);
    const int failed = !c.of || !c.losses || !c.sums;
    if (!failed) {
        for (size i = 0; i < w; i++)
            for (size q = c.first[i]; q < c.first[i + 1]; q++)
                c.of[q] = i;
        if ((c.offsets[w] - c.offsets[0]) * length + w * d < SMALL) {
            for (size q = 0; q < parts; q++)
                NAME(add_up)(&c, q);
            for (size i = 0; i < w; i++)
                NAME(finish)(&c, i);
        } else {
#pragma omp parallel
            {
#pragma omp for schedule(dynamic)
                for (size q = 0; q < parts; q++)
                    NAME(add_up)(&c, q);
#pragma omp for schedule(static)
                for (size i = 0; i < w; i++)
                    NAME(finish)(&c, i);
            }
        }
    }
    free(c.first), free(c.of), free(c.losses), free(c.sums);
    return failed ? DECLINED : 0;
}
#endif
