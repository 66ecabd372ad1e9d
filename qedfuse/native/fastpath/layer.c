/* Layer as a Python object, and the look-up in the tables' pages. */

#include "layer.h"

#include <assert.h>

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"fd", "size", "file_end", "data_start", "cluster_bits", "table_bits", "l1",
                            "l2", "below", "state", "wrote", "l1_offset", "loaded", NULL};
    int fd;
    unsigned long long size, file_end = 0, data_start = 0, l1_offset = 0;
    unsigned cluster_bits = 0, table_bits = 0;
    PyObject *l1 = Py_None, *l2 = Py_None, *below = Py_None, *state = Py_None, *wrote = Py_None;
    PyObject *loaded = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iK|$KKIIOOOOOKO:Layer", names, &fd, &size, &file_end, &data_start,
                                     &cluster_bits, &table_bits, &l1, &l2, &below, &state, &wrote, &l1_offset,
                                     &loaded))
        return NULL;
    bool raw = l1 == Py_None && l2 == Py_None;
    if ((!raw && (!PyObject_TypeCheck(l1, &PageIndexType) || !PyObject_TypeCheck(l2, &PageIndexType))) ||
        (below != Py_None && !PyObject_TypeCheck(below, &LayerType)) || cluster_bits > 26 || table_bits > 27) {
        PyErr_SetString(PyExc_TypeError, "not a layer");
        return NULL;
    }
    Layer *self = (Layer *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->fd = fd;
    self->size = size;
    self->file_end = file_end;
    self->data_start = data_start;
    self->l1_offset = l1_offset;
    self->cluster_bits = cluster_bits;
    self->table_bits = table_bits;
    if (!raw) {
        self->l1 = (PageIndex *)Py_NewRef(l1);
        self->l2 = (PageIndex *)Py_NewRef(l2);
    }
    self->below = below == Py_None ? NULL : (Layer *)Py_NewRef(below);
    self->state = state == Py_None ? NULL : Py_NewRef(state);
    self->wrote = wrote == Py_None ? NULL : Py_NewRef(wrote);
    self->loaded = loaded == Py_None ? NULL : Py_NewRef(loaded);
    return (PyObject *)self;
}

/* Releases a chain in a loop: its length costs no stack. */
static void layer_dealloc(PyObject *object)
{
    Layer *self = (Layer *)object, *below = self->below;
    Py_XDECREF(self->l1);
    Py_XDECREF(self->l2);
    Py_XDECREF(self->state);
    Py_XDECREF(self->wrote);
    Py_XDECREF(self->loaded);
    Py_TYPE(object)->tp_free(object);
    while (below && Py_REFCNT(below) == 1) {
        Layer *next = below->below;
        below->below = NULL;
        Py_DECREF(below);
        below = next;
    }
    Py_XDECREF(below);
}

PyTypeObject LayerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._fastpath.Layer",
    .tp_doc = "Layer(fd, size, *, file_end, data_start, cluster_bits, table_bits, l1, l2, below, state, wrote, "
              "l1_offset, loaded)",
    .tp_basicsize = sizeof(Layer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = layer_new,
    .tp_dealloc = layer_dealloc,
};

bool layer_refresh(Layer *layer)
{
    unsigned long long size, file_end, free, free_end;
    int writable;
    assert(!layer->dirty); /* in a build for tests */
    if (layer->dirty) {    /* clusters that are taken already would be offered once more */
        PyErr_SetString(PyExc_AssertionError, "the numbers were asked for before all writes were told of");
        PyErr_WriteUnraisable(layer->state);
        return false;
    }
    PyObject *state = PyObject_CallNoArgs(layer->state);
    if (!state || !PyArg_ParseTuple(state, "KKpKK", &size, &file_end, &writable, &free, &free_end)) {
        Py_XDECREF(state);
        PyErr_WriteUnraisable(layer->state);
        return false;
    }
    Py_DECREF(state);
    layer->size = size;
    layer->file_end = file_end;
    layer->writable = writable;
    layer->free = free;
    layer->free_end = free_end;
    return true;
}

