/* Who holds a block: one slot, as with most blocks, or a set of slots that many blocks share.

   A Holder is one word. Its lowest bit tells the two apart: 1 is a slot itself, 0 a pointer to a set. The word 0 is nobody.
   A set never changes, has at least two slots, and is freed with the last Holder that refers to it. */

#ifndef DYNAMO_KV_HOLDERS_H
#define DYNAMO_KV_HOLDERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uintptr_t Holder;

#define NOBODY ((Holder)0)
#define MAX_SLOTS (1u << 20)

typedef struct {
    size_t references;
    uint32_t words;
    uint64_t bits[];
} Set;

static inline Holder single(uint32_t slot) { return (Holder)slot << 1 | 1; }
static inline bool is_single(Holder holder) { return holder & 1; }
static inline uint32_t slot_of(Holder holder) { return (uint32_t)(holder >> 1); }
static inline Set *set_of(Holder holder) { return (Set *)holder; }
static inline bool is_set(Holder holder) { return holder != NOBODY && !is_single(holder); }

static inline Holder retain(Holder holder)
{
    if (is_set(holder)) set_of(holder)->references++;
    return holder;
}

static inline void release(Holder holder)
{
    if (is_set(holder) && --set_of(holder)->references == 0) free(set_of(holder));
}

static inline bool holds(Holder holder, uint32_t slot)
{
    if (is_single(holder)) return slot_of(holder) == slot;
    return slot / 64 < set_of(holder)->words && set_of(holder)->bits[slot / 64] >> slot % 64 & 1;
}

/* bits |= holder, as far as there are words. */
static inline void gather(Holder holder, uint64_t *bits, uint32_t words)
{
    if (is_single(holder)) {
        if (slot_of(holder) / 64 < words) bits[slot_of(holder) / 64] |= UINT64_C(1) << slot_of(holder) % 64;
    } else if (holder != NOBODY) {
        const Set *set = set_of(holder);
        for (uint32_t i = 0; i < set->words && i < words; i++) bits[i] |= set->bits[i];
    }
}

static Set *new_set(uint32_t words)
{
    Set *set = calloc(1, sizeof(Set) + words * sizeof(uint64_t));
    if (set) {
        set->references = 1;
        set->words = words;
    }
    return set;
}

/* The Holder for a set that nobody has seen yet: a set of one becomes a slot, an empty one nobody. */
static Holder settled(Set *set)
{
    uint32_t count = 0, slot = 0;
    for (uint32_t i = 0; i < set->words && count < 2; i++)
        if (set->bits[i]) {
            count += (uint32_t)__builtin_popcountll(set->bits[i]);
            slot = i * 64 + (uint32_t)__builtin_ctzll(set->bits[i]);
        }
    if (count > 1) return (Holder)set;
    free(set);
    return count ? single(slot) : NOBODY;
}

/* The three below give a new reference in `result`, or -1 when there is no memory. */

static int with_slot(Holder holder, uint32_t slot, Holder *result)
{
    uint32_t had = is_single(holder) ? slot_of(holder) / 64 + 1 : set_of(holder)->words;
    Set *set = new_set(had > slot / 64 ? had : slot / 64 + 1);
    if (!set) return -1;
    gather(holder, set->bits, set->words);
    set->bits[slot / 64] |= UINT64_C(1) << slot % 64;
    *result = (Holder)set;
    return 0;
}

/* `holder` is a set that holds `slot`. */
static int without_slot(Holder holder, uint32_t slot, Holder *result)
{
    Set *set = new_set(set_of(holder)->words);
    if (!set) return -1;
    gather(holder, set->bits, set->words);
    set->bits[slot / 64] &= ~(UINT64_C(1) << slot % 64);
    *result = settled(set);
    return 0;
}

static int without_any(Holder holder, const uint64_t *gone, uint32_t words, Holder *result)
{
    Set *set = new_set(set_of(holder)->words);
    if (!set) return -1;
    gather(holder, set->bits, set->words);
    for (uint32_t i = 0; i < set->words && i < words; i++) set->bits[i] &= ~gone[i];
    *result = settled(set);
    return 0;
}

static inline bool touches(Holder holder, const uint64_t *bits, uint32_t words)
{
    if (is_single(holder)) return slot_of(holder) / 64 < words && bits[slot_of(holder) / 64] >> slot_of(holder) % 64 & 1;
    for (uint32_t i = 0; i < set_of(holder)->words && i < words; i++)
        if (set_of(holder)->bits[i] & bits[i]) return true;
    return false;
}

#endif
