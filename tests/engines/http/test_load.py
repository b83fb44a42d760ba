"""Many short requests at once, some dropped, against a server whose cache runs out: each answer is right on its own.

``QNEXT_LOAD_REQUESTS=1000`` makes the load of the published figures; then memory has to stay flat too.
"""

import asyncio
import os
import random
import time

import httpx
import pytest

from qnext_plugin.engines import process
from qnext_plugin.verify.comparison import EXPERT_TIE
from qnext_plugin.verify.rows import Query
from qnext_plugin.verify.scenarios import tokens
from tests.support.references import TOLERANCE, whole
from tests.support.requests import Request, error
from tests.support.serving import MAX_LEN, Answer, Server

pytestmark = pytest.mark.parametrize("server", ["crowded"], indirect=True)

REQUESTS = int(os.environ.get("QNEXT_LOAD_REQUESTS", "100"))
CONCURRENT = 16


def requests(count: int, seed: int = 0) -> list[Request]:
    """Random lengths; a third start like others, so that prefixes are found in the cache; a fifth are dropped."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = min(int(rng.lognormvariate(3.7, 1.1)) + 1, MAX_LEN - 100)
        prompt = tokens(length, seed=1000 + i)
        if rng.random() < 1 / 3:
            shared = tokens(300, seed=rng.randrange(4))[: rng.choice((130, 200, 300))]
            prompt = (*shared, *prompt[: MAX_LEN - 100 - len(shared)])
        dropped = rng.choice((0, 20, 100, 400, 1000)) if rng.random() < 0.2 else None
        made.append(Request(prompt, rng.randrange(1, 60), rng.choice((0, 0, 0.7)), dropped))
    return made


async def send(server: Server, made: list[Request], halfway: list[int]) -> list[Answer | None]:
    """Answers in order; ``None`` for those dropped. ``halfway`` gets the memory in use after half of them."""
    free = asyncio.Semaphore(CONCURRENT)
    finished = 0

    async def one(client: httpx.AsyncClient, request: Request) -> Answer | None:
        nonlocal finished
        async with free:
            post = client.post(**server.request(request.prompt, request.max_tokens, request.temperature))
            try:
                if request.dropped_after is None:
                    answer = server.parse(await post)
                else:
                    answer = None
                    await asyncio.wait_for(post, request.dropped_after / 1000)
            except TimeoutError:
                pass
        finished += 1
        if finished == len(made) // 2:
            halfway.append(server.resident_bytes())
        return answer

    # A connection each: a server may close one that it has kept just when the next request is sent on it.
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, request) for request in made))


def test_each_answer_is_right_on_its_own(server, checkpoint):
    made, before, halfway = requests(REQUESTS), server.metrics(), []
    begin = time.monotonic()
    answers = asyncio.run(send(server, made, halfway))
    seconds, end = time.monotonic() - begin, server.resident_bytes()

    model, errors, ties = whole(checkpoint("tiny")), [], 0
    for i, (request, answer) in enumerate(zip(made, answers, strict=True)):
        assert (answer is None) <= (request.dropped_after is not None), f"request {i} has no answer"
        if answer is not None:
            assert len(answer.token_ids) == request.max_tokens
            (expected,) = model([Query((*request.prompt, *answer.token_ids), len(answer.token_ids))])
            off = error(request, answer, expected)
            if off > TOLERANCE and expected.margin.min() < EXPERT_TIE:
                ties += 1
            else:
                errors.append((off, i))
    growth = end / halfway[0] - 1
    after = server.metrics()
    print(
        f"{server.engine}: {len(made)} requests, {answers.count(None)} dropped, in {seconds:.0f} s; "
        f"preemptions {after['preempted'] - before['preempted']:.0f}; error {max(errors)[0]:.2g}, {ties} ties; "
        f"memory {end / 2**20:.0f} MiB, {growth:+.2%} in the second half"
    )
    assert ties <= 1 + REQUESTS // 100
    assert max(errors)[0] <= TOLERANCE, f"request {max(errors)[1]}: {max(errors)[0]:.3g}"
    assert after["preempted"] > before["preempted"], "the cache never ran out"
    if REQUESTS >= 1000:
        assert growth < 0.02
    assert_idle(server)


def test_a_prompt_of_one_token_beside_others_starts_from_nothing(server, checkpoint):
    """With drafts its first step looks like one of those beside it."""
    made = [Request(tokens(1 if i % 3 else 90, seed=2000 + i), 12) for i in range(48)]
    answers, model = asyncio.run(send(server, made, [])), whole(checkpoint("tiny"))
    errors = []
    for request, answer in zip(made, answers, strict=True):
        (expected,) = model([Query((*request.prompt, *answer.token_ids), len(answer.token_ids))])
        if expected.margin.min() >= EXPERT_TIE:
            errors.append((error(request, answer, expected), len(request.prompt)))
    assert len(errors) > 40
    assert max(errors)[0] <= TOLERANCE, sorted(errors)[-5:]


def test_several_answers_to_a_prompt_are_each_right(server, checkpoint):
    request, model = Request(tokens(70, seed=3000), 16, temperature=1), whole(checkpoint("tiny"))
    with httpx.Client(base_url=server.url, timeout=120) as client:
        answers = server.parse_all(client.post(**server.request(request.prompt, 16, request.temperature, n=6)))
    assert len({answer.token_ids for answer in answers}) == 6
    for answer in answers:
        assert len(answer.token_ids) == 16
        (expected,) = model([Query((*request.prompt, *answer.token_ids), 16)])
        assert error(request, answer, expected) <= TOLERANCE or expected.margin.min() < EXPERT_TIE


def assert_idle(server: Server) -> None:
    """No request is left in the engine, dropped ones included, and no slot of the cache is held."""
    deadline = time.monotonic() + 60  # an idle SGLang counts every half minute
    while any((held := server.metrics() | {"preempted": 0}).values()):
        assert time.monotonic() < deadline, f"still held: {held}\n{process.tail(server.log)}"
        time.sleep(0.5)
