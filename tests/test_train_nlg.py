"""train_nlg.py through its command line: the default path, resume, accumulation, bad input, the LLaMA-2 path."""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, log, randomise, same_run, small_config

import balora
import eval
import model
import train_nlg


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A small model and 60 rows of uneven length in the working directory."""
    monkeypatch.chdir(tmp_path)
    randomise(model.Transformer(small_config(vocab_size=259, max_len=512, eos=257))).save(
        "base", model.Bytes()
    )
    rng = random.Random(0)
    rows = [{"question": "q" * rng.randrange(1, 40), "answer": "a" * rng.randrange(1, 40)} for _ in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


COMMON = [
    "--init=base",
    "--data=rows.jsonl",
    "--template=plain",
    "--batch_size=8",
    "--eval_rows=12",
    "--r=4",
    "--learning_rate=1e-2",
    "--eval_generate=0",
    "--eval_interval=4",
]


def train(*argv):
    train_nlg.main([*COMMON, *argv])


def test_default_run_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--pretrain_iters=4", "--max_iters=2", "--eval_generate=4", "--max_new=8", "--eval_rows=6"]
    train_nlg.main(argv)
    out = capsys.readouterr().out
    for word in (
        "before",
        "exact_match",
        "drift",
        "loss figure: out/tiny-balora-0/loss.png",
        "reference:",
        "⟦",
        "trainable 81,920 of 886,272",
    ):
        assert word in out, word
    assert {p.name for p in (tmp_path / "out/tiny-balora-0").iterdir()} == {
        "config.json",
        "log.jsonl",
        "eval.json",
        "checkpoint.pt",
        "adapter",
        "loss.png",
    }
    cached = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("tiny-noise*/*")}
    train_nlg.main([*argv, "--method=lora"])
    assert len(cached) == 2 and all(p.stat().st_mtime_ns == t for p, t in cached.items())  # pre-trained once
    eval.main(["sample", "--run=out/tiny-lora-0", "--prompt=hi", "--max_new=3"])


def test_tiny_corpus():
    rng = random.Random(0)
    wrong = 0
    for _ in range(2000):
        question, answer = train_nlg.problem(rng, rng.choice(train_nlg.KNOWN), noise=0.2)
        a, b = (int(n) for n in answer.split(":")[0].split("+"))
        assert str(a) in question and str(b) in question
        wrong += eval.extract_answer(answer) != a + b
    assert 0.17 < wrong / 2000 < 0.23
    s = eval.parse(train_nlg.Settings, ["--eval_rows=50"], train_nlg.PRESETS, by="init")
    rows = train_nlg.tiny_rows(s)
    assert len({q for q, _, _ in rows}) == 562 and rows == train_nlg.tiny_rows(s)
    assert all(eval.extract_answer(a) == sum(int(n) for n in a.split(":")[0].split("+")) for _, _, a in rows)


@pytest.mark.parametrize("method", [m for m in balora.METHODS if m not in balora.ENCODERS_ONLY])
def test_stopped_and_resumed_equals_uninterrupted(base, method, monkeypatch):
    argv = [f"--method={method}", "--max_iters=10"]
    train(*argv, "--out_dir=whole")
    saves = []
    real = eval.save_checkpoint

    def save_then_stop(out, step, *rest):
        real(out, step, *rest)
        saves.append(step)
        if out == "parts" and step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(eval, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(*argv, "--out_dir=parts")
    with open("parts/log.jsonl", "a") as f:
        f.write(
            json.dumps({"step": 5, "task": 1}) + '\n{"step": 6, "ta'
        )  # records past the checkpoint, the last one cut off
    torch.manual_seed(123)
    train(*argv, "--out_dir=parts", "--resume")
    assert saves == [4, 8, 10]
    if method == "full":
        assert log("whole") == log("parts")
    else:
        same_run("whole", "parts")


def test_sigkill_at_any_moment(base):
    """Killed before the first checkpoint, then somewhere later, then run to the end: bit-identical to a run left alone."""
    argv = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, "--max_iters=30", "--eval_interval=3"]
    subprocess.run([*argv, "--out_dir=whole"], check=True, capture_output=True)
    for lines in (1, 8):
        process = subprocess.Popen(
            [*argv, "--out_dir=parts", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.time() + 100
        while time.time() < deadline and process.poll() is None:
            if (
                os.path.exists("parts/log.jsonl")
                and len(open("parts/log.jsonl").read().splitlines()) >= lines
            ):
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not os.path.exists("parts/loss.png"), "the run ended before it could be killed"
    subprocess.run([*argv, "--out_dir=parts", "--resume"], check=True, capture_output=True)
    same_run("whole", "parts")
    assert len(log("whole")) == 30


def test_accumulation_equals_the_large_batch(base):
    """Token-wise terms share the step's denominator: 4 x 2 gives the log of 1 x 8 (λ3 = 0: SVDR belongs to the micro-batch)."""
    for name, size in (("one", 8), ("four", 2), ("uneven", 3)):
        train("--max_iters=4", "--lambda3=0", "--no-schedule", f"--micro_batch={size}", f"--out_dir={name}")
    for name in ("four", "uneven"):
        for a, b in zip(log("one"), log(name)):
            for term in ("task", "cr", "dr", "grad_norm"):
                assert a[term] == pytest.approx(b[term], rel=2e-3, abs=1e-6), (name, a["step"], term)


