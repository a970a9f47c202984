// Products with numbers that are stored in few bits, on a CPU. Compiled by `native.py` with the machine's own compiler.
//
// Of int8, int4 and packed codes PyTorch first makes an array of float32, which costs more than the product; and its
// products with a few queries take two to five times as long as reading the keys, since the libraries behind it copy them
// into another order first. These functions read what is stored as it lies, once. With few queries the memory decides, and
// numbers are made in registers; with many the multiplications do, and a block of keys is made numbers in the nearest
// cache. Letters as everywhere: b batch (or batch times heads), k keys, d head size, x or y queries, s coefficients.
//
// On AVX-512 sixteen numbers are one register; elsewhere they are a short loop that the compiler makes vectors of.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(TPA_PLAIN)
#include <immintrin.h>
#define TPA_AVX512 1
#if defined(__AVX512BF16__)
#define TPA_BF16_DOT 1
#endif
#if defined(__AVX512VNNI__)
#define TPA_INT16_DOT 1
#endif
#endif

namespace {

constexpr int W = 16;        // numbers at a time
constexpr int GROUP = 64;    // numbers that share a scale
constexpr int ROWS = 32;     // rows of a matrix, or rebuilt keys, that a thread takes at a time
constexpr int BLOCK = 16;    // stored keys whose numbers stay in the nearest cache
constexpr int AHEAD = 32;    // keys between those that are multiplied and those that memory is asked for meanwhile
constexpr int LINE = 64;     // bytes that memory sends at once
constexpr int MANY = 8;      // queries from which on multiplications, not memory, take the time
constexpr int STRIDE = 272;  // units between keys of a block: no power of two, so that they lie in different cache lines
constexpr int MOST_GROUPS = 4;  // of a key that is multiplied in whole numbers
enum Kind { F32, BF16, INT8, INT4 };

#if TPA_AVX512

using F = __m512;
inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void save(float* p, F x) { _mm512_storeu_ps(p, x); }
// At most sixteen numbers of the `count` that are left, `rest` behind them; and what of sixteen belongs there.
inline __mmask16 first_of(int64_t count) { return __mmask16((1u << std::clamp<int64_t>(count, 0, W)) - 1); }
inline F load_of(const float* p, int64_t count, float rest = 0) {
    return _mm512_mask_loadu_ps(all(rest), first_of(count), p);
}
inline void save_of(float* p, int64_t count, F x) { _mm512_mask_storeu_ps(p, first_of(count), x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F times(F a, F b) { return _mm512_mul_ps(a, b); }
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline F larger(F x, F y) { return _mm512_max_ps(x, y); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
inline F minus(F x, F y) { return _mm512_sub_ps(x, y); }
// Of x <= 0: 2^n times the first eight terms of the series of what is left, at most ln(2)/2. Zero where float32 ends.
inline F exponential(F x) {
    x = _mm512_max_ps(all(-105), x);
    const F n = _mm512_roundscale_ps(times(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F rest = fma(n, all(1.90465432e-9f), fma(n, all(-0.693147182f), x));  // n ln(2), in two parts
    F y = all(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, rest, all(term));
    return _mm512_scalef_ps(y, n);
}
inline F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F load_int4(const uint8_t* p) {
    __m128i two = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
    two = _mm_and_si128(_mm_or_si128(two, _mm_slli_epi16(two, 4)), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(two));
}
inline void transpose(F (&x)[W]) {
    F y[W];
    for (int i = 0; i < W; i += 2)
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    for (int i = 0; i < W; i += 4)
        for (int half = 0; half < 2; half++) {
            const __m512d one = _mm512_castps_pd(y[i + half]), two = _mm512_castps_pd(y[i + 2 + half]);
            x[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two));
            x[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
        }
    for (int i : {0, 1, 2, 3, 8, 9, 10, 11})  // quarters of registers: even ones, and odd ones
        y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    for (int i = 0; i < 8; i++)
        x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88), x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
}
inline float from_half(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

#else

struct F { float v[W]; };
template <class Make> inline F each(Make make) {
    F y;
    for (int i = 0; i < W; i++) y.v[i] = make(i);
    return y;
}
inline F all(float x) { return each([=](int) { return x; }); }
inline F zero() { return all(0); }
inline F load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void save(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
inline F load_of(const float* p, int64_t count, float rest = 0) {
    return each([=](int i) { return i < count ? p[i] : rest; });
}
inline void save_of(float* p, int64_t count, const F& x) { std::copy(x.v, x.v + std::min<int64_t>(count, W), p); }
inline F fma(const F& a, const F& b, const F& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F times(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline float sum(const F& x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x.v[i];
    return total;
}
inline F larger(const F& x, const F& y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline float largest(const F& x) { return *std::max_element(x.v, x.v + W); }
inline F minus(const F& x, const F& y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
inline F exponential(const F& x) { return each([&](int i) { return std::exp(x.v[i]); }); }
inline void transpose(F (&x)[W]) {
    for (int i = 0; i < W; i++)
        for (int j = 0; j < i; j++) std::swap(x[i].v[j], x[j].v[i]);
}
inline float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline F load_bf16(const uint16_t* p) { return each([=](int i) { return from_bf16(p[i]); }); }
inline F load_int8(const int8_t* p) { return each([=](int i) { return float(p[i]); }); }
inline F load_int4(const uint8_t* p) { return each([=](int i) { return float(p[i / 2] >> 4 * (i % 2) & 15); }); }
inline float from_half(uint16_t x) {  // also subnormal; a scale is never infinite
    uint32_t sign = uint32_t(x >> 15) << 31, exponent = x >> 10 & 31, fraction = x & 1023, bits = sign;
    float y;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) / 16777216.0f;
    bits |= (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&y, &bits, 4);
    return y;
}

#endif

// Asks memory for what will be read: into the second cache, the first is small.
inline void soon(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

// Keys or values of one head (or rank) as they are stored: row k at `at + k * row`, its scales at `scale + k * step`.
template <Kind KIND> struct Rows {
    const uint8_t* at;
    const uint16_t *scale, *minimum;
    int64_t row, step;  // bytes; numbers

    const uint8_t* key(int64_t k) const { return at + k * row; }
    static constexpr int64_t bytes(int64_t numbers) {
        return numbers * (KIND == F32 ? 32 : KIND == BF16 ? 16 : KIND == INT8 ? 8 : 4) / 8;
    }
    // Asks memory for numbers j ... j + count - 1 of key k, which may lie behind the last one.
    void fetch(int64_t k, int64_t j, int64_t count) const {
        for (int64_t byte = bytes(j); byte < bytes(j + count); byte += LINE) soon(key(k) + byte);
    }
    // Numbers j ... j + 15 of key k.
    F numbers(int64_t k, int64_t j) const {
        const uint8_t* p = key(k);
        if constexpr (KIND == F32) return load((const float*)p + j);
        if constexpr (KIND == BF16) return load_bf16((const uint16_t*)p + j);
        const F s = all(from_half(scale[k * step + j / GROUP]));
        if constexpr (KIND == INT8) return times(load_int8((const int8_t*)p + j), s);
        return fma(load_int4(p + j / 2), s, all(from_half(minimum[k * step + j / GROUP])));
    }
#if TPA_BF16_DOT
    __m256i in_bf16(int64_t k, int64_t j) const {
        if constexpr (KIND == BF16) return _mm256_loadu_si256((const __m256i*)((const uint16_t*)key(k) + j));
        return (__m256i)_mm512_cvtneps_pbh(numbers(k, j));
    }
#endif
};

// ---- few queries: what they read decides ----

// L[x,k] = sum_d K[k,d] Q[x,d] of X queries and the keys first ... last - 1. L starts at the first, its rows are `row`
// apart.
template <int X, class R>
void dot(const R& K, const float* Q, float* L, int64_t row, int64_t first, int64_t last, int64_t d) {
    for (int64_t k = first; k < last; k++) {
        K.fetch(k + AHEAD, 0, d);
        F total[X];
        for (int x = 0; x < X; x++) total[x] = zero();
        for (int64_t j = 0; j < d; j += W) {
            const F numbers = K.numbers(k, j);
            for (int x = 0; x < X; x++) total[x] = fma(numbers, load(Q + x * d + j), total[x]);
        }
        for (int x = 0; x < X; x++) L[x * row + k - first] = sum(total[x]);
    }
}

// Y[x,d] += sum_k P[x,k] V[k,d] of X queries; P starts at the first key, its rows are `row` apart.
template <int X, int D, class R>
void weigh(const R& V, const float* P, float* Y, int64_t row, int64_t first, int64_t last, int64_t d) {
    for (int64_t j = 0; j < d; j += D * W) {
        F total[X][D];
        const int here = int(std::min<int64_t>(D, (d - j) / W));
        if (here < D) {  // the last columns, one by one
            for (int64_t i = j; i < d; i += W)
                for (int x = 0; x < X; x++) {
                    F y = load(Y + x * d + i);
                    for (int64_t k = first; k < last; k++) y = fma(V.numbers(k, i), all(P[x * row + k - first]), y);
                    save(Y + x * d + i, y);
                }
            return;
        }
        for (int x = 0; x < X; x++)
            for (int c = 0; c < D; c++) total[x][c] = load(Y + x * d + j + c * W);
        for (int64_t k = first; k < last; k++) {
            V.fetch(k + AHEAD, j, D * W);
            F numbers[D];
            for (int c = 0; c < D; c++) numbers[c] = V.numbers(k, j + c * W);
            for (int x = 0; x < X; x++) {
                const F p = all(P[x * row + k - first]);
                for (int c = 0; c < D; c++) total[x][c] = fma(numbers[c], p, total[x][c]);
            }
        }
        for (int x = 0; x < X; x++)
            for (int c = 0; c < D; c++) save(Y + x * d + j + c * W, total[x][c]);
    }
}

#if TPA_INT16_DOT
// The same two in whole numbers: int8 and int4 as they are, and what is multiplied with a group of 64 of them rounded to 16
// bits, a hundred times finer. d is a multiple of 64.

// The codes of a group, a byte each.
template <Kind KIND> inline void codes_of(const uint8_t* p, __m256i (&half)[2]) {
    if constexpr (KIND == INT8) {
        half[0] = _mm256_loadu_si256((const __m256i*)p), half[1] = _mm256_loadu_si256((const __m256i*)(p + 32));
    } else {
        __m512i two = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        two = _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi16(two, 4)), _mm512_set1_epi8(15));
        half[0] = _mm512_castsi512_si256(two), half[1] = _mm512_extracti64x4_epi64(two, 1);
    }
}

// A group of a query in 16 bits, what it is to be multiplied with, and its sum.
struct alignas(LINE) Group {
    int16_t numbers[GROUP];
    float step, sum;
};

void round_groups(const float* q, int64_t groups, Group* out) {
    for (int64_t i = 0; i < groups; i++, q += GROUP) {
        float most = 0, sum = 0;
        for (int j = 0; j < GROUP; j++) most = std::max(most, std::fabs(q[j])), sum += q[j];
        out[i].step = most / 32767, out[i].sum = sum;
        for (int j = 0; j < GROUP; j++) out[i].numbers[j] = most > 0 ? int16_t(std::lrint(q[j] / most * 32767)) : 0;
    }
}

template <int X, Kind KIND>
void dot_whole(const Rows<KIND>& K, const Group* Q, float* L, int64_t row, int64_t first, int64_t last, int64_t d) {
    const int64_t groups = d / GROUP;
    for (int64_t k = first; k < last; k++) {
        K.fetch(k + AHEAD, 0, d);
        F total[X];
        float rest[X] = {};
        for (int x = 0; x < X; x++) total[x] = zero();
        for (int64_t group = 0; group < groups; group++) {
            __m256i half[2];
            codes_of<KIND>(K.key(k) + K.bytes(group * GROUP), half);
            const __m512i low = _mm512_cvtepi8_epi16(half[0]), high = _mm512_cvtepi8_epi16(half[1]);
            const float scale = from_half(K.scale[k * K.step + group]);
            const float minimum = KIND == INT4 ? from_half(K.minimum[k * K.step + group]) : 0;
            for (int x = 0; x < X; x++) {
                const Group& q = Q[x * groups + group];
                __m512i found = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(q.numbers));
                found = _mm512_dpwssd_epi32(found, high, _mm512_loadu_si512(q.numbers + 32));
                total[x] = fma(_mm512_cvtepi32_ps(found), all(scale * q.step), total[x]);
                if constexpr (KIND == INT4) rest[x] += minimum * q.sum;
            }
        }
        for (int x = 0; x < X; x++) L[x * row + k - first] = sum(total[x]) + rest[x];
    }
}

// Of at most BLOCK keys; P has zeros behind them. What is rounded are weights times scales.
template <int X, Kind KIND>
void weigh_whole(const Rows<KIND>& V, const float* P, float* Y, int64_t first, int64_t last, int64_t d) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // in which two keys are side by side after unpacking
    const int groups = int(d / GROUP);
    float scale[MOST_GROUPS][BLOCK] = {}, minimum[MOST_GROUPS][BLOCK] = {}, step[X], rest[X][MOST_GROUPS] = {};
    int32_t pairs[X][MOST_GROUPS][BLOCK / 2];
    for (int64_t k = first; k < last; k++) {
        V.fetch(k + AHEAD, 0, d);
        for (int group = 0; group < groups; group++) {
            scale[group][k - first] = from_half(V.scale[k * V.step + group]);
            if constexpr (KIND == INT4) minimum[group][k - first] = from_half(V.minimum[k * V.step + group]);
        }
    }
    for (int x = 0; x < X; x++) {
        const F p = load(P + x * BLOCK);
        F most = zero();
        for (int group = 0; group < groups; group++) most = larger(most, _mm512_abs_ps(times(p, load(scale[group]))));
        const float highest = largest(most), finer = highest > 0 ? 32767 / highest : 0;
        step[x] = highest / 32767;
        for (int group = 0; group < groups; group++) {
            const __m512i rounded = _mm512_cvtps_epi32(times(times(p, load(scale[group])), all(finer)));
            _mm256_storeu_si256((__m256i*)pairs[x][group], _mm512_cvtepi32_epi16(rounded));
            if constexpr (KIND == INT4) rest[x][group] = sum(times(p, load(minimum[group])));
        }
    }
    for (int group = 0; group < groups; group++) {
        __m512i total[X][4];
        for (int x = 0; x < X; x++)
            for (int c = 0; c < 4; c++) total[x][c] = _mm512_setzero_si512();
        for (int pair = 0; pair < BLOCK / 2; pair++) {
            __m256i one[2], two[2];
            const int64_t k = std::min(first + 2 * pair, last - 1), other = std::min(k + 1, last - 1);
            codes_of<KIND>(V.key(k) + V.bytes(group * GROUP), one);
            codes_of<KIND>(V.key(other) + V.bytes(group * GROUP), two);
            for (int half = 0; half < 2; half++) {
                const __m512i a = _mm512_cvtepi8_epi16(_mm256_permutevar8x32_epi32(one[half], order));
                const __m512i b = _mm512_cvtepi8_epi16(_mm256_permutevar8x32_epi32(two[half], order));
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                for (int x = 0; x < X; x++) {
                    const __m512i p = _mm512_set1_epi32(pairs[x][group][pair]);
                    total[x][2 * half] = _mm512_dpwssd_epi32(total[x][2 * half], low, p);
                    total[x][2 * half + 1] = _mm512_dpwssd_epi32(total[x][2 * half + 1], high, p);
                }
            }
        }
        for (int x = 0; x < X; x++)
            for (int c = 0; c < 4; c++) {
                float* y = Y + x * d + group * GROUP + c * W;
                save(y, fma(_mm512_cvtepi32_ps(total[x][c]), all(step[x]), fma(all(1), load(y), all(rest[x][group]))));
            }
    }
}
#endif

// Calls work(x, integral constant) for x in steps of 8, 4, 2, 1.
template <int N> struct Count { static constexpr int value = N; };
template <class Work> void in_blocks(int64_t queries, Work work) {
    int64_t x = 0;
    for (; queries - x >= 8; x += 8) work(x, Count<8>{});
    if (queries - x >= 4) work(x, Count<4>{}), x += 4;
    if (queries - x >= 2) work(x, Count<2>{}), x += 2;
    if (queries - x >= 1) work(x, Count<1>{});
}

// ---- many queries: what they multiply decides ----

// What is multiplied in one go, in 32 bits: a number in float32, or two in bfloat16, whose products are added in float32.
using Unit = uint32_t;

struct InFloat32 {
    static constexpr int NUMBERS = 1;
    static F add_product(F total, const Unit* one, const Unit* sixteen) {
        return fma(all(*(const float*)one), load((const float*)sixteen), total);
    }
    static void put(Unit* to, int64_t i, float x) { std::memcpy(to + i, &x, 4); }
    static void save(Unit* to, F x) { ::save((float*)to, x); }
    template <class R> static void copy(Unit* to, const R& K, int64_t k, int64_t j) { save(to, K.numbers(k, j)); }
    template <class R> static void copy_keys(Unit* to, const R& V, int64_t k, int64_t, int64_t j) { copy(to, V, k, j); }
};

uint16_t to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if TPA_BF16_DOT
struct InBFloat16 {
    static constexpr int NUMBERS = 2;
    static F add_product(F total, const Unit* one, const Unit* sixteen) {
        return _mm512_dpbf16_ps(total, (__m512bh)_mm512_set1_epi32(int(*one)), (__m512bh)_mm512_loadu_si512(sixteen));
    }
    static void put(Unit* to, int64_t i, float x) {
        const uint16_t rounded = to_bf16(x);
        std::memcpy((uint16_t*)to + i, &rounded, 2);
    }
    static void save(Unit* to, F x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
    template <class R> static void copy(Unit* to, const R& K, int64_t k, int64_t j) {
        _mm256_storeu_si256((__m256i*)to, K.in_bf16(k, j));
    }
    // Number j of one key and of another share a unit.
    template <class R> static void copy_keys(Unit* to, const R& V, int64_t k, int64_t last, int64_t j) {
        __m512i both = _mm512_cvtepu16_epi32(V.in_bf16(k, j));
        if (k + 1 < last) both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(V.in_bf16(k + 1, j)), 16));
        _mm512_storeu_si512(to, both);
    }
};
#endif

// The next block, asked for line by line while this one is multiplied; keys lie one behind the other.
struct Next {
    const uint8_t *at, *end;
};

// total[m,v] += sum_i of[m,i] with[i,v], v sixteen numbers each; rows of `of` and `with` are so many units apart.
template <class IN, int M, int V>
inline void multiply(F (&total)[M][V], const Unit* of, int64_t row, const Unit* with, int64_t width, int64_t count,
                     Next& next) {
    for (int64_t i = 0; i < count; i++) {
        if (next.at < next.end) soon(next.at), next.at += LINE;
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++)
                total[m][v] = IN::add_product(total[m][v], of + m * row + i, with + i * width + v * W);
    }
}

// A block of keys as numbers [BLOCK][STRIDE], zeros behind the last.
template <class IN, class R> void make_keys(const R& K, int64_t first, int64_t last, int64_t d, Unit* block) {
    const int64_t units = d / IN::NUMBERS;
    for (int64_t k = first; k < first + BLOCK; k++, block += STRIDE) {
        if (k >= last) std::fill(block, block + units, 0);
        for (int64_t j = 0; k < last && j < d; j += W) IN::copy(block + j / IN::NUMBERS, K, k, j);
    }
}

// The same of values, BLOCK units of keys, [BLOCK][d]: numbers of the keys of a unit side by side.
template <class IN, class R> void make_values(const R& V, int64_t first, int64_t last, int64_t d, Unit* block) {
    for (int64_t k = first; k < first + BLOCK * IN::NUMBERS; k += IN::NUMBERS, block += d) {
        if (k >= last) std::fill(block, block + d, 0);
        for (int64_t j = 0; k < last && j < d; j += W) IN::copy_keys(block + j, V, k, last, j);
    }
}

// Queries as they are multiplied with a block: sixteen side by side, or twice sixteen, [lanes / 32][units of d][32].
template <class IN> void lay_out(const float* Q, int64_t x, int64_t d, Unit* out) {
    constexpr int N = IN::NUMBERS;
    const int64_t lanes = (x + W - 1) / W * W, units = d / N;
    for (int64_t q = 0; q < lanes; q++) {
        const int64_t start = q / (2 * W) * 2 * W, width = std::min<int64_t>(2 * W, lanes - start);
        for (int64_t j = 0; j < d; j++)
            IN::put(out + start * units + j / N * width + q - start, j % N, q < x ? Q[q * d + j] : 0.0f);
    }
}

// found[x,k] of one block, from queries that are laid out; x up to a multiple of sixteen.
template <class IN> void dot_block(const Unit* block, const Unit* Q, float* found, int64_t x, int64_t d, Next next) {
    const int64_t units = d / IN::NUMBERS;
    const auto of_lanes = [&](int64_t q, auto lanes) {
        constexpr int V = decltype(lanes)::value, M = BLOCK / V;
        F by_key[V][BLOCK];
        for (int k = 0; k < BLOCK; k += M) {
            F total[M][V];
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) total[m][v] = zero();
            multiply<IN>(total, block + k * STRIDE, STRIDE, Q + q * units, V * W, units, next);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) by_key[v][k + m] = total[m][v];
        }
        for (int v = 0; v < V; v++) {
            transpose(by_key[v]);
            for (int i = 0; i < W; i++) save(found + (q + v * W + i) * BLOCK, by_key[v][i]);
        }
    };
    int64_t q = 0;
    for (; x - q > W; q += 2 * W) of_lanes(q, Count<2>{});
    if (q < x) of_lanes(q, Count<1>{});
}

// Y[x,d] += sum_k P[x,k] V[k,d] of one block; P [x][BLOCK].
template <class IN> void weigh_block(const Unit* block, const Unit* P, float* Y, int64_t x, int64_t d, Next next) {
    in_blocks(x, [&](int64_t q, auto X) {
        const auto of_columns = [&](int64_t j, auto columns) {
            constexpr int M = decltype(X)::value, V = decltype(columns)::value;
            F total[M][V];
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) total[m][v] = load(Y + (q + m) * d + j + v * W);
            multiply<IN>(total, P + q * BLOCK, BLOCK, block + j, d, BLOCK, next);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) save(Y + (q + m) * d + j + v * W, total[m][v]);
        };
        int64_t j = 0;
        for (; d - j >= 2 * W; j += 2 * W) of_columns(j, Count<2>{});
        if (j < d) of_columns(j, Count<1>{});
    });
}

// Weights of keys, beside those of a probability: a factor of each key and KV head, [b,g,k]; there may be none.
struct Weights {
    const float* at;
    int64_t batch, row, queries;  // numbers; queries of a head

