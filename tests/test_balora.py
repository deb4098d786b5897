"""balora.py against peft, closed forms, finite differences, and the invariants of the methods."""

import copy
import json
import math
import shutil
import zlib

import pytest
import torch
import torch.nn.functional as F
from conftest import calibration, encoder
from safetensors.torch import load_file, save_file
from torch import nn

import balora
import model

IDS = torch.randint(2, 211, (3, 40), generator=torch.Generator().manual_seed(5))
LOWRANK = [name for name, m in balora.METHODS.items() if m.init]
ENCODERS_ONLY = {"bitfit", "hadapter", "padapter"}  # LLaMA has no biases, and norms before its parts


def attach(net, method, **options):
    return balora.attach(net, method, calibrate=calibration(net), **options)


def train(net, steps, lr=1e-2):
    """A few AdamW steps on fixed tokens."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(IDS)[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
        optimizer.step()


def logits(net):
    with torch.no_grad():
        return net(IDS)


# the bracket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", LOWRANK)
def test_step_0_and_the_teacher_are_the_base_bit_for_bit(small, method, dtype):
    net = small(dtype=dtype)
    base = logits(net)
    attach(net, method, r=4, alpha=6)
    assert torch.equal(logits(net), base)
    train(net, 20)
    assert not torch.equal(logits(net), base)
    with balora.teacher(net):
        assert torch.equal(net(IDS), base)
    assert not torch.equal(logits(net), base)


def test_the_layer_is_its_equation():
    """y = W x + s (B A - B0 A0) x on a 2x3 weight, by hand in fp64-free numbers."""
    linear = nn.Linear(3, 2, bias=True)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    linear.bias.data = torch.tensor([0.5, -0.5])
    layer = balora.Anchored(linear, torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0], [3.0]]), s=0.5)
    layer.A.data, layer.B.data = torch.tensor([[2.0, 1.0, 2.0]]), torch.tensor([[2.0], [3.0]])
    # B A - B0 A0 = [[4,2,4],[6,3,6]] - [[1,0,2],[3,0,6]] = [[3,2,2],[3,3,0]]; x = (1,1,1): W x + b = (6.5, 14.5); + 0.5 (7, 6)
    assert torch.equal(layer(torch.ones(1, 3)), torch.tensor([[10.0, 17.5]]))
    assert torch.equal(
        layer.merged().weight, linear.weight + 0.5 * torch.tensor([[3.0, 2.0, 2.0], [3.0, 3.0, 0.0]])
    )


@pytest.mark.parametrize("method", LOWRANK)
def test_gradients_are_those_of_s_B_A(small, method):
    """grad_A = s Bᵀ G, grad_B = s G Aᵀ with G = dL/dW, at the start and later."""
    net = small()
    attach(net, method, r=3, alpha=6)
    layer = net.layers[0].mlp.up_proj
    for _ in range(2):
        layer.weight.requires_grad_(True)
        net.zero_grad()
        net(IDS).logsumexp(-1).mean().backward()
        G = layer.weight.grad
        E = layer.E if method == "adalora" else torch.ones(len(layer.A))
        if method != "lora-fa":
            torch.testing.assert_close(
                layer.A.grad, layer.s * E[:, None] * (layer.B.T @ G), rtol=1e-3, atol=1e-7
            )
        torch.testing.assert_close(layer.B.grad, layer.s * E * (G @ layer.A.T), rtol=1e-3, atol=1e-7)
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
        train(net, 3)


def test_bf16_bracket_does_not_cancel(small):
    """After one step at lr 2e-5 the bracket in bf16 agrees with its fp32 value to 1 %; the difference of products would be off by hundreds of per cent."""
    net = small(dtype=torch.bfloat16)
    balora.attach(net, "pissa", r=4, niter=0)
    train(net, 1, lr=2e-5)
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layer in balora.adapted_layers(net).values():
        if layer.weight.shape[1] != 48:
            continue
        B, A = (t.detach() for t in layer.factors())
        exact = x.double() @ (A.double().T @ B.double().T)
        ours = F.linear(F.linear(x, A.bfloat16()), B.bfloat16()).double()
        naive = (
            (
                F.linear(F.linear(x, layer.A.bfloat16()), layer.B.bfloat16())
                - F.linear(F.linear(x, layer.A0), layer.B0)
            )
            .double()
            .detach()
        )
        assert (ours - exact).norm() < 0.01 * exact.norm()
        assert (naive - exact).norm() > 0.5 * exact.norm()


def test_A_and_B_start_from_exactly_A0_and_B0_and_stay_fp32(small):
    net = small(dtype=torch.bfloat16)
    balora.attach(net, "balora", r=4)
    for layer in balora.adapted_layers(net).values():
        assert layer.A0.dtype == torch.bfloat16 and layer.A.dtype == layer.B.dtype == torch.float32
        assert (
            torch.equal(layer.A, layer.A0.float())
            and torch.equal(layer.B, layer.B0.float())
            and layer.A.data_ptr() != layer.A0.data_ptr()
        )


# initialisations


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("niter", [0, 10])
def test_pissa_invariants(shape, niter):
    """METHODS 2.6: A0 A0ᵀ = B0ᵀ B0 = S/s, the residual's norms, W_res A0ᵀ = 0."""
    rng = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 40, generator=rng))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 40, generator=rng))
    S = torch.tensor([10 * 0.8**i for i in range(40)])
    W, r, s = (U * S) @ V.T, 6, 0.5
    A0, B0 = balora.init_pissa(W, r, s, torch.Generator().manual_seed(1), None, niter=niter)
    residual = W - s * B0 @ A0
    for gram in (A0 @ A0.T, B0.T @ B0):
        torch.testing.assert_close(gram, torch.diag(S[:r] / s), rtol=1e-4, atol=1e-3)
    assert (
        abs(torch.linalg.matrix_norm(residual, 2) - S[r]) < 1e-3
        and abs(residual.norm() - S[r:].norm()) < 1e-3
    )
    assert (residual @ A0.T).norm() < 1e-2 and (B0.T @ residual).norm() < 1e-2


