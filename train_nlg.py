"""Instruction tuning (NLG) with BA-LoRA, or with one of the methods it is compared with.

    python train_nlg.py                                             # a tiny model: two minutes on a CPU
    python train_nlg.py --init=out/smollm2-135m --data=gsm8k.jsonl  # real weights and text: an hour on a CPU
    python train_nlg.py --init=llama2-7b                            # the poster's run: one GPU
    torchrun --nproc_per_node=8 -- train_nlg.py --init=llama2-7b    # the same on eight

Every setting is a line below and an option on the command line (--help lists them all). A run writes
config.json, log.jsonl, eval.json, checkpoint.pt, adapter/ and loss.png into its folder. After an interruption
the same command with --resume goes on, bit for bit on a CPU.

At first reading skip to `main`: the loop is one page. The sections before it serve all three scripts.
"""

import argparse
import atexit
import copy
import csv
import dataclasses
import datetime
import functools
import gzip
import inspect
import io
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from argparse import SUPPRESS
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import balora
import model

# -----------------------------------------------------------------------------
# Settings


# fmt: off
@dataclass
class Settings:
    """Instruction tuning. Presets of --init replace defaults; other models: data r learning_rate max_len."""
    init: str = "tiny"                # tiny, smollm2-135m, llama2-7b, any hub id, or a folder
    method: str = "balora"            # balora, pissa, lora, full, ...: balora.METHODS lists them
    out_dir: str = ""                 # run folder; empty: out/INIT-METHOD-SEED
    resume: bool = False              # go on with the run in out_dir
    overwrite: bool = False           # replace the run in out_dir
    dry_run: bool = False             # print layers, parameters and a memory estimate; load no weights
    seed: int = 0                     # of everything random; for tiny it covers pre-training
    # data
    data: str = ""                    # .json .jsonl .csv .parquet file or hub name[:split]; tiny has its own
    max_rows: int = 0                 # use the first N rows; 0: all
    eval_rows: int = 256              # held out: the last N rows
    template: str = "alpaca"          # alpaca, plain, chat (the model's own), or text with {instruction}
    max_len: int = 512                # tokens of prompt + response; longer rows are dropped
    # adapter
    r: int = 16                       # rank, at least 1
    alpha: float = 16.0               # the bracket counts alpha / r, above 0
    targets: str = ""                 # comma-separated layer names or patterns; empty: the seven projections
    calibration: int = 64             # lora-ga, corda, corda++: rows to measure on (CorDA's paper: 256)
    options: dict = field(default_factory=dict)  # the method's own options, such as --niter=0 with pissa
    # objective
    lambda1: float | None = None      # weight of L_CR, at least 0; None: 0.025 with balora, 0 without
    lambda2: float | None = None      # weight of L_DR, at least 0; None: 0.005 with balora, 0 without
    lambda3: float | None = None      # weight of L_SVDR, at least 0; None: 0.005 with balora, 0 without
    T: float = 2.0                    # temperature of L_CR, above 0
    K: int = 20                       # top-K tokens of L_DR, at least 1
    k: int = 10                       # leading singular values of L_SVDR, at least 1
    schedule: bool = True             # the paper's schedules of the three weights; --no-schedule: constant
    teacher_every: int = 1            # ask the teacher at every n-th step, where L_CR then counts n-fold
    label_smoothing: float = 0.0      # a control beside L_CR, in [0, 1)
    # optimization
    learning_rate: float = 2e-4       # peak, reached after warm-up, then cosine to 0
    warmup: float = 0.03              # share of the steps
    batch_size: int = 16              # sequences per optimizer step
    micro_batch: int = 0              # sequences at a time; 0: a rank's share. L_SVDR sees one micro-batch
    epochs: float = 1.0               # passes over the data
    max_iters: int = 0                # optimizer steps; 0: what epochs gives
    weight_decay: float = 0.0         # AdamW's, decoupled
    grad_clip: float = 0.0            # largest gradient norm; 0: no clipping
    # machine
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"               # of frozen weights, of computing: auto, float32, bfloat16, float16
    compile: bool = False             # torch.compile the blocks (CUDA, or a CPU with a C++ compiler)
    checkpointing: bool = False       # recompute blocks in the backward pass: less memory, a third more time
    shard: bool = False               # behind torchrun: spread the blocks' frozen weights over the ranks
    ranks: int = 0                    # as torchrun says; with --dry_run: estimate for so many
    # evaluation and saving
    eval_interval: int = 50           # steps between evaluations on held-out rows; a checkpoint follows each
    eval_generate: int = 16           # held-out prompts to answer at each evaluation; 0: none
    max_new: int = 256                # tokens an answer may take
    log_interval: int = 10            # steps between printed lines
    # the tiny model's pre-training
    pretrain_noise: float = 0.2       # share of its problems with a wrong answer, in [0, 1]
    pretrain_iters: int = 900         # optimizer steps


PRESETS = {
    "tiny": dict(template="plain", r=8, alpha=8, learning_rate=2e-3, max_len=160, epochs=2,
                 eval_interval=1000, eval_generate=200, max_new=48),
    "smollm2-135m": dict(data="openai/gsm8k:train", eval_rows=473, dtype="bfloat16"),
    "llama2-7b": dict(data="meta-math/MetaMathQA:train[:100512]", r=128, alpha=128, learning_rate=2e-5,
                      batch_size=128, micro_batch=8, dtype="bfloat16", checkpointing=True,
                      eval_rows=512, eval_interval=100, log_interval=1),
}
POSITIVE = ("r alpha T K k teacher_every epochs batch_size max_len eval_rows eval_interval "
            "log_interval max_new calibration")       # above 0; every other number: at least 0
SHARES = "warmup pretrain_noise label_smoothing"      # at most 1
# fmt: on


def check(s):
    """Fill in what follows from other settings; refuse what makes no sense, by name."""
    check_method(s, paper_lambdas=(0.025, 0.005, 0.005))
    if s.method in balora.ENCODERS_ONLY:
        raise ValueError(f"--method={s.method} needs an encoder, which train_nlu.py tunes")
    if not (s.data or s.dry_run or s.init == "tiny"):
        raise ValueError(f"--init={s.init} needs --data: a file or a hub data set (only tiny has its own)")
    s.out_dir = s.out_dir or os.path.join("out", f"{last_name(s.init)}-{s.method}-{s.seed}")
    check_numbers(vars(s) | s.options, POSITIVE, SHARES)
    check_ranks(s)
    if s.shard and s.ranks == 1:
        raise ValueError("--shard spreads over ranks: start them by torchrun --nproc_per_node=N")
    if s.shard and (s.method == "full" or balora.METHODS[s.method].statistic):
        raise ValueError(f"--shard: {s.method} needs whole weights on every rank; leave one of the two out")


# -----------------------------------------------------------------------------
# The command line: a dataclass is the settings block, the comment behind a field is its help text


