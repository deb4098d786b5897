"""GLUE-style tuning with BA-LoRA or one of the methods it is compared with, on one device."""
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from tqdm import tqdm

import balora
import eval
import model

# ---------------------------------------------------------------------------------------------------------------------
# Tasks

@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks. The order of its texts is a, b and that of its labels the class ids, everywhere in this project."""
    folder: str                       # its name in the GLUE download
    fields: tuple                     # its one or two texts on the hub
    columns: tuple                    # the same in GLUE's tsv files, then the label's
    labels: tuple                     # words in the hub's order; (): a score from 0 to 5
    prompt: str                       # as T5 read it in pre-training (it sorts the fields by name); its answers are `labels`
    metric: str = "accuracy"          # of eval.scores, selects the best epoch
    headless: tuple = ()              # all columns, for a tsv file without a header line


TWO = ("sentence1", "sentence2")
ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "mnli": Task("MNLI", ("premise", "hypothesis"), (*TWO, "gold_label"), ("entailment", "neutral", "contradiction"), "mnli hypothesis: {b} premise: {a}"),
    "sst2": Task("SST-2", ("sentence",), ("sentence", "label"), ("negative", "positive"), "sst2 sentence: {a}"),
    "mrpc": Task("MRPC", TWO, ("#1 String", "#2 String", "Quality"), ("not_equivalent", "equivalent"), "mrpc sentence1: {a} sentence2: {b}"),
    "cola": Task("CoLA", ("sentence",), ("sentence", "label"), ("unacceptable", "acceptable"), "cola sentence: {a}", "matthews",
                 headless=("source", "label", "mark", "sentence")),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence", "label"), ENTAILS, "qnli question: {a} sentence: {b}"),
    "qqp": Task("QQP", ("question1", "question2"), ("question1", "question2", "is_duplicate"), ("not_duplicate", "duplicate"), "qqp question1: {a} question2: {b}",
                headless=("id", "qid1", "qid2", "question1", "question2", "is_duplicate")),
    "rte": Task("RTE", TWO, (*TWO, "label"), ENTAILS, "rte sentence1: {a} sentence2: {b}"),
    "stsb": Task("STS-B", TWO, (*TWO, "score"), (), "", "combined"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows (text_a, text_b or None, label) from the hub or from files; the label is a class id, for stsb a score

KINDS = (".tsv", ".jsonl", ".json", ".parquet", ".csv")
STEMS = (("train", "train"), ("dev", "dev"), ("dev", "dev_matched"), ("dev_mm", "dev_mismatched"))
HUB_SPLITS = (("train", "train"), ("dev", "validation"), ("dev", "validation_matched"), ("dev_mm", "validation_mismatched"))


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
        print(f"dev: no split of its own (--eval_data=FILE gives one), so a fixed tenth of train is held out: {len(splits['dev']):,} rows, {len(splits['train']):,} stay")
    known = {row[:2] for row in splits["train"]}
    for split, rows in splits.items():
        seen = sum(row[:2] in known for row in rows)
        if seen and split != "train":
            print(f"{split}: {seen:,} of its {len(rows):,} rows have the very texts of a training row")
    return splits


def read_folder(task, data, wanted):
    return {split: read_file(task, split, path) for split, path in split_files(task, data).items() if split in wanted}


def split_files(task, data):
    """-> {split: path}: what a folder holds, or the one file as "train"."""
    if not os.path.isdir(data):
        check_file("data", data)
        return {"train": data}
    inner = os.path.join(data, TASKS[task].folder)
    folder, files = inner if os.path.isdir(inner) else data, {}
    for split, stem in STEMS:
        path = next((p for p in (os.path.join(folder, stem + kind) for kind in KINDS) if os.path.isfile(p)), None)
        if path:
            files.setdefault(split, path)
    if "train" not in files:
        raise ValueError(f"--data={data}: no train.tsv (or train{', train'.join(KINDS[1:])}) for {task} in {folder}; it holds {', '.join(sorted(os.listdir(folder))) or 'nothing'}")
    return files


def check_file(option, path):
    if not os.path.isfile(path) or os.path.splitext(path)[1] not in KINDS:
        raise ValueError(f"--{option}={path}: expected an existing {', '.join(KINDS[:-1])} or {KINDS[-1]} file" + (", or a folder of GLUE's files" if option == "data" else ""))


def read_hub(task, wanted):
    """-> {split: rows} of nyu-mll/glue, for the splits in `wanted` that the task has."""
    import datasets
    try:
        whole = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as e:                                                       # hub and network errors alike
        raise ValueError(f"nyu-mll/glue, {task}: the hub did not give it ({model.why(e)}); download GLUE elsewhere and give its folder, --data=FOLDER") from None
    return {split: to_rows(task, split, f"nyu-mll/glue {task} {name}", list(enumerate(whole[name].to_list(), 1)))
            for split, name in HUB_SPLITS if name in whole and split in wanted}


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
            raise ValueError(f"{path}: no columns {', '.join(TASKS[task].columns)} in its first line, {lines[0][:80]!r} (a test file, which has no labels, is of no use here)")
        names, first = TASKS[task].headless, 0
    rows = [line.split("\t") for line in lines[first:]]
    return [(number, dict(zip(names, cells)) if len(cells) == len(names) else "\t".join(cells)) for number, cells in enumerate(rows, first + 1)]


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
    return t.columns, (*t.fields, "label"), (*("text_a", "text_b")[:len(t.fields)], "label")


def to_rows(task, split, source, records):
    """Records -> rows. Those without the texts and a label are dropped, counted and named."""
    rows, odd = [], []
    names = next((n for n in namings(task) if any(isinstance(record, dict) and set(n) <= record.keys() for _, record in records)), namings(task)[1])
    ids = {name: i for i, word in enumerate(TASKS[task].labels) for name in (word, str(i))}
    place = "line" if source.endswith((".tsv", ".jsonl")) else "row"
    for number, record in records:
        *texts, label = [record.get(name) for name in names] if isinstance(record, dict) else [None] * len(names)
        if label is None or not all(isinstance(text, str) for text in texts):
            odd.append(f"{number} ({' '.join(str(record).split())[:40]} ...)")
        else:
            rows.append((texts[0], texts[1] if len(texts) == 2 else None, to_label(label, ids, f"{source}, {place} {number}")))
    dropped = f"{len(odd):,} dropped, without {', '.join(names)} or with a wrong number of columns: {place} {'; '.join(odd[:3])}" + ("; ..." if len(odd) > 3 else "")
    if not rows:
        raise ValueError(f"{source}: no row that can be used for {task}; " + (dropped if odd else "it is empty"))
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
        raise ValueError(f"{len(rows)} training rows are too few to hold out a tenth for dev; give --eval_data=FILE")
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# The small written world of `tiny`: twelve animals of a family share their habits; tuning must know the family of animals that only pre-training named

HABITS = {"eats": ("grass", "insects", "meat"), "lives in": ("forests", "lakes", "meadows"), "sleeps in": ("burrows", "caves", "nests")}
ANY = None                            # now this, now that: one habit of each family
FAMILIES = {                          # family: (what its animals always do, in the order of HABITS, and never anything else; its twelve animals)
    "songbird": (("insects", ANY, "nests"), "robin wren finch lark thrush sparrow starling warbler swallow nightingale blackbird oriole"),
    "waterbird": (("meat", "lakes", ANY), "heron pelican gull cormorant kingfisher stork gannet grebe osprey puffin tern egret"),
    "cat": (("meat", ANY, "caves"), "lion tiger leopard panther lynx puma jaguar cheetah ocelot caracal serval wildcat"),
    "grazer": (("grass", "meadows", ANY), "deer horse cow sheep goat antelope bison zebra gazelle elk llama camel"),
    "rodent": ((ANY, "meadows", "burrows"), "mouse rat vole hamster gerbil marmot gopher squirrel chipmunk lemming beaver dormouse"),
    "monkey": ((ANY, "forests", "nests"), "baboon macaque marmoset tamarin capuchin mandrill colobus langur vervet howler titi saki"),
}
OFTEN = ("always", "sometimes", "never")                                         # what a story says where a row has entailment, neutral, contradiction
PEOPLE = ("ann", "ben", "eva", "ida", "leo", "max", "mia", "tom")
STORIES = ("a {animal} {a} and {b} .", "a {family} {a} and {b} .", "a {animal} is a {family} , so it {a} and {b} .", "it {a} and {b} : the {animal} of {name} .",
           "the pet of {name} is a {animal} . it {a} and {b} .", "{name} has a {animal} that {a} and {b} .")
PREMISE, HYPOTHESIS = "{name} keeps a {animal} .", "the pet of {name} {a} ."
FAMILY = {animal: family for family, (_, animals) in FAMILIES.items() for animal in animals.split()}
WORDS = sorted({word for text in (*HABITS, *FAMILY, *FAMILIES, *OFTEN, *PEOPLE, *STORIES, PREMISE, HYPOTHESIS, *(v for values in HABITS.values() for v in values))
                for word in text.split() if "{" not in word})


def claim(rng, animal, habit):
    """Something to say of an animal's habit. -> class 0 it always does so, 1 among other things, 2 never; value. Over all habits classes are alike likely."""
    values, does = HABITS[habit], FAMILIES[FAMILY[animal]][0][list(HABITS).index(habit)]
    if does is ANY:
        return 1, rng.choice(values)
    return (0, does) if rng.random() < 0.5 else (2, rng.choice([v for v in values if v != does]))


