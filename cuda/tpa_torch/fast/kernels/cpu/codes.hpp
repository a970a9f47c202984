// Spectral codes (see `codes`), weighed as they are, or as coefficients.

#pragma once

#include "blocks.hpp"

namespace {

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

}  // namespace

extern "C" {

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

}  // extern "C"
