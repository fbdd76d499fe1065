#!/usr/bin/env python3
"""Writes tiny models of every architecture (<arch>.gguf) and their logits (<arch>.json).

The forward pass below is an independent float64 implementation in numpy: no code is shared with kvant.
It follows the published definitions and the conventions of GGUF files (rows of llama's Q and K in the
order of adjacent RoPE pairs). The files are deterministic; made with numpy 2.4.6:

    python3 tests/golden/models/make_models.py

Each JSON has `prompt` (token ids), `positions` and, for each of them, `logits` [vocab].
"""

import json
import math
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
VOCAB = 96
PROMPT_LENGTH = 40
POSITIONS = [0, 1, 17, 38, 39]


# ---- weights in the types of GGUF files: encode to bytes, and what the bytes mean ----

def encode(values, kind):
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == F32:
        return values.tobytes(), values.astype(np.float64)
    if kind == F16:
        half = values.astype(np.float16)
        return half.tobytes(), half.astype(np.float64)
    if kind == BF16:
        bits = values.view(np.uint32)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert kind == Q8_0 and values.shape[-1] % 32 == 0
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    divide = np.where(scale == 0, 1, scale).astype(np.float64)[:, None]
    codes = np.clip(np.rint(blocks / divide), -127, 127).astype(np.int8)
    data = b"".join(s.tobytes() + c.tobytes() for s, c in zip(scale, codes))
    return data, (codes * scale.astype(np.float64)[:, None]).reshape(values.shape)


class Gguf:
    def __init__(self, arch):
        self.arch, self.entries, self.tensors, self.weights = arch, [], [], {}
        self.text("general.architecture", arch)
        self.text("general.name", f"tiny {arch}")
        self.text("tokenizer.ggml.model", "no_vocab")

    def text(self, key, value):
        raw = value.encode()
        self.entries.append((key, 8, struct.pack("<Q", len(raw)) + raw))

    def u32(self, key, value):
        self.entries.append((f"{self.arch}.{key}", 4, struct.pack("<I", value)))

    def f32(self, key, value):
        self.entries.append((f"{self.arch}.{key}", 6, struct.pack("<f", value)))

    def string(self, key, value):
        self.text(f"{self.arch}.{key}", value)

    def tensor(self, name, values, kind):
        data, meaning = encode(values, kind)
        self.tensors.append((name, values.shape[::-1], kind, data))
        self.weights[name] = meaning

    def write(self, path):
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        for key, kind, data in self.entries:
            head += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + data
        body = b""
        for name, dims, kind, data in self.tensors:
            body += b"\0" * (-len(body) % 32)
            head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
            head += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, len(body))
            body += data
        path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


# ---- the models ----

class Shape:
    """Geometry and options; one instance per architecture."""

    def __init__(self, arch, **options):
        self.arch = arch
        self.layers, self.dim, self.heads, self.kv_heads = 3, 64, 4, 2
        self.head_dim, self.ffn, self.epsilon, self.base = 16, 96, 1e-5, 10000.0
        self.bias = self.qk_norm = self.post_norms = self.tied = self.adjacent = False
        self.window = self.pattern = self.experts = self.experts_used = self.expert_dim = 0
        self.local_base = self.linear = self.yarn = self.factors = None
        self.embedding_scale, self.activation = 1.0, "silu"
        self.__dict__.update(options)


def shapes():
    return [
        Shape("llama", adjacent=True, factors=[1, 1, 1, 1.5, 2.5, 4, 8, 8]),
        Shape("qwen2", bias=True, tied=True, epsilon=1e-6, base=1e6, yarn=(4.0, 16)),
        Shape("qwen3", qk_norm=True, heads=6, head_dim=32, epsilon=1e-6, base=1e6),
        Shape("gemma3", qk_norm=True, post_norms=True, tied=True, window=8, pattern=3, epsilon=1e-6,
              layers=4, kv_heads=1, head_dim=32, base=1e6, local_base=1e4, linear=8.0,
              embedding_scale=8.0, activation="gelu"),
        Shape("qwen3moe", qk_norm=True, head_dim=32, epsilon=1e-6, base=1e6, experts=6,
              experts_used=2, expert_dim=32),
    ]


