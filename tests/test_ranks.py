"""Several processes behind torchrun: the same steps as one, sharded or not; resume, a killed rank, an error of one rank.

    torchrun --nproc_per_node=2 tests/test_ranks.py RUNS.json    # what the fixture `runs` starts

Runs of two processes on the CPU (gloo) share one start of torchrun, since importing torch takes most of the time.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import balora
import model
import train_nlg
import train_nlu

NLG = "--data=nlg/rows.jsonl --template=plain --batch_size=18 --eval_rows=12 --r=4 --max_iters=6 --max_new=8".split()
NLG += "--learning_rate=3e-3 --eval_generate=3 --eval_interval=3 --dtype=float32 --device=cpu".split()
NLU = "--task=mnli --data=nlu/rows.jsonl --eval_data=nlu/dev.jsonl --batch_size=18 --r=4 --max_iters=6 --max_len=40".split()
NLU += [
    "--learning_rate=3e-3",
    "--probe",
    "--device=cpu",
    "--micro_batch=4",
]  # 18 rows are five micro-batches: two ranks, uneven
OWN = {
    "adalora": "--adalora_first=1 --adalora_last=2 --adalora_every=1".split(),  # the budget falls at steps 2 to 4
    "corda": ["--calibration=4"],
    "full": ["--learning_rate=1e-3", "--lambda1=0.025"],
}
METHODS = ("balora", "lora-fa", "adalora", "dora", "corda", "full")
SHARDED = ("balora", "lora-fa", "adalora", "dora")
STATED = ("task", "cr", "dr", "svdr", "orth", "grad_norm", "lr", "lambda1", "budget", "kept", "loss", "drift")


def nlg(method, *argv):
    terms = ["--lambda1=0.025", "--lambda2=0.005", "--lambda3=0.005"] if method == "dora" else []
    return ["nlg", *NLG, "--init=nlg/base", f"--method={method}", *OWN.get(method, []), *terms, *argv]


def start(n, *command):
    """Start `command` in n processes; none of them waits longer for another than the test itself."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*torchrun, *command], env=environment, **pipes)