def test_lambda_zero_is_pissa_step_for_step(base):
    train("--max_iters=4", "--method=pissa", "--out_dir=p")
    train("--max_iters=4", "--lambda1=0", "--lambda2=0", "--lambda3=0", "--out_dir=b")

    assert log("p") == log("b")


def test_log_holds_every_term_and_its_schedule(base):
    train("--max_iters=20", "--out_dir=o")
    records = log("o")
    assert [r["step"] for r in records] == list(range(1, 21)) and records[0]["cr"] == pytest.approx(
        0, abs=1e-6
    )
    assert (
        records[3]["dr"] is None
        and records[4]["lambda2"] == 0
        and records[5]["lambda2"] == pytest.approx(0.005)
        and records[5]["svdr"] < 0
        and records[5]["dr"] < 0
    )
    assert (
        records[19]["cr"] > 0
        and records[0]["lambda1"] == 0.025 > records[10]["lambda1"] > records[19]["lambda1"] > 0.0025
    )


def test_regularizers_go_with_any_method(base):
    for method in ("lora", "full"):
        train(
            "--max_iters=8",
            f"--method={method}",
            "--lambda1=0.1",
            "--lambda2=0.01",
            "--lambda3=0.01",
            f"--out_dir={method}",
        )
        assert log(method)[-1]["cr"] > 0 and log(method)[-1]["svdr"] < 0


def test_eval_iters_takes_the_first_held_out_rows(base, monkeypatch):
    seen, real = [], eval.measure
    monkeypatch.setattr(
        eval, "measure", lambda net, tok, rows, *a, **k: seen.append(rows) or real(net, tok, rows, *a, **k)
    )
    for more in ([], ["--eval_iters=1", "--micro_batch=4"]):
        train("--max_iters=1", "--out_dir=o", "--overwrite", *more)
    assert [len(rows) for rows in seen] == [12, 12, 4, 4] and seen[2] == seen[0][:4]


def test_consistency_rate(base):
    train("--max_iters=6", "--consistency_rate=0.25", "--out_dir=quarter")
    train("--max_iters=6", "--out_dir=whole")
    a, b = log("quarter"), log("whole")
    assert a[0]["task"] == b[0]["task"] and a[-1]["cr"] > 0 and a[-1]["cr"] != b[-1]["cr"]
    train(
        "--max_iters=6", "--consistency_rate=0.25", "--lambda3=0", "--micro_batch=2", "--out_dir=parts"
    )  # most micro-batches have no taught sequence
    train("--max_iters=6", "--consistency_rate=0.25", "--lambda3=0", "--out_dir=once")
    for a, b in zip(log("parts"), log("once")):
        assert a["task"] == pytest.approx(b["task"], rel=1e-3) and a["cr"] == pytest.approx(
            b["cr"], rel=1e-2, abs=1e-6
        )


def test_options_that_change_how_not_what(base):
    train("--max_iters=4", "--out_dir=plain")
    train("--max_iters=4", "--checkpointing", "--fused", "--out_dir=other")
    for a, b in zip(log("plain"), log("other")):
        assert a["task"] == pytest.approx(b["task"], rel=1e-4)
    train("--max_iters=4", "--dtype=bfloat16", "--out_dir=bf16")
    assert log("bf16")[-1]["task"] == pytest.approx(log("plain")[-1]["task"], rel=0.1)