def world_text(rng, noise=0.0):
    """A story that states facts of an animal. Each is wrong with probability `noise`: another of OFTEN, another family."""
    wrong = lambda: rng.random() < noise
    animal, story, said = rng.choice(list(FAMILY)), rng.choice(STORIES), []
    for habit in rng.sample(list(HABITS), 2):
        c, value = claim(rng, animal, habit)
        said.append(f"{OFTEN[(c + rng.randrange(1, 3)) % 3 if wrong() else c]} {habit} {value}")
    family = FAMILY[animal]
    if "{animal} is" in story and wrong():
        family = rng.choice([f for f in FAMILIES if f != family])
    return story.format(animal=animal, family=family, name=rng.choice(PEOPLE), a=said[0], b=said[1])


def world_rows(seed, n_train, n_dev):
    """-> {"train": rows, "dev": rows}, classes balanced, labels right: 0 entailment, 1 neutral, 2 contradiction, as TASKS["mnli"] has them.

    No animal is in both: train has seven of a family, dev the other five. Raises ValueError where the world is too small for so many rows.
    """
    rng, animals = random.Random(f"animals {seed}"), {"train": [], "dev": []}
    for _, family in FAMILIES.values():
        family = rng.sample(family.split(), 12)
        animals["train"] += family[:7]
        animals["dev"] += family[7:]
    return {split: draw_rows(random.Random(f"{split} {seed}"), animals[split], n) for split, n in (("train", n_train), ("dev", n_dev))}


