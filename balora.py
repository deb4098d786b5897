"""BA-LoRA: the method (ICLR 2026 poster, arXiv 2408.04556v7), and the ones it is compared with.

    import balora
    report = balora.attach(net, "balora", r=16, alpha=16)        # freezes net, puts the bracket beside its linear layers
    with balora.teacher(net): Z_P = net(ids)                     # the pre-trained network, exactly
    total, terms = balora.loss_nlg(H_F, y, E, H_P)               # L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR
    balora.save_adapter(net, "out/adapter")                      # a plain peft LoRA for the original checkpoint

The idea in one line (DESIGN: "the central equation"): W stays, and the layer computes

    y = W x + s (B A - B0 A0) x  =  W x + s [ΔB  B0] [A; ΔA] x          ΔA = A - A0,  ΔB = B - B0,  s = alpha / r

so the network starts as the pre-trained one, bit for bit, and *is* the pre-trained one whenever the bracket is off.
The difference of products on the left is never computed: in 16 bits it cancels. Offsets are taken in fp32, then cast.

| symbol | tensor                                    | shape    |   | symbol | tensor                                | shape  |
|--------|-------------------------------------------|----------|---|--------|---------------------------------------|--------|
| W      | frozen weight                             | [out,in] |   | Z_F    | logits of the network being tuned     | [M, V] |
| A, B   | trainable factors, fp32                   | [r,in], [out,r] | | Z_P | logits of the pre-trained network    | [M, V] |
| A0, B0 | their values at the start (B0 None: zeros)| same     |   | H, E   | hidden states, head: Z = H Eᵀ         | [M, d], [V, d] |
| s      | alpha / r                                 | scalar   |   | R      | E = Q R, so σ(Z) = σ(H Rᵀ)            | [d, d] |

M counts the positions that *predict* a response token; of a classifier, Z is [N, D]: N examples, D classes. Where we differ from the authors'
code and why: README. Equations are named as on the poster: CR-NLG, DR-NLG, SVDR-NLG, CR-NLU, DR-NLU, SVDR-NLU.
"""

import difflib
import fnmatch
import heapq
import json
import math
import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# The adapted layer


class LowRank(nn.Module):
    """y = W x + b + s [ΔB  B0] [A; ΔA] x, in place of an nn.Linear whose frozen weight and bias it takes over.

    A, B are fp32 parameters (A a buffer where it does not train: LoRA-FA). A0, B0 stand in W's dtype, and A, B start from exactly those values; B0 is
    None where B starts at zero (LoRA), and then the second half is absent. `on = False` leaves y = W x + b: the pre-trained layer.
    """

    def __init__(self, linear, A0, B0, s, train_A=True):
        super().__init__()
        self.weight, self.bias, self.s, self.on = linear.weight, linear.bias, s, True
        zeros = A0.new_zeros(linear.out_features, A0.shape[0])
        self.register_buffer("A0", None if B0 is None else A0.to(linear.weight.dtype))
        self.register_buffer("B0", None if B0 is None else B0.to(linear.weight.dtype))
        A = (A0 if B0 is None else self.A0).to(torch.float32, copy=True)
        if train_A:
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        self.B = nn.Parameter((zeros if B0 is None else self.B0).to(torch.float32, copy=True))

    def bracket(self):
        """-> s [ΔB  B0] [out, 2r], [A; ΔA] [2r, in] in fp32 (s B and A where B0 is zero)."""
        if self.B0 is None:
            return self.s * self.B, self.A
        return self.s * torch.cat([self.B - self.B0, self.B0.float()], dim=1), torch.cat(
            [self.A, self.A - self.A0], dim=0
        )

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        if self.B0 is None:
            return y + F.linear(F.linear(x, self.A.to(x.dtype)), (self.s * self.B).to(x.dtype))
        return y + Bracket.apply(x, self.A, self.B, *(t.detach().to(x.dtype) for t in self.bracket()), self.s)

    def merged(self):
        """-> nn.Linear with W + s [ΔB B0] [A; ΔA], summed in fp32 and rounded once."""
        B, A = self.bracket()
        return plain_linear((self.weight.float() + B @ A).to(self.weight.dtype), self.bias)


class Bracket(torch.autograd.Function):
    """s [ΔB B0] [A; ΔA] x, whose gradients for A and B are those of s B A x: rank r in the backward pass, where autograd would take 2r."""

    @staticmethod
    def forward(ctx, x, A, B, sBB, AA, s):  # sBB = s [ΔB B0], AA = [A; ΔA], cast
        u = F.linear(x, AA)  # [..., 2r]
        ctx.s, ctx.r = s, A.shape[0]
        ctx.save_for_backward(x, u[..., : ctx.r].contiguous(), sBB, AA)
        return F.linear(u, sBB)

    @staticmethod
    def backward(ctx, g):
        x, Ax, sBB, AA = ctx.saved_tensors
        g, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        v = g @ sBB  # s g [ΔB B0]; its halves add up to s g B
        grad_A = (v[:, : ctx.r] + v[:, ctx.r :]).T @ x2  # (s Bᵀ gᵀ) x
        grad_B = ctx.s * (g.T @ Ax.reshape(-1, ctx.r))  # s gᵀ (A x)
        grad_x = (v @ AA).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_A.float(), grad_B.float(), None, None, None


class DoRA(LowRank):
    """y = m/n ∘ (W + s B A) x + b: m [out] trains beside A and B, n [out] are the row norms of W + s B A, constant in the backward pass (Liu et al. 2024, §4.3).

    One magnitude for each output row, as in the authors' code. Computed as W x + b + (m/n - 1) W x + m/n s B A x, so that step 0, m = n and B = 0, changes no bit.
    """

    def __init__(self, linear, A0, B0, s):
        super().__init__(linear, A0, None, s)
        self.register_buffer("square", self.weight.float().square().sum(1))  # ‖w‖² of each row, [out]
        self.m = nn.Parameter(self.norms().clone())

    @torch.no_grad()
    def norms(self):
        """n² = ‖w‖² + 2 s b·(A w) + s² b A Aᵀ bᵀ for each row w of W and b of B, so nothing of size out × in is made. -> n [out], fp32, at least 1e-8."""
        sB, A = self.s * self.B, self.A
        WA = F.linear(A.to(self.weight.dtype), self.weight).float()  # [r, out]
        return (self.square + 2 * (sB * WA.T).sum(1) + (sB @ (A @ A.T) * sB).sum(1)).clamp_min(1e-16).sqrt()

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        ratio, Wx = self.m / self.norms(), y if self.bias is None else y - self.bias
        BAx = F.linear(F.linear(x, self.A.to(x.dtype)), (self.s * self.B).to(x.dtype))
        return y + (ratio - 1).to(x.dtype) * Wx + ratio.to(x.dtype) * BAx

    def merged(self):
        """-> nn.Linear with diag(m/n) (W + s B A), in fp32, rounded once."""
        V = self.weight.float() + self.s * self.B @ self.A
        return plain_linear(((self.m / self.norms())[:, None] * V).to(self.weight.dtype), self.bias)


class AdaLoRA(nn.Module):
    """y = W x + b + s B (E ∘ A x), s = alpha / r0: r0 triplets of which `allocate` keeps the important ones by zeroing entries of E [r0] (Zhang et al. 2023).

    E starts at zero. The averages of sensitivity I and of its uncertainty U, of A, B and E, are buffers.
    """

    def __init__(self, linear, A0, B0, s):
        super().__init__()
        self.weight, self.bias, self.s, self.on = linear.weight, linear.bias, s, True
        self.A, self.B = nn.Parameter(A0.float()), nn.Parameter(B0.float())
        self.E = nn.Parameter(torch.zeros_like(self.A[:, 0]))
        for name in "ABE":
            self.register_buffer(f"I_{name}", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"U_{name}", torch.zeros_like(getattr(self, name)))

    def bracket(self):
        """-> s B E [out, r0], A [r0, in], fp32."""
        return self.s * self.B * self.E, self.A

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        B, A = self.bracket()
        return y + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    merged = LowRank.merged

    @torch.no_grad()
    def observe(self, beta):
        """After an optimizer step, with its gradients still there: I ← β I + (1-β) |p ∂L/∂p|, U ← β U + (1-β) | |p ∂L/∂p| - I |."""
        for name in "ABE":
            p, I, U = (getattr(self, prefix + name) for prefix in ("", "I_", "U_"))
            now = (p * p.grad).abs()
            I.lerp_(now, 1 - beta)
            U.lerp_((now - I).abs(), 1 - beta)

    def importance(self):
        """-> [r0]: I U of a triplet's entry of E, plus its means over the row of A and the column of B."""
        return self.I_E * self.U_E + (self.I_A * self.U_A).mean(1) + (self.I_B * self.U_B).mean(0)


