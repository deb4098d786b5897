"""The same promises on every device at hand (CPU, and CUDA where there is one): bf16, torch.compile, checkpointing, fused AdamW, memory figures."""

import json

import pytest
import torch
from conftest import randomise, small_config

import balora
import model
import train_nlg

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CONFIG = dict(vocab_size=259, d=64, head_dim=16, d_ff=96, max_len=512, eos=257)


def net_on(device, dtype=torch.bfloat16):
    return randomise(model.Transformer(small_config(**CONFIG))).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_base_bit_for_bit_in_bf16(device, compiled, monkeypatch):
    net = net_on(device)
    ids = torch.randint(0, 259, (4, 128), device=device)
    if compiled:
        net.compile_blocks()
        monkeypatch.setattr(balora, "token_terms", torch.compile(balora.token_terms))
    with torch.no_grad():
        base = net(ids)
        balora.attach(net, "balora", r=8)
        assert torch.equal(net(ids), base)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=device == "cuda"
    )
    for _ in range(20):
        H = net.hidden(ids).flatten(0, 1)
        y = ids.roll(-1, 1).flatten()
        total, _ = balora.loss_nlg(H, y, net.head, lambdas=(0, 0.01, 0.01))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    with balora.teacher(net):
        assert torch.equal(net(ids), base)
    with torch.no_grad():
        assert not torch.equal(net(ids), base)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_objective_equals_the_plain_one(device, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    rows = 300 if device == "cpu" else 2500  # more than a chunk
    H_F, H_P, E = (torch.randn(n, 32, generator=rng).to(device) for n in (rows, rows, 500))
    y = torch.randint(0, 500, (rows,), generator=rng).to(device)
    results = []
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(balora, "token_terms", torch.compile(balora.token_terms))
        H = H_F.clone().requires_grad_(True)
        total, terms = balora.loss_nlg(H, y, E, H_P, lambdas=(0.3, 0.2, 0.1), label_smoothing=0.1)
        total.backward()
        results.append((total, H.grad, torch.stack(list(terms.values()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["lora-fa", "lora-ga", "adalora", "dora", "milora", "corda", "corda++"])
def test_every_layer_on_every_device(device, method):
    """Attached, trained, saved to the CPU: step 0 and the teacher are the base bit for bit in bf16, everything that trains is fp32 on the device."""
    net = net_on(device)
    ids = torch.randint(0, 259, (1, 100), device=device)

    def calibrate(i):
        Z = net(ids)
        if Z.requires_grad:
            Z.float().square().mean().backward()

    with torch.no_grad():
        base = net(ids)
    options = dict(rounds=2) if method == "corda++" else {}
    balora.attach(net, method, r=4, calibrate=calibrate, **options)
    with torch.no_grad():
        assert torch.equal(net(ids), base)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.device.type == device for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=device == "cuda")
    for step in range(4):
        net(ids).float().square().mean().backward()
        optimizer.step()
        if method == "adalora":
            balora.allocate(net, step, 4, 4, (1, 1, 1))
        optimizer.zero_grad()
    with balora.teacher(net):
        assert torch.equal(net(ids), base)
    with torch.no_grad():
        tuned = net(ids)
        assert not torch.equal(tuned, base)
        balora.merge(net)
        assert (net(ids).float() - tuned.float()).norm() < 0.05 * tuned.float().norm()


@pytest.mark.parametrize("device", DEVICES)
def test_padded_batches_generate_as_single_rows(device):
    net = net_on(device, torch.float32)
    prompts = [[3], [9, 8, 7, 6, 5, 4], [11, 12] * 20]
    assert net.generate(prompts, 20, eos=[-1]) == [net.generate([p], 20, eos=[-1])[0] for p in prompts]
    drawn = [net.generate(prompts, 20, temperature=1.0, eos=[-1], seed=1) for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["balora", "full"])
def test_training_with_everything_on(device, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net_on("cpu", torch.float32).save("base")
    (tmp_path / "rows.json").write_text(
        json.dumps([{"query": "ab" * (i % 9 + 1), "response": "c" * (i % 7 + 1)} for i in range(40)])
    )
    argv = [
        "--init=base",
        "--data=rows.json",
        "--template=plain",
        "--batch_size=8",
        "--micro_batch=4",
        "--eval_rows=8",
        "--r=4",
        "--learning_rate=1e-2",
        "--max_iters=8",
        "--eval_generate=2",
        "--max_new=8",
        f"--method={method}",
        "--lambda1=0.1",
        "--lambda2=0.01",
        "--lambda3=0.01",
        f"--device={device}",
    ]
    train_nlg.main([*argv, "--out_dir=plain"])
    train_nlg.main([*argv, "--out_dir=all", "--dtype=bfloat16", "--checkpointing", "--compile"])
    plain, everything = ([json.loads(line) for line in open(f"{out}/log.jsonl")] for out in ("plain", "all"))
    for a, b in zip(plain, everything):
        assert a["task"] == pytest.approx(b["task"], rel=0.15) and b["peak_GiB"] > 0
    assert everything[-1]["cr"] > 0 and everything[-1]["task"] < everything[0]["task"]
    if device == "cuda":
        assert model.read_json("plain/config.json")["device"] == torch.cuda.get_device_name()
    train_nlg.main([*argv, "--out_dir=plain", "--max_iters=8", "--resume"])


def test_compiled_training_meets_few_shapes(tmp_path, monkeypatch):
    """--compile must not fall back to eager: batches of five lengths, an evaluation with generation before them, and still a handful of graphs."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = net_on("cpu", torch.float32)
    balora.attach(net, "balora", r=4)
    for layer in net.layers:
        layer.compile(backend=counting)
    net.generate([[1, 2, 3], [4]], max_new=12, eos=[-1])
    assert not graphs
    for length in (40, 56, 33, 71, 90):
        with balora.teacher(net):
            net.hidden(torch.randint(0, 259, (2, length)))
        net.hidden(torch.randint(0, 259, (2, length))).sum().backward()
    assert 2 <= len(graphs) <= 6
    torch._dynamo.reset()
