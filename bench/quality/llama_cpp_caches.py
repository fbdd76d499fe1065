#!/usr/bin/env python3
"""Scores llama.cpp's cache types, through llama-cpp-python, by the protocol of `kvant eval`.

The base is either a logits file (`--base`: of exact_base.py or `kvant eval --save-logits`), or the
first cache type of the list (`--ids`). Per-token scores go to a state in the format of `kvant eval
--resume`; the same command goes on from there. Flash attention is on, as llama.cpp wants it for
quantised values; its rotation of keys and values is what the library decides, and stated.

  llama_cpp_caches.py model.F32.gguf --base base.kld --state out.jsonl
  llama_cpp_caches.py model.gguf --ids ids.json --ctx 2048 --chunks 2 --state out.jsonl

Prints one JSON object: facts and a row a cache type, with the names of `kvant eval --json`.
Needs numpy and llama_cpp.
"""

import argparse
import ctypes
import hashlib
import json
import os
import pathlib
import struct
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "peers"))

import llama_cpp as lib  # noqa: E402
import llama_cpp_worker as worker  # noqa: E402
import scores as statistics  # noqa: E402

FLOOR = -16.0  # what a logits file does not tell apart: kvant/model/logits_file.h
ROWS_AT_ONCE = 16  # of float64 temporaries as long as the vocabulary
BITS = {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "iq4_nl": 4.5}


class Base:
    """A logits file of llama.cpp's perplexity tool, mapped."""

    def __init__(self, path):
        with open(path, "rb") as file:
            head = file.read(20)
            if head[:8] != b"_logits_":
                raise ValueError(f"{path} is no logits file")
            self.ctx, self.vocab, self.chunks = struct.unpack("<iii", head[8:])
            self.tokens = np.fromfile(file, "<i4", self.chunks * self.ctx)
            start = file.tell()
        self.scored = self.ctx - 1 - self.ctx // 2
        units = 4 + self.vocab + self.vocab % 2
        self.rows = np.memmap(path, "<u2", "r", start, (self.chunks, self.scored, units))

    def log_probs(self, chunk, first, count):
        """[count, vocab] from scored position `first` of `chunk`."""
        rows = np.ascontiguousarray(self.rows[chunk, first:first + count])
        scale, minimum = (rows[:, at:at + 2].copy().view("<f4") for at in (0, 2))
        return rows[:, 4:4 + self.vocab].astype(np.float32) * scale + minimum


def log_sum_exp(logits):
    top = logits.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))


def score_rows(base, base_log_sum, logits, targets, floor):
    """Scores of [rows, vocab] logits against the base's logits. `floor` -inf: all tokens count."""
    rows = np.arange(len(targets))
    log_sum = log_sum_exp(logits)
    wanted = logits[rows, targets].astype(np.float64)
    cut = np.maximum(wanted, logits.max(axis=1) + floor)
    base_nll = base_log_sum - base[rows, targets]
    log_p = base.astype(np.float64) - base_log_sum[:, None]
    log_q = logits.astype(np.float64) - log_sum[:, None]
    terms = np.where(log_p > floor, np.exp(log_p) * (log_p - log_q), 0)
    return {"nll": log_sum - wanted, "delta_nll": log_sum - cut - base_nll,
            "kl": terms.sum(axis=1), "same_top": base.argmax(axis=1) == logits.argmax(axis=1)}


class Scorer:
    """Runs chunks through one model; contexts of all cache types stay open."""

    def __init__(self, options, caches, ctx):
        self.log = []
        self._callback = lib.llama_log_callback(self._keep)
        self.engine = worker.Engine(options.model, options.threads)
        lib.llama_log_set(self._callback, ctypes.c_void_p())
        self.rotation = {}
        self.contexts = {}
        for cache in caches:
            self.log.clear()
            self.contexts[cache] = self.engine.context(cache, ctx)
            lines = [line.split(": ", 1)[-1] for line in self.log if "attn_rot_" in line]
            self.rotation[cache] = "; ".join(dict.fromkeys(lines))
        adds_bos = lib.llama_vocab_get_add_bos(self.engine.vocab)
        self.bos = lib.llama_vocab_bos(self.engine.vocab) if adds_bos else None

    def _keep(self, level, text, data):  # pylint: disable=unused-argument
        self.log.append(text.decode(errors="replace").strip())

    def logits(self, cache, tokens):
        """Yields (first scored position, [rows, vocab] logits), which stay valid until the next."""
        context = self.contexts[cache]
        context.rewind(0)
        half, ctx = len(tokens) // 2, len(tokens)
        fed = tokens.copy()
        if self.bos is not None:
            fed[0] = self.bos
        context.feed(fed[:half].tolist(), half)
        for begin in range(half, ctx, worker.MICRO_BATCH):
            part = fed[begin:begin + worker.MICRO_BATCH].tolist()
            context.feed(part, 0)
            values = lib.llama_get_logits_ith(context.handle, 0)
            rows = np.ctypeslib.as_array(values, (len(part), self.engine.vocab_size))
            count = min(len(part), ctx - 1 - begin)  # nothing follows the last token
            if count > 0:
                yield begin - half, rows[:count]

    def score(self, cache, tokens, base_rows, floor):
        """Lists of scores of one chunk; base_rows(first, count) gives the base's logits."""
        targets = tokens[len(tokens) // 2 + 1:]
        parts = []
        for first, rows in self.logits(cache, tokens):
            for at in range(0, len(rows), ROWS_AT_ONCE):
                own = rows[at:at + ROWS_AT_ONCE]
                begin = first + at
                base = base_rows(begin, len(own))
                base_sum = np.zeros(len(own)) if floor > -np.inf else log_sum_exp(base)
                parts.append(score_rows(base, base_sum, own, targets[begin:begin + len(own)],
                                        floor))
        joined = {key: np.concatenate([part[key] for part in parts]) for key in statistics.KEYS}
        if not all(np.isfinite(joined[key]).all() for key in statistics.KEYS):
            raise RuntimeError(f"llama.cpp's logits with a {cache} cache are not finite")
        return joined


def score_chunk(scorer, caches, tokens, base, chunk):
    """[cache] scores of one chunk."""
    if base is not None:
        def from_file(first, count):
            return base.log_probs(chunk, first, count)
        return [scorer.score(cache, tokens, from_file, FLOOR) for cache in caches]
    own = np.concatenate([rows.copy() for _, rows in scorer.logits(caches[0], tokens)])

    def from_first(first, count):
        return own[first:first + count]
    return [scorer.score(cache, tokens, from_first, -np.inf) for cache in caches]


def open_state(path, facts):
    """The chunks that are there; begins the file if it is none. What was cut off is removed."""
    found, bits, chunks = statistics.read_state(path)
    for key, value in facts.items():
        if found and found.get(key) != value:
            raise ValueError(f"{path} belongs to another evaluation: its {key} is "
                             f"{found.get(key)}, now it is {value}; remove it to start afresh")
    if found:
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"llama_cpp_state": 1, "evaluation": facts}) + "\n")
    return bits, chunks


