/* A convolution at every stride-th place of images in a frame of zeros: forward, and its two transposes.

       σ(z_{pkr} + add_{pkr}),  z_{pkr} = β_k + Σ_{a,b,c} W_{k,a,b,c} h_{r, s p + (a, b) − padding, c}
                                            at the places p of image r, for the channels k; σ(z) = max(z, 0), or z
       slopes in h:  Σ_{p,k} δ_{pkr} W_k    at the patch of place p; + add, and 0 where h is
       sums:         Σ_{p,r} δ_{pkr} times the patch of place p, for the rows r of each worker

   Images and maps are (height, width, channels). An image is copied once into a frame of zeros, which stays in the
   cache; its patches are never copied. The slopes in h are themselves a convolution, of the maps in a frame of zeros:
   with a stride s, one for each of the s × s kinds of places, which see different numbers of W.

   NumPy definitions: convolve_all, slopes_of_all and sums_of_all in mpiclip/problems/resnet.py.

   Threads share out the images, or the workers and parts of W; each result is computed by one of them, in one order:
   the bytes do not depend on the threads. */

#ifndef REAL
/* Fused multiply-add where the CPU has it. What must be unrolled says so: level 3 takes a minute to find no more. */
#pragma GCC optimize("O2", "fp-contract=fast", "tree-vectorize", "vect-cost-model=dynamic")

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "array.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#undef CPU_GENERATIONS
#define CPU_GENERATIONS __attribute__((noinline, target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif

#define INLINE static inline __attribute__((always_inline))     /* into its caller's CPU_GENERATIONS */

enum { INT64 = sizeof(long) == 8 ? 7 : 9 };                     /* NPY_LONG or NPY_LONGLONG */
enum {
    VECTOR = 64,                    /* bytes */
    PLACES = 64,                    /* of a map that go through all parts of W together: they stay in the cache */
    DECLINED = 1,
};

typedef struct {
    size m, height, width, channels;            /* images */
    size kernel, stride, padding, outputs;
    size down, across;                          /* places in an image */
    size w;                                     /* workers, or 1 */
    const int64_t *starts;                      /* worker i's rows are starts[i]:starts[i+1] */
} sizes;

/* Numbers (height, width, channels) in a frame of zeros. */
typedef struct {
    size height, width, channels, frame;
} framed;

static inline size line_of(const framed *f) { return (f->width + 2 * f->frame) * f->channels; }
static inline size room_of(const framed *f) { return (f->height + 2 * f->frame) * line_of(f); }

static inline size round_up(size n, size to) { return (n + to - 1) / to * to; }

/* Zeros at the start of a cache line; NULL if there is no memory. To be freed. */
static void *zeros(size bytes)
{
    size whole = round_up(bytes + 1, VECTOR);
    void *p = aligned_alloc(VECTOR, whole);
    return p ? memset(p, 0, whole) : p;
}

static inline size worker_of(const sizes *s, size r)
{
    size i = 0;
    while (s->starts[i + 1] <= r)
        i++;
    return i;
}

#define REAL float
#define SUFFIX f32
#include "convolution.c"
#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "convolution.c"

/* Whether a is None, or like the maps or images b. */
static int is_like(const array *a, const array *b)
{
    return (const void *)a == none || fits(a, READABLE, b->dtype->number, b, 4);
}

static const void *data_of(const array *a) { return (const void *)a == none ? NULL : a->data; }

/* What the three kernels have in common: images (m, height, width, channels), maps (m, down, across, outputs), starts
   (w + 1,). 0 if something does not fit. */
static int sizes_of(sizes *s, const array *images, const array *maps, const array *starts, size kernel, size stride,
                    size padding)
{
    if (!is_float(images, READABLE) || images->ndim != 4 || !is_float(maps, READABLE) || maps->ndim != 4
        || maps->dtype->number != images->dtype->number || !is_dense(starts, READABLE)
        || starts->dtype->number != INT64 || starts->ndim != 1 || starts->shape[0] < 2
        || kernel < 1 || stride < 1 || padding < 0 || padding >= kernel)
        return 0;
    *s = (sizes){.m = images->shape[0], .height = images->shape[1], .width = images->shape[2],
                 .channels = images->shape[3], .kernel = kernel, .stride = stride, .padding = padding,
                 .outputs = maps->shape[3], .down = maps->shape[1], .across = maps->shape[2],
                 .w = starts->shape[0] - 1, .starts = starts->data};
    size high = s->height + 2 * padding - kernel, wide = s->width + 2 * padding - kernel;
    if (maps->shape[0] != s->m || s->starts[0] != 0 || s->starts[s->w] != s->m || high < 0 || wide < 0
        || s->down != high / stride + 1 || s->across != wide / stride + 1)
        return 0;
    for (size i = 0; i < s->w; i++)
        if (s->starts[i] > s->starts[i + 1])
            return 0;
    return 1;
}