class Houlsby(nn.Module):
    """h + f(h) with h = inner(x), the dropout that ends attention or MLP; f(h) = Up SiLU(Down h) (Houlsby et al. 2019; SiLU as in AdaLoRA's comparison).

    Down [r, d] and Up [d, r] have biases and are fp32. Up starts at zero, so step 0 is the pre-trained network.
    """

    act = staticmethod(F.silu)

    def __init__(self, inner, d, r, rng):
        super().__init__()
        self.inner, self.on = inner, True
        self.down = nn.Parameter(torch.empty(r, d, device=rng.device).normal_(0, 0.02, generator=rng))
        self.down_bias, self.up, self.up_bias = (nn.Parameter(torch.zeros(size)) for size in (r, (d, r), d))

    def f(self, h):
        down, down_bias, up, up_bias = (
            p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias)
        )
        return F.linear(self.act(F.linear(h, down, down_bias)), up, up_bias)

    def forward(self, x):
        h = self.inner(x)
        return h + self.f(h) if self.on else h


class Pfeiffer(Houlsby):
    """LN( f(LN u) + u ) in place of the MLP's LN u, u = h + x, the same frozen LN twice; f(z) = Up ReLU(Down z) (Pfeiffer et al. 2021)."""

    act = staticmethod(F.relu)

    def forward(self, u):
        z = self.inner(u)
        return self.inner(self.f(z) + u) if self.on else z


class BiasOffset(nn.Module):
    """y = inner(x) + Δb beside a linear layer or a LayerNorm; Δb [out] is fp32 and starts at zero (BitFit, Ben Zaken et al. 2022)."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.on = inner, True
        self.offset = nn.Parameter(torch.zeros_like(inner.bias, dtype=torch.float32))

    def forward(self, x):
        y = self.inner(x)
        return y + self.offset.to(y.dtype) if self.on else y

    def merged(self):
        """-> the inner layer with b + Δb, summed in fp32 and rounded once."""
        self.inner.bias = nn.Parameter(
            (self.inner.bias.float() + self.offset).to(self.inner.bias.dtype), requires_grad=False
        )
        return self.inner


def plain_linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias
    return linear


# ---------------------------------------------------------------------------------------------------------------------
# Initialisations: (W [out, in], r, s, rng, stat=what `statistics` found, ...) -> A0 [r, in], B0 [out, r] or None for zeros


def init_lora(W, r, s, rng, **_):
    """A ~ U(-1/√in, 1/√in), B = 0 (Hu et al. 2021)."""
    bound = 1 / math.sqrt(W.shape[1])
    return torch.empty(r, W.shape[1], device=rng.device).uniform_(-bound, bound, generator=rng).to(
        W.device
    ), None


def init_pissa(W, r, s, rng, niter=10, oversample=8, **_):
    """The r largest singular triplets: A0 = √(S/s) Vᵀ, B0 = U √(S/s), so that s B0 A0 is W's best rank-r part (Meng et al. 2024)."""
    return split(*top_svd(W.float(), r, niter, oversample, rng), s)


def top_svd(W, r, niter, oversample, rng):
    """The r largest singular triplets of W [out, in], fp32 -> U [out, r], S [r], Vt [r, in].

    niter 0: exact. Otherwise subspace iteration (Halko et al. 2011) on r + oversample directions, on the
    Gram matrix of W's smaller side, so a round costs one small product and one thin QR. Random start from `rng`.
    """
    home, W = W.device, W.to(rng.device)
    if niter == 0 or r + oversample >= min(W.shape):
        U, S, Vt = (t.to(home) for t in exact_svd(W, rng))
        return U[:, :r], S[:r], Vt[:r]
    wide = W.shape[0] < W.shape[1]
    tall = W.T if wide else W  # [m, n], n ≤ m
    a, b = tall.chunk(2, dim=1)
    ab = a.T @ b
    gram = torch.cat(
        [torch.cat([a.T @ a, ab], 1), torch.cat([ab.T, b.T @ b], 1)]
    )  # tallᵀ tall [n, n], its symmetric half computed once
    Q = torch.randn(gram.shape[0], r + oversample, generator=rng, device=rng.device)
    for _ in range(niter):
        Q = torch.linalg.qr(gram @ Q).Q
    P, R = torch.linalg.qr(tall @ Q)  # tall ≈ tall Q Qᵀ = P R Qᵀ
    U, S, Vt = torch.linalg.svd(R)
    U, S, Vt = (P @ U[:, :r]).to(home), S[:r].to(home), (Vt[:r] @ Q.T).to(home)
    return (Vt.T, S, U.T) if wide else (U, S, Vt)


def init_milora(W, r, s, rng, **_):
    """The r smallest singular triplets, by the exact SVD (Wang et al. 2024)."""
    U, S, Vt = exact_svd(W, rng)
    return split(U[:, -r:], S[-r:], Vt[-r:], s)


def init_adalora(W, r, s, rng, **_):
    """A, B ~ N(0, 0.02²); what makes the start zero is E (Zhang et al. 2023)."""
    draw = lambda *shape: torch.empty(shape, device=rng.device).normal_(0, 0.02, generator=rng).to(W.device)
    return draw(r, W.shape[1]), draw(W.shape[0], r)


def init_lora_ga(W, r, s, rng, stat=None, gamma=16.0, **_):
    """From the gradient G = ∂L/∂W (stat) = U S Vᵀ: A0 = c V_{1..r}ᵀ, B0 = c U_{r+1..2r}, c = out^¼ / √γ; no singular value enters (Wang et al. 2024, "stable").

    With it the first step's change of s B A is the best rank-2r approximation of G. Needs 2r ≤ min(out, in). The randomised SVD is the authors'
    (not `top_svd`, whose Gram matrix would lose what is below 1e-3 of σ_1: a gradient's spectrum falls faster than a weight's).
    """
    with torch.random.fork_rng([rng.device] if rng.device.type == "cuda" else []):
        torch.manual_seed(torch.randint(2**31, (1,), generator=rng, device=rng.device).item())
        U, _, V = torch.svd_lowrank(stat.to(rng.device), q=min(4 * r, *W.shape), niter=4)
    c = W.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * V[:, :r].T.to(W.device), c * U[:, r : 2 * r].to(W.device)


def init_corda(W, r, s, rng, stat=None, keep="first", damping=None, **_):
    """From the inputs' covariance C (stat): W C̃ = U S Qᵀ, Vᵀ = Qᵀ C̃⁻¹; the first r triplets (IPM: adapt what the inputs use) or the last r (KPM: leave that alone)
    (Yang et al. 2024). C = I gives PiSSA and MiLoRA. damping: a list that takes the share of the damping, see `damp`."""
    U, S, Vt, share = context_svd(W, stat, rng)
    if damping is not None:
        damping.append(share)
    part = slice(None, r) if keep == "first" else slice(-r, None)
    return split(U[:, part], S[part], Vt[part], s)


def split(U, S, Vt, s):
    """s B0 A0 = U S Vᵀ, the singular values shared evenly."""
    root = (S / s).sqrt()
    return root[:, None] * Vt, U * root


def exact_svd(W, rng):
    return tuple(t.to(W.device) for t in torch.linalg.svd(W.float().to(rng.device), full_matrices=False))


def context_svd(W, C, rng):
    """-> U, S of W C̃, and Vᵀ = Qᵀ C̃⁻¹, so that U S Vᵀ = W; the share of C's damping."""
    damped, inverse, share = damp(C.to(rng.device).float())
    U, S, Qt = exact_svd(W.float().to(rng.device) @ damped, rng)
    return U.to(W.device), S.to(W.device), (Qt @ inverse).to(W.device), share


