"""model.py against transformers, on small random checkpoints and on the real SmolLM2-135M."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, small_config, randomise

import balora
import model

transformers = pytest.importorskip("transformers")
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def reference(folder, kv=2, tied=True, seed=0, max_shard_size="5GB", **changes):
    """A small LLaMA of transformers with every parameter random, saved to `folder`."""
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    net = randomise(transformers.LlamaForCausalLM(config), seed)
    net.save_pretrained(folder, max_shard_size=max_shard_size)
    with open(os.path.join(folder, "config.json")) as f:
        record = json.load(f)
    record["tokenizer"] = "bytes"
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(record, f)
    return net


@pytest.mark.parametrize("kv", [8, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}},
    ],
)
def test_logits_equal_transformers(tmp_path, kv, tied, rope):
    theirs = reference(tmp_path, kv, tied, **rope)
    ours, _ = model.load(str(tmp_path))
    ids = torch.randint(3, 211, (3, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_transformers(tmp_path, side):
    theirs, (ours, _) = reference(tmp_path), model.load(str(tmp_path))
    ids = torch.randint(3, 211, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 40, dtype=torch.long)
    for row, n in enumerate((0, 7, 31)):
        mask[row, slice(0, n) if side == "left" else slice(40 - n, 40)] = 0
    with torch.no_grad():
        difference = (ours(ids, mask) - theirs(ids, attention_mask=mask).logits)[mask.bool()]
        assert difference.abs().max() < 1e-4
        assert torch.isfinite(ours(ids, mask)).all()
        if side == "right":  # without a mask: causality alone hides the padding
            assert (ours(ids) - theirs(ids, attention_mask=mask).logits)[mask.bool()].abs().max() < 1e-4
        assert torch.isfinite(ours.to(torch.bfloat16)(ids, mask)).all()


def test_bf16_is_close(tmp_path):
    theirs = reference(tmp_path)
    ours, _ = model.load(str(tmp_path), dtype=torch.bfloat16)
    ids = torch.randint(3, 211, (2, 60))
    with torch.no_grad():
        assert (ours(ids).float() - theirs(ids).logits).abs().max() < 0.05 * theirs(ids).logits.abs().max()


def test_wrong_choices_are_caught(tmp_path):
    """The parity bar is tight enough: each of these changes moves the logits by far more than 1e-4."""
    theirs = reference(tmp_path)
    ids = torch.randint(3, 211, (2, 60))
    with torch.no_grad():
        want = theirs(ids).logits
        for field, value in (("rope_theta", 1e5), ("norm_eps", 1e-3), ("rope_scaling", LLAMA3)):
            ours, _ = model.load(str(tmp_path))
            setattr(ours.config, field, value)
            for m in ours.modules():
                if isinstance(m, model.RMSNorm):
                    m.eps = ours.config.norm_eps
            assert (ours(ids) - want).abs().max() > 1e-3, field


def test_norm_eps_comes_from_the_config(tmp_path):
    reference(tmp_path)
    ours, _ = model.load(str(tmp_path))
    assert {m.eps for m in ours.modules() if isinstance(m, model.RMSNorm)} == {1e-5}


@pytest.mark.parametrize("form", ["sharded", "bin", "bin-sharded", "old-bin"])
def test_other_file_forms(tmp_path, form):
    theirs = reference(tmp_path, tied=False, max_shard_size="60KB" if form == "sharded" else "5GB")
    ids = torch.randint(3, 211, (1, 20))
    if form == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        state = theirs.state_dict()
        (tmp_path / "model.safetensors").unlink()
        if form == "bin-sharded":
            keys, shards = list(state), {}
            for n, part in enumerate((keys[:10], keys[10:])):
                shards |= dict.fromkeys(part, f"pytorch_model-{n}.bin")
                torch.save({k: state[k] for k in part}, tmp_path / f"pytorch_model-{n}.bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
        else:
            torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    ours, _ = model.load(str(tmp_path))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_known_extra_tensors_are_dropped_and_tied_heads_too(tmp_path):
    reference(tmp_path, tied=True)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    ours, _ = model.load(str(tmp_path))
    assert not hasattr(ours, "lm_head")


def edit(folder, change):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), ["lacks", "layers.1.mlp.up_proj.weight"]),
        (lambda s: s.update(extra=torch.ones(2)), ["no place for", "extra"]),
        (
            lambda s: s.update({"model.layers.7.mlp.up_proj.weight": torch.ones(96, 64)}),
            ["no place for", "layers.7"],
        ),
        (lambda s: s.update({"model.norm.weight": torch.ones(65)}), ["model.norm.weight", "[65]", "[64]"]),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, words):
    reference(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError) as e:
        model.load(str(tmp_path))
    assert all(word in str(e.value) for word in words)


def test_broken_folders_say_what_is_wrong(tmp_path):
    reference(tmp_path / "good", max_shard_size="60KB")

    def broken(change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(tmp_path / "good", bad)
        change(bad)
        with pytest.raises(ValueError) as e:
            model.load(str(bad))
        assert "\n" not in str(e.value)
        return str(e.value)

    def config(**changes):
        return lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), **changes})
        )

    shard = sorted((tmp_path / "good").glob("*.safetensors"))[1].name
    assert shard in broken(lambda f: (f / shard).unlink()) and "missing" in broken(
        lambda f: (f / shard).unlink()
    )
    assert "download complete" in broken(lambda f: (f / shard).write_bytes((f / shard).read_bytes()[:-50]))
    assert "hidden_act='silu' is not bert" in broken(config(model_type="bert"))
    assert "model_type 'gpt2'" in broken(config(model_type="gpt2"))
    assert "attention_bias" in broken(config(attention_bias=True))
    assert "yarn" in broken(config(rope_parameters={"rope_type": "yarn", "factor": 2.0}))
    assert "config.json" in broken(lambda f: (f / "config.json").unlink())
    assert "not JSON" in broken(lambda f: (f / "config.json").write_text("{"))
    assert "no tokenizer" in broken(config(tokenizer=None))
    assert "no weights" in broken(lambda f: [p.unlink() for p in f.glob("*safetensors*")])
    with pytest.raises(ValueError, match="expected one of tiny"):
        model.load("lama2-7b")
    with pytest.raises(ValueError, match="no such file"):
        model.load("nothing.gguf")


def test_a_failed_download_says_what_was_wanted_and_the_ways_out():
    with pytest.raises(ValueError) as e:
        model.load("llama2-7b")
    assert all(
        word in str(e.value) for word in ("meta-llama/Llama-2-7b-hf", "no network", "--init=path/to/")
    ) and "\n" not in str(e.value)


# GGUF


def write_gguf(path, net, kind="F32", arch="llama"):
    """A GGUF file of one of our networks as llama.cpp's converter would write it: q and k rows interleaved."""
    import gguf

    c, kind = net.config, gguf.GGMLQuantizationType[kind]
    w = gguf.GGUFWriter(path, arch)
    (
        w.add_block_count(c.n_layers),
        w.add_context_length(c.max_len),
        w.add_embedding_length(c.d),
        w.add_feed_forward_length(c.d_ff),
    )
    (
        w.add_head_count(c.n_heads),
        w.add_head_count_kv(c.n_kv_heads),
        w.add_layer_norm_rms_eps(c.norm_eps),
        w.add_rope_freq_base(c.rope_theta),
    )
    w.add_key_length(c.head_dim)
    symbols = list(model.byte_symbols().values())
    (
        w.add_tokenizer_model("gpt2"),
        w.add_tokenizer_pre("gpt-2"),
        w.add_token_list(symbols),
        w.add_token_types([1] * len(symbols)),
        w.add_token_merges(["a b"]),
    )
    w.add_eos_token_id(1)
    back = {ours: theirs for theirs, ours in model.KEYS["gguf"].items()}
    for name, t in net.state_dict().items():
        key = model.renamed(name, back)
        heads = {"attn_q": c.n_heads, "attn_k": c.n_kv_heads}.get(key.split(".")[-2])
        if heads:
            t = t.view(heads, 2, t.shape[0] // heads // 2, -1).transpose(1, 2).reshape(t.shape)
        array, stored = t.numpy(), kind if t.dim() > 1 else gguf.GGMLQuantizationType.F32
        if stored.name in (
            "Q4_K",
            "Q6_K",
        ):  # the package writes no K-quants: random blocks with sane fp16 scales
            block, size = gguf.GGML_QUANT_SIZES[stored]
            raw = np.random.default_rng(0).integers(
                0, 255, (array.shape[0], array.shape[1] // block, size), dtype=np.uint8
            )
            scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
            at = [0, 2] if stored.name == "Q4_K" else [size - 2]
            for a in at:
                raw[..., a : a + 2] = scale
            w.add_tensor(key, raw.reshape(array.shape[0], -1), raw_dtype=stored)
        else:
            w.add_tensor(key, gguf.quants.quantize(array, stored), raw_dtype=stored)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


@pytest.mark.parametrize(
    "kind, bound", [("F32", 1e-4), ("F16", 0.02), ("BF16", 0.2), ("Q8_0", 0.5), ("Q4_0", 8.0), ("Q4_1", 8.0)]
)
def test_gguf_gives_the_same_network(tmp_path, kind, bound):
    net = randomise(model.Transformer(small_config(d=64, head_dim=16, d_ff=96, n_kv_heads=2, vocab_size=256)))
    write_gguf(tmp_path / "m.gguf", net, kind)
    ours, _ = model.load(str(tmp_path / "m.gguf"))
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(ids) - net(ids)).abs().max() < bound
    assert ours.config.rope_theta == net.config.rope_theta and ours.config.norm_eps == net.config.norm_eps


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf_k_quants_are_read(tmp_path, kind):
    import gguf

    net = randomise(model.Transformer(small_config(d=256, n_heads=4, head_dim=64, d_ff=256, vocab_size=256)))
    write_gguf(tmp_path / "m.gguf", net, kind)
    ours, _ = model.load(str(tmp_path / "m.gguf"))
    raw = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_up.weight"]
    assert raw.tensor_type.name == kind
    assert torch.equal(
        ours.layers[0].mlp.up_proj.weight, torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type))
    )
    assert torch.isfinite(ours(torch.tensor([[1, 2, 3]]))).all()


