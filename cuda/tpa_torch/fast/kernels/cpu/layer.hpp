// What of a layer stands before attention and behind it, for few rows: each in one go, numbers between in float32.

#pragma once

#include "matrices.hpp"

namespace {

struct Layer {
    Matrix Q, K, V, O, gate, up, down;
    const uint8_t *attn_norm, *q_norm, *k_norm, *post_attn_norm, *mlp_norm, *post_mlp_norm;
    int64_t kind, m, h, g, d, f;  // kind: of the norms, and of what goes in and comes out: float32 or bfloat16
    double eps;
};

void read_all(const uint8_t* p, int64_t kind, float* x, int64_t count) {
    for (int64_t j = 0; j < count; j += W) save(x + j, read(p, kind, j));
}

// x / rms(x) (1 + w) of n numbers.
void rms_norm(const float* x, const uint8_t* w, int64_t kind, float* y, int64_t n, double eps) {
    F squares = zero();
    for (int64_t j = 0; j < n; j += W) squares = fma(load(x + j), load(x + j), squares);
    const F scale = all(float(1 / std::sqrt(double(sum(squares)) / n + eps)));
    for (int64_t j = 0; j < n; j += W) {
        const F one = times(load(x + j), scale);
        save(y + j, fma(one, read(w, kind, j), one));
    }
}

// u times the tanh approximation of the normal distribution: u e^min(2z,0) / (1 + e^-|2z|).
inline F gelu_tanh(F u) {
    const F z2 = times(times(u, all(1.59576912f)), fma(times(u, all(0.044715f)), u, all(1)));
    const F none = zero(), minus_z2 = minus(none, z2);
    const F above = exponential(minus(none, larger(minus_z2, none)));
    return over(times(u, above), fma(all(1), exponential(minus(none, larger(z2, minus_z2))), all(1)));
}

// RoPE of one head: pairs (i, i + d/2); turn: cos and sin of each pair.
void turn(float* x, const float* turn, int64_t d) {
    for (int64_t i = 0, half = d / 2; i < half; i++) {
        const float one = x[i], two = x[half + i], c = turn[2 * i], s = turn[2 * i + 1];
        x[i] = one * c - two * s, x[half + i] = two * c + one * s;
    }
}

}  // namespace

extern "C" {

// x [rows,m] -> Q [rows,h,d], normed and turned, K [rows,g,d], normed, V [rows,g,d]. Row r stands at turns[r / q, r % q].
void tpa_before(const Layer* w, const uint8_t* x, const float* turns, int64_t turns_batch, uint8_t* Q, uint8_t* K,
                uint8_t* V, int64_t rows, int64_t q, int64_t threads) {
    const int64_t m = w->m, d = w->d, asked = w->h * d, kept = w->g * d, width = asked + 2 * kept;
    std::vector<float> found(rows * width);
#pragma omp parallel num_threads(team(width * m, threads))
    {
        std::vector<float> a(rows * m);  // every thread makes its own: that is faster than to wait for it
        read_all(x, w->kind, a.data(), rows * m);
        for (int64_t r = 0; r < rows; r++) rms_norm(&a[r * m], w->attn_norm, w->kind, &a[r * m], m, w->eps);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < width; n += STRIP) {
            const Matrix& of = n < asked ? w->Q : n < asked + kept ? w->K : w->V;
            const int64_t start = n < asked ? 0 : n < asked + kept ? asked : asked + kept;
            multiply(of, a.data(), &found[start], rows, width, n - start, n - start + STRIP, m);
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * (width / d); item++) {
            const int64_t r = item / (width / d), head = item % (width / d);
            float* const at = &found[r * width + head * d];
            const bool is_query = head < w->h, is_key = !is_query && head < w->h + w->g;
            if (is_query || is_key) rms_norm(at, is_query ? w->q_norm : w->k_norm, w->kind, at, d, w->eps);
            if (is_query) turn(at, turns + r / q * turns_batch + r % q * d, d);
            uint8_t* const to = is_query ? Q : is_key ? K : V;
            const int64_t start = is_query ? r * asked + head * d : r * kept + (head - w->h) % w->g * d;
            for (int64_t j = 0; j < d; j += W) write(to, w->kind, start + j, load(at + j));
        }
    }
}

// x [rows,m], O [rows,h,d] -> y [rows,m]: the residual stream behind attention and MLP.
void tpa_after(const Layer* w, const uint8_t* x, const uint8_t* O, uint8_t* y, int64_t rows, int64_t threads) {
    const int64_t m = w->m, f = w->f, size = w->h * w->d;
    std::vector<float> given(rows * size), o(rows * m), h(rows * f), z(rows * m);
    read_all(O, w->kind, given.data(), rows * size);
#pragma omp parallel num_threads(team(m * (size + 3 * f), threads))
    {
        std::vector<float> stream(rows * m), a(rows * m), both(2 * rows * STRIP);
        read_all(x, w->kind, stream.data(), rows * m);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < m; n += STRIP) multiply(w->O, given.data(), o.data(), rows, m, n, n + STRIP, size);
        for (int64_t r = 0; r < rows; r++) {
            float *const to = &stream[r * m], *const normed = &a[r * m];
            rms_norm(&o[r * m], w->post_attn_norm, w->kind, normed, m, w->eps);
            for (int64_t j = 0; j < m; j += W) save(to + j, fma(all(1), load(normed + j), load(to + j)));
            rms_norm(to, w->mlp_norm, w->kind, normed, m, w->eps);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < f; n += STRIP) {
            float *const gate = &both[0] - n, *const up = gate + rows * STRIP;
            multiply(w->gate, a.data(), gate, rows, STRIP, n, n + STRIP, m);
            multiply(w->up, a.data(), up, rows, STRIP, n, n + STRIP, m);
            for (int64_t r = 0; r < rows; r++)
                save(&h[r * f + n], times(gelu_tanh(load(gate + r * STRIP + n)), load(up + r * STRIP + n)));
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < m; n += STRIP) multiply(w->down, h.data(), z.data(), rows, m, n, n + STRIP, f);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            rms_norm(&z[r * m], w->post_mlp_norm, w->kind, &a[r * m], m, w->eps);
            for (int64_t j = 0; j < m; j += W)
                write(y, w->kind, r * m + j, fma(all(1), load(&a[r * m + j]), load(&stream[r * m + j])));
        }
    }
}

// RoPE of few heads, X [rows,heads,d] in float32 or bfloat16 -> out. Row r stands at turns[r / q, r % q].
void tpa_turn(const uint8_t* X, int64_t kind, const float* turns, int64_t turns_batch, uint8_t* out, int64_t rows,
              int64_t q, int64_t heads, int64_t d, int64_t) {
    std::vector<float> one(d);
    for (int64_t item = 0; item < rows * heads; item++) {
        const int64_t r = item / heads;
        for (int64_t j = 0; j < d; j += W) save(&one[j], read(X, kind, item * d + j));
        turn(one.data(), turns + r / q * turns_batch + r % q * d, d);
        for (int64_t j = 0; j < d; j += W) write(out, kind, item * d + j, load(&one[j]));
    }
}

}  // extern "C"
