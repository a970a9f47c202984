// Attention on banded codes (see `core.banded`), group by group of heads: a tile of 64 keys after the other, of which only
// fast pairs are rebuilt.
//
// Of a tile, codes become levels once, for scores and for values. Three products are made with sixteen keys in a register:
// fast pairs of K from their coefficients, and the logits of the absorbed queries at four nodes. Slow pairs are absorbed
// anew for every tile; those that hardly turn, once for a stretch of sixteen tiles, and interpolated twice.

#pragma once

#include "blocks.hpp"
#include "codes.hpp"
#include "rows.hpp"

namespace {
namespace banded {

constexpr int TILE = 64, NODES = 4, TILES = 16;  // keys; nodes of a tile and of a stretch; tiles of a stretch
constexpr int LANES = TILE / W;                  // registers of a tile
constexpr int SPAN = 2 * TILE;                   // keys whose values are summed in one go
constexpr float MASKED = -2.3819763e38f;

// One layer. Pairs come fast, slow, still; s counts a group's coefficients of K, fast ones first, then those of V. What is
// multiplied lies in units (of one number in float32, or two in bfloat16), everything else in float32. Columns are fast
// coefficients, up to an even number, slow ones and the mean, up to whole registers; features of a band fill whole
// registers, too.
struct Bands {
    int64_t g, groups, d;                  // KV heads, groups of them that are coded apart, head size
    int64_t fast, slow, still;             // pairs of each band
    int64_t fast_rank, key_rank, rank;     // a group's coefficients of fast K, of K, of K and V
    int64_t key_bytes, value_bytes;        // of a group's codes
    const Coefficient* of;                 // [rank]: where they lie in a group's codes, of K or of V
    const Unit* rebuild;                   // [g, 2 fast, fast columns]: first features of the pairs, then second ones
    const float* fast_mean;                // [g, 2 fast]
    const Unit* absorb;                    // [g, 2 slow, columns], two features in a unit: basis and mean
    const Unit* absorb_still;              // [g, 2 still, columns]
    const float* tile_turns;               // [TILES, 2, d/2]: cos and sin of theta t from the first key of a run to a tile's
    const float* fast_turns;               // [fast, 2, TILE]: of theta t of a tile's keys
    const float* node_turns;               // [NODES, 2, slow]: of theta t at the nodes of a tile
    const float* still_turns;              // [NODES, 2, still]: at the nodes of a stretch
    const float* weights;                  // [NODES, TILE]: Lagrange's polynomials
    const float* stretch_weights;          // [TILES, NODES, NODES]: those of a stretch, at the nodes of its tiles
    const void* values;                    // [g, rank, d]: basis of V, in float32 or bfloat16
    const float* value_mean;               // [g, d]
    int64_t columns;
};

struct Run {  // keys at consecutive positions, at most a stretch of them; its number
    int64_t row, first, count, number;
};

struct Segment {  // what is read, of all rows
    const uint8_t *keys, *values;  // codes [b,groups bytes,k]
    int64_t key_batch, key_row, value_batch, value_row, scale_rows[3];  // rows of the scales of the three strings
    const float* scales;                                                // by first byte
    const float* turns;   // [runs,2,d/2]: cos and sin of theta times the position of each run's first key
    const uint8_t* seen;  // [b,q,k], or none
    int64_t queries, count;  // q; k
};

// Queries x [d] turned back by (cos, sin), [pairs] each: features first ... of the pairs, then second ones.
inline void turn_back(const float* x, int64_t half, int64_t first, int64_t pairs, const float* cosine, const float* sine,
                      float* out) {
    for (int64_t p = 0; p < pairs; p++) {
        const float a = x[first + p], b = x[first + p + half], c = cosine[p], s = sine[p];
        out[p] = a * c + b * s, out[p + pairs] = b * c - a * s;
    }
}

struct Tables {  // of levels by width and window: float32; 16-bit numbers of steps; bfloat16; low bytes before high ones
    const float* exact;
    const int16_t* whole;
    const float* steps;
    const uint16_t* rounded;
};

#if TPA_AVX512
// The levels of a tile in 16 bits, by their windows.
inline void look_up(const uint8_t* window, const uint16_t* table, uint16_t* out) {
#if defined(__AVX512VBMI__)
    // Low and high bytes apart: seven bits of a window choose among 128 bytes in two registers, one between two such.
    // Keys are first brought into the order in which bytes meet again.
    const __m512i order = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(window));
    const __mmask64 upper = _mm512_movepi8_mask(order);
    __m512i byte[2];
    for (int half = 0; half < 2; half++) {
        const uint8_t* at = (const uint8_t*)table + WINDOWS * half;
        const __m512i one = _mm512_permutex2var_epi8(_mm512_loadu_si512(at), order, _mm512_loadu_si512(at + 64));
        const __m512i two = _mm512_permutex2var_epi8(_mm512_loadu_si512(at + 128), order, _mm512_loadu_si512(at + 192));
        byte[half] = _mm512_mask_blend_epi8(upper, one, two);
    }
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(byte[0], byte[1]));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(byte[0], byte[1]));
#else
    const uint8_t *low = (const uint8_t*)table, *high = low + WINDOWS;
    for (int k = 0; k < TILE; k++) out[k] = uint16_t(low[window[k]] | high[window[k]] << 8);
