/* c = a b of a few rows and a packed matrix: [k, n] in panels [n / PANEL][k][PANEL], the last filled up with zeros. */
#ifndef MRG_R1_PRODUCTS_H
#define MRG_R1_PRODUCTS_H

#include "vectors.h"

#define TILE 8 /* rows of a tile: with two vectors of columns 16 sums, of which each waits for itself alone */

INLINE void tile(int rows, long k, const float *a, long a_row, const float *panel, const float *next, float *c,
                 long c_row, int columns, const float *bias, int add) {
    vec left[TILE], right[TILE];
    for (int row = 0; row < rows; row++) left[row] = right[row] = (vec){0};
    for (long at = 0; at < k; at++) {
        __builtin_prefetch(next + at * PANEL);
        __builtin_prefetch(next + at * PANEL + LANES);
        vec first = load(panel + at * PANEL), second = load(panel + at * PANEL + LANES);
        for (int row = 0; row < rows; row++) {
            vec value = every(a[row * a_row + at]);
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
static void tiles(long rows, long k, const float *a, long a_row, const float *panel, const float *next, float *c,
                  long c_row, int columns, const float *bias, int add) {
    long row = 0;
#define OF(count) tile(count, k, a + row * a_row, a_row, panel, next, c + row * c_row, c_row, columns, bias, add)
    for (; row + TILE <= rows; row += TILE) OF(TILE);
    switch (rows - row) {
    case 7: OF(7); break;
    case 6: OF(6); break;
    case 5: OF(5); break;
    case 4: OF(4); break;
    case 3: OF(3); break;
    case 2: OF(2); break;
    case 1: OF(1); break;
    }
#undef OF
}

INLINE long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

INLINE int columns_of(long panel, long n) { return n - panel * PANEL < PANEL ? (int)(n - panel * PANEL) : PANEL; }

/* c [rows, n] = a [rows, k] b + bias [n], or with `add` c + a b, of a packed matrix [k, n] that was cut from one [deep,
   n]; the one at `next` is on its way from memory meanwhile. */
INLINE void product(long rows, long k, const float *a, long a_row, const float *packed, const float *next, long deep,
                    long n, float *c, long c_row, const float *bias, int add) {
    for (long panel = 0; panel < panels_of(n); panel++)
        tiles(rows, k, a, a_row, packed + panel * deep * PANEL, next + panel * deep * PANEL, c + panel * PANEL, c_row,
              columns_of(panel, n), bias ? bias + panel * PANEL : 0, add);
}

#endif
