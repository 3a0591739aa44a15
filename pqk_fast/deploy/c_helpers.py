"""The functions of the C source, of which a network gets those that it needs."""

from __future__ import annotations

import re
from collections.abc import Collection

_READER = """\
/* Reads the kept weights of a layer one after the other, in the order of their flat index. */
typedef struct {
    const void *data;  /* see the layouts below */
    int layout;
    uint32_t bits;     /* of a value */
    uint32_t gap_bits; /* FIELDS: of the number of zeros before a value */
    uint32_t left;     /* fields (FIELDS) or weights (BITMAP, FLOATS) that are not read yet */
    uint32_t bit;      /* where the next field (FIELDS) or value (BITMAP) begins in data, in bits */
    uint32_t after;    /* flat index after all that was read */
    uint32_t place;    /* flat index of the current weight; NO_WEIGHT after the last */
    float value;       /* of the current weight, in steps */
} weight_reader;

#define NO_WEIGHT UINT32_MAX
"""

_BITS = """\
/* An unsigned number of count bits (1 to 24) that begins at a bit of a little-endian bit stream. */
static uint32_t read_bits(const uint8_t *data, uint32_t bit, uint32_t count)
{
    const uint32_t last = (bit + count - 1) / 8;
    uint32_t word = 0, shift = 0, i;
    for (i = bit / 8; i <= last; i++) {
        word |= (uint32_t)data[i] << shift;
        shift += 8;
    }
    return (word >> bit % 8) & ((UINT32_C(1) << count) - 1);
}

/* A number of count bits in two's complement. */
static float signed_value(uint32_t field, uint32_t count)
{
    const int32_t value = (int32_t)field;
    return (float)(field >> (count - 1) != 0 ? value - (int32_t)(UINT32_C(1) << count) : value);
}
"""

_LAYOUTS = {
    "FIELDS": """\
/* FIELDS: fields of gap_bits + bits bits: how many zeros come before a value, and the value. A value of 0 is one more
 * zero, so that long gaps take several fields; without gap_bits there is a field for every weight. */
static void next_field(weight_reader *w)
{
    while (w->left > 0) {
        const uint32_t field = read_bits((const uint8_t *)w->data, w->bit, w->gap_bits + w->bits);
        w->left--;
        w->bit += w->gap_bits + w->bits;
        w->after += (field & ((UINT32_C(1) << w->gap_bits) - 1)) + 1;
        if (field >> w->gap_bits != 0) {
            w->place = w->after - 1;
            w->value = signed_value(field >> w->gap_bits, w->bits);
            return;
        }
    }
    w->place = NO_WEIGHT;
}
""",
    "BITMAP": """\
/* BITMAP: a bit for every weight that says whether it is kept, padded to whole bytes; then the kept ones' values. */
static void next_marked(weight_reader *w)
{
    const uint8_t *data = (const uint8_t *)w->data;
    while (w->left > 0) {
        const uint32_t i = w->after++;
        w->left--;
        if ((data[i / 8] >> i % 8 & 1) != 0) {
            w->place = i;
            w->value = signed_value(read_bits(data, w->bit, w->bits), w->bits);
            w->bit += w->bits;
            return;
        }
    }
    w->place = NO_WEIGHT;
}
""",
    "FLOATS": """\
/* FLOATS: every weight as a float, of layers that are not quantized. */
static void next_float(weight_reader *w)
{
    if (w->left > 0) {
        w->left--;
        w->place = w->after++;
        w->value = ((const float *)w->data)[w->place];
    } else {
        w->place = NO_WEIGHT;
    }
}
""",
}
_NEXT = {"FIELDS": "next_field", "BITMAP": "next_marked", "FLOATS": "next_float"}

