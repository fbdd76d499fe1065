"""The engines that bench/peers/run.py compares, behind one interface.

Every engine has `name`, `caches` (its cache formats) and
  perplexity(cache, text, ctx, chunks, batch)  of a text file, `batch` tokens at a time
  decode(cache, depth, tokens)                 seconds per token after `depth` tokens of context
  prefill(cache, tokens)                       seconds per token of a whole prompt
  forget()                                     frees what was kept to save time
All raise EngineError with a message for the user.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile

PEER_CACHES = ("f16", "q8_0", "q4_0")


class EngineError(Exception):
    pass


def _run(command, what):
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise EngineError(f"cannot start {what} ({command[0]}): {error.strerror}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise EngineError(f"{what} failed with {done.returncode}: {last}\n  {shlex.join(command)}")
    return done.stdout


class Kvant:
    """The kvant program; every measurement is a process, with the context filled anew."""

    def __init__(self, program, model, threads, caches):
        self.name = "kvant"
        self.caches = tuple(caches)
        self._program, self._model, self._threads = program, model, threads
        self.bits_per_value = {}  # (cache, depth) -> of all that is stored, open pages too

    def about(self):
        return _run([self._program, "--version"], self.name).strip().splitlines()[0]

    def _bench(self, cache, prompt, decode, depth):
        command = [self._program, "bench", "model", self._model, "--kv", cache, "-p", str(prompt),
                   "-n", str(decode), "-d", str(depth), "-r", "3", "-t", str(self._threads),
                   "--json", "--quiet"]
        return json.loads(_run(command, self.name))

    def decode(self, cache, depth, tokens):
        row = self._bench(cache, 0, tokens, depth)
        self.bits_per_value[cache, depth] = row["bits_per_value"]
        return 1.0 / row["decode_tokens_per_second"]["median"]

    def prefill(self, cache, tokens):
        return 1.0 / self._bench(cache, tokens, 0, 0)["prefill_tokens_per_second"]["median"]

    def perplexity(self, cache, text, ctx, chunks, batch):  # its bits do not depend on batches
        command = [self._program, "eval", self._model, "--kv", cache, "--text", text, "--ctx",
                   str(ctx), "--chunks", str(chunks), "-t", str(self._threads), "--json", "--quiet"]
        return json.loads(_run(command, self.name))["results"][0]["ppl"]

    def read_gb_per_s(self):
        """What plain loads reach on all threads, from memory."""
        command = [self._program, "bench", "attention", "--kv", "bf16", "--tokens", "8192",
                   "--seconds", "2", "-t", str(self._threads), "--json", "--quiet"]
        return json.loads(_run(command, self.name))["ceiling_gb_per_s"]

    def forget(self):
        pass


class LlamaCppPython:
    """llama.cpp in a process of its own; contexts stay filled between rounds."""

    def __init__(self, python, model, threads):
        self.name = "llama.cpp"
        self.caches = PEER_CACHES
        worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama_cpp_worker.py")
        try:
            self._process = subprocess.Popen(  # pylint: disable=consider-using-with
                [python, worker, model, str(threads)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise EngineError(f"cannot start {python}: {error.strerror}") from error

    def _ask(self, **request):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.name} ended with {self._process.wait()}; its message is above "
                              "(is llama-cpp-python installed for this python? --python names another)")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def about(self):
        answer = self._ask(do="about")
        on = re.findall(r"(\w+) = 1", answer["system"])
        return f"{answer['version']} ({' '.join(on)})"

    def decode(self, cache, depth, tokens):
        return self._ask(do="decode", cache=cache, depth=depth, tokens=tokens)["seconds_per_token"]

    def prefill(self, cache, tokens):
        return self._ask(do="prefill", cache=cache, tokens=tokens)["seconds_per_token"]

    def perplexity(self, cache, text, ctx, chunks, batch):
        return self._ask(do="perplexity", cache=cache, text=text, ctx=ctx,
                         chunks=chunks, batch=batch)["perplexity"]

    def forget(self):
        self._ask(do="forget")


class LlamaBench:
    """A llama-bench-compatible program: NAME=PATH [ARGUMENTS...].

    Programs with -d measure after that depth; older ones, and ik_llama.cpp's, have -gp instead.
    Perplexity comes from the llama-perplexity beside it, if there is one.
    """

    def __init__(self, argument, model, threads):
        name, equals, command = argument.partition("=")
        words = shlex.split(command)
        if not equals or not name or not words:
            raise EngineError(f"--peer {argument}: expected NAME=PROGRAM [ARGUMENTS...]")
        self.name = name
        self.caches = PEER_CACHES
        self._program, self._extra = os.path.abspath(words[0]), words[1:]
        self._model, self._threads = model, threads
        text = _run([self._program, "--help"], name)
        self._has_depth = "--n-depth" in text
        if not self._has_depth and "-gp" not in text:
            raise EngineError(f"{self._program} has neither -d nor -gp: cannot measure at a depth")
        self._perplexity = os.path.join(os.path.dirname(self._program), "llama-perplexity")
        self._commit = None

    def about(self):
        return f"{os.path.basename(self._program)} {shlex.join(self._extra)}".strip() + (
            f", commit {self._commit}" if self._commit else "")

    def _bench(self, cache, arguments, repetitions=3):
        command = [self._program, "-m", self._model, *arguments, "-ctk", cache, "-ctv", cache, "-fa",
                   "1", "-t", str(self._threads), "-r", str(repetitions), "-o", "json",
                   *self._extra]
        output = _run(command, self.name)
        try:
            row = json.loads(output[output.index("["):])[-1]
            samples = row["samples_ts"]
        except (ValueError, KeyError, IndexError) as error:
            raise EngineError(f"{self.name} printed no llama-bench JSON: {error}") from error
        self._commit = row.get("build_commit")
        return 1.0 / statistics.median(samples)

    def decode(self, cache, depth, tokens):
        if self._has_depth:
            return self._bench(cache, ["-p", "0", "-n", str(tokens), "-d", str(depth)])
        # Fills the context before each repetition; it warms up by itself.
        return self._bench(cache, ["-p", "0", "-n", "0", "-gp", f"{depth},{tokens}"], 1)

    def prefill(self, cache, tokens):
        return self._bench(cache, ["-p", str(tokens), "-n", "0"])

    def perplexity(self, cache, text, ctx, chunks, batch):
        if not os.access(self._perplexity, os.X_OK):
            raise EngineError(f"{self._perplexity} does not exist: cannot check what "
                              f"{self.name} computes; build it beside llama-bench")
        command = [self._perplexity, "-m", self._model, "-f", text, "-c", str(ctx), "--chunks",
                   str(chunks), "-b", str(batch), "-ub", str(batch), "-fa", "on", "-ctk", cache,
                   "-ctv", cache, "-t", str(self._threads), *_without_bench_options(self._extra)]
        try:
            with tempfile.TemporaryDirectory() as folder:  # it leaves a log where it runs
                done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                      check=False, cwd=folder)
        except OSError as error:
            raise EngineError(f"cannot start {command[0]}: {error.strerror}") from error
        found = re.search(r"Final estimate: PPL.*? = ([0-9.]+|-?nan)", done.stdout + done.stderr)
        if not found:
            raise EngineError(f"{self._perplexity} printed no final estimate\n  "
                              f"{shlex.join(command)}")
        return float(found.group(1))

    def forget(self):
        pass


def _without_bench_options(arguments):
    """llama-bench writes switches as `-rtr 1`; the other programs as `-rtr`."""
    kept = []
    for at, word in enumerate(arguments):
        if word in ("0", "1") and at > 0:
            if word == "0":
                kept.pop()
            continue
        kept.append(word)
    return kept


def create(options):
    """The engines that the command line asks for, kvant first."""
    engines = [Kvant(options.kvant, options.model, options.threads, options.kv)]
    if options.llama_cpp:
        engines.append(LlamaCppPython(options.python or sys.executable, options.model,
                                      options.threads))
    engines += [LlamaBench(peer, options.model, options.threads) for peer in options.peer]
    return engines
