// Weight matrices as they are stored, times few rows: what they read decides.

#pragma once

#include "blocks.hpp"

namespace {

constexpr int SHARE = 32;   // int8 weights that share a scale
constexpr int STRIP = 16;   // rows of a matrix that a thread takes at a time
constexpr int FORWARD = 1024;  // bytes of a row between what is multiplied and what memory is asked for meanwhile

struct Matrix {  // [n,m], row behind row; scale: of int8, in float16, [n,m / 32]
    int64_t kind;
    const uint8_t* at;
    const uint16_t* scale;
};

template <Kind KIND> struct Weight {
    const uint8_t* at;
    const uint16_t* scale;

    // Numbers i ... i + 15 of all, counted through the rows.
    F numbers(int64_t i) const {
        if constexpr (KIND == F32) return load((const float*)at + i);
        if constexpr (KIND == BF16) return load_bf16((const uint16_t*)at + i);
        return times(load_int8((const int8_t*)at + i), all(from_half(scale[i / SHARE])));
    }
    void fetch(int64_t i) const { soon(at + Rows<KIND>::bytes(i) + FORWARD); }
};

// y[x,n] = sum_m W[n,m] x[x,m] of X rows x and N rows of W from the n-th on; rows of y are `width` apart.
template <int X, int N, class WEIGHT>
inline void strip(const WEIGHT& of, const float* x, float* y, int64_t width, int64_t n, int64_t m) {
    F total[N][X];
    for (int i = 0; i < N; i++)
        for (int q = 0; q < X; q++) total[i][q] = zero();
    for (int64_t j = 0; j < m; j += W) {
        F one[X];
        for (int q = 0; q < X; q++) one[q] = load(x + q * m + j);
        for (int i = 0; i < N; i++) {
            of.fetch((n + i) * m + j);
            const F numbers = of.numbers((n + i) * m + j);
            for (int q = 0; q < X; q++) total[i][q] = fma(numbers, one[q], total[i][q]);
        }
    }
    for (int i = 0; i < N; i++)
        for (int q = 0; q < X; q++) y[q * width + n + i] = sum(total[i][q]);
}

// The same of any number of rows x, and rows first ... last - 1 of W.
void multiply(const Matrix& matrix, const float* x, float* y, int64_t rows, int64_t width, int64_t first, int64_t last,
              int64_t m) {
    const auto of_kind = [&](auto kind) {
        const Weight<Kind(decltype(kind)::value)> of{matrix.at, matrix.scale};
        in_blocks(rows, [&](int64_t r, auto count) {
            constexpr int X = decltype(count)::value, N = X <= 2 ? 4 : 2;
            int64_t n = first;
            for (; last - n >= N; n += N) strip<X, N>(of, x + r * m, y + r * width, width, n, m);
            for (; n < last; n++) strip<X, 1>(of, x + r * m, y + r * width, width, n, m);
        });
    };
    if (matrix.kind == F32) of_kind(Count<F32>{});
    if (matrix.kind == BF16) of_kind(Count<BF16>{});
    if (matrix.kind == INT8) of_kind(Count<INT8>{});
}

}  // namespace

extern "C" {

// y[r,n] = sum_m x[r,m] W[n,m], x and y in float32.
void tpa_linear(const Matrix* weights, const float* x, float* y, int64_t rows, int64_t n, int64_t m, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < n; first += STRIP)
        multiply(*weights, x, y, rows, n, first, std::min(n, first + STRIP), m);
}

}  // extern "C"