@pytest.mark.parametrize("init, niter", [("pissa", 0), ("pissa_niter_16", 16)])
def test_pissa_equals_peft(small, tmp_path, init, niter):
    """s B0 A0 equals what peft subtracts from W (products, never factors)."""
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = small()
    net.save(tmp_path)
    theirs = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=list(balora.TARGETS)),
    )
    balora.attach(net, "pissa", r=4, alpha=8, niter=niter)
    for name, layer in balora.adapted_layers(net).items():
        other = theirs.get_submodule(f"base_model.model.{net.checkpoint_name(name)}")
        product = other.scaling["default"] * other.lora_B["default"].weight @ other.lora_A["default"].weight
        ours = layer.s * layer.B0 @ layer.A0
        best = torch.linalg.svdvals(layer.weight)[4:].square().sum()
        assert (layer.weight - ours).square().sum() < best * (1 + 1e-3)
        if niter == 0:
            torch.testing.assert_close(ours, product.detach(), rtol=0, atol=2e-5)


def test_lora_init(small):
    A0, B0 = balora.init_lora(torch.empty(30, 400), 200, 1.0, torch.Generator().manual_seed(0))
    assert not B0.any() and A0.abs().max() <= 1 / 20 and abs(A0.std() - 1 / 20 / math.sqrt(3)) < 2e-4


def test_each_layer_has_its_own_seeded_start(small):
    """The start is a function of (seed, layer's name): no global generator, no other layer moves it."""
    nets = [small() for _ in range(4)]
    state = torch.get_rng_state()
    targets = [None, None, None, ["layers.1.attn.k_proj"]]
    for net, seed, which in zip(nets, (0, 0, 1, 0), targets):
        balora.attach(net, "lora", r=4, seed=seed, targets=which)
    assert torch.equal(state, torch.get_rng_state())
    A = [net.layers[1].attn.k_proj.A for net in nets]
    assert torch.equal(A[0], A[1]) and torch.equal(A[0], A[3]) and not torch.equal(A[0], A[2])
    assert not torch.equal(A[0], nets[0].layers[0].attn.k_proj.A)
    rng = torch.Generator().manual_seed(zlib.crc32(b"0 layers.1.attn.k_proj"))  # the same in every process
    assert torch.equal(A[0], balora.init_lora(nets[0].layers[1].attn.k_proj.weight, 4, 1.0, rng)[0])


# attach


def test_attach_reports_and_freezes(small):
    net = small()
    total = sum(p.numel() for p in net.parameters())
    report = balora.attach(net, "lora", r=4, targets=["q_proj", "layers.1.mlp.*"])
    assert [len(names) for names in report.matched.values()] == [2, 3] and report.total == total
    trainable = {n: p.numel() for n, p in net.named_parameters() if p.requires_grad}
    assert report.trainable == sum(trainable.values()) == 4 * (2 * (48 + 48) + 3 * (48 + 80))
    assert (
        all(n.endswith((".A", ".B")) for n in trainable)
        and "q_proj" in str(report)
        and f"{total:,}" in str(report)
    )


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(method="bolora"), "did you mean balora"),
        (dict(r=0), "r=0"),
        (dict(r=25), "r=25 takes 25 of the 24 directions of .*; lower r"),
        (dict(alpha=0), "alpha"),
        (dict(targets=["q_proj", "w_proj"]), "nothing matches w_proj"),
        (dict(targets=["layers.9.*"]), "nothing matches layers.9"),
        (dict(method="lora", niter=3), r"lora has no option niter \(of pissa, balora\); its own: none"),
        (dict(niters=3), "balora has no option niters.*did you mean niter.*its own: niter, oversample"),
        (dict(method="corda", keep="all"), "first or last"),
        (dict(method="corda++", rounds=0), "rounds at least 1"),
    ],
)
def test_attach_refuses(small, kwargs, words):
    with pytest.raises(ValueError, match=words):
        balora.attach(small(), **{"method": "balora", "r": 4, **kwargs})


def test_second_attach_is_an_error(small):
    net = small()
    balora.attach(net, "lora", r=2)
    with pytest.raises(ValueError, match="already has an adapter"):
        balora.attach(net, "pissa", r=2)
    balora.merge(net)
    balora.attach(net, "pissa", r=2)


def test_attach_works_on_any_module():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    assert balora.attach(net, "balora", r=2, targets=["0", "2"]).trainable == 2 * (11 + 8)


def test_published_counts():
    """METHODS 4: LLaMA-2-7B at r = 128."""
    with torch.device("meta"):
        net = model.Transformer(model.config_of("llama2-7b"))
    report = balora.attach(net, "balora", r=128, alpha=128)
    assert (
        report.trainable == 319_815_680
        and report.total == 6_738_415_616
        and sum(map(len, report.matched.values())) == 224
    )


