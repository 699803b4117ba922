"""What a program moves, counted in texts whose bytes can be counted by hand, and in a compiled one."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hgdpo_jax.planning.hlo import HloModule, size
from hgdpo_jax.planning.traffic import Collective, collectives, memory_traffic
from tests import tiny

# On a TPU: `S(1)` is memory on the chip. The weights are fetched whole, of the large table two rows are; the loop runs
# three times, writes a row into a stack of five, and adds up gradients over four chips.
TPU = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%write (p0: f32[5,1024], p1: f32[1024], p2: s32[]) -> f32[5,1024] {
  %p0 = f32[5,1024]{1,0} parameter(0)
  %p1 = f32[1024]{0} parameter(1)
  %row = f32[1,1024]{1,0} bitcast(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[5,1024]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (s: (s32[], f32[1024], f32[5,1024])) -> (s32[], f32[1024], f32[5,1024]) {
  %s = (s32[], f32[1024]{0}, f32[5,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[1024]{0} get-tuple-element(%s), index=1
  %stack = f32[5,1024]{1,0} get-tuple-element(%s), index=2
  %reduced = f32[1024]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %written = f32[5,1024]{1,0} fusion(%stack, %reduced, %i), kind=kLoop, calls=%write
  ROOT %out = (s32[], f32[1024]{0}, f32[5,1024]{1,0}) tuple(%i, %reduced, %written)
}

%condition (s: (s32[], f32[1024], f32[5,1024])) -> pred[] {
  %s = (s32[], f32[1024]{0}, f32[5,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (weights: f32[4,1024], table: f32[64,1024], x: f32[1024], stack: f32[5,1024]) -> f32[5,1024] {
  %weights = f32[4,1024]{1,0} parameter(0)
  %copy-start = (f32[4,1024]{1,0:S(1)}, f32[4,1024]{1,0}, u32[]{:S(2)}) copy-start(%weights)
  %copy-done = f32[4,1024]{1,0:S(1)} copy-done(%copy-start)
  %table = f32[64,1024]{1,0} parameter(1)
  %slice-start = ((f32[64,1024]{1,0}), f32[2,1024]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%table), slice={[0:2], [0:1024]}
  %slice-done = f32[2,1024]{1,0:S(1)} slice-done(%slice-start)
  %x = f32[1024]{0} parameter(2)
  %stack = f32[5,1024]{1,0} parameter(3)
  %one = s32[] constant(1)
  %begin = s32[] copy(%one), frontend_attributes={kernel_metadata={
"notes": "in lines of their own"
}}, metadata={op_name="begin"}
  %state = (s32[], f32[1024]{0}, f32[5,1024]{1,0}) tuple(%begin, %x, %stack)
  %loop = (s32[], f32[1024]{0}, /*index=2*/f32[5,1024]{1,0}) while(%state), condition=%condition, body=%body
  %gemm = (f32[4,1024]{1,0:S(1)}, s8[4194304]{0}) custom-call(%copy-done, %slice-done), custom_call_target="mm", notes={
"block": "512 = 4 * 128"
}, metadata={op_name="gemm"}
  %product = f32[4,1024]{1,0:S(1)} get-tuple-element(%gemm), index=0
  ROOT %result = f32[5,1024]{1,0} get-tuple-element(%loop), index=2
}
"""
ROW = 4 * 1024


def test_traffic_is_what_crosses_the_border_of_the_chip() -> None:
    copied, prefetched, counter = 4 * ROW, 2 * ROW, 2 * 4
    turn = 2 * ROW + (ROW + 4 + ROW)  # the all-reduce reads and writes; a row and its place are read, the row written
    assert memory_traffic(HloModule(TPU)) == copied + prefetched + counter + 3 * turn


def test_what_runs_on_a_core_of_another_kind_counts_as_well() -> None:
    """A v5p's sparse cores cut and copy beside the others."""
    text = TPU.replace(
        "}\n\nENTRY",
        """}

%aside (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %copied = f32[1024]{0} copy(%p)
}, execution_thread="sparsecore"

ENTRY""",
    ).replace(
        "  %one =",
        """  %begun = ((f32[1024]{0}), f32[1024]{0}, u32[]{:S(8)}) async-start(%x), calls=%aside
  %ended = f32[1024]{0} async-done(%begun)
  %one =""",
    )
    assert memory_traffic(HloModule(text)) == memory_traffic(HloModule(TPU)) + 2 * ROW


def test_collectives_in_a_loop_count_as_often_as_it_runs() -> None:
    assert collectives(HloModule(TPU)) == {"all-reduce": Collective(3, 3 * ROW, 3 * ROW * 2 * 3 / 4)}


