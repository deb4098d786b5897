"""What all three scripts share: the command line, a run's folder, rows and prompts, measuring."""

import argparse
import csv
import gzip
import json
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import balora
import model
import train_nlg
from train_nlg import (
    batch_order,
    clean_answer,
    collate,
    encode_rows,
    extract_answer,
    fill,
    measure,
    parse,
    read_lines,
    read_records,
    read_rows,
    write_text,
)


@dataclass
class Toy:
    """Toy settings."""

    init: str = "a"  # which
    rate: float = 0.5  # a share, in (0, 1]
    weight: float | None = None  # None: chosen
    steps: int = 3  # count
    fast: bool = False  # quick
    options: dict = field(default_factory=dict)  # the method's own


def toy(*argv):
    return parse(Toy, list(argv), {"b": {"steps": 7, "rate": 0.1}}, by=["init"])


def test_parse():
    assert toy() == Toy()
    assert toy("--rate=0.25", "--steps", "9") == Toy(rate=0.25, steps=9)
    assert toy("--init=b") == toy("--init=some/where/b", "--init=b") == Toy(init="b", steps=7, rate=0.1)
    assert toy("--init=some/where/b").steps == 7
    assert toy("--init", "b", "--steps=2").steps == 2
    assert toy("--fast").fast and toy("--fast=true").fast
    assert not toy("--fast=false").fast and not toy("--fast", "--no-fast").fast
    assert toy("--weight=1e-3").weight == 1e-3
    assert toy("--niter=0", "--keep=last").options == {"niter": 0, "keep": "last"}


@pytest.mark.parametrize(
    "word, words",
    [
        ("--stps=3", "unknown option --stps=3: did you mean steps"),
        ("--ste=3", "unknown option"),
        ("--steps=x", "invalid int"),
        ("--fast=perhaps", "true or false"),
        ("word", "unknown option word"),
    ],
)
def test_parse_refuses(word, words):
    with pytest.raises(ValueError, match=words):
        toy(word)


def test_help_prints_the_comments(capsys):
    with pytest.raises(SystemExit):
        toy("--help")
    out = capsys.readouterr().out
    assert "a share, in (0, 1] (default: 0.5)" in " ".join(out.split())
    assert "--niter" in out and "of pissa, balora" in " ".join(out.split())


def test_parser_is_one_for_commands_too():
    parser = argparse.ArgumentParser(exit_on_error=False)
    train_nlg.add_option(parser, "limit", int, "items, 100 % of them")
    assert train_nlg.parse_options(parser, ["--limit=3"]) == {"limit": 3}
    for argv, words in (
        (["--limit=x"], "invalid int"),
        (["--limt=3"], "did you mean limit"),
        (["y"], "unknown option y"),
    ):
        with pytest.raises(ValueError, match=words):
            train_nlg.parse_options(parser, argv)


# Rows and prompts

