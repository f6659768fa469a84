"""Checkpoints: what a learner needs to go on, in one file that is complete, checked and the same for the same state.

A file is safetensors with one entry of metadata, a JSON object: `format`, `digest` (BLAKE2b of the counters, and of
every tensor with its name, type and shape) and `counters`. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import StartError
from .plan import LearnerPlan
from .rundir import disk_errors, write_atomic

__all__ = [
    "CHECKPOINTS",
    "FORMAT",
    "KEPT",
    "PUBLISHED_POLICY",
    "Checkpoint",
    "Counters",
    "Found",
    "find_checkpoint",
    "first_not_finite",
    "good_checkpoints",
    "newest_readable",
    "read_checkpoint",
    "write_checkpoint",
]

CHECKPOINTS = "checkpoints"  # within a run's folder
FORMAT = 1
KEPT = 2  # the newest, and the one before it in case the newest is found damaged
PUBLISHED_POLICY = "published_policy"  # the flat policy `(size,) float32` that acted; absent before the first
METADATA = "relod"  # the one entry: safetensors writes several in any order, and equal states would differ in bytes


class Counters(TypedDict):
    """What a checkpoint holds beside tensors."""

    updates: int
    env_steps: int
    epoch: int
    published: int  # update count of the policy in force; -1 before the first
    published_ns: int  # when it was published, on the loop's clock
    rate_ns: int  # state of the rate limit, on the loop's clock
    rollbacks: int
    rng: dict[str, Any]  # of the draws from the replay
    extra: dict[str, Any]  # the caller's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The learner's tensors by name, with `published_policy`, and the counters."""

    tensors: dict[str, Tensor]
    counters: Counters


class _Format(msgspec.Struct, frozen=True, kw_only=True):
    """What every format of a checkpoint has said and will say."""

    format: int


class _Header(_Format, frozen=True, kw_only=True):
    digest: str
    counters: msgspec.Raw


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `learner-UPDATES.safetensors`; complete or not there at all.

    Afterwards the one before it is kept, and no other: those of more updates belong to a way that was given up.

    Raises:
        SafetyStop: the disk is full or cannot be written; the checkpoints that were there remain.
    """
    counters = msgspec.json.encode(checkpoint.counters, order="deterministic")
    header = _Header(format=FORMAT, digest=_digest(checkpoint.tensors, counters), counters=msgspec.Raw(counters))
    path = folder / f"learner-{checkpoint.counters['updates']:09d}.safetensors"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(checkpoint.tensors, {METADATA: msgspec.json.encode(header).decode()}))
        found = good_checkpoints(folder)
        newest = found.index(path)
        for other in (*found[:newest], *found[newest + KEPT :]):
            other.unlink()
    return path


def good_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first; whether they can be read, only reading them shows."""
    return sorted(folder.glob("learner-*.safetensors"), reverse=True)


class Found(NamedTuple):
    """The newest checkpoint that can be read, None where there is none, and what was wrong with newer ones."""

    checkpoint: Checkpoint | None
    path: Path | None
    problems: list[str]


def newest_readable(place: Path) -> Found:
    """Read the newest readable checkpoint of a folder; `place` may be a single checkpoint too.

    Raises:
        StartError: there are checkpoints, but none that can be read.
    """
    problems: list[str] = []
    for path in [place] if place.is_file() else good_checkpoints(place):
        try:
            return Found(read_checkpoint(path), path, problems)
        except StartError as error:
            problems.append(error.message)
    if problems:
        raise StartError("; ".join(problems), "none is left to go on from")
    return Found(None, None, [])


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; `StartError` when it is missing, damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA, "")
            _check_format(path, text)
            header = msgspec.json.decode(text, type=_Header)
            counters = msgspec.json.decode(header.counters, type=Counters)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except StartError:
        raise
    except Exception as error:  # safetensors raises its own kinds, OSError, RuntimeError
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else f"damaged: {error}"
        raise _unreadable(path, problem) from error
    if header.digest != _digest(tensors, bytes(header.counters)):
        raise _unreadable(path, "damaged: its content does not match its digest")
    wrong = first_not_finite(tensors)
    if wrong is not None:
        raise _unreadable(path, f"{wrong} is not finite")
    return Checkpoint(tensors=tensors, counters=counters)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a NaN or an infinity in it, or None."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)


def _check_format(path: Path, text: str) -> None:
    found = msgspec.json.decode(text, type=_Format).format if text else None
    if found != FORMAT:
        told = "no number of its format" if found is None else f"format {found}"
        raise StartError(
            f"checkpoint {path} has {told}; this version of relod reads format {FORMAT}",
            "use the version of relod that wrote it; run.json names it",
        )


def _unreadable(path: Path, problem: str) -> StartError:
    return StartError(f"checkpoint {path}: {problem}", "give the path of another learner-*.safetensors file")


def _digest(tensors: Mapping[str, Tensor], counters: bytes) -> str:
    """Safetensors checks no content: a flipped bit would become a weight."""
    digest = hashlib.blake2b(counters, digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_checkpoint(plan: LearnerPlan) -> Checkpoint | None:
    """What a resumed run's learner goes on from; None when the run is new, or ended before its first checkpoint.

    Raises:
        StartError: no checkpoint can be read, or the newest is of another run.
    """
    if plan.resume is None:
        return None
    checkpoint, path, problems = newest_readable(plan.resume.folder / CHECKPOINTS)
    if checkpoint is None or path is None:
        return None
    for problem in problems:
        print(f"relod: {problem}; going on with {path.name}", file=sys.stderr)
    saved = checkpoint.counters["extra"].get("run", {})
    wanted = plan.identity
    for name in {**wanted, **saved}:
        if saved.get(name) != wanted.get(name):
            there, here = saved.get(name, "not known"), wanted.get(name, "not known")
            raise StartError(
                f"checkpoint {path} belongs to another run: its {name} is {there}, not {here}",
                "put back the run's own, or use the version of relod that made it",
            )
    return checkpoint