def test_gguf_errors(tmp_path):
    net = randomise(model.Transformer(small_config(vocab_size=256)))
    write_gguf(tmp_path / "a.gguf", net, arch="qwen2")
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        model.load(str(tmp_path / "a.gguf"))
    write_gguf(tmp_path / "m.gguf", net)
    whole = (tmp_path / "m.gguf").read_bytes()
    for n in (10, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="download complete"):
            model.load(str(tmp_path / "cut.gguf"))


# memory, saving, names


def test_loading_peaks_at_the_weights(tmp_path):
    """From safetensors, in the file's dtype and cast: resident memory rises by at most 1.1 x the weights."""
    net = model.Transformer(
        small_config(
            vocab_size=8000, d=1024, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=4096, tied=False
        )
    )
    model.init_weights(net, 0)
    net.to(torch.bfloat16).save(tmp_path, model.Bytes())
    code = (
        "import sys, torch, resource; sys.path.insert(0, sys.argv[1]); import model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "net, _ = model.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]), say=lambda *_: None)\n"
        "size = sum(p.numel() * p.element_size() for p in net.parameters())\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)"
    )
    for dtype, allowed in (("bfloat16", 1.1), ("float32", 1.1)):
        out = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(tmp_path), dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(out.stdout) < allowed, (dtype, out.stdout)


