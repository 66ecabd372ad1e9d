/* Reads and writes of an image's ranges, in as few system calls as there are runs in its file. */

#include "transfer.h"
#include "view.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>

enum {
    MAX_IOV = 64,
    MAX_LOADS = 64, /* table pages for one request */
    HUGE = 2 << 20,
};

char *request_memory;
char *reply_memory;
static char *scratch; /* twice MAX_IO: what a new cluster gets from below, before and behind a write */

/* The kernel looks up each page of ours anew that it copies from or to, which huge pages make quicker. */
bool memory_prepare(void)
{
    const size_t size = REQUEST_SPACE + PAGE + 3 * MAX_IO;
    if (!reply_memory) {
        char *memory = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory != MAP_FAILED) {
            memory += -(uintptr_t)memory % HUGE;
            madvise(memory, size - size % HUGE, MADV_HUGEPAGE);
            request_memory = memory;
            reply_memory = request_memory + REQUEST_SPACE + PAGE;
            scratch = reply_memory + MAX_IO;
        }
    }
    return reply_memory != NULL;
}

/* -- system calls ------------------------------------------------------------------------------------------------------- */

/* A transfer that is one system call: pieces of memory for one range of one file. */
struct batch {
    int fd;
    bool write;
    uint64_t host, length;
    int pieces;
    struct iovec iov[MAX_IOV];
};

/* Is the page of the file at `host` in memory? A write of a part of a page would otherwise wait to read the rest. */
static bool at_hand(int fd, uint64_t host)
{
    char byte;
    struct iovec iov = {&byte, 1};
    return preadv2(fd, &iov, 1, (off_t)host, RWF_NOWAIT) == 1;
}

static enum outcome batch_do(struct batch *batch)
{
    if (!batch->pieces)
        return DONE;
    uint64_t end = batch->host + batch->length;
    ssize_t done;
    if (batch->write) {
        if ((batch->host % PAGE && !at_hand(batch->fd, batch->host)) || (end % PAGE && !at_hand(batch->fd, end - 1)))
            return MISS;
        done = pwritev(batch->fd, batch->iov, batch->pieces, (off_t)batch->host);
    } else {
        done = preadv2(batch->fd, batch->iov, batch->pieces, (off_t)batch->host, RWF_NOWAIT);
        if (done > 0 ? (uint64_t)done < batch->length : done < 0 && errno == EAGAIN)
            return WAIT;
    }
    batch->pieces = 0;
    return done >= 0 && (uint64_t)done == batch->length ? DONE : MISS;
}

static enum outcome batch_add(struct batch *batch, int fd, uint64_t host, char *memory, uint64_t length)
{
    bool follows = batch->pieces && batch->fd == fd && batch->host + batch->length == host;
    struct iovec *last = &batch->iov[batch->pieces - follows];
    if (follows && (char *)last->iov_base + last->iov_len == memory) {
        last->iov_len += length;
    } else {
        enum outcome before = !follows || batch->pieces == MAX_IOV ? batch_do(batch) : DONE;
        if (before != DONE)
            return before;
        if (!batch->pieces) {
            batch->fd = fd;
            batch->host = host;
            batch->length = 0;
        }
        batch->iov[batch->pieces++] = (struct iovec){memory, length};
    }
    batch->length += length;
    return DONE;
}

/* -- a burst ------------------------------------------------------------------------------------------------------------ */

void take_gil(struct burst *burst)
{
    if (burst->thread)
        PyEval_RestoreThread(burst->thread);
    burst->thread = NULL;
}

void release_gil(struct burst *burst)
{
    burst->thread = PyEval_SaveThread();
}

void tell_writes(struct burst *burst)
{
    while (burst->writes)
        view_tell(burst->wrote[--burst->writes]);
}

/* -- ranges of an image ------------------------------------------------------------------------------------------------- */

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

/* The run at `offset` in the top layer, whose table page is brought in if it is at hand. */
static enum kind top_run(struct burst *burst, const Layer *top, uint64_t offset, uint64_t *length, uint64_t *host)
{
    enum kind kind = layer_run(top, offset, length, host);
    for (int loads = 0; kind == ABSENT && loads < 2 && load_page(burst, top, offset) == DONE; loads++)
        kind = layer_run(top, offset, length, host);
    return kind;
}

/* Sees to it that Python will be told. */
static bool note_write(struct burst *burst, Layer *top)
{
    if (!top->dirty) {
        if (burst->writes == sizeof burst->wrote / sizeof *burst->wrote)
            return false;
        burst->wrote[burst->writes++] = top; /* no reference: only Python detaches, and is told before it runs */
        top->dirty = true;
    }
    return true;
}

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

/*
 * Writes into clusters that have no data yet, all of one run and one table page, as ClusterWriter._write_unmapped does:
 * head, data and tail go to clusters that Python offers, and then the entries are set, which Python brings to the file
 * (commit.py). Passes whatever is not that simple.
 */
static enum outcome write_new(struct burst *burst, Layer *top, uint64_t offset, uint64_t size, char *memory)
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
