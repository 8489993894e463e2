# SPDX-License-Identifier: Apache-2.0
"""Flags of `vllm serve`, parsed as vLLM parses them, and which of its fusion flags do nothing.

Importing this imports neither vLLM nor torch; `parse`, `engine_config` and `without_effect` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from .child import UserError

INDUCTOR_PARTITION = "-cc.use_inductor_graph_partition=true"


class NoEffect(BaseModel):
    """A fusion flag that was set, and that vLLM accepts and shows, and that changes nothing."""

    flag: str
    why: str
    do: str = ""


class Flags(NamedTuple):
    arguments: Any
    """vLLM's EngineArgs."""
    asked: dict[str, bool]
    """vLLM's fusion flags that were set, by their names in PassConfig."""
    ignored: list[str]
    """What is no flag of the engine's, such as `--port`."""


def parse(flags: Sequence[str], **fixed: Any) -> Flags:
    """What `vllm serve` would make of `flags`, in which the model may come first. Imports vLLM.

    fixed: fields of EngineArgs that have these values whatever the flags say.

    Raises:
        UserError: vLLM does not accept them.
    """
    from . import compat

    parser = compat.engine_parser()

    def refuse(message: str) -> None:
        raise UserError(f"vLLM does not accept these flags: {_joined(message)}")

    ignored: list[str] = []
    parse_known = parser.parse_known_args

    def parse_and_keep(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        namespace, unknown = parse_known(*args, **kwargs)
        ignored.extend(unknown)
        return namespace, []

    parser.error, parser.parse_known_args = refuse, parse_and_keep
    model, rest = split_model(flags)
    words = ["--model", model, *rest] if model else rest
    try:
        namespace = parser.parse_args(words)
        arguments = compat.engine_arguments(namespace)
    except UserError:
        raise
    except SystemExit:  # --help, --version
        raise UserError(f"{' '.join(flags)}: no flags to serve with") from None
    except Exception as e:
        raise UserError(f"vLLM does not accept these flags: {_first_line(e)}") from None
    for name, value in fixed.items():
        setattr(arguments, name, value)
    return Flags(arguments, compat.fusion_flags(arguments.compilation_config), ignored)


def engine_config(arguments: Any) -> Any:
    """The VllmConfig that `vllm serve` would arrive at.

    Raises:
        UserError: vLLM refuses the flags or the model's configuration.
    """
    from vllm.usage.usage_lib import UsageContext

    try:
        return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as e:  # vLLM's, transformers' and pydantic's refusals have no class in common
        raise UserError(f"vLLM refuses this model or these flags: {_first_line(e)}") from e


def _first_line(error: Exception) -> str:
    """What vLLM says. Its configurations are pydantic's, whose messages begin with a count and a field."""
    try:
        said = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())  # type: ignore[attr-defined]
        return _joined(said)
    except AttributeError:
        said = _joined(str(error)) or "it does not say why"
        return said if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {said}"


def _joined(message: str) -> str:
    """A message in one line, without the addresses that pydantic adds."""
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("For further information"))
    text = text.partition(" Supported architectures:")[0]  # all that vLLM knows
    return text if len(text) <= 400 else f"{text[:400]}..."


# ---- models ----------------------------------------------------------------------------------------------------------


def split_model(flags: Sequence[str]) -> tuple[str, list[str]]:
    """The model that flags as for `vllm serve` name, "" if none, and the other flags."""
    words = list(flags)
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    for i, word in enumerate(words):
        if word == "--model" and i + 1 < len(words):
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith("--model="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
    return "", words


def model_folder(model: str) -> Path:
    """The folder with a model's config.json: itself, or where Hugging Face keeps what it has fetched of it.

    Raises:
        UserError: it is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder.resolve()
        raise UserError(f"{model} has no config.json; name a model's folder, or its id on the hub")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {model}; name a model's folder, or its id on the hub")
    found: Any = None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no id
        pass
    except ImportError as e:
        raise UserError(f"to look for {model} in the hub's cache needs huggingface_hub: {e}") from None
    if not isinstance(found, str):
        fetch = f"hf download {model} config.json"
        raise UserError(f"{model} is neither a folder nor in Hugging Face's cache; where there is a network: {fetch}")
    return Path(found).parent


# ---- flags that do nothing -------------------------------------------------------------------------------------------


def without_effect(config: Any, asked: Mapping[str, bool]) -> list[NoEffect]:
    """Which fusion flags do nothing in the engine of `config`, a VllmConfig, as far as that shows before it compiles.

    asked: those that a user has set."""
    from . import compat

    wanted = [flag for flag, value in asked.items() if value]
    nothing = compat.why_nothing_compiles(config)
    if nothing:
        return [NoEffect(flag=flag, why=nothing, do=what_compiles(nothing)) for flag in wanted]
    found = []
    passes = config.compilation_config.pass_config
    for flag in wanted:
        if not getattr(passes, flag, True):
            found.append(NoEffect(flag=flag, why="vLLM has switched it off again; its log says why"))
        elif reason := _unmet(flag, config):
            found.append(reason)
    return found


def what_compiles(nothing: str) -> str:
    """What to change so that vLLM compiles, by what `compat.why_nothing_compiles` says."""
    for kind, do in {
        "eager": "leave out --enforce-eager, -O0 and -cc.mode=0",
        "breakable": "VLLM_USE_BREAKABLE_CUDAGRAPH=0 compiles such a model, if vLLM can",
        "not compiled by vLLM": "-cc.mode=3; vLLM's CPU engine has no such mode",
        "not compiled: backend": "leave out -cc.backend",
    }.items():
        if nothing.startswith(kind):
            return do
    return ""


def _unmet(flag: str, config: Any) -> NoEffect | None:
    from . import compat

    if flag in ("fuse_allreduce_rms", "enable_sp") and config.parallel_config.tensor_parallel_size == 1:
        return NoEffect(flag=flag, why="with a tensor-parallel size of 1 nothing is reduced")
    if flag == "fuse_attn_quant" and compat.splits_at_attention(config):
        why = "vLLM splits the graph at attention (splitting_ops), so no pass sees attention and quantiser in one graph"
        return NoEffect(flag=flag, why=why, do=INDUCTOR_PARTITION)
    model = config.model_config
    if flag.endswith("_quant") and model is not None and not model.is_quantized:
        return NoEffect(flag=flag, why="this model is not quantised", do="serve an FP8 or FP4 checkpoint")
    return None
