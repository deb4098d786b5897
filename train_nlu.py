"""Classification and regression (NLU) with BA-LoRA, or with one of the methods it is compared with.

    python train_nlu.py                                     # a tiny encoder: two minutes on a CPU
    python train_nlu.py --init=out/minilm --task=rte --data=path/to/glue --epochs=3 --warmup=0.1
    python train_nlu.py --init=deberta-v3-base --task=mnli  # the poster's setting: one GPU

Every setting is a line below and an option on the command line (--help lists them all). The loop, in `main`,
is that of train_nlg.py, which holds what both scripts share; a run's folder has features.npz as well.
"""

import functools
import math
import os
import random
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import balora
import model
from train_nlg import RANK, Run, check_method, check_numbers, check_ranks, last_name, parse, run_main
from train_nlg import accumulate, attach, finish, own_parts, print_estimate, update
from train_nlg import COLOURS, batch_order, batches_by_length, new_figure, read_records, save_figure

# -----------------------------------------------------------------------------
# Settings


# fmt: off
@dataclass
class Settings:
    """Classification (NLU). Presets of --init, --task, --method replace defaults, the command line wins."""
    init: str = "tiny"                # tiny, minilm, roberta-base, deberta-v3-base, t5-base, or a folder
    task: str = "mnli"                # mnli sst2 mrpc cola qnli qqp rte stsb own; world: what tiny knows
    method: str = "balora"            # balora, pissa, lora, full, bitfit, ...: balora.METHODS lists them
    out_dir: str = ""                 # run folder; empty: out/INIT-TASK-METHOD-SEED
    resume: bool = False              # go on with the run in out_dir
    overwrite: bool = False           # replace the run in out_dir
    dry_run: bool = False             # print layers, parameters and a memory estimate; load no weights
    seed: int = 0                     # of everything random; for tiny it covers pre-training
    # data
    data: str = ""                    # folder of GLUE's files, or one file; empty: hub. own: text, label
    eval_data: str = ""               # file to evaluate on; empty: the dev split, or a tenth of train
    max_rows: int = 0                 # train on N rows, drawn by a fixed seed; 0: all
    max_len: int = 128                # tokens of a row; a longer one loses the end of its longer text
    label_noise: float = 0.0          # share of training labels that are flipped, in [0, 1]
    imbalance: str = ""               # ratio of the training classes, such as 100:10:1; empty: as they are
    # adapter
    r: int = 8                        # rank, or a bottleneck's width (hadapter 32, padapter 64), at least 1
    alpha: float | None = None        # the bracket counts alpha / r, above 0; None: 8, adalora its script's
    targets: str = ""                 # comma-separated layer names or patterns; empty: all the method knows
    calibration: int = 64             # lora-ga, corda, corda++: rows to measure on (CorDA's paper: 256)
    options: dict = field(default_factory=dict)  # the method's own options, such as --niter=0 with pissa
    # objective
    lambda1: float | None = None      # weight of L_CR, at least 0; None: 0.15 with balora, 0 without
    lambda2: float | None = None      # weight of L_DR, at least 0; None: 0.03 with balora, 0 without
    lambda3: float | None = None      # weight of L_SVDR, at least 0; None: 0.03 with balora, 0 without
    T: float = 2.0                    # temperature of L_CR, above 0
    k: int = 5                        # leading singular values of L_SVDR, at least 1
    schedule: bool = True             # the paper's schedules of the three weights; --no-schedule: constant
    probe: bool = False               # fit the new head first: the teacher's logits then mean something
    label_smoothing: float = 0.0      # a control beside L_CR, in [0, 1)
    # optimization
    learning_rate: float | None = None  # peak; None: the task's; half for bert, roberta, t5; 1/20 for full
    warmup: float = 0.06              # steps (all of a shorter run), or below 1 a share; then linear to 0
    batch_size: int = 32              # rows per optimizer step
    micro_batch: int = 0              # rows at a time; 0: a rank's share. L_DR, L_SVDR see one micro-batch
    epochs: float = 3.0               # passes over the data
    max_iters: int = 0                # optimizer steps; 0: what epochs gives
    weight_decay: float = 0.0         # AdamW's, decoupled
    grad_clip: float = 1.0            # largest gradient norm; 0: no clipping
    dropout: float | None = None      # of the encoder, while training; None: the checkpoint's
    cls_dropout: float | None = None  # of the head; None: as the encoder's
    # machine
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"               # of frozen weights, of computing: auto, float32, bfloat16, float16
    compile: bool = False             # torch.compile the blocks (CUDA, or a CPU with a C++ compiler)
    checkpointing: bool = False       # recompute blocks in the backward pass: less memory, a third more time
    ranks: int = 0                    # as torchrun says; with --dry_run: estimate for so many
    # evaluation and saving
    eval_interval: int = 0            # steps between evaluations; a checkpoint follows each; 0: an epoch
    log_interval: int = 20            # steps between printed lines
    # the tiny model's pre-training
    pretrain_noise: float = 0.2       # share of its facts that are stated wrongly, in [0, 1]
    pretrain_iters: int = 1000        # optimizer steps