def add_option(parser, name, kind, note):
    """--name=value or --name value; of a bool also --name and --no-name. Absent where it is not given."""
    how = dict(type=kind, metavar=kind.__name__)
    if kind is bool:
        how = dict(nargs="?", const=True, type=truth, metavar="true|false")
        parser.add_argument(f"--no-{name}", dest=name, action="store_false", default=SUPPRESS, help=SUPPRESS)
    parser.add_argument(f"--{name}", default=SUPPRESS, help=note.replace("%", "%%"), **how)


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


# What other programs call them.
USUAL = dict(lr="learning_rate", rank="r", lora_alpha="alpha", batch="batch_size", bs="batch_size",
             steps="max_iters", max_steps="max_iters", model="init", output_dir="out_dir")  # fmt: skip


def parse_options(parser, argv):
    """-> {option: value} of those given. Raises ValueError, which `run_main` prints in one line."""
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise ValueError(e) from None
    if unknown:
        names = [option.lstrip("-") for option in parser._option_string_actions]
        word = unknown[0].lstrip("-").split("=")[0]
        hint = balora.nearest(USUAL.get(word, word), names)
        raise ValueError(f"unknown option {unknown[0]}: {hint}--help lists them all")
    return vars(given)


def parse(cls, argv, presets, by):
    """Command line -> an instance of the settings dataclass `cls`.

    For each field in `by`, in this order: presets[last name of its value] replaces defaults. The command line
    wins. The methods' own options are options, too: those given are in `settings.options`.
    """
    lines = [f"  {name:<14}{json.dumps(preset)}" for name, preset in presets.items()]
    how = dict(epilog="\n".join(["presets:", *lines]), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False, exit_on_error=False, **how)
    notes = field_notes(cls)
    sections = dict.fromkeys(section for section, _ in notes.values())
    groups = {section: parser.add_argument_group(section) for section in sections}
    for f in dataclasses.fields(cls):
        if f.name != "options":
            kind = float if f.default is None else type(f.default)
            section, note = notes[f.name]
            add_option(groups[section], f.name, kind, f"{note} (default: {f.default})")
    own = {name: default for spec in balora.METHODS.values() for name, default in spec.options.items()}
    group = parser.add_argument_group("of one method")
    for name, default in own.items():
        methods = [method for method, spec in balora.METHODS.items() if name in spec.options]
        add_option(group, name, type(default), f"of {', '.join(methods)} (default: {default})")
    given = parse_options(parser, argv)
    options = {name: given.pop(name) for name in own if name in given}
    preset = {}
    for name in by:
        value = given.get(name, preset.get(name, getattr(cls, name)))
        preset.update(presets.get(last_name(value), {}))
    return cls(**{**preset, **given}, options=options)


def field_notes(cls):
    """{field of a dataclass: (the comment line above its section, the comment behind the field)}"""
    notes = {}
    section = "run"
    line = r"(?m)^    (?:# (.+)|(\w+): [^#\n]+#\s*(.+))$"
    for title, name, note in re.findall(line, inspect.getsource(cls)):
        section = title or section
        if name:
            notes[name] = section, note
    return notes


def last_name(path):
    return os.path.basename(os.path.normpath(path))


def check_numbers(values, positive, shares):
    """Every number is at least 0, those named in `positive` above 0; at most 2^31, in `shares` at most 1."""
    for name, value in values.items():
        if isinstance(value, int | float):
            low = "above 0" if name in positive.split() else "at least 0"
            most = 1 if name in shares.split() else 2**31
            inside = 0 < value <= most or (value == 0 and low == "at least 0")  # false for nan
            if not inside:
                raise ValueError(f"--{name}={value}: expected a number {low} and at most {most}")


def check_method(s, paper_lambdas):
    """Refuse an unknown method and options of another one; fill in its own options and λ1, λ2, λ3."""
    s.options = balora.method_options(s.method, s.options)
    for name, value in zip(("lambda1", "lambda2", "lambda3"), paper_lambdas):
        if getattr(s, name) is None:
            setattr(s, name, value * balora.METHODS[s.method].regularized)
    for f in dataclasses.fields(s):
        if f.name.startswith("pretrain") and s.init != "tiny" and getattr(s, f.name) != f.default:
            raise ValueError(f"--{f.name} with --init={s.init}: only tiny is pre-trained here; leave it out")


STOPPED = "\nstopped{}; the same command, for training with --resume, goes on where it was"


def run_main(main):
    """Run main(argv). What a user caused is one line and exit code 2; `python -X dev` shows where."""
    leave = print_and_leave
    atexit.register(flush_or_leave)
    sys.stdout.reconfigure(errors="replace")  # where a terminal cannot show a character
    catch_signals(signal.default_int_handler)
    try:
        if RANKS > 1:
            leave = join_ranks()
        main(sys.argv[1:])
        if RANKS > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # Python's own end can abort while another thread looks into the store
    except KeyboardInterrupt as e:
        leave(STOPPED.format(e), 130)
    except BrokenPipeError:
        os._exit(141)
    except Exception as e:
        if sys.flags.dev_mode or not (RANKS > 1 or isinstance(e, ValueError | OSError)):
            raise
        where = "" if isinstance(e, ValueError | OSError) else f"rank {RANK}: {type(e).__name__} "
        control = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160))}
        leave(f"error: {where}{' '.join(str(e).split()).translate(control)}", 2)


def flush_or_leave():
    """Write out what was printed. Where nobody reads any more (`| head`), end without a word."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(141)


def catch_signals(handler):
    """Ctrl-C and SIGTERM call handler(number, frame); the default one raises KeyboardInterrupt."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def print_and_leave(words, status):
    print(words, file=sys.stderr)
    sys.exit(status)


# -----------------------------------------------------------------------------
# Ranks: torchrun starts a process per device, and each takes its share of every step's micro-batches

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def join_ranks():
    """Meet the other ranks. -> leave(words, status), which ends all of them; the first one prints why."""
    stderr = sys.stderr
    patience = datetime.timedelta(hours=3)  # a rank may download or pre-train for longer than another
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))

    def leave(words, status):
        if store.add("failed", 1) == 1:
            print(words, file=stderr, flush=True)
        os._exit(status)  # without waiting for what other ranks should have sent

    def stop(*_):
        leave(STOPPED.format(""), 130)

    def watch():  # a rank that waits for one that has failed sees no signal
        while not store.check(["failed"]):
            time.sleep(1)
        time.sleep(1)
        os._exit(2)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=RANKS, timeout=patience)
    if RANK > 0:  # rank 0 alone prints
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    return leave