def damp(C, share=0.01):
    """C̃ = C + share · mean(diag C) · I, the share doubled until C̃ C̃⁻¹ is I to 0.05. [in, in] -> C̃, C̃⁻¹, share. Raises ValueError where nothing helps."""
    I = torch.eye(len(C), device=C.device)
    for _ in range(12 if C.isfinite().all() and C.diag().mean() > 0 else 0):
        damped = C + share * C.diag().mean() * I
        inverse = torch.linalg.inv_ex(damped).inverse
        if (damped @ inverse - I).norm() < 0.05:
            return damped, inverse, share
        share *= 2
    raise ValueError(
        "the covariance of its inputs is zero or not finite, or cannot be inverted; look at the calibration rows"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Statistics that two initialisations need. `calibrate(round)` runs the model on calibration rows, one row at a time; for gradients it goes backward too.

GROUP = 4 * 2**30  # bytes of statistics held at a time


def statistic_size(layer, needs):
    """Bytes of a layer's gradient [out, in] or covariance [in, in], fp32."""
    return 4 * (layer.weight.numel() if needs is gradients else layer.weight.shape[1] ** 2)


def statistics(model, names, needs, calibrate, rounds=1, room_of_group=GROUP, progress=False):
    """Yield (layer name, [its statistic of every round]), the layers taken in groups whose statistics fit into so many bytes: calibrate runs once a group and round."""
    size = lambda name: statistic_size(model.get_submodule(name), needs)
    groups, room = [], 0
    for name in names:
        if not groups or size(name) * rounds > room:
            groups.append([])
            room = room_of_group
        groups[-1].append(name)
        room -= size(name) * rounds
    for group in tqdm(
        groups, desc=f"{needs.__name__} of {len(names)} layers", unit="group", disable=not progress
    ):
        each = []
        for i in range(rounds):
            with needs(model, group) as found, evaluating(model):  # dropout would blur what is measured
                calibrate(i)
            each.append(found)
        empty = [name for name in group if any(name not in found for found in each)]
        if empty:
            backward = " backward" if needs is gradients else ""
            raise ValueError(
                f"calibration: nothing reached {', '.join(empty[:3])}; does `calibrate` run the model{backward} on inputs with a batch dimension?"
            )
        for name in group:
            yield name, [found.pop(name) for found in each]


@contextmanager
def evaluating(model):
    """Within it, `model` is in eval mode; every module has its own mode back afterwards, also on an exception."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def gradients(model, names):
    """Within it, backward passes add up ∂L/∂W of the named layers, and of no other weight. -> {name: G [out, in], fp32 on the CPU}, filled as they come."""
    found, hooks, trained = {}, [], [p for p in model.parameters() if p.requires_grad]

    def take(p, name):
        found[name] = found.get(name, 0) + p.grad.float().cpu()
        p.grad = None

    model.requires_grad_(False)
    for name in names:
        W = model.get_submodule(name).weight.requires_grad_(True)
        hooks.append(W.register_post_accumulate_grad_hook(lambda p, name=name: take(p, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def covariances(model, names):
    """Within it, forward passes add up x̃ᵀ x̃ of the named layers' inputs x [1, L, in], x̃ = x / |max x|. -> {name: C [in, in], fp32}, in the end their mean over calls.

    A call without a batch dimension (DeBERTa's projections read positions too) does not count.
    """
    found, calls, hooks = {}, Counter(), []

    def take(x, name):
        if x.dim() == 3:
            x = x.detach().flatten(0, 1).float()
            x = x / x.max().abs()
            found[name] = found.get(name, 0) + x.T @ x
            calls[name] += 1

    for name in names:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, name=name: take(args[0], name)
            )
        )
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, C in found.items():
            C /= calls[name]


# CorDA++ (Yang et al. 2025, arXiv 2506.13187, Eq. 7-10): which covariance a layer takes, and how many directions


def compactness(damped, out):
    """log π of a damped covariance, π = √(out · σ_max) / σ_min: lower is more compact."""
    sigma = torch.linalg.eigvalsh(damped)
    return (0.5 * (math.log(out) + sigma[-1].log()) - sigma[0].clamp_min(1e-30).log()).item()


def choose_covariance(W, candidates, rng):
    """Eq. 7-8: of a layer's covariances the one with the smallest log π(C) · Σ_i σ_i / σ_max, σ of W C̃. -> its index, log π, σ [min(out, in)]."""
    best = None
    for i, C in enumerate(candidates):
        damped = damp(C.to(rng.device).float())[0]
        log_pi, sigma = (
            compactness(damped, W.shape[0]),
            torch.linalg.svdvals(W.float().to(rng.device) @ damped).cpu(),
        )
        score = log_pi * (sigma.sum() / sigma[0]).item()
        if best is None or score < best[0]:
            best = score, i, log_pi, sigma
    return best[1:]


def allocate_ranks(spectra, log_pi, width, budget, keep):
    """Eq. 9-10: rank of each layer within `budget` parameters. spectra {name: σ [R], falling}, width {name: in + out}. -> {name: rank of the adapter}.

    n smallest directions are filtered out of each layer, from n = 1 on: always one more from the layer with the lowest log π · σ_-n / Σ_{k≤R-n} σ_k. keep "last"
    (KPM): they become the adapter, until the budget is passed; "first" (IPM): the others do, until they fit into it. A layer of one direction keeps it.
    """
    n, tail, head = (
        dict.fromkeys(spectra, 1),
        *(
            {name: f(sigma.double()).tolist() for name, sigma in spectra.items()}
            for f in (torch.clone, lambda t: t.cumsum(0))
        ),
    )
    score = lambda name: log_pi[name] * tail[name][-n[name]] / head[name][-1 - n[name]]
    rank = (lambda name: n[name]) if keep == "last" else lambda name: max(len(spectra[name]) - n[name], 1)
    heap, used = (
        [(score(name), name) for name in spectra if len(spectra[name]) > 1],
        sum(width[name] * rank(name) for name in spectra),
    )
    heapq.heapify(heap)
    while heap and (used <= budget if keep == "last" else used >= budget):
        _, name = heapq.heappop(heap)
        n[name] += 1
        used += width[name] if keep == "last" else -width[name]
        if n[name] < len(spectra[name]) - 1:
            heapq.heappush(heap, (score(name), name))
    return {name: rank(name) for name in spectra}


# ---------------------------------------------------------------------------------------------------------------------
# The table of methods


@dataclass(frozen=True)
class Method:
    """What distinguishes a method."""

    what: str
    layer: type | None = LowRank  # what stands in place of a layer; None: nothing, every weight trains
    init: callable = None  # how its A0, B0 are made, one of the functions above
    needs: callable = None  # what is measured first, on calibration rows: gradients or covariances
    train_A: bool = True  # False: only B trains
    groups: bool = False  # B and vectors have a learning rate of their own, LoRA+'s ratio times A's
    regularized: bool = False  # the poster's λ are its default


METHODS = {
    "full": Method("every weight", layer=None),
    "lora": Method("W + s B A, B starts at zero", init=init_lora),
    "lora+": Method("LoRA, B learning faster than A", init=init_lora, groups=True),
    "lora-fa": Method("LoRA, A stays as drawn", init=init_lora, train_A=False),
    "lora-ga": Method(
        "W + s (B A - B0 A0), (A0, B0) singular vectors of the gradient", init=init_lora_ga, needs=gradients
    ),
    "adalora": Method("W + s B E A, ranks shared out by importance", layer=AdaLoRA, init=init_adalora),
    "dora": Method("m/n ∘ (W + s B A), magnitude and direction apart", layer=DoRA, init=init_lora),
    "pissa": Method("W + s (B A - B0 A0), (A0, B0) the largest singular triplets", init=init_pissa),
    "milora": Method("W + s (B A - B0 A0), (A0, B0) the smallest singular triplets", init=init_milora),
    "corda": Method(
        "W + s (B A - B0 A0), (A0, B0) triplets of W C, C the inputs' covariance",
        init=init_corda,
        needs=covariances,
    ),
    "corda++": Method("CorDA, covariance and rank chosen for each layer", init=init_corda, needs=covariances),
    "balora": Method(
        "PiSSA + consistency, diversity and SVD regularizers", init=init_pissa, regularized=True
    ),
    "bitfit": Method("every bias b + Δb, linear layers and norms", layer=BiasOffset),
    "hadapter": Method("h + Up SiLU(Down h) behind attention and MLP", layer=Houlsby),
    "padapter": Method("a bottleneck around the norm behind the MLP", layer=Pfeiffer),
}
ENCODERS_ONLY = ("bitfit", "hadapter", "padapter")  # biases, post-norm blocks: LLaMA has neither
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------------------------------------------------------
# attach, teacher, merge


@dataclass
class Report:
    """What attach did; print it."""

    method: str
    r: int
    alpha: float
    matched: dict = field(default_factory=dict)  # pattern -> names of the layers it matched
    trainable: int = 0
    head: int = 0  # of those, in a classification head, which trains whole
    total: int = 0  # parameters of the network itself
    notes: list = field(default_factory=list)  # what an initialisation has to say

    def __str__(self):
        rows = [
            f"  {pattern:<12} {len(names):>4} layers   {names[0]}{' ... ' + names[-1] if len(names) > 1 else ''}"
            for pattern, names in self.matched.items()
        ]
        title = f"{self.method}: {METHODS[self.method].what}" + (
            f" (r={self.r}, alpha={self.alpha:g})" if METHODS[self.method].init else ""
        )
        share = (
            f"  trainable {self.trainable:,} of {self.total:,} ({100 * self.trainable / self.total:.2f} %)"
        )
        parts = (
            f": {self.trainable - self.head:,} by the method, {self.head:,} in the head" if self.head else ""
        )
        return "\n".join([title, *rows, *(f"  {note}" for note in self.notes), share + parts])


def attach(
    model,
    method="balora",
    r=16,
    alpha=None,
    targets=None,
    seed=0,
    niter=10,
    oversample=8,
    frozen_copy=False,
    progress=False,
    calibrate=None,
    rounds=5,
    keep="first",
    gamma=16.0,
    correct_B=False,
    start=None,
):
    """Freeze `model` and make it trainable by `method`. Any module that holds nn.Linear layers will do. Submodules that it names in `trained_whole`
    (a classification head) train too.

    r: rank; of bottleneck adapters their width; AdaLoRA starts at 1.5 r and ends at r on average. alpha: the bracket counts s = alpha / r (None: alpha = r).
    targets: names or patterns of layers ("q_proj", "layers.0.*"); None: the seven projections (bitfit: every bias; bottlenecks: every place).
    niter, oversample: the fast SVD, see `top_svd` (niter 0: exact).
    frozen_copy: for "full", keep the pre-trained weights too, which `teacher` needs there. calibrate(round): runs the model on rows, see `statistics`;
    LoRA-GA and CorDA need it (CorDA++ `rounds` times, and a second time once the ranks are known). keep: of CorDA's triplets, "first" (IPM) or "last" (KPM). gamma: LoRA-GA's γ.
    correct_B: LoRA-FA's second version. start: {name: tensor}, the network's state at a checkpoint to go on from: A0, B0 and ranks are those, nothing is measured or
    decomposed again. -> Report.
    Raises ValueError: unknown method, r or alpha out of range, a pattern that matches nothing, no calibration, a second attach.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; {nearest(method, METHODS)}known: {', '.join(METHODS)}")
    alpha = r if alpha is None else alpha
    if r < 1 or alpha <= 0 or keep not in ("first", "last"):
        raise ValueError(
            f"r={r}, alpha={alpha}, keep={keep}: r must be at least 1, alpha above 0, keep first or last"
        )
    if correct_B and method != "lora-fa":
        raise ValueError(f"correct_B with {method}: it is LoRA-FA's second version; leave it out")
    if adapted_layers(model) or hasattr(model, "pretrained"):
        raise ValueError("this model already has an adapter: merge it first, or load the model anew")
    report, m = Report(method, r, alpha, total=sum(p.numel() for p in model.parameters())), METHODS[method]
    device = next(iter(model.parameters())).device
    rng = torch.Generator("cpu" if device.type in ("mps", "meta") else device).manual_seed(
        seed
    )  # MPS has no SVD
    if m.layer is None:
        model.requires_grad_(True)
        model.pretrained = (
            {name: p.detach().clone() for name, p in model.named_parameters()} if frozen_copy else None
        )
    else:
        model.requires_grad_(False)
        report.matched = match(model, targets, m.layer)
        names = list(dict.fromkeys(name for names in report.matched.values() for name in names))
        if m.init:
            options = dict(niter=niter, oversample=oversample, keep=keep, gamma=gamma)
            if start:
                pairs = resumed(
                    model, names, start, m.layer, None if method == "corda++" else first_rank(m, r)
                )
            else:
                pairs = starts(
                    model,
                    method,
                    names,
                    r,
                    alpha / r,
                    rng,
                    calibrate,
                    rounds,
                    progress,
                    options,
                    report.notes,
                )
                pairs = tqdm(
                    pairs,
                    desc=f"{method} initialisation",
                    unit="layer",
                    total=len(names),
                    disable=not progress,
                )
            if m.needs:  # what is measured is the plain network
                made = list(pairs)[::-1]
                pairs = (made.pop() for _ in names)
            for name, (A0, B0) in pairs:
                s = alpha / (len(A0) + 1e-5) if m.layer is AdaLoRA else alpha / r
                replace(
                    model,
                    name,
                    m.layer(model.get_submodule(name), A0, B0, s, *([] if m.train_A else [False])),
                )
        else:
            for name in names:
                inner = model.get_submodule(name)
                replace(
                    model,
                    name,
                    m.layer(inner)
                    if m.layer is BiasOffset
                    else m.layer(inner, model.width, r, rng).to(device),
                )
        if correct_B:
            correct(model)
        for module in whole(model).values():
            module.requires_grad_(True)
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.head = sum(p.numel() for module in whole(model).values() for p in module.parameters())
    return report


def starts(model, method, names, r, s, rng, calibrate, rounds, progress, options, notes):
    """Yield (name, (A0, B0)) of each layer, measuring first what the method needs; what there is to say about it goes into `notes`."""
    m, W = METHODS[method], lambda name: model.get_submodule(name).weight.detach()
    ranks = dict.fromkeys(names, first_rank(m, r))
    small, directions, why = (
        min(names, key=lambda name: min(W(name).shape)),
        ranks[names[0]],
        " (1.5 r at the start)" if m.layer is AdaLoRA else "",
    )
    if m.init is init_lora_ga:
        directions, why = 2 * r, " (lora-ga takes 2r directions)"
    if directions > min(W(small).shape):
        raise ValueError(
            f"r={r}{why} is above the smallest dimension of {small} ({min(W(small).shape)}); choose a smaller r"
        )
    if next(iter(model.parameters())).is_meta:  # a dry run: shapes only
        zero = m.init is init_lora
        yield from (
            (
                name,
                (
                    W(name).new_empty(ranks[name], W(name).shape[1]),
                    None if zero else W(name).new_empty(W(name).shape[0], ranks[name]),
                ),
            )
            for name in names
        )
        return
    tokens, damping, stats = [], [], ((name, [None]) for name in names)
    if m.needs:
        if calibrate is None:
            raise ValueError(
                f"{method} starts from {m.needs.__name__}: attach(..., calibrate=function that runs the model on some rows)"
            )
        measure = lambda: statistics(
            model,
            names,
            m.needs,
            lambda i: tokens.append(calibrate(i)),
            rounds if method == "corda++" else 1,
            progress=progress,
        )
        stats = measure()
        if method == "corda++":
            chosen = {}  # of each layer: index of the covariance, log π, σ
            for name, found in stats:
                with naming(method, name):
                    chosen[name] = choose_covariance(W(name), found, rng)
            width = {name: sum(W(name).shape) for name in names}
            ranks = allocate_ranks(
                {name: sigma for name, (_, _, sigma) in chosen.items()},
                {name: log_pi for name, (_, log_pi, _) in chosen.items()},
                width,
                r * sum(width.values()),
                options["keep"],
            )
            won, order = Counter(i for i, _, _ in chosen.values()), sorted(ranks.values())
            notes.append(
                f"ranks {order[0]} to {order[-1]}, median {order[len(order) // 2]}; layers that chose round 1, 2, ...: {', '.join(str(won[i]) for i in range(rounds))}"
            )
            stats = ((name, [found[chosen[name][0]]]) for name, found in measure())
    for name, (stat,) in stats:
        with naming(method, name):
            start = m.init(W(name), ranks[name], s, rng, stat=stat, damping=damping, **options)
        yield name, start
    if damping:
        notes += covariance_notes(damping, tokens, [W(name).shape[1] for name in names])


@contextmanager
def naming(method, layer):
    """A ValueError inside says whose it is."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{method}: {layer}: {e}") from None


def covariance_notes(damping, tokens, inputs):
    """What to say of CorDA's covariances: the shares of damping of all layers, the tokens of each calibration (or None), the layers' numbers of inputs -> lines."""
    raised = sum(share > min(damping) for share in damping)
    lines = [
        f"covariances damped by {min(damping):.0%} of their mean diagonal"
        + (f", up to {max(damping):.0%} in {raised} layers" if raised else "")
    ]
    read = min((n for n in tokens if n), default=math.inf)
    if short := sum(n > read for n in inputs):
        lines.append(
            f"{short} of {len(inputs)} layers have more inputs than the {read:,} tokens measured, so their covariances lack rank; more calibration rows mend that"
        )
    return lines


def first_rank(m, r):
    return math.ceil(1.5 * r) if m.layer is AdaLoRA else r


def resumed(model, names, state, layer, rank):
    """Yield (name, (A0, B0)) as they stand in the state of a checkpoint: A and B themselves where A0, B0 are not kept. rank: what they must have, None: any."""
    for name in names:
        A, B, A0, B0 = (state.get(f"{name}.{leaf}") for leaf in ("A", "B", "A0", "B0"))
        if A is None or rank not in (None, len(A)):
            raise ValueError(
                f"start: {'no ' if A is None else f'rank {len(A)}, not {rank}, of '}{name}.A in it; is it a checkpoint of another model or adapter?"
            )
        A0, B0, W = A if A0 is None else A0, B if layer is AdaLoRA else B0, model.get_submodule(name).weight
        yield name, (A0.to(W.device), None if B0 is None else B0.to(W.device))


def correct(model):
    """LoRA-FA's second version (arXiv 2308.03303v2): B's gradient times (A Aᵀ)⁻¹ / s², which makes the step of s B A the closest one to full tuning's."""
    for layer in adapted_layers(model).values():
        A = layer.A.detach().cpu().double()
        P = torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(len(A), dtype=A.dtype)) / layer.s**2
        layer.B.register_hook(lambda g, P=P.to(layer.B): g @ P)


