#!/usr/bin/env python3
"""What a running server says of itself, against what its clients saw.

Usage: monitor_suite.py KVANT MODEL

Starts `kvant serve`, talks to it, and compares: hit tokens and prompt tokens in /metrics with the sums of `usage`
in the answers; the index that a foreign subscriber rebuilds from KV events with the size of the prefix tree; the
dashboard in headless Chromium with an answer that it streamed itself. Exit code 77: something that it needs is
missing. KVANT_SCREENSHOTS names a folder for pictures of the dashboard.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
INDEX = ROOT / "kvant/serve/events/testing/foreign_index.py"
BROWSE = ROOT / "kvant/serve/monitor/testing/browse_dashboard.py"
PYTHON = "/usr/bin/python3"  # Debian's, which has python3-zmq
SYSTEM = "You answer in one short sentence. " + " ".join(
    f"Rule {i}: be brief, be kind, be right, and do not repeat what was said in rule {i - 1}." for i in range(1, 40))


def fail(text: str) -> None:
    sys.exit(f"FAILED: {text}")


def check(condition: bool, text: str) -> None:
    print(("ok: " if condition else "FAILED: ") + text)
    if not condition:
        sys.exit(1)


def ask(url: str, question: str, tokens: int) -> dict:
    body = {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["usage"]


def scrape(url: str) -> dict:
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    values = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([a-zA-Z_:0-9]+)(\{.*\})? (\S+)", line):
            values[match[1]] = values.get(match[1], 0) + float(match[3])
            values[match[1] + (match[2] or "")] = float(match[3])
    return values


def metrics_equal_usage(url: str, usages: list[dict]) -> None:
    values = scrape(url)
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    for name, expected in [
            ("vllm:prefix_cache_hits_total", cached),
            ("vllm:prompt_tokens_total", sum(u["prompt_tokens"] for u in usages)),
            ("vllm:generation_tokens_total", sum(u["completion_tokens"] for u in usages)),
            ("vllm:e2e_request_latency_seconds_count", len(usages)),
            ("vllm:time_to_first_token_seconds_count", len(usages)),
            ("vllm:inter_token_latency_seconds_count", sum(u["completion_tokens"] - 1 for u in usages))]:
        check(values[name] == expected, f"{name} is {values[name]:.0f}, clients counted {expected}")
    check(cached > 0, "later prompts found the first one's pages")
    check(values["vllm:prefix_cache_hits_total"] <= values["vllm:prefix_cache_queries_total"], "hits <= queries")
    check(values["kvant:quantization_samples_total"] >= 2, "a page was sampled, keys and values")
    mean = values["kvant:quantization_error_ratio_sum"] / values["kvant:quantization_error_ratio_count"]
    check(0.01 < mean < 0.2, f"the sampled error of 4bit is {mean:.3f}")
    for name in ("kvant:http_accept_to_enqueue_seconds_count", "kvant:http_token_to_written_seconds_count"):
        check(values[name] >= len(usages), f"{name} is {values[name]:.0f}")


def events_equal_tree(url: str, started: dict) -> None:
    if subprocess.run([PYTHON, "-c", "import zmq, msgpack"], capture_output=True).returncode != 0:
        print("skipped: KV events (needs python3-zmq and python3-msgpack)")
        return
    reader = subprocess.Popen([PYTHON, INDEX, started["kv_events"], started["kv_events_replay"], "--topic", "kv@"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # It joins late: some page must be stored for it to notice, and then it replays.
    for i in range(20):
        ask(url, f"Question {i}: " + "what is new? " * 70, 2)
        time.sleep(0.2)
        if scrape(url)["kvant:kv_event_subscriptions"] >= 1:
            break
    ask(url, "Something else: " + "tell me more. " * 70, 2)
    check(reader.stdout.readline().strip() == "ready", "the foreign subscriber reads")
    values = scrape(url)
    reader.stdin.write(f"end {values['kvant:kv_event_batches_total'] - 1:.0f}\n")
    reader.stdin.flush()
    index = json.loads(reader.stdout.readline())
    reader.kill()
    check(index["errors"] == [], f"errors of the foreign index: {index['errors']}")
    check(index["counts"].get("lost", 0) == 0, "no batch was lost")
    check(len(index["blocks"]) == values["kvant:prefix_tree_pages"],
          f"the foreign index has {len(index['blocks'])} pages, the tree {values['kvant:prefix_tree_pages']:.0f}")


def dashboard_works(url: str) -> None:
    if not shutil.which("chromium"):
        print("skipped: dashboard (needs chromium)")
        return
    stop = threading.Event()

    def load(number: int) -> None:
        while not stop.is_set():
            ask(url, f"Tell me about the number {number} at {time.time()}.", 24)

    threads = [threading.Thread(target=load, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    command = [sys.executable, BROWSE, url + "/", "--question", "What is two plus two?", "--seconds",
               os.environ.get("KVANT_BROWSE_SECONDS", "6")]
    if folder := os.environ.get("KVANT_SCREENSHOTS"):
        command += ["--screenshots", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    stop.set()
    for thread in threads:
        thread.join()
    if result.returncode != 0:
        fail(result.stdout + result.stderr)
    page = json.loads(result.stdout)
    print(json.dumps(page["tiles"], ensure_ascii=False))
    check(page["state"] == "live", "the dashboard is live")
    check(page["errors"] == [], f"errors of the page: {page['errors']}")
    roles = [role for role, _ in page["chat"]]
    check(roles == ["user", "assistant", "note"], f"the chat has an answer: {page['chat']}")
    check(page["tiles"]["Prefix hit rate"].endswith(" %"), "the hit rate is shown")
    check(page["tiles"]["Time to first token"] != "–", "the time to first token is shown")
    check(page["phone_overflow"] <= 0, "it fits a phone")


def main() -> None:
    kvant, model = sys.argv[1:3]
    if not os.path.exists(model):
        print("skipped: fetch the model with scripts/fetch_model.sh smollm2")
        sys.exit(77)
    events = {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:*",
              "replay_endpoint": "tcp://127.0.0.1:*", "topic": "kv@{address}@{model}"}
    server = subprocess.Popen(
        [kvant, "serve", model, "--port", "0", "--json", "--max-model-len", "4096", "--max-num-seqs", "8",
         "--kv-events-config", json.dumps(events), "--kv-events-address", "127.0.0.1:8000", "--no-access-log"],
        stdout=subprocess.PIPE, text=True)
    try:
        started = json.loads(server.stdout.readline())
        url = started["url"]
        usages = [ask(url, f"What comes after {i}?", 8) for i in (1, 2, 3)]
        time.sleep(1)  # a request's end is counted right behind its last token
        metrics_equal_usage(url, usages)
        events_equal_tree(url, started)
        dashboard_works(url)
    finally:
        server.terminate()
        server.wait(60)
    check(server.returncode in (0, 143), f"the server ended with {server.returncode}")


if __name__ == "__main__":
    main()
