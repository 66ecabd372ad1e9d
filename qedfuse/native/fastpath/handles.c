/* Handles, by the number that the kernel has for them. */

#include "handles.h"
#include "view.h"

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

const struct handle *handle_find(uint64_t fh)
{
    return index_get(&handles, fh);
}

Layer *current_layer(struct burst *burst, const struct handle *handle)
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