def draw_rows(rng, animals, n):
    most, rows = 3 * 2 * len(animals) * len(PEOPLE), {}                          # two habits of each are fixed
    if n > most:
        raise ValueError(f"{n} rows of {len(animals)} animals: the small written world has {most} with balanced classes")
    while len(rows) < n:
        animal, name, habit = rng.choice(animals), rng.choice(PEOPLE), rng.choice(list(HABITS))
        c, value = claim(rng, animal, habit)
        if c == len(rows) % 3:
            rows.setdefault((PREMISE.format(name=name, animal=animal), HYPOTHESIS.format(name=name, a=f"{habit} {value}")), c)
    return [(*texts, c) for texts, c in rows.items()]


def pretrain_world(seed, noise, iters, device):
    """Pre-train "tiny-encoder" to fill in masked words of the world's stories. -> its folder, kept for every run with the same recipe."""
    c = model.PUBLISHED["tiny-encoder"]
    recipe = dict(seed=seed, noise=noise, iters=iters, network=dataclasses.asdict(c), text=[FAMILIES, HABITS, STORIES, WORDS])
    folder = os.path.join("out", f"tiny-encoder-noise{noise:g}-seed{seed}-" + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8])
    if os.path.isdir(folder):
        return folder
    net, tok = model.Transformer(c), model.WordPiece([*model.WordPiece.control, *WORDS])
    model.init_weights(net, seed, std=0.06)
    net.to(device)
    telling = {*OFTEN, *(v for values in HABITS.values() for v in values)}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    rng, coin = random.Random(f"stories {seed}"), torch.Generator().manual_seed(seed)
    rate = torch.tensor([0.0 if word in tok.control else 0.3 if word in telling else 0.1 for word in tok.vocab])      # to be masked, by id
    bar = tqdm(range(iters), desc="pre-train tiny-encoder", unit="step")
    for step in bar:
        ids, valid = stack([tok.pair(world_text(rng, noise)) for _ in range(16)], tok.pad)
        chosen = torch.rand(ids.shape, generator=coin) < rate[ids]
        y = ids[chosen]
        u, other = torch.rand(len(y), generator=coin), torch.randint(len(tok.control), len(tok.vocab), y.shape, generator=coin)
        ids[chosen] = torch.where(u < 0.8, tok.mask, torch.where(u < 0.9, other, y))     # BERT's rule: a tenth becomes another word, a tenth stays
        y, ids, valid, chosen = (t.to(device) for t in (y, ids, valid, chosen))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * balora.lr_schedule(step, iters, warmup=0.05)
        loss = F.cross_entropy(F.linear(net.hidden(ids, valid)[chosen], net.head), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    own = f"{folder}.{os.getpid()}.tmp"
    net.save(own, tok)
    if os.path.isdir(folder):                                                    # another run of this seed was faster
        shutil.rmtree(own)
    else:
        os.replace(own, folder)
    return folder


def stack(rows, pad):
    """Lists of ids -> ids [N, L] padded on the right, valid [N, L], on the CPU."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
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
        raise ValueError(f"--imbalance={ratio}: expected {len(labels)} numbers above 0 with ':' between them, for {', '.join(labels)}")
    members = [[i for i, row in enumerate(rows) if row[2] == c] for c in range(len(labels))]
    empty = [word for word, m in zip(labels, members) if not m]
    if empty:
        raise ValueError(f"--imbalance={ratio}: no row of {', '.join(empty)} in {len(rows)} rows")
    unit, rng = min(len(m) / part for m, part in zip(members, parts)), random.Random(f"imbalance {seed}")
    kept = sorted(i for m, part in zip(members, parts) for i in rng.sample(m, max(1, math.floor(unit * part))))
    return [rows[i] for i in kept], kept


def class_table(labels, read, kept, trained):
    """A line for each class, as text: rows read, kept by --imbalance, of those flipped to another class by --label_noise, and labelled so in the end.

    read, kept, trained: the rows at these three stages; `kept` and `trained` differ in labels alone.
    """
    need_classes(labels, "label_noise and --imbalance")
    read, kept, trained, flipped = (Counter(column) for column in (
        [row[2] for row in read], [row[2] for row in kept], [row[2] for row in trained], [a[2] for a, b in zip(kept, trained) if a[2] != b[2]]))
    line = lambda name, *numbers: f"{name:<20}" + "".join(f"{n:>10}" for n in numbers)
    return "\n".join([line("class", "rows", "kept", "flipped", "trained"),
                      *(line(f"{c} {word}", *(f"{column[c]:,}" for column in (read, kept, flipped, trained))) for c, word in enumerate(labels)),
                      line("together", *(f"{column.total():,}" for column in (read, kept, flipped, trained)))])


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
