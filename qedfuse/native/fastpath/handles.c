/* Handles, by the number that the kernel has for them. */

#include "handles.h"
#include "view.h"

static struct index handles; /* fh -> struct handle */

void detach(uint64_t fh)
{
    struct handle *handle = index_drop(&handles, fh);
    if (handle) {
        Py_XDECREF(handle->layer);
        free(handle);
    }
}

bool attach(uint64_t fh, Layer *layer, bool writable)
{
    struct handle *handle = index_get(&handles, fh);
    if (!handle) {
        handle = calloc(1, sizeof *handle);
        if (!handle || !index_set(&handles, fh, handle)) {
            free(handle);
            return false;
        }
    }
    Layer *before = handle->layer;
    *handle = (struct handle){(Layer *)Py_XNewRef(layer), writable};
    Py_XDECREF(before);
    return true;
}

const struct handle *handle_find(uint64_t fh)
{
    return index_get(&handles, fh);
}

Layer *current_layer(struct burst *burst, const struct handle *handle)
{
    Layer *layer = handle->layer;
    if (layer && layer->burst != burst->number) {
        take_gil(burst); /* `refresh` computes numbers and does nothing else */
        bool known = view_refresh(layer);
        release_gil(burst);
        if (!known)
            return NULL;
        layer->burst = burst->number;
    }
    return layer;
}
