#!/usr/bin/env python3
"""Runs kvant and other engines on the same model file, in turn, and prints ratios of times.

First every engine's perplexity on the same text is compared: an engine that answers wrongly is
reported and its prefill is left out. Then decoding at two depths of context and prefill are timed,
round after round, all engines and cache types in each round, so that a disturbance meets them all.
A ratio is formed within a round; the table has the median and the extremes over rounds. Where a
difference of kvant's is not positive in some round: the ratio of the medians and 90 % of what
resampled rounds give.

  bench/peers/run.py model.gguf --text wiki.txt --llama-cpp \\
      --peer "ik_llama.cpp=$HOME/ik_llama.cpp/build/bin/llama-bench" --json peers.json

Needs numpy; --llama-cpp needs the package llama-cpp-python, built on this machine.
"""

import argparse
import json
import os
import platform
import sys
import time

import engines
import report
from model_bytes import ModelBytes

WRONG_FROM = 1.05  # perplexity ratio to kvant's bf16 cache from which an engine counts as wrong
SCHEMA_VERSION = 1


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0],
                                     epilog=__doc__.split("\n\n", maxsplit=1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--kvant", default=os.path.normpath(os.path.join(root, "build", "kvant")),
                        help="the kvant program (default: build/kvant)")
    parser.add_argument("--kv", default="4bit", help="cache formats of kvant, separated by blanks; "
                        "peers are compared with the first (default: 4bit)", type=str.split)
    parser.add_argument("--llama-cpp", action="store_true",
                        help="compare with llama.cpp through llama-cpp-python")
    parser.add_argument("--python", help="the Python that has llama-cpp-python (default: this one)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PROGRAM [ARGS]",
                        help="compare with a program that takes llama-bench's options; may repeat")
    parser.add_argument("--cache-types", default="f16,q8_0,q4_0",
                        help="of the peers, keys and values alike (default: f16,q8_0,q4_0)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-n", "--decode-tokens", type=int, default=32)
    parser.add_argument("-d", "--depths", default="64,8192",
                        help="two depths of context for decoding; empty: none (default: 64,8192)")
    parser.add_argument("-p", "--prefill", default="512,4096",
                        help="prompt lengths; empty: none (default: 512,4096)")
    parser.add_argument("--text", help="text file for the perplexity check")
    parser.add_argument("--no-check", action="store_true",
                        help="no perplexity check: for files of random weights")
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens, for the check")
    parser.add_argument("--json", metavar="FILE", help="write all samples and results here")
    options = parser.parse_args(arguments)
    options.depths = _numbers(parser, options.depths)
    options.prefill = _numbers(parser, options.prefill)
    options.cache_types = options.cache_types.split(",")
    if len(options.depths) not in (0, 2):
        parser.error("--depths: give two, or an empty string")
    if bool(options.text) == options.no_check:
        parser.error("give --text FILE for the perplexity check, or --no-check")
    if not options.llama_cpp and not options.peer:
        parser.error("no peer: give --llama-cpp, --peer, or both")
    unknown = set(options.cache_types) - set(engines.PEER_CACHES)
    if unknown:
        parser.error(f"--cache-types: {', '.join(sorted(unknown))} not among "
                     + ", ".join(engines.PEER_CACHES))
    if not os.path.exists(options.model):
        parser.error(f"{options.model} does not exist")
    options.model = os.path.abspath(options.model)
    options.text = os.path.abspath(options.text) if options.text else None
    return options


def _numbers(parser, text):
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        parser.error(f"'{text}' is not a list of numbers")


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} processors"
    except (OSError, IndexError):
        return platform.machine()


def drop_unsupported(options, everyone):
    """Leaves out what a peer cannot run: builds differ in their cache types."""
    dropped = []
    for engine in everyone[1:]:
        engine.caches = tuple(options.cache_types)
        for cache in options.cache_types:
            try:
                engine.decode(cache, 64, 1)
            except engines.EngineError as error:
                if engine.caches == (cache,):
                    raise
                engine.caches = tuple(c for c in engine.caches if c != cache)
                dropped.append(f"{engine.name} {cache}")
                say(f"left out: {error}")
    return dropped


