/* Which blocks an engine has, what they are called, and which follow which.

   Blocks lie in one array and lead to each other by their places in it: to the block before, to the first of those after, and to its neighbours
   among these. A block that is gone stays as a *ghost* while something follows it. Tables of places find blocks by hash; there are many
   of them, so that one that grows stops the process for microseconds. */

#ifndef DYNAMO_KV_LINKS_H
#define DYNAMO_KV_LINKS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE ((1u << 31) - 1)
#define MAX_BLOCKS (1u << 30)
#define TABLES 256u

typedef struct {
    uint64_t hash, key;
    uint32_t ghost : 1, parent : 31;
    uint32_t child;          /* the first of those after it */
    uint32_t next, previous; /* its neighbours; of a free place, `next` is the next free one */
} Block;

typedef struct {
    uint32_t at;   /* NONE in a free one; a quarter of them at least is */
    uint32_t part; /* of the mixed hash: where it wants to be, and enough to pass others by without looking at their blocks */
} Bucket;

typedef struct {
    Bucket *buckets;
    uint32_t size, used;
} Table;

typedef struct {
    Block *blocks;
    uint32_t capacity, used, free; /* `free`: the first place before `used` that is free */
    uint32_t count;                /* without ghosts */
    Table tables[TABLES];
} Links;

/* -------------------------------------------------------------- by hash */

static inline uint64_t mixed(uint64_t hash) { return (hash ^ hash >> 32) * UINT64_C(0x9E3779B97F4A7C15); }
static inline Table *table_of(Links *links, uint64_t mix) { return links->tables + (mix >> 56); }
static inline uint32_t part_of(uint64_t mix) { return (uint32_t)(mix >> 24); }
static inline uint32_t home_of(const Table *table, uint32_t part) { return (uint32_t)((uint64_t)part * table->size >> 32); }
static inline uint32_t after(const Table *table, uint32_t i) { return i + 1 == table->size ? 0 : i + 1; }

/* Fetch what `find` and `put` will look at. */
static inline void warm(Links *links, uint64_t hash)
{
    const uint64_t mix = mixed(hash);
    const Table *table = table_of(links, mix);
    if (table->size) __builtin_prefetch(table->buckets + home_of(table, part_of(mix)));
}

/* The place of a block or ghost, or NONE. */
static inline uint32_t find(Links *links, uint64_t hash)
{
    const uint64_t mix = mixed(hash);
    const Table *table = table_of(links, mix);
    if (!table->used) return NONE;
    for (uint32_t i = home_of(table, part_of(mix));; i = after(table, i)) {
        const Bucket bucket = table->buckets[i];
        if (bucket.at == NONE || (bucket.part == part_of(mix) && links->blocks[bucket.at].hash == hash)) return bucket.at;
    }
}

static inline void put(Table *table, Bucket bucket)
{
    uint32_t i = home_of(table, bucket.part);
    while (table->buckets[i].at != NONE) i = after(table, i);
    table->buckets[i] = bucket;
}

static int grow(Table *table, uint32_t spread)
{
    const Table old = *table;
    const uint32_t size = old.size + old.size / 2 + 16 + spread; /* not all in the same moment */
    Bucket *buckets = malloc(size * sizeof *buckets);
    if (!buckets) return -1;
    for (uint32_t i = 0; i < size; i++) buckets[i].at = NONE;
    *table = (Table){buckets, size, old.used};
    for (uint32_t i = 0; i < old.size; i++)
        if (old.buckets[i].at != NONE) put(table, old.buckets[i]);
    free(old.buckets);
    return 0;
}

/* Those behind it that would not be found any more move up. */
static void take_out(Links *links, uint32_t at)
{
    const uint64_t mix = mixed(links->blocks[at].hash);
    Table *table = table_of(links, mix);
    uint32_t hole = home_of(table, part_of(mix));
    while (table->buckets[hole].at != at) hole = after(table, hole);
    for (uint32_t i = after(table, hole); table->buckets[i].at != NONE; i = after(table, i)) {
        const uint32_t home = home_of(table, table->buckets[i].part);
        const bool stays = hole < i ? hole < home && home <= i : hole < home || home <= i;
        if (stays) continue;
        table->buckets[hole] = table->buckets[i];
        hole = i;
    }
    table->buckets[hole].at = NONE;
    table->used--;
}