def add_chunk(path, chunk, bits, scored):
    def listed(scores):
        lists = {key: [float(value) for value in scores[key]] for key in statistics.KEYS[:3]}
        return lists | {"same_top": "".join("01"[int(flag)] for flag in scores["same_top"])}
    line = {"chunk": chunk, "bits_per_value": bits, "scores": [listed(scores) for scores in scored]}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_tokens(options):
    """(tokens [chunks][ctx], base or None)"""
    if options.base:
        base = Base(options.base)
        chunks = min(options.chunks or base.chunks, base.chunks)
        return base.tokens.reshape(base.chunks, base.ctx)[:chunks], base
    with open(options.ids, encoding="utf-8") as file:
        ids = np.array(json.load(file), np.int32)
    return ids, None


def whole_chunks(ids, bos, ctx, chunks):
    """`ids` as the engines cut them: BOS before the text where the model wants it."""
    if bos is not None and (len(ids) == 0 or ids[0] != bos):
        ids = np.concatenate([[np.int32(bos)], ids])
    count = min(chunks or len(ids), len(ids) // ctx)
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one chunk of {ctx}")
    return ids[:count * ctx].reshape(count, ctx)


def evaluate(options):
    caches = options.caches.split(",")
    tokens, base = read_tokens(options)
    ctx = base.ctx if base is not None else options.ctx
    scorer = Scorer(options, caches, ctx)
    if base is None:
        tokens = whole_chunks(tokens, scorer.bos, ctx, options.chunks)
    elif base.vocab != scorer.engine.vocab_size:
        raise ValueError(f"{options.base} has a vocabulary of {base.vocab}, the model one of "
                         f"{scorer.engine.vocab_size}: it was made with another model")
    facts = {"engine": f"llama-cpp-python {lib.__version__}", "caches": caches, "ctx": ctx,
             "weights": os.path.getsize(options.model), "rotation": scorer.rotation,
             "first chunk": hashlib.sha256(tokens[0].tobytes()).hexdigest(),
             "base": os.path.basename(options.base) if options.base else None}
    _, done = open_state(options.state, facts)
    bits = [BITS[cache] for cache in caches]
    start = time.monotonic()
    for chunk in range(len(done), len(tokens)):
        add_chunk(options.state, chunk, bits,
                  score_chunk(scorer, caches, tokens[chunk], base, chunk))
        spent = (time.monotonic() - start) / (chunk + 1 - len(done))
        print(f"llama.cpp: chunk {chunk + 1} of {len(tokens)}, "
              f"{spent * (len(tokens) - chunk - 1):.0f} s left", file=sys.stderr, flush=True)
    _, _, chunks = statistics.read_state(options.state)
    chunks = chunks[:len(tokens)]
    scored = ctx - 1 - ctx // 2
    rows = [{"kv": cache, "bits_per_value": BITS[cache]}
            | statistics.summarize(statistics.join(chunks, index), scored)
            for index, cache in enumerate(caches)]
    return facts | {"chunks": len(chunks), "results": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", help="logits file to compare with; its tokens are the text")
    source.add_argument("--ids", help="JSON array of token ids, as `kvant tokenize` prints it")
    parser.add_argument("--ctx", type=int, default=512, help="with --ids (default: 512)")
    parser.add_argument("--chunks", type=int, default=0, help="0: all")
    parser.add_argument("--caches", default="f16,q8_0,q5_1,q4_1,q4_0,iq4_nl")
    parser.add_argument("--state", required=True, help="file of per-token scores")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    unknown = set(options.caches.split(",")) - set(worker.CACHE_TYPES)
    if unknown:
        parser.error(f"no such cache type: {', '.join(sorted(unknown))}; there are "
                     f"{', '.join(worker.CACHE_TYPES)}")
    try:
        print(json.dumps(evaluate(options)))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"llama_cpp_caches.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
