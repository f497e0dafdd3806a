/* What this machine's memory can do, for `mpiclip bench kernels` to hold the kernels against: plain loops that read two
   arrays, and that update two arrays in place. No definition in NumPy: they compute nothing that anybody wants. */

#ifndef REAL
#include "array.h"
#include "kernels.h"

#define REAL float
#define SUFFIX f32
#include "limits.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "limits.c"

/* Σ_j a_j b_j */
double limit_read(const array *a, const array *b)
{
    return BY_DTYPE(a, limit_read, a->data, b->data, elements(a));
}

/* a = −a, b = −b */
void limit_update(const array *a, const array *b)
{
    BY_DTYPE(a, limit_update, a->data, b->data, elements(a));
}

#else                               /* once for each REAL */

CPU_GENERATIONS static REAL NAME(read_block)(const REAL *a, const REAL *b, size n)
{
    REAL sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size j = 0; j < n; j++)
        sum += a[j] * b[j];
    return sum;
}

CPU_GENERATIONS static void NAME(update_block)(REAL *a, REAL *b, size n)
{
#pragma omp simd
    for (size j = 0; j < n; j++) {
        a[j] = -a[j];
        b[j] = -b[j];
    }
}

static double NAME(limit_read)(const REAL *a, const REAL *b, size n)
{
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size k = 0; k < n; k += CHUNK)
        sum += NAME(read_block)(a + k, b + k, smaller(CHUNK, n - k));
    return sum;
}

static void NAME(limit_update)(REAL *a, REAL *b, size n)
{
#pragma omp parallel for schedule(static)
    for (size k = 0; k < n; k += CHUNK)
        NAME(update_block)(a + k, b + k, smaller(CHUNK, n - k));
}

#endif