def test_saved_folder_loads_in_transformers(tmp_path, small):
    for n, changes in enumerate(({}, {"tied": False}, {"rope_scaling": LLAMA3, "rope_theta": 5e5})):
        net = small(**changes)
        net.save(tmp_path / str(n), model.Bytes())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(n))
        again, tok = model.load(str(tmp_path / str(n)))
        ids = torch.randint(0, 211, (2, 150))
        with torch.no_grad():
            assert (net(ids) - theirs(ids).logits).abs().max() < 1e-4
            assert torch.equal(net(ids), again(ids)) and tok.kind == "bytes"


def test_weights_hash_tells_models_apart(tmp_path, small):
    for seed in (0, 1):
        small(seed).save(tmp_path / str(seed), model.Bytes())
    hashes = [model.load(str(tmp_path / d))[0].weights_hash for d in ("0", "0", "1")]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 16
    assert model.load(str(tmp_path / "0"), dtype=torch.bfloat16)[0].weights_hash == hashes[0]


def test_published_sizes():
    for name, count in (("llama2-7b", 6_738_415_616), ("smollm2-135m", 134_515_008)):
        with torch.device("meta"):
            net = model.Transformer(model.PUBLISHED[name])
        assert sum(p.numel() for p in net.parameters()) == count


# generation