def test_batches_cover_every_row_once_and_are_of_similar_length():
    rng = random.Random(0)
    examples = [([0] * rng.randrange(1, 300), [0]) for _ in range(1000)]
    batches = train_nlg.order_of(examples, 8, seed=0, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(1000)) and batches != train_nlg.order_of(
        examples, 8, seed=0, epoch=1
    )
    lengths = [[len(examples[i][0]) for i in b] for b in batches]
    assert sum(max(b) * len(b) for b in lengths) < 1.1 * sum(map(sum, lengths))


def test_dry_run_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_nlg.main(["--init=llama2-7b", "--dry_run"])
    out = capsys.readouterr().out
    assert (
        "319,815,680 of 6,738,415,616" in out
        and "32 layers" in out
        and "128 x 512 = 65,536" in out
        and "together" in out
        and not os.listdir()
    )
    train_nlg.main(["--init=llama2-7b", "--dry_run", "--method=full", "--lambda1=0.1", "--micro_batch=1"])
    assert "frozen copy" in capsys.readouterr().out


def test_dry_run_of_a_folder(base, capsys):
    train("--dry_run")
    assert "trainable" in capsys.readouterr().out and not os.path.exists("out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "adalora", "lora-fa"])
def test_memory_estimate_equals_what_autograd_keeps(dtype, method):
    config = small_config(d=128, n_heads=8, n_kv_heads=2, head_dim=16, d_ff=320, n_layers=3)
    net = model.Transformer(config).to(dtype)
    balora.attach(net, method, r=8)
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    kept, storages = [], {}

    def pack(t):
        kept.append(t)
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.hidden(torch.randint(0, 211, (8, 128)))
    measured = sum(storages.values()) / (8 * 128 * config.n_layers * dtype.itemsize)
    assert train_nlg.kept_values(
        config,
        {"pissa": 16, "adalora": 12}.get(method, 8),
        method,
        dtype.itemsize,
        128 if dtype == torch.bfloat16 and model.BF16_KERNELS else 0,
    ) == pytest.approx(measured, rel=0.1)


def test_the_llama2_path(shared, tmp_path, monkeypatch, capsys):
    """A LLaMA-2-shaped sharded checkpoint with the real tokenizer, rows in MetaMathQA's format, the preset of --init=llama2-7b."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained("llama", max_shard_size="5MB")
    assert os.path.exists("llama/model.safetensors.index.json")
    shutil.copy(shared / "tokenizers/llama2/tokenizer.model", "llama")
    rows = [
        {
            "type": "GSM_Rephrased",
            "query": f"What is {i} plus {i}?",
            "original_question": "x",
            "response": f"{i} + {i} = {2 * i}\n#### {2 * i}\nThe answer is: {2 * i}",
        }
        for i in range(40)
    ]
    (tmp_path / "metamath.json").write_text(json.dumps(rows))
    monkeypatch.setitem(
        train_nlg.PRESETS,
        "llama",
        {
            **train_nlg.PRESETS["llama2-7b"],
            "r": 8,
            "alpha": 8,
            "data": "metamath.json",
            "eval_rows": 8,
            "batch_size": 8,
            "micro_batch": 2,
        },
    )
    train_nlg.main(["--init=llama", "--max_iters=3", "--eval_generate=2", "--max_new=8"])
    out = capsys.readouterr().out
    assert "### Response:⟦0 + 0 = 0" in out and "bfloat16" in out and log("out/llama-balora-0")[-1]["cr"] >= 0
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32),
        "out/llama-balora-0/adapter",
    )
    net, tok, _ = eval.load_run("out/llama-balora-0", "", torch.float32, "cpu")
    ids = torch.tensor([tok.bos + tok.encode("What is 2 plus 2?")])
    with torch.no_grad():
        assert (theirs(ids).logits - net(ids)).abs().max() < 1e-3


# bad input: one clear line, exit code 2, nothing lost


def fails(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_nlg.py", *COMMON, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        eval.run_main(train_nlg.main)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert e.value.code == 2 and len(err) == 1
    return err[0]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metod=lora"], "did you mean method"),
        (["--method=bolora"], "did you mean balora"),
        (["--r=0"], "--r=0"),
        (["--r=25"], "above the smallest dimension"),
        (["--alpha=0"], "--alpha=0"),
        (["--lambda1=-1"], "--lambda1=-1.0"),
        (["--consistency_rate=0"], "in (0, 1]"),
        (["--data=nowhere.json"], "nowhere.json"),
        (["--eval_rows=60"], "nothing is left"),
        (["--max_len=3"], "template alone"),
        (["--max_len=5"], "no row is left"),
        (["--targets=w_proj"], "nothing matches w_proj"),
        (["--dtype=int8"], "expected auto"),
        (["--prompt_field=text"], "its fields are question, answer"),
        (["--learning_rate=nan"], "--learning_rate=nan"),
        (["--init=nowhere"], "expected one of"),
        (["--template=x"], "{instruction}"),
        (["--r=two"], "invalid int"),
        (["--init=tiny", "--pretrain_noise=2"], "in [0, 1]"),
        (["--pretrain_noise=0.5"], "only tiny is pre-trained here"),
    ],
)
def test_bad_input(base, capsys, monkeypatch, argv, words):
    assert words in fails(capsys, monkeypatch, *argv, "--max_iters=1", "--out_dir=o")


def test_another_runs_folder_is_left_alone(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=o")
    before = {p: p.read_bytes() for p in (base / "o").rglob("*") if p.is_file()}
    assert "another run: max_iters (2 there, 3 here)" in fails(
        capsys, monkeypatch, "--max_iters=3", "--out_dir=o"
    )
    assert "run of these settings" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=o")
    assert "other settings: max_iters" in fails(
        capsys, monkeypatch, "--max_iters=3", "--out_dir=o", "--resume"
    )
    randomise(model.Transformer(small_config(vocab_size=259, max_len=512, eos=257)), seed=9).save(
        "base", model.Bytes()
    )
    assert "was run on weights" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=o", "--resume")
    assert before == {p: p.read_bytes() for p in (base / "o").rglob("*") if p.is_file()}
    train("--max_iters=3", "--out_dir=o", "--overwrite")
    assert len(log("o")) == 3


def test_bad_input_leaves_folders_as_they_were(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=o")
    before = {p: p.read_bytes() for p in (base / "o").rglob("*") if p.is_file()}
    assert "above the smallest" in fails(
        capsys, monkeypatch, "--max_iters=2", "--out_dir=o", "--overwrite", "--r=30"
    )
    assert "nowhere" in fails(capsys, monkeypatch, "--data=nowhere.json", "--out_dir=n")
    assert before == {
        p: p.read_bytes() for p in (base / "o").rglob("*") if p.is_file()
    } and not os.path.exists("n")
    os.makedirs("mine/model")
    assert "holds model but no config.json" in fails(capsys, monkeypatch, "--out_dir=mine", "--overwrite")
    assert "not a run's config.json" in fails(capsys, monkeypatch, "--out_dir=base", "--overwrite")
    assert os.path.isdir("mine/model")


def test_another_runs_checkpoint_is_refused(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=a")
    train("--max_iters=2", "--r=5", "--out_dir=b")
    shutil.copy("b/checkpoint.pt", "a")
    assert "another model or adapter" in fails(
        capsys, monkeypatch, "--max_iters=2", "--out_dir=a", "--resume"
    )
    with open("a/checkpoint.pt", "r+b") as f:
        f.truncate(1000)
    assert "cannot be read" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=a", "--resume")


def test_divergence_under_the_svd_term_is_one_line(base, capsys, monkeypatch):
    assert "not finite" in fails(
        capsys, monkeypatch, "--learning_rate=1e30", "--max_iters=9", "--no-schedule", "--out_dir=o"
    )


def test_non_finite_loss_stops_the_run(base, capsys, monkeypatch):
    words = fails(
        capsys, monkeypatch, "--learning_rate=1e30", "--max_iters=9", "--eval_interval=1", "--out_dir=o"
    )
    assert "lower --learning_rate" in words


def test_full_disk_while_saving(base, capsys, monkeypatch):
    train("--max_iters=4", "--out_dir=o")
    real, before = torch.save, (base / "o/checkpoint.pt").read_bytes()

    def full(state, f):
        f.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    shutil.copytree("o", "p")
    assert "No space left" in fails(capsys, monkeypatch, "--max_iters=8", "--out_dir=q")
    assert (
        not [n for n in os.listdir("q") if n.endswith(".tmp")]
        and (base / "p/checkpoint.pt").read_bytes() == before
    )
    monkeypatch.setattr(torch, "save", real)


def test_a_tensor_without_gradient_stops_the_run(base, capsys, monkeypatch):
    attach = balora.attach

    def cut_off(net, *args, **kwargs):
        report = attach(net, *args, **kwargs)
        layer = net.layers[1].mlp.up_proj
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
        return report

    monkeypatch.setattr(balora, "attach", cut_off)
    assert "layers.1.mlp.up_proj" in fails(capsys, monkeypatch, "--max_iters=5", "--out_dir=o")


def test_compare_runs_each_cell_once_and_takes_each_methods_best_rate(base, monkeypatch, capsys):
    real = subprocess.run

    def inside(argv, **kwargs):
        """The script's own main, without the seconds that a new process takes."""
        if "train_nlg.py" not in str(argv[1]):
            return real(argv, **kwargs)
        with contextlib.redirect_stdout(kwargs["stdout"]):
            try:
                train_nlg.main(argv[2:])
            except ValueError as e:
                print(f"error: {e}")
                return types.SimpleNamespace(returncode=2)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", inside)
    argv = [
        "compare",
        "nlg",
        "--methods=lora,pissa,lora-ga",
        "--sweep_lr=1e-5,1e-2",
        "--seeds=0,1",
        "--out=c",
        "--",
        *[word for word in COMMON if "learning_rate" not in word],
        "--max_iters=4",
        "--calibration=3",
        "--gamma=0.5",
    ]
    eval.main(argv)
    out = capsys.readouterr().out
    assert (
        out.count("python train_nlg.py --init=base") == 9
        and "--method=pissa --learning_rate=1e-2 --seed=1 --out_dir=c/pissa-1e-2-1" in out
    )
    table = out[out.index("method  ") :]
    for method in ("lora", "pissa", "lora-ga"):
        line = next(line for line in table.splitlines() if line.startswith(method + " "))
        at = {lr: json.load(open(f"c/{method}-{lr}-0/eval.json"))[-1]["loss"] for lr in ("1e-5", "1e-2")}
        best = min(at, key=at.get)
        both = [json.load(open(f"c/{method}-{best}-{seed}/eval.json"))[-1]["loss"] for seed in (0, 1)]
        assert (
            line.split()[2] == best
            and f"{statistics.mean(both):.4f} ± {statistics.stdev(both):.4f}" in line
            and f"1e-5 {at['1e-5']:.4f}, 1e-2 {at['1e-2']:.4f}" in line
        )
    eval.main(argv)  # everything is done
    again = capsys.readouterr().out
    assert (
        "python train_nlg.py" not in again
        and again == out[out.index("\nseeds 0, 1") :]
        and open("c/table.txt").read() in again
    )
    eval.main(
        [
            *argv[:2],
            "--methods=lora,full",
            "--sweep_lr=1e-2",
            "--seeds=0",
            "--out=d",
            "--",
            *argv[7:],
            "--r=99",
        ]
    )  # r is above the smallest dimension
    out = capsys.readouterr().out
    assert (
        "r=99 is above" in out.split("\nseeds")[0]
        and "full-1e-2-0" in out
        and not any(line.startswith("lora ") for line in out.split("\nseeds")[1].splitlines())
    )
    with pytest.raises(ValueError, match="c/lora-1e-2-0 is a finished run of other options .*--gamma=0.5"):
        eval.main(
            [*argv[:2], "--methods=lora", "--sweep_lr=1e-2", "--seeds=0", "--out=c", "--", *argv[7:], "--r=3"]
        )
    with pytest.raises(ValueError, match="--metric=los: did you mean loss"):
        eval.main(
            [*argv[:2], "--methods=lora", "--sweep_lr=1e-2,1e-2", "--seeds=0", "--metric=los", *argv[5:]]
        )
    eval.main(
        [*argv[:2], "--methods=lora", "--sweep_lr=1e-5,1e-2", "--seeds=0,0", "--metric=drift", *argv[5:]]
    )  # lower is better
    assert (
        next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lora ")).split()[2]
        == "1e-5"
    )
    eval.main(
        [*argv[:2], "--methods=lora,pissa", "--sweep_lr=1e-2 pissa=1e-5", "--seeds=0", *argv[5:]]
    )  # rates of its own
    assert [
        line.split()[2]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("lora ", "pissa "))
    ] == ["1e-2", "1e-5"]
    for bad, words in (
        (["--methods=lorra"], "did you mean lora"),
        (["--methods=lora", "--sweep_lr=pisssa=1e-4"], "did you mean pissa"),
        (["--methods=lora", "--sweep_lr=pissa=1"], "no rate for lora"),
        (["--seeds=,"], "expected at least one, like 0,1,2"),
    ):
        with pytest.raises(ValueError, match=words):
            eval.main(["compare", "nlg", *bad])
    with pytest.raises(ValueError, match="expected nlg or nlu"):
        eval.main(["compare", "nlq"])
    with pytest.raises(ValueError, match="no options of another script"):
        eval.main(["curves", "a", "--", "--x=1"])


