# SPDX-License-Identifier: Apache-2.0
"""The fusion report of a server: asked of it while it runs, or read from where vLLM keeps its compiled code."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from .child import UserError
from .rank_report import RankReport
from .report import FusionReport

FILES = "rank_*.fusion_report.json"  # recorder.py writes them
_ROOTS = ("torch_aot_compile", "torch_compile_cache")  # of vLLM; below them is a folder for each engine's code
TIMEOUT_S = 60


def ask(url: str) -> FusionReport:
    """Of all ranks of the server at `url`, through vLLM's endpoint /collective_rpc, which it has in its development mode.

    Raises:
        UserError: it does not answer, or not with a report.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address of a server; one looks like http://localhost:8000")
    body = json.dumps({"method": "get_fusion_report"}).encode()
    endpoint = f"{url.rstrip('/')}/collective_rpc"
    request = urllib.request.Request(endpoint, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return FusionReport.from_ranks(json.load(response)["results"])
    except urllib.error.HTTPError as e:
        if e.code in (404, 405):
            raise UserError(
                f"{url} has no /collective_rpc: start it with VLLM_SERVER_DEV_MODE=1, or leave out --url to read what it "
                "has kept beside its compiled code"
            ) from None
        raise UserError(
            f"{url} answers with status {e.code}; it may have no plugin: vllm-fusion-plugin doctor"
        ) from None
    except OSError as e:
        raise UserError(f"{url} does not answer: {getattr(e, 'reason', None) or e}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url} does not answer with fusion reports; it may have no plugin") from None


def cache_root() -> Path:
    """Where vLLM keeps compiled code, as it finds it (all versions read)."""
    if root := os.environ.get("VLLM_CACHE_ROOT"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm"


def read(folder: Path) -> tuple[FusionReport, Path]:
    """Of all ranks on this machine of the engine that last compiled, from below `folder`; and where its code is.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    kept = list(folder.rglob(FILES)) if folder.is_dir() else []
    if not kept:
        raise UserError(
            f"no report is kept below {folder}: no engine with this package has compiled there; name another --cache"
        )
    newest = max(kept, key=lambda path: path.stat().st_mtime)
    engine = _engine(newest, folder)
    ranks: dict[int, RankReport] = {}
    for path in sorted(p for p in kept if engine in p.parents):
        try:
            part = RankReport.model_validate_json(path.read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read: {type(e).__name__}") from None
        if part.rank in ranks:
            _append(ranks[part.rank], part)
        else:
            ranks[part.rank] = part
    return FusionReport(ranks=[ranks[rank] for rank in sorted(ranks)]), engine


def _engine(path: Path, folder: Path) -> Path:
    """The folder with all that one engine's ranks keep."""
    for root in _ROOTS:
        if root in path.parts:
            return Path(*path.parts[: path.parts.index(root) + 2])
    return folder


def _append(report: RankReport, more: RankReport) -> None:
    """Another compiled part of the same rank: a draft model, or a block of a vision encoder."""
    first, part = len(report.subgraphs), 1 + max((s.part for s in report.subgraphs), default=-1)
    for subgraph in more.subgraphs:
        source = None if subgraph.reused_from is None else first + subgraph.reused_from
        report.subgraphs.append(subgraph.model_copy(update={"reused_from": source, "part": part}))
    report.notes += [note for note in more.notes if note not in report.notes]
