# SPDX-License-Identifier: Apache-2.0
"""What `doctor` finds, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ..vllm_flags import NoEffect

State = Literal["ok", "problem", "note", "unknown"]


class Finding(BaseModel):
    about: str
    state: State
    """"note": worth knowing, and nothing wrong. "unknown": could not be asked here."""
    said: str
    do: str = ""
    """What to change; "" if nothing."""


class PassState(BaseModel):
    """A pass or a layer's method of this package."""

    name: str
    switch: str
    """The flag of vLLM's, or the setting, that asks for it."""
    state: str
    """"ours", or why not."""
    do: str = ""


class Engine(BaseModel):
    """What vLLM would make of the flags given."""

    gpu: str
    """The GPU that it was asked for, or what stood in for one."""
    model: str
    state: str = ""
    """Why the plugin keeps out of it; "" if it does not."""
    do: str = ""
    """What to change about that."""
    passes: list[PassState] = Field(default_factory=list)
    no_effect: list[NoEffect] = Field(default_factory=list)
    ignored: list[str] = Field(default_factory=list)
    """What among the flags is none of the engine's."""


class Diagnosis(BaseModel):
    version: str
    findings: list[Finding]
    engine: Engine | None = None
    """None if vLLM could not be asked."""

    @property
    def problems(self) -> list[str]:
        """One line for each thing that stands in the way."""
        lines = [f"{f.about}: {f.said}" for f in self.findings if f.state == "problem"]
        if self.engine is not None:
            if self.engine.state:
                what = (
                    "no pass would run, layers alone would fuse"
                    if self.engine.passes
                    else "the plugin would do nothing"
                )
                lines.append(f"{what}: {self.engine.state}")
            lines += [f"{n.flag} does nothing: {n.why}" for n in self.engine.no_effect]
        return lines

    @property
    def exit_status(self) -> int:
        """0: the plugin would be at work. 1: something stands in its way. 2: vLLM could not be asked."""
        if self.problems:
            return 1
        return 0 if self.engine is not None else 2
