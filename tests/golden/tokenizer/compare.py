#!/usr/bin/env python3
"""Compares `kvant tokenize` with llama.cpp on many texts, and writes the golden file of the tests.

    compare.py --kvant build/kvant MODEL.gguf ... [--strings 12000] [--seed 1]
        Live comparison on STRINGS generated texts for each model; also with control tokens not
        parsed, and decoding back to the bytes. Exit code 1 on any difference.
    compare.py --kvant build/kvant --variants MODEL.gguf ...
        The same on copies of the files' metadata that ask for other pre-tokenizers (default, gpt-2,
        llama-bpe ...) or for a space in front of the text (as Llama 2 does).
    compare.py --write golden.json MODEL.gguf ...
        Writes the golden file: 600 short texts with llama.cpp's ids for each model.

Needs the Python package llama-cpp-python (0.3.36 wrote the committed file). Texts depend only on the
seed and, for special tokens and token pieces, on the model's vocabulary.
"""
import argparse
import hashlib
import json
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import time

import llama_cpp

RANGES = {
    "latin": [(0x41, 0x5A), (0x61, 0x7A)], "latin1": [(0xC0, 0xFF)], "latin-ext": [(0x100, 0x24F)],
    "ipa": [(0x250, 0x2AF)], "greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "cyrillic": [(0x400, 0x52F)], "armenian": [(0x531, 0x58A)], "hebrew": [(0x591, 0x5F4)],
    "arabic": [(0x600, 0x6FF), (0xFE70, 0xFEFC)], "syriac": [(0x700, 0x74F)],
    "devanagari": [(0x900, 0x97F)], "bengali": [(0x980, 0x9FE)], "tamil": [(0xB82, 0xBFA)],
    "telugu": [(0xC00, 0xC7F)], "malayalam": [(0xD00, 0xD7F)], "thai": [(0xE01, 0xE5B)],
    "lao": [(0xE81, 0xEDF)], "tibetan": [(0xF00, 0xFDA)], "myanmar": [(0x1000, 0x109F)],
    "georgian": [(0x10A0, 0x10FF)], "hangul-jamo": [(0x1100, 0x11FF)],
    "ethiopic": [(0x1200, 0x137C)], "cherokee": [(0x13A0, 0x13FD)], "khmer": [(0x1780, 0x17F9)],
    "mongolian": [(0x1800, 0x18AA)], "hiragana": [(0x3041, 0x309F)], "katakana": [(0x30A0, 0x30FF)],
    "cjk": [(0x4E00, 0x9FFF)], "cjk-ext": [(0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2EBF0, 0x2EE5D)],
    "hangul": [(0xAC00, 0xD7A3)], "gothic": [(0x10330, 0x1034A)], "maths": [(0x1D400, 0x1D7FF)],
    "fullwidth": [(0xFF01, 0xFFEE)], "marks": [(0x300, 0x36F)], "symbols": [(0x2000, 0x2BFF)],
    "numbers": [(0x660, 0x669), (0x966, 0x96F), (0x2150, 0x218B), (0xB2, 0xB9), (0x2460, 0x249B),
                (0x3021, 0x3029), (0x30, 0x39)],
    "private": [(0xE000, 0xF8FF)], "tags": [(0xE0000, 0xE01EF)],
}
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🇩🇪", "🇯🇵", "❤️", "🏳️‍🌈", "🤷🏿‍♂️", "✨", "🀄", "🧑‍🚀", "1️⃣", "©", "™", "🫠", "🪿"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003",
          "\u2028", "\u202f", "\u3000", "\u200b", "\ufeff", "\x1c", "\x1f", "\u180e", "\u2060"]
WORDS = ("the of and to in is that for it was on are as with his they at be this from have or by one "
         "had not but what all were when we there can an your which their said if do will each about "
         "how up out them then she many some so these would other into has more her two like him "
         "attention cache quantization transformer straße naïve façade coöperate jalapeño Zürich "
         "Москва привет мир Ελλάδα שלום مرحبا नमस्ते こんにちは 世界 안녕하세요 สวัสดี").split()
