// Keys and values as they are stored, times queries or probabilities.

#pragma once

#include "blocks.hpp"

namespace {

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

}  // namespace

extern "C" {

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

}  // extern "C"