def test_every_trained_tensor_has_a_gradient_within_three_steps(small):
    """... and moves, and nothing else does."""
    for method in balora.METHODS.keys() - ENCODERS_ONLY:
        net = small()
        attach(net, method, r=4)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        unmoved = {n for n, p in net.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            F.cross_entropy(net(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
            optimizer.step()
            unmoved -= {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.zero_grad()
        assert not unmoved, (method, unmoved)
        for n, p in net.named_parameters():
            assert torch.equal(p, before[n]) != p.requires_grad, (method, n)


# teacher, merge


def test_teacher_restores_modes_and_switches_also_on_an_exception(small):
    net = small()
    balora.attach(net, "pissa", r=4)
    train(net, 2)
    net.train()
    net.layers[0].eval()
    after = logits(net)
    with pytest.raises(RuntimeError):
        with balora.teacher(net):
            assert not net.training and not torch.is_grad_enabled()
            raise RuntimeError
    assert net.training and not net.layers[0].training and net.layers[1].training and torch.is_grad_enabled()
    assert torch.equal(logits(net), after)


def test_teacher_of_full_tuning_is_a_frozen_copy(small):
    net = small()
    frozen = copy.deepcopy(net).requires_grad_(False)
    base = logits(net)
    balora.attach(net, "full")
    train(net, 3)
    with balora.teacher(frozen) as teacher:
        assert teacher is frozen and torch.equal(teacher(IDS), base)
    assert not torch.equal(logits(net), base)
    with pytest.raises(ValueError, match="frozen copy"):
        with balora.teacher(net):
            pass


@pytest.mark.parametrize("method", LOWRANK)
def test_merge_equals_unmerged_and_is_idempotent(small, method):
    net = small()
    attach(net, method, r=4, alpha=2)
    train(net, 5)
    before, layer = logits(net), net.layers[0].mlp.up_proj
    most = {"adalora": 6, "dora": 48}.get(method, len(layer.factors()[1]))
    assert balora.merge(net) == 14 and balora.merge(net) == 0
    assert (logits(net) - before).abs().max() < 1e-4 and not balora.adapted_layers(net)
    fresh = small()
    assert (
        torch.linalg.matrix_rank(
            net.layers[0].mlp.up_proj.weight - fresh.layers[0].mlp.up_proj.weight, rtol=1e-3
        )
        <= most
    )


# files


@pytest.mark.parametrize(
    "method, targets",
    [(name, ["q_proj", "layers.1.mlp.down_proj"] if name == "balora" else None) for name in LOWRANK],
)
def test_saved_adapter_loads_in_peft_and_here(small, tmp_path, method, targets):
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = small()
    net.save(tmp_path / "base")
    attach(net, method, r=4, alpha=6, targets=targets)
    train(net, 10)
    if method == "adalora":
        net.layers[0].attn.q_proj.E.data[:5] = 0
    balora.save_adapter(net, tmp_path / "adapter", base="some/model")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    layers = balora.adapted_layers(net)
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, layer in layers.items():  # s is in lora_B, and every layer is scaled by 1
        left, right = layer.factors()
        key = f"base_model.model.{net.checkpoint_name(name)}"
        assert torch.equal(state[f"{key}.lora_B.weight"], left)
        assert torch.equal(state[f"{key}.lora_A.weight"], right)
        rank = config["rank_pattern"].get(net.checkpoint_name(name), config["r"])
        assert (
            len(right) == rank == config["alpha_pattern"].get(net.checkpoint_name(name), config["lora_alpha"])
        )
    assert bool(config["rank_pattern"]) == (method == "corda++")
    if method in ("lora", "dora", "pissa", "adalora"):
        assert config["r"] == config["lora_alpha"] == {"pissa": 8, "adalora": 6}.get(method, 4)
    assert config["base_model_name_or_path"] == "some/model"
    theirs = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(net)).abs().max() < 1e-4
    assert sum("lora_A" in n for n, _ in theirs.named_parameters()) == len(balora.adapted_layers(net))
    again, _ = model.load(str(tmp_path / "base"))
    assert balora.load_adapter(again, tmp_path / "adapter") == len(balora.adapted_layers(net))
    assert (logits(again) - logits(net)).abs().max() < 1e-4
    assert (logits(again) - logits(small())).abs().max() > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_adapter_loads_here(small, tmp_path, rslora):
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = small()
    net.save(tmp_path / "base")
    theirs = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            use_rslora=rslora,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 6},
        ),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    assert balora.load_adapter(net, tmp_path / "adapter") == 4
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(net)).abs().max() < 1e-4


def test_load_adapter_is_strict(small, tmp_path):
    from safetensors.torch import load_file, save_file

    net = small()
    balora.attach(net, "lora", r=4)
    balora.save_adapter(net, tmp_path)
    with pytest.raises(ValueError, match="already"):
        balora.load_adapter(net, tmp_path)
    state, path = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    first = next(iter(state))

    def broken(change, words):
        new = dict(state)
        change(new)
        save_file(new, path)
        with pytest.raises(ValueError, match=words):
            balora.load_adapter(small(), tmp_path)

    broken(lambda s: s.pop(first), "not of this model, or not whole")
    broken(lambda s: s.update({first.replace("layers.0", "layers.9"): s.pop(first)}), "layers.9")
    broken(lambda s: s.update({first: torch.ones(4, 7)}), r"\[4, 7\]")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    broken(lambda s: None, "lora_bias")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    broken(lambda s: None, "lora_magnitude_vector")
    with pytest.raises(ValueError, match="adapter_config.json"):
        balora.load_adapter(small(), tmp_path / "nowhere")