def whole(model):
    """-> {name: submodule} that trains whole beside any method: a classification head."""
    return {
        name: model.get_submodule(name)
        for name in getattr(model, "trained_whole", ())
        if hasattr(model, name)
    }


def match(model, targets, layer=LowRank):
    """-> {pattern: names of the places it matches}; default for low-rank layers: those of TARGETS that the model has, otherwise every place there is for `layer`."""
    places, what = adaptable(model, layer)
    leaves = sorted({n.rsplit(".", 1)[-1] for n in places})
    patterns = targets or (TARGETS if layer in LINEAR else leaves)
    found = {
        t: [n for n in places if n == t or n.endswith("." + t) or fnmatch.fnmatch(n, t)] for t in patterns
    }
    if targets is None:
        found = {t: names for t, names in found.items() if names}
    empty = [t for t, names in found.items() if not names]
    if empty or not found:
        raise ValueError(
            f"targets: nothing matches {', '.join(empty or patterns) or 'any'}; the model's {what} are {', '.join(leaves) or 'none'}"
        )
    return found


LINEAR = (LowRank, DoRA, AdaLoRA)


def adaptable(model, layer=LowRank):
    """-> names of the places where `layer` may stand, what they are."""
    if layer in (Houlsby, Pfeiffer):
        return list(
            getattr(model, "bottlenecks", {}).get(layer.__name__, ())
        ), "places for bottleneck adapters (which belong to post-norm encoders)"
    closed = (*getattr(model, "not_adapted", ()), *whole(model))
    fits, what = (
        (lambda m: isinstance(m, nn.Linear), "linear layers")
        if layer in LINEAR
        else (lambda m: isinstance(m, nn.Linear | nn.LayerNorm) and m.bias is not None, "layers with a bias")
    )
    return [
        name
        for name, m in model.named_modules()
        if fits(m) and not any(f"{name}.".startswith(f"{c}.") for c in closed)
    ], what


def replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted_layers(model):
    """-> {name: adapted layer}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, (*LINEAR, Houlsby, BiasOffset))}


def nearest(word, known):
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


@contextmanager
def teacher(model):
    """The pre-trained network, exactly, at any step: brackets off, eval mode, no gradient; all restored, also on an exception.

    After attach(..., "full", frozen_copy=True) the copy of the weights is swapped in instead.
    """
    layers, copy = adapted_layers(model).values(), getattr(model, "pretrained", None)
    if not layers and not copy:
        raise ValueError('teacher: no adapter to switch off; attach one ("full" needs frozen_copy=True)')
    switches = [(m, m.on) for m in layers]

    def swap():
        for name, p in model.named_parameters():
            if copy:
                p.data, copy[name] = copy[name], p.data

    swap()
    try:
        for m in layers:
            m.on = False
        with evaluating(model), torch.no_grad():
            yield model
    finally:
        swap()
        for m, on in switches:
            m.on = on


def merge(model):
    """Fold every bracket into its W, every Δb into its b, and put plain layers back. -> how many. A second call finds none and does nothing.

    Raises ValueError for bottleneck adapters, which are no linear map.
    """
    layers = adapted_layers(model)
    if any(isinstance(layer, Houlsby) for layer in layers.values()):
        raise ValueError(
            "merge: a bottleneck adapter has a nonlinearity, so no weight can take it in; keep the adapter beside the model"
        )
    for name, layer in layers.items():
        with torch.no_grad():
            replace(model, name, layer.merged())
    return len(layers)


# ---------------------------------------------------------------------------------------------------------------------
# The regularizers of the poster, NLU form: class logits of N examples


def kl(Z_P, Z_F):
    """KL( softmax(Z_P) ‖ softmax(Z_F) ) of each row, nats. [M, V] twice -> [M]."""
    log_P, log_F = F.log_softmax(Z_P, dim=-1), F.log_softmax(Z_F, dim=-1)
    return (log_P.exp() * (log_P - log_F)).sum(-1)


def cr_nlu(Z_P, Z_F, T):
    """Consistency: L_CR = T² · KL( softmax(Z_P/T) ‖ softmax(Z_F/T) ), mean over examples, nats. Z_P, Z_F [N, D] -> scalar ≥ 0. (CR-NLU)"""
    return T**2 * kl(Z_P / T, Z_F / T).mean()


def dr_nlu(Z_F):
    """Diversity: L_DR = 1/D Σ_{i≠j} C(Z_F)²_ij, C = Z_cᵀ Z_c / (N-1), Z_c = Z_F - mean over examples. Z_F [N ≥ 2, D] -> scalar ≥ 0. (DR-NLU)"""
    N, D = Z_F.shape
    Z_c = Z_F - Z_F.mean(0)
    C = Z_c.T @ Z_c / (N - 1)
    return (C - C.diag().diag()).square().sum() / D


def svdr_nlu(Z_F, k):
    """Low rank: L_SVDR = - Σ_{i≤k} σ_i / Σ_{j≤min(N,D)} σ_j. Z_F [N, D] -> scalar in [-1, 0); where k ≥ min(N, D) the constant -1. (SVDR-NLU)"""
    sigma = torch.linalg.svdvals(Z_F.cpu() if Z_F.device.type == "mps" else Z_F)
    return -sigma[:k].sum() / sigma.sum().clamp_min(1e-8)


def idle_terms(n, D, d=None):
    """What cannot act on n examples of D classes, DR and SVDR looking at [n, d] (default: the logits). -> {"cr" | "dr" | "svdr": why}, for the run to say aloud."""
    d, idle = d or D, {}
    if D == 1:
        idle["cr"] = "the softmax of one logit is 1"
    if d == 1 or n == 1:
        idle["dr"] = (
            "one column has no off-diagonal covariance"
            if d == 1
            else "the covariance of one example is undefined"
        )
        idle["svdr"] = "one singular value is all of the spectrum: the constant -1"
    return idle


# ---------------------------------------------------------------------------------------------------------------------
# The regularizers of the poster, NLG form. Rows are valid positions only.


def cr_nlg(Z_P, Z_F, T):
    """Consistency: L_CR = T² · 1/M Σ_i KL( P_P(y_i|x; T) ‖ P_F(y_i|x; T) ), nats. Z_P, Z_F [M, V] -> scalar ≥ 0. (CR-NLG)"""
    return T**2 * kl(Z_P / T, Z_F / T).mean()


def dr_nlg(Z_F, K):
    """Diversity: L_DR = 1/M Σ_i Σ_{v in top-K} P'_F(v) log P'_F(v), P' renormalised within the top K. Z_F [M, V] -> scalar in [-log K, 0]. (DR-NLG)"""
    log_P = F.log_softmax(Z_F.topk(min(K, Z_F.shape[-1]), dim=-1).values, dim=-1)
    return (log_P.exp() * log_P).sum(-1).mean()


