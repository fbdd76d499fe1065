#!/usr/bin/env python3
"""Times PyTorch's attention (BF16, contiguous cache) on decode shapes: the BF16 bar for kvant_cuda_decode_bench.

Usage: gpu_decode.py [--heads Q/KV] [--head-dim D] [--shape BxL,...] [--backends cudnn,flash] [--replays N] [--json FILE]

Needs PyTorch with CUDA. Answers are checked against float64 on a small shape first. Times are medians of 13 replays of a
CUDA graph over several copies of the cache, which do not fit L2, as in the benchmark beside it. A replay takes about 8 ms:
with hundreds of them the median is that of a card that has reached its power limit.
"""
import argparse
import json
import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def attend(backend: str, q, k, v):
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def check(backend: str, query_heads: int, kv_heads: int, head_dim: int) -> float:
    """Relative L2 error on 2 sequences of 4096 tokens."""
    q = torch.randn(2, query_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, kv_heads, 4096, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    group = query_heads // kv_heads
    k64, v64 = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k64.transpose(2, 3)) / math.sqrt(head_dim)
    exact = torch.softmax(scores, -1) @ v64
    return ((attend(backend, q, k, v).double() - exact).norm() / exact.norm()).item()


def random_caches(batch: int, length: int, kv_heads: int, head_dim: int) -> list:
    """Copies of keys and values, [2][batch][kv_heads][length][head_dim] each, that exceed L2 several times together."""
    bytes_of_copy = 4 * batch * kv_heads * length * head_dim
    copies = max(2, min(24, -(-600_000_000 // bytes_of_copy)))
    return [torch.randn(2, batch, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(copies)]


def time_calls(backend: str, q, caches: list, replays: int) -> float:
    """Microseconds of a call."""
    torch.cuda.synchronize()  # the caches are random numbers of another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for cache in caches:
            attend(backend, q, cache[0], cache[1])
        stream.synchronize()
        bytes_of_all = 2 * sum(cache.numel() for cache in caches)
        calls = len(caches) * max(1, int(8e-3 / (bytes_of_all / 2.9e12)))  # about 8 ms a replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                attend(backend, q, *caches[i % len(caches)])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for replay in range(2 + replays):
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if replay >= 2:
                times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="32/8")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shape", default="1x32768,1x131072,8x32768,32x8192,64x4096,16x32768,1x1048576")
    parser.add_argument("--backends", default="cudnn,flash", help="of PyTorch's attention: cudnn, flash")
    parser.add_argument("--replays", type=int, default=13)
    parser.add_argument("--json", help="append a line per shape and backend to this file")
    args = parser.parse_args()
    query_heads, kv_heads = (int(x) for x in args.heads.split("/"))
    backends = args.backends.split(",")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    for backend in backends:
        error = check(backend, query_heads, kv_heads, args.head_dim)
        if not error < 1e-2:
            sys.exit(f"error: {backend}'s answer is wrong here: relative L2 error {error:.1e}, expected below 1e-2")
        print(f"{backend}: relative L2 error {error:.1e}")
    for shape in args.shape.split(","):
        batch, length = (int(x) for x in shape.split("x"))
        for backend in backends:
            try:
                q = torch.randn(batch, query_heads, 1, args.head_dim, device="cuda", dtype=torch.bfloat16)
                us = time_calls(backend, q, random_caches(batch, length, kv_heads, args.head_dim),
                                args.replays)
            except RuntimeError as problem:  # a shape it cannot run, e.g. out of memory
                print(f"{shape:>12} {backend:<6} not run: {str(problem).splitlines()[0]}", flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
            print(f"{shape:>12} {backend:<6} {us:9.2f} us", flush=True)
            if args.json:
                with open(args.json, "a", encoding="utf-8") as out:
                    out.write(json.dumps({"bench": "torch_sdpa", "backend": backend, "kv": "bf16",
                                          "device": torch.cuda.get_device_name(), "heads": args.heads,
                                          "head_dim": args.head_dim, "shape": shape, "us": round(us, 3)}) + "\n")


if __name__ == "__main__":
    main()
