"""One typed tree of settings: defaults, then a TOML file, then RELOD_A__B, then --set a.b=c.

A setting is written once, with type, bounds, unit and default; the command line, the file, the environment and
`relod settings` all derive from it. The runtime's sections are here. The sections `task`, `robot`, `sim` and
`agent` belong to the chosen task, robot and algorithm, which hand their types to `load`.

Hardware (a robot's address, a camera) is not a setting: it is only ever named on the command line.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .errors import SettingsError, StartError

__all__ = ["Section", "Settings", "describe", "flatten", "load", "to_dict", "to_toml"]

ENV_PREFIX = "RELOD_"


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section of settings: immutable, by keyword, unknown keys are errors."""


class RunSettings(Section, frozen=True):
    """What a run is."""

    seed: Annotated[int, Meta(ge=0, description="of every random stream of the run")] = 0
    steps: Annotated[int, Meta(ge=0, description="environment steps; 0 = no limit")] = 0
    minutes: Annotated[float, Meta(ge=0, description="of experience time; 0 = no limit")] = 0.0
    folder: Annotated[str, Meta(description="where run folders are made")] = "runs"
    metrics_every_s: Annotated[float, Meta(gt=0, description="time between two lines of metrics.jsonl")] = 5.0
    record: Annotated[bool, Meta(description="keep every input of the cycle, for `relod replay`")] = False
    realtime: Annotated[
        bool, Meta(description="real-time priority and locked memory for the processes between senses and motors")
    ] = False
    tensorboard: Annotated[bool, Meta(description="write TensorBoard events too (needs relod[tb])")] = False


class SafetySettings(Section, frozen=True):
    """When the robot stops by itself."""

    command_timeout_ms: Annotated[
        float, Meta(gt=0, le=1000, description="age of a command at which the device process stops the robot")
    ] = 200.0
    max_sensor_age_ms: Annotated[
        float,
        Meta(gt=0, le=5000, description="age of the newest sensor packet at which the cycle commands a stop"),
    ] = 250.0
    max_frame_age_ms: Annotated[
        float, Meta(gt=0, le=5000, description="age of the newest frame at which the cycle commands a stop")
    ] = 500.0
    stall_limit_s: Annotated[
        float, Meta(gt=0, description="how long sensors or camera may stay away before the run ends")
    ] = 20.0
    # A held action is repeated, and recorded as what was done.
    max_unanswered: Annotated[
        int, Meta(ge=1, le=10, description="cycles in a row for which an action is held while the learner is silent")
    ] = 2
    max_restarts: Annotated[int, Meta(ge=0, description="restarts of one child process before the run ends")] = 5


class CameraSettings(Section, frozen=True):
    """How a camera is read."""

    fps: Annotated[float, Meta(gt=0, le=240, description="frames per second to ask for")] = 30.0
    read_timeout_s: Annotated[
        float, Meta(gt=0, le=10, description="how long a read may take before the camera counts as stalled")
    ] = 0.5
    reopen_s: Annotated[float, Meta(gt=0, description="pause between attempts to open it again")] = 0.25
    latency_ms: Annotated[
        float, Meta(ge=0, le=500, description="capture to arrival, for sources that do not stamp frames")
    ] = 0.0


class LearnerSettings(Section, frozen=True):
    """How the update worker runs; the algorithm's own settings are in `agent`."""

    device: Annotated[str, Meta(description="torch device of the worker, or auto")] = "auto"
    threads: Annotated[int, Meta(ge=0, le=256, description="torch threads of the worker; 0 = one per core")] = 0
    # Two limits beside the algorithm's own cap. Both make a machine learn as a slower one would, as the paper did to
    # emulate a Jetson Nano; the second also leaves power and cooling to others.
    update_every_steps: Annotated[
        float, Meta(ge=0, le=1_000_000, description="environment steps per update, at least; 0 = as the algorithm says")
    ] = 0.0
    max_updates_per_s: Annotated[float, Meta(ge=0, le=10_000, description="limit on updates per second; 0 = none")] = (
        0.0
    )
    publish_every_s: Annotated[float, Meta(gt=0, description="least time between two published policies")] = 1.0
    checkpoint_every_s: Annotated[float, Meta(gt=0, description="time between checkpoints")] = 60.0


class ReplaySettings(Section, frozen=True):
    """The transitions updates are drawn from."""

    capacity: Annotated[int, Meta(ge=512, description="steps kept; the oldest are overwritten")] = 100_000
    memory_mib: Annotated[
        int,
        Meta(ge=0, le=1 << 30, description="memory it may take, in MiB; 0 = 60 % of what is available at the start"),
    ] = 0


class LogSettings(Section, frozen=True):
    """The experience log, the record a run is resumed from."""

    # 160x120 pixels raw are 78 kB a step, 6.2 GB an hour. JPEG is a tenth of it; what it loses, the actor loses too.
    codec: Annotated[Literal["raw", "jpeg"], Meta(description="how frames are kept and sent")] = "raw"
    jpeg_quality: Annotated[int, Meta(ge=1, le=100, description="of log.codec jpeg")] = 90
    segment_mib: Annotated[float, Meta(ge=1, le=4096, description="size of one file, in MiB")] = 64.0
    limit_gib: Annotated[
        float, Meta(gt=0, description="size of all files, in GiB; the oldest that the replay can spare are deleted")
    ] = 16.0


