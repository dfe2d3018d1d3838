/* The Python side of the links between blocks: what comes in is checked here, all of it, before anything is changed. */

#include <Python.h>

#include "links.h"

typedef struct {
    PyObject_HEAD
    Links links;
} Blocks;

static PyTypeObject *blocks_type; /* one for the process: the module is made once (`m_size` -1) */

static bool hash_from(PyObject *object, uint64_t *hash)
{
    *hash = PyLong_AsUnsignedLongLong(object);
    return *hash != UINT64_MAX || !PyErr_Occurred();
}

/* The place of a block that is here, or NONE with an exception. */
static uint32_t here(Blocks *self, PyObject *object)
{
    uint64_t hash;
    if (!hash_from(object, &hash)) return NONE;
    const uint32_t at = find(&self->links, hash);
    if (at != NONE && !self->links.blocks[at].ghost) return at;
    PyErr_SetObject(PyExc_KeyError, object);
    return NONE;
}

/* The same for one that may be `None`. */
static bool parent_from(Blocks *self, PyObject *object, uint32_t *at)
{
    *at = NONE;
    return object == Py_None || (*at = here(self, object)) != NONE;
}

/* A contiguous array of uint64. */
static bool open_numbers(PyObject *object, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_CONTIG_RO | PyBUF_FORMAT) < 0) return false;
    const char *format = view->format ? view->format : "B";
    const int one = 1;
    const char native = *(const char *)&one ? '<' : '>';
    if (*format == '@' || *format == '=' || *format == native) format++;
    if (view->ndim == 1 && view->itemsize == 8 && strlen(format) == 1 && strchr("QL", *format) && (uintptr_t)view->buf % 8 == 0) return true;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_TypeError, "hashes and keys must be aligned one-dimensional arrays of uint64");
    return false;
}

/* -------------------------------------------------------------- questions */

static PyObject *key(Blocks *self, PyObject *hash)
{
    const uint32_t at = here(self, hash);
    return at == NONE ? NULL : PyLong_FromUnsignedLongLong(self->links.blocks[at].key);
}

static PyObject *children_of(Links *links, uint32_t at)
{
    PyObject *found = PyList_New(0);
    for (at = links->blocks[at].child; found && at != NONE; at = links->blocks[at].next) {
        if (links->blocks[at].ghost) continue;
        PyObject *hash = PyLong_FromUnsignedLongLong(links->blocks[at].hash);
        if (!hash || PyList_Append(found, hash) < 0) Py_CLEAR(found);
        Py_XDECREF(hash);
    }
    return found;
}

static PyObject *children(Blocks *self, PyObject *object)
{
    uint64_t hash;
    if (!hash_from(object, &hash)) return NULL;
    const uint32_t at = find(&self->links, hash);
    return at == NONE ? PyList_New(0) : children_of(&self->links, at);
}

/* Marks the places of blocks that are not wanted. */
static bool mark(Links *links, PyObject *hashes, char *marks)
{
    PyObject *each = PyObject_GetIter(hashes), *item;
    uint64_t hash;
    bool read = each != NULL;
    while (read && (item = PyIter_Next(each))) {
        read = hash_from(item, &hash);
        const uint32_t at = read ? find(links, hash) : NONE;
        if (at != NONE && at < links->used) marks[at] = 1;
        Py_DECREF(item);
    }
    Py_XDECREF(each);
    return read && !PyErr_Occurred();
}

static PyObject *keys(Blocks *self, PyObject *without)
{
    Links *links = &self->links;
    PyObject *found = NULL;
    char *marks = PyMem_Calloc((size_t)links->used + 1, 1);
    if (!marks) return PyErr_NoMemory();
    for (uint32_t at = links->free; at != NONE; at = links->blocks[at].next) marks[at] = 1;
    if (mark(links, without, marks)) {
        uint32_t count = 0;
        for (uint32_t at = 0; at < links->used; at++) count += !(marks[at] = (char)(marks[at] || links->blocks[at].ghost));
        found = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count * 8);
        char *out = found ? PyBytes_AsString(found) : NULL;
        for (uint32_t at = 0; out && at < links->used; at++) {
            if (marks[at]) continue;
            memcpy(out, &links->blocks[at].key, 8);
            out += 8;
        }
    }
    PyMem_Free(marks);
    return found;
}

static PyObject *size_of(Blocks *self, PyObject *nothing)
{
    (void)nothing;
    size_t bytes = sizeof *self + self->links.capacity * sizeof(Block);
    for (uint32_t i = 0; i < TABLES; i++) bytes += self->links.tables[i].size * sizeof(Bucket);
    return PyLong_FromSize_t(bytes);
}

