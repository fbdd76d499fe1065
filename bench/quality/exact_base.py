#!/usr/bin/env python3
"""Writes the exact base of a model: the logits that every engine's quantised arithmetic approximates.

Dequantises the weights of a GGUF file to float32, runs a plain float32 forward pass with an
unquantised cache (numpy only) in the chunks of llama.cpp's perplexity tool, and writes that tool's
logits file, which `kvant eval --kl-base` and `llama-perplexity --kl-divergence-base` both read.

  build/kvant tokenize MODEL < wiki.txt > ids.json
  bench/quality/exact_base.py MODEL --ids ids.json --ctx 512 --chunks 16 -o base.kld
  build/kvant eval MODEL --kv bf16 --text wiki.txt --chunks 16 --kl-base base.kld

Architectures: llama, qwen2, gemma3.
"""

import argparse
import json
import struct
import sys
import time

import numpy as np

from gguf_numpy import Gguf


def rms_norm(x, weight, epsilon):
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + epsilon)).astype(np.float32) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x)))


class Model:
    """One forward pass over a whole chunk; no cache, since every chunk starts afresh."""

    def __init__(self, path):
        self.file = Gguf(path)
        meta = self.file.metadata
        self.arch = meta["general.architecture"]
        if self.arch not in ("llama", "qwen2", "gemma3"):
            raise ValueError(f"architecture {self.arch} is not supported (llama, qwen2, gemma3 are)")

        def get(key, default=None):
            value = meta.get(f"{self.arch}.{key}", default)
            if value is None:
                raise ValueError(f"the file lacks the key {self.arch}.{key}")
            return value

        self.num_layers = get("block_count")
        self.dim = get("embedding_length")
        self.num_heads = get("attention.head_count")
        self.num_kv_heads = get("attention.head_count_kv", self.num_heads)
        self.head_dim = get("attention.key_length", self.dim // self.num_heads)
        self.epsilon = get("attention.layer_norm_rms_epsilon")
        self.rope_base = get("rope.freq_base", 10000.0)
        self.window = get("attention.sliding_window", 0) if self.arch == "gemma3" else 0
        self.scale = np.float32(self.head_dim ** -0.5)
        self.activation = gelu_tanh if self.arch == "gemma3" else silu
        self.embeddings = self.file.tensor("token_embd.weight")
        self.output = (self.file.tensor("output.weight") if "output.weight" in self.file
                       else self.embeddings)
        self.output_norm = self.file.tensor("output_norm.weight")
        self.layers = [self._layer(i) for i in range(self.num_layers)]
        add_bos = meta.get("tokenizer.ggml.add_bos_token",
                           meta.get("tokenizer.ggml.model") == "llama")
        self.bos = meta["tokenizer.ggml.bos_token_id"] if add_bos else None

    def _layer(self, index):
        names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate",
                 "ffn_up", "ffn_down", "attn_q_norm", "attn_k_norm", "post_attention_norm",
                 "post_ffw_norm")
        layer = {}
        for name in names:
            for kind in ("weight", "bias"):
                full = f"blk.{index}.{name}.{kind}"
                if full in self.file:
                    layer[name if kind == "weight" else name + "_bias"] = self.file.tensor(full)
        return layer

    def _is_local(self, index):
        return self.window > 0 and (index + 1) % 6 != 0  # gemma3: five local layers, one global

    def _rope(self, x, index):
        """x [heads, tokens, head_dim]; llama files store rotary pairs side by side."""
        base = 10000.0 if self._is_local(index) else self.rope_base
        half = self.head_dim // 2
        angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        if self.arch == "llama":
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x[..., :half], x[..., half:]
        # The order inside a rotated head no longer matters: q and k share it.
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _heads(self, layer, x, which, num_heads):
        y = x @ layer["attn_" + which].T
        if f"attn_{which}_bias" in layer:
            y += layer[f"attn_{which}_bias"]
        y = y.reshape(len(x), num_heads, self.head_dim)
        if f"attn_{which}_norm" in layer:
            y = rms_norm(y, layer[f"attn_{which}_norm"], self.epsilon)
        return y.transpose(1, 0, 2)

    def _attention(self, index, layer, x):
        tokens = len(x)
        q = self._rope(self._heads(layer, x, "q", self.num_heads), index)
        k = self._rope(self._heads(layer, x, "k", self.num_kv_heads), index)
        v = self._heads(layer, x, "v", self.num_kv_heads)
        distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
        visible = distance >= 0
        if self._is_local(index):
            visible &= distance < self.window
        out = np.empty_like(q)
        group = self.num_heads // self.num_kv_heads
        for head in range(self.num_heads):
            scores = (q[head] @ k[head // group].T) * self.scale
            scores[~visible] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[head] = (weights @ v[head // group]) / weights.sum(axis=1, keepdims=True)
        return out.transpose(1, 0, 2).reshape(tokens, -1) @ layer["attn_output"].T

    def hidden(self, ids):
        """Normalised final hidden states [tokens, dim] of one chunk."""
        x = self.embeddings[ids]
        if self.arch == "gemma3":
            x = x * np.float32(np.sqrt(self.dim))
        for index, layer in enumerate(self.layers):
            y = self._attention(index, layer, rms_norm(x, layer["attn_norm"], self.epsilon))
            if "post_attention_norm" in layer:
                y = rms_norm(y, layer["post_attention_norm"], self.epsilon)
            x = x + y
            h = rms_norm(x, layer["ffn_norm"], self.epsilon)
            y = (self.activation(h @ layer["ffn_gate"].T) * (h @ layer["ffn_up"].T)) @ layer[
                "ffn_down"].T
            if "post_ffw_norm" in layer:
                y = rms_norm(y, layer["post_ffw_norm"], self.epsilon)
            x = x + y
        return rms_norm(x, self.output_norm, self.epsilon)


def pack_log_probs(logits):
    """Rows as the logits file holds them: f32 scale, f32 minimum, then one uint16 a token."""
    top = logits.max(axis=1)
    low = np.maximum(logits.min(axis=1), top - 16)
    log_sum = np.log(np.exp((logits - top[:, None]).astype(np.float64)).sum(axis=1))
    scale = ((top - low) / np.float32(65535)).astype(np.float32)
    minimum = (low - top - log_sum).astype(np.float32)
    steps = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(np.maximum(logits - low[:, None], 0) * steps[:, None])
    rows, vocab = logits.shape
    packed = np.zeros((rows, 4 + vocab + vocab % 2), np.uint16)
    packed[:, 0:2] = scale[:, None].view(np.uint16)
    packed[:, 2:4] = minimum[:, None].view(np.uint16)
    packed[:, 4:4 + vocab] = np.minimum(codes, 65535).astype(np.uint16)
    return packed, top + log_sum


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ids", required=True,
                        help="JSON array of the text's token ids, as `kvant tokenize` prints it")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=0, help="0: as many as the text fills")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()

    model = Model(args.model)
    with open(args.ids, encoding="utf-8") as file:
        ids = np.array(json.load(file), np.int32)
    if model.bos is not None and (len(ids) == 0 or ids[0] != model.bos):
        ids = np.concatenate([[np.int32(model.bos)], ids])
    chunks = len(ids) // args.ctx
    if args.chunks > 0:
        chunks = min(chunks, args.chunks)
    if chunks == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one chunk of {args.ctx}")
    ids = ids[:chunks * args.ctx]
    first = args.ctx // 2
    total, count = 0.0, 0
    start = time.monotonic()
    with open(args.output, "wb") as out:
        out.write(b"_logits_" + struct.pack("<iii", args.ctx, len(model.output), chunks))
        out.write(ids.astype("<i4").tobytes())
        for chunk in range(chunks):
            tokens = ids[chunk * args.ctx:(chunk + 1) * args.ctx].copy()
            targets = tokens[first + 1:].copy()
            if model.bos is not None:
                tokens[0] = model.bos
            hidden = model.hidden(tokens)[first:args.ctx - 1]
            for row in range(0, len(hidden), 64):       # bounds memory for large vocabularies
                logits = hidden[row:row + 64] @ model.output.T
                packed, log_sum = pack_log_probs(logits)
                out.write(packed.tobytes())
                wanted = targets[row:row + 64]
                total += float(np.sum(log_sum - logits[np.arange(len(wanted)), wanted]))
                count += len(wanted)
            left = (time.monotonic() - start) / (chunk + 1) * (chunks - chunk - 1)
            print(f"chunk {chunk + 1}/{chunks}: ppl {np.exp(total / count):.4f}, {left:.0f} s left",
                  file=sys.stderr, flush=True)
    print(json.dumps({"ctx": args.ctx, "chunks": chunks, "nll": total / count,
                      "ppl": float(np.exp(total / count))}))


if __name__ == "__main__":
    main()