def svdr_nlg(Z_F, k, niter=2, oversample=5, seed=0):
    """Low rank: L_SVDR = - Σ_{i≤k} σ̃_i / ‖Z‖_F. Z_F [M, V], or [M, d] with the same σ -> scalar in [-√k, 0). (SVDR-NLG)

    σ̃ are the singular values of Qᵀ Z, Q an orthonormal basis of k + oversample directions found by `niter` rounds of subspace
    iteration without gradient; only singular values are differentiated, so nothing divides by σ_i² - σ_j².
    """
    Z_F = Z_F.cpu() if Z_F.device.type == "mps" else Z_F  # MPS has no SVD
    Q = range_basis(Z_F.detach(), k + oversample, niter, seed)
    sigma = torch.linalg.svdvals(Z_F if Q is None else Q.T @ Z_F)
    return -sigma[:k].sum() / Z_F.norm().clamp_min(1e-8)


@torch.no_grad()
def range_basis(Z, q, niter, seed):
    """Q [M, q], orthonormal, spanning nearly what Z's largest singular vectors span; None where q leaves nothing out."""
    if q >= min(Z.shape):
        return None
    rng = torch.Generator(Z.device).manual_seed(seed)  # its own: training draws nothing from it
    Q = torch.randn(Z.shape[0], q, generator=rng, device=Z.device)  # on M's side: the same for Z and for H Rᵀ
    for _ in range(niter + 1):
        Q = torch.linalg.qr(Z @ torch.linalg.qr(Z.T @ Q).Q).Q
    return Q


# ---------------------------------------------------------------------------------------------------------------------
# The objectives


def loss_nlu(
    Z_F, y, Z_P=None, lambdas=(0.15, 0.03, 0.03), T=2.0, k=5, G=None, N=None, share=1.0, label_smoothing=0.0
):
    """L = L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR, of one micro-batch (poster, "Overall objective for NLU").

    Z_F [n, D]: class logits, y [n]: class ids (cross-entropy), or scores with D = 1 (squared error). Z_P [n, D]: the teacher's logits. G [n, d]: what
    DR and SVDR look at, default Z_F (the poster); pooled features are the other sensible choice, where D is large. N: examples in the whole
    optimizer step, default n; task and CR are Σ/N, so micro-batches add up to the large batch. share: this micro-batch's part of the
    average over micro-batches, which DR and SVDR take. SVDR's k is min(k, min(n, D) - 1), or it would be the constant -1. A term whose λ is 0
    is not computed, nor is one that cannot act (`idle_terms`).
    -> total (scalar, differentiable), terms {"task", "cr", "dr", "svdr"}: raw values that add up over micro-batches.
    """
    l1, l2, l3 = lambdas
    if l1 and Z_P is None:
        raise ValueError("loss_nlu: λ1 > 0 needs the teacher's Z_P")
    Z_F, part = Z_F.float(), len(y) / (N or len(y))
    G = Z_F if G is None else G.float()
    idle = idle_terms(len(G), Z_F.shape[1], G.shape[1])
    terms = {
        "task": part
        * (
            F.mse_loss(Z_F[:, 0], y)
            if y.is_floating_point()
            else F.cross_entropy(Z_F, y, label_smoothing=label_smoothing)
        )
    }
    if l1 and "cr" not in idle:
        terms["cr"] = part * cr_nlu(Z_P, Z_F, T)
    if l2 and "dr" not in idle:
        terms["dr"] = share * dr_nlu(G)
    if l3 and "svdr" not in idle:
        terms["svdr"] = share * svdr_nlu(G, min(k, min(G.shape) - 1))
    weight = dict(task=1.0, cr=l1, dr=l2, svdr=l3)
    return sum(weight[name] * value for name, value in terms.items()), {
        name: value.detach() for name, value in terms.items()
    }


def loss_nlg(
    H_F,
    y,
    E=None,
    H_P=None,
    lambdas=(0.025, 0.005, 0.005),
    T=2.0,
    K=20,
    k=10,
    M=None,
    cr_scale=1.0,
    share=1.0,
    R=None,
    chunk=None,
    compile=False,
    label_smoothing=0.0,
):
    """L = L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR, of one micro-batch (poster, "Overall objective for NLG").

    With E None, H_F and H_P are logits [M, V]: the path to read. With a frozen head E [V, d] they are hidden states [M, d]: logits
    are made `chunk` rows at a time (None: 64 on a CPU, 1024 elsewhere) and their gradient is taken at once, so [M, V] never
    exists; the same functions do the maths, through torch.compile where `compile` is set.

    y [M]: token ids. H_P: the teacher's, for the first len(H_P) rows (all of them, unless only some sequences were shown to it).
    M: valid positions in the whole optimizer step, default those here; token-wise terms are Σ/M, so micro-batches add up to the
    large batch. cr_scale: sequences in the step / sequences shown to the teacher. share: this micro-batch's part of the average
    over micro-batches, which SVDR takes. R: head_factor(E). label_smoothing: of the task loss, a control beside CR. A term whose λ is 0 is not computed.
    -> total (scalar, differentiable), terms {"task", "cr", "dr", "svdr"}: raw values that add up over micro-batches.
    """
    l1, l2, l3 = lambdas
    if l1 and H_P is None:
        raise ValueError("loss_nlg: λ1 > 0 needs the teacher's H_P")
    one = 1 / (M or len(y))
    scale = {"task": one, "cr": cr_scale * one, "dr": one}  # Σ over rows -> the term's raw value
    weight = {"task": one, "cr": l1 * scale["cr"], "dr": l2 * one}  # Σ over rows -> its part of L
    H_P = H_P if l1 else H_F[:0]
    sums = partial(compiled(token_sums) if compile else token_sums, smoothing=label_smoothing)
    if E is None:
        values = sums(H_F, y, H_P, E, T, K, bool(l2))
        total = sum(weight[name] * v for name, v in values.items())
    else:
        total, values = by_chunks(
            sums, weight, H_F, y, H_P, E, T, K, bool(l2), chunk or (64 if H_F.device.type == "cpu" else 1024)
        )
    terms = {name: scale[name] * v.detach() for name, v in values.items()}
    if l3:
        svdr = svdr_nlg(H_F.float() if E is None else F.linear(H_F.float(), R), k) * share
        total, terms["svdr"] = total + l3 * svdr, svdr.detach()
    return total, terms


def token_sums(H_F, y, H_P, E, T, K, diversity, smoothing=0.0):
    """The token-wise terms of some rows, each summed over its rows (the functions above are means). H_P may cover the first rows only."""
    Z_F = logits(H_F, E)
    sums = {"task": F.cross_entropy(Z_F, y, reduction="sum", label_smoothing=smoothing)}
    if len(H_P):
        sums["cr"] = len(H_P) * cr_nlg(logits(H_P, E), Z_F[: len(H_P)], T)
    if diversity:
        sums["dr"] = len(H_F) * dr_nlg(Z_F, K)
    return sums


@lru_cache
def compiled(function):
    return torch.compile(function)


def logits(H, E):
    """H [m, d], E [V, d] -> Z [m, V] in fp32; E None: H is Z."""
    return (H if E is None else F.linear(H, E)).float()


