"""Tokenizers against the references: tokenizers objects built from the same vocabulary, transformers' LLaMA tokenizer."""
import json
import random

import pytest
from conftest import TEXTS, small_config

import model

tokenizers = pytest.importorskip("tokenizers")


def varied(n=3000):
    """The fixed texts and n random strings over scripts, digits, spaces and code."""
    rng = random.Random(0)
    pool = list("abcXYZ  \n\t0123456789.,;:()[]{}<>=+-*/'\"#_ éüñß你好世界안녕こんにちは") + ["👍", "👩‍🚀", "  ", "\n\n", "1234", " the", "def ", "don't"]
    return TEXTS + ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 40))) for _ in range(n)]


def reference(vocab, merges, digits):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), level]) if digits else level
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
        if "<|" not in text:                                       # the saved file marks control tokens, which tokenizers parses
            assert theirs.encode(text).ids == tok.encode(text), repr(text)
        assert again.encode(text) == tok.encode(text)
    assert again.special == tok.special


def test_smollm2_from_vocab_and_merges(smollm2, tmp_path):
    _, tok = smollm2
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text(json.dumps(tok.vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, tok.merges)) + "\n", encoding="utf-8")
    again = model.folder_tokenizer(str(tmp_path), small_config(eos=2))
    assert again.split == model.DIGIT_SPLIT                        # seen from the merges: none joins two digits
    assert all(again.encode(t) == tok.encode(t) for t in varied(300))


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json", "split"])
def test_gpt2_ids_equal_the_reference(shared, tmp_path, form):
    vocab = json.loads((shared / "tokenizers/gpt2/encoder.json").read_text())
    merges_text = (shared / "tokenizers/gpt2/vocab.bpe").read_text(encoding="utf-8")
    merges = [tuple(line.split(" ")) for line in merges_text.splitlines() if line and not line.startswith("#version")]
    ref = reference(vocab, merges, digits=False)
    (tmp_path / "config.json").write_text("{}")
    if form == "vocab.json":
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text(merges_text, encoding="utf-8")
    else:
        if form == "split":                                        # LLaMA-3's way: a pattern in the file
            pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ref.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                                                                    tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        ref.save(str(tmp_path / "tokenizer.json"))
    ours = model.folder_tokenizer(str(tmp_path), small_config())
    for text in varied():
        assert ours.encode(text) == ref.encode(text).ids, repr(text)


def test_llama2_ids_equal_the_reference(shared):
    path = shared / "tokenizers/llama2/tokenizer.model"
    tok = model.SentencePiece(str(path))
    assert tok.encode("Hello this is a test") == [15043, 445, 338, 263, 1243] and tok.bos == [1] and tok.eos == 2
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
    merges = sorted(((a, b) for piece in vocab if len(piece) > 1 for i in range(1, len(piece)) if (a := piece[:i]) in vocab and (b := piece[i:]) in vocab
                     and not piece.startswith("<0x")), key=lambda m: (-score[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    tok.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
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
    for record, word in (({"model": {"type": "Unigram"}}, "Unigram"), ({"model": {"type": "BPE", "byte_fallback": True}}, "byte_fallback"),
                         ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}}, "Metaspace")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=word):
            model.folder_tokenizer(str(tmp_path), small_config())
