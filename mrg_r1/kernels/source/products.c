#include "products.h"

#define ROWS 256 /* of a that are taken at a time, so that they stay in a core's cache while the panels go by */

long panel_columns(void) { return PANEL; }

/* Matrices b[k][n] at from[k * k_stride + n * n_stride], `apart` floats from one to the next, into panels. */
void pack(const float *from, long count, long apart, long k, long n, long k_stride, long n_stride, float *to) {
    for (long number = 0; number < count; number++, from += apart)
        for (long panel = 0; panel * PANEL < n; panel++, to += k * PANEL) {
            int columns = columns_of(panel, n);
            const float *corner = from + panel * PANEL * n_stride;
            for (long at = 0; at < k; at++)
                for (int column = 0; column < PANEL; column++)
                    to[at * PANEL + column] = column < columns ? corner[at * k_stride + column * n_stride] : 0.0f;
        }
}

/* y [rows, n] = x [rows, k] b + bias [n] */
void linear(const float *x, const float *packed, const float *bias, float *y, long rows, long k, long n, int threads) {
    for (long first = 0; first < rows; first += ROWS) {
        long count = rows - first < ROWS ? rows - first : ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (long panel = 0; panel < panels_of(n); panel++)
            tiles(count, k, x + first * k, k, packed + panel * k * PANEL, packed + (panel + 1) * k * PANEL,
                  y + first * n + panel * PANEL, n, columns_of(panel, n), bias ? bias + panel * PANEL : 0, 0);
    }
}
