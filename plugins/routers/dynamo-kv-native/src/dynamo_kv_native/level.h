/* All keys of one level, spread over many small tables: a table that grows copies itself, and one of a few thousand keys does so in
   microseconds.

   Keys of a bulk are fetched into the cache some ahead of their use; without that, most of the time is spent waiting for memory. */

#ifndef DYNAMO_KV_LEVEL_H
#define DYNAMO_KV_LEVEL_H

#include "table.h"

#define AHEAD 32  /* keys that are fetched together */
#define STEPS 64  /* a power of two */

/* The last change of holders that a slot has made: the neighbours of a block mostly go the same way, and share its set. */
typedef struct {
    uint32_t slot;
    Holder from, to;
} Step;

typedef struct {
    Table *tables;
    uint32_t mask;  /* tables less one: a power of two */
    uint32_t shift;
    uint32_t room;  /* keys of one table */
    uint64_t forgotten;
    Step joined[STEPS], parted[STEPS];
} Level;

static inline Table *table_of(const Level *level, uint64_t key) { return level->tables + ((key >> level->shift) & level->mask); }

static inline void warm(const Level *level, const uint64_t *keys, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) __builtin_prefetch(table_of(level, keys[i]));
    for (uint32_t i = 0; i < count; i++) {
        const Table *table = table_of(level, keys[i]);
        if (table->capacity) __builtin_prefetch(buckets_of(table) + home_of(table, mixed(keys[i])));
    }
    for (uint32_t i = 0; i < count; i++) {
        const Table *table = table_of(level, keys[i]);
        if (!table->capacity) continue;
        const uint32_t bucket = buckets_of(table)[home_of(table, mixed(keys[i]))];
        __builtin_prefetch(table->entries + (bucket >= FIRST ? (bucket & table->places) - FIRST : table->used), 1);
    }
}

static int step(Step *steps, Holder from, uint32_t slot, int (*change)(Holder, uint32_t, Holder *), Holder *to)
{
    Step *last = steps + slot % STEPS;
    if (last->from != from || last->slot != slot) {
        Holder found;
        if (change(from, slot, &found) < 0) return -1;
        release(last->from);
        release(last->to);
        *last = (Step){slot, retain(from), found};
    }
    *to = retain(last->to);
    return 0;
}

static int add_key(Level *level, uint64_t key, uint32_t slot)
{
    Table *table = table_of(level, key);
    uint32_t at;
    Entry *entry = find(table, key, &at);
    if (!entry) {
        if (append(table, key, single(slot), (uint32_t)(table - level->tables)) < 0) return -1;
        if (table->live > level->room) {
            const uint32_t before = table->live;
            forget_oldest(table, 1 + level->room / 8);
            level->forgotten += before - table->live;
        }
    } else if (!holds(entry->holder, slot)) {
        Holder more;
        if (step(level->joined, entry->holder, slot, with_slot, &more) < 0) return -1;
        release(entry->holder);
        entry->holder = more;
    }
    return 0;
}

static int remove_key(Level *level, uint64_t key, uint32_t slot)
{
    Table *table = table_of(level, key);
    uint32_t at;
    Entry *entry = find(table, key, &at);
    if (!entry || !holds(entry->holder, slot)) return 0;
    if (is_single(entry->holder)) {
        erase(table, entry, at);
        return 0;
    }
    Holder left;
    if (step(level->parted, entry->holder, slot, without_slot, &left) < 0) return -1;
    release(entry->holder);
    entry->holder = left;
    return 0;
}

/* Forget the slots of `dead` in one table. */
static int sweep_table(Table *table, const uint64_t *dead, uint32_t words)
{
    Holder from = NOBODY, to = NOBODY;
    int failed = 0;
    for (uint32_t i = table->oldest; i < table->used && !failed; i++) {
        Entry *entry = table->entries + i;
        if (entry->holder == NOBODY || !touches(entry->holder, dead, words)) continue;
        Holder left = NOBODY;
        if (!is_single(entry->holder)) {
            if (entry->holder != from) {
                Holder found;
                if ((failed = without_any(entry->holder, dead, words, &found)) < 0) break;
                release(from);
                release(to);
                from = retain(entry->holder);
                to = found;
            }
            left = retain(to);
        }
        if (left == NOBODY) {
            uint32_t at;
            if (find(table, entry->key, &at) == entry) erase(table, entry, at);
        } else {
            release(entry->holder);
            entry->holder = left;
        }
    }
    release(from);
    release(to);
    return failed;
}

static uint64_t count_of(const Level *level)
{
    uint64_t count = 0;
    for (uint32_t i = 0; i <= level->mask; i++) count += level->tables[i].live;
    return count;
}

static int open_level(Level *level, uint32_t shards, uint32_t shift, uint32_t room)
{
    *level = (Level){.mask = shards - 1, .shift = shift, .room = room};
    level->tables = calloc(shards, sizeof(Table));
    return level->tables ? 0 : -1;
}

static void close_level(Level *level)
{
    if (!level->tables) return;
    for (uint32_t i = 0; i < STEPS; i++) {
        release(level->joined[i].from), release(level->joined[i].to);
        release(level->parted[i].from), release(level->parted[i].to);
    }
    for (uint32_t i = 0; i <= level->mask; i++) destroy(level->tables + i);
    free(level->tables);
    level->tables = NULL;
}

#endif
