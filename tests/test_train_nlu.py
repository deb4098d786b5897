"""train_nlu.py through its command line: resume, the teacher's column, accumulation, what cannot act, bad input, every family."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, log, randomise, same_run

import balora
import eval
import model
import train_nlu

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A small BERT, 60 rows of uneven length to train on and 24 to evaluate on, in the working directory. The label is in the first word."""
    monkeypatch.chdir(tmp_path)
    tok = model.WordPiece([*model.WordPiece.control, *WORDS])
    config = model.encoder_config("bert", len(tok.vocab), 48, 2, 4, 80, max_len=64, dropout=0.1)
    randomise(model.Transformer(config)).save("base", tok)
    rng = random.Random(0)
    for name, n in (("rows", 60), ("dev", 24)):
        rows = [
            {
                "premise": " ".join([f"w{i % 3}"] + rng.choices(WORDS, k=rng.randrange(1, 20))),
                "hypothesis": " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))),
                "label": ("entailment", "neutral", "contradiction")[i % 3],
            }
            for i in range(n)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


COMMON = [
    "--init=base",
    "--task=mnli",
    "--data=rows.jsonl",
    "--eval_data=dev.jsonl",
    "--batch_size=8",
    "--r=4",
    "--learning_rate=1e-2",
    "--epochs=2",
    "--max_len=40",
]


def train(*argv):
    train_nlu.main([*COMMON, *argv])


def evaluations(out):
    return json.load(open(f"{out}/eval.json"))


@pytest.mark.parametrize("method", list(balora.METHODS))
def test_every_method_trains_and_leaves_its_run_folder(base, method, capsys):
    train(f"--method={method}", "--out_dir=o", *(["--learning_rate=1e-3"] if method == "full" else []))
    out = capsys.readouterr().out
    for word in (
        "classes 0 entailment, 1 neutral, 2 contradiction",
        "trainable",
        "best on dev",
        "before",
        "recall_neutral",
        "drift",
    ):
        assert word in out, word
    first, *_, last = evaluations("o")
    assert first["drift"] == 0 and last["drift"] > 0 and last["step"] == 16 and len(evaluations("o")) == 3
    files = {p.name for p in (base / "o").iterdir()}
    assert files == {
        "config.json",
        "log.jsonl",
        "eval.json",
        "checkpoint.pt",
        "features.npz",
        "loss.png",
        "model" if method == "full" else "adapter",
    }
    if method != "full":
        net, tok = model.load("base", task="classify", n_classes=3)
        balora.load_adapter(net, "o/adapter")
        examples = train_nlu.encode(
            train_nlu.read_file("mnli", "dev", "dev.jsonl"),
            tok,
            eval.parse(train_nlu.Settings, COMMON),
            "bert",
        )
        Z, features = train_nlu.predict(net, examples, "cpu")
        assert (
            eval.scores([y for _, y in examples], Z, train_nlu.TASKS["mnli"].labels)["accuracy"]
            == last["accuracy"]
        )
        with np.load("o/features.npz") as saved:
            assert np.abs(saved["features"] - features.numpy()).max() < 1e-4 and saved["y"].tolist() == [
                y for _, y in examples
            ]


@pytest.mark.parametrize(
    "method", ["balora", "bitfit", "hadapter", "padapter", "adalora", "lora-ga", "corda++", "lora-fa"]
)
def test_stopped_and_resumed_equals_uninterrupted(base, method, monkeypatch):
    argv = [
        f"--method={method}",
        *(["--probe"] if method in ("balora", "bitfit", "lora-ga") else []),
        "--calibration=4",
        "--rounds=2",
        *(["--correct_B"] if method == "lora-fa" else []),
    ]
    train(*argv, "--out_dir=whole")
    real, saves = eval.save_checkpoint, []

    def save_then_stop(out, step, *rest, **more):
        real(out, step, *rest, **more)
        saves.append(step)
        if out == "parts" and step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(*argv, "--out_dir=parts")
    torch.manual_seed(123)
    monkeypatch.setattr(balora, "statistics", lambda *a, **k: pytest.fail("a resumed run measures nothing"))
    train(*argv, "--out_dir=parts", "--resume")
    assert saves == [8, 16]
    same_run("whole", "parts")


def test_sigkill(base):
    argv = [sys.executable, str(ROOT / "train_nlu.py"), *COMMON, "--save_interval=2", "--max_iters=30"]
    subprocess.run([*argv, "--out_dir=whole"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*argv, "--out_dir=parts", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None and not (base / "parts/checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (base / "parts/loss.png").exists(), "the run ended before it could be killed"
    subprocess.run([*argv, "--out_dir=parts", "--resume"], check=True, capture_output=True)
    same_run("whole", "parts")


def test_the_teachers_column_is_the_network_before_step_1_under_any_padding(base):
    net, tok = model.load("base", task="classify", n_classes=3, seed=0)
    s = eval.parse(train_nlu.Settings, COMMON)
    examples = train_nlu.encode(train_nlu.read_file("mnli", "train", "rows.jsonl"), tok, s, "bert")
    balora.attach(net, "balora", r=4)
    Z, _ = train_nlu.predict(net, examples, "cpu", batch_size=7)
    net.eval()
    for i, (ids, _) in enumerate(examples):
        padded = torch.tensor([ids + [0] * (50 - len(ids))])
        with torch.no_grad(), balora.teacher(net):
            assert (
                net(padded, padded.new_tensor([[1] * len(ids) + [0] * (50 - len(ids))])) - Z[i]
            ).abs().max() < 1e-5
    train("--out_dir=o", "--dropout=0", "--cls_dropout=0")
    column = torch.load("o/checkpoint.pt", weights_only=True)["Z_P"]["train"]
    assert (column - Z).abs().max() < 1e-5 and log("o")[0]["cr"] == pytest.approx(0, abs=1e-9)


def test_accumulation_equals_the_large_batch(base):
    for name, size in (("one", 8), ("four", 2), ("uneven", 3)):
        train(
            "--max_iters=4",
            "--lambda2=0",
            "--lambda3=0",
            "--no-schedule",
            "--dropout=0",
            "--cls_dropout=0",
            f"--micro_batch={size}",
            f"--out_dir={name}",
        )
    for name in ("four", "uneven"):
        for a, b in zip(log("one"), log(name)):
            for term in ("task", "cr", "grad_norm"):
                assert a[term] == pytest.approx(b[term], rel=2e-3, abs=1e-6), (name, a["step"], term)


def test_lambda_zero_is_pissa_step_for_step(base):
    train("--method=pissa", "--out_dir=p")
    train("--lambda1=0", "--lambda2=0", "--lambda3=0", "--out_dir=b")
    assert log("p") == log("b")


def test_against_runs_the_others_on_the_same_seed_and_data(base, capsys):
    train("--against=pissa,lora", "--out_dir=o")
    out = capsys.readouterr().out
    assert all((base / name / "eval.json").exists() for name in ("o", "o-pissa", "o-lora"))
    table = out[out.rindex("before") :]
    assert "balora" in table and "pissa" in table and "lora" in table and "macro_f1" in table


def test_against_takes_each_method_once_and_its_own_lambdas(base, capsys):
    train("--method=pissa", "--against=pissa,lora,lora", "--lambda1=0.5", "--max_iters=2", "--out_dir=o")
    assert capsys.readouterr().out.count("seed 0 ->") == 2 and log("o")[0]["cr"] is not None
    assert [json.load(open(f"{out}/config.json"))["settings"]["lambda1"] for out in ("o", "o-lora")] == [
        0.5,
        0.0,
    ]


def test_default_run_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_nlu.main(["--pretrain_iters=3", "--max_iters=3", "--epochs=1"])
    out = capsys.readouterr().out
    for word in (
        "balora, seed 0 -> out/tiny-world-balora-0",
        "pissa, seed 0 -> out/tiny-world-pissa-0",
        "0 entailment               800       800",
        "recall_contradiction",
        "drift",
    ):
        assert word in out, word
    record = json.load(open("out/tiny-world-pissa-0/config.json"))
    assert (
        record["rows"] == {"dev": 600, "train": 1120}
        and record["classes"] == [[0, 800], [1, 240], [2, 80]]
        and record["trainable"] == 36_864
    )
    train_nlu.main(
        ["--pretrain_iters=3", "--max_iters=3", "--method=pissa", "--out_dir=again"]
    )  # its preset's --against=pissa is this very run
    assert log("again") == log("out/tiny-world-pissa-0")


def test_noise_imbalance_and_strata_are_said_and_recorded(base, capsys):
    train("--label_noise=0.25", "--imbalance=10:5:2", "--stratified", "--max_iters=2", "--out_dir=o")
    out = capsys.readouterr().out
    assert "flipped" in out and "34" in out  # 20 + 10 + 4 rows are left of 3 x 20
    settings = json.load(open("o/config.json"))["settings"]
    assert settings["label_noise"] == 0.25 and settings["imbalance"] == "10:5:2" and settings["stratified"]
    assert json.load(open("o/config.json"))["labels"] == ["entailment", "neutral", "contradiction"]


def test_probe_gives_the_teacher_something_to_say(base, capsys):
    train("--max_iters=1", "--out_dir=plain")
    train("--max_iters=1", "--probe", "--out_dir=probed")
    y = [label for *_, label in train_nlu.read_file("mnli", "train", "rows.jsonl")]
    plain, probed = (
        F.cross_entropy(
            torch.load(f"{out}/checkpoint.pt", weights_only=True)["Z_P"]["train"], torch.tensor(y)
        )
        for out in ("plain", "probed")
    )
    assert probed < plain - 0.01 and "on 6 held-out training rows" in capsys.readouterr().out


def test_scores_as_labels_and_what_cannot_act(base, capsys):
    rows = [{"sentence1": f"w{i % 9} w3", "sentence2": "w5", "label": (i % 9) / 2} for i in range(40)]
    (base / "sts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [
        "--init=base",
        "--task=stsb",
        "--data=sts.jsonl",
        "--batch_size=8",
        "--r=4",
        "--learning_rate=1e-2",
        "--epochs=4",
        "--out_dir=o",
    ]
    train_nlu.main(argv)
    out = capsys.readouterr().out
    for term in ("CR", "DR", "SVDR"):
        assert f"L_{term} cannot act here" in out
    assert (
        all(r["cr"] is None and r["dr"] is None and r["svdr"] is None for r in log("o")) and "combined" in out
    )
    train_nlu.main([*argv, "--regularize=features", "--overwrite"])
    assert (
        log("o")[-1]["dr"] > 0 and log("o")[-1]["svdr"] < 0 and "L_CR cannot act" in capsys.readouterr().out
    )
    train("--max_iters=1", "--out_dir=three")
    assert "L_SVDR: k = 2 of min(N, D) = 3" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["roberta", "deberta", "t5"])
def test_other_families(family, tmp_path, monkeypatch, shared, capsys):
    """With their real tokenizers."""
    monkeypatch.chdir(tmp_path)
    source = shared / "tokenizers" / {"roberta": "roberta", "deberta": "deberta-v3", "t5": "t5"}[family]
    size = {"roberta": 50265, "deberta": 128100, "t5": 32128}[family]
    config = (
        model.t5_config(size, 16, 2, 2, 8, 32)
        if family == "t5"
        else model.encoder_config(
            family, size, 16, 2, 2, 32, pad=int(family == "roberta"), max_len=64, buckets=8
        )
    )
    randomise(model.Transformer(config)).save("base")
    for path in source.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    rows = [
        {"premise": "It rains " * (i % 5 + 1), "hypothesis": "The sun shines", "label": i % 3}
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [
        "--init=base",
        "--task=mnli",
        "--data=rows.jsonl",
        "--eval_data=rows.jsonl",
        "--batch_size=8",
        "--r=4",
        "--epochs=2",
        "--learning_rate=1e-2",
        "--out_dir=o",
    ]
    train_nlu.main(argv)
    assert evaluations("o")[-1]["step"] == 6
    if family == "t5":
        sts = [{"sentence1": "a", "sentence2": "b", "score": 1.5} for _ in range(20)]
        (tmp_path / "sts.jsonl").write_text(
            "\n".join(json.dumps(row | {"label": row["score"]}) for row in sts)
        )
        for more, words in (
            (["--task=stsb", "--data=sts.jsonl"], "T5 answers with a label word"),
            (["--probe"], "no new head"),
        ):
            with pytest.raises(ValueError, match=words):
                train_nlu.main([*argv, *more, "--overwrite"])


def test_features_figure(base, capsys):
    for method in ("lora", "pissa"):
        train(f"--method={method}", f"--out_dir={method}")
    eval.main(["features", "lora", "pissa", "--out=f.png"])
    out = capsys.readouterr().out
    assert "silhouette" in out and out.count("contradiction") >= 2 and (base / "f.png").stat().st_size > 5000
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 40)
    apart, mixed = rng.normal(size=(80, 5)) + 20 * y[:, None], rng.normal(size=(80, 5))
    (good, recalls), (bad, chance) = eval.separation(apart, y), eval.separation(mixed, y)
    assert good > 0.8 and recalls == [1.0, 1.0] and abs(bad) < 0.1 and max(chance) < 0.8
    with pytest.raises(ValueError, match="features.npz"):
        eval.main(["features", "nowhere"])
    with pytest.raises(ValueError, match="is a classifier"):
        eval.main(["sample", "--run=lora", "--prompt=x"])


def test_dry_run_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for init, words in (
        ("deberta-v3-base", "1,327,104 by the method"),
        ("t5-base", "attn.q_proj"),
        ("minilm", "331,776 by the method"),
    ):
        train_nlu.main([f"--init={init}", "--task=rte", "--dry_run"])
        out = capsys.readouterr().out
        assert words in out and "together" in out and "attention scores included" in out
    assert not any(tmp_path.iterdir())


def test_dry_run_counts_what_autograd_keeps(base, capsys):
    """The activation part against saved tensors of a real step, all rows at full length."""
    train("--dry_run", "--method=lora", "--micro_batch=8")
    line = next(line for line in capsys.readouterr().out.splitlines() if "activations" in line)
    net, _ = model.load("base", task="classify", n_classes=3)
    balora.attach(net, "lora", r=4)
    net.train()
    kept = {}
    ids = torch.full((8, 40), 7)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        Z = net(ids, torch.ones_like(ids, dtype=torch.bool))
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights) / 2**30
    assert Z.requires_grad and real > 0 and abs(float(line.split()[-1]) - real) < 0.3 * real + 0.01


def test_bad_input_is_one_line(base):
    (base / "odd.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": "maybe"}')
    for argv, words in (
        (["--method=balor"], "did you mean balora"),
        (["--task=mnly"], "did you mean mnli"),
        (["--r=0"], "--r=0"),
        (["--r=99"], "smallest dimension"),
        (["--alpha=0"], "--alpha=0"),
        (["--lambda1=-1"], "--lambda1=-1"),
        (["--regularize=heads"], "logits or features"),
        (["--label_noise=2"], "label_noise"),
        (["--imbalance=1:2"], "expected 3 numbers"),
        (["--init=tiny"], "leave both out"),
        (["--data=none.jsonl"], "none.jsonl"),
        (["--data=odd.jsonl"], "unknown label 'maybe'"),
        (["--targets=gate_proj"], "nothing matches gate_proj"),
        (["--max_len=2"], "max_len=2"),
        (["--learning_rate=1e30", "--method=full", "--grad_clip=0"], "not finite"),
        (["--label_smoothing=1"], "label_smoothing"),
        (["--pretrain_iters=0"], "pretrain_iters"),
        (["--task=stsb", "--stratified"], "--stratified needs classes"),
        (["--correct_B", "--method=lora"], "of lora-fa"),
        (["--method=adalora", "--adalora_first=9", "--adalora_last=9"], "16 steps"),
        (["--devise=cpu"], "did you mean device"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            train(*argv, "--out_dir=bad", "--overwrite")
        assert "\n" not in str(e.value)
    (base / "long.jsonl").write_text(json.dumps({"premise": "w1 " * 70, "hypothesis": "w2", "label": 0}))
    with pytest.raises(ValueError, match="a row has 74 tokens, and base has positions for 64"):
        train("--eval_data=long.jsonl", "--max_len=80", "--out_dir=worse")
    assert not (base / "worse").exists()  # all of this before anything is written
    train("--max_iters=1", "--out_dir=o")
    with pytest.raises(ValueError, match="other settings: seed"):
        train("--max_iters=1", "--out_dir=o", "--seed=3", "--resume")
    with pytest.raises(ValueError, match="--resume goes on"):
        train("--max_iters=1", "--out_dir=o")


def test_label_smoothing_and_loss(base):
    Z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    smooth = balora.loss_nlu(Z, y, lambdas=(0, 0, 0), label_smoothing=0.1)[0]
    by_hand = 0.9 * F.cross_entropy(Z, y) - 0.1 * F.log_softmax(Z, -1).mean()
    torch.testing.assert_close(smooth, by_hand)


def test_compare_nlu_trains_each_method_alone(base, monkeypatch, capsys):
    """The script's own metric chooses the rate; a preset's --against adds nothing; --metric=loss takes the lowest."""
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda argv, **kwargs: (
            (train_nlu.main(argv[2:]), subprocess.CompletedProcess(argv, 0))[1]
            if "train_nlu.py" in str(argv[1])
            else subprocess.CompletedProcess(argv, 0, stdout="")
        ),
    )
    argv = ["compare", "nlu", "--methods=lora,bitfit", "--sweep_lr=1e-4,1e-2", "--seeds=0,1", "--out=c"]
    options = ["--", *[word for word in COMMON if "learning_rate" not in word]]
    with pytest.raises(ValueError, match="--against behind --: compare sets that itself"):
        eval.main([*argv, *options, "--against=pissa"])
    eval.main([*argv, *options])
    out = capsys.readouterr().out
    assert (
        sorted(p.name for p in (base / "c").iterdir() if p.is_dir() and "1e-2-0" in p.name)
        == ["bitfit-1e-2-0", "lora-1e-2-0"]
        and "accuracy" in out.split("\nseeds 0, 1")[1]
    )
    eval.main([*argv, "--metric=loss", *options])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lora "))
    at = {lr: evaluations(f"c/lora-{lr}-0")[-1]["loss"] for lr in ("1e-4", "1e-2")}
    assert row.split()[2] == min(at, key=at.get)
