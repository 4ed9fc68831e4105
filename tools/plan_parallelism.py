"""Which parallel layouts fit a model on given GPUs, what each costs in memory and time, and the best three as flags.

    python tools/plan_parallelism.py --model 72b --gpus 256 --gpu-memory 80 --frames 128 --prompts-per-step 256
    python tools/plan_parallelism.py --model DIR --gpus 8 --gpu-memory 80 --frames 32 --json

On paper: ``megatron_ktr/accounting`` has the formulas. Memory is checked against measured peaks, time is an estimate
that stands and falls with ``--efficiency`` and the bandwidths. The rollout is no part of the step; what a GPU holds
while a colocated engine generates, with ``--offload-during-rollout`` and without, is said under the best layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `python tools/X.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ktr.accounting.links import Machine  # noqa: E402
from megatron_ktr.accounting.planner import GB, PIXELS_PER_TOKEN, Plan, Request, find_plans  # noqa: E402
from megatron_ktr.accounting.rates import settings_of  # noqa: E402
from megatron_ktr.accounting.saved import FUSED, TORCH_GPU  # noqa: E402
from megatron_ktr.config import Config, config_from_values  # noqa: E402
from megatron_ktr.config.objective_registry import available_objectives, objective_entry  # noqa: E402
from megatron_ktr.config.part_options import StepOptions  # noqa: E402
from megatron_ktr.config.view_registry import temporal_views, visual_views  # noqa: E402
from megatron_ktr.config.words import SHUFFLE_UNITS, VISION_PARALLELS  # noqa: E402
from megatron_ktr.errors import Parser, UserError, number, run_cli, whole  # noqa: E402
from megatron_ktr.files.json_files import to_json  # noqa: E402
from megatron_ktr.objectives import build_objective  # noqa: E402
from models.qwen2_5_vl.config import Qwen2_5_VLConfig  # noqa: E402
from models.qwen2_5_vl.published import PUBLISHED_CONFIGS  # noqa: E402

MEMORY_PARTS = (
    *("weights", "gradients", "optimizer", "reference", "fp8_caches"),
    *("activations", "vision", "head", "working"),
)
FP8 = {"none": {}, "step": {"trains_in_fp8": True}, "scoring": {"scores_in_fp8": True}}
OF_VIEWS = ("shuffle_unit", "num_shuffles", "visual_view", "temporal_view")
MOST_RESPONSES = 2**11
"""Of a prompt: the search looks at every response, for every layout."""
TIME_PARTS = ("compute", "bubble", "tensor", "context", "pipeline", "data")


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    request = _request(options)
    plans = find_plans(request)
    if options.json:
        layouts = [_as_json(plan) for plan in plans[: options.best]]
        print(to_json({"layouts": layouts, "rollout": _rollout_as_json(request)}), flush=True)
    else:
        print(_as_text(request, plans, num_shown=options.rows, num_best=options.best), flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine, request = Machine(), Request.__dataclass_fields__

    def add(flag: str, kind: Callable[[str], Any], default: Any, text: str, **more: Any) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default {default})", **more)

    _add_request(parser, add)
    add("--freeze", str, "", "parts that are not trained, by comma: vision, merger, language")
    add("--fp8", str, "none", "what runs in FP8: nothing, the whole step, or scoring alone", choices=tuple(FP8))
    parser.add_argument("--fp8-param-gather", action="store_true", help="weights of FP8 products are kept in FP8")
    parser.add_argument("--fp8-vision", action="store_true", help="the vision encoder's products in FP8, too")
    add("--vision-parallel", str, "tensor", "how the encoder is split", choices=VISION_PARALLELS)
    add("--transformer-impl", str, "te", "layers: Transformer Engine's or plain torch", choices=("te", "local"))
    add("--peak-tflops", number(above=0.0), machine.peak_tflops, "of one GPU, dense, in the precision of training")
    add("--efficiency", number(above=0.0, high=1.0), machine.efficiency, "share of the peak that a busy stage reaches")
    add("--gpus-per-node", whole(high=2**14), machine.gpus_per_node, "GPUs joined by fast links")
    add(
        "--link-bandwidth",
        number(above=0.0),
        machine.link_gb_per_second,
        "of a GPU inside its node, 10^9 bytes a second, one way",
    )
    add("--network-bandwidth", number(above=0.0), machine.network_gb_per_second, "of a GPU between nodes, likewise")
    add("--engine", str, "vllm_colocated", "rollout engine on the training GPUs", choices=("vllm_colocated", "hf"))
    add("--engine-memory", number(), request["engine_gb"].default, "of a colocated vLLM asleep, 10^9 bytes")
    add(
        "--rollout-memory-share",
        number(above=0.0, high=1.0),
        request["engine_share"].default,
        "of a GPU's memory, for a colocated vLLM awake",
    )
    add("--reserved-memory", number(), request["reserved_gb"].default, "context, buffers, fragmentation, 10^9 bytes")
    add("--best", whole(), 3, "layouts printed as flags, and put into the JSON")
    add("--rows", whole(low=0), 12, "rows of the table")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of output, no table")
    return parser


def _add_request(parser: Parser, add: Callable[..., None]) -> None:
    """The options of what is trained: the model, a prompt's group, and the objective."""
    request = Request.__dataclass_fields__
    parser.add_argument("--model", required=True, help="3b, 7b, 32b, 72b, or a Hugging Face directory or config.json")
    parser.add_argument("--gpus", type=whole(), required=True, help="number of GPUs")
    parser.add_argument("--gpu-memory", type=number(above=0.0), required=True, help="of one GPU, in 10^9 bytes")
    parser.add_argument("--frames", type=whole(low=2, even=True), required=True, help="frames of every video, even")
    add(
        "--pixels-per-frame",
        whole(high=2**26),
        128 * PIXELS_PER_TOKEN,
        "pixels of a frame; 28 x 28 make one visual token",
    )
    add("--text-length", whole(), request["text_length"].default, "prompt tokens that are not visual")
    add("--response-length", whole(), request["response_length"].default, "tokens of every response")
    add("--num-generations", whole(high=MOST_RESPONSES), request["num_generations"].default, "responses per prompt")
    add(
        "--temporal-responses",
        whole(low=0, high=MOST_RESPONSES),
        None,
        "per prompt, to shuffled frames; none = as the objective",
    )
    add("--prompts-per-step", whole(), request["prompts_per_step"].default, "prompts of a step over all GPUs")
    objectives = _sampled_objectives()
    add("--objective", str, "video_ktr", "whose passes a step runs, with its own defaults", choices=objectives)
    parser.add_argument("--grpo", action="store_const", const="grpo", dest="objective", help="--objective grpo")
    parser.add_argument("--no-reference", action="store_true", help="no KL term, no reference model")
    add("--shuffle-unit", str, None, "what a shuffle permutes; none = as the objective", choices=SHUFFLE_UNITS)
    add("--num-shuffles", whole(high=1000), None, "draws per step of each random view; none = as the objective")
    add("--visual-view", str, None, "what visual scores compare with; none = as the objective", choices=visual_views())
    temporal = temporal_views()
    add("--temporal-view", str, None, "what temporal scores compare with; none = as the objective", choices=temporal)


