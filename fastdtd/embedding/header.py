"""The C header of an embedded library."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

from fastdtd.embedding.job import Compiled
from fastdtd.embedding.targets import Target
from fastdtd.errors import printable
from fastdtd.kernels.cpu import program

_CODES = {
    program.OK: "OK", program.NULL: "NULL", program.MISALIGNED: "MISALIGNED", program.BAD_TARGET: "BAD_TARGET",
    program.NOT_FINITE: "NOT_FINITE", program.NO_WEIGHTS: "NO_WEIGHTS", program.OTHER_VERSION: "OTHER_VERSION",
    program.OTHER_NETWORK: "OTHER_NETWORK", program.WRONG_SIZE: "WRONG_SIZE", program.BEYOND: "BEYOND",
    program.LOST: "LOST", program.BAD_PICTURE: "BAD_PICTURE",
}

_MAPS = """
   Each position of a channel of the output is a target of its own, of number (channel * {height} + y) * {width} + x.
"""

_TEXT = """\
/* {name}.h: a network's predictions and their explanations by deep Taylor decomposition.

   Written by fastdtd for {target}. C99 and C++.

   Input and relevance are float[{channels}][{height}][{width}], output is float{output}. Relevance and what layers
   absorbed sum to the score that is explained:

       sum of relevance + absorbed = output[target]{positive}
{maps}
   Nothing is allocated and no state is kept: any number of threads may call at once, each with a workspace of its own.
   No library is needed, neither of C nor for mathematics.

   weights     {weights}
   workspace   {workspace_bytes} bytes at a multiple of 64. Nothing in it outlives a call, nothing has to be cleared.

   All functions that return int return 0, or one of the negative codes below; {name}_error says what each means. */
#ifndef {upper}_H
#define {upper}_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_ABI_VERSION {abi}
#define {upper}_ALIGNMENT 64
#define {upper}_WORKSPACE_BYTES {workspace_bytes}u
#define {upper}_WEIGHTS_BYTES {weights_bytes}u
{compact_bytes}#define {upper}_CHANNELS {channels}
#define {upper}_HEIGHT {height}
#define {upper}_WIDTH {width}
#define {upper}_CLASSES {outputs}

enum {{
{codes}
}};

/* What the library was made as: compare it with {upper}_ABI_VERSION. */
unsigned {name}_abi_version(void);

/* The same as the constants above. */
size_t {name}_workspace_bytes(void);
size_t {name}_weights_bytes(void);
int {name}_classes(void);
void {name}_input_shape(int shape[3]);

/* UTF-8; NULL where there is no such class or classes have no names. */
const char *{name}_class_name(int index);

/* What a code means, in English. */
const char *{name}_error(int code);

/* Whether so many bytes are this network's weights, by what they begin with: the content is not read. */
int {name}_check_weights(const void *weights, size_t bytes);

/* Whether so many bytes are enough, and aligned. */
int {name}_check_workspace(const void *workspace, size_t bytes);

/* Class scores, before any softmax. */
int {name}_predict(const void *weights, const float *input, float *output, void *workspace);

/* The relevance of the input for one output; target -1: the one with the highest score. output and absorbed (one float)
   may be NULL. Input values beyond the network's bounds are clipped to them. One output held against another is the
   difference of two explanations, in relevance and in absorbed. */
int {name}_explain(const void *weights, const float *input, int target, float *output, float *relevance,
                   float *absorbed, void *workspace);
{preprocess}{unpack}
#ifdef __cplusplus
}}
#endif
#endif
"""

_PREPROCESS = """
/* The input from a picture of any size, 8 bits a channel, red first, rows row_bytes apart: resized bilinearly as Pillow
   does it ({resize}), then as the network wants its values. */
int {name}_preprocess_rgb(const unsigned char *pixels, int height, int width, int row_bytes, float *input);
"""


_UNPACK = """
/* The weights as the other functions want them, {upper}_WEIGHTS_BYTES at a multiple of 64, from the content of
   {name}.weights, as many bytes at a multiple of 64; the workspace is one as for a call. */
size_t {name}_compact_bytes(void);
int {name}_unpack(const void *compact, size_t bytes, void *weights, void *workspace);
"""


def _inputs_text(inputs: Mapping[str, Sequence[int]]) -> str:
    """Where several inputs lie in the one."""
    begins = itertools.accumulate(map(math.prod, inputs.values()), initial=0)
    parts = [f"{name} float{''.join(f'[{n}]' for n in shape)} from {begin} on"
             for (name, shape), begin in zip(inputs.items(), begins, strict=False)]
    text = printable(f"The input is several, one after the other: {', '.join(parts)}.").replace("*/", "* /")
    return "\n" + textwrap.fill(text, 116, initial_indent="   ", subsequent_indent="   ") + "\n" if inputs else ""


def header(name: str, compiled: Compiled, target: Target, is_compact: bool, resize: str) -> str:
    channels, height, width = compiled.input_shape
    upper, has_weights, shape = name.upper(), not compiled.file_bytes, compiled.output_shape
    is_of_maps = shape[1:] != (1, 1)
    weights = f"{compiled.weights_bytes} bytes at a multiple of 64, the content of {name}.weights, read or mapped"
    if has_weights:
        weights = "inside of the library: pass NULL"
    elif is_compact:
        weights = f"{compiled.weights_bytes} bytes at a multiple of 64, which {name}_unpack makes of {name}.weights"
    preprocess = _PREPROCESS.format(
        name=name, resize="the middle, as large as fits" if resize == "crop" else "stretched"
    ) if compiled.reads_pictures else ""
    codes = ",\n".join(f"    {upper}_{text} = {code}" for code, text in _CODES.items())
    return _TEXT.format(
        name=name, upper=upper, target=target.name, channels=channels, height=height, width=width,
        outputs=math.prod(shape), output="".join(f"[{n}]" for n in (shape if is_of_maps else shape[:1])),
        maps=_inputs_text(compiled.inputs) + (_MAPS.format(height=shape[1], width=shape[2]) if is_of_maps else ""),
        weights=weights,
        workspace_bytes=compiled.workspace_bytes,
        weights_bytes=0 if has_weights else compiled.weights_bytes, abi=program.ABI_VERSION, codes=codes,
        positive="" if compiled.signed_scores else "     (zero where that is not positive)",
        preprocess=preprocess, unpack=_UNPACK.format(name=name, upper=upper) if is_compact else "",
        compact_bytes=f"#define {upper}_COMPACT_BYTES {compiled.file_bytes}u\n" if is_compact else "")