    const float* of(int64_t b, int64_t x) const { return at ? at + b * batch + x / queries * row : nullptr; }
};

struct Array {  // of all batches; strides in bytes, of scales in numbers
    int64_t kind;
    const uint8_t* at;
    const uint16_t *scale, *minimum;
    int64_t batch, row, scale_batch, scale_row;
};

template <Kind KIND> Rows<KIND> rows_of(const Array& a, int64_t b) {
    const int64_t shift = b * a.scale_batch;
    return {a.at + b * a.batch, a.scale + shift, a.minimum + shift, a.row, a.scale_row};
}

template <class Work> void of_kind(int64_t kind, Work work) {
    if (kind == F32) work(Count<F32>{});
    if (kind == BF16) work(Count<BF16>{});
    if (kind == INT8) work(Count<INT8>{});
    if (kind == INT4) work(Count<INT4>{});
}

int64_t splits(int64_t batch, int64_t keys, int64_t threads) {  // of the keys of a batch, so that no thread waits
    return std::max<int64_t>(1, std::min((threads + batch - 1) / batch, keys / (4 * ROWS)));
}

// ---- spectral codes (see `codes`) ----

// Where the window of a coefficient lies: in two rows of bytes, the first one's above, right of `shift`.
struct Coefficient {
    int32_t width, row[2], shift;
};

struct Codes {
    const uint8_t* at;  // [bytes, keys], rows `row` apart; the first row are scales
    int64_t row;
};

constexpr int64_t WINDOWS = 256;  // levels of a width
constexpr int64_t STRETCH = 512;  // keys whose weights, of eight queries, stay in the first cache

// The windows of coefficient c at `count` keys from `first` on; zeros behind them up to a multiple of 64.
void windows(const Codes& codes, const Coefficient& c, int64_t first, int64_t count, uint8_t* out) {
    const uint8_t* p = codes.at + c.row[0] * codes.row + first;
    const uint8_t* q = codes.at + c.row[1] * codes.row + first;
#if TPA_AVX512
    const __m128i left = _mm_cvtsi32_si128(8 - c.shift), right = _mm_cvtsi32_si128(c.shift);
    const __m512i high = _mm512_set1_epi8(char(255 << (8 - c.shift))), low = _mm512_set1_epi8(char(255 >> c.shift));
    for (int64_t k = 0; k < count; k += 64) {  // what a shift of two bytes brings from one into the other is masked
        const __mmask64 here = count - k >= 64 ? ~0ull : (1ull << (count - k)) - 1;
        const __m512i x = _mm512_and_si512(_mm512_sll_epi16(_mm512_maskz_loadu_epi8(here, p + k), left), high);
        const __m512i y = _mm512_and_si512(_mm512_srl_epi16(_mm512_maskz_loadu_epi8(here, q + k), right), low);
        _mm512_storeu_si512(out + k, _mm512_or_si512(x, y));
    }
#else
    for (int64_t k = 0; k < count; k++) out[k] = uint8_t((p[k] << 8 | q[k]) >> c.shift);
    std::fill(out + count, out + (count + 63) / 64 * 64, uint8_t(0));
#endif
}

// Sixteen levels, by their windows.
inline F levels(const uint8_t* window, const float* table) {
#if TPA_AVX512
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)window)), table, 4);
#else
    return each([=](int i) { return table[window[i]]; });
