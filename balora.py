"""BA-LoRA: low-rank adaptation with three regularizers (ICLR 2026 poster, arXiv 2408.04556v7), and its peers.

    L  =  L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR

             classifiers (NLU)                              language models (NLG)
    L_CR     T² KL( softmax(Z_P/T) ‖ softmax(Z_F/T) )       T² 1/M Σ_i KL( P_P(y_i|x;T) ‖ P_F(y_i|x;T) )
    L_DR     1/D Σ_{i≠j} C(Z_F)_ij²                         1/M Σ_i Σ_{v in top-K} P'_F(v|h_i) log P'_F(v|h_i)
    L_SVDR   - Σ_{i≤k} σ_i / Σ_j σ_j                        - Σ_{i≤k} σ̃_i / ‖Z_valid‖_F

Consistency (CR) holds the network near the pre-trained one, diversity (DR) keeps its outputs from collapsing,
the SVD term (SVDR) asks for outputs of low rank. What trains is an adapter beside each frozen weight W:

    y  =  W x + s (B A - B0 A0) x  =  W x + s [ΔB  B0] [A; ΔA] x          ΔA = A - A0,  ΔB = B - B0

The bracket, s (B A - B0 A0) x, is 0 at the start, bit for bit. Switched off at any later step, it leaves the
pre-trained network, so the teacher needs no second model; PiSSA's residual W - s B0 A0 is never stored. The
form on the right is what is computed and saved: in 16 bits B A - B0 A0 would lose all its digits.

    print(balora.attach(net, "balora", r=16, alpha=16))     # net: any module that holds nn.Linear layers
    with balora.teacher(net): H_P = hidden(net, ids)        # the pre-trained network
    total, terms = balora.loss_nlg(hidden(net, ids), y, E, H_P)

Read first: the six regularizers, loss_nlg, Anchored, init_pissa, attach, teacher; `main` of train_nlg.py.

    W [out, in]; A [r, in], B [out, r]     frozen weight; trained factors; s = alpha / r
    Z_F, Z_P [N, D] or [M, V]              logits of the tuned and of the pre-trained network
    N, D; M, V                             examples, classes; response tokens to predict, vocabulary
    P', σ̃                                  probabilities within the top K; σ by randomised SVD
    H [M, d], E [V, d]; R [d, d]           hidden states, head: Z = H Eᵀ; E = Q R, so H Rᵀ has the σ of Z
"""

import difflib
import fnmatch
import json
import math
import os
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import methodcaller

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

# ---- The six regularizers, as the poster writes them ------------------------


def kl(Z_P, Z_F):
    """KL( softmax(Z_P) ‖ softmax(Z_F) ) of each row, in nats. [M, V], [M, V] -> [M]"""
    log_P = F.log_softmax(Z_P, dim=-1)
    log_F = F.log_softmax(Z_F, dim=-1)
    return (log_P.exp() * (log_P - log_F)).sum(dim=-1)


def cr_nlu(Z_P, Z_F, T):
    """Consistency (CR-NLU). Logits of teacher and student, [N, D] each -> scalar ≥ 0"""
    # L_CR = T² · KL( softmax(Z_P / T) ‖ softmax(Z_F / T) ), mean over examples
    return T**2 * kl(Z_P / T, Z_F / T).mean()


def dr_nlu(Z_F):
    """Diversity (DR-NLU). Logits [N, D], N at least 2 -> scalar ≥ 0"""
    N, D = Z_F.shape
    Z_centered = Z_F - Z_F.mean(dim=0)
    # C = Z_centeredᵀ Z_centered / (N - 1)
    C = Z_centered.T @ Z_centered / (N - 1)
    # L_DR = 1/D Σ_{i≠j} C_ij²
    off_diagonal = C - torch.diag(C.diag())
    return off_diagonal.square().sum() / D


def svdr_nlu(Z_F, k):
    """Low rank (SVDR-NLU). Logits [N, D] -> scalar in [-1, 0); the constant -1 where k ≥ min(N, D)"""
    sigma = singular_values(Z_F)
    if sigma[0] == 0:
        return Z_F.sum() * 0  # logits of zeros have no spectrum: 0, without gradient
    # L_SVDR = - Σ_{i≤k} σ_i / Σ_j σ_j
    return -sigma[:k].sum() / sigma.sum()


def cr_nlg(Z_P, Z_F, T):
    """Consistency (CR-NLG). Logits of teacher and student, [M, V] each -> scalar ≥ 0"""
    # L_CR = T² · 1/M Σ_i KL( P_P(y_i | x; T) ‖ P_F(y_i | x; T) )
    return T**2 * kl(Z_P / T, Z_F / T).mean()


def dr_nlg(Z_F, K):
    """Diversity (DR-NLG). Logits [M, V] -> scalar in [-log K, 0]"""
    top = Z_F.topk(min(K, Z_F.shape[-1]), dim=-1).values  # [M, K]
    log_P = F.log_softmax(top, dim=-1)  # P' of the poster: renormalised within the top K
    # L_DR = 1/M Σ_i Σ_{v in top-K} P'_F(v | h_i) log P'_F(v | h_i)
    return (log_P.exp() * log_P).sum(dim=-1).mean()


def svdr_nlg(Z_F, k, rounds=2, extra=5, seed=0):
    """Low rank (SVDR-NLG), by randomised SVD. Logits [M, V], or H Rᵀ with the same σ -> scalar in [-√k, 0)"""
    Z = off_mps(Z_F).to(torch.promote_types(Z_F.dtype, torch.float32))
    energy = Z.square().sum()
    if energy == 0:
        return Z_F.sum() * 0  # logits of zeros have no spectrum: 0, without gradient
    q = min(k + extra, *Z.shape)
    with torch.no_grad():
        generator = torch.Generator(Z.device).manual_seed(seed)  # of its own: training draws nothing from it
        Q = torch.randn(len(Z), q, generator=generator, device=Z.device, dtype=Z.dtype)
        for _ in range(rounds + 1):
            Q = torch.linalg.qr(Z @ (Z.T @ Q)).Q  # [M, q], orthonormal
    # Only σ is differentiated, Q is a constant: gradients of U and V would divide by σ_i² - σ_j².
    sigma = torch.linalg.svdvals(Q.T @ Z)
    # L_SVDR = - Σ_{i≤k} σ̃_i / ‖Z‖_F
    return (-sigma[:k].sum() / energy.sqrt()).to(Z_F.device)


def singular_values(Z):
    """σ of a matrix, falling. [m, n] -> [min(m, n)]"""
    return torch.linalg.svdvals(off_mps(Z)).to(Z.device)


