"""eval.py: settings, run folder, rows and prompts, metrics, commands."""

import csv
import json
import os
import random
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import balora
import eval
import model


@dataclass
class Toy:
    """Toy settings."""

    init: str = "a"  # which
    rate: float = 0.5  # a share, in (0, 1]
    weight: float | None = None  # None: chosen
    steps: int = 3  # count
    fast: bool = False  # quick


def test_parse():
    p = lambda *argv: eval.parse(Toy, list(argv), {"b": {"steps": 7, "rate": 0.1}}, by="init")
    assert p() == Toy() and p("--rate=0.25", "--steps", "9") == Toy(rate=0.25, steps=9)
    assert p("--init=b") == Toy(init="b", steps=7, rate=0.1) and p("--init", "b", "--steps=2").steps == 2
    assert (
        p("--fast").fast and p("--fast=true").fast and not p("--fast=false").fast and not p("--no-fast").fast
    )
    assert p("--weight=1e-3").weight == 1e-3
    for argv, words in (
        (["--stps=3"], "unknown option --stps=3: did you mean steps"),
        (["--steps=x"], "invalid int"),
        (["--fast=perhaps"], "true or false"),
        (["--ste=3"], "unknown option"),
    ):
        with pytest.raises(ValueError, match=words):
            p(*argv)


def test_help_prints_the_comments(capsys):
    with pytest.raises(SystemExit):
        eval.parse(Toy, ["--help"])
    out = capsys.readouterr().out
    assert "a share, in (0, 1] (default: 0.5)" in out and "--steps" in out


# rows and prompts