def test_mixed_ranks_survive_save_and_load(small, tmp_path):
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = small()
    net.save(tmp_path / "base")
    theirs = peft.get_peft_model(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 6},
        ),
    )
    theirs.save_pretrained(tmp_path / "a")
    balora.load_adapter(net, tmp_path / "a")
    balora.save_adapter(net, tmp_path / "b")
    again, _ = model.load(str(tmp_path / "base"))
    balora.load_adapter(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(net))
    theirs = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "b"
    )
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(net)).abs().max() < 1e-4


def test_residual_form_adapters_and_heads_are_refused(small, tmp_path):
    net = small(tied=False)
    balora.attach(net, "lora", r=2)
    balora.save_adapter(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "init_lora_weights": "pissa_niter_16"})
    )
    with pytest.raises(ValueError, match="has changed its base's weights"):
        balora.load_adapter(small(tied=False), tmp_path)
    with pytest.raises(ValueError, match="nothing matches lm_head"):
        balora.attach(small(tied=False), "lora", r=2, targets=["lm_head"])


def test_adalora_is_saved_with_one_rank(small, tmp_path):
    """What it dropped counts nothing in the file; a layer that kept no triplet is there, too."""
    net = small()
    balora.attach(net, "adalora", r=2, alpha=3)
    layers = balora.adapted_layers(net)
    with torch.no_grad():
        for name, layer in layers.items():
            if name != "layers.1.mlp.up_proj":
                layer.E[: 1 + ("q_proj" in name)] = 0.5
        want = net(IDS)
    balora.save_adapter(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 and not config["rank_pattern"]
    state = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: int((t != 0).any(0).sum()) for key, t in state.items() if "lora_B" in key}
    assert sorted(set(kept.values())) == [0, 1, 2]
    again = small()
    assert balora.load_adapter(again, tmp_path) == len(layers)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), want, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_old_tree_still_loads(small, tmp_path):
    """alpha beside r, patterns for other ranks: peft's general form."""
    net = small()
    attach(net, "corda++", r=4, alpha=8, rounds=2)
    train(net, 3)
    balora.save_adapter(net, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    state = load_file(tmp_path / "adapter_model.safetensors")
    old = {key: t / 2.0 if "lora_B" in key else t for key, t in state.items()}  # s = 2 was alpha / r
    save_file(old, tmp_path / "adapter_model.safetensors")
    doubled = {name: 2 * n for name, n in config["rank_pattern"].items()}
    path.write_text(json.dumps({**config, "lora_alpha": 2 * config["r"], "alpha_pattern": doubled}))
    again = small()
    balora.load_adapter(again, tmp_path)
    assert (logits(again) - logits(net)).abs().max() < 1e-4


def test_a_file_that_does_not_fit_changes_nothing(small, tmp_path):
    net = small()
    balora.attach(net, "lora", r=4)
    balora.save_adapter(net, tmp_path / "whole")
    for case, words in (
        ("short", "adapter_model.safetensors: SafetensorError"),
        ("gone", "adapter_model.safetensors: .*expected a folder as peft writes it"),
        ("json", "adapter_config.json: JSONDecodeError"),
        ("shape", "lora_B.* is torch.float32"),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / case)
        weights = tmp_path / case / "adapter_model.safetensors"
        if case == "short":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif case == "gone":
            weights.unlink()
        elif case == "json":
            (tmp_path / case / "adapter_config.json").write_text("{")
        else:
            state = load_file(weights)
            last = [k for k in state if "layers.1.mlp.down_proj.lora_B" in k][0]
            save_file(state | {last: state[last][:-1].contiguous()}, weights)
        other = small()
        with pytest.raises(ValueError, match=words):
            balora.load_adapter(other, tmp_path / case)
        assert not balora.adapted_layers(other) and all(p.requires_grad for p in other.parameters()), case


def test_a_language_models_adapter_is_refused_by_a_classifier(tmp_path):
    net = encoder("bert")
    attach(net, "lora", r=4)
    balora.save_adapter(net, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lora" in k}, path)
    with pytest.raises(ValueError, match="not of this model, or not whole .a head"):
        balora.load_adapter(encoder("bert"), tmp_path)


def test_t5_adapter_loads_in_peft(tmp_path):
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    net = encoder("t5")
    net.save(tmp_path / "base")
    balora.attach(net, "pissa", r=4)
    tune(net)
    balora.save_adapter(net, tmp_path / "adapter")
    base = hf.T5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    ids = IDS[:, :20].masked_fill(IDS[:, :20] == net.config.pad, 9)
    with torch.no_grad():
        Z = theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.full((len(ids), 1), net.config.bos),
        ).logits[:, 0]
        assert (Z[:, net.label_ids] - net(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("method", [*LOWRANK, "full"])
def test_a_checkpoint_goes_on_without_measuring(small, method, monkeypatch):
    """attach(state=...): A0, B0 and ranks are those of the state, nothing is calibrated, decomposed or drawn."""
    net, again = small(), small()
    attach(net, method, r=4, alpha=6)
    train(net, 2)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("decomposed"))
    drawn = torch.get_rng_state()
    report = balora.attach(again, method, r=4, alpha=6, seed=99, state=state)
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(logits(again), logits(net))
    assert report.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    train(net, 2), train(again, 2)
    assert torch.equal(logits(again), logits(net))


def test_a_checkpoint_of_something_else_is_refused(small):
    with pytest.raises(ValueError, match="no such layers.0.attn.q_proj.A in it"):
        balora.attach(small(), "lora", r=4, state={})


def test_full_tuning_has_no_adapter_to_save(small, tmp_path):
    net = small()
    balora.attach(net, "full")
    with pytest.raises(ValueError, match="no adapter"):
        balora.save_adapter(net, tmp_path)


# the regularizers


def test_cr_nlg_by_hand():
    Z_P, Z_F = torch.tensor([[0.0, 2 * math.log(3)], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    # row 1 at T = 2: P = (1/4, 3/4), F = (1/2, 1/2): KL = 1/4 log(1/2) + 3/4 log(3/2); row 2: 0; T² = 4; mean of two rows
    want = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert abs(balora.cr_nlg(Z_P, Z_F, T=2.0).item() - want) < 1e-6
    assert balora.cr_nlg(Z_F, Z_F, T=2.0) == 0


def test_dr_nlg_by_hand():
    Z = torch.tensor([[math.log(3.0), 0.0, -50.0], [1.0, 1.0, -50.0]])  # top 2: (3/4, 1/4) and (1/2, 1/2)
    want = (0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(0.5)) / 2
    assert abs(balora.dr_nlg(Z, K=2).item() - want) < 1e-6
    assert abs(balora.dr_nlg(torch.zeros(3, 50), K=20).item() + math.log(20)) < 1e-6


def test_svdr_nlg_by_hand():
    Z = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])  # σ = 4, 3; ‖Z‖ = 5
    assert (
        abs(balora.svdr_nlg(Z, k=1).item() + 4 / 5) < 1e-6
        and abs(balora.svdr_nlg(Z, k=2).item() + 7 / 5) < 1e-6
    )


def test_regularizers_against_finite_differences():
    rng = torch.Generator().manual_seed(0)
    Z_P, Z_F = (torch.randn(6, 9, generator=rng, dtype=torch.float64) for _ in range(2))
    Z_F.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda Z: balora.cr_nlg(Z_P, Z, 2.0), Z_F)
    assert torch.autograd.gradcheck(lambda Z: balora.dr_nlg(Z, 4), Z_F)
    assert torch.autograd.gradcheck(lambda Z: balora.svdr_nlg(Z, 3), Z_F)


def test_regularizer_bounds_and_symmetry():
    rng = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 30.0):
        Z_P, Z_F = (torch.randn(40, 90, generator=rng) * scale for _ in range(2))
        assert balora.cr_nlg(Z_P, Z_F, 2.0) >= 0
        assert -math.log(20) - 1e-6 <= balora.dr_nlg(Z_F, 20) <= 0
        assert -math.sqrt(10) <= balora.svdr_nlg(Z_F, 10) < 0
        order = torch.randperm(40, generator=rng)
        torch.testing.assert_close(balora.dr_nlg(Z_F[order], 20), balora.dr_nlg(Z_F, 20))
        exact = -torch.linalg.svdvals(Z_F)[:10].sum() / Z_F.norm()
        assert abs(balora.svdr_nlg(Z_F, 10) / exact - 1) < 0.03 and balora.svdr_nlg(Z_F, 10) >= exact - 1e-6
    torch.testing.assert_close(balora.svdr_nlg(Z_F, 200), -torch.linalg.svdvals(Z_F).sum() / Z_F.norm())


