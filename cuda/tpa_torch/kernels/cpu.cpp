// Products with numbers that are stored in few bits, on a CPU. Compiled by `native.py` with the machine's own compiler.
//
// Of int8, int4 and packed codes PyTorch first makes an array of float32, which costs more than the product; and its
// products with a few queries take two to five times as long as reading the keys, since the libraries behind it copy them
// into another order first. These functions read what is stored as it lies, once, and make numbers in registers. Letters
// as everywhere: b batch (or batch times heads), k keys, d head size, x or y queries, s coefficients.
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
constexpr int ROWS = 32;     // keys whose numbers stay in the nearest cache
enum Kind { F32, BF16, INT8, INT4 };

#if TPA_AVX512

using F = __m512;
inline F zero() { return _mm512_setzero_ps(); }
inline F all(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void save(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F times(F a, F b) { return _mm512_mul_ps(a, b); }
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
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
inline F fma(const F& a, const F& b, const F& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F times(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline float sum(const F& x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x.v[i];
    return total;
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

// Keys or values of one head (or rank) as they are stored: row k at `at + k * row`, its scales at `scale + k * step`.
template <Kind KIND> struct Rows {
    const uint8_t* at;
    const uint16_t *scale, *minimum;
    int64_t row, step;  // bytes; numbers

    const uint8_t* key(int64_t k) const { return at + k * row; }
    // Numbers j ... j + 15 of key k.
    F numbers(int64_t k, int64_t j) const {
        const uint8_t* p = key(k);
        if constexpr (KIND == F32) return load((const float*)p + j);
        if constexpr (KIND == BF16) return load_bf16((const uint16_t*)p + j);
        const F s = all(from_half(scale[k * step + j / GROUP]));
        if constexpr (KIND == INT8) return times(load_int8((const int8_t*)p + j), s);
        return fma(load_int4(p + j / 2), s, all(from_half(minimum[k * step + j / GROUP])));
    }
};

// L[x,k] = sum_d K[k,d] Q[x,d] of X queries and the keys first ... last - 1. L has rows of length `keys`.
template <int X, class R>
void dot(const R& K, const float* Q, float* L, int64_t first, int64_t last, int64_t keys, int64_t d) {
    for (int64_t k = first; k < last; k++) {
        F total[X];
        for (int x = 0; x < X; x++) total[x] = zero();
        for (int64_t j = 0; j < d; j += W) {
            const F numbers = K.numbers(k, j);
            for (int x = 0; x < X; x++) total[x] = fma(numbers, load(Q + x * d + j), total[x]);
        }
        for (int x = 0; x < X; x++) L[x * keys + k] = sum(total[x]);
    }
}

#if TPA_INT16_DOT
// The same of int8 keys, in whole numbers: each group of 64 of a query is rounded to 16 bits, a hundred times finer than
// its keys. Q16 [x,d], and its steps [x,groups]; whole groups only.
template <int X>
void dot_int8(const Rows<INT8>& K, const int16_t* Q16, const float* steps, float* L, int64_t first, int64_t last,
              int64_t keys, int64_t d) {
    const int64_t groups = d / GROUP;
    for (int64_t k = first; k < last; k++) {
        F total[X];
        for (int x = 0; x < X; x++) total[x] = zero();
        for (int64_t group = 0; group < groups; group++) {
            const uint8_t* p = K.key(k) + group * GROUP;
            const __m512i low = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
            const __m512i high = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(p + 32)));
            const float scale = from_half(K.scale[k * K.step + group]);
            for (int x = 0; x < X; x++) {
                const int16_t* q = Q16 + x * d + group * GROUP;
                __m512i found = _mm512_dpwssd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(q));
                found = _mm512_dpwssd_epi32(found, high, _mm512_loadu_si512(q + 32));
                total[x] = fma(_mm512_cvtepi32_ps(found), all(scale * steps[x * groups + group]), total[x]);
            }
        }
        for (int x = 0; x < X; x++) L[x * keys + k] = sum(total[x]);
    }
}
#endif

// Y[x,d] += sum_k P[x,k] V[k,d] of X queries.
template <int X, int D, class R>
void weigh(const R& V, const float* P, float* Y, int64_t first, int64_t last, int64_t keys, int64_t d) {
    for (int64_t j = 0; j < d; j += D * W) {
        F total[X][D];
        const int here = int(std::min<int64_t>(D, (d - j) / W));
        if (here < D) {  // the last columns, one by one
            for (int64_t i = j; i < d; i += W)
                for (int x = 0; x < X; x++) {
                    F y = load(Y + x * d + i);
                    for (int64_t k = first; k < last; k++) y = fma(V.numbers(k, i), all(P[x * keys + k]), y);
                    save(Y + x * d + i, y);
                }
            return;
        }
        for (int x = 0; x < X; x++)
            for (int c = 0; c < D; c++) total[x][c] = load(Y + x * d + j + c * W);
        for (int64_t k = first; k < last; k++) {
            F numbers[D];
            for (int c = 0; c < D; c++) numbers[c] = V.numbers(k, j + c * W);
            for (int x = 0; x < X; x++) {
                const F p = all(P[x * keys + k]);
                for (int c = 0; c < D; c++) total[x][c] = fma(numbers[c], p, total[x][c]);
            }
        }
        for (int x = 0; x < X; x++)
            for (int c = 0; c < D; c++) save(Y + x * d + j + c * W, total[x][c]);
    }
}

// Calls work(x, integral constant) for x in steps of 8, 4, 2, 1.
template <int N> struct Count { static constexpr int value = N; };
template <class Work> void in_blocks(int64_t queries, Work work) {
    int64_t x = 0;
    for (; queries - x >= 8; x += 8) work(x, Count<8>{});
    if (queries - x >= 4) work(x, Count<4>{}), x += 4;
    if (queries - x >= 2) work(x, Count<2>{}), x += 2;
    if (queries - x >= 1) work(x, Count<1>{});
}

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

// ---- packed codes of coefficients (see `quantize`) ----

// A coefficient: the digits in rows of bytes, the table of its levels, how many they are.
struct Coefficient {
    int32_t pieces, width;
    int32_t row[3], shift[3], mask[3], left[3];
};

struct Codes {
    const uint8_t* at;  // [bytes, keys], rows `row` apart
    int64_t row;
};

constexpr int64_t TABLE = 256;     // levels of a width
constexpr int64_t STRETCH = 512;  // keys whose weights, of eight queries, stay in the first cache

// The codes of coefficient c at `count` keys from `first` on, a byte each; zeros behind them up to a multiple of 64.
void unpack(const Codes& codes, const Coefficient& c, int64_t first, int64_t count, uint8_t* out) {
    for (int i = 0; i < c.pieces; i++) {
        const uint8_t* p = codes.at + c.row[i] * codes.row + first;
#if TPA_AVX512
        const __m128i right = _mm_cvtsi32_si128(c.shift[i]), left = _mm_cvtsi32_si128(c.left[i]);
        const __m512i mask = _mm512_set1_epi8(char(c.mask[i]));
        for (int64_t k = 0; k < count; k += 64) {  // what a shift of two bytes brings from one into the other is masked
            const __mmask64 here = count - k >= 64 ? ~0ull : (1ull << (count - k)) - 1;
            __m512i x = _mm512_and_si512(_mm512_srl_epi16(_mm512_maskz_loadu_epi8(here, p + k), right), mask);
            x = _mm512_sll_epi16(x, left);
            if (i) x = _mm512_or_si512(x, _mm512_loadu_si512(out + k));
            _mm512_storeu_si512(out + k, x);
        }
#else
        for (int64_t k = 0; k < count; k++) {
            const int digits = (p[k] >> c.shift[i] & c.mask[i]) << c.left[i];
            out[k] = uint8_t(i ? out[k] | digits : digits);
        }
        std::fill(out + count, out + (count + 63) / 64 * 64, uint8_t(0));
#endif
    }
}

// Sixteen levels, by their codes.
inline F levels(const uint8_t* codes, const float* table, int width) {
#if TPA_AVX512
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    if (width <= 4) return _mm512_permutexvar_ps(at, _mm512_loadu_ps(table));
    if (width == 5) return _mm512_permutex2var_ps(_mm512_loadu_ps(table), at, _mm512_loadu_ps(table + 16));
    return _mm512_i32gather_ps(at, table, 4);
#else
    (void)width;
    return each([=](int i) { return table[codes[i]]; });
#endif
}

// Y[y,s] += sum_k P[y,k] level(s,k) of one stretch of keys; P is padded with zeros to whole registers.
template <int Y>
void weigh_codes_in_float32(const Codes& codes, const Coefficient* of, int64_t coefficients, const float* tables,
                            const float* P, int64_t padded, int64_t first, int64_t keys, float* out, int64_t row) {
    uint8_t at[STRETCH];
    for (int64_t s = 0; s < coefficients; s++) {
        unpack(codes, of[s], first, keys, at);
        F total[Y];
        for (int y = 0; y < Y; y++) total[y] = zero();
        for (int64_t k = 0; k < padded; k += W) {
            const F x = levels(at + k, tables + of[s].width * TABLE, of[s].width);
            for (int y = 0; y < Y; y++) total[y] = fma(x, load(P + y * STRETCH + k), total[y]);
        }
        for (int y = 0; y < Y; y++) out[y * row + s] += sum(total[y]);
    }
}

#if TPA_BF16_DOT
inline __m512bh levels_in_bf16(const uint8_t* codes, const uint16_t* table, int width) {
    const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes)), low = _mm512_loadu_si512(table);
    if (width <= 5) return (__m512bh)_mm512_permutexvar_epi16(at, low);
    if (width == 6) return (__m512bh)_mm512_permutex2var_epi16(low, at, _mm512_loadu_si512(table + 32));
    uint16_t x[32];
    for (int i = 0; i < 32; i++) x[i] = table[codes[i]];
    return (__m512bh)_mm512_loadu_si512(x);
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
        unpack(codes, one, first, keys, at[0]);
        unpack(codes, two, first, keys, at[1]);
        F total[Y][2];
        for (int y = 0; y < Y; y++) total[y][0] = total[y][1] = zero();
        for (int64_t k = 0; k < padded; k += 2 * W) {
            const __m512bh x0 = levels_in_bf16(at[0] + k, tables + one.width * TABLE, one.width);
            const __m512bh x1 = levels_in_bf16(at[1] + k, tables + two.width * TABLE, two.width);
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

uint16_t to_bf16(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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
        in_blocks(rows, [&](int64_t r, auto X) { dot<decltype(X)::value>(all_rows, x + r * m, y + r * n, start, end, n, m); });
    }
}

// L[b,x,k] = sum_d K[b,k,d] Q[b,x,d]. rounded: queries of int8 keys in 16 bits, where the machine multiplies those.
void tpa_dot(const Array* K, const float* Q, float* L, int64_t batch, int64_t x, int64_t keys, int64_t d,
             int64_t rounded, int64_t threads) {
    const int64_t blocks = (keys + ROWS - 1) / ROWS;
    (void)rounded;
#if TPA_INT16_DOT
    if (rounded && K->kind == INT8 && d % GROUP == 0) {
        const int64_t groups = d / GROUP;
        std::vector<int16_t> Q16(batch * x * d);
        std::vector<float> steps(batch * x * groups);
        for (size_t group = 0; group < steps.size(); group++) {
            const float* q = Q + group * GROUP;
            float most = 0;
            for (int i = 0; i < GROUP; i++) most = std::max(most, std::fabs(q[i]));
            steps[group] = most / 32767;
            for (int i = 0; i < GROUP; i++) Q16[group * GROUP + i] = most > 0 ? int16_t(std::lrint(q[i] / most * 32767)) : 0;
        }
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t item = 0; item < batch * blocks; item++) {
            const int64_t b = item / blocks, first = item % blocks * ROWS, last = std::min(keys, first + ROWS);
            in_blocks(x, [&](int64_t q, auto X) {
                dot_int8<decltype(X)::value>(rows_of<INT8>(*K, b), &Q16[(b * x + q) * d], &steps[(b * x + q) * groups],
                                             L + (b * x + q) * keys, first, last, keys, d);
            });
        }
        return;
    }
#endif
    of_kind(K->kind, [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t item = 0; item < batch * blocks; item++) {
            const int64_t b = item / blocks, first = item % blocks * ROWS, last = std::min(keys, first + ROWS);
            const auto rows = rows_of<KIND>(*K, b);
            in_blocks(x, [&](int64_t q, auto X) {
                dot<decltype(X)::value>(rows, Q + (b * x + q) * d, L + (b * x + q) * keys, first, last, keys, d);
            });
        }
    });
}