def _request(options: argparse.Namespace) -> Request:
    frozen = frozenset(part for part in options.freeze.split(",") if part)
    if not frozen < {"vision", "merger", "language"}:
        raise UserError(f"--freeze takes some, not all, of vision, merger, language; got {options.freeze!r}")
    config = _objective_config(options)
    objective = build_objective(config.objective, reward=config.reward, rollout=config.rollout)
    for name in OF_VIEWS if not objective.views else ():
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is not read by --objective {options.objective}, which has no "
                "counterfactual passes"
            )
    _check_fp8(options, has_views=bool(objective.views))
    return Request(
        config=_model(options.model),
        num_gpus=options.gpus,
        gpu_memory_gb=options.gpu_memory,
        num_frames=options.frames,
        pixels_per_frame=options.pixels_per_frame,
        text_length=options.text_length,
        response_length=options.response_length,
        num_generations=options.num_generations,
        num_shuffled=config.rollout.num_shuffled,
        prompts_per_step=options.prompts_per_step,
        settings=dataclasses.replace(
            settings_of(StepOptions.of(config), objective),
            has_streamed_head=True,
            frozen=frozen,
            keeps_fp8_weights=options.fp8_param_gather,
            has_fp8_vision=options.fp8_vision,
            **FP8[options.fp8],
        ),
        machine=Machine(
            peak_tflops=options.peak_tflops,
            efficiency=options.efficiency,
            gpus_per_node=options.gpus_per_node,
            link_gb_per_second=options.link_bandwidth,
            network_gb_per_second=options.network_bandwidth,
        ),
        kernels=FUSED if options.transformer_impl == "te" else TORCH_GPU,
        vision_parallel=options.vision_parallel,
        engine=options.engine,
        engine_gb=options.engine_memory,
        engine_share=options.rollout_memory_share,
        reserved_gb=options.reserved_memory,
    )


