/* Batches of KV events, as engines publish them in msgpack, with their numbers packed: what is an array of tokens or of hashes becomes a `bin` of
   eight bytes each, so that whoever reads the batch makes no object for each, and need not step over them one by one. All else stays as it is,
   and so does what is no batch: whoever reads it then says what is wrong with it. */

#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const uint8_t *at, *end;
} Input;

static inline size_t left(const Input *input) { return (size_t)(input->end - input->at); }

/* A big-endian number of so many bytes. The caller has seen that they are there. */
static inline uint64_t number_at(const uint8_t *at, unsigned size)
{
    uint64_t number = 0;
    for (unsigned i = 0; i < size; i++) number = number << 8 | at[i];
    return number;
}

/* -------------------------------------------------------------- any value */

/* By the first byte of a value from 0xc4 on: the bytes of a length that follow it, and the bytes that follow in any case. */
static const struct {
    uint8_t length, more;
} heads[] = {
    {1, 0}, {2, 0}, {4, 0}, {1, 1}, {2, 1}, {4, 1}, {0, 4}, {0, 8}, {0, 1}, {0, 2}, {0, 4}, {0, 8}, {0, 1}, {0, 2}, {0, 4},
    {0, 8}, {0, 2}, {0, 3}, {0, 5}, {0, 9}, {0, 17}, {1, 0}, {2, 0}, {4, 0}, {2, 0}, {4, 0}, {2, 0}, {4, 0},
};

/* How many elements an array (`first`: 0x90) or how many pairs a map (0x80) has. */
static bool open_many(Input *input, uint8_t first, uint64_t *count)
{
    if (!left(input)) return false;
    const uint8_t head = *input->at, wide = first == 0x90 ? 0xdc : 0xde;
    if (head >> 4 == first >> 4) return *count = head & 15, input->at++, true;
    const unsigned size = head == wide ? 2 : head == wide + 1 ? 4 : 0;
    if (!size || left(input) <= size) return false;
    *count = number_at(input->at + 1, size);
    input->at += 1 + size;
    return true;
}

/* Step over so many values, whatever they are. */
static bool skip(Input *input, uint64_t count)
{
    for (; count; count--) {
        uint64_t inside;
        if (open_many(input, 0x90, &inside) || (open_many(input, 0x80, &inside) && ((inside *= 2), true))) {
            if (inside > left(input)) return false;
            count += inside;
            continue;
        }
        if (!left(input)) return false;
        const uint8_t head = *input->at++;
        size_t size = 0;
        if (head >= 0xa0 && head < 0xc0) {
            size = head & 31;
        } else if (head >= 0xc4 && head < 0xe0) {
            const unsigned length = heads[head - 0xc4].length;
            if (left(input) < length) return false;
            size = (size_t)number_at(input->at, length) + heads[head - 0xc4].more;
            input->at += length;
        } else if (head == 0xc1) {
            return false;
        }
        if (left(input) < size) return false;
        input->at += size;
    }
    return true;
}

/* -------------------------------------------------------------- numbers */

/* By the first byte of a number: how many bytes it has, and how it is cut out of the first eight, by a shift to the left and one to the right. */
typedef struct {
    uint8_t size, left, right;
} Shape;

/* Numbers of one to five bytes, as nearly all tokens are, without a jump that depends on which they are: the processor could not foresee it.
   Stops before anything else and before the last eight bytes. Returns how many it has read. */
static uint64_t quick_numbers(Input *input, uint8_t *out, uint64_t count)
{
    static const Shape shapes[256] = {[0 ... 0x7f] = {1, 0, 56}, [0xcc] = {2, 8, 56}, [0xcd] = {3, 8, 48}, [0xce] = {5, 8, 32}};
    const uint8_t *at = input->at;
    uint64_t done = 0;
    for (; done < count && input->end - at >= 8; done++) {
        const Shape shape = shapes[*at];
        if (!shape.size) break;
        const uint64_t number = number_at(at, 8) << shape.left >> shape.right; /* one instruction to read, to compilers */
        memcpy(out + 8 * done, &number, 8);
        at += shape.size;
    }
    input->at = at;
    return done;
}