class LinkSettings(Section, frozen=True):
    """The robot's end of the link to a learner."""

    wait_s: Annotated[
        float, Meta(ge=0, description="how long to wait for a learner, at the start or one that vanished")
    ] = 300.0
    # Four pings go unanswered before a link counts as cut: 1 s, of which a busy WiFi's stalls take a half.
    ping_every_s: Annotated[float, Meta(gt=0, le=10, description="time between two pings")] = 0.25
    silence_s: Annotated[float, Meta(gt=0, le=60, description="silence after which the link counts as cut")] = 1.0
    retry_s: Annotated[float, Meta(gt=0, le=60, description="longest pause between two attempts to connect")] = 0.3
    outbox_mib: Annotated[
        float, Meta(ge=1, description="experience not yet acknowledged that is kept in memory, in MiB")
    ] = 128.0
    spool_gib: Annotated[
        float, Meta(ge=0, description="experience beyond that which is kept on disk, in GiB; then the robot waits")
    ] = 4.0
    drain_s: Annotated[float, Meta(ge=0, description="how long the end of a run waits for its last acks")] = 30.0
    policy_sync: Annotated[
        Literal["step", "episode"], Meta(description="when a newer policy is applied: at any step, or between episodes")
    ] = "step"


class ServerSettings(Section, frozen=True):
    """The learner's end of the links."""

    max_robots: Annotated[int, Meta(ge=1, le=1024, description="robots connected at a time")] = 32
    max_connections: Annotated[int, Meta(ge=1, description="connections at a time, robots or not")] = 128
    hello_s: Annotated[float, Meta(gt=0, le=60, description="time a client has to say who it is")] = 5.0
    silence_s: Annotated[float, Meta(gt=0, le=60, description="silence after which a robot counts as gone")] = 2.0
    max_mib_per_s: Annotated[float, Meta(gt=0, description="most a robot may send, in MiB/s on average over 10 s")] = (
        200.0
    )
    # Robots only run a policy. Half precision moved the actions of trained ones, in [-1, 1], by 0.0005 at p99 and 0.002
    # at most, where their own noise moves them by 0.15 (`benchmarks/precision.py`), and halves the bytes.
    precision: Annotated[Literal["float16", "float32"], Meta(description="of the policies sent to robots")] = "float16"


class Settings(Section, frozen=True):
    """All settings of a run. `task`, `robot`, `sim`, `agent` are Sections of the chosen rooms."""

    run: RunSettings = RunSettings()
    safety: SafetySettings = SafetySettings()
    camera: CameraSettings = CameraSettings()
    learner: LearnerSettings = LearnerSettings()
    replay: ReplaySettings = ReplaySettings()
    log: LogSettings = LogSettings()
    link: LinkSettings = LinkSettings()
    server: ServerSettings = ServerSettings()
    task: Any = Section()
    robot: Any = Section()
    sim: Any = Section()
    agent: Any = Section()


ROOM_SECTIONS = ("task", "robot", "sim", "agent")