ROWS = [
    {"instruction": "Add", "input": "2 and 2", "output": "4"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
]


def test_read_rows_from_every_format(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    with open(tmp_path / "a.csv", "w", newline="") as f:
        w = csv.DictWriter(f, ROWS[0])
        w.writeheader(), w.writerows(ROWS)
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for kind in ("json", "jsonl", "csv", "parquet"):
        assert eval.read_rows(str(tmp_path / f"a.{kind}")) == [
            ("Add", "2 and 2", "4"),
            ("Say hi", "", "hi"),
        ], kind
    assert eval.read_rows(str(tmp_path / "a.json"), limit=1) == [("Add", "2 and 2", "4")]
    assert eval.read_rows(str(tmp_path / "a.json"), "output", "instruction") == [
        ("4", "", "Add"),
        ("hi", "", "Say hi"),
    ]


@pytest.mark.parametrize("q, a", [("query", "response"), ("question", "answer"), ("human", "assistant")])
def test_fields_are_recognised(tmp_path, q, a):
    (tmp_path / "a.json").write_text(json.dumps([{q: "x", a: "y", "type": "z"}]))
    assert eval.read_rows(str(tmp_path / "a.json")) == [("x", "", "y")]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", '{"query": "x", "response": "y"}\n{"query": "x", oops\n', "line 2: not JSON"),
        ("a.jsonl", '{"query": "x"}\n[1]\n', "line 2: expected a JSON object"),
        ("a.json", '[{"query": "x"}, ', "not JSON"),
        ("a.json", "", "empty"),
        ("a.json", "[]", "no rows|cannot be read"),
        ("a.json", '[{"text": "x", "answer": "y"}]', "prompt_field.*its fields are text, answer"),
        ("a.txt", "x", "expected an existing"),
    ],
)
def test_bad_data_says_what_is_wrong(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        eval.read_rows(str(tmp_path / name))


def test_missing_data_says_so():
    with pytest.raises(ValueError, match="expected an existing"):
        eval.read_rows("nowhere.json")
    with pytest.raises(ValueError, match="neither a file here nor a data set"):
        eval.read_rows("some/dataset:train")


def test_gsm8k_answers_are_cleaned(shared):
    text = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72.\n#### 72"
    assert eval.clean_answer(text) == "He sold 48/2 = 24 clips.\nIn all 72.\nThe answer is: 72"
    assert (
        eval.clean_answer("#### 1,234 ") == "The answer is: 1234"
        and eval.clean_answer("plain #1") == "plain #1"
    )
    for other in ('cout << "n: ";\n cin >> n;', "text\n#### Conclusion of the text", "x #### 5"):
        assert eval.clean_answer(other) == other
    rows = eval.read_rows(str(shared / "gsm8k/train.jsonl"))
    raw = [json.loads(line)["answer"] for line in open(shared / "gsm8k/train.jsonl")]
    assert len(rows) == 7473 and not any("<<" in a or "####" in a for _, _, a in rows)
    assert all(
        eval.extract_answer(a) == int(r.split("#### ")[1].replace(",", "")) for (_, _, a), r in zip(rows, raw)
    )


def test_prompts():
    assert (
        eval.fill("alpaca", "Add {x}").endswith("### Instruction:\nAdd {x}\n\n### Response:")
        and eval.fill("plain", "a") == "a\n"
    )
    assert (
        "### Input:\n2\n\n### Response:" in eval.fill("alpaca", "Double", "2")
        and eval.fill("Q {instruction} A", "x") == "Q x A"
    )
    with pytest.raises(ValueError, match="instruction"):
        eval.fill("nothing", "x")


def test_encode_rows_drops_and_counts():
    tok = model.Bytes()
    rows = [("q", "", "a"), ("q", "", " "), ("q" * 50, "", "a"), ("q", "", "b" * 50)]
    kept, line = eval.encode_rows(rows, tok, "plain", 20)
    assert (
        kept == [([256, *b"q\n"], [*b"a", 257])]
        and line == "4 rows read, 1 kept, 2 dropped: longer than 20 tokens, 1 dropped: no response"
    )
    with pytest.raises(ValueError, match="no row is left.*2 dropped"):
        eval.encode_rows(rows[2:], tok, "plain", 20)
    with pytest.raises(ValueError, match="template alone"):
        eval.encode_rows(rows, tok, "alpaca", 100)


def test_collate_labels_the_response_and_its_eos():
    ids, valid, y = eval.collate([([1, 2, 3], [4, 0]), ([5], [6, 7, 0])], "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 0], [5, 6, 7, 0, 0]] and y.tolist() == [4, 0, 6, 7, 0]
    assert valid.tolist() == [[False, False, True, True, False], [True, True, True, False, False]]
    with pytest.raises(ValueError, match="labelled"):
        eval.collate([([1, 2], [])], "cpu")


# metrics


@pytest.mark.parametrize(
    "text, number",
    [
        ("so The answer is: 72", 72),
        ("The answer is: 1\nThe answer is: -3.", -3),
        ("The answer is: $1,234.", 1234),
        ("The answer is: 1,234,567", 1234),
        ("The answer is: 2 1/2", 2),
        ("The answer is: 7/2", 4),
        ("The answer is: 0.5", 0),
        ("The answer is: 3.7 apples", 4),
        ("The answer is:72", None),
        ("72", None),
        ("The answer is: none", None),
        ("The answer is: 1/0", None),
        ("The answer is: ", None),
        ("The answer is: /5", None),
    ],
)
def test_extract_answer(text, number):
    assert eval.extract_answer(text) == number


def test_wilson_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, n in ((0, 10), (3, 10), (473, 473), (51, 1319)):
        want = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert eval.wilson(hits, n) == pytest.approx((want.low, want.high), abs=1e-6)


def test_distinct_and_smooth():
    assert (
        eval.distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
        and eval.distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
        and eval.distinct([[]], 1) == 0
    )
    assert eval.smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2, 2, 2]) and eval.smooth(
        [1, 3], 0.5
    ) == pytest.approx([1, 7 / 3])