/* Any number that is not negative. */
static bool number_from(Input *input, uint8_t *out)
{
    if (!left(input)) return false;
    const uint8_t head = *input->at++;
    uint64_t number = head;
    if (head >= 0x80) {
        if (head < 0xcc || head > 0xd3) return false;
        const unsigned size = heads[head - 0xc4].more;
        if (left(input) < size) return false;
        number = number_at(input->at, size);
        input->at += size;
        if (head >= 0xd0 && number >> (8 * size - 1)) return false;
    }
    memcpy(out, &number, 8);
    return true;
}

/* -------------------------------------------------------------- a batch */

typedef struct {
    Input input;
    const uint8_t *copied; /* what is before it has been written */
    uint8_t *out;
} Packing;

/* The next value: packed, if it is an array of numbers, or else stepped over. There is room: no number has less than one byte, nor an array of some. */
static bool pack_value(Packing *packing)
{
    Input input = packing->input;
    uint64_t count;
    if (open_many(&input, 0x90, &count) && count && count <= left(&input) && count < UINT32_MAX / 8) {
        const size_t before = (size_t)(packing->input.at - packing->copied);
        uint8_t *numbers = packing->out + before + 5;
        uint64_t done = 0;
        do {
            done += quick_numbers(&input, numbers + 8 * done, count - done);
        } while (done < count && number_from(&input, numbers + 8 * done) && ++done < count);
        if (done == count) {
            memcpy(packing->out, packing->copied, before);
            numbers[-5] = 0xc6;
            for (unsigned i = 0; i < 4; i++) numbers[(int)i - 4] = (uint8_t)(8 * count >> (24 - 8 * i));
            packing->out = numbers + 8 * count;
            packing->copied = input.at;
            packing->input = input;
            return true;
        }
    }
    return skip(&packing->input, 1);
}

static bool is_numbers(const Input *key)
{
    return (left(key) >= 10 && !memcmp(key->at, "\xa9token_ids", 10)) || (left(key) >= 13 && !memcmp(key->at, "\xac" "block_hashes", 13));
}

/* A map with named fields; or an array, of kind, hashes, parent and tokens. */
static bool pack_event(Packing *packing)
{
    uint64_t count;
    if (open_many(&packing->input, 0x80, &count)) {
        for (; count; count--) {
            const Input key = packing->input;
            if (!skip(&packing->input, 1) || !(is_numbers(&key) ? pack_value(packing) : skip(&packing->input, 1))) return false;
        }
        return true;
    }
    if (!open_many(&packing->input, 0x90, &count)) return false;
    for (uint64_t i = 0; i < count; i++)
        if (!(i == 1 || i == 3 ? pack_value(packing) : skip(&packing->input, 1))) return false;
    return true;
}

static bool pack_batch(Packing *packing)
{
    uint64_t count;
    if (!open_many(&packing->input, 0x90, &count) || count < 2 || !skip(&packing->input, 1)) return false;
    if (!open_many(&packing->input, 0x90, &count)) return false;
    while (count--)
        if (!pack_event(packing)) return false;
    return true;
}

static PyObject *pack_numbers(PyObject *module, PyObject *message)
{
    (void)module;
    Py_buffer view;
    PyObject *packed = NULL;
    if (PyObject_GetBuffer(message, &view, PyBUF_SIMPLE) < 0) return NULL;
    /* An array of n numbers takes n bytes and one at least, and 8 n and 5 afterwards. */
    uint8_t *out = PyMem_Malloc((size_t)view.len * 8 + 8);
    if (out) {
        Packing packing = {{view.buf, (const uint8_t *)view.buf + view.len}, view.buf, out};
        if (pack_batch(&packing) && packing.copied != view.buf) {
            const size_t rest = (size_t)(packing.input.end - packing.copied);
            memcpy(packing.out, packing.copied, rest);
            packed = PyBytes_FromStringAndSize((char *)out, packing.out + rest - out);
        } else {
            Py_INCREF(message);
            packed = message;
        }
        PyMem_Free(out);
    } else {
        PyErr_NoMemory();
    }
    PyBuffer_Release(&view);
    return packed;
}

static PyMethodDef functions[] = {
    {"pack_numbers", pack_numbers, METH_O, "pack_numbers(message, /): a batch of KV events with its tokens and hashes as `bin`, 8 bytes each in this machine's order."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "dynamo_kv_native._events", .m_size = 0, .m_methods = functions};

PyMODINIT_FUNC PyInit__events(void) { return PyModuleDef_Init(&module_def); }
