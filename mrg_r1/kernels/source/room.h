/* Memory for what a thread computes with, kept from call to call: fresh memory costs more than the arithmetic. */
#ifndef MRG_R1_ROOM_H
#define MRG_R1_ROOM_H

#include <stdlib.h>

static __thread float *room_kept;
static __thread size_t room_floats;

/* `floats` of them, with whatever is in them; NULL where there is no memory. */
static inline float *room_of(size_t floats) {
    if (floats > room_floats) {
        free(room_kept);
        room_kept = aligned_alloc(64, (4 * floats + 63) / 64 * 64);
        room_floats = room_kept ? floats : 0;
    }
    return room_kept;
}

#endif