CODE = ["def f(x):\n    return x**2 + 1\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
        "SELECT * FROM t WHERE a >= 10 AND b != 'x';", "<div class=\"a\">&nbsp;</div>\n",
        "{\"key\": [1, 2.5e-3, null, true]}", "#include <vector>\nstd::vector<int> v{1,2,3};",
        "fn main() -> Result<(), Box<dyn Error>> { Ok(()) }", "let x = y?.z ?? `${a}`;",
        "\\frac{1}{2} \\sum_{i=0}^{n} x_i^2", "git commit -m \"fix: don't\" --no-verify && echo $?",
        "0x1F 0b101 1_000_000 3.14159 1e10 #!/bin/sh", "    \t if x == None:\n\n\n\n    pass\r\n\r\n",
        "</s><s>[INST] <<SYS>> ```python\n```", "https://example.org/a?b=c&d=%20#e user@host.net"]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "'vE", "’s", "''", "'",
                "'ſ", "'\u212a", "'x", "I'm", "don't", "WE'LL", "l'été", "'D'D", "' s"]
# Values above U+10FFFF end llama.cpp itself (an exception leaves its C interface).
FATAL = re.compile(rb"\xf4[\x90-\xbf][\x80-\xbf][\x80-\xbf]|[\xf5-\xf7][\x80-\xbf]{3}")


class Texts:
    def __init__(self, seed, pieces, specials, max_bytes):
        self.random = random.Random(seed)
        self.pieces = pieces
        self.specials = specials
        self.max_bytes = max_bytes
        self.makers = [self.script, self.words, self.emoji, self.code, self.control, self.broken,
                       self.special, self.spaces, self.numbers, self.contractions, self.any,
                       self.tokens, self.long, self.mixed, self.marked, self.bytes, self.mutated]

    def character(self, name):
        low, high = self.random.choice(RANGES[name])
        return chr(self.random.randint(low, high))

    def script(self):
        name = self.random.choice(list(RANGES))
        return "".join(self.character(name) if self.random.random() < 0.85 else
                       self.random.choice([" ", ".", ",", "-", "\n", " "])
                       for _ in range(self.random.randint(1, 40))).encode()

    def words(self):
        text = ""
        for _ in range(self.random.randint(1, 20)):
            word = self.random.choice(WORDS)
            word = self.random.choice([word, word, word.capitalize(), word.upper()])
            text += word + self.random.choice([" ", " ", " ", ", ", ". ", "\n", "-", "  "])
        return text.encode()

    def emoji(self):
        return "".join(self.random.choice(EMOJI + [" ", "a", chr(0x1F300 + self.random.randrange(0x400))])
                       for _ in range(self.random.randint(1, 12))).encode()

    def code(self):
        return "".join(self.random.choice(CODE) for _ in range(self.random.randint(1, 3))).encode()

    def control(self):
        return bytes(self.random.choice([self.random.randrange(0x20), 0x7F, 0x20, 0x61, 0x0A])
                     for _ in range(self.random.randint(1, 24)))

    def broken(self):
        text = bytearray(self.random.choice([self.script, self.words, self.emoji])())
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(text) + 1)
            text[at:at + self.random.randrange(3)] = self.random.choice([
                b"", b"\x80", b"\xff", b"\xc3", b"\xe2\x96", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80",
                b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xed\xbf\xbf", b"\xfe", b"\xf8\x88\x80\x80\x80",
                b"\xe2", b"\xe2 ", b"\xf0 ", b"\xf0  ", b"\xf4\x8f\xbf\xbf", b"\xef\xbf\xbf"])
        return bytes(text)

    def special(self):
        text = b""
        for _ in range(self.random.randint(1, 6)):
            token = self.random.choice(self.specials)
            if self.random.random() < 0.25:
                token = token[:self.random.randint(1, len(token))]
            text += token + self.random.choice([b"", b" ", b"\n", b"user\n", b"x", self.words()])
        return text

    def spaces(self):
        return "".join(self.random.choice(SPACES + ["a", "1", "!", "é"]) *
                       self.random.choice([1, 1, 1, 2, 3, 5, 8, 17, 40])
                       for _ in range(self.random.randint(1, 10))).encode()

    def numbers(self):
        return "".join(self.random.choice(["", " ", ".", ",", "-", "e", "×", "\n"]) +
                       "".join(self.character("numbers" if self.random.random() < 0.3 else "latin")
                               if self.random.random() < 0.2 else str(self.random.randrange(10))
                               for _ in range(self.random.randint(1, 9)))
                       for _ in range(self.random.randint(1, 6))).encode()

    def contractions(self):
        return "".join(self.random.choice(CONTRACTIONS + WORDS + [" ", "  ", "\n", "1"])
                       for _ in range(self.random.randint(1, 12))).encode()

    def any(self):
        out = ""
        for _ in range(self.random.randint(1, 24)):
            c = self.random.randrange(self.random.choice([0x80, 0x800, 0x10000, 0x110000]))
            out += " " if 0xD800 <= c < 0xE000 else chr(c)
        return out.encode()

    def tokens(self):
        return b"".join(self.random.choice(self.pieces) for _ in range(self.random.randint(1, 12)))

    def long(self):
        unit = self.random.choice([b"a", b"ab", b"=", b"-", b" ", b"\n", b"aA1", "字".encode(), "é".encode(),
                                   b"ACGT", b"0", b"!?", b"\t", "😀".encode(), b"\x80", b" a", b"\n\n "])
        return (unit * self.random.randint(1, 400))[:self.max_bytes]

    def mixed(self):
        names = list(RANGES)
        return "".join(self.random.choice([self.character(self.random.choice(names)),
                                           self.random.choice(WORDS), self.random.choice(SPACES),
                                           self.random.choice(EMOJI), str(self.random.randrange(1000))])
                       for _ in range(self.random.randint(1, 16))).encode()

    def marked(self):
        return "".join(self.random.choice(["▁", "▁▁", " ", "  ", "a", "Ġ", "Ċ", "the", "<0x0A>", "▁the"])
                       for _ in range(self.random.randint(1, 10))).encode()

    def bytes(self):
        return bytes(self.random.randrange(256) for _ in range(self.random.randint(1, 40)))

    def mutated(self):
        text = bytearray(self.code() + self.words())
        for _ in range(self.random.randint(1, 8)):
            text[self.random.randrange(len(text))] = self.random.randrange(128)
        return bytes(text)

    def make(self, count):
        """`count` different texts; the kinds take turns."""
        out, seen = [b""], {b""}
        while len(out) < count:
            text = self.makers[len(out) % len(self.makers)]()[:self.max_bytes]
            while FATAL.search(text):
                text = FATAL.sub(b"", text)
            if text not in seen or self.random.random() < 0.05:
                out.append(text)
                seen.add(text)
        return out


