"""train_nlg.py through its command line: the default path, resume, accumulation, bad input, the LLaMA-2 path."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, log, same_run, small_folder

import balora
import eval
import model
import train_nlg


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A small model and 60 rows of uneven length in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_base()
    return tmp_path


def write_base():
    small_folder("base")
    rng = random.Random(0)
    rows = [{"question": "q" * rng.randrange(1, 40), "answer": "a" * rng.randrange(1, 40)} for _ in range(60)]
    with open("rows.jsonl", "w") as f:
        f.write("\n".join(map(json.dumps, rows)))


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


@pytest.mark.figures
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
    files = {"config.json", "log.jsonl", "eval.json", "checkpoint.pt", "adapter", "loss.png", ".lock"}
    assert {p.name for p in (tmp_path / "out/tiny-balora-0").iterdir()} == files
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
        wrong += train_nlg.extract_answer(answer) != a + b
    assert 0.17 < wrong / 2000 < 0.23
    rows = train_nlg.tiny_rows(seed=0, eval_rows=50)
    assert len({q for q, _, _ in rows}) == 562 and rows == train_nlg.tiny_rows(seed=0, eval_rows=50)
    for _, _, answer in rows:
        assert train_nlg.extract_answer(answer) == sum(int(n) for n in answer.split(":")[0].split("+"))


@pytest.mark.parametrize("method", [m for m in balora.METHODS if m not in (*balora.ENCODERS_ONLY, "bitfit")])
def test_stopped_and_resumed_equals_uninterrupted(base, method, monkeypatch):
    argv = [f"--method={method}", "--max_iters=10", "--calibration=8"]
    train(*argv, "--out_dir=whole")
    saves = []
    real = train_nlg.Run.save

    def save_then_stop(run, step, *rest):
        real(run, step, *rest)
        saves.append(step)
        if run.out == "parts" and step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_nlg.Run, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(*argv, "--out_dir=parts")
    with open("parts/log.jsonl", "a") as f:  # records after the checkpoint, the last one cut off
        f.write(json.dumps({"step": 5, "task": 1}) + '\n{"step": 6, "ta')
    torch.manual_seed(123)
    train(*argv, "--out_dir=parts", "--resume")
    assert saves == [4, 8, 10]
    if method == "full":
        assert log("whole") == log("parts")
    else:
        same_run("whole", "parts")


def test_sigkill_at_any_moment(base):
    """Killed before the first checkpoint, then somewhere later, then run to the end: bit-identical to a run left alone."""
    argv = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, "--max_iters=30", "--eval_interval=6"]
    subprocess.run([*argv, "--out_dir=whole"], check=True, capture_output=True)
    for lines in (1, 8):
        command = [*argv, "--out_dir=parts", "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.time() + 100
        while time.time() < deadline and process.poll() is None:
            if len(train_nlg.read_lines("parts/log.jsonl")) >= lines:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not train_nlg.read_run("parts")["finished"], "the run ended before it could be killed"
    subprocess.run([*argv, "--out_dir=parts", "--resume"], check=True, capture_output=True)
    same_run("whole", "parts")
    assert len(log("whole")) == 30


def start(*argv):
    """The command in a process of its own, once it has taken two steps."""
    command = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, *argv]
    there = len(train_nlg.read_lines("parts/log.jsonl"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None:
        if len(train_nlg.read_lines("parts/log.jsonl")) >= there + 2:
            break
        time.sleep(0.01)
    return process


def test_a_signal_ends_a_run_after_the_step_and_leaves_an_adapter(base, capsys):
    """Ctrl-C, then SIGTERM, far from any evaluation: each leaves a checkpoint and an adapter that loads."""
    argv = ["--max_iters=100", "--eval_interval=1000"]
    command = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, *argv]  # all in processes of their own
    subprocess.run([*command, "--out_dir=whole"], check=True, capture_output=True)
    steps = []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*argv, "--out_dir=parts", *["--resume"] * len(steps))
        process.send_signal(number)
        words = process.communicate()[1]
        steps.append(torch.load("parts/checkpoint.pt", weights_only=True)["step"])
        assert process.returncode == 130
        assert (
            f"stopped after step {steps[-1]}; the same command, for training with --resume, goes on" in words
        )
        assert "Traceback" not in words
        capsys.readouterr()
        eval.main(["sample", "--run=parts", "--prompt=hi", "--max_new=3"])
        assert "balora adapter on 14 layers" in capsys.readouterr().out
        eval.main(["curves", "parts", "--out=c.png"])
        with pytest.raises(ValueError, match="no finished run"):
            eval.main(["table", "parts"])
    assert 2 <= steps[0] < steps[1] < 100
    done = subprocess.run(
        [*command, "--out_dir=parts", "--resume"], check=True, capture_output=True, text=True
    )
    assert f"goes on after step {steps[1]}" in done.stdout
    same_run("whole", "parts")


def test_a_run_folder_is_used_by_one_process_at_a_time(base):
    process = start("--max_iters=1000", "--out_dir=parts", "--eval_interval=1000")
    before = (base / "parts/config.json").read_bytes()
    other = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, "--max_iters=1000", "--out_dir=parts"]
    other = subprocess.run([*other, "--eval_interval=1000", "--overwrite"], capture_output=True, text=True)
    process.kill()
    process.wait()
    assert other.returncode == 2 and "error: parts is in use by another process" in other.stderr
    assert (base / "parts/config.json").read_bytes() == before
    train("--max_iters=2", "--out_dir=parts", "--overwrite")  # the lock has died with its process


def test_a_run_that_another_process_has_finished_meanwhile_is_not_replaced(base, monkeypatch):
    """Both begin on an empty folder; the second one gets the lock when the first one is through."""
    real = train_nlg.Run.checkpoint

    def late(run, net):
        monkeypatch.undo()
        monkeypatch.chdir(base)
        train("--max_iters=2", "--out_dir=o")
        return real(run, net)

    monkeypatch.setattr(train_nlg.Run, "checkpoint", late)
    with pytest.raises(ValueError, match="o was changed by another process since this one started"):
        train("--max_iters=3", "--out_dir=o")
    assert len(log("o")) == 2 and train_nlg.read_run("o")["finished"]


def test_a_damaged_run_is_named_and_left_as_it_is(base):
    argv = ["--max_iters=8", "--out_dir=o"]
    train(*argv)
    files = {p: p.read_bytes() for p in (base / "o").iterdir() if p.is_file()}
    data = bytearray(files[base / "o/checkpoint.pt"])
    data[len(data) // 2] ^= 1
    (base / "o/checkpoint.pt").write_bytes(data)
    with pytest.raises(ValueError, match="checkpoint.pt: .* is damaged"):
        train(*argv, "--resume")
    (base / "o/checkpoint.pt").write_bytes(files[base / "o/checkpoint.pt"])
    lines = files[base / "o/log.jsonl"].splitlines(keepends=True)
    (base / "o/log.jsonl").write_bytes(b"".join(lines[:3] + lines[4:]))
    with pytest.raises(ValueError, match="log.jsonl has 7 of 8 steps; use --overwrite"):
        train(*argv, "--resume")
    assert (base / "o/eval.json").read_bytes() == files[base / "o/eval.json"]


def test_after_a_change_of_the_code_a_run_is_repeated_not_resumed(base, monkeypatch):
    train("--max_iters=2", "--out_dir=o")
    with pytest.raises(ValueError, match="holds this run: --resume goes on with it, --overwrite repeats it"):
        train("--max_iters=2", "--out_dir=o")
    monkeypatch.setattr(train_nlg, "commit", lambda: "abc-dirty")
    with pytest.raises(
        ValueError, match="by other code .*, this is abc-dirty.: --overwrite repeats it, --resume"
    ):
        train("--max_iters=2", "--out_dir=o")


def test_a_tenth_is_held_out_where_eval_rows_are_too_many(base, capsys):
    train("--max_iters=1", "--out_dir=o", "--eval_rows=60")
    out = capsys.readouterr().out
    assert "--eval_rows=60 would hold out all of 60 rows; a tenth, 6, is held out instead" in out
    assert "training: 54 rows read" in out and "held out: 6 rows read" in out
    with pytest.raises(ValueError, match="holds this run"):  # the settings are as given
        train("--max_iters=1", "--out_dir=o", "--eval_rows=60")


@pytest.mark.figures
def test_the_figure_shows_the_terms_and_a_spike_does_not_flatten_it(base, monkeypatch):
    train("--max_iters=20", "--out_dir=o")
    lines = train_nlg.read_lines("o/log.jsonl")
    lines[11]["grad_norm"] = 1e6
    for line in lines[1::2]:
        line["cr"] = None  # as with --teacher_every=2
    (base / "o/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    monkeypatch.setattr(train_nlg, "save_figure", lambda fig, path: drawn.append(fig))
    train_nlg.plot_curves(["o"], "x.png")
    axes = {ax.get_ylabel(): ax for ax in drawn[0].axes}
    assert {"task loss", "gradient norm", "L_CR", "L_DR", "L_SVDR"} < axes.keys()
    for label, name in (("L_CR", "cr"), ("L_DR", "dr"), ("L_SVDR", "svdr"), ("task loss", "task")):
        drawn_values = axes[label].lines[0].get_ydata().tolist()
        assert drawn_values == [line[name] for line in lines if line[name] is not None]
        assert np.isfinite(axes[label].lines[1].get_ydata()).all()
    usual = sorted(line["grad_norm"] for line in lines)[-2]
    assert axes["gradient norm"].get_ylim()[1] < 10 * usual


def test_help_has_sections_and_presets_and_a_closed_pipe_is_quiet():
    command = f"{sys.executable} {ROOT / 'train_nlg.py'} --help"
    text = subprocess.run(command.split(), capture_output=True, text=True).stdout
    for words in ("\nobjective:\n", "\nmachine:\n", "\nof one method:\n", "\npresets:\n", "llama2-7b"):
        assert words in text
    piped = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True)
    assert piped.stderr == "" and piped.stdout.startswith("usage")


def test_output_fits_any_terminal(base):
    """A character that the terminal cannot show is replaced; control characters of a message are escaped."""
    argv = [sys.executable, str(ROOT / "train_nlg.py"), *COMMON, "--max_iters=1", "--out_dir=o"]
    env = os.environ | dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = subprocess.run(argv, capture_output=True, env=env)
    assert done.returncode == 0 and b"labels between ? ?" in done.stdout
    assert done.stderr == b""  # no terminal: no progress bars
    done = subprocess.run([*argv, "--data=\x1b[31mred.jsonl", "--out_dir=p"], capture_output=True)
    assert done.returncode == 2 and b"\x1b" not in done.stderr and b"--data=\\x1b[31mred.jsonl" in done.stderr


def test_a_changed_recipe_pre_trains_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--pretrain_iters=2", "--max_iters=1", "--eval_generate=0", "--eval_rows=2"]
    train_nlg.main(argv)
    monkeypatch.setattr(train_nlg, "KNOWN", (*train_nlg.KNOWN, train_nlg.NEW))
    train_nlg.main([*argv, "--overwrite"])
    assert len(list((tmp_path / "out").glob("tiny-*/model.safetensors"))) == 2


def test_accumulation_equals_the_large_batch(base):
    """Each micro-batch counts by its share of the step's tokens: 4 x 2 gives the log of 1 x 8 for the token-wise terms."""
    for name, size in (("one", 8), ("four", 2), ("uneven", 3)):
        train("--max_iters=4", "--lambda3=0", "--no-schedule", f"--micro_batch={size}", f"--out_dir={name}")
    for name in ("four", "uneven"):
        for a, b in zip(log("one"), log(name), strict=True):
            for term in ("task", "cr", "dr", "grad_norm"):
                assert a[term] == pytest.approx(b[term], rel=2e-3, abs=1e-6), (name, a["step"], term)


