/* What a kernel reads of a NumPy array: the fields of PyArrayObject and PyArray_Descr, whose order and meaning are part
   of NumPy's public binary interface (numpy/ndarraytypes.h: PyArray_DATA and its like are compiled into every
   extension). To look here is much cheaper than to ask in Python, and small models call a kernel every few µs.
   kernels/cpu.py sets the two objects below and tries a kernel on a known array when it is loaded. */

#ifndef ARRAY_H
#define ARRAY_H

#include <stddef.h>

typedef struct {
    ptrdiff_t references;
    const void *type, *scalar_type;
    char kind, letter, byteorder, flags;
    int number;
} dtype;

typedef struct {
    ptrdiff_t references;
    const void *type;
    void *data;
    int ndim;
    const ptrdiff_t *shape, *strides;
    const void *base;
    const dtype *dtype;
    int flags;
} array;

extern const void *ndarray, *none;          /* numpy.ndarray and None, set by kernels/cpu.py */

enum { FLOAT32 = 11, FLOAT64 = 12 };                                 /* NPY_FLOAT, NPY_DOUBLE */
enum { ALIGNED = 0x100, READABLE = 0x101, WRITABLE = 0x501 };        /* the latter two C-contiguous, too */

/* name_f32(…) or name_f64(…), as the array is. */
#define BY_DTYPE(a, name, ...) ((a)->dtype->number == FLOAT32 ? name##_f32(__VA_ARGS__) : name##_f64(__VA_ARGS__))

/* Whether a kernel may walk over the array by its pointer alone. */
static inline int is_dense(const array *a, int flags)
{
    return a->type == ndarray && (a->flags & flags) == flags && a->dtype->byteorder == '=';
}

/* The same for an array of floats. */
static inline int is_float(const array *a, int flags)
{
    return is_dense(a, flags) && (a->dtype->number == FLOAT32 || a->dtype->number == FLOAT64);
}

/* Whether it has the dtype `number` and the first `ndim` axes of `like`. */
static inline int fits(const array *a, int flags, int number, const array *like, int ndim)
{
    if (!is_dense(a, flags) || a->dtype->number != number || a->ndim != ndim)
        return 0;
    for (int k = 0; k < ndim; k++)
        if (a->shape[k] != like->shape[k])
            return 0;
    return 1;
}

/* Whether it is (w, d) floats whose rows are dense, but may lie apart: columns of a larger array. */
static inline int is_rows(const array *a)
{
    return a->type == ndarray && a->dtype->byteorder == '=' && a->ndim == 2 && (a->flags & ALIGNED)
        && (a->dtype->number == FLOAT32 || a->dtype->number == FLOAT64) && a->strides[0] >= 0
        && (a->shape[1] <= 1 || a->strides[1] == (a->dtype->number == FLOAT32 ? 4 : 8));
}

static inline ptrdiff_t elements(const array *a)
{
    ptrdiff_t n = 1;
    for (int k = 0; k < a->ndim; k++)
        n *= a->shape[k];
    return n;
}

#endif
