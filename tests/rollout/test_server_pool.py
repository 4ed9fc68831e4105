"""The server engine against scripted servers that are slow, broken, restarted or gone: nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.distributed.groups import ParallelSizes
from megatron_ktr.errors import UserError
from megatron_ktr.rollout.refill import answered_with_spares
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.second_prompt import SHUFFLED, Question
from megatron_ktr.rollout.server.engine import ServerEngine
from megatron_ktr.rollout.server.member import PoolSettings
from megatron_ktr.rollout.server.replicas import Replicas
from megatron_ktr.rollout.server.weights import DirectoryTransfer
from megatron_ktr.types import Prompt, RolloutGroup
from megatron_ktr.web import leaving
from tests.support.fake_server import LOGPROB, MISBEHAVIOUR, ON_THE_WIRE, FakeServer
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.tiny import EOS_ID, IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, tiny_hf_config
from tests.support.tokenizer import tiny_tokenizer

SAMPLING = SamplingSettings(num_generations=3, max_response_length=12, seed=7)
MEDIA = MediaSpec(IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, 14, 2, 2, positions=lambda *a, **k: None, patchify=lambda *a: None)
FAST = dict(backoff_seconds=0.01, probe_seconds=0.05, wait_seconds=0.0)
"""A pool that looks often and waits for nobody, for tests."""


def prompts(number: int) -> list[Prompt]:
    return [Prompt(f"p{index}", (10, 20, 30 + index)) for index in range(number)]


def tensors(value: float) -> Iterator[tuple[str, torch.Tensor]]:
    yield "a.weight", torch.full((3, 2), value)
    yield "b.weight", torch.zeros(4)


def make_engine(servers: list[FakeServer], folder: Path, *, replicas: Replicas | None = None, **settings: Any):
    """An engine whose weights go through ``folder / "weights"``."""
    model_dir = folder / "model"
    if not model_dir.exists():
        tiny_hf_config().save_pretrained(model_dir)
    replicas = replicas or Replicas()
    urls = [server.url for server in servers]
    return ServerEngine(
        model_dir,
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=SAMPLING,
        transfer=DirectoryTransfer(folder / "weights", owned_urls=replicas.own(urls), replicas=replicas),
        replicas=replicas,
        settings=PoolSettings(**{"urls": tuple(urls), "timeout_seconds": PATIENCE_SECONDS, **FAST, **settings}),
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[ServerEngine, list[FakeServer]]]]:
    """Servers, and an engine that asks them."""
    engines, servers = [], []

    def begin(number: int = 1, **settings: Any) -> tuple[ServerEngine, list[FakeServer]]:
        servers.extend(FakeServer() for _ in range(number))
        engines.append(make_engine(servers, tmp_path, **settings))
        return engines[-1], servers

    yield begin
    for server in servers:
        server.release()
    for engine in engines:
        engine.close()
    for server in servers:
        server.kill()


def expected(folder: Path, number: int, *, weights: float | None = None, step: int = 0) -> list[RolloutGroup]:
    """What a server that behaves answers."""
    server = FakeServer()
    engine = make_engine([server], folder / "expected")
    if weights is not None:
        engine.load_weights(tensors(weights))
    groups = engine.generate(prompts(number), step=step)
    engine.close()
    server.kill()
    return groups


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts it; the result waits for it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(PATIENCE_SECONDS)
        assert found, "it failed or did not end"
        return found[0]

    return result


def counts(engine: ServerEngine) -> dict[str, int]:
    return {name.removeprefix("server/"): number for name, number in engine.counts.items() if number}


# --- requests -------------------------------------------------------------------------------------------------


def test_every_prompt_gets_its_own_responses_and_seeds_repeat_them(start, tmp_path) -> None:
    engine, servers = start(2)
    groups = engine.generate(prompts(9), step=1)
    assert [group.prompt.problem_id for group in groups] == [f"p{index}" for index in range(9)]
    assert all(len(group.rollouts) == SAMPLING.num_generations for group in groups)
    assert all(set(rollout.sampler_logprobs) == {LOGPROB} for group in groups for rollout in group.rollouts)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        assert rollout.is_finished == (rollout.token_ids[-1] == EOS_ID)
        assert len(rollout.sampler_logprobs) == len(rollout.token_ids)
    assert groups == expected(tmp_path, 9, step=1), "the same seeds, other servers"
    assert groups != expected(tmp_path, 9, step=2)
    seeds = {(body["token_ids"][-1], body["sampling_params"]["seed"]) for server in servers for body in server.bodies}
    assert len(seeds) == 9 and len({seed for _, seed in seeds}) == 9
    draws = [dataclasses.replace(prompts(1)[0], draw_number=number) for number in range(4)]
    groups = engine.generate(draws, step=1)
    assert len({group.rollouts[0].token_ids for group in groups}) == 4, "the same record, drawn four times in a step"
    assert engine.generate(draws[::-1], step=1) == groups[::-1]


def test_a_second_prompt_has_its_own_count_and_seed_and_changes_no_other_response(start, tmp_path) -> None:
    engine, servers = start(2)
    asked = [*prompts(4), *(dataclasses.replace(prompt, variant=SHUFFLED) for prompt in prompts(2))]
    found = dict(engine.stream(asked, step=1, counts=[3] * 4 + [2] * 2))
    assert [found[place] for place in range(4)] == expected(tmp_path, 4, step=1)
    for place in (4, 5):
        assert len(found[place].rollouts) == 2 and found[place].prompt.variant == SHUFFLED
        assert found[place].rollouts != found[place - 4].rollouts[:2]
    assert sorted(body["sampling_params"]["n"] for server in servers for body in server.bodies) == [2, 2, 3, 3, 3, 3]
    again = dict(engine.stream(asked[4:], step=1, counts=[2, 2]))
    assert [again[0], again[1]] == [found[4], found[5]], "whatever else is asked"


def test_a_replacement_is_asked_while_other_groups_are_still_running(start, tmp_path) -> None:
    """Of three groups one is answered and rejected. The next spare prompt is then asked beside the two that run."""
    engine, (server,) = start(1)
    server.hold(after=1)
    groups = [RolloutGroup(prompt, ()) for prompt in prompts(5)]
    result = in_background(
        lambda: answered_with_spares(
            {place: Question(groups[place]) for place in range(3)},
            spares=[(place, groups[place]) for place in (3, 4)],
            answer=lambda question: engine.generate([question.group.prompt], step=1)[0],
            ask=Question,
            is_rejected=lambda group: group.prompt.problem_id not in ("p3", "p4"),
        )
    )
    wait_until(lambda: server.num_answers == 1 and server.running == 3)
    server.release()
    found, wanted = result(), expected(tmp_path, 5, step=1)
    assert found == dict(enumerate(wanted)), "three are rejected, so both spares are asked"


def test_requests_in_flight_are_bounded_and_spread(start) -> None:
    engine, servers = start(2, max_requests=2)
    for server in servers:
        server.hold()
    result = in_background(lambda: engine.generate(prompts(12)))
    wait_until(lambda: [server.running for server in servers] == [2, 2])
    for server in servers:
        server.release()
    assert len(result()) == 12 and [server.most_running for server in servers] == [2, 2]


def test_a_slow_server_keeps_its_requests_and_the_others_take_the_rest(start, tmp_path) -> None:
    engine, (slow, fast) = start(2, max_requests=2)
    slow.hold()
    result = in_background(lambda: engine.generate(prompts(16)))
    wait_until(lambda: fast.num_answers == 14)
    slow.release()
    assert result() == expected(tmp_path, 16)
    assert slow.num_answers == 2 and counts(engine) == {}


def test_a_server_killed_in_mid_batch_loses_no_prompt(start, tmp_path) -> None:
    engine, (dying, other) = start(2, max_requests=4)
    dying.hold()
    result = in_background(lambda: engine.generate(prompts(16)))
    wait_until(lambda: dying.running == 4)
    dying.kill()
    assert result() == expected(tmp_path, 16)
    assert other.num_answers == 16
    found = counts(engine)
    assert found["taken_out"] == 1 and found["resent"] >= 1 and found["retries"] >= 4


def test_a_request_that_hangs_is_sent_to_another_server(start, tmp_path) -> None:
    engine, (hanging, other) = start(2)
    engine.pool._servers[0].client.timeout_seconds = 0.3  # of this one alone: the other may take its time
    hanging.script.extend(["hang"] * 3)
    assert engine.generate(prompts(6)) == expected(tmp_path, 6)
    assert counts(engine)["taken_out"] >= 1 and counts(engine)["resent"] >= 1
    assert other.num_answers >= 3


@pytest.mark.parametrize("acts", [MISBEHAVIOUR, {"drop": None, "500": None, "503": None, **ON_THE_WIRE}])
def test_an_answer_that_is_no_answer_is_asked_for_again(start, tmp_path, acts: dict[str, Any]) -> None:
    """One bad answer at a time; every one is followed by a good one."""
    engine, (server,) = start(1)
    wanted = expected(tmp_path, 1)
    for act in acts:
        before = counts(engine)
        server.script.append(act)
        assert engine.generate(prompts(1)) == wanted, act
        after = {name: number - before.get(name, 0) for name, number in counts(engine).items()}
        known = {"retries": 1, "taken_out": 0, "resent": 0, "malformed": int(acts is MISBEHAVIOUR)}
        assert after == {name: number for name, number in known.items() if name in after}, act
        assert after["retries"] == 1, act


def test_a_server_that_only_talks_nonsense_is_taken_out(start, tmp_path) -> None:
    engine, (mad, sane) = start(2, max_retries=2, probe_seconds=PATIENCE_SECONDS)
    mad.script.extend(["not json"] * 50)
    assert engine.generate(prompts(12)) == expected(tmp_path, 12)
    assert counts(engine)["taken_out"] == 1 and counts(engine)["malformed"] >= 3
    assert sane.num_answers == 12


def test_a_request_that_fails_everywhere_ends_with_its_name(start) -> None:
    engine, (server,) = start(1, max_retries=2)
    server.script.extend(["500"] * 50)
    with pytest.raises(UserError, match=r"prompt p0 failed 4 times .*127\.0\.0\.1.*answered 500: scripted"):
        engine.generate(prompts(1))


def test_a_prompt_that_all_servers_refuse_is_named(start) -> None:
    engine, (server, other) = start(2)
    server.script.extend(["400"] * 9)
    other.script.extend(["400"] * 9)
    with pytest.raises(UserError, match=r"prompt p0: .*answered 400: scripted"):
        engine.generate(prompts(1))
    assert 2 <= len(server.bodies) <= 3 and 2 <= len(other.bodies) <= 3, "every server is asked twice"


def test_a_server_alone_in_refusing_is_the_sick_one(start, tmp_path) -> None:
    engine, (mad, sane) = start(2, max_retries=2, probe_seconds=PATIENCE_SECONDS)
    mad.script.extend(["400"] * 50)
    assert engine.generate(prompts(12)) == expected(tmp_path, 12)
    assert counts(engine)["taken_out"] == 1 and counts(engine)["refused"] >= 3
    assert sane.num_answers == 12


def test_a_prompt_too_long_for_the_servers_is_named_before_anything_is_sent(start) -> None:
    engine, (server,) = start(1)
    long = Prompt("long", tuple(range(10, 180)) * 6)
    with pytest.raises(UserError, match=r"prompt long: 1020 tokens.*--max-model-len 1000"):
        engine.generate([*prompts(1), long])
    assert not server.bodies


def test_without_servers_the_run_ends_with_every_address_and_reason(start) -> None:
    engine, servers = start(2, max_retries=2)
    for server in servers:
        server.hold()
    result = in_background(lambda: pytest.raises(UserError, engine.generate, prompts(8)))
    wait_until(lambda: all(server.running for server in servers))
    for server in servers:
        server.kill()
    message = str(result().value)
    assert message.startswith("no vLLM server is left: ")
    assert all(f"{server.url}: ConnectError" in message for server in servers)


def test_a_stop_string_cuts_responses_after_the_token_that_completes_it(start) -> None:
    engine, _ = start(1)
    (whole,) = engine.generate(prompts(1))
    text = max((rollout.text for rollout in whole.rollouts), key=len)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (cut,) = engine.generate(prompts(1), sampling=dataclasses.replace(SAMPLING, stop=(stop,)))
    assert any(len(new.text) < len(old.text) for old, new in zip(whole.rollouts, cut.rollouts, strict=True))
    for old, new in zip(whole.rollouts, cut.rollouts, strict=True):
        before = engine.tokenizer.decode(list(new.token_ids[:-1]), skip_special_tokens=True)
        assert (stop in new.text) == (stop in old.text) and stop not in before
        assert new == old or new.is_finished
        assert new.token_ids == old.token_ids[: len(new.token_ids)] and len(new.sampler_logprobs) == len(new.token_ids)


def test_a_stream_that_is_abandoned_takes_its_requests_back(start) -> None:
    engine, (server,) = start(1, max_requests=1)
    server.hold(after=1)
    stream = engine.stream(prompts(20))
    next(stream)
    stream.close()
    wait_until(lambda: len(asyncio.all_tasks(engine._loop)) == 1)  # the one that looks after the servers
    server.release()
    assert len(server.bodies) <= 2 and len(engine.generate(prompts(1))) == 1


# --- servers that are set up wrongly --------------------------------------------------------------------------


def test_a_server_with_other_logprobs_or_pixels_is_refused_at_the_start(tmp_path) -> None:
    server = FakeServer()
    server.facts["logprobs_mode"] = "processed_logprobs"
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs; this run needs raw_logprobs"):
        make_engine([server], tmp_path)
    server.facts["logprobs_mode"] = "raw_logprobs"
    server.normalises_pixels = True
    with pytest.raises(UserError, match="--no-mm-device-do-normalize"):
        make_engine([server], tmp_path)
    server.kill()


def test_a_server_that_never_answers_is_named(tmp_path) -> None:
    server = FakeServer()
    server.kill()
    with pytest.raises(UserError, match=rf"no vLLM server answered: {server.url}: ConnectError"):
        make_engine([server], tmp_path, timeout_seconds=0.0)


def test_the_engine_waits_for_a_server_that_is_still_loading(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    server.kill()
    pause, waited_for = leaving.pause, []

    async def pause_and_load(seconds: float, *, waiting_for: str) -> None:
        await pause(seconds, waiting_for=waiting_for)
        waited_for.append(waiting_for)
        if len(waited_for) == 2:
            server.restart()

    monkeypatch.setattr(leaving, "pause", pause_and_load)
    engine = make_engine([server], tmp_path)
    assert waited_for == ["for the first vLLM server"] * 2
    assert len(engine.generate(prompts(2))) == 2
    engine.close()
    server.kill()


# --- weights --------------------------------------------------------------------------------------------------


def test_an_update_reaches_every_server_and_leaves_one_directory(start, tmp_path) -> None:
    engine, servers = start(2)
    for value in (1.0, 2.0):
        engine.load_weights(tensors(value))
        assert [server.weights for server in servers] == [value, value]
        assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=value)
    assert expected(tmp_path, 6, weights=1.0) != expected(tmp_path, 6, weights=2.0), "they would show old weights"
    label = f"{engine.replicas.run}-2"
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [label]
    resets = ["reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"]
    steps = ["pause wait", f"version {label}-loading", "reload", *resets, f"version {label}", "resume"]
    for server in servers:
        assert server.control[-len(steps) :] == steps
    engine.close()
    assert not list((tmp_path / "weights").iterdir())


def test_an_update_waits_for_running_requests_and_nothing_is_mixed(start, tmp_path) -> None:
    engine, (server,) = start(1)
    engine.load_weights(tensors(1.0))
    server.hold()
    result = in_background(lambda: engine.generate(prompts(4)))
    wait_until(lambda: server.running == 4)
    update = in_background(lambda: engine.load_weights(tensors(2.0)) or "done")
    wait_until(lambda: server.paused)
    server.release()
    assert update() == "done" and server.num_answers_before_reload == 4, "all of them were answered first"
    assert result() == expected(tmp_path, 4, weights=1.0)
    assert engine.generate(prompts(4)) == expected(tmp_path, 4, weights=2.0)
    assert counts(engine) == {}


def test_updates_in_flight_count_mixed_responses(start) -> None:
    engine, (server,) = start(1, in_flight_updates=True)
    engine.load_weights(tensors(1.0))
    server.hold()
    result = in_background(lambda: engine.generate(prompts(4)))
    wait_until(lambda: server.running == 4)
    engine.load_weights(tensors(2.0))
    assert server.num_answers_before_reload == 0, "none of them was waited for"
    server.release()
    assert len(result()) == 4
    assert counts(engine) == {"mixed_versions": 4 * SAMPLING.num_generations}
    assert server.control[-1] == "resume" and "pause keep" in server.control


def test_a_mixed_response_is_refused_where_updates_wait(start, tmp_path) -> None:
    """Somebody else changed the weights of a server that we believed to be ours."""
    engine, (server,) = start(1)
    engine.load_weights(tensors(1.0))
    server.hold()
    result = in_background(lambda: engine.generate(prompts(1)))
    wait_until(lambda: server.running == 1)
    server.version = "somebody-else"
    server.release()
    assert result() == expected(tmp_path, 1, weights=1.0)
    assert counts(engine) == {"retries": 1, "resent": 1, "taken_out": 1}


def test_a_server_that_was_restarted_is_given_the_weights_before_it_is_believed(start, tmp_path) -> None:
    """Healthy again before anybody noticed: only the label in its answers tells."""
    engine, (server,) = start(1)
    engine.load_weights(tensors(1.0))
    server.kill()
    server.restart()
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=1.0)
    assert server.weights == 1.0 and counts(engine)["taken_out"] == 1


def test_a_server_comes_back_with_the_current_weights(start, tmp_path) -> None:
    engine, (first, second) = start(2)
    engine.load_weights(tensors(1.0))
    first.kill()
    engine.generate(prompts(4))
    engine.load_weights(tensors(2.0))
    assert engine.generate(prompts(4)) == expected(tmp_path, 4, weights=2.0)
    before = second.num_answers
    first.restart()
    wait_until(lambda: engine.pool._servers[0].is_in)
    assert first.version == f"{engine.replicas.run}-2" and not first.paused
    assert engine.generate(prompts(12)) == expected(tmp_path, 12, weights=2.0)
    assert first.weights == 2.0 and second.num_answers < before + 12, "it is asked again"


def test_a_server_that_does_not_load_is_left_out_and_none_is_an_error(start, tmp_path) -> None:
    engine, (bad, good) = start(2)
    bad.reload_status = 500
    engine.load_weights(tensors(1.0))
    assert bad.version.endswith("-loading") and bad.paused, "nobody takes it for current, and it answers nobody"
    assert engine.generate(prompts(6)) == expected(tmp_path, 6, weights=1.0)
    assert good.num_answers == 6 and counts(engine)["taken_out"] == 1
    good.reload_status = 500
    with pytest.raises(UserError, match="no vLLM server took the new weights: .*collective_rpc answered 500"):
        engine.load_weights(tensors(2.0))


def test_a_server_in_which_loading_broke_off_comes_back_with_whole_weights(start, tmp_path) -> None:
    """Half-filled layers take no weights, and would end the server if anybody asked it: they are made whole first."""
    engine, (bad, _) = start(2)
    bad.reload_status = 500
    engine.load_weights(tensors(1.0))
    wait_until(lambda: bad.control.count("reload") > 2)  # it is tried again, while the trouble lasts
    assert bad.paused and not bad.num_answers
    bad.reload_status = 200
    wait_until(lambda: engine.pool._servers[0].is_in)
    assert not bad.paused and not bad.is_half_loaded and bad.weights == 1.0
    assert engine.generate(prompts(12)) == expected(tmp_path, 12, weights=1.0)
    assert bad.num_answers > 0, "it is asked again"
    engine.load_weights(tensors(2.0))
    assert bad.control.count("reload nothing") == bad.control[: bad.control.index("resume")].count("reload nothing")


def test_a_run_puts_right_what_an_update_of_an_earlier_run_left(start, tmp_path) -> None:
    engine, servers = start(1)
    servers[0].reload_status = 500
    with pytest.raises(UserError, match="no vLLM server took the new weights"):
        engine.load_weights(tensors(1.0))
    engine.close()
    servers[0].reload_status = 200
    later = make_engine(servers, tmp_path)
    later.load_weights(tensors(2.0))
    assert later.generate(prompts(4)) == expected(tmp_path, 4, weights=2.0)
    later.close()


def test_weights_that_cannot_be_written_end_the_run_with_the_option(start, tmp_path) -> None:
    engine, _ = start(1)
    (tmp_path / "weights").write_text("in the way")
    stream = tensors(1.0)
    with pytest.raises(UserError, match="--weight-directory: .*File exists"):
        engine.load_weights(stream)
    assert next(stream, None) is None, "the export is collective: it must be exhausted"


# --- several replicas -----------------------------------------------------------------------------------------


def sample_as_replica(context, *, urls: list[str], folder: Path) -> tuple[list, list[str], dict[str, int]]:
    groups = context.init(ParallelSizes())
    replicas = Replicas(groups.data)
    engine = ServerEngine(
        folder / "model",
        tokenizer=tiny_tokenizer(),
        media=MEDIA,
        sampling=SAMPLING,
        transfer=DirectoryTransfer(folder / "weights", owned_urls=replicas.own(urls), replicas=replicas),
        replicas=replicas,
        settings=PoolSettings(urls=tuple(urls), timeout_seconds=PATIENCE_SECONDS, **FAST),
    )
    found = []
    for value in (1.0, 2.0):
        engine.load_weights(tensors(value))
        found.append(engine.generate(prompts(6)[context.rank :: context.world_size]))
    torch.distributed.barrier()
    engine.close()
    return found, replicas.own(urls), counts(engine)


@pytest.mark.parametrize("num_servers", [1, 3])
def test_replicas_share_servers_and_each_is_given_weights_once(ranks, tmp_path, num_servers: int) -> None:
    tiny_hf_config().save_pretrained(tmp_path / "model")
    servers = [FakeServer() for _ in range(num_servers)]
    urls = [server.url for server in servers]
    results = ranks(sample_as_replica, world_size=2, urls=urls, folder=tmp_path)
    assert sorted(url for _, owned, _ in results for url in owned) == sorted(urls), "one owner each"
    for server in servers:
        assert server.control.count("reload") == 2 and server.weights == 2.0
    for step, value in enumerate((1.0, 2.0)):
        wanted = expected(tmp_path, 6, weights=value)
        assert [group for found, _, _ in results for group in found[step]] == wanted[0::2] + wanted[1::2]
    assert all(not found for _, _, found in results)
    for server in servers:
        server.kill()
