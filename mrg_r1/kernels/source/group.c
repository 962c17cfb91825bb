/* A group's attention to its prompt and to itself, with its gradient: completions of a study see its prompt and what
   came before them in themselves. Completions that begin alike share tokens; each is a path through them. Without a
   prompt it is causal attention, without sight of their own full attention to the prompt. Scores of a few rows at a
   time are made and, for the gradient, made again (FlashAttention, arXiv 2205.14135). */
#include <math.h>
#include <stdlib.h>

#include "products.h"
#include "room.h"

#define ROWS 64 /* queries at a time, about: the heads of a key head stay together */

typedef struct {
    const float *q, *k, *v, *prompt_k, *prompt_v; /* tokens' heads behind one another */
    long q_row, k_row, v_row, prompt_k_row, prompt_v_row; /* floats from one token to the next */
    const int64_t *of_study;  /* [studies + 1] its first completion */
    const int64_t *prompts;   /* [studies + 1] its prompt's first token */
    const int64_t *starts;    /* [completions + 1] where its path begins */
    const int64_t *begins;    /* [completions] where on it its own tokens begin, which lie behind one another */
    const int64_t *paths;     /* tokens of completions */
    long studies, heads, key_heads, size;
    long own;                 /* whether tokens see themselves and what came before them */
    float *out, *lse;         /* [T, heads, size] and the log-sum-exp of scaled scores [T, heads] */
    const float *grad;        /* of out, in the backward pass, as what follows */
    float *dq, *dk, *dv;      /* [T, heads, size], [T, key heads, size] twice; dk and dv 0 before */
    float *d_prompt_k, *d_prompt_v; /* [prompt tokens, key heads, size] */
} Group;

/* One study under one key head, and what is laid out for it. */
typedef struct {
    const Group *group;
    long study, key_head, each; /* query heads of the key head */
    long prompt, length, size, wide, row; /* of the longest completion; size filled up; floats of a row of scores */
    float *keys, *values, *own_keys, *own_values;          /* as the first products read them */
    float *keys_back, *own_keys_back;                      /* as the gradient of queries does */
    float *d_keys, *d_values, *d_own_keys, *d_own_values;  /* [prompt or length, wide] */
    float *factors;                                        /* of rows whose weights do not add up to 1 yet */
    float *q, *q_panels, *grad, *grad_panels, *out, *weights, *d_scores;
} Head;

static float *part(float **from, long floats) {
    float *here = *from;
    *from += (floats + 15) / 16 * 16;
    return here;
}

/* Lay out what is needed at `room`, or with NULL say how many floats that is. */
static long lay_out(Head *head, float *room, int backward) {
    float *at = room;
    long prompts = padded(head->prompt), lengths = padded(head->length), size = head->size, wide = head->wide;
    head->row = prompts + lengths;
    head->keys = part(&at, prompts * size);
    head->own_keys = part(&at, lengths * size);
    head->values = part(&at, (backward ? prompts : head->prompt) * wide);
    head->own_values = part(&at, (backward ? lengths : head->length) * wide);
    long rows = ROWS + head->each;
    head->factors = part(&at, rows);
    head->q = part(&at, rows * size);
    head->out = part(&at, rows * wide);
    head->weights = part(&at, rows * head->row);
    if (backward) {
        head->keys_back = part(&at, head->prompt * wide);
        head->own_keys_back = part(&at, head->length * wide);
        head->d_keys = part(&at, head->prompt * wide);
        head->d_values = part(&at, head->prompt * wide);
        head->d_own_keys = part(&at, head->length * wide);
        head->d_own_values = part(&at, head->length * wide);
        head->q_panels = part(&at, rows * wide);
        head->grad = part(&at, rows * size);
        head->grad_panels = part(&at, rows * wide);
        head->d_scores = part(&at, rows * head->row);
    }
    return at - room;
}

/* rows[number] of `count`, each [size] and `apart` floats, or those that `which` names: packed as [size, count] */
static void pack_across(const float *rows, long apart, const int64_t *which, long count, long size, float *to) {
    for (long panel = 0; panel < panels_of(count); panel++, to += size * PANEL)
        for (int column = 0; column < PANEL; column++) {
            long number = panel * PANEL + column;
            const float *from = rows + (which && number < count ? which[number] : number) * apart;
            for (long at = 0; at < size; at++) to[at * PANEL + column] = number < count ? from[at] : 0.0f;
        }
}

/* The same packed as [count, size]. */
static void pack_along(const float *rows, long apart, const int64_t *which, long count, long size, float *to) {
    for (long panel = 0; panel < panels_of(size); panel++)
        for (long number = 0; number < count; number++, to += PANEL) {
            const float *from = rows + (which ? which[number] : number) * apart + panel * PANEL;
            int columns = columns_of(panel, size);
            for (int column = 0; column < PANEL; column++) to[column] = column < columns ? from[column] : 0.0f;
        }
}

/* Probabilities of `tokens` own tokens of a completion from place `first` of its path on: rows of each token's query
   heads, in each the prompt's and from padded(prompt) on the path's. Where lse is not known yet it is written, and the
   weights are to be multiplied by the row's factor. */