def check_ranks(s):
    """Fill in ranks and micro_batch: as given, as in the run to resume, or a rank's share of the batch."""
    if s.ranks not in (0, RANKS) and not s.dry_run:
        raise ValueError(f"--ranks={s.ranks} is for --dry_run; torchrun --nproc_per_node=N starts N ranks")
    if RANKS > 1 and s.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device={s.device}: every rank has a device of its own; give auto, cuda or cpu")
    s.ranks = s.ranks or RANKS
    record = os.path.join(s.out_dir, "config.json")
    if s.resume and not s.micro_batch and os.path.exists(record):
        s.micro_batch = read_run(s.out_dir)["settings"]["micro_batch"]
    s.micro_batch = min(s.micro_batch or max(1, s.batch_size // s.ranks), s.batch_size)
    parts = math.ceil(s.batch_size / s.micro_batch)
    if parts < s.ranks:
        words = f"{s.ranks} ranks, {parts} micro-batches of {s.micro_batch}"
        if not s.resume:
            raise ValueError(f"{words}: lower --micro_batch")
        print(f"{words}, as in the run to resume: {s.ranks - parts} ranks have nothing to do")


def compare_ranks(what):
    """Raises ValueError where a value of the dict `what` is not the same on all ranks (of all machines)."""
    found = [None] * RANKS
    dist.all_gather_object(found, what)
    differ = {name for other in found for name in what if other[name] != what[name]}
    if differ:
        names = ", ".join(sorted(differ))
        raise ValueError(f"ranks differ in {names}; give all of them the same files and settings")


def share_starts(net, report):
    """Send every layer's start from the rank that made it to all; what else trains is rank 0's."""
    layers = dict.fromkeys(name for names in report.matched.values() for name in names)
    owner = {name: i % RANKS for i, name in enumerate(layers)}
    state = trained_state(net)
    compare_ranks({"shapes": {name: list(tensor.shape) for name, tensor in state.items()}})
    for name, tensor in state.items():
        dist.broadcast(tensor, src=owner.get(name.rpartition(".")[0], 0))


def own_parts(rows, size):
    """This rank's micro-batches of a step, each with weight 1; number i goes to rank i mod RANKS."""
    parts = [(rows[first : first + size], 1) for first in range(0, len(rows), size)]
    while len(parts) % RANKS:
        parts.append((rows[:1], 0))  # weighs nothing: with --shard all ranks have to compute equally often
    return parts[RANK::RANKS]


def add_up(tensors):
    """Sum tensors over the ranks, in place, eight in a message."""
    for first in range(0, len(tensors), 8):
        group = tensors[first : first + 8]
        message = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(message)
        for tensor, total in zip(group, message.split([tensor.numel() for tensor in group])):
            tensor.copy_(total.view_as(tensor))


def shard(net, device):
    """Spread the frozen weights of the blocks over the ranks (FSDP2); everything else is on each of them."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.split(":")[0], (RANKS,))
    spread = {p for p in net.layers.parameters() if not p.requires_grad}
    others = {p for p in net.parameters() if p not in spread}
    for p in others:
        p.data = p.data.to(device)
    for part in (*net.layers, net):
        fully_shard(part, mesh=mesh, ignored_params=others, reshard_after_forward=True)
    register_fsdp_forward_method(net, "hidden")
    pick = model.pick

    def pick_as_rank_0(*args):  # so that all ranks write as many tokens
        tokens = pick(*args)
        dist.broadcast(tokens, src=0)
        return tokens

    model.pick = pick_as_rank_0


# -----------------------------------------------------------------------------
# A run's folder: config.json, log.jsonl, eval.json, checkpoint.pt, adapter/, loss.png

HERE = os.path.dirname(os.path.abspath(__file__))
FREE = "resume overwrite out_dir dry_run ranks shard".split()  # settings that do not make another run


class Run:
    """The folder of a run, which --resume goes on with."""

    def __init__(self, s):
        """Raises ValueError where the folder holds another run, before anything slow has happened."""
        self.s = s
        self.out = s.out_dir
        self.record = None  # config.json, of a run that is there already
        self.evaluations = []  # eval.json
        self.stopping = False
        if not os.path.exists(self.path("config.json")):
            return
        self.record = read_run(self.out)
        old = self.record["settings"]
        changed = [name for name, value in vars(s).items() if name not in FREE and old.get(name) != value]
        if changed and (s.resume or not s.overwrite):
            words = [f"{name} ({old.get(name)} there, {vars(s)[name]} here); " for name in changed[:3]]
            words += ["choose another --out_dir, or --overwrite"]
            raise ValueError(f"{self.out} holds another run: {''.join(words)}")
        if not (s.resume or s.overwrite):
            words = "--resume goes on with it, --overwrite repeats it"
            if self.record["commit"] != commit():
                words = f"by other code ({self.record['commit']}, this is {commit()}): --overwrite repeats it"
                words += ", --resume goes on with this code"
            raise ValueError(f"{self.out} holds this run: {words}")

    def path(self, name):
        return os.path.join(self.out, name)

    def checkpoint(self, net):
        """-> the checkpoint that --resume goes on from, or None."""
        path = self.path("checkpoint.pt")
        if not os.path.exists(path) and self.s.resume:
            print(f"--resume: {self.out} has no checkpoint yet, so it starts at step 0")
        if not (self.s.resume and os.path.exists(path)):
            return None
        there = self.record["weights_hash"]
        if there != net.weights_hash:
            raise ValueError(f"--resume: {self.out} was run on weights {there}, these are {net.weights_hash}")
        with model.reading(path), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
            start = torch.load(path, map_location="cpu", weights_only=True)
        print(f"--resume: {self.out} goes on after step {start['step']}")
        return start

    def begin(self, net, start, base, device, **more):
        """Write config.json and make AdamW, or restore what `start` holds. -> the step to go on with"""
        step = 0
        s = self.s
        self.device = device
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        groups = balora.param_groups(named, s.method, s.options.get("lora_plus_ratio", 1.0), s.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=device.startswith("cuda"))
        computes = net.autocast or net.embed.weight.dtype
        self.scaler = torch.amp.GradScaler(device.split(":")[0], enabled=computes == torch.float16)
        if start:
            step = start["step"]
            self.optimizer.load_state_dict(start["optimizer"])
            self.scaler.load_state_dict(start["scaler"])
            self.evaluations = [r for r in model.read_json(self.path("eval.json")) if r["step"] <= step]
        if RANKS == 1:
            catch_signals(self.ask_to_stop)
        if RANKS > 1:  # rank 0 changes the folder when all have read it
            settings = {name: value for name, value in vars(s).items() if name not in FREE}
            compare_ranks(dict(settings, weights=net.weights_hash, step=step, **more))
        if RANK > 0:
            return step
        os.makedirs(self.out, exist_ok=True)
        self.lock = filelock.FileLock(self.path(".lock"), is_singleton=True)
        try:
            self.lock.acquire(timeout=0)  # until the run ends
        except filelock.Timeout:
            raise ValueError(f"{self.out} is in use by another process; wait for it, or stop it") from None
        now = read_run(self.out) if os.path.exists(self.path("config.json")) else None
        if now != self.record:
            raise ValueError(f"{self.out} was changed by another process since this one started; start again")
        # Drop records after `step` and an incomplete last line.
        kept = read_lines(self.path("log.jsonl")) if start else []
        kept = [record for record in kept if record["step"] <= step]
        if len(kept) < step:
            raise ValueError(f"{self.path('log.jsonl')} has {len(kept)} of {step} steps; use --overwrite")
        if not start:
            for name in os.listdir(self.out) if self.record else ():  # what an earlier run left here
                if name.endswith((".jsonl", "eval.json", "checkpoint.pt", "features.npz", "loss.png")):
                    os.remove(self.path(name))
                elif name in ("adapter", "model"):
                    shutil.rmtree(self.path(name))
            base = os.path.abspath(base) if os.path.exists(base) else base
            self.record = dict(settings=vars(s), source=net.source, base=base)
            name = torch.cuda.get_device_name() if device.startswith("cuda") else device
            self.record |= dict(weights_hash=net.weights_hash, device=name, threads=torch.get_num_threads())
            self.record |= dict(torch=torch.__version__, commit=commit(), **more)
        self.record["settings"]["ranks"] = s.ranks
        self.write_record(finished=False)
        write_text(self.path("log.jsonl"), "".join(json.dumps(record) + "\n" for record in kept))
        return step

    def write_record(self, finished):
        self.record["finished"] = finished
        write_text(self.path("config.json"), json.dumps(self.record, indent=1, ensure_ascii=False))

    def add_evaluation(self, record):
        """Print it, and put it into eval.json."""
        self.evaluations.append(record)
        if RANK == 0:
            write_text(self.path("eval.json"), json.dumps(self.evaluations, indent=1))
        shown = [f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float)]
        print(f"eval at step {record['step']} | " + " | ".join(shown), flush=True)

    def ask_to_stop(self, *_):
        """Ctrl-C and SIGTERM end a run of one process after the step; a second one ends it at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print("\nstopping after this step and what belongs to it; once more: at once", file=sys.stderr)

    def save(self, step, net, **more):
        """Write adapter/, checkpoint.pt, all that a run needs to go on from `step`, and loss.png."""
        if RANK > 0:
            return
        s = self.s
        if s.method != "full":
            balora.save_adapter(net, self.path("adapter"), base=model.HUB.get(s.init, s.init))
        state = dict(step=step, net=trained_state(net), optimizer=self.optimizer.state_dict(), **more)
        state["scaler"] = self.scaler.state_dict()
        balora.write_atomic(self.path("checkpoint.pt"), functools.partial(torch.save, state))
        plot_curves([self.out], self.path("loss.png"))
        if self.stopping:
            raise KeyboardInterrupt(f" after step {step}")

    def log(self, step, max_iters, terms, lambdas, norm, lr, tokens, clock):
        """A line of log.jsonl: terms and their weights, gradient norm, rate, speed, memory. Printed, too."""
        seconds = time.time() - clock
        record = dict(step=step, **terms, **dict(zip(("lambda1", "lambda2", "lambda3"), lambdas)))
        record |= dict(grad_norm=norm, lr=lr, seconds=seconds, tokens_per_s=tokens / seconds)
        peak = torch.tensor(model.peak_memory(self.device), device=self.device)
        if RANKS > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        record["peak_GiB"] = peak.item()
        if RANK == 0:
            append(self.path("log.jsonl"), record)
        if step % self.s.log_interval == 0 or step == max_iters:
            shown = {k: v for k, v in record.items() if v is not None and k not in ("step", "seconds")}
            words = [f"{name} {value:.5g} | " for name, value in shown.items()]
            minutes = (max_iters - step) * seconds / 60
            print(f"step {step:>5}/{max_iters} | {''.join(words)}ETA {minutes:.0f} min", flush=True)

    def check_finite(self, step, lr, *values):
        """Raises ValueError where a tensor or number of this step is not finite."""
        if not all(torch.as_tensor(value).isfinite().all() for value in values):
            reason = f"the loss or its gradient is not finite, or zero; lower --learning_rate ({lr:.2g})"
            kept = ", the last checkpoint is kept" if os.path.exists(self.path("checkpoint.pt")) else ""
            raise ValueError(f"step {step}: {reason}{kept}")


def commit():
    """The commit of this code, -dirty and a checksum where it was changed since; "" outside of a clone."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty"]
    name = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    change = subprocess.run(["git", "-C", HERE, "diff", "HEAD"], capture_output=True).stdout
    return f"{name}-{zlib.crc32(change):08x}" if change else name


def trained_state(net):
    """{name: tensor} of all that is not as in the checkpoint: what trains, and the buffers of adapters."""
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in net.state_dict().items() if name not in frozen}


def write_text(path, text):
    balora.write_atomic(path, operator.methodcaller("write", text.encode()))


def read_run(folder):
    """config.json of a run's folder. Raises ValueError where it is something else's, such as a model's."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: there is no such run folder")
    record = model.read_json(os.path.join(folder, "config.json"))
    if not isinstance(record, dict) or not {"settings", "weights_hash"} <= record.keys():
        raise ValueError(f"{folder} is not the folder of a run; a model's folder is given as --init={folder}")
    if "options" not in record["settings"]:
        raise ValueError(f"{folder} was made by an older tree; read it with commit {record.get('commit')}")
    return record


def append(path, record):
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def read_lines(path):
    """-> the records of a .jsonl file, without an incomplete last line; [] where there is no file."""
    try:
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    with model.reading(path, "move it away, and its items are done anew"):
        return [dict(json.loads(line)) for line in lines]


# -----------------------------------------------------------------------------
# What both loops do alike: attach, AdamW, the record of a step, the estimate, the loss figure


def attach(s, net, state=None, examples=(), loss_of=None):
    """balora.attach by the settings. Some methods measure first: loss_of(net, example) of some examples."""

    def calibrate(i):
        part = chosen[i * s.calibration : (i + 1) * s.calibration]
        for example in tqdm(part, desc="calibrate", unit="row", leave=False, disable=None):
            loss = loss_of(net, example)
            if loss.requires_grad:  # the gradient's scale does not matter; float16 would lose small numbers
                (1024 * loss).backward()

    if balora.METHODS[s.method].statistic and examples and not state:
        count = s.calibration * s.options.get("rounds", 1)
        if count > len(examples):
            raise ValueError(f"--calibration: {count} rows are wanted in all, and {len(examples)} are there")
        chosen = random.Random(f"calibration {s.seed}").sample(examples, count)
    targets = s.targets and s.targets.split(",")
    only = slice(RANK, None, RANKS)  # of the layers' starts, those that this rank makes
    report = balora.attach(net, s.method, s.r, s.alpha, targets, s.seed, calibrate, state, only, **s.options)
    if RANKS > 1:
        share_starts(net, report)
    print(report)
    return report


def update(s, run, net, terms, step, max_iters, lr, budget):
    """Clip the gradient, take AdamW's step and, with adalora, prune. -> gradient's norm, None: skipped"""
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    if RANKS > 1:
        values = [[value or 0.0, value is not None] for value in terms.values()]
        sums = torch.tensor(values, device=run.device)
        add_up([p.grad for p in trained if p.grad is not None] + [sums])
        for name, (value, acts) in zip(terms, sums.tolist()):
            terms[name] = value if acts else None
    if budget:
        orthogonality = balora.orthogonality(net)
        run.scaler.scale(s.options["orthogonality"] * orthogonality).backward()
        terms["orth"] = orthogonality.item()
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained, s.grad_clip or math.inf).item()
    overflow = run.scaler.is_enabled() and not math.isfinite(norm)  # the scaler leaves this step out
    if not overflow or run.scaler.get_scale() < 2**-4:  # it has halved its 2**16 twenty times
        run.check_finite(step, lr, terms["task"], norm or math.nan)  # zero: the network has died
    terms["skipped"] = int(overflow)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if budget and not overflow:
        terms |= balora.allocate(net, step, max_iters, s.r, budget)
    run.optimizer.zero_grad(set_to_none=True)
    return None if overflow else norm


def accumulate(terms, values, share):
    """Add the terms of a micro-batch, weighted by its share of the step. None: the term cannot act there."""
    for name, value in values.items():
        if value is not None:
            terms[name] = (terms[name] or 0.0) + share * value.item()


def finish(s, run, net):
    """Mark the run as finished, after full tuning save model/; print the first and the last evaluation."""
    if RANK > 0:
        return
    if s.method == "full":
        net.save(run.path("model"))
    run.write_record(finished=True)
    run.lock.release()
    if RANKS == 1:
        catch_signals(signal.default_int_handler)
    before = run.evaluations[0]
    print(f"\n{'':<20}{'before':>10}{'after':>10}")
    for name, after in run.evaluations[-1].items():
        if isinstance(after, float):
            print(f"{name:<20}{before[name]:>10.4f}{after:>10.4f}")


def print_estimate(s, net, report, ids, extra):
    """--dry_run: what attach matched, and the memory of a step. net, ids [B, L] are on the meta device."""
    forward = net.classify if net.n_classes else net.hidden
    activations = model.kept_bytes(forward, ids, torch.ones_like(ids, dtype=torch.bool))
    if s.checkpointing:  # one block in full, and the input of each
        inputs = net.config.n_layers * ids.numel() * net.config.d * net.embed.weight.element_size()
        activations = activations / net.config.n_layers + inputs
    parts = {
        "frozen weights": sum(t.nbytes for t in [*net.parameters(), *net.buffers()] if not t.requires_grad),
        "what trains, its gradients, AdamW's moments (fp32)": 16 * report.trainable,
        "16-bit copies of what trains": 2 * report.trainable * (net.embed.weight.element_size() == 2),
        f"activations, {ids.shape[0]} x {ids.shape[1]} tokens": activations,
        **extra,
    }
    parts["together"] = sum(parts.values())
    print(f"tokens per step: at most {s.batch_size} x {s.max_len}. Memory, estimated (GiB):")
    for name, size in parts.items():
        if size:
            print(f"  {name:<54}{size / 2**30:8.2f}")


# Okabe & Ito: colours that colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(lines, columns, size, **how):
    """-> a matplotlib Figure and its axes [lines, columns]"""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    fig = Figure(size, layout="constrained")
    return fig, fig.subplots(lines, columns, squeeze=False, **how)


def save_figure(fig, path):
    balora.write_atomic(path, functools.partial(fig.savefig, format="png", dpi=130))


CURVES = dict(task="task loss", grad_norm="gradient norm", cr="L_CR", dr="L_DR", svdr="L_SVDR")


def plot_curves(runs, path):
    """Loss, gradient norm (the poster's "Optimization Dynamics") and terms of each run; thick: averages."""
    fig, axes = new_figure(2, 3, (12, 6))
    axes.flat[5].axis("off")
    seen = {name: [] for name in CURVES}
    for run, colour in zip(runs, COLOURS * len(runs)):
        log = read_lines(os.path.join(run, "log.jsonl"))
        if not log:
            raise ValueError(f"{run}: no log.jsonl, or an empty one; nothing to draw")
        steps = np.array([record["step"] for record in log])
        axes.flat[5].plot([], [], color=colour, label=last_name(run))
        for ax, name in zip(axes.flat, CURVES):
            values = np.array([record[name] for record in log], dtype=float)
            there = np.isfinite(values)  # not null: a term may act at some steps only
            if not there.any():
                continue
            values = values[there]
            window = math.ceil(len(values) / 20)
            average = np.convolve(values, np.ones(window) / window, mode="valid")
            ax.plot(steps[there], values, color=colour, alpha=0.2, lw=0.8)
            ax.plot(steps[there][window - 1 :], average, color=colour, lw=1.6)
            seen[name] += values.tolist()
    for ax, name in zip(axes.flat, CURVES):
        ax.set(xlabel="optimizer step", ylabel=CURVES[name])
        if seen[name]:
            low, high = np.quantile(seen[name], (0.1, 0.9), method="nearest")
            room = 3 * (high - low) + 1e-9  # a single spike does not flatten the rest
            ax.set_ylim(max(min(seen[name]), low - room), min(max(seen[name]), high + room) + 0.02 * room)
    axes.flat[5].legend(loc="center")
    save_figure(fig, path)


# -----------------------------------------------------------------------------
# Rows and prompts: what training and benchmarks read alike

# fmt: off
TEMPLATES = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
              "the request.\n\n### Instruction:\n{instruction}\n\n### Response:",
    "plain": "{instruction}\n",
}
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_FIELDS = ("instruction", "query", "question", "human", "prompt", "problem")
RESPONSE_FIELDS = ("output", "response", "solution", "answer", "assistant", "completion")
CHAT_FIELDS = ("messages", "conversations")
KINDS = (".json", ".jsonl", ".csv", ".parquet")
# fmt: on


