"""The loop with a scripted policy: how episodes end, and what each turn is given."""

import threading
import time

import numpy as np
import pytest

from pixelis_jax.agent import Limits, play
from pixelis_jax.tools.views import IDENTITY, VIEWS
from pixelis_jax.types import Completion, Status, ToolResult
from tests import fakes

LIMITS = Limits(turns=4, tokens=10_000, bad_calls=1)
CHAT = fakes.Bytes()
ANSWER = r"It is \boxed{7}"
BAD = "<tool_call>{oops</tool_call>"


def look(number: int = 0) -> str:
  arguments = f'{{"bbox_2d": [{number}, 0, 9, 9]}}'
  return f'<tool_call>\n{{"name": "zoom_in", "arguments": {arguments}}}\n</tool_call>'


class Record:
  """A tool that notes each call: the task, its first number, earlier texts, the view."""

  def __init__(self):
    self.calls = []

  def __call__(self, call, task, results, view=IDENTITY):
    number = call.arguments["bbox_2d"][0]
    self.calls.append((task.id, number, [r.text or r.error for r in results], view))
    return ToolResult(text=f"{task.id} saw {number}")


def episode(*texts: str, limits: Limits = LIMITS, run=None):
  """The trajectory of one task whose policy says these texts."""
  generate = fakes.scripted(CHAT, {"a": texts})
  (played,) = play([fakes.task("a")], generate=generate, run=run or Record(), limits=limits)
  return played


def test_looks_then_answers():
  played = episode(look(), ANSWER)
  assert (played.status, played.answer, played.calls) == (Status.ANSWERED, "7", 1)
  first, last = played.steps
  assert (first.call.name, first.result.text) == ("zoom_in", "a saw 0")
  assert last.call is None and last.result is None
  shown = [CHAT.decode(step.completion.context.tokens) for step in played.steps]
  assert shown == ["what?", "a saw 0"]


def test_where_an_answer_is_looked_for():
  """A policy that was taught no box: its last number, or none where boxes alone count."""
  said, anywhere = "3 + 4 = 7 pens.", Limits(turns=4, tokens=10_000, answer="number")
  assert (episode(said).status, episode(said).answer) == (Status.NO_ANSWER, None)
  played = episode(said, limits=anywhere)
  assert (played.status, played.answer) == (Status.ANSWERED, "7")
  assert episode("many", limits=anywhere).status is Status.NO_ANSWER
  # The call's own numbers are none.
  assert episode(look(9), "so 7", limits=anywhere).answer == "7"
  with pytest.raises(ValueError, match="limits.answer 'words' must be one of .*boxed.*number"):
    Limits(turns=1, tokens=1, answer="words")


def test_a_call_goes_before_an_answer_in_the_same_turn():
  played = episode(ANSWER + look(), r"no, \boxed{8}")
  assert (played.calls, played.answer) == (1, "8")


def test_the_policy_is_told_of_a_malformed_call_and_may_recover():
  played = episode(BAD, look(), ANSWER)
  assert (played.status, played.answer) == (Status.ANSWERED, "7")
  assert (played.calls, played.errors) == (2, 1)
  assert played.steps[0].call is None
  assert "not valid JSON" in played.steps[0].result.error
  assert "not valid JSON" in CHAT.decode(played.steps[1].completion.context.tokens)


@pytest.mark.parametrize("allowed, texts", [(0, (BAD,)), (1, (BAD, look(), BAD)), (2, (BAD,) * 3)])
def test_more_malformed_calls_than_allowed_end_it(allowed, texts):
  limits = Limits(turns=9, tokens=10_000, bad_calls=allowed)
  played = episode(*texts, limits=limits)
  assert (played.status, played.answer) == (Status.BAD_CALL, None)
  assert len(played.steps) == len(texts)  # scripted() raises when asked for more.


def test_a_failed_call_is_not_a_malformed_one():
  fails = lambda call, task, results, view=IDENTITY: ToolResult(text="", error="outside")
  played = episode(look(), look(), look(), ANSWER, run=fails)
  assert (played.status, played.errors) == (Status.ANSWERED, 3)


@pytest.mark.parametrize("last", [look(), BAD])
def test_the_last_turn_runs_nothing(last):
  run = Record()
  played = episode(look(1), last, limits=Limits(turns=2, tokens=10_000), run=run)
  assert (played.status, played.answer) == (Status.OUT_OF_STEPS, None)
  assert [number for _, number, _, _ in run.calls] == [1]


def test_an_answer_in_the_last_turn_counts():
  assert episode(look(), ANSWER, limits=Limits(turns=2, tokens=10_000)).answer == "7"


@pytest.mark.parametrize("spare, turns", [(0, 1), (1, 2)])
def test_tokens_seen_and_written_are_counted(spare, turns):
  # After the first turn: 5 bytes of "what?" and those of the call; at the limit it is over.
  limits = Limits(turns=9, tokens=5 + len(look()) + spare)
  played = episode(look(), look(), limits=limits)
  assert (played.status, len(played.steps)) == (Status.OUT_OF_TOKENS, turns)


