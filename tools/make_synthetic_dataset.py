"""Draws synthetic video questions as real mp4 files, with Video-R1 style JSON beside them.

    python tools/make_synthetic_dataset.py --out data/shapes --num-train 3000 --num-eval 400 \
        --tasks colour,count,order

Writes train.json, eval.json, three files for supervised fine-tuning (sft_lookup.json, sft.json, sft_guess.json) and
videos/. Tasks: colour and count need what is seen, order needs when it is seen; motion and shape are harder options.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ktr.config.limits import LARGEST_INTEGER
from megatron_ktr.data.synthetic import DEFAULT_TASKS, TASKS, corpus, make_dataset
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import Parser, number, run_cli, whole


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--num-train", type=whole(), default=3000, help="training questions (default 3000)")
    parser.add_argument("--num-eval", type=whole(low=0), default=400, help="held-out questions (default 400)")
    parser.add_argument("--tasks", default=",".join(DEFAULT_TASKS), help=f"some of {','.join(TASKS)}")
    parser.add_argument(
        "--order-share", type=number(high=1.0), default=0.5, help="share of order questions (default 0.5)"
    )
    parser.add_argument(
        "--num-frames", type=whole(low=4, high=4096, even=True), default=8, help="frames of a video, even (default 8)"
    )
    parser.add_argument(
        "--size",
        type=whole(low=28, high=4096, even=True),
        default=56,
        help="side of a frame in pixels, even (default 56)",
    )
    parser.add_argument("--seed", type=whole(low=0, high=LARGEST_INTEGER), default=0)
    parser.add_argument("--model", type=Path, help="also write the tiny random model of the demo to this directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    files = make_dataset(
        options.out,
        num_train=options.num_train,
        num_eval=options.num_eval,
        seed=options.seed,
        tasks=tuple(options.tasks.split(",")),
        order_share=options.order_share,
        num_frames=options.num_frames,
        size=options.size,
    )
    if options.model is not None:
        save_tiny_model(options.model, corpus=corpus(), seed=options.seed, frame_size=options.size)
    counts = {stem: len(records) for stem, records in files.items()}
    if options.json:
        print(json.dumps({"out": str(options.out), "records": counts}))
        return
    print(f"wrote {options.out}")
    for stem, count in counts.items():
        print(f"  {stem + '.json':<18} {count:>6} questions")


if __name__ == "__main__":
    run_cli(main)
