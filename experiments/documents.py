"""Should documents that share a row see each other?

    python -m experiments.documents          # writes the documents, once
    glmjax sweep experiments/documents.py

Changed: documents packed into one row are separate texts with blanks and attention of their own, or one
text. The documents are paragraphs of the books, in random order, so that neighbours have nothing to
do with each other. Both models are evaluated both ways.

Published: THUDM/GLM lets packed documents see each other, GLM-130B's code does not; neither compares.
Zhao et al., ACL 2024 (Analysing the impact of sequence composition on language model pre-training):
causal models are better when documents do not see those before them.
"""

import json
import random
from functools import partial
from pathlib import Path

from experiments.classics import DATA, SEEDS, base
from glmjax.data.cache import write_whole
from glmjax.data.readers import find_files, read_documents
from glmjax.sweep.ablation import Trend, heldout_by, report
from glmjax.sweep.trials import Scale, Sweep, vary

SHORT = "~/.cache/glmjax/classics_short.jsonl"
BYTES = range(120, 600)
"""Sizes of paragraphs in UTF-8: about 30 to 200 tokens in either language."""

METRICS = {
    "loss/apart": "held-out loss, documents apart",
    "loss/crossing": "held-out loss, documents as one text",
}
SOURCE = "Zhao et al., ACL 2024: causal models are better with documents apart"
TRENDS = (Trend("apart", "crossing", SOURCE, "loss/apart"),)
WAYS = {
    "loss/apart": {"objective.cross_document_attention": False},
    "loss/crossing": {"objective.cross_document_attention": True},
}


def sweep(scale: Scale) -> Sweep:
    short = base(scale, **({} if scale == "tiny" else {"data.path": (SHORT,)}))
    variants = {"apart": {}, "crossing": {"objective.cross_document_attention": True}}
    trials = vary(short, variants, "documents", SEEDS[scale])
    say = partial(report, metrics=METRICS, trends=TRENDS)
    return Sweep("documents", trials, say, partial(heldout_by, WAYS))


def write_short(folders: tuple[str, ...], path: Path) -> int:
    """Writes the paragraphs of books as documents, in random order. Returns how many."""
    paragraphs = [
        line.strip()
        for folder in folders
        for file in find_files(folder)
        for book in read_documents(file, "text")
        for line in book.split("\n")
        if len(line.strip().encode()) in BYTES
    ]
    random.Random(0).shuffle(paragraphs)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in paragraphs)
    write_whole(path, "".join(lines).encode())
    return len(paragraphs)


if __name__ == "__main__":
    print(f"{write_short(DATA, Path(SHORT).expanduser()):,} documents in {SHORT}")