#endif
}
#endif

// Levels of a coefficient at the keys of a tile, in float32.
inline void tile_levels(const uint8_t* window, int64_t width, const Tables& tables, float* out) {
#if TPA_AVX512
    const F step = all(tables.steps[width]);
    uint16_t whole[TILE];
    look_up(window, (const uint16_t*)tables.whole + width * WINDOWS, whole);
    for (int k = 0; k < TILE; k += W) {
        const __m512i x = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(whole + k)));
        save(out + k, times(_mm512_cvtepi32_ps(x), step));
    }
#else
    for (int k = 0; k < TILE; k++) out[k] = tables.exact[width * WINDOWS + window[k]];
#endif
}

// Memory of a thread, which it uses again for the next layer.
struct Room {
    std::vector<Unit> keys, asked, absorbed;  // keys: [columns / N, TILE]
    std::vector<float> levels, at_run, at_tile, at_node, fast_keys, logits, weights, sums, stretch, node, largest, total, L;
};

template <class T> std::vector<T>& sized(std::vector<T>& x, int64_t size) {
    if (int64_t(x.size()) < size) x.resize(size);
    return x;
}

// What a thread needs while it reads.
template <class IN> struct Reader {
    static constexpr int64_t N = IN::NUMBERS;
    const Bands& of;
    const Segment& from;
    const Tables& tables;
    const int64_t group, x;  // the group that is read, and the queries of a KV head
    const int64_t heads = of.g / of.groups, first_head = group * heads, y = heads * x;
    const int64_t half = of.d / 2, fast_columns = (of.fast_rank + 1) / 2 * 2;
    const int64_t mean = fast_columns + of.key_rank - of.fast_rank;  // its column
    const int64_t fast_units = fast_columns / N, slow_units = (of.key_rank - of.fast_rank + N - 1) / N;
    std::vector<Unit>&keys, &asked, &absorbed;
    std::vector<float>&levels, &at_run, &at_tile, &at_node, &fast_keys, &logits, &weights, &sums, &stretch, &node, &largest,
        &total;
    float scales[3][SPAN];

    Reader(const Bands& of, const Segment& from, const Tables& tables, int64_t group, int64_t x, Room& room)
        : of(of), from(from), tables(tables), group(group), x(x), keys(sized(room.keys, of.columns * TILE)),
          asked(sized(room.asked, NODES * x * (2 * of.d + 2 * W))), absorbed(sized(room.absorbed, NODES * y * of.columns)),
          levels(sized(room.levels, of.rank * SPAN)), at_run(sized(room.at_run, y * of.d)),
          at_tile(sized(room.at_tile, y * of.d)), at_node(sized(room.at_node, of.d + W)),
          fast_keys(sized(room.fast_keys, 2 * heads * of.fast * TILE)), logits(sized(room.logits, NODES * y * TILE)),
          weights(sized(room.weights, 3 * y * SPAN)), sums(sized(room.sums, of.rank * y * W)),
          stretch(sized(room.stretch, NODES * y * of.columns)), node(sized(room.node, NODES * y * of.columns)),
          largest(sized(room.largest, y)), total(sized(room.total, y)) {
        if (of.fast_rank % 2) std::fill_n(&keys[of.fast_rank * TILE], N == 1 ? TILE : 0, 0);  // holds nothing, is multiplied
        std::fill(sums.begin(), sums.begin() + of.rank * y * W, 0.0f);
        std::fill(largest.begin(), largest.end(), -INFINITY);
        std::fill(total.begin(), total.end(), 0.0f);
    }

    // Which of the three a coefficient is in.
    int string_of(int64_t s) const { return s < of.fast_rank ? 0 : s < of.key_rank ? 1 : 2; }

    // Features of a band, in whole registers.
    static int64_t features(int64_t pairs) { return (2 * pairs + W - 1) / W * W; }

    // A tile's codes as levels [rank][SPAN], from `at` on, K's also as units; its scales.
    void decode(const Run& run, int at) {
        uint8_t window[TILE] = {};
        const uint8_t* K = from.keys + run.row * from.key_batch + group * of.key_bytes * from.key_row;
        const uint8_t* V = from.values + run.row * from.value_batch + group * of.value_bytes * from.value_row;
        const Codes held[2] = {{K, from.key_row}, {V, from.value_row}};
        for (int string = 0; string < 3; string++) {
            const Codes& codes = held[string == 2];
            const uint8_t* bytes = codes.at + from.scale_rows[string] * codes.row + run.first;
            const bool any = string == 0 ? of.fast_rank : string == 1 ? of.key_rank > of.fast_rank : of.rank > of.key_rank;
            for (int64_t k = 0; k < TILE; k++) scales[string][at + k] = any && k < run.count ? from.scales[bytes[k]] : 0;
        }
        for (int64_t s = 0; s < of.rank; s++) {
            windows(held[s >= of.key_rank], of.of[s], run.first, run.count, window);
            const int string = string_of(s);
            if constexpr (N == 1) {
                float* to = &levels[s * SPAN + at];
                tile_levels(window, of.of[s].width, tables, to);
                for (int k = 0; k < TILE; k += W) save(to + k, times(load(to + k), load(&scales[string][at + k])));
                const int64_t column = string ? fast_columns + s - of.fast_rank : s;
                if (string < 2) std::memcpy(&keys[column * TILE], to, TILE * sizeof(float));
            }
#if TPA_BF16_DOT
            else {
                uint16_t* to = (uint16_t*)levels.data() + s * SPAN + at;
                look_up(window, tables.rounded + of.of[s].width * WINDOWS, to);
            }
#endif
        }
#if TPA_BF16_DOT
        if constexpr (N == 2) {
            interleave(0, of.fast_rank, at, keys.data());
            interleave(of.fast_rank, of.key_rank, at, &keys[fast_units * TILE]);
        }
#endif
    }

#if TPA_BF16_DOT
    // Levels of two coefficients side by side in a unit.
    void interleave(int64_t first, int64_t last, int tile, Unit* to) const {
        const uint16_t* at = (const uint16_t*)levels.data() + tile;
        for (int64_t s = first; s < last; s += 2, to += TILE)
            for (int k = 0; k < TILE; k += W) {
                __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + s * SPAN + k)));
                if (s + 1 < last) {
                    const __m512i two = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + (s + 1) * SPAN + k)));
                    both = _mm512_or_si512(both, _mm512_slli_epi32(two, 16));
                }
                _mm512_storeu_si512(to + k, both);
            }
    }