class Oracle:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model.model)
        size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.pieces, self.specials, self.ends = [], [], []
        for i in range(size):
            text = llama_cpp.llama_vocab_get_text(self.vocab, i)
            attributes = llama_cpp.llama_vocab_get_attr(self.vocab, i)
            if llama_cpp.llama_vocab_is_eog(self.vocab, i):
                self.ends.append(i)
            if attributes & (1 | 8 | 16):
                self.specials.append(text)
            else:
                piece = self.model.detokenize([i])
                if piece:
                    self.pieces.append(piece)

    def missing_bytes(self):
        """Bytes that no token of a byte-level BPE vocabulary stands for."""
        own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in own]
        spelling = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}
        known = {llama_cpp.llama_vocab_get_text(self.vocab, i)
                 for i in range(llama_cpp.llama_vocab_n_tokens(self.vocab))}
        return {b for b, text in spelling.items() if text.encode() not in known}

    def ids(self, text, special=True):
        return self.model.tokenize(text, add_bos=False, special=special)


def to_json(text):
    return json.dumps(text.decode("utf-8", "surrogateescape"))


def kvant_lines(program, path, lines, *options):
    command = [program, "tokenize", str(path), "--lines", *options]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {done.stderr}")
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def compare(program, path, count, seed):
    oracle = Oracle(path)
    texts = Texts(seed, oracle.pieces, oracle.specials, 4000).make(count)
    lines = [to_json(text) for text in texts]
    differences = 0

    def check(name, expected, found, show):
        nonlocal differences
        wrong = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
        for i in wrong[:5]:
            print(f"  {name}: {texts[i]!r}\n    expected {show(expected[i])}\n    found    {show(found[i])}")
        differences += len(wrong)
        print(f"{oracle.path.name}: {name}: {len(expected)} texts, {len(wrong)} differences", flush=True)

    started = time.time()
    parsed = [oracle.ids(text) for text in texts]
    print(f"{oracle.path.name}: {sum(map(len, texts))} bytes, {sum(map(len, parsed))} ids, "
          f"llama.cpp took {time.time() - started:.1f} s", flush=True)
    check("ids", parsed, kvant_lines(program, path, lines), str)
    check("ids, --no-special", [oracle.ids(text, False) for text in texts],
          kvant_lines(program, path, lines, "--no-special"), str)
    back = kvant_lines(program, path, [json.dumps(ids) for ids in parsed], "--decode")
    back = [text.encode("utf-8", "surrogateescape") for text in back]
    # What the ids still know: byte-level BPE reads broken UTF-8 as U+FFFD and leaves out bytes that the
    # vocabulary lacks (SmolLM2 has no 0xf1, for example); SentencePiece has one token for a space and
    # U+2581.
    byte_pairs = llama_cpp.llama_vocab_type(oracle.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE
    missing = oracle.missing_bytes()
    kept = [i for i, text in enumerate(texts)
            if (is_utf8(text) and missing.isdisjoint(text) if byte_pairs else "▁".encode() not in text)]
    texts_kept, back_kept = [texts[i] for i in kept], [back[i] for i in kept]
    texts, all_texts = texts_kept, texts
    check("bytes restored", texts_kept, back_kept, repr)
    texts = all_texts
    return differences


def is_utf8(text):
    try:
        text.decode()
        return True
    except UnicodeDecodeError:
        return False


def metadata(path):
    """The metadata of a GGUF file: {key: (type, bytes of the value)}."""
    data = pathlib.Path(path).read_bytes()
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    number = lambda form, at: struct.unpack_from(form, data, at)[0]
    after_string = lambda at: at + 8 + number("<Q", at)

    def after(kind, at):
        if kind == 8:
            return after_string(at)
        if kind != 9:
            return at + sizes[kind]
        item, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if item != 8:
            return at + sizes[item] * count
        for _ in range(count):
            at = after_string(at)
        return at

    at, out = 24, {}
    for _ in range(number("<Q", 16)):
        end = after_string(at)
        key, kind = data[at + 8:end].decode(), number("<I", end)
        at = after(kind, end + 4)
        out[key] = (kind, data[end + 4:at])
    return out


def write_variant(path, changes, folder):
    """A file with the metadata of `path`, changed, and no tensors."""
    string = lambda text: struct.pack("<Q", len(text)) + text.encode()
    entries = metadata(path)
    for key, value in changes.items():
        entries[key] = (7, bytes([value])) if isinstance(value, bool) else (8, string(value))
    name = pathlib.Path(path).stem + "".join(f",{k.split('.')[-1]}={v}" for k, v in changes.items())
    out = pathlib.Path(folder) / f"{name}.gguf"
    body = b"".join(string(key) + struct.pack("<I", kind) + value for key, (kind, value) in entries.items())
    out.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + body)
    return out


