"""Prompts to token ids as Wan's text encoder was given them.

Text is cleaned (broken encodings repaired, HTML entities resolved twice, whitespace
collapsed), split by the tokeniser of the checkpoint's folder, ended with the end of
sequence and padded to a fixed length.
Source: Wan-Video/Wan2.1, wan/modules/tokenizers.py.
"""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
from jaxtyping import Int32

TEXT_LENGTH = 512
# In order of preference: where there are both, PyTorch's tools take the first as well.
FILES = ("tokenizer.json", "spiece.model")
END, PAD = "</s>", "<pad>"


def clean_text(text: str) -> str:
    """Repair, unescape and collapse a prompt as the official code does."""
    repaired = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(repaired)).split())


class Tokenizer:
    """Clean prompts and give their ids and masks.

    `folder` holds `tokenizer.json` or `spiece.model`. The two agree but for prompts
    that spell out a special token such as "</s>": the latter reads it as text. Raises
    ValueError if neither file is there or it lacks the end or the padding.
    """

    def __init__(self, folder: str | Path, *, length: int = TEXT_LENGTH):
        folder = Path(folder)
        found = [folder / name for name in FILES if (folder / name).is_file()]
        if not found:
            raise ValueError(
                f"{folder} holds no tokeniser, neither {FILES[0]} nor {FILES[1]}; "
                "fetch the tokeniser's folder of the checkpoint."
            )
        self.length = length
        read = _read_json if found[0].suffix == ".json" else _read_sentencepiece
        self._split, ids = read(found[0])
        lost = [name for name, number in ids.items() if number is None or number < 0]
        if lost:
            raise ValueError(
                f"{found[0]} has no token {' and no token '.join(lost)}; give the "
                "tokeniser of the text encoder's own checkpoint."
            )
        self._end, self._pad = ids[END], ids[PAD]

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "P L"], Int32[np.ndarray, "P L"]]:
        """Give ids and masks; a prompt that is too long loses its last tokens."""
        ids = np.full((len(prompts), self.length), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self._split(clean_text(prompt))[: self.length - 1] + [self._end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


_Split = Callable[[str], list[int]]
_Opened = tuple[_Split, dict[str, int | None]]


def _read_json(file: Path) -> _Opened:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise _unreadable(file, error) from error
    model.no_truncation()
    model.no_padding()

    def split(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return split, {token: model.token_to_id(token) for token in (END, PAD)}


def _read_sentencepiece(file: Path) -> _Opened:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise _unreadable(file, error) from error
    return model.encode, {END: model.eos_id(), PAD: model.pad_id()}


def _unreadable(file, error):
    return ValueError(f"{file} is not a readable tokeniser ({error}); fetch it again.")
