/* What the C kernels share. A file of kernels includes itself twice, with REAL float and REAL double: NAME(clip) is
   clip_f32 and clip_f64. All sizes are numbers of elements. */

#ifndef KERNELS_H
#define KERNELS_H

#include <stddef.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef ptrdiff_t size;

/* Put before a static function that walks over one block of memory: the compiler builds it for several generations of
   CPUs, and the loader takes the one that fits. (GCC does not do this for the body of a parallel region: call such
   functions from there.) */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "avx2", "avx512f")))
#else
#define CPU_GENERATIONS
#endif

/* In elements. */
enum {
    SMALL = 1 << 15,            /* less work than this is not worth a parallel region (a few µs) */
    CHUNK = 1 << 14,            /* a long vector is cut into chunks that do not depend on the number of threads */
    LONG_ROW = 4 * CHUNK,       /* from here on the threads share a row; shorter rows are dealt out whole */
    LANES = 32,                 /* enough independent sums to hide the latency of an addition */
};

#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define NAME(name) JOIN(name, SUFFIX)

static inline size smaller(size a, size b) { return a < b ? a : b; }

/* Ask for the `bytes` that lie 2 KiB beyond p: by itself a CPU does not look past the end of a page, and a pass that
   only reads is then a tenth slower. */
static inline __attribute__((always_inline)) void fetch_ahead(const void *p, size bytes)
{
    for (size k = 0; k < bytes; k += 64)
        __builtin_prefetch((const char *)p + 2048 + k);
}

/* The sum of LANES sums. */
static inline double sum_of(double *lane)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

/* kernels/ops.c: what shortens a row of this norm. */
float factor_f32(double norm, double tau, double alpha);
double factor_f64(double norm, double tau, double alpha);

static inline size thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static inline size most_threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static inline size thread_count(void)
{
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

#endif
