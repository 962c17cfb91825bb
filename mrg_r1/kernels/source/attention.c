/* The attention of a decode step: each row's newest token to its study's prompt and to its row's own tokens. */
#include <math.h>
#include <stdlib.h>

#include "products.h"
#include "room.h"

typedef struct {
    const float *q, *k, *v;          /* of computed rows: heads behind one another */
    long q_row, k_row, v_row;        /* floats from one row to the next */
    const int64_t *places;           /* [rows] the place that each row stands for, a study's together; NULL: its own */
    const int64_t *of_place;         /* [studies * members] the computed row of each place; NULL: its own */
    long rows, studies, members, heads, key_heads, size;
    const float *prompt_keys;        /* [studies, key_heads] packed [size, prompt] */
    const float *prompt_values;      /* [studies, key_heads] packed [prompt, size] */
    const float *prompt_bias;        /* [prompt] every bias_row floats, or NULL */
    long prompt, bias_row;
    float *own_keys, *own_values;    /* [studies, key_heads, members] packed [size, length] and [length, size] */
    const float *own_bias;           /* [width] or NULL */
    long length, width;              /* the new token is written to column width - 1 */
    float *out;                      /* [rows, heads, size] */
} Step;

INLINE void softmax(float *scores, long count) {
    float most = scores[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (long at = 0; at < count; at++) most = scores[at] > most ? scores[at] : most;
#pragma omp simd reduction(+ : sum)
    for (long at = 0; at < count; at++) sum += scores[at] = exp_of(scores[at] - most);
    for (long at = 0; at < count; at++) scores[at] /= sum;
}

static long member_of(const Step *step, long row) { return (step->places ? step->places[row] : row) % step->members; }

/* All rows of one study under one key head; `first` is the first of them. 0, or 1 where there is no memory. */
static int of_head(const Step *step, long study, long key_head, long first, long count) {
    long size = step->size, group = step->heads / step->key_heads, queries = count * group;
    long prompt = step->prompt, seen = prompt + step->width, block = study * step->key_heads + key_head;
    long one_keys = panels_of(step->length) * PANEL * size, one_values = panels_of(size) * PANEL * step->length;
    float *own_keys = step->own_keys + block * step->members * one_keys;
    float *own_values = step->own_values + block * step->members * one_values;
    for (long member = 0; member < step->members; member++) {
        long place = study * step->members + member, row = step->of_place ? step->of_place[place] : place;
        const float *key = step->k + row * step->k_row + key_head * size;
        const float *value = step->v + row * step->v_row + key_head * size;
        long column = step->width - 1;
        float *keys = own_keys + member * one_keys + column / PANEL * PANEL * size + column % PANEL;
        float *values = own_values + member * one_values + column * PANEL;
        for (long at = 0; at < size; at++) {
            keys[at * PANEL] = key[at];
            values[at / PANEL * PANEL * step->length + at % PANEL] = value[at];
        }
    }
    if (!count) return 0;
    float *q = room_of(queries * (2 * size + seen)), *out = q + queries * size, *scores = out + queries * size;
    if (!q) return 1;
    float scale = 1.0f / sqrtf((float)size);
    for (long row = 0; row < count; row++) {
        const float *from = step->q + (first + row) * step->q_row + key_head * group * size;
        for (long at = 0; at < group * size; at++) q[row * group * size + at] = from[at] * scale;
    }
    const float *keys = step->prompt_keys + block * panels_of(prompt) * PANEL * size;
    const float *values = step->prompt_values + block * panels_of(size) * PANEL * prompt;
    product(queries, size, q, size, keys, keys + PANEL * size, size, prompt, scores, seen,
            step->prompt_bias ? step->prompt_bias + study * step->bias_row : 0, 0);
    for (long row = 0; row < count; row++) {
        float *of_row = scores + row * group * seen;
        const float *own = own_keys + member_of(step, first + row) * one_keys;
        product(group, size, q + row * group * size, size, own, own + one_keys, size, step->width, of_row + prompt,
                seen, step->own_bias, 0);
        for (long query = 0; query < group; query++) softmax(of_row + query * seen, seen);
    }
    product(queries, prompt, scores, seen, values, values + PANEL * prompt, prompt, size, out, size, 0, 0);
    for (long row = 0; row < count; row++) {
        float *of_row = out + row * group * size;
        const float *own = own_values + member_of(step, first + row) * one_values;
        product(group, step->width, scores + row * group * seen + prompt, seen, own, own + one_values, step->length,
                size, of_row, size, 0, 1);
        memcpy(step->out + ((first + row) * step->heads + key_head * group) * size, of_row, 4 * group * size);
    }
    return 0;
}

/* 0; 1 where memory is short; 2 where there are places that are none, or of a study after a later one's. */
int decode_attention(const Step *step, int threads) {
    long places = step->studies * step->members, row = 0;
    for (row = 0; step->places && row < step->rows; row++)
        if (step->places[row] < 0 || step->places[row] >= places ||
            (row && step->places[row] / step->members < step->places[row - 1] / step->members))
            return 2;
    for (long place = 0; step->of_place && place < places; place++)
        if (step->of_place[place] < 0 || step->of_place[place] >= step->rows) return 2;
    long *firsts = malloc(sizeof(long) * (step->studies + 1)); /* rows before each study's */
    if (!firsts) return 1;
    row = 0;
    for (long study = 0; study <= step->studies; study++) {
        while (row < step->rows && (step->places ? step->places[row] : row) < study * step->members) row++;
        firsts[study] = row;
    }
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : wrong) if (threads > 1)
    for (long block = 0; block < step->studies * step->key_heads; block++) {
        long study = block / step->key_heads, first = firsts[study];
        wrong |= of_head(step, study, block % step->key_heads, first, firsts[study + 1] - first);
    }
    free(firsts);
    return wrong;
}
