"""README.md says what is true: its example runs as printed, its options exist, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3Config, TrainingArguments

import balora

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / ".figures" / "README.md").read_text(encoding="utf-8")


def commands():
    """Every `python SCRIPT ...` and `torchrun ... -- SCRIPT ...` of the README, without the shell's loops."""
    text = README.replace("\\\n", " ").replace("eval.py $b", "eval.py gsm8k").replace("lambda$2", "lambda1")
    found = re.findall(r"(?:python|--) ((?:train_nlg|train_nlu|eval)\.py[^`;#\n&]*)", text)
    return [shlex.split(re.sub(r"[()<>]", "", line)) for line in found]


def test_it_is_short_and_no_line_is_long():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 110] == []


def test_the_notebook_example_runs_as_printed(tmp_path):
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "trainable" in done.stdout
    assert (tmp_path / "out/notebook/adapter_model.safetensors").exists()


def test_the_loop_and_the_trainer_example_run_as_printed(tmp_path, monkeypatch):
    """All three terms act, the teacher stays exact through both, the adapter loads in peft."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    base = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16))
    base.save_pretrained("path/to/base")
    ids = torch.randint(10, 300, (24, 20))
    labels = ids.masked_fill(torch.arange(20) < 12, -100)
    rows = [dict(input_ids=i, attention_mask=torch.ones_like(i), labels=y) for i, y in zip(ids, labels)]
    whole = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    found = dict(rows=rows, batches=[{name: x[i : i + 8] for name, x in whole.items()} for i in (0, 8, 16)])
    text = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    loop, trainer = text.split("\n\n\nclass ")
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20
    exec(loop, found)
    assert all(value != 0 for value in found["terms"].values()) and len(found["terms"]) == 4
    net = found["net"]
    with torch.no_grad():
        before, after = base(ids).logits, net(ids).logits
        with balora.teacher(net):
            assert torch.equal(net(ids).logits, before)
    exec(f"class {trainer}", found)
    net.eval()
    with torch.no_grad():
        last = net(ids).logits
        with balora.teacher(net):
            assert torch.equal(net(ids).logits, before)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("path/to/base"), "out/adapter")
        moved = (last - before).abs().max()
        assert (after - before).abs().max() > 1e-3 and (last - after).abs().max() > 1e-4
        assert moved > 1e-3 and (again(ids).logits - last).abs().max() < moved / 100
    trainer = found["BALoRATrainer"](net, TrainingArguments("out/trainer"), train_dataset=rows)
    assert trainer.evaluate(rows[:4])["eval_loss"] > 0


def test_the_loops_are_bash():
    (loops,) = re.findall(r"```bash\n(.*?)```", README, re.S)
    subprocess.run(["bash", "-n"], input=loops, text=True, check=True)
    for block in re.findall(r"```bash\n(.*?)```", RESULTS, re.S):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.parametrize("script", ["train_nlg", "train_nlu", "eval"])
def test_every_option_exists(script, capsys):
    main = __import__(script).main
    texts = {}
    checked = 0
    for name, *words in commands():
        if name != f"{script}.py":
            continue
        command = words[:1] if script == "eval" else []
        if tuple(command) not in texts:
            with pytest.raises(SystemExit) as end:
                main([*command, "--help"])
            assert not end.value.code
            texts[tuple(command)] = capsys.readouterr().out
        for option in re.findall(r"--(\w+)", " ".join(words)):
            assert re.search(rf"--{option}\b", texts[tuple(command)]), f"{name} {words}: --{option}"
            checked += 1
    assert checked


@pytest.mark.parametrize(
    "text,folder", [(README, ROOT), (RESULTS, ROOT / ".figures")], ids=["README", "results"]
)
def test_every_link_leads_somewhere(text, folder):
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else None
        assert target is None or target.exists(), link
        if anchor:
            page = text if target is None else target.read_text(encoding="utf-8")
            heads = re.findall(r"^#+ (.*)$", page, re.M)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs + re.findall(r'<a id="([^"]+)">', page), link