static int is_weights(const array *W, int flags, const sizes *s, int number)
{
    return is_dense(W, flags) && W->dtype->number == number && W->ndim == 3 && W->shape[0] == s->w
        && W->shape[1] == s->outputs && W->shape[2] == s->channels * s->kernel * s->kernel;
}

static int is_bias(const array *bias, int flags, const sizes *s, int number)
{
    return is_dense(bias, flags) && bias->dtype->number == number && bias->ndim == 2 && bias->shape[0] == s->w
        && bias->shape[1] == s->outputs;
}

/* images (m, height, width, channels), W (w, outputs, channels · kernel · kernel), bias (w, outputs), add like out, or
   None → out; positive: σ(z) = max(z, 0) */
int convolve_all(const array *images, const array *W, const array *bias, const array *starts, size kernel, size stride,
                 size padding, const array *add, int positive, const array *out)
{
    sizes s;
    if (!sizes_of(&s, images, out, starts, kernel, stride, padding) || !is_float(out, WRITABLE)
        || !is_weights(W, READABLE, &s, images->dtype->number) || !is_bias(bias, READABLE, &s, images->dtype->number)
        || !is_like(add, out))
        return DECLINED;
    return BY_DTYPE(images, convolve_all, &s, images->data, W->data, bias->data, data_of(add), positive, out->data);
}

/* out (m, height, width, channels): the slopes in the images, of slopes in what convolve_all made of them; with add,
   and 0 where h ≤ 0 (both like out, or None) */
int slopes_of_all(const array *slopes, const array *W, const array *starts, size kernel, size stride, size padding,
                  const array *add, const array *h, const array *out)
{
    sizes s;
    if (!is_float(out, WRITABLE) || !sizes_of(&s, out, slopes, starts, kernel, stride, padding)
        || !is_weights(W, READABLE, &s, out->dtype->number) || !is_like(add, out) || !is_like(h, out))
        return DECLINED;
    return BY_DTYPE(out, slopes_of_all, &s, W->data, slopes->data, data_of(add), data_of(h), out->data);
}

/* out (w, outputs, channels · kernel · kernel), bias (w, outputs): the slopes in W and β, of slopes in what
   convolve_all made with them */
int sums_of_all(const array *images, const array *slopes, const array *starts, size kernel, size stride, size padding,
                const array *out, const array *bias)
{
    sizes s;
    if (!sizes_of(&s, images, slopes, starts, kernel, stride, padding)
        || !is_weights(out, WRITABLE, &s, images->dtype->number) || !is_bias(bias, WRITABLE, &s, images->dtype->number))
        return DECLINED;
    return BY_DTYPE(images, sums_of_all, &s, images->data, slopes->data, out->data, bias->data);
}

#else

#define LANES_HERE ((size)(VECTOR / sizeof(REAL)))
#define VEC NAME(vec)

typedef REAL VEC __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)), may_alias));

/* from → to, whose frame is left as it is */
INLINE void NAME(frame)(const framed *f, const REAL *from, REAL *to)
{
    size numbers = f->width * f->channels;
    to += f->frame * (line_of(f) + f->channels);
    for (size i = 0; i < f->height; i++)
        memcpy(to + i * line_of(f), from + i * numbers, numbers * sizeof(REAL));
}

/* z (places, padded): `vectors` of numbers at `places` places, `step` apart. Each sees `lines` pieces of `run` numbers,
   `line` apart. W: (lines · run, padded). */
