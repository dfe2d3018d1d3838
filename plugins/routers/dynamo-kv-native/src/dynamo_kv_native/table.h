/* One shard: a hash table that remembers in which order its keys came.

   `entries` has the keys, oldest first; behind them, in the same piece of memory, lie the buckets: small numbers that say where in
   `entries` a key is, and, in the bits that this leaves, a part of its hash, so that other keys are passed by without being looked at.
   Entries are only ever appended. One that is removed leaves a hole; when there is no place left, the rest moves, holes left out, to a
   table of one and a half times its size. So each of `used` entries takes one bucket at most, and a quarter of the buckets is always free. */

#ifndef DYNAMO_KV_TABLE_H
#define DYNAMO_KV_TABLE_H

#include "holders.h"

typedef struct {
    uint64_t key;
    Holder holder; /* NOBODY in a hole */
} Entry;

typedef struct {
    Entry *entries;
    uint32_t capacity, buckets;
    uint32_t used, live;
    uint32_t oldest; /* no entry before it is live */
    uint32_t places; /* the bits of a bucket that say where: the position and FIRST */
} Table;

enum { FREE = 0, LEFT = 1, FIRST = 2 }; /* buckets: never used; used once; and the first that names an entry */

#define MAX_ENTRIES (1u << 29)

static inline uint64_t mixed(uint64_t key) { return key * UINT64_C(0x9E3779B97F4A7C15); }
static inline uint32_t *buckets_of(const Table *table) { return (uint32_t *)(table->entries + table->capacity); }
static inline uint32_t home_of(const Table *table, uint64_t mix) { return (uint32_t)((mix >> 32) * table->buckets >> 32); }

/* The entry of a key, and where its bucket is, or NULL. */
static inline Entry *find(const Table *table, uint64_t key, uint32_t *at)
{
    if (!table->live) return NULL;
    const uint32_t *buckets = buckets_of(table);
    const uint64_t mix = mixed(key);
    for (uint32_t i = home_of(table, mix);;) {
        const uint32_t bucket = buckets[i];
        if (bucket == FREE) return NULL;
        if (bucket >= FIRST && !((bucket ^ (uint32_t)mix) & ~table->places)) {
            Entry *entry = table->entries + (bucket & table->places) - FIRST;
            if (entry->key == key) {
                *at = i;
                return entry;
            }
        }
        if (++i == table->buckets) i = 0;
    }
}

/* Append a key that is not there. There is a place. Takes the reference. */
static inline void place(Table *table, uint64_t key, Holder holder)
{
    uint32_t *buckets = buckets_of(table);
    const uint64_t mix = mixed(key);
    uint32_t i = home_of(table, mix);
    while (buckets[i] >= FIRST)
        if (++i == table->buckets) i = 0;
    buckets[i] = ((uint32_t)mix & ~table->places) | (table->used + FIRST);
    table->entries[table->used++] = (Entry){key, holder};
    table->live++;
}

/* Make place. `spread` differs between neighbours, so that they do not all grow in the same moment. */
static int grow(Table *table, uint32_t spread)
{
    const uint32_t capacity = table->live + table->live / 2 + 8 + spread % 8;
    const uint32_t buckets = capacity + capacity / 3 + 1;
    if (capacity > MAX_ENTRIES) return -1;
    Table next = {.capacity = capacity, .buckets = buckets, .places = FIRST + 1};
    while (next.places < capacity + FIRST) next.places = next.places << 1 | 1;
    next.entries = malloc((size_t)capacity * sizeof(Entry) + (size_t)buckets * sizeof(uint32_t));
    if (!next.entries) return -1;
    memset(buckets_of(&next), 0, (size_t)buckets * sizeof(uint32_t));
    for (uint32_t i = table->oldest; i < table->used; i++)
        if (table->entries[i].holder != NOBODY) place(&next, table->entries[i].key, table->entries[i].holder);
    free(table->entries);
    *table = next;
    return 0;
}

/* Takes the reference, unless there is no memory (-1). */
static inline int append(Table *table, uint64_t key, Holder holder, uint32_t spread)
{
    if (table->used == table->capacity && grow(table, spread) < 0) return -1;
    place(table, key, holder);
    return 0;
}

static inline void erase(Table *table, Entry *entry, uint32_t at)
{
    buckets_of(table)[at] = LEFT;
    release(entry->holder);
    entry->holder = NOBODY;
    table->live--;
}

static void forget_oldest(Table *table, uint32_t count)
{
    uint32_t at = 0;
    for (; count && table->oldest < table->used; table->oldest++) {
        Entry *entry = table->entries + table->oldest;
        if (entry->holder != NOBODY && find(table, entry->key, &at) == entry) {
            erase(table, entry, at);
            count--;
        }
    }
}

static void destroy(Table *table)
{
    for (uint32_t i = table->oldest; i < table->used; i++) release(table->entries[i].holder);
    free(table->entries);
    *table = (Table){0};
}

#endif