def test_lambda_zero_is_pissa_step_for_step(base):
    train("--max_iters=4", "--method=pissa", "--out_dir=p")
    train("--max_iters=4", "--lambda1=0", "--lambda2=0", "--lambda3=0", "--out_dir=b")
    assert log("p") == log("b")


def test_log_holds_every_term_and_its_schedule(base):
    train("--max_iters=20", "--out_dir=o")
    records = log("o")
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[0]["cr"] == pytest.approx(0, abs=1e-6) and records[19]["cr"] > 0
    assert all(r["dr"] < 0 and r["svdr"] < 0 for r in records)
    assert records[3]["lambda2"] == records[4]["lambda2"] == 0
    assert records[5]["lambda2"] == records[5]["lambda3"] == pytest.approx(0.005)
    assert 0.025 == records[0]["lambda1"] > records[10]["lambda1"] > records[19]["lambda1"] > 0.0025


def test_every_run_logs_the_same_columns(base):
    train("--max_iters=2", "--method=pissa", "--out_dir=p")
    train("--max_iters=2", "--out_dir=b")
    assert log("p")[1].keys() == log("b")[1].keys()
    assert log("p")[1]["cr"] is None and log("p")[1]["dr"] < 0 and log("p")[1]["svdr"] < 0


def test_regularizers_go_with_any_method(base):
    for method in ("lora", "full"):
        weights = ["--lambda1=0.1", "--lambda2=0.01", "--lambda3=0.01"]
        train("--max_iters=8", f"--method={method}", *weights, f"--out_dir={method}")
        assert log(method)[-1]["cr"] > 0 and log(method)[-1]["svdr"] < 0


