"""One model type judged: a tiny model generates plainly and offloaded, in every mode and way, and both are compared.

Owns the verdict. Does not own modes and ways (`sweep_cells`), make models (`tiny_models`), nor share the types among
processes (`sweep_run`). A type proves nothing where its tokens are all the same, or do not change with the start of the
prompt: weights are made louder until they do, and `distinct` and `reach` say what came of it.
"""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from campaign.sweep_cells import CELLS, MODES, NEW_TOKENS, WAYS, Mode, call, prompt
from campaign.tiny_models import tiny_model
from kvoffload.api import offload
from kvoffload.config import OffloadConfig
from kvoffload.errors import KVOffloadError
from kvoffload.session.session import Session

logger = logging.getLogger(__name__)

TOLERANCE = 5e-6  # of logits in float32, times the largest of them where that is above 1 ...
CONTROL_FACTOR = 2.0  # ... or times what transformers itself differs by when it rounds otherwise
LOUDNESSES = (3.0, 6.0, 10.0, 1.5)
ENOUGH_DISTINCT = 6  # tokens among those generated
UPDATE = DynamicLayer.update


class CellOutcome(NamedTuple):
    """What was generated: per call the tokens, and the logits of all steps where the model gives them."""

    sequences: list[torch.Tensor]
    logits: list[torch.Tensor]


class CellVerdict(NamedTuple):
    """One mode in one way.

    Attributes:
        outcome: "equal"; "inexact" (the same tokens from other logits); "wrong" (other tokens); "refused" (with a
            KVOffloadError); "error" (with another exception); "plain" (transformers alone cannot do it).
        reason: of a refusal or an error.
        error: largest difference of logits, relative to the largest logit where that is above 1.
        h2d_bytes: from the host.
        recomputed_tokens: of all layers and steps.
        warnings: texts of those that plain generation does not give.
    """

    outcome: str
    reason: str = ""
    error: float = 0.0
    h2d_bytes: int = 0
    recomputed_tokens: int = 0
    warnings: tuple[str, ...] = ()


class Report(NamedTuple):
    """All verdicts of one type.

    Attributes:
        model_type: of transformers.
        model_class: name of the class that was made; empty where none could be.
        cache_layers: what transformers caches it in, by kind of layer.
        plain: why the type says nothing (not built, transformers alone does not generate); empty where it does.
        distinct: different tokens that plain greedy search gave.
        reach: largest change of a logit when the first tokens of the prompt are others, relative as `Verdict.error`.
        verdicts: by mode and way.
        seconds: all of it.
    """

    model_type: str
    model_class: str = ""
    cache_layers: str = ""
    plain: str = ""
    distinct: int = 0
    reach: float = 0.0
    verdicts: Mapping[tuple[str, str], CellVerdict] = MappingProxyType({})
    seconds: float = 0.0


def verdict_of(
    model_type: str, cells: Iterable[tuple[str, str]] = CELLS, on_stage: Callable[[str], Any] = lambda stage: None
) -> Report:
    """Everything about one type; no exception of a model leaves it.

    Args:
        model_type: of transformers.
        cells: modes and ways.
        on_stage: called with where it is: "plain", then "mode/way".
    """
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = _judge(model_type, cells, on_stage)
    return report._replace(seconds=time.perf_counter() - began)


def _judge(model_type: str, cells: Iterable[tuple[str, str]], on_stage: Callable[[str], Any]) -> Report:
    on_stage("plain greedy")
    try:
        model, wanted = _loud_model(model_type)
    except Exception as error:
        return Report(model_type, plain=f"not built: {described(error)}")
    report = Report(model_type, type(model).__name__, cache_layers(model))
    if isinstance(wanted, Exception):
        return report._replace(plain=f"does not generate from text alone: {described(wanted)}")
    verdicts: dict[tuple[str, str], CellVerdict] = {}
    references: dict[str, CellOutcome | Exception] = {"greedy": wanted}
    for mode, way in cells:
        if mode not in references:
            on_stage(f"plain {mode}")
            references[mode] = _plain(model, mode)
        on_stage(f"{mode}/{way}")
        verdict = compare(model, MODES[mode], WAYS[way], references[mode])
        if verdict.outcome == "inexact":
            on_stage(f"plain {mode} otherwise")
            if verdict.error <= CONTROL_FACTOR * _control(model, mode, references[mode]):
                verdict = verdict._replace(outcome="equal")
        verdicts[mode, way] = verdict
    return report._replace(distinct=_distinct(wanted), reach=_reach(model, wanted), verdicts=verdicts)


def _loud_model(model_type: str) -> tuple[PreTrainedModel, CellOutcome | Exception]:
    """A model whose tokens differ, or else the one where most do, and what it generates."""
    best: tuple[int, PreTrainedModel, CellOutcome | Exception] | None = None
    for loudness in LOUDNESSES:
        model = tiny_model(model_type, loudness=loudness)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
            model.generation_config.use_cache = True
        wanted = _plain(model, "greedy")
        distinct = -1 if isinstance(wanted, Exception) else _distinct(wanted)
        if best is None or distinct > best[0]:
            best = distinct, model, wanted
        if distinct < 0 or distinct >= ENOUGH_DISTINCT:
            break
    assert best is not None
    return best[1:]