def by_chunks(sums, weight, H_F, y, H_P, E, T, K, diversity, chunk):
    """Weighted total and values of `sums` over chunks of rows. The gradient with respect to H_F is taken chunk by chunk and kept for the backward pass."""
    total, values, G = 0.0, {}, torch.empty_like(H_F)
    learn = H_F.requires_grad and torch.is_grad_enabled()
    for rows in (slice(start, start + chunk) for start in range(0, len(y), chunk)):
        H = H_F[rows].detach().requires_grad_(learn)
        part = sums(H, y[rows], H_P[rows], E, T, K, diversity)
        value = sum(weight[name] * v for name, v in part.items())
        if learn:
            (G[rows],) = torch.autograd.grad(value, H)
        total = total + value.detach()
        for name, v in part.items():
            values[name] = values.get(name, 0.0) + v.detach()
    return WithGradient.apply(H_F, total, G), values


class WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to H is already known to be G."""

    @staticmethod
    def forward(ctx, H, total, G):
        ctx.save_for_backward(G)
        return total.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


@torch.no_grad()
def head_factor(E):
    """R [d, d] of E = Q R, fp32. Q has orthonormal columns, so Z = H Eᵀ and H Rᵀ have the same singular values and the same norm."""
    home = E.device
    return torch.linalg.qr((E.cpu() if home.type == "mps" else E).float(), mode="r").R.to(home)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer groups; AdaLoRA's budget


def param_groups(named, method="lora", ratio=16.0, weight_decay=0.0):
    """{name: trainable tensor} -> AdamW's groups. The rate of a group is the schedule's times its "ratio": 1, but `ratio` for LoRA+'s B and vectors (Hayou et al. 2024).

    LoRA+ gives biases and norms no weight decay, as in its authors' code.
    """
    if not METHODS[method].groups:
        return [dict(params=list(named.values()), ratio=1.0, weight_decay=weight_decay)]
    fast = {name for name, p in named.items() if p.dim() == 1 or name.endswith(".B")}
    still = {name for name in fast if name.endswith("bias") or "norm" in name}
    parts = (
        (named.keys() - fast, 1.0, weight_decay),
        (fast - still, ratio, weight_decay),
        (still, ratio, 0.0),
    )
    return [
        dict(params=[named[name] for name in named if name in part], ratio=scale, weight_decay=decay)
        for part, scale, decay in parts
        if part
    ]


def orthogonality(model):
    """AdaLoRA's regularizer: the mean over all A and B of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F (its code; the paper has squares and a sum). -> scalar ≥ 0"""
    layers = [m for m in adapted_layers(model).values() if isinstance(m, AdaLoRA)]
    gap = lambda G: (G - torch.eye(len(G), device=G.device)).norm()
    return sum(gap(m.A @ m.A.T) + gap(m.B.T @ m.B) for m in layers) / (2 * len(layers))


def budget(step, max_iters, t_i, t_f, b0, bT):
    """AdaLoRA's number of triplets after 0-based `step`: b0 up to t_i, falling by a cube to bT at max_iters - t_f."""
    if step <= t_i:
        return b0
    if step > max_iters - t_f:
        return bT
    return int(bT + (b0 - bT) * (1 - (step - t_i) / (max_iters - t_f - t_i)) ** 3)


def check_budget(max_iters, t_i, t_f, every):
    """Raises ValueError where AdaLoRA's schedule does not fit into the run."""
    if not (1 <= t_i and 1 <= t_f and t_i + t_f < max_iters and 1 <= every <= max_iters - t_f - t_i):
        raise ValueError(
            f"adalora: {t_i} first and {t_f} last steps at a fixed budget, a cut every {every} steps: together they must fit into the run's {max_iters} steps, each at least 1 (--adalora_first, --adalora_last, --adalora_every)"
        )


@torch.no_grad()
def allocate(model, step, max_iters, r, t_i, t_f, every, beta=0.85):
    """AdaLoRA, after optimizer.step() of 0-based `step` and before gradients are cleared: keep the budget's most important triplets, zero the others' E.

    Between cuts an E may grow again. r: the mean rank at the end. -> the budget, how many E are not zero.
    """
    layers = [m for m in adapted_layers(model).values() if isinstance(m, AdaLoRA)]
    if step < max_iters - t_f:
        for m in layers:
            m.observe(beta)
    b0 = sum(len(m.E) for m in layers)
    b = budget(step, max_iters, t_i, t_f, b0, r * len(layers))
    if (t_i < step <= max_iters - t_f and step % every == 0 or step > max_iters - t_f) and b < b0:
        scores = [m.importance() for m in layers]
        threshold = torch.cat(scores).kthvalue(b0 - b).values
        for m, score in zip(layers, scores):
            m.E[score <= threshold] = 0
    return b, sum(int(m.E.count_nonzero()) for m in layers)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: the step counts from 0


def lambda_schedule(step, max_iters, lambdas):
    """λ1 falls by cosine to a tenth; λ2, λ3 are 0 for 20 % of the steps, rise over the next 5 %, then stay (authors' script)."""
    p = step / max_iters
    ramp = min(max((p - 0.20) / 0.05, 0.0), 1.0)
    return lambdas[0] * (0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2), lambdas[1] * ramp, lambdas[2] * ramp


def lr_schedule(step, max_iters, warmup, linear=False):
    """The factor on the learning rate: linear warm-up over the first `warmup` share of steps, then cosine (PiSSA's script) or linear (GLUE's) decay to 0."""
    n = warmup * max_iters
    if step < n:
        return (step + 1) / (n + 1)
    p = (step - n) / max(max_iters - n, 1)
    return 1 - p if linear else 0.5 * (1 + math.cos(math.pi * p))


# ---------------------------------------------------------------------------------------------------------------------
# Saving and loading, in peft's folder format


def write_atomic(path, write):
    """Call write(file) on a temporary name, flush it to disk, then rename: a kill leaves the old file or the new one, never half of one."""
    tmp = path + ".tmp"
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        if os.path.exists(tmp):
            os.remove(tmp)
        raise OSError(
            f"cannot write {path} ({getattr(e, 'strerror', None) or e}); what was there before is untouched"
        ) from None
    os.replace(tmp, path)


def save_adapter(model, folder, base=None):
    """Write the adapter for the *original* checkpoint, under the checkpoint's own layer names: a plain LoRA wherever there is a low-rank change of W.

    B0 zero: lora_A = A, lora_B = B, rank r. Otherwise lora_A = [A; ΔA], lora_B = [ΔB, B0], rank 2r, alpha 2·alpha. Not [A; A0], [B, -B0]: that cancels as soon as
    somebody casts it to 16 bits. AdaLoRA: the triplets it kept, E in lora_B; layers that kept none are left out. DoRA as peft's, with its magnitudes. BitFit's
    offsets and bottleneck adapters have no form in peft: only `load_adapter` reads them. A head that trained whole is saved beside, as peft's modules_to_save.
    base: what to name as the base model.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "save_adapter: the model has no adapter (a fully tuned model is saved whole, by model.save)"
        )
    public = public_name(model)
    kind = type(next(iter(layers.values())))
    tensors = {
        name: {leaf: t.cpu() for leaf, t in found.items()}
        for name, layer in layers.items()
        if (found := saved_tensors(layer))
    }
    if not tensors:
        raise ValueError(
            "save_adapter: every E is zero, so there is no triplet to save; has AdaLoRA taken a step?"
        )
    state = {f"{public(name)}.{leaf}": t for name, found in tensors.items() for leaf, t in found.items()}
    head = {
        f"{name}.{leaf}": p
        for name, module in whole(model).items()
        for leaf, p in module.state_dict().items()
    }
    state |= {public(name): p.cpu() for name, p in head.items()}
    modules = dict.fromkeys(public(name).rpartition(".")[0] for name in head)
    saved_whole = dict.fromkeys(m.rpartition(".")[0] or m for m in modules)
    task = (
        "SEQ_CLS" if head else "SEQ_2_SEQ_LM" if getattr(model, "encoder", None) is not None else "CAUSAL_LM"
    )
    config = dict(
        base_model_name_or_path=base,
        task_type=task,
        bias="none",
        inference_mode=True,
        modules_to_save=list(saved_whole) or None,
    )
    if kind in LINEAR:
        twice = any(layer.B0 is not None for layer in layers.values()) if kind is LowRank else False
        form = (
            "rank 2r: lora_B = [ΔB, B0], lora_A = [A; ΔA]; load onto the original checkpoint"
            if twice
            else "lora_A = A, lora_B = B"
        )
        ranks = {name: len(found["lora_A.weight"]) for name, found in tensors.items()}
        config |= lora_config(
            model,
            {public(n): r for n, r in ranks.items()},
            {public(n): layers[n].s * r for n, r in ranks.items()},
            kind is DoRA,
        )
    else:
        form, config = OWN_FORMS[kind][1], config | dict(peft_type=OWN_FORMS[kind][0])
    os.makedirs(folder, exist_ok=True)
    state = {f"base_model.model.{name}": t.contiguous() for name, t in state.items()}
    write_atomic(
        os.path.join(folder, "adapter_model.safetensors"),
        lambda f: f.write(save(state, metadata={"format": "pt", "form": form})),
    )
    write_atomic(
        os.path.join(folder, "adapter_config.json"), lambda f: f.write(json.dumps(config, indent=1).encode())
    )


OWN_FORMS = {  # what peft has no form for: peft_type, what the file holds
    BiasOffset: ("BITFIT", "bias_offset = Δb, to be added to the layer's bias"),
    Houlsby: ("HOULSBY", "h + up SiLU(down h + down_bias) + up_bias behind a dropout"),
    Pfeiffer: ("PFEIFFER", "LN(f(LN u) + u), f(z) = up ReLU(down z + down_bias) + up_bias, in place of LN u"),
}


def public_name(model):
    """-> function: our name of a module -> the checkpoint's, or our own where the checkpoint has none (a dropout)."""
    return lambda name: getattr(model, "checkpoint_name", lambda name: name)(name) or name


