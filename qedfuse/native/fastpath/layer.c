/* Layer as a Python object, and the look-up in the tables' pages. */

#include "view.h"

#include <stddef.h>
#include <structmember.h>

/* -- the object ---------------------------------------------------------------------------------------------------- */

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"fd", "size", "view", "below", NULL};
    int fd;
    unsigned long long size;
    PyObject *view = Py_None, *below = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "iK|$OO:Layer", names, &fd, &size, &view, &below))
        return NULL;
    if (below != Py_None && !PyObject_TypeCheck(below, &LayerType)) {
        PyErr_SetString(PyExc_TypeError, "not a layer");
        return NULL;
    }
    Layer *self = (Layer *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->fd = fd;
    self->size = size;
    self->below = below == Py_None ? NULL : (Layer *)Py_NewRef(below);
    if (view != Py_None) {
        self->view = Py_NewRef(view);
        self->l1 = (PageIndex *)PyObject_CallNoArgs((PyObject *)&PageIndexType);
        self->l2 = (PageIndex *)PyObject_CallNoArgs((PyObject *)&PageIndexType);
        if (!self->l1 || !self->l2 || !view_fetch(self))
            Py_CLEAR(self);
    }
    return (PyObject *)self;
}

/* Releases a chain in a loop: its length costs no stack. */
static void layer_dealloc(PyObject *object)
{
    Layer *self = (Layer *)object, *below = self->below;
    Py_XDECREF(self->l1);
    Py_XDECREF(self->l2);
    Py_XDECREF(self->view);
    Py_TYPE(object)->tp_free(object);
    while (below && Py_REFCNT(below) == 1) {
        Layer *next = below->below;
        below->below = NULL;
        Py_DECREF(below);
        below = next;
    }
    Py_XDECREF(below);
}

static PyObject *layer_run_of(PyObject *object, PyObject *args)
{
    const Layer *self = (const Layer *)object;
    unsigned long long offset, size;
    if (!PyArg_ParseTuple(args, "KK:run", &offset, &size))
        return NULL;
    if (!size || offset >= self->size || size > self->size - offset) {
        PyErr_SetString(PyExc_ValueError, "not inside the layer");
        return NULL;
    }
    uint64_t length = size, host = 0;
    enum kind kind = layer_run(self, offset, &length, &host);
    return Py_BuildValue("iKK", (int)kind, (unsigned long long)length, (unsigned long long)host);
}

static PyObject *layer_missing_of(PyObject *object, PyObject *argument)
{
    const Layer *self = (const Layer *)object;
    unsigned long long offset = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (!self->view || offset >= self->size) {
        PyErr_SetString(PyExc_ValueError, "not inside a layer with tables");
        return NULL;
    }
    bool is_l1;
    uint64_t number, host;
    if (!layer_missing(self, offset, &is_l1, &number, &host))
        Py_RETURN_NONE;
    return Py_BuildValue("OKK", is_l1 ? Py_True : Py_False, (unsigned long long)number, (unsigned long long)host);
}

static PyMethodDef layer_methods[] = {
    {"run", layer_run_of, METH_VARARGS,
     "run(offset, size) -> (kind, bytes, offset in the file): what the pages in memory say of a range inside the "
     "layer, from its start on. For tests."},
    {"missing", layer_missing_of, METH_O,
     "missing(offset) -> (of the L1 table?, index, offset in the file): the page that is to be read where `run` says "
     "ABSENT, or None if it can be nowhere. For tests."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef layer_members[] = {
    {"l1", T_OBJECT, offsetof(Layer, l1), READONLY, "To be told where the pages of the L1 table are in memory."},
    {"l2", T_OBJECT, offsetof(Layer, l2), READONLY, "The same for the L2 tables."},
    {NULL, 0, 0, 0, NULL},
};

PyTypeObject LayerType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qedfuse.native._fastpath.Layer",
    .tp_doc = "Layer(fd, size, *, view=None, below=None): an image of a chain. fd: -1 is opaque. size: bytes, of what "
              "has no view. view: a NativeView. below: a Layer, for where this one has nothing.",
    .tp_basicsize = sizeof(Layer),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = layer_new,
    .tp_dealloc = layer_dealloc,
    .tp_methods = layer_methods,
    .tp_members = layer_members,
};

/* -- the mapping --------------------------------------------------------------------------------------------------- */

/* Whether clusters or a table of `size` bytes can lie here in the file: aligned, behind the header, inside. */
static inline bool inside(const Layer *layer, uint64_t host, uint64_t size)
{
    return !(host & ((UINT64_C(1) << layer->cluster_bits) - 1)) && host >= layer->data_start &&
           host <= layer->file_end && size <= layer->file_end - host;
}

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
            if (!inside(layer, entry, (uint64_t)(here - first) << bits))
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
    return inside(layer, start, size);
}
