/* One token for each place, and what is written down of it. */
#include <math.h>

#include "vectors.h"

#define BLOCK 64 /* tokens whose probabilities are added up before they are searched */

typedef struct {
    float *logits;            /* [rows, tokens], -inf where a token is never drawn; overwritten */
    double *sums;             /* [rows, blocks + 1] scratch */
    long rows, tokens;
    const int64_t *of_place;  /* [places] the row that each place is drawn from; NULL: its own */
    const double *uniforms;   /* [places, length] in [0, 1) */
    long places, length, step;
    const int64_t *eos;       /* [ends] */
    long ends;
    int64_t pad;
    int64_t *drawn;           /* [places] */
    int64_t *token_ids;       /* [places, length], like the next two; column `step` is written */
    float *logp;
    uint8_t *mask;
    uint8_t *ended;           /* [places] */
} Draw;

/* exp(logits - most) in place, and in sums what precedes each block, the total last; 1 where it is no distribution */
static int weigh(float *logits, double *sums, long tokens) {
    float most = logits[0];
#pragma omp simd reduction(max : most)
    for (long at = 0; at < tokens; at++) most = logits[at] > most ? logits[at] : most;
    double total = 0;
    long block = 0;
    for (long first = 0; first < tokens; first += BLOCK, block++) {
        long count = tokens - first < BLOCK ? tokens - first : BLOCK;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long at = first; at < first + count; at++) sum += logits[at] = exp_of(logits[at] - most);
        sums[block] = total;
        total += sum;
    }
    sums[block] = total;
    return !(total >= 1.0 && total < INFINITY); /* the most probable alone is 1 */
}

/* The first token up to which there is more than `target`. */
static long search(const float *weights, const double *sums, long tokens, double target) {
    long low = 0, high = (tokens + BLOCK - 1) / BLOCK; /* sums[low] <= target < sums[high] */
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (sums[middle] <= target) low = middle;
        else high = middle;
    }
    double sum = sums[low];
    long last = -1, end = (low + 1) * BLOCK < tokens ? (low + 1) * BLOCK : tokens;
    for (long at = low * BLOCK; at < end; at++) {
        if (!(weights[at] > 0)) continue;
        last = at;
        sum += weights[at];
        if (sum > target) break;
    }
    return last; /* of this block the last that can be drawn, where another order of adding up has rounded otherwise */
}

/* 0, 1 + the row whose logits are no distribution, or -1 where there is a place of no row. */
long sample(const Draw *draw, int threads) {
    long blocks = (draw->tokens + BLOCK - 1) / BLOCK, wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : wrong) if (threads > 1)
    for (long row = 0; row < draw->rows; row++)
        if (weigh(draw->logits + row * draw->tokens, draw->sums + row * (blocks + 1), draw->tokens)) wrong = row + 1;
    if (wrong) return wrong;
    for (long place = 0; draw->of_place && place < draw->places; place++)
        if (draw->of_place[place] < 0 || draw->of_place[place] >= draw->rows) return -1;
    for (long place = 0; place < draw->places; place++) {
        long row = draw->of_place ? draw->of_place[place] : place, at = place * draw->length + draw->step;
        const float *weights = draw->logits + row * draw->tokens;
        const double *sums = draw->sums + row * (blocks + 1);
        double total = sums[blocks], target = fmax(draw->uniforms[at], 0) * total, most = nextafter(total, 0);
        long token = search(weights, sums, draw->tokens, fmin(target, most));
        int going = !draw->ended[place];
        draw->drawn[place] = token;
        draw->token_ids[at] = going ? token : draw->pad;
        draw->logp[at] = going ? (float)(log((double)weights[token]) - log(total)) : 0.0f;
        draw->mask[at] = going;
        for (long end = 0; end < draw->ends; end++)
            if (token == draw->eos[end]) draw->ended[place] = 1;
    }
    return 0;
}