def _sampled_objectives() -> tuple[str, ...]:
    """The objectives whose responses are sampled; the groups that are planned are theirs."""
    return tuple(name for name in available_objectives() if not objective_entry(name).is_supervised)


def _objective_config(options: argparse.Namespace) -> Config:
    """A configuration with the objective, its own defaults, and what the command line says otherwise."""
    names = (*OF_VIEWS, "temporal_responses")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.no_reference:
        given["kl_beta"] = 0.0
    if options.temporal_responses:
        # Responses to shuffled frames are sampled for the bonus alone.
        given["temporal_bonus"] = 0.3
    elif options.temporal_responses == 0:
        given["temporal_bonus"] = 0.0
        del given["temporal_responses"]
    return config_from_values({"objective": options.objective, "num_generations": options.num_generations, **given})


def _check_fp8(options: argparse.Namespace, *, has_views: bool) -> None:
    if options.fp8 == "scoring" and not has_views:
        raise UserError(
            f"--fp8 scoring does not go with --objective {options.objective}, which has no counterfactual passes"
        )
    for flag, is_on in (("--fp8-param-gather", options.fp8_param_gather), ("--fp8-vision", options.fp8_vision)):
        if is_on and options.fp8 != "step":
            raise UserError(f"{flag} needs --fp8 step")
    if options.fp8_vision and options.vision_parallel != "tensor":
        raise UserError("--fp8-vision needs --vision-parallel tensor")
    if options.fp8 != "none" and options.transformer_impl != "te":
        raise UserError(f"--fp8 {options.fp8} needs --transformer-impl te")


def _model(name: str) -> Qwen2_5_VLConfig:
    if name.upper() in PUBLISHED_CONFIGS:
        return PUBLISHED_CONFIGS[name.upper()]
    if not Path(name).exists():
        sizes = ", ".join(PUBLISHED_CONFIGS).lower()
        raise UserError(f"--model {name}: neither one of {sizes} nor a directory with a config.json")
    return Qwen2_5_VLConfig.from_hf(name)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "flags": plan.flags,
        "memory_gb_per_gpu": round(plan.memory_gb, 3),
        "step_seconds": round(plan.time.total, 4),
        "bubble_fraction": round(plan.time.bubble_fraction, 5),
        "mfu": round(plan.mfu, 4),
        "tflops_per_gpu": round(plan.tflops_per_gpu, 2),
        "memory_gb_by_part": {name: round(v / GB, 3) for name, v in dataclasses.asdict(plan.memory).items()},
        "rollout_memory_gb_per_gpu": round(plan.rollout.peak / GB, 3),
        "offloaded_rollout_memory_gb_per_gpu": round(plan.rollout.peak_with_offload / GB, 3),
        "offload_gb_each_way": round(plan.rollout.optimizer / GB, 3),
        "save_host_gb_per_gpu": round(plan.save.host / GB, 3),
        "seconds_by_part": {name: round(v, 4) for name, v in dataclasses.asdict(plan.time).items()},
    }