def test_randomized_svdr_gradient_is_near_the_exact_one_where_the_spectrum_falls():
    rng = torch.Generator().manual_seed(0)
    Z = (
        torch.randn(60, 60, generator=rng)
        @ torch.diag(0.8 ** torch.arange(60.0))
        @ torch.randn(60, 60, generator=rng)
    )
    grads = []
    for f in (lambda Z: balora.svdr_nlg(Z, 10), lambda Z: -torch.linalg.svdvals(Z)[:10].sum() / Z.norm()):
        Z.requires_grad_(True).grad = None
        f(Z).backward()
        grads.append(Z.grad.clone())
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


def test_svdr_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    a, b = (balora.svdr_nlg(torch.arange(6000.0).reshape(60, 100).sin(), 5) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())


def test_logits_of_zeros_have_no_spectrum_and_no_gradient():
    for svdr in (balora.svdr_nlu, balora.svdr_nlg):
        Z = torch.zeros(6, 4, requires_grad=True)
        value = svdr(Z, 2)
        value.backward()
        assert value == 0 and torch.equal(Z.grad, torch.zeros_like(Z))


# the objective


def states(M=150, d=24, V=97):
    """More rows than a chunk has."""
    rng = torch.Generator().manual_seed(0)
    H_F, H_P, E = (torch.randn(n, d, generator=rng) for n in (M, M, V))
    return H_F.requires_grad_(True), H_P, E, torch.randint(0, V, (M,), generator=rng)


def plain(Z_F, y, Z_P, lambdas, T=2.0, K=20, k=10, **cross_entropy):
    """The poster's sum, from all logits at once."""
    total = F.cross_entropy(Z_F, y, **cross_entropy)
    if Z_P is not None:
        total = total + lambdas[0] * balora.cr_nlg(Z_P, Z_F, T)
    return total + lambdas[1] * balora.dr_nlg(Z_F, K) + lambdas[2] * balora.svdr_nlg(Z_F, k)