def test_full_tuning_in_16_bits_keeps_fp32_weights(base):
    train("--max_iters=3", "--method=full", "--lambda1=0.1", "--dtype=bfloat16", "--out_dir=o")
    net, _ = model.load("o/model")
    assert net.head.dtype == torch.float32 and log("o")[-1]["cr"] > 0


def test_teacher_every(base):
    """At every n-th step CR counts n-fold, at the others it is absent; everything else stays."""
    train("--max_iters=6", "--teacher_every=3", "--no-schedule", "--out_dir=third")
    train("--max_iters=6", "--no-schedule", "--out_dir=each")
    third = log("third")
    assert [r["cr"] is not None for r in third] == [True, False, False, True, False, False]
    assert third[3]["lambda1"] == pytest.approx(3 * 0.025)
    assert third[0]["task"] == log("each")[0]["task"] and third[-1]["task"] != log("each")[-1]["task"]


def test_options_that_change_how_not_what(base):
    train("--max_iters=4", "--out_dir=plain")
    train("--max_iters=4", "--checkpointing", "--out_dir=other")
    for a, b in zip(log("plain"), log("other"), strict=True):
        assert a["task"] == pytest.approx(b["task"], rel=1e-4)
    train("--max_iters=4", "--dtype=bfloat16", "--out_dir=bf16")
    assert log("bf16")[-1]["task"] == pytest.approx(log("plain")[-1]["task"], rel=0.1)


