#!/usr/bin/env python3
"""A Llama geometry in plain PyTorch on one GPU: BF16 weights, static BF16 cache, CUDA graph, cuDNN attention.

The bar for `kvant bench model --device cuda` where no engine can be installed. Weights and contexts are random. A decode
step attends the whole cache, which holds exactly the context, without a mask: that favours PyTorch. A small geometry is
checked against float64 first. Prints milliseconds of a step and of a prompt; appends JSON lines with --json.

  bench/peers/gpu_model.py --batch 8 --depths 20500 --prompt 20000 --json peers.jsonl
"""
import argparse
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

GEOMETRIES = {  # layers, dim, feed-forward, query heads, KV heads, head_dim, vocabulary
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 128256),
    "llama-2-7b": (32, 4096, 11008, 32, 32, 128, 32000),
    "check": (2, 256, 512, 4, 2, 64, 512),
}


class Llama:
    def __init__(self, geometry: str, dtype=torch.bfloat16):
        (self.layers, self.dim, self.ffn, self.heads, self.kv_heads, self.head_dim, self.vocab) = GEOMETRIES[geometry]
        self.dtype = dtype
        matrix = lambda rows, cols: (torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) / math.sqrt(cols)).to(dtype)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.blocks = [dict(qkv=matrix(q + 2 * kv, self.dim), out=matrix(self.dim, q), up=matrix(2 * self.ffn, self.dim),
                            down=matrix(self.dim, self.ffn)) for _ in range(self.layers)]
        self.embedding = matrix(self.vocab, self.dim)
        self.head = matrix(self.vocab, self.dim)

    def cache(self, batch: int, tokens: int):
        """Per layer keys and values, [2][batch][kv_heads][tokens][head_dim]."""
        return [torch.randn(2, batch, self.kv_heads, tokens, self.head_dim, device="cuda", dtype=torch.bfloat16).to(self.dtype)
                for _ in range(self.layers)]

    def rope(self, positions):
        inverse = 500000.0 ** (-torch.arange(0, self.head_dim, 2, device="cuda", dtype=torch.float64) / self.head_dim)
        angles = positions.double()[:, None] * inverse
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @staticmethod
    def rotate(x, table):  # x [batch][heads][tokens][head_dim]
        cos, sin = table
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def attend(self, q, k, v, causal: bool):
        if self.dtype == torch.bfloat16:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        group = self.heads // self.kv_heads
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(self.head_dim)
        if causal:
            scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1) @ v.repeat_interleave(group, 1)

    def forward(self, ids, positions, cache, slots):
        """Logits of the last token of `ids` [batch][tokens], which are written to the cache's `slots`; with more than
        one token the cache holds nothing else."""
        batch, tokens = ids.shape
        table = self.rope(positions)
        x = self.embedding[ids]
        norm = lambda y: F.rms_norm(y, (self.dim,), eps=1e-5)
        heads = lambda y, n: y.view(batch, tokens, n, self.head_dim).transpose(1, 2)
        kv = self.kv_heads * self.head_dim
        for block, layer in zip(self.blocks, cache):
            q, k, v = F.linear(norm(x), block["qkv"]).split((self.heads * self.head_dim, kv, kv), -1)
            q, k, v = self.rotate(heads(q, self.heads), table), self.rotate(heads(k, self.kv_heads), table), heads(v, self.kv_heads)
            layer[0].index_copy_(2, slots, k)
            layer[1].index_copy_(2, slots, v)
            if tokens > 1:
                out = self.attend(q, k, v, True)
            else:
                out = self.attend(q, layer[0], layer[1], False)
            x = x + F.linear(out.transpose(1, 2).reshape(batch, tokens, -1), block["out"])
            gate, up = F.linear(norm(x), block["up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block["down"])
        return F.linear(norm(x[:, -1]), self.head)


def check() -> float:
    """Relative L2 error of a prompt's and of a step's logits against the same model in float64."""
    errors = []
    results = {}
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(1)
        model = Llama("check", dtype)
        cache = model.cache(2, 512)
        ids = torch.randint(model.vocab, (2, 256), device="cuda")
        prompt = model.forward(ids, torch.arange(256, device="cuda"), model.cache(2, 256), torch.arange(256, device="cuda"))
        place = torch.tensor([511], device="cuda")
        results[dtype] = prompt.double(), model.forward(ids[:, :1], place, cache, place).double()
    for exact, found in zip(results[torch.float64], results[torch.bfloat16]):
        errors.append(((found - exact).norm() / exact.norm()).item())
    return max(errors)


def time_step(model: Llama, batch: int, depth: int) -> float:
    """Milliseconds of a step that decodes a token of each sequence, the sampled ids on the host included."""
    cache = model.cache(batch, depth)
    ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    place = torch.tensor([depth - 1], device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model.forward(ids, place, cache, place)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            ids.copy_(model.forward(ids, place, cache, place).argmax(-1, keepdim=True))
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            graph.replay()
            ids.cpu()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[3:])


def time_prompt(model: Llama, tokens: int) -> float:
    """Milliseconds of one prompt into an empty cache."""
    cache = model.cache(1, tokens)
    ids = torch.randint(model.vocab, (1, tokens), device="cuda")
    positions = torch.arange(tokens, device="cuda")
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.forward(ids, positions, cache, positions).argmax(-1).cpu()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=[name for name in GEOMETRIES if name != "check"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--depths", default="256,8192,32768,65536,125000")
    parser.add_argument("--prompt", type=int, default=0, help="also time a prompt of so many tokens")
    parser.add_argument("--json", help="append a line per figure to this file")
    args = parser.parse_args()
    lines = []
    with torch.inference_mode():
        error = check()
        if not error < 3e-2:
            sys.exit(f"error: PyTorch's answer is wrong here: relative L2 error {error:.1e}, expected below 3e-2")
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: relative L2 error {error:.1e}", flush=True)
        model = Llama(args.model)
        for depth in (int(x) for x in args.depths.split(",") if x):
            ms = time_step(model, args.batch, depth)
            print(f"{args.batch} x {depth}: {ms:.2f} ms a step, {args.batch * 1e3 / ms:.0f} tokens/s", flush=True)
            lines.append({"step": "decode", "batch": args.batch, "depth": depth, "ms": ms})
            torch.cuda.empty_cache()
        if args.prompt:
            ms = time_prompt(model, args.prompt)
            print(f"prompt of {args.prompt}: {ms:.1f} ms, {args.prompt * 1e3 / ms:.0f} tokens/s", flush=True)
            lines.append({"step": "prompt", "batch": 1, "depth": args.prompt, "ms": ms})
    if args.json:
        with open(args.json, "a", encoding="utf-8") as out:
            for line in lines:
                out.write(json.dumps({"bench": "torch_model", "device": torch.cuda.get_device_name(), "model": args.model,
                                      "weights": "bf16", "kv": "bf16", **line}) + "\n")


if __name__ == "__main__":
    main()
