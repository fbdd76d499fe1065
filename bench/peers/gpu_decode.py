#!/usr/bin/env python3
"""Times PyTorch's attention (cuDNN, BF16, contiguous cache) on decode shapes: the BF16 bar for kvant_cuda_decode_bench.

Usage: gpu_decode.py [--heads Q/KV] [--head-dim D] [--shape BxL,...] [--json FILE]

Needs PyTorch with CUDA. The answer is checked against float64 on a small shape first. Times are medians of 13 replays of
a CUDA graph over several copies of the cache, as in the benchmark beside it.
"""
import argparse
import json
import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend(q, k, v):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def check(query_heads: int, kv_heads: int, head_dim: int) -> float:
    """Relative L2 error on 2 sequences of 4096 tokens."""
    q = torch.randn(2, query_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, kv_heads, 4096, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    group = query_heads // kv_heads
    k64, v64 = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k64.transpose(2, 3)) / math.sqrt(head_dim)
    exact = torch.softmax(scores, -1) @ v64
    return ((attend(q, k, v).double() - exact).norm() / exact.norm()).item()


def time_shape(batch: int, length: int, query_heads: int, kv_heads: int, head_dim: int) -> float:
    """Microseconds of a call."""
    bytes_of_copy = 4 * batch * kv_heads * length * head_dim
    copies = max(2, min(24, -(-600_000_000 // bytes_of_copy)))
    q = torch.randn(batch, query_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    caches = [torch.randn(2, batch, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16)
              for _ in range(copies)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for cache in caches:
            attend(q, cache[0], cache[1])
        stream.synchronize()
        calls = copies * max(1, int(8e-3 / (bytes_of_copy / 2.9e12) / copies))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                attend(q, caches[i % copies][0], caches[i % copies][1])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for replay in range(15):
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
    parser.add_argument("--json", help="append a line per shape to this file")
    args = parser.parse_args()
    query_heads, kv_heads = (int(x) for x in args.heads.split("/"))
    error = check(query_heads, kv_heads, args.head_dim)
    if not error < 1e-2:
        sys.exit(f"error: PyTorch's answer is wrong here: relative L2 error {error:.1e}, expected below 1e-2")
    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}: relative L2 error {error:.1e}")
    for shape in args.shape.split(","):
        batch, length = (int(x) for x in shape.split("x"))
        try:
            us = time_shape(batch, length, query_heads, kv_heads, args.head_dim)
        except RuntimeError as problem:  # a shape it cannot run, e.g. out of memory
            print(f"{shape:>12} not run: {str(problem).splitlines()[0]}")
            torch.cuda.empty_cache()
            continue
        print(f"{shape:>12} {us:9.2f} us")
        torch.cuda.empty_cache()
        if args.json:
            with open(args.json, "a", encoding="utf-8") as out:
                out.write(json.dumps({"bench": "torch_sdpa_cudnn", "device": torch.cuda.get_device_name(), "kv": "bf16",
                                      "heads": args.heads, "head_dim": args.head_dim, "shape": shape,
                                      "us": round(us, 3)}) + "\n")


if __name__ == "__main__":
    main()
