// mpiclip.noise.add_noise on a GPU: u_i += σ z_i, z_i ~ N(0, I), from the words of Philox4x32-10 by Box and Muller.
//
// mpiclip/noise.py says which number comes from which word, and what each step does. Every operation is rounded by itself,
// in the same order (the launchers turn the fusing of products and sums off), and none is the library's: the same bytes
// as there, but for sums that the GPU takes for zero (see cuda.py).
#include "rows.cuh"

using uint64 = unsigned long long;

constexpr bool FLOAT = sizeof(REAL) == 4;
constexpr int ABREAST = 16, EACH = N, TILE = EACH * ABREAST;        // blocks of a tile, numbers of a block and of a tile

template <bool> struct Integer { using type = unsigned; };
template <> struct Integer<false> { using type = uint64; };
using Bits = Integer<FLOAT>::type;
constexpr int DIGITS = FLOAT ? 23 : 52, BIAS = FLOAT ? 127 : 1023;
constexpr Bits ROOT_HALF = FLOAT ? 0x3f3504f3 : Bits(0x3fe6a09e667f3bcd);          // the bits of √½

template <class To, class From>
__device__ inline To cast(From from)
{
    To to;
    static_assert(sizeof to == sizeof from);
    memcpy(&to, &from, sizeof to);
    return to;
}

// noise.philox: the words of a block
__device__ inline void philox(unsigned (&x)[4], unsigned k0, unsigned k1)
{
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64 product0 = uint64(0xD2511F53) * x[0], product1 = uint64(0xCD9E8D57) * x[2];
        x[0] = unsigned(product1 >> 32) ^ x[1] ^ k0;
        x[1] = unsigned(product1);
        x[2] = unsigned(product0 >> 32) ^ x[3] ^ k1;
        x[3] = unsigned(product0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

template <int K>
__device__ inline REAL polynomial(const double (&coefficients)[K], REAL z)
{
    REAL p = coefficients[K - 1];
    #pragma unroll
    for (int k = K - 2; k >= 0; k--) p = REAL(coefficients[k]) + z * p;
    return p;
}

// noise.box_muller: two normal numbers
__device__ inline void box_muller(REAL f, REAL t, bool swap, bool flip, REAL* a, REAL* b)
{
    constexpr double artanh[] = {-4, -1.333333333333346891, -0.7999999999882868197, -0.5714285748494334316,
                                 -0.4444439712744691994, -0.3636712971548059124, -0.3062807199545550071,
                                 -0.2959220866843280578};
    constexpr double artanh_float[] = {-4, -1.3333355283, -0.7995507404, -0.59743722584};
    constexpr double sine[] = {0.785398163397448307, -0.08074551218828053021, 0.002490394570188736251,
                               -3.657620415845622561e-5, 3.13361621662911219e-7, -1.757149293657193549e-9,
                               6.877100654849404748e-12};
    constexpr double sine_float[] = {0.78539816085, -0.080745432529, 0.0024900010244, -3.595045229e-5};
    constexpr double cosine[] = {1, -0.3084251375340424524, 0.01585434424381541089, -0.0003259918869266875356,
                                 3.590860445885782251e-6, -2.461136382632163455e-8, 1.150049702111891894e-10,
                                 -3.857761956444445984e-13};
    constexpr double cosine_float[] = {1, -0.30842513489, 0.015854323912, -0.00032593650041, 3.5287616102e-6};

    // e and m from the bits: the exponent is that of a number in [1, 2) where √½ ≤ m < √2.
    const Bits above = cast<Bits>(f < 0 ? 1 + f : f) - ROOT_HALF + cast<Bits>(REAL(1));
    const REAL e = int(above >> DIGITS) - BIAS;
    const REAL m = cast<REAL>((above & ((Bits(1) << DIGITS) - 1)) + ROOT_HALF);
    const REAL h = e == 0 ? f : m - 1, s = h / (2 + h), z = s * s;
    const REAL log = FLOAT ? polynomial(artanh_float, z) : polynomial(artanh, z);
    const REAL r = sqrt(e * REAL(-1.3862943611198906) + s * log), tt = t * t;
    const REAL y = r * (t * (FLOAT ? polynomial(sine_float, tt) : polynomial(sine, tt)));
    const REAL c = r * (FLOAT ? polynomial(cosine_float, tt) : polynomial(cosine, tt)), x = flip ? -c : c;
    *a = swap ? y : x;
    *b = swap ? x : y;
}

// noise.pair32, noise.pair64: the numbers of a block
__device__ inline void normals(const unsigned (&x)[4], REAL (&z)[EACH])
{
    if constexpr (FLOAT) {
        #pragma unroll
        for (int k = 0; k < EACH; k += 2) {
            const unsigned p = x[k], q = x[k + 1];
            const REAL below = (REAL(int(q & 63)) + REAL(0.5)) * REAL(0x1p-6);
            box_muller((REAL(int(p)) + below) * REAL(0x1p-32), (REAL(int(q) >> 8) + REAL(0.5)) * REAL(0x1p-23), q & 64,
                       q & 128, &z[k], &z[k + 1]);
        }
    } else {
        const REAL below = (REAL(x[1] >> 1) + REAL(0.5)) * REAL(0x1p-31);
        const REAL within = (REAL(x[3] >> 2) + REAL(0.5)) * REAL(0x1p-30);
        box_muller((REAL(int(x[0])) + below) * REAL(0x1p-32), (REAL(int(x[2])) + within) * REAL(0x1p-31), x[3] & 1,
                   x[3] & 2, &z[0], &z[1]);
    }
}

// A thread makes the numbers of a block. Those that threads side by side write in one step lie side by side.
KERNEL add_noise(REAL* u, const uint64* keys, double sigma, int64 d, int64 parts)
{
    const Share s = share(parts);
    const uint64 key = keys[2 * s.row], stream = keys[2 * s.row + 1];
    const int64 blocks = (d + TILE - 1) / TILE * ABREAST;
    u += s.row * d;
    for (int64 block = s.part * THREADS + threadIdx.x; block < blocks; block += parts * THREADS) {
        unsigned x[4] = {unsigned(block), unsigned(block >> 32), unsigned(stream), unsigned(stream >> 32)};
        philox(x, unsigned(key), unsigned(key >> 32));
        REAL z[EACH];
        normals(x, z);
        const int64 first = block / ABREAST * TILE + block % ABREAST;
        #pragma unroll
        for (int k = 0; k < EACH; k++)
            if (first + k * ABREAST < d) u[first + k * ABREAST] += REAL(sigma) * z[k];
    }
}