/* -------------------------------------------------------------- by what follows what */

static inline void attach(Links *links, uint32_t at, uint32_t parent)
{
    Block *block = links->blocks + at;
    block->parent = parent & NONE;
    block->next = block->previous = NONE;
    if (parent == NONE) return;
    block->next = links->blocks[parent].child;
    if (block->next != NONE) links->blocks[block->next].previous = at;
    links->blocks[parent].child = at;
}

static inline void detach(Links *links, uint32_t at)
{
    const Block *block = links->blocks + at;
    if (block->next != NONE) links->blocks[block->next].previous = block->previous;
    if (block->previous != NONE)
        links->blocks[block->previous].next = block->next;
    else if (block->parent != NONE)
        links->blocks[block->parent].child = block->next;
}

/* A new block, or NONE when there is no memory. */
static uint32_t append(Links *links, uint64_t hash, uint64_t key, uint32_t parent)
{
    const uint64_t mix = mixed(hash);
    Table *table = table_of(links, mix);
    if (table->used >= table->size / 4 * 3 && grow(table, (uint32_t)(mix >> 56) % 16) < 0) return NONE;
    uint32_t at = links->free;
    if (at != NONE) {
        links->free = links->blocks[at].next;
    } else {
        if (links->used == links->capacity) {
            const uint32_t capacity = links->capacity + links->capacity / 2 + 64;
            Block *blocks = capacity > MAX_BLOCKS ? NULL : realloc(links->blocks, capacity * sizeof *blocks);
            if (!blocks) return NONE;
            links->blocks = blocks;
            links->capacity = capacity;
        }
        at = links->used++;
    }
    links->blocks[at] = (Block){.hash = hash, .key = key, .child = NONE};
    attach(links, at, parent);
    put(table, (Bucket){at, part_of(mix)});
    table->used++;
    links->count++;
    return at;
}

/* A block that nothing follows, and after it the ghosts before it that nothing follows then. */
static void discard(Links *links, uint32_t at)
{
    do {
        const Block block = links->blocks[at];
        links->count -= !block.ghost;
        detach(links, at);
        take_out(links, at);
        links->blocks[at].next = links->free;
        links->free = at;
        at = block.parent;
    } while (at != NONE && links->blocks[at].ghost && links->blocks[at].child == NONE);
}

/* Blocks one below the other: 1; 0 and nothing has changed, when one is there or a ghost, or comes twice; -1 without memory, as far as it went. */
static int add_chain(Links *links, const uint64_t *hashes, const uint64_t *keys, size_t count, uint32_t parent)
{
    uint32_t last = parent;
    for (size_t i = 0; i < count; i++) warm(links, hashes[i]);
    for (size_t i = 0; i < count; i++) {
        if (find(links, hashes[i]) != NONE) {
            while (i--) {
                const uint32_t above = links->blocks[last].parent;
                detach(links, last);
                take_out(links, last);
                links->blocks[last].next = links->free;
                links->free = last;
                links->count--;
                last = above;
            }
            return 0;
        }
        const uint32_t at = append(links, hashes[i], keys[i], last);
        if (at == NONE) return -1;
        last = at;
    }
    return 1;
}

static void drop(Links *links, uint32_t at)
{
    if (links->blocks[at].child == NONE) {
        discard(links, at);
        return;
    }
    links->blocks[at].ghost = 1;
    links->count--;
}

static void revive(Links *links, uint32_t at, uint64_t key, uint32_t parent)
{
    const uint32_t before = links->blocks[at].parent;
    links->blocks[at].ghost = 0;
    links->blocks[at].key = key;
    links->count++;
    if (before == parent) return;
    detach(links, at);
    attach(links, at, parent);
    if (before != NONE && links->blocks[before].ghost && links->blocks[before].child == NONE) discard(links, before);
}

static void open_links(Links *links)
{
    memset(links, 0, sizeof *links);
    links->free = NONE;
}

static void close_links(Links *links)
{
    for (uint32_t i = 0; i < TABLES; i++) free(links->tables[i].buckets);
    free(links->blocks);
}

#endif
