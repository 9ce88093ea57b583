"The published tables: every file comes back whole, and their arithmetic says what the audit of the papers found."
import csv
from collections import defaultdict
from importlib.resources import files
from math import isclose

import pandas as pd
import pytest

from jat_nb.results import published

COLUMNS = ["paper", "table", "dataset", "model_or_method", "setting", "metric", "value"]
COUNT = {"JAT": 7, "IJSAT": 7, "SRT": 9, "Pareto": 2}
TABLES = [(paper, number) for paper, last in COUNT.items() for number in range(1, last + 1)]
each = pytest.mark.parametrize("paper, number", TABLES)


def cells(paper, number):
    "A table as {(data set, row, setting): {column: value}}, as printed."
    rows = defaultdict(dict)
    for line in published(paper, number).itertuples():
        rows[line.dataset, line.model_or_method, line.setting][line.metric] = line.value
    return dict(rows)


def by_name(paper, number, dataset=None):
    "The same by (row, setting), of one data set if there are several."
    return {key[1:]: row for key, row in cells(paper, number).items() if dataset in (None, key[0])}


def mean(row):
    values = [value for name, value in row.items() if name != "Avg"]
    return sum(values) / len(values)


# -- the files (C08, C09) ----------------------------------------------------------------------------------------------

def test_there_are_25_files_with_955_rows():
    names = {f.name for f in (files("jat_nb") / "published").iterdir() if f.name.endswith(".csv")}
    assert names == {f"{paper.lower()}_table{number}.csv" for paper, number in TABLES} and len(names) == 25
    assert sum(len(published(*table)) for table in TABLES) == 955


@each
def test_a_table_survives_the_round_trip(tmp_path, paper, number):
    frame = published(paper, number)
    assert list(frame.columns) == COLUMNS and not frame.isna().any(axis=None)
    frame.to_csv(tmp_path / "again.csv", index=False)
    again = pd.read_csv(tmp_path / "again.csv", dtype={c: str for c in COLUMNS[:-1]}, keep_default_na=False)
    pd.testing.assert_frame_equal(frame, again)
    with (files("jat_nb") / "published" / f"{paper.lower()}_table{number}.csv").open(encoding="utf-8", newline="") as file:
        printed = list(csv.reader(file))
    assert printed[0] == COLUMNS and len(printed) - 1 == len(frame)
    assert [row[:-1] for row in printed[1:]] == frame[COLUMNS[:-1]].values.tolist()


@each
def test_values_are_numbers_but_for_one_symbolic_table(paper, number):
    symbolic = (paper, number) == ("SRT", 7)
    assert (published(paper, number)["value"].dtype.kind != "f") == symbolic


@each
def test_no_number_is_entered_twice(paper, number):
    frame = published(paper, number)
    assert not frame.duplicated(COLUMNS[:-1]).any()
    assert set(frame["paper"].str.lower()) == {paper.lower()} and set(frame["table"].astype(str)) == {str(number)}


# -- the audit (C10): one test for each line ---------------------------------------------------------------------------

def test_joint_is_no_weaker_than_its_parts_but_in_two_places():
    rows = [(number, key, row) for number in (1, 2, 4, 5, 6, 7) for key, row in cells("JAT", number).items()]
    assert len(rows) == 32
    rest = lambda row: [v for k, v in row.items() if k in ("FGSM", "PGD20", "PGD100", "Spatial")]
    failing = [(number, key) for number, key, row in rows if row["Joint"] > min(rest(row))]
    assert len(failing) == 2 and {number for number, _ in failing} == {4, 5}
    [grid], [black] = ([key for k, key in failing if k == n] for n in (4, 5))
    assert "train eps_x=8/255;train eps_w=0.3px" in grid[2] and black[1].endswith("Undefended")
    assert cells("JAT", 4)[grid]["Joint"] == 53.1 and cells("JAT", 4)[grid]["PGD100"] == 52.7
    assert cells("JAT", 5)[black]["Joint"] == 90.5 and cells("JAT", 5)[black]["FGSM"] == 88.7


