#!/usr/bin/env python3
"""Holds the scripts of this folder to `kvant eval`.

Usage: scores_test.py KVANT MODEL      KVANT: the program; MODEL: a small GGUF file

Where numpy is missing, what needs it is skipped.
"""

import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unittest

import scores

try:
    import numpy
    from dequantize_gguf import dequantize
    from gguf_numpy import Gguf
except ImportError:
    numpy = None

CTX, CHUNKS = 256, 3  # 127 scored tokens a chunk: a whole block and a shorter one
SCORED = CTX - 1 - CTX // 2
KVANT, MODEL = sys.argv[1:3] if len(sys.argv) == 3 else (None, None)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
          "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "rms_norm_eps": 1e-5,
          "max_position_embeddings": CTX, "rope_theta": 10000.0, "tie_word_embeddings": True}


def write_base(path, vocab, seed):
    """A logits file of random tokens and random predictions."""
    numbers = random.Random(seed)
    with open(path, "wb") as out:
        out.write(b"_logits_" + struct.pack("<iii", CTX, vocab, CHUNKS))
        out.write(struct.pack(f"<{CHUNKS * CTX}i",
                              *(numbers.randrange(vocab) for _ in range(CHUNKS * CTX))))
        for _ in range(CHUNKS * SCORED):
            logits = [numbers.gauss(0, 1) for _ in range(vocab)]
            log_sum = math.log(sum(map(math.exp, logits)))
            scale = (max(logits) - min(logits)) / 65535
            out.write(struct.pack("<ff", scale, min(logits) - log_sum))
            codes = [round((logit - min(logits)) / scale) for logit in logits] + [0] * (vocab % 2)
            out.write(struct.pack(f"<{len(codes)}H", *(min(code, 65535) for code in codes)))


def evaluate(config, base, state):
    shown = subprocess.run([KVANT, "eval", config, "--weights", "dummy", "--kl-base", base, "--kv",
                            "bf16,int8,mxfp4", "--resume", state, "--json", "--quiet"],
                           check=True, stdout=subprocess.PIPE)
    return json.loads(shown.stdout)


class AgainstKvant(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.base = f"{cls.folder.name}/base.kld"
        cls.state = f"{cls.folder.name}/state.jsonl"
        config = pathlib.Path(cls.folder.name, "config.json")
        config.write_text(json.dumps(CONFIG), encoding="utf-8")
        write_base(cls.base, CONFIG["vocab_size"], 1)
        cls.report = evaluate(config, cls.base, cls.state)
        _, cls.bits, cls.chunks = scores.read_state(cls.state)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def assert_close(self, own, reported):
        for key, value in own.items():
            self.assertTrue(math.isclose(value, reported[key], rel_tol=1e-6, abs_tol=1e-9),
                            f"{key}: {value}, kvant says {reported[key]}")

    def test_summaries(self):
        self.assertEqual(len(self.chunks), CHUNKS)
        for index, row in enumerate(self.report["results"]):
            self.assert_close(scores.summarize(scores.join(self.chunks, index), SCORED), row)
            self.assertEqual(self.bits[index], row["bits_per_value"])
        self.assertGreater(self.report["results"][2]["kl_high"],
                           self.report["results"][2]["kl_low"])

    def test_pairs(self):
        names = [row["kv"] for row in self.report["results"]]
        self.assertTrue(self.report["paired"])
        for pair in self.report["paired"]:
            a, b = (scores.join(self.chunks, names.index(pair[side])) for side in "ab")
            own = scores.compare_kl(a, b, SCORED)
            self.assertNotEqual(own["kl_difference"], 0)
            self.assert_close({key: own[key] for key in ("kl_difference", "p")}, pair)

    def test_a_line_that_was_cut_off_does_not_count(self):
        with open(self.state, "rb") as file:
            whole = file.read()
        cut = f"{self.folder.name}/cut.jsonl"
        with open(cut, "wb") as file:
            file.write(whole[:-10])
        self.assertEqual(len(scores.read_state(cut)[2]), CHUNKS - 1)
        self.assertEqual(scores.read_state(f"{self.folder.name}/none.jsonl"), ({}, [], []))


class Statistics(unittest.TestCase):
    def test_whole_chunks_are_resampled_from_thirty_on(self):
        values = [float(i // 100) for i in range(3000)]  # 30 chunks that differ, alike inside
        row = {"kl": values, "nll": values, "delta_nll": values, "same_top": [1] * 3000}
        wide = scores.summarize(row, 100)
        narrow = scores.summarize({key: row[key][:2900] for key in scores.KEYS}, 100)
        self.assertGreater(wide["kl_high"] - wide["kl_low"],
                           1.1 * (narrow["kl_high"] - narrow["kl_low"]))

    def test_equal_formats_do_not_differ(self):
        row = {"kl": [0.5] * 200}
        self.assertEqual(scores.compare_kl(row, row, 100)["p"], 1)
        self.assertEqual(scores.quantile([4, 1, 3, 2], 0.9), 3.7)


@unittest.skipUnless(numpy, "needs numpy")
class Dequantize(unittest.TestCase):
    def test_keeps_everything_but_the_types(self):
        with tempfile.TemporaryDirectory() as folder:
            target = f"{folder}/model.F32.gguf"
            dequantize(MODEL, target)
            before, after = Gguf(MODEL), Gguf(target)
            self.assertEqual(after.metadata.keys(), before.metadata.keys())
            self.assertEqual(after.metadata.get("general.file_type", 0), 0)
            self.assertEqual(list(after.tensor_dims()), list(before.tensor_dims()))
            for name, size in after.tensor_bytes():
                self.assertEqual(size, 4 * after.tensor(name).size, name)
            for name, _ in before.tensor_dims():
                self.assertTrue(numpy.array_equal(before.tensor(name), after.tensor(name)), name)


if __name__ == "__main__":
    if KVANT is None:
        sys.exit(__doc__)
    unittest.main(argv=sys.argv[:1])