def test_measure_by_hand(small):
    """Loss, drift and diversity of two rows against a direct computation from full logits."""
    net = small(vocab_size=259)
    balora.attach(net, "pissa", r=4)
    for layer in balora.adapted_layers(net).values():
        layer.B.data += 0.1
    examples = [([256, 5, 6], [7, 8, 9, 257]), ([256, 9], [3, 257])]
    got = eval.measure(net, model.Bytes(), examples, batch_size=1, K=5, k=2, device="cpu", chunk=2)
    loss = drift = entropy = 0.0
    shares = []
    with torch.no_grad():
        for p, a in examples:
            ids = torch.tensor([p + a])
            Z_F = net(ids)[0, len(p) - 1 : -1]
            with balora.teacher(net):
                Z_P = net(ids)[0, len(p) - 1 : -1]
            loss += F.cross_entropy(Z_F, torch.tensor(a), reduction="sum").item()
            drift += F.kl_div(Z_F.log_softmax(-1), Z_P.softmax(-1), reduction="sum").item()
            entropy += torch.distributions.Categorical(logits=Z_F.topk(5).values).entropy().sum().item()
            sigma = torch.linalg.svdvals(Z_F)
            shares.append((sigma[:2].sum() / sigma.sum()).item())
        ids = torch.tensor([[256, *eval.PASSAGE.encode()]])
        ppl = F.cross_entropy(net(ids)[0, :-1], ids[0, 1:]).exp().item()
    assert (got["loss"], got["drift"], got["diversity"]) == pytest.approx(
        (loss / 6, drift / 6, entropy / 6), rel=1e-4
    )
    assert got["spectrum"] == pytest.approx(sum(shares) / 2, rel=1e-3) and got[
        "passage_ppl"
    ] == pytest.approx(ppl, rel=1e-4)


