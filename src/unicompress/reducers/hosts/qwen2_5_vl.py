"""transformers' Qwen2.5-VL: any resolution, positions with rows and columns (M-RoPE)."""

from typing import Any

from unicompress.errors import InputError
from unicompress.reducers.hosts.base import hosts
from unicompress.reducers.hosts.placeholders import PlaceholderHost
from unicompress.tokens import Grid


@hosts.register("qwen2_5_vl")
class Qwen25VL(PlaceholderHost):
    """Images only. Kept tokens always keep their rows and columns, so `reindex` changes nothing.

    Its encoder attends within windows of patches in another order, so its attention is not
    offered. Video is refused.
    """

    kinds = ("Qwen2_5_VLForConditionalGeneration",)

    def parts(
        self, model: Any, given: dict[str, Any], output: Any, grids: list[Grid] | None
    ) -> list[Grid]:
        merge = self.inner(model).visual.spatial_merge_size
        found = []
        for frames, rows, columns in given["image_grid_thw"].tolist():
            if frames != 1:
                raise InputError(f"an image of {frames} frames is a video: pass single images")
            found.append(Grid(rows // merge, columns // merge))
        return found
