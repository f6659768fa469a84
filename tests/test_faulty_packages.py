"""Packages at fault: each is named in one line, with the documented exit code, and the robot stands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from relod.algos.checked import rehearse_learner, rehearse_policy
from relod.config import load
from relod.errors import (
    EXIT_LINK,
    EXIT_OK,
    EXIT_SAFETY,
    EXIT_SETTINGS,
    EXIT_START,
    PackageError,
    RelodError,
    SettingsError,
)
from relod.packages import Slowness
from relod.robots import registry
from relod.runtime.modes import run_robot
from relod.runtime.stack import parse_place
from relod.testing.agent import SPEC
from tests.commands import Command, emulator, learner, robot, stood_after_ms
from tests.fakes import small_request

ROOT = Path(__file__).parents[1]


def one_line(error: RelodError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


# -- algorithms, before anything moves ---------------------------------------------------------------------------------


def begin(fault: str) -> None:
    """What is done with an algorithm before a robot moves."""
    algorithm = registry.algorithm(f"tests.faulty:{fault}")
    settings = load({"agent": algorithm.settings_type}).agent
    rehearse_policy(algorithm, SPEC, settings)
    rehearse_learner(algorithm, SPEC, settings, device=torch.device("cpu"), whole_frames=False)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("a_class", "is the class tests.faulty.Algorithm, not an object of it"),
        ("a_text", "builtins.str has no attribute 'settings_type'"),
        ("lacks_presets", "has no attribute 'presets'"),
        ("lacks_methods", "has no method needs()"),
        ("other_signature", "build_learner(spec, settings) is called with 2 arguments and seed, device"),
        ("presets_empty", "tests.faulty.Algorithm.presets is empty"),
        ("presets_a_list", "presets is ['faulty']"),
        ("presets_flat", "presets is {'faulty': {'agent': 3}}"),
        ("settings_a_dict", "settings_type is <class 'dict'>, not a relod.config.Section"),
        ("settings_demanding", "Missing required argument 'size'"),
        ("needs_raises", "tests.faulty.Algorithm.needs raised AttributeError: no such setting (faulty.py line"),
        ("needs_a_dict", "Algorithm.needs returned {}, not relod.algos.agent.Needs"),
        ("actor_raises", "Algorithm.build_actor raised TypeError: cannot build (faulty.py line"),
        ("actor_none", "Algorithm.build_actor returned None, not a torch.nn.Module"),
        ("learner_raises", "Algorithm.build_learner raised TypeError"),
        ("learner_lacks_methods", "builtins.object has no method update()"),
        ("act_none", "tests.faulty.Policy.forward returned None, not actions and extras"),
        ("act_without_extras", "not actions and extras"),
        ("act_numpy", "as actions, which is no tensor"),
        ("act_short", "returned actions of (1, 1) float32, not (1, 2) float32"),
        ("act_flat", "returned actions of (2,) float32"),
        ("act_double", "returned actions of (1, 2) float64"),
        ("act_nan", "not finite for a random observation"),
        ("act_large", "an action of 7, outside [-1, 1]"),
        ("act_more_extras", "returned extras of (1, 1) float32, not (1, 0) float32"),
        ("extras_missing", "returned extras of (1, 0) float32, not (1, 3) float32"),
        ("act_raises", "Policy.forward raised ValueError: no such thing (faulty.py line"),
        ("policy_none", "Learner.policy returned None"),
        ("policy_other", "build_actor's policy has ('head.weight', (2, 3)), and the learner's ('head.weight', (3, 3))"),
        ("update_raises", "tests.faulty.Learner.update raised RuntimeError: bad update (faulty.py line"),
        ("metrics_none", "Learner.metrics returned None, not a dict"),
        ("metrics_text", "says that 'loss' is 'much', which is no number"),
        ("metrics_vector", "says that 'loss' is tensor([0., 0., 0.]), which is no number"),
        ("metrics_raise", "Learner.metrics raised KeyError: 'loss'"),
        ("state_none", "Learner.state returned None"),
        ("state_number", "holds 1.0 as 'x', which is no tensor"),
        ("state_without_policy", "policy.head.weight, a (2, 3) tensor of the policy, is missing"),
        ("load_raises", "Learner.load_state raised KeyError: 'weights'"),
        ("load_nothing", "load_state does not restore 'policy.head.bias': the run could not be resumed"),
    ],
)
def test_an_algorithm_at_fault_is_named_before_anything_moves(fault: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        begin(fault)
    assert told in one_line(caught.value)
    assert caught.value.hint


def test_a_sound_algorithm_passes_and_leaves_the_random_numbers_as_they_were() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    begin("sound")
    assert torch.equal(torch.rand(3), wanted)


def test_a_state_gets_memory_of_its_own_where_a_file_needs_that() -> None:
    algorithm = registry.algorithm("tests.faulty:state_shared")
    settings = load({"agent": algorithm.settings_type}).agent
    state = algorithm.build_learner(SPEC, settings, seed=0, device=torch.device("cpu")).state()
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise ValueError('no licence')", "raised ValueError: no licence (broken"),
        ("def f(:", "raised SyntaxError: invalid syntax"),
        ("raise SystemExit(0)", "raised SystemExit: 0 (broken"),
        ("from relod.algos import nothing", "raised ImportError: cannot import name 'nothing'"),
    ],
)
def test_a_module_that_fails_at_its_import_is_named(tmp_path, monkeypatch, request, text, told) -> None:
    name = f"broken{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for look_up in (registry.algorithm, registry.task):
        with pytest.raises(SettingsError) as caught:
            look_up(f"{name}:X")
        assert told in one_line(caught.value)
        assert f"importing {name}" in str(caught.value)


# -- in a run ----------------------------------------------------------------------------------------------------------

TINY = ("task.camera_height=24", "task.camera_width=32", "task.image_height=24", "task.image_width=32")


def run(folder: Path, *, task: str = "track", algorithm: str = "tests.faulty:sound", steps: int = 120):
    """A run of the faulty algorithm or robot in virtual time."""
    request = small_request(folder, task=task, algorithm=algorithm, preset=None)
    sizes = (*TINY, "task.episode_steps=25", "replay.capacity=1024", f"run.folder={folder}", "learner.threads=1")
    return run_robot(
        type(request)(
            **{name: getattr(request, name) for name in request.__dataclass_fields__ if name not in ("assignments",)}
            | {"assignments": sizes, "overrides": {"run.steps": steps, "run.seed": 0}}
        )
    )


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("act_raises_late", "tests.faulty.Policy.forward raised ValueError: no such thing (faulty.py line"),
        ("update_raises_late", "tests.faulty.Learner.update raised RuntimeError: bad update (faulty.py line"),
        ("update_nan", "learning diverged: loss is nan again"),
        ("act_nan_late", "not finite 25 times in a row; the robot stood"),
    ],
)
def test_an_algorithm_at_fault_in_a_run_ends_it(tmp_path: Path, fault: str, told: str) -> None:
    result = run(tmp_path, algorithm=f"tests.faulty:{fault}", steps=300)
    assert result.exit_code == EXIT_SAFETY
    assert told in one_line(result.error)
    assert result.summary["stopped_cleanly"] is True


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("build_raises", "tests.faulty.Build raised ValueError: no such task (faulty.py line"),
        ("build_none", "builtins.NoneType.spec is missing"),
        ("limits_short", "FaultyTask.limits must hold 3 values each"),
        ("lacks_judge", "FaultyTask has no method judge()"),
        ("without_sim", "the task's settings lack the section 'sim'"),
    ],
)
def test_a_task_at_fault_is_named_before_anything_moves(tmp_path: Path, fault: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run(tmp_path, task=f"tests.faulty:track_{fault}")
    assert told in one_line(caught.value)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("proprio_raises", "tests.faulty.FaultyTask.proprioception raised IndexError"),
        ("proprio_nan", "FaultyTask.proprioception says that 'y_mm' is nan"),
        ("proprio_short", "proprioception returned (11,) float32, not an array (12,) float32"),
        ("proprio_double", "proprioception returned (12,) float64"),
        ("proprio_a_list", "proprioception returned a builtins.list"),
        ("judge_raises", "FaultyTask.judge raised ZeroDivisionError: by nothing (faulty.py line"),
        ("judge_nan", "FaultyTask.judge gave a reward of nan in step 0"),
        ("judge_none", "FaultyTask.judge returned None, not a relod.types.Outcome"),
        ("judge_text", "FaultyTask.judge gave a reward of 'much'"),
        ("command_raises", "FaultyTask.command raised KeyError: 'speed'"),
        ("command_nan", "FaultyTask.command or reset gave a command that is not finite 25 times in a row"),
        ("command_short", "FaultyTask.command gave (0.0,), not a tuple of 3 values"),
        ("command_a_tuple", "FaultyTask.command gave (0.0, 0.0, 0.0), not a relod.types.Command"),
        ("reset_none", "FaultyTask.reset returned None, not a generator"),
        ("reset_raises", "FaultyTask.reset raised IndexError: no such place"),
        ("reset_yields_numbers", "FaultyTask.reset gave 0, not a relod.types.Command"),
        ("world_narrow", "FaultyWorld.advance gave a packet of"),
    ],
)
def test_a_task_at_fault_in_a_run_ends_it(tmp_path: Path, fault: str, told: str) -> None:
    result = run(tmp_path, task=f"tests.faulty:track_{fault}", steps=60)
    assert result.exit_code == EXIT_SAFETY
    assert told in one_line(result.error)
    assert isinstance(result.error, PackageError)


def test_slow_calls_are_told_of_at_first_and_every_ten_seconds() -> None:
    slowness = Slowness(40_000_000, "it waits")
    assert slowness.note("a.b", 40_000_000, 0) == ""
    assert slowness.note("a.b", 41_000_000, 0) == "a.b took 41 ms, and a cycle has 40 ms (so far 1 times): it waits"
    assert slowness.note("a.b", 90_000_000, 10_000_000_000) == ""
    assert "(so far 3 times)" in slowness.note("a.b", 50_000_000, 10_000_000_001)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    result = run(tmp_path, task="tests.faulty:track_judge_numpy", steps=60)
    assert result.exit_code == 0, result.error
    assert result.summary["returns"][0] == -25.0


def test_a_stack_tells_where_the_main_thread_is() -> None:
    relod = ROOT / "relod"
    text = f"""Thread 0x01 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 331 in wait