def test_a_cut_off_turn_answers_nothing():
  cut = lambda requests: [fakes.completion(ANSWER, finished=False) for _ in requests]
  (played,) = play([fakes.task("a")], generate=cut, run=Record(), limits=LIMITS)
  assert (played.status, played.answer) == (Status.OUT_OF_TOKENS, None)


@pytest.mark.parametrize("text", ["I see a cat.", "", r"\boxed{}"])
def test_neither_call_nor_answer(text):
  played = episode(text)
  assert (played.status, played.answer) == (Status.NO_ANSWER, None)


def test_timeout_keeps_what_was_answered():
  ticks = iter([100.0, 103.0, 106.0])  # Start, after round 1, after round 2: 6 > 5 seconds.
  generate = fakes.scripted(CHAT, {"slow": [look(), look()], "quick": [ANSWER]})
  slow, quick = play(
    [fakes.task("slow"), fakes.task("quick")],
    generate=generate,
    run=Record(),
    limits=Limits(turns=4, tokens=10_000, seconds=5.0),
    clock=lambda: next(ticks),
  )
  assert (slow.status, slow.answer, len(slow.steps)) == (Status.TIMEOUT, None, 2)
  assert (quick.status, quick.answer) == (Status.ANSWERED, "7")


def test_each_episode_has_its_own_results_in_order_and_its_own_view():
  run = Record()
  texts = {"a": [look(1), BAD, look(2), ANSWER], "b": [look(3), look(4), ANSWER]}
  asked = []
  scripted = fakes.scripted(CHAT, texts)

  def generate(requests, /):
    asked.append([task.id for task, _ in requests])
    return scripted(requests)

  views = [VIEWS[1], VIEWS[2]]
  a, b = play(
    [fakes.task("a"), fakes.task("b")], generate=generate, run=run, limits=LIMITS, views=views
  )
  assert asked == [["a", "b"], ["a", "b"], ["a", "b"], ["a"]]  # Lock-step, and only who is left.
  error = a.steps[1].result.error
  calls = {
    id: [call for call in run.calls if call[0] == id] for id in "ab"
  }  # A round has no order.
  assert calls == {
    "a": [("a", 1, [], VIEWS[1]), ("a", 2, ["a saw 1", error], VIEWS[1])],
    "b": [("b", 3, [], VIEWS[2]), ("b", 4, ["b saw 3"], VIEWS[2])],
  }
  assert (a.answer, b.answer) == ("7", "7")


def test_the_calls_of_a_round_run_at_the_same_time_and_keep_their_places():
  """One after the other, the first would wait for the others until its barrier breaks."""
  together = threading.Barrier(3, timeout=10)

  def run(call, task, results, view=IDENTITY):
    together.wait()
    time.sleep(0.1 if task.id == "a" else 0.0)  # The first ends last.
    return ToolResult(text=f"{task.id} saw {call.arguments['bbox_2d'][0]}")

  texts = {id: [look(number), ANSWER] for number, id in enumerate("abc")}
  tasks = [fakes.task(id) for id in texts]
  played = play(tasks, generate=fakes.scripted(CHAT, texts), run=run, limits=LIMITS)
  assert [t.steps[0].result.text for t in played] == ["a saw 0", "b saw 1", "c saw 2"]


def test_samples_of_one_task_are_separate_episodes():
  one = fakes.task("a")
  turns = iter([[look(1), ANSWER], [r"\boxed{5}"]])
  generate = lambda requests: [fakes.completion(text) for text in next(turns)]
  first, second = play([one, one], generate=generate, run=Record(), limits=LIMITS)
  assert (first.answer, second.answer) == ("5", "7")
  assert (len(first.steps), len(second.steps)) == (2, 1)


def test_our_own_mistakes_raise():
  def broken(call, task, results, view=IDENTITY):
    raise ValueError("our bug")

  with pytest.raises(ValueError, match="our bug"):  # Not a malformed call of the policy's.
    episode(look(), ANSWER, run=broken)
  for count in (0, 2):  # Completions for one request.
    with pytest.raises(ValueError, match="zip"):
      generate = lambda requests, n=count: [fakes.completion(ANSWER)] * n
      play([fakes.task("a")], generate=generate, run=Record(), limits=LIMITS)
  with pytest.raises(ValueError, match="1 views for 2 tasks"):
    generate = fakes.scripted(CHAT, {})
    play([fakes.task("a")] * 2, generate=generate, run=Record(), limits=LIMITS, views=[IDENTITY])


def test_tokens_are_the_policys_own():
  """Nothing is decoded and encoded again: the very arrays of the completions are kept."""
  odd = np.array([255, 7, 255], np.int32)  # No text at all in UTF-8.
  done = fakes.completion(ANSWER)
  unusual = Completion(
    context=done.context,
    tokens=odd,
    logps=np.zeros(3, np.float32),
    entropies=np.zeros(3, np.float32),
    text=ANSWER,
    finished=True,
    policy_version=0,
  )
  (played,) = play(
    [fakes.task("a")], generate=lambda requests: [unusual], run=Record(), limits=LIMITS
  )
  assert played.steps[0].completion.tokens is odd and played.answer == "7"