ROWS = [
    {"instruction": "Add", "input": "2 and 2", "output": "4"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
]


def test_read_rows_from_every_format(tmp_path):
    import datasets

    lines = "\n".join(map(json.dumps, ROWS)) + "\n"
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write(lines)
    with open(tmp_path / "a.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for kind in ("json", "jsonl", "jsonl.gz", "csv", "parquet"):
        rows = read_rows(str(tmp_path / f"a.{kind}"))
        assert rows == [("Add", "2 and 2", "4"), ("Say hi", "", "hi")], kind
    path = str(tmp_path / "a.json")
    assert read_rows(path, limit=1) == [("Add", "2 and 2", "4")]


def test_text_stays_as_it_is_written(tmp_path):
    """No type inference: NA, 1.10 and 01234 are text; U+2028 ends no line; a BOM is no text."""
    (tmp_path / "a.csv").write_text(
        "\ufeffquestion,answer\r\nNA,1.10\r\n01234,2020-01-02\r\n", encoding="utf-8"
    )
    assert read_rows(str(tmp_path / "a.csv")) == [("NA", "", "1.10"), ("01234", "", "2020-01-02")]
    row = {"question": "a\u2028b", "answer": "1.10"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_rows(str(tmp_path / "a.jsonl")) == [("a\u2028b", "", "1.10")]


@pytest.mark.parametrize("q, a", [("query", "response"), ("question", "answer"), ("human", "assistant")])
def test_fields_are_recognised(tmp_path, q, a):
    (tmp_path / "a.json").write_text(json.dumps([{q: "x", a: "y", "type": "z"}]))
    assert read_rows(str(tmp_path / "a.json")) == [("x", "", "y")]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", '{"query": "x", "response": "y"}\n{"query": "x", oops\n', "a.jsonl.*line 2: Expecting"),
        ("a.jsonl", '{"query": "x"}\n1\n', "a.jsonl: expected a list of objects"),
        ("a.json", '[{"query": "x"}, ', "a.json: line 1: "),
        ("a.json", '{"query": "x"}', "expected a list of objects"),
        ("a.json", "", "cannot be read"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "question,answer\n", "no rows"),
        (
            "a.json",
            '[{"text": "x", "answer": "y"}]',
            "a.json has the fields text, answer; rename them: one of instruction, query",
        ),
        ("a.jsonl.gz", "no gzip", "cannot be read"),
        ("a.parquet", "no parquet", "a.parquet: cannot be read"),
        ("a.txt", "x", "expected an existing"),
    ],
)
def test_bad_data_says_what_is_wrong(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_rows(str(tmp_path / name))


def test_missing_data_says_so():
    with pytest.raises(ValueError, match="--data=nowhere.json: expected an existing"):
        read_records("nowhere.json")
    with pytest.raises(
        ValueError, match="--other=some/dataset:train, which is no file here, of the hub: cannot be read"
    ):
        read_records("some/dataset:train", "--other")


def test_gsm8k_answers_are_cleaned(shared):
    text = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72.\n#### 72"
    assert clean_answer(text) == "He sold 48/2 = 24 clips.\nIn all 72.\nThe answer is: 72"
    assert clean_answer("#### 1,234 ") == "The answer is: 1234" and clean_answer("plain #1") == "plain #1"
    for other in ('cout << "n: ";\n cin >> n;', "text\n#### Conclusion of the text", "x #### 5"):
        assert clean_answer(other) == other
    rows = read_rows(str(shared / "gsm8k/train.jsonl"))
    raw = [json.loads(line)["answer"] for line in open(shared / "gsm8k/train.jsonl")]
    assert len(rows) == 7473 and not any("<<" in a or "####" in a for _, _, a in rows)
    for (_, _, answer), line in zip(rows, raw, strict=True):
        assert extract_answer(answer) == int(line.split("#### ")[1].replace(",", ""))


def test_prompts():
    assert fill("alpaca", "Add {x}").endswith("### Instruction:\nAdd {x}\n\n### Response:")
    assert fill("plain", "a") == "a\n" and fill("plain", "a", "b") == "a\nb\n"
    assert "### Input:\n2\n\n### Response:" in fill("alpaca", "Double", "2")
    assert fill("Q {instruction} A", "x") == "Q x A"
    with pytest.raises(ValueError, match="instruction"):
        fill("nothing", "x")


def test_encode_rows_drops_and_counts():
    tok = model.Bytes()
    rows = [("q", "", "a"), ("q", "", " "), ("q" * 50, "", "a"), ("q", "", "b" * 50)]
    kept, line = encode_rows(rows, tok, "plain", 20)
    assert kept == [([256, *b"q\n"], [*b"a", 257])]
    assert line == "4 rows read, 1 kept, 1 dropped: no response, 2 dropped: longer than 20 tokens"
    with pytest.raises(ValueError, match="no row is left.*2 dropped"):
        encode_rows(rows[2:], tok, "plain", 20)
    with pytest.raises(ValueError, match="no row is left.*4 rows read"):
        encode_rows(rows, tok, "alpaca", 100)


def test_collate_labels_the_response_and_its_eos():
    ids, valid, y = collate([([1, 2, 3], [4, 0]), ([5], [6, 7, 0])], "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 0], [5, 6, 7, 0, 0]] and y.tolist() == [4, 0, 6, 7, 0]
    assert valid.tolist() == [[False, False, True, True, False], [True, True, True, False, False]]


def test_batches_cover_every_row_once_and_are_of_similar_length():
    import random

    lengths = [random.Random(i).randrange(1, 300) for i in range(1000)]
    batches = batch_order(lengths, 8, random.Random("order 0 0"))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert batches != batch_order(lengths, 8, random.Random("order 0 1"))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


# Answers and measures


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
    assert extract_answer(text) == number


def test_measure_by_hand(small):
    """Loss, drift and diversity of two rows against a direct computation from full logits."""
    net = small(vocab_size=259)
    balora.attach(net, "pissa", r=4)
    for layer in balora.adapted_layers(net).values():
        layer.B.data += 0.1
    examples = [([256, 5, 6], [7, 8, 9, 257]), ([256, 9], [3, 257])]
    got = measure(net, examples, batch_size=1, K=5, k=2, teacher=net)
    loss = drift = entropy = 0.0
    logits = []
    with torch.no_grad():
        for prompt, answer in examples:
            ids = torch.tensor([prompt + answer])
            Z_F = net(ids)[0, len(prompt) - 1 : -1]
            with balora.teacher(net):
                Z_P = net(ids)[0, len(prompt) - 1 : -1]
            loss += F.cross_entropy(Z_F, torch.tensor(answer), reduction="sum").item()
            drift += F.kl_div(Z_F.log_softmax(-1), Z_P.softmax(-1), reduction="sum").item()
            entropy += torch.distributions.Categorical(logits=Z_F.topk(5).values).entropy().sum().item()
            logits.append(Z_F)
    assert got["loss"] == pytest.approx(loss / 6, rel=1e-4)
    assert got["drift"] == pytest.approx(drift / 6, rel=1e-4)
    assert got["diversity"] == pytest.approx(entropy / 6, rel=1e-4)
    sigma = torch.linalg.svdvals(torch.cat(logits))
    assert got["spectrum"] == pytest.approx((sigma[:2].sum() / sigma.sum()).item(), rel=1e-3)
    together = measure(net, examples, batch_size=2, K=5, k=2)
    assert together["drift"] is None
    assert together["spectrum"] == pytest.approx(got["spectrum"], rel=1e-5)  # whatever the batch


def test_spectrum_is_of_a_fixed_number_of_positions(small, monkeypatch):
    """σ depend on the number of rows: the same network gives the same share on few rows and on many."""
    net = small(vocab_size=259)
    examples = [([256], [*range(first, first + 8)]) for first in range(0, 240, 8)]
    monkeypatch.setattr(train_nlg, "POSITIONS", 16)
    few = measure(net, examples[:2], batch_size=1, K=5, k=2)["spectrum"]
    many = measure(net, examples, batch_size=7, K=5, k=2)["spectrum"]
    assert many == pytest.approx(few, rel=1e-5)
    monkeypatch.setattr(train_nlg, "POSITIONS", 256)
    assert abs(measure(net, examples, batch_size=7, K=5, k=2)["spectrum"] - few) > 0.05


def test_measure_makes_fp32_logits_of_a_16_bit_network(small):
    """Rounded logits alone report a drift; on SmolLM2 they double its floor, 1.5e-3 against 0.7e-3 nats."""
    net = small(vocab_size=259, dtype=torch.bfloat16)
    net.head.data *= 100  # confident, as a trained network is
    ids = torch.arange(40)[None]
    got = measure(net, [([0], [*range(1, 40)])], batch_size=1, K=5, k=2)["loss"]
    with torch.no_grad():
        H = net.hidden(ids)[0, :-1]
    exact = F.cross_entropy(F.linear(H.float(), net.head.float()), ids[0, 1:]).item()
    rounded = F.cross_entropy(F.linear(H, net.head).float(), ids[0, 1:]).item()
    assert got == pytest.approx(exact, rel=1e-6)
    assert abs(rounded - exact) > 10 * abs(got - exact)


# The run's folder


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "x.json"
    write_text(str(path), json.dumps({"a": 1}))

    def full(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write.*No space left.*untouched"):
        balora.write_atomic(str(path), full)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_read_lines_skips_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(str(path)) == [{"step": 1}, {"step": 2}] and path.read_text().endswith('{"ste')
    assert read_lines(str(tmp_path / "none.jsonl")) == []
    for text in ('{"step": 1}\noops\n{"step": 2}\n', "1\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="log.jsonl: .*move it away"):
            read_lines(str(path))


def test_pick_device_and_dtype():
    assert (
        model.pick_dtype("auto", "cpu") == torch.float32
        and model.pick_dtype("bfloat16", "cpu") == torch.bfloat16
    )
    assert model.pick_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ValueError, match="--dtype=float8"):
        model.pick_dtype("float8", "cpu")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"--device={device}: .*; use auto, cpu, cuda"):
            model.pick_device(device)


def test_an_older_trees_run_is_refused_by_one_line(tmp_path):
    record = dict(settings=dict(init="tiny", method="lora"), weights_hash="x", commit="03e066a")
    write_text(str(tmp_path / "config.json"), json.dumps(record))
    with pytest.raises(ValueError, match="older tree; read it with commit 03e066a"):
        train_nlg.read_run(str(tmp_path))
