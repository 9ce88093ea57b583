"""Build the site and README.md from the stored outputs of nbs/*.ipynb. Nothing is executed.

    python nbs/_site/build.py [--out docs] [--readme README.md]

What a notebook may contain, beside what nbdev defines:

- `[Zhang and Wang 2019](_site/references.bib#zhang2019joint)` cites an entry of the bibliography. In the notebook it
  opens the file, on the site it leads to the entry, in README.md to the paper. An unknown key fails the build.
- `[title](03_threats.ipynb#A-heading)` leads to a chapter, as in Jupyter. Links to other files of the repository work.
- Inline code that names a public name, such as `double_pass` or `attacks.double_pass`, becomes a link to it; a bare word
  only where the code of the page does not give it another meaning.
- A markdown cell that starts with `**Figure n.**` is the caption of the figure above it.
- In index.ipynb, a markdown cell `<!-- chapters -->` stands for the list of chapters.
- `#| hide` and `#| echo: false` fold the code of a cell, so that every page can be copied whole; the cell that calls
  `nbdev_export()` is dropped.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

import links
import pages
from book import NOTEBOOKS, ROOT, SITE, Book, BuildError, settings

PLAIN = re.compile(r'<span class="(?:[nopw]|nn|mi|mf|sa|si|pre)">([^<]*)</span>')
CELL = re.compile(r'<(t[dh])([^>]*)><p>((?:(?!</?p).)*)</p>\s*</\1>', re.S)  # a table cell that is one paragraph

UNUSED = re.compile(r'<symbol id="svg-(?:pencil|eye)".*?</symbol>', re.S)

DOCS, README = ROOT / "docs", ROOT / "README.md"


def build(out: Path = DOCS, readme: Path = README) -> None:
    "Build everything beside `out`, check it, and only then replace `out` and `readme`."
    book, fingerprint = Book.read(), inputs()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        source, site = Path(temporary, "source"), Path(temporary, "site")
        source.mkdir()
        pages.stage(book, source)
        run_sphinx(source, site, Path(temporary, "doctrees"))
        text = pages.readme(book, site / "images")
        for picture in site.rglob("*.png"):
            shrink(picture)
        for picture in (site / "_images").glob("*.png"):
            pack(picture)
        for page in site.rglob("*.html"):
            lighten(page)
        check(site)
        fingerprint["README.md"] = digest(text.encode())
        (site / "build.json").write_text(json.dumps(fingerprint, indent=1) + "\n")
        if out.exists():
            shutil.move(out, Path(temporary, "old"))
        os.replace(site, out)
    draft = readme.with_name(f".{readme.name}.new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, readme)


# Classes that no rule of the styles asks for.
SHORTER = (('class="docutils literal notranslate"', 'class="literal"'), ('class="reference internal"', 'class="reference"'),
           (' docutils container"', ' container"'), (' class="toctree-l1"', ""))


def shrink(path: Path) -> None:
    "Store a figure with at most 256 colours where the eye sees no difference, else as it is but packed tighter."
    full = Image.open(path).convert("RGB")
    few = full.quantize(256, dither=Image.Dither.NONE)
    off = ImageChops.difference(full, few.convert("RGB")).convert("L").point(lambda v: 255 * (v > 16))
    visible = ImageStat.Stat(off).mean[0] / 255  # share of pixels that are off by more than 16 of 255
    (few if visible < 0.05 else full).save(path, optimize=True)


def pack(path: Path) -> None:
    "A PNG of a page as WebP, which holds the same pixels in a fifth less."
    Image.open(path).convert("RGB").save(path.with_suffix(".webp"), lossless=True)
    path.unlink()


def squeezed(tags: str) -> str:
    "Without space between tags, and with single spaces elsewhere."
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", tags))


def lighten(path: Path) -> None:
    """Take off what changes little: marks of names, numbers, operators and space in code, of inline code, of lone paragraphs
    in tables; icons that no page shows and space between tags above and below the text. Pictures are named as they were packed."""
    above, start, rest = path.read_text(encoding="utf-8").partition("<article")
    text, end, below = rest.partition("</article>")
    text = squeezed(UNUSED.sub("", above)) + start + PLAIN.sub(r"\1", text) + end + squeezed(below)
    for long, short in SHORTER: text = text.replace(long, short)
    text = re.sub(r'(src="_images/\w+)\.png', r"\1.webp", text)
    path.write_text(CELL.sub(r"<\1\2>\3</\1>", text), encoding="utf-8")


def run_sphinx(source: Path, site: Path, doctrees: Path) -> None:
    about = settings()
    named = {"project": about["title"], "html_title": about["title"], "author": about["author"],
             "copyright": about["copyright"], "version": about["version"], "release": about["version"],
             "html_search_scorer": str(source / "search.js")}
    options = [part for name, value in named.items() for part in ("-D", f"{name}={value}")]
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-c", SITE, "-d", doctrees]
    if subprocess.run([*command, *options, source, site]).returncode:
        raise BuildError("Sphinx gave the warnings above")
    for unread in (site / ".buildinfo", *site.rglob("*.map")): unread.unlink(missing_ok=True)
    shutil.rmtree(site / "_sources", ignore_errors=True)
    (site / ".nojekyll").touch()


def check(site: Path) -> None:
    pages = links.read(site)
    if faults := links.broken(site, pages) + links.remote(site, pages):
        raise BuildError("links that lead nowhere, or resources from a network:\n  " + "\n  ".join(faults))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def inputs() -> dict[str, str]:
    "Everything the site is made of, with its SHA-256, and the version it is printed for."
    files = [*NOTEBOOKS.glob("*.ipynb"), *(p for p in SITE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)]
    hashes = {path.relative_to(ROOT).as_posix(): digest(path.read_bytes()) for path in sorted(files)}
    return {"version": settings()["version"], **hashes}


def stale(out: Path = DOCS, readme: Path = README) -> list[str]:
    "Inputs that changed, came or went since `out` was built, and README.md if it is not what was built."
    record = out / "build.json"
    then = json.loads(record.read_text()) if record.exists() else {}
    now = {**inputs(), "README.md": digest(readme.read_bytes()) if readme.exists() else ""}
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the site, replaced when the build succeeds")
    parser.add_argument("--readme", type=Path, default=README, help="file to write, replaced when the build succeeds")
    options = parser.parse_args()
    try:
        build(options.out.resolve(), options.readme.resolve())
    except BuildError as error:
        sys.exit(f"{error}\nNothing was replaced.")
    print(f"built {options.out} and {options.readme}")


if __name__ == "__main__":
    main()
