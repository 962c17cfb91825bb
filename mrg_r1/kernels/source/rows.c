/* What a layer does to each token between its products. */
#include <math.h>

#include "vectors.h"

/* y = x / sqrt(mean(x^2) + epsilon) * weight; scales [rows], where it is not NULL, is the factor before the weight. */
void rms_norm(const float *x, const float *weight, float epsilon, float *y, float *scales, long rows, long n,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * n;
        float *to = y + row * n, squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long at = 0; at < n; at++) squares += from[at] * from[at];
        float scale = 1.0f / sqrtf(squares / n + epsilon);
        for (long at = 0; at < n; at++) to[at] = from[at] * scale * weight[at];
        if (scales) scales[row] = scale;
    }
}

/* The gradient of x: scale (g - x mean(g x) scale^2) with g = grad * weight. */
void rms_norm_backward(const float *grad, const float *x, const float *scales, const float *weight, float *d_x,
                       long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *g = grad + row * n, *from = x + row * n;
        float *to = d_x + row * n, inner = 0, scale = scales[row];
#pragma omp simd reduction(+ : inner)
        for (long at = 0; at < n; at++) inner += g[at] * weight[at] * from[at];
        float part = inner / n * scale * scale;
        for (long at = 0; at < n; at++) to[at] = (g[at] * weight[at] - from[at] * part) * scale;
    }
}

/* silu(gate) * up of [rows, gate n | up n] */
void swiglu(const float *gate_up, float *y, long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * n, *up = gate + n;
        float *to = y + row * n;
#pragma omp simd
        for (long at = 0; at < n; at++) to[at] = gate[at] / (1.0f + exp_of(-gate[at])) * up[at];
    }
}

void swiglu_backward(const float *grad, const float *gate_up, float *d_gate_up, long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *g = grad + row * n, *gate = gate_up + row * 2 * n, *up = gate + n;
        float *d_gate = d_gate_up + row * 2 * n, *d_up = d_gate + n;
#pragma omp simd
        for (long at = 0; at < n; at++) {
            float sigmoid = 1.0f / (1.0f + exp_of(-gate[at]));
            d_up[at] = g[at] * gate[at] * sigmoid;
            d_gate[at] = g[at] * up[at] * sigmoid * (1.0f + gate[at] * (1.0f - sigmoid));
        }
    }
}

/* Pairs (i, i + size / 2) of each head turned by the token's angles, or back where sign is -1; x may be y. A token's
   heads lie behind one another, tokens x_row and y_row apart; angles [tokens, size / 2] angle_row apart. */
void rotate(const float *x, long x_row, float *y, long y_row, const float *cosines, const float *sines, long angle_row,
            float sign, long tokens, long heads, long size, int threads) {
    long half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long token = 0; token < tokens; token++) {
        const float *c = cosines + token * angle_row, *s = sines + token * angle_row;
        for (long head = 0; head < heads; head++) {
            const float *from = x + token * x_row + head * size;
            float *to = y + token * y_row + head * size;
#pragma omp simd
            for (long at = 0; at < half; at++) {
                float first = from[at], second = from[at + half], sine = sign * s[at];
                to[at] = first * c[at] - second * sine;
                to[at + half] = second * c[at] + first * sine;
            }
        }
    }
}
