/* New clusters, from the front of what Python offers; filter.c tells why that is right. */

#include "allocate.h"
#include "memory.h"
#include "transfer.h"

#include <sys/uio.h>

static bool all_zero(const char *memory, uint64_t size)
{
    return !size || (!memory[0] && !memcmp(memory, memory + 1, size - 1));
}

/* What a new cluster gets of the layers below: bytes that are not there to be read are zeroes. */
static bool copy_below(struct burst *burst, const Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    uint64_t inside = offset >= top->size ? 0 : top->size - offset < size ? top->size - offset : size;
    memset(memory + inside, 0, size - inside);
    return !inside || read_image(burst, top, offset, inside, memory) == DONE;
}

enum outcome write_new(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory)
{
    unsigned bits = top->cluster_bits;
    uint64_t length = size, host = 0, first = offset >> bits, last = (offset + size - 1) >> bits;
    uint64_t run = (last - first + 1) << bits, start = first << bits, end = offset + size;
    enum kind kind = layer_run(top, offset, &length, &host);
    if ((kind != UNALLOCATED && kind != ZERO) || length != size || first >> PAGE_BITS != last >> PAGE_BITS)
        return PASS;
    bool covers = kind == UNALLOCATED && top->below && start < top->below->size;
    if (all_zero(memory, size))
        return covers ? PASS : DONE;
    struct iovec iov[3] = {{0}, {memory, size}, {0}};
    uint64_t head = offset - start, tail = start + run - end;
    if (covers) {
        if (head > MAX_IO || tail > MAX_IO)
            return PASS;
        if (!copy_below(burst, top, start, head, scratch) || !copy_below(burst, top, end, tail, scratch + MAX_IO))
            return MISS;
        if (!all_zero(scratch, head))
            iov[0] = (struct iovec){scratch, head};
        if (!all_zero(scratch + MAX_IO, tail))
            iov[2] = (struct iovec){scratch + MAX_IO, tail};
    }
    uint64_t *page = index_get(&top->l2->pages, first >> PAGE_BITS); /* copying may have driven it out */
    if (!page || run > top->free_end - top->free || !note_write(burst, top))
        return PASS;
    unsigned at = 0;
    while (at < top->pages && top->page[at] != first >> PAGE_BITS)
        at++;
    if (at == BURST_REQUESTS)
        return PASS;
    host = top->free;
    ssize_t done = pwritev(top->fd, iov, 3, (off_t)(host + (iov[0].iov_len ? 0 : head)));
    top->free += run;
    top->taken += run;
    if (done < 0 || (uint64_t)done != iov[0].iov_len + size + iov[2].iov_len) {
        top->lost = run;
        return MISS;
    }
    top->filled += size;
    if (top->file_end < top->free)
        top->file_end = top->free;
    if (at == top->pages)
        top->page[top->pages++] = first >> PAGE_BITS;
    for (uint64_t cluster = first; cluster <= last; cluster++, host += UINT64_C(1) << bits)
        page[cluster & (PAGE_ENTRIES - 1)] = host;
    return DONE;
}
