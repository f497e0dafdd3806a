// The operations of mpiclip.ops on a GPU. Arrays are (w, d), rows one behind the other, or (w,) in double; a null
// pointer is an array that was not handed in. A norm takes two kernels: `squares` leaves one sum a block, the next one
// adds them up.
#include "rows.cuh"

// mpiclip.ops.norms, clip, clip_step, first half: Σ_j u_ij², or Σ_j (u_ij − v_ij)² if v is there; one sum a block, sums
// (w, parts). In double, whatever REAL is: the square of a float is exact there and cannot overflow.
KERNEL squares(const REAL* u, const REAL* v, double* sums, int64 d, int64 parts)
{
    const Share s = share(parts);
    double sum = 0;
    if (v)
        sweep<2, 0>({u, v}, nullptr, d, s, [&](const REAL* x, REAL*) {
            const double difference = x[0] - x[1];
            sum = fma(difference, difference, sum);
        });
    else
        sweep<1, 0>({u}, nullptr, d, s, [&](const REAL* x, REAL*) { sum = fma(double(x[0]), double(x[0]), sum); });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// mpiclip.ops.momentum_step, first half: Σ_j (m_ij − v_ij)² with m_ij = (1 − β) m_ij + β u_ij; without v, Σ_j m_ij².
KERNEL squares_of_momentum(const REAL* u, const REAL* m, const REAL* v, double beta, double* sums, int64 d,
                           int64 parts)
{
    const Share s = share(parts);
    const REAL keep = 1 - beta, take = beta;
    double sum = 0;
    if (v)
        sweep<3, 0>({u, m, v}, nullptr, d, s, [&](const REAL* x, REAL*) {
            const double difference = (keep * x[1] + take * x[0]) - x[2];
            sum = fma(difference, difference, sum);
        });
    else
        sweep<2, 0>({u, m}, nullptr, d, s, [&](const REAL* x, REAL*) {
            const double momentum = keep * x[1] + take * x[0];
            sum = fma(momentum, momentum, sum);
        });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// mpiclip.ops.norms, second half: norms_i = ‖u_i‖. One block a row.
KERNEL norms(const double* sums, double* norms, int64 parts)
{
    const double norm = row_norm(sums, {blockIdx.x, 0, parts});
    if (threadIdx.x == 0) norms[blockIdx.x] = norm;
}

// mpiclip.ops.clip, second half: c_i = u_i min(1, τ_i/‖u_i‖). c may be u: a row within τ is not written then.
KERNEL clip(const REAL* u, const double* sums, const double* taus, double tau, REAL* c, double* norms,
            int64 d, int64 parts)
{
    const Share s = share(parts);
    const REAL factor = row_factor(sums, taus, tau, 0, norms, s);
    if (factor == 1 && c == u) return;
    REAL* const out[] = {c};
    sweep<1, 1>({u}, out, d, s, [&](const REAL* x, REAL* y) { y[0] = x[0] * factor; });
}

// mpiclip.ops.clip_step and normalize_step, second half: c_i = factor (u_i − v_i), v_i += c_i; c may be u. α = 0 clips.
KERNEL clip_step(const REAL* u, REAL* v, const double* sums, const double* taus, double tau, double alpha, REAL* c,
                 double* norms, int64 d, int64 parts)
{
    const Share s = share(parts);
    const REAL factor = row_factor(sums, taus, tau, alpha, norms, s);
    const bool finite = !isnan(factor);                 // else v_i stays
    REAL* const out[] = {c, v};
    sweep<2, 2>({u, v}, out, d, s, [&](const REAL* x, REAL* y) {
        y[0] = (x[0] - x[1]) * factor;
        y[1] = finite ? x[1] + y[0] : x[1];
    });
}

// mpiclip.ops.momentum_step, second half: m_i = (1 − β) m_i + β u_i, c_i = (m_i − v_i) min(1, τ_i/‖m_i − v_i‖),
// v_i += scale c_i; c may be u. Without v, c_i = m_i min(1, τ_i/‖m_i‖).
KERNEL momentum_step(const REAL* u, REAL* m, REAL* v, const double* sums, const double* taus, double tau, double beta,
                     double scale, REAL* c, double* norms, int64 d, int64 parts)
{
    const Share s = share(parts);
    const REAL factor = row_factor(sums, taus, tau, 0, norms, s), keep = 1 - beta, take = beta, part = scale;
    const bool finite = !isnan(factor);                 // else m_i and v_i stay
    if (v) {
        REAL* const out[] = {m, c, v};
        sweep<3, 3>({u, m, v}, out, d, s, [&](const REAL* x, REAL* y) {
            const REAL momentum = keep * x[1] + take * x[0];
            y[0] = finite ? momentum : x[1];
            y[1] = (momentum - x[2]) * factor;
            y[2] = finite ? x[2] + part * y[1] : x[2];
        });
    } else {
        REAL* const out[] = {m, c};
        sweep<2, 2>({u, m}, out, d, s, [&](const REAL* x, REAL* y) {
            const REAL momentum = keep * x[1] + take * x[0];
            y[0] = finite ? momentum : x[1];
            y[1] = momentum * factor;
        });
    }
}

// f_i of local_step: as row_factor; where `normalize` is not 0 τ/ν_i, at most the largest number, and 0 for ν_i = 0.
__device__ REAL step_factor(double norm, double tau, int64 normalize)
{
    if (!isfinite(norm)) return nan("");
    const double largest = sizeof(REAL) == sizeof(float) ? 3.4028234663852886e38 : 1.7976931348623157e308;
    const double exact = normalize ? norm > 0 ? min(tau / norm, largest) : 0 : norm > tau ? tau / norm : 1;
    const REAL factor = exact;
    return factor > exact ? nextafter(factor, REAL(0)) : factor;
}

// mpiclip.ops.local_step: f_i = min(1, τ/norms_i), or τ/norms_i; e_i = f_i u_i + λ min(1, f_i) x_i; m_i = μ m_i + e_i;
// out_i = x_i − η m_i − origin. Without m, m_i is e_i; out may be x or u.
KERNEL local_step(const REAL* x, const REAL* u, const double* norms, double tau, double eta, int64 normalize,
                  double lambda, REAL* m, double mu, const REAL* origin, REAL* out, int64 d, int64 parts)
{
    const Share s = share(parts);
    const REAL f = step_factor(norms[s.row], tau, normalize), shrink = REAL(lambda) * (f > 1 ? REAL(1) : f);
    const REAL keep = mu, length = eta;
    const bool finite = !isnan(f);                      // else m_i stays
    const REAL* const zero = origin ? origin - s.row * d : nullptr;     // one row for all
    const auto direction = [&](const REAL* a) { return shrink != 0 ? f * a[1] + shrink * a[0] : f * a[1]; };
    if (m && origin) {
        REAL* const results[] = {out, m};
        sweep<4, 2>({x, u, m, zero}, results, d, s, [&](const REAL* a, REAL* y) {
            const REAL e = keep * a[2] + direction(a);
            y[0] = (a[0] - length * e) - a[3];
            y[1] = finite ? e : a[2];
        });
    } else if (m) {
        REAL* const results[] = {out, m};
        sweep<3, 2>({x, u, m}, results, d, s, [&](const REAL* a, REAL* y) {
            const REAL e = keep * a[2] + direction(a);
            y[0] = a[0] - length * e;
            y[1] = finite ? e : a[2];
        });
    } else if (origin) {
        REAL* const results[] = {out};
        sweep<3, 1>({x, u, zero}, results, d, s, [&](const REAL* a, REAL* y) {
            y[0] = (a[0] - length * direction(a)) - a[2];
        });
    } else {
        REAL* const results[] = {out};
        sweep<2, 1>({x, u}, results, d, s, [&](const REAL* a, REAL* y) { y[0] = a[0] - length * direction(a); });
    }
}

// mpiclip.ops.apply: v += scale mean, x −= γ v. The arrays are taken as one row.
KERNEL apply(REAL* x, REAL* v, const REAL* mean, double gamma, double scale, int64 size)
{
    REAL* const out[] = {v, x};
    sweep<3, 2>({x, v, mean}, out, size, share(gridDim.x), [&](const REAL* a, REAL* y) {
        y[0] = a[1] + REAL(scale) * a[2];
        y[1] = a[0] - REAL(gamma) * y[0];
    });
}

// A thread's columns of row_sum, K of them at a time.
template <int K>
__device__ inline void columns(const REAL* u, REAL scale, REAL* out, int64 w, int64 d)
{
    struct alignas(K * sizeof(REAL)) Columns { REAL at[K]; };
    for (int64 j = K * (int64(blockIdx.x) * THREADS + threadIdx.x); j < d; j += K * (int64(gridDim.x) * THREADS)) {
        Columns sum = {};
        #pragma unroll 4                                // loads in flight; the additions keep their order
        for (int64 i = 0; i < w; i++) {
            const Columns u_i = *reinterpret_cast<const Columns*>(u + i * d + j);
            for (int k = 0; k < K; k++) sum.at[k] += u_i.at[k];
        }
        for (int k = 0; k < K; k++) sum.at[k] *= scale;
        *reinterpret_cast<Columns*>(out + j) = sum;
    }
}

// mpiclip.ops.row_sum: out_j = scale Σ_i u_ij, in the order i = 0, 1, …
KERNEL row_sum(const REAL* u, double scale, REAL* out, int64 w, int64 d)
{
    if (d % N == 0 && to_boundary(u) == 0 && to_boundary(out) == 0) columns<N>(u, scale, out, w, d);
    else columns<1>(u, scale, out, w, d);
}
