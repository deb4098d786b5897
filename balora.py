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
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# The adapted layer


class LowRank(nn.Module):
    """y = W x + b + s [ΔB  B0] [A; ΔA] x, in place of an nn.Linear whose frozen weight and bias it takes over.

    A, B are fp32 parameters. A0, B0 stand in W's dtype, and A, B start from exactly those values; B0 is None where B starts
    at zero (LoRA), and then the second half is absent. `on = False` leaves y = W x + b: the pre-trained layer.
    """

    def __init__(self, linear, A0, B0, s):
        super().__init__()
        self.weight, self.bias, self.s, self.on = linear.weight, linear.bias, s, True
        zeros = A0.new_zeros(linear.out_features, A0.shape[0])
        self.register_buffer("A0", None if B0 is None else A0.to(linear.weight.dtype))
        self.register_buffer("B0", None if B0 is None else B0.to(linear.weight.dtype))
        self.A = nn.Parameter((A0 if B0 is None else self.A0).to(torch.float32, copy=True))
        self.B = nn.Parameter((zeros if B0 is None else self.B0).to(torch.float32, copy=True))

    def bracket(self):
        """-> s [ΔB  B0] [out, 2r], [A; ΔA] [2r, in] in fp32 (s B and A where B0 is zero)."""
        if self.B0 is None:
            return self.s * self.B, self.A
        return self.s * torch.cat([self.B - self.B0, self.B0.float()], dim=1), torch.cat([self.A, self.A - self.A0], dim=0)

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
    def forward(ctx, x, A, B, sBB, AA, s):                                       # sBB = s [ΔB B0], AA = [A; ΔA], cast
        u = F.linear(x, AA)                                                      # [..., 2r]
        ctx.s, ctx.r = s, A.shape[0]
        ctx.save_for_backward(x, u[..., :ctx.r].contiguous(), sBB, AA)
        return F.linear(u, sBB)

    @staticmethod
    def backward(ctx, g):
        x, Ax, sBB, AA = ctx.saved_tensors
        g, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        v = g @ sBB                                                              # s g [ΔB B0]; its halves add up to s g B
        grad_A = (v[:, :ctx.r] + v[:, ctx.r:]).T @ x2                            # (s Bᵀ gᵀ) x
        grad_B = ctx.s * (g.T @ Ax.reshape(-1, ctx.r))                           # s gᵀ (A x)
        grad_x = (v @ AA).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_A.float(), grad_B.float(), None, None, None


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
        self.inner.bias = nn.Parameter((self.inner.bias.float() + self.offset).to(self.inner.bias.dtype), requires_grad=False)
        return self.inner


def plain_linear(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias
    return linear


# ---------------------------------------------------------------------------------------------------------------------
# Initialisations: (W [out, in], r, s, rng, ...) -> A0 [r, in], B0 [out, r] or None for zeros

def init_lora(W, r, s, rng, **_):
    """A ~ U(-1/√in, 1/√in), B = 0 (Hu et al. 2021)."""
    bound = 1 / math.sqrt(W.shape[1])
    return torch.empty(r, W.shape[1], device=rng.device).uniform_(-bound, bound, generator=rng).to(W.device), None


def init_pissa(W, r, s, rng, niter=10, oversample=8):
    """The r largest singular triplets: A0 = √(S/s) Vᵀ, B0 = U √(S/s), so that s B0 A0 is W's best rank-r part (Meng et al. 2024)."""
    U, S, Vt = top_svd(W.float(), r, niter, oversample, rng)
    root = (S / s).sqrt()
    return root[:, None] * Vt, U * root


def top_svd(W, r, niter, oversample, rng):
    """The r largest singular triplets of W [out, in], fp32 -> U [out, r], S [r], Vt [r, in].

    niter 0: exact. Otherwise subspace iteration (Halko et al. 2011) on r + oversample directions, on the
    Gram matrix of W's smaller side, so a round costs one small product and one thin QR. Random start from `rng`.
    """
    home, W = W.device, W.to(rng.device)
    if niter == 0 or r + oversample >= min(W.shape):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r].to(home), S[:r].to(home), Vt[:r].to(home)
    wide = W.shape[0] < W.shape[1]
    tall = W.T if wide else W                                                   # [m, n], n ≤ m
    a, b = tall.chunk(2, dim=1)
    ab = a.T @ b
    gram = torch.cat([torch.cat([a.T @ a, ab], 1), torch.cat([ab.T, b.T @ b], 1)])   # tallᵀ tall [n, n], its symmetric half computed once
    Q = torch.randn(gram.shape[0], r + oversample, generator=rng, device=rng.device)
    for _ in range(niter):
        Q = torch.linalg.qr(gram @ Q).Q
    P, R = torch.linalg.qr(tall @ Q)                                            # tall ≈ tall Q Qᵀ = P R Qᵀ
    U, S, Vt = torch.linalg.svd(R)
    U, S, Vt = (P @ U[:, :r]).to(home), S[:r].to(home), (Vt[:r] @ Q.T).to(home)
    return (Vt.T, S, U.T) if wide else (U, S, Vt)


