"""The variables of an RTDE controller: what the simulated one reports under which name, and what clients may write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ...runtime.clock import NS_PER_S
from .arm import JOINTS, ZERO, Vector6
from .controller import Controller
from .kinematics import tool_pose
from .rtde import Number
from .states import REGISTERS, Registers, RobotMode, RuntimeState, SafetyMode, Sample

__all__ = ["INPUTS", "OUTPUTS", "Input", "Output", "known_output", "tcp_pose"]

Read: TypeAlias = Callable[[Controller, Sample], Sequence[Number]]
Write: TypeAlias = Callable[[Controller, Number, int], None]  # the last is now_ns

JOINT_RUNNING, JOINT_IDLE = 253, 255  # joint modes
STOPPED_FOR_SAFETY = 1 << 10
SAFETY_BITS = {  # the mode's own bit, and those that come with it
    SafetyMode.NORMAL: 1 << 0,
    SafetyMode.REDUCED: 1 << 1,
    SafetyMode.PROTECTIVE_STOP: 1 << 2 | STOPPED_FOR_SAFETY,
    SafetyMode.RECOVERY: 1 << 3,
    SafetyMode.SAFEGUARD_STOP: 1 << 4 | STOPPED_FOR_SAFETY,
    SafetyMode.SYSTEM_EMERGENCY_STOP: 1 << 5 | 1 << 7 | STOPPED_FOR_SAFETY,
    SafetyMode.ROBOT_EMERGENCY_STOP: 1 << 6 | 1 << 7 | STOPPED_FOR_SAFETY,
    SafetyMode.VIOLATION: 1 << 8 | STOPPED_FOR_SAFETY,
    SafetyMode.FAULT: 1 << 9 | STOPPED_FOR_SAFETY,
}


class Output(NamedTuple):
    """One variable, read at each package or always the same."""

    type: str
    read: Read | None
    constant: Sequence[Number] = ()
    since: Mapping[int, tuple[int, int]] | None = None  # the first (minor, bugfix) of each major version that has it


class Input(NamedTuple):
    """One variable that clients write, a register or of no effect."""

    type: str
    write: Write | None


def tcp_pose(q: Sequence[float]) -> Vector6:
    """The tool flange in the controller's base frame: position in m, rotation vector in rad."""
    pose = tool_pose(q)
    # The frame of `kinematics` is the base frame turned by half a turn about z; its axes are the tool's -x, -y and z.
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = pose.right, pose.down, pose.forward
    rows = ((ax, bx, -cx), (ay, by, -cy), (-az, -bz, cz))
    x, y, z = pose.position
    return -x, -y, z, *_rotation_vector(rows)


