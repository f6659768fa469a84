"""The form of `relod bench`: documents, tables for people, tables of a page, and what `all` does with them."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from relod import cli
from relod.bench import everything
from relod.bench.children import Ended
from relod.bench.everything import BENCHMARKS, AllRequest, run_all
from relod.bench.form import Findings, Series, check_writable, number, percentiles, positive, ratio, show, size_of
from relod.bench.tables import TABLES, replace_section, section
from relod.errors import EXIT_OK, EXIT_SETTINGS, EXIT_START, SettingsError

PERCENTILES = ["p50", "p90", "p99", "p999", "max"]


def found(benchmark: str = "transport") -> Findings:
    slow, fast = [2.0, 4.0, 6.0], [1.0, 2.0, 2.0]
    return Findings(
        benchmark=benchmark,
        parameters={"rounds": 3},
        samples={
            "a-series-with-a-long-name": Series(values=slow),
            "fast": Series(values=fast),
            "rate": Series(values=[12345.678], unit="1/s"),
            "never": Series(values=[]),
        },
        ratios={"a-series-with-a-long-name": ratio("fast", slow, fast)},
        facts={"bytes": 7},
        notes=["all of it is made up"],
    )


# -- the document ------------------------------------------------------------------------------------------------------


def test_a_document_has_everything_that_a_reader_needs():
    document = found().document(["bench", "transport", "--short"])
    assert json.loads(json.dumps(document)) == document
    assert document["argv"] == ["relod", "bench", "transport", "--short"]
    assert {"host", "cpu", "cores", "commit", "packages", "date", "load", "python"} <= document.keys()
    assert document["parameters"] == {"rounds": 3}
    assert document["samples"]["fast"] == {"unit": "ms", "values": [1.0, 2.0, 2.0]}
    assert document["samples"]["never"]["values"] == []
    assert list(document["percentiles"]["fast"]) == PERCENTILES
    assert "never" not in document["percentiles"]
    assert document["bytes"] == 7
    assert document["ratios"]["a-series-with-a-long-name"] == {"to": "fast", "median": 2.0, "p10": 2.0, "p90": 2.8}


def test_percentiles_are_of_the_samples():
    values = [float(each) for each in range(1001)]
    assert percentiles(values) == {"p50": 500.0, "p90": 900.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}
    assert set(percentiles([3.0]).values()) == {3.0}


def test_ratios_are_of_pairs():
    """A machine that is slow for a turn is slow for both."""
    assert ratio("base", [2.0, 200.0, 2.0], [1.0, 100.0, 1.0]) == {"to": "base", "median": 2.0, "p10": 2.0, "p90": 2.0}
    with pytest.raises(ValueError, match="zip"):
        ratio("base", [1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.00012, "1.2e-04"), (0.0312, "0.031"), (1.234, "1.23"), (12.34, "12.3"), (12345.6, "12346")],
)
def test_numbers_have_about_three_digits(value, text):
    assert number(value) == text


def test_the_table_fits_a_terminal_and_says_what_is_compared_with_what():
    out = io.StringIO()
    show(found().document([]), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "2.00 (2.00–2.80)" in next(line for line in lines if line.startswith("a-series-with-a-long-name  ms"))
    assert next(line for line in lines if line.startswith("fast")).split()[-1] == "1"
    assert "ratio: to fast" in lines
    assert lines[-1] == "all of it is made up"


# -- sizes and files ---------------------------------------------------------------------------------------------------


def test_sizes():
    assert size_of("--rounds", None, short=False, shortest=2, usual=9) == 9
    assert size_of("--rounds", None, short=True, shortest=2, usual=9) == 2
    assert size_of("--rounds", 4, short=True, shortest=2, usual=9) == 4
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="--rounds"):
            positive("--rounds", value)


def test_finding_out_whether_a_file_can_be_written_leaves_it_as_it_is(tmp_path):
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("what was measured before")
    check_writable(there)
    check_writable(new)
    assert there.read_text() == "what was measured before"
    assert not new.exists()


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "latency"])
@pytest.mark.parametrize("wrong", ["size", "out"])
def test_a_mistake_is_told_in_a_line_before_anything_is_measured(name, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("multiprocessing.get_context", None)
    monkeypatch.setattr("relod.bench.syntheticreplay.fill", None)
    size = "--seconds" if name == "control" else "--rounds"
    options = [size, "-3"] if wrong == "size" else ["--out", str(tmp_path / "no" / "folder")]
    assert cli.run(["bench", name, *options]) == EXIT_SETTINGS
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert f"{options[0]} {options[1]}" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["update", "--device", "gpu"], "--device 'gpu'; choose one of cpu, cuda", EXIT_SETTINGS),
        (["update", "--batch-size", "0"], "--batch-size 0", EXIT_SETTINGS),
        (["update", "--threads", "0"], "--threads 0", EXIT_SETTINGS),
        (["transport", "--exchanges", "0"], "--exchanges 0", EXIT_SETTINGS),
        (["transport", "--pause-ms", "-1"], "--pause-ms -1", EXIT_SETTINGS),
        (["replay", "--steps", "0"], "--steps 0", EXIT_SETTINGS),
        (["control", "--task", "creat"], "did you mean create?", EXIT_SETTINGS),
        (["all", "--tables", "/nowhere/page.md"], "--tables /nowhere/page.md: No such file", EXIT_SETTINGS),
        (["all", "--out", "/dev/null/folder"], "--out /dev/null/folder: Not a directory", EXIT_SETTINGS),
        (["transport", "--rounds", "many"], "--rounds", EXIT_SETTINGS),
    ],
)
def test_mistakes_of_each(arguments, said, code, capsys):
    assert cli.run(["bench", *arguments]) == code
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1


def test_a_device_that_is_not_there_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.run(["bench", "update", "--device", "cuda"]) == EXIT_START
    assert "--device cuda: torch finds no such device" in capsys.readouterr().err


# -- tables of a page --------------------------------------------------------------------------------------------------

PAGE = "before\n<!-- bench:a -->\nold\n<!-- /bench:a -->\nbetween\n<!-- bench:b -->\n<!-- /bench:b -->\nafter\n"


def test_only_what_lies_between_the_markers_is_replaced():
    page = replace_section(PAGE, "a", "| new |")
    assert page == PAGE.replace("\nold\n", "\n| new |\n")
    assert replace_section(page, "a", "| new |") == page
    assert "<!-- bench:b -->\nfirst\n<!-- /bench:b -->\nafter\n" in replace_section(page, "b", "first")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (PAGE.replace("<!-- bench:a -->", ""), "'<!-- bench:a -->' 0 times"),
        (PAGE.replace("<!-- /bench:a -->", ""), "'<!-- /bench:a -->' 0 times"),
        (PAGE + PAGE, "'<!-- bench:a -->' 2 times"),
        ("<!-- /bench:a --> <!-- bench:a -->", "before"),
    ],
)
def test_a_page_without_its_markers_is_told(page, said):
    with pytest.raises(SettingsError, match=said.replace("(", r"\(")) as error:
        replace_section(page, "a", "new")
    assert "\n" not in str(error.value)


def test_a_section_names_machine_date_and_command():
    document = found().document(["bench", "transport"])
    text = section(document)
    head, *rest = text.split("\n")
    assert "`relod bench transport`" in head
    assert document["date"][:10] in head
    assert document["cpu"] in head
    rows = [line for line in rest if line.startswith("|")]
    assert len(rows) == 2 + 3  # a series without samples has none
    assert len({line.count("|") for line in rows}) == 1
    assert "2.00 (2.00–2.80) to fast" in rows[2]
    assert "- all of it is made up" in rest


# -- all ---------------------------------------------------------------------------------------------------------------


def page_for(names) -> str:
    return "".join(f"# {name}\n<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in names)


MODE = {
    "stages": {"deadline_to_wire": {"p50": 5.0, "p99": 9.5}, "uplink": None},
    "policy_lag": None,
    "overruns_not_shared": 0,
    "late_actions": 2,
    "cycle_left": 0.6,
    "updates_per_s": 7.0,
    "uplink_bytes_per_s": 1.7e6,
    "downlink_bytes_per_s": None,
}


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the commands; one that is called `broken` fails."""
    made: list[list[str]] = []

    def run(arguments):
        made.append(list(arguments))
        if arguments[1] == "replay":
            return Ended(exit_code=3, document=None, complaint="")
        document = found(arguments[1]).document(arguments)
        if arguments[1] == "latency":
            document = {**document, "modes": {"local-only": MODE}, "advice": "Use it."}
        return Ended(exit_code=EXIT_OK, document=document, complaint="")

    monkeypatch.setattr(everything, "run_relod", lambda arguments, shown: run(arguments))
    return made


