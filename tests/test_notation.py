"""One meaning for each symbol, words that occur where the glossary says, references that lead somewhere."""
import re

import pytest
from conftest import NOTEBOOKS, cells

BOOK = [p for p in NOTEBOOKS if p.stem != "00_notation"]
CHAPTERS = {p.stem[:2]: p for p in NOTEBOOKS if p.stem[:2].isdigit()}
GREEK = re.compile(r"\\[a-zA-Z]+(_\{\\text\{\w+\}\})?")
OTHERS = re.compile(r"paper|printed|publish|et al|references\.bib|\.ipynb|arxiv|\b(?:JAT|SRT|IJSAT|Pareto)\b", re.I)


def prose(path):
    return "\n\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")


NOTATION = prose(CHAPTERS["00"])


def table(heading, text=NOTATION):
    "Rows of the first table under a heading, without its head."
    part = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def symbols(text=NOTATION):
    headings = ("Tensors", "Budgets, steps and their units", "Letters that belong to some chapters",
                "Norms, sets, operators")
    return [row[0] for heading in headings for row in table(heading, text)]


def clashes(text=NOTATION):
    names = symbols(text)
    return sorted({name for name in names if names.count(name) > 1})


def letters_in(text, letter):
    "Whether a letter is used in the formulas of a text, not counting the same letter with a name of its own."
    math = "".join(a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S))
    named = r"(?!_\{\\text)" if "text" not in letter else ""
    return re.search(re.escape(letter) + r"(?![a-zA-Z])" + named, math) is not None


def test_every_symbol_has_one_row():
    assert len(symbols()) > 40 and not clashes()


def test_a_second_meaning_is_found():
    row = r"| $\lambda$ | shift of a code"
    assert row in NOTATION
    again = NOTATION.replace(row, "| $\\lambda$ | weight of a loss | 23 | `weight` |\n" + row)
    assert clashes(again) == [r"$\lambda$"]


@pytest.mark.parametrize("row", [r for r in table("Letters that belong to some chapters") if r[2]], ids=lambda r: r[0])
def test_letters_stay_in_their_chapters(row):
    letter, allowed = row[0].strip("$"), set(re.findall(r"\d\d", row[2]))
    assert GREEK.fullmatch(letter)
    found = {n for n, path in CHAPTERS.items() if n != "00" and letters_in(prose(path), letter)}
    assert found <= allowed, f"{letter} has another meaning in chapters {sorted(found - allowed)}"


def test_named_letters_are_letters_of_their_own():
    assert letters_in(r"a price $\tau$", r"\tau") and not letters_in(r"$\tau_{\text{flow}} = 1$", r"\tau")
    assert not letters_in(r"$\theta$ and \tau outside", r"\tau") and not letters_in(r"$\etabar$", r"\eta")


LATIN = table("Latin letters with several meanings")


def latin_in(text, letter):
    "Whether a Latin letter is used in the formulas of a text; $w_F$ and $w_{RT}$ are symbols of their own."
    math = " ".join(a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S))
    bare = re.sub(r"\\[a-zA-Z]+", " ", re.sub(r"\\(?:text|mathrm|operatorname|mathcal|mathbf|tag)\{[^}]*\}", " ", math))
    return re.search(rf"(?<![a-zA-Z]){letter}(?![a-zA-Z]|_F|_\{{RT\}})", bare) is not None


@pytest.mark.parametrize("letter", "m p w r R z G".split())
def test_a_latin_letter_has_one_meaning_in_a_chapter(letter):
    listed = [n for symbol, _, chapters in LATIN if symbol == f"${letter}$" for n in re.findall(r"\d\d", chapters)]
    assert listed and len(listed) == len(set(listed))
    found = {n for n, path in CHAPTERS.items() if n != "00" and latin_in(prose(path), letter)}
    assert found == set(listed), f"{letter} also in {sorted(found - set(listed))}, no longer in {sorted(set(listed) - found)}"


