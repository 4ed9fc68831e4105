"""Real ``vllm serve`` processes on this machine: same tokens as Hugging Face, same log-probs as the trainer, updates
through a directory, and a server that is killed.

Two servers serve all tests; the last one kills one of them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import ipaddress
import json
import subprocess
import threading
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ktr.batch.packing import MediaSpec
from megatron_ktr.config import config_from_values
from megatron_ktr.data.media.preprocess import PreprocessSettings
from megatron_ktr.data.synthetic import corpus, make_dataset
from megatron_ktr.data.template import PromptBuilder, VisualTokens, WordingTemplate, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.rollout.check.probes import probe_prompts
from megatron_ktr.rollout.hf import HFEngine
from megatron_ktr.rollout.sampling import SamplingSettings
from megatron_ktr.rollout.server.engine import ServerEngine
from megatron_ktr.rollout.server.member import PoolSettings
from megatron_ktr.rollout.server.replicas import Replicas
from megatron_ktr.rollout.server.weights import DirectoryTransfer
from megatron_ktr.rollout.server.wire import encode_request, medium_item, pack
from megatron_ktr.types import Prompt, RolloutGroup
from megatron_ktr.web.address import ApiKey
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.ports import free_port
from tests.support.serving import TOKEN, kill, open_url, start_server, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAMPLING = SamplingSettings(num_generations=4, max_response_length=32, seed=3)
GREEDY = replace(SAMPLING, temperature=0.0, num_generations=1)
TOLERANCE = 1e-4
"""Nats per token, both sides fp32 in other orders of summation: 1e-5 is seen. Old weights, or a second counted wrongly,
cost tenths of nats."""


@dataclass
class Served:
    """Two servers with the model of ``model_dir``."""

    model_dir: Path
    folder: Path
    urls: list[str]
    processes: list[subprocess.Popen]
    media: MediaSpec
    tokenizer: Any
    prompts: list[Prompt]

    @contextlib.contextmanager
    def engine(self, *, urls: list[str] | None = None, **settings: Any) -> Iterator[ServerEngine]:
        urls, replicas = urls or self.urls, Replicas()
        transfer = settings.pop("transfer", None)
        engine = ServerEngine(
            self.model_dir,
            tokenizer=self.tokenizer,
            media=self.media,
            sampling=SAMPLING,
            transfer=transfer or DirectoryTransfer(self.folder / "weights", owned_urls=urls, replicas=replicas),
            replicas=replicas,
            settings=PoolSettings(
                urls=tuple(urls),
                timeout_seconds=PATIENCE_SECONDS,
                token=ApiKey(TOKEN),
                in_flight_updates=settings.pop("in_flight", False),
                **settings,
            ),
        )
        try:
            yield engine
        finally:
            engine.close()

    def hf(self) -> HFEngine:
        return HFEngine(self.model_dir, tokenizer=self.tokenizer, media=self.media, sampling=SAMPLING)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    from models.qwen2_5_vl.config import Qwen2_5_VLConfig
    from models.qwen2_5_vl.media import media_spec

    folder = tmp_path_factory.mktemp("server")
    model_dir = folder / "model"
    save_tiny_model(model_dir, corpus=corpus())
    ports = [free_port(), free_port()]
    processes = [start_server(model_dir, port, folder / f"{port}.log", with_token=True) for port in ports]
    tokenizer = load_tokenizer(model_dir)
    media = media_spec(Qwen2_5_VLConfig.from_hf(model_dir), patchify=PreprocessSettings.from_model(model_dir).patchify)
    builder = PromptBuilder(
        tokenizer,
        visual_tokens=VisualTokens.from_model(model_dir, tokenizer),
        wording=WordingTemplate(model_dir / "prompt_template.txt"),
    )
    prompts = list(probe_prompts(builder, media=media, video_max_pixels=112 * 112).values())
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url, process, port in zip(urls, processes, ports, strict=True):
            wait_for(url, process, log=folder / f"{port}.log")
        yield Served(model_dir, folder, urls, processes, media, tokenizer, prompts)
    finally:
        for process in processes:
            kill(process)


def lasting_trouble(counts: Mapping[str, float]) -> list[str]:
    """Retries alone are none: a busy machine may miss that a server has closed an idle connection."""
    return [name for name in ("taken_out", "malformed", "resent") if counts[f"server/{name}"]]


def num_sampled(url: str) -> float:
    """Tokens the server has sampled since it started."""
    lines = open_url(f"{url}/metrics").decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


def new_weights(hf: HFEngine, *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in hf._parameters.items()  # their published names
    }


def gap(first: list[RolloutGroup], second: list[RolloutGroup]) -> float:
    """Mean |difference| of log-probs of the same tokens."""
    gaps = []
    for one, other in zip(first, second, strict=True):
        for ours, theirs in zip(one.rollouts, other.rollouts, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert (ours.text, ours.is_finished) == (theirs.text, theirs.is_finished)
            gaps += [abs(a - b) for a, b in zip(ours.sampler_logprobs, theirs.sampler_logprobs, strict=True)]
    print(f"{len(gaps)} log-probs differ by {max(gaps):.1e} at most")
    return sum(gaps) / len(gaps)


def test_media_are_packed_as_vllm_unpacks_them(served: Served) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item

    for medium in (medium for prompt in served.prompts for medium in prompt.media):
        item = medium_item(medium, media=served.media)
        found = decode_mm_kwargs_item(base64.b64encode(pack(item)).decode())
        assert set(found) == set(item)
        for name, entry in item.items():
            assert torch.equal(found[name].data, entry["data"]) and found[name].data.dtype == entry["data"].dtype
            assert found[name].field.keep_on_cpu == entry["field"][1]["keep_on_cpu"]
        if medium.kind == "video":
            assert found["second_per_grid_ts"].data.item() == medium.seconds_per_grid


def test_no_route_answers_without_the_token_and_nothing_listens_beyond_this_machine(served: Served) -> None:
    """Every route that vLLM has, and every socket of the server's processes."""
    url = served.urls[0]
    routes = json.loads(open_url(f"{url}/openapi.json"))["paths"]
    control = {"/collective_rpc", "/pause", "/resume", "/sleep", "/start_weight_update", "/reset_prefix_cache"}
    assert control <= set(routes), "they are open in vLLM itself, also with its --api-key"
    for path, method in ((path, method) for path, methods in routes.items() for method in methods):
        for token in ("", f"{TOKEN}x"):
            if (path, method) != ("/health", "get"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    open_url(f"{url}{path}", method=method.upper(), token=token)
                assert refused.value.code == 401, path
    processes = [psutil.Process(served.processes[0].pid)]
    processes += processes[0].children(recursive=True)
    listening = [one for process in processes for one in process.net_connections("inet") if one.status == "LISTEN"]
    assert {ipaddress.ip_address(one.laddr.ip).is_loopback for one in listening} == {True}
    assert int(url.rpartition(":")[2]) in {one.laddr.port for one in listening}
    assert not [process for process in processes if TOKEN in " ".join(process.cmdline())]


def test_greedy_tokens_are_hugging_faces_and_an_update_reaches_both_servers(served: Served) -> None:
    """The same prompts before and after: values cached from the old weights would show."""
    hf = served.hf()
    with served.engine() as engine:
        before = engine.generate(served.prompts, sampling=GREEDY)
        # The servers start with the model's weights; in a later run of this test they would carry others.
        assert gap(before, hf.generate(served.prompts, sampling=GREEDY)) < TOLERANCE
        for seed in (1, 2):
            weights = new_weights(hf, seed=seed)
            engine.load_weights(iter(weights.items()))
            hf.load_weights(iter(weights.items()))
            expected = hf.generate(served.prompts, sampling=GREEDY)
            for url in served.urls:
                with served.engine(urls=[url]) as alone:
                    assert gap(alone.generate(served.prompts, sampling=GREEDY), expected) < TOLERANCE
        assert before != expected, "the new weights are other weights"
        assert not lasting_trouble(engine.counts) and not engine.counts["server/mixed_versions"]


def test_seeds_repeat_responses_and_each_sample_has_its_own(served: Served) -> None:
    with served.engine() as engine:
        first = engine.generate(served.prompts, step=1)
        assert all(len({rollout.token_ids for rollout in group.rollouts}) == 4 for group in first)
        assert gap(first, engine.generate(served.prompts, step=1)) < TOLERANCE
        assert first != engine.generate(served.prompts, step=2)
        # What makes one request enough for a group: vLLM gives sample i the seed plus i.
        body = json.loads(
            encode_request(
                served.prompts[3],
                step=1,
                sampling=SAMPLING,
                mode=engine.mode,
                media=served.media,
                end_token_ids=engine.end_token_ids,
            )
        )
    params = body["sampling_params"]
    params |= {"n": 1, "seed": params["seed"] + 2}
    url = f"{served.urls[0]}/inference/v1/generate"
    answer = json.loads(open_url(url, method="POST", data=json.dumps(body).encode()))
    assert tuple(answer["choices"][0]["token_ids"]) == first[3].rollouts[2].token_ids


def test_top_k_cuts_the_sampling_and_not_the_logprobs(served: Served) -> None:
    """One token left to sample from: that of the hf engine, with its log-prob under the whole vocabulary."""
    one = dataclasses.replace(SAMPLING, top_k=1)
    hf = served.hf()
    with served.engine() as engine:
        # Tests before this one leave other weights in the servers.
        engine.load_weights(iter(list(hf._parameters.items())))
        found = engine.generate(served.prompts, step=1, sampling=one)
    assert gap(found, hf.generate(served.prompts, step=1, sampling=one)) < TOLERANCE
    assert max(max(rollout.sampler_logprobs) for group in found for rollout in group.rollouts) < -0.01


def test_a_stop_string_ends_responses_as_on_the_hf_engine(served: Served) -> None:
    hf = served.hf()
    with served.engine() as engine:
        engine.load_weights(iter(list(hf._parameters.items())))
        texts = [group.rollouts[0].text for group in engine.generate(served.prompts[:3], sampling=GREEDY)]
        # A character of the second response, somewhere inside; most tokens of this model are lone bytes.
        stop = next(char for char in texts[1][2:-1] if char.isascii() and char.isprintable())
        stopping = replace(GREEDY, stop=(stop,))
        found = engine.generate(served.prompts[:3], sampling=stopping)
    assert found[1].rollouts[0].is_finished and len(found[1].rollouts[0].text) < len(texts[1])
    assert gap(found, hf.generate(served.prompts[:3], sampling=stopping)) < TOLERANCE


def test_updates_in_flight_are_counted_and_end_with_the_new_weights(served: Served) -> None:
    hf = served.hf()
    long = replace(SAMPLING, max_response_length=300)
    with served.engine(in_flight=True) as engine:
        engine.load_weights(iter(list(hf._parameters.items())))
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: [found.append(engine.generate(served.prompts, step=s, sampling=long)) for s in (1, 2)]
        )
        weights = new_weights(hf, seed=5)
        before = [num_sampled(url) for url in served.urls]
        thread.start()
        wait_until(lambda: all(num_sampled(url) > old for url, old in zip(served.urls, before, strict=True)))
        engine.load_weights(iter(weights.items()))
        thread.join()
        assert len(found) == 2 and engine.counts["server/mixed_versions"] > 0
        assert not lasting_trouble(engine.counts)
        hf.load_weights(iter(weights.items()))
        got = engine.generate(served.prompts, sampling=GREEDY)
        assert gap(got, hf.generate(served.prompts, sampling=GREEDY)) < TOLERANCE


