/* An index: 64-bit numbers to pointers, by open addressing. */
#ifndef QEDFUSE_INDEX_H
#define QEDFUSE_INDEX_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct index {
    uint64_t *keys;
    void **values; /* NULL: a free place */
    size_t mask, used;
};

static inline size_t index_home(const struct index *index, uint64_t key)
{
    return (size_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & index->mask;
}

/* The place of a key, or the free place where it belongs. */
static inline size_t index_place(const struct index *index, uint64_t key)
{
    size_t place = index_home(index, key);
    while (index->values[place] && index->keys[place] != key)
        place = (place + 1) & index->mask;
    return place;
}

static inline void *index_get(const struct index *index, uint64_t key)
{
    return index->used ? index->values[index_place(index, key)] : NULL;
}

static inline bool index_resize(struct index *index, size_t places)
{
    struct index grown = {calloc(places, sizeof(uint64_t)), calloc(places, sizeof(void *)), places - 1, index->used};
    if (!grown.keys || !grown.values) {
        free(grown.keys);
        free(grown.values);
        return false;
    }
    for (size_t i = 0; index->values && i <= index->mask; i++) {
        if (!index->values[i])
            continue;
        size_t place = index_place(&grown, index->keys[i]);
        grown.keys[place] = index->keys[i];
        grown.values[place] = index->values[i];
    }
    free(index->keys);
    free(index->values);
    *index = grown;
    return true;
}

/* Adds or replaces. Returns false without memory. */
static inline bool index_set(struct index *index, uint64_t key, void *value)
{
    if ((!index->values || index->used * 2 > index->mask) &&
        !index_resize(index, index->values ? (index->mask + 1) * 2 : 16))
        return false;
    size_t place = index_place(index, key);
    index->used += !index->values[place];
    index->keys[place] = key;
    index->values[place] = value;
    return true;
}

/* Returns what was there. Moves those back that a search would no longer find behind the gap. */
static inline void *index_drop(struct index *index, uint64_t key)
{
    if (!index->used)
        return NULL;
    size_t gap = index_place(index, key);
    void *value = index->values[gap];
    if (!value)
        return NULL;
    index->used--;
    for (size_t next = (gap + 1) & index->mask; index->values[next]; next = (next + 1) & index->mask) {
        size_t home = index_home(index, index->keys[next]);
        if (((next - home) & index->mask) >= ((next - gap) & index->mask)) {
            index->keys[gap] = index->keys[next];
            index->values[gap] = index->values[next];
            gap = next;
        }
    }
    index->values[gap] = NULL;
    return value;
}

static inline void index_clear(struct index *index)
{
    free(index->keys);
    free(index->values);
    memset(index, 0, sizeof *index);
}

#endif
