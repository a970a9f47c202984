// Sixteen numbers at a time: on AVX-512 one register, elsewhere a short loop that the compiler makes vectors of.

#pragma once

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

constexpr int W = 16;  // numbers at a time

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
inline F over(F x, F y) { return _mm512_div_ps(x, y); }
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
inline F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

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
inline F over(const F& x, const F& y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
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
inline F load_half(const uint16_t* p) { return each([=](int i) { return from_half(p[i]); }); }

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

}  // namespace