#endif
}

// Y[y,s] += sum_k P[y,k] level(s,k) of one stretch of keys; P is padded with zeros to whole registers.
template <int Y>
void weigh_codes_in_float32(const Codes& codes, const Coefficient* of, int64_t coefficients, const float* tables,
                            const float* P, int64_t padded, int64_t first, int64_t keys, float* out, int64_t row) {
    uint8_t at[STRETCH];
    for (int64_t s = 0; s < coefficients; s++) {
        windows(codes, of[s], first, keys, at);
        F total[Y];
        for (int y = 0; y < Y; y++) total[y] = zero();
        for (int64_t k = 0; k < padded; k += W) {
            const F x = levels(at + k, tables + of[s].width * WINDOWS);
            for (int y = 0; y < Y; y++) total[y] = fma(x, load(P + y * STRETCH + k), total[y]);
        }
        for (int y = 0; y < Y; y++) out[y * row + s] += sum(total[y]);
    }
}

#if TPA_BF16_DOT
// Thirty-two levels. Of a window, five bits choose within a register of the table, one between two, two among four pairs.
inline __m512bh levels_in_bf16(const uint8_t* window, const uint16_t* table) {
    const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)window));
    const __mmask32 odd = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
    __m512i pair[4];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 64 * i), at, _mm512_loadu_si512(table + 64 * i + 32));
    const __m512i low = _mm512_mask_blend_epi16(odd, pair[0], pair[1]);
    const __m512i high = _mm512_mask_blend_epi16(odd, pair[2], pair[3]);
    return (__m512bh)_mm512_mask_blend_epi16(_mm512_test_epi16_mask(at, _mm512_set1_epi16(128)), low, high);
}