def test_all_runs_every_benchmark_and_rewrites_the_tables_of_those_that_succeed(calls, tmp_path, capsys):
    page, folder = tmp_path / "page.md", tmp_path / "new" / "folder"
    page.write_text(page_for(TABLES))
    document, code = run_all(AllRequest(short=True, tables=page, folder=folder))
    assert code == EXIT_START
    assert "relod: bench replay failed with exit code 3" in capsys.readouterr().err
    assert [call[1] for call in calls] == list(BENCHMARKS)
    assert calls[0] == ["bench", "latency", "--json", "--seconds", "10"]
    assert all("--short" in call for call in calls[1:])
    measured = set(BENCHMARKS) - {"replay"}
    assert set(document["documents"]) == measured
    assert {path.name for path in folder.iterdir()} == {f"{name}.json" for name in measured}
    text = page.read_text()
    assert "# replay\n<!-- bench:replay -->\n<!-- /bench:replay -->\n" in text
    assert text.count("a-series-with-a-long-name, ms") == len(measured & set(TABLES)) - 1
    assert "| deadline > wire | 5.00 / 9.50 |" in text
    assert "| up, down, MB/s | 1.70 |" in text
    assert "uplink |" not in text  # a stage that no mode has
    assert "Use it." in text


def test_all_in_its_usual_form(calls):
    assert run_all(AllRequest())[1] == EXIT_START
    assert ["bench", "transport", "--json"] in calls


def test_a_page_without_markers_is_found_before_anything_is_measured(calls, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(page_for(list(TABLES)[1:]))
    assert cli.run(["bench", "all", "--tables", str(page)]) == EXIT_SETTINGS
    assert capsys.readouterr().err.count("\n") == 1
    assert calls == []


def test_the_projects_own_page_has_the_markers(request):
    page = (request.config.rootpath / "benchmarks" / "README.md").read_text()
    for name in TABLES:
        assert replace_section(page, name, "x") != page