def _rotation_vector(rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rows
    # By way of the quaternion with the largest component first, which is exact near half a turn too.
    squares = (1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz)
    largest = squares.index(max(squares))
    w, x, y, z = (
        (squares[0], zy - yz, xz - zx, yx - xy),
        (zy - yz, squares[1], xy + yx, xz + zx),
        (xz - zx, xy + yx, squares[2], yz + zy),
        (yx - xy, xz + zx, yz + zy, squares[3]),
    )[largest]
    sine = math.sqrt(x * x + y * y + z * z)
    if sine < 1e-12:
        return 0.0, 0.0, 0.0
    angle = 2 * math.atan2(sine, abs(w))
    scale = math.copysign(angle / sine, w)
    return scale * x, scale * y, scale * z


def _fixed(kind: str, *numbers: Number) -> Output:
    return Output(kind, None, numbers)


def _joint_modes(_: Controller, sample: Sample) -> tuple[int, ...]:
    return (JOINT_RUNNING if sample.robot_mode is RobotMode.RUNNING else JOINT_IDLE,) * JOINTS


def _robot_status_bits(_: Controller, sample: Sample) -> tuple[int]:
    powered = sample.robot_mode >= RobotMode.POWER_ON
    program = sample.runtime_state is not RuntimeState.STOPPED
    return (powered << 0 | program << 1,)


def _speed_scaling(_: Controller, sample: Sample) -> tuple[float]:
    return (1.0 if sample.safety_mode is SafetyMode.NORMAL else 0.0,)


def _register(kind: str, i: int, bank: Callable[[Registers], Sequence[Number]]) -> Output:
    return Output(kind, lambda controller, sample: (bank(controller.registers)[i],))


def _int_register(i: int) -> Input:
    return Input("INT32", lambda controller, value, now_ns: controller.write_int(i, int(value), now_ns))


def _double_register(i: int) -> Input:
    return Input("DOUBLE", lambda controller, value, now_ns: controller.write_double(i, value, now_ns))


_FORCES = _fixed("VECTOR6D", *ZERO)  # the simulated arm knows no forces and no currents
_NUMBER = _fixed("DOUBLE", 0.0)
_MODE = Output("INT32", lambda controller, sample: (sample.safety_mode,))

OUTPUTS: dict[str, Output] = {
    "timestamp": Output("DOUBLE", lambda controller, sample: ((sample.t_ns - controller.start_ns) / NS_PER_S,)),
    "target_q": Output("VECTOR6D", lambda controller, sample: sample.target_q),
    "target_qd": Output("VECTOR6D", lambda controller, sample: sample.target_qd),
    "target_qdd": Output("VECTOR6D", lambda controller, sample: sample.target_qdd),
    "target_current": _FORCES,
    "target_moment": _FORCES,
    "actual_q": Output("VECTOR6D", lambda controller, sample: sample.q),
    "actual_qd": Output("VECTOR6D", lambda controller, sample: sample.qd),
    "actual_current": _FORCES,
    "actual_current_window": _FORCES,
    "joint_control_output": _FORCES,
    "actual_TCP_pose": Output("VECTOR6D", lambda controller, sample: tcp_pose(sample.q)),
    "actual_TCP_speed": _FORCES,
    "actual_TCP_force": _FORCES,
    "target_TCP_pose": Output("VECTOR6D", lambda controller, sample: tcp_pose(sample.target_q)),
    "target_TCP_speed": _FORCES,
    "actual_digital_input_bits": _fixed("UINT64", 0),
    "actual_digital_output_bits": _fixed("UINT64", 0),
    "joint_temperatures": _fixed("VECTOR6D", *(25.0,) * JOINTS),
    "actual_execution_time": _fixed("DOUBLE", 0.3),
    "robot_mode": Output("INT32", lambda controller, sample: (sample.robot_mode,)),
    "joint_mode": Output("VECTOR6INT32", _joint_modes),
    "safety_mode": _MODE,
    "safety_status": _MODE._replace(since={3: (10, 0), 5: (4, 0)}),
    "actual_tool_accelerometer": _fixed("VECTOR3D", 0.0, 0.0, 9.81),
    "speed_scaling": Output("DOUBLE", _speed_scaling),
    "target_speed_fraction": _fixed("DOUBLE", 1.0),
    "actual_momentum": _NUMBER,
    "actual_main_voltage": _fixed("DOUBLE", 48.0),
    "actual_robot_voltage": _fixed("DOUBLE", 48.0),
    "actual_robot_current": _fixed("DOUBLE", 0.5),
    "actual_joint_voltage": _fixed("VECTOR6D", *(47.0,) * JOINTS),
    "runtime_state": Output("UINT32", lambda controller, sample: (sample.runtime_state,)),
    "robot_status_bits": Output("UINT32", _robot_status_bits),
    "safety_status_bits": Output("UINT32", lambda controller, sample: (SAFETY_BITS[sample.safety_mode],)),
    "standard_analog_input0": _NUMBER,
    "standard_analog_input1": _NUMBER,
    "standard_analog_output0": _NUMBER,
    "standard_analog_output1": _NUMBER,
    "payload": _NUMBER._replace(since={3: (11, 0), 5: (5, 1)}),
    "payload_cog": _fixed("VECTOR3D", 0.0, 0.0, 0.0)._replace(since={3: (11, 0), 5: (5, 1)}),
    "payload_inertia": _FORCES._replace(since={3: (15, 0), 5: (11, 0)}),
    "ft_raw_wrench": _FORCES._replace(since={5: (9, 0)}),
    "actual_current_as_torque": _FORCES._replace(since={5: (23, 0)}),
}
# What clients may write. The current value of a register can be read back under the same name.
INPUTS: dict[str, Input] = {"external_force_torque": Input("VECTOR6D", None)}
for _i in range(REGISTERS):
    INPUTS[f"input_int_register_{_i}"] = _int_register(_i)
    INPUTS[f"input_double_register_{_i}"] = _double_register(_i)
    OUTPUTS[f"input_int_register_{_i}"] = _register("INT32", _i, lambda registers: registers.int_in)
    OUTPUTS[f"input_double_register_{_i}"] = _register("DOUBLE", _i, lambda registers: registers.double_in)
    OUTPUTS[f"output_int_register_{_i}"] = _register("INT32", _i, lambda registers: registers.int_out)
    OUTPUTS[f"output_double_register_{_i}"] = _register("DOUBLE", _i, lambda registers: registers.double_out)


def known_output(name: str, version: Sequence[int]) -> Output | None:
    """The variable of that name, or None where this version of the software has none."""
    output = OUTPUTS.get(name)
    if output is None or output.since is None:
        return output
    first = output.since.get(version[0])
    return output if first is not None and tuple(version[1:3]) >= first else None
