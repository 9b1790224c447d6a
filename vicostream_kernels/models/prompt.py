"""The chat template, split around the place of the video.

A stream is ``system_ids`` (everything before the first chunk), chunks of ``vision_start``, video,
``vision_end``, and at a question ``question_ids``. The template itself is the checkpoint's own.
"""

from __future__ import annotations

from typing import Any

from vicostream_kernels.models.errors import NoChatTemplate

_PLACE = "vicostream-question-place"


class Prompt:
    """Token ids of the parts of a conversation about one video.

    ``vision_start_id``, ``video_id``, ``vision_end_id`` are the checkpoint's three marker ids.
    Raises ``NoChatTemplate`` when the template puts no video between these markers.
    """

    def __init__(
        self, tokenizer: Any, *, vision_start_id: int, video_id: int, vision_end_id: int
    ) -> None:
        self._tokenizer = tokenizer
        ids = [vision_start_id, video_id, vision_end_id]
        self._video = "".join(tokenizer.convert_ids_to_tokens(ids))
        _, self._before, self._after = self._split(None)

    def system_ids(self, system: str | None = None) -> list[int]:
        """Ids of all that comes before the first chunk; ``system`` None leaves the system message
        to the template."""
        head, _, _ = self._split(system)
        return self._encode(head)

    def question_ids(self, text: str) -> list[int]:
        """Ids of a question and of what opens the answer. Marker names inside ``text`` are plain
        text: a question cannot end its own turn."""
        return (
            self._encode(self._before)
            + self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            + self._encode(self._after)
        )

    def question_slice(self, ids: list[int]) -> slice:
        """Where in ``question_ids(text)`` the tokens of the text itself are."""
        return slice(len(self._encode(self._before)), len(ids) - len(self._encode(self._after)))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _split(self, system: str | None) -> tuple[str, str, str]:
        """The template's text before the video, between video and question, after the question."""
        messages: list[dict[str, Any]] = []
        if system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        content = [{"type": "video", "video": ""}, {"type": "text", "text": _PLACE}]
        messages.append({"role": "user", "content": content})
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise NoChatTemplate(f"the chat template fails on a video message: {error}") from error
        # The last ones: a system message may name the same markers.
        head, video, rest = text.rpartition(self._video)
        before, place, after = rest.partition(_PLACE)
        if not video or not place:
            raise NoChatTemplate(
                f"the chat template does not put {self._video} before the text of a video message: "
                "it is not a Qwen2.5-VL template"
            )
        return head, before, after
