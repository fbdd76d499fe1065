"""Of serve_faults_suite.py: what neighbours may not learn from a running server, and strangers not do to it."""
import collections
import concurrent.futures
import json
import socket
import statistics
import threading
import time

from serve_process import Server, completion

HEADER_SECONDS, BODY_SECONDS = 1, 2
GRACE_SECONDS = 6  # for a busy machine; the server lingers 3 s over a connection that it has refused

# ---- keys


def check_keys(suite):
    keys = suite.folder / "keys"
    keys.write_text("sk-alice alice pepper\nsk-bob bob salt\n")
    options = suite.options
    with Server(options.program, options.model, "--deterministic", "--kv", options.kv, "--page-tokens", 16,
                "--max-model-len", options.pair_tokens + 100, "--max-num-seqs", 2, "--cache-memory", "256MiB",
                "--no-access-log", "--api-key-file", keys) as server:
        check_refusals(suite, server)
        times = {"cold": [], "other_key": [], "same_key": []}
        leaks, misses = 0, 0
        for _ in range(options.pairs):
            prompt = suite.corpus.tokens(options.pair_tokens)
            for kind, key, hit in (("cold", "sk-alice", False), ("other_key", "sk-bob", False),
                                   ("same_key", "sk-alice", True), ("same_key", "sk-bob", True)):
                seconds, cached = server.first_token_seconds(prompt, key)
                times[kind].append(seconds)
                leaks += not hit and cached > 0
                misses += hit and cached < options.pair_tokens - 32
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        to_hit, to_cold = (medians["other_key"] / medians[kind] for kind in ("same_key", "cold"))
        suite.report("salted keys share no page", leaks == 0 and misses == 0 and to_hit > 3 and to_cold > 0.5,
                     prompts=options.pairs, tokens=options.pair_tokens, leaks=leaks, misses_of_own_pages=misses,
                     **{f"ms_to_first_token_{kind}": round(1000 * value, 1) for kind, value in medians.items()},
                     other_key_over_same_key=round(to_hit, 1), other_key_over_cold=round(to_cold, 2))
    check_keys_in_tiers(suite, keys)


def check_refusals(suite, server):
    body = completion([1, 2, 3], 1)
    statuses = {}
    for name, key in (("no_key", None), ("wrong_key", "sk-eve"), ("prefix_of_a_key", "sk-alic"), ("a_salt", "pepper")):
        statuses[name] = [server.call("POST", "/v1/completions", body, key)[0],
                          server.call("GET", "/v1/models", key=key)[0]]
    right = server.call("POST", "/v1/completions", body, "sk-bob")[0]
    suite.report("wrong keys get 401", right == 200 and all(found == [401, 401] for found in statuses.values()),
                 **statuses, right_key=right)


def check_keys_in_tiers(suite, keys):
    """The same where pages have left the cache for memory and disk."""
    with suite.start("--api-key-file", keys, "--host-cache", "8MiB", *suite.disk("salted")) as server:
        prompts = [suite.corpus.fresh() for _ in range(8)]
        for prompt in prompts:
            server.complete(prompt, key="sk-alice")
        others = [server.complete(prompt, key="sk-bob")[2] for prompt in prompts[:4]]
        before = server.metrics()
        own = [server.complete(prompt, key="sk-alice")[2] for prompt in prompts[:4]]
        after = server.metrics()
        # Prompts share prefixes with each other: only the first of a family is new to Bob.
        first = [cached for cached, prompt in zip(others, prompts)
                 if all(prompt[:16] != other[:16] for other in prompts[:prompts.index(prompt)])]
        hits = {tier: after.tier("hit_tokens_total", tier) - before.tier("hit_tokens_total", tier)
                for tier in ("host", "disk")}
        suite.report("salted keys share no page in tiers", not any(first) and all(own) and sum(hits.values()) > 0,
                     first_prompts_of_the_other_key=len(first), their_tokens_found=sum(first),
                     own_tokens_found=sum(own), **{f"{tier}_hit_tokens": count for tier, count in hits.items()})


# ---- hostile bodies

# A request as bytes, and the statuses that may answer it; 0: closed without an answer.


def request(body, *headers, length=None):
    lines = ["POST /v1/completions HTTP/1.1", "Host: h", "Content-Type: application/json", *headers]
    if length is not None or not headers:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*chunks):
    return request(b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks), "Transfer-Encoding: chunked")


