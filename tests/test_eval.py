"""eval.py: commands on a run of a few steps, and tables of runs."""

import json
import random
import shutil

import pytest
import torch
from conftest import small_folder

import eval
import train_nlg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a small model, rows, and a finished run on them."""
    folder = tmp_path_factory.mktemp("run")
    small_folder(folder / "base")
    rng = random.Random(0)
    pairs = [(rng.randrange(90), rng.randrange(90)) for _ in range(40)]
    rows = [{"question": f"{a}+{b}", "answer": f"#### {a + b}"} for a, b in pairs]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = [f"--init={folder}/base", f"--data={folder}/rows.jsonl", f"--out_dir={folder}/out"]
    sizes = ["--max_iters=3", "--batch_size=8", "--eval_rows=8", "--r=4", "--eval_generate=2", "--max_new=8"]
    train_nlg.main([*places, *sizes, "--template=plain", "--learning_rate=1e-2"])
    return folder


def command(*argv):
    eval.main([str(a) for a in argv])


def test_sample(run, capsys):
    command("sample", f"--run={run}/out", "--prompt=1+1", "--max_new=4")
    out = capsys.readouterr().out
    assert "balora adapter on 14 layers" in out and "1+1\n" in out
    untuned = ["--temperature=1", "--template=plain", "--max_new=4"]
    command("sample", f"--init={run}/base", "--prompt=1+1", *untuned)
    with pytest.raises(ValueError, match="was tuned with the template 'plain'"):
        command("sample", f"--run={run}/out", "--prompt=1+1", "--template=alpaca")


def test_loss_equals_the_training_scripts(run, capsys):
    command("loss", f"--run={run}/out", f"--data={run}/rows.jsonl", "--last=8", "--batch_size=8")
    got = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    last = json.loads((run / "out/eval.json").read_text())[-1]
    assert float(got["loss"]) == pytest.approx(last["loss"], abs=2e-4)
    assert float(got["drift"]) == pytest.approx(last["drift"], abs=2e-4) and last["drift"] > 1e-3


def test_a_retrained_adapter_is_not_scored_from_old_answers(run):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "out", run / "again")
    args = ["gsm8k", f"--run={run}/again", f"--data={run}/rows.jsonl", "--last=4", "--max_new=4"]
    command(*args)
    path = run / "again/adapter/adapter_model.safetensors"
    save_file({k: 2 * v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="was made with"):
        command(*args)


def test_other_weights_under_an_adapter_are_refused(run):
    shutil.copytree(run / "out", run / "moved")
    small_folder(run / "other", seed=4)
    record = json.loads((run / "moved/config.json").read_text())
    (run / "moved/config.json").write_text(json.dumps({**record, "base": str(run / "other")}))
    with pytest.raises(ValueError, match="was tuned on weights"):
        command("sample", f"--run={run}/moved", "--prompt=x")


def test_gsm8k_goes_on_where_it_was_stopped(run, capsys):
    args = ["gsm8k", f"--run={run}/out", f"--data={run}/rows.jsonl", "--last=8", "--batch_size=4"]
    command(*args, "--max_new=6")
    first = capsys.readouterr().out.splitlines()[-1]
    path = run / "out/gsm8k.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 9 and "95 % interval" in first
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]) + json.dumps(lines[4])[:10])
    command(*args, "--max_new=6")
    assert capsys.readouterr().out.splitlines()[-1] == first
    again = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [{(r["row"], r["answer"]) for r in records[1:]} for records in (lines, again)]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="was made with"):
        command(*args, "--max_new=5")
    right = [dict(row=i, tokens=1, answer="The answer is: 5", got=5, gold=5) for i in range(8)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [lines[0], *right]))
    command(*args, "--max_new=6")
    assert "exact match 100.00 % (8 of 8)" in capsys.readouterr().out
    path.unlink()


def test_samples_of_equal_prompts_differ_from_batch_to_batch(run):
    rows = 4 * [{"text": "x", "test_list": ["assert True"]}]
    (run / "mbpp.json").write_text(json.dumps(rows))
    args = ["mbpp", f"--run={run}/out", f"--data={run}/mbpp.json", "--temperature=1"]
    command(*args, "--batch_size=1", "--max_new=8")
    lines = [json.loads(line) for line in (run / "out/mbpp.jsonl").read_text().splitlines()[1:]]
    assert len({line["answer"] for line in lines}) == 4


def test_a_prompt_that_fills_the_context_stays_unanswered(run, capsys):
    rows = [{"question": "x" * 600, "answer": "#### 5"}, {"question": "1+1", "answer": "#### 2"}]
    (run / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command("gsm8k", f"--run={run}/out", f"--data={run}/long.jsonl", "--max_new=4", "--out=long-answers")
    lines = [json.loads(line) for line in (run / "out/long-answers.jsonl").read_text().splitlines()]
    assert {line["row"]: line["tokens"] > 0 for line in lines[1:]} == {0: False, 1: True}


def test_merge_loads_in_transformers(run, capsys):
    transformers = pytest.importorskip("transformers")
    command("merge", f"--run={run}/out", f"--out={run}/merged")
    net, tok, _ = eval.load_run(f"{run}/out", "", "cpu", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = torch.randint(0, 250, (2, 40))
    with torch.no_grad():
        assert (theirs(ids).logits - net(ids)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="already holds"):
        command("merge", f"--run={run}/out", f"--out={run}/merged")


def test_curves(run):
    command("curves", run / "out", run / "out", f"--out={run}/c.png")
    assert (run / "c.png").read_bytes()[:4] == b"\x89PNG" and (run / "out/loss.png").exists()
    with pytest.raises(ValueError, match="no log.jsonl"):
        command("curves", run / "nowhere", f"--out={run}/c.png")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["gsm9k"], "did you mean gsm8k"),
        ([], "expected a command"),
        (["sample", "--prompt=x"], "either --run"),
        (["sample", "--run=nowhere"], "nowhere: there is no such run folder"),
        (["sample", "--init=tinny"], "--init=tinny"),
        (["curves"], "needs run folders"),
        (["merge", "--run=x"], "needs"),
        (["sample", "--steps=2"], "unknown option"),
        (["gsm8k", "--limt=2"], "did you mean limit"),
    ],
)
def test_bad_commands(argv, words):
    with pytest.raises(ValueError, match=words):
        command(*argv)


def test_help_names_every_option(capsys):
    command("--help")
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in eval.COMMANDS)
    for name in eval.COMMANDS:
        with pytest.raises(SystemExit):
            command(name, "--help")
    assert "paired by seed" in " ".join(capsys.readouterr().out.split())


# Tables


def fake_run(folder, method, seed, scores, metric=None, data="d", **settings):
    """A run folder with the results that benchmarks leave there: {benchmark: hits of 10}; of a classifier {task: share}."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(f"{method} {seed}".encode())
    (folder / "loss.png").write_bytes(b"")
    weight = 0.1 if method == "balora" else 0
    own = dict(init="base", method=method, seed=seed, options={}, data=data)
    own |= dict(lambda1=weight, lambda2=weight, lambda3=weight) | settings
    record = dict(settings=own, trainable=1234, weights_hash="w", metric=metric, finished=True)
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text(json.dumps(dict(step=1, peak_GiB=0.5 + seed / 10, seconds=60)) + "\n")
    last = dict(step=1, loss=1.0 + seed / 10, drift=0.25)
    if metric:
        ((_, share),) = scores.items()
        last[metric] = share
        scores = {}
    (folder / "eval.json").write_text(json.dumps([last]))
    head = dict(adapter=eval.adapter_hash(folder), items=10, prompts="p")
    for name, hits in scores.items():
        lines = [dict(head)]
        for i in range(10):
            line = dict(row=i, passed=i < hits, got=1, gold=int(i < hits))
            if name == "math":
                line |= dict(got="\\frac12", gold="\\frac{1}{2}" if i < hits else "3")
            lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
        if name in ("humaneval", "mbpp"):
            (folder / f"{name}-results.jsonl").write_text(text)


