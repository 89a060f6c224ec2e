"""Zero-shot accuracy three ways on the same examples: `abq eval`, the harness's own model, by hand. One JSON record.

    python benchmarks/zero_shot_check.py --model MODEL --task-path DIR --examples 50 --out benchmarks/results/NAME.json

By hand means without the harness: the prompts are written out below, each answer is one forward pass of its own, and
the answer with the largest sum of log-probabilities (for acc_norm: divided by its length in characters) is taken.
All three must agree to the last example.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from pathlib import Path

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from abq_llm.evaluation import local_tasks
from abq_llm.integrations.lm_eval import evaluate_tasks, load_tasks
from abq_llm.models import load_model


def by_hand(task: str, doc: dict) -> tuple[list[tuple[str, str]], list[str], int]:
    """([(context, continuation)], the answers whose length counts, index of the right one) of an example."""
    if task == "piqa":
        answers, right = [doc["sol1"], doc["sol2"]], doc["label"]
        context = f"Question: {doc['goal']}\nAnswer:"
    elif task.startswith("arc"):
        answers, right = doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"])
        context = f"Question: {doc['question']}\nAnswer:"
    elif task == "boolq":
        answers, right = ["no", "yes"], doc["label"]
        context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
    elif task == "hellaswag":
        answers, right = [cleaned(ending) for ending in doc["endings"]], int(doc["label"])
        context = cleaned(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    else:  # winogrande compares contexts: what follows the blank is the same for both
        before, after = doc["sentence"].split("_", 1)
        contexts = [before + doc[option] for option in ("option1", "option2")]
        return [(context, f" {after.strip()}") for context in contexts], contexts, int(doc["answer"]) - 1
    return [(context, f" {answer}") for answer in answers], answers, right


def cleaned(text: str) -> str:
    """HellaSwag's WikiHow part has [title] and other brackets in it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@torch.inference_mode()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = len(tokenizer.encode(context.rstrip()))  # spaces at the end belong to the continuation
    tokens = torch.tensor([tokenizer.encode(context + continuation)])
    log_p = model(tokens[:, :-1]).logits[0].log_softmax(-1)
    return log_p[start - 1 :].gather(1, tokens[0, start:, None]).sum().item()


def scores_by_hand(model, tokenizer, task: str, docs: list[dict]) -> dict[str, float]:
    acc, acc_norm = [], []
    for doc in docs:
        pairs, answers, right = by_hand(task, doc)
        values = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
        normed = [value / len(answer) for value, answer in zip(values, answers, strict=True)]
        acc.append(values.index(max(values)) == right)
        acc_norm.append(normed.index(max(normed)) == right)
    return {"acc": sum(acc) / len(docs), "acc_norm": sum(acc_norm) / len(docs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task-path", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    tasks = list(local_tasks.TASKS)
    started = time.monotonic()
    ours = evaluate_tasks(model, tokenizer, tasks, task_path=args.task_path, limit=args.examples)
    seconds = time.monotonic() - started
    own_model = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=1)
    loaded = load_tasks(tasks, args.task_path)
    harness = lm_eval.evaluate(own_model, loaded, limit=args.examples, log_samples=False)["results"]
    rows = []
    for task in tasks:
        docs = local_tasks.read(task, args.task_path)[: args.examples]
        compared = [key for key in ("acc", "acc_norm") if getattr(ours[task], key) is not None]
        by_definition = scores_by_hand(model, tokenizer, task, docs)
        row = {
            "task": task,
            "examples": len(docs),
            "abq": {key: getattr(ours[task], key) for key in compared},
            "harness": {key: harness[task][f"{key},none"] for key in compared},
            "by_hand": {key: by_definition[key] for key in compared},
        }
        row["equal"] = row["abq"] == row["harness"] == row["by_hand"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "device": platform.processor() or platform.machine(),
        "model": Path(args.model).stem,
        "versions": {
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds_abq": seconds,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
