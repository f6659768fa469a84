"""`relod learner`: from the request to the summary. Robots come and go; the run ends by a signal, its limit or trouble.

The port is bound first. The first robot says what the task is, and only then is there a run: a folder, a replay, an
update worker. A run that goes on knows its task, and its replay is filled from the log before anybody is let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import uvloop

from ...errors import EXIT_OK, EXIT_SAFETY, RelodError, SafetyStop, SettingsError
from ...packages import Slowness
from ...types import EpisodeEnd, FloatArray, Image, Step
from .. import provenance
from ..channel import readable
from ..checkpoint import find_checkpoint
from ..clock import NS_PER_S, monotonic_ns
from ..curve import write_curve
from ..experience import check_room
from ..host import WORKER_STOP_LIMIT_S, Result
from ..log.format import EncodedFrame
from ..plan import LearnerPlan, steps_limit
from ..processes import Supervisor, signals_to
from ..rundir import RunFolder
from ..screen import View
from ..shared import Signal
from ..stack import EndIfStuck
from .hall import LearnerRun
from .learnerbooks import LearnerBooks
from .learnerrequest import Access, LearnerRequest, Teaching, choose_access, choose_teaching
from .learnerview import LearnerState, open_learner_view, summary_line
from .server import LearnerServer
from .serversession import Acted, Admission
from .wire import FromLearner, Join, Observe, Precision, Refused

__all__ = ["LearnerRequest", "LearnerSession", "Server", "run_learner"]

BOOKS_PERIOD_S = 0.25
NEWS_EVERY_S = 1.0
REFUSAL_LIMIT_S = 1.0  # for robots to read why they are turned away


class Server(Protocol):
    """What a session wants of `LearnerServer`."""

    failed: asyncio.Future[None]

    async def start(self, host: str, port: int, *, listening: bool = True) -> int: ...

    async def listen(self) -> None: ...

    def settle(self, image_hw: tuple[int, int], precision: Precision) -> None: ...

    def publish(self, values: npt.NDArray[np.float32], version: tuple[int, int]) -> None: ...

    def tell(self, message: FromLearner) -> None: ...

    def hold(self, reason: str) -> None: ...

    async def close(self, finished: str | None) -> None: ...

    def figures(self) -> dict[str, dict[str, Any]]: ...


def run_learner(request: LearnerRequest) -> Result:
    """Run `relod learner`; returns when its robots were told, its worker has ended and its run folder is complete.

    Raises:
        SettingsError, StartError: before anything was begun.
    """
    _allow_many_files()
    teaching = choose_teaching(request)
    access = choose_access(request, Path(teaching.settings.run.folder))
    return LearnerSession(teaching, access).run()


def _allow_many_files() -> None:
    """As many descriptors as may be had: connections that say nothing must not keep the log from its next segment."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class LearnerSession:
    """One session of a learner, with or without a run yet. `server.Hall` of its server.

    Args:
        make_server: called on the loop as `LearnerServer` is.
    """

    def __init__(self, teaching: Teaching, access: Access, make_server: Callable[..., Server] = LearnerServer) -> None:
        self._teaching, self._access, self._make_server = teaching, access, make_server
        self.learning: LearnerRun | None = None  # from the first robot on
        self.books = LearnerBooks(access.url(access.port))
        self._server: Server | None = None
        self._supervisor: Supervisor | None = None
        self._stack = contextlib.ExitStack()  # of the run
        self._tasks: list[asyncio.Task[None]] = []
        self._limit = 0  # environment steps of the run; 0 for none
        self._slowness: Slowness  # of its policy, from the first robot on
        self._watched: EndIfStuck  # the same
        self._ended = asyncio.Event()
        self._finished: str | None = None  # why robots are to end too
        self._signalled: signal.Signals | None = None
        self._closing: asyncio.Task[None] | None = None
        self._error: RelodError | None = None
        self._defect: BaseException | None = None

    def run(self) -> Result:
        """Until a signal, the run's limit, or a failure."""
        with self._stack:
            try:
                uvloop.run(self._run())
            finally:
                if self._supervisor is not None:
                    self._supervisor.close()
            if self._defect is not None:
                raise self._defect
            return self._finish()

    async def _run(self) -> None:
        with signals_to(self._on_signal), open_learner_view() as view:
            try:
                await self._serve(view)
            except RelodError as error:
                self._fail(error)
            finally:
                await self._stop()
                view.show(self.books.state, monotonic_ns())

    async def _serve(self, view: View[LearnerState]) -> None:
        access, teaching = self._access, self._teaching
        server = self._server = self._make_server(
            hall=self,
            settings=teaching.settings.server,
            token=access.token,
            tls=access.tls,
            say=self._say,
            image_hw=teaching.image_hw,
            preset=teaching.preset,
        )
        server.failed.add_done_callback(self._done)
        port = await server.start(access.host, access.port, listening=False)
        url = self.books.state.address = access.url(port)
        if teaching.resume is not None:
            self._begin(teaching.resumed_plan())  # the loop does nothing else meanwhile
        await server.listen()
        access.tell_how_to_join(url, self._say)
        self.books.state.phase = "waiting"
        self._start_task(self._keep_books(server, view), "books")
        await self._ended.wait()

    # -- the hall ------------------------------------------------------------------------------------------------------

    def admit(self, join: Join) -> Admission:
        """Let a robot in; the first one decides what the task is."""
        if self.learning is None:
            self._begin(self._teaching.plan(join))
        assert self.learning is not None
        admission = self.learning.admit(join)
        self.books.state.phase = "learning"
        self._say(f"{join.robot} joined, run {join.run[:8]}; the {join.acts} acts")
        return admission

    def record(self, admission: Admission, message: Step | EpisodeEnd, frames: Mapping[int, EncodedFrame]) -> None:
        """A robot's next record; in the log when this returns. `SafetyStop` when this learner cannot go on."""
        assert self.learning is not None
        if self._error is not None:
            raise SafetyStop(f"the learner has failed: {self._error.message}")
        self.learning.record(admission, message, frames)
        if isinstance(message, EpisodeEnd):
            self._hold()
        if self._limit and self.learning.env_steps >= self._limit:
            self._over(f"the learner's {self._limit} steps are done")

    def _hold(self) -> None:
        """Robots wait while their policy is updated, if the algorithm is of that kind."""
        assert self.learning is not None
        assert self._server is not None
        if reason := self.learning.learner.hold():
            self._server.hold(reason)

    def act(self, admission: Admission, images: tuple[Image, ...], head: Observe, proprio: FloatArray) -> Acted:
        """The answer to an observation; nothing else is served meanwhile."""
        assert self.learning is not None
        with self._watched:
            acted = self.learning.act(admission, images, head, proprio)
        name, took_ns = self.learning.policies.actor_name, acted.acted_ns - acted.asked_ns
        if slow := self._slowness.note(name, took_ns, acted.acted_ns):
            self._say(slow)
        return acted

    def left(self, admission: Admission, reason: str) -> None:
        """A robot's connection is over."""
        assert self.learning is not None
        with self._noticing():
            self.learning.left(admission)
        self._say(f"{admission.robot} left: {reason}")

    # -- the run -------------------------------------------------------------------------------------------------------

    def _begin(self, plan: LearnerPlan) -> None:
        """Make what a run needs, now that its task is known: all of it, or nothing and an error."""
        check_room(plan)
        checkpoint = find_checkpoint(plan)
        limit = steps_limit(plan.settings.run, plan.spec.cycle_ns)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(self._open_folder(plan))
            learning = LearnerRun(plan, folder, learner_id=self._teaching.learner_id)
            stack.callback(learning.close)
            steps = learning.env_steps
            if limit and steps >= limit:
                raise SettingsError(
                    f"the run has {steps} of {limit} steps already", "give more: --steps counts from its beginning"
                )
            if plan.resume is not None:
                learning.restore(checkpoint)
            self._stack.push(stack.pop_all())
        self.learning, self._limit = learning, limit
        self._slowness = Slowness(plan.spec.cycle_ns, "its action comes late, and robots hold their last one meanwhile")
        self._watched = EndIfStuck(
            "learner",
            plan.settings.safety.stall_limit_s,
            f"nothing is lost: mend it and go on with --resume {folder.path}",
        )
        assert self._server is not None
        self._server.settle(plan.spec.image_hw, learning.precision)
        self._hold()
        self.books.begin(learning, limit)
        learned = f" with its learner at update {checkpoint.counters['updates']}" if checkpoint is not None else ""
        self._say(f"going on at step {steps}{learned}" if plan.resume is not None else f"task {plan.task_name}")
        self._say(f"{plan.algorithm_name}, preset {plan.preset} ({plan.preset_reason}); run folder {folder.path}")
        self._start_worker(learning)

    def _start_worker(self, learning: LearnerRun) -> None:
        supervisor = self._supervisor = Supervisor(
            log_path=learning.folder.path / "children.log",
            max_restarts=learning.plan.settings.safety.max_restarts,
            on_event=lambda name, text: self._say(f"{name}: {text}"),
            on_report=lambda name, values: None,
            on_restart=lambda name: self.books.restarted(),
        )
        policies = learning.learner.box.add_signal()
        job = learning.learner.worker_job
        supervisor.start("worker", "relod.runtime.worker:run_worker_process", job, restart=True)
        self._start_task(supervisor.watch(), "watch-children")
        self._start_task(self._notice_loss(supervisor), "notice-loss")
        self._start_task(self._pass_policies_on(learning, policies), "policies")

    @contextlib.contextmanager
    def _open_folder(self, plan: LearnerPlan) -> Iterator[RunFolder]:
        session = provenance.describe(["relod", *self._teaching.request.arguments])
        if plan.resume is not None:
            opened = RunFolder.reopen(plan.resume.folder, plan.settings, session)
        else:
            name = f"learner-{plan.task_name}-s{plan.settings.run.seed}"
            opened = RunFolder.create(name, plan.settings, {**session, **self._teaching.describe(plan)})
        with opened as folder:
            yield folder

    async def _notice_loss(self, supervisor: Supervisor) -> None:
        await supervisor.failed.wait()
        if supervisor.failure is not None:
            raise supervisor.failure

    async def _pass_policies_on(self, learning: LearnerRun, news: Signal) -> None:
        assert self._server is not None
        while True:
            taken = await learning.policies.take()
            if taken is not None:
                self.books.state.policy_version = taken[1]
                self._server.publish(*taken)
            await readable(news)
            news.clear()

    async def _keep_books(self, server: Server, view: View[LearnerState]) -> None:
        """View and figures once per period, news once a second, metrics every few seconds."""
        metrics_ns = int(self._teaching.settings.run.metrics_every_s * NS_PER_S)
        next_metrics_ns = next_news_ns = monotonic_ns()
        while True:
            now_ns = monotonic_ns()
            self.books.take(server.figures(), now_ns)
            if self.learning is not None and now_ns >= next_news_ns:
                next_news_ns = now_ns + int(NEWS_EVERY_S * NS_PER_S)
                server.tell(self.books.news())
            if self.learning is not None and now_ns >= next_metrics_ns:
                next_metrics_ns = now_ns + metrics_ns
                self.books.write_metrics()
            view.show(self.books.state, now_ns)
            await asyncio.sleep(BOOKS_PERIOD_S)

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _over(self, reason: str) -> None:
        """The run is over, for its robots too."""
        self._finished = self._finished or reason
        self._ended.set()

    def _fail(self, error: RelodError) -> None:
        self._error = self._error or error
        self._ended.set()

    def _say(self, text: str) -> None:
        """Something a person should read."""
        with self._noticing():
            self.books.event(text)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """An error where nobody can take it ends the run."""
        try:
            yield
        except RelodError as error:
            self._fail(error)

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._done)
        self._tasks.append(task)

    def _done(self, future: asyncio.Future[None]) -> None:
        """What goes wrong in the background ends the run."""
        if future.cancelled() or (error := future.exception()) is None:
            return
        if isinstance(error, RelodError):
            self._fail(error)
        else:
            self._defect = self._defect or error
            self._ended.set()

    async def _stop(self) -> None:
        """The robots first, whose last records still come in; then the worker, which writes its checkpoint."""
        self.books.state.phase = "ending"
        if self._server is not None:
            self._closing = asyncio.create_task(self._close_server(self._server), name="close-server")
            self._closing.add_done_callback(self._done)
            await asyncio.wait([self._closing])
            self.books.take(self._server.figures(), monotonic_ns())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.learning is None or self._supervisor is None:
            return
        if self._finished is not None:
            with self._noticing():
                self.learning.close_episodes()
        self.learning.learner.finish()
        await self._supervisor.stop("worker", limit_s=WORKER_STOP_LIMIT_S)
        with self._noticing():
            self.books.take({}, monotonic_ns())
            self.books.write_metrics()
        self.books.state.phase = "ended"

    async def _close_server(self, server: Server) -> None:
        error = self._error or self._defect
        if error is None:
            return await server.close(self._finished)
        server.tell(Refused(exit_code=EXIT_SAFETY, message=f"the learner ended: {error}"[:1000]))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFUSAL_LIMIT_S):
                while any(robot["state"] == "connected" for robot in server.figures().values()):  # noqa: ASYNC110
                    await asyncio.sleep(BOOKS_PERIOD_S / 5)
        await server.close(None)

    def _finish(self) -> Result:
        """Complete the run folder, draw the curve, say a last line."""
        if self.learning is not None and not self.learning.folder.failed:
            with self._noticing():
                self.learning.folder.finish(self._summary())
            print(f"relod: {write_curve(self.learning.folder.path, self.learning.folder.path.name)}", file=sys.stderr)
        print(f"relod: {summary_line(self.books.state)}", file=sys.stderr)
        if self.learning is not None:
            print(f"relod: run folder {self.learning.folder.path}", file=sys.stderr)
        summary = self._summary()
        return Result(summary=summary, exit_code=summary["exit_code"], error=self._error)

    def _summary(self) -> dict[str, Any]:
        code = EXIT_OK
        if self._error is not None:
            code = self._error.exit_code
        elif self._signalled is not None:
            code = 128 + self._signalled
        return {**self.books.summary(), "exit_code": code, "error": str(self._error) if self._error else ""}

    def _on_signal(self, number: signal.Signals) -> None:
        """Ctrl-C ends the run, for its robots too; after SIGTERM they wait for this learner to come back."""
        if self._signalled is not None:  # asked twice: do not wait for anybody
            if self._closing is not None:
                self._closing.cancel()
            if self._supervisor is not None:
                self._supervisor.kill_all()
            return
        self._signalled = number
        self._say(f"{number.name}: ending")
        if number == signal.SIGINT:
            self._over("the learner was ended")
        self._ended.set()