def test_cached_decode_equals_full_forward(small):
    net = small(tied=False)
    prompt = [5, 9, 40, 7]
    (got,) = net.generate([prompt], max_new=30, eos=-1)
    ids = list(prompt)
    with torch.no_grad():
        for token in got:
            assert net(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)
    assert len(got) == 30 and len(set(got)) > 3


def test_batched_generation_equals_one_by_one_and_rows_stop_alone(small):
    net = small(tied=False)
    prompts = [[3], [9, 8, 7, 6, 5, 4], [11, 12], [100, 101, 102, 103]]
    alone = [net.generate([p], max_new=25, eos=-1)[0] for p in prompts]
    assert net.generate(prompts, max_new=25, eos=-1) == alone
    eos = alone[1][4]
    cut = [row[: row.index(eos)] if eos in row else row for row in alone]
    assert net.generate(prompts, max_new=25, eos=eos) == cut and len({len(c) for c in cut}) > 1


def test_ended_rows_give_their_place_to_the_next_prompt(small):
    net, rng = small(tied=False, max_len=512), random.Random(0)
    prompts = [
        [8, 8, 9] + [rng.randrange(3, 211) for _ in range(rng.randrange(1, 9))] for _ in range(11)
    ]  # three tokens that all begin with
    limits = [rng.randrange(1, 150) for _ in prompts]  # long enough for the cache to grow
    whole = [net.generate([p], max_new=n, eos=-1)[0] for p, n in zip(prompts, limits)]
    eos = min(
        {t for row in whole for t in row}, key=lambda t: (abs(sum(t in row for row in whole) - 5), t)
    )  # what about half of them write
    alone, heard = [row[: row.index(eos)] if eos in row else row for row in whole], {}
    for rows in (1, 3, 11, 40):
        assert net.generate(prompts, limits, eos=eos, rows=rows, done=heard.__setitem__) == alone
        assert [heard.pop(i) for i in range(11)] == alone and not heard
    assert any(len(a) < n for a, n in zip(alone, limits)) and any(len(a) == n for a, n in zip(alone, limits))
    same = net.generate([[5, 6, 7]] * 3, max_new=9, eos=-1, rows=2)
    assert same == [net.generate([[5, 6, 7]], max_new=9, eos=-1)[0]] * 3 and net.generate([]) == []


