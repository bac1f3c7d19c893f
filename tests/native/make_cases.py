"""Writes decode calls for decode_test: attributes, operands, and what the reference gives for them.

`python make_cases.py FILE`. The format is that of decode_test.cc: little-endian int64 numbers and raw arrays.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from decoding import reference_of_mixed, spec_of, tape_of
from hostile_programs import operands_of

from jax_monokernel._program import program

# Every weight dtype, tied and not, windows, both kinds of query norms, ropes that depend on the length.
CASES = [
    ("windows", "bfloat16", 3),
    ("nope", "float32", 2),
    ("longrope", "float16", 5),
    ("post_norm", "float32", 2),
    ("dynamic", "float32", 8),
]
DTYPES = {"int32": b"S32 ", "int64": b"S64 ", "uint8": b"U8  ", "uint32": b"U32 ", "float16": b"F16 "}
DTYPES |= {"float32": b"F32 ", "float64": b"F64 ", "bfloat16": b"BF16"}


def write(file: BinaryIO, array: np.ndarray) -> None:
    file.write(DTYPES[array.dtype.name])
    file.write(np.array([array.ndim, *array.shape], np.int64).tobytes())
    file.write(np.ascontiguousarray(array).tobytes())


def main(path: str) -> None:
    with open(path, "wb") as file:
        file.write(np.int64(len(CASES)).tobytes())
        for name, dtype, units in CASES:
            spec = spec_of(name, dtype)
            attributes = program(spec, tape_of(spec, units).plan)
            for attribute in ("ints", "floats", "layers", "ropes", "tiles"):
                write(file, attributes[attribute])
            for operand in operands_of(spec, units):
                write(file, operand)
            want = reference_of_mixed(spec)
            write(file, np.asarray(want.tokens))
            write(file, np.asarray(want.log_probs))


if __name__ == "__main__":
    main(sys.argv[1])
