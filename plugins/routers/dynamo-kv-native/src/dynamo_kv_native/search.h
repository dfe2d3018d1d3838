/* How much of a chain of keys each slot holds.

   Whoever holds a block holds everything before it, so that the chain is split where the set of holders changes, by bisection: where
   both ends have the same holders, so has everything between. Where the set changes all the time, what is left is read block by block. */

#ifndef DYNAMO_KV_SEARCH_H
#define DYNAMO_KV_SEARCH_H

#include "level.h"

#define MANY 6   /* after as many groups of holders, */
#define CLOSE 20 /* on average less than this many blocks apart, it is cheaper to read what is left than to probe it */
#define LEVELS 8

typedef struct {
    const char *data;
    size_t count;
    ptrdiff_t stride; /* bytes */
} Keys;

static inline uint64_t key_at(const Keys *keys, size_t i)
{
    uint64_t key;
    memcpy(&key, keys->data + (ptrdiff_t)i * keys->stride, sizeof key);
    return key;
}

typedef struct {
    const Level *levels[LEVELS];
    uint32_t level_count;
    Keys keys;
    uint32_t words; /* of every set of slots below */
    int32_t *depths; /* by slot; `words` cover them all */
} Question;

static inline void probe(const Question *q, uint64_t key, const uint64_t *among, uint64_t *found)
{
    memset(found, 0, q->words * sizeof *found);
    for (uint32_t i = 0; i < q->level_count; i++) {
        uint32_t at;
        const Entry *entry = find(table_of(q->levels[i], key), key, &at);
        if (entry) gather(entry->holder, found, q->words);
    }
    for (uint32_t i = 0; i < q->words; i++) found[i] &= among[i];
}

static inline bool same(const uint64_t *a, const uint64_t *b, uint32_t words) { return !memcmp(a, b, words * sizeof *a); }

static inline bool anyone(const uint64_t *set, uint32_t words)
{
    for (uint32_t i = 0; i < words; i++)
        if (set[i]) return true;
    return false;
}

/* Those of `here` who are not `there` hold `depth` blocks. */
static inline void leave(const Question *q, const uint64_t *here, const uint64_t *there, int32_t depth)
{
    for (uint32_t i = 0; i < q->words; i++)
        for (uint64_t left = here[i] & ~there[i]; left; left &= left - 1) q->depths[i * 64 + (uint32_t)__builtin_ctzll(left)] = depth;
}

/* From block `from` on; `here` hold all before it. `next` is as large. */
static void walk(const Question *q, size_t from, uint64_t *here, uint64_t *next)
{
    uint64_t ahead[AHEAD];
    for (size_t i = from; i < q->keys.count; i += AHEAD) {
        const uint32_t count = (uint32_t)(q->keys.count - i < AHEAD ? q->keys.count - i : AHEAD);
        for (uint32_t k = 0; k < count; k++) ahead[k] = key_at(&q->keys, i + k);
        for (uint32_t level = 0; level < q->level_count; level++) warm(q->levels[level], ahead, count);
        for (uint32_t k = 0; k < count; k++) {
            probe(q, ahead[k], here, next);
            if (same(here, next, q->words)) continue;
            leave(q, here, next, (int32_t)(i + k));
            memcpy(here, next, q->words * sizeof *here);
            if (!anyone(here, q->words)) return;
        }
    }
    memset(next, 0, q->words * sizeof *next);
    leave(q, here, next, (int32_t)q->keys.count);
}

/* Sets that `search` needs for `count` keys: every probe halves the distance, so the stack cannot be deeper than it has bits. */
static inline uint32_t sets_for(size_t count)
{
    uint32_t sets = 4;
    for (; count; count >>= 1) sets++;
    return sets;
}

/* Fill in the depths, which are 0 before, of those in `live`. `scratch` has `sets_for(count)` sets. */
static void search(const Question *q, const uint64_t *live, uint64_t *scratch)
{
    if (!q->keys.count) return;
    const size_t last = q->keys.count - 1;
    uint64_t *here = scratch, *spare = scratch + q->words, *stack = scratch + 2 * q->words;
    size_t right[66]; /* positions beyond `lo` whose holders are known, the nearest on top; the holders of the i-th are in set i of the stack */
    size_t lo = 0;
    int top = 0, groups = 0;

    probe(q, key_at(&q->keys, 0), live, here);
    if (!anyone(here, q->words)) return;
    right[0] = last;
    probe(q, key_at(&q->keys, last), here, stack);
    while (top >= 0) {
        const size_t hi = right[top];
        uint64_t *there = stack + (size_t)top * q->words;
        if (same(here, there, q->words)) {
            lo = hi;
            top--;
        } else if (hi - lo == 1) {
            leave(q, here, there, (int32_t)hi);
            memcpy(here, there, q->words * sizeof *here);
            lo = hi;
            top--;
            if (!anyone(here, q->words)) return;
            if (++groups == MANY && lo < MANY * CLOSE) {
                walk(q, lo + 1, here, spare);
                return;
            }
        } else {
            const size_t mid = lo + (hi - lo) / 2;
            uint64_t *between = there + q->words;
            probe(q, key_at(&q->keys, mid), here, between);
            if (same(between, here, q->words)) lo = mid;
            else if (same(between, there, q->words)) right[top] = mid;
            else right[++top] = mid;
        }
    }
    memset(spare, 0, q->words * sizeof *spare);
    leave(q, here, spare, (int32_t)(last + 1));
}

#endif
