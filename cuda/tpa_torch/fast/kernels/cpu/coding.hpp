// New tokens into banded codes (see `core.banded`), of a few tokens: string after string, each of what is left when those
// before it are decoded. Matrices are read by all threads, the best path is found by one.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "products.hpp"
#include "trellis.hpp"

namespace {
namespace coding {

struct String {
    Trellis trellis;
    int64_t bytes;
};

struct Side {  // K, or V behind it
    int64_t strings, before, numbers, bytes;  // coefficients that K has; numbers of a token, flattened; bytes of a token
    const String* of;
    const float *mean, *encoder, *basis;  // [numbers], [rank, numbers], [before + rank, numbers]
};

// One token, by all threads of a region: each has its share of every product. decoded: coefficients, with a minus.
struct Token {
    const float *x[2];
    uint8_t* out[2];
};

inline void code(const Side* sides, const Token& token, float* left, float* asked, float* decoded, float* scaled,
                 uint8_t* before, uint8_t* path, int64_t thread, int64_t threads) {
    for (int64_t which = 0; which < 2; which++) {
        const Side& side = sides[which];
        const int64_t groups = side.numbers / W, first = groups * thread / threads * W;
        const int64_t last = groups * (thread + 1) / threads * W;
        // left -= what is decoded times rows of the basis, of this thread's numbers
        const auto take = [&](const float* C, const float* basis, int64_t count) {
            const Rows<F32> rows{(const uint8_t*)(basis + first), nullptr, nullptr, 4 * side.numbers, 0};
            weigh<1, 8>(rows, C, left + first, count, 0, count, last - first);
        };
        for (int64_t j = first; j < last; j += W) save(left + j, minus(load(token.x[which] + j), load(side.mean + j)));
        take(decoded, side.basis, side.before);
        float* C = decoded + side.before;
        const float *encoder = side.encoder, *basis = side.basis + side.before * side.numbers;
        uint8_t* out = token.out[which];
        for (int64_t n = 0; n < side.strings; n++) {
            const String& string = side.of[n];
            const int64_t count = string.trellis.coefficients;
            const Rows<F32> rows{(const uint8_t*)encoder, nullptr, nullptr, 4 * side.numbers, 0};
#pragma omp barrier
            const int64_t start = count * thread / threads, end = count * (thread + 1) / threads;
            if (end > start) dot<1>(rows, left, asked + start, count, start, end, side.numbers);
#pragma omp barrier
            if (thread == 0 && count) {
                const Trellis& t = string.trellis;
                best_path(t, asked, scaled, before, path);
                pack(t, path, out, string.bytes);
                for (int64_t s = 0; s < count; s++)
                    C[s] = -t.tables[t.width[s] * WINDOWS + path[s + 1]] * t.scale[path[0]];
            }
#pragma omp barrier
            if (n + 1 < side.strings) take(C, basis, count);
            C += count, encoder += count * side.numbers, basis += count * side.numbers, out += string.bytes;
        }
    }
}

}  // namespace coding
}  // namespace

// K and V [tokens, numbers] -> their bytes [tokens, bytes].
extern "C" void tpa_code_banded(const coding::Side* sides, const float* K, const float* V, uint8_t* codes_k,
                                uint8_t* codes_v, int64_t tokens, int64_t threads) {
    int64_t most = 0, rank = sides[1].before;
    for (int64_t which = 0; which < 2; which++)
        for (int64_t n = 0; n < sides[which].strings; n++) most = std::max(most, sides[which].of[n].trellis.coefficients);
    rank += most;
    std::vector<float> left(sides[0].numbers), asked(most), decoded(rank), scaled(most);
    std::vector<uint8_t> before(most * (WINDOWS / 2)), path(1 + most);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
        const int64_t thread = 0, count = 1;
#endif
        for (int64_t k = 0; k < tokens; k++) {
            const coding::Token token{{K + k * sides[0].numbers, V + k * sides[1].numbers},
                                      {codes_k + k * sides[0].bytes, codes_v + k * sides[1].bytes}};
            coding::code(sides, token, left.data(), asked.data(), decoded.data(), scaled.data(), before.data(), path.data(),
                         thread, count);
        }
    }
}
