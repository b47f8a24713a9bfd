"""The integer program over a table of options: its linear relaxation, and whole blocks near it.

Owns the three families of rows, whatever the table holds: seconds of each resource, bytes of each tier, and every block
in one option; whole chunks as the fourth; and what a schedule adds. Does not own the options (`options`), what a
choice costs (`step_time`) nor what is made of the answer (`planner`). Alone imports PuLP; HiGHS solves, CBC where
highspy is missing.

    T >= fixed[res] + L * sum_o seconds[o][res] * n_o     every resource: all overlap
    T >= fixed[issue] + L * sum_o chunk_s[o] * chunks_o   chunks_o * chunk_blocks >= n_o, whole
    sum_o bytes[o][tier] * n_o <= capacity[tier]          every tier
    sum_o n_o = s,  n_o >= stored_o

Minimised in turn: T; at T within `EQUAL_FRACTION` the loss of precision, then the bytes over the link, then the blocks
that are recomputed. Few blocks are tried in every combination; else the relaxation is solved, and whole numbers near it
are compared: of many options those that the relaxation uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pulp

from kvoffload.planning.options import RESOURCES, Table
from kvoffload.planning.placement import PLAIN, TIERS, FormName, Tier
from kvoffload.planning.step_time import Counts, allowed, costs

EQUAL_FRACTION = 3e-4  # steps this close are the same, so that the one with fewer bytes is taken
MAX_COMBINATIONS = 4000  # that are tried one and all
MAX_EXCHANGES = 5000  # of blocks among all options, tried at once
MAX_MOVES = 64  # of blocks between options, after whole numbers near the fractional optimum were compared
OBJECTIVE_SCALE = 1000.0  # the solver sees times of about this size, far above its absolute tolerance
SOLVER_TOLERANCE = 1e-10
LOSS_WEIGHT = 1e3  # of a block's loss of precision, against the bytes of one over the link
MOST_OPTIONS = 5  # whose whole numbers are compared in every combination
RECOMPUTED_WEIGHT = 1e-4  # of a block, against the bytes of one over the link


def best_counts(table: Table) -> Counts | None:
    """Blocks of each option, [options]; None if nothing fits."""
    if table.split is not None and (table.split or not _has_choice(table)):
        found = [_at_split(table, form) for form in _kept_forms(table)]
        return _best_of(table, np.array([one for one in found if one is not None]).reshape(-1, len(table.options)))
    possible = [idx for idx, most in enumerate(table.most) if most]
    if 0 < len(possible) < len(table.options):
        return _placed(table, possible, best_counts(table.with_options(possible)))
    free = table.num_blocks - sum(table.stored)
    if math.comb(free + len(table.options) - 1, len(table.options) - 1) <= MAX_COMBINATIONS:
        return _best_of(table, _compositions(free, len(table.options)) + np.array(table.stored))
    centres = _centres(table)
    if len(table.options) > MOST_OPTIONS:
        return _best_of_used(table, centres)
    return _best_near(table, centres)


def _has_choice(table: Table) -> bool:
    """Whether blocks that are not recomputed may have more than one form."""
    return len(_kept_forms(table)) > 1


def _kept_forms(table: Table) -> tuple[FormName, ...]:
    """Forms that are not recomputed."""
    return tuple(dict.fromkeys(option.form for option in table.options if not option.is_recomputed))


def _best_of_used(table: Table, centres: Sequence[Sequence[float]]) -> Counts | None:
    """The best choice with the options alone that the relaxation uses, that have blocks, or that are plain.

    Where no whole numbers of these fit, with the smallest of each tier as well.
    """
    used = {
        idx
        for idx, option in enumerate(table.options)
        if option.form == PLAIN or table.stored[idx] or any(centre[idx] > SOLVER_TOLERANCE for centre in centres)
    }
    smallest = {
        min(in_tier, key=lambda idx: sum(table.options[idx].bytes.values()))
        for tier in TIERS
        if (in_tier := [idx for idx, option in enumerate(table.options) if option.tier == tier])
    }
    for tried in (sorted(used), sorted(used | smallest)):
        best = _best_near(table.with_options(tried), [[centre[idx] for idx in tried] for centre in centres])
        if best is not None:
            return _placed(table, tried, best)
    return None


def _placed(table: Table, used: Sequence[int], counts: Counts | None) -> Counts | None:
    """Counts of some of the options among those of all."""
    if counts is None:
        return None
    found = np.zeros(len(table.options), dtype=np.int64)
    found[list(used)] = counts
    return found


def _best_near(table: Table, centres: Sequence[Sequence[float]]) -> Counts | None:
    """The best of the whole numbers near fractional optima."""
    near = [_near(table, centre) for centre in centres]
    found = [_best_of(table, one, equal_fraction=0.0) for one in near]
    shortest = _best_of(
        table,
        np.array([_descended(table, one) for one in found if one is not None]).reshape(-1, len(table.options)),
        equal_fraction=0.0,
    )
    if shortest is None:
        return None
    limit_s = float(costs(table, shortest[None, :]).step_s[0]) * (1 + EQUAL_FRACTION)
    best = _best_of(table, np.concatenate([*near, shortest[None, :]]), limit_s=limit_s)
    assert best is not None
    return _descended(table, best, limit_s=limit_s)


def _centres(table: Table) -> list[list[float]]:
    """Fractional optima; empty where there are none.

    The relaxation spreads the cost that KVPR's barrier has as a whole, so there the optimum without one stands beside.
    """
    found = _relaxed(table, has_barrier=True)
    if table.schedule == "kvpr":
        found += _relaxed(table, has_barrier=False)
    return found


def _best_of(
    table: Table, counts: Counts, *, equal_fraction: float = EQUAL_FRACTION, limit_s: float | None = None
) -> Counts | None:
    """The best of some choices: the shortest step, then least loss, fewest bytes over the link, least recomputation.

    Args:
        table: the problem.
        counts: the choices.
        equal_fraction: steps that much longer than the shortest count as equal.
        limit_s: up to which all steps are equal, instead.
    """
    counts = counts[allowed(table, counts)]
    step_s = costs(table, counts).step_s
    if limit_s is None:
        limit_s = float(step_s.min(initial=math.inf)) * (1 + equal_fraction)
    counts, step_s = counts[step_s <= limit_s], step_s[step_s <= limit_s]
    if not len(counts):
        return None
    loss, link = (
        counts @ np.array([getattr(option, name) for option in table.options], dtype=np.float64)
        for name in ("loss", "link_bytes")
    )
    crossing, recomputed = (
        counts @ np.array([option.restore_s is not None and option.tier in tiers for option in table.options])
        for tiers in (("host",), TIERS)
    )
    best: Counts = counts[np.lexsort((step_s, recomputed, crossing, link, loss))[0]]
    return best


@lru_cache(maxsize=64)
def _compositions(total: int, parts: int) -> Counts:
    """All ways to write `total` as a sum of so many numbers, in order, [ways, parts]."""
    cuts = np.array(list(itertools.combinations(range(total + parts - 1), parts - 1)), dtype=np.int64)
    cuts = cuts.reshape(-1, parts - 1)
    edges = np.concatenate(
        [np.full((len(cuts), 1), -1), cuts, np.full((len(cuts), 1), total + parts - 1)], axis=1, dtype=np.int64
    )
    return np.diff(edges, axis=1) - 1


def _at_split(table: Table, form: FormName) -> Counts | None:
    """At a fixed share of recomputed blocks every cost grows with the blocks on the host: the fewest that are allowed.

    The share is rounded to whole blocks, and moved no further than blocks already stored demand. All other blocks that
    are not stored yet have the one form.
    """
    assert table.split is not None
    kinds = [(option.tier, option.form) for option in table.options]
    kv, resident_kv = kinds.index(("host", form)), kinds.index(("device", form))
    recomputed = [idx for idx, option in enumerate(table.options) if option.tier == "host" and option.is_recomputed]
    chosen = [*recomputed[:1], kv, resident_kv]
    stored = np.array(table.stored, dtype=np.int64)
    kept = int(stored.sum() - stored[chosen].sum())  # other resident blocks, and whatever else there is
    offloaded = np.arange(int(stored[chosen[:-1]].sum()), table.num_blocks - kept + 1)
    counts = np.tile(stored, (len(offloaded), 1))
    for x in recomputed[:1]:
        counts[:, x] = np.clip(np.round(table.split * offloaded), stored[x], offloaded - stored[kv])
    counts[:, kv] = offloaded - sum(counts[:, x] for x in recomputed[:1])
    counts[:, resident_kv] = table.num_blocks - kept - offloaded
    counts = counts[allowed(table, counts)]
    return counts[0] if len(counts) else None


class Program(NamedTuple):
    """The integer program, and those of its variables that are read back."""

    problem: pulp.LpProblem
    step: pulp.LpVariable  # T in units of `unit_s`
    blocks: tuple[pulp.LpVariable, ...]  # n_o
    unit_s: float
    tie_break: pulp.LpAffineExpression  # loss, far behind it bytes over the link, then blocks that are recomputed


def program(table: Table) -> Program:
    """The program for a free split, minimising T."""
    layers, s = table.num_layers, table.num_blocks
    everything = np.full((1, len(table.options)), 0, dtype=np.int64)
    everything[0, -1] = s  # K and V on the host
    unit_s = (float(costs(table, everything).step_s[0]) or 1.0) / OBJECTIVE_SCALE
    weighted = pulp.LpAffineExpression
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    # Since 3.3 PuLP wants variables made by their problem and warns of the constructor. Calling what does not warn
    # needs no `warnings.catch_warnings`, which swaps the filters of the whole process under the feet of other threads.
    variable = getattr(problem, "add_variable", pulp.LpVariable)
    step = variable("step", 0)
    blocks = tuple(
        variable(option.name, least, most, pulp.LpInteger)
        for option, least, most in zip(table.options, table.stored, table.most, strict=True)
    )
    problem += step
    # every block in one option
    problem += weighted([(n, 1) for n in blocks]) == s
    extra = _barrier_rows(problem, variable, table, blocks, unit_s) if table.schedule == "kvpr" else []
    for resource in RESOURCES:
        terms = [
            (n, -layers * option.seconds.get(resource, 0.0) / unit_s)
            for n, option in zip(blocks, table.options, strict=True)
            if option.seconds.get(resource)
        ]
        fixed_s = table.fixed_s.get(resource, 0.0)
        if resource == "issue":
            for option, n in zip(table.options, blocks, strict=True):
                if option.chunk_s:
                    chunks = variable(f"chunks_{option.name}", 0, s, pulp.LpInteger)
                    problem += weighted([(chunks, table.chunk_blocks), (n, -1)]) >= 0
                    terms.append((chunks, -layers * option.chunk_s / unit_s))
        if resource == "h2d":
            terms += extra
        if terms or fixed_s:
            # T >= fixed[res] + L * sum_o seconds[o][res] * n_o
            problem += weighted([(step, 1), *terms]) >= fixed_s / unit_s
    for tier in TIERS:
        unit = max((option.bytes.get(tier, 0) for option in table.options), default=0) or 1
        held = [
            (n, option.bytes[tier] / unit)
            for n, option in zip(blocks, table.options, strict=True)
            if option.bytes.get(tier)
        ]
        # sum_o bytes[o][tier] * n_o <= capacity[tier]
        problem += weighted(held) <= table.capacity[tier] / unit
    most = max((option.link_bytes for option in table.options), default=0) or 1
    tie_break = weighted(
        [
            (
                n,
                LOSS_WEIGHT * option.loss
                + option.link_bytes / most
                + (0.0 if option.restore_s is None else RECOMPUTED_WEIGHT),
            )
            for n, option in zip(blocks, table.options, strict=True)
        ]
    )
    return Program(problem, step, blocks, unit_s, tie_break)


def _barrier_rows(
    problem: pulp.LpProblem, variable: Any, table: Table, blocks: Sequence[pulp.LpVariable], unit_s: float
) -> list[tuple[pulp.LpVariable, float]]:
    """KVPR's barrier, as in `step_time`: terms for the link's row."""
    weighted, layers = pulp.LpAffineExpression, table.num_layers
    outlasting, any_x = variable("outlasting", 0), variable("any_x", 0, 1, pulp.LpInteger)
    waits, crossing = [(outlasting, 1.0)], [(any_x, float(max(1, table.num_blocks)))]
    for option, n in zip(table.options, blocks, strict=True):
        if option.link_bytes and option.restore_s is not None:
            waits.append((n, -layers * option.restore_s / unit_s))
            crossing.append((n, -1.0))
        elif option.link_bytes:
            waits.append((n, layers * option.seconds["h2d"] / unit_s))
    problem += weighted(waits) >= 0
    problem += weighted(crossing) >= 0
    return [(outlasting, -1.0), (any_x, -table.attention_s / unit_s)]


def fewest_bytes(table: Table, tier: Tier) -> int:
    """The least that the blocks of one layer can take in a tier that has room for all of them."""
    table = table.with_room(tier)
    per_block = np.array([option.bytes.get(tier, 0) for option in table.options], dtype=object)
    if table.split is not None and (table.split or not _has_choice(table)):
        found = [_at_split(table, form) for form in _kept_forms(table)]
        return min(int(counts @ per_block) for counts in found if counts is not None)
    made = program(table)
    unit = max(per_block) or 1
    made.problem.setObjective(
        pulp.LpAffineExpression([(n, int(size) / unit) for n, size in zip(made.blocks, per_block, strict=True)])
    )
    solved = made.problem.solve(_solver())
    assert solved == pulp.LpStatusOptimal
    centre = [n.varValue for n in made.blocks]
    used = [idx for idx, value in enumerate(centre) if value > SOLVER_TOLERANCE or table.options[idx].form == PLAIN]
    fewer = table.with_options(used)
    counts = _near(fewer, [centre[idx] for idx in used])
    return int(min(counts[allowed(fewer, counts)] @ per_block[used]))


def _solver() -> pulp.LpSolver:
    """Of the relaxation."""
    tolerances = {"primal_feasibility_tolerance": SOLVER_TOLERANCE, "dual_feasibility_tolerance": SOLVER_TOLERANCE}
    solver: pulp.LpSolver = pulp.HiGHS(mip=False, msg=False, threads=1, presolve="off", **tolerances)
    if solver.available():
        return solver
    return pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, mip=False, msg=False, threads=1)


def _relaxed(table: Table, *, has_barrier: bool) -> list[list[float]]:
    """Fractional optima: of the step, and of the tie-breaks at that step; with or without what is recomputed."""
    (problem, step, blocks, _, tie_break), solver = program(table), _solver()
    for option, n in zip(table.options, blocks, strict=True):
        if not has_barrier and option.link_bytes and option.restore_s is not None:
            problem += pulp.LpAffineExpression([(n, 1)]) <= 0
    if problem.solve(solver) != pulp.LpStatusOptimal:
        return []
    found = [[n.varValue for n in blocks]]
    problem += step <= step.varValue * (1 + EQUAL_FRACTION)
    problem.setObjective(tie_break)
    if problem.solve(solver) == pulp.LpStatusOptimal:
        found.append([n.varValue for n in blocks])
    return found


def _near(table: Table, centre: Iterable[float]) -> Counts:
    """Whole numbers around fractional ones: neighbours, and the chunk that begins or ends there."""
    values = []
    for value, option, least, most in zip(centre, table.options, table.stored, table.most, strict=True):
        low = math.floor(value + 1e-6)
        near = {low - 1, low, low + 1, low + 2}
        if option.chunk_s:
            near |= {low // table.chunk_blocks * table.chunk_blocks, -(-low // table.chunk_blocks) * table.chunk_blocks}
        values.append(sorted(n for n in near if least <= n <= most) or [least])
    found = []
    for idx in range(len(values)):  # each in turn takes what the others leave
        others = [values[other] for other in range(len(values)) if other != idx]
        grid = np.array(list(itertools.product(*others)), dtype=np.int64).reshape(-1, len(others))
        found.append(np.insert(grid, idx, table.num_blocks - grid.sum(axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _descended(table: Table, counts: Counts, limit_s: float | None = None) -> Counts:
    """A choice that no exchange of few blocks, and no move of chunks from one option to another, betters.

    Without a limit towards a shorter step, else towards fewer bytes within it.
    """
    options = len(table.options)
    few = _moves(options, table.chunk_blocks)
    for _ in range(MAX_MOVES):
        for moves in (few, _exchanges(options)):  # the second pack a tier anew: two large blocks for five small ones
            best = _best_of(table, counts + moves, equal_fraction=0.0, limit_s=limit_s)
            assert best is not None
            if not np.array_equal(best, counts):
                break
        else:
            break
        counts = best
    return counts


@lru_cache(maxsize=64)
def _moves(options: int, chunk_blocks: int) -> Counts:
    """None, then every move of blocks between two options, [moves, options]."""
    found = [np.zeros(options, dtype=np.int64)]
    for giver, taker in itertools.permutations(range(options), 2):
        for num_blocks in sorted({1, chunk_blocks, 4 * chunk_blocks}):
            move = np.zeros(options, dtype=np.int64)
            move[giver], move[taker] = -num_blocks, num_blocks
            found.append(move)
    return np.stack(found)


@lru_cache(maxsize=8)
def _exchanges(options: int) -> Counts:
    """None, then every exchange of few blocks among all options, [exchanges, options]."""
    most = next(most for most in (6, 5, 4, 3, 2, 1) if (2 * most + 1) ** (options - 1) <= MAX_EXCHANGES or most == 1)
    grid = np.array(list(itertools.product(range(-most, most + 1), repeat=options - 1)), dtype=np.int64)
    found = np.concatenate([grid, -grid.sum(axis=1, keepdims=True)], axis=1)
    few: Counts = found[np.abs(found[:, -1]) <= most]
    return few