def off_mps(Z):
    """Z, on the CPU if it is on MPS, which has neither SVD nor QR."""
    return Z.cpu() if Z.device.type == "mps" else Z


# ---- The two objectives -----------------------------------------------------


def loss_nlu(Z_F, y, Z_P=None, lambdas=(0.15, 0.03, 0.03), T=2.0, k=5, **cross_entropy):
    """L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR for a classifier -> total, {term: value, None if it cannot act}

    Z_F, Z_P [N, D]: logits of student and teacher. y [N]: class ids, or scores where D = 1 (squared error).
    SVDR takes at most min(N, D) - 1 singular values: with all of them it would be the constant -1.
    """
    lambda1, lambda2, lambda3 = lambdas
    Z_F = Z_F.float()
    N, D = Z_F.shape
    if y.is_floating_point():
        task = F.mse_loss(Z_F[:, 0], y)
    else:
        task = F.cross_entropy(Z_F, y, **cross_entropy)
    cr = dr = svdr = 0.0
    terms = dict(task=task.detach(), cr=None, dr=None, svdr=None)
    if Z_P is not None and D > 1:
        cr = cr_nlu(Z_P.float(), Z_F, T)
        terms["cr"] = cr.detach()
    if min(N, D) > 1:
        dr = dr_nlu(Z_F)
        svdr = svdr_nlu(Z_F, min(k, min(N, D) - 1))
        terms.update(dr=dr.detach(), svdr=svdr.detach())
    total = task + lambda1 * cr + lambda2 * dr + lambda3 * svdr
    return total, terms


def loss_nlg(
    H_F, y, E, H_P=None, R=None, E_P=None, lambdas=(0.025, 0.005, 0.005), T=2.0, K=20, k=10, **cross_entropy
):
    """L_task + λ1 L_CR + λ2 L_DR + λ3 L_SVDR for a language model -> total, {term: value; CR may be None}

    H_F, H_P [M, d]: hidden states of student and teacher at the positions that predict the tokens y [M].
    E, E_P [V, d]: their heads, E_P = E unless E trains. R: head_factor(E), computed once while E is frozen.
    cross_entropy: label_smoothing. Task loss, CR and DR are values; `carrier` brings their gradient.
    """
    lambda1, lambda2, lambda3 = lambdas
    R = head_factor(E) if R is None else R
    E_P = E if E_P is None else E_P
    task, cr, dr, carrier = token_losses(H_F, y, E, H_P, E_P, lambdas, T, K, **cross_entropy)
    svdr = svdr_nlg(F.linear(H_F.float(), R), k)
    total = task + lambda1 * cr + lambda2 * dr + lambda3 * svdr
    terms = {"task": task, "cr": None if H_P is None else cr, "dr": dr, "svdr": svdr.detach()}
    return total + carrier, terms


def token_losses(H_F, y, E, H_P, E_P, lambdas, T, K, **cross_entropy):
    """-> values of task loss, CR and DR, and a scalar 0 whose gradient is that of their weighted sum"""
    # The logits of all rows, [M, V], would not fit in memory. They are made for a chunk of rows at a time,
    # and each chunk's gradient is taken at once; `carrier` hands it on to the backward pass.
    learning = torch.is_grad_enabled() and (H_F.requires_grad or E.requires_grad)
    head = [E] if learning and E.requires_grad else []  # the head, if it trains
    gradients = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (H_F, *head)]
    sums = torch.zeros(3, device=H_F.device)
    for start in range(0, len(y), chunk_rows(H_F.device)):
        rows = slice(start, start + chunk_rows(H_F.device))
        H = H_F[rows].detach().requires_grad_(learning)
        Z_P = None if H_P is None else F.linear(H_P[rows], E_P).detach().float()
        task, cr, dr = token_terms(H, y[rows], E, Z_P, T, K, **cross_entropy)
        sums += len(H) * torch.stack([task, cr, dr]).detach()
        if learning:  # of sums over rows: gradients of the mean could be too small for float16
            weighted = len(H) * (task + lambdas[0] * cr + lambdas[1] * dr)
            of_H, *of_E = torch.autograd.grad(weighted, [H, *head])
            gradients[0][rows] = of_H
            for gradient in of_E:
                gradients[1] += gradient
    carrier = (H_F.float() * gradients[0]).sum() / len(y)
    if head:
        carrier = carrier + (E.float() * gradients[1]).sum() / len(y)
    return *sums / len(y), carrier - carrier.detach()


def token_terms(H_F, y, E, Z_P, T, K, **cross_entropy):
    """Task loss, CR (0 without the teacher's logits) and DR of some rows, each a mean over them."""
    Z_F = F.linear(H_F, E).float()  # [rows, V]
    task = F.cross_entropy(Z_F, y, **cross_entropy)
    cr = Z_F.new_zeros(()) if Z_P is None else cr_nlg(Z_P, Z_F, T)
    return task, cr, dr_nlg(Z_F, K)


def chunk_rows(device):
    """Rows of logits in memory at a time."""
    return 64 if torch.device(device).type == "cpu" else 1024


def head_factor(E):
    """R [d, d] of E = Q R, fp32: Q is orthonormal, so Z = H Eᵀ and H Rᵀ have the same singular values."""
    return torch.linalg.qr(off_mps(E).float()).R.to(E.device)


def lambda_schedule(step, max_iters, lambdas):
    """The authors': λ1 falls by cosine to a tenth; λ2, λ3 are 0 for 20 % of the steps, then rise for 5 %."""
    p = step / max_iters
    fall = 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2
    rise = min(max((p - 0.20) / 0.05, 0.0), 1.0)
    return lambdas[0] * fall, lambdas[1] * rise, lambdas[2] * rise


def lr_schedule(step, max_iters, warmup, linear=False):
    """Factor on the rate: it rises for the share `warmup` of steps, then falls to 0 by cosine or linearly."""
    n = warmup * max_iters
    if step < n:
        return (step + 1) / (n + 1)
    p = (step - n) / max(max_iters - n, 1)
    return 1 - p if linear else 0.5 * (1 + math.cos(math.pi * p))


# ---- The adapted layers -----------------------------------------------------