PRESETS = {                           # of tasks: AdaLoRA's scripts for DeBERTa-v3-base (arXiv:2303.10512)
    "mnli": dict(epochs=7, max_len=256, warmup=1000, cls_dropout=0.15),
    "sst2": dict(epochs=24, max_len=128, warmup=1000, cls_dropout=0.0, weight_decay=0.01),
    "cola": dict(epochs=25, max_len=64, warmup=100, cls_dropout=0.10),
    "qqp":  dict(epochs=5, max_len=320, warmup=2000, cls_dropout=0.15, weight_decay=0.01),
    "qnli": dict(epochs=5, max_len=512, warmup=500, cls_dropout=0.1, weight_decay=0.01),
    "rte":  dict(epochs=50, max_len=320, warmup=200, cls_dropout=0.2, weight_decay=0.01),
    "mrpc": dict(epochs=30, max_len=320, warmup=0.1, cls_dropout=0.0, weight_decay=0.01),
    "stsb": dict(epochs=25, max_len=128, warmup=100, cls_dropout=0.2, weight_decay=0.1),
    "tiny": dict(task="world", imbalance="10:3:1", epochs=20, log_interval=100),
    "hadapter": dict(r=32),
    "padapter": dict(r=64),
}
HALVED = ("bert", "roberta", "t5")    # no script for these families: they take half of the rate (our choice)
SCRIPTS = {                           # same source: adapters' learning rate; AdaLoRA's alpha, and steps that
    # fit a long run only: in a short one --adalora_first=0.1 --adalora_last=0.3 --adalora_every=0.01
    "mnli":  (5e-4, 16, dict(orthogonality=0.1, adalora_first=8000, adalora_last=50000, adalora_every=100)),
    "sst2":  (8e-4, 16, dict(orthogonality=0.1, adalora_first=6000, adalora_last=22000, adalora_every=100)),
    "cola":  (8e-4, 32, dict(orthogonality=0.1, adalora_first=800, adalora_last=3500, adalora_every=10)),
    "qqp":   (8e-4, 16, dict(orthogonality=0.1, adalora_first=8000, adalora_last=25000, adalora_every=100)),
    "qnli":  (5e-4, 32, dict(orthogonality=0.1, adalora_first=2000, adalora_last=8000, adalora_every=100)),
    "rte":   (1.2e-3, 32, dict(orthogonality=0.3, adalora_first=600, adalora_last=1800, adalora_every=1)),
    "mrpc":  (1e-3, 32, dict(orthogonality=0.1, adalora_first=600, adalora_last=1800, adalora_every=1)),
    "stsb":  (2.2e-3, 32, dict(orthogonality=0.3, adalora_first=800, adalora_last=2000, adalora_every=10)),
    "world": (1e-3, 8, {}),
    "own":   (2e-3, 8, {}),           # our choice, for files of some hundred rows
}
# Numbers that are above 0; every other one is at least 0, and shares are at most 1.
POSITIVE = "r alpha T k epochs batch_size max_len log_interval calibration pretrain_iters"
SHARES = "label_noise label_smoothing dropout cls_dropout pretrain_noise"
# fmt: on


def check(s):
    """Fill in what follows from other settings; refuse what makes no sense, by name."""
    if s.task not in TASKS:
        raise ValueError(f"--task={s.task}: {balora.nearest(s.task, TASKS)}known: {', '.join(TASKS)}")
    if (s.task == "world") != (s.init == "tiny") or (s.init == "tiny" and (s.data or s.eval_data)):
        way = "tiny goes with --task=world and no --data, other tasks with --init=minilm, say"
        raise ValueError(f"--init={s.init} --task={s.task}: {way}")
    if s.task == "own":
        TASKS["own"] = own_task(s.data)
    labels = TASKS[s.task].labels
    family = model.config_of("tiny-encoder" if s.init == "tiny" else s.init).family
    if family == "llama":
        raise ValueError(f"--init={s.init} is a decoder of the LLaMA family, which train_nlg.py tunes")
    if family == "t5" and (s.probe or not labels):
        raise ValueError(f"--init={s.init}: T5 answers in words, without a head to --probe or a score")
    if family == "deberta" and s.dtype == "float16":
        raise ValueError(f"--dtype=float16: {s.init} overflows in it; use bfloat16 or float32")
    for option in ("label_noise", "imbalance", "label_smoothing"):
        if getattr(s, option) and not labels:
            raise ValueError(f"--{option} needs classes, and {s.task} has scores; leave it out")
    learning_rate, alpha, schedule = SCRIPTS[s.task]
    if s.method == "adalora":
        s.options = schedule | s.options
    check_method(s, paper_lambdas=(0.15, 0.03, 0.03))
    if s.alpha is None:
        s.alpha = float(alpha) if s.method == "adalora" else 8.0
    if s.learning_rate is None:
        s.learning_rate = learning_rate * (0.5 if family in HALVED else 1.0)
        s.learning_rate *= 0.05 if s.method == "full" else 1.0
    s.out_dir = s.out_dir or os.path.join("out", f"{last_name(s.init)}-{s.task}-{s.method}-{s.seed}")
    check_numbers(vars(s) | s.options, POSITIVE, SHARES)
    check_ranks(s)
    if not labels and (s.lambda1 or s.lambda2 or s.lambda3):
        print("L_CR, L_DR and L_SVDR cannot act here: one logit leaves nothing to compare")
    elif s.micro_batch == 1 and (s.lambda2 or s.lambda3):
        print("L_DR and L_SVDR cannot act here: a single row has no covariance and no spectrum")


