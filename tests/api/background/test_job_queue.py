import asyncio

from api.background.job_queue import Lane
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

        lane = Lane(job, width=2)
        for name in "abcde":
            lane.add(name)
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

        lane = Lane(job, width=1)
        for name in "abcd":
            lane.add(name)
        lane.hurry("d")
        await lane.cancel("b")
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

        lane = Lane(job, width=1)
        lane.add("a")
        await asyncio.sleep(0)
        assert lane.runs("a")
        await lane.cancel("a")
        assert ended == ["a"]
        assert not lane.runs("a")

    asyncio.run(main())


def test_a_job_added_while_it_runs_runs_again() -> None:
    async def main() -> None:
        runs = 0
        done = asyncio.Event()
        lane: Lane

        async def job(name: str) -> None:
            nonlocal runs
            runs += 1
            if runs == 1:
                lane.add(name)
                await asyncio.sleep(0)
            else:
                done.set()

        lane = Lane(job, width=2)
        lane.add("a")
        await asyncio.wait_for(done.wait(), patient())
        assert runs == 2

    asyncio.run(main())


def test_a_job_cancelled_before_its_first_step_makes_room() -> None:
    async def main() -> None:
        done = asyncio.Event()

        async def job(name: str) -> None:
            assert name == "b"
            done.set()

        lane = Lane(job, width=1)
        lane.add("a")
        lane.add("b")
        await lane.cancel("a")
        await asyncio.wait_for(done.wait(), patient())

    asyncio.run(main())