def test_a_loop_whose_end_is_an_argument_runs_as_often_as_is_said() -> None:
    text = TPU.replace("%end = s32[] constant(4)", "%end = s32[] add(%i, %i)")
    program = HloModule(text, trips=7)
    assert collectives(program)["all-reduce"].count == 7 and program.unknown == {"loop"}


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("{}", 16),
    ],
)
def test_each_form_of_groups_is_read(groups: str, chips: int) -> None:
    text = TPU.replace("all-reduce(%x)", "all-gather(%x)").replace("{{0,1,2,3},{4,5,6,7}}", groups)
    found = collectives(HloModule(text, devices=16))["all-gather"]
    assert found == Collective(3, 3 * ROW * chips, 3 * ROW * (chips - 1))


# One all-gather runs beside two kernels and stands in three fusions; one fusion is a reduce-scatter.
ASYNC = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%begin (p: f32[8]) -> (f32[8], f32[32]) {
  %p = f32[8]{0} parameter(0)
  %all-gather.1 = f32[32]{0} all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %start = (f32[8]{0}, f32[32]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (q: f32[8], r: f32[32]) -> f32[32] {
  %q = f32[8]{0} parameter(0)
  %r = f32[32]{0} parameter(1)
  %all-gather.2 = f32[32]{0} all-gather(%q), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = f32[32]{0} custom-call(%r, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%scatter (t: f32[32]) -> f32[8] {
  %t = f32[32]{0} parameter(0)
  %all-reduce = f32[32]{0} all-reduce(%t), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %piece = f32[8]{0} dynamic-slice(%all-reduce, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %started = (f32[8]{0}, f32[32]{0}) fusion(%x), kind=kCustom, calls=%begin
  %own = f32[8]{0} get-tuple-element(%started), index=0
  %all = f32[32]{0} get-tuple-element(%started), index=1
  %gathered = f32[32]{0} fusion(%own, %all), kind=kCustom, calls=%end
  ROOT %out = f32[8]{0} fusion(%gathered), kind=kCustom, calls=%scatter
}
"""


def test_an_exchange_beside_kernels_counts_once() -> None:
    found = collectives(HloModule(ASYNC))
    assert found == {"all-gather": Collective(1, 128, 96), "reduce-scatter": Collective(1, 128, 96)}


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce"])
def test_an_exchange_in_two_halves_moves_what_one_in_one_does(kind: str) -> None:
    """The type of the first half names the operand too where the result has another size."""
    result = "f32[32]{0}" if kind == "all-gather" else "f32[8]{0}"
    begun = f"(f32[8]{{0}}, {result})" if kind == "all-gather" else result
    header = f"HloModule m\n\nENTRY %main (x: f32[8]) -> {result} {{\n  %x = f32[8]{{0}} parameter(0)\n"
    groups = "replica_groups=[1,4]<=[4]"
    one = header + f"  ROOT %found = {result} {kind}(%x), {groups}\n}}\n"
    two = header + f"  %begun = {begun} {kind}-start(%x), {groups}\n  ROOT %found = {result} {kind}-done(%begun)\n}}\n"
    moved = 4 * (8 + 32) if kind == "all-gather" else 4 * (8 + 8)
    assert memory_traffic(HloModule(one)) == memory_traffic(HloModule(two)) == moved
    assert collectives(HloModule(one)) == collectives(HloModule(two)) and collectives(HloModule(two))[kind].count == 1


def test_a_type_has_bits_tiles_and_a_memory() -> None:
    assert size("(bf16[3,5]{1,0}, s4[8], pred[], token[])") == 30 + 4 + 1
    assert size("bf16[3,5]{1,0:T(8,128)(2,1)}", memory=True) == 8 * 128 * 2
    assert size("f32[3,2,5]{0,2,1:T(8,128)}", memory=True) == 2 * 8 * 128 * 4
    assert size("(f32[4]{0:S(1)}, f32[4]{0:S(5)}, f32[4]{0})", memory=True) == 32


def test_a_compiled_loop_over_devices_is_counted() -> None:
    mesh = tiny.mesh(data=8)
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))

    @partial(jax.jit, out_shardings=whole)
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        def turn(w: jax.Array, _: None) -> tuple[jax.Array, None]:
            return w + x.T @ jnp.tanh(x @ w), None

        return jax.lax.scan(turn, w, None, length=6)[0]

    x = jax.ShapeDtypeStruct((256, 32), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((32, 48), jnp.float32, sharding=whole)
    found = HloModule(program.lower(x, w).compile().as_text(), devices=8)
    bytes_ = 6 * 4 * 32 * 48
    assert collectives(found) == {"all-reduce": Collective(6, bytes_, bytes_ * 2 * 7 / 8)}
    part, state, hidden = (4 * n for n in (32 * 32, 32 * 48, 32 * 48))  # of a device
    least = 6 * (2 * part + 2 * state + 2 * hidden)
    assert least <= memory_traffic(found) <= 4 * least and not found.unknown