def deep(opening, closing, count=100_000):
    return b'{"prompt": ' + opening * count + b"1" + closing * count + b"}"


GOOD = completion([1, 2, 3], 1).encode()
CASES = {
    "prompt of 10 MB": (lambda: request(b'{"prompt": "' + b"word " * 2_000_000 + b'"}'), (413,)),
    "10 MB in chunks": (lambda: chunked(*[b"x" * 100_000] * 100), (413,)),
    "prompt of 7 MB": (lambda: request(b'{"prompt": "' + b"word " * 1_400_000 + b'"}'), (400,)),
    "7 MB of token ids": (lambda: request(b'{"prompt": [' + b"1," * 3_500_000 + b"1]}"), (400,)),
    "arrays 100,000 deep": (lambda: request(deep(b"[", b"]")), (400,)),
    "objects 100,000 deep": (lambda: request(deep(b'{"a":', b"}")), (400,)),
    "100,000 open brackets": (lambda: request(b"[" * 100_000), (400,)),
    "invalid UTF-8": (lambda: request(b'{"prompt": "\xc3\x28\xff\xfe"}'), (400,)),
    "overlong UTF-8": (lambda: request(b'{"prompt": "\xc0\xaf"}'), (400,)),
    "lone surrogate": (lambda: request(b'{"prompt": "\\ud800"}'), (400,)),
    "NUL bytes": (lambda: request(b"\0" * 1000), (400,)),
    "numbers beyond any range": (lambda: request(b'{"prompt": [1e999], "max_tokens": 99999999999999999999}'), (400,)),
    "a header of 64 KB": (lambda: request(GOOD, "X-Long: " + "x" * 65536, length=len(GOOD)), (431,)),
    "10,000 headers": (lambda: request(GOOD, *[f"X-{i}: y" for i in range(10_000)], length=len(GOOD)), (431,)),
    "a target of 64 KB": (lambda: b"GET /" + b"x" * 65536 + b" HTTP/1.1\r\nHost: h\r\n\r\n", (431,)),
    "Content-Length below the body": (lambda: request(GOOD, length=10), (400,)),
    "Content-Length above the body": (lambda: request(GOOD, length=len(GOOD) + 10), (0, 400, 408)),
    "Content-Length of 2^64": (lambda: request(GOOD, length=1 << 64), (400, 413)),
    "Content-Length of 2^63": (lambda: request(GOOD, length=1 << 63), (413,)),
    "negative Content-Length": (lambda: request(GOOD, length=-1), (400,)),
    "Content-Length that is no number": (lambda: request(GOOD, length="ten"), (400,)),
    "two Content-Lengths": (lambda: request(GOOD, "Content-Length: 3", length=len(GOOD)), (400,)),
    "Content-Length and chunks": (lambda: request(GOOD, "Transfer-Encoding: chunked", length=len(GOOD)), (400,)),
    "chunks cut short": (lambda: chunked(GOOD)[:-20], (0, 400, 408)),
    "chunks without an end": (lambda: chunked(GOOD), (0, 400, 408)),
    "a chunk of no size": (lambda: request(b"zz\r\nx\r\n", "Transfer-Encoding: chunked"), (400,)),
    "a chunk of 2^64": (lambda: request(b"10000000000000000\r\nx\r\n", "Transfer-Encoding: chunked"), (400, 413)),
    "TLS": (lambda: bytes.fromhex("1603010200010001fc0303") + b"\x07" * 500, (400,)),
    "HTTP/2": (lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 20, (400, 505)),
    "half a request": (lambda: b"POST /v1/compl", (0, 400, 408)),
}