def test_both_orders_of_the_joint_attack_are_no_weaker_than_its_parts():
    rows = cells("JAT", 3).values()
    assert len(rows) == 2
    for row in rows:
        joint = [v for k, v in row.items() if k.startswith("Joint")]
        assert len(joint) == 2 and max(joint) <= min(row["Pixel (PGD20)"], row["Spatial"])


def test_the_clean_column_that_rests_on_one_extraction_agrees_where_it_can_be_checked():
    first = by_name("JAT", 1)
    [joint] = [row for (name, _), row in first.items() if name == "one-step-Joint"]
    others = [row for number in (2, 3, 4) for row in cells("JAT", number).values()
              if row.get("Joint", row.get("Joint Spatial-Pixel")) == joint["Joint"]]
    assert joint["Pristine"] == 92.1 and len(others) == 3
    assert all(92.1 in row.values() for row in others)


def off(paper, number, places):
    "Rows whose printed average is not that of the printed columns, to the places printed."
    rows = {key[0]: row for key, row in by_name(paper, number).items() if "difference" not in key[0]}
    return {name: round(mean(row), 3) for name, row in rows.items() if abs(mean(row) - row["Avg"]) > 0.5 * 10**-places + 1e-9}


def test_averages_of_ijsat_are_right_but_for_two():
    assert off("IJSAT", 1, 2) == {"MART": pytest.approx(47.664, abs=0.001)}
    assert by_name("IJSAT", 1)["MART", ""]["Avg"] == 47.67
    mart = by_name("IJSAT", 1)["MART", ""] | {"L2": by_name("IJSAT", 5)["MART", ""]["L2"]}
    assert round(mean(mart), 2) == 47.67  # 20.47, as Table 5 prints it, gives the average
    assert off("IJSAT", 4, 2) == {"AT [PGD10] eps=32/255": pytest.approx(24.37, abs=0.005)}
    assert off("IJSAT", 6, 2) == {} and off("IJSAT", 7, 2) == {}


def test_no_average_of_ijsat_table_5_fits_its_columns():
    wrong = off("IJSAT", 5, 2)
    assert set(wrong) == {"AT", "AT + JSA", "TRADES", "TRADES + JSA", "MART", "MART + JSA"}
    assert [round(wrong[name], 2) for name in ("AT", "TRADES", "TRADES + JSA", "MART", "MART + JSA")] == \
        [44.90, 49.44, 50.40, 47.83, 49.31]
    seventh = by_name("IJSAT", 4)["AT [JSA10]", ""]["Avg"]
    assert by_name("IJSAT", 5)["AT + JSA", ""]["Avg"] == seventh == 48.80
    gains = [wrong[f"{name} + JSA"] - wrong[name] for name in ("AT", "TRADES", "MART")]
    assert gains == pytest.approx([4.19, 0.97, 1.48], abs=0.01)


@pytest.mark.parametrize("number, bases", [(5, ("AT", "TRADES", "MART")), (6, ("DMAT",))])
def test_differences_of_rows_are_right(number, bases):
    rows = {key[0]: row for key, row in by_name("IJSAT", number).items()}
    checked = 0
    for base in bases:
        for column, printed in rows[f"{base} difference (printed)"].items():
            if column == "Avg": continue  # averages have a test of their own
            assert isclose(rows[f"{base} + JSA"][column] - rows[base][column], printed, abs_tol=0.0051), (base, column)
            checked += 1
    assert checked == len(bases) * (6 if number == 5 else 7)


def test_a_grid_finds_at_least_what_its_parts_find():
    rows = cells("SRT", 3)
    assert len(rows) == 10
    for row in rows.values():
        assert all(row["GridAdv"] <= row[c] for c in ("GridAdv.T", "GridAdv.R", "RandAdv") if c in row)
        assert row["RandAdv"] <= row["Clean"]