def cells(out, start):
    """The cells of the printed row that begins so."""
    line = next(line for line in out.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        fake_run(tmp_path / f"p{seed}", "pissa", seed, dict(gsm8k=4 + seed, math=1, humaneval=2))
        fake_run(tmp_path / f"b{seed}", "balora", seed, dict(gsm8k=6 + seed, math=2, humaneval=1))
    runs = ["p0", "p1", "b0", "b1"]
    command("table", *runs, "--poster")
    out = capsys.readouterr().out
    assert cells(out, "pissa")[1:3] == ["1,234", "45.00 ± 7.07 (2)"]
    assert cells(out, "pissa, poster")[2:4] == ["51.48±0.34", "7.60±0.18"]
    assert cells(out, "balora")[2] == "65.00 ± 7.07 (2)" and cells(out, "balora")[5] == "-"
    assert cells(out, "balora, poster")[5] == "36.86±0.31" and "26.18" in out
    assert cells(out, "")[2:8] == ["gsm8k", "math", "humaneval", "mbpp", "mtbench", "NLG average"]
    assert cells(out, "balora")[7] == "31.67 ± 2.36 (2)"  # of (60 + 20 + 10) / 3 and (70 + 20 + 10) / 3
    assert (tmp_path / "out/table.md").read_text().splitlines()[0] in out
    command("table", *runs, "--against=pissa", f"--figure={tmp_path}/x.png")
    out = capsys.readouterr().out
    for words in (
        "gsm8k: 20.000 ± 0.000 (2), 2 of 2",
        "math: 10.000",
        "humaneval: -10.000 ± 0.000 (2), 0 of 2",
    ):
        assert f"  balora, {words}" in out
    assert "drift: 0.000" in out
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    row = cells(out, "pissa")
    assert row[-3:] == ["0.2500 ± 0.0000 (2)", "0.55 ± 0.07 (2)", "1.00 ± 0.00 (2)"]  # drift, GiB, minutes
    fake_run(tmp_path / "b2", "balora", 2, dict(gsm8k=6))
    command("table", *runs, "b2")
    assert cells(capsys.readouterr().out, "balora")[2:4] == ["63.33 ± 5.77 (3)", "20.00 ± 0.00 (2)"]


def test_the_ablations_table_has_both_scripts_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for method, hits in (("pissa", 5), ("balora", 6)):
        fake_run(tmp_path / method, method, 0, dict(gsm8k=hits, math=1))
        names.append(method)
        for task, metric in (("mnli", "accuracy"), ("cola", "matthews")):
            name = f"{method}-{task}"
            fake_run(tmp_path / name, method, 0, {task: 0.8 + hits / 100}, metric, task=task, init="encoder")
            names.append(name)
    command("table", *names)
    out = capsys.readouterr().out
    header = cells(out, "")
    assert header[2:] == "gsm8k;math;NLG average;mnli;cola;GLUE average;loss;drift;peak GiB;minutes".split(
        ";"
    )
    assert cells(out, "balora")[2:8] == ["60.00", "10.00", "35.00", "86.00", "86.00", "86.00"]


def test_by_gives_a_row_per_value_and_the_slope(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for level in (0.0, 0.2, 0.4):
        for seed in (0, 1, 2):
            for method, hits in (("pissa", 3), ("balora", 4 + round(10 * level))):
                name = f"{method}-{level}-{seed}"
                own = dict(pretrain_noise=level, init="tiny")
                fake_run(tmp_path / name, method, seed, dict(gsm8k=hits), **own)
                names.append(name)
    command("table", *names, "--by=pretrain_noise", "--against=pissa", f"--figure={tmp_path}/n.png")
    out = capsys.readouterr().out
    assert cells(out, "balora pretrain_noise=0.4")[2] == "80.00 ± 0.00 (3)"
    assert "balora, gsm8k: slope of the gain over pretrain_noise 100.000 ± 0.000" in out
    assert (tmp_path / "n.png").exists()
    with pytest.raises(ValueError, match="are all pissa, but have another pretrain_noise"):
        command("table", *names)
    with pytest.raises(ValueError, match="--by=pretrain_nois: did you mean pretrain_noise"):
        command("table", *names, "--by=pretrain_nois")
    with pytest.raises(ValueError, match="--against=lora: .*rows are pissa, balora"):
        command("table", *names, "--by=pretrain_noise", "--against=lora")


def test_slope_has_its_interval(capsys):
    pandas = pytest.importorskip("pandas")
    x = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    gains = pandas.DataFrame(dict(by=x, gain=[0.1, -0.1, 1.2, 0.9, 2.0, 1.7]))
    eval.print_gains(gains.assign(label="a", variant="a", column="c"), "noise", "b")
    # By hand: slope 3.7 / 4 = 0.925; residuals' squares sum to 0.13083; t of 4 degrees of freedom is 2.7764;
    # 2.7764 · √(0.13083 / 4 / 4) = 0.251.
    assert "slope of the gain over noise 0.925 ± 0.251" in capsys.readouterr().out


def test_table_leaves_out_what_is_not_of_the_run_or_not_complete(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "a", "pissa", 0, dict(gsm8k=4, math=3))
    (tmp_path / "a/adapter/adapter_model.safetensors").write_bytes(b"another")
    fake_run(tmp_path / "b", "lora", 0, dict(gsm8k=4, math=3))
    lines = (tmp_path / "b/math.jsonl").read_text().splitlines()
    (tmp_path / "b/math.jsonl").write_text("\n".join(lines[:5]) + "\n")
    (tmp_path / "c").mkdir()
    command("table", "a", "b", "c")
    out = capsys.readouterr().out
    assert (
        "a: gsm8k left out (answers of another adapter)" in out and "c: not a finished run; left out" in out
    )
    assert "b: math left out (4 of 10 items)" in out
    with pytest.raises(ValueError, match="no finished run"):
        command("table", "c")
    fake_run(tmp_path / "d", "lora", 1, dict(gsm8k=4), r=9)
    with pytest.raises(
        ValueError, match="are all lora, but have another r; give fewer runs, or --by=SETTING"
    ):
        command("table", "b", "d")
    fake_run(tmp_path / "e", "lora", 0, dict(gsm8k=4))
    with pytest.raises(ValueError, match="are all lora, but have one seed twice"):
        command("table", "b", "e")


def test_runs_without_benchmarks_show_their_last_evaluation(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command("table", run / "out")
    out = capsys.readouterr().out
    last = json.loads((run / "out/eval.json").read_text())[-1]
    assert "loss" in out and f"{last['loss']:.2f}" in out


def test_the_posters_values_average_as_printed():
    """The poster's own averages from the values kept here, so a digit typed wrong would show."""
    for which, (names, rows) in eval.poster_tables().items():
        for method, values in rows.items():
            if names[-1] in values and "-" not in values.values():
                scores = [float(values[name].split("±")[0]) for name in names[:-1]]
                average = sum(scores) / len(scores)
                assert average == pytest.approx(float(values[names[-1]]), abs=0.0101), (which, method)


def test_forgetting_by_hand(run, capsys, tmp_path):
    """Loss of both networks and the drift on windows of other text, against transformers on base and merged."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(1)
    text = "".join(rng.choice("abcdefgh \n") for _ in range(3 * 256 + 100))
    (tmp_path / "other.txt").write_text(text)
    command("loss", f"--run={run}/out", f"--text={tmp_path}/other.txt", "--dtype=float32")
    assert "other.txt: 3 windows" in capsys.readouterr().out
    got = json.loads((run / "out/forgetting.jsonl").read_text().splitlines()[-1])
    command("merge", f"--run={run}/out", f"--out={tmp_path}/merged", "--dtype=float32")
    losses = {}
    logits = {}
    tok = eval.load_run(f"{run}/out")[1]
    ids = torch.tensor([[*tok.bos, *tok.encode(text[i : i + 256])] for i in (0, 256, 512)])
    for name, folder in (("before", run / "base"), ("after", tmp_path / "merged")):
        with torch.no_grad():
            Z = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[:, :-1]
        logits[name] = Z.log_softmax(-1)
        losses[name] = torch.nn.functional.cross_entropy(
            Z.transpose(1, 2), ids[:, 1:], reduction="none"
        ).mean(1)
        assert got[name][0] == pytest.approx(losses[name].mean().item(), abs=1e-4)
    gaps = losses["after"] - losses["before"]
    assert got["forgetting"][0] == pytest.approx(gaps.mean().item(), abs=1e-4) and abs(gaps.mean()) > 1e-3
    assert got["forgetting"][1] == pytest.approx(
        4.302653 * gaps.std().item() / 3**0.5, rel=0.02
    )  # t, 2 degrees
    drift = torch.nn.functional.kl_div(logits["after"], logits["before"], log_target=True, reduction="none")
    assert got["drift"][0] == pytest.approx(drift.sum(-1).mean().item(), rel=0.01)
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(text=text[:400], n=3, code=text[400:])))
    command("loss", f"--run={run}/out", f"--text={tmp_path}/rows.jsonl", "--limit=2")
    assert "rows.jsonl: 2 windows" in capsys.readouterr().out
    (tmp_path / "short.txt").write_text("too short")
    for argv, words in (
        ([f"--run={run}/out", f"--text={tmp_path}/short.txt"], "9 tokens; expected two windows of 256"),
        ([f"--init={run}/base", f"--text={tmp_path}/other.txt"], "give the --run of an adapter"),
        ([f"--run={run}/out", f"--text={tmp_path}/none.txt"], "expected plain text"),
    ):
        with pytest.raises(ValueError, match=words):
            command("loss", *argv)


def test_a_text_asked_again_replaces_its_line(run, tmp_path, capsys, monkeypatch):
    text = tmp_path / "other.txt"
    text.write_text("The cat sat on the mat, and so did I. " * 60)
    path = run / "out/forgetting.jsonl"
    path.write_text('{"text": "first.txt", "adapter": ""}\n{"text": "other.txt"}\n{"text": "cut o')
    monkeypatch.chdir(run)
    command("loss", "--run=out", f"--text={text}", "--limit=3")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["first.txt", "other.txt"] and len(lines[1]["gaps"]) == 3


def test_scatter_and_its_rank_correlations(tmp_path, capsys, monkeypatch):
    """Drift and forgetting that both follow the loss: correlated over all runs, hardly at equal loss."""
    import numpy as np
    from scipy import stats

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = []
    values = []
    for i in range(24):
        at = rng.normal()
        drift, forgot = at + 0.3 * rng.normal(), at + 0.3 * rng.normal()
        name = f"{'lora' if i % 2 else 'pissa'}-1e-{i}-0"
        fake_run(tmp_path / name, "lora", i, {})
        last = json.loads((tmp_path / name / "eval.json").read_text())
        last[-1] |= dict(loss=at, drift=drift)
        (tmp_path / name / "eval.json").write_text(json.dumps(last))
        line = dict(text="t", adapter=eval.adapter_hash(name), forgetting=[forgot, 0.1], gaps=[0, 1])
        (tmp_path / name / "forgetting.jsonl").write_text(json.dumps(line) + "\n")
        names.append(name)
        values.append([drift, forgot, at])
    command("scatter", *names, "--out=s.png")
    out = capsys.readouterr().out
    a, b, c = stats.rankdata(np.array(values), axis=0).T
    whole = stats.spearmanr(a, b).statistic
    rest = [x - np.polyval(np.polyfit(c, x, 1), c) for x in (a, b)]
    partial = stats.pearsonr(*rest).statistic  # of the residuals of the ranks
    assert f"rank correlation of drift and forgetting: {whole:.2f}, 95 % interval" in out and whole > 0.7
    assert (
        f"rank correlation of drift and forgetting at equal loss: {partial:.2f}, 95" in out and partial < 0.6
    )
    assert "24 runs -> s.png" in out and (tmp_path / "s.png").stat().st_size > 5000
    with pytest.raises(
        ValueError,
        match="5 runs have drift, forgetting and loss; expected six or more",
    ):
        command("scatter", *names[:5])
    (tmp_path / "begun").mkdir()
    (tmp_path / names[6] / "forgetting.jsonl").unlink()
    capsys.readouterr()
    command("scatter", *names[:12], "begun", "--out=few/s.png")
    out = capsys.readouterr().out
    assert f"{names[6]}: no forgetting; left out" in out and "11 runs -> few/s.png" in out
    assert "at equal loss: 0.01, 95 % interval -0.64 to 0.65" in out  # here the loss orders the forgetting
    assert "begun: not a finished run; left out" in out
    other = json.dumps(line | dict(gaps=[0, 1, 2], adapter=eval.adapter_hash(names[7])))
    (tmp_path / names[7] / "forgetting.jsonl").write_text(other + "\n")
    with pytest.raises(ValueError, match=f"and {names[7]} have other forgetting prompts or texts"):
        command("scatter", *names[:12])
    command("table", names[0])
    assert "forgetting" in capsys.readouterr().out
    (tmp_path / names[0] / "forgetting.jsonl").write_text(json.dumps(line | dict(adapter="other")) + "\n")
    command("table", names[0])
    assert "forgetting left out (of another adapter)" in capsys.readouterr().out
