#!/usr/bin/env python3
"""What a hit in the prefix cache saves, and whether the server counts its hits rightly.

Conversations with one system prompt of --prefix tokens. Cold: each conversation has a cache_salt of its own, so that it
finds nothing. Hit: all have the same, and the first has run. Prints the time to the first token of both, and the hit
rate three times: from the server's metrics, from its access log, and from the `usage` of the answers. Exit code 1 if
these differ or the ratio of the times is below --goal. Standard library only.

  bench/serving/prefix_hits.py models/smollm2.gguf --prefix 4096
"""
import argparse
import http.client
import json
import random
import re
import statistics
import sys
import tempfile
import time
from urllib.parse import urlsplit

from servers import ROOT, kvant_server, metric, scrape


class Client:
    def __init__(self, started, options):
        self.address = urlsplit(started["url"]).netloc
        self.model = started["models"][0]
        self.output = options.output
        self.prompt_tokens = self.cached_tokens = 0

    def turn(self, prompt, salt):
        """The time to the first token, in seconds, and the answer's tokens."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.output, "ignore_eos": True, "stream": True,
                "temperature": 0, "return_token_ids": True, "cache_salt": salt, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection(self.address, timeout=600)
        begun = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        first, tokens, usage = None, [], None
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            ids = [i for choice in event["choices"] for i in choice.get("token_ids") or []]
            first = first or (ids and time.monotonic() - begun) or None
            tokens += ids
        connection.close()
        self.prompt_tokens += usage["prompt_tokens"]
        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        return first, tokens


def conversations(client, options, salt_of):
    """The times to the first token: those of first turns and those of later ones."""
    draw = random.Random(options.seed)
    system = [draw.randrange(100, 10000) for _ in range(options.prefix)]
    first, later = [], []
    for number in range(options.conversations):
        prompt = list(system)
        for turn in range(options.turns):
            prompt += [draw.randrange(100, 10000) for _ in range(options.input)]
            seconds, answer = client.turn(prompt, salt_of(number))
            (later if turn else first).append(seconds)
            prompt += answer
    return first, later


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--build", default=str(ROOT / "build"), help="folder of the program")
    parser.add_argument("--kv", default="4bit")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens of the system prompt")
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--input", type=int, default=64, help="tokens of a turn")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--goal", type=float, default=5.0, help="ratio of cold to hit")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with kvant_server(options.build + "/kvant", options.model, "--kv", options.kv, log=log) as started:
            client = Client(started, options)
            cold, _ = conversations(client, options, lambda number: f"cold {number}")
            client.turn([100 + i for i in range(64)], "warm")
            hit, later = conversations(client, options, lambda number: "shared")
            text = scrape(started["url"])
        log.seek(0)
        lines = [(int(p), int(c)) for p, c in re.findall(r"prompt=(\d+) cached=(\d+)", log.read())]
    rates = {
        "metrics": metric(text, "vllm:prefix_cache_hits_total") / metric(text, "vllm:prefix_cache_queries_total"),
        "access_log": sum(c for _, c in lines) / sum(p for p, _ in lines),
        "usage": client.cached_tokens / client.prompt_tokens,
    }
    report = {"schema_version": 1, "bench": "prefix_hits", "kv": options.kv, "prefix": options.prefix,
              "cold_ttft_s": statistics.median(cold), "hit_ttft_s": statistics.median(hit[1:]),
              "later_turn_ttft_s": statistics.median(later),
              "ratio": statistics.median(cold) / statistics.median(hit[1:]), "hit_rate": rates}
    failed = []
    if max(rates.values()) - min(rates.values()) > 1e-9:
        failed.append("the three hit rates differ")
    if report["ratio"] < options.goal:
        failed.append(f"the ratio is below {options.goal}")
    print(json.dumps(report | {"failed": failed}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