def exchange(port, sent, timeout, half_close=False):
    """The status of the answer to these bytes (0: closed without one, -1: nothing in time), and seconds it took."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            connection.sendall(sent)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has answered and closed
        return answer_of(connection), time.monotonic() - begin


def answer_of(connection):
    try:
        head = b""
        while b"\r\n" not in head and (received := connection.recv(65536)):
            head += received
    except TimeoutError:
        return -1
    except OSError:
        return 0
    return int(head.split()[1]) if head else 0


def check_hostile(suite):
    expected = [suite.corpus.expected(prompt) for prompt in suite.corpus.prompts]
    limits = ["--header-timeout", HEADER_SECONDS, "--body-timeout", BODY_SECONDS]
    with suite.start(*limits) as server:
        neighbour = suite.load(server, threads=1)  # is answered all the time
        check_cases(suite, server)
        check_slow(suite, server, "slow headers", b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n", HEADER_SECONDS)
        check_slow(suite, server, "slow bodies", request(b"", length=1000), BODY_SECONDS)
        check_slow(suite, server, "silent connections", b"", HEADER_SECONDS, allowed=(0,))
        check_leavers(suite, server)
        neighbour.finish()
        answers = [server.complete(prompt)[:2] for prompt in suite.corpus.prompts]
        metrics = server.wait_until_idle()
        suite.report("afterwards all is as before", neighbour.ok() and answers == expected and metrics.busy() == 0 and
                     metrics.held() == 0 and metrics.get("kvant:http_connections") <= 2, **neighbour.says(),
                     seconds_of_the_slowest=round(neighbour.slowest, 2),
                     running_or_waiting=metrics.busy(), leased_pages=metrics.get("kvant:prefix_tree_leased_pages"),
                     cache_usage=metrics.get("vllm:kv_cache_usage_perc"),
                     connections=metrics.get("kvant:http_connections"))
    check_long_prompt(suite)


def check_cases(suite, server):
    wrong, statuses = [], collections.Counter()

    def send(case):
        name, half_close = case
        make, allowed = CASES[name]
        status, seconds = exchange(server.port, make(), 30, half_close)
        statuses[str(status)] += 1
        # A client that closes its side behind the request may be taken for gone.
        if status not in allowed + ((0,) if half_close else ()):
            wrong.append(f"{name}: {status} after {seconds:.1f} s")
    cases = [(name, half_close) for name in CASES for half_close in (False, True)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(send, cases))
    suite.report("hostile requests", not wrong, requests=len(cases), statuses=dict(sorted(statuses.items())),
                 **({"wrong_answers": wrong} if wrong else {}))


def check_slow(suite, server, name, begun, limit, count=50, allowed=(408, 0)):
    """Many connections that send a byte now and then: the server closes them all in time, and answers others."""
    begin, closed = time.monotonic(), []

    def drip():
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
            status = -1
            try:
                connection.sendall(begun)
                while status == -1 and time.monotonic() < begin + limit + GRACE_SECONDS + 5:
                    if begun:
                        connection.sendall(b"x")
                    status = answer_of(connection)
            except OSError:
                status = 0
            closed.append((status, time.monotonic() - begin))
    threads = [threading.Thread(target=drip) for _ in range(count)]
    for thread in threads:
        thread.start()
    health = server.call("GET", "/health", timeout=5)[0]
    for thread in threads:
        thread.join()
    statuses = {str(status): [found for found, _ in closed].count(status) for status in {found for found, _ in closed}}
    last = max(seconds for _, seconds in closed)
    suite.report(name, health == 200 and all(status in allowed for status, _ in closed) and
                 0.9 * limit <= min(seconds for _, seconds in closed) and last < limit + GRACE_SECONDS,
                 connections=count, statuses=statuses, limit_seconds=limit, last_closed_after=round(last, 2))


def check_leavers(suite, server):
    """Clients that reset their connection anywhere between the first byte and the last."""
    sent = request(json.dumps(json.loads(completion(suite.corpus.prompts[0], 60)) | {"stream": True}).encode())

    def count_aborted():
        return server.metrics().get("vllm:request_success_total", finished_reason="abort")
    before = count_aborted()
    for number in range(24):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(sent[:len(sent) * (number + 1) // 16])
            if number >= 15:  # all of it is sent: the answer has begun
                connection.recv(1 + number)
    end = time.monotonic() + 10
    while (aborted := count_aborted() - before) < 9 and time.monotonic() < end:
        time.sleep(0.05)
    suite.report("clients that leave anywhere", aborted == 9, clients=24, requests_begun=9, requests_aborted=aborted)


def check_long_prompt(suite):
    """A body that may be long, with a prompt that may not: refused, and others are answered meanwhile."""
    with suite.start("--max-body", "32MiB") as server:
        load = suite.load(server, threads=1)
        status, seconds = exchange(server.port, request(b'{"prompt": "' + b"word " * 2_000_000 + b'"}'), 60)
        load.until(lambda _: True, least=0.2)
        load.finish()
        suite.report("prompt of 10 MB where bodies may have 32 MiB", status == 400 and load.ok(), status=status,
                     seconds=round(seconds, 2), **load.says(), seconds_of_the_slowest=round(load.slowest, 2))
