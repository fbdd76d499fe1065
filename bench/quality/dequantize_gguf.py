#!/usr/bin/env python3
"""Writes a GGUF file with the same model in float32 weights: the file that engines are compared on.

Both engines then multiply by the same exact weights, so that what is left between them is the cache.
Metadata stay as they are, except general.file_type, which becomes 0 (all float32). Needs numpy.

  bench/quality/dequantize_gguf.py model.Q4_1.gguf model.F32.gguf
"""

import argparse
import os
import struct

from gguf_numpy import Gguf

F32 = 0


def tensor_table(source):
    """The tensor table of the new file."""
    table, offset = bytearray(), 0
    for name, dims in source.tensor_dims():
        encoded = name.encode()
        table += struct.pack("<Q", len(encoded)) + encoded
        table += struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", F32, offset)
        size = 4
        for dim in dims:
            size *= dim
        offset += padded(size, source.alignment)
    return table


def padded(size, alignment):
    return -(-size // alignment) * alignment


def dequantize(source_path, target_path):
    source = Gguf(source_path)
    head = source.head()
    if "general.file_type" in source.value_at:
        struct.pack_into("<I", head, source.value_at["general.file_type"], 0)
    unfinished = target_path + ".part"
    with open(unfinished, "wb") as out:
        out.write(head + tensor_table(source))
        out.write(bytes(padded(out.tell(), source.alignment) - out.tell()))
        for name, _ in source.tensor_dims():
            values = source.tensor(name).astype("<f4", copy=False).tobytes()
            out.write(values + bytes(padded(len(values), source.alignment) - len(values)))
    os.replace(unfinished, target_path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    args = parser.parse_args()
    dequantize(args.source, args.target)


if __name__ == "__main__":
    main()