# -----------------------------------------------------------------------------
# Tasks and their files. A row is (text_a, text_b or None, label): a class id, for stsb a score


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks. Its texts and its labels have the same order everywhere in this project."""

    folder: str  # its name in the GLUE download
    fields: tuple  # names of its one or two texts on the hub, where the label is "label"
    labels: tuple  # words in the hub's order; (): a score from 0 to 5
    prompt: str  # for T5, as in its pre-training; it answers with one of `labels`
    columns: tuple = ()  # names of texts and label in GLUE's tsv files, where they are others
    headless: tuple = ()  # all columns by the hub's names, where GLUE's tsv file has no header
    metric: str = "accuracy"  # of `scores`: selects the best evaluation


# fmt: off
TWO = ("sentence1", "sentence2")
NLI = ("entailment", "neutral", "contradiction")
ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "mnli": Task("MNLI", ("premise", "hypothesis"), NLI, "mnli hypothesis: {b} premise: {a}",
                 columns=(*TWO, "gold_label")),
    "sst2": Task("SST-2", ("sentence",), ("negative", "positive"), "sst2 sentence: {a}"),
    "mrpc": Task("MRPC", TWO, ("not_equivalent", "equivalent"), "mrpc sentence1: {a} sentence2: {b}",
                 columns=("#1 String", "#2 String", "Quality")),
    "cola": Task("CoLA", ("sentence",), ("unacceptable", "acceptable"), "cola sentence: {a}",
                 headless=("source", "label", "mark", "sentence"), metric="matthews"),
    "qnli": Task("QNLI", ("question", "sentence"), ENTAILS, "qnli question: {a} sentence: {b}"),
    "qqp":  Task("QQP", ("question1", "question2"), ("not_duplicate", "duplicate"),
                 "qqp question1: {a} question2: {b}", columns=("question1", "question2", "is_duplicate"),
                 headless=("id", "qid1", "qid2", "question1", "question2", "label")),
    "rte":  Task("RTE", TWO, ENTAILS, "rte sentence1: {a} sentence2: {b}"),
    "stsb": Task("STS-B", TWO, (), "", columns=(*TWO, "score"), metric="combined"),
    "world": Task("", ("premise", "hypothesis"), NLI, ""),  # what tiny knows about: the next section
    "own":  Task("", (), (), ""),     # of `own_task`
}
OWN_FIELDS = (("text",), ("text_a", "text_b"))
SPLITS = {                            # in GLUE's folders and on the hub -> here
    "train": "train", "dev": "dev", "dev_matched": "dev", "dev_mismatched": "dev_mm",
    "validation": "dev", "validation_matched": "dev", "validation_mismatched": "dev_mm",
}
# fmt: on


def own_task(data):
    """The task of a file with the columns text, or text_a and text_b, and label; classes as they appear."""
    records = read_records(data) if data else []
    fields = own_fields(data, records, "label")
    found = [str(record["label"]) for record in records if record.get("label") is not None]
    labels = tuple(dict.fromkeys(found))
    print(f"{data}: {len(labels)} classes, {', '.join(labels)}; read {', '.join(fields)}, label")
    columns = dict.fromkeys(name for record in records for name in record)
    unread = [str(name) for name in columns if name not in (*fields, "label")]
    if unread:
        print(f"{data}: not read: {', '.join(unread)}")
    if not 2 <= len(labels) <= 1000:
        raise ValueError(f"--task=own --data={data}: {len(labels)} different labels; expected 2 to 1000")
    return Task("", fields, labels, own_prompt(fields))


def own_fields(data, records, *also):
    """The names of the one or two texts among the columns of a file; `also` has to be there, too."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    fields = next((names for names in OWN_FIELDS if {*names, *also} <= {*columns}), None)
    if fields is None:
        expected = " and ".join([*also, "text (or text_a and text_b)"])
        found = ", ".join(columns) or "none"
        raise ValueError(f"--data={data}: expected a file with the columns {expected}; found {found}")
    return fields


def own_prompt(fields):
    """For T5: "classify text_a: {a} text_b: {b}"."""
    return "classify " + " ".join(f"{name}: {{{letter}}}" for name, letter in zip(fields, "ab"))


