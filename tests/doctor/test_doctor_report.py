"""Findings, and what is told of them."""

from __future__ import annotations

import io

from rich.console import Console

from relod.doctor.examination import Report
from relod.doctor.finding import Finding, State, guarded, note, ok, percentiles_ms, wrong
from relod.errors import EXIT_OK, EXIT_START, StartError


def test_percentiles_are_of_values_that_were_there():
    assert percentiles_ms([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0, "max": 3.0}
    assert percentiles_ms([float(i) for i in range(1, 201)]) == {"p50": 100.0, "p99": 198.0, "max": 200.0}


def test_what_keeps_a_check_from_looking_is_a_finding():
    def fails(error: Exception) -> Finding:
        def check() -> Finding:
            raise error

        (finding,) = guarded("thing", check, "subject")
        return finding

    assert fails(StartError("it is gone", "look for it")).mend == "look for it"
    assert fails(StartError("it is gone")).mend
    assert "numpy" in fails(ModuleNotFoundError("No module named 'numpy'", name="numpy")).found
    assert fails(PermissionError(13, "Permission denied")).state is State.NOTE


def shown(*findings: Finding) -> str:
    console = Console(file=io.StringIO(), width=80)
    Report(findings=findings).print(console)
    return console.file.getvalue()


def test_the_report_fits_80_columns_and_leaves_commands_whole():
    command = "echo 1 | sudo tee /sys/bus/usb-serial/devices/ttyUSB0/latency_timer && " + "x" * 60
    text = shown(ok("camera", "long " * 40, "http://" + "a" * 60), note("serial", "slow", command, "/dev/ttyUSB0"))
    table = text[: text.index("could be better")]
    assert max(map(len, table.splitlines())) <= 80
    assert f"    {command}\n" in text
    assert "nothing is wrong: 1 ok, 1 note" in text


def test_the_report_lets_nobody_move_the_cursor_or_style_text():
    assert "\x1b" not in shown(ok("camera", "[red]a[/] \x1b[2J"))
    assert "[red]a[/] ?[2J" in shown(ok("camera", "[red]a[/] \x1b[2J"))


def test_only_what_is_wrong_makes_the_exit_code():
    assert Report(findings=(ok("a", ""), note("b", ""))).exit_code == EXIT_OK
    bad = Report(findings=(ok("a", ""), wrong("b", "broken", "mend it", "x", size=3)))
    assert bad.exit_code == EXIT_START
    document = bad.to_dict()
    assert document["counts"] == {"ok": 1, "note": 0, "wrong": 1, "not here": 0}
    expected = {"name": "b", "subject": "x", "state": "wrong", "found": "broken", "mend": "mend it"}
    assert document["checks"][1] == {**expected, "values": {"size": 3}}