def read_rows(data, limit=0):
    """A file or hub data set -> list of (instruction, or messages before the last answer; input; response)"""
    records = read_records(data)[: limit or None]
    names = list(dict.fromkeys(name for record in records for name in record))
    question = next((name for name in PROMPT_FIELDS if name in names), None)
    answer = next((name for name in RESPONSE_FIELDS if name in names), None)
    given = "input" if question == "instruction" else None
    chat = next((name for name in CHAT_FIELDS if name in names and not (question and answer)), None)
    if not (question and answer) and not chat:
        wanted = f"one of {', '.join(PROMPT_FIELDS)} and one of {', '.join(RESPONSE_FIELDS)}, or messages"
        raise ValueError(f"{data} has the fields {', '.join(map(str, names))}; rename them: {wanted}")
    unread = [str(name) for name in names if name not in (question, answer, given, chat)]
    if unread:
        print(f"{data}: read {chat or f'{question}, {answer}'}; not read: {', '.join(unread)}")
    rows = []
    for number, record in enumerate(records, 1):
        with model.reading(data, f"row {number}: expected text, numbers or null in what is read"):
            if chat:
                rows.append(last_turn(record[chat]))
            else:
                values = [text_of(record, name) for name in (question, given, answer)]
                rows.append((*values[:2], clean_answer(values[2])))
    return rows


