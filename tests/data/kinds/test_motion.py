import math

import numpy as np
import pytest

from pixelis_jax.data.kinds import motion
from tests.data.kinds.scripts import answered, composed


def test_the_answer_is_the_one_that_moved_farthest():
  for seed in range(2):
    puzzle = composed("moved", seed)
    starts = [track.masks[0].box.center[0] for track in puzzle.tracks]
    assert starts == sorted(starts) and len({track.source for track in puzzle.tracks}) == 1
    ways = [math.dist(t.masks[0].box.center, t.masks[-1].box.center) for t in puzzle.tracks]
    farthest = int(np.argmax(ways))
    assert puzzle.task.answer == motion.THIRDS[farthest] not in puzzle.slips
    # By 1.4 of the next one's way; each end is rounded to half a pixel.
    *_, second, first = sorted(ways)
    assert first >= motion.FARTHER * second - 3
    # Who follows the one that moves least in its place finds another to be the farthest.
    (mistake,) = puzzle.mistakes
    taken = [ways[[t.masks[0].box for t in puzzle.tracks].index(look.box)] for look in mistake]
    assert taken[farthest] == min(ways) and int(np.argmax(taken)) != farthest


def test_the_one_asked_for_goes_behind_a_post_and_ends_where_the_answer_says():
  for seed in range(2):
    puzzle = composed("hidden", seed)
    (look,) = puzzle.looks
    asked = motion.THIRDS.index(look.name)
    track = puzzle.tracks[asked]
    assert look.box == track.masks[0].box
    hidden = np.flatnonzero(track.shares == 0)
    assert 2 <= len(hidden) <= 3 and np.ptp(hidden) == len(hidden) - 1  # For a while, at once.
    seen = np.delete(track.shares, hidden)
    assert seen.min() > 0.99 and all(t.shares[-1] > 0.99 for t in puzzle.tracks)
    x, _ = track.masks[-1].box.center
    assert puzzle.task.answer == motion.THIRDS[int(3 * x / 320)] not in puzzle.slips
    # Others are farther from where it vanished than it can have gone.
    last = track.masks[hidden[0] - 1].box
    for other in (t for t in puzzle.tracks if t is not track):
      for f in hidden:
        # As in CLEAR; places are whole pixels.
        assert math.dist(other.masks[f].box.center, last.center) > 4.5 * 0.085 * 240 - 3


def test_where_it_ends_does_not_follow_from_where_it_began():
  stays = [(p := composed("hidden", seed)).looks[0].name == p.task.answer for seed in range(12)]
  # One in three: 4. Were courses drawn until they fit, ends with them, three in four: 9.
  assert 1 <= sum(stays) <= 6


def test_equal_things_in_each_third_at_both_ends():
  puzzle = composed("moved", 1)
  for frame in (0, -1):
    xs = sorted(t.masks[frame].box.center[0] for t in puzzle.tracks)
    assert [int(3 * x / 320) for x in xs] == [0, 1, 2]
  first = puzzle.task.videos[0].frames[0]
  looks = []
  for track in puzzle.tracks:
    mask = track.masks[0]
    box = mask.box
    part = first[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
    looks.append(part[mask.inside & (part.max(2) > 0)].mean(0))
  # But for the photo that shines through their edges.
  assert np.ptp(looks, axis=0).max() < 8


def test_the_solver_compares_how_far_they_went():
  puzzle = composed("moved", 0)
  texts = [f"By 1.88 s it had moved {far} right: {far} in a straight line." for far in (9, 12)]
  calls, answer = answered("moved", puzzle, [*texts, "By 0 s it had not moved."])
  assert answer == "middle"
  assert calls[0] == ("select_frames", {"times": [0.0]})
  assert [name for name, _ in calls[1:]] == ["track_object"] * 3
  assert all(arguments["frames"] == 1 for _, arguments in calls[1:])


@pytest.mark.parametrize(
  "edges, answer",
  # Of 80 units: thirds end at 26.7 and 53.3.
  [("[22, 5, 28, 9]", "left"), ("[24, 5, 30, 9]", "middle"), ("[76, 5, 80, 9]", "right")],
)
def test_the_solver_knows_thirds(edges, answer):
  puzzle = composed("hidden", 0)
  assert answered("hidden", puzzle, [f"1.88 s: seen at {edges}"])[1] == answer
  assert answered("hidden", puzzle, ["1.88 s: lost"])[1] == ""