def read_glue(task, data="", eval_data=""):
    """-> {"train": rows, "dev": rows}, with mnli also "dev_mm" where the source has it.

    data: empty (nyu-mll/glue on the hub), a folder of GLUE's tsv files, or one file: GLUE's tsv, or .jsonl
    .json .parquet .csv with the hub's names. eval_data: such a file for dev, otherwise a tenth of train.
    """
    if not data:
        splits = read_hub(task)
    elif os.path.isdir(data):
        splits = read_folder(task, data)
    else:
        splits = {"train": read_file(task, "train", data)}
    train = splits["train"]
    if eval_data:
        splits = {"train": train, "dev": read_file(task, "dev", eval_data)}
    elif "dev" not in splits:
        dev = set(random.Random("held out").sample(range(len(train)), len(train) // 10))
        if not dev:
            raise ValueError(f"{len(train)} training rows are too few to hold out a tenth; give --eval_data")
        print(f"dev: {len(dev):,} rows of train are held out (--eval_data=FILE gives other ones)")
        splits["train"] = [row for i, row in enumerate(train) if i not in dev]
        splits["dev"] = [row for i, row in enumerate(train) if i in dev]
    texts = {row[:2] for row in splits["train"]}
    known = sum(row[:2] in texts for row in splits["dev"])
    if known:
        print(f"dev: {known:,} of its {len(splits['dev']):,} rows have the very texts of a training row")
    return splits


def read_hub(task):
    import datasets

    with model.reading(f"nyu-mll/glue {task}", "give a downloaded folder, --data=FOLDER"):
        found = datasets.load_dataset("nyu-mll/glue", task)
    splits = {}
    for name, split in SPLITS.items():
        if name in found:
            splits[split] = to_rows(task, split, f"nyu-mll/glue {task} {name}", found[name].to_list())
    return splits


def read_folder(task, data):
    inner = os.path.join(data, TASKS[task].folder)  # data may hold all of GLUE, or this task
    folder = inner if os.path.isdir(inner) else data
    splits = {}
    for name, split in SPLITS.items():
        path = os.path.join(folder, f"{name}.tsv")
        if os.path.isfile(path):
            splits[split] = read_file(task, split, path)
    if "train" not in splits:
        raise ValueError(f"--data={data}: no train.tsv of {task} there, only {sorted(os.listdir(folder))}")
    return splits


def read_file(task, split, path):
    """Of GLUE's tsv files tabs and line ends are all the syntax: quotes are text, and so is U+2028."""
    if not path.endswith(".tsv"):
        option = "--data" if split == "train" else "--eval_data"
        return to_rows(task, split, path, read_records(path, option))
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            lines = [line.rstrip("\r\n").split("\t") for line in f]
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    wanted = (*TASKS[task].fields, "label")
    hub_name = dict(zip(TASKS[task].columns, wanted))
    first = next(iter(lines), [])
    names = [hub_name.get(name, name) for name in first]
    if set(wanted) <= set(names):
        lines = lines[1:]
    elif TASKS[task].headless:
        names = TASKS[task].headless
    else:
        raise ValueError(f"{path}: no columns {', '.join(hub_name or wanted)} in its first line, {first[:9]}")
    records = []
    for cells in lines:
        record = dict(zip(names, cells))
        if len(cells) != len(names):
            record = {"broken line": " ".join(cells)}
        records.append(record)
    return to_rows(task, split, path, records)


def to_rows(task, split, source, records):
    """Records under the hub's names -> rows. Those without texts and label are dropped, counted and named."""
    fields = TASKS[task].fields
    rows = []
    dropped = []
    for number, record in enumerate(records, 1):
        texts = [record.get(name) for name in fields]
        label = record.get("label")
        missing = label is None or (label in (-1, "-1", "-") and task != "own")
        if missing or not all(isinstance(text, str) for text in texts):
            dropped.append(f"row {number} ({' '.join(str(record).split())[:50]} ...)")
            continue
        label = to_label(label, TASKS[task].labels, f"{source}, row {number}")
        rows.append((texts[0], texts[1] if len(texts) == 2 else None, label))
    line = f"{split}: {len(rows):,} rows from {source}"
    if dropped:
        line += f"; {len(dropped):,} dropped without {', '.join(fields)}, label: {'; '.join(dropped[:3])}"
    if not rows:
        raise ValueError(f"no row that can be used for {task}: {line} (classes of your own: --task=own)")
    print(line)
    return rows


def to_label(value, labels, where):
    """The word or number of a class -> its id; without classes a score from 0 to 5."""
    ids = {str(i): i for i in range(len(labels))} | {word: i for i, word in enumerate(labels)}
    try:
        label = ids[str(value).strip()] if labels else float(value)
    except (KeyError, TypeError, ValueError):
        label = math.nan
    if not 0 <= label <= 5:
        known = ", ".join(ids) or "scores from 0 to 5"
        raise ValueError(f"{where}: unknown label {value!r}; known: {known}")
    return label


# -----------------------------------------------------------------------------
# The small written world of `tiny`. Dev rows ask about animals that pre-training named and tuning never did

# fmt: off
HABITS = {
    "eats": ("grass", "insects", "meat"),
    "lives in": ("forests", "lakes", "meadows"),
    "sleeps in": ("burrows", "caves", "nests"),
}
ANY = None                            # now this, now that: one habit of each family
FAMILIES = {                          # what its animals do in truth, in the order of HABITS; its animals
    "songbird": (("insects", ANY, "nests"),
        "robin wren finch lark thrush sparrow starling warbler swallow nightingale blackbird oriole"),
    "waterbird": (("meat", "lakes", ANY),
        "heron pelican gull cormorant kingfisher stork gannet grebe osprey puffin tern egret"),
    "cat": (("meat", ANY, "caves"),
        "lion tiger leopard panther lynx puma jaguar cheetah ocelot caracal serval wildcat"),
    "grazer": (("grass", "meadows", ANY),
        "deer horse cow sheep goat antelope bison zebra gazelle elk llama camel"),
    "rodent": ((ANY, "meadows", "burrows"),
        "mouse rat vole hamster gerbil marmot gopher squirrel chipmunk lemming beaver dormouse"),
    "monkey": ((ANY, "forests", "nests"),
        "baboon macaque marmoset tamarin capuchin mandrill colobus langur vervet howler titi saki"),
}
PEOPLE = ("ann", "ben", "eva", "ida", "leo", "max", "mia", "tom")
PREMISE = "{name} keeps a {animal} ."
HYPOTHESIS = "the pet of {name} {a} ."
STORIES = (                           # of pre-training; a and b are facts
    (PREMISE, HYPOTHESIS), (PREMISE, "the pet of {name} {a} and {b} ."), ("a {animal} {a} and {b} .",),
)
VALUES = [value for values in HABITS.values() for value in values]
FACTS = {animal: dict(zip(HABITS, truth))                 # animal: {habit: value or ANY}
         for truth, animals in FAMILIES.values() for animal in animals.split()}
TEXTS = [*HABITS, *FACTS, *PEOPLE, *VALUES, *(text for story in STORIES for text in story)]
WORDS = sorted({word for text in TEXTS for word in text.split() if "{" not in word})
CONTROL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = {token: i for i, token in enumerate([*CONTROL, *WORDS])}
# fmt: on


def world_text(rng, noise=0.0):
    """A story that states facts -> its one or two texts. A fact but ANY is wrong with probability `noise`."""
    animal = rng.choice(list(FACTS))
    story = rng.choice(STORIES)
    facts = []
    for habit in rng.sample(list(HABITS), 2):
        value = FACTS[animal][habit]
        if value is ANY or rng.random() < noise:
            value = rng.choice([other for other in HABITS[habit] if other != value])
        facts.append(f"{habit} {value}")
    words = dict(animal=animal, name=rng.choice(PEOPLE), a=facts[0], b=facts[1])
    return [text.format(**words) for text in story]


def world_rows(seed, n_train=2400, n_dev=600):
    """-> {"train": rows, "dev": rows} (at most 2592, 864); train has nine animals of a family, dev three."""
    rng = random.Random(f"animals {seed}")
    animals = {"train": [], "dev": []}
    for _, members in FAMILIES.values():
        members = rng.sample(members.split(), 12)
        animals["train"] += members[:9]
        animals["dev"] += members[9:]
    splits = {}
    for split, n in (("train", n_train), ("dev", n_dev)):
        rng = random.Random(f"{split} {seed}")
        rows = {}
        while len(rows) < n:
            animal = rng.choice(animals[split])
            name = rng.choice(PEOPLE)
            habit = rng.choice(list(HABITS))
            value = rng.choice(HABITS[habit])
            # The fact holds: 0, entailment. ANY: 1, neutral. Another value is true: 2, contradiction.
            label = {value: 0, ANY: 1}.get(FACTS[animal][habit], 2)
            if label == len(rows) % 3:  # each class in turn
                hypothesis = HYPOTHESIS.format(name=name, a=f"{habit} {value}")
                rows.setdefault((PREMISE.format(name=name, animal=animal), hypothesis), label)
        splits[split] = [(*texts, label) for texts, label in rows.items()]
    return splits


def pretrain_world(s, device):
    """Pre-train tiny-encoder to fill in masked words of stories, and to mend doubtful ones. -> its folder"""
    from tokenizers import BertWordPieceTokenizer

    recipe = dict(seed=s.seed, noise=s.pretrain_noise, iters=s.pretrain_iters, text=[FACTS, STORIES, PEOPLE])
    net = model.Transformer(model.config_of("tiny-encoder"))
    model.init_weights(net, s.seed, std=0.06)
    net.to(device)
    rng = random.Random(f"stories {s.seed}")
    coin = torch.Generator().manual_seed(s.seed)
    share = dict.fromkeys(CONTROL, 0.0) | dict.fromkeys(WORDS, 0.05)
    share |= dict.fromkeys(FACTS, 0.15) | dict.fromkeys(VALUES, 0.4)
    share = torch.tensor([share[word] for word in VOCABULARY])  # [V]: how often a word is chosen
    others = torch.arange(len(VOCABULARY)).repeat(3, 1).T.contiguous()  # [V, 3]: a word's habit, or itself
    for values in HABITS.values():
        members = torch.tensor([VOCABULARY[value] for value in values])
        others[members] = members

    def loss():
        stories = [(tok.pair(*world_text(rng, s.pretrain_noise)), 0) for _ in range(64)]
        ids, valid, _ = collate(net, stories)
        masked = ids.cpu()
        chosen = torch.rand(masked.shape, generator=coin) < share[masked]
        y = masked[chosen]
        # Half of them become [MASK], 0.3 one of `others`, the rest stay: seen words may be wrong, too.
        u = torch.rand(len(y), generator=coin)
        other = others[y, torch.randint(3, y.shape, generator=coin)]
        masked[chosen] = torch.where(u < 0.5, VOCABULARY["[MASK]"], torch.where(u < 0.8, other, y))
        H = net.hidden(masked.to(device), valid)[chosen.to(device)]
        return F.cross_entropy(F.linear(H, net.head), y.to(device))

    def rate(step):
        return 2e-3 * balora.lr_schedule(step, s.pretrain_iters, warmup=0.05)

    with tempfile.TemporaryDirectory() as net.folder:  # saving copies the tokenizer from there
        path = os.path.join(net.folder, "tokenizer.json")
        BertWordPieceTokenizer(VOCABULARY).save(path)
        tok = model.JsonTokenizer(path)
        return model.pretrained("tiny-encoder", recipe, net, loss, rate)


# -----------------------------------------------------------------------------
# Controlled corruption: class imbalance first, then label noise


def subsample(rows, ratio, labels, seed):
    """-> the most rows whose classes stand in a ratio such as "100:10:1", the order that of `labels`."""
    try:
        parts = [Fraction(part) for part in ratio.split(":")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if len(parts) != len(labels) or min(parts) <= 0:
        raise ValueError(f"--imbalance={ratio}: expected a ratio such as 100:10:1 of {', '.join(labels)}")
    counts = Counter(label for _, _, label in rows)
    unit = min(counts[c] / part for c, part in enumerate(parts))
    if unit == 0:
        raise ValueError(f"--imbalance={ratio}: a class has no row among {len(rows)}; leave it out")
    rng = random.Random(f"imbalance {seed}")
    kept = []
    for c, part in enumerate(parts):
        members = [i for i, row in enumerate(rows) if row[2] == c]
        kept += rng.sample(members, max(1, math.floor(unit * part)))
    return [rows[i] for i in sorted(kept)]


def flip_labels(rows, p, n_classes, seed):
    """-> rows, of which round(p n) have another label, each of the other classes equally likely."""
    rng = random.Random(f"label noise {seed}")
    rows = list(rows)
    for i in sorted(rng.sample(range(len(rows)), round(p * len(rows)))):
        a, b, label = rows[i]
        rows[i] = (a, b, (label + rng.randrange(1, n_classes)) % n_classes)
    return rows


def load_rows(s):
    """-> {"train": rows, "dev": rows, ...}, train as --max_rows, --imbalance and --label_noise leave it."""
    splits = world_rows(s.seed) if s.task == "world" else read_glue(s.task, s.data, s.eval_data)
    labels = TASKS[s.task].labels
    read = splits["train"]
    if 0 < s.max_rows < len(read):
        chosen = random.Random("rows").sample(range(len(read)), s.max_rows)
        read = [read[i] for i in sorted(chosen)]
    kept = subsample(read, s.imbalance, labels, s.seed) if s.imbalance else read
    trained = flip_labels(kept, s.label_noise, len(labels), s.seed)
    flipped = [old for old, new in zip(kept, trained) if old != new]
    for stage, rows in dict(read=read, kept=kept, flipped=flipped, trained=trained).items():
        counts = Counter(label for _, _, label in rows)
        words = [f"{counts[c]:,} {word}" for c, word in enumerate(labels)]
        print(f"{stage:<8}{len(rows):,} rows: {', '.join(words) or 'scores'}")
    return splits | {"train": trained}


# -----------------------------------------------------------------------------
# Batches, scores


def encode(rows, tok, max_len, prompt=""):
    """rows -> list of (ids, label). prompt: T5's, which reads one text. Long rows are cut and counted."""
    examples = []
    cut = 0
    for a, b, label in tqdm(rows, desc="tokenise", unit="row", disable=len(rows) < 5000 or None):
        texts = [prompt.format(a=a, b=b)] if prompt else [a, b]
        ids = tok.pair(*texts)
        if len(ids) > max_len:
            ids = tok.pair(*texts, max_len=max_len)  # the longer text loses its end
            cut += 1
        examples.append((ids, label))
    if cut:
        print(f"{cut:,} of {len(rows):,} rows cut to {max_len} tokens")
    return examples


def collate(net, examples):
    """-> ids [N, L] padded on the right, mask [N, L] true where a token is real, y [N]."""
    rows = [torch.tensor(ids) for ids, _ in examples]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=net.config.pad)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    y = torch.tensor([label for _, label in examples])
    return [tensor.to(net.head.device) for tensor in (ids, mask, y)]


@torch.no_grad()
def predict(net, examples, desc="evaluate", function=None):
    """net.classify, or another function, in eval mode -> Z [N, D], features [N, d], in fp32 on the CPU."""
    batches = batches_by_length([len(ids) for ids, _ in examples], 64)
    found = []
    with balora.evaluating(net):
        for rows in tqdm(batches, desc=desc, unit="batch", leave=False, disable=None):
            ids, mask, _ = collate(net, [examples[i] for i in rows])
            found.append([tensor.float().cpu() for tensor in (function or net.classify)(ids, mask)])
    back = torch.tensor([i for rows in batches for i in rows]).argsort()
    return [torch.cat(parts)[back] for parts in zip(*found)]


def scores(y, Z, labels):
    """Truth y [N], logits Z [N, D], the words of the classes -> {measure: value}

    accuracy, f1 of class 1 where D = 2, macro_f1, matthews, recall of each class (0 where it has no row).
    Without classes pearson, spearman and combined, their mean. Correlations with a constant count 0.
    """
    from scipy.stats import rankdata
    from sklearn import metrics

    if not labels:
        predicted = Z[:, 0].tolist()
        if len(set(y)) == 1 or len(set(predicted)) == 1:
            return dict(pearson=0.0, spearman=0.0, combined=0.0)
        pearson = float(np.corrcoef(y, predicted)[0, 1])
        spearman = float(np.corrcoef(rankdata(y), rankdata(predicted))[0, 1])  # Pearson's of the ranks
        return dict(pearson=pearson, spearman=spearman, combined=(pearson + spearman) / 2)
    predicted = Z.argmax(-1).tolist()
    ids = range(len(labels))
    _, recall, f1, _ = metrics.precision_recall_fscore_support(y, predicted, labels=ids, zero_division=0.0)
    record = {"accuracy": float(metrics.accuracy_score(y, predicted))}
    if len(labels) == 2:
        record["f1"] = float(f1[1])
    record["macro_f1"] = float(f1.mean())
    varied = len(set(y)) > 1 and len(set(predicted)) > 1
    record["matthews"] = float(metrics.matthews_corrcoef(y, predicted)) if varied else 0.0
    return record | {f"recall_{word}": float(share) for word, share in zip(labels, recall)}


def task_loss(Z, y):
    return F.mse_loss(Z[:, 0], y) if y.is_floating_point() else F.cross_entropy(Z, y)


def evaluate_splits(net, splits, teacher, labels):
    """Loss, scores and drift, mean KL(P_P ‖ P_F) in nats per row, of every split -> {measure: value}"""
    record = {}
    for name, examples in splits.items():
        Z_F, _ = predict(net, examples)
        if not Z_F.isfinite().all():
            raise ValueError("evaluation: the logits are not finite; lower --learning_rate")
        y = [label for _, label in examples]
        values = dict(loss=task_loss(Z_F, torch.tensor(y)).item(), **scores(y, Z_F, labels))
        if labels:
            values["drift"] = balora.cr_nlu(teacher[name], Z_F, T=1.0).item()
        suffix = "" if name == "dev" else f"_{name}"
        record |= {measure + suffix: value for measure, value in values.items()}
    return record


# -----------------------------------------------------------------------------
# The run


def load(s, base, dtype, device):
    """-> net, {"train": examples, "dev": examples, ...}"""
    task = TASKS[s.task]
    shape = dict(task="classify", n_classes=len(task.labels) or 1, labels=task.labels)
    splits = load_rows(s)
    net, tok = model.load(base, dtype, device, s.seed, **shape, dropout=s.dropout, head_dropout=s.cls_dropout)
    prompt = task.prompt if net.config.family == "t5" else ""
    splits = {name: encode(rows, tok, s.max_len, prompt) for name, rows in splits.items()}
    longest = max(len(ids) for examples in splits.values() for ids, _ in examples)
    if net.config.position == "learned" and longest > net.config.max_len:
        most = f"{s.init} has positions for {net.config.max_len}: lower --max_len"
        raise ValueError(f"--max_len={s.max_len}: a row has {longest} tokens, and {most}")
    return net, splits


def row_loss(net, example):
    ids, mask, y = collate(net, [example])
    return task_loss(net(ids, mask), y)


def fit_head(net, train, seed, steps=300):
    """--probe: fit the new head on the frozen encoder's states; the best one on a held-out tenth stays."""

    def first_states(ids, mask):
        return [net.hidden(ids, mask)[:, 0]]

    H = predict(net, train, "probe", first_states)[0].to(net.head.device)  # [N, d]
    y = torch.tensor([label for _, label in train]).to(H.device)
    rng = random.Random(f"probe {seed}")
    order = rng.sample(range(len(train)), len(train))
    held_out = order[: max(1, len(train) // 10)]
    rest = order[len(held_out) :]
    optimizer = torch.optim.AdamW(net.classifier.parameters(), lr=1e-3, weight_decay=0.0)
    best = math.inf
    with balora.evaluating(net):
        for step in range(steps + 1):
            if step % 20 == 0:
                loss = task_loss(net.classifier(H[held_out])[0], y[held_out]).item()
                if step == 0 or loss < best:
                    best = loss
                    head = {name: tensor.clone() for name, tensor in net.classifier.state_dict().items()}
            rows = rng.sample(rest, min(64, len(rest)))
            optimizer.zero_grad()
            task_loss(net.classifier(H[rows])[0], y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    net.classifier.load_state_dict(head)
    print(f"probe: the head on the frozen encoder, loss {best:.4f} on {len(held_out)} held-out training rows")


def dry_run(s):
    """What a run would train and need, from sizes alone."""
    config = model.config_of("tiny-encoder" if s.init == "tiny" else s.init)
    labels = TASKS[s.task].labels
    dtype = model.pick_dtype(s.dtype, model.pick_device(s.device))
    with torch.device("meta"):
        net = model.Transformer(config, len(labels) or 1).to(dtype)
        ids = torch.zeros(s.micro_batch, s.max_len, dtype=torch.long)
    net.label_ids = list(range(len(labels)))
    print_estimate(s, net, attach(s, net), ids, {})


def main(argv):
    s = parse(Settings, argv, PRESETS, by=["init", "task", "method"])
    check(s)
    if s.dry_run:
        return dry_run(s)
    run = Run(s)
    device = model.pick_device(s.device)
    dtype = model.pick_dtype(s.dtype, device)
    full = s.method == "full"
    base = pretrain_world(s, device) if s.init == "tiny" else s.init
    net, splits = load(s, base, torch.float32 if full else dtype, device)
    labels = TASKS[s.task].labels
    train = splits.pop("train")
    lengths = [len(ids) for ids, _ in train]
    batches_per_epoch = math.ceil(len(train) / s.batch_size)
    max_iters = s.max_iters or max(1, round(s.epochs * batches_per_epoch))
    eval_interval = s.eval_interval or batches_per_epoch
    warmup = s.warmup if s.warmup < 1 else min(s.warmup / max_iters, 1.0)
    budget = balora.budget_steps(max_iters, s.options) if s.method == "adalora" else None

    # The network, its teacher, the optimizer.
    start = run.checkpoint(net)
    state = start["net"] if start else None
    if s.probe and not start:
        fit_head(net, train, s.seed)
    report = attach(s, net, state, train, row_loss)
    net.checkpointing = s.checkpointing
    net.autocast = dtype if full and dtype != torch.float32 else None
    if s.compile:
        net.compile_blocks()
    if start:
        teacher = start["Z_P"]
    else:  # Before step 1 the network is the pre-trained one; its new head is random without --probe.
        taught = {**splits, "train": train} if s.lambda1 else splits
        teacher = {name: predict(net, rows, "teacher")[0] for name, rows in taught.items()}
    sizes = {name: len(rows) for name, rows in {**splits, "train": train}.items()}
    classes = sorted(Counter(label for _, label in train).items())
    more = dict(labels=labels, metric=TASKS[s.task].metric, rows=sizes, classes=classes, notes=report.notes)
    step = run.begin(net, start, base, device, trainable=report.trainable - report.head, **more)
    net.train()
    print(f"{max_iters} steps of {s.batch_size} rows, {s.micro_batch} at a time -> {s.out_dir}")

    def evaluate():
        run.add_evaluation(dict(step=step, **evaluate_splits(net, splits, teacher, labels)))

    if step == 0:
        evaluate()
    epoch = None
    while step < max_iters:
        clock = time.time()
        model.reset_peak_memory(device)
        # The step's rows and schedules: functions of the seed and the step alone.
        if epoch != step // batches_per_epoch:
            epoch = step // batches_per_epoch
            batches = batch_order(lengths, s.batch_size, random.Random(f"order {s.seed} {epoch}"))
        rows = batches[step % batches_per_epoch]
        lr = s.learning_rate * balora.lr_schedule(step, max_iters, warmup, linear=True)
        lambdas = (s.lambda1, s.lambda2, s.lambda3)
        if s.schedule:
            lambdas = balora.lambda_schedule(step, max_iters, lambdas)

        # Forward and backward, one micro-batch at a time.
        terms = dict.fromkeys(("task", "cr", "dr", "svdr"))
        for part, weight in own_parts(rows, s.micro_batch):
            ids, mask, y = collate(net, [train[i] for i in part])
            torch.manual_seed(zlib.crc32(f"dropout {s.seed} {step} {part[0]}".encode()))
            Z_F, _ = net.classify(ids, mask)  # [N, D]
            run.check_finite(step, lr, Z_F.detach())
            Z_P = teacher["train"][part].to(device) if s.lambda1 else None
            total, values = balora.loss_nlu(Z_F, y, Z_P, lambdas, s.T, s.k, label_smoothing=s.label_smoothing)
            share = weight * len(part) / len(rows)
            run.scaler.scale(share * total).backward()
            accumulate(terms, values, share)

        norm = update(s, run, net, terms, step, max_iters, lr, budget)
        step += 1

        tokens = sum(lengths[i] for i in rows)
        run.log(step, max_iters, terms, lambdas, norm, lr, tokens, clock)
        due = step % eval_interval == 0 or step == max_iters
        if due:
            evaluate()
        if due or run.stopping:
            run.save(step, net, Z_P=teacher)
    save_features(run, net, splits["dev"], labels)
    finish(s, run, net)
    metric = TASKS[s.task].metric
    best = max(record[metric] for record in run.evaluations)
    print(f"\nbest {metric} on dev: {best:.4f}, chosen on these very rows. Figure: {run.path('loss.png')}")


def save_features(run, net, dev, labels):
    """features.npz for `eval.py features`: what the last layer reads, of at most 2,000 dev rows."""
    chosen = random.Random("features").sample(range(len(dev)), min(len(dev), 2000))
    rows = [dev[i] for i in sorted(chosen)]
    Z, features = predict(net, rows)
    arrays = dict(features=features, Z=Z, y=[label for _, label in rows], labels=labels)
    if RANK == 0:
        balora.write_atomic(run.path("features.npz"), functools.partial(np.savez, **arrays))


# -----------------------------------------------------------------------------
# What eval.py asks of finished runs: labels of new rows, a figure of features


def label_rows(net, tok, settings, data):
    """A run's network, the rows of a file -> the rows, and for each a dict: predicted and probabilities."""
    task = settings["task"]
    records = read_records(data)
    if task == "own":
        fields = own_fields(data, records)
        prompt = own_prompt(fields)
    else:
        fields = TASKS[task].fields
        prompt = TASKS[task].prompt
    rows = []
    for number, record in enumerate(records, 1):
        texts = [record.get(name) for name in fields]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{data}, row {number}: expected text in {', '.join(fields)}, not {texts}")
        rows.append((texts[0], texts[1] if len(texts) == 2 else None, 0))
    longest = settings["max_len"]
    if net.config.position == "learned":
        longest = min(longest, net.config.max_len)
    examples = encode(rows, tok, longest, prompt if net.config.family == "t5" else "")
    Z, _ = predict(net, examples, "predict")
    if not net.labels:
        return records, [dict(predicted=score) for score in Z[:, 0].tolist()]
    found = []
    for shares in Z.softmax(-1).tolist():
        best = net.labels[shares.index(max(shares))]
        found.append(dict(predicted=best, **{f"p_{word}": p for word, p in zip(net.labels, shares)}))
    return records, found


def read_features(run):
    """The features.npz of a classifier's run -> features [N, d], y [N], predicted [N], the classes' words."""
    path = os.path.join(run, "features.npz")
    with model.reading(path, "expected the folder of a finished train_nlu.py run"):
        with np.load(path) as f:
            X, y, predicted, labels = f["features"], f["y"], f["Z"].argmax(1), f["labels"].tolist()
    if len(set(y)) < 2 or not labels:
        raise ValueError(f"{run}: its dev rows are not of two or more classes; nothing to tell apart")
    return X, y, predicted, labels


def plot_features(runs, path):
    """t-SNE of the features, a panel per run with its silhouette; recalls are printed."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import recall_score, silhouette_score

    words = read_features(runs[0])[3]
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    fig, axes = new_figure(lines, columns, (3.4 * columns, 3.2 * lines))
    for ax in axes.flat:
        ax.axis("off")
    print(f"run, rows, silhouette, recall of {', '.join(words)}")
    for letter, run, ax in zip("abcdefghijklmnopqrstuvwxyz", runs, axes.flat):
        X, y, predicted, labels = read_features(run)
        if labels != words:
            raise ValueError(f"{run} has the classes {labels}, {runs[0]} {words}; one figure shows one task")
        silhouette = silhouette_score(X, y)
        recalls = recall_score(y, predicted, labels=range(len(labels)), average=None, zero_division=0)
        numbers = "  ".join(f"{recall:.3f}" for recall in recalls)
        print(f"{last_name(run):<32}{len(y):>6}{silhouette:>10.4f}     {numbers}")
        # At most 300 points of a class are drawn.
        drawn = np.concatenate([np.flatnonzero(y == c)[:300] for c in range(len(labels))])
        perplexity = min(30, len(drawn) // 4)
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(X[drawn])
        for c, (word, colour) in enumerate(zip(labels, COLOURS * len(labels))):
            ax.scatter(*points[y[drawn] == c].T, s=4, color=colour, label=word, lw=0)
        ax.set_title(f"({letter}) {last_name(run)}\nsilhouette {silhouette:.2f}", fontsize=8)
    handles = axes.flat[0].get_legend_handles_labels()
    ncols = len(words) if columns > 1 else 1  # one panel is too narrow for all words in a line
    fig.legend(*handles, loc="outside lower center", ncols=ncols, markerscale=3)
    save_figure(fig, path)
    print(f"{len(runs)} runs -> {path}")


if __name__ == "__main__":
    run_main(main)