def cache_layers(model: PreTrainedModel) -> str:
    """Kinds of transformers' cache layers, with how many there are: "3 DynamicLayer"; empty where it has no such."""
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:  # of a configuration that transformers makes no cache for
        return ""
    kinds = Counter(type(layer).__name__ for layer in layers)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _plain(model: PreTrainedModel, mode: str) -> CellOutcome | Exception:
    try:
        return _outcome(MODES[mode](model, None))
    except Exception as error:
        return error


def _control(model: PreTrainedModel, mode: str, wanted: CellOutcome | Exception) -> float:
    """How much logits differ for no other reason than rounding; 0 where tokens differ, too.

    Twice without us: with the plain attention of transformers, and with K and V that lie otherwise in memory.
    """
    found = []
    used = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        found.append(_plain(model, mode))
    except ValueError:  # the model has one attention only
        logger.debug("%s has no eager attention", type(model).__name__)
    finally:
        model.set_attn_implementation(used)
    with patch.object(DynamicLayer, "update", _side_by_side):
        found.append(_plain(model, mode))
    if isinstance(wanted, Exception):
        return 0.0
    runs = [one for one in found if not isinstance(one, Exception) and same_tokens(one, wanted)]
    return max((distance(one, wanted) for one in runs), default=0.0)


def _side_by_side(layer: DynamicLayer, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`DynamicLayer.update` with K and V as views of one tensor, a token's values behind its keys."""
    parts = [part.permute(2, 0, 1, 3) for part in UPDATE(layer, *args, **kwargs)]  # [tokens, rows, heads, dim]
    widths = [part.shape[2] * part.shape[3] for part in parts]
    both = torch.cat([part.flatten(2) for part in parts], dim=-1).split(widths, dim=-1)
    keys, values = (
        view.unflatten(2, part.shape[2:]).permute(1, 2, 0, 3) for view, part in zip(both, parts, strict=True)
    )
    return keys, values


def same_tokens(found: CellOutcome, wanted: CellOutcome) -> bool:
    """Whether all calls gave the same tokens."""
    if len(found.sequences) != len(wanted.sequences):
        return False
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found.sequences, wanted.sequences, strict=True))


def _distinct(outcome: CellOutcome) -> int:
    return len(set(outcome.sequences[0][:, -NEW_TOKENS:].flatten().tolist()))


def _reach(model: PreTrainedModel, wanted: CellOutcome) -> float:
    """How much the last logits change with the first tokens of the prompt."""
    ids = prompt()
    ids[:, :8] = prompt(tokens=8, seed=3)
    try:
        changed = _outcome([call(model, ids)])
    except Exception:  # of a type whose tokens mean something to it
        return 0.0
    return distance(changed, wanted) if wanted.logits else 0.0


def _outcome(outputs: list[Any]) -> CellOutcome:
    sequences = [getattr(out, "sequences", out) for out in outputs]
    return CellOutcome(sequences, [step for out in outputs for step in getattr(out, "logits", None) or ()])


def distance(found: CellOutcome, wanted: CellOutcome) -> float:
    """Largest difference of logits, relative to the largest logit where that is above 1."""
    if len(found.logits) != len(wanted.logits):
        return float("inf")
    error, size = 0.0, 1.0
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        is_out = ours.isinf() & (ours == theirs)
        step = (ours - theirs).masked_fill(is_out, 0).abs().max().item()
        error = max(error, step if step == step else float("inf"))
        size = max(size, theirs.masked_fill(theirs.isinf(), 0).abs().max().item())
    return error / size


def compare(model: PreTrainedModel, mode: Mode, config: OffloadConfig, wanted: CellOutcome | Exception) -> CellVerdict:
    """One offloaded run beside the plain outcome, or the exception that plain generation raised."""
    if isinstance(wanted, Exception):
        return CellVerdict("plain", described(wanted))
    session: Session | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with offload(model, config) as session:
                found = _outcome(mode(model, session.new_cache))
        except KVOffloadError as error:
            return CellVerdict("refused", f"{'offload' if session is None else 'generate'}: {error}")
        except Exception as error:
            return CellVerdict("error", described(error))
    said = tuple(dict.fromkeys(str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning)))
    difference = distance(found, wanted)
    outcome = "wrong" if not same_tokens(found, wanted) else "equal" if difference <= TOLERANCE else "inexact"
    stats = session.stats
    h2d_bytes, recomputed_tokens = (stats.h2d_bytes, stats.recomputed_tokens) if stats else (0, 0)
    return CellVerdict(outcome, "", difference, h2d_bytes, recomputed_tokens, said)


def described(error: BaseException) -> str:
    """An exception in one line, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
