"""GLUE-style tuning with BA-LoRA or one of the methods it is compared with, on one device.

    python train_nlu.py                                               # no download: pre-trains a tiny encoder, tunes it on an imbalanced task, a CPU will do
    python train_nlu.py --init=minilm --task=rte --data=path/to/glue  # real weights and text, with --epochs=3 --warmup=0.1 minutes on a CPU
    python train_nlu.py --init=deberta-v3-base --task=mnli            # the poster's setting: one GPU

Every setting is a line below and an option on the command line (--name=value, --help). A run writes config.json, log.jsonl, eval.json,
checkpoint.pt, features.npz, adapter/ and loss.png to its folder; the same command with --resume goes on after an interruption, bit for bit.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import balora
import eval
import model

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """Classification and regression (NLU). Presets of --task and --init replace defaults, the command line wins."""

    init: str = "tiny"  # tiny, minilm, roberta-base, deberta-v3-base, t5-base, or a Hugging Face folder of these families
    task: str = "mnli"  # mnli, sst2, mrpc, cola, qnli, qqp, rte, stsb; world: what tiny knows about
    method: str = "balora"  # full, bitfit, hadapter, padapter, lora, lora+, lora-fa, lora-ga, adalora, dora, pissa, milora, corda, corda++, balora
    against: str = ""  # comma-separated methods to run next with the same seed and data, each with its own λ, for comparison
    out_dir: str = ""  # run folder; empty: out/INIT-TASK-METHOD-SEED
    resume: bool = False  # go on with the run in out_dir
    overwrite: bool = False  # replace the run in out_dir
    dry_run: bool = False  # print layers, parameters and a memory estimate; load no weights
    seed: int = 0  # of everything random; for tiny it covers pre-training
    # data
    data: str = ""  # folder of GLUE's files, or one training file; empty: nyu-mll/glue on the hub
    eval_data: str = (
        ""  # file to evaluate on; empty: the task's dev split, or a fixed tenth of train where there is none
    )
    max_rows: int = 0  # train on N rows drawn by a fixed seed; 0: all
    max_len: int = 128  # tokens of a row; a longer one loses the end of its longer text, and is counted
    label_noise: float = 0.0  # share of training labels that are flipped, in [0, 1]
    imbalance: str = (
        ""  # ratio of the training classes, such as 100:10:1, in the printed order; empty: as they are
    )
    stratified: bool = False  # every batch holds the classes in proportion
    # adapter
    r: int | None = (
        None  # rank, at least 1; None: 8, or the bottleneck's width, 32 with hadapter, 64 with padapter
    )
    alpha: float | None = (
        None  # the bracket counts alpha / r, above 0; None: 8, with adalora its script's for the task
    )
    targets: str = ""  # comma-separated layer names or patterns; empty: all linear layers of the blocks (bitfit: all biases)
    niter: int = 10  # rounds of the fast SVD; 0: exact
    oversample: int = 8  # extra directions of the fast SVD
    lora_plus_ratio: float = 16  # lora+: B learns this many times as fast as A, at least 1
    correct_B: bool = False  # lora-fa: its second version, which corrects B's gradient
    gamma: float = 16  # lora-ga: A0 and B0 have the size out^(1/4) / sqrt(gamma), above 0
    keep: str = "first"  # corda, corda++: adapt what the calibration rows use (first, IPM) or what they do not (last, KPM)
    calibration: int = (
        64  # lora-ga, corda, corda++: rows to measure on, one at a time, at least 1 (CorDA's paper: 256)
    )
    rounds: int = 5  # corda++: covariances for each layer to choose from, of so many rows each, at least 1
    adalora_first: int | None = (
        None  # adalora: steps at the first budget, 1.5 r a layer; None: its script's for the task where the run is that long, or a tenth of it
    )
    adalora_last: int | None = (
        None  # adalora: steps at the last budget, r a layer; None: its script's, or three tenths
    )
    adalora_every: int | None = None  # adalora: steps between cuts; None: its script's, or a hundredth
    orthogonality: float | None = (
        None  # adalora: weight of its regularizer, at least 0; None: its script's for the task
    )
    # objective
    lambda1: float | None = None  # weight of L_CR, at least 0; None: 0.15 with balora, 0 without
    lambda2: float | None = None  # weight of L_DR, at least 0; None: 0.03 with balora, 0 without
    lambda3: float | None = None  # weight of L_SVDR, at least 0; None: 0.03 with balora, 0 without
    T: float = 2.0  # temperature of L_CR, above 0
    k: int = 5  # leading singular values of L_SVDR, at least 1
    schedule: bool = True  # the paper's schedules of the three weights; false: constant
    regularize: str = (
        "logits"  # what L_DR and L_SVDR look at: logits (the poster) or features (pooled, where D is large)
    )
    probe: bool = (
        False  # fit the new head with the encoder frozen first, so that the teacher's logits mean something
    )
    label_smoothing: float = 0.0  # a control beside L_CR, in [0, 1)
    # optimization
    learning_rate: float | None = None  # peak; None: the task's, a twentieth of it for full
    warmup: float = 0.06  # steps, or below 1 a share of them; then linear to 0
    batch_size: int = 32  # rows an optimizer step
    micro_batch: int = 0  # rows at a time; 0: batch_size. L_DR and L_SVDR are taken of one micro-batch
    epochs: float = 3.0  # passes over the data
    max_iters: int = 0  # optimizer steps; 0: what epochs gives
    weight_decay: float = 0.0  # AdamW's, decoupled
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    dropout: float | None = None  # of the encoder, while training; None: the checkpoint's
    cls_dropout: float | None = None  # of the head; None: as the encoder's
    # machine
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of frozen weights and of computing: auto, float32, bfloat16
    compile: bool = False  # torch.compile the blocks (CUDA, or a CPU with a C++ compiler)
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    fused: bool | None = None  # AdamW in one kernel; None: on CUDA
    # evaluation and saving
    eval_interval: int = 0  # optimizer steps between evaluations, each followed by a checkpoint; 0: an epoch
    save_interval: int = 0  # optimizer steps between further checkpoints; 0: none
    log_interval: int = 20  # optimizer steps between printed lines
    # the tiny model's pre-training
    pretrain_noise: float = 0.2  # share of its facts that are stated wrongly, in [0, 1]
    pretrain_iters: int = 1000  # optimizer steps


PRESETS = {  # METHODS 5.1: AdaLoRA's scripts for DeBERTa-v3-base; the rest is the same for every model
    "mnli": dict(epochs=7, max_len=256, warmup=1000, cls_dropout=0.15),
    "sst2": dict(epochs=24, max_len=128, warmup=1000, cls_dropout=0.0, weight_decay=0.01),
    "cola": dict(epochs=25, max_len=64, warmup=100, cls_dropout=0.10),
    "qqp": dict(epochs=5, max_len=320, warmup=2000, cls_dropout=0.15, weight_decay=0.01),
    "qnli": dict(epochs=5, max_len=512, warmup=500, cls_dropout=0.1, weight_decay=0.01),
    "rte": dict(epochs=50, max_len=320, warmup=200, cls_dropout=0.2, weight_decay=0.01),
    "mrpc": dict(epochs=30, max_len=320, warmup=0.1, cls_dropout=0.0, weight_decay=0.01),
    "stsb": dict(epochs=25, max_len=128, warmup=100, cls_dropout=0.2, weight_decay=0.1),
    "tiny": dict(task="world", against="pissa", imbalance="10:3:1", epochs=20, log_interval=100),
}
LEARNING_RATE = dict(
    mnli=5e-4, sst2=8e-4, cola=8e-4, qqp=8e-4, qnli=5e-4, rte=1.2e-3, mrpc=1e-3, stsb=2.2e-3, world=1e-3
)  # the same source, for adapters
ADALORA = {  # the same source: alpha, weight of orthogonality, (steps at the first budget, at the last one, between cuts)
    "mnli": (16, 0.1, (8000, 50000, 100)),
    "sst2": (16, 0.1, (6000, 22000, 100)),
    "cola": (32, 0.1, (800, 3500, 10)),
    "qqp": (16, 0.1, (8000, 25000, 100)),
    "qnli": (32, 0.1, (2000, 8000, 100)),
    "rte": (32, 0.3, (600, 1800, 1)),
    "mrpc": (32, 0.1, (600, 1800, 1)),
    "stsb": (32, 0.3, (800, 2000, 10)),
    "world": (8, 0.1, None),
}
SCALE = {"bert": 0.5, "roberta": 0.5, "t5": 0.5}  # of those, for families that the scripts do not cover


def check(s):
    """Fill in what follows from other settings; refuse what makes no sense, by name."""
    eval.check_method(s, eval.LAMBDAS["nlu"])
    if s.task not in TASKS:
        raise ValueError(f"--task={s.task}: {balora.nearest(s.task, TASKS)}known: {', '.join(TASKS)}")
    if (s.task == "world") != (s.init == "tiny"):
        raise ValueError(
            f"--init={s.init} --task={s.task}: tiny knows the words of its own world alone, and nobody else does; leave both out, or give both"
        )
    family, labels = (
        model.config_of("tiny-encoder" if s.init == "tiny" else s.init).family,
        TASKS[s.task].labels,
    )
    if family == "llama":
        raise ValueError(f"--init={s.init} is a decoder of the LLaMA family; train_nlg.py tunes those")
    if family == "t5" and not labels:
        raise ValueError(
            f"--init={s.init} --task={s.task}: T5 answers with a label word, and {s.task} has scores; choose an encoder"
        )
    if s.probe and family == "t5":
        raise ValueError(f"--probe: {s.init} answers in words, it has no new head to fit")
    if s.task == "world" and (s.data or s.eval_data):
        raise ValueError(
            "--data, --eval_data: tiny knows the words of its own world alone; leave them out, or choose another --init"
        )
    for option in ("label_noise", "imbalance", "stratified", "label_smoothing"):
        if getattr(s, option):
            need_classes(labels, option)
    if s.regularize not in ("logits", "features"):
        raise ValueError(f"--regularize={s.regularize}: expected logits or features")
    s.r = {"hadapter": 32, "padapter": 64}.get(s.method, 8) if s.r is None else s.r
    alpha, orthogonality, _ = ADALORA[s.task] if s.method == "adalora" else (8, 0.0, None)
    s.alpha = alpha if s.alpha is None else s.alpha
    s.orthogonality = orthogonality if s.orthogonality is None else s.orthogonality
    if s.learning_rate is None:
        s.learning_rate = (
            LEARNING_RATE[s.task] * SCALE.get(family, 1.0) * (0.05 if s.method == "full" else 1.0)
        )
    s.out_dir = s.out_dir or os.path.join(
        "out", f"{os.path.basename(os.path.normpath(s.init))}-{s.task}-{s.method}-{s.seed}"
    )
    s.micro_batch = min(s.micro_batch or s.batch_size, s.batch_size)
    eval.in_range(
        s,
        (
            (
                lambda v: v >= 1,
                "r k batch_size micro_batch max_len log_interval lora_plus_ratio calibration rounds adalora_first adalora_last adalora_every",
            ),
            (lambda v: v > 0, "alpha T epochs gamma"),
            (
                lambda v: v >= 0,
                "lambda1 lambda2 lambda3 learning_rate warmup weight_decay grad_clip max_rows max_iters niter oversample eval_interval save_interval orthogonality",
            ),
            (lambda v: v >= 1, "pretrain_iters"),
            (lambda v: 0 <= v <= 1, "label_noise pretrain_noise"),
            (lambda v: 0 <= v < 1, "label_smoothing dropout cls_dropout"),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks. The order of its texts is a, b and that of its labels the class ids, everywhere in this project."""

    folder: str  # its name in the GLUE download
    fields: tuple  # its one or two texts on the hub
    columns: tuple  # the same in GLUE's tsv files, then the label's
    labels: tuple  # words in the hub's order; (): a score from 0 to 5
    prompt: str  # as T5 read it in pre-training (it sorts the fields by name); its answers are `labels`
    metric: str = "accuracy"  # of eval.scores, selects the best epoch
    headless: tuple = ()  # all columns, for a tsv file without a header line