# the run folder


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "x.json"
    eval.write_json(str(path), {"a": 1})

    def full(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write.*No space left.*untouched"):
        balora.write_atomic(str(path), full)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_cut_drops_later_and_broken_records(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    (tmp_path / "eval.json").write_text('[{"step": 0}, {"step": 3}]')
    eval.cut(str(tmp_path), 2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n' and json.loads(
        (tmp_path / "eval.json").read_text()
    ) == [{"step": 0}]


def test_pick_device_and_dtype():
    assert (
        eval.pick_dtype("auto", "cpu") == torch.float32
        and eval.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    )
    with pytest.raises(ValueError, match="float16"):
        eval.pick_dtype("float16", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device=cuda: this PyTorch has 1 cpu"):
            eval.pick_device("cuda")
    with pytest.raises(ValueError, match="--device=gpu"):
        eval.pick_device("gpu")


# commands, on a run of two steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a small model, rows, and a finished run on them."""
    import train_nlg
    from conftest import randomise, small_config

    folder = tmp_path_factory.mktemp("run")
    randomise(model.Transformer(small_config(vocab_size=259, max_len=512, eos=257))).save(
        folder / "base", model.Bytes()
    )
    rng = random.Random(0)
    rows = [
        {"question": f"{a}+{b}", "answer": f"#### {a + b}"}
        for a, b in ((rng.randrange(90), rng.randrange(90)) for _ in range(40))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_nlg.main(
        [
            f"--init={folder}/base",
            f"--data={folder}/rows.jsonl",
            f"--out_dir={folder}/out",
            "--template=plain",
            "--max_iters=3",
            "--batch_size=8",
            "--eval_rows=8",
            "--r=4",
            "--learning_rate=1e-2",
            "--eval_generate=2",
            "--max_new=8",
        ]
    )
    return folder


def command(*argv):
    eval.main([str(a) for a in argv])


def test_sample(run, capsys):
    command("sample", f"--run={run}/out", "--prompt=1+1", "--max_new=4")
    out = capsys.readouterr().out
    assert "balora adapter on 14 layers" in out and "1+1\n" in out
    command(
        "sample", f"--init={run}/base", "--prompt=1+1", "--max_new=4", "--temperature=1", "--template=plain"
    )


def test_loss_equals_the_training_scripts(run, capsys):
    command("loss", f"--run={run}/out", f"--data={run}/rows.jsonl", "--last=8")
    got = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    last = json.loads((run / "out/eval.json").read_text())[-1]
    assert (
        float(got["loss"]) == pytest.approx(last["loss"], abs=2e-4)
        and float(got["drift"]) == pytest.approx(last["drift"], abs=2e-4)
        and last["drift"] > 1e-3
    )


def test_a_retrained_adapter_is_not_scored_from_old_answers(run):
    import shutil

    shutil.copytree(run / "out", run / "again")
    args = ["gsm8k", f"--run={run}/again", f"--data={run}/rows.jsonl", "--last=4", "--max_new=4"]
    command(*args)
    from safetensors.torch import load_file, save_file

    path = run / "again/adapter/adapter_model.safetensors"
    save_file({k: 2 * v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="was made with"):
        command(*args)


def test_other_weights_under_an_adapter_are_refused(run):
    import shutil
    from conftest import randomise, small_config

    shutil.copytree(run / "out", run / "moved")
    randomise(model.Transformer(small_config(vocab_size=259, max_len=512, eos=257)), seed=4).save(
        run / "other", model.Bytes()
    )
    record = json.loads((run / "moved/config.json").read_text())
    (run / "moved/config.json").write_text(json.dumps({**record, "base": str(run / "other")}))
    with pytest.raises(ValueError, match="was tuned on weights"):
        command("sample", f"--run={run}/moved", "--prompt=x")


def test_gsm8k_goes_on_where_it_was_stopped(run, capsys):
    args = [
        "gsm8k",
        f"--run={run}/out",
        f"--data={run}/rows.jsonl",
        "--last=8",
        "--max_new=6",
        "--batch_size=4",
    ]
    command(*args)
    first = capsys.readouterr().out.splitlines()[-1]
    path = run / "out/gsm8k.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 9 and "95 % interval" in first
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:10])
    command(*args)
    assert capsys.readouterr().out.splitlines()[-1] == first and sorted(
        path.read_text().splitlines()
    ) == sorted(lines)
    with pytest.raises(ValueError, match="was made with"):
        command(*args[:-2], "--max_new=5")
    right = [dict(row=i, sample=0, tokens=1, answer="The answer is: 5", got=5, gold=5) for i in range(8)]
    path.write_text("\n".join([lines[0], *map(json.dumps, right)]) + "\n")
    command(*args)
    assert "exact match 100.00 % (8 of 8)" in capsys.readouterr().out


def test_merge_loads_in_transformers(run, capsys):
    transformers = pytest.importorskip("transformers")
    command("merge", f"--run={run}/out", f"--out={run}/merged")
    net, tok, _ = eval.load_run(f"{run}/out", "", torch.float32, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = torch.randint(0, 250, (2, 40))
    with torch.no_grad():
        assert (theirs(ids).logits - net(ids)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="already holds"):
        command("merge", f"--run={run}/out", f"--out={run}/merged")


def test_curves(run):
    command("curves", run / "out", run / "out", f"--out={run}/c.png")
    assert (run / "c.png").read_bytes()[:4] == b"\x89PNG" and (run / "out/loss.png").exists()
    with pytest.raises(ValueError, match="no log.jsonl in"):
        command("curves", run / "nowhere")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["gsm9k"], "did you mean gsm8k"),
        ([], "expected a command"),
        (["sample", "--prompt=x"], "either --run"),
        (["sample", "--run=nowhere"], "no such file"),
        (["sample", "--init=tinny"], "expected one of"),
        (["curves"], "needs run folders"),
        (["merge", "--run=x"], "needs"),
        (["sample", "--steps=2"], "unknown option"),
        (["bench", "--only=x"], "known are"),
    ],
)
def test_bad_commands(argv, words):
    with pytest.raises(ValueError, match=words):
        command(*argv)


# tables


def fake_run(folder, method, seed, scores, **settings):
    """A run folder with the results that a language model's benchmarks leave there: {benchmark: hits of 10}."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(f"{method} {seed}".encode())
    (folder / "loss.png").write_bytes(b"")
    lambdas = (
        dict(zip(("lambda1", "lambda2", "lambda3"), (0.1,) * 3 if method == "balora" else (0,) * 3))
        | settings
    )
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                settings=dict(init="base", method=method, seed=seed) | lambdas,
                trainable=1234,
                weights_hash="w",
            )
        )
    )
    head = dict(adapter=eval.file_hash(folder / "adapter/adapter_model.safetensors"), items=10, prompts="p")
    for name, hits in scores.items():
        line = (
            (lambda i: dict(got=1, gold=int(i < hits)))
            if name == "gsm8k"
            else (lambda i: dict(got="\\frac12", gold="\\frac{1}{2}" if i < hits else "3"))
            if name == "math"
            else (lambda i: dict(passed=i < hits))
        )
        file = {"humaneval": "humaneval-results", "mbpp": "mbpp-results"}.get(name, name)
        (folder / f"{file}.jsonl").write_text(
            "\n".join(json.dumps(line(i) if i >= 0 else head) for i in range(-1, 10)) + "\n"
        )
        if file != name:
            (folder / f"{name}.jsonl").write_text(json.dumps(head) + "\n")
    return folder


def test_table_of_runs(tmp_path, capsys):
    every = dict(gsm8k=5, math=2, humaneval=1, mbpp=4)
    runs = [
        fake_run(tmp_path / f"balora-{seed}", "balora", seed, every | dict(gsm8k=5 + seed)) for seed in (0, 1)
    ]
    (runs[0] / "mtbench-gpt-4_single.jsonl").write_text(
        "".join(json.dumps(dict(score=score, judge=["gpt-4", "x"])) + "\n" for score in (8, 6, 7, -1))
    )
    (runs[0] / "mtbench.jsonl").write_text("{}\n{}\n")
    runs += [
        fake_run(tmp_path / "lora", "lora", 0, dict(gsm8k=7)),
        fake_run(tmp_path / "cr", "pissa", 0, dict(math=1), lambda1=0.025),
    ]
    command("table", *runs, f"--out={tmp_path}/t.md")
    out = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [word.strip() for word in line.split("|")[2:-1]]
        for line in out.splitlines()
        if line.startswith("|")
    }
    assert (
        rows[""] == ["trainable", "gsm8k", "math", "humaneval", "mbpp", "mtbench", "average"]
        and (tmp_path / "t.md").read_text() in out
    )
    assert rows["balora"] == [
        "1,234",
        "55.00 ± 7.07",
        "**20.00 ± 0.00**",
        "**10.00 ± 0.00**",
        "**40.00 ± 0.00**",
        "**7.00**",
        "**26.40**",
    ]  # MT-Bench as it is, as on the poster
    assert (
        rows["lora"] == ["1,234", "**70.00**", "-", "-", "-", "-", "-"]
        and rows["pissa+cr"][2] == "10.00"
        and "8 cells of 15 have no run" in out
    )
    command("table", *runs[2:], "--poster", f"--out={tmp_path}/t.md")
    assert "| **70.00** (42.68±0.54) | - (5.92±0.15) |" in capsys.readouterr().out
    for case, words in (
        (dict(seed=0), "are both lora on gsm8k, with seed 0"),
        (dict(seed=1, learning_rate=1), "with learning_rate None and 1"),
        (dict(seed=1, init="/x/base"), "with init base and /x/base"),
    ):
        seed, settings = case["seed"], {k: v for k, v in case.items() if k != "seed"}
        with pytest.raises(ValueError, match=words):
            command(
                "table",
                runs[2],
                fake_run(tmp_path / f"twin{len(words)}", "lora", seed, dict(gsm8k=1), **settings),
            )
    with pytest.raises(ValueError, match="no finished run among"):
        command("table", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        (tmp_path / "lora/config.json").write_text("{}")
        command("table", runs[2])


def test_table_leaves_out_what_is_not_of_the_run_or_not_complete(tmp_path, capsys):
    run = fake_run(tmp_path / "a", "lora", 0, dict(gsm8k=5, math=5, humaneval=5))
    (run / "adapter/adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(ValueError, match="no benchmark's results yet"):
        command("table", run)
    assert capsys.readouterr().out.count("answers of another adapter") == 3
    other = fake_run(tmp_path / "b", "lora", 0, dict(gsm8k=5, math=5))
    lines = (other / "gsm8k.jsonl").read_text().splitlines()
    (other / "gsm8k.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:5])
    before = (other / "gsm8k.jsonl").read_text()
    command("table", other, tmp_path / "nowhere", f"--out={tmp_path}/t.md")
    out = capsys.readouterr().out
    assert (
        "gsm8k.jsonl left out (6 of 10 items)" in out
        and "nowhere: not a finished run" in out
        and "| math |" in out
        and (other / "gsm8k.jsonl").read_text() == before
    )
    (other / "math.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="math.jsonl: damaged"):
        command("table", other)


def test_the_posters_values_average_as_printed():
    """The poster's own averages (mean of five; mean of eight) from the values kept here, so a digit typed wrong would show."""
    printed = {
        "nlg": dict(
            full=21.08,
            lora=18.30,
            adalora=18.25,
            dora=18.18,
            milora=18.33,
            pissa=21.46,
            corda=22.55,
            balora=26.18,
        )
        | {"lora+": 20.78, "lora-fa": 17.30, "lora-ga": 21.03, "corda++": 23.22},
        "nlu": dict(
            full=88.65,
            bitfit=86.43,
            hadapter=88.37,
            padapter=88.55,
            lora=88.56,
            dora=89.13,
            adalora=89.54,
            pissa=89.47,
            balora=90.67,
        ),
        "roberta-base": dict(lora=84.28, pissa=85.23, balora=86.34),
        "t5-base": dict(lora=82.01, pissa=84.71, balora=87.97),
    }
    for which, averages in printed.items():
        names, rows = eval.poster_values(which)
        for method, average in averages.items():
            assert len(rows[method]) == len(names)
            assert sum(float(word.split("±")[0]) for word in rows[method].values()) / len(
                names
            ) == pytest.approx(average, abs=0.0101), (which, method)


def test_slope_is_least_squares_with_its_interval():
    by_level = {"0": [0.0, 0.1], "0.2": [0.2, 0.3], "0.4": [0.4, 0.5]}
    assert eval.slope(by_level, "accuracy").startswith(
        "slope +1.000 accuracy a unit of noise, 95 % interval +0.575 to +1.425 (6 pairs)"
    )
    assert (
        eval.slope({"0": [0.0, 0.0], "0.2": [0.0]}, "accuracy")
        == "+0.000 accuracy in every pair, so no slope"
    )
    assert "too few" in eval.slope({"0": [1.0]}, "accuracy") and "too few" in eval.slope(
        {"0": [1.0, 2.0, 1.5], "0.2": []}, "accuracy"
    )


# presets of compare: what they run, and what they make of it (the runs themselves: tests/test_train_nlg.py, test_train_nlu.py)


@pytest.fixture
def cells(monkeypatch):
    """Every cell "runs" at once: its accuracy is a known function of its options. -> the options of all cells, by name."""
    asked = {}

    def cell(kind, out, options):
        asked[os.path.basename(out)] = options
        given = dict(word[2:].split("=") for word in options)
        if given.get("weight_decay"):
            return None  # one variant fails
        seed, noise = int(given["seed"]), float(given.get("pretrain_noise", 0))
        accuracy = (
            0.5
            + 0.01 * seed
            + 0.1 * (given["method"] == "balora") * (1 + noise)
            + 0.02 * bool(float(given.get("lambda1", 0)))
        )
        settings = dict(lambda1=0.15, lambda2=0.03, lambda3=0.03, T=2.0, k=5, r=8, alpha=8.0)
        return dict(
            device="cpu",
            accuracy=accuracy,
            loss=1 - accuracy,
            drift=0.1 * seed,
            settings=settings,
            trainable=10,
            metric="accuracy",
            speed=100.0,
            seconds=60.0 * (2 if given["method"] == "full" else 1),
            peak=2.0 if given["method"] == "full" else 1.0,
        )

    monkeypatch.setattr(eval, "cell", cell)
    return asked


def words_of(out, start):
    return next(
        re.split(r"\s{2,}", line.strip())
        for line in out.splitlines()
        if re.split(r"\s{2,}", line.strip())[0] == start
    )


def test_ablation_has_the_posters_rows_and_its_controls(cells, tmp_path, capsys):
    command("ablation", "nlu", "--seeds=0,1,2", f"--out={tmp_path}", "--", "--init=x")
    out = capsys.readouterr().out
    assert len(cells) == 30 and all(options[0] == "--init=x" for options in cells.values())
    assert cells["pissa+dr-1"] == ["--init=x", "--method=pissa", "--lambda2=0.03", "--seed=1"] and cells[
        "lora+terms-0"
    ][1:5] == ["--method=lora", "--lambda1=0.15", "--lambda2=0.03", "--lambda3=0.03"]
    assert (
        "--label_smoothing=0.0762" in cells["pissa+smoothing-0"]
        and "--dropout=0.2" in cells["pissa+dropout-2"]
    )
    assert words_of(out, "balora") == [
        "balora",
        "0.6100 ± 0.0100",
        "0.1000 ± 0.0000",
        "3 of 3",
        "0.1000 ± 0.1000",
        "0.0000 ± 0.0000",
    ]
    assert words_of(out, "pissa+cr")[2:4] == ["0.0200 ± 0.0000", "3 of 3"] and words_of(out, "pissa+decay")[
        1:3
    ] == ["none", "none"]
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "table.txt"
    ).read_text() in out


