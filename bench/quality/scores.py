"""Per-token scores of cache formats, and the same statistics of them as `kvant eval` reports.

A score is a dictionary of lists, one value a scored token, in text order: `nll`, `delta_nll`, `kl`
and `same_top` (0 or 1), as a state of `kvant eval --resume` holds them. Python alone, no numpy.

kvant/model/eval_stats.h says what each statistic is; this is a second writing of it, so that other
engines' rows stand beside kvant's with the same intervals. scores_test.py holds it to kvant's.
"""

import json
import math

MIN_CHUNKS_TO_RESAMPLE = 30
BLOCK_TOKENS = 64
RESAMPLES = 2000
KEYS = ("nll", "delta_nll", "kl", "same_top")


def read_state(path):
    """(facts of the evaluation, bits per value, chunks) of a state; chunks: [chunk][format] scores.

    Like kvant, takes a last line without its end as not written. No file is no chunk.
    """
    facts, bits, chunks = {}, [], []
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return facts, bits, chunks
    for number, line in enumerate(text.split("\n")[:-1]):
        parsed = json.loads(line)
        if number == 0:
            facts = parsed["evaluation"]
        elif "chunk" in parsed:
            bits = parsed["bits_per_value"]
            for scores in parsed["scores"]:
                scores["same_top"] = [int(flag) for flag in scores["same_top"]]
            chunks.append(parsed["scores"])
    return facts, bits, chunks


def join(chunks, index, count=None):
    """Scores of format `index` over the first `count` chunks."""
    return {key: [value for chunk in chunks[:count] for value in chunk[index][key]]
            for key in KEYS}


def _blocks(values, tokens_per_chunk):
    chunks = len(values) // tokens_per_chunk
    size = tokens_per_chunk if chunks >= MIN_CHUNKS_TO_RESAMPLE else BLOCK_TOKENS
    blocks = []
    for chunk in range(0, len(values), tokens_per_chunk):
        end = min(chunk + tokens_per_chunk, len(values))
        for start in range(chunk, end, size):
            part = values[start:min(start + size, end)]
            blocks.append((sum(part), len(part)))
    return blocks


def _random_numbers():
    """splitmix64 (Steele, Lea, Flood 2014) from kvant's seed."""
    mask = (1 << 64) - 1
    state = 20240607
    while True:
        state = (state + 0x9e3779b97f4a7c15) & mask
        z = ((state ^ (state >> 30)) * 0xbf58476d1ce4e5b9) & mask
        z = ((z ^ (z >> 27)) * 0x94d049bb133111eb) & mask
        yield z ^ (z >> 31)


def _bootstrap_means(values, tokens_per_chunk):
    blocks = _blocks(values, tokens_per_chunk)
    random = _random_numbers()
    means = []
    for _ in range(RESAMPLES):
        drawn = [blocks[next(random) % len(blocks)] for _ in blocks]
        means.append(sum(block[0] for block in drawn) / sum(block[1] for block in drawn))
    return means


def quantile(values, fraction):
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    index = int(position)
    if index + 1 == len(ordered):
        return ordered[index]
    return ordered[index] + (position - index) * (ordered[index + 1] - ordered[index])


def _mean(values):
    return sum(values) / len(values)


def summarize(scores, tokens_per_chunk):
    """The numbers of one row of `kvant eval --json`, under the same names."""
    kl_means = _bootstrap_means(scores["kl"], tokens_per_chunk)
    delta_means = _bootstrap_means(scores["delta_nll"], tokens_per_chunk)
    nll = _mean(scores["nll"])
    return {"nll": nll, "ppl": math.exp(nll), "kl_mean": _mean(scores["kl"]),
            "kl_low": quantile(kl_means, 0.025), "kl_high": quantile(kl_means, 0.975),
            "kl_median": quantile(scores["kl"], 0.5), "kl_p99": quantile(scores["kl"], 0.99),
            "top1": _mean(scores["same_top"]), "delta_nll": _mean(scores["delta_nll"]),
            "delta_nll_low": quantile(delta_means, 0.025),
            "delta_nll_high": quantile(delta_means, 0.975)}


def compare_kl(a, b, tokens_per_chunk):
    """KL(a) - KL(b) on the same tokens: mean, 95 % interval, and the p of its sign."""
    differences = [x - y for x, y in zip(a["kl"], b["kl"], strict=True)]
    means = _bootstrap_means(differences, tokens_per_chunk)
    up = sum(mean >= 0 for mean in means)
    down = sum(mean <= 0 for mean in means)
    share = (min(up, down) + 1) / (RESAMPLES + 1)
    blocks = len(_blocks(differences, tokens_per_chunk))
    return {"kl_difference": _mean(differences), "low": quantile(means, 0.025),
            "high": quantile(means, 0.975), "p": min(1.0, 2 * max(share, 2.0 ** -blocks))}