class LoRA(nn.Module):
    """y = W x + b + s B A x, in place of an nn.Linear whose W [out, in] and b stay frozen (Hu et al. 2021).

    A [r, in] and B [out, r] train in fp32. With `on` = False the pre-trained layer is back.
    """

    def __init__(self, linear, A0, B0, s):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.A = nn.Parameter(A0.float().clone())
        self.B = nn.Parameter(B0.float().clone())
        self.s, self.on = s, True

    def factors(self):
        """-> left [out, r], right [r, in], fp32: the layer adds left @ right to W."""
        return self.s * self.B, self.A

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.on:
            left, right = self.factors()
            y = y + F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))
        return y

    @torch.no_grad()
    def merged(self, ratio=1.0):
        """-> nn.Linear with ratio * (W + left @ right), in fp32 and rounded once."""
        left, right = self.factors()
        weight = (ratio * (self.weight.float() + left @ right)).to(self.weight.dtype)
        linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


class Anchored(LoRA):
    """y = W x + b + s (B A - B0 A0) x = W x + b + s [ΔB  B0] [A; ΔA] x: LoRA from a start other than zero."""

    def __init__(self, linear, A0, B0, s):
        A0, B0 = A0.to(linear.weight.dtype), B0.to(linear.weight.dtype)
        super().__init__(linear, A0, B0, s)
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)

    def factors(self):
        left = torch.cat([self.B - self.B0, self.B0.float()], dim=1)  # [out, 2r]
        right = torch.cat([self.A, self.A - self.A0], dim=0)  # [2r, in]
        return self.s * left, right


class LoRAFA(LoRA):
    """LoRA whose A stays as drawn (Zhang et al. 2023): a buffer, so that checkpoints hold it."""

    def __init__(self, linear, A0, B0, s):
        super().__init__(linear, A0, B0, s)
        self.register_buffer("A", self._parameters.pop("A").detach())


class DoRA(LoRA):
    """y = m/n ∘ (W + s B A) x + b; m [out] trains, the row norms n have no gradient (Liu et al. 2024)."""

    def __init__(self, linear, A0, B0, s):
        super().__init__(linear, A0, B0, s)
        self.register_buffer("square", self.weight.detach().float().square().sum(dim=1))  # of W's rows, [out]
        self.m = nn.Parameter(self.norms())

    @torch.no_grad()
    def norms(self):
        """n² = ‖w‖² + 2 s b·(A w) + s² b A Aᵀ bᵀ; w, b: rows of W, B. [out], without a tensor of W's size."""
        left, A = self.factors()
        WA = F.linear(A.to(self.weight.dtype), self.weight).float()  # [r, out]
        change = 2 * (left * WA.T).sum(dim=1) + (left @ (A @ A.T) * left).sum(dim=1)
        return (self.square + change).clamp_min(1e-16).sqrt()

    def forward(self, x):
        y = super().forward(x)  # W x + b + s B A x
        if self.on:
            without_b = y if self.bias is None else y - self.bias
            change = self.m / self.norms() - 1  # at the start m = n: exactly 0
            y = y + change.to(y.dtype) * without_b
        return y

    def merged(self):
        return super().merged((self.m.detach() / self.norms())[:, None])


class AdaLoRA(LoRA):
    """y = W x + b + s B (E ∘ A x); `allocate` sets entries of this E [r] to 0 (Zhang et al. 2023)."""

    def __init__(self, linear, A0, B0, s):
        super().__init__(linear, A0, B0, s)
        self.E = nn.Parameter(torch.zeros_like(self.A[:, 0]))
        for name in "ABE":  # averages of each number's sensitivity, and of the uncertainty of that
            self.register_buffer(f"I_{name}", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"U_{name}", torch.zeros_like(getattr(self, name)))

    def factors(self):
        return self.s * self.B * self.E, self.A

    @torch.no_grad()
    def observe(self, beta):
        """Update I and U after an optimizer step, while its gradients are still there."""
        for name in "ABE":
            p = getattr(self, name)
            I = getattr(self, f"I_{name}")
            # I ← β I + (1 - β) |p ∂L/∂p|        U ← β U + (1 - β) | |p ∂L/∂p| - I |
            sensitivity = (p * p.grad).abs()
            I.lerp_(sensitivity, 1 - beta)
            getattr(self, f"U_{name}").lerp_((sensitivity - I).abs(), 1 - beta)

    def importance(self):
        """I U of a triplet's entry of E, plus the means of I U over its row of A and column of B -> [r]"""
        of_A = (self.I_A * self.U_A).mean(dim=1)
        of_B = (self.I_B * self.U_B).mean(dim=0)
        return self.I_E * self.U_E + of_A + of_B