@torch.no_grad()
def saved_tensors(layer):
    """-> {leaf: tensor} of an adapted layer as it stands in the file."""
    if isinstance(layer, BiasOffset):
        return {"bias_offset": layer.offset}
    if isinstance(layer, Houlsby):
        return {leaf: getattr(layer, leaf) for leaf in ("down", "down_bias", "up", "up_bias")}
    B, A = layer.bracket()
    if isinstance(layer, AdaLoRA):
        kept = layer.E != 0
        return {"lora_A.weight": A[kept], "lora_B.weight": B[:, kept] / layer.s} if kept.any() else {}
    return {"lora_A.weight": A, "lora_B.weight": B / layer.s} | (
        {"lora_magnitude_vector": layer.m} if isinstance(layer, DoRA) else {}
    )


def lora_config(model, ranks, alphas, dora):
    """peft's fields for layers {checkpoint's name: rank}, {name: alpha}; what is not the most common rank goes into the patterns, under full names."""
    public = public_name(model)
    rank, alpha = (
        Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas)
    )
    leaves = {name.rsplit(".", 1)[-1] for name in ranks}
    others = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, *LINEAR))
        and public(n) not in ranks
        and public(n).rsplit(".", 1)[-1] in leaves
    ]
    return dict(
        peft_type="LORA",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        target_modules=sorted(ranks if others else leaves),
        fan_in_fan_out=False,
        use_rslora=False,
        use_dora=dora,
    )


def load_adapter(model, folder):
    """Put a LoRA or a DoRA in peft's folder format (ours or peft's own), or one of our own forms, on a model that has none. -> number of layers. A low-rank change is a plain LoRA afterwards.

    Raises ValueError: another method, a variant that is more than s B A, layers missing or unknown, shapes that do not fit.
    """
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder}: no adapter_config.json; expected a folder in peft's format")
    try:
        with open(path) as f:
            config = json.load(f)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    extra = [k for k in ("fan_in_fan_out", "lora_bias") if config.get(k)] + ["bias"] * (
        config.get("bias", "none") != "none"
    )
    if str(config.get("init_lora_weights")).split("_niter")[0] in (
        "pissa",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "milora",
    ):
        raise ValueError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} belongs to a base whose weights that initialisation changed; "
            "convert it in peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    kinds = {"LORA": DoRA if config.get("use_dora") else LowRank} | {
        name: kind for kind, (name, _) in OWN_FORMS.items()
    }
    kind = kinds.get(config.get("peft_type"))
    if kind is None or extra:
        raise ValueError(
            f"{path}: {config.get('peft_type')} with {', '.join(extra) or 'its own form'}; plain LoRA, DoRA and this project's own forms can be loaded"
        )
    if adapted_layers(model):
        raise ValueError(
            "load_adapter: this model already has an adapter: merge it first, or load the model anew"
        )
    weights = os.path.join(folder, "adapter_model.safetensors")
    try:
        with safe_open(weights, "pt") as f:
            state = {key.removeprefix("base_model.model."): f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, FileNotFoundError) as e:
        raise ValueError(f"{weights}: cannot be read ({e}); is it whole?") from None
    public = public_name(model)
    head = {
        public(f"{name}.{leaf}"): p
        for name, module in whole(model).items()
        for leaf, p in module.state_dict(keep_vars=True).items()
    }
    if lacking := head.keys() - state.keys():
        raise ValueError(
            f"{folder}: no {', '.join(sorted(lacking)[:3])} in it, and the model's own head is new; was it tuned as a language model?"
        )
    for name in head:
        if state[name].shape != head[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(state[name].shape)}, the model's is {list(head[name].shape)}; another number of classes?"
            )
    tuned_head = {name: state.pop(name) for name in head}
    ours, leaves = {public(name): name for name in adaptable(model, kind)[0]}, LEAVES[kind]
    layers = dict.fromkeys(re.sub(rf"\.({'|'.join(map(re.escape, leaves))})$", "", key) for key in state)
    wrong = [n for n in layers if n not in ours] + [
        k for n in layers for k in (f"{n}.{leaf}" for leaf in leaves) if k not in state
    ]
    if wrong or len(state) != len(leaves) * len(layers):
        raise ValueError(
            f"{folder}: no place for, or no counterpart to, {', '.join(wrong[:5]) or 'some tensors'}; is it an adapter of this model?"
        )
    made = {
        ours[name]: loaded_layer(
            model,
            kind,
            model.get_submodule(ours[name]),
            name,
            config,
            folder,
            {leaf: state[f"{name}.{leaf}"] for leaf in leaves},
        )
        for name in layers
    }
    model.requires_grad_(False)  # nothing was changed up to here
    for name, layer in made.items():
        replace(model, name, layer)
    for name, tensor in tuned_head.items():
        head[name].data = tensor.to(head[name])
    return len(layers)


LEAVES = {
    LowRank: ("lora_A.weight", "lora_B.weight"),
    DoRA: ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    BiasOffset: ("bias_offset",),
    **dict.fromkeys((Houlsby, Pfeiffer), ("down", "down_bias", "up", "up_bias")),
}


def loaded_layer(model, kind, module, name, config, folder, tensors):
    """The adapted layer that saved tensors make of a plain one."""
    if kind in OWN_FORMS:
        layer = (
            BiasOffset(module)
            if kind is BiasOffset
            else kind(module, model.width, len(tensors["down"]), torch.Generator())
        )
        places = (
            {"bias_offset": layer.offset}
            if kind is BiasOffset
            else {leaf: getattr(layer, leaf) for leaf in tensors}
        )
        device = next(model.parameters()).device
    else:
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if (B.shape[0], A.shape[1]) != tuple(module.weight.shape):
            raise ValueError(
                f"{folder}: {name} has lora_B {list(B.shape)} and lora_A {list(A.shape)}, the layer is {list(module.weight.shape)}"
            )
        alpha = next(
            (
                a
                for pattern, a in config.get("alpha_pattern", {}).items()
                if re.fullmatch(rf"(.*\.)?({pattern})", name)
            ),
            config["lora_alpha"],
        )
        device = module.weight.device
        layer = kind(
            module, A.to(device), None, alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        )
        places = {"lora_B.weight": layer.B} | ({"lora_magnitude_vector": layer.m} if kind is DoRA else {})
    for leaf, p in places.items():
        if tensors[leaf].shape != p.shape:
            raise ValueError(
                f"{folder}: {name} has {leaf} {list(tensors[leaf].shape)}, the layer's is {list(p.shape)}"
            )
        p.data = tensors[leaf].float().to(device)
    return layer
