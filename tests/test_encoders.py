"""BERT, RoBERTa, DeBERTa-v3 and T5 against transformers: random configurations it wrote itself, every parameter away from its default."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import wheel_folder

import model

transformers = pytest.importorskip("transformers")


def shake(net, seed=0):
    """Every parameter random: norm weights 1 ± 0.3, biases 0.3, matrices 1.2 / √fan-in (HF's own start hides mistakes)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            is_norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(
                1 + 0.3 * noise
                if is_norm
                else 0.3 * noise
                if p.dim() == 1
                else 1.2 * noise / math.sqrt(p.shape[-1])
            )
    return net.eval()


SMALL = dict(
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    num_labels=3,
)


def theirs(family, **more):
    if family == "bert":
        config = transformers.BertConfig(**{**SMALL, "max_position_embeddings": 160, **more})
        return transformers.BertForSequenceClassification(config)
    if family == "roberta":
        config = transformers.RobertaConfig(
            **{
                **SMALL,
                "max_position_embeddings": 162,
                "type_vocab_size": 1,
                "pad_token_id": 1,
                "layer_norm_eps": 1e-5,
                **more,
            }
        )
        return transformers.RobertaForSequenceClassification(config)
    if family == "deberta":
        config = transformers.DebertaV2Config(
            **{
                **SMALL,
                "max_position_embeddings": 64,
                "position_buckets": 16,
                "relative_attention": True,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False,
                "type_vocab_size": 0,
                "layer_norm_eps": 1e-7,
                "pooler_hidden_size": 48,
                "pooler_hidden_act": "gelu",
                "pad_token_id": 0,
                **more,
            }
        )
        return transformers.DebertaV2ForSequenceClassification(config)
    config = transformers.T5Config(
        **{
            "vocab_size": 120,
            "d_model": 48,
            "num_layers": 3,
            "num_heads": 4,
            "d_kv": 10,
            "d_ff": 80,
            "decoder_start_token_id": 0,
            **more,
        }
    )
    return transformers.T5ForConditionalGeneration(config)


class Words(model.Tokenizer):
    """A vocabulary of w0, w1, ...: these tests are about networks."""

    between = [102]
    eos = 102

    def encode(self, text):
        return [int(word[1:]) for word in text.split()]


@pytest.fixture
def both(monkeypatch, tmp_path):
    """-> (the transformers network, ours read from the folder that it wrote)."""
    monkeypatch.setattr(model, "folder_tokenizer", lambda folder, config: Words())

    def make(family, task="classify", **more):
        net = shake(theirs(family, **more))
        net.save_pretrained(tmp_path)
        ours, _ = model.load(
            str(tmp_path),
            task=task,
            n_classes=3,
            labels=("w10", "w11", "w12") if family == "t5" else (),
        )
        return net, ours.eval()

    return make


