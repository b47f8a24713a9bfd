"""The choice: which cached blocks stay on the device, which are transferred and which are recomputed.

Owns the integer program (PuLP, its relaxation solved by HiGHS, by CBC where highspy is missing), the exact search for
whole blocks that starts from there, and the messages when nothing fits. Does not own the formulas (`step_time`) nor
what a person asked for (`config`). Solutions are memoised.

Source: KVPR (arXiv 2411.17089, section 3) for planning the split by a linear program; the integers, residency, and
the order "step time, then link bytes, then recomputation" are ours.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from functools import lru_cache
from typing import NamedTuple

import pulp

from kvoffload.errors import ConfigError, InfeasiblePlanError
from kvoffload.planning import step_time
from kvoffload.planning.inputs import PlanInputs
from kvoffload.planning.plan import Constraint, Plan
from kvoffload.units import gb, gib

EQUAL_FRACTION = 1e-9  # step times closer than this are the same
OBJECTIVE_SCALE = 1000.0  # the solver sees times of about this size, far above its absolute tolerance
SOLVER_TOLERANCE = 1e-10


class BlockCounts(NamedTuple):
    """Blocks of every offloaded layer by place; they add up to `PlanInputs.num_blocks`."""

    r: int  # resident K/V
    r_x: int  # resident activations
    x: int  # transferred as activations
    t: int  # transferred as K/V


@lru_cache(maxsize=1024)
def solve(inputs: PlanInputs) -> Plan:
    """The placement with the least predicted step time, then the least link bytes, then the fewest activations.

    At a given batch the shortest step is also the highest throughput, so `inputs.objective` changes nothing here. With
    `inputs.split` given, the share of activations among the offloaded blocks is rounded to whole blocks, moved no
    further than blocks already stored demand, and as much as fits stays resident.

    Args:
        inputs: one instance; `stored_*` counts are lower bounds, for planning again while a cache exists.

    Returns:
        The plan. `binding_constraint` is "host_memory" where the host limit is reached and more of it would make the
        step faster, else the longest of "link", "device" and "host". More device memory helps nearly every plan that
        offloads, so it is not named.

    Raises:
        InfeasiblePlanError: device or host memory cannot hold the cache; gives the numbers and the way out.
        ConfigError: more blocks are stored than there are.
    """
    stored = inputs.stored_resident_blocks + inputs.stored_resident_activation_blocks
    stored += inputs.stored_activation_blocks + inputs.stored_kv_blocks
    if stored > inputs.num_blocks:
        raise ConfigError(f"{stored} blocks are stored, but only {inputs.num_blocks} are to be placed")
    placement = _place(inputs)
    if placement is None:
        raise _infeasible(inputs)
    r, r_x, x, t = placement
    step_s, binding = step_time.predict_step_s(inputs, *placement)
    if _waits_for_host_memory(inputs, placement, step_s):
        binding = "host_memory"
    return Plan(
        num_layers=inputs.num_layers,
        num_offloaded_layers=inputs.num_offloaded_layers,
        block_tokens=inputs.block_tokens,
        chunk_blocks=inputs.chunk_blocks,
        num_slots=inputs.num_slots,
        is_segmented=inputs.is_segmented,
        resident_kv_blocks=r,
        resident_activation_blocks=r_x,
        kv_blocks=t,
        activation_blocks=x,
        kv_bytes_per_token=inputs.kv_bytes_per_token,
        activation_bytes_per_token=inputs.activation_bytes_per_token,
        predicted_step_s=step_s,
        full_transfer_step_s=step_time.full_transfer_step_s(inputs),
        binding_constraint=binding,
        schedule=inputs.schedule,
        weight_bytes_per_step=inputs.weight_bytes_per_step,
        num_micro_batches=inputs.num_micro_batches,
        objective=inputs.objective,
        device_bytes=step_time.device_bytes(inputs, r, r_x),
        host_bytes=step_time.host_bytes(inputs, x, t),
    )


def split_blocks(inputs: PlanInputs, offloaded: int) -> int:
    """Activation blocks among `offloaded` ones at the fixed `inputs.split`, as near to it as stored blocks allow."""
    assert inputs.split is not None
    wanted = round(inputs.split * offloaded)
    return min(max(wanted, inputs.stored_activation_blocks), offloaded - inputs.stored_kv_blocks)


class Program(NamedTuple):
    """The integer program, and those of its variables that are read back."""

    problem: pulp.LpProblem
    step: pulp.LpVariable  # T in units of `unit_s`
    x: pulp.LpVariable
    unit_s: float


def program(inputs: PlanInputs) -> Program:
    """The program for a free split: variables in blocks, minimise T."""
    c = step_time.terms(inputs)
    unit_s = (step_time.full_transfer_step_s(inputs) or 1.0) / OBJECTIVE_SCALE
    s, per_chunk = inputs.num_blocks, inputs.chunk_blocks
    beta_x, beta_kv = inputs.activation_bytes_per_token, inputs.kv_bytes_per_token
    weighted = pulp.LpAffineExpression

    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    # Since 3.3 PuLP wants variables made by their problem and warns of the constructor. Calling what does not warn
    # needs no `warnings.catch_warnings`, which swaps the filters of the whole process under the feet of other threads.
    variable = getattr(problem, "add_variable", pulp.LpVariable)
    step = variable("step", 0)
    r = variable("r", inputs.stored_resident_blocks, s, pulp.LpInteger)
    r_x = variable("r_x", inputs.stored_resident_activation_blocks, s, pulp.LpInteger)
    x = variable("x", inputs.stored_activation_blocks, s, pulp.LpInteger)
    t = variable("t", inputs.stored_kv_blocks, s, pulp.LpInteger)
    chunks_x = variable("chunks_x", 0, s, pulp.LpInteger)
    chunks_t = variable("chunks_t", 0, s, pulp.LpInteger)
    activation_link, kv_link = c.activation_link_s / unit_s, c.kv_link_s / unit_s
    recompute, chunk_host = c.recompute_s / unit_s, c.chunk_host_s / unit_s

    # minimise T
    problem += step
    # r + r_x + x + t = s: every block has one place
    problem += weighted([(r, 1), (r_x, 1), (x, 1), (t, 1)]) == s
    link = [(step, 1), (x, -activation_link), (t, -kv_link)]
    if inputs.schedule == "kvpr":
        # its barrier adds L*max(0, gamma_r*x - beta_kv*t/B_kv) ...
        outlasting = variable("outlasting", 0)
        problem += weighted([(outlasting, 1), (x, -recompute), (t, kv_link)]) >= 0
        # ... and L*gamma_a*s if x > 0
        any_x = variable("any_x", 0, 1, pulp.LpInteger)
        problem += weighted([(any_x, s), (x, -1)]) >= 0
        link += [(outlasting, -1), (any_x, -c.attention_s / unit_s)]
    # the link: T >= L*(beta_x*x/B_x + beta_kv*t/B_kv) + weights/B_kv + max(0, t_gap - ring_bytes/B_kv)
    problem += weighted(link) >= c.link_fixed_s / unit_s
    # the device: T >= N*t_dense + t_head + L*(gamma_r*(x + r_x) + gamma_a*s)
    problem += weighted([(step, 1), (x, -recompute), (r_x, -recompute)]) >= c.device_fixed_s / unit_s
    # the host: T >= N*o_layer + o_chunk*num_chunks(x, t), each number of chunks rounded up
    problem += weighted([(chunks_x, per_chunk), (x, -1)]) >= 0
    problem += weighted([(chunks_t, per_chunk), (t, -1)]) >= 0
    problem += weighted([(step, 1), (chunks_x, -chunk_host), (chunks_t, -chunk_host)]) >= c.host_fixed_s / unit_s
    # device memory: L*(beta_kv*r + beta_x*r_x) + fixed_device_bytes <= device_bytes, in units of beta_kv
    problem += weighted([(r, 1), (r_x, beta_x / beta_kv)]) <= step_time.resident_capacity_bytes(inputs) / beta_kv
    # host memory: L*(beta_x*x + beta_kv*t) <= host_bytes, in units of beta_kv
    problem += weighted([(x, beta_x / beta_kv), (t, 1)]) <= step_time.host_capacity_bytes(inputs) / beta_kv
    return Program(problem, step, x, unit_s)


def _relax(inputs: PlanInputs) -> tuple[float, float] | None:
    """x, and a step time in seconds that no placement undercuts, of the best fractional one; None if there is none."""
    problem, step, x, unit_s = program(inputs)
    tolerances = {"primal_feasibility_tolerance": SOLVER_TOLERANCE, "dual_feasibility_tolerance": SOLVER_TOLERANCE}
    solver: pulp.LpSolver = pulp.HiGHS(mip=False, msg=False, threads=1, presolve="off", **tolerances)
    error_fraction = 0.0
    if not solver.available():
        solver = pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, mip=False, msg=False, threads=1)
        error_fraction = 1e-7  # CBC's answer is read from a file with eight digits
    if problem.solve(solver) != pulp.LpStatusOptimal:
        return None
    return x.varValue, step.varValue * unit_s * (1 - error_fraction)


def _place(inputs: PlanInputs) -> BlockCounts | None:
    """The best placement, or None if nothing fits."""
    if inputs.split is not None:
        at_split = _place_at_split(inputs)
        return at_split if _allowed(inputs, at_split) else None
    r_x = inputs.stored_resident_activation_blocks
    all_resident = BlockCounts(inputs.num_blocks - r_x, r_x, 0, 0)
    if _allowed(inputs, all_resident):
        return all_resident  # no term can be smaller
    relaxed = _relax(inputs)
    return None if relaxed is None else _search(inputs, *relaxed)


def _allowed(inputs: PlanInputs, placement: BlockCounts) -> bool:
    """Whether a placement keeps what is stored and fits both memories, in whole bytes."""
    r, r_x, x, t = placement
    return (
        r >= inputs.stored_resident_blocks
        and r_x >= inputs.stored_resident_activation_blocks
        and x >= inputs.stored_activation_blocks
        and t >= inputs.stored_kv_blocks
        and step_time.device_bytes(inputs, r, r_x) <= inputs.device_bytes
        and step_time.host_bytes(inputs, x, t) <= inputs.host_bytes
    )


def _place_at_split(inputs: PlanInputs) -> BlockCounts:
    """At a fixed share every term grows with the number of offloaded blocks: take the fewest, allowed or not."""
    r_x = inputs.stored_resident_activation_blocks
    room = step_time.resident_capacity_bytes(inputs) - inputs.activation_bytes_per_token * r_x
    offloaded = inputs.num_blocks - r_x - room // inputs.kv_bytes_per_token
    offloaded = max(offloaded, inputs.stored_activation_blocks + inputs.stored_kv_blocks)
    x = split_blocks(inputs, offloaded)
    return BlockCounts(inputs.num_blocks - r_x - offloaded, r_x, x, offloaded - x)


def _search(inputs: PlanInputs, relaxed_x: float, bound_s: float) -> BlockCounts | None:
    """The best whole placement, found by walking x away from the fractional optimum in both directions.

    At a given x the least t within a step time has a closed form. The x at which fractional placements are no worse
    than the best whole one found are an interval around `relaxed_x`, as the relaxation is convex, and the least
    fractional t is less than two blocks below the whole one: that says when a direction can end.
    """
    c = step_time.terms(inputs)
    barrier_s = c.attention_s if inputs.schedule == "kvpr" else 0.0  # `any_x` may be next to nothing
    most_x = inputs.num_blocks - inputs.stored_kv_blocks - inputs.stored_resident_blocks
    most_x -= inputs.stored_resident_activation_blocks
    fewest = _least_kv(inputs, inputs.stored_activation_blocks, inputs.num_blocks)
    bound_s = max(bound_s, c.host_s(0, fewest.x + fewest.t))  # whole chunks, which the relaxation splits
    start = math.floor(relaxed_x + 1e-6)
    best, best_s, best_rank = None, math.inf, (0, 0, 0)
    for direction in (range(start, inputs.stored_activation_blocks - 1, -1), range(start + 1, most_x + 1)):
        for x in direction:
            limit_s = best_s * (1 + EQUAL_FRACTION)
            optimal = best_s <= bound_s * (1 + EQUAL_FRACTION)  # no shorter step exists, only fewer bytes
            most_r_x = _most_recomputed(inputs, c, limit_s) - x
            if most_r_x < inputs.stored_resident_activation_blocks:
                break
            placement = _least_kv(inputs, x, most_r_x)
            fractional_t = max(0, placement.t - 2)
            fewest_bytes = step_time.host_bytes(inputs, x, fractional_t)  # what is on the host crosses the link
            if fewest_bytes > (best_rank[0] if optimal else inputs.host_bytes):
                break
            if c.schedule_s(x, fractional_t) - barrier_s > limit_s:
                break
            if not _allowed(inputs, placement) or c.step_s(placement.r_x, x, placement.t)[0] > limit_s:
                continue
            if not optimal and (step_s := _shortest_s(inputs, c, x, most_r_x)) < best_s * (1 - EQUAL_FRACTION):
                best, best_s = None, step_s
                placement = _least_kv(inputs, x, _most_recomputed(inputs, c, step_s * (1 + EQUAL_FRACTION)) - x)
            rank = (step_time.host_bytes(inputs, x, placement.t), x, placement.r_x)
            if best is None or rank < best_rank:
                best, best_rank = placement, rank
    return best


def _most_recomputed(inputs: PlanInputs, c: step_time.Terms, limit_s: float) -> int:
    """The most blocks the device can recompute when its step may take `limit_s`; negative if it cannot at all."""
    if c.device_s(inputs.num_blocks) <= limit_s:
        return inputs.num_blocks
    return math.floor((limit_s - c.device_fixed_s) / c.recompute_s) if c.recompute_s else -1


def _shortest_s(inputs: PlanInputs, c: step_time.Terms, x: int, most_r_x: int) -> float:
    """The shortest step at a given x, by bisection: with more r_x the device takes longer, link and host less long."""

    def step_s(r_x: int) -> tuple[float, Constraint]:
        placement = _least_kv(inputs, x, r_x)
        if not _allowed(inputs, placement):
            return math.inf, "host_memory"
        return c.step_s(placement.r_x, x, placement.t)

    r_x_range = range(inputs.stored_resident_activation_blocks, most_r_x)
    crossing = r_x_range.start + bisect.bisect_left(r_x_range, True, key=lambda r_x: step_s(r_x)[1] == "device")
    return min(step_s(r_x)[0] for r_x in (max(r_x_range.start, crossing - 1), crossing))


def _least_kv(inputs: PlanInputs, x: int, most_r_x: int) -> BlockCounts:
    """Choose the least t, then the least r_x, at a given x, with at most `most_r_x` for r_x."""
    beta_x, beta_kv = inputs.activation_bytes_per_token, inputs.kv_bytes_per_token
    capacity = step_time.resident_capacity_bytes(inputs)
    r_x = inputs.stored_resident_activation_blocks
    most_resident = inputs.num_blocks - x - inputs.stored_kv_blocks
    if beta_x < beta_kv:  # an activation in place of K/V makes room: as many as may be, then K/V in what is left
        fitting = (capacity - beta_kv * inputs.stored_resident_blocks) // beta_x
        many = min(most_r_x, fitting, most_resident - inputs.stored_resident_blocks)
        most_resident = min(most_resident, many + (capacity - beta_x * many) // beta_kv)
        # least r_x that fits as many: beta_kv*(resident - r_x) + beta_x*r_x <= capacity
        r_x = max(r_x, -(-(beta_kv * most_resident - capacity) // (beta_kv - beta_x)))
    else:
        most_resident = min(most_resident, r_x + (capacity - beta_x * r_x) // beta_kv)
    return BlockCounts(most_resident - r_x, r_x, x, inputs.num_blocks - x - most_resident)


def _waits_for_host_memory(inputs: PlanInputs, placement: BlockCounts, step_s: float) -> bool:
    """Whether host memory is full to within one block and the step would be faster with more."""
    free_bytes = inputs.host_bytes - step_time.host_bytes(inputs, placement.x, placement.t)
    if free_bytes >= max(step_time.host_bytes(inputs, 1, 0), step_time.host_bytes(inputs, 0, 1)):
        return False
    every_bytes = step_time.host_bytes(inputs, inputs.num_blocks, inputs.num_blocks)
    roomy = _place(dataclasses.replace(inputs, host_bytes=every_bytes))
    return roomy is not None and step_time.predict_step_s(inputs, *roomy)[0] < step_s * (1 - EQUAL_FRACTION)


def _infeasible(inputs: PlanInputs) -> InfeasiblePlanError:
    """Says which memory is too small, by how much, and what to do."""
    r, r_x = inputs.stored_resident_blocks, inputs.stored_resident_activation_blocks
    needed = step_time.device_bytes(inputs, r, r_x)
    if needed > inputs.device_bytes:
        return InfeasiblePlanError(
            f"device memory: working buffers{' and resident blocks' if r + r_x else ''} need {_size(needed)}, the "
            f"limit is {_size(inputs.device_bytes)}: raise device_gib, or lower the batch"
        )
    if inputs.split is None:  # as much as fits on the device, the rest in the smaller form
        _, _, x, t = _least_kv(inputs, inputs.stored_activation_blocks, inputs.num_blocks)
        if inputs.activation_bytes_per_token < inputs.kv_bytes_per_token:
            x, t = x + t - inputs.stored_kv_blocks, inputs.stored_kv_blocks
    else:
        _, _, x, t = _place_at_split(inputs)
    needed = step_time.host_bytes(inputs, x, t)
    return InfeasiblePlanError(
        f"host memory: the KV cache needs at least {_size(needed)} beside the "
        f"{_size(inputs.device_bytes - inputs.fixed_device_bytes)} free for it on the device, the limit is "
        f"{_size(inputs.host_bytes)}: raise host_gib or device_gib, or lower max_new_tokens or the batch"
    )


def _size(num_bytes: int) -> str:
    """Bytes for a message, in both units people use."""
    return f"{gb(num_bytes)} ({gib(num_bytes)})"
