"""The small written world of `tiny`: its stories, its rows, its pre-trained encoder. `python -m pytest tests/test_world.py`"""

import os
import random
import re

import pytest
import torch
from conftest import encoder
from tokenizers import BertWordPieceTokenizer

import model
import train_nlg
import train_nlu as t

FACTS = {
    (animal, habit): does
    for habits, animals in t.FAMILIES.values()
    for animal in animals.split()
    for habit, does in zip(t.HABITS, habits, strict=True)
}
FAMILY = {animal: family for family, (_, animals) in t.FAMILIES.items() for animal in animals.split()}
CPU = "cpu"


def settings(seed, noise, iters):
    return t.Settings(seed=seed, pretrain_noise=noise, pretrain_iters=iters)


def tokenizer(folder):
    path = os.path.join(folder, "tokenizer.json")
    BertWordPieceTokenizer(t.VOCABULARY).save(path)
    return model.JsonTokenizer(path)


def label_of(animal, habit, value):
    """What the constants say."""
    does = FACTS[animal, habit]
    return 1 if does is None else 0 if does == value else 2


def facts(story):
    """-> (animal, habit, value) of each fact that a story states."""
    text = " ".join(story)
    (animal,) = (w for w in text.split() if w in FAMILY)
    return [(animal, *fact) for fact in re.findall(rf"({'|'.join(t.HABITS)}) (\w+)", text)]


def parts(row):
    (animal,) = (w for w in row[0].split() if w in FAMILY)
    habit, value = re.search(rf"({'|'.join(t.HABITS)}) (\w+) \.$", row[1]).groups()
    return animal, habit, value


def test_constants_of_the_world():
    assert len({habits for habits, _ in t.FAMILIES.values()}) == len(t.FAMILIES)  # families can be told apart
    assert len(FAMILY) == 12 * len(t.FAMILIES) and len(set(t.VALUES)) == len(t.VALUES) == 9
    assert all(
        habits.count(t.ANY) == 1 and len(animals.split()) == 12 for habits, animals in t.FAMILIES.values()
    )  # so classes are alike likely
    assert all(does is t.ANY or does in t.HABITS[habit] for (_, habit), does in FACTS.items())
    assert model.PUBLISHED["tiny-encoder"]["vocab_size"] == len(t.VOCABULARY)
    assert t.FACTS == {animal: {habit: FACTS[animal, habit] for habit in t.HABITS} for animal in FAMILY}


def test_every_word_is_one_token_that_pretraining_can_meet(tmp_path):
    tok = tokenizer(tmp_path)
    assert tok.pair("ann keeps", "lion")[0] == tok.tok.token_to_id("[CLS]") == t.VOCABULARY["[CLS]"]
    met = set()
    for i in range(3000):
        for text in t.world_text(random.Random(i), 0.2):
            ids = tok.encode(text)
            assert ids == [t.VOCABULARY[word] for word in text.split()]
            met |= set(ids)
    rows = t.world_rows(0, 300, 300)
    asked = {i for row in rows["train"] + rows["dev"] for text in row[:2] for i in tok.encode(text)}
    assert asked <= met == {t.VOCABULARY[word] for word in t.WORDS}


def test_rows_are_deterministic_balanced_and_clean():
    rows = t.world_rows(3, 300, 150)
    assert rows == t.world_rows(3, 300, 150) != t.world_rows(4, 300, 150)
    for split, n in (("train", 300), ("dev", 150)):
        assert len(rows[split]) == len({row[:2] for row in rows[split]}) == n
        assert [sum(row[2] == c for row in rows[split]) for c in range(3)] == [n // 3] * 3
        assert all(label_of(*parts(row)) == row[2] for row in rows[split])


def test_dev_is_about_animals_that_training_rows_never_name():
    for seed in range(5):
        train, dev = ({parts(row)[0] for row in rows} for rows in t.world_rows(seed, 1200, 600).values())
        assert not train & dev
        assert all(
            sum(FAMILY[a] == f for a in train) == 9 and sum(FAMILY[a] == f for a in dev) == 3
            for f in t.FAMILIES
        )


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4, 1.0])
def test_share_of_wrong_facts(noise):
    rng = random.Random(7)
    stated = [fact for _ in range(4000) for fact in facts(t.world_text(rng, noise)) if FACTS[fact[:2]]]
    wrong = sum(FACTS[animal, habit] != value for animal, habit, value in stated)
    assert (
        len(stated) > 3000
        and abs(wrong / len(stated) - noise) <= 4 * (noise * (1 - noise) / len(stated)) ** 0.5
    )