static void weigh(const Head *head, long token, long tokens, long first, int known) {
    const Group *group = head->group;
    long size = head->size, rows = tokens * head->each, prompts = padded(head->prompt);
    long seen = group->own ? first + tokens : 0;
    float scale = 1.0f / sqrtf((float)size);
    for (long at = 0; at < tokens; at++) {
        const float *from = group->q + (token + at) * group->q_row + head->key_head * head->each * size;
        for (long number = 0; number < head->each * size; number++)
            head->q[at * head->each * size + number] = from[number] * scale;
    }
    product(rows, size, head->q, size, head->keys, head->keys + size * PANEL, size, prompts, head->weights, head->row,
            0, 0);
    product(rows, size, head->q, size, head->own_keys, head->own_keys + size * PANEL, size, padded(seen),
            head->weights + prompts, head->row, 0, 0);
    for (long row = 0; row < rows; row++) {
        float *of_prompt = head->weights + row * head->row, *own = of_prompt + prompts, *lse;
        long sees = group->own ? first + row / head->each + 1 : 0;
        lse = group->lse + (token + row / head->each) * group->heads + head->key_head * head->each + row % head->each;
        if (known) {
            float total = *lse;
#pragma omp simd
            for (long at = 0; at < prompts; at++) of_prompt[at] = exp_of(of_prompt[at] - total);
#pragma omp simd
            for (long at = 0; at < sees; at++) own[at] = exp_of(own[at] - total);
        } else {
            float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
            for (long at = 0; at < head->prompt; at++) most = of_prompt[at] > most ? of_prompt[at] : most;
#pragma omp simd reduction(max : most)
            for (long at = 0; at < sees; at++) most = own[at] > most ? own[at] : most;
#pragma omp simd reduction(+ : sum)
            for (long at = 0; at < head->prompt; at++) sum += of_prompt[at] = exp_of(of_prompt[at] - most);
#pragma omp simd reduction(+ : sum)
            for (long at = 0; at < sees; at++) sum += own[at] = exp_of(own[at] - most);
            head->factors[row] = 1.0f / sum;
            *lse = most + logf(sum);
        }
        for (long at = head->prompt; at < prompts; at++) of_prompt[at] = 0;
        for (long at = sees; at < padded(seen); at++) own[at] = 0;
    }
}

static void forward_of(const Head *head, const int64_t *path, long token, long begin, long length) {
    const Group *group = head->group;
    long size = head->size, wide = head->wide, prompts = padded(head->prompt), step = ROWS / head->each;
    step = step ? step : 1;
    if (group->own) {
        pack_across(group->k + head->key_head * size, group->k_row, path, length, size, head->own_keys);
        pack_along(group->v + head->key_head * size, group->v_row, path, length, size, head->own_values);
    }
    for (long first = begin; first < length; first += step, token += step) {
        long tokens = length - first < step ? length - first : step, rows = tokens * head->each;
        weigh(head, token, tokens, first, 0);
        product(rows, head->prompt, head->weights, head->row, head->values, head->values + head->prompt * PANEL,
                head->prompt, wide, head->out, wide, 0, 0);
        if (group->own)
            product(rows, first + tokens, head->weights + prompts, head->row, head->own_values,
                    head->own_values + length * PANEL, length, wide, head->out, wide, 0, 1);
        for (long row = 0; row < rows; row++) {
            float *out = group->out + ((token + row / head->each) * group->heads + head->key_head * head->each +
                                       row % head->each) * size;
            for (long at = 0; at < size; at++) out[at] = head->out[row * wide + at] * head->factors[row];
        }
    }
}

