"""GLUE's files as they are, controlled corruption, metrics. Nothing here needs a model."""

import json
import math
import random
import warnings
from collections import Counter
from fractions import Fraction

import datasets
import pytest
import torch

from train_nlu import TASKS, Settings, flip_labels, load_rows, read_file, read_glue, scores, subsample

ROWS = {  # of data/SOURCES.md, but for the malformed row of QQP (label 0)
    "CoLA/train.tsv": ("cola", [2528, 6023]),
    "MRPC/train.tsv": ("mrpc", [1194, 2474]),
    "MRPC/dev.tsv": ("mrpc", [129, 279]),
    "RTE/train.tsv": ("rte", [1249, 1241]),
    "SST-2/train.tsv": ("sst2", [29780, 37569]),
    "SST-2/dev_first436.tsv": ("sst2", [208, 228]),
    "QNLI/dev.tsv": ("qnli", [2702, 2761]),
    "QQP/train_part_23497.tsv": ("qqp", [14749, 8747]),
    "MNLI/dev_matched.jsonl": ("mnli", [3479, 3123, 3213]),
}


@pytest.mark.parametrize("name", ROWS)
def test_no_row_is_lost(shared, capsys, name):
    task, counts = ROWS[name]
    rows = read_file(task, "train", str(shared / "glue" / name))
    assert [Counter(row[2] for row in rows)[c] for c in range(len(counts))] == counts
    assert sum(counts) == len(rows)
    for a, b, _ in rows:
        assert a.strip() and (b is None if len(TASKS[task].fields) == 1 else b.strip())
    out = capsys.readouterr().out
    assert f"{len(rows):,} rows from" in out
    assert ("1 dropped" in out and "row 1 (" in out and "133273" in out) == ("23497" in name)


def test_stsb(shared):
    rows = read_file("stsb", "train", str(shared / "glue/STS-B/train.tsv"))
    scores = [row[2] for row in rows]
    assert (
        len(rows) == 5749
        and min(scores) == 0
        and max(scores) == 5
        and round(sum(scores) / len(scores), 3) == 2.701
    )


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith(".tsv")] + ["STS-B/train.tsv"])
def test_texts_survive_byte_for_byte(shared, name):
    """Every text, with the tabs around it, stands in the file; so unpaired and doubled quotes do."""
    path, task = shared / "glue" / name, ROWS[name][0] if name in ROWS else "stsb"
    rows, lines = read_file(task, "train", str(path)), path.read_bytes().removesuffix(b"\n").split(b"\n")
    lines = lines[0 if task == "cola" else 1 :]  # a header, or QQP's malformed row
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        cells = line.split(b"\t")
        assert all(text.encode() in cells for text in row[:2] if text is not None)


def test_odd_quotes(shared):
    glue = shared / "glue"
    assert read_file("stsb", "train", str(glue / "STS-B/train.tsv"))[2001] == (
        '"Then the captain was gone.',
        "Then the captain came back.",
        0.8,
    )
    assert read_file("cola", "train", str(glue / "CoLA/train.tsv"))[3056] == (
        'Susan whispered "Shut up".',
        None,
        1,
    )
    odd = [
        row
        for row in read_file("mrpc", "train", str(glue / "MRPC/train.tsv"))
        if row[0].count('"') % 2 or row[1].count('"') % 2
    ]
    assert len(odd) == 207
    doubled = [
        text
        for row in read_file("qqp", "train", str(glue / "QQP/train_part_23497.tsv"))
        for text in row[:2]
        if text[0] == text[-1] == '"' and '""' in text
    ]
    assert len(doubled) == 946  # QQP's own: a csv's quoting inside the tsv, kept on the hub too


