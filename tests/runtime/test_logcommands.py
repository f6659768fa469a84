"""`relod log`: what is in a log, whether it is whole, and its export; one line and an exit code when not."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from relod import cli
from relod.errors import EXIT_OK, EXIT_SETTINGS, EXIT_START
from relod.robots.vision import cv2
from relod.runtime.log.check import verify_log
from relod.runtime.log.codec import make_codec
from relod.runtime.log.format import EncodedFrame, pack_frame, pack_message
from relod.runtime.log.writer import LogWriter
from tests.runtime.logs import SPEC, Call, episodes, frames_of, make_end, make_step, picture, write


@pytest.fixture
def told(capsys):
    """Runs a command line; gives its exit code and what it printed to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run(["log", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def make_run(path: Path, calls: list[Call]) -> Path:
    with LogWriter.create(path / "log", SPEC, segment_bytes=1200) as writer:
        write(writer, calls)
    return path


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", episodes((5, 3, 9)))


def damage(run: Path, number: int = 1) -> None:
    path = run / "log" / f"segment-{number:06}.relodlog"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_sums_up(told, run):
    code, out, _ = told("info", run, "--json")
    assert code == EXIT_OK
    document = json.loads(out)
    assert (document["steps"], document["episodes"], document["return_median"]) == (17, 3, -5.0)
    code, out, _ = told("info", run)
    assert code == EXIT_OK
    assert "steps           17\n" in out


@pytest.mark.parametrize("command", [("info",), ("verify",), ("export", "--out", "exported")])
def test_a_folder_without_a_log_is_one_line_and_exit_code_3(told, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for folder, said in ((tmp_path / "none", "there is no folder"), (tmp_path, "holds no experience log")):
        code, out, err = told(command[0], folder, *command[1:])
        assert (code, out, err.count("\n")) == (EXIT_START, "", 1)
        assert said in err


def test_something_else_of_that_name_is_one_line_and_exit_code_3(told, tmp_path):
    (tmp_path / "segment-000001.relodlog").write_bytes(b"GIF89a")
    code, _, err = told("info", tmp_path)
    assert (code, err.count("\n")) == (EXIT_START, 1)
    assert "no segment of an experience log" in err


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_whole_log_has_no_faults(told, run):
    code, out, err = told("verify", run, "--json")
    assert (code, err) == (EXIT_OK, "")
    assert json.loads(out) == {"segments": 3, "steps": 17, "episodes": 3, "torn_bytes": 0, "faults": []}


def test_a_torn_end_is_said_and_is_no_fault(told, run):
    newest = max((run / "log").iterdir())
    newest.write_bytes(newest.read_bytes()[:-3])
    code, out, _ = told("verify", run)
    assert code == EXIT_OK
    (line,) = (line for line in out.splitlines() if line.startswith("torn_bytes"))
    assert int(line.split()[1]) > 0


def test_damage_is_exit_code_3_and_one_line(told, run):
    damage(run)
    code, out, err = told("verify", run, "--json")
    assert (code, err.count("\n")) == (EXIT_START, 1)
    assert "segment-000001.relodlog is damaged" in err
    assert json.loads(out)["faults"][0] in err
    code, out, _ = told("verify", run)
    assert code == EXIT_START
    assert "segment-000001.relodlog is damaged" in out


def faults_of(folder: Path, calls: list[Call]) -> list[str]:
    """The faults of a log with these calls, without where they are."""
    make_run(folder, calls)
    return [fault.split(": ", 2)[2] for fault in verify_log(folder / "log").faults]


FIRST, SECOND, LAST = (call[1] for call in episodes((2,)))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([FIRST, SECOND], None),
        ([FIRST, SECOND, LAST], None),
        ([FIRST, None, make_step(0, 5), make_end(0, 6, terminated=False)], None),
        ([None, make_end(4, 9)], None),
        ([SECOND], "episode 0 begins with index 1"),
        ([FIRST, make_step(0, 2, first_frame=2)], "index 2 of episode 0 follows index 0"),
        ([FIRST, FIRST], "index 0 of episode 0 follows index 0"),
        ([FIRST, make_step(1)], "episode 0 has no end"),
        ([LAST], "an end of episode 0 without its steps"),
        ([FIRST, SECOND, LAST, make_step(1, 4)], "episode 1 begins with index 4"),
        ([FIRST, make_end(3, 1)], "the end of episode 3 follows a step of episode 0"),
        ([FIRST, make_end(0, 1)], "episode 0: the last step and the end differ in `terminated`"),
    ],
)
def test_what_makes_no_sense_is_a_fault(tmp_path, messages, fault):
    faults = faults_of(tmp_path, [(0, message) for message in messages])
    assert faults == ([] if fault is None else [fault])


def test_an_end_that_says_something_else_is_a_fault(tmp_path):
    faults = faults_of(tmp_path, [(0, FIRST), (0, SECOND), (0, make_end(0, 3))])
    assert faults == ["episode 0 has 2 steps, and its end says 3", "episode 0 has return -2.0, and its end says -3.0"]


def test_vectors_and_frames_of_another_size_are_faults(tmp_path):
    make_run(tmp_path, [])
    path = tmp_path / "log" / "segment-000001.relodlog"
    step = make_step()
    spec = msgspec.structs.replace(SPEC, k=3, proprio_names=("x",))
    with LogWriter.create(tmp_path / "other", spec) as writer:
        writer.append(step, frames_of(0, step))
    faults = " ".join(verify_log(tmp_path / "other").faults)
    assert "frames has 2 entries and should have 3" in faults
    assert "proprio has 2 entries and should have 1" in faults
    bad = [pack_frame(0, n, EncodedFrame(captured_ns=0, data=b"few")) for n in (1, 2)]
    path.write_bytes(path.read_bytes() + b"".join(bad) + pack_message(0, step))
    assert len(verify_log(tmp_path / "log").faults) == 2


def test_the_start_of_a_bounded_log_may_be_in_mid_episode(tmp_path):
    with LogWriter.create(tmp_path / "log", SPEC, segment_bytes=1200, limit_bytes=2400) as writer:
        writer.keep_from(1000)
        write(writer, episodes((50,)))
    assert verify_log(tmp_path / "log").faults == []


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_writes_an_npz_per_episode_and_an_index(told, run, tmp_path):
    code, out, err = told("export", run, "--out", tmp_path / "out")
    assert (code, err) == (EXIT_OK, "")
    assert out.startswith("episodes: 3, in ")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["spec"]["task"] == "fake"
    assert [entry["name"] for entry in index["episodes"]] == [f"stream-0-episode-{n:06}" for n in range(3)]
    assert index["episodes"][1] == {
        "name": "stream-0-episode-000001",
        "stream": 0,
        "episode": 1,
        "first_index": 0,
        "steps": 3,
        "first_env_step": 5,
        "complete": True,
        "return": -3.0,
        "terminated": True,
        "success": True,
        "reason": "target reached",
    }
    with np.load(tmp_path / "out" / "stream-0-episode-000001.npz") as arrays:
        steps = [message for _, message in episodes((5, 3, 9)) if message.episode == 1]
        assert np.array_equal(arrays["proprio"], np.stack([step.proprio for step in steps[:-1]]))
        assert np.array_equal(arrays["last_proprio"], steps[-1].proprio)
        assert np.array_equal(arrays["frame_ids"], [step.frame_ids for step in steps[:-1]])
        assert np.array_equal(arrays["frame_captured_ns"], 100 * arrays["frame_ids"])
        assert np.array_equal(arrays["last_frame_ids"], steps[-1].frame_ids)
        assert arrays["terminated"].tolist() == [False, False, True]
        assert arrays["reward"].tolist() == [-1.0, -1.0, -1.0]
        assert arrays["policy_version"].tolist() == [[1, 10], [1, 11], [1, 12]]
        assert arrays["index"].tolist() == [0, 1, 2]
        assert (arrays["extras"].shape, arrays["action"].shape) == ((3, 0), (3, 1))


def test_export_writes_frames_as_png(told, run, tmp_path):
    code, _, _ = told("export", run, "--out", tmp_path / "out", "--frames", "png", "--episodes", "1:2")
    assert code == EXIT_OK
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("index.json", "stream-0-episode-000001", "stream-0-episode-000001.npz"),
    ]
    pictures = sorted((tmp_path / "out" / "stream-0-episode-000001").iterdir())
    with np.load(tmp_path / "out" / "stream-0-episode-000001.npz") as arrays:
        ids = sorted({*arrays["frame_ids"].ravel().tolist(), *arrays["last_frame_ids"].tolist()})
    assert [path.name for path in pictures] == [f"{frame_id:09}.png" for frame_id in ids]
    for frame_id, path in zip(ids, pictures, strict=True):
        assert np.array_equal(cv2.imread(str(path)), picture(0, frame_id))


