"""A `kvant serve` that a test starts, asks, loads from many threads, and kills. Standard library only."""
import http.client
import json
import random
import re
import signal
import subprocess
import threading
import time


class Server:
    """`kvant serve MODEL` with some options; its stderr is kept in `log`."""

    def __init__(self, program, model, *options):
        self.log = []
        self.process = subprocess.Popen([program, "serve", model, "--port", "0", "--json", *map(str, options)],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        line = self.process.stdout.readline()
        ready = json.loads(line) if line else {}
        if "port" not in ready:
            self.kill()
            raise RuntimeError("the server did not start: " + line + "".join(self.log))
        self.port = ready["port"]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            code = self.stop() if kind is None else self.kill()
            if kind is None and code != 0:
                raise RuntimeError(f"the server's exit code is {code}: " + "".join(self.log[-20:]))

    def call(self, method, path, body=None, key=None, timeout=60):
        """Status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def complete(self, prompt, max_tokens=5, key=None, timeout=60):
        """The answer to a prompt of token ids: (ids, log-probabilities, tokens found in the cache)."""
        status, body = self.call("POST", "/v1/completions", completion(prompt, max_tokens), key, timeout)
        if status != 200:
            raise WrongStatus(status, body)
        answer = json.loads(body)
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], \
            answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def first_token_seconds(self, prompt, key):
        """Seconds to the first token, and how much of the prompt was in the cache."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        fields = json.loads(completion(prompt, 2)) | {"stream": True, "stream_options": {"include_usage": True}}
        begin, first, usage = time.monotonic(), None, None
        connection.request("POST", "/v1/completions", json.dumps(fields),
                           {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        if response.status != 200:
            raise WrongStatus(response.status, response.read())
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begin
                usage = json.loads(line[6:]).get("usage") or usage
        connection.close()
        return first, usage["prompt_tokens_details"]["cached_tokens"]

    def metrics(self):
        return Metrics(self.call("GET", "/metrics", timeout=30)[1].decode())

    def wait_until_idle(self, seconds=30):
        """Metrics once nothing runs or waits; the last ones seen if that does not come."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            if metrics.busy() == 0 or time.monotonic() > end:
                return metrics
            time.sleep(0.05)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.finish()

    def kill(self):
        self.process.kill()
        return self.finish()

    def finish(self):
        code = self.process.wait(timeout=60)
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


class WrongStatus(Exception):
    def __init__(self, status, body):
        super().__init__(f"status {status}: {body[:300]!r}")


class Metrics:
    def __init__(self, text):
        self.text = text

    def get(self, name, **labels):
        """Sum over the series with these labels; 0 if there is none."""
        total = 0.0
        for found, value in re.findall(rf"^{re.escape(name)}(?:{{([^}}]*)}})? ([0-9.eE+-]+)$", self.text, re.MULTILINE):
            if all(f'{label}="{wanted}"' in found for label, wanted in labels.items()):
                total += float(value)
        return int(total) if total == int(total) else total

    def tier(self, what, tier):
        return self.get(f"kvant:cache_{what}", tier=tier)

    def busy(self):
        return self.get("vllm:num_requests_running") + self.get("vllm:num_requests_waiting")

    def held(self):
        """What requests hold of the cache: pages leased in the tree, and the share that is in use."""
        return self.get("kvant:prefix_tree_leased_pages") + self.get("vllm:kv_cache_usage_perc")


def completion(prompt, max_tokens):
    return json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                       "return_token_ids": True, "logprobs": 1})


class Corpus:
    """Prompts of token ids that share prefixes, and their answers from a server that keeps no page at all."""

    def __init__(self, reference, seed, families=14, prefix_tokens=64, variants=1):
        self.random = random.Random(seed)
        self.reference = reference
        self.prefixes = [self.tokens(prefix_tokens) for _ in range(families)]
        self.prompts = [self.fresh(family) for family in range(families) for _ in range(variants)]
        self.answers = {}
        for prompt in self.prompts:
            self.expected(prompt)

    def tokens(self, count):
        return [self.random.randrange(100, 40000) for _ in range(count)]

    def fresh(self, family=None):
        family = self.random.randrange(len(self.prefixes)) if family is None else family
        return tuple(self.prefixes[family] + self.tokens(self.random.randrange(4, 24)))

    def expected(self, prompt):
        if prompt not in self.answers:
            self.answers[prompt] = self.reference.complete(prompt)[:2]
        return self.answers[prompt]


class Load:
    """Threads that ask a server for prompts of a corpus until `stop`, and what became of each request.

    Every answer is compared with the reference's: tokens and log-probabilities, to the last digit.
    `fresh` is the share of prompts that nobody has asked yet; theirs are compared in `finish`.
    """

    def __init__(self, server, corpus, threads=4, fresh=0.0, seed=0):
        self.server, self.corpus, self.fresh = server, corpus, fresh
        self.right = self.lost = self.cut = 0
        self.wrong, self.unchecked, self.errors = [], [], []
        self.slowest = 0.0
        self.stopping = threading.Event()
        self.killed = threading.Event()  # from here on the server may fail
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run, args=(random.Random(f"{seed}.{i}"),), daemon=True)
                        for i in range(threads)]
        for thread in self.threads:
            thread.start()

    def run(self, source):
        while not self.stopping.is_set():
            if source.random() < self.fresh:
                with self.lock:
                    prompt = self.corpus.fresh()
            else:
                prompt = source.choice(self.corpus.prompts)
            begin = time.monotonic()
            try:
                answer = self.server.complete(prompt)[:2]
            except (OSError, http.client.HTTPException, WrongStatus, ValueError) as error:
                with self.lock:
                    if self.killed.is_set():
                        self.cut += 1
                    else:
                        self.lost += 1
                        self.errors.append(f"{type(error).__name__}: {error}")
                if self.killed.is_set() or self.server.process.poll() is not None:
                    return
                continue
            with self.lock:
                self.slowest = max(self.slowest, time.monotonic() - begin)
                if prompt in self.corpus.answers:
                    self.compare(prompt, answer)
                else:
                    self.unchecked.append((prompt, answer))

    def compare(self, prompt, answer):
        if answer == self.corpus.expected(prompt):
            self.right += 1
        else:
            self.wrong.append(f"{answer} instead of {self.corpus.expected(prompt)}")

    def answered(self):
        return self.right + len(self.wrong) + len(self.unchecked)

    def until(self, condition, least=1.0, most=30.0, answers=8):
        """Goes on for `least` seconds and some answers, until the metrics satisfy the condition or `most` is over."""
        begin = time.monotonic()
        wanted = self.answered() + answers
        while True:
            time.sleep(0.1)
            if (code := self.server.process.poll()) is not None:
                raise RuntimeError(f"the server ended with {code}: " + "".join(self.server.log[-20:]))
            seconds = time.monotonic() - begin
            if seconds >= most or (seconds >= least and self.answered() >= wanted and
                                   condition(self.server.metrics())):
                return

    def kill(self):
        self.killed.set()
        self.server.kill()
        self.finish()

    def finish(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        for prompt, answer in self.unchecked:
            self.compare(prompt, answer)
        self.unchecked = []

    def ok(self):
        return self.right > 0 and not self.wrong and self.lost == 0

    def says(self):
        return {"right": self.right, "wrong": len(self.wrong), "lost": self.lost} | \
            ({"examples": (self.wrong + self.errors)[:2]} if self.wrong or self.errors else {})
