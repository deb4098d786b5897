"""Races: this project beside `peft` + `transformers`, and beside the authors' formulation of BA-LoRA.

    python tests/bench.py step --init=out/smollm2-135m --compile     # one training step: time and peak memory
    python tests/bench.py init --init=out/smollm2-135m               # PiSSA's starting values
    python tests/bench.py encoder --init=deberta-v3-base             # forward and backward, random weights
    python tests/bench.py generate --init=MERGED --data=gsm8k.jsonl  # greedy answers
    python tests/bench.py precision --init=out/smollm2-135m          # what a small update loses in bf16

Contestants take turns. Times are medians over the turns, ratios are medians of the ratios within a turn.
`step --before=FOLDER` adds the steps of the tree at commit 03e066a.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

# A contestant of the older tree runs in a process of its own, which imports that tree's files.
sys.path.insert(0, os.environ.get("BENCH_TREE", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import balora
import model
import train_nlg

torch._inductor.config.cpp.simdlen = 256  # for the older tree, too: see model.Transformer.compile_blocks

# fmt: off
OPTIONS = dict(                         # beside --compile
    init="smollm2-135m", dtype="bfloat16", device="cpu", r=16,
    rows=4, length=256, turns=5,        # sequences at a time, tokens in each; timed turns of each contestant
    only="", before="",                 # step: comma-separated contestants; folder of the older tree
    data="", limit=64, max_new=256,     # generate: file of rows, how many of them, longest answer
    steps=100,                          # precision: steps of AdamW
)
# fmt: on
LAMBDAS = (0.025, 0.005, 0.005)


def alternate(contestants, turns, device="cpu"):
    """Call every {name: (function, *args)} once per turn -> {name: seconds of each turn}, after a warm-up."""
    times = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, (run, *args) in contestants.items():
            start = time.perf_counter()
            run(*args)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def report(times, words, ratios="here/transformers", peaks=None):
    """Print every contestant's median and range beside its `words`, then the ratios within a turn."""
    for name, seconds in times.items():
        spread = f"({min(seconds):.3f}-{max(seconds):.3f})"
        print(f"{name:<16}{statistics.median(seconds):>9.3f} s  {spread}  {words.get(name, '')}")
    for name, other in (pair.split("/") for pair in ratios.split()):
        if name in times and other in times:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[other]))
            memory = f", memory {peaks[name] / peaks[other]:.2f}" if peaks else ""
            print(f"{name} / {other}: time {ratio:.2f}{memory}")


CONTESTANTS = ["pissa", "balora", "balora-4", "lora-peft", "pissa-peft", "authors"]
BEFORE = ["pissa-before", "balora-before"]
RATIOS = "balora/authors pissa/pissa-peft balora/pissa balora-4/pissa pissa/pissa-before balora/balora-before"


def step(o):
    """A training step on rows x length random tokens, half of them prompt: seconds and peak memory.

    balora-4 has --teacher_every=4. "authors" is their formulation on peft + transformers: a second model is
    the teacher, and all logits exist in full. --only takes methods, too, such as dora.
    """
    names = o.only.split(",") if o.only else CONTESTANTS + BEFORE * bool(o.before)
    contestants, workers = {}, []
    with tempfile.TemporaryDirectory() as folder:
        model.load(o.init, dtype=o.dtype)[0].save(folder)
        for name in names:
            os.environ["BENCH_TREE"] = o.before if name in BEFORE else sys.path[0]
            workers.append(multiprocessing.get_context("spawn").Pool(1))
            options = argparse.Namespace(**{**vars(o), "init": folder, "name": name})
            contestants[name] = (workers[-1].apply, turn, (options,))
        times = alternate(contestants, o.turns)
    peaks = {name: run(*args) for name, (run, *args) in contestants.items()}
    for worker in workers:
        worker.close()
        worker.join()
    if "balora-4" in times:
        times["balora-4"] = [seconds / 4 for seconds in times["balora-4"]]
    report(times, {name: f"{gib:.2f} GiB" for name, gib in peaks.items()}, RATIOS, peaks)


STAGE = {}  # a worker's network, loss and optimizer


