"""Pictures of media that lie beside a page: one JPEG an image or video, with some of its frames side by side.

    frames/3f0c….jpg   at most 8 frames of 160 pixels; its comment says when they are shown and of how many they are

A page of thousands of items loads only those that are looked at. A strip is made once: either from the frames that a
model is shown, while it is asked, or later by decoding the media again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megatron_ktr.data.media.request import MediaSource
from megatron_ktr.data.media.video import FrameSampling
from megatron_ktr.data.unusable import UnusableMedia
from megatron_ktr.errors import UserError
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import parse_json
from megatron_ktr.report.frames import choose_evenly, make_small, read_shown

FOLDER = "frames"
MOST_FRAMES = 8
LONG_SIDE = 160
_JPEG_QUALITY = 78


@dataclass(frozen=True)
class MediaPlace:
    """Where the media of a benchmark lie, and which frames a model was shown of them."""

    root: Path | None
    sampling: FrameSampling


class StripFolder:
    """The strips beside the page ``page``."""

    def __init__(self, page: Path) -> None:
        self._folder = page.parent / FOLDER

    def save(self, source: MediaSource, frames_FCHW: Tensor, *, group: str, seconds: Sequence[float] = ()) -> None:
        """Makes the strip of a medium from the frames that a model is shown, unless it is there.

        Args:
            frames_FCHW: uint8, of any size.
            group: the benchmark; names of media are unique within it.
            seconds: when each frame is shown; empty for an image.

        Raises:
            UserError: it cannot be written.
        """
        path = self._path(source, group)
        if _read(path) is None:
            chosen = choose_evenly(len(frames_FCHW), MOST_FRAMES)
            captions = [f"{seconds[place]:.1f} s" for place in chosen] if seconds else ["image"] * len(chosen)
            small = make_small(frames_FCHW[chosen], long_side=LONG_SIDE)
            self._write(path, small, captions=captions, num_sampled=len(frames_FCHW))

    def find(self, source: MediaSource, *, group: str, place: MediaPlace | None) -> dict[str, Any]:
        """The strip as the page's script takes it: name, url, width, height, captions and num_sampled; or the name and
        the ``problem`` why there is none.

        Args:
            place: decodes the medium if its strip is not there; None does not.
        """
        path = self._path(source, group)
        found = _read(path)
        if found is None:
            if place is None or place.root is None:
                return {"name": source.name, "problem": "no picture was made, and no place of the media is known"}
            try:
                shown = read_shown(
                    source, place.root, sampling=place.sampling, max_frames=MOST_FRAMES, long_side=LONG_SIDE
                )
            except (UnusableMedia, UserError, ValueError) as error:
                return {"name": source.name, "problem": str(error)}
            self._write(path, shown.frames_FCHW, captions=shown.captions, num_sampled=shown.num_sampled)
            found = _read(path)
        return {"name": source.name, "url": f"{FOLDER}/{path.name}", **(found or {})}

    def _path(self, source: MediaSource, group: str) -> Path:
        key = json.dumps([group, source.kind, source.written, source.request.given()], sort_keys=True)
        digest = hashlib.blake2b(key.encode("utf-8", errors="surrogatepass"), digest_size=16).hexdigest()
        return self._folder / f"{digest}.jpg"

    def _write(self, path: Path, frames_FCHW: Tensor, *, captions: Sequence[str], num_sampled: int) -> None:
        picture = torch.cat(list(frames_FCHW), dim=-1)  # [C, H, F W]
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        comment = json.dumps({"captions": list(captions), "num_sampled": num_sampled})
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY, comment=comment.encode("ascii"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any] | None:
    """Size and comment of a strip; None if it is not there, or is none of ours."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            comment = parse_json(bytes(image.info["comment"]).decode("ascii"))
            return {
                "width": image.width,
                "height": image.height,
                "captions": [str(caption) for caption in comment["captions"]],
                "num_sampled": int(comment["num_sampled"]),
            }
    except (OSError, KeyError, ValueError, TypeError):
        return None