#endif

    // to[r,k] = (add ? to : 0) + scale[k] sum_i of[r,i] keys[i,k] of rows of units, `size` apart; scale: none in float32.
    void times_keys(const Unit* rows, int64_t size, int64_t count, int64_t first, int64_t units, const float* scale, bool add,
                    float* to) {
        Next none{nullptr, nullptr};
        const auto some = [&](int64_t r, auto of_rows) {
            constexpr int M = decltype(of_rows)::value;
            F found[M][LANES];
            for (auto& row : found)
                for (F& lane : row) lane = zero();
            multiply<IN>(found, rows + r * size, size, &keys[first * TILE], TILE, units, none);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < LANES; v++) {
                    float* at = to + (r + m) * TILE + v * W;
                    const F one = N == 1 ? found[m][v] : times(found[m][v], load(scale + v * W));
                    save(at, add ? fma(all(1), load(at), one) : one);
                }
        };
        int64_t r = 0;
        for (; count - r >= 4; r += 4) some(r, Count<4>{});
        for (; r < count; r++) some(r, Count<1>{});
    }

    // out[NODES x, columns] += asked features times the basis of a head.
    void times_basis(const Unit* basis, int64_t size, float* out) const {
        Next none{nullptr, nullptr};
        const auto some = [&](int64_t r, int64_t c, auto registers) {
            constexpr int M = NODES, V = decltype(registers)::value;
            F found[M][V];
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) found[m][v] = load(out + (r + m) * of.columns + c + v * W);
            multiply<IN>(found, &asked[r * size], size, basis + c, of.columns, size, none);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < V; v++) save(out + (r + m) * of.columns + c + v * W, found[m][v]);
        };
        int64_t c = 0;  // columns outside: what a few of them read of the basis stays in the nearest cache
        for (; of.columns - c >= 4 * W; c += 4 * W)
            for (int64_t r = 0; r < NODES * x; r += NODES) some(r, c, Count<4>{});
        for (; c < of.columns; c += W)
            for (int64_t r = 0; r < NODES * x; r += NODES) some(r, c, Count<1>{});
    }

    // Queries of a head, as seen from a key, turned back to the nodes of a tile (or stretch): a band's features as units.
    void ask(const float* seen_from, int64_t head, int64_t first, int64_t pairs, const float* node_turns) {
        const int64_t size = features(pairs);
        for (int64_t i = 0; i < x; i++) {
            const float* q = seen_from + (head * x + i) * of.d;
            for (int n = 0; n < NODES; n++) {
                const float* to_node = node_turns + 2 * n * pairs;
                turn_back(q, half, first, pairs, to_node, to_node + pairs, at_node.data());
                std::fill(&at_node[2 * pairs], &at_node[size], 0.0f);
                for (int64_t j = 0; j < size; j += W) IN::save(&asked[((i * NODES + n) * size + j) / N], load(&at_node[j]));
            }
        }
    }

    // What hardly turns, absorbed at the nodes of a stretch: stretch[y NODES, columns].
    void absorb_stretch() {
        std::fill(stretch.begin(), stretch.begin() + NODES * y * of.columns, 0.0f);
        const int64_t size = features(of.still) / N;
        for (int64_t head = 0; head < heads && of.still; head++) {
            ask(at_run.data(), head, of.fast + of.slow, of.still, of.still_turns);
            times_basis(of.absorb_still + (first_head + head) * size * of.columns, size, &stretch[head * x * NODES * of.columns]);
        }
    }

    // The absorbed queries at the nodes of a tile: as numbers, for the mean, and as units. tile: its number in the stretch.
    void absorb_tile(int64_t tile) {
        const int64_t size = features(of.slow) / N;
        for (int64_t row = 0; row < y; row++) {
            const float *weight = of.stretch_weights + tile * NODES * NODES, *at = &stretch[row * NODES * of.columns];
            float* to = &node[row * NODES * of.columns];
            for (int64_t c = 0; c < of.columns; c += W) {
                F still[NODES];
                for (int m = 0; m < NODES; m++) still[m] = load(at + m * of.columns + c);
                for (int n = 0; n < NODES; n++) {
                    F one = zero();
                    for (int m = 0; m < NODES; m++) one = fma(all(weight[n * NODES + m]), still[m], one);
                    save(to + n * of.columns + c, one);
                }
            }
        }
        for (int64_t head = 0; head < heads && of.slow; head++) {
            ask(at_tile.data(), head, of.fast, of.slow, of.node_turns);
            times_basis(of.absorb + (first_head + head) * size * of.columns, size, &node[head * x * NODES * of.columns]);
        }
        for (int64_t c = 0; c < y * NODES * of.columns; c += W) IN::save(&absorbed[c / N], load(&node[c]));
    }

    // L[y, SPAN], from `at` on: of fast pairs, rebuilt and turned, and of slow ones, interpolated between the nodes.
    void score(float* L, int at) {
        const int64_t rows = 2 * heads * of.fast, apart = of.columns / N;
        times_keys(absorbed.data(), apart, NODES * y, 0, fast_units, &scales[0][at], false, logits.data());
        times_keys(&absorbed[fast_units], apart, NODES * y, fast_units, slow_units, &scales[1][at], true, logits.data());
        for (int64_t row = 0; row < y; row++)
            for (int k = 0; k < TILE; k += W) {
                F one = zero();
                for (int n = 0; n < NODES; n++) {
                    const F at_node = load(&logits[(row * NODES + n) * TILE + k]);
                    const F of_mean = all(node[(row * NODES + n) * of.columns + mean]);
                    one = fma(fma(all(1), at_node, of_mean), load(of.weights + n * TILE + k), one);
                }
                save(L + row * SPAN + at + k, one);
            }
        if (!of.fast) return;
        times_keys(of.rebuild + group * rows * fast_units, fast_units, rows, 0, fast_units, &scales[0][at], false, fast_keys.data());
        for (int64_t head = 0; head < heads; head++)
            in_blocks(x, [&](int64_t i, auto count) { add_fast<decltype(count)::value>(head, head * x + i, L + at); });
    }

    // The fast pairs of a head: mean added, turned, and multiplied with some of its queries.
    template <int X> void add_fast(int64_t head, int64_t row, float* L) const {
        const float* mean_of = of.fast_mean + first_head * 2 * of.fast;
        for (int k = 0; k < TILE; k += W) {
            F total[X];
            for (int i = 0; i < X; i++) total[i] = load(L + (row + i) * SPAN + k);
            for (int64_t p = 0; p < of.fast; p++) {
                const int64_t one_at = head * 2 * of.fast + p, two_at = one_at + of.fast;
                const float *cosine = of.fast_turns + 2 * p * TILE + k, *sine = cosine + TILE;
                const F a = fma(all(1), load(&fast_keys[one_at * TILE + k]), all(mean_of[one_at]));
                const F b = fma(all(1), load(&fast_keys[two_at * TILE + k]), all(mean_of[two_at]));
                const F one = minus(times(a, load(cosine)), times(b, load(sine)));
                const F two = fma(b, load(cosine), times(a, load(sine)));
                for (int i = 0; i < X; i++) {
                    const float* q = &at_tile[(row + i) * of.d];
                    total[i] = fma(all(q[p]), one, fma(all(q[p + half]), two, total[i]));
                }
            }
            for (int i = 0; i < X; i++) save(L + (row + i) * SPAN + k, total[i]);
        }
    }

    // sums[s,y,16] += levels times weights; of a row whose largest logit grows, all that was summed shrinks. What is
    // weighed are bare levels in bfloat16, so weights [y,3,SPAN] take the scales of the three strings.
    void weigh(const float* L, int64_t count) {
        const int keys_of = int((count + TILE - 1) / TILE * TILE);
        for (int64_t row = 0; row < y; row++) {
            F most = all(-INFINITY), sum_of = zero();
            for (int k = 0; k < keys_of; k += W) most = larger(most, load_of(L + row * SPAN + k, count - k, -INFINITY));
            const float highest = std::max(::largest(most), largest[row]), shrink = std::exp(largest[row] - highest);
            if (highest > largest[row]) {
                for (int64_t s = 0; s < of.rank; s++) {
                    float* at = &sums[(s * y + row) * W];
                    save(at, times(load(at), all(shrink)));
                }
                largest[row] = highest;
            }
            for (int k = 0; k < keys_of; k += W) {
                const F p = exponential(minus(load_of(L + row * SPAN + k, count - k, -INFINITY), all(highest)));
                sum_of = fma(all(1), p, sum_of);
                for (int string = 0; string < 3; string++) {
                    const int64_t at = (row * 3 + string) * SPAN + k;
                    if constexpr (N == 1) save(&weights[at], p);
#if TPA_BF16_DOT
                    else IN::save((Unit*)((uint16_t*)weights.data() + at), times(p, load(&scales[string][k])));
#endif
                }
            }
            total[row] = total[row] * shrink + sum(sum_of);
        }
        for (int64_t s = 0; s < of.rank; s++) {
            const int string = string_of(s);
            for (int64_t row = 0; row < y; row++) {
                float* at = &sums[(s * y + row) * W];
                F found = load(at);
                for (int k = 0; k < keys_of / N; k += W) {
                    const Unit* c = (const Unit*)levels.data() + s * (SPAN / N) + k;
                    const Unit* p = (const Unit*)weights.data() + (row * 3 + string) * (SPAN / N) + k;
                    found = IN::add_products(found, c, p);
                }
                save(at, found);
            }
        }
    }

    // All of a run: keys at consecutive positions, at most a stretch.
    void read(const float* Q, const Run& run, float* L) {
        turn_all(Q, from.turns + run.number * of.d, at_run);
        absorb_stretch();
        for (int64_t tile = 0; tile * TILE < run.count; tile++) {
            const int64_t count = std::min<int64_t>(TILE, run.count - tile * TILE);
            const Run here{run.row, run.first + tile * TILE, count, run.number};
            turn_all(at_run.data(), of.tile_turns + tile * of.d, at_tile);
            const int at = int(tile * TILE % SPAN);
            decode(here, at);
            absorb_tile(tile);
            score(L, at);
            if (from.seen) hide(here, L + at);
            if (at + TILE == SPAN || tile * TILE + count == run.count) weigh(L, at + count);
        }
    }

    void turn_all(const float* Q, const float* turns, std::vector<float>& out) const {
        for (int64_t i = 0; i < y; i++) turn_back(Q + i * of.d, half, 0, half, turns, turns + half, &out[i * of.d]);
    }

    void hide(const Run& here, float* L) const {
        for (int64_t row = 0; row < y; row++) {
            const uint8_t* seen = from.seen + (here.row * from.queries + row % from.queries) * from.count + here.first;
            if (!std::memchr(seen, 0, here.count)) continue;
            for (int64_t k = 0; k < here.count; k++)
                if (!seen[k]) L[row * SPAN + k] = MASKED;
        }
    }
};