class Houlsby(nn.Module):
    """h + Up SiLU(Down h) behind the dropout that ends a part (Houlsby et al. 2019; AdaLoRA's SiLU)."""

    act = staticmethod(F.silu)

    def __init__(self, inner, d, r, rng):
        super().__init__()
        self.inner, self.on = inner, True
        self.down = nn.Parameter(torch.empty(r, d, device=rng.device).normal_(0, 0.02, generator=rng))
        self.down_bias = nn.Parameter(torch.zeros(r))
        self.up = nn.Parameter(torch.zeros(d, r))  # zero: it starts as the pre-trained network
        self.up_bias = nn.Parameter(torch.zeros(d))

    def bottleneck(self, h):
        z = self.act(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return F.linear(z, self.up.to(h.dtype), self.up_bias.to(h.dtype))

    def forward(self, x):
        h = self.inner(x)
        return h + self.bottleneck(h) if self.on else h


class Pfeiffer(Houlsby):
    """LN( f(LN u) + u ) in place of the MLP's LN u; f(z) = Up ReLU(Down z) (Pfeiffer et al. 2021)."""

    act = staticmethod(F.relu)

    def forward(self, u):
        z = self.inner(u)
        return self.inner(self.bottleneck(z) + u) if self.on else z


class BiasOffset(nn.Module):
    """y = inner(x) + Δb; Δb [out], in fp32, starts at zero (BitFit, Ben Zaken et al. 2022)."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.on = inner, True
        self.offset = nn.Parameter(torch.zeros_like(inner.bias, dtype=torch.float32))

    def forward(self, x):
        y = self.inner(x)
        return y + self.offset.to(y.dtype) if self.on else y

    @torch.no_grad()
    def merged(self):
        b = self.inner.bias
        self.inner.bias = nn.Parameter((b.float() + self.offset).to(b.dtype), requires_grad=False)
        return self.inner


# ---- Starts: (W [out, in], r, s, rng, what was measured, the method's options) -> A0 [r, in], B0 [out, r]


def init_lora(W, r, s, rng, measured=None, **_):
    """A ~ U(-1/√in, 1/√in), B = 0 (Hu et al. 2021)."""
    bound = 1 / math.sqrt(W.shape[1])
    A0 = torch.empty(r, W.shape[1], device=W.device).uniform_(-bound, bound, generator=rng)
    return A0, torch.zeros(W.shape[0], r, device=W.device)


def init_adalora(W, r, s, rng, measured=None, **_):
    """A, B ~ N(0, 0.02²); it is E that makes the start zero (Zhang et al. 2023)."""
    A0 = torch.empty(r, W.shape[1], device=W.device).normal_(0, 0.02, generator=rng)
    B0 = torch.empty(W.shape[0], r, device=W.device).normal_(0, 0.02, generator=rng)
    return A0, B0


def init_pissa(W, r, s, rng, measured=None, niter=10, oversample=8):
    """The r largest singular triplets: s B0 A0 is W's best approximation of rank r (Meng et al. 2024)."""
    return split(*top_svd(W.float(), r, niter, oversample, rng), s)


def init_milora(W, r, s, rng, measured=None):
    """The r smallest singular triplets, by the exact SVD (Hanqing Wang et al. 2024)."""
    U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    return split(U[:, -r:], S[-r:], Vt[-r:], s)


def init_lora_ga(W, r, s, rng, G, gamma=16.0):
    """Of ∂L/∂W = G = U S Vᵀ: A0 = c V_{1..r}ᵀ, B0 = c U_{r+1..2r}, c = out^¼ / √γ (S. Wang et al. 2024)."""
    # Not by top_svd: its Gram matrix loses what lies below 1e-3 of σ_1, and a gradient's spectrum falls fast.
    with torch.random.fork_rng([W.device] if W.is_cuda else []):  # svd_lowrank takes no generator
        torch.manual_seed(torch.randint(2**31, (1,), generator=rng, device=rng.device).item())
        U, _, V = torch.svd_lowrank(G.to(W.device), q=min(4 * r, *W.shape), niter=4)
    c = W.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * V[:, :r].T, c * U[:, r : 2 * r]


def init_corda(W, r, s, rng, covariance, keep="first", **_):
    """Triplets of W C̃ = U S Qᵀ with Vᵀ = Qᵀ C̃⁻¹, C̃ the inputs' damped covariance (Yang et al. 2024)."""
    damped, inverse, _ = covariance
    U, S, Qt = torch.linalg.svd(W.float() @ damped, full_matrices=False)
    part = slice(None, r) if keep == "first" else slice(-r, None)  # what inputs use (IPM) or not (KPM)
    return split(U[:, part], S[part], Qt[part] @ inverse, s)


def split(U, S, Vt, s):
    """s B0 A0 = U S Vᵀ:  A0 = √(S/s) Vᵀ,  B0 = U √(S/s)"""
    root = (S / s).sqrt()
    return root[:, None] * Vt, U * root


def top_svd(W, r, niter, oversample, rng):
    """The r largest singular triplets of W [out, in]; niter 0: exactly -> U [out, r], S [r], Vt [r, in]"""
    if niter == 0 or r + oversample >= min(W.shape):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vt[:r]
    if W.shape[0] < W.shape[1]:
        U, S, Vt = top_svd(W.T, r, niter, oversample, rng)
        return Vt.T, S, U.T
    # Subspace iteration (Halko et al. 2011) with Wᵀ W: a round is one small product and one thin QR.
    gram = W.T @ W
    Q = torch.randn(len(gram), r + oversample, generator=rng, device=W.device)
    for _ in range(niter):
        Q = torch.linalg.qr(gram @ Q).Q
    P, R = torch.linalg.qr(W @ Q)  # W ≈ W Q Qᵀ = P R Qᵀ, and R is small
    U, S, Vt = torch.linalg.svd(R)
    return P @ U[:, :r], S[:r], Vt[:r] @ Q.T


# ---- What two starts measure first, while calibrate(turn) runs the model on some rows, one at a time


def gradients(model, name, found):
    """Let backward passes add up G = ∂L/∂W of a layer in found[name], fp32 -> hook"""

    def take(weight):
        found[name] = found.get(name, 0) + weight.grad.float()
        weight.grad = None

    weight = model.get_submodule(name).weight.requires_grad_(True)
    return weight.register_post_accumulate_grad_hook(take)


def covariances(model, name, found):
    """Average C = x̃ᵀ x̃, x̃ = x / |max x|, over forward passes of x [1, L, in] in found[name] -> hook"""
    calls = 0

    def take(module, arguments):
        nonlocal calls
        x = arguments[0].detach()
        if x.dim() != 3:  # DeBERTa's projections read positions, too; they do not count
            return
        x = x.flatten(0, 1).float()
        x = x / x.max().abs()  # |max x|, not max |x|: as in CorDA's code
        calls += 1
        mean = found.get(name, 0)
        found[name] = mean + (x.T @ x - mean) / calls

    return model.get_submodule(name).register_forward_pre_hook(take)


GROUP = 4 * 2**30  # bytes of statistics held at a time, about


def statistics(model, names, kind, calibrate, turn=0, room=GROUP):
    """Yield (layer's name, its statistic) of a frozen model, for groups of layers of about `room` bytes."""
    groups = {}
    used = 0
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        groups.setdefault(used // room, []).append(name)
        used += 4 * columns * (rows if kind is gradients else columns)
    for group in groups.values():
        found = {}
        hooks = [kind(model, name, found) for name in group]
        try:
            with evaluating(model), torch.set_grad_enabled(kind is gradients):  # dropout would blur it
                calibrate(turn)
        finally:
            model.requires_grad_(False)
            for hook in hooks:
                hook.remove()
        for name in group:
            if name not in found:
                raise ValueError(f"calibration: nothing reached {name}; does calibrate run the model?")
            yield name, found.pop(name)


@contextmanager
def evaluating(model):
    """Within it `model` is in eval mode; afterwards, each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def damp(C, name="a layer", share=0.01):
    """C̃ = C + share · mean(diag C) · I, the share doubled until C̃ C̃⁻¹ is I to 0.05 -> C̃, C̃⁻¹, share"""
    C = off_mps(C)
    I = torch.eye(len(C), device=C.device)
    while C.isfinite().all() and C.diag().mean() > 0 and share < 50:
        damped = C + share * C.diag().mean() * I
        inverse = torch.linalg.inv_ex(damped).inverse
        if (damped @ inverse - I).norm() < 0.05:
            return damped, inverse, share
        share *= 2
    raise ValueError(f"{name}: the covariance of its inputs has no inverse; look at the calibration rows")


def choose_covariance(W, candidates, name="a layer"):
    """CorDA++ (arXiv 2506.13187), Eq. 7-8: the covariance of lowest score -> its index, log π, σ of W C̃"""
    scored = []
    for i, C in enumerate(candidates):
        damped, _, _ = damp(C, name)
        # π = √(out · λ_max) / λ_min of the eigenvalues of C̃, score = log π · Σ_i σ_i / σ_max
        eigenvalues = torch.linalg.eigvalsh(damped)
        log_pi = (0.5 * (len(W) * eigenvalues[-1]).log() - eigenvalues[0].clamp_min(1e-30).log()).item()
        sigma = torch.linalg.svdvals(W.float() @ damped).cpu()
        scored.append((log_pi * (sigma.sum() / sigma[0]).item(), i, log_pi, sigma))
    return min(scored, key=lambda entry: entry[:2])[1:]


def allocate_ranks(spectra, log_pi, width, budget, keep):
    """CorDA++, Eq. 9-10: the rank of each layer's adapter, within `budget` parameters -> {name: rank}

    spectra {name: σ, falling}; log_pi {name: log π > 0}; width {name: in + out, parameters per rank}.
    Each layer first takes its smallest σ. Then the layer whose last taken σ_j scores least,
    log π · σ_j / (σ_1 + ... + σ_{j-1}), takes its next larger one, and so on. keep="last" adapts what was
    taken and stops above the budget, "first" the rest and stops below it. Scores rise within a layer, so one
    sort of all of them gives the whole order.
    """
    scores = []
    owners = []
    for i, (name, sigma) in enumerate(spectra.items()):
        larger = sigma.double().cumsum(0).flip(0)[1:-1]
        scores.append(log_pi[name] * sigma.double().flip(0)[:-2] / larger)
        owners += [i] * len(larger)
    order = torch.cat(scores).argsort(stable=True)
    owners = torch.tensor(owners, dtype=torch.long)[order]
    widths = torch.tensor([width[name] for name in spectra])
    sizes = torch.tensor([len(sigma) for sigma in spectra.values()])
    spent = F.pad(widths[owners].cumsum(0), (1, 0))  # after 0, 1, ... steps
    others = (sizes - 1).clamp_min(1)
    enough = widths.sum() + spent > budget if keep == "last" else (widths * others).sum() - spent < budget
    steps = int(enough.int().argmax()) if enough.any() else len(owners)
    marks = owners[:steps].bincount(minlength=len(spectra))
    ranks = 1 + marks if keep == "last" else others - marks
    return dict(zip(spectra, ranks.tolist()))


# ---- The table of methods ---------------------------------------------------


@dataclass(frozen=True)
class Method:
    what: str
    layer: type | None = None  # what stands in place of a layer; None: nothing, every weight trains
    init: callable = None  # its start, one of the functions above
    statistic: callable = None  # what is measured first: gradients or covariances
    options: dict = field(default_factory=dict)  # its own: attach(..., name=value), --name=value
    regularized: bool = False  # the poster's λ are its defaults


# fmt: off
SVD = dict(niter=10, oversample=8)     # rounds of the fast SVD (0: exact), directions beside the r
BUDGET = dict(adalora_first=0.1, adalora_last=0.3, adalora_every=0.01, orthogonality=0.1)   # see budget_steps
CHOICE = dict(keep="first", rounds=5)  # triplets that inputs use most (or last: least), covariances measured
METHODS = {
    "full":     Method("every weight"),
    "lora":     Method("W + s B A, B starts at zero", LoRA, init_lora),
    "lora+":    Method("LoRA, B learns faster than A", LoRA, init_lora, options=dict(lora_plus_ratio=16.0)),
    "lora-fa":  Method("LoRA, A stays as drawn", LoRAFA, init_lora),
    "lora-ga":  Method("bracket from ∂L/∂W's triplets", Anchored, init_lora_ga, gradients, dict(gamma=16.0)),
    "adalora":  Method("W + s B E A, ranks shared out by importance", AdaLoRA, init_adalora, options=BUDGET),
    "dora":     Method("m/n ∘ (W + s B A), magnitude and direction apart", DoRA, init_lora),
    "pissa":    Method("bracket from W's largest singular triplets", Anchored, init_pissa, options=SVD),
    "milora":   Method("bracket from W's smallest singular triplets", Anchored, init_milora),
    "corda":    Method("bracket from triplets of W C", Anchored, init_corda, covariances, dict(keep="first")),
    "corda++":  Method("CorDA, C and rank chosen by layer", Anchored, init_corda, covariances, CHOICE),
    "balora":   Method("PiSSA + consistency, diversity and SVD terms", Anchored, init_pissa, None, SVD, True),
    "bitfit":   Method("every bias b + Δb, linear layers and norms", BiasOffset),
    "hadapter": Method("h + Up SiLU(Down h) behind attention and MLP", Houlsby),
    "padapter": Method("a bottleneck around the norm behind the MLP", Pfeiffer),
}
ENCODERS_ONLY = ("hadapter", "padapter")                # they stand in post-norm blocks
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# fmt: on


def method_options(method, given):
    """A method's options, those given in place of defaults -> {name: value}"""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; {nearest(method, METHODS)}known: {', '.join(METHODS)}")
    own = METHODS[method].options
    for name in given.keys() - own.keys():
        owners = ", ".join(other for other, spec in METHODS.items() if name in spec.options)
        hint = f"of {owners}" if owners else f"{nearest(name, own)}of no method"
        raise ValueError(f"{method} has no option {name} ({hint}); its own: {', '.join(own) or 'none'}")
    options = {**own, **given}
    if options.get("keep", "first") not in ("first", "last") or options.get("rounds", 1) < 1:
        raise ValueError(f"{method} with {options}: keep has to be first or last, rounds at least 1")
    return options


# ---- attach, teacher, merge -------------------------------------------------


@dataclass
class Report:
    method: str
    r: int
    alpha: float
    options: dict  # the method's own
    matched: dict = field(default_factory=dict)  # pattern -> names of the layers that it matched
    trainable: int = 0
    head: int = 0  # of these, in a classification head, which trains whole
    total: int = 0  # parameters of the network itself
    notes: list = field(default_factory=list)  # remarks on what was measured

    def __str__(self):
        lines = [f"{self.method}: {METHODS[self.method].what}"]
        if METHODS[self.method].init is not None:
            lines[0] += f" (r={self.r}, alpha={self.alpha:g})"
        for pattern, names in self.matched.items():
            ends = " ... ".join(dict.fromkeys([names[0], names[-1]]))
            lines.append(f"  {pattern:<12} {len(names):>4} layers   {ends}")
        lines += [f"  {note}" for note in self.notes]
        share = 100 * self.trainable / self.total
        lines.append(f"  trainable {self.trainable:,} of {self.total:,} ({share:.2f} %)")
        if self.head:
            lines[-1] += f": {self.trainable - self.head:,} by the method, {self.head:,} in the head"
        return "\n".join(lines)


def attach(
    model, method="balora", r=16, alpha=None, targets=None, seed=0, calibrate=None, state=None, only=(), **own
):
    """Freeze `model`, any module that holds nn.Linear layers, and make it trainable by `method` -> Report

    r: rank, or width of a bottleneck. alpha: s = alpha / r; None: r. own: the method's options, see METHODS.
    targets: names or patterns of layers ("q_proj", "layers.0.*"); None: all that the method is made for.
    calibrate(turn): runs the model on some rows, one at a time (LoRA-GA: backward, too).
    state {name: tensor}: a checkpoint to go on from; nothing is measured. On the meta device: shapes alone.
    only: a slice of the layers; other ones begin with zeros (several processes can share the work).
    Submodules named in model.trained_whole (a head) train, too. ValueError for whatever does not fit.
    """
    options = method_options(method, own)
    alpha = r if alpha is None else alpha
    if r < 1 or alpha <= 0:
        raise ValueError(f"r={r}, alpha={alpha}: r must be at least 1, alpha above 0")
    if adapted_layers(model):
        raise ValueError("this model already has an adapter: merge it first, or load the model anew")
    kind = METHODS[method].layer
    report = Report(method, r, alpha, options, total=sum(p.numel() for p in model.parameters()))
    model.requires_grad_(kind is None)
    if kind is not None:
        report.matched = match(model, targets, kind)
        found = starts(model, report, seed, calibrate, state, only)
        layers = {name: new_layer(model, name, kind, seed, *start) for name, *start in found}
        for name, layer in layers.items():
            model.set_submodule(name, layer)
    for module in trained_whole(model).values():
        module.requires_grad_(True)
        report.head += sum(p.numel() for p in module.parameters())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if state is not None:
        for name, tensor in model.state_dict().items():
            if name not in frozen and (name not in state or state[name].shape != tensor.shape):
                raise ValueError(f"state: no such {name} in it; is it of another model or adapter?")
        model.load_state_dict(state, strict=False)
    return report


def starts(model, report, seed, calibrate, state, only):
    """Yield (layer's name, rank, s, (A0, B0)); None in place of the pair: zeros, to be filled later."""
    spec = METHODS[report.method]
    names = list(dict.fromkeys(name for found in report.matched.values() for name in found))
    rank = report.r
    s = report.alpha / report.r
    if spec.layer is AdaLoRA:  # it begins with 1.5 r and ends at r on average; s as in its code
        rank = math.ceil(1.5 * rank)
        s = report.alpha / (rank + 1e-5)
    directions = 2 * rank if spec.init is init_lora_ga else rank
    for name in names if spec.init else ():
        side = min(model.get_submodule(name).weight.shape)
        if directions > side:
            raise ValueError(f"r={report.r} takes {directions} of the {side} directions of {name}; lower r")
    if spec.init is None or state is not None or next(model.parameters()).is_meta:
        for name in names:
            if report.method == "corda++" and state is not None:
                rank = len(state.get(f"{name}.A", ()))
            yield name, rank, s, None
        return
    chosen = set(names[only] if only else names)
    measured = ((name, rank, None) for name in names)
    if spec.statistic is not None:
        measured = measure(model, names, report, calibrate)
    for name, rank, found in tqdm(measured, report.method, len(names), unit="layer", disable=None):
        if name not in chosen:
            yield name, rank, s, None
            continue
        W = off_mps(model.get_submodule(name).weight.detach())
        rng = layer_rng(seed, name, W.device)
        yield name, rank, s, spec.init(W, rank, s, rng, found, **report.options)


def measure(model, names, report, calibrate):
    """Yield (layer's name, its rank, its gradient or damped covariance); remarks go into the report."""
    kind = METHODS[report.method].statistic
    if calibrate is None:
        raise ValueError(f"{report.method} measures {kind.__name__}: attach(..., calibrate=...) is missing")
    shares = []
    n = report.options.get("rounds", 1)

    def rounds():
        """Yield a tuple per layer: (name, statistic) of round 0, of round 1, ...; each has its own rows."""
        return zip(*[statistics(model, names, kind, calibrate, i, GROUP // n) for i in range(n)])

    ranks = dict.fromkeys(names, report.r)
    chosen = dict.fromkeys(names, 0)
    if report.method == "corda++":  # measured twice: all layers' covariances would not fit in memory
        log_pi, spectra, width = {}, {}, {}
        for found in rounds():
            name = found[0][0]
            W = off_mps(model.get_submodule(name).weight.detach())
            chosen[name], log_pi[name], spectra[name] = choose_covariance(W, [C for _, C in found], name)
            width[name] = sum(W.shape)
        ranks = allocate_ranks(spectra, log_pi, width, report.r * sum(width.values()), report.options["keep"])
        report.notes.append(f"ranks {min(ranks.values())} to {max(ranks.values())}")
    for found in rounds():
        name = found[0][0]
        statistic = found[chosen[name]][1]
        if kind is covariances:
            statistic = damp(statistic, name)
            shares.append(statistic[2])
        yield name, ranks[name], statistic
    if shares:
        report.notes.append(f"covariances damped by up to {max(shares):.0%} of their mean diagonal")


def new_layer(model, name, kind, seed, rank, s, start=None):
    """The layer in a module's place; a low-rank one starts at zeros, unless start = (A0, B0) is given."""
    module, device = model.get_submodule(name), next(model.parameters()).device
    if kind is BiasOffset:
        return BiasOffset(module)
    if issubclass(kind, Houlsby):
        return kind(module, model.width, rank, layer_rng(seed, name, device)).to(device)
    W = module.weight
    A0, B0 = start or (W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank))
    return kind(module, A0.to(W.device).contiguous(), B0.to(W.device).contiguous(), s)


def layer_rng(seed, name, device):
    """The generator of one layer's random start: no layer's start depends on another's."""
    on_cpu = device.type in ("mps", "meta")
    return torch.Generator("cpu" if on_cpu else device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def trained_whole(model):
    """-> {name: submodule} that trains whole beside any method: a classification head"""
    return {name: m for name, m in model.named_children() if name in getattr(model, "trained_whole", ())}


def match(model, targets, kind=LoRA):
    """-> {pattern: names of the places it matches}; without targets, of TARGETS or of all places"""
    places = adaptable(model, kind)
    leaves = sorted({name.rpartition(".")[2] for name in places})
    found = {}
    for pattern in targets or (TARGETS if issubclass(kind, LoRA) else leaves):
        found[pattern] = [n for n in places if f".{n}".endswith(f".{pattern}") or fnmatch.fnmatch(n, pattern)]
    matched = {pattern: names for pattern, names in found.items() if names}
    if not matched or (targets and matched != found):
        nothing = ", ".join(found.keys() - matched.keys()) or "any"
        has = ", ".join(leaves) or f"no place for {kind.__name__}: encoders have (and Qwen2, biases)"
        raise ValueError(f"targets: nothing matches {nothing}; the model has {has}")
    return matched


def adaptable(model, kind=LoRA):
    """-> names of the modules in whose place a layer of this kind may stand"""
    if issubclass(kind, Houlsby):
        return list(getattr(model, "bottlenecks", {}).get(kind.__name__, ()))
    closed = tuple(f"{name}." for name in (*getattr(model, "not_adapted", ()), *trained_whole(model)))
    fits = (nn.Linear, nn.LayerNorm) if kind is BiasOffset else nn.Linear
    places = {name: m for name, m in model.named_modules() if isinstance(m, fits)}
    open_places = [name for name in places if not f"{name}.".startswith(closed)]
    return [name for name in open_places if kind is not BiasOffset or places[name].bias is not None]


def adapted_layers(model):
    """-> {name: adapted layer}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA | Houlsby | BiasOffset)}


def nearest(word, known):
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


@contextmanager
def teacher(model):
    """The pre-trained network at any step: brackets off, eval mode, no gradient. A trained head stays so."""
    switches = [(layer, layer.on) for layer in adapted_layers(model).values()]
    if not switches and any(p.requires_grad for p in model.parameters()):
        raise ValueError("teacher: this model trains without an adapter to switch off; ask a frozen copy")
    try:
        for layer, _ in switches:
            layer.on = False
        with evaluating(model), torch.no_grad():
            yield model
    finally:
        for layer, on in switches:
            layer.on = on


def merge(model):
    """Fold every bracket into its W, every Δb into its b -> how many"""
    layers = adapted_layers(model)
    if any(isinstance(layer, Houlsby) for layer in layers.values()):
        raise ValueError("merge: no weight can take in a bottleneck's nonlinearity; keep it beside the model")
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged())
    return len(layers)


# ---- Optimizer groups and AdaLoRA's budget ----------------------------------


def param_groups(named, method="lora", ratio=16.0, weight_decay=0.0):
    """{name: trained tensor} -> AdamW's groups; a group's rate is the schedule's times its "ratio"."""
    groups = {}
    for name, p in named.items():
        # LoRA+ (Hayou et al. 2024): B and vectors learn faster.
        fast = method == "lora+" and (p.dim() == 1 or name.endswith(".B"))
        decays = not (name.endswith(("bias", "offset")) or "norm" in name)
        groups.setdefault((ratio if fast else 1.0, weight_decay * decays), []).append(p)
    return [dict(params=params, ratio=key[0], weight_decay=key[1]) for key, params in groups.items()]


def orthogonality(model):
    """AdaLoRA's regularizer as in its code: the mean over all A and B of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F."""
    gaps = []
    for layer in adapted_layers(model).values():
        I = torch.eye(len(layer.A), device=layer.A.device)
        gaps += [(layer.A @ layer.A.T - I).norm(), (layer.B.T @ layer.B - I).norm()]
    return sum(gaps) / len(gaps)


def budget_steps(max_iters, options):
    """AdaLoRA's steps at the first budget, at the last, between cuts (below 1: shares) -> t_i, t_f, every"""
    steps = []
    for name in ("adalora_first", "adalora_last", "adalora_every"):
        value = options[name]
        steps.append(max(1, round(value * max_iters)) if 0 < value < 1 else int(value))
    t_i, t_f, every = steps
    if min(steps) < 1 or t_i + t_f >= max_iters or every > max_iters - t_f - t_i:
        what = f"--adalora_first={t_i}, --adalora_last={t_f}, --adalora_every={every} (steps)"
        shares = "--adalora_first=0.1 --adalora_last=0.3 --adalora_every=0.01"
        raise ValueError(f"{what} do not fit into {max_iters} steps; shares of the run do: {shares}")
    return t_i, t_f, every


@torch.no_grad()
def allocate(model, step, max_iters, r, cuts, beta=0.85):
    """Set AdaLoRA's least important E to 0, between optimizer.step() and zero_grad(). step counts from 0."""
    t_i, t_f, every = cuts
    layers = list(adapted_layers(model).values())
    b0 = sum(len(layer.E) for layer in layers)
    bT = r * len(layers)
    # b = bT + (b0 - bT) (1 - p)³, where p rises from 0 at t_i to 1 at max_iters - t_f
    p = (step - t_i) / (max_iters - t_f - t_i)
    b = int(bT + (b0 - bT) * (1 - min(max(p, 0), 1)) ** 3)
    if p < 1:
        for layer in layers:
            layer.observe(beta)
    if (p > 1 or step % every == 0) and b < b0:  # as loralib; between cuts, training may bring an E back
        scores = [layer.importance() for layer in layers]
        threshold = torch.cat(scores).kthvalue(b0 - b).values
        for layer, score in zip(layers, scores):
            layer.E[score <= threshold] = 0
    return {"budget": b, "kept": sum(int(layer.E.count_nonzero()) for layer in layers)}


# ---- Saving and loading, in peft's folder format ----------------------------

BOTTLENECK = {name: name for name in ("down", "down_bias", "up", "up_bias")}
FORMS = {  # of a kind of layer: peft_type, {a tensor's name in the file: its name here}
    LoRA: ("LORA", {"lora_A.weight": "A", "lora_B.weight": "B"}),
    DoRA: ("LORA", {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}),
    BiasOffset: ("BITFIT", {"bias_offset": "offset"}),
    Houlsby: ("HOULSBY", BOTTLENECK),
    Pfeiffer: ("PFEIFFER", BOTTLENECK),
}
# Settings of adapter_config.json that are read, and those that say nothing about how the tensors act.
READ = "peft_type r lora_alpha alpha_pattern rank_pattern use_rslora use_dora init_lora_weights"
HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules lora_dropout modules_to_save layers_to_transform layers_pattern
    megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config"""


def write_atomic(path, write):
    """Call write(file) on a temporary name, then rename: a kill leaves the old file or the new one."""
    temporary = f"{path}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"cannot write {path} ({e}); what was there before is untouched") from None
    os.replace(temporary, path)


def public_name(model, name):
    """Our name of a module -> the checkpoint's, or our own where it has none (a dropout)."""
    return getattr(model, "checkpoint_name", str)(name) or name


def head_tensors(model):
    """-> {the checkpoint's name: tensor} of what trains whole"""
    found = {}
    for name, module in trained_whole(model).items():
        tensors = module.state_dict(keep_vars=True)
        found |= {public_name(model, f"{name}.{leaf}"): tensor for leaf, tensor in tensors.items()}
    return found


@torch.no_grad()
def save_adapter(model, folder, base=None):
    """Write the adapter for the *original* checkpoint, as a plain LoRA wherever W changes by low rank.

    lora_B = s [ΔB, B0], lora_A = [A; ΔA] (LoRA and its kin: s B, A), and lora_alpha = r: its scale is 1.
    BitFit and bottlenecks have a form of ours. base: what to name as the base model.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapter (full tuning saves all of it: model.save)")
    kind = type(next(iter(layers.values())))
    peft_type, leaves = FORMS.get(kind, FORMS[LoRA])
    head = head_tensors(model)
    state = dict(head)
    ranks = {}
    for name, layer in layers.items():
        place = public_name(model, name)
        tensors = {leaf: getattr(layer, own) for leaf, own in leaves.items()}
        if peft_type == "LORA":
            tensors["lora_B.weight"], tensors["lora_A.weight"] = layer.factors()
            ranks[place] = len(tensors["lora_A.weight"])
        state |= {f"{place}.{leaf}": tensor for leaf, tensor in tensors.items()}
    task = "CAUSAL_LM" if getattr(model, "encoder", None) is None else "SEQ_2_SEQ_LM"
    modules = {name.rpartition(".")[0] for name in head}  # such as classifier.dense
    config = dict(peft_type=peft_type, task_type="SEQ_CLS" if head else task, base_model_name_or_path=base)
    config["modules_to_save"] = sorted({name.rpartition(".")[0] or name for name in modules}) or None
    if ranks:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {name: n for name, n in ranks.items() if n != rank}  # CorDA++
        last = {name.rpartition(".")[2] for name in ranks}
        plain = [public_name(model, name) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        partly = any(name.rpartition(".")[2] in last for name in plain)  # then full names tell which ones
        config |= dict(r=rank, lora_alpha=rank, rank_pattern=pattern, alpha_pattern=pattern, bias="none")
        config |= dict(target_modules=sorted(ranks if partly else last), use_dora=kind is DoRA)
    state = {f"base_model.model.{name}": t.cpu().contiguous() for name, t in state.items()}
    weights = save(state, {"format": "pt"})  # one entry: several come in random order
    text = json.dumps(config, indent=1).encode()
    write_atomic(os.path.join(folder, "adapter_model.safetensors"), methodcaller("write", weights))
    write_atomic(os.path.join(folder, "adapter_config.json"), methodcaller("write", text))


def load_adapter(model, folder):
    """Put a saved LoRA, DoRA or form of ours on a plain model, unchanged if it does not fit -> layers"""
    if adapted_layers(model):
        raise ValueError("this model already has an adapter: merge it first, or load the model anew")
    config, path, state = read_adapter(folder)
    kind = adapter_kind(config, folder)
    places = head_tensors(model)  # {name in the file: the tensor of ours that it fills}
    ours = {public_name(model, name): name for name in adaptable(model, kind)}
    leaves = FORMS[kind][1]
    ends = tuple(f".{leaf}" for leaf in leaves)
    names = sorted({key.removesuffix(end) for key in state for end in ends if key.endswith(end)})
    expected = places.keys() | {name + end for name in names for end in ends}
    wrong = sorted((set(names) - ours.keys()) | (expected ^ state.keys()))
    if wrong:
        raise ValueError(f"{path}: not of this model, or not whole (a head?): {', '.join(wrong[:5])}")
    layers = {}
    for name in names:
        rank = len(state[name + ends[0]])
        s = lora_scale(config, name, rank, path)
        layer = layers[ours[name]] = new_layer(model, ours[name], kind, 0, rank, s)
        places |= {f"{name}.{leaf}": getattr(layer, own) for leaf, own in leaves.items()}
    for name, p in places.items():
        w = state[name]
        if w.shape != p.shape or not w.is_floating_point() or not w.isfinite().all():
            found = f"{name} is {w.dtype} {list(w.shape)}"
            raise ValueError(f"{path}: {found}, not finite floats {list(p.shape)}")
    model.requires_grad_(False)  # nothing was changed up to here
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name, p in places.items():
        p.data = state[name].to(p, copy=True)
    return len(layers)


def read_adapter(folder):
    """-> the settings of a peft folder, the path of its weights, {name: tensor}"""
    path = os.path.join(folder, "adapter_config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = dict(json.load(f))
        config["alpha_pattern"] = dict(config.get("alpha_pattern") or {})
        path = os.path.join(folder, "adapter_model.safetensors")  # an .bin of old: load and save it in peft
        state = {key.removeprefix("base_model.model."): w for key, w in load_file(path).items()}
        return config, path, state
    except Exception as e:  # each reader has errors of its own
        raise ValueError(f"{path}: {type(e).__name__} {e}; expected a folder as peft writes it") from None


def adapter_kind(config, folder):
    """The kind of layer that the record of an adapter_config.json asks for."""
    start = str(config.get("init_lora_weights"))
    if start.split("_niter")[0] in ("pissa", "olora", "corda", "loftq", "lora_ga", "milora"):
        way = "convert it in peft (save_pretrained with path_initial_model_for_weight_conversion)"
        raise ValueError(f"{folder}: init_lora_weights={start!r} has changed its base's weights; {way}")
    # Any setting that is not known to be harmless is refused, unless it is off.
    others = config.keys() - set(READ.split()) - set(HARMLESS.split())
    extra = [name for name in sorted(others) if config[name] not in (None, False, "none", [], {})]
    kinds = {peft_type: kind for kind, (peft_type, _) in FORMS.items()}
    kinds["LORA"] = DoRA if config.get("use_dora") else LoRA
    kind = kinds.get(str(config.get("peft_type")))
    if kind is None or extra:
        what = f"{folder}: {config.get('peft_type')} with {', '.join(extra) or 'its own form'}"
        raise ValueError(f"{what}; plain LoRA, DoRA and this project's own forms can be loaded")
    return kind


def lora_scale(config, name, rank, path):
    """s of a layer, from peft's alpha, its patterns and rsLoRA's root"""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in config["alpha_pattern"].items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(f"{path}: alpha_pattern {pattern!r}: names of layers are read, not expressions")
        if f".{name}".endswith(f".{pattern}"):
            alpha = value
    if rank == 0 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{path}: {name} of rank {rank} with lora_alpha {alpha!r}; is it whole?")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