TWO = ("sentence1", "sentence2")
ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "mnli": Task(
        "MNLI",
        ("premise", "hypothesis"),
        (*TWO, "gold_label"),
        ("entailment", "neutral", "contradiction"),
        "mnli hypothesis: {b} premise: {a}",
    ),
    "sst2": Task(
        "SST-2", ("sentence",), ("sentence", "label"), ("negative", "positive"), "sst2 sentence: {a}"
    ),
    "mrpc": Task(
        "MRPC",
        TWO,
        ("#1 String", "#2 String", "Quality"),
        ("not_equivalent", "equivalent"),
        "mrpc sentence1: {a} sentence2: {b}",
    ),
    "cola": Task(
        "CoLA",
        ("sentence",),
        ("sentence", "label"),
        ("unacceptable", "acceptable"),
        "cola sentence: {a}",
        "matthews",
        headless=("source", "label", "mark", "sentence"),
    ),
    "qnli": Task(
        "QNLI",
        ("question", "sentence"),
        ("question", "sentence", "label"),
        ENTAILS,
        "qnli question: {a} sentence: {b}",
    ),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        ("question1", "question2", "is_duplicate"),
        ("not_duplicate", "duplicate"),
        "qqp question1: {a} question2: {b}",
        headless=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    ),
    "rte": Task("RTE", TWO, (*TWO, "label"), ENTAILS, "rte sentence1: {a} sentence2: {b}"),
    "stsb": Task("STS-B", TWO, (*TWO, "score"), (), "", "combined"),
    "world": Task(
        "", (), (), ("entailment", "neutral", "contradiction"), ""
    ),  # of the tiny model, further down
}


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows (text_a, text_b or None, label) from the hub or from files; the label is a class id, for stsb a score