def test_calibration_text_and_rows(base, capsys):
    (base / "text.jsonl").write_text(
        "\n".join(json.dumps({"question": f"what is {i} and {i + 1}"}) for i in range(60))
    )
    for method in ("corda", "corda++"):
        train(
            f"--method={method}",
            "--keep=last",
            "--calibration_data=text.jsonl",
            "--max_len=120",
            "--calibration=4",
            "--rounds=2",
            "--max_iters=2",
            f"--out_dir={method}",
        )
    tok = model.Bytes()
    text = "\n\n".join(f"what is {i} and {i + 1}" for i in range(60))
    for prompt, rest in eval.windows("text.jsonl", tok, 5, 50, 0):
        assert len(prompt) == 1 and len(rest) == 49 and tok.decode(prompt + rest) in text
    drawn = eval.draw(5, 12, "x")
    assert (
        len(drawn) == 12
        and {drawn.count(i) for i in range(5)} == {2, 3}
        and set(eval.draw(5, 5, "x")) == set(range(5))
    )
    for argv, words in (
        (["--calibration_data=text.jsonl", "--max_len=9999"], "tokens of text"),
        (["--calibration_data=rows.jsonl", "--calibration=0"], "calibration=0"),
        (["--calibration_data=none.jsonl"], "--calibration_data=none.jsonl"),
        (["--keep=frist"], "--keep=frist: expected first"),
        (["--method=lora", "--calibration_data=text.jsonl"], "only corda"),
        (["--correct_B"], "second version of lora-fa"),
        (["--method=bitfit"], "is for encoders"),
        (["--method=lora-ga", "--r=25", "--dry_run"], "takes 2r directions"),
    ):
        with pytest.raises(ValueError, match=words):
            train("--method=corda", *argv, "--out_dir=bad")
    capsys.readouterr()
    eval.draw(3, 4, 0)
    assert "4 rows are wanted and 3 are there" in capsys.readouterr().out


def test_adalora_budget_is_checked_before_training_and_logged(base):
    with pytest.raises(ValueError, match="fit into the run's 10 steps"):
        train("--method=adalora", "--max_iters=10", "--adalora_first=8", "--out_dir=o")
    assert not (base / "o/log.jsonl").exists()
    train(
        "--method=adalora",
        "--max_iters=10",
        "--adalora_first=2",
        "--adalora_last=3",
        "--adalora_every=1",
        "--out_dir=o",
        "--overwrite",
    )
    budget = [(r["budget"], r["kept"]) for r in log("o")]
    assert (
        budget[0] == (6 * 14, 6 * 14)
        and budget[-1] == (4 * 14, 4 * 14)
        and all(r["orth"] > 0 for r in log("o"))
    )


def test_lora_plus_keeps_its_ratio_through_the_schedule(base, monkeypatch):
    seen, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train("--method=lora+", "--lora_plus_ratio=7", "--max_iters=6", "--out_dir=o")
    assert (
        len(seen) == 6
        and all(fast == pytest.approx(7 * slow) for slow, fast in seen)
        and len({slow for slow, _ in seen}) == 6
    )