// The same with weights and levels rounded to bfloat16, twice as many at a time, of two coefficients: for models in
// bfloat16.
template <int Y>
void weigh_codes_in_bf16(const Codes& codes, const Coefficient* of, int64_t coefficients, const uint16_t* tables,
                         const uint16_t* P, int64_t padded, int64_t first, int64_t keys, float* out, int64_t row) {
    uint8_t at[2][STRETCH];
    for (int64_t s = 0; s < coefficients; s += 2) {
        const int64_t other = std::min(s + 1, coefficients - 1);
        const Coefficient &one = of[s], &two = of[other];
        windows(codes, one, first, keys, at[0]);
        windows(codes, two, first, keys, at[1]);
        F total[Y][2];
        for (int y = 0; y < Y; y++) total[y][0] = total[y][1] = zero();
        for (int64_t k = 0; k < padded; k += 2 * W) {
            const __m512bh x0 = levels_in_bf16(at[0] + k, tables + one.width * WINDOWS);
            const __m512bh x1 = levels_in_bf16(at[1] + k, tables + two.width * WINDOWS);
            for (int y = 0; y < Y; y++) {
                const __m512bh p = (__m512bh)_mm512_loadu_si512(P + y * STRETCH + k);
                total[y][0] = _mm512_dpbf16_ps(total[y][0], x0, p);
                total[y][1] = _mm512_dpbf16_ps(total[y][1], x1, p);
            }
        }
        for (int y = 0; y < Y; y++) {
            out[y * row + s] += sum(total[y][0]);
            if (other > s) out[y * row + other] += sum(total[y][1]);
        }
    }
}
#endif

