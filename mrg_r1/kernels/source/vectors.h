/* Vectors as wide as the machine this is compiled for; GCC's and Clang's own extension, no intrinsics. */
#ifndef MRG_R1_VECTORS_H
#define MRG_R1_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define PANEL (2 * LANES) /* columns of a packed matrix that stand side by side */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef vec loose __attribute__((aligned(4))); /* at any float's address */

INLINE vec load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, vec value) { *(loose *)to = value; }
INLINE vec every(float value) { return value - (vec){0}; }

#define ROUNDING 12582912.0f /* 1.5 * 2^23: added to a small number it leaves its nearest integer in the low bits */

/* exp within 2 units in the last place: 0 below -87, where normal numbers nearly end, and infinite above 88.
   After Cephes: 2^n times a polynomial of what is left. NaN stays NaN, since neither comparison holds for it. */
INLINE float exp_of(float x) {
    float within = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float rounded = within * 1.44269504088896341f + ROUNDING, n = rounded - ROUNDING;
    float r = within - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : (x > 88.0f ? __builtin_inff() : p * power);
}

#endif