def test_latin_letters_are_told_from_words():
    assert latin_in(r"so $m_i = \max_p x$", "m") and latin_in(r"$$\max_p x$$", "p") and latin_in("$w_k$", "w")
    assert not any(latin_in(r"m in $\max x + \text{m}$ and $w_F$, $w_{RT}$, $\operatorname{sm}(x)$", letter) for letter in "mw")


JOINT = set("""attack attacks training adversarial space network networks threat model models budget columns column step update
    loop examples robustness run one ps second is with on trained robust against""".split())


def after_joint(text):
    "The words that follow *joint* in a text; names of its code and addresses of its links do not count."
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return {word.lower() for word in re.findall(r"\bjoint(?:ly)?\b[ *-]*([a-z]\w*)", plain, re.I)}


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_joint_means_moved_and_changed_except_in_joint_space(path):
    assert after_joint(prose(path)) <= JOINT


def test_another_joint_is_found():
    assert after_joint("a *joint* attack, jointly trained, [the joint](x_joint_density.ipynb) space") == {"attack", "trained", "space"}
    assert not after_joint("from the joint distribution of both") <= JOINT


def occurs(word, text):
    return re.search(r"\b" + re.sub(r"[ -]", r"[\\s_-]", word.lower()), text.lower()) is not None


def test_words_of_the_glossary_occur_in_their_chapters():
    rows = table("Glossary")
    words = [word for word, _, _ in rows]
    assert len(words) > 30 and len(set(words)) == len(words)
    for word, meaning, link in rows:
        number, file = re.fullmatch(r"\[(\d+)\]\((\w+)\.ipynb\)", link).groups()
        path = CHAPTERS[f"{int(number):02}"]
        assert meaning and path.stem == file
        assert occurs(word, "\n".join(c["source"] for c in cells(path))), word


def numbered(text):
    "Numbers of the figures, tables and equations that a chapter has, in order."
    figures = [int(n) for n in re.findall(r"^\*\*Figure (\d+)\.", text, re.M)]
    tables = [int(n) for n in re.findall(r"^\*\*Table (\d+)\.", text, re.M)]
    equations = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", text)]
    return {"Figure": figures, "Table": tables, "Eq": equations}


def lost(text):
    "References to figures, tables and equations of this page that it does not have."
    own, missing = numbered(text), []
    text = re.sub(r"^\*\*(?:Figure|Table) \d+\.", "", text, flags=re.M)
    for sentence in re.split(r"\n\s*\n|\n(?=\|)|(?<=[.!?;:])\s+(?=[A-Z*`$\[\"])", text):
        if OTHERS.search(sentence) or sentence.startswith(("#", "|")):
            continue  # speaks of a paper's figure, as rows of "the paper | we do" do, or of another chapter's
        for kind, first, last in re.findall(r"\b(Figure|Table|Eq)s?\.? (\d+)(?:(?: to | and )(\d+))?", sentence):
            if kind != "Table" or own["Table"]:  # a page without numbered tables means those of its paper
                missing += [f"{kind} {n}" for n in sorted({first, last or first}) if int(n) not in own[kind]]
    return missing


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.stem)
def test_figures_and_equations_are_numbered_in_order(path):
    text = prose(path)
    for kind, numbers in numbered(text).items():
        assert numbers == list(range(1, len(numbers) + 1)), (kind, numbers)
    assert not lost(text)


def test_lost_references_are_found():
    page = "**Figure 1.** A digit.\n\n$$x \\tag{1}$$\n\nAs Eq. 1 and Figure 1 show.\n\n"
    assert not lost(page) and lost(page + "See Figure 2 and Eqs. 1 to 3.") == ["Figure 2", "Eq 3"]
    assert not lost(page + "See Figure 7 of the paper.")
    assert lost(page + "SRT draws another one. See Figure 7.") == ["Figure 7"]
    assert numbered(page + "**Figure 3.** Another.")["Figure"] == [1, 3]
