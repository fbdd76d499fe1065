#!/usr/bin/env python3
"""How often does a greedy answer change with the company it is computed in, and with the prefix cache?

Sends the same prompts of real text several times, greedy and with log-probabilities: each alone and cold, --batch at a
time and cold, alone again as a prefix hit, and alone and cold once more, which should change nothing. Cold runs have a
cache_salt of their own. Each is compared with the first: how many answers diverge, at which token first, and how far
the best two log-probabilities are apart there (a gap of nothing is a coin tossed either way). Prints a Markdown table,
or with --json one object. Standard library only; works with other servers that speak vLLM's API, too.

  bench/serving/divergences.py models/smollm2.gguf                               starts kvant serve itself
  bench/serving/divergences.py models/smollm2.gguf -- --device cuda --kv nvfp4   with these options of kvant serve
  bench/serving/divergences.py http://127.0.0.1:8000
"""
import argparse
import json
import random
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from servers import ROOT, call, kvant_server

LONGEST = 3200  # characters of a prompt, and so more than its tokens


def make_prompts(options):
    """Pieces of the text of 800 to 3200 characters (about 200 to 1700 tokens), from word to word, at random places."""
    text = Path(options.text).read_text(encoding="utf-8")
    if len(text) < 8000:
        sys.exit(f"{options.text}: {len(text)} characters; expected at least 8000")
    draw = random.Random(options.seed)
    prompts = []
    while len(prompts) < options.prompts:
        size = draw.randrange(800, LONGEST)
        start = text.find(" ", draw.randrange(len(text) - LONGEST - 100)) + 1
        prompts.append(text[start:text.rfind(" ", start, start + size)])
    return prompts


def ask(url, model, options, prompt, salt):
    response = call(url + "/v1/completions", {
        "model": model, "prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True,
        "logprobs": 2, "return_tokens_as_token_ids": True, "cache_salt": salt}, options.api_key)
    logprobs = response["choices"][0]["logprobs"]
    usage = response["usage"]
    return {"tokens": logprobs["tokens"], "top": logprobs["top_logprobs"], "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0}


def run(url, model, options, prompts, name, at_a_time, salt):
    answers = []
    with ThreadPoolExecutor(at_a_time) as pool:
        for answer in pool.map(lambda prompt: ask(url, model, options, prompt, salt), prompts):
            answers.append(answer)
            if sys.stderr.isatty():
                print(f"{name}: {len(answers)} of {len(prompts)} answers", end="\r", file=sys.stderr, flush=True)
    print(f"{name}: done", file=sys.stderr)
    return answers


def first_difference(a, b):
    """The token at which two answers part, or None."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def gap(top):
    """Between the best two log-probabilities of one position."""
    best = sorted(top.values(), reverse=True)
    return best[0] - best[1] if len(best) > 1 else 0.0


def compare(name, reference, answers):
    at, gaps = [], []
    for one, other in zip(reference, answers):
        place = first_difference(one["tokens"], other["tokens"])
        if place is None:
            continue
        at.append(place)
        longer = one if place < len(one["tokens"]) else other
        gaps.append(gap(longer["top"][place]))
    prompt_tokens = sum(answer["prompt_tokens"] for answer in answers)
    return {"compared": name, "answers": len(answers), "diverged": len(at),
            "share": len(at) / len(answers),
            "first_divergence_median": statistics.median(at) if at else None,
            "gap_median": statistics.median(gaps) if gaps else None, "gap_max": max(gaps) if gaps else None,
            "prompt_tokens": prompt_tokens,
            "cached_share": sum(answer["cached_tokens"] for answer in answers) / prompt_tokens}


def measure(url, options):
    model = call(url + "/v1/models", api_key=options.api_key)["data"][0]["id"]
    prompts = make_prompts(options)
    # Not those of an earlier run against the same server.
    salt = f"divergences-{random.SystemRandom().randrange(1 << 48):x}-"
    alone = run(url, model, options, prompts, "alone, cold", 1, salt + "alone")
    hits = run(url, model, options, prompts, "alone, prefix hit", 1, salt + "alone")
    batch = run(url, model, options, prompts, f"{options.batch} at a time, cold", options.batch, salt + "batch")
    again = run(url, model, options, prompts, "alone, cold, again", 1, salt + "again")
    rows = [compare(f"{options.batch} at a time", alone, batch), compare("a prefix hit", alone, hits),
            compare("the same again", alone, again)]
    if rows[1]["cached_share"] == 0:
        print("no prompt token came from the cache: is the prefix cache on?", file=sys.stderr)
    return {"schema_version": 1, "model": model, "prompts": options.prompts, "max_tokens": options.tokens,
            "batch": options.batch, "seed": options.seed, "serve_options": options.serve_options, "results": rows}


def markdown(report):
    lines = ["| against an answer alone and cold | answers | diverge | first at token (median) | "
             "gap of the best two there, nats: median, max | prompt from the cache |", "|---|---|---|---|---|---|"]
    for row in report["results"]:
        some = row["diverged"] > 0
        lines.append(f"| {row['compared']} | {row['answers']} | {row['diverged']} ({row['share'] * 100:.0f} %) | "
                     + (f"{row['first_divergence_median']:g} | {row['gap_median']:.3f}, {row['gap_max']:.3f}" if some
                        else "- | -") + f" | {row['cached_share'] * 100:.0f} % |")
    return "\n".join(lines)


def main():
    arguments = sys.argv[1:]
    own = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="URL of a server, or a GGUF file to serve; options of kvant serve come after --")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="requests at a time (default: %(default)s)")
    parser.add_argument("--text", default=str(ROOT / "examples" / "data" / "registers.txt"),
                        help="file that prompts are cut from (default: the bundled text)")
    parser.add_argument("--seed", type=int, default=1, help="where they are cut")
    parser.add_argument("--api-key")
    parser.add_argument("--build", default=str(ROOT / "build"), help="folder of the program")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args(arguments[:own])
    options.serve_options = arguments[own + 1:]
    if "://" in options.target:
        report = measure(options.target.rstrip("/"), options)
    else:
        with kvant_server(Path(options.build) / "kvant", options.target, "--quiet", "--no-access-log",
                          "--max-model-len", LONGEST + options.tokens, "--max-num-seqs", options.batch,
                          *options.serve_options) as started:
            report = measure(started["url"], options)
    print(json.dumps(report) if options.json else markdown(report))


if __name__ == "__main__":
    main()
