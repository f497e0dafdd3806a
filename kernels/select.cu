// The k largest |·| of each row of u (w, d), or of u − v where v is there: mpiclip.ops.top_k and clip_step_top_k.
//
// |x| is compared as the integer that its bits are without the sign, its key: the same order, infinity and NaN above
// all numbers. A row is cut into pieces in the order of its numbers, one for each warp. `sample` draws a few thousand
// numbers of a row for a floor a little below the k-th largest key; `collect` goes over the row once, for the norm, and
// each warp lists the candidates of its piece, which lie above the floor. From then on a warp looks at its list; or
// over its piece again, where the list had no room or where the whole row has fewer than k candidates (`visit`).
// `count_digit` finds eight bits of the k-th largest key at a time, `count_taken` and `place` write what is chosen, in
// order. The atomics add integers: whoever comes first, the sum is the same.
#include "rows.cuh"

template <class Real> struct Int;
template <> struct Int<float> { using type = int; };
template <> struct Int<double> { using type = int64; };
using Bits = Int<REAL>::type;

constexpr int BINS = 256, WARPS = THREADS / 32, LOADS = 8 * PACKS / sizeof(REAL);
constexpr unsigned ALL = 0xffffffff;
static_assert(THREADS == BINS);                         // a thread for each value of a digit

__device__ inline Bits key(REAL x)
{
    return reinterpret_cast<const Bits&>(x) & ~(Bits(1) << (8 * sizeof(REAL) - 1));
}

__device__ inline REAL difference(const REAL* u, const REAL* v, int64 j)
{
    return v ? u[j] - v[j] : u[j];
}

// How many of the votes are from threads before this one.
__device__ inline int before(unsigned votes)
{
    return __popc(votes & ((1u << threadIdx.x % 32) - 1));
}

// The k-th largest key as far as it is known: its leading digits, and which of the keys that begin so it is.
struct Kth { Bits digits; int rank; };

// One digit more: this thread knows how many keys there are, among those, whose next digit is 255 − threadIdx.x.
__device__ Kth next_digit(Kth kth, int count)
{
    __shared__ int warps[WARPS], found[2];
    int sum = count;
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(ALL, sum, by);
        if (int(threadIdx.x % 32) >= by) sum += other;
    }
    if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int warp = 0; warp < int(threadIdx.x / 32); warp++) sum += warps[warp];
    if (sum >= kth.rank && sum - count < kth.rank) {
        found[0] = BINS - 1 - threadIdx.x;
        found[1] = kth.rank - (sum - count);
    }
    __syncthreads();
    return {Bits(kth.digits << 8 | found[0]), found[1]};
}

// The first digits of the row's k-th largest key, from their histograms (digits, w, BINS).
__device__ Kth first_digits(const int* histograms, int64 digits, int64 row, int64 w, int64 k)
{
    Kth kth = {0, int(k)};
    for (int64 digit = 0; digit < digits; digit++)
        kth = next_digit(kth, histograms[(digit * w + row) * BINS + BINS - 1 - threadIdx.x]);
    return kth;
}

// floors_i: one less than the rank-th largest key of n numbers of the row i, each from another n-th of it, at a place
// that no pattern in the row keeps step with. One block a row.
KERNEL sample(const REAL* u, const REAL* v, Bits* floors, int64 d, int64 n, int64 rank)
{
    __shared__ int bins[BINS];
    const int64 row = blockIdx.x, stride = d / n;
    Kth kth = {0, int(rank)};
    for (int shift = 8 * sizeof(REAL) - 8; shift >= 0; shift -= 8) {
        bins[threadIdx.x] = 0;
        __syncthreads();
        for (int64 i = threadIdx.x; i < n; i += THREADS) {
            const int64 j = i * stride + (unsigned(i) * 2654435769u * stride >> 32);
            const Bits bits = key(difference(u, v, row * d + j)) >> shift;
            if (bits >> 8 == kth.digits) atomicAdd(&bins[bits & 255], 1);
        }
        __syncthreads();
        kth = next_digit(kth, bins[BINS - 1 - threadIdx.x]);
    }
    if (threadIdx.x == 0) floors[row] = kth.digits - 1;
}