def build(shape, random):
    """The file, with random weights that keep activations of order one."""
    file = Gguf(shape.arch)
    file.u32("block_count", shape.layers)
    file.u32("context_length", 256)
    file.u32("embedding_length", shape.dim)
    file.u32("feed_forward_length", shape.ffn)
    file.u32("attention.head_count", shape.heads)
    file.u32("attention.head_count_kv", shape.kv_heads)
    file.u32("attention.key_length", shape.head_dim)
    file.u32("attention.value_length", shape.head_dim)
    file.u32("rope.dimension_count", shape.head_dim)
    file.u32("vocab_size", VOCAB)
    file.f32("attention.layer_norm_rms_epsilon", shape.epsilon)
    file.f32("rope.freq_base", shape.base)
    if shape.window:
        file.u32("attention.sliding_window", shape.window)
        file.u32("attention.sliding_window_pattern", shape.pattern)
    if shape.linear:
        file.string("rope.scaling.type", "linear")
        file.f32("rope.scaling.factor", shape.linear)
    if shape.yarn:
        file.string("rope.scaling.type", "yarn")
        file.f32("rope.scaling.factor", shape.yarn[0])
        file.u32("rope.scaling.original_context_length", shape.yarn[1])
    if shape.experts:
        file.u32("expert_count", shape.experts)
        file.u32("expert_used_count", shape.experts_used)
        file.u32("expert_feed_forward_length", shape.expert_dim)

    def normal(*dims, scale=None):
        return random.standard_normal(dims) * (scale or dims[-1] ** -0.5)

    def norm(name, size):
        file.tensor(name, 1 + 0.2 * random.standard_normal(size), F32)

    file.tensor("token_embd.weight", normal(VOCAB, shape.dim, scale=1 / shape.embedding_scale), Q8_0)
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        p = f"blk.{i}."
        norm(p + "attn_norm.weight", shape.dim)
        file.tensor(p + "attn_q.weight", normal(q_width, shape.dim) * 1.5, Q8_0)
        file.tensor(p + "attn_k.weight", normal(kv_width, shape.dim) * 1.5, Q8_0)
        file.tensor(p + "attn_v.weight", normal(kv_width, shape.dim), F16)
        file.tensor(p + "attn_output.weight", normal(shape.dim, q_width), BF16)
        if shape.bias:
            file.tensor(p + "attn_q.bias", normal(q_width, scale=0.5), F32)
            file.tensor(p + "attn_k.bias", normal(kv_width, scale=2.0), F32)
            file.tensor(p + "attn_v.bias", normal(kv_width, scale=0.5), F32)
        if shape.qk_norm:
            norm(p + "attn_q_norm.weight", shape.head_dim)
            norm(p + "attn_k_norm.weight", shape.head_dim)
        if shape.post_norms:
            norm(p + "post_attention_norm.weight", shape.dim)
        norm(p + "ffn_norm.weight", shape.dim)
        if shape.experts:
            n, width = shape.experts, shape.expert_dim
            file.tensor(p + "ffn_gate_inp.weight", normal(n, shape.dim) * 2, F32)
            file.tensor(p + "ffn_gate_exps.weight", normal(n, width, shape.dim), Q8_0)
            file.tensor(p + "ffn_up_exps.weight", normal(n, width, shape.dim), Q8_0)
            file.tensor(p + "ffn_down_exps.weight", normal(n, shape.dim, width), Q8_0)
        else:
            file.tensor(p + "ffn_gate.weight", normal(shape.ffn, shape.dim), Q8_0)
            file.tensor(p + "ffn_up.weight", normal(shape.ffn, shape.dim), BF16)
            file.tensor(p + "ffn_down.weight", normal(shape.dim, shape.ffn), Q8_0)
        if shape.post_norms:
            norm(p + "post_ffw_norm.weight", shape.dim)
    norm("output_norm.weight", shape.dim)
    if not shape.tied:
        file.tensor("output.weight", normal(VOCAB, shape.dim) * 2, Q8_0)
    if shape.factors:
        file.tensor("rope_freqs.weight", np.array(shape.factors), F32)
    return file


# ---- the forward pass, float64 ----