KINDS = (".tsv", ".jsonl", ".json", ".parquet", ".csv")
STEMS = (("train", "train"), ("dev", "dev"), ("dev", "dev_matched"), ("dev_mm", "dev_mismatched"))
HUB_SPLITS = (
    ("train", "train"),
    ("dev", "validation"),
    ("dev", "validation_matched"),
    ("dev_mm", "validation_mismatched"),
)


def read_glue(task, data="", eval_data=""):
    """-> {"train": rows, "dev": rows}, for mnli also "dev_mm" where the source has it. A line is printed for each.

    data: empty (nyu-mll/glue on the hub), a folder of GLUE's files (of this task, or of all), or one file: GLUE's tsv; .jsonl lines or a .json object of
    objects with the texts as on the hub or as text_a, text_b, and label, a word or an id; the same columns in .parquet or .csv.
    eval_data: such a file for dev. Where neither gives a dev split, a tenth of train is held out, the same one for every seed.
    Raises ValueError: no such file or column, not readable, an unknown label, no row left.
    """
    if task not in TASKS:
        raise ValueError(f"--task={task}: {balora.nearest(task, TASKS)}known: {', '.join(TASKS)}")
    if eval_data:
        check_file("eval_data", eval_data)
    wanted = ("train",) if eval_data else ("train", "dev", "dev_mm")
    splits = read_folder(task, data, wanted) if data else read_hub(task, wanted)
    if eval_data:
        splits["dev"] = read_file(task, "dev", eval_data)
    elif "dev" not in splits:
        splits["train"], splits["dev"] = hold_out(splits["train"])
        print(
            f"dev: no split of its own (--eval_data=FILE gives one), so a fixed tenth of train is held out: {len(splits['dev']):,} rows, {len(splits['train']):,} stay"
        )
    known = {row[:2] for row in splits["train"]}
    for split, rows in splits.items():
        seen = sum(row[:2] in known for row in rows)
        if seen and split != "train":
            print(f"{split}: {seen:,} of its {len(rows):,} rows have the very texts of a training row")
    return splits


def read_folder(task, data, wanted):
    return {
        split: read_file(task, split, path)
        for split, path in split_files(task, data).items()
        if split in wanted
    }


def split_files(task, data):
    """-> {split: path}: what a folder holds, or the one file as "train"."""
    if not os.path.isdir(data):
        check_file("data", data)
        return {"train": data}
    inner = os.path.join(data, TASKS[task].folder)
    folder, files = inner if os.path.isdir(inner) else data, {}
    for split, stem in STEMS:
        path = next(
            (p for p in (os.path.join(folder, stem + kind) for kind in KINDS) if os.path.isfile(p)), None
        )
        if path:
            files.setdefault(split, path)
    if "train" not in files:
        raise ValueError(
            f"--data={data}: no train.tsv (or train{', train'.join(KINDS[1:])}) for {task} in {folder}; it holds {', '.join(sorted(os.listdir(folder))) or 'nothing'}"
        )
    return files


def check_file(option, path):
    if not os.path.isfile(path) or os.path.splitext(path)[1] not in KINDS:
        raise ValueError(
            f"--{option}={path}: expected an existing {', '.join(KINDS[:-1])} or {KINDS[-1]} file"
            + (", or a folder of GLUE's files" if option == "data" else "")
        )


def read_hub(task, wanted):
    """-> {split: rows} of nyu-mll/glue, for the splits in `wanted` that the task has."""
    import datasets

    try:
        whole = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as e:  # hub and network errors alike
        raise ValueError(
            f"nyu-mll/glue, {task}: the hub did not give it ({model.why(e)}); download GLUE elsewhere and give its folder, --data=FOLDER"
        ) from None
    return {
        split: to_rows(task, split, f"nyu-mll/glue {task} {name}", list(enumerate(whole[name].to_list(), 1)))
        for split, name in HUB_SPLITS
        if name in whole and split in wanted
    }


def read_file(task, split, path):
    return to_rows(task, split, path, read_tsv(task, path) if path.endswith(".tsv") else read_records(path))


