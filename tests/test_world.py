"""The small written world of `tiny`: its stories, its rows, its pre-trained encoder. `python -m pytest tests/test_world.py`"""

import os
import random
import re

import pytest
import torch

import model
import train_nlu as t

FACTS = {
    (animal, habit): does
    for habits, animals in t.FAMILIES.values()
    for animal in animals.split()
    for habit, does in zip(t.HABITS, habits)
}


def label_of(animal, habit, value):
    """What the constants say, without `habit_of`."""
    does = FACTS[animal, habit]
    return 1 if does is None else 0 if does == value else 2


def facts(story):
    """-> (animal, habit, value) of each fact that a story states."""
    text = " ".join(part for part in story if part)
    (animal,) = (w for w in text.split() if w in t.FAMILY)
    return [(animal, *fact) for fact in re.findall(rf"({'|'.join(t.HABITS)}) (\w+)", text)]


def parts(row):
    (animal,) = (w for w in row[0].split() if w in t.FAMILY)
    habit, value = re.search(rf"({'|'.join(t.HABITS)}) (\w+) \.$", row[1]).groups()
    return animal, habit, value


def test_constants_of_the_world():
    assert len({habits for habits, _ in t.FAMILIES.values()}) == len(t.FAMILIES)  # families can be told apart
    assert len(t.FAMILY) == 12 * len(t.FAMILIES) and len(set(t.VALUES)) == len(t.VALUES) == 9
    assert all(
        habits.count(t.ANY) == 1 and len(animals.split()) == 12 for habits, animals in t.FAMILIES.values()
    )  # so classes are alike likely
    assert all(does is t.ANY or does in t.HABITS[habit] for (_, habit), does in FACTS.items())
    assert model.PUBLISHED["tiny-encoder"].vocab_size == len(t.WORDS) + len(model.WordPiece.control)


def test_every_word_is_one_token_that_pretraining_can_meet():
    tok, met = model.WordPiece([*model.WordPiece.control, *t.WORDS]), set()
    for i in range(3000):
        for text in filter(None, t.world_text(random.Random(i), 0.2)):
            ids = tok.encode(text)
            assert len(ids) == len(text.split()) and tok.vocab["[UNK]"] not in ids
            met |= set(ids)
    rows = t.world_rows(0, 300, 300)
    asked = {i for row in rows["train"] + rows["dev"] for text in row[:2] for i in tok.encode(text)}
    assert asked <= met == {tok.vocab[word] for word in t.WORDS}


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
            sum(t.FAMILY[a] == f for a in train) == 9 and sum(t.FAMILY[a] == f for a in dev) == 3
            for f in t.FAMILIES
        )


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="30000 rows of 54 animals"):
        t.world_rows(0, 30000, 30)


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
        if habit == "eats" and t.FAMILY[animal] == "rodent"
    ]
    assert len(told) > 300 and all(abs(told.count(v) / len(told) - 1 / 3) < 0.1 for v in t.HABITS["eats"])


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    n = model.PUBLISHED["tiny-encoder"].vocab_size
    monkeypatch.setitem(
        model.PUBLISHED,
        "tiny-encoder",
        model.encoder_config("deberta", n, 32, 1, 2, 64, max_len=64, norm_eps=1e-7, dropout=0.0, buckets=16),
    )


def loss(net, tok):
    """Of the values, masked, in a hundred stories."""
    ids, valid = t.stack([tok.pair(*t.world_text(random.Random(i))) for i in range(100)], tok.pad)
    values = torch.isin(ids, torch.tensor([tok.vocab[word] for word in t.VALUES]))
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(
            net(ids.masked_fill(values, tok.mask), valid)[values], ids[values]
        ).item()


def test_pretraining_lowers_the_loss_and_is_kept(small_world):
    short, longer = (model.load(t.pretrain_world(0, 0.2, iters, "cpu")) for iters in (1, 150))
    assert loss(*longer) < 0.6 * loss(*short)
    folder = t.pretrain_world(0, 0.2, 150, "cpu")
    stamp = os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns
    assert (
        t.pretrain_world(0, 0.2, 150, "cpu") == folder
        and os.stat(os.path.join(folder, "model.safetensors")).st_mtime_ns == stamp
    )
    assert (
        len(
            {
                folder,
                t.pretrain_world(1, 0.2, 1, "cpu"),
                t.pretrain_world(0, 0.4, 1, "cpu"),
                t.pretrain_world(0, 0.2, 1, "cpu"),
            }
        )
        == 4
    )
    assert not [name for name in os.listdir("out") if name.endswith(".tmp")]


def test_pretraining_is_deterministic(small_world):
    first = t.pretrain_world(0, 0.2, 5, "cpu")
    os.rename(first, "elsewhere")
    a, b = (
        model.load(folder)[0].state_dict() for folder in ("elsewhere", t.pretrain_world(0, 0.2, 5, "cpu"))
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_folder_loads_back_as_a_classifier_with_the_same_encoder(small_world, monkeypatch):
    nets = []
    monkeypatch.setattr(
        model,
        "init_weights",
        lambda net, seed, std, init=model.init_weights: (init(net, seed, std), nets.append(net)),
    )
    folder = t.pretrain_world(0, 0.0, 5, "cpu")
    net, tok = model.load(folder, task="classify", n_classes=3, seed=1)
    assert tok.kind == "wordpiece" and list(tok.vocab) == [*model.WordPiece.control, *t.WORDS]
    ids, valid = t.stack([tok.pair(*row[:2]) for row in t.world_rows(0, 12, 12)["dev"]], tok.pad)
    with torch.no_grad():
        assert torch.equal(net.eval().hidden(ids, valid), nets[0].eval().hidden(ids, valid))
    again = model.load(folder, task="classify", n_classes=3, seed=1)[0].eval()
    assert net(ids, valid).shape == (12, 3) and torch.equal(net(ids, valid), again(ids, valid))


def test_a_run_that_comes_second_leaves_the_first_ones_folder(small_world, monkeypatch):
    folder = t.pretrain_world(0, 0.0, 2, "cpu")
    seen = iter([False, True])
    monkeypatch.setattr(
        t.os.path,
        "isdir",
        lambda path, isdir=os.path.isdir: next(seen, True) if path == folder else isdir(path),
    )
    before = os.stat(folder).st_mtime_ns
    assert t.pretrain_world(0, 0.0, 2, "cpu") == folder and os.stat(folder).st_mtime_ns == before
    assert sorted(os.listdir("out")) == [os.path.basename(folder)]


def test_stack_pads_on_the_right():
    ids, valid = t.stack([[5, 0, 7], [6]], 9)
    assert ids.tolist() == [[5, 0, 7], [6, 9, 9]] and valid.tolist() == [[True] * 3, [True, False, False]]