// What a warp looks at: columns first … last − 1 of its row, or its list, if that has a length ≥ 0.
struct View {
    const REAL *u, *v;
    int64 first, last, slot, length;
    int* index;
    REAL* value;
};

// The view of this warp; its list has the length −1 until `found` and `totals` say more.
__device__ inline View view(const REAL* u, const REAL* v, int* index, REAL* value, int64 d, int64 room, Share s)
{
    const int64 warp = s.part * WARPS + threadIdx.x / 32, warps = s.parts * WARPS, slot = s.row * warps + warp;
    const int64 piece = (d + 32 * warps - 1) / (32 * warps) * 32;
    return {u + s.row * d, v ? v + s.row * d : nullptr, min(d, warp * piece), min(d, (warp + 1) * piece), slot, -1,
            index + slot * room, value + slot * room};
}

__device__ inline View view(const REAL* u, const REAL* v, int* index, REAL* value, const int* found, const int* totals,
                            int64 k, int64 d, int64 room, Share s)
{
    View own = view(u, v, index, value, d, room, s);
    if (totals[2 * s.row] >= k && found[own.slot] <= room) own.length = found[own.slot];
    return own;
}

// f(j, e, there) for all numbers that a warp looks at, in their order, 32 at a time: threads whose number is not
// there call f as well.
template <class F>
__device__ inline void visit(const View& own, F f)
{
    const int64 lane = threadIdx.x % 32;
    for (int64 i = lane; i - lane < own.length; i += 32) {
        const bool there = i < own.length;
        f(there ? own.index[i] : 0, there ? own.value[i] : REAL(0), there);
    }
    if (own.length >= 0) return;
    #pragma unroll 1
    for (int64 j = own.first + lane; j - lane < own.last; j += 32 * LOADS) {
        REAL e[LOADS];
        #pragma unroll
        for (int m = 0; m < LOADS; m++) e[m] = j + 32 * m < own.last ? difference(own.u, own.v, j + 32 * m) : REAL(0);
        #pragma unroll
        for (int m = 0; m < LOADS; m++) f(int(j + 32 * m), e[m], j + 32 * m < own.last);
    }
}

