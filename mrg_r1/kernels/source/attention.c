/* The attention of a decode step: each row's newest token to its study's prompt and to its row's own tokens. */
#include <math.h>
#include <stdlib.h>

#include "products.h"

typedef struct {
    const float *q, *k, *v;          /* of computed rows: heads behind one another */
    long q_row, k_row, v_row;        /* floats from one row to the next */
    const int64_t *places;           /* [rows] the place that each computed row stands for, a study's together; NULL: its own */
    const int64_t *of_place;         /* [studies * members] the computed row of each place; NULL: its own */
    long rows, studies, members, heads, key_heads, size;
    const float *prompt_keys;        /* [studies, key_heads] packed [size, prompt] */
    const float *prompt_values;      /* [studies, key_heads] packed [prompt, size] */
    const float *prompt_bias;        /* [prompt] every bias_row floats, or NULL */
    long prompt, bias_row;
    float *own_keys, *own_values;    /* [studies, key_heads, members, length, size] */
    const float *own_bias;           /* [width] or NULL */
    long length, width;              /* the new token is written to column width - 1 */
    float *out;                      /* [rows, heads, size] */
} Step;

static __thread float *scratch;
static __thread size_t scratch_floats;

static float *room(size_t floats) {
    if (floats > scratch_floats) {
        free(scratch);
        scratch = aligned_alloc(64, (4 * floats + 63) / 64 * 64);
        scratch_floats = scratch ? floats : 0;
    }
    return scratch;
}

/* scores [width] of one query and keys [width, size] */
INLINE void scores_of(const float *q, const float *keys, float *scores, long width, const long size) {
    for (long at = 0; at < width; at++, keys += size) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long number = 0; number < size; number++) sum += q[number] * keys[number];
        scores[at] = sum;
    }
}

/* out [size] += weights [width] of values [width, size] */
INLINE void weighted(const float *weights, const float *values, float *out, long width, const long size) {
    for (long at = 0; at < width; at++, values += size)
#pragma omp simd
        for (long number = 0; number < size; number++) out[number] += weights[at] * values[number];
}

/* A loop over a size that is known is one that is unrolled. */
static void to_own(const float *q, const float *keys, float *scores, long width, long size) {
    if (size == 64) scores_of(q, keys, scores, width, 64);
    else if (size == 128) scores_of(q, keys, scores, width, 128);
    else scores_of(q, keys, scores, width, size);
}

static void of_own(const float *weights, const float *values, float *out, long width, long size) {
    if (size == 64) weighted(weights, values, out, width, 64);
    else if (size == 128) weighted(weights, values, out, width, 128);
    else weighted(weights, values, out, width, size);
}

INLINE void softmax(float *scores, long count) {
    float most = scores[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (long at = 0; at < count; at++) most = scores[at] > most ? scores[at] : most;
#pragma omp simd reduction(+ : sum)
    for (long at = 0; at < count; at++) sum += scores[at] = exp_of(scores[at] - most);
    for (long at = 0; at < count; at++) scores[at] /= sum;
}

/* All rows of one study under one key head; `first` is the first of them. 0, or 1 where there is no memory. */
static int of_head(const Step *step, long study, long key_head, long first, long count) {
    long size = step->size, group = step->heads / step->key_heads, queries = count * group, seen = step->prompt + step->width;
    long block = study * step->key_heads + key_head, panels = (step->prompt + PANEL - 1) / PANEL;
    float *own_keys = step->own_keys + block * step->members * step->length * size;
    float *own_values = step->own_values + block * step->members * step->length * size;
    for (long member = 0; member < step->members; member++) {
        long place = study * step->members + member, row = step->of_place ? step->of_place[place] : place;
        long at = (member * step->length + step->width - 1) * size;
        memcpy(own_keys + at, step->k + row * step->k_row + key_head * size, 4 * size);
        memcpy(own_values + at, step->v + row * step->v_row + key_head * size, 4 * size);
    }
    if (!count) return 0;
    float *q = room(queries * (2 * size + seen)), *out = q + queries * size, *scores = out + queries * size;
    if (!q) return 1;
    float scale = 1.0f / sqrtf((float)size);
    for (long row = 0; row < count; row++) {
        const float *from = step->q + (first + row) * step->q_row + key_head * group * size;
        for (long at = 0; at < group * size; at++) q[row * group * size + at] = from[at] * scale;
    }
    const float *keys = step->prompt_keys + block * panels * PANEL * size;
    for (long panel = 0; panel < panels; panel++)
        tiles(queries, size, q, size, keys + panel * PANEL * size, scores + panel * PANEL, seen,
              columns_of(panel, step->prompt), step->prompt_bias ? step->prompt_bias + study * step->bias_row + panel * PANEL : 0, 0);
    for (long row = 0; row < queries; row++) {
        long member = (step->places ? step->places[first + row / group] : first + row / group) % step->members;
        float *of_row = scores + row * seen;
        to_own(q + row * size, own_keys + member * step->length * size, of_row + step->prompt, step->width, size);
        if (step->own_bias)
            for (long at = 0; at < step->width; at++) of_row[step->prompt + at] += step->own_bias[at];
        softmax(of_row, seen);
    }
    const float *values = step->prompt_values + block * ((size + PANEL - 1) / PANEL) * step->prompt * PANEL;
    for (long panel = 0; panel * PANEL < size; panel++)
        tiles(queries, step->prompt, scores, seen, values + panel * step->prompt * PANEL, out + panel * PANEL, size,
              columns_of(panel, size), 0, 0);
    for (long row = 0; row < queries; row++) {
        long member = (step->places ? step->places[first + row / group] : first + row / group) % step->members;
        float *of_row = out + row * size;
        of_own(scores + row * seen + step->prompt, own_values + member * step->length * size, of_row, step->width, size);
        memcpy(step->out + ((first + row / group) * step->heads + key_head * group + row % group) * size, of_row, 4 * size);
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