def batch(L, rows=3, low=5, high=100, pad=0):
    """ids, mask [rows, L] with right padding of different lengths; ids stay clear of the special ones."""
    ids = torch.randint(low, high, (rows, L), generator=torch.Generator().manual_seed(L))
    mask = torch.arange(L) < torch.tensor([L, max(1, L // 2), max(1, L - 3)])[:rows, None]
    return ids.masked_fill(~mask, pad), mask


@pytest.mark.parametrize(
    "family, lengths",
    [("bert", (20, 160)), ("roberta", (20, 160)), ("deberta", (1, 2, 24, 60, 150)), ("t5", (6, 30, 400))],
)
def test_hidden_states_and_class_logits_equal_transformers(family, lengths, both):
    theirs, ours = both(family)
    for L in lengths:
        ids, mask = batch(L, pad=ours.config.pad)
        with torch.no_grad():
            if family == "t5":
                target = torch.randint(5, 119, (3, 30))
                want = theirs(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
                assert (F.linear(ours.hidden(ids, mask, target=target), ours.head) - want).abs().max() < 1e-4
                first = theirs(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    decoder_input_ids=torch.zeros(3, 1, dtype=torch.long),
                ).logits[:, 0]
                assert (ours(ids, mask) - first[:, ours.label_ids]).abs().max() < 1e-4
                continue
            out = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
            assert ((ours.hidden(ids, mask) - out.hidden_states[-1]) * mask[..., None]).abs().max() < 1e-4
            assert (ours(ids, mask) - out.logits).abs().max() < 2e-5
            alone = ours(ids[1:2, : mask[1].sum()], mask[1:2, : mask[1].sum()])
            assert (alone - out.logits[1]).abs().max() < 2e-5
            assert (ours(ids[:1]) - out.logits[:1]).abs().max() < 2e-5  # no mask where nothing is padded


def test_deberta_buckets_beyond_the_published_limit(both):
    theirs, ours = both("deberta", max_position_embeddings=512, position_buckets=256, num_hidden_layers=1)
    ids, mask = batch(600, rows=2)
    with torch.no_grad():
        assert (ours(ids, mask) - theirs(input_ids=ids, attention_mask=mask.long()).logits).abs().max() < 2e-5


def test_deberta_rows_equal_transformers_table():
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    for buckets, far in ((256, 512), (16, 64)):
        L = 2 * far + 9
        x = torch.zeros(1, L, 4)
        want = build_relative_position(x, x, bucket_size=buckets, max_position=far)[0]
        distance = torch.arange(L)[:, None] - torch.arange(L)
        assert torch.equal(
            model.deberta_row(distance, buckets, far), (want + buckets).clamp(0, 2 * buckets - 1)
        )


def test_t5_buckets_equal_transformers_table():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(700) - torch.arange(700)[:, None]
    for causal in (True, False):
        want = T5Attention._relative_position_bucket(
            distance, bidirectional=not causal, num_buckets=32, max_distance=128
        )
        assert torch.equal(model.t5_bucket(distance, 32, 128, causal), want)


def test_segment_types_follow_the_first_separator(both):
    theirs, ours = both("bert")
    ids, mask = batch(24)
    ids[:, 8] = ids[:, 20] = ours.config.sep
    types = (torch.arange(24) > 8).long().expand(3, -1)
    with torch.no_grad():
        out = theirs(input_ids=ids[:1], attention_mask=mask[:1].long(), token_type_ids=types[:1]).logits
        assert (ours(ids[:1], mask[:1]) - out).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_norm_eps_and_dropout_are_the_files(family, both):
    theirs, ours = both(family, hidden_dropout_prob=0.2)
    want = {"bert": 1e-12, "roberta": 1e-5, "deberta": 1e-7}[family]
    norms = [m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {m.eps for m in norms} == {want} and len(norms) == 7 + (family == "deberta")
    ours.train()
    ids, mask = batch(20, pad=ours.config.pad)
    assert not torch.equal(ours(ids, mask), ours(ids, mask)) and {
        m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout)
    } == {0.0, 0.2}


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "t5"])
def test_bfloat16_is_close_and_gradients_equal(family, both, tmp_path):
    theirs, ours = both(family)
    ids, mask = batch(40, pad=ours.config.pad)
    extra = dict(decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)) if family == "t5" else {}
    pick = (lambda Z: Z[:, 0, ours.label_ids]) if family == "t5" else lambda Z: Z
    y = torch.tensor([0, 2, 1])
    F.cross_entropy(pick(theirs(input_ids=ids, attention_mask=mask.long(), **extra).logits), y).backward()
    F.cross_entropy(ours(ids, mask), y).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        want = grads[ours.checkpoint_name(name)]
        assert (p.grad - want).abs().max() <= 1e-4 * max(1.0, want.abs().max().item()), name
    short, _ = model.load(
        str(tmp_path),
        dtype=torch.bfloat16,
        task="classify",
        n_classes=3,
        labels=("w10", "w11", "w12"),
    )
    with torch.no_grad():
        exact, rough = ours(ids, mask), short.eval()(ids, mask).float()
    assert (rough - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "t5"])
def test_saved_folder_loads_in_transformers(family, both, tmp_path):
    theirs, ours = both(family)
    ours.save(str(tmp_path / "b"))
    again = type(theirs).from_pretrained(tmp_path / "b").eval()
    for (name, p), q in zip(theirs.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name


def test_minilm_real_weights_equal_transformers(minilm):
    net, tok = minilm
    theirs = transformers.BertModel.from_pretrained(wheel_folder("minilm"), dtype=torch.float32).eval()
    rows = [
        tok.pair("A man is playing a guitar.", "Somebody makes music."),
        tok.pair("Paris is the capital of France."),
    ]
    L = max(map(len, rows))
    ids, mask = (
        torch.tensor([r + [0] * (L - len(r)) for r in rows]),
        torch.tensor([[1] * len(r) + [0] * (L - len(r)) for r in rows]),
    )
    types = ((ids == 102).long().cumsum(1) - (ids == 102).long()).clamp(max=1) * mask
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        assert ((net.eval().hidden(ids, mask) - want) * mask[..., None]).abs().max() < 1e-4


def test_published_sizes_equal_transformers_defaults():
    """Parameter counts of ARCHITECTURES 1: 2-label classifiers, T5 whole."""
    count = lambda name, n: sum(p.numel() for p in _skeleton(name, n).parameters())
    assert count("deberta-v3-base", 2) == 184_423_682 and count("t5-base", 0) == 222_903_552


def _skeleton(name, n):
    with torch.device("meta"):
        return model.Transformer(model.config_of(name), n)


@pytest.mark.parametrize(
    "key", ["relative_attention", "share_att_key", "norm_rel_ebd", "position_biased_input", "pos_att_type"]
)
def test_a_missing_switch_means_what_transformers_takes_it_for(key):
    """A config.json without it is another network there, so it is refused here."""
    record = dict(model.PUBLISHED["deberta-v3-base"])
    assert model.config_from(record).position == "disentangled"
    del record[key]
    assert getattr(transformers.DebertaV2Config(), key, model.WITHOUT[key]) == model.WITHOUT[key]
    with pytest.raises(ValueError, match=f"{key}=None is not deberta-v2 as published"):
        model.config_from(record)


def test_published_sizes_make_the_network_of_transformers(tmp_path):
    """What is saved of them is read there without a missing or an unexpected tensor."""
    for name in ("tiny-encoder", "deberta-v3-base"):
        small = dict(
            vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        config = model.config_from(model.PUBLISHED[name] | small)
        model.Transformer(config, n_classes=2).save(tmp_path / name)
        read = transformers.DebertaV2ForSequenceClassification.from_pretrained
        assert not any(read(tmp_path / name, output_loading_info=True)[1].values())


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(position_biased_input=True), "position_biased_input"),
        (dict(pos_att_type=["c2p"]), "pos_att_type"),
        (dict(hidden_act="relu"), "hidden_act"),
    ],
)
def test_unknown_switches_are_named(change, word, both, tmp_path):
    both("deberta")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=word):
        model.load(str(tmp_path))


