"""Make a Megatron dataset of the standard library's own sources: real text without a download.

    python launch/text.py --output data/stdlib

writes ``data/stdlib.bin`` and ``data/stdlib.idx``, byte by byte, one document a source file, in
sorted order. Train on it with ``--data-path data/stdlib --tokenizer-type NullTokenizer
--vocab-size 256 --split 98,2,0``; the last 2 per cent of the documents are then held out.
Does nothing when the dataset is there already.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import numpy

#: One token per byte. UTF-8 never uses 255, which therefore ends a document; it is also what
#: Megatron's NullTokenizer takes as the end of a document.
VOCABULARY = 256
END_OF_DOCUMENT = 255
#: Megatron's --split: the share of the documents to train on and to hold out.
SPLIT = "98,2,0"


def sources(root: Path) -> list[Path]:
    """Return the Python sources below a folder in sorted order, without installed packages."""
    found = (path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def documents(root: str | Path | None = None) -> list[Path]:
    """Return the sources to train on, of the standard library where no folder is given.

    Raises:
        FileNotFoundError: when the folder holds no Python source.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    found = sources(root)
    if not found:
        raise FileNotFoundError(f"no Python sources below {root}")
    return found


def tokens_of(document: Path) -> numpy.ndarray:
    """Return a document's bytes with the mark of its end, uint8."""
    tokens = numpy.frombuffer(document.read_bytes(), dtype=numpy.uint8)
    # The few files that are not UTF-8 could hold the mark: it must stay unique.
    return numpy.append(tokens[tokens != END_OF_DOCUMENT], numpy.uint8(END_OF_DOCUMENT))


def build(output: str | Path, root: str | Path | None = None) -> Path:
    """Write the dataset unless it is there, and return its prefix (what --data-path takes).

    Args:
        output: prefix of the two files, without ``.bin`` or ``.idx``.
        root: folder of the sources; the standard library by default.

    Raises:
        FileNotFoundError: when the folder holds no Python source.
    """
    output = Path(output)
    final = {kind: output.with_name(f"{output.name}.{kind}") for kind in ("bin", "idx")}
    if all(path.exists() for path in final.values()):
        return output
    found = documents(root)

    # Imported late: Megatron takes seconds, and the dataset is mostly there already.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tqdm import tqdm

    output.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may build at the same time: each under a name of its own, the same content.
    partial = {k: path.with_name(f".{path.name}.{os.getpid()}") for k, path in final.items()}
    try:
        builder = IndexedDatasetBuilder(str(partial["bin"]), dtype=numpy.uint8)
        for path in tqdm(found, desc="text", unit="file"):
            tokens = tokens_of(path)
            builder.add_document(tokens, [len(tokens)])
        builder.finalize(str(partial["idx"]))
        for kind in ("bin", "idx"):  # the index last: it is what makes the dataset complete
            with open(partial[kind], "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial[kind], final[kind])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return output


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python launch/text.py --output data/stdlib",
    )
    parser.add_argument("--output", required=True, help="prefix of the .bin and .idx files")
    parser.add_argument("--root", help="folder of the sources (default: the standard library)")
    arguments = parser.parse_args()
    print(build(arguments.output, arguments.root))


if __name__ == "__main__":
    main()
