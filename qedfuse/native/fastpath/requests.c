/* READ and WRITE answered, others handed over: request by request. filter.c tells why all this is right. */

#include "requests.h"
#include "view.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <unistd.h>

enum {
    DISK_NS = 250 * 1000,
    PARKED = 16,
};

struct counts count;
bool spinning = true;
unsigned in_python;
uint64_t bursts;
PyObject *hand_over;

struct handle {
    Layer *layer;
    bool writable;
};

static struct index handles; /* fh -> struct handle */

void detach(uint64_t fh)
{
    struct handle *handle = index_drop(&handles, fh);
    if (handle) {
        Py_DECREF(handle->layer);
        free(handle);
    }
}

bool attach(uint64_t fh, Layer *layer, bool writable)
{
    struct handle *handle = malloc(sizeof *handle);
    if (!handle)
        return false;
    detach(fh);
    *handle = (struct handle){(Layer *)Py_NewRef(layer), writable};
    if (index_set(&handles, fh, handle))
        return true;
    Py_DECREF(layer);
    free(handle);
    return false;
}

/* A reply that the kernel does not want (ENOENT: nobody waits any more, ENODEV: unmounted) is no loss. */
static void reply(int fd, uint64_t unique, int error, size_t size)
{
    struct fuse_out_header *out = (struct fuse_out_header *)reply_memory - 1;
    *out = (struct fuse_out_header){.len = (uint32_t)(sizeof *out + size), .error = error, .unique = unique};
    while (write(fd, out, out->len) < 0 && errno == EINTR)
        ;
}

/* The handle's layer with its numbers as they are now, or NULL. */
static Layer *current_layer(struct burst *burst, const struct handle *handle)
{
    Layer *layer = handle->layer;
    if (layer->burst != burst->number) {
        take_gil(burst); /* `refresh` computes numbers and does nothing else */
        bool known = view_refresh(layer);
        release_gil(burst);
        if (!known)
            return NULL;
        layer->burst = burst->number;
    }
    return layer;
}

static enum outcome answer_read(struct burst *burst, const struct fuse_in_header *in, const struct fuse_read_in *arg)
{
    const struct handle *handle = index_get(&handles, arg->fh);
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

static enum outcome answer_write(struct burst *burst, const struct fuse_in_header *in, struct fuse_write_in *arg)
{
    const struct handle *handle = index_get(&handles, arg->fh);
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

/* The Python callable replies, now or later. */
static enum outcome hand(struct burst *burst, const struct fuse_in_header *in, uint64_t fh, uint64_t offset,
                         uint64_t length, uint32_t mode)
{
    if (!hand_over || !index_get(&handles, fh))
        return PASS;
    take_gil(burst);
    tell_writes(burst);
    PyObject *result = PyObject_CallFunction(
        hand_over, "iIKKKKKI", burst->fd, (unsigned)in->opcode, (unsigned long long)in->unique,
        (unsigned long long)in->nodeid, (unsigned long long)fh, (unsigned long long)offset, (unsigned long long)length,
        (unsigned)mode);
    bool done = result == Py_True;
    if (!result) {
        PyErr_WriteUnraisable(hand_over);
        reply(burst->fd, in->unique, -EIO, 0);
    }
    Py_XDECREF(result);
    burst->number = ++bursts; /* numbers that live in Python may have changed */
    release_gil(burst);
    count.handed++;
    return done ? DONE : HANDED;
}

/* `size` bytes of request, which stay as they are. */
enum outcome answer(struct burst *burst, void *request, size_t size)
{
    struct fuse_in_header *in = request;
    if (size < sizeof *in || in->len != size)
        return PASS;
    void *arg = in + 1;
    size -= sizeof *in;
    if (in->opcode == FUSE_READ && size == sizeof(struct fuse_read_in))
        return answer_read(burst, in, arg);
    if (in->opcode == FUSE_WRITE && size >= sizeof(struct fuse_write_in)) {
        struct fuse_write_in *write = arg;
        return write->size == size - sizeof *write ? answer_write(burst, in, write) : PASS;
    }
    if (in->opcode == FUSE_FALLOCATE && size == sizeof(struct fuse_fallocate_in)) {
        struct fuse_fallocate_in *fallocate = arg;
        return hand(burst, in, fallocate->fh, fallocate->offset, fallocate->length, fallocate->mode);
    }
    if (in->opcode == FUSE_FSYNC && size == sizeof(struct fuse_fsync_in))
        return hand(burst, in, ((struct fuse_fsync_in *)arg)->fh, 0, 0, 0);
    if (in->opcode == FUSE_LSEEK && size == sizeof(struct fuse_lseek_in)) {
        struct fuse_lseek_in *lseek = arg;
        return hand(burst, in, lseek->fh, lseek->offset, 0, lseek->whence);
    }
    return PASS;
}

/* -- reads that wait for the disk ----------------------------------------------------------------------------------------- */

/* The host has begun to read what they miss (RWF_NOWAIT starts readahead), and a fast disk has it in less time than a
 * thread takes to wake: they are tried again and again, for a moment. */
static struct parked {
    struct fuse_in_header in;
    struct fuse_read_in arg;
    int64_t end; /* of the patience */
} parked[PARKED];
unsigned parking;
struct pace disk;

bool park(struct burst *burst)
{
    if (parking == PARKED || !spinning || in_python || !pace_try(&disk))
        return false;
    const struct fuse_in_header *in = burst->request; /* a READ: nothing else waits */
    struct parked *place = &parked[parking++];
    place->in = *in;
    memcpy(&place->arg, in + 1, sizeof place->arg);
    place->end = now() + DISK_NS;
    return true;
}

/* Tries each of them again. Those whose time is over, or that meet anything else, go to Python. */
enum outcome retry_parked(struct burst *burst)
{
    enum outcome result = DONE;
    for (unsigned i = 0; i < parking;) {
        struct parked place = parked[i];
        bool late = now() >= place.end;
        enum outcome outcome = answer_read(burst, &place.in, &place.arg);
        if (outcome == WAIT && !late) {
            i++;
            continue;
        }
        pace_note(&disk, outcome == DONE);
        parked[i] = parked[--parking];
        if (outcome != DONE) {
            count.missed++;
            if (hand(burst, &place.in, place.arg.fh, place.arg.offset, place.arg.size, 0) != HANDED)
                reply(burst->fd, place.in.unique, -EIO, 0);
            result = HANDED;
        }
    }
    return result;
}