def rms(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def activation(x, kind):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def frequencies(shape, local):
    """Angle per position of each pair, and the factor on sine and cosine."""
    pairs = np.arange(shape.head_dim // 2)
    base = shape.local_base if local else shape.base
    frequency = base ** (-2.0 * pairs / shape.head_dim)
    if local:
        return frequency, 1.0
    if shape.linear:
        return frequency / shape.linear, 1.0
    if shape.factors:
        return frequency / np.array(shape.factors), 1.0
    if shape.yarn:
        factor, original = shape.yarn
        edge = lambda turns: (shape.head_dim * math.log(original / (turns * 2 * math.pi))
                              / (2 * math.log(base)))
        low = max(0, math.floor(edge(32)))
        high = min(shape.head_dim - 1, math.ceil(edge(1)))
        keep = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
        return frequency * keep + frequency / factor * (1 - keep), 1 + 0.1 * math.log(factor)
    return frequency, 1.0


def rotate(x, shape, local):
    """x [tokens][heads][head_dim], rotated by the token's position."""
    frequency, magnitude = frequencies(shape, local)
    angle = np.arange(x.shape[0])[:, None, None] * frequency
    turn = magnitude * np.exp(1j * angle)
    half = shape.head_dim // 2
    if shape.adjacent:
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
    else:
        pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * turn
    out = np.empty_like(x)
    if shape.adjacent:
        out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
    else:
        out[..., :half], out[..., half:] = pairs.real, pairs.imag
    return out


def attention(x, w, p, shape, window):
    tokens = x.shape[0]
    q, k, v = (x @ w[p + f"attn_{n}.weight"].T + w.get(p + f"attn_{n}.bias", 0) for n in "qkv")
    q, k, v = (a.reshape(tokens, -1, shape.head_dim) for a in (q, k, v))
    if shape.qk_norm:
        q = rms(q, w[p + "attn_q_norm.weight"], shape.epsilon)
        k = rms(k, w[p + "attn_k_norm.weight"], shape.epsilon)
    local = bool(window) and shape.local_base is not None
    q, k = rotate(q, shape, local), rotate(k, shape, local)
    group = shape.heads // shape.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    score = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(shape.head_dim)
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    visible = (j <= i) & ((j > i - window) if window else True)
    score = np.where(visible, score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    out = np.einsum("hij,jhd->ihd", weight, v).reshape(tokens, -1)
    return out @ w[p + "attn_output.weight"].T


def feed_forward(x, w, p, shape):
    if not shape.experts:
        gate = activation(x @ w[p + "ffn_gate.weight"].T, shape.activation)
        return (gate * (x @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
    logits = x @ w[p + "ffn_gate_inp.weight"].T
    chance = np.exp(logits - logits.max(axis=1, keepdims=True))
    out = np.zeros_like(x)
    for t in range(x.shape[0]):
        chosen = np.argsort(-chance[t], kind="stable")[: shape.experts_used]
        for e in chosen:
            gate = activation(w[p + "ffn_gate_exps.weight"][e] @ x[t], shape.activation)
            hidden = gate * (w[p + "ffn_up_exps.weight"][e] @ x[t])
            share = chance[t, e] / chance[t, chosen].sum()
            out[t] += share * (w[p + "ffn_down_exps.weight"][e] @ hidden)
    return out


def forward(file, shape, prompt):
    w = file.weights
    x = w["token_embd.weight"][prompt] * shape.embedding_scale
    for i in range(shape.layers):
        p = f"blk.{i}."
        window = shape.window if shape.window and (i + 1) % shape.pattern else 0
        y = attention(rms(x, w[p + "attn_norm.weight"], shape.epsilon), w, p, shape, window)
        if shape.post_norms:
            y = rms(y, w[p + "post_attention_norm.weight"], shape.epsilon)
        x = x + y
        y = feed_forward(rms(x, w[p + "ffn_norm.weight"], shape.epsilon), w, p, shape)
        if shape.post_norms:
            y = rms(y, w[p + "post_ffw_norm.weight"], shape.epsilon)
        x = x + y
    x = rms(x, w["output_norm.weight"], shape.epsilon)
    return x @ w["token_embd.weight" if shape.tied else "output.weight"].T


def main():
    for index, shape in enumerate(shapes()):
        random = np.random.default_rng(1000 + index)
        file = build(shape, random)
        prompt = random.integers(0, VOCAB, PROMPT_LENGTH)
        logits = forward(file, shape, prompt)
        file.write(HERE / f"{shape.arch}.gguf")
        rows = [[float(f"{value:.8g}") for value in logits[at]] for at in POSITIONS]
        golden = {"prompt": prompt.tolist(), "positions": POSITIONS, "logits": rows}
        (HERE / f"{shape.arch}.json").write_text(json.dumps(golden) + "\n")
        print(f"{shape.arch}: {(HERE / f'{shape.arch}.gguf').stat().st_size} bytes, logits "
              f"std {logits.std():.2f}")


if __name__ == "__main__":
    main()
