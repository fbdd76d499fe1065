#!/usr/bin/env python3
"""Runs llama.cpp, through llama-cpp-python, for bench/peers/run.py: one request a line, one answer a line.

It is a process of its own so that its threads and memory are its own, and it stays alive between
rounds so that a long context is filled only once. Requests and answers are JSON objects on standard
input and output:

  {"do": "about"}                                                    -> {"version", "system"}
  {"do": "perplexity", "cache", "text", "ctx", "chunks", "batch"}    -> {"perplexity"}
  {"do": "decode", "cache", "depth", "tokens"}                       -> {"seconds_per_token"}
  {"do": "prefill", "cache", "tokens"}                               -> {"seconds_per_token"}
  {"do": "forget"}  (frees all contexts)                             -> {}

  echo '{"do": "about"}' | bench/peers/llama_cpp_worker.py model.gguf 2
"""

import ctypes
import json
import math
import sys
import time

import llama_cpp as lib
import numpy as np

CACHE_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q5_1": lib.GGML_TYPE_Q5_1,
               "q5_0": lib.GGML_TYPE_Q5_0, "q4_1": lib.GGML_TYPE_Q4_1, "q4_0": lib.GGML_TYPE_Q4_0,
               "iq4_nl": lib.GGML_TYPE_IQ4_NL}
FLASH_ATTENTION_ON = 1
BATCH = 2048  # llama.cpp's defaults: a batch of 2048 tokens, computed 512 at a time
MICRO_BATCH = 512


class Context:
    """A context of one cache type. Attributes: the tokens that are in its cache."""

    def __init__(self, model, cache, context_tokens, threads):
        params = lib.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = BATCH
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHE_TYPES[cache]
        params.flash_attn_type = FLASH_ATTENTION_ON
        params.swa_full = False  # as its command-line programs do: windows keep only what they see
        self.handle = lib.llama_init_from_model(model, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp cannot make a context of {context_tokens} tokens, {cache}")
        self.filled = 0
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def close(self):
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.handle)

    def rewind(self, tokens):
        """Keeps the first `tokens` of the cache."""
        memory = lib.llama_get_memory(self.handle)
        if tokens == 0:
            lib.llama_memory_clear(memory, False)
        elif not lib.llama_memory_seq_rm(memory, 0, tokens, -1):
            raise RuntimeError("llama.cpp cannot remove the newest tokens of this model's cache")
        self.filled = tokens

    def feed(self, ids, first_with_logits):
        """Appends at most BATCH tokens; those from `first_with_logits` on give logits."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self.filled + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first_with_logits
        if lib.llama_decode(self.handle, batch) != 0:
            raise RuntimeError(f"llama_decode failed after {self.filled} tokens")
        self.filled += len(ids)

    def prefill(self, ids):
        for begin in range(0, len(ids), BATCH):
            part = ids[begin:begin + BATCH]
            self.feed(part, len(part) - 1)
        lib.llama_synchronize(self.handle)


class Engine:
    def __init__(self, path, threads):
        lib.llama_log_set(_SILENT, ctypes.c_void_p())
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        self.threads = threads
        self.contexts = {}

    def context(self, cache, tokens):
        """A context of this cache type for this many tokens, kept until `forget`."""
        capacity = -(-tokens // 256) * 256
        context = self.contexts.get((cache, capacity))
        if context is None:
            context = Context(self.model, cache, capacity, self.threads)
            self.contexts[cache, capacity] = context
            context.feed(self.some_ids(2), 1)  # warm-up, as llama-bench does
            context.rewind(0)
        return context

    def some_ids(self, count):
        """Any ids will do: speed does not depend on them."""
        return [(i * 7919 + 13) % self.vocab_size for i in range(count)]

    def about(self, _):
        system = lib.llama_print_system_info().decode()
        return {"version": f"llama-cpp-python {lib.__version__}", "system": system}

    def forget(self, _):
        for context in self.contexts.values():
            context.close()
        self.contexts = {}
        return {}

    def decode(self, request):
        depth, count = request["depth"], request["tokens"]
        context = self.context(request["cache"], depth + count)
        if context.filled < depth:
            context.rewind(0)
            context.prefill(self.some_ids(depth))
        context.rewind(depth)
        ids = self.some_ids(count)
        start = time.perf_counter()
        for token in ids:
            context.feed([token], 0)
            lib.llama_synchronize(context.handle)
        return {"seconds_per_token": (time.perf_counter() - start) / count}

    def prefill(self, request):
        count = request["tokens"]
        context = self.context(request["cache"], count)
        context.rewind(0)
        ids = self.some_ids(count)
        start = time.perf_counter()
        context.prefill(ids)
        return {"seconds_per_token": (time.perf_counter() - start) / count}

    def tokenize(self, text):
        data = text.encode()
        ids = (lib.llama_token * (len(data) + 16))()
        add_special = lib.llama_vocab_get_add_bos(self.vocab)
        count = lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, False)
        if count < 0:
            raise RuntimeError("llama.cpp cannot tokenise the text")
        return list(ids[:count])

    def perplexity(self, request):
        """The protocol of llama.cpp's perplexity tool: see docs/accuracy.md."""
        ctx = request["ctx"]
        with open(request["text"], encoding="utf-8", newline="") as file:  # line ends as they are
            ids = self.tokenize(file.read(request["chunks"] * ctx * 16))
        chunks = min(request["chunks"], len(ids) // ctx)
        if chunks == 0:
            raise RuntimeError(f"the text is shorter than {ctx} tokens")
        context = self.context(request["cache"], ctx)
        total, scored = 0.0, 0
        for chunk in range(chunks):
            part = ids[chunk * ctx:(chunk + 1) * ctx]
            if lib.llama_vocab_get_add_bos(self.vocab):
                part[0] = lib.llama_vocab_bos(self.vocab)
            context.rewind(0)
            for begin in range(0, ctx, request["batch"]):
                rows = part[begin:begin + request["batch"]]
                context.feed(rows, ctx // 2 - begin)
                for i in range(len(rows)):
                    if ctx // 2 <= begin + i < ctx - 1:
                        total += self.surprise(context, i, part[begin + i + 1])
                        scored += 1
        return {"perplexity": math.exp(total / scored), "tokens": scored}

    def surprise(self, context, row, token):
        """-log p(token) by the logits of this row of the last batch."""
        values = lib.llama_get_logits_ith(context.handle, row)
        logits = np.ctypeslib.as_array(values, (self.vocab_size,)).astype(np.float64)
        top = logits.max()
        return top + math.log(np.exp(logits - top).sum()) - logits[token]


@lib.llama_log_callback
def _SILENT(level, text, data):  # pylint: disable=unused-argument
    pass


def main():
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 64
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    actions = {"about": engine.about, "perplexity": engine.perplexity, "decode": engine.decode,
               "prefill": engine.prefill, "forget": engine.forget}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request["do"]](request)
        except (RuntimeError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
