"""Documents that hold what benchmarks write."""

from pathlib import Path

from glmjax.data.cache import write_whole


def fill(path: Path, begin: str, end: str, text: str) -> None:
    """Puts a text between two markers of a document, in place of what stands there."""
    before, rest = path.read_text().split(begin)
    write_whole(path, f"{before}{begin}{text}{end}{rest.split(end)[1]}".encode())
