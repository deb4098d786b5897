"""The methods of the poster's tables against peft, the theorems of their papers, and the invariants of METHODS.md."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, calibration, encoder
from torch import nn

import balora
import model

IDS = torch.randint(2, 211, (3, 40), generator=torch.Generator().manual_seed(5))
peft = pytest.importorskip("peft")
hf = pytest.importorskip("transformers")


@pytest.fixture
def both(small, tmp_path):
    """both(config): our network, and transformers' with the same weights under a peft config for the seven projections."""

    def make(config):
        torch.manual_seed(0)  # peft draws A from the global generator
        net = small()
        net.save(tmp_path)
        base = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        config.target_modules = set(balora.TARGETS)
        return net, peft.get_peft_model(base, config)

    return make


def pairs(net, theirs):
    """Our adapted layers beside peft's."""
    return [
        (layer, theirs.get_submodule(f"base_model.model.{net.checkpoint_name(name)}"))
        for name, layer in balora.adapted_layers(net).items()
    ]


def copy_into(net, theirs):
    """peft's A and B (and E, m) into ours."""
    with torch.no_grad():
        for ours, other in pairs(net, theirs):
            A, B = (getattr(x["default"], "weight", x["default"]) for x in (other.lora_A, other.lora_B))
            ours.A.copy_(A)
            ours.B.copy_(B)
            if isinstance(ours, balora.AdaLoRA):
                ours.E.copy_(other.lora_E["default"][:, 0])


