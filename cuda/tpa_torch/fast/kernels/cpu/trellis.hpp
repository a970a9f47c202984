// The best path through the trellis (see `codes.best_path`).

#pragma once

#include "codes.hpp"

namespace {

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

// First byte and windows [1 + R] -> the bytes of the token.
void pack(const Trellis& t, const uint8_t* path, uint8_t* to, int64_t bytes) {
    uint8_t* const end = to + bytes;
    if (!bytes) return;
    *to++ = path[0];
    uint32_t string = 0;
    int bits = 0;  // of it that are not written yet
    for (int64_t s = 0; s < t.coefficients; s++) {
        string = string << t.width[s] | (path[s + 1] & ((1u << t.width[s]) - 1)), bits += t.width[s];
        if (bits >= 8) bits -= 8, *to++ = uint8_t(string >> bits);
    }
    if (to < end) *to = uint8_t(string << (8 - bits));
}

}  // namespace

extern "C" {

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
            best_path(t, C + k * coefficients, x.data(), before.data(), path.data());
            pack(t, path.data(), out + k * bytes, bytes);
        }
    }
}

}  // extern "C"