// Each warp's candidates, and how many it found, though it has room for no more than `room`. totals_i: candidates in the
// row i, and numbers that are not finite. sums (w, parts): Σ (u_ij − v_ij)², one for a block.
KERNEL collect(const REAL* u, const REAL* v, const Bits* floors, int* index, REAL* value, int* found, int* totals,
               double* sums, int64 d, int64 parts, int64 room)
{
    const Share s = share(parts);
    const View own = view(u, v, index, value, d, room, s);
    const Bits floor = floors[s.row];
    double sum = 0;
    int n = 0;
    bool finite = true;
    visit(own, [&](int j, REAL e, bool there) {
        if (v) sum = fma(double(e), double(e), sum);
        finite = finite && isfinite(e);
        const bool hit = there && key(e) > floor;
        const unsigned hits = __ballot_sync(ALL, hit);
        const int at = n + before(hits);
        if (hit && at < room) {
            own.index[at] = j;
            own.value[at] = e;
        }
        n += __popc(hits);
    });
    const unsigned bad = __ballot_sync(ALL, !finite);
    if (threadIdx.x % 32 == 0) {
        found[own.slot] = n;
        if (n) atomicAdd(&totals[2 * s.row], n);
        if (bad) atomicAdd(&totals[2 * s.row + 1], 1);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The histogram of the digit `digit` of all keys whose earlier digits are those of the k-th largest.
KERNEL count_digit(const REAL* u, const REAL* v, int* index, REAL* value, const int* found, const int* totals,
                   int* histograms, int64 digit, int64 k, int64 w, int64 d, int64 parts, int64 room)
{
    __shared__ int bins[BINS];
    const Share s = share(parts);
    bins[threadIdx.x] = 0;
    const Kth kth = first_digits(histograms, digit, s.row, w, k);
    __syncthreads();
    const int shift = 8 * (sizeof(REAL) - 1 - digit);
    visit(view(u, v, index, value, found, totals, k, d, room, s), [&](int, REAL e, bool there) {
        const Bits bits = key(e) >> shift;
        if (there && bits >> 8 == kth.digits) atomicAdd(&bins[bits & 255], 1);
    });
    __syncthreads();
    if (bins[threadIdx.x]) atomicAdd(&histograms[(digit * w + s.row) * BINS + threadIdx.x], bins[threadIdx.x]);
}

// How many keys of each warp are larger than the k-th largest, and how many are equal to it: taken (w, warps, 2).
KERNEL count_taken(const REAL* u, const REAL* v, int* index, REAL* value, const int* found, const int* totals,
                   const int* histograms, int* taken, int64 k, int64 w, int64 d, int64 parts, int64 room)
{
    const Share s = share(parts);
    const Kth kth = first_digits(histograms, sizeof(REAL), s.row, w, k);
    const View own = view(u, v, index, value, found, totals, k, d, room, s);
    int above = 0, ties = 0;
    visit(own, [&](int, REAL e, bool there) {
        above += __popc(__ballot_sync(ALL, there && key(e) > kth.digits));
        ties += __popc(__ballot_sync(ALL, there && key(e) == kth.digits));
    });
    if (threadIdx.x % 32 == 0) {
        taken[2 * own.slot] = above;
        taken[2 * own.slot + 1] = ties;
    }
}

// Σ taken over the warps before this one in its row, both numbers.
__device__ void taken_before(const int* taken, Share s, int& above, int& ties)
{
    __shared__ int warps[WARPS][2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int* row = taken + s.row * s.parts * WARPS * 2;
    int sum[2] = {0, 0};
    for (int64 k = threadIdx.x; k < s.part * WARPS; k += THREADS)
        for (int which = 0; which < 2; which++) sum[which] += row[2 * k + which];
    for (int by = 16; by; by /= 2)
        for (int which = 0; which < 2; which++) sum[which] += __shfl_xor_sync(ALL, sum[which], by);
    if (lane == 0)
        for (int which = 0; which < 2; which++) warps[warp][which] = sum[which];
    __syncthreads();
    above = ties = 0;
    for (int k = 0; k < WARPS; k++) {
        above += warps[k][0] + (k < warp ? row[2 * (s.part * WARPS + k)] : 0);
        ties += warps[k][1] + (k < warp ? row[2 * (s.part * WARPS + k) + 1] : 0);
    }
}

// The results: what lies above the k-th largest key, and so many of those equal to it, the first, that k are full.
// values_i = factor e, v_i += values_i; a row that is not finite gets NaN at 0 … k − 1, and keeps its v_i.
KERNEL place(const REAL* u, REAL* v, int* index, REAL* value, const int* found, const int* totals,
             const int* histograms, const int* taken, const double* sums, const double* taus, double tau, double* norms,
             int* indices, REAL* values, int64 k, int64 w, int64 d, int64 parts, int64 room)
{
    const Share s = share(parts);
    REAL factor = 1;
    if (v) factor = row_factor(sums, taus, tau, 0, norms, s);
    indices += s.row * k;
    values += s.row * k;
    if (isnan(factor) || totals[2 * s.row + 1]) {
        for (int64 j = s.part * THREADS + threadIdx.x; j < k; j += s.parts * THREADS) {
            indices[j] = j;
            values[j] = nan("");
        }
        return;
    }
    const Kth kth = first_digits(histograms, sizeof(REAL), s.row, w, k);
    const View own = view(u, v, index, value, found, totals, k, d, room, s);
    if (v) v += s.row * d;
    int above, ties;
    taken_before(taken, s, above, ties);
    visit(own, [&](int j, REAL e, bool there) {
        const bool larger = there && key(e) > kth.digits, tie = there && key(e) == kth.digits;
        const unsigned all_larger = __ballot_sync(ALL, larger), all_ties = __ballot_sync(ALL, tie);
        const int earlier_ties = ties + before(all_ties);
        if (larger || (tie && earlier_ties < kth.rank)) {
            const int at = above + before(all_larger) + min(earlier_ties, kth.rank);
            if (v) {
                e *= factor;
                v[j] += e;
            }
            indices[at] = j;
            values[at] = e;
        }
        above += __popc(all_larger);
        ties += __popc(all_ties);
    });
}