// What the threads have found of a group, in one softmax: sums [y, rank] and the logarithm's two parts.
inline void merge(const float* largest, const float* total, const float* sums, int64_t parts, int64_t y, int64_t rank,
                  float* highest, float* whole, float* merged) {
    for (int64_t i = 0; i < y; i++) {
        float most = -INFINITY;
        for (int64_t part = 0; part < parts; part++) most = std::max(most, largest[part * y + i]);
        highest[i] = most, whole[i] = 0;
        std::fill(merged + i * rank, merged + (i + 1) * rank, 0.0f);
        for (int64_t part = 0; part < parts; part++) {
            const float weight = std::exp(largest[part * y + i] - most), *from = sums + (part * y + i) * rank;
            whole[i] += weight * total[part * y + i];
            for (int64_t s = 0; s < rank; s++) merged[i * rank + s] += weight * from[s];
        }
    }
}

template <class IN>
void attend(const Bands& of, const Segment& from, const Tables& tables, const Run* runs, const int64_t* first_run,
            const float* Q, float* largest, float* total, float* out, int64_t batch, int64_t x, int64_t threads) {
    const int64_t groups = batch * of.groups, y = of.g / of.groups * x;
    const int64_t parts = groups % threads ? threads : 1;  // into which the keys of a group fall
    std::vector<float> found(groups * parts * y * (of.rank + 2)), merged(groups * y * of.rank);
    float *const most = found.data(), *const whole = most + groups * parts * y, *const sums = whole + groups * parts * y;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < groups * parts; part++) {
            const int64_t group = part / parts, row = group / of.groups, nth = part % parts;
            int64_t keys = 0, before = 0;  // a run is read by the thread in whose share of the keys its middle lies
            for (int64_t r = first_run[row]; r < first_run[row + 1]; r++) keys += runs[r].count;
            static thread_local Room room;
            Reader<IN> reader(of, from, tables, group % of.groups, x, room);
            for (int64_t r = first_run[row]; r < first_run[row + 1]; before += runs[r++].count)
                if ((2 * before + runs[r].count) * parts / (2 * keys) == nth)
                    reader.read(Q + group * y * of.d, runs[r], sized(room.L, y * SPAN).data());
            for (int64_t i = 0; i < y; i++) {
                const int64_t at = part * y + i;
                most[at] = std::max(reader.largest[i], MASKED), whole[at] = reader.total[i];
                for (int64_t s = 0; s < of.rank; s++) sums[at * of.rank + s] = sum(load(&reader.sums[(s * y + i) * W]));
            }
        }
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t at = group * parts * y;
            merge(most + at, whole + at, sums + at * of.rank, parts, y, of.rank, largest + group * y, total + group * y,
                  &merged[group * y * of.rank]);
        }
        const int64_t registers = of.d / W;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < batch * of.g * threads; item++) {  // a share of the features of a head
            const int64_t head = item / threads, part = item % threads;
            const int64_t first = registers * part / threads * W, width = registers * (part + 1) / threads * W - first;
            constexpr Kind KIND = IN::NUMBERS == 2 ? BF16 : F32;
            const int64_t bytes = KIND == BF16 ? 2 : 4;
            const uint8_t* basis = (const uint8_t*)of.values + bytes * (head % of.g * of.rank * of.d + first);
            const Rows<KIND> rows{basis, nullptr, nullptr, bytes * of.d, 0};
            in_blocks(x, [&](int64_t q, auto X) {
                constexpr int N = decltype(X)::value, D = N <= 2 ? 8 : 16 / N;
                std::vector<float> made(N * width);
                const float* weights = &merged[(head * x + q) * of.rank];
                for (int i = 0; i < N; i++)
                    for (int64_t j = 0; j < width; j++)
                        made[i * width + j] = total[head * x + q + i] * of.value_mean[head % of.g * of.d + first + j];
                weigh<N, D>(rows, weights, made.data(), of.rank, 0, of.rank, width);
                for (int i = 0; i < N; i++)
                    std::copy(&made[i * width], &made[i * width] + width, out + (head * x + q + i) * of.d + first);
            });
        }
    }
}

}  // namespace banded
}  // namespace

// Of every row, KV head and query of it: the largest logit and the sum of exponentials [b,g,x], and the weighted sum of
// values [b,g,x,d].
// rounded: products in bfloat16, where the machine multiplies those.
extern "C" void tpa_attend_banded(const banded::Bands* of, const banded::Segment* from, const banded::Tables* tables,
                                  const banded::Run* runs, const int64_t* first_run, const float* Q, float* largest,
                                  float* total, float* out, int64_t batch, int64_t x, int64_t rounded, int64_t threads) {
#if TPA_BF16_DOT
    if (rounded)
        return banded::attend<InBFloat16>(*of, *from, *tables, runs, first_run, Q, largest, total, out, batch, x, threads);
#endif
    (void)rounded;
    banded::attend<InFloat32>(*of, *from, *tables, runs, first_run, Q, largest, total, out, batch, x, threads);
}