# ---------------------------------------------------------------------------------------------------------------------
# The table of methods

@dataclass(frozen=True)
class Method:
    """What distinguishes a method: the layer it puts in place of a linear one, how that starts, whether the poster's λ are its default."""
    what: str
    layer: type | None = LowRank      # None: no new layers, every weight trains
    init: callable = None             # one of the functions above, for LowRank
    regularized: bool = False


METHODS = {
    "full":   Method("every weight", layer=None),
    "lora":   Method("W + s B A, B starts at zero", init=init_lora),
    "pissa":  Method("W + s (B A - B0 A0), (A0, B0) the largest singular triplets", init=init_pissa),
    "balora": Method("PiSSA + consistency, diversity and SVD regularizers", init=init_pissa, regularized=True),
    "bitfit": Method("every bias b + Δb, linear layers and norms", layer=BiasOffset),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------------------------------------------------------
# attach, teacher, merge

@dataclass
class Report:
    """What attach did; print it."""
    method: str
    r: int
    alpha: float
    matched: dict = field(default_factory=dict)      # pattern -> names of the layers it matched
    trainable: int = 0
    head: int = 0                                    # of those, in a classification head, which trains whole
    total: int = 0                                   # parameters of the network itself

    def __str__(self):
        rows = [f"  {pattern:<12} {len(names):>4} layers   {names[0]}{' ... ' + names[-1] if len(names) > 1 else ''}" for pattern, names in self.matched.items()]
        title = f"{self.method}: {METHODS[self.method].what}" + (f" (r={self.r}, alpha={self.alpha:g})" if METHODS[self.method].init else "")
        share = f"  trainable {self.trainable:,} of {self.total:,} ({100 * self.trainable / self.total:.2f} %)"
        return "\n".join([title, *rows, share + (f": {self.trainable - self.head:,} by the method, {self.head:,} in the head" if self.head else "")])


def attach(model, method="balora", r=16, alpha=None, targets=None, seed=0, niter=10, oversample=8, frozen_copy=False, progress=False):
    """Freeze `model` and make it trainable by `method`. Any module that holds nn.Linear layers will do. Submodules that it names in `trained_whole`
    (a classification head) train too.

    alpha: the bracket counts s = alpha / r (None: alpha = r). targets: names or patterns of layers ("q_proj",
    "layers.0.*"); None: the seven projections. niter, oversample: the fast SVD, see `top_svd` (niter 0: exact). frozen_copy:
    for "full", keep the pre-trained weights too, which `teacher` needs there. -> Report.
    Raises ValueError: unknown method, r or alpha out of range, a pattern that matches nothing, a second attach.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; {nearest(method, METHODS)}known: {', '.join(METHODS)}")
    alpha = r if alpha is None else alpha
    if r < 1 or alpha <= 0:
        raise ValueError(f"r={r}, alpha={alpha}: r must be at least 1 and alpha above 0")
    if adapted_layers(model) or hasattr(model, "pretrained"):
        raise ValueError("this model already has an adapter: merge it first, or load the model anew")
    report = Report(method, r, alpha, total=sum(p.numel() for p in model.parameters()))
    layer, init = METHODS[method].layer, METHODS[method].init
    if layer is None:
        model.requires_grad_(True)
        model.pretrained = {name: p.detach().clone() for name, p in model.named_parameters()} if frozen_copy else None
    else:
        model.requires_grad_(False)
        report.matched = match(model, targets, biases=layer is BiasOffset)
        names = dict.fromkeys(name for names in report.matched.values() for name in names)
        if init:
            small = {name: min(model.get_submodule(name).weight.shape) for name in names}
            if r > min(small.values()):
                raise ValueError(f"r={r} is above the smallest dimension of {min(small, key=small.get)} ({min(small.values())}); choose a smaller r")
        device = next(iter(model.parameters())).device
        rng = torch.Generator("cpu" if device.type in ("mps", "meta") else device).manual_seed(seed)     # MPS has no SVD
        init = shapes_only(init) if init and device.type == "meta" else init
        for name in tqdm(names, desc=f"{method} initialisation", unit="layer", disable=not (progress and init)):
            linear = model.get_submodule(name)
            if init:
                A0, B0 = init(linear.weight.detach(), r, alpha / r, rng, niter=niter, oversample=oversample)
            replace(model, name, layer(linear, A0, B0, alpha / r) if init else layer(linear))
        for module in whole(model).values():
            module.requires_grad_(True)
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.head = sum(p.numel() for module in whole(model).values() for p in module.parameters())
    return report


def whole(model):
    """-> {name: submodule} that trains whole beside any method: a classification head."""
    return {name: model.get_submodule(name) for name in getattr(model, "trained_whole", ()) if hasattr(model, name)}


def shapes_only(init):
    """An initialisation for a network on the meta device (a dry run)."""
    return lambda W, r, *_, **__: (W.new_empty(r, W.shape[1]), None if init is init_lora else W.new_empty(W.shape[0], r))


def match(model, targets, biases=False):
    """-> {pattern: names of the nn.Linear layers it matches}; default: those of TARGETS that the model has. biases: of all layers and norms with a bias."""
    layers = adaptable(model, biases)
    leaves = sorted({n.rsplit(".", 1)[-1] for n in layers})
    patterns = targets or (leaves if biases else TARGETS)
    found = {t: [n for n in layers if n == t or n.endswith("." + t) or fnmatch.fnmatch(n, t)] for t in patterns}
    if targets is None:
        found = {t: names for t, names in found.items() if names}
    empty = [t for t, names in found.items() if not names]
    if empty or not found:
        what = "layers with a bias" if biases else "linear layers"
        raise ValueError(f"targets: nothing matches {', '.join(empty or patterns) or 'any bias'}; the model's {what} are {', '.join(leaves) or 'none'}")
    return found


def adaptable(model, biases=False):
    """Names of the linear layers (biases: of layers and norms with a bias) that an adapter may stand beside."""
    closed = (*getattr(model, "not_adapted", ()), *whole(model))
    fits = (lambda m: isinstance(m, nn.Linear | nn.LayerNorm) and m.bias is not None) if biases else lambda m: isinstance(m, nn.Linear)
    return [name for name, m in model.named_modules() if fits(m) and not any(f"{name}.".startswith(f"{c}.") for c in closed)]


def replace(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted_layers(model):
    """-> {name: adapted layer}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRank | BiasOffset)}


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
    switches, modes = [(m, m.on) for m in layers], [(m, m.training) for m in model.modules()]

    def swap():
        for name, p in model.named_parameters():
            if copy:
                p.data, copy[name] = copy[name], p.data
    swap()
    try:
        for m in layers:
            m.on = False
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        swap()
        for m, on in switches:
            m.on = on
        for m, training in modes:
            m.training = training