static void backward_of(const Head *head, const int64_t *path, long token, long begin, long length) {
    const Group *group = head->group;
    long size = head->size, wide = head->wide, prompts = padded(head->prompt), step = ROWS / head->each;
    step = step ? step : 1;
    if (group->own) {
        const float *k = group->k + head->key_head * size, *v = group->v + head->key_head * size;
        pack_across(k, group->k_row, path, length, size, head->own_keys);
        pack_along(k, group->k_row, path, length, size, head->own_keys_back);
        pack_across(v, group->v_row, path, length, size, head->own_values);
        memset(head->d_own_keys, 0, 4 * length * wide);
        memset(head->d_own_values, 0, 4 * length * wide);
    }
    float scale = 1.0f / sqrtf((float)size);
    for (long first = begin; first < length; first += step, token += step) {
        long tokens = length - first < step ? length - first : step, rows = tokens * head->each;
        long seen = group->own ? first + tokens : 0;
        weigh(head, token, tokens, first, 1);
        for (long at = 0; at < tokens; at++)
            memcpy(head->grad + at * head->each * size,
                   group->grad + ((token + at) * group->heads + head->key_head * head->each) * size,
                   4 * head->each * size);
        product(rows, size, head->grad, size, head->values, head->values + size * PANEL, size, prompts, head->d_scores,
                head->row, 0, 0);
        product(rows, size, head->grad, size, head->own_values, head->own_values + size * PANEL, size, padded(seen),
                head->d_scores + prompts, head->row, 0, 0);
        for (long row = 0; row < rows; row++) {
            const float *out = group->out + ((token + row / head->each) * group->heads +
                                             head->key_head * head->each + row % head->each) * size;
            const float *grad = head->grad + row * size, *weights = head->weights + row * head->row;
            float *d_scores = head->d_scores + row * head->row, inner = 0;
#pragma omp simd reduction(+ : inner)
            for (long at = 0; at < size; at++) inner += grad[at] * out[at];
            for (long at = 0; at < prompts + padded(seen); at++) d_scores[at] = weights[at] * (d_scores[at] - inner);
        }
        product(rows, head->prompt, head->d_scores, head->row, head->keys_back, head->keys_back + head->prompt * PANEL,
                head->prompt, wide, head->out, wide, 0, 0);
        product(rows, seen, head->d_scores + prompts, head->row, head->own_keys_back,
                head->own_keys_back + length * PANEL, length, wide, head->out, wide, 0, 1);
        for (long row = 0; row < rows; row++) {
            float *dq = group->dq + ((token + row / head->each) * group->heads + head->key_head * head->each +
                                     row % head->each) * size;
            for (long at = 0; at < size; at++) dq[at] = head->out[row * wide + at] * scale;
        }
        pack_along(head->grad, size, 0, rows, size, head->grad_panels);
        pack_along(head->q, size, 0, rows, size, head->q_panels); /* scaled already, as the gradient of keys wants */
        for (long panel = 0; panel < wide / PANEL; panel++) {
            const float *grad = head->grad_panels + panel * rows * PANEL, *q = head->q_panels + panel * rows * PANEL;
            long column = panel * PANEL;
#define ADD(count, a, b, c) transposed_tiles(count, rows, a, head->row, b, b, c + column, wide, PANEL, 0, 1)
            ADD(head->prompt, head->weights, grad, head->d_values);
            ADD(head->prompt, head->d_scores, q, head->d_keys);
            ADD(seen, head->weights + prompts, grad, head->d_own_values);
            ADD(seen, head->d_scores + prompts, q, head->d_own_keys);
#undef ADD
        }
    }
    for (long at = 0; group->own && at < length; at++) {
        float *dk = group->dk + (path[at] * group->key_heads + head->key_head) * size;
        float *dv = group->dv + (path[at] * group->key_heads + head->key_head) * size;
        for (long number = 0; number < size; number++) {
            dk[number] += head->d_own_keys[at * wide + number];
            dv[number] += head->d_own_values[at * wide + number];
        }
    }
}

static int of_head(const Group *group, long study, long key_head, int backward) {
    Head head = {.group = group, .study = study, .key_head = key_head, .each = group->heads / group->key_heads};
    long from = group->prompts[study], size = group->size;
    head.prompt = group->prompts[study + 1] - from;
    head.size = size;
    head.wide = padded(size);
    for (long one = group->of_study[study]; one < group->of_study[study + 1]; one++) {
        long length = group->own ? group->starts[one + 1] - group->starts[one] : 0;
        head.length = length > head.length ? length : head.length;
    }
    float *room = room_of(lay_out(&head, 0, backward));
    if (!room) return 1;
    lay_out(&head, room, backward);
    const float *k = group->prompt_k + from * group->prompt_k_row + key_head * size;
    const float *v = group->prompt_v + from * group->prompt_v_row + key_head * size;
    pack_across(k, group->prompt_k_row, 0, head.prompt, size, head.keys);
    if (!backward) pack_along(v, group->prompt_v_row, 0, head.prompt, size, head.values);
    if (backward) {
        pack_across(v, group->prompt_v_row, 0, head.prompt, size, head.values);
        pack_along(k, group->prompt_k_row, 0, head.prompt, size, head.keys_back);
        memset(head.d_keys, 0, 4 * head.prompt * head.wide);
        memset(head.d_values, 0, 4 * head.prompt * head.wide);
    }
    for (long one = group->of_study[study]; one < group->of_study[study + 1]; one++) {
        const int64_t *path = group->paths + group->starts[one];
        long begin = group->begins[one], length = group->starts[one + 1] - group->starts[one];
        if (begin < length) (backward ? backward_of : forward_of)(&head, path, path[begin], begin, length);
    }
    for (long at = 0; backward && at < head.prompt; at++) {
        long to = ((from + at) * group->key_heads + key_head) * size;
        memcpy(group->d_prompt_k + to, head.d_keys + at * head.wide, 4 * size);
        memcpy(group->d_prompt_v + to, head.d_values + at * head.wide, 4 * size);
    }
    return 0;
}

/* 0, or 1 where memory is short. */
int group_attention(const Group *group, int backward, int threads) {
    int wrong = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : wrong) if (threads > 1)
    for (long block = 0; block < group->studies * group->key_heads; block++)
        wrong |= of_head(group, block / group->key_heads, block % group->key_heads, backward);
    return wrong;
}