def loss_of(Z):
    return F.cross_entropy(Z[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def product(W_out):
    return W_out.scaling["default"] * W_out.lora_B["default"].weight @ W_out.lora_A["default"].weight


def step_both(net, theirs, ours_opt, their_opt, steps):
    for _ in range(steps):
        for optimizer, Z in ((ours_opt, net(IDS)), (their_opt, theirs(input_ids=IDS).logits)):
            loss_of(Z).backward()
            optimizer.step()
            optimizer.zero_grad()


def optimizer_of(net, method, lr, **options):
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = balora.param_groups(named, method, **options)
    for group in groups:
        group["lr"] = lr * group["ratio"]
    return torch.optim.AdamW(groups)


# LoRA+, LoRA-FA


def test_lora_plus_is_pefts(both):
    from peft.optimizers import create_loraplus_optimizer

    net, theirs = both(peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=True))
    balora.attach(net, "lora+", r=4, alpha=8)
    copy_into(net, theirs)
    ours = optimizer_of(net, "lora+", 1e-3, ratio=16.0)
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    step_both(net, theirs, ours, other, 10)
    assert sorted({g["lr"] for g in ours.param_groups}) == pytest.approx([1e-3, 1.6e-2])
    for layer, them in pairs(net, theirs):
        torch.testing.assert_close(layer.s * layer.B @ layer.A, product(them), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_biases_and_norms_do_not_decay(method):
    net = encoder("bert")
    balora.attach(net, method, r=4)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for group in balora.param_groups(named, method, weight_decay=0.1):
        for name in [name for name, p in named.items() if any(p is q for q in group["params"])]:
            plain = name.endswith(("bias", "offset")) or "norm" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name


def test_lora_plus_groups_hold_each_tensor_once_and_ratio_1_is_lora():
    net = encoder("bert")
    balora.attach(net, "lora+", r=4)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = balora.param_groups(named, "lora+", ratio=4.0, weight_decay=0.1)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, named.values()))
    place = {
        name: next((g["ratio"], g["weight_decay"]) for g in groups if any(q is p for q in g["params"]))
        for name, p in named.items()
    }
    assert all(
        place[name] == ((4.0, 0.1) if name.endswith(".B") else (1.0, 0.1))
        for name in named
        if name.endswith((".A", ".B"))
    )
    assert place["classifier.out.weight"] == (1.0, 0.1) and place["classifier.out.bias"] == (
        4.0,
        0.0,
    )  # METHODS 2.2: a head's weight is A-like, its bias not
    ends = []
    for method in ("lora", "lora+"):
        net = encoder("bert")
        balora.attach(net, method, r=4)
        optimizer = optimizer_of(net, method, 1e-2, ratio=1.0)
        for _ in range(5):
            F.cross_entropy(net(IDS), torch.tensor([0, 2, 1])).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(net(IDS))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_lora_fa_keeps_A_and_its_row_space(small):
    net = small()
    balora.attach(net, "lora-fa", r=4)
    start = {name: m.A.clone() for name, m in balora.adapted_layers(net).items()}
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 4 * sum(
        m.weight.shape[0] for m in balora.adapted_layers(net).values()
    )
    optimizer = optimizer_of(net, "lora-fa", 1e-2)
    for _ in range(5):
        loss_of(net(IDS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, m in balora.adapted_layers(net).items():
        assert torch.equal(m.A, start[name])
        B, A = m.factors()
        delta, Q = B @ A, torch.linalg.qr(start[name].T).Q
        assert delta.norm() > 1e-3 and (delta - delta @ Q @ Q.T).norm() < 1e-5 * delta.norm()


def test_lora_fa_keeps_no_inputs(small):
    """What autograd saves of a layer beside B: its rank-r input, not x."""

    def kept(method):
        layer = nn.Linear(400, 300)
        net = nn.Sequential(layer)
        balora.attach(net, method, r=4, targets=["0"])
        sizes, own = [], {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
        ):
            net(torch.randn(50, 400, requires_grad=True))
        return sum(sizes)

    assert kept("lora") >= 50 * 400 and kept("lora-fa") < 50 * 400


# DoRA


def test_dora_is_pefts(both):
    net, theirs = both(peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, init_lora_weights=True))
    balora.attach(net, "dora", r=4, alpha=8)
    copy_into(net, theirs)
    ours, other = (
        torch.optim.SGD([p for p in n.parameters() if p.requires_grad], lr=0.3) for n in (net, theirs)
    )  # AdamW makes steps of the rounding of A's first, zero gradient
    step_both(net, theirs, ours, other, 10)
    with torch.no_grad():
        assert (net(IDS) - theirs(input_ids=IDS).logits).abs().max() < 2e-3
    for layer, them in pairs(net, theirs):
        torch.testing.assert_close(
            layer.m, them.lora_magnitude_vector["default"].weight, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(layer.s * layer.B @ layer.A, product(them), rtol=0, atol=2e-3)
        assert (layer.s * layer.B @ layer.A).abs().max() > 0.02 and (
            layer.m - them.weight.norm(dim=1)
        ).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_dora_invariants(bias):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0  # a row without direction
    W, x = linear.weight.detach().clone(), torch.randn(7, 20)
    layer = balora.DoRA(linear, torch.randn(4, 20) / 5, torch.zeros(12, 4), s=2.0)
    torch.testing.assert_close(layer(x), F.linear(x, W, linear.bias), rtol=0, atol=0)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    G = g.T @ x
    norms = W.norm(dim=1)
    assert layer.A.grad.abs().max() == 0 and all(t.grad.isfinite().all() for t in (layer.A, layer.B, layer.m))
    alive = norms > 0
    torch.testing.assert_close(
        layer.B.grad[alive], (layer.s * G @ layer.A.detach().T)[alive], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(layer.m.grad[alive], ((G * W).sum(1) / norms)[alive], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        layer.B.copy_(torch.randn(12, 4))
        layer.m.mul_(1.5)
        torch.testing.assert_close(
            layer.norms()[alive], (W + layer.s * layer.B @ layer.A).norm(dim=1)[alive], rtol=1e-4, atol=1e-4
        )
        merged = layer.merged()
        torch.testing.assert_close(
            merged.weight.norm(dim=1)[alive], layer.m.abs()[alive], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-4)
        before, b = layer(x), 0 if linear.bias is None else linear.bias
        layer.m.mul_(2)
        torch.testing.assert_close(layer(x) - b, 2 * (before - b), rtol=1e-4, atol=1e-4)


# AdaLoRA


def test_adalora_is_pefts_for_30_steps(both):
    """Same start, 30 steps with orthogonality and allocation: the same zeros and the same products."""
    T, t_i, t_f, every = 30, 4, 8, 2
    net, theirs = both(
        peft.AdaLoraConfig(
            init_r=6,
            target_r=4,
            tinit=t_i,
            tfinal=t_f,
            deltaT=every,
            beta1=0.85,
            beta2=0.85,
            orth_reg_weight=0.1,
            total_step=T,
            lora_alpha=8,
            task_type="CAUSAL_LM",
        )
    )
    balora.attach(net, "adalora", r=4, alpha=8)
    copy_into(net, theirs)
    ours, other = (
        torch.optim.AdamW([p for p in n.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for n in (net, theirs)
    )
    budgets = []
    for step in range(T):
        (loss_of(net(IDS)) + 0.1 * balora.orthogonality(net)).backward()
        ours.step()
        budgets.append(tuple(balora.allocate(net, step, T, 4, (t_i, t_f, every)).values()))
        ours.zero_grad()
        out = theirs(input_ids=IDS, labels=IDS)
        out.loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        other.zero_grad()
        if step < T - t_f:  # afterwards peft freezes a pattern of its own
            for layer, them in pairs(net, theirs):
                E = them.lora_E["default"][:, 0]
                assert torch.equal(layer.E == 0, E == 0), step
                torch.testing.assert_close(
                    layer.factors()[0] @ layer.A,
                    layer.s * them.lora_B["default"] @ (them.lora_A["default"] * E[:, None]),
                    rtol=0,
                    atol=1e-3,
                )
    fall = [b for b, _ in budgets]
    assert (
        fall[: t_i + 1] == [84] * (t_i + 1) and fall[-1] == 56 and all(a >= b for a, b in zip(fall, fall[1:]))
    )
    assert (
        budgets[-1] == (56, 56)
        and sum(int((m.E != 0).sum()) for m in balora.adapted_layers(net).values()) == 56
    )


def test_adalora_keeps_the_important_and_refuses_schedules_that_do_not_fit(small):
    net = small()
    balora.attach(net, "adalora", r=2)
    layers = list(balora.adapted_layers(net).values())
    rng = torch.Generator().manual_seed(0)
    for m in layers:
        m.E.data.fill_(1.0)
        for name in "ABE":
            getattr(m, f"I_{name}").copy_(torch.rand(getattr(m, name).shape, generator=rng))
            getattr(m, f"U_{name}").copy_(torch.rand(getattr(m, name).shape, generator=rng))
    score = torch.cat([m.importance() for m in layers])
    b, kept = balora.allocate(
        net, 99, 100, 2, (10, 20, 5)
    ).values()  # the final phase: nothing is observed any more
    alive = torch.cat([m.E != 0 for m in layers])
    assert b == kept == 28 and score[alive].min() > score[~alive].max()
    start = small()
    balora.attach(start, "adalora", r=2)
    orth = balora.orthogonality(start).item()
    mean = (
        sum(abs(1 - 4e-4 * n) for m in balora.adapted_layers(start).values() for n in m.weight.shape)
        / 28
        * math.sqrt(3)
    )
    assert orth == pytest.approx(mean, rel=0.05)
    for cuts in ((10, 10, 1), (0, 5, 1), (5, 0, 1), (5, 5, 30), (-1, 5, 1)):
        with pytest.raises(ValueError, match="do not fit into 20 steps"):
            balora.budget_steps(20, cut_options(*cuts))
    assert balora.budget_steps(20, cut_options(5, 5, 2)) == (5, 5, 2)
    assert balora.budget_steps(200, balora.METHODS["adalora"].options) == (20, 60, 2)  # shares
    assert balora.budget_steps(30, balora.METHODS["adalora"].options) == (3, 9, 1)


def cut_options(first, last, every):
    return dict(adalora_first=first, adalora_last=last, adalora_every=every)


# MiLoRA, CorDA


def given(net, covariance):
    """A file's worth of covariances for both sides, and the calibration that yields them here."""
    rng = torch.Generator().manual_seed(1)
    C = {}
    for name, m in net.named_modules():
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in balora.TARGETS:
            X = torch.randn(200, m.in_features, generator=rng) * torch.linspace(0.2, 1.5, m.in_features)
            C[name] = covariance(m.in_features) if covariance else X.T @ X / 200
    return C


@pytest.mark.parametrize("keep, kind", [("last", "kpm"), ("first", "ipm")])
@pytest.mark.parametrize("identity", [False, True])
def test_corda_is_pefts(both, small, tmp_path, keep, kind, identity, monkeypatch):
    """Given a covariance. With I / 1.01, whose damped form is I, CorDA is MiLoRA (last) and PiSSA (first): METHODS 2.7."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    net = small()
    C = given(net, (lambda n: torch.eye(n) / 1.01) if identity else None)
    net.save(tmp_path)
    torch.save({net.checkpoint_name(name): c for name, c in C.items()}, tmp_path / "C.pt")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights="corda",
        target_modules=list(balora.TARGETS),
        corda_config=CordaConfig(corda_method=kind, covariance_file=str(tmp_path / "C.pt")),
    )
    preprocess_corda(base, config)
    theirs = peft.get_peft_model(base, config)
    method = {"last": "milora", "first": "pissa"}[keep] if identity else "corda"
    monkeypatch.setattr(balora, "statistics", lambda *a, **k: iter(C.items()))
    options = dict(pissa=dict(niter=0), corda=dict(keep=keep)).get(method, {})
    balora.attach(net, method, r=4, alpha=8, calibrate=lambda i: None, **options)
    for layer, them in pairs(net, theirs):
        A, B = them.lora_A["default"].weight, them.lora_B["default"].weight
        torch.testing.assert_close(layer.s * layer.B0 @ layer.A0, 2 * B @ A, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(layer.B0.T @ layer.B0, B.T @ B, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            (layer.A0 @ layer.A0.T).diag().sum(), (A @ A.T).diag().sum(), rtol=1e-3, atol=1e-3
        )


def test_milora_invariants():
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    A0, B0 = balora.init_milora(W, 5, 0.5, torch.Generator())
    S = torch.linalg.svdvals(W)
    part = 0.5 * B0 @ A0
    assert torch.linalg.matrix_norm(part, 2) == pytest.approx(S[-5].item(), rel=1e-4)
    assert torch.linalg.matrix_norm(W - part, 2) == pytest.approx(S[0].item(), rel=1e-4)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_corda_of_an_identity_is_pissa_and_milora(keep):
    W, s, I = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), 0.5, torch.eye(30)
    A0, B0 = balora.init_corda(W, 6, s, None, balora.damp(I), keep=keep)
    other = (
        balora.init_pissa(W, 6, s, None, niter=0) if keep == "first" else balora.init_milora(W, 6, s, None)
    )
    torch.testing.assert_close(B0 @ A0, other[1] @ other[0], rtol=1e-3, atol=1e-4)


def test_corda_reports_damping(small):
    net = small()
    report = balora.attach(net, "corda", r=4, calibrate=calibration(net, rows=2))
    assert "covariances damped by up to 1% of their mean diagonal" in str(report)
    net = small()
    assert len(balora.attach(net, "corda", r=4, calibrate=calibration(net, rows=4)).notes) == 1
    assert balora.attach(small(), "pissa", r=4).notes == []
    net = small()
    with torch.no_grad():
        net.layers[0].attn_norm.weight.fill_(math.nan)
    for method in ("corda", "corda++"):
        with pytest.raises(
            ValueError, match="^layers.0.attn.q_proj: the covariance of its inputs has no inverse"
        ):
            balora.attach(net, method, r=4, calibrate=calibration(net))
        assert not balora.adapted_layers(net)


def test_calibration_is_blind_to_dropout():
    found = []
    for dropout in (0.0, 0.5):
        net = encoder("bert", dropout=dropout).requires_grad_(False)
        net.train()
        names = ["layers.1.mlp.up_proj"]
        found.append(dict(balora.statistics(net, names, balora.covariances, calibration(net)))[names[0]])
        assert net.training and net.layers[0].training
    torch.testing.assert_close(*found)


def test_calibration_sees_the_plain_network(small):
    """All layers are collected before the first is put in place, however many groups are measured."""
    net, seen = small(), []
    run = calibration(net)

    def calibrate(i):
        seen.append(len(balora.adapted_layers(net)))
        run(i)

    balora.attach(net, "corda++", r=4, rounds=2, calibrate=calibrate)
    assert seen and not any(seen) and len(balora.adapted_layers(net)) == 14


def test_corda_invariants():
    rng = torch.Generator().manual_seed(0)
    W, X = (
        torch.randn(40, 30, generator=rng),
        torch.randn(500, 30, generator=rng) * torch.linspace(0.01, 2, 30),
    )
    C, s, r = X.T @ X / 500, 0.5, 6
    damped, inverse, share = balora.damp(C)
    S = torch.linalg.svdvals(W @ damped)
    A0, B0 = balora.init_corda(W, r, s, rng, balora.damp(C), keep="first")
    torch.testing.assert_close(B0.T @ B0, torch.diag(S[:r] / s), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(A0 @ damped @ damped.T @ A0.T, torch.diag(S[:r] / s), rtol=1e-3, atol=1e-3)
    A1, B1 = balora.init_corda(W, r, s, rng, balora.damp(C), keep="last")
    energy = lambda A, B: (X @ (s * B @ A).T).norm()
    assert energy(A1, B1) < 0.1 * energy(A0, B0)  # KPM leaves alone what the context uses
    whole = balora.init_corda(W, 30, s, rng, balora.damp(C))
    torch.testing.assert_close(s * whole[1] @ whole[0], W, rtol=1e-3, atol=1e-3)
    scaled = balora.init_corda(W, r, s, rng, balora.damp(4 * C))
    torch.testing.assert_close(scaled[1] @ scaled[0], B0 @ A0, rtol=1e-3, atol=1e-3)
    assert scaled[1].norm() == pytest.approx(
        2 * B0.norm().item(), rel=1e-3
    )  # B0 A0 does not see C's scale, its halves do
    for bad in (torch.full((30, 30), math.nan), torch.zeros(30, 30)):
        with pytest.raises(ValueError, match="calibration rows"):
            balora.damp(bad)


def test_covariances_are_those_of_the_inputs(small):
    net, seen = small().requires_grad_(False), []
    hook = net.layers[1].attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    names = ["layers.1.attn.q_proj", "layers.0.mlp.down_proj"]
    C = dict(balora.statistics(net, names, balora.covariances, calibration(net)))
    hook.remove()
    want = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in seen) / len(seen)
    assert len(seen) == 4 and C.keys() == set(names)
    torch.testing.assert_close(C[names[0]], want)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_statistics_in_groups_are_the_statistics_at_once(small):
    net = small().requires_grad_(False)
    names = balora.match(net, None)["up_proj"] + balora.match(net, None)["q_proj"]
    for kind in (balora.covariances, balora.gradients):
        calls, run = [], calibration(net)

        def counted(i):
            calls.append(i)
            run(i)

        whole = dict(balora.statistics(net, names, kind, counted, 1))
        parts = dict(balora.statistics(net, names, kind, counted, 1, room=1000))
        assert calls == [1] * (1 + len(names))
        for name in names:
            torch.testing.assert_close(whole[name], parts[name])
        other = dict(balora.statistics(net, names, kind, run, 0))
        assert not torch.allclose(whole[names[0]], other[names[0]])
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="nothing reached"):
        list(balora.statistics(net, names, balora.gradients, lambda i: None))
    with pytest.raises(ValueError, match="calibrate"):
        balora.attach(net, "corda", r=4)


def test_deberta_projections_are_measured_on_tokens_alone():
    net = encoder("deberta").requires_grad_(False)
    names = ["layers.0.attn.k_proj", "layers.0.mlp.up_proj"]
    C = dict(balora.statistics(net, names, balora.covariances, lambda i: net(IDS[:1])))
    x = net.embed_norm(net.embed(IDS[:1])).detach()[0]
    x = x / x.max().abs()
    torch.testing.assert_close(C["layers.0.attn.k_proj"], x.T @ x, rtol=1e-4, atol=1e-4)


# LoRA-GA


def test_lora_ga_first_step_is_the_best_of_rank_2r():
    """The paper's theorem: B0 B0ᵀ G + G A0ᵀ A0, over c², is the best rank-2r approximation of G."""
    rng = torch.Generator().manual_seed(0)
    G = torch.randn(50, 8, generator=rng) @ torch.diag(0.7 ** torch.arange(8.0)) @ torch.randn(
        8, 40, generator=rng
    ) + 0.01 * torch.randn(50, 40, generator=rng)
    r, s = 3, 2.0
    A0, B0 = balora.init_lora_ga(torch.empty(50, 40), r, s, rng, G)
    c2 = math.sqrt(50) / 16
    for gram in (A0 @ A0.T, B0.T @ B0):
        torch.testing.assert_close(gram, c2 * torch.eye(r), rtol=1e-4, atol=1e-4)
    assert (s * B0 @ A0).norm() == pytest.approx(s * c2 * math.sqrt(r), rel=1e-4)
    U, S, Vt = torch.linalg.svd(G)
    best = (U[:, : 2 * r] * S[: 2 * r]) @ Vt[: 2 * r]
    first = (B0 @ B0.T @ G + G @ A0.T @ A0) / c2
    assert (first - best).norm() < 0.01 * best.norm()
    net = nn.Sequential(nn.Linear(40, 50))
    with pytest.raises(ValueError, match="takes 42 of the 40 directions"):  # before anything is measured
        balora.attach(net, "lora-ga", r=21, targets=["0"], calibrate=lambda i: pytest.fail("measured"))


def test_lora_ga_finds_small_directions():
    """Singular values from 1 to 1e-5: what a Gram matrix in fp32 would lose."""
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 12, generator=rng)).Q for n in (60, 50))
    G = (U * torch.logspace(0, -5, 12)) @ V.T
    before = torch.get_rng_state()
    A0, B0 = balora.init_lora_ga(torch.empty(60, 50), 6, 1.0, rng, G)
    assert torch.equal(torch.get_rng_state(), before)
    unit = lambda t: t / t.norm(dim=1, keepdim=True)
    assert (unit(A0) * V.T[:6]).sum(1).abs().min() > 0.999 and (unit(B0.T) * U.T[6:]).sum(
        1
    ).abs().min() > 0.99


def test_gradients_are_those_of_the_weights(small):
    net, reference = small().requires_grad_(False), small()
    calibration(reference)(0)
    names = ["layers.0.attn.o_proj", "layers.1.mlp.gate_proj"]
    G = dict(balora.statistics(net, names, balora.gradients, calibration(net)))
    assert G.keys() == set(names) and not any(p.requires_grad for p in net.parameters())
    for name in names:
        torch.testing.assert_close(G[name], reference.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-6)


# CorDA++


def test_compactness_bounds_what_is_removed():
    """‖ΔY‖₁ ≤ π(C) σ_-r where the r-th smallest direction of W C̃ is taken out, Y's inputs having covariance C̃."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        W = torch.randn(12, 9, generator=rng)
        X = torch.randn(9, 60, generator=rng) * torch.linspace(0.1, 3, 9)[:, None]
        damped, inverse, _ = balora.damp(X @ X.T)
        _, log_pi, sigma = balora.choose_covariance(W, [X @ X.T])
        U, S, Qt = torch.linalg.svd(W @ damped, full_matrices=False)
        torch.testing.assert_close(sigma, S)
        for i in range(9):
            removed = (S[i] * U[:, i : i + 1] @ (Qt @ inverse)[i : i + 1] @ X).abs().sum(0).max()
            assert removed <= math.exp(log_pi) * S[i] * 1.01  # the column 1-norm


def test_rank_allocation_keeps_its_budget_and_is_monotone():
    spectra = {f"l{i}": (0.5 + 0.1 * i) ** torch.arange(20.0) * (i + 1) for i in range(5)}
    log_pi, width = (
        {name: 2.0 + i for i, name in enumerate(spectra)},
        {name: 40 + 10 * i for i, name in enumerate(spectra)},
    )
    for keep in ("last", "first"):
        previous = None
        for r in (3, 6, 10):
            tau = r * sum(width.values())
            ranks = balora.allocate_ranks(spectra, log_pi, width, tau, keep)
            used = sum(width[name] * rank for name, rank in ranks.items())
            assert all(1 <= rank < 20 for rank in ranks.values()) and abs(used - tau) <= max(width.values())
            assert previous is None or all(ranks[name] >= previous[name] for name in ranks)
            previous = ranks
        assert len(set(ranks.values())) > 1


def test_rank_allocation_by_hand():
    """Two layers, log π 1 and 2, widths 10. n = 1: scores 1·1/(4+2) and 2·1/(3+3); after one more of "a": 1·2/4."""
    spectra, log_pi, width = (
        {"a": torch.tensor([4.0, 2.0, 1.0]), "b": torch.tensor([3.0, 3.0, 1.0])},
        {"a": 1.0, "b": 2.0},
        {"a": 10, "b": 10},
    )
    allocate = lambda budget, keep: tuple(
        balora.allocate_ranks(spectra, log_pi, width, budget, keep).values()
    )
    assert (
        allocate(19, "last") == (1, 1) and allocate(20, "last") == (2, 1) and allocate(30, "last") == (2, 2)
    )  # KPM goes on until the budget is passed
    assert (
        allocate(41, "first") == (2, 2)
        and allocate(40, "first") == (1, 2)
        and allocate(31, "first") == (1, 2)
        and allocate(30, "first") == (1, 1)
    )  # IPM until it fits
    assert balora.allocate_ranks(
        spectra | {"c": torch.tensor([1.0])}, log_pi | {"c": 1.0}, width | {"c": 10}, 10**6, "first"
    ) == {"a": 2, "b": 2, "c": 1}


def test_rank_allocation_with_layers_of_two_directions():
    """Such a layer has one rank to give; the others go on until the budget fits."""
    spectra = {"two": torch.tensor([5.0, 1.0]), "many": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])}
    log_pi, width = dict.fromkeys(spectra, 1.0), dict.fromkeys(spectra, 10)
    for budget, want in ((50, 3), (40, 2), (30, 1)):
        ranks = balora.allocate_ranks(spectra, log_pi, width, budget, "first")
        assert ranks == {"two": 1, "many": want} and 10 * sum(ranks.values()) < budget
    assert balora.allocate_ranks(spectra, log_pi, width, 20, "last") == {"two": 1, "many": 2}


def test_budget_by_hand():
    """12 triplets to 4 over 20 steps, 4 at first and 6 at last: halfway, at step 9, 4 + 8 / 2³ = 5."""
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    balora.attach(net, "adalora", r=4, targets=["0", "1"])  # 6 triplets each, 8 at the end
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    budgets = [balora.allocate(net, step, 20, 2, (4, 6, 100))["budget"] for step in (0, 4, 5, 9, 14, 15, 19)]
    assert budgets == [12, 12, int(4 + 8 * 0.9**3), 5, 4, 4, 4]


def test_choice_of_covariance():
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(12, 9, generator=rng)
    candidates = [
        X.T @ X
        for X in (torch.randn(60, 9, generator=rng) * torch.linspace(a, 1, 9) for a in (0.05, 0.3, 0.9))
    ]
    orders = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    assert (
        len({order[balora.choose_covariance(W, [candidates[i] for i in order], rng)[0]] for order in orders})
        == 1
    )
    i, log_pi, sigma = balora.choose_covariance(W, [c * torch.eye(9) for c in (1.0, 9.0, 4.0)], rng)
    assert (
        i == 1
        and len(sigma) == 9
        and log_pi == pytest.approx(0.5 * math.log(12) - 0.5 * math.log(9 * 1.01), rel=1e-4)
    )  # C̃ = 9.09 I


@pytest.mark.parametrize("keep", ["last", "first"])
def test_corda_plus_plus_of_one_round_and_uniform_ranks_is_corda(small, keep, monkeypatch):
    nets = [small() for _ in range(2)]
    monkeypatch.setattr(balora, "allocate_ranks", lambda spectra, *_: dict.fromkeys(spectra, 4))
    for net, method in zip(nets, ("corda", "corda++")):
        options = dict(rounds=1) if method == "corda++" else {}
        balora.attach(net, method, r=4, keep=keep, calibrate=calibration(net), **options)
    for a, b in zip(*(balora.adapted_layers(net).values() for net in nets)):
        torch.testing.assert_close(a.B0 @ a.A0, b.B0 @ b.A0)


def test_corda_plus_plus_ranks_and_scale(small, tmp_path):
    net = small()
    calls, run = [], calibration(net)
    report = balora.attach(
        net, "corda++", r=4, alpha=8, rounds=3, calibrate=lambda i: calls.append(i) or run(i)
    )
    layers = balora.adapted_layers(net)
    ranks, widths = [len(m.A) for m in layers.values()], [sum(m.weight.shape) for m in layers.values()]
    assert calls == [0, 1, 2] * 2 and len(set(ranks)) > 1 and all(m.s == 2.0 for m in layers.values())
    assert report.trainable == sum(r * w for r, w in zip(ranks, widths)) and abs(
        report.trainable - 4 * sum(widths)
    ) <= max(widths)


# bottleneck adapters


@pytest.mark.parametrize("method, act", [("hadapter", F.silu), ("padapter", F.relu)])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_bottlenecks_stand_where_their_papers_put_them(method, act, family):
    """The block written out with adapters' formulas (METHODS 2.12, 2.13): Houlsby after both parts' dropout, Pfeiffer around the norm behind the MLP."""
    net = encoder(family)
    balora.attach(net, method, r=5)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in balora.adapted_layers(net).values():
            for p in (layer.down, layer.down_bias, layer.up, layer.up_bias):
                p.copy_(torch.randn(p.shape, generator=rng) * 0.3)
    block, x = net.layers[0], torch.randn(2, 7, 48, generator=rng)
    position = net.distance_vectors(7, x) if family == "deberta" else None
    f = lambda a, h: F.linear(act(F.linear(h, a.down, a.down_bias)), a.up, a.up_bias)
    with torch.no_grad():
        h = block.attn(x, position)
        if method == "hadapter":
            x1 = block.attn_norm(f(block.attn_drop, h) + h + x)
            h = block.mlp(x1)
            want = block.mlp_norm(f(block.mlp_drop, h) + h + x1)
        else:
            x1 = block.attn_norm(h + x)
            u, LN = block.mlp(x1) + x1, block.mlp_norm.inner
            want = LN(f(block.mlp_norm, LN(u)) + u)
        torch.testing.assert_close(block(x, position), want)


def test_bottlenecks_are_few_and_leave_the_rest_alone():
    counts = {}
    for method, r in (("hadapter", 32), ("padapter", 64)):
        with torch.device("meta"):
            net = model.Transformer(model.config_of("deberta-v3-base"), 2)
        report = balora.attach(net, method, r=r)
        counts[method] = report.trainable - report.head, len(balora.adapted_layers(net))
    assert counts == {"hadapter": (1_198_848, 24), "padapter": (1_189_632, 12)}  # METHODS 4, with biases


# counts


def test_published_counts_of_every_method():
    """METHODS 4: LLaMA-2-7B at r = 128; DeBERTa-v3-base at r = 8 without its head."""

    def count(name, method, r, n_classes=0):
        with torch.device("meta"):
            net = model.Transformer(model.config_of(name), n_classes)
        report = balora.attach(net, method, r=r)
        return report.trainable - report.head

    llama = {
        method: count("llama2-7b", method, 128)
        for method in (
            "lora",
            "lora+",
            "lora-fa",
            "lora-ga",
            "dora",
            "pissa",
            "milora",
            "corda",
            "balora",
            "adalora",
            "full",
        )
    }
    assert llama == dict.fromkeys(
        ("lora", "lora+", "lora-ga", "pissa", "milora", "corda", "balora"), 319_815_680
    ) | {"lora-fa": 174_063_616, "dora": 321_175_552, "adalora": 479_766_528, "full": 6_738_415_616}
    deberta = {
        method: count("deberta-v3-base", method, 8, 2)
        for method in ("lora", "dora", "adalora", "lora-fa", "bitfit")
    }
    assert deberta == {
        "lora": 1_327_104,
        "dora": 1_410_048,
        "adalora": 1_991_520,
        "lora-fa": 663_552,
        "bitfit": 102_912,
    }


def test_the_readmes_table_has_every_method():
    table = (ROOT / "README.md").read_text().partition("## Fifteen methods")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = {name for cell in first_cells for name in re.findall(r"`([\w+-]+)`", cell)}
    assert named - {"--method"} == set(balora.METHODS)
