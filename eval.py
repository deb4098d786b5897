"""Everything about a run that is not its loop: settings, device, run folder, rows and prompts, metrics, benchmarks, figures.

    python eval.py sample --run=out/x --prompt="What is 17 + 25?"      # write with a tuned model (--init=NAME: an untuned one)
    python eval.py gsm8k  --run=out/x --data=openai/gsm8k:test         # exact match with a 95 % interval (--loose: equal as numbers)
    python eval.py math   --run=out/x                                  # MATH by the published string rule (--loose: equal as mathematics)
    python eval.py humaneval --run=out/x --execute                     # pass@1; mbpp alike. Only --execute runs what the model wrote, in a sandbox
    python eval.py mtbench --run=out/x --data=question.jsonl           # two-turn answers in FastChat's format, for its judge or for ours:
    python eval.py judge  --run=out/x --data=question.jsonl --judge_prompts=judge_prompts.jsonl --references=gpt-4.jsonl --judge_url=URL --judge_model=NAME
    python eval.py loss   --run=out/x --data=path/to/rows.jsonl        # loss, drift, diversity, spectrum
    python eval.py curves out/a out/b --out=curves.png                 # the poster's "optimization dynamics"
    python eval.py features out/a out/b --out=features.png             # classifiers: last-layer features under t-SNE
    python eval.py table out/* --poster                                # methods x benchmarks, mean ± deviation over seeds
    python eval.py ablation nlu --seeds=0,1,2 -- OPTIONS               # the poster's, with controls; noise, sensitivity, efficiency alike
    python eval.py compare nlu --methods=lora,pissa --sweep_lr=3e-4,1e-3 --seeds=0,1,2 -- --init=minilm --task=rte
    python eval.py merge  --run=out/x --out=folder                     # a Hugging Face folder with the adapter folded in
    python eval.py bench  --init=smollm2-135m                          # speed and memory beside peft and the authors' formulation

The sections stand on their own: settings - device - run folder - a step - rows and prompts - metrics - figures - sandbox - benchmarks - comparisons -
tables - speed - commands.
"""

import argparse
import ast
import cmath
import concurrent.futures
import dataclasses
import email.utils
import fractions
import glob
import gzip
import hashlib
import http.client
import inspect
import json
import math
import operator
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import balora
import model


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is the settings block, the comment behind a field is its help text


def parse(cls, argv, presets=None, by=None, only=None, positional=None):
    """Command line -> an instance of the settings dataclass `cls`.

    --name=value and --name value; a bool is --name, --name=false or --no-name. presets[value of field `by`] replaces defaults (of several fields: in
    their order), the command line wins. only: the fields that this command reads. positional: the field that takes words without a name.
    Raises ValueError with the nearest name for an unknown option, and with the expected type for a wrong value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if only is None or f.name in only}
    parser = Parser(
        description=cls.__doc__,
        add_help=True,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields.values():
        note = f"{notes(cls).get(f.name, '')} (default: {f.default})".replace("%", "%%")
        kind = next(
            t
            for t in (f.type.__args__ if isinstance(f.type, types.UnionType) else [f.type])
            if t is not types.NoneType
        )
        if f.name == positional:
            parser.add_argument(f.name, nargs="*", default=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(
                f"--{f.name}",
                nargs="?",
                const=True,
                type=truth,
                default=argparse.SUPPRESS,
                metavar="true|false",
                help=note,
            )
            parser.add_argument(
                f"--no-{f.name}",
                dest=f.name,
                action="store_false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        else:
            parser.add_argument(
                f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=kind.__name__, help=note
            )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        raise ValueError(f"unknown option {unknown[0]}: {balora.nearest(name, fields)}--help lists them all")
    given = vars(given)
    preset = {}
    for name in (by,) if isinstance(by, str) else by or ():
        preset |= presets.get(given.get(name, preset.get(name, getattr(cls, name))), {})
    return cls(**{**preset, **given})


def in_range(settings, rules):
    """rules: (test, names of fields). A value that fails its test, or is not finite, is an error that quotes the field's note; None passes."""
    for test, names in rules:
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not (test(value) and value < float("inf")):
                raise ValueError(f"--{name}={value} is out of range: {notes(type(settings))[name]}")


LAMBDAS = {"nlg": (0.025, 0.005, 0.005), "nlu": (0.15, 0.03, 0.03)}  # the paper's λ1, λ2, λ3


READERS = {  # options that only some methods read (correct_B, calibration_data: refused elsewhere)
    "lora_plus_ratio": ("lora+",),
    "gamma": ("lora-ga",),
    "calibration": ("lora-ga", "corda", "corda++"),
    "keep": ("corda", "corda++"),
    "rounds": ("corda++",),
    **dict.fromkeys(("adalora_first", "adalora_last", "adalora_every", "orthogonality"), ("adalora",)),
}


def check_method(s, paper_lambdas):
    """What both scripts check of --method and its options; fills in λ1, λ2, λ3: the paper's where they belong to the method, 0 elsewhere."""
    if s.method not in balora.METHODS:
        raise ValueError(
            f"--method={s.method}: {balora.nearest(s.method, balora.METHODS)}known: {', '.join(balora.METHODS)}"
        )
    for name, value in zip(("lambda1", "lambda2", "lambda3"), paper_lambdas):
        if getattr(s, name) is None:
            setattr(s, name, value if balora.METHODS[s.method].regularized else 0.0)
    if s.keep not in ("first", "last"):
        raise ValueError(f"--keep={s.keep}: expected first (IPM) or last (KPM)")
    if s.correct_B and s.method != "lora-fa":
        raise ValueError(
            f"--correct_B with --method={s.method}: it is the second version of lora-fa; leave it out"
        )
    given = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
    for name in ("pretrain_noise", "pretrain_iters"):
        if name in given and s.init != "tiny":
            raise ValueError(
                f"--{name}={given[name]} with --init={s.init}: only tiny is pre-trained here; leave it out"
            )
    if idle := [
        f"--{name}={given[name]}"
        for name, methods in READERS.items()
        if name in given and s.method not in methods
    ]:
        print(f"{s.method} does not read {', '.join(idle)}")


@lru_cache
def notes(cls):
    """The comment behind each field of a settings dataclass."""
    return dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(cls), re.M))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def run_main(main):
    """Run a script's main(argv). What a user caused ends in one line and exit code 2; a bug of ours keeps its traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        here = os.path.dirname(os.path.abspath(__file__))
        origin = traceback.extract_tb(e.__traceback__)[-1].filename
        if isinstance(e, ValueError) and os.path.dirname(os.path.abspath(origin)) != here:
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was (training: add --resume)", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, memory


def pick_device(device):
    """ "auto" -> CUDA, then MPS, then CPU; a device that is not here is an error."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    kind, _, index = device.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in here or not (index or "0").isdigit() or int(index or 0) >= here[kind]:
        raise ValueError(
            f"--device={device}: this PyTorch has "
            + ", ".join(f"{n} {name}" for name, n in here.items() if n)
            + "; use auto, cpu, cuda, cuda:N or mps"
        )
    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))  # memory figures and names then mean this one
    return device


def pick_dtype(dtype, device):
    """ "auto" -> bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if dtype == "auto":
        return (
            torch.bfloat16
            if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"--dtype={dtype}: expected auto, float32 or bfloat16 (float16 needs loss scaling, which this loop does not do)"
        )
    return getattr(torch, dtype)


def peak_memory(device):
    """Peak memory so far in GiB: allocated on the CUDA device, otherwise resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):  # ru_maxrss would start at the parent process's peak
        return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: config.json, log.jsonl, eval.json, checkpoint.pt, adapter/, loss.png

FREE = ("resume", "overwrite", "out_dir", "dry_run")  # settings that do not make another run


def write_json(path, record):
    balora.write_atomic(path, lambda f: f.write(json.dumps(record, indent=1, ensure_ascii=False).encode()))


OURS = ("log.jsonl", "eval.json", "checkpoint.pt", "features.npz", "loss.png", "adapter", "model")


def check_run(settings):
    """Before anything slow: may this run use settings.out_dir? -> its config.json if --resume continues it, or None."""
    out, path = settings.out_dir, os.path.join(settings.out_dir, "config.json")
    if not os.path.exists(path):
        taken = [name for name in OURS if os.path.exists(os.path.join(out, name))]
        if taken:
            raise ValueError(
                f"--out_dir={out} holds {', '.join(taken)} but no config.json of a run; choose another --out_dir"
            )
        return None
    try:
        old = read_run(out)
    except ValueError:
        raise ValueError(f"{path} is not a run's config.json; choose another --out_dir") from None
    changed = "; ".join(
        [
            f"{k} ({old['settings'].get(k)} there, {v} here)"
            for k, v in dataclasses.asdict(settings).items()
            if k not in FREE and old["settings"].get(k) != v
        ][:3]
    )
    if settings.resume and changed:
        raise ValueError(f"--resume: {out} was run with other settings: {changed}")
    if not (settings.resume or settings.overwrite):
        raise ValueError(
            f"{out} holds "
            + (
                f"another run: {changed}. Choose another --out_dir, or"
                if changed
                else "a run of these settings: --resume goes on with it,"
            )
            + " --overwrite starts it anew"
        )
    return old if settings.resume else None


def last_checkpoint(settings, net):
    """-> the checkpoint that --resume goes on from, or None. Raises ValueError where it belongs to other weights."""
    out, old = settings.out_dir, check_run(settings)
    if old and old["weights_hash"] != net.weights_hash:
        raise ValueError(
            f"--resume: {out} was run on weights {old['weights_hash']} ({old['source']}), these are {net.weights_hash} ({net.source})"
        )
    start = load_checkpoint(out, net.weights_hash) if settings.resume else None
    if settings.resume and start is None:
        print(f"--resume: {out} has no checkpoint yet, starting at step 0")
    return start


def open_run(settings, net, device, base, start, **more):
    """Make settings.out_dir and its config.json (`more` goes in too), once everything else about the run has been checked. start: its `last_checkpoint`."""
    out = settings.out_dir
    shapes = lambda tensors: {name: t.shape for name, t in tensors.items()}
    if start and shapes(start["net"]) != shapes(trained_state(net)):
        raise ValueError(
            f"--resume: the checkpoint in {out} is of another model or adapter; it does not belong to this run"
        )
    if not settings.resume:
        answers = glob.glob(
            os.path.join(glob.escape(out), "*.jsonl")
        )  # benchmarks' files are those of the run that was
        for victim in (
            *(os.path.join(out, name) for name in OURS),
            *answers,
        ):  # there only where check_run allowed --overwrite
            shutil.rmtree(victim) if os.path.isdir(victim) else os.path.exists(victim) and os.remove(victim)
    os.makedirs(out, exist_ok=True)
    session = dict(
        device=device_name(device),
        versions={"python": platform.python_version(), "torch": torch.__version__},
        commit=git_commit(),
        argv=sys.argv,
    )
    if start:  # the record of the start stays, later sessions stand in it
        record = read_run(out)
        record["resumed"] = [*record.get("resumed", []), dict(session, step=start["step"])]
    else:
        record = dict(
            settings=dataclasses.asdict(settings),
            source=net.source,
            base=os.path.abspath(base) if os.path.exists(base) else base,
            weights_hash=net.weights_hash,
            **session,
            **more,
        )
    write_json(os.path.join(out, "config.json"), record)
    cut(out, start["step"] if start else -1)


def cut(out, step):
    """Forget what came after `step` in log.jsonl and eval.json, and a line that a kill cut off."""
    path, kept = os.path.join(out, "log.jsonl"), []
    if os.path.exists(path):
        for line in open(path, encoding="utf-8"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= step:
                kept.append(line)
        balora.write_atomic(path, lambda f: f.write("".join(kept).encode()))
    path = os.path.join(out, "eval.json")
    if os.path.exists(path):
        write_json(path, [r for r in read_json(path) if r["step"] <= step])


def add_evaluation(out, record):
    path = os.path.join(out, "eval.json")
    write_json(path, (read_json(path) if os.path.exists(path) else []) + [record])


def append(path, record):
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def whole_lines(path, mend=False):
    """Records of a .jsonl file that grows line by line, without a last line that a kill cut off; [] where there is none. mend: take that line out of the file too.

    Raises ValueError: other lines that are no objects.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        data = f.read()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: damaged ({e}); move it away, and its items are done anew") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path}: holds other lines than records; move it away")
    if mend and whole != data:
        balora.write_atomic(path, lambda f: f.write(whole))
    return lines


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is that the folder of a run?") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def read_run(run):
    """config.json of a run folder. Raises ValueError where it is something else's, such as a model's."""
    record = read_json(os.path.join(run, "config.json"))
    if not isinstance(record, dict) or not {"settings", "weights_hash"} <= record.keys():
        raise ValueError(f"{run} is not the folder of a run; a model's folder is given as --init={run}")
    return record


def trained_state(net):
    """What training changes, and A0, B0, which are never computed twice."""
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    return {name: t for name, t in net.state_dict().items() if name not in frozen}


def save_checkpoint(out, step, net, optimizer, **more):
    state = dict(
        more,
        step=step,
        weights_hash=net.weights_hash,
        net=trained_state(net),
        optimizer=optimizer.state_dict(),
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    )
    balora.write_atomic(os.path.join(out, "checkpoint.pt"), lambda f: torch.save(state, f))


def load_checkpoint(out, weights_hash):
    """-> the checkpoint of a run on these weights, or None. Raises ValueError where it is broken or another model's."""
    path = os.path.join(out, "checkpoint.pt")
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}); is it whole?") from None
    if state["weights_hash"] != weights_hash:
        raise ValueError(f"{path}: a checkpoint of another model or adapter; it does not belong to this run")
    return state


def restore(start, net, optimizer):
    """Put a checkpoint back. -> the step to go on with."""
    net.load_state_dict(start["net"], strict=False)
    optimizer.load_state_dict(start["optimizer"])
    torch.set_rng_state(start["rng"])
    if start["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(start["cuda_rng"])
    return start["step"]


def load_run(run, init, dtype, device):
    """-> (net, tok, settings or {}): the tuned model of a run folder, or the untuned one that `init` names."""
    if bool(run) == bool(init):
        raise ValueError("give either --run=FOLDER (a tuned model) or --init=NAME (an untuned one)")
    if not run:
        net, tok = model.load(init, dtype=dtype, device=device)
        return net, tok, {}
    record = read_run(run)
    settings = record["settings"]
    whole = os.path.join(run, "model")
    if "task" in settings:
        raise ValueError(
            f"{run} is a classifier ({settings['task']}); this command is for language models, `python eval.py features` for those"
        )
    net, tok = model.load(whole if os.path.isdir(whole) else record["base"], dtype=dtype, device=device)
    if not os.path.isdir(whole):
        if net.weights_hash != record["weights_hash"]:
            raise ValueError(
                f"{run} was tuned on weights {record['weights_hash']} ({record['source']}), these are {net.weights_hash} ({net.source})"
            )
        layers = balora.load_adapter(net, os.path.join(run, "adapter"))
        print(f"{run}: {settings['method']} adapter on {layers} layers")
    return net, tok, settings


def git_commit():
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here
        ).stdout.strip()
    except OSError:
        return ""


