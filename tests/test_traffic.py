"""Traffic, read from a program's text."""

from pixelis_jax import traffic

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%layer (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %whole = bf16[8,64]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={1}
  %sum.1 = f32[2,4]{1,0} reduce-scatter(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%until (carry: (s32[])) -> pred[] {
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

%below (carry: (s32[])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%part (w: f32[2]) -> f32[8] {
  %piece = f32[8]{0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}

%shifted (carry: (s32[])) -> (s32[]) {
  %begin = f32[8]{0} fusion(%w), kind=kCustom, calls=%part
  %end = f32[8]{0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %alone.2 = f32[8]{0} all-gather(%w), channel_id=8, replica_groups=mesh['a'=1,'b'=4] {'a'}
}

%token (carry: (s32[])) -> (s32[]) {
  %all-reduce.2 = f32[10]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %alone = f32[1000]{0} all-reduce(%q), replica_groups=[8,1]<=[8], to_apply=%add
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %l = (s32[]) while(%s), condition=%until, body=%layer, config={"known_trip_count":{"n":"28"}}
  %m = (s32[]) while(%s), condition=%below, body=%shifted
  %open = (s32[]) while(%s), condition=%until, body=%token
  %begun = (f32[16]{0}, f32[64]{0}) all-gather-start(%v), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[64]{0} all-gather-done(%begun)
  ROOT %out = f32[4] copy(%p0)
}
"""


def test_traffic_counts_loops_and_what_each_kind_moves():
  """28 layers of 8 * 64 bfloat16 numbers, once 64 float32 ones, and 5 times 8, which begin in one
  place and end in another. A reduce-scatter takes in its result of 8 numbers from each of 4; an
  all-reduce of 10 moves in and out; among one device nothing moves.
  """
  moved = traffic.moved(PROGRAM, unknown=3)
  assert moved == {
    "all-gather": 28 * 8 * 64 * 2 + 64 * 4 + 5 * 8 * 4,
    "reduce-scatter": 28 * 4 * 8 * 4,
    "all-reduce": 3 * 2 * 10 * 4,
  }
