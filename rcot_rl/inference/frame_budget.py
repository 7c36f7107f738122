"""How many frames of a video fit into the context, computed before anything is asked.

The prompt about a video, its response and the video itself share `engine.max_model_len` tokens. The
longest text is known in advance: it has a whole description, and a reason of `MAX_REASON`
characters for each refused frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.protocol.keyframe_selection import MAX_REASON
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import ReasoningSection

TEMPLATE_TOKENS = 32
"""Upper bound of the tokens that the chat template adds to a user turn."""

VideoTask = Literal["vdg", "kfg"]

QUERY_TOKENS = 64
"""The length of a query is rounded up to a multiple of this, so that the queries about a long video
show the same frames."""


def video_tasks(settings: ReasoningSection) -> list[VideoTask]:
    """Return the tasks whose prompts show the video."""
    tasks: list[VideoTask] = ["vdg"] if settings.vdg else []
    return [*tasks, "kfg"] if settings.kfg or settings.rounds else tasks


def text_tokens(
    task: VideoTask,
    prompts: Prompts,
    settings: ReasoningSection,
    count: Callable[[str], int],
    query: str,
) -> int:
    """Return an upper bound of the tokens of a task's text and response.

    Args:
        count: Returns the number of tokens of a text.
        query: The expression.
    """
    if task == "vdg":
        return count(prompts.vdg(1, 2)) + settings.vdg_tokens
    refused = [(0, "x " * (MAX_REASON // 2))] * settings.rounds
    names = FrameNames((0.0,) if settings.frame_names == "seconds" else None)
    text = count(prompts.kfg_again("", 1, refused, "", 2, names))
    of_query = count(query)
    of_query += -of_query % QUERY_TOKENS
    return text + of_query + settings.vdg_tokens + settings.kfg_tokens