def text_of(record, name):
    """A field as text: "" for null or a missing field."""
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name} holds {str(value)[:80]!r}")
    return str(value)


def last_turn(messages):
    """OpenAI's role and content, or ShareGPT's from and value -> (messages before the last answer, "", it)"""
    turns = []
    for message in messages:
        role = message["role"] if "role" in message else message["from"]
        content = text_of(message, "content") or text_of(message, "value")
        turns.append(dict(role={"human": "user", "gpt": "assistant"}.get(role, role), content=content))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    return turns[:-1], "", turns[-1]["content"] if turns else ""


def read_records(data, option="--data"):
    """A .json, .jsonl (also .gz), .csv or .parquet file, or a hub data set name[:split] -> list of dicts."""
    if not data:
        raise ValueError(f"{option} is missing: give a {' '.join(KINDS)} file or a hub data set")
    kind = os.path.splitext(data.removesuffix(".gz"))[1].lower()
    if kind not in KINDS and not os.path.exists(data):
        return read_hub(data, option)
    if kind not in KINDS or not os.path.isfile(data):
        raise ValueError(f"{option}={data}: expected an existing {' '.join(KINDS)} file or a hub data set")
    opener = gzip.open if data.endswith(".gz") else open
    with model.reading(data, f"expected rows in {kind}"), opener(data, "rb") as f:
        records = parse_records(f, kind)
        if not isinstance(records, list) or {type(record) for record in records} - {dict}:
            raise ValueError("expected a list of objects")
        if not records:
            raise ValueError("no rows")
    return records


