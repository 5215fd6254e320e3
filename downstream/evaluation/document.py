"""A document of sections, written as one self-contained HTML file or as Markdown with PNG files beside it.

    Document("title", "lead", [Section("Accuracy", [Table(...), Plot(...)])]).write_html(path)

HTML loads nothing from elsewhere, follows the reader's light or dark setting and is readable on a phone. Markdown is
for a repository: the same sections, plots and pictures as PNG files in the same folder.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from downstream.files import write_file

PNG_DPI = 150
PHONE_COLUMNS = 3  # those of .many; a row of more goes on in the next line there
STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --soft: #5c6670; --ground: #fbfbfa; --card: #ffffff; --line: #e2e4e7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa4ae; --ground: #15181b; --card: #1d2125; --line: #32383e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figure svg, figure > img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.tiles { display: grid; gap: .4rem; }
.tiles img { width: 100%; display: block; border-radius: .25rem; image-rendering: pixelated; }
.tiles div { font-size: .8rem; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem;
  overflow-x: auto; font-size: .85rem; }
@media (max-width: 34rem) { main { padding: 1.25rem .8rem 3rem; } figure { padding: .6rem; }
  .many { grid-template-columns: repeat(3, 1fr) !important; } .first { grid-column-start: 1; } }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph; a soft one is a note."""

    text: str
    soft: bool = False


@dataclass(frozen=True)
class Code:
    """Commands, as they were typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib's; `name` is that of its PNG file."""

    figure: Figure
    caption: str
    name: str


@dataclass(frozen=True)
class Picture:
    """A PNG file."""

    png: bytes
    caption: str
    name: str


@dataclass(frozen=True)
class Tiles:
    """PNG files, each with a few words, in rows of `columns`."""

    tiles: Sequence[tuple[bytes, str]]
    columns: int
    caption: str
    name: str


Block = Text | Code | Table | Plot | Picture | Tiles


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass
class Document:
    """Sections under a title and a lead; empty ones are left out."""

    title: str
    lead: str
    sections: list[Section] = field(default_factory=list)

    def write_html(self, path: Path) -> None:
        """Write one HTML file, whole or not at all (TaskError where the disk refuses)."""
        body = "".join(
            f"<h2>{html.escape(section.title)}</h2>{''.join(map(_html, section.blocks))}"
            for section in self.sections
            if section.blocks
        )
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body><main><h1>{html.escape(self.title)}</h1>"
            f"<p class='soft'>{html.escape(self.lead)}</p>{body}</main></body></html>\n"
        )
        _write(path, page.encode())

    def write_markdown(self, folder: Path, name: str = "README.md") -> None:
        """Write FOLDER/NAME and its pictures, whose names differ (TaskError where the disk refuses)."""
        blocks = [block for section in self.sections for block in section.blocks]
        named = [block.name for block in blocks if isinstance(block, Plot | Picture | Tiles)]
        assert len(set(named)) == len(named), f"two pictures have one name: {sorted(named)}"
        parts = [f"# {self.title}", self.lead]
        for section in self.sections:
            if section.blocks:
                parts += [f"## {section.title}", *(_markdown(block, folder) for block in section.blocks)]
        _write(folder / name, ("\n\n".join(parts) + "\n").encode())


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p{' class=soft' if block.soft else ''}>{html.escape(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Table):
        rows = "".join(_cells("td", row) for row in block.rows)
        return f"<div class='scroll'><table>{_cells('th', block.header)}{rows}</table></div>"
    if isinstance(block, Plot):
        content = _svg(block.figure)
    elif isinstance(block, Picture):
        content = _image(block.png)
    else:
        tiles = "".join(
            f"<div class='{'' if number % block.columns else 'first'}'>{_image(png)}{html.escape(words)}</div>"
            for number, (png, words) in enumerate(block.tiles)
        )
        many = " many" if block.columns > PHONE_COLUMNS else ""
        content = f"<div class='tiles{many}' style='grid-template-columns: repeat({block.columns}, 1fr)'>{tiles}</div>"
    return f"<figure>{content}<figcaption>{html.escape(block.caption)}</figcaption></figure>"


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    if isinstance(block, Table):
        lines = [block.header, ["---"] * len(block.header), *block.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if isinstance(block, Plot):
        buffer = io.BytesIO()
        block.figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white")
        _write(folder / f"{block.name}.png", buffer.getvalue())
        return f"![{block.name}]({block.name}.png)\n\n{block.caption}"
    if isinstance(block, Picture):
        _write(folder / f"{block.name}.png", block.png)
        return f"![{block.name}]({block.name}.png)\n\n{block.caption}"
    rows = []
    for start in range(0, len(block.tiles), block.columns):
        cells = []
        for number, (png, words) in enumerate(block.tiles[start : start + block.columns], start):
            _write(folder / f"{block.name}_{number:02d}.png", png)
            cells.append(f"![{words}]({block.name}_{number:02d}.png) {words}")
        rows.append(cells + [""] * (block.columns - len(cells)))
    header = [[""] * block.columns, ["---"] * block.columns]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [*header, *rows])
    return f"{table}\n\n{block.caption}"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _image(data: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dicm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _write(path: Path, data: bytes) -> None:
    write_file(path, data, "name another place with -o")