class BreaksOff(DirectoryTransfer):
    """Its first update breaks off in one server: the second file it reads is none, the first has some of the tensors of
    nearly every layer."""

    def __init__(self, *arguments: Any, victim: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.victim = victim

    def send(self, named_tensors: Any, *, label: str, start: Any) -> Any:
        def begin(gives: Any, failed: Any = None) -> Any:
            if label.endswith("-1"):
                gives = {**gives, self.victim: self._give_half}
            return start(gives, failed)

        return super().send(named_tensors, label=label, start=begin)

    async def _give_half(self, client: Any, broke_off: bool) -> None:
        half = self.directory / "half"
        half.mkdir(exist_ok=True)
        (path,) = self._written[-1].glob("*.safetensors")
        names = ("q_proj", "k_proj", "gate_proj", "attn.qkv.weight", "embed_tokens")
        tensors = {name: -tensor for name, tensor in load_file(path).items() if any(part in name for part in names)}
        save_file(tensors, half / "model-00001.safetensors")
        (half / "model-00002.safetensors").write_bytes(b"not a file of tensors")
        await client.reload_weights(str(half))


def test_a_server_in_which_an_update_broke_off_comes_back_with_whole_weights(served: Served, tmp_path: Path) -> None:
    """vLLM 0.32 takes no weights into layers that are half-filled, and ends when it computes with them."""
    hf = served.hf()
    options = dict(owned_urls=served.urls, replicas=Replicas(), victim=served.urls[1])
    with served.engine(transfer=BreaksOff(tmp_path, **options)) as engine:
        weights = new_weights(hf, seed=6)
        engine.load_weights(iter(weights.items()))
        assert engine.counts["server/taken_out"] == 1
        first = engine.generate(served.prompts, sampling=GREEDY)
        weights = new_weights(hf, seed=7)
        engine.load_weights(iter(weights.items()))
        assert engine.counts["server/taken_out"] == 1
    hf.load_weights(iter(weights.items()))
    expected = hf.generate(served.prompts, sampling=GREEDY)
    with served.engine(urls=served.urls[1:]) as alone:
        assert gap(alone.generate(served.prompts, sampling=GREEDY), expected) < TOLERANCE
    hf.load_weights(iter(new_weights(served.hf(), seed=6).items()))
    assert gap(first, hf.generate(served.prompts, sampling=GREEDY)) < TOLERANCE


# --- training -------------------------------------------------------------------------------------------------


def uneven_reward(response: str, record: dict) -> float:
    """An untrained model earns nothing; this gives its responses something to differ by."""
    return len(response) % 5 / 5


def half_of_the_records(response: str, record: dict) -> float:
    """The responses of every second record are worth the same."""
    return int(record["problem_id"].rpartition("-")[2]) % 2 * uneven_reward(response, record)


def train_with(context, *, values: dict[str, Any]) -> None:
    from megatron_ktr.train import train

    train(config_from_values(values))


def run_training(ranks, served: Served, run_dir: Path, *, world_size: int, **changes: Any) -> list[dict[str, Any]]:
    (served.folder / "token").write_text(f"{TOKEN}\n")
    data = served.folder / "data"
    if not data.exists():
        make_dataset(data, num_train=8, num_eval=1)
    values = {
        "model": str(served.model_dir),
        "data_path": str(data / "train.json"),
        "prompt_template": str(served.model_dir / "prompt_template.txt"),
        "video_num_frames": 8,
        "video_max_pixels": 3136,
        "max_prompt_length": 512,
        "engine": "vllm_server",
        "server_urls": tuple(served.urls),
        "server_token_file": str(served.folder / "token"),
        "num_generations": 3,
        "max_response_length": 16,
        "top_p": 1.0,
        "reward_functions": ("accuracy", "format", f"{__name__}:uneven_reward"),
        "reward_workers": 0,
        "length_bonus": 0.0,
        "kl_beta": 0.0,
        "optimizer": "sgd",
        "use_distributed_optimizer": False,
        "lr": 0.05,
        "lr_decay_style": "constant",
        "train_steps": 3,
        "prompts_per_step": 4,
        "run_dir": str(run_dir),
        **changes,
    }
    ranks(train_with, world_size=world_size, values=values)
    assert not (run_dir / "server_weights").exists() or not list((run_dir / "server_weights").iterdir())
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_three_steps_of_training_on_two_replicas(ranks, served: Served, tmp_path: Path) -> None:
    """Each step's weights reach the servers: the trainer finds its own log-probs in their responses."""
    steps = run_training(ranks, served, tmp_path / "run", world_size=2)
    assert [step["has_stepped"] for step in steps] == [1.0] * 3
    print([step["sampler_trainer_logprob_gap"] for step in steps])
    assert max(step["sampler_trainer_logprob_gap"] for step in steps) < TOLERANCE
    assert all(not lasting_trouble(step) and not step["server/mixed_versions"] for step in steps)


def test_three_steps_with_a_lag_are_one_step_off_and_corrected(ranks, served: Served, tmp_path: Path) -> None:
    steps = run_training(ranks, served, tmp_path / "run", world_size=1, lag=1, importance_sampling="token")
    assert [step["has_stepped"] for step in steps] == [1.0] * 3
    gaps = [step["sampler_trainer_logprob_gap"] for step in steps]
    assert gaps[0] < TOLERANCE < min(gaps[1:]), "the first step's weights are current, later ones a step old"


@pytest.mark.parametrize(
    ("objective", "reward", "asked"),
    [("t_grpo", "uneven_reward", "shuffled/prompts"), ("dapo", "half_of_the_records", "filter/rejected")],
)
def test_objectives_that_ask_engines_for_more_get_it(
    ranks, served: Served, tmp_path: Path, objective: str, reward: str, asked: str
) -> None:
    """T-GRPO asks a second time with shuffled frames, DAPO once more for each group of equal rewards."""
    rewards = ("accuracy", f"{__name__}:{reward}")
    changes = dict(objective=objective, reward_functions=rewards, train_steps=1)
    (step,) = run_training(ranks, served, tmp_path / "run", world_size=1, **changes)
    assert step["has_stepped"] == 1.0 and step["num_prompts"] == 4 and step[asked] >= 1
    assert step["sampler_trainer_logprob_gap"] < TOLERANCE and not lasting_trouble(step)


# --- the last test: it kills a server -------------------------------------------------------------------------


def test_a_server_killed_in_mid_batch_loses_no_prompt(served: Served) -> None:
    long = replace(SAMPLING, max_response_length=200)
    many = [replace(prompt, problem_id=f"{index}") for index, prompt in enumerate(served.prompts * 3)]
    with served.engine(probe_seconds=0.5) as engine:
        engine.load_weights(iter(list(served.hf()._parameters.items())))
        expected = engine.generate(many, sampling=long)
        before = num_sampled(served.urls[1])

        def kill_in_mid_batch() -> None:
            wait_until(lambda: num_sampled(served.urls[1]) > before)
            kill(served.processes[1])

        killer = threading.Thread(target=kill_in_mid_batch)
        killer.start()
        found = engine.generate(many, sampling=long)
        killer.join()
        assert len(found) == len(many) and all(len(group.rollouts) == 4 for group in found)
        same = sum(one.rollouts == other.rollouts for one, other in zip(found, expected, strict=True))
        counts = {name: number for name, number in engine.counts.items() if number}
        print(f"{same} of {len(many)} groups have the same bits; {counts}")
        assert counts["server/taken_out"] == 1 and counts["server/resent"] >= 1
        engine.load_weights(iter(list(served.hf()._parameters.items())))
        assert len(engine.generate(served.prompts)) == len(served.prompts), "the run goes on with one server"