def test_srt_is_never_below_rt():
    pairs = 0
    for number in (1, 2, 5, 6):
        rows = by_name("SRT", number)
        for name, setting in rows:
            if name == "RT":
                theirs, ours = rows["RT", setting], rows["SRT", setting]
                assert list(theirs) == list(ours) and len(ours) == 3
                assert all(ours[column] >= theirs[column] for column in ours)
                pairs += 1
    assert pairs == 16


def unequal(first, second):
    "Cells of two tables that have the same row and column and differ."
    return {(name, column): (row[column], second[name][column]) for name, row in first.items() if name in second
            for column in row if column in second[name] and row[column] != second[name][column]}


def rows_of(number, dataset=None):
    return {name: row for (name, _), row in by_name("SRT", number, dataset).items()}


def test_tables_of_srt_repeat_their_cells_but_for_two_slips():
    assert unequal(rows_of(3, "CIFAR-10"), {"Standard": rows_of(1)["Standard"]}) == {}
    assert unequal(rows_of(3, "MNIST"), {"Standard": rows_of(5)["Standard"]}) == {
        ("Standard", "RandAdv"): (14.01, 71.00), ("Standard", "GridAdv"): (0.0, 40.49)}
    for number, dataset in ((1, "CIFAR-10"), (5, "MNIST")):  # SRT of Table 3 is one of the sweep over lambda
        ours = {c: rows_of(3, dataset)["SRT"][c] for c in ("Clean", "RandAdv", "GridAdv")}
        assert ours in [row for (name, _), row in by_name("SRT", number).items() if name == "SRT"]
    assert unequal(rows_of(3, "CIFAR-10"), rows_of(8)) == {}
    assert unequal(rows_of(4, "CIFAR-10"), rows_of(9)) == {("TRADES", "Clean"): (76.23, 76.72)}
    assert set(rows_of(3, "CIFAR-10")) & set(rows_of(8)) == {"Worst-of-k", "KLR", "SRT"}
    assert set(rows_of(4, "CIFAR-10")) & set(rows_of(9)) == {"AT", "TRADES", "SRT"}


@pytest.mark.parametrize("number, minutes, ratio", [(8, (1573, 855), 1.84), (9, (2916, 257), 11.3)])
def test_speed_ups_of_fast_srt(number, minutes, ratio):
    rows = rows_of(number)
    assert (rows["SRT"]["Time (min)"], rows["fast SRT"]["Time (min)"]) == minutes
    assert minutes[0] / minutes[1] == pytest.approx(ratio, abs=0.05 if ratio > 10 else 0.005)


SCORES = ("Sensitivity-based Robustness", "Local Spatial Robustness", "Global Spatial Robustness")


def scores(row):
    return sum(row[name] for name in SCORES)


def test_universal_robustness_is_the_sum_of_gains():
    checked = 0
    for dataset in ("MNIST", "CIFAR-10", "Caltech-256"):
        rows = by_name("Pareto", 1, dataset)
        natural = scores(rows["Natural Model", ""])
        for key, row in rows.items():
            if key[0] != "Natural Model":
                assert scores(row) - natural == pytest.approx(row["Universal Robustness"], abs=0.0101), (dataset, key)
                checked += 1
    assert checked == 15


def test_table_2_of_pareto_does_not_subtract_the_baseline():
    rows = by_name("Pareto", 2)
    natural, trained = rows.pop(("Natural Model", "")), list(rows.values())
    assert scores(natural) == pytest.approx(67.44, abs=0.005)
    assert [row["Universal Robustness"] for row in trained] == pytest.approx([scores(row) for row in trained], abs=0.0151)
    corrected = [scores(row) - scores(natural) for row in trained]
    assert corrected == pytest.approx([130.48, 132.96, 136.44, 136.54, 132.17], abs=0.0101)
    gain = "Universal Robustness gain over Ave AT (printed)"
    seen = [(row[gain], row["Universal Robustness"] - trained[0]["Universal Robustness"]) for row in trained[1:]]
    wrong = [pair for pair in seen if abs(pair[0] - pair[1]) > 0.0101]
    assert wrong == [(2.37, pytest.approx(2.47, abs=0.001))]
