"""The model of a recipe for a detector, segmenter or classifier: what it is made of, and where it starts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from stepwell.data.fields import Strict
from stepwell.models.published.papers import find_published
from stepwell.models.published.published import Published
from stepwell.models.vision import settings_json
from stepwell.train.recipe import merged

__all__ = ["PerceptionModel"]


class PerceptionModel(Strict):
    """What is trained: a network with random weights, or with weights in some of its parts; or a whole model.

    start: a folder or owner/name on the hub, of which a commit, branch or tag is the `revision`; where it
    knows other classes than the data, the layers that tell classes start anew. published: settings by name
    (`stepwell list`), which backbone, head and images change. backbone: settings of a pyramid, or the JSON of
    a backbone of transformers with its model_type. parts: where parts start (models/parts.py), none where it
    is null; and their `revisions` on the hub. classes: names, by default those of the first data.
    """

    start: str | None = None
    revision: str | None = None
    published: str | None = None
    backbone: dict[str, Any] = {}
    head: dict[str, Any] = {}
    images: dict[str, Any] = {}
    parts: dict[str, str | None] = {}
    revisions: dict[str, str] = {}
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> PerceptionModel:
        ignored = sorted(self.model_fields_set - {"start", "revision", "classes", "images"})
        if self.start is not None and ignored:
            raise ValueError(f"start is a whole model; {ignored[0]} beside it would be ignored")
        if self.start is None and self.revision is not None:
            raise ValueError("revision is of a start on the hub, and there is no start")
        if self.start is None and self.published is None and not self.backbone:
            raise ValueError("give start, published or backbone")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Of the parts that start from something."""
        return {part: source for part, source in self.parts.items() if source is not None}

    def settings(self, task: str) -> dict[str, Any]:
        """JSON of `backbone`, `head` and `images`: those of the published model with the changes in them.
        Raises ValueError for a name that is not published, or of another task.
        """
        changes = {"backbone": self.backbone, "head": self.head, "images": self.images}
        if self.published is None:
            return changes
        published = find_published(self.published)
        if published is None or published.task != task:
            what = "is not published" if published is None else f"is of {published.task}, not of {task}"
            raise ValueError(f"model.published: {self.published} {what}; `stepwell list` has the names")
        return {name: _changed(theirs, changes[name]) for name, theirs in _json_of(published).items()}


def _json_of(published: Published) -> dict[str, Any]:
    parts = {"backbone": published.settings, "head": published.head, "images": published.images}
    return {name: {} if part is None else settings_json(part) for name, part in parts.items()}


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """JSON with changes in it; of another kind, these alone."""
    if changes.get("kind", base.get("kind")) != base.get("kind"):
        return changes
    whole: dict[str, Any] = merged(base, changes, "model")
    return whole