def test_noise_measures_the_slope_of_the_gain(cells, tmp_path, capsys):
    command("noise", "nlu", "--seeds=0,1", "--levels=0,0.5", f"--out={tmp_path}")
    out = capsys.readouterr().out
    assert len(cells) == 12 and "--pretrain_noise=0.5" in cells["lora-0.5-1"]
    assert (
        words_of(out, "balora - pissa, paired")[1:] == ["0.1000 ± 0.0000", "0.1500 ± 0.0000"]
        and "gain over lora: slope +0.100 accuracy a unit of noise" in out
    )
    assert (tmp_path / "noise.png").exists()
    command(
        "noise", "nlu", "--seeds=0", "--inits=roberta-base,t5-base", f"--out={tmp_path}", "--", "--task=cola"
    )
    assert "--init=t5-base" in cells["pissa-t5-base-0"] and "slope" not in capsys.readouterr().out


def test_sensitivity_moves_one_knob_at_a_time(cells, tmp_path, capsys):
    command("sensitivity", "nlu", "--seeds=0", f"--out={tmp_path}")
    assert set(cells) == {
        f"{name}-0"
        for name in (
            "balora",
            "lambda1=0.03",
            "lambda1=0.75",
            "lambda2=0.006",
            "lambda2=0.15",
            "lambda3=0.006",
            "lambda3=0.15",
            "T=1.0",
            "T=4.0",
            "k=1",
            "k=25",
            "r=4",
            "r=16",
        )
    }
    assert (
        cells["r=4-0"] == ["--method=balora", "--r=4", "--alpha=4", "--seed=0"]
        and cells["k=25-0"][1] == "--k=25"
    )
    assert (
        "the default has lambda1 0.15" in capsys.readouterr().out and (tmp_path / "sensitivity.png").exists()
    )