def _as_text(request: Request, plans: list[Plan], *, num_shown: int, num_best: int) -> str:
    group = request.group
    prompt = group.prompt_length(request.config)
    num_tokens = prompt + group.num_response_tokens
    petaflops = request.useful_flops / 1e15
    lines = [
        f"a prompt group: {prompt - group.text_length} visual + {group.text_length} text + {request.num_generations} x "
        f"{request.response_length} response tokens = {num_tokens} rows, {petaflops:.3g} PFLOP",
        _work_line(request),
        f"{request.prompts_per_step} prompts a step on {request.num_gpus} GPUs of {request.gpu_memory_gb:g} GB; "
        f"{len(plans)} layouts fit, the fastest:",
        "",
        "memory in GB of the fullest rank, time in seconds; bub = bubble, tp/cp/pp/dp = communication that counts; "
        "+v = --recompute-vision",
        f"{'tp':>3}{'pp':>4}{'cp':>4}{'dp':>5}{'vpp':>4}  {'recompute':<11} |{'total':>7}"
        + "".join(f"{_short(name):>6}" for name in MEMORY_PARTS)
        + f" |{'step':>8}{'comp':>7}{'bub':>6}{'tp':>6}{'cp':>6}{'pp':>6}{'dp':>6}{'bubble':>8}{'MFU':>6}",
    ]
    for plan in plans[:num_shown]:
        layout, memory, time = plan.layout, dataclasses.asdict(plan.memory), dataclasses.asdict(plan.time)
        lines.append(
            f"{layout.tensor:>3}{layout.pipeline:>4}{layout.context:>4}{layout.data:>5}{layout.virtual:>4}  "
            f"{layout.recompute + '+v' * layout.recompute_vision:<11} |{plan.memory_gb:>7.1f}"
            + "".join(f"{memory[name] / GB:>6.1f}" for name in MEMORY_PARTS)
            + f" |{plan.time.total:>8.2f}{time['compute']:>7.1f}"
            + "".join(f"{time[name]:>6.1f}" for name in TIME_PARTS[1:])
            + f"{plan.time.bubble_fraction:>8.1%}{plan.mfu:>6.0%}"
        )
    reserved = plans[0].memory.engine + plans[0].memory.reserved
    engine = "a sleeping rollout engine" if request.engine == "vllm_colocated" else "transformers' engine"
    lines += ["", f"every total includes {reserved / GB:.3g} GB for {engine} and what is reserved"]
    for index, plan in enumerate(plans[:num_best], start=1):
        lines += ["", f"{index}. {plan.memory_gb:.1f} GB a GPU, {plan.time.total:.1f} s a step", f"   {plan.flags}"]
        lines += [f"   {_rollout_line(plan, request)}", f"   {_save_line(plan, request)}"]
    return "\n".join(lines)


def _rollout_as_json(request: Request) -> dict[str, Any]:
    first, second = request.rollout_work
    return {name: dataclasses.asdict(work) for name, work in (("prompts", first), ("shuffled_prompts", second))}


def _work_line(request: Request) -> str:
    """A line about what a step's rollout computes, whose time is the engine's and not part of the table."""
    first, second = request.rollout_work
    line = (
        f"a rollout: {first.prompt_tokens:,} prompt tokens are read, {first.sampled_tokens:,} sampled, the encoder "
        f"runs {first.encoder_flops / 1e15:.3g} PFLOP"
    )
    if not request.num_shuffled:
        return line
    share = second.sampled_tokens / (first.sampled_tokens + second.sampled_tokens)
    return (
        f"{line}; and for shuffled frames {second.prompt_tokens:,}, {second.sampled_tokens:,} ({share:.0%} of all) and "
        f"{second.encoder_flops / 1e15:.3g} PFLOP"
    )


def _rollout_line(plan: Plan, request: Request) -> str:
    """A line about memory in the rollout phase, in which a colocated engine is awake."""
    found = plan.rollout
    if request.engine == "hf":
        fits = found.peak_with_offload <= request.gpu_memory_gb * GB
        return (
            f"rollout, transformers' engine and a batch: {found.peak / GB:.1f} GB, with --offload-during-rollout "
            f"{found.peak_with_offload / GB:.1f} GB ({found.optimizer / GB:.1f} GB a step to the host and back)"
            + ("" if fits else "; this fits in neither way")
        )
    shares = [1 - (kept - found.engine) / GB / request.gpu_memory_gb for kept in (found.peak, found.peak_with_offload)]
    # Round the shares down, so that they fit.
    without, offloaded = (f"a share of {int(100 * share) / 100:g}" if share > 0 else "no engine" for share in shares)
    return (
        f"rollout, an engine awake in {request.engine_share:g} of the GPU: {found.peak / GB:.1f} GB, with "
        f"--offload-during-rollout {found.peak_with_offload / GB:.1f} GB ({found.optimizer / GB:.1f} GB a step to the "
        f"host and back); at most {without} fits, with it {offloaded}"
        + ("; this one fits in neither way" if shares[1] < request.engine_share else "")
    )


def _save_line(plan: Plan, request: Request) -> str:
    per_node = plan.save.host * min(request.num_gpus, request.machine.gpus_per_node)
    return (
        f"a checkpoint takes {plan.save.host / GB:.1f} GB of host memory a GPU, {per_node / GB:.0f} GB a node, until "
        "it is written"
    )


def _short(name: str) -> str:
    short = {
        "gradients": "grads",
        "optimizer": "optim",
        "reference": "ref",
        "fp8_caches": "fp8",
        "activations": "activ",
    }
    return short.get(name, name)[:5]


if __name__ == "__main__":
    run_cli(main)
