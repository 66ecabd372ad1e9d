/* Ranges of an image, run by run; a table page that is missing is read on the way. */

#include "transfer.h"
#include "allocate.h"
#include "batch.h"
#include "view.h"

enum { MAX_LOADS = 64 /* table pages for one request */ };

/*
 * Brings the table page that is missing at `offset` into memory: into Python's pool, if Python will have it. Another
 * page may leave for it, so Python must know first which ones have changed, and no pointer to a page outlives this.
 */
static enum outcome load_page(struct burst *burst, const Layer *layer, uint64_t offset)
{
    bool is_l1;
    uint64_t number, host, page[PAGE_ENTRIES];
    if (!layer_missing(layer, offset, &is_l1, &number, &host))
        return PASS;
    struct batch batch = {.write = false};
    batch_add(&batch, layer->fd, host, (char *)page, PAGE);
    enum outcome outcome = batch_do(&batch);
    if (outcome != DONE)
        return outcome;
    take_gil(burst);
    tell_writes(burst);
    outcome = view_take_page(layer, is_l1, number, host, (const char *)page) ? DONE : PASS;
    release_gil(burst);
    return outcome;
}

enum outcome read_image(struct burst *burst, const Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    struct batch batch = {.write = false};
    int loads = 0; /* in a crowded pool the pages may drive each other out */
    while (size) {
        uint64_t length = size, host = 0;
        const Layer *owner = NULL;
        enum outcome outcome = DONE;
        switch (chain_run(top, offset, &length, &host, &owner)) {
        case ZERO:
            memset(memory, 0, length);
            break;
        case DATA:
            outcome = batch_add(&batch, owner->fd, host, memory, length);
            break;
        case ABSENT:
            outcome = loads++ < MAX_LOADS ? load_page(burst, owner, offset) : PASS;
            length = 0;
            break;
        default:
            return PASS;
        }
        if (outcome != DONE)
            return outcome;
        memory += length;
        offset += length;
        size -= length;
    }
    return batch_do(&batch);
}

/* The run at `offset` in the top layer, whose table page is brought into memory if it is cached. */
static enum kind top_run(struct burst *burst, const Layer *top, uint64_t offset, uint64_t *length, uint64_t *host)
{
    enum kind kind = layer_run(top, offset, length, host);
    for (int loads = 0; kind == ABSENT && loads < 2 && load_page(burst, top, offset) == DONE; loads++)
        kind = layer_run(top, offset, length, host);
    return kind;
}

enum outcome write_image(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    uint64_t length, host = 0;
    for (uint64_t done = 0; done < size; done += length) {
        length = size - done;
        if (top_run(burst, top, offset + done, &length, &host) != DATA)
            return done ? PASS : write_new(burst, top, offset, size, memory);
    }
    if (!note_write(burst, top))
        return PASS;
    struct batch batch = {.write = true};
    for (uint64_t done = 0; done < size; done += length) {
        length = size - done;
        if (layer_run(top, offset + done, &length, &host) != DATA) /* a page was driven out by the next one */
            return PASS;
        enum outcome outcome = batch_add(&batch, top->fd, host, memory + done, length);
        if (outcome != DONE)
            return outcome;
    }
    return batch_do(&batch);
}
