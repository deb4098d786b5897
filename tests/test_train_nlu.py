"""train_nlu.py through its command line: resume, the teacher's logits, accumulation, what cannot act, bad input, every family."""

import csv
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
import transformers
from conftest import ROOT, encoder_config, log, randomise, same_run, t5_config
from tokenizers import BertWordPieceTokenizer

import balora
import eval
import model
import train_nlg
import train_nlu

WORDS = [f"w{i}" for i in range(60)]
SHARES = ["--adalora_first=0.1", "--adalora_last=0.3", "--adalora_every=0.01"]
OWN = {  # what a method needs in a run of 16 steps on 60 rows
    "adalora": SHARES,
    "full": ["--learning_rate=1e-3"],
    "lora-ga": ["--calibration=4"],
    "corda": ["--calibration=4"],
    "corda++": ["--calibration=4", "--rounds=2"],
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_base()
    return tmp_path


def write_base():
    """Write a small BERT, 60 rows of uneven length to train on, 24 to evaluate on; the label is in the first word."""
    vocab = {token: i for i, token in enumerate([*train_nlu.CONTROL, *WORDS])}
    config = encoder_config("bert", len(vocab), dropout=0.1)
    randomise(model.Transformer(config)).save("base")
    BertWordPieceTokenizer(vocab).save("base/tokenizer.json")
    rng = random.Random(0)
    for name, n in (("rows", 60), ("dev", 24)):
        rows = []
        for i in range(n):
            premise = " ".join([f"w{i % 3}"] + rng.choices(WORDS, k=rng.randrange(1, 20)))
            hypothesis = " ".join(rng.choices(WORDS, k=rng.randrange(1, 9)))
            label = ("entailment", "neutral", "contradiction")[i % 3]
            rows.append(dict(premise=premise, hypothesis=hypothesis, label=label))
        write(f"{name}.jsonl", rows)


def write(path, rows):
    with open(path, "w") as f:
        f.write("\n".join(map(json.dumps, rows)))


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


def teachers_logits(out):
    return torch.load(f"{out}/checkpoint.pt", weights_only=True)["Z_P"]


def examples_of(name, tok):
    return train_nlu.encode(train_nlu.read_file("mnli", "dev", f"{name}.jsonl"), tok, 40)


@pytest.mark.parametrize("method", list(balora.METHODS))
def test_every_method_trains_and_leaves_its_run_folder(base, method, capsys):
    train(f"--method={method}", "--out_dir=o", *OWN.get(method, []))
    out = capsys.readouterr().out
    for word in ("trained 60 rows: 20 entailment", "trainable", "best accuracy on dev", "before", "drift"):
        assert word in out, word
    first, *_, last = evaluations("o")
    assert first["drift"] == 0 and last["drift"] > 0 and last["step"] == 16 and len(evaluations("o")) == 3
    files = {"config.json", "log.jsonl", "eval.json", "checkpoint.pt", "features.npz", "loss.png", ".lock"}
    assert {p.name for p in (base / "o").iterdir()} == files | {"model" if method == "full" else "adapter"}
    if method == "full":
        net, tok = model.load("o/model", task="classify", n_classes=3)
    else:
        net, tok = model.load("base", task="classify", n_classes=3)
        balora.load_adapter(net, "o/adapter")
    examples = examples_of("dev", tok)
    Z, features = train_nlu.predict(net, examples)
    y = [label for _, label in examples]
    assert train_nlu.scores(y, Z, train_nlu.TASKS["mnli"].labels)["accuracy"] == last["accuracy"]
    with np.load("o/features.npz") as saved:
        assert np.abs(saved["features"] - features.numpy()).max() < 1e-4
        assert saved["y"].tolist() == y and saved["labels"].tolist() == [
            "entailment",
            "neutral",
            "contradiction",
        ]


@pytest.mark.parametrize(
    "method", ["balora", "bitfit", "hadapter", "padapter", "adalora", "lora-ga", "corda++", "lora-fa", "full"]
)
def test_stopped_and_resumed_equals_uninterrupted(base, method, monkeypatch):
    argv = [f"--method={method}", *OWN.get(method, [])]
    if method in ("balora", "bitfit", "lora-ga"):
        argv.append("--probe")
    train(*argv, "--out_dir=whole")
    real = train_nlg.Run.save
    saves = []

    def save_then_stop(run, step, *rest, **more):
        real(run, step, *rest, **more)
        saves.append(step)
        if run.out == "parts" and step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_nlg.Run, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(*argv, "--out_dir=parts")
    torch.manual_seed(123)
    monkeypatch.setattr(train_nlu, "row_loss", lambda *a: pytest.fail("a resumed run measures nothing"))
    train(*argv, "--out_dir=parts", "--resume")
    assert saves == [8, 16]
    if method == "full":
        assert log("whole") == log("parts") and evaluations("whole") == evaluations("parts")
    else:
        same_run("whole", "parts")


def test_sigkill(base):
    argv = [sys.executable, str(ROOT / "train_nlu.py"), *COMMON, "--eval_interval=6", "--max_iters=30"]
    subprocess.run([*argv, "--out_dir=whole"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*argv, "--out_dir=parts", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None and not (base / "parts/checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not train_nlg.read_run("parts")["finished"], "the run ended before it could be killed"
    subprocess.run([*argv, "--out_dir=parts", "--resume"], check=True, capture_output=True)
    same_run("whole", "parts")


def test_the_teachers_logits_are_the_networks_before_step_1_under_any_padding(base):
    net, tok = model.load("base", task="classify", n_classes=3, seed=0)
    examples = examples_of("rows", tok)
    balora.attach(net, "balora", r=4)
    Z, _ = train_nlu.predict(net, examples)
    net.eval()
    for i, (ids, _) in enumerate(examples):
        padded = torch.tensor([ids + [0] * (50 - len(ids))])
        mask = torch.tensor([[1] * len(ids) + [0] * (50 - len(ids))])
        with torch.no_grad(), balora.teacher(net):
            assert (net(padded, mask) - Z[i]).abs().max() < 1e-5
    train("--out_dir=o", "--dropout=0", "--cls_dropout=0")
    assert (teachers_logits("o")["train"] - Z).abs().max() < 1e-5
    assert log("o")[0]["cr"] == pytest.approx(0, abs=1e-9)


def test_only_the_consistency_term_needs_the_training_rows_logits(base):
    train("--max_iters=1", "--method=lora", "--out_dir=o")
    assert set(teachers_logits("o")) == {"dev"}


def test_accumulation_equals_the_large_batch(base):
    """Each micro-batch counts by its share of the step's rows: 4 x 2 gives the log of 1 x 8 for the row-wise terms."""
    more = ["--max_iters=4", "--lambda2=0", "--lambda3=0", "--no-schedule", "--dropout=0", "--cls_dropout=0"]
    for name, size in (("one", 8), ("four", 2), ("uneven", 3)):
        train(*more, f"--micro_batch={size}", f"--out_dir={name}")
    for name in ("four", "uneven"):
        for a, b in zip(log("one"), log(name), strict=True):
            for term in ("task", "cr", "grad_norm"):
                assert a[term] == pytest.approx(b[term], rel=2e-3, abs=1e-6), (name, a["step"], term)


def test_lambda_zero_is_pissa_step_for_step(base):
    train("--method=pissa", "--out_dir=p")
    train("--lambda1=0", "--lambda2=0", "--lambda3=0", "--out_dir=b")
    assert log("p") == log("b")


def test_every_run_logs_the_same_columns(base):
    train("--max_iters=2", "--method=pissa", "--out_dir=p")
    train("--max_iters=2", "--out_dir=b")
    assert log("p")[1].keys() == log("b")[1].keys()
    assert log("p")[1]["cr"] is None and log("p")[1]["dr"] >= 0 and log("p")[1]["svdr"] < 0


@pytest.mark.figures
def test_default_run_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_nlu.main(["--pretrain_iters=3", "--max_iters=3"])
    out = capsys.readouterr().out
    for word in (
        "3 steps of 32 rows, 32 at a time -> out/tiny-world-balora-0",
        "kept    1,120 rows: 800 entailment, 240 neutral, 80 contradiction",
        "recall_contradiction",
        "drift",
        "Figure: out/tiny-world-balora-0/loss.png",
    ):
        assert word in out, word
    record = json.load(open("out/tiny-world-balora-0/config.json"))
    assert record["rows"] == {"dev": 600, "train": 1120} and record["trainable"] == 36_864
    assert record["classes"] == [[0, 800], [1, 240], [2, 80]] and record["metric"] == "accuracy"
    cached = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("tiny-encoder*/*")}
    train_nlu.main(["--pretrain_iters=3", "--max_iters=3", "--method=pissa"])
    assert len(cached) == 3 and all(p.stat().st_mtime_ns == t for p, t in cached.items())  # pre-trained once


def test_presets_and_the_command_line():
    def settings(*argv):
        s = train_nlu.parse(train_nlu.Settings, argv, train_nlu.PRESETS, by=["init", "task", "method"])
        train_nlu.check(s)
        return s

    s = settings("--init=deberta-v3-base", "--task=rte", "--method=adalora")
    assert (s.alpha, s.learning_rate, s.epochs, s.r, s.cls_dropout) == (32, 1.2e-3, 50, 8, 0.2)
    names = ("orthogonality", "adalora_first", "adalora_last", "adalora_every")
    assert [s.options[name] for name in names] == [0.3, 600, 1800, 1]
    s = settings("--init=t5-base", "--task=cola", "--method=adalora", "--adalora_first=0.1", "--alpha=4")
    assert (s.alpha, s.learning_rate) == (4, 4e-4)
    assert s.options["adalora_first"] == 0.1 and s.options["adalora_every"] == 10
    assert settings("--init=deberta-v3-base", "--task=rte", "--method=hadapter").r == 32
    assert settings("--init=deberta-v3-base", "--task=rte", "--method=padapter", "--r=5").r == 5
    full = settings("--init=t5-base", "--task=mnli", "--method=full")
    assert full.learning_rate == pytest.approx(5e-4 / 40) and full.alpha == 8
    assert (settings().task, settings().imbalance, settings().lambda1) == ("world", "10:3:1", 0.15)


def test_noise_and_imbalance_are_said_and_recorded(base, capsys):
    train("--label_noise=0.25", "--imbalance=10:5:2", "--max_iters=2", "--out_dir=o")
    out = capsys.readouterr().out
    assert "kept    34 rows: 20 entailment, 10 neutral, 4 contradiction" in out  # of 3 x 20
    assert "flipped 8 rows" in out
    record = json.load(open("o/config.json"))
    assert record["settings"]["label_noise"] == 0.25 and record["settings"]["imbalance"] == "10:5:2"
    assert record["labels"] == ["entailment", "neutral", "contradiction"]


def test_max_rows_and_cut_rows(base, capsys):
    train("--max_rows=20", "--max_len=12", "--max_iters=1", "--out_dir=o")
    out = capsys.readouterr().out
    assert "read    20 rows" in out and "of 20 rows cut to 12 tokens" in out
    assert json.load(open("o/config.json"))["rows"]["train"] == 20


def test_probe_gives_the_teacher_something_to_say(base, capsys):
    train("--max_iters=1", "--out_dir=plain")
    train("--max_iters=1", "--probe", "--out_dir=probed")
    y = torch.tensor([label for *_, label in train_nlu.read_file("mnli", "train", "rows.jsonl")])
    plain, probed = (F.cross_entropy(teachers_logits(out)["train"], y) for out in ("plain", "probed"))
    assert probed < plain - 0.01 and "on 6 held-out training rows" in capsys.readouterr().out


def test_scores_as_labels_and_what_cannot_act(base, capsys):
    rows = [{"sentence1": f"w{i % 9} w3", "sentence2": "w5", "label": (i % 9) / 2} for i in range(40)]
    write("sts.jsonl", rows)
    argv = ["--init=base", "--task=stsb", "--data=sts.jsonl", "--batch_size=8", "--r=4", "--epochs=4"]
    train_nlu.main([*argv, "--learning_rate=1e-2", "--out_dir=o"])
    out = capsys.readouterr().out
    assert out.count("L_CR, L_DR and L_SVDR cannot act here") == 1 and "best combined on dev" in out
    assert all(r["cr"] is None and r["dr"] is None and r["svdr"] is None for r in log("o"))
    train("--max_iters=1", "--micro_batch=1", "--out_dir=single")
    assert "L_DR and L_SVDR cannot act here: a single row" in capsys.readouterr().out
    assert log("single")[0]["cr"] is not None and log("single")[0]["dr"] is None
    train("--max_iters=1", "--out_dir=three")
    assert "cannot act" not in capsys.readouterr().out and -1 < log("three")[0]["svdr"] < 0


@pytest.mark.parametrize("family", ["roberta", "deberta", "t5"])
def test_other_families(family, tmp_path, monkeypatch, shared):
    """With their real tokenizers."""
    monkeypatch.chdir(tmp_path)
    source = shared / "tokenizers" / {"roberta": "roberta", "deberta": "deberta-v3", "t5": "t5"}[family]
    size = {"roberta": 50265, "deberta": 128100, "t5": 32128}[family]
    if family == "t5":
        config = t5_config(size, 16, 2, 2, 8, 32)
    else:
        config = encoder_config(family, size, 16, 2, 2, 32)
    randomise(model.Transformer(config)).save("base")
    for path in source.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    rows = [
        dict(premise="It rains " * (i % 5 + 1), hypothesis="The sun shines", label=i % 3) for i in range(24)
    ]
    write("rows.jsonl", rows)
    argv = ["--init=base", "--task=mnli", "--data=rows.jsonl", "--eval_data=rows.jsonl", "--batch_size=8"]
    argv += ["--r=4", "--epochs=2", "--learning_rate=1e-2", "--out_dir=o"]
    train_nlu.main(argv)
    assert evaluations("o")[-1]["step"] == 6
    if family == "t5":
        for more in (["--task=stsb"], ["--probe"]):
            with pytest.raises(ValueError, match="T5 answers in words"):
                train_nlu.main([*argv, *more, "--overwrite"])


def test_features_figure(base, capsys):
    for method in ("lora", "pissa"):
        train(f"--method={method}", f"--out_dir={method}")
    eval.main(["features", "lora", "pissa", "--out=f.png"])
    out = capsys.readouterr().out
    assert "silhouette" in out and out.count("contradiction") >= 2 and (base / "f.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="features.npz"):
        eval.main(["features", "nowhere"])
    with pytest.raises(ValueError, match="is a classifier"):
        eval.main(["sample", "--run=lora", "--prompt=x"])


def test_dry_run_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for init, words in (
        ("deberta-v3-base", "1,327,104 by the method"),
        ("t5-base", "q_proj"),
    ):
        train_nlu.main([f"--init={init}", "--task=rte", "--dry_run"])
        out = capsys.readouterr().out
        assert words in out and "together" in out and "activations, 32 x 320 tokens" in out
    assert not any(tmp_path.iterdir())


def test_bad_input_is_one_line(base):
    write("odd.jsonl", [{"premise": "a", "hypothesis": "b", "label": "maybe"}])
    for argv, words in (
        (["--method=balor"], "did you mean balora"),
        (["--task=mnly"], "did you mean mnli"),
        (["--r=0"], "--r=0"),
        (["--r=99"], "lower r"),
        (["--alpha=0"], "--alpha=0"),
        (["--lambda1=-1"], "--lambda1=-1"),
        (["--label_noise=2"], "label_noise"),
        (["--imbalance=1:2"], "a ratio such as 100:10:1 of entailment"),
        (["--init=tiny"], "tiny goes with --task=world"),
        (["--init=tiny", "--task=world"], "no --data"),
        (["--init=llama2-7b"], "which train_nlg.py tunes"),
        (["--data=none.jsonl"], "none.jsonl"),
        (["--data=odd.jsonl"], "unknown label 'maybe'"),
        (["--targets=gate_proj"], "nothing matches gate_proj"),
        (["--max_len=2"], "max_len=2"),
        (["--learning_rate=2e9", "--method=full", "--grad_clip=0"], "not finite"),
        (["--label_smoothing=2"], "label_smoothing"),
        (["--pretrain_noise=0.1"], "only tiny is pre-trained here"),
        (["--task=stsb", "--imbalance=1:1"], "--imbalance needs classes"),
        (["--niter=3", "--method=lora"], "niter"),
        (["--method=adalora"], "adalora_first=8000.*do not fit into 16 steps"),
        (["--method=adalora", "--adalora_first=9", "--adalora_last=9"], "16 steps"),
        (["--method=lora-ga", "--calibration=61"], "61 rows are wanted"),
        (["--devise=cpu"], "did you mean device"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            train(*argv, "--out_dir=bad", "--overwrite")
        assert "\n" not in str(e.value)
    write("long.jsonl", [{"premise": "w1 " * 70, "hypothesis": "w2", "label": 0}])
    with pytest.raises(ValueError, match="a row has 74 tokens, and base has positions for 64"):
        train("--eval_data=long.jsonl", "--max_len=80", "--out_dir=worse")
    assert not (base / "worse").exists()  # all of this before anything is written
    train("--max_iters=1", "--out_dir=o")
    with pytest.raises(ValueError, match="holds another run: seed"):
        train("--max_iters=1", "--out_dir=o", "--seed=3", "--resume")
    with pytest.raises(ValueError, match="--resume goes on"):
        train("--max_iters=1", "--out_dir=o")


def test_label_smoothing(base):
    train("--max_iters=1", "--label_smoothing=0.1", "--lambda1=0", "--out_dir=smooth")
    train("--max_iters=1", "--lambda1=0", "--out_dir=plain")
    assert log("smooth")[0]["task"] != log("plain")[0]["task"]
    Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0])
    smooth, _ = balora.loss_nlu(Z, y, lambdas=(0, 0, 0), label_smoothing=0.1)
    by_hand = 0.9 * F.cross_entropy(Z, y) - 0.1 * F.log_softmax(Z, -1).mean()
    torch.testing.assert_close(smooth, by_hand)


def test_own_data_for_classification(base, capsys):
    """A .csv with words as labels: classes in order of first appearance, a tenth held out, all the way to a run."""
    lines = [
        "text,label",
        *(f'"good {i}, really",praise' for i in range(12)),
        *(f"bad {i},blame" for i in range(12)),
    ]
    (base / "own.csv").write_text("\n".join(lines))
    argv = [a for a in COMMON if not a.startswith(("--task", "--data", "--eval_data"))]
    train_nlu.main([*argv, "--task=own", "--data=own.csv", "--max_iters=2", "--out_dir=own"])
    out = capsys.readouterr().out
    assert (
        "own.csv: 2 classes, praise, blame; read text, label" in out
        and "dev: 2 rows of train are held out" in out
    )
    record = json.load(open("own/config.json"))
    assert record["labels"] == ["praise", "blame"] and record["metric"] == "accuracy"
    assert "not read" not in out
    write("pair.jsonl", [{"text_a": "a", "text_b": "b", "label": i % 3, "id": i} for i in range(30)])
    train_nlu.main([*argv, "--task=own", "--data=pair.jsonl", "--max_iters=2", "--out_dir=pair"])
    assert "read text_a, text_b, label\npair.jsonl: not read: id" in capsys.readouterr().out
    assert json.load(open("pair/config.json"))["labels"] == ["0", "1", "2"]
    write("odd.jsonl", [{"text": "a", "label": "other"}])
    for argv2, words in (
        (
            ["--data=own.csv", "--eval_data=odd.jsonl"],
            "odd.jsonl, row 1: unknown label 'other'; known: 0, 1, praise, blame",
        ),
        ([], "expected a file with the columns label and text .or text_a and text_b.; found none"),
        (["--data=odd.jsonl"], "1 different labels"),
    ):
        with pytest.raises(ValueError, match=words):
            train_nlu.main([*argv, "--task=own", *argv2, "--out_dir=bad"])


def test_predict_and_merge_of_a_classifier(base, capsys):
    """The probabilities of a run, of its merged folder in transformers, and of a file's rows are the same."""
    lines = ["id,text,label", *(f'{i},"w{i} w{i % 7}",{"praise" if i % 2 else "blame"}' for i in range(30))]
    (base / "own.csv").write_text("\n".join(lines))
    argv = [a for a in COMMON if not a.startswith(("--task", "--data", "--eval_data"))]
    train_nlu.main(
        [*argv, "--task=own", "--data=own.csv", "--max_iters=4", "--out_dir=own", "--learning_rate=0.02"]
    )
    (base / "new.csv").write_text("id,text\n7,w3 w9 w1\n8,w40 w2\n")
    capsys.readouterr()
    eval.main(["predict", "--run=own", "--data=new.csv"])
    assert (
        "2 rows, the last columns are predicted, p_blame, p_praise -> own/predicted-new.csv"
        in capsys.readouterr().out
    )
    with open("own/predicted-new.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["id"] for row in rows] == ["7", "8"]
    eval.main(["merge", "--run=own", "--out=merged"])
    net = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tok = model.load("merged", task="classify", n_classes=2)[1]
    assert list(net.config.id2label.values()) == ["blame", "praise"]
    for row in rows:
        with torch.no_grad():
            shares = net(torch.tensor([tok.pair(row["text"])])).logits.softmax(-1)[0]
        assert abs(float(row["p_praise"]) - shares[1].item()) < 1e-5
        assert row["predicted"] == ("praise" if shares[1] > 0.5 else "blame")
    for argv, words in (
        (["--run=own", "--data=own.csv", "--device=tpu"], "tpu"),
        (["--run=merged", "--data=own.csv"], "not the folder of a run"),
    ):
        with pytest.raises(ValueError, match=words):
            eval.main(["predict", *argv])
    (base / "empty.csv").write_text("words,label\na,b\n")
    with pytest.raises(
        ValueError, match="expected a file with the columns text .or text_a and text_b.; found words, label"
    ):
        eval.main(["predict", "--run=own", "--data=empty.csv"])
    write("gap.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match="row 2: expected text in text, not"):
        eval.main(["predict", "--run=own", "--data=gap.jsonl"])


def test_a_stop_between_evaluations_goes_on_bit_for_bit(base, monkeypatch):
    train("--out_dir=whole", "--eval_interval=1000")
    real = train_nlg.Run.log

    def log_and_ask(run, step, *rest):
        real(run, step, *rest)
        if step == 3:
            run.ask_to_stop()

    monkeypatch.setattr(train_nlg.Run, "log", log_and_ask)
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        train("--out_dir=parts", "--eval_interval=1000")
    eval.main(["predict", "--run=parts", "--data=dev.jsonl"])  # the adapter is there
    monkeypatch.undo()
    monkeypatch.chdir(base)
    train("--out_dir=parts", "--eval_interval=1000", "--resume")
    same_run("whole", "parts")


def test_own_classes_may_be_numbers_below_zero(base, capsys):
    write("signs.jsonl", [{"text": f"w{i} w{i % 5}", "label": (-1) ** i} for i in range(30)])
    argv = [a for a in COMMON if not a.startswith(("--task", "--data", "--eval_data"))]
    train_nlu.main([*argv, "--task=own", "--data=signs.jsonl", "--max_iters=1", "--out_dir=o"])
    out = capsys.readouterr().out
    assert "2 classes, 1, -1" in out and "train: 30 rows" in out and "dropped" not in out