// ---- the best path through the trellis (see `codes.best_path`) ----

struct Trellis {
    const int32_t* width;               // [R]
    const float *tables, *scale, *inverse, *reach, *price;  // [9,256], [256] twice, by first byte, [R] twice
    int64_t coefficients, free;                             // first bytes of one scale
};

// The smallest scale at which widening the steps costs at least what it saves in clipped coefficients, as the least of
// its first bytes.
int chosen_scale(const Trellis& t, const float* c) {
    int at = 0;
    for (; at + t.free < WINDOWS; at += t.free) {
        float beyond = 0;
        for (int64_t s = 0; s < t.coefficients; s++)
            beyond += std::max(std::fabs(c[s]) - t.scale[at] * t.reach[s], 0.0f) * t.price[s];
        if (!(t.scale[at] < beyond)) break;
    }
    return at;
}

// One step: cost[window] of the best strings so far -> of those with a coefficient x more; the first w bits of the
// best window before, by its last 8 - w bits. Each product and sum is rounded by itself, as NumPy does, and of equal
// costs the first window wins.
template <int WIDTH> void step(float x, const float* table, float* cost, uint8_t* before) {
    constexpr int CHOICES = 1 << WIDTH, LAST = WINDOWS >> WIDTH;
    float best[WINDOWS + W];
#if TPA_AVX512
    constexpr int ACROSS = LAST < W ? W : LAST, ROWS_OF = WINDOWS / ACROSS, SHARE = ACROSS / LAST;  // choices in a register
    float least[ACROSS];
    int32_t from[ACROSS];
    for (int v = 0; v < ACROSS; v += W) {
        F y = load(cost + v);
        __m512i at = _mm512_setzero_si512();
        for (int row = 1; row < ROWS_OF; row++) {
            const F z = load(cost + row * ACROSS + v);
            at = _mm512_mask_mov_epi32(at, _mm512_cmp_ps_mask(z, y, _CMP_LT_OQ), _mm512_set1_epi32(row));
            y = _mm512_min_ps(y, z);
        }
        if (SHARE == 1) {
            save(best + v, y);
            _mm_storeu_si128((__m128i*)(before + v), _mm512_cvtepi32_epi8(at));
        } else {
            save(least + v, y);
            _mm512_storeu_si512(from + v, at);
        }
    }
    for (int j = 0; j < LAST && SHARE > 1; j++) {
        int first = SHARE * from[j];
        float y = least[j];
        for (int part = 1; part < SHARE; part++) {
            const float z = least[part * LAST + j];
            const int other = SHARE * from[part * LAST + j] + part;
            const bool better = z < y || (z == y && other < first);
            y = better ? z : y, first = better ? other : first;
        }
        best[j] = y, before[j] = uint8_t(first);
    }
    const __m512i lane = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), WIDTH);
    for (int i = 0; i < WINDOWS; i += W) {
        F error = minus(all(x), load(table + i));
        error = times(error, error);
        asm("" : "+v"(error));  // so that product and sum do not become one
        save(cost + i, _mm512_add_ps(_mm512_permutexvar_ps(lane, load(best + (i >> WIDTH))), error));
    }