@pytest.mark.parametrize("lambdas", [(0.3, 0.2, 0.1), (0, 0.2, 0), (0.3, 0, 0), (0, 0, 0.1), (0, 0, 0)])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_chunks_are_the_plain_objective(lambdas, taught, head):
    """Value, terms, and the gradients to the states and to a trained head, in fp32."""
    H_F, H_P, E, y = states()
    E_P = E.clone()
    E.requires_grad_(head == "trained")
    learners = [H_F, E] if head == "trained" else [H_F]
    R = balora.head_factor(E) if head == "frozen" else None
    options = dict(T=3.0, K=7, k=4, label_smoothing=0.1)
    total, terms = balora.loss_nlg(H_F, y, E, H_P if taught else None, R, E_P, lambdas, **options)
    Z_F, Z_P = H_F @ E.T, H_P @ E_P.T
    want = plain(Z_F, y, Z_P if taught else None, lambdas, **options)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(0.5 * total, learners)  # a loop weighs micro-batches
    for a, b in zip(ours, torch.autograd.grad(0.5 * want, learners)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert terms.keys() == {"task", "cr", "dr", "svdr"} and not any(
        t.requires_grad for t in terms.values() if t is not None
    )
    torch.testing.assert_close(terms["task"], F.cross_entropy(Z_F, y, label_smoothing=0.1))
    torch.testing.assert_close(terms["dr"], balora.dr_nlg(Z_F, 7))
    torch.testing.assert_close(terms["svdr"], balora.svdr_nlg(Z_F, 4), rtol=1e-4, atol=1e-5)
    if taught:
        torch.testing.assert_close(terms["cr"], balora.cr_nlg(Z_P, Z_F, 3.0))
    else:
        assert terms["cr"] is None


def test_the_target_does_not_move_with_a_trained_head():
    H_F, H_P, E, y = states()
    E.requires_grad_(True)
    same = [balora.loss_nlg(H_F, y, E, H_P, E_P=E_P, lambdas=(1, 0, 0))[0] for E_P in (None, E.detach())]
    torch.testing.assert_close(*(torch.autograd.grad(total, E)[0] for total in same))


def test_weighed_micro_batches_are_the_large_batch():
    """The token-wise terms: 3 unequal parts, each a mean, weighed by their rows, give loss and gradient of all."""
    H_F, H_P, E, y = states()
    lambdas = (0.3, 0.2, 0.0)
    whole, _ = balora.loss_nlg(H_F, y, E, H_P, lambdas=lambdas)
    parts = 0.0
    for rows in (slice(0, 5), slice(5, 80), slice(80, 150)):
        total, _ = balora.loss_nlg(H_F[rows], y[rows], E, H_P[rows], lambdas=lambdas)
        parts = parts + len(y[rows]) / len(y) * total
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, H_F)[0], torch.autograd.grad(whole, H_F)[0])


def test_values_alone_and_a_replaced_token_terms(monkeypatch):
    """Without gradients nothing is kept; a script may put a compiled `token_terms` in place."""
    H_F, H_P, E, y = states()
    want, _ = balora.loss_nlg(H_F, y, E, H_P)
    with torch.no_grad():
        total, _ = balora.loss_nlg(H_F, y, E, H_P)
    assert not total.requires_grad
    torch.testing.assert_close(total, want.detach())
    calls, original = [], balora.token_terms
    monkeypatch.setattr(balora, "token_terms", lambda *a, **k: calls.append(len(a[0])) or original(*a, **k))
    balora.loss_nlg(H_F, y, E, H_P)
    assert calls == [64, 64, 22]


def test_head_factor_keeps_singular_values():
    H, _, E, _ = states()
    sigma = [torch.linalg.svdvals(Z)[:24] for Z in (H @ E.T, H @ balora.head_factor(E).T)]
    torch.testing.assert_close(*sigma, rtol=1e-4, atol=1e-3)


def test_through_a_network(small):
    """hidden -> loss_nlg trains a network exactly as all its logits do."""
    grads = []
    for chunked in (True, False):
        net = small()
        balora.attach(net, "balora", r=4)
        train(net, 2)
        valid = torch.zeros_like(IDS, dtype=torch.bool)
        valid[:, 10:-1] = True
        y = IDS.roll(-1, 1)[valid]
        with balora.teacher(net):
            H_P = net.hidden(IDS)[valid]
        H_F = net.hidden(IDS)[valid]
        if chunked:
            total, _ = balora.loss_nlg(H_F, y, net.head, H_P, lambdas=(0.3, 0.2, 0.1))
        else:
            total = plain(H_F @ net.head.T, y, H_P @ net.head.T, (0.3, 0.2, 0.1))
        net.zero_grad()
        total.backward()
        grads.append([p.grad for p in net.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# NLU: regularizers and objective


def test_cr_nlu_by_hand():
    Z_P, Z_F = torch.tensor([[0.0, 2 * math.log(3)], [1.0, 1.0]]), torch.zeros(2, 2)
    want = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert abs(balora.cr_nlu(Z_P, Z_F, T=2.0).item() - want) < 1e-6 and balora.cr_nlu(Z_P, Z_P, T=2.0) == 0


def test_dr_nlu_by_hand():
    Z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 6.0, 0.0]])  # centred (∓1, ∓2, 0); C = [[2, 4, 0], [4, 8, 0], 0]
    assert abs(balora.dr_nlu(Z).item() - 2 * 16 / 3) < 1e-6
    assert abs(balora.dr_nlu(Z + torch.tensor([5.0, -1.0, 9.0])).item() - 32 / 3) < 1e-5
    C = torch.from_numpy(
        __import__("numpy").cov(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).numpy().T)
    )
    Z = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    assert abs(balora.dr_nlu(Z) - ((C**2).sum() - (C.diag() ** 2).sum()) / 4) < 1e-5


def test_svdr_nlu_by_hand():
    Z = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    assert (
        abs(balora.svdr_nlu(Z, 1).item() + 4 / 7) < 1e-6
        and balora.svdr_nlu(Z, 2) == -1
        and balora.svdr_nlu(Z, 5) == -1
    )


