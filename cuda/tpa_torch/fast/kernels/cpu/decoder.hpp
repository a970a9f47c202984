// One token of one text through all layers (see `decoder.py`): the functions of `layer.hpp`, `coding.hpp`, `banded.hpp` and
// `attend.hpp` one after the other, on the arrays of a cache.

#pragma once

#include "attend.hpp"
#include "banded.hpp"
#include "coding.hpp"
#include "layer.hpp"

namespace {
namespace decoder {

struct Held {  // what a layer keeps of one text
    const banded::Bands* bands;   // of coded K and V; none: the heads as they are, K turned
    const coding::Side* sides;
    banded::Segment codes;        // where the codes lie
    Array K, V;                   // else [g,slots,d]
    Array first_K, first_V;       // the first tokens, kept as they are: [g,sinks,d]
    int64_t slots, sinks, window;  // window: 0 for all tokens
    int64_t is_global;
};

struct Part {  // neighbours in a ring
    int64_t slot, position, count;
};

// Where the tokens from `first` to `last` lie in a ring, of which they fill at most all.
inline std::vector<Part> parts(int64_t first, int64_t last, int64_t slots) {
    std::vector<Part> found;
    for (int64_t t = first, count; t <= last; t += count) {
        count = std::min(last - t + 1, slots - t % slots);
        found.push_back({t % slots, t, count});
    }
    return found;
}

// The queries of a token [g,n,d], and what they have seen, in one softmax.
struct Asked {
    int64_t g, n, d, rounded, threads;
    std::vector<float> Q, most, total, Y, one_most, one_total, one_Y;

    Asked(int64_t g, int64_t n, int64_t d, int64_t rounded, int64_t threads)
        : g(g), n(n), d(d), rounded(rounded), threads(threads), Q(g * n * d), most(g * n), total(g * n), Y(g * n * d),
          one_most(g * n), one_total(g * n), one_Y(g * n * d) {}

    void begin() { std::fill(most.begin(), most.end(), -INFINITY), std::fill(total.begin(), total.end(), 0.0f); }

    // What was found last beside all that was found before.
    void add() {
        const Seen all_of{most.data(), total.data(), Y.data(), d}, last{one_most.data(), one_total.data(), one_Y.data(), d};
        for (int64_t x = 0; x < g * n; x++)
            if (most[x] == -INFINITY) {
                most[x] = last.most[x], total[x] = last.total[x];
                std::copy_n(last.Y + x * d, d, all_of.Y + x * d);
            } else all_of.add(x, last, x);
    }

    // Some slots of heads as they are.
    void see(Array K, Array V, int64_t slot, int64_t count) {
        if (count <= 0) return;
        for (Array* side : {&K, &V}) {
            side->at += slot * side->row;
            if (side->scale) side->scale += slot * side->scale_row;
        }
        tpa_attend(&K, &V, Q.data(), one_most.data(), one_total.data(), one_Y.data(), g, n, count, d, rounded, threads);
        add();
    }

    // Tokens in codes. turn: cos and sin of every position, side by side.
    void see(const Held& held, const banded::Tables& tables, const std::vector<Part>& where, const float* turn) {
        constexpr int64_t TILE = banded::TILE;
        int64_t keys = 0, half = d / 2;
        for (const Part& each : where) keys += each.count;
        if (!keys) return;
        const int64_t share = (keys + threads * TILE - 1) / (threads * TILE) * TILE;  // as `banded.Runs` has it
        const int64_t most_of = std::min(banded::TILES * TILE, share);
        std::vector<banded::Run> runs;
        std::vector<float> turns;
        for (const Part& each : where)
            for (int64_t k = 0; k < each.count; k += most_of) {
                runs.push_back({0, each.slot + k, std::min(most_of, each.count - k), int64_t(runs.size())});
                const float* at = turn + (each.position + k) * d;
                for (int64_t part = 0; part < 2; part++)
                    for (int64_t p = 0; p < half; p++) turns.push_back(at[2 * p + part]);
            }
        banded::Segment codes = held.codes;
        codes.turns = turns.data();
        const int64_t of_row[2] = {0, int64_t(runs.size())};
        tpa_attend_banded(held.bands, &codes, &tables, runs.data(), of_row, Q.data(), one_most.data(), one_total.data(),
                          one_Y.data(), 1, n, rounded, threads);
        add();
    }
};

// A positive number as a half, the nearest there is.
inline uint16_t to_half(float x) {
    if (x >= 65504) return 0x7bff;
    if (x < 0x1p-14f) return uint16_t(std::nearbyint(x * 0x1p24f));
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    return uint16_t((bits >> 13) - (112 << 10));
}

// Numbers in int8 with a scale for each group of them, as `quantize.quantize` makes them.
inline void quantize_int8(const float* x, int64_t d, int8_t* codes, uint16_t* scales) {
    for (int64_t first = 0; first < d; first += GROUP, scales++) {
        const int64_t end = std::min(d, first + GROUP);
        F most = zero();
        for (int64_t j = first; j < end; j += W) most = larger(most, larger(load(x + j), minus(zero(), load(x + j))));
        *scales = to_half(largest(most) / 127);
        const float step = from_half(*scales);
        for (int64_t j = first; j < end; j++)
            codes[j] = step > 0 ? int8_t(std::min(127.0f, std::max(-127.0f, std::nearbyint(x[j] / step)))) : 0;
    }
}

// Heads into their slot, in the format of the array.
inline void keep(const Array& to, const uint8_t* X, int64_t kind, int64_t slot, int64_t g, int64_t d) {
    std::vector<float> x(d);
    for (int64_t head = 0; head < g; head++) {
        uint8_t* at = (uint8_t*)to.at + head * to.batch + slot * to.row;
        for (int64_t j = 0; j < d; j += W) save(&x[j], read(X, kind, head * d + j));
        if (to.kind == INT8)
            quantize_int8(x.data(), d, (int8_t*)at, (uint16_t*)to.scale + head * to.scale_batch + slot * to.scale_row);
        else for (int64_t j = 0; j < d; j += W) write(at, to.kind, j, load(&x[j]));
    }
}

// The bytes of a token into its slot: codes [bytes,slots].
inline void keep(const uint8_t* codes, int64_t bytes, const uint8_t* to, int64_t row, int64_t slot) {
    for (int64_t i = 0; i < bytes; i++) ((uint8_t*)to)[i * row + slot] = codes[i];
}

}  // namespace decoder
}  // namespace

