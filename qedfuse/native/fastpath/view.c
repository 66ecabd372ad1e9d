/* NativeView's attributes and methods, by their names. */

#include "view.h"

#include <assert.h>

enum name {
    CLUSTER_BITS,
    TABLE_BITS,
    DATA_START,
    L1_OFFSET,
    SIZE,
    FILE_END,
    WRITABLE,
    FREE,
    FREE_END,
    REFRESH,
    NOTE_WRITTEN,
    NOTE_TAKEN,
    TAKE_L1_PAGE,
    TAKE_L2_PAGE,
    NAMES,
};

static const char *const texts[NAMES] = {
    [CLUSTER_BITS] = "cluster_bits",
    [TABLE_BITS] = "table_bits",
    [DATA_START] = "data_start",
    [L1_OFFSET] = "l1_offset",
    [SIZE] = "size",
    [FILE_END] = "file_end",
    [WRITABLE] = "writable",
    [FREE] = "free",
    [FREE_END] = "free_end",
    [REFRESH] = "refresh",
    [NOTE_WRITTEN] = "note_written",
    [NOTE_TAKEN] = "note_taken",
    [TAKE_L1_PAGE] = "take_l1_page",
    [TAKE_L2_PAGE] = "take_l2_page",
};
static PyObject *names[NAMES];
static PyObject *taken_names; /* of note_taken's arguments */

bool view_prepare(void)
{
    for (int i = 0; i < NAMES; i++) {
        names[i] = PyUnicode_InternFromString(texts[i]);
        if (!names[i])
            return false;
    }
    static const char *const arguments[] = {"first", "taken", "lost", "filled", "pages"};
    taken_names = PyTuple_New(5);
    for (int i = 0; taken_names && i < 5; i++) {
        PyObject *name = PyUnicode_InternFromString(arguments[i]);
        if (!name)
            Py_CLEAR(taken_names);
        else
            PyTuple_SET_ITEM(taken_names, i, name);
    }
    return taken_names != NULL;
}

/* -- asked --------------------------------------------------------------------------------------------------------- */

static bool fetch(const Layer *layer, enum name name, uint64_t *value)
{
    PyObject *number = PyObject_GetAttr(layer->view, names[name]);
    if (!number)
        return false;
    *value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return *value != UINT64_MAX || !PyErr_Occurred();
}

static bool fetch_numbers(Layer *layer)
{
    uint64_t size, file_end, writable, free, free_end;
    if (!fetch(layer, SIZE, &size) || !fetch(layer, FILE_END, &file_end) || !fetch(layer, WRITABLE, &writable) ||
        !fetch(layer, FREE, &free) || !fetch(layer, FREE_END, &free_end))
        return false;
    layer->size = size;
    layer->file_end = file_end;
    layer->writable = writable;
    layer->free = free;
    layer->free_end = free_end;
    return true;
}

bool view_fetch(Layer *layer)
{
    uint64_t cluster_bits, table_bits;
    if (!fetch(layer, CLUSTER_BITS, &cluster_bits) || !fetch(layer, TABLE_BITS, &table_bits) ||
        !fetch(layer, DATA_START, &layer->data_start) || !fetch(layer, L1_OFFSET, &layer->l1_offset) ||
        !fetch_numbers(layer))
        return false;
    if (cluster_bits > MAX_CLUSTER_BITS || table_bits > MAX_TABLE_BITS) {
        PyErr_SetString(PyExc_ValueError, "not an image's shape");
        return false;
    }
    layer->cluster_bits = (unsigned)cluster_bits;
    layer->table_bits = (unsigned)table_bits;
    return true;
}

bool view_refresh(Layer *layer)
{
    assert(!layer->dirty); /* in a build for tests */
    if (layer->dirty) {    /* clusters that are taken already would be offered once more */
        PyErr_SetString(PyExc_AssertionError, "the numbers were asked for before all writes were told of");
        PyErr_WriteUnraisable(layer->view);
        return false;
    }
    PyObject *done = PyObject_CallMethodNoArgs(layer->view, names[REFRESH]);
    bool known = done && fetch_numbers(layer);
    Py_XDECREF(done);
    if (!known)
        PyErr_WriteUnraisable(layer->view);
    return known;
}

bool view_take_page(const Layer *layer, bool is_l1, uint64_t number, uint64_t host, const char *page)
{
    PyObject *args[] = {layer->view, PyLong_FromUnsignedLongLong(number), PyLong_FromUnsignedLongLong(host),
                        PyBytes_FromStringAndSize(page, PAGE)};
    PyObject *taken = NULL;
    if (args[1] && args[2] && args[3])
        taken = PyObject_VectorcallMethod(names[is_l1 ? TAKE_L1_PAGE : TAKE_L2_PAGE], args, 4, NULL);
    for (int i = 1; i < 4; i++)
        Py_XDECREF(args[i]);
    if (!taken)
        PyErr_WriteUnraisable(layer->view);
    Py_XDECREF(taken);
    return taken == Py_True;
}

/* -- told ---------------------------------------------------------------------------------------------------------- */

/* The L2 pages in which entries were set, as a tuple. */
static PyObject *pages_of(const Layer *layer)
{
    PyObject *pages = PyTuple_New(layer->pages);
    for (unsigned i = 0; pages && i < layer->pages; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(layer->page[i]);
        if (!number)
            Py_CLEAR(pages);
        else
            PyTuple_SET_ITEM(pages, i, number);
    }
    return pages;
}

static PyObject *tell_taken(const Layer *layer)
{
    PyObject *args[] = {layer->view, PyLong_FromUnsignedLongLong(layer->free - layer->taken),
                        PyLong_FromUnsignedLongLong(layer->taken), PyLong_FromUnsignedLongLong(layer->lost),
                        PyLong_FromUnsignedLongLong(layer->filled), pages_of(layer)};
    PyObject *told = NULL;
    if (args[1] && args[2] && args[3] && args[4] && args[5])
        told = PyObject_VectorcallMethod(names[NOTE_TAKEN], args, 1, taken_names);
    for (int i = 1; i < 6; i++)
        Py_XDECREF(args[i]);
    return told;
}

void view_tell(Layer *layer)
{
    PyObject *told = layer->taken ? tell_taken(layer) : PyObject_CallMethodNoArgs(layer->view, names[NOTE_WRITTEN]);
    if (!told) {
        /* Python would hand out the same clusters again. A crash loses nothing that was synced: better that. */
        PyErr_WriteUnraisable(layer->view);
        Py_FatalError("Python could not be told of writes");
    }
    Py_DECREF(told);
    layer->dirty = false;
    layer->taken = layer->lost = layer->filled = 0;
    layer->pages = 0;
}