def merge(model):
    """Fold every bracket into its W, every Δb into its b, and put plain layers back. -> how many. A second call finds none and does nothing."""
    layers = adapted_layers(model)
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
        idle["dr"] = "one column has no off-diagonal covariance" if d == 1 else "the covariance of one example is undefined"
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
    Z_F = Z_F.cpu() if Z_F.device.type == "mps" else Z_F                          # MPS has no SVD
    Q = range_basis(Z_F.detach(), k + oversample, niter, seed)
    sigma = torch.linalg.svdvals(Z_F if Q is None else Q.T @ Z_F)
    return -sigma[:k].sum() / Z_F.norm().clamp_min(1e-8)


@torch.no_grad()
def range_basis(Z, q, niter, seed):
    """Q [M, q], orthonormal, spanning nearly what Z's largest singular vectors span; None where q leaves nothing out."""
    if q >= min(Z.shape):
        return None
    rng = torch.Generator(Z.device).manual_seed(seed)                            # its own: training draws nothing from it
    Q = torch.randn(Z.shape[0], q, generator=rng, device=Z.device)               # on M's side: the same for Z and for H Rᵀ
    for _ in range(niter + 1):
        Q = torch.linalg.qr(Z @ torch.linalg.qr(Z.T @ Q).Q).Q
    return Q


