"""The sentences of StyleGAN-NADA, and a file of their CLIP embeddings.

A class such as `photo` or `sketch` is put into 79 templates (those that OpenAI
published for ImageNet, but one) whose embeddings are averaged, and for the patch loss
into 15 names of parts before that.

    python -m train.nada_text texts.npz --clip ViT-B/32 --source photo --target sketch

writes what a run of `train.nada` with that source and target needs, for hosts without
a text tower or a tokenizer: `train.nada --text-embeddings texts.npz`. One file a CLIP
model.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated

import tyro

from convert.clip import load_clip
from jaxstyle.errors import UserError, cli
from jaxstyle.features.clip_text import Judge, save_texts
from jaxstyle.options import parse

TEMPLATES = tuple(
    """
a bad photo of a {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}.
""".strip().split("\n")
)
PARTS = tuple(
    """
the paw of a {}.
the nose of a {}.
the eye of the {}.
the ears of a {}.
an eye of a {}.
the tongue of a {}.
the fur of the {}.
colorful {} fur.
a snout of a {}.
the teeth of the {}.
the {}s fangs.
a claw of the {}.
the face of the {}
a neck of a {}
the head of the {}
""".strip().split("\n")
)


def templates_of(judge: Judge, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Those given, else those of the model's own captions, else the published ones.

    Raises:
      UserError: one of them has no {}.
    """
    templates = tuple(given) or judge.templates or TEMPLATES
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"--templates has {template!r:.60}, where no {{}} stands for the class"
            )
    return templates


def filled(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """A class in each template."""
    return [template.replace("{}", name) for template in templates]


def needed(
    source: str,
    target: str,
    parts: bool = False,
    templates: Sequence[str] = TEMPLATES,
) -> list[str]:
    """All sentences that a run may need.

    Args:
      source, target: classes, put into the templates as they are.
      parts: those of the patch losses too, 15 times as many.
      templates: with {} for the class.
    """
    texts = [*filled(source, templates), *filled(target, templates)]
    texts += [target, f"a {target}"]
    if parts:
        for name in (source, target):
            named = filled(name, PARTS)
            texts += named
            texts += [text for part in named for text in filled(part, templates)]
    return list(dict.fromkeys(texts))


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.nada_text."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .npz file to write."""
    clip: str
    """CLIP model: a file or folder, a name (ViT-B/32), a hub id in the local cache."""
    source: str = ""
    """Class that the generator draws now, e.g. photo."""
    target: tuple[str, ...] = ()
    """Classes it is to draw, e.g. sketch."""
    text: tuple[str, ...] = ()
    """Further sentences."""
    parts: bool = False
    """The sentences of the patch loss too (15 times as many)."""
    templates: tuple[str, ...] = ()
    """As in train.nada."""
    vocabulary: str = ""
    """Tokenizer files: a folder, or OpenAI's bpe_simple_vocab_16e6.txt.gz; empty: those
    beside the model, else what ships with us."""
    download: bool = False
    """Fetch a hub id that is not in the local cache."""
    force: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """Replace OUT if it exists."""


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.nada_text`."""
    options = parse(Options, "train.nada_text", __doc__, args)
    if bool(options.source) != bool(options.target):
        raise UserError("--source and --target go together; give both or neither")
    if not options.text and not options.source:
        raise UserError("there is no text: give --source and --target, or --text")
    out = options.out if options.out.endswith(".npz") else f"{options.out}.npz"
    if os.path.exists(out) and not options.force:
        raise UserError(f"{out} exists already; --force replaces it")
    judge = load_clip(
        options.clip,
        vocabulary=options.vocabulary or None,
        download=options.download,
    )
    texts = list(options.text)
    if options.source:
        templates = templates_of(judge, options.templates)
        for target in options.target:
            texts += needed(options.source, target, options.parts, templates)
    save_texts(out, judge, texts)
    print(f"wrote {len(dict.fromkeys(texts))} texts to {out}")


if __name__ == "__main__":
    main()