def variants(path, folder):
    if metadata(path)["tokenizer.ggml.model"][1][8:] == b"llama":
        changes = [{"tokenizer.ggml.add_space_prefix": True}]
    else:
        changes = [{"tokenizer.ggml.pre": pre}
                   for pre in ("default", "gpt-2", "llama-bpe", "smollm", "qwen2", "dbrx")]
    return [write_variant(path, change, folder) for change in changes]


def write_golden(output, paths, seed):
    oracles = [Oracle(path) for path in paths]
    specials = sorted({s for o in oracles for s in o.specials if len(s) < 24})
    pieces = sorted({p for o in oracles for p in o.pieces[::97]})
    texts = Texts(seed, pieces, specials, 40).make(600)
    golden = {"llama_cpp_python": llama_cpp.__version__, "seed": seed, "models": {}, "texts": []}
    for oracle in oracles:
        golden["models"][oracle.path.name] = {
            "sha256": hashlib.sha256(oracle.path.read_bytes()).hexdigest(),
            "end_of_generation": oracle.ends,
            "ids": [oracle.ids(text) for text in texts],
            "ids_no_special": {i: ids for i, text in enumerate(texts)
                               if (ids := oracle.ids(text, False)) != oracle.ids(text)},
        }
    # Hexadecimal, because many texts are not UTF-8.
    golden["texts"] = [text.hex() for text in texts]
    pathlib.Path(output).write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--kvant", help="the program to compare")
    parser.add_argument("--write", help="the golden file to write")
    parser.add_argument("--strings", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", action="store_true", help="compare changed copies of the files")
    arguments = parser.parse_args()
    if arguments.write:
        write_golden(arguments.write, arguments.models, arguments.seed)
    if arguments.kvant:
        with tempfile.TemporaryDirectory() as folder:
            paths = arguments.models
            if arguments.variants:
                paths = [copy for path in paths for copy in variants(path, folder)]
            sys.exit(any([compare(arguments.kvant, path, arguments.strings, arguments.seed)
                          for path in paths]))


if __name__ == "__main__":
    main()