Current thread 0x02 (most recent call first):
  File "/lab/mine.py", line 12 in forward
  File "{relod}/algos/agent.py", line 300 in act
  File "{relod}/runtime/processes.py", line 50 in child_main
"""
    assert parse_place(text) == "forward() (mine.py line 12)"
    assert parse_place("nothing") == ""


# -- whole processes ---------------------------------------------------------------------------------------------------

WALL = ("--set", "run.metrics_every_s=0.25")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("act_raises_late", "tests.faulty.Policy.forward raised ValueError: no such thing (faulty.py line"),
        ("act_hangs_late", "nothing heard of the control process for 2 s: it hangs in forward() (faulty.py line"),
    ],
)
def test_an_actor_at_fault_in_mid_motion_leaves_the_robot_standing(tmp_path, faulty, fault: str, told: str) -> None:
    with (
        emulator(tmp_path) as world,
        robot(
            tmp_path,
            *("--algo", f"tests.faulty:{fault}", "--robot", world.port, "--camera", world.camera_url, *WALL),
            *("--set", "safety.stall_limit_s=2"),
            quick=(),
        ) as command,
    ):
        assert command.wait() == EXIT_SAFETY, command.messages()
        assert told in command.messages()
        assert "Traceback" not in command.messages()
        assert command.result()["stopped_cleanly"] is True
        log = world.stop()
    assert any(abs(record["left_mm_s"]) > 50 for record in log), "it never moved"
    stood_after_ms(log, 0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_actor_that_takes_longer_than_a_cycle_is_named(tmp_path, faulty) -> None:
    slow = ("--task", "track", "--algo", "tests.faulty:act_slow_late", "--steps", "90", *WALL)
    with robot(tmp_path, *slow, quick=()) as command:
        assert command.wait() == EXIT_OK, command.messages()
        assert "control: tests.faulty.Policy.forward took " in command.messages()


@contextlib.contextmanager
def asking(
    folder: Path, fault: str, *arguments: str, taught: tuple[str, ...] = ()
) -> Iterator[tuple[Command, Command]]:
    """A learner with a policy at fault, and a robot in remote-only that asks it."""
    with (
        learner(folder, "--algo", f"tests.faulty:{fault}", *taught, name="-learner", quick=WALL) as teacher,
        robot(
            folder, *("--task", "track", "--mode", "remote-only", "--learner", teacher.url), *arguments, quick=WALL
        ) as command,
    ):
        yield teacher, command


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_learner_whose_actor_fails_ends_and_its_robot_stands(tmp_path, faulty) -> None:
    with asking(tmp_path, "act_raises_late", "--set", "link.wait_s=1") as (teacher, command):
        assert teacher.wait() == EXIT_SAFETY, teacher.messages()
        assert "tests.faulty.Policy.forward raised ValueError: no such thing (faulty.py line" in teacher.messages()
        assert command.wait() == EXIT_LINK, command.messages()
        assert command.result()["stopped_cleanly"] is True
        for each in (teacher, command):
            assert "Traceback" not in each.messages()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_learner_whose_actor_hangs_ends_and_its_robot_stands(tmp_path, faulty) -> None:
    impatient = ("--set", "link.silence_s=1", "--set", "link.wait_s=1")
    with asking(tmp_path, "act_hangs_late", *impatient, taught=("--set", "safety.stall_limit_s=2")) as (
        teacher,
        command,
    ):
        assert teacher.wait() == EXIT_SAFETY, teacher.messages()
        assert "relod: the learner hangs in forward() (faulty.py line" in teacher.messages()
        assert command.wait() == EXIT_LINK, command.messages()
        assert command.result()["stopped_cleanly"] is True


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_learner_names_an_actor_that_takes_longer_than_a_cycle(tmp_path, faulty) -> None:
    with asking(tmp_path, "act_slow_late", "--steps", "90") as (teacher, command):
        assert command.wait() == EXIT_OK, command.messages()
        assert "tests.faulty.Policy.forward took " in teacher.messages()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["remote-local", "remote-only"])
def test_a_learner_refuses_a_robot_with_what_is_wrong_of_its_algorithm(tmp_path, faulty, mode: str) -> None:
    algo = ("--algo", "tests.faulty:act_short")
    with learner(tmp_path, *algo, name="-learner", quick=WALL) as teacher:
        own = algo if mode == "remote-local" else ()
        with robot(tmp_path, "--task", "track", "--mode", mode, *own, "--learner", teacher.url, quick=WALL) as command:
            assert command.wait() == EXIT_SETTINGS, command.messages()
            assert "tests.faulty.Policy.forward returned actions of (1, 1) float32" in command.messages()
            assert "Traceback" not in command.messages()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("driver_unbuilt", EXIT_START, "tests.faulty.driver_unbuilt raised TypeError: no SDK"),
        ("driver_unopened", EXIT_START, "driver_unopened.open raised RuntimeError: SDK says 17 (faulty.py line"),
        ("driver_narrow", EXIT_START, "driver_narrow published a packet of"),
        ("driver_refuses", EXIT_SAFETY, "driver_refuses.command raised KeyError: 'speed' (faulty.py line"),
    ],
)
def test_a_driver_at_fault_is_named(tmp_path, faulty, fault: str, code: int, told: str) -> None:
    with robot(
        tmp_path,
        *("--task", f"tests.faulty:track_{fault}", "--algo", "tests.faulty:sound", *WALL),
        *("--set", "safety.max_restarts=0"),
        quick=(),
    ) as command:
        assert command.wait() == code, command.messages()
        assert told in command.messages()
        assert "Traceback" not in command.messages()
