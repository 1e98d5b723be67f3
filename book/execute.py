"""Run the book's notebooks in the order of `_toc.yml` and store what they give.

`make notebooks` calls it. A second run changes no byte: no times, no versions, no
warnings are stored. A cell that fails, or that writes to stderr, stops the run and
leaves that notebook as it was.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
README_FIGURE = "fig-first-distillation"
README_PICTURE = ROOT / "book" / "_static" / "first-distillation.svg"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def pages(entry: Any) -> Iterator[str]:
    """The pages below an entry of `_toc.yml`, in reading order."""
    if isinstance(entry, list):
        for part in entry:
            yield from pages(part)
    elif isinstance(entry, dict):
        if "file" in entry:
            yield entry["file"]
        for key in ("parts", "chapters", "sections"):
            yield from pages(entry.get(key))


def notebooks() -> list[Path]:
    """The notebooks in reading order; last the list of figures and tables, which reads them."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    found = [path for page in pages(toc) if (path := ROOT / f"{page}.ipynb").exists()]
    return sorted(found, key=lambda path: path.stem == "figures-and-tables")


def svg(cell: Any) -> str:
    """The picture that a cell has drawn."""
    drawn = (output.get("data", {}).get("image/svg+xml") for output in cell.outputs)
    return next(picture for picture in drawn if picture)


def execute(path: Path) -> None:
    """Run one notebook where it lies, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        timeout=600,
        resources=resources,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path}: a cell writes to stderr:\n{output['text']}")
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == README_FIGURE:
            README_PICTURE.write_text(svg(cell), encoding="utf-8")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or notebooks():
        print(path.relative_to(ROOT), flush=True)
        execute(path)