// x [m] -> y [m]: the residual stream behind all layers, of the token at a position; its K and V are kept. turns: cos and
// sin [T,d/2,2] of window layers and of global ones.
extern "C" void tpa_decode(const Layer* const* layers, const decoder::Held* held, int64_t count, const float* turns_local,
                           const float* turns_global, int64_t position, const banded::Tables* tables, double scale,
                           const uint8_t* x, uint8_t* y, int64_t threads) {
    const Layer& any = **layers;
    const int64_t g = any.g, d = any.d, n = any.h / g, kind = any.kind, size = kind == F32 ? 4 : 2;
    const auto bytes_of = [&](int64_t numbers) { return std::vector<uint8_t>(numbers * size); };
    std::vector<uint8_t> Q = bytes_of(any.h * d), K = bytes_of(g * d), V = K, turned = K, O = Q, stream = bytes_of(any.m);
    std::vector<float> K_float(g * d), V_float(g * d);
    std::vector<uint8_t> codes[2];
    decoder::Asked asked(g, n, d, kind == BF16, threads);
    std::copy_n(x, any.m * size, stream.data());
    for (int64_t l = 0; l < count; l++) {
        const Layer& w = *layers[l];
        const decoder::Held& own = held[l];
        const float* turns = own.is_global ? turns_global : turns_local;
        const float* here = turns + position * d;
        tpa_before(&w, stream.data(), here, 0, Q.data(), K.data(), V.data(), 1, 1, threads);
        read_all(Q.data(), kind, asked.Q.data(), any.h * d);
        for (float& q : asked.Q) q *= float(scale);
        asked.begin();
        const int64_t slot = position % own.slots, first = own.window ? std::max<int64_t>(0, position - own.window + 1) : 0;
        if (own.bands) {
            const int64_t groups = own.bands->groups;
            const int64_t bytes[2] = {groups * own.bands->key_bytes, groups * own.bands->value_bytes};
            for (int side = 0; side < 2; side++) codes[side].resize(bytes[side]);
            read_all(K.data(), kind, K_float.data(), g * d), read_all(V.data(), kind, V_float.data(), g * d);
            tpa_code_banded(own.sides, K_float.data(), V_float.data(), codes[0].data(), codes[1].data(), 1, groups, threads);
            decoder::keep(codes[0].data(), bytes[0], own.codes.keys, own.codes.key_row, slot);
            decoder::keep(codes[1].data(), bytes[1], own.codes.values, own.codes.value_row, slot);
            asked.see(own, *tables, decoder::parts(std::max(first, own.sinks), position, own.slots), turns);
            asked.see(own.first_K, own.first_V, first, own.sinks - first);
        } else {
            tpa_turn(K.data(), kind, here, 0, turned.data(), 1, 1, g, d, 1);
            decoder::keep(own.K, turned.data(), kind, slot, g, d);
            decoder::keep(own.V, V.data(), kind, slot, g, d);
            if (position - first + 1 == own.slots) asked.see(own.K, own.V, 0, own.slots);  // in whatever order
            else for (const decoder::Part& each : decoder::parts(first, position, own.slots))
                asked.see(own.K, own.V, each.slot, each.count);
        }
        for (int64_t head = 0; head < any.h; head++) {
            const F whole = all(1 / asked.total[head]);
            for (int64_t j = head * d; j < (head + 1) * d; j += W) write(O.data(), kind, j, times(load(&asked.Y[j]), whole));
        }
        tpa_after(&w, stream.data(), O.data(), stream.data(), 1, threads);
    }
    std::copy_n(stream.data(), any.m * size, y);
}