INLINE void NAME(dots)(const REAL *h, size line, size lines, size run, size step, const REAL *W, size padded,
                       const REAL *bias, REAL *z, const int places, const int vectors)
{
    VEC sum[places][vectors];
    _Pragma("GCC unroll 16")
    for (int r = 0; r < places; r++)
        _Pragma("GCC unroll 16")
        for (int v = 0; v < vectors; v++)
            sum[r][v] = *(const VEC *)(bias + v * LANES_HERE);
    for (size a = 0; a < lines; a++, h += line)
        for (size b = 0; b < run; b++, W += padded)
            _Pragma("GCC unroll 16")
            for (int r = 0; r < places; r++) {
                REAL number = h[b + r * step];
                _Pragma("GCC unroll 16")
                for (int v = 0; v < vectors; v++)
                    sum[r][v] += number * *(const VEC *)(W + v * LANES_HERE);
            }
    _Pragma("GCC unroll 16")
    for (int r = 0; r < places; r++)
        _Pragma("GCC unroll 16")
        for (int v = 0; v < vectors; v++)
            *(VEC *)(z + r * padded + v * LANES_HERE) = sum[r][v];
}

/* n places; the last few are computed twice rather than one by one. */
INLINE void NAME(row)(const REAL *h, size line, size lines, size run, size step, const REAL *W, size padded,
                      const REAL *bias, REAL *z, size n, const int places, const int vectors)
{
    for (size j = 0; j < n; j += places) {
        size at = smaller(j, n - places);
        NAME(dots)(h + at * step, line, lines, run, step, W, padded, bias, z + at * padded, places, vectors);
    }
}

/* All vectors of n places. */
CPU_GENERATIONS static void NAME(rows)(const REAL *h, size line, size lines, size run, size step, const REAL *W, size padded,
                       const REAL *bias, REAL *z, size n)
{
    for (size v = 0; v < padded; v += 2 * LANES_HERE) {
        int both = v + LANES_HERE < padded;
        if (n % 14 == 0)
            both ? NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 7, 2)
                 : NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 14, 1);
        else if (n >= 8)
            both ? NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 8, 2)
                 : NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 8, 1);
        else if (n >= 7)
            both ? NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 7, 2)
                 : NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 7, 1);
        else if (n >= 4)
            both ? NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 4, 2)
                 : NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 4, 1);
        else
            both ? NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 1, 2)
                 : NAME(row)(h, line, lines, run, step, W + v, padded, bias + v, z + v, n, 1, 1);
    }
}

/* z + add → to at `places` places of n numbers: `padded` apart in z, `step` apart in to, add and h. positive: max(·,
   0); with h: 0 where it is not > 0. add and h may be NULL; z is overwritten. */
INLINE void NAME(finish)(REAL *restrict z, size places, size n, size padded, const REAL *restrict add,
                         const REAL *restrict h, int positive, REAL *restrict to, size step)
{
    if (padded == n && step == n)
        n *= places, places = 1;
    for (size j = 0; j < places; j++, z += padded, to += step) {
        if (add) {
            for (size e = 0; e < n; e++)
                z[e] += add[e];
            add += step;
        }
        if (positive) {
            for (size e = 0; e < n; e++)
                to[e] = z[e] < 0 ? 0 : z[e];
        } else if (h) {
            for (size e = 0; e < n; e++)
                to[e] = h[e] > 0 ? z[e] : 0;
            h += step;
        } else {
            memcpy(to, z, n * sizeof(REAL));
        }
    }
}

/* One image in its frame. z: room for the numbers of a line. */
CPU_GENERATIONS static void NAME(convolve_image)(const sizes *s, const REAL *image, size line, const REAL *W,
                                                 size padded, const REAL *bias, const REAL *add, int positive, REAL *z,
                                                 REAL *out)
{
    size numbers = s->across * s->outputs;
    for (size i = 0; i < s->down; i++) {
        NAME(rows)(image + i * s->stride * line, line, s->kernel, s->kernel * s->channels, s->stride * s->channels, W,
                   padded, bias, z, s->across);
        NAME(finish)(z, s->across, s->outputs, padded, add ? add + i * numbers : NULL, NULL, positive,
                     out + i * numbers, s->outputs);
    }
}