def test_a_glue_folder(shared, capsys):
    """All of GLUE's folder, or a task's; a tenth of train where dev is not there, the same one each time."""
    rows = read_glue("mrpc", str(shared / "glue"))
    assert (
        {k: len(v) for k, v in rows.items()}
        == {"train": 3668, "dev": 408}
        == {k: len(v) for k, v in read_glue("mrpc", str(shared / "glue/MRPC")).items()}
    )
    capsys.readouterr()
    rte = read_glue("rte", str(shared / "glue"))
    assert (
        len(rte["train"]) == 2241
        and len(rte["dev"]) == 249
        and "dev: 249 rows of train are held out" in capsys.readouterr().out
    )
    whole = read_file("rte", "train", str(shared / "glue/RTE/train.tsv"))
    assert sorted(rte["train"] + rte["dev"]) == sorted(whole) and rte == read_glue(
        "rte", str(shared / "glue")
    )
    dev = str(shared / "glue/MNLI/dev_matched.jsonl")
    other = read_glue("mnli", dev, dev)
    assert {k: len(v) for k, v in other.items()} == {"train": 9815, "dev": 9815}
    assert "dev: 9,815 of its 9,815 rows have the very texts of a training row" in capsys.readouterr().out


def test_the_tasks():
    assert list(TASKS) == ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb", "world", "own"]
    for name, t in list(TASKS.items())[:8]:
        Z = torch.eye(max(2, len(t.labels)))[:2]
        assert 1 <= len(t.fields) <= 2 and t.metric in scores([0, 1], Z, t.labels)
        assert len(t.columns) in (0, len(t.fields) + 1)
        filled = t.prompt.format(a="<1>", b="<2>")
        if name == "stsb":
            assert filled == ""
        else:
            assert filled.startswith(name + " ") and "<1>" in filled
            assert ("<2>" in filled) == (len(t.fields) == 2)
    prompt = TASKS["mnli"].prompt.format(a="It rains {a}.", b="It is wet.")
    assert prompt == "mnli hypothesis: It is wet. premise: It rains {a}."


def test_hub(monkeypatch):
    part = lambda n: datasets.Dataset.from_dict(
        dict(premise=["p"] * n, hypothesis=["h"] * n, label=[2] * n, idx=list(range(n)))
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, task: (
            {
                "train": part(5),
                "validation_matched": part(3),
                "validation_mismatched": part(2),
                "test_matched": part(9),
            }
            if (name, task) == ("nyu-mll/glue", "mnli")
            else {"train": part(20).rename_columns({"premise": "sentence1", "hypothesis": "sentence2"})}
        ),
    )
    assert {k: len(v) for k, v in read_glue("mnli").items()} == {
        "train": 5,
        "dev": 3,
        "dev_mm": 2,
    } and read_glue("mnli")["dev_mm"][0] == ("p", "h", 2)
    with pytest.raises(ValueError, match="nyu-mll/glue rte train, row 1: unknown label 2"):
        read_glue("rte")


def test_hub_out_of_reach(monkeypatch):
    def refuse(*args):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError,
        match=r"^nyu-mll/glue rte: cannot be read \(ConnectionError: .*\); give a downloaded folder, --data=FOLDER$",
    ):
        read_glue("rte")


# ---------------------------------------------------------------------------------------------------------------------
# Small files