def test_nlu_regularizers_against_finite_differences():
    rng = torch.Generator().manual_seed(0)
    Z_P, Z_F = (torch.randn(6, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    Z_F.requires_grad_(True)
    for f in (lambda Z: balora.cr_nlu(Z_P, Z, 2.0), balora.dr_nlu, lambda Z: balora.svdr_nlu(Z, 2)):
        assert torch.autograd.gradcheck(f, Z_F)
    (constant,) = torch.autograd.grad(balora.svdr_nlu(Z_F, 4), Z_F)
    assert constant.abs().max() < 1e-15  # k ≥ min(N, D): the poster's term is the constant -1


@pytest.mark.parametrize("n, D, idle", [(8, 3, ""), (8, 2, ""), (1, 3, "dr svdr"), (8, 1, "cr dr svdr")])
def test_which_nlu_terms_can_act(n, D, idle):
    """None where a term cannot act, and the objective says the same through its gradients."""
    rng = torch.Generator().manual_seed(n)
    Z = torch.randn(n, D, generator=rng).requires_grad_(True)
    y = torch.zeros(n, dtype=torch.long) if D > 1 else torch.ones(n)
    task, _ = balora.loss_nlu(Z, y, lambdas=(0, 0, 0))
    for name, lambdas in (("cr", (1, 0, 0)), ("dr", (0, 1, 0)), ("svdr", (0, 0, 1))):
        total, terms = balora.loss_nlu(Z, y, torch.randn(n, D, generator=rng), lambdas)
        (moved,) = torch.autograd.grad(total - task, Z, retain_graph=True)
        assert (terms[name] is None) == (name in idle.split()) == bool(moved.abs().max() < 1e-6), name
        assert balora.loss_nlu(Z, y, lambdas=lambdas)[1]["cr"] is None  # without a teacher


def test_loss_nlu_is_the_weighted_sum_of_the_poster():
    rng = torch.Generator().manual_seed(3)
    Z_P, Z_F = torch.randn(8, 3, generator=rng), torch.randn(8, 3, generator=rng)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    total, terms = balora.loss_nlu(Z_F, y, Z_P, (0.15, 0.03, 0.04), label_smoothing=0.1)
    svdr = balora.svdr_nlu(Z_F, 2)  # k = min(5, min(8, 3) - 1)
    want = F.cross_entropy(Z_F, y, label_smoothing=0.1) + 0.15 * balora.cr_nlu(Z_P, Z_F, 2.0)
    torch.testing.assert_close(total, want + 0.03 * balora.dr_nlu(Z_F) + 0.04 * svdr)
    assert terms.keys() == {"task", "cr", "dr", "svdr"}
    score = torch.randn(8, generator=rng)
    total, terms = balora.loss_nlu(
        Z_F[:, :1], score, Z_P[:, :1], label_smoothing=0.1
    )  # STS-B: the terms vanish
    torch.testing.assert_close(total, ((Z_F[:, 0] - score) ** 2).mean())
    assert terms["cr"] is terms["dr"] is terms["svdr"] is None


# encoders: heads and BitFit

CLASSES = torch.tensor([0, 2, 1])


def tune(net, steps=20):
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(IDS[:, :20]), CLASSES).backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "t5"])
@pytest.mark.parametrize("method", [name for name, m in balora.METHODS.items() if m.layer])
def test_step_0_and_teacher_of_encoders(family, method):
    if family == "t5" and method in ENCODERS_ONLY:
        with pytest.raises(ValueError, match="nothing matches any; the model has no place for"):
            balora.attach(encoder("t5"), method)
        return
    net = encoder(family)
    with torch.no_grad():
        base, h = net(IDS[:, :20]), net.hidden(IDS[:, :20])
        with torch.enable_grad():
            report = attach(net, method, r=4)
        assert torch.equal(net(IDS[:, :20]), base)
    assert report.head == (0 if family == "t5" else 48 * 48 + 48 + 48 * 3 + 3)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    tune(net)
    for n, p in net.named_parameters():
        if "k_proj.offset" in n and family != "deberta":
            assert (
                p.grad.abs().max() < 1e-6
            )  # softmax cancels a key's bias, where positions do not read it too
        else:
            assert torch.equal(p, before[n]) != p.requires_grad, n
    with balora.teacher(net):
        assert torch.equal(net.hidden(IDS[:, :20]), h)  # the head is another matter: it trains whole
    tuned = net(IDS[:, :20])
    if method in ("hadapter", "padapter"):
        with pytest.raises(ValueError, match="nonlinearity"):
            balora.merge(net)
        return
    assert balora.merge(net) and not balora.adapted_layers(net)
    assert (net(IDS[:, :20]) - tuned).abs().max() < 2e-4


@pytest.mark.parametrize("family, name", [("bert", "Bert"), ("roberta", "Roberta"), ("deberta", "DebertaV2")])
@pytest.mark.parametrize(
    "method", ["lora", "pissa", "dora", "adalora", "corda++", "bitfit", "hadapter", "padapter"]
)
def test_adapter_and_head_survive_the_file(family, name, method, tmp_path):
    net = encoder(family)
    net.save(tmp_path / "base")
    attach(net, method, r=4)
    tune(net)
    balora.save_adapter(net, tmp_path / "adapter")
    with torch.no_grad():
        want = net(IDS[:, :20])
        again = encoder(family)
        balora.load_adapter(again, tmp_path / "adapter")
        assert (again(IDS[:, :20]) - want).abs().max() < 1e-4
        with pytest.raises(ValueError, match=r"torch.float32 .*not finite floats \[2"):
            balora.load_adapter(encoder(family, n_classes=2), tmp_path / "adapter")
        if method not in ENCODERS_ONLY:
            peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
            base = getattr(hf, name + "ForSequenceClassification").from_pretrained(
                tmp_path / "base", dtype=torch.float32
            )
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            ids = IDS[:, :20].masked_fill(IDS[:, :20] == net.config.pad, 9)
            assert (
                theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits - net(ids)
            ).abs().max() < 1e-4