def device_name(device):
    return (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{device}, {torch.get_num_threads()} threads"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What both loops do alike: attach, AdamW, a step's checks, its record, its line


def attach(s, net, start=None, calibration=None, frozen_copy=False):
    """`balora.attach` with a script's settings. start: the checkpoint to go on from; calibration(): makes what measures gradients or covariances, where the method needs it."""
    calibrate = calibration() if balora.METHODS[s.method].needs and calibration and not start else None
    return balora.attach(
        net,
        s.method,
        s.r,
        s.alpha,
        s.targets.split(",") if s.targets else None,
        s.seed,
        s.niter,
        s.oversample,
        frozen_copy,
        progress=calibration is not None,
        calibrate=calibrate,
        rounds=s.rounds,
        keep=s.keep,
        gamma=s.gamma,
        correct_B=s.correct_B,
        start=start and start["net"],
    )


def optimizer(s, named, device):
    """AdamW over {name: trainable tensor}; the loop sets the rate of each group. LoRA-FA's second version takes the ε of its authors."""
    groups = balora.param_groups(named, s.method, s.lora_plus_ratio, s.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        eps=1e-6 if s.correct_B else 1e-8,
        fused=device.startswith("cuda") if s.fused is None else s.fused,
    )


def diverged(step, lr, settings):
    kept = os.path.exists(os.path.join(settings.out_dir, "checkpoint.pt"))
    return f"step {step}: the loss or its gradient is not finite; lower --learning_rate (here {lr:.2g})" + (
        ", the last checkpoint is kept" if kept else ""
    )


def check_step(step, terms, norm, unmoved, named, lr, settings):
    """Stop where the loss or the gradient norm is not finite, or where, after three steps, a tensor of the set `unmoved` has had no gradient yet."""
    if not (abs(terms["task"]) < float("inf") and norm < float("inf")):
        raise ValueError(diverged(step, lr, settings))
    unmoved -= {name for name in unmoved if named[name].grad is not None and named[name].grad.any()}
    if step == 2 and unmoved and settings.learning_rate:
        raise ValueError(
            f"no gradient in the first three steps for {len(unmoved)} of {len(named)} tensors: {', '.join(sorted(unmoved)[:3])}"
        )


def adalora_cuts(settings, max_iters, published=None):
    """-> AdaLoRA's steps at the first budget, at the last one, between cuts; checked against the run's length before anything trains.

    published: a longer run's; they count where they fit, and shares of the run otherwise. What the user gave counts in any case.
    """
    shares = [max(1, round(share * max_iters)) for share in (0.1, 0.3, 0.01)]
    default = published if published and published[0] + published[1] < max_iters else shares
    cuts = [
        d if given is None else given
        for given, d in zip((settings.adalora_first, settings.adalora_last, settings.adalora_every), default)
    ]
    if settings.method == "adalora":
        balora.check_budget(max_iters, *cuts)
        print("adalora: {} steps at the first budget, {} at the last, a cut every {}".format(*cuts))
    return cuts


def adapter_memory(net, settings, width):
    """For a dry run: bytes of what an adapter holds and does not train, and of LoRA-GA's gradients or CorDA's covariances, measured before a group of layers at a time."""
    layers = balora.adapted_layers(net).values()
    fixed = sum(
        t.numel() * (width if name in ("A0", "B0") else 4)
        for layer in layers
        for name, t in layer.named_buffers(recurse=False)
    )
    needs, rounds = (
        balora.METHODS[settings.method].needs,
        settings.rounds if settings.method == "corda++" else 1,
    )
    sizes = [rounds * balora.statistic_size(m, needs) for m in layers] if needs else [0]
    return fixed, max(max(sizes), min(sum(sizes), balora.GROUP))


def log_step(out, step, terms, lambdas, norm, lr, tokens, seconds, device):
    """Append a step's record to log.jsonl: raw and weighted terms, weights, gradient norm, learning rate, speed, peak memory. -> the record."""
    terms = {
        name: value.item() if isinstance(value, torch.Tensor) else value for name, value in terms.items()
    }
    names = ("cr", "dr", "svdr")
    weighted = {
        f"{name}_weighted": None if terms[name] is None else w * terms[name]
        for name, w in zip(names, lambdas)
    }
    record = dict(
        step=step,
        **terms,
        **weighted,
        **dict(zip(("lambda1", "lambda2", "lambda3"), lambdas)),
        grad_norm=norm,
        lr=lr,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        peak_GiB=peak_memory(device),
    )
    append(os.path.join(out, "log.jsonl"), record)
    return record


def progress_line(record, max_iters):
    """One line: step, each term raw (and weighted), gradient norm, learning rate, speed, what is left."""
    terms = [f"task {record['task']:.4f}"]
    for name in ("cr", "dr", "svdr"):
        if record[name] is not None:
            terms.append(f"{name} {record[name]:.4f} ({record[f'{name}_weighted']:.5f})")
    if "orth" in record:
        terms.append(f"orth {record['orth']:.3f} | budget {record['budget']} (kept {record['kept']})")
    left = (max_iters - record["step"]) * record["seconds"]
    return (
        f"step {record['step']:>5}/{max_iters} | "
        + " | ".join(terms)
        + (
            f" | grad {record['grad_norm']:.3f} | lr {record['lr']:.2e} | {record['tokens_per_s']:,.0f} tok/s | {record['peak_GiB']:.2f} GiB | ETA {left / 60:.0f} min"
        )
    )


def memory_table(report, tokens, parts, before):
    """Print a dry run: what attach matched, tokens a step, and bytes by part in GiB; `before`: what stands beside the weights before training, and is gone then."""
    print(f"{report}\n{tokens}\nmemory, estimated (GiB)")
    for name, size in [
        *parts.items(),
        ("together", sum(parts.values())),
        ("before training: what the initialisation measures", before),
    ]:
        if size:
            print(f"  {name:<58}{size / 2**30:8.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and prompts: what training and benchmarks read alike

TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
    "plain": "{instruction}\n",
}
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_FIELDS = ("instruction", "query", "question", "human", "prompt", "problem")
RESPONSE_FIELDS = ("output", "response", "solution", "answer", "assistant", "completion")


def read_rows(data, prompt_field="", response_field="", limit=0):
    """A .json, .jsonl, .parquet or .csv file, or a hub data set name[:split] -> list of (instruction, input, response).

    Fields are recognised by the names above unless given. Raises ValueError: unreadable, empty, a field that is not there.
    """
    table = read_table(data)
    names = table.column_names
    pick = lambda given, known: given if given else next((n for n in known if n in names), None)
    question, answer = pick(prompt_field, PROMPT_FIELDS), pick(response_field, RESPONSE_FIELDS)
    missing = [
        f"--{what}_field={f or '?'}"
        for what, f in (("prompt", question), ("response", answer))
        if f not in names
    ]
    if missing:
        raise ValueError(f"{data}: no field for {' and '.join(missing)}; its fields are {', '.join(names)}")
    if not len(table):
        raise ValueError(f"{data}: no rows")
    table = table.select(range(min(limit or len(table), len(table))))
    inputs = table["input"] if "input" in names and question == "instruction" else [""] * len(table)
    text = lambda value: "" if value is None else str(value)
    return [
        (text(q), text(i), clean_answer(text(a))) for q, i, a in zip(table[question], inputs, table[answer])
    ]


def read_table(data, option="--data"):
    """A file or a hub data set -> datasets.Dataset. option: what to call `data` in an error."""
    import datasets

    datasets.disable_progress_bars()
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}.get(
        os.path.splitext(data.removesuffix(".gz"))[1]
    )
    if os.path.exists(data) or kind:
        if kind is None or not os.path.isfile(data):
            raise ValueError(
                f"{option}={data}: expected an existing .json, .jsonl (also .gz), .parquet or .csv file, or a data set of the hub"
            )
        if os.path.getsize(data) == 0:
            raise ValueError(f"{data}: the file is empty")
        if kind == "json":
            check_json(data)
        try:
            return datasets.load_dataset(kind, data_files=data, split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError) as e:
            raise ValueError(f"{data}: cannot be read as {kind} ({e.__cause__ or e})") from None
    name, _, split = data.partition(":")
    try:
        try:
            return datasets.load_dataset(name, split=split or "train")
        except ValueError as e:
            if "Config name is missing" not in str(e):
                raise
            whole = (
                "full" if "'full'" in str(e) else "main"
            )  # mbpp's two forms: full, sanitized; gsm8k's: main, socratic
            return datasets.load_dataset(name, whole, split=split or "train")
    except Exception as e:  # hub, network and name errors alike
        raise ValueError(
            f"{option}={data}: neither a file here nor a data set that the hub gave ({model.why(e)}); "
            "download it elsewhere and give the file"
        ) from None