def write(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def test_tsv_syntax(tmp_path):
    """A BOM, CR LF, quotes, U+2028, U+0085 and form feeds in the text; no line end after the last row."""
    path = write(
        tmp_path,
        "x.tsv",
        '\ufeffindex\tsentence1\tsentence2\tlabel\r\n0\t"a\u2028b\x85c\x0c\td""e\tentailment\r\n1\t\t f \tnot_entailment',
    )
    assert read_file("rte", "train", path) == [('"a\u2028b\x85c\x0c', 'd""e', 0), ("", " f ", 1)]


def test_header_or_not(tmp_path):
    row = "7\t1\t2\tWhy?\tWho?\t1\n"
    assert read_file("qqp", "train", write(tmp_path, "a.tsv", row)) == [("Why?", "Who?", 1)]
    assert read_file(
        "qqp", "train", write(tmp_path, "b.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + row)
    ) == [("Why?", "Who?", 1)]
    assert read_file("cola", "train", write(tmp_path, "c.tsv", "gj04\t0\t*\tHe sentence.\n")) == [
        ("He sentence.", None, 0)
    ]
    assert read_file(
        "mnli",
        "dev",
        write(
            tmp_path,
            "d.tsv",
            "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n(x)\tp\th\tneutral\tcontradiction\n",
        ),
    ) == [("p", "h", 2)]
    assert read_file("mnli", "dev", write(tmp_path, "e.tsv", "premise\thypothesis\tlabel\np\th\t1\n")) == [
        ("p", "h", 1)
    ]


def test_mnli_folder_has_both_dev_splits(tmp_path):
    text = "sentence1\tsentence2\tgold_label\np\th\tneutral\n"
    for name in ("train", "dev_matched", "dev_mismatched", "test_matched"):
        write(tmp_path, f"MNLI/{name}.tsv", text)
    assert list(read_glue("mnli", str(tmp_path))) == ["train", "dev", "dev_mm"]
    assert list(read_glue("mnli", str(tmp_path), str(tmp_path / "MNLI/dev_matched.tsv"))) == ["train", "dev"]


def test_other_formats(tmp_path):
    rows = [("p", "h", 0), ("q\u2028", "n/a", 2)]
    words = [dict(premise=a, hypothesis=b, label=TASKS["mnli"].labels[c]) for a, b, c in rows]
    ids = [dict(premise=a, hypothesis=b, label=c) for a, b, c in rows]
    datasets.Dataset.from_list(ids).to_parquet(tmp_path / "x.parquet")
    write(tmp_path, "x.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in words) + "\n")
    write(tmp_path, "x.json", json.dumps(words))
    write(tmp_path, "ids.json", json.dumps([dict(row, label=str(row["label"])) for row in ids]))
    write(tmp_path, "x.tsv", "premise\thypothesis\tlabel\np\th\t0\nq\u2028\tn/a\tcontradiction\n")
    for name in ("x.jsonl", "x.json", "ids.json", "x.parquet", "x.tsv"):
        assert read_file("mnli", "train", str(tmp_path / name)) == rows, name
    text = 'sentence,label\n"good, ""really""",positive\nbad,negative\n'
    path = write(tmp_path, "x.csv", text)
    assert read_file("sst2", "train", path) == [('good, "really"', None, 1), ("bad", None, 0)]


def test_malformed_rows_are_counted_and_named(tmp_path, capsys):
    text = '{"premise": "p", "hypothesis": "h", "label": 0}\n{"premise": "p", "label": 0}\n'
    path = write(tmp_path, "x.jsonl", text + '{"premise": null, "hypothesis": "h", "label": 0}\n')
    assert len(read_file("mnli", "train", path)) == 1
    out = capsys.readouterr().out
    assert (
        "2 dropped without premise, hypothesis, label: row 2 ({'premise': 'p', 'label': 0} ...); row 3 ("
        in out
    )
    path = write(tmp_path, "x.tsv", "sentence\tlabel\ngood \t1\n\nbad\t0\n" + "no label\n" * 4)
    assert len(read_file("sst2", "dev", path)) == 2
    out = capsys.readouterr().out
    assert "dev: 2 rows" in out and "5 dropped" in out
    assert "row 2 ({'broken line': ''} ...); row 4 ({'broken line': 'no label'} ...); row 5 (" in out


HEAD = "sentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    "task, name, text, words",
    [
        (
            "rte",
            "x.tsv",
            HEAD + "a\tb\tentailment\na\tb\tneutral\n",
            r"x.tsv, row 2: unknown label 'neutral'; known: 0, 1, entailment, not_entailment$",
        ),
        ("rte", "x.tsv", HEAD + "a\tb\t2\n", "unknown label '2'"),
        ("rte", "x.tsv", HEAD + "a\tb\t\n", "unknown label ''"),
        ("rte", "x.tsv", HEAD + "a\tb\t²\n", "unknown label '²'"),
        (
            "rte",
            "x.json",
            '[{"sentence1": "a", "sentence2": "b", "label": -1}]',
            "no row that can be used for rte: train: 0 rows .*; 1 dropped",
        ),
        ("rte", "x.json", '[{"sentence1": "a", "sentence2": "b", "label": true}]', "unknown label True"),
        (
            "stsb",
            "x.tsv",
            "sentence1\tsentence2\tscore\na\tb\t5.1\n",
            "unknown label '5.1'; known: scores from 0 to 5",
        ),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", "unknown label 'nan'"),
        ("stsb", "x.tsv", "sentence1\tsentence2\tscore\na\tb\tgood\n", "unknown label 'good'"),
        (
            "rte",
            "x.tsv",
            "index\tsentence1\tsentence2\n0\ta\tb\n",
            "no columns sentence1, .* in its first line",
        ),
        (
            "mrpc",
            "x.tsv",
            "index\t#1 String\n0\ta\n",
            "no columns #1 String, #2 String, Quality in its first",
        ),
        (
            "cola",
            "x.tsv",
            "index\tsentence\n0\ta\n",
            "no row that can be used for cola: train: 0 rows .*; 2 dropped without sentence, label: row 1 ",
        ),
        ("rte", "x.tsv", "", "no columns sentence1"),
        ("rte", "x.tsv", HEAD, "no row that can be used for rte: train: 0 rows"),
        ("rte", "x.jsonl", "", "x.jsonl: no rows"),
        ("rte", "x.json", "{}", "expected a list of objects"),
        ("rte", "x.json", "3", "expected a list of objects"),
        ("rte", "x.json", '[{"data": []}]', r"no row .* row 1 \({'data': \[\]} ...\)"),
        ("rte", "x.json", '[{"0": {', "x.json: line 1: .*expected rows in .json"),
        ("rte", "x.jsonl", "{}\n3\n", "x.jsonl: expected a list of objects"),
        ("rte", "x.tsv", b"sentence1\tsentence2\tlabel\n\xff\tb\t1\n", "not UTF-8 text .* at byte 26"),
        ("rte", "x.txt", "a", r"x.txt: expected an existing .json .jsonl"),
        (
            "rte",
            "x.tsv",
            HEAD + "a\tb\t1\n" * 9,
            "9 training rows are too few to hold out a tenth; give --eval_data",
        ),
    ],
)
def test_bad_files(tmp_path, task, name, text, words):
    with pytest.raises(ValueError, match=words) as e:
        read_glue(task, write(tmp_path, name, text))
    assert "\n" not in str(e.value)


def test_bad_paths(tmp_path):
    (tmp_path / "RTE").mkdir()
    write(tmp_path, "RTE/test.tsv", HEAD)
    train = write(tmp_path, "x.tsv", HEAD + "a\tb\t1\n")
    for data, eval_data, words in (
        (str(tmp_path), "", r"no train.tsv of rte there, only \['test.tsv'\]"),
        ("nowhere", "", "--data=nowhere, which is no file here, of the hub: cannot be read"),
        ("nowhere.tsv", "", "No such file or directory: 'nowhere.tsv'"),
        (train, "nowhere.jsonl", "--eval_data=nowhere.jsonl: expected an existing"),
        (train, str(tmp_path), "--eval_data=.*: expected an existing"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            read_glue("rte", data, eval_data)


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def toy(*counts):
    rows = [(f"a{i}", None, c) for c, n in enumerate(counts) for i in range(n)]
    return random.Random(0).sample(rows, len(rows))


@pytest.mark.parametrize("p", [0, 0.1, 0.333, 1])
def test_flips_are_exact_seeded_and_touch_labels_alone(p):
    rows = toy(50, 30, 21)
    before = list(rows)
    flipped = flip_labels(rows, p, 3, seed=1)
    changed = [i for i in range(101) if flipped[i] != rows[i]]
    assert rows == before and len(changed) == round(p * 101)
    assert [row[:2] for row in flipped] == [row[:2] for row in rows]
    assert {row[2] for row in flipped} <= {0, 1, 2}
    assert flipped == flip_labels(rows, p, 3, seed=1)
    if 0 < p < 1:
        assert flipped != flip_labels(rows, p, 3, seed=2)


def test_flips_are_uniform_over_the_other_classes():
    rows = toy(0, 6000)
    new = Counter(row[2] for row in flip_labels(rows, 1.0, 4, seed=0))
    assert new[1] == 0 and all(abs(new[c] - 2000) < 5 * math.sqrt(6000 * 2 / 9) for c in (0, 2, 3))


def test_subsample():
    labels = ("x", "y", "z")
    rows = toy(300, 290, 280)
    before = list(rows)
    part = subsample(rows, "100:10:1", labels, seed=0)
    places = [rows.index(row) for row in part]
    assert rows == before and places == sorted(set(places))
    assert Counter(row[2] for row in part) == {0: 300, 1: 30, 2: 3}
    assert part == subsample(rows, "100:10:1", labels, 0) != subsample(rows, "100:10:1", labels, 1)

    def count(ratio, *counts):
        left = Counter(row[2] for row in subsample(toy(*counts), ratio, labels, 0))
        return [left[c] for c in range(3)]

    assert count("1:1:1", 300, 290, 280) == [280, 280, 280]
    assert count("1:10:100", 300, 290, 280) == [2, 28, 280]
    assert count("1000:1:1", 300, 290, 280) == [300, 1, 1]
    assert count("0.5:0.25:0.1", 10, 10, 10) == [10, 5, 2]
    assert count("30:29:28", 300, 290, 280) == [300, 290, 280]


def test_what_was_done_to_the_rows_is_said(tmp_path, capsys):
    records = [dict(sentence=a, label=c) for a, _, c in toy(300, 290)]
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, records)))
    s = Settings(task="sst2", data=path, eval_data=path, max_rows=200, imbalance="10:1", label_noise=0.2)
    rows = load_rows(s)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [line[0] for line in lines] == ["read", "kept", "flipped", "trained"]
    assert [line[4::2] for line in lines] == [["negative,", "positive"]] * 4
    (read, kept, flipped, trained) = ([int(word) for word in line[3::2]] for line in lines)
    assert sum(read) == 200 and kept == [read[0], max(1, read[0] // 10)]
    assert sum(flipped) == round(0.2 * sum(kept))
    assert trained == [kept[0] - flipped[0] + flipped[1], kept[1] - flipped[1] + flipped[0]]
    assert [Counter(row[2] for row in rows["train"])[c] for c in range(2)] == trained and len(
        rows["dev"]
    ) == 590


@pytest.mark.parametrize(
    "rows, ratio, words",
    [
        (toy(3, 3), "1:2:3", "--imbalance=1:2:3: expected a ratio such as 100:10:1 of x, y"),
        (toy(3, 3), "1:0", "expected a ratio"),
        (toy(3, 3), "1:b", "expected a ratio"),
        (toy(3, 3), "1/0:1", "expected a ratio"),
        (toy(3), "2:1", "a class has no row among 3"),
    ],
)
def test_refused_ratios(rows, ratio, words):
    with pytest.raises(ValueError, match=words):
        subsample(rows, ratio, ("x", "y"), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, against their definitions in exact fractions


def logits(predicted, D):
    """Class logits whose largest is that of each predicted class."""
    return torch.nn.functional.one_hot(torch.tensor(predicted), D).float()


def classification_scores(y, predicted, labels):
    return scores(y, logits(predicted, len(labels)), labels)


def regression_scores(y, predicted):
    return scores(y, torch.tensor(predicted, dtype=torch.float64)[:, None], ())


def test_classification_scores():
    y, predicted = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 2, 2, 0, 1]
    got = classification_scores(y, predicted, ("x", "y", "z"))
    pairs = Counter(zip(y, predicted))
    f1 = [Fraction(2 * pairs[c, c], y.count(c) + predicted.count(c)) for c in range(3)]
    assert set(got) == {"accuracy", "macro_f1", "matthews", "recall_x", "recall_y", "recall_z"} and all(
        type(v) is float for v in got.values()
    )
    assert got["accuracy"] == pytest.approx(0.6) and [got[f"recall_{w}"] for w in "xyz"] == pytest.approx(
        [2 / 3, 1 / 2, 3 / 5]
    )
    assert got["macro_f1"] == pytest.approx(float(sum(f1) / 3))
    n, hits, t, p = 10, 6, [3, 2, 5], [3, 3, 4]  # Gorodkin's R_K from the confusion matrix
    cov = lambda a, b: sum(u * v for u, v in zip(a, b))
    assert got["matthews"] == pytest.approx(
        (hits * n - cov(t, p)) / math.sqrt((n * n - cov(p, p)) * (n * n - cov(t, t)))
    )


def test_binary_scores():
    y, predicted = [1] * 6 + [0] * 4, [1, 1, 1, 1, 0, 0, 1, 0, 0, 0]  # TP 4, FN 2, FP 1, TN 3
    got = classification_scores(y, predicted, ("no", "yes"))
    assert (
        got["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
        and got["recall_no"] == 0.75
        and got["recall_yes"] == pytest.approx(4 / 6)
    )
    assert got["matthews"] == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5)) and got[
        "macro_f1"
    ] == pytest.approx((8 / 11 + 6 / 9) / 2)


def test_regression_scores():
    y, predicted = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 2.0, 10.0, 3.0]
    got = regression_scores(y, predicted)

    def pearson(a, b):
        a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
        return sum(x * z for x, z in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(z * z for z in b))

    ranks = pearson([1, 2, 3, 4, 5], [1, 2.5, 2.5, 5, 4])  # ties share their mean rank
    assert got == pytest.approx(
        dict(pearson=pearson(y, predicted), spearman=ranks, combined=(pearson(y, predicted) + ranks) / 2)
    )


def test_scores_reads_logits():
    Z = torch.tensor([[0.1, 0.9], [2.0, -1.0], [0.0, 3.0]])
    assert scores([1, 0, 0], Z, ("no", "yes")) == classification_scores([1, 0, 0], [1, 0, 1], ("no", "yes"))
    assert scores([1.0, 2.0, 4.0], torch.tensor([[1.0], [3.0], [2.0]]), ()) == regression_scores(
        [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    )


def test_degenerate_scores():
    """Constant predictions, a single class: defined numbers, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = classification_scores([0, 1, 1], [1, 1, 1], ("no", "yes"))
        assert got == pytest.approx(
            dict(accuracy=2 / 3, f1=0.8, macro_f1=0.4, matthews=0.0, recall_no=0.0, recall_yes=1.0)
        )
        assert classification_scores([0, 0], [0, 0], ("x", "y", "z")) == pytest.approx(
            dict(accuracy=1.0, macro_f1=1 / 3, matthews=0.0, recall_x=1.0, recall_y=0.0, recall_z=0.0)
        )
        assert classification_scores([1], [0], ("no", "yes"))["matthews"] == 0.0
        for y, predicted in (([1.0, 2.0], [3.0, 3.0]), ([2.0, 2.0], [1.0, 3.0]), ([1.0], [1.0])):
            assert regression_scores(y, predicted) == dict(pearson=0.0, spearman=0.0, combined=0.0)
        assert all(map(math.isfinite, regression_scores([1.0, 2.0, 3.0], [5.0, 5.0, 5.0 + 1e-14]).values()))