_CONV = """\
typedef struct {
    uint16_t inputs;                 /* planes that go into one output plane */
    uint16_t outputs;                /* output planes of the same inputs: all, unless the convolution has groups */
    uint16_t rows, columns;          /* of an input plane */
    uint16_t out_rows, out_columns;
    uint16_t kernel_rows, kernel_columns;
    uint16_t stride_rows, stride_columns;
    uint16_t top, left;              /* zeros around the input */
    uint16_t dilation_rows, dilation_columns;
} conv_shape;

/* out += value * in, for one weight of the kernel: one multiply-add for each output that the input reaches. */
static void add_weighted(const conv_shape *s, uint32_t kernel_place, float value, const float *restrict in,
                         float *restrict out)
{
    const int32_t rows = s->rows, columns = s->columns, stride = s->stride_columns;
    /* the input row and column that the first output sees through this weight */
    const int32_t top = (int32_t)(kernel_place / s->kernel_columns) * s->dilation_rows - s->top;
    const int32_t left = (int32_t)(kernel_place % s->kernel_columns) * s->dilation_columns - s->left;
    const int32_t first = left < 0 ? (stride - 1 - left) / stride : 0;
    int32_t end = left < columns ? (columns - 1 - left) / stride + 1 : 0;
    int32_t y, x;
    if (end > s->out_columns)
        end = s->out_columns;
    for (y = 0; y < s->out_rows; y++) {
        const int32_t row = y * s->stride_rows + top;
        const int32_t from = row * columns + left;
        float *to = out + y * s->out_columns;
        if (row < 0 || row >= rows)
            continue;
        if (stride == 1)
            for (x = first; x < end; x++)
                to[x] += value * in[from + x];
        else
            for (x = first; x < end; x++)
                to[x] += value * in[from + x * stride];
    }
}

/* One output plane from all inputs. The sum is in steps; scale and shift (step size, bias, BatchNorm) come last. */
static void convolve(const conv_shape *s, weight_reader *w, uint32_t plane, const float *in, float *out, float scale,
                     float shift)
{
    const uint32_t kernel = (uint32_t)s->kernel_rows * s->kernel_columns;
    const uint32_t first = plane * s->inputs * kernel; /* of the flat indices of this plane's weights */
    const uint32_t end = first + s->inputs * kernel;
    const uint32_t in_size = (uint32_t)s->rows * s->columns, size = (uint32_t)s->out_rows * s->out_columns;
    const float *group = in + plane / s->outputs * s->inputs * in_size;
    uint32_t i;
    for (i = 0; i < size; i++)
        out[i] = 0.0f;
    while (w->place < end) {
        const uint32_t place = w->place - first;
        add_weighted(s, place % kernel, w->value, group + place / kernel * in_size, out);
        next_weight(w);
    }
    for (i = 0; i < size; i++)
        out[i] = out[i] * scale + shift;
}
"""

_POOL_SHAPE = """\
typedef struct {
    uint16_t rows, columns, out_rows, out_columns;
    uint16_t kernel_rows, kernel_columns, stride_rows, stride_columns;
    uint16_t top, left;      /* padding */
    uint16_t count_padding;  /* average_pool: whether a window's size counts what lies in the padding */
} pool_shape;
"""

