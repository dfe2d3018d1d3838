/* Token ids off the wire: a msgpack array of numbers becomes an array of uint64, without an object for each. */

#include <Python.h>

#include <stdint.h>
#include <string.h>

typedef struct {
    const uint8_t *at, *end;
} Input;

/* The next `size` bytes as a big-endian number. The caller has seen that they are there. */
static uint64_t take(Input *input, unsigned size)
{
    uint64_t number = 0;
    for (unsigned i = 0; i < size; i++) number = number << 8 | *input->at++;
    return number;
}

static PyObject *fails(PyObject *kind, const char *message)
{
    PyErr_SetString(kind, message);
    return NULL;
}

static const char truncated[] = "the tokens end in their middle";

/* Bytes that follow the first of a number, by that byte from 0xcc on: unsigned ones of 1, 2, 4 and 8 bytes, then signed ones. */
static const uint8_t sizes[] = {1, 2, 4, 8, 1, 2, 4, 8};

/* False with an exception, when there is no number, or a negative one. */
static int number_from(Input *input, uint64_t *number)
{
    if (input->at == input->end) return fails(PyExc_ValueError, truncated), 0;
    const uint8_t first = *input->at++;
    if (first < 0x80) return *number = first, 1;
    if (first >= 0xe0) return fails(PyExc_OverflowError, "a token is negative"), 0;
    if (first < 0xcc || first > 0xd3) return fails(PyExc_ValueError, "a token is not a whole number"), 0;
    const unsigned size = sizes[first - 0xcc];
    if ((size_t)(input->end - input->at) < size) return fails(PyExc_ValueError, truncated), 0;
    *number = take(input, size);
    if (first >= 0xd0 && *number >> (8 * size - 1)) return fails(PyExc_OverflowError, "a token is negative"), 0;
    return 1;
}

/* By the first byte of a number: how many bytes it has, and how it is cut out of the first eight, by a shift to the left and one to the right. */
typedef struct {
    uint8_t size, left, right;
} Shape;

/* Numbers of one to five bytes, as nearly all tokens are, without a jump that depends on which they are: the processor could not foresee it.
   Stops before anything else and before the last eight bytes. Returns how many it has read. */
static int64_t quick_numbers(Input *input, uint64_t *numbers, int64_t count)
{
    static const Shape shapes[256] = {[0 ... 0x7f] = {1, 0, 56}, [0xcc] = {2, 8, 56}, [0xcd] = {3, 8, 48}, [0xce] = {5, 8, 32}};
    const uint8_t *at = input->at;
    int64_t done = 0;
    for (; done < count && input->end - at >= 8; done++) {
        const Shape shape = shapes[*at];
        if (!shape.size) break;
        uint64_t eight = 0;
        for (unsigned i = 0; i < 8; i++) eight = eight << 8 | at[i]; /* one instruction, to compilers */
        numbers[done] = eight << shape.left >> shape.right;
        at += shape.size;
    }
    input->at = at;
    return done;
}

/* How many elements the array has; -1 with an exception, when there is no array. */
static int64_t count_from(Input *input)
{
    const uint8_t first = input->at == input->end ? 0 : *input->at++;
    if (first >> 4 == 9) return first & 15;
    const unsigned size = first == 0xdc ? 2 : first == 0xdd ? 4 : 0;
    if (!size) return fails(PyExc_ValueError, "tokens must be an array"), -1;
    if ((size_t)(input->end - input->at) < size) return fails(PyExc_ValueError, truncated), -1;
    return (int64_t)take(input, size);
}

static PyObject *tokens_from(Input *input)
{
    const int64_t count = count_from(input);
    if (count < 0) return NULL;
    if (count > input->end - input->at) return fails(PyExc_ValueError, truncated); /* before memory is asked for */
    PyObject *tokens = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)count * 8);
    if (!tokens) return NULL;
    char *out = PyBytes_AsString(tokens);
    for (int64_t i = quick_numbers(input, (uint64_t *)out, count); i < count; i++) {
        uint64_t number;
        if (!number_from(input, &number)) {
            Py_DECREF(tokens);
            return NULL;
        }
        memcpy(out + 8 * i, &number, 8);
    }
    if (input->at == input->end) return tokens;
    Py_DECREF(tokens);
    return fails(PyExc_ValueError, "something follows the tokens");
}

static PyObject *read_tokens(PyObject *module, PyObject *message)
{
    (void)module;
    Py_buffer view;
    if (PyObject_GetBuffer(message, &view, PyBUF_SIMPLE) < 0) return NULL;
    Input input = {view.buf, (const uint8_t *)view.buf + view.len};
    PyObject *tokens = tokens_from(&input);
    PyBuffer_Release(&view);
    return tokens;
}

static PyMethodDef functions[] = {
    {"read_tokens", read_tokens, METH_O, "read_tokens(message, /): a msgpack array of token ids as bytes, 8 a token in this machine's order."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "dynamo_kv_native._tokens", .m_size = 0, .m_methods = functions};

PyMODINIT_FUNC PyInit__tokens(void) { return PyModuleDef_Init(&module_def); }