def test_new_head_is_seeded_and_named(both, tmp_path, capsys):
    net = shake(transformers.DebertaV2Model(theirs("deberta").config))
    net.save_pretrained(tmp_path)
    a, _ = model.load(str(tmp_path), task="classify", n_classes=3, seed=1)
    assert "new: classifier.dense.weight" in capsys.readouterr().out
    b, _ = model.load(str(tmp_path), task="classify", n_classes=3, seed=1)
    c, _ = model.load(str(tmp_path), task="classify", n_classes=3, seed=2)
    assert torch.equal(a.classifier.out.weight, b.classifier.out.weight) and not torch.equal(
        a.classifier.out.weight, c.classifier.out.weight
    )
    with pytest.raises(ValueError, match="at least one class"):
        model.load(str(tmp_path), task="classify")


def test_t5_labels_must_differ_in_their_first_token(both, tmp_path):
    both("t5")
    with pytest.raises(ValueError, match="first token"):
        model.load(str(tmp_path), task="classify", labels=("w10", "w10"))


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_a_new_head_is_written_into_the_config(family, both, tmp_path):
    """Saved as a classifier of as many classes, with the record that was read and the labels of a known head."""
    net, ours = both(family, id2label={0: "no", 1: "perhaps", 2: "yes"})
    ours.save(tmp_path / "same")
    record = json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "same/config.json").read_text()) == record

    net = getattr(net, net.base_model_prefix)
    net.save_pretrained(tmp_path / "base")
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    for n in (1, 2, 3):
        head, _ = model.load(str(tmp_path / "base"), task="classify", n_classes=n, dtype=torch.bfloat16)
        head.save(tmp_path / str(n))
        saved = read(tmp_path / str(n), dtype=torch.float32)  # our head is fp32
        assert saved.config.num_labels == n
        names = ["no", "perhaps", "yes"] if n == 3 else ["LABEL_0", "LABEL_1"][:n]
        assert list(saved.config.id2label.values()) == names
        ids, mask = batch(20, pad=head.config.pad)
        with torch.no_grad():
            want = saved(input_ids=ids, attention_mask=mask.long()).logits
            assert (head.float().eval()(ids, mask) - want).abs().max() < 2e-5
    record = json.loads((tmp_path / "base/config.json").read_text())
    del record["id2label"], record["label2id"]  # as in a base model's own file
    (tmp_path / "base/config.json").write_text(json.dumps(record))
    three, _ = model.load(str(tmp_path / "base"), task="classify", n_classes=3)
    three.save(tmp_path / "named")
    assert read(tmp_path / "named").config.id2label == {i: f"LABEL_{i}" for i in range(3)}
    body, _ = model.load(str(tmp_path / "base"))
    body.save(tmp_path / "body")
    assert transformers.AutoModel.from_pretrained(tmp_path / "body").config.architectures == [
        type(net).__name__
    ]


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "t5"])
def test_dropout_can_be_replaced_while_loading(family, both, tmp_path):
    both(family)
    labels = ("w10", "w11", "w12")
    net, _ = model.load(
        str(tmp_path), task="classify", n_classes=3, labels=labels, dropout=0.3, head_dropout=0.4
    )
    p = {name: m.p for name, m in net.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert p.pop("classifier.drop", 0.4) == 0.4
    assert p.pop("classifier.drop_first", 0.4) == (0.0 if family in ("bert", "deberta") else 0.4)
    assert {x for name, x in p.items() if not name.endswith("mlp.drop")} == {0.3}
    assert {x for name, x in p.items() if name.endswith("mlp.drop")} == {0.3 if family == "t5" else 0.0}
    assert {m.dropout for m in net.modules() if isinstance(m, model.Attention)} == {0.3}
