/* READ and WRITE are answered, others are handed over: request by request. filter.c tells why all this is right. */

#include "requests.h"
#include "counts.h"
#include "filter.h"
#include "handover.h"
#include "handles.h"
#include "memory.h"
#include "reply.h"
#include "transfer.h"

#include <fcntl.h>

struct counts count;

enum outcome answer_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    const struct handle *handle = handle_find(arg->fh);
    if (!handle || arg->size > MAX_IO)
        return PASS;
    Layer *layer = current_layer(burst, handle);
    if (!layer || arg->offset > INT64_MAX - MAX_IO)
        return PASS;
    uint64_t size = arg->size;
    if (arg->offset >= layer->size)
        size = 0;
    else if (size > layer->size - arg->offset)
        size = layer->size - arg->offset;
    enum outcome outcome = read_image(burst, layer, arg->offset, size, reply_memory);
    if (outcome == DONE) {
        reply(burst->fd, in->unique, 0, size);
        count.reads++;
    }
    return outcome;
}

/*
 * Is it a READ past the kernel's cache that reaches the image's end? For the kernel the file may be longer, by what it
 * has not written yet. A READ into the cache it completes itself; the owner of locks tells the two apart.
 */
static bool passes_end(struct burst *burst, const struct fuse_read_in *arg)
{
    const struct handle *handle = writeback && arg->read_flags & FUSE_READ_LOCKOWNER ? handle_find(arg->fh) : NULL;
    const Layer *layer = handle ? current_layer(burst, handle) : NULL;
    return handle && (!layer || arg->offset >= layer->size || arg->size > layer->size - arg->offset);
}

static enum outcome answer_write(struct burst *burst, const struct fuse_in_header *in, struct fuse_write_in *arg)
{
    const struct handle *handle = handle_find(arg->fh);
    if (!handle || !handle->writable || arg->size == 0 || arg->flags & O_DSYNC) /* O_SYNC has this bit, too */
        return PASS;
    Layer *layer = current_layer(burst, handle);
    if (!layer || !layer->writable || arg->offset >= layer->size || arg->size > layer->size - arg->offset)
        return PASS;
    enum outcome outcome = write_image(burst, layer, arg->offset, arg->size, (char *)(arg + 1));
    if (outcome == DONE) {
        *(struct fuse_write_out *)reply_memory = (struct fuse_write_out){.size = arg->size};
        reply(burst->fd, in->unique, 0, sizeof(struct fuse_write_out));
        count.writes++;
    }
    return outcome;
}

enum outcome answer(struct burst *burst, void *request, size_t size)
{
    struct fuse_in_header *in = request;
    if (size < sizeof *in || in->len != size)
        return PASS;
    void *arg = in + 1;
    size -= sizeof *in;
    if (in->opcode == FUSE_READ && size == sizeof(struct fuse_read_in))
        return passes_end(burst, arg) ? hand_read(burst, in, arg, true) : answer_read(burst, in, arg);
    if (in->opcode == FUSE_WRITE && size >= sizeof(struct fuse_write_in)) {
        struct fuse_write_in *write = arg;
        return write->size == size - sizeof *write ? answer_write(burst, in, write) : PASS;
    }
    if (in->opcode == FUSE_OPEN && size == sizeof(struct fuse_open_in))
        return hand_open(burst, in, arg);
    if (in->opcode == FUSE_FALLOCATE && size == sizeof(struct fuse_fallocate_in))
        return hand_fallocate(burst, in, arg);
    if (in->opcode == FUSE_FSYNC && size == sizeof(struct fuse_fsync_in))
        return hand_fsync(burst, in, arg);
    if (in->opcode == FUSE_LSEEK && size == sizeof(struct fuse_lseek_in))
        return hand_seek(burst, in, arg);
    return PASS;
}