void layer_tell(Layer *layer)
{
    PyObject *pages = PyTuple_New(layer->pages), *told = NULL;
    for (unsigned i = 0; pages && i < layer->pages; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(layer->page[i]);
        if (!number)
            Py_CLEAR(pages);
        else
            PyTuple_SET_ITEM(pages, i, number);
    }
    if (pages && layer->wrote)
        told = PyObject_CallFunction(layer->wrote, "KKKKO", (unsigned long long)(layer->free - layer->taken),
                                     (unsigned long long)layer->taken, (unsigned long long)layer->lost,
                                     (unsigned long long)layer->filled, pages);
    if (layer->wrote && !told) {
        /* Python would hand out the same clusters again. A crash loses nothing that was synced: better that. */
        PyErr_WriteUnraisable(layer->wrote);
        Py_FatalError("Python could not be told of writes");
    }
    Py_XDECREF(told);
    Py_XDECREF(pages);
    layer->dirty = false;
    layer->taken = layer->lost = layer->filled = 0;
    layer->pages = 0;
}

/* -- the mapping ------------------------------------------------------------------------------------------------------- */

enum kind layer_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host)
{
    if (layer->fd < 0)
        return UNKNOWN;
    if (!layer->l1) {
        *host = offset;
        return DATA;
    }
    unsigned bits = layer->cluster_bits;
    uint64_t cluster = offset >> bits, skip = offset - (cluster << bits), end_cluster;
    const uint64_t *page = index_get(&layer->l2->pages, cluster >> PAGE_BITS);
    enum kind kind;
    if (page) {
        uint64_t wanted = (skip + *length + (UINT64_C(1) << bits) - 1) >> bits;
        unsigned first = cluster & (PAGE_ENTRIES - 1), stop = PAGE_ENTRIES, here = first + 1;
        if (wanted < stop - first)
            stop = first + (unsigned)wanted;
        uint64_t entry = page[first], step = entry > ZERO ? UINT64_C(1) << bits : 0;
        while (here < stop && page[here] == page[here - 1] + step)
            here++;
        end_cluster = cluster + (here - first);
        kind = entry > ZERO ? DATA : (enum kind)entry;
        if (kind == DATA) {
            uint64_t run = (uint64_t)(here - first) << bits;
            if (entry & (step - 1) || entry < layer->data_start || entry > layer->file_end ||
                run > layer->file_end - entry)
                return UNKNOWN;
            *host = entry + skip;
        }
    } else {
        uint64_t table = cluster >> layer->table_bits;
        page = index_get(&layer->l1->pages, table >> PAGE_BITS);
        if (!page || page[table & (PAGE_ENTRIES - 1)])
            return ABSENT;
        end_cluster = (table + 1) << layer->table_bits;
        kind = UNALLOCATED;
    }
    uint64_t room = ((end_cluster - cluster) << bits) - skip; /* at most 2^27 entries of 2^26 bytes */
    if (room < *length)
        *length = room;
    return kind;
}

enum kind chain_run(const Layer *layer, uint64_t offset, uint64_t *length, uint64_t *host, const Layer **owner)
{
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        enum kind kind = layer_run(layer, offset, length, host);
        if (kind != UNALLOCATED) {
            *owner = layer;
            return kind;
        }
        layer = layer->below;
        if (!layer || offset >= layer->size)
            return ZERO;
        if (*length > layer->size - offset)
            *length = layer->size - offset;
    }
    return UNKNOWN;
}

bool layer_missing(const Layer *layer, uint64_t offset, bool *is_l1, uint64_t *number, uint64_t *host)
{
    uint64_t cluster = offset >> layer->cluster_bits, table = cluster >> layer->table_bits;
    const uint64_t *l1_page = index_get(&layer->l1->pages, table >> PAGE_BITS);
    *is_l1 = !l1_page;
    if (!l1_page) {
        *number = table >> PAGE_BITS;
        *host = layer->l1_offset + *number * PAGE;
        return true;
    }
    uint64_t start = l1_page[table & (PAGE_ENTRIES - 1)], size = UINT64_C(8) << layer->table_bits;
    *number = cluster >> PAGE_BITS;
    *host = start + *number * PAGE % size;
    return !(start & ((UINT64_C(1) << layer->cluster_bits) - 1)) && start >= layer->data_start &&
           start <= layer->file_end && size <= layer->file_end - start;
}