// Y[b,x,d] = sum_k P[b,x,k] V[b,k,d].
void tpa_weigh(const Array* V, const float* P, float* Y, int64_t batch, int64_t x, int64_t keys, int64_t d, int64_t threads) {
    const int64_t parts = splits(batch, keys, threads), size = batch * x * d;
    std::vector<float> sums(parts > 1 ? parts * size : 0);
    float* const out = parts > 1 ? sums.data() : Y;
    std::fill(out, out + parts * size, 0.0f);
    of_kind(V->kind, [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t item = 0; item < batch * parts; item++) {
            const int64_t b = item / parts, part = item % parts;
            const auto rows = rows_of<KIND>(*V, b);
            const int64_t end = keys * (part + 1) / parts;
            for (int64_t first = keys * part / parts; first < end; first += ROWS) {
                const int64_t last = std::min(end, first + ROWS);
                in_blocks(x, [&](int64_t q, auto X) {
                    constexpr int N = decltype(X)::value, D = N <= 2 ? 8 : 16 / N;  // sixteen sums at a time
                    weigh<N, D>(rows, P + (b * x + q) * keys, out + part * size + (b * x + q) * d, first, last, keys, d);
                });
            }
        }
    });
    for (int64_t part = 0; parts > 1 && part < parts; part++)
        for (int64_t i = 0; i < size; i++) Y[i] = (part ? Y[i] : 0) + out[part * size + i];
}

