"""The fakes keep the promises the real parts keep."""

import numpy as np
import pytest

from pixelis_jax.types import Generate, Step, ToolResult
from tests import fakes


def test_scripted_plays_turns_in_order_and_shows_what_came_before():
  chat = fakes.Bytes()
  generate = fakes.scripted(chat, {"a": ["look", "cat"], "b": ["dog"]}, policy_version=3)
  assert isinstance(generate, Generate)
  a, b = fakes.task("a", question="q"), fakes.task("b")
  first_b, first_a = generate([(b, ()), (a, ())])
  assert (first_b.text, first_a.text, first_a.policy_version) == ("dog", "look", 3)
  assert chat.decode(first_a.context.tokens) == "q"
  step = Step(completion=first_a, result=ToolResult(text="a crop"))
  (second,) = generate([(a, (step,))])
  assert (chat.decode(second.context.tokens), second.text) == ("a crop", "cat")
  with pytest.raises(AssertionError, match="task b: turn 1 of 1 scripted"):
    generate([(b, (step,))])


def test_completion_tokens_are_bytes_and_certain():
  done = fakes.completion("é")
  assert done.tokens.tolist() == [0xC3, 0xA9] and done.tokens.dtype == np.int32
  assert not done.logps.any() and not done.entropies.any()
