"""Pages as Markdown and as one HTML file: the same words in both, nothing of the text taken for markup."""

import base64
import importlib.util
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from pqk_fast import files, pages
from pqk_fast.pages import Page, Table

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
VOID = {"meta", "img"}


class Document(HTMLParser):
    """What a browser makes of it: elements with attributes, text with the element around it. All must be closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def written(page: Page, folder: Path, name: str = "page") -> tuple[str, Document, str]:
    """The Markdown, the HTML as it is understood, and as it stands."""
    markdown, html = page.write(folder, name)
    assert (markdown, html) == (folder / f"{name}.md", folder / f"{name}.html")
    content = html.read_text(encoding="utf-8")
    return markdown.read_text(encoding="utf-8"), Document(content), content


def paragraph(text: str, folder: Path) -> tuple[str, Document]:
    page = Page("t")
    page.text(text)
    markdown, document, content = written(page, folder)
    assert "<p>" in content
    return markdown.split("\n\n", 1)[1].rstrip("\n"), document


# --- words


@pytest.mark.parametrize(
    ("text", "markdown", "shown"),
    [
        ("a < b & c > d", "a < b & c > d", "a < b & c > d"),
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>", "<script>alert(1)</script>"),
        ("&lt; &#60; AT&T; R&D", r"\&lt; \&#60; AT\&T; R&D", "&lt; &#60; AT&T; R&D"),
        ("conv[0], [x] and (y)", "conv[0], [x] and (y)", "conv[0], [x] and (y)"),
        ("2 * 3 * 4", "2 * 3 * 4", "2 * 3 * 4"),
        ("\"quoted\" and 'so'", "\"quoted\" and 'so'", "\"quoted\" and 'so'"),
        ("ü, 90 %, phase1_p, ±", "ü, 90 %, phase1_p, ±", "ü, 90 %, phase1_p, ±"),
    ],
)
def test_plain_words_are_shown_as_they_are(tmp_path: Path, text: str, markdown: str, shown: str) -> None:
    got, document = paragraph(text, tmp_path)
    assert got == markdown
    assert document.text("p") == [shown]
    assert document.all("script") == []


@pytest.mark.parametrize(
    ("text", "inside", "links"),
    [
        ("**bold** words", [("b", "bold"), ("p", "words")], []),
        ("**a < b** and **c**", [("b", "a < b"), ("p", "and"), ("b", "c")], []),
        ("run `a <b> **c** [d](e) &amp;` now", [("p", "run"), ("code", "a <b> **c** [d](e) &amp;"), ("p", "now")], []),
        ("**the `code` is bold**", [("b", "the"), ("code", "code"), ("b", "is bold")], []),
        ("`one` `two`", [("code", "one"), ("code", "two")], []),
        ("see [this](a/b.md#c), please", [("p", "see"), ("a", "this"), ("p", ", please")], ["a/b.md#c"]),
        ("[q](https://x.org/?a=1&b=2)", [("a", "q")], ["https://x.org/?a=1&b=2"]),
        ("[`file.py`](file.py)", [("code", "file.py")], ["file.py"]),
        ("**[bold](x)**", [("a", "bold")], ["x"]),
        ('[x](y"onclick="z)', [("a", "x")], ['y"onclick="z']),
    ],
)
def test_bold_code_and_links(tmp_path: Path, text: str, inside: list, links: list[str]) -> None:
    got, document = paragraph(text, tmp_path)
    assert got == text, "Markdown as it was given"
    assert [entry for entry in document.texts if entry[0] not in ("title", "style", "h1")] == inside
    assert document.all("a") == [{"href": link} for link in links]


def test_every_kind_of_block_is_in_both(tmp_path: Path) -> None:
    page = Page("Results of **R&D**, `x<y`")
    page.heading("One < two")
    page.text("Words.")
    page.items(["first **one**", "a < b"])
    page.code("pqk-fast train <NAME> && echo '{pictures}'\n  **as it is**")
    page.table(Table("T", ("a", "b"), [["x", "1"]]))
    page.picture("curve", PNG, "A curve")
    markdown, document, _ = written(page, tmp_path)
    assert markdown.split("\n\n") == [
        "# Results of **R&D**, `x<y`",
        "## One < two",
        "Words.",
        "- first **one**\n- a < b",
        "```\npqk-fast train <NAME> && echo '{pictures}'\n  **as it is**\n```",
        "**T**",
        "| a | b |\n|---|---:|\n| x | 1 |",
        "![A curve](page/curve.png)\n",
    ]
    assert document.text("title") == ["Results of R&D, x<y"]
    assert document.texts[2:6] == [("h1", "Results of"), ("b", "R&D"), ("h1", ","), ("code", "x<y")]
    assert document.text("h2") == ["One < two"]
    assert document.text("li") == ["first", "a < b"]
    assert "pqk-fast train <NAME> && echo '{pictures}'\n  **as it is**" in document.text("code")
    assert [tag for tag, _ in document.elements if tag in ("h1", "h2", "p", "ul", "pre", "table", "figure")] == [
        "h1", "h2", "p", "ul", "pre", "table", "figure"
    ]  # fmt: skip


# --- tables


def table() -> Table:
    return Table(
        "Cells of [all] kinds",
        ("name [x]", "a|b", "value"),
        [["conv[0] <w>", "1|2", "3"], ["`a|b`", "R&D;", "-4.5"], ["two\nlines", "", "**"]],
        {(0, 2), (1, 0)},
    )


def test_a_table_in_markdown() -> None:
    assert table().markdown() == [
        r"| name [x] | a\|b | value |",
        "|---|---:|---:|",
        r"| conv[0] \<w> | 1\|2 | **3** |",
        r"| **`a\|b`** | R\&D; | -4.5 |",
        "| two lines |  | ** |",
    ]


def test_a_table_in_html() -> None:
    document = Document(table().html())
    assert document.text("caption") == ["Cells of [all] kinds"]
    assert document.text("th") == ["name [x]", "a|b", "value"]
    assert document.text("td") == ["conv[0] <w>", "1|2", "R&D;", "-4.5", "two\nlines", "**"]
    assert document.text("b") == ["3"]
    assert document.text("code") == ["a|b"]
    assert [len(document.all(tag)) for tag in ("tr", "th", "td", "b")] == [4, 3, 9, 2]
    assert document.elements[0] == ("div", {"class": "wide"})
    assert "<caption>" not in Table("", ("a",)).html()


def test_a_table_on_a_terminal() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table().rich())
    text = console.export_text(styles=True)
    assert re.search(r"\x1b\[1m *3\x1b\[0m", text)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    for words in ("Cells of [all] kinds", "[x]", "a|b", "conv[0] <w>", "`a|b`", "R&D;"):
        assert words in plain


def test_a_page_without_a_tables_title(tmp_path: Path) -> None:
    page = Page("t")
    page.table(Table("", ("a", "b"), [["x", "1"]]))
    assert written(page, tmp_path)[0] == "# t\n\n| a | b |\n|---|---:|\n| x | 1 |\n"


# --- pictures and files


def test_pictures_are_beside_the_markdown_and_in_the_html(tmp_path: Path) -> None:
    page = Page("t")
    page.picture("fig2", PNG, 'Accuracy of **4** bits, `a` & "b" [there](x.md)')
    markdown, document, _ = written(page, tmp_path / "new", "results")
    assert '![Accuracy of **4** bits, `a` & "b" [there](x.md)](results/fig2.png)' in markdown
    assert (tmp_path / "new" / "results" / "fig2.png").read_bytes() == PNG
    (image,) = document.all("img")
    assert image["alt"] == 'Accuracy of 4 bits, a & "b" there'
    kind, content = str(image["src"]).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content, validate=True) == PNG
    assert document.text("figcaption") == ["Accuracy of", "bits,", '& "b"']
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == [
        "fig2.png", "results", "results.html", "results.md"
    ]  # fmt: skip


def test_the_html_needs_no_network(tmp_path: Path) -> None:
    page = Page("t")
    page.text("See [the paper](https://arxiv.org/abs/2106.14681).")
    page.picture("p", PNG, "c")
    page.table(table())
    _, document, content = written(page, tmp_path)
    assert content.startswith("<!doctype html>\n")
    assert '<meta charset="utf-8">' in content
    assert document.all("a") == [{"href": "https://arxiv.org/abs/2106.14681"}]
    without = content.replace("https://arxiv.org/abs/2106.14681", "")
    assert not re.search(r"https?:|//|url\(|@import|<link|<script", re.sub(r"base64,[^\"]*", "", without))
    for _, attributes in document.elements:
        for name in ("src", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_writing_again_gives_the_same_bytes_and_old_files_stay_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page("first")
    page.picture("p", PNG, "c")
    paths = page.write(tmp_path, "page")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 3
    page.write(tmp_path, "page")
    assert {path: path.read_bytes() for path in before} == before

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    plain, second = Page("second"), Page("second")
    second.picture("p", PNG[::-1], "c")
    for each in (plain, second):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            with pytest.raises(OSError, match="no space"):
                each.write(tmp_path, "page")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    second.write(tmp_path, "page")
    assert all(b"second" in path.read_bytes() for path in paths)


def test_pages_need_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    specification = importlib.util.spec_from_file_location("pages_anew", pages.__file__)
    assert specification is not None
    assert specification.loader is not None
    anew = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "pages_anew", anew)  # dataclasses look there
    specification.loader.exec_module(anew)
    page = anew.Page("t")
    page.picture("p", PNG, "c")
    page.table(anew.Table("T", ("a",), [["1"]]))
    assert len(page.write(tmp_path, "page")) == 2
