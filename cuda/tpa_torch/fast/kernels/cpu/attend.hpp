// Attention of few queries over stored keys and values of which nothing is masked, in one go.

#pragma once

#include "products.hpp"

namespace {

constexpr int64_t TILE = 256;  // keys whose logits stay in the nearest cache

// What queries have seen so far: the largest logit, the sum of exponentials beside it, and that of values, [x][d].
struct Seen {
    float *most, *total, *Y;
    int64_t d;

    // Another largest logit: what was added up so far weighs less.
    void raise(int64_t x, float to) const {
        const float weight = std::exp(most[x] - to);
        for (int64_t j = 0; j < d; j += W) save(Y + x * d + j, times(load(Y + x * d + j), all(weight)));
        total[x] *= weight, most[x] = to;
    }
    void add(int64_t x, const Seen& other, int64_t y) const {
        if (other.most[y] > most[x]) raise(x, other.most[y]);
        const float weight = std::exp(other.most[y] - most[x]);
        for (int64_t j = 0; j < d; j += W)
            save(Y + x * d + j, fma(load(other.Y + y * d + j), all(weight), load(Y + x * d + j)));
        total[x] += weight * other.total[y];
    }
};

// Logits [X][TILE] of a tile -> exponentials beside the largest so far.
template <int X> void exponentials(float* L, int64_t keys, const Seen& seen, int64_t x) {
    for (int q = 0; q < X; q++) {
        float* const at = L + q * TILE;
        F highest = all(-INFINITY), sums = zero();
        for (int64_t k = 0; k < keys; k += W) highest = larger(highest, load_of(at + k, keys - k, -INFINITY));
        if (largest(highest) > seen.most[x + q]) seen.raise(x + q, largest(highest));
        for (int64_t k = 0; k < keys; k += W) {
            const F p = exponential(minus(load_of(at + k, keys - k, -INFINITY), all(seen.most[x + q])));
            save(at + k, p);
            sums = fma(all(1), p, sums);
        }
        seen.total[x + q] += sum(sums);
    }
}

// Keys first ... last - 1 for all queries, tile by tile; Q [x][d], or, rounded, in groups of 16 bits.
template <Kind KIND>
void see(const Rows<KIND>& K, const Rows<KIND>& V, const float* Q, const void* groups, const Seen& seen, int64_t x,
         int64_t first, int64_t last, int64_t d) {
    (void)groups;
    for (int64_t start = first; start < last; start += TILE) {
        const int64_t end = std::min(last, start + TILE);
        in_blocks(x, [&](int64_t q, auto count) {
            constexpr int X = decltype(count)::value, D = X <= 2 ? 8 : 16 / X;  // sixteen sums at a time
            float L[X * TILE];
#if TPA_INT16_DOT
            if constexpr (KIND == INT8 || KIND == INT4)
                if (groups) {
                    dot_whole<X>(K, (const Group*)groups + q * (d / GROUP), L, TILE, start, end, d);
                    exponentials<X>(L, end - start, seen, q);
                    for (int64_t k = start; k < end; k += BLOCK) {
                        float P[X * BLOCK];
                        for (int i = 0; i < X; i++) save(P + i * BLOCK, load(L + i * TILE + k - start));
                        weigh_whole<X>(V, P, seen.Y + q * d, k, std::min(end, k + BLOCK), d);
                    }
                    return;
                }
#endif
            dot<X>(K, Q + q * d, L, TILE, start, end, d);
            exponentials<X>(L, end - start, seen, q);
            weigh<X, D>(V, L, seen.Y + q * d, TILE, start, end, d);
        });
    }
}

}  // namespace

extern "C" {

// Of x few queries Q [b,x,d] and all keys: the largest logit and the sum of exponentials beside it [b,x], and the values
// weighed with those, Y [b,x,d]. K and V are stored alike. rounded: as in tpa_dot.
void tpa_attend(const Array* K, const Array* V, const float* Q, float* most, float* total, float* Y, int64_t batch,
                int64_t x, int64_t keys, int64_t d, int64_t rounded, int64_t threads) {
    threads = team(2 * batch * keys * d, threads);
    const int64_t parts = splits(batch, keys, threads), size = batch * x;
    std::vector<float> apart((parts - 1) * size * (d + 2));
    const auto seen_by = [&](int64_t part, int64_t b) {  // the first part's is the result
        float* const at = part ? &apart[(part - 1) * size * (d + 2)] : nullptr;
        return Seen{(part ? at : most) + b * x, (part ? at + size : total) + b * x,
                    (part ? at + 2 * size : Y) + b * x * d, d};
    };
    (void)rounded;
    of_kind(K->kind, [&](auto kind) {
        constexpr Kind KIND = Kind(decltype(kind)::value);
        const void* groups = nullptr;
#if TPA_INT16_DOT
        std::vector<Group> of_queries;
        if ((KIND == INT8 || KIND == INT4) && rounded && d % GROUP == 0 && d <= MOST_GROUPS * GROUP) {
            of_queries.resize(size * (d / GROUP));
            round_groups(Q, size * (d / GROUP), of_queries.data());
            groups = of_queries.data();
        }
        const int64_t step = d / GROUP * sizeof(Group);
#else
        const int64_t step = 0;
#endif
#pragma omp parallel for schedule(static) num_threads(std::min(threads, batch * parts))
        for (int64_t item = 0; item < batch * parts; item++) {
            const int64_t b = item / parts, part = item % parts;
            const Seen seen = seen_by(part, b);
            std::fill(seen.most, seen.most + x, -INFINITY), std::fill(seen.total, seen.total + x, 0.0f);
            std::fill(seen.Y, seen.Y + x * d, 0.0f);
            see(rows_of<KIND>(*K, b), rows_of<KIND>(*V, b), Q + b * x * d,
                groups ? (const uint8_t*)groups + b * x * step : nullptr, seen, x, keys * part / parts,
                keys * (part + 1) / parts, d);
        }
    });
    for (int64_t part = 1; part < parts; part++)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t q = 0; q < x; q++) seen_by(0, b).add(q, seen_by(part, b), q);
}

}  // extern "C"