static Py_ssize_t length(Blocks *self) { return self->links.count; }

static int contains(Blocks *self, PyObject *object)
{
    uint64_t hash;
    if (!hash_from(object, &hash)) return -1;
    const uint32_t at = find(&self->links, hash);
    return at != NONE && !self->links.blocks[at].ghost;
}

/* -------------------------------------------------------------- changes */

static PyObject *store(Blocks *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer hashes, named;
    uint32_t parent;
    int stored = -1;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected hashes, parent and keys, got %zd arguments", count);
    if (!parent_from(self, args[1], &parent) || !open_numbers(args[0], &hashes)) return NULL;
    if (open_numbers(args[2], &named)) {
        if (hashes.shape[0] != named.shape[0])
            PyErr_SetString(PyExc_ValueError, "there must be as many keys as hashes");
        else if ((stored = add_chain(&self->links, hashes.buf, named.buf, (size_t)hashes.shape[0], parent)) < 0)
            PyErr_NoMemory();
        PyBuffer_Release(&named);
    }
    PyBuffer_Release(&hashes);
    return stored < 0 ? NULL : PyBool_FromLong(stored);
}

static PyObject *store_one(Blocks *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t hash, name;
    uint32_t parent;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected hash, parent and key, got %zd arguments", count);
    if (!hash_from(args[0], &hash) || !parent_from(self, args[1], &parent) || !hash_from(args[2], &name)) return NULL;
    const uint32_t at = find(&self->links, hash);
    if (at == NONE) {
        if (append(&self->links, hash, name, parent) == NONE) return PyErr_NoMemory();
    } else if (self->links.blocks[at].ghost) {
        revive(&self->links, at, name, parent);
    } else {
        return PyErr_Format(PyExc_ValueError, "block %R is here already", args[0]);
    }
    Py_RETURN_NONE;
}

static PyObject *drop_block(Blocks *self, PyObject *hash)
{
    const uint32_t at = here(self, hash);
    if (at == NONE) return NULL;
    PyObject *left = children_of(&self->links, at);
    PyObject *answer = left ? Py_BuildValue("KN", (unsigned long long)self->links.blocks[at].key, left) : NULL;
    if (answer) drop(&self->links, at);
    return answer;
}

/* -------------------------------------------------------------- the type */

static PyObject *new_blocks(PyTypeObject *type, PyObject *args, PyObject *names)
{
    if (PyTuple_Size(args) || (names && PyDict_Size(names))) return PyErr_Format(PyExc_TypeError, "Blocks() takes no arguments");
    Blocks *self = (Blocks *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self) open_links(&self->links);
    return (PyObject *)self;
}

static void dealloc(Blocks *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    close_links(&self->links);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"key", (PyCFunction)key, METH_O, "key(hash, /): of a block that is here."},
    {"children", (PyCFunction)children, METH_O, "children(hash, /): the blocks that follow it, whether it is here or not."},
    {"keys", (PyCFunction)keys, METH_O, "keys(without, /): of all blocks but some, 8 bytes each in this machine's order."},
    {"store", (PyCFunction)(void (*)(void))store, METH_FASTCALL, "store(hashes, parent, keys, /): blocks, one below the other."},
    {"store_one", (PyCFunction)(void (*)(void))store_one, METH_FASTCALL, "store_one(hash, parent, key, /): a block that is not here."},
    {"drop", (PyCFunction)drop_block, METH_O, "drop(hash, /): its key, and the blocks that follow it, which stay."},
    {"__sizeof__", (PyCFunction)size_of, METH_NOARGS, "Bytes, all of them."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Blocks(): which blocks an engine has, what they are called, and which follow which. Not thread-safe but for the interpreter lock."},
    {Py_tp_new, new_blocks},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {Py_sq_length, length},
    {Py_sq_contains, contains},
    {0, NULL},
};

static PyType_Spec type_spec = {"dynamo_kv_native.Blocks", sizeof(Blocks), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, type_slots};

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "dynamo_kv_native._blocks", .m_size = -1};

PyMODINIT_FUNC PyInit__blocks(void)
{
    PyObject *module = PyModule_Create(&module_def);
    if (!module) return NULL;
    if (!blocks_type) blocks_type = (PyTypeObject *)PyType_FromSpec(&type_spec);
    if (!blocks_type || PyModule_AddObjectRef(module, "Blocks", (PyObject *)blocks_type) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