#else
    float error[WINDOWS];
    int from[LAST];
    for (int j = 0; j < LAST; j++) best[j] = cost[j], from[j] = 0;
    for (int first = 1; first < CHOICES; first++)
        for (int j = 0; j < LAST; j++) {
            const float other = cost[first * LAST + j];
            from[j] = other < best[j] ? first : from[j];
            best[j] = other < best[j] ? other : best[j];
        }
    for (int j = 0; j < LAST; j++) before[j] = uint8_t(from[j]);
    for (int i = 0; i < WINDOWS; i++) error[i] = (x - table[i]) * (x - table[i]);
    asm volatile("" : : "r"(error) : "memory");  // so that product and sum do not become one
    for (int j = 0; j < LAST; j++)
        for (int own = 0; own < CHOICES; own++) cost[(j << WIDTH) + own] = best[j] + error[(j << WIDTH) + own];
#endif
}

// First byte and windows of one token's coefficients c: out [1 + R]; `x` and `before` [R], [R,128] are scratch.
void best_path(const Trellis& t, const float* c, float* x, uint8_t* before, uint8_t* out) {
    static constexpr void (*STEP[])(float, const float*, float*, uint8_t*) = {
        step<1>, step<2>, step<3>, step<4>, step<5>, step<6>, step<7>, step<8>};
    const int at = chosen_scale(t, c);
    float cost[WINDOWS];
    std::fill(cost, cost + WINDOWS, INFINITY);
    std::fill(cost + at, cost + at + t.free, 0.0f);
    for (int64_t s = 0; s < t.coefficients; s++) x[s] = c[s] * t.inverse[at];
    for (int64_t s = 0; s < t.coefficients; s++)
        STEP[t.width[s] - 1](x[s], t.tables + t.width[s] * WINDOWS, cost, before + s * (WINDOWS / 2));
    int window = int(std::min_element(cost, cost + WINDOWS) - cost);
    for (int64_t s = t.coefficients; s-- > 0;) {
        out[s + 1] = uint8_t(window);
        const int last = window >> t.width[s];
        window = (before[s * (WINDOWS / 2) + last] << (8 - t.width[s])) + last;
    }
    out[0] = uint8_t(window);
}

}  // namespace

extern "C" {

int tpa_has_bf16_dot() {
#if TPA_BF16_DOT
    return 1;
#else
    return 0;
#endif
}

// y[r,n] = sum_m x[r,m] W[n,m], W in bfloat16, the rest in float32.
void tpa_linear(const uint16_t* weights, const float* x, float* y, int64_t rows, int64_t n, int64_t m, int64_t threads) {
    const Rows<BF16> all_rows{(const uint8_t*)weights, nullptr, nullptr, 2 * m, 0};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < n; start += ROWS) {
        const int64_t end = std::min(n, start + ROWS);
        in_blocks(rows, [&](int64_t r, auto X) {
            dot<decltype(X)::value>(all_rows, x + r * m, y + r * n + start, n, start, end, m);
        });
    }
}

// L[b,x,k] = sum_d K[b,k,d] Q[b,x,d], times the weights A; add: to what L has already. rounded: few queries of int8
// and int4 keys in 16 bits, many queries and their keys in bfloat16, where the machine multiplies those.
void tpa_dot(const Array* K, const float* Q, const Weights* A, float* L, int64_t batch, int64_t x, int64_t keys, int64_t d,
             int64_t add, int64_t rounded, int64_t threads) {
    (void)rounded;
    // Calls score(b, first, last, found [x][BLOCK], a block's room) for all blocks.
    const auto of_blocks = [&](auto score) {
        const int64_t blocks = (keys + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> found((x + W - 1) / W * W * BLOCK);
            std::vector<Unit> block(BLOCK * STRIDE);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < batch * blocks; item++) {
                const int64_t b = item / blocks, first = item % blocks * BLOCK, last = std::min(keys, first + BLOCK);
                score(b, first, last, found.data(), block.data());
                for (int64_t q = 0; q < x; q++) {
                    const float *a = A->of(b, q), *from = &found[q * BLOCK];
                    float* to = L + (b * x + q) * keys + first;
                    const F one = a ? times(load_of(a + first, last - first), load(from)) : load(from);
                    save_of(to, last - first, add ? fma(all(1), load_of(to, last - first), one) : one);
                }
            }
        }
    };
    of_kind(K->kind, [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
        const auto with_many = [&](auto in) {
            using IN = decltype(in);
            const int64_t size = (x + W - 1) / W * W * d / IN::NUMBERS;
            std::vector<Unit> laid_out(batch * size);
            for (int64_t b = 0; b < batch; b++) lay_out<IN>(Q + b * x * d, x, d, &laid_out[b * size]);
            of_blocks([&](int64_t b, int64_t first, int64_t last, float* found, Unit* block) {
                const auto rows = rows_of<KIND>(*K, b);
                make_keys<IN>(rows, first, last, d, block);
                dot_block<IN>(block, &laid_out[b * size], found, x, d, {rows.key(last), rows.key(last + BLOCK)});
            });
        };
#if TPA_BF16_DOT
        if (rounded && x >= MANY && d <= STRIDE) return with_many(InBFloat16{});
#endif
        if (x >= 2 * MANY && d <= STRIDE) return with_many(InFloat32{});
#if TPA_INT16_DOT
        if constexpr (KIND == INT8 || KIND == INT4)
            if (rounded && d % GROUP == 0 && d <= MOST_GROUPS * GROUP) {
                const int64_t groups = d / GROUP;
                std::vector<Group> of_queries(batch * x * groups);
                round_groups(Q, batch * x * groups, of_queries.data());
                return of_blocks([&](int64_t b, int64_t first, int64_t last, float* found, Unit*) {
                    const auto rows = rows_of<KIND>(*K, b);
                    in_blocks(x, [&](int64_t q, auto X) {
                        const Group* asked = &of_queries[(b * x + q) * groups];
                        dot_whole<decltype(X)::value>(rows, asked, found + q * BLOCK, BLOCK, first, last, d);
                    });
                });
            }
#endif
        of_blocks([&](int64_t b, int64_t first, int64_t last, float* found, Unit*) {
            const auto rows = rows_of<KIND>(*K, b);
            in_blocks(x, [&](int64_t q, auto X) {
                dot<decltype(X)::value>(rows, Q + (b * x + q) * d, found + q * BLOCK, BLOCK, first, last, d);
            });
        });
    });
}

