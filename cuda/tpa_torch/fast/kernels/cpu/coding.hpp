// New tokens into banded codes (see `core.banded`), of a few tokens and each of their groups of heads: string after string, each of
// what is left when those before it are decoded. Where there are fewer of them than threads, all threads read the matrices
// of one together, and one finds its best path.

#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "products.hpp"
#include "trellis.hpp"

namespace {
namespace coding {

constexpr int64_t ENOUGH_CODED = 1 << 16;  // coefficients times numbers from which on threads are worth waiting for

struct String {
    Trellis trellis;
    int64_t bytes;
};

struct Side {  // K, or V behind it, a group of which has:
    int64_t strings, before, rank, numbers, bytes;  // coefficients that K has; its own; numbers; bytes
    const String* of;
    const float *mean, *encoder, *basis;  // [groups,numbers], [groups,rank,numbers], [groups,before + rank,numbers]
};

struct Room {
    std::vector<float> left, asked, decoded, scaled;  // decoded: coefficients, with a minus
    std::vector<uint8_t> before, path;

    explicit Room(const Side* sides) : left(sides[0].numbers), decoded(sides[1].before + sides[1].rank) {
        int64_t most = 0;
        for (int64_t which = 0; which < 2; which++)
            for (int64_t n = 0; n < sides[which].strings; n++)
                most = std::max(most, sides[which].of[n].trellis.coefficients);
        asked.resize(most), scaled.resize(most), before.resize(most * (WINDOWS / 2)), path.resize(1 + most);
    }
};

// One group of a token, by some threads of a region: each has its share of every product.
inline void code(const Side* sides, const float* const* x, uint8_t* const* out, int64_t group, Room& room, int64_t thread,
                 int64_t threads) {
    const auto together = [&] {
        if (threads == 1) return;
#pragma omp barrier
    };
    float *left = room.left.data(), *asked = room.asked.data();
    for (int64_t which = 0; which < 2; which++) {
        const Side& side = sides[which];
        const int64_t registers = side.numbers / W, first = registers * thread / threads * W;
        const int64_t last = registers * (thread + 1) / threads * W;
        // left -= what is decoded times rows of the basis, of this thread's numbers
        const auto take = [&](const float* C, const float* basis, int64_t count) {
            const Rows<F32> rows{(const uint8_t*)(basis + first), nullptr, nullptr, 4 * side.numbers, 0};
            weigh<1, 8>(rows, C, left + first, count, 0, count, last - first);
        };
        const float* mean = side.mean + group * side.numbers;
        for (int64_t j = first; j < last; j += W) save(left + j, minus(load(x[which] + j), load(mean + j)));
        const float* basis = side.basis + group * (side.before + side.rank) * side.numbers;
        take(room.decoded.data(), basis, side.before);
        basis += side.before * side.numbers;
        float* C = room.decoded.data() + side.before;
        const float* encoder = side.encoder + group * side.rank * side.numbers;
        uint8_t* bytes = out[which];
        for (int64_t n = 0; n < side.strings; n++) {
            const String& string = side.of[n];
            const int64_t count = string.trellis.coefficients;
            const Rows<F32> rows{(const uint8_t*)encoder, nullptr, nullptr, 4 * side.numbers, 0};
            together();
            const int64_t start = count * thread / threads, end = count * (thread + 1) / threads;
            if (end > start) dot<1>(rows, left, asked + start, count, start, end, side.numbers);
            together();
            if (thread == 0 && count) {
                const Trellis& t = string.trellis;
                const uint8_t* path = room.path.data();
                best_path(t, asked, room.scaled.data(), room.before.data(), room.path.data());
                pack(t, path, bytes, string.bytes);
                for (int64_t s = 0; s < count; s++)
                    C[s] = -t.tables[t.width[s] * WINDOWS + path[s + 1]] * t.scale[path[0]];
            }
            together();
            if (n + 1 < side.strings) take(C, basis, count);
            C += count, encoder += count * side.numbers, basis += count * side.numbers, bytes += string.bytes;
        }
    }
}

}  // namespace coding
}  // namespace

// K and V [tokens,groups,numbers] -> their bytes [tokens,groups,bytes].
extern "C" void tpa_code_banded(const coding::Side* sides, const float* K, const float* V, uint8_t* codes_k,
                                uint8_t* codes_v, int64_t tokens, int64_t groups, int64_t threads) {
    const auto one = [&](int64_t item, coding::Room& room, int64_t thread, int64_t of) {
        const float* const x[2] = {K + item * sides[0].numbers, V + item * sides[1].numbers};
        uint8_t* const out[2] = {codes_k + item * sides[0].bytes, codes_v + item * sides[1].bytes};
        coding::code(sides, x, out, item % groups, room, thread, of);
    };
    const int64_t items = tokens * groups, multiplied = (sides[1].before + sides[1].rank) * sides[0].numbers;
    threads = multiplied * items < coding::ENOUGH_CODED ? 1 : threads;
    coding::Room shared(sides);
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
        const int64_t thread = 0, count = 1;
#endif
        if (items < count) {
            for (int64_t item = 0; item < items; item++) one(item, shared, thread, count);
        } else {
            coding::Room own(sides);
            for (int64_t item = items * thread / count; item < items * (thread + 1) / count; item++) one(item, own, 0, 1);
        }
    }
}
