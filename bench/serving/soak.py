#!/usr/bin/env python3
"""Many streams for a long time, with clients that leave at random: does the server keep nothing and lose nothing?

Keeps --streams requests under way against a running server for --seconds; each leaves after a random number of tokens
with probability --leave. Then it waits until the server is idle and checks: no status but 200, 429 and 503; every
answer that was not left is whole; no page is in use and no tree page leased; 99 % of requests reach the engine and of
tokens the network within 5 ms; resident memory (given --pid) did not grow in the second half. In the first half pages
are touched for the first time: give the server a cache that the load fills in it. Prints a JSON object; exit code 1 if
a check fails. Standard library only.

  kvant serve models/smollm2.gguf --max-num-seqs 16 --cache-memory 512MiB &
  bench/serving/soak.py http://127.0.0.1:8000 --pid $! --streams 200 --seconds 600
"""
import argparse
import asyncio
import collections
import json
import random
import re
import sys
import time
from urllib.parse import urlsplit

from servers import call, metric, scrape


def quantile(text, name, share):
    """Upper bound, in seconds, of the bucket of a histogram that holds this share."""
    buckets = collections.Counter()
    for bound, count in re.findall(rf'^{re.escape(name)}_bucket{{.*?le="([^"]+)".*?}} ([0-9.]+)$', text, re.MULTILINE):
        buckets[float(bound)] += float(count)
    total = max(buckets.values(), default=0)
    return min((bound for bound, count in buckets.items() if count >= share * total), default=None) if total else None


def resident_mib(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024


class Soak:
    def __init__(self, options):
        self.options = options
        self.address = urlsplit(options.url)
        self.statuses = collections.Counter()
        self.finished = self.left = self.broken = self.tokens = 0
        self.wrong = []
        self.random = random.Random(options.seed)
        self.prefixes = [[self.random.randrange(100, 10000) for _ in range(300)] for _ in range(8)]

    def body(self):
        prompt = self.random.choice(self.prefixes)[:self.random.randrange(20, 300)]
        prompt = prompt + [self.random.randrange(100, 10000) for _ in range(self.random.randrange(1, 40))]
        return json.dumps({"model": self.options.model, "prompt": prompt, "stream": True, "ignore_eos": True,
                           "max_tokens": self.random.randrange(4, 64), "temperature": 0.8,
                           "stream_options": {"include_usage": True}}).encode()

    async def request(self):
        body = self.body()
        wanted = json.loads(body)["max_tokens"]
        leave_after = self.random.randrange(0, wanted) if self.random.random() < self.options.leave else None
        reader, writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
                         b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            if leave_after == 0:
                self.left += 1
                return
            status = int((await reader.readline()).split()[1])
            self.statuses[status] += 1
            if status != 200:
                await asyncio.sleep(0.2)
                return
            usage = None
            events = 0
            while line := await reader.readline():
                text = line.strip()
                if not text.startswith(b"data: {"):
                    continue
                events += 1
                usage = json.loads(text[6:]).get("usage") or usage
                if leave_after is not None and events >= leave_after:
                    self.left += 1
                    return
            if usage is None or usage["completion_tokens"] != wanted:
                self.wrong.append(f"asked for {wanted} tokens, usage {usage}")
            self.finished += 1
            self.tokens += wanted
        finally:
            writer.close()

    async def client(self, end):
        while time.monotonic() < end:
            try:
                await asyncio.wait_for(self.request(), self.options.timeout)
            except (OSError, asyncio.TimeoutError, IndexError, ValueError) as error:
                self.broken += 1
                self.wrong.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)

    async def watch(self, end, memory):
        while time.monotonic() < end:
            await asyncio.sleep(min(5.0, self.options.seconds / 20))
            if self.options.pid:
                memory.append(resident_mib(self.options.pid))
            print(f"{max(0, end - time.monotonic()):.0f} s left, {self.finished} finished, {self.left} left by clients, "
                  f"{dict(self.statuses)}", file=sys.stderr)

    async def run(self, memory):
        end = time.monotonic() + self.options.seconds
        await asyncio.gather(self.watch(end, memory), *(self.client(end) for _ in range(self.options.streams)))


def wait_until_idle(url):
    for _ in range(600):
        text = scrape(url)
        if metric(text, "vllm:num_requests_running") + metric(text, "vllm:num_requests_waiting") == 0:
            time.sleep(0.5)  # the last gauges
            return scrape(url)
        time.sleep(0.1)
    sys.exit("the server is still busy a minute after the last client")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--leave", type=float, default=0.3, help="share of requests whose client leaves early")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one request")
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is watched")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.model = call(options.url + "/v1/models")["data"][0]["id"]
    soak = Soak(options)
    memory = []
    asyncio.run(soak.run(memory))
    text = wait_until_idle(options.url)
    early = memory[: (len(memory) + 1) // 2]
    report = {
        "schema_version": 1, "bench": "soak", "streams": options.streams, "seconds": options.seconds,
        "finished": soak.finished, "left_by_clients": soak.left, "broken": soak.broken, "tokens": soak.tokens,
        "statuses": {str(status): count for status, count in sorted(soak.statuses.items())},
        "cache_usage": metric(text, "vllm:kv_cache_usage_perc"),
        "leased_pages": metric(text, "kvant:prefix_tree_leased_pages"),
        "resident_mib": {"first_half": max(early, default=None), "end": memory[-1] if memory else None},
        "engine_overhead": 1 - metric(text, "kvant:engine_model_seconds_total") /
                           metric(text, "kvant:engine_loop_seconds_total"),
        "accept_to_enqueue_p99_s": quantile(text, "kvant:http_accept_to_enqueue_seconds", 0.99),
        "token_to_written_p99_s": quantile(text, "kvant:http_token_to_written_seconds", 0.99),
    }
    own_latency = [report["accept_to_enqueue_p99_s"], report["token_to_written_p99_s"]]
    failed = [name for name, ok in {
        "a status that is not 200, 429 or 503": set(soak.statuses) <= {200, 429, 503},
        "answers that are not whole": not soak.wrong,
        "pages in use at rest": report["cache_usage"] == 0,
        "leased pages at rest": report["leased_pages"] == 0,
        "p99 of the HTTP layer's own latency above 5 ms": None not in own_latency and max(own_latency) <= 0.005,
        "resident memory grew by more than 5 % in the second half": not memory or memory[-1] <= 1.05 * max(early),
    }.items() if not ok]
    report["failed"] = failed
    report["examples"] = soak.wrong[:3]
    print(json.dumps(report, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
