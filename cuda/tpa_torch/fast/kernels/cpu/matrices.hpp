// Weight matrices as they are stored, times few rows: what they read decides.

#pragma once

#include "blocks.hpp"

namespace {

constexpr int SHARE = 32;  // int8 weights that share a scale
constexpr int STRIP = 16;  // rows of a matrix that a thread takes at a time

struct Matrix {  // [n,m], row behind row; scale: of int8, in float16, [n,m / 32]
    int64_t kind;
    const uint8_t* at;
    const uint16_t* scale;
};

// Numbers j ... j + 15 of an array in float32 or bfloat16.
inline F read(const uint8_t* p, int64_t kind, int64_t j) {
    return kind == F32 ? load((const float*)p + j) : load_bf16((const uint16_t*)p + j);
}

inline void write(uint8_t* p, int64_t kind, int64_t j, F x) {
    if (kind == F32) return save((float*)p + j, x);
    float numbers[W];
    save(numbers, x);
    for (int i = 0; i < W; i++)  // rounding would make an infinity, or a number, of some NaN
        ((uint16_t*)p)[j + i] = numbers[i] == numbers[i] ? to_bf16(numbers[i]) : 0x7fc0;
}

// Some rows of a matrix; scales: theirs, in float32.
template <Kind KIND> struct Strip {
    const uint8_t* at;
    const float* scales;

    // Numbers i ... i + 15, counted through the rows.
    F numbers(int64_t i) const {
        if constexpr (KIND == F32) return load((const float*)at + i);
        if constexpr (KIND == BF16) return load_bf16((const uint16_t*)at + i);
        return times(load_int8((const int8_t*)at + i), all(scales[uint64_t(i) / SHARE]));
    }
};

// y[x] = sum_m W[n,m] x[x,m] of X rows x and one row of W. Memory is read in one stream: that is as fast as it goes.
template <int X, class OF>
inline void product(const OF& of, const float* x, float* y, int64_t width, int64_t n, int64_t m) {
    F one[X], two[X];  // sums of which neither waits for the other
    for (int q = 0; q < X; q++) one[q] = two[q] = zero();
    int64_t j = 0;
    for (; j + W < m; j += 2 * W) {
        const F low = of.numbers(n * m + j), high = of.numbers(n * m + j + W);
        for (int q = 0; q < X; q++) {
            one[q] = fma(low, load(x + q * m + j), one[q]);
            two[q] = fma(high, load(x + q * m + j + W), two[q]);
        }
    }
    if (j < m)
        for (int q = 0; q < X; q++) one[q] = fma(of.numbers(n * m + j), load(x + q * m + j), one[q]);
    for (int q = 0; q < X; q++) y[q * width] = sum(fma(all(1), one[q], two[q]));
}

// The same of any number of rows x, and rows first ... last - 1 of W; rows of y are `width` apart.
void multiply(const Matrix& matrix, const float* x, float* y, int64_t rows, int64_t width, int64_t first, int64_t last,
              int64_t m) {
    std::vector<float> scales(matrix.kind == INT8 ? (last - first) * m / SHARE : 0);
    for (size_t i = 0; i + W <= scales.size(); i += W) save(&scales[i], load_half(matrix.scale + first * m / SHARE + i));
    for (size_t i = scales.size() / W * W; i < scales.size(); i++)
        scales[i] = from_half(matrix.scale[first * m / SHARE + i]);
    const auto of_kind = [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
        const Strip<KIND> of{matrix.at + Rows<KIND>::bytes(first * m), scales.data()};
        in_blocks(rows, [&](int64_t r, auto count) {
            for (int64_t n = 0; n < last - first; n++)
                product<decltype(count)::value>(of, x + r * m, y + r * width + first + n, width, n, m);
        });
    };
    if (matrix.kind == F32) of_kind(Count<F32>{});
    if (matrix.kind == BF16) of_kind(Count<BF16>{});
    if (matrix.kind == INT8) of_kind(Count<INT8>{});
}

}  // namespace

extern "C" {

// int8 weights, whole groups of them, as float32 or bfloat16.
void tpa_widen(const uint8_t* codes, const uint16_t* scale, int64_t kind, uint8_t* out, int64_t count, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t group = 0; group < count / SHARE; group++)
        for (int64_t i = group * SHARE; i < (group + 1) * SHARE; i += W)
            write(out, kind, i, times(load_int8((const int8_t*)codes + i), all(from_half(scale[group]))));
}

// y[r,n] = sum_m x[r,m] W[n,m], x and y in float32.
void tpa_linear(const Matrix* weights, const float* x, float* y, int64_t rows, int64_t n, int64_t m, int64_t threads) {
    threads = team(n * m, threads);
    const int64_t strips = std::clamp<int64_t>(n / STRIP / (4 * threads), 1, 8);  // at a time; a thread may be held up
#pragma omp parallel for schedule(dynamic, strips) num_threads(threads)
    for (int64_t first = 0; first < n; first += STRIP)
        multiply(*weights, x, y, rows, n, first, std::min(n, first + STRIP), m);
}

}  // extern "C"
