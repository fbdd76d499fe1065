#!/usr/bin/env python3
"""Two tasks for EleutherAI's lm-eval, made from the bundled corpus: the true continuation of a passage among three false
ones, and the perplexity of passages. With them lm-eval measures a running `kvant serve` and needs no network: it asks
the server for tokens too. Standard library only (lm-eval itself comes from PyPI: `pip install "lm-eval[api]"`).

  bench/quality/lm_eval_task.py tasks
  lm-eval run --model local-completions --include_path tasks --tasks kvant_continuation,kvant_perplexity \\
      --model_args model=NAME,base_url=http://127.0.0.1:8000/v1/completions,tokenizer_backend=remote,num_concurrent=8
"""
import argparse
import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
"""
CONTINUATION = """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def passages(path, words):
    text = path.read_text(encoding="utf-8").split()
    return [text[i:i + words] for i in range(0, len(text) - words + 1, words)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder, made if it is not there")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "data" / "novel.txt")
    parser.add_argument("--count", type=int, default=100, help="questions")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    parts = [(words[:80], words[80:96]) for words in passages(options.text, 96)]
    draw.shuffle(parts)
    questions = []
    for number, (context, continuation) in enumerate(parts[:options.count]):
        others = [other for i, (_, other) in enumerate(parts) if i != number]
        choices = [" ".join(words) for words in [continuation, *draw.sample(others, 3)]]
        order = draw.sample(range(4), 4)
        questions.append({"context": " ".join(context), "choices": [choices[i] for i in order], "label": order.index(0)})
    texts = [{"text": " ".join(words)} for words in passages(options.text, 300)[:options.count // 4]]
    for name, rows, task in [("kvant_continuation", questions, CONTINUATION), ("kvant_perplexity", texts, PERPLEXITY)]:
        data = (options.out / f"{name}.jsonl").resolve()
        write_lines(data, rows)
        (options.out / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + task, encoding="utf-8")
        print(f"{options.out / name}.yaml: {len(rows)} documents")


if __name__ == "__main__":
    main()