# ---------------------------------------------------------------------------------------------------------------------
# The objectives

def loss_nlu(Z_F, y, Z_P=None, lambdas=(0.15, 0.03, 0.03), T=2.0, k=5, G=None, N=None, share=1.0, label_smoothing=0.0):
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
    terms = {"task": part * (F.mse_loss(Z_F[:, 0], y) if y.is_floating_point() else F.cross_entropy(Z_F, y, label_smoothing=label_smoothing))}
    if l1 and "cr" not in idle:
        terms["cr"] = part * cr_nlu(Z_P, Z_F, T)
    if l2 and "dr" not in idle:
        terms["dr"] = share * dr_nlu(G)
    if l3 and "svdr" not in idle:
        terms["svdr"] = share * svdr_nlu(G, min(k, min(G.shape) - 1))
    weight = dict(task=1.0, cr=l1, dr=l2, svdr=l3)
    return sum(weight[name] * value for name, value in terms.items()), {name: value.detach() for name, value in terms.items()}


def loss_nlg(H_F, y, E=None, H_P=None, lambdas=(0.025, 0.005, 0.005), T=2.0, K=20, k=10, M=None, cr_scale=1.0, share=1.0, R=None, chunk=None, compile=False):
    """L = L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR, of one micro-batch (poster, "Overall objective for NLG").

    With E None, H_F and H_P are logits [M, V]: the path to read. With a frozen head E [V, d] they are hidden states [M, d]: logits
    are made `chunk` rows at a time (None: 64 on a CPU, 1024 elsewhere) and their gradient is taken at once, so [M, V] never
    exists; the same functions do the maths, through torch.compile where `compile` is set.

    y [M]: token ids. H_P: the teacher's, for the first len(H_P) rows (all of them, unless only some sequences were shown to it).
    M: valid positions in the whole optimizer step, default those here; token-wise terms are Σ/M, so micro-batches add up to the
    large batch. cr_scale: sequences in the step / sequences shown to the teacher. share: this micro-batch's part of the average
    over micro-batches, which SVDR takes. R: head_factor(E). A term whose λ is 0 is not computed.
    -> total (scalar, differentiable), terms {"task", "cr", "dr", "svdr"}: raw values that add up over micro-batches.
    """
    l1, l2, l3 = lambdas
    if l1 and H_P is None:
        raise ValueError("loss_nlg: λ1 > 0 needs the teacher's H_P")
    one = 1 / (M or len(y))
    scale = {"task": one, "cr": cr_scale * one, "dr": one}                       # Σ over rows -> the term's raw value
    weight = {"task": one, "cr": l1 * scale["cr"], "dr": l2 * one}               # Σ over rows -> its part of L
    H_P = H_P if l1 else H_F[:0]
    sums = compiled(token_sums) if compile else token_sums
    if E is None:
        values = sums(H_F, y, H_P, E, T, K, bool(l2))
        total = sum(weight[name] * v for name, v in values.items())
    else:
        total, values = by_chunks(sums, weight, H_F, y, H_P, E, T, K, bool(l2), chunk or (64 if H_F.device.type == "cpu" else 1024))
    terms = {name: scale[name] * v.detach() for name, v in values.items()}
    if l3:
        svdr = svdr_nlg(H_F.float() if E is None else F.linear(H_F.float(), R), k) * share
        total, terms["svdr"] = total + l3 * svdr, svdr.detach()
    return total, terms