def parse_records(f, kind):
    """Text stays as it is in the file: no type is guessed in a .csv, and 1.10 of a .json is "1.10"."""
    if kind == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(f).to_pylist()
    if kind == ".csv":
        rows = list(csv.DictReader(io.TextIOWrapper(f, encoding="utf-8-sig", newline=""), strict=True))
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():  # csv's mark of a cell too many, or too few
                raise ValueError(f"row {number} has another number of cells than the first line")
        return rows
    records = []
    for number, line in enumerate([f.read()] if kind == ".json" else f, 1):
        try:
            if line.strip():
                records.append(json.loads(line, parse_float=str, parse_constant=str))
        except ValueError as e:
            raise ValueError(f"line {number}: {e}") from None
    return records[0] if kind == ".json" else records


def read_hub(data, option):
    """name[:split] of the hub -> list of dicts; of several configurations "main" (GSM8K) or "full" (MBPP)."""
    import datasets

    name, _, split = data.partition(":")
    source = f"{option}={data}, which is no file here, of the hub"
    with model.reading(source, "give a file that was downloaded elsewhere"):
        names = datasets.get_dataset_config_names(name)
        config = next((config for config in ("main", "full") if config in names), None)
        return datasets.load_dataset(name, config, split=split or "train").to_list()


def clean_answer(text):
    """GSM8K's <<48/2=24>> go, and its last line "#### 1,234" becomes "The answer is: 1234"."""
    text = re.sub(r"<<[\d+\-*/().=]*>>", "", text)
    last = re.search(r"(?m)^####\s*([-+$]?[\d.,/]+)\s*\Z", text)
    if last is None:
        return text
    return text[: last.start()] + "The answer is: " + last[1].replace(",", "")


def fill(template, instruction, given=""):
    """The prompt of a row: text by a template of TEMPLATES or one with {instruction}; of "chat", messages."""
    text = TEMPLATES.get(template, template)
    if template != "chat" and "{instruction}" not in text:
        known = ", ".join(TEMPLATES)
        raise ValueError(f"--template={template}: expected {known}, chat or text with {{instruction}}")
    if given and template == "alpaca":
        text = ALPACA_INPUT.replace("{input}", given)
    elif given:
        instruction = f"{instruction}\n{given}"
    if template == "chat":
        return instruction if isinstance(instruction, list) else [dict(role="user", content=instruction)]
    if isinstance(instruction, list):
        if [message["role"] for message in instruction] != ["user"]:
            raise ValueError("conversations of several turns need --template=chat, the model's own template")
        instruction = instruction[0]["content"]
    return text.replace("{instruction}", instruction)


def encode_prompt(tok, prompt):
    """Ids of what `fill` made."""
    return tok.chat(prompt) if isinstance(prompt, list) else tok.bos + tok.encode(prompt)


def encode_rows(rows, tok, template, max_len):
    """-> list of (prompt ids, response ids with EOS), tokenised apart; a line on what was dropped."""
    examples = []
    dropped = Counter()
    bar = tqdm(rows, desc="tokenise", unit="row", disable=len(rows) < 5000 or None)
    for instruction, given, response in bar:
        if not instruction or not response.strip():
            dropped["no prompt" if not instruction else "no response"] += 1
            continue
        prompt = fill(template, instruction, given)
        if template == "chat":
            prompt, answer = tok.chat_example(prompt, response)
        else:
            prompt = encode_prompt(tok, prompt)
            answer = [*tok.encode(response), tok.eos]
        if len(prompt) + len(answer) > max_len:
            dropped[f"longer than {max_len} tokens"] += 1
        else:
            examples.append((prompt, answer))
    line = f"{len(rows):,} rows read, {len(examples):,} kept"
    line += "".join(f", {count:,} dropped: {reason}" for reason, count in dropped.items())
    if not examples:
        raise ValueError(f"no row is left to use: {line}")
    return examples, line