def test_published_counts_of_deberta():
    """METHODS 4: r = 8 on the 72 linears, BitFit's backbone biases; the head (pooler and classifier) apart."""
    counts = {}
    for method in ("lora", "pissa", "balora", "bitfit"):
        with torch.device("meta"):
            net = model.Transformer(model.config_of("deberta-v3-base"), 2)
        report = balora.attach(net, method, r=8)
        assert report.head == 592_130 and report.total == 184_423_682
        counts[method] = report.trainable - report.head
        if method == "lora":
            assert sum(
                map(len, report.matched.values())
            ) == 72 and "1,327,104 by the method, 592,130 in the head" in str(report)
    assert counts == {"lora": 1_327_104, "pissa": 1_327_104, "balora": 1_327_104, "bitfit": 102_912}


# schedules


def test_schedules():
    lam = (1.0, 2.0, 3.0)
    at = lambda p: balora.lambda_schedule(int(p * 1000), 1000, lam)
    assert at(0) == (1.0, 0.0, 0.0) and at(0.2)[1:] == (0.0, 0.0)
    assert at(0.5)[0] == pytest.approx(0.55) and at(0.5)[1:] == (2.0, 3.0) and at(1)[0] == pytest.approx(0.1)
    assert at(0.225)[1:] == pytest.approx((1.0, 1.5))
    lr = [balora.lr_schedule(i, 100, 0.1) for i in range(101)]
    assert (
        0 < lr[0] < lr[5] < lr[9] < 1
        and lr[10] == 1
        and lr[55] == pytest.approx(0.5)
        and lr[100] == pytest.approx(0, abs=1e-12)
    )
    assert all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert balora.lr_schedule(0, 10, 0.0) == 1
    line = [balora.lr_schedule(i, 100, 0.2, linear=True) for i in range(101)]
    assert (
        line[20] == 1
        and line[60] == pytest.approx(0.5)
        and line[100] == 0
        and line[:20] == [balora.lr_schedule(i, 100, 0.2) for i in range(20)]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_svd_term_takes_any_dtype_and_zeros(dtype):
    Z = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    value = balora.svdr_nlg(Z, 5)
    sigma = torch.linalg.svdvals(Z.detach().double())
    assert value.item() == pytest.approx(-(sigma[:5].sum() / sigma.square().sum().sqrt()).item(), rel=1e-2)
    value.backward()
    assert Z.grad.isfinite().all() and Z.grad.abs().max() > 0
    zero = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    balora.svdr_nlg(zero, 2).backward()
    assert zero.grad.abs().max() == 0


def test_equal_adapters_are_equal_files(small, tmp_path):
    """A file's bytes are a function of its tensors: benchmarks tell adapters apart by a hash of them."""
    net = small()
    balora.attach(net, "balora", r=4)
    for i in range(8):
        balora.save_adapter(net, tmp_path / str(i))
    assert len({(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(8)}) == 1


@pytest.mark.parametrize("method", ["balora", "lora", "dora", "adalora"])
def test_a_teacher_inside_a_teacher(small, method):
    """The inner one leaves the outer one on, also where it ends by an error; afterwards the bracket is back."""
    net = small()
    ids = torch.arange(3, 12)[None]
    before = net(ids)
    balora.attach(net, method, r=4)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.05
    tuned = net(ids).detach()
    with balora.teacher(net):
        with pytest.raises(KeyError), balora.teacher(net):
            raise KeyError
        assert torch.equal(net(ids), before)
    assert torch.equal(net(ids), tuned) and not torch.equal(tuned, before)


@pytest.mark.parametrize(
    "method", [m for m, spec in balora.METHODS.items() if spec.layer and issubclass(spec.layer, balora.LoRA)]
)
def test_every_method_under_autocast(small, method):
    """fp32 weights, bf16 autocast: the base bit for bit at the start and by the teacher; the bracket to 1 %."""
    net = small()
    ids = torch.arange(3, 40)[None]

    def calibrate(turn):
        for row in torch.randint(3, 211, (6, 1, 30), generator=torch.Generator().manual_seed(turn)):
            net(row).logsumexp(-1).sum().backward() if torch.is_grad_enabled() else net(row)

    with torch.autocast("cpu", torch.bfloat16):
        base = net(ids)
    balora.attach(net, method, r=4, calibrate=calibrate)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(ids), base)
    rng = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        net(ids).float().square().mean().backward()
        with balora.teacher(net):
            assert torch.equal(net(ids), base)
    for name, layer in balora.adapted_layers(net).items():
        x = torch.randn(20, layer.weight.shape[1], generator=rng)
        with torch.no_grad():
            exact = layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
        assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.01 * exact.norm(), name
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters() if p.requires_grad)


def test_the_norm_of_many_logits_is_exact():
    """k = all σ: the randomised SVD is exact, so what is left is ‖Z‖_F (torch's fp32 norm was 0.1 to 2 % off)."""
    Z = 3 + torch.randn(64, 49152, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(Z.double())
    exact = -(sigma.sum() / sigma.square().sum().sqrt()).item()
    assert balora.svdr_nlg(Z, 64).item() == pytest.approx(exact, rel=2e-5)