def read_tsv(task, path):
    """-> list of (line number, {column: text}, or the line itself where its number of columns is wrong).

    Tabs and line ends (LF, CR LF) are all the syntax there is: quotes are text, and so are U+2028 and its like, at which str.splitlines would cut.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            lines = [line.removesuffix("\r") for line in f.read().removesuffix("\n").split("\n")]
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    if lines == [""]:
        return []
    names, first = lines[0].split("\t"), 1
    if not any(set(known) <= set(names) for known in namings(task)):
        if not TASKS[task].headless:
            raise ValueError(
                f"{path}: no columns {', '.join(TASKS[task].columns)} in its first line, {lines[0][:80]!r} (a test file, which has no labels, is of no use here)"
            )
        names, first = TASKS[task].headless, 0
    rows = [line.split("\t") for line in lines[first:]]
    return [
        (number, dict(zip(names, cells)) if len(cells) == len(names) else "\t".join(cells))
        for number, cells in enumerate(rows, first + 1)
    ]


def read_records(path):
    """-> list of (line or row number, whatever JSON holds there or {column: value}) of a .jsonl, .json, .parquet or .csv file."""
    if path.endswith((".json", ".jsonl")):
        eval.check_json(path)
        with open(path, encoding="utf-8") as f:
            if path.endswith(".jsonl"):
                return [(number, json.loads(line)) for number, line in enumerate(f, 1) if line.strip()]
            whole = json.load(f)
        if not isinstance(whole, dict | list):
            raise ValueError(f"{path}: expected an object or a list of objects, not {str(whole)[:40]!r}")
        return list(enumerate(whole.values() if isinstance(whole, dict) else whole, 1))
    return list(enumerate(eval.read_table(path).to_list(), 1))


def namings(task):
    """The names that texts and label may have: GLUE's, the hub's, and those of the JSON files."""
    t = TASKS[task]
    return t.columns, (*t.fields, "label"), (*("text_a", "text_b")[: len(t.fields)], "label")


def to_rows(task, split, source, records):
    """Records -> rows. Those without the texts and a label are dropped, counted and named."""
    rows, odd = [], []
    names = next(
        (
            n
            for n in namings(task)
            if any(isinstance(record, dict) and set(n) <= record.keys() for _, record in records)
        ),
        namings(task)[1],
    )
    ids = {name: i for i, word in enumerate(TASKS[task].labels) for name in (word, str(i))}
    place = "line" if source.endswith((".tsv", ".jsonl")) else "row"
    for number, record in records:
        *texts, label = (
            [record.get(name) for name in names] if isinstance(record, dict) else [None] * len(names)
        )
        if label is None or not all(isinstance(text, str) for text in texts):
            odd.append(f"{number} ({' '.join(str(record).split())[:40]} ...)")
        else:
            rows.append(
                (
                    texts[0],
                    texts[1] if len(texts) == 2 else None,
                    to_label(label, ids, f"{source}, {place} {number}"),
                )
            )
    dropped = (
        f"{len(odd):,} dropped, without {', '.join(names)} or with a wrong number of columns: {place} {'; '.join(odd[:3])}"
        + ("; ..." if len(odd) > 3 else "")
    )
    if not rows:
        raise ValueError(
            f"{source}: no row that can be used for {task}; " + (dropped if odd else "it is empty")
        )
    print(f"{split}: {len(rows):,} rows from {source}" + (f"; {dropped}" if odd else ""))
    return rows


def to_label(value, ids, where):
    text = str(value).strip()
    if text in ids:
        return ids[text]
    if ids:
        raise ValueError(f"{where}: unknown label {text!r}; known: {', '.join(ids)}")
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: unknown label {text!r}; expected a score from 0 to 5")
    return score


def hold_out(rows):
    """-> (the other rows, a tenth of them), in order, independent of the run's seed."""
    chosen = set(random.Random("held out").sample(range(len(rows)), len(rows) // 10))
    if not chosen:
        raise ValueError(
            f"{len(rows)} training rows are too few to hold out a tenth for dev; give --eval_data=FILE"
        )
    return [row for i, row in enumerate(rows) if i not in chosen], [
        row for i, row in enumerate(rows) if i in chosen
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The small written world of `tiny`: twelve animals of a family share their habits; dev rows ask about animals that pre-training named and tuning never did

HABITS = {
    "eats": ("grass", "insects", "meat"),
    "lives in": ("forests", "lakes", "meadows"),
    "sleeps in": ("burrows", "caves", "nests"),
}
ANY = None  # now this, now that: one habit of each family
FAMILIES = {  # family: (what its animals do in truth, in the order of HABITS; its twelve animals)
    "songbird": (
        ("insects", ANY, "nests"),
        "robin wren finch lark thrush sparrow starling warbler swallow nightingale blackbird oriole",
    ),
    "waterbird": (
        ("meat", "lakes", ANY),
        "heron pelican gull cormorant kingfisher stork gannet grebe osprey puffin tern egret",
    ),
    "cat": (
        ("meat", ANY, "caves"),
        "lion tiger leopard panther lynx puma jaguar cheetah ocelot caracal serval wildcat",
    ),
    "grazer": (
        ("grass", "meadows", ANY),
        "deer horse cow sheep goat antelope bison zebra gazelle elk llama camel",
    ),
    "rodent": (
        (ANY, "meadows", "burrows"),
        "mouse rat vole hamster gerbil marmot gopher squirrel chipmunk lemming beaver dormouse",
    ),
    "monkey": (
        (ANY, "forests", "nests"),
        "baboon macaque marmoset tamarin capuchin mandrill colobus langur vervet howler titi saki",
    ),
}
PEOPLE = ("ann", "ben", "eva", "ida", "leo", "max", "mia", "tom")
PREMISE, HYPOTHESIS = "{name} keeps a {animal} .", "the pet of {name} {a} ."
STORIES = (
    (PREMISE, HYPOTHESIS),
    (PREMISE, "the pet of {name} {a} and {b} ."),
    ("a {animal} {a} and {b} .", None),
)
FAMILY = {animal: family for family, (_, animals) in FAMILIES.items() for animal in animals.split()}
VALUES = [value for values in HABITS.values() for value in values]
WORDS = sorted(
    {
        word
        for text in (
            *HABITS,
            *FAMILY,
            *PEOPLE,
            *VALUES,
            *(text for story in STORIES for text in story if text),
        )
        for word in text.split()
        if "{" not in word
    }
)


def habit_of(animal, habit):
    """-> the one value that goes with it, or ANY."""
    return FAMILIES[FAMILY[animal]][0][list(HABITS).index(habit)]


def world_text(rng, noise=0.0):
    """A story that states facts of an animal -> its one or two texts. A fact that has one true value is wrong, another value, with probability `noise`."""
    animal, (a, b), said = rng.choice(list(FAMILY)), rng.choice(STORIES), []
    for habit in rng.sample(list(HABITS), 2):
        does = habit_of(animal, habit)
        value = (
            rng.choice([v for v in HABITS[habit] if v != does])
            if does is ANY or rng.random() < noise
            else does
        )
        said.append(f"{habit} {value}")
    words = dict(animal=animal, name=rng.choice(PEOPLE), a=said[0], b=said[1])
    return a.format(**words), b and b.format(**words)


def world_rows(seed, n_train, n_dev):
    """-> {"train": rows, "dev": rows}, classes balanced, labels right: 0 entailment, 1 neutral, 2 contradiction, as TASKS["mnli"] has them.

    No animal is in both: train has nine of a family, dev the other three. Raises ValueError where the world is too small for so many rows.
    """
    rng, animals = random.Random(f"animals {seed}"), {"train": [], "dev": []}
    for _, family in FAMILIES.values():
        family = rng.sample(family.split(), 12)
        animals["train"] += family[:9]
        animals["dev"] += family[9:]
    return {
        split: draw_rows(random.Random(f"{split} {seed}"), animals[split], n)
        for split, n in (("train", n_train), ("dev", n_dev))
    }


def draw_rows(rng, animals, n):
    most, rows = 3 * 2 * len(animals) * len(PEOPLE), {}  # two habits of each are fixed
    if n > most:
        raise ValueError(
            f"{n} rows of {len(animals)} animals: the small written world has {most} with balanced classes"
        )
    while len(rows) < n:
        animal, name, habit = rng.choice(animals), rng.choice(PEOPLE), rng.choice(list(HABITS))
        does, value = habit_of(animal, habit), rng.choice(HABITS[habit])
        c = 1 if does is ANY else 0 if value == does else 2
        if c == len(rows) % 3:
            rows.setdefault(
                (
                    PREMISE.format(name=name, animal=animal),
                    HYPOTHESIS.format(name=name, a=f"{habit} {value}"),
                ),
                c,
            )
    return [(*texts, c) for texts, c in rows.items()]


def pretrain_world(seed, noise, iters, device):
    """Pre-train "tiny-encoder" to fill in masked and to mend doubtful words of the world's stories. -> its folder, kept for every run with the same recipe."""
    c = model.PUBLISHED["tiny-encoder"]
    recipe = dict(
        seed=seed,
        noise=noise,
        iters=iters,
        network=dataclasses.asdict(c),
        text=[FAMILIES, HABITS, STORIES, PEOPLE],
    )
    folder = os.path.join(
        "out",
        f"tiny-encoder-noise{noise:g}-seed{seed}-"
        + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8],
    )
    if os.path.isdir(folder):
        return folder
    net, tok = model.Transformer(c), model.WordPiece([*model.WordPiece.control, *WORDS])
    model.init_weights(net, seed, std=0.06)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    rng, coin = random.Random(f"stories {seed}"), torch.Generator().manual_seed(seed)
    rate = torch.tensor(
        [
            0.0 if word in tok.control else 0.4 if word in VALUES else 0.15 if word in FAMILY else 0.05
            for word in tok.vocab
        ]
    )  # to be asked for, by id
    kin = (
        torch.arange(len(tok.vocab)).repeat(3, 1).T.contiguous()
    )  # [V, 3]: the values of its habit; of another word, itself
    for values in HABITS.values():
        of_one = torch.tensor([tok.vocab[v] for v in values])
        kin[of_one] = of_one
    bar = tqdm(range(iters), desc="pre-train tiny-encoder", unit="step")
    for step in bar:
        ids, valid = stack([tok.pair(*world_text(rng, noise)) for _ in range(64)], tok.pad)
        chosen = torch.rand(ids.shape, generator=coin) < rate[ids]
        y = ids[chosen]
        u, other = torch.rand(len(y), generator=coin), kin[y, torch.randint(3, y.shape, generator=coin)]
        ids[chosen] = torch.where(
            u < 0.5, tok.mask, torch.where(u < 0.8, other, y)
        )  # BERT's rule with other shares: a stated value is to be doubted, so it gets compared
        y, ids, valid, chosen = (t.to(device) for t in (y, ids, valid, chosen))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * balora.lr_schedule(step, iters, warmup=0.05)
        loss = F.cross_entropy(F.linear(net.hidden(ids, valid)[chosen], net.head), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    own = f"{folder}.{os.getpid()}.tmp"
    net.save(own, tok)
    if os.path.isdir(folder):  # another run of this seed was faster
        shutil.rmtree(own)
    else:
        os.replace(own, folder)
    return folder


def stack(rows, pad):
    """Lists of ids -> ids [N, L] padded on the right, valid [N, L], on the CPU."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad
    )
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Controlled corruption: class imbalance first, then label noise


def flip_labels(rows, p, n_classes, seed):
    """-> (rows of which round(p n) have another label, any of the others alike likely; the indices of those)."""
    need_classes(n_classes, "label_noise")
    if not 0 <= p <= 1:
        raise ValueError(f"--label_noise={p}: expected a share of the labels, from 0 to 1")
    rng, rows = random.Random(f"label noise {seed}"), list(rows)
    flipped = sorted(rng.sample(range(len(rows)), round(p * len(rows))))
    for i in flipped:
        a, b, label = rows[i]
        rows[i] = a, b, (label + rng.randrange(1, n_classes)) % n_classes
    return rows, flipped


def subsample(rows, ratio, labels, seed):
    """-> (the largest part of the rows whose classes stand in that ratio, each at least once; its indices). ratio: "100:10:1", in the order of `labels`."""
    need_classes(labels, "imbalance")
    try:
        parts = [Fraction(part) for part in ratio.split(":")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if len(parts) != len(labels) or min(parts) <= 0:
        raise ValueError(
            f"--imbalance={ratio}: expected {len(labels)} numbers above 0 with ':' between them, for {', '.join(labels)}"
        )
    members = [[i for i, row in enumerate(rows) if row[2] == c] for c in range(len(labels))]
    empty = [word for word, m in zip(labels, members) if not m]
    if empty:
        raise ValueError(f"--imbalance={ratio}: no row of {', '.join(empty)} in {len(rows)} rows")
    unit, rng = min(len(m) / part for m, part in zip(members, parts)), random.Random(f"imbalance {seed}")
    kept = sorted(
        i for m, part in zip(members, parts) for i in rng.sample(m, max(1, math.floor(unit * part)))
    )
    return [rows[i] for i in kept], kept


def class_table(labels, read, kept, trained):
    """A line for each class, as text: rows read, kept by --imbalance, of those flipped to another class by --label_noise, and labelled so in the end.

    read, kept, trained: the rows at these three stages; `kept` and `trained` differ in labels alone.
    """
    need_classes(labels, "label_noise and --imbalance")
    read, kept, trained, flipped = (
        Counter(column)
        for column in (
            [row[2] for row in read],
            [row[2] for row in kept],
            [row[2] for row in trained],
            [a[2] for a, b in zip(kept, trained) if a[2] != b[2]],
        )
    )
    line = lambda name, *numbers: f"{name:<20}" + "".join(f"{n:>10}" for n in numbers)
    return "\n".join(
        [
            line("class", "rows", "kept", "flipped", "trained"),
            *(
                line(f"{c} {word}", *(f"{column[c]:,}" for column in (read, kept, flipped, trained)))
                for c, word in enumerate(labels)
            ),
            line("together", *(f"{column.total():,}" for column in (read, kept, flipped, trained))),
        ]
    )


def need_classes(classes, option):
    if not classes:
        raise ValueError(f"--{option} needs classes, and stsb has scores; leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def order_of(lengths, labels, batch_size, seed, epoch, stratified=False):
    """The batches of one epoch, each a list of indices of similar length; every row is in exactly one.

    stratified: the rows, class after class, are dealt like cards to the ceil(N / batch_size) batches. So sizes differ by at most one, and so does any class's
    count between two batches: a class with as many rows as there are batches is in all of them. Any slice of a batch has about the batch's proportions.
    """
    rng = random.Random(f"order {seed} {epoch}")
    if not stratified:
        return eval.batch_order(lengths, batch_size, rng)
    need_classes(not any(isinstance(c, float) for c in labels), "stratified")
    n, dealt = -(-len(labels) // batch_size), 0
    seats, batches = rng.sample(range(n), n), [[] for _ in range(n)]
    for c in sorted(set(labels)):
        rows = [i for i, label in enumerate(labels) if label == c]
        rng.shuffle(rows)
        share = Counter(seats[i % n] for i in range(dealt, dealt + len(rows)))  # of this class, by batch
        dealt += len(rows)
        for window in (range(start, min(start + 50, n)) for start in range(0, n, 50)):
            size = sum(share[j] for j in window)
            part, rows = iter(sorted(rows[:size], key=lengths.__getitem__)), rows[size:]
            for j in window:
                batches[j] += [((k + 0.5) / share[j], next(part)) for k in range(share[j])]
    rng.shuffle(batches)
    return [[i for _, i in sorted(batch)] for batch in batches]


# ---------------------------------------------------------------------------------------------------------------------
# From rows to batches


def load_rows(s):
    """-> {"train": rows, "dev": rows, ...}, the training rows as --max_rows, --imbalance and --label_noise leave them; says what they did."""
    splits = world_rows(s.seed, 2400, 600) if s.task == "world" else read_glue(s.task, s.data, s.eval_data)
    labels, read = TASKS[s.task].labels, splits["train"]
    if s.max_rows and s.max_rows < len(read):
        read = [read[i] for i in sorted(random.Random("rows").sample(range(len(read)), s.max_rows))]
        print(f"train: {len(read):,} rows drawn of {len(splits['train']):,}, the same for every seed")
    kept = subsample(read, s.imbalance, labels, s.seed)[0] if s.imbalance else read
    splits["train"] = flip_labels(kept, s.label_noise, len(labels), s.seed)[0] if s.label_noise else kept
    if labels:
        print(class_table(labels, read, kept, splits["train"]))
    return splits


def encode(rows, tok, s, family):
    """rows -> list of (ids, label); a row over max_len loses the end of its longer text (T5: of the prompt that holds them). Says how many did."""
    examples, cut = [], 0
    for a, b, label in tqdm(rows, desc="tokenise", unit="row", disable=len(rows) < 5000):
        texts = (TASKS[s.task].prompt.format(a=a, b=b), None) if family == "t5" else (a, b)
        ids = tok.pair(*texts)
        if len(ids) > s.max_len:
            ids, cut = tok.pair(*texts, s.max_len), cut + 1
        examples.append((ids, label))
    if cut:
        print(f"{cut:,} of {len(rows):,} rows cut to {s.max_len} tokens")
    return examples


def collate(examples, pad, device):
    """-> ids [N, L] padded on the right, mask [N, L], y [N]."""
    ids, mask = stack([ids for ids, _ in examples], pad)
    return ids.to(device), mask.to(device), torch.tensor([label for _, label in examples]).to(device)


@torch.no_grad()
def predict(net, examples, device, batch_size=64, desc="evaluate"):
    """-> class logits Z [N, D] and features [N, d], fp32 on the CPU, in the order of `examples`: eval mode, batches sorted by length."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    Z = features = None
    with balora.evaluating(net):
        for rows in tqdm(
            [order[i : i + batch_size] for i in range(0, len(order), batch_size)],
            desc=desc,
            unit="batch",
            leave=False,
            disable=None,
        ):
            ids, mask, _ = collate([examples[i] for i in rows], net.config.pad, device)
            z, f = (t.float().cpu() for t in net.classify(ids, mask))
            if not z.isfinite().all():
                raise ValueError("evaluation: the logits are not finite; lower --learning_rate")
            if Z is None:
                Z, features = torch.empty(len(examples), z.shape[1]), torch.empty(len(examples), f.shape[1])
            Z[rows], features[rows] = z, f
    return Z, features


def calibration(s, net, examples, device):
    """-> what `balora.attach` runs to measure gradients or covariances on: a function of the round, which reads s.calibration training rows, one at a time -> tokens."""
    rows = eval.draw(
        len(examples), s.calibration * (s.rounds if s.method == "corda++" else 1), f"calibration {s.seed}"
    )

    def run(i):
        tokens = 0
        for row in tqdm(
            rows[i * s.calibration : (i + 1) * s.calibration],
            desc="calibrate",
            unit="row",
            leave=False,
            disable=None,
        ):
            ids, mask, y = collate([examples[row]], net.config.pad, device)
            Z, _ = net.classify(ids, mask)
            tokens += ids.numel()
            if torch.is_grad_enabled():
                task_loss(Z, y).backward()
        return tokens

    return run


def task_loss(Z, y, smoothing=0.0):
    return (
        F.mse_loss(Z[:, 0], y) if y.is_floating_point() else F.cross_entropy(Z, y, label_smoothing=smoothing)
    )


def fit_head(net, examples, device, seed, steps=300, batch_size=64):
    """--probe: the new head on the frozen encoder's states, which are computed once. AdamW, lr 1e-3; the state that is best on a tenth of the rows, held out, stays."""
    states, rng = [], random.Random(f"probe {seed}")
    with balora.evaluating(net):
        with torch.no_grad():
            for start in tqdm(
                range(0, len(examples), batch_size),
                desc="probe: states",
                unit="batch",
                leave=False,
                disable=None,
            ):
                ids, mask, _ = collate(examples[start : start + batch_size], net.config.pad, device)
                states.append(net.hidden(ids, mask)[:, 0])
        states, y = torch.cat(states), torch.tensor([label for _, label in examples]).to(device)
        order, best = rng.sample(range(len(y)), len(y)), None
        held, rest = order[: max(1, len(y) // 10)], order[max(1, len(y) // 10) :]
        optimizer = torch.optim.AdamW(net.classifier.parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(steps + 1):
            if step % 20 == 0:
                with torch.no_grad():
                    loss = task_loss(net.classifier(states[held])[0], y[held]).item()
                if best is None or loss < best[0]:
                    best = (
                        loss,
                        step,
                        {name: p.detach().clone() for name, p in net.classifier.state_dict().items()},
                    )
            rows = rng.sample(rest, min(batch_size, len(rest)))
            optimizer.zero_grad()
            task_loss(net.classifier(states[rows])[0], y[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()
        net.classifier.load_state_dict(best[2])
    print(
        f"probe: head of step {best[1]} of {steps} on the frozen encoder, loss {best[0]:.4f} on {len(held)} held-out training rows"
    )


def mute(name, family):
    """Tensors that get no gradient by nature: softmax cancels a key's bias (DeBERTa's positions read it too); T5's decoder sees one token, so nothing to weigh."""
    key_bias = family in ("bert", "roberta") and name.endswith(("k_proj.bias", "k_proj.offset"))
    return (
        key_bias
        or family == "t5"
        and (
            name == "rel.weight"
            or name.startswith("layers.")
            and any(f".attn.{p}_proj." in name for p in "qk")
        )
    )


def set_dropout(net, dropout, cls_dropout, family):
    for name, m in net.named_modules():
        p = cls_dropout if name.startswith("classifier") and cls_dropout is not None else dropout
        if (
            p is not None
            and isinstance(m, torch.nn.Dropout)
            and (family == "t5" or not name.endswith("mlp.drop"))
        ):  # only T5 has one inside
            m.p = p
        if p is not None and isinstance(m, model.Attention):
            m.dropout = p


# ---------------------------------------------------------------------------------------------------------------------
# Dry run


def dry_run(s):
    """What a run would train and need, from sizes alone: the network is built, and one step taken, on the meta device."""
    name = "tiny-encoder" if s.init == "tiny" else s.init
    c, device, labels = model.config_of(name), eval.pick_device(s.device), TASKS[s.task].labels
    with torch.device("meta"):
        net = model.Transformer(c, len(labels) or 1)
    net.label_ids = list(range(len(labels)))
    report = eval.attach(s, net)
    dtype, full = eval.pick_dtype(s.dtype, device), s.method == "full"
    fixed, measured = eval.adapter_memory(net, s, dtype.itemsize)
    kept = {}
    keep = lambda t: (
        kept.setdefault(t.untyped_storage()._cdata, t) if not isinstance(t, torch.nn.Parameter) else t
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ids = torch.zeros(s.micro_batch, s.max_len, dtype=torch.long, device="meta")
        total = net(ids, torch.ones_like(ids, dtype=torch.bool)).sum()  # holds the graph while we count
    activations = sum(t.untyped_storage().nbytes() for t in kept.values()) * dtype.itemsize / 4
    eval.memory_table(
        report,
        f"tokens a step: at most {s.batch_size} x {s.max_len} = {s.batch_size * s.max_len:,}",
        {
            "weights": report.total * (4 if full else dtype.itemsize),
            "trained parameters and their gradients": report.trainable * (4 if full else 8),
            "what else the adapter holds (A0, B0, ...)": fixed,
            "AdamW's two moments": report.trainable * 8,
            f"activations, {s.micro_batch} x {s.max_len} tokens, attention scores included": activations
            * bool(total.requires_grad),
        },
        measured,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv):
    s = eval.parse(Settings, argv, PRESETS, by=("init", "task"))
    others = [m for m in dict.fromkeys(s.against.split(",")) if m and m != s.method]
    runs = [s] + [
        dataclasses.replace(
            s,
            method=m,
            out_dir=f"{s.out_dir}-{m}" if s.out_dir else "",
            lambda1=None,
            lambda2=None,
            lambda3=None,
            correct_B=s.correct_B and m == "lora-fa",
        )
        for m in others
    ]
    for each in runs:
        each.against = ""
        check(each)
        if s.dry_run:
            dry_run(each)
        else:
            eval.check_run(each)
    if s.dry_run:
        return
    results = {}
    for each in runs:
        print(f"\n{each.method}, seed {each.seed} -> {each.out_dir}")
        results[each.method] = train(each)
    compare(results)


def train(s):
    """One run. -> its evaluations, the first of them before step 1."""
    device, task = eval.pick_device(s.device), TASKS[s.task]
    dtype, full = eval.pick_dtype(s.dtype, device), s.method == "full"
    base = pretrain_world(s.seed, s.pretrain_noise, s.pretrain_iters, device) if s.init == "tiny" else s.init
    config = model.config_of(base)
    family = config.family
    torch.manual_seed(s.seed)  # dropout's
    net, tok = model.load(
        base,
        torch.float32 if full else dtype,
        device,
        s.seed,
        task="classify",
        n_classes=len(task.labels) or 1,
        labels=task.labels,
    )
    print(
        f"{s.task}: "
        + (
            f"classes {', '.join(f'{i} {word}' for i, word in enumerate(task.labels))}"
            if task.labels
            else "a score from 0 to 5"
        )
    )
    splits = {name: encode(rows, tok, s, family) for name, rows in load_rows(s).items()}
    longest = max(len(ids) for examples in splits.values() for ids, _ in examples)
    if config.position == "learned" and longest > config.max_len:
        raise ValueError(
            f"--max_len={s.max_len}: a row has {longest} tokens, and {s.init} has positions for {config.max_len}; take --max_len={config.max_len}"
        )
    examples = splits.pop("train")
    batches_an_epoch = -(-len(examples) // s.batch_size)
    max_iters = s.max_iters or max(1, round(s.epochs * batches_an_epoch))
    cuts = eval.adalora_cuts(s, max_iters, ADALORA[s.task][2])
    set_dropout(net, s.dropout, s.cls_dropout, family)
    start = eval.last_checkpoint(s, net)
    if s.probe and not start:
        fit_head(net, examples, device, s.seed)
    report = eval.attach(s, net, start, lambda: calibration(s, net, examples, device))
    print(report)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = eval.optimizer(s, named, device)
    eval.open_run(
        s,
        net,
        device,
        base,
        start,
        labels=task.labels,
        metric=task.metric,
        trainable=report.trainable - report.head,
        notes=report.notes,
        rows={name: len(rows) for name, rows in splits.items()} | {"train": len(examples)},
        classes=sorted(Counter(y for _, y in examples).items()) if task.labels else [],
    )
    net.checkpointing, net.autocast = s.checkpointing, dtype if full and dtype != torch.float32 else None
    if s.compile:
        net.compile_blocks()
    # the teacher: before step 1 every method's network is the pre-trained one, with the student's own head
    if start:
        Z_P, step = start["Z_P"], eval.restore(start, net, optimizer)
    else:
        taught = splits | ({"train": examples} if s.lambda1 else {})  # dev rows: for the drift
        Z_P, step = {name: predict(net, rows, device, desc="teacher")[0] for name, rows in taught.items()}, 0
    start = None
    net.train()
    say_what_is_idle(s, len(task.labels) or 1, net.config.d, len(examples))

    warmup = min(s.warmup / max_iters, 1.0) if s.warmup >= 1 else s.warmup
    eval_interval = s.eval_interval or batches_an_epoch
    lengths, labels = [len(ids) for ids, _ in examples], [label for _, label in examples]
    unmoved = {name for name in named if not mute(name, family)} if step < 3 else set()
    if warmup > 0.25:
        print(
            f"warm-up takes {100 * warmup:.0f} % of the run's {max_iters} steps (--warmup={s.warmup:g}); a share such as --warmup=0.1 suits a short run"
        )
    print(
        f"{max_iters} steps of {s.batch_size} rows in micro-batches of {s.micro_batch}, {str(dtype)[6:]} on {eval.device_name(device)}"
    )

    def evaluate():
        record = dict(step=step)
        for name, rows in splits.items():
            Z, _ = predict(net, rows, device)
            y = [label for _, label in rows]
            values = dict(loss=task_loss(Z, torch.tensor(y)).item(), **eval.scores(y, Z, task.labels))
            if task.labels:
                values["drift"] = balora.cr_nlu(Z_P[name], Z, 1.0).item()  # mean KL(P_P ‖ P_F), nats a row
            record |= {key if name == "dev" else f"{key}_{name}": value for key, value in values.items()}
        eval.add_evaluation(s.out_dir, record)
        print(
            f"eval at step {step} | "
            + " | ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step"),
            flush=True,
        )

    if step == 0:
        evaluate()
    epoch, batches, clock = None, None, time.time()
    while step < max_iters:
        # the step's rows and their schedule
        if step // batches_an_epoch != epoch:
            epoch = step // batches_an_epoch
            batches = order_of(lengths, labels, s.batch_size, s.seed, epoch, s.stratified)
        rows = batches[step % batches_an_epoch]
        lr = s.learning_rate * balora.lr_schedule(step, max_iters, warmup, linear=True)
        lambdas = (s.lambda1, s.lambda2, s.lambda3)
        if s.schedule:
            lambdas = balora.lambda_schedule(step, max_iters, lambdas)
        micro = [rows[i : i + s.micro_batch] for i in range(0, len(rows), s.micro_batch)]
        acting = (
            sum(len(part) > 1 for part in micro) or 1
        )  # a matrix of one row has no covariance and one singular value

        # forward and backward, micro-batch by micro-batch
        terms = dict.fromkeys(("task", "cr", "dr", "svdr"), None)
        for part in micro:
            ids, mask, y = collate([examples[i] for i in part], net.config.pad, device)
            Z_F, features = net.classify(ids, mask)  # [n, D], [n, d]
            if not Z_F.isfinite().all():
                raise ValueError(eval.diverged(step, lr, s))
            total, values = balora.loss_nlu(
                Z_F,
                y,
                Z_P["train"][part].to(device) if s.lambda1 else None,
                lambdas,
                s.T,
                s.k,
                features if s.regularize == "features" else None,
                len(rows),
                1 / acting,
                s.label_smoothing,
            )
            total.backward()
            for name, value in values.items():
                terms[name] = value.item() + (terms[name] or 0.0)

        # update
        if s.method == "adalora":
            terms["orth"] = balora.orthogonality(net)
            (s.orthogonality * terms["orth"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), s.grad_clip or float("inf")).item()
        eval.check_step(step, terms, norm, unmoved, named, lr, s)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        optimizer.step()
        if s.method == "adalora":
            terms["budget"], terms["kept"] = balora.allocate(net, step, max_iters, s.r, *cuts)
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # record
        seconds, clock = time.time() - clock, time.time()
        record = eval.log_step(
            s.out_dir, step, terms, lambdas, norm, lr, sum(lengths[i] for i in rows), seconds, device
        )
        if step % s.log_interval == 0 or step == max_iters:
            print(eval.progress_line(record, max_iters), flush=True)
        if step % eval_interval == 0 or step == max_iters:
            evaluate()
        if (
            step % eval_interval == 0
            or step == max_iters
            or (s.save_interval and step % s.save_interval == 0)
        ):
            eval.save_checkpoint(s.out_dir, step, net, optimizer, Z_P=Z_P)
            clock = time.time()
    return finish(s, net, tok, full, splits["dev"], device)


def say_what_is_idle(s, D, d, rows):
    """Terms with a weight that cannot act on this task, and what SVDR's k becomes: aloud, once."""
    look, n = (d if s.regularize == "features" else D), s.micro_batch
    idle = balora.idle_terms(n, D, look)
    for name, weight in (("cr", s.lambda1), ("dr", s.lambda2), ("svdr", s.lambda3)):
        if weight and name in idle:
            print(f"L_{name.upper()} cannot act here: {idle[name]}")
    if s.lambda3 and "svdr" not in idle and s.k >= min(n, look):
        print(
            f"L_SVDR: k = {min(n, look) - 1} of min(N, D) = {min(n, look)} singular values (with k = {s.k} it would be the constant -1)"
        )
    if (s.lambda2 or s.lambda3) and "dr" not in idle and rows % s.batch_size % n == 1:
        print(
            f"a micro-batch of every epoch has a single row ({rows:,} rows in batches of {s.batch_size}): L_DR and L_SVDR cannot act on it"
        )


def finish(s, net, tok, full, dev, device):
    """Save what was trained, with the features of (at most 2,000) dev rows for `eval.py features`; draw the loss. -> evaluations."""
    if full:
        net.save(os.path.join(s.out_dir, "model"), tok)
    else:
        balora.save_adapter(net, os.path.join(s.out_dir, "adapter"), base=model.HUB.get(s.init, s.init))
    rows = [dev[i] for i in sorted(random.Random("features").sample(range(len(dev)), min(len(dev), 2000)))]
    Z, features = predict(net, rows, device)
    balora.write_atomic(
        os.path.join(s.out_dir, "features.npz"),
        lambda f: np.savez(
            f,
            features=features.numpy(),
            Z=Z.numpy(),
            y=np.array([label for _, label in rows]),
            labels=np.array(TASKS[s.task].labels),
        ),
    )
    eval.plot_curves([s.out_dir], os.path.join(s.out_dir, "loss.png"))
    records, metric = eval.read_json(os.path.join(s.out_dir, "eval.json")), TASKS[s.task].metric
    best = max(records, key=lambda record: record[metric])
    print(
        f"{metric}: best on dev {best[metric]:.4f} (step {best['step']}, chosen on the very rows it is measured on), last {records[-1][metric]:.4f} (step {records[-1]['step']})"
    )
    return records


def compare(results):
    """Before, and after each method, on dev: the last evaluation of every run."""
    first = next(iter(results.values()))[0]
    width = max(map(len, first)) + 2
    print("\n" + f"{'':<{width}}{'before':>10}" + "".join(f"{method:>10}" for method in results))
    for name in first:
        if name != "step":
            print(
                f"{name:<{width}}{first[name]:>10.4f}"
                + "".join(f"{records[-1][name]:>10.4f}" for records in results.values())
            )


if __name__ == "__main__":
    eval.run_main(main)
