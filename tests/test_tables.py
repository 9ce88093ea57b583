"Printed tables beside ours: every cell of every table, numbers as numbers and text as text."
from dataclasses import replace
from types import MappingProxyType

import pandas as pd
import pytest

from jat_nb import catalogue, tables
from jat_nb.catalogue import papers
from jat_nb.differences import Share
from jat_nb.results import published
from jat_nb.tables import paper_table, printed_numbers, side_by_side

COUNT = {"jat": 7, "ijsat": 7, "srt": 9, "pareto": 2}
TABLES = [(paper, number) for paper, last in COUNT.items() for number in range(1, last + 1)]


def texts(values): return sorted(value for value in values if isinstance(value, str))


@pytest.mark.parametrize("paper, number", TABLES)
def test_every_cell_of_every_table_is_shown(paper, number):
    printed, long = published(paper, number), paper_table(paper, number, [])
    own = ~long["column"].str.endswith(", as printed")  # beside a corrected number
    assert long["paper"][own].notna().sum() == len(printed)
    assert texts(long["paper"]) == texts(printed["value"]) and long["gap"].isna().all()
    folded = side_by_side(long)
    assert set(folded.index.get_level_values("source")) == {"paper"}
    assert (folded != "-").sum().sum() == long["paper"].notna().sum()


def test_formulas_stand_as_they_are_printed():
    long = paper_table("srt", 7, []).query("column == 'cost'").set_index("row")
    assert long.loc["SRT", "paper"] == "O((N+M)*I_i*I_o)" and len(long) == 8
    assert side_by_side(paper_table("srt", 7, [])).loc[("Worst-of-k", "paper"), "cost"] == "O(N*I_i*I_o)"


def test_in_a_mixed_table_numbers_are_compared_and_text_is_not(monkeypatch):
    "One cell of text makes pandas read the whole column as text."
    cells = {"PGD": "12.5", "MI-FGSM": "not run"}
    mixed = pd.DataFrame([("SRT", "4", "MNIST", "SRT", "", name, value) for name, value in cells.items()],
                         columns=["paper", "table", "dataset", "model_or_method", "setting", "metric", "value"])
    paper = replace(papers()["srt"], rows=(catalogue.Row(4, "SRT", "srt/mnist-long-srt", "mnist"),))
    monkeypatch.setattr(tables, "published", lambda key, number: mixed)
    monkeypatch.setattr(tables, "papers", lambda: MappingProxyType({"srt": paper}))
    monkeypatch.setattr(tables, "_ours", lambda *_, **__: Share((0.25,), 100))
    long = paper_table("srt", 4, [])
    by_column = long.set_index("column")
    assert by_column.loc["PGD, long", ["paper", "ours", "gap"]].tolist() == [12.5, 25.0, 12.5]
    assert by_column.loc["MI-FGSM", ["paper", "ours"]].tolist() == ["not run", 25.0] and by_column["gap"].notna().sum() == 1
    assert side_by_side(long)["MI-FGSM"].tolist()[:2] == ["not run", "25.0"] and side_by_side(long)["MI-FGSM"].tolist()[-1] == "-"
    assert printed_numbers(paper) == {("srt/mnist-long-srt", "PGD, long", "mnist", ""): 12.5}