def worker(argv):
    """Train what RUNS.json lists, one after the other; at step 3 keep a copy of the folder, to be resumed."""
    real = train_nlg.Run.save

    def save(run, step, *rest, **more):
        real(run, step, *rest, **more)
        if step == 3 and train_nlg.RANK == 0:
            shutil.copytree(run.out, f"{run.out}-at-3")

    train_nlg.Run.save = save
    pick = model.pick
    for script, *settings in json.loads(Path(argv[0]).read_text()):
        model.pick = pick  # without what --shard of the run before put around it
        {"nlg": train_nlg, "nlu": train_nlu}[script].main(settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a model and rows, runs of two ranks, and the same of one (out/METHOD-1)."""
    folder = tmp_path_factory.mktemp("ranks")
    here = os.getcwd()
    os.chdir(folder)
    write_bases()
    two = [nlg(method, "--micro_batch=4", f"--out_dir=out/{method}-2") for method in METHODS]
    two += [nlg(method, "--micro_batch=4", "--shard", f"--out_dir=out/{method}-s") for method in SHARDED]
    two += [nlg("balora", "--checkpointing", "--micro_batch=4", "--shard", "--out_dir=out/balora-c")]
    two += [nlg("pissa", "--out_dir=out/pissa-2"), ["nlu", *NLU, "--init=nlu/base", "--out_dir=out/nlu-2"]]
    one = [nlg(method, "--micro_batch=4", f"--out_dir=out/{method}-1") for method in METHODS]
    one += [nlg("pissa", "--micro_batch=9", "--out_dir=out/pissa-1"), nlg("pissa", "--out_dir=out/pissa-0")]
    one += [["nlu", *NLU, "--init=nlu/base", "--out_dir=out/nlu-1"]]
    for n, listed in ((2, two), (1, one)):
        Path(f"{n}.json").write_text(json.dumps(listed))
        process = start(n, __file__, f"{n}.json")
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed[-3000:]
    yield folder
    os.chdir(here)


def write_bases():
    from test_train_nlg import write_base as write_nlg
    from test_train_nlu import write_base as write_nlu

    for folder, write in (("nlg", write_nlg), ("nlu", write_nlu)):
        os.mkdir(folder)
        os.chdir(folder)
        write()
        os.chdir("..")


def same(a, b):
    """Two runs: terms of every step, evaluations and every product B A (of full tuning every tensor), to 1e-6."""
    for read, file, count in ((train_nlg.read_lines, "log.jsonl", 6), (model.read_json, "eval.json", 3)):
        records = [read(f"out/{run}/{file}") for run in (a, b)]
        assert len(records[0]) == len(records[1]) == count
        for x, y in zip(*records):
            assert x.keys() == y.keys()
            assert [name for name in x if x[name] is None] == [name for name in y if y[name] is None]
            stated = [name for name in x if name in STATED and x[name] is not None]
            assert len(stated) >= 2
            for name in stated:
                assert x[name] == pytest.approx(y[name], rel=1e-6, abs=1e-6), (a, b, x["step"], name)
    x, y = [load_file(next(Path(f"out/{run}").glob("*/*model.safetensors"))) for run in (a, b)]
    assert x.keys() == y.keys()
    names = [name.removesuffix("lora_A.weight") for name in x if name.endswith("lora_A.weight")]
    for name in names:
        products = [
            w.pop(f"{name}lora_B.weight").double() @ w.pop(f"{name}lora_A.weight").double() for w in (x, y)
        ]
        assert (products[0] - products[1]).abs().max() < 1e-6, name
    assert all((x[name] - y[name]).abs().max() < 1e-6 for name in x)  # of full tuning, DoRA's m, a head


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one(runs, method):
    same(f"{method}-1", f"{method}-2")
    log = train_nlg.read_lines(f"out/{method}-2/log.jsonl")
    assert all(step["peak_GiB"] > 0 for step in log)
    before, *_, after = model.read_json(f"out/{method}-2/eval.json")
    assert abs(before["loss"] - after["loss"]) > 1e-5, "nothing was learnt"


@pytest.mark.parametrize("method", SHARDED)
def test_two_ranks_with_shards_are_one(runs, method):
    same(f"{method}-1", f"{method}-s")


def test_shards_with_checkpointing(runs):
    same("balora-1", "balora-c")


def test_classes_with_dropout_and_a_probed_head(runs):
    assert model.load("nlu/base", task="classify", n_classes=3)[0].config.dropout > 0
    for run in ("nlu-1", "nlu-2"):
        assert (runs / f"out/{run}/features.npz").exists()
    first, second = [train_nlg.read_lines(f"out/nlu-{n}/log.jsonl") for n in (1, 2)]
    for x, y in zip(first, second, strict=True):
        for name in ("task", "cr", "dr", "svdr", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=2e-6, abs=1e-6), (x["step"], name)


def test_micro_batch_follows_the_ranks_and_is_recorded(runs):
    assert [train_nlg.read_run(f"out/pissa-{n}")["settings"]["micro_batch"] for n in (1, 2)] == [9, 9]
    assert train_nlg.read_run("out/pissa-2")["settings"]["ranks"] == 2
    same("pissa-1", "pissa-2")


def test_a_run_of_two_ranks_goes_on_with_one(runs):
    shutil.copytree("out/pissa-2-at-3", "out/pissa-2-on-1")
    train_nlg.main([*nlg("pissa", "--out_dir=out/pissa-2-on-1", "--resume")[1:]])
    same("pissa-2", "pissa-2-on-1")
    assert train_nlg.read_run("out/pissa-2-on-1")["settings"]["micro_batch"] == 9


@pytest.mark.parametrize(
    "run, more, words",
    [
        ("pissa-1", ["--shard"], "goes on after step 3"),
        (
            "pissa-0",
            [],
            "2 ranks, 1 micro-batches of 18, as in the run to resume: 1 ranks have nothing to do",
        ),
    ],
)
def test_a_run_of_one_rank_goes_on_with_two(runs, run, more, words):
    settings = nlg("pissa", f"--out_dir=out/{run}-at-3", "--resume", *more)[1:]
    process = start(2, str(ROOT / "train_nlg.py"), *settings)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and words in printed, printed
    assert printed.count("eval at step 6") == 1  # rank 0 alone prints
    same(run, f"{run}-at-3")
    assert train_nlg.read_run(f"out/{run}-at-3")["settings"]["ranks"] == 2


def test_a_killed_rank_loses_nothing_but_the_last_steps(runs):
    settings = nlg("pissa", "--micro_batch=9", "--max_iters=400", "--epochs=99")[1:]
    process = start(2, str(ROOT / "train_nlg.py"), *settings, "--out_dir=out/killed")
    deadline = time.time() + 100
    while time.time() < deadline and not os.path.exists("out/killed/checkpoint.pt"):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and len(re.findall("(?m)^error: ", printed)) <= 1, printed
    assert not train_nlg.read_run("out/killed")["finished"], "the run ended before it could be killed"
    step = torch.load("out/killed/checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 400
    shutil.copytree("out/killed", "out/again")
    for n, out in (
        (1, "killed"),
        (2, "again"),
    ):  # on to the next checkpoint but one, with one rank and with two
        record = model.read_json(f"out/{out}/config.json")
        record["settings"]["max_iters"] = step + 6
        Path(f"out/{out}/config.json").write_text(json.dumps(record))
        more = [
            *nlg("pissa", f"--max_iters={step + 6}", "--epochs=99")[1:],
            f"--out_dir=out/{out}",
            "--resume",
        ]
        process = start(n, str(ROOT / "train_nlg.py"), *more)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0, printed
    a, b = [train_nlg.read_lines(f"out/{out}/log.jsonl") for out in ("killed", "again")]
    assert [x["step"] for x in a] == [x["step"] for x in b] == list(range(1, step + 7))
    assert all(x["task"] == pytest.approx(y["task"], abs=1e-6) for x, y in zip(a, b))


FAILS = {
    "error: only here": """
real = train_nlg.collate
def collate(*arguments):
    if train_nlg.RANK == 1:
        raise ValueError("only here")
    return real(*arguments)
train_nlg.collate = collate
""",
    "error: rank 1: RuntimeError no memory": """
real = train_nlg.balora.loss_nlg
def loss(*arguments, **options):
    if train_nlg.RANK == 1:
        raise RuntimeError("no memory")
    return real(*arguments, **options)
train_nlg.balora.loss_nlg = loss
""",
    "error: ranks differ in step; give all of them the same files and settings": """
real = train_nlg.Run.checkpoint
train_nlg.Run.checkpoint = lambda *arguments: real(*arguments) if train_nlg.RANK == 0 else None
""",
}


@pytest.mark.parametrize("line", FAILS)
def test_an_error_of_one_rank_is_one_line_and_ends_all(runs, line):
    script = f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train_nlg\n{FAILS[line]}"
    Path("fails.py").write_text(f"{script}\ntrain_nlg.run_main(train_nlg.main)\n")
    shutil.rmtree("out/fails", ignore_errors=True)
    shutil.copytree("out/pissa-2-at-3", "out/fails")
    process = start(2, "fails.py", *nlg("pissa", "--out_dir=out/fails", "--resume")[1:])
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    errors = re.findall("(?m)^error: .*", printed)
    assert len(errors) == 1 and re.fullmatch(line, errors[0]), printed
    codes = re.findall(r"exitcode +: (-?\d+)", printed)
    assert codes and set(codes) == {"2"}, printed


def test_own_parts_share_a_step(monkeypatch):
    rows = list(range(18))
    for ranks in (1, 2, 3, 5, 7):
        monkeypatch.setattr(train_nlg, "RANKS", ranks)
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr(train_nlg, "RANK", rank)
            shares.append(train_nlg.own_parts(rows, 4))
        assert len({len(share) for share in shares}) == 1
        counted = [row for share in shares for part, weight in share for row in part * weight]
        assert sorted(counted) == rows
        assert all(part and len(part) <= 4 for share in shares for part, _ in share)


def test_starts_of_a_slice(small):
    whole, *parts = [small() for _ in range(3)]
    balora.attach(whole, "pissa", r=4)
    for i, net in enumerate(parts):
        balora.attach(net, "pissa", r=4, only=slice(i, None, 2))
    made = [0, 0]
    for name, layer in balora.adapted_layers(whole).items():
        others = [balora.adapted_layers(net)[name] for net in parts]
        i = int(bool(others[1].A0.any()))
        made[i] += 1
        assert torch.equal(others[i].A, layer.A) and torch.equal(others[i].B0, layer.B0)
        assert not others[1 - i].A.any() and not others[1 - i].B0.any()
    assert made == [7, 7]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["--ranks=4"], "--ranks=4 is for --dry_run"),
        (["--shard"], "start them by torchrun"),
        (["--dry_run", "--ranks=2", "--shard", "--method=full"], "--shard: full needs whole weights"),
        (["--dry_run", "--ranks=2", "--shard", "--method=corda"], "--shard: corda needs whole weights"),
        (["--dry_run", "--ranks=8", "--micro_batch=4", "--batch_size=18"], "8 ranks, 5 micro-batches of 4"),
        (["--dry_run", "--ranks=20", "--batch_size=18"], "20 ranks, 18 micro-batches of 1"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        train_nlg.main(settings)


def estimate(capsys, script, *settings):
    script.main(["--dry_run", *settings])
    table = capsys.readouterr().out.split("(GiB):\n")[1]
    return {line[:54].strip(): float(line[54:]) for line in table.splitlines()}


def test_dry_run_of_ranks(capsys):
    one = estimate(capsys, train_nlg, "--init=llama2-7b", "--method=lora", "--micro_batch=0")
    eight = estimate(capsys, train_nlg, "--init=llama2-7b", "--method=lora", "--micro_batch=0", "--ranks=8")
    assert set(eight) - set(one) == {"activations, 16 x 512 tokens"}
    assert set(one) - set(eight) == {"activations, 128 x 512 tokens"}
    assert one["frozen weights"] == eight["frozen weights"]
    spread = estimate(capsys, train_nlg, "--init=llama2-7b", "--method=lora", "--ranks=8", "--shard")
    whole = estimate(capsys, train_nlg, "--init=llama2-7b", "--method=lora", "--ranks=8")
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) * 2 / 2**30
    gone = blocks * (1 - 1 / 8 - 2 / 32)
    assert whole["together"] - spread["together"] == pytest.approx(gone, abs=0.02)


if __name__ == "__main__":
    train_nlg.run_main(worker)