// Y[b,x,d] = sum_k P[b,x,k] A[b,x,k] V[b,k,d]. rounded: as in tpa_dot.
void tpa_weigh(const Array* V, const float* P, const Weights* A, float* Y, int64_t batch, int64_t x, int64_t keys, int64_t d,
               int64_t rounded, int64_t threads) {
    const int64_t parts = splits(batch, keys, threads), size = batch * x * d;
    std::vector<float> sums(parts > 1 ? parts * size : 0);
    float* const out = parts > 1 ? sums.data() : Y;
    std::fill(out, out + parts * size, 0.0f);
    (void)rounded;
    // Calls add(b, first, last, weights [x][BLOCK units], Y [x][d], a block's room) for all blocks.
    const auto of_blocks = [&](auto in, auto add) {
        using IN = decltype(in);
#pragma omp parallel num_threads(threads)
        {
            constexpr int64_t KEYS = BLOCK * IN::NUMBERS;
            std::vector<Unit> weights(x * BLOCK), block(BLOCK * d);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < batch * parts; item++) {
                const int64_t b = item / parts, part = item % parts, end = keys * (part + 1) / parts;
                for (int64_t first = keys * part / parts; first < end; first += KEYS) {
                    const int64_t last = std::min(end, first + KEYS);
                    for (int64_t q = 0; q < x; q++) {
                        const float *p = P + (b * x + q) * keys + first, *a = A->of(b, q);
                        for (int64_t k = 0; k < KEYS; k += W) {
                            const int64_t left = last - first - k;
                            F one = load_of(p + k, left);
                            if (a) one = times(one, load_of(a + first + k, left));
                            IN::save(&weights[q * BLOCK + k / IN::NUMBERS], one);
                        }
                    }
                    add(b, first, last, weights.data(), out + part * size + b * x * d, block.data());
                }
            }
        }
    };
    of_kind(V->kind, [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
        const auto with_many = [&](auto in) {
            using IN = decltype(in);
            of_blocks(in, [&](int64_t b, int64_t first, int64_t last, const Unit* weights, float* to, Unit* block) {
                const auto rows = rows_of<KIND>(*V, b);
                make_values<IN>(rows, first, last, d, block);
                weigh_block<IN>(block, weights, to, x, d, {rows.key(last), rows.key(last + BLOCK * IN::NUMBERS)});
            });
        };
#if TPA_BF16_DOT
        if (rounded && x >= MANY) return with_many(InBFloat16{});
#endif
        if (x > MANY) return with_many(InFloat32{});
#if TPA_INT16_DOT
        if constexpr (KIND == INT8 || KIND == INT4)
            if (rounded && d % GROUP == 0 && d <= MOST_GROUPS * GROUP)
                return of_blocks(InFloat32{}, [&](int64_t b, int64_t first, int64_t last, const Unit* P, float* to, Unit*) {
                    const auto rows = rows_of<KIND>(*V, b);
                    in_blocks(x, [&](int64_t q, auto X) {
                        weigh_whole<decltype(X)::value>(rows, (const float*)P + q * BLOCK, to + q * d, first, last, d);
                    });
                });
#endif
        of_blocks(InFloat32{}, [&](int64_t b, int64_t first, int64_t last, const Unit* P, float* to, Unit*) {
            const auto rows = rows_of<KIND>(*V, b);
            in_blocks(x, [&](int64_t q, auto X) {
                constexpr int N = decltype(X)::value, D = N <= 2 ? 8 : 16 / N;  // sixteen sums at a time
                weigh<N, D>(rows, (const float*)P + q * BLOCK, to + q * d, BLOCK, first, last, d);
            });
        });
    });
    for (int64_t part = 0; parts > 1 && part < parts; part++)
        for (int64_t i = 0; i < size; i++) Y[i] = (part ? Y[i] : 0) + out[part * size + i];
}

// Of every row of logits: the largest, exp(L - largest) in their place, and the sum of those.
void tpa_exponentials(float* L, float* most, float* total, int64_t rows, int64_t keys, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float* const at = L + row * keys;
        F highest = all(-INFINITY), sums = zero();
        for (int64_t k = 0; k < keys; k += W) highest = larger(highest, load_of(at + k, keys - k, -INFINITY));
        const float m = largest(highest);
        for (int64_t k = 0; k < keys; k += W) {
            const F p = exponential(minus(load_of(at + k, keys - k, -INFINITY), all(m)));
            save_of(at + k, keys - k, p);
            sums = fma(all(1), p, sums);
        }
        most[row] = m, total[row] = sum(sums);
    }
}

// C [tokens,R] -> the bytes of each token: out [tokens,bytes].
void tpa_quantize(const float* C, const int32_t* width, const float* tables, const float* scale, const float* inverse,
                  const float* reach, const float* price, uint8_t* out, int64_t tokens, int64_t coefficients,
                  int64_t bytes, int64_t free, int64_t threads) {
    const Trellis t{width, tables, scale, inverse, reach, price, coefficients, free};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> x(coefficients);
        std::vector<uint8_t> before(coefficients * (WINDOWS / 2)), path(1 + coefficients);
#pragma omp for schedule(static)
        for (int64_t k = 0; k < tokens; k++) {
            uint8_t *to = out + k * bytes, *const end = to + bytes;
            best_path(t, C + k * coefficients, x.data(), before.data(), path.data());
            *to++ = path[0];
            uint32_t string = 0;
            int bits = 0;  // of it that are not written yet
            for (int64_t s = 0; s < coefficients; s++) {
                string = string << width[s] | (path[s + 1] & ((1u << width[s]) - 1)), bits += width[s];
                if (bits >= 8) bits -= 8, *to++ = uint8_t(string >> bits);
            }
            if (to < end) *to = uint8_t(string << (8 - bits));
        }
    }
}