def check_json(path):
    """Name the line of a .jsonl file that is not a JSON object, or where a .json file breaks off."""
    whole = path.removesuffix(".gz").endswith(".json")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        try:
            if whole:
                json.load(f)
                return
            for number, line in enumerate(f, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
        except json.JSONDecodeError as e:
            line = e.lineno if whole else number
            raise ValueError(f"{path}, line {line}: not JSON ({e.msg})") from None
        except (EOFError, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}: not a whole .gz file ({e})") from None


def clean_answer(text):
    """GSM8K's "<<48/2=24>>" go, and a last line "#### 1,234" becomes "The answer is: 1234", which is what `extract_answer` reads."""
    final = lambda m: "The answer is: " + m[1].replace(",", "")
    return re.sub(r"(?m)^####\s*([-+$]?[\d.,/]+)\s*\Z", final, re.sub(r"<<[\d+\-*/().=]*>>", "", text))


def fill(template, instruction, given=""):
    """The prompt of a row. template: a name in TEMPLATES, or text with {instruction}."""
    text = TEMPLATES.get(template, template)
    if "{instruction}" not in text:
        raise ValueError(
            f"--template={template}: expected {', '.join(TEMPLATES)}, or text with {{instruction}} in it"
        )
    if given:
        return (
            ALPACA_INPUT.replace("{instruction}", instruction).replace("{input}", given)
            if template == "alpaca"
            else text.replace("{instruction}", f"{instruction}\n{given}")
        )
    return text.replace("{instruction}", instruction)


def next_turn(template, said, instruction):
    """The prompt that goes on with a conversation: what was `said` (the last prompt and its answer), a blank line, the template again.

    Of the template, what stands after the last blank line before {instruction}: Alpaca's opening sentences are said once, its headings every turn.
    """
    head, slot, tail = TEMPLATES.get(template, template).partition("{instruction}")
    return f"{said}\n\n" + (head.rpartition("\n\n")[2] + slot + tail).replace(slot, instruction)


def encode_rows(rows, tok, template, max_len):
    """-> list of (prompt ids, response ids with EOS), a line on what was dropped.

    Prompt and response are tokenised apart and joined, so the boundary is exact. Rows without a response, or longer than
    max_len tokens, are dropped and counted. Raises ValueError where nothing is left.
    """
    frame = len(tok.bos + tok.encode(fill(template, "")))
    if max_len and frame + 1 >= max_len:
        raise ValueError(f"--max_len={max_len}: the {template} template alone takes {frame} tokens")
    kept, empty, long = [], 0, 0
    for instruction, given, response in tqdm(rows, desc="tokenise", unit="row", disable=len(rows) < 5000):
        prompt, answer = (
            tok.bos + tok.encode(fill(template, instruction, given)),
            tok.encode(response) + [tok.eos],
        )
        if not response.strip():
            empty += 1
        elif max_len and len(prompt) + len(answer) > max_len:
            long += 1
        else:
            kept.append((prompt, answer))
    line = (
        f"{len(rows):,} rows read, {len(kept):,} kept"
        + (f", {long:,} dropped: longer than {max_len} tokens" if long else "")
        + (f", {empty:,} dropped: no response" if empty else "")
    )
    if not kept:
        raise ValueError(f"no row is left to use: {line}")
    return kept, line


def collate(examples, device):
    """-> ids [B, L] padded on the right, valid [B, L], y [M]: position t is valid, and y its target, where token t+1 is of the response.

    Masks come from lengths, never from ids, so a pad id that is also the EOS hides nothing.
    """
    L = max(len(p) + len(a) for p, a in examples)
    ids = torch.tensor([p + a + [0] * (L - len(p) - len(a)) for p, a in examples])
    valid = torch.tensor([[len(p) - 1 <= t < len(p) + len(a) - 1 for t in range(L)] for p, a in examples])
    y = ids[:, 1:][valid[:, :-1]]
    if len(y) == 0:
        raise ValueError("a batch without a single labelled token; is every response empty?")
    return ids.to(device), valid.to(device), y.to(device)


def draw(n, k, seed):
    """k of n indices without repetition, as often as n allows, then again from the start, which is said."""
    rng, out = random.Random(seed), []
    if k > n:
        print(f"calibration: {k} rows are wanted and {n} are there, so some are read more than once")
    while len(out) < k:
        out += rng.sample(range(n), min(n, k - len(out)))
    return out


def windows(data, tok, n, length, seed):
    """n of the windows of `length` tokens of a text, as examples that respond to their first token: the rows of a file or hub data set, joined by blank lines.

    The text is in the field `text`, or where an instruction stands (CorDA's KPM reads NQ-open's questions so).
    """
    table = read_table(data, "--calibration_data")
    field = next((f for f in ("text", *PROMPT_FIELDS) if f in table.column_names), None)
    if field is None:
        raise ValueError(
            f"{data}: no field text, {', '.join(PROMPT_FIELDS)}; its fields are {', '.join(table.column_names)}"
        )
    ids = tok.encode("\n\n".join(str(text) for text in table[field]))
    if len(ids) <= length:
        raise ValueError(
            f"{data}: {len(ids)} tokens of text, and a single window takes {length}; give more text or a smaller --max_len"
        )
    starts = [length * i for i in draw(len(ids) // length, n, f"windows {seed}")]
    return [(ids[start : start + 1], ids[start + 1 : start + length]) for start in starts]


def batch_order(lengths, batch_size, rng):
    """The batches of one epoch, each a list of indices of similar length: shuffle, sort within windows of 50 batches, cut, shuffle the batches."""
    order = rng.sample(range(len(lengths)), len(lengths))
    window, batches = 50 * batch_size, []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def batches_by_length(examples, size):
    """Indices of `examples`, longest first, `size` at a time: little padding, and the first batch is the largest."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]) - len(examples[i][1]))
    return [order[i : i + size] for i in range(0, len(order), size)]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

PASSAGE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had \
peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the use of a book," thought Alice \
"without pictures or conversations?" So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and \
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White \
Rabbit with pink eyes ran close by her."""  # L. Carroll, Alice's Adventures in Wonderland (1865), public domain


@torch.no_grad()
def measure(net, tok, examples, batch_size, K, k, device, drift=True, chunk=128):
    """The paper's three concerns, on held-out rows. -> dict:

    loss: nats a response token. drift: mean KL(P_P ‖ P_F) at T = 1, nats a token (None where there is no teacher); passage_ppl:
    perplexity of PASSAGE. diversity: mean entropy of the renormalised top K, nats. spectrum: mean over batches of Σ_{i≤k} σ_i / Σ σ_j of Z.
    """
    E, R = net.head, balora.head_factor(net.head)
    total, shares = dict(loss=0.0, drift=0.0, diversity=0.0), []
    with balora.evaluating(net):
        for rows in tqdm(
            batches_by_length(examples, batch_size), desc="evaluate", unit="batch", leave=False, disable=None
        ):
            ids, valid, y = collate([examples[i] for i in rows], device)
            H_F, H_P = net.hidden(ids)[valid], None
            if drift:
                with balora.teacher(net):
                    H_P = net.hidden(ids)[valid]
            if not H_F.isfinite().all():
                raise ValueError("evaluation: the hidden states are not finite; lower --learning_rate")
            for part in (slice(a, a + chunk) for a in range(0, len(y), chunk)):
                Z_F = balora.logits(H_F[part], E)
                total["loss"] += F.cross_entropy(Z_F, y[part], reduction="sum").item()
                total["diversity"] -= balora.dr_nlg(Z_F, K).item() * len(Z_F)
                if drift:
                    total["drift"] += balora.cr_nlg(balora.logits(H_P[part], E), Z_F, T=1.0).item() * len(Z_F)
            sigma = torch.linalg.svdvals(F.linear(H_F.float(), R).to("cpu" if device == "mps" else device))
            shares.append((sigma[:k].sum() / sigma.sum()).item())
        ids = torch.tensor([tok.bos + tok.encode(PASSAGE)], device=device)
        passage_ppl = F.cross_entropy(net(ids)[0, :-1].double(), ids[0, 1:]).exp().item()
    M = sum(len(a) for _, a in examples)
    out = {name: value / M for name, value in total.items()} | {
        "spectrum": statistics.mean(shares),
        "passage_ppl": passage_ppl,
    }
    if not drift:
        out["drift"] = None
    return out


def write_answers(
    net, prompts, max_new, batch_size, eos, desc="generate", done=None, temperature=0.0, top_p=1.0, seed=0
):
    """Continuations (greedy at temperature 0) of `prompts`, lists of ids, batch_size at a time -> list of id lists. done(i, ids) is called as each ends.

    A prompt that leaves no room in the model's context is answered by nothing.
    """
    limits, out = [min(max_new, net.config.max_len - len(p)) for p in prompts], [[] for _ in prompts]
    able = [i for i, limit in enumerate(limits) if limit > 0]
    with tqdm(total=len(prompts), desc=desc, unit="answer", leave=False, disable=None) as bar:

        def ended(i, ids):
            out[i] = ids
            bar.update()
            if done:
                done(i, ids)

        for i, limit in enumerate(limits):
            if limit <= 0:
                ended(i, [])
        net.generate(
            [prompts[i] for i in able],
            [limits[i] for i in able],
            temperature,
            top_p,
            eos,
            seed,
            batch_size,
            lambda j, ids: ended(able[j], ids),
        )
    return out


def distinct(sequences, n):
    """distinct-n: different n-grams / n-grams over all sequences (Li et al. 2016). 0 where there is none."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def extract_answer(text):
    """The number after the last "The answer is: ", rounded to int, or None (METHODS 6.2: the rule of PiSSA, CorDA and BA-LoRA).

    At most one of . , / joins two runs of digits, so "1,234,567" reads 1234 and "2 1/2" reads 2, as in their code.
    """
    head, mark, tail = text.rpartition("The answer is: ")
    found = re.search(r"[-+]?\d*[.,/]?\d+", tail) if mark else None
    if not found:
        return None
    number = found.group().replace(",", "")
    try:
        return round(fractions.Fraction(number)) if "/" in number else round(float(number))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def exact_number(text):
    """The number after the last "The answer is: " as a Fraction, not rounded, or None: "1,234,567", "2 1/2", "-7/2", "$3.50" are read whole."""
    head, mark, tail = text.rpartition("The answer is: ")
    found = (
        re.search(
            r"([-+]?)\s?\$?\s?(?:(\d+) (?=\d+/\d))?(\d*\.?\d+)(?:/(\d+))?",
            re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", tail),
            re.A,
        )
        if mark
        else None
    )
    if not found or found[4] and not int(found[4]):
        return None
    number = int(found[2] or 0) + fractions.Fraction(found[3]) / int(found[4] or 1)
    return -number if found[1] == "-" else number


def boxed(text):
    r"""The content of the last \boxed{...} of a MATH solution (of the last \fbox{...} where there is none; `\boxed 5` runs to the next $), or None."""
    head, mark, rest = text.rpartition("\\boxed" if "\\boxed" in text else "\\fbox")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() if mark else None
    depth = 0
    for i, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]
    return None


def extract_math(text):
    """What stands after the last "The answer is: ", up to the first ".\\n" and without a last period, or None where the phrase is missing (METHODS 6.3)."""
    head, mark, tail = text.rpartition("The answer is: ")
    return tail.split(".\n")[0].strip().removesuffix(".").strip() if mark else None


def normalise(answer):
    r"""The form in which MATH answers are compared as strings (Hendrycks et al. 2021, METHODS 6.3).

    Gone: line breaks, \!, doubled backslashes, \left \right, degrees, \$, \%, spaces, units from `\text{ ` on, one or two letters before a single "=".
    Rewritten: tfrac dfrac -> frac, \frac12 -> \frac{1}{2}, \sqrt3 -> \sqrt{3}, integers a/b -> \frac{a}{b}, .5 -> 0.5, and exactly 0.5 -> \frac{1}{2}.
    Where the published code gives up and compares the raw strings, this one goes on: a second `\text{ `, an a/b of other than integers, less behind a \frac
    or \sqrt than it takes.
    """
    s = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    s = re.sub(r"[td]frac", "frac", s)
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s).split("\\text{ ")[0].replace("\\%", "")
    s = re.sub(r"(^|[ {])\.", r"\g<1>0.", s)
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", s)
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    s = re.sub(
        r"\\frac([^{])(\{|(?!\\frac).)",
        lambda m: f"\\frac{{{m[1]}}}" + (m[2] if m[2] == "{" else f"{{{m[2]}}}"),
        s,
    )
    if s == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", s)


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plain(answer):
    r"""A MATH answer for math_equal: normalised, 2\frac{1}{2} as a sum, without $ \( \), a \boxed{} or \text{} around it, thin spaces, thousands commas."""
    s = re.sub(r"^\\[(\[]|\\[)\]]$|(?<!\\)\$|\\[ ,;:]", "", boxed(answer) or answer)
    s = re.sub(r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)^{1/\1})", re.sub(r"(frac|sqrt) +", r"\1", s))
    s = normalise(re.sub(r"\b(\d+) (\d+)/(\d+)\b", r"(\1+\2/\3)", s))
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", s)
    s = re.sub(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)", s)
    return s.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", s) else s


def parse_math(s):
    """A plain() answer as Python's syntax tree, of numbers, letters, pi, square roots, + - * / ^, brackets, products without a sign; None for anything else."""
    before = None
    while s != before and len(s) <= 200:  # from the innermost braces outwards
        before, s = s, re.sub(r"\^\{([^{}]*)\}", r"^(\1)", s)
        s = re.sub(
            r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", s)
        )
    s = re.sub(r"\\cdot|\\times", "*", s).replace("\\pi", "pi").replace("^", "**")
    tokens = re.findall(r"\d+\.?\d*|\.\d+|sqrt(?=\()|pi|[A-Za-z]|\*\*|[-+*/()]", s, re.A)
    if (
        len(s) > 200
        or "".join(tokens) != s
        or "()" in s
        or re.search("[A-Za-z]{3}", re.sub("sqrt|pi", "", s))
    ):  # a word is no product
        return None
    product = lambda a, b: (a[-1].isalnum() and a != "sqrt" or a[-1] in ").") and (b[0].isalnum() or b == "(")
    try:
        return ast.parse(
            "".join(a + "*" * product(a, b) for a, b in zip(tokens, tokens[1:] + ["+"])), mode="eval"
        ).body
    except SyntaxError:
        return None


def evaluate(node, at):
    """The complex value of parse_math's tree. at: the values of its letters."""
    if isinstance(node, ast.Constant):
        return complex(node.value)
    if isinstance(node, ast.Name):
        return at[node.id]
    if isinstance(node, ast.Call):
        return cmath.sqrt(evaluate(node.args[0], at))
    sides = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    return OPERATIONS[type(node.op)](*(evaluate(side, at) for side in sides))


def math_equal(a, b):
    r"""Are two MATH answers the same mathematics? Texts, or None (never equal) -> bool. Beyond normalise(a) == normalise(b) this accepts, and nothing else:

    - other writing: $...$, \text{...} around words, thousands commas, 3\frac{1}{2} and 3 1/2 for 3.5;
    - expressions that parse_math reads, where their values agree at three fixed points of their letters to 1e-10 (relative), or to 1e-4 where either
      is written with a decimal point;
    - lists and intervals between the same brackets, entry by entry in the same order.
    No factor of 100 passes for a percent sign. Time is bounded: floats at three points, at most 200 characters, nothing symbolic.
    """
    if a is None or b is None:
        return False
    if normalise(a) == normalise(b) or plain(a) == plain(b):
        return True
    a, b = plain(a), plain(b)
    if "," in a and "," in b:
        lists = [re.fullmatch(r"(\\\{|[(\[])?(.*?)(\\\}|[)\]])?", s).groups() for s in (a, b)]
        entries = [inside.split(",") for _, inside, _ in lists]
        return (
            lists[0][::2] == lists[1][::2]
            and len(entries[0]) == len(entries[1])
            and all(map(math_equal, *entries))
        )
    trees, rng = [parse_math(a), parse_math(b)], random.Random(0)
    if None in trees:
        return False
    for _ in range(3):
        at = {letter: complex(rng.uniform(-2, 2)) for letter in LETTERS} | {"pi": complex(math.pi)}
        try:
            x, y = (evaluate(tree, at) for tree in trees)
        except ArithmeticError:  # a division by zero, a power out of range
            return False
        if not (cmath.isfinite(x) and cmath.isclose(x, y, rel_tol=1e-4 if "." in a + b else 1e-10)):
            return False
    return True


def rating(text):
    """The judge's rating in 1-10: the first [[8]] or [[8.5]], otherwise the first [8], as FastChat reads it; -1 where there is none in that range."""
    found = re.search(r"\[\[\s*(\d+\.?\d*)\s*\]\]", text, re.A) or re.search(
        r"\[\s*(\d+\.?\d*)\s*\]", text, re.A
    )
    score = float(found[1]) if found else -1
    return -1 if not 1 <= score <= 10 else int(score) if score == int(score) else score


def scores(y, Z, labels):
    """True ids (scores where `labels` is empty) [N] and logits Z [N, D] -> the dict of classification_scores or of regression_scores."""
    return (
        classification_scores(y, Z.argmax(-1).tolist(), labels)
        if labels
        else regression_scores(y, Z[:, 0].tolist())
    )


def classification_scores(y, predicted, labels):
    """True and predicted class ids [N], the words of the D classes -> dict, each a share but Matthews' coefficient:

    accuracy; f1 of class 1, where D = 2; macro_f1, the mean over all D; matthews, 0 where either side is constant; recall_WORD of every
    class. A class that has no row, or is never predicted, counts 0.
    """
    from sklearn import metrics

    _, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, predicted, labels=range(len(labels)), average=None, zero_division=0.0
    )
    varied = len(set(y)) > 1 and len(set(predicted)) > 1
    return {
        "accuracy": float(metrics.accuracy_score(y, predicted)),
        **({"f1": float(f1[1])} if len(labels) == 2 else {}),
        "macro_f1": float(f1.mean()),
        "matthews": float(metrics.matthews_corrcoef(y, predicted)) if varied else 0.0,
        **{f"recall_{word}": float(r) for word, r in zip(labels, recall)},
    }


def regression_scores(y, predicted):
    """True and predicted scores [N] -> dict: pearson, spearman, combined (their mean); 0 where either side is constant."""
    from scipy import stats

    varied = len(set(y)) > 1 and len(set(predicted)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson, spearman = (
            float(f(y, predicted).statistic) if varied else 0.0 for f in (stats.pearsonr, stats.spearmanr)
        )
    return dict(pearson=pearson, spearman=spearman, combined=(pearson + spearman) / 2)


def wilson(hits, n):
    """95 % interval of a share (Wilson 1927)."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def pass_at_k(n, c, k):
    """Chance that one of k answers, drawn from n of which c are right, is right: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, Eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe & Ito: safe for colour-blind readers


def smooth(values, weight):
    """Exponential moving average, corrected for its start."""
    out, mean = [], 0.0
    for i, v in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * v
        out.append(mean / (1 - weight**i))
    return out


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    balora.write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=130))
    pyplot().close(fig)


def plot_curves(runs, path):
    """Training loss and gradient norm against the step, one line a run, smoothed over a twentieth of its steps (the poster's "Optimization Dynamics")."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run, colour in zip(runs, COLOURS * len(runs)):
        log = whole_lines(os.path.join(run, "log.jsonl"))
        if not log:
            raise ValueError(f"{run}: log.jsonl is empty; nothing to draw")
        steps, weight = [r["step"] for r in log], 1 - 1 / max(1, len(log) / 20)
        for ax, name in zip(axes, ("task", "grad_norm")):
            ax.plot(steps, [r[name] for r in log], color=colour, alpha=0.2, lw=0.8)
            ax.plot(
                steps,
                smooth([r[name] for r in log], weight),
                color=colour,
                lw=1.6,
                label=os.path.basename(os.path.normpath(run)),
            )
    for ax, label in zip(axes, ("task loss", "gradient norm")):
        ax.set(xlabel="optimizer step", ylabel=label)
    finish_axes(axes)
    axes[0].legend(frameon=False)
    save_figure(fig, path)


def plot_gains(gains, name, path):
    """{variant: differences to PiSSA, one a seed}: a row a variant, a dot a seed, a bar at their mean."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5.6, 0.8 + 0.32 * len(gains)), layout="constrained")
    for row, values in enumerate(gains.values()):
        ax.plot(values, [row] * len(values), "o", color=COLOURS[0], ms=4, alpha=0.6, mew=0)
        ax.plot(
            [statistics.mean(values)] * 2 if values else [],
            [row - 0.3, row + 0.3] if values else [],
            color=COLOURS[1],
            lw=2,
        )
    ax.axvline(0, color="0.6", lw=0.8, ls="--")
    ax.set(
        yticks=range(len(gains)),
        yticklabels=list(gains),
        ylim=(len(gains) - 0.5, -0.5),
        xlabel=f"{name}, difference to PiSSA with the same seed",
    )
    finish_axes([ax])
    save_figure(fig, path)


def plot_differences(ax, points, colour, marker, label=None):
    """{x: differences, one a seed}: a dot a seed, a line through the means, a dashed one at 0."""
    for x, values in points.items():
        ax.plot([x] * len(values), values, marker, color=colour, ms=4, alpha=0.4, mew=0)
    ax.plot(
        list(points),
        [statistics.mean(values) if values else math.nan for values in points.values()],
        marker + "-",
        color=colour,
        label=label,
    )
    ax.axhline(0, color="0.6", lw=0.8, ls="--")


def plot_noise(gains, name, path):
    """{other method: {level: gains of BA-LoRA over it}}: a dot a seed, a line through the means."""
    plt, called = pyplot(), {"lora": "LoRA", "pissa": "PiSSA"}
    fig, ax = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for (other, by_level), colour, marker, aside in zip(
        gains.items(), COLOURS, "os", (-0.004, 0.004)
    ):  # beside each other, not on top
        plot_differences(
            ax,
            {float(level) + aside: values for level, values in by_level.items()},
            colour,
            marker,
            f"BA-LoRA - {called[other]}",
        )
    levels = [float(level) for level in next(iter(gains.values()))]
    ax.set(
        xlabel="share of wrong facts in pre-training",
        ylabel=f"gain, {name.replace('_', ' ')}",
        xticks=levels,
        xticklabels=[f"{level:g}" for level in levels],
    )
    ax.legend(frameon=False)
    finish_axes([ax])
    save_figure(fig, path)


def plot_sensitivity(curves, name, path):
    """{knob: {value: differences to the default, one a seed}}: a panel a knob, its value on a logarithmic axis, a dot a seed, a line through the means."""
    plt = pyplot()
    columns = 4
    fig, axes = plt.subplots(
        -(-len(curves) // columns),
        columns,
        figsize=(10, 2.6 * -(-len(curves) // columns)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for ax in axes.flat[len(curves) :]:
        ax.axis("off")
    for (knob, points), ax in zip(curves.items(), axes.flat):
        x = list(points)
        plot_differences(ax, points, COLOURS[0], "o")
        ax.set(
            xscale="log",
            xlabel={f"lambda{i}": f"λ{i}" for i in (1, 2, 3)}.get(knob, knob),
            xticks=x,
            xticklabels=[f"{v:g}" for v in x],
        )
        ax.minorticks_off()
    for ax in axes[:, 0]:
        ax.set_ylabel(f"change of {name}")
    finish_axes(axes.flat[: len(curves)])
    save_figure(fig, path)


def finish_axes(axes):
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


def read_features(run):
    """features [n, d], y [n], predicted [n], label words of the features.npz that train_nlu.py left in a run folder."""
    path = os.path.join(run, "features.npz")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; expected the folder of a finished train_nlu.py run")
    with np.load(path) as f:
        if not len(f["labels"]):
            raise ValueError(f"{run}: its task has scores, not classes; nothing to tell apart")
        return f["features"], f["y"], f["Z"].argmax(1), f["labels"].tolist()


def separation(X, y):
    """How apart the classes of features X [n, d] lie: the silhouette score, and each class's recall under a linear probe (5-fold cross-validated)."""
    from sklearn import linear_model, metrics, model_selection, pipeline, preprocessing

    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(max_iter=1000, class_weight="balanced"),
    )
    predicted = model_selection.cross_val_predict(
        probe, X, y, cv=model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    )
    return float(metrics.silhouette_score(X, y)), metrics.recall_score(y, predicted, average=None).tolist()


def plot_features(runs, path, numbers, per_class=300):
    """t-SNE of each run's features coloured by class, a panel a run (the poster's (a)-(f)), {run: words} below it; at most per_class points of a class are drawn."""
    from sklearn.manifold import TSNE

    plt = pyplot()
    columns = min(3, len(runs))
    fig, axes = plt.subplots(
        -(-len(runs) // columns),
        columns,
        figsize=(3.4 * columns, 3.2 * -(-len(runs) // columns)),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(runs) :]:
        ax.axis("off")
    for letter, run, ax in zip("abcdefghijklmnopqrstuvwxyz", runs, axes.flat):
        X, y, _, labels = read_features(run)
        drawn = np.concatenate([np.flatnonzero(y == c)[:per_class] for c in range(len(labels))])
        points = TSNE(init="pca", perplexity=min(30, len(drawn) // 4), random_state=0).fit_transform(X[drawn])
        for c, (word, colour) in enumerate(zip(labels, COLOURS)):
            ax.scatter(*points[y[drawn] == c].T, s=4, color=colour, label=word, lw=0)
        ax.set(
            xticks=[],
            yticks=[],
            xlabel=numbers[run],
            title=f"({letter}) {os.path.basename(os.path.normpath(run))}",
        )
        ax.title.set_fontsize(8)
    fig.legend(
        *axes.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        markerscale=3,
    )
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: where programs that a model wrote run. What they see of this machine is READABLE and the interpreter, read-only

READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")
LIMITS = dict(
    wall=20, CPU=10, AS=2**30, FSIZE=2**20, NPROC=4, NOFILE=64, CORE=0
)  # seconds; then setrlimit's: seconds, bytes (FSIZE: of output too), counts
ENVIRONMENT = dict(
    PATH="/usr/bin:/bin:/usr/sbin:/sbin", LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
)  # all that a program inherits

# The first process of its namespaces, still privileged there: build a root folder over /sys, which every Linux has and nothing here needs, from the paths
# up to --, then run the words behind it. Folders on the way to a path can be passed, not listed; there is no /proc.
BUILD_ROOT = """
set -e; umask 444
mount -t tmpfs -o mode=755,size=1m root /sys
mkdir /sys/tmp; mount -t tmpfs -o mode=1777,size=16m,nosuid,nodev tmp /sys/tmp
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "/sys$1"; else mkdir -p "/sys${1%/*}"; : > "/sys$1"; fi
    if [ -c "$1" ]; then mount --bind "$1" "/sys$1"; else mount -o bind,ro,nosuid,nodev "$1" "/sys$1"; fi
    shift
done
shift; mount -o remount,bind,ro /sys; umask 022
"$@" || exit $?
"""


def sandboxes():
    """{name: the words in front of a command that put it into a sandbox}: the same sandbox by two tools.

    New user, network, pid, ipc, uts and mount namespaces: no network, no other process, no file but READABLE and the interpreter's folders (read-only) and
    an empty /tmp of 16 MB in memory. The pid namespace's first process is out of the program's reach; its end (at the latest when whoever started it is
    gone) ends them all. Root first becomes nobody (65534), as the kernel counts no processes of the real root. In its own user namespace, which maps no id,
    the program has no rights and can make no further namespace.
    """
    inside = lambda p: (
        [p] if os.stat(p).st_mode & 5 == 5 else [os.path.join(p, name) for name in os.listdir(p)]
    )  # where nobody may not enter p
    prefixes = [
        part
        for p in (sys.prefix, sys.base_prefix)
        for real in (p, os.path.realpath(p))
        for part in inside(real)
    ]
    paths, root = [p for p in dict.fromkeys([*READABLE, *prefixes]) if os.path.exists(p)], os.geteuid() == 0
    folders = dict.fromkeys(
        p[:i] for p in (*paths, *DEVICES) for i in range(1, len(p)) if p[i] == "/" and p[:i] != "/tmp"
    )
    alone = [
        "setpriv",
        "--no-new-privs",
        *(["--reuid=65534", "--regid=65534", "--clear-groups"] if root else []),
        "unshare",
        "--user",
    ]
    return {
        "bwrap": [
            "bwrap",
            "--die-with-parent",
            "--unshare-net",
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else []),
            "--perms",
            "1777",
            "--size",
            str(2**24),
            "--tmpfs",
            "/tmp",
            *(word for p in folders for word in ("--perms", "0311", "--dir", p)),
            *(word for p in paths for word in ("--ro-bind", p, p)),
            *(word for p in DEVICES for word in ("--dev-bind", p, p)),
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
            *alone,
        ],
        "unshare": [
            "unshare",
            *([] if root else ["--user", "--map-root-user"]),
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            "--mount",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            BUILD_ROOT,
            "sh",
            *paths,
            *DEVICES,
            "--",
            *alone,
            "--root=/sys",
            "--wd=/tmp",
        ],
    }


def driver(program_size, tests_size, report, limits):
    """Runs inside the sandbox, sent there as text: limit this process, run program and tests (bytes of stdin), copy the token behind them to `report`."""
    import os, resource, signal, sys, types

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; here too much output ends the program
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))

    read, write, leave = os.read, os.write, os._exit  # as they were before the program

    def take(pipe, size, data=b""):
        while len(data) < size and (more := read(pipe, size - len(data))):
            data += more
        return data

    program, tests, token = take(0, program_size), take(0, tests_size), os.dup(0)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    write(2, b"started")
    os.dup2(1, 2)
    solution = sys.modules["solution"] = types.ModuleType(
        "solution"
    )  # not __main__: what stands under such a guard does not run
    for text in (program, tests):
        exec(compile(text.decode(), "solution.py", "exec"), vars(solution))
    write(report, take(token, 32))
    leave(0)


def run_program(sandbox, program, tests, limits=LIMITS):
    """Run `program`, then `tests`, in a sandbox of their own -> (passed, why not: "", or the last line of output).

    It passes only if a random token comes back that waits unread in a pipe until the last test is through, by a way of its own: to end early (exit, a
    signal, a limit), to hang, to print whatever there is to find, to replace print, sys.stdout, os.write or exit never counts as passed. Program and tests
    share an interpreter, as in human-eval, so a program written against this very driver could cheat (copy the one descriptor to the other, return
    objects equal to all): scores are safe from accidents, this machine from both. coreutils' timeout ends the whole group after limits["wall"] seconds,
    even where this process is gone. Raises ValueError where the sandbox itself fails.
    """
    token, program, tests = (
        os.urandom(16).hex().encode(),
        program.encode(errors="replace"),
        tests.encode(errors="replace"),
    )
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as setup,
        tempfile.TemporaryFile() as report,
    ):
        inner = {name: most for name, most in limits.items() if name != "wall"}
        source = (
            f"{inspect.getsource(driver)}\ndriver({len(program)}, {len(tests)}, {report.fileno()}, {inner})"
        )
        command = [
            "timeout",
            "--signal=KILL",
            str(limits["wall"]),
            *sandbox,
            sys.executable,
            "-Iu",
            "-c",
            source,
        ]
        status = subprocess.run(
            command,
            input=program + tests + token,
            stdout=out,
            stderr=setup,
            pass_fds=[report.fileno()],
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        ).returncode
        printed, said, reported = (f.seek(0) or f.read(limits["FSIZE"]) for f in (out, setup, report))
    if b"started" not in said:
        raise ValueError(
            f"{sandbox[0]}: the sandbox did not start ({' '.join(said.decode(errors='replace').split())[:200] or f'status {status}'})"
        )
    if reported == token:
        return True, ""
    if status == -9 or len(printed) == limits["FSIZE"]:
        return (
            False,
            f"stopped after {limits['wall']} s"
            if status == -9
            else f"stopped after {limits['FSIZE']} bytes of output",
        )
    if 128 < status < 160:
        return False, signal.strsignal(status - 128)  # "CPU time limit exceeded", "Segmentation fault"
    lines = [line[:200] for line in printed.decode(errors="replace").split("\n") if line.strip()]
    return False, lines[-1] if lines else f"ended with status {status} before its last test"


def find_sandbox():
    """The first of `sandboxes` that works on this machine. Raises ValueError where none does."""
    why = []
    for name, sandbox in sandboxes().items():
        try:
            if shutil.which(name) and run_program(sandbox, "", "")[0]:
                return sandbox
            why.append(f"{name} does not run a program" if shutil.which(name) else f"{name} is not installed")
        except ValueError as e:
            why.append(str(e))
    raise ValueError(
        f"--execute: model-written programs run only in a sandbox, and none works here: {'; '.join(why)}. On Linux: apt install bubblewrap; "
        "where namespaces are forbidden: sysctl kernel.apparmor_restrict_unprivileged_userns=0, in a container --privileged"
    )


def execute(sandbox, run, name, programs):
    """Verdicts on `programs`, each (row, sample, program, tests): run what RUN/NAME.jsonl lacks, a program a processor at a time -> path, all lines."""
    coded = hashlib.sha256(json.dumps(programs).encode()).hexdigest()[:16]
    path, lines = answer_file(
        run, name, dict(programs=coded, items=len(programs), limits=LIMITS, python=platform.python_version())
    )
    seen = {(line["row"], line["sample"]) for line in lines}
    todo = [p for p in programs if p[:2] not in seen]

    def verdict(job):
        row, sample, program, tests = job
        return dict(
            row=row, sample=sample, **dict(zip(("passed", "why"), run_program(sandbox, program, tests)))
        )

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(verdict, job) for job in todo]
        try:
            for job in tqdm(
                concurrent.futures.as_completed(jobs),
                desc="execute",
                unit="program",
                total=len(todo),
                disable=None,
            ):
                lines.append(job.result())
                append(path, lines[-1])
        finally:
            pool.shutdown(cancel_futures=True)
    return path, lines


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: one JSON line an item, written as it comes, so a stopped command goes on where it was


def file_hash(path):
    """sha256 (16 hex digits) of a file, "" where there is none."""
    return hashlib.sha256(open(path, "rb").read()).hexdigest()[:16] if os.path.exists(path) else ""


def answer_file(run, name, head):
    """Open RUN/NAME.jsonl, whose first line says how it was made. -> path, records already there. Raises ValueError where `head` differs."""
    path = os.path.join(run or "out", f"{name}.jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lines = whole_lines(path, mend=True)
    if not lines:
        append(path, head)
    elif lines[0] != head:
        raise ValueError(
            f"{path} was made with {lines[0]}, this is {head}; move it away or choose another --out"
        )
    return path, lines[1:]


def chosen(o, rows):
    """The part of `rows` that --last and --limit ask for."""
    return rows[-o.last if o.last else 0 :][: o.limit or None]


def rows_of(o):
    """The rows a command asks for, read by the run's field names unless others are given."""
    settings = read_run(o.run)["settings"] if o.run else {}
    names = (getattr(o, name) or settings.get(name, "") for name in ("prompt_field", "response_field"))
    return chosen(o, read_rows(o.data, *names))


def answers_name(o, name):
    """What a benchmark's file is called: --out, or the benchmark (and the untuned model)."""
    return o.out or name + ("" if o.run else f"-{os.path.basename(os.path.normpath(o.init))}")


def answer_items(o, name, prompts, judge, n=1, temperatures=None, opened=None):
    """n answers of the model to each of `prompts` (fill() has framed them), a line of RUN/NAME.jsonl each as it comes: on from where it was stopped.

    judge(i, text) -> dict, the verdict on an answer to prompt i; it stands in the line beside row, sample and answer. temperatures: one a prompt,
    otherwise --temperature for all. opened: open_model(o), where it is already. -> path, all lines in order.
    """
    net, tok, *_ = opened or open_model(o)
    temperatures = temperatures or [o.temperature] * len(prompts)
    kinds = sorted(set(temperatures))
    max_new, coded = o.max_new or 1024, [tok.bos + tok.encode(prompt) for prompt in prompts]
    full = sum(len(ids) >= net.config.max_len for ids in coded)
    print(
        f"{o.data}: {len(prompts)} prompts x {n}, at most {max_new} tokens each, temperature {', '.join(map(str, kinds))}"
        + (f"; {full} fill the context of {net.config.max_len} tokens and stay unanswered" if full else "")
    )
    head = dict(
        weights=net.weights_hash,
        adapter=file_hash(os.path.join(o.run, "adapter", "adapter_model.safetensors")),
        dtype=str(net.head.dtype)[6:],
        data=o.data,
        items=len(prompts) * n,
        prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        n=n,
        max_new=max_new,
        temperature=kinds[0] if len(kinds) == 1 else kinds,
        top_p=o.top_p,
        seed=o.seed,
    )
    path, lines = answer_file(o.run, answers_name(o, name), head)
    seen = {(line["row"], line["sample"]) for line in lines}
    todo = [(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in seen]

    for temperature in kinds:
        part = [(i, j) for i, j in todo if temperatures[i] == temperature]

        def done(at, ids):
            (row, j), text = part[at], tok.decode(ids)
            lines.append(dict(row=row, sample=j, answer=text, tokens=len(ids), **judge(row, text)))
            append(path, lines[-1])

        write_answers(
            net,
            [coded[i] for i, _ in part],
            max_new,
            o.batch_size,
            tok.eos,
            name,
            done,
            temperature,
            o.top_p,
            o.seed + len(seen),
        )
    if cut := sum(line["tokens"] == max_new for line in lines):
        print(f"{cut} of {len(lines)} answers reached {max_new} tokens before their end (--max_new)")
    return path, sorted(lines, key=lambda line: (line["row"], line["sample"]))


def template_of(o):
    """The template that a run was tuned with, or --template."""
    template = read_run(o.run)["settings"].get("template", o.template) if o.run else o.template
    if o.template not in (template, Options.template):
        raise ValueError(
            f"--template={o.template}: {o.run} was tuned with the template {template!r}, which goes with it; leave it out"
        )
    return template


def print_share(what, hits, n, path):
    low, high = wilson(hits, n)
    print(
        f"{what} {100 * hits / n:.2f} % ({hits} of {n}), 95 % interval {100 * low:.2f} to {100 * high:.2f} -> {path}"
    )


def same_number(line):
    return line["got"] is not None and line["got"] == line["gold"]


def same_form(line):
    return None not in (line["got"], line["gold"]) and normalise(line["got"]) == normalise(line["gold"])


def gsm8k(o):
    """Exact match on GSM8K-like rows: greedy answers, the number after "The answer is: " rounded; --loose: the whole number, not rounded."""
    rows, template = rows_of(o), template_of(o)
    gold = [extract_answer(answer) for _, _, answer in rows]
    if missing := sum(g is None for g in gold):
        print(f"{o.data}: {missing} of {len(rows)} rows have no gold number and count as wrong")
    judge = lambda i, text: dict(got=extract_answer(text), gold=gold[i])
    path, lines = answer_items(o, "gsm8k", [fill(template, *row[:2]) for row in rows], judge)
    loose = lambda line: (
        (got := exact_number(line["answer"])) is not None and got == exact_number(rows[line["row"]][2])
    )
    print_share(
        "equal numbers" if o.loose else "exact match",
        sum(map(loose if o.loose else same_number, lines)),
        len(lines),
        path,
    )


def competition_math(o):
    """MATH: greedy answers, the text after "The answer is: " against the solution's last box; equal as normalised strings, with --loose as mathematics.

    In all, and by subject and level where the rows have them.
    """
    rows, template = rows_of(o), template_of(o)
    gold = [boxed(solution) for _, _, solution in rows]
    if missing := sum(g is None for g in gold):
        print(f"{o.data}: {missing} of {len(rows)} solutions have no \\boxed answer and count as wrong")
    path, lines = answer_items(
        o,
        "math",
        [fill(template, *row[:2]) for row in rows],
        lambda i, text: dict(got=extract_math(text), gold=gold[i]),
    )
    right = [math_equal(line["got"], line["gold"]) if o.loose else same_form(line) for line in lines]
    table = read_table(o.data)
    for name in ("subject", "type", "level"):
        groups = {}
        for value, hit in zip(chosen(o, table[name][:]) if name in table.column_names else (), right):
            groups.setdefault(str(value), []).append(hit)
        for value in sorted(groups):
            print(
                f"  {name} {value:<26}{100 * statistics.mean(groups[value]):6.2f} % of {len(groups[value])}"
            )
    print_share("equal as mathematics" if o.loose else "exact match", sum(right), len(right), path)


TEMPERATURES = dict(
    writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1
)  # FastChat's, by category
FASTCHAT = "github.com/lm-sys/FastChat (Apache-2.0) has it in fastchat/llm_judge/data"


def questions(o):
    """MT-Bench's questions -> list of dicts: id, category, turns (two texts), reference (texts, or none). Fields as in FastChat's file or in the hub's set."""
    out = []
    for row in chosen(o, list(read_table(o.data))):
        q = dict(
            id=row.get("question_id", row.get("prompt_id")),
            turns=row.get("turns", row.get("prompt")),
            category=row.get("category"),
            reference=row.get("reference") or [],
        )
        if (
            q["id"] is None
            or q["category"] not in TEMPERATURES
            or not isinstance(q["turns"], list)
            or len(q["turns"]) != 2
        ):
            raise ValueError(
                f"{o.data}: expected question_id, a category of {', '.join(TEMPERATURES)}, and two turns in every row, not {str(row)[:120]}; "
                f"{FASTCHAT}/mt_bench/question.jsonl"
            )
        out.append(q)
    return out


def mtbench(o):
    """Answers to MT-Bench's two-turn questions, each at its category's temperature, in FastChat's model_answer format: for `judge`, or for FastChat's own."""
    asked, template, opened, name = questions(o), template_of(o), open_model(o), answers_name(o, "mtbench")
    temperatures = [TEMPERATURES[q["category"]] for q in asked]

    def answers(turn, prompts):
        return answer_items(
            dataclasses.replace(o, out=f"{name}-turn{turn}"),
            "mtbench",
            prompts,
            lambda i, text: dict(tstamp=time.time()),
            temperatures=temperatures,
            opened=opened,
        )

    prompts = [fill(template, q["turns"][0]) for q in asked]
    path, first = answers(1, prompts)
    _, second = answers(
        2,
        [
            next_turn(template, prompt + line["answer"], q["turns"][1])
            for prompt, line, q in zip(prompts, first, asked)
        ],
    )
    path, records = os.path.join(os.path.dirname(path), f"{name}.jsonl"), []
    for q, a, b in zip(asked, first, second):
        turns = [a["answer"].strip(), b["answer"].strip()]
        key = hashlib.sha256(
            json.dumps([q["id"], opened[0].weights_hash, b["tstamp"], turns]).encode()
        ).hexdigest()[:22]
        records.append(
            dict(
                question_id=q["id"],
                answer_id=key,
                model_id=os.path.basename(os.path.normpath(o.run or o.init)),
                choices=[dict(index=0, turns=turns)],
                tstamp=b["tstamp"],
            )
        )
    balora.write_atomic(
        path, lambda f: f.write("".join(json.dumps(record) + "\n" for record in records).encode())
    )
    print(
        f"{len(records)} questions answered -> {path}; `python eval.py judge --answers={path} ...` scores them"
    )


def read_lines(option, path, fields, origin):
    """Records of the .jsonl file that --option names, each with `fields`. Raises ValueError with where such a file comes from."""
    if not path.endswith(".jsonl") or not os.path.isfile(path):
        raise ValueError(f"--{option}={path}: expected an existing .jsonl file; {origin}")
    check_json(path)
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f if line.strip()]
    if wrong := next(
        (line for line in lines if not set(fields) <= line.keys()), "an empty file" if not lines else None
    ):
        raise ValueError(
            f"--{option}={path}: expected lines with {', '.join(fields)}, not {str(wrong)[:120]}; {origin}"
        )
    return lines


def turns_of(record, path):
    """The two texts of a record in FastChat's model_answer format (its first choice)."""
    try:
        turns = [str(text) for text in record["choices"][0]["turns"]]
    except (LookupError, TypeError):
        turns = ()
    if len(turns) != 2:
        raise ValueError(
            f"{path}: question {record['question_id']}: expected choices[0].turns to hold two texts, as FastChat writes them"
        )
    return turns


def judge_requests(o, answers):
    """FastChat's single-answer grading -> a dict for each turn of each answer: the fields of model_judgment that are known beforehand, and `system`."""
    prompts = read_lines(
        "judge_prompts",
        o.judge_prompts,
        ("name", "system_prompt", "prompt_template"),
        f"{FASTCHAT}/judge_prompts.jsonl",
    )
    prompts, origin = {p["name"]: p for p in prompts}, f"{FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl"
    references = (
        read_lines("references", o.references, ("question_id", "choices"), origin) if o.references else []
    )
    references, asked, out = (
        {r["question_id"]: turns_of(r, o.references) for r in references},
        {q["id"]: q for q in questions(o)},
        [],
    )
    for answer in answers:
        q, key, turns = (
            asked.get(answer["question_id"]),
            answer["question_id"],
            turns_of(answer, "the answers"),
        )
        if q is None:
            raise ValueError(
                f"question {key} is answered, and it is not in --data={o.data}; give the file that was answered"
            )
        solved = q["category"] in ("math", "reasoning", "coding")
        reference = references.get(key) or q["reference"]
        if solved and len(reference) != 2:
            raise ValueError(
                f"question {key} ({q['category']}) is judged beside a reference answer, and there is none; give --references=FILE: {origin}"
            )
        words = dict(question=q["turns"][0], answer=turns[0])
        for i, text in enumerate([q["turns"], turns, reference if solved else []]):
            words |= {
                f"{('question', 'answer', 'ref_answer')[i]}_{turn}": t for turn, t in enumerate(text, 1)
            }
        for turn, suffix in ((1, ""), (2, "-multi-turn")):
            name = f"single{'-math' if solved else ''}-v1{suffix}"
            if name not in prompts:
                raise ValueError(
                    f"--judge_prompts={o.judge_prompts} has no prompt {name}, only {', '.join(prompts)}; {FASTCHAT}/judge_prompts.jsonl"
                )
            try:
                text = prompts[name]["prompt_template"].format(**words)
            except (KeyError, IndexError, ValueError) as e:
                raise ValueError(
                    f"--judge_prompts={o.judge_prompts}: the template of {name} cannot be filled ({type(e).__name__}: {e}); "
                    f"it may name {', '.join(words)}"
                ) from None
            out.append(
                dict(
                    question_id=key,
                    model=answer["model_id"],
                    judge=[o.judge_model, name],
                    user_prompt=text,
                    turn=turn,
                    system=prompts[name]["system_prompt"],
                )
            )
    return out


BACKOFF, LONGEST = (
    1.0,
    60.0,
)  # seconds: before the first retry (twice as long before each one after it), and at most


def retry_after(headers):
    """Seconds that a reply's Retry-After asks for, given in seconds or as a date; 0 where it asks for none."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        return (
            float(text)
            if re.fullmatch(r"\d+(\.\d+)?", text)
            else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            if text
            else 0.0
        )
    except ValueError:
        return 0.0


def complete(url, body, retries=5, timeout=120.0, stop=None):
    """One chat completion of an OpenAI-compatible endpoint (key: OPENAI_API_KEY) -> its text.

    Rate limits, server errors, time-outs (seconds of silence), broken connections and replies without the text are tried again, up to `retries` times,
    unless the event `stop` is set. Raises ConnectionError when they are used up and where the server refuses this very text, ValueError where it refuses any.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    request = urllib.request.Request(
        url,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    for attempt in range(retries + 1):
        wait = BACKOFF * 2**attempt
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = json.loads(reply.read())["choices"][0]["message"]["content"]
            if isinstance(text, str):
                return text
            why = "a reply without text"
        except urllib.error.HTTPError as e:
            why, wait = f"{e.code} {e.reason}", max(wait, retry_after(e.headers))
            if e.code < 500 and e.code not in (408, 409, 429):
                refused = (
                    ConnectionError if e.code in (400, 413, 422) else ValueError
                )  # too long, not allowed: another text may pass
                raise refused(
                    f"{url}: {why}: {error_text(e)}; check --judge_url, --judge_model={body['model']}, and the key in OPENAI_API_KEY"
                    + ("" if key else " (which is not set)")
                ) from None
        except (
            OSError,
            http.client.HTTPException,
        ) as e:  # no connection, a time-out, a reply that breaks off
            why = str(getattr(e, "reason", e)) or type(e).__name__
        except (ValueError, LookupError, TypeError) as e:
            why = f"a malformed reply ({type(e).__name__})"
        if attempt == retries or (stop or threading.Event()).wait(min(wait, LONGEST)):
            break
    raise ConnectionError(why)


def error_text(e):
    """What an HTTPError's body says, on one line."""
    try:
        body = e.read(2000).decode(errors="replace")
        return " ".join(str(json.loads(body)["error"]["message"]).split())[:200]
    except (OSError, http.client.HTTPException):
        return "no more than that"
    except (ValueError, LookupError, TypeError):
        return " ".join(body.split())[:200]


def ask_judge(o, todo, path, lines):
    """Have `todo` rated, --parallel requests at a time; each rating is a line of `path` (and of `lines`) as it comes. -> why the ones that failed did.

    It stops after ten failures in a row instead of waiting through every item.
    """
    url, stop, lock = (
        o.judge_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions",
        threading.Event(),
        threading.Lock(),
    )
    failed, in_a_row = [], 0

    def one(item):
        nonlocal in_a_row
        if stop.is_set():
            return
        messages = [
            dict(role="system", content=item["system"]),
            dict(role="user", content=item["user_prompt"]),
        ]
        try:
            text = complete(
                url,
                dict(model=o.judge_model, messages=messages, temperature=0, max_tokens=2048),
                o.retries,
                o.timeout,
                stop,
            )
        except ConnectionError as e:
            with lock:
                failed.append(str(e))
                in_a_row += 1
                if in_a_row == 10:
                    stop.set()
            return
        except ValueError:
            stop.set()  # what is refused once is not asked 160 times
            raise
        known = {k: v for k, v in item.items() if k not in ("system", "turn")}
        with lock:
            in_a_row = 0
            lines.append(
                dict(**known, judgment=text, score=rating(text), turn=item["turn"], tstamp=time.time())
            )
            append(path, lines[-1])

    pool = concurrent.futures.ThreadPoolExecutor(o.parallel)
    try:
        futures = [pool.submit(one, item) for item in todo]
        for future in tqdm(
            concurrent.futures.as_completed(futures), total=len(todo), desc="judge", unit="turn", disable=None
        ):
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)  # replies under way are paid for: they are waited for, and written
    return failed


def print_ratings(lines, asked):
    """Means of the ratings, 1-10: first turn, second turn, all, by category. Turns without a rating (-1) are counted, not averaged."""
    category = {q["id"]: q["category"] for q in asked}
    groups = {"first turn": [], "second turn": [], "all turns": []} | {name: [] for name in TEMPERATURES}
    for line in lines:
        for name in (
            "first turn" if line["turn"] == 1 else "second turn",
            "all turns",
            category.get(line["question_id"], "not in --data"),
        ):
            groups.setdefault(name, []).extend([line["score"]] if line["score"] != -1 else [])
    for name, group in groups.items():
        if group:
            print(f"  {name:<14}{statistics.mean(group):6.2f}  ({len(group)} ratings)")
    if unread := sum(line["score"] == -1 for line in lines):
        print(
            f"{unread} of {len(lines)} judgments hold no rating [[1]] to [[10]]; they are in the file with score -1 and in no mean"
        )


def judge(o):
    """Rate MT-Bench answers by a judge behind any OpenAI-compatible endpoint, single-answer grading, in FastChat's model_judgment format.

    What is rated already is not asked again; without --judge_url nothing is asked, and the ratings that are there are reported.
    """
    path = o.answers or (os.path.join(o.run, "mtbench.jsonl") if o.run else "")
    answers = read_lines(
        "answers",
        path,
        ("question_id", "model_id", "choices"),
        "`python eval.py mtbench` writes one, give it or its --run",
    )
    if o.judge_url and not re.match(r"https?://[^\s/]", o.judge_url):
        raise ValueError(
            f"--judge_url={o.judge_url}: expected the address of an OpenAI-compatible endpoint, like https://api.openai.com/v1"
        )
    out = (
        o.out
        or f"{path.removesuffix('.jsonl')}-{re.sub('[^A-Za-z0-9._-]+', '_', o.judge_model)}_single.jsonl"
    )
    if not out.endswith(".jsonl"):
        raise ValueError(f"--out={out}: expected the name of a .jsonl file for the ratings")
    try:
        judgments = all(
            {"question_id", "model", "judge", "user_prompt", "score", "turn"} <= line.keys()
            for line in whole_lines(out)
        )
    except ValueError:
        judgments = False
    if not judgments:
        raise ValueError(f"--out={out} holds something else than judgments; choose another --out")
    lines, failed = whole_lines(out, mend=True), []
    if o.judge_url:
        key = lambda line: (line["question_id"], line["turn"])
        items, seen = judge_requests(o, answers), {key(line): line for line in lines}
        for item in items:
            if key(item) in seen and any(
                seen[key(item)][k] != item[k] for k in ("model", "judge", "user_prompt")
            ):
                raise ValueError(
                    f"{out}: question {item['question_id']} turn {item['turn']} was rated for another answer, prompt or judge; "
                    "move it away or choose another --out"
                )
        todo = [item for item in items if key(item) not in seen]
        print(
            f"{path}: {len(items)} turns to rate, {len(items) - len(todo)} of them rated already, by {o.judge_model} at {o.judge_url}"
        )
        failed = ask_judge(o, todo, out, lines)
    print_ratings(lines, questions(o))
    if failed:
        raise ValueError(
            f"{2 * len(answers) - len(lines)} of {2 * len(answers)} turns could not be rated (last: {failed[-1]}); "
            "the same command asks for those alone"
        )
    if not o.judge_url:
        print(
            f"{len(lines)} of {2 * len(answers)} turns are rated; the answers wait in {path} for --judge_url=URL of an OpenAI-compatible endpoint "
            "(key: OPENAI_API_KEY)"
        )
    print(f"{len(lines)} ratings of {2 * len(answers)} -> {out}" if lines else "no rating yet")


def extract_code(text):
    """The program in an answer (METHODS 6.4, PiSSA's code_process.py): the first fenced python block, else the first fenced block, else all of it.

    It ends before the first line that begins, unindented, with `if __name__`, `# Example usage` or `assert`: what follows is the model's own trial, whose
    mistakes are not the function's. An indented assert is a part of the function and stays.
    """
    block = next(
        (
            m[1]
            for fence in (r"(?:python|py)\w*[^\S\n]*", r"[^\n`]*")
            if (m := re.search(rf"(?is)```{fence}\n(.*?)(?:```|\Z)", text))
        ),
        text,
    )
    return re.sub(r"\A\s*\n", "", re.split(r"(?m)^(?:if __name__\b|# Example usage|assert\b)", block)[0])


def humaneval_program(prompt, entry_point, answer):
    """human-eval's program: the prompt, then what the model wrote. A whole function wins over the prompt's; a bare body goes on where the prompt ends."""
    code = extract_code(answer)
    if re.search(rf"\bdef\s+{entry_point}\b", code):
        code = textwrap.dedent(code).strip()
    elif not code.startswith(("  ", "\t")):
        code = textwrap.indent(code.strip(), "    ")
    return f"{prompt.rstrip()}\n{code}\n"


def code_rows(o, *fields):
    """The rows of a code benchmark as dicts. fields: each a tuple of names, of which the data must have one."""
    table = read_table(o.data)
    missing = [" or ".join(names) for names in fields if not set(names) & set(table.column_names)]
    if missing or not len(table):
        raise ValueError(
            f"{o.data}: "
            + (
                f"no field {', '.join(missing)}; its fields are {', '.join(table.column_names)}"
                if missing
                else "no rows"
            )
        )
    return chosen(o, list(table))


def code_benchmark(o, name, prompts, program):
    """Answers -> RUN/NAME.jsonl; with --execute verdicts -> RUN/NAME-results.jsonl and pass@k. program(i, answer) -> (program, tests) of prompt i."""
    ks = [int(k) if k.strip().isdecimal() else 0 for k in o.k.split(",")]
    if not all(1 <= k <= o.n for k in ks):
        raise ValueError(
            f"--k={o.k} --n={o.n}: expected comma-separated k from 1 to n, the answers to each problem"
        )
    if o.n > 1 and o.temperature <= 0:
        raise ValueError(
            f"--n={o.n}: greedy answers to a problem are all the same; add --temperature=0.8, or leave --n out"
        )
    sandbox, template = (
        o.execute and find_sandbox(),
        template_of(o),
    )  # before the answers: they may take hours
    path, lines = answer_items(
        o, name, [fill(template, prompt) for prompt in prompts], lambda i, text: {}, n=o.n
    )
    if not o.execute:
        print(
            f"{len(lines)} answers -> {path}; none was executed: the same command with --execute runs them in a sandbox and scores them"
        )
        return
    folder, file = os.path.split(path)
    programs = [(line["row"], line["sample"], *program(line["row"], line["answer"])) for line in lines]
    path, lines = execute(sandbox, folder, f"{file.removesuffix('.jsonl')}-results", programs)
    right = [0] * len(prompts)
    for line in lines:
        right[line["row"]] += line["passed"]
    if o.n == 1:
        return print_share("pass@1", sum(right), len(right), path)
    for k in ks:
        share = statistics.mean(pass_at_k(o.n, c, k) for c in right)
        print(
            f"pass@{k} {100 * share:.2f} % ({len(right)} problems, {o.n} answers each at temperature {o.temperature}) -> {path}"
        )


def humaneval(o):
    """HumanEval (Chen et al. 2021): complete a function from its signature and docstring. Without --execute nothing that the model wrote runs."""
    rows = code_rows(o, ("prompt",), ("entry_point",), ("test",))
    ask = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
    program = lambda i, answer: (
        humaneval_program(rows[i]["prompt"], rows[i]["entry_point"], answer),
        f"{rows[i]['test']}\ncheck({rows[i]['entry_point']})\n",
    )
    code_benchmark(o, "humaneval", [ask.format(row["prompt"].strip()) for row in rows], program)


def mbpp(o):
    """MBPP (Austin et al. 2021), whole or sanitized: write a function from a sentence and its tests (shown, as is usual: they name the function).

    Without --execute nothing that the model wrote runs.
    """
    rows = code_rows(o, ("text", "prompt"), ("test_list",))
    ask = "{}\nYour code should pass these tests:\n\n{}\n\nAnswer with the whole function in one code block."
    tests = lambda row: "\n".join(
        [row.get("test_setup_code") or "", *(row.get("test_imports") or []), *row["test_list"]]
    )  # set-up code uses the solution
    program = lambda i, answer: (extract_code(answer), tests(rows[i]))
    code_benchmark(
        o,
        "mbpp",
        [ask.format(row.get("text") or row["prompt"], "\n".join(row["test_list"])) for row in rows],
        program,
    )


def loss(o):
    """Loss, drift, diversity, spectrum and the passage's perplexity on rows of your own."""
    net, tok, settings, device = open_model(o)
    examples, line = encode_rows(rows_of(o), tok, template_of(o), settings.get("max_len", 512))
    print(f"{o.data}: {line}")
    record = measure(
        net,
        tok,
        examples,
        o.batch_size,
        settings.get("K", 20),
        settings.get("k", 10),
        device,
        drift=bool(balora.adapted_layers(net)),
    )
    for name, value in record.items():
        print(f"  {name:<14}{'none (no adapter to switch off)' if value is None else f'{value:.4f}'}")


def sample(o):
    """Write an answer to --prompt."""
    net, tok, settings, device = open_model(o)
    template = template_of(o)
    prompt = fill(template, o.prompt)
    start = tok.bos + tok.encode(prompt)
    max_new = min(o.max_new or 256, net.config.max_len - len(start))
    print(f"template {template}, temperature {o.temperature}, top_p {o.top_p}, seed {o.seed}\n")
    (ids,) = net.generate([start], max_new, o.temperature, o.top_p, tok.eos, o.seed)
    print(prompt + tok.decode(ids))


def merge(o):
    """Fold a run's adapter into its weights and save them as a Hugging Face folder."""
    if not (o.run and o.out):
        raise ValueError("merge needs --run=FOLDER and --out=FOLDER")
    if os.path.exists(os.path.join(o.out, "config.json")):
        raise ValueError(f"--out={o.out} already holds a model; choose another folder")
    net, tok, settings, device = open_model(o)
    ids = torch.tensor([tok.bos + tok.encode(PASSAGE)], device=device)
    with torch.no_grad():
        apart = net(ids).float()
        count = balora.merge(net)
        difference = (net(ids).float() - apart).abs().max().item()
    net.save(o.out, tok)
    print(
        f"{count} layers merged in fp32 and rounded once to {str(net.head.dtype)[6:]}; largest change of a logit on a passage {difference:.2g} -> {o.out}"
    )


def curves(o):
    """Training loss and gradient norm of several runs in one figure."""
    if not o.runs:
        raise ValueError("curves needs run folders: python eval.py curves out/a out/b --out=curves.png")
    missing = [run for run in o.runs if not os.path.exists(os.path.join(run, "log.jsonl"))]
    if missing:
        raise ValueError(f"no log.jsonl in {', '.join(missing)}")
    path = o.out or "curves.png"
    plot_curves(o.runs, path)
    print(f"{len(o.runs)} runs -> {path}")


def features(o):
    """Last-layer features of dev rows under t-SNE, one panel a classifier's run, with numbers that say how apart the classes lie."""
    if not o.runs:
        raise ValueError(
            "features needs run folders of train_nlu.py: python eval.py features out/a out/b --out=features.png"
        )
    read = {run: read_features(run) for run in o.runs}
    words = next(iter(read.values()))[3]
    for run, (X, y, _, labels) in read.items():
        if labels != words:
            raise ValueError(
                f"{run} has the classes {', '.join(labels)}, {o.runs[0]} {', '.join(words)}; one figure shows one task"
            )
        if min(np.bincount(y, minlength=len(labels))) < 5:
            raise ValueError(
                f"{run}: a class with fewer than 5 dev rows ({np.bincount(y).tolist()}); too few for a probe in 5 folds"
            )
    width, numbers = max(len(os.path.basename(os.path.normpath(run))) for run in o.runs) + 2, {}
    print(
        f"{'':<{width}}{'rows':>6}{'silhouette':>12}   linear probe: "
        + "  ".join(words)
        + "   the run's own head: "
        + "  ".join(words)
    )
    for run, (X, y, predicted, labels) in read.items():
        silhouette, probe = separation(X, y)
        own = [float((predicted[y == c] == c).mean()) for c in range(len(labels))]
        numbers[run] = f"silhouette {silhouette:.2f}, probe {statistics.mean(probe):.2f}"
        cells = ["  ".join(f"{v:>{len(w)}.3f}" for v, w in zip(values, labels)) for values in (probe, own)]
        print(
            f"{os.path.basename(os.path.normpath(run)):<{width}}{len(y):>6}{silhouette:>12.4f}{'':>17}{cells[0]}{'':>23}{cells[1]}"
        )
    path = o.out or "features.png"
    plot_features(o.runs, path, numbers)
    print(f"{len(o.runs)} runs -> {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons: one training script, once a cell, each in a process of its own


def compare(o):
    """Methods side by side: `compare nlg --methods=lora,pissa --sweep_lr=1e-4,3e-4 --seeds=0,1,2 -- OPTIONS OF THE SCRIPT`.

    Every learning rate with the first seed, then the best one with the others, since one rate for all misleads; a method may have rates of its own
    (--sweep_lr="3e-4,1e-3 full=1e-5,3e-5"). What is finished is not run again.
    """
    kind, seeds, root = comparison(o, "method learning_rate")
    methods, rates = able_methods(o, kind), {}
    for part in o.sweep_lr.split():
        method, mark, values = part.rpartition("=")
        if (method or "any") in rates:
            raise ValueError(
                f"--sweep_lr={o.sweep_lr}: two lists for {method or 'all methods'}; rates are separated by commas, lists by spaces"
            )
        rates[method if mark else "any"] = listed(values)
    unknown = [m for m in rates if m not in (*balora.METHODS, "any")]
    rates = {m: rates.get(m, rates.get("any")) for m in methods}
    without = [m for m in methods if not rates[m]]
    if unknown or without:
        why = (
            f"no method {unknown[0]}; {balora.nearest(unknown[0], balora.METHODS)}"
            if unknown
            else f"no rate for {', '.join(without)}"
        )
        raise ValueError(f"--sweep_lr={o.sweep_lr}: {why}")
    options = lambda method, lr, seed: [f"--method={method}", f"--learning_rate={lr}", f"--seed={seed}"]
    cells = lambda triples: run_cells(o, kind, root, {f"{'-'.join(t)}": options(*t) for t in triples})
    first, table = cells((m, lr, seeds[0]) for m in methods for lr in rates[m]), {}
    if not any(first.values()):
        raise ValueError("compare: no run ended well; their last lines stand above")
    name = metric_of(o, kind, first)
    sign = -1 if name.startswith(LOWER_IS_BETTER) else 1
    sweep = {m: {lr: run for lr in rates[m] if (run := first[f"{m}-{lr}-{seeds[0]}"])} for m in methods}
    best = {
        m: max(runs, key=lambda lr: (sign * runs[lr][name], -runs[lr]["loss"]))
        for m, runs in sweep.items()
        if runs
    }
    others = cells((m, lr, seed) for m, lr in best.items() for seed in seeds[1:])
    for m, lr in best.items():
        runs = [sweep[m][lr], *(run for seed in seeds[1:] if (run := others[f"{m}-{lr}-{seed}"]))]
        table[m] = dict(lr=lr, runs=runs, sweep={lr: run[name] for lr, run in sweep[m].items()})
    print_comparison(table, name, seeds, root)


def listed(words):
    return list(dict.fromkeys(word for word in words.split(",") if word))


def comparison(o, own):
    """-> nlg or nlu, seeds, the folder of all cells, as a command of this section was asked. own: options of the script that the command itself sets."""
    if len(o.runs) != 1 or o.runs[0] not in ("nlg", "nlu"):
        raise ValueError(
            f"expected nlg or nlu behind the command, not {' '.join(o.runs) or 'nothing'}; then options, then -- and the script's own"
        )
    given = {word[2:].split("=")[0] for word in o.rest if word.startswith("--")}
    if clash := given & {"seed", "out_dir", "against", "resume", "overwrite", "dry_run", *own.split()}:
        raise ValueError(
            f"--{' --'.join(sorted(clash))} behind --: {o.command} sets that itself, or cannot use it"
        )
    seeds = listed(o.seeds)
    if not seeds or not all(seed.isdigit() for seed in seeds):
        raise ValueError(f"--seeds={o.seeds}: expected at least one, like 0,1,2")
    return (
        o.runs[0],
        seeds,
        o.out
        or os.path.join(
            "out", f"{o.command}-{o.runs[0]}-" + hashlib.sha256(json.dumps(o.rest).encode()).hexdigest()[:8]
        ),
    )


def able_methods(o, kind):
    able = [m for m in balora.METHODS if kind == "nlu" or m not in balora.ENCODERS_ONLY]
    methods = able if o.methods == "all" else listed(o.methods)
    unknown = [m for m in methods if m not in able]
    if unknown or not methods:
        raise ValueError(
            f"--methods={o.methods}: "
            + (balora.nearest(unknown[0], able) if unknown else "")
            + f"known for {kind}: {', '.join(able)}"
        )
    return methods


LOWER_IS_BETTER = ("loss", "drift", "passage_ppl")


def metric_of(o, kind, runs):
    """What a comparison is about: --metric, or the task's own (nlu), or the held-out loss (nlg)."""
    run = next(run for run in runs.values() if run)
    name, measured = (
        o.metric or ("loss" if kind == "nlg" else run["metric"]),
        [key for key, value in run.items() if isinstance(value, float)],
    )
    if name not in measured:
        raise ValueError(
            f"--metric={name}: {balora.nearest(name, measured)}measured were {', '.join(measured)}"
        )
    if lacking := [cell for cell, run in runs.items() if run and not isinstance(run.get(name), float)]:
        raise ValueError(
            f"--metric={name}: {', '.join(lacking[:3])} has none; leave that out, or choose another"
        )
    return name


def run_cells(o, kind, root, cells):
    """{name: options of train_KIND.py} -> {name: what the run's folder says, or None where it failed}; --jobs at a time."""
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        return dict(
            zip(
                cells,
                pool.map(lambda name: cell(kind, os.path.join(root, name), [*o.rest, *cells[name]]), cells),
            )
        )


def cell(kind, out, options):
    """Run one cell unless it is finished. -> what its folder says: last evaluation, settings, device, trainable parameters, metric, speed, time, memory; None where it failed."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"train_{kind}.py")
    options = [*options, *["--against="] * (kind == "nlu"), f"--out_dir={out}"]
    line, log = shlex.join(["python", os.path.basename(script), *options]), out + ".txt"
    if os.path.exists(os.path.join(out, "loss.png")):  # what a run writes last
        there = (
            open(log, encoding="utf-8", errors="replace").readline().rstrip()
            if os.path.exists(log)
            else f"without {log}"
        )
        if there != line:
            raise ValueError(f"{out} is a finished run of other options ({there}); choose another --out")
    else:
        print(line, flush=True)
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        start = time.time()
        with open(log, "w") as f:
            print(line, file=f, flush=True)
            code = subprocess.run(
                [sys.executable, script, *options, "--resume"], stdout=f, stderr=subprocess.STDOUT
            ).returncode
        if code:
            last = open(log, encoding="utf-8", errors="replace").read().strip().splitlines()[-1]
            print(f"  {out} failed after {time.time() - start:.0f} s (exit code {code}): {last}", flush=True)
            return None
        print(f"  {out} {time.time() - start:.0f} s", flush=True)
    record, steps = read_run(out), whole_lines(os.path.join(out, "log.jsonl"))
    return read_json(os.path.join(out, "eval.json"))[-1] | dict(
        settings=record["settings"],
        device=record["device"],
        trainable=record["trainable"],
        metric=record.get("metric", "loss"),
        speed=statistics.median(r["tokens_per_s"] for r in steps),
        seconds=sum(r["seconds"] for r in steps),
        peak=max(r["peak_GiB"] for r in steps),
    )


def print_comparison(table, name, seeds, root):
    """Each method at its best learning rate, mean ± standard deviation over seeds, time and memory beside LoRA's (or the first method's), the whole sweep beside it."""
    anchor = table.get("lora") or next(iter(table.values()))
    speed, peak = (
        (lambda row: statistics.median(run["speed"] for run in row["runs"])),
        (lambda row: max(run["peak"] for run in row["runs"])),
    )
    header = ("method", "trainable", "lr", name, "drift", "time", "memory", f"sweep (seed {seeds[0]})")
    rows = []
    for method, row in table.items():
        values, drift = ([run.get(key) for run in row["runs"]] for key in (name, "drift"))
        rows.append(
            (
                method,
                f"{row['runs'][0]['trainable']:,}",
                row["lr"],
                spread(values, seeds=seeds),
                spread(drift),
                f"{speed(anchor) / speed(row):.2f}",
                f"{peak(row) / peak(anchor):.2f}",
                ", ".join(f"{lr} {value:.4f}" for lr, value in row["sweep"].items()),
            )
        )
    print(
        f"\nseeds {', '.join(seeds)}; time a step and peak memory as ratios to {'LoRA' if 'lora' in table else next(iter(table))}; the rate is the best of the sweep "
        f"on these very rows with seed {seeds[0]}, which flatters methods with more rates"
    )
    print_columns((header, *rows), os.path.join(root, "table.txt"))


def spread(values, digits=4, seeds=()):
    """Mean ± standard deviation; how many values, where they are fewer than `seeds`."""
    if not values or None in values:
        return "none"
    deviation, fewer = (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "",
        f" (n = {len(values)})" if len(values) < len(seeds) else "",
    )
    return f"{statistics.mean(values):.{digits}f}{deviation}{fewer}"


def print_columns(rows, path):
    """Rows of words, aligned, to the terminal and a file."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows
    )
    print(text)
    balora.write_atomic(path, lambda f: f.write((text + "\n").encode()))


# Presets of it: the poster's ablation, its noise table, its efficiency table, and how much each knob matters


def run_variants(o, kind, root, seeds, variants):
    """{name: options} with every seed -> {name: {seed: run}} of what ended well, the metric. Raises ValueError where nothing did."""
    found = run_cells(
        o,
        kind,
        root,
        {
            f"{name}-{seed}": [*options, f"--seed={seed}"]
            for name, options in variants.items()
            for seed in seeds
        },
    )
    if not any(found.values()):
        raise ValueError(f"{o.command}: no run ended well; their last lines stand above")
    return {
        name: {seed: run for seed in seeds if (run := found[f"{name}-{seed}"])} for name in variants
    }, metric_of(o, kind, found)


def paired(runs, base, name):
    """Differences of a metric to `base` with the same seed."""
    return [runs[seed][name] - base[seed][name] for seed in runs if seed in base]


def with_terms(kind, *terms):
    """Options that switch the named regularizers on, at the paper's weights."""
    return [
        f"--lambda{i}={weight}"
        for i, (term, weight) in enumerate(zip(("cr", "dr", "svdr"), LAMBDAS[kind]), 1)
        if term in terms
    ]


def ablation(o):
    """PiSSA, + each regularizer, BA-LoRA; and controls: label smoothing, weight decay, dropout in place of the terms, the terms on LoRA's start.

    `ablation nlg|nlu --seeds=0,1,2 -- OPTIONS`. Label smoothing has the mean weight of L_CR's schedule, as a share of the task loss: λ̄/(1 + λ̄), λ̄ = 0.55 λ1. Dropout is 0.2 in
    encoders, which have 0.1 as published, and 0.1 in a LLaMA, which has none; weight decay 0.3.
    """
    kind, seeds, root = comparison(o, "method lambda1 lambda2 lambda3 label_smoothing")
    weight = 0.55 * LAMBDAS[kind][0]
    pissa, lora = ["--method=pissa"], ["--method=lora"]
    variants = (
        {"pissa": pissa}
        | {f"pissa+{term}": pissa + with_terms(kind, term) for term in ("cr", "dr", "svdr")}
        | {
            "balora": ["--method=balora"],
            "pissa+smoothing": [*pissa, f"--label_smoothing={weight / (1 + weight):.4f}"],
            "pissa+decay": [*pissa, "--weight_decay=0.3"],
            "pissa+dropout": [
                *pissa,
                *(["--dropout=0.2", "--cls_dropout=0.2"] if kind == "nlu" else ["--dropout=0.1"]),
            ],
            "lora": lora,
            "lora+terms": lora + with_terms(kind, "cr", "dr", "svdr"),
        }
    )
    found, name = run_variants(o, kind, root, seeds, variants)
    rows, gains = [("", name, "against PiSSA, paired", "seeds above", "drift", "against PiSSA, paired")], {}
    for variant, runs in found.items():
        drift = [run.get("drift") for run in runs.values()]
        row = [variant, spread([run[name] for run in runs.values()], seeds=seeds), "", "", spread(drift), ""]
        if variant != "pissa":
            gains[variant] = paired(runs, found["pissa"], name)
            row[2:4] = (
                spread(gains[variant]),
                f"{sum(g > 0 for g in gains[variant])} of {len(gains[variant])}",
            )
            row[5] = spread(paired(runs, found["pissa"], "drift")) if None not in drift else ""
        rows.append(row)
    print(
        f"\nseeds {', '.join(seeds)}; {rows[0][1]}: {'lower' if name.startswith(LOWER_IS_BETTER) else 'higher'} is better"
    )
    print_columns(rows, os.path.join(root, "table.txt"))
    plot_gains(gains, name, os.path.join(root, "ablation.png"))


def noise(o):
    """The gain of BA-LoRA against inherited noise, everything else equal: tiny pre-trained at each level of --levels. `noise nlg|nlu --seeds=0,1,2,3,4 -- OPTIONS`.

    --inits=roberta-base,t5-base compares models in place of levels, as the poster does (which confounds noise with architecture). The slope of the gain
    against the level is least squares over all pairs, with a 95 % interval.
    """
    kind, seeds, root = comparison(o, "method init pretrain_noise")
    levels, methods = listed(o.inits or o.levels), ("lora", "pissa", "balora")
    option = "init" if o.inits else "pretrain_noise"
    found, name = run_variants(
        o,
        kind,
        root,
        seeds,
        {f"{m}-{level}": [f"--method={m}", f"--{option}={level}"] for level in levels for m in methods},
    )
    rows, gains = (
        [("", *(f"{option} {level}" for level in levels), *(f"drift at {level}" for level in levels))],
        {},
    )
    for m in methods:
        values = lambda key: [
            spread([run.get(key) for run in found[f"{m}-{level}"].values()], seeds=seeds) for level in levels
        ]
        rows.append((m, *values(name), *values("drift")))
    for other in ("pissa", "lora"):
        gains[other] = {
            level: paired(found[f"balora-{level}"], found[f"{other}-{level}"], name) for level in levels
        }
        rows.append(
            (
                f"balora - {other}, paired",
                *(spread(values) for values in gains[other].values()),
                *[""] * len(levels),
            )
        )
    print(f"\nseeds {', '.join(seeds)}; {name}")
    print_columns(rows, os.path.join(root, "table.txt"))
    if not o.inits:
        for other, by_level in gains.items():
            print(f"gain over {other}: {slope(by_level, name)}")
        plot_noise(gains, name, os.path.join(root, "noise.png"))


def slope(by_level, name):
    """{level: gains} -> words: the least-squares slope of gain against level with its 95 % interval."""
    from scipy import stats

    points = [(float(level), gain) for level, gains in by_level.items() for gain in gains]
    if len(points) < 3 or len({level for level, _ in points}) < 2:
        return "too few runs for a slope"
    if len({gain for _, gain in points}) == 1:
        return f"{points[0][1]:+.3f} {name} in every pair, so no slope"
    fit = stats.linregress(*zip(*points))
    half = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
    return f"slope {fit.slope:+.3f} {name} a unit of noise, 95 % interval {fit.slope - half:+.3f} to {fit.slope + half:+.3f} ({len(points)} pairs)"


FACTORS = dict(
    lambda1=5, lambda2=5, lambda3=5, T=2, K=4, k=5, r=2
)  # a knob is divided and multiplied by its factor


def sensitivity(o):
    """BA-LoRA's knobs one at a time, each at its default divided and multiplied by its factor (FACTORS). `sensitivity nlg|nlu --seeds=0,1,2 -- OPTIONS`."""
    kind, seeds, root = comparison(o, "method")
    found, name = run_variants(o, kind, root, seeds, {"balora": ["--method=balora"]})
    settings, values, variants = next(iter(found["balora"].values()))["settings"], {}, {}
    for knob, factor in FACTORS.items():
        if knob in settings:
            middle = settings[knob]
            scaled = (middle / factor, middle * factor)
            values[knob] = (
                [max(1, round(v)) for v in scaled]
                if isinstance(middle, int)
                else [float(f"{v:.4g}") for v in scaled]
            )
            variants |= {
                f"{knob}={v}": [
                    "--method=balora",
                    f"--{knob}={v}",
                    *[f"--alpha={v * settings['alpha'] / settings['r']:g}"] * (knob == "r"),
                ]
                for v in values[knob]
            }
    more, _ = run_variants(o, kind, root, seeds, variants)
    rows, curves = [("", name, "against the default, paired", "drift")], {}
    for variant, runs in (found | more).items():
        rows.append(
            (
                variant,
                spread([run[name] for run in runs.values()], seeds=seeds),
                spread(paired(runs, found["balora"], name)) if variant != "balora" else "",
                spread([run.get("drift") for run in runs.values()]),
            )
        )
    for knob, (low, high) in values.items():
        points = {low: more[f"{knob}={low}"], settings[knob]: found["balora"], high: more[f"{knob}={high}"]}
        curves[knob] = {x: paired(runs, found["balora"], name) for x, runs in points.items()}
    print(
        f"\nseeds {', '.join(seeds)}; the default has {', '.join(f'{knob} {settings[knob]:g}' for knob in values)}"
    )
    print_columns(rows, os.path.join(root, "table.txt"))
    plot_sensitivity(curves, name, os.path.join(root, "sensitivity.png"))


def efficiency(o):
    """The poster's efficiency table: peak memory, time, metric of --methods. `efficiency nlg --methods=full,lora,pissa,balora -- OPTIONS`.

    Time is that of all steps, without initialisation and the NLU teacher's one pass over the training rows.
    """
    kind, seeds, root = comparison(o, "method")
    methods = ("full", "lora", "pissa", "balora") if o.methods == "all" else able_methods(o, kind)
    found, name = run_variants(o, kind, root, seeds, {m: [f"--method={m}"] for m in methods})
    ended = {m: list(runs.values()) for m, runs in found.items() if runs}
    anchor = ended.get("lora") or next(iter(ended.values()))
    peak, seconds = (
        (lambda runs: max(run["peak"] for run in runs)),
        (lambda runs: statistics.median(run["seconds"] for run in runs)),
    )
    rows = [("", "peak GiB", "ratio", "all steps, min", "ratio", name)]
    rows += [
        (
            m,
            f"{peak(runs):.2f}",
            f"{peak(runs) / peak(anchor):.2f}",
            f"{seconds(runs) / 60:.1f}",
            f"{seconds(runs) / seconds(anchor):.2f}",
            spread([run[name] for run in runs], seeds=seeds),
        )
        for m, runs in ended.items()
    ]
    print(
        f"\nseeds {', '.join(seeds)}; ratios to {'lora' if 'lora' in ended else next(iter(ended))}; {anchor[0]['device']}"
        + (f"; {o.jobs} runs at a time, so times mean little" if o.jobs > 1 else "")
    )
    print_columns(rows, os.path.join(root, "table.txt"))


# ---------------------------------------------------------------------------------------------------------------------
# The poster's tables from run folders

POSTER = {  # as printed: benchmarks, then mean±deviation of each method; "table --poster" sets them beside ours
    "nlg": """gsm8k math humaneval mbpp mtbench
full 48.9±0.49 7.48±0.22 20.52±0.29 23.64±0.38 4.85±0.09
lora 42.68±0.54 5.92±0.15 16.80±0.38 21.51±0.43 4.60±0.14
adalora 41.95±0.90 6.24±0.38 18.10±0.46 20.19±0.71 4.79±0.18
dora 41.77±0.74 6.20±0.48 16.86±0.54 21.60±0.49 4.48±0.14
milora 43.09±1.16 6.31±0.39 17.55±0.24 20.22±0.37 4.50±0.17
lora+ 47.84±0.39 7.21±0.49 20.07±0.38 23.69±0.29 5.11±0.06
lora-fa 40.25±0.46 5.66±0.47 15.91±0.41 20.01±0.32 4.67±0.12
lora-ga 50.47±0.98 7.13±0.44 19.44±0.45 23.05±0.40 5.04±0.10
pissa 51.48±0.34 7.60±0.18 19.48±0.45 23.84±0.46 4.92±0.07
corda 53.90±0.56 8.52±0.27 21.03±0.37 24.15±0.44 5.15±0.09
corda++ 55.03±0.52 8.95±0.37 21.76±0.39 24.74±0.47 5.64±0.12
balora 55.86±0.35 9.47±0.52 23.58±0.25 36.86±0.31 5.11±0.05
pissa+cr 54.25±0.59 9.15±0.25
pissa+dr 53.60±0.46 8.95±0.18
pissa+svdr 52.95±0.55 8.70±0.22""",
    "nlu": """mnli sst2 mrpc cola qnli qqp rte stsb
full 90.34±0.18 96.33±0.11 89.95±1.07 71.43±0.72 94.24±0.10 92.11±0.28 83.75±1.81 91.04±0.48
bitfit 89.54±0.29 94.68±0.11 87.95±1.33 67.31±0.49 92.45±0.17 88.72±0.45 79.12±0.39 91.63±0.37
hadapter 90.23±0.07 95.38±0.06 89.97±0.27 68.73±0.27 94.31±0.29 91.99±0.28 84.76±0.39 91.58±0.13
padapter 90.42±0.36 95.49±0.10 89.71±0.35 69.04±0.10 94.38±0.26 92.15±0.43 85.53±0.18 91.69±0.13
lora 90.71±0.16 94.79±0.16 89.85±0.21 70.05±0.34 93.94±0.09 92.07±0.48 85.43±0.09 91.67±0.29
dora 90.48±0.10 95.85±0.08 91.04±0.15 71.03±0.18 94.21±0.37 92.34±0.16 86.19±0.25 91.92±0.38
adalora 90.87±0.08 96.18±0.43 90.81±0.40 71.64±0.12 94.68±0.46 92.37±0.35 87.78±0.36 91.97±0.43
pissa 90.47±0.44 95.81±0.45 91.48±0.49 72.27±0.29 94.41±0.41 92.21±0.26 87.14±0.08 91.93±0.25
balora 91.26±0.49 96.25±0.09 92.11±0.55 75.46±0.62 95.35±0.14 93.63±0.52 88.58±0.73 92.71±0.38""",
    "roberta-base": """mnli sst2 cola qnli mrpc
lora 85.63±0.01 94.03±0.02 62.40±0.71 91.37±0.97 87.98±0.23
pissa 85.72±0.40 93.64±0.13 67.28±0.59 91.40±0.54 88.11±0.24
balora 86.59±0.58 94.83±0.45 67.91±0.21 92.28±0.37 90.07±0.32""",
    "t5-base": """mnli sst2 cola qnli mrpc
lora 85.30±0.04 94.04±0.11 69.35±0.05 92.96±0.09 68.38±0.01
pissa 85.75±0.07 94.07±0.06 74.27±0.39 93.15±0.14 76.31±0.51
balora 86.91±0.48 95.20±0.29 80.19±1.03 94.12±0.32 83.43±0.71""",
}


def poster_values(which):
    """-> the benchmarks of one of the poster's tables, {method: {benchmark: words}}"""
    names, *rows = (line.split() for line in POSTER[which].splitlines())
    return names, {method: dict(zip(names, values)) for method, *values in rows}


def variant(settings):
    """What a run is called in a table: its method, and the terms it has beyond (balora: short of) its own."""
    terms = [term for term, i in (("cr", 1), ("dr", 2), ("svdr", 3)) if settings[f"lambda{i}"]]
    if settings["method"] == "balora":
        return "balora" if len(terms) == 3 else "+".join(["pissa", *terms])
    return "+".join([settings["method"], *terms])


def run_scores(run, record):
    """{benchmark: (score, what was asked)} of a run folder: of a classifier its task's metric at the last evaluation, otherwise what the benchmarks left there; in %, MT-Bench 1-10.

    Answers of another adapter than the folder's, and files that are not complete, are left out, and named.
    """
    if "task" in record["settings"]:
        if "metric" not in record:
            raise ValueError(
                f"{run}: its config.json names no metric; it was made by an older version, run it anew"
            )
        return {
            record["settings"]["task"]: (
                100 * read_json(os.path.join(run, "eval.json"))[-1][record["metric"]],
                "",
            )
        }
    found, lines_of = {}, lambda name: whole_lines(os.path.join(run, f"{name}.jsonl"))
    adapter = file_hash(os.path.join(run, "adapter", "adapter_model.safetensors"))
    for name, file, hit in (
        ("gsm8k", "gsm8k", same_number),
        ("math", "math", same_form),
        *((n, f"{n}-results", lambda line: line["passed"]) for n in ("humaneval", "mbpp")),
    ):
        if lines := lines_of(file):
            asked, done = lines_of(name)[:1] or [{}], len(lines) - 1
            why = (
                "answers of another adapter"
                if asked[0].get("adapter") != adapter
                else f"{done} of {lines[0].get('items')} items"
                if done != lines[0].get("items")
                else ""
            )
            if why:
                print(f"{run}: {file}.jsonl left out ({why})")
            else:
                found[name] = 100 * statistics.mean(map(hit, lines[1:])), asked[0]["prompts"]
    judged = sorted(
        name.removesuffix(".jsonl")
        for name in os.listdir(run)
        if name.startswith("mtbench-") and name.endswith("_single.jsonl")
    )
    if len(judged) > 1:
        raise ValueError(f"{run}: ratings of several judges, {', '.join(judged)}; keep those of one there")
    for file in judged:
        lines, turns = lines_of(file), 2 * len(lines_of("mtbench"))
        if len(lines) < turns:
            print(f"{run}: {file}.jsonl left out ({len(lines)} of {turns} turns are rated)")
        elif ratings := [line["score"] for line in lines if line["score"] != -1]:
            found["mtbench"] = statistics.mean(ratings), lines[0]["judge"][0]
    return found


def same_but_seed(a, b):
    """The first thing in which the records of two runs differ, other than the seed, as words; "" where they are one cell of a table."""
    settings = [
        record["settings"]
        | ({"weights": record["weights_hash"]} if record["settings"]["init"] != "tiny" else {})
        for record in (a, b)
    ]
    return next(
        (
            f"{k} {settings[0].get(k)} and {settings[1].get(k)}"
            for k in settings[0] | settings[1]
            if k not in (*FREE, "seed") and settings[0].get(k) != settings[1].get(k)
        ),
        "",
    )


def table_cells(runs):
    """Run folders -> nlg or nlu, {((init, variant), benchmark): {seed: (score, run)}}, {(init, variant): trainable parameters}. Only finished, like runs share a cell."""
    ended = [run for run in runs if os.path.exists(os.path.join(run, "loss.png"))]  # what a run writes last
    records = {run: read_run(run) for run in ended}
    if not records:
        raise ValueError(
            f"table: no finished run among {' '.join(runs) or 'nothing'}; expected run folders: python eval.py table out/*"
        )
    for run in runs:
        if run not in records:
            print(f"{run}: not a finished run; left out")
    kinds = {"nlu" if "task" in record["settings"] else "nlg" for record in records.values()}
    if len(kinds) > 1:
        raise ValueError(
            "table: runs of train_nlg.py and of train_nlu.py have no benchmark in common; give the ones, then the others"
        )
    kind, cells, params, asked = kinds.pop(), {}, {}, {}
    for run, record in records.items():
        key, seed = (
            (os.path.basename(os.path.normpath(record["settings"]["init"])), variant(record["settings"])),
            record["settings"]["seed"],
        )
        params[key] = record.get("trainable")
        for name, (score, prompts) in run_scores(run, record).items():
            if asked.setdefault(name, (prompts, run))[0] != prompts:
                raise ValueError(
                    f"table: {asked[name][1]} and {run} answered other {name} items, or in another template, or had another judge"
                )
            others = cells.setdefault((key, name), {})
            for other_seed, (_, other) in others.items():
                if seed == other_seed or (differ := same_but_seed(records[other], record)):
                    raise ValueError(
                        f"table: {other} and {run} are both {key[1]} on {name}, with "
                        + (f"seed {seed}" if seed == other_seed else differ)
                        + "; give one of them"
                    )
            others[seed] = score, run
    return kind, cells, params


def table(o):
    """The poster's tables from run folders: methods x benchmarks, mean ± deviation over seeds, parameters, average, best in bold. `table out/* --poster`."""
    kind, cells, params = table_cells(o.runs)
    inits = list(dict.fromkeys(init for init, _ in params))
    known = poster_values(inits[0] if all(init in POSTER for init in inits) else kind)[
        0
    ]  # RoBERTa's and T5's tables have five of the eight tasks
    names = [n for n in known if o.poster or any(name == n for _, name in cells)] + sorted(
        {n for _, n in cells} - set(known)
    )
    if not names:
        raise ValueError(
            "table: these runs have no benchmark's results yet (python eval.py gsm8k --run=..., math, humaneval, mbpp, mtbench and judge)"
        )
    means = {at: statistics.mean(score for score, _ in by_seed.values()) for at, by_seed in cells.items()}
    lines = [["", "trainable", *names, "average"], ["---"] + ["---:"] * (len(names) + 2)]
    for init in inits:
        lines += [[f"**{init}**"] + [""] * (len(names) + 2)] * (len(inits) > 1)
        keys = [key for key in params if key[0] == init]
        average = {
            key: statistics.mean(means[key, n] for n in names)
            for key in keys
            if all((key, n) in means for n in names)
        }
        best = {n: max((means[key, n] for key in keys if (key, n) in means), default=None) for n in names} | {
            "average": max(average.values(), default=None)
        }
        bold = lambda text, value, name: f"**{text}**" if value == best[name] and len(keys) > 1 else text
        theirs = poster_values(init if init in POSTER else kind)[1]
        for key in keys:
            row = [key[1], f"{params[key]:,}" if params[key] else "-"]
            for n in names:
                values = [score for score, _ in cells.get((key, n), {}).values()]
                text = bold(spread(values, 2), means[key, n], n) if values else "-"
                row.append(text + (f" ({theirs.get(key[1], {}).get(n, '-')})" if o.poster else ""))
            lines.append(
                [*row, bold(f"{average[key]:.2f}", average[key], "average") if key in average else "-"]
            )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    missing = sum((key, n) not in means for key in params for n in names)
    print(
        text
        + (f"\n\n{missing} cells of {len(params) * len(names)} have no run (-)" if missing else "")
        + ("\n(in brackets: the poster)" if o.poster else "")
    )
    path = o.out or "table.md"
    balora.write_atomic(path, lambda f: f.write((text + "\n").encode()))
    print(f"-> {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory, beside peft + transformers and beside the authors' formulation on that stack

CONTESTANTS = {
    "pissa": "PiSSA, this project",
    "balora": "BA-LoRA, this project",
    "balora-quarter": "BA-LoRA, this project, --consistency_rate=0.25",
    "balora-cr": "PiSSA + CR, this project",
    "balora-dr": "PiSSA + DR, this project",
    "balora-svdr": "PiSSA + SVDR, this project",
    "pissa-peft": "PiSSA, peft + transformers",
    "balora-authors": "BA-LoRA, the authors' formulation on peft + transformers",
}
METHOD_STEPS = (
    "full",
    "lora",
    "lora-fa",
    "adalora",
    "dora",
    "pissa",
    "balora",
)  # --only=methods; the other methods differ from these at the start alone


def bench(o):
    """Time a training step of each contestant, alternating, every one in a process of its own; median step time and peak memory as ratios."""
    device = pick_device(o.device)
    titles = {name: f"{name}, this project" for name in METHOD_STEPS} | CONTESTANTS
    names = list(METHOD_STEPS) if o.only == "methods" else o.only.split(",") if o.only else list(CONTESTANTS)
    unknown = [n for n in names if n not in titles]
    if unknown:
        raise ValueError(
            f"--only={','.join(unknown)}: known are methods (all of {', '.join(METHOD_STEPS)}), {', '.join(titles)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        net, tok = model.load(o.init, dtype=torch.bfloat16)
        net.save(folder, tok)
        del net
        print(
            f"{o.rows} x {o.length} tokens, half of them prompt; r={o.r}, bfloat16, {device_name(device)}; {o.steps} timed steps each, alternating"
            + ("; blocks of this project compiled" if o.compile else ""),
            flush=True,
        )
        workers, times, start_up = {}, {name: [] for name in names}, {}
        for name in names:
            args = [
                sys.executable,
                os.path.abspath(__file__),
                "bench-worker",
                f"--only={name}",
                f"--init={folder}",
                f"--rows={o.rows}",
                f"--length={o.length}",
                f"--r={o.r}",
                f"--device={device}",
                f"--compile={o.compile}",
            ]
            workers[name] = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            start_up[name] = ask(workers[name], name, "step")[
                "seconds"
            ]  # the first step compiles and allocates
            ask(workers[name], name, "step")
        for _ in tqdm(range(o.steps), desc="rounds", unit="round"):
            for name in names:
                times[name].append(ask(workers[name], name, "step")["seconds"])
        peaks = {name: ask(workers[name], name, "quit")["peak_GiB"] for name in names}
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f"\n{'':<58}{'step s':>8}{'spread':>14}{'GiB':>7}{'first s':>9}")
    for name in names:
        print(
            f"{titles[name]:<58}{medians[name]:>8.3f}{min(times[name]):>7.2f}-{max(times[name]):<6.2f}{peaks[name]:>7.2f}{start_up[name]:>9.1f}"
        )
    print()
    pairs = [(name, "lora") for name in names if "lora" in names and name != "lora"]
    for name, other in (
        *pairs,
        ("balora", "balora-authors"),
        ("pissa", "pissa-peft"),
        ("balora", "pissa"),
        ("balora-quarter", "pissa"),
        ("balora-cr", "pissa"),
        ("balora-dr", "pissa"),
        ("balora-svdr", "pissa"),
    ):
        if name in names and other in names:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[other]))
            print(
                f"{titles[name]} / {titles[other]}: time {ratio:.2f}, memory {peaks[name] / peaks[other]:.2f}"
            )


def ask(worker, name, word):
    worker.stdin.write(word + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise ValueError(f"bench: {name} stopped (exit code {worker.wait()}), its message stands above")
    return json.loads(line)


def bench_worker(o):
    """One contestant: a training step for each "step" read from stdin, its time as JSON on stdout."""
    say, sys.stdout = sys.stdout, sys.stderr
    torch.manual_seed(0)
    ids = torch.randint(10, 40000, (o.rows, o.length), device=o.device)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    valid[:, o.length // 2 - 1 : -1] = True
    step = (peft_step if o.only.endswith(("peft", "authors")) else our_step)(o, ids, valid)
    for line in sys.stdin:
        if line.strip() == "quit":
            say.write(json.dumps({"peak_GiB": peak_memory(o.device)}) + "\n")
            return
        start = time.perf_counter()
        step()
        if o.device.startswith("cuda"):
            torch.cuda.synchronize()
        say.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
        say.flush()


def our_step(o, ids, valid):
    method = o.only if o.only in METHOD_STEPS else "pissa"  # balora-... are PiSSA with some of the terms
    full = method == "full"
    net, tok = model.load(o.init, dtype=torch.float32 if full else torch.bfloat16, device=o.device)
    balora.attach(net, method, r=o.r)
    net.autocast = torch.bfloat16 if full else None
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=2e-5, fused=o.device.startswith("cuda")
    )
    y, l, steps = ids.roll(-1, 1)[valid], LAMBDAS["nlg"], 0
    E, R = (None, None) if full else (net.head, balora.head_factor(net.head))
    lambdas = {
        "balora": l,
        "balora-quarter": l,
        "balora-cr": (l[0], 0, 0),
        "balora-dr": (0, l[1], 0),
        "balora-svdr": (0, 0, l[2]),
    }.get(o.only, (0, 0, 0))
    taught = 0 if not lambdas[0] else max(1, o.rows // 4) if o.only == "balora-quarter" else o.rows
    if o.compile:
        net.compile_blocks()
    net.train()

    def step():
        nonlocal steps
        H_P = None
        if taught:
            with balora.teacher(net):
                H_P = net.hidden(ids[:taught])[valid[:taught]]
        H_F = net.hidden(ids)[valid]
        H_F = F.linear(H_F, net.head) if full else H_F  # a head that trains: logits, as in train_nlg.py
        total, _ = balora.loss_nlg(
            H_F, y, E, H_P, lambdas, cr_scale=o.rows / max(taught, 1), R=R, compile=o.compile
        )
        total.backward()
        if method == "adalora":
            (0.1 * balora.orthogonality(net)).backward()
        optimizer.step()
        if method == "adalora":
            balora.allocate(net, steps, 1000, o.r, 100, 300, 10)
        optimizer.zero_grad(set_to_none=True)
        steps += 1

    return step


def peft_stack(o, folder=None):
    """-> load() of the bf16 model in transformers, wrap(model) with peft's fast PiSSA."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise ValueError(
            f"this benchmark compares with peft and transformers, and {e.name} is missing: pip install -r tests/requirements.txt"
        ) from None
    config = LoraConfig(
        r=o.r, lora_alpha=o.r, init_lora_weights="pissa_niter_16", target_modules=list(balora.TARGETS)
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder or o.init, dtype=torch.bfloat16
    ), lambda net: get_peft_model(net, config)


def peft_step(o, ids, valid):
    """transformers + peft as Trainer(bf16=True) runs them. "authors": a second model as teacher, full-vocabulary logits at all positions, three terms."""
    load, wrap = peft_stack(o)
    net = wrap(load().to(o.device))
    copy = load().to(o.device).eval().requires_grad_(False) if o.only == "balora-authors" else None
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=2e-5, fused=o.device.startswith("cuda")
    )
    labels = torch.where(valid.roll(1, 1), ids, -100)
    net.train()

    def step():
        with torch.autocast(ids.device.type, torch.bfloat16):
            out = net(input_ids=ids, labels=labels)
            total = out.loss
            if copy is not None:
                with torch.no_grad():
                    Z_P = copy(input_ids=ids).logits
                Z_P, Z_F = Z_P[labels != -100].float(), out.logits[labels != -100].float()
                kl = (
                    F.kl_div(F.log_softmax(Z_F / 2.0, -1), F.softmax(Z_P / 2.0, -1), reduction="none")
                    .sum(-1)
                    .mean()
                    * 4.0
                )
                top = F.softmax(Z_F.topk(20, dim=-1).values, -1)
                sigma = torch.svd_lowrank(Z_F, q=15, niter=2)[1]
                total = (
                    total
                    + 0.025 * kl
                    + 0.005 * (top * top.log()).sum(-1).mean()
                    - 0.005 * sigma[:10].sum() / Z_F.norm()
                )
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_init(o):
    """PiSSA initialisation of every targeted layer: time and residual error, here and in peft's pissa_niter_16, alternating."""
    times, errors = {"this project": [], "peft": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        load, wrap = peft_stack(o, folder)
        model.load(o.init, dtype=torch.bfloat16)[0].save(folder, model.Bytes())  # no text is read
        for _ in range(o.steps):
            net, _ = model.load(folder, say=lambda *_: None)
            start = time.perf_counter()
            balora.attach(net, "pissa", r=o.r)
            times["this project"].append(time.perf_counter() - start)
            theirs = load()
            start = time.perf_counter()
            theirs = wrap(theirs)
            times["peft"].append(time.perf_counter() - start)
        square = lambda W, B, A: (W.float() - B.float() @ A.float()).square().sum().item()
        layers = balora.adapted_layers(net)
        other = {
            name: theirs.get_submodule(f"base_model.model.{net.checkpoint_name(name)}") for name in layers
        }
        errors["this project"] = sum(square(m.weight, m.s * m.B0, m.A0) for m in layers.values())
        with torch.no_grad():
            errors["peft"] = sum(
                square(m.weight, other[name].lora_B["default"].weight, other[name].lora_A["default"].weight)
                for name, m in layers.items()
            )
        best = sum(
            torch.linalg.svdvals(m.weight.float())[o.r :].square().sum().item() for m in layers.values()
        )
    for name, t in times.items():
        print(
            f"{name:<14} {statistics.median(t):.2f} s (of {len(t)}: {min(t):.2f}-{max(t):.2f}), residual {100 * (errors[name] / best - 1):.3f} % above the exact SVD's"
        )
    print(
        f"time ratio {statistics.median(a / b for a, b in zip(*times.values())):.2f} for {len(layers)} layers at r={o.r}"
    )


def bench_encoder(o):
    """DeBERTa-v3-base's sizes with random weights, forward and backward of every weight: time here and in transformers, alternating in one process."""
    try:
        from transformers import DebertaV2ForSequenceClassification
    except ImportError:
        raise ValueError(
            "this benchmark compares with transformers, which is missing: pip install -r tests/requirements.txt"
        ) from None
    device, times, nets = pick_device(o.device), {"this project": [], "transformers": []}, {}
    dtype = pick_dtype(o.dtype, device)
    config = dataclasses.replace(model.PUBLISHED["deberta-v3-base"], dropout=0.0)
    net = model.Transformer(config, 2)
    model.init_weights(net, 0)
    with tempfile.TemporaryDirectory() as folder:
        net.save(folder)
        nets["transformers"] = DebertaV2ForSequenceClassification.from_pretrained(folder, dtype=dtype).to(
            device
        )
        nets["this project"] = net.to(device, dtype)
    ids = torch.randint(
        10, config.vocab_size, (o.rows, o.length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    mask = (
        torch.arange(o.length, device=device)
        < torch.linspace(o.length / 2, o.length, o.rows, device=device)[:, None]
    )
    run = {
        "this project": lambda net: net(ids, mask),
        "transformers": lambda net: net(input_ids=ids, attention_mask=mask.long()).logits,
    }
    for step in tqdm(range(o.steps + 1), desc="rounds", unit="round"):  # the first one warms up
        for name, net in nets.items():
            net.train()
            start = time.perf_counter()
            run[name](net).float().sum().backward()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] if step else []
            net.zero_grad(set_to_none=True)
    for name, t in times.items():
        print(f"{name:<14} {statistics.median(t):.3f} s ({min(t):.2f}-{max(t):.2f} of {len(t)})")
    print(
        f"{o.rows} x {o.length} tokens, {str(dtype)[6:]}, {device_name(device)}: ratio {statistics.median(a / b for a, b in zip(*times.values())):.2f}"
    )


def bench_generate(o):
    """Greedy answers to the prompts of --data: tokens/s of `generate` here and in transformers, the same prompts, as many rows at a time, alternating in one process."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError(
            "this benchmark compares with transformers, which is missing: pip install -r tests/requirements.txt"
        ) from None
    max_new = o.max_new or 256
    device, times, counts, answers = pick_device(o.device), {"this project": [], "transformers": []}, {}, {}
    net, tok = model.load(o.init, pick_dtype(o.dtype, device), device)
    with tempfile.TemporaryDirectory() as folder:
        net.save(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=net.head.dtype).to(device).eval()
    prompts = [tok.bos + tok.encode(fill(o.template, *row[:2])) for row in rows_of(o)]
    batches = batches_by_length([(p, ()) for p in prompts], o.batch_size)

    def ours(max_new):
        return net.generate(prompts, max_new, eos=tok.eos, rows=o.batch_size)

    def other(max_new):
        out = [None] * len(prompts)
        for rows in batches:
            L = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[tok.eos] * (L - len(prompts[i])) + prompts[i] for i in rows], device=device)
            mask = torch.tensor(
                [[0] * (L - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device
            )
            made = theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new,
                do_sample=False,
                eos_token_id=tok.eos,
                pad_token_id=tok.eos,
            )[:, L:].tolist()
            for i, row in zip(rows, made):
                out[i] = row[: row.index(tok.eos)] if tok.eos in row else row
        return out

    for step in tqdm(
        range(o.steps + 1), desc="rounds", unit="round"
    ):  # the first one, of two tokens, warms up
        for name, write in (("this project", ours), ("transformers", other)):
            start = time.perf_counter()
            with torch.no_grad():
                answers[name] = write(max_new if step else 2)
            times[name] += [time.perf_counter() - start] if step else []
            counts[name] = sum(map(len, answers[name]))
    for name, t in times.items():
        print(
            f"{name:<14} {counts[name] / statistics.median(t):.1f} tokens/s: {counts[name]} in {statistics.median(t):.2f} s ({min(t):.2f}-{max(t):.2f} of {len(t)})"
        )
    same = sum(a == b for a, b in zip(*answers.values()))
    ratio = statistics.median(
        (counts["this project"] / a) / (counts["transformers"] / b) for a, b in zip(*times.values())
    )
    print(
        f"{len(prompts)} prompts, {o.batch_size} rows at a time, at most {max_new} new tokens, {str(net.head.dtype)[6:]}, {device_name(device)}: "
        f"{same} of {len(prompts)} answers the same; ratio of tokens/s {ratio:.2f}"
    )


def precision(o):
    """How well a small update survives in bf16: the bracket as computed here, and A, B cast whole as residual-form PiSSA does under autocast."""
    net, tok = model.load(o.init, dtype=torch.bfloat16)
    balora.attach(net, "pissa", r=o.r)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-5)
    ids, inputs = torch.tensor([tok.bos + tok.encode(PASSAGE)]), {}
    rng, start = torch.Generator().manual_seed(0), {}
    for name, m in balora.adapted_layers(net).items():
        start[name] = balora.init_pissa(
            m.weight, o.r, m.s, rng
        )  # the fp32 factors that a residual-form trainer keeps
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0].detach()[0]))
    rows = []
    for step in tqdm(range(1, o.steps + 1), desc="steps of AdamW at lr 2e-5", unit="step"):
        F.cross_entropy(net(ids)[0, :-1].float(), ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 2, 5, 10, 20, 50, 100, 200, 500) or step == o.steps:
            rows.append((step, *survival(balora.adapted_layers(net), start, inputs)))
    print(
        f"\n{'step':>5}{'offset form: error':>20}{'residual form: error':>22}{'offset: kept':>14}{'residual: kept':>16}"
    )
    for row in rows:
        print(f"{row[0]:>5}{100 * row[1]:>18.2f} %{100 * row[2]:>20.1f} %{row[3]:>14.3f}{row[4]:>16.3f}")
    path = o.out or "precision.png"
    plot_precision(rows, path)
    print(f"-> {path}")


@torch.no_grad()
def survival(layers, start, inputs):
    """What the same ΔA, ΔB give in bf16, summed over layers: (error of the offset form, of the residual form, part kept by the one, by the other).

    Error is relative to the exact output of the update; the part kept is the component along it, 1 where nothing is lost.
    """
    sums = dict.fromkeys(("offset", "residual"), (0.0, 0.0, 0.0))  # Σ (got - exact)², Σ got · exact, Σ exact²
    for name, m in layers.items():
        x, (A0, B0), s = inputs[name], start[name], m.s
        A, B = A0 + (m.A - m.A0), B0 + (m.B - m.B0)
        product = lambda A, B: s * F.linear(F.linear(x, A.bfloat16()), B.bfloat16()).double()
        twoB, twoA = m.bracket()
        pairs = {
            "offset": (product(twoA, twoB / s), (twoB.double() @ twoA.double())),
            "residual": (
                product(A, B) - product(A0, B0),
                s * (B.double() @ A.double() - B0.double() @ A0.double()),
            ),
        }
        for form, (got, update) in pairs.items():
            exact = x.double() @ update.T
            sums[form] = tuple(
                t + u.item()
                for t, u in zip(
                    sums[form], ((got - exact).square().sum(), (got * exact).sum(), exact.square().sum())
                )
            )
    error, kept = (
        {form: f(*v) for form, v in sums.items()}
        for f in (lambda d, a, e: math.sqrt(d / e), lambda d, a, e: a / e)
    )
    return error["offset"], error["residual"], kept["offset"], kept["residual"]


def plot_precision(rows, path):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for column, label, colour in (
        (2, "residual form: A, B cast whole (peft under autocast)", COLOURS[1]),
        (1, "offset form: [ΔB B0] [A; ΔA] cast (here)", COLOURS[0]),
    ):
        ax.loglog([r[0] for r in rows], [100 * r[column] for r in rows], "o-", color=colour, label=label)
    ax.axhline(100, color="0.6", lw=0.8, ls="--")
    ax.set(
        xlabel="optimizer step (AdamW, lr 2e-5)", ylabel="error of the update's output (%)", ylim=(0.1, 2000)
    )
    ax.legend(frameon=False, fontsize=8)
    finish_axes([ax])
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@dataclass
class Options:
    """python eval.py COMMAND, with the options that this command reads."""

    run: str = ""  # run folder of a tuned model
    init: str = ""  # an untuned model: name, folder or .gguf file
    runs: tuple = ()  # run folders, each a line or a panel of the figure
    data: str = ""  # .json .jsonl (also .gz) .parquet .csv file or hub name[:split]; empty: the benchmark's own on the hub (DATA in eval.py)
    prompt_field: str = ""  # name of the instruction's field; empty: the run's, or recognised
    response_field: str = ""  # name of the response's field; empty: the run's, or recognised
    last: int = 0  # use the last N rows of the data; 0: all
    limit: int = 0  # then the first N of those; 0: all
    template: str = "alpaca"  # alpaca, plain, or text with {instruction}; a run brings its own
    prompt: str = ""  # what to answer
    max_new: int = 0  # tokens an answer may take, >= 0; 0: 1024 in benchmarks, 256 in sample
    loose: bool = (
        False  # gsm8k: compare the whole number, not rounded; math: accept what is equal as mathematics
    )
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the likeliest tokens that reach this probability, in (0, 1]
    seed: int = 0  # of sampling
    n: int = 1  # answers to each problem
    k: str = "1"  # comma-separated k of pass@k, each at most n
    poster: bool = False  # the poster's values beside ours
    execute: bool = False  # run, in a sandbox, what the model wrote, and score it
    batch_size: int = 32  # sequences at a time
    out: str = (
        ""  # file or folder to write (gsm8k, math, mtbench: the name of their .jsonl in the run folder)
    )
    answers: str = ""  # FastChat's model_answer .jsonl to judge; empty: the run's mtbench.jsonl
    judge_prompts: str = ""  # FastChat's judge_prompts.jsonl
    references: str = ""  # FastChat's reference_answer/gpt-4.jsonl, which goes with its own question.jsonl
    judge_url: str = ""  # OpenAI-compatible endpoint, like https://api.openai.com/v1; empty: ask nobody
    judge_model: str = "gpt-4"  # the judge's name there
    retries: int = 5  # how often a failed request is tried again, >= 0
    timeout: float = 120.0  # seconds that a request may be silent, > 0
    parallel: int = 4  # requests at a time, >= 1
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16
    rows: int = 4  # sequences in a benchmark's step
    length: int = 256  # tokens in each of them
    steps: int = 7  # timed steps of each contestant
    r: int = 16  # rank
    only: str = ""  # comma-separated contestants; empty: all
    compile: bool = False  # torch.compile this project's blocks
    methods: str = "all"  # comma-separated methods to compare; all
    sweep_lr: str = (
        "3e-4,1e-3,3e-3"  # comma-separated learning rates to choose from, of all methods or NAME=RATES
    )
    seeds: str = "0,1,2"  # comma-separated seeds
    metric: str = ""  # a name in eval.json, the higher the better but for loss, drift, passage_ppl; empty: the held-out loss (nlg), the task's own (nlu)
    jobs: int = 1  # runs at a time, >= 1 (with OMP_NUM_THREADS=1 a run a core; times then mean little)
    levels: str = "0,0.2,0.4"  # comma-separated shares of wrong facts in the tiny model's pre-training
    inits: str = ""  # comma-separated models to compare in place of levels
    rest: tuple = ()  # after --: options of the training script
    command: str = ""  # the command itself


MODEL = "run init device dtype "
CODE = "data last limit template max_new batch_size temperature top_p seed n k execute out"
COMMANDS = {  # name: (function, the options it reads)
    "sample": (sample, MODEL + "prompt template max_new temperature top_p seed"),
    "gsm8k": (
        gsm8k,
        MODEL
        + "data prompt_field response_field last limit template max_new batch_size temperature top_p seed out loose",
    ),
    "math": (
        competition_math,
        MODEL
        + "data prompt_field response_field last limit template max_new batch_size temperature top_p seed out loose",
    ),
    "humaneval": (humaneval, MODEL + CODE),
    "mbpp": (mbpp, MODEL + CODE),
    "mtbench": (mtbench, MODEL + "data last limit template max_new batch_size top_p seed out"),
    "judge": (
        judge,
        "run answers data judge_prompts references judge_url judge_model retries timeout parallel out",
    ),
    "loss": (loss, MODEL + "data prompt_field response_field last limit template batch_size"),
    "merge": (merge, MODEL + "out"),
    "curves": (curves, "runs out"),
    "features": (features, "runs out"),
    "table": (table, "runs poster out"),
    "compare": (compare, "runs methods sweep_lr seeds metric out jobs"),
    "ablation": (ablation, "runs seeds metric out jobs"),
    "noise": (noise, "runs seeds metric out jobs levels inits"),
    "sensitivity": (sensitivity, "runs seeds metric out jobs"),
    "efficiency": (efficiency, "runs methods seeds metric out jobs"),
    "bench": (bench, "init rows length steps r only device compile"),
    "bench-encoder": (bench_encoder, "rows length steps device dtype"),
    "bench-init": (bench_init, "init steps r"),
    "bench-generate": (
        bench_generate,
        "init data prompt_field response_field last limit template max_new batch_size steps device dtype",
    ),
    "precision": (precision, "init steps r out"),
    "bench-worker": (bench_worker, "init rows length r only device compile"),
}
DATA = {  # what a command reads unless --data says
    **dict.fromkeys(("gsm8k", "loss", "bench-generate"), "openai/gsm8k:test"),
    **dict.fromkeys(("mtbench", "judge"), "HuggingFaceH4/mt_bench_prompts"),
    "math": "DigitalLearningGmbH/MATH-lighteval:test",  # 5000 problems in one configuration
    "humaneval": "openai/openai_humaneval:test",
    "mbpp": "google-research-datasets/mbpp:test",
}


def open_model(o):
    device = pick_device(o.device)
    net, tok, settings = load_run(o.run, o.init, pick_dtype(o.dtype, device), device)
    return net, tok, settings, device


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        names = ", ".join(n for n in COMMANDS if n != "bench-worker")
        raise ValueError(
            f"{'expected a command' if not argv else f'unknown command {argv[0]!r}'}: {balora.nearest(argv[0], COMMANDS) if argv else ''}{names}"
        )
    function, reads = COMMANDS[argv[0]]
    Options.__doc__ = function.__doc__
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(Options, argv[1:cut], only=reads.split(), positional="runs")
    options.command, options.rest, options.data = (
        argv[0],
        argv[cut + 1 :],
        options.data or DATA.get(argv[0], ""),
    )
    if options.rest and "jobs" not in reads:
        raise ValueError(f"{argv[0]}: takes no options of another script after --")
    in_range(
        options,
        [
            (lambda v: v >= 1, "batch_size rows length steps r n jobs parallel"),
            (lambda v: v >= 0, "last limit max_new temperature retries"),
            (lambda v: 0 < v <= 1, "top_p"),
            (lambda v: v > 0, "timeout"),
        ],
    )
    function(options)


if __name__ == "__main__":
    run_main(main)
