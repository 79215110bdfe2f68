"""lm-eval tasks over local files, of every kind of request; lm-eval itself is optional, and slow to import."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# The choices are here without the space before them, which lm-eval puts there.
QUESTIONS: list[dict[str, Any]] = [
    {"context": "It was a dark night, number", "choices": ["1, and the rain", "two", "é中"], "gold": 0},
    {"context": "Nobody", "choices": ["spoke.", "spoke at all."], "gold": 0},
    {"context": "The rain fell in", "choices": ["torrents", "t", "to", "tor"], "gold": 1},
    {"context": "def area(width,", "choices": ["height):", "heights"], "gold": 0},
    {"context": "蒼梧雲杳杳，", "choices": ["湘浦月沈沈", "月"], "gold": 1},
    {"context": "x " * 140 + "and a context that is too long", "choices": ["for it", "x"], "gold": 0},
    {"context": "", "choices": ["It was", "Nobody"], "gold": 1},
]
CHOICE: dict[str, Any] = {
    "task": "local_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
}
WORD = {
    "task": "local_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + choices[0]}}",
    "metric_list": [{"metric": name} for name in ("perplexity", "acc")],
}
ROLLING = {
    "task": "local_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{context}} {{choices[0]}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
GENERATION = {
    "task": "local_generation",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}
GROUP = {
    "group": "local_group",
    "task": ["local_choice", "local_other"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def write_tasks(directory: Path, *tasks: dict[str, Any], rows: Sequence[dict[str, Any]] = QUESTIONS) -> Path:
    """Writes tasks over rows as YAML, the data beside them; returns the directory, for --include."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
    }
    for task in tasks:
        content = task if "group" in task else source | task
        (directory / f"{task.get('group', task['task'])}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return directory