def test_export_writes_a_video_at_the_tasks_rate(told, tmp_path):
    spec = msgspec.structs.replace(SPEC, codec="jpeg", image_hw=(48, 64))
    codec = make_codec("jpeg", image_hw=(48, 64))
    frame = EncodedFrame(captured_ns=0, data=codec.encode(np.full((48, 64, 3), 120, np.uint8)))
    with LogWriter.create(tmp_path / "log", spec) as writer:
        for _, message in episodes((6,)):
            write_one = writer.append if hasattr(message, "index") else writer.close_episode
            write_one(message, dict.fromkeys(message.frame_ids, frame))
    code, _, _ = told("export", tmp_path, "--out", tmp_path / "out", "--frames", "mp4")
    assert code == EXIT_OK
    video = cv2.VideoCapture(str(tmp_path / "out" / "stream-0-episode-000000.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(25.0)
    shown = 0
    while (read := video.read())[0]:
        shown += 1
        assert abs(float(read[1].mean()) - 120) < 5
    assert shown == 6 + 1  # each observation, the last one included
    video.release()


def test_a_cut_episode_becomes_a_file_for_each_stretch(told, tmp_path):
    calls = episodes((4,))
    run = make_run(tmp_path / "run", [*calls[:2], (0, None), *calls[3:], *episodes((1,), stream=2)[:1]])
    code, out, _ = told("export", run, "--out", tmp_path / "out", "--json")
    assert code == EXIT_OK
    entries = json.loads(out)["episodes"]
    found = [(e["name"], e["first_index"], e["steps"], e["complete"], e["return"]) for e in entries]
    assert found == [
        ("stream-0-episode-000000", 0, 2, False, None),
        ("stream-0-episode-000000-2", 3, 1, True, -4.0),
        ("stream-2-episode-000000", 0, 1, False, None),
    ]


def test_export_saves_what_is_whole_of_a_damaged_log(told, run, tmp_path):
    damage(run)
    code, out, _ = told("export", run, "--out", tmp_path / "out", "--json")
    assert code == EXIT_OK
    document = json.loads(out)
    assert len(document["damage"]) == 1
    assert sum(entry["steps"] for entry in document["episodes"]) == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--frames", "gif"), "--frames gif is not known; give one of png, mp4, none"),
        (("--episodes", "3"), "--episodes 3 is no range"),
        (("--episodes", "5:5"), "--episodes 5:5 is no range"),
        (("--episodes", "a:b"), "--episodes a:b is no range"),
    ],
)
def test_words_that_mean_nothing_are_exit_code_2(told, run, tmp_path, arguments, said):
    code, _, err = told("export", run, "--out", tmp_path / "out", *arguments)
    assert (code, err.count("\n")) == (EXIT_SETTINGS, 1)
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("span", "found"), [("1:", [1, 2]), (":1", [0]), (":", [0, 1, 2])])
def test_either_end_of_a_range_of_episodes_may_be_left_out(told, run, tmp_path, span, found):
    _, out, _ = told("export", run, "--out", tmp_path / "out", "--episodes", span, "--json")
    assert [entry["episode"] for entry in json.loads(out)["episodes"]] == found


def test_a_folder_with_something_in_it_is_not_written_to(told, run, tmp_path):
    code, _, err = told("export", run, "--out", tmp_path)
    assert (code, err.count("\n")) == (EXIT_SETTINGS, 1)
    assert "is not empty" in err