def test_dry_run_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_nlg.main(["--init=llama2-7b", "--dry_run"])
    out = capsys.readouterr().out
    for words in ("319,815,680 of 6,738,415,616", "32 layers", "at most 128 x 512", "together"):
        assert words in out, words
    assert not os.listdir()
    train_nlg.main(["--init=llama2-7b", "--dry_run", "--method=full", "--lambda1=0.1", "--micro_batch=1"])
    assert "frozen copy" in capsys.readouterr().out


def test_dry_run_of_a_folder(base, capsys):
    train("--dry_run")
    assert "trainable" in capsys.readouterr().out and not os.path.exists("out")


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "adalora", "lora-fa"])
def test_memory_estimate_equals_what_autograd_keeps(small, method):
    """The estimate's count on the meta device against the storages of a real forward pass."""
    ids = torch.randint(0, 211, (8, 128))
    sizes = []
    for device in ("cpu", "meta"):
        net = small(d=128, n_heads=8, n_kv_heads=2, head_dim=16, d_ff=320, n_layers=3).to(device)
        balora.attach(net, method, r=8)
        if device == "meta":
            sizes.append(model.kept_bytes(net.hidden, ids.to("meta")))
        else:
            own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
            kept = {}

            def keep(t, kept=kept, own=own):
                if t.untyped_storage().data_ptr() not in own:
                    kept[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, keep):
                result = net.hidden(ids)
            sizes.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
            del result
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_the_llama2_path(shared, tmp_path, monkeypatch, capsys):
    """A LLaMA-2-shaped sharded checkpoint with the real tokenizer, rows in MetaMathQA's format, the preset of llama2-7b."""
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
    changes = dict(r=8, alpha=8, data="metamath.json", eval_rows=8, batch_size=8, micro_batch=2)
    monkeypatch.setitem(train_nlg.PRESETS, "llama", {**train_nlg.PRESETS["llama2-7b"], **changes})
    train_nlg.main(["--init=llama", "--max_iters=3", "--eval_generate=2", "--max_new=8"])
    out = capsys.readouterr().out
    assert "### Response:⟦0 + 0 = 0" in out and "bfloat16" in out
    assert log("out/llama-balora-0")[-1]["cr"] > -1e-5
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32),
        "out/llama-balora-0/adapter",
    )
    net, tok = model.load("llama", torch.float32)
    balora.load_adapter(net, "out/llama-balora-0/adapter")
    ids = torch.tensor([tok.bos + tok.encode("What is 2 plus 2?")])
    with torch.no_grad():
        assert (theirs(ids).logits - net(ids)).abs().max() < 1e-3