def turn(o):
    """In a worker: a step (four where every fourth asks the teacher) -> its peak memory in GiB."""
    if not STAGE:
        net, loss = (peers if o.name.endswith(("-peft", "authors")) else ours)(o)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-5, fused=o.device == "cuda")
        STAGE.update(loss=loss, optimizer=optimizer, vocab=net.config.vocab_size)
    torch.manual_seed(0)
    ids = torch.randint(10, STAGE["vocab"], (o.rows, o.length), device=o.device)
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # position t predicts token t + 1
    predicts[:, o.length // 2 - 1 : -1] = True
    for i in range(4 if o.name == "balora-4" else 1):
        STAGE["loss"](ids, predicts, i).backward()
        STAGE["optimizer"].step()
        STAGE["optimizer"].zero_grad(set_to_none=True)
    return (train_nlg.eval if o.name in BEFORE else model).peak_memory(o.device)


def ours(o):
    """-> net, loss(ids, predicts, i), as in a step of train_nlg.py; in either tree."""
    every = 4 if o.name == "balora-4" else 1
    method = o.name.removesuffix("-4").removesuffix("-before")
    net, _ = model.load(o.init, dtype=o.dtype, device=o.device)
    balora.attach(net, method, r=o.r)
    R = balora.head_factor(net.head)
    more = {"compile": o.compile} if o.name in BEFORE else {}
    if o.compile:
        net.compile_blocks()
    if o.compile and o.name not in BEFORE:
        balora.token_terms = torch.compile(balora.token_terms)
    lambdas = [(method == "balora") * weight for weight in (every * LAMBDAS[0], *LAMBDAS[1:])]

    def loss(ids, predicts, i):
        H_P = None
        if lambdas[0] and i % every == 0:
            with balora.teacher(net):
                H_P = net.hidden(ids)[predicts]
        H_F = net.hidden(ids)[predicts]
        return balora.loss_nlg(H_F, ids.roll(-1, 1)[predicts], net.head, H_P, R=R, lambdas=lambdas, **more)[0]

    return net.train(), loss


def peers(o):
    """The same on transformers + peft, as Trainer runs them."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(o.init, dtype=o.dtype).to(o.device)
    teacher = copy.deepcopy(net).eval() if o.name == "authors" else None
    net = with_peft(net, o.r, True if o.name == "lora-peft" else "pissa_niter_16")

    def loss(ids, predicts, i):
        labels = torch.where(predicts.roll(1, 1), ids, -100)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=o.dtype == torch.bfloat16):
            out = net(input_ids=ids, labels=labels)
            if teacher is None:
                return out.loss
            with torch.no_grad():
                Z_P = teacher(input_ids=ids).logits[predicts].float()
            return out.loss + authors_terms(Z_P, out.logits[predicts].float())

    return net.train(), loss


def with_peft(net, r, start):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=start, target_modules=list(balora.TARGETS))
    return get_peft_model(net, config)


def authors_terms(Z_P, Z_F):
    """The three terms, weighted, as the authors' script has them."""
    log_F = F.log_softmax(Z_F / 2.0, -1)
    cr = 4.0 * F.kl_div(log_F, F.softmax(Z_P / 2.0, -1), reduction="none").sum(-1).mean()
    top = F.softmax(Z_F.topk(20, dim=-1).values, -1)
    dr = (top * top.log()).sum(-1).mean()
    sigma = torch.svd_lowrank(Z_F, q=15, niter=2)[1]
    return LAMBDAS[0] * cr + LAMBDAS[1] * dr - LAMBDAS[2] * sigma[:10].sum() / Z_F.norm()


def in_transformers(net, kind):
    """The same network in transformers, in eval mode."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        net.save(folder)
        theirs, found = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    if any(found.values()):
        raise ValueError(f"transformers reads another network: {found}")
    return theirs.to(net.embed.weight).eval()


def init(o):
    """PiSSA's starting values: time, and how far the residual is above that of the exact SVD."""
    base, _ = model.load(o.init, dtype=torch.bfloat16)
    networks = [copy.deepcopy(base) for _ in range(o.turns + 1)]
    theirs = [in_transformers(base, "AutoModelForCausalLM") for _ in networks]

    def here():
        networks.append(networks.pop(0))  # a copy that has no adapter yet
        balora.attach(networks[-1], "pissa", r=o.r)

    def peft():
        theirs.append(with_peft(theirs.pop(0), o.r, "pissa_niter_16"))

    report(alternate({"here": (here,), "peft": (peft,)}, o.turns), {}, "here/peft")
    residuals = torch.zeros(2)  # Σ ‖W - B0 A0‖² over the layers: here, peft
    for name, layer in balora.adapted_layers(networks[-1]).items():
        other = theirs[-1].get_submodule(f"base_model.model.{networks[-1].checkpoint_name(name)}")
        product = other.lora_B["default"].weight.detach() @ other.lora_A["default"].weight.detach()
        residuals[0] += (layer.weight.float() - layer.s * layer.B0.float() @ layer.A0.float()).square().sum()
        residuals[1] += (layer.weight.float() - product.float()).square().sum()
    print(f"here / peft: residual {residuals[0] / residuals[1]:.5f}")


def encoder(o):
    """Forward and backward of every weight of a classifier with random weights, here and in transformers."""
    net = model.Transformer(model.config_of(o.init), n_classes=2)
    model.init_weights(net, seed=0)
    net.to(o.device, o.dtype).eval()  # no dropout, on either side
    theirs = in_transformers(net, "AutoModelForSequenceClassification")
    ids = torch.randint(10, net.config.vocab_size, (o.rows, o.length)).to(o.device)
    mask = (torch.arange(o.length) < torch.linspace(o.length / 2, o.length, o.rows)[:, None]).to(o.device)

    def train(network, *args):
        out = network(*args)
        getattr(out, "logits", out).float().sum().backward()
        network.zero_grad()

    contestants = {"here": (train, net, ids, mask), "transformers": (train, theirs, ids, mask.long())}
    report(alternate(contestants, o.turns, o.device), {})


def generate(o):
    """Greedy answers to the prompts of --data, here and in transformers."""
    net, tok = model.load(o.init, o.dtype, o.device)
    theirs = in_transformers(net, "AutoModelForCausalLM")
    rows = train_nlg.read_rows(o.data, limit=o.limit)
    prompts = [tok.bos + tok.encode(train_nlg.fill("alpaca", *row[:2])) for row in rows]
    prompts.sort(key=len)  # rows of like length are together
    batches = [prompts[start : start + o.rows] for start in range(0, len(prompts), o.rows)]
    ends = list(net.config.eos)
    answers = {}

    def here():
        answers["here"] = [answer for batch in batches for answer in net.generate(batch, o.max_new)]

    def transformers():
        answers["transformers"] = []
        for batch in batches:
            rows = [torch.tensor(prompt, device=o.device) for prompt in batch]
            ids = pad_sequence(rows, True, ends[0], "left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
            options = dict(do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
            written = theirs.generate(ids, attention_mask=mask, max_new_tokens=o.max_new, **options)
            written = written[:, ids.shape[1] :]
            alive = torch.isin(written, torch.tensor(ends, device=o.device)).cumsum(dim=1) == 0
            answers["transformers"] += [row[kept].tolist() for row, kept in zip(written, alive)]

    times = alternate({"here": (here,), "transformers": (transformers,)}, o.turns, o.device)
    speeds = {name: sum(map(len, answers[name])) / statistics.median(times[name]) for name in times}
    report(times, {name: f"{speed:.1f} tokens/s" for name, speed in speeds.items()})
    same = sum(a == b for a, b in zip(*answers.values()))
    ratio = speeds["here"] / speeds["transformers"]
    print(f"here / transformers: tokens/s {ratio:.2f}; {same} of {len(prompts)} answers are the same")


def precision(o):
    """The error of an update in bf16: cast as offsets (here), and as whole A and B (residual form)."""
    net, _ = model.load(o.init, dtype=torch.bfloat16)
    balora.attach(net, "pissa", r=o.r)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-5)
    ids = torch.randint(10, net.config.vocab_size, (1, o.length))
    for step in range(1, o.steps + 1):
        F.cross_entropy(net(ids)[0, :-1].float(), ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10, o.steps):
            update, offset, residual = sum(map(squares, balora.adapted_layers(net).values())).tolist()
            offset, residual = (offset / update) ** 0.5, (residual / update) ** 0.5
            print(f"step {step}: error of the offset form {offset:.2%}, of the residual form {residual:.1%}")
    print(f"residual / offset: error {residual / offset:.2f}")


@torch.no_grad()
def squares(layer):
    """-> [3]: Σ of squares of the update's output, of its error in offset form, in residual form."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, layer.weight.shape[1], generator=rng).bfloat16()
    left, right = layer.factors()  # left @ right = s (B A - B0 A0)
    exact = x.double() @ (left.double() @ right.double()).T

    def in_bf16(A, B):
        return F.linear(F.linear(x, A.bfloat16()), B.bfloat16()).double()

    offset = in_bf16(right, left) - exact
    # A residual-form trainer keeps its start in fp32, and subtracts the start's product.
    A0, B0 = balora.init_pissa(layer.weight, len(layer.A), layer.s, rng, None, niter=10, oversample=8)
    A = A0 + (layer.A - layer.A0)
    B = B0 + (layer.B - layer.B0)
    residual = layer.s * (in_bf16(A, B) - in_bf16(A0, B0)) - exact
    return torch.stack([error.square().sum() for error in (exact, offset, residual)])


def main():
    races = {race.__name__: race for race in (step, init, encoder, generate, precision)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("race", choices=races)
    parser.add_argument("--compile", action="store_true")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar=str(default))
    o = parser.parse_args()
    o.dtype = getattr(torch, o.dtype)
    print(torch.get_num_threads(), "threads;", {name: value for name, value in vars(o).items() if value})
    races[o.race](o)


if __name__ == "__main__":
    main()