// out[b,s,k]: the levels of packed codes [b,bytes,k].
void tpa_levels(const uint8_t* codes, int64_t batch_stride, int64_t row, const Coefficient* of, const float* tables,
                float* out, int64_t batch, int64_t coefficients, int64_t keys, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < batch * coefficients; item++) {
        const int64_t b = item / coefficients, s = item % coefficients;
        const Codes here{codes + b * batch_stride, row};
        uint8_t at[STRETCH];
        for (int64_t first = 0; first < keys; first += STRETCH) {
            const int64_t count = std::min(STRETCH, keys - first);
            float* const to = out + item * keys + first;
            unpack(here, of[s], first, count, at);
            const float* table = tables + of[s].width * TABLE;
            int64_t k = 0;
            for (; k + W <= count; k += W) save(to + k, levels(at + k, table, of[s].width));
            for (; k < count; k++) to[k] = table[at[k]];
        }
    }
}

// Y[b,y,s] = sum_k P[b,y,k] level(b,s,k). rounded: weights and levels in bfloat16, where the machine multiplies those.
void tpa_weigh_codes(const uint8_t* codes, int64_t batch_stride, int64_t row, const Coefficient* of,
                     const float* tables, const uint16_t* rounded_tables, const float* P, float* Y, int64_t batch,
                     int64_t y, int64_t keys, int64_t coefficients, int64_t rounded, int64_t threads) {
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
                        if (rounded) {
                            std::transform(p, p + n, &halves[i * STRETCH], to_bf16);
                            std::fill(&halves[i * STRETCH] + n, &halves[i * STRETCH] + padded, 0);
                        } else {
                            std::copy(p, p + n, &weights[i * STRETCH]);
                            std::fill(&weights[i * STRETCH] + n, &weights[i * STRETCH] + padded, 0.0f);
                        }
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
                    dot<decltype(X)::value>(key, Q + at_query * d, found, 0, 1, 1, d);
                    for (int i = 0; i < decltype(X)::value; i++) L[(at_query + i) * keys + k] = found[i];
                });
            }
        }
    }
}

}  // extern "C"