def token_sums(H_F, y, H_P, E, T, K, diversity):
    """The token-wise terms of some rows, each summed over its rows (the functions above are means). H_P may cover the first rows only."""
    Z_F = logits(H_F, E)
    sums = {"task": F.cross_entropy(Z_F, y, reduction="sum")}
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
            G[rows], = torch.autograd.grad(value, H)
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
        raise OSError(f"cannot write {path} ({getattr(e, 'strerror', None) or e}); what was there before is untouched") from None
    os.replace(tmp, path)


def save_adapter(model, folder, base=None):
    """Write the adapter as a plain LoRA for the *original* checkpoint, under the checkpoint's own layer names.

    B0 zero: lora_A = A, lora_B = B, rank r. Otherwise lora_A = [A; ΔA], lora_B = [ΔB, B0], rank 2r, alpha 2·alpha. Not
    [A; A0], [B, -B0]: that cancels as soon as somebody casts it to 16 bits. BitFit's offsets stand as bias_offset (peft has no such
    method, so only `load_adapter` reads them). A head that trained whole is saved beside, as peft's modules_to_save. base: what to name as the base model.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapter (a fully tuned model is saved whole, by model.save)")
    public = getattr(model, "checkpoint_name", lambda name: name)
    state, (first, *_) = {}, layers.values()
    for name, layer in layers.items():
        if isinstance(layer, BiasOffset):
            state[f"{public(name)}.bias_offset"] = layer.offset
        else:
            B, A = layer.bracket()
            state |= {f"{public(name)}.lora_A.weight": A, f"{public(name)}.lora_B.weight": B / layer.s}
    head = {f"{name}.{leaf}": p for name, module in whole(model).items() for leaf, p in module.state_dict().items()}
    state |= {public(name): p for name, p in head.items()}
    modules = dict.fromkeys(public(name).rpartition(".")[0] for name in head)
    saved_whole = dict.fromkeys(m.rpartition(".")[0] or m for m in modules)
    config = dict(base_model_name_or_path=base, task_type="SEQ_CLS" if head else "CAUSAL_LM", bias="none", inference_mode=True, modules_to_save=list(saved_whole) or None)
    if isinstance(first, BiasOffset):
        form, config = "bias_offset = Δb, to be added to the layer's bias", config | dict(peft_type="BITFIT")
    else:
        form = "lora_A = A, lora_B = B" if first.B0 is None else "rank 2r: lora_B = [ΔB, B0], lora_A = [A; ΔA]; load onto the original checkpoint"
        ranks = {public(name): layer.A.shape[0] * (1 if layer.B0 is None else 2) for name, layer in layers.items()}
        alphas = {public(name): layer.s * ranks[public(name)] for name, layer in layers.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        leaves = {public(name).rsplit(".", 1)[-1] for name in layers}
        others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and public(n).rsplit(".", 1)[-1] in leaves]
        config |= dict(peft_type="LORA", r=rank, lora_alpha=alpha, lora_dropout=0.0, rank_pattern={name: r for name, r in ranks.items() if r != rank},
                       alpha_pattern={name: a for name, a in alphas.items() if a != alpha}, target_modules=sorted(map(public, layers) if others else leaves),
                       fan_in_fan_out=False, use_rslora=False)
    os.makedirs(folder, exist_ok=True)
    state = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in state.items()}
    write_atomic(os.path.join(folder, "adapter_model.safetensors"), lambda f: f.write(save(state, metadata={"format": "pt", "form": form})))
    write_atomic(os.path.join(folder, "adapter_config.json"), lambda f: f.write(json.dumps(config, indent=1).encode()))


def load_adapter(model, folder):
    """Put a LoRA in peft's folder format (ours or peft's own), or BitFit's offsets, on a model that has none. -> number of layers. A LoRA is a plain one afterwards.

    Raises ValueError: another method, a variant that is more than s B A, layers missing or unknown, shapes that do not fit.
    """
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder}: no adapter_config.json; expected a folder in peft's format")
    with open(path) as f:
        config = json.load(f)
    extra = [k for k in ("use_dora", "fan_in_fan_out", "lora_bias") if config.get(k)] + ["bias"] * (config.get("bias", "none") != "none")
    if str(config.get("init_lora_weights")).split("_niter")[0] in ("pissa", "olora", "corda", "loftq", "lora_ga", "milora"):
        raise ValueError(f"{path}: init_lora_weights={config['init_lora_weights']!r} belongs to a base whose weights that initialisation changed; "
                         "convert it in peft (save_pretrained with path_initial_model_for_weight_conversion)")
    if config.get("peft_type") not in ("LORA", "BITFIT") or extra:
        raise ValueError(f"{path}: {config.get('peft_type')} with {', '.join(extra) or 'its own form'}; plain LoRA (and this project's BitFit) can be loaded")
    if adapted_layers(model):
        raise ValueError("load_adapter: this model already has an adapter: merge it first, or load the model anew")
    with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as f:
        state = {key.removeprefix("base_model.model."): f.get_tensor(key) for key in f.keys()}
    public = getattr(model, "checkpoint_name", lambda name: name)
    head = {public(f"{name}.{leaf}"): p for name, module in whole(model).items() for leaf, p in module.state_dict(keep_vars=True).items()}
    for name in head.keys() & state.keys():
        if state[name].shape != head[name].shape:
            raise ValueError(f"{folder}: {name} has shape {list(state[name].shape)}, the model's is {list(head[name].shape)}; another number of classes?")
        head[name].data = state.pop(name).to(head[name])
    bitfit = config["peft_type"] == "BITFIT"
    leaves = ("bias_offset",) if bitfit else ("lora_A.weight", "lora_B.weight")
    ours = {public(name): name for name in adaptable(model, bitfit)}
    layers = dict.fromkeys(re.sub(r"\.(lora_[AB]\.weight|bias_offset)$", "", key) for key in state)
    wrong = [n for n in layers if n not in ours] + [k for n in layers for k in (f"{n}.{leaf}" for leaf in leaves) if k not in state]
    if wrong or len(state) != len(leaves) * len(layers):
        raise ValueError(f"{folder}: no place for, or no counterpart to, {', '.join(wrong[:5]) or 'some tensors'}; is it an adapter of this model?")
    model.requires_grad_(False)
    for name in layers:
        replace(model, ours[name], loaded_layer(model.get_submodule(ours[name]), name, config, folder, *(state[f"{name}.{leaf}"] for leaf in leaves)))
    return len(layers)


def loaded_layer(module, name, config, folder, first, B=None):
    """The adapted layer that saved tensors make of a plain one: Δb, or A and B."""
    if B is None:
        layer = BiasOffset(module)
        if first.shape != layer.offset.shape:
            raise ValueError(f"{folder}: {name} has bias_offset {list(first.shape)}, the layer's bias is {list(layer.offset.shape)}")
        layer.offset.data = first.to(layer.offset)
        return layer
    A, r = first, first.shape[0]
    if (B.shape[0], A.shape[1]) != tuple(module.weight.shape):
        raise ValueError(f"{folder}: {name} has lora_B {list(B.shape)} and lora_A {list(A.shape)}, the layer is {list(module.weight.shape)}")
    alpha = next((a for pattern, a in config.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), config["lora_alpha"])
    layer = LowRank(module, A.to(module.weight.device), None, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    layer.B.data = B.float().to(module.weight.device)
    return layer
