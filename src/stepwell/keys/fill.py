"""A plan carried out on a module that exists: every tensor of a source has its place in it, or nothing is
written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from stepwell.keys.checkpoint import TensorSource
from stepwell.keys.engine import Plan
from stepwell.keys.report import FitError, Report, compare

__all__ = ["fill"]


def fill(
    module: nn.Module,
    renaming: Plan,
    source: TensorSource,
    *,
    name: str,
    absent: Mapping[str, str] = {},
) -> Report:
    """Tensors of `source` into those of `module`, as `renaming` says; name: of the source, for messages.

    absent: names of the module's tensors that the source may lack -> what stands there then. Raises FitError,
    before anything is written, for tensors that are missing, unknown or of another shape; and where all that
    there was to write stood there already.
    """
    ours = module.state_dict(keep_vars=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
    report = compare(name, renaming, source.shapes, shapes, absent)
    report.notes += source.notes
    if not report.ok:
        raise FitError(f"{name} does not fit: {report.problems()}", report)
    seen: dict[int, str] = {}
    for key, target in renaming.targets.items():
        kind = target.make(source.meta).dtype
        if kind.is_complex or (ours[key].is_floating_point() and not kind.is_floating_point):
            raise FitError(f"{name} does not fit: {target.sources[0]} holds numbers of {kind}", report)
        twin = seen.setdefault(id(ours[key]), key)
        if twin != key and not torch.equal(
            renaming.targets[twin].make(source.read), target.make(source.read)
        ):
            raise FitError(
                f"{name} does not fit: {key} and {twin} are one tensor here, and two there", report
            )
    changed = False
    with torch.no_grad():
        for key, target in renaming.targets.items():
            tensor = target.make(source.read).to(ours[key])
            changed |= not torch.equal(tensor, ours[key])
            ours[key].copy_(tensor)
    if not changed:
        raise FitError(
            f"{name} changed nothing: its {len(renaming.targets)} tensors stood there before", report
        )
    return report
