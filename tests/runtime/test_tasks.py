import asyncio

import pytest

from relod.runtime.tasks import TaskGroup


async def fail() -> None:
    await asyncio.sleep(0)
    raise ValueError("no")


async def failed_group() -> None:
    async def run() -> None:
        async with TaskGroup() as group:
            group.create_task(fail())
            group.create_task(asyncio.sleep(10))

    with pytest.raises(ExceptionGroup):
        await run()


def test_a_time_limit_after_a_group_that_failed_is_one():
    async def scene() -> None:
        await failed_group()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(10)

    asyncio.run(scene())


def test_a_task_that_is_cancelled_in_a_group_ends():
    async def scene() -> None:
        async def work() -> None:
            async with TaskGroup() as group:
                group.create_task(asyncio.sleep(10))

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(scene())


def test_what_was_asked_before_stays_asked():
    async def scene() -> None:
        async def work() -> int:
            task = asyncio.current_task()
            assert task is not None
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                await failed_group()
            return task.cancelling()

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        assert await task == 1

    asyncio.run(scene())