static int NAME(convolve_all)(const sizes *s, const REAL *images, const REAL *W, const REAL *bias, const REAL *add,
                              int positive, REAL *out)
{
    size taps = s->kernel * s->kernel, patch = taps * s->channels, padded = round_up(s->outputs, LANES_HERE);
    framed f = {s->height, s->width, s->channels, s->padding};
    REAL *packed = zeros(s->w * (patch + 1) * padded * sizeof(REAL));
    /* (w, 1 + patch, padded): β, and what a patch has, line, column, channel */
    if (!packed)
        return DECLINED;
    for (size i = 0; i < s->w; i++) {
        REAL *own = packed + i * (patch + 1) * padded;
        memcpy(own, bias + i * s->outputs, s->outputs * sizeof(REAL));
        for (size c = 0; c < s->channels; c++)
            for (size t = 0; t < taps; t++)
                for (size k = 0; k < s->outputs; k++)
                    own[(1 + t * s->channels + c) * padded + k] = W[(i * s->outputs + k) * patch + c * taps + t];
    }
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (s->m > 1)
    {
        REAL *image = zeros(room_of(&f) * sizeof(REAL)), *z = zeros(s->across * padded * sizeof(REAL));
        failed = !image || !z;
#pragma omp for schedule(static)
        for (size r = 0; r < s->m; r++) {
            const REAL *own = packed + worker_of(s, r) * (patch + 1) * padded;
            if (failed)
                continue;
            size at = r * s->down * s->across * s->outputs;
            NAME(frame)(&f, images + r * s->height * s->width * s->channels, image);
            NAME(convolve_image)(s, image, line_of(&f), own + padded, padded, own, add ? add + at : NULL, positive, z,
                                 out + at);
        }
        free(image), free(z);
    }
    free(packed);
    return failed ? DECLINED : 0;
}

/* How many a = u, u + stride, … are less than the kernel. */
INLINE size NAME(seen)(const sizes *s, size u)
{
    return u < s->kernel ? (s->kernel - 1 - u) / s->stride + 1 : 0;
}

/* W (outputs, channels, kernel, kernel) as `rows` wants it, for the places of each kind (u, v) in turn: those whose
   line and column in the frame are u and v modulo the stride see the lines a = …, u + stride, u of W, and so on. */
static void NAME(pack)(const sizes *s, const REAL *W, size padded, REAL *to)
{
    for (size u = 0; u < s->stride; u++)
        for (size v = 0; v < s->stride; v++)
            for (size a = u + (NAME(seen)(s, u) - 1) * s->stride; a >= u; a -= s->stride)
                for (size b = v + (NAME(seen)(s, v) - 1) * s->stride; b >= v; b -= s->stride)
                    for (size k = 0; k < s->outputs; k++, to += padded)
                        for (size c = 0; c < s->channels; c++)
                            to[c] = W[((k * s->channels + c) * s->kernel + a) * s->kernel + b];
}

/* maps: slopes, in the frame f. z: zeros, as many as padded; and behind it room for the numbers of a line. */
CPU_GENERATIONS static void NAME(slopes_of_image)(const sizes *s, const REAL *maps, const framed *f, const REAL *W,
                                                  size padded, const REAL *add, const REAL *h, REAL *z, REAL *out)
{
    size line = line_of(f), stride = s->stride, p = s->padding;
    for (size u = 0; u < stride; u++)
        for (size v = 0; v < stride; v++) {
            size high = NAME(seen)(s, u), wide = NAME(seen)(s, v);
            size top = u < p ? (p - u + stride - 1) / stride : 0, left = v < p ? (p - v + stride - 1) / stride : 0;
            size n = (p + s->width - 1 - v) / stride - left + 1, x = v + left * stride - p;
            if (v + left * stride >= p + s->width)
                n = 0;
            for (size t = top; u + t * stride < p + s->height; t++) {
                size at = ((u + t * stride - p) * s->width + x) * s->channels;
                const REAL *from = maps + (t - high + 1 + f->frame) * line + (left - wide + 1 + f->frame) * s->outputs;
                NAME(rows)(from, line, high, wide * s->outputs, s->outputs, W, padded, z, z + padded, n);
                NAME(finish)(z + padded, n, s->channels, padded, add ? add + at : NULL, h ? h + at : NULL, 0, out + at,
                             stride * s->channels);
            }
            W += high * wide * s->outputs * padded;
        }
}

