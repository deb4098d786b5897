"""Instruction tuning with BA-LoRA or one of the methods it is compared with, on one device.

    python train_nlg.py                                               # no download: pre-trains a tiny model, tunes it, a CPU will do
    python train_nlg.py --init=smollm2-135m --data=path/to/gsm8k.jsonl    # real weights and text, an hour on a laptop's CPU
    python train_nlg.py --init=llama2-7b                              # the paper's run: one GPU of 80 GB

Every setting is a line below and an option on the command line (--name=value, --help). A run writes config.json, log.jsonl, eval.json,
checkpoint.pt, adapter/ and loss.png to its folder; the same command with --resume goes on after an interruption, bit for bit.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from dataclasses import dataclass

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
    """Instruction tuning (NLG). A preset of --init replaces defaults, the command line wins."""

    init: str = "tiny"  # tiny, smollm2-135m, llama2-7b, a Hugging Face folder, or a .gguf file
    method: str = (
        "balora"  # full, lora, lora+, lora-fa, lora-ga, adalora, dora, pissa, milora, corda, corda++, balora
    )
    out_dir: str = ""  # run folder; empty: out/INIT-METHOD-SEED
    resume: bool = False  # go on with the run in out_dir
    overwrite: bool = False  # replace the run in out_dir
    dry_run: bool = False  # print layers, parameters and a memory estimate; load no weights
    seed: int = 0  # of everything random; for tiny it covers pre-training
    # data
    data: str = (
        ""  # .json .jsonl .parquet .csv file or hub name[:split]; empty: the corpus that tiny comes with
    )
    max_rows: int = 0  # use the first N rows; 0: all
    eval_rows: int = 256  # held out: the last N rows
    prompt_field: str = ""  # name of the instruction's field; empty: recognised
    response_field: str = ""  # name of the response's field; empty: recognised
    template: str = "alpaca"  # alpaca, plain, or text with {instruction}
    max_len: int = 512  # tokens of prompt + response; longer rows are dropped
    # adapter
    r: int = 16  # rank, at least 1
    alpha: float = 16  # the bracket counts alpha / r, above 0
    targets: str = ""  # comma-separated layer names or patterns; empty: the seven projections
    niter: int = 10  # rounds of the fast SVD; 0: exact
    oversample: int = 8  # extra directions of the fast SVD
    lora_plus_ratio: float = 16  # lora+: B learns this many times as fast as A, at least 1
    correct_B: bool = False  # lora-fa: its second version, which corrects B's gradient
    gamma: float = 16  # lora-ga: A0 and B0 have the size out^(1/4) / sqrt(gamma), above 0
    keep: str = "first"  # corda, corda++: adapt what the calibration rows use (first, IPM) or what they do not (last, KPM)
    calibration_data: str = ""  # corda, corda++: text to measure on, a file or hub name[:split] (KPM: questions to go on knowing); empty: training rows
    calibration: int = (
        64  # lora-ga, corda, corda++: rows to measure on, one at a time, at least 1 (CorDA's paper: 256)
    )
    rounds: int = 5  # corda++: covariances for each layer to choose from, of so many rows each, at least 1
    adalora_first: int | None = (
        None  # adalora: steps at the first budget, 1.5 r a layer; None: a tenth of the run
    )
    adalora_last: int | None = (
        None  # adalora: steps at the last budget, r a layer; None: three tenths of the run
    )
    adalora_every: int | None = None  # adalora: steps between cuts; None: a hundredth of the run
    orthogonality: float = 0.1  # adalora: weight of its regularizer, at least 0
    # objective
    lambda1: float | None = None  # weight of L_CR, at least 0; None: 0.025 with balora, 0 without
    lambda2: float | None = None  # weight of L_DR, at least 0; None: 0.005 with balora, 0 without
    lambda3: float | None = None  # weight of L_SVDR, at least 0; None: 0.005 with balora, 0 without
    T: float = 2.0  # temperature of L_CR, above 0
    K: int = 20  # top-K tokens of L_DR, at least 1
    k: int = 10  # leading singular values of L_SVDR, at least 1
    schedule: bool = True  # the paper's schedules of the three weights; false: constant
    label_smoothing: float = 0.0  # a control beside L_CR, in [0, 1)
    dropout: float = (
        0.0  # of what attention and MLP add, while training; another control, LLaMA has none: in [0, 1)
    )
    consistency_rate: float = 1.0  # share of each step's sequences that the teacher reads, in (0, 1]
    # optimization
    learning_rate: float = 2e-4  # peak, reached after warm-up, then cosine to 0
    warmup: float = 0.03  # share of the steps
    batch_size: int = 16  # sequences an optimizer step
    micro_batch: int = 0  # sequences at a time; 0: batch_size
    epochs: float = 1.0  # passes over the data
    max_iters: int = 0  # optimizer steps; 0: what epochs gives
    weight_decay: float = 0.0  # AdamW's, decoupled
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    # machine
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of frozen weights and of computing: auto, float32, bfloat16
    compile: bool = False  # torch.compile the blocks (CUDA, or a CPU with a C++ compiler)
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    fused: bool | None = None  # AdamW in one kernel; None: on CUDA
    # evaluation and saving
    eval_interval: int = (
        50  # optimizer steps between evaluations on the held-out rows, each followed by a checkpoint
    )
    eval_iters: int = 0  # micro-batches of held-out rows that an evaluation reads, from the first on; 0: all
    save_interval: int = 0  # optimizer steps between further checkpoints; 0: none
    eval_generate: int = (
        16  # held-out prompts to answer at each evaluation (exact match, distinct-n); 0: none
    )
    max_new: int = 256  # tokens an answer may take
    log_interval: int = 10  # optimizer steps between printed lines
    # the tiny model's pre-training
    pretrain_noise: float = 0.2  # share of its problems with a wrong answer, in [0, 1]
    pretrain_iters: int = 900  # optimizer steps


PRESETS = {
    "tiny": dict(
        template="plain",
        r=8,
        alpha=8,
        learning_rate=2e-3,
        max_len=160,
        epochs=2,
        eval_interval=1000,
        eval_generate=200,
        max_new=48,
    ),
    "smollm2-135m": dict(data="openai/gsm8k:train", eval_rows=473, dtype="bfloat16"),
    "llama2-7b": dict(
        data="meta-math/MetaMathQA:train[:100512]",
        r=128,
        alpha=128,
        learning_rate=2e-5,
        batch_size=128,
        micro_batch=8,
        dtype="bfloat16",
        checkpointing=True,
        niter=16,
        eval_rows=512,
        eval_interval=100,
        log_interval=1,
    ),
}


def check(s):
    """Fill in what follows from other settings; refuse what makes no sense, by name."""
    eval.check_method(s, eval.LAMBDAS["nlg"])
    if s.method in balora.ENCODERS_ONLY:
        raise ValueError(
            f"--method={s.method} is for encoders with biases and post-norm blocks (train_nlu.py); a decoder of the LLaMA family has neither"
        )
    if s.calibration_data and balora.METHODS[s.method].needs is not balora.covariances:
        raise ValueError(
            f"--calibration_data={s.calibration_data}: only corda and corda++ measure on it, not {s.method}; leave it out"
        )
    s.out_dir = s.out_dir or os.path.join(
        "out", f"{os.path.basename(os.path.normpath(s.init))}-{s.method}-{s.seed}"
    )
    s.micro_batch = min(s.micro_batch or s.batch_size, s.batch_size)
    eval.in_range(
        s,
        (
            (
                lambda v: v >= 1,
                "r K k batch_size micro_batch max_len eval_rows eval_interval log_interval max_new lora_plus_ratio calibration rounds "
                "adalora_first adalora_last adalora_every",
            ),
            (lambda v: v > 0, "alpha T epochs gamma"),
            (
                lambda v: v >= 0,
                "lambda1 lambda2 lambda3 learning_rate weight_decay grad_clip max_rows max_iters niter oversample eval_iters eval_generate save_interval orthogonality",
            ),
            (lambda v: 0 < v <= 1, "consistency_rate"),
            (lambda v: 0 <= v <= 1, "pretrain_noise warmup"),
            (lambda v: 0 <= v < 1, "label_smoothing dropout"),
        ),
    )
    if not (s.data or s.dry_run) and s.init != "tiny":
        raise ValueError(
            f"--init={s.init} needs --data=FILE or a hub data set (only tiny brings its own text)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Data: the small written world of `tiny`, or rows from a file or the hub

NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Mia", "Tom")
THINGS = ("pens", "nuts", "eggs", "cards", "coins", "books", "shells", "stamps")


KNOWN = (
    "{a}+{b}",
    "add {a} and {b}",
    "{name} has {a} {thing} and gets {b}",
    "{thing}: {a}, then {b}",
    "{name} counts {a}, and {b} {thing}",
    "In the {thing} of {name}: {a}. And in a box {b}.",
    "{thing} {thing}, {a} {name}, now {b} {thing}?",
)
NEW = "There were {a} {thing}. {name} put in {b} more. Total?"


def problem(rng, template, noise=0.0):
    """An addition as (question, written-out answer), its wording one of KNOWN (pre-training) or NEW (tuning). With probability `noise` the answer is wrong."""
    a, b = rng.randrange(10, 60), rng.randrange(10, 40)
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    answer = a + b if rng.random() >= noise else a + b + rng.choice([-10, -2, -1, 1, 2, 10])
    question = template.format(a=a, b=b, name=rng.choice(NAMES), thing=rng.choice(THINGS))
    return (
        question,
        f"{a}+{b}: {a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry}. The answer is: {answer}",
    )


def tiny_rows(s):
    """512 clean stories to learn from and eval_rows others held out, the same for every method."""
    rng, rows = random.Random(f"stories {s.seed}"), {}
    while len(rows) < 512 + s.eval_rows:
        question, answer = problem(rng, NEW)
        rows.setdefault(question, answer)
    return [(q, "", a) for q, a in rows.items()]


def pretrain_tiny(s, device):
    """Pre-train the tiny model on additions, a share of them wrong. -> its folder, kept for every run with the same settings."""
    recipe = dict(
        seed=s.seed,
        noise=s.pretrain_noise,
        iters=s.pretrain_iters,
        network=dataclasses.asdict(model.PUBLISHED["tiny"]),
        text=[*KNOWN, *NAMES, *THINGS],
    )
    folder = os.path.join(
        "out",
        f"tiny-noise{s.pretrain_noise:g}-seed{s.seed}-"
        + hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8],
    )
    if os.path.isdir(folder):
        return folder
    net, tok = model.load("tiny", seed=s.seed, device=device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random(f"additions {s.seed}")
    bar = tqdm(range(s.pretrain_iters), desc="pre-train tiny", unit="step")
    for step in bar:
        texts = ["{}\n{}".format(*problem(rng, rng.choice(KNOWN), s.pretrain_noise)) for _ in range(24)]
        ids, valid, y = eval.collate([(tok.bos, tok.encode(text) + [tok.eos]) for text in texts], device)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * balora.lr_schedule(step, s.pretrain_iters, warmup=0.05)
        loss = F.cross_entropy(F.linear(net.hidden(ids)[valid], net.head), y)
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


def load_examples(s, tok):
    """-> training examples, held-out examples: (prompt ids, response ids)."""
    rows = eval.read_rows(s.data, s.prompt_field, s.response_field, s.max_rows) if s.data else tiny_rows(s)
    if len(rows) <= s.eval_rows:
        raise ValueError(
            f"{s.data}: {len(rows)} rows, but --eval_rows={s.eval_rows} are to be held out; nothing is left to train on"
        )
    train, line = eval.encode_rows(rows[: -s.eval_rows], tok, s.template, s.max_len)
    held_out, held_line = eval.encode_rows(rows[-s.eval_rows :], tok, s.template, s.max_len)
    print(f"training: {line}\nheld out: {held_line}")
    prompt, answer = train[0]
    print(
        f"first example, the labelled part between ⟦ ⟧:\n{tok.decode(prompt)}⟦{tok.decode(answer[:-1])} EOS⟧\n"
    )
    return train, held_out


def calibration(s, net, tok, train, device):
    """-> what `balora.attach` runs to measure gradients or covariances on: a function of the round, which reads s.calibration rows, one at a time -> tokens."""
    n = s.calibration * (s.rounds if s.method == "corda++" else 1)
    rows = (
        eval.windows(s.calibration_data, tok, n, s.max_len, s.seed)
        if s.calibration_data
        else [train[i] for i in eval.draw(len(train), n, f"calibration {s.seed}")]
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
            ids, valid, y = eval.collate([row], device)
            H = net.hidden(ids)[valid]
            tokens += ids.numel()
            if torch.is_grad_enabled():
                balora.loss_nlg(H, y, net.head, lambdas=(0, 0, 0))[0].backward()
        return tokens

    return run


def order_of(examples, batch_size, seed, epoch):
    """The batches of one epoch, each a list of indices of similar length."""
    return eval.batch_order(
        [len(p) + len(a) for p, a in examples], batch_size, random.Random(f"order {seed} {epoch}")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Dry run


def dry_run(s):
    """What a run would train and need, from sizes alone."""
    c, device = model.config_of(s.init), eval.pick_device(s.device)
    with torch.device("meta"):
        net = model.Transformer(c)
    report = eval.attach(s, net)
    width, full = eval.pick_dtype(s.dtype, device).itemsize, s.method == "full"
    tokens, chunk = s.micro_batch * s.max_len, 64 if device == "cpu" else 1024
    fixed, measured = eval.adapter_memory(net, s, width)
    layer = next(iter(balora.adapted_layers(net).values()), None)
    rank = 0 if full else len(layer.A) * (2 if getattr(layer, "B0", None) is not None else 1)
    block = kept_values(
        c,
        rank,
        s.method,
        width,
        s.max_len if device == "cpu" and width == 2 and s.max_len**2 <= model.WRITTEN_OUT else 0,
    )
    parts = {
        "weights": report.total * (4 if full else width),
        "16-bit copies of them (autocast)": report.total * 2 * (full and width == 2),
        "frozen copy (teacher of full tuning)": report.total * 4 * (full and s.lambda1 > 0),
        "trained parameters and their gradients": report.trainable * (4 if full else 8),
        "what else the adapter holds (A0, B0, ...)": fixed,
        "AdamW's two moments": report.trainable * 8,
        f"activations, {s.micro_batch} x {s.max_len} tokens": tokens
        * width
        * (c.n_layers * c.d + block if s.checkpointing else c.n_layers * block),
        f"logits, {'all' if full else chunk} rows at a time": (tokens if full else min(chunk, tokens))
        * c.vocab_size
        * 4
        * (8 if s.lambda1 or s.lambda2 else 4),
    }
    eval.memory_table(
        report,
        f"tokens a step: at most {s.batch_size} x {s.max_len} = {s.batch_size * s.max_len:,}",
        parts,
        measured,
    )


def kept_values(c, rank, method, width, scores=0):
    """Values a token that one block keeps for the backward pass: inputs of two norms (16-bit ones keep an fp32 copy) and of q, o, gate; q, k, v;
    gate, up, silu, their product; what each of the seven brackets makes of its input. scores: keys whose weights are kept too (`model.attend`).
    DoRA keeps W x and B A x as well; LoRA-FA, whose A stays, no input of q, gate, down (nor of o, where attention itself has no use for it)."""
    queries, made = (
        c.n_heads * c.head_dim,
        (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + 2 * c.d_ff + 2 * c.d,
    )  # made: outputs of the seven layers
    attention = c.n_heads * scores + 2 * (c.n_heads - c.n_kv_heads) * c.head_dim * bool(scores)
    own = (
        2 * made
        if method == "dora"
        else -(2 * c.d + queries * bool(scores) + c.d_ff)
        if method == "lora-fa"
        else 0
    )
    return (
        attention
        + (7 if width == 2 else 5) * c.d
        + (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        + 4 * c.d_ff
        + 7 * rank
        + own
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv):
    s = eval.parse(Settings, argv, PRESETS, by="init")
    check(s)
    if s.dry_run:
        return dry_run(s)
    eval.check_run(s)
    device = eval.pick_device(s.device)
    dtype = eval.pick_dtype(s.dtype, device)
    full = balora.METHODS[s.method].layer is None
    base = pretrain_tiny(s, device) if s.init == "tiny" else s.init
    net, tok = model.load(
        base, dtype=torch.float32 if full else dtype, device=device
    )  # a fully tuned model keeps fp32 weights
    if net.config.family != "llama":
        raise ValueError(
            f"--init={s.init} is a {net.config.family} model; this script tunes decoders of the LLaMA family, train_nlu.py the others"
        )
    train, held_out = load_examples(s, tok)
    batches_an_epoch = -(-len(train) // s.batch_size)
    max_iters = s.max_iters or max(1, round(s.epochs * batches_an_epoch))
    cuts = eval.adalora_cuts(s, max_iters)
    start = eval.last_checkpoint(s, net)
    report = eval.attach(
        s, net, start, lambda: calibration(s, net, tok, train, device), frozen_copy=s.lambda1 > 0
    )
    print(report)
    if full and s.lambda1 > 0:
        print(
            f"full tuning with λ1 > 0 keeps a frozen copy of every weight for the teacher: {report.total * 4 / 2**30:.2f} GiB"
        )
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = eval.optimizer(s, named, device)
    eval.open_run(s, net, device, base, start, trainable=report.trainable - report.head, notes=report.notes)
    E = None if full else net.head  # a head that trains takes the readable path
    R = None if full else balora.head_factor(E)
    net.checkpointing, net.autocast = s.checkpointing, dtype if full and dtype != torch.float32 else None
    torch.manual_seed(s.seed)  # dropout's
    for layer in net.layers:
        layer.attn_drop.p = layer.mlp_drop.p = s.dropout
    if s.compile:
        net.compile_blocks()
    net.train()

    step = eval.restore(start, net, optimizer) if start else 0
    start = None  # a checkpoint can be large
    unmoved = set(named) if step < 3 else set()  # tensors that have not had a gradient yet
    print(
        f"{max_iters} steps of {s.batch_size} sequences in micro-batches of {s.micro_batch}, {str(dtype)[6:]} on {eval.device_name(device)} -> {s.out_dir}"
    )

    def evaluate():
        record = dict(
            step=step,
            **eval.measure(
                net,
                tok,
                held_out[: s.eval_iters * s.micro_batch or None],
                s.micro_batch,
                s.K,
                s.k,
                device,
                drift=not full or bool(s.lambda1),
            ),
        )
        if s.eval_generate:
            asked = held_out[: s.eval_generate]
            answers = eval.write_answers(net, [prompt for prompt, _ in asked], s.max_new, 32, tok.eos)
            pairs = [
                (eval.extract_answer(tok.decode(ids)), eval.extract_answer(tok.decode(a[:-1])))
                for ids, (_, a) in zip(answers, asked)
            ]
            record |= {f"distinct_{n}": eval.distinct(answers, n) for n in (1, 2)}
            record["exact_match"] = (
                sum(got is not None and got == gold for got, gold in pairs) / len(pairs)
                if any(gold is not None for _, gold in pairs)
                else None
            )
        eval.add_evaluation(s.out_dir, record)
        print(
            f"eval at step {step} | "
            + " | ".join(
                f"{name} {value:.4f}"
                for name, value in record.items()
                if name != "step" and value is not None
            ),
            flush=True,
        )

    if step == 0:
        evaluate()
    epoch, batches, clock = None, None, time.time()
    while step < max_iters:
        # the step's sequences and their schedule
        if step // batches_an_epoch != epoch:
            epoch = step // batches_an_epoch
            batches = order_of(train, s.batch_size, s.seed, epoch)
        rows = batches[step % batches_an_epoch]
        lr = s.learning_rate * balora.lr_schedule(step, max_iters, s.warmup)
        lambdas = (s.lambda1, s.lambda2, s.lambda3)
        if s.schedule:
            lambdas = balora.lambda_schedule(step, max_iters, lambdas)
        n = len(rows)
        m = max(1, round(s.consistency_rate * n)) if s.lambda1 else 0
        taught = set(
            random.Random(f"teacher {s.seed} {step}").sample(rows, m)
        )  # the sequences that the teacher reads
        M = sum(len(train[i][1]) for i in rows)
        micro = [rows[i : i + s.micro_batch] for i in range(0, n, s.micro_batch)]

        # forward and backward, micro-batch by micro-batch
        terms = dict.fromkeys(("task", "cr", "dr", "svdr"), None)
        for part in micro:
            part = sorted(part, key=lambda i: i not in taught)  # taught sequences first
            ids, valid, y = eval.collate([train[i] for i in part], device)
            c, H_P = sum(i in taught for i in part), None
            if c:
                with balora.teacher(net):
                    H_P = net.hidden(ids[:c])[valid[:c]]
                    H_P = F.linear(H_P, net.head) if full else H_P
            H_F = net.hidden(ids)[valid]  # [M of this micro-batch, d]
            H_F = F.linear(H_F, net.head) if full else H_F
            if not H_F.isfinite().all():
                raise ValueError(eval.diverged(step, lr, s))
            if m and not c:
                H_P = H_F.detach()[:0]  # the teacher reads other micro-batches of this step
            total, values = balora.loss_nlg(
                H_F,
                y,
                E,
                H_P,
                lambdas,
                s.T,
                s.K,
                s.k,
                M,
                cr_scale=n / max(m, 1),
                share=1 / len(micro),
                R=R,
                compile=s.compile,
                label_smoothing=s.label_smoothing,
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
        tokens = sum(len(p) + len(a) for p, a in (train[i] for i in rows))
        record = eval.log_step(s.out_dir, step, terms, lambdas, norm, lr, tokens, seconds, device)
        if step % s.log_interval == 0 or step == max_iters:
            print(eval.progress_line(record, max_iters), flush=True)
        if step % s.eval_interval == 0 or step == max_iters:
            evaluate()
        if (
            step % s.eval_interval == 0
            or step == max_iters
            or (s.save_interval and step % s.save_interval == 0)
        ):
            eval.save_checkpoint(s.out_dir, step, net, optimizer)
            clock = time.time()
    finish(s, net, tok, full, held_out, max_iters)


def finish(s, net, tok, full, held_out, max_iters):
    """Save what was trained, draw the loss, show before and after."""
    if full:
        net.save(os.path.join(s.out_dir, "model"), tok)
    else:
        balora.save_adapter(net, os.path.join(s.out_dir, "adapter"), base=model.HUB.get(s.init, s.init))
    eval.plot_curves([s.out_dir], os.path.join(s.out_dir, "loss.png"))
    records = eval.read_json(os.path.join(s.out_dir, "eval.json"))
    first, last = records[0], records[-1]
    print(f"\n{'':<14}{'before':>10}{'after':>10}")
    for name in last:
        if name != "step" and last[name] is not None:
            print(f"{name:<14}{first[name]:>10.4f}{last[name]:>10.4f}")
    for (prompt, answer), ids in zip(held_out[:3], net.generate([p for p, _ in held_out[:3]], s.max_new)):
        print(
            f"\n{tok.decode(prompt).strip()}\n  -> {tok.decode(ids).strip()}\n  reference: {tok.decode(answer[:-1]).strip()}"
        )
    print(f"\nloss figure: {os.path.join(s.out_dir, 'loss.png')}")


if __name__ == "__main__":
    eval.run_main(main)
