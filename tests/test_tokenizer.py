"""Token ids equal those of transformers' own class, from both kinds of file."""

import io

import numpy as np
import pytest
import sentencepiece
from transformers import T5Tokenizer

from cityrag_jax.model.tokenizer import Tokenizer, clean_text

CORPUS = [
    "A street in the rain, seen from a car that drives forward.",
    "The camera turns left at the corner & stops; snow falls on parked cars.",
    "Straße über die Brücke, Nebel, Häuser auf beiden Seiten!",
    "日本語の道と車。",
    "1 2 3 4 5 6 7 8 9 0",
] * 8
LENGTH = 32
PROMPTS = {
    "plain": "The camera drives forward in the rain.",
    "empty": "",
    "blank": "  \n\t ",
    "unicode": "Straße ①② ﬁne 日本 🚗 \u200b\u00a0 Brücke",
    "entities": "left &amp;amp; right &lt;b&gt;street&lt;/b&gt; &#39;car&#39;",
    "mojibake": "StraÃŸe Ã¼ber die BrÃ¼cke",
    "spaces": "  a\u3000street \r\n in   the\train  ",
    "too long": "street car rain " * 40,
}


def train_tokenizer(folder, vocab_size=150):
    """Write a small `spiece.model` with UMT5's special ids: pad 0, end 1, unknown 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of file, and transformers' class."""
    root = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(root / "spiece.model")
    theirs = T5Tokenizer.from_pretrained(root / "spiece.model", extra_ids=0)
    theirs.save_pretrained(root / "tokenizer.json")
    assert not (root / "tokenizer.json" / "spiece.model").exists()
    return root, theirs


@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("case", PROMPTS)
def test_ids_and_masks_equal_those_of_transformers(kind, case, folders):
    root, theirs = folders
    ids, mask = Tokenizer(root / kind, length=LENGTH)([PROMPTS[case]])
    expected = theirs(
        [clean_text(PROMPTS[case])],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        add_special_tokens=True,
        return_tensors="np",
    )
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert ids.dtype == mask.dtype == np.int32


def test_every_prompt_ends_and_the_rest_is_padding(folders):
    ids, mask = Tokenizer(folders[0] / "tokenizer.json")(list(PROMPTS.values()))
    assert ids.shape == (len(PROMPTS), 512)
    for row, real in zip(ids, mask, strict=True):
        length = real.sum()
        assert row[length - 1] == 1 and 1 not in row[: length - 1]
        assert not row[length:].any() and not real[length:].any()


def test_an_empty_prompt_is_the_end_alone(folders):
    ids, mask = Tokenizer(folders[0] / "spiece.model")([""])
    assert ids[0, 0] == 1 and mask.sum() == 1


def test_both_kinds_of_file_agree_on_batches(folders):
    prompts = list(PROMPTS.values())
    kinds = "spiece.model", "tokenizer.json"
    a, b = (Tokenizer(folders[0] / kind)(prompts) for kind in kinds)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_special_tokens_of_the_json_are_kept_as_transformers_keeps_them(folders):
    """Two entities deep, a prompt may spell the end: the official tokeniser obeys."""
    root, theirs = folders
    prompt = "a street &lt;/s&gt; in the rain"
    assert "</s>" in clean_text(prompt)
    ids, mask = Tokenizer(root / "tokenizer.json")([prompt])
    assert list(ids[0, : mask.sum()]) == theirs(clean_text(prompt)).input_ids


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n b\t", "a b"),
        ("&amp;lt;p&amp;gt;", "<p>"),
        ("< &amp;amp;amp;", "< &amp;"),  # ftfy itself resolves some where no < is
        ("schÃ¶n â€” schoÌˆn", "schön — schön"),
        ("“quoted”", '"quoted"'),
        ("a&nbsp;&nbsp;b", "a b"),
        ("", ""),
    ],
)
def test_text_is_cleaned_as_the_official_code_cleans_it(text, clean):
    """Entities are resolved exactly twice, broken encodings before, spaces after."""
    assert clean_text(text) == clean


def test_folders_without_a_usable_tokeniser_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither tokenizer.json nor spiece.model"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a readable tokeniser"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="not a readable tokeniser"):
        Tokenizer(tmp_path)


def test_a_tokeniser_without_padding_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="has no token <pad>"):
        Tokenizer(tmp_path)