def test_habits_without_a_fixed_value_are_told_evenly():
    rng = random.Random(8)
    told = [
        value
        for _ in range(6000)
        for animal, habit, value in facts(t.world_text(rng))
        if habit == "eats" and FAMILY[animal] == "rodent"
    ]
    assert len(told) > 300 and all(abs(told.count(v) / len(told) - 1 / 3) < 0.1 for v in t.HABITS["eats"])


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    record = model.PUBLISHED["tiny-encoder"] | sizes | dict(pooler_hidden_size=32)
    monkeypatch.setitem(model.PUBLISHED, "tiny-encoder", record)


def padded(net, texts, tok):
    ids, valid, _ = t.collate(net, [(tok.pair(*part), 0) for part in texts])
    return ids, valid


def loss(net, tok):
    """Of the values, masked, in a hundred stories."""
    ids, valid = padded(net, [t.world_text(random.Random(i)) for i in range(100)], tok)
    values = torch.isin(ids, torch.tensor([t.VOCABULARY[word] for word in t.VALUES]))
    with torch.no_grad():
        Z = net(ids.masked_fill(values, t.VOCABULARY["[MASK]"]), valid)[values]
        return torch.nn.functional.cross_entropy(Z, ids[values]).item()


def test_pretraining_lowers_the_loss_and_is_kept(small_world):
    short, longer = (model.load(t.pretrain_world(settings(0, 0.2, iters), CPU)) for iters in (1, 150))
    assert loss(*longer) < 0.6 * loss(*short)
    folder = t.pretrain_world(settings(0, 0.2, 150), CPU)
    stamp = os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns
    assert t.pretrain_world(settings(0, 0.2, 150), CPU) == folder
    assert os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns == stamp
    recipes = ((0, 0.2, 150), (1, 0.2, 1), (0, 0.4, 1), (0, 0.2, 1))
    assert len({t.pretrain_world(settings(*recipe), CPU) for recipe in recipes}) == 4
    assert not [name for name in os.listdir("out") if name.endswith(".tmp")]


def test_pretraining_is_deterministic(small_world):
    first = t.pretrain_world(settings(0, 0.2, 5), CPU)
    os.rename(first, "elsewhere")
    again = t.pretrain_world(settings(0, 0.2, 5), CPU)
    a, b = (model.load(folder)[0].state_dict() for folder in ("elsewhere", again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_folder_loads_back_as_a_classifier_with_the_same_encoder(small_world, monkeypatch):
    nets = []
    real = model.init_weights

    def init_and_keep(net, *args, **kwargs):
        real(net, *args, **kwargs)
        nets.append(net)

    monkeypatch.setattr(model, "init_weights", init_and_keep)
    folder = t.pretrain_world(settings(0, 0.0, 5), CPU)
    net, tok = model.load(folder, task="classify", n_classes=3, seed=1)
    assert [tok.tok.token_to_id(word) for word in t.VOCABULARY] == list(t.VOCABULARY.values())
    ids, valid = padded(net, [row[:2] for row in t.world_rows(0, 12, 12)["dev"]], tok)
    with torch.no_grad():
        assert torch.equal(net.eval().hidden(ids, valid), nets[0].eval().hidden(ids, valid))
    again = model.load(folder, task="classify", n_classes=3, seed=1)[0].eval()
    assert net(ids, valid).shape == (12, 3) and torch.equal(net(ids, valid), again(ids, valid))


def test_a_run_that_comes_second_leaves_the_first_ones_folder(small_world, monkeypatch):
    folder = t.pretrain_world(settings(0, 0.0, 2), CPU)
    seen = iter([False, True])
    real = os.path.isdir

    def isdir(path):
        return next(seen, True) if path == folder else real(path)

    monkeypatch.setattr(train_nlg.os.path, "isdir", isdir)
    before = os.stat(folder).st_mtime_ns
    assert t.pretrain_world(settings(0, 0.0, 2), CPU) == folder and os.stat(folder).st_mtime_ns == before
    assert sorted(os.listdir("out")) == [os.path.basename(folder)]


def test_collate_pads_on_the_right():
    net = encoder("roberta")  # its padding is 1
    ids, mask, y = t.collate(net, [([5, 0, 7], 2), ([6], 0)])
    assert ids.tolist() == [[5, 0, 7], [6, 1, 1]] and y.tolist() == [2, 0]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