# Bad input: one clear line, exit code 2, nothing lost


def fails(capsys, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_nlg.py", *COMMON, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train_nlg.run_main(train_nlg.main)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert e.value.code == 2 and len(err) == 1
    return err[0]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metod=lora"], "did you mean method"),
        (["--method=bolora"], "did you mean balora"),
        (["--r=0"], "--r=0"),
        (["--r=25"], "lower r"),
        (["--alpha=0"], "--alpha=0"),
        (["--lambda1=-1"], "--lambda1=-1.0"),
        (["--teacher_every=0"], "--teacher_every=0"),
        (
            ["--label_smoothing=2"],
            "--label_smoothing=2.0: expected a number at least 0 and at most 1",
        ),
        (["--data=nowhere.json"], "nowhere.json"),
        (["--max_len=3"], "48 dropped: longer than 3 tokens"),
        (["--max_len=5"], "no row is left"),
        (["--targets=w_proj"], "nothing matches w_proj"),
        (["--dtype=int8"], "expected auto"),
        (["--prompt_field=text"], "unknown option --prompt_field"),
        (["--lr=1"], "unknown option --lr=1: did you mean learning_rate?"),
        (["--batch=1"], "did you mean batch_size?"),
        (["--model=x"], "did you mean init?"),
        (["--learning_rate=nan"], "--learning_rate=nan"),
        (["--init=nowhere"], "--init=nowhere"),
        (["--template=x"], "{instruction}"),
        (["--r=two"], "invalid int"),
        (["--init=tiny", "--data=", "--eval_rows=50000"], "the world of tiny has 20,000 rows"),
        (["--init=tiny", "--pretrain_noise=2"], "--pretrain_noise=2.0: expected"),
        (["--pretrain_noise=0.5"], "only tiny is pre-trained here"),
        (["--gamma=3"], "lora-ga"),
        (["--niter=-1"], "--niter=-1"),
    ],
)
def test_bad_input(base, capsys, monkeypatch, argv, words):
    assert words in fails(capsys, monkeypatch, *argv, "--max_iters=1", "--out_dir=o")


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_runs_folder_is_left_alone(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=o")
    before = files_of(base / "o")
    words = fails(capsys, monkeypatch, "--max_iters=3", "--out_dir=o")
    assert "another run: max_iters (2 there, 3 here)" in words
    assert "holds this run" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=o")
    words = fails(capsys, monkeypatch, "--max_iters=3", "--out_dir=o", "--resume")
    assert "holds another run: max_iters" in words
    small_folder("base", seed=9)
    assert "was run on weights" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=o", "--resume")
    assert before == files_of(base / "o")
    train("--max_iters=3", "--out_dir=o", "--overwrite")
    assert len(log("o")) == 3


def test_bad_input_leaves_folders_as_they_were(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=o")
    before = files_of(base / "o")
    words = fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=o", "--overwrite", "--r=30")
    assert "lower r" in words
    assert "nowhere" in fails(capsys, monkeypatch, "--data=nowhere.json", "--out_dir=n")
    assert before == files_of(base / "o") and not os.path.exists("n")
    os.makedirs("mine/model")
    train("--max_iters=1", "--out_dir=mine")
    assert os.path.isdir("mine/model")  # only --overwrite of a run deletes anything
    assert "not the folder of a run" in fails(capsys, monkeypatch, "--out_dir=base", "--overwrite")


def test_overwrite_deletes_the_answers_of_the_run_that_was(base):
    train("--max_iters=1", "--out_dir=o")
    (base / "o/gsm8k.jsonl").write_text("{}\n")
    train("--max_iters=1", "--out_dir=o", "--overwrite")
    assert not (base / "o/gsm8k.jsonl").exists()


def test_another_runs_checkpoint_is_refused(base, capsys, monkeypatch):
    train("--max_iters=2", "--out_dir=a")
    train("--max_iters=2", "--r=5", "--out_dir=b")
    shutil.copy("b/checkpoint.pt", "a")
    words = fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=a", "--resume")
    assert "is it of another model or adapter?" in words
    with open("a/checkpoint.pt", "r+b") as f:
        f.truncate(1000)
    assert "cannot be read" in fails(capsys, monkeypatch, "--max_iters=2", "--out_dir=a", "--resume")


@pytest.mark.parametrize("more", [["--no-schedule"], ["--eval_interval=1"]])
def test_divergence_is_one_line(base, capsys, monkeypatch, more):
    words = fails(capsys, monkeypatch, "--learning_rate=2e9", "--max_iters=9", "--out_dir=o", *more)
    assert "not finite" in words and "lower --learning_rate" in words


def test_full_disk_while_saving(base, capsys, monkeypatch):
    def full(state, f):
        f.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in fails(capsys, monkeypatch, "--max_iters=8", "--out_dir=q")
    assert not [n for n in os.listdir("q") if n.endswith(".tmp")]


def test_calibration_rows(base):
    for method in ("corda", "corda++"):
        more = ["--rounds=2"] if method == "corda++" else []
        own = ["--keep=last", "--calibration=4"]
        train(f"--method={method}", *own, *more, "--max_iters=2", f"--out_dir={method}")
    for argv, words in (
        (["--calibration=0"], "calibration=0"),
        (["--calibration=49"], "49 rows are wanted in all, and 48 are there"),
        (["--keep=frist"], "first"),
        (["--method=bitfit"], "no place for BiasOffset"),
        (["--method=hadapter"], "needs an encoder"),
        (["--method=lora-ga", "--r=25", "--dry_run"], "takes 50 of the 48 directions"),
    ):
        with pytest.raises(ValueError, match=words):
            train("--method=corda", *argv, "--out_dir=bad")


def test_adalora_budget_is_checked_before_training_and_logged(base):
    with pytest.raises(ValueError, match="10 steps"):
        train("--method=adalora", "--max_iters=10", "--adalora_first=8", "--out_dir=o")
    assert not (base / "o/log.jsonl").exists()
    own = ["--adalora_first=2", "--adalora_last=3", "--adalora_every=1"]
    train("--method=adalora", "--max_iters=10", *own, "--out_dir=o", "--overwrite")
    budget = [(r["budget"], r["kept"]) for r in log("o")]
    assert budget[0] == (6 * 14, 6 * 14) and budget[-1] == (4 * 14, 4 * 14)
    assert all(r["orth"] > 0 for r in log("o"))


def test_lora_plus_keeps_its_ratio_through_the_schedule(base, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train("--method=lora+", "--lora_plus_ratio=7", "--max_iters=6", "--out_dir=o")
    assert len(seen) == 6 and len({slow for slow, _ in seen}) == 6
    assert all(fast == pytest.approx(7 * slow) for slow, fast in seen)


def test_a_gradient_of_zero_is_a_divergence(base, monkeypatch):
    """A network that has died in 16 bits has hidden states and gradients of exactly zero."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.zeros(()))
    with pytest.raises(ValueError, match="step 0: the loss or its gradient is not finite, or zero"):
        train("--max_iters=3", "--out_dir=dead")


def test_numbers_of_the_settings_take_fractions():
    s = train_nlg.parse(train_nlg.Settings, ["--alpha=2.5", "--epochs=0.5"], train_nlg.PRESETS, by=["init"])
    assert (s.alpha, s.epochs) == (2.5, 0.5)


def test_a_pipe_that_closes_early_is_a_failure(base):
    """`| head` ends the command without a word, and not as if it had done its work."""
    command = f"{sys.executable} {ROOT / 'train_nlg.py'} {' '.join(COMMON)} --max_iters=50 --log_interval=1"
    words = f"set -o pipefail; {command} --out_dir=o | head -3"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert done.returncode == 141 and done.stderr == ""
    assert not os.path.exists("o/adapter")


def test_resume_without_a_checkpoint_says_so(base, capsys):
    train("--max_iters=1", "--out_dir=o", "--resume")
    assert "--resume: o has no checkpoint yet, so it starts at step 0" in capsys.readouterr().out


def test_loss_without_data_is_of_the_held_out_rows(base, capsys):
    train("--max_iters=1", "--out_dir=o")
    capsys.readouterr()
    eval.main(["loss", "--run=o"])
    out = capsys.readouterr().out
    last = json.load(open("o/eval.json"))[-1]
    assert "12 rows read, 12 kept" in out and f"{last['loss']:.4f}" in out