static int NAME(slopes_of_all)(const sizes *s, const REAL *W, const REAL *slopes, const REAL *add, const REAL *h,
                               REAL *out)
{
    size patch = s->kernel * s->kernel, padded = round_up(s->channels, LANES_HERE);
    size numbers = patch * s->outputs * padded;
    framed f = {s->down, s->across, s->outputs, s->kernel - 1};
    REAL *packed = zeros(s->w * numbers * sizeof(REAL));
    if (!packed)
        return DECLINED;
    for (size i = 0; i < s->w; i++)
        NAME(pack)(s, W + i * s->outputs * patch * s->channels, padded, packed + i * numbers);
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (s->m > 1)
    {
        REAL *maps = zeros(room_of(&f) * sizeof(REAL)), *z = zeros((s->width + 1) * padded * sizeof(REAL));
        failed = !maps || !z;
#pragma omp for schedule(static)
        for (size r = 0; r < s->m; r++) {
            if (failed)
                continue;
            NAME(frame)(&f, slopes + r * s->down * s->across * s->outputs, maps);
            size at = r * s->height * s->width * s->channels;
            NAME(slopes_of_image)(s, maps, &f, packed + worker_of(s, r) * numbers, padded, add ? add + at : NULL,
                                  h ? h + at : NULL, z, out + at);
        }
        free(maps), free(z);
    }
    free(packed);
    return failed ? DECLINED : 0;
}

/* sums (rows, padded) += Σ h slopes over the places of some lines: `rows` neighbouring numbers of h, `vectors` of
   channels */
INLINE void NAME(outer)(REAL *sums, size padded, const REAL *h, size line, size step, const REAL *slopes, size lines,
                        size across, const int rows, const int vectors)
{
    VEC sum[rows][vectors], slope[vectors];
    _Pragma("GCC unroll 16")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 16")
        for (int v = 0; v < vectors; v++)
            sum[r][v] = *(const VEC *)(sums + r * padded + v * LANES_HERE);
    for (size i = 0; i < lines; i++, h += line)
        for (size j = 0; j < across; j++, slopes += padded) {
            _Pragma("GCC unroll 16")
            for (int v = 0; v < vectors; v++)
                slope[v] = *(const VEC *)(slopes + v * LANES_HERE);
            _Pragma("GCC unroll 16")
            for (int r = 0; r < rows; r++) {
                REAL number = h[j * step + r];
                _Pragma("GCC unroll 16")
                for (int v = 0; v < vectors; v++)
                    sum[r][v] += number * slope[v];
            }
        }
    _Pragma("GCC unroll 16")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 16")
        for (int v = 0; v < vectors; v++)
            *(VEC *)(sums + r * padded + v * LANES_HERE) = sum[r][v];
}

/* The same for n numbers of h, at most 16 */
INLINE void NAME(outers)(REAL *sums, size padded, const REAL *h, size line, size step, const REAL *slopes, size lines,
                         size across, size n, const int most, const int vectors)
{
    if (n == most) {
        NAME(outer)(sums, padded, h, line, step, slopes, lines, across, most, vectors);
        return;
    }
    for (; n >= 4; n -= 4, h += 4, sums += 4 * padded)
        NAME(outer)(sums, padded, h, line, step, slopes, lines, across, 4, vectors);
    for (; n; n--, h++, sums += padded)
        NAME(outer)(sums, padded, h, line, step, slopes, lines, across, 1, vectors);
}

/* W is cut into parts, of so many vectors of channels and numbers of a line of the kernel: they stay in registers. */
typedef struct {
    size v, vectors, most, blocks;      /* first number of the channels; blocks in a line of the kernel */
} NAME(part);

INLINE NAME(part) NAME(part_of)(const sizes *s, size v, size padded)
{
    size vectors = v + LANES_HERE < padded ? 2 : 1, most = vectors == 2 ? 12 : 16;
    return (NAME(part)){v, vectors, most, (s->kernel * s->channels + most - 1) / most};
}

/* One image in its frame: adds to the parts first … last − 1 of sums (kernel, kernel · channels, padded). */
CPU_GENERATIONS static void NAME(sums_of_image)(const sizes *s, const REAL *image, size line, const REAL *slopes,
                                                size padded, size first, size last, REAL *sums)
{
    size run = s->kernel * s->channels, step = s->stride * s->channels, lines = (PLACES + s->across - 1) / s->across;
    for (size i = 0; i < s->down; i += lines) {
        size n = smaller(lines, s->down - i), number = 0;
        const REAL *from = slopes + i * s->across * padded;
        for (size v = 0; v < padded;) {
            NAME(part) p = NAME(part_of)(s, v, padded);
            for (size a = 0; a < s->kernel; a++)
                for (size b = 0; b < p.blocks; b++, number++) {
                    if (number < first || number >= last)
                        continue;
                    size at = b * p.most, many = smaller(p.most, run - at);
                    const REAL *h = image + (i * s->stride + a) * line + at;
                    REAL *to = sums + (a * run + at) * padded + v;
                    if (p.vectors == 2)
                        NAME(outers)(to, padded, h, s->stride * line, step, from + v, n, s->across, many, 12, 2);
                    else
                        NAME(outers)(to, padded, h, s->stride * line, step, from + v, n, s->across, many, 16, 1);
                }
            v += p.vectors * LANES_HERE;
        }
    }
}

