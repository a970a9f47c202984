// Stored rows of keys, values or weights, and their products with few queries: what they read decides.

#pragma once

#include "registers.hpp"

namespace {

constexpr int GROUP = 64;    // numbers that share a scale
constexpr int ROWS = 32;     // rows of a matrix, or rebuilt keys, that a thread takes at a time
constexpr int BLOCK = 16;    // stored keys whose numbers stay in the nearest cache
constexpr int AHEAD = 32;    // keys between those that are multiplied and those that memory is asked for meanwhile
constexpr int LINE = 64;     // bytes that memory sends at once
constexpr int MOST_GROUPS = 4;  // of a key that is multiplied in whole numbers
// Numbers to read from which on another thread is worth it: one that the system holds up holds up all others.
constexpr int64_t ENOUGH = 1 << 19;
inline int64_t team(int64_t numbers, int64_t threads) { return std::min(threads, 1 + numbers / ENOUGH); }
enum Kind { F32, BF16, INT8, INT4 };

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

}  // namespace