_FUNCTIONS = {
    "relu": """\
static void relu(uint32_t size, const float *in, float *out)
{
    uint32_t i;
    for (i = 0; i < size; i++)
        out[i] = in[i] < 0.0f ? 0.0f : in[i];
}
""",
    "add": """\
static void add(uint32_t size, const float *a, const float *b, float *out)
{
    uint32_t i;
    for (i = 0; i < size; i++)
        out[i] = a[i] + b[i];
}
""",
    "scale_and_shift": """\
static void scale_and_shift(uint32_t size, const float *in, float *out, float scale, float shift)
{
    uint32_t i;
    for (i = 0; i < size; i++)
        out[i] = in[i] * scale + shift;
}
""",
    "mean": """\
static void mean(uint32_t size, const float *in, float *out)
{
    float sum = 0.0f;
    uint32_t i;
    for (i = 0; i < size; i++)
        sum += in[i];
    *out = sum / (float)size;
}
""",
    "average_pool": """\
static void average_pool(const pool_shape *s, const float *in, float *out)
{
    int32_t y, x, row, column;
    for (y = 0; y < s->out_rows; y++) {
        const int32_t top = y * s->stride_rows - s->top;
        /* the padding below belongs to a window, what lies beyond it does not */
        const int32_t reach = top + s->kernel_rows < s->rows + s->top ? top + s->kernel_rows : s->rows + s->top;
        const int32_t first = top > 0 ? top : 0, end = reach < s->rows ? reach : s->rows;
        for (x = 0; x < s->out_columns; x++) {
            const int32_t left = x * s->stride_columns - s->left;
            const int32_t side =
                left + s->kernel_columns < s->columns + s->left ? left + s->kernel_columns : s->columns + s->left;
            const int32_t from = left > 0 ? left : 0, to = side < s->columns ? side : s->columns;
            const int32_t count = s->count_padding ? (reach - top) * (side - left) : (end - first) * (to - from);
            float sum = 0.0f;
            for (row = first; row < end; row++)
                for (column = from; column < to; column++)
                    sum += in[row * s->columns + column];
            *out++ = sum / (float)count;
        }
    }
}
""",
    "max_pool": """\
static void max_pool(const pool_shape *s, const float *in, float *out)
{
    int32_t y, x, row, column;
    for (y = 0; y < s->out_rows; y++) {
        const int32_t top = y * s->stride_rows - s->top;
        const int32_t first = top > 0 ? top : 0;
        const int32_t end = top + s->kernel_rows < s->rows ? top + s->kernel_rows : s->rows;
        for (x = 0; x < s->out_columns; x++) {
            const int32_t left = x * s->stride_columns - s->left;
            const int32_t from = left > 0 ? left : 0;
            const int32_t to = left + s->kernel_columns < s->columns ? left + s->kernel_columns : s->columns;
            float most = in[first * s->columns + from];
            for (row = first; row < end; row++)
                for (column = from; column < to; column++)
                    if (in[row * s->columns + column] > most)
                        most = in[row * s->columns + column];
            *out++ = most;
        }
    }
}
""",
    "rearrange": """\
typedef struct {
    uint32_t offset;
    uint32_t sizes[4], strides[4];
} arrangement;

/* out[i][j][k][l] = in[offset + i * strides[0] + j * strides[1] + k * strides[2] + l * strides[3]] */
static void rearrange(const arrangement *a, const float *in, float *out)
{
    uint32_t i, j, k, l;
    for (i = 0; i < a->sizes[0]; i++)
        for (j = 0; j < a->sizes[1]; j++)
            for (k = 0; k < a->sizes[2]; k++)
                for (l = 0; l < a->sizes[3]; l++)
                    *out++ = in[a->offset + i * a->strides[0] + j * a->strides[1] + k * a->strides[2]
                                + l * a->strides[3]];
}
""",
}


def helpers(functions: Collection[str], layouts: Collection[str]) -> str:
    """Definitions of ``functions`` ("convolve" and those of the table above), and of the weights' ``layouts``."""
    parts = []
    if "convolve" in functions:
        parts += [_reader(layouts), _CONV]
    if {"average_pool", "max_pool"} & set(functions):
        parts.append(_POOL_SHAPE)
    return "\n".join([*parts, *(text for name, text in _FUNCTIONS.items() if name in functions)])


def words() -> frozenset[str]:
    """Everything that is a name in here, which a constant must not have."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", helpers([*_FUNCTIONS, "convolve"], _LAYOUTS)))


def _reader(layouts: Collection[str]) -> str:
    used = [name for name in _LAYOUTS if name in layouts]
    cases = "".join(f"    case {name}:\n        {_NEXT[name]}(w);\n        break;\n" for name in used)
    parts = [f"enum {{ {', '.join(used)} }}; /* layouts of weights */\n", _READER]
    if {"FIELDS", "BITMAP"} & set(used):
        parts.append(_BITS)
    parts += [_LAYOUTS[name] for name in used]
    parts.append(f"static void next_weight(weight_reader *w)\n{{\n    switch (w->layout) {{\n{cases}    }}\n}}\n")
    parts.append(_READ_WEIGHTS)
    return "\n".join(parts)


_READ_WEIGHTS = """\
/* At a layer's first kept weight. count: fields (FIELDS) or weights; bit: where fields or values begin. */
static weight_reader read_weights(int layout, const void *data, uint32_t count, uint32_t bits, uint32_t gap_bits,
                                  uint32_t bit)
{
    weight_reader w = {0};
    w.data = data;
    w.layout = layout;
    w.left = count;
    w.bits = bits;
    w.gap_bits = gap_bits;
    w.bit = bit;
    next_weight(&w);
    return w;
}
"""
