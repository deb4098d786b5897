"""Malformed files and bad command lines, generated: one line that says what is wrong, no traceback, no hang, no silence."""

import dataclasses
import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import small_folder
from safetensors.torch import load_file, save_file

import balora
import model
import train_nlg
import train_nlu

BAD = [0, -1, 1.5, "x", "", [], {}, True, 10**12, math.nan]
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small model, an adapter for it and a place for their malformed copies, in the working directory."""
    monkeypatch.chdir(tmp_path)
    small_folder("base")
    net, _ = model.load("base")
    balora.attach(net, "pissa", r=4)
    balora.save_adapter(net, "adapter")
    return tmp_path


def outcome(call, *arguments):
    """-> the line that a call is refused with, "" where it is accepted; anything else is a failure."""
    start = time.time()
    try:
        call(*arguments)
        line = ""
    except (ValueError, OSError) as e:
        line = " ".join(str(e).split())
        assert line, "refused without a word"
    assert time.time() - start < 10
    return line


def copy_with(source, file, change):
    """A copy of the folder `source`, in which `file` is change(its bytes)."""
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(source, "copy")
    path = Path("copy", file)
    path.write_bytes(change(path.read_bytes()))


def with_field(name, value):
    return lambda text: json.dumps({**json.loads(text), name: value}).encode()


def test_fields_of_config_json(folder):
    names = [*json.loads(Path("base/config.json").read_text()), "num_key_value_heads", "head_dim"]
    calls = 0
    for name in dict.fromkeys(names):
        for value in [*BAD, 10**7] if name == "num_hidden_layers" else BAD:
            copy_with("base", "config.json", with_field(name, value))
            line = outcome(model.load, "copy")
            assert line.startswith("copy") or not line, (name, value, line)
            assert line or name not in SIZES, f"{name}={value!r} was accepted"
            calls += 1
    assert calls > 130


def test_end_tokens_of_generation_config(folder):
    for value in ("x", {}, [{}], [[]]):
        Path("base/generation_config.json").write_text(json.dumps(dict(eos_token_id=value)))
        assert outcome(model.load, "base").startswith("base/generation_config.json"), value


def test_cut_and_random_files(folder):
    rng = random.Random(0)
    for file in ("model.safetensors", "config.json"):
        for _ in range(20):
            copy_with("base", file, lambda data: data[: rng.randrange(len(data) - 1)])
            assert outcome(model.load, "copy").startswith("copy"), file
            copy_with("base", file, lambda data: rng.randbytes(100))
            assert outcome(model.load, "copy").startswith("copy"), file
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        for _ in range(10):
            net, _ = model.load("base")
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            copy_with("adapter", file, lambda data: data[: rng.randrange(len(data) - 1)])
            assert outcome(balora.load_adapter, net, "copy"), file
            assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_weights_that_are_no_finite_numbers(folder):
    state = load_file("base/model.safetensors")
    name = next(iter(state))
    for bad in (torch.full_like(state[name], math.nan), state[name].to(torch.int64), state[name][:1]):
        shutil.copytree("base", "copy", dirs_exist_ok=True)
        save_file({**state, name: bad.contiguous()}, "copy/model.safetensors")
        assert name in outcome(model.load, "copy")


def test_fields_of_an_adapter(folder):
    calls = 0
    for name in json.loads(Path("adapter/adapter_config.json").read_text()):
        for value in BAD:
            copy_with("adapter", "adapter_config.json", with_field(name, value))
            line = outcome(lambda: balora.load_adapter(model.load("base")[0], "copy"))
            assert line or name != "peft_type", f"{name}={value!r} was accepted"
            calls += 1
    assert calls > 100


TEXTS = ["", "{", "[]", "null", "3", '"x"', "[1, 2]", '{"a": 1}', "\x00\x01", '[{"instruction": 1}]']
TEXTS += ['[{"instruction": "a", "output": {"b": 1}}]', '[{"messages": 3}]', '[{"messages": [1]}]']
TEXTS += [
    '[{"messages": [{"role": "user"}]}]',
    '[{"instruction": null, "output": null}]',
    "a,b\n1",
    "a,b\n1,2,3",
]


def test_rows(folder):
    for kind in ("json", "jsonl", "csv", "parquet"):
        for text in TEXTS:
            Path(f"rows.{kind}").write_text(text)
            argv = [
                "--init=base",
                f"--data=rows.{kind}",
                "--template=plain",
                "--eval_rows=1",
                "--max_iters=1",
            ]
            assert "rows." + kind in outcome(train_nlg.main, argv), (kind, text)


@pytest.mark.parametrize("script, init", [(train_nlg, "tiny"), (train_nlu, "tiny")], ids=["nlg", "nlu"])
def test_command_lines(script, init, folder, capsys):
    names = [f.name for f in dataclasses.fields(script.Settings) if f.name != "options"]
    names += sorted({name for method in balora.METHODS.values() for name in method.options})
    calls = 0
    for name in names:
        for value in ("", "nan", "-1", "1e309", "x", "9" * 20):
            outcome(script.main, ["--dry_run", f"--init={init}", f"--{name}={value}"])
            calls += 1
    assert calls > 200
    for option in (
        "--r=nan",
        "--r=0",
        "--alpha=-1",
        "--T=0",
        "--epochs=1e309",
        "--max_len=" + "9" * 20,
        "--k=x",
    ):
        assert outcome(script.main, ["--dry_run", f"--init={init}", option]), option
