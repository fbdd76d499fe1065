"""What one decoded token must read: from the header of a GGUF file."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "quality"))

from gguf_numpy import Gguf  # noqa: E402  pylint: disable=wrong-import-position


class ModelBytes:
    """`weights`: bytes of weights that every token reads; `kv_values(depth)`: cached numbers."""

    def __init__(self, path):
        file = Gguf(path)
        self.context, self._layers = _layers(file.metadata)
        self.weights = sum(size for name, size in file.tensor_bytes()
                           if name != "token_embd.weight" or "output.weight" not in file)

    def kv_values(self, depth):
        return sum(2 * width * (min(depth, window) if window else depth)
                   for width, window in self._layers)


def _layers(meta):
    arch = meta["general.architecture"]

    def get(key, default=None):
        return meta.get(f"{arch}.{key}", default)

    heads = get("attention.head_count")
    width = get("attention.head_count_kv", heads) * get(
        "attention.key_length", get("embedding_length") // heads)
    window = get("attention.sliding_window", 0) if arch == "gemma3" else 0
    layers = [(width, 0 if (i + 1) % 6 == 0 else window) for i in range(get("block_count"))]
    return get("context_length"), layers
