#!/usr/bin/env python3
"""`kvant serve` and llama.cpp's server under the same load: throughput and time to first token, as ratios.

Requests share a prefix of --prefix tokens. The engines are served one after the other, --rounds times in turn, each
with the cache types named; first their answers are compared: greedy, 8 texts at a time, against kvant's with a 16-bit
cache. An engine whose answers agree in fewer than half of the tokens is not timed. Prints Markdown and writes JSON
lines. Standard library only.

  bench/serving/peer_server.py models/smollm2.gguf --llama-server llama.cpp/build/bin/llama-server --lines peer.jsonl
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import statistics
import sys

from servers import ROOT, bench, call, free_port, kvant_server, other_server

TEXTS = [
    "The lighthouse keeper climbed the stairs every evening and", "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    ", "Dear Sir or Madam,\nI am writing to", "The three primary colours are",
    "Once upon a time, in a small village by the sea,", "1, 2, 3, 4, 5, 6, 7,", "The capital of France is Paris. The capital of Italy is",
]


@contextlib.contextmanager
def engine(options, name, cache, streams):
    """The URL of a server with room for `streams` requests, prefix included."""
    per_stream = options.prefix + options.input + options.output + 64
    if name == "kvant":
        with kvant_server(options.build + "/kvant", options.model, "--kv", cache, "--threads", options.threads,
                          "--max-num-seqs", streams, "--max-model-len", per_stream, "--no-access-log") as started:
            yield started["url"]
        return
    port = free_port()
    command = [options.llama_server, "-m", options.model, "--port", port, "-t", options.threads, "-tb", options.threads,
               "-np", streams, "-c", per_stream * streams, "-fa", "on", "-ctk", cache, "-ctv", cache]
    with open(os.devnull, "w", encoding="ascii") as log, other_server(command, port, log) as url:
        yield url


def answers(url, model):
    """Token ids would need each engine's own fields; texts of one tokenizer serve as well."""
    def one(text):
        body = {"model": model, "prompt": text, "max_tokens": 24, "temperature": 0}
        return call(url + "/v1/completions", body)["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(len(TEXTS)) as pool:
        return list(pool.map(one, TEXTS))


def agreement(texts, reference):
    """Share of the characters of `reference` before the first difference."""
    same = sum(len(os.path.commonprefix(pair)) for pair in zip(texts, reference))
    return same / sum(map(len, reference))


def check(options, engines):
    with engine(options, "kvant", "bf16", 1) as url:
        reference = answers(url, options.name)
    right = []
    for name, cache in engines:
        with engine(options, name, cache, len(TEXTS)) as url:
            share = agreement(answers(url, options.name), reference)
        print(f"{name} {cache}: {share * 100:.0f} % of the text as with a 16-bit cache alone", file=sys.stderr)
        if share >= 0.5:
            right.append((name, cache))
        else:
            print(f"{name} {cache} is left out: its answers are wrong", file=sys.stderr)
    return right


def measure(options, engines):
    rows = []
    for _ in range(options.rounds):
        for streams in map(int, options.streams.split(",")):
            for name, cache in engines:
                with engine(options, name, cache, streams) as url:
                    report = bench(options.build + "/kvant", url, "--workload", "shared-prefix", "--prefix-tokens",
                                   options.prefix, "--input-tokens", options.input, "--output-tokens", options.output,
                                   "-n", options.requests_per_stream * streams, "-c", streams, "--model", options.name)
                rows.append({"engine": name, "cache": cache, "streams": streams, "prefix": options.prefix,
                             "input": options.input, "output": options.output, "completed": report["completed"],
                             "tokens_per_second": report["output_tokens_per_second"], "ttft_ms": report["ttft_ms"],
                             "itl_ms": report["itl_ms"]})
                if options.lines:
                    with open(options.lines, "a", encoding="utf-8") as out:
                        print(json.dumps(rows[-1]), file=out)
    return rows


def markdown(rows):
    """Medians over rounds; ratios against the first engine: above 1, the first is better."""
    keys = list(dict.fromkeys((row["streams"], row["engine"], row["cache"]) for row in rows))
    values = {}
    for key in keys:
        mine = [row for row in rows if (row["streams"], row["engine"], row["cache"]) == key]
        values[key] = [statistics.median(get(row) for row in mine) for get in (
            lambda row: row["tokens_per_second"], lambda row: row["ttft_ms"]["p50"],
            lambda row: row["ttft_ms"]["p95"], lambda row: row["itl_ms"]["p50"])]
    lines = ["| streams | engine, cache | tokens/s | TTFT p50 / p95, ms | between tokens, ms | kvant's throughput | kvant's TTFT |",
             "|---|---|---|---|---|---|---|"]
    for key in keys:
        streams, name, cache = key
        first = values[next(k for k in keys if k[0] == streams)]
        rate, p50, p95, itl = values[key]
        ratios = "| | " if first is values[key] else f"| {first[0] / rate:.2f}x | {first[1] / p50:.2f}x "
        lines.append(f"| {streams} | {name} {cache} | {rate:.0f} | {p50:.0f} / {p95:.0f} | {itl:.1f} {ratios}|")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--build", default=str(ROOT / "build"), help="folder of kvant's program")
    parser.add_argument("--llama-server", required=True, help="llama.cpp's server, a program")
    parser.add_argument("--kv", default="4bit;bf16", help="kvant's caches; ratios are the first one's")
    parser.add_argument("--peer-kv", default="f16;q8_0", help="the peer's cache types")
    parser.add_argument("--streams", default="8,32", help="concurrent requests")
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lines", help="JSON lines, appended to")
    options = parser.parse_args()
    options.name = os.path.splitext(os.path.basename(options.model))[0]
    engines = [("kvant", cache) for cache in options.kv.split(";")]
    engines += [("llama.cpp", cache) for cache in options.peer_kv.split(";")]
    print(markdown(measure(options, check(options, engines))))


if __name__ == "__main__":
    main()