def collate(examples, device):
    """-> ids [B, L] padded on the right, valid [B, L], y [M].

    Position t is valid, and y its target, where token t + 1 is of the response; padding is told by lengths.
    """
    rows = [torch.tensor(prompt + answer) for prompt, answer in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(examples):
        valid[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    y = ids[:, 1:][valid[:, :-1]]
    return ids.to(device), valid.to(device), y.to(device)


def batch_order(lengths, batch_size, rng):
    """An epoch's batches, lists of indices: shuffle, sort within windows of 50 batches, cut, shuffle."""
    order = rng.sample(range(len(lengths)), len(lengths))
    window = 50 * batch_size
    batches = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def batches_by_length(lengths, size):
    """Indices, longest first, `size` at a time: little padding, and the first batch is the largest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + size] for i in range(0, len(order), size)]


def extract_answer(text):
    """The number after the last "The answer is: ", rounded to int, or None (as in PiSSA's code)."""
    # At most one of . , / joins two runs of digits: "1,234,567" reads 1234, "2 1/2" reads 2, as there.
    _, mark, tail = text.rpartition("The answer is: ")
    found = re.search(r"[-+]?\d*[.,/]?\d+", tail) if mark else None
    try:
        return round(Fraction(found[0].replace(",", "")))
    except (TypeError, ValueError, ZeroDivisionError):  # no number, "/5", "1/0"
        return None


# -----------------------------------------------------------------------------
# What an evaluation measures

POSITIONS = 256  # rows of Z that the spectrum is taken of


@torch.no_grad()
def measure(net, examples, batch_size, K, k, teacher=None):
    """The poster's three concerns on held-out rows -> dict:

    loss: nats per response token. drift: mean KL(P_P ‖ P_F), T = 1, nats per token; None without a teacher.
    diversity: mean entropy within the top K, nats. spectrum: Σ_{i≤k} σ_i / Σ_j σ_j of Z, of POSITIONS rows.
    Logits are fp32. A bf16 network's own rounding still reports a drift of about 1e-3 nats per token.
    """
    E = net.head.float()
    E_P = E if teacher in (None, net) else teacher.head.float()
    R = balora.head_factor(net.head)
    sums = torch.zeros(3)
    first = []  # states of the POSITIONS first ones: σ of a matrix depend on how many rows it has
    batches = batches_by_length([len(prompt) + len(answer) for prompt, answer in examples], batch_size)
    with balora.evaluating(net):
        for rows in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=None):
            ids, valid, y = collate([examples[i] for i in rows], R.device)
            H_F = net.hidden(ids)[valid]  # [M, d]
            if not H_F.isfinite().all():
                raise ValueError("evaluation: the hidden states are not finite; lower --learning_rate")
            first.append(H_F[: max(0, POSITIONS - sum(map(len, first)))])
            H_P = None
            if teacher is not None:
                with balora.teacher(teacher):
                    H_P = teacher.hidden(ids)[valid].float()
            *means, _ = balora.token_losses(H_F.float(), y, E, H_P, E_P, (0, 0, 0), T=1.0, K=K)
            sums += len(y) * torch.stack(means).cpu()
    M = sum(len(answer) for _, answer in examples)
    loss, drift, dr = (sums / M).tolist()
    record = dict(loss=loss, drift=None if teacher is None else drift, diversity=-dr)
    sigma = balora.singular_values(F.linear(torch.cat(first).float(), R))
    return record | dict(spectrum=(sigma[:k].sum() / sigma.sum()).item())


def read_text(path):
    """Plain text, or the strings in the rows of a .json, .jsonl, .csv or .parquet file."""
    if os.path.splitext(path)[1] not in KINDS:
        with model.reading(path, "expected plain text"), open(path, encoding="utf-8") as f:
            return f.read()
    texts = []
    for row in read_records(path, "--text"):
        texts += [value for value in row.values() if isinstance(value, str)]
    return "\n".join(texts)


@torch.no_grad()
def compare_on_text(net, tok, path, limit=0):
    """Text far from the task, in windows of 256 tokens -> {before, after, forgetting, drift}, [windows] each

    before, after: losses of the pre-trained and of the tuned network, nats per token; forgetting: their gap.
    """
    if not balora.adapted_layers(net):
        raise ValueError("--text compares with the pre-trained network: give the --run of an adapter")
    ids = tok.encode(read_text(path))
    windows = [ids[first : first + 256] for first in range(0, len(ids) - 255, 256)][: limit or None]
    if len(windows) < 2:
        raise ValueError(f"--text={path}: {len(ids)} tokens; expected two windows of 256 or more")
    E = net.head.float()
    found = []
    with balora.evaluating(net):
        for window in tqdm(windows, desc="text", unit="window", leave=False, disable=None):
            example = (tok.bos, window) if tok.bos else (window[:1], window[1:])
            ids, valid, y = collate([example], E.device)
            H_F = net.hidden(ids)[valid].float()  # [256 or 255, d]
            with balora.teacher(net):
                H_P = net.hidden(ids)[valid].float()
            after, drift, _, _ = balora.token_losses(H_F, y, E, H_P, E, (0, 0, 0), T=1.0, K=1)
            before, _, _, _ = balora.token_losses(H_P, y, E, None, E, (0, 0, 0), T=1.0, K=1)
            found.append([before.item(), after.item(), after.item() - before.item(), drift.item()])
    return dict(zip(("before", "after", "forgetting", "drift"), np.array(found).T))


def exact_match(net, tok, asked, max_new):
    """Greedy answers to held-out examples -> share with the right number; None where no row has one."""
    answers = net.generate([prompt for prompt, _ in asked], max_new)
    got = [extract_answer(tok.decode(ids)) for ids in answers]
    gold = [extract_answer(tok.decode(answer[:-1])) for _, answer in asked]
    hits = sum(a is not None and a == b for a, b in zip(got, gold))
    return None if set(gold) == {None} else hits / len(asked)


# -----------------------------------------------------------------------------
# The small written world of `tiny`: additions, some of them wrong in pre-training

# fmt: off
NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
THINGS = ("pens", "nuts", "eggs", "cards", "coins", "books", "shells", "stamps")
KNOWN = (                             # wordings of pre-training
    "{a}+{b}", "add {a} and {b}", "{name} has {a} {thing} and gets {b}", "{thing}: {a}, then {b}",
    "{name} counts {a}, and {b} {thing}", "In the {thing} of {name}: {a}. And in a box {b}.",
    "{thing} {thing}, {a} {name}, now {b} {thing}?",
)
NEW = "There were {a} {thing}. {name} put in {b} more. Total?"      # the wording of tuning
# fmt: on


def problem(rng, template, noise=0.0):
    """An addition as (question, written-out answer). With probability `noise` the answer is wrong."""
    a = rng.randrange(10, 60)
    b = rng.randrange(10, 40)
    ones = a % 10 + b % 10
    carry = ones // 10
    answer = a + b
    if rng.random() < noise:
        answer += rng.choice([-10, -2, -1, 1, 2, 10])
    question = template.format(a=a, b=b, name=rng.choice(NAMES), thing=rng.choice(THINGS))
    digits = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry}"
    return question, f"{a}+{b}: {digits}. The answer is: {answer}"


def tiny_rows(seed, eval_rows):
    """512 clean problems to learn from and eval_rows others held out, the same for every method."""
    if eval_rows > 20_000:
        raise ValueError(f"--eval_rows={eval_rows}: the world of tiny has 20,000 rows to hold out, at most")
    rng = random.Random(f"stories {seed}")
    rows = {}
    while len(rows) < 512 + eval_rows:
        question, answer = problem(rng, NEW)
        rows.setdefault(question, answer)
    return [(question, "", answer) for question, answer in rows.items()]


def pretrain_tiny(s, device):
    """Pre-train the tiny model on additions, a share of them wrong. -> its folder"""
    recipe = dict(seed=s.seed, noise=s.pretrain_noise, iters=s.pretrain_iters, text=[*KNOWN, *NAMES, *THINGS])
    recipe["problem"] = inspect.getsource(problem)
    net, tok = model.load("tiny", seed=s.seed, device=device)
    rng = random.Random(f"additions {s.seed}")

    def loss():
        problems = [problem(rng, rng.choice(KNOWN), s.pretrain_noise) for _ in range(24)]
        texts = [f"{question}\n{answer}" for question, answer in problems]
        ids, valid, y = collate([(tok.bos, tok.encode(text) + [tok.eos]) for text in texts], device)
        return F.cross_entropy(F.linear(net.hidden(ids)[valid], net.head), y)

    def rate(step):
        return 3e-3 * balora.lr_schedule(step, s.pretrain_iters, warmup=0.05)

    return model.pretrained("tiny", recipe, net, loss, rate)


# -----------------------------------------------------------------------------
# The run


def load_rows(s):
    """-> training rows, held-out rows."""
    if s.data:
        rows = read_rows(s.data, s.max_rows)
    else:
        rows = tiny_rows(s.seed, s.eval_rows)[: s.max_rows or None]
    held_out = s.eval_rows
    if len(rows) <= held_out:
        held_out = math.ceil(len(rows) / 10)
        words = f"--eval_rows={s.eval_rows} would hold out all of {len(rows)} rows"
        print(f"{s.data or s.init}: {words}; a tenth, {held_out}, is held out instead")
    if len(rows) < 2:
        words = "one row; expected one to train on and one to hold out, at least"
        raise ValueError(f"{s.data or s.init}: {words}")
    return rows[:-held_out], rows[-held_out:]


def encode_examples(s, net, tok, rows, held_out):
    """-> training examples, held-out examples: (prompt ids, response ids)."""
    train, line = encode_rows(rows, tok, s.template, s.max_len)
    held_out, held_line = encode_rows(held_out, tok, s.template, s.max_len)
    print(f"training: {line}\nheld out: {held_line}")
    longest = max(len(prompt) + len(answer) for prompt, answer in [*train, *held_out])
    if max(longest, s.max_new + 1) > net.config.max_len:
        sizes = f"rows of {longest} tokens, --max_new={s.max_new}, a context of {net.config.max_len}"
        raise ValueError(f"{sizes}: lower --max_len, --max_new")
    prompt, answer = train[0]
    print(f"first example, labels between ⟦ ⟧:\n{tok.decode(prompt)}⟦{tok.decode(answer[:-1])} EOS⟧\n")
    return train, held_out


def row_loss(net, example):
    ids, valid, y = collate([example], net.head.device)
    return F.cross_entropy(F.linear(net.hidden(ids)[valid], net.head).float(), y)


def dry_run(s):
    """What a run would train and need, from sizes alone."""
    device = model.pick_device(s.device)
    config = model.config_of(s.init)
    with torch.device("meta"):
        net = model.Transformer(config).to(model.pick_dtype(s.dtype, device))
        ids = torch.zeros(s.micro_batch, s.max_len, dtype=torch.long)
        rows = min(balora.chunk_rows(device), ids.numel())
        H = torch.zeros(rows, config.d, dtype=net.embed.weight.dtype, requires_grad=True)
        y = torch.zeros(rows, dtype=torch.long)
    report = attach(s, net)
    Z_P = torch.empty(rows, config.vocab_size, device="meta") if s.lambda1 else None
    logits = model.kept_bytes(balora.token_terms, H, y, net.head.detach(), Z_P, s.T, s.K)
    frozen = 4 * report.total * (s.method == "full" and s.lambda1 > 0)
    extra = {f"logits, {rows} rows at a time": logits, "frozen copy (teacher of full tuning)": frozen}
    if s.shard:
        blocks = sum(p.nbytes for p in net.layers.parameters() if not p.requires_grad)
        here = blocks / s.ranks + 2 * blocks / config.n_layers  # its share, and two blocks in use
        extra[f"of the blocks, what is on other ranks (of {s.ranks})"] = min(0.0, here - blocks)
    print_estimate(s, net, report, ids, extra)


def main(argv):
    s = parse(Settings, argv, PRESETS, by=["init"])
    check(s)
    if s.dry_run:
        return dry_run(s)
    run = Run(s)
    rows = load_rows(s)
    device = model.pick_device(s.device)
    dtype = model.pick_dtype(s.dtype, device)
    full = s.method == "full"
    base = pretrain_tiny(s, device) if s.init == "tiny" else s.init
    if s.shard:  # starts are made on the CPU, where torchrun gives every rank one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    net, tok = model.load(base, torch.float32 if full else dtype, "cpu" if s.shard else device)
    if net.config.family != "llama":
        raise ValueError(f"--init={s.init} is a {net.config.family} model; train_nlu.py tunes those")
    train, held_out = encode_examples(s, net, tok, *rows)
    lengths = [len(prompt) + len(answer) for prompt, answer in train]
    batches_per_epoch = math.ceil(len(train) / s.batch_size)
    max_iters = s.max_iters or max(1, round(s.epochs * batches_per_epoch))
    budget = balora.budget_steps(max_iters, s.options) if s.method == "adalora" else None

    # The network, its teacher, the optimizer.
    start = run.checkpoint(net)
    state = start["net"] if start else None
    teacher = net
    if full:  # every weight moves, so the teacher has to be a copy
        net.autocast = dtype if dtype != torch.float32 else None
        teacher = copy.deepcopy(net).requires_grad_(False) if s.lambda1 else None
    report = attach(s, net, state, train, row_loss)
    net.checkpointing = s.checkpointing
    if s.compile:
        net.compile_blocks()
        balora.token_terms = torch.compile(balora.token_terms)
    if s.shard:
        shard(net, device)
    more = dict(trainable=report.trainable, notes=report.notes, tokens=sum(lengths))
    step = run.begin(net, start, base, device, **more)
    R = None if full else balora.head_factor(net.head)  # [d, d]: H Rᵀ has the singular values of Z
    net.train()
    print(f"{max_iters} steps of {s.batch_size} sequences, {s.micro_batch} at a time -> {s.out_dir}")

    def evaluate():
        record = dict(step=step, **measure(net, held_out, s.micro_batch, s.K, s.k, teacher))
        if s.eval_generate:
            record["exact_match"] = exact_match(net, tok, held_out[: s.eval_generate], s.max_new)
        run.add_evaluation(record)

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
        M = sum(len(train[i][1]) for i in rows)  # positions that predict a response token
        lr = s.learning_rate * balora.lr_schedule(step, max_iters, s.warmup)
        lambdas = (s.lambda1 * s.teacher_every, s.lambda2, s.lambda3)
        if s.schedule:
            lambdas = balora.lambda_schedule(step, max_iters, lambdas)
        taught = s.lambda1 > 0 and step % s.teacher_every == 0

        # Forward and backward, one micro-batch at a time.
        terms = dict.fromkeys(("task", "cr", "dr", "svdr"))
        for part, weight in own_parts(rows, s.micro_batch):
            ids, valid, y = collate([train[i] for i in part], device)  # [B, L], [B, L], [m]
            H_P = E_P = None
            if taught:
                with balora.teacher(teacher):
                    H_P = teacher.hidden(ids)[valid]  # [m, d], m of the step's M positions
                    E_P = teacher.head  # [V, d]: Z_P = H_P E_Pᵀ
            H_F = net.hidden(ids)[valid]  # [m, d]
            run.check_finite(step, lr, H_F.detach())
            total, values = balora.loss_nlg(
                H_F, y, net.head, H_P, R, E_P, lambdas, s.T, s.K, s.k, label_smoothing=s.label_smoothing
            )
            share = weight * len(y) / M
            run.scaler.scale(share * total).backward()
            accumulate(terms, values, share)

        norm = update(s, run, net, terms, step, max_iters, lr, budget)
        step += 1

        tokens = sum(lengths[i] for i in rows)
        run.log(step, max_iters, terms, lambdas, norm, lr, tokens, clock)
        due = step % s.eval_interval == 0 or step == max_iters
        if due:
            evaluate()
        if due or run.stopping:
            run.save(step, net)
    finish(s, run, net)
    for prompt, reference in held_out[: 0 if s.shard else 3]:  # with --shard each token moves the blocks
        answer = net.generate([prompt], s.max_new)[0]
        print(f"\n{tok.decode(prompt).strip()}\n  -> {tok.decode(answer).strip()}")
        print(f"  reference: {tok.decode(reference[:-1]).strip()}")
    print(f"\nloss figure: {run.path('loss.png')}")


if __name__ == "__main__":
    run_main(main)
