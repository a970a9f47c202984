// Keys that were rebuilt from a basis, turned and multiplied in one pass.

#pragma once

#include "rows.hpp"

extern "C" {

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