def load(
    sections: Mapping[str, type[Section]],
    *,
    presets: Sequence[Mapping[str, Any]] = (),
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    assignments: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolve the settings; later sources win.

    Args:
        sections: types of the sections that belong to the rooms, by name.
        presets: trees of values to start from, for example an algorithm's preset.
        file: TOML file.
        environment: variables; those named RELOD_A__B set a.b.
        assignments: "a.b=value" texts.
        overrides: dotted names to values, from the command line's own flags.

    Raises:
        SettingsError: unknown name, wrong type, value out of bounds.
        StartError: the file cannot be read.
    """
    types = _section_types(sections)
    tree: dict[str, Any] = {name: {} for name in types}
    for preset in presets:
        _merge(tree, preset, types, "the preset")
    if file is not None:
        _merge(tree, _read_toml(file), types, str(file))
    for name, text in sorted((environment or {}).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            _assign(tree, name[len(ENV_PREFIX) :].lower().replace("__", "."), text, types, f"environment {name}")
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r} has no '='", "write it as section.name=value")
        _assign(tree, dotted.strip(), text.strip(), types, f"--set {assignment}")
    for dotted, value in (overrides or {}).items():
        _assign(tree, dotted, value, types, f"the option for {dotted}")
    values: dict[str, Any] = {name: _convert(name, types[name], tree[name]) for name in types}
    return Settings(**values)


def _section_types(sections: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    hints = get_type_hints(Settings)
    types = {name: hints[name] for name in Settings.__struct_fields__ if name not in ROOM_SECTIONS}
    return {**types, **{name: sections.get(name, Section) for name in ROOM_SECTIONS}}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise StartError(f"settings file {file}: {error.strerror}", "check the path given to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {file} is not TOML: {error}") from error


def _merge(
    tree: dict[str, Any], values: Mapping[str, Any], types: Mapping[str, Any], source: str, prefix: str = ""
) -> None:
    for name, value in values.items():
        dotted = prefix + name
        if isinstance(value, Mapping) and _lookup(dotted, types, sections=True):
            _merge(tree, value, types, source, f"{dotted}.")
        else:
            _assign(tree, dotted, value, types, source)


def _assign(tree: dict[str, Any], dotted: str, value: Any, types: Mapping[str, Any], source: str) -> None:
    if not _lookup(dotted, types):
        raise SettingsError(f"unknown setting {dotted!r} ({source})", _what_was_meant(dotted, types))
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _what_was_meant(dotted: str, types: Mapping[str, Any]) -> str:
    """A hint for a name that is no setting."""
    section = dotted.partition(".")[0]
    if section in types and not types[section].__struct_fields__:
        return f"there are no settings {section}.* here: agent.* is the learner's, task.* and robot.* are the robot's"
    known = [name for name, _, _ in _walk(types)]
    inside = [name for name in known if name.startswith(f"{dotted}.")]
    if inside:
        return f"{dotted} is a section; set one of its settings, for example {inside[0]}"
    close = difflib.get_close_matches(dotted, types, n=1, cutoff=0.6) if "." not in dotted else []  # a section
    close = close or difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
    close = close or [name for name in known if name.rpartition(".")[2] == dotted.rpartition(".")[2]]
    if close:
        return f"did you mean {close[0]}?"
    return "`relod settings` lists all settings"


def _lookup(dotted: str, types: Mapping[str, Any], *, sections: bool = False) -> bool:
    """Whether `dotted` names a setting, or with `sections` a section."""
    hint: Any = None
    fields: Mapping[str, Any] = types
    for name in dotted.split("."):
        if name not in fields:
            return False
        hint = fields[name]
        fields = get_type_hints(hint, include_extras=True) if _is_section(hint) else {}
    return _is_section(hint) == sections


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _walk(types: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, type[Section]]]:
    """Every setting as (dotted name, its hint, the section it is in)."""
    for section, kind in types.items():
        hints = get_type_hints(kind, include_extras=True)
        for name in kind.__struct_fields__:
            if _is_section(hints[name]):
                yield from _walk({name: hints[name]}, f"{prefix}{section}.")
            else:
                yield f"{prefix}{section}.{name}", hints[name], kind


def _convert(prefix: str, kind: type[Section], values: dict[str, Any]) -> Section:
    converted: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        if _is_section(hints[name]):
            converted[name] = _convert(f"{prefix}.{name}", hints[name], value)
            continue
        try:
            converted[name] = msgspec.convert(_from_text(value, hints[name]), hints[name], strict=False)
        except msgspec.ValidationError as error:
            meaning = f"{prefix}.{name} is {_describe_hint(hints[name])}"
            raise SettingsError(f"{prefix}.{name} = {value!r}: {error}", meaning) from error
    return kind(**converted)


def _from_text(value: Any, hint: Any) -> Any:
    """Lists and tables come from the command line and the environment as TOML; other texts convert by type."""
    if isinstance(value, str) and value[:1] in "[{" and _bare_type(hint) is not str:
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            return value
    return value


def _bare_type(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _describe_hint(hint: Any) -> str:
    """Type, bounds and meaning of a setting, in a line."""
    bare, metas = _bare_type(hint), [m for m in get_args(hint)[1:] if isinstance(m, Meta)]
    words = [_type_name(bare)]
    for meta in metas:
        bounds = ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))
        words += [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
    text = next((m.description for m in metas if m.description), "")
    return ", ".join(words) + (f": {text}" if text else "")


def _type_name(bare: Any) -> str:
    """A type as a user writes its values: a | b for choices, [int, ...] for lists."""
    arguments = get_args(bare)
    if get_origin(bare) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(bare) is tuple:
        return "[" + ", ".join("..." if a is ... else _type_name(_bare_type(a)) for a in arguments) + "]"
    return str(bare) if arguments else getattr(bare, "__name__", str(bare))


def describe(sections: Mapping[str, type[Section]]) -> Iterator[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, description)."""
    types = _section_types(sections)
    defaults = {name: kind() for name, kind in types.items()}
    for dotted, hint, _ in _walk(types):
        section, *path = dotted.split(".")
        value: Any = defaults[section]
        for name in path:
            value = getattr(value, name)
        yield dotted, value, _describe_hint(hint)


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings as plain values."""
    return msgspec.to_builtins(settings)  # type: ignore[no-any-return]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree of settings, as `to_dict` gives it or a file holds it, with its dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that `load` reads back to the same values."""
    lines: list[str] = []
    for section, values in to_dict(settings).items():
        lines += _toml_table(section, values)
    return "\n".join(lines)


def _toml_table(name: str, values: dict[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in plain.items()), ""] if plain else []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _toml_table(f"{name}.{key}", value)
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")  # JSON allows it bare, TOML does not
    return repr(value)
