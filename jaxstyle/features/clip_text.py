"""Words for CLIP: its tokenizer, text embeddings, and files of those.

The tokenizer is `transformers`', from the files of a Hugging Face folder
(tokenizer.json, or vocab.json and merges.txt) or from OpenAI's list of byte pairs,
`bpe_simple_vocab_16e6.txt.gz`. The part of that list that CLIP uses ships with us, and
all published CLIP models share it: most need no file at all.
"""

import dataclasses
import gzip
import html
import importlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxstyle.errors import UserError, one_line
from jaxstyle.features.clip import CLIP, END
from jaxstyle.pipeline import write_codes
from jaxstyle.weights import ASSETS, digest

VOCABULARY = ASSETS / "clip_vocabulary" / "bpe_merges.txt.gz"
# Byte pairs of CLIP's vocabulary: of the 262,145 lines of OpenAI's file, those after
# the first up to here.
PAIRS = 49152 - 256 - 2
START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
# The whole list has 3 MB.
_LARGEST_LIST = 1 << 24

# What ftfy, which OpenAI's tokenizer sends its text through, makes plain: quotes and
# ligatures, and letters that are wide or narrow for the sake of Chinese print.
_PLAIN = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | {
        c: unicodedata.normalize("NFKC", c)
        for c in [
            *"\u0132\u0133\u0149\u01f1\u01f2\u01f3\u01c4\u01c5\u01c6\u01c7\u01c8\u01c9"
            "\u01ca\u01cb\u01cc\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06\u3000",
            *map(chr, range(0xFF01, 0xFFF0)),
        ]
        if unicodedata.name(c, "")
    }
)


def clean(text: str) -> str:
    """Text as OpenAI's tokenizer cleans it before it looks for words.

    HTML's entities become characters, curly quotes straight ones, control characters
    go, white space becomes single blanks. Wrongly decoded text is not mended.
    """
    text = html.unescape(html.unescape(text)).translate(_PLAIN)
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc")
    return " ".join(unicodedata.normalize("NFC", text).split())


def load_tokenizer(source: str | os.PathLike = VOCABULARY) -> Any:
    """A tokenizer from files.

    Args:
      source: a folder with tokenizer.json, or vocab.json and merges.txt; or a list of
        byte pairs, gzipped or not.

    Returns:
      A `transformers.CLIPTokenizer`.

    Raises:
      UserError: no such files, or damaged ones.
    """
    path = Path(source)
    try:
        if not path.is_dir():
            vocabulary, pairs = _byte_pairs(path)
            return transformers().CLIPTokenizer(vocab=vocabulary, merges=pairs)
        if not has_tokenizer(path):
            raise UserError(
                "that folder has neither tokenizer.json nor vocab.json and merges.txt"
            )
        return transformers().CLIPTokenizer.from_pretrained(
            str(path), local_files_only=True
        )
    except OSError as e:
        if isinstance(e, FileNotFoundError | PermissionError) and not path.is_dir():
            raise
        raise UserError(f"vocabulary {path}: it cannot be read: {e}") from None
    except Exception as e:  # The tokenizers library raises plain ones.
        raise UserError(f"vocabulary {path}: {one_line(e, 300)}") from None


def transformers() -> Any:
    """The package, imported without its line that there is no torch."""
    name = "TRANSFORMERS_VERBOSITY"
    before = os.environ.get(name)
    os.environ.setdefault(name, "error")
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[name]


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a tokenizer's files."""
    names = set(os.listdir(folder))
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def _byte_pairs(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of OpenAI's list."""
    with open(path, "rb") as file:
        start = file.read(2)
    with gzip.open(path) if start == b"\x1f\x8b" else open(path, "rb") as file:
        data = file.read(_LARGEST_LIST + 1)
    if len(data) > _LARGEST_LIST:
        raise UserError(f"it unpacks to more than {_LARGEST_LIST} bytes")
    lines = data.decode().split("\n")[1 : PAIRS + 1]
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) < PAIRS or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"it does not hold {PAIRS} pairs after its first line, as OpenAI's "
            "bpe_simple_vocab_16e6.txt.gz does"
        )
    # Bytes that print stand for themselves, the others for characters from 256 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printing)
    letters = [chr(b) for b in [*printing, *range(256, 256 + others)]]
    words = letters + [f"{c}</w>" for c in letters] + ["".join(p) for p in pairs]
    vocabulary = {w: i for i, w in enumerate([*words, START_TEXT, END_TEXT])}
    if len(vocabulary) != END + 1:
        raise UserError("a pair occurs twice in it")
    return vocabulary, pairs