def check(options, everyone):
    """Perplexity of every engine and cache type; who is wrong."""
    own = everyone[0]
    ctx = 512
    exact = own.perplexity("bf16", options.text, ctx, options.chunks, ctx)
    rows = [{"engine": own.name, "by_cache": {"bf16": exact}, "verdict": "the measure"}]
    for cache in own.caches:
        rows[0]["by_cache"][cache] = own.perplexity(cache, options.text, ctx, options.chunks, ctx)
    wrong = []
    for engine in everyone[1:]:
        by_cache = {}
        for cache in engine.caches:
            say(f"perplexity of {engine.name} {cache}")
            by_cache[cache] = engine.perplexity(cache, options.text, ctx, options.chunks, ctx)
        row = {"engine": engine.name, "by_cache": by_cache, "verdict": "right"}
        first = by_cache[engine.caches[0]]
        if not exact / WRONG_FROM < first < exact * WRONG_FROM:
            row["verdict"] = f"**wrong**: {first / exact:.2f} times kvant's; prefill is not compared"
            row["single"] = {
                "peer": engine.perplexity(engine.caches[0], options.text, ctx, 1, 1),
                "kvant": own.perplexity("bf16", options.text, ctx, 1, ctx)}
            wrong.append(engine.name)
            say(f"{engine.name} answers wrongly: perplexity {first:.2f} instead of {exact:.2f}")
        rows.append(row)
    return rows, wrong


def measure(options, everyone, wrong):
    """{(engine, cache, 'decode' or 'prefill', number): seconds per token of each round}"""
    # An engine's two depths follow each other: the difference of two times that lie apart would
    # hold whatever the machine did in between.
    work = [("decode", options.depths)] if options.depths else []
    work += [("prefill", [length]) for length in options.prefill]
    samples = {}
    for kind, numbers in work:
        turns = [(engine, cache) for engine in everyone for cache in engine.caches
                 if kind == "decode" or engine.name not in wrong]
        for i in range(options.rounds):
            say(f"{kind} {', '.join(map(str, numbers))}, round {i + 1} of {options.rounds}")
            for engine, cache in turns if i % 2 == 0 else reversed(turns):
                for number in numbers:
                    seconds = (engine.decode(cache, number, options.decode_tokens)
                               if kind == "decode" else engine.prefill(cache, number))
                    samples.setdefault((engine.name, cache, kind, number), []).append(seconds)
        for engine in everyone:
            engine.forget()
    order = [(engine.name, cache) for engine in everyone for cache in engine.caches]
    return dict(sorted(samples.items(), key=lambda item: order.index(item[0][:2])))


def floors(options, own, everyone, size, gb_per_s):
    """Seconds that reading the weights and the cache takes, at the deeper depth."""
    if not options.depths:
        return {}
    deep = options.depths[1]
    values = size.kv_values(deep + options.decode_tokens // 2)
    bits = {f"kvant {cache}": own.bits_per_value[cache, deep] for cache in own.caches}
    for engine in everyone[1:]:
        bits.update({f"{engine.name} {cache}": report.PEER_BITS[cache] for cache in engine.caches})
    return {name: report.floor_seconds(size.weights, values, b, gb_per_s)
            for name, b in bits.items()}


def main(arguments):
    options = parse(arguments)
    try:
        everyone = engines.create(options)
        dropped = drop_unsupported(options, everyone)
        own = everyone[0]
        size = ModelBytes(options.model)
        gb_per_s = own.read_gb_per_s()
        rows, wrong = ([], []) if options.no_check else check(options, everyone)
        samples = measure(options, everyone, wrong)
        gb_per_s = max(gb_per_s, own.read_gb_per_s())
        about = {engine.name: engine.about() for engine in everyone}
    except engines.EngineError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    results = {
        "schema_version": SCHEMA_VERSION, "model": os.path.basename(options.model),
        "threads": options.threads, "rounds": options.rounds, "cpu": cpu_name(),
        "engines": about, "left_out": dropped, "main": options.kv[0], "read_gb_per_s": gb_per_s,
        "weight_bytes": size.weights, "check_ctx": 512, "check_chunks": options.chunks,
        "perplexity": rows, "wrong": wrong, "depths": options.depths, "prefills": options.prefill,
        "decode_tokens": options.decode_tokens,
        "floor": floors(options, own, everyone, size, gb_per_s),
        "samples": [{"engine": e, "cache": c, "kind": k, "tokens": n, "seconds_per_token": s}
                    for (e, c, k, n), s in samples.items()]}
    results["decode"] = (report.decode_rows(samples, results, options.depths, options.kv[0])
                         if options.depths else [])
    results["prefill"] = report.prefill_rows(samples, options.prefill, options.kv[0], wrong)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    print(report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