// out[b,s,k]: the coefficients of codes [b,bytes,k].
void tpa_levels(const uint8_t* codes, int64_t batch_stride, int64_t row, const Coefficient* of, const float* tables,
                const float* scale, float* out, int64_t batch, int64_t coefficients, int64_t keys, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < batch * coefficients; item++) {
        const int64_t b = item / coefficients, s = item % coefficients;
        const Codes here{codes + b * batch_stride, row};
        const float* table = tables + of[s].width * WINDOWS;
        uint8_t at[STRETCH];
        for (int64_t first = 0; first < keys; first += STRETCH) {
            const int64_t count = std::min(STRETCH, keys - first);
            const uint8_t* const size = here.at + first;
            float* const to = out + item * keys + first;
            windows(here, of[s], first, count, at);
            int64_t k = 0;
            for (; k + W <= count; k += W) save(to + k, times(levels(at + k, table), levels(size + k, scale)));
            for (; k < count; k++) to[k] = table[at[k]] * scale[size[k]];
        }
    }
}

// Y[b,y,s] = sum_k P[b,y,k] c(b,s,k). rounded: weights and levels in bfloat16, where the machine multiplies those.
void tpa_weigh_codes(const uint8_t* codes, int64_t batch_stride, int64_t row, const Coefficient* of,
                     const float* tables, const uint16_t* rounded_tables, const float* scale, const float* P, float* Y,
                     int64_t batch, int64_t y, int64_t keys, int64_t coefficients, int64_t rounded, int64_t threads) {
    const int64_t part = (coefficients + threads - 1) / threads;
    std::fill(Y, Y + batch * y * coefficients, 0.0f);
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t thread = 0; thread < threads; thread++) {
            const int64_t start = thread * part, count = std::min(coefficients, start + part) - start;
            if (count <= 0) continue;
            const Codes here{codes + b * batch_stride, row};
            std::vector<float> weights(8 * STRETCH);
            std::vector<uint16_t> halves(rounded ? 8 * STRETCH : 0);
            for (int64_t first = 0; first < keys; first += STRETCH) {
                const int64_t n = std::min(STRETCH, keys - first), padded = (n + 31) / 32 * 32;
                in_blocks(y, [&](int64_t q, auto N) {
                    constexpr int QUERIES = decltype(N)::value;
                    float* const out = Y + (b * y + q) * coefficients + start;
                    for (int i = 0; i < QUERIES; i++) {
                        const float* p = P + (b * y + q + i) * keys + first;
                        float* const w = &weights[i * STRETCH];
                        for (int64_t k = 0; k < n; k++) w[k] = p[k] * scale[here.at[first + k]];
                        std::fill(w + n, w + padded, 0.0f);
                        if (rounded) std::transform(w, w + padded, &halves[i * STRETCH], to_bf16);
                    }
#if TPA_BF16_DOT
                    if (rounded)
                        return weigh_codes_in_bf16<QUERIES>(here, of + start, count, rounded_tables, halves.data(),
                                                            padded, first, n, out, coefficients);
#endif
                    weigh_codes_in_float32<QUERIES>(here, of + start, count, tables, weights.data(), padded, first, n,
                                                    out, coefficients);
                });
            }
        }
}

// L[b,g,x,k] = sum_d rotated(K[b,k,g,d] + mean[g,d]) Q[b,g,x,d]: keys that were rebuilt before RoPE, pairs (i, i + d/2).
// K is float32 or bfloat16, [b][k][g][d] or by strides (in numbers); turns [k,d/2]: cos + i sin.
void tpa_dot_rotated(int64_t kind, const uint8_t* K, int64_t batch_stride, int64_t key_stride, int64_t head_stride,
                     const float* mean, const float* turns, int64_t turns_batch, const float* Q, float* L,
                     int64_t batch, int64_t g, int64_t x, int64_t keys, int64_t d, int64_t threads) {
    const int64_t half = d / 2, bytes = kind == F32 ? 4 : 2, blocks = (keys + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < batch * blocks; item++) {
        const int64_t b = item / blocks, first = item % blocks * ROWS, last = std::min(keys, first + ROWS);
        std::vector<float> cosine(half), sine(half), rotated(d);
        for (int64_t k = first; k < last; k++) {
            const float* turn = turns + b * turns_batch + k * d;
            for (int64_t i = 0; i < half; i++) cosine[i] = turn[2 * i], sine[i] = turn[2 * i + 1];
            for (int64_t head = 0; head < g; head++) {
                const uint8_t* at = K + bytes * (b * batch_stride + k * key_stride + head * head_stride);
                const float* centre = mean ? mean + head * d : nullptr;
                for (int64_t j = 0; j < half; j += W) {
                    F one = kind == F32 ? load((const float*)at + j) : load_bf16((const uint16_t*)at + j);
                    F two = kind == F32 ? load((const float*)at + half + j) : load_bf16((const uint16_t*)at + half + j);
                    if (centre) one = fma(all(1), one, load(centre + j)), two = fma(all(1), two, load(centre + half + j));
                    const F c = load(&cosine[j]), s = load(&sine[j]);
                    save(&rotated[j], fma(one, c, times(times(two, all(-1)), s)));
                    save(&rotated[half + j], fma(two, c, times(one, s)));
                }
                const Rows<F32> key{(const uint8_t*)rotated.data(), nullptr, nullptr, 0, 0};
                in_blocks(x, [&](int64_t q, auto X) {
                    const int64_t at_query = (b * g + head) * x + q;
                    float found[8];
                    dot<decltype(X)::value>(key, Q + at_query * d, found, 1, 0, 1, d);
                    for (int i = 0; i < decltype(X)::value; i++) L[(at_query + i) * keys + k] = found[i];
                });
            }
        }
    }
}

}  // extern "C"