CPU_GENERATIONS static void NAME(add_slopes)(const REAL *slopes, size places, size padded, REAL *sums)
{
    for (size v = 0; v < padded; v += LANES_HERE) {
        VEC sum = *(const VEC *)(sums + v);
        for (size p = 0; p < places; p++)
            sum += *(const VEC *)(slopes + p * padded + v);
        *(VEC *)(sums + v) = sum;
    }
}

/* The parts first … last − 1 of worker i's sums; with the first of all parts, those of the biases. */
static int NAME(sums_of_worker)(const sizes *s, const REAL *images, const REAL *slopes, size i, size first, size last,
                                REAL *out, REAL *bias)
{
    size run = s->kernel * s->channels, patch = s->kernel * run, padded = round_up(s->outputs, LANES_HERE);
    size places = s->down * s->across, taps = s->kernel * s->kernel;
    framed f = {s->height, s->width, s->channels, s->padding};
    REAL *image = zeros(room_of(&f) * sizeof(REAL)), *sums = zeros((patch + 1) * padded * sizeof(REAL));
    REAL *maps = padded == s->outputs ? NULL : zeros(places * padded * sizeof(REAL));
    int failed = !image || !sums || (!maps && padded != s->outputs);
    for (size r = s->starts[i]; r < s->starts[i + 1] && !failed; r++) {
        const REAL *own = slopes + r * places * s->outputs;
        for (size p = 0; maps && p < places; p++)
            memcpy(maps + p * padded, own + p * s->outputs, s->outputs * sizeof(REAL));
        NAME(frame)(&f, images + r * s->height * s->width * s->channels, image);
        NAME(sums_of_image)(s, image, line_of(&f), maps ? maps : own, padded, first, last, sums + padded);
        if (!first)
            NAME(add_slopes)(maps ? maps : own, places, padded, sums);
    }
    if (!failed && !first)
        memcpy(bias + i * s->outputs, sums, s->outputs * sizeof(REAL));
    size number = 0;
    for (size v = 0; v < padded && !failed;) {
        NAME(part) p = NAME(part_of)(s, v, padded);
        for (size a = 0; a < s->kernel; a++)
            for (size b = 0; b < p.blocks; b++, number++) {
                if (number < first || number >= last)
                    continue;
                for (size at = b * p.most; at < smaller((b + 1) * p.most, run); at++) {
                    const REAL *sum = sums + (1 + a * run + at) * padded;
                    size place = a * s->kernel + at / s->channels;
                    REAL *to = out + i * s->outputs * patch + at % s->channels * taps + place;
                    for (size k = v; k < smaller(v + p.vectors * LANES_HERE, s->outputs); k++)
                        to[k * patch] = sum[k];
                }
            }
        v += p.vectors * LANES_HERE;
    }
    free(image), free(sums), free(maps);
    return failed;
}

static int NAME(sums_of_all)(const sizes *s, const REAL *images, const REAL *slopes, REAL *out, REAL *bias)
{
    size parts = 0, padded = round_up(s->outputs, LANES_HERE);
    for (size v = 0; v < padded;) {
        NAME(part) p = NAME(part_of)(s, v, padded);
        parts += s->kernel * p.blocks, v += p.vectors * LANES_HERE;
    }
    size shares = s->w < most_threads() ? smaller(most_threads(), parts) : 1;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (s->w * shares > 1)
    for (size task = 0; task < s->w * shares; task++) {
        size share = task % shares;
        failed |= NAME(sums_of_worker)(s, images, slopes, task / shares, parts * share / shares,
                                       parts * (share + 1) / shares, out, bias);
    }
    return failed ? DECLINED : 0;
}

#undef LANES_HERE
#undef VEC
#endif