def test_efficiency_is_ratios_to_lora(cells, tmp_path, capsys):
    command("efficiency", "nlg", "--seeds=0", "--metric=loss", f"--out={tmp_path}")
    out = capsys.readouterr().out
    assert words_of(out, "full")[1:5] == ["2.00", "2.00", "2.0", "2.00"] and words_of(out, "lora")[1:5] == [
        "1.00",
        "1.00",
        "1.0",
        "1.00",
    ]
    for bad, words in (
        (["efficiency"], "expected nlg or nlu"),
        (["noise", "nlg", "--seeds=a"], "--seeds=a"),
        (["ablation", "nlg", "--jobs=0"], "--jobs=0"),
        (["ablation", "nlu", "--", "--lambda1=0.3"], "--lambda1 behind --"),
        (["noise", "nlu", "--", "--init=minilm"], "--init behind --"),
        (["gsm8k", "--run=x", "--limit=-1"], "--limit=-1"),
        (["sample", "--init=x", "--top_p=0"], "--top_p=0"),
        (["compare", "nlg", "--sweep_lr=1e-3 1e-4"], "two lists for all methods"),
        (["gsm8k", f"--run={tmp_path}/r"], "no such file"),
        (["table", "--", "--x=1"], "no options of another"),
    ):
        with pytest.raises(ValueError, match=words):
            command(*bad)


@pytest.mark.parametrize("name", [*eval.METHOD_STEPS, "balora-quarter", "balora-svdr"])
def test_a_bench_contestant_trains_what_its_method_trains(name, run):
    import types

    ids, valid = (
        torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, 24, dtype=torch.bool),
    )
    valid[:, 11:-1] = True
    nets, real = [], model.load
    step = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load", lambda *a, **k: nets.append(real(*a, **k)) or nets[-1])
        step = eval.our_step(
            types.SimpleNamespace(only=name, init=f"{run}/base", device="cpu", r=4, rows=4, compile=False),
            ids,
            valid,
        )
    net = nets[0][0]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(2):
        step()
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in net.named_parameters() if p.requires_grad} and bool(
        balora.adapted_layers(net)
    ) == (name != "full")