@pytest.mark.parametrize("method", [None, "balora", "dora"])
def test_packed_weights_change_only_the_rounding(small, method, monkeypatch):
    if not model.BF16_KERNELS:
        pytest.skip("this CPU has no bf16 kernels of oneDNN")
    net = small(tied=False).to(torch.bfloat16)
    if method:
        balora.attach(net, method, r=4, alpha=4)
        for p in (p for p in net.parameters() if p.requires_grad):
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(3, 211, (4, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = net(ids).float()
        with model.Packed() as packed:
            close = net(ids).float()
        exact = copy.deepcopy(net).float()(ids)
    assert (
        len(packed.copies) == 2 * 7 + 1
    )  # every linear layer and the head, and nothing that is made on the way
    assert (close - exact).norm() < 1.2 * (plain - exact).norm()

    made, prompts, init = [], [[3], [9, 8, 7, 6, 5, 4], [11, 12]], model.Packed.__init__
    monkeypatch.setattr(model.Packed, "__init__", lambda self: (init(self), made.append(self))[0])
    for row, prompt in zip(net.generate(prompts, 40, eos=-1, rows=2), prompts):
        with torch.no_grad():
            Z = net(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].float()
        assert len(row) == 40 and (Z.amax(-1) - Z[range(40), row]).max() < 0.05 * Z.std()
    assert [len(p.copies) for p in made] == [15]
    net.generate(prompts, 31, eos=-1)
    copy.deepcopy(net).float().generate(prompts, 40, eos=-1)
    net.compiled = True
    net.generate(prompts, 40, eos=-1)
    assert len(made) == 1


def test_packed_products():
    if not model.BF16_KERNELS:
        pytest.skip("this CPU has no bf16 kernels of oneDNN")
    torch.manual_seed(0)
    for bias in (True, False):
        layer = torch.nn.Linear(24, 40, bias=bias).to(torch.bfloat16)
        for shape in ((5, 24), (2, 3, 24), (1, 24)):
            x = torch.randn(shape).to(torch.bfloat16)
            with torch.no_grad(), model.Packed() as packed:
                y = layer(x)
            want = torch.nn.functional.linear(
                x.float(), layer.weight.float(), layer.bias.float() if bias else None
            )
            assert (
                len(packed.copies) == 1
                and y.shape == want.shape
                and (y - want).abs().max() < 2**-7 * want.abs().max()
            )


def test_the_cache_follows_the_longest_row(small):
    net, rng = small(tied=False, max_len=1024), random.Random(0)
    prompts = [[rng.randrange(3, 211) for _ in range(n)] for n in (500, 7, 5, 3)]
    limits, widths, open_ = [3, 90, 80, 90], [], model.Cache.open

    def opened(cache, L):
        open_(cache, L)
        widths.append(cache.k.shape[3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Cache, "open", opened)
        together = net.generate(prompts, limits, eos=-1, rows=2)
    assert together == [net.generate([p], max_new=n, eos=-1)[0] for p, n in zip(prompts, limits)]
    assert (
        max(widths) >= 502 and widths[-1] < 7 + 90 + 129
    )  # the long one has ended, and what it took was given back


@pytest.mark.parametrize("rows, limits", [(1, [4, 9]), (2, [1, 9])])
def test_a_prompt_that_is_not_finite_spoils_no_other(small, rows, limits):
    net = small(tied=False)
    net.embed.weight.data[7] = float("nan")
    prompts = [
        [3, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7],
        [3, 4, 5],
    ]  # the long one is read first; the short one follows in its place, or moves over it
    assert (
        net.generate(prompts, limits, eos=-1, rows=rows)[1] == net.generate(prompts[1:], limits[1], eos=-1)[0]
    )


def test_generate_leaves_the_mode_as_it_was(small):
    net = small(tied=False)
    for mode in (True, False):
        net.train(mode)
        net.generate([[5, 6]], 3, eos=-1)
        assert net.training == mode
        with pytest.raises(KeyboardInterrupt):
            net.generate([[5, 6]], 3, eos=-1, done=lambda i, ids: (_ for _ in ()).throw(KeyboardInterrupt))
        assert net.training == mode


def test_greedy_equals_transformers(tmp_path):
    theirs, (ours, _) = reference(tmp_path, tied=False), model.load(str(tmp_path))
    prompt = torch.randint(3, 211, (1, 10), generator=torch.Generator().manual_seed(3))
    want = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 10:].tolist()
    assert ours.generate(prompt.tolist(), max_new=20, eos=-1)[0] == want


def test_sampling(small):
    net = small(tied=False)
    a, b, c = (net.generate([[5, 6]] * 4, max_new=20, temperature=1.0, eos=-1, seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert net.generate([[5, 6]], max_new=20, temperature=1.0, top_p=1e-6, eos=-1) == net.generate(
        [[5, 6]], max_new=20, eos=-1
    )
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    counts = model.pick(logits, 1.0, 0.7, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    assert counts[2] == counts[3] == 0 and abs(counts[0] - 0.625) < 0.03  # .5 / (.5 + .3)


def test_generate_refuses(small):
    with pytest.raises(ValueError, match="empty prompt"):
        small().generate([[1], []])
    with pytest.raises(ValueError, match="exceed"):
        small().generate([[1] * 200], max_new=100)


def test_checkpointing_changes_nothing(small):
    net = small().requires_grad_(True)
    ids = torch.randint(0, 211, (2, 30))
    grads = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(ids).float().logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# the real SmolLM2-135M


def test_smollm2_equals_transformers(smollm2):
    ours, tok = smollm2
    path = model.wheel_file("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.dirname(path), gguf_file=os.path.basename(path), dtype=torch.float32
    )
    for text in (
        "The capital of France is",
        "def fibonacci(n):\n    if n < 2:",
        "Alice was beginning to get very tired of sitting by her sister on the bank",
    ):
        ids = torch.tensor([tok.encode(text)])
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-3


def test_smollm2_knows_paris_and_english(smollm2):
    net, tok = smollm2
    assert "Paris" in tok.decode(net.generate([tok.encode("The capital of France is")], max_new=5)[0])
    import eval

    ids = torch.tensor([tok.encode(eval.PASSAGE)])
    with torch.no_grad():
        perplexity = torch.nn.functional.cross_entropy(net(ids)[0, :-1], ids[0, 1:]).exp()
    assert perplexity < 50  # without the row permutation it is several times that (ARCHITECTURES 4)
