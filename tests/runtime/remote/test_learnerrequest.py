"""What `relod learner` is asked for, resolved."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from relod.errors import SettingsError, StartError
from relod.runtime.remote.learnerrequest import LearnerRequest, choose_access, choose_teaching
from tests.runtime.remote.teaching import make_join
from tests.runtime.smallrun import SPEC


def make_request(**fields: object) -> LearnerRequest:
    request = LearnerRequest(
        listen="127.0.0.1:0",
        algorithm=None,
        preset="sac-lite",
        profile=None,
        token_file=None,
        cert=None,
        key=None,
        resume=None,
        config=None,
        environment={},
        assignments=(),
        overrides={},
        arguments=("learner",),
    )
    return replace(request, **fields)


@pytest.mark.parametrize(
    ("listen", "host", "port"), [("0.0.0.0:8765", "0.0.0.0", 8765), ("[::1]:0", "::1", 0), (":1", "", 1)]
)
def test_addresses(tmp_path, listen, host, port):
    access = choose_access(make_request(listen=listen), tmp_path)
    assert (access.host, access.port) == (host, port)


@pytest.mark.parametrize("listen", ["", "8765", "host:", "host:http", "host:65536", "host:-1", "host:٣"])
def test_what_is_no_address_is_told(tmp_path, listen):
    with pytest.raises(SettingsError, match="is no HOST:PORT"):
        choose_access(make_request(listen=listen), tmp_path)


def test_urls(tmp_path):
    assert choose_access(make_request(), tmp_path).url(8765) == "ws://127.0.0.1:8765"
    assert choose_access(make_request(listen="[::1]:0"), tmp_path).url(1) == "ws://[::1]:1"
    everywhere = choose_access(make_request(listen="0.0.0.0:0"), tmp_path).url(1)
    assert everywhere.startswith("ws://")
    assert "0.0.0.0" not in everywhere


def test_on_this_host_alone_no_token_is_asked_for(tmp_path):
    assert choose_access(make_request(), tmp_path).token is None
    assert not any(tmp_path.iterdir())


def test_beyond_it_a_token_is_made_and_kept_for_the_next_learner(tmp_path):
    request = make_request(listen="0.0.0.0:0")
    access = choose_access(request, tmp_path / "runs")
    assert access.token_file is not None
    assert stat.S_IMODE(access.token_file.stat().st_mode) == 0o600
    assert access.token_file.read_bytes().strip() == access.token
    assert choose_access(request, tmp_path / "runs").token == access.token
    said: list[str] = []
    access.tell_how_to_join("ws://h:1", said.append)
    assert f"--learner ws://h:1 --token-file {access.token_file}" in said[1]


def test_a_token_that_is_given_is_used(tmp_path):
    assert choose_access(make_request(environment={"RELOD_TOKEN": "secret"}), tmp_path).token == b"secret"
    path = tmp_path / "token"
    path.write_text("other\n")
    path.chmod(0o600)
    request = make_request(token_file=path, listen="0.0.0.0:0")
    assert choose_access(request, tmp_path / "runs").token == b"other"
    assert "other" not in repr(choose_access(request, tmp_path / "runs"))


def test_a_certificate_needs_its_key(tmp_path):
    with pytest.raises(SettingsError, match="belong together"):
        choose_access(make_request(cert=Path("c.pem")), tmp_path)


def test_the_robots_suggestion_stands_between_preset_and_command_line():
    presets = {"sac-lite": {"agent": {"n_step": 5, "batch_size": 32}, "task": {"image_height": 10}}, "sac": {"log": {}}}
    join = make_join(presets=presets, codec="jpeg")
    settings = choose_teaching(make_request(assignments=("agent.n_step=2",))).plan(join).settings
    assert (settings.agent.n_step, settings.agent.batch_size) == (2, 32)
    assert settings.log.codec == "jpeg"


def test_the_plan_knows_sizes_and_no_task():
    plan = choose_teaching(make_request(assignments=("server.max_robots=3",))).plan(make_join())
    assert (plan.spec, plan.robots, plan.task_name) == (SPEC, 3, "small")


@pytest.mark.parametrize(
    ("suggested", "told"),
    [
        ({"run": {"folder": "/elsewhere"}}, "suggests settings in the section 'run'"),
        ({"agent": {"strange": 1}}, r"unknown setting 'agent\.strange'"),
        ({"agent": {"batch_size": -1}}, r"agent\.batch_size = -1"),
        ({"agent": 3}, "agent"),
    ],
)
def test_a_suggestion_that_cannot_be_used_is_refused(suggested, told):
    with pytest.raises(SettingsError, match=told):
        choose_teaching(make_request()).plan(make_join(presets={"sac-lite": suggested}))


def test_a_learner_is_not_recorded():
    with pytest.raises(SettingsError, match=r"run\.record is for robots"):
        choose_teaching(make_request(assignments=("run.record=true",)))


def test_only_a_learners_run_goes_on(tmp_path):
    with pytest.raises(StartError, match="is no run folder"):
        choose_teaching(make_request(resume=tmp_path))
    (tmp_path / "run.json").write_text('{"mode": "local-only"}')
    with pytest.raises(StartError, match="is no learner's run"):
        choose_teaching(make_request(resume=tmp_path))
    (tmp_path / "log").mkdir()
    (tmp_path / "run.json").write_text('{"mode": "learner"}')
    with pytest.raises(StartError, match=r"run\.json is damaged"):
        choose_teaching(make_request(resume=tmp_path))
