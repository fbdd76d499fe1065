#!/usr/bin/env python3
"""Writes a GGUF file of random weights, so that every engine can run a geometry that is too large.

The default is the attention of an 8B model (32 query heads, 8 KV heads, head_dim 128, 32k context) in
four layers with a small feed-forward part. That part costs the same at every depth of context, and
what is compared is the difference between two depths. Its text is noise; its speed is real.

  bench/peers/dummy_gguf.py dummy-8b.gguf
  bench/peers/run.py dummy-8b.gguf --no-check --llama-cpp --depths 64,16384 --prefill ""
"""

import argparse
import struct
import sys

import numpy as np

BLOCK = 32
TYPES = {"Q4_0": (2, 18), "Q8_0": (8, 34), "F32": (0, 128)}  # GGUF type id, bytes of 32 values
U32, F32, STRING, ARRAY, I32 = 4, 6, 8, 9, 5
ALIGNMENT = 32


def _string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key, kind, payload):
    return _string(key) + struct.pack("<I", kind) + payload


def _number(key, value):
    if isinstance(value, float):
        return _pair(key, F32, struct.pack("<f", value))
    return _pair(key, U32, struct.pack("<I", value))


def _strings(key, values):
    head = struct.pack("<IQ", STRING, len(values))
    return _pair(key, ARRAY, head + b"".join(map(_string, values)))


def vocabulary():
    """Byte-level BPE: the 256 bytes in GPT-2's printable form, a merge of each letter pair, an end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    pairs = [(a, b) for a in "abcdefghijklmno" for b in "abcdefghijklmnopq"]
    tokens = letters + [a + b for a, b in pairs] + ["<end>"]
    kinds = [1] * (len(tokens) - 1) + [3]  # normal, control
    return tokens, kinds, [f"{a} {b}" for a, b in pairs]


def metadata(options, tokens, kinds, merges):
    heads, kv_heads = options.heads
    keys = [_pair("general.architecture", STRING, _string("llama")),
            _pair("general.name", STRING, _string("dummy")),
            _number("llama.context_length", options.context),
            _number("llama.embedding_length", options.embedding),
            _number("llama.block_count", options.layers),
            _number("llama.feed_forward_length", options.feed_forward),
            _number("llama.attention.head_count", heads),
            _number("llama.attention.head_count_kv", kv_heads),
            _number("llama.attention.key_length", options.head_dim),
            _number("llama.attention.value_length", options.head_dim),
            _number("llama.rope.dimension_count", options.head_dim),
            _number("llama.rope.freq_base", 500000.0),
            _number("llama.attention.layer_norm_rms_epsilon", 1e-5),
            _number("llama.vocab_size", len(tokens)),
            _pair("tokenizer.ggml.model", STRING, _string("gpt2")),
            _pair("tokenizer.ggml.pre", STRING, _string("gpt-2")),
            _strings("tokenizer.ggml.tokens", tokens),
            _pair("tokenizer.ggml.token_type", ARRAY,
                  struct.pack("<IQ", I32, len(kinds)) + np.array(kinds, "<i4").tobytes()),
            _strings("tokenizer.ggml.merges", merges),
            _number("tokenizer.ggml.eos_token_id", len(tokens) - 1)]
    return keys


def tensors(options, vocab):
    """(name, rows, columns, type); rows 0: a vector."""
    heads, kv_heads = options.heads
    dim, inner = options.embedding, options.feed_forward
    out = [("token_embd.weight", vocab, dim, options.type), ("output_norm.weight", 0, dim, "F32")]
    for i in range(options.layers):
        rows = {"attn_q": (heads * options.head_dim, dim), "attn_k": (kv_heads * options.head_dim, dim),
                "attn_v": (kv_heads * options.head_dim, dim),
                "attn_output": (dim, heads * options.head_dim), "ffn_gate": (inner, dim),
                "ffn_up": (inner, dim), "ffn_down": (dim, inner)}
        out += [(f"blk.{i}.{name}.weight", 0, dim, "F32") for name in ("attn_norm", "ffn_norm")]
        out += [(f"blk.{i}.{name}.weight", *shape, options.type) for name, shape in rows.items()]
    return out


def weights(rng, rows, columns, kind):
    """Raw bytes: norms are 1, everything else has a standard deviation of 1/sqrt(columns)."""
    if kind == "F32":
        return np.ones(columns, "<f4").tobytes()
    blocks = rows * columns // BLOCK
    codes = rng.integers(0, 256, (blocks, TYPES[kind][1] - 2), dtype=np.uint8)
    code_deviation = 4.6 if kind == "Q4_0" else 73.9  # of uniform codes
    scale = np.full((blocks, 1), columns**-0.5 / code_deviation, "<f2").view(np.uint8)
    return np.concatenate([scale.reshape(blocks, 2), codes], axis=1).tobytes()


def write(options, file):
    tokens, kinds, merges = vocabulary()
    keys = metadata(options, tokens, kinds, merges)
    table = tensors(options, len(tokens))
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(table), len(keys)) + b"".join(keys))
    offset = 0
    for name, rows, columns, kind in table:
        dims = [columns, rows] if rows else [columns]
        size = max(rows, 1) * columns // BLOCK * TYPES[kind][1]
        file.write(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, TYPES[kind][0],
                                               offset))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    rng = np.random.default_rng(1)
    for _, rows, columns, kind in table:
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        file.write(weights(rng, rows, columns, kind))


def _heads(text):
    heads, kv_heads = (int(word) for word in text.split("/"))
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError
    return heads, kv_heads


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0],
                                     epilog=__doc__.split("\n\n", maxsplit=1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--heads", type=_heads, default=(32, 8),
                        help="query heads / KV heads (default: 32/8)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--embedding", type=int, default=4096)
    parser.add_argument("--feed-forward", type=int, default=2048)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--type", choices=["Q4_0", "Q8_0"], default="Q4_0", help="of the weights")
    options = parser.parse_args()
    for name in ("head_dim", "embedding", "feed_forward"):
        if getattr(options, name) % BLOCK != 0:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {BLOCK}")
    with open(options.output, "wb") as file:
        write(options, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