def tokenize(tokenizer: Any, texts: Sequence[str], module: CLIP) -> np.ndarray:
    """Tokens of sentences, int32 [len(texts), length] for `CLIP.encode_text`.

    Sentences shorter than the longest are filled with zeros after their end token. For
    a table that knows a part of the vocabulary the numbers are those of its rows.

    Args:
      tokenizer: of `load_tokenizer`.
      texts: sentences.
      module: whose context and vocabulary they must fit.

    Raises:
      UserError: no sentence, one that is too long, or a word that the model does not
        know.
    """
    if not texts:
        raise UserError("there is no text to encode")
    rows = [tokenizer(clean(text))["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > module.context_length:
            raise UserError(
                f"text {text!r:.60} has {len(row)} tokens; this CLIP reads at most "
                f"{module.context_length}: shorten it"
            )
    if module.token_ids:
        known = {token: i for i, token in enumerate(module.token_ids)}
        for text, row in zip(texts, rows, strict=True):
            if unknown := [t for t in row if t not in known]:
                raise UserError(
                    f"text {text!r:.60}: this CLIP has not learned the word "
                    f"{tokenizer.decode(unknown[:1]).strip()!r:.40}; use words of "
                    f"{_words(tokenizer, module)}, or another CLIP"
                )
        rows = [[known[t] for t in row] for row in rows]
    elif (largest := max(map(max, rows))) >= module.vocab_size:
        raise UserError(
            f"token {largest} is beyond this CLIP's {module.vocab_size}: its "
            "vocabulary is another one; give it as --vocabulary"
        )
    length = max(map(len, rows))
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def _words(tokenizer: Any, module: CLIP) -> str:
    """What a part of the vocabulary holds, shortened."""
    words = sorted(tokenizer.decode([t]).strip() for t in module.token_ids[:-2])
    return ", ".join(words[:60]) + (" ..." if len(words) > 60 else "")


@partial(jax.jit, static_argnums=0)
def _encode(module: CLIP, params: Any, tokens: Array) -> Array:
    return module.apply({"params": params}, tokens, method="encode_text")


_tokenizer = lru_cache(maxsize=4)(load_tokenizer)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A CLIP model that is ready to look at pictures and, with words, at text.

    Attributes:
      name: what the user called it.
      module: the towers.
      params: theirs; `text` may be missing.
      vocabulary: where its tokenizer's files are.
      texts: embeddings known beforehand, by text: [embed_dim], not normalised.
      templates: sentences of the kind it learned from, with {} for what a class names;
        () for the published models.
    """

    name: str
    module: CLIP
    params: Mapping[str, Any]
    vocabulary: str | os.PathLike = VOCABULARY
    texts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = ()

    def encode_texts(self, texts: Sequence[str], batch: int = 32) -> Array:
        """Vectors [len(texts), embed_dim] of sentences, not normalised.

        Sentences known beforehand need neither tokenizer nor text tower.

        Raises:
          UserError: see `tokenize`; or there is no text tower for the others.
        """
        wanted = [text for text in dict.fromkeys(texts) if text not in self.texts]
        found = dict(self.texts)
        if wanted and "text" not in self.params:
            raise UserError(
                f"{self.name} has no text tower, and its file of text embeddings lacks "
                f"{wanted[0]!r:.60} ({len(wanted)} of {len(set(texts))} texts); write "
                "them with python -m train.nada_text"
            )
        if wanted:
            tokens = tokenize(_tokenizer(self.vocabulary), wanted, self.module)
            # Full batches, the last one filled up: one compilation.
            batch = min(batch, len(tokens))
            filled = np.pad(tokens, ((0, -len(tokens) % batch), (0, 0)), mode="edge")
            text = {"text": self.params["text"]}
            parts = [
                np.asarray(_encode(self.module, text, filled[i : i + batch]))
                for i in range(0, len(filled), batch)
            ]
            found |= dict(zip(wanted, np.concatenate(parts), strict=False))
        return jax.numpy.asarray(np.stack([found[text] for text in texts]))


def save_texts(path: str | os.PathLike, judge: Judge, texts: Sequence[str]) -> None:
    """Write embeddings of sentences: `texts` and `embeddings` [n, embed_dim] float32.

    Replaced whole or not at all. `model` names the CLIP they are of.
    """
    texts = list(dict.fromkeys(texts))
    arrays = {
        "texts": texts,
        "embeddings": np.asarray(judge.encode_texts(texts), np.float32),
        "model": fingerprint(judge.params),
    }
    write_codes(path, **arrays)


def load_texts(path: str | os.PathLike, judge: Judge) -> dict[str, np.ndarray]:
    """Embeddings by text from a file of `save_texts`.

    Raises:
      UserError: another file, or embeddings of another model.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            texts, embeddings, model = (
                data[name] for name in ("texts", "embeddings", "model")
            )
    except FileNotFoundError:
        raise
    except Exception as e:  # zipfile and numpy raise whatever they meet.
        raise UserError(
            f"{os.fspath(path)} is no file of text embeddings as python -m "
            f"train.nada_text writes it: {one_line(e, 200)}"
        ) from None
    width = judge.module.embed_dim
    if (
        texts.dtype.kind != "U"
        or embeddings.dtype != np.float32
        or embeddings.shape != (*texts.shape, width)
        or texts.ndim != 1
        or not np.isfinite(embeddings).all()
    ):
        raise UserError(
            f"{os.fspath(path)} holds texts {texts.dtype} {list(texts.shape)} and "
            f"embeddings {embeddings.dtype} {list(embeddings.shape)}; they must be "
            f"text [n] and finite float32 [n, {width}]"
        )
    if str(model) != fingerprint(judge.params):
        raise UserError(
            f"{os.fspath(path)} was written with another CLIP than {judge.name}"
        )
    return dict(zip(texts.tolist(), embeddings, strict=True))


def fingerprint(params: Mapping[str, Any]) -> str:
    """Digits that tell CLIP models apart by their vision towers."""
    return digest(params["vision"]["projection"])
