/* c = a b of a few rows and a packed matrix: [k, n] in panels [n / PANEL][k][PANEL], the last filled up with zeros. */
#ifndef MRG_R1_PRODUCTS_H
#define MRG_R1_PRODUCTS_H

#include "vectors.h"

#define TILE 8 /* rows of a tile: with two vectors of columns 16 sums, of which each waits for itself alone */

INLINE void tile(int rows, long k, const float *a, long a_row, long a_step, const float *panel, const float *next,
                 float *c, long c_row, int columns, const float *bias, int add) {
    vec left[TILE], right[TILE];
    for (int row = 0; row < rows; row++) left[row] = right[row] = (vec){0};
    for (long at = 0; at < k; at++) {
        __builtin_prefetch(next + at * PANEL);
        __builtin_prefetch(next + at * PANEL + LANES);
        vec first = load(panel + at * PANEL), second = load(panel + at * PANEL + LANES);
        for (int row = 0; row < rows; row++) {
            vec value = every(a[row * a_row + at * a_step]);
            left[row] += value * first;
            right[row] += value * second;
        }
    }
    if (columns == PANEL) {
        for (int row = 0; row < rows; row++) {
            float *to = c + row * c_row;
            vec one = left[row], two = right[row];
            if (bias) one += load(bias), two += load(bias + LANES);
            if (add) one += load(to), two += load(to + LANES);
            store(to, one);
            store(to + LANES, two);
        }
        return;
    }
    for (int row = 0; row < rows; row++) {
        float line[PANEL];
        store(line, left[row]);
        store(line + LANES, right[row]);
        float *to = c + row * c_row;
        for (int column = 0; column < columns; column++)
            to[column] = line[column] + (bias ? bias[column] : 0.0f) + (add ? to[column] : 0.0f);
    }
}

/* All rows of one panel's columns; the panel at `next` is on its way from memory meanwhile. */
#define ROWS_OF_A_PANEL(name, a_row, a_step)                                                                           \
    __attribute__((unused)) static void name(long rows, long k, const float *a, long apart, const float *panel,        \
                                             const float *next, float *c, long c_row, int columns, const float *bias,  \
                                             int add) {                                                                \
        long row = 0;                                                                                                  \
        for (; row + TILE <= rows; row += TILE) TILE_OF(TILE, a_row, a_step);                                          \
        switch (rows - row) {                                                                                          \
        case 7: TILE_OF(7, a_row, a_step); break;                                                                      \
        case 6: TILE_OF(6, a_row, a_step); break;                                                                      \
        case 5: TILE_OF(5, a_row, a_step); break;                                                                      \
        case 4: TILE_OF(4, a_row, a_step); break;                                                                      \
        case 3: TILE_OF(3, a_row, a_step); break;                                                                      \
        case 2: TILE_OF(2, a_row, a_step); break;                                                                      \
        case 1: TILE_OF(1, a_row, a_step); break;                                                                      \
        }                                                                                                              \
    }
#define TILE_OF(count, a_row, a_step)                                                                                  \
    tile(count, k, a + row * (a_row), a_row, a_step, panel, next, c + row * c_row, c_row, columns, bias, add)

ROWS_OF_A_PANEL(tiles, apart, 1)            /* rows of a are `apart` */
ROWS_OF_A_PANEL(transposed_tiles, 1, apart) /* its columns are */

INLINE long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

INLINE int columns_of(long panel, long n) { return n - panel * PANEL < PANEL ? (int)(n - panel * PANEL) : PANEL; }

INLINE long padded(long n) { return panels_of(n) * PANEL; }

/* c [rows, n] = a [rows, k] b + bias [n], or with `add` c + a b, of a packed matrix [k, n] that was cut from one [deep,
   n]; the one at `next` is on its way from memory meanwhile. */
INLINE void product(long rows, long k, const float *a, long a_row, const float *packed, const float *next, long deep,
                    long n, float *c, long c_row, const float *bias, int add) {
    for (long panel = 0; panel < panels_of(n); panel++)
        tiles(rows, k, a, a_row, packed + panel * deep * PANEL, next + panel * deep * PANEL, c + panel * PANEL, c_row,
              columns_of(panel, n), bias ? bias + panel * PANEL : 0, add);
}

#endif
