"""Every race of tests/bench.py runs on a tiny network and prints its ratios. Sizes are small, so no ratio means anything."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = ["--init=tiny", "--turns=1", "--rows=2", "--length=24", "--r=4", "--dtype=float32"]


def ratios(*words, init="tiny"):
    """The pairs and kinds of the ratios that a race prints: {("here", "peft"): {"time": 0.5}}"""
    command = [sys.executable, os.path.join(ROOT, "tests", "bench.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = {}
    for name, other, values in re.findall(r"^(\S+) / (\S+): (.*)$", done.stdout, re.M):
        numbers = re.findall(r"([a-z/]+) (\d+\.\d+)", values)
        found.setdefault((name, other), {}).update({kind: float(value) for kind, value in numbers})
    return found


def test_a_step_beside_peft_and_the_authors_formulation():
    found = ratios("step", *SMALL)
    pairs = {("balora", "authors"), ("pissa", "pissa-peft"), ("balora", "pissa"), ("balora-4", "pissa")}
    assert found.keys() == pairs
    assert all(values["time"] > 0 and values["memory"] > 0 for values in found.values())


def test_a_step_of_other_methods_only():
    assert ratios("step", *SMALL, "--only=balora,pissa,dora").keys() == {("balora", "pissa")}


def test_starting_values_are_no_worse_than_those_of_peft():
    found = ratios("init", *SMALL)[("here", "peft")]
    assert found["time"] > 0 and found["residual"] < 1.005


def test_an_encoder():
    found = ratios("encoder", "--init=tiny-encoder", *SMALL[1:])
    assert found[("here", "transformers")]["time"] > 0


def test_generation_writes_what_transformers_writes(tmp_path):
    rows = [{"instruction": "Add " + " and ".join("123"[: n + 1]), "output": "6"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = ratios("generate", *SMALL, f"--data={tmp_path / 'rows.jsonl'}", "--max_new=6")
    assert found[("here", "transformers")]["tokens/s"] > 0


def test_offsets_survive_16_bits_and_whole_factors_do_not():
    found = ratios("precision", *SMALL, "--steps=2")
    assert found[("residual", "offset")]["error"] > 100


def test_an_unknown_race_is_refused():
    with pytest.raises(AssertionError, match="invalid choice"):
        ratios("stride")
