"""Pages of headings, text, tables and pictures: as Markdown beside its pictures, and as one HTML file that needs
nothing else.

In text ``**bold**``, `` `code` `` and ``[words](address)`` mean what they mean in Markdown; HTML gets the same.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from pqk_fast.files import replacing

FOLDER = "\0"  # stands for the name of the pictures' folder until it is known
LINK = re.compile(r"\[([^]]+)\]\((\S+?)\)")

__all__ = ["Page", "Table"]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1c1c1c;
  background: #fff; max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .25rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #bbb; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; min-width: 9rem; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #555; }
code { background: #f3f3f3; padding: .1em .3em; border-radius: 3px; font-size: .9em; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; border-radius: 4px; }
pre code { background: none; padding: 0; }
"""


@dataclass
class Table:
    """Cells as text; the first column is aligned left, the others right."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    bold: set[tuple[int, int]] = field(default_factory=set)  # (row, column)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=escape(self.title), box=SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(self.columns):
            # one word a line keeps the columns narrow; names may wrap, numbers may not
            table.add_column(
                escape(column.replace(" ", "\n")),
                justify="right" if i else "left",
                no_wrap=i > 0,
                min_width=0 if i else 8,
            )
        for i, row in enumerate(self.rows):
            # Text, not str: rich would read square brackets in names as its markup
            table.add_row(*(Text(cell, style="bold" if (i, j) in self.bold else "") for j, cell in enumerate(row)))
        return table

    def markdown(self) -> list[str]:
        """Its lines, without the title."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(_markdown(cell).replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

        rows = [
            [f"**{cell}**" if (i, j) in self.bold else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        return [line(self.columns), rule, *(line(row) for row in rows)]

    def html(self) -> str:
        """A ``<table>`` that scrolls sideways where the screen is narrow."""
        head = "".join(f"<th>{_inline(column)}</th>" for column in self.columns)
        body = ""
        for i, row in enumerate(self.rows):
            cells = (f"<b>{_inline(c)}</b>" if (i, j) in self.bold else _inline(c) for j, c in enumerate(row))
            body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        caption = f"<caption>{_inline(self.title)}</caption>" if self.title else ""
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


class Page:
    """Collects blocks in order (:meth:`text`, :meth:`table`, :meth:`picture`...), then writes them (:meth:`write`)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._markdown: list[str] = [f"# {_markdown(title)}"]
        self._html: list[str] = [f"<h1>{_inline(title)}</h1>"]
        self._pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self._markdown.append(f"## {_markdown(text)}")
        self._html.append(f"<h2>{_inline(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._markdown.append(_markdown(text))
        self._html.append(f"<p>{_inline(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._markdown.append("\n".join(f"- {_markdown(text)}" for text in texts))
        self._html.append("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Lines as they are."""
        self._markdown.append(f"```\n{text}\n```")
        self._html.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(self, table: Table) -> None:
        title = [f"**{_markdown(table.title)}**", ""] if table.title else []
        self._markdown.append("\n".join([*title, *table.markdown()]))
        self._html.append(table.html())

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """A PNG, which becomes ``name``.png beside the Markdown and a part of the HTML file."""
        self._pictures[name] = png
        self._markdown.append(f"![{_markdown(caption)}]({FOLDER}/{name}.png)")
        source = base64.b64encode(png).decode()
        image = f'<img alt="{_plain(caption)}" src="data:image/png;base64,{source}">'
        self._html.append(f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>")

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """``name``.md, ``name``.html and the pictures in a folder ``name``; gives the paths of the first two."""
        folder = Path(folder)
        for picture, png in self._pictures.items():
            with replacing(folder / name / f"{picture}.png") as file:
                file.write(png)
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        head += f"<title>{_plain(self.title)}</title><style>{STYLE}</style>"
        body = "\n".join(self._html)
        contents = {
            "md": "\n\n".join(self._markdown).replace(FOLDER, name) + "\n",
            "html": f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n',
        }
        for suffix, content in contents.items():
            with replacing(folder / f"{name}.{suffix}", "w") as file:
                file.write(content)
        return [folder / f"{name}.{suffix}" for suffix in contents]


def _markdown(text: str) -> str:
    """With what Markdown would take for HTML escaped, outside code."""
    return re.sub(r"(`[^`]+`)|<(?=[a-zA-Z/!?])|&(?=#?\w+;)", lambda match: match[1] or "\\" + match[0], text)


def _plain(text: str) -> str:
    """Without Markdown, for an attribute or a title."""
    return html.escape(re.sub(r"\*\*|`", "", LINK.sub(r"\1", text)))


def _inline(text: str) -> str:
    """Markdown within a line as HTML."""
    codes: list[str] = []  # nothing within them means anything

    def aside(match: re.Match[str]) -> str:
        codes.append(f"<code>{html.escape(match[1], quote=False)}</code>")
        return f"\0{len(codes) - 1}\0"

    def link(match: re.Match[str]) -> str:
        address = match[2].replace('"', "&quot;")
        return f'<a href="{address}">{match[1]}</a>'

    text = html.escape(re.sub(r"`([^`]+)`", aside, text), quote=False)
    text = LINK.sub(link, re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text))
    return re.sub(r"\0(\d+)\0", lambda match: codes[int(match[1])], text)
