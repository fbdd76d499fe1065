#!/usr/bin/env python3
"""Prefill attention of kvant beside PyTorch's attention on BF16, on one GPU, in turn.

Needs PyTorch with CUDA and bench/kvant_cuda_prefill_bench. Each shape: kvant and the peers are
measured one after the other, in several rounds of alternating order; the table has medians and the
ratio of speeds within a round. PyTorch gets keys and values in BF16 as dense tensors. It has no
bottom-right causal mask for cuDNN, so history (no mask) and chunk (causal) are two calls, and the
merge of their results is NOT counted: that favours the peer.

  bench/peers/gpu_prefill.py --kvant build-cuda/bench/kvant_cuda_prefill_bench --json out.json

FlashAttention-3 is where cuDNN is 0.77 to 1.0 of it (4k self 0.77, 16k 0.86, 2048 @ 32k 0.87 to
0.90, 8192 @ 32k 0.88, 2048 @ 128k 0.92 to 1.0, 8192 @ 128k 0.90, 8 x 512 @ 16k 0.87).
"""
import argparse
import json
import statistics
import subprocess

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

SHAPES = [
    "1x2048@32768:32/8",
    "1x8192@32768:32/8",
    "1x2048@131072:32/8",
    "1x512@32768:32/8",
    "1x512@131072:32/8",
    "8x512@16384:32/8",
    "8x512@16384:64/8",
    "1x4096@4096:32/8",
    "1x16384@16384:32/8",
]


class Peer:
    """PyTorch's attention with one backend."""

    def __init__(self, backend, shape):
        counts, heads = shape.split(":")
        batch, rest = counts.split("x")
        queries, context = map(int, rest.split("@"))
        q_heads, kv_heads, *dim = map(int, heads.split("/"))
        dim = dim[0] if dim else 128
        self.backend = backend
        new = lambda h, n: torch.randn(int(batch), h, n, dim, device="cuda", dtype=torch.bfloat16)
        self.q = new(q_heads, queries)
        self.chunk = new(kv_heads, queries), new(kv_heads, queries)
        history = context - queries
        self.history = (new(kv_heads, history), new(kv_heads, history)) if history else None

    def run(self):
        with sdpa_kernel(self.backend):
            if self.history:
                attention(self.q, *self.history, enable_gqa=True)
            attention(self.q, *self.chunk, is_causal=True, enable_gqa=True)

    def check(self):
        """The causal part against float32, a few heads and rows."""
        with sdpa_kernel(self.backend):
            out = attention(self.q, *self.chunk, is_causal=True, enable_gqa=True)[0, 0, :256].float()
        q, k, v = self.q[0, 0, :256].float(), self.chunk[0][0, 0, :256].float(), self.chunk[1][0, 0, :256].float()
        scores = (q @ k.T) * q.shape[-1] ** -0.5
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        exact = scores.softmax(-1) @ v
        error = ((out - exact).norm() / exact.norm()).item()
        if not error < 1e-2:
            raise SystemExit(f"{self.backend} is wrong: relative error {error}")

    def microseconds(self, ms):
        times, total, calls = [], 0.0, 1
        while total < ms * 1e3 or len(times) < 5:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                self.run()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) * 1e3
            times.append(elapsed / calls)
            total += elapsed
            if len(times) == 2:  # several calls at a time: the device does not wait for the host
                calls = min(16, max(2, int(4000 / elapsed)))
        return statistics.median(times[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvant", required=True, help="path of kvant_cuda_prefill_bench")
    parser.add_argument("--kv", default="nvfp4,4bit", help="cache formats, e.g. nvfp4,4bit")
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ms", type=float, default=80, help="milliseconds per measurement")
    parser.add_argument("--json", help="append JSON lines to this file")
    args = parser.parse_args()
    server = subprocess.Popen([args.kvant, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = []
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"{'shape':22} {'kv':6} {'cuDNN us':>9} {'kvant us':>9} {'in turn':>8} {'images':>7} {'attn':>8} {'TFLOP/s':>8} {'ratio':>6}  spread")
    for shape in args.shapes:
        peer = Peer(SDPBackend.CUDNN_ATTENTION, shape)
        peer.check()
        peer.microseconds(20)
        for kv in args.kv.split(","):
            rounds = []
            for r in range(args.rounds):
                def ours():
                    print(shape, kv, args.ms, file=server.stdin, flush=True)
                    return json.loads(server.stdout.readline())
                theirs = lambda: peer.microseconds(args.ms)
                if r % 2:
                    b, a = theirs(), ours()
                else:
                    a, b = ours(), theirs()
                rounds.append({**a, "cudnn_us": b, "ratio": b / a["us"]})
            m = lambda key: statistics.median(x[key] for x in rounds)
            ratios = [x["ratio"] for x in rounds]
            print(f"{shape:22} {kv:6} {m('cudnn_us'):9.1f} {m('us'):9.1f} {m('in_turn_us'):8.1f} {m('images_us'):7.1f} {m('attention_us'):8.1f} "
                  f"{m('tflops'):8.1f} {m('ratio'):6.3f}  {min(ratios):.3f}-{max(ratios):.3f}", flush=True)
            lines += rounds
        del peer
        torch.cuda.empty_cache()
    server.stdin.close()
    server.wait()
    if args.json:
        with open(args.json, "a", encoding="utf-8") as out:
            for line in lines:
                out.write(json.dumps({"bench": "cuda_prefill", "device": torch.cuda.get_device_name(), **line}) + "\n")


if __name__ == "__main__":
    main()
