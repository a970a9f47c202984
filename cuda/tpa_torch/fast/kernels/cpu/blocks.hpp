// Products of stored rows with many queries: what they multiply decides.

#pragma once

#include "rows.hpp"

namespace {

constexpr int MANY = 8;      // queries from which on multiplications, not memory, take the time
constexpr int STRIDE = 272;  // units between keys of a block: no power of two, so that they lie in different cache lines

// What is multiplied in one go, in 32 bits: a number in float32, or two in bfloat16, whose products are added in float32.
using Unit = uint32_t;

struct InFloat32 {
    static constexpr int NUMBERS = 1;
    static F add_product(F total, const Unit* one, const Unit* sixteen) {
        return fma(all(*(const float*)one), load((const float*)sixteen), total);
    }
    static F add_products(F total, const Unit* one, const Unit* two) {
        return fma(load((const float*)one), load((const float*)two), total);
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
    static F add_products(F total, const Unit* one, const Unit* two) {
        return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(one), (__m512bh)_mm512_loadu_si512(two));
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

}  // namespace
