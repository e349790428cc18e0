import asyncio

from api.background.job_queue import JobQueue
from tests.support.waiting import eventually, patient


def test_jobs_run_in_order_at_most_width_at_a_time() -> None:
    async def main() -> None:
        running, most, order = 0, 0, []

        async def job(name: str) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            order.append(name)
            await asyncio.sleep(0.001)
            running -= 1

        queue = JobQueue(job, width=2)
        for name in "abcde":
            queue.add(name)
        await eventually(lambda: len(order) == 5 and not running)
        assert order == list("abcde")
        assert most == 2

    asyncio.run(main())


def test_a_hurried_job_is_next_and_a_cancelled_one_never_runs() -> None:
    async def main() -> None:
        order = []
        go = asyncio.Event()

        async def job(name: str) -> None:
            await go.wait()
            order.append(name)

        queue = JobQueue(job, width=1)
        for name in "abcd":
            queue.add(name)
        queue.prioritize("d")
        await queue.cancel("b")
        await asyncio.sleep(0)
        go.set()
        await eventually(lambda: len(order) == 3)
        assert order == ["a", "d", "c"]

    asyncio.run(main())


def test_cancelling_a_running_job_waits_for_its_end() -> None:
    async def main() -> None:
        ended = []

        async def job(name: str) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
                ended.append(name)

        queue = JobQueue(job, width=1)
        queue.add("a")
        await asyncio.sleep(0)
        assert queue.is_running("a")
        await queue.cancel("a")
        assert ended == ["a"]
        assert not queue.is_running("a")

    asyncio.run(main())


def test_a_job_added_while_it_runs_runs_again() -> None:
    async def main() -> None:
        runs = 0
        done = asyncio.Event()
        queue: JobQueue

        async def job(name: str) -> None:
            nonlocal runs
            runs += 1
            if runs == 1:
                queue.add(name)
                await asyncio.sleep(0)
            else:
                done.set()

        queue = JobQueue(job, width=2)
        queue.add("a")
        await asyncio.wait_for(done.wait(), patient())
        assert runs == 2

    asyncio.run(main())


def test_a_job_cancelled_before_its_first_step_makes_room() -> None:
    async def main() -> None:
        done = asyncio.Event()

        async def job(name: str) -> None:
            assert name == "b"
            done.set()

        queue = JobQueue(job, width=1)
        queue.add("a")
        queue.add("b")
        await queue.cancel("a")
        await asyncio.wait_for(done.wait(), patient())

    asyncio.run(main())
